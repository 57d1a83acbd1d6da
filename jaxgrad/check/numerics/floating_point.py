"""Right on paper: kinks, overflow and lost digits, and the third witness, central differences."""

import ast
import inspect
import re
import textwrap
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.evaluate import agreement
from jaxgrad.check.evaluate.agreement import Evaluation, Tolerance
from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import Kernel, Malformed, Problem, assemble, autodiff, by_hand, program_at
from jaxgrad.check.program.replay import forward, quick_jit
from jaxgrad.check.program.source import Where, describe, locate
from jaxgrad.check.program.steps import Place, Program, is_library, trace
from jaxgrad.check.report import Finding

# ------------------------------------------------------------------------------------------ kinks


def kink(problem: Problem, store: Kernel, failing: Sequence[Evaluation], tol: Tolerance) -> tuple[list[Finding], bool]:
    """Whether all the disagreement sits where the loss is not differentiable, and if so whether the person's
    choice there lies between the one-sided derivatives."""
    places: list[tuple[Where, str, int]] = []
    fine = True
    for e in failing:
        program = program_at(store, e.point.leaves, e.point.data)
        found = _kinks(program, e.point)
        if not found:
            return [], False
        places += found
        fine = fine and _between(problem, store, e)
    where, name, count = max(places, key=lambda p: p[2])
    wrong = sorted({i for e in failing for i in agreement.wrong_leaves(e, tol)})
    autodiff = failing[0].true[wrong[0]].reshape(-1)
    mine = failing[0].hand[wrong[0]].reshape(-1)
    worst = int(np.argmax(np.abs(autodiff - mine)))
    sentence = (
        f"Your gradient is right wherever the loss is differentiable. At {failing[0].point.name}, {count} "
        f"input{'s' if count > 1 else ''} of {name} in {where.step} "
        f"sit{'' if count > 1 else 's'} exactly at its kink, and there JAX chose another slope than you "
        f"({autodiff[worst]:.6g} against your {mine[worst]:.6g} in {problem.paths[wrong[0]]})."
    )
    if fine:
        sentence += " Both lie between the slopes on the two sides: yours is as good."
    else:
        sentence += " Yours does not lie between the slopes on the two sides."
    leaf = problem.paths[wrong[0]] if len(wrong) == 1 and len(problem.paths) > 1 else None
    return [Finding("kink", leaf, None, where.where, where.expression, sentence)], fine


def _kinks(program: Program, point: Point) -> list[tuple[Where, str, int]]:
    values = jax.device_get(quick_jit(lambda ls, ds: forward(program, ls, ds))(list(point.leaves), list(point.data)))
    found = []
    for k, step in enumerate(program.steps):
        if not set(step.inputs) & program.moving:
            continue
        names = set(step.inner)
        inputs = [np.asarray(values[s]) for s in step.inputs]
        ties = 0
        if step.primitive in ("abs", "sign", "sqrt") or (
            step.primitive.startswith("custom_") and names & {"max", "abs"}
        ):
            ties = int(np.sum(inputs[0] == 0))
        elif step.primitive in ("max", "min", "gt", "ge", "lt", "le", "eq", "ne"):
            ties = int(np.sum(inputs[0] == inputs[1]))
        elif step.primitive == "clamp":
            ties = int(np.sum((inputs[1] == inputs[0]) | (inputs[1] == inputs[2])))
        if ties:
            found.append(
                (
                    locate(program, [k], elementwise=True),
                    {"max": "the maximum", "abs": "the absolute value"}.get(step.name, step.name),
                    ties,
                )
            )
    return found


