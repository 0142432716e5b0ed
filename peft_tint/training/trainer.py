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
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    default_data_collator,
    get_scheduler,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import TrainOutput

from .._card import FILE, read_card, save_card
from ..checkpoints import added_files, new_folder
from ..hub import push_adapters
from .arguments import DECISIVE, DECISIVE_OF_MODEL, TintTrainingArguments
from .collapse import CollapseGuard, Snapshot, Window
from .data import EXPERT_ROWS, Collator, WithExpertRows, cache_expert_rows
from .metrics import count as count_metrics
from .metrics import metrics
from .objectives import OBJECTIVES, Objective
from .outputs import BY_LABELS, IGNORED, LABELS, OF_LANGUAGE, SPAN, Output, inputs_of, kind_of, read_output
from .precision import choose_autocast, describe_precision
from .resuming import (
    check_output_dir,
    find_checkpoint,
    kept_random_state,
    random_state,
    read_state,
    remove_old_checkpoints,
    set_random_state,
    write_state,
)

MOST_CACHED = 50e6  # bytes of an expert's rows of one dataset


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
        objective: a name in `OBJECTIVES`, a function `(logits, expert_logits, mask) -> loss` on rows of shape
            (rows, classes), an `Objective`, or {task: one of these}. Where one is given for all tasks, regression takes
            the mean absolute difference to the expert, and multi-label tasks "bce" for "soft_pseudo_label".
        data_collator: makes a batch of a list of samples; default: padding by `processing_class`, else stacking.
        processing_class: a tokenizer, image processor or other, saved with the model.
        compute_metrics: `EvalPrediction -> {name: number}`, or {task: such a function}. It gets what
            `transformers.Trainer` would give it: predictions (samples, ...) and labels, padded with -100.
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
        if not isinstance(args, TintTrainingArguments | None):
            raise ValueError(
                f"`args` is a {type(args).__name__}; give `TintTrainingArguments`, whose fields have the same names."
            )
        for name, function in (compute_metrics if isinstance(compute_metrics, dict) else {"": compute_metrics}).items():
            if function is not None and not callable(function):
                raise ValueError(
                    f"`compute_metrics` is {function!r}{name and ' for '}{name}; it must be a function "
                    "`EvalPrediction -> {name: number}`, or {task: such a function}."
                )
        if not hasattr(model, "tasks"):
            raise ValueError(
                f"`model` is a {type(model).__name__} without a TINT adapter; give what "
                "`get_peft_model(base, TintConfig(...))` returns."
            )
        self.model, self.args = model, args or TintTrainingArguments()
        self.train_dataset = self._check_datasets("train_dataset", train_dataset)
        self.eval_dataset = self._check_datasets("eval_dataset", eval_dataset)
        self._model = model.get_base_model()
        self._kind = kind_of(self._model)
        self.objectives = self._check_objectives(objective)
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
        self._collate, self._columns = self._choose_collator(data_collator)
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

    def _check_objectives(self, objective) -> dict[str, Objective]:
        """That of each task."""
        given = objective if isinstance(objective, dict) else dict.fromkeys(self.model.tasks, objective)
        tasks = self.train_dataset or {}
        for task in [*given, *tasks]:
            if task not in given or task not in self.model.tasks:
                raise ValueError(
                    f"`objective` is for {', '.join(map(repr, given))}, the model's tasks are "
                    f"{', '.join(map(repr, self.model.tasks))}; give one for each task that is trained."
                )
        objectives = {}
        for task, one in given.items():
            if not callable(one) and one not in OBJECTIVES:
                raise ValueError(f"There is no objective {one!r}; the objectives are {', '.join(OBJECTIVES)}.")
            known = one if callable(one) else OBJECTIVES[one]
            known = known if isinstance(known, Objective) else Objective(known)
            if isinstance(objective, dict) and known.compares == "any":
                objectives[task] = known
                continue
            problem = self._problem(task)
            if problem == "number" and known.compares != "features":
                known = Objective(OBJECTIVES["feature_l1"].function)
            elif problem == "labels" and known is OBJECTIVES["soft_pseudo_label"]:
                known = OBJECTIVES["bce"]
            if task in tasks or not tasks:
                self._check_objective(task, known, problem)
            objectives[task] = known
        return objectives

    def _check_objective(self, task, objective, problem):
        name, compares = objective.__name__, objective.compares
        if problem == "labels" and compares == "classes":
            raise ValueError(
                f"The task {task!r} is multi-label; {name!r} would take its labels for alternatives. Use 'bce', "
                "'feature_l1' or a function of your own, for this task alone by `objective={task: ...}`."
            )
        if problem == "classes" and compares == "labels":
            raise ValueError(
                f"In the task {task!r} one class is right; {name!r} would take each by itself. Use "
                "'soft_pseudo_label', or set `problem_type` in the config of its expert."
            )
        if problem == "features" and compares in ("classes", "labels"):
            raise ValueError(
                f"The model of the task {task!r} has no head: it gives `last_hidden_state`, and {name!r} compares "
                "scores of classes. Use 'feature_l1', which compares features."
            )
        if compares == "features" and problem != "features" and not self.model.head_layers:
            raise ValueError(f"Task {task!r}: {name!r} compares the inputs of the head, and this model has no head.")

    def _problem(self, task, output: Output | None = None) -> str:
        """What a row of the task is: "classes" of which one is right, "labels" that each is right or not, a "number",
        or "features" of an encoder without a head."""
        if self._kind in ("features", "depth"):
            return "features" if self._kind == "features" else "number"
        labels = self.model.task_labels(task)
        known = labels.get("problem_type") if self._kind not in (*OF_LANGUAGE, "tokens", "span", "frames") else None
        single = not known and len(labels.get("id2label") or "ab") == 1 and self._kind is None
        if known == "regression" or single or (output is not None and output.values.shape[-1] == 1):
            return "number"
        return "labels" if known == "multi_label_classification" else "classes"

    def _choose_collator(self, data_collator):
        """What makes a batch, and the columns that it gets, None for all."""
        if data_collator is not None:
            return data_collator, None
        columns = {*inspect.signature(self._model.forward).parameters} - {"args", "kwargs"}
        if self.processing_class is None or not hasattr(self.processing_class, "pad"):
            return default_data_collator, columns
        if self._kind == "seq2seq":
            return DataCollatorForSeq2Seq(self.processing_class), columns
        pads = DataCollatorForTokenClassification if self._kind in BY_LABELS else DataCollatorWithPadding
        return pads(self.processing_class), columns

    def _collator(self, task, labelled):
        """`labelled`: with labels also where they do not say what counts."""
        columns = self._columns
        if columns is not None:
            columns = columns | {*LABELS} if labelled or self._kind in BY_LABELS else columns - {*LABELS}
        return Collator(task, self._collate, columns)

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
            objective, head = self.objectives[task], heads[-1]
            if not objective.needs_expert:
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
        loader = DataLoader(
            self._with_expert_rows(task, dataset, logits=False),
            batch_size=self.args.per_device_eval_batch_size,
            generator=torch.Generator(),  # or it would draw a random number
            collate_fn=self._collator(task, labelled=False),
            num_workers=self.args.dataloader_num_workers,
        )
        hook = head.register_forward_hook(lambda module, args, output: found.append((*args, output)))
        try:
            for batch in self._bar(f"features of {task}", loader, leave=False):
                batch = send_to_device(batch, self.accelerator.device)
                expert_rows.append(self._rows_of_expert(task, batch, logits=False))
                del found[len(expert_rows) - 1 :]  # the expert's
                compared = self._forward(task, batch).compared
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
            if not isinstance(value, torch.Tensor) and (name not in LABELS or self._kind in BY_LABELS):
                raise ValueError(
                    f"`batch[{name!r}]` is a {type(value).__name__}; it must be a tensor, as a data collator or a "
                    "tokenizer with `return_tensors='pt'` gives it. Leave out what the model does not take."
                )
        if self._optimizer is None:
            self._prepare()
        used = lambda name: self._kind in BY_LABELS or name not in LABELS  # noqa: E731
        samples = {name: value.to(self.accelerator.device) for name, value in batch.items() if used(name)}
        progress, args = self._progress, self.args
        if progress.collapsed:
            self.model.set_task(task)
            with torch.no_grad():
                return self._forward(task, samples).output.raw.float()
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
        progress, objective = self._progress, self._objective(task)
        needs_expert = objective.needs_expert or progress.guard is not None
        expert_rows = self._rows_of_expert(task, batch, logits=False) if needs_expert else batch.get(EXPERT_ROWS)
        start_rows = self._start_rows(task, batch) if progress.guard is not None else None
        with _checkpointing(self._checkpointed):
            forward = self._forward(task, batch)
        rows, problem = forward.compared, self._problem(task, forward.output)
        objective = self._objective(task, problem)
        if expert_rows is not None:
            self._check_rows(task, rows, expert_rows)
        rows, expert_rows = self._of_all_processes(rows), self._of_all_processes(expert_rows)
        loss = objective(rows, expert_rows, None)
        self.accelerator.backward(loss / share)
        self._loss_since_update += loss.detach().abs()
        progress.window.add(task, loss=loss)
        if objective.kept is not None:
            progress.window.add(task, kept=objective.kept(rows, expert_rows).float().mean())
        if expert_rows is not None and problem == "classes" and objective.compares != "features" and len(rows):
            predicted, expected = rows.argmax(-1), expert_rows.argmax(-1)
            progress.window.add(task, agreement=_share_equal(predicted, expected))
            if self._kind != "span":  # whose classes are the tokens of a batch
                progress.window.add_classes(task, predicted, expected, rows.shape[-1])
            if start_rows is not None:
                progress.window.add(task, start_agreement=_share_equal(start_rows.argmax(-1), expected))
        return forward.output.raw.detach().float()

    def _objective(self, task, problem=None) -> Objective:
        """That of a task, whose output may tell what its config does not."""
        objective = self.objectives[task]
        if problem == "number" and objective.compares in ("classes", "labels"):
            return Objective(OBJECTIVES["feature_l1"].function)
        return objective

    def _compares_classes(self, task):
        """Whether what the objective compares are scores of classes of which one is right."""
        return self._problem(task) == "classes" and self.objectives[task].compares != "features"

    def _check_rows(self, task, rows, expert_rows):
        if rows.shape != expert_rows.shape and len(rows) + len(expert_rows) > 0:
            raise ValueError(
                f"Task {task!r}: the merged model gives outputs of shape {tuple(rows.shape)}, its expert gave "
                f"{tuple(expert_rows.shape)}. Padding must be marked by an `attention_mask`, and a transform must give "
                "the same sizes each time; else set `expert_rows='online'`."
            )

    @torch.no_grad()
    def _start_rows(self, task, batch):
        """What the parameters of the start give for a batch."""
        parameters = self._parameters()
        now = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, value in self._progress.guard.start.parameters.items():
                parameters[name].data = value.to(now[name].device)
            return self._of_all_processes(self._forward(task, batch).compared)
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
        # None and not zero: the tint layers of other tasks are to have no gradient, or Adam's momentum moves them
        self._optimizer.zero_grad(set_to_none=True)
        self._loss_since_update = 0.0

    def _forward(self, task, batch, labelled=False) -> "_Forward":
        """`labelled`: labels are read where they do not say what counts, too."""
        if not (labelled or self._kind in BY_LABELS):
            batch = {name: value for name, value in batch.items() if name not in LABELS}
        features, hooks = [], []
        if self.objectives[task].compares == "features" and self.model.head_layers:
            head = self.model.head_layers[0]
            hooks = [head.register_forward_pre_hook(lambda module, args: features.append(args[0]))]
        inputs = {name: value for name, value in batch.items() if name != EXPERT_ROWS}
        try:
            with torch.autocast(self.accelerator.device.type, self._autocast, self._autocast is not None):
                result = self.model(**inputs_of(self._model, self._kind, inputs, task))
        finally:
            for hook in hooks:
                hook.remove()
        output = read_output(result, self._model, self._kind, inputs, task)
        return _Forward(output, output.take(_positions(features[0])) if features else output.rows())

    @torch.no_grad()
    def _rows_of_expert(self, task, batch, logits):
        """Those that came with the batch, or of a forward of the expert; `logits`: not the features that an objective
        compares."""
        if EXPERT_ROWS in batch:
            return batch[EXPERT_ROWS]
        with self.model.expert(task):
            forward = self._forward(task, batch, logits)
        return forward.output.rows() if logits else forward.compared

    # ---- data --------------------------------------------------------------------------------------------------------

    def _batches(self, task, dataset, done):
        """Batches without end, with the expert's rows that the objective compares, after the first `done` of them.

        Seed and number of an epoch decide its order. The sampler skips what is done; workers, which have random states
        of their own, have to load it again to come to the same place.
        """
        args, order, device = self.args, torch.Generator(), self.accelerator.device
        samples = self._with_expert_rows(task, dataset, logits=False)
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
                    collate_fn=self._collator(task, labelled=False),
                    num_workers=args.dataloader_num_workers,
                    pin_memory=device.type == "cuda",  # or the GPU would be waited for at each batch
                )
                yield from islice(loader, skipped if args.dataloader_num_workers else 0, None)
                skipped = 0

        return (send_to_device(batch, device, non_blocking=True) for batch in epochs())

    def _eval_loader(self, task, dataset):
        """Batches of a task, with the expert's logits where they are cached."""
        loader = DataLoader(
            self._with_expert_rows(task, dataset, logits=True),
            batch_size=self.args.per_device_eval_batch_size,
            generator=torch.Generator().manual_seed(self.args.seed),  # or each evaluation would draw a random number
            collate_fn=self._collator(task, labelled=True),
            num_workers=self.args.dataloader_num_workers,
        )
        loader = self.accelerator.prepare(loader)
        self.accelerator._dataloaders.remove(loader)  # or every evaluation would leave one there
        return loader

    def _with_expert_rows(self, task, dataset, logits):
        """The dataset, with the expert's rows beside each sample where they are computed ahead."""
        self.model.eval()
        kind = "features" if self.objectives[task].compares == "features" and not logits else "logits"
        memo = (self.model.active_adapter, task, kind, dataset._fingerprint)
        config = self.model.peft_config[self.model.active_adapter]
        # `datasets` caches on disk only what came from disk; an adapter may have taken another's name
        if self._cached.get(memo, (None, None))[0] is not config:
            collate = self._collator(task, labelled=logits)
            rows = None
            if self._is_cached(task, dataset, collate, logits):
                rows = self._cache(task, dataset, collate, logits, kind)
            self._cached[memo] = config, rows
        rows = self._cached[memo][1]
        return dataset if rows is None else WithExpertRows(dataset, rows)

    def _cache(self, task, dataset, collate, logits, kind):
        # processes that have the experts or the base in parts run them together, and keep what they find apart
        sharded = self.model.peft_config[self.model.active_adapter].is_sharded
        sharded |= any(isinstance(parameter, DTensor) for parameter in self.model.parameters())
        expert = uuid4().hex if sharded else self.model.expert_fingerprint(task)
        key = [expert, kind, self.precision, Hasher.hash([collate.collate, collate.columns])]
        size, description = self.args.per_device_eval_batch_size, f"expert {kind} of {task}"
        with self.model.expert(task), nullcontext() if sharded else self.accelerator.main_process_first():
            compute = partial(self._compute, task, collate, logits)
            return cache_expert_rows(dataset, compute, key, size, description, not sharded)

    @torch.no_grad()
    def _compute(self, task, collate, logits, samples):
        """The rows of each sample by what the model is now."""
        batch = send_to_device(collate(samples), self.accelerator.device)
        forward = self._forward(task, batch, logits)
        rows = forward.output.rows() if logits else forward.compared
        return rows.split(forward.output.numbers().tolist())

    def _is_cached(self, task, dataset, collate, logits) -> bool:
        """Whether the expert's rows are computed once ahead. They may be if a sample has the same input each time, and
        the same rows whatever it is in a batch with."""
        args = self.args
        if args.expert_rows == "online":
            return False
        number = min(len(dataset), 8, args.per_device_eval_batch_size)
        with kept_random_state():
            samples, again = (dataset.__getitems__(list(range(number))) for _ in range(2))
            first, second = collate(samples), collate(again)
        if not _are_equal(first, second):
            if args.expert_rows == "cache":
                raise ValueError(
                    f"Task {task!r}: collator or transforms draw at random, so the expert's outputs cannot be cached: "
                    "the model would get other inputs than its expert did. Leave `expert_rows` out."
                )
            return False
        if args.expert_rows == "cache":
            return True
        if self._kind == "span":  # whose classes are the tokens of a batch
            return False
        with self.model.expert(task):
            together = self._compute(task, collate, logits, samples)
            size = sum(rows.numel() for rows in together) * 4 / number * len(dataset)
            if size > MOST_CACHED:
                return False
            sizes = [_size(collate([sample])) for sample in samples]
            shortest = sizes.index(min(sizes))
            if sizes[shortest] == max(sizes):
                return True  # there is no padding
            [by_itself] = self._compute(task, collate, logits, [samples[shortest]])
            return _are_close(together[shortest], by_itself)

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset: dict[str, Dataset] | None = None) -> dict[str, dict[str, float]]:
        """Metrics of each task, and their means as the entry "mean".

        `agreement` is how often the merged model predicts the expert's class, or says yes or no to a label as the
        expert does; it needs no labels. With labels, each
        metric is given for the merged model, for the expert (`expert_...`), and as their ratio (`normalized_...`):
        accuracy where one class is right, with perplexity for language models and mean IoU for segmentation; F1 (micro)
        and subset accuracy where several are; MAE, MSE and Pearson's correlation of numbers; exact match and F1 of
        spans. `compute_metrics` takes their place. Positions labelled -100 do not count, nor do segmentation's
        `semantic_loss_ignore_index`. Raises ValueError for labels that cannot be compared with the output.
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
                try:
                    results[task] = self._evaluate(task, loader, bar)
                finally:
                    self.model.set_task(before)
        names = dict.fromkeys(name for found in results.values() for name in found)
        return {**results, "mean": {n: float(np.mean([m[n] for m in results.values() if n in m])) for n in names}}

    def _evaluate(self, task, loader, bar):
        compute = self.compute_metrics
        compute = compute.get(task) if isinstance(compute, dict) else compute
        sums, kept, labelled = {}, [EvalLoopContainer(padding_index=IGNORED) for _ in range(3)], False
        ignored = {IGNORED, getattr(getattr(self._model, "config", None), "semantic_loss_ignore_index", IGNORED)}
        self.model.set_task(task)
        for batch in loader:
            expert_rows = self._rows_of_expert(task, batch, logits=True)
            output = self._forward(task, batch, labelled=True).output
            self._check_rows(task, output.rows(), expert_rows)
            labels = [batch[name] for name in LABELS if name in batch]
            labelled |= bool(labels)
            if compute is not None and labels:
                both = tuple(batch[name] for name in SPAN) if self._kind == "span" else labels[0]
                for container, found in zip(kept, (output.raw.float(), output.fill(expert_rows), both), strict=True):
                    found = tuple(found.unbind(1)) if self._kind == "span" and container is not kept[2] else found
                    found = self.accelerator.pad_across_processes(found, dim=1, pad_index=IGNORED)
                    container.add(self.accelerator.gather_for_metrics(found))
                    container.to_cpu_and_numpy()
                output = output._replace(labels=None)
            try:
                counted = count_metrics(self._problem(task, output), self._kind, output, expert_rows, tuple(ignored))
            except ValueError as error:
                raise ValueError(f"Task {task!r}: {error}.") from None
            for name, values in self.accelerator.gather_for_metrics(counted).items():
                sums[name] = sums.get(name, 0) + values.sum(0).double().cpu()
            bar.update()
        try:
            found = metrics(sums)
        except ValueError as error:
            raise ValueError(f"Task {task!r}: {error}.") from None
        if compute is not None and labelled:
            rows, expert_rows, labels = (container.get_arrays() for container in kept)
            ours, experts = (compute(EvalPrediction(values, labels)) for values in (rows, expert_rows))
            for name, value in ours.items():
                normalized = value / experts[name] if experts[name] else float("nan")
                found |= {name: value, f"expert_{name}": experts[name], f"normalized_{name}": normalized}
        elif labelled and "labelled" not in sums:
            raise ValueError(
                f"Task {task!r}: its labels cannot be compared with what a {type(self._model).__name__} gives; "
                "give `compute_metrics`, or leave them out."
            )
        return found

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
        settings = {"objective": self._objective_name(), "steps": steps}
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
            "the objective": self._objective_name(),
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

    def _objective_name(self):
        names = {task: objective.__name__ for task, objective in self.objectives.items()}
        return names.popitem()[1] if len({*names.values()}) == 1 else names

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


class _Forward(NamedTuple):
    output: Output
    compared: torch.Tensor  # the rows that the objective compares, of logits or of features


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


def _positions(features):
    """Inputs of a head as (samples, positions, features)."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, None] if features.ndim == 2 else features


def _are_equal(batch, other):
    def equal(one, two):
        return torch.equal(one, two) if isinstance(one, torch.Tensor) else bool(np.all(one == two))

    return batch.keys() == other.keys() and all(equal(value, other[name]) for name, value in batch.items())


def _are_close(rows, others):
    """Up to what lower precision and other sizes of matrices round differently."""
    scale = others.abs().max().clamp(min=1e-6) if others.numel() else 1
    return rows.shape == others.shape and bool(((rows - others).abs() <= 0.02 * scale).all())


def _size(batch):
    return sum(value.numel() for value in batch.values() if isinstance(value, torch.Tensor))


def _share_equal(ours, theirs):
    return (ours == theirs).float().mean()
