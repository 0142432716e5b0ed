"""Task vectors (arXiv:2212.04089): what fine-tuning added to each tensor, and how a sum of them is applied."""

import torch


def compute_task_vector(expert: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`expert - base`, subtracted in float32 (float64 if either is), whatever the two dtypes are."""
    dtype = torch.promote_types(torch.promote_types(expert.dtype, base.dtype), torch.float32)
    return expert.to(dtype) - base.to(dtype)


def merge_weight(weight: torch.Tensor, coefficients: torch.Tensor, task_vectors: torch.Tensor) -> torch.Tensor:
    """W = W0 + sum_k lambda_k tau_k for one tensor, differentiable in the coefficients and in W0.

    `weight` has any shape, `coefficients` shape (tasks,), `task_vectors` shape (tasks, *weight.shape). The sum is
    accumulated in float32 (float64 for float64 weights) also under autocast, and has the dtype of `weight`.

    The gradient of a coefficient is `<dL/dW, tau_k>`, so one matrix-vector product over the stacked task vectors
    gives the weight and one gives all gradients; autograd's own graph over the K additions would keep and walk K
    temporaries of the size of the weight.
    """
    return _MergeWeight.apply(weight, coefficients, task_vectors)


class _MergeWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, coefficients, task_vectors):
        ctx.save_for_backward(task_vectors)
        ctx.coefficients_dtype = coefficients.dtype
        dtype = torch.promote_types(weight.dtype, torch.float32)
        with torch.autocast(weight.device.type, enabled=False):
            stack, coefficients = (
                task_vectors.flatten(1).to(dtype),
                coefficients.to(dtype),
            )  # (tasks, entries), (tasks,)
            if weight.is_cuda:  # where a matrix product might be in TF32, which would round the task vectors
                merged = torch.addmv(weight.to(dtype).flatten(), stack.t(), coefficients)
            else:  # where this reads the stack faster
                merged = torch.addmm(weight.to(dtype).reshape(1, -1), coefficients[None], stack)
        return merged.view(weight.shape).to(weight.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (task_vectors,) = ctx.saved_tensors
        dtype = torch.promote_types(grad.dtype, torch.float32)
        grad_coefficients = None
        if ctx.needs_input_grad[1]:
            with torch.autocast(grad.device.type, enabled=False):
                grad_coefficients = torch.mv(task_vectors.flatten(1).to(dtype), grad.to(dtype).flatten())
            grad_coefficients = grad_coefficients.to(ctx.coefficients_dtype)
        return grad if ctx.needs_input_grad[0] else None, grad_coefficients, None
