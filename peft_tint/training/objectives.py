"""Test-time objectives: functions `(logits, expert_logits, mask) -> loss`, all on the last axis.

`logits` and `expert_logits` have the same shape (..., classes): a row is a sample, a token or a pixel. `mask` is None
or boolean of shape (...); rows that are False (padding) do not count. Every objective is a mean over the rows that
count, in float32; no row at all gives a loss of exactly zero with zero gradients.
"""

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


OBJECTIVES = {f.__name__: f for f in (entropy, pseudo_label, soft_pseudo_label, confident_pseudo_label, feature_l1)}


def _cross_entropy(logits, labels):
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), reduction="none").view(labels.shape)


def _mean(values, mask):
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)
