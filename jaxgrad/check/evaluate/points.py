"""Where a gradient is tried: parameters and batches, drawn once and for all from one seed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np


class Point(NamedTuple):
    """Parameters and a batch at which both gradients are evaluated."""

    name: str
    n: int | None
    """Number of examples; None where the batch has no common leading axis."""
    leaves: tuple[np.ndarray, ...]
    data: tuple[Any, ...]


def batch_sizes(n: int | None, shapes: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Two small batch sizes that are no other dimension of the problem, so that n cannot be mistaken."""
    taken = {d for shape in shapes for d in shape} | {n}
    free = [m for m in (7, 11, 13, 17, 5, 19, 23, 29, 31) if m not in taken]
    first, second, *_ = [*free, 37, 41]
    return first, second


def resample(
    rng: np.random.Generator, data: Sequence[Any], axes: Sequence[int | None], n: int | None, size: int
) -> tuple[Any, ...]:
    """`size` examples: distinct ones if there are enough, and not all with one label if there are several."""
    if n is None:
        return tuple(data)
    picks = np.arange(size)
    for _ in range(20):
        base = rng.permutation(n)
        picks = np.concatenate([base, rng.integers(0, n, max(0, size - n))])[:size]
        if all(_varied(a, axis, picks) for a, axis in zip(data, axes, strict=True) if axis is not None):
            break
    return tuple(a if axis is None else np.take(a, picks, axis=axis) for a, axis in zip(data, axes, strict=True))


def _varied(array: np.ndarray, axis: int, picks: np.ndarray) -> bool:
    flat = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    return bool(np.any(flat[picks] != flat[picks[:1]])) or not bool(np.any(flat != flat[:1]))


def near(
    rng: np.random.Generator, leaves: Sequence[Any], size: float, symmetric: Sequence[bool] = ()
) -> tuple[np.ndarray, ...]:
    """Each entry times exp(size ξ), and zero entries moved off zero by a tenth of the leaf: keeps signs.

    A `symmetric` leaf A becomes M A M^T with M = I + size Ξ / sqrt(d): still symmetric, and definite if A is.
    """
    out = []
    for i, leaf in enumerate(leaves):
        if symmetric and symmetric[i]:
            turn = np.eye(len(leaf)) + size * rng.standard_normal(leaf.shape) / np.sqrt(len(leaf))
            moved = turn @ leaf @ turn.T
            out.append((moved + moved.T) / 2)
            continue
        rms = float(np.sqrt(np.mean(leaf**2))) or 1.0
        moved = leaf * np.exp(size * rng.standard_normal(leaf.shape))
        out.append(np.asarray(np.where(leaf == 0, size * rms * rng.standard_normal(leaf.shape), moved)))
    return tuple(out)


def anywhere(rng: np.random.Generator, leaves: Sequence[Any], scale: float) -> tuple[np.ndarray, ...]:
    """Gaussian leaves, of standard deviation scale/sqrt(fan-in)."""
    return tuple(
        np.asarray(scale * rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.shape[0] if leaf.ndim > 1 else 1)))
        for leaf in leaves
    )


def scaled(leaves: Sequence[Any], factor: float) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(leaf * factor) for leaf in leaves)


Truth = Callable[..., tuple[float, list[Any]]]


class Plan(NamedTuple):
    """The points of a check, by what they are for."""

    moderate: tuple[Point, ...]
    """For the verdict, besides the given point."""
    generic: tuple[Point, ...]
    """Those of them in generic position, for the diagnosis."""
    saturated: tuple[Point, ...]
    """Far out, where formulas that are right on paper overflow."""
    second: int | None
    """Another batch size for the diagnosis, or None if the batch must stay as it is."""
    truth: Truth
    """Loss and gradient by autodiff, NaN outside the loss's domain: what points are drawn with."""


def draw(problem: Any, store: Any, rng: np.random.Generator, sizes: tuple[int, int] | None, truth: Truth) -> Plan:
    """The points of a verdict. `sizes` are two small batch sizes, or None if the batch must stay as it is."""
    first = sizes[0] if sizes is not None else None
    second = sizes[1] if sizes is not None else None
    ordinary = generic(problem, store, rng, first, truth)
    if problem.points:
        as_given = [
            Point(f"points[{i}]", problem.n, leaves, _batch(problem, rng, None))
            for i, leaves in enumerate(problem.points)
        ]
        other = Point("the given point, other examples", ordinary[0].n, problem.leaves, _batch(problem, rng, first))
        return Plan((other, *as_given, *ordinary), tuple(ordinary), (), second, truth)
    start, last = ordinary[0], ordinary[-1]
    size = start.n
    symmetric = matrices(problem.leaves) if start.name != "drawn parameters" else ()
    moderate = [
        Point("the given point, other examples", size, problem.leaves, _batch(problem, rng, first)),
        Point("perturbed parameters", problem.n, near(rng, problem.leaves, 0.1, symmetric), _batch(problem, rng, None)),
        *ordinary,
        Point("small parameters", size, scaled(start.leaves, 0.1), start.data),
        Point("large parameters", size, scaled(last.leaves, 3.0), last.data),
    ]
    trained = _descend(store, truth, last)
    if trained is not None:
        moderate.append(trained)
    saturated = [
        Point(f"parameters {t:g} times larger", size, scaled(start.leaves, t), start.data)
        for t in (10.0, 30.0, 100.0, 1000.0)
    ]
    return Plan(tuple(moderate), tuple(ordinary), tuple(saturated), second, truth)


