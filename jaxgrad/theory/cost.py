"""What a gradient costs in arithmetic operations (C8): counted, not guessed.

Two instruments. `count` reads the program that JAX traced and counts every operation on every element: scan bodies
times their length, matrix products as two operations per multiply-add, nothing that the output does not
need. The compiler's own figure (`cost_analysis`) is not used: it counts a scan body once, merges what it can,
and for long scalar programs counts work that fusion repeats.

`chain_operations` counts on real numbers instead: the lecture's chain rule on a chain of L scalar layers, written
out the ways a person can write it, run on numbers that count what is done to them.

    forward               2L + 2
    backprop              5L + 1 more             shared: one pass down
    separate derivatives  L² + 5L, or 2L² + 4L    each parameter's chain rule by itself (σ' shared or not)
    forward mode          4L² + 5L                one pass up per parameter
    finite differences    2L² + 7L + 2            one more loss per parameter

One operation is one of + − × ÷, a maximum, or an elementary function of one element. Sign changes, comparisons, whole
numbers (indices, counters), copies and rearrangements are free.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad import checks
from jaxgrad.checks import Count, Positive, Widths, checked


class Operations(NamedTuple):
    """Arithmetic operations of a traced program."""

    total: int
    matmul: int
    """Those in matrix products and convolutions: 2 for each multiply-add."""
    elementwise: int
    reduction: int
    """Sums and maxima over axes, and the additions of scatters."""
    uncounted: tuple[str, ...]
    """Primitives whose work is not known here (sorts, random bits, solvers): not in the total."""


class ChainOperations(NamedTuple):
    """Operations for the value, and for all L derivatives, of a chain of L scalar layers."""

    forward: int
    backprop: int
    """Beyond the forward pass, whose values it uses."""
    separate_shared: int
    """Each derivative by its own chain rule, the slopes σ' computed once; beyond the forward pass."""
    separate: int
    """The same with each slope computed where it is needed."""
    forward_mode: int
    """One tangent per parameter, each with its own forward pass."""
    finite_differences: int


# --- counting traced programs ----------------------------------------------------------------------------------


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTWISE = _names(
    "add sub mul div rem pow integer_pow square exp exp2 log log1p expm1 tanh logistic sqrt rsqrt cbrt "
    "sin cos tan asin acos atan sinh cosh asinh acosh atanh atan2 erf erfc erf_inv lgamma digamma "
    "max min clamp add_any floor ceil round nextafter"
)
_WORTH = {"one_minus_square": 2}
"""Elementwise primitives that stand for several operations."""
_REDUCTIONS = _names("reduce_sum reduce_prod reduce_max reduce_min argmax argmin")
_CUMULATIVE = _names("cumsum cumprod cummax cummin cumlogsumexp")
_SCATTERS = _names("scatter-add scatter_add scatter-mul scatter_mul")
_FREE = _names(
    "reshape broadcast_in_dim transpose squeeze expand_dims slice dynamic_slice dynamic_update_slice gather scatter "
    "concatenate pad rev copy copy_p convert_element_type bitcast_convert_type iota stop_gradient select_n split "
    "device_put sharding_constraint optimization_barrier eq ne lt le gt ge eq_to le_to lt_to and or not xor "
    "is_finite neg sign abs real imag conj reduce_or reduce_and reduce_precision empty pvary "
    "shift_left shift_right_logical shift_right_arithmetic population_count tile unstack stack broadcast"
)


@checked
def count(function: Callable[..., Any], *args: Any) -> Operations:
    """The arithmetic operations of `function(*args)`, as JAX traces it. `args` may be shapes (ShapeDtypeStruct).

    Raises ValueError for a `while` loop, whose length no program text tells: write a `scan`, or a `fori_loop` with
    constant bounds. Of the branches of a `cond` the dearest counts.
    """
    with checks.saying("function cannot be traced with these arguments"):
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
    return _count(jaxpr, [True] * len(jaxpr.outvars))


def _count(jaxpr: Any, live_outputs: Sequence[bool]) -> Operations:
    """Operations of the equations that the live outputs need, found from the last to the first."""
    needed = {id(v) for v, live in zip(jaxpr.outvars, live_outputs, strict=True) if live}
    total = Operations(0, 0, 0, 0, ())
    for eqn in reversed(jaxpr.eqns):
        live = [id(v) in needed for v in eqn.outvars]
        if any(live):
            needed |= {id(v) for v in eqn.invars}
            total = _plus(total, _equation(eqn, live))
    return total


