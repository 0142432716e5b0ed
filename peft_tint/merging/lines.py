import re

import torch

from ._stack import each, tensor_names
from .task_arithmetic import task_arithmetic


def lines(task_vectors, alpha=None, beta=0.5, inner=task_arithmetic):
    """LiNeS: deeper blocks are scaled more (https://arxiv.org/abs/2410.17146).

    Scales what `inner`, a one-model method, makes of the task vectors: block l of L by alpha + beta l / (L - 1), all
    outside of the blocks by `alpha`, by default the paper's |sum of task vectors|_1 / |merged|_1 / number of tasks.
    `beta` is to be chosen on validation data. A tensor's block is the first number between dots in its name, and L is
    the largest one + 1; towers side by side (encoder and decoder) are each counted from 0. One task alone gives its
    expert for beta = 0 only.
    """
    if alpha is None:
        alpha = l1_norm(task_arithmetic(task_vectors)) / (l1_norm(inner(task_vectors)) or 1) / len(task_vectors)
    scales = scale_of_names(tensor_names(task_vectors), alpha, beta)
    return ((name, tensor * scales[name]) for name, tensor in inner(task_vectors))


def lines_parts(task_vectors, alpha=None, beta=0.5):
    """Each task's part in `lines` over task arithmetic: its scaled task vector. `alpha` is 1 / number of tasks."""
    scales = scale_of_names(tensor_names(task_vectors), 1 / len(task_vectors) if alpha is None else alpha, beta)
    return each(task_vectors, lambda stacked: stacked, lambda task, name, tensor: tensor * scales[name])


def scale_of_names(names, alpha, beta):
    last = max((block_number(name) for name in names), default=0)
    return {name: alpha + beta * block_number(name) / max(1, last) for name in names}


def l1_norm(task_vector) -> float:
    return sum(tensor.abs().sum(dtype=torch.float64).item() for _, tensor in task_vector)


def block_number(name: str) -> int:
    """0 for what is in no block, which is scaled as the first block."""
    number = re.search(r"(?:^|\.)(\d+)\.", name)
    return int(number[1]) if number else 0
