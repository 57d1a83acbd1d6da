"""The catalogue of single faults: for each, by how much it changes the gradient.

Every fault is one way to do one step of the chain rule wrong. `catalogue` lists them for a program, `change`
says what one does to an adjoint at a point, and `changes` gives the matrix [fault, direction] of J_vᵀ Δ (see
`replay`), in the order of the catalogue.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.check.faults import algebra, chains, jacobians, partners, selections
from jaxgrad.check.faults.mistake import Array, At, Mistake
from jaxgrad.check.program.replay import Piece, Plan, Product, Replay, partner
from jaxgrad.check.program.steps import NAMED, Program

MODULES = (selections, partners, jacobians, algebra, chains)
"""Where the mistakes are that are classes of their own."""


def rarer(at: At) -> tuple[Mistake, ...]:
    """The mistakes that are classes of their own, the least far-fetched first."""
    every = (m for module in MODULES for m in module.found(at))
    return tuple(sorted(every, key=lambda m: m.cost))


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


PASSED = -2
"""The label of a product fault that passes the adjoint on as it is."""


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
    found: list[Fault] = []
    for number, piece in enumerate(todo.pieces):
        found += _elementwise(program, number, piece) if piece.elementwise else _mixing(number, piece)
    for number, product in enumerate(todo.products):
        found += _of_product(program, number, product)
    return (*found, *_extra(program))


def changes(program: Program, todo: Plan, faults: Sequence[Fault], at: Replay) -> Array:
    """[fault, direction]: what each fault adds to the gradient at one point."""
    by_slot: dict[int, list[tuple[int, Any]]] = {}
    with np.errstate(all="ignore"):
        for m, fault in enumerate(faults):
            slot, delta = change(program, todo, fault, at)
            by_slot.setdefault(slot, []).append((m, delta))
    out = np.zeros((len(faults), _width(program, at)))
    with np.errstate(all="ignore"):
        for slot, entries in by_slot.items():
            if slot not in at.tangents:
                continue  # a counter: nothing of the gradient goes through it
            tangents = _wide(at.tangents[slot])
            flat = tangents.reshape(tangents.shape[0], -1)
            stack = np.stack([np.broadcast_to(d, tangents.shape[1:]).reshape(-1) for _, d in entries])
            out[[m for m, _ in entries]] = np.real(_wide(stack) @ flat.T)
    return out


def change(program: Program, todo: Plan, fault: Fault, at: Replay) -> tuple[int, Any]:
    """The value whose adjoint a fault alters, and by how much."""
    if fault.piece >= 0:
        piece = todo.pieces[fault.piece]
        if piece.end not in at.adjoints:
            return piece.start, np.zeros(())
        adjoint = at.adjoints[piece.end]
        if piece.elementwise:
            return piece.start, adjoint * (_slope(fault, piece, at) - at.derivatives[fault.piece][0])
        back, diagonal = at.derivatives[fault.piece]
        a = at.values[piece.end]
        how = {"identity": 1.0, "diagonal": diagonal, "times output": a, "sigmoid": a * (1 - a)}[fault.detail[0]]
        return piece.start, adjoint * how - back
    if fault.product >= 0:
        product = todo.products[fault.product]
        step = program.steps[product.step]
        slot, key = step.inputs[product.operand], (product.step, product.operand)
        if key not in at.contributions or step.outputs[0] not in at.adjoints:
            return slot, np.zeros(())
        sent = at.adjoints[step.outputs[0]] if fault.label == PASSED else at.alternatives[fault.product][fault.label]
        return slot, sent - at.contributions[key]
    outputs = program.steps[fault.members[-1]].outputs
    slot = next((o for o in outputs if o in program.moving), outputs[0])  # a loop's first output is its counter
    if slot not in at.adjoints:
        return slot, np.zeros(())
    return slot, at.adjoints[slot] * extra_factor(at, slot, fault)


def terms(program: Program) -> tuple[Term, ...]:
    """Every (step, value) through which the gradient flows; a value that a step takes twice counts once."""
    return tuple(
        Term(k, i)
        for k, step in enumerate(program.steps)
        for i, s in enumerate(step.inputs)
        if s in program.moving and s not in step.inputs[:i]
    )


def sent(program: Program, at: Replay, term: Term) -> Any:
    """What a step contributes to the adjoint of a value; None if nothing flows there."""
    step = program.steps[term.step]
    slot = step.inputs[term.operand]
    parts = [at.contributions.get((term.step, i)) for i, s in enumerate(step.inputs) if s == slot]
    parts = [p for p in parts if p is not None]
    return sum(parts[1:], parts[0]) if parts else None


def shares(program: Program, at: Replay) -> Array:
    """[term, direction]: what each step's contribution to each value adds to the gradient."""
    rows = []
    for term in terms(program):
        slot = program.steps[term.step].inputs[term.operand]
        delta = sent(program, at, term)
        rows.append(project(at, slot, np.zeros(program.avals[slot].shape) if delta is None else delta))
    return np.stack(rows) if rows else np.zeros((0, _width(program, at)))


