"""What a wrong gradient is, seen from its numbers alone, and what a loss does that its author may not know."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.problem import Kernel, Problem, autodiff, program_at
from jaxgrad.check.program.source import Where, locate
from jaxgrad.check.program.steps import Program
from jaxgrad.check.report import Finding

# ------------------------------------------------------------------------------- the form of the numbers


def conjugated(problem: Problem, evaluations: Sequence[Evaluation], wrong: Sequence[int]) -> list[Finding]:
    """The complex leaves whose gradient is the conjugate of JAX's."""
    findings = []
    for i in wrong:
        if not (problem.complex and problem.complex[i]):
            continue
        turned = np.array([1.0, -1.0])
        if not all(_close(e.hand[i], e.true[i] * turned) for e in evaluations if e.hand_finite):
            continue
        path = problem.paths[i]
        sentence = (
            f"Your gradient of {path} is the complex conjugate of JAX's. For {path} = x + i y, jax.grad gives "
            "dL/dx - i dL/dy; yours is dL/dx + i dL/dy, the direction of steepest ascent. Conjugate it, or conjugate "
            "JAX's where you compare or step."
        )
        findings.append(Finding("conjugated", path, None, "", "", sentence))
    return findings


def update_step(problem: Problem, evaluations: Sequence[Evaluation]) -> list[Finding]:
    """A step of gradient descent in place of the gradient: -η g, or the parameters after it, θ - η g."""
    asked = [i for i in range(len(problem.paths)) if problem.compares(i)]
    good = [e for e in evaluations if e.hand_finite and e.true_finite]
    for moved in (True, False):
        steps = [_step_size(good, i, moved) for i in asked]
        known = [s for s in steps if s is not None]
        if len(known) < len(steps) or not known:
            continue
        usual = max(set(known), key=known.count) if len(set(known)) < len(known) else min(known)
        if not moved and not (_round(usual) and all(_round(s) for s in known)):
            continue
        if not moved and len({e.point.n for e in good}) < 2 and round(1 / usual) == good[0].point.n:
            continue  # it could be -1/n
        return [_update_finding(problem, asked, known, usual, moved)]
    return []


def _update_finding(
    problem: Problem, asked: Sequence[int], steps: Sequence[float], usual: float, moved: bool
) -> Finding:
    what = "the parameters after a step of descent, params" if moved else "a step of descent,"
    sign = " - " if moved else " -"
    sentence = f"Your function returns {what}{sign}{usual:g} times the gradient, and not the gradient itself."
    odd = [(problem.paths[i], s) for i, s in zip(asked, steps, strict=True) if abs(s - usual) > 1e-6 * usual]
    for path, s in odd:
        times = "twice" if abs(s / usual - 2) < 1e-6 else f"{s / usual:g} times"
        sentence += f" In {path} it is stepped {times} ({s:g})."
    sentence += " Return what the step is made of."
    leaf = odd[0][0] if len(odd) == 1 else None
    return Finding("update-step", leaf, f"-{usual:g}", "", "", sentence)


def _step_size(evaluations: Sequence[Evaluation], leaf: int, moved: bool) -> float | None:
    """η with hand = θ - η g (or -η g) at every point, or None."""
    found = []
    for e in evaluations:
        true = e.true[leaf]
        step = e.point.leaves[leaf] - e.hand[leaf] if moved else -e.hand[leaf]
        size = float(np.sum(true**2))
        if size == 0:
            continue
        eta = float(np.sum(step * true)) / size
        lost = 1e-14 * float(np.linalg.norm(e.hand[leaf])) if moved else 0.0
        if np.linalg.norm(step - eta * true) > 1e-7 * abs(eta) * np.sqrt(size) + lost:
            return None
        if lost < 1e-7 * abs(eta) * np.sqrt(size):
            found.append(eta)
    if len(found) < 2 or min(found) <= 0 or max(found) - min(found) > 1e-6 * max(found):
        return None
    return float(f"{np.median(found):.6g}")


def _round(step: float) -> bool:
    """Whether a number is a step size that people choose, and no fraction of a derivation: 0.1, 0.03, 0.005."""
    digits = f"{step:.5e}".split("e")[0].rstrip("0").rstrip(".")
    return digits in ("1", "2", "3", "5") and (step <= 0.1 or step == 0.3)


def nearly_right(problem: Problem, evaluations: Sequence[Evaluation], wrong: Sequence[int]) -> list[Finding]:
    """A gradient that differs a little everywhere, and for no reason that is known: its numbers are inexact."""
    worst = 0.0
    for e in evaluations:
        for i in wrong:
            size = float(np.linalg.norm(e.true[i]))
            if size > 0:
                worst = max(worst, float(np.linalg.norm(e.hand[i] - e.true[i])) / size)
    if not 0 < worst <= 1e-4:
        return []
    digits = int(-np.log10(worst))
    enough = 10.0 ** np.ceil(np.log10(worst) + 0.3)
    path = problem.paths[wrong[0]] if len(wrong) == 1 and len(problem.paths) > 1 else None
    whose = "Your gradient" if path is None else f"Your gradient of {path}"
    sentence = (
        f"{whose} agrees with autodiff to {digits} digits everywhere that is not saturated (off by at most "
        f"{worst:.1e}), and rounding is far smaller. No step of the derivation is wrong by so little: look for a guard "
        "such as + 1e-7 in a denominator, a constant written with few digits, or a finite difference. If that is "
        f"meant, pass tolerance={enough:.0e}."
    )
    return [Finding("inexact", path, None, "", "", sentence)]


