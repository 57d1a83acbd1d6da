"""A hand-derived gradient with its loss, and what a checker should say about it."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from experiments.support import exact


class Cause(NamedTuple):
    """One mistake, in the terms of `jaxgrad.check.report.Finding`."""

    kinds: frozenset[str]
    """The kinds of finding that name it."""
    leaves: tuple[str, ...]
    """The leaves that it makes wrong, of several; empty: every leaf that is wrong."""
    lines: tuple[str, ...]
    """Pieces of the lines of the loss where the wrong step stands; empty: no line is better than another."""
    factors: tuple[str, ...]
    """The accepted forms of the factor, `""` for none; empty: it does not matter."""


class Case(NamedTuple):
    """A loss and a gradient of it by hand, as a person wrote it."""

    name: str
    area: str
    """The file that it stands in."""
    what: str
    """What the person did wrong; for a right gradient, what is unusual about it."""
    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    right: Callable[..., Any]
    """The same without the mistake."""
    params: Any
    batch: Any
    """None: the loss takes no batch."""
    causes: tuple[Cause, ...]
    """Empty: the gradient is right."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        return (self.params,) if self.batch is None else (self.params, self.batch)


def cause(*kinds: str, leaf: Any = (), line: Any = (), factor: Any = ()) -> Cause:
    """`Cause`, where one leaf, line or factor need not stand in a tuple."""
    leaves, lines, factors = ((v,) if isinstance(v, str) else tuple(v) for v in (leaf, line, factor))
    return Cause(frozenset(kinds), leaves, lines, factors)


def wrong_and_right(cases: list[Case]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Two decorators for the gradients of one file, which append them to `cases`.

    `@wrong(loss, params, batch, cause(...), ...)`: the gradient is wrong as it is, and right with `wrong=False`.
    `@right(loss, params, batch)`: it is right.
    """

    def wrong(loss: Any, params: Any, batch: Any, *causes: Cause) -> Any:
        def add(gradient: Any) -> Any:
            cases.append(_case(loss, gradient, partial(gradient, wrong=False), params, batch, causes))
            return gradient

        return add

    def right(loss: Any, params: Any, batch: Any) -> Any:
        def add(gradient: Any) -> Any:
            cases.append(_case(loss, gradient, gradient, params, batch, ()))
            return gradient

        return add

    return wrong, right


def _case(loss: Any, gradient: Any, right: Any, params: Any, batch: Any, causes: tuple[Cause, ...]) -> Case:
    area = gradient.__module__.rpartition(".")[2]
    return Case(gradient.__name__, area, gradient.__doc__, loss, gradient, right, params, batch, causes)


def normal(seed: int, *shape: int, scale: float = 1.0) -> Any:
    """Standard normal draws times `scale`, the same on every machine."""
    return scale * exact.normal(np.random.default_rng(seed), shape)


def uniform(seed: int, *shape: int, low: float = 0.0, high: float = 1.0) -> Any:
    """Uniform draws, the same on every machine."""
    return low + (high - low) * exact.dyadic(np.random.default_rng(seed).random(shape))


def integers(seed: int, high: int, *shape: int) -> Any:
    """Whole numbers from 0 to `high` - 1."""
    return np.random.default_rng(seed).integers(0, high, size=shape)
