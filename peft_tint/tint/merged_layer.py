"""A module whose weights are merged by coefficients."""

import psutil
import torch
from torch import nn

from .._wrapped_layer import Kept, RootLayer, WrappedLayer, adds_low_rank
from .merge_ahead import DTYPES, Unit


class MergedLayer(WrappedLayer):
    """Merges its module's own parameters by trainable coefficients.

    Per adapter it holds the coefficients, of shape (units, tasks) with one row a parameter or one row for all, and the
    task vectors, {parameter name: TaskVectors}, which are not saved.
    """

    adapter_layer_names = ("tint_coefficients",)
    other_param_names = ("tint_task_vectors", "units", "shares_with", "merge_lora")

    def __init__(self, base_layer: nn.Module, active_adapters: list[str]):
        super().__init__(base_layer, active_adapters)
        self.tint_coefficients = nn.ParameterDict()
        self.tint_task_vectors = nn.ModuleDict()
        self.merge_lora = {}  # adapter -> `TintConfig.merge_lora`
        self.base_bytes = 0  # of the whole base
        self.units = {}  # adapter -> the names of the rows of its coefficients
        self.shares_with = {}  # adapter -> the layer whose coefficients are ours too
        # of the expert to be, see `TintModel.expert`: its adapter, its task, and the coefficients, a tensor, since
        # torch.compile compiles anew for each value of what is none
        self.expert = self.expert_task = self.expert_row = None
        self.reused = None  # what was merged with gradients

    def add_adapter(self, adapter_name, units: list[str], coefficients: nn.Parameter, task_vectors: dict):
        self._kept, self._ahead, self._calls.seen = {}, None, None
        self.units[adapter_name] = units
        if task_vectors:
            self.tint_coefficients[adapter_name] = coefficients
            self.tint_task_vectors[adapter_name] = nn.ModuleDict(
                {name.replace(".", "/"): vectors for name, vectors in task_vectors.items()}
            )

    @property
    def added_adapters(self):
        return self.units.keys()

    def _move_adapter_to_device_of_base_layer(self, adapter_name, device=None):
        """PEFT calls this after it has put loaded parameters in the place of ours (`low_cpu_mem_usage`)."""
        super()._move_adapter_to_device_of_base_layer(adapter_name, device)
        if adapter_name in self.shares_with and adapter_name in self.tint_coefficients:
            self.tint_coefficients[adapter_name] = self.shares_with[adapter_name].tint_coefficients[adapter_name]

    def _terms(self, adapter_names=None):
        """(parameter name, coefficients of shape (tasks,), TaskVectors) of all that is added to the base."""
        for adapter in self.active_adapters if adapter_names is None else adapter_names:
            if adapter not in self.tint_coefficients or self.expert not in (None, adapter):
                continue
            rows = self.tint_coefficients[adapter].expand(len(self.tint_task_vectors[adapter]), -1)
            for row, (key, vectors) in zip(rows, self.tint_task_vectors[adapter].items(), strict=True):
                if self.expert is not None:
                    vectors = vectors.original or vectors
                    row = self.expert_row
                yield key.replace("/", "."), row, vectors

    def units_of(self, adapter_names) -> list[Unit]:
        """What can be merged here ahead of a forward: all that one adapter has, or nothing."""
        own = [adapter for adapter in adapter_names if adapter in self.tint_coefficients]
        if len(own) != 1 or self.tint_coefficients[own[0]].dtype not in DTYPES:
            return []
        coefficients, units = self.tint_coefficients[own[0]], []
        for index, (key, vectors) in enumerate(self.tint_task_vectors[own[0]].items()):
            name = key.replace("/", ".")
            adds = name == "weight" and adds_low_rank(self.base_layer)
            if vectors.shape is not None or (vectors.a is not None and not adds):
                return []
            row = min(index, len(coefficients) - 1)
            units.append(Unit(self, name, self._base_weight(name), vectors, coefficients, row))
        return units

    def keep_ahead(self, adapter_names, merged, left_out, sources, seen):
        """Takes what `units_of` have become, with its graph, for all forwards with these coefficients."""
        sources = [(place, name, t, t._version, *rest) for place, name, t, _, *rest in sources]
        self._ahead = Kept(adapter_names, self._extra, self.base_layer, sources, merged, left_out, True, seen)

    def _sources(self, adapter_names):
        for adapter in adapter_names:
            if adapter in self.tint_coefficients:
                yield self.tint_coefficients._parameters, adapter
                for vectors in self.tint_task_vectors[adapter].values():
                    vectors = (self.expert and vectors.original) or vectors
                    yield from vectors.places()

    def _keeps_low_rank(self, adapter_names):
        if self.expert is not None:  # which often runs for one batch, where merging would take longer
            return False
        weight = next(self.base_layer.parameters(), None)  # copies of DataParallel's have none
        default = weight is not None and 4 * self.base_bytes <= memory_of(weight.device)
        options = [self.merge_lora[adapter] for adapter in adapter_names if adapter in self.merge_lora]
        return all(default if option is None else option for option in options)

    @property
    def _extra(self):
        return self.expert, self.expert_task

    def _merged_own(self, adapter_names, low_rank):
        if self.reused is None or self.expert is not None or not torch.is_grad_enabled():
            return super()._merged_own(adapter_names, low_rank)
        versions = [
            (values.data_ptr(), None if values.is_inference() else values._version)
            for adapter in adapter_names
            if (values := self.tint_coefficients._parameters.get(adapter)) is not None
        ]
        key = (tuple(adapter_names), low_rank, *versions)
        if key not in self.reused:
            ahead = self._to_use(low_rank)
            if ahead is not None and ahead.is_of(adapter_names, self._extra, self.base_layer):
                merged, left_out = ahead.merged, ahead.low_rank
            else:
                # gradient checkpointing counts what a forward saves, and finds this here when it runs it again
                with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
                    merged, left_out = self._merge(adapter_names, low_rank)
            merged = {name: (weight, self._leaf(weight)) for name, weight in merged.items()}
            self.reused[key] = merged, [(c, self._leaf(c), vectors) for c, vectors in left_out]
        merged, left_out = self.reused[key]
        merged = {name: leaf.to(weight.dtype) for name, (weight, leaf) in merged.items()}
        return merged, [(leaf, vectors) for _, leaf, vectors in left_out]

    def _leaf(self, tensor):
        """The tensor without its graph; in float32 at least where it takes gradients, which it sums up."""
        if not tensor.requires_grad:
            return tensor
        leaf = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_()
        leaf.register_hook(self._check_reused)
        return leaf

    def _check_reused(self, gradient):
        if self.reused is None:
            raise RuntimeError(
                "`reuse_merged_weights` has been left, so coefficients get no gradients; call `backward` in it."
            )

    def __getstate__(self):
        return {**super().__getstate__(), "reused": None}  # a copy is in no such context

    def take_reused(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What was reused with its gradients, summed over the forwards."""
        reused, self.reused = self.reused.values(), {}
        found = [pair for merged, left_out in reused for *pair, _ in (*((*p, 0) for p in merged.values()), *left_out)]
        return [(tensor, leaf.grad.to(tensor.dtype)) for tensor, leaf in found if leaf.grad is not None]

    def _has_terms(self, adapter_name):
        return adapter_name in self.tint_coefficients

    def _changes(self, name):
        return any(name in vectors for vectors in self.tint_task_vectors.values())


class RootMergedLayer(RootLayer, MergedLayer):
    """The parameters that a model holds itself."""


def memory_of(device: torch.device) -> int:
    """In bytes, all of it."""
    if device.type in ("cuda", "xpu"):
        return getattr(torch, device.type).get_device_properties(device).total_memory
    return psutil.virtual_memory().total
