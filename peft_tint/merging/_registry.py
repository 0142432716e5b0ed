"""The merging methods by name, and the call that checks what it is given."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch

from ._stack import tensor_names
from .average import average
from .consensus import consensus, consensus_parts
from .dare import dare, dare_parts
from .dare_ties import dare_ties
from .emr import emr
from .iso_c import iso_c
from .iso_cts import iso_cts
from .karcher import karcher
from .lines import lines, lines_parts
from .magnitude import magnitude, magnitude_parts
from .slerp import slerp
from .tall_masks import tall_masks
from .task_arithmetic import task_arithmetic
from .ties import ties, ties_parts
from .tsv import tsv, tsv_parts
from .wudi import wudi


class MergingMethod(NamedTuple):
    """`function(task_vectors, **kwargs)` yields (name, tensor) of the merged task vector, tensor by tensor, so that not
    all need to be in memory; if `per_task`, a stack of the tasks' own tensors, in the order of the tasks' names.

    `parts(task_vectors, **kwargs)` yields (name, stack) of the tasks' parts, of which `function`'s result is the sum
    (by "sum", where it aggregates): what `TintConfig.transform` puts in the place of the task vectors. `elementwise`
    methods treat all entries alike, and cannot tell a piece of a tensor from a tensor."""

    function: Callable
    paper: str
    per_task: bool = False
    parts: Callable | None = None
    elementwise: bool = False


MERGING_METHODS = {
    "average": MergingMethod(average, "https://arxiv.org/abs/2203.05482", elementwise=True),
    "task_arithmetic": MergingMethod(task_arithmetic, "https://arxiv.org/abs/2212.04089", elementwise=True),
    "ties": MergingMethod(ties, "https://arxiv.org/abs/2306.01708", parts=ties_parts, elementwise=True),
    "dare": MergingMethod(dare, "https://arxiv.org/abs/2311.03099", parts=dare_parts),
    "dare_ties": MergingMethod(dare_ties, "https://arxiv.org/abs/2311.03099"),
    "magnitude": MergingMethod(magnitude, "https://arxiv.org/abs/1506.02626", parts=magnitude_parts, elementwise=True),
    "tall_masks": MergingMethod(tall_masks, "https://arxiv.org/abs/2405.07813", per_task=True, elementwise=True),
    "consensus": MergingMethod(consensus, "https://arxiv.org/abs/2405.07813", parts=consensus_parts, elementwise=True),
    "lines": MergingMethod(lines, "https://arxiv.org/abs/2410.17146", parts=lines_parts),
    "emr": MergingMethod(emr, "https://arxiv.org/abs/2405.17461", per_task=True, elementwise=True),
    "tsv": MergingMethod(tsv, "https://arxiv.org/abs/2412.00081", parts=tsv_parts),
    "iso_c": MergingMethod(iso_c, "https://arxiv.org/abs/2502.04959"),
    "iso_cts": MergingMethod(iso_cts, "https://arxiv.org/abs/2502.04959"),
    "wudi": MergingMethod(wudi, "https://arxiv.org/abs/2503.08099"),
    "slerp": MergingMethod(slerp, "https://doi.org/10.1145/325334.325242"),
    "karcher": MergingMethod(karcher, "https://doi.org/10.1002/cpa.3160300502"),
}


def merge_task_vectors(
    task_vectors: dict[str, dict[str, torch.Tensor]],
    method: str = "task_arithmetic",
    per_tensor: bool = False,
    **kwargs,
):
    """Merges task vectors {task: {tensor name: tensor}} by one of `MERGING_METHODS`; `kwargs` are the method's own.

    Returns one task vector, or {task: task vector} for a per-task method, in float32; what is given stays unchanged.
    `per_tensor=True` takes each tensor for a whole vector: TIES and magnitude pruning then keep the largest entries of
    each tensor rather than of the model, and EMR rescales each by itself.
    Raises ValueError for an unknown method or argument, and for task vectors that differ in names or shapes or have
    integers, NaN or Inf.
    """
    per_task = check_method(method, kwargs, per_tensor).per_task
    if not task_vectors:
        raise ValueError("`task_vectors` is empty; give {task: {tensor name: tensor}}.")
    first = next(iter(task_vectors))
    for task, tensors in task_vectors.items():
        for name in sorted(tensors.keys() ^ task_vectors[first].keys()):
            raise ValueError(f"The tensor {name!r} is in one of {first!r} and {task!r} only; give it in both.")
        for name, tensor in tensors.items():
            shape = task_vectors[first][name].shape
            if tensor.shape != shape:
                raise ValueError(
                    f"Task {task!r}: {name!r} has shape {tuple(tensor.shape)}, in {first!r} it has {tuple(shape)}. "
                    "Leave out what differs by task (the head)."
                )
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                problem = "has NaN or Inf" if tensor.is_floating_point() else f"has the type {tensor.dtype}"
                raise ValueError(f"Task {task!r}: {name!r} {problem}; only finite floats can be merged.")
    merged = merge_tensors(
        lambda names: {task: {name: tensors[name] for name in names} for task, tensors in task_vectors.items()},
        tensor_names(task_vectors),
        method,
        per_tensor,
        kwargs,
    )
    return _by_task(task_vectors, merged) if per_task else {name: tensor for name, (tensor,) in merged}


def merge_tensors(read, names, method, per_tensor, kwargs):
    """Yields (name, [merged tensor]), or (name, the tasks' own, by the order of their names) for a per-task method.

    `read(names)` gives {task: mapping of these names to tensors}, which may be computed when they are read."""
    function, _, per_task, *_ = MERGING_METHODS[method]
    for scope in [[name] for name in names] if per_tensor else [names]:
        for name, merged in function(read(scope), **kwargs):
            yield name, merged if per_task else [merged]


def _by_task(task_vectors, merged):
    own = {task: {} for task in task_vectors}
    for name, stacked in merged:
        for task, tensor in zip(sorted(own), stacked, strict=True):
            own[task][name] = tensor
    return own


def transform_task_vectors(task_vectors: dict[str, dict[str, torch.Tensor]], method: str, **kwargs):
    """{task: task vector}: each task's part in a merge by `method`, in float32. Raises as `check_transform` does."""
    check_transform(method, kwargs)
    return _by_task(task_vectors, MERGING_METHODS[method].parts(task_vectors, **kwargs))


def check_transform(method: str, kwargs: dict) -> None:
    """Raises ValueError for a method that has no parts of each task, or does not take these arguments."""
    able = [name for name, known in MERGING_METHODS.items() if known.parts]
    if method not in able:
        raise ValueError(f"The transform {method!r} is not one of {', '.join(able)}.")
    _check_arguments(method, MERGING_METHODS[method].parts, kwargs)


def check_method(method: str, kwargs: dict, per_tensor: bool = False, tasks: int | None = None) -> MergingMethod:
    """Raises ValueError, with the known ones, for an unknown method or an argument that it does not take, and, with the
    number of `tasks`, for a value that it does not take."""
    if not isinstance(method, str) or method not in MERGING_METHODS:
        raise ValueError(f"There is no merging method {method!r}; there are {', '.join(MERGING_METHODS)}.")
    _check_arguments(method, MERGING_METHODS[method].function, kwargs)
    if per_tensor and method == "lines":
        raise ValueError("`lines` scales tensors by their depth in the model; it has no `per_tensor`.")
    if tasks is not None:  # with no tensors at all, so that only the arguments are looked at
        merge_nothing = MERGING_METHODS[method].function({str(number): {} for number in range(tasks)}, **kwargs)
        assert not list(merge_nothing)
    return MERGING_METHODS[method]


def _check_arguments(method, function, kwargs):
    known = list(inspect.signature(function).parameters)[1:]
    for name in kwargs:
        if name not in known:
            takes = f"takes {', '.join(f'`{own}`' for own in known)}" if known else "takes no arguments"
            raise ValueError(f"The merging method {method!r} has no argument `{name}`; it {takes}.")
