"""Loads experts (full checkpoints fine-tuned from one base model) and checks them tensor by tensor."""

import copy
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.dataclasses import type_validator
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file, extract_commit_hash, find_adapter_config_file

from ._files import INDEX, SINGLE, check_inside, check_reference, sha256_of, shard_names
from ._structure import is_under
from .checkpoints import module_names
from .task_vectors import LazyTensors, LowRank, compute_task_vector

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
# Settings, by their names in various models, that change what a model computes but the shape of no tensor.
FORWARD_SETTINGS = (
    *("hidden_act", "hidden_activation", "activation", "activation_function", "feed_forward_proj"),
    *("num_attention_heads", "num_key_value_heads", "num_heads", "n_head", "n_heads"),
    *("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "norm_eps", "position_embedding_type"),
    *("rope_theta", "rope_parameters", "rope_scaling", "window_size", "patch_size"),
    *("scale_attn_weights", "scale_attn_by_inverse_layer_idx"),
)
FLOATS = ("F64", "F32", "F16", "BF16")
# Settings on which the number of a model's layers depends.
DEPTH_SETTINGS = (
    *("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers", "n_layer"),
    *("n_layers", "depth", "depths", "num_stages", "hidden_sizes", "conv_dim", "num_experts", "num_local_experts"),
)
# The median over matrices of the cosine between expert and base: about 0 for models trained apart, above 0.9 after
# fine-tuning. The median, since all language models' embeddings have a large mean in common. As many first entries of a
# matrix tell as much as all.
UNRELATED_COSINE = 0.05
COSINE_ENTRIES = 2**18

# Of a transformers config, what belongs to a task; by its padding token GPT-2 and its like find a text's last token.
LABEL_FIELDS = {
    "id2label": dict[int, str | int],
    "label2id": dict[str | int, int] | None,
    "problem_type": str | None,
    "pad_token_id": int | list[int] | None,
}

NO_WEIGHTS = "which changes no weights, so there is nothing to merge. Give full checkpoints, or adapters such as LoRA."


class Expert(NamedTuple):
    """One expert: its tensors under the base model's names, and its module and config where there are any.

    The weights that `low_rank` names are those in `tensors` plus `low_rank[name].dense()`."""

    task: str
    tensors: dict[str, torch.Tensor]
    module: nn.Module | None
    config: PretrainedConfig | None
    low_rank: dict[str, LowRank] = {}  # noqa: RUF012, never changed

    def by_tensor(self, base_tensors: dict[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        """By the id of the base's tensor, since a state dict may have a tied one under another of its names."""
        return {id(base_tensors[name]): value for name, value in self.tensors.items()}

    def task_vector(self, name: str, weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """What the expert changed of the base's `weight`, where `tensor` is its own without the low-rank part."""
        change = compute_task_vector(tensor.to(weight.device), weight.detach())
        return change + self.low_rank[name].dense().view(change.shape).to(change) if name in self.low_rank else change


def lazy_task_vector(expert: Expert, base_tensors: dict[str, torch.Tensor], names) -> LazyTensors:
    """The task vector of an expert, by the names of the base's tensors."""
    of_expert = expert.by_tensor(base_tensors)

    def read(name):
        return expert.task_vector(name, base_tensors[name], of_expert[id(base_tensors[name])])

    return LazyTensors(names, read)


def load_expert(task: str, source, base: nn.Module) -> Expert:
    """Loads the expert of `task` as a model of the base's class.

    `source` is a Hub id or local folder, or {"id", "revision", "subfolder"}, or an expert in memory: a module or a
    state dict. For a base that is not a transformers model, a folder or repository with a `model.safetensors` is a
    state dict. Only safetensors are read. Raises ValueError if the source is not an expert of this kind of model.
    """
    if isinstance(source, nn.Module):
        if hasattr(source, "peft_config"):
            if not isinstance(source, PeftModel):
                raise ValueError(f"Expert {task!r} has adapters without being a PeftModel; give its merged weights.")
            return _from_adapter(task, _copy_sharing_base(source), getattr(source, "config", None))
        return Expert(task, source.state_dict(), source, getattr(source, "config", None))
    if isinstance(source, Mapping) and source and all(isinstance(value, torch.Tensor) for value in source.values()):
        return Expert(task, dict(source), None, None)
    location, where = _location(task, source)
    if _is_adapter(location, where):
        return _load_adapter(task, location, where, base)
    if not isinstance(base, PreTrainedModel):
        file = os.path.join(location, where.get("subfolder", ""), SINGLE)
        if not os.path.isdir(location):
            file = hf_hub_download(location, SINGLE, **where)
        return Expert(task, _named(task, file, load_file, file), None, None)
    return _load_transformers_model(task, location, where, base)


def _location(task, source):
    """Of a reference its folder, of which the files are checked, or Hub id; and {"revision", "subfolder"} where it has
    them."""
    reference = {"id": source} if isinstance(source, str | os.PathLike) else source
    if not isinstance(reference, Mapping) or not isinstance(reference.get("id"), str | os.PathLike):
        raise ValueError(
            f"Expert {task!r} is a {type(source).__name__}; give a Hub id, a folder, a module, or a state "
            "dict of tensors."
        )
    check_reference(f"Expert {task!r}", reference)
    location = os.fspath(reference["id"])
    where = {key: value for key, value in reference.items() if key != "id" and value}
    if os.path.isfile(location):
        _refuse_pickle(task, location)
        raise ValueError(f"Expert {task!r}: {location!r} is a file; give the folder that it is in.")
    if os.path.isdir(location):
        _check_folder(task, location, os.path.join(location, where.get("subfolder", "")))
    return location, where


def pin_expert(task: str, source) -> tuple[str | dict, str]:
    """A reference by which an expert is found again, wherever the process runs and whatever is pushed to the Hub: a
    folder by its absolute path, a Hub id with its commit; and the sha256 of the files with the weights, one after
    another. Raises ValueError for what `load_expert` cannot find either."""
    location, where = _location(task, source)
    files = _weight_files(task, location, where)
    if os.path.isdir(location):
        location = os.path.abspath(location)
    elif commit := extract_commit_hash(files[0], None):
        where = {"revision": commit, **where}
    return {"id": location, **where} if where else location, sha256_of(files)


def _weight_files(task, location, where):
    """As transformers chooses them. Raises ValueError where there are none, or an index leads to other folders."""

    def find(name):
        return cached_file(location, name, **where, _raise_exceptions_for_missing_entries=False)

    of_adapter = SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
    kind, pickled = of_adapter if _is_adapter(location, where) else (SINGLE, "pytorch_model.bin")
    try:
        if file := find(kind):
            return [file]
        index = find(INDEX) if kind == SINGLE else None
        names = shard_names(f"Expert {task!r}", index) if index else []
        files = {name: find(name) for name in names}
        if not files and find(pickled):
            _refuse_pickle(task, pickled)
    except OSError:  # no name of a repository, none of that name, or no access
        files = {}
    if None in files.values():
        missing = next(name for name, file in files.items() if file is None)
        raise ValueError(f"Expert {task!r}: {location!r} has no {missing!r}, which its index names. Save it again.")
    if files:
        return list(files.values())
    if os.path.isdir(location):
        raise ValueError(f"Expert {task!r}: {location!r} has no {kind}. Save it with `save_pretrained`.")
    raise ValueError(
        f"Expert {task!r}: {location!r} is neither a local folder nor a model of which a {kind} can be reached on the "
        "Hub. Check the spelling, the revision, and your access if it is private or you are offline."
    )


def _named(task, location, load, *args, **kwargs):
    """Calls `load`, and names the expert if its files are broken."""
    try:
        return load(*args, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"Expert {task!r}: the file in {location!r} is broken ({error}). Save it again.") from error
    except Exception as error:  # of whatever kind: configs and models check themselves in many ways
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"Expert {task!r}: {location!r} cannot be loaded ({reason}). Save or download it again."
        ) from error


def _refuse_pickle(task, file):
    if file.endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise ValueError(
            f"Expert {task!r} is stored as a pickle ({os.path.basename(file)}), which can run code when it is "
            "loaded, so it is refused. Save it again with `save_pretrained`, which writes safetensors."
        )


def hub_reference(source: str | Mapping | None) -> str | Mapping | None:
    """A reference as an adapter records it that does not need the expert: None for a local folder."""
    location = source["id"] if isinstance(source, Mapping) else source
    is_local = location is not None and (os.path.isdir(location) or not HUB_ID.fullmatch(location))
    return None if is_local else source


def _check_folder(task, location, folder):
    if not os.path.isdir(folder):
        raise ValueError(f"Expert {task!r}: there is no folder {folder!r}. Check `subfolder`.")
    files = os.listdir(folder)
    used = [os.path.join(folder, file) for file in files if file.endswith((".safetensors", ".json"))]
    check_inside(f"Expert {task!r}", location, [folder, *used])
    if not any(file.endswith(".safetensors") for file in files):
        for file in sorted(files):
            _refuse_pickle(task, file)
        raise ValueError(f"Expert {task!r}: the folder {folder!r} has no safetensors file (found {sorted(files)}).")


def _load_transformers_model(task, location, where, base):
    files = _weight_files(task, location, where)
    try:
        settings, _ = PretrainedConfig.get_config_dict(location, **where)
    except Exception as error:
        raise ValueError(f"Expert {task!r}: config.json in {location!r} is broken ({error}). Save it again.") from error
    if not isinstance(settings, dict) or "model_type" not in settings:
        raise ValueError(
            f"Expert {task!r}: {location!r} has no config.json with a `model_type`. Save the expert with "
            "`save_pretrained`."
        )
    if settings["model_type"] != base.config.model_type:
        raise ValueError(
            f"Expert {task!r} from {location!r} is a {settings['model_type']!r} model, the base model is "
            f"{base.config.model_type!r}. Experts must be fine-tuned from the base model."
        )
    for key in ("quantization_config", "transformers_weights"):
        if settings.get(key):
            raise ValueError(
                f"Expert {task!r}: config.json in {location!r} has {key}={settings[key]!r}. Only unquantised weights "
                f"are merged, of a {SINGLE} or the files of its index; save it so."
            )
    config = _named(task, location, type(base.config).from_pretrained, location, **where)
    _check_depth(task, config, base.config)
    config._attn_implementation = None  # which may name one of the Hub, whose code would run
    load, kwargs = type(base).from_pretrained, {**where, "config": config, "output_loading_info": True}
    model, report = _named(task, location, load, location, **kwargs, dtype="auto", use_safetensors=True)
    stored_as = settings.get("architectures") or "its own class"
    remedy = f"It is stored as {stored_as}, the base is a {type(base).__name__}: load the base as that class."
    for problem, names in (("has no", report["missing_keys"]), ("also has", report["unexpected_keys"])):
        if names:
            raise ValueError(f"Expert {task!r} from {location!r} {problem} {listing(names)}. {remedy}")
    tensors = model.state_dict()
    _check_stored_types(task, files, model, tensors)
    return Expert(task, tensors, model, model.config)


def _check_stored_types(task, files, model, tensors):
    """transformers makes floats of whatever type a file has."""
    for file in files:
        with safe_open(file, "pt") as opened:
            types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}
        for stored, name in module_names(types, model).items():
            if types[stored] not in FLOATS and name in tensors and tensors[name].is_floating_point():
                raise ValueError(
                    f"Expert {task!r}: {name!r} is stored in the type {types[stored]}; quantised weights cannot be "
                    "merged. Load base and experts unquantised."
                )


def _check_depth(task, config, base_config):
    """Before a model is made, which takes as long as its config has layers."""
    for key in DEPTH_SETTINGS:
        values = getattr(base_config, key, None), getattr(config, key, None)
        ours, theirs = (list(value) if isinstance(value, tuple) else value for value in values)  # as in a file
        if ours != theirs:
            raise ValueError(
                f"Expert {task!r} has {key}={theirs!r}, the base model {ours!r}. Use the base model that the expert "
                "was fine-tuned from."
            )
    for name in config.sub_configs:
        parts = getattr(config, name), getattr(base_config, name)
        if None not in parts:
            _check_depth(task, *parts)


def _is_adapter(location, where):
    try:
        return find_adapter_config_file(location, **where) is not None
    except OSError:  # no such folder, and no name of a repository either, of which loading will tell
        return False


def _load_adapter(task, location, where, base):
    """An expert that is an adapter of the base model."""
    try:
        config = PeftConfig.from_pretrained(location, **where)
        tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    except Exception as error:
        raise ValueError(f"Expert {task!r}: the adapter in {location!r} is of no kind that PEFT knows.") from error
    if not hasattr(tuner, "merge_and_unload"):
        raise ValueError(f"Expert {task!r} is an adapter of the type {config.peft_type.value}, {NO_WEIGHTS}")
    # of which PEFT would load or import what their configurations name: experts, adapters, a module of Python
    if config.peft_type in ("TINT", "XLORA") or not getattr(config, "is_compressed", True):
        remedy = "Give what its `merge_and_unload` returns, saved with `save_pretrained`."
        raise ValueError(f"Expert {task!r} is an adapter of the type {config.peft_type.value} made of others. {remedy}")
    if getattr(config, "megatron_config", None):
        raise ValueError(f"Expert {task!r} is an adapter for Megatron ({config.megatron_core!r}), which is not loaded.")
    theirs, ours = config.base_model_name_or_path, getattr(base, "name_or_path", None)
    if theirs and ours and os.path.basename(theirs) != os.path.basename(ours):
        warnings.warn(
            f"Expert {task!r}: the adapter in {location!r} was trained on {theirs!r}, the base model is {ours!r}.",
            stacklevel=2,
        )
    config.base_model_name_or_path = None  # or PEFT warns too, of any change of the path
    _weight_files(task, location, where)
    weights = _named(task, location, load_peft_weights, location, device="cpu", **where)
    # PEFT puts trained biases into the base's in place, and starts such as OLoRA's take their part out of its weights
    plain = config.peft_type == "LORA" and config.init_lora_weights in (True, False, "gaussian")
    plain = plain and all(".lora_" in key for key in weights)
    model = without_adapters(base, shares_tensors=plain)
    tensors = dict(model.named_parameters())
    for key, tensor in weights.items():  # a head of the adapter's own size
        name = key.removeprefix("base_model.model.")
        if name in tensors and tensors[name].shape != tensor.shape:
            owner, _, leaf = name.rpartition(".")
            set_tensor(model.get_submodule(owner), leaf, torch.empty_like(tensor))
    config.inference_mode = True
    adapter = _named(task, location, get_peft_model, model, config)
    _named(task, location, set_peft_model_state_dict, adapter, weights)
    expected = get_peft_model_state_dict(adapter, save_embedding_layers=False).keys()
    missing, extra = expected - weights.keys(), weights.keys() - expected - adapter.state_dict().keys()
    if missing or extra:
        problem = f"has no {listing(missing)}" if missing else f"also has {listing(extra)}"
        raise ValueError(
            f"Expert {task!r}: the adapter in {location!r} {problem}. It does not fit {type(base).__name__}; load the "
            "base as the class that the adapter was trained on."
        )
    return _from_adapter(task, adapter, None)


def _copy_sharing_base(model):
    """A copy with the tensors of adapters copied and those of the base shared."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    wrappers = [module for module in model.modules() if isinstance(module, AuxiliaryTrainingWrapper)]
    base = [layer.get_base_layer() for layer in layers] + [wrapper.original_module for wrapper in wrappers]
    of_base = {id(parameter) for module in base for parameter in module.parameters()}
    of_adapters = {id(parameter) for module in layers + wrappers for parameter in module.parameters()} - of_base
    return _copy_sharing(model, [p for p in model.parameters() if id(p) not in of_adapters])


def _copy_sharing(model, parameters):
    return copy.deepcopy(model, {id(p): nn.Parameter(p.data, p.requires_grad) for p in parameters})


def without_adapters(model, shares_tensors=False):
    """A copy of the model as it was before any adapter."""
    model = _copy_sharing(model, model.parameters() if shares_tensors else ())
    vars(model).pop("peft_config", None)
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, AuxiliaryTrainingWrapper):
                module._modules[name] = child.original_module
            elif isinstance(child, BaseTunerLayer):
                plain = child.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
                if plain is module:  # the layer of the model's own parameters
                    del module._modules[name]
                else:
                    module._modules[name] = plain
    return model


def _from_adapter(task, adapter, config):
    """Plain LoRA layers stay low-rank; all else that an adapter changes (DoRA, biases, heads) is merged. Uses it up."""
    tuner = adapter.base_model
    kind = next(iter(adapter.peft_config.values())).peft_type.value if adapter.peft_config else "none"
    if not isinstance(tuner, BaseTuner):
        raise ValueError(f"Expert {task!r} is an adapter of the type {kind}, {NO_WEIGHTS}")
    if len(tuner.active_adapters) != 1:
        raise ValueError(
            f"Expert {task!r} has {len(tuner.active_adapters)} active adapters; make the one to merge active by "
            "`set_adapter`, or give `merge_and_unload()` of it."
        )
    names_of = {}
    for name, parameter in tuner.model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name.replace(".base_layer", ""))
    low_rank = {}
    for name, layer in list(tuner.model.named_modules()):
        if not isinstance(layer, BaseTunerLayer):
            continue
        base_layer = layer.get_base_layer()
        for parameter in base_layer.parameters(recurse=False):
            names = names_of[id(parameter)]
            if len(names) > 1 and not isinstance(layer, TrainableTokensLayer):
                raise ValueError(
                    f"Expert {task!r}: its {kind} adapter works on {' and '.join(map(repr, names))}, one tied tensor "
                    "in the base model, which it would untie. Load the base untied (`tie_word_embeddings=False`)."
                )
        if isinstance(layer, LoraLayer) and (factors := _lora_factors(layer, tuner.active_adapters[0])):
            low_rank[f"{name.replace('.base_layer', '')}.weight"] = factors
            if not any(layer.lora_bias.values()):  # nothing is left of it to be merged
                tuner.model.set_submodule(name, base_layer)
                continue
        for parameter in base_layer.parameters():  # which the merge changes in place, and others share
            parameter.data = parameter.data.clone()
    try:
        model = adapter.merge_and_unload()
    # what the merges of PEFT's methods raise that have none, or not for these layers
    except (AttributeError, NotImplementedError, TypeError) as error:
        raise ValueError(f"Expert {task!r} is an adapter of the type {kind}, which PEFT cannot merge.") from error
    return Expert(task, model.state_dict(), model, config, low_rank)


def _lora_factors(layer, adapter):
    """The factors of a plain LoRA layer, whose part is taken out of the layer; None for one that does more."""
    base = layer.get_base_layer()
    if (
        isinstance(layer, ParamWrapper)
        or adapter in layer.lora_variant
        or layer.merged
        or type(base) not in (nn.Linear, Conv1D, nn.Embedding, nn.Conv2d)
    ):
        return None
    if isinstance(base, nn.Conv2d) and base.groups > 1:
        return None
    if adapter in layer.lora_embedding_A:
        a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    elif adapter in layer.lora_A:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    else:
        return None
    a, b, taken_out = a.data, b.data.clone(), b.data
    taken_out.zero_()
    if isinstance(base, nn.Conv2d):
        b = b.flatten(1)
    if isinstance(base, nn.Embedding | Conv1D):  # whose weight is stored transposed
        a, b = b.t(), a.t()
    return LowRank(b.contiguous(), a.contiguous(), layer.scaling[adapter])


def set_tensor(module, name, tensor):
    """Puts another parameter or buffer, maybe of another size, in the place of one."""
    parameter = isinstance(getattr(module, name), nn.Parameter)
    setattr(module, name, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()) if parameter else tensor)
    fit_features(module)


def fit_features(module):
    """Has a layer say the sizes of the weight that it now has."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = len(module.weight)


def check_expert(
    expert: Expert, base_tensors: dict[str, torch.Tensor], per_task: set[str], fixed: set[str], base_config
) -> None:
    """Accounts for every tensor of an expert; raises ValueError, naming expert and tensor, at the first that is off.

    `base_tensors` are the base's parameters and persistent buffers by name, tied ones under each of their names, and
    finite (`check_finite`).
    Tensors named in `per_task` (the head, the tint layer) may have shapes of their own, those in `fixed` cannot be
    merged (buffers) and must have the base's values.
    """
    for problem in expert_problems(expert, base_tensors, per_task, fixed, base_config):
        raise ValueError(problem)


def match_vocabulary(
    expert: Expert, base_tensors: dict[str, torch.Tensor], vocabulary: set[str], common: bool
) -> Expert:
    """The expert with as many tokens as the base, if `common` allows that: without the rows of the embeddings
    (`vocabulary`) that it has more, and with the base's for those that it has not. Raises ValueError otherwise."""
    tensors = dict(expert.tensors)
    for name in vocabulary & tensors.keys() & base_tensors.keys():
        weight, tensor = base_tensors[name], tensors[name]
        if tensor.shape == weight.shape or tensor.shape[1:] != weight.shape[1:]:
            continue
        if not common or name in expert.low_rank:
            remedy = (
                f"Give the base as many by `base.resize_token_embeddings({len(tensor)})`; in `merge` and "
                "`merge_checkpoints`, `common_vocabulary=True` merges the rows that both have"
            )
            raise ValueError(
                f"Expert {expert.task!r} has {len(tensor)} tokens, the base model {len(weight)} ({name!r}). "
                f"{'Give the expert with its adapter merged' if common else remedy}."
            )
        rows = min(len(tensor), len(weight))
        warnings.warn(
            f"Expert {expert.task!r}: {name!r} has {len(tensor)} tokens, the base model {len(weight)}; the first "
            f"{rows} are merged, taken to be the same ones.",
            stacklevel=3,
        )
        tensors[name] = torch.cat([tensor[:rows], weight.detach()[rows:].to(tensor.device)])  # in the wider type
    same = all(tensors[name] is tensor for name, tensor in expert.tensors.items())
    return expert if same else expert._replace(tensors=tensors)


def expert_problems(expert, base_tensors, per_task, fixed, base_config) -> Iterator[str]:
    """Yields all that `check_expert` raises for, each with expert, tensor, reason and remedy."""
    task, tensors = expert.task, expert.tensors
    if expert.config is not None and base_config is not None:
        for key in ("model_type", *FORWARD_SETTINGS):
            ours, theirs = getattr(base_config, key, None), getattr(expert.config, key, None)
            if ours != theirs:
                yield (
                    f"Expert {task!r} was trained with {key}={theirs!r}, the base model has {ours!r}. "
                    "Use the base model that the expert was fine-tuned from."
                )
                if key == "model_type":
                    break  # its settings have other names
    quantised = set()  # weights with tensors and shapes of their own
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() and name in base_tensors and base_tensors[name].is_floating_point():
            quantised.add(name)
            yield (
                f"Expert {task!r}: {name!r} has the type {tensor.dtype}; quantised weights cannot be merged. "
                "Load base and experts unquantised."
            )
    present = {id(base_tensors[name]) for name in tensors if name in base_tensors}
    # A file may store a tied tensor under one of its names only.
    missing = [name for name, tensor in base_tensors.items() if name not in tensors and id(tensor) not in present]
    extra = [name for name in tensors if name not in base_tensors]
    if missing:
        yield f"Expert {task!r} has no {listing(missing)}, which the base model has. Is it another model?"
    if extra:
        yield (
            f"Expert {task!r} has {listing(extra)}, which the base model has not. Load the base as the "
            "class of the expert (for instance AutoModelForSequenceClassification)."
        )
    unchanged = set()
    found = {}  # kind -> the problems of single tensors; of many alike, the first stands for all
    first_name = {}
    for name in [name for name in tensors if name in base_tensors and name not in quantised]:
        tensor, weight = tensors[name], base_tensors[name]
        other = first_name.setdefault(id(weight), name)
        if not (other == name or torch.equal(tensors[other], tensor)):
            found.setdefault("tied", []).append(
                f"Expert {task!r}: {other!r} and {name!r} are one tied tensor in the base model and differ in the "
                "expert. Untie the base's (`tie_word_embeddings=False`), or tie the expert's."
            )
        parts = list(expert.low_rank.get(name, ())[:2])
        if same_values(tensor, weight.detach()):
            unchanged.add(name)
        else:
            parts.append(tensor)
        if tensor.is_floating_point() and not all(map(is_finite, parts)):
            count = sum(int((~torch.isfinite(part)).sum()) for part in parts)
            found.setdefault("finite", []).append(
                f"Expert {task!r}: {name!r} has {count} NaN or Inf of {tensor.numel()} values. The "
                "checkpoint is broken; fine-tune or download it again."
            )
        if name not in per_task and tensor.shape != weight.shape:
            found.setdefault("shape", []).append(
                f"Expert {task!r}: {name!r} has shape {tuple(tensor.shape)}, in the base model it has "
                f"{tuple(weight.shape)}. Experts must be fine-tuned from the base model; a layer that "
                "differs by task must be the model's head, or for TINT be named in `tint_layer`."
            )
        elif name in fixed and tensor.is_floating_point() and not torch.equal(tensor, weight.to(tensor)):
            found.setdefault("fixed", []).append(
                f"Expert {task!r}: the buffer {name!r} differs from the base model's. Buffers such as running "
                "statistics (BatchNorm) are not merged; fine-tune with them frozen (the norms in `eval()` mode)."
            )
    for first, *more in found.values():
        yield first + (f" ({len(more)} more tensors are like that.)" if more else "")
    matrices = {name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.ndim > 1} - per_task
    same = [name for name in matrices & base_tensors.keys() if tensors[name].shape == base_tensors[name].shape]
    cosines = sorted(1.0 if n in unchanged else _cosine(tensors[n], base_tensors[n].detach()) for n in same)
    if cosines and cosines[len(cosines) // 2] < UNRELATED_COSINE:
        problem = (
            f"Expert {task!r} was not fine-tuned from this base model: the median cosine between their matrices is "
            f"{cosines[len(cosines) // 2]:.3f} (fine-tuning keeps it above 0.9). Use the base model that it came from."
        )
        if base_config is not None:
            yield problem
        else:
            warnings.warn(problem, stacklevel=3)  # a plain module may be small, and trained for as long as the base


def check_finite(base_tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in base_tensors.items():
        if tensor.is_floating_point() and not is_finite(tensor):
            raise ValueError(f"The base model's {name!r} has NaN or Inf; download or save it again.")


def share_unchanged(expert: Expert, base_tensors: dict[str, torch.Tensor]) -> Expert:
    """The expert with the base's own tensors where its have the same values, which is seen at once from then on."""
    tensors = dict(expert.tensors)
    for name in tensors.keys() & base_tensors.keys():
        if same_values(tensors[name], base_tensors[name].detach()):
            tensors[name] = base_tensors[name].detach()
    return expert._replace(tensors=tensors)


def same_values(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether an expert's tensor is the base's, which needs no look at them where they are one in memory."""
    if (tensor.shape, tensor.dtype, tensor.device) != (weight.shape, weight.dtype, weight.device):
        return False
    shared = tensor.data_ptr() == weight.data_ptr() and tensor.stride() == weight.stride()
    return shared or torch.equal(tensor, weight)


def is_finite(tensor: torch.Tensor) -> bool:
    """By its sum, which is not finite if an entry is not, and is looked into only then: far faster than a mask."""
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(total.isfinite()) or bool(torch.isfinite(tensor).all())


def _cosine(x, y):
    x, y = (tensor.flatten()[:COSINE_ENTRIES].to(x.device, torch.float32) for tensor in (x, y))
    norms = x.norm() * y.norm()
    return (x.dot(y) / norms).item() if norms else 1.0


def listing(names):
    names = sorted(names)
    return f"{', '.join(map(repr, names[:3]))}" + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def check_unquantised(model, tensors, buffers):
    integers = [name for name in tensors if name not in buffers and not tensors[name].is_floating_point()]
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        sign = f"quantization_method={getattr(method, 'value', method)!r}"
    elif integers:
        sign = f"{integers[0]!r} has the type {tensors[integers[0]].dtype}"
    else:
        return
    raise ValueError(
        f"The base model is quantised ({sign}), and task vectors cannot be added to quantised weights. Load it without "
        "`quantization_config`, for instance in bfloat16, and quantise what `merge_and_unload` returns."
    )


def expert_module(expert, name, base_module, tensors, of_expert):
    """The expert's own copy of a module, of its own size, on the base's device, in its dtype and mode."""
    reference = next(base_module.parameters())
    if expert.module is not None:
        module = copy.deepcopy(expert.module.get_submodule(name))
        for changed, factors in expert.low_rank.items():
            if is_under(changed, [name]):
                weight = attrgetter(changed.removeprefix(f"{name}."))(module).data
                weight += factors.dense().view(weight.shape).to(weight)
    else:
        module = without_adapters(base_module)
        for path, child in module.named_modules():
            for leaf, _ in chain(child.named_parameters(recurse=False), child.named_buffers(recurse=False)):
                full_name = ".".join(filter(None, (name, path, leaf)))
                if full_name not in tensors:  # a buffer that is not saved
                    continue
                set_tensor(child, leaf, of_expert[id(tensors[full_name])].detach().clone())
    # an expert that comes from its training may be in training mode still
    return module.to(reference.device, reference.dtype).requires_grad_(True).train(base_module.training)


def expert_labels(expert, model, heads):
    """The label fields of the task's config. A state dict has none: then names of the size of its head."""
    base = labels_of(getattr(model, "config", None))
    if expert.config is not None:
        return labels_of(expert.config)
    linears = [m for head in heads for m in head.modules() if isinstance(m, nn.Linear)]
    if not base or not linears or linears[-1].out_features == len(base["id2label"]):
        return base
    names = [f"LABEL_{index}" for index in range(linears[-1].out_features)]
    return {**base, "id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def labels_of(config) -> dict:
    """The fields of a transformers config that name a task's labels; {} for a model without them."""
    if not getattr(config, "id2label", None):
        return {}
    return {field: copy.copy(getattr(config, field)) for field in LABEL_FIELDS if hasattr(config, field)}


def labels_from_json(labels: dict) -> dict:
    """What `labels_of` took, as it was before JSON made the class indices strings. Raises ValueError for all else."""
    try:
        if labels:
            labels = {**labels, "id2label": {int(index): name for index, name in labels["id2label"].items()}}
        for field, value in labels.items():
            type_validator(field, value, LABEL_FIELDS[field])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"`labels` is {labels!r}, which are no labels of a task ({error!r}).") from error
    return labels


def set_labels(model, labels: dict) -> None:
    """Gives a model's config the fields that `labels_of` has taken."""
    for field, value in labels.items():
        setattr(model.config, field, value)
    if labels and hasattr(model, "num_labels"):  # many heads' losses read this copy
        model.num_labels = model.config.num_labels
