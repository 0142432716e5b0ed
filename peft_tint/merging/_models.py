"""Merging of models: experts to task vectors, and what is merged onto the base. Knows `tint`, unlike the methods."""

import copy
import os
import warnings
from collections.abc import Mapping

import torch
from torch import nn

from ..experts import check_expert, load_expert
from ..tint._plan import check_unquantised, expert_labels, expert_module, set_labels
from ..tint._structure import find_head, is_under, named_tensors, plain_modules
from ._registry import check_method, merge_task_vectors


@torch.no_grad()
def merge(
    base: nn.Module,
    experts: Mapping[str, str | os.PathLike | dict | nn.Module],
    method: str = "ties",
    scale: float = 1.0,
    **kwargs,
) -> nn.Module | dict[str, nn.Module]:
    """The base plus `scale` times the merged task vector, as a copy of `base`; {task: copy} for a per-task method.

    `experts` is {task: Hub id, folder, module, PeftModel or state dict}, as in `TintConfig.experts`; LoRA experts count
    by their exact deltas. `method` is one of `MERGING_METHODS` and `kwargs` are its own. Nothing that is given is
    changed. Task vectors are merged in float32, and the result has the base's dtypes.

    - All parameters are merged, tied ones once. Buffers stay the base's, and the experts' must be equal to them.
    - A one-model method merges the head as all else if every expert's has the base's shapes. If one has not, no part of
      the head is merged: it stays the base's, with a warning, and outputs need the experts' own heads.
    - A per-task method gives each task its expert's own head and labels, merges the rest, and returns K whole models.
    - The config, with its names of labels, stays the base's under a one-model method.

    Raises ValueError for an unknown method or argument, and for an expert that does not fit (see `check_expert`).
    """
    per_task = check_method(method, kwargs).per_task
    if hasattr(base, "peft_config"):
        raise ValueError("The base model has an adapter; give the model without it (`model.unload()`).")
    if not experts:
        raise ValueError("`experts` is empty; give {task: Hub id, folder, module or state dict}.")
    modules = dict(plain_modules(base))
    tensors, buffers = named_tensors(modules)
    check_unquantised(base, tensors, buffers)
    head = find_head(base, modules)
    in_head = {name for name in tensors if is_under(name, head)}
    names = {}  # of what is merged; a tied parameter once, by its first name
    for name in tensors:
        if name not in buffers and not (per_task and name in in_head):
            names.setdefault(id(tensors[name]), name)
    task_vectors, heads, labels = {}, {}, {}
    for task, source in experts.items():
        expert = load_expert(task, source, base)
        fixed = buffers - in_head if per_task else buffers
        check_expert(expert, tensors, in_head, fixed, getattr(base, "config", None))
        of_expert = expert.by_tensor(tensors)
        task_vectors[task] = {
            name: expert.task_vector(name, tensors[name], of_expert[key])
            for key, name in names.items()
            if of_expert[key].shape == tensors[name].shape  # only heads' may differ
        }
        if per_task:
            heads[task] = {name: _own_module(expert, name, modules[name], tensors, of_expert) for name in head}
            labels[task] = expert_labels(expert, base, heads[task].values())
    if any(len(task_vector) < len(names) for task_vector in task_vectors.values()):
        warnings.warn(
            f"The experts' heads differ from the base's in shape, so {', '.join(head)} of the merged model stay the "
            "base's. Merge by a per-task method, or put an expert's head on the merged model.",
            stacklevel=2,
        )
        task_vectors = {t: {n: v for n, v in own.items() if n not in in_head} for t, own in task_vectors.items()}
    merged = merge_task_vectors(task_vectors, method, **kwargs)
    if not per_task:
        return _apply(base, merged, scale)
    models = {}
    for task, task_vector in merged.items():
        models[task] = _apply(base, task_vector, scale)
        for name, module in heads[task].items():
            setattr(models[task], name, module.train(base.training))
        set_labels(models[task], labels[task])
    return models


def _own_module(expert, name, base_module, tensors, of_expert):
    for changed, factors in expert.low_rank.items():
        if is_under(changed, [name]):  # put in place into the module, which is a copy that `load_expert` made
            tensor = of_expert[id(tensors[changed])]
            tensor += factors.dense().view(tensor.shape).to(tensor)
    return expert_module(expert, name, base_module, tensors, of_expert)


def _apply(base, task_vector, scale):
    """A copy of the base with `scale` times the task vector added, in float32 and then rounded once."""
    model = copy.deepcopy(base)
    tensors, _ = named_tensors(dict(plain_modules(model)))
    for name, change in task_vector.items():
        weight = (tensors[name] + scale * change).to(tensors[name].dtype)
        if not torch.isfinite(weight).all():
            raise ValueError(f"{name!r} is out of {weight.dtype}'s range with `scale`={scale}; give a smaller one.")
        tensors[name].copy_(weight)
    return model
