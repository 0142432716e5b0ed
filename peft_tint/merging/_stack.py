"""What the methods share: one tensor of all tasks as a stack, and the check of a share."""

import torch


def tensor_names(task_vectors: dict[str, dict]) -> list[str]:
    return list(next(iter(task_vectors.values())))


def stack(task_vectors: dict[str, dict], name: str, change=None) -> torch.Tensor:
    """A tensor of all tasks, (tasks, *shape), copied to float32. `change(task, name, tensor)` is applied to each.

    The tasks are in the order of their names, so that the order in which they were given changes no bit of a sum."""
    stacked = None
    for row, task in enumerate(sorted(task_vectors)):
        tensor = task_vectors[task][name].detach()
        tensor = change(task, name, tensor.float()) if change else tensor
        if stacked is None:  # filled row by row: a list to stack would take as much again
            stacked = tensor.new_empty(len(task_vectors), *tensor.shape, dtype=torch.float32)
        stacked[row] = tensor
    return stacked


def each(task_vectors: dict[str, dict], merge, change=None):
    """Yields (name, merge(`stack`)) of all tensors, and lets go of a stack before it makes the next."""
    for name in tensor_names(task_vectors):
        yield name, merge(stack(task_vectors, name, change))


def check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` is {value}, and is a share; give a number above 0 and up to 1.")
