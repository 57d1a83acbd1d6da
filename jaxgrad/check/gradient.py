"""`check_gradient`: the verdict, and the explanation when it is wrong."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad import checks
from jaxgrad.check import patterns, search, sentences
from jaxgrad.check.evaluate import agreement, domain, examples, points, rounding
from jaxgrad.check.evaluate.agreement import Evaluation, Tolerance
from jaxgrad.check.evaluate.blame import raised_by
from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import (
    NO_BATCH,
    ImpureError,
    Kernel,
    Malformed,
    NotScalarError,
    Problem,
    assemble,
    autodiff,
    by_hand,
    cached_kernel,
    closed,
    flat_params,
    in_given_types,
    kernel,
    match_tree,
    prepare,
    program_at,
    require_functions,
    restricted,
    returned_precisions,
    traced,
)
from jaxgrad.check.evaluate.separate import separate, separated
from jaxgrad.check.follow import repairs
from jaxgrad.check.numerics import central, floating_point
from jaxgrad.check.program.steps import low_precision
from jaxgrad.check.report import Finding, Report, Tried, WrongLine, text


class Options(NamedTuple):
    """How strictly a gradient is judged."""

    tolerance: float | None = None
    accept_rules: bool = False


def check_gradient(
    loss: Any,
    gradient: Any,
    params: Any,
    batch: Any = NO_BATCH,
    *args: Any,
    has_aux: bool = False,
    argnums: Any = None,
    only: Any = None,
    points: Any = None,
    tolerance: Any = None,
    accept_rules: Any = False,
    **kwargs: Any,
) -> Report:
    """Whether `gradient` is the gradient of `loss`, and if not, which step of the derivation is wrong.

    `loss(params, batch, *args, **kwargs) -> scalar` and `gradient(params, batch, *args, **kwargs)`, a tree like
    `params`, may use any pytrees; the gradient may be numpy or JAX code. Both are evaluated in float64,
    whatever the inputs' dtype, at the given point and at drawn ones (perturbed, after descent steps, small,
    large, saturated; batches resampled to other sizes), and compared leaf by leaf with `jax.grad`. Where
    they differ, reverse mode is replayed over the steps of the loss with one step done wrong, until the
    person's numbers come out. Then the person's function itself is followed line by line, in their own code and not in
    libraries, to say at which of its lines the numbers first part from the truth (`Report.first_wrong_line`). For that
    it runs a few dozen times more; what it prints there is thrown away.

    The report counts as true where the gradient is right, so a test can say `assert check_gradient(...)`.

    A loss that works in the dtypes of its inputs only is evaluated in those, and the report says so. For a loss that
    JAX cannot trace (NumPy code), the truth is complex steps or central differences of its values, with a bound.
    The gradient by a complex leaf x + i y is, as in `jax.grad`, dL/dx - i dL/dy: the conjugate of the direction of
    steepest ascent.

    Args:
        has_aux: whether the loss returns `(value, aux)`.
        argnums: which of the positional arguments are differentiated, as in `jax.grad`, where the parameters are
            passed one by one; the gradient then returns a tuple in that order, or a dict by their names. Where the
            gradient returns several arrays with the shapes of the first arguments, that is seen without it.
        only: the parameters to check, by path (`["W1", "layers.0"]`); the gradient may then return those alone,
            or None for the others.
        points: parameters to try instead of drawn ones, where the loss has a narrow domain: a sequence of trees like
            `params`, or a function that draws one from a NumPy generator (from a `jax.random.key` if its argument
            is called `key`).
        tolerance: the relative error of a leaf that still counts as right, for a gradient that is meant to be inexact.
        accept_rules: whether derivative rules in the loss (`jax.custom_vjp`, `jax.custom_jvp`) are meant, even where
            differences of its values contradict them, as a straight-through estimator's.

    Raises `TypeError` or `ValueError` if the loss, the parameters or the batch cannot be used, and whatever
    `gradient` itself raises, with a line added. A gradient of another form is a `structure` finding.
    """
    arguments = () if batch is NO_BATCH else (batch, *args)
    options = Options(checked_tolerance(tolerance), checks.flag("accept_rules", accept_rules))
    has_aux = checks.flag("has_aux", has_aux)
    return check(loss, gradient, params, arguments, kwargs, options, has_aux, argnums, only, points)


def assert_gradient(
    loss: Any,
    gradient: Any,
    params: Any,
    batch: Any = NO_BATCH,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Raise `AssertionError` with the report as its message if `gradient` is not the gradient of `loss`.

    For a person's own tests; the arguments are those of `check_gradient`.
    """
    report = check_gradient(loss, gradient, params, batch, *args, **kwargs)
    if not report.ok:
        raise AssertionError("\n" + text(report, color=False))


