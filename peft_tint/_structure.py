"""What a model is made of, seen through any adapters that already wrap it: its modules, tensors, head and blocks; and
which of its parameters a config targets."""

import copy
import difflib
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ._wrapped_layer import UNITS, RootLayer, WrappedLayer

# These are not called but read by index or looped over, so what they hold belongs to the module around them. So do the
# originals of a parametrized module (weight norm), which are in a ModuleList in a ModuleDict.
PARAMETER_CONTAINERS = (nn.ParameterList, nn.ParameterDict)
CONTAINERS = (nn.ModuleList, nn.ModuleDict, *PARAMETER_CONTAINERS)
# How models that do not keep their backbone under `base_model_prefix` (CLIP, SigLIP) name their head.
HEAD_NAMES = ("classifier", "score", "classification_head", "qa_outputs")
# How decoders name the norm after their last block. Some (BART's) have one before the first and none after the last.
FINAL_NORMS = ("norm", "norm_f", "ln_f", "ln_out", "out_norm", "layer_norm", "embedding_norm")
FINAL_NORMS += ("final_norm", "final_layernorm", "final_layer_norm")


def plain_modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of all modules with the names they had before any adapter was added, each name once."""
    while isinstance(module, WrappedLayer | AuxiliaryTrainingWrapper):
        module = module.base_layer if isinstance(module, WrappedLayer) else module.original_module
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None and not isinstance(child, RootLayer):
            yield from plain_modules(child, join(name, child_name))


def join(module: str, leaf: str) -> str:
    """A tensor's name; the model itself is the module ''."""
    return f"{module}.{leaf}" if module else leaf


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that a wrapper of this module is responsible for: not its children's, except in a unit and what
    containers hold."""
    if isinstance(module, UNITS):
        return dict(module.named_parameters(remove_duplicate=False))
    own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
    for name, child in module._modules.items():
        if isinstance(child, CONTAINERS):
            own.update((join(name, leaf), parameter) for leaf, parameter in own_parameters(child).items())
    return own


def has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def named_tensors(modules: dict[str, nn.Module]) -> tuple[dict[str, torch.Tensor], set[str]]:
    """Parameters and persistent buffers under all their names, as in a state dict; and the names of the buffers."""
    tensors, buffers = {}, set()
    for name, module in modules.items():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            tensors[join(name, leaf)] = parameter
        for leaf, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            if leaf not in module._non_persistent_buffers_set:
                tensors[join(name, leaf)] = buffer
                buffers.add(join(name, leaf))
    return tensors, buffers


def float_bytes(tensors: dict[str, torch.Tensor], buffers: set[str]) -> int:
    """What the parameters take in float32, of which a `budget` is a fraction."""
    return 4 * sum({id(t): t.numel() for name, t in tensors.items() if name not in buffers}.values())


def find_head(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """The names of the modules that make a task's output of the backbone's features; [] where there are none.

    In a transformers model for a task (`...For...`) that is all beside the backbone, such as DistilBERT's
    `pre_classifier` and `classifier`; a model that takes any backbone (Depth Anything, UperNet) names it `backbone`. A
    language model's output embeddings belong to the vocabulary, not to a task.
    """
    if not isinstance(model, PreTrainedModel) or "For" not in type(model).__name__:
        return []
    if model.get_output_embeddings() is not None:
        return []
    children = [
        name
        for name, module in modules.items()
        if name and "." not in name and has_parameters(module) and not isinstance(module, PARAMETER_CONTAINERS)
    ]
    for backbone in (model.base_model_prefix, "backbone"):
        if backbone in children:
            return [name for name in children if name != backbone]
    return [name for name in children if name in HEAD_NAMES]


def find_final_norm(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """The name of the norm between a language model's decoder and its output embeddings; [] where there is none."""
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None:
        return []
    decoder = next((name for name, module in modules.items() if module is model.get_decoder()), None)
    if decoder is None or join(decoder, "project_out") in modules:  # of OPT, which comes after the norm
        return []
    norms = [join(decoder, name) for name in FINAL_NORMS]
    return [name for name in norms if name in modules and has_parameters(modules[name])]


