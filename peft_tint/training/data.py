"""Batches with the experts' outputs beside them, computed once and cached with the dataset.

An output is kept as rows, a tensor (rows, classes): one row a sample, one a token that is no padding, or one a pixel.
"""

import torch
from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

EXPERT_ROWS = "expert_rows"
LABELS = ("labels", "label", "label_ids")


def output_of(result) -> torch.Tensor:
    """The tensor of a model's output that a task is about, with one more axis of one class for a depth map."""
    if isinstance(result, torch.Tensor):
        return result
    if "start_logits" in result:  # question answering: two choices among the tokens
        return torch.stack([result["start_logits"], result["end_logits"]], 1)
    if "predicted_depth" in result:
        return result["predicted_depth"].unsqueeze(1)
    if "logits" in result:
        return result["logits"]
    raise ValueError(
        f"The model gives {', '.join(result)}; it must give logits or a tensor. Wrap it in a module of yours."
    )


def to_rows(values: torch.Tensor, attention_mask: torch.Tensor | None) -> tuple[torch.Tensor, list[int]]:
    """Model outputs or labels as rows on the first axis, and the number of rows of each sample.

    Shapes: (batch, classes), or (batch, tokens, classes) of which the attention mask chooses, or
    (batch, classes, height, width).
    """
    if values.ndim == 4:
        values = values.movedim(1, -1).flatten(1, 2)
    if values.ndim == 2:
        return values, [1] * len(values)
    if attention_mask is not None and attention_mask.shape == values.shape[:2]:
        kept = attention_mask.bool()
        return values[kept], kept.sum(1).tolist()
    return values.flatten(0, 1), [values.shape[1]] * len(values)


def label_rows(labels: torch.Tensor, logits: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """Labels in the order of the rows of `logits`: (rows,), or (rows, classes) where each class has one."""
    if logits.ndim == 3 and attention_mask is not None and attention_mask.shape == labels.shape:
        return labels[attention_mask.bool()]
    return labels if labels.shape == logits.shape else labels.flatten()


class Collator:
    """Calls a data collator and adds the experts' rows to what it returns.

    With no collator of the user's, only the columns that the model's forward takes reach the default one.
    """

    def __init__(self, collate, columns: set[str] | None):
        self.collate, self.columns = collate, columns

    def __call__(self, samples: list[dict]) -> dict:
        rows = [sample[EXPERT_ROWS] for sample in samples if EXPERT_ROWS in sample]
        keep = lambda key: key != EXPERT_ROWS and (self.columns is None or key in self.columns)  # noqa: E731
        batch = dict(self.collate([{k: v for k, v in sample.items() if keep(k)} for sample in samples]))
        if rows:
            batch[EXPERT_ROWS] = torch.cat([torch.as_tensor(row) for row in rows])
        return batch


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
