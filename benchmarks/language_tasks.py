"""The tasks of `language_model.py`, and a LoRA expert for each.

Each is a classification as generation: after a text and a short prompt the model says the name of the class, of which
the first token counts. The data are TASK/train.parquet and TASK/test.parquet with the columns text and label.
"""

import os

import accelerate
import datasets
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DataCollatorWithPadding, Trainer, TrainingArguments

from peft_tint import bf16_is_native

PROMPTS = {"movies": " Sentiment:", "bbc": " Topic:", "debsection": " Section:", "reuters8": " Subject:"}
MAX_TOKENS = 24  # of text and prompt
# Numbers of samples of a task: the first two are of train, and its expert does not see them
POOL, VALIDATION, TEST = 550, 50, 500


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


def finetune(args, task, data, collator):
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

    Trainer(model, arguments, train_dataset=data, data_collator=collator, compute_loss_func=loss).train()
    model.save_pretrained(folder)
    return folder


def collate(tokenizer, samples):
    """The answer's logits are those of the last token, for padding is on the left."""
    prompts = DataCollatorWithPadding(tokenizer)([{"input_ids": sample["input_ids"]} for sample in samples])
    return {**prompts, "labels": torch.tensor([sample["answer"] for sample in samples]), "logits_to_keep": 1}
