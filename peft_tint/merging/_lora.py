"""A model's difference to its base as a LoRA adapter: the best factors of a chosen rank, and what they leave out."""

import copy
import re
import warnings
from collections import Counter

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Embedding
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .._structure import CONTAINERS, find_head, is_under, named_tensors, plain_modules
from .._wrapped_layer import UNITS
from ..experts import Expert, check_expert, check_finite, check_unquantised, expert_module, labels_of, set_labels
from ..task_vectors import compute_task_vector
from ._stack import norm
from ._svd import svd


@torch.no_grad()
def extract_lora(base: nn.Module, tuned: nn.Module, rank: int) -> tuple[PeftModel, dict[str, float]]:
    """What `tuned` changed of `base` as a LoRA adapter (arXiv:2106.09685) over a copy of `base`, and its errors.

    `tuned` is any model of the base's class, such as one that `merge` returns. The adapter is PEFT's own: it saves,
    loads and merges without `peft_tint`. Nothing that is given is changed.

    - The change of a Linear, transformers' Conv1D, Conv1d or Conv2d, or of the input embeddings, becomes b @ a, its
      truncated SVD: no other factors of `rank` are nearer. b (out, r) and a (r, in x kernel) have the square root of
      the singular values each and the base's dtype; r is less than `rank` where the change is of a lower rank. The
      scaling is 1. The SVD is in float32, or float64 for such weights.
    - The errors are {module: |change - b @ a| / |change|} of every module with factors, in Frobenius norms.
    - Biases of these modules are the adapter's by `bias="lora_only"`, since `lora_bias` allows neither embeddings nor
      layers without bias. They stay when the adapter is disabled.
    - Any other module that differs is kept whole, with all that is in it, by `modules_to_save`: norms (with running
      statistics), modules with parameters of their own, those that read their children's weights, other embeddings,
      heads of another size, and tied weights (at each of their places, for PEFT would add factors to the one tensor
      once a place; merged, they are untied).
    - A head of another size loads onto a base with a head of that size (`num_labels`). Labels are the returned model's,
      but no part of what it saves.

    As with any LoRA, a layer whose weight the model reads without calling it is right only after `merge_and_unload`.

    Raises ValueError for a `rank` that is no positive integer, a model that does not fit (see `check_expert`), has an
    adapter, NaN or quantised weights, for changed parameters of the model itself, which no adapter holds, and if no
    change at all has factors.
    """
    expert, modules, tensors = _check(base, tuned, rank)
    low_rank, whole = _divide(expert, base, modules, tensors)
    factors, errors = {}, {}
    for name in low_rank:
        change = _change(expert, tensors, f"{name}.weight")
        matrix = change.t() if isinstance(modules[name], nn.Embedding | Conv1D) else change.flatten(1)  # (out, in)
        factors[name] = b, a = _factors(matrix, rank, tensors[f"{name}.weight"].dtype)
        errors[name] = norm(matrix - b.to(matrix) @ a.to(matrix)) / norm(matrix)

    model = copy.deepcopy(base)
    set_labels(model, labels_of(expert.config))
    for name in whole:
        if any(is_under(n, [name]) and expert.tensors[n].shape != weight.shape for n, weight in tensors.items()):
            model.set_submodule(name, expert_module(expert, name, modules[name], tensors, {}))
    biases = {name: tensor for name, tensor in expert.tensors.items() if name.removesuffix(".bias") in factors}
    for name, bias in biases.items():
        model.get_parameter(name).copy_(bias)
    adapter = _add_adapter(
        model,
        {name: len(a) for name, (_, a) in factors.items()},
        r=rank,
        lora_alpha=rank,
        modules_to_save=whole or None,
        bias="lora_only" if any(_differs(expert, tensors, name) for name in biases) else "none",
        fan_in_fan_out=any(isinstance(modules[name], Conv1D) for name in factors),
    )
    for name in whole:
        model.get_submodule(name).modules_to_save["default"].load_state_dict(tuned.get_submodule(name).state_dict())
    for name, (b, a) in factors.items():
        layer = model.get_submodule(name)
        if isinstance(layer, Embedding):
            own_b, own_a = layer.lora_embedding_B["default"], layer.lora_embedding_A["default"]
        else:
            own_b, own_a = layer.lora_B["default"].weight, layer.lora_A["default"].weight
        own_b.copy_(b.view_as(own_b))
        own_a.copy_(a.view_as(own_a))
    return adapter, errors


