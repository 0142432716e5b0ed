import torch

from ._stack import stacks
from .magnitude import trim


def ties(task_vectors, density=0.2, aggregate="mean"):
    """TIES: trim, elect signs, merge what agrees (https://arxiv.org/abs/2306.01708).

    Each task keeps its share `density` in (0, 1] of largest entries (see `trim`); each entry's sign is that of the
    tasks' sum; the entries of this sign are aggregated by their "mean" (the paper) or "sum" (usual with a scale of 0.3,
    as in AdaMerging). Lossy by `density`, also for one task alone.
    """
    yield from merge_agreeing(task_vectors, trim(task_vectors, density), aggregate)


def ties_parts(task_vectors, density=0.2):
    """Each task's part in `ties` by "sum": its trimmed entries that have the elected sign, as in AdaMerging++."""
    for name, sign, agreeing in elect(task_vectors, trim(task_vectors, density)):
        yield name, agreeing.mul_(sign)


def merge_agreeing(task_vectors, change, aggregate):
    """Aggregates, after `change`, the entries that have the sign of their sum over tasks."""
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"`aggregate` is {aggregate!r}; choose 'mean' or 'sum'.")
    for name, sign, agreeing in elect(task_vectors, change):
        merged = agreeing.sum(0).mul_(sign)
        if aggregate == "mean":  # magnitudes above zero become 1, much faster than by a comparison
            merged /= agreeing.ceil_().clamp_(max=1).sum(0).clamp_(min=1)
        yield name, merged


def elect(task_vectors, change):
    """Yields (name, sign, magnitudes) of each tensor: the sign of the sum over tasks of what `change` leaves, and a
    stack of the entries' magnitudes, zero for those of the other sign.

    A sum of zero takes the sign that most sums have, and the negative one if there are as many of both, as in the
    released code."""
    majority = None
    for name, stacked in stacks(task_vectors, change):
        total = stacked.sum(0)
        sign = total.sign()
        cancelled = (total == 0) & (stacked.amax(0) > 0)
        if cancelled.any():
            if majority is None:  # worth reading all once more only where it decides
                sums = (entries.sum(0) for _, entries in stacks(task_vectors, change))
                majority = sum(int(entries.sign().sum(dtype=torch.long)) for entries in sums)
            sign[cancelled] = 1 if majority > 0 else -1
        yield name, sign, stacked.mul_(sign).clamp_(min=0)
