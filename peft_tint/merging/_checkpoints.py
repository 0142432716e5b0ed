"""Merging of checkpoints that need not fit in memory: read tensor by tensor, written shard by shard."""

import contextlib
import math
import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel

from .._structure import Structure, inspect_model
from ..checkpoints import (
    DTYPE_NAMES,
    Checkpoint,
    CheckpointWriter,
    copy_files,
    meta_model,
    module_names,
    new_folder,
    open_checkpoint,
    split_into_shards,
)
from ..experts import Expert, check_expert, check_finite, is_finite, listing, match_vocabulary
from ..task_vectors import LazyTensors, compute_task_vector
from ..tint.config import check_task_name
from ._models import add_change, check_scale
from ._registry import MERGING_METHODS, check_method, merge_tensors

# Entries of a piece of a tensor: small enough for the processor's cache, large enough to be worth several threads.
PIECE = 2**18


@torch.no_grad()
def merge_checkpoints(
    base: str | os.PathLike | dict,
    experts: Mapping[str, str | os.PathLike | dict],
    method: str,
    output_dir: str | os.PathLike,
    max_shard_size: int | str = "5GB",
    dtype: torch.dtype | str | None = None,
    scale: float = 1.0,
    per_tensor: bool = False,
    common_vocabulary: bool = False,
    files_from: str | None = None,
    **kwargs,
) -> None:
    """As `merge`, from checkpoint folders to a checkpoint folder, without loading a model.

    `base` and the experts are folders of safetensors, Hub ids or {"id", "revision", "subfolder"}; their files are
    mapped, not read into memory. Methods that treat all entries alike take tensors in small pieces; the others need the
    largest tensor (number of tasks + 4) times in float32, and those that decompose it several times that. Methods with
    a quantity of the whole model (the thresholds of TIES and magnitude pruning, EMR's rescalers, LiNeS' alpha) read
    everything more than once.

    `output_dir` becomes a complete model folder, with the weights in files of at most `max_shard_size`, in `dtype` (by
    default each tensor's own in the base), and the config, tokenizer and processor files of the base, or of the expert
    that `files_from` names. A per-task method writes a folder of each task into it, with that expert's head and files.
    All is written under a temporary name and moved when it is complete.

    All tensors are merged, except that integers and buffers stay the base's, and the head does if its shape differs
    between the experts: then it is that of `files_from`. Names are those in the loaded model, but what transformers
    stacks when it loads (the experts of a mixture) is merged as it is stored. Without a config, or for a class that
    transformers does not have, nothing is known of buffers, heads and tied tensors, and all floats are merged alike.

    `method`, `scale`, `per_tensor`, `common_vocabulary` and the method's own `kwargs` are as in `merge`. Raises
    ValueError as `merge` does, for adapters, for a folder that is no checkpoint, for a task name that cannot be a
    folder's, and if there is something at `output_dir` already.
    """
    if not isinstance(experts, Mapping) or not experts:
        raise ValueError(f"`experts` is {experts!r}; give {{task: Hub id or folder}}, at least one.")
    for task in experts:
        check_task_name(task)
    per_task = check_method(method, kwargs, per_tensor, len(experts)).per_task
    if files_from is not None and (per_task or files_from not in experts):
        reason = f"{method!r} makes a model of each task" if per_task else f"the experts are {', '.join(experts)}"
        raise ValueError(f"`files_from` is {files_from!r}, and {reason}. Leave it out for the base's files.")
    check_scale(scale)
    split_into_shards({}, max_shard_size)
    dtype = _float_type(dtype)
    sources = _open(base, experts, per_task, files_from, common_vocabulary)
    names = _names_to_merge(sources, per_task, files_from)
    with new_folder(output_dir) as folder, contextlib.ExitStack() as opened:
        writers = []
        for task in sorted(experts) if per_task else [files_from]:
            path = os.path.join(folder, task if per_task else "")
            writers.append(_start_writer(opened, sources, task, path, names, max_shard_size, dtype))
            source = sources.checkpoints[task] if task else sources.base
            copy_files(source.folder, path, dtype or getattr(sources.base.config, "dtype", None))
        for name, weight, changes in _merge(sources, names, method, per_tensor, kwargs):
            for writer, change in zip(writers, changes, strict=True):
                merged = add_change(name, weight, change, scale, dtype)
                for stored_name in sources.stored[name]:
                    writer.write(stored_name, merged)
            del changes, change, merged  # before the next are made


