"""What datasets may be, and batches of them with the experts' outputs beside them, computed once and cached with the
dataset.

An output is kept as rows, a tensor (rows, classes), see `outputs`.
"""

from collections.abc import Mapping, Sized

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from torch.utils.data import IterableDataset
from transformers import default_data_collator

from .outputs import IGNORED, LABELS
from .shortened import Shortened

EXPERT_ROWS, EXPERT_CLASSES = "expert_rows", "expert_classes"  # the latter with rows that are shortened
COMMON = {"input_ids", "pixel_values", "input_values", "input_features"}


def by_task(name: str, datasets, tasks: list[str]) -> dict | None:
    """{task: dataset}, whose only task need not be named. Raises ValueError for what is none, or of no task."""
    if isinstance(datasets, torch.utils.data.Dataset | Dataset) and len(tasks) == 1:
        datasets = {tasks[0]: datasets}
    if not isinstance(datasets, dict | None):
        raise ValueError(
            f"`{name}` is a {type(datasets).__name__}; give {{task: Dataset}} for the model's tasks, which are "
            f"{', '.join(map(repr, tasks))}. Of a list a Dataset is made by `Dataset.from_list`."
        )
    for task, dataset in (datasets or {}).items():
        if task not in tasks:
            known = ", ".join(map(repr, tasks))
            raise ValueError(f"`{name}` has the task {task!r}, which the model does not have. Its tasks: {known}.")
        if not isinstance(dataset, torch.utils.data.Dataset | Dataset):
            raise ValueError(
                f"`{name}[{task!r}]` is a {type(dataset).__name__}; it must be a `datasets.Dataset`, or a dataset of "
                "PyTorch's. For a stream, call `trainer.step(task, batch)`."
            )
        if length_of(dataset) == 0:
            raise ValueError(f"`{name}[{task!r}]` is empty; leave the task out or give it samples.")
    return datasets


def length_of(dataset) -> int | None:
    """None for one that is read to its end, whose length, if it says one, may be a guess."""
    is_read = isinstance(getattr(dataset, "dataset", dataset), IterableDataset)  # a loader's
    return len(dataset) if isinstance(dataset, Sized) and not is_read else None


class Collator:
    """Calls a data collator on samples of a task, and adds the experts' rows to what it returns.

    `columns` are those that reach the collator, None for all. With `keeps`, a causal language model computes the logits
    at no other tokens than those that some sample has a label for (`logits_to_keep`).
    """

    def __init__(self, task: str, collate, columns: set[str] | None, keeps: bool = False):
        self.task, self.collate, self.columns, self.keeps = task, collate, columns, keeps

    def __call__(self, samples: list[dict]) -> dict:
        if not isinstance(samples[0], Mapping):
            raise ValueError(
                f"Task {self.task!r}: its samples are of the type {type(samples[0]).__name__}; they must be dicts of "
                "what the model's forward takes."
            )
        ahead = [key for key in (EXPERT_ROWS, EXPERT_CLASSES) if key in samples[0]]
        rows = [_joined([sample[key] for sample in samples]) for key in ahead]
        keep = lambda key: key not in ahead and (self.columns is None or key in self.columns)  # noqa: E731
        kept = [{k: v for k, v in sample.items() if keep(k)} for sample in samples]
        if self.columns is not None and not kept[0].keys() - {*LABELS}:
            raise ValueError(
                f"Task {self.task!r}: its samples have {', '.join(map(repr, samples[0]))}, and none of what the model "
                f"takes, such as {', '.join(sorted(self.columns & COMMON)) or sorted(self.columns)[0]}. Tokenize texts "
                "by `dataset.map(lambda rows: tokenizer(rows[...]), batched=True)`, or give a `data_collator`."
            )
        try:
            batch = {name: value for name, value in dict(self.collate(kept)).items() if value is not None}
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(self._reason(kept, error)) from error
        if self.keeps and isinstance(batch.get("labels"), torch.Tensor) and batch["labels"].ndim == 2:
            batch.setdefault("logits_to_keep", (batch["labels"][:, 1:] != IGNORED).any(0).nonzero().flatten())
        if rows:
            # `datasets` gives them in 32 and 64 bits
            batch[EXPERT_ROWS] = Shortened(rows[0].half(), rows[1].int()) if len(rows) > 1 else rows[0]
        return batch

    def _reason(self, samples, error):
        for name in samples[0]:
            values = [sample.get(name) for sample in samples]
            for value in values:
                if value is None or isinstance(value, str):
                    return (
                        f"Task {self.task!r}: {name!r} has {value!r}, of which no tensor can be made; remove or map it."
                    )
            sizes = {np.shape(value) for value in values}
            if self.collate is default_data_collator and len(sizes) > 1:
                return (
                    f"Task {self.task!r}: {name!r} has samples of the shapes {min(sizes)} and {max(sizes)}. Give a "
                    "tokenizer as `processing_class`, which pads them, or a `data_collator` that does."
                )
        return f"Task {self.task!r}: the collator fails on the columns {', '.join(map(repr, samples[0]))}: {error}"


def _joined(rows):
    rows = [torch.as_tensor(row) for row in rows if len(row)]  # a sample of which nothing counts has none
    return torch.cat(rows) if rows else torch.zeros(0, 1)


class WithExpertRows(torch.utils.data.Dataset):
    """A dataset with the expert's rows as further columns, beside any format or transform that it has."""

    def __init__(self, dataset: Dataset, expert_rows: Dataset):
        self.dataset, self.expert_rows = dataset, expert_rows.with_format("numpy")

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        samples = self.dataset.__getitems__(indices)
        rows = self.expert_rows[indices]
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        return [sample | own for sample, own in zip(samples, rows, strict=True)]


def cache_expert_rows(
    dataset: Dataset, compute, key, batch_size: int, description: str, use_cache: bool = True, shortens: bool = False
) -> Dataset:
    """The expert's rows of every sample, as a dataset of their columns.

    `compute(samples)` returns a list of tensors (rows, classes), or, if it `shortens`, of `Shortened`. `key` is all
    that decides the result beside the dataset; where the dataset has a cache file, so has the result, and a second call
    with the same key reads it.
    """

    def rows_of(batch):
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = compute(samples)
        columns = zip(*found, strict=True) if shortens else [[rows.float() for rows in found]]
        return {name: [rows.cpu().numpy() for rows in own] for name, own in zip(types, columns, strict=True)}

    types = {EXPERT_ROWS: "float16", EXPERT_CLASSES: "int32"} if shortens else {EXPERT_ROWS: "float32"}
    return dataset.map(
        rows_of,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=Features({name: List(List(Value(kind))) for name, kind in types.items()}),
        new_fingerprint=Hasher.hash([dataset._fingerprint, key]),
        load_from_cache_file=use_cache,
        desc=description,
    )