def project(at: Replay, slot: int, delta: Any) -> Array:
    """J_vᵀ Δ along the directions (of a complex value, the real part of it: the loss is real)."""
    if slot not in at.tangents:
        return np.zeros(_any_width(at))
    tangents = _wide(at.tangents[slot])
    return np.real(tangents.reshape(tangents.shape[0], -1) @ _wide(delta).reshape(-1))


def _wide(x: Any) -> Array:
    """An array in double precision, real or complex."""
    x = np.asarray(x)
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def _any_width(at: Replay) -> int:
    return next(iter(at.tangents.values())).shape[0]


def _width(program: Program, at: Replay) -> int:
    return at.tangents[program.leaves[0]].shape[0]


_FAMILIES = ({"sigmoid", "tanh", "relu", "softplus"}, {"abs", "square", "relu"}, {"exp", "log"}, {"sin", "cos"})


def implausibility(fault: Fault, program: Program, todo: Plan, at: Replay) -> float:
    """How much more far-fetched a fault is at these values than its kind: nobody takes log(1 - p) for a relu."""
    if fault.piece >= 0 and fault.detail[0] == "identity":
        piece = todo.pieces[fault.piece]
        families = jacobians.family_of(at.values[piece.start], at.values[piece.end])
        # A log-softmax does pass the adjoint on, and something more: that is for `jacobians` to say.
        return 9.0 if any(name == "log_softmax" for name, _ in families) else 0.0
    if fault.detail and fault.detail[0] == "mask":
        # Other numbers than 0 and 1, or than 1 and -1, are no mask.
        kinds = set(np.unique(at.values[fault.detail[1]]))
        return 0.0 if kinds <= {0.0, 1.0} or kinds == {-1.0, 1.0} else 9.0
    if fault.piece < 0 or not todo.pieces[fault.piece].elementwise or fault.kind == "missing-derivative":
        return 0.0
    piece = todo.pieces[fault.piece]
    with np.errstate(all="ignore"):
        new = local_change(todo, at, fault) + at.derivatives[fault.piece][0]
    if np.all(np.isfinite(new)) and new.size > 1 and np.ptp(new) <= 1e-12 * np.max(np.abs(new), initial=0.0):
        return 6.0  # a constant: another fault says the same more simply
    known = known_function(piece, at)
    name = program.steps[max(fault.members)].name
    extra = 0.0
    if known is None and len(fault.members) > 1:
        # the derivative of another function for that of a whole chain: some step of it was left out
        extra += 9.0 if fault.kind == "wrong-derivative" and fault.detail[0] in _BY_NAME else 1.2
    if fault.kind == "wrong-derivative" and any(fault.detail[0] == k.name for k in KNOWN):
        mine = known.name if known is not None else name
        mine = "relu" if len(fault.members) == 1 and mine in NAMED else mine
        family = any(mine in f and fault.detail[0] in f for f in _FAMILIES)
        extra += 0.0 if family else 2.0
        extra += 1.0 if mine == "sigmoid" and fault.detail[0] == "softplus" else 0.0  # that is a itself
    if fault.kind == "wrong-argument" and known is not None:
        # Nobody takes 2 z at z^2: a function has to have a derivative that is written with its output.
        extra += 0.0 if known.from_output is not None and known.name not in ("exp", "sqrt") else 2.5
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


