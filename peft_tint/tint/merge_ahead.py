"""All weights of a model merged by one launch ahead of its forward, and their coefficients' gradients by one more.

A GPU takes longer to launch the merge of each layer than to compute it. On a CPU layers merge their own full task
vectors, for what a layer has just merged lies in a cache when it reads it.
"""

import warnings
from contextlib import nullcontext
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from ..task_vectors import TaskVectors

try:
    import triton
    import triton.language as tl

    from ._kernels import BLOCK, PARTS, merge_kernel, product_kernel, sum_kernel
except ImportError:  # PyTorch comes with it where it computes on GPUs of NVIDIA or AMD under Linux
    triton = None

DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Unit(NamedTuple):
    """A weight with its task vectors."""

    layer: nn.Module
    name: str
    weight: torch.Tensor
    vectors: TaskVectors
    coefficients: nn.Parameter
    row: int  # of these

    @property
    def kind(self):
        """(device, dtype, dtype of the task vectors, tasks, whether aligned) of units that one launch can merge; None
        is what the kernels are not for."""
        weight, dense = self.weight, self.vectors.dense
        plain = type(weight) in (torch.Tensor, nn.Parameter) and not weight.requires_grad
        whole = weight.is_contiguous() and dense.is_contiguous() and weight.numel() > 0
        if plain and whole and {weight.dtype, dense.dtype} <= DTYPES.keys() and weight.device == dense.device:
            aligned = not any(number % 16 for number in (weight.numel(), weight.data_ptr(), dense.data_ptr()))
            return weight.device, weight.dtype, dense.dtype, self.coefficients.shape[1], aligned


class Dense:
    """Merges the full task vectors of units of one kind, by tables of where all is."""

    def __init__(self, units: list[Unit]):
        self.device, weight, vectors, self.tasks, self.aligned = units[0].kind
        self.types = {"WEIGHT": getattr(tl, DTYPES[weight]), "VECTORS": getattr(tl, DTYPES[vectors])}
        self.parameters, self.sizes, first = _stacked(units)
        # all blocks of one row of the coefficients lie side by side, so that one program can sum them up
        self.units = sorted(units, key=lambda unit: first[unit.coefficients] + unit.row)
        rows = torch.tensor([first[unit.coefficients] + unit.row for unit in self.units])
        entries = torch.tensor([unit.weight.numel() for unit in self.units])
        blocks = (entries + BLOCK - 1) // BLOCK
        self.blocks = int(blocks.sum())
        task_of = torch.zeros(len(units), self.tasks, dtype=torch.int64)
        for index, unit in enumerate(self.units):
            task_of[index, : len(unit.vectors.dense_tasks)] = unit.vectors.dense_tasks
        unit_of = torch.repeat_interleave(blocks)
        start_of = (torch.arange(self.blocks) - (blocks.cumsum(0) - blocks)[unit_of]) * BLOCK
        blocks_of_rows = torch.zeros(sum(self.sizes), dtype=torch.int64).index_add_(0, rows, blocks)
        tables = {
            "weight_of": torch.tensor([unit.weight.data_ptr() for unit in self.units]),
            "vectors_of": torch.tensor([unit.vectors.dense.data_ptr() for unit in self.units]),
            "entries_of": entries,
            "rows_of": torch.tensor([len(unit.vectors.dense_tasks) for unit in self.units]),
            "task_of": task_of,
            "coefficient_of": rows,
            "unit_of": unit_of,
            "start_of": start_of,
            "first_of": torch.cat([torch.zeros(1, dtype=torch.int64), blocks_of_rows.cumsum(0)]),
        }
        self.tables = {name: table.to(self.device) for name, table in tables.items()}
        # which a backward may need when the model has long been moved elsewhere
        self.storages = [t.untyped_storage() for unit in units for t in (unit.weight, unit.vectors.dense)]

    def merge(self, coefficients):
        """The merged weight of each unit."""
        merged = [torch.empty_like(unit.weight) for unit in self.units]
        given = {"merged_of": self._places(merged), "coefficients": _cat(coefficients, self.device)}
        self._launch(merge_kernel, self.blocks, given, ALIGNED=self.aligned, BLOCK=BLOCK, **self.types)
        return tuple(merged)

    def gradients(self, gradients):
        """Those of each of the coefficients, given that of each merged weight or None."""
        gradients = [None if gradient is None else gradient.contiguous() for gradient in gradients]
        aligned = self.aligned and not any(gradient.data_ptr() % 16 for gradient in gradients if gradient is not None)
        products = torch.zeros(self.blocks, self.tasks, device=self.device)
        given = {"gradient_of": self._places(gradients), "products": products}
        self._launch(product_kernel, self.blocks, given, ALIGNED=aligned, BLOCK=BLOCK, **self.types)
        summed = torch.empty(sum(self.sizes), self.tasks, device=self.device)
        given, width = {"products": products, "gradients": summed}, triton.next_power_of_2(self.tasks)
        self._launch(sum_kernel, len(summed), given, WIDTH=width, PARTS=PARTS)
        return _split(self, summed, gradients)

    def _places(self, tensors):
        places = torch.tensor([0 if tensor is None else tensor.data_ptr() for tensor in tensors])
        if self.device.type == "cuda":  # or the copy would wait for all that has been launched before
            places = places.pin_memory()
        return places.to(self.device, non_blocking=True)

    def _launch(self, kernel, programs, given, **constants):
        tables = {name: table for name, table in self.tables.items() if name in kernel.arg_names}
        with torch.get_device_module(self.device).device(self.device) if self.device.type != "cpu" else nullcontext():
            kernel[(programs,)](**tables, **given, TASKS=self.tasks, **constants)


