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
    return (free + [37, 41])[0], (free + [37, 41])[1]


def resample(
    rng: np.random.Generator, data: Sequence[Any], rows: Sequence[bool], n: int | None, size: int
) -> tuple[Any, ...]:
    """`size` examples: distinct ones if there are enough, and not all with one label if there are several."""
    if n is None:
        return tuple(data)
    picks = np.arange(size)
    for _ in range(20):
        base = rng.permutation(n)
        picks = np.concatenate([base, rng.integers(0, n, max(0, size - n))])[:size]
        if all(_varied(a, picks) for a, row in zip(data, rows, strict=True) if row):
            break
    return tuple(a[picks] if row else a for a, row in zip(data, rows, strict=True))


def _varied(array: np.ndarray, picks: np.ndarray) -> bool:
    flat = array.reshape(array.shape[0], -1)
    return bool(np.any(flat[picks] != flat[picks[:1]])) or not bool(np.any(flat != flat[:1]))


def near(rng: np.random.Generator, leaves: Sequence[np.ndarray], size: float) -> tuple[np.ndarray, ...]:
    """Each entry times exp(size ξ), and zero entries moved off zero by a tenth of the leaf: keeps signs."""
    out = []
    for leaf in leaves:
        rms = float(np.sqrt(np.mean(leaf**2))) or 1.0
        moved = leaf * np.exp(size * rng.standard_normal(leaf.shape))
        out.append(np.where(leaf == 0, size * rms * rng.standard_normal(leaf.shape), moved))
    return tuple(out)


def anywhere(rng: np.random.Generator, leaves: Sequence[np.ndarray], scale: float) -> tuple[np.ndarray, ...]:
    """Gaussian leaves, of standard deviation scale/sqrt(fan-in)."""
    return tuple(
        scale * rng.standard_normal(leaf.shape) / np.sqrt(max(1, leaf.shape[0] if leaf.ndim > 1 else 1))
        for leaf in leaves
    )


def scaled(leaves: Sequence[np.ndarray], factor: float) -> tuple[np.ndarray, ...]:
    return tuple(leaf * factor for leaf in leaves)


class Plan(NamedTuple):
    """All points of a check, by what they are for."""

    moderate: tuple[Point, ...]
    """For the verdict, besides the given point."""
    search: tuple[Point, ...]
    """For the diagnosis: generic positions, at two batch sizes if possible."""
    saturated: tuple[Point, ...]
    """Far out, where formulas that are right on paper overflow."""


Truth = Callable[..., tuple[float, list[np.ndarray]]]


def draw(
    problem: Any, store: Any, rng: np.random.Generator, sizes: tuple[int, int] | None, truth: Truth
) -> Plan:
    """The points of a check. `sizes` are the two small batch sizes, or None if the batch must stay as it is."""
    first, second = sizes if sizes is not None else (problem.n, problem.n)

    def batch(size: int | None) -> tuple[Any, ...]:
        if sizes is None or size is None:
            return problem.data
        return resample(rng, problem.data, problem.rows, problem.n, size)

    def usable(leaves: Sequence[np.ndarray], data: Sequence[Any]) -> float:
        """How evenly the gradient is spread over the leaves; -1 if it is not finite."""
        value, gradient = truth(store, leaves, data)
        sizes_ = [float(np.linalg.norm(g)) * (float(np.linalg.norm(p)) or 1.0) for g, p in zip(gradient, leaves, strict=True)]
        if not np.isfinite(value) or not np.all(np.isfinite(sizes_)):
            return -1.0
        live = [x for x in sizes_ if x > 0]
        return min(live) / max(live) if live else 0.0

    def generic(size: int | None, tries: int = 6) -> Point | None:
        """Parameters of ordinary size, shrunk until no unit is saturated."""
        data = batch(size)
        best: tuple[float, Point] | None = None
        for scale in (1.0, 0.3, 0.1, 0.01, 1e-3, 3.0)[:tries]:
            leaves = anywhere(rng, problem.leaves, scale)
            quality = usable(leaves, data)
            if quality >= 0 and (best is None or quality > best[0]):
                best = (quality, Point("drawn parameters", size, leaves, data))
            if quality > 1e-6:
                break
        return best[1] if best is not None else None

    def close(size: int | None, spread: float) -> Point:
        return Point("parameters near the given ones", size, near(rng, problem.leaves, spread), batch(size))

    n1a, n1b, n1c = generic(first), generic(first), close(first, 0.5)
    n2a, n2b = generic(second), close(second, 0.5)
    if n1a is None:
        n1a, n1b, n2a = close(first, 0.3), close(first, 0.4), close(second, 0.3)
    assert n1a is not None
    ordinary = [p for p in (n1a, n1b, n1c) if p is not None]
    search = [*ordinary, *[p for p in (n2a, n2b) if p is not None]]

    moderate = [
        Point("the given point, other examples", first, problem.leaves, batch(first)),
        Point("perturbed parameters", problem.n, near(rng, problem.leaves, 0.1), problem.data),
        *ordinary,
        Point("small parameters", first, scaled(ordinary[0].leaves, 0.1), ordinary[0].data),
        Point("large parameters", first, scaled(ordinary[-1].leaves, 3.0), ordinary[-1].data),
    ]
    trained = _descend(store, truth, ordinary[-1])
    if trained is not None:
        moderate.append(trained)
    far = ordinary[0]
    saturated = [
        Point(f"parameters {t:g} times larger", far.n, scaled(far.leaves, t), far.data)
        for t in (10.0, 30.0, 100.0, 1000.0)
    ]
    return Plan(tuple(moderate), tuple(search), tuple(saturated))


def _descend(store: Any, truth: Truth, start: Point) -> Point | None:
    """Three steps of descent, each a tenth of the parameters' norm."""
    leaves = start.leaves
    for _ in range(3):
        _, gradient = truth(store, leaves, start.data)
        length = float(np.sqrt(sum(float(np.sum(g**2)) for g in gradient)))
        if not (np.isfinite(length) and length > 0):
            return None
        radius = float(np.sqrt(sum(float(np.sum(p**2)) for p in leaves))) or 1.0
        leaves = tuple(p - 0.1 * radius / length * g for p, g in zip(leaves, gradient, strict=True))
    return Point("after three descent steps", start.n, leaves, start.data)
