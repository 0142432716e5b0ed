"""Test-time objectives: functions `(logits, expert_logits, mask) -> loss`, all on the last axis.

`logits` and `expert_logits` have the same shape (..., classes): a row is a sample, a token or a pixel. `mask` is None
or boolean of shape (...); rows that are False (padding) do not count. Every objective is a mean over the rows that
count, in float32; no row at all gives a loss of exactly zero with zero gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F


def entropy(logits, expert_logits=None, mask=None):
    """Entropy of the merged model's own prediction, as in AdaMerging (arXiv:2310.02575)."""
    log_p = logits.float().log_softmax(-1)
    return _mean(-(log_p.exp() * log_p).sum(-1), mask)


def pseudo_label(logits, expert_logits, mask=None):
    """Cross entropy to the expert's hard label: Tint as first published (arXiv:2412.19098)."""
    return _mean(_cross_entropy(logits, expert_logits.argmax(-1)), mask)


def soft_pseudo_label(logits, expert_logits, mask=None):
    """Cross entropy to the expert's whole distribution."""
    return _mean(-(expert_logits.float().softmax(-1) * logits.float().log_softmax(-1)).sum(-1), mask)


def confident_pseudo_label(logits, expert_logits, mask=None):
    """Cross entropy to those of the expert's hard labels that `confident_mask` keeps (arXiv:2412.19098, SyMerge)."""
    kept = confident_mask(logits, expert_logits)
    return _mean(_cross_entropy(logits, expert_logits.argmax(-1)), kept if mask is None else kept & mask)


def bce(logits, expert_logits, mask=None):
    """Binary cross entropy to the expert's probability of each class, for tasks in which several may be right."""
    expected = expert_logits.float().sigmoid()
    return _mean(F.binary_cross_entropy_with_logits(logits.float(), expected, reduction="none").mean(-1), mask)


def feature_l1(logits, expert_logits, mask=None):
    """Mean absolute difference to the expert's features, as in Representation Surgery (arXiv:2402.02705).

    The trainer gives it the inputs of the heads in place of logits. It also serves regression, on the outputs."""
    return _mean((logits.float() - expert_logits.float()).abs().mean(-1), mask)


def confident_mask(logits, expert_logits):
    """Which pseudo-labels to keep: expert and merged model agree, or the expert is at least as confident.

    Returns a boolean tensor of shape (...); it carries no gradient."""
    with torch.no_grad():
        expert_confidence, expert_label = expert_logits.float().softmax(-1).max(-1)
        confidence, label = logits.float().softmax(-1).max(-1)
        return (expert_label == label) | (expert_confidence >= confidence)


@dataclass(frozen=True)
class Objective:
    """A function `(logits, expert_logits, mask) -> loss`, and what the trainer has to know of it.

    Args:
        function: on rows of shape (rows, classes).
        compares: "classes" of which one is right, "labels" of which each is right or not, "features", which are the
            inputs of the head in place of the logits, or "any" outputs.
        needs_expert: whether it looks at `expert_logits`. If not, the expert does not run where nothing else asks it,
            and heads are not fitted, which such an objective would have predict one class.
        kept: `(logits, expert_logits) -> bool (rows,)`, which pseudo-labels it keeps; their share is in the log.
    """

    function: Callable
    compares: str = "any"
    needs_expert: bool = True
    kept: Callable | None = None

    def __post_init__(self):
        if self.compares not in ("classes", "labels", "features", "any"):
            raise ValueError(f"`compares` is {self.compares!r}; it must be 'classes', 'labels', 'features' or 'any'.")

    def __call__(self, logits, expert_logits=None, mask=None):
        return self.function(logits, expert_logits, mask)

    @property
    def __name__(self):
        return getattr(self.function, "__name__", type(self.function).__name__)


OBJECTIVES = {
    objective.__name__: objective
    for objective in (
        Objective(entropy, "classes", needs_expert=False),
        Objective(pseudo_label, "classes"),
        Objective(soft_pseudo_label, "classes"),
        Objective(confident_pseudo_label, "classes", kept=confident_mask),
        Objective(bce, "labels"),
        Objective(feature_l1, "features"),
    )
}


def _cross_entropy(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def _mean(values, mask):
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
