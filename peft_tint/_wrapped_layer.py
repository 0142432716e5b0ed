"""A module that is wrapped so that its parameters are others while its forward runs, whatever the adapter's method."""

import math
import warnings
from abc import abstractmethod
from contextlib import contextmanager
from functools import partial
from operator import attrgetter

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# These read the weights of their children without calling them, so they are wrapped as one unit.
UNITS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class WrappedLayer(nn.Module, BaseTunerLayer):
    """Wraps a module; its own parameters become W0 + sum_k lambda_k tau_k while its forward runs.

    A subclass holds the terms of that sum by adapter (`_terms`, `_has_terms`, `_changes`).

    The merged tensors are put into the wrapped module's `__dict__` for the call, where they hide the parameters of
    the same name. This serves every kind of module alike (position embeddings and cls tokens too) and leaves names,
    hooks, pickling and gradient checkpointing as they are. Low-rank task vectors add to the output instead, where the
    module is one that allows it: that takes no gradient of the size of a weight.
    """

    def __init__(self, base_layer: nn.Module, active_adapters: list[str]):
        super().__init__()
        self.base_layer = base_layer
        self.tied = {}  # parameter -> (the layer that merges it, its name there); in a dict nn.Module does not see it
        self.merged_adapters = []
        self._in_forward = None  # the merged tensors while the forward runs
        self._unmerged = {}  # the base weights while the adapter is merged into them
        self._disable_adapters = False
        self._active_adapter = list(active_adapters)
        # PEFT expects both on every layer
        self.in_features = getattr(base_layer, "in_features", getattr(base_layer, "in_channels", None))
        self.out_features = getattr(base_layer, "out_features", getattr(base_layer, "out_channels", None))

    @abstractmethod
    def _terms(self, adapter_names=None):
        """(parameter name, coefficients of shape (tasks,), TaskVectors) of all that is added to the base."""

    @abstractmethod
    def _has_terms(self, adapter_name) -> bool:
        """Whether the adapter adds anything here."""

    @abstractmethod
    def _changes(self, name) -> bool:
        """Whether any adapter changes the parameter of this name."""

    def merged_tensors(self, adapter_names=None, low_rank=True) -> dict[str, torch.Tensor]:
        """The merged value of each parameter that the given adapters (default: the active ones) change."""
        if self._in_forward is not None:  # asked by a layer inside of this one, with a parameter tied to one of ours
            return self._in_forward
        merged = self._merge_own(adapter_names, low_rank)
        for name, (owner, name_there) in self.tied.items():
            values = {} if owner.merged or owner.disable_adapters else owner.merged_tensors(adapter_names)
            if name_there in values:
                merged[name] = values[name_there]
        return merged

    def _merge_own(self, adapter_names, low_rank):
        merged = {}
        for name, coefficients, vectors in self._terms(adapter_names):
            # not get_parameter(): FSDP puts plain tensors in the parameters' place
            weight = merged[name] if name in merged else attrgetter(name)(self.base_layer)
            merged[name] = vectors.merge(weight, coefficients, low_rank)
        return merged

    def forward(self, *args, **kwargs):
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(*args, **kwargs)
        terms = self._terms() if adds_low_rank(self.base_layer) else ()
        low_rank = [(row, vectors) for name, row, vectors in terms if name == "weight" and vectors.a is not None]
        self._in_forward = self.merged_tensors(low_rank=not low_rank)
        try:
            with shadowed(self.base_layer, self._in_forward):
                output = self.base_layer(*args, **kwargs)
        finally:
            self._in_forward = None
        for coefficients, vectors in low_rank:
            x = args[0] if args else next(iter(kwargs.values()))
            output = output + low_rank_output(self.base_layer, x, vectors, coefficients).to(output.dtype)
        return output

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Writes the merged weights into the base layer; `unmerge` restores the very tensors it had."""
        adapter_names = [a for a in check_adapters_to_merge(self, adapter_names) if self._has_terms(a)]
        if not adapter_names:
            return
        merged = {}
        with torch.no_grad():
            for name, coefficients, vectors in self._terms(adapter_names):
                weight = merged[name] if name in merged else attrgetter(name)(self.base_layer)
                merged[name] = vectors.bake(weight, coefficients)
        if safe_merge:
            for weight in merged.values():
                if not torch.isfinite(weight).all():
                    raise ValueError(
                        f"NaNs detected in the merged weights. The adapter {adapter_names[0]} seems to be broken"
                    )
        for name, weight in merged.items():
            parameter = attrgetter(name)(self.base_layer)
            self._unmerged.setdefault(name, parameter.data)
            parameter.data = weight
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        if not self.merged:
            # else it is another adapter's, or all it has is tied and its owner unmerges it
            if any(self._has_terms(adapter) for adapter in self.active_adapters):
                warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for name, weight in self._unmerged.items():
            attrgetter(name)(self.base_layer).data = weight
        self._unmerged = {}
        self.merged_adapters = []

    # Some models read a weight where they do not call its module (DeBERTa its relative position embeddings, T5 the
    # dtype of `wo.weight`): they must see the merged one.
    @property
    def weight(self):
        return self._read("weight")

    @property
    def bias(self):
        return self._read("bias")

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # `copy` asks for `__deepcopy__`, which a parametrized module has: it would copy that without this layer
            if name.startswith(("tint_", "dts_", "__")) or "base_layer" not in self.__dict__.get("_modules", {}):
                raise
            return self._read(name)

    def _read(self, name):
        if self.disable_adapters and self.merged:
            self.unmerge()
        parametrized = is_parametrized(self.base_layer, name)
        owned = self._changes(name) or name in self.tied
        if (owned or parametrized) and not self.disable_adapters and not self.merged:
            merged = self.merged_tensors()
            if name in merged:
                return merged[name]
            if parametrized:
                with shadowed(self.base_layer, merged):
                    return getattr(self.base_layer, name)
        return getattr(self.base_layer, name)

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        unload_below(self.base_layer, merge, safe_merge, adapter_names)
        return self.base_layer

    def __repr__(self):
        return f"{type(self).__module__.split('.')[1]}." + super().__repr__()


def unload_below(module, merge, safe_merge, adapter_names):
    """Unloads the layers inside of a module that was wrapped itself: PEFT does not look below a wrapper."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            if isinstance(child, WrappedLayer | ModulesToSaveWrapper):
                parent._modules[name] = child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)


