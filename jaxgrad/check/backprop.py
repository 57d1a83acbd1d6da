"""`check_backprop`: adjoint by adjoint, from the loss backwards."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check import search
from jaxgrad.check.evaluate import agreement, examples, points
from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.blame import raised_by
from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import (
    NO_BATCH,
    Kernel,
    Malformed,
    Problem,
    assemble,
    autodiff,
    kernel,
    match_tree,
    prepare,
    shape_key,
    traced,
)
from jaxgrad.check.gradient import resamples, trace_given
from jaxgrad.check.program.replay import forward, pull, quick_jit
from jaxgrad.check.program.source import locate
from jaxgrad.check.program.steps import Program, Step, flatten
from jaxgrad.check.report import Finding, colored, finding_lines, note_lines, painter


class Adjoint(NamedTuple):
    """One adjoint or one leaf of the gradient, in the order of the backward pass."""

    name: str
    status: str
    """`right`, `wrong` (the first mistake, or one of its own), or `inherited` (wrong only because what it was
    made from is wrong)."""
    error: float
    where: str
    is_leaf: bool


class BackpropReport(NamedTuple):
    """The verdict on a backward pass. It counts as true where the pass is right."""

    ok: bool
    adjoints: tuple[Adjoint, ...]
    """From the loss backwards; the leaves of the gradient where they are made."""
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    """What could not be tried."""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return backprop_text(self, colored())


def check_backprop(loss: Any, backprop: Any, params: Any, batch: Any = NO_BATCH) -> BackpropReport:
    """Where a hand-written backward pass goes wrong first.

    `backprop(params, batch)` returns `(gradient, {"name": adjoint})`: dL/dθ as a tree like `params`, and dL/dv
    for values v that the loss tags as `v = jax.ad_checkpoint.checkpoint_name(v, "name")`. Every adjoint is
    compared with autodiff's, and with what one right step makes of the person's own later adjoints: that
    tells a mistake of its own from one inherited. Raises `TypeError` or `ValueError` for input that cannot be
    used: a name that is not tagged, an adjoint of another shape.
    """
    arguments = () if batch is NO_BATCH else (batch,)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        problem = prepare(loss, backprop, params, arguments, {}, False)
        store = kernel(problem)
        trace_given(problem, store)
        return _check(examples.counted(problem, store), store)


def _check(problem: Problem, store: Kernel) -> BackpropReport:
    program = flatten(traced(store, problem.leaves, problem.data), len(problem.leaves))
    tags = _tags(program)
    _, adjoints = _call(problem, problem.leaves, problem.data)
    names = [n for n in tags if n in adjoints]
    unknown = [n for n in adjoints if n not in tags]
    if unknown:
        known = ", ".join(tags) or "none: tag them with jax.ad_checkpoint.checkpoint_name(value, name)"
        raise ValueError(f"backprop returns adjoints of {', '.join(unknown)}, but the loss tags {known}.")
    rng = np.random.default_rng(20210407)
    shapes = [np.shape(a) for a in (*problem.leaves, *problem.data)]
    sizes = points.batch_sizes(problem.n, shapes)
    notes: list[str] = []
    free = problem.n is not None and resamples(problem, store, rng, sizes[0], notes, _gradient_only)
    if problem.n is None:
        notes += examples.unsized(problem, traced(store, problem.leaves, problem.data).consts)
    given = Point("the given point", problem.n, problem.leaves, problem.data)
    drawn = points.generic(problem, store, rng, sizes[0] if free else None, autodiff)
    if free:
        drawn += points.generic(problem, store, rng, sizes[1], autodiff, 2)
    tagged = tuple(np.zeros(program.avals[program.steps[tags[n]].outputs[0]].shape) for n in names)
    extended = problem._replace(paths=(*names, *problem.paths), leaves=(*tagged, *problem.leaves))
    outer = Kernel(store.function, {}, {})
    evaluations, local = [], []
    for point in [given, *drawn]:
        evaluation, own = _evaluate(problem, store, outer, point, names)
        if evaluation.true_finite and evaluation.hand_finite:
            evaluations.append(evaluation)
            local.append(own)
    if not evaluations:
        raise ValueError("the loss, or backprop, is not finite at the given point and wherever else it was tried.")
    tol = agreement.tolerance(agreement.scales(evaluations))
    wrong = sorted({i for e in evaluations for i in agreement.wrong_leaves(e, tol)})
    own = sorted({i for e in local for i in agreement.wrong_leaves(e, tol)})
    ranks = _ranks(program, names, problem)
    order = sorted(range(len(extended.paths)), key=lambda i: -ranks[i])
    rows = []
    for i in order:
        status = "right" if i not in wrong else "wrong" if i in own else "inherited"
        error = max(agreement.relative_errors(e, agreement.scales(evaluations))[i] for e in evaluations)
        place = _where(program, names, i, problem)
        rows.append(Adjoint(extended.paths[i], status, error, place, i >= len(names)))
    findings: list[Finding] = []
    culprits = [i for i in order if i in own and i in wrong]
    if culprits:
        searched = evaluations[1:] or evaluations
        for first in culprits:
            clean = not any(j in wrong for j in order[: order.index(first)] if j < len(names))
            if not clean and first != culprits[0]:
                place = _where(program, names, first, problem)
                findings.append(
                    Finding(
                        "unknown",
                        extended.paths[first],
                        None,
                        place,
                        "",
                        f"{extended.paths[first]} has a mistake of its own besides what it inherits: put the "
                        "first one right and check again.",
                    )
                )
                continue
            found = search.explain(extended, outer, searched, wrong) if len(culprits) == 1 else ()
            if len(found) != 1 or found[0].kind == "unknown":
                found = search.explain(extended, outer, searched, [first])
            findings += [f for f in found if f not in findings]
    return BackpropReport(not wrong, tuple(rows), tuple(findings), tuple(notes))


def backprop_text(report: BackpropReport, color: bool = False) -> str:
    """The backward pass as a list, the first mistake marked, and what it is."""
    paint = painter(color)
    lines = []
    if report.ok:
        lines.append(
            paint("RIGHT", "green", "bold") + f"  All {len(report.adjoints)} adjoints and leaves agree with autodiff."
        )
    else:
        first = next((a for a in report.adjoints if a.status == "wrong"), None)
        what = f"the first mistake is in {first.name}" if first is not None else "see below"
        lines.append(paint("WRONG", "red", "bold") + f"  Going back from the loss, {what}.")
    lines.append("")
    width = max(len(a.name) for a in report.adjoints)
    for a in report.adjoints:
        mark = {"right": paint("right", "green"), "wrong": paint("WRONG", "red", "bold")}.get(
            a.status, paint("inherited", "yellow")
        )
        error = "" if a.status == "right" else f"  rel. error {a.error:.1e}"
        lines.append(f"  dL/d{a.name:<{width}}  {a.where:<16}  {mark}{error}")
    for f in report.findings:
        lines += ["", *finding_lines(f, paint)]
    lines += note_lines(report.notes)
    return "\n".join(lines)


def _tags(program: Program) -> dict[str, int]:
    """The tagged names and the step that tags each, the last of the forward pass first."""
    tags: dict[str, int] = {}
    for k, step in enumerate(program.steps):
        if step.primitive == "name" and "name" in step.params:
            name = step.params["name"]
            if name in tags:
                raise ValueError(f"the loss tags two values with the name {name!r}: give each its own.")
            tags[name] = k
    return dict(reversed(tags.items()))


def _call(problem: Problem, leaves: Sequence[Any], data: Sequence[Any]) -> tuple[list[np.ndarray], dict[str, Any]]:
    params, arguments, keywords = assemble(problem.spec, leaves, data, numpy=True)
    with np.errstate(all="ignore"), raised_by("backprop", problem.gradient):
        result = problem.gradient(params, *arguments, **keywords)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise TypeError('backprop must return (gradient, {"name": adjoint, ...}).')
    gradient = match_tree(problem, params, result[0])
    if isinstance(gradient, Malformed):
        raise ValueError(gradient.sentence)
    return gradient, {str(k): np.asarray(v, dtype=np.float64) for k, v in result[1].items()}


def _gradient_only(problem: Problem, leaves: Sequence[Any], data: Sequence[Any]) -> Any:
    return _call(problem, leaves, data)[0]


def _evaluate(
    problem: Problem, store: Kernel, outer: Kernel, point: Point, names: Sequence[str]
) -> tuple[Evaluation, Evaluation]:
    """Against autodiff, and against one right step from the person's own later adjoints."""
    gradient, adjoints = _call(problem, point.leaves, point.data)
    plain = flatten(traced(store, point.leaves, point.data), len(point.leaves))
    tags = _tags(plain)
    program = _opened(plain, [tags[n] for n in names])
    zeros = [np.zeros(plain.avals[plain.steps[tags[n]].outputs[0]].shape) for n in names]
    for name, zero in zip(names, zeros, strict=True):
        if adjoints[name].shape != zero.shape:
            raise ValueError(
                f"the adjoint of {name} has shape {adjoints[name].shape}, the value that the loss tags {zero.shape}."
            )
    leaves = (*zeros, *point.leaves)
    key = shape_key(leaves, point.data)
    if ("program", key) not in outer.compiled:
        outer.compiled["program", key] = program
        outer.compiled["truth", key] = quick_jit(
            jax.value_and_grad(lambda ls, ds, p=program: forward(p, ls, ds)[p.output])
        )
    value, true = autodiff(outer, leaves, point.data)
    hand = [*[adjoints[n] for n in names], *gradient]
    values = forward(plain, [jnp.asarray(p) for p in point.leaves], [jnp.asarray(d) for d in point.data])
    expected = _from_own(plain, values, {plain.steps[tags[n]].outputs[0]: adjoints[n] for n in names})
    own = [np.asarray(expected[plain.steps[tags[n]].outputs[0]]) for n in names]
    own += [np.asarray(expected.get(s, np.zeros(plain.avals[s].shape))) for s in plain.leaves]
    at = point._replace(leaves=leaves)
    return (
        Evaluation(at, value, tuple(true), tuple(hand)),
        Evaluation(at, value, tuple(own), tuple(hand)),
    )


