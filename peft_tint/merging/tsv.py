import torch

from ._stack import each
from ._svd import polar, svd


def tsv(task_vectors):
    """TSV-M: task singular vectors, decorrelated between the tasks (https://arxiv.org/abs/2412.00081).

    Of each matrix (m, n), each of T tasks gives its top int(min(m, n) / T) singular triplets (at least one, where the
    released code would lose the tensor); U and V of all tasks together are replaced by their polar factors and the
    singular values are kept. All but matrices: the mean. Lossy by the truncation, except for one task alone.
    """
    return each(task_vectors, _merge)


def tsv_parts(task_vectors):
    """Each task's part in `tsv`: its own decorrelated triplets; of all but matrices, its share in the mean."""
    return each(task_vectors, _parts)


def _merge(stacked):
    if stacked.ndim != 3:
        return stacked.mean(0)
    u, s, vh = _decorrelated(stacked)
    return torch.cat(u, 1) * torch.cat(s) @ torch.cat(vh)


def _parts(stacked):
    if stacked.ndim != 3:
        return stacked / len(stacked)
    return torch.stack([u * s @ vh for u, s, vh in zip(*_decorrelated(stacked), strict=True)])


def _decorrelated(stacked):
    """Per task u (m, r), s (r,), vh (r, n), where the u of all tasks are orthogonal, and the vh."""
    rank = max(1, min(stacked.shape[1:]) // len(stacked))
    u, s, vh = zip(*(svd(matrix, rank) for matrix in stacked), strict=True)
    ranks = [len(values) for values in s]
    return polar(torch.cat(u, 1)).split(ranks, 1), s, polar(torch.cat(vh)).split(ranks)
