"""python benchmarks/memory.py --work FOLDER [--output benchmarks/results/memory.json]

Peak memory of a training above that of the base, computed and measured: a ViT-B from a config (its images are small, so
that activations are nothing beside weights) with K experts, which are its weights with noise; two steps, one process.

Computed, with P parameters of 4 bytes: the task vectors, 4KP bytes (2KP as bfloat16); the merged weights, which the
backward needs, 4P; and where an update is of several tasks (`update="joint"`) the sum of their gradients, 4P.
"""

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", file=sys.stderr, flush=True)

import _in_processes
import torch
from datasets import Dataset
from peft import get_peft_model
from sharding import Peak, anonymous_mb, make_experts
from transformers import ViTForImageClassification

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments

ROWS = [(4, None, "sequential"), (8, None, "sequential"), (8, None, "joint"), (8, "bfloat16", "sequential")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the experts")
    parser.add_argument("--output", default="benchmarks/results/memory.json")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.work, *args.row)))
        return
    args.experts = max(row[0] for row in ROWS)
    make_experts(args)
    _in_processes.run(__file__, [(args.work, row) for row in ROWS], args.output)


def measure(work, count, dtype, update):
    torch.set_num_threads(1)
    base = ViTForImageClassification.from_pretrained(work / "base")
    parameters, before, peak = sum(parameter.numel() for parameter in base.parameters()), anonymous_mb(), Peak()
    experts = {f"task{i}": str(work / str(i)) for i in range(count)}
    model = get_peft_model(base, TintConfig(experts=experts, task_vectors_dtype=dtype))
    pixels = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    data = {task: Dataset.from_dict({"pixel_values": pixels.tolist()}).with_format("torch") for task in experts}
    arguments = TintTrainingArguments(str(work / "out"), max_steps=2, update=update, bf16=False)
    TintTrainer(model, arguments, data).train()
    computed = parameters * (count * (2 if dtype else 4) + 4 + (4 if update == "joint" else 0)) / 2**20
    row = {"experts": count, "parameters": parameters, "task_vectors_dtype": dtype or "float32", "update": update}
    return row | {"computed_mb": round(computed), "measured_mb": round(peak.mb - before)}


if __name__ == "__main__":
    main()
