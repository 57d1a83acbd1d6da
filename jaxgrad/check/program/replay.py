"""Reverse mode by ourselves, one step at a time, so that a fault can be planted at any step.

Let v be a value inside the loss with adjoint v̄ = dL/dv and Jacobian J_v = dv/dθ. Reverse mode is linear in the
adjoints. A fault at one step changes only what that step sends back, say v̄ by Δ, and everything below it is
done right; so the gradient of the faulty derivation is exactly

    g + J_vᵀ Δ.

One forward pass with tangents (all J_v along chosen directions of θ) and one reverse pass (all v̄ and what
each step contributes to each operand) therefore give *every* single-fault gradient by a dot product.
`faulty_gradient` does the replay itself, with any number of faults, for those that sit on one path.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.program.steps import Program, Step

_UNARY = """
abs acos acosh asin asinh atan atanh cbrt ceil cos cosh digamma erf erf_inv erfc exp exp2 expm1 floor
integer_pow lgamma log log1p logistic neg round rsqrt sign sin sinh sqrt square tan tanh copy copy_p
convert_element_type reduce_precision stop_gradient name is_finite not
"""
_BINARY = """
add sub mul div max min pow rem atan2 add_any select_n clamp eq ne lt le gt ge and or xor
"""
ELEMENTWISE = frozenset((_UNARY + _BINARY).split())
BILINEAR = frozenset(["mul", "dot_general", "conv_general_dilated", "div"])


class Piece(NamedTuple):
    """A function `outputs = F(start)` made of several steps, the other values held fixed."""

    start: int
    end: int
    members: tuple[int, ...]
    elementwise: bool
    others: tuple[int, ...]
    """Values of the same shape at which its derivative might have been taken by mistake."""


class Product(NamedTuple):
    """A step that is linear in the operand `partner`, which the derivative by `operand` multiplies with."""

    step: int
    operand: int
    partner: int
    labels: tuple[tuple[str, int], ...]
    """What might have stood in the partner's place: ("ones", _), ("transposed", _), ("value", slot), ..."""


class Plan(NamedTuple):
    """What is to be computed for a program, found from its structure alone."""

    pieces: tuple[Piece, ...]
    products: tuple[Product, ...]


class Replay(NamedTuple):
    """Everything about one point, as numpy arrays keyed by slot or by (step, operand)."""

    values: dict[int, Any]
    adjoints: dict[int, Any]
    contributions: dict[tuple[int, int], Any]
    tangents: dict[int, Any]
    """J_v along K directions: `[K, *shape]`."""
    derivatives: dict[int, tuple[Any, ...]]
    """By piece: its elementwise derivative and that at each of `others`, or for a piece that mixes entries
    what it sends back and the diagonal of its Jacobian."""
    alternatives: dict[int, Any]
    """By product: what the step would contribute with each label in the partner's place."""


def plan(program: Program, n_rows: int | None = None, most: int = 12) -> Plan:
    """Where faults can be planted, up to `most` alternative values a place."""
    floats = [s for s in range(len(program.avals)) if _float(program, s) and program.avals[s].ndim > 0]
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for slot in floats:
        if slot in program.varying:
            by_shape.setdefault(tuple(program.avals[slot].shape), []).append(slot)
    return Plan(_pieces(program, by_shape, most), _products(program, by_shape, n_rows, most))


