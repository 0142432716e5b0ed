import torch

from ._stack import stacks


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
    for name, stacked in stacks(task_vectors):
        yield name, _mean(stacked.view(len(stacked), -1), max_iterations, tolerance).view(stacked.shape[1:])


def _mean(rows, max_iterations, tolerance):
    """All points of the iteration are combinations of the directions, so it runs on their coefficients alone."""
    norms = rows.norm(dim=1)
    units = rows[norms > 0] / norms[norms > 0, None]
    gram = (units @ units.T).double()  # cosines
    mean = torch.ones(len(units), dtype=torch.float64, device=rows.device)  # coefficients
    if len(units) == 0 or mean @ gram @ mean < 1e-6:
        return rows.mean(0)
    mean /= (mean @ gram @ mean).sqrt()
    for _ in range(max_iterations):
        cosines = (gram @ mean).clamp(-1, 1)
        if cosines.min() < -1 + 1e-6:
            return rows.mean(0)
        angles = cosines.arccos()
        weights = 1 / torch.sinc(angles / torch.pi) / len(units)  # angle / sin(angle), 1 at 0
        tangent = weights - weights @ cosines * mean  # the mean of the logarithms at `mean`
        length = (tangent @ gram @ tangent).clamp(min=0).sqrt()
        mean = length.cos() * mean + torch.sinc(length / torch.pi) * tangent
        mean /= (mean @ gram @ mean).sqrt()
        if length < tolerance:
            break
    return norms.mean() * (mean.float() @ units)