def check(
    loss: Any,
    gradient: Any,
    params: Any,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    options: Options,
    has_aux: bool = False,
    argnums: Any = None,
    only: Any = None,
    points: Any = None,
    redraw: Callable[[np.random.Generator], tuple[Any, ...]] | None = None,
    names: Sequence[str] | None = None,
    of: str = "this loss",
) -> Report:
    """What all doors share; `redraw` draws other data where they are no examples, `names` says what they are."""
    notes: list[str] = []
    with ExitStack() as stack:
        stack.enter_context(jax.enable_x64(True))
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        if argnums is not None:
            chosen = _checked_argnums(argnums, 1 + len(arguments))
            require_functions(loss, gradient)
            loss, gradient, params, arguments, names = separate(loss, gradient, (params, *arguments), chosen)
        problem = prepare(loss, gradient, params, arguments, keywords, has_aux, names)
        if only is not None:
            problem = restricted(problem, only)
        if points is not None:
            problem = problem._replace(points=_given_points(problem, points))
        store = kernel(problem)
        try:
            trace_given(problem, store)
        except Exception as error:
            if getattr(error, "jaxgrad_final", False):
                raise
            lower = _in_given_types(problem, params, arguments, keywords, stack)
            if lower is not None:
                problem, store = lower
                notes.append(
                    "the loss works only in the dtypes that were given, not in float64: both were evaluated in those, "
                    "and errors below their rounding cannot be seen."
                )
            elif central.works(problem):
                first = _first_line(error.__cause__ or error).rstrip(".:")
                return central.check(problem, first, options.tolerance)
            else:
                raise
        again = _passed_separately(problem, loss, params, arguments) if argnums is None and redraw is None else None
        if again is not None:
            shown = ", ".join(map(str, again))
            report = check(loss, gradient, params, arguments, keywords, options, has_aux, again, only, points)
            return report._replace(
                notes=(
                    *report.notes,
                    f"the arguments that your gradient returns are the parameters: argnums=({shown}).",
                )
            )
        held = closed(problem.spec.fixed_params)
        if held:
            notes.append(f"params holds {held}. The numbers in it are not checked.")
        if redraw is None:
            problem = examples.counted(problem, store)
        else:
            problem = problem._replace(n=None, axes=(None,) * len(problem.data), redraw=redraw)
        try:
            return _check(problem, store, options, notes)._replace(of=of)
        except NotDifferentiable as error:
            if not central.works(problem):
                raise TypeError(f"JAX cannot differentiate this loss: {error}") from error
            return central.check(problem, str(error), options.tolerance)


def checked_tolerance(tolerance: Any) -> float | None:
    if tolerance is None:
        return None
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float, np.floating)) or not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be a number between 0 and 1, such as 1e-6; it is {tolerance!r}.")
    return float(tolerance)


def _checked_argnums(argnums: Any, count: int) -> tuple[int, ...]:
    chosen = tuple(argnums) if isinstance(argnums, (tuple, list)) else (argnums,)
    if not chosen or any(isinstance(i, bool) or not isinstance(i, (int, np.integer)) for i in chosen):
        raise TypeError(f"argnums must be one position or several, such as (0, 1); it is {argnums!r}.")
    if any(not -count <= i < count for i in chosen) or len({i % count for i in chosen}) < len(chosen):
        raise ValueError(f"argnums is {argnums!r}, and there are {count} arguments: give different positions of those.")
    return tuple(int(i) % count for i in chosen)


