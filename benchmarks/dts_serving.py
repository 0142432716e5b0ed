"""python benchmarks/dts_serving.py [--output benchmarks/results/dts_serving.json]

Many DTS adapters on one ViT-B (86M parameters): memory and loading time by their number, and CPU seconds of a forward
of 8 images of 224 pixels, with one adapter and with several in one batch. The adapters have 1% of the base's bytes,
made of a random expert, whose numbers do not matter here. Memory is what the process has resident.
"""

import argparse
import json
import platform
import tempfile
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import peft
import psutil
import torch
import transformers
from peft import PeftModel
from transformers import ViTConfig, ViTForImageClassification

import peft_tint

BATCH = 8


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--counts", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--repeats", type=int, default=3, help="of each forward; the fastest counts")
    parser.add_argument("--output", default="benchmarks/results/dts_serving.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        peft_tint.compress(make_base(), make_expert()).save_pretrained(folder)
        results = measure(args, folder)
    libraries = (torch, transformers, peft, peft_tint)
    result = {
        "config": {key: value for key, value in vars(args).items() if key != "output"},
        "versions": {library.__name__: library.__version__ for library in libraries},
        "machine": f"{platform.machine()}, {args.threads} thread(s)",
        "precision": "float32",
        "results": results,
    }
    with open(args.output, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    report(results)


def make_base():
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig()).eval()


def make_expert():
    model = make_base()
    for parameter in model.parameters():
        parameter.data += 1e-3 * torch.randn(parameter.shape)
    return model


@torch.no_grad()
def measure(args, folder):
    base, images = make_base(), torch.randn(BATCH, 3, 224, 224)
    results = {"base": {"model_mb": 4e-6 * base.num_parameters(), "forward_s": cpu_seconds(args, base, images)}}
    before = resident()
    model = PeftModel.from_pretrained(base, folder, "0_").eval()
    for index in range(1, max(args.counts)):
        started = time.process_time()
        model.load_adapter(folder, f"{index}_")
        loading = time.process_time() - started
        if index + 1 in args.counts:
            results[f"{index + 1} adapters"] = {"memory_mb": resident() - before, "load_last_s": loading}
            print(results, flush=True)
    alone = model(images).logits
    results["one adapter in the batch"] = {"forward_s": cpu_seconds(args, model, images)}
    for count in (2, 4, 8):
        names = [f"{row % count}_" for row in range(BATCH)]
        mixed = model(images, adapter_names=names).logits
        results[f"{count} adapters in the batch"] = {
            "forward_s": cpu_seconds(args, model, images, adapter_names=names),
            "difference": float((mixed - alone).abs().max() / alone.abs().max()),
        }
    started = time.process_time()
    model.set_adapter("1_" if len(model.peft_config) > 1 else "0_")
    results["switching"] = {"cpu_s": time.process_time() - started}
    return results


def cpu_seconds(args, model, images, **kwargs):
    seconds = []
    for _ in range(args.repeats):
        started = time.process_time()
        model(images, **kwargs)
        seconds.append(time.process_time() - started)
    return min(seconds)


def resident():
    return 1e-6 * psutil.Process().memory_info().rss


def report(results):
    base = results["base"]
    print("| adapters | memory, MB (base: {:.0f}) | loading the last, CPU s |".format(base["model_mb"]))
    print("|---|---|---|")
    for name, row in results.items():
        if "memory_mb" in row:
            print(f"| {name} | {row['memory_mb']:.0f} | {row['load_last_s']:.2f} |")
    print(f"\n| batch of {BATCH} | forward, CPU s | over the base |\n|---|---|---|")
    for name, row in results.items():
        if "forward_s" in row:
            print(f"| {name} | {row['forward_s']:.2f} | {row['forward_s'] / base['forward_s']:.2f} |")
    print(f"\nSwitching takes {results['switching']['cpu_s'] * 1e3:.0f} ms.")


if __name__ == "__main__":
    main()
