"""python benchmarks/language_rows.py --work FOLDER [--output benchmarks/results/language_rows.json]

What an expert of 32,000 words costs: a small Llama and two experts of it, 200 texts of 128 tokens a task, in float32 on
one thread. In MB, above what the process has before: the peak memory of training and of evaluating, for all tokens and
where the last 8 of a text count; what the kept rows take on disk. And how far the coefficients after 50 steps with kept
rows are from those with all words' logits (`expert_rows="online"`), relative to how far they moved.

The words' logits have a standard deviation of 6, with which the 64 most probable words have about as much of the
probability as those of a trained model. Each row is measured in a process of its own.
"""

import argparse
import copy
import json
import sys
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", file=sys.stderr, flush=True)

import _in_processes
import torch
from datasets import Dataset, load_from_disk
from sharding import Peak, anonymous_mb
from transformers import LlamaConfig, LlamaForCausalLM

import peft_tint
from peft_tint import TintTrainer, TintTrainingArguments
from peft_tint.training.shortened import shorten

WORDS, TEXTS, TOKENS, ANSWER = 32_000, 200, 128, 8
ROWS = [("train", TOKENS), ("evaluate", TOKENS), ("train", ANSWER), ("evaluate", ANSWER), ("coefficients", TOKENS)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a folder for data and kept rows")
    parser.add_argument("--output", default="benchmarks/results/language_rows.json")
    parser.add_argument("--row", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.work, *args.row)))
        return
    _in_processes.run(__file__, [(args.work / str(number), row) for number, row in enumerate(ROWS)], args.output)


def measure(work, what, counted):
    torch.set_num_threads(1)
    base, experts = make_models()
    data = {task: make_data(work / task, seed, counted) for seed, task in enumerate(experts)}
    model = peft_tint.from_experts(base, experts, tint_layer=[])
    files, before = disk_mb(work), anonymous_mb()
    if what == "coefficients":
        kept, online = (train(copy.deepcopy(model), work, data, rows, 50) for rows in ("auto", "online"))
        moved = online - model.coefficients().values
        with torch.no_grad(), model.expert("a"):
            logits = model(input_ids=torch.tensor(data["a"][:4]["input_ids"])).logits[:, -ANSWER:].flatten(0, 1)
        known = 1 - shorten(logits).values[:, -1].float().exp().mean()
        off = (kept - online).norm() / moved.norm()
        return {"what": what, "relative_difference": off.item(), "probability_of_kept_words": known.item()}
    peak = Peak()
    if what == "train":
        train(model, work, data, "auto", 4)
    else:
        arguments = TintTrainingArguments(str(work / "out"), per_device_eval_batch_size=4, disable_tqdm=True)
        TintTrainer(model, arguments, eval_dataset=data).evaluate()
    peak_mb = round(peak.mb - before)
    return {"what": what, "tokens_that_count": counted, "peak_mb": peak_mb, "files_mb": round(disk_mb(work) - files, 1)}


def make_models():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)).eval()
    experts = {}
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.mul_(10) if parameter.ndim > 1 else None
        base.lm_head.weight.mul_(6 / (base.lm_head.weight.std() * 8))  # of features of norm 8
        for task in "ab":
            experts[task] = copy.deepcopy(base)
            for parameter in experts[task].parameters():
                parameter.add_(torch.randn_like(parameter) * parameter.std().nan_to_num() * 0.3)
    return base, experts


def make_data(folder, seed, counted):
    ids = torch.randint(WORDS, (TEXTS, TOKENS), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :-counted] = -100
    Dataset.from_dict({"input_ids": ids.tolist(), "labels": labels.tolist()}).save_to_disk(folder)
    return load_from_disk(folder)


def train(model, work, data, expert_rows, steps):
    arguments = TintTrainingArguments(
        str(work / "out"),
        max_steps=steps,
        learning_rate=1e-2,
        expert_rows=expert_rows,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        disable_tqdm=True,
        bf16=False,
    )
    TintTrainer(model, arguments, data).train()
    return model.coefficients().values


def disk_mb(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20


if __name__ == "__main__":
    main()
