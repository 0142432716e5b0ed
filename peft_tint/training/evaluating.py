"""Evaluation of one task, counted batch by batch."""

from contextlib import contextmanager

from transformers import EvalPrediction
from transformers.trainer_pt_utils import EvalLoopContainer

from .metrics import count, metrics
from .outputs import IGNORED, LABELS, SPAN
from .rows import Rows


def evaluate(rows: Rows, task: str, loader, compute_metrics, bar) -> dict[str, float]:
    """Metrics of the merged model and of the expert, see `TintTrainer.evaluate`. `loader` gives each process its part;
    `compute_metrics` is a function or None."""
    config, sums, gathered, labelled = getattr(rows.base, "config", None), {}, Gathered(rows), False
    ignored = (IGNORED, getattr(config, "semantic_loss_ignore_index", IGNORED))
    rows.model.set_task(task)
    for batch in loader:
        expert_rows = rows.of_expert(task, batch, evaluating=True)
        output, ours = rows.forward(task, batch, evaluating=True)
        rows.check(task, ours, expert_rows)
        has_labels = any(name in batch for name in LABELS)
        labelled |= has_labels
        if compute_metrics is not None and has_labels:
            gathered.add(output, expert_rows, batch)
            output = output._replace(labels=None)
        with _of_task(task):
            counted = count(rows.problem(task, output), rows.kind, output, ours, expert_rows, ignored)
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


class Gathered:
    """Outputs of the model and of the expert, and labels, of all samples, as `transformers.Trainer` gathers them."""

    def __init__(self, rows):
        self.accelerator, self.is_span = rows.accelerator, rows.kind == "span"
        self.containers = [EvalLoopContainer(padding_index=IGNORED) for _ in range(3)]

    def add(self, output, expert_rows, batch):
        outputs = output.raw.float(), output.fill(expert_rows)
        labels = next(batch[name] for name in LABELS if name in batch)
        if self.is_span:  # two outputs and two labels
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
