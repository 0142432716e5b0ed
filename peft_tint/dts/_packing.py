"""Codes as bits, and the bytes of one tensor with all that decoding must check."""

import math
import zlib

import torch

VERSION = 1
# Codes per byte, as digits of a number: four levels are 2 bits an entry, five (with exact zeros) 2.67, two are 1 bit.
DIGITS = {2: 8, 4: 4, 5: 3, 255: 1}


def pack(codes: torch.Tensor, levels: int) -> torch.Tensor:
    """Whole numbers from 0 to levels - 1, of any shape, as bytes."""
    digits = DIGITS[levels]
    codes = torch.nn.functional.pad(codes.flatten().to(torch.uint8), (0, -codes.numel() % digits)).view(-1, digits)
    return (codes * _powers(levels, codes.device)).sum(1, dtype=torch.uint8)


def unpack(packed: torch.Tensor, count: int, levels: int) -> torch.Tensor:
    """The first `count` codes, flat and in uint8."""
    powers = _powers(levels, packed.device)
    return ((packed[:, None] // powers) % levels).flatten()[:count]


def _powers(levels, device):
    return torch.tensor([levels**digit for digit in range(DIGITS[levels])], dtype=torch.uint8, device=device)


def join(form: int, rank: int, shape: torch.Size, parts: list[torch.Tensor]) -> torch.Tensor:
    """One packed tensor, on the CPU. Header, in int32: checksum of the rest, version, form, rank, axes, shape."""
    header = torch.tensor([VERSION, form, rank, len(shape), *shape], dtype=torch.int32)
    body = torch.cat([part.detach().cpu().contiguous().flatten().view(torch.uint8) for part in (header, *parts)])
    return torch.cat([_checksum(body), body])


def _checksum(body):
    return torch.tensor([zlib.crc32(body.numpy())], dtype=torch.uint32).view(torch.uint8)


class Reader:
    """Reads a packed tensor from front to back; what cannot be right is a ValueError with the tensor's name."""

    def __init__(self, name: str, packed: torch.Tensor):
        self.name, self.packed, self.position = name, packed, 4
        if packed.dtype != torch.uint8 or packed.ndim != 1:
            self.fail(f"it is {packed.dtype} of shape {tuple(packed.shape)} instead of one axis of uint8")
        self.packed = packed.detach().cpu().contiguous()
        if len(packed) < 20 or not self.packed[:4].equal(_checksum(self.packed[4:])):
            self.fail(f"its {len(packed)} bytes do not have the checksum with which they were written")
        version, self.form, self.rank, axes = self.take(4, torch.int32).tolist()
        if version != VERSION:
            self.fail(f"its format has version {version}, this is version {VERSION}. Install the newest peft_tint")
        shape = self.take(axes, torch.int32).tolist() if 0 <= axes <= 16 else [0]
        if min(shape, default=1) < 1:
            self.fail(f"it has {axes} axes and shape {shape}")
        self.shape, self.count = torch.Size(shape), math.prod(shape)

    def take(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        start, self.position = self.position, self.position + count * dtype.itemsize
        if self.position > len(self.packed):
            self.fail(f"it ends after {len(self.packed)} bytes, and needs at least {self.position}")
        return self.packed[start : self.position].clone().view(dtype)

    def floats(self, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """In float32."""
        numbers = self.take(count, dtype).float()
        if not numbers.isfinite().all():
            self.fail("it has scales that are NaN or Inf")
        return numbers

    def codes(self, count: int, levels: int) -> torch.Tensor:
        digits = DIGITS[levels]
        packed = self.take(-(-count // digits), torch.uint8)
        if levels**digits < 256 and (packed >= levels**digits).any():
            self.fail(f"it has codes beyond its {levels} levels")
        return unpack(packed, count, levels)

    def end(self) -> None:
        if self.position != len(self.packed):
            self.fail(f"it has {len(self.packed)} bytes, of which its shape and rank explain {self.position}")

    def fail(self, reason: str):
        raise ValueError(f"The compressed tensor '{self.name}' cannot be decoded: {reason}.")
