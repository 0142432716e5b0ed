"""Trains coefficients and tint layers at test time, on unlabelled data with the experts' pseudo-labels."""

import inspect
import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import count, islice
from typing import NamedTuple
from uuid import uuid4

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from accelerate.utils import DistributedType, broadcast, gather_object, send_to_device, set_seed
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import get_peft_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding, EvalPrediction, default_data_collator, get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import TrainOutput

from .._card import FILE, read_card, save_card
from ..checkpoints import added_files, new_folder
from ..evaluation import NormalizedAccuracy
from ..hub import push_adapters
from .arguments import DECISIVE, DECISIVE_OF_MODEL, TintTrainingArguments
from .collapse import CollapseGuard, Snapshot, Window
from .data import EXPERT_ROWS, LABELS, Collator, WithExpertRows, cache_expert_rows, label_rows, output_of, to_rows
from .objectives import OBJECTIVES, confident_mask, confident_pseudo_label, entropy, feature_l1
from .precision import choose_autocast, describe_precision
from .resuming import (
    check_output_dir,
    find_checkpoint,
    random_state,
    read_state,
    remove_old_checkpoints,
    set_random_state,
    write_state,
)


class TintTrainer:
    """Test-time training of a TINT model (Model Tinting, https://arxiv.org/abs/2412.19098), driven by Accelerate.

    The model stays in evaluation mode throughout, so dropout is off and running statistics stand still. The experts'
    outputs are computed once, before the first update. Labels in the training data are not used.

    Under several processes (`accelerate launch`) the loss is that of the processes' batches taken as one, so it is the
    same training as in one process with as large a batch. The end of an epoch is filled up with samples from its start.

    Args:
        model: what `get_peft_model(base, TintConfig(...))` returned.
        args: the training arguments.
        train_dataset: {task: Dataset}, for all tasks or some of them, in the columns that the model's forward takes;
            None for a stream (`step`).
        eval_dataset: {task: Dataset}; with labels (a column `label` or `labels`) it gives accuracies.
        objective: a name in `OBJECTIVES` or a function `(logits, expert_logits, mask) -> loss` on rows of shape
            (rows, classes). Regression tasks take the mean absolute difference to the expert whatever it says.
        data_collator: makes a batch of a list of samples; default: padding by `processing_class`, else stacking.
        processing_class: a tokenizer, image processor or other, saved with the model.
        compute_metrics: `EvalPrediction -> {name: number}`, or {task: such a function}. Default: accuracy.
        callbacks: functions `(trainer, logs)`, called with each entry of the log.

    Raises ValueError for a model without TINT, a task that the model does not have, an empty dataset, an unknown
    objective, and where Accelerate is configured to shard the model.
    """

    def __init__(
        self,
        model,
        args: TintTrainingArguments | None = None,
        train_dataset: dict[str, Dataset] | None = None,
        eval_dataset: dict[str, Dataset] | None = None,
        objective="soft_pseudo_label",
        data_collator=None,
        processing_class=None,
        compute_metrics=None,
        callbacks=(),
    ):
        if not hasattr(model, "tasks"):
            raise ValueError(
                f"`model` is a {type(model).__name__} without a TINT adapter; give what "
                "`get_peft_model(base, TintConfig(...))` returns."
            )
        self.model, self.args = model, args or TintTrainingArguments()
        self.train_dataset = self._check_datasets("train_dataset", train_dataset)
        self.eval_dataset = self._check_datasets("eval_dataset", eval_dataset)
        self.objective = self._check_objective(objective)
        if self.args.collapse_guard is not None and not any(map(self._compares_classes, train_dataset or model.tasks)):
            raise ValueError(
                f"`collapse_guard` is {self.args.collapse_guard}, and there are no predicted classes to compare with "
                "the experts': tasks are regression or multi-label, or the objective is 'feature_l1'. Leave it out."
            )
        self.processing_class, self.compute_metrics, self.callbacks = processing_class, compute_metrics, callbacks
        self.log_history: list[dict] = []
        self.accelerator = Accelerator(
            log_with=None if self.args.report_to == "none" else self.args.report_to,
            project_dir=self.args.output_dir,
        )
        kind = self.accelerator.distributed_type
        if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"Accelerate is configured for {kind.value}, which would shard what trains. Launch it with plain data "
                "parallelism (`--multi_gpu`); `TintConfig(shard_task_vectors=True)` shards the task vectors, and "
                "PyTorch's `fully_shard(model, ignored_params=the trainable parameters)` the base."
            )
        self.model.to(self.accelerator.device)
        # Accelerate has one precision for a process, and trainers may differ in it: autocast and scaler are ours
        self._autocast = choose_autocast(self.args, self.accelerator, model)
        self.precision = describe_precision(self._autocast, model)
        self.accelerator.scaler = None
        if self._autocast is torch.float16:
            self.accelerator.scaler = torch.amp.GradScaler(self.accelerator.device.type)
        self._collate = self._make_collator(data_collator)
        unlabelled = None if self._collate.columns is None else self._collate.columns - set(LABELS)
        self._collate_unlabelled = Collator(self._collate.collate, unlabelled)
        self._optimizer, self._checkpointed = None, []
        self._cached = {}

    def _check_datasets(self, name, datasets):
        if not isinstance(datasets, dict | None):
            raise ValueError(f"`{name}` is a {type(datasets).__name__}; it must be {{task: Dataset}}.")
        for task, dataset in (datasets or {}).items():
            if task not in self.model.tasks:
                known = ", ".join(map(repr, self.model.tasks))
                raise ValueError(f"`{name}` has the task {task!r}, which the model does not have. Its tasks: {known}.")
            if not isinstance(dataset, Dataset):
                raise ValueError(
                    f"`{name}[{task!r}]` is a {type(dataset).__name__}; it must be a `datasets.Dataset`. "
                    "For a stream, call `trainer.step(task, batch)`."
                )
            if len(dataset) == 0:
                raise ValueError(f"`{name}[{task!r}]` is empty; leave the task out or give it samples.")
        return datasets

    def _check_objective(self, objective):
        if callable(objective):
            return objective
        if objective not in OBJECTIVES:
            raise ValueError(f"There is no objective {objective!r}; the objectives are {', '.join(OBJECTIVES)}.")
        for task in self.train_dataset or {}:
            self._objective_of(task, OBJECTIVES[objective])
        if objective == "feature_l1" and not self.model.head_layers:
            raise ValueError("'feature_l1' compares the inputs of the head, and this model has no head.")
        return OBJECTIVES[objective]

    def _objective_of(self, task, objective):
        """Regression has no classes to agree on, so it takes the difference to the expert's output."""
        problem = self._problem_type(task)
        if problem == "multi_label_classification" and objective in set(OBJECTIVES.values()) - {feature_l1}:
            raise ValueError(
                f"The task {task!r} is multi-label; {objective.__name__!r} would take its labels for alternatives. Use "
                "'feature_l1' or a function of your own."
            )
        return feature_l1 if problem == "regression" else objective

    def _problem_type(self, task):
        labels = self.model.task_labels(task)
        regression = not labels.get("problem_type") and len(labels.get("id2label") or "ab") == 1
        return "regression" if regression else labels.get("problem_type")

    def _make_collator(self, data_collator):
        if data_collator is not None:
            return Collator(data_collator, None)
        forward = self.model.get_base_model().forward
        columns = {*inspect.signature(forward).parameters, *LABELS} - {"args", "kwargs"}
        pads = self.processing_class is not None and hasattr(self.processing_class, "pad")
        collate = DataCollatorWithPadding(self.processing_class) if pads else default_data_collator
        return Collator(collate, columns)

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> TrainOutput:
        """Trains for `max_steps`; the result is in the model. Returns steps, mean loss and run time.

        From a checkpoint (a folder, or True for the last in `output_dir`) training goes on to bitwise the result that
        it would have had without a stop, on the same machine. Processes read it from one disk. Raises ValueError where
        there is none or it is not whole, and where model, objective, arguments or the sizes of the data differ from
        those that it is of.
        """
        if not self.train_dataset:
            raise ValueError("`train_dataset` is missing; give {task: unlabelled Dataset}.")
        if self.args.eval_steps and not self.eval_dataset:
            raise ValueError("`eval_steps` is set but `eval_dataset` is missing; give {task: Dataset}.")
        args, started, before = self.args, time.perf_counter(), self.model.task
        checkpoint = find_checkpoint(resume_from_checkpoint, args.output_dir)
        saved = self._read_checkpoint(checkpoint) if checkpoint else None
        if args.save_steps:
            check_output_dir(args.output_dir, saved[1]["step"] if saved else 0)
            get_peft_model_state_dict(self.model, save_embedding_layers=False)  # raises if the adapter cannot be saved
        set_seed(args.seed)
        self._prepare()
        if not self._is_quiet():
            tasks = ", ".join(self.train_dataset)
            print(f"Training {tasks} on {self.accelerator.device} in {self.precision}", file=sys.stderr, flush=True)
        try:
            if args.report_to != "none":
                scalars = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
                self.accelerator.init_trackers("peft_tint", {**scalars, "precision": self.precision})
            self._train(saved)
        finally:
            self._finish()
            self.model.set_task(before)
        loss = self._progress.loss / max(self._progress.batches, 1)
        metrics = {"train_runtime": time.perf_counter() - started, "train_loss": loss}
        return TrainOutput(self._progress.step, loss, metrics)

    def _train(self, saved):
        """The loop."""
        args, progress = self.args, self._progress
        if saved:
            self._load_state(*saved[:2])
        done = progress.step * args.gradient_accumulation_steps  # batches of each task
        batches = {task: self._batches(task, dataset, done) for task, dataset in self.train_dataset.items()}
        scheduler = get_scheduler(
            args.lr_scheduler_type, self._optimizer, 0, args.max_steps, {"last_epoch": progress.step - 1}
        )
        if saved:
            set_random_state(saved[2][self.accelerator.process_index])  # last, for what was before may have drawn
        else:
            if args.load_best_model_at_end:
                self._evaluate_state()
            with self.model.reuse_merged_weights():
                self._fit_heads()
        bar = self._bar("tinting", range(progress.step + 1, args.max_steps + 1))
        for step in bar:
            progress.step, last = step, step == args.max_steps
            tasks = [list(batches)[i] for i in torch.randperm(len(batches), generator=progress.order)]
            for group in [tasks] if args.update == "joint" else [[task] for task in tasks]:
                passes = [task for task in group for _ in range(args.gradient_accumulation_steps)]
                # the guard's forwards by the start's coefficients would be kept beside
                reuses = len(passes) > 1 and progress.guard is None
                with self.model.reuse_merged_weights() if reuses else nullcontext():
                    for task in passes:
                        self._backward(task, next(batches[task]), args.gradient_accumulation_steps)
                self._update()
            with warnings.catch_warnings():  # of steps without an update, for which nothing was to learn
                warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                scheduler.step()
            if step % args.logging_steps == 0 or last:
                bar.set_postfix(progress.window.fetch().summary())
                progress.collapsed = self._end_window()
            if progress.collapsed:
                break
            if args.eval_steps and (step % args.eval_steps == 0 or last):
                self._evaluate_state()
            if args.save_steps and (step % args.save_steps == 0 or last):
                self._save_checkpoint()
        if args.load_best_model_at_end:
            best = progress.best
            self._log({"step": progress.step, "best_step": best.step, f"best_{args.metric_for_best_model}": best.value})
            self._set_parameters(best.parameters)

    def _fit_heads(self):
        """Linear probing before fine-tuning (https://arxiv.org/abs/2202.10054): fits each task's head by the objective
        to the features that the merged model has at the start. Each process does all of it."""
        heads, losses = [layer for layer in self.model.head_layers if layer in self.model.tint_layers], []
        if not (self.args.head_steps and heads):
            return
        for task, dataset in self.train_dataset.items():
            objective, head = self._objective_of(task, self.objective), heads[-1]
            if objective is entropy:
                continue
            self.model.set_task(task)
            features, expert_rows = self._features(head, task, dataset)
            if features is None:
                continue
            parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
            optimizer = torch.optim.Adam(parameters, self._optimizer.param_groups[0]["initial_lr"])
            scheduler = get_scheduler("cosine", optimizer, 0, self.args.head_steps)
            for _ in self._bar(f"fitting the head of {task}", range(self.args.head_steps), leave=False):
                loss = objective(head(features), expert_rows, None)
                loss.backward()
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad(set_to_none=True)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of the head of task {task!r} is {loss.item()}. Check its data for NaN, use a model in "
                    "float32 (with `bf16=True`), or lower `learning_rate`."
                )
            losses.append(loss.item())
            _set({parameter: broadcast(parameter.data) for parameter in parameters})  # rounded alike in all processes
        if losses:
            self._log({"step": 0, "head_loss": float(np.mean(losses))})

    @torch.no_grad()
    def _features(self, head, task, dataset):
        """What a task's head gets, of shape (samples, features), and the expert's rows; (None, None) where it gets more
        than one vector a sample, or its output is not that of the model."""
        found, expert_rows = [], []
        samples = WithExpertRows(dataset, self._expert_rows(task, dataset, logits=False))
        loader = DataLoader(
            samples,
            batch_size=self.args.per_device_eval_batch_size,
            generator=torch.Generator(),  # or it would draw a random number
            collate_fn=self._collate_unlabelled,
            num_workers=self.args.dataloader_num_workers,
        )
        hook = head.register_forward_hook(lambda module, args, output: found.append((*args, output)))
        try:
            for batch in self._bar(f"features of {task}", loader, leave=False):
                batch = send_to_device(batch, self.accelerator.device)
                expert_rows.append(batch[EXPERT_ROWS])
                compared = self._forward(batch).compared[0]
                axes = [getattr(value, "ndim", None) for value in found[-1]] if found else None
                if len(found) != len(expert_rows) or axes != [2, 2] or not torch.equal(found[-1][1].float(), compared):
                    return None, None
        finally:
            hook.remove()
        dtype = next(head.parameters()).dtype
        return torch.cat([features.to(dtype) for features, _ in found]), torch.cat(expert_rows)

    def _end_window(self) -> bool:
        """Logs the measures since the last entry. Goes back to the best state and returns True if a task collapsed."""
        progress = self._progress
        window, progress.window = progress.window.fetch(), Window()
        for task, losses in window.values.get("loss", {}).items():
            if not np.isfinite(losses).all():
                raise FloatingPointError(
                    f"The loss of task {task!r} is {losses[int(np.isfinite(losses).argmin())]}. The update for that "
                    "batch was left out. Check its data for NaN, or lower `learning_rate`."
                )
            progress.loss, progress.batches = progress.loss + sum(losses), progress.batches + len(losses)
        values, tasks, units = self.model.coefficients()
        drift = (values - progress.coefficients).abs().sum(1) / max(len(units), 1)
        drifts = {f"drift_{task}": value for task, value in zip(tasks, drift.tolist(), strict=True)}
        measures = {**window.summary(), "drift": drift.mean().item(), **window.per_task(), **drifts}
        self._log({"step": progress.step, "precision": self.precision, **measures})
        agreement, start = window.means("agreement"), window.means("start_agreement")
        if not start:
            return False
        gains, guard = {task: agreement[task] - start[task] for task in start}, progress.guard
        collapsed = guard.collapsed(gains, progress.step, self._copy_parameters())
        if collapsed:
            self._set_parameters(guard.best.parameters)
            falls = {f"collapse_{task}": -gains[task] for task in collapsed}
            self._log({"step": progress.step, "best_step": guard.best.step, **falls})
        return bool(collapsed)

    def step(self, task: str, batch: dict) -> torch.Tensor:
        """Predicts a batch of a stream and adapts to it: returns the logits that the model gave before the update.

        The update is that of `train` on one batch, from the forward that predicts. The expert runs on the batch too,
        unless its output is there as `expert_rows`, or nothing takes it (`entropy` without `collapse_guard`). Every
        `logging_steps` calls the log gets an entry, and keeps the last 100, so memory does not grow. Once a task has
        collapsed, further calls only predict; a new trainer adapts again.

        Under several processes all call it for the same task, each with its part of the batch. Raises ValueError for
        an unknown task, and for what is no tensor.
        """
        for name, value in batch.items():
            if name not in LABELS and not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"`batch[{name!r}]` is a {type(value).__name__}; it must be a tensor, as a data collator or a "
                    "tokenizer with `return_tensors='pt'` gives it. Leave out what the model does not take."
                )
        if self._optimizer is None:
            self._prepare()
        samples = {k: v.to(self.accelerator.device) for k, v in batch.items() if k not in LABELS}
        progress, args = self._progress, self.args
        if progress.collapsed:
            self.model.set_task(task)
            with torch.no_grad():
                return self._forward(samples).logits
        alone = self._objective_of(task, self.objective) is entropy and progress.guard is None
        if EXPERT_ROWS not in samples and not alone:
            with torch.no_grad(), self.model.expert(task):
                samples[EXPERT_ROWS] = self._forward(samples).compared[0]
        logits = self._backward(task, samples, 1)
        self._update()
        progress.step += 1
        if progress.step % args.logging_steps == 0:
            progress.collapsed = self._end_window()
            del self.log_history[:-100]
        return logits

    def _prepare(self):
        """Makes the optimizer, and what goes on beside it."""
        parameters = list(self._parameters().values())
        if not parameters:
            raise ValueError(
                "Nothing in the model is trainable. If it was loaded by `from_pretrained`, pass `is_trainable=True`."
            )
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            raise ValueError(
                "Parameters that train are sharded. Pass them to `fully_shard` as `ignored_params`, so that it shards "
                "the base alone."
            )
        args, lr = self.args, self.args.learning_rate
        if lr is None:
            tint_layers = self.model.tint_layers
            lr = 3e-3 if tint_layers and all(layer in self.model.head_layers for layer in tint_layers) else 1e-3
        groups = [{"params": parameters, "initial_lr": lr}]  # by which a scheduler goes on
        betas = args.adam_beta1, args.adam_beta2
        optimizer = torch.optim.Adam(groups, lr, betas, args.adam_epsilon, fused=True)
        self.model.eval()
        layers = (m for m in self.model.modules() if isinstance(m, GradientCheckpointingLayer))
        self._checkpointed = [layer for layer in layers if layer.gradient_checkpointing]
        # Not the model, for DDP: what trains is small, so one exchange an update does, and a step leaves tint layers of
        # other tasks without a gradient, which DDP takes for an error
        self._optimizer = self.accelerator.prepare_optimizer(optimizer)
        _set({parameter: broadcast(parameter.data) for parameter in parameters})
        self._loss_since_update = 0.0
        self._progress = _Progress(torch.Generator().manual_seed(args.seed), self.model.coefficients().values)
        if args.collapse_guard is not None:
            self._progress.guard = CollapseGuard(args.collapse_guard, self._copy_parameters())

    def _parameters(self):
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _copy_parameters(self):
        return {name: parameter.detach().cpu().clone() for name, parameter in self._parameters().items()}

    def _set_parameters(self, values):
        _set({parameter: values[name] for name, parameter in self._parameters().items()})

    def _finish(self):
        self._optimizer = None
        self.accelerator.free_memory()
        if self.args.report_to != "none":
            self.accelerator.end_training()

    def _backward(self, task, batch, share):
        """Adds the gradients of one batch, and its measures to those of the window; returns its logits."""
        self.model.set_task(task)
        objective, progress = self._objective_of(task, self.objective), self._progress
        expert_rows = batch.get(EXPERT_ROWS)  # None in a stream where nothing takes it
        start_rows = self._start_rows(batch) if progress.guard is not None else None
        with _checkpointing(self._checkpointed):
            output = self._forward(batch)
        rows = output.compared[0]
        if expert_rows is not None and rows.shape != expert_rows.shape:
            raise ValueError(
                f"Task {task!r}: the merged model gives outputs of shape {tuple(rows.shape)}, its expert gave "
                f"{tuple(expert_rows.shape)}. Padding must be marked by an `attention_mask`, and a transform must give "
                "the same sizes each time."
            )
        rows, expert_rows = self._of_all_processes(rows), self._of_all_processes(expert_rows)
        loss = objective(rows, expert_rows, None)
        self.accelerator.backward(loss / share)
        self._loss_since_update += loss.detach().abs()
        progress.window.add(task, loss=loss)
        if objective is confident_pseudo_label:
            progress.window.add(task, kept=confident_mask(rows, expert_rows).float().mean())
        if expert_rows is not None and self._compares_classes(task):
            predicted, expected = rows.argmax(-1), expert_rows.argmax(-1)
            progress.window.add(task, agreement=_share_equal(predicted, expected))
            progress.window.add_classes(task, predicted, expected, rows.shape[-1])
            if start_rows is not None:
                progress.window.add(task, start_agreement=_share_equal(start_rows.argmax(-1), expected))
        return output.logits.detach()

    def _compares_classes(self, task):
        """Whether what the objective compares are scores of classes of which one is right."""
        return self._has_one_class(task) and self.objective is not feature_l1

    def _has_one_class(self, task):
        return self._problem_type(task) not in ("regression", "multi_label_classification")

    @torch.no_grad()
    def _start_rows(self, batch):
        """What the parameters of the start give for a batch."""
        parameters = self._parameters()
        now = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, value in self._progress.guard.start.parameters.items():
                parameters[name].data = value.to(now[name].device)
            return self._of_all_processes(self._forward(batch).compared[0])
        finally:
            for name, value in now.items():
                parameters[name].data = value

    def _of_all_processes(self, rows):
        """The rows of all processes, in the order of one process's batch; ours keep their graph.

        A mean over the pseudo-labels kept is one over those of all processes, of which each keeps another number."""
        if rows is None or self.accelerator.num_processes == 1:
            return rows
        counts = self.accelerator.gather(torch.tensor([len(rows)], device=rows.device)).tolist()
        padded = F.pad(rows.detach(), (0, 0, 0, max(counts) - len(rows)))
        gathered = self.accelerator.gather(padded).view(len(counts), max(counts), *rows.shape[1:])
        parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        parts[self.accelerator.process_index] = rows
        return torch.cat(parts)

    def _sum_gradients(self):
        """Makes the gradients those of the loss of all processes, of which each has the part of its own rows."""
        if self.accelerator.num_processes > 1:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            summed = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]))
            for gradient, part in zip(gradients, summed.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _update(self):
        """Nothing is asked of the device here, for the answer would have to be waited for."""
        # A loss of exactly zero is one for which no pseudo-label was kept. There is nothing to learn from it, but
        # Adam would still move by its momentum.
        loss, optimizer = self._loss_since_update, self._optimizer.optimizer
        skipped = (~(loss > 0) | loss.isinf()).float()  # NaN too
        self._sum_gradients()
        if self.accelerator.scaler is None:
            optimizer.found_inf = skipped  # as a GradScaler has the fused Adam leave an update out
            self._optimizer.step()
            del optimizer.found_inf
        elif not skipped:
            self._optimizer.step()
        self.model.project_coefficients()
        # None and not zero: the tint layers of other tasks are to have no gradient, or Adam's momentum moves them
        self._optimizer.zero_grad(set_to_none=True)
        self._loss_since_update = 0.0

    def _forward(self, batch) -> "_Output":
        mask = self._attention_mask(batch)
        inputs = {key: value for key, value in batch.items() if key != EXPERT_ROWS and key not in LABELS}
        features, hooks = [], []
        if self.objective is feature_l1:
            head = self.model.head_layers[0]
            hooks = [head.register_forward_pre_hook(lambda module, args: features.append(args[0]))]
        try:
            with torch.autocast(self.accelerator.device.type, self._autocast, self._autocast is not None):
                output = self.model(**inputs)
                logits = output_of(output).float()
        finally:
            for hook in hooks:
                hook.remove()
        rows = to_rows(logits, mask)
        return _Output(logits, rows, to_rows(features[0], mask) if features else rows)

    def _attention_mask(self, batch):
        """Which tokens of the output are no padding; None where the batch does not say."""
        decodes = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        return batch.get("decoder_attention_mask" if decodes else "attention_mask")

    # ---- data --------------------------------------------------------------------------------------------------------

    def _batches(self, task, dataset, done):
        """Batches without end, with the expert's rows that the objective compares, after the first `done` of them.

        Seed and number of an epoch decide its order. The sampler skips what is done; workers, which have random states
        of their own, have to load it again to come to the same place.
        """
        args, order, device = self.args, torch.Generator(), self.accelerator.device
        samples = WithExpertRows(dataset, self._expert_rows(task, dataset, logits=False))
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
                    collate_fn=self._collate_unlabelled,
                    num_workers=args.dataloader_num_workers,
                    pin_memory=device.type == "cuda",  # or the GPU would be waited for at each batch
                )
                yield from islice(loader, skipped if args.dataloader_num_workers else 0, None)
                skipped = 0

        return (send_to_device(batch, device, non_blocking=True) for batch in epochs())

    def _eval_loader(self, task, dataset):
        """Batches of a task with the expert's logits."""
        loader = DataLoader(
            WithExpertRows(dataset, self._expert_rows(task, dataset, logits=True)),
            batch_size=self.args.per_device_eval_batch_size,
            generator=torch.Generator().manual_seed(self.args.seed),  # or each evaluation would draw a random number
            collate_fn=self._collate,
            num_workers=self.args.dataloader_num_workers,
        )
        loader = self.accelerator.prepare(loader)
        self.accelerator._dataloaders.remove(loader)  # or every evaluation would leave one there
        return loader

    def _expert_rows(self, task, dataset, logits):
        @torch.no_grad()
        def compute(samples):
            batch = self._collate_unlabelled(samples)
            output = self._forward({k: v.to(self.accelerator.device) for k, v in batch.items()})
            rows, counts = output.rows if logits else output.compared
            return rows.split(counts)

        kind = "features" if self.objective is feature_l1 and not logits else "logits"
        memo = (self.model.active_adapter, task, kind, dataset._fingerprint)
        config = self.model.peft_config[self.model.active_adapter]
        # `datasets` caches on disk only what came from disk; an adapter may have taken another's name
        if self._cached.get(memo, (None, None))[0] is not config:
            self.model.eval()
            # processes that have the experts or the base in parts run them together, and keep what they find apart
            sharded = config.is_sharded
            sharded |= any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
            expert = uuid4().hex if sharded else self.model.expert_fingerprint(task)
            key = [expert, kind, self.precision]
            key.append(Hasher.hash([self._collate.collate, self._collate.columns]))
            with self.model.expert(task), nullcontext() if sharded else self.accelerator.main_process_first():
                size, description = self.args.per_device_eval_batch_size, f"expert {kind} of {task}"
                rows = cache_expert_rows(dataset, compute, key, size, description, not sharded)
            self._cached[memo] = config, rows
        return self._cached[memo][1]

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset: dict[str, Dataset] | None = None) -> dict[str, dict[str, float]]:
        """Metrics of each task, and their means as the entry "mean".

        `agreement` is how often the merged model predicts the expert's class; it needs no labels. With labels, each
        metric is given for the merged model, for the expert (`expert_...`), and as their ratio (`normalized_...`).
        """
        datasets = self._check_datasets("eval_dataset", eval_dataset) or self.eval_dataset
        if not datasets:
            raise ValueError("`eval_dataset` is missing; give {task: Dataset}.")
        before, results = self.model.task, {}
        self.model.eval()
        loaders = {task: self._eval_loader(task, dataset) for task, dataset in datasets.items()}
        batches = sum(map(len, loaders.values()))
        with self.model.reuse_merged_weights(), self._bar("evaluating", total=batches, leave=False) as bar:
            for task, loader in loaders.items():
                results[task] = self._metrics(task, *self._predict(task, loader, bar))
        self.model.set_task(before)
        names = dict.fromkeys(name for metrics in results.values() for name in metrics)
        return {**results, "mean": {n: float(np.mean([m[n] for m in results.values() if n in m])) for n in names}}

    def _predict(self, task, loader, bar):
        """Rows of the merged model and of the expert, and the labels of the rows (None without labels)."""
        self.model.set_task(task)
        samples = []
        for batch in loader:
            label = next((batch[key] for key in LABELS if key in batch), None)
            output = self._forward(batch)
            rows, counts = output.rows
            found = [rows, batch[EXPERT_ROWS]]
            if label is not None:
                found.append(label_rows(label, output.logits, self._attention_mask(batch)))
            # sample by sample: processes have other numbers of rows, and samples that filled up the last batch go
            split = [value.float().cpu().split(counts) for value in found]
            samples += self.accelerator.gather_for_metrics(list(zip(*split, strict=True)), use_gather_object=True)
            bar.update()
        columns = [torch.cat(column).numpy() for column in zip(*samples, strict=True)]
        return columns if len(columns) == 3 else [*columns, None]

    def _metrics(self, task, rows, expert_rows, labels):
        metrics = {}
        if self._has_one_class(task):
            metrics["agreement"] = float((rows.argmax(-1) == expert_rows.argmax(-1)).mean())
        if labels is None:
            return metrics
        compute = self.compute_metrics
        if isinstance(compute, dict):
            compute = compute.get(task)
        if compute is not None:
            ours, experts = (compute(EvalPrediction(values, labels)) for values in (rows, expert_rows))
            for name, value in ours.items():
                normalized = value / experts[name] if experts[name] else float("nan")
                metrics |= {name: value, f"expert_{name}": experts[name], f"normalized_{name}": normalized}
        elif metrics:
            metrics |= NormalizedAccuracy(keep_in_memory=True).compute(
                predictions=rows.argmax(-1),
                references=labels.astype("int64"),
                expert_predictions=expert_rows.argmax(-1),
            )
        return metrics

    def _evaluate_state(self):
        """Evaluates and logs the present state, and keeps it if it is the best."""
        results, step, best = self.evaluate(), self._progress.step, self._progress.best
        self._log({"step": step, **{f"eval_{task}_{k}": v for task, m in results.items() for k, v in m.items()}})
        if not self.args.load_best_model_at_end:
            return
        name = self.args.metric_for_best_model
        if name not in results["mean"]:
            known = ", ".join(results["mean"]) or "none; give labels and `compute_metrics`"
            raise ValueError(f"`metric_for_best_model` is {name!r}; there are: {known}.")
        value = results["mean"][name]
        if best is None or (value > best.value if self.args.greater_is_better else value < best.value):
            self._progress.best = Snapshot(step, value, self._copy_parameters())

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, results: dict[str, dict[str, float]] | None = None) -> None:
        """Saves the adapter, its model card, and the `processing_class`, to `output_dir` (default: the arguments').

        `results`, as `evaluate` returns them, go into the card. A card that is there keeps what was written around
        the generated part. Each file takes the place of an older one when all are on disk."""
        if self.accelerator.is_main_process:
            output_dir = output_dir or self.args.output_dir
            existing = read_card(os.path.join(output_dir, FILE))
            self.model.save_pretrained(output_dir)
            with added_files(output_dir) as folder:
                self._save_processing_class(folder)
                save_card(self.model, folder, existing=existing, results=results, **self._for_card())

    def _save_processing_class(self, folder):
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def push_to_hub(self, repo_id: str, results: dict[str, dict[str, float]] | None = None, **kwargs):
        """Pushes what `save_model` saves, as one commit. Returns its `CommitInfo`, None in other processes than the
        main one.

        `kwargs` are those of transformers' `push_to_hub` (`private`, `token`, `revision`, `commit_message`, ...) and of
        `model_card`. Raises ValueError for an adapter whose experts or base model are folders of this machine."""
        if self.accelerator.is_main_process:
            return push_adapters(self.model, repo_id, results=results, **self._for_card(), **kwargs)

    def _for_card(self):
        steps = max((logs["step"] for logs in self.log_history), default=0)
        settings = {"objective": getattr(self.objective, "__name__", "a function"), "steps": steps}
        for name in ("update", "per_device_train_batch_size", "seed"):
            settings[name.replace("_", " ")] = getattr(self.args, name)
        settings["precision"] = self.precision
        return {"processing_class": self.processing_class, "training": settings if steps else None}

    def _save_checkpoint(self):
        args, progress = self.args, self._progress
        names, optimizer = list(self._parameters()), self._optimizer.state_dict()["state"]
        tensors = {
            "parameters": self._parameters(),
            "optimizer": {f"{key}/{names[i]}": v for i, values in optimizer.items() for key, v in values.items()},
            "progress": {"order": progress.order.get_state(), "coefficients": progress.coefficients},
        }
        state = {
            "settings": self._settings(),
            "step": progress.step,
            "loss": progress.loss,
            "batches": progress.batches,
            "window": asdict(progress.window.fetch()),
            "log_history": self.log_history,
        }
        if progress.best is not None:
            tensors["best"] = progress.best.parameters
            state["best"] = progress.best.step, progress.best.value
        for name in ("start", "best", "latest") if progress.guard is not None else ():
            snapshot = getattr(progress.guard, name)
            tensors[f"guard_{name}"] = snapshot.parameters
            state[f"guard_{name}"] = snapshot.step, snapshot.value
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            with new_folder(os.path.join(args.output_dir, f"checkpoint-{progress.step}")) as folder:
                self.model.save_pretrained(folder)
                self._save_processing_class(folder)
                write_state(folder, tensors, state, random_states)
            remove_old_checkpoints(args.output_dir, args.save_total_limit)
        self.accelerator.wait_for_everyone()

    def _read_checkpoint(self, folder):
        """What `_save_checkpoint` saved of this very training: tensors, state, and random states of the processes."""
        tensors, state, random_states = read_state(folder)
        settings = state["settings"]
        for name, value in self._settings().items():
            if settings.get(name) != value:
                before = repr(settings[name]) if name in settings else "a version that did not know it"
                raise ValueError(
                    f"{name} is {value!r}, and {folder!r} was made with {before}. Resume with the same, or start anew."
                )
        shapes = {name: parameter.shape for name, parameter in self._parameters().items()}
        saved = {name: value.shape for name, value in tensors["parameters"].items()}
        for name in shapes.keys() | saved.keys():
            if shapes.get(name) != saved.get(name):
                raise ValueError(f"{folder!r} is of another model: they differ in {name!r}.")
        if state["step"] > self.args.max_steps:
            raise ValueError(f"`max_steps` is {self.args.max_steps}, and {folder!r} is of step {state['step']}.")
        return tensors, state, random_states

    def _settings(self):
        """What decides a training and must be the same when it is resumed, as JSON has it. Of the data the number of
        samples: their fingerprints may be random."""
        config = self.model.peft_config[self.model.active_adapter].to_dict()
        # the rate of a step that falls to zero is decided by the last one
        names = DECISIVE if self.args.lr_scheduler_type == "constant" else (*DECISIVE, "max_steps")
        return {
            **{f"`{name}`": getattr(self.args, name) for name in names},
            **{f"`{name}` of the model": config[name] for name in DECISIVE_OF_MODEL},
            "the objective": getattr(self.objective, "__name__", type(self.objective).__name__),
            "the number of samples of each task": [[task, len(d)] for task, d in self.train_dataset.items()],
            "the number of processes": self.accelerator.num_processes,
            "the precision": self.precision,
        }

    def _load_state(self, tensors, state):
        self._set_parameters(tensors["parameters"])
        names, entries = list(self._parameters()), {}
        for key, value in tensors.get("optimizer", {}).items():
            kind, _, name = key.partition("/")
            entries.setdefault(names.index(name), {})[kind] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": entries})
        progress = self._progress
        progress.order.set_state(tensors["progress"]["order"])
        progress.coefficients = tensors["progress"]["coefficients"]
        progress.step, progress.loss, progress.batches = state["step"], state["loss"], state["batches"]
        progress.window, self.log_history = Window(**state["window"]), state["log_history"]
        if "best" in state:
            progress.best = Snapshot(*state["best"], tensors["best"])
        for name in ("start", "best", "latest") if progress.guard is not None else ():
            setattr(progress.guard, name, Snapshot(*state[f"guard_{name}"], tensors[f"guard_{name}"]))
        if "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    # ---- beside ------------------------------------------------------------------------------------------------------

    def _is_quiet(self):
        return self.args.disable_tqdm or not self.accelerator.is_main_process

    def _bar(self, description, items=None, total=None, leave=True):
        return tqdm(items, description, total, leave, disable=self._is_quiet())

    def _log(self, logs):
        self.log_history.append(logs)
        self.accelerator.log({k: v for k, v in logs.items() if k not in ("step", "precision")}, step=logs["step"])
        for callback in self.callbacks:
            callback(self, logs)


