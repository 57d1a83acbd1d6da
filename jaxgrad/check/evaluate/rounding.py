"""How much rounding a right gradient may show: the size of the terms that cancel, not the luck of one machine.

Two right derivations differ by their rounding, and how much that is depends on the point: a difference of two large
numbers that leaves nothing, a saturated softmax. It cannot be read off two results, which may happen to round
alike. So the loss is run again with every result multiplied by 1 + u ξ, ξ normal and u the unit roundoff, and every
adjoint on the way back too; sums and products get the factor on each of their terms, since a sum rounds in
proportion to its terms. The change of the gradient is what arithmetic of that precision may do to it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import Kernel, shape_key, traced
from jaxgrad.check.program.replay import quick_jit
from jaxgrad.check.program.steps import OPENED, call_of

DOUBLE, SINGLE, HALF, BRAIN = 2.0**-53, 2.0**-24, 2.0**-11, 2.0**-8
"""Unit roundoff of float64, float32, float16 and bfloat16."""

NAMES = {DOUBLE: "float64", SINGLE: "float32", HALF: "float16", BRAIN: "bfloat16"}


def margin(unit: float) -> float:
    """How many standard deviations of that rounding a right gradient may be off: fewer where one is much."""
    return 30.0 if unit < 1e-12 else 10.0 if unit < 1e-5 else 5.0


_POOL = 8191
_MOVES = """
broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice gather concatenate
pad rev select_n max min reduce_max reduce_min argmax argmin neg abs sign copy copy_p stop_gradient name sort clamp
reduce_precision split iota convert_element_type reduce_window_max select_and_gather_add
"""
_SUMMING = "dot_general conv_general_dilated reduce_sum cumsum reduce_window_sum add sub add_any"
_EXACT = frozenset(_MOVES.split())
_SUMS = frozenset(_SUMMING.split())


def allowance(store: Kernel, point: Point, unit: float) -> tuple[float, ...]:
    """By how much each leaf of a right gradient may be off at a point, in norm, for rounding alone."""
    return tuple(margin(unit) * x for x in expected(store, point, unit))


def expected(store: Kernel, point: Point, unit: float) -> list[float]:
    """Standard deviation of the norm of each leaf of the gradient at a point, in arithmetic of this unit roundoff.

    Zeros where it cannot be said, as for a loss that has no reverse mode.
    """
    key = ("rounding", shape_key(point.leaves, point.data), unit)
    if key not in store.compiled:
        store.compiled[key] = quick_jit(jax.grad(_shaken(traced(store, point.leaves, point.data), unit)))
    run = store.compiled[key]
    rng = np.random.default_rng(12)
    leaves, data = list(point.leaves), list(point.data)
    try:
        still = [np.asarray(g, np.float64) for g in run(leaves, data, np.zeros(_POOL))]
        moved = [run(leaves, data, rng.standard_normal(_POOL)) for _ in range(3)]
    except Exception:  # a step that JAX cannot run backwards
        return [0.0] * len(leaves)
    with np.errstate(all="ignore"):
        gaps = np.array([[np.linalg.norm(np.asarray(a) - b) for a, b in zip(g, still, strict=True)] for g in moved])
    usual = np.sqrt(np.mean(gaps**2, axis=0)) / _enlarged(unit)
    return [float(x) if np.isfinite(x) else 0.0 for x in usual]


def written_in_single(values: Sequence[np.ndarray]) -> bool:
    """Whether numbers have 24 significant bits, most of them in use: float32 code made them, whatever they are now."""
    flat = np.concatenate([np.ravel(np.asarray(v, np.float64)) for v in values] or [np.zeros(0)])
    flat = np.unique(np.abs(flat[np.isfinite(flat) & (flat != 0)]))
    with np.errstate(all="ignore"):
        single = np.all(flat.astype(np.float32) == flat)
        short = np.mean(np.frexp(flat)[0] * 2**16 % 1 == 0) if len(flat) else 1.0
    return bool(len(flat) >= 4 and single and short < 0.5)


def unit_of(eps: float) -> float:
    """The unit roundoff of the floating type with this machine epsilon."""
    return DOUBLE if eps < 1e-12 else SINGLE if eps < 1e-5 else HALF if eps < 2e-3 else BRAIN


def _enlarged(unit: float) -> float:
    """By how much the rounding is enlarged, so that it stands out of the real one."""
    return 64.0 if unit < 1e-12 else 4.0 if unit < 1e-5 else 1.0


@jax.custom_vjp
def _shake(value: Any, forth: Any, back: Any) -> Any:
    return (value * (1 + forth)).astype(value.dtype)


def _shake_forth(value: Any, forth: Any, back: Any) -> Any:
    return _shake(value, forth, back), (back, forth)


def _shake_back(kept: Any, adjoint: Any) -> Any:
    back, forth = kept
    return (adjoint * (1 + back)).astype(adjoint.dtype), jnp.zeros_like(forth), jnp.zeros_like(back)


_shake.defvjp(_shake_forth, _shake_back)


_FROM_OUTPUT = {"tanh": (jnp.tanh, lambda a: 1 - a**2), "logistic": (jax.nn.sigmoid, lambda a: a * (1 - a))}
"""Functions whose derivative is written with their rounded output, which is all that is left of it at saturation."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _from_output(name: str, z: Any, rounding: Any) -> Any:
    return _FROM_OUTPUT[name][0](z)


