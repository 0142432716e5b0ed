import torch

from ._stack import each


def wudi(task_vectors, learning_rate=1e-5, iterations=300):
    """WUDI: minimises the interference in what the task vectors span (https://arxiv.org/abs/2503.08099).

    For each matrix, Adam minimises sum_i |(tau - tau_i) tau_i^T|^2 / |tau_i|^2 from tau = sum_i tau_i. The matrices are
    taken as (out, in), so layers stored transposed (GPT-2's Conv1D, embeddings) should be given transposed. All but
    matrices: the mean (the released code leaves them the base's). One task alone gives its expert. `learning_rate` > 0,
    `iterations` >= 0.
    """
    if not (learning_rate > 0 and iterations >= 0):
        raise ValueError(
            f"`learning_rate` is {learning_rate} and `iterations` is {iterations}; give a positive number and a count."
        )
    return each(task_vectors, lambda stacked: _minimise(stacked, learning_rate, iterations))


def _minimise(stacked, learning_rate, iterations):
    """With the gradient in closed form, 2 sum_i (tau - tau_i) G_i where G_i = tau_i^T tau_i / |tau_i|^2.

    `change` = tau - sum_i tau_i is what Adam moves, so that the gradient is 2 (change G + constant): one product a
    step, and exactly zero where only one task changed the matrix."""
    if stacked.ndim != 3:
        return stacked.mean(0)
    total = stacked.sum(0)
    gram = torch.zeros(total.shape[1], total.shape[1], device=total.device)
    constant = torch.zeros_like(total)
    for matrix in stacked:
        own = matrix.T @ matrix / matrix.square().sum().clamp(min=torch.finfo(torch.float32).tiny)
        gram += own
        constant += (total - matrix) @ own
    change = torch.zeros_like(total)
    optimizer = torch.optim.Adam([change], lr=learning_rate)
    for _ in range(iterations):
        change.grad = 2 * (change @ gram + constant)
        optimizer.step()
    return total + change
