"""python benchmarks/vision_tint.py --model MODEL --data FOLDER [--output benchmarks/results/vision_tint.json]

Merges experts for several image classification tasks and compares the merged models on samples that adaptation never
saw. MODEL is a DINOv2 folder or Hub id, FOLDER holds TASK/train.parquet and TASK/test.parquet with the columns `image`
and `label`.

Experts: a linear probe makes the head, then the encoder is fine-tuned. Of each test split, one half without its labels
adapts, the other half evaluates. Experts are kept in --experts and used again. Needs scikit-learn and pillow too.
"""

import argparse
import json
import os
import platform
import time

import accelerate
import datasets
import numpy as np
import peft
import torch
import transformers
from peft import get_peft_model
from sklearn.linear_model import LogisticRegression
from transformers import AutoConfig, AutoModelForImageClassification, Trainer, TrainingArguments

import peft_tint
from peft_tint import TintConfig, TintTrainer, TintTrainingArguments

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_suite_arguments(parser)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tint_layers", nargs="+", help="compare only these, each with the head (or 'auto')")
    parser.add_argument("--output", default="benchmarks/results/vision_tint.json")
    args = parser.parse_args()
    splits, base_folder, experts = prepare(args)
    adaptation = {task: split["adapt"].remove_columns("label") for task, split in splits.items()}
    evaluation = {task: split["eval"] for task, split in splits.items()}

    k = len(experts)
    ours = {"max_steps": args.steps, "seed": args.seed}
    ada = {**ours, "update": "joint", "per_device_train_batch_size": 16}
    rows = {
        "pretrained": ({"coefficient_init": 0.0}, None, None),
        "average": ({"coefficient_init": 1 / k}, None, None),
        "task arithmetic 0.3": ({}, None, None),
        "AdaMerging (task-wise)": ({"tint_layer": [], "granularity": "model"}, "entropy", ada),
        "AdaMerging (layer-wise)": ({"tint_layer": []}, "entropy", ada),
        "Tint (pseudo-labels)": ({}, "pseudo_label", ours),
        "Tint": ({}, "confident_pseudo_label", ours),
    }
    if args.tint_layers:
        layers = {layer: layer if layer == "auto" else list({layer, "classifier"}) for layer in args.tint_layers}
        rows = {layer: ({"tint_layer": names}, "pseudo_label", ours) for layer, names in layers.items()}
    results = {}
    for name, (config, objective, arguments) in rows.items():
        base = AutoModelForImageClassification.from_pretrained(base_folder)
        model = get_peft_model(base, TintConfig(experts=experts, **config))
        arguments = TintTrainingArguments(output_dir=args.experts, bf16=True, **(arguments or {}))
        trainer = TintTrainer(model, arguments, adaptation, evaluation, objective or "entropy", data_collator=collate)
        wall, cpu = time.perf_counter(), time.process_time()
        if objective:
            trainer.train()
        seconds = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        scores = trainer.evaluate()
        results[name] = {
            "accuracy": {task: scores[task]["accuracy"] for task in (*args.tasks, "mean")},
            "normalized_accuracy": {task: scores[task]["normalized_accuracy"] for task in (*args.tasks, "mean")},
            **seconds,
        }
        if config.get("tint_layer"):
            results[name]["tint_layer"] = model.peft_config["default"].tint_layer
        results["experts"] = {"accuracy": {task: scores[task]["expert_accuracy"] for task in (*args.tasks, "mean")}}
        print(name, {task: round(value, 3) for task, value in results[name]["accuracy"].items()}, seconds, flush=True)
    save_result(args, results)
    print(f"\n| method | {' | '.join(args.tasks)} | mean |\n|---|{'---|' * (len(args.tasks) + 1)}")
    for name, row in results.items():
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row['accuracy'].values())} |")


