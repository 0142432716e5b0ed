"""DTS: fine-tunes of one base model as small adapters, one per task."""

import copy
import dataclasses
import warnings
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import _ExcludedModule
from peft.utils.integrations import _skip_init_on_device
from torch import nn
from transformers import Cache

from .._rows import take_rows
from .._structure import (
    CONTAINERS,
    find_head,
    find_vocabulary,
    float_bytes,
    is_target,
    is_under,
    join,
    merged_parameters,
    named_tensors,
    own_parameters,
    plain_modules,
    resolve_all_linear,
)
from .._wrapped_layer import (
    CHANGED_FOR_A_CALL,
    UNITS,
    Calls,
    WrappingTuner,
    check_adapter_name,
    check_names,
    check_no_peft_model,
    check_task_type,
    plain_name,
    short_name,
    wrap_everywhere,
)
from ..experts import (
    check_expert,
    check_finite,
    check_unquantised,
    expert_labels,
    expert_module,
    labels_of,
    load_expert,
    match_vocabulary,
    pin_expert,
    set_labels,
)
from ..task_vectors import LazyTensors, compute_task_vector
from .codec import encode, weighted_sum
from .config import DtsConfig
from .layer import DtsLayer, RootDtsLayer

ROOT = "dts_root"  # the name of the layer for the parameters that the model holds itself
BASE = "__base__"  # PEFT's name in `adapter_names` for no adapter


def compress(base: nn.Module, expert, adapter_name: str = "default", **config) -> PeftModel:
    """As `get_peft_model(base, DtsConfig(...))`, for an expert held in memory: a module, PeftModel or state dict.

    `config` are the other fields of `DtsConfig`. A PeftModel as `base` gets one more adapter. The expert is only read.
    """
    config = DtsConfig(**config)
    config.expert_in_memory = expert  # no dataclass field, so it is never saved
    if not isinstance(base, PeftModel):
        return get_peft_model(base, config, adapter_name)
    base.add_adapter(adapter_name, config)
    return base


class Parts(NamedTuple):
    """What adapters have of a model. Keys are module names as they were before any adapter."""

    changed: dict[str, list[str]]  # module -> parameters with codes, tied ones once
    head: dict[str, list[str]]  # module -> tensors of the head, which are stored whole
    tied: dict[str, dict[str, tuple[str, str]]]  # module -> parameter -> the (module, parameter) that has its codes


def find_parts(config: DtsConfig, model: nn.Module, modules: dict[str, nn.Module]) -> Parts:
    in_head = find_head(model, modules)
    resolve_all_linear(config, model, modules, in_head)
    targets, tied = merged_parameters(config, modules, in_head)
    chosen = {field: getattr(config, field) for field in ("target_modules", "exclude_modules")}
    if not targets and any(value is not None for value in chosen.values()):
        raise ValueError(
            f"Target modules {config.target_modules} not found in the base model. "
            f"Please check the target modules and try again. With {chosen} there is nothing to adapt. Names are those "
            "of modules with parameters of their own, such as 'query'."
        )
    unchanged = set(config.unchanged or ()) if config.is_compressed else set()
    changed = {
        name: [leaf for leaf in own if leaf not in tied.get(name, {}) and join(name, leaf) not in unchanged]
        for name, own in targets.items()
    }
    units = [name for name, module in modules.items() if isinstance(module, UNITS)]
    head = {}
    for name, module in modules.items():
        if is_under(name, in_head) and not is_under(name, units, strictly=True) and not isinstance(module, CONTAINERS):
            buffers = set(dict(module.named_buffers(recurse=False))) - module._non_persistent_buffers_set
            names = [*own_parameters(module), *sorted(buffers)]
            if names := [leaf for leaf in names if join(name, leaf) not in unchanged]:
                head[name] = names
    return Parts(changed, head, tied)


