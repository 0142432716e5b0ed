import torch

from ._stack import each


def emr(task_vectors):
    """EMR-Merging: elect, mask, rescale (https://arxiv.org/abs/2405.17461). {task: rescaler_t mask_t unified}.

    unified has the sign of the mean (+1 where it is above 0, else -1) and the largest magnitude of the tasks that have
    this sign; mask_t is where the task has it; rescaler_t = |tau_t|_1 / |mask_t unified|_1, over the whole vector as in
    the paper (its released code takes one for each tensor). Lossy, except for one task alone. To store are unified, one
    bit an entry and task, and one number a task.
    """
    norms, masked_norms = (torch.zeros(len(task_vectors), dtype=torch.float64) for _ in range(2))
    for _, (own, masked) in each(task_vectors, lambda stacked: (_l1_norms(stacked), _l1_norms(_mask(stacked)))):
        norms += own
        masked_norms += masked
    rescalers = norms / masked_norms.where(masked_norms > 0, 1)

    def rescale(stacked):
        return _mask(stacked).mul_(rescalers.to(stacked).view(-1, *[1] * (stacked.ndim - 1)))

    return each(task_vectors, rescale)


def _mask(stacked):
    """mask_t unified, (tasks, *shape)."""
    sign = (stacked.mean(0) > 0).float() * 2 - 1
    agreeing = (stacked * sign).clamp(min=0)  # magnitudes
    return sign * agreeing.amax(0) * (agreeing > 0)


def _l1_norms(stacked):
    return stacked.view(len(stacked), -1).abs().sum(1, dtype=torch.float64).cpu()
