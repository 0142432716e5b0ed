"""python benchmarks/inference_cost.py [--output benchmarks/results/inference_cost.json]

CPU time of a forward without gradients, one thread, over that of the base: a ViT-S on one image and on 32, and a small
Llama that generates, with full and with LoRA experts. Model and base run in turn in one run, so that what else the
machine does falls on both. `first` is a forward after the coefficients have changed, which merges, over the base's.
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
from step_cost import with_lora
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import peft_tint


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--rank", type=int, nargs="+", default=[0, 8], help="of the LoRA experts; 0: full experts")
    parser.add_argument("--batch_size", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--seconds", type=float, default=12.0, help="that each ratio is measured for, at the least")
    parser.add_argument("--output", default="benchmarks/results/inference_cost.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for k in args.experts for rank in args.rank for row in measure(args, k, rank)]
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


def measure(args, experts, rank):
    base, model = make(vit(), experts, rank)
    for batch in args.batch_size:
        pixels = torch.randn(batch, 3, 224, 224)
        forward = lambda net, pixels=pixels: net(pixel_values=pixels)  # noqa: E731
        yield row(args, f"ViT-S, batch {batch}", experts, rank, base, model, forward)
    base, model = make(llama(), experts, rank)
    ids = torch.randint(0, 8000, (1, 8))
    lengths = {"min_new_tokens": 16, "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    generate = lambda net: net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **lengths)  # noqa: E731
    yield row(args, "Llama of 20M, 16 tokens", experts, rank, base, model, generate)


def vit():
    config = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)
    return ViTForImageClassification(config)


def llama():
    sizes = {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 6}
    return LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes))


def make(base, experts, rank):
    sources = {}
    for k in range(experts):
        expert = copy.deepcopy(base).requires_grad_(False)
        if rank:
            expert = with_lora(expert, rank)
        for name, parameter in expert.named_parameters():
            if "lora_B" in name or not rank:
                parameter.data += 0.001 * torch.randn(parameter.shape)
        sources[f"task{k}"] = expert
    return base.eval(), peft_tint.from_experts(copy.deepcopy(base), sources).eval()


@torch.no_grad()
def row(args, what, experts, rank, base, model, forward):
    times = {"base": [], "model": [], "first": []}
    while sum(map(sum, times.values())) < args.seconds or len(times["base"]) < 6:
        if len(times["first"]) < 6:
            model.set_coefficients(0.1 + 0.01 * len(times["first"]))
            times["first"].append(seconds(forward, model))
        forward(base)
        # in turn, also which is first
        for name, net in (
            (("base", base), ("model", model))
            if len(times["base"]) % 2
            else (
                ("model", model),
                ("base", base),
            )
        ):
            times[name].append(seconds(forward, net))
    median = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    found = {
        "what": what,
        "experts": experts,
        "rank": rank,
        "base_cpu_s": round(median["base"], 4),
        "ratio": round(median["model"] / median["base"], 3),
        "first": round(median["first"] / median["base"], 2),
    }
    print(found, flush=True)
    return found


def seconds(forward, net):
    started = time.process_time()
    forward(net)
    return time.process_time() - started


if __name__ == "__main__":
    main()
