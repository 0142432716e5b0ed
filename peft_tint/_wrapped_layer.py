"""A module that is wrapped so that its parameters are others while its forward runs, whatever the adapter's method."""

import math
import threading
import warnings
from abc import abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, is_
from types import MethodType

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from peft.utils import ModulesToSaveWrapper
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.stateless import _reparametrize_module
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# These read the weights of their children without calling them, so they are wrapped as one unit.
UNITS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


LINEAR_FORWARD = nn.Linear.forward  # which others may patch

# Held by who changes a module for a call because nothing else will do, so that no other thread calls it meanwhile.
CHANGED_FOR_A_CALL = threading.RLock()


class _InThread(threading.local):
    """The RootLayers whose models a thread calls, one inside of another, with what they have put in place."""

    def __init__(self):
        self.shadows = []


_IN_THREAD = _InThread()


class Asked:
    """What the call of a model that is running asks for; None is what the model does by default."""

    def __init__(self):
        # set from the beginning, or torch.compile would see another object after the first call
        self.adapters: list[str] | None = None  # that run
        self.task: str | None = None
        self.task_names: list[str] | None = None  # the task of each row
        self.adapter_names: list[str] | None = None  # the adapter of each row
        self.seen: object | None = None  # what has been looked at for all layers when the call began
        self.spans = False  # whether the call may have several forwards, as that of `generate`


class _AskedInThread(Asked, threading.local):
    """Each thread sees its own."""


class Calls:
    """By `asked`, the layers of a model see what its call asks for: each thread its own call. Who sets something for a
    call puts it back at the end."""

    def __init__(self):
        self._of_threads, self._of_compiler = _AskedInThread(), Asked()
        self.whole = False  # whether the model is traced from its own forward on, not only a part of it
        self.seen = None  # what all that the layers keep was merged of, until one of them keeps something else

    @property
    def asked(self) -> Asked:
        # torch.compile traces one call, and cannot follow what that writes for its thread
        traced = self.whole and torch.compiler.is_compiling()
        return self._of_compiler if traced else self._of_threads

    def __reduce__(self):
        return Calls, ()  # a copy of a model, also one that is being called, is not


@dataclass(eq=False, slots=True)
class Kept:
    """What a layer has merged, and what it was merged of."""

    adapter_names: list[str]
    extra: object  # of the subclass
    module: nn.Module
    sources: list[tuple]  # (where a tensor is registered, its name, it, its version, address, stride and storage)
    merged: dict[str, torch.Tensor]
    low_rank: list[tuple[torch.Tensor, nn.Module]]  # what is not merged but added to the output
    trains: bool  # whether something of that takes gradients, which do not get there
    seen: object | None = None  # of a call: it needs no look here
    copy: "Copy | None" = None  # of the module

    def prepare(self) -> bool:
        """Makes a copy of the module for all calls, if that is any faster and what the calls read are its attributes
        alone, which can be looked at."""
        module, names, self.copy = self.module, self.merged.keys(), None
        if type(module) is not nn.Linear and names == module._parameters.keys() and can_be_copied(module, names):
            self.copy = Copy(module, self.merged)
        return self.copy is not None

    def is_of(self, adapter_names, extra, module) -> bool:
        if extra != self.extra or module is not self.module or adapter_names != self.adapter_names:
            return False
        for place, name, tensor, version, address, stride, _ in self.sources:
            if place.get(name) is not tensor or tensor._version != version:
                return False
            if tensor.data_ptr() != address or tensor.stride() != stride:
                return False
        return True


