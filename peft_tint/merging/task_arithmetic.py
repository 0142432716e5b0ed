from ._stack import stacks


def task_arithmetic(task_vectors):
    """The sum of the task vectors (https://arxiv.org/abs/2212.04089); usually scaled by 0.3 when it is applied."""
    for name, stacked in stacks(task_vectors):
        yield name, stacked.sum(0)
