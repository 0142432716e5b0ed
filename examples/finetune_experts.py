"""python examples/finetune_experts.py --model_name_or_path roberta-base --data sst2=FOLDER mrpc=nyu-mll/glue:mrpc \
    --output_dir experts --max_steps 1000 --learning_rate 2e-5 [--lora_r 8]

One expert per task, of texts (one or two columns) or images, with classes or a number as labels: what
run_glue_tint.py and run_vision_tint.py merge. The other flags are those of `transformers.TrainingArguments`, and a JSON
or YAML file may come first. `--data` takes the same sources as there, and uses their training split alone. Without
`--bf16` or `--fp16` it trains in bfloat16 where the device computes that natively, else in float32.
"""

import copy
from dataclasses import dataclass, field
from pathlib import Path

if __name__ == "__main__":
    print("Loading PyTorch and transformers", flush=True)

import numpy as np
import transformers
from _common import (
    accuracy,
    by_task,
    is_vision,
    label_names,
    load_processor,
    load_splits,
    make_collator,
    parse,
    to_inputs,
)
from accelerate import PartialState
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_tint import bf16_is_native


@dataclass
class ExpertArguments:
    """What to fine-tune."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "The base: a Hub id or a folder."})
    data: list[str] | None = field(default=None, metadata={"help": "TASK=SOURCE for each task."})
    lora_r: int = field(default=0, metadata={"help": "Rank of a LoRA adapter on all linear layers; 0: all weights."})
    freeze_embeddings: bool = field(default=False, metadata={"help": "Of a model of texts."})
    max_seq_length: int = field(default=128, metadata={"help": "Longer texts are cut."})

    def __post_init__(self):
        self.data = by_task("data", self.data)


def main():
    args, training = parse(ExpertArguments, TrainingArguments, description=__doc__, defaults={"bf16": None})
    if training.bf16 is None and not training.fp16:
        precision = {"bf16": bf16_is_native(training.device), "use_cpu": training.device.type == "cpu"}
        args, training = parse(ExpertArguments, TrainingArguments, description=__doc__, defaults=precision)
    if not args.model_name_or_path or not args.data:
        raise ValueError("Give `--model_name_or_path` and `--data TASK=SOURCE`.")
    for task in args.data:
        finetune(args, training, task)


def finetune(args, training, task):
    """Saves the task's expert, and the tokenizer or image processor, to the folder `output_dir`/`task`."""
    print(f"fine-tuning the expert of {task}", flush=True)
    splits = load_splits(args.data[task])
    vision, names = is_vision(splits["eval"]), label_names(splits["train"])
    processor = load_processor(args.model_name_or_path, vision)
    set_seed(training.seed)  # of the head
    model_class = AutoModelForImageClassification if vision else AutoModelForSequenceClassification
    labels = dict(enumerate(names)) if names else {0: "value"}
    model = model_class.from_pretrained(
        args.model_name_or_path,
        num_labels=len(labels),
        id2label=labels,
        label2id={name: index for index, name in labels.items()},
        problem_type="single_label_classification" if names else "regression",
        ignore_mismatched_sizes=True,
    )
    if not vision and processor.pad_token is None:  # GPT-2
        processor.pad_token, model.config.pad_token_id = processor.eos_token, processor.eos_token_id
    if args.freeze_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    if args.lora_r:
        saved = {"modules_to_save": ["classifier"]} if vision else {"task_type": "SEQ_CLS"}  # the head
        model = get_peft_model(model, LoraConfig(r=args.lora_r, target_modules="all-linear", **saved))
    training = copy.copy(training)
    training.output_dir, training.remove_unused_columns = str(Path(training.output_dir) / task), False
    if training.push_to_hub:
        training.hub_model_id = f"{training.hub_model_id or Path(args.model_name_or_path).name}-{task}"
    trainer = Trainer(
        model,
        training,
        make_collator(processor, vision),
        to_inputs(splits["train"], processor, args.max_seq_length),
        to_inputs(splits["eval"], processor, args.max_seq_length),
        processing_class=processor,
        compute_metrics=accuracy if names else pearson,
    )
    trainer.train()
    if training.do_eval:
        print(f"{task}: {trainer.evaluate()['eval_score']:.3f}")
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()
    return training.output_dir


def few_steps(folder, steps, **others):
    """The arguments with which the examples fine-tune experts of their own."""
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        lr_scheduler_type="linear",
        bf16=bf16_is_native(),
        use_cpu=PartialState().device.type == "cpu",
        seed=0,
        disable_tqdm=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        **others,
    )


def pearson(prediction):
    return {"score": float(np.corrcoef(prediction.predictions[:, 0], prediction.label_ids)[0, 1])}


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    main()