class WrappedLayer(nn.Module, BaseTunerLayer):
    """Wraps a module; its own parameters become W0 + sum_k lambda_k tau_k while its forward runs.

    A subclass holds the terms of that sum by adapter (`_terms`, `_sources`, `_has_terms`, `_changes`), and what else
    decides on them (`_extra`).

    What runs is the wrapped module with the merged tensors (`call_with`), so that names, hooks, pickling and gradient
    checkpointing stay as they are, and threads can share the model. Every kind of module is served alike (position
    embeddings and cls tokens too). Low-rank task vectors add to the output instead, where the module is one that
    allows it: that takes no gradient of the size of a weight. Without gradients, merged tensors are kept until
    something of what they were merged of changes.
    """

    _extra = None
    reused = None  # see `TintModel.reuse_merged_weights`

    def __init__(self, base_layer: nn.Module, active_adapters: list[str]):
        super().__init__()
        self.base_layer = base_layer
        self._calls = Calls()  # its tuner gives it its own
        self.tied = {}  # parameter -> (the layer that merges it, its name there); in a dict nn.Module does not see it
        self.merged_adapters = []
        self._kept = {}  # whether low ranks are to be merged, too -> Kept, without gradients
        self._ahead = None  # Kept, with the graph, from a forward until its backward is through
        self._in_forward = None  # the merged tensors while a forward is traced that has them in the place of parameters
        self._unmerged = {}  # the base weights while the adapter is merged into them
        self._disable_adapters = False
        self._active_adapter = list(active_adapters)
        # PEFT expects both on every layer
        self.in_features = getattr(base_layer, "in_features", getattr(base_layer, "in_channels", None))
        self.out_features = getattr(base_layer, "out_features", getattr(base_layer, "out_channels", None))

    @property
    def base_layer(self) -> nn.Module:
        return self._modules["base_layer"]  # which takes a tenth of the time of `__getattr__`

    @abstractmethod
    def _terms(self, adapter_names=None):
        """(parameter name, coefficients of shape (tasks,), TaskVectors) of all that is added to the base."""

    @abstractmethod
    def _sources(self, adapter_names):
        """(dict, key) of each tensor that an adapter's terms are computed of."""

    @abstractmethod
    def _has_terms(self, adapter_name) -> bool:
        """Whether the adapter adds anything here."""

    @abstractmethod
    def _changes(self, name) -> bool:
        """Whether any adapter changes the parameter of this name."""

    def merged_tensors(self, adapter_names=None) -> dict[str, torch.Tensor]:
        """The merged value of each parameter that the given adapters (default: those of the call) change."""
        return self._merged(adapter_names, True, is_traced())[0]

    def _merged(self, adapter_names, low_rank, traced):
        """As `merged_tensors`; the low-rank terms (rank coefficients, TaskVectors) of the weight, which without
        `low_rank` are not in it; and a copy of the module that has the merged tensors, if there is one."""
        asked = self._calls.asked
        if adapter_names is None:
            kept = self._to_use(low_rank)
            if kept is not None and kept.seen is asked.seen is not None and not self.tied and not traced:
                return kept.merged, kept.low_rank, kept.copy
            adapter_names = self.active_adapters if asked.adapters is None else asked.adapters
        if self._in_forward is not None:  # asked by a layer inside of this one, with a parameter tied to one of ours
            return self._in_forward, [], None
        merged, left_out = self._merged_own(adapter_names, low_rank)
        if not self.tied:
            return merged, left_out, None
        merged = dict(merged)
        for name, (owner, name_there) in self.tied.items():
            if owner is self:  # whose forward may use it by either name
                values = merged
            else:
                values = {} if owner.merged or owner.disable_adapters else owner.merged_tensors(adapter_names)
            if name_there in values:
                merged[name] = values[name_there]
        return merged, left_out, None

    def _to_use(self, low_rank):
        """What is kept for a call with or without gradients."""
        if not torch.is_grad_enabled():
            return self._kept.get(low_rank)
        ahead = self._ahead
        if ahead is not None:
            return None if low_rank and ahead.low_rank else ahead
        kept = self._kept.get(low_rank)
        return None if kept is None or kept.trains else kept

    def _merged_own(self, adapter_names, low_rank):
        if is_traced():
            return self._merge(adapter_names, low_rank)
        # DataParallel's copies have other modules, but share `_kept`
        extra, module, grad = self._extra, self.base_layer, torch.is_grad_enabled()
        kept = self._to_use(low_rank)
        # outside of its forward what was merged ahead is for gradient checkpointing, which counts what is saved
        usable = kept is not None and (kept is not self._ahead or torch._C._current_graph_task_id() != -1)
        if usable and kept.is_of(adapter_names, extra, module):
            return kept.merged, kept.low_rank
        sources, self._calls.seen = self._find_sources(adapter_names), None
        trains = sources is not None and any(tensor.requires_grad for _, _, tensor, *_ in sources)
        if sources is None or (grad and trains):
            self._kept = {}  # a training needs its memory
            return self._merge(adapter_names, low_rank)
        keeps_low_rank = self._keeps_low_rank(adapter_names)
        with torch.inference_mode(False), torch.no_grad():
            merged, left_out = self._merge(adapter_names, low_rank or keeps_low_rank)
        kept = Kept(list(adapter_names), extra, module, sources, merged, left_out, trains)
        if left_out:
            self._kept = {False: kept}
        elif keeps_low_rank or all(vectors.a is None for _, _, vectors in self._terms(adapter_names)):
            self._kept = {False: kept, True: kept}
        return merged, left_out

    def _keeps_low_rank(self, adapter_names) -> bool:
        """Whether what is kept has low ranks, too, although they could be added to the output."""
        return False

    def _find_sources(self, adapter_names):
        """What the merged tensors are made of, if it can be told whether that has changed."""
        if is_distributed() and self.reused is None:
            return None  # a base that FSDP shards is whole for one forward
        places = list(self._sources(adapter_names))
        for name in dict.fromkeys(name for name, _, _ in self._terms(adapter_names)):
            owner, _, leaf = name.rpartition(".")
            places.append((own_parameters_of(self.base_layer.get_submodule(owner)), leaf))
        found = [(place, name, place.get(name)) for place, name in places]
        if any(tensor is None or tensor.is_inference() for _, _, tensor in found):
            return None  # tensors of inference mode have no version
        try:  # who holds the storage knows that no other is put at its address
            return [(*where, t, t._version, t.data_ptr(), t.stride(), t.untyped_storage()) for *where, t in found]
        except RuntimeError:  # tensors of `torch.func` have no storage
            return None

    def _merge(self, adapter_names, low_rank):
        merged, left_out = {}, []
        for name, coefficients, vectors in self._terms(adapter_names):
            adds = not low_rank and name == "weight" and vectors.a is not None
            if adds:
                left_out.append((vectors.rank_coefficients(coefficients), vectors))
            if not adds or vectors.dense is not None:
                weight = merged[name] if name in merged else self._base_weight(name)
                merged[name] = vectors.merge(weight, coefficients, not adds)
        return merged, left_out

    def _base_weight(self, name):
        owner, _, leaf = name.rpartition(".")
        module = self.base_layer.get_submodule(owner)
        own = own_parameters_of(module)
        return own[leaf] if leaf in own else getattr(module, leaf)  # FSDP1 has plain tensors in their place

    def _apply(self, *args, **kwargs):
        # or what was moved away would take memory until the next forward
        self._kept, self._ahead, self._calls.seen = {}, None, None
        return super()._apply(*args, **kwargs)

    def set_adapter(self, *args, **kwargs):
        self._calls.seen = None
        super().set_adapter(*args, **kwargs)

    def __getstate__(self):
        return {**self.__dict__, "_kept": {}, "_ahead": None}

    def forward(self, *args, **kwargs):
        base_layer = self.base_layer
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return base_layer(*args, **kwargs)
        traced = is_traced()
        merged, low_rank, copy = self._merged(None, not adds_low_rank(base_layer), traced)
        if not merged:
            output = base_layer(*args, **kwargs)
        elif copy is not None:
            output = copy.call(args, kwargs)
        elif traced:
            try:
                self._in_forward = merged
                with _reparametrize_module(base_layer, merged):
                    output = base_layer(*args, **kwargs)
            finally:
                self._in_forward = None
        else:
            output = call_with(base_layer, merged, args, kwargs)
        for c, vectors in low_rank:
            x = args[0] if args else next(iter(kwargs.values()))
            output = output + low_rank_output(base_layer, x, vectors, c).to(output.dtype)
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
        self._kept = {}

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
                return getattr(Copy(self.base_layer, merged).copy, name)
        return getattr(self.base_layer, name)

    def unload_and_optionally_merge_module(self, merge, safe_merge, adapter_names):
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        unload_below(self.base_layer, merge, safe_merge, adapter_names)
        return self.base_layer

    def __repr__(self):
        return f"{type(self).__module__.split('.')[1]}." + super().__repr__()


