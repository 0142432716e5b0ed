"""A TINT model and its experts as what training and evaluation compare: rows of outputs or features, task by task."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from .data import EXPERT_ROWS
from .objectives import OBJECTIVES, Objective
from .outputs import BY_LABELS, LABELS, OF_LANGUAGE, Output, inputs_of, kind_of, mask_of, read_output
from .shortened import LARGE, Shortened, complete


class Forward(NamedTuple):
    output: Output
    compared: Output  # the same, or the features that the objective compares


class Rows:
    """Runs the model, and its experts, on batches.

    `kind` is that of all tasks, see `kind_of`; `objectives` are {task: Objective}, by which it is decided what is
    compared. Raises ValueError for an objective that does not fit one of `tasks`.
    """

    def __init__(self, model: nn.Module, objective, tasks: list[str], accelerator: Accelerator, autocast):
        self.model, self.accelerator, self.autocast = model, accelerator, autocast
        self.kind = kind_of(self.base)
        self.objectives = self._choose(objective, tasks)

    @property
    def base(self) -> nn.Module:
        return self.model.get_base_model()

    @property
    def has_vocabulary(self) -> bool:
        """Whether the expert's rows are so wide that they are shortened where they are kept for training."""
        return (
            self.kind in OF_LANGUAGE
            and getattr(self.base.config.get_text_config(decoder=True), "vocab_size", 0) >= LARGE
        )

    def shortens(self, task: str) -> bool:
        """A function of the user's may want more than a distribution."""
        return self.has_vocabulary and self.objectives[task].compares == "classes"

    # ---- what is compared --------------------------------------------------------------------------------------------

    def _choose(self, objective, tasks) -> dict[str, Objective]:
        given = objective if isinstance(objective, dict) else dict.fromkeys(self.model.tasks, objective)
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
            if not (isinstance(objective, dict) and known.compares == "any"):
                known = self._fitting(task, known)
            if task in tasks or not tasks:
                self._check(task, known)
            objectives[task] = known
        return objectives

    def _fitting(self, task, objective):
        problem = self.problem(task)
        if problem == "number" and objective.compares != "features":
            return Objective(OBJECTIVES["feature_l1"].function)
        return OBJECTIVES["bce"] if problem == "labels" and objective is OBJECTIVES["soft_pseudo_label"] else objective

    def _check(self, task, objective):
        problem, name, compares = self.problem(task), objective.__name__, objective.compares
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

    def problem(self, task: str, output: Output | None = None) -> str:
        """What a row of the task is: "classes" of which one is right, "labels" that each is right or not, a "number",
        or "features" of an encoder without a head."""
        if self.kind in ("features", "depth"):
            return "features" if self.kind == "features" else "number"
        labels = self.model.task_labels(task)
        known = labels.get("problem_type") if self.kind not in (*OF_LANGUAGE, "tokens", "span", "frames") else None
        single = not known and len(labels.get("id2label") or "ab") == 1 and self.kind is None
        if known == "multi_label_classification":
            return "labels"
        if known == "regression" or single or (output is not None and output.values.shape[-1] == 1):
            return "number"
        return "classes"

    def objective(self, task: str, output: Output | None = None) -> Objective:
        """That of a task, whose output may tell what its config does not."""
        objective = self.objectives[task]
        if objective.compares in ("classes", "labels") and self.problem(task, output) == "number":
            return Objective(OBJECTIVES["feature_l1"].function)
        return objective

    def compares_classes(self, task: str, output: Output | None = None) -> bool:
        """Whether what the objective compares are scores of classes of which one is right."""
        return self.problem(task, output) == "classes" and self.objectives[task].compares != "features"

    @property
    def objective_names(self) -> str | dict[str, str]:
        names = {task: objective.__name__ for task, objective in self.objectives.items()}
        return names.popitem()[1] if len({*names.values()}) == 1 else names

    def autocasting(self):
        return torch.autocast(self.accelerator.device.type, self.autocast, self.autocast is not None)

    # ---- forwards ----------------------------------------------------------------------------------------------------

    def forward(self, task: str, batch: dict, evaluating: bool = False) -> Forward:
        """`evaluating`: labels are read where they do not say what counts, too, and outputs are compared, not the
        features that an objective wants."""
        inputs = {name: value for name, value in batch.items() if name != EXPERT_ROWS}
        if not (evaluating or self.kind in BY_LABELS):
            inputs = {name: value for name, value in inputs.items() if name not in LABELS}
        features, hooks = [], []
        if not evaluating and self.objectives[task].compares == "features" and self.model.head_layers:
            head = self.model.head_layers[0]
            hooks = [head.register_forward_pre_hook(lambda module, args: features.append(args[0]))]
        try:
            with self.autocasting():
                result = self.model(**inputs_of(self.base, self.kind, inputs, task))
        finally:
            for hook in hooks:
                hook.remove()
        output = read_output(result, self.base, self.kind, inputs, task)
        return Forward(output, self._features(features[0], output, inputs) if features else output)

    def _features(self, features, output, inputs):
        """Those of the positions that count, of which the head may have got others than it gives."""
        values, mask = _positions(features), mask_of(self.base, self.kind, inputs)
        if values.shape[:2] == output.values.shape[:2]:
            return Output(values, values, output.counts)
        return Output(values, values, mask.bool() if mask is not None and mask.shape == values.shape[:2] else None)

    @torch.no_grad()
    def of_expert(self, task: str, batch: dict, evaluating: bool = False) -> torch.Tensor | Shortened:
        """The rows that came with the batch, or of a forward of the expert on it."""
        if EXPERT_ROWS in batch:
            return batch[EXPERT_ROWS]
        with self.model.expert(task):
            return self.forward(task, batch, evaluating).compared.rows()

    def of_all_processes(self, rows: torch.Tensor | None) -> torch.Tensor | None:
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

    @torch.no_grad()
    def match(self, task: str, rows: torch.Tensor, expert_rows: torch.Tensor | Shortened) -> torch.Tensor:
        """The expert's rows as large as the model's, of all classes."""
        if isinstance(expert_rows, Shortened) and len(rows) == len(expert_rows.values):
            return complete(expert_rows, rows) if len(rows) else rows
        shape = expert_rows.values.shape if isinstance(expert_rows, Shortened) else expert_rows.shape
        if rows.shape != shape and len(rows) + shape[0] > 0:
            raise ValueError(
                f"Task {task!r}: the merged model gives outputs of shape {tuple(rows.shape)}, its expert gave "
                f"{tuple(shape)}. Padding must be marked by an `attention_mask`, and a transform must give the same "
                "sizes each time; else set `expert_rows='online'`."
            )
        return expert_rows


def _positions(features):
    """Inputs of a head as (samples, positions, features)."""
    if features.ndim == 4:
        return features.flatten(2).transpose(1, 2)
    return features[:, None] if features.ndim == 2 else features