def _given_points(problem: Problem, given: Any) -> tuple[tuple[np.ndarray, ...], ...]:
    """The parameters to try, checked and flattened."""
    if callable(given):
        try:
            by_key = "key" in inspect.signature(given).parameters
        except (TypeError, ValueError):
            by_key = False
        rng = np.random.default_rng(20210407)
        sources = [jax.random.key(i) for i in range(4)] if by_key else [rng] * 4
        with raised_by("points"):
            trees = [given(source) for source in sources]
        return tuple(flat_params(problem, tree, "what points draws") for tree in trees)
    if not isinstance(given, (list, tuple)) or not given:
        raise TypeError("points must be a list of parameters to try, or a function that draws some.")
    return tuple(flat_params(problem, tree, f"points[{i}]") for i, tree in enumerate(given))


def _in_given_types(
    problem: Problem, params: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], stack: ExitStack
) -> tuple[Problem, Kernel] | None:
    """The problem in the dtypes that were given, if the loss can be traced in those; then float64 is off."""
    with jax.enable_x64(False):
        given = in_given_types(problem, params, arguments, keywords)
        store = kernel(given)
        try:
            trace_given(given, store)
        except Exception:
            return None
    stack.enter_context(jax.enable_x64(False))
    return given, store


def _passed_separately(problem: Problem, loss: Any, params: Any, arguments: tuple[Any, ...]) -> tuple[int, ...] | None:
    """The positions of the parameters, where they are passed one by one and the gradient returns all of theirs."""
    if not arguments or problem.paths != ("params",):
        return None
    given, rest, keywords = assemble(problem.spec, problem.leaves, problem.data, numpy=True)
    try:
        with np.errstate(all="ignore"):
            result = problem.gradient(given, *rest, **keywords)
    except Exception:
        return None
    if not isinstance(match_tree(problem, given, result), Malformed):
        return None
    return separated(loss, result, (params, *arguments))


def forget() -> None:
    """Drop the losses that are kept compiled between checks."""
    cached_kernel.cache_clear()


class NotDifferentiable(Exception):
    """JAX can trace the loss and not differentiate it, for instance because it calls back to Python."""


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]


def _final(error: Exception) -> Exception:
    """An error that says all: no other way of evaluating the loss would help."""
    error.jaxgrad_final = True  # type: ignore[attr-defined]
    return error


def trace_given(problem: Problem, store: Kernel) -> None:
    """Trace the loss at the given point, twice if it is new, and say in words why that fails."""
    try:
        traced(store, problem.leaves, problem.data, fresh=True)
    except NotScalarError as error:
        raise _final(ValueError(str(error))) from None
    except ImpureError:
        raise _final(
            ValueError(
                "loss is random or depends on something besides its arguments: two evaluations at one point differ. "
                "Pass the random key, or whatever changes, as an argument."
            )
        ) from None
    except (
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
        jax.errors.TracerBoolConversionError,
        jax.errors.ConcretizationTypeError,
    ) as error:
        first = _first_line(error)
        raise TypeError(
            "JAX cannot trace this loss: it uses the value of an array where only its shape is known "
            "(a numpy function, float(...), or an `if` on an array). "
            f"Use jax.numpy in the loss (the gradient may stay numpy). JAX says: {first}"
        ) from error
    except Exception:
        with raised_by("loss", where=" while it was traced with float64 inputs"):
            raise


