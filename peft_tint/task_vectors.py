"""Task vectors (arXiv:2212.04089): what fine-tuning added to each tensor, and how a sum of them is applied."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import distributed as dist
from torch import nn
from torch.nn import functional as F


class LowRank(NamedTuple):
    """A task vector of rank r: `(scale * b) @ a`, with b of shape (d, r) and a of shape (r, the other axes)."""

    b: torch.Tensor
    a: torch.Tensor
    scale: float | torch.Tensor  # one, or (r,)

    def dense(self) -> torch.Tensor:
        """As a matrix of shape (d, product of the other axes), in float32."""
        return (self.scale * self.b.float()) @ self.a.float()


class LazyTensors(Mapping):
    """{name: `read(name)`}, each computed when it is asked for and not kept."""

    def __init__(self, names, read: Callable):
        self.names, self.read = names, read

    def __getitem__(self, name):
        return self.read(name)

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


class TaskVectors(nn.Module):
    """The task vectors of one parameter: full ones as a stack, those of LoRA experts as factors side by side.

    `dense` and `low_rank` are {index of the task: tensor of the parameter's shape or LowRank}; a task in neither did
    not change the parameter. Nothing here is saved or trained. `original` are the task vectors as they were before
    a transform, which make the experts.

    With a `shape`, `dense` has this process's parts (`shard`) of tensors of that shape. What needs them whole is then
    to be called in all processes at once. The coefficients' gradients are parts, too, of those of the sum of the
    processes' losses: their sum over the processes is the gradient.
    """

    def __init__(self, dense: dict[int, torch.Tensor], low_rank: dict[int, LowRank], original=None, shape=None):
        super().__init__()
        self.original, self.shape = original, shape
        ranks = [task for task, factors in low_rank.items() for _ in range(len(factors.a))]
        device = next(tensor.device for tensor in (*dense.values(), *(factors.b for factors in low_rank.values())))
        scales = [
            torch.as_tensor(factors.scale, dtype=torch.float32, device=device).expand(len(factors.a))
            for factors in low_rank.values()
        ]
        buffers = {
            "dense": torch.stack(list(dense.values())) if dense else None,  # (tasks that are dense, *shape)
            "dense_tasks": torch.tensor(list(dense), dtype=torch.long, device=device),
            "b": torch.cat([factors.b for factors in low_rank.values()], 1) if low_rank else None,  # (d, all ranks)
            "a": torch.cat([factors.a for factors in low_rank.values()], 0) if low_rank else None,
            # float32 as whole numbers, which `model.half()` leaves alone: it would round small scales to nothing
            "scale_bits": torch.cat(scales).view(torch.int32) if low_rank else None,  # (all ranks,)
            "rank_tasks": torch.tensor(ranks, dtype=torch.long, device=device),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)

    def of(self, task: int) -> list[torch.Tensor]:
        """All that makes the task vector of one task, what it has not included."""
        dense, low_rank = self.dense_tasks == task, self.rank_tasks == task
        tensors = [torch.stack([dense.sum(), low_rank.sum()])]
        tensors += [] if self.dense is None else [self.dense[dense]]
        return (
            tensors if self.a is None else [*tensors, self.b[:, low_rank], self.a[low_rank], self.scale_bits[low_rank]]
        )

    def places(self):
        """(dict, key) of each tensor by which it can be told whether these task vectors are the same as before."""
        return [(self._buffers, name) for name in ("dense", "b") if self._buffers[name] is not None]

    def dense_of(self, task: int, shape: torch.Size) -> torch.Tensor:
        """The task vector of one task as a tensor of the parameter's shape, in float32."""
        device = (self.b if self.dense is None else self.dense).device
        total = torch.zeros(shape, dtype=torch.float32, device=device)
        if self.dense is not None:
            total += self._whole(self.dense[self.dense_tasks == task].sum(0))  # of one or none
        if self.a is not None:
            own = self.rank_tasks == task
            factors = LowRank(self.b[:, own], self.a[own].flatten(1), self.scale_bits[own].view(torch.float32))
            total += factors.dense().view(shape)
        return total

    def rank_coefficients(self, coefficients: torch.Tensor) -> torch.Tensor:
        """The factor of each column of `b` with its row of `a`, at least in float32. `coefficients`: (tasks,)."""
        coefficients = coefficients.to(_wide(coefficients))
        return coefficients[self.rank_tasks] * self.scale_bits.view(torch.float32).to(coefficients)

    def merge(self, weight: torch.Tensor, coefficients: torch.Tensor, low_rank: bool = True) -> torch.Tensor:
        """W0 + sum_k lambda_k tau_k, differentiable in `coefficients`; without the LoRA experts if not `low_rank`."""
        if self.dense is not None:
            some = len(self.dense_tasks) < len(coefficients)
            coefficients_of_dense = coefficients[self.dense_tasks] if some else coefficients
            weight = merge_weight(weight, coefficients_of_dense, self.dense, self.shape is not None)
        if low_rank and self.a is not None:
            weight = (weight.to(_wide(weight)) + self._low_rank_sum(coefficients, weight)).to(weight.dtype)
        return weight

    def bake(self, weight: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        """As `merge`, by plain additions: the very numbers of W0 + (lambda_1 tau_1 + lambda_2 tau_2 + ...)."""
        total = torch.zeros_like(weight, dtype=_wide(weight))
        for row, task in enumerate(self.dense_tasks.tolist()):
            total += coefficients[task] * self._whole(self.dense[row]).to(total.dtype)
        if self.a is not None:
            total += self._low_rank_sum(coefficients, weight)
        return (weight.to(total.dtype) + total).to(weight.dtype)

    def _whole(self, dense):
        return dense if self.shape is None else unshard(dense, self.shape)

    def _low_rank_sum(self, coefficients, weight):
        with torch.autocast(weight.device.type, enabled=False):
            scaled = self.b.to(_wide(weight)) * self.rank_coefficients(coefficients)
            return (scaled @ self.a.to(_wide(weight)).flatten(1)).view(weight.shape)


def compute_task_vector(expert: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`expert - base`, subtracted in float32 (float64 if either is), whatever the two dtypes are."""
    dtype = torch.promote_types(torch.promote_types(expert.dtype, base.dtype), torch.float32)
    return expert.to(dtype) - base.to(dtype)


def shard(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part of a tensor's entries: as many as every other's, the last filled up with zeros."""
    return _in_parts(tensor)[dist.get_rank()].clone()


def _in_parts(tensor):
    """All processes' parts, of shape (processes, entries)."""
    count = dist.get_world_size()
    return F.pad(tensor.flatten(), (0, -tensor.numel() % count)).view(count, -1)


def unshard(part: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The tensor of which each process gives its part."""
    parts = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(parts, part.contiguous())
    return parts[: shape.numel()].view(shape)


def merge_weight(
    weight: torch.Tensor, coefficients: torch.Tensor, task_vectors: torch.Tensor, sharded: bool = False
) -> torch.Tensor:
    """W = W0 + sum_k lambda_k tau_k for one tensor, differentiable in the coefficients and in W0.

    `weight` has any shape, `coefficients` shape (tasks,), `task_vectors` shape (tasks, *weight.shape), or (tasks,
    entries of this process) if `sharded`. The sum is accumulated in float32 (float64 for float64 weights) also under
    autocast, and has the dtype of `weight`.

    The gradient of a coefficient is `<dL/dW, tau_k>`, so one matrix-vector product over the stacked task vectors
    gives the weight and one gives all gradients; autograd's own graph over the K additions would keep and walk K
    temporaries of the size of the weight. Between processes only tensors of the size of the weight are exchanged,
    whatever the number of tasks: the sum forward, the gradient of the weight backward.
    """
    return _MergeWeight.apply(weight, coefficients, task_vectors, sharded)


class _MergeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, coefficients, task_vectors, sharded):
        ctx.save_for_backward(task_vectors)
        ctx.coefficients_dtype, ctx.sharded = coefficients.dtype, sharded
        dtype = _wide(weight)
        with torch.autocast(weight.device.type, enabled=False):
            stack, coefficients = _rows(task_vectors), coefficients.to(dtype)  # (tasks, entries), (tasks,)
            if sharded:
                own = _add_weighted(coefficients.new_zeros(stack.shape[1]), coefficients, stack)
                merged = weight.to(dtype) + unshard(own, weight.shape)
            else:
                merged = _add_weighted(weight.to(dtype).flatten(), coefficients, stack)
        # in this order: where the last does nothing to a tensor, Dynamo of 2.11 gives no gradients
        return merged.to(weight.dtype).view(weight.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (task_vectors,) = ctx.saved_tensors
        dtype = _wide(grad)
        with torch.autocast(grad.device.type, enabled=False):
            wanted = grad.to(dtype).flatten()
            if ctx.sharded:
                parts = list(_in_parts(wanted))
                wanted = torch.empty_like(parts[0])
                dist.reduce_scatter(wanted, parts)
            grad_coefficients = _inner_products(_rows(task_vectors), wanted)
        return grad, grad_coefficients.to(ctx.coefficients_dtype), None, None


def _add_weighted(start, coefficients, stack):
    """start + sum_k coefficients_k stack_k, of shape (entries,), in the dtype of `start` and `coefficients`."""
    if stack.dtype != start.dtype:
        sums = [_add_weighted(start[piece], coefficients, stack[:, piece].to(start.dtype)) for piece in _pieces(stack)]
        return torch.cat(sums)
    if start.is_cuda:  # where a matrix product might be in TF32, which would round the task vectors
        return torch.addmv(start, stack.t(), coefficients)
    return torch.addmm(start[None], coefficients[None], stack).view(-1)  # which reads the stack faster here


def _inner_products(stack, vector):
    """<stack_k, vector> of each k, in the dtype of `vector`."""
    if stack.dtype != vector.dtype:
        return sum(_inner_products(stack[:, piece].to(vector.dtype), vector[piece]) for piece in _pieces(stack))
    return torch.mv(stack, vector)


def _pieces(stack):
    """Slices of the entries of a stack to be widened one at a time, small enough for a CPU's cache."""
    size = 2**24 if stack.is_cuda else 2**16
    return (slice(i, i + size) for i in range(0, stack.shape[1], size))


def _rows(stack):
    """(tasks, *shape) as (tasks, entries), also where the tensors are scalars."""
    return stack.unsqueeze(-1).flatten(1)


def _wide(tensor):
    return torch.promote_types(tensor.dtype, torch.float32)