def is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def unload_below(module, merge, safe_merge, adapter_names):
    """Unloads the layers inside of a module that was wrapped itself: PEFT does not look below a wrapper."""
    for parent in module.modules():
        for name, child in parent._modules.items():
            if isinstance(child, WrappedLayer | ModulesToSaveWrapper):
                parent._modules[name] = child.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)


def attributes_with(module: nn.Module, tensors: dict[str, torch.Tensor]) -> dict:
    """The attributes of the module that has these tensors in the place of its own and shares all else with it."""
    own, below = tensors, {}
    if any("." in name for name in tensors):
        own = {name: tensor for name, tensor in tensors.items() if "." not in name}
        for name in tensors.keys() - own.keys():
            child, _, rest = name.partition(".")
            below.setdefault(child, {})[rest] = tensors[name]
    # attributes come first, and there FSDP has its own; what was compiled is bound to the module
    attributes = {**vars(module), **own, "_compiled_call_impl": None, "_parameters": parameters_with(module, own)}
    if below:
        changed = {child: Copy(module._modules[child], theirs).copy for child, theirs in below.items()}
        attributes["_modules"] = {**module._modules, **changed}
    return attributes


def own_parameters_of(module):
    """Also while `shadowed` has put others in their place."""
    if is_traced():
        return module._parameters
    with CHANGED_FOR_A_CALL:
        return vars(module).get("_shadowed", module._parameters)


