import pytest
import torch

from peft_tint.task_vectors import LowRank, TaskVectors, compute_task_vector, merge_weight


def naive(weight, coefficients, task_vectors):
    for coefficient, task_vector in zip(coefficients, task_vectors, strict=True):
        weight = weight + coefficient * task_vector.to(weight.dtype)
    return weight


@pytest.mark.parametrize("shape", [(5,), (4, 7), (3, 2, 3, 3), (300, 500)])
@pytest.mark.parametrize("tasks", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_weight_and_its_gradient_equal_plain_autograd(shape, tasks, dtype):
    weight = torch.randn(shape, requires_grad=True)
    stack = (0.05 * torch.randn(tasks, *shape)).to(dtype)
    coefficients = torch.rand(tasks, requires_grad=True)
    upstream = torch.randn(shape)
    merged, expected = (f(weight, coefficients, stack) for f in (merge_weight, naive))
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-6)
    gradients, wanted = (
        torch.autograd.grad((value * upstream).sum(), (weight, coefficients)) for value in (merged, expected)
    )
    for gradient, want in zip(gradients, wanted, strict=True):
        assert (gradient - want).norm() <= 1e-5 * want.norm()


def test_gradcheck():
    weight, stack = torch.randn(3, 4).double(), torch.randn(2, 3, 4).double()
    coefficients = torch.rand(2).double()
    inputs = (weight.requires_grad_(), coefficients.requires_grad_(), stack)
    assert torch.autograd.gradcheck(merge_weight, inputs)


def test_zero_is_the_base_and_one_hot_adds_one_task_vector():
    weight, stack = torch.randn(6, 6), torch.randn(3, 6, 6)
    assert torch.equal(merge_weight(weight, torch.zeros(3), stack), weight)
    assert torch.equal(merge_weight(weight, torch.tensor([0.0, 1.0, 0.0]), stack), weight + stack[1])


def test_autocast_changes_nothing():
    weight, stack, coefficients = torch.randn(8, 8), torch.randn(3, 8, 8), torch.rand(3, requires_grad=True)
    expected = merge_weight(weight, coefficients, stack)
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge_weight(weight, coefficients, stack)
        gradient = torch.autograd.grad(merged.sum(), coefficients)[0]
    assert merged.dtype == torch.float32 and torch.equal(merged, expected)
    torch.testing.assert_close(gradient, stack.flatten(1).sum(1))


def test_low_precision_accumulates_in_float32():
    """The result is the float32 sum rounded once, not a sum of roundings."""
    weight = torch.randn(64, 64).bfloat16()
    stack = (0.01 * torch.randn(8, 64, 64)).bfloat16()
    coefficients = torch.rand(8, requires_grad=True)
    merged = merge_weight(weight, coefficients, stack)
    exact = naive(weight.double(), coefficients.double(), stack.double())
    assert merged.dtype == torch.bfloat16
    assert (merged.double() - exact).abs().max() <= (exact.abs() * 2**-8).max()
    assert ((merged != exact.to(torch.bfloat16)).float().mean()) < 0.01
    assert torch.autograd.grad(merged.float().sum(), coefficients)[0].dtype == torch.float32


def test_task_vector_is_subtracted_in_float32():
    base, expert = torch.randn(10).half(), torch.randn(10)
    assert torch.equal(compute_task_vector(expert, base), expert - base.float())
    assert compute_task_vector(expert.half(), base).dtype == torch.float32


@pytest.mark.parametrize("kind", ["dense", "low rank", "both"])
def test_all_of_them_is_on_the_device_of_what_was_given(kind):
    """So that the coefficients, which are made beside them, are too."""
    dense = {0: torch.zeros(4, 3, device="meta")} if kind != "low rank" else {}
    factors = LowRank(torch.zeros(4, 2, device="meta"), torch.zeros(2, 3, device="meta"), 0.5)
    vectors = TaskVectors(dense, {1: factors} if kind != "dense" else {})
    assert {buffer.device.type for buffer in vectors.buffers()} == {"meta"}