def _add_adapter(model, ranks, **settings):
    """PEFT's adapter on the layers in `ranks`, which it changes in place. Its weights are yet to be set."""
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank < settings["r"]}  # "^", or they are endings
    names = "|".join(map(re.escape, ranks))  # exact ones; those of a list are endings too
    config = LoraConfig(target_modules=names, rank_pattern=pattern, alpha_pattern=dict(pattern), **settings)
    with warnings.catch_warnings():  # PEFT sets this layer by layer, and all places of a tied weight are kept
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to|Model has `tie_word_embeddings=True`")
        adapter = get_peft_model(model, config, autocast_adapter_dtype=False)
    wrapped = {name for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    if others := wrapped.difference(config.modules_to_save or []):
        raise ValueError(
            f"PEFT finds the modules to keep whole by the endings of names, which {sorted(others)} inside of others "
            "share; use the tuned model as it is."
        )
    return adapter


def _check(base, tuned, rank):
    """The tuned model's tensors, and the base's modules and tensors by name."""
    if type(rank) is not int or rank < 1:
        raise ValueError(f"`rank` is {rank!r}; give a positive integer, such as 16.")
    for name, model in (("base", base), ("tuned", tuned)):
        if hasattr(model, "peft_config"):
            raise ValueError(f"`{name}` has an adapter; give the model without it (`unload` or `merge_and_unload`).")
    if type(tuned) is not type(base):
        raise ValueError(
            f"`tuned` is a {type(tuned).__name__}, `base` a {type(base).__name__}; load both as the same class."
        )
    modules = dict(plain_modules(base))
    tensors, buffers = named_tensors(modules)
    check_unquantised(base, tensors, buffers)
    expert = Expert("tuned", tuned.state_dict(), tuned, getattr(tuned, "config", None))
    head = find_head(base, modules)
    # no buffer is fixed, since a module that is kept whole has its own
    check_expert(expert, tensors, {n for n in tensors if is_under(n, head)}, set(), getattr(base, "config", None))
    check_finite(tensors)
    return expert, modules, tensors


def _divide(expert, base, modules, tensors):
    """The names of the changed modules: those that get factors, and those that are kept whole."""
    owners = {name: _owner(name, modules) for name in tensors if _differs(expert, tensors, name)}
    if of_model := [name for name, owner in owners.items() if not owner]:
        raise ValueError(
            f"`tuned` differs from `base` in {', '.join(map(repr, of_model))}, which the model itself holds and none "
            "of its modules, so no adapter can; use the tuned model as it is."
        )
    tied = {key for key, places in Counter(map(id, tensors.values())).items() if places > 1}
    low_rank = [
        owner
        for name, owner in owners.items()
        if name == f"{owner}.weight" and expert.tensors[name].shape == tensors[name].shape
        if _takes_lora(modules[owner], base) and not any(id(p) in tied for p in modules[owner].parameters())
    ]
    whole = tuple(_outermost(set(owners.values()) - set(low_rank)))
    whole = _outermost([name for name in modules if name.endswith(whole)])  # PEFT takes endings: "fc" finds "pre_fc"
    low_rank = [name for name in low_rank if not is_under(name, whole)]
    if not low_rank:
        raise ValueError(
            f"Of the modules that LoRA takes, none differs between `base` and `tuned` ({len(whole)} others do), so "
            "there is no adapter to make; use the tuned model as it is."
        )
    return low_rank, whole


def _outermost(names):
    return sorted(name for name in names if not is_under(name, names, strictly=True))


def _change(expert, tensors, name):
    return compute_task_vector(expert.tensors[name].to(tensors[name].device), tensors[name])


def _differs(expert, tensors, name):
    return expert.tensors[name].shape != tensors[name].shape or bool(_change(expert, tensors, name).any())


def _owner(name, modules):
    """The outermost unit with this tensor, else the innermost module with it that is called, as containers are not."""
    parts = name.split(".")[:-1]
    path = [".".join(parts[:depth]) for depth in range(len(parts) + 1)]
    units = [module for module in path if isinstance(modules[module], UNITS)]
    return units[0] if units else [module for module in path if not isinstance(modules[module], CONTAINERS)][-1]


def _takes_lora(module, base):
    """PEFT's LoRA is in a module's forward: not in those of subclasses, nor with dilation or padding other than zeros.
    Many models read the weight of an embedding (relative positions, queries) without calling it."""
    if not {"weight", "bias"}.issuperset(module.state_dict()):
        return False
    if type(module) in (nn.Conv1d, nn.Conv2d):
        return module.groups == 1 and set(module.dilation) == {1} and module.padding_mode == "zeros"
    if type(module) is nn.Embedding:
        return isinstance(base, PreTrainedModel) and module is base.get_input_embeddings() and module.max_norm is None
    return type(module) in (nn.Linear, Conv1D)


def _factors(matrix, rank, dtype):
    """b (out, r) and a (r, in) with r <= `rank`."""
    u, s, vh = svd(matrix, rank)
    return (u * s.sqrt()).to(dtype), (s.sqrt()[:, None] * vh).to(dtype)
