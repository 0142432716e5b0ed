"""Trains coefficients and tint layers at test time, on unlabelled data with the experts' pseudo-labels."""

import os
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast, gather_object, set_seed
from datasets import Dataset
from peft import get_peft_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.trainer_utils import TrainOutput

from .._card import FILE, read_card, save_card
from ..checkpoints import added_files, new_folder
from ..hub import push_adapters
from . import heads
from .arguments import DECISIVE, DECISIVE_OF_MODEL, TintTrainingArguments
from .batches import Batches
from .collapse import CollapseGuard, Snapshot, Window
from .data import EXPERT_ROWS
from .evaluating import evaluate
from .outputs import BY_LABELS, LABELS
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
from .rows import Rows


class TintTrainer:
    """Test-time training of a TINT model (Model Tinting, https://arxiv.org/abs/2412.19098), driven by Accelerate.

    The model stays in evaluation mode throughout, so dropout is off and running statistics stand still. The experts'
    outputs are computed once, before the first update, or beside the model's (`expert_rows`). Of labels in the training
    data nothing is used but where they are -100, and what a decoder's tokens are made of.

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
        self.args = args or TintTrainingArguments()
        self.train_dataset = _checked("train_dataset", train_dataset, model.tasks)
        self.eval_dataset = _checked("eval_dataset", eval_dataset, model.tasks)
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
        model.to(self.accelerator.device)
        # Accelerate has one precision for a process, and trainers may differ in it: autocast and scaler are ours
        autocast = choose_autocast(self.args, self.accelerator, model)
        self.precision = describe_precision(autocast, model)
        self.accelerator.scaler = None
        if autocast is torch.float16:
            self.accelerator.scaler = torch.amp.GradScaler(self.accelerator.device.type)
        tasks = list(self.train_dataset or ())
        self.rows = Rows(model, objective, tasks, self.accelerator, autocast)
        if self.args.collapse_guard is not None and not any(map(self.rows.compares_classes, tasks or model.tasks)):
            raise ValueError(
                f"`collapse_guard` is {self.args.collapse_guard}, and there are no predicted classes to compare with "
                "the experts': tasks are regression or multi-label, or the objective is 'feature_l1'. Leave it out."
            )
        self.batches = Batches(self.rows, self.args, data_collator, processing_class, self.precision)
        self._optimizer, self._checkpointed = None, []

    @property
    def model(self):
        return self.rows.model

    @model.setter
    def model(self, model):
        self.rows.model = model

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> TrainOutput:
        """Trains for `max_steps`; the result is in the model. Returns steps, mean loss and run time.

        From a checkpoint (a folder, or True for the last in `output_dir`) training goes on to bitwise the result that
        it would have had without a stop, on the same machine, unless the collator draws by a generator of its own.
        Processes read it from one disk. Raises ValueError where there is none or it is not whole, and where model,
        objective, arguments or the sizes of the data differ from those that it is of.
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
        batches = {task: self.batches.endless(task, data, done) for task, data in self.train_dataset.items()}
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
        """Each task's head by the objective, to the features that the merged model has at the start. Each process does
        all of it."""
        layers, losses = [layer for layer in self.model.head_layers if layer in self.model.tint_layers], []
        if not (self.args.head_steps and layers):
            return
        for task, dataset in self.train_dataset.items():
            objective, head = self.rows.objectives[task], layers[-1]
            if not objective.needs_expert:
                continue
            self.model.set_task(task)
            loader = self.batches.once(task, dataset, evaluating=False)
            found = heads.features_of(self.rows, head, task, self._bar(f"features of {task}", loader, leave=False))
            if found is None:
                continue
            steps = self._bar(f"fitting the head of {task}", range(self.args.head_steps), leave=False)
            loss = heads.fit(head, objective, *found, self._optimizer.param_groups[0]["initial_lr"], steps)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of the head of task {task!r} is {loss.item()}. Check its data for NaN, use a model in "
                    "float32 (with `bf16=True`), or lower `learning_rate`."
                )
            losses.append(loss.item())
            parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
            _set({parameter: broadcast(parameter.data) for parameter in parameters})  # rounded alike in all processes
        if losses:
            self._log({"step": 0, "head_loss": float(np.mean(losses))})

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
            if not isinstance(value, torch.Tensor) and (name not in LABELS or self.rows.kind in BY_LABELS):
                raise ValueError(
                    f"`batch[{name!r}]` is a {type(value).__name__}; it must be a tensor, as a data collator or a "
                    "tokenizer with `return_tensors='pt'` gives it. Leave out what the model does not take."
                )
        if self._optimizer is None:
            self._prepare()
        used = lambda name: self.rows.kind in BY_LABELS or name not in LABELS  # noqa: E731
        samples = {name: value.to(self.accelerator.device) for name, value in batch.items() if used(name)}
        progress, args = self._progress, self.args
        if progress.collapsed:
            self.model.set_task(task)
            with torch.no_grad():
                return self.rows.forward(task, samples).output.raw.float()
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
        progress = self._progress
        needs_expert = self.rows.objectives[task].needs_expert or progress.guard is not None
        expert_rows = self.rows.of_expert(task, batch) if needs_expert else batch.get(EXPERT_ROWS)
        start_rows = self._start_rows(task, batch) if progress.guard is not None else None
        with _checkpointing(self._checkpointed):
            output, compared = self.rows.forward(task, batch)
        rows = compared.rows()
        objective = self.rows.objective(task, output)
        if expert_rows is not None:
            self.rows.check(task, rows, expert_rows)
        rows, expert_rows = self._of_all_processes(rows), self._of_all_processes(expert_rows)
        loss = objective(rows, expert_rows, None)
        self.accelerator.backward(loss / share)
        self._loss_since_update += loss.detach().abs()
        progress.window.add(task, loss=loss)
        if objective.kept is not None:
            progress.window.add(task, kept=objective.kept(rows, expert_rows).float().mean())
        if expert_rows is not None and len(rows) and self.rows.compares_classes(task, output):
            predicted, expected = rows.argmax(-1), expert_rows.argmax(-1)
            progress.window.add(task, agreement=_share_equal(predicted, expected))
            if self.rows.kind != "span":  # whose classes are the tokens of a batch
                progress.window.add_classes(task, predicted, expected, rows.shape[-1])
            if start_rows is not None:
                progress.window.add(task, start_agreement=_share_equal(start_rows.argmax(-1), expected))
        return output.raw.detach().float()

    @torch.no_grad()
    def _start_rows(self, task, batch):
        """What the parameters of the start give for a batch."""
        parameters = self._parameters()
        now = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, value in self._progress.guard.start.parameters.items():
                parameters[name].data = value.to(now[name].device)
            return self._of_all_processes(self.rows.forward(task, batch).compared.rows())
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
        datasets = _checked("eval_dataset", eval_dataset, self.model.tasks) or self.eval_dataset
        if not datasets:
            raise ValueError("`eval_dataset` is missing; give {task: Dataset}.")
        before, results, compute = self.model.task, {}, self.compute_metrics
        compute = compute if isinstance(compute, dict) else dict.fromkeys(datasets, compute)
        # a metric of the user's gets the logits of all tokens
        loaders = {task: self.batches.shared(task, data, compute.get(task) is None) for task, data in datasets.items()}
        batches = sum(map(len, loaders.values()))
        with self.model.reuse_merged_weights(), self._bar("evaluating", total=batches, leave=False) as bar:
            try:
                for task, loader in loaders.items():
                    results[task] = evaluate(self.rows, task, loader, compute.get(task), bar)
            finally:
                self.model.set_task(before)
        names = dict.fromkeys(name for found in results.values() for name in found)
        return {**results, "mean": {n: float(np.mean([m[n] for m in results.values() if n in m])) for n in names}}

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
        settings = {"objective": self.rows.objective_names, "steps": steps}
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
            "the objective": self.rows.objective_names,
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


def _checked(name, datasets, tasks):
    if not isinstance(datasets, dict | None):
        raise ValueError(f"`{name}` is a {type(datasets).__name__}; it must be {{task: Dataset}}.")
    for task, dataset in (datasets or {}).items():
        if task not in tasks:
            known = ", ".join(map(repr, tasks))
            raise ValueError(f"`{name}` has the task {task!r}, which the model does not have. Its tasks: {known}.")
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"`{name}[{task!r}]` is a {type(dataset).__name__}; it must be a `datasets.Dataset`. "
                "For a stream, call `trainer.step(task, batch)`."
            )
        if len(dataset) == 0:
            raise ValueError(f"`{name}[{task!r}]` is empty; leave the task out or give it samples.")
    return datasets


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
