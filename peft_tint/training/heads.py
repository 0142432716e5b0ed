"""Linear probing before fine-tuning (https://arxiv.org/abs/2202.10054): heads are fitted alone, to features that the
merged model computes once."""

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import get_scheduler

from .objectives import Objective
from .rows import Rows


@torch.no_grad()
def features_of(rows: Rows, head: nn.Module, task: str, loader):
    """What a task's head gets, of shape (samples, features), and the expert's rows; None where it gets more than one
    vector a sample, or its output is not that of the model."""
    found, expert_rows = [], []
    hook = head.register_forward_hook(lambda module, args, output: found.append((*args, output)))
    try:
        for batch in loader:
            batch = send_to_device(batch, rows.accelerator.device)
            expert_rows.append(rows.of_expert(task, batch))
            del found[len(expert_rows) - 1 :]  # the expert's
            compared = rows.forward(task, batch).compared.rows()
            axes = [getattr(value, "ndim", None) for value in found[-1]] if found else None
            if len(found) != len(expert_rows) or axes != [2, 2] or not torch.equal(found[-1][1].float(), compared):
                return None
    finally:
        hook.remove()
    dtype = next(head.parameters()).dtype
    return torch.cat([features.to(dtype) for features, _ in found]), torch.cat(expert_rows)


def fit(head: nn.Module, objective: Objective, features, expert_rows, learning_rate: float, steps) -> torch.Tensor:
    """Trains what is trainable in the head by all samples at once, at a rate that falls to zero; `steps` is an iterable
    of known length. Returns the loss of the last step."""
    parameters = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    scheduler = get_scheduler("cosine", optimizer, 0, len(steps))
    for _ in steps:
        loss = objective(head(features), expert_rows, None)
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
    return loss.detach()
