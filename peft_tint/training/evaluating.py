"""Evaluation of one task, counted batch by batch."""

from contextlib import contextmanager
from itertools import chain

from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from .data import EXPERT_ROWS
from .metrics import count, metrics
from .outputs import IGNORED, LABELS, SPAN
from .rows import Rows

BATCHES, MOST = 8, 1e8  # that the expert runs on before the model does, and bytes of its rows


def evaluate(rows: Rows, task: str, loader, compute_metrics, bar) -> dict[str, float]:
    """Metrics of the merged model and of the expert, see `TintTrainer.evaluate`. `loader` gives each process its part;
    `compute_metrics` is a function or None."""
    sums, gathered, labelled = {}, Gathered(rows), False
    rows.model.set_task(task)
    for batch, expert_rows in _with_expert_rows(rows, task, loader):
        output = rows.forward(task, batch, evaluating=True).output
        ours = output.rows()
        expert_rows = rows.match(task, ours, expert_rows)
        has_labels = any(name in batch for name in LABELS)
        labelled |= has_labels
        if compute_metrics is not None and has_labels:
            gathered.add(output, expert_rows, batch)
            output = output._replace(labels=None)
        with _of_task(task):
            counted = count(rows.problem(task, output), rows.kind, output, ours, expert_rows, rows.base)
        for name, values in rows.accelerator.gather_for_metrics(counted).items():
            sums[name] = sums.get(name, 0) + values.sum(0).double().cpu()
        bar.update()
    with _of_task(task):
        found = metrics(sums)
    if compute_metrics is not None and labelled:
        return found | gathered.metrics(compute_metrics)
    if labelled and "labelled" not in sums:
        raise ValueError(
            f"Task {task!r}: its labels cannot be compared with what a {type(rows.base).__name__} gives; give "
            "`compute_metrics`, or leave them out."
        )
    return found


def _with_expert_rows(rows, task, loader):
    """Batches with the expert's rows. Where it has to run, it does for several at once, since weights are merged anew
    each time that the model becomes the expert and itself again; but in one process alone, for Accelerate tells the end
    of what several processes share by how far it has been read."""
    batches, number = iter(loader), BATCHES if rows.accelerator.num_processes == 1 else 1
    for first in batches:
        if EXPERT_ROWS in first:
            yield first, first[EXPERT_ROWS]
            continue
        group, size = [], 0
        with rows.model.expert(task):
            for batch in chain([first], batches):
                group.append((batch, rows.forward(task, batch, evaluating=True).compared.rows()))
                size += group[-1][1].nbytes
                if len(group) == number or size > MOST:
                    break
        yield from group


class Gathered:
    """Outputs of the model and of the expert, and labels, of all samples, as `transformers.Trainer` gathers them."""

    def __init__(self, rows):
        self.accelerator, self.kind = rows.accelerator, rows.kind
        self.containers = [EvalLoopContainer(padding_index=IGNORED) for _ in range(3)]

    def add(self, output, expert_rows, batch):
        outputs = output.raw.float(), output.fill(expert_rows)
        if self.kind == "depth":  # to which we have added an axis
            outputs = tuple(both.squeeze(1) for both in outputs)
        labels = next(batch[name] for name in LABELS if name in batch)
        if self.kind == "span":  # two outputs and two labels
            outputs, labels = (tuple(both.unbind(1)) for both in outputs), tuple(batch[name] for name in SPAN)
        for container, found in zip(self.containers, (*outputs, labels), strict=True):
            found = self.accelerator.pad_across_processes(found, dim=1, pad_index=IGNORED)
            container.add(self.accelerator.gather_for_metrics(found))
            container.to_cpu_and_numpy()

    def metrics(self, compute_metrics):
        ours, experts, labels = (container.get_arrays() for container in self.containers)
        ours, experts = (compute_metrics(EvalPrediction(values, labels)) for values in (ours, experts))
        found = {}
        for name, value in ours.items():
            normalized = value / experts[name] if experts[name] else float("nan")
            found |= {name: value, f"expert_{name}": experts[name], f"normalized_{name}": normalized}
        return found


@contextmanager
def _of_task(task):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"Task {task!r}: {error}.") from None
