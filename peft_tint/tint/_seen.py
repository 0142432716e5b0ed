"""Whether merged weights are still those of what they were made of, looked at once for a whole model."""

from operator import attrgetter, getitem, is_

import torch

VERSION = attrgetter("_version")


class Seen:
    """What all that the layers of a model keep was made of, as it was when this was made.

    What they keep and is of something else by then is forgotten, and all of it where the coefficients are not those of
    the `values` before: they may have been written by their `data`, of which no version tells. The rest has this as its
    `seen`. Each forward asks `holds`, where loops of Python would take as long as some layers do.
    """

    def __init__(self, layers, adapter_names: list[str], values: list[torch.Tensor]):
        self.adapter_names, self.attributes, self.modules = list(adapter_names), [], []
        objects, sources, coefficients = [], [], {}
        for layer in layers:
            for adapter, own in layer.tint_coefficients._parameters.items():
                objects.append((layer.tint_coefficients._parameters, adapter))
                coefficients.setdefault((adapter, own.device), []).append(own)
        self.coefficients = list(coefficients.values())
        self.values = self._values()
        same = are_equal(values, self.values)
        for layer in layers:
            for kept in {id(kept): kept for kept in layer._kept.values()}.values():
                if not (same and kept.is_of(self.adapter_names, layer._extra, layer.base_layer)):
                    layer._kept = {}
                    continue
                kept.seen = self
                own = layer.tint_coefficients._parameters
                sources += [source for source in kept.sources if source[0] is not own]
                if "base_layer" not in layer._modules:  # that of the model's own parameters, which calls nothing
                    continue
                objects.append((layer._modules, "base_layer"))
                if kept.prepare():
                    self.attributes.append((vars(kept.module), dict(vars(kept.module))))
                    self.modules.append(kept.module)
        objects += [source[:2] for source in sources]
        self.places, self.names = ([item[index] for item in objects] for index in (0, 1))
        self.objects = list(map(getitem, self.places, self.names))
        self.tensors, self.versions, self.addresses, self.strides = (
            [source[index] for source in sources] for index in (2, 3, 4, 5)
        )
        self.types = list(map(type, self.modules))

    @torch.no_grad()
    def _values(self):
        return list(map(torch.cat, self.coefficients))

    def holds(self, adapter_names) -> bool:
        pairs = self.attributes
        try:
            return (
                adapter_names == self.adapter_names
                and all(map(is_, map(getitem, self.places, self.names), self.objects))
                and list(map(VERSION, self.tensors)) == self.versions
                and list(map(torch.Tensor.data_ptr, self.tensors)) == self.addresses
                and list(map(torch.Tensor.stride, self.tensors)) == self.strides
                and list(map(type, self.modules)) == self.types
                and all(len(now) == len(then) and all(map(is_, now.values(), then.values())) for now, then in pairs)
                and are_equal(self._values(), self.values)
            )
        except KeyError:  # a tensor is gone
            return False


def are_equal(tensors, others) -> bool:
    try:
        return len(tensors) == len(others) and all(map(torch.equal, tensors, others))
    except RuntimeError:  # those of `torch.func`, fake ones, and those of two devices cannot be compared
        return False
