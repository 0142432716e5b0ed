"""Merging of checkpoints that need not fit in memory: read tensor by tensor, written shard by shard."""

import os
import warnings
from collections.abc import Mapping

import torch
from huggingface_hub.utils import tqdm

from ..checkpoints import DTYPE_NAMES, Checkpoint, CheckpointWriter, copy_files, meta_model, new_folder, open_checkpoint
from ..experts import Expert, TaskVector, check_expert, is_finite
from ..tint._structure import find_head, is_under, named_tensors, plain_modules
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
    files_from: str | None = None,
    **kwargs,
) -> None:
    """As `merge`, from checkpoint folders to a checkpoint folder, without loading a model.

    `base` and the experts are folders of safetensors, Hub ids or {"id", "revision", "subfolder"}; their files are
    mapped, not read into memory. Methods that treat all entries alike take tensors in small pieces; the others need the
    largest tensor (number of tasks + 2) times in float32. Methods with a quantity of the whole model (the thresholds of
    TIES and magnitude pruning, EMR's rescalers, LiNeS' alpha) read everything more than once.

    `output_dir` becomes a complete model folder, with the weights in files of at most `max_shard_size`, in `dtype` (by
    default each tensor's own in the base), and the config, tokenizer and processor files of the base, or of the expert
    that `files_from` names. A per-task method writes a folder of each task into it, with that expert's head and files.
    It is written under a temporary name and moved when it is complete.

    All tensors are merged, except that integers and buffers stay the base's, and the head does if its shape differs
    between the experts: then it is that of `files_from`. Raises ValueError as `merge` does, for adapters, for a folder
    that is no checkpoint, and if there is something at `output_dir` already.
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
    tensors, fixed, head = _structure(base)
    loaded = {}
    for task, checkpoint in checkpoints.items():
        expert = Expert(task, checkpoint.tensors, None, checkpoint.config)
        check_expert(expert, tensors, head, fixed - head if per_task else fixed, base.config)
        own = expert.by_tensor(tensors)
        loaded[task] = {name: own[id(tensors[name])] for name in base.tensors}
    names = [name for name in base.tensors if name not in fixed and not (per_task and name in head)]
    if other := {n for n in names for own in loaded.values() if own[n].shape != base.tensors[n].shape}:
        warnings.warn(
            f"The experts' heads differ in shape ({', '.join(sorted(other))}), so the merged model has the head of "
            f"{files_from or 'the base'}. `files_from` chooses another; a per-task method keeps them all.",
            stacklevel=2,
        )
        names = [name for name in names if name not in head]

    with new_folder(output_dir) as folder:
        writers = {}
        for task in experts if per_task else [""]:
            head_of = task or files_from
            kept = {n: loaded[head_of][n] if head_of and n in head else t for n, t in base.tensors.items()}
            wanted = {name: _as(tensor.to("meta"), dtype) for name, tensor in kept.items()}
            writers[task] = CheckpointWriter(os.path.join(folder, task), wanted, max_shard_size)
            for name in kept.keys() - set(names):
                writers[task].write(name, _as(kept[name], dtype))
        read, owner, weights = _in_pieces(base.tensors, loaded, names, method)
        with tqdm(total=len(weights), desc=f"merging by {method}", unit="piece") as bar:
            for key, changes in merge_tensors(read, names, method, per_tensor, kwargs):
                for (_, writer), change in zip(sorted(writers.items()), changes, strict=True):
                    writer.write(owner[key], add_change(owner[key], weights[key], change, scale, dtype))
                bar.update()
        for task, writer in writers.items():
            writer.close()
            source = task or files_from
            copy_files(checkpoints[source].folder if source else base.folder, os.path.join(folder, task), dtype)


def _in_pieces(base_tensors, expert_tensors, names, method):
    """What `merge_tensors` reads, {piece: name of its tensor} and {piece: the base's entries}.

    A piece is a range of a tensor's entries for methods that treat all entries alike, else a whole tensor."""
    entries = {}
    for name in names:
        size, shape = base_tensors[name].numel(), base_tensors[name].shape
        if size > PIECE and MERGING_METHODS[method].elementwise:
            parts = [slice(start, min(start + PIECE, size)) for start in range(0, size, PIECE)]
            entries[name] = {
                f"{name}[{part.start}:{part.stop}]": lambda t, part=part: t.view(-1)[part] for part in parts
            }
        else:
            entries[name] = {name: lambda t, shape=shape: t}

    def pieces(tensors):
        return {key: part(tensors[name]) for name, own in entries.items() for key, part in own.items()}

    weights = pieces(base_tensors)
    experts = {task: Expert(task, pieces(own), None, None) for task, own in expert_tensors.items()}

    def read(scope):
        scope = [key for name in scope for key in entries[name]]
        return {task: TaskVector(expert, weights, scope) for task, expert in experts.items()}

    return read, {key: name for name, own in entries.items() for key in own}, weights


def _structure(base: Checkpoint):
    """The base's tensors by all names that its model has for them, which are not merged, and which are the head's."""
    tensors, fixed, head = dict(base.tensors), set(), set()
    model = meta_model(base.config)
    if model is not None:
        modules = dict(plain_modules(model))
        own, buffers = named_tensors(modules)
        fixed = buffers & tensors.keys()
        layers = find_head(model, modules)
        head = {name for name in tensors if is_under(name, layers)}
        tied = {}
        for name, parameter in own.items():
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
        if not tensor.is_floating_point():
            fixed.add(name)
        elif not is_finite(tensor):
            raise ValueError(f"The base model's {name!r} has NaN or Inf; download or save it again.")
    return tensors, fixed, head


def _as(tensor, dtype):
    return tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


def _float_type(dtype):
    """None, a type of torch or its name, as a type of floats that can be stored."""
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype is not None and (found not in DTYPE_NAMES or not found.is_floating_point):
        raise ValueError(f"`dtype` is {dtype!r}; give float32, float16, bfloat16 or float64, or None for the base's.")
    return found
