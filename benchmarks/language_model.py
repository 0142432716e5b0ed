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
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import accelerate
import datasets
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from suites import describe
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding, Trainer, TrainingArguments

import peft_tint
from peft_tint import OBJECTIVES, TintConfig, TintTrainer, TintTrainingArguments, bf16_is_native

PROMPTS = {"movies": " Sentiment:", "bbc": " Topic:", "debsection": " Section:", "reuters8": " Subject:"}
MAX_TOKENS = 24  # of text and prompt
# Numbers of samples of a task: of train, what the experts do not see, of which a seed takes ADAPT to adapt; of test
POOL, VALIDATION, ADAPT, TEST = 500, 100, 160, 500


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
    rows = [
        (name, seed) for i, seed in enumerate(args.seeds) for name in args.rows if i == 0 or ROWS[name][0] in SEEDED
    ]
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
        self.experts = {task: finetune(args, task, self.splits[task]["train"], self.collate) for task in PROMPTS}
        self.expert_answers = {task: self.answers_of_expert(task) for task in PROMPTS}

    def base(self):
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).eval()

    def collate(self, samples):
        """The answer's logits are those of the last token, for padding is on the left."""
        prompts = DataCollatorWithPadding(self.tokenizer)([{"input_ids": sample["input_ids"]} for sample in samples])
        return {**prompts, "labels": torch.tensor([sample["answer"] for sample in samples]), "logits_to_keep": 1}

    # ---- scores ------------------------------------------------------------------------------------------------------

    def run(self, make, seed, settings):
        started = time.process_time()
        predict = make(self, seed, **settings)
        seconds = time.process_time() - started
        tasks = {task: self.measure(task, predict) for task in PROMPTS}
        means = {name: sum(task[name] for task in tasks.values()) / len(tasks) for name in tasks["bbc"]}
        return {**means, "cpu_s": round(seconds, 1), "tasks": tasks}

    def measure(self, task, predict):
        expected = self.expert_answers[task]
        found = self.answers(task, predict) if predict else expected
        kl = (expected.exp() * (expected - found)).sum(-1).mean().item()
        (among, anywhere), of_expert = self.accuracies(task, found), self.accuracies(task, expected)
        return {
            "accuracy": among,
            "normalised": among / of_expert[0],
            "all_words": anywhere / of_expert[1],
            "kl": kl,
        }

    def accuracies(self, task, log_p):
        tokens, answers = torch.tensor(self.splits[task]["tokens"]), torch.tensor(self.splits[task]["test"]["answer"])
        choices = tokens[log_p[:, tokens].argmax(-1)], log_p.argmax(-1)
        return [(choice == answers).float().mean().item() for choice in choices]

    @torch.no_grad()
    def answers(self, task, predict, split="test"):
        """log p of all tokens at the answer, (samples, tokens)."""
        found = []
        for batch in DataLoader(self.splits[task][split], 50, collate_fn=self.collate):
            del batch["labels"]
            with torch.autocast("cpu", torch.bfloat16, bf16_is_native()):
                found.append(predict(task, {**batch, "use_cache": False}).logits[:, -1])
        return torch.cat(found).float().log_softmax(-1)

    def answers_of_expert(self, task):
        file = os.path.join(self.experts[task], "answers.safetensors")
        if not os.path.exists(file):
            expert = PeftModel.from_pretrained(self.base(), self.experts[task]).merge_and_unload()
            save_file({"log_p": self.answers(task, lambda task, batch: expert(**batch))}, file)
        return load_file(file)["log_p"]

    # ---- rows: each makes `predict(task, batch)`, None for the experts themselves ------------------------------------

    def no_merge(self, seed, of):
        model = self.base()
        return None if of == "experts" else lambda task, batch: model(**batch)

    def merge(self, seed, method, **kwargs):
        if "dare" in method:
            kwargs["seed"] = seed
        merged = peft_tint.merge(self.base(), self.experts, method, **kwargs)
        models = merged if isinstance(merged, dict) else dict.fromkeys(PROMPTS, merged)
        return lambda task, batch: models[task](**batch)

    def add_weighted_adapter(self, seed, weight, **kwargs):
        torch.manual_seed(seed)
        first, *others = self.experts
        model = PeftModel.from_pretrained(self.base(), self.experts[first], adapter_name=first)
        for task in others:
            model.load_adapter(self.experts[task], adapter_name=task)
        model.add_weighted_adapter(list(self.experts), [weight] * len(self.experts), "merged", **kwargs)
        model.set_adapter("merged")
        merged = model.merge_and_unload()
        return lambda task, batch: merged(**batch)

    def tint(self, seed, config, training):
        model = get_peft_model(self.base(), TintConfig(experts=self.experts, **config))
        for name, parameter in model.named_parameters():
            if config.get("coefficient_init") == 0 and "tint_coefficients" in name:
                parameter.requires_grad_(False)  # the control: layers on the plain base
        arguments = TintTrainingArguments(os.path.join(self.args.experts, "out"), seed=seed, **training)
        trainer = TintTrainer(model, arguments, self.unlabelled(seed), processing_class=self.tokenizer)
        trainer.train()

        def predict(task, batch):
            model.set_task(task)
            return model(**batch)

        return predict

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


