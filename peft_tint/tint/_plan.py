"""All that is decided, loaded and checked before the first module of the model is replaced.

So an expert that does not fit leaves the model as it was.
"""

import copy
import warnings
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from peft.utils.integrations import _skip_init_on_device
from torch import nn

from .._structure import (
    CONTAINERS,
    PARAMETER_CONTAINERS,
    find_final_norm,
    find_head,
    find_layers,
    find_vocabulary,
    float_bytes,
    has_parameters,
    is_under,
    join,
    merged_parameters,
    named_tensors,
    plain_modules,
    resolve_all_linear,
    unit_name,
)
from .._wrapped_layer import UNITS
from ..dts._saved import check_whole, decode_for
from ..dts.config import encode_arguments
from ..experts import (
    Expert,
    check_expert,
    check_finite,
    check_unquantised,
    expert_labels,
    expert_module,
    load_expert,
    match_vocabulary,
    same_values,
    share_unchanged,
)
from ..merging import transform_task_vectors
from ..task_vectors import LazyTensors, LowRank, TaskVectors, compute_task_vector, shard
from ._auto import choose_tint_layer
from ._saved_experts import pack_expert, split_experts
from ._start import starting_coefficients
from .config import TintConfig


@dataclass
class Plan:
    """Keys are module names as they were before any adapter."""

    trainable: dict[str, bool]  # module with a copy per task -> is it (part of) the tint layer
    tied: dict[str, dict[str, tuple[str, str]]]  # module -> parameter -> the (module, parameter) that merges it
    task_vectors: dict[str, dict[str, TaskVectors]]  # module -> parameter, where an expert differs
    expert_modules: dict[str, dict[str, nn.Module]]  # module -> task -> the expert's own
    task_modules: dict[str, dict[str, nn.Module]]  # module -> task -> the copy to train
    labels: dict[str, dict]  # task -> label fields of the config
    unmerged: dict[str, dict[str, torch.Tensor]]  # task -> parameter that differs but is no target -> the expert's
    start: dict[str, list[float]]  # unit -> the tasks' coefficients, where a merge decides how they start
    packed: dict[str, torch.Tensor]  # the experts as they are to be saved, where the config wants them so
    unchanged: dict[str, list[str]]  # task -> the tensors of which nothing is saved


class Base(NamedTuple):
    """The base model, and which of its tensors are merged."""

    model: nn.Module
    modules: dict[str, nn.Module]
    tensors: dict[str, torch.Tensor]  # parameters and buffers under all their names
    buffers: set[str]
    per_task: set[str]  # the tensors of the modules with a copy per task
    owned: dict[str, tuple[str, str]]  # tensor to merge, by one name -> its module and parameter


def planned_task_vector(plan: Plan, base: Base, index: int) -> LazyTensors:
    """The task vector of one task, {tensor to merge: tensor}; a tensor that no expert changed counts as zeros."""

    def read(name):
        module, leaf = base.owned[name]
        weight = base.tensors[name]
        if leaf in plan.task_vectors.get(module, {}):
            return plan.task_vectors[module][leaf].dense_of(index, weight.shape)
        return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)

    return LazyTensors(base.owned, read)


