"""Prompts and answers of a language model, as tokens.

Data are chats (`messages`, the last of which is the answer), or `prompt` and `completion`, which are texts or chats, or
texts with a `label`: its name is the answer, after a line with the task's name.
"""

import torch
from _common import STRINGS, label_names
from transformers import AutoTokenizer

IGNORED = -100  # the label of what is no answer


def load_tokenizer(source):
    tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")  # so that answers end together
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def to_rows(split, tokenizer, task, max_length, labelled=True):
    """`input_ids` of prompt and answer, and `labels`, which are those of the answer and -100 elsewhere.

    Without `labelled` no label is read: the names of the labels take turns as answers, and all that is used of them is
    where they stand. The expert is asked for the token there, and for the one after it."""
    names = label_names(split) if "label" in split.column_names else None
    texts = [name for name, feature in split.features.items() if getattr(feature, "dtype", None) in STRINGS]
    end = tokenizer.eos_token_id

    def encode(row, index):
        if names:
            answer = names[row["label"] if labelled else index % len(names)]
            row = {"prompt": "\n".join([*(row[name] for name in texts), f"{task}:"]), "completion": f" {answer}"}
        prompt, answer = read(row, tokenizer)
        answer = [*(answer[: answer.index(end)] if end in answer else answer), end][: max_length // 2]
        prompt = prompt[len(answer) - max_length :]
        return {"input_ids": prompt + answer, "labels": [IGNORED] * len(prompt) + answer}

    return split.map(encode, with_indices=True, remove_columns=split.column_names)


def read(row, tokenizer):
    """The tokens of the prompt and of the answer."""
    prompt, answer = row.get("prompt"), row.get("completion")
    if "messages" in row:
        prompt, answer = row["messages"][:-1], row["messages"][-1:]
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"], tokenizer(answer, add_special_tokens=False)["input_ids"]
    start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
    if answer[-1]["role"] != "assistant" or not whole.startswith(start):
        raise ValueError(f"A chat must end with a message of the assistant, and by the template, too: {whole!r}.")
    return tokenizer([start, whole.removeprefix(start)], add_special_tokens=False)["input_ids"]


def collate_answers(samples, collate):
    """A batch in which labels, and by `logits_to_keep` the logits, are of its last tokens alone, where answers are."""
    batch = collate([{name: sample[name] for name in ("input_ids", "labels")} for sample in samples])
    count = int((batch["labels"] != IGNORED).any(0).sum()) + 1  # and the token before
    # as a tensor, since the logits of a slice take a product of matrices for each sample
    return {**batch, "labels": batch["labels"][:, -count:], "logits_to_keep": torch.arange(-count, 0)}


def split_row(row):
    """The tokens of the prompt, and of the answer."""
    count = sum(label != IGNORED for label in row["labels"])
    return row["input_ids"][:-count], row["input_ids"][-count:]
