"""Merging of models: experts to task vectors, and what is merged onto the base. Knows `tint`, unlike the methods."""

import copy
import math
import os
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from .._structure import Structure, find_head, inspect_model, named_tensors, plain_modules
from ..experts import (
    check_expert,
    check_finite,
    check_unquantised,
    expert_labels,
    expert_module,
    is_finite,
    lazy_task_vector,
    load_expert,
    match_vocabulary,
    set_labels,
)
from ..tint.config import check_task_name
from ._registry import check_method, merge_tensors


@torch.no_grad()
def merge(
    base: nn.Module,
    experts: Mapping[str, str | os.PathLike | dict | nn.Module],
    method: str = "ties",
    scale: float = 1.0,
    per_tensor: bool = False,
    common_vocabulary: bool = False,
    **kwargs,
) -> nn.Module | dict[str, nn.Module]:
    """The base plus `scale` times the merged task vector, as a copy of `base`; {task: copy} for a per-task method.

    `experts` is {task: Hub id, folder, module, PeftModel or state dict}, as in `TintConfig.experts`; LoRA experts count
    by their exact deltas. `method` is one of `MERGING_METHODS`, `kwargs` are its own, and `per_tensor` is as in
    `merge_task_vectors`. Nothing that is given is changed. Task vectors are merged in float32, one tensor at a time,
    and the result has the base's dtypes.

    - All parameters are merged, tied ones once. Buffers stay the base's, and the experts' must be equal to them.
    - A one-model method merges the head as all else if every expert's has the base's shapes. If one has not, no part of
      the head is merged: it stays the base's, with a warning, and outputs need the experts' own heads.
    - A per-task method gives each task its expert's own head and labels, merges the rest, and returns K whole models.
    - Experts with another number of tokens are refused, unless `common_vocabulary=True`: then the rows of the
      embeddings that both have are merged, by their number, the expert's further ones are left out, and a warning
      says so.
    - The config, with its names of labels, stays the base's under a one-model method.

    Raises ValueError for an unknown method or argument, and for an expert that does not fit (see `check_expert`).
    """
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError(
            f"`experts` is {experts!r}; give {{task: Hub id, folder, module or state dict}}, at least one."
        )
    per_task = check_method(method, kwargs, per_tensor, len(experts)).per_task
    check_scale(scale)
    tensors, buffers, in_head, vocabulary = check_base(base, experts)
    modules = dict(plain_modules(base))
    head = find_head(base, modules)
    names = {}  # of what is merged; a tied parameter once, by its first name
    for name in tensors:
        if name not in buffers and not (per_task and name in in_head):
            names.setdefault(id(tensors[name]), name)
    loaded, heads, labels = {}, {}, {}
    for task, source in experts.items():
        expert = match_vocabulary(load_expert(task, source, base), tensors, vocabulary, common_vocabulary)
        fixed = buffers - in_head if per_task else buffers
        check_expert(expert, tensors, in_head, fixed, getattr(base, "config", None))
        loaded[task], of_expert = expert, expert.by_tensor(tensors)
        if per_task:
            heads[task] = {name: expert_module(expert, name, modules[name], tensors, of_expert) for name in head}
            labels[task] = expert_labels(expert, base, heads[task].values())
        elif any(of_expert[key].shape != tensors[name].shape for key, name in names.items()):  # only a head's may
            warnings.warn(
                f"The head of expert {task!r} differs from the base's in shape, so {', '.join(head)} of the merged "
                "model stay the base's. Merge by a per-task method, or put an expert's head on the merged model.",
                stacklevel=2,
            )
            names = {key: name for key, name in names.items() if name not in in_head}
    names = list(names.values())
    models = {task: copy.deepcopy(base) for task in (experts if per_task else [""])}
    of_models = {task: named_tensors(dict(plain_modules(model)))[0] for task, model in models.items()}

    def read(scope):
        return {task: lazy_task_vector(expert, tensors, scope) for task, expert in loaded.items()}

    for name, changes in merge_tensors(read, names, method, per_tensor, kwargs):
        for task, change in zip(sorted(models), changes, strict=True):
            of_models[task][name].copy_(add_change(name, tensors[name], change, scale))
    for task in heads:
        for name, module in heads[task].items():
            setattr(models[task], name, module)
        set_labels(models[task], labels[task])
    return models if per_task else models[""]


def check_base(base: nn.Module, tasks) -> Structure:
    """Raises ValueError for names of tasks, and for a model into which nothing can be merged."""
    for task in tasks:
        check_task_name(task)
    if hasattr(base, "peft_config"):
        raise ValueError("The base model has an adapter; give the model without it (`model.unload()`).")
    structure = inspect_model(base)
    check_unquantised(base, structure.tensors, structure.fixed)
    check_finite(structure.tensors)
    return structure


def check_scale(scale):
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ValueError(f"`scale` is {scale!r}; give a number, such as 0.3.")


def add_change(name, weight, change, scale, dtype=None):
    """The weight with `scale` times the change added, in float32 and then rounded once. Uses the change up."""
    merged = (weight + change.mul_(scale)).to(dtype or weight.dtype)
    if not is_finite(merged):
        raise ValueError(f"{name!r} is out of {merged.dtype}'s range with `scale`={scale}; give a smaller one.")
    return merged
