"""An expert's rows of a large vocabulary, as what of them matters."""

from typing import NamedTuple

import torch

TOP = 256
LARGE = 1024  # classes from which on rows are shortened


class Shortened(NamedTuple):
    """The most probable classes of each row, in 16 bits, and the mass of all others."""

    # (rows, TOP + 1), float16: log-probabilities, those after the first as differences to it, with which near ones stay
    # apart; the last that of all others together
    values: torch.Tensor
    classes: torch.Tensor  # (rows, TOP), int32

    def take(self, index) -> "Shortened":
        return Shortened(self.values[index], self.classes[index])


def shorten(rows: torch.Tensor) -> Shortened:
    """Of logits (rows, classes)."""
    log_p = rows.float().log_softmax(-1)
    values, classes = log_p.topk(TOP)
    rest = log_p.scatter_(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
    values = torch.cat([values[:, :1], values[:, 1:] - values[:, :1], rest], -1)
    return Shortened(values.clamp(min=-1e4).half(), classes.int())


def complete(short: Shortened, rows: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of all classes (rows, classes). The others share their mass as they do in `rows`, the
    model's own logits, so an objective does not move it among them. None gets more than the least of the known; what
    that leaves over they share evenly."""
    values, classes = short.values.float(), short.classes.long()
    values, rest = torch.cat([values[:, :1], values[:, 1:-1] + values[:, :1]], -1), values[:, -1:]
    others = rows.detach().float().scatter(-1, classes, -torch.inf).log_softmax(-1) + rest
    others = others.minimum(values[:, -1:])
    left = (rest.exp() - others.exp().sum(-1, keepdim=True)).clamp(min=0) / (rows.shape[-1] - TOP)
    others = others.logaddexp((left + 1e-30).log()).minimum(values[:, :1] - 1e-3)
    return others.scatter_(-1, classes, values)
