"""The experts inside of a saved tint: task vectors as DTS packs them, and their own heads and tint layers whole."""

from collections.abc import Iterable, Mapping

import torch

from ..dts.codec import encode
from ..task_vectors import LazyTensors

PREFIX = "base_model.model.tint_experts."  # then TASK.codes.TENSOR or TASK.whole.TENSOR


def is_expert_key(key: str) -> bool:
    """Also of a model that is no PeftModel, where keys have no prefix."""
    return key.removeprefix("base_model.model.").startswith("tint_experts.")


def pack_expert(
    task: str, task_vector: Mapping[str, torch.Tensor], whole: Mapping[str, torch.Tensor], **arguments
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """What the file has of an expert, {key: tensor} on the CPU, and the names of the tensors that it has not changed.

    `arguments` are those of `encode`. The same experts give the same bytes.
    """
    names = {f"{PREFIX}{task}.codes.{name}": name for name in task_vector}  # whose bytes count as well
    packed = encode(LazyTensors(names, lambda key: task_vector[names[key]]), **arguments)
    unchanged = [name for key, name in names.items() if key not in packed]
    for name, tensor in whole.items():
        packed[f"{PREFIX}{task}.whole.{name}"] = tensor.detach().to("cpu", copy=True)
    return packed, unchanged


def split_experts(
    packed: dict[str, torch.Tensor], changeable: Iterable[str], whole: Iterable[str], unchanged: dict[str, list[str]]
) -> dict[str, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Of each task in `unchanged` the codes and the whole tensors, {name: tensor}.

    Raises ValueError unless there are just those of `changeable` that a task has changed, and all of `whole`."""
    experts, left = {}, dict(packed)
    for task, names in unchanged.items():
        same = set(names)
        codes = {name: f"{PREFIX}{task}.codes.{name}" for name in changeable if name not in same}
        layers = {name: f"{PREFIX}{task}.whole.{name}" for name in whole}
        lacking = [name for keys in (codes, layers) for name, key in keys.items() if key not in left]
        if lacking:
            _refuse(task, f"lacks {len(lacking)} tensors, such as {min(lacking)!r}")
        experts[task] = tuple({name: left.pop(key) for name, key in keys.items()} for keys in (codes, layers))
    for key in left:
        task, _, name = key.removeprefix(PREFIX).partition(".")
        _refuse(task, f"has {len(left)} tensors too many, such as {name!r}")
    return experts


def _refuse(task, problem):
    raise ValueError(
        f"The saved expert {task!r} {problem}. The adapter's file is damaged, or was made for another base model. "
        "Download or save it again, and use the base model that it was made for."
    )