def adds_low_rank(module: nn.Module) -> bool:
    """Whether `low_rank_output` knows what the module does. Not a subclass, whose forward may do something else."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) in (nn.Linear, Conv1D) or (type(module) is nn.Embedding and module.max_norm is None)


def low_rank_output(module, x, vectors, coefficients):
    """What sum_k lambda_k scale_k b_k a_k of the weight adds to the module's output for the input `x`."""
    a, b, c = vectors.a, vectors.b, vectors.rank_coefficients(coefficients)
    if not a.is_floating_point():  # codes of DTS, of one byte each; float16 could not hold sums of so many
        shrink = 2.0 ** -math.ceil(math.log2(a[0].numel()))
        a, b, c = a.to(module.weight.dtype) * shrink, b.to(module.weight.dtype), c / shrink

    def scaled(inner, c):  # not in float16, where the scales are next to zero
        return (inner * c).to(inner.dtype)

    if type(module) is nn.Embedding:
        return scaled(F.embedding(x, b), c) @ a
    x = x.to(a.dtype)
    if type(module) is nn.Linear:
        return F.linear(scaled(F.linear(x, a), c), b)
    if type(module) is Conv1D:  # transformers' one, a linear layer whose weight is transposed
        return scaled(x @ b, c) @ a
    inner = F.conv2d(x, a, None, module.stride, module.padding, module.dilation)
    return F.conv2d(scaled(inner, c[:, None, None]), b[:, :, None, None])


class RootLayer:
    """The parameters that a model holds itself, such as cls tokens of a plain vision transformer.

    Goes before a WrappedLayer in the bases of a class. The model cannot be wrapped, so hooks put the merged tensors in
    place. This layer is a child of the model and does not register it, which would be a cycle."""

    def __init__(self, model: nn.Module, active_adapters: list[str]):
        super().__init__(model, active_adapters)
        del self._modules["base_layer"]
        self.__dict__["base_layer"] = model
        self._shadow = None
        if isinstance(model, PreTrainedModel) and model.can_generate():
            names = ", ".join(name for name, _ in model.named_parameters(recurse=False))
            warnings.warn(
                f"{type(model).__name__} holds {names} itself; adapters change them in `forward` only, but "
                "`generate` may read them elsewhere. Generate with what `merge_and_unload()` returns.",
                stacklevel=2,
            )
        self._hooks = [
            model.register_forward_pre_hook(self._before_forward),
            model.register_forward_hook(self._after_forward, always_call=True),
        ]

    def _before_forward(self, model, args):
        if self.disable_adapters and self.merged:
            self.unmerge()
        if not self.disable_adapters and not self.merged:
            self._in_forward = self.merged_tensors() or None
        if self._in_forward is not None:
            self._shadow = shadowed(model, self._in_forward)
            self._shadow.__enter__()

    def _after_forward(self, model, args, output):
        if self._shadow is not None:
            self._shadow.__exit__(None, None, None)
            self._shadow = self._in_forward = None

    def remove_hooks(self):
        for hook in self._hooks:
            hook.remove()

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        self.remove_hooks()
        return self.base_layer