def _check(problem: Problem, store: Kernel, options: Options, notes: list[str]) -> Report:
    try:
        autodiff(store, problem.leaves, problem.data)
    except jax.errors.JaxRuntimeError as error:
        raise RuntimeError(
            f"JAX cannot compile or run the gradient of this loss on this machine: {_first_line(error)}"
        ) from error
    except Exception as error:
        raise NotDifferentiable(_first_line(error)) from error
    notes += patterns.loss_notes(problem, store)
    reach = domain.around(store, problem.leaves, problem.data)
    given = Point("the given point", problem.n, problem.leaves, problem.data)
    first = _call(problem, store, given)
    if isinstance(first, Malformed):
        return _structure(problem, store, first)
    again = by_hand(problem, given.leaves, given.data, " when it was called again at the given point")
    asked = [i for i in range(len(problem.paths)) if problem.compares(i)]
    if not isinstance(again, Malformed) and not _repeats([first.hand[i] for i in asked], [again[i] for i in asked]):
        raise ValueError(
            "gradient is random or depends on something besides its arguments: two evaluations at one point differ."
        )
    tried = _points(problem, store, notes, reach.inside)
    evaluations = [first]
    for point in tried.moderate:
        found = _call(problem, store, point)
        if not isinstance(found, Malformed):
            evaluations.append(found)
    usable = [e for e in evaluations if e.true_finite]
    if not usable:
        raise ValueError(
            "the loss or its autodiff gradient is NaN or infinite at the given point and wherever else it was tried "
            f"(loss {first.loss:g}): start from parameters where the loss is finite."
        )
    sizes = agreement.scales(usable)
    tol = agreement.tolerance(sizes)
    dead: tuple[bool, ...] = ()
    saturated = [e for e in (_quiet(problem, store, p) for p in tried.saturated) if e is not None]
    far = [e for e in saturated if e.true_finite and e.hand_finite]
    failing = [e for e in usable if agreement.wrong_leaves(e, tol)]
    if failing:
        tol, dead = _widen(problem, store, usable, sizes, tol)
    if options.tolerance is not None:
        tol, far = agreement.wider(tol, options.tolerance, sizes), []
    unit = _unit(problem, store, [*usable, *far], tol)
    allow = {id(e): e for e in [*usable, *far]}
    if not _plainly_wrong(usable, unit, tol, sizes):
        allow = {id(e): _with_rounding(store, e, unit, tol, reach.change) for e in [*usable, *far]}
    evaluations = [allow.get(id(e), e) for e in evaluations]
    usable, saturated, far = (
        [allow[id(e)] for e in usable],
        [allow.get(id(e), e) for e in saturated],
        [allow[id(e)] for e in far],
    )
    first = allow.get(id(first), first)
    failing = [e for e in usable if agreement.wrong_leaves(e, tol)]

    # A gradient that is right at drawn parameters may still differ where one of the two has lost its digits.
    noisy: list[tuple[Evaluation, int]] = []
    firm: list[tuple[Evaluation, list[int]]] = []
    drawn = [e for e in failing if e.hand_finite and e.point.name == "drawn parameters"]
    if drawn:
        firm = [(e, agreement.wrong_leaves(e, tol)) for e in failing if e.hand_finite]
    else:
        for e in [e for e in failing if e.hand_finite] + [e for e in far if agreement.wrong_leaves(e, tol)]:
            wrong = _beyond_rounding(problem, store, e, agreement.wrong_leaves(e, tol), sizes, tol, noisy)
            if wrong:
                firm.append((e, wrong))
    findings: list[Finding] = []
    lines: list[WrongLine] = []
    ok = True
    wrong = sorted({i for e, leaves in firm for i in leaves if not drawn or e.point.name == "drawn parameters"})
    distant = {id(e) for e in far}
    if drawn or any(e.point.name not in _SPECIAL and id(e) not in distant for e, _ in firm):
        ok = False
        findings += _cause(problem, store, tried, usable, wrong, tol, dead, [e for e, _ in firm], lines)
    elif firm:
        kinks, fine = floating_point.kink(problem, store, [e for e, _ in firm], tol)
        if kinks:
            findings += kinks
            ok = ok and fine
        else:
            ok = False
            findings += _cause(problem, store, tried, usable, wrong, tol, dead, [e for e, _ in firm], lines)
            if all(id(e) in distant for e, _ in firm) and findings[0].kind == "unknown":
                noisy += [(e, leaves[0]) for e, leaves in firm]
                findings, ok = [], True
    if ok:
        # Of a formula with a mistake in it nobody knows whether it is right on paper: the mistake comes first.
        unstable, alone = floating_point.unstable(
            problem, store, evaluations + saturated, noisy if not findings else [], tol.noise > 1e-11
        )
        # Where the loss fails in the same way the gradient is as right as its loss, and only told so.
        ok = not (unstable and alone)
        findings += unstable
    if options.accept_rules:
        places = floating_point.rules(program_at(store, problem.leaves, problem.data))
        named = ", ".join(place.step for place in places[:3])
        if places:
            notes.append(f"checked against the loss's own derivative rules, as accept_rules says: {named}.")
    else:
        custom = floating_point.custom_rules(problem, store, usable, tol, ok)
        if custom:
            ok = False
            findings, lines = custom, []
    rank = [e for e, _ in firm] or failing or usable[:1]
    shown = (
        first
        if any(e is first for e in rank)
        else max(rank, key=lambda e: max(agreement.relative_errors(e, sizes), default=0))
    )
    leaves = agreement.compare(problem, shown, tol, sizes, dead)
    if ok and options.tolerance is not None:
        worst = max((x for e in usable for x in agreement.relative_errors(e, sizes, dead)), default=0.0)
        if worst > agreement.RELATIVE:
            digits = int(-np.log10(worst))
            notes.append(f"it agrees to {digits} digits everywhere, within the tolerance of {options.tolerance:g}.")
    if not all(e.true_finite for e in evaluations):
        notes.append("autodiff of your loss is itself not finite at some of the points tried; they were left out.")
    for i, size in enumerate(sizes):
        if size == 0 and all(not np.any(e.true[i]) for e in usable):
            notes.append(f"the loss does not depend on {problem.paths[i]}: its gradient is zero everywhere.")
    if unit > rounding.DOUBLE and tol.noise <= 1e-11:
        notes.append(
            f"the loss or the gradient computes in {rounding.NAMES[unit]} somewhere: an error below its rounding "
            "cannot be told from it."
        )
    if tol.noise > 1e-11:
        notes.append(
            f"there is rounding of relative size {tol.noise:.0e} in the loss or the gradient (float32 inside?); "
            "smaller errors cannot be told from it."
        )
    table = tuple(
        Tried(e.point.name, e.point.n, e.loss, max(agreement.relative_errors(e, sizes, dead), default=0.0))
        for e in usable
    )
    smallest = agreement.smallest_detectable(usable, tol, dead)
    line = lines[0] if lines and not ok else None
    return Report(ok, tuple(leaves), tuple(findings), smallest, table, tuple(notes), first_wrong_line=line)