def find_vocabulary(model: nn.Module, tensors: dict[str, torch.Tensor]) -> set[str]:
    """The names of the tensors with a row for each token: input and output embeddings."""
    if not isinstance(model, PreTrainedModel):
        return set()
    try:
        inputs = model.get_input_embeddings()
    except NotImplementedError:  # as of models without a text
        inputs = None
    layers = [inputs if isinstance(inputs, nn.Embedding) else None, model.get_output_embeddings()]
    rows = {id(parameter) for layer in layers if layer for parameter in layer.parameters(recurse=False)}
    return {name for name, tensor in tensors.items() if id(tensor) in rows}


class Structure(NamedTuple):
    """A model's tensors under all names that they have, and the names of those that are special."""

    tensors: dict[str, torch.Tensor]
    fixed: set[str]  # buffers, which are not merged
    head: set[str]  # a task's own
    vocabulary: set[str]  # with a row for each token


def inspect_model(model: nn.Module) -> Structure:
    modules = dict(plain_modules(model))
    tensors, buffers = named_tensors(modules)
    head = find_head(model, modules)
    in_head = {name for name in tensors if is_under(name, head)}
    return Structure(tensors, buffers, in_head, find_vocabulary(model, tensors))


def find_layers(wanted: str | list[str], modules: dict[str, nn.Module]) -> list[str]:
    """The full names of modules given by name or unique ending. Raises ValueError for none or more than one."""
    found = []
    for layer in [wanted] if isinstance(wanted, str) else wanted:
        matches = [layer] if layer in modules else [name for name in modules if name.endswith(f".{layer}")]
        if not matches:
            near = difflib.get_close_matches(layer, [name for name in modules if name], n=5, cutoff=0.3)
            raise ValueError(f"`tint_layer` {layer!r} matches no module of the model. Near to it: {', '.join(near)}.")
        if len(matches) > 1:
            raise ValueError(
                f"`tint_layer` {layer!r} matches {len(matches)} modules ({', '.join(matches[:4])}, ...). "
                "Write out the one you mean, or list those you mean."
            )
        found += matches
    return found


def is_under(name: str, ancestors, strictly: bool = False) -> bool:
    return any(name.startswith(f"{ancestor}.") or (name == ancestor and not strictly) for ancestor in ancestors)


def unit_name(granularity: str, module: str, parameter: str) -> str:
    """What shares a coefficient with this parameter. Outside of numbered blocks, siblings share one."""
    if granularity == "model":
        return "model"
    if granularity == "block":
        block = re.match(r"(.*?\.\d+)(\.|$)", module)
        return block[1] if block else module.rpartition(".")[0] or module or "(model)"
    return (module or "(model)") if granularity == "module" else join(module, parameter)


def resolve_all_linear(config, model, modules, per_task):
    """Writes out what `target_modules="all-linear"` stands for."""
    if config.target_modules == "all-linear":
        vocabulary = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None  # PEFT's exception
        linears = {name for name, module in modules.items() if isinstance(module, nn.Linear | Conv1D)}
        config.target_modules = {n for n in linears if not is_under(n, per_task) and modules[n] is not vocabulary}


def merged_parameters(config, modules, per_task):
    """The parameters to merge by module, and of those the tied ones, whose value another module's entry decides."""
    units = [name for name, module in modules.items() if isinstance(module, UNITS)]
    candidates = {
        name: own_parameters(module)
        for name, module in modules.items()
        if not is_under(name, per_task) and not is_under(name, units, strictly=True)
        if not isinstance(module, CONTAINERS)
    }
    chosen = {id(p) for name, own in candidates.items() if is_target(config, name) for p in own.values()}
    targets, tied, owner = {}, {}, {}
    for name, own in candidates.items():
        # A parameter that is merged in one place is merged wherever else it is used
        parameters = {leaf: p for leaf, p in own.items() if id(p) in chosen}
        if parameters:
            targets[name] = parameters
        for leaf, p in parameters.items():
            if owner.setdefault(id(p), (name, leaf)) != (name, leaf):
                tied.setdefault(name, {})[leaf] = owner[id(p)]
    return targets, tied


def is_target(config: PeftConfig, name: str):
    """PEFT's matching rules, where no `target_modules` at all means every module."""
    if config.target_modules is not None:
        return check_target_module_exists(config, name)
    config = copy.copy(config)
    config.target_modules = ".*"
    found = check_target_module_exists(config, name)
    if found and getattr(config, "layers_to_transform", None) is not None:
        # PEFT counts blocks only where a list of endings matches; a block is to match itself too
        config.target_modules, config.exclude_modules = {"any"}, None
        return check_target_module_exists(config, f"{name}.any")
    return found
