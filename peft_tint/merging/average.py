from ._stack import stacks


def average(task_vectors):
    """The mean of the task vectors, which makes the mean of the experts (https://arxiv.org/abs/2203.05482)."""
    for name, stacked in stacks(task_vectors):
        yield name, stacked.mean(0)
