from ._stack import each
from ._svd import isotropic, svd


def iso_c(task_vectors):
    """Iso-C: the sum with an isotropic spectrum (https://arxiv.org/abs/2502.04959).

    All singular values of a matrix become their mean, so it is lossy also for one task alone. Those that are zero do
    not count, for their vectors are arbitrary; the released code gives them the mean too, which differs for sums of low
    rank (LoRA experts). All but matrices: the mean over tasks.
    """
    return each(task_vectors, lambda x: isotropic(*svd(x.sum(0))) if x.ndim == 3 else x.mean(0))
