"""What tells without labels whether a training helps or collapses, and a guard that goes back when it does."""

from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch


@dataclass
class Window:
    """Measures of the batches since the last entry of the log.

    `values` are {measure: {task: [of each batch]}}; `classes` are {task: [how often the model predicted each class, how
    often the expert did]}. What is added are tensors, which stay on their device until `fetch` makes them numbers.
    """

    values: dict[str, dict[str, list[torch.Tensor | float]]] = field(default_factory=dict)
    classes: dict[str, torch.Tensor | list[list[int]]] = field(default_factory=dict)

    def add(self, task: str, **measures: torch.Tensor) -> None:
        for name, value in measures.items():
            self.values.setdefault(name, {}).setdefault(task, []).append(value.detach().float().reshape(()))

    def add_classes(self, task: str, predicted: torch.Tensor, expected: torch.Tensor, number: int) -> None:
        classes = torch.stack([predicted.flatten(), expected.flatten()])
        counts = classes.new_zeros(2, number).scatter_add_(1, classes, torch.ones_like(classes))
        if task in self.classes:
            counts += torch.as_tensor(self.classes[task], device=counts.device)
        self.classes[task] = counts

    def fetch(self) -> "Window":
        """Waits for the device, once for all."""
        lists = [values for tasks in self.values.values() for values in tasks.values()]
        tensors = [value for values in lists for value in values if isinstance(value, torch.Tensor)]
        if tensors:
            numbers = iter(torch.stack(tensors).tolist())
            for values in lists:
                values[:] = [next(numbers) if isinstance(value, torch.Tensor) else value for value in values]
        self.classes = {task: torch.as_tensor(counts).tolist() for task, counts in self.classes.items()}
        return self

    def summary(self) -> dict[str, float]:
        """The mean of each measure over all batches, and that of the spread over tasks."""
        means = {name: float(np.mean(list(chain(*values.values())))) for name, values in self.values.items()}
        return means | ({"spread": float(np.mean(list(self._spreads().values())))} if self.classes else {})

    def per_task(self) -> dict[str, float]:
        measures = {name: self.means(name) for name in self.values} | {"spread": self._spreads()}
        return {f"{name}_{task}": value for name, tasks in measures.items() for task, value in tasks.items()}

    def means(self, name: str) -> dict[str, float]:
        """Of one measure, for each task that has it."""
        return {task: float(np.mean(values)) for task, values in self.values.get(name, {}).items()}

    def _spreads(self):
        return {task: perplexity(ours) / perplexity(experts) for task, (ours, experts) in self.classes.items()}


def perplexity(counts: list[int]) -> float:
    """The effective number of classes, exp(entropy of their frequencies): 1 where all are one class."""
    frequencies = np.array([count for count in counts if count]) / sum(counts)
    return float(np.exp(-(frequencies * np.log(frequencies)).sum()))


class Snapshot(NamedTuple):
    """Trainable parameters by name as they were after `step`, and how good they are."""

    step: int
    value: float
    parameters: dict[str, torch.Tensor]


class CollapseGuard:
    """Finds when a training has collapsed, and knows the best state to go back to.

    A task's gain in a window is how much oftener the model predicted the expert's class, in each batch before it was
    trained on it, than the parameters of the start did in the same batches. A task has collapsed where it is below
    `-allowed`. The best state is that at the beginning of the window of most mean gain, or the start, whose gain is
    zero.
    """

    def __init__(self, allowed: float, start: dict[str, torch.Tensor]):
        self.allowed = allowed
        self.start = self.best = self.latest = Snapshot(0, 0.0, start)

    def collapsed(self, gains: dict[str, float], step: int, parameters: dict[str, torch.Tensor]) -> list[str]:
        """The tasks that have. To be called at the end of a window, with what the parameters have become."""
        gain = float(np.mean(list(gains.values())))
        if gain > self.best.value:
            self.best = self.latest._replace(value=gain)
        self.latest = Snapshot(step, gain, parameters)
        return [task for task, gain in gains.items() if gain < -self.allowed]