def _cause(
    problem: Problem,
    store: Kernel,
    tried: points.Plan,
    usable: Sequence[Evaluation],
    wrong: Sequence[int],
    tol: Tolerance,
    dead: tuple[bool, ...],
    failing: Sequence[Evaluation],
    lines: list[WrongLine],
) -> list[Finding]:
    """Why a gradient is wrong: first what its numbers alone show, then the step of the derivation."""
    agrees = lambda a, b: float(np.linalg.norm(a - b)) <= 1e-9 * float(np.linalg.norm(b)) + 1e-14
    found = patterns.pairs_by_mistake(problem, store, [e for e in usable if e.hand_finite], agrees)
    found = found or patterns.update_step(problem, usable)
    if found:
        return found
    found = patterns.conjugated(problem, [e for e in usable if e.true_finite], wrong)
    rest = [i for i in wrong if problem.paths[i] not in {f.leaf for f in found}]
    if not rest:
        return found
    explained = _explain(problem, store, tried, usable, rest, tol, dead, failing, lines)
    if any(f.kind == "unknown" for f in explained) and tol.noise < 1e-11:
        ordinary = [e for e in usable if e.hand_finite and e.point.name not in ("large parameters", _TRAINED)]
        explained = patterns.nearly_right(problem, ordinary, rest) or explained
    return [*found, *explained]


_TRAINED = "after three descent steps"
_SPECIAL = ("the given point", "the given point, other examples", "small parameters", "large parameters")


def _call(problem: Problem, store: Kernel, point: Point) -> Evaluation | Malformed:
    return agreement.evaluate(problem, store, point)


