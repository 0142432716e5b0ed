import torch

from ._stack import stack, tensor_names
from ._svd import polar, svd


def tsv(task_vectors):
    """TSV-M: task singular vectors, decorrelated between the tasks (https://arxiv.org/abs/2412.00081).

    Of each matrix (m, n), each of T tasks gives its top int(min(m, n) / T) singular triplets (at least one, where the
    released code would lose the tensor); U and V of all tasks together are replaced by their polar factors and the
    singular values are kept. All but matrices: the mean. Lossy by the truncation, except for one task alone.
    """
    return {name: _merge(stack(task_vectors, name)) for name in tensor_names(task_vectors)}


def _merge(stacked):
    if stacked.ndim != 3:
        return stacked.mean(0)
    rank = max(1, min(stacked.shape[1:]) // len(stacked))
    u, s, vh = zip(*(svd(matrix, rank) for matrix in stacked), strict=True)
    return polar(torch.cat(u, 1)) * torch.cat(s) @ polar(torch.cat(vh))