def _from_output_forth(name: str, z: Any, rounding: Any) -> Any:
    a = _FROM_OUTPUT[name][0](z)
    return a, (a, rounding)


def _from_output_back(name: str, kept: Any, adjoint: Any) -> Any:
    a, rounding = kept
    slope = _FROM_OUTPUT[name][1](a * (1 + rounding))
    return (adjoint * slope).astype(adjoint.dtype), jnp.zeros_like(rounding)


_from_output.defvjp(_from_output_forth, _from_output_back)


def _shaken(closed: Any, unit: float) -> Callable[..., Any]:
    """The loss as a function of (leaves, data, normal numbers), with rounding of this size at each primitive."""

    def run(leaves: Sequence[Any], data: Sequence[Any], pool: Any) -> Any:
        taken = 0

        def numbers(shape: tuple[int, ...], dtype: Any) -> Any:
            nonlocal taken
            size = int(np.prod(shape))
            start = (taken * 1327) % _POOL
            taken += 1
            long = jnp.tile(pool, 1 + (start + size) // _POOL)[start : start + size]
            coarsest = max(unit, unit_of(float(jnp.finfo(dtype).eps)))
            return (coarsest * _enlarged(unit) * long).reshape(shape)

        def shake(value: Any, forth: bool) -> Any:
            forwards = numbers(value.shape, value.dtype)
            return _shake(value, forwards if forth else jnp.zeros_like(forwards), numbers(value.shape, value.dtype))

        def rounded(value: Any) -> Any:
            """An input as code of this precision reads it."""
            value = jnp.asarray(value)
            if unit < 1e-12 or not jnp.issubdtype(value.dtype, jnp.floating):
                return value
            kept = value.astype(jnp.float32).astype(value.dtype) == value
            return value * (1 + jnp.where(kept, 0.0, numbers(value.shape, value.dtype)))

        def through(jaxpr: Any, consts: Sequence[Any], inputs: Sequence[tuple[Any, bool]]) -> list[tuple[Any, bool]]:
            """The values of a jaxpr, each with whether it depends on the leaves or the data."""
            held: dict[Any, tuple[Any, bool]] = {v: (c, False) for v, c in zip(jaxpr.constvars, consts, strict=True)}
            held.update(zip(jaxpr.invars, inputs, strict=True))
            read = lambda atom: (atom.val, False) if isinstance(atom, jex.Literal) else held[atom]
            for eqn in jaxpr.eqns:
                known = [read(atom) for atom in eqn.invars]
                name = eqn.primitive.name
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")) if name in OPENED else None
                if inner is not None:
                    plain = getattr(inner, "jaxpr", inner)
                    held.update(zip(eqn.outvars, through(plain, getattr(inner, "consts", ()), known), strict=True))
                    continue
                varies = any(v for _, v in known)
                moving = lambda x: varies and jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: B023
                values = [jnp.asarray(x) if v else x for x, v in known]
                if name in _SUMS:
                    values = [shake(x, True) if v and moving(x) else x for x, (_, v) in zip(values, known, strict=True)]
                if name in _FROM_OUTPUT and varies and jnp.issubdtype(values[0].dtype, jnp.floating):
                    outputs = [_from_output(name, values[0], numbers(values[0].shape, values[0].dtype))]
                else:
                    outputs = call_of(eqn)(*values)
                outputs = [shake(x, name not in _EXACT) if moving(x) else x for x in outputs]
                held.update(zip(eqn.outvars, [(x, varies) for x in outputs], strict=True))
            return [read(atom) for atom in jaxpr.outvars]

        inputs = [(rounded(x), True) for x in (*leaves, *data)]
        return through(closed.jaxpr, closed.consts, inputs)[0][0]

    return run
