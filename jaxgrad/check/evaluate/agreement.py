"""Is it the gradient? Leaf by leaf, relative to what floating point could have delivered.

A leaf agrees at a point if  ‖hand − true‖ ≤ ρ ‖true‖ + φ s,  where s is the leaf's usual norm (the median over
the points). Both are relative, so a factor in front of the loss changes nothing, and a sign, a factor 2 or a
gradient of zeros is seen however small the gradient is. ρ = 1e-10 and φ = 1000 ε allow what a right gradient
computed on another route loses in float64, and no more; code that rounds to float32 inside is recognised by the
rounding noise it shows when the parameters are moved by 1e-6, and ρ and φ follow that noise.
Where terms cancel, rounding is larger than that beside what they leave: there the evaluation holds what arithmetic
of the precision in use may do at that point (`rounding.allowance`), and an error up to that is none.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.check.evaluate.points import Point
from jaxgrad.check.evaluate.problem import Kernel, Malformed, Problem, autodiff, by_hand
from jaxgrad.check.report import Leaf

EPS = float(np.finfo(np.float64).eps)
RELATIVE = 1e-10
FLOOR = 1e3 * EPS


class Evaluation(NamedTuple):
    """Both gradients at one point."""

    point: Point
    loss: float
    true: tuple[np.ndarray, ...]
    hand: tuple[np.ndarray, ...]
    rounding: tuple[float, ...] = ()
    """What rounding may do to each leaf here, in norm; empty where that was not asked."""

    @property
    def true_finite(self) -> bool:
        return bool(np.isfinite(self.loss)) and all(bool(np.all(np.isfinite(g))) for g in self.true)

    @property
    def hand_finite(self) -> bool:
        return all(bool(np.all(np.isfinite(g))) for g in self.hand)


class Tolerance(NamedTuple):
    """ρ and φ s for each leaf."""

    relative: tuple[float, ...]
    absolute: tuple[float, ...]
    noise: float
    """Relative rounding noise that was allowed for (0 in plain float64)."""

    def allowed(self, leaf: int, size: float) -> float:
        return self.relative[leaf] * size + self.absolute[leaf]


def evaluate(problem: Problem, store: Kernel, point: Point) -> Evaluation | Malformed:
    """Both gradients at a point; an exception of the person's gradient is passed on."""
    loss, true = autodiff(store, point.leaves, point.data)
    mine = by_hand(problem, point.leaves, point.data, f" at {point.name}")
    if isinstance(mine, Malformed):
        return mine
    # What is not to be compared counts as right.
    shown = (h if problem.compares(i) else t for i, (h, t) in enumerate(zip(mine, true, strict=True)))
    return Evaluation(point, loss, tuple(true), tuple(shown))


def scales(evaluations: Sequence[Evaluation]) -> list[float]:
    """The usual norm of each leaf of the true gradient."""
    norms = np.array([[norm(g) for g in e.true] for e in evaluations if e.true_finite])
    return [float(np.median(column)) for column in norms.T] if len(norms) else []


def tolerance(sizes: Sequence[float], noise: float = 0.0, dead: Sequence[bool] = ()) -> Tolerance:
    """The tolerance for leaves of these usual norms; `dead` leaves have a true gradient of rounding only."""
    total = float(np.sqrt(np.sum(np.square(sizes)))) if len(sizes) else 0.0
    relative = max(RELATIVE, 300 * noise)
    floor = max(FLOOR, 30 * noise)
    absolute = [
        floor * total if (dead and dead[i]) else floor * s if s > 0 else FLOOR * total for i, s in enumerate(sizes)
    ]
    return Tolerance(tuple(relative for _ in sizes), tuple(absolute), noise)


def wider(tol: Tolerance, tolerance: float, sizes: Sequence[float]) -> Tolerance:
    """With a tolerance that was asked for: of the leaf's norm at the point, and of its usual norm."""
    return tol._replace(
        relative=tuple(max(r, tolerance) for r in tol.relative),
        absolute=tuple(max(a, tolerance * s) for a, s in zip(tol.absolute, sizes, strict=True)),
    )


