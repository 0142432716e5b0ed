"""python benchmarks/gpu.py [--only vit_b llama ...] [--output benchmarks/results/gpu.json]

What Tint costs on one GPU, in bfloat16, as a multiple of the same without it: under autocast a ViT's training step
(forward, backward, Adam, projection) and `trainer.step` over a dense forward and backward, and its forward without
gradients over the base's; a Llama of 1.1B in bfloat16, full experts over a dense step, LoRA experts over one PEFT LoRA
of the summed rank, and generation over the base's. Each pair runs in turn in one process; times are medians, `peak` is
of memory. `compiled` is by `torch.compile` of both.
"""

import argparse
import json
import tempfile
import time

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTForImageClassification

import peft_tint
from peft_tint import OBJECTIVES, TintTrainer, TintTrainingArguments

VIT_B = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
LLAMA = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
# name: (model, experts, batch or rank, compiled)
CASES = {
    "vit_b": [("ViT-B/16", VIT_B, 8, 32, False), ("ViT-B/16", VIT_B, 8, 128, False)],
    "vit_b_20": [("ViT-B/16", VIT_B, 20, 32, False), ("ViT-B/16", VIT_B, 20, 128, False)],
    "vit_l": [("ViT-L/16", VIT_L, 8, 32, False), ("ViT-L/16", VIT_L, 8, 128, False)],
    "compiled": [("ViT-B/16", VIT_B, 8, 32, True)],
    "llama": [(4, 0)],
    "llama_lora": [(4, 16), (16, 16)],
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, help="fewer than the models have")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", default="benchmarks/results/gpu.json")
    args = parser.parse_args()
    is_cuda = args.device == "cuda"
    result = {
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, peft_tint)},
        "device": torch.cuda.get_device_name() if is_cuda else args.device,
        "rows": [],
    }
    for name in args.only:
        for case in CASES[name]:
            started = time.perf_counter()
            row = (llama if "llama" in name else vit)(args, *case)
            result["rows"].append({**row, "seconds": round(time.perf_counter() - started, 1)})
            print(result["rows"][-1], flush=True)
            with open(args.output, "w") as file:
                json.dump(result, file, indent=1)
                file.write("\n")
            if is_cuda:
                torch.cuda.empty_cache()


def vit(args, name, sizes, experts, batch, compiled):
    torch.manual_seed(0)
    sizes = {**sizes, **({"num_hidden_layers": args.layers} if args.layers else {})}
    base = ViTForImageClassification(ViTConfig(**sizes)).to(args.device).eval()
    model = make(base, [dense_expert(base) for _ in range(experts)])
    pixels = torch.randn(batch, 3, 224, 224, device=args.device)
    labels, expert_rows = torch.zeros(batch, device=args.device).long(), torch.randn(batch, 2, device=args.device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2, fused=True)
    run, run_base = (torch.compile(m) if compiled else m for m in (model, base))
    autocast = torch.autocast(args.device, torch.bfloat16)

    def dense_pass():
        with autocast:
            loss = torch.nn.functional.cross_entropy(run_base(pixel_values=pixels).logits, labels)
        loss.backward()
        base.zero_grad(set_to_none=True)

    def step():
        with autocast:
            loss = OBJECTIVES["pseudo_label"](run(pixel_values=pixels).logits, expert_rows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def forward(net):
        with autocast:
            net(pixel_values=pixels)

    passes = {"dense": dense_pass, "step": step}
    if not compiled:
        folder = tempfile.mkdtemp()
        trainer = TintTrainer(
            model, TintTrainingArguments(folder, bf16=True, logging_steps=1000), objective="pseudo_label"
        )
        batch_of = {"pixel_values": pixels, "expert_rows": expert_rows}
        passes["trainer.step"] = lambda: trainer.step("task0", batch_of)
    row = {"model": name, "experts": experts, "batch": batch, "compiled": compiled, **ratios(args, passes, "dense")}
    forwards = {"base forward": lambda: forward(run_base), "forward": lambda: forward(run)}
    return {**row, **ratios(args, forwards, "base forward")}


def llama(args, experts, rank):
    torch.manual_seed(0)
    sizes = {**LLAMA, **({"num_hidden_layers": args.layers} if args.layers else {})}
    with torch.device(args.device):
        base = LlamaForCausalLM(LlamaConfig(**sizes)).bfloat16().eval()
    sources = [lora_expert(base, rank) if rank else dense_expert(base) for _ in range(experts)]
    started = time.perf_counter()
    model = make(base, sources)
    wrapping = time.perf_counter() - started
    del sources
    ids = torch.randint(0, 32000, (4, 512), device=args.device)
    dense = base if not rank else get_peft_model(copy_of(base), lora_config(rank * experts)).eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-3, fused=True)

    def loss(net):
        return torch.nn.functional.cross_entropy(
            net(input_ids=ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        )

    def dense_pass():
        loss(dense).backward()
        dense.zero_grad(set_to_none=True)

    def step():
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def generate(net):
        net.generate(
            input_ids=ids[:1, :32],
            attention_mask=torch.ones_like(ids[:1, :32]),
            min_new_tokens=32,
            max_new_tokens=32,
            do_sample=False,
            pad_token_id=0,
        )

    row = {"model": "Llama 1.1B", "experts": experts, "rank": rank, "wrap_s": round(wrapping, 1)}
    row |= ratios(args, {"dense": dense_pass, "step": step}, "dense")
    optimizer.zero_grad(set_to_none=True)
    generations = {"base generate": lambda: generate(base), "generate": lambda: generate(model)}
    return {**row, **ratios(args, generations, "base generate")}


def make(base, experts):
    return peft_tint.from_experts(
        copy_of(base), {f"task{k}": expert for k, expert in enumerate(experts)}, tint_layer=[]
    ).eval()


def copy_of(model):
    with torch.device(next(model.parameters()).device):
        copy = type(model)(model.config).to(next(model.parameters()).dtype)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def dense_expert(base):
    state = base.state_dict()
    return {name: t + 0.002 * torch.randn_like(t) if t.is_floating_point() else t for name, t in state.items()}


def lora_config(rank):
    return LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear")


def lora_expert(base, rank):
    expert = get_peft_model(copy_of(base), lora_config(rank))
    for name, parameter in expert.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.01)
    return expert


def ratios(args, functions, unit):
    """{name: how many times the time of `unit` it takes}, the unit's milliseconds, and each one's peak memory in GB."""
    times, peaks, is_cuda = {name: [] for name in functions}, {}, args.device == "cuda"
    for repeat in range(args.repeats + 3):
        for name, function in functions.items():
            if is_cuda:
                torch.cuda.reset_peak_memory_stats()
                torch.cuda.synchronize()
            started = time.perf_counter()
            function()
            if is_cuda:
                torch.cuda.synchronize()
                peaks[name] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if repeat >= 3:  # the first warm up, and compile
                times[name].append(time.perf_counter() - started)
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    found = {name: round(value / medians[unit], 3) for name, value in medians.items() if name != unit}
    return {f"{unit} ms": round(1000 * medians[unit], 2), **found, f"{unit} peak GB": peaks}


if __name__ == "__main__":
    main()