def parameters_with(module, tensors):
    """Its parameters with these in the place of its own, by all names that it has for them."""
    own = module._parameters
    replaced = {id(own[name]): tensor for name, tensor in tensors.items() if name in own}
    return {name: replaced.get(id(value), value) for name, value in own.items()}


class Copy:
    """A module with other tensors in the place of its own."""

    def __init__(self, module: nn.Module, tensors: dict[str, torch.Tensor]):
        self.module, self.attributes, self.copy = module, attributes_with(module, tensors), object.__new__(type(module))
        vars(self.copy).update(self.attributes)

    def call(self, args, kwargs):
        """What the forward sets is set on the module."""
        output, after, before = self.copy(*args, **kwargs), vars(self.copy), self.attributes
        if len(after) != len(before) or not all(map(is_, after.values(), before.values())):
            vars(self.module).update({name: value for name, value in after.items() if before.get(name) is not value})
            self.attributes = dict(after)
        return output


def call_with(module: nn.Module, tensors: dict[str, torch.Tensor], args, kwargs):
    """What the module gives with these tensors in the place of its own. Other threads may call it meanwhile."""
    if type(module) is nn.Linear and len(args) == 1 and not kwargs and is_plain_linear(module):
        own = {**module._parameters, **tensors}  # as its forward does, in a fifth of the time of what follows
        return F.linear(args[0], own["weight"], own["bias"])
    if not can_be_copied(module, tensors):
        with CHANGED_FOR_A_CALL, shadowed(module, tensors):
            return module(*args, **kwargs)
    return Copy(module, tensors).call(args, kwargs)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a call is `F.linear` and nothing else, of parameters that are its own (not so under FSDP1)."""
    attributes = vars(module)
    return not (
        "forward" in attributes
        or nn.Linear.forward is not LINEAR_FORWARD
        or "weight" in attributes
        or attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or _has_any_global_hook()
    )


def can_be_copied(module: nn.Module, tensors) -> bool:
    """Whether nothing in the module knows it by another way than `self`: a forward of accelerate's, say, is bound to
    it, and others' modules may hold what refers to them."""
    attributes = vars(module)
    if "forward" in attributes or not type(module).__module__.startswith(("torch.nn.", "transformers.")):
        return False
    if any(type(value) is MethodType for value in attributes.values()):
        return False
    below = [name.partition(".") for name in tensors if "." in name]
    return all(can_be_copied(module._modules[child], [name]) for child, _, name in below)