def make_plan(config: TintConfig, model: nn.Module, sources: dict, start: bool = True) -> Plan:
    """Loads and checks the experts in `sources`, {task: reference or expert in memory}, one at a time.

    For a saved adapter that has its experts in it, `sources` are only their names. `start=False` leaves out the
    starting coefficients, where they will be loaded."""
    modules = dict(plain_modules(model))
    tensors, buffers = named_tensors(modules)
    check_unquantised(model, tensors, buffers)
    if config.tint_layer == "auto":
        with _skip_init_on_device():
            config.tint_layer = choose_tint_layer(model, modules, sources)
    trainable = _per_task_modules(config, model, modules)
    resolve_all_linear(config, model, modules, trainable)
    targets, tied = merged_parameters(config, modules, trainable)
    chosen = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    chosen = {field: value for field in chosen if (value := getattr(config, field)) is not None}
    if chosen and not targets:
        raise ValueError(
            f"Target modules {config.target_modules} not found in the base model. "
            f"Please check the target modules and try again. With {chosen} there is nothing to merge. Names are those "
            "of modules with parameters of their own, such as 'query'; the head and the tint layer are not merged."
        )
    owned = {
        join(name, leaf): (name, leaf)
        for name, parameters in targets.items()
        for leaf in parameters
        if leaf not in tied.get(name, {})
    }
    per_task = {name for name in tensors if is_under(name, trainable)}
    base = Base(model, modules, tensors, buffers, per_task, owned)
    plan = Plan(trainable, tied, {}, {name: {} for name in trainable}, {}, {}, {}, {}, {}, {})
    dense, low_rank = ({name: {} for name in owned} for _ in range(2))  # tensor -> index of task -> what it changed
    # under PEFT's `low_cpu_mem_usage` modules are made on the meta device, where an expert would lose its weights
    with _skip_init_on_device():
        if config.is_packed:
            _unpack_experts(plan, base, config, dense, low_rank)
        else:
            _load_experts(plan, base, sources, dense, low_rank, config)
        for name, (module, leaf) in owned.items():
            plan.task_vectors.setdefault(module, {})
            # A tensor that no expert changed stays the base's: a frozen embedding costs neither memory nor time
            if dense[name] or low_rank[name]:
                shape = tensors[name].shape if config.is_sharded else None
                plan.task_vectors[module][leaf] = TaskVectors(dense.pop(name), low_rank.pop(name), shape=shape)
    _drop_unchanged(plan)
    task_vectors = {task: planned_task_vector(plan, base, index) for index, task in enumerate(sources)}
    if config.save_experts == "dts" and not config.is_packed:
        _pack_experts(plan, base, config, task_vectors)
    if config.transform is not None:
        _transform(plan, base, task_vectors, config)
    if isinstance(config.coefficient_init, str) and config.init_weights and start:
        plan.start = _start(plan, base, task_vectors, config)
    for name, copies in plan.expert_modules.items():
        plan.task_modules[name] = _initial_modules(config, name, modules[name], copies, trainable[name])
    if config.tint_layer is None and not trainable:
        warnings.warn(
            f"{type(model).__name__} has neither a head of a task nor a decoder's final norm, so only coefficients "
            "train (as in AdaMerging). Name a layer in `tint_layer`, or set `tint_layer=[]` if that is what you want.",
            stacklevel=2,
        )
    return plan


def _transform(plan, base, task_vectors, config):
    """Puts each task's part in a merge in the place of its task vector."""
    parts = transform_task_vectors(task_vectors, config.transform, **config.transform_kwargs)
    for name, (module, leaf) in base.owned.items():
        if own := plan.task_vectors.get(module, {}).get(leaf):
            dense = {
                index: _to_keep(config, parts[task][name], base.tensors[name])
                for index, task in enumerate(task_vectors)
            }
            plan.task_vectors[module][leaf] = TaskVectors(dense, {}, own, own.shape)


def _start(plan, base, task_vectors, config):
    """The starting coefficients of each unit, where a merge decides them."""
    units = {
        name: unit_name(config.granularity, module, leaf)
        for name, (module, leaf) in base.owned.items()
        if leaf in plan.task_vectors.get(module, {})
    }
    method, bounds = config.coefficient_init, config.coefficient_bounds
    return starting_coefficients(task_vectors, units, method, bounds, **config.coefficient_init_kwargs)


def _load_experts(plan, base, sources, dense, low_rank, config):
    check_finite(base.tensors)
    vocabulary = find_vocabulary(base.model, base.tensors)
    for index, (task, source) in enumerate(sources.items()):
        expert = share_unchanged(load_expert(task, source, base.model), base.tensors)
        expert = match_vocabulary(expert, base.tensors, vocabulary, common=False)
        of_model = getattr(base.model, "config", None)
        check_expert(expert, base.tensors, base.per_task, base.buffers - base.per_task, of_model)
        _add_expert(plan, base, expert, index, dense, low_rank, config)


