import torch

from ._stack import stack, tensor_names


def emr(task_vectors):
    """EMR-Merging: elect, mask, rescale (https://arxiv.org/abs/2405.17461). {task: rescaler_t mask_t unified}.

    unified has the sign of the mean (+1 where it is above 0, else -1) and the largest magnitude of the tasks that have
    this sign; mask_t is where the task has it; rescaler_t = |tau_t|_1 / |mask_t unified|_1, over the whole vector as in
    the paper (its released code takes one for each tensor). Lossy, except for one task alone. To store are unified, one
    bit an entry and task, and one number a task.
    """
    merged = {task: {} for task in task_vectors}
    norms, masked_norms = dict.fromkeys(task_vectors, 0.0), dict.fromkeys(task_vectors, 0.0)
    for name in tensor_names(task_vectors):
        stacked = stack(task_vectors, name)
        sign = (stacked.mean(0) > 0).float() * 2 - 1
        agreeing = (stacked * sign).clamp(min=0)  # (tasks, *shape), magnitudes
        unified = sign * agreeing.amax(0)
        for task, vector, mask in zip(sorted(task_vectors), stacked, agreeing > 0, strict=True):
            merged[task][name] = unified * mask
            norms[task] += vector.abs().sum(dtype=torch.float64).item()
            masked_norms[task] += merged[task][name].abs().sum(dtype=torch.float64).item()
    for task, tensors in merged.items():
        for tensor in tensors.values():
            tensor *= norms[task] / (masked_norms[task] or 1)
    return merged
