"""The suites of the benchmarks: one pretrained model, several tasks, and an expert for each.

A suite's data are TASK/train.parquet and TASK/test.parquet with the columns `label` and `image` (vision) or `text`; its
model is a folder or Hub id of DINOv2 (vision) or BERT with its tokenizer (text).

Experts are full fine-tunes, embeddings included: of images with a head that stays as a linear probe made it, of texts
with one that starts at random. Of each test split, one half without its labels adapts, the other half evaluates.
Experts are kept in --experts and used again. Needs scikit-learn, and pillow for images, too.
"""

import json
import os
import platform
from collections.abc import Callable
from typing import NamedTuple

import accelerate
import datasets
import numpy as np
import peft
import torch
import transformers
from sklearn.linear_model import LogisticRegression
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)

import peft_tint
from peft_tint import bf16_is_native

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
MAX_TOKENS = 64
NOT_DESCRIBED = ("model", "data", "experts", "output", "configs", "report", "into", "seeds")  # or elsewhere


def image_transform(args):
    size = (args.image_size, args.image_size)

    def transform(batch):
        images = [np.asarray(image.convert("RGB").resize(size), np.float32) / 255 for image in batch["image"]]
        return {"pixel_values": [torch.from_numpy((image - MEAN) / STD).permute(2, 0, 1) for image in images]}

    return transform


def text_transform(args):
    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def transform(batch):
        encoded = tokenizer(batch["text"], truncation=True, max_length=MAX_TOKENS)
        return {name: [torch.tensor(row) for row in rows] for name, rows in encoded.items()}

    return transform


class Suite(NamedTuple):
    auto: type
    load: dict  # arguments of `from_pretrained` for fine-tuning
    transform: Callable  # of the arguments; gives what makes the model's inputs of a batch of rows
    probed: bool  # whether a linear probe makes the head
    defaults: dict  # of the arguments
    training: dict


SUITES = {
    "vision": Suite(
        AutoModelForImageClassification,
        {},
        image_transform,
        True,
        {
            "tasks": ["mnist", "fashion", "cifar10", "street", "kana", "emoji"],
            "finetune_steps": 320,
            "experts": "experts_vision",
        },
        {"learning_rate": 2e-5, "lr_scheduler_type": "constant"},
    ),
    "text": Suite(
        AutoModelForSequenceClassification,
        # PyTorch's fused attention takes half of a training step's time in bfloat16 on a CPU
        {"attn_implementation": "eager"},
        text_transform,
        False,
        {
            "tasks": ["newsgroups", "reuters8", "movies", "tweets", "bbc", "debsection"],
            "finetune_steps": 400,
            "experts": "experts_text",
        },
        {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_steps": 30, "weight_decay": 0.01},
    ),
}


def add_suite_arguments(parser):
    """Of the vision suite, unless the parser has an argument --suite too."""
    parser.set_defaults(suite="vision")
    parser.add_argument("--model")
    parser.add_argument("--data")
    parser.add_argument("--tasks", nargs="+", help="by default all six")
    parser.add_argument("--layers", type=int, default=6, help="number of the model's first blocks to use")
    parser.add_argument("--image_size", type=int, default=56)
    parser.add_argument("--finetune_steps", type=int, help="by default what takes about 90 s of one core, or 150 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--experts", help="folder for the base and the experts, by default experts_SUITE")


def set_defaults(args):
    for name, value in SUITES[args.suite].defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def prepare(args):
    """The tasks' splits, and the folders of the base and of the experts, which are made if they are not there."""
    set_defaults(args)
    torch.set_num_threads(args.threads)
    splits = {task: load_task(args, task) for task in args.tasks}
    base_folder = os.path.join(args.experts, "base")
    if not os.path.isdir(base_folder):
        torch.manual_seed(args.seed)  # of the head
        load_base(args).save_pretrained(base_folder)
    return splits, base_folder, {task: finetune(args, base_folder, task, splits[task]) for task in args.tasks}


def load_task(args, task):
    """train, and the test split's halves for adaptation and evaluation; rows become the model's inputs on access."""
    files = {split: os.path.join(args.data, task, f"{split}.parquet") for split in ("train", "test")}
    data = datasets.load_dataset("parquet", data_files=files)
    test = data["test"].train_test_split(0.5, seed=args.seed)
    inputs = SUITES[args.suite].transform(args)

    def transform(batch):
        return inputs(batch) | ({"labels": batch["label"]} if "label" in batch else {})

    splits = {"train": data["train"], "adapt": test["train"], "eval": test["test"]}
    return {name: split.with_transform(transform) for name, split in splits.items()}


def collate(samples):
    """Tokens are filled up with zeros, which is BERT's [PAD] and its attention mask; images have one size."""
    names = [name for name in samples[0] if name != "labels"]
    batch = {name: pad_sequence([sample[name] for sample in samples], batch_first=True) for name in names}
    if "labels" in samples[0]:
        batch["labels"] = torch.tensor([sample["labels"] for sample in samples])
    return batch


def load_base(args):
    config = AutoConfig.from_pretrained(args.model)
    settings = config.to_dict() | {
        "num_hidden_layers": args.layers,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    settings = {
        key: value for key, value in settings.items() if key not in ("out_features", "out_indices", "stage_names")
    }
    auto = SUITES[args.suite].auto
    return auto.from_pretrained(args.model, config=type(config)(**settings), dtype=torch.float32)


def finetune(args, base_folder, task, split):
    """Fine-tunes the base on the task, unless its folder is there. Returns the folder."""
    folder = os.path.join(args.experts, task)
    if os.path.exists(os.path.join(folder, "model.safetensors")):
        return folder
    torch.manual_seed(args.seed)
    labels = split["train"].features["label"].names
    suite = SUITES[args.suite]
    model = suite.auto.from_pretrained(
        base_folder,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        ignore_mismatched_sizes=True,
        **suite.load,
    )
    if suite.probed:
        probe(model, split["train"])
        model.classifier.requires_grad_(False)

    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=32,
        max_steps=args.finetune_steps,
        seed=args.seed,
        bf16=bf16_is_native(),
        use_cpu=accelerate.PartialState().device.type == "cpu",
        report_to="none",
        save_strategy="no",
        logging_steps=50,
        remove_unused_columns=False,
        **suite.training,
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
        labels.append(batch.pop("labels"))
        model(**batch)
    hook.remove()
    fit = LogisticRegression(max_iter=1000).fit(torch.cat(features).numpy(), torch.cat(labels).numpy())
    model.classifier.weight.copy_(torch.from_numpy(fit.coef_))
    model.classifier.bias.copy_(torch.from_numpy(fit.intercept_))


def describe(args):
    """What a result depends on beside the code."""
    libraries = (torch, transformers, peft, accelerate, datasets, peft_tint)
    config = {key: value for key, value in vars(args).items() if key not in NOT_DESCRIBED}
    config["model"] = os.path.basename(args.model.rstrip("/"))
    return {
        "arguments": config,
        "versions": {library.__name__: library.__version__ for library in libraries},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s)",
        "precision": "bfloat16 autocast" if bf16_is_native() else "float32",  # of fine-tuning and of what is trained
    }


def save_result(args, results):
    with open(args.output, "w") as file:
        json.dump({**describe(args), "results": results}, file, indent=1)
        file.write("\n")
