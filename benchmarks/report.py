"""The table and the picture of the results of `run.py`."""

import json
from itertools import product
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator
from matplotlib.transforms import Bbox

matplotlib.use("Agg")
README = Path(__file__).parent.parent / "README.md"


def report(folder: Path) -> None:
    """Writes the table and pareto.png to a folder of results, among which are those of "experts", and the table to the
    README, between the comments that name the folder."""
    results = {file.stem: json.loads(file.read_text())["results"] for file in sorted(folder.glob("*.json"))}
    for name, seeds in list(results.items()):
        if "before_surgery" in seeds[0]:
            results[name.removesuffix("_surgery")] = [{**seed, **seed["before_surgery"]} for seed in seeds]
    experts = {seed["seed"]: seed["accuracy"] for seed in results["experts"]}
    rows = {name: summary(seeds, experts) for name, seeds in results.items()}
    rows = dict(sorted(rows.items(), key=lambda item: item[1]["normalised"][0]))
    text = table(rows, list(experts[results["experts"][0]["seed"]]))
    (folder / "table.md").write_text(text)
    plot(results, rows, experts, folder / "pareto.png")
    begin, end = f"<!-- {folder.name} -->\n", f"<!-- end of {folder.name} -->"
    before, rest = README.read_text().split(begin)
    README.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def summary(seeds, experts):
    """Means over the seeds; of the mean accuracy over that of the experts, also the standard deviation."""
    accuracy = {task: np.mean([seed["accuracy"][task] for seed in seeds]) for task in seeds[0]["accuracy"]}
    normalised = [
        np.mean([seed["accuracy"][task] / experts[seed["seed"]][task] for task in accuracy if task != "mean"])
        for seed in seeds
    ]
    of_all = {name: np.mean([seed[name] for seed in seeds]) for name in ("cpu_s", "peak_mb", "bytes")}
    return {"accuracy": accuracy, "normalised": (np.mean(normalised), np.std(normalised), len(seeds)), **of_all}


def table(rows, tasks):
    lines = ["| method | " + " | ".join(tasks) + " | normalised | CPU s | peak MB | MB of the models |"]
    lines.append("|---" * (len(tasks) + 5) + "|")
    for name, row in rows.items():
        mean, deviation, count = row["normalised"]
        cells = [f"{row['accuracy'][task]:.3f}" for task in tasks]
        seeds = {1: " (one seed)", 3: ""}.get(count, f" ({count} seeds)")
        cells.append(f"{mean:.1%}{f' ± {deviation:.1%}' if count > 1 else ''}{seeds}")
        cells += [f"{row['cpu_s']:.0f}", f"{row['peak_mb']:.0f}", f"{row['bytes'] / 1e6:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(results, rows, experts, path):
    """Normalised accuracy against CPU time; lines are the courses of trainings, of the first seed that has one."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.set_xscale("log", subs=[])
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    label = "CPU seconds from the experts to the merged model (rings: one model a task)"
    axes.set(xlabel=label, ylabel="normalised accuracy")
    least = min(row["bytes"] for row in rows.values())
    points = {}
    for name, row in rows.items():
        accuracy = row["normalised"][0]
        if name in ("experts", "pretrained"):
            axes.axhline(accuracy, color="0.6", linestyle=":", linewidth=1)
            axes.text(0.005, accuracy, name, transform=axes.get_yaxis_transform(), size=7, va="bottom")
            continue
        points[name] = row["cpu_s"], accuracy
        fill = "white" if row["bytes"] > 2 * least else None
        (point,) = axes.plot(*points[name], "o", markersize=4, markerfacecolor=fill)
        for seed in results[name]:
            if seed.get("curve"):
                _, seconds, accuracy = np.transpose(seed["curve"])
                axes.plot(seconds, accuracy / experts[seed["seed"]]["mean"], color=point.get_color(), linewidth=0.8)
                break
    add_names(figure, axes, points)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def add_names(figure, axes, points):
    """Names beside their points, each at the first place where it covers no name and no point and stays inside."""
    figure.canvas.draw()  # for its layout
    frame = axes.get_window_extent()
    taken = [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in axes.transData.transform(list(points.values()))]
    for name, point in points.items():
        text = axes.annotate(name, point, (0, 0), textcoords="offset points", size=7)
        for x, y in product((5, -5, 0), (1, -7, 6, -12, 12)):
            text.set(position=(x, y), ha={5: "left", -5: "right", 0: "center"}[x])
            box = text.get_window_extent()
            if frame.x0 < box.x0 and box.x1 < frame.x1 and not any(box.overlaps(other) for other in taken):
                break
        taken.append(box)
