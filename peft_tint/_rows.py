"""Batches that mix tasks."""

from collections.abc import Mapping

import torch
from torch import nn


def take_rows(outputs: dict, tasks: list[str], index: list[int] | None = None, of: str = "A tint layer"):
    """Row i (or `index[i]`) of what the task `tasks[i]` gave. Where tasks differ in their classes, the ones that a
    row's task has not are filled up with the lowest finite number."""
    first = next(iter(outputs.values()))
    if isinstance(first, Mapping):
        return type(first)(
            **{key: take_rows({t: o[key] for t, o in outputs.items()}, tasks, index, of) for key in first}
        )
    if isinstance(first, tuple | list):
        parts = range(len(first))
        return type(first)(take_rows({t: o[i] for t, o in outputs.items()}, tasks, index, of) for i in parts)
    if not isinstance(first, torch.Tensor):
        if all(output is first or output == first for output in outputs.values()):
            return first
        raise ValueError(f"{of} gives a {type(first).__name__}, which cannot be mixed; use batches of one task.")
    counts = {task: len(tasks) if index is None else tasks.count(task) for task in outputs}
    if first.ndim == 0 or any(len(outputs[task]) != count for task, count in counts.items()):
        raise ValueError(
            f"{of} gives a tensor of shape {tuple(first.shape)} in a batch of {len(tasks)}, which has no row "
            "for each sample, so tasks cannot be mixed; use batches of one task."
        )
    shape = [max(sizes) for sizes in zip(*(output.shape for output in outputs.values()), strict=True)]
    rows = []
    for i, task in enumerate(tasks):
        row = outputs[task][i if index is None else index[i]]
        missing = [n for size, own in zip(shape[1:], row.shape, strict=True) for n in (size - own, 0)]
        rows.append(nn.functional.pad(row, missing[::-1], value=torch.finfo(row.dtype).min) if any(missing) else row)
    return torch.stack(rows)
