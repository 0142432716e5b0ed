from ._stack import stack, tensor_names


def average(task_vectors):
    """The mean of the task vectors, which makes the mean of the experts (https://arxiv.org/abs/2203.05482)."""
    return {name: stack(task_vectors, name).mean(0) for name in tensor_names(task_vectors)}
