"""Truncated singular value decomposition of large matrices, with signs that are fixed."""

import math

import torch

from ..merging._svd import ROUNDING

EXACT = 64  # columns or rows up to which the full decomposition is as fast
OVERSAMPLING = 8  # vectors beyond the rank, of which the last ones converge slowly
TOLERANCE = 0.04  # of the energy that is left out: an iteration that finds less was the last; a third is still to find
ITERATIONS = 12  # where the exact decomposition takes no longer


def truncated_svd(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The first `rank` singular triplets u (m, r), s (r,), v (n, r), less those that are zero up to rounding.

    Signs: of each column of u the entry of largest magnitude is positive.
    """
    smallest, largest = torch.aminmax(matrix)
    peak = torch.maximum(-smallest, largest)
    matrix = matrix / peak  # the squares of small task vectors would be lost in float32
    if rank > min(matrix.shape) // 3 or min(matrix.shape) <= EXACT:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        v = vh.T
    elif len(matrix) < matrix.shape[1]:
        v, s, u = _subspace_iteration(matrix.T, rank)
    else:
        u, s, v = _subspace_iteration(matrix, rank)
    rank = min(rank, int((s > ROUNDING * s[0]).sum()))
    u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    signs = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()  # (1, r)
    return u * signs, s * peak, v * signs


def _subspace_iteration(matrix, rank):
    """Randomised subspace iteration (arXiv:0909.4061) on the shorter side of a matrix that is taller than wide.

    The energy |matrix @ basis|^2 grows with each iteration, towards that of the first singular vectors. What a
    decaying spectrum leaves to find shrinks by a factor an iteration, so what the last one found bounds it.
    """
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers are not touched
    basis = torch.randn(matrix.shape[1], rank + OVERSAMPLING, generator=generator).to(matrix)
    total, found = torch.linalg.vector_norm(matrix) ** 2, -math.inf
    basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    for _ in range(ITERATIONS):
        image = matrix @ basis  # (m, r + 8)
        energy = image.square().sum()
        if energy - found <= TOLERANCE * (total - energy):
            break
        basis, found = torch.linalg.qr(matrix.T @ image).Q, energy
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        return u, s, vh.T
    squares, rotation = torch.linalg.eigh(image.double().T @ image.double())
    s = squares.flip(0).clamp_min(0).sqrt().to(matrix)
    rotation = rotation.flip(1).to(matrix)
    return image @ rotation / s.clamp_min(torch.finfo(s.dtype).tiny), s, basis @ rotation
