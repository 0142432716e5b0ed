"""python examples/dense/run_dense_tint.py [--output_dir dense_output]

Dense prediction with one backbone: what is where (segmentation, five classes a pixel) and how far (depth, one number a
pixel), on synthetic scenes that it draws. It trains a small SegFormer to repaint scenes, fine-tunes an expert for each
of the two tasks from it, and merges them. Segmentation takes confident pseudo-labels, pixel by pixel; depth, whose
head has one output, the mean absolute difference (L1) to its expert. Labels have the logits' size, half of the image's.
The flags are the fields of `TintTrainingArguments`; a JSON or YAML file may come first.
"""

import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers
from _common import parse
from accelerate import PartialState
from datasets import Array2D, Array3D, Dataset, Features
from matplotlib import colormaps
from matplotlib.figure import Figure
from peft import get_peft_model
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import SegformerConfig, SegformerForSemanticSegmentation, default_data_collator

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments
from peft_tint.plots import plot_coefficients, plot_training

SIZE = 48
CLASSES = ("background", "circle", "square", "triangle", "bar")
OUTPUTS = {"base": 3, "segmentation": len(CLASSES), "depth": 1}
# What few minutes want
FEW_MINUTES = {"max_steps": 100}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_tint" / "dense"


@dataclass
class DenseArguments:
    scenes: int = field(default=1200, metadata={"help": "Scenes to train on; a third as many adapt, and are scored."})
    finetune_steps: int = field(default=400, metadata={"help": "Steps of the base and of each expert."})
    coefficient_init: float = field(default=0.3, metadata={"help": "Where the coefficients start."})
    cache_dir: str = field(default=str(CACHE), metadata={"help": "Where the base and the experts are kept."})


