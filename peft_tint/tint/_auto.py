"""`tint_layer="auto"`: the block in which the experts disagree most."""

import torch
from torch import nn

from .._structure import find_head, has_parameters, is_under, named_tensors, unit_name
from ..experts import check_expert, load_expert


def choose_tint_layer(model: nn.Module, modules: dict[str, nn.Module], sources: dict) -> list[str]:
    """The head, and the numbered block whose weights the experts pull furthest apart, per parameter.

    A block's disagreement is the variance of the task vectors, sum_k ||tau_k - mean tau||^2, over the number of its
    parameters: no merged value can be near to all experts there, and the tint layer is what merging leaves alone. It
    is large where the task vectors are long and their cosines small. It takes a pass over the experts, no data and no
    training. Raises ValueError for a model without numbered blocks, and for a single expert.
    """
    if len(sources) < 2:
        raise ValueError("`tint_layer='auto'` compares experts, and there is one. Name a layer, or leave it out.")
    head = find_head(model, modules)
    tensors, buffers = named_tensors(modules)
    per_task = {name for name in tensors if is_under(name, head)}
    blocks = {}  # block -> its parameters
    for name in tensors.keys() - per_task - buffers:
        block = unit_name("block", name, "")
        if block in modules and block.rpartition(".")[2].isdigit() and has_parameters(modules[block]):
            blocks.setdefault(block, []).append(name)
    if not blocks:
        raise ValueError(
            f"`tint_layer='auto'` chooses among numbered blocks, and {type(model).__name__} has none. Name a layer."
        )
    total = {name: torch.zeros_like(tensors[name], dtype=torch.float32) for own in blocks.values() for name in own}
    squares = dict.fromkeys(total, 0.0)
    for task, source in sources.items():
        expert = load_expert(task, source, model)
        check_expert(expert, tensors, per_task, buffers - per_task, getattr(model, "config", None))
        of_expert = expert.by_tensor(tensors)
        for name in total:
            change = expert.task_vector(name, tensors[name], of_expert[id(tensors[name])])
            total[name] += change
            squares[name] += change.square().sum().item()
    count = len(sources)
    variance = {name: squares[name] - total[name].square().sum().item() / count for name in total}
    disagreement = {
        block: sum(variance[name] for name in own) / sum(total[name].numel() for name in own)
        for block, own in sorted(blocks.items())
    }
    return [max(disagreement, key=disagreement.get), *head]
