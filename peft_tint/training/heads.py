"""Linear probing before fine-tuning (https://arxiv.org/abs/2202.10054): heads, and final norms of decoders, are fitted
alone, to features that the merged model computes once."""

import copy
from contextlib import contextmanager

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import get_scheduler

from .objectives import Objective
from .outputs import are_close, take_kept
from .rows import Rows
from .shortened import Shortened, shorten

MOST_FEATURES = 1e9  # bytes
MOST_LOGITS = 2**20  # numbers, in one step of fitting


def last_layer(rows: Rows):
    """The tint layer that the output is made by, and what comes after it; None where another layer makes it."""
    model = rows.model
    trained = [layer for layer in model.tint_layers if any(p.requires_grad for p in layer.parameters())]
    heads = [layer for layer in model.head_layers if layer in trained]
    if heads:
        return heads[-1], nn.Identity()
    norms = [layer for layer in model.final_norms if layer in trained]
    return (norms[-1], rows.base.get_output_embeddings()) if norms else None


@torch.no_grad()
def features_of(rows: Rows, layer: nn.Module, rest: nn.Module, task: str, loader):
    """What a task's layer gets, of shape (rows, features), and the expert's rows. None where there is too much of it,
    where a head gets more than one vector a sample, and where `rest` does not make the model's output of what the layer
    gives."""
    found, features, expert_rows, size = [], [], [], 0
    hook = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    dtype = next(layer.parameters()).dtype
    try:
        for batch in loader:
            batch = send_to_device(batch, rows.accelerator.device)
            theirs = rows.of_expert(task, batch)
            found.clear()  # the expert's
            compared = rows.forward(task, batch).compared
            axes = 2 if isinstance(rest, nn.Identity) else 3
            if len(found) != 1 or getattr(found[0], "ndim", 0) != axes:
                return None
            if not len(compared.rows()):
                continue
            positions = found[0][:, None] if axes == 2 else found[0]
            positions = take_kept(positions, batch.get("logits_to_keep"))
            if positions.shape[:2] != compared.values.shape[:2]:
                return None
            own = compared.take(positions).to(dtype)
            with rows.autocasting():
                if not features and not are_close(rest(layer(own)).float(), compared.rows()):
                    return None
            if rows.shortens(task) and not isinstance(theirs, Shortened):
                theirs = shorten(theirs)
            features.append(own)
            expert_rows.append(theirs)
            size += own.nbytes + sum(part.nbytes for part in (theirs if isinstance(theirs, Shortened) else [theirs]))
            if size > MOST_FEATURES:
                return None
    finally:
        hook.remove()
    if not features:
        return None
    if isinstance(expert_rows[0], Shortened):
        return torch.cat(features), Shortened(*(torch.cat(parts) for parts in zip(*expert_rows, strict=True)))
    return torch.cat(features), torch.cat(expert_rows)


def fit(rows: Rows, layer, rest, task: str, objective: Objective, features, expert_rows, learning_rate, steps):
    """Trains what is trainable in the layer, by all samples at once where their logits are not too large, at a rate
    that falls to zero; `steps` is an iterable of known length. Returns the loss of the last step."""
    module = layer.modules_to_save[layer.active_adapters[0]].current
    own = copy.deepcopy(module).float()  # Adam's steps are smaller than what 16 bits resolve
    optimizer = torch.optim.Adam([p for p in own.parameters() if p.requires_grad], learning_rate)
    scheduler = get_scheduler("cosine", optimizer, 0, len(steps))
    with torch.no_grad():
        size = max(MOST_LOGITS // rest(layer(features[:1])).numel(), 1)
    with _frozen(rows.model):  # of tied embeddings the coefficients are elsewhere than in `rest`
        for _ in steps:
            index = slice(None)
            if size < len(features):
                index = torch.randint(len(features), (size,)).to(features.device)
            given = own(features[index].float()).to(features.dtype)
            with rows.autocasting():
                logits = rest(given)
            taken = expert_rows.take(index) if isinstance(expert_rows, Shortened) else expert_rows[index]
            loss = objective(logits, rows.match(task, logits, taken), None)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
    module.load_state_dict(own.state_dict())
    return loss.detach()


@contextmanager
def _frozen(module):
    """Without gradients, which would be those of coefficients."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
