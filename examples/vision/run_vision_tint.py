"""python examples/vision/run_vision_tint.py --model_name_or_path BASE --experts cars=EXPERT pets=EXPERT --data ...
python examples/vision/run_vision_tint.py examples/vision/configs/clip_8.json --output_dir clip_8

Merges experts of image classification into one model, and compares ways to do so. Started by `python` or `accelerate
launch`; a JSON or YAML file of the arguments may come first, whose values the flags replace. Experts are checkpoints of
any model of `AutoModelForImageClassification`. Where the base is a CLIP model, they are CLIP vision models, and each
task's head are the text features of its class names in templates: configs/ has the 8, 14 and 20 tasks of the papers.

Without `--experts` it runs clip_8 if its base can be had from the Hub. Where no Hub can be reached, or with
`--embedded`, it trains a small ConvNeXt and four experts of it itself, on digits of scikit-learn and drawn images.
"""

import json
import os
import string
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)
sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import matplotlib
import numpy as np
import torch
import transformers
from _common import MergeArguments, accuracy, hub_has, label_names, load_processor, load_splits, make_setup, parse, run
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Features
from finetune_experts import ExpertArguments, few_steps, finetune
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    AutoTokenizer,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    ViTImageProcessor,
)
from transformers.modeling_outputs import ImageClassifierOutput

from peft_tint import TintTrainingArguments

CLIP_8 = Path(__file__).parent / "configs" / "clip_8.json"
# What few minutes want
FEW_MINUTES = {"transform": "tsv", "adamerging_steps": 250}
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_tint" / "vision"


@dataclass
class VisionArguments(MergeArguments):
    templates: list[str] | None = field(
        default=None, metadata={"help": "CLIP: texts with {} for the class; in a file also {task: texts}."}
    )
    class_names: list[str] | None = field(
        default=None, metadata={"help": "CLIP, in a file: {task: names}; by default those of the data."}
    )
    finetune_steps: float = field(default=1.0, metadata={"help": "Factor on the embedded models' training."})
    cache_dir: str = field(default=str(CACHE), metadata={"help": "Where the embedded base and experts are kept."})


def main():
    args, training = parse(VisionArguments, TintTrainingArguments, description=__doc__)
    if not args.experts:
        if args.embedded or not hub_has("openai/clip-vit-base-patch32"):
            args, training = parse(VisionArguments, TintTrainingArguments, description=__doc__, defaults=FEW_MINUTES)
            use_embedded(args)
        else:
            defaults = json.loads(CLIP_8.read_text())
            args, training = parse(VisionArguments, TintTrainingArguments, description=__doc__, defaults=defaults)
    if not args.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: the base model that the experts were fine-tuned from.")
    for task in set(args.experts) - set(args.data):
        raise ValueError(f"The task {task!r} has no data; give `--data {task}=SOURCE`.")
    processor, model_class = (
        load_processor(args.processor_name or args.model_name_or_path, vision=True),
        AutoModelForImageClassification,
    )
    if AutoConfig.from_pretrained(args.model_name_or_path).model_type == "clip":
        model_class = ClipForZeroShot
        with PartialState().main_process_first():
            use_clip(args, Path(training.output_dir) / "zero_shot")

    def load_base():
        return model_class.from_pretrained(args.model_name_or_path)

    run(args, training, make_setup(args, load_base, processor, lambda task, is_regression: accuracy))


# ---- CLIP ------------------------------------------------------------------------------------------------------------


