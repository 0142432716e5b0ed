import re

import torch

from ._stack import stack
from .task_arithmetic import task_arithmetic


def lines(task_vectors, alpha=None, beta=0.5, inner=task_arithmetic):
    """LiNeS: deeper blocks are scaled more (https://arxiv.org/abs/2410.17146).

    Scales what `inner`, a one-model method, makes of the task vectors: block l of L by alpha + beta l / (L - 1), all
    outside of the blocks by `alpha`, by default the paper's |sum of task vectors|_1 / |merged|_1 / number of tasks.
    `beta` is to be chosen on validation data. A tensor's block is the first number between dots in its name, and L is
    the largest one + 1; towers side by side (encoder and decoder) are each counted from 0. One task alone gives its
    expert for beta = 0 only.
    """
    merged = inner(task_vectors)
    if alpha is None:
        norms = torch.stack([stack(task_vectors, n).sum(0).abs().sum(dtype=torch.float64) for n in merged])
        merged_norm = sum(tensor.abs().sum(dtype=torch.float64) for tensor in merged.values())
        alpha = float(norms.sum() / merged_norm.clamp(min=torch.finfo(torch.float64).tiny) / len(task_vectors))
    last = max((block_number(name) for name in merged), default=0)
    return {name: tensor * (alpha + beta * block_number(name) / max(1, last)) for name, tensor in merged.items()}


def block_number(name: str) -> int:
    """0 for what is in no block, which is scaled as the first block."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number[1]) if number else 0
