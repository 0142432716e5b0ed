"""What the examples share: arguments, data, the ways to merge and their scores, the table, pictures and files."""

import json
import os
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Image, load_dataset, load_from_disk
from peft import get_peft_model
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    default_data_collator,
)
from transformers.utils import cached_file

from peft_tint import MERGING_METHODS, TintConfig, TintTrainer, check_experts, merge
from peft_tint.plots import plot_accuracy, plot_coefficients, plot_cross_task, plot_similarity, plot_training

warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # libraries, about themselves


def _end_with_launcher(launcher=os.getppid()):  # noqa: B008, the parent at this moment
    while os.getppid() == launcher:
        time.sleep(1)
    os._exit(1)


if "TORCHELASTIC_RUN_ID" in os.environ:  # by `accelerate launch`, whose processes would outlive it if it were killed
    threading.Thread(target=_end_with_launcher, daemon=True).start()

LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
STRINGS = ("string", "large_string")
# Merges that are sums want a scale below 1, those that are means or rescale themselves want 1
SUMS = ("task_arithmetic", "ties", "dare", "dare_ties", "magnitude", "consensus", "tall_masks")
AGGREGATE = {"ties": {"aggregate": "sum"}, "dare_ties": {"aggregate": "sum"}}
ADAMERGING = {"update": "joint", "per_device_train_batch_size": 16, "lr_scheduler_type": "constant"}
# method: (fields of the TintConfig, objective, training arguments) beside those of the command line
TRAINED = {
    "adamerging": ({"tint_layer": []}, "entropy", ADAMERGING),
    "adamerging_task_wise": ({"tint_layer": [], "granularity": "model"}, "entropy", ADAMERGING),
    "adamerging++": (
        {"tint_layer": [], "transform": "ties", "transform_kwargs": {"density": 0.2}},
        "entropy",
        ADAMERGING,
    ),
    "supervised": ({"tint_layer": []}, "pseudo_label", {"lr_scheduler_type": "constant"}),
    "tint_coefficients": ({"tint_layer": [], "save_experts": "reference"}, None, {}),
    "tint": ({}, None, {}),
}
METHODS = ("pretrained", *MERGING_METHODS, *TRAINED)