def _unit(problem: Problem, store: Kernel, evaluations: Sequence[Evaluation], tol: Tolerance) -> float:
    """The unit roundoff of the coarser of the two functions. The gradient's is asked only where the two differ.

    The loss's is always asked: a gradient that rounds as the loss does agrees with it to the last bit, and an error
    below the rounding would all the same have been forgiven.
    """
    unit = max(rounding.DOUBLE, rounding.unit_of(low_precision(traced(store, problem.leaves, problem.data))))
    differing = [e for e in evaluations if e.hand_finite and agreement.wrong_leaves(e, tol)]
    if not differing:
        return unit
    if tol.noise > 1e-9 or any(
        rounding.written_in_single([e.hand[i] for e in evaluations if e.hand_finite])
        and not rounding.written_in_single([e.true[i] for e in evaluations])
        for i in range(len(problem.paths))
    ):
        unit = max(unit, rounding.SINGLE)
    for eps in returned_precisions(problem):
        unit = max(unit, rounding.unit_of(eps))
    return unit


def _plainly_wrong(evaluations: Sequence[Evaluation], unit: float, tol: Tolerance, sizes: Sequence[float]) -> bool:
    """Whether what is wrong at drawn points is wrong by more than rounding can be: in float64 no leaf loses all but
    two digits at an ordinary point, and none of the others ten; to ask how many it may lose costs a compilation."""
    drawn = [e for e in evaluations if e.hand_finite and e.point.name == "drawn parameters"]
    gaps = [
        agreement.errors(e)[i] / max(sizes[i], float(np.linalg.norm(e.true[i])), 1e-300)
        for e in drawn
        for i in agreement.wrong_leaves(e, tol)
    ]
    return unit == rounding.DOUBLE and len(gaps) > 0 and max(gaps) > 1e-2 and min(gaps) > 1e-6


def _with_rounding(
    store: Kernel,
    e: Evaluation,
    unit: float,
    tol: Tolerance,
    change: Callable[[Sequence[Any], Sequence[Any]], float],
) -> Evaluation:
    """The evaluation with what rounding may do there, where that could be the whole difference.

    The same for an iteration that stops short of its fixed point: a derivation at the fixed point is off by that.
    """
    wrong = agreement.wrong_leaves(e, tol) if e.hand_finite else []
    short = 1e3 * change(e.point.leaves, e.point.data) if wrong else 0.0
    if short > 1e-12:
        e = e._replace(rounding=tuple(short * float(np.linalg.norm(t)) for t in e.true))
        wrong = agreement.wrong_leaves(e, tol)
    if unit == rounding.DOUBLE and not wrong:
        return e
    allowed = rounding.allowance(store, e.point, unit)
    return e._replace(rounding=tuple(map(max, allowed, e.rounding)) if e.rounding else allowed)


def _beyond_rounding(
    problem: Problem,
    store: Kernel,
    e: Evaluation,
    wrong: Sequence[int],
    sizes: Sequence[float],
    tol: Tolerance,
    noisy: list[tuple[Evaluation, int]],
) -> list[int]:
    """The leaves whose error at this point is more than the rounding either function shows there.

    Where it is the person's rounding that is large, the point is kept in `noisy`.
    """
    true_noise, own_noise = agreement.local_noise(problem, store, e.point)
    left = []
    for i in wrong:
        error = agreement.errors(e)[i]
        size = float(np.linalg.norm(e.true[i]))
        coarse = max(1e-6, 1e3 * tol.relative[i]) * size + max(1e-9, 1e3 * tol.noise) * sizes[i]
        if error > 50 * (true_noise[i] + own_noise[i]) and not (
            e.point.name.startswith("parameters") and e.point.name[11].isdigit() and error <= coarse
        ):
            left.append(i)
        elif own_noise[i] > 10 * true_noise[i] and error > coarse and tol.noise < 1e-11:
            noisy.append((e, i))
    return left