def is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def adds_low_rank(module: nn.Module) -> bool:
    """Whether `low_rank_output` knows what the module does. Not a subclass, whose forward may do something else."""
    if type(module) is nn.Conv2d:
        return module.groups == 1 and module.padding_mode == "zeros"
    return type(module) in (nn.Linear, Conv1D) or (type(module) is nn.Embedding and module.max_norm is None)


def low_rank_output(module, x, vectors, c):
    """What sum_k lambda_k scale_k b_k a_k of the weight adds to the module's output for the input `x`. `c` are the
    `rank_coefficients`."""
    a, b = vectors.a, vectors.b
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
    place, for one thread at a time. This layer is a child of the model and does not register it, which would be a
    cycle."""

    def __init__(self, model: nn.Module, active_adapters: list[str]):
        super().__init__(model, active_adapters)
        self.__dict__["_model"] = self._modules.pop("base_layer")
        self._shadows = []  # of a forward that is traced
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

    @property
    def base_layer(self):
        return self._model

    def _before_forward(self, model, args):
        if self.disable_adapters and self.merged:
            self.unmerge()
        merged = {} if self.disable_adapters or self.merged else self.merged_tensors()  # before the lock: it may raise
        if is_traced():
            self._in_forward = merged or None
            shadows = self._shadows
        else:
            CHANGED_FOR_A_CALL.acquire()
            shadows = _IN_THREAD.shadows
        shadows.append((self, shadowed(model, merged)))
        shadows[-1][1].__enter__()

    def _after_forward(self, model, args, output):
        """Also where a hook before ours has failed, so that there is nothing to take back."""
        shadows = self._shadows if is_traced() else _IN_THREAD.shadows
        if shadows and shadows[-1][0] is self:
            shadows.pop()[1].__exit__(None, None, None)
            if is_traced():
                self._in_forward = None
            else:
                CHANGED_FOR_A_CALL.release()

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


def check_task_type(config, model: nn.Module) -> None:
    """PEFT would end with an AttributeError."""
    if config.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        raise ValueError(
            f"`task_type` is {str(config.task_type)!r}, and a {type(model).__name__} does not generate. Give its own, "
            "such as 'SEQ_CLS', or leave it out."
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
    """Makes `module.<name>` another tensor: an instance's `__dict__` comes before `nn.Module.__getattr__`. So do
    `parameters()` and its like."""
    owners, replaced = {}, []
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        owners.setdefault(module.get_submodule(owner), {})[leaf] = tensor
    changes = {
        owner: {
            **own,
            "_parameters": parameters_with(owner, own),
            "_shadowed": vars(owner).get("_shadowed", owner._parameters),
        }
        for owner, own in owners.items()
    }
    if module.__dict__.get("gradient_checkpointing"):
        # transformers has the module run its own forward again in the backward, when this context has been left
        checkpoint = partial(_checkpoint_shadowed, module, tensors, module._gradient_checkpointing_func)
        changes.setdefault(module, {})["_gradient_checkpointing_func"] = checkpoint
    try:
        for owner, change in changes.items():
            attributes = vars(owner)
            replaced.append((attributes, {name: attributes.get(name) for name in change}))  # FSDP has its own there
            attributes.update(change)
        yield
    finally:
        for attributes, before in replaced:
            for name, value in before.items():
                if value is None:
                    del attributes[name]
                else:
                    attributes[name] = value


def _checkpoint_shadowed(module, tensors, checkpoint, function, *args, **kwargs):
    def run(*args, **kwargs):
        with shadowed(module, tensors):
            return function(*args, **kwargs)

    return checkpoint(run, *args, **kwargs)
