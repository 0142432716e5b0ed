from ._stack import stack, tensor_names


def task_arithmetic(task_vectors):
    """The sum of the task vectors (https://arxiv.org/abs/2212.04089); usually scaled by 0.3 when it is applied."""
    return {name: stack(task_vectors, name).sum(0) for name in tensor_names(task_vectors)}
