"""python benchmarks/step_cost.py [--output benchmarks/results/step_cost.json]

CPU time of one Tint step (forward, backward, update; cached expert logits), one thread, on a ViT. With full experts it
is compared with a dense forward and backward of the same ViT, with LoRA experts with those of the frozen ViT under one
LoRA of the summed rank. Both are measured in turn in one run, so that what else the machine does falls on both.
"""

import argparse
import copy
import json
import platform
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification

import peft_tint
from peft_tint import OBJECTIVES


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--image_size", type=int, nargs="+", default=[224, 96])
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 8], help="of the LoRA experts; 0: full experts")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", default="benchmarks/results/step_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [measure(args, size, k, rank) for rank in args.rank for size in args.image_size for k in args.experts]
    result = {
        "config": {key: value for key, value in vars(args).items() if key != "output"},
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft_tint)},
        "machine": f"{platform.machine()}, 1 thread",
        "precision": "float32",
        "rows": rows,
    }
    with open(args.output, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


def measure(args, image_size, experts, rank):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, image_size=image_size)
    dense = ViTForImageClassification(config).eval()
    parameters = sum(parameter.numel() for parameter in dense.parameters())
    sources = {}
    for k in range(experts):
        expert = copy.deepcopy(dense).requires_grad_(False)
        if rank:
            expert = with_lora(expert, rank)
        for name, parameter in expert.named_parameters():
            if "lora_B" in name or not rank:
                parameter.data += 0.01 * torch.randn(parameter.shape)
        sources[f"task{k}"] = expert
    model = peft_tint.from_experts(copy.deepcopy(dense), sources).eval()
    vectors = [buffer for name, buffer in model.named_buffers() if "tint_task_vectors" in name]
    adapters = [p for expert in sources.values() for n, p in expert.named_parameters() if "lora_" in n or not rank]
    if rank:
        dense = with_lora(dense, rank * experts)
    del sources
    pixels = torch.randn(args.batch_size, 3, image_size, image_size)
    labels = torch.zeros(args.batch_size, dtype=torch.long)
    expert_logits = torch.randn(args.batch_size, 2)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)

    def dense_pass():
        torch.nn.functional.cross_entropy(dense(pixel_values=pixels).logits, labels).backward()
        dense.zero_grad(set_to_none=True)

    def tint_step():
        OBJECTIVES["pseudo_label"](model(pixel_values=pixels).logits, expert_logits).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    times = {dense_pass: [], tint_step: []}
    for repeat in range(args.repeats + 1):
        for function, seconds in times.items():
            started = time.process_time()
            function()
            if repeat:  # the first warms up
                seconds.append(time.process_time() - started)
    dense_s, tint_s = (sorted(seconds)[len(seconds) // 2] for seconds in times.values())
    row = {
        "image_size": image_size,
        "parameters": parameters,
        "experts": experts,
        "rank": rank,
        "task_vectors_over_experts_bytes": round(size_of(vectors) / size_of(adapters), 3),
        "dense_cpu_s": round(dense_s, 3),
        "tint_cpu_s": round(tint_s, 3),
        "ratio": round(tint_s / dense_s, 3),
    }
    print(row, flush=True)
    return row


def with_lora(model, rank):
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", modules_to_save=["classifier"])
    return get_peft_model(model, config)


def size_of(tensors):
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


if __name__ == "__main__":
    main()