def generic(
    problem: Any, store: Any, rng: np.random.Generator, size: int | None, truth: Truth, count: int = 4
) -> list[Point]:
    """`count` points in generic position with `size` examples (None: the batch as it is).

    All but the last have Gaussian parameters, shrunk until no unit is saturated; the last, and all of them if
    the loss is not finite elsewhere, keeps the signs of the given ones, and stays so near that it is finite there.
    Where points were given, those are taken, each with a batch of its own.
    """
    n = problem.n if size is None else size
    points: list[Point] = []
    if problem.points:
        fixed = size is None and problem.redraw is None
        number = len(problem.points) if fixed else max(count, len(problem.points))
        for i in range(number):
            which = i % len(problem.points)
            points.append(Point(f"points[{which}]", n, problem.points[which], _batch(problem, rng, size)))
        return points
    for _ in range(count - 1):
        data = _batch(problem, rng, size)
        best: tuple[float, Point] | None = None
        for scale in (1.0, 0.3, 0.1, 0.01, 1e-3, 3.0):
            leaves = anywhere(rng, problem.leaves, scale)
            quality = _spread(truth(store, leaves, data), leaves)
            if quality >= 0 and (best is None or quality > best[0]):
                best = (quality, Point("drawn parameters", n, leaves, data))
            if quality > 1e-6:
                break
        if best is None:
            points.append(
                Point("parameters near the given ones", n, _nearby(problem, store, rng, 0.3, data, truth), data)
            )
        else:
            points.append(best[1])
    data = _batch(problem, rng, size)
    if all(p.name == "drawn parameters" for p in points):
        close = near(rng, problem.leaves, 0.5)
    else:
        close = _nearby(problem, store, rng, 0.5, data, truth)
    return [*points, Point("parameters near the given ones", n, close, data)]


def _nearby(
    problem: Any, store: Any, rng: np.random.Generator, size: float, data: tuple[Any, ...], truth: Truth
) -> tuple[np.ndarray, ...]:
    """Parameters as far from the given ones as the loss allows: its domain is narrow."""
    symmetric = matrices(problem.leaves)
    leaves = near(rng, problem.leaves, size, symmetric)
    for smaller in (1.0, 0.3, 0.1, 0.01, 1e-3):
        leaves = near(rng, problem.leaves, smaller * size, symmetric)
        value, gradient = truth(store, leaves, data)
        if np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradient):
            break
    return leaves


def matrices(leaves: Sequence[np.ndarray]) -> tuple[bool, ...]:
    """Which leaves are symmetric matrices: a loss that fails elsewhere may need them so."""
    square = (leaf.ndim == 2 and leaf.shape[0] == leaf.shape[1] > 1 for leaf in leaves)
    return tuple(
        s and bool(np.any(leaf)) and bool(np.array_equal(leaf, leaf.T)) for s, leaf in zip(square, leaves, strict=True)
    )


def _batch(problem: Any, rng: np.random.Generator, size: int | None) -> tuple[Any, ...]:
    if problem.redraw is not None:
        return problem.redraw(rng)
    return problem.data if size is None else resample(rng, problem.data, problem.axes, problem.n, size)


def _spread(at: tuple[float, list[Any]], leaves: Sequence[Any]) -> float:
    """How evenly a gradient is spread over the leaves, in (0, 1]; -1 if it is not finite."""
    value, gradient = at
    sizes = [
        float(np.linalg.norm(g)) * (float(np.linalg.norm(p)) or 1.0) for g, p in zip(gradient, leaves, strict=True)
    ]
    if not np.isfinite(value) or not np.all(np.isfinite(sizes)):
        return -1.0
    live = [x for x in sizes if x > 0]
    return min(live) / max(live) if live else 0.0


def _descend(store: Any, truth: Truth, start: Point) -> Point | None:
    """Three steps of descent, each a tenth of the parameters' norm."""
    leaves = start.leaves
    for _ in range(3):
        _, gradient = truth(store, leaves, start.data)
        length = float(np.sqrt(sum(float(np.sum(g**2)) for g in gradient)))
        if not (np.isfinite(length) and length > 0):
            return None
        radius = float(np.sqrt(sum(float(np.sum(p**2)) for p in leaves))) or 1.0
        leaves = tuple(np.asarray(p - 0.1 * radius / length * g) for p, g in zip(leaves, gradient, strict=True))
    return Point("after three descent steps", start.n, leaves, start.data)