def _add_expert(plan, base, expert, index, dense, low_rank, config):
    """Accounts for each tensor of an expert: it is merged, the task's own, or kept as it is for `TintModel.expert`."""
    of_expert = expert.by_tensor(base.tensors)
    for name, factors in expert.low_rank.items():
        if name in base.owned:
            device = base.tensors[name].device
            low_rank[name][index] = LowRank(factors.b.to(device), factors.a.to(device), factors.scale)
        else:
            tensor = of_expert[id(base.tensors[name])]
            of_expert[id(base.tensors[name])] = tensor + factors.dense().view(tensor.shape).to(tensor)
    for name in base.owned:
        weight = base.tensors[name].detach()
        if same_values(of_expert[id(base.tensors[name])], weight):
            continue
        change = compute_task_vector(of_expert[id(base.tensors[name])].to(weight.device), weight)
        if change.any():
            dense[name][index] = _to_keep(config, change, weight)
    for name, copies in plan.expert_modules.items():
        copies[expert.task] = expert_module(expert, name, base.modules[name], base.tensors, of_expert)
    heads = [copies[expert.task] for copies in plan.expert_modules.values()]
    plan.labels[expert.task] = expert_labels(expert, base.model, heads)
    merged = {id(base.tensors[name]) for name in base.owned}
    plan.unmerged[expert.task] = {
        name: of_expert[id(tensor)].to(tensor).clone()
        for name, tensor in base.tensors.items()
        if id(tensor) not in merged and name not in base.per_task | base.buffers
        if not torch.equal(of_expert[id(tensor)].to(tensor), tensor)
    }


def _to_keep(config, task_vector, weight):
    """A task vector as it is kept in memory."""
    dtype = torch.bfloat16 if config.task_vectors_dtype == "bfloat16" else weight.dtype
    task_vector = task_vector.to(dtype).contiguous()
    return shard(task_vector) if config.is_sharded else task_vector


def _changeable(base):
    """The tensors of which an expert is saved as a task vector, tied ones by one name: those that are merged, and the
    parameters that are no target."""
    names, others = {}, base.per_task | base.buffers
    for name in (*base.owned, *base.tensors):
        if name not in others:
            names.setdefault(id(base.tensors[name]), name)
    return list(names.values())


def _pack_experts(plan, base, config, task_vectors):
    """Compresses the experts as they are before a transform, for `TintModel` to save."""
    arguments = encode_arguments(**config.save_experts_kwargs)
    base_bytes = float_bytes(base.tensors, base.buffers)
    for task, merged in task_vectors.items():
        task_vector = LazyTensors(_changeable(base), partial(_change, plan, base, task, merged))
        whole = {
            join(name, leaf): tensor
            for name, copies in plan.expert_modules.items()
            for leaf, tensor in copies[task].state_dict().items()
        }
        packed, unchanged = pack_expert(task, task_vector, whole, base_bytes=base_bytes, **arguments)
        plan.packed |= packed
        plan.unchanged[task] = unchanged


def _change(plan, base, task, merged, name):
    if name in merged:
        return merged[name]
    weight = base.tensors[name].detach()
    return compute_task_vector(plan.unmerged[task].get(name, weight), weight)


