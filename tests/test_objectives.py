import pytest
import torch

from peft_tint import OBJECTIVES
from peft_tint.training.objectives import confident_mask

EXPERT = torch.tensor([[3.0, 0, 0], [0, 2, 0], [0, 0, 0.5], [1, 0, 0]])
MERGED = torch.tensor([[1.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 3, 0]])


@pytest.mark.parametrize(
    "name, value",
    [
        ("confident_pseudo_label", 1.051445),
        ("pseudo_label", 1.859339),
        ("soft_pseudo_label", 1.559361),
        ("entropy", 0.745706),
        ("feature_l1", 23 / 24),
    ],
)
def test_golden(name, value):
    assert OBJECTIVES[name](MERGED, EXPERT, None).item() == pytest.approx(value, abs=1e-6)


def test_confident_mask_golden():
    assert confident_mask(MERGED, EXPERT).tolist() == [True, True, False, False]


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_masked_rows_do_not_count(objective):
    mask = torch.tensor([True, False, True, True])
    assert objective(MERGED, EXPERT, mask) == pytest.approx(objective(MERGED[mask], EXPERT[mask], None).item())


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_more_axes_are_more_rows(objective):
    merged, expert = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    expected = objective(merged.flatten(0, 2), expert.flatten(0, 2), None)
    torch.testing.assert_close(objective(merged, expert, None), expected)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_no_row_gives_zero_loss_and_gradient(objective):
    merged = MERGED.clone().requires_grad_()
    loss = objective(merged, EXPERT, torch.zeros(4, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and torch.equal(merged.grad, torch.zeros_like(merged))


def test_nothing_kept_gives_zero_loss_and_gradient():
    merged = MERGED[2:].clone().requires_grad_()
    loss = OBJECTIVES["confident_pseudo_label"](merged, EXPERT[2:], None)
    loss.backward()
    assert loss == 0 and torch.equal(merged.grad, torch.zeros_like(merged))


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)
def test_computed_in_float32(objective):
    loss = objective(MERGED.bfloat16(), EXPERT.bfloat16(), None)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, objective(MERGED, EXPERT, None))
