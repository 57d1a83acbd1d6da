"""What is known of a wrong gradient whose cause is not: true statements that lead a person to the place.

Whether it is right for one example alone; which value's adjoint, if that alone were wrong, gives these numbers;
which rows, columns or entries are off, and by which factor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgrad.check import sentences
from jaxgrad.check.evaluate import agreement, points
from jaxgrad.check.evaluate.agreement import Evaluation
from jaxgrad.check.evaluate.factors import name_factor
from jaxgrad.check.evaluate.problem import Kernel, Problem, autodiff
from jaxgrad.check.report import Finding

Sampler = Callable[[Problem, Kernel, Evaluation, np.random.Generator], Any]


def unknown(case: Any, leaves: Sequence[int], sampler: Sampler) -> Finding:
    """The finding for leaves whose cause is not known, with all that is known."""
    problem, store = case.problem, case.memory.get("store")
    leaf = leaves[0] if len(leaves) == 1 else None
    clues: list[str] = []
    place = sentences.NOWHERE
    if "alone" not in case.memory:
        alone = [] if store is None else _alone(problem, store)
        ones = [] if store is None else [sampler(problem, store, e, np.random.default_rng(12)) for e in alone[:2]]
        case.memory["alone"] = alone, ones
    alone, ones = case.memory["alone"]
    odd = [i for i, e in enumerate(alone) if not _right(e, case.noise)]
    if alone and not odd and problem.n != 1 and _all_there(case.samples[0], ones, alone, leaves):
        clues.append(
            "For any one example alone your gradient is right: look at how several examples are put together (a sum "
            "or mean over the wrong axis, an index, a matrix product where each example should go by itself)."
        )
    else:
        at = ones if odd else case.samples[:2]
        found = _wrong_adjoint(at, case.noise)
        if found is not None and len(leaves) == len(case.wrong):
            clue, place = sentences.parted(problem, at[0], found, leaves)
            clues.append(clue)
        if odd and len(odd) < len(alone):
            clues.append(
                f"Taken one by one, {len(odd)} of {len(alone)} examples give a wrong gradient and the others a right "
                "one: look at what sets them apart (a class, the side of a condition)."
            )
    for i in leaves:
        pattern = _pattern([s.evaluation for s in case.samples], i, case.noise)
        if pattern:
            clues.append(f"In {problem.paths[i]}, {pattern}.")
    return sentences.unknown(problem, leaf, clues, place)


def _alone(problem: Problem, store: Kernel) -> list[Evaluation]:
    """Both gradients for one example at a time; none where the functions do not take one."""
    if problem.n is None or problem.n < 2:
        return []
    rng = np.random.default_rng(31)
    found = []
    try:
        for point in points.generic(problem, store, rng, 1, autodiff, 2)[:1]:
            for row in range(min(problem.n, 8)):
                data = tuple(
                    a if axis is None else np.take(a, [row], axis=axis)
                    for a, axis in zip(problem.data, problem.axes, strict=True)
                )
                e = agreement.evaluate(problem, store, point._replace(data=data))
                if isinstance(e, Evaluation) and e.true_finite and e.hand_finite:
                    found.append(e)
    except Exception:  # whatever the person's functions raise for one example
        return []
    return found


def _all_there(several: Any, ones: Sequence[Any], alone: Sequence[Evaluation], leaves: Sequence[int]) -> bool:
    """Whether one example alone shows all of the loss: a difference from the mean over the examples is zero there,
    and nothing comes back through it."""
    if not any(np.any(e.true[i]) for e in alone for i in leaves):
        return False
    size = lambda s, use: float(np.linalg.norm(s.replay.contributions.get(use, 0.0)))
    steps = [step.name for step in several.program.steps]
    same = [s for s in ones if [step.name for step in s.program.steps] == steps]
    return not any(
        same and size(several, use) > 0 and all(size(s, use) <= 1e-12 * size(several, use) for s in same)
        for use in several.replay.contributions
    )


def _right(e: Evaluation, noise: float) -> bool:
    """Whether all leaves agree at one point."""
    total = float(np.sqrt(sum(float(np.sum(g**2)) for g in e.true)))
    limit = max(1e-9, 1e3 * noise) * total
    return all(float(np.linalg.norm(h - t)) <= limit for h, t in zip(e.hand, e.true, strict=True))


def _wrong_adjoint(samples: Sequence[Any], noise: float) -> int | None:
    """The value whose adjoint alone, wrong in some way, gives the person's numbers at every point.

    The error must be J_vᵀ Δ for some Δ: that says something where v has fewer numbers than there are directions.
    Of several values the one with the fewest degrees of freedom is taken, and of these the first.
    """
    if not samples or len({id(s.program) for s in samples}) != 1:
        return None
    program = samples[0].program
    best: tuple[int, int] | None = None
    inputs = {*program.leaves, program.output}
    for slot in sorted(program.moving - inputs):
        ranks = []
        for s in samples:
            tangents = s.replay.tangents.get(slot)
            if tangents is None or tangents.dtype.kind != "f" or tangents.ndim < 2 or not np.all(np.isfinite(tangents)):
                break
            jacobian = np.asarray(tangents, float).reshape(len(tangents), -1)
            error = s.hand - s.true
            if np.linalg.norm(error) <= max(1e-9, 1e3 * noise) * np.linalg.norm(s.true):
                continue
            left, sizes, _ = np.linalg.svd(jacobian, full_matrices=False)
            rank = int(np.sum(sizes > 1e-9 * sizes[0])) if sizes[0] > 0 else 0
            inside = left[:, :rank] @ (left[:, :rank].T @ error)
            if 2 * rank > len(error) or np.linalg.norm(error - inside) > max(1e-7, 1e4 * noise) * np.linalg.norm(error):
                break
            ranks.append(rank)
        else:
            if ranks and (best is None or max(ranks) < best[0]):
                best = (max(ranks), slot)
    return None if best is None else best[1]


def _pattern(evaluations: Sequence[Evaluation], leaf: int, noise: float) -> str:
    """Which rows, columns or entries of a leaf are off, and by how much where that is one number."""
    shape = evaluations[0].true[leaf].shape
    limit = max(1e-8, 1e3 * noise)
    same = [e for e in evaluations if e.true[leaf].shape == shape]
    if not shape or int(np.prod(shape)) < 2:
        return ""
    off = np.zeros(shape, bool)
    for e in same:
        off |= np.abs(e.hand[leaf] - e.true[leaf]) > limit * np.max(np.abs(e.true[leaf]))
    names = {1: ("entry",), 2: ("row", "column")}
    for axis in range(len(shape)):
        word = names[len(shape)][axis] if len(shape) in names else f"slice of axis {axis}"
        parts = [
            (i, _ratio([(e.hand[leaf].take([i], axis), e.true[leaf].take([i], axis)) for e in same]))
            for i in range(shape[axis])
        ]
        wrong = [(i, ratio) for i, ratio in parts if ratio not in (None, "1")]
        if wrong and len({ratio for _, ratio in parts}) > 1:
            shown = ", ".join(f"{word} {i} is {ratio} times the true one" for i, ratio in wrong[:4])
            return shown + (", ..." if len(wrong) > 4 else "")
    if not off.all():
        return f"{_where(off)}; the others are right to {int(-np.log10(limit))} digits"
    return ""


def _ratio(pairs: Sequence[tuple[Any, Any]]) -> str | None:
    """The one factor between two arrays at all points, in its exact form."""
    h, t = (np.concatenate([np.ravel(p[k]) for p in pairs]) for k in (0, 1))
    size = float(t @ t)
    if size == 0:
        return None
    c = float(h @ t) / size
    if np.linalg.norm(h - c * t) > 1e-8 * np.linalg.norm(t):
        return None
    return name_factor([(None, c)], {}, 1e-7)


def _where(off: np.ndarray) -> str:
    """The entries that are off, in words."""
    spots = np.argwhere(off)
    for axis in range(off.ndim):
        hit = sorted({int(i[axis]) for i in spots})
        if off.ndim > 1 and len(hit) < off.shape[axis] and off.take(hit, axis).all():
            word = ("row", "column")[axis] if off.ndim == 2 else f"slice of axis {axis}"
            several = len(hit) > 1
            shown = ", ".join(map(str, hit[:6]))
            return f"only {word}{'s' if several else ''} {shown} {'are' if several else 'is'} wrong"
    shown = ", ".join("[" + ", ".join(map(str, map(int, i))) + "]" for i in spots[:4])
    more = f" and {len(spots) - 4} more" if len(spots) > 4 else ""
    return f"only {'entry' if len(spots) == 1 else 'entries'} {shown}{more} {'is' if len(spots) == 1 else 'are'} wrong"