@dataclass
class MergeArguments:
    """What to merge, on which data, and what to compare it with."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "The base model of all experts: a Hub id or a folder."}
    )
    processor_name: str | None = field(
        default=None, metadata={"help": "Where the tokenizer or image processor is, if not with the base."}
    )
    experts: list[str] | None = field(
        default=None,
        metadata={"help": "TASK=SOURCE for each task: the Hub id or folder of a checkpoint or of a PEFT adapter."},
    )
    data: list[str] | None = field(
        default=None,
        metadata={
            "help": "TASK=SOURCE: a Hub dataset (ID or ID:CONFIG), a folder of `save_to_disk`, one with files of the "
            "splits, or a file (parquet, csv, json)."
        },
    )
    method: list[str] = field(
        default_factory=lambda: ["pretrained", "average", "task_arithmetic", "ties", "adamerging", "tint"],
        metadata={"help": f"What to compare, of {', '.join(METHODS)}. 'supervised' has labels and no tint layer."},
    )
    tint_layer: list[str] | None = field(
        default=None,
        metadata={"help": "Module names; 'auto' or 'none'; by default the head, or a language model's last norm."},
    )
    granularity: str = field(
        default="tensor", metadata={"help": "What shares one coefficient: tensor, module, block or model."}
    )
    coefficient_init: float = field(
        default=0.3, metadata={"help": "Where coefficients start, and the scale of the merges that are sums."}
    )
    transform: str | None = field(
        default=None,
        metadata={
            "help": "What the task vectors become before Tint merges them: 'tsv', whose coefficients start at 1, or "
            "another transform of TintConfig."
        },
    )
    objective: str = field(default="soft_pseudo_label", metadata={"help": "Tint's objective."})
    adamerging_steps: int = field(default=500, metadata={"help": "Steps of AdaMerging."})
    save_experts: str = field(
        default="reference", metadata={"help": "'dts' puts the experts, compressed, into the saved adapter."}
    )
    max_adapt_samples: int | None = field(default=None, metadata={"help": "At most so many rows a task adapt."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "At most so many rows a task are scored."})
    cross_task_samples: int = field(
        default=100, metadata={"help": "Rows a task for the matrix of encoders under other tasks' heads; 0: none."}
    )
    resume_from_checkpoint: str | None = field(
        default=None, metadata={"help": "A checkpoint of Tint's training, or 'last' for that in `output_dir`."}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "Push the adapter."})
    hub_model_id: str | None = field(default=None, metadata={"help": "Where to."})
    embedded: bool = field(
        default=False,
        metadata={"help": "Run without the Hub, on data and a base that the example has; also if no Hub is reached."},
    )

    def __post_init__(self):
        for name in set(self.method) - set(METHODS):
            raise ValueError(f"`method` has {name!r}; it must be of {', '.join(METHODS)}.")
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("`push_to_hub` needs `hub_model_id`, such as me/my-merge.")
        self.experts, self.data = by_task("experts", self.experts), by_task("data", self.data)
        if self.tint_layer in (["auto"], ["none"]):
            self.tint_layer = {"auto": "auto", "none": []}[self.tint_layer[0]]


class Setup(NamedTuple):
    """`train` is labelled and may be {}, `adaptation` is not; `load_base` gives the base model, each time anew."""

    load_base: object
    experts: dict
    processor: object
    collator: object
    metrics: dict  # of each task, EvalPrediction -> {name: number}, among them "score"
    train: dict
    adaptation: dict
    evaluation: dict


def parse(*types, description, defaults=None):
    """The dataclasses from the flags, before which may come a JSON or YAML file of the same names."""
    parser = HfArgumentParser(types, description=description)
    parser.set_defaults(**(defaults or {}))
    flags = sys.argv[1:]
    if flags and flags[0].endswith((".json", ".yaml", ".yml")):
        file = Path(flags.pop(0))
        values = (json.loads if file.suffix == ".json" else yaml.safe_load)(file.read_text())
        for name in values.keys() - {f.name for one in types for f in fields(one)}:
            raise ValueError(f"{file} has {name!r}, which is no argument of {Path(sys.argv[0]).name}.")
        parser.set_defaults(**values)
    return parser.parse_args_into_dataclasses(flags, look_for_args_file=False)


def by_task(name, pairs):
    """{task: source} of flags TASK=SOURCE; a file may have the dictionary."""
    if isinstance(pairs, dict):
        return pairs
    for pair in pairs or []:
        if "=" not in pair:
            raise ValueError(f"`{name}` has {pair!r}; write TASK=SOURCE.")
    return dict(pair.split("=", 1) for pair in pairs or [])


def hub_has(model):
    """Whether a model can be had from the Hub, or from its cache."""
    try:
        return cached_file(model, "config.json") is not None
    except OSError:
        return False


# ---- data ------------------------------------------------------------------------------------------------------------


def load_splits(source) -> dict[str, Dataset]:
    """`train`, for experts; `adapt`, whose labels nothing reads; and `eval`. No two of them share a row.

    `source` is what `--data` names, or the arguments of `load_dataset`. With a validation and a test split the former
    is scored and the latter adapts (GLUE hides its labels); one of them alone is halved; data without either is cut.
    The label becomes the column `label`; chats, and prompts with completions, have none.
    """
    if isinstance(source, dict):
        data = load_dataset(**source)
    elif Path(source).is_file():
        data = load_dataset(Path(source).suffix[1:], data_files=str(source))
    elif any(Path(source, name).exists() for name in ("dataset_dict.json", "dataset_info.json")):
        data = load_from_disk(source)
    else:
        data = load_dataset(*source.split(":", 1))
    data = {"train": data} if isinstance(data, Dataset) else dict(data)
    data = {name.removesuffix("_matched"): _with_label(split) for name, split in data.items()}  # MNLI's
    held_out = [data[name] for name in ("validation", "test") if name in data]
    if not held_out:
        parts = data["train"].train_test_split(0.4, seed=0)
        data, held_out = {"train": parts["train"]}, [parts["test"]]
    if len(held_out) == 1:
        halves = held_out[0].train_test_split(0.5, seed=0)
        held_out = [halves["test"], halves["train"]]
    return {"train": data.get("train"), "adapt": held_out[1], "eval": held_out[0]}


def _with_label(split):
    if {"messages", "completion"} & {*split.column_names}:
        return split
    found = [name for name in LABEL_COLUMNS if name in split.column_names]
    if not found:
        raise ValueError(f"The data have the columns {split.column_names}, of which none is {LABEL_COLUMNS}.")
    split = split if found[0] == "label" else split.rename_column(found[0], "label")
    return split.class_encode_column("label") if split.features["label"].dtype in STRINGS else split


def some(split, count):
    """So many rows at random, always the same."""
    return split if count is None or count >= len(split) else split.shuffle(seed=0).select(range(count))


def label_names(split) -> list[str] | None:
    """The names of the classes; None for regression."""
    feature = split.features["label"]
    if isinstance(feature, ClassLabel):
        return feature.names
    return None if "float" in feature.dtype else [str(i) for i in range(max(split["label"]) + 1)]


def is_vision(split):
    return any(isinstance(feature, Image) for feature in split.features.values())


def load_processor(model, vision):
    return (AutoImageProcessor if vision else AutoTokenizer).from_pretrained(model)


def make_collator(processor, vision):
    return default_data_collator if vision else DataCollatorWithPadding(processor)


def to_inputs(split, processor, max_seq_length):
    """The rows as the model takes them: texts are tokenised (one or a pair), images are processed when read."""
    if is_vision(split):
        column = next(name for name, feature in split.features.items() if isinstance(feature, Image))

        def process(batch):
            images = [image.convert("RGB") for image in batch[column]]
            pixels = processor(images=images, return_tensors="pt")["pixel_values"]
            return {"pixel_values": list(pixels)} | ({"label": batch["label"]} if "label" in batch else {})

        return split.with_transform(process)
    texts = [name for name, feature in split.features.items() if feature.dtype in STRINGS]

    def tokenize(batch):
        return processor(*(batch[name] for name in texts), truncation=True, max_length=max_seq_length)

    return split.map(tokenize, batched=True, remove_columns=[n for n in split.column_names if n != "label"])


def make_setup(args, load_base, processor, metric_of, max_seq_length=None):
    """`metric_of(task, is_regression)` gives a task's metric. Classes are counted as the expert counts them."""
    splits = {task: load_splits(args.data[task]) for task in args.experts}
    vision = is_vision(next(iter(splits.values()))["eval"])
    model = get_peft_model(load_base(), TintConfig(experts=args.experts))
    sizes = {"adapt": args.max_adapt_samples, "eval": args.max_eval_samples, "train": args.max_adapt_samples}
    parts, metrics = {part: {} for part in sizes}, {}
    for task, split in splits.items():
        names = label_names(split["eval"])
        metrics[task] = metric_of(task, names is None)
        for part, size in sizes.items():
            if split[part] is not None:
                rows = some(split[part], size)
                if part == "adapt":
                    rows = rows.remove_columns("label")
                elif names is not None:
                    rows = _count_as(rows, model.task_labels(task).get("id2label", {}))
                parts[part][task] = to_inputs(rows, processor, max_seq_length)
    collator = make_collator(processor, vision)
    return Setup(load_base, args.experts, processor, collator, metrics, parts["train"], parts["adapt"], parts["eval"])