class _Output(NamedTuple):
    """Of one forward: the logits, and as (rows, rows of each sample) the logits and what the objective compares."""

    logits: torch.Tensor
    rows: tuple[torch.Tensor, list[int]]
    compared: tuple[torch.Tensor, list[int]]


@dataclass
class _Progress:
    """What goes on in a training beside the parameters, the optimizer and the log."""

    order: torch.Generator  # of the tasks in a step
    coefficients: torch.Tensor  # at the start, (tasks, units)
    step: int = 0
    loss: float = 0.0  # summed over the batches of the log's entries
    batches: int = 0
    window: Window = field(default_factory=Window)
    best: Snapshot | None = None  # by evaluation
    guard: CollapseGuard | None = None
    collapsed: bool = False


@torch.no_grad()
def _set(values):
    """Not by `parameter.data`, in which nobody could see that the parameter has changed."""
    for parameter, value in values.items():
        parameter.copy_(value)


@contextmanager
def _checkpointing(layers):
    """transformers checkpoints layers in training mode only. Ours say they are, and are not while they run."""
    functions = [layer._gradient_checkpointing_func for layer in layers]
    try:
        for layer, function in zip(layers, functions, strict=True):
            layer.training = True
            layer._gradient_checkpointing_func = partial(_checkpoint, layer, function)
        yield
    finally:
        for layer, function in zip(layers, functions, strict=True):
            layer.training = False
            layer._gradient_checkpointing_func = function


def _checkpoint(layer, checkpoint, forward, *args):
    def forward_in_evaluation(*args):
        before, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = before

    return checkpoint(forward_in_evaluation, *args)


def _share_equal(ours, theirs):
    return (ours == theirs).float().mean()
