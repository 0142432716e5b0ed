from .dare import drop
from .ties import check_aggregate, merge_agreeing


def dare_ties(task_vectors, density=0.1, aggregate="mean", seed=0):
    """TIES with DARE's random drop in the place of the trimming (https://arxiv.org/abs/2311.03099).

    `density` and `seed` as in `dare`, `aggregate` as in `ties`. Lossy by `density`, also for one task alone."""
    check_aggregate(aggregate)
    return merge_agreeing(task_vectors, drop(density, seed), aggregate)
