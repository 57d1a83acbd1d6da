"""A verdict on a gradient whose loss JAX cannot trace: by complex steps or central differences, with a bound."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.check import patterns
from jaxgrad.check.evaluate import agreement, examples, points
from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.blame import raised_by, read_by
from jaxgrad.check.evaluate.factors import name_factor
from jaxgrad.check.evaluate.held import arrays_in
from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import Malformed, Problem, assemble, by_hand
from jaxgrad.check.report import Finding, Report, Tried

STEPS = (1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5)
MOST_EVALUATIONS = 60_000
"""Of the loss, in one check; beyond it a sample of the entries is tried."""

Value = Callable[[Sequence[np.ndarray], Sequence[Any]], Any]


class Slopes(NamedTuple):
    """The derivative of a loss at a point by differences."""

    gradient: tuple[np.ndarray, ...]
    bound: tuple[float, ...]
    """How far each leaf may be off, in norm."""
    complex_step: bool


def value_of(problem: Problem) -> Value:
    """The loss as it is, of flat float64 leaves and data."""

    def value(leaves: Sequence[np.ndarray], data: Sequence[Any]) -> Any:
        params, arguments, keywords = assemble(problem.spec, leaves, data, numpy=True)
        with np.errstate(all="ignore"):
            out = problem.loss(params, *arguments, **keywords)
        out = np.asarray(out[0] if problem.spec.has_aux else out)
        if out.shape != () or out.dtype.kind not in "fciu":
            raise TypeError("loss did not return one number")
        return complex(out) if out.dtype.kind == "c" else float(out)

    return value


def works(problem: Problem) -> bool:
    """Whether the loss gives one real number for plain arrays, the same one twice."""
    value = value_of(problem)
    try:
        first, second = value(problem.leaves, problem.data), value(problem.leaves, problem.data)
    except Exception:
        return False
    return isinstance(first, float) and (first == second or (np.isnan(first) and np.isnan(second)))


def check(problem: Problem, reason: str, tolerance: float | None) -> Report:
    """The report on a gradient, the truth being differences of the loss's values."""
    value = value_of(problem)
    mine = by_hand(problem, problem.leaves, problem.data, " at the given point")
    if isinstance(mine, Malformed):
        sentence = mine.sentence[0].upper() + mine.sentence[1:]
        return Report(False, (), (Finding("structure", mine.leaf, None, "", "", sentence),), float("nan"), ())
    plan = _points(problem, value)
    rng = np.random.default_rng(21)
    cost = 4 * len(STEPS) * len(plan)
    tried = _entries(problem, rng, max(20, MOST_EVALUATIONS // cost))
    evaluations: list[Evaluation] = []
    by_complex = True
    for point in plan:
        with raised_by("loss", problem.loss, f" at {point.name}"):
            loss = value(point.leaves, point.data)
        got = by_hand(problem, point.leaves, point.data, f" at {point.name}")
        if isinstance(got, Malformed) or not np.isfinite(loss):
            continue
        slopes = derivative(value, point, tried, rng)
        by_complex = by_complex and slopes.complex_step
        true, shown = [], []
        for i, (t, h) in enumerate(zip(slopes.gradient, got, strict=True)):
            known = tried[i] if problem.compares(i) else np.zeros(h.shape, bool)
            true.append(np.where(known, t, h))
            shown.append(h)
        evaluations.append(Evaluation(point, loss, tuple(true), tuple(shown), slopes.bound))
    usable = [e for e in evaluations if e.true_finite]
    if not usable:
        raise ValueError("the loss is NaN or infinite at the given point and wherever else it was tried.")
    method = "complex steps" if by_complex else "central differences"
    sizes = agreement.scales(usable)
    tol = agreement.tolerance(sizes)
    if tolerance is not None:
        tol = agreement.wider(tol, tolerance, sizes)
    failing = [e for e in usable if agreement.wrong_leaves(e, tol)]
    notes = [
        f"JAX cannot trace this loss ({reason}), so the truth is {method} of its values, with a bound for each leaf."
    ]
    missing = [
        f"{int(t.sum())} of {t.size} entries of {path}"
        for i, (t, path) in enumerate(zip(tried, problem.paths, strict=True))
        if problem.compares(i) and not t.all()
    ]
    if missing:
        notes.append(f"the loss is slow or large: only {', '.join(missing)} were tried.")
    if len({e.point.n for e in usable}) < 2 and problem.n is not None:
        notes.append(f"only batches of {problem.n} examples were tried, so a factor n cannot be told from {problem.n}.")
    if problem.n is None:
        seen = [v for name, value in read_by(problem.loss).items() for _, v in arrays_in((name,), value)]
        notes += examples.unsized(problem, seen)
    findings = _findings(problem, usable, failing, tol, tried)
    shown_at = max(failing or usable[:1], key=lambda e: max(agreement.relative_errors(e, sizes), default=0.0))
    return Report(
        not failing,
        tuple(agreement.compare(problem, shown_at, tol, sizes)),
        tuple(findings),
        agreement.smallest_detectable(usable, tol),
        tuple(
            Tried(e.point.name, e.point.n, e.loss, max(agreement.relative_errors(e, sizes), default=0.0))
            for e in usable
        ),
        tuple(notes),
        method,
    )


def derivative(value: Value, point: Point, tried: Sequence[np.ndarray], rng: np.random.Generator) -> Slopes:
    """By complex steps where the loss takes them, else by central differences, entry by entry."""
    gradient, bound, all_complex = [], [], True
    for i, leaf in enumerate(point.leaves):
        scale = float(np.sqrt(np.mean(leaf**2))) or 1.0

        def along(direction: np.ndarray, h: Any, i: int = i, leaf: np.ndarray = leaf) -> Any:
            leaves = list(point.leaves)
            leaves[i] = leaf + h * direction
            return value(leaves, point.data)

        analytic = _takes_complex_steps(along, leaf, scale, rng)
        all_complex = all_complex and analytic
        slopes, doubts = np.zeros(leaf.shape), np.zeros(leaf.shape)
        for index in zip(*np.nonzero(tried[i]), strict=True):
            unit = np.zeros(leaf.shape)
            unit[index] = scale
            if analytic:
                slopes[index] = along(unit, 1e-30j).imag / 1e-30 / scale
            else:
                slope, doubt = central(lambda h, u=unit: along(u, h))
                slopes[index], doubts[index] = slope / scale, doubt / scale
        gradient.append(slopes)
        bound.append(1e-10 * float(np.linalg.norm(slopes)) if analytic else float(np.linalg.norm(doubts)))
    return Slopes(tuple(gradient), tuple(bound), all_complex)


def central(value: Callable[[float], float]) -> tuple[float, float]:
    """The derivative at 0 by Richardson's central differences, and a bound on its error.

    Truncation is judged by the change from one step to the next, rounding by ε |f| / h; the step with the least sum
    of both is taken. ε is that of float32 where every value is a float32 number, for then the loss rounds to them.
    """
    refined, sizes, single = [], [], True
    for h in STEPS:
        values = [value(h), value(-h), value(h / 2), value(-h / 2)]
        refined.append((4 * (values[2] - values[3]) / h - (values[0] - values[1]) / (2 * h)) / 3)
        sizes.append(max(abs(v) for v in values) / h)
        with np.errstate(all="ignore"):
            single = single and all(float(np.float32(v)) == v for v in values)
    eps = float(np.finfo(np.float32 if single else np.float64).eps)
    with np.errstate(all="ignore"):
        total = np.abs(np.diff(refined)) + 20 * eps * np.array(sizes[1:])
    if not np.any(np.isfinite(total)):
        return float("nan"), float("inf")
    best = int(np.nanargmin(total))
    return refined[best + 1], 5 * float(total[best])


def _takes_complex_steps(
    along: Callable[[np.ndarray, Any], Any], leaf: np.ndarray, scale: float, rng: np.random.Generator
) -> bool:
    """Whether the loss is analytic code: a complex step in some direction gives what real steps give."""
    direction = scale * rng.standard_normal(leaf.shape)
    try:
        moved = along(direction, 1e-30j)
        slope, doubt = central(lambda h: along(direction, h))
    except Exception:
        return False
    if not isinstance(moved, complex) or moved.imag == 0:
        return False
    return abs(moved.imag / 1e-30 - slope) <= 10 * doubt + 1e-9 * abs(slope)


def _points(problem: Problem, value: Value) -> list[Point]:
    rng = np.random.default_rng(20210407)
    shapes = [np.shape(a) for a in (*problem.leaves, *problem.data)]
    size, _ = points.batch_sizes(problem.n, shapes)
    data, n = points.resample(rng, problem.data, problem.axes, problem.n, size), size
    try:
        if isinstance(by_hand(problem, problem.leaves, data), Malformed) or not np.isfinite(
            value(problem.leaves, data)
        ):
            raise ValueError
    except Exception:
        data, n = problem.data, problem.n
    plan = [Point("the given point", problem.n, problem.leaves, problem.data)]
    if problem.points:
        return [*plan, *(Point(f"points[{i}]", n, leaves, data) for i, leaves in enumerate(problem.points))]
    plan.append(Point("perturbed parameters", problem.n, points.near(rng, problem.leaves, 0.1), problem.data))
    for _ in range(2):
        leaves, name = points.anywhere(rng, problem.leaves, 1.0), "drawn parameters"
        try:
            fine = np.isfinite(value(leaves, data))
        except Exception:
            fine = False
        if not fine:
            leaves, name = points.near(rng, problem.leaves, 0.3), "parameters near the given ones"
        plan.append(Point(name, n, leaves, data))
    return plan


def _entries(problem: Problem, rng: np.random.Generator, most: int) -> list[np.ndarray]:
    """Which entries of each leaf are tried: all, or about as many of each leaf as there is time for."""
    asked = [i for i in range(len(problem.leaves)) if problem.compares(i)]
    sizes = {i: problem.leaves[i].size for i in asked}
    share = most
    if sum(sizes.values()) > most:
        left, share = most, 0
        for count, size in enumerate(sorted(sizes.values())):
            share = max(share, min(size, left // (len(sizes) - count)))
            left -= min(size, share)
    tried = []
    for i, leaf in enumerate(problem.leaves):
        mask = np.zeros(leaf.size, bool)
        if i in sizes:
            mask[rng.permutation(leaf.size)[: max(1, share)]] = True
        tried.append(mask.reshape(leaf.shape))
    return tried


def _findings(
    problem: Problem,
    usable: Sequence[Evaluation],
    failing: Sequence[Evaluation],
    tol: agreement.Tolerance,
    tried: Sequence[np.ndarray],
) -> list[Finding]:
    """What the numbers alone say: a factor, a transpose, zeros, a step of descent."""
    if not failing:
        return []
    step = patterns.update_step(problem, usable)
    if step:
        return step
    wrong = sorted({i for e in failing for i in agreement.wrong_leaves(e, tol)})
    factors = {i: _factor(usable, i, tried[i]) for i in wrong}
    asked = [i for i in range(len(problem.paths)) if problem.compares(i)]
    whole = wrong == asked and len(set(factors.values())) == 1 and None not in factors.values()
    findings = []
    for i in wrong[:1] if whole else wrong:
        path = None if whole or len(problem.paths) == 1 else problem.paths[i]
        whose = "Your gradient" if path is None else f"Your gradient of {path}"
        factor = factors[i]
        if factor == "0":
            findings.append(Finding("missing-term", path, "0", "", "", f"{whose} is zero, and the true one is not."))
        elif factor == "-1":
            findings.append(Finding("sign", path, "-1", "", "", f"{whose} has the wrong sign everywhere."))
        elif factor is not None:
            findings.append(Finding("scale", path, factor, "", "", f"{whose} is {factor} times the true one."))
        elif all(_is_transpose(e, i) for e in usable):
            findings.append(Finding("transposed", path, None, "", "", f"{whose} is the transpose of the true one."))
        else:
            sentence = (
                f"{whose} is wrong by more than the differences can be off. Which step is wrong is found for losses "
                "in jax.numpy: write jnp for np in the loss. The gradient may stay as it is."
            )
            findings.append(Finding("unknown", path, None, "", "", sentence))
    return findings


def _factor(usable: Sequence[Evaluation], leaf: int, tried: np.ndarray) -> str | None:
    samples = []
    for e in usable:
        true, mine = e.true[leaf][tried], e.hand[leaf][tried]
        size = float(np.sum(true**2))
        if size == 0:
            continue
        factor = float(np.sum(mine * true)) / size
        if np.linalg.norm(mine - factor * true) > 1e-6 * np.sqrt(size) + 2 * abs(factor) * e.rounding[leaf]:
            return None
        samples.append((e.point.n, factor))
    return name_factor(samples, {}, 1e-6) if samples else None


def _is_transpose(e: Evaluation, leaf: int) -> bool:
    true, mine = e.true[leaf], e.hand[leaf]
    if true.ndim != 2 or true.shape[0] != true.shape[1]:
        return False
    return float(np.linalg.norm(mine - true.T)) <= 1e-6 * float(np.linalg.norm(true)) + 2 * e.rounding[leaf]
