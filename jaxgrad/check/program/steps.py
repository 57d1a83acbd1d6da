"""A loss as a list of elementary steps, each knowing its line of source.

JAX traces the loss to a jaxpr. Here that jaxpr is flattened: calls of `jit` are opened, a short `scan` is written
out time step by time step, both branches of a `cond` are computed and one is selected. So every step is one
primitive (a `custom_jvp` or `custom_vjp` call such as `relu` counts as one, and so does `while`), and every value
is a numbered slot. A call of a library function that has a derivative of its own (`NAMED`: `softmax`, `inv`, ...)
is one step too. All use of JAX's private source information is in this file.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

try:
    from jax._src import source_info_util
except ImportError:  # the private module moved: steps then have no place, and everything else still works
    source_info_util = None

_CHECK = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_PACKAGE = os.path.dirname(_CHECK)


class Place(NamedTuple):
    """A piece of source text: lines count from 1, columns from 0."""

    file: str
    function: str
    line: int
    column: int
    end_line: int
    end_column: int


class Step(NamedTuple):
    """One elementary step `outputs = call(*inputs)` of a program."""

    name: str
    """The primitive's name; for a custom derivative rule the name of its function."""
    call: Callable[..., list[Any]]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frames: tuple[Place, ...]
    """The person's own frames, innermost first; empty where JAX kept none."""
    params: dict[str, Any]
    primitive: str
    inner: tuple[str, ...]
    """The names of the primitives inside a custom rule or a library call (its own name for any other step)."""
    moment: tuple[int, ...] = ()
    """The time step, for a step inside a `scan` or a `fori_loop`; the outermost loop first."""


_NAMED = """
softmax log_softmax logsumexp gelu silu swish elu celu selu leaky_relu softplus log_sigmoid hard_tanh relu6
hard_sigmoid hard_silu hard_swish mish squareplus soft_sign huber_loss inv solve cho_solve solve_triangular
cholesky det slogdet repeat roll
"""
NAMED = frozenset(_NAMED.split())
"""Library functions that count as one step, because a derivation has one formula for their derivative."""

OPENED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")
_SHAPES = ("reshape", "transpose", "squeeze", "convert_element_type")
_MOST_UNROLLED = 400
"""A scan of more steps than this, all time steps together, stays one step."""


class Program(NamedTuple):
    """A loss at one set of shapes: `steps` over slots, from `leaves` and `data` to `output`."""

    steps: tuple[Step, ...]
    avals: tuple[Any, ...]
    """Shape and dtype of each slot."""
    leaves: tuple[int, ...]
    data: tuple[int, ...]
    constants: dict[int, Any]
    output: int
    moving: frozenset[int]
    """Floating slots that depend on the parameters."""
    varying: frozenset[int]
    """Slots that depend on the parameters or on the data."""


def trace(function: Callable[..., Any], leaves: Sequence[Any], data: Sequence[Any]) -> Program:
    """The program of `function(leaves, data) -> scalar`; what `function` raises is passed on."""
    return flatten(jaxpr_of(function, leaves, data), len(leaves))


def jaxpr_of(function: Callable[..., Any], leaves: Sequence[Any], data: Sequence[Any]) -> Any:
    """The closed jaxpr of `function(leaves, data)`, traced afresh (never from a cache)."""
    return jax.make_jaxpr(lambda leaves, data: function(leaves, data))(list(leaves), list(data))


