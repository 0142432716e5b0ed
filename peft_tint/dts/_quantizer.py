"""The four-group quantiser of DTS (arXiv:2512.01461)."""

from typing import NamedTuple

import torch


class Quantized(NamedTuple):
    """The tensor is `values[codes]`: `codes` uint8 of its shape, `values` float32 (levels + 1,), the first one 0."""

    codes: torch.Tensor
    values: torch.Tensor


def quantize(x: torch.Tensor, levels: int = 4) -> Quantized:
    """Groups the entries by sign and, within a sign, by size into `levels / 2` groups of as many entries; each becomes
    the root mean square of its group, with its sign. Exact zeros are a group of their own and stay zero.

    Of an odd number the larger half is the smaller one; entries as large as the last of a group belong to it.
    """
    if levels < 2 or levels % 2:
        raise ValueError(f"`levels` is {levels}: it must be even, one half of the levels for each sign.")
    codes = torch.zeros(x.shape, dtype=torch.uint8, device=x.device)
    values = torch.zeros(levels + 1, device=x.device)
    code, half = 1, levels // 2
    for sign in (1, -1):
        within = x * sign > 0
        sizes = x[within].abs().float()
        groups = torch.zeros(len(sizes), dtype=torch.uint8, device=x.device)
        for group in range(1, half if len(sizes) else 1):
            below = len(sizes) - len(sizes) * (half - group) // half  # entries in the groups before, the smaller ones
            groups += sizes > sizes.kthvalue(below).values
        codes[within] = groups + code
        for group in range(half):
            members = sizes[groups == group]
            values[code + group] = sign * members.double().square().mean().sqrt() if len(members) else 0.0
        code += half
    return Quantized(codes, values)


def dequantize(quantized: Quantized) -> torch.Tensor:
    return quantized.values[quantized.codes.long()]
