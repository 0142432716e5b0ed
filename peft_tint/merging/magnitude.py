import torch

from ._stack import check_share, each


def magnitude(task_vectors, density=0.2):
    """The sum of the task vectors, each trimmed to its largest entries (https://arxiv.org/abs/1506.02626).

    It is TIES without the signs: lossy by `density`, also for one task alone. See `trim`."""
    return each(task_vectors, lambda stacked: stacked.sum(0), trim(task_vectors, density))


def magnitude_parts(task_vectors, density=0.2):
    """Each task's part in `magnitude`: its trimmed task vector."""
    return each(task_vectors, lambda stacked: stacked, trim(task_vectors, density))


def trim(task_vectors, density):
    """A change for `stack` that zeroes what is small within its task's whole vector.

    As TIES' released code has it, what survives is |x| >= `threshold`: int(density d) + 1 entries of d, and those equal
    to the last of them. `density` is in (0, 1], and 1 keeps all."""
    check_share("density", density)
    # `hardshrink` zeroes |x| <= below in one pass, where comparisons are several; `below` is the next smaller float
    below = {}
    for task, tensors in task_vectors.items():
        bits = threshold_bits(tensors.values(), density)
        below[task] = _float(bits - 1) if bits else -1.0
    return lambda task, name, tensor: torch.nn.functional.hardshrink(tensor, below[task])


def threshold_bits(tensors, density):
    """The bit pattern of the (d - int(density d))-th smallest |x| over all d entries of some float tensors; 0 for none.

    A radix selection, exact and without a copy of them all: the bit patterns of numbers that are not negative are
    ordered as the numbers, so the upper 16 bits of the k-th are found by counting, and then the lower ones."""
    counts = _count(bits >> 16 for bits in _magnitude_bits(tensors))
    entries = int(counts.sum())
    upper, rest = _digit(counts, entries - int(density * entries))
    counts = _count(bits[bits >> 16 == upper] & 0xFFFF for bits in _magnitude_bits(tensors))
    return upper << 16 | _digit(counts, rest)[0]


def _magnitude_bits(tensors):
    return (tensor.detach().float().abs().flatten().view(torch.int32) for tensor in tensors)


def _count(digits):
    return sum((some.bincount(minlength=2**16).cpu() for some in digits), torch.zeros(2**16, dtype=torch.long))


def _digit(counts, k):
    """The digit of the k-th smallest number, from the counts of each digit, and its place among those that have it."""
    up_to = counts.cumsum(0)
    digit = int(torch.searchsorted(up_to, k))
    return digit, k - int(up_to[digit] - counts[digit])


def _float(bits):
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32).item()