class LowRank:
    """Computes the rank coefficients of units of one device."""

    def __init__(self, units: list[Unit]):
        self.units, self.device = units, units[0].vectors.b.device
        self.parameters, self.sizes, first = _stacked(units)
        self.tasks = self.parameters[0].shape[1]
        rows = [(first[unit.coefficients] + unit.row) * self.tasks + unit.vectors.rank_tasks for unit in units]
        self.index, self.ranks = torch.cat(rows), [len(row) for row in rows]
        self.scales = torch.cat([unit.vectors.scale_bits for unit in units]).view(torch.float32)

    def merge(self, coefficients):
        values = _cat(coefficients, self.device).flatten()[self.index] * self.scales
        return torch.split_with_sizes_copy(values, self.ranks)

    def gradients(self, gradients):
        given = zip(gradients, self.ranks, strict=True)
        whole = torch.cat([self.scales.new_zeros(count) if own is None else own for own, count in given])
        summed = self.scales.new_zeros(sum(self.sizes) * self.tasks)
        summed.index_put_((self.index,), whole * self.scales, accumulate=True)  # which has one order, `index_add_` none
        return _split(self, summed.view(-1, self.tasks), gradients)


def _stacked(units):
    """The parameters that the units have their coefficients of, their numbers of rows, and the first row of each."""
    parameters = list(dict.fromkeys(unit.coefficients for unit in units))
    sizes = [len(parameter) for parameter in parameters]
    return parameters, sizes, dict(zip(parameters, accumulate(sizes, initial=0), strict=False))


def _cat(coefficients, device):
    return torch.cat([values.detach().to(device, torch.float32) for values in coefficients])


def _split(part, summed, gradients):
    """The gradient of each parameter; None where nothing was used, as autograd has it, for by a gradient of zero an
    optimizer moves what has momentum."""
    reached = {unit.coefficients for unit, own in zip(part.units, gradients, strict=True) if own is not None}
    found = zip(part.parameters, summed.split(part.sizes), strict=True)
    return tuple(own.to(p.device, p.dtype) if p in reached else None for p, own in found)


class _Merge(torch.autograd.Function):
    """Saves no tensor, so that several backwards may go through one merge."""

    @staticmethod
    def forward(ctx, part, seen, *coefficients):
        ctx.part, ctx.seen = part, seen
        ctx.set_materialize_grads(False)
        return part.merge(coefficients)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            for unit in ctx.part.units:  # all that used it has been run again by now, so its memory can be freed
                ahead = unit.layer._ahead  # which another thread's backward may take away meanwhile
                if ahead is not None and ahead.seen is ctx.seen:
                    unit.layer._ahead = None
        return None, None, *ctx.part.gradients(gradients)


