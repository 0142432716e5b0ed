"""Trains coefficients and tint layers at test time, on unlabelled data with the experts' pseudo-labels."""

import math
import os
import sys
import time
import warnings
from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object, set_seed
from datasets import Dataset
from peft import get_peft_model_state_dict
from tqdm.auto import tqdm
from transformers import get_scheduler
from transformers.trainer_utils import TrainOutput

from .._card import FILE, read_card, save_card
from ..checkpoints import added_files, new_folder
from ..hub import push_adapters
from . import heads
from .arguments import DECISIVE, DECISIVE_OF_MODEL, TintTrainingArguments
from .batches import Batches
from .callbacks import Callbacks, held_interrupt
from .collapse import CollapseGuard, Snapshot, Window
from .data import EXPERT_ROWS, by_task, length_of
from .evaluating import evaluate
from .gradient_checkpointing import checkpointed, checkpointing
from .outputs import BY_LABELS, LABELS
from .precision import choose_autocast, describe_precision
from .progress import Progress
from .resuming import (
    check_output_dir,
    check_settings,
    find_checkpoint,
    random_state,
    read_state,
    remove_old_checkpoints,
    set_random_state,
    write_state,
)
from .rows import Rows
from .updates import Updates


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
        train_dataset: {task: dataset}, for all tasks or some of them, in the columns that the model's forward takes;
            of a model with one task the dataset alone. The experts' outputs are kept beside a `datasets.Dataset`; for
            PyTorch's `Dataset` and `IterableDataset`s, and those of `datasets`, the expert runs beside the model. None
            for a stream (`step`).
        eval_dataset: the like; with labels (a column `label` or `labels`) it gives accuracies.
        objective: a name in `OBJECTIVES`, a function `(logits, expert_logits, mask) -> loss` on rows of shape
            (rows, classes), an `Objective`, or {task: one of these}. Where one is given for all tasks, regression takes
            the mean absolute difference to the expert, and multi-label tasks "bce" for "soft_pseudo_label".
        data_collator: makes a batch of a list of samples; default: padding by `processing_class`, else stacking.
        processing_class: a tokenizer, image processor or other, saved with the model.
        compute_metrics: `EvalPrediction -> {name: number}`, or {task: such a function}. It gets what
            `transformers.Trainer` would give it: predictions (samples, ...) and labels, padded with -100.
        callbacks: functions `(trainer, logs)`, called with each entry of the log, and `transformers.TrainerCallback`s.

    Raises ValueError for a model without TINT, a task that the model does not have, an empty dataset, an unknown
    objective, and where Accelerate is configured to shard the model.
    """

    def __init__(
        self,
        model,
        args: TintTrainingArguments | None = None,
        train_dataset: dict[str, Dataset] | Dataset | None = None,
        eval_dataset: dict[str, Dataset] | Dataset | None = None,
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
        self.train_dataset = by_task("train_dataset", train_dataset, model.tasks)
        self.eval_dataset = by_task("eval_dataset", eval_dataset, model.tasks)
        self.processing_class, self.compute_metrics = processing_class, compute_metrics
        self.callbacks = Callbacks(callbacks)
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
        self.updates = self.progress = None  # of the training that goes on

    @property
    def model(self):
        return self.rows.model

    @model.setter
    def model(self, model):
        self.rows.model = model

    @property
    def max_steps(self) -> int:
        """Of the whole training. An epoch is one pass over the largest task's data."""
        args = self.args
        if args.num_train_epochs is None or self.train_dataset is None:
            return args.max_steps
        lengths = {task: length_of(dataset) for task, dataset in self.train_dataset.items()}
        if None in lengths.values():
            raise ValueError("`num_train_epochs` is set, and a dataset has no length; set `max_steps`.")
        samples = args.per_device_train_batch_size * self.accelerator.num_processes
        batches = math.ceil(max(lengths.values()) / samples)
        return math.ceil(args.num_train_epochs * batches / args.gradient_accumulation_steps)

    # ---- training ----------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: bool | str | os.PathLike | None = None) -> TrainOutput:
        """Trains for `max_steps`, or `num_train_epochs`; the result is in the model. Returns steps, mean loss and run
        time. Where one process saves checkpoints, Ctrl-C saves one at the end of the step, and ends the program.

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
            layers = [name for name, module in self.rows.base.named_modules() if module in self.model.tint_layers]
            print(
                f"Training {', '.join(self.train_dataset)} on {self.accelerator.device} in {self.precision}: "
                f"{self.progress.coefficients.numel():,} coefficients{(layers and ', and of each task ') or ''}"
                f"{', '.join(layers)}",
                file=sys.stderr,
                flush=True,
            )
        try:
            if args.report_to != "none":
                scalars = {k: v for k, v in vars(args).items() if isinstance(v, int | float | str)}
                self.accelerator.init_trackers("peft_tint", {**scalars, "precision": self.precision})
            self._train(saved)
            self._tell("on_train_end")
        finally:
            progress = self.progress
            self._finish()
            self.model.set_task(before)
        loss = progress.loss / max(progress.batches, 1)
        metrics = {"train_runtime": time.perf_counter() - started, "train_loss": loss}
        return TrainOutput(progress.step, loss, metrics)

    def _train(self, saved):
        """The loop."""
        args, progress = self.args, self.progress
        if saved:
            self._load_state(*saved[:2])
        self._tell("on_train_begin")
        done = progress.step * args.gradient_accumulation_steps  # batches of each task
        batches = {task: self.batches.endless(task, data, done) for task, data in self.train_dataset.items()}
        scheduler = self._scheduler()
        if saved:
            set_random_state(saved[2][self.accelerator.process_index])  # last, for what was before may have drawn
        else:
            if args.load_best_model_at_end:
                self._evaluate_state()
            with self.model.reuse_merged_weights():
                self._fit_heads()
        with held_interrupt(bool(args.save_steps) and self.accelerator.num_processes == 1) as interrupted:
            bar = self._bar("tinting", range(progress.step + 1, self.max_steps + 1))
            for step in bar:
                progress.step = step
                self._tell("on_step_begin")
                self._step(batches)
                with warnings.catch_warnings():  # of steps without an update, for which nothing was to learn
                    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
                    scheduler.step()
                self._tell("on_step_end")
                if self._end_step(bar, interrupted):
                    break
        if interrupted and progress.step < self.max_steps and not progress.collapsed:
            raise SystemExit(
                f"Interrupted after step {progress.step}; `train(resume_from_checkpoint=True)` goes on from there."
            )
        if args.load_best_model_at_end:
            best = progress.best
            self._log({"step": progress.step, "best_step": best.step, f"best_{args.metric_for_best_model}": best.value})
            self.updates.set(best.parameters)

    def _scheduler(self):
        args, steps = self.args, self.max_steps
        name = args.lr_scheduler_type
        name = "constant_with_warmup" if name == "constant" and args.warmup_steps else name
        last = {"last_epoch": self.progress.step - 1}
        return get_scheduler(name, self.updates.optimizer, args.warmup_steps, steps, last)

    def _step(self, batches):
        """Visits every task once, in random order."""
        args, progress = self.args, self.progress
        tasks = [list(batches)[i] for i in torch.randperm(len(batches), generator=progress.order)]
        for group in [tasks] if args.update == "joint" else [[task] for task in tasks]:
            passes = [task for task in group for _ in range(args.gradient_accumulation_steps)]
            # the guard's forwards by the start's coefficients would be kept beside
            reuses = len(passes) > 1 and progress.guard is None
            with self.model.reuse_merged_weights() if reuses else nullcontext():
                for task in passes:
                    self._backward(task, next(batches[task]), args.gradient_accumulation_steps)
            self.updates.step()

    def _end_step(self, bar, interrupted: list) -> bool:
        """Logs, evaluates and saves where it is time to; returns whether the training ends here before its end."""
        args, progress, step = self.args, self.progress, self.progress.step
        last = step == self.max_steps or self.callbacks.take("should_training_stop")
        is_logged = step % args.logging_steps == 0 or last
        if is_logged:
            bar.set_postfix(progress.window.fetch().summary())
            progress.collapsed = self._end_window()
        if progress.collapsed:
            return True
        if self.callbacks.take("should_evaluate") or (args.eval_steps and (step % args.eval_steps == 0 or last)):
            self._evaluate_state()
        if self.callbacks.take("should_training_stop"):  # by what it was told of just now
            last = True
            if not is_logged:
                self._end_window()
        saves = bool(args.save_steps) and (step % args.save_steps == 0 or last or bool(interrupted))
        if self.callbacks.take("should_save") or saves:
            self._save_checkpoint()
        return (last and step < self.max_steps) or bool(interrupted)

    def _fit_heads(self):
        """Each task's head, or final norm, by the objective, to the features that the merged model has at the start.
        Each process does all of it."""
        last, losses = heads.last_layer(self.rows), []
        if not self.args.head_steps or last is None:
            return
        layer, rest = last
        for task, dataset in self.train_dataset.items():
            objective = self.rows.objectives[task]
            if not objective.needs_expert or length_of(dataset) is None:
                continue
            self.model.set_task(task)
            loader = self._bar(f"features of {task}", self.batches.once(task, dataset, evaluating=False), leave=False)
            found = heads.features_of(self.rows, layer, rest, task, loader)
            if found is None:
                continue
            steps = self._bar(f"fitting the last layer of {task}", range(self.args.head_steps), leave=False)
            loss = heads.fit(self.rows, layer, rest, task, objective, *found, self.updates.rate, steps)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"The loss of the last layer of task {task!r} is {loss.item()}. Check its data for NaN, use a "
                    "model in float32 (with `bf16=True`), or lower `learning_rate`."
                )
            losses.append(loss.item())
        self.updates.share()
        if losses:
            self._log({"step": 0, "head_loss": float(np.mean(losses))})

    def _end_window(self) -> bool:
        """Logs the measures since the last entry. Goes back to the best state and returns True if a task collapsed."""
        progress = self.progress
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
        collapsed = guard.collapsed(gains, progress.step, self.updates.copy())
        if collapsed:
            self.updates.set(guard.best.parameters)
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
        if self.updates is None:
            self._prepare()
        used = lambda name: self.rows.kind in BY_LABELS or name not in LABELS  # noqa: E731
        samples = {name: value.to(self.accelerator.device) for name, value in batch.items() if used(name)}
        progress, args = self.progress, self.args
        if progress.collapsed:
            self.model.set_task(task)
            with torch.no_grad():
                return self.rows.forward(task, samples).output.raw.float()
        logits = self._backward(task, samples, 1)
        self.updates.step()
        progress.step += 1
        if progress.step % args.logging_steps == 0:
            progress.collapsed = self._end_window()
            del self.log_history[:-100]
        return logits

    def _prepare(self):
        """Makes the optimizer, and what goes on beside it."""
        args = self.args
        self.model.eval()
        self.updates = Updates(self.model, args, self.accelerator)
        self.progress = Progress(torch.Generator().manual_seed(args.seed), self.model.coefficients().values)
        if args.collapse_guard is not None:
            self.progress.guard = CollapseGuard(args.collapse_guard, self.updates.copy())
        self._checkpointed = checkpointed(self.model)

    def _finish(self):
        self.updates = None
        self.accelerator.free_memory()
        if self.args.report_to != "none":
            self.accelerator.end_training()

    def _backward(self, task, batch, share):
        """Adds the gradients of one batch, and its measures to those of the window; returns its logits."""
        self.model.set_task(task)
        rows, progress = self.rows, self.progress
        needs_expert = rows.objectives[task].needs_expert or progress.guard is not None
        expert_rows = rows.of_expert(task, batch) if needs_expert else batch.get(EXPERT_ROWS)
        start_rows = self._start_rows(task, batch) if progress.guard is not None else None
        with checkpointing(self._checkpointed):
            output, compared = rows.forward(task, batch)
        ours = compared.rows()
        objective = rows.objective(task, output)
        if expert_rows is not None:
            expert_rows = rows.match(task, ours, expert_rows)
        ours, expert_rows = rows.of_all_processes(ours), rows.of_all_processes(expert_rows)
        loss = objective(ours, expert_rows, None)
        self.updates.add(loss, share)
        progress.window.add(task, loss=loss)
        if objective.kept is not None:
            progress.window.add(task, kept=objective.kept(ours, expert_rows).float().mean())
        if expert_rows is not None and len(ours) and rows.compares_classes(task, output):
            predicted, expected = ours.argmax(-1), expert_rows.argmax(-1)
            progress.window.add(task, agreement=_share_equal(predicted, expected))
            if rows.kind != "span":  # whose classes are the tokens of a batch
                progress.window.add_classes(task, predicted, expected, ours.shape[-1])
            if start_rows is not None:
                progress.window.add(task, start_agreement=_share_equal(start_rows.argmax(-1), expected))
        return output.raw.detach().float()

    @torch.no_grad()
    def _start_rows(self, task, batch):
        """What the parameters of the start give for a batch."""
        parameters = self.updates.parameters()
        now = {name: parameter.data for name, parameter in parameters.items()}
        try:
            for name, value in self.progress.guard.start.parameters.items():
                parameters[name].data = value.to(now[name].device)
            return self.rows.of_all_processes(self.rows.forward(task, batch).compared.rows())
        finally:
            for name, value in now.items():
                parameters[name].data = value

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, eval_dataset: dict[str, Dataset] | Dataset | None = None) -> dict[str, dict[str, float]]:
        """Metrics of each task, and their means as the entry "mean".

        `agreement` is how often the merged model predicts the expert's class, or says yes or no to a label as the
        expert does; it needs no labels. With labels, each
        metric is given for the merged model, for the expert (`expert_...`), and as their ratio (`normalized_...`):
        accuracy where one class is right, with perplexity for language models and mean IoU for segmentation; F1 (micro)
        and subset accuracy where several are; MAE, MSE and Pearson's correlation of numbers; exact match and F1 of
        spans. `compute_metrics` takes their place. Positions labelled -100 do not count, nor do segmentation's
        `semantic_loss_ignore_index`. Raises ValueError for labels that cannot be compared with the output.
        """
        datasets = by_task("eval_dataset", eval_dataset, self.model.tasks) or self.eval_dataset
        if not datasets:
            raise ValueError("`eval_dataset` is missing; give {task: Dataset}.")
        before, results, compute = self.model.task, {}, self.compute_metrics
        compute = compute if isinstance(compute, dict) else dict.fromkeys(datasets, compute)
        # a metric of the user's gets the logits of all tokens
        loaders = {task: self.batches.shared(task, data, compute.get(task) is None) for task, data in datasets.items()}
        batches = sum(length_of(loader) or 0 for loader in loaders.values()) or None
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
        results, step, best = self.evaluate(), self.progress.step, self.progress.best
        found = {f"eval_{task}_{name}": value for task, own in results.items() for name, value in own.items()}
        self._log({"step": step, **found})
        self._tell("on_evaluate", metrics=found | {f"eval_{name}": value for name, value in results["mean"].items()})
        if not self.args.load_best_model_at_end:
            return
        name = self.args.metric_for_best_model
        if name not in results["mean"]:
            known = ", ".join(results["mean"]) or "none; give labels and `compute_metrics`"
            raise ValueError(f"`metric_for_best_model` is {name!r}; there are: {known}.")
        value = results["mean"][name]
        if best is None or (value > best.value if self.args.greater_is_better else value < best.value):
            self.progress.best = Snapshot(step, value, self.updates.copy())

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
        args, progress = self.args, self.progress
        check_output_dir(args.output_dir, progress.step - 1)  # a callback may have asked where nothing was to be saved
        tensors, state = progress.save()
        state |= {"settings": self._settings(), "log_history": self.log_history}
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        random_states = gather_object([random_state()])
        if self.accelerator.is_main_process:
            with new_folder(os.path.join(args.output_dir, f"checkpoint-{progress.step}")) as folder:
                self.model.save_pretrained(folder)
                self._save_processing_class(folder)
                write_state(folder, tensors | self.updates.tensors(), state, random_states)
            remove_old_checkpoints(args.output_dir, args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._tell("on_save")

    def _read_checkpoint(self, folder):
        """What `_save_checkpoint` saved of this very training: tensors, state, and random states of the processes."""
        tensors, state, random_states = read_state(folder)
        parameters = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        check_settings(folder, state["settings"], self._settings(), tensors["parameters"], parameters)
        if state["step"] > self.max_steps:
            raise ValueError(f"`max_steps` is {self.max_steps}, and {folder!r} is of step {state['step']}.")
        return tensors, state, random_states

    def _load_state(self, tensors, state):
        self.updates.load(tensors)
        self.progress.load(tensors, state)
        self.log_history = state["log_history"]
        if "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _settings(self):
        """What decides a training and must be the same when it is resumed, as JSON has it. Of the data the number of
        samples: their fingerprints may be random."""
        config = self.model.peft_config[self.model.active_adapter].to_dict()
        # the rate of a step that falls to zero is decided by the last one
        last = {} if self.args.lr_scheduler_type == "constant" else {"`max_steps`": self.max_steps}
        return {
            **{f"`{name}`": getattr(self.args, name) for name in DECISIVE},
            **last,
            **{f"`{name}` of the model": config[name] for name in DECISIVE_OF_MODEL},
            "the objective": self.rows.objective_names,
            "the number of samples of each task": [[task, length_of(d)] for task, d in self.train_dataset.items()],
            "the number of processes": self.accelerator.num_processes,
            "the precision": self.precision,
        }

    # ---- beside ------------------------------------------------------------------------------------------------------

    def _is_quiet(self):
        return self.args.disable_tqdm or not self.accelerator.is_main_process

    def _bar(self, description, items=None, total=None, leave=True):
        return tqdm(items, description, total, leave, disable=self._is_quiet())

    def _log(self, logs):
        self.log_history.append(logs)
        self.accelerator.log({k: v for k, v in logs.items() if k not in ("step", "precision")}, step=logs["step"])
        if not self._is_quiet():
            of_tasks = tuple(f"_{task}" for task in self.model.tasks)
            shown = {k: v for k, v in logs.items() if k != "precision" and not k.endswith(of_tasks)}
            shown |= {k: float(f"{v:.4g}") for k, v in shown.items() if not isinstance(v, int)}
            tqdm.write(str(shown), file=sys.stderr)
        for callback in self.callbacks.functions:
            callback(self, logs)
        self._tell("on_log", logs=logs)

    def _tell(self, event, **more):
        self.callbacks.call(event, self, **more)


def _share_equal(ours, theirs):
    return (ours == theirs).float().mean()
