"""Pictures of a merged model. Needs matplotlib, which comes with the extra `examples`."""

import os
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .tint import Coefficients

DASHES = ("-", "--", ":", "-.")


def plot_coefficients(coefficients: Coefficients, path: str | os.PathLike) -> None:
    """Writes a heat map of the coefficients, tasks by units in the model's order; blocks are named below."""
    values = coefficients.values.numpy()  # (tasks, units)
    tasks, units = values.shape
    figure = Figure(figsize=(max(6, min(16, 3 + 0.1 * units)), 1.6 + 0.45 * tasks), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(tasks), coefficients.tasks)
    starts, names = _blocks(coefficients.units)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="white", linewidth=1.5)
    ends = [*starts[1:], units]
    axes.set_xticks([(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)], names)
    axes.tick_params(axis="x", length=0)
    if len(names) > 8:
        axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("block")
    axes.set_title("merging coefficients")
    figure.colorbar(image, ax=axes, pad=0.01)
    figure.savefig(path, dpi=150)


def plot_accuracy(
    scores: dict[str, dict[str, float]], path: str | os.PathLike, metric: str = "accuracy", lowest: float = 0.0
) -> None:
    """Writes grouped bars: `scores` is {method: {task: accuracy between 0 and 1}}, the same tasks for each method.

    `metric` names them on the axis, which begins at `lowest`."""
    methods, tasks = list(scores), list(next(iter(scores.values())))
    rows = np.array_split(
        np.arange(len(tasks)), -(-len(tasks) // 7)
    )  # of 7 tasks at the most, which a page has room for
    figure = Figure(figsize=(max(6, 1.5 + 1.6 * len(rows[0])), 1 + 3 * len(rows)), layout="constrained")
    width = 0.84 / len(methods)
    colors = colormaps["viridis_r"](np.linspace(0.05, 1, len(methods)))  # light to dark, which a grey print keeps
    for axes, row in zip(figure.subplots(len(rows), squeeze=False)[:, 0], rows, strict=True):
        for index, method in enumerate(methods):
            left = np.arange(len(row)) + (index - (len(methods) - 1) / 2) * width
            values = [scores[method][tasks[i]] for i in row]
            axes.bar(left, values, width * 0.92, label=method, color=colors[index])
        axes.set_xticks(range(len(row)), [tasks[i] for i in row])
        axes.set_xlim(-0.6, len(rows[0]) - 0.4)
        axes.set_ylim(lowest, 1)
        axes.set_ylabel(metric)
        axes.grid(axis="y", linewidth=0.5, alpha=0.5)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(methods), 4), frameon=False)
    figure.savefig(path, dpi=150)


def plot_cross_task(scores: dict[str, dict[str, float]], path: str | os.PathLike, metric: str = "accuracy") -> None:
    """Writes the matrix of each task's encoder under each task's head: `scores` is {encoder: {head: number}}.

    Off the diagonal it is how far an encoder serves the other tasks, the synergy of Model Tinting
    (https://arxiv.org/abs/2412.19098)."""
    values = np.array([list(row.values()) for row in scores.values()])
    heads = list(next(iter(scores.values())))
    _matrix(values, list(scores), heads, path, f"{metric} across tasks", ("head", "encoder"))


def plot_similarity(cosines, tasks: list[str], path: str | os.PathLike) -> None:
    """Writes the matrix of cosines between task vectors, (tasks, tasks), as `ExpertsReport.cosines` has them."""
    _matrix(np.asarray(cosines), tasks, tasks, path, "cosine of task vectors", ("", ""))


def plot_training(log_history: list[dict], tasks: list[str], path: str | os.PathLike) -> None:
    """Writes the curves of a training, one panel a measure of `TintTrainer.log_history`, one line a task."""
    panels = {
        measure: curves
        for measure in ("loss", "agreement", "kept", "drift")
        if (curves := {task: curve for task in tasks if (curve := _curve(log_history, f"{measure}_{task}"))})
    }
    if not panels:
        raise ValueError("`log_history` has no measures of these tasks; give that of a trainer after `train()`.")
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(0.6 + 3.7 * columns, 0.6 + 2.5 * rows), layout="constrained")
    colors = colormaps["viridis"](np.linspace(0, 0.9, len(tasks)))
    for number, (measure, curves) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(rows, columns, number)
        for index, task in enumerate(tasks):
            if task in curves:
                steps, values = zip(*curves[task], strict=True)
                # by their dashes, too, which a grey print keeps
                axes.plot(steps, values, color=colors[index], linestyle=DASHES[index % len(DASHES)], label=task)
        axes.set_title(measure)
        axes.set_xlabel("step")
        axes.grid(linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    handles = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False)
    figure.savefig(path, dpi=150)


def _curve(log_history, name):
    return [(entry["step"], entry[name]) for entry in log_history if name in entry]


def _matrix(values, rows, columns, path, title, labels):
    """A heat map with the numbers in it."""
    cell, size = (0.62, 9) if len(rows) <= 8 else (0.42, 7)  # inches and points
    side = 1.8 + cell * len(rows)
    figure = Figure(figsize=(side + 0.7, side), layout="constrained")
    axes = figure.subplots()
    low, high = min(0, values.min()), max(1, values.max())  # the same in pictures that are to be compared
    image = axes.imshow(values, cmap="viridis", interpolation="nearest", vmin=low, vmax=high)
    for (row, column), value in np.ndenumerate(values):
        dark = image.norm(value) < 0.6
        axes.text(
            column, row, f"{value:.2f}", ha="center", va="center", color="white" if dark else "black", fontsize=size
        )
    axes.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title)
    figure.colorbar(image, ax=axes, pad=0.02)
    figure.savefig(path, dpi=150)


def _blocks(units):
    """Where each block's units start, and what to call it: its number, or the module outside of numbered blocks."""
    names = []
    for unit in units:
        number = re.match(r".*?\.(\d+)\.", unit)
        names.append(number[1] if number else unit.split(".")[1 if unit.count(".") > 1 else 0])
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    return starts, [names[start] for start in starts]
