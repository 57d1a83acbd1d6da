"""The catalogue of single faults: for each, by how much it changes the gradient.

Every fault is one way to do one step of the chain rule wrong. `catalogue` lists them for a program, and
`changes` gives the matrix [fault, direction] of J_vᵀ Δ (see `replay`) at one point, in the same order.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.check.replay import Piece, Plan, Replay, partner
from jaxgrad.check.steps import Program


class Fault(NamedTuple):
    """One way to do one step wrong."""

    kind: str
    cost: float
    """How far-fetched: the smallest that explains the numbers is reported."""
    members: tuple[int, ...]
    """The steps it is about; the last one makes the value."""
    detail: tuple[Any, ...]
    """What the sentence needs to know."""
    piece: int = -1
    product: int = -1
    label: int = -1


class Term(NamedTuple):
    """What one step sends to one operand: it may have been left out, negated or scaled."""

    step: int
    operand: int


def _sigmoid(x: Any) -> Any:
    return 0.5 * (1.0 + np.tanh(0.5 * x))


class Known(NamedTuple):
    """A function that people take for another, with its derivative in terms of its input and its output."""

    name: str
    value: Callable[[Any], Any]
    slope: Callable[[Any], Any]
    from_output: Callable[[Any], Any] | None
    text: str
    """The derivative as people write it, from the output a or the input z."""


KNOWN = (
    Known("sigmoid", _sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z)), lambda a: a * (1 - a), "a (1 - a)"),
    Known("tanh", np.tanh, lambda z: 1 - np.tanh(z) ** 2, lambda a: 1 - a**2, "1 - a^2"),
    Known("relu", lambda z: np.maximum(z, 0), lambda z: 1.0 * (z > 0), lambda a: 1.0 * (a > 0), "1 where z > 0"),
    Known("softplus", lambda z: np.logaddexp(0, z), _sigmoid, lambda a: 1 - np.exp(-a), "sigmoid(z)"),
    Known("exp", np.exp, np.exp, lambda a: a, "exp(z)"),
    Known("log", np.log, lambda z: 1 / z, None, "1/z"),
    Known("sin", np.sin, np.cos, None, "cos(z)"),
    Known("cos", np.cos, lambda z: -np.sin(z), None, "-sin(z)"),
    Known("square", np.square, lambda z: 2 * z, None, "2 z"),
    Known("abs", np.abs, np.sign, None, "sign(z)"),
    Known("sqrt", np.sqrt, lambda z: 0.5 / np.sqrt(z), lambda a: 0.5 / a, "1/(2 sqrt(z))"),
)


def catalogue(program: Program, todo: Plan) -> tuple[Fault, ...]:
    """Every single fault of a program, in the order of `changes`."""
    return tuple(fault for fault, _ in _walk(program, todo, None))


def changes(program: Program, todo: Plan, at: Replay) -> np.ndarray:
    """[fault, direction]: what each fault adds to the gradient at one point."""
    rows: list[np.ndarray] = []
    with np.errstate(all="ignore"):
        for _, make in _walk(program, todo, at):
            slot, delta = make()
            rows.append(project(at, slot, delta))
    return np.stack(rows) if rows else np.zeros((0, _width(program, at)))


def terms(program: Program) -> tuple[Term, ...]:
    """Every (step, operand) through which the gradient flows."""
    return tuple(
        Term(k, i)
        for k, step in enumerate(program.steps)
        for i, s in enumerate(step.inputs)
        if s in program.moving
    )


def shares(program: Program, at: Replay) -> np.ndarray:
    """[term, direction]: what each step's contribution to each operand adds to the gradient."""
    rows = []
    for term in terms(program):
        slot = program.steps[term.step].inputs[term.operand]
        delta = at.contributions.get((term.step, term.operand))
        rows.append(project(at, slot, np.zeros(program.avals[slot].shape) if delta is None else delta))
    return np.stack(rows) if rows else np.zeros((0, _width(program, at)))


def project(at: Replay, slot: int, delta: Any) -> np.ndarray:
    """J_vᵀ Δ along the directions."""
    tangents = np.asarray(at.tangents[slot], dtype=np.float64)
    return tangents.reshape(tangents.shape[0], -1) @ np.asarray(delta, dtype=np.float64).reshape(-1)


def _width(program: Program, at: Replay) -> int:
    return at.tangents[program.leaves[0]].shape[0]