class MergeAhead:
    """Merges for the layers of a model before a forward with gradients. It is for the tensors of the moment when it
    was made."""

    def __init__(self, layers, adapter_names: list[str]):
        self.adapter_names, kinds = list(adapter_names), {}
        found = {layer: (layer.units_of(adapter_names), layer._find_sources(adapter_names)) for layer in layers}
        self.told = all(sources is not None for _, sources in found.values())
        self.modules = [(layer, layer.base_layer) for layer in layers]
        self.sources = [
            (*source[:3], source[4], source[5], source[2].dtype, source[2].requires_grad)
            for _, sources in found.values()
            for source in sources or ()
        ]
        self.layers = {}  # that are merged -> their sources
        for layer, (units, sources) in found.items():
            dense = [unit for unit in units if unit.vectors.dense is not None]
            if units and sources and all(unit.kind and kernels_work(*unit.kind[:3]) for unit in dense):
                self.layers[layer] = sources
                for unit in dense:
                    kinds.setdefault((Dense, *unit.kind), []).append(unit)
                for unit in units:
                    if unit.vectors.a is not None:
                        kinds.setdefault((LowRank, unit.vectors.b.device, unit.coefficients.shape[1]), []).append(unit)
        self.parts = [kind(units) for (kind, *_), units in kinds.items()]

    def __reduce__(self):
        return type(None), ()  # a copy has none, for the tables are of the original's tensors

    def is_of(self, adapter_names) -> bool:
        return (
            self.told
            and adapter_names == self.adapter_names
            and all(layer.base_layer is module for layer, module in self.modules)
            and all(
                place.get(name) is tensor
                and (tensor.data_ptr(), tensor.stride(), tensor.dtype, tensor.requires_grad) == (*state,)
                for place, name, tensor, *state in self.sources
            )
        )

    def merge(self) -> object:
        """Has layers keep what they would merge in their forward, as `seen` what this returns; those for which this
        cannot do it merge it then."""
        for layer in self.layers:  # first, or the weights of the last forward would take memory beside the new ones
            layer._kept, layer._ahead = {}, None
        merged, seen = {layer: ({}, []) for layer in self.layers}, object()
        for part in self.parts:
            for unit, result in zip(part.units, _Merge.apply(part, seen, *part.parameters), strict=True):
                weights, low_rank = merged[unit.layer]
                if type(part) is Dense:
                    weights[unit.name] = result
                else:
                    low_rank.append((result, unit.vectors))
        for layer, found in merged.items():
            layer.keep_ahead(self.adapter_names, *found, self.layers[layer], seen)
        return seen


@cache
def kernels_work(device: torch.device, weight: torch.dtype, vectors: torch.dtype) -> bool:
    """Whether the kernels compute what they should here. They are compiled at the first use, which may fail."""
    if triton is None or (device.type not in ("cuda", "xpu") and not triton.knobs.runtime.interpret):
        return False
    try:
        _check_kernels(device, weight, vectors)
    except Exception as error:  # whatever a compiler raises
        warnings.warn(
            f"Triton fails on {device} ({error}). Weights are merged layer by layer there, and a step takes longer.",
            stacklevel=2,
        )
        return False
    return True


def _check_kernels(device, weight, vectors):
    base = torch.linspace(-1, 1, 3 * BLOCK + 16, device=device).to(weight)
    dense = {task: torch.linspace(task, -1, len(base), device=device).to(vectors) for task in (0, 2)}
    coefficients = nn.Parameter(torch.tensor([[0.5, 9.0, 0.25], [-0.5, 9.0, 1.0]], device=device))
    units = [Unit(None, "weight", base, TaskVectors(dense, {}), coefficients, row) for row in (1, 0)]
    part = Dense(units)
    merged, gradients = part.merge([coefficients]), part.gradients([base, None])[0]
    for unit, found in zip(part.units, merged, strict=True):
        expected = base.float() + sum(unit.coefficients[unit.row, k].detach() * dense[k].float() for k in dense)
        torch.testing.assert_close(found, expected.to(weight))
    products = [float(base.double() @ dense[k].double()) if k in dense else 0.0 for k in range(3)]
    torch.testing.assert_close(gradients.cpu(), torch.tensor([products, [0.0] * 3]), rtol=1e-4, atol=1e-3)
