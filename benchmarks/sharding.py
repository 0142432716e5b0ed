"""python benchmarks/sharding.py --work FOLDER [--output benchmarks/results/sharding.json]

Memory of a process with whole task vectors, and with its part of them (`TintConfig(shard_task_vectors=True)`): a ViT-B
from a config with K experts, which are its weights with noise, in two processes on the CPU (gloo), three steps.
"""

import argparse
import copy
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import get_peft_model
from transformers import ViTConfig, ViTForImageClassification

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments
from peft_tint.task_vectors import TaskVectors

SIZE = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for the experts")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--output", default="benchmarks/results/sharding.json")
    parser.add_argument("--sharded", type=int, help=argparse.SUPPRESS)  # what the launched processes do
    args = parser.parse_args()
    if args.sharded is not None:
        return train(args)
    make_experts(args)
    results = {name: launch(args, sharded) for sharded, name in enumerate(("whole", "in parts"))}
    whole, parts = ([process["peak_mb"] - process["before_mb"] for process in results[name]] for name in results)
    ratios = {
        "peak memory of a process, above that before the experts": max(whole) / max(parts),
        "bytes of task vectors": results["whole"][0]["task_vectors_mb"] / results["in parts"][0]["task_vectors_mb"],
    }
    coefficients = [torch.load(args.work / f"{sharded}.pt") for sharded in (0, 1)]
    result = {
        "experts": args.experts,
        "torch": torch.__version__,
        "precision": "float32",
        "processes": results,
        "ratios": ratios,
        "largest difference of a coefficient": (coefficients[0] - coefficients[1]).abs().max().item(),
    }
    text = json.dumps(result, indent=1)
    Path(args.output).write_text(text + "\n")
    print(text)


def make_experts(args):
    torch.manual_seed(0)
    base = ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=16, num_labels=10))
    for name in ["base", *map(str, range(args.experts))]:
        model = copy.deepcopy(base)
        for parameter in model.parameters() if name != "base" else ():
            parameter.data += 0.01 * torch.randn_like(parameter)
        if not (args.work / name / "model.safetensors").exists():
            model.save_pretrained(args.work / name)


def launch(args, sharded):
    settings = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = [sys.executable, "-m", "accelerate.commands.launch", *settings.split(), "--main_process_port", "0"]
    command += [__file__, "--work", args.work, "--experts", str(args.experts), "--sharded", str(sharded)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # or freed memory stays with the process, in holes of its heap
    subprocess.run(command, check=True, env=environment)
    return json.loads((args.work / "result.json").read_text())


def anonymous_mb():
    """That of this process: the pages that are not of mapped files."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) / 1024


class Peak(threading.Thread):
    """Looks at the memory every 10 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.mb = 0.0
        self.start()

    def run(self):
        while True:
            self.mb = max(self.mb, anonymous_mb())
            time.sleep(0.01)


def train(args):
    state = PartialState(cpu=True)
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    base = ViTForImageClassification.from_pretrained(args.work / "base")
    before, peak = anonymous_mb(), Peak()
    experts = {f"task{i}": str(args.work / str(i)) for i in range(args.experts)}
    model = get_peft_model(base, TintConfig(experts=experts, shard_task_vectors=bool(args.sharded)))
    pixels = torch.randn(8, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    data = {task: Dataset.from_dict({"pixel_values": pixels.tolist()}).with_format("torch") for task in experts}
    settings = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "head_steps": 0,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-4,
        "bf16": False,
    }
    TintTrainer(model, TintTrainingArguments(str(args.work / "out"), **settings), data).train()
    found = [module.dense for module in model.modules() if isinstance(module, TaskVectors)]
    own = {
        "before_mb": before,
        "peak_mb": peak.mb,
        "task_vectors_mb": sum(tensor.nbytes for tensor in found) / 2**20,
    }
    processes = gather_object([own])
    if state.is_main_process:
        (args.work / "result.json").write_text(json.dumps(processes))
        torch.save(model.coefficients().values, args.work / f"{args.sharded}.pt")
    state.destroy_process_group()


if __name__ == "__main__":
    main()