_FAMILIES = ({"sigmoid", "tanh", "relu", "softplus"}, {"abs", "square", "relu"}, {"exp", "log"}, {"sin", "cos"})


def implausibility(fault: Fault, program: Program, todo: Plan, at: Replay) -> float:
    """How much more far-fetched a fault is at these values than its kind: nobody takes log(1 - p) for a relu."""
    if fault.piece < 0 or not todo.pieces[fault.piece].elementwise or fault.kind == "missing-derivative":
        return 0.0
    piece = todo.pieces[fault.piece]
    with np.errstate(all="ignore"):
        new = np.asarray(local_change(program, todo, at, fault)) + at.derivatives[fault.piece][0]
    if np.all(np.isfinite(new)) and new.size > 1 and np.ptp(new) <= 1e-12 * np.max(np.abs(new), initial=0.0):
        return 6.0  # a constant: another fault says the same more simply
    known = known_function(piece, at)
    extra = 0.0
    if known is None and len(fault.members) > 1:
        extra += 1.2
    if fault.kind == "wrong-derivative" and any(fault.detail[0] == k.name for k in KNOWN):
        mine = known.name if known is not None else ""
        family = any(mine in f and fault.detail[0] in f for f in _FAMILIES)
        extra += 0.0 if family else 2.0
        extra += 1.0 if mine == "sigmoid" and fault.detail[0] == "softplus" else 0.0  # that is a itself
    if fault.kind in ("wrong-value", "missing-factor") and fault.detail[0] in ("formula", "half"):
        extra += 0.0 if known is not None and known.name in ("sigmoid", "tanh") else 2.0
    return extra


def known_function(piece: Piece, at: Replay) -> Known | None:
    """The function of `KNOWN` that a piece computes, judged by its values."""
    z, a = at.values[piece.start], at.values[piece.end]
    with np.errstate(all="ignore"):
        for known in KNOWN:
            value = known.value(z)
            if value.shape == a.shape and np.allclose(value, a, rtol=1e-9, atol=1e-12) and np.ptp(z) > 0:
                return known
    return None


Make = Callable[[], tuple[int, Any]]


def _walk(program: Program, todo: Plan, at: Replay | None):
    """All faults with, at a point, a function that gives the slot and the change of its adjoint."""
    for number, piece in enumerate(todo.pieces):
        yield from (_elementwise if piece.elementwise else _mixing)(program, number, piece, at)
    for number, product in enumerate(todo.products):
        step = program.steps[product.step]
        slot = step.inputs[product.operand]

        def replaced(number=number, index=0, slot=slot, key=(product.step, product.operand)) -> tuple[int, Any]:
            assert at is not None
            stack = at.alternatives[number]
            if len(stack) <= index or key not in at.contributions:
                return slot, np.zeros(program.avals[slot].shape)
            return slot, stack[index] - at.contributions[key]

        for index, (label, other) in enumerate(product.labels):
            kind, cost = {
                "ones": ("missing-factor", 3.0),
                "transposed": ("transposed", 3.0),
                "flipped": ("transposed", 3.2),
                "rolled": ("wrong-value", 5.0),
                "value": ("wrong-value", 4.0),
                "value^T": ("wrong-value", 4.2),
                "adjoint": ("transposed", 3.1),
            }[label]
            cost += 0.3 if other in program.leaves and step.inputs[product.partner] not in program.leaves else 0.0
            yield (
                Fault(kind, cost, (product.step,), (label, other, product.operand), -1, number, index),
                lambda r=replaced, i=index: r(index=i),
            )
        out = step.outputs[0]
        same = program.avals[out].shape == program.avals[slot].shape
        if same and step.primitive != "mul":

            def passed(slot=slot, out=out, key=(product.step, product.operand)) -> tuple[int, Any]:
                assert at is not None
                if out not in at.adjoints or key not in at.contributions:
                    return slot, np.zeros(program.avals[slot].shape)
                return slot, at.adjoints[out] - at.contributions[key]

            detail = ("passed", -1, product.operand)
            yield Fault("missing-factor", 3.1, (product.step,), detail, -1, number, -2), passed
    yield from _extra(program, at)