def _quiet(problem: Problem, store: Kernel, point: Point) -> Evaluation | None:
    """An evaluation far away, where a gradient may well refuse to work."""
    try:
        found = agreement.evaluate(problem, store, point)
    except Exception:
        return None
    return None if isinstance(found, Malformed) else found


def _repeats(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return all(
        np.allclose(x, y, rtol=1e-12, atol=1e-14 * float(np.max(np.abs(x), initial=0.0)), equal_nan=True)
        for x, y in zip(a, b, strict=True)
    )


def _structure(problem: Problem, store: Kernel, wrong: Malformed) -> Report:
    """The report on a gradient that is not of the form of the parameters."""
    loss, true = autodiff(store, problem.leaves, problem.data)
    findings: list[Finding] = []
    if wrong.transposed and len(wrong.values) == len(true):
        right = [
            v.shape == t.shape or (v.T.shape == t.shape and np.allclose(v.T, t, rtol=1e-6, atol=1e-12))
            for v, t in zip(wrong.values, true, strict=True)
        ]
        if all(right):
            for i, (v, t) in enumerate(zip(wrong.values, true, strict=True)):
                if v.shape != t.shape:
                    findings.append(
                        Finding(
                            "transposed",
                            problem.paths[i],
                            None,
                            "",
                            "",
                            f"Your gradient of {problem.paths[i]} is the transpose of the true one: its shape is "
                            f"{v.shape}, that of the parameter {t.shape}.",
                        )
                    )
    findings.append(Finding("structure", wrong.leaf, None, "", "", wrong.sentence[0].upper() + wrong.sentence[1:]))
    tried = (Tried("the given point", problem.n, loss, float("nan")),)
    return Report(False, (), tuple(findings), float("nan"), tried)


def _points(problem: Problem, store: Kernel, notes: list[str], inside: Callable[..., bool]) -> points.Plan:
    """The points to try, and whether the batch can be resampled.

    Where an iteration of the loss settles at the given point, so it does at those that are tried.
    """

    def settled_truth(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> tuple[float, list[Any]]:
        value, gradients = autodiff(store, leaves, data)
        return (value if inside(leaves, data) else float("nan")), gradients

    rng = np.random.default_rng(20210407)
    shapes = [np.shape(a) for a in (*problem.leaves, *problem.data)]
    n1, n2 = points.batch_sizes(problem.n, shapes)
    free = problem.n is not None and resamples(problem, store, rng, n1, notes)
    if problem.n is None and problem.redraw is None:
        notes += examples.unsized(problem, traced(store, problem.leaves, problem.data).consts)
    plan = points.draw(problem, store, rng, (n1, n2) if free else None, settled_truth)
    keep = lambda chosen: tuple(p for p in chosen if inside(p.leaves, p.data))
    kept = plan._replace(moderate=keep(plan.moderate), generic=keep(plan.generic), saturated=keep(plan.saturated))
    lost = len(plan.moderate) + len(plan.saturated) - len(kept.moderate) - len(kept.saturated)
    if lost:
        notes.append(
            f"an iteration of the loss has settled at the given point and not at {lost} others; they were left out. "
            "Give points= to say where it settles."
        )
    return kept


def resamples(
    problem: Problem,
    store: Kernel,
    rng: np.random.Generator,
    size: int,
    notes: list[str],
    call: Callable[..., Any] = by_hand,
) -> bool:
    """Whether both functions work with another number of examples."""
    data = points.resample(rng, problem.data, problem.axes, problem.n, size)
    try:
        value, _ = autodiff(store, problem.leaves, data)
    except Exception:
        notes.append("the batch cannot be resampled to another size for this loss, so a factor of n cannot be tested.")
        return False
    del value
    try:
        if isinstance(call(problem, problem.leaves, data), Malformed):
            raise ValueError
    except Exception:
        notes.append(
            f"your gradient only works for batches of {problem.n} examples, so a factor n cannot be told from "
            f"{problem.n}."
        )
        return False
    return True


def _widen(
    problem: Problem, store: Kernel, usable: Sequence[Evaluation], sizes: Sequence[float], tol: Tolerance
) -> tuple[Tolerance, tuple[bool, ...]]:
    """The tolerance with the rounding noise that the two functions show, if the errors could be that."""
    total = float(np.sqrt(np.sum(np.square(sizes))))
    small = all(
        all(
            error <= 3e-2 * max(size, agreement.FLOOR * total) + 1e-9 * total
            or error <= 3e-2 * float(np.linalg.norm(true))
            for error, size, true in zip(agreement.errors(e), sizes, e.true, strict=True)
        )
        for e in usable
        if e.hand_finite
    )
    tiny = any(s < 1e-9 * total for s in sizes)
    low = any(np.dtype(d).itemsize < 8 for d in _dtypes(problem, store))
    if not (small or tiny or low):
        return tol, ()
    drawn = [e.point for e in usable if e.point.name not in _SPECIAL] or [e.point for e in usable]
    noise, true_noise = agreement.noise_of(problem, store, drawn)
    dead = tuple(s < 1e-9 * total and x > 1e-3 for s, x in zip(sizes, true_noise, strict=True))
    if noise < 1e-11:
        noise = 0.0
    noise = min(noise, 1e-6 if not low else 1e-2)
    return agreement.tolerance(sizes, noise, dead), dead


def _dtypes(problem: Problem, store: Kernel) -> list[Any]:
    """The floating types that the loss computes in."""
    eps = low_precision(traced(store, problem.leaves, problem.data))
    return [np.float64 if eps < 1e-12 else np.float32]


def _explain(
    problem: Problem,
    store: Kernel,
    tried: points.Plan,
    usable: Sequence[Evaluation],
    wrong: Sequence[int],
    tol: Tolerance,
    dead: tuple[bool, ...],
    failing: Sequence[Evaluation],
    lines: list[WrongLine],
) -> list[Finding]:
    """The findings for a gradient that is wrong at ordinary points; the first wrong line, if there is one to show,
    is put into `lines`."""
    searched: list[Evaluation] = []
    more: list[Point] = []
    if tried.second is not None:
        more = points.generic(problem, store, np.random.default_rng(4), tried.second, tried.truth)
    for point in [*tried.generic, *more]:
        found = next((e for e in usable if e.point is point), None) or _quiet(problem, store, point)
        if not (isinstance(found, Evaluation) and found.true_finite and found.hand_finite):
            continue
        if _quiet_digits(problem, store, found):
            searched.append(found)
    if len(searched) < 3:
        # Features of 30 to 100 saturate a sigmoid at parameters of size 1: nearer to zero digits are left.
        for point, shrink in [(p, f) for f in (0.03, 1e-3) for p in (*tried.generic, *more)]:
            nearer = point._replace(leaves=points.scaled(point.leaves, shrink))
            found = _quiet(problem, store, nearer)
            if isinstance(found, Evaluation) and found.true_finite and found.hand_finite and len(searched) < 8:
                searched += [found] if _quiet_digits(problem, store, found) else []
    seen = sorted({i for e in searched for i in agreement.wrong_leaves(e, tol)})
    if not searched or not seen:
        # wrong only with the examples that were given: search there
        sizes = [e.point.n for e in failing]
        usual = max(set(sizes), key=sizes.count)
        searched = [e for e in failing if e.point.n == usual][:3]
        seen = list(wrong)
    if not searched:
        return [sentences.unknown(problem, None)]
    line = repairs.first_wrong_line(problem, store, searched, seen, tol.noise)
    lines += [] if line is None else [line]
    return list(search.explain(problem, store, searched, seen, tol.noise, dead, None if line is None else line.origin))


def _quiet_digits(problem: Problem, store: Kernel, e: Evaluation) -> bool:
    """Whether neither gradient loses digits at a point, so that an explanation can be held against it."""
    true_noise, own_noise = agreement.local_noise(problem, store, e.point, trials=1)
    sizes = [max(float(np.linalg.norm(t)), float(np.linalg.norm(h))) for t, h in zip(e.true, e.hand, strict=True)]
    return all(a + b <= 1e-6 * max(size, 1e-300) for a, b, size in zip(true_noise, own_noise, sizes, strict=True))