def _between(problem: Problem, store: Kernel, e: Evaluation) -> bool:
    rng = np.random.default_rng(3)
    for _ in range(4):
        u = [rng.standard_normal(p.shape) for p in e.point.leaves]
        size = float(np.sqrt(sum(float(np.sum(p**2)) for p in e.point.leaves))) or 1.0
        h = 1e-6 * size / float(np.sqrt(sum(float(np.sum(x**2)) for x in u)))
        up, _ = autodiff(store, tuple(p + h * x for p, x in zip(e.point.leaves, u, strict=True)), e.point.data)
        down, _ = autodiff(store, tuple(p - h * x for p, x in zip(e.point.leaves, u, strict=True)), e.point.data)
        sides = [(up - e.loss) / h, (e.loss - down) / h]
        auto = float(sum(np.sum(g * x) for g, x in zip(e.true, u, strict=True)))
        mine = float(sum(np.sum(g * x) for g, x in zip(e.hand, u, strict=True)))
        slack = max(abs(sides[0] - sides[1]), abs(auto - sides[0]), abs(auto - sides[1]))
        if not min(sides) - slack - 1e-6 * abs(auto) <= mine <= max(sides) + slack + 1e-6 * abs(auto):
            return False
    return True


# ------------------------------------------------------------------------------------ floating point


def unstable(
    problem: Problem,
    store: Kernel,
    evaluations: Sequence[Evaluation],
    noisy: Sequence[tuple[Evaluation, int]],
    single: bool,
) -> tuple[list[Finding], bool]:
    """NaN, infinity or lost digits in the person's gradient, and whether the loss's own gradient is fine there.

    `noisy` are points and leaves where the person's gradient differs and shows more rounding than autodiff;
    `single` says that one of the two computes in float32, where numbers beyond 1e38 are infinite by right.
    """
    largest = 1e30 if single else 1e300
    shared = None
    for e in evaluations:
        if e.hand_finite:
            continue
        if e.true_finite:
            if max(float(np.max(np.abs(g), initial=0.0)) for g in e.true) < largest:
                return [_overflow(problem, store, e)], True
        elif shared is None:
            shared = e
    if shared is not None and _spurious(problem, store, shared):
        return [_overflow(problem, store, shared)], False
    for e, i in noisy:
        if _witness_sides_with_truth(problem, store, e, i):
            error, size = agreement.errors(e)[i], float(np.linalg.norm(e.true[i]))
            digits = max(0.0, -np.log10(max(error / max(size, 1e-300), 1e-16)))
            place = _first_use(problem, store, e)
            sentence = (
                f"Right on paper, but digits are lost: at {e.point.name} only {digits:.0f} of 15 digits of "
                f"{problem.paths[i]} agree with autodiff, and central differences side with autodiff. Look for "
                "a difference of two nearly equal numbers."
            )
            return [Finding("unstable", problem.paths[i], None, place.where, place.expression, sentence)], True
    return [], False


def _spurious(problem: Problem, store: Kernel, e: Evaluation) -> bool:
    """Whether loss and gradient both fail although the loss, just before, is an ordinary number."""
    good, loss = 0.0, None
    low, high = 1e-3, 1.0
    typical, _ = autodiff(store, tuple(0.03 * p for p in e.point.leaves), e.point.data)
    for _ in range(30):
        middle = float(np.sqrt(low * high))
        value, gradient = autodiff(store, tuple(middle * p for p in e.point.leaves), e.point.data)
        if np.isfinite(value) and all(np.all(np.isfinite(g)) for g in gradient):
            low, good, loss = middle, middle, value
        else:
            high = middle
        if high / low < 1.001:
            break
    if good == 0.0 or loss is None or not np.isfinite(typical):
        return False
    return abs(loss) <= 1e8 * max(abs(typical), 1e-300)


def _overflow(problem: Problem, store: Kernel, e: Evaluation) -> Finding:
    threshold = _threshold(problem, e)
    leaves = tuple(threshold * p for p in e.point.leaves)
    bad = [problem.paths[i] for i, g in enumerate(e.hand) if not np.all(np.isfinite(g))]
    kinds = "NaN" if any(np.any(np.isnan(g)) for g in e.hand) else "infinite"
    where, how, advice = _mechanism(problem, leaves, e.point.data)
    size = _largest_logit(problem, store, leaves, e.point.data)
    from_where = f"at {e.point.name}" if e.point.name.startswith("the given") else "away from the start"
    first = f"Right on paper, but it is {kinds} {from_where}"
    if e.point.name.startswith("parameters"):
        first = f"Right on paper, but it turns {kinds} for large parameters"
    if size is not None:
        first += f", from |{size[0]}| of about {size[1]:.4g} on"
    sentence = f"{first}, in {', '.join(bad)}. {how} {advice}".strip()
    if not e.true_finite:
        sentence += " Autodiff of this loss fails there too, so the loss needs a stable form as well."
    leaf = bad[0] if len(bad) == 1 and len(problem.paths) > 1 else None
    return Finding("unstable", leaf, None, where.where, where.expression, sentence)


