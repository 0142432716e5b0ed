import functools

import torch

from ._stack import each
from .magnitude import trim


def ties(task_vectors, density=0.2, aggregate="mean"):
    """TIES: trim, elect signs, merge what agrees (https://arxiv.org/abs/2306.01708).

    Each task keeps its share `density` in (0, 1] of largest entries (see `trim`); each entry's sign is that of the
    tasks' sum; the entries of this sign are aggregated by their "mean" (the paper) or "sum" (usual with a scale of 0.3,
    as in AdaMerging). Lossy by `density`, also for one task alone.
    """
    check_aggregate(aggregate)
    return merge_agreeing(task_vectors, trim(task_vectors, density), aggregate)


def ties_parts(task_vectors, density=0.2):
    """Each task's part in `ties` by "sum": its trimmed entries that have the elected sign, as in AdaMerging++."""
    change = trim(task_vectors, density)
    majority = majority_sign(task_vectors, change)

    def part(stacked):
        sign, agreeing = elect(stacked, majority)
        return agreeing.mul_(sign)

    return each(task_vectors, part, change)


def merge_agreeing(task_vectors, change, aggregate):
    """Aggregates, after `change`, the entries that have the sign of their sum over tasks."""
    majority = majority_sign(task_vectors, change)

    def merge(stacked):
        sign, agreeing = elect(stacked, majority)
        merged = agreeing.sum(0).mul_(sign)
        if aggregate == "mean":  # magnitudes above zero become 1, much faster than by a comparison
            merged /= agreeing.ceil_().clamp_(max=1).sum(0).clamp_(min=1)
        return merged

    return each(task_vectors, merge, change)


def elect(stacked, majority):
    """The sign of the sum over tasks; and, in the place of the stack, the magnitudes of the entries that have it."""
    total = stacked.sum(0)
    sign = total.sign()
    cancelled = (total == 0) & (stacked.amax(0) > 0)
    if cancelled.any():
        sign[cancelled] = majority()
    return sign, stacked.mul_(sign).clamp_(min=0)


def majority_sign(task_vectors, change):
    """The sign that a sum of zero takes: that of most sums, and the negative one if there are as many of both, as in
    the released code. A function, called only where there is such a sum, for it reads all once more."""

    @functools.cache
    def majority():
        signs = each(task_vectors, lambda stacked: int(stacked.sum(0).sign().sum(dtype=torch.long)), change)
        return 1 if sum(count for _, count in signs) > 0 else -1

    return majority


def check_aggregate(aggregate):
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"`aggregate` is {aggregate!r}; choose 'mean' or 'sum'.")
