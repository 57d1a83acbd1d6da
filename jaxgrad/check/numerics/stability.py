"""`stability`: the same formula in float32, in float64 and exactly, as its logits grow.

The formula is traced and run three times: in each floating type, and with decimals of hundreds of digits, where
nothing rounds, overflows or cancels. The table says how many digits survive; the summary where half of
them are gone and where it turns NaN or infinite.
"""

import decimal
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import checks
from jaxgrad.check.evaluate.agreement import norm
from jaxgrad.check.evaluate.problem import NO_BATCH
from jaxgrad.check.program.steps import Program, Step, flatten, jaxpr_of
from jaxgrad.check.report import colored, painter
from jaxgrad.checks import checked

DIGITS = 1200
SCALES = (
    1.0,
    2.0,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    35.0,
    40.0,
    60.0,
    80.0,
    90.0,
    100.0,
    200.0,
    500.0,
    700.0,
    720.0,
    1000.0,
)


class Row(NamedTuple):
    """One size of the parameters."""

    scale: float
    digits32: float
    """Digits that agree with the truth, 0 to 7.2; nan where the value is NaN, -inf where it is infinite."""
    digits64: float
    """The same in float64, 0 to 15.7."""
    truth: float
    """Norm of the true gradient."""


class Stability(NamedTuple):
    """Where a formula stops working in floating point."""

    rows: tuple[Row, ...]
    half: Mapping[str, float | None]
    """By type, the first scale at which half the digits are lost; None if nowhere."""
    fails: Mapping[str, float | None]
    """By type, the scale from which it is NaN or infinite, by bisection; None if nowhere."""
    where: str
    """The line that fails first in float64."""
    exact: str
    """What the truth is: the formula in decimals, or the stable form in float64."""

    def __str__(self) -> str:
        return stability_text(self, colored())


@checked
def stability(
    gradient: Callable[..., Any],
    params: Any,
    batch: Any = NO_BATCH,
    *,
    stable: Callable[..., Any] | None = None,
    scales: Sequence[float] = SCALES,
) -> Stability:
    """How many digits `gradient(params, batch)` keeps when the parameters are multiplied by each of `scales`.

    With `params = 1.0` and a function of one logit, the scale is the logit. The truth is the formula itself in
    decimals with 1,200 digits (JAX code whose steps are arithmetic, exp, log, tanh, sqrt, comparisons, sums
    and matrix products), else `stable(params, batch)` in float64. Raises `ValueError` if neither can be had.
    """
    arguments = () if batch is NO_BATCH else (batch,)
    ordered = tuple(sorted(set(checks.array("scales", scales, "scales", least=1).tolist())))
    _check_numbers(params, batch)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        leaves, tree = jax.tree_util.tree_flatten(params)
        data, data_tree = jax.tree_util.tree_flatten(arguments)
        where = ""

        def run(function: Callable[..., Any], scale: float, dtype: Any) -> np.ndarray:
            scaled = [jnp.asarray(scale * np.asarray(p, np.float64), dtype) for p in leaves]
            held = [jnp.asarray(d, dtype) if np.asarray(d).dtype.kind == "f" else jnp.asarray(d) for d in data]
            with np.errstate(all="ignore"):
                result = function(
                    jax.tree_util.tree_unflatten(tree, scaled), *jax.tree_util.tree_unflatten(data_tree, held)
                )
            return _flat(result)

        truth, exact = _truth(gradient, stable, run, leaves, tree, data, data_tree)
        rows = []
        for scale in ordered:
            true = truth(scale)
            d32 = _digits(run(gradient, scale, np.float32), true, 7.2)
            rows.append(Row(scale, d32, _digits(run(gradient, scale, np.float64), true, 15.7), norm(true)))
        half: dict[str, float | None] = {}
        fails: dict[str, float | None] = {}
        for name, dtype, full in (("float32", np.float32, 7.2), ("float64", np.float64, 15.7)):
            column = [r.digits32 if dtype is np.float32 else r.digits64 for r in rows]
            lost = [r.scale for r, d in zip(rows, column, strict=True) if not d >= full / 2]
            half[name] = lost[0] if lost else None
            fails[name] = _threshold(lambda s, t=dtype: run(gradient, s, t), ordered)
        if fails["float64"] is not None:
            where = _line(gradient, fails["float64"], leaves, tree, data, data_tree)
    return Stability(tuple(rows), half, fails, where, exact)


