"""Small loops as one function on one core.

XLA runs a program on the CPU as a list of kernels, and gives independent kernels to a pool of threads. For a step of
microseconds that costs more than the step: a linear regression with b = 8 and d = 10 takes ten times as long as its
arithmetic (jaxlib 0.10; 0.12 is better, except for one example). XLA compiles a call that is marked as small into a
single function instead, loops included. Nothing is passed to threads, and nothing waits.

That code generator supports fewer operations than XLA (no products of two matrices, no sort, no scatter), so the
program is inspected first.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

LARGEST = 2**16
"""Bytes that one step may touch. For larger steps threads are faster."""

_KNOWN = {
    "abs", "add", "add_any", "and", "broadcast_in_dim", "clamp", "convert_element_type", "copy", "div",
    "dot_general", "eq", "exp", "exp2", "expand_dims", "expm1", "ge", "gt", "integer_pow", "is_finite", "le",
    "log", "log1p", "logistic", "lt", "max", "min", "mul", "ne", "neg", "not", "or", "pow", "reduce_max",
    "reduce_min", "reduce_sum", "reshape", "rsqrt", "select_n", "sign", "sqrt", "square", "squeeze",
    "stop_gradient", "sub", "tanh", "transpose",
}  # fmt: skip
_NESTED = {"closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "jit", "pjit", "remat"}


def fits(step: Callable[..., Any], *arguments: Any) -> bool:
    """Whether `step(*arguments)` (arrays or shapes) is small and has simple operations only, on a CPU."""
    if jax.default_backend() != "cpu":
        return False
    if sum(_bytes(leaf) for leaf in jax.tree.leaves(arguments)) > LARGEST:
        return False
    return all(
        _is_simple(equation) and (_is_product(equation) or max(_bytes(out.aval) for out in equation.outvars) <= LARGEST)
        for equation in _equations(jax.make_jaxpr(step)(*arguments).jaxpr)
    )


def products_of_vectors(function: Callable[..., Any], *arguments: Any) -> bool:
    """Whether `function(*arguments)`, of any size, has simple operations only, and no product of two matrices."""
    return all(map(_is_simple, _equations(jax.make_jaxpr(function)(*arguments).jaxpr)))


def call(loop: Callable[..., Any], *arguments: Any) -> Any:
    """`loop(*arguments)`, compiled into one function. Not under `vmap`: its batched operations may not be supported."""

    def all_used(*arguments: Any) -> tuple[Any, Any]:
        # An unused argument (labels that a loss ignores) makes jaxlib 0.10 abort the process.
        return loop(*arguments), [leaf.ravel()[:1] for leaf in jax.tree.leaves(arguments)]

    with set_xla_metadata(inlineable="false", xla_cpu_small_call="true"):
        return jax.jit(all_used)(*arguments)[0]


def _is_product(equation: Any) -> bool:
    return equation.primitive.name == "dot_general"


def _is_simple(equation: Any) -> bool:
    if _is_product(equation):
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        left, right = (variable.aval.shape for variable in equation.invars)
        inner = max(1, math.prod(left[axis] for axis in contracted))
        # A matrix by a vector, or two vectors by each other.
        return not batched and min(inner, math.prod(left) // inner, math.prod(right) // inner) <= 1
    return equation.primitive.name in _KNOWN


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        inner = [value for name, value in equation.params.items() if name in ("jaxpr", "call_jaxpr")]
        if equation.primitive.name in _NESTED and inner:
            yield from _equations(getattr(inner[0], "jaxpr", inner[0]))
        else:
            yield equation


def _bytes(leaf: Any) -> int:
    dtype = getattr(leaf, "dtype", None)
    return math.prod(np.shape(leaf)) * getattr(dtype, "itemsize", 8)
