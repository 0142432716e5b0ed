from ._stack import each


def average(task_vectors):
    """The mean of the task vectors, which makes the mean of the experts (https://arxiv.org/abs/2203.05482)."""
    return each(task_vectors, lambda stacked: stacked.mean(0))
