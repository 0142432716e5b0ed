"""Batches with the experts' outputs beside them, computed once and cached with the dataset.

An output is kept as rows, a tensor (rows, classes), see `outputs`.
"""

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher
from transformers import default_data_collator

from .outputs import IGNORED, LABELS

EXPERT_ROWS = "expert_rows"
COMMON = {"input_ids", "pixel_values", "input_values", "input_features"}


class Collator:
    """Calls a data collator on samples of a task, and adds the experts' rows to what it returns.

    `columns` are those that reach the collator, None for all. With `keeps`, a causal language model computes the logits
    at no other tokens than those that some sample has a label for (`logits_to_keep`).
    """

    def __init__(self, task: str, collate, columns: set[str] | None, keeps: bool = False):
        self.task, self.collate, self.columns, self.keeps = task, collate, columns, keeps

    def __call__(self, samples: list[dict]) -> dict:
        rows = [sample[EXPERT_ROWS] for sample in samples if EXPERT_ROWS in sample]
        keep = lambda key: key != EXPERT_ROWS and (self.columns is None or key in self.columns)  # noqa: E731
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
            rows = [torch.as_tensor(row) for row in rows if len(row)]  # a sample of which nothing counts has none
            batch[EXPERT_ROWS] = torch.cat(rows) if rows else torch.zeros(0, 1)
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


class WithExpertRows(torch.utils.data.Dataset):
    """A dataset with the expert's rows as one more column, beside any format or transform that it has."""

    def __init__(self, dataset: Dataset, expert_rows: Dataset):
        self.dataset, self.expert_rows = dataset, expert_rows.with_format("numpy")

    def __len__(self):
        return len(self.dataset)

    def __getitems__(self, indices):
        samples = self.dataset.__getitems__(indices)
        rows = self.expert_rows[indices][EXPERT_ROWS]
        return [{**sample, EXPERT_ROWS: row} for sample, row in zip(samples, rows, strict=True)]


def cache_expert_rows(
    dataset: Dataset, compute, key, batch_size: int, description: str, use_cache: bool = True
) -> Dataset:
    """The expert's rows of every sample, as a dataset with one column.

    `compute(samples)` returns a list of tensors (rows, classes). `key` is all that decides the result beside the
    dataset; where the dataset has a cache file, so has the result, and a second call with the same key reads it.
    """

    def rows_of(batch):
        samples = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return {EXPERT_ROWS: [rows.float().cpu().numpy() for rows in compute(samples)]}

    return dataset.map(
        rows_of,
        batched=True,
        batch_size=batch_size,
        remove_columns=dataset.column_names,
        features=Features({EXPERT_ROWS: List(List(Value("float32")))}),
        new_fingerprint=Hasher.hash([dataset._fingerprint, key]),
        load_from_cache_file=use_cache,
        desc=description,
    )