class WrappingTuner(BaseTuner):
    """What methods have in common whose layers are WrappedLayers."""

    target_module_mapping = {}  # noqa: RUF012, PEFT's own declaration

    def _prepare_adapter_config(self, config, model_config):
        return config  # `target_modules=None` is a rule of ours, not a gap to fill

    def _replace_module(self, parent, child_name, new_module, child):
        if new_module is parent:  # unloading the layer of the model's own parameters
            delattr(parent, child_name)
            return
        # a parent that is wrapped itself hands attributes on, but holds its children in the wrapped module
        setattr(parent.base_layer if isinstance(parent, WrappedLayer) else parent, child_name, new_module)

    def _check_merge_allowed(self):
        # not PEFT's own check, which warns of tied weights: they are merged once here, for all their users
        if any(isinstance(parameter, DTensor) for parameter in self.model.parameters()):
            raise ValueError(
                "The model's weights are sharded over processes (FSDP or tensor parallel), so nothing can be merged "
                "into them. Save the adapter, load it on an unsharded base, and merge there."
            )


def check_no_peft_model(model: nn.Module) -> None:
    if isinstance(model, PeftModel):
        kinds = ", ".join(dict.fromkeys(config.peft_type.value for config in model.peft_config.values()))
        raise ValueError(
            f"The base is a PeftModel with adapters of the type {kinds}. If that is the type to add, call its "
            "`add_adapter`; else give the model that its `merge_and_unload()` or `unload()` returns."
        )


def check_adapter_name(name: str) -> None:
    """Names that PyTorch refuses late, that could not be told from others in a file, or that lead out of a folder."""
    taken = hasattr(nn.ModuleDict, name) or hasattr(nn.ParameterDict, name) or name in ("weight", "bias")
    if taken or not name or "." in name:
        raise ValueError(f"The adapter name {name!r} is taken in PyTorch's modules; use another.")
    if set(name) & set("/\\:\0"):
        raise ValueError(f"The adapter name {name!r} is that of a folder elsewhere when it is saved; use another.")


def plain_name(name: str) -> str:
    """A module's name as it was before it, or one around it, was wrapped."""
    return name.replace(".base_layer", "").replace(".original_module", "")


def short_name(key: str) -> str:
    """A key of a saved adapter without PEFT's prefix, which those of a model without a PeftModel have not."""
    return key.removeprefix("base_model.model.")


def check_names(model, adapter_name, expected, given) -> None:
    """Raises ValueError unless all that an adapter expects is given, and nothing that the model does not know."""
    expected, given, known = (set(map(short_name, keys)) for keys in (expected, given, model.state_dict()))
    for problem, names in (("lacks", expected - given), ("has besides its own", given - expected - known)):
        if names:
            raise ValueError(
                f"The file of the adapter {adapter_name!r} {problem} {len(names)} tensors, such as {min(names)!r}. It "
                "is damaged, or another adapter's; download or save it again."
            )


def wrap_everywhere(model, layers):
    """Puts a wrapper also where the model refers to the wrapped module by a second name, which PEFT does not see."""
    wrapper_of = {id(layer.base_layer): layer for layer in layers}
    for module in model.modules():
        for name, child in module._modules.items():
            if id(child) in wrapper_of and module is not wrapper_of[id(child)]:
                module._modules[name] = wrapper_of[id(child)]


@contextmanager
def shadowed(module, tensors):
    """Makes `module.<name>` another tensor: an instance's `__dict__` comes before `nn.Module.__getattr__`."""
    replaced = []
    if module.__dict__.get("gradient_checkpointing"):
        # transformers has the module run its own forward again in the backward, when this context has been left
        checkpoint = partial(_checkpoint_shadowed, module, tensors, module._gradient_checkpointing_func)
        tensors = {**tensors, "_gradient_checkpointing_func": checkpoint}
    try:
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            attributes = module.get_submodule(owner).__dict__
            replaced.append((attributes, leaf, attributes.get(leaf)))  # FSDP keeps its own tensor there
            attributes[leaf] = tensor
        yield
    finally:
        for attributes, leaf, before in replaced:
            if before is None:
                del attributes[leaf]
            else:
                attributes[leaf] = before


def _checkpoint_shadowed(module, tensors, checkpoint, function, *args, **kwargs):
    def run(*args, **kwargs):
        with shadowed(module, tensors):
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kwargs)