def _unpack_experts(plan, base, config, dense, low_rank):
    """As `_add_expert` for each expert of a saved adapter. Raises ValueError where it does not fit the base."""
    experts = split_experts(config.packed_experts, _changeable(base), base.per_task, config.unchanged)
    for index, task in enumerate(config.tasks):
        owner, (codes, whole) = f"Expert {task!r}", experts[task]
        plan.unmerged[task] = {}
        for name, packed in codes.items():
            weight = base.tensors[name].detach()
            change = decode_for(owner, name, packed, weight)
            if name not in base.owned:
                change = change.dense() if isinstance(change, LowRank) else change
                plan.unmerged[task][name] = (weight + change).to(weight.dtype)
            elif isinstance(change, LowRank):
                low_rank[name][index] = change
            else:
                dense[name][index] = _to_keep(config, change, weight)
        for name, tensor in whole.items():
            check_whole(owner, name, tensor, base.tensors[name])
        of_expert = {id(base.tensors[name]): tensor for name, tensor in whole.items()}
        for name, copies in plan.expert_modules.items():
            expert = Expert(task, whole, None, None)
            copies[task] = expert_module(expert, name, base.modules[name], base.tensors, of_expert)
        plan.labels[task] = config.labels[task]


def _drop_unchanged(plan):
    """Leaves out ties to a parameter that no expert changed, and modules of which nothing is left."""
    plan.tied = {
        module: kept
        for module, ties in plan.tied.items()
        if (kept := {leaf: (at, there) for leaf, (at, there) in ties.items() if there in plan.task_vectors[at]})
    }
    for module in plan.tied:
        plan.task_vectors.setdefault(module, {})
    plan.task_vectors = {module: own for module, own in plan.task_vectors.items() if own or module in plan.tied}


def _per_task_modules(config, model, modules):
    """{name: is it the tint layer} of the modules with one copy per task: the head always, and the tint layer.

    Writes out the default of language models."""
    head = find_head(model, modules)
    if config.tint_layer is None and not head:
        config.tint_layer = find_final_norm(model, modules) or None
    tint = head if config.tint_layer is None else find_layers(config.tint_layer, modules)
    units = [name for name, module in modules.items() if isinstance(module, UNITS)]
    for name in tint:
        if not has_parameters(modules[name]):
            raise ValueError(f"`tint_layer` {name!r} has no parameters to train; name a layer that has.")
        if is_under(name, [*tint, *head, *units], strictly=True):
            around = next(other for other in (*tint, *head, *units) if is_under(name, [other], strictly=True))
            raise ValueError(
                f"`tint_layer` {name!r} is part of {around!r}, which has one copy per task or reads its "
                f"weights directly; name {around!r} instead."
            )
        if isinstance(modules[name], CONTAINERS):
            remedy = f"list the modules in it, such as {name + '.0'!r}"
            if isinstance(modules[name], PARAMETER_CONTAINERS):
                remedy = "name the module that reads it"
            raise ValueError(
                f"`tint_layer` {name!r} is a {type(modules[name]).__name__}, which has no forward; {remedy}."
            )
    return {name: name in tint for name in (*tint, *(name for name in head if not is_under(name, tint)))}


def _initial_modules(config, name, base_module, expert_modules, trainable):
    """The copies to train, as `tint_layer_init` says. A head that does not train stays the expert's."""
    copies = copy.deepcopy(expert_modules)
    if config.tint_layer_init == "expert" or not trainable:
        return copies
    base = dict(base_module.named_parameters())
    for task, module in copies.items():
        for leaf, parameter in module.named_parameters():
            if parameter.shape != base[leaf].shape:
                raise ValueError(
                    f"`tint_layer_init` is {config.tint_layer_init!r}, but {name}.{leaf} of expert {task!r} has shape "
                    f"{tuple(parameter.shape)} and the base model's has {tuple(base[leaf].shape)}. Use 'expert'."
                )
    init = config.coefficient_init
    values = {}
    for leaf, weight in base.items():
        values[leaf] = weight.detach().float()
        if config.tint_layer_init == "merged":
            for task, module in expert_modules.items():
                coefficient = init[task] if isinstance(init, dict) else init
                values[leaf] = values[leaf] + coefficient * compute_task_vector(module.get_parameter(leaf), weight).data
    for module in copies.values():
        for leaf, parameter in module.named_parameters():
            parameter.data.copy_(values[leaf])
    return copies
