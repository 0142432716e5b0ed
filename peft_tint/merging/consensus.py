from ._stack import each
from .tall_masks import masks


def consensus(task_vectors, mask_scale=0.4, min_tasks=2):
    """Consensus merging (https://arxiv.org/abs/2405.07813): the sum of the entries that several tasks use.

    Kept are the entries that are in at least `min_tasks` of the tasks' masks, as in `tall_masks`; so entries of one
    task alone ("selfish") are lost by design. Usually scaled as task arithmetic is. `min_tasks` is in 1 ... number of
    tasks; one task alone needs 1, and then gives its expert.
    """
    check_min_tasks(task_vectors, min_tasks)
    return each(task_vectors, lambda stacked: keep(stacked, mask_scale, min_tasks).sum(0))


def consensus_parts(task_vectors, mask_scale=0.4, min_tasks=2):
    """Each task's part in `consensus`: its task vector without the entries that too few tasks use."""
    check_min_tasks(task_vectors, min_tasks)
    return each(task_vectors, lambda stacked: keep(stacked, mask_scale, min_tasks))


def keep(stacked, mask_scale, min_tasks):
    return stacked * (masks(stacked, mask_scale).sum(0) >= min_tasks)


def check_min_tasks(task_vectors, min_tasks):
    if not 1 <= min_tasks <= len(task_vectors):
        raise ValueError(
            f"`min_tasks` is {min_tasks} and there are {len(task_vectors)} tasks, so nothing could be kept. "
            f"Give an integer from 1 to {len(task_vectors)}."
        )
