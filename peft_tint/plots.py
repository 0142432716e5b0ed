"""Pictures of a merged model. Needs matplotlib, which comes with the extra `examples`."""

import os
import re

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .tint import Coefficients


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


def plot_accuracy(scores: dict[str, dict[str, float]], path: str | os.PathLike) -> None:
    """Writes grouped bars: `scores` is {method: {task: accuracy between 0 and 1}}, the same tasks for each method."""
    methods, tasks = list(scores), list(next(iter(scores.values())))
    figure = Figure(figsize=(max(6, 1.5 + 1.6 * len(tasks)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.84 / len(methods)
    colors = colormaps["viridis_r"](np.linspace(0.05, 1, len(methods)))  # light to dark, which a grey print keeps
    for index, method in enumerate(methods):
        left = np.arange(len(tasks)) + (index - (len(methods) - 1) / 2) * width
        axes.bar(left, [scores[method][task] for task in tasks], width * 0.92, label=method, color=colors[index])
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set_ylim(0, 1)
    axes.set_ylabel("accuracy")
    axes.grid(axis="y", linewidth=0.5, alpha=0.5)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(methods), 4), frameon=False)
    figure.savefig(path, dpi=150)


def _blocks(units):
    """Where each block's units start, and what to call it: its number, or the module outside of numbered blocks."""
    names = []
    for unit in units:
        number = re.match(r".*?\.(\d+)\.", unit)
        names.append(number[1] if number else unit.split(".")[1 if unit.count(".") > 1 else 0])
    starts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    return starts, [names[start] for start in starts]