def main():
    args, training = parse(DenseArguments, TintTrainingArguments, description=__doc__, defaults=FEW_MINUTES)
    torch.set_num_threads(max(1, os.cpu_count() // 2))  # so small a model gains little from more
    output, random = Path(training.output_dir), np.random.default_rng(0)
    parts = {"train": args.scenes, "adapt": args.scenes // 3, "eval": args.scenes // 3}
    scenes = {
        part: [draw_scene(random) for _ in tqdm(range(count), f"drawing to {part}")] for part, count in parts.items()
    }
    with PartialState().main_process_first():
        folders = train_missing(Path(args.cache_dir) / f"{args.scenes}-{args.finetune_steps}", args, scenes["train"])
    base, experts = folders.pop("base"), folders
    adaptation = {task: to_dataset(scenes["adapt"], None) for task in experts}
    evaluation = {task: to_dataset(scenes["eval"], task) for task in experts}

    def make_trainer(coefficient, training, **config):
        model = SegformerForSemanticSegmentation.from_pretrained(base)
        config = TintConfig(experts=experts, coefficient_init=coefficient, **config)
        return TintTrainer(
            get_peft_model(model, config),
            training,
            adaptation,
            evaluation,
            data_collator=default_data_collator,
            compute_metrics={"depth": depth_metrics},
        )

    quiet = replace(training, save_steps=None, report_to="none")
    scores, predictions = {}, {}
    for method, coefficient in {"pretrained": 0.0, "average": 0.5, "task arithmetic": args.coefficient_init}.items():
        PartialState().print(f"{method}", flush=True)
        trainer = make_trainer(coefficient, quiet)
        scores[method], predictions[method] = trainer.evaluate(), predict(trainer.model, scenes["eval"])
    PartialState().print("coefficients alone", flush=True)
    trainer = make_trainer(args.coefficient_init, quiet, tint_layer=[])
    trainer.train()
    scores["coefficients alone"] = trainer.evaluate()
    PartialState().print("tint", flush=True)
    trainer = make_trainer(args.coefficient_init, training)
    trainer.train()
    scores["tint"], predictions["tint"] = trainer.evaluate(), predict(trainer.model, scenes["eval"])
    predictions["experts"] = {}
    for task in experts:
        with trainer.model.expert(task):
            predictions["experts"] |= predict(trainer.model, scenes["eval"], [task])
    if PartialState().is_main_process:
        write(output, scores, predictions, scenes["eval"], trainer)


def draw_scene(random):
    """A scene with its labels: image (3, SIZE, SIZE) in [-1, 1]; of each second pixel class and depth.

    Up to five things lie before a background that slants away; nearer ones hide others, and are brighter."""
    y, x = np.mgrid[:SIZE, :SIZE]
    depth = 1 - 0.3 * y / SIZE + 0.1 * random.random()
    label, colour = np.zeros((SIZE, SIZE), int), np.full((SIZE, SIZE, 3), random.uniform(0.2, 0.6, 3))
    for distance in sorted(random.uniform(0.1, 0.7, random.integers(2, 6)), reverse=True):
        kind, (row, column) = random.integers(1, len(CLASSES)), random.uniform(6, SIZE - 6, 2)
        r = 4 + 5 * (1 - distance)
        dy, dx = y - row, x - column
        mask = {
            1: dy**2 + dx**2 < r**2,
            2: np.maximum(abs(dy), abs(dx)) < 0.9 * r,
            3: (abs(dy) < r) & (abs(dx) < (dy + r) / 2),
            4: (abs(dy) < 2.2) & (abs(dx) < 1.5 * r),
        }[int(kind)]
        label[mask], depth[mask], colour[mask] = kind, distance, random.uniform(0.3, 1, 3)
    image = colour * (1.1 - 0.6 * depth[..., None]) + random.normal(0, 0.03, (SIZE, SIZE, 3))
    pixels = np.float32(2 * image.clip(0, 1) - 1).transpose(2, 0, 1)
    return {"pixel_values": pixels, "segmentation": label[::2, ::2], "depth": np.float32(depth[::2, ::2])}


def to_dataset(scenes, task):
    """With the labels of a task, or without any."""
    columns = {"pixel_values": Array3D((3, SIZE, SIZE), "float32")}
    rows = {"pixel_values": [scene["pixel_values"] for scene in scenes]}
    if task:
        columns["labels"] = Array2D((SIZE // 2, SIZE // 2), "int64" if task == "segmentation" else "float32")
        rows["labels"] = [scene[task] for scene in scenes]
    return Dataset.from_dict(rows, Features(columns)).with_format("torch")


# ---- models ----------------------------------------------------------------------------------------------------------


def train_missing(folder, args, scenes):
    """The folders of the base, which repaints a scene from half of it, and of the experts, which start from it."""
    images = torch.from_numpy(np.stack([scene["pixel_values"] for scene in scenes]))
    labels = {task: torch.from_numpy(np.stack([scene[task] for scene in scenes])) for task in ("segmentation", "depth")}
    labels["base"] = images[..., ::2, ::2]
    for task, count in OUTPUTS.items():
        if (folder / task / "config.json").exists():
            continue
        torch.manual_seed(list(OUTPUTS).index(task))
        names = {"id2label": dict(enumerate(CLASSES))} if task == "segmentation" else {"num_labels": count}
        if task == "base":
            model = SegformerForSemanticSegmentation(make_config(**names))
        else:
            load = SegformerForSemanticSegmentation.from_pretrained
            model = load(folder / "base", ignore_mismatched_sizes=True, **names)
        print(f"training {'the base' if task == 'base' else f'the expert of {task}'} (first run only)", flush=True)
        fit(model.train(), task, images, labels[task], args.finetune_steps)
        model.save_pretrained(folder / task)
    return {task: str(folder / task) for task in OUTPUTS}


def make_config(**names):
    return SegformerConfig(
        num_encoder_blocks=3,
        depths=[1, 1, 1],
        sr_ratios=[4, 2, 1],
        hidden_sizes=[24, 48, 96],
        patch_sizes=[5, 3, 3],
        strides=[2, 2, 2],
        num_attention_heads=[1, 2, 4],
        mlp_ratios=[2, 2, 2],
        decoder_hidden_size=48,
        hidden_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
        drop_path_rate=0.0,
        **names,
    )


def fit(model, task, images, labels, steps):
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3 if task == "base" else 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, optimizer.param_groups[0]["lr"], steps + 1)
    for _ in tqdm(range(steps), "training"):
        chosen = torch.randint(len(images), (16,))
        pixels = images[chosen]
        if task == "base":
            seen = F.interpolate((torch.rand(16, 1, SIZE // 4, SIZE // 4) < 0.5).float(), scale_factor=4)
            pixels = pixels * seen
        logits = model(pixels).logits
        if task == "segmentation":
            loss = F.cross_entropy(logits, labels[chosen])
        else:
            loss = F.l1_loss(logits.squeeze(1), labels[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def predict(model, scenes, tasks=("segmentation", "depth")):
    """{task: the first four scenes' prediction}, as classes or as depth."""
    pixels = torch.from_numpy(np.stack([scene["pixel_values"] for scene in scenes[:4]]))
    found = {}
    for task in tasks:
        model.set_task(task)
        logits = model(pixel_values=pixels.to(model.device)).logits.cpu()
        found[task] = logits.argmax(1) if task == "segmentation" else logits[:, 0]
    return found


# ---- scores ----------------------------------------------------------------------------------------------------------


def depth_metrics(prediction):
    """Mean absolute error, and relative to the depth."""
    depth = prediction.label_ids.ravel()
    error = np.abs(prediction.predictions.ravel() - depth)
    return {"absolute_error": float(error.mean()), "relative_error": float((error / depth).mean())}


def write(output, scores, predictions, scenes, trainer):
    output.mkdir(parents=True, exist_ok=True)
    names = [("segmentation", name) for name in ("mean_iou", "accuracy")]
    names += [("depth", name) for name in ("absolute_error", "relative_error")]
    rows = {method: [found[task][name] for task, name in names] for method, found in scores.items()}
    rows = {"experts": [scores["tint"][task][f"expert_{name}"] for task, name in names], **rows}
    lines = [f"| | {' | '.join(name.replace('_', ' ') for _, name in names)} |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {method} | {' | '.join(f'{value:.3f}' for value in row)} |" for method, row in rows.items()]
    table = "\n".join(lines)
    print(f"\n{table}\n\nWritten to {output}")
    (output / "table.md").write_text(table + "\n")
    plot_predictions(scenes, predictions, output / "predictions.png")
    plot_coefficients(trainer.model.coefficients(), output / "coefficients.png")
    plot_training(trainer.log_history, trainer.model.tasks, output / "training.png")
    trainer.save_model(output / "adapter", results=scores["tint"])


def plot_predictions(scenes, predictions, path):
    """A row a scene: the image, and of both tasks the truth and the predictions of experts and merges."""
    truth = {task: [scene[task] for scene in scenes[:4]] for task in ("segmentation", "depth")}
    columns = {"truth": truth, **{name: predictions[name] for name in ("experts", "task arithmetic", "tint")}}
    figure = Figure(figsize=(13, 6), layout="constrained")
    grid = figure.subplots(4, 9)
    classes = colormaps["viridis"].resampled(len(CLASSES))
    for row, scene in enumerate(scenes[:4]):
        grid[row, 0].imshow((scene["pixel_values"].transpose(1, 2, 0) + 1) / 2)
        for column, (name, found) in enumerate(columns.items(), 1):
            grid[row, column].imshow(found["segmentation"][row], cmap=classes, vmin=0, vmax=len(CLASSES) - 1)
            grid[row, column + 4].imshow(found["depth"][row], cmap="gray", vmin=0, vmax=1.1)
            grid[0, column].set_title(f"segmentation,\n{name}", fontsize=9)
            grid[0, column + 4].set_title(f"depth,\n{name}", fontsize=9)
    grid[0, 0].set_title("image", fontsize=9)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
