"""A loss as a list of elementary steps, each knowing its line of source.

JAX traces the loss to a jaxpr. Here that jaxpr is flattened: calls of `jit` are opened, so that every step
is one primitive (a `custom_jvp` or `custom_vjp` call such as `relu` counts as one, and so do `scan`, `while`
and `cond`), and every value is a numbered slot. All use of JAX's private source information is in this file.
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

try:
    from jax._src import source_info_util
except ImportError:  # the private module moved: steps then have no place, and everything else still works
    source_info_util = None

_HERE = os.path.dirname(os.path.abspath(__file__))
_PACKAGE = os.path.dirname(_HERE)


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
    """The names of the primitives inside a custom rule (its own name for any other step)."""


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


def flatten(closed: Any, n_leaves: int) -> Program:
    """The jaxpr as numbered slots with every `jit` opened."""
    avals: list[Any] = []
    constants: dict[int, Any] = {}
    steps: list[Step] = []

    def slot(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def constant(value: Any, aval: Any) -> int:
        number = slot(aval)
        constants[number] = value
        return number

    def run(jaxpr: Any, consts: Sequence[int], inputs: Sequence[int], outer: tuple[Place, ...]) -> list[int]:
        names: dict[Any, int] = {}
        names.update(zip(jaxpr.constvars, consts, strict=True))
        names.update(zip(jaxpr.invars, inputs, strict=True))

        def read(atom: Any) -> int:
            return constant(atom.val, atom.aval) if isinstance(atom, jex.Literal) else names[atom]

        for eqn in jaxpr.eqns:
            arguments = [read(atom) for atom in eqn.invars]
            frames = _frames(eqn, outer)
            if eqn.primitive.name in ("jit", "pjit", "closed_call", "core_call", "remat", "checkpoint"):
                inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
                if hasattr(inner, "consts"):
                    held = [constant(c, v.aval) for c, v in zip(inner.consts, inner.jaxpr.constvars, strict=True)]
                    inner = inner.jaxpr
                else:
                    held = []
                outputs = run(inner, held, arguments, frames)
                names.update(zip(eqn.outvars, outputs, strict=True))
                continue
            outputs = [slot(v.aval) for v in eqn.outvars]
            names.update(zip(eqn.outvars, outputs, strict=True))
            primitive = eqn.primitive.name
            opened = eqn.params.get("call_jaxpr") if primitive.startswith("custom_") else None
            steps.append(
                Step(
                    name=_name(eqn),
                    call=_call(eqn),
                    inputs=tuple(arguments),
                    outputs=tuple(outputs),
                    frames=frames,
                    params=eqn.params,
                    primitive=primitive,
                    inner=tuple(_primitives(opened)) if opened is not None else (primitive,),
                )
            )
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
            moving |= {o for o in step.outputs if _is_float(avals[o])}
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


def _name(eqn: Any) -> str:
    name = eqn.params.get("name") if eqn.primitive.name.startswith("custom_") else None
    return name or eqn.primitive.name


def _primitives(jaxpr: Any) -> list[str]:
    names: list[str] = []
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        names += _primitives(inner) if inner is not None else [eqn.primitive.name]
    return names


def _call(eqn: Any) -> Callable[..., list[Any]]:
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
        if os.path.dirname(os.path.abspath(frame.file_name)) == _HERE:
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
