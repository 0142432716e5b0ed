"""python benchmarks/dts_compression.py [--output benchmarks/results/dts_compression.json]

CPU seconds and memory of compressing one ViT-B expert (87M parameters), against the same with the full singular value
decomposition (`full_matrices=False`) of each matrix. The task vector is random: a decaying spectrum of rank 100, and as
much energy in noise. Memory is the peak of the process, with the task vector (one model), over the model's bytes.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", file=sys.stderr, flush=True)

import torch
import transformers
from transformers import ViTConfig, ViTForImageClassification

from peft_tint.dts import codec, decode, disk_bytes, encode

FULL = ", full SVD"
SETTINGS = {
    "paper, rank ratio 0.05": {"codec": "paper", "rank_ratio": 0.05},
    "paper, rank ratio 0.08": {"codec": "paper", "rank_ratio": 0.08},
    "paper, rank ratio 0.08" + FULL: {"codec": "paper", "rank_ratio": 0.08},
    "paper, rank ratio 0.3": {"codec": "paper", "rank_ratio": 0.3},
    "bitdelta": {"codec": "bitdelta"},
    "semidiscrete, 0.6%": {"budget": 0.006},
    "semidiscrete, 1%": {"budget": 0.01},
    "semidiscrete, 3%": {"budget": 0.03},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", help="measure this alone, in this process, and print it as JSON")
    parser.add_argument("--output", default="benchmarks/results/dts_compression.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only:
        print(json.dumps(measure(args.only)))
        return
    rows = {}
    for name in SETTINGS:  # each in a process of its own, for its own peak of memory
        command = [sys.executable, __file__, "--only", name, "--threads", str(args.threads)]
        rows[name] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(name, rows[name], flush=True)
    report(args, rows)


def measure(name):
    torch.linalg.svd(torch.ones(64, 64))  # what is loaded only once is not measured
    empty = memory()
    deltas = make_deltas()
    model_bytes = 4 * sum(delta.numel() for delta in deltas.values())
    if name.endswith(FULL):
        codec.truncated_svd = full_svd
    started = time.process_time()
    packed = encode(deltas, **SETTINGS[name])
    row = {"cpu_s": time.process_time() - started, "peak_memory": (memory() - empty) / model_bytes}
    started = time.process_time()
    decoded = decode(packed)
    row |= {"decode_cpu_s": time.process_time() - started, "bytes": disk_bytes(packed) / model_bytes}
    left = sum(float((delta - dense(decoded[key])).square().sum()) for key, delta in deltas.items())
    row["relative_error"] = (left / sum(float(delta.square().sum()) for delta in deltas.values())) ** 0.5
    return row


def memory():
    """The process's peak so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def full_svd(matrix, rank):
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return u[:, :rank], s[:rank], vh[:rank].T


def dense(tensor):
    return tensor if isinstance(tensor, torch.Tensor) else tensor.dense()


def make_deltas():
    """Singular values that fall as 1 / sqrt(k) to rank 100, and as much energy again in noise."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in ViTForImageClassification(ViTConfig()).named_parameters()}
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for name, shape in shapes.items():
        delta = torch.randn(shape, generator=generator)
        if delta.ndim == 2:
            spectrum = torch.arange(1, 101) ** -0.5
            b, a = (torch.randn(size, 100, generator=generator) for size in shape)
            low_rank = b * spectrum @ a.T
            delta += low_rank / low_rank.square().mean().sqrt()
        deltas[name] = 1e-4 * delta
    return deltas


def report(args, rows):
    full, truncated = (rows["paper, rank ratio 0.08" + end]["cpu_s"] for end in (FULL, ""))
    result = {
        "config": {"threads": args.threads, "settings": SETTINGS},
        "versions": {library.__name__: library.__version__ for library in (torch, transformers)},
        "machine": f"{platform.machine()}, {args.threads} thread",
        "precision": "float32",
        "full_svd_over_truncated_svd": full / truncated,
        "results": rows,
    }
    with open(args.output, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(
        "| codec | bytes | CPU s | peak memory, models | relative error | decoding, CPU s |\n|---|---|---|---|---|---|"
    )
    for name, row in rows.items():
        numbers = (row["cpu_s"], row["peak_memory"], row["relative_error"], row["decode_cpu_s"])
        print(f"| {name} | {row['bytes']:.2%} | " + " | ".join(f"{number:.2f}" for number in numbers) + " |")
    print(f"Truncated SVD is {full / truncated:.1f} times faster.")


if __name__ == "__main__":
    main()
