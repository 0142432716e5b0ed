import torch

from ._stack import check_share, each
from ._svd import isotropic, polar, svd


def iso_cts(task_vectors, common_space=0.8):
    """Iso-CTS: Iso-C in a common and in task-specific subspaces (https://arxiv.org/abs/2502.04959).

    Of each matrix, the share `common_space` in (0, 1] of directions is the top of the sum's; the rest, in equal parts
    rounded as in the released code, is the top of what each task has outside of that common space. U and V of all
    together are replaced by their polar factors and the singular values by their mean (zeros do not count, as in
    `iso_c`), so it is lossy also for one task alone. All but matrices: the mean over tasks.
    """
    check_share("common_space", common_space)
    return each(task_vectors, lambda stacked: _merge(stacked, common_space))


def _merge(stacked, common_space):
    if stacked.ndim != 3:
        return stacked.mean(0)
    tasks, rank = len(stacked), min(stacked.shape[1:])
    own = min(round((rank - int(rank * common_space)) / tasks), rank // tasks)  # directions of each task
    common = svd(stacked.sum(0), rank - own * tasks)
    outside = [matrix - common[0] @ (common[0].T @ matrix) for matrix in stacked]
    specific = [svd(rest, own, norm=matrix.norm()) for rest, matrix in zip(outside, stacked, strict=True)]
    u, s, vh = zip(*specific, common, strict=True)
    return isotropic(polar(torch.cat(u, 1)), torch.cat(s), polar(torch.cat(vh)))