def _equation(eqn: Any, live: Sequence[bool]) -> Operations:
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    size = math.prod(getattr(out, "shape", ()))
    if name == "dot_general":
        ((contracted, _), _) = eqn.params["dimension_numbers"]
        depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
        return _matmul(2 * size * depth)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return _matmul(2 * size * math.prod(kernel) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]])
    arithmetic = name in _ELEMENTWISE | _WORTH.keys() | _REDUCTIONS | _CUMULATIVE | _SCATTERS
    if name in _FREE or (arithmetic and not jax.numpy.issubdtype(out.dtype, np.inexact)):
        return Operations(0, 0, 0, 0, ())
    if name in _ELEMENTWISE or name in _WORTH:
        work = size * _WORTH.get(name, 1)
        return Operations(work, 0, work, 0, ())
    if name in _REDUCTIONS:
        return _reduction(math.prod(eqn.invars[0].aval.shape) - size)
    if name in _CUMULATIVE:
        return _reduction(size - size // max(1, out.shape[eqn.params["axis"]]))
    if name in _SCATTERS:
        return _reduction(math.prod(eqn.invars[2].aval.shape))
    if name == "scan":
        body = eqn.params["jaxpr"].jaxpr
        return _times(_count(body, [True] * len(body.outvars)), eqn.params["length"])
    if name == "while":
        raise ValueError("a while loop may run any number of times: count a scan, or a fori_loop with constant bounds")
    if name == "cond":
        branches = [_count(branch.jaxpr, live) for branch in eqn.params["branches"]]
        return max(branches, key=lambda operations: operations.total)
    inner = [jaxpr for value in eqn.params.values() if (jaxpr := _as_jaxpr(value)) is not None]
    if inner:  # jit, remat, custom derivatives: one body each
        body = inner[0]
        return _count(body, live if len(live) == len(body.outvars) else [True] * len(body.outvars))
    return Operations(0, 0, 0, 0, (name,))


def _as_jaxpr(value: Any) -> Any:
    """The equations inside a parameter of an equation, if it holds any."""
    inner = getattr(value, "jaxpr", value)
    return inner if hasattr(inner, "eqns") else None


def _matmul(operations: int) -> Operations:
    return Operations(operations, operations, 0, 0, ())


def _reduction(operations: int) -> Operations:
    return Operations(operations, 0, 0, operations, ())


def _plus(a: Operations, b: Operations) -> Operations:
    uncounted = tuple(sorted({*a.uncounted, *b.uncounted}))
    return Operations(
        a.total + b.total, a.matmul + b.matmul, a.elementwise + b.elementwise, a.reduction + b.reduction, uncounted
    )


def _times(a: Operations, times: int) -> Operations:
    return Operations(times * a.total, times * a.matmul, times * a.elementwise, times * a.reduction, a.uncounted)


@checked
def dense_ratio(sizes: Widths) -> float:
    """(forward + backward)/forward of a dense net, matrix products alone: `3 − p₁/Σp`, p the weights of each layer.

    A layer's backward pass has two products of the size of its forward one, for its weights and for its input; the
    first layer needs no gradient of its input. Linear regression: 2; a deep net: 3.
    """
    weights = [m * n for m, n in itertools.pairwise(sizes)]
    return 3 - weights[0] / sum(weights)


# --- a chain of scalar layers ----------------------------------------------------------------------------------
#
# hₗ = tanh(wₗ hₗ₋₁), h₀ = x, loss (h_L − y)². Each function below works on any numbers with + − × ÷ and `tanh`.


def chain_forward(w: Sequence[Any], x: Any, y: Any) -> tuple[Any, list[Any], Any]:
    """The loss, the values h₀ … h_L, and the error h_L − y: 2L + 2 operations (F8)."""
    h = [_number("x", x)]
    y = _number("y", y)
    for weight in _weights(w):
        h.append(_tanh(weight * h[-1]))
    error = h[-1] - y
    return error * error, h, error


def chain_backprop(w: Sequence[Any], h: list[Any], error: Any) -> list[Any]:
    """All derivatives from one pass down, the product so far shared: 5L + 1 operations (F11 to F13)."""
    gradient, down = [], 2.0 * error
    for weight, before, after in zip(reversed(w), reversed(h[:-1]), reversed(h[1:]), strict=True):
        down = down * (1.0 - after * after)
        gradient.append(down * before)
        down = down * weight
    return gradient[::-1]


def chain_separate(w: Sequence[Any], h: list[Any], y: Any, *, share_slopes: bool) -> list[Any]:
    """Each derivative by its own chain rule from the loss down: L² + 5L operations, or 2L² + 4L without sharing σ'."""
    slopes = [1.0 - after * after for after in h[1:]] if share_slopes else None

    def slope(layer: int) -> Any:
        return 1.0 - h[layer + 1] * h[layer + 1] if slopes is None else slopes[layer]

    gradient = []
    for target in range(len(w)):
        down = 2.0 * (h[-1] - y) * slope(len(w) - 1)
        for layer in range(len(w) - 1, target, -1):
            down = down * w[layer] * slope(layer - 1)
        gradient.append(down * h[target])
    return gradient


def chain_forward_mode(w: Sequence[Any], x: Any, y: Any) -> list[Any]:
    """Each derivative by one pass up that carries value and tangent: 4L² + 5L operations."""
    w = _weights(w)
    gradient = []
    for target in range(len(w)):
        _, h, error = chain_forward(w, x, y)
        tangent = h[target]
        for layer in range(target, len(w)):
            if layer > target:
                tangent = w[layer] * tangent
            tangent = (1.0 - h[layer + 1] * h[layer + 1]) * tangent
        gradient.append(2.0 * error * tangent)
    return gradient


@checked
def chain_finite_differences(w: Sequence[Any], x: Any, y: Any, step: Positive = 1e-6) -> list[Any]:
    """Each derivative as `(L(w + step eₗ) − L(w))/step`: (L + 1)(2L + 2) + 3L operations, and inexact."""
    w = _weights(w)
    loss = chain_forward(w, x, y)[0]

    def moved(target: int) -> list[Any]:
        return [weight + step if layer == target else weight for layer, weight in enumerate(w)]

    return [(chain_forward(moved(target), x, y)[0] - loss) / step for target in range(len(w))]


@checked
def chain_operations(layers: Count) -> ChainOperations:
    """The operations of each way to differentiate a chain of `layers` layers, counted by running it."""
    weights = np.linspace(0.5, 1.5, layers)

    def tally(way: Callable[[list[Any], Any, Any], Any]) -> int:
        done = [0]
        way([Counted(float(v), done) for v in weights], Counted(0.7, done), Counted(0.3, done))
        return done[0]

    forward = tally(chain_forward)

    def after_forward(way: Callable[..., Any]) -> int:
        def both(w: list[Any], x: Any, y: Any) -> None:
            _, h, error = chain_forward(w, x, y)
            way(w, h, error, y)

        return tally(both) - forward

    return ChainOperations(
        forward,
        after_forward(lambda w, h, error, y: chain_backprop(w, h, error)),
        after_forward(lambda w, h, error, y: chain_separate(w, h, y, share_slopes=True)),
        after_forward(lambda w, h, error, y: chain_separate(w, h, y, share_slopes=False)),
        tally(chain_forward_mode),
        tally(chain_finite_differences),
    )


class Counted:
    """A number that adds one to a shared tally whenever something is computed from it."""

    def __init__(self, value: float, tally: list[int]) -> None:
        self.value = value
        self.tally = tally

    def _result(self, value: float) -> "Counted":
        self.tally[0] += 1
        return Counted(value, self.tally)

    def __add__(self, other: Any) -> "Counted":
        return self._result(self.value + _plain(other))

    def __sub__(self, other: Any) -> "Counted":
        return self._result(self.value - _plain(other))

    def __rsub__(self, other: Any) -> "Counted":
        return self._result(_plain(other) - self.value)

    def __mul__(self, other: Any) -> "Counted":
        return self._result(self.value * _plain(other))

    def __truediv__(self, other: Any) -> "Counted":
        return self._result(self.value / _plain(other))

    __radd__ = __add__
    __rmul__ = __mul__

    def tanh(self) -> "Counted":
        return self._result(math.tanh(self.value))


def _number(name: str, value: Any) -> Any:
    return value if isinstance(value, Counted) else checks.scalar(name, value)


def _weights(w: Any) -> list[Any]:
    found = [_number(f"w[{i}]", weight) for i, weight in enumerate(checks.several("w", w, sized=True))]
    if not found:
        raise ValueError("w is empty: a chain needs at least one weight")
    return found


def _plain(number: Any) -> float:
    return number.value if isinstance(number, Counted) else number


def _tanh(number: Any) -> Any:
    return number.tanh() if isinstance(number, Counted) else jax.numpy.tanh(number)