def errors(evaluation: Evaluation) -> list[float]:
    """‖hand − true‖ of each leaf (nan where either is not finite)."""
    with np.errstate(all="ignore"):
        return [norm(h - t) for h, t in zip(evaluation.hand, evaluation.true, strict=True)]


def wrong_leaves(evaluation: Evaluation, tol: Tolerance) -> list[int]:
    """The leaves that do not agree at a point."""
    out = []
    for i, (error, true) in enumerate(zip(errors(evaluation), evaluation.true, strict=True)):
        rounding = evaluation.rounding[i] if evaluation.rounding else 0.0
        if not error <= max(tol.allowed(i, norm(true)), rounding):
            out.append(i)
    return out


def relative_errors(evaluation: Evaluation, sizes: Sequence[float], dead: Sequence[bool] = ()) -> list[float]:
    """Errors over the norm of the true leaf, or over that of all leaves where the true one is rounding."""
    out = []
    total = float(np.sqrt(np.sum(np.square(sizes))))
    for i, (error, true, size) in enumerate(zip(errors(evaluation), evaluation.true, sizes, strict=True)):
        scale = total if (dead and dead[i]) else max(norm(true), FLOOR * size)
        out.append(error / scale if scale > 0 else (0.0 if error == 0 else float("inf")))
    return out


def smallest_detectable(evaluations: Sequence[Evaluation], tol: Tolerance, dead: Sequence[bool] = ()) -> float:
    """The relative error that would have been seen in every leaf at the best point for it.

    Leaves whose true gradient is rounding only (`dead`) have no relative error.
    """
    worst = 0.0
    for i in range(len(tol.relative)):
        if dead and dead[i]:
            continue
        best = [
            max(tol.allowed(i, norm(e.true[i])), e.rounding[i] if e.rounding else 0.0) / norm(e.true[i])
            for e in evaluations
            if e.true_finite and norm(e.true[i]) > 0
        ]
        if best:
            worst = max(worst, min(best))
    return worst


def noise_of(problem: Problem, store: Kernel, points: Sequence[Point]) -> tuple[float, list[float]]:
    """Relative rounding noise of either gradient, and of each leaf of the true one.

    Third differences along θ + k δ with |δ| = 1e-6 |θ| cancel anything smooth to 1e-18 and leave the rounding
    (times √20), in float32 code too, where such a step is some ten units in the last place.
    """
    rng = np.random.default_rng(7)
    norms: list[float] = []
    mine: list[float] = []
    theirs: list[list[float]] = []
    for point in points[:3]:
        delta = [
            1e-6 * (np.abs(leaf) + 1e-3 * (float(np.max(np.abs(leaf))) or 1.0)) * rng.standard_normal(leaf.shape)
            for leaf in point.leaves
        ]
        runs_true, runs_hand = [], []
        for k in range(4):
            leaves = tuple(leaf + k * d for leaf, d in zip(point.leaves, delta, strict=True))
            runs_true.append(autodiff(store, leaves, point.data)[1])
            got = by_hand(problem, leaves, point.data)
            if isinstance(got, Malformed):
                return 0.0, [0.0] * len(problem.leaves)
            runs_hand.append(got)
        theirs.append(_third(runs_true))
        mine.append(max(_live(_third(runs_hand), [norm(g) for g in runs_hand[0]])))
        norms = [norm(g) for g in runs_true[0]]
    usual = [float(np.median(column)) for column in np.array(theirs).T]
    worst = [float(np.max(column)) for column in np.array(theirs).T]
    return max(float(np.median(mine)), *_live(usual, norms)), worst


