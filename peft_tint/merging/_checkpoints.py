"""Merging of checkpoints that need not fit in memory: read tensor by tensor, written shard by shard."""

import contextlib
import os
import warnings
from collections.abc import Mapping

import torch
from huggingface_hub.utils import tqdm

from ..checkpoints import DTYPE_NAMES, Checkpoint, CheckpointWriter, copy_files, meta_model, new_folder, open_checkpoint
from ..experts import Expert, TaskVector, check_expert, check_finite, match_vocabulary
from ..tint._structure import Structure, inspect_model
from ._models import add_change
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
    largest tensor (number of tasks + 2) times in float32. Methods with a quantity of the whole model (the thresholds of
    TIES and magnitude pruning, EMR's rescalers, LiNeS' alpha) read everything more than once.

    `output_dir` becomes a complete model folder, with the weights in files of at most `max_shard_size`, in `dtype` (by
    default each tensor's own), and the config, tokenizer and processor files of the base, or of the expert that
    `files_from` names. A per-task method writes a folder of each task into it, with that expert's head and files. It is
    written under a temporary name and moved when it is complete.

    All tensors are merged, except that integers and buffers stay the base's, and the head does if its shape differs
    between the experts: then it is that of `files_from`. `method`, `scale`, `per_tensor`, `common_vocabulary` and the
    method's own `kwargs` are as in `merge`. Raises ValueError as `merge` does, for adapters, for a folder that is no
    checkpoint, and if there is something at `output_dir` already.
    """
    per_task = check_method(method, kwargs, per_tensor).per_task
    if not experts:
        raise ValueError("`experts` is empty; give {task: Hub id or folder}.")
    if files_from is not None and (per_task or files_from not in experts):
        reason = f"{method!r} makes a model of each task" if per_task else f"the experts are {', '.join(experts)}"
        raise ValueError(f"`files_from` is {files_from!r}, and {reason}. Leave it out for the base's files.")
    dtype = _float_type(dtype)
    base = open_checkpoint("The base model", base)
    checkpoints = {task: open_checkpoint(f"Expert {task!r}", source) for task, source in experts.items()}
    structure = inspect_checkpoint(base)
    fixed = structure.fixed - structure.head if per_task else structure.fixed
    own = {}  # {task: {name: tensor}}, by the names under which the base stores them
    for task, checkpoint in checkpoints.items():
        expert = Expert(task, checkpoint.tensors, None, checkpoint.config)
        matched = match_vocabulary(expert, structure.tensors, structure.vocabulary, common_vocabulary)
        check_expert(matched, structure.tensors, structure.head, fixed, base.config)
        if matched is not expert and (per_task or task == files_from):
            raise ValueError(
                f"The merged model has the base's tokens, and the config and tokenizer of expert {task!r}, which it "
                "would get, are for others. Use a method that makes one model, with the base's files."
            )
        by_tensor = matched.by_tensor(structure.tensors)
        own[task] = {name: by_tensor[id(structure.tensors[name])] for name in base.tensors}
    names = [name for name in base.tensors if name not in structure.fixed and not (per_task and name in structure.head)]
    if other := [n for n in names if any(tensors[n].shape != base.tensors[n].shape for tensors in own.values())]:
        warnings.warn(
            f"The experts' heads differ in shape ({', '.join(other)}), so the merged model has the head of "
            f"{files_from or 'the base'}. `files_from` chooses another's; a per-task method keeps them all.",
            stacklevel=2,
        )
        names = [name for name in names if name not in structure.head]
    with new_folder(output_dir) as folder, contextlib.ExitStack() as opened:
        writers = {}
        for task in experts if per_task else [files_from]:
            path = os.path.join(folder, task if per_task else "")
            kept = {n: own[task][n] if task and n in structure.head else tensor for n, tensor in base.tensors.items()}
            wanted = {name: _as(tensor.to("meta"), dtype) for name, tensor in kept.items()}
            writers[task] = opened.enter_context(CheckpointWriter(path, wanted, max_shard_size))
            for name in kept.keys() - set(names):
                writers[task].write(name, _as(kept[name], dtype))
            copy_files((checkpoints[task] if task else base).folder, path, dtype or getattr(base.config, "dtype", None))
        rows = [writers[task] for task in (sorted(experts) if per_task else [files_from])]
        for name, weight, changes in _merge(base.tensors, own, names, method, per_tensor, kwargs):
            for writer, change in zip(rows, changes, strict=True):
                writer.write(name, add_change(name, weight, change, scale, dtype))


def _merge(base_tensors, own, names, method, per_tensor, kwargs):
    """Yields (name, weight, [what is to be added]) of all tensors; of each in pieces if the method allows that."""

    def pieces(name, tensor):
        if not MERGING_METHODS[method].elementwise:
            return {name: tensor}
        return {(name, number): piece for number, piece in enumerate(tensor.view(-1).split(PIECE))}

    def all_pieces(tensors):
        return {piece: entries for name in names for piece, entries in pieces(name, tensors[name]).items()}

    of_name = {name: list(pieces(name, base_tensors[name])) for name in names}
    owner = {piece: name for name in names for piece in of_name[name]}
    weights = all_pieces(base_tensors)
    experts = {task: Expert(task, all_pieces(tensors), None, None) for task, tensors in own.items()}

    def read(scope):
        scope = [piece for name in scope for piece in of_name[name]]
        return {task: TaskVector(expert, weights, scope) for task, expert in experts.items()}

    merged = merge_tensors(read, names, method, per_tensor, kwargs)
    for piece, changes in tqdm(merged, total=len(owner), desc=f"merging by {method}", unit="piece"):
        yield owner[piece], weights[piece], changes


def inspect_checkpoint(base: Checkpoint) -> Structure:
    """The base as its model would have it: its tensors under all the names that are tied to those of the files."""
    tensors, model = dict(base.tensors), meta_model(base.config)
    structure = Structure({}, set(), set(), set()) if model is None else inspect_model(model)
    tied = {}
    for name, parameter in structure.tensors.items():
        tied.setdefault(id(parameter), []).append(name)
    for names in tied.values():
        stored = [tensors[name] for name in names if name in tensors]
        if stored and all(torch.equal(stored[0], other) for other in stored[1:]):
            tensors.update(dict.fromkeys(names, stored[0]))
    for name, tensor in base.tensors.items():
        if tensor.dtype not in DTYPE_NAMES or getattr(base.config, "quantization_config", None):
            raise ValueError(
                f"The base model is quantised ({name!r} has the type {tensor.dtype}), and task vectors cannot be added "
                "to quantised weights. Give it unquantised, for instance in bfloat16, and quantise the merged model."
            )
    check_finite(base.tensors)
    integers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}
    return structure._replace(tensors=tensors, fixed=structure.fixed | integers)


def _as(tensor, dtype):
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _float_type(dtype):
    """None, a type of torch or its name, as a type of floats that can be stored."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and (found not in DTYPE_NAMES or not found.is_floating_point):
        raise ValueError(f"`dtype` is {dtype!r}; give float32, float16, bfloat16 or float64, or None for the base's.")
    return found
