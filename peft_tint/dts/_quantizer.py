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
    half, sizes, negative = levels // 2, x.abs().float(), x < 0
    codes = 1 + half * negative.to(torch.uint8)
    positive_sizes, negative_sizes = sizes[x > 0], sizes[negative]
    for group in range(1, half):
        bounds = [_largest_below(group, half, of_sign) for of_sign in (positive_sizes, negative_sizes)]
        codes += sizes > torch.where(negative, bounds[1], bounds[0])
    codes *= sizes > 0
    squares = torch.bincount(codes.flatten(), sizes.flatten().double().square(), levels + 1)
    values = (squares / torch.bincount(codes.flatten(), minlength=levels + 1).clamp_min(1)).sqrt().float()
    values[1 + half :] *= -1
    return Quantized(codes, values)


def _largest_below(group, groups, sizes):
    """The largest entry of the groups before the given one, the first being that of the smallest entries."""
    below = len(sizes) - len(sizes) * (groups - group) // groups
    return sizes.kthvalue(below).values if below else sizes.new_zeros(())


def dequantize(quantized: Quantized) -> torch.Tensor:
    return quantized.values[quantized.codes.long()]
