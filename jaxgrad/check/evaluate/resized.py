"""Whether a factor is a number or a dimension that happens to be equal to it: told by changing the dimension."""

from collections.abc import Sequence

import numpy as np

from jaxgrad.check.evaluate.problem import Kernel, Malformed, Problem, autodiff, by_hand


def ratio_at(problem: Problem, store: Kernel, leaves: Sequence[int], length: int) -> tuple[float, int] | None:
    """The factor on `leaves`, and the new length, when every axis of this length has another.

    None where the two functions do not take other shapes, or where there is then no one factor.
    """
    taken = {s for a in (*problem.leaves, *problem.data) for s in a.shape}
    other = next(m for m in range(length + 1, length + 99) if m not in taken)
    rng = np.random.default_rng(41)

    def resized(a: np.ndarray, fixed: int | None) -> np.ndarray:
        for axis, size in enumerate(a.shape):
            if size == length and axis != fixed:
                a = np.take(a, np.arange(other) % length, axis=axis)
        return a

    params = tuple(resized(p, None) for p in problem.leaves)
    params = tuple(np.asarray(p * np.exp(0.3 * rng.standard_normal(p.shape))) for p in params)
    data = tuple(resized(a, axis) for a, axis in zip(problem.data, problem.axes, strict=True))
    try:
        _, true = autodiff(store, params, data)
        mine = by_hand(problem._replace(leaves=params, data=data), params, data)
    except Exception:  # whatever the person's functions raise for shapes they were not written for
        return None
    if isinstance(mine, Malformed):
        return None
    h = np.concatenate([np.ravel(mine[i]) for i in leaves])
    t = np.concatenate([np.ravel(true[i]) for i in leaves])
    size = float(t @ t)
    if not (np.isfinite(size) and size > 0):
        return None
    c = float(h @ t) / size
    return (c, other) if np.linalg.norm(h - c * t) <= 1e-8 * np.linalg.norm(h) else None


def is_mean(problem: Problem, store: Kernel) -> bool | None:
    """Whether the loss is a mean over the examples (True) or a sum (False); None if it is neither.

    With every example twice the gradient stays, or doubles.
    """
    twice = tuple(
        a if axis is None else np.concatenate([a, a], axis=axis)
        for a, axis in zip(problem.data, problem.axes, strict=True)
    )
    try:
        _, once = autodiff(store, problem.leaves, problem.data)
        _, double = autodiff(store, problem.leaves, twice)
    except Exception:
        return None
    flat = [np.concatenate([np.ravel(g) for g in gradient]) for gradient in (once, double)]
    size = float(np.linalg.norm(flat[0]))
    if np.linalg.norm(flat[1] - flat[0]) <= 1e-9 * size:
        return True
    return False if np.linalg.norm(flat[1] - 2 * flat[0]) <= 1e-9 * size else None