def analysis(program: Program, todo: Plan) -> Callable[..., Replay]:
    """A compiled function `(leaves, data, directions) -> Replay` of this program."""

    def run(leaves: Sequence[Any], data: Sequence[Any], directions: Sequence[Any]) -> dict[str, Any]:
        values = forward(program, leaves, data)
        adjoints, contributions = _reverse(program, values)
        tangents = _tangents(program, values, directions, adjoints)
        derivatives = {i: _derivatives(program, piece, values, adjoints) for i, piece in enumerate(todo.pieces)}
        alternatives = {i: _alternatives(program, product, values, adjoints) for i, product in enumerate(todo.products)}
        kept = {s: v for s, v in values.items() if s in program.varying and _float(program, s)}
        return {
            "values": kept,
            "adjoints": adjoints,
            "contributions": contributions,
            "tangents": tangents,
            "derivatives": derivatives,
            "alternatives": alternatives,
        }

    compiled = quick_jit(run)

    def widened(array: Any) -> Any:
        """Low precision as float64: NumPy's linear algebra knows no float16 and no bfloat16."""
        return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array

    return lambda leaves, data, directions: Replay(
        **jax.tree.map(widened, jax.device_get(compiled(leaves, data, directions)))
    )


def quick_jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jax.jit` that spends little on optimising: what is compiled here runs a few times on a few rows."""
    return jax.jit(function, compiler_options=_quick_options())


@functools.lru_cache(maxsize=1)
def _quick_options() -> dict[str, Any] | None:
    """The compiler options that this version of XLA knows."""
    for options in (
        {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False},
        {"xla_backend_optimization_level": 0},
    ):
        try:
            jax.jit(lambda x: x, compiler_options=options)(np.zeros(()))
        except Exception:  # an unknown option is an error of the backend's own kind
            continue
        return options
    return None


def forward(program: Program, leaves: Sequence[Any], data: Sequence[Any]) -> dict[int, Any]:
    """Every value of the program."""
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.leaves, leaves, strict=True))
    values.update(zip(program.data, data, strict=True))
    for step in program.steps:
        out = step.call(*[values[s] for s in step.inputs])
        values.update(zip(step.outputs, out, strict=True))
    return values


Fault = Callable[[dict[tuple[int, int], Any], dict[int, Any], dict[int, Any]], None]


def faulty_gradient(
    program: Program,
    values: Mapping[int, Any],
    at_step: Mapping[int, Callable[[Any, dict[int, Any]], Any]],
    at_value: Mapping[int, Callable[[Any], list[tuple[int, Any]]]],
) -> list[Any]:
    """The gradient of a derivation with any number of faulty steps, by a full reverse pass.

    `at_step[k](contributions, outs)` gets what step k sends to its operands and returns what is sent
    instead; `at_value[a](ā)` gets the finished adjoint of a value and returns what is added where.
    """
    adjoints: dict[int, Any] = {program.output: jnp.ones_like(values[program.output])}
    for k in range(len(program.steps) - 1, -1, -1):
        step = program.steps[k]
        for out in step.outputs:
            if out in at_value and out in adjoints:
                for slot, extra in at_value[out](adjoints[out]):
                    adjoints[slot] = adjoints[slot] + extra if slot in adjoints else extra
        sent = pull(program, step, values, adjoints)
        if k in at_step and sent:
            sent = at_step[k](sent, {o: adjoints.get(o) for o in step.outputs})
        for i, extra in sent.items():
            slot = step.inputs[i]
            adjoints[slot] = adjoints[slot] + extra if slot in adjoints else extra
    return [adjoints.get(s, jnp.zeros_like(values[s])) for s in program.leaves]


def varied(
    program: Program, todo: Plan, pieces: Sequence[int], products: Sequence[int]
) -> Callable[[Any, Any, Any, Any], list[Any]]:
    """A compiled function `(values, weights, ratios, partners)` to the gradient of a derivation with many faults.

    `weights[k]` multiplies what step k sends to each operand; `ratios[piece]` is the change D' - D of an
    elementwise piece's derivative; `partners[product]` is what stands in the place of a product's other factor.
    Compiled once, it replays any choice of faults, on one path too.
    """
    ends: dict[int, list[int]] = {}
    for number in pieces:
        ends.setdefault(todo.pieces[number].end, []).append(number)
    at_step: dict[int, list[int]] = {}
    for number in products:
        at_step.setdefault(todo.products[number].step, []).append(number)

    def run(values: Any, weights: Any, ratios: Any, partners: Any) -> list[Any]:
        adjoints: dict[int, Any] = {program.output: jnp.ones_like(values[program.output])}
        for k in range(len(program.steps) - 1, -1, -1):
            step = program.steps[k]
            for out in step.outputs:
                for number in ends.get(out, ()) if out in adjoints else ():
                    start = todo.pieces[number].start
                    extra = adjoints[out] * ratios[number]
                    adjoints[start] = adjoints[start] + extra if start in adjoints else extra
            sent = pull(program, step, values, adjoints)
            for number in at_step.get(k, ()) if sent else ():
                product = todo.products[number]
                adjoint = adjoints[step.outputs[0]]
                sent[product.operand] = pull_product(program, product, values, partners[number], adjoint)
            for i, extra in sent.items():
                slot = step.inputs[i]
                extra = extra * weights[k, i].astype(extra.dtype)
                adjoints[slot] = adjoints[slot] + extra if slot in adjoints else extra
        return [adjoints.get(s, jnp.zeros_like(values[s])) for s in program.leaves]

    return quick_jit(run)


def run_piece(program: Program, piece: Piece, values: Mapping[int, Any], start: Any) -> Any:
    """F(start) of a piece."""
    local = dict(values)
    local[piece.start] = start
    for k in piece.members:
        step = program.steps[k]
        local.update(zip(step.outputs, step.call(*[local[s] for s in step.inputs]), strict=True))
    return local[piece.end]


def is_elementwise(program: Program, step: Step) -> bool:
    """Whether each entry of the output depends on the same entry of each operand (scalars spread)."""
    if len(step.outputs) != 1 or step.primitive in ("scan", "while", "cond"):
        return False
    shape = tuple(program.avals[step.outputs[0]].shape)
    if step.primitive == "broadcast_in_dim":
        return tuple(program.avals[step.inputs[0]].shape) == shape
    if not set(step.inner) <= ELEMENTWISE | {"broadcast_in_dim"}:
        return False
    return all(tuple(program.avals[s].shape) in ((), shape) for s in step.inputs)


def _float(program: Program, slot: int) -> bool:
    dtype = getattr(program.avals[slot], "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.floating)


def _differentiable(
    program: Program, step: Step, values: Mapping[int, Any]
) -> tuple[list[int], list[int], Callable[..., Any], list[Any]]:
    """The moving operands of a step, its floating outputs, and the step as a function of the former."""
    operands = [i for i, s in enumerate(step.inputs) if s in program.moving]
    outs = [j for j, o in enumerate(step.outputs) if o in program.moving]
    arguments = [values[s] for s in step.inputs]

    def function(*moved: Any) -> tuple[Any, ...]:
        full = list(arguments)
        for i, value in zip(operands, moved, strict=True):
            full[i] = value
        result = step.call(*full)
        return tuple(result[j] for j in outs)

    return operands, outs, function, [arguments[i] for i in operands]


def _tangents(
    program: Program,
    values: Mapping[int, Any],
    directions: Sequence[Any],
    adjoints: Mapping[int, Any],
) -> dict[int, Any]:
    """J_v of every value. A maximum whose contributions cancel (softmax minus its largest logit) moves nothing
    in the true gradient, and a derivation by hand leaves it out; so it must not carry a fault either."""
    tangents: dict[int, Any] = dict(zip(program.leaves, directions, strict=True))
    count = directions[0].shape[0]
    for step in program.steps:
        operands, outs, function, moved = _differentiable(program, step, values)
        if not operands or not outs:
            continue
        incoming = []
        for i, value in zip(operands, moved, strict=True):
            zero = jnp.zeros((count, *value.shape), value.dtype)
            incoming.append(tangents.get(step.inputs[i], zero).astype(value.dtype))
        push = _push(step, function, moved, incoming)
        if step.primitive == "reduce_max" and step.outputs[0] in adjoints:
            out = step.outputs[0]
            idle = jnp.max(jnp.abs(adjoints[out])) <= 1e-9 * jnp.max(jnp.abs(adjoints[step.inputs[0]]))
            push = (jnp.where(idle, 0.0, push[0]),)
        tangents.update({step.outputs[j]: push[n] for n, j in enumerate(outs)})
    return tangents


def _push(step: Step, function: Callable[..., Any], moved: Sequence[Any], incoming: Sequence[Any]) -> Any:
    """The tangents of a step's outputs, one for each direction."""
    if not step.primitive.startswith("custom_vjp"):
        return jax.vmap(lambda *t: jax.jvp(function, tuple(moved), t)[1])(*incoming)
    # A custom_vjp rule has no forward mode: transpose its linear pullback instead.
    out, back = jax.vjp(function, *moved)
    try:
        forwards = jax.linear_transpose(back, out)
        return jax.vmap(lambda *t: forwards(tuple(t))[0])(*incoming)
    except Exception:  # a rule that clips or rounds what it sends back is not linear and moves nothing forwards
        return tuple(jnp.zeros((len(incoming[0]), *o.shape), o.dtype) for o in out)


def pull(program: Program, step: Step, values: Mapping[int, Any], adjoints: Mapping[int, Any]) -> dict[int, Any]:
    """What one step sends back to each moving operand: `jax.vjp` of that primitive alone."""
    operands, outs, function, moved = _differentiable(program, step, values)
    if not operands or not any(step.outputs[j] in adjoints for j in outs):
        return {}
    incoming = tuple(
        adjoints[step.outputs[j]].astype(values[step.outputs[j]].dtype)
        if step.outputs[j] in adjoints
        else jnp.zeros_like(values[step.outputs[j]])
        for j in outs
    )
    return dict(zip(operands, pulled(function, moved, incoming), strict=True))


def pulled(function: Callable[..., Any], moved: Sequence[Any], incoming: Any) -> tuple[Any, ...]:
    """`jax.vjp(function, *moved)[1](incoming)`, by forward mode where JAX has no reverse mode (`while_loop`)."""
    try:
        return jax.vjp(function, *moved)[1](incoming)
    except ValueError as error:
        if not lacks_reverse_mode(error):
            raise
    sent = []
    for i, value in enumerate(moved):
        zeros = [jnp.zeros_like(v) for v in moved]

        def along(direction: Any, i: int = i, zeros: list[Any] = zeros) -> Any:
            _, out = jax.jvp(function, tuple(moved), (*zeros[:i], direction, *zeros[i + 1 :]))
            return sum(jnp.sum(a * b) for a, b in zip(incoming, out, strict=True))

        basis = jnp.eye(value.size, dtype=value.dtype).reshape(value.size, *value.shape)
        sent.append(jax.vmap(along)(basis).reshape(value.shape).astype(value.dtype))
    return tuple(sent)


def lacks_reverse_mode(error: Exception) -> bool:
    """Whether JAX raised this because a loop of unknown length has no reverse mode."""
    return "Reverse-mode differentiation does not work" in str(error)


def _reverse(program: Program, values: Mapping[int, Any]) -> tuple[dict[int, Any], dict[tuple[int, int], Any]]:
    """All adjoints, and what each step contributes to them."""
    adjoints: dict[int, Any] = {program.output: jnp.ones_like(values[program.output])}
    contributions: dict[tuple[int, int], Any] = {}
    for k in range(len(program.steps) - 1, -1, -1):
        for i, extra in pull(program, program.steps[k], values, adjoints).items():
            slot = program.steps[k].inputs[i]
            contributions[k, i] = extra
            adjoints[slot] = adjoints[slot] + extra if slot in adjoints else extra
    return adjoints, contributions


def _pieces(program: Program, by_shape: Mapping[tuple[int, ...], list[int]], most: int) -> tuple[Piece, ...]:
    """Every single-input piece: elementwise chains, and short regions that mix entries but keep the shape."""
    found: list[Piece] = []
    makers = {o: k for k, step in enumerate(program.steps) for o in step.outputs}
    starts = [s for s in range(len(program.avals)) if s in program.moving and _float(program, s)]
    for start in starts:
        shape = tuple(program.avals[start].shape)
        inside: dict[int, tuple[int, ...]] = {start: ()}
        plain: dict[int, bool] = {start: True}
        curved: dict[int, bool] = {start: False}
        first = makers.get(start, -1)
        for k in range(first + 1, min(len(program.steps), first + 40)):
            step = program.steps[k]
            sources = [s for s in step.inputs if s in program.moving]
            touching = [s for s in step.inputs if s in inside]
            if not touching or not all(s in inside for s in sources) or len(step.outputs) != 1:
                continue
            if step.primitive in ("scan", "while", "cond", "dot_general", "conv_general_dilated"):
                continue
            members = tuple(sorted({k}.union(*(inside[s] for s in touching))))
            if len(members) > 12:
                continue
            out = step.outputs[0]
            inside[out] = members
            plain[out] = is_elementwise(program, step) and all(plain[s] for s in touching)
            curved[out] = any(curved[s] for s in touching) or not _straight(program, step, inside, shape)
            if not _float(program, out) or tuple(program.avals[out].shape) != shape or not curved[out]:
                continue
            if not plain[out] and (not shape or int(np.prod(shape)) > 300):
                continue
            others = _nearest([o for o in by_shape.get(shape, []) if o != start], out, most) if plain[out] else []
            if out in by_shape.get(shape, []) and out not in others and plain[out]:
                others.append(out)
            found.append(Piece(start, out, members, plain[out], tuple(others)))
    mixing = [p for p in found if not p.elementwise]
    # Of the pieces that mix entries only the longest few from each start can be a named function.
    return tuple([p for p in found if p.elementwise][:80] + mixing[-12:])


def _straight(program: Program, step: Step, inside: Mapping[int, Any], shape: tuple[int, ...]) -> bool:
    """Whether a step is affine in what comes from the piece, so that its derivative is a constant."""
    if step.primitive in ("add", "sub", "neg", "copy", "copy_p", "convert_element_type", "name", "add_any"):
        return True
    if step.primitive in (
        "broadcast_in_dim",
        "reduce_sum",
        "reshape",
        "transpose",
        "squeeze",
        "reduce_max",
        "stop_gradient",
    ):
        return True
    if step.primitive == "max" and tuple(program.avals[step.outputs[0]].shape) != shape:
        return True  # the largest logit on its way into a softmax
    touching = [i for i, s in enumerate(step.inputs) if s in inside]
    if step.primitive == "mul":
        return len(touching) == 1
    return step.primitive == "div" and touching == [0]


def _products(
    program: Program, by_shape: Mapping[tuple[int, ...], list[int]], n_rows: int | None, most: int
) -> tuple[Product, ...]:
    found: list[Product] = []
    for k, step in enumerate(program.steps):
        if step.primitive not in BILINEAR:
            continue
        for i, j in ((0, 1), (1, 0)):
            # A constant partner of a matrix product is one too: the zeros before the first time step.
            fixed = step.inputs[j] not in program.varying and step.primitive != "dot_general"
            if step.inputs[i] not in program.moving or fixed:
                continue
            if step.primitive == "div" and i == 1:
                continue
            shape = tuple(program.avals[step.inputs[j]].shape)
            labels: list[tuple[str, int]] = [("ones", -1)]
            if len(shape) >= 2 and shape[-1] == shape[-2]:
                labels.append(("transposed", -1))
            out = tuple(program.avals[step.outputs[0]].shape)
            if step.primitive == "dot_general" and len(out) >= 2 and out[-1] == out[-2]:
                labels.append(("adjoint", -1))
            if step.primitive == "conv_general_dilated" and j == 1:
                labels.append(("flipped", -1))
            if step.primitive != "mul" and n_rows is not None and shape and shape[0] == n_rows:
                labels += [("rolled", 1), ("rolled", -1)]
            if shape:
                near = [s for s in by_shape.get(shape, []) if s != step.inputs[j]]
                labels += [("value", s) for s in _nearest(near, step.outputs[0], most)]
            if step.primitive == "dot_general" and len(shape) == 2 and shape[0] != shape[1]:
                labels += [("value^T", s) for s in _nearest(by_shape.get(shape[::-1], []), step.outputs[0], most)]
            found.append(Product(k, i, j, tuple(labels)))
    return tuple(found)


def _nearest(slots: Sequence[int], slot: int, most: int) -> list[int]:
    """The values made nearest to a step in the program, in their order."""
    return sorted(sorted(slots, key=lambda s: abs(s - slot))[:most])


def partner(product: Product, label: tuple[str, int], values: Mapping[int, Any], slot: int) -> Any:
    """What stands in the partner's place under a label."""
    kind, number = label
    held = values[slot]
    if kind == "ones":
        return jnp.ones_like(held)
    if kind == "transposed":
        return jnp.swapaxes(held, -1, -2)
    if kind == "flipped":
        return jnp.flip(held, tuple(range(2, held.ndim)))
    if kind == "rolled":
        return jnp.roll(held, number, axis=0)
    if kind == "adjoint":
        return held
    if kind == "value^T":
        return jnp.asarray(values[number]).astype(held.dtype).T
    return jnp.asarray(values[number]).astype(held.dtype)


def pull_product(program: Program, product: Product, values: Mapping[int, Any], other: Any, adjoint: Any) -> Any:
    """What the step sends to its operand when `other` stands in the partner's place."""
    step = program.steps[product.step]
    arguments = [values[s] for s in step.inputs]
    arguments[product.partner] = other

    def function(x: Any) -> Any:
        full = list(arguments)
        full[product.operand] = x
        return step.call(*full)[0]

    out, back = jax.vjp(function, arguments[product.operand])
    return back(jnp.asarray(adjoint).astype(out.dtype))[0]


def _alternatives(program: Program, product: Product, values: Mapping[int, Any], adjoints: Mapping[int, Any]) -> Any:
    step = program.steps[product.step]
    if step.outputs[0] not in adjoints:
        return jnp.zeros((0, *program.avals[step.inputs[product.operand]].shape))
    slot = step.inputs[product.partner]
    adjoint = adjoints[step.outputs[0]]
    stack = jnp.stack([partner(product, label, values, slot) for label in product.labels])
    ways = jnp.stack([jnp.swapaxes(adjoint, -1, -2) if kind == "adjoint" else adjoint for kind, _ in product.labels])
    return jax.vmap(lambda other, back: pull_product(program, product, values, other, back))(stack, ways)


def _derivatives(
    program: Program, piece: Piece, values: Mapping[int, Any], adjoints: Mapping[int, Any]
) -> tuple[Any, ...]:
    def function(start: Any) -> Any:
        return run_piece(program, piece, values, start)

    start = values[piece.start]
    if piece.elementwise:

        def slope(x: Any) -> Any:
            # By the pullback, since a custom_vjp rule has no forward mode; for entry-by-entry functions it is F'.
            out, back = jax.vjp(function, x)
            return back(jnp.ones_like(out))[0]

        if not piece.others:
            return (slope(start),)
        stack = jnp.stack([jnp.asarray(values[o]).astype(start.dtype) for o in piece.others])
        return (slope(start), jax.vmap(slope)(stack))
    if piece.end not in adjoints:
        return (jnp.zeros_like(start), jnp.zeros_like(start))
    out, pullback = jax.vjp(function, start)
    back = pullback(adjoints[piece.end].astype(out.dtype))[0]
    basis = jnp.eye(start.size, dtype=out.dtype).reshape(start.size, *start.shape)
    jacobian = jax.vmap(lambda t: pullback(t)[0])(basis)
    diagonal = jnp.diagonal(jacobian.reshape(start.size, start.size)).reshape(start.shape)
    return (back, diagonal)