def _threshold(problem: Problem, e: Evaluation) -> float:
    """The smallest multiple of the parameters, to a thousandth, at which the person's gradient fails."""
    low, high = 1e-4, 1.0
    for _ in range(40):
        middle = float(np.sqrt(low * high))
        got = by_hand(problem, tuple(middle * p for p in e.point.leaves), e.point.data)
        if not isinstance(got, Malformed) and all(np.all(np.isfinite(g)) for g in got):
            low = middle
        else:
            high = middle
        if high / low < 1.0005:
            break
    return high


def _largest_logit(
    problem: Problem, store: Kernel, leaves: Sequence[Any], data: Sequence[Any]
) -> tuple[str, float] | None:
    """The smallest input, in size, of the loss's first sigmoid or exponential among the examples that fail."""
    sizes = []
    name = None
    for row in range(problem.n or 0):
        one = tuple(
            a if axis is None else np.take(a, [row], axis=axis)
            for a, axis in zip(data, problem.axes, strict=True)
            if axis is None or row < a.shape[axis]
        )
        if len(one) != len(data):
            break
        try:
            got = by_hand(problem, leaves, one)
            if isinstance(got, Malformed) or all(np.all(np.isfinite(g)) for g in got):
                continue
            found = _first_exponent(store, leaves, one)
        except Exception:  # a gradient that cannot take one example alone
            return None
        if found is None:
            return None
        name, size = found
        sizes.append(size)
    return (name, min(sizes)) if name is not None and sizes else None


