"""Batches of each task, with the expert's outputs beside them where they are computed ahead."""

import inspect
from contextlib import nullcontext
from itertools import count, islice
from uuid import uuid4

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, IterableDatasetShard, SkipBatchSampler
from accelerate.utils import send_to_device
from datasets import Dataset
from datasets.fingerprint import Hasher
from torch.distributed.tensor import DTensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    default_data_collator,
)

from .arguments import TintTrainingArguments
from .data import Collator, WithExpertRows, cache_expert_rows
from .outputs import BY_LABELS, LABELS, OF_LANGUAGE, UNSHIFTED, are_close, takes_any
from .resuming import kept_random_state, random_state
from .rows import Rows
from .shortened import TOP, shorten

MOST_CACHED = 50e6  # bytes of an expert's rows of one dataset


class Batches:
    """Makes batches of `{task: Dataset}`s, by the user's collator or the one that the kind of task wants."""

    def __init__(self, rows: Rows, args: TintTrainingArguments, data_collator, processing_class, precision: str):
        self.rows, self.args, self.accelerator, self.precision = rows, args, rows.accelerator, precision
        self.collate, self.columns = self._choose_collator(data_collator, processing_class)
        is_shifted = type(rows.base).__name__ not in UNSHIFTED
        self.keeps = rows.kind == "causal" and is_shifted and "logits_to_keep" in _parameters(rows.base)
        self._cached = {}  # what decides them -> (config of the adapter, the expert's rows or None)

    def _choose_collator(self, data_collator, processing_class):
        """What makes a batch, and the columns that it gets, None for all: a function of the user's may want others than
        the model."""
        if data_collator is not None and not type(data_collator).__module__.startswith("transformers."):
            return data_collator, None
        takes = _parameters(self.rows.base)
        columns = None if takes_any(self.rows.base, takes) else {*takes} - {"args", "kwargs"}
        if data_collator is not None:
            return data_collator, columns
        if processing_class is None or not hasattr(processing_class, "pad"):
            return default_data_collator, columns
        if self.rows.kind == "seq2seq":
            return DataCollatorForSeq2Seq(processing_class), columns
        pads = DataCollatorForTokenClassification if self.rows.kind in BY_LABELS else DataCollatorWithPadding
        return pads(processing_class), columns

    def collator(self, task: str, labelled: bool, keeps: bool = True) -> Collator:
        """`labelled`: with labels also where they do not say what counts; `keeps`: with logits of no other tokens than
        those that count, where the model can."""
        columns, kind = self.columns, self.rows.kind
        if columns is not None and kind in OF_LANGUAGE:
            columns = columns - {*LABELS} | {"labels"}
        elif columns is not None:
            columns = columns | {*LABELS} if labelled or kind in BY_LABELS else columns - {*LABELS}
        return Collator(task, self.collate, columns, keeps and self.keeps)

    # ---- loaders -----------------------------------------------------------------------------------------------------

    def endless(self, task: str, dataset: Dataset, done: int):
        """Batches without end, with the expert's rows that the objective compares, after the first `done` of them.

        Seed and number of an epoch decide its order. The sampler skips what is done; workers, which have random states
        of their own, have to load it again to come to the same place.
        """
        args, order, device = self.args, torch.Generator(), self.accelerator.device
        if isinstance(dataset, IterableDataset):
            return self._read(task, dataset, done)
        samples = self.with_expert_rows(task, dataset, evaluating=False)
        sampler = BatchSampler(RandomSampler(samples, generator=order), args.per_device_train_batch_size, False)
        if self.accelerator.num_processes > 1:
            sampler = BatchSamplerShard(sampler, self.accelerator.num_processes, self.accelerator.process_index)

        def epochs():
            first, skipped = divmod(done, len(sampler))
            for epoch in count(first):
                order.manual_seed(args.seed + epoch)
                loader = DataLoader(
                    samples,
                    batch_sampler=sampler if args.dataloader_num_workers else SkipBatchSampler(sampler, skipped),
                    generator=order,
                    collate_fn=self.collator(task, labelled=False),
                    num_workers=args.dataloader_num_workers,
                    pin_memory=device.type == "cuda",  # or the GPU would be waited for at each batch
                )
                yield from islice(loader, skipped if args.dataloader_num_workers else 0, None)
                skipped = 0

        return (send_to_device(batch, device, non_blocking=True) for batch in epochs())

    def _read(self, task, dataset, done):
        """Batches of a dataset that is read to its end, again and again, in its own order."""
        if self.accelerator.num_processes > 1:
            size, of = self.args.per_device_train_batch_size, (self.accelerator.num_processes,)
            dataset = IterableDatasetShard(dataset, size, False, *of, self.accelerator.process_index)
        loader = DataLoader(
            dataset,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.collator(task, labelled=False),
            num_workers=self.args.dataloader_num_workers,
            generator=torch.Generator().manual_seed(self.args.seed),
        )

        def epochs():
            for epoch in count():
                if hasattr(dataset, "set_epoch"):  # as those have that shuffle
                    dataset.set_epoch(epoch)
                number = -1
                for number, batch in enumerate(loader):  # noqa: B007
                    yield batch
                if number < 0:
                    raise ValueError(
                        f"Task {task!r}: its dataset gives nothing when it is read for the {epoch + 1}. time. Its "
                        "`__iter__` must begin anew each time."
                    )

        batches = epochs()
        for _ in range(done):  # at once, for it may draw at random, and the random state is set after it
            next(batches)
        return (send_to_device(batch, self.accelerator.device, non_blocking=True) for batch in batches)

    def once(self, task: str, dataset: Dataset, evaluating: bool, keeps: bool = True) -> DataLoader:
        """All of it in its order, with labels to evaluate by or without."""
        return DataLoader(
            self.with_expert_rows(task, dataset, evaluating),
            batch_size=self.args.per_device_eval_batch_size,
            generator=torch.Generator().manual_seed(self.args.seed),  # or it would draw a random number
            collate_fn=self.collator(task, evaluating, keeps),
            num_workers=self.args.dataloader_num_workers,
        )

    def shared(self, task: str, dataset: Dataset, keeps: bool) -> DataLoader:
        """`once` to evaluate by, in which each process has its part."""
        # Accelerate cuts what such a dataset gives to the size of a batch, the numbers of the tokens to keep, too
        keeps = keeps and not isinstance(dataset, IterableDataset)
        loader = self.accelerator.prepare(self.once(task, dataset, True, keeps))
        self.accelerator._dataloaders.remove(loader)  # or every evaluation would leave one there
        return loader

    # ---- rows of the expert ------------------------------------------------------------------------------------------

    def with_expert_rows(self, task: str, dataset: Dataset, evaluating: bool):
        """The dataset, with the expert's rows beside each sample where they are computed ahead."""
        model = self.rows.model.eval()
        if not isinstance(dataset, Dataset):
            if self.args.expert_rows == "cache":
                raise ValueError(
                    f"Task {task!r}: the expert's outputs are cached beside a `datasets.Dataset`, and this is a "
                    f"{type(dataset).__name__}. Leave `expert_rows` out."
                )
            return dataset
        kind = "features" if not evaluating and self.rows.objectives[task].compares == "features" else "logits"
        config, collate = model.peft_config[model.active_adapter], self.collator(task, labelled=evaluating)
        memo = (model.active_adapter, task, kind, evaluating, dataset._fingerprint)
        # `datasets` caches on disk only what came from disk; an adapter may have taken another's name
        if self._cached.get(memo, (None, None))[0] is not config:
            ahead = self._are_ahead(task, dataset, collate, evaluating)
            self._cached[memo] = config, self._compute_all(task, dataset, collate, evaluating, kind) if ahead else None
        rows = self._cached[memo][1]
        return dataset if rows is None else WithExpertRows(dataset, rows)

    def _compute_all(self, task, dataset, collate, evaluating, kind):
        model = self.rows.model
        # processes that have the experts or the base in parts run them together, and keep what they find apart
        sharded = model.peft_config[model.active_adapter].is_sharded
        sharded |= any(isinstance(parameter, DTensor) for parameter in model.parameters())
        expert = uuid4().hex if sharded else model.expert_fingerprint(task)
        shortens = self._shortens(task, evaluating)
        key = [expert, kind, self.precision, shortens, Hasher.hash([collate.collate, collate.columns])]
        size, description = self.args.per_device_eval_batch_size, f"expert {kind} of {task}"

        def compute(samples):
            rows = self._compute(task, collate, evaluating, samples)
            return list(map(shorten, rows)) if shortens else rows

        with model.expert(task), nullcontext() if sharded else self.accelerator.main_process_first():
            return cache_expert_rows(dataset, compute, key, size, description, not sharded, shortens)

    def _shortens(self, task, evaluating):
        """Evaluation counts by all words: the expert's perplexity, too."""
        return self.rows.shortens(task) and not evaluating

    @torch.no_grad()
    def _compute(self, task, collate, evaluating, samples):
        """The rows of each sample by what the model is now."""
        batch = send_to_device(collate(samples), self.accelerator.device)
        compared = self.rows.forward(task, batch, evaluating).compared
        return compared.rows().split(compared.numbers().tolist())

    def _are_ahead(self, task, dataset, collate, evaluating) -> bool:
        """Whether the expert's rows are computed ahead. They may be if a sample has the same input each time, and the
        same rows whatever it is in a batch with."""
        wanted = self.args.expert_rows
        if wanted == "online":
            return False
        number = min(len(dataset), 8, self.args.per_device_eval_batch_size)
        with kept_random_state():
            before = random_state()
            samples, again = (dataset.__getitems__(list(range(number))) for _ in range(2))
            first, second = collate(samples), collate(again)
            is_drawn = random_state() != before or not _are_equal(first, second)
        if is_drawn and wanted == "cache":
            raise ValueError(
                f"Task {task!r}: collator or transforms draw at random, so the expert's outputs cannot be cached: the "
                "model would get other inputs than its expert did. Leave `expert_rows` out."
            )
        if is_drawn or wanted == "cache":
            return not is_drawn
        if self.rows.kind == "span":  # whose classes are the tokens of a batch
            return False
        with self.rows.model.expert(task):
            together = self._compute(task, collate, evaluating, samples)
            if len(together) != number:  # packed into one
                return False
            width = 6 * TOP if self._shortens(task, evaluating) else 4 * together[0].shape[-1]  # bytes
            if sum(map(len, together)) * width / number * len(dataset) > MOST_CACHED:
                return False
            sizes = [_size(collate([sample])) for sample in samples]
            shortest = sizes.index(min(sizes))
            if sizes[shortest] == max(sizes):
                return True  # there is no padding
            [by_itself] = self._compute(task, collate, evaluating, [samples[shortest]])
            return are_close(together[shortest], by_itself)


def _parameters(model):
    return inspect.signature(model.forward).parameters


def _are_equal(batch, other):
    def equal(one, two):
        return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(np.all(one == two))

    names = [name for name in batch if isinstance(batch[name], torch.Tensor | np.ndarray)]
    return batch.keys() == other.keys() and all(equal(batch[name], other[name]) for name in names)


def _size(batch):
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))
