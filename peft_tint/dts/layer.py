"""A module with a compressed task vector per adapter."""

from typing import NamedTuple

import torch
from torch import nn

from .._wrapped_layer import RootLayer, WrappedLayer
from ..experts import fit_features
from ..task_vectors import LowRank, TaskVectors
from ._saved import check_whole, decode_for


class Tensors(nn.Module):
    """Named buffers that are saved. A name may have dots, as those of a unit's parameters."""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        self.register_buffer(name.replace(".", "/"), tensor)

    def items(self):
        return [(name.replace("/", "."), tensor) for name, tensor in self._buffers.items()]

    def __len__(self):
        return len(self._buffers)


class Whole(NamedTuple):
    """A tensor that takes another's place. As TaskVectors to those that add up terms."""

    value: torch.Tensor
    a = None  # it has no low rank

    def merge(self, weight, coefficients, low_rank=True):
        return self.value.to(weight.device, weight.dtype)

    def bake(self, weight, coefficients):
        return self.value.to(weight.device, weight.dtype, copy=True)


class DtsLayer(WrappedLayer):
    """Adds decoded task vectors to its module's own parameters; tensors of the head take the place of the base's.

    Per adapter it holds the codes, one uint8 tensor a parameter, and whole tensors of the head, which are saved, and
    the decoded task vectors, which are not. What an adapter has is known when it is loaded.
    """

    adapter_layer_names = ("dts_codes", "dts_head")
    other_param_names = ("dts_decoded", "expected")

    def __init__(self, base_layer: nn.Module, active_adapters: list[str]):
        super().__init__(base_layer, active_adapters)
        self.dts_codes, self.dts_head, self.dts_decoded = (nn.ModuleDict() for _ in range(3))
        self.expected = {}  # adapter -> {"dts_codes" or "dts_head": names of the parameters}

    def add_adapter(self, adapter_name, changed: list[str], head: list[str]):
        """`changed` names the parameters with codes, `head` the tensors that are stored whole; `take` gives them."""
        self._kept, self.expected[adapter_name] = {}, {"dts_codes": changed, "dts_head": head}
        self.dts_codes[adapter_name], self.dts_head[adapter_name] = Tensors(), Tensors()
        self.dts_decoded[adapter_name] = nn.ModuleDict()

    @property
    def added_adapters(self):
        return self.expected.keys()

    def take(self, kind: str, adapter_name: str, name: str, tensor: torch.Tensor, full_name: str) -> None:
        """Puts in place what an adapter has of the parameter `name`. Raises ValueError for what cannot be right."""
        self._kept, weight, owner = {}, self._parameter(name), f"Adapter {adapter_name!r}"
        if kind == "dts_codes":
            change = decode_for(owner, full_name, tensor, weight)
            terms = ({}, {0: change}) if isinstance(change, LowRank) else ({0: change}, {})
            self.dts_decoded[adapter_name][name.replace(".", "/")] = TaskVectors(*terms)
        else:
            check_whole(owner, full_name, tensor, weight)
            own = self.dts_head[adapter_name]._buffers.get(name.replace(".", "/"), tensor)
            if own.shape != tensor.shape:
                raise ValueError(
                    f"{owner} has {full_name!r} of shape {tuple(own.shape)}, and is to be given one of shape "
                    f"{tuple(tensor.shape)}, which is another task's. Load that one under another name."
                )
        getattr(self, kind)[adapter_name].put(name, tensor.detach().to(weight.device, copy=True))

    def _parameter(self, name):
        owner, _, leaf = name.rpartition(".")
        return getattr(self.base_layer.get_submodule(owner), leaf).detach()

    def _load_from_state_dict(self, state_dict, prefix, *args):
        """The sizes of codes and heads are the file's."""
        loaded = set()
        for key, tensor in list(state_dict.items()):
            kind, _, rest = key.removeprefix(prefix).partition(".")
            adapter, _, name = rest.partition(".")
            name = name.replace("/", ".")
            if key.startswith(prefix) and name in self.expected.get(adapter, {}).get(kind, ()):
                full_name = f"{prefix.removeprefix('base_model.model.')}{name}".replace("base_layer.", "")
                self.take(kind, adapter, name, tensor, full_name)
                loaded.add(adapter)
        for adapter in loaded:
            self._check_sizes(adapter, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _check_sizes(self, adapter, prefix):
        """A head may be for any number of classes, but for one only."""
        sizes = {len(tensor) for leaf, tensor in self.dts_head[adapter].items() if leaf in ("weight", "bias")}
        if isinstance(self.base_layer, nn.Linear | nn.Conv2d) and len(sizes) > 1:
            raise ValueError(
                f"Adapter {adapter!r}: weight and bias of {prefix[:-1]!r} are for {sorted(sizes)} classes. Its file is "
                "damaged; download or save it again."
            )

    def _terms(self, adapter_names=None):
        for adapter in self.active_adapters if adapter_names is None else adapter_names:
            if adapter not in self.expected:
                continue
            for kind, names in self.expected[adapter].items():
                if len(getattr(self, kind)[adapter]) < len(names):
                    raise ValueError(
                        f"The weights of the adapter {adapter!r} have not all been loaded. Load a saved adapter by "
                        "`PeftModel.from_pretrained`; transformers' own `load_adapter` knows no sizes but the model's."
                    )
            for name, vectors in self.dts_decoded[adapter].items():
                yield name.replace("/", "."), torch.ones(1, device=vectors.dense_tasks.device), vectors
            for name, value in self.dts_head[adapter].items():
                yield name, None, Whole(value)

    def _sources(self, adapter_names):
        for adapter in adapter_names:
            if adapter in self.expected:
                for vectors in self.dts_decoded[adapter].values():
                    yield from vectors.places()
                yield from ((self.dts_head[adapter]._buffers, name) for name in self.dts_head[adapter]._buffers)

    def _has_terms(self, adapter_name):
        return any(self.expected.get(adapter_name, {}).values())

    def _changes(self, name):
        return any(name in names for kinds in self.expected.values() for names in kinds.values())

    def merge(self, safe_merge=False, adapter_names=None):
        super().merge(safe_merge, adapter_names)
        fit_features(self.base_layer)

    def unmerge(self):
        super().unmerge()
        fit_features(self.base_layer)


class RootDtsLayer(RootLayer, DtsLayer):
    """The parameters that a model holds itself."""
