"""python benchmarks/dts_codecs.py --model MODEL --data FOLDER [--output benchmarks/results/dts_codecs.json]

The codecs of DTS by bytes a task: relative error of the decoded task vector, and accuracy of the base with it under the
expert's own head, on the experts and the evaluation half of `vision_tint.py` (same arguments). Agreement is with the
expert's predictions, which is what a codec can be blamed for. Bytes are those of the safetensors file over those of the
base in float32, heads apart. Also writes the curves as a picture beside the JSON.
"""

import argparse
import os
import tempfile
import time

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
from vision_tint import add_suite_arguments, collate, prepare, save_result

from peft_tint.dts import decode, encode
from peft_tint.task_vectors import compute_task_vector

# Rank ratios of the paper's codec that take about as many bytes as our budgets
SETTINGS = {
    "paper": [{"codec": "paper", "rank_ratio": ratio} for ratio in (0.045, 0.09, 0.195, 0.3)],
    "semidiscrete": [{"budget": budget} for budget in (0.006, 0.01, 0.02, 0.03)],
    "bitdelta": [{"codec": "bitdelta"}],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--output", default="benchmarks/results/dts_codecs.json")
    args = parser.parse_args()
    splits, base_folder, folders = prepare(args)
    load = AutoModelForImageClassification.from_pretrained
    base, experts = load(base_folder).eval(), {task: load(folder).eval() for task, folder in folders.items()}
    batches = {task: collate([split["eval"][i] for i in range(len(split["eval"]))]) for task, split in splits.items()}
    deltas = {task: task_vector(expert, base) for task, expert in experts.items()}

    for task, expert in experts.items():
        batches[task]["expert"] = predict(expert, batches[task])
    rows = [{"codec": "experts", **score(experts, batches)}]
    bases = {task: apply(expert, deltas[task], {}) for task, expert in experts.items()}
    rows.append({"codec": "base", **score(bases, batches)})
    for name, settings in SETTINGS.items():
        for setting in settings:
            rows.append({"codec": name, "settings": setting, **measure(setting, experts, deltas, batches)})
            print(rows[-1], flush=True)
    report(args, rows)


def task_vector(expert, base):
    base = base.state_dict()
    tensors = {name: tensor for name, tensor in expert.state_dict().items() if not name.startswith("classifier")}
    return {name: compute_task_vector(tensor, base[name]) for name, tensor in tensors.items()}


def measure(setting, experts, deltas, batches):
    models, errors, sizes, seconds = {}, [], [], 0.0
    for task, delta in deltas.items():
        started = time.process_time()
        packed = encode(delta, **setting)
        seconds += time.process_time() - started
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "packed.safetensors")
            save_file(packed, file)
            sizes.append(os.path.getsize(file) / (4 * sum(tensor.numel() for tensor in delta.values())))
            decoded = decode(load_file(file))
        decoded = {name: x if isinstance(x, torch.Tensor) else x.dense() for name, x in decoded.items()}
        left = sum(float((tensor - decoded.get(name, 0)).square().sum()) for name, tensor in delta.items())
        errors.append((left / sum(float(tensor.square().sum()) for tensor in delta.values())) ** 0.5)
        models[task] = apply(experts[task], delta, decoded)
    tasks = len(deltas)
    numbers = {"bytes": sum(sizes) / tasks, "relative_error": sum(errors) / tasks, "encode_cpu_s": seconds / tasks}
    return {**numbers, **score(models, batches)}


def apply(expert, delta, decoded):
    """The expert with `decoded` in place of its task vector, its head included."""
    state = expert.state_dict()
    changed = {name: state[name] - delta[name] + decoded.get(name, 0) for name in delta}
    model = type(expert)(expert.config).eval()
    model.load_state_dict({**state, **changed})
    return model


@torch.no_grad()
def predict(model, batch):
    return torch.cat([model(pixel_values=chunk).logits.argmax(-1) for chunk in batch["pixel_values"].split(64)])


def score(models, batches):
    row = {"accuracy": {}, "agreement": {}}
    for task, batch in batches.items():
        predictions = predict(models[task], batch)
        for kind, target in (("accuracy", "labels"), ("agreement", "expert")):
            row[kind][task] = (predictions == batch[target]).float().mean().item()
    for values in row.values():
        values["mean"] = sum(values.values()) / len(batches)
    return row


def report(args, rows):
    save_result(args, rows)
    plot(rows, os.path.splitext(args.output)[0] + ".png")
    print("| codec | bytes | relative error | " + " | ".join((*args.tasks, "mean")) + " | agreement | CPU s |")
    print("|---" * (len(args.tasks) + 6) + "|")
    for row in rows:
        scores = " | ".join(f"{value:.3f}" for value in (*row["accuracy"].values(), row["agreement"]["mean"]))
        if "bytes" in row:
            numbers = f"{row['bytes']:.2%} | {row['relative_error']:.3f} | {scores} | {row['encode_cpu_s']:.1f}"
        else:
            numbers = f"- | - | {scores} | -"
        print(f"| {row['codec']} | {numbers} |")


def plot(rows, path):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colors = dict(zip(SETTINGS, ("tab:gray", "tab:blue", "tab:orange"), strict=True))
    for name, color in colors.items():
        points = [row for row in rows if row["codec"] == name]
        sizes = [100 * row["bytes"] for row in points]
        left.plot(sizes, [row["relative_error"] for row in points], "o-", color=color, label=name)
        right.plot(sizes, [row["accuracy"]["mean"] for row in points], "o-", color=color)
    for row, style in zip(rows[:2], ("--", ":"), strict=True):
        right.axhline(row["accuracy"]["mean"], color="black", linestyle=style, linewidth=1, label=row["codec"])
    left.set_ylabel("relative error of the task vector")
    left.set_ylim(0, 1)
    right.set_ylabel("mean accuracy")
    for axes in (left, right):
        axes.set_xlabel("% of the base's bytes, a task")
        axes.set_xlim(left=0)
        axes.grid(linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