def _of_product(program: Program, number: int, product: Product) -> list[Fault]:
    """A product's other factor left out, not transposed, or replaced by another value."""
    step = program.steps[product.step]
    costs = {
        "ones": ("missing-factor", 3.0),
        "transposed": ("transposed", 3.0),
        "adjoint": ("transposed", 3.1),
        "flipped": ("transposed", 3.2),
        "value": ("wrong-value", 4.0),
        "value^T": ("wrong-value", 4.2),
        "rolled": ("wrong-value", 5.0),
    }
    found = []
    for index, (label, other) in enumerate(product.labels):
        kind, cost = costs[label]
        cost += 0.3 if other in program.leaves and step.inputs[product.partner] not in program.leaves else 0.0
        detail = (label, other, product.operand)
        found.append(Fault(kind, cost, (product.step,), detail, -1, number, index))
    same = program.avals[step.outputs[0]].shape == program.avals[step.inputs[product.operand]].shape
    if same and step.primitive != "mul":
        detail = ("passed", -1, product.operand)
        found.append(Fault("missing-factor", 3.1, (product.step,), detail, -1, number, PASSED))
    return found


def _elementwise(program: Program, number: int, piece: Piece) -> list[Fault]:
    """A piece a = F(z): its derivative F'(z) is left out, squared, taken elsewhere, or is another's."""
    base = 0.02 * len(piece.members) + (0.0 if len(piece.members) == 1 else 0.05)
    base += 0.0 if program.avals[piece.start].ndim else 1.5
    rows: list[tuple[str, float, tuple[Any, ...], int]] = [
        ("missing-derivative", 0.0, ("one",), -1),
        ("extra-derivative", 1.5, ("twice",), -1),
    ]
    for index, other in enumerate(piece.others):
        if other == piece.end:
            rows.append(("wrong-argument", 1.0, ("output",), index))
        else:
            rows.append(("wrong-value", 4.0, ("slope", other), index))
    for k in KNOWN:
        rows.append(("wrong-derivative", 2.2, (k.name, k.text, "input"), -1))
        if k.from_output is not None and k.name in ("sigmoid", "tanh", "relu", "sqrt"):
            rows.append(("wrong-derivative", 2.3, (k.name, k.text, "output"), -1))
            if k.name != "relu":
                # a (1 - a) with another value where the output belongs: right only if F is this function
                rows.append(("wrong-value", 2.0, ("formula", piece.start, k.name), -1))
                rows += [
                    ("wrong-value", 4.2, ("formula", other, k.name), -1)
                    for other in piece.others[:6]
                    if other != piece.end
                ]
    # softplus'(z) = sigmoid(z), and then tanh(z) for it
    rows += [("wrong-derivative", 3.3, ("value", k.name), -1) for k in KNOWN[:2]]
    rows += [
        ("wrong-derivative", 2.6, ("itself",), -1),
        ("wrong-derivative", 2.8, ("argument",), -1),
        ("missing-factor", 2.5, ("half", "1 - a"), -1),
        ("wrong-derivative", 2.9, ("magnitude",), -1),
        ("wrong-derivative", 3.0, ("inverse",), -1),
        ("wrong-derivative", 3.2, ("other side",), -1),
    ]
    rows += [("wrong-derivative", 3.1, ("slip", text), -1) for text in SLIPS]
    return [Fault(kind, base + cost, piece.members, how, number, -1, label) for kind, cost, how, label in rows]


SLIPS: dict[str, Callable[[Any, Any], Any]] = {
    "1 + a^2": lambda z, a: 1 + a**2,
    "a (1 + a)": lambda z, a: a * (1 + a),
    "1 - 2 a": lambda z, a: 1 - 2 * a,
    "a^2": lambda z, a: a**2,
    "1/z^2": lambda z, a: 1 / z**2,
}
"""Slips of algebra, as functions of the input and the output."""

_BY_NAME = {k.name: k for k in KNOWN}


