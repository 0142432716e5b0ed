from ._stack import stacks
from ._svd import isotropic, svd


def iso_c(task_vectors):
    """Iso-C: the sum with an isotropic spectrum (https://arxiv.org/abs/2502.04959).

    All singular values of a matrix become their mean, so it is lossy also for one task alone. Those that are zero do
    not count, for their vectors are arbitrary; the released code gives them the mean too, which differs for sums of low
    rank (LoRA experts). All but matrices: the mean over tasks.
    """
    for name, stacked in stacks(task_vectors):
        yield name, isotropic(*svd(stacked.sum(0))) if stacked.ndim == 3 else stacked.mean(0)
