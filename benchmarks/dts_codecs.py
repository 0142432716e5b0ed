"""python benchmarks/dts_codecs.py --model MODEL --data FOLDER [--suite text] [--layers 12] [--tasks TASK TASK ...]

The codecs of DTS, and two merging methods that keep a mask a task, on the experts and the evaluation halves of a suite
(`suites.py`): each gives a task's encoder back, which is scored under the expert's own head.

- bytes: the safetensors file of a task over the base in float32, heads apart, mean of the tasks; shared_bytes: what
  all tasks need once beside the base, in the same unit.
- relative error: |rebuilt - expert| / |expert - base|, mean of the tasks.
- normalised accuracy: accuracy over the expert's. Agreement: with the expert's predictions, which is what a codec can
  be blamed for.

The reference is what the task vectors are taken from: the base, or the experts merged by task arithmetic (DTS-D), which
takes the base's place. Writes the curves as a picture beside the JSON.
"""

import argparse
import os
import tempfile
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from suites import SUITES, add_suite_arguments, collate, prepare, save_result

from peft_tint import merge_task_vectors
from peft_tint.dts import decode, encode
from peft_tint.dts._packing import pack
from peft_tint.task_vectors import compute_task_vector

BUDGETS = (0.006, 0.01, 0.02, 0.03)
# Of the paper's codec, those that take as many bytes as our budgets or a little more
RANK_RATIOS = {"vision": (0.053, 0.094, 0.201, 0.308), "text": (0.073, 0.125, 0.25, 0.378)}
COLORS = {
    "semidiscrete": "tab:blue",
    "paper": "tab:gray",
    "bitdelta": "tab:orange",
    "tall_masks": "tab:green",
    "emr": "tab:purple",
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--suite", default="vision", choices=SUITES)
    parser.add_argument("--output", help="default: benchmarks/results/dts_codecs_SUITE.json")
    args = parser.parse_args()
    args.output = args.output or f"benchmarks/results/dts_codecs_{args.suite}.json"
    splits, base_folder, folders = prepare(args)
    load = SUITES[args.suite].auto.from_pretrained
    base, experts = load(base_folder).eval(), {task: load(folder).eval() for task, folder in folders.items()}
    batches = {
        task: list(torch.utils.data.DataLoader(split["eval"], batch_size=64, collate_fn=collate))
        for task, split in splits.items()
    }
    deltas = {task: task_vector(expert, base) for task, expert in experts.items()}
    merged = {name: 0.3 * tensor for name, tensor in merge_task_vectors(deltas, "task_arithmetic").items()}
    nothing = {name: torch.zeros_like(tensor) for name, tensor in merged.items()}

    rows = []
    predicted = {task: predict(expert, batches[task]) for task, expert in experts.items()}

    def add(codec, rebuilt, **numbers):
        """A row of the rebuilt task vectors, {task: {name: tensor}}."""
        models = {task: apply(experts[task], deltas[task], rebuilt[task]) for task in deltas}
        scores = score(models, batches, predicted)
        rows.append({"codec": codec, **numbers, "relative_error": relative_error(deltas, rebuilt), **scores})
        print(rows[-1], flush=True)

    add("experts", deltas)
    add("base", dict.fromkeys(deltas, nothing))
    ours = [{"codec": "semidiscrete", "budget": budget} for budget in BUDGETS]
    paper = [{"codec": "paper", "rank_ratio": ratio} for ratio in RANK_RATIOS[args.suite]]
    for setting in (*ours, *paper, {"codec": "bitdelta"}):
        rebuilt, numbers = through_file(deltas, nothing, setting)
        add(setting["codec"], rebuilt, reference="base", settings=setting, **numbers)
    for method in ("tall_masks", "emr"):
        rebuilt, numbers = by_masks(deltas, method)
        add(method, rebuilt, reference="base", **numbers)
    for setting in (ours[1], paper[1]):
        rebuilt, numbers = through_file(deltas, merged, setting)
        add(setting["codec"], rebuilt, reference="merged", settings=setting, **numbers)
    report(args, rows)


def task_vector(expert, base):
    base = base.state_dict()
    tensors = {name: tensor for name, tensor in expert.state_dict().items() if not name.startswith("classifier")}
    return {name: compute_task_vector(tensor, base[name]) for name, tensor in tensors.items()}


def through_file(deltas, reference, setting):
    """Task vectors from the reference, encoded, written, read and decoded, as task vectors from the base again."""
    rebuilt, sizes, seconds = {}, [], 0.0
    for task, delta in deltas.items():
        delta = {name: tensor - reference[name] for name, tensor in delta.items()}
        started = time.process_time()
        packed = encode(delta, **setting)
        seconds += time.process_time() - started
        size, packed = write_and_read(packed)
        sizes.append(size / (4 * sum(tensor.numel() for tensor in delta.values())))
        decoded = {name: x if isinstance(x, torch.Tensor) else x.dense() for name, x in decode(packed).items()}
        rebuilt[task] = {name: tensor + decoded.get(name, 0) for name, tensor in reference.items()}
    tasks = len(deltas)
    return rebuilt, {"bytes": sum(sizes) / tasks, "shared_bytes": 0.0, "encode_cpu_s": seconds / tasks}


def by_masks(deltas, method):
    """Task vectors that share one vector, of which a mask and (EMR) a scale are the task's own."""
    started = time.process_time()
    rebuilt = merge_task_vectors(deltas, method)
    seconds, sizes = time.process_time() - started, []
    for delta in rebuilt.values():
        masks = {name: pack(tensor != 0, 2) for name, tensor in delta.items()}
        size, _ = write_and_read({**masks, "scale": torch.ones(1)})
        sizes.append(size / (4 * sum(tensor.numel() for tensor in delta.values())))
    tasks = len(deltas)
    return rebuilt, {"bytes": sum(sizes) / tasks, "shared_bytes": 1.0, "encode_cpu_s": seconds / tasks}


def write_and_read(tensors):
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "packed.safetensors")
        save_file(tensors, file)
        return os.path.getsize(file), load_file(file)