def _first_exponent(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> tuple[str, float] | None:
    program = program_at(store, leaves, data)
    values = forward(program, [jnp.asarray(p) for p in leaves], [jnp.asarray(d) for d in data])
    makers = {o: step for step in program.steps for o in step.outputs}
    for step in program.steps:
        moved = [s for s in step.inputs if s in program.moving]
        if not (moved and set(step.inner) & {"logistic", "exp", "tanh", "log1p"}):
            continue
        slot = moved[0]
        # Back to what the person calls the logit: past steps of the same expression (z - max in a softmax).
        while slot in makers and (makers[slot].primitive == "neg" or makers[slot].frames[:1] == step.frames[:1]):
            back = [s for s in makers[slot].inputs if s in program.moving]
            if not back:
                break
            slot = back[0]
        peak = float(np.max(np.abs(np.asarray(values[slot]))))
        number = next((k for k, m in enumerate(program.steps) if slot in m.outputs), None)
        if number is None or not np.isfinite(peak):
            return None
        place = locate(program, [number])
        named = re.fullmatch(r"(\w+)\s*=\s*(.+)", place.statement)
        return (named[1] if named and named[2] == place.expression else place.expression or "z", peak)
    return None


def _mechanism(problem: Problem, leaves: Sequence[Any], data: Sequence[Any]) -> tuple[Where, str, str]:
    """The first step of the person's own gradient that makes a NaN or an infinity."""

    def total(leaves_: Sequence[Any], data_: Sequence[Any]) -> Any:
        params, arguments, keywords = assemble(problem.spec, leaves_, data_, numpy=False)
        result = problem.gradient(params, *arguments, **keywords)
        return sum(jnp.sum(jnp.asarray(x)) for x in jax.tree_util.tree_leaves(result))

    try:
        program = trace(total, leaves, data)
    except Exception:
        return _numpy_mechanism(problem, leaves, data)
    values: dict[int, Any] = dict(program.constants)
    values.update(zip(program.leaves, map(jnp.asarray, leaves), strict=True))
    values.update(zip(program.data, map(jnp.asarray, data), strict=True))
    infinite: tuple[Where, str, str] | None = None
    overflows = divides = False
    for k, step in enumerate(program.steps):
        inputs = [values[s] for s in step.inputs]
        outputs = step.call(*inputs)
        values.update(zip(step.outputs, outputs, strict=True))
        out = np.asarray(outputs[0])
        if out.dtype.kind != "f" or not step.frames:
            continue
        arrays = [np.broadcast_to(x, out.shape) if np.ndim(x) == 0 else np.asarray(x) for x in inputs]
        floats = [a for a in arrays if a.dtype.kind == "f"]
        new = np.any(np.isinf(out)) and not any(np.any(np.isinf(a)) for a in floats)
        overflows = overflows or bool(new and set(step.inner) & _EXPONENTIALS)
        by_zero = step.primitive == "div" and bool(np.any(arrays[1] == 0))
        divides = divides or by_zero
        if np.any(np.isnan(out)) and not any(np.any(np.isnan(a)) for a in floats):
            where = locate(program, [k])
            how = _how(step.primitive, arrays, out)
            told = _advice(problem, where, overflows, divides or step.primitive == "div")
            return where, f"In {where.step} {how}.", told
        if infinite is None and new:
            where = locate(program, [k])
            what = "divides by zero" if by_zero else "overflows"
            infinite = (
                where,
                f"{where.step} {what}.",
                _advice(problem, where, overflows, divides),
            )
    return infinite or (Where("", "", "", 0), "", "")


_EXPONENTIALS = {"exp", "exp2", "expm1", "sinh", "cosh"}


def _how(primitive: str, arrays: Sequence[Any], out: np.ndarray) -> str:
    spot = tuple(np.argwhere(np.isnan(out))[0])
    operands = [a[spot] for a in arrays if a.shape == out.shape]
    if primitive in ("mul", "dot_general", "reduce_sum") and len(operands) == 2:
        return f"{_plain(operands[0])} times {_plain(operands[1])} makes NaN"
    if primitive == "div" and len(operands) == 2:
        return f"{_plain(operands[0])} is divided by {_plain(operands[1])}, which makes NaN"
    if primitive in ("sub", "add") and len(operands) == 2:
        return f"infinity {'minus' if primitive == 'sub' else 'plus'} infinity makes NaN"
    return "an infinity meets a zero or another infinity, which makes NaN"


def _plain(x: Any) -> str:
    return "infinity" if np.isposinf(x) else "-infinity" if np.isneginf(x) else f"{float(x):.3g}"


_SIGMOID = r"1(\.0?)?\s*/\s*\(1(\.0?)?\s*\+\s*\w*\.?exp|sigmoid|expit|logistic"


def _advice(problem: Problem, where: Where, overflows: bool, divides: bool) -> str:
    """The stable form for what happened: an exponential overflowed, or the step at `where` divides by zero."""
    text = f"{_code_of(problem.gradient)} {where.expression} {where.statement}"
    sigmoid = re.search(_SIGMOID, text) is not None
    softmax = "softmax" in text or ("exp(" in text and "sum" in text and not sigmoid)
    if divides and sigmoid and not softmax:
        return (
            "Algebra helps: [-y/p + (1 - y)/(1 - p)] p (1 - p) = p - y, which never divides by zero; "
            "and 1/(1 + exp(-z)) is jax.nn.sigmoid(z)."
        )
    if overflows and not sigmoid and (softmax or "sum" in text):
        return "Subtract the largest logit before exp, as jax.nn.softmax and jax.nn.log_softmax do."
    if overflows:
        return "Use the form that only takes exp of negative numbers, as jax.nn.sigmoid and jax.nn.softplus do."
    if divides and softmax:
        return (
            "It divides by a probability that has become 0. Algebra helps: the derivative of -sum(y log softmax(z)) by "
            "z is softmax(z) sum(y) - y, which divides by none."
        )
    return ""


def _code_of(function: Callable[..., Any]) -> str:
    """The text of a function without its comments; empty where there is none."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return ""
    try:
        return ast.unparse(ast.parse(source))
    except (SyntaxError, ValueError):  # a lambda in the middle of a call
        return source


def _numpy_mechanism(problem: Problem, leaves: Sequence[Any], data: Sequence[Any]) -> tuple[Where, str, str]:
    """The same for numpy code: let numpy raise at the first invalid operation."""
    large = str(_numpy_error(problem, leaves, data, {"over": "raise"}) or "")
    overflows = any(large.endswith(f" in {name}") for name in _EXPONENTIALS)
    zero = str(_numpy_error(problem, leaves, data, {"divide": "raise"}) or "")
    settings: list[dict[str, Any]] = [{"invalid": "raise"}, {"invalid": "raise", "divide": "raise", "over": "raise"}]
    for setting in settings:
        error = _numpy_error(problem, leaves, data, setting)
        if error is None:
            continue
        frames = [f for f in traceback.extract_tb(error.__traceback__) if not is_library(f.filename)]
        if not frames:
            break
        f = frames[-1]
        place = Place(f.filename, f.name, f.lineno or 0, f.colno or 0, f.end_lineno or f.lineno or 0, f.end_colno or 0)
        where = describe(place)
        how = f"In {where.step}: {error}."
        return where, how, _advice(problem, where, overflows, "divide" in zero + str(error))
    return Where("", "", "", 0), "", ""


def _numpy_error(
    problem: Problem, leaves: Sequence[Any], data: Sequence[Any], setting: dict[str, Any]
) -> FloatingPointError | None:
    """What NumPy raises first in the person's gradient with this setting, everything else ignored."""
    params, arguments, keywords = assemble(problem.spec, leaves, data, numpy=True)
    try:
        with np.errstate(**{"all": "ignore", **setting}):
            problem.gradient(params, *arguments, **keywords)
    except FloatingPointError as error:
        return error
    except Exception:  # whatever else it raises
        return None
    return None


def _first_use(problem: Problem, store: Kernel, e: Evaluation) -> Where:
    program = program_at(store, e.point.leaves, e.point.data)
    for k, step in enumerate(program.steps):
        if set(step.inner) & {"logistic", "exp", "tanh", "log", "log1p", "sqrt"} and step.frames:
            return locate(program, [k], elementwise=True)
    return Where("", "", "", 0)


# ---------------------------------------------------------------------------------------- third witness


def central_difference(
    value: Callable[[float], float], steps: Sequence[float] = (1e-3, 3e-4, 1e-4, 3e-5, 1e-5)
) -> tuple[float, float]:
    """The derivative at 0 by Richardson's central differences, and an estimate of its error.

    D(h) = [f(h) − f(−h)] / 2h has error ~h²; (4 D(h/2) − D(h)) / 3 has error ~h⁴. The estimate is the
    smallest change between neighbouring h, so no h need be right in advance.
    """
    refined = []
    for h in steps:
        coarse = (value(h) - value(-h)) / (2 * h)
        fine = (value(h / 2) - value(-h / 2)) / h
        refined.append((4 * fine - coarse) / 3)
    gaps = [abs(a - b) for a, b in zip(refined[1:], refined[:-1], strict=True)]
    best = int(np.nanargmin(gaps)) if np.any(np.isfinite(gaps)) else 0
    return refined[best + 1], gaps[best]


def _directional(store: Kernel, e: Evaluation, u: Sequence[Any]) -> tuple[float, float]:
    return central_difference(
        lambda h: autodiff(store, tuple(p + h * x for p, x in zip(e.point.leaves, u, strict=True)), e.point.data)[0]
    )


def _witness_sides_with_truth(problem: Problem, store: Kernel, e: Evaluation, leaf: int) -> bool:
    gap = e.hand[leaf] - e.true[leaf]
    length = float(np.linalg.norm(gap))
    scale = float(np.max(np.abs(e.point.leaves[leaf]))) or 1.0
    u = [np.zeros_like(p) for p in e.point.leaves]
    u[leaf] = gap / length * scale * 1e-2
    slope, doubt = _directional(store, e, u)
    auto, mine = float(np.sum(e.true[leaf] * u[leaf])), float(np.sum(e.hand[leaf] * u[leaf]))
    return doubt < 0.3 * abs(auto - mine) and abs(slope - auto) < 0.2 * abs(slope - mine)


def custom_rules(
    problem: Problem, store: Kernel, usable: Sequence[Evaluation], tol: Tolerance, agrees: bool
) -> list[Finding]:
    """A custom derivative rule of the loss that central differences contradict."""
    program = program_at(store, problem.leaves, problem.data)
    rules = [
        k for k, s in enumerate(program.steps) if s.primitive.startswith("custom_") and set(s.inputs) & program.moving
    ]
    if not rules:
        return []
    rng = np.random.default_rng(5)
    drawn = [e for e in usable if e.point.name == "drawn parameters"] or list(usable)
    e = drawn[0]
    u = [rng.standard_normal(p.shape) * (float(np.sqrt(np.mean(p**2))) or 1.0) for p in e.point.leaves]
    slope, doubt = _directional(store, e, u)
    auto = float(sum(np.sum(g * x) for g, x in zip(e.true, u, strict=True)))
    scale = float(np.sqrt(sum(float(np.sum(g**2)) for g in e.true)) * np.sqrt(sum(float(np.sum(x**2)) for x in u)))
    if not abs(slope - auto) > 1e-5 * scale + 10 * doubt + 1e3 * tol.noise * scale:
        return []
    for k in rules:
        where = _contradicted(k, e.point, store)
        if where is None:
            continue
        mine = float(sum(np.sum(g * x) for g, x in zip(e.hand, u, strict=True)))
        whose = "Your gradient agrees with autodiff, and so has the same mistake."
        if not agrees:
            close = abs(mine - slope) < 0.01 * abs(auto - slope)
            whose = "Your gradient agrees with central differences." if close else "Your gradient agrees with neither."
        sentence = (
            f"The loss itself has a wrong custom derivative: {where.step} carries its own "
            f"rule, and central differences of its values contradict it. {whose} If the rule is meant "
            "(straight-through, clipped), pass accept_rules=True."
        )
        return [Finding("wrong-derivative", None, None, where.where, where.expression, sentence)]
    return []


def rules(program: Program) -> list[Where]:
    """Where the loss uses functions that carry a derivative rule written by a person."""
    found = [
        locate(program, [k], elementwise=True)
        for k, s in enumerate(program.steps)
        if s.primitive.startswith("custom_") and set(s.inputs) & program.moving
    ]
    return list(dict.fromkeys(place for place in found if place.where))


def _contradicted(k: int, point: Point, store: Kernel) -> Where | None:
    """Where step k is written, if its rule and its values disagree at this point."""
    program = program_at(store, point.leaves, point.data)
    values = forward(program, [jnp.asarray(p) for p in point.leaves], [jnp.asarray(d) for d in point.data])
    step = program.steps[k]
    arguments = [values[s] for s in step.inputs]
    moving = [i for i, s in enumerate(step.inputs) if s in program.moving]
    rng = np.random.default_rng(6)

    def value(*moved: Any) -> Any:
        full = list(arguments)
        for i, x in zip(moving, moved, strict=True):
            full[i] = x
        return step.call(*full)[0]

    start = [arguments[i] for i in moving]
    out, pull = jax.vjp(value, *start)
    weight = jnp.asarray(rng.standard_normal(out.shape), out.dtype)
    back = pull(weight)
    u = [rng.standard_normal(x.shape) * (float(np.sqrt(np.mean(np.asarray(x) ** 2))) or 1.0) for x in start]

    def along(h: float) -> float:
        return float(jnp.sum(weight * value(*[x + h * d for x, d in zip(start, u, strict=True)])))

    slope, doubt = central_difference(along)
    auto = float(sum(float(jnp.sum(b * d)) for b, d in zip(back, u, strict=True)))
    parts = float(sum(float(jnp.sum(jnp.abs(b * d))) for b, d in zip(back, u, strict=True)))
    if abs(slope - auto) > 1e-5 * (parts + abs(slope)) + 10 * doubt:
        return locate(program, [k], elementwise=True)
    return None