def _elementwise(program: Program, number: int, piece: Piece, at: Replay | None):
    """A piece a = F(z): its derivative F'(z) is left out, squared, taken elsewhere, or is another's."""
    size = 0.02 * len(piece.members)
    natural = 0.0 if len(piece.members) == 1 else 0.05
    base = size + natural + (0.0 if program.avals[piece.start].ndim else 1.5)

    def change(new: Callable[[], Any]) -> Make:
        def make() -> tuple[int, Any]:
            assert at is not None
            if piece.end not in at.adjoints:
                return piece.start, np.zeros(program.avals[piece.start].shape)
            slope = at.derivatives[number][0]
            return piece.start, at.adjoints[piece.end] * (new() - slope)

        return make

    def slope() -> Any:
        assert at is not None
        return at.derivatives[number][0]

    def z() -> Any:
        assert at is not None
        return at.values[piece.start]

    def a() -> Any:
        assert at is not None
        return at.values[piece.end]

    def fault(kind: str, cost: float, *detail: Any, label: int = -1) -> Fault:
        return Fault(kind, base + cost, piece.members, detail, number, -1, label)

    yield fault("missing-derivative", 0.0), change(lambda: np.ones_like(slope()))
    yield fault("extra-derivative", 1.5, "twice"), change(lambda: slope() ** 2)
    for index, other in enumerate(piece.others):

        def elsewhere(index=index) -> Any:
            assert at is not None
            return at.derivatives[number][1][index]

        if other == piece.end:
            yield fault("wrong-argument", 1.0, "output", label=index), change(elsewhere)
        else:
            yield fault("wrong-value", 4.0, "slope", other, label=index), change(elsewhere)
    for k in KNOWN:
        yield fault("wrong-derivative", 2.2, k.name, k.text), change(lambda k=k: k.slope(z()))
        if k.from_output is not None and k.name in ("sigmoid", "tanh", "relu", "sqrt"):
            f = k.from_output
            yield fault("wrong-derivative", 2.3, k.name, k.text), change(lambda f=f: f(a()))
            if k.name != "relu":
                # a (1 - a) with another value where the output belongs: right only if F is this function
                yield fault("wrong-value", 2.0, "formula", piece.start, k.name), change(lambda f=f: f(z()))
                for other in piece.others[:6]:
                    if other != piece.end:
                        yield (
                            fault("wrong-value", 4.2, "formula", other, k.name),
                            change(lambda f=f, o=other: f(at.values[o])),  # type: ignore[union-attr]
                        )
    for k in KNOWN[:2]:
        # softplus'(z) = sigmoid(z), and then tanh(z) for it
        yield fault("wrong-derivative", 3.3, "value", k.name), change(lambda k=k: k.value(z()))
    yield fault("wrong-derivative", 2.6, "itself", ""), change(a)
    yield fault("wrong-derivative", 2.8, "input", ""), change(z)
    yield fault("missing-factor", 2.5, "half", "1 - a"), change(lambda: 1 - a())
    yield fault("wrong-derivative", 2.9, "abs", ""), change(lambda: np.abs(slope()))
    yield fault("wrong-derivative", 3.0, "inverse", ""), change(lambda: 1 / slope())
    yield fault("wrong-derivative", 3.1, "slip", "1 + a^2"), change(lambda: 1 + a() ** 2)
    yield fault("wrong-derivative", 3.1, "slip", "a (1 + a)"), change(lambda: a() * (1 + a()))
    yield fault("wrong-derivative", 3.1, "slip", "1 - 2 a"), change(lambda: 1 - 2 * a())
    yield fault("wrong-derivative", 3.1, "slip", "a^2"), change(lambda: a() ** 2)
    yield fault("wrong-derivative", 3.1, "slip", "1/z^2"), change(lambda: 1 / z() ** 2)
    yield fault("wrong-derivative", 3.2, "other side", ""), change(
        lambda: 1 - slope() if set(np.unique(slope())) <= {0.0, 1.0} else slope()
    )


def _mixing(program: Program, number: int, piece: Piece, at: Replay | None):
    """A piece such as softmax, where each output depends on several inputs: treated entry by entry."""
    base = 0.6 + 0.02 * len(piece.members)

    def change(new: Callable[[Any, Any, Any], Any]) -> Make:
        def make() -> tuple[int, Any]:
            assert at is not None
            if piece.end not in at.adjoints:
                return piece.start, np.zeros(program.avals[piece.start].shape)
            back, diagonal = at.derivatives[number]
            return piece.start, new(at.adjoints[piece.end], at.values[piece.end], diagonal) - back

        return make

    def fault(kind: str, cost: float, *detail: Any) -> Fault:
        return Fault(kind, base + cost, piece.members, detail, number, -1, -3)

    yield fault("missing-derivative", 0.5), change(lambda adjoint, a, d: adjoint)
    yield fault("wrong-derivative", 1.0, "diagonal", ""), change(lambda adjoint, a, d: adjoint * d)
    yield fault("wrong-derivative", 2.0, "times output", ""), change(lambda adjoint, a, d: adjoint * a)
    yield fault("wrong-derivative", 2.2, "sigmoid", "a (1 - a)"), change(
        lambda adjoint, a, d: adjoint * a * (1 - a)
    )


