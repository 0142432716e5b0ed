import torch

from ._stack import each


def karcher(task_vectors, max_iterations=100, tolerance=1e-9):
    """The Karcher mean of the task vectors' directions (https://doi.org/10.1002/cpa.3160300502), times their mean norm.

    It acts on each tensor by itself, as `slerp` does, for any number of tasks. The mean on the sphere is iterated until
    a step is below `tolerance` (an angle) or `max_iterations` is reached. Tensors that a task did not change count in
    the mean norm only. Where the mean on the sphere is not defined (directions opposite to it, as any two scalars of
    different sign are), the tensor's plain mean is taken. One task alone gives its expert.
    """
    if not (max_iterations >= 1 and tolerance > 0):
        raise ValueError(
            f"`max_iterations` is {max_iterations} and `tolerance` is {tolerance}; give a count and a positive number."
        )
    return each(task_vectors, lambda stacked: _mean(stacked, max_iterations, tolerance))


def _mean(stacked, max_iterations, tolerance):
    """All points of the iteration are combinations of the directions, so it runs on their coefficients alone."""
    rows = stacked.view(len(stacked), -1)
    norms = rows.norm(dim=1)
    rows /= norms.where(norms > 0, 1)[:, None]  # directions, in place
    changed = norms > 0
    gram = (rows @ rows.T)[changed][:, changed].double()  # cosines
    mean = _mean_coefficients(gram, max_iterations, tolerance)
    if mean is None:
        coefficients = norms / len(rows)  # of the plain mean
    else:
        coefficients = torch.zeros_like(norms).masked_scatter(changed, norms.mean() * mean.float())
    return (coefficients @ rows).view(stacked.shape[1:])


def _mean_coefficients(gram, max_iterations, tolerance):
    """Of the directions with these cosines; None where their mean on the sphere is not defined."""
    mean = torch.ones(len(gram), dtype=torch.float64, device=gram.device)
    if len(gram) == 0 or mean @ gram @ mean < 1e-6:
        return None
    mean /= (mean @ gram @ mean).sqrt()
    for _ in range(max_iterations):
        cosines = (gram @ mean).clamp(-1, 1)
        if cosines.min() < -1 + 1e-6:
            return None
        angles = cosines.arccos()
        weights = 1 / torch.sinc(angles / torch.pi) / len(gram)  # angle / sin(angle), 1 at 0
        tangent = weights - weights @ cosines * mean  # the mean of the logarithms at `mean`
        length = (tangent @ gram @ tangent).clamp(min=0).sqrt()
        mean = length.cos() * mean + torch.sinc(length / torch.pi) * tangent
        mean /= (mean @ gram @ mean).sqrt()
        if length < tolerance:
            break
    return mean
