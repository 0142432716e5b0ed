"""What the methods share: one tensor of all tasks as a stack, and the check of a share."""

import torch


def tensor_names(task_vectors: dict[str, dict]) -> list[str]:
    return list(next(iter(task_vectors.values())))


def stack(task_vectors: dict[str, dict], name: str, change=None) -> torch.Tensor:
    """A tensor of all tasks, (tasks, *shape), copied to float32. `change(task, name, tensor)` is applied to each.

    The tasks are in the order of their names, so that the order in which they were given changes no bit of a sum."""
    tensors = {task: task_vectors[task][name].detach().float() for task in sorted(task_vectors)}
    return torch.stack([change(task, name, tensor) if change else tensor for task, tensor in tensors.items()])


def unstack(task_vectors: dict[str, dict], stacks) -> dict[str, dict]:
    """{task: {name: its row}} of (name, stack) pairs."""
    parts = {task: {} for task in task_vectors}
    for name, stacked in stacks:
        for task, row in zip(sorted(task_vectors), stacked, strict=True):
            parts[task][name] = row
    return parts


def check_share(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` is {value}, and is a share; give a number above 0 and up to 1.")
