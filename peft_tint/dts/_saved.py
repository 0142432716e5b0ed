"""What a saved adapter has of a tensor, checked against the model's own: a mismatch is a ValueError naming `owner`."""

import torch

from ..task_vectors import LowRank
from ._packing import Reader
from .codec import decode_tensor


def decode_for(owner: str, name: str, packed: torch.Tensor, weight: torch.Tensor) -> LowRank | torch.Tensor:
    """The decoded task vector of a weight, on its device; in its dtype, but for codes in int8."""
    try:
        reader = Reader(name, packed)
        if reader.shape == weight.shape:  # of a damaged file it may be huge
            decoded = decode_tensor(reader)
    except ValueError as error:
        raise ValueError(f"{owner}: {error} Download or save the adapter again.") from error
    if reader.shape != weight.shape:
        raise ValueError(
            f"{owner}: {name!r} has shape {tuple(reader.shape)}, in the base model it has {tuple(weight.shape)}. Use "
            "the base model that the adapter was made for."
        )
    if not isinstance(decoded, LowRank):
        return decoded.to(weight)
    dtype = weight.dtype if decoded.a.is_floating_point() else torch.int8
    b, a = (factor.to(weight.device, dtype) for factor in (decoded.b, decoded.a))
    return LowRank(b, a, torch.as_tensor(decoded.scale, device=weight.device))


def check_whole(owner: str, name: str, tensor: torch.Tensor, weight: torch.Tensor) -> None:
    """Of a tensor that takes the place of the base's, which may be of another size."""
    same_kind = tensor.ndim == weight.ndim and tensor.is_floating_point() == weight.is_floating_point()
    if not same_kind or not torch.isfinite(tensor.float()).all():
        raise ValueError(
            f"{owner}: {name!r} has shape {tuple(tensor.shape)}, type {tensor.dtype}, or NaN or Inf. The base's has "
            f"shape {tuple(weight.shape)}. The adapter is broken, or another model's."
        )
