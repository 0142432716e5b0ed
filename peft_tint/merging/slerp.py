from ._stack import each, gram


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
    products = gram([x.flatten(), y.flatten()])
    norms = products.diag().sqrt()
    if norms.min() > 0:
        angle = (products[0, 1] / norms.prod()).clamp(-1, 1).arccos()
        if angle.sin() > 1e-4:
            return (((1 - t) * angle).sin() / angle.sin()).item() * x + ((t * angle).sin() / angle.sin()).item() * y
    return (1 - t) * x + t * y
