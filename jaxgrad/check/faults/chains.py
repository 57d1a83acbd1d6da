"""Elementwise steps a = F(z): what is done to the incoming adjoint, and slopes that are wrong on one side only."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxgrad.check.faults.mistake import Array, At, Change, Mistake, OfMembers, OfStep, Say
from jaxgrad.check.program.replay import Piece, run_piece


@dataclass(frozen=True)
class Adjoint(OfMembers):
    """The incoming adjoint is ignored, or goes through a function that belongs to the value."""

    piece: int
    members: tuple[int, ...]
    how: str
    kind: str
    cost: float
    free: bool = False

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
            function = lambda x: run_piece(at.program, piece, at.values, x)
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
class Side(OfMembers):
    """The slope of a function in pieces is wrong where z > 0, or where z < 0."""

    piece: int
    members: tuple[int, ...]
    positive: bool
    kind: str = "wrong-derivative"
    cost: float = 3.4
    free: bool = True

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
class Swapped(OfMembers):
    """A function of two slopes with the slopes exchanged."""

    piece: int
    members: tuple[int, ...]
    kind: str = "wrong-derivative"
    cost: float = 2.4
    free: bool = False

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


@dataclass(frozen=True)
class Chain(OfMembers):
    """A run of steps that multiply or divide by values of the data: the adjoint went through it unchanged."""

    start: int
    end: int
    members: tuple[int, ...]
    kind: str = "missing-factor"
    cost: float = 1.0
    free: bool = False

    def change(self, at: At) -> Change:
        d, sent = at.adjoint(self.end), at.contribution(self.members[0], _moving_operand(at, self.members[0]))
        return None if d is None or sent is None or d.shape != sent.shape else {self.start: d - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return (
            f"In {say.at(self.members[-1])} every factor is left out: going back to `{say.name(self.start)}`, the "
            "adjoint must be multiplied by what multiplies it there, and you passed it on unchanged"
        )


@dataclass(frozen=True)
class Skipped:
    """One step of an elementwise chain is left out, in the values behind it and on the way back: a mask, a clip."""

    piece: int
    members: tuple[int, ...]
    skipped: int
    kind: str
    cost: float = 1.1
    free: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.skipped,)

    def change(self, at: At) -> Change:
        piece, slope = at.todo.pieces[self.piece], np.asarray(at.replay.derivatives[self.piece][0])
        d = at.adjoint(piece.end)
        if d is None:
            return None
        moving = at.program.steps[self.skipped].inputs[_moving_operand(at, self.skipped)]

        def without(x: Any) -> Any:
            local = {**at.values, piece.start: x}
            for k in piece.members:
                step = at.program.steps[k]
                made = [local[moving]] if k == self.skipped else step.call(*[local[s] for s in step.inputs])
                local.update(zip(step.outputs, made, strict=True))
            return local[piece.end]

        start = at.values[piece.start]
        with np.errstate(all="ignore"):
            out, back = jax.vjp(without, start)
            new = np.asarray(back(np.ones_like(out))[0])
        return None if new.shape != d.shape else {piece.start: d * (new - slope)}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        if self.kind == "missing-factor":
            other = say.operand(self.skipped, 1)
            return (
                f"In {say.at(self.skipped)} a factor is left out, in the value that the derivative is taken at and on "
                f"the way back: you differentiated as if `{say.operand(self.skipped, 0)}` and `{other}` were not "
                "multiplied"
            )
        return (
            f"In {say.at(self.skipped)} the step is left out, in the value that the derivative is taken at and on the "
            "way back: you differentiated as if it were not there"
        )


SLOPES: dict[str, dict[str, Callable[[Any], Any]]] = {
    "lgamma": {"log(z)": np.log, "1/z": lambda z: 1 / z, "log(z) - 1/(2 z)": lambda z: np.log(z) - 0.5 / z},
    "erf": {"exp(-z^2)": lambda z: np.exp(-(z**2)), "exp(-z^2 / 2)": lambda z: np.exp(-(z**2) / 2)},
    "atan": {"1/(1 + z)": lambda z: 1 / (1 + z), "1/sqrt(1 + z^2)": lambda z: 1 / np.sqrt(1 + z**2)},
    "asin": {"1/sqrt(1 + z^2)": lambda z: 1 / np.sqrt(1 + z**2), "1/(1 - z^2)": lambda z: 1 / (1 - z**2)},
    "tan": {"1/cos(z)": lambda z: 1 / np.cos(z), "1 - tan(z)^2": lambda z: 1 - np.tan(z) ** 2},
    "cosh": {"-sinh(z)": lambda z: -np.sinh(z), "cosh(z)": np.cosh},
    "sinh": {"-cosh(z)": lambda z: -np.cosh(z), "sinh(z)": np.sinh},
    "log1p": {"1/z": lambda z: 1 / z},
    "rsqrt": {"1/(2 sqrt(z))": lambda z: 0.5 / np.sqrt(z), "-1/2 z^(-1/2)": lambda z: -0.5 / np.sqrt(z)},
}
"""By primitive: what people take for the derivative."""


@dataclass(frozen=True)
class Slope(OfStep):
    """The derivative of a function that has few users, by a formula that people take for it."""

    step: int
    text: str
    kind: str = "wrong-derivative"
    cost: float = 1.2
    free: bool = False

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        d, sent = at.out(self.step), at.contribution(self.step, 0)
        if d is None or sent is None:
            return None
        with np.errstate(all="ignore"):
            return {step.inputs[0]: d * SLOPES[step.primitive][self.text](at.values[step.inputs[0]]) - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return f"In {say.at(self.step)} you used {self.text} as the derivative, with z = `{say.operand(self.step, 0)}`"


@dataclass(frozen=True)
class Cumulated(OfStep):
    """A running sum that is run in the same direction on the way back, or left out there."""

    step: int
    turned: bool
    cost: float = 1.0
    free: bool = False

    @property
    def kind(self) -> str:
        return "transposed" if self.turned else "missing-derivative"

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        d, sent = at.out(self.step), at.contribution(self.step, 0)
        if d is None or sent is None:
            return None
        new = np.asarray(step.call(jax.numpy.asarray(d))[0]) if self.turned else d
        return {step.inputs[0]: new - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        what = (
            "runs in the same direction on the way back: it must run from the other end"
            if self.turned
            else "is left out on the way back: every entry gets the sum of the adjoints of all that come after it"
        )
        return f"In {say.at(self.step)} the running sum {what}"


@dataclass(frozen=True)
class Bypass(OfMembers):
    """The derivative of a function is left out for one of the ways back to it, and is there for the others."""

    start: int
    end: int
    members: tuple[int, ...]
    edges: tuple[tuple[int, int], ...]
    """The steps, each with its operand, that send back past the function."""
    kind: str = "missing-derivative"
    cost: float = 1.7
    free: bool = False

    def change(self, at: At) -> Change:
        sent = [at.contribution(k, i) for k, i in self.edges]
        if any(s is None for s in sent):
            return None
        past = np.sum([s for s in sent if s is not None], axis=0)
        piece = Piece(self.start, self.end, self.members, False, ())
        back = jax.vjp(lambda x: run_piece(at.program, piece, at.values, x), at.values[self.start])[1]
        return {self.start: past - np.asarray(back(jax.numpy.asarray(past, at.values[self.end].dtype))[0])}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return (
            f"In {say.at(self.members[-1])} the derivative is missing for what comes back from "
            f"{say.at(self.edges[0][0])}: that is added to the adjoint of `{say.name(self.start)}` unchanged, and the "
            "rest goes through the derivative as it must"
        )


def _bypasses(at: At) -> Iterator[Bypass]:
    """Functions of one step, or regions that mix entries, whose value is used in several statements."""
    for piece in at.todo.pieces:
        single = len(piece.members) == 1 or not piece.elementwise
        if not single or at.adjoint(piece.end) is None or not at.shape(piece.end):
            continue
        by_line: dict[Any, list[tuple[int, int]]] = {}
        for k, i in at.users.get(piece.end, ()):
            frames = at.program.steps[k].frames
            if at.contribution(k, i) is not None and frames:
                by_line.setdefault((frames[0].file, frames[0].line), []).append((k, i))
        for edges in by_line.values() if len(by_line) > 1 else ():
            yield Bypass(piece.start, piece.end, piece.members, tuple(edges))


def _of_steps(at: At) -> Iterator[Mistake]:
    for k, step in enumerate(at.program.steps):
        if len(step.outputs) != 1 or not step.inputs or step.inputs[0] not in at.program.moving:
            continue
        for text in SLOPES.get(step.primitive, ()):
            yield Slope(k, text)
        if step.primitive == "cumsum":
            yield Cumulated(k, True)
            yield Cumulated(k, False)


def _moving_operand(at: At, k: int) -> int:
    return next(i for i, s in enumerate(at.program.steps[k].inputs) if s in at.program.moving)


def _sole_operand(at: At, k: int) -> bool:
    """Whether a step has one operand that depends on the parameters, as large as what it makes."""
    step = at.program.steps[k]
    moving = [s for s in step.inputs if s in at.program.moving]
    return len(moving) == 1 and len(step.outputs) == 1 and at.shape(moving[0]) == at.shape(step.outputs[0])


def _runs(at: At) -> Iterator[Chain]:
    """Every longest run of two steps or more that multiply or divide one value, which nothing else uses."""
    taken: set[int] = set()
    for k, step in enumerate(at.program.steps):
        members: list[int] = []
        while k not in taken and step.primitive in ("mul", "div", "neg") and _sole_operand(at, k):
            if step.primitive == "div" and _moving_operand(at, k) == 1:
                break
            members.append(k)
            users = at.users.get(step.outputs[0], ())
            if len(users) != 1:
                break
            k = users[0][0]
            step = at.program.steps[k]
        taken |= set(members)
        if len(members) > 1 and any(_by_data(at, m) for m in members):
            start = at.program.steps[members[0]].inputs[_moving_operand(at, members[0])]
            end = at.program.steps[members[-1]].outputs[0]
            if len(at.shape(end)):
                yield Chain(start, end, tuple(members))


def _by_data(at: At, k: int) -> bool:
    """Whether a step multiplies or divides by something of the data."""
    return any(s in at.program.varying and s not in at.program.moving for s in at.program.steps[k].inputs)


def _skips(at: At, number: int, piece: Piece) -> Iterator[Skipped]:
    """Each step of a piece that may be left out, but for the last: that is a derivative left out."""
    for k in piece.members:
        step = at.program.steps[k]
        if piece.end in step.outputs or not _sole_operand(at, k):
            continue
        price = 1.1 + 0.02 * len(piece.members)
        if step.primitive in ("mul", "div"):
            if _by_data(at, k) and not (step.primitive == "div" and _moving_operand(at, k) == 1):
                yield Skipped(number, piece.members, k, "missing-factor", price)
        elif step.primitive in ("max", "min", "select_n", "clamp") or step.name == "relu":
            yield Skipped(number, piece.members, k, "missing-derivative", price)


def found(at: At) -> Iterator[Mistake]:
    yield from _runs(at)
    yield from _of_steps(at)
    yield from _bypasses(at)
    for number, piece in enumerate(at.todo.pieces):
        if not piece.elementwise or at.adjoint(piece.end) is None:
            continue
        yield from _skips(at, number, piece)
        if len(piece.members) > 4:
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
