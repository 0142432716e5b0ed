"""python benchmarks/fusionbench_comparison.py --fusionbench_python PYTHON --work FOLDER [--output ...]

AdaMerging by layer (https://arxiv.org/abs/2310.02575), beside fusion-bench (https://github.com/tanganke/fusion_bench):
CPU time of a step, memory, and whether the coefficients are equal. PYTHON is the interpreter of a virtual environment
of its own, made on Linux with

    python -m venv ENV && ENV/bin/pip install fusion-bench "torch==2.13.0"

FOLDER takes 6 GB: a ViT-B/32 of 87M parameters (that of CLIP without its projection) and sixteen experts in float32,
with random weights and random task vectors. Each run is a process of its own with one thread, in turn by both tools.
fusion-bench runs its own `LayerWiseAdaMergingAlgorithm`, and we `TintTrainer`. CPU time is the median over the steps
but the first; memory is the peak of the process's anonymous pages, above that after a run with a tiny model.
"""

import argparse
import json
import platform
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

import peft_tint

SIZES = {
    "full": {"patch_size": 32, "image_size": 224},
    "tiny": {"patch_size": 32, "image_size": 224, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fusionbench_python", required=True)
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, made anew")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--batch_size", type=int, default=4, help="of each task")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--output", default="benchmarks/results/fusionbench_comparison.json")
    args = parser.parse_args()
    for size, settings in SIZES.items():
        write_checkpoints(args.work / size, settings, max(args.experts) if size == "full" else 2)
    rows = [compare(args, count) for count in args.experts]
    about = "import importlib.metadata as m; [print(n, m.version(n)) for n in ('fusion-bench', 'lightning', 'torch')]"
    theirs = subprocess.run([args.fusionbench_python, "-c", about], check=True, capture_output=True, text=True).stdout
    result = {
        "config": {name: getattr(args, name) for name in ("experts", "batch_size", "steps")},
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft_tint)},
        "fusionbench_versions": dict(zip(*[iter(theirs.split())] * 2, strict=True)),
        "machine": f"{platform.machine()}, 1 thread",
        "precision": "float32",
        "rows": rows,
    }
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")


def write_checkpoints(folder, settings, count):
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(**settings, num_labels=10))
    tensors = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    for name in ["base", *range(count)]:
        if name != "base":
            base.load_state_dict({key: tensor + 1e-3 * torch.randn(tensor.shape) for key, tensor in tensors.items()})
        base.save_pretrained(folder / str(name))


def compare(args, count):
    found = {tool: run(args, tool, count) for tool in ("fusionbench", "peft_tint")}
    ours, theirs = found["peft_tint"].pop("coefficients"), found["fusionbench"].pop("coefficients")
    differences = [abs(a - b) for name in theirs for a, b in zip(ours[name], theirs[name], strict=True)]
    moved = max(abs(value - 0.3) for values in theirs.values() for value in values)
    row = {
        "experts": count,
        **{f"{tool}_cpu_s": round(statistics.median(result["seconds"]), 2) for tool, result in found.items()},
        **{f"{tool}_peak_mb": round(result["peak_mb"]) for tool, result in found.items()},
        "same_coefficients": ours.keys() == theirs.keys(),
        "largest_move_of_a_coefficient": moved,
        "largest_difference_of_coefficients": max(differences),
    }
    row["times_less_cpu"] = round(row["fusionbench_cpu_s"] / row["peft_tint_cpu_s"], 2)
    print(json.dumps(row), flush=True)
    return row


def run(args, tool, count):
    def folders(size, count):
        tasks = {f"task{index}": str(args.work / size / str(index)) for index in range(count)}
        return {"base": str(args.work / size / "base"), "experts": tasks}

    job = {"tool": tool, "steps": args.steps, "batch_size": args.batch_size}
    job |= {"warm_up": folders("tiny", 2), "run": folders("full", count)}
    python = args.fusionbench_python if tool == "fusionbench" else sys.executable
    command = [python, str(Path(__file__).with_name("_timed_adamerging.py")), json.dumps(job)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.strip().rsplit("\n", 1)[-1])


if __name__ == "__main__":
    main()