def _close(a: np.ndarray, b: np.ndarray) -> bool:
    return float(np.linalg.norm(a - b)) <= 1e-9 * float(np.linalg.norm(b))


# ------------------------------------------------------------------------------------- the loss itself


class Pairs(NamedTuple):
    """A step of the loss that pairs every example with every other, because (n, 1) met (n,)."""

    where: Where
    column: int
    """The operand of shape (n, 1)."""
    row: int
    """That of shape (n,)."""


def paired(program: Program, n: int | None) -> Pairs | None:
    """The first step where operands of shapes (n, 1) and (n,) spread to (n, n) without being told to."""
    makers = {o: k for k, step in enumerate(program.steps) for o in step.outputs}

    def base(slot: int, place: Any) -> int:
        """The value before what JAX did to its shape within the same expression."""
        while slot in makers:
            step = program.steps[makers[slot]]
            if step.primitive not in ("broadcast_in_dim", "reshape", "expand_dims") or step.frames[:1] != place:
                break
            slot = step.inputs[0]
        return slot

    for k, step in enumerate(program.steps):
        if len(step.inputs) != 2 or n is None or n < 2 or program.avals[step.outputs[0]].shape != (n, n):
            continue
        if step.primitive not in ("sub", "add", "mul", "div", "max", "min", "pow") or not step.frames:
            continue
        slots = [base(s, step.frames[:1]) for s in step.inputs]
        shapes = [tuple(program.avals[s].shape) for s in slots]
        if sorted(shapes) == [(n,), (n, 1)]:
            column, row = (slots[0], slots[1]) if shapes[0] == (n, 1) else (slots[1], slots[0])
            maker = program.steps[makers[column]] if column in makers else None
            if maker is not None and program.avals[maker.inputs[0]].shape == (n,):
                continue  # written out: x[:, None] - y
            return Pairs(locate(program, [k]), column, row)
    return None


def loss_notes(problem: Problem, store: Kernel) -> list[str]:
    """What the loss does that its author may not have meant."""
    program = program_at(store, problem.leaves, problem.data)
    n = problem.n
    notes = []
    pairs = paired(program, n)
    if pairs is not None:
        notes.append(
            f"in {pairs.where.step} the loss pairs shape ({n}, 1) with ({n},), which "
            f"JAX spreads to ({n}, {n}): every example meets every other. If that is not meant, give both one shape."
        )
        return notes
    makers = {o: step for step in program.steps for o in step.outputs}
    for k, step in enumerate(program.steps):
        total = makers.get(step.inputs[0]) if step.primitive == "div" else None
        if total is None or total.primitive != "reduce_sum" or step.outputs[0] not in program.moving:
            continue
        shape = tuple(program.avals[total.inputs[0]].shape)
        lengths = [shape[axis] for axis in total.params["axes"]]
        others = [d for d in lengths if d > 1]
        if n is None or n not in others or program.avals[step.outputs[0]].shape != ():
            continue
        others.remove(n)
        divisor = program.constants.get(step.inputs[1])
        if others and n not in others and divisor is not None and float(divisor) == np.prod(lengths):
            where = locate(program, [k])
            notes.append(
                f"the mean in {where.step} runs over {n} examples and over "
                f"{' x '.join(map(str, others))} numbers of each: it divides by {np.prod(lengths):g}, not by {n}."
            )
            break
    return notes


def pairs_by_mistake(
    problem: Problem, store: Kernel, evaluations: Sequence[Evaluation], agrees: Callable[[Any, Any], bool]
) -> list[Finding]:
    """A gradient of the loss that was meant, where the loss itself pairs all examples with all others.

    Proved: the loss is evaluated with the row of the pair as a column, and its gradient is the person's.
    """
    program = program_at(store, problem.leaves, problem.data)
    pairs = paired(program, problem.n)
    if pairs is None or pairs.row not in program.data:
        return []
    position = program.data.index(pairs.row)
    for e in evaluations:
        data = list(e.point.data)
        data[position] = np.asarray(data[position])[:, None]
        try:
            _, meant = autodiff(store, e.point.leaves, tuple(data))
        except Exception:
            return []
        if not all(agrees(h, t) for h, t in zip(e.hand, meant, strict=True)):
            return []
    n, name = problem.n, problem.names[position]
    sentence = (
        f"Your gradient is right for the loss that was meant, and the loss is another: in {pairs.where.step} "
        f"shape ({n}, 1) meets {name} of shape ({n},), which JAX spreads to ({n}, {n}), so the "
        f"loss pairs every example with every other. Make {name} a column, {name}[:, None], or the other operand flat."
    )
    return [Finding("broadcast", None, None, pairs.where.where, pairs.where.expression, sentence)]
