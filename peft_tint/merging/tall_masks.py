from ._stack import each


def tall_masks(task_vectors, mask_scale=0.4):
    """TALL-masks (https://arxiv.org/abs/2405.07813): {task: the sum of all, where the task's mask is 1}.

    The mask is |tau_t| > mask_scale |tau_sum - tau_t|; `mask_scale` > 0, in the paper chosen from 0.2 to 0.6 on
    validation data. Lossy, except for one task alone: an entry is the sum's or zero. To store are the sum and one bit
    an entry and task.
    """
    return each(task_vectors, lambda stacked: masks(stacked, mask_scale) * stacked.sum(0))


def masks(stacked, mask_scale):
    """Of shape (tasks, *shape), boolean."""
    if not mask_scale > 0:
        raise ValueError(f"`mask_scale` is {mask_scale}; give a positive number, usually from 0.2 to 0.6.")
    return stacked.abs() > mask_scale * (stacked.sum(0) - stacked).abs()
