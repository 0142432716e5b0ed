import torch

from ._stack import stack, tensor_names, unstack
from .magnitude import trim


def ties(task_vectors, density=0.2, aggregate="mean"):
    """TIES: trim, elect signs, merge what agrees (https://arxiv.org/abs/2306.01708).

    Each task keeps its share `density` in (0, 1] of largest entries (see `trim`); each entry's sign is that of the
    tasks' sum; the entries of this sign are aggregated by their "mean" (the paper) or "sum" (usual with a scale of 0.3,
    as in AdaMerging). Lossy by `density`, also for one task alone.
    """
    return merge_agreeing(task_vectors, trim(task_vectors, density), aggregate)


def ties_parts(task_vectors, density=0.2):
    """Each task's part in `ties` by "sum": its trimmed entries that have the elected sign, as in AdaMerging++."""
    return unstack(task_vectors, agreeing(task_vectors, trim(task_vectors, density)))


def merge_agreeing(task_vectors, change, aggregate):
    """Aggregates, after `change`, the entries that have the sign of their sum over tasks."""
    if aggregate not in ("mean", "sum"):
        raise ValueError(f"`aggregate` is {aggregate!r}; choose 'mean' or 'sum'.")
    merged = {}
    for name, entries in agreeing(task_vectors, change):
        merged[name] = entries.sum(0)
        if aggregate == "mean":
            merged[name] /= (entries != 0).sum(0).clamp(min=1)
    return merged


def agreeing(task_vectors, change):
    """Yields (name, stack) with what `change` leaves of the tensors, and zero for entries of another sign than the sum.

    A sum of zero takes the sign that most sums have, and the negative one if there are as many of both, as in the
    released code."""
    names = tensor_names(task_vectors)
    majority = sum(int(stack(task_vectors, name, change).sum(0).sign().sum(dtype=torch.long)) for name in names)
    for name in names:
        stacked = stack(task_vectors, name, change)
        total = stacked.sum(0)
        positive = torch.where(total == 0, majority > 0, total > 0)
        yield name, torch.where(positive, stacked.clamp(min=0), stacked.clamp(max=0))