class Sources(NamedTuple):
    """What is merged. Tensors go by their names in the model, a tied one by its first."""

    base: Checkpoint
    checkpoints: dict[str, Checkpoint]
    structure: Structure
    tensors: dict[str, torch.Tensor]  # the base's
    own: dict[str, dict[str, torch.Tensor]]  # {task: the expert's}
    stored: dict[str, list[str]]  # {name: the names that the base's files have for it}


def _open(base, experts, per_task, files_from, common_vocabulary):
    base = open_checkpoint("The base model", base)
    model = meta_model(base.config)
    if model is None and base.config is not None:
        unknown = (
            f"The base's config names the classes {getattr(base.config, 'architectures', None)}, none of them in "
            "transformers, so nothing is known of its head, buffers and tied tensors"
        )
        if per_task:
            raise ValueError(
                f"{unknown}, and each task could not get its own head. Use `merge`, with models in memory."
            )
        warnings.warn(f"{unknown}: all floats are merged alike.", stacklevel=3)
    structure, names_in_model = inspect_checkpoint(base, model)
    first = {id(tensor): name for name, tensor in reversed(structure.tensors.items())}
    stored = {}
    for stored_name, name in names_in_model.items():
        stored.setdefault(first[id(structure.tensors[name])], []).append(stored_name)
    fixed = structure.fixed - structure.head if per_task else structure.fixed
    checkpoints, own = {}, {}
    for task, source in experts.items():
        checkpoints[task] = open_checkpoint(f"Expert {task!r}", source)
        expert = stored_expert(task, checkpoints[task], model)
        matched = match_vocabulary(expert, structure.tensors, structure.vocabulary, common_vocabulary)
        check_expert(matched, structure.tensors, structure.head, fixed, base.config)
        if matched is not expert and (per_task or task == files_from):
            raise ValueError(
                f"The merged model has the base's tokens, and the config and tokenizer of expert {task!r}, which it "
                "would get, are for others. Use a method that makes one model, with the base's files."
            )
        by_tensor = matched.by_tensor(structure.tensors)
        own[task] = {name: by_tensor[id(structure.tensors[name])] for name in stored}
    return Sources(base, checkpoints, structure, {name: structure.tensors[name] for name in stored}, own, stored)


def _names_to_merge(sources, per_task, files_from):
    head, fixed = sources.structure.head, sources.structure.fixed
    names = [name for name in sources.tensors if name not in fixed and not (per_task and name in head)]
    shapes = {name: {own[name].shape for own in sources.own.values()} for name in names}
    if other := [name for name in names if shapes[name] != {sources.tensors[name].shape}]:  # only a head's may
        warnings.warn(
            f"The experts' heads differ from the base's in shape ({', '.join(other)}), so the merged model has the "
            f"head of {files_from or 'the base'}. `files_from` chooses another's; a per-task method keeps them all.",
            stacklevel=3,
        )
        names = [name for name in names if name not in head]
    return names


def _start_writer(opened, sources, task, folder, names, max_shard_size, dtype):
    """A writer that has what is not merged: of the head the task's own, if one is given, else the base's."""
    kept = dict(sources.tensors)
    for name in sources.structure.head & kept.keys() - set(names) if task else ():
        kept[name] = sources.own[task][name]
    wanted = {
        stored: _cast(kept[n].to("meta"), dtype) for n, all_stored in sources.stored.items() for stored in all_stored
    }
    writer = opened.enter_context(CheckpointWriter(folder, wanted, max_shard_size))
    for name in kept.keys() - set(names):
        tensor = _cast(kept[name], dtype)
        if not is_finite(tensor):
            raise ValueError(f"{name!r} is out of {tensor.dtype}'s range; give another `dtype`.")
        for stored_name in sources.stored[name]:
            writer.write(stored_name, tensor)
    return writer


