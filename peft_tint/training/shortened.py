"""An expert's rows of a large vocabulary, as what of them matters."""

from typing import NamedTuple

import torch

TOP = 64
LARGE = 1024  # classes from which on rows are shortened


class Shortened(NamedTuple):
    """The most probable classes of each row, in 16 bits, and the mass of all others."""

    values: torch.Tensor  # (rows, TOP + 1), float16: log-probabilities, the last that of all others together
    classes: torch.Tensor  # (rows, TOP), int32

    def take(self, index) -> "Shortened":
        return Shortened(self.values[index], self.classes[index])


def shorten(rows: torch.Tensor) -> Shortened:
    """Of logits (rows, classes)."""
    log_p = rows.float().log_softmax(-1)
    values, classes = log_p.topk(TOP)
    rest = log_p.scatter_(-1, classes, -torch.inf).logsumexp(-1, keepdim=True)
    return Shortened(torch.cat([values, rest], -1).clamp(min=-1e4).half(), classes.int())


def complete(short: Shortened, rows: torch.Tensor) -> torch.Tensor:
    """The log-probabilities of all classes (rows, classes). The others share their mass as they do in `rows`, the
    model's own logits, so an objective does not move it among them; none gets more than the least of the known."""
    values, classes = short.values.float(), short.classes.long()
    others = rows.detach().float().scatter(-1, classes, -torch.inf).log_softmax(-1) + values[:, -1:]
    return others.minimum(values[:, -2:-1]).scatter_(-1, classes, values[:, :-1])
