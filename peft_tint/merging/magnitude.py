import torch

from ._stack import check_share, stacks


def magnitude(task_vectors, density=0.2):
    """The sum of the task vectors, each trimmed to its largest entries (https://arxiv.org/abs/1506.02626).

    It is TIES without the signs: lossy by `density`, also for one task alone. See `trim`."""
    for name, stacked in stacks(task_vectors, trim(task_vectors, density)):
        yield name, stacked.sum(0)


def magnitude_parts(task_vectors, density=0.2):
    """Each task's part in `magnitude`: its trimmed task vector."""
    yield from stacks(task_vectors, trim(task_vectors, density))


def trim(task_vectors, density):
    """A change for `stack` that zeroes what is small within its task's whole vector of d entries.

    As TIES' released code has it, what survives is |x| >= the (d - int(density d))-th smallest: int(density d) + 1
    entries, and those equal to the last of them. `density` is in (0, 1], and 1 keeps all."""
    check_share("density", density)
    smallest = {}
    for task, tensors in task_vectors.items():
        entries = sum(tensor.numel() for tensor in tensors.values())
        smallest[task] = kth_smallest_magnitude(tensors.values(), entries - int(density * entries))
    return lambda task, name, tensor: torch.where(tensor.abs() >= smallest[task], tensor, 0)


def kth_smallest_magnitude(tensors, k):
    """The k-th smallest |x| over all entries of some float tensors; 0 for k = 0.

    A radix selection, exact and without a copy of them all: the bit patterns of numbers that are not negative are
    ordered as the numbers, so the upper 16 bits of the k-th are found by counting, and then the lower ones."""
    found = 0
    for shift in (16, 0):
        counts = torch.zeros(2**16, dtype=torch.long)
        for tensor in tensors:
            digits = tensor.detach().float().abs().flatten().view(torch.int32) >> shift
            counts += (digits[digits >> 16 == found] & 0xFFFF).bincount(minlength=2**16).cpu()
        up_to = counts.cumsum(0)
        digit = int(torch.searchsorted(up_to, k))
        k -= int(up_to[digit] - counts[digit])
        found = found << 16 | digit
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).item()