def _merge(sources, names, method, per_tensor, kwargs):
    """Yields (name, weight, [what is to be added]) of all tensors; in pieces, if the method allows that."""

    def count(name):
        return math.ceil(sources.tensors[name].numel() / PIECE) if MERGING_METHODS[method].elementwise else 1

    def read(scope):
        keys = scope
        if MERGING_METHODS[method].elementwise:
            keys = [(name, number) for name in scope for number in range(count(name))]
        return {task: LazyTensors(keys, partial(_change, own, sources.tensors)) for task, own in sources.own.items()}

    merged = merge_tensors(read, names, method, per_tensor, kwargs)
    with tqdm(total=sum(map(count, names)), desc=f"merging by {method}", unit="piece") as bar:
        for key, changes in merged:
            yield key if isinstance(key, str) else key[0], _entries(sources.tensors, key), changes
            del changes  # before the next are made
            bar.update()


def _change(expert_tensors, base_tensors, key):
    return compute_task_vector(_entries(expert_tensors, key), _entries(base_tensors, key))


def _entries(tensors, key):
    """Of `key`, a name or (name, number of a piece)."""
    if isinstance(key, str):
        return tensors[key]
    name, number = key
    return tensors[name].view(-1)[number * PIECE : (number + 1) * PIECE]


def inspect_checkpoint(base: Checkpoint, model: PreTrainedModel | None) -> tuple[Structure, dict[str, str]]:
    """The base's tensors by all names that its model has for them; and {name in its files: name in the model}."""
    names = module_names(base.tensors, model)
    tensors = {names[stored]: tensor for stored, tensor in base.tensors.items()}
    structure = Structure(tensors, set(), set(), set()) if model is None else inspect_model(model)
    tied = {}
    for name, parameter in structure.tensors.items():
        tied.setdefault(id(parameter), []).append(name)
        if name in tensors and parameter.is_floating_point() != tensors[name].is_floating_point():
            raise ValueError(
                f"The base model is quantised ({name!r} has the type {tensors[name].dtype}), and task vectors cannot "
                "be added to quantised weights. Give it unquantised, and quantise the merged model."
            )
        if name in tensors and parameter.shape != tensors[name].shape:
            raise ValueError(
                f"The base model's {name!r} has shape {tuple(tensors[name].shape)} in its files, and by its config "
                f"{tuple(parameter.shape)}. Save it again."
            )
    trained = {name for name, tensor in structure.tensors.items() if tensor.requires_grad}
    missing = [places[0] for places in tied.values() if places[0] in trained and not tensors.keys() & set(places)]
    if missing and set(names.values()) <= structure.tensors.keys():  # else the rest may be stored in another layout
        warnings.warn(
            f"The base's files have no {listing(missing)}, which {type(model).__name__} has and transformers would "
            "start at random.",
            stacklevel=4,
        )
    for places in tied.values():
        stored = [tensors[name] for name in places if name in tensors]
        if stored and all(torch.equal(stored[0], other) for other in stored[1:]):
            tensors.update(dict.fromkeys(places, stored[0]))
    in_order = {name: tensors[name] for name in structure.tensors if name in tensors}  # the model's
    tensors = in_order | tensors
    check_finite(tensors)
    integers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}
    return structure._replace(tensors=tensors, fixed=structure.fixed | integers), names


def stored_expert(task: str, checkpoint: Checkpoint, model: PreTrainedModel | None) -> Expert:
    """The expert with its tensors by their names in the base's model."""
    names = module_names(checkpoint.tensors, model)
    tensors = {names[stored]: tensor for stored, tensor in checkpoint.tensors.items()}
    return Expert(task, tensors, None, checkpoint.config)


def _cast(tensor, dtype):
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _float_type(dtype):
    """None, a type of torch or its name, as a type of floats that can be stored."""
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(found, torch.dtype) and found in DTYPE_NAMES and found.is_floating_point):
        raise ValueError(f"`dtype` is {dtype!r}; give float32, float16, bfloat16 or float64, or None for the base's.")
    return found