def _check_numbers(params: Any, batch: Any) -> None:
    """Raise TypeError or ValueError unless all leaves are numbers, those of the parameters finite."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params hold no numbers: give 1.0 or a tree of arrays")
    for path, leaf in leaves:
        if checks.array(f"params{jax.tree_util.keystr(path)}", leaf).size == 0:
            raise ValueError(f"params{jax.tree_util.keystr(path)} is empty: it has shape {np.shape(leaf)}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(() if batch is NO_BATCH else batch):
        checks.array(f"batch{jax.tree_util.keystr(path)}", leaf, finite=False, bools=True)


def stability_text(found: Stability, color: bool = False) -> str:
    """The table, with a bar of the digits that are left, and the thresholds in words."""
    paint = painter(color)
    lines = [f"  {'scale':>8}  {'|gradient|':>11}  {'float32':<22}{'float64':<26}"]
    for row in found.rows:
        cells = []
        for digits, full, width in ((row.digits32, 7.2, 7), (row.digits64, 15.7, 16)):
            if math.isnan(digits):
                cell, style = "NaN", ("red", "bold")
            elif math.isinf(digits):
                cell, style = "overflow", ("red", "bold")
            else:
                filled = round(max(0.0, digits))
                cell = f"{'#' * filled}{'.' * (width - filled)} {digits:4.1f}"
                style = () if digits >= full / 2 else ("yellow",)
            cells.append(paint(f"{cell:<{width + 8}}", *style))
        lines.append(f"  {row.scale:>8g}  {row.truth:>11.3e}  " + "       ".join(cells))
    for name in ("float32", "float64"):
        half, fails = found.half[name], found.fails[name]
        if half is None and fails is None:
            lines.append(f"  {name}: keeps more than half its digits everywhere tried.")
            continue
        text = f"  {name}:"
        if half is not None and (fails is None or half < fails):
            text += f" half its digits are lost at {half:g}"
            text += ", and it" if fails is not None else "."
        elif fails is not None:
            text += " it"
        if fails is not None:
            text += f" turns NaN or infinite from {fails:.10g} on."
        lines.append(text)
    if found.where:
        lines.append(f"  It fails first in {found.where}.")
    lines.append(f"  Truth: {found.exact}.")
    return "\n".join(lines)


def _truth(
    gradient: Callable[..., Any],
    stable: Callable[..., Any] | None,
    run: Callable[..., np.ndarray],
    leaves: Sequence[Any],
    tree: Any,
    data: Sequence[Any],
    data_tree: Any,
) -> tuple[Callable[[float], np.ndarray], str]:
    try:
        program, n = _program(gradient, leaves, tree, data, data_tree)
        exactly = lambda scale: _decimal_run(program, n, [scale * np.asarray(p, np.float64) for p in leaves], data)
        exactly(1.0)
        return exactly, "the same formula in decimals of 1,200 digits"
    except Exception as error:
        if stable is None:
            raise ValueError(
                f"this formula cannot be run in decimals ({str(error).splitlines()[0]}); "
                "pass stable=, a form of it that is safe in float64."
            ) from None
    return lambda scale: run(stable, scale, np.float64), "the stable form in float64"


def _program(
    gradient: Callable[..., Any], leaves: Sequence[Any], tree: Any, data: Sequence[Any], data_tree: Any
) -> tuple[Program, int]:
    """The formula as steps, its leaves put end to end by a last step."""

    def function(flat: Sequence[Any], held: Sequence[Any]) -> Any:
        result = gradient(jax.tree_util.tree_unflatten(tree, flat), *jax.tree_util.tree_unflatten(data_tree, held))
        parts = [jnp.ravel(jnp.asarray(x)) for x in jax.tree_util.tree_leaves(result)]
        return jnp.concatenate(parts) if len(parts) > 1 else parts[0]

    start = [jnp.asarray(p, np.float64) for p in leaves]
    held = [jnp.asarray(d) for d in data]
    # In decimals a softmax is run exponential by exponential.
    return flatten(jaxpr_of(function, start, held), len(leaves), named=False), len(leaves)


def _flat(result: Any) -> np.ndarray:
    return np.concatenate([np.asarray(x, np.float64).reshape(-1) for x in jax.tree_util.tree_leaves(result)])


def _digits(got: np.ndarray, true: np.ndarray, full: float) -> float:
    """Digits of agreement in norm; nan or -inf where the value is."""
    if np.any(np.isnan(got)):
        return math.nan
    if np.any(np.isinf(got)):
        return -math.inf
    size = norm(true)
    error = norm(got - true)
    if error == 0:
        return full
    return max(0.0, min(full, -math.log10(error / size))) if size > 0 else 0.0


def _threshold(run: Callable[[float], np.ndarray], scales: Sequence[float]) -> float | None:
    bad = next((i for i, s in enumerate(scales) if not np.all(np.isfinite(run(s)))), None)
    if bad is None:
        return None
    low, high = (scales[bad - 1] if bad else 0.0), scales[bad]
    for _ in range(80):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if np.all(np.isfinite(run(middle))):
            low = middle
        else:
            high = middle
    return high


def _line(
    gradient: Callable[..., Any], scale: float, leaves: Sequence[Any], tree: Any, data: Sequence[Any], data_tree: Any
) -> str:
    from jaxgrad.check.program.source import locate

    try:
        program, _ = _program(gradient, leaves, tree, data, data_tree)
    except Exception:
        return ""
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.leaves, [jnp.asarray(scale * np.asarray(p, np.float64)) for p in leaves], strict=True))
    values.update(zip(program.data, [jnp.asarray(d) for d in data], strict=True))
    first = ""
    for k, step in enumerate(program.steps):
        out = step.call(*[values[s] for s in step.inputs])
        values.update(zip(step.outputs, out, strict=True))
        array = np.asarray(out[0])
        if array.dtype.kind != "f" or np.all(np.isfinite(array)):
            continue
        place = locate(program, [k])
        text = place.step if place.where else step.name
        if np.any(np.isnan(array)):
            return text
        first = first or text
    return first


# ------------------------------------------------------------------------------- running steps in decimals


def _decimal_run(program: Program, n: int, leaves: Sequence[Any], data: Sequence[Any]) -> np.ndarray:
    del n
    with decimal.localcontext() as context:
        context.prec = DIGITS
        context.Emax, context.Emin = decimal.MAX_EMAX, decimal.MIN_EMIN
        context.traps[decimal.Overflow] = False
        context.traps[decimal.InvalidOperation] = False
        context.traps[decimal.DivisionByZero] = False
        values: dict[int, Any] = {s: _lift(v) for s, v in program.constants.items()}
        values.update(zip(program.leaves, map(_lift, leaves), strict=True))
        values.update(zip(program.data, map(_lift, data), strict=True))
        for step in program.steps:
            values[step.outputs[0]] = _decimal_step(step, [values[s] for s in step.inputs], program)
        return np.array([float(x) for x in values[program.output].reshape(-1)])


def _lift(value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind != "f":
        return array
    out = np.empty(array.shape, object)
    for index in np.ndindex(array.shape):
        out[index] = decimal.Decimal(float(array[index]))
    return out


def _each(function: Callable[[Any], Any]) -> Callable[..., np.ndarray]:
    def apply(x: np.ndarray) -> np.ndarray:
        out = np.empty(x.shape, object)
        for index in np.ndindex(x.shape):
            out[index] = function(x[index])
        return out

    return apply


def _tanh(x: decimal.Decimal) -> decimal.Decimal:
    e = (-2 * abs(x)).exp()
    return ((1 - e) / (1 + e)).copy_sign(x)


_ONE = decimal.Decimal(1)
_EACH: dict[str, Callable[[Any], Any]] = {
    "exp": lambda x: x.exp(),
    "exp2": lambda x: decimal.Decimal(2) ** x,
    "log": lambda x: x.ln(),
    "log1p": lambda x: (1 + x).ln(),
    "expm1": lambda x: x.exp() - 1,
    "logistic": lambda x: _ONE / (1 + (-x).exp()),
    "tanh": _tanh,
    "sqrt": lambda x: x.sqrt(),
    "rsqrt": lambda x: 1 / x.sqrt(),
    "abs": abs,
    "neg": lambda x: -x,
    "square": lambda x: x * x,
    "sign": lambda x: decimal.Decimal((x > 0) - (x < 0)),
    "is_finite": lambda x: bool(x.is_finite()),
}
_PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add,
    "add_any": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "and": np.logical_and,
    "or": np.logical_or,
}


def _decimal_step(step: Step, inputs: list[np.ndarray], program: Program) -> np.ndarray:
    """One step on arrays of decimals."""
    name, params = step.primitive, step.params
    x = inputs[0]
    shape = tuple(program.avals[step.outputs[0]].shape)
    if name in _EACH:
        out = _each(_EACH[name])(x)
        return out.astype(bool) if name == "is_finite" else out
    if name in _PAIRS:
        out = np.asarray(_PAIRS[name](x, inputs[1]))
        return out.astype(bool) if name in ("gt", "ge", "lt", "le", "eq", "ne", "and", "or") else _object(out)
    if name == "integer_pow":
        return _each(lambda v: v ** params["y"])(x)
    if name in ("stop_gradient", "copy", "copy_p", "name", "reduce_precision"):
        return x
    if name == "convert_element_type":
        if np.dtype(params["new_dtype"]).kind == "f":
            return x if x.dtype == object else _lift(x.astype(np.float64))
        return x.astype(params["new_dtype"]) if x.dtype != object else np.vectorize(int)(x)
    if name == "broadcast_in_dim":
        spread = [1] * len(shape)
        for i, d in enumerate(params["broadcast_dimensions"]):
            spread[d] = x.shape[i]
        return np.broadcast_to(x.reshape(spread), shape)
    if name in ("reshape", "squeeze", "expand_dims"):
        return x.reshape(shape)
    if name == "transpose":
        return np.transpose(x, params["permutation"])
    if name == "concatenate":
        return np.concatenate(inputs, axis=params["dimension"])
    if name in ("reduce_sum", "reduce_max", "reduce_min"):
        function = {"reduce_sum": np.sum, "reduce_max": np.max, "reduce_min": np.min}[name]
        return _object(np.asarray(function(x, axis=tuple(params["axes"]))))
    if name == "select_n":
        return np.where(np.asarray(x, bool), inputs[2], inputs[1])
    if name == "dot_general":
        (left, right), (batch_left, _) = params["dimension_numbers"]
        if not batch_left:
            return _object(np.asarray(np.tensordot(x, inputs[1], axes=(left, right))))
    if name.startswith("custom_"):
        inner = params.get("call_jaxpr") or params.get("fun_jaxpr")
        if inner is not None:
            return _decimal_call(flatten(inner, len(inputs)), inputs)
    raise ValueError(f"no exact form of the step `{name}`")


def _decimal_call(program: Program, inputs: list[np.ndarray]) -> np.ndarray:
    values: dict[int, Any] = {s: _lift(v) for s, v in program.constants.items()}
    values.update(zip(program.leaves, inputs, strict=True))
    for step in program.steps:
        values[step.outputs[0]] = _decimal_step(step, [values[s] for s in step.inputs], program)
    return values[program.output]


def _object(x: np.ndarray) -> np.ndarray:
    return x if x.dtype == object else x.astype(object)