def add_suite_arguments(parser):
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tasks", nargs="+", default=["mnist", "fashion", "cifar10", "street"])
    parser.add_argument("--layers", type=int, default=6, help="number of the model's first blocks to use")
    parser.add_argument("--image_size", type=int, default=56)
    parser.add_argument("--finetune_steps", type=int, default=320, help="about 90 s of one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", default="experts_vision", help="folder for the base and the experts")


def prepare(args):
    """The tasks' splits, and the folders of the base and of the experts, which are made if they are not there."""
    torch.set_num_threads(args.threads)
    splits = {task: load_task(args, task) for task in args.tasks}
    base_folder = os.path.join(args.experts, "base")
    if not os.path.isdir(base_folder):
        load_base(args.model, args.layers).save_pretrained(base_folder)
    return splits, base_folder, {task: finetune(args, base_folder, task, splits[task]) for task in args.tasks}


def load_task(args, task):
    """train, and the test split's halves for adaptation and evaluation; images become `pixel_values` on access."""
    files = {split: os.path.join(args.data, task, f"{split}.parquet") for split in ("train", "test")}
    data = datasets.load_dataset("parquet", data_files=files)
    test = data["test"].train_test_split(0.5, seed=args.seed)
    size = args.image_size

    def transform(batch):
        images = [np.asarray(image.convert("RGB").resize((size, size)), np.float32) / 255 for image in batch["image"]]
        pixels = [torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1) for image in images]
        return {"pixel_values": pixels, **({"labels": batch["label"]} if "label" in batch else {})}

    splits = {"train": data["train"], "adapt": test["train"], "eval": test["test"]}
    return {name: split.with_transform(transform) for name, split in splits.items()}


def collate(samples):
    batch = {"pixel_values": torch.stack([sample["pixel_values"] for sample in samples])}
    if "labels" in samples[0]:
        batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
    return batch


def load_base(model, layers):
    config = AutoConfig.from_pretrained(model)
    settings = config.to_dict() | {"num_hidden_layers": layers}
    settings = {
        key: value for key, value in settings.items() if key not in ("out_features", "out_indices", "stage_names")
    }
    return AutoModelForImageClassification.from_pretrained(model, config=type(config)(**settings), dtype=torch.float32)


def finetune(args, base_folder, task, split):
    """Fits the head on the frozen encoder, then fine-tunes the encoder. Returns its folder."""
    folder = os.path.join(args.experts, task)
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return folder
    torch.manual_seed(args.seed)
    labels = split["train"].features["label"].names
    model = AutoModelForImageClassification.from_pretrained(
        base_folder, num_labels=len(labels), id2label=dict(enumerate(labels)), ignore_mismatched_sizes=True
    )
    probe(model, split["train"])
    model.classifier.requires_grad_(False)

    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=2e-5,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        max_steps=args.finetune_steps,
        seed=args.seed,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        report_to="none",
        save_strategy="no",
        logging_steps=50,
        remove_unused_columns=False,
    )
    trainer = Trainer(model, arguments, train_dataset=split["train"], data_collator=collate)
    trainer.train()
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def probe(model, data):
    features = []
    hook = model.classifier.register_forward_pre_hook(lambda module, inputs: features.append(inputs[0].float()))
    labels = []
    for batch in torch.utils.data.DataLoader(data, batch_size=100, collate_fn=collate):
        model(pixel_values=batch["pixel_values"])
        labels.append(batch["labels"])
    hook.remove()
    fit = LogisticRegression(max_iter=1000).fit(torch.cat(features).numpy(), torch.cat(labels).numpy())
    model.classifier.weight.copy_(torch.from_numpy(fit.coef_))
    model.classifier.bias.copy_(torch.from_numpy(fit.intercept_))


def save_result(args, results):
    libraries = (torch, transformers, peft, accelerate, datasets, peft_tint)
    config = {key: value for key, value in vars(args).items() if key not in ("model", "data", "experts", "output")}
    config["model"] = os.path.basename(args.model.rstrip("/"))
    result = {
        "config": config,
        "versions": {library.__name__: library.__version__ for library in libraries},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s)",
        "results": results,
    }
    with open(args.output, "w") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
