"""Starting coefficients: those with which the merged weights come nearest to a data-free merge."""

from collections import defaultdict

import torch

from ..merging import MERGING_METHODS
from ..merging._stack import gram
from ..merging._svd import ROUNDING


@torch.no_grad()
def starting_coefficients(task_vectors, units, method, bounds, scale=1.0, **kwargs) -> dict[str, list[float]]:
    """{unit: coefficient of each task}, the least squares solution of each unit, projected onto `bounds`.

    For the unit u of the tensors l, where T_l (tasks, entries) are their task vectors and m_l is what `method`, which
    makes one model, merges them to:

        lambda_u = argmin sum_l |T_l^t lambda - scale m_l|^2 = pinv(sum_l T_l T_l^t) sum_l T_l scale m_l

    in float64, of least norm where task vectors are zero or depend on each other. So a merge that is a weighted sum is
    met exactly, if its weights are equal within each unit. `units` is {tensor: unit}; all other tensors take part in
    the merge, as in TIES' trimming, and have no coefficients. Each tensor is read when it is needed and then let go.
    Raises ValueError for arguments that the merge refuses, or that make it infinite.
    """
    grams = defaultdict(float)  # of the task vectors and, as the last row and column, of the merge
    for name, merged in MERGING_METHODS[method].function(task_vectors, **kwargs):
        if name in units:
            grams[units[name]] += gram([*(own[name].flatten() for own in task_vectors.values()), merged.flatten()])
    starts = {}
    for unit, products in grams.items():
        # squared, for these eigenvalues are squares of the task vectors' singular values
        inverse = torch.linalg.pinv(products[:-1, :-1], rtol=ROUNDING**2, hermitian=True)
        values = inverse @ (scale * products[:-1, -1])
        if not torch.isfinite(values.float()).all():
            raise ValueError(
                f"The merge {method!r} that is to be the start has NaN or Inf in {unit!r}, with `scale`={scale} and "
                f"{kwargs}; give other `coefficient_init_kwargs`."
            )
        starts[unit] = (values if bounds is None else values.clamp(*bounds)).tolist()
    return starts
