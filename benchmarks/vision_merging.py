"""python benchmarks/vision_merging.py --model MODEL --data FOLDER [--output benchmarks/results/vision_merging.json]

Every data-free merging method on the vision suite of `suites.py` (the arguments and experts of `vision_tint.py`):
accuracy of the merged encoder under each expert's own head, and the CPU time of the merge.
"""

import argparse
import time
import warnings

import torch
from suites import add_suite_arguments, collate, prepare, save_result
from transformers import AutoModelForImageClassification

from peft_tint import MERGING_METHODS, merge

# The papers' usual scale of a sum of task vectors is 0.3; what is an average or has a scale of its own takes 1.
SETTINGS = {
    "task_arithmetic": {"scale": 0.3},
    "ties": {"scale": 0.3, "aggregate": "sum"},
    "dare": {"scale": 0.3},
    "dare_ties": {"scale": 0.3, "aggregate": "sum"},
    "magnitude": {"scale": 0.3},
    "consensus": {"scale": 0.3},
    "tall_masks": {"scale": 0.3},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=[name for name in MERGING_METHODS if name != "slerp"])
    parser.add_argument("--output", default="benchmarks/results/vision_merging.json")
    args = parser.parse_args()
    splits, base_folder, folders = prepare(args)
    load = AutoModelForImageClassification.from_pretrained
    base, experts = load(base_folder).eval(), {task: load(folder).eval() for task, folder in folders.items()}
    batches = {task: collate([split["eval"][i] for i in range(len(split["eval"]))]) for task, split in splits.items()}

    rows = {"pretrained": (dict.fromkeys(args.tasks, base), 0.0), "experts": (experts, 0.0)}
    for method in args.methods:
        started = time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The head of expert")  # they are put on below
            merged = merge(base, experts, method, **SETTINGS.get(method, {}))
        seconds = time.process_time() - started
        rows[method] = merged if isinstance(merged, dict) else dict.fromkeys(args.tasks, merged), seconds
        score(args, rows, method, experts, batches)
    for name in ("pretrained", "experts"):
        score(args, rows, name, experts, batches)
    save_result(args, rows)
    print("| method | " + " | ".join((*args.tasks, "mean")) + " | CPU s |")
    print("|---" * (len(args.tasks) + 3) + "|")
    for name, row in sorted(rows.items(), key=lambda item: item[1]["accuracy"]["mean"]):
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in row["accuracy"].values()) + f" | {row['cpu_s']:.1f} |")


@torch.no_grad()
def score(args, rows, name, experts, batches):
    models, seconds = rows[name]
    accuracy = {}
    for task, batch in batches.items():
        models[task].classifier = experts[task].classifier
        chunks = batch["pixel_values"].split(64)
        predictions = torch.cat([models[task](pixel_values=chunk).logits.argmax(-1) for chunk in chunks])
        accuracy[task] = (predictions == batch["labels"]).float().mean().item()
    accuracy["mean"] = sum(accuracy.values()) / len(accuracy)
    rows[name] = {"accuracy": accuracy, "cpu_s": seconds, "arguments": SETTINGS.get(name, {})}
    print(name, {task: round(value, 3) for task, value in accuracy.items()}, f"{seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()