def _slope(fault: Fault, piece: Piece, at: Replay) -> Any:
    """The local derivative D' that a fault in an elementwise piece uses."""
    slope, z, a = at.derivatives[fault.piece][0], at.values[piece.start], at.values[piece.end]
    how = fault.detail[0]
    if how in ("output", "slope"):
        return at.derivatives[fault.piece][1][fault.label]
    if how == "formula":
        from_output = _BY_NAME[fault.detail[2]].from_output
        assert from_output is not None
        return from_output(at.values[fault.detail[1]])
    if how == "value":
        return _BY_NAME[fault.detail[1]].value(z)
    if how == "slip":
        return SLIPS[fault.detail[1]](z, a)
    if how == "other side":
        return 1 - slope if set(np.unique(slope)) <= {0.0, 1.0} else slope
    plain = {
        "one": lambda: np.ones_like(slope),
        "twice": lambda: slope**2,
        "itself": lambda: a,
        "argument": lambda: z,
        "half": lambda: 1 - a,
        "magnitude": lambda: np.abs(slope),
        "inverse": lambda: 1 / slope,
    }
    if how in plain:
        return plain[how]()
    known = _BY_NAME[how]
    if fault.detail[2] == "input":
        return known.slope(z)
    assert known.from_output is not None
    return known.from_output(a)


def _mixing(number: int, piece: Piece) -> list[Fault]:
    """A piece such as softmax, where each output depends on several inputs: treated entry by entry."""
    base = 0.6 + 0.02 * len(piece.members)
    rows = (
        ("missing-derivative", 0.5, "identity"),
        ("wrong-derivative", 1.0, "diagonal"),
        ("wrong-derivative", 2.0, "times output"),
        ("wrong-derivative", 2.2, "sigmoid"),
    )
    return [Fault(kind, base + cost, piece.members, (how,), number, -1, -3) for kind, cost, how in rows]


def _extra(program: Program) -> list[Fault]:
    """A derivative where none belongs, or a mask: the adjoint of a value times something."""
    makers: Mapping[int, int] = {o: k for k, step in enumerate(program.steps) for o in step.outputs}
    fixed: dict[tuple[int, ...], list[int]] = {}
    for slot in sorted(program.varying - program.moving):
        aval = program.avals[slot]
        if getattr(aval, "ndim", 0) > 0 and np.dtype(aval.dtype).kind == "f":
            fixed.setdefault(tuple(aval.shape), []).append(slot)
    near: dict[tuple[int, ...], list[int]] = {}
    for slot in sorted(program.moving):
        if np.dtype(program.avals[slot].dtype).kind != "c":
            near.setdefault(tuple(program.avals[slot].shape), []).append(slot)
    found: list[Fault] = []
    for slot in sorted(program.moving):
        real = np.dtype(program.avals[slot].dtype).kind != "c"
        if slot not in makers or program.avals[slot].ndim == 0 or not real:
            continue
        shape = tuple(program.avals[slot].shape)
        rows: list[tuple[str, float, tuple[Any, ...]]] = []
        for known in KNOWN[:3]:
            rows.append(("extra-derivative", 3.4, ("function", known.name, known.text)))
            if known.name != "relu":
                rows.append(("extra-derivative", 3.5, ("output", known.name, known.text)))
        rows.append(("extra-derivative", 4.5, ("value", "", "")))
        for other in near[shape][:8]:
            if other > slot:
                rows.append(("extra-derivative", 3.8, ("other", "sigmoid", "a (1 - a)", other)))
                rows.append(("extra-derivative", 3.9, ("log", "sigmoid", "a (1 - a)", other)))
        rows += [("missing-term", 5.0, ("mask", other)) for other in fixed.get(shape, [])[:4]]
        found += [Fault(kind, cost, (makers[slot],), how) for kind, cost, how in rows]
    return found


def local_change(todo: Plan, at: Replay, fault: Fault) -> Array:
    """What a fault in an elementwise piece adds to its local derivative: D' − D."""
    with np.errstate(all="ignore"):
        return np.asarray(_slope(fault, todo.pieces[fault.piece], at) - at.derivatives[fault.piece][0])


def extra_factor(at: Replay, slot: int, fault: Fault) -> Any:
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


def stand_in(product: Product, label: int, values: Mapping[int, Any], program: Program) -> Any:
    """The value that a product fault puts in the partner's place."""
    return partner(product, product.labels[label], values, program.steps[product.step].inputs[product.partner])
