from ._stack import each


def task_arithmetic(task_vectors):
    """The sum of the task vectors (https://arxiv.org/abs/2212.04089); usually scaled by 0.3 when it is applied."""
    return each(task_vectors, lambda stacked: stacked.sum(0))