def local_noise(problem: Problem, store: Kernel, point: Point, trials: int = 2) -> tuple[list[float], list[float]]:
    """Rounding of each leaf at one point, of the true gradient and of the person's: ‖error‖, not relative.

    Seventh differences along θ + k δ with |δ| = 1e-3 |θ|: steps large enough to move the last digit of 1 − p
    for a p that is nearly 1, where that digit is all there is.
    """
    rng = np.random.default_rng(8)
    weights = np.array([1.0, -7.0, 21.0, -35.0, 35.0, -21.0, 7.0, -1.0])
    true = np.zeros((trials, len(problem.paths)))
    mine = np.zeros((trials, len(problem.paths)))
    for trial in range(trials):
        delta = [1e-3 * np.abs(leaf) * rng.standard_normal(leaf.shape) for leaf in point.leaves]
        total_true = [np.zeros_like(p) for p in point.leaves]
        total_mine = [np.zeros_like(p) for p in point.leaves]
        for k, weight in enumerate(weights):
            leaves = tuple(leaf + k * d for leaf, d in zip(point.leaves, delta, strict=True))
            got = by_hand(problem, leaves, point.data)
            if isinstance(got, Malformed):
                return [0.0] * len(problem.paths), [0.0] * len(problem.paths)
            with np.errstate(all="ignore"):
                for total, gradient in ((total_true, autodiff(store, leaves, point.data)[1]), (total_mine, got)):
                    for i, g in enumerate(gradient):
                        total[i] = total[i] + weight * g
        size = float(np.linalg.norm(weights))
        true[trial] = [norm(x) / size for x in total_true]
        mine[trial] = [norm(x) / size for x in total_mine]
    clean = lambda x: [float(v) if np.isfinite(v) else 0.0 for v in x.max(axis=0)]
    return clean(true), clean(mine)


def _live(noise: list[float], norms: list[float]) -> list[float]:
    """The noise of the leaves that are more than rounding beside the others."""
    total = max(norms)
    return [x for x, n in zip(noise, norms, strict=True) if n > 1e-9 * total] or [0.0]


def _third(runs: Sequence[Sequence[Any]]) -> list[float]:
    out = []
    with np.errstate(all="ignore"):
        for a, b, c, d in zip(*runs, strict=True):
            size = norm(a)
            value = norm(a - 3 * b + 3 * c - d) / np.sqrt(20.0)
            rough = float(value / size) if size > 0 else float(value > 0)
            out.append(rough if np.isfinite(rough) else 0.0)
    return out


def compare(
    problem: Problem, evaluation: Evaluation, tol: Tolerance, sizes: Sequence[float], dead: Sequence[bool] = ()
) -> list[Leaf]:
    """The table of leaves at one point."""
    wrong = set(wrong_leaves(evaluation, tol))
    table = []
    with np.errstate(all="ignore"):
        for i, (path, h, t) in enumerate(zip(problem.paths, evaluation.hand, evaluation.true, strict=True)):
            if not problem.compares(i):
                continue
            pair = bool(problem.complex) and problem.complex[i]
            h_shown, t_shown = (as_complex(h), as_complex(t)) if pair else (h, t)
            difference = np.abs(h_shown - t_shown)
            worst = np.unravel_index(int(np.argmax(np.where(np.isnan(difference), np.inf, difference))), h_shown.shape)
            cosine = float(np.vdot(h, t) / (norm(h) * norm(t))) if norm(h) * norm(t) > 0 else float("nan")
            size = norm(t)
            ratio = norm(h) / size if size > 0 else float("inf") if norm(h) > 0 else 1.0
            ratio = -ratio if cosine < -1 + 1e-9 else ratio
            error = relative_errors(evaluation, sizes, dead)[i] if len(sizes) else float("nan")
            index = tuple(int(j) for j in worst)
            table.append(
                Leaf(
                    path,
                    h_shown.shape,
                    i not in wrong,
                    error,
                    cosine,
                    float(ratio),
                    index,
                    h_shown[worst].item(),
                    t_shown[worst].item(),
                    evaluation.point.name,
                )
            )
    return table


def as_complex(pairs: np.ndarray) -> np.ndarray:
    """The gradient ∂L/∂x − i ∂L/∂y of a complex leaf, from its pairs (∂L/∂x, ∂L/∂y)."""
    return np.asarray(pairs[..., 0] - 1j * pairs[..., 1])


def norm(x: Any) -> float:
    """The Euclidean norm, without overflow; NaN or infinite where an entry is."""
    with np.errstate(all="ignore"):
        peak = float(np.max(np.abs(x))) if np.size(x) else 0.0
        if peak == 0 or not np.isfinite(peak):
            return peak
        return peak * float(np.linalg.norm(np.asarray(x / peak).reshape(-1)))
