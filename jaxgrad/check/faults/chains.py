"""Elementwise steps a = F(z): what is done to the incoming adjoint, and slopes that are wrong on one side only."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from jaxgrad.check.faults.mistake import Array, At, Change, Mistake, Say
from jaxgrad.check.replay import Piece, run_piece


@dataclass(frozen=True)
class Adjoint:
    """The incoming adjoint is ignored, or goes through a function that belongs to the value."""

    piece: int
    members: tuple[int, ...]
    how: str
    kind: str
    cost: float
    free: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        return self.members

    def change(self, at: At) -> Change:
        piece, slope = at.todo.pieces[self.piece], at.replay.derivatives[self.piece][0]
        d = at.adjoint(piece.end)
        if d is None:
            return None
        new = _through(at, piece, self.how, np.asarray(slope), d)
        return None if new is None or new.shape != d.shape else {piece.start: new - d * slope}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return f"In {say.at(self.members[-1])} {_WORDS[self.how]}"


_MATRIX = "the derivative is applied as a matrix product instead of entry by entry"
_WORDS = {
    "ignored": "the incoming adjoint is left out: the derivative must be multiplied by it",
    "sign": "the derivative is taken at the incoming adjoint: it is 1 where the input is positive",
    "guided": "the adjoint is cut off where it is negative itself, besides where the input is",
    "function": "the incoming adjoint goes through the function itself: multiply it by the derivative",
    "slope": "the derivative is taken at the incoming adjoint instead of the input",
    "right matrix": f"{_MATRIX}: you used 1 - a^T a, with a the output",
    "left matrix": f"{_MATRIX}: you used 1 - a a^T, with a the output",
    "right sigmoid": f"{_MATRIX}: you used a^T (1 - a), with a the output",
    "left sigmoid": f"{_MATRIX}: you used a (1 - a)^T, with a the output",
    "right slope": _MATRIX,
    "left slope": _MATRIX,
    "gate": "the function is a product z * g(z), and you kept only g(z): the product rule has a second term",
    "other term": "the function is a product z * g(z), and you kept only z * g'(z): the product rule has a second term",
}


def _through(at: At, piece: Piece, how: str, slope: Array, d: Array) -> Array | None:
    z, a = at.values[piece.start], at.values[piece.end]
    with np.errstate(all="ignore"):
        if how == "ignored":
            return slope * np.ones_like(d)
        if how == "sign":
            return d * (d > 0)
        if how == "guided":
            return d * slope * (d > 0)
        if how == "gate":
            return d * (a / z)
        if how == "other term":
            return d * (slope - a / z)
        if how in ("function", "slope"):
            function = lambda x: run_piece(at.program, piece, at.values, x)  # noqa: E731
            out, back = jax.vjp(function, d.astype(z.dtype))
            return np.asarray(out) if how == "function" else np.asarray(back(np.ones_like(out))[0]) * d
        if d.ndim != 2 or a.shape != d.shape:
            return None
        eye = {"right": a.T @ a, "left": a @ a.T}
        if how == "right matrix":
            return d @ (1 - eye["right"])
        if how == "left matrix":
            return (1 - eye["left"]) @ d
        if how == "right sigmoid":
            return d @ (a.T @ (1 - a))
        if how == "left sigmoid":
            return (a @ (1 - a).T) @ d
        square = slope.shape[0] == slope.shape[1]
        if not square:
            return None
        return d @ slope if how == "right slope" else slope @ d


@dataclass(frozen=True)
class Side:
    """The slope of a function in pieces is wrong where z > 0, or where z < 0."""

    piece: int
    members: tuple[int, ...]
    positive: bool
    kind: str = "wrong-derivative"
    cost: float = 3.4
    free: bool = True

    @property
    def steps(self) -> tuple[int, ...]:
        return self.members

    def change(self, at: At) -> Change:
        piece, slope = at.todo.pieces[self.piece], at.replay.derivatives[self.piece][0]
        d = at.adjoint(piece.end)
        z = at.values[piece.start]
        if d is None:
            return None
        side = (z > 0) if self.positive else (z < 0)
        # the kink, not a smooth function: the slope is one number on each side of it
        return {piece.start: d * np.asarray(slope) * side} if side.any() else {piece.start: 0 * d}

    def sentence(self, say: Say, factor: str | None) -> str:
        side = "positive" if self.positive else "negative"
        how = "is left out" if factor in ("0", None) else f"is {factor} times what it should be"
        return f"In {say.at(self.members[-1])} the derivative where the input is {side} {how}"


@dataclass(frozen=True)
class Swapped:
    """A function of two slopes with the slopes exchanged."""

    piece: int
    members: tuple[int, ...]
    kind: str = "wrong-derivative"
    cost: float = 2.4
    free: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        return self.members

    def change(self, at: At) -> Change:
        piece, slope = at.todo.pieces[self.piece], np.asarray(at.replay.derivatives[self.piece][0])
        d, kinds = at.adjoint(piece.end), np.unique(slope)
        if d is None or len(kinds) > 2:
            return None
        return {piece.start: d * (kinds.sum() - slope - slope if len(kinds) == 2 else 0 * slope)}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        where = say.at(self.members[-1])
        return f"In {where} the condition is the wrong way round: each slope stands where the other belongs"


def found(at: At) -> Iterator[Mistake]:
    for number, piece in enumerate(at.todo.pieces):
        if not piece.elementwise or at.adjoint(piece.end) is None or len(piece.members) > 4:
            continue
        extra = 0.1 * len(piece.members) + (0.0 if at.program.avals[piece.start].ndim else 2.0)
        rows = [
            ("ignored", "missing-factor", 3.2),
            ("function", "wrong-argument", 3.6),
            ("slope", "wrong-argument", 3.4),
        ]
        slope = np.asarray(at.replay.derivatives[number][0])
        kinds = np.unique(slope)
        if len(kinds) <= 2:
            rows += [("sign", "wrong-argument", 2.8), ("guided", "extra-derivative", 3.2)]
        name = at.program.steps[max(piece.members)].name
        if len(piece.members) == 1 and name in ("gelu", "silu", "swish", "hard_swish", "hard_silu", "mish"):
            rows += [("gate", "missing-term", 1.2), ("other term", "missing-term", 1.6)]
        if slope.ndim == 2:
            sides = ("right matrix", "left matrix", "right sigmoid", "left sigmoid", "right slope", "left slope")
            rows += [(side, "wrong-derivative", 3.0) for side in sides]
        for how, kind, cost in rows:
            yield Adjoint(number, piece.members, how, kind, cost + extra)
        if len(kinds) == 2:
            yield Swapped(number, piece.members, cost=2.4 + extra)
        z = at.values[piece.start]
        if np.any(z > 0) and np.any(z < 0) and _kinked(slope, z):
            yield Side(number, piece.members, True, cost=3.4 + extra)
            yield Side(number, piece.members, False, cost=3.4 + extra)


def _kinked(slope: Array, z: Array) -> bool:
    """Whether the slope is one number on one side of zero at least, and another on the other."""
    if slope.shape != z.shape:
        return False
    right, left = slope[z > 0], slope[z < 0]
    flat = [np.ptp(side) <= 1e-12 * np.max(np.abs(side)) for side in (right, left)]
    return any(flat) and not np.allclose(right.mean(), left.mean())