def _extra(program: Program, at: Replay | None):
    """A derivative where none belongs, or a mask: the adjoint of a value times something."""
    makers: Mapping[int, int] = {o: k for k, step in enumerate(program.steps) for o in step.outputs}
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for slot in sorted(program.varying - program.moving):
        aval = program.avals[slot]
        if getattr(aval, "ndim", 0) > 0 and np.dtype(aval.dtype).kind == "f":
            by_shape.setdefault(tuple(aval.shape), []).append(slot)
    near: dict[tuple[int, ...], list[int]] = {}
    for slot in sorted(program.moving):
        near.setdefault(tuple(program.avals[slot].shape), []).append(slot)
    for slot in sorted(program.moving):
        if slot not in makers or program.avals[slot].ndim == 0:
            continue
        members = (makers[slot],)

        def change(new: Callable[[Any], Any], slot=slot) -> Make:
            def make() -> tuple[int, Any]:
                assert at is not None
                if slot not in at.adjoints:
                    return slot, np.zeros(program.avals[slot].shape)
                return slot, at.adjoints[slot] * (new(at.values[slot]) - 1)

            return make

        for known in KNOWN:
            if known.name in ("sigmoid", "tanh", "relu"):
                cost = 3.4
                fault = Fault("extra-derivative", cost, members, ("function", known.name, known.text))
                yield fault, change(known.slope)
                if known.name in ("sigmoid", "tanh"):
                    fault = Fault("extra-derivative", cost + 0.1, members, ("output", known.name, known.text))
                    yield fault, change(known.from_output)  # type: ignore[arg-type]
        yield Fault("extra-derivative", 4.5, members, ("value", "", "")), change(lambda v: v)
        for other in near.get(tuple(program.avals[slot].shape), [])[:8]:
            if other > slot:
                fault = Fault("extra-derivative", 3.8, members, ("other", "sigmoid", "a (1 - a)", other))
                yield fault, change(lambda v, o=other: at.values[o] * (1 - at.values[o]))  # type: ignore[union-attr]
                fault = Fault("extra-derivative", 3.9, members, ("log", "sigmoid", "a (1 - a)", other))
                yield fault, change(lambda v, o=other: np.exp(at.values[o]) * (1 - np.exp(at.values[o])))  # type: ignore[union-attr]
        for other in by_shape.get(tuple(program.avals[slot].shape), [])[:4]:
            yield (
                Fault("missing-term", 5.0, members, ("mask", other)),
                change(lambda v, o=other: at.values[o]),  # type: ignore[union-attr]
            )


def local_change(program: Program, todo: Plan, at: Replay, fault: Fault) -> np.ndarray:
    """What a fault in an elementwise piece adds to its local derivative: D' − D."""
    piece = todo.pieces[fault.piece]
    unit = at._replace(adjoints={**at.adjoints, piece.end: np.ones_like(at.values[piece.end])})
    for other, make in _walk(program, todo, unit):
        if other == fault:
            return np.asarray(make()[1])
    raise LookupError(fault)


def extra_factor(at: Replay, slot: int, fault: Fault) -> np.ndarray:
    """What an extra derivative at a value adds to the factor 1 of its adjoint."""
    value = at.values[slot]
    how, name = fault.detail[0], fault.detail[1]
    if how == "mask":
        return at.values[name] - 1
    if how == "value":
        return value - 1
    if how in ("other", "log"):
        other = at.values[fault.detail[3]]
        other = np.exp(other) if how == "log" else other
        return other * (1 - other) - 1
    known = next(k for k in KNOWN if k.name == name)
    if how == "function":
        return known.slope(value) - 1
    assert known.from_output is not None
    return known.from_output(value) - 1


def stand_in(product: Any, label: int, values: Mapping[int, Any], program: Program) -> Any:
    """The value that a product fault puts in the partner's place."""
    return partner(product, product.labels[label], values, program.steps[product.step].inputs[product.partner])
