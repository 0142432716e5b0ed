"""python benchmarks/language_model.py --model FOLDER --data FOLDER [--experts FOLDER]

Merges LoRA experts of a causal language model, by default of four tasks, each a classification as generation: after a
text and a short prompt, the model says the name of the class, of which the first token counts. Measured with
SmolLM2-135M-Instruct. DATA has TASK/train.parquet and TASK/test.parquet with the columns text and label.

The result, benchmarks/results/language_model.json, has for each row and seed: the accuracy over the expert's, as mean
over the tasks, where the model chooses among the classes' tokens, and where it chooses among all tokens; the mean
KL(expert || merged) at the answer; and the CPU seconds from the experts' folders to the merged model. "step" is the CPU
time of a training step over that of a LoRA fine-tuning step, forward and backward, on the same prompts.

The experts are the same for all seeds. A seed decides which unlabelled texts adapt, and in what order, and what a
merge drops at random; other rows have no seed. Experts see neither these texts nor those of validation, on which the
settings below were chosen. A row is not run again where the file has it, with the same settings, arguments, versions,
and machine.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import torch
from language_tasks import PROMPTS, collate, finetune, load_task
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from suites import describe
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_tint
from peft_tint import MERGING_METHODS, OBJECTIVES, TintConfig, TintTrainer, TintTrainingArguments, bf16_is_native

ADAPT = 160  # unlabelled samples of a task
SCALES = 0.3, 0.6, 1.0  # of data-free merges, of which validation chooses one


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of a causal language model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--experts", default="experts_language_model", help="where experts are kept, and used again")
    parser.add_argument("--finetune_steps", type=int, default=60)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "language_model.json")
    args = parser.parse_args()
    first = args.seeds[0]
    rows = [(name, seed) for seed in args.seeds for name in args.rows if seed == first or name in SEEDED]
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries, about each other
    bench = Bench(args)
    del args.rows
    result = {**describe(args), "step": None, "results": []}
    if args.output.exists():
        before = json.loads(args.output.read_text())
        if all(before.get(key) == value for key, value in result.items() if key not in ("step", "results")):
            result = before

    def save():
        args.output.write_text(json.dumps(result, indent=1) + "\n")

    for name, seed in rows:
        make, settings = ROWS[name]
        about = {"row": name, "seed": seed if name in SEEDED else None, "settings": settings}
        if any(about.items() <= row.items() for row in result["results"]):
            continue
        row = {**about, **bench.run(make, seed, settings)}
        others = [one for one in result["results"] if (one["row"], one["seed"]) != (name, about["seed"])]
        result["results"] = sorted([*others, row], key=lambda one: (list(ROWS).index(one["row"]), one["seed"] or 0))
        save()
        scores = f"{row['normalised']:.1%}, among all words {row['all_words']:.1%}, KL {row['kl']:.3f}"
        print(f"{name:28} {about['seed']}: {scores}, {row['cpu_s']} CPU s", flush=True)
    if result["step"] is None:
        result["step"] = bench.step_cost()
        save()
    print(result["step"])


class Bench:
    """The model, the tasks' splits, and the experts, which are made if they are not there."""

    def __init__(self, args):
        self.args, self.tokenizer = args, AutoTokenizer.from_pretrained(args.model, padding_side="left")
        self.splits = {task: load_task(args, self.tokenizer, task) for task in PROMPTS}
        self.collate = partial(collate, self.tokenizer)
        self.experts = {task: finetune(args, task, self.splits[task]["train"], self.collate) for task in PROMPTS}
        self.expert_answers = {task: self.answers_of_expert(task) for task in PROMPTS}

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).eval()

    # ---- scores ------------------------------------------------------------------------------------------------------

    def run(self, make, seed, settings):
        started = time.process_time()
        made = make(self, seed, **settings)
        further = {"cpu_s": round(time.process_time() - started, 1)}
        if make in (Bench.merge, Bench.add_weighted_adapter) and isinstance(made, torch.nn.Module):
            further["scale"] = self.choose_scale(made)
        tasks = {task: self.measure(task, made) for task in PROMPTS}
        means = {name: sum(task[name] for task in tasks.values()) / len(tasks) for name in tasks["bbc"]}
        return {**means, **further, "tasks": tasks}

    def measure(self, task, made):
        expected = self.expert_answers[task]
        found = expected if made is None else self.answers(task, made)
        scores, of_expert = self.accuracies(task, found), self.accuracies(task, expected)
        kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
        normalised, all_words = (score / most for score, most in zip(scores, of_expert, strict=True))
        return {"accuracy": scores[0], "normalised": normalised, "all_words": all_words, "kl": kl}

    def accuracies(self, task, log_p, split="test"):
        """Among the classes' tokens, and among all."""
        tokens, answers = torch.tensor(self.splits[task]["tokens"]), torch.tensor(self.splits[task][split]["answer"])
        choices = tokens[log_p[:, tokens].argmax(-1)], log_p.argmax(-1)
        return [(choice == answers).float().mean().item() for choice in choices]

    @torch.no_grad()
    def choose_scale(self, model):
        """Sets the model to the base plus the multiple of its change that has the best accuracy on validation."""
        base, best = self.base().state_dict(), (-1.0, None)
        changes = {name: weight - base[name] for name, weight in model.state_dict().items()}
        for scale in SCALES:
            model.load_state_dict({name: base[name] + scale * change for name, change in changes.items()})
            found = [self.accuracies(t, self.answers(t, model, "validation"), "validation")[0] for t in PROMPTS]
            best = max(best, (sum(found), scale))
        model.load_state_dict({name: base[name] + best[1] * change for name, change in changes.items()})
        return best[1]

    @torch.no_grad()
    def answers(self, task, made, split="test"):
        """log p of all tokens at the answer, (samples, tokens)."""
        model, found = made[task] if isinstance(made, dict) else made, []
        if hasattr(model, "set_task"):
            model.set_task(task)
        for batch in DataLoader(self.splits[task][split], 50, collate_fn=self.collate):
            del batch["labels"]
            with torch.autocast("cpu", torch.bfloat16, bf16_is_native()):
                found.append(model(**batch, use_cache=False).logits[:, -1])
        return torch.cat(found).float().log_softmax(-1)

    def answers_of_expert(self, task):
        file = os.path.join(self.experts[task], "answers.safetensors")
        if not os.path.exists(file):
            expert = PeftModel.from_pretrained(self.base(), self.experts[task]).merge_and_unload()
            save_file({"log_p": self.answers(task, expert)}, file)
        return load_file(file)["log_p"]

    # ---- rows: what each makes is a model, {task: model}, or None for the experts themselves ------------------------

    def no_merge(self, seed, of):
        return None if of == "experts" else self.base()

    def merge(self, seed, method, **kwargs):
        if "dare" in method:
            kwargs["seed"] = seed
        return peft_tint.merge(self.base(), self.experts, method, **kwargs)

    def add_weighted_adapter(self, seed, **kwargs):
        torch.manual_seed(seed)
        first, *others = self.experts
        model = PeftModel.from_pretrained(self.base(), self.experts[first], adapter_name=first)
        for task in others:
            model.load_adapter(self.experts[task], adapter_name=task)
        model.add_weighted_adapter(list(self.experts), [1.0] * len(self.experts), "merged", **kwargs)
        model.set_adapter("merged")
        return model.merge_and_unload()

    def tint(self, seed, config, training):
        model = get_peft_model(self.base(), TintConfig(experts=self.experts, **config))
        for name, parameter in model.named_parameters():
            if config.get("coefficient_init") == 0 and "tint_coefficients" in name:
                parameter.requires_grad_(False)  # the control: layers on the plain base
        arguments = TintTrainingArguments(os.path.join(self.args.experts, "out"), seed=seed, **training)
        TintTrainer(model, arguments, self.unlabelled(seed), processing_class=self.tokenizer).train()
        return model

    def unlabelled(self, seed):
        """Prompts, with the end of text in place of an answer, where alone a label says that something counts."""
        end = self.tokenizer.eos_token_id

        def encode(row):
            ids = [*row["input_ids"], end]
            return {"input_ids": ids, "labels": [-100] * (len(ids) - 1) + [end]}

        pools = {task: splits["pool"].shuffle(seed=seed).select(range(ADAPT)) for task, splits in self.splits.items()}
        return {task: pool.map(encode, remove_columns=pool.column_names) for task, pool in pools.items()}

    # ---- the cost of a step ------------------------------------------------------------------------------------------

    def step_cost(self, repeats=5):
        """CPU time of forward and backward over that of a LoRA's, sums over the tasks of medians, measured in turn."""
        models = {"lora": PeftModel.from_pretrained(self.base(), self.experts["bbc"], is_trainable=True)}
        for name, layers in (("coefficients", []), ("coefficients and norm", None)):
            models[name] = get_peft_model(self.base(), TintConfig(experts=self.experts, tint_layer=layers))
        seconds = dict.fromkeys(models, 0.0)
        size = STEPS["per_device_train_batch_size"]
        for task, splits in self.splits.items():
            batch = self.collate([splits["pool"][i] for i in range(size)])
            answers, expected = batch.pop("labels"), self.expert_answers[task][:size]
            times = {name: [] for name in models}
            for repeat in range(repeats + 1):
                for name, model in models.items():
                    started = time.process_time()
                    with torch.autocast("cpu", torch.bfloat16, bf16_is_native()):
                        logits = model(**batch, use_cache=False).logits[:, -1]
                    loss = F.cross_entropy(logits.float(), answers)
                    if name != "lora":
                        loss = OBJECTIVES["soft_pseudo_label"](logits, expected)
                    loss.backward()
                    if repeat:  # the first warms up
                        times[name].append(time.process_time() - started)
            seconds = {name: total + statistics.median(times[name]) for name, total in seconds.items()}
        lora = seconds.pop("lora")
        return {"lora_cpu_s": lora, **{name: s / lora for name, s in seconds.items()}}