def _count_as(split, id2label):
    """Labels by the expert's indices, where both name the same classes in another order."""
    feature = split.features["label"]
    label2id = {str(name).lower(): index for index, name in id2label.items()}
    if not isinstance(feature, ClassLabel) or {name.lower() for name in feature.names} != label2id.keys():
        return split
    in_order = [name.lower() for name in feature.names] == sorted(label2id, key=label2id.get)
    return split if in_order else split.align_labels_with_mapping(label2id, "label")


def accuracy(prediction):
    return {"score": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


# ---- methods ---------------------------------------------------------------------------------------------------------


def make_trainer(setup, training, objective="entropy", base=None, experts=None, data=True, **config):
    """A trainer of the experts' tint; `base` and `experts` take the place of those of the setup."""
    model = get_peft_model(base or setup.load_base(), TintConfig(experts=experts or setup.experts, **config))
    return TintTrainer(
        model,
        training,
        setup.adaptation if data else None,
        {task: setup.evaluation[task] for task in model.tasks},
        objective,
        setup.collator,
        setup.processor,
        setup.metrics,
    )


def run(args, training, setup, metric="accuracy"):
    """Scores every method, writes the table, pictures, results and the adapter of Tint, and pushes it if asked."""
    others = quiet(training)
    say("\nThe experts, and the base under their heads")
    reference = make_trainer(setup, others, data=False, coefficient_init=0.0)
    scores = {"pretrained": reference.evaluate()}
    for method in args.method:
        if method not in ("pretrained", "tint"):
            say(f"\n{method}")
        if method in MERGING_METHODS:
            scores[method] = score_data_free(setup, others, method, args.coefficient_init, scores["pretrained"])
        elif method == "supervised":
            config, objective, more = TRAINED[method]
            trainer = make_trainer(setup, replace(others, **more), objective, data=False, **config)
            train_supervised(trainer, setup)
            scores[method] = trainer.evaluate()
        elif method not in ("pretrained", "tint"):
            scores[method] = train(method, args, others, setup).evaluate()
    crossed = {"before": cross_task(reference, setup, args.cross_task_samples)}
    trainer = None
    if "tint" in args.method:
        say("\ntint")
        trainer = train("tint", args, training, setup, args.resume_from_checkpoint)
        scores["tint"] = trainer.evaluate()
        crossed["after"] = cross_task(trainer, setup, args.cross_task_samples)
    finish(args, training, setup, trainer, {"experts": expert_scores(scores["pretrained"]), **scores}, crossed, metric)
    return scores


def train(method, args, training, setup, resume=None):
    """The trainer of a method, when it is done."""
    config, objective, more = TRAINED[method]
    settings = {"granularity": args.granularity, "coefficient_init": args.coefficient_init}
    if method in ("tint", "tint_coefficients"):
        settings |= {name: getattr(args, name) for name in ("tint_layer", "transform", "save_experts")}
        settings |= {"coefficient_init": 1.0} if args.transform == "tsv" else {}
    else:
        more = {"max_steps": args.adamerging_steps, **more}
    trainer = make_trainer(setup, replace(training, **more), objective or args.objective, **settings | config)
    trainer.train(resume_from_checkpoint=True if resume == "last" else resume)
    return trainer


def quiet(training):
    """The arguments of what is trained beside Tint."""
    more = {"save_steps": None, "eval_steps": None, "load_best_model_at_end": False, "collapse_guard": None}
    return replace(training, report_to="none", **more)


def finish(args, training, setup, trainer, scores, crossed, metric):
    """Writes the table, pictures, results, and the adapter of Tint's `trainer`, if any; pushes it if asked."""
    if PartialState().is_main_process:
        output = Path(training.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        write(output, {method: scores[method] for method in ("experts", *args.method)}, crossed, metric)
        similarity = check_experts(setup.load_base(), setup.experts).cosines("model")
        plot_similarity(next(iter(similarity.values())), list(setup.experts), output / "similarity.png")
        if trainer:
            plot_coefficients(trainer.model.coefficients(), output / "coefficients.png")
            plot_training(trainer.log_history, list(setup.experts), output / "training.png")
            trainer.save_model(output / "adapter", results=scores["tint"])
            if args.push_to_hub:
                trainer.push_to_hub(args.hub_model_id, results=scores["tint"])
        print(f"\nWritten to {output}: {', '.join(sorted(path.name for path in output.iterdir()))}")
    PartialState().wait_for_everyone()


def say(text):
    PartialState().print(text, flush=True)


def merge_data_free(setup, method, scale):
    """The merged model, or {task: model} by a per-task method."""
    kwargs = {**AGGREGATE.get(method, {}), **({"scale": scale} if method in SUMS else {})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The head of expert")  # of its own shape, and so not merged
        return merge(setup.load_base(), setup.experts, method, **kwargs)


def score_data_free(setup, training, method, scale, pretrained):
    """The experts' own heads on what `merge` makes: a tint of it, whose coefficients are zero."""
    merged = merge_data_free(setup, method, scale)
    per_task = MERGING_METHODS[method].per_task
    groups = [(merged[task], {task: setup.experts[task]}) for task in merged] if per_task else [(merged, None)]
    found = {}
    for base, experts in groups:
        trainer = make_trainer(setup, training, data=False, base=base, experts=experts, coefficient_init=0.0)
        found |= trainer.evaluate()
    results = {task: {} for task in setup.experts}
    for task, metrics in results.items():
        for name, value in found[task].items():
            if f"expert_{name}" in found[task]:
                # on the base that the experts are of: a LoRA expert is a sum with whatever it is put on
                expert = pretrained[task][f"expert_{name}"]
                normalized = value / expert if expert else float("nan")
                metrics |= {name: value, f"expert_{name}": expert, f"normalized_{name}": normalized}
    return {**results, "mean": mean_of(results)}


def expert_scores(pretrained):
    results = {
        task: {name.removeprefix("expert_"): value for name, value in metrics.items() if name.startswith("expert_")}
        for task, metrics in pretrained.items()
    }
    return {task: {**metrics, "normalized_score": 1.0} for task, metrics in results.items()}


def mean_of(results):
    names = dict.fromkeys(name for metrics in results.values() for name in metrics)
    return {n: float(np.mean([metrics[n] for metrics in results.values() if n in metrics])) for n in names}


def train_supervised(trainer, setup):
    """The coefficients by the labels of the training split, which stand in the place of the experts' outputs."""
    args, state = trainer.args, PartialState()
    if not setup.train:
        raise ValueError("'supervised' needs labels to train on, and the data have no training split.")
    order = torch.Generator().manual_seed(args.seed)
    batches = {task: _endless(setup, task, args, state.process_index) for task in setup.train}
    for _ in range(args.max_steps):
        for index in torch.randperm(len(batches), generator=order).tolist():
            task = list(batches)[index]
            batch = {name: value.to(state.device) for name, value in next(batches[task]).items()}
            labels, classes = batch.pop("labels"), len(trainer.model.task_labels(task)["id2label"])
            batch["expert_rows"] = labels[:, None].float() if classes == 1 else F.one_hot(labels, classes).float()
            trainer.step(task, batch)


def _endless(setup, task, args, process):
    generator = torch.Generator().manual_seed(args.seed + process)
    size = args.per_device_train_batch_size
    while True:
        yield from DataLoader(setup.train[task], size, True, collate_fn=setup.collator, generator=generator)


def cross_task(trainer, setup, count):
    """{encoder: {head: score}}: each expert's encoder under the heads that the model has now."""
    if not count:
        return None
    model, evaluation = trainer.model, {task: some(split, count) for task, split in setup.evaluation.items()}
    before, crossed = model.coefficients().values, {}
    for encoder in model.tasks:
        model.set_coefficients({task: float(task == encoder) for task in model.tasks})
        results = trainer.evaluate(evaluation)
        crossed[encoder] = {task: results[task]["score"] for task in model.tasks}
    model.set_coefficients(before)
    return crossed


# ---- what comes out --------------------------------------------------------------------------------------------------


def write(output, scores, crossed, metric):
    tasks = [task for task in scores["experts"] if task != "mean"]
    lines = [f"| {metric} (normalised) | {' | '.join([*tasks, 'mean'])} |", "|---" * (len(tasks) + 2) + "|"]
    for method, results in scores.items():
        cells = [f"{results[t]['score']:.3f} ({results[t]['normalized_score']:.1%})" for t in (*tasks, "mean")]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    table = "\n".join(lines)
    print(f"\n{table}")
    (output / "table.md").write_text(table + "\n")
    (output / "results.json").write_text(json.dumps({"scores": scores, "cross_task": crossed}, indent=1) + "\n")
    numbers = {method: {task: results[task]["score"] for task in tasks} for method, results in scores.items()}
    lowest = min(0.0, *(value for row in numbers.values() for value in row.values()))
    plot_accuracy(numbers, output / "accuracy.png", metric, lowest)
    for when, matrix in crossed.items():
        if matrix:
            plot_cross_task(matrix, output / f"cross_task_{when}.png", metric)
