"""What a saved adapter has of a tensor, checked against the model's own: a mismatch is a ValueError naming `owner`."""

import torch

from ..task_vectors import LowRank
from .codec import decode


def decode_for(owner: str, name: str, packed: torch.Tensor, weight: torch.Tensor) -> LowRank | torch.Tensor:
    """The decoded task vector of a weight, on its device and in its dtype."""
    try:
        (decoded,) = decode({name: packed}).values()
    except ValueError as error:
        raise ValueError(f"{owner}: {error} Download or save the adapter again.") from error
    low_rank = isinstance(decoded, LowRank)
    shape = (decoded.b.shape[0], decoded.a.shape[1]) if low_rank else decoded.shape
    if tuple(shape) != tuple(weight.shape):
        raise ValueError(
            f"{owner}: {name!r} has shape {tuple(shape)}, in the base model it has {tuple(weight.shape)}. Use the base "
            "model that the adapter was made for."
        )
    return LowRank(decoded.b.to(weight), decoded.a.to(weight), decoded.scale) if low_rank else decoded.to(weight)


def check_whole(owner: str, name: str, tensor: torch.Tensor, weight: torch.Tensor) -> None:
    """Of a tensor that takes the place of the base's, which may be of another size."""
    if tensor.ndim != weight.ndim or not torch.isfinite(tensor).all():
        raise ValueError(
            f"{owner}: {name!r} has shape {tuple(tensor.shape)}, or NaN or Inf. The base's has shape "
            f"{tuple(weight.shape)}. The adapter is broken, or another model's."
        )