def _from_own(program: Program, values: dict[int, Any], given: Mapping[int, Any]) -> dict[int, Any]:
    """Adjoints by right steps, each made from the person's own adjoints where they gave them."""
    adjoints: dict[int, Any] = {program.output: jnp.ones_like(values[program.output])}
    expected: dict[int, Any] = {}
    for k in range(len(program.steps) - 1, -1, -1):
        step = program.steps[k]
        for out in step.outputs:
            if out in given:
                expected[out] = adjoints.get(out, jnp.zeros_like(values[out]))
                adjoints[out] = jnp.asarray(given[out])
        for i, extra in pull(program, step, values, adjoints).items():
            slot = step.inputs[i]
            adjoints[slot] = adjoints[slot] + extra if slot in adjoints else extra
    return {**{s: adjoints[s] for s in program.leaves if s in adjoints}, **expected}


def _opened(program: Program, tagged: Sequence[int]) -> Program:
    """The program with a new leaf δ added to each tagged value: dL/dδ at δ = 0 is the value's adjoint."""
    avals = list(program.avals)
    steps: list[Step] = []
    new: dict[int, int] = {}
    moving, varying = set(program.moving), set(program.varying)
    for k in tagged:
        avals.append(program.avals[program.steps[k].outputs[0]])
        new[k] = len(avals) - 1
        moving.add(new[k])
        varying.add(new[k])
    for k, step in enumerate(program.steps):
        if k not in new:
            steps.append(step)
            continue
        out = step.outputs[0]
        avals.append(program.avals[out])
        inside = len(avals) - 1
        if out in moving:
            moving.add(inside)
        varying.add(inside)
        steps.append(step._replace(outputs=(inside,)))
        add = Step("add", lambda x, y: [x + y], (inside, new[k]), (out,), step.frames, {}, "add", ("add",))
        steps.append(add)
    leaves = (*[new[k] for k in tagged], *program.leaves)
    return program._replace(
        steps=tuple(steps), avals=tuple(avals), leaves=leaves, moving=frozenset(moving), varying=frozenset(varying)
    )


def _ranks(program: Program, names: Sequence[str], problem: Problem) -> list[float]:
    """How late in the forward pass each tagged value is made and each leaf first used."""
    tags = _tags(program)
    ranks = [float(tags[n]) for n in names]
    for slot in program.leaves:
        aliases = {slot}
        use = 0
        for k, step in enumerate(program.steps):
            if aliases & set(step.inputs):
                use = k
                if step.primitive not in ("broadcast_in_dim", "reshape", "transpose", "squeeze"):
                    break
                aliases |= set(step.outputs)
        ranks.append(use - 0.5)
    del problem
    return ranks


def _where(program: Program, names: Sequence[str], i: int, problem: Problem) -> str:
    del problem
    if i < len(names):
        return locate(program, [_tags(program)[names[i]]]).where
    slot = program.leaves[i - len(names)]
    users = [k for k, step in enumerate(program.steps) if slot in step.inputs]
    return locate(program, users[:1]).where if users else ""
