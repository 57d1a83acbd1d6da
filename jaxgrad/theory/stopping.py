"""When the lecture's rule `‖w_t − w_{t−1}‖ < ε` (F3) fires on linear regression, and how far away that is.

**GD**: the rule reads `η‖∇L(w_{t−1})‖ < ε`, so it measures the gradient through the step size. It certifies no more
than `L(w_{t−1}) − L* <= (ε/η)²/(2λ_min)`: halving η makes the answer four times worse; a small enough η stops at
once, anywhere; and a run that will diverge passes it on the way, while its unstable component is still small.

**SGD**: at the floor the step has root mean square near `η√(γ tr S)` for ever, so by its typical size the rule
would never fire; but by luck it does. A batch gradient is a combination of b vectors `rᵢxᵢ`: for it to vanish,
min(b, p) numbers must be small together, so the chance per step goes like `(ε/η)^min(b, p)`. With b = 1 that is no
chance at all but a matter of tens of steps.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from jaxgrad import checks
from jaxgrad.checks import Positive, checked
from jaxgrad.noise import gamma
from jaxgrad.theory.least_squares import (
    Problem,
    first_time,
    gd_excess,
    sgd_moments,
    start_components,
    stationary_second_moment,
)
from jaxgrad.types import Sampling


@checked
def gd_step_norms(problem: Problem, start: Any, eta: Positive, steps: Any) -> Float[np.ndarray, " k"]:
    """`‖w_t − w_{t−1}‖ = η (Σ λᵢ²cᵢ²(1−ηλᵢ)^{2(t−1)})^½` along GD, at steps t >= 1."""
    t = _from_one(steps)
    lam = problem.eigenvalues
    gradient = lam * start_components(problem, start)
    with np.errstate(over="ignore", under="ignore"):
        powers = (1 - eta * lam)[None, :] ** (t[:, None] - 1).astype(float)
        return eta * np.linalg.norm(powers * gradient[None, :], axis=1)


@checked
def gd_stop_time(problem: Problem, start: Any, eta: Positive, below: Positive) -> float:
    """The step at which GD's rule `‖w_t − w_{t−1}‖ < below` first fires, exactly; inf if it never does.

    Also beyond the edge, where the step size may pass `below` before it grows.
    """
    share = (eta * problem.eigenvalues * start_components(problem, start)) ** 2
    return 1 + first_time(problem.eigenvalues, share, eta, np.nextafter(below**2, 0))


@checked
def gd_stop_excess(problem: Problem, start: Any, eta: Positive, below: Positive) -> float:
    """`L(w_t) − L*` where GD's rule fires; NaN if it never does."""
    t = gd_stop_time(problem, start, eta, below)
    return math.nan if math.isinf(t) else float(gd_excess(problem, start, eta, [int(t)])[0])


@checked
def certified_excess(problem: Problem, eta: Positive, below: Positive) -> float:
    """`(below/η)²/(2λ_min)`: all that the rule guarantees of `L(w_{t−1}) − L*`, as `‖∇L‖² >= 2λ_min (L − L*)`."""
    return (below / eta) ** 2 / (2 * float(problem.eigenvalues[-1]))


@checked
def fires_at_once(problem: Problem, start: Any, below: Positive) -> float:
    """`below/‖∇L(w₀)‖`: every smaller step size stops at its first step, wherever it stands."""
    return below / float(np.linalg.norm(problem.eigenvalues * start_components(problem, start)))


@checked
def sgd_step_square(
    problem: Problem, start: Any, eta: Positive, sampling: Sampling, steps: Any
) -> Float[np.ndarray, " k"]:
    """`E‖w_t − w_{t−1}‖²` of SGD at steps t >= 1, exactly: `η² [(1−γ) tr(HMH) + γ (4/n) Σ eᵢ‖xᵢ‖²]`.

    M and the expected squared errors `eᵢ = E(yᵢ − xᵢ·w)²` are those before the step.
    """
    moments = sgd_moments(problem, start, eta, sampling, _from_one(steps) - 1)
    mean = moments.mean - problem.minimiser[None, :]
    return np.array([_step_square(problem, m, M, eta, sampling) for m, M in zip(mean, moments.second, strict=True)])


@checked
def stationary_step_square(problem: Problem, eta: Positive, sampling: Sampling) -> float:
    """`E‖w_t − w_{t−1}‖²` at the floor, exactly; to leading order in η it is `η²γ tr S`."""
    M = stationary_second_moment(problem, eta, sampling)
    return _step_square(problem, np.zeros(len(M)), M, eta, sampling)


@checked
def false_stop_probability(problem: Problem, eta: Positive, below: Positive, sampling: Sampling) -> float:
    """The chance per step that the rule fires at the floor, for single examples (b = 1).

    The step is `2η|yᵢ − xᵢ·w| ‖xᵢ‖`, and `xᵢ·(w − w*)` is taken as normal with variance `xᵢᵀM xᵢ`, M exact:

        P = mean over i of  Φ((ρᵢ − rᵢ)/τᵢ) − Φ((−ρᵢ − rᵢ)/τᵢ),    ρᵢ = below/(2η‖xᵢ‖),    τᵢ² = xᵢᵀM xᵢ

    The one approximation is the normal law. The chance of a false stop within T steps is close to `1 − (1 − P)^T`.
    Raises ValueError for b > 1, where only the power `(ε/η)^min(b, p)` is known.
    """
    from scipy.special import ndtr

    if sampling.batch_size != 1:
        raise ValueError(f"known for batches of one example only, got b = {sampling.batch_size}")
    M = stationary_second_moment(problem, eta, sampling)
    spread = np.sqrt(np.einsum("ij,jk,ik->i", problem.X, M, problem.X))
    norms = np.linalg.norm(problem.X, axis=1)
    # An example of zeros moves nothing: it always fires.
    seen = norms > 0
    reach, r = below / (2 * eta * norms[seen]), problem.residuals[seen]
    chance = ndtr((reach - r) / spread[seen]) - ndtr((-reach - r) / spread[seen])
    return float((np.sum(chance) + np.sum(~seen)) / len(norms))


def _step_square(problem: Problem, m: np.ndarray, M: np.ndarray, eta: float, sampling: Sampling) -> float:
    X, r, factor = problem.X, problem.residuals, gamma(sampling, len(problem.X))
    errors = r**2 - 2 * r * (X @ m) + np.sum((X @ M) * X, axis=1)
    one_example = 4 * np.mean(errors * np.sum(X**2, axis=1))
    V, lam = problem.directions, problem.eigenvalues
    full_batch = np.sum(lam**2 * np.diag(V.T @ M @ V))
    return float(eta**2 * ((1 - factor) * full_batch + factor * one_example))


def _from_one(steps: Any) -> np.ndarray:
    return checks.whole_numbers("steps", steps, at_least=1)
