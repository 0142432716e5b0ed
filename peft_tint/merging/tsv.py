import torch

from ._stack import stack, tensor_names
from ._svd import polar, svd


def tsv(task_vectors, untruncated=None):
    """TSV-M: task singular vectors, decorrelated between the tasks (https://arxiv.org/abs/2412.00081).

    Of each matrix (m, n), each of T tasks gives its top int(min(m, n) / T) singular triplets (at least one, where the
    released code would lose the tensor); U and V of all tasks together are replaced by their polar factors and the
    singular values are kept. All but matrices: the mean. Lossy by the truncation, except for one task alone.

    `untruncated`, a text or a list, leaves the paper: tensors that have it in their names are summed as they are. It is
    for token embeddings, such as `["word_embeddings"]`: a row is a token's own, and tasks that use other tokens change
    other rows, which is of high rank and does not interfere. Raises ValueError for a text in no tensor's name, unless
    the tensors come one by one (`per_tensor`).
    """
    return _each(task_vectors, untruncated, _merge, lambda stacked: stacked.sum(0))


def tsv_parts(task_vectors, untruncated=None):
    """Each task's part in `tsv`: its own decorrelated triplets; of all but matrices, its share in the mean."""
    return _each(task_vectors, untruncated, _parts, lambda stacked: stacked)


def _each(task_vectors, untruncated, merge, keep):
    texts = [untruncated] if isinstance(untruncated, str) else untruncated or []
    if not isinstance(texts, list) or not all(isinstance(text, str) and text for text in texts):
        raise ValueError(f"`untruncated` is {untruncated!r}; give a text or a list of texts, parts of tensors' names.")
    names = tensor_names(task_vectors)
    for text in texts if len(names) > 1 else []:
        if not any(text in name for name in names):
            raise ValueError(
                f"`untruncated` is {untruncated!r}, and {text!r} is in no tensor's name; give a part of one, such as "
                f"{names[0]!r}."
            )
    for name in names:
        yield name, (keep if any(text in name for text in texts) else merge)(stack(task_vectors, name))


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