def apply(expert, delta, rebuilt):
    """The expert with another task vector in place of its own, its head included."""
    state = expert.state_dict()
    changed = {name: state[name] - delta[name] + rebuilt[name] for name in delta}
    model = type(expert)(expert.config).eval()
    model.load_state_dict({**state, **changed})
    return model


@torch.no_grad()
def predict(model, batches):
    return torch.cat([model(**batch).logits.argmax(-1) for batch in batches])


def score(models, batches, predicted):
    row = {"accuracy": {}, "normalized_accuracy": {}, "agreement": {}}
    for task, model in models.items():
        labels = torch.cat([batch["labels"] for batch in batches[task]])
        predictions = predict(model, batches[task])
        accuracy, best = (float((p == labels).float().mean()) for p in (predictions, predicted[task]))
        row["accuracy"][task], row["normalized_accuracy"][task] = accuracy, accuracy / best
        row["agreement"][task] = float((predictions == predicted[task]).float().mean())
    for values in row.values():
        values["mean"] = sum(values.values()) / len(models)
    return row


def relative_error(deltas, rebuilt):
    errors = []
    for task, delta in deltas.items():
        left = sum(float((tensor - rebuilt[task][name]).double().square().sum()) for name, tensor in delta.items())
        errors.append((left / sum(float(tensor.double().square().sum()) for tensor in delta.values())) ** 0.5)
    return sum(errors) / len(errors)


def report(args, rows):
    save_result(args, rows)
    plot(rows, os.path.splitext(args.output)[0] + ".png")
    columns = ("codec", "bytes", "shared", "relative error", *args.tasks, "mean", "normalised", "agreement", "CPU s")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        name = row["codec"] + (" (DTS-D)" if row.get("reference") == "merged" else "")
        size = (f"{row['bytes']:.2%}", f"{row['shared_bytes']:.0%}") if "bytes" in row else ("-", "-")
        accuracy = [f"{value:.3f}" for value in row["accuracy"].values()]
        means = [f"{row[kind]['mean']:.1%}" for kind in ("normalized_accuracy", "agreement")]
        seconds = f"{row['encode_cpu_s']:.1f}" if "bytes" in row else "-"
        print("| " + " | ".join((name, *size, f"{row['relative_error']:.3f}", *accuracy, *means, seconds)) + " |")


def plot(rows, path):
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, color in COLORS.items():
        for reference, marker, label in (("base", "o-", name), ("merged", "D", f"{name}, DTS-D")):
            points = [row for row in rows if row["codec"] == name and row["reference"] == reference]
            if points:
                sizes = [100 * row["bytes"] for row in points]
                errors = [row["relative_error"] for row in points]
                accuracies = [100 * row["normalized_accuracy"]["mean"] for row in points]
                style = {"color": color, "markerfacecolor": color if reference == "base" else "white"}
                left.plot(sizes, errors, marker, label=label, **style)
                right.plot(sizes, accuracies, marker, **style)
    right.axhline(100, color="black", linestyle="--", linewidth=1, label="experts")
    left.set_ylabel("relative error of the task vector")
    left.set_ylim(0, 1)
    right.set_ylabel("normalised accuracy, %")
    for axes in (left, right):
        axes.set_xlabel("% of the base's bytes, a task")
        axes.set_xlim(left=0)
        axes.grid(linewidth=0.5, alpha=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
