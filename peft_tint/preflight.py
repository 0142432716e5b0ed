"""What experts have in common with their base model and with each other, before anything is merged."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from ._structure import unit_name
from .checkpoints import meta_model, open_checkpoint
from .experts import expert_problems, lazy_task_vector, load_expert, match_vocabulary
from .merging._checkpoints import inspect_checkpoint, stored_expert
from .merging._models import check_base
from .merging._stack import gram, norm, stack
from .tint.config import check_task_name


@dataclass
class ExpertsReport:
    """What `check_experts` returns. As a string it is a summary, and a table of norms and cosines by block."""

    architecture: str
    shapes: dict[str, tuple[int, ...]]  # of the base's tensors, tied ones once
    tied: list[list[str]]  # the names of each tensor of the base that has more than one
    dtypes: dict[str, list[str]]  # of the floats, by task, and of the "base"
    tokens: dict[str, int]  # rows of the embeddings, by task, and of the "base"; 0 for models without a vocabulary
    problems: dict[str, list[str]] = field(default_factory=dict)  # task -> why it cannot be merged, each with a remedy
    notes: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)  # those without problems, in the order of the axes below
    grams: dict[str, torch.Tensor] = field(default_factory=dict)  # tensor -> (tasks, tasks), inner products, float64
    base_norms: dict[str, float] = field(default_factory=dict)  # of the same tensors

    @property
    def mergeable(self) -> bool:
        return not any(self.problems.values())

    def norms(self, granularity: str = "block") -> dict[str, torch.Tensor]:
        """{unit: the norms of the task vectors, (tasks,)}; units are what shares a coefficient in a tint."""
        return {unit: products.diag().sqrt() for unit, products in self._by_unit(granularity).items()}

    def cosines(self, granularity: str = "block") -> dict[str, torch.Tensor]:
        """{unit: the cosines between the task vectors, (tasks, tasks)}; NaN with a task that changed nothing."""
        norms, products = self.norms(granularity), self._by_unit(granularity)
        return {unit: products[unit] / norms[unit].outer(norms[unit]) for unit in norms}

    def _by_unit(self, granularity):
        grams = {}
        for name, products in self.grams.items():
            module, _, leaf = name.rpartition(".")
            unit = unit_name(granularity, module, leaf)
            grams[unit] = grams.get(unit, 0) + products
        return grams

    def __str__(self):
        return "\n".join([*self._summary(), *self._table()])

    def _summary(self):
        parameters = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        tokens = f", {self.tokens['base']} tokens" if self.tokens["base"] else ""
        yield (
            f"Base model: {self.architecture}, {parameters / 1e6:.4g}M parameters in {len(self.shapes)} tensors, "
            f"{' and '.join(self.dtypes['base'])}{tokens}"
        )
        for names in self.tied:
            yield f"Tied: {' = '.join(names)}"
        base_norm = sum(norm**2 for norm in self.base_norms.values()) ** 0.5
        for task, problems in self.problems.items():
            if problems:
                yield f"{task}: CANNOT be merged"
                yield from (f"  - {problem}" for problem in problems)
                continue
            row = self.tasks.index(task)
            squares = [products[row, row].item() for products in self.grams.values()]
            yield (
                f"{task}: can be merged, {' and '.join(self.dtypes[task])}, changed {len(squares) - squares.count(0)} "
                f"of {len(squares)} tensors, |task vector| / |base| = {sum(squares) ** 0.5 / (base_norm or 1):.3g}"
            )
        yield from (f"Note: {note}" for note in self.notes)

    def _table(self):
        """The norms of each task; the mean of the cosines of all pairs and the lowest of them."""
        if not self.grams:
            return
        norms = self.norms() | {"all": self.norms("model")["model"]}
        cosines = self.cosines() | {"all": self.cosines("model")["model"]}
        pairs = torch.triu_indices(len(self.tasks), len(self.tasks), 1)
        rows = [["norm of task vectors", *self.tasks, "mean cosine", "lowest"]]
        for unit, of_tasks in norms.items():
            own = cosines[unit][pairs[0], pairs[1]]
            own = own[~own.isnan()]
            ends = [own.mean().item(), own.min().item()] if len(own) else []
            ends = [f"{round(value, 3) + 0.0:.3f}" for value in ends] or ["-", "-"]  # + 0.0 makes -0.0 positive
            rest = any(other.startswith(f"{unit}.") for other in norms)  # what of it is in none of its blocks
            rows.append([f"{unit} (rest)" if rest else unit, *(f"{value:.3g}" for value in of_tasks), *ends])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        yield ""
        for name, *values in rows:
            cells = (f"{value:>{width}}" for value, width in zip(values, widths[1:], strict=True))
            yield "  ".join([f"{name:{widths[0]}}", *cells])


@torch.no_grad()
def check_experts(
    base: nn.Module | str | os.PathLike | dict,
    experts: Mapping[str, str | os.PathLike | dict | nn.Module],
    common_vocabulary: bool = False,
) -> ExpertsReport:
    """Prints and returns what can be merged and what cannot, and how far the experts are from the base and each other.

    With a model as `base`, the experts are those of `merge` and `TintConfig`; with a folder, Hub id or {"id",
    "revision", "subfolder"}, they are folders as in `merge_checkpoints`, and no model is loaded. Each kind of problem
    of each expert is told: another architecture or setting, tensors that are missing, extra, of another shape,
    quantised, tied otherwise or not finite, buffers that differ, another base model; but of an expert that cannot be
    loaded, or has another number of tokens (`common_vocabulary` as in `merge`), only that. Norms and cosines are those
    of the task vectors, of what a merge changes.

    Raises ValueError for a base that nothing can be merged into (not finite, quantised, with an adapter, no checkpoint)
    and for names of tasks that are not allowed.
    """
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError(f"`experts` is {experts!r}; give {{task: expert}}, at least one.")
    if isinstance(base, nn.Module):
        model, config, architecture = base, getattr(base, "config", None), type(base).__name__
        structure = check_base(base, experts)
    else:
        for task in experts:
            check_task_name(task)
        base = open_checkpoint("The base model", base)
        model, config = meta_model(base.config), base.config
        structure, _ = inspect_checkpoint(base, model)
        architecture = type(config).__name__ if model is None else type(model).__name__
    tensors, places = structure.tensors, {}
    for name, tensor in tensors.items():
        places.setdefault(id(tensor), []).append(name)
    report = ExpertsReport(
        architecture,
        shapes={names[0]: tuple(tensors[names[0]].shape) for names in places.values()},
        tied=[names for names in places.values() if len(names) > 1],
        dtypes={"base": _float_types(tensors)},
        tokens={"base": _count_tokens(tensors, structure)},
    )
    if model is None and config is not None:
        report.notes.append("transformers has no such class: nothing is known of head, buffers and tied tensors.")
    sound = {}
    for task, source in experts.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                expert = _load(task, source, base, model)
                report.dtypes[task] = _float_types(expert.tensors)
                report.tokens[task] = _count_tokens(expert.tensors, structure)
                expert = match_vocabulary(expert, tensors, structure.vocabulary, common_vocabulary)
                problems = list(expert_problems(expert, tensors, structure.head, structure.fixed, config))
            except ValueError as error:
                problems = [str(error)]
            except Exception as error:  # whatever an odd file makes of a loader, the other experts are to be checked
                problems = [f"Expert {task!r} cannot be loaded ({type(error).__name__}: {error})."]
        report.problems[task] = problems
        report.notes += [str(warning.message) for warning in caught if warning.category is UserWarning]
        if not problems:
            sound[task] = expert
    report.tasks = sorted(sound)
    merged = [name for name in report.shapes if name not in structure.fixed]
    if any(_own_shapes(expert, tensors, structure.head) for expert in sound.values()):
        report.notes.append("Heads differ in shape: TINT and per-task methods keep each task's, others the base's.")
        merged = [name for name in merged if name not in structure.head]
    task_vectors = {task: lazy_task_vector(expert, tensors, merged) for task, expert in sound.items()}
    for name in merged if sound else ():
        report.grams[name] = gram(stack(task_vectors, name).view(len(sound), -1))
        report.base_norms[name] = norm(tensors[name])
    print(report)
    return report


def _load(task, source, base, model):
    if isinstance(base, nn.Module):
        return load_expert(task, source, base)
    return stored_expert(task, open_checkpoint(f"Expert {task!r}", source), model)


def _float_types(tensors):
    return sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})


def _count_tokens(tensors, structure):
    return max((len(tensors[name]) for name in structure.vocabulary & tensors.keys()), default=0)


def _own_shapes(expert, tensors, head):
    own = expert.by_tensor(tensors)
    return [name for name in head if own[id(tensors[name])].shape != tensors[name].shape]
