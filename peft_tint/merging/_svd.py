"""Singular value decompositions without the directions that only rounding has decided."""

import torch

# What float32 leaves of a singular value that is zero, in units of the largest one, is below this.
ROUNDING = 1e-5
SKETCHED = 64  # columns; matrices of a lower rank, as LoRA experts have, are decomposed in their range


def svd(matrix: torch.Tensor, rank: int | None = None, norm: torch.Tensor | None = None):
    """The first `rank` singular triplets u (m, r), s (r,), vh (r, n), less those whose singular value is zero.

    The vectors of a zero are arbitrary, and would turn the polar factors of the others (a LoRA expert has mostly such).
    Zero is what is below rounding of `norm`, by default of the largest singular value."""
    # In float64, for small singular values magnify what rounding leaves of the vectors
    u, s, vh = (part.to(matrix.dtype) for part in _svd(matrix.double()))
    rank = min(len(s) if rank is None else rank, int((s > ROUNDING * (s[:1] if norm is None else norm)).sum()))
    return u[:, :rank], s[:rank], vh[:rank]


def _svd(matrix):
    """All singular triplets, or fewer where the others are far below rounding. A random sketch gives a basis of the
    range (https://arxiv.org/abs/0909.4061), unless the matrix has a higher rank, as the remainder tells."""
    if min(matrix.shape) > 4 * SKETCHED:
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(matrix.shape[1], SKETCHED, generator=generator, dtype=matrix.dtype).to(matrix.device)
        basis = torch.linalg.qr(matrix @ sketch).Q
        inside = basis.t() @ matrix
        u, s, vh = torch.linalg.svd(inside, full_matrices=False)
        if torch.linalg.norm(matrix - basis @ inside) <= 0.1 * ROUNDING * s[0]:
            return basis @ u, s, vh
    return torch.linalg.svd(matrix, full_matrices=False)


def polar(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest partial isometry: all singular values that are not zero become 1."""
    u, _, vh = svd(matrix)
    return u @ vh


def isotropic(u: torch.Tensor, s: torch.Tensor, vh: torch.Tensor) -> torch.Tensor:
    """u @ vh times the mean of `s`; zeros where there is no singular value at all."""
    return u @ vh * (s.sum() / max(1, len(s)))