def load_task(args, tokenizer, task):
    """The splits, in which `answer` is the token to be said; and each class's token."""
    files = {split: os.path.join(args.data, task, f"{split}.parquet") for split in ("train", "test")}
    data = datasets.load_dataset("parquet", data_files=files)
    names = data["test"].features["label"].names
    tokens = [tokenizer(f" {name}")["input_ids"][0] for name in names]
    assert len({*tokens}) == len(tokens), f"two classes of {task} begin with the same token"
    prompt = tokenizer(PROMPTS[task])["input_ids"]

    def encode(rows):
        texts = tokenizer(rows["text"], truncation=True, max_length=MAX_TOKENS - len(prompt))["input_ids"]
        ids = [text + prompt for text in texts]
        return {"input_ids": ids, "length": [len(row) for row in ids], "answer": [tokens[i] for i in rows["label"]]}

    data = data.map(encode, batched=True, remove_columns=["text", "label"]).shuffle(seed=0)
    train, ends = data["train"], (POOL, POOL + VALIDATION)
    return {
        "train": train.select(range(ends[1], len(train))),
        "pool": train.select(range(ends[0])),
        "validation": train.select(range(*ends)).sort("length"),
        "test": data["test"].select(range(TEST)).sort("length"),
        "tokens": tokens,
    }


def finetune(args, task, data, collate):
    """Fine-tunes a LoRA on the task, unless its folder is there. Returns the folder."""
    folder = os.path.join(args.experts, task)
    if os.path.exists(os.path.join(folder, "adapter_config.json")):
        return folder
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=16,
        max_steps=args.finetune_steps,
        learning_rate=1e-3,
        warmup_steps=10,
        bf16=bf16_is_native(),
        use_cpu=accelerate.PartialState().device.type == "cpu",
        train_sampling_strategy="group_by_length",
        report_to="none",
        save_strategy="no",
        logging_steps=10,
        remove_unused_columns=False,
    )

    def loss(outputs, labels, **_):
        return F.cross_entropy(outputs.logits[:, -1].float(), labels)

    Trainer(model, arguments, train_dataset=data, data_collator=collate, compute_loss_func=loss).train()
    model.save_pretrained(folder)
    return folder


MERGES = {
    "task_arithmetic": {"scale": 0.3},
    "ties": {},
    "tsv": {},
    "iso_c": {},
    "average": {},
    "iso_cts": {},
    "wudi": {},
    "dare_ties": {},
    "magnitude": {"scale": 0.3},
    "consensus": {"scale": 0.3},
    "dare": {"scale": 0.3},
    "lines": {},
    "karcher": {},
}
ADAPTERS = {  # PEFT's
    "linear": {"weight": 1.0},
    "ties": {"weight": 1.0, "density": 0.2},
    "dare_ties": {"weight": 1.0, "density": 0.5},
    "magnitude_prune": {"weight": 1.0, "density": 0.5},
    "svd": {"weight": 0.3},
    "cat": {"weight": 0.3},
}
STEPS = {"max_steps": 20, "per_device_train_batch_size": 8, "coefficient_learning_rate": 3e-2}
NORM = {"learning_rate": 3e-2, "head_steps": 100}
CONTROL = NORM | {"head_steps": 120, "max_steps": 0}  # as many updates of the norm
ROWS = {
    "base": (Bench.no_merge, {"of": "base"}),
    "experts": (Bench.no_merge, {"of": "experts"}),
    "coefficients": (Bench.tint, {"config": {"tint_layer": []}, "training": STEPS}),
    "coefficients and norm": (Bench.tint, {"config": {}, "training": STEPS | NORM}),
    "norm on the base": (Bench.tint, {"config": {"coefficient_init": 0.0}, "training": CONTROL}),
    **{name: (Bench.merge, {"method": name, **kwargs}) for name, kwargs in MERGES.items()},
    **{f"peft {n}": (Bench.add_weighted_adapter, {"combination_type": n, **kwargs}) for n, kwargs in ADAPTERS.items()},
}
SEEDED = ("coefficients", "coefficients and norm", "norm on the base", "dare_ties", "dare", "peft dare_ties")


if __name__ == "__main__":
    main()