STEPS = {"max_steps": 20, "per_device_train_batch_size": 8, "coefficient_learning_rate": 3e-2}
NORM = {"learning_rate": 3e-2, "head_steps": 100}
CONTROL = NORM | {"head_steps": 120, "max_steps": 0}  # as many updates of the norm
ROWS = {
    "base": (Bench.no_merge, {"of": "base"}),
    "experts": (Bench.no_merge, {"of": "experts"}),
    "coefficients": (Bench.tint, {"config": {"tint_layer": []}, "training": STEPS}),
    "coefficients and norm": (Bench.tint, {"config": {}, "training": STEPS | NORM}),
    "norm on the base": (Bench.tint, {"config": {"coefficient_init": 0.0}, "training": CONTROL}),
    **{name: (Bench.merge, {"method": name}) for name in MERGING_METHODS if name != "slerp"},  # which takes two
    **{f"peft {name}": (Bench.add_weighted_adapter, {"combination_type": name}) for name in ("linear", "svd", "cat")},
    **{
        f"peft {name}": (Bench.add_weighted_adapter, {"combination_type": name, "density": 0.5})
        for name in ("ties", "dare_ties", "magnitude_prune")
    },
}
SEEDED = ("coefficients", "coefficients and norm", "norm on the base", "dare_ties", "dare", "peft dare_ties")


if __name__ == "__main__":
    main()
