import hashlib

import torch

from ._stack import check_share, each


def dare(task_vectors, density=0.1, seed=0):
    """DARE: drops entries at random and rescales the rest, then sums (https://arxiv.org/abs/2311.03099).

    Each entry is kept with probability `density` in (0, 1] (the paper's 1 - p) and then divided by it, so that its
    expectation stays. Lossy by `density`, also for one task alone. What is dropped depends on `seed`, the task's and
    the tensor's name and nothing else.
    """
    return each(task_vectors, lambda stacked: stacked.sum(0), drop(density, seed))


def dare_parts(task_vectors, density=0.1, seed=0):
    """Each task's part in `dare`: what is left of its task vector, rescaled."""
    return each(task_vectors, lambda stacked: stacked, drop(density, seed))


def drop(density, seed):
    """A change for `stack`: DARE of one tensor, the same on every device and with any number of threads."""
    check_share("density", density)

    def dropped(task, name, tensor):
        digest = hashlib.sha256(repr((seed, task, name)).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
        kept = torch.rand(tensor.shape, generator=generator) < density  # on the CPU
        return torch.where(kept.to(tensor.device), tensor / density, 0)

    return dropped