def scan_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """How many of a scan's arguments are constants, and how many are carried, whichever way this JAX says it."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].elts  # newer JAX: a tree of each
    return len(tuple(constants)), len(tuple(carried))


def flatten(closed: Any, n_leaves: int, opened: bool = True, named: bool = True) -> Program:
    """The jaxpr as numbered slots with every `jit` opened, and with `opened` every short `scan` and `cond` too.

    With `named` a call of a library function in `NAMED` is one step, without it the steps that it is made of.
    """
    avals: list[Any] = []
    constants: dict[int, Any] = {}
    steps: list[Step] = []
    shaped: dict[Any, list[int]] = {}

    def slot(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def constant(value: Any, aval: Any) -> int:
        number = slot(aval)
        constants[number] = value
        return number

    def emit(
        name: str, call: Callable[..., list[Any]], inputs: Sequence[int], shapes: Sequence[Any], of: Step
    ) -> list[int]:
        """Append a step that no equation stands for; it stands where the step `of` stands."""
        outputs = [slot(aval) for aval in shapes]
        steps.append(
            of._replace(
                name=name, call=call, inputs=tuple(inputs), outputs=tuple(outputs), primitive=name, inner=(name,)
            )
        )
        return outputs

    def unrolled(eqn: Any, arguments: Sequence[int], of: Step) -> list[int]:
        """A scan written out."""
        body, length = eqn.params["jaxpr"], eqn.params["length"]
        held, carried = scan_counts(eqn.params)
        consts, carry, rows = arguments[:held], list(arguments[held : held + carried]), arguments[held + carried :]
        inner_consts = [constant(c, v.aval) for c, v in zip(body.consts, body.jaxpr.constvars, strict=True)]
        found: dict[int, list[int]] = {}
        for t in reversed(range(length)) if eqn.params["reverse"] else range(length):
            here = of._replace(moment=(*of.moment, t))
            now = []
            for row in rows:
                aval = jax.ShapeDtypeStruct(avals[row].shape[1:], avals[row].dtype)
                now += emit("index", lambda x, t=t: [x[t]], [row], [aval], here)
            out = run(body.jaxpr, inner_consts, [*consts, *carry, *now], of.frames, here.moment)
            carry, found[t] = out[:carried], out[carried:]
        stacked = []
        for i, v in enumerate(eqn.outvars[carried:]):
            parts = [found[t][i] for t in range(length)]
            stacked += emit("stack", lambda *xs: [jnp.stack(xs)], parts, [v.aval], of)
        return [*carry, *stacked]

    def selected(eqn: Any, arguments: Sequence[int], of: Step) -> list[int]:
        """Every branch of a cond, and the choice between them."""
        outs = []
        for branch in eqn.params["branches"]:
            consts = [constant(c, v.aval) for c, v in zip(branch.consts, branch.jaxpr.constvars, strict=True)]
            outs.append(run(branch.jaxpr, consts, arguments[1:], of.frames, of.moment))
        found = []
        for i, v in enumerate(eqn.outvars):
            choose = lambda which, *xs: [jax.lax.select_n(jnp.clip(which, 0, len(xs) - 1).astype(jnp.int32), *xs)]
            found += emit("select_n", choose, [arguments[0], *(out[i] for out in outs)], [v.aval], of)
        return found

    def run(
        jaxpr: Any,
        consts: Sequence[int],
        inputs: Sequence[int],
        outer: tuple[Place, ...],
        moment: tuple[int, ...] = (),
    ) -> list[int]:
        names: dict[Any, int] = {}
        names.update(zip(jaxpr.constvars, consts, strict=True))
        names.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return constant(atom.val, atom.aval) if isinstance(atom, jex.Literal) else names[atom]

        for part in _calls(jaxpr) if named else jaxpr.eqns:
            if isinstance(part, _Call):
                of = Step(part.name, part.call, (), (), _frames(part.eqns[0], outer), {}, part.name, part.inner, moment)
                outputs = [slot(v.aval) for v in part.outvars]
                names.update(zip(part.outvars, outputs, strict=True))
                steps.append(of._replace(inputs=tuple(read(a) for a in part.invars), outputs=tuple(outputs)))
                continue
            eqn = part
            arguments = [read(atom) for atom in eqn.invars]
            frames = _frames(eqn, outer)
            name = _library_name(eqn) if named else None
            if name is None and eqn.primitive.name in OPENED:
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                if hasattr(inner, "consts"):
                    held = [constant(c, v.aval) for c, v in zip(inner.consts, inner.jaxpr.constvars, strict=True)]
                    inner = inner.jaxpr
                else:
                    held = []
                outputs = run(inner, held, arguments, frames, moment)
                names.update(zip(eqn.outvars, outputs, strict=True))
                continue
            primitive = name or eqn.primitive.name
            closed_in = eqn.params.get("call_jaxpr") if primitive.startswith("custom_") else None
            closed_in = eqn.params["jaxpr"] if name is not None else closed_in
            step = Step(
                name=name or _name(eqn),
                call=call_of(eqn),
                inputs=tuple(arguments),
                outputs=(),
                frames=frames,
                params=eqn.params,
                primitive=primitive,
                inner=tuple(_primitives(closed_in)) if closed_in is not None else (primitive,),
                moment=moment,
            )
            if opened and primitive == "scan" and eqn.params["length"] * _count(eqn.params["jaxpr"]) <= _MOST_UNROLLED:
                names.update(zip(eqn.outvars, unrolled(eqn, arguments, step), strict=True))
                continue
            if opened and primitive == "cond":
                names.update(zip(eqn.outvars, selected(eqn, arguments, step), strict=True))
                continue
            # `jnp.vdot(w, w)` lays w out flat twice: one value, or a square would look like a product of two.
            again = (primitive, step.inputs, repr(eqn.params), frames, moment) if primitive in _SHAPES else None
            if again is not None and again in shaped:
                names.update(zip(eqn.outvars, shaped[again], strict=True))
                continue
            outputs = [slot(v.aval) for v in eqn.outvars]
            names.update(zip(eqn.outvars, outputs, strict=True))
            steps.append(step._replace(outputs=tuple(outputs)))
            if again is not None:
                shaped[again] = outputs
        return [read(atom) for atom in jaxpr.outvars]

    consts = [constant(c, v.aval) for c, v in zip(closed.consts, closed.jaxpr.constvars, strict=True)]
    inputs = [slot(v.aval) for v in closed.jaxpr.invars]
    (output,) = run(closed.jaxpr, consts, inputs, ())
    leaves, data = tuple(inputs[:n_leaves]), tuple(inputs[n_leaves:])
    moving, varying = set(leaves), set(inputs)
    for step in steps:
        if varying & set(step.inputs):
            varying |= set(step.outputs)
        if moving & set(step.inputs):
            moving |= {o for o in step.outputs if _is_inexact(avals[o])}
    return Program(tuple(steps), tuple(avals), leaves, data, constants, output, frozenset(moving), frozenset(varying))


def same_trace(a: Any, b: Any) -> bool:
    """Whether two closed jaxprs are one computation: the same primitives, shapes, literals and constants."""

    def eqns(jaxpr: Any) -> list[Any]:
        found = []
        for eqn in jaxpr.eqns:
            inner = eqn.params.get("jaxpr")
            opened = getattr(inner, "jaxpr", inner)
            found.append((eqn.primitive.name, [str(v.aval) for v in eqn.outvars], _literals(eqn)))
            if hasattr(opened, "eqns"):
                found += eqns(opened)
        return found

    if len(a.consts) != len(b.consts) or eqns(a.jaxpr) != eqns(b.jaxpr):
        return False
    return all(np.array_equal(_plain(x), _plain(y), equal_nan=True) for x, y in zip(a.consts, b.consts, strict=True))


def low_precision(closed: Any) -> float:
    """The largest machine epsilon of any floating value that the jaxpr computes."""
    eps = float(np.finfo(np.float64).eps)
    stack = [closed.jaxpr]
    while stack:
        for eqn in stack.pop().eqns:
            for out in eqn.outvars:
                if _is_float(out.aval):
                    eps = max(eps, float(jax.numpy.finfo(out.aval.dtype).eps))
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    stack.append(inner)
    return eps


def _plain(value: Any) -> Any:
    if jnp.issubdtype(getattr(value, "dtype", np.float64), jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    value = np.asarray(value)
    return value if value.dtype.kind in "biuf" else value.astype(np.float64)


def _literals(eqn: Any) -> list[str]:
    return [repr(v.val) for v in eqn.invars if isinstance(v, jex.Literal)]


def _is_float(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.floating)


def _is_inexact(aval: Any) -> bool:
    """A real or complex number: what a derivative flows through."""
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, np.inexact)


class _Call(NamedTuple):
    """The equations of one library call that JAX has written in line."""

    name: str
    eqns: list[Any]
    invars: list[Any]
    outvars: list[Any]

    @property
    def inner(self) -> tuple[str, ...]:
        return tuple(n for eqn in self.eqns for n in _names_inside(eqn))

    def call(self, *arguments: Any) -> list[Any]:
        held = dict(zip(self.invars, arguments, strict=True))
        for eqn in self.eqns:
            ins = [a.val if isinstance(a, jex.Literal) else held[a] for a in eqn.invars]
            held.update(zip(eqn.outvars, call_of(eqn)(*ins), strict=True))
        return [held[v] for v in self.outvars]


def _calls(jaxpr: Any) -> list[Any]:
    """The equations of a jaxpr in order, those of one call of a `NAMED` function put together."""
    runs: list[tuple[Any, list[Any]]] = []
    for eqn in jaxpr.eqns:
        key = None if _library_name(eqn) else _written_in_line(eqn)
        if key is not None and runs and runs[-1][0] == key:
            runs[-1][1].append(eqn)
        else:
            runs.append((key, [eqn]))
    parts: list[Any] = []
    for number, (key, eqns) in enumerate(runs):
        if key is None or len(eqns) == 1:
            parts += eqns
            continue
        made = {v for eqn in eqns for v in eqn.outvars}
        later = [a for _, rest in runs[number + 1 :] for eqn in rest for a in eqn.invars]
        used = {a for a in (*later, *jaxpr.outvars) if not isinstance(a, jex.Literal)}
        invars = [a for eqn in eqns for a in eqn.invars if not isinstance(a, jex.Literal) and a not in made]
        outvars = [v for eqn in eqns for v in eqn.outvars if v in used]
        parts.append(_Call(key[0], eqns, list(dict.fromkeys(invars)), outvars))
    return parts


def _library_name(eqn: Any) -> str | None:
    """The name of a library function that is one `jit` equation."""
    if eqn.primitive.name not in ("jit", "pjit"):
        return None
    name = str(eqn.params.get("name", "")).lstrip("_")
    if name not in NAMED or source_info_util is None:
        return None
    # A function of the person's own may bear that name.
    own = [f for e in eqn.params["jaxpr"].jaxpr.eqns for f in source_info_util.user_frames(e.source_info.traceback)]
    return None if any(f.function_name.rsplit(".", 1)[-1] == eqn.params["name"] for f in own) else name


def _written_in_line(eqn: Any) -> tuple[Any, ...] | None:
    """The `NAMED` function that an equation belongs to, and the place of the call."""
    traceback = getattr(eqn.source_info, "traceback", None)
    if source_info_util is None or traceback is None:
        return None
    user = next(iter(source_info_util.user_frames(traceback)), None)
    if user is None:
        return None
    for frame in traceback.frames:
        if (
            frame.file_name == user.file_name
            and frame.function_name.rsplit(".", 1)[-1] == user.function_name.rsplit(".", 1)[-1]
        ):
            return None
        if frame.function_name in NAMED:
            return (frame.function_name, user.file_name, user.start_line, user.start_column)
    return None


def _names_inside(eqn: Any) -> list[str]:
    inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return _primitives(inner) if inner is not None else [eqn.primitive.name]


def _count(jaxpr: Any) -> int:
    """How many primitives a jaxpr runs."""
    total = 0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        total += eqn.params.get("length", 1) * _count(inner) if inner is not None else 1
    return total


def _name(eqn: Any) -> str:
    name = eqn.params.get("name") if eqn.primitive.name.startswith("custom_") else None
    return name or eqn.primitive.name


def _primitives(jaxpr: Any) -> list[str]:
    return [name for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns for name in _names_inside(eqn)]


def call_of(eqn: Any) -> Callable[..., list[Any]]:
    def call(*arguments: Any) -> list[Any]:
        with eqn.ctx.manager:
            out = eqn.primitive.bind(*arguments, **eqn.primitive.get_bind_params(eqn.params))
        return list(out) if eqn.primitive.multiple_results else [out]

    return call


def _frames(eqn: Any, outer: tuple[Place, ...]) -> tuple[Place, ...]:
    """The person's frames of an equation, innermost first.

    A jaxpr inside `jit` is cached by JAX with the frames of its first call, so frames below the call come
    from the equation and frames above it from the call itself (`outer`).
    """
    if source_info_util is None:
        return outer
    own: list[Place] = []
    for frame in source_info_util.user_frames(eqn.source_info.traceback):
        if os.path.abspath(frame.file_name).startswith(_CHECK + os.sep):
            break
        own.append(
            Place(
                frame.file_name,
                frame.function_name.rsplit(".", 1)[-1],
                frame.start_line,
                frame.start_column,
                frame.end_line,
                frame.end_column,
            )
        )
    if outer:
        callers = {(p.file, p.line, p.column, p.function) for p in outer}
        inside = []
        for place in own:
            if (place.file, place.line, place.column, place.function) in callers:
                break
            inside.append(place)
        # Frames of another call of the same cached function: keep only what is inside the function.
        own = (inside if len(inside) < len(own) else inside[:1]) + list(outer)
    mine = [p for p in own if not is_library(p.file)]
    return tuple(mine or own)


def is_library(file: str) -> bool:
    parts = os.path.abspath(file).split(os.sep)
    if "site-packages" in parts or "dist-packages" in parts:
        return True
    return os.path.abspath(file).startswith(_PACKAGE + os.sep) or file.startswith(sys.prefix + os.sep + "lib")