class ClipForZeroShot(CLIPForImageClassification):
    """CLIP's image encoder, its projection, and a linear head of text features times the logit scale."""

    def __init__(self, config):
        super().__init__(config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.classifier = nn.Linear(config.projection_dim, config.num_labels, bias=False)

    def forward(self, pixel_values):
        features = self.visual_projection(self.vision_model(pixel_values).pooler_output)
        return ImageClassifierOutput(logits=self.classifier(F.normalize(features, dim=-1)))


@torch.no_grad()
def use_clip(args, folder):
    """Puts a head onto each expert, and names the folders of these and of the base in the place of what was given."""
    clip = CLIPModel.from_pretrained(args.model_name_or_path).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    sources, experts = {"base": None, **args.experts}, {}
    for task, source in sources.items():
        experts[task] = str(folder / task)
        if (folder / task / "config.json").exists():
            continue
        names = ["a", "b"] if source is None else class_names(args, task)
        clip.config.id2label = dict(enumerate(names))
        clip.config.label2id = {name: index for index, name in enumerate(names)}
        model = ClipForZeroShot(clip.config)
        vision = clip.vision_model if source is None else CLIPVisionModel.from_pretrained(source)
        model.vision_model.load_state_dict(vision.state_dict())
        model.visual_projection.load_state_dict(clip.visual_projection.state_dict())
        templates = args.templates.get(task) if isinstance(args.templates, dict) else args.templates
        model.classifier.weight.copy_(zero_shot_head(clip, tokenizer, names, templates or ["a photo of a {}."]))
        model.save_pretrained(folder / task)
    args.model_name_or_path, args.experts = experts.pop("base"), experts


def class_names(args, task):
    names = (args.class_names or {}).get(task) or label_names(load_splits(args.data[task])["eval"])
    return [name.replace("_", " ") for name in names]


def zero_shot_head(clip, tokenizer, names, templates):
    """The mean of the normalised text features over the templates, normalised: (classes, features)."""
    rows = []
    for name in names:
        texts = tokenizer([text.format(name) for text in templates], padding=True, return_tensors="pt")
        features = F.normalize(clip.get_text_features(**texts).pooler_output, dim=-1)
        rows.append(F.normalize(features.mean(0), dim=0))
    return torch.stack(rows) * clip.logit_scale.exp()


# ---- without the Hub -------------------------------------------------------------------------------------------------

SIZE = 32
SHAPES = ("circle", "square", "triangle", "cross", "ring", "star")
PATTERNS = ("rows", "columns", "diagonals", "checks", "dots", "noise")
STEPS = {"base": 300, "digits": 100, "letters": 100, "shapes": 100, "patterns": 100}


def use_embedded(args):
    """Names base, data and experts that this machine has: they are made in the first run and kept in the cache."""
    torch.set_num_threads(max(1, os.cpu_count() // 2))  # so small a model gains little from more
    cache, steps = Path(args.cache_dir), {task: max(1, int(n * args.finetune_steps)) for task, n in STEPS.items()}
    start, data = cache / "start", {task: str(make_data(task, cache / "data" / task)) for task in STEPS}
    if not start.exists():
        torch.manual_seed(0)
        sizes = {"hidden_sizes": [64, 128], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
        config = ConvNextConfig(image_size=SIZE, layer_scale_init_value=1.0, initializer_range=0.05, **sizes)
        ConvNextForImageClassification(config).save_pretrained(start)
        ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(start)
    folders, base = {}, str(start)
    for task in STEPS:
        parent = cache / f"{steps['base']}-{steps[task]}"
        folders[task] = str(parent / task)
        if not (parent / task / "config.json").exists():
            if PartialState().num_processes > 1:
                raise ValueError("The experts are not there yet. Run the example once by `python`, which makes them.")
            more = {"per_device_train_batch_size": 64, "learning_rate": 3e-3 if task == "base" else 1e-3}
            training = few_steps(parent, steps[task], warmup_steps=min(30, steps[task]), **more)
            finetune(ExpertArguments(base, data), training, task)
        base = folders["base"]
    args.model_name_or_path, args.data, args.experts = folders.pop("base"), data, folders


def make_data(task, folder):
    """Handwritten digits; letters, shapes and patterns as drawn here. The base learns other letters."""
    if folder.exists():
        return folder
    random = np.random.default_rng(list(STEPS).index(task))
    if task == "digits":
        digits = load_digits()
        images = [np.uint8(image * 15.9) for image in digits.images]
        images = [Image.fromarray(image).resize((SIZE, SIZE), Image.BILINEAR).convert("RGB") for image in images]
        labels, names = digits.target.tolist(), list(string.digits)
    else:
        names = {"base": list(string.ascii_lowercase), "letters": list("ABDEGHKMRS"), "shapes": SHAPES}.get(
            task, PATTERNS
        )
        labels = random.integers(len(names), size=4000 if task == "base" else 2000).tolist()
        images = [draw(task, names[label], random) for label in labels]
    columns = Features({"image": datasets.Image(), "label": ClassLabel(names=list(names))})
    rows = Dataset.from_dict({"image": images, "label": labels}, columns)
    DatasetDict(rows.train_test_split(0.4, seed=0)).save_to_disk(folder)
    return folder


def draw(task, name, random):
    """An image of one thing, turned and moved a little, of a light colour on a dark one, with noise."""
    back, front = random.integers(0, 80, 3), random.integers(150, 256, 3)
    mask = Image.new("L", (SIZE, SIZE))
    pen = ImageDraw.Draw(mask)
    if task in ("base", "letters"):
        face = random.choice(["Sans", "Sans-Bold", "Serif", "SansMono", "Sans-Oblique"])
        file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVu{face}.ttf")
        pen.text((16, 16), name, 255, ImageFont.truetype(str(file), int(random.integers(22, 27))), anchor="mm")
    elif task == "shapes":
        draw_shape(pen, name, random.integers(7, 13))
    else:
        mask = Image.fromarray(np.uint8(255 * pattern(name, random)))
    if task != "patterns":
        shift = tuple(random.integers(-2, 3, 2).tolist())
        mask = mask.rotate(random.uniform(-12, 12), Image.BILINEAR, translate=shift)
    share = np.asarray(mask)[..., None] / 255
    pixels = share * front + (1 - share) * back + random.normal(0, 12, (SIZE, SIZE, 3))
    return Image.fromarray(np.uint8(pixels.clip(0, 255)))


def draw_shape(pen, name, r):
    c = SIZE / 2
    if name == "circle":
        pen.ellipse((c - r, c - r, c + r, c + r), 255)
    elif name == "square":
        pen.rectangle((c - r, c - r, c + r, c + r), 255)
    elif name == "triangle":
        pen.polygon([(c, c - r), (c - r, c + r), (c + r, c + r)], 255)
    elif name == "cross":
        pen.rectangle((c - r, c - 2, c + r, c + 2), 255)
        pen.rectangle((c - 2, c - r, c + 2, c + r), 255)
    elif name == "ring":
        pen.ellipse((c - r, c - r, c + r, c + r), outline=255, width=3)
    else:
        angles = np.pi * np.arange(10) / 5
        radii = np.where(np.arange(10) % 2, 0.4 * r, 1.2 * r)
        pen.polygon(list(zip(c + radii * np.sin(angles), c - radii * np.cos(angles), strict=True)), 255)


def pattern(name, random):
    """(SIZE, SIZE), True where the front colour is."""
    period, phase = random.integers(4, 9), random.integers(0, 8, 2)
    y, x = np.mgrid[:SIZE, :SIZE] + phase[:, None, None]
    rows, columns = y % period < period / 2, x % period < period / 2
    return {
        "rows": rows,
        "columns": columns,
        "diagonals": (x + y) % period < period / 2,
        "checks": rows ^ columns,
        "dots": rows & columns,
        "noise": random.random((SIZE, SIZE)) < 0.4,
    }[name]


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
