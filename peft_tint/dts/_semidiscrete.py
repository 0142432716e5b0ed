"""Semidiscrete decomposition: a matrix as a sum of outer products of vectors that have four values.

    matrix ~ sum_k scale_k u_k v_k.T,     entries of u_k and v_k in {-3, -1, 1, 3}: 2 bits

After Kolda and O'Leary (doi:10.1145/291128.291129), who have {-1, 0, 1} and one term at a time. The paper's codec
rounds each singular vector for itself, so the error stays at that of rounding whatever the rank. Here each rounding
sees what all the others have left, so a further term also repairs those before it, and the error falls with the rank.
"""

import torch

from ._svd import truncated_svd

ROUNDS = 8  # 32 would leave 1 to 2% less error


def semidiscrete(matrix: torch.Tensor, rank: int):
    """Scales (r,) and codes u (r, m), v (r, n), as floats, of a matrix (m, n), with r = `rank` terms.

    Starts with the rounded singular vectors; a matrix of lower rank, such as that of a LoRA, has those of what these
    leave for further terms.
    """
    peak = matrix.abs().max()
    matrix = matrix / peak  # as in `truncated_svd`
    scales, u, v = _improve_all(matrix, *_start(matrix, rank))
    while len(u) < rank and (left := matrix - (u.T * scales) @ v).any():
        more_u, more_v = _start(left, rank - len(u))
        scales, u, v = _improve_all(matrix, torch.cat([u, more_u]), torch.cat([v, more_v]))
    return scales * peak, u, v


def _start(matrix, rank):
    u, _, v = truncated_svd(matrix, rank)
    return tuple(_round(2 * len(x) ** 0.5 * x.T) for x in (u, v))  # steps of 1 rms: best for normal entries


def _improve_all(matrix, u, v):
    """Improves, in turn, the codes of one side and all the scales."""
    scales = _fit_scales(v @ matrix.T, u, v)
    for _ in range(ROUNDS):
        products = v @ matrix.T
        u = _improve(u, scales[:, None] * v, scales[:, None] * products)
        scales = _fit_scales(products, u, v)
        products = u @ matrix
        v = _improve(v, scales[:, None] * u, scales[:, None] * products)
        scales = _fit_scales(products, v, u)
    return scales, u, v


def _round(x):
    """To the nearest of -3, -1, 1, 3."""
    return (2 * torch.floor(x / 2) + 1).clamp(-3, 3)


def _improve(codes, others, products):
    """Each row of `codes` in turn is the best one, all others given, for codes.T @ others nearest to the matrix.

    `products` is others @ matrix.T. The error is a separate parabola in each entry of a row: rounding its minimum is
    exact.
    """
    codes, gram = codes.clone(), others @ others.T  # (r, r)
    for k, row in enumerate(gram):
        if row[k] > 0:
            codes[k] = _round(codes[k] + (products[k] - row @ codes) / row[k])
    return codes


def _fit_scales(products, u, v):
    """The scales of least squares; `products` is v @ matrix.T."""
    gram = (u @ u.T).double() * (v @ v.T).double()
    gram.diagonal().mul_(1 + 1e-9)  # two terms may have become equal
    return torch.linalg.solve(gram, (products * u).sum(1).double()).to(u)
