import torch

from ._stack import each


def slerp(task_vectors, t=0.5):
    """Spherical interpolation of exactly two experts (https://doi.org/10.1145/325334.325242).

    It acts on the task vectors, not on the experts' weights, and on each tensor by itself: with the angle w between the
    two, sin((1 - t) w) / sin(w) of the first and sin(t w) / sin(w) of the second, and plain interpolation where w has
    no sine (parallel, opposite, or a tensor that one did not change). `t` in [0, 1] goes from the first task to the
    second in the order in which they are given.
    """
    if len(task_vectors) != 2:
        raise ValueError(f"`slerp` is between two tasks and got {len(task_vectors)}; `karcher` takes any number.")
    if not 0 <= t <= 1:
        raise ValueError(f"`t` is {t}; give a number from 0 (the first task) to 1 (the second).")
    first, second = task_vectors
    if first > second:  # `stack` has them by name
        t = 1 - t
    return each(task_vectors, lambda stacked: _interpolate(*stacked, t))


def _interpolate(x, y, t):
    norms = x.norm(), y.norm()
    if min(norms) > 0:
        x1, y1 = x / norms[0], y / norms[1]
        angle = 2 * torch.atan2((x1 - y1).norm(), (x1 + y1).norm())  # exact also where the cosine is near to 1
        if angle.sin() > 1e-4:
            return ((1 - t) * angle).sin() / angle.sin() * x + (t * angle).sin() / angle.sin() * y
    return (1 - t) * x + t * y