def sample_base(names, tensors) -> list[float]:
    """One entry of each of these tensors, by which a model can be told from the one that an adapter was made on."""
    return [float(tensors[name].detach().flatten()[tensors[name].numel() // 2]) for name in names]


def check_base(config, samples):
    if config.base_samples is None:
        return
    expected, given = (torch.tensor(values, dtype=torch.float64) for values in (config.base_samples, samples))
    # either may have been rounded to bfloat16
    if len(given) != len(expected) or ((given - expected).abs() > 2**-8 * expected.abs()).any():
        raise ValueError(
            f"The adapter was made on a model with other weights (it names {config.base_model_name_or_path!r}). Load "
            "that one; for an adapter on a merged model (DTS-D) that very merge. With `base_samples=None` in its "
            "configuration it goes onto any model."
        )


class DtsModel(WrappingTuner):
    """Each adapter makes one task's model of the base: W0 + a compressed task vector, and the task's own head
    (https://arxiv.org/abs/2512.01461)."""

    prefix = "dts_"
    tuner_layer_cls = DtsLayer

    # ---- use ---------------------------------------------------------------------------------------------------------

    def set_adapter(self, adapter_name, inference_mode=False):
        super().set_adapter(adapter_name, inference_mode=inference_mode)
        self._show_labels(self.active_adapters)

    def delete_adapter(self, adapter_name):
        super().delete_adapter(adapter_name)
        self._show_labels(self.active_adapters)

    def merge_and_unload(self, progressbar=False, safe_merge=False, adapter_names=None):
        """A plain model of the active adapter's task, with that task's head and labels."""
        model = super().merge_and_unload(progressbar, safe_merge, adapter_names)
        self._show_labels(adapter_names or self.active_adapters)
        return model

    def unload(self):
        """The base model, with its own weights, head and labels."""
        if any(layer.merged for layer in self._layers):
            self.unmerge_adapter()
        model = super().unload()
        self._show_labels([])
        return model

    def _enable_adapter_layers(self, enabled=True):
        super()._enable_adapter_layers(enabled)
        self._show_labels(self.active_adapters if enabled else [])

    def _show_labels(self, adapters):
        if any(layer.disable_adapters for layer in self._layers):
            adapters = []
        labels = [self.peft_config[adapter].labels for adapter in adapters if adapter in self.peft_config]
        set_labels(self.model, (labels and labels[-1]) or self._base_labels)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, head: str | None = None
    ) -> None:
        """Adds, without data, an adapter for a task that has none: base + sum_k weight_k * (task vector of adapter k).

        It is exact: the adapter holds the codes of all the others and the weights, so it takes as many bytes as they
        do together, and it saves, loads and computes at the sum of their ranks. `weights` may come from
        `description_similarity` or `weight_similarity`; they are used as they are.

        `head` is the adapter whose head and labels it takes, "__base__" for those of the base model. `None` (default)
        takes the one that all `adapters` have; ValueError if they differ, and for adapters that there are not.
        """
        self._check_fusion(adapters, weights, adapter_name, head)
        layers = [
            (plain_name(name), layer) for name, layer in self.model.named_modules() if isinstance(layer, DtsLayer)
        ]
        contents = {}
        for name, layer in layers:
            terms = {}
            for weight, adapter in zip(weights, adapters, strict=True):
                for leaf, packed in layer.dts_codes[adapter].items() if adapter in layer.dts_codes else ():
                    terms.setdefault(leaf, []).append((float(weight), packed))
            name = "" if name == ROOT else name
            contents |= {("dts_codes", name, leaf): weighted_sum(join(name, leaf), own) for leaf, own in terms.items()}
        head = self._common_head(layers, adapters) if head is None else head
        labels = self._base_labels if head == BASE else self.peft_config[head].labels
        for name, layer in layers:
            for leaf, tensor in layer.dts_head[head].items() if head in layer.dts_head else ():
                contents["dts_head", "" if name == ROOT else name, leaf] = tensor
        first = self.peft_config[adapters[0]]
        config = dataclasses.replace(
            first, expert=None, target_modules=None, exclude_modules=None, labels=labels, unchanged=[]
        )
        parts = find_parts(config, self.model, dict(plain_modules(self.model)))
        places = [("dts_codes", parts.changed), ("dts_head", parts.head)]
        config.unchanged = [
            join(name, leaf)
            for kind, owners in places
            for name, own in owners.items()
            for leaf in own
            if (kind, name, leaf) not in contents
        ]
        config.contents_in_memory = contents
        self.peft_config[adapter_name] = config
        try:
            self.inject_adapter(self.model, adapter_name)
        except ValueError:
            del self.peft_config[adapter_name]
            raise

    def _check_fusion(self, adapters, weights, adapter_name, head):
        if isinstance(adapters, str):
            raise ValueError(f"`adapters` is {adapters!r}; give a list of names.")
        known = ", ".join(map(repr, self.peft_config))
        for name in {*adapters, *([] if head in (None, BASE) else [head])} - set(self.peft_config):
            raise ValueError(f"There is no adapter {name!r}; the adapters are {known}.")
        if adapter_name in self.peft_config:
            raise ValueError(f"There is an adapter {adapter_name!r} already; use another name, or delete it first.")
        if not adapters or len(adapters) != len(weights):
            raise ValueError(f"There are {len(adapters)} `adapters` and {len(weights)} `weights`; give one for each.")
        for weight in weights:
            if not abs(float(weight)) < torch.finfo(torch.float32).max:  # NaN neither
                raise ValueError(f"`weights` has {weight}; they must be finite.")

    def _common_head(self, layers, adapters):
        first, *others = adapters
        for name, layer in layers:
            own = [dict(layer.dts_head[a].items()) if a in layer.dts_head else {} for a in adapters]
            for adapter, tensors in zip(others, own[1:], strict=True):
                if tensors.keys() != own[0].keys() or not all(torch.equal(t, own[0][k]) for k, t in tensors.items()):
                    raise ValueError(
                        f"{name!r} belongs to the head, in which the adapters {first!r} and {adapter!r} differ. Give "
                        f"`head=`, the adapter whose head to take, or {BASE!r} for the base model's."
                    )
        return first

    # ---- mixed batches -----------------------------------------------------------------------------------------------

    @contextmanager
    def _enable_peft_forward_hooks(self, *args, **kwargs):
        """`model(**inputs, adapter_names=[...])` names the adapter of each row. The model runs once for each adapter,
        on that adapter's rows."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        self._calls.whole = torch.compiler.is_compiling()
        asked = self._calls.asked
        self._mix(1)
        try:
            asked.adapters, asked.adapter_names = [], list(names)
            yield
        finally:
            asked.adapters = asked.adapter_names = None
            self._mix(-1)

    def _mix(self, more):
        """Has the model's forward one that mixes adapters while there are calls that do."""
        with nullcontext() if torch.compiler.is_compiling() else CHANGED_FOR_A_CALL:
            self._mixing += more
            ours = vars(self.model).get("forward")
            if more > 0 and not isinstance(ours, ForwardByAdapter):
                self.model.forward = ForwardByAdapter(self.model, self._calls)
            elif not self._mixing and isinstance(ours, ForwardByAdapter) and not torch.compiler.is_compiling():
                if ours.before is None:
                    del self.model.forward
                else:
                    self.model.forward = ours.before

    def _check_adapter_names(self, names):
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if any(layer.merged for layer in self._layers):
            raise ValueError("An adapter is merged into the weights; call `unmerge_adapter()` to mix adapters.")
        for name in names:
            if name != BASE and name not in self.peft_config:
                known = ", ".join(map(repr, self.peft_config))
                raise ValueError(f"`adapter_names` has {name!r}; the adapters are {known}, and {BASE!r} is the base.")

    # ---- building ----------------------------------------------------------------------------------------------------

    def _pre_injection_hook(self, model, config, adapter_name):
        check_no_peft_model(model)
        check_task_type(config, model)
        self._layers, self._calls = [], Calls()
        self._mixing = 0  # calls that mix adapters now
        self._base_labels = labels_of(getattr(model, "config", None))

    def _prepare_model(self, config: DtsConfig, model: nn.Module) -> None:
        source = config.__dict__.pop("expert_in_memory", config.expert)
        modules = dict(plain_modules(model))
        tensors, buffers = named_tensors(modules)
        check_unquantised(model, tensors, buffers)
        self._parts = find_parts(config, model, modules)
        self._contents = config.__dict__.pop("contents_in_memory", {})
        if config.is_compressed:
            changed = [join(name, leaf) for name, own in self._parts.changed.items() for leaf in own]
            samples = sample_base(changed, tensors)
            if self._contents:  # of a new weighted sum
                config.base_samples = samples
            check_base(config, samples)
            return
        if config.init_weights and source is None:
            raise ValueError(
                "`DtsConfig.expert` is empty: give the Hub id or folder of a fine-tune, or one held in memory to "
                "`peft_tint.compress(base, expert)`."
            )
        if config.init_weights and source is config.expert:
            config.expert, config.expert_sha256 = pin_expert("expert", source)
            source = config.expert
        with _skip_init_on_device():
            if config.init_weights:
                of_expert = self._load(config, model, tensors, buffers, source)
            else:
                changes = {id(t): torch.randn(t.shape, device=t.device) for t in tensors.values()}
                of_expert = {id(t): (t + 0.1 * changes[id(t)]).to(t.dtype) for t in tensors.values()}
            self._contents = self._compress(config, tensors, buffers, of_expert)

    def _load(self, config, model, tensors, buffers, source):
        """The expert's tensors, checked, by the id of the base's. Notes the labels in the config."""
        in_head = {join(name, leaf) for name, own in self._parts.head.items() for leaf in own}
        check_finite(tensors)
        vocabulary = find_vocabulary(model, tensors)
        expert = match_vocabulary(load_expert("expert", source, model), tensors, vocabulary, common=False)
        check_expert(expert, tensors, in_head, buffers - in_head, getattr(model, "config", None))
        of_expert = expert.by_tensor(tensors)
        for name, factors in expert.low_rank.items():
            tensor = of_expert[id(tensors[name])]  # in half precision it could not hold so small a change
            of_expert[id(tensors[name])] = tensor.float() + factors.dense().view(tensor.shape).to(tensor.device)
        if config.labels is None:
            modules = dict(plain_modules(model))
            names = find_head(model, modules)
            heads = [expert_module(expert, name, modules[name], tensors, of_expert) for name in names]
            config.labels = expert_labels(expert, model, heads)
        return of_expert

    def _compress(self, config, tensors, buffers, of_expert):
        """{(kind, module, parameter): tensor} of what is to be saved of an expert."""
        places = {
            f"base_model.model.{join(name, f'dts_codes.{leaf}')}": (name, leaf)  # its bytes count as well
            for name, own in self._parts.changed.items()
            for leaf in own
        }
        names = {saved: join(*place) for saved, place in places.items()}

        def change(saved):
            weight = tensors[names[saved]].detach()
            return compute_task_vector(of_expert[id(tensors[names[saved]])].to(weight.device), weight)

        base_bytes = float_bytes(tensors, buffers)
        packed = encode(LazyTensors(names, change), **config.encode_arguments, base_bytes=base_bytes)
        config.unchanged = [name for saved, name in names.items() if saved not in packed]
        config.base_samples = sample_base([names[saved] for saved in names if saved in packed], tensors)
        if not packed:
            warnings.warn("The expert has the base model's weights, so the adapter adds nothing to them.", stacklevel=2)
        contents = {("dts_codes", *places[saved]): tensor for saved, tensor in packed.items()}
        for name, own in self._parts.head.items():
            for leaf in own:
                contents["dts_head", name, leaf] = of_expert[id(tensors[join(name, leaf)])]
        return contents

    def inject_adapter(self, model, adapter_name, *args, **kwargs):
        check_adapter_name(adapter_name)
        config = self.peft_config[adapter_name]
        # a config that is used again must not have what its first expert has put into it, nor change that one's
        if any(own is config for name, own in self.peft_config.items() if name != adapter_name):
            config = self.peft_config[adapter_name] = copy.copy(config)
        config.labels = vars(config).setdefault("given_labels", config.labels)
        if any(layer.merged for layer in model.modules() if isinstance(layer, DtsLayer)):
            raise ValueError("An adapter is merged into the weights; call `unmerge_adapter()` before adding another.")
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._wrap(model, adapter_name)
        finally:
            self._parts = self._contents = None
        self._show_labels(self.active_adapters)

    def _wrap(self, model, adapter_name):
        """Wraps all modules that the adapter changes, also those inside of a wrapped one, which PEFT skips."""
        modules = dict(plain_modules(model))
        layers = {plain_name(name): m for name, m in model.named_modules() if isinstance(m, DtsLayer)}
        if ROOT in layers:
            layers[""] = layers.pop(ROOT)
        parts = self._parts
        unchanged = set(self.peft_config[adapter_name].unchanged)
        for name in dict.fromkeys([*parts.changed, *parts.tied, *parts.head]):
            if name not in layers:
                layers[name] = self._make_layer(model, modules, name)
            changed = [leaf for leaf in parts.changed.get(name, ()) if join(name, leaf) not in unchanged]
            layers[name].add_adapter(adapter_name, changed, parts.head.get(name, []))
        for (kind, name, leaf), tensor in self._contents.items():
            layers[name].take(kind, adapter_name, leaf, tensor, join(name, leaf))
        for name, ties in parts.tied.items():
            layers[name].tied.update({leaf: (layers[owner], there) for leaf, (owner, there) in ties.items()})
        wrap_everywhere(model, layers.values())
        self._layers = list(layers.values())
        for layer in self._layers:
            layer._calls = self._calls

    def _make_layer(self, model, modules, name):
        if not name:
            layer = RootDtsLayer(model, self.active_adapters)
            model.add_module(ROOT, layer)
            return layer
        layer = DtsLayer(modules[name], self.active_adapters)
        parent, _, child = name.rpartition(".")
        modules[parent]._modules[child] = layer
        return layer

    def _check_target_module_exists(self, config, key):
        if key in self._parts.changed or key in self._parts.head:
            return True
        result = is_target(config, key)
        return result if isinstance(result, _ExcludedModule) else False

    def _create_and_replace(self, *args, **kwargs):
        """`_wrap` does it, of all modules."""

    # ---- files -------------------------------------------------------------------------------------------------------

    @classmethod
    def _remove_adapter_name_from_key(cls, key, adapter_name):
        # without the marks of wrappers, for around a layer there may be one of another adapter
        for kind in ("dts_codes", "dts_head"):
            module, found, leaf = key.rpartition(f".{kind}.{adapter_name}.")
            if found:
                return f"{plain_name(module)}.{kind}.{leaf}"
        return key

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        """From the names in a file to the model's. Raises ValueError where tensors are missing or too many."""
        keys = {}
        for name, layer in model.named_modules():
            for kind, leaves in (layer.expected if isinstance(layer, DtsLayer) else {}).get(adapter_name, {}).items():
                for leaf in leaves:
                    key = f"{name}.{kind}.{adapter_name}.{leaf.replace('.', '/')}"
                    keys[short_name(cls._remove_adapter_name_from_key(key, adapter_name))] = key
        given = {keys.get(short_name(key), key): tensor for key, tensor in state_dict.items()}
        check_names(model, adapter_name, keys.values(), given)
        return given


class ForwardByAdapter:
    """In the place of `model.forward`: where a call names an adapter for each row, the model runs once for each
    adapter, on that adapter's rows."""

    def __init__(self, model, calls):
        self.model, self._calls, self.__wrapped__ = model, calls, model.forward
        self.before = vars(model).get("forward")

    def __call__(self, *args, **kwargs):
        asked = self._calls.asked
        names = asked.adapter_names
        if names is None:
            return self.__wrapped__(*args, **kwargs)
        try:
            asked.adapter_names = None
            return self._run(names, args, kwargs)
        finally:
            asked.adapters, asked.adapter_names = [], names

    def _run(self, names, args, kwargs):
        """The outputs of all rows in their order; rows with fewer classes are filled up with the lowest finite
        number."""
        if kwargs.get("labels") is not None:
            raise ValueError(
                "`adapter_names` mixes tasks, so there is no loss; compute it from the logits of each row."
            )
        if kwargs.get("encoder_outputs") is not None:
            raise ValueError(
                "`generate` of an encoder-decoder cannot mix adapters, for it runs the encoder apart and on all rows. "
                "Call `set_adapter` and `generate` for the rows of each."
            )
        values = [*args, *kwargs.values()]
        if any(isinstance(value, Cache) for value in values):
            raise ValueError("The adapters of a mixed batch would share one key/value cache; pass `use_cache=False`.")
        rows = {len(value) for value in values if isinstance(value, torch.Tensor) and value.ndim}
        if len(names) not in rows:
            raise ValueError(
                f"`adapter_names` has {len(names)} names, and the batch has {sorted(rows)} rows; name each's."
            )
        if getattr(getattr(self.model, "config", None), "use_cache", False):
            kwargs = {**kwargs, "use_cache": False}
        outputs, index = {}, [names[:i].count(name) for i, name in enumerate(names)]
        for adapter in dict.fromkeys(names):
            own = [i for i, name in enumerate(names) if name == adapter]
            self._calls.asked.adapters = [] if adapter == BASE else [adapter]
            args_here = [_take(value, own, len(names)) for value in args]
            kwargs_here = {key: _take(value, own, len(names)) for key, value in kwargs.items()}
            outputs[adapter] = self.model(*args_here, **kwargs_here)
        return take_rows(outputs, names, index, of="The model")


def _take(value, rows, batch):
    is_batch = isinstance(value, torch.Tensor) and value.ndim and len(value) == batch
    return value[torch.tensor(rows, device=value.device)] if is_batch else value
