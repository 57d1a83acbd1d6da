"""Which axis of which array counts the examples.

An axis counts examples if the loss takes another number of them with the same parameters. So examples in columns
are found, and a random key, class weights or statistics that stand first in the batch are not taken for examples.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxgrad.check.evaluate.points import batch_sizes
from jaxgrad.check.evaluate.problem import Kernel, Problem, closed, traced

_MOST_TRIES = 40


def counted(problem: Problem, store: Kernel) -> Problem:
    """The problem with its number of examples `n` and, for each array of the data, the axis that counts them.

    The arrays with an axis of one length are tried together, most arrays and first axes first. Where several
    choices work alike (examples and time steps), the one over which the loss is a mean or a sum is taken.
    Where none works, the choice is the first axis of the first array, as far as the others have its length.
    """
    usual = _first_axis(problem.data)
    best: list[tuple[int | None, ...]] = []
    for axes in itertools.islice(_choices(problem.data), _MOST_TRIES):
        if best and _count(axes) < _count(best[0]):
            break
        if _takes(problem, store, axes):
            best.append(axes)
            if len(best) == 3:
                break
    if not best:
        return _with(problem, usual)
    if len(best) > 1:
        best.sort(key=lambda axes: not _is_mean_or_sum(problem, store, axes))
    return _with(problem, best[0])


def unsized(problem: Problem, inside: Iterable[Any]) -> list[str]:
    """A note that no other number of examples can be tried, where there are data and none come as arrays.

    `inside` are the arrays that the loss reads besides its arguments."""
    held = closed(problem.spec.fixed_data)
    shapes = list(dict.fromkeys(str(np.shape(a)) for a in inside if np.ndim(a) > 0))
    if not held and not shapes:
        return []
    why = f"the batch holds {held}" if held else f"the loss reads data that are no arguments of it ({_list(shapes)})"
    return [
        f"{why}. So no other number of examples could be tried, and a mistake in a factor of n cannot be told from one "
        "in a constant."
    ]


def _list(shapes: Sequence[str]) -> str:
    return f"of shape {', '.join(shapes[:3])}" + (" and others" if len(shapes) > 3 else "")


def _with(problem: Problem, axes: tuple[int | None, ...]) -> Problem:
    n = next((a.shape[axis] for a, axis in zip(problem.data, axes, strict=True) if axis is not None), None)
    return problem._replace(axes=axes, n=n)


def _first_axis(data: Sequence[np.ndarray]) -> tuple[int | None, ...]:
    n = next((a.shape[0] for a in data if a.ndim > 0), None)
    return tuple(0 if a.ndim > 0 and a.shape[0] == n else None for a in data)


def _choices(data: Sequence[np.ndarray]) -> Iterator[tuple[int | None, ...]]:
    """Every choice of at most one axis of each array, all of one length, most arrays and first axes first."""
    lengths = list(dict.fromkeys(length for a in data for length in a.shape))
    found: list[tuple[int | None, ...]] = []
    for length in lengths:
        options = [[i for i, s in enumerate(a.shape) if s == length] for a in data]
        held = [i for i, o in enumerate(options) if o]
        if length == 1:
            options = [[i for i in o if i == 0] for o in options]
        if len(held) > 8:
            options = [o[:1] for o in options]
        for choice in itertools.product(
            *([*o, None] if i in held[:8] else o[:1] or [None] for i, o in enumerate(options))
        ):
            if _count(choice):
                found.append(choice)
    order = lambda axes: (-_count(axes), sum(a for a in axes if a is not None))
    return iter(sorted(dict.fromkeys(found), key=order))


def _count(axes: Sequence[int | None]) -> int:
    return sum(axis is not None for axis in axes)


def _takes(problem: Problem, store: Kernel, axes: Sequence[int | None]) -> bool:
    """Whether the loss can be traced with another number of examples."""
    n = next(a.shape[axis] for a, axis in zip(problem.data, axes, strict=True) if axis is not None)
    other, _ = batch_sizes(n, [a.shape for a in (*problem.leaves, *problem.data)])
    picks = np.arange(other) % n
    data = tuple(a if x is None else np.take(a, picks, axis=x) for a, x in zip(problem.data, axes, strict=True))
    try:
        traced(store, problem.leaves, data)
    except Exception:  # whatever the person's loss raises for a shape it was not written for
        return False
    return True


def _is_mean_or_sum(problem: Problem, store: Kernel, axes: Sequence[int | None]) -> bool:
    """Whether the loss of all examples taken twice is the loss, or twice the loss."""
    twice = tuple(a if x is None else np.concatenate([a, a], axis=x) for a, x in zip(problem.data, axes, strict=True))
    try:
        once, double = (float(store.function(list(problem.leaves), list(d))) for d in (problem.data, twice))
    except Exception:
        return False
    return any(abs(double - factor * once) <= 1e-9 * abs(once) for factor in (1, 2))
