"""What GD and SGD must do on linear regression (F4, F6): exactly, on the finite data set, at every step.

The loss is `L(w) = (1/n) Σ (yᵢ − xᵢ·w)²`, a bias being a coefficient of a column of ones. With the Hessian
`H = (2/n) XᵀX = Σ λₖ vₖvₖᵀ`, a minimiser w*, its residuals `rᵢ = yᵢ − xᵢ·w*` and `d = w − w*`:

**GD** (`d_t = (I − ηH) d_{t−1}`) moves along each eigenvector by itself, `cₖ → (1 − ηλₖ) cₖ`.

**SGD** with fresh batches of sampling factor γ (`jaxgrad.noise.gamma`) has, for `m = E[d]` and `M = E[ddᵀ]`,

    m_t = (I − ηH) m
    M_t = (I − ηH) M (I − ηH) + η²γ [(4/n) Xᵀ diag(e) X − H M H],     eᵢ = rᵢ² − 2 rᵢ xᵢ·m + xᵢᵀM xᵢ
    E[L(w_t)] = L* + ½ tr(H M_t)

because the covariance of a batch mean is γ times the population's, for both kinds of fresh batches; eᵢ is
the expected squared error of example i. Nothing is assumed of the data, and no step size is small. It is
linear in `(1, m, M)`: one matrix on the `1 + p + p(p+1)/2` numbers that (1, m, M) hold, built once from the
second to fourth moments of the data, takes a step in time independent of n. (The same operator as in Défossez
& Bach 2015; its edge is that of Mulayoff & Michaeli 2024.)

A loss of ½(y − ŷ)² is the same descent at half the step size with half the loss.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from jaxgrad import checks
from jaxgrad.checks import Count, Natural, NotNegative, Positive, checked
from jaxgrad.noise import gamma
from jaxgrad.sampling import is_with_replacement
from jaxgrad.types import Batch, Linear, Sampling

LIFTED = 100
"""The largest rank for which the matrix of second moments is formed (p = 100: 5,151 rows, 212 MB)."""

QUARTIC = 4
"""The largest number of coefficients for which the matrix of fourth moments is formed ((p + 1)⁴ rows)."""


class Problem(NamedTuple):
    """Linear regression on n examples: its minimum and its geometry, float64."""

    X: Float[np.ndarray, "n p"]
    """Design: the features, then a column of ones if there is a bias."""
    y: Float[np.ndarray, " n"]
    minimiser: Float[np.ndarray, " p"]
    """w*, of least norm where there are many."""
    value: float
    """L* = L(w*)."""
    residuals: Float[np.ndarray, " n"]
    """rᵢ = yᵢ − xᵢ·w*."""
    eigenvalues: Float[np.ndarray, " r"]
    """Positive eigenvalues of H = (2/n) XᵀX, largest first."""
    directions: Float[np.ndarray, "p r"]
    """Their eigenvectors, as columns."""


class Moments(NamedTuple):
    """SGD's exact moments at the given steps."""

    steps: np.ndarray
    """int64[k]."""
    mean: Float[np.ndarray, "k p"]
    """E[w_t], which is GD's path."""
    second: Float[np.ndarray, "k p p"]
    """E[(w_t − w*)(w_t − w*)ᵀ]."""
    excess: Float[np.ndarray, " k"]
    """E[L(w_t)] − L*."""


class BestStep(NamedTuple):
    """The step size that reaches a target soonest, and after how many steps."""

    eta: float
    steps: float


# --- the problem -----------------------------------------------------------------------------------------------


@checked
def design_matrix(x: Any, *, bias: bool = True) -> Float[np.ndarray, "n p"]:
    """The features `x[n, d]` in float64, with a column of ones appended if there is a bias."""
    X = checks.array("x", x)
    if X.ndim != 2 or X.size == 0:
        raise ValueError(f"x must have shape [n, d] with at least one example and feature, got {list(X.shape)}")
    return np.column_stack([X, np.ones(len(X))]) if bias else X


@checked
def problem(batch: Batch, *, bias: bool = True) -> Problem:
    """The geometry of linear regression on `batch` (`x[n, d]`, `y[n]`), by a singular value decomposition.

    Eigenvalues below `(max(n, p) 2⁻⁵³)²`, relative to the largest, count as zero: along those directions nothing
    moves and nothing is lost. Raises ValueError for shapes that do not fit or data that are not finite.
    """
    X, y = design_matrix(batch.x, bias=bias), checks.array("y", batch.y, bools=True)
    n, p = X.shape
    if y.shape != (n,):
        raise ValueError(f"y must have shape [{n}], one target per example; got {list(y.shape)}")

    U, sigma, Vt = np.linalg.svd(X, full_matrices=False)
    rank = int(np.sum(sigma > max(n, p) * 2.0**-53 * sigma[0]))
    if rank == 0:
        raise ValueError("x is zero everywhere: there is nothing to fit")
    U, sigma, V = U[:, :rank], sigma[:rank], Vt[:rank].T
    w = V @ (U.T @ y / sigma)
    w = w + V @ (U.T @ (y - X @ w) / sigma)
    residuals = y - X @ w
    return Problem(X, y, w, math.fsum(residuals**2) / n, residuals, 2 / n * sigma**2, V)


@checked
def components(problem: Problem, params: Any) -> Float[np.ndarray, "*k r"]:
    """`cₖ = vₖ·(w − w*)`: how far parameters still have to go along each eigenvector, largest eigenvalue first.

    `params` is `Linear(w, b)`, or coefficients `[p]` or `[k, p]`.
    """
    return (_coefficients(problem, params) - problem.minimiser) @ problem.directions


@checked
def excess_loss(problem: Problem, params: Any) -> Float[np.ndarray, "*k"]:
    """`L(w) − L* = ½ Σ λₖ cₖ²`, to full relative precision however small. `params` as in `components`."""
    return np.asarray(0.5 * components(problem, params) ** 2 @ problem.eigenvalues)


def start_components(problem: Problem, start: Any) -> Float[np.ndarray, " r"]:
    """`components` of one start, `Linear(w, b)` or coefficients `[p]`."""
    found = components(problem, start)
    checks.every_finite(_coefficients(problem, start), "start")
    if found.ndim != 1:
        raise ValueError(f"start must be one point: Linear(w[d], b) or coefficients [p]; got {checks.shown(start)}")
    return found


# --- gradient descent ------------------------------------------------------------------------------------------


@checked
def edge(problem: Problem) -> float:
    """`2/λ_max`: GD converges from everywhere if and only if `0 < η < 2/λ_max(H)`.

    For this loss that is `1/λ_max(XᵀX/n)`. At the edge the top component changes sign for ever.
    """
    return 2 / float(problem.eigenvalues[0])


@checked
def condition_number(problem: Problem) -> float:
    """`κ = λ_max/λ_min` over the positive eigenvalues of H."""
    return float(problem.eigenvalues[0] / problem.eigenvalues[-1])


@checked
def worst_case_step(problem: Problem) -> float:
    """`2/(λ_min + λ_max)`: the constant step with the best rate, `ρ = (κ−1)/(κ+1)`, from the worst start.

    It is best in the long run only: to a coarse target `1/λ_max` can take half the steps (`best_step`).
    """
    return 2 / float(problem.eigenvalues[0] + problem.eigenvalues[-1])


@checked
def gd_path(problem: Problem, start: Any, eta: Positive, steps: Any) -> Float[np.ndarray, "k p"]:
    """GD's iterates `w_t = w* + Σ (1 − ηλₖ)^t cₖ vₖ` at the given steps, from `start` (F3, F4).

    A component of the start along which X vanishes never moves.
    """
    t, c, start = _steps(steps), start_components(problem, start), _coefficients(problem, start)
    still = start - problem.minimiser - problem.directions @ c
    with np.errstate(over="ignore", invalid="ignore"):
        moving = _powers(problem, eta, t) * c[None, :]
        return (problem.minimiser + still)[None, :] + moving @ problem.directions.T


@checked
def gd_excess(problem: Problem, start: Any, eta: Positive, steps: Any) -> Float[np.ndarray, " k"]:
    """`L(w_t) − L* = ½ Σ λₖ cₖ² (1 − ηλₖ)^{2t}` along GD, at the given steps; inf where it overflows."""
    c, t = start_components(problem, start), _steps(steps)
    with np.errstate(over="ignore"):
        return 0.5 * _powers(problem, eta, t) ** 2 @ (problem.eigenvalues * c**2)


@checked
def gd_steps_to(problem: Problem, start: Any, eta: Positive, excess: Positive) -> float:
    """The first t with `L(w_t) − L* <= excess` along GD, exactly; inf if there is none.

    Works beyond the edge too, where the loss may fall first and turn up later.
    """
    share = 0.5 * problem.eigenvalues * start_components(problem, start) ** 2
    return first_time(problem.eigenvalues, share, eta, excess)


@checked
def first_time(eigenvalues: Any, share: Any, eta: Positive, target: Positive) -> float:
    """The first t with `Σ shareₖ (1 − ηλₖ)^{2t} <= target`, exactly; inf if there is none.

    A sum of `a q^t` with `a, q >= 0` is convex in t: up to where it stops falling, and there to where it passes the
    target, bisection is exact. It works beyond the edge too, where the sum turns up again.
    """
    lam, share = checks.array("eigenvalues", eigenvalues, "k"), checks.array("share", share, "k")
    if lam.shape != share.shape or (lam <= 0).any() or (share < 0).any():
        raise ValueError(
            f"eigenvalues must be positive and share >= 0, one for each; got shapes {lam.shape} and {share.shape}"
        )

    def terms(t: int) -> np.ndarray:
        return share * (1 - eta * lam) ** (2.0 * t)

    def below(t: int) -> bool:
        return bool(np.sum(terms(t)) <= target)

    def falls(t: int) -> bool:
        """Whether the next step lowers the sum: `Σ a q^t (q − 1) < 0`, with `q − 1 = −ηλ(2 − ηλ)` exact."""
        return bool(np.sum(terms(t) * -eta * lam * (2 - eta * lam)) < 0)

    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if below(0):
            return 0.0
        low, high = 0, 1
        while falls(high) and not below(high):
            low, high = high, 2 * high
            if high > 2**53:
                return math.inf
        if not below(high):  # it has turned up: the lowest point lies in (low, high]
            high = _bisect(falls, low, high)
            if not below(high):
                return math.inf
            low = 0
        return float(_bisect(lambda t: not below(t), low, high))


# --- stochastic gradient descent -------------------------------------------------------------------------------


@checked
def sgd_moments(problem: Problem, start: Any, eta: Positive, sampling: Sampling, steps: Any) -> Moments:
    """Mean, second moment and expected excess loss of SGD at the given steps, exactly (F6).

    `start` is `Linear(w, b)` or coefficients `[p]`; `sampling` is fresh at each step (`full_batch`,
    `with_replacement` or `distinct`). Costs the same for any n once the data's moments are formed; where they
    are too many (`LIFTED`) each step costs O(n p²).
    """
    t = _steps(steps)
    factor = gamma(sampling, len(problem.X))
    c = start_components(problem, start)
    if _lifts(problem):
        m, M = _operator_path(_operator(problem, _lift(problem), eta, factor), c, t)
    else:
        m, M = compact_recursion(problem, c, eta, factor, t)
    return from_eigenbasis(problem, start, t, m, M)


@checked
def sgd_excess(
    problem: Problem, start: Any, eta: Positive, sampling: Sampling, steps: Natural
) -> Float[np.ndarray, " t"]:
    """`E[L(w_t)] − L*` at **every** step `t = 0 … steps`; inf or NaN where it overflows."""
    if not _lifts(problem):
        return sgd_moments(problem, start, eta, sampling, np.arange(steps + 1)).excess
    B = _operator(problem, _lift(problem), eta, gamma(sampling, len(problem.X)))
    blocks = list(_excess_blocks(problem, B, start_components(problem, start), steps + 1))
    return np.concatenate(blocks)[: steps + 1]


@checked
def sgd_edge(problem: Problem, sampling: Sampling) -> float:
    """The step size beyond which `E‖w_t − w*‖²` explodes: `2/λ_max(D, C)`, exactly.

    On matrices M, `C(M) = (HM + MH)/2` and `D(M) = (1−γ) HMH + (γ/n) Σ HᵢMHᵢ` with `Hᵢ = 2xᵢxᵢᵀ`; a step maps
    E[ddᵀ] by `I − 2ηC + η²D`. That map is symmetric and keeps positive matrices positive, so its spectral
    radius is its largest eigenvalue (Krein-Rutman), which is below 1 exactly for `η < 2/λ_max(D, C)`.

    It grows with b from `2/tr H` (one example, all of equal norm) to GD's `2/λ_max`. Beyond it the *mean*
    explodes while typical runs may still converge, so a sample mean will not show it.

    Raises ValueError beyond rank `LIFTED`.
    """
    factor = gamma(sampling, len(problem.X))
    if factor == 0:
        return edge(problem)
    weight, i, j, _, _, Q = _lift(problem)
    lam = problem.eigenvalues
    # Off-diagonal entries of a symmetric matrix count twice; √2 makes their basis orthonormal.
    D = factor * Q * np.sqrt(weight)[:, None] / np.sqrt(weight)[None, :]
    D[np.diag_indices(len(D))] += (1 - factor) * lam[i] * lam[j]
    half_inverse = 1 / np.sqrt((lam[i] + lam[j]) / 2)
    D = half_inverse[:, None] * D * half_inverse[None, :]
    return 2 / float(np.linalg.eigvalsh((D + D.T) / 2)[-1])


@checked
def floor(problem: Problem, eta: Positive, sampling: Sampling) -> float:
    """`E[L(w_∞)] − L*`, the noise floor of SGD at constant step size, exactly; inf at or beyond `sgd_edge`.

    The fixed point of the second moment: `M = (I−ηH) M (I−ηH) + η²γ [S + (1/n) Σ HᵢMHᵢ − HMH]`.
    """
    if eta >= sgd_edge(problem, sampling):
        return math.inf
    return 0.5 * float(np.diag(_stationary(problem, eta, sampling)) @ problem.eigenvalues)


@checked
def stationary_second_moment(problem: Problem, eta: Positive, sampling: Sampling) -> Float[np.ndarray, "p p"]:
    """`E[(w_∞ − w*)(w_∞ − w*)ᵀ]` at constant step size; ValueError unless `eta < sgd_edge`."""
    if eta >= (limit := sgd_edge(problem, sampling)):
        raise ValueError(f"no stationary second moment: eta = {eta:g} is at or beyond the edge {limit:g}")
    V = problem.directions
    return V @ _stationary(problem, eta, sampling) @ V.T


@checked
def floor_leading(problem: Problem, eta: Positive, sampling: Sampling) -> float:
    """The floor to first order in η: `(ηγ/4) tr S = ηγ mean(rᵢ²‖xᵢ‖²)`, S the gradient covariance at w*.

    From the trace of the Lyapunov equation `HM + MH = ηγS`: H drops out. The textbook's `(η/2b) σ² tr H` is
    the same where residuals do not depend on x. Too low by 5 % at a twentieth of the edge, by 2x at half.
    """
    return eta * gamma(sampling, len(problem.X)) / 4 * float(np.trace(_residual_covariance(problem)))


@checked
def floor_second_order(problem: Problem, eta: Positive, sampling: Sampling) -> float:
    """The floor to second order: `(ηγ/4) tr S + (η²/4) [(1−γ) tr(H²M₁) + γ tr K(M₁)]`, `HM₁ + M₁H = γS`.

    `K(M) = (1/n) Σ HᵢMHᵢ`.
    """
    factor, lam = gamma(sampling, len(problem.X)), problem.eigenvalues
    S = _residual_covariance(problem)
    M1 = factor * S / (lam[:, None] + lam[None, :])
    Z = problem.X @ problem.directions
    trace_K = 4 * np.mean(np.sum((Z @ M1) * Z, axis=1) * np.sum(Z**2, axis=1))
    second = (1 - factor) * np.sum(lam**2 * np.diag(M1)) + factor * trace_K
    return eta * factor / 4 * float(np.trace(S)) + eta**2 / 4 * float(second)


@checked
def steps_to(
    problem: Problem, start: Any, eta: Positive, sampling: Sampling, excess: Positive, *, most: Count = 1_000_000
) -> float:
    """The first t with `E[L(w_t)] − L* <= excess`; inf if not within `most` steps (GD: ever)."""
    factor = gamma(sampling, len(problem.X))
    if factor == 0:
        return gd_steps_to(problem, start, eta, excess)
    return _first_below(problem, _operator(problem, _lift(problem), eta, factor), start, excess, most)


@checked
def best_step(
    problem: Problem, start: Any, sampling: Sampling, excess: Positive, *, most: Count = 1_000_000
) -> BestStep:
    """The constant step size whose expected excess loss reaches `excess` soonest: no Monte Carlo, no tuning runs.

    A grid of 40 step sizes down from the edge in powers of 1.25, then two rounds of 20 between the best one's
    neighbours: η to about 0.2 %, steps to the integer for that η. `BestStep(nan, inf)` if none of them arrives
    within `most` steps.
    """
    n = len(problem.X)
    factor, limit = gamma(sampling, n), sgd_edge(problem, sampling)
    lift = _lift(problem) if factor > 0 else None

    def count(eta: float, within: float) -> float:
        if lift is None:
            return gd_steps_to(problem, start, float(eta), excess)
        most_now = int(min(most, within))
        return _first_below(problem, _operator(problem, lift, eta, factor), start, excess, most_now)

    def search(etas: np.ndarray, best: BestStep) -> BestStep:
        for eta in etas:
            steps = count(eta, best.steps)
            if steps < best.steps:
                best = BestStep(float(eta), steps)
        return best

    best = search(0.999 * limit * 1.25 ** -np.arange(40.0), BestStep(math.nan, math.inf))
    if math.isinf(best.steps):
        return best
    for ratio in (1.25, 1.025):
        etas = best.eta * ratio ** np.linspace(-1, 1, 20)
        best = search(etas[etas < limit], best)
    return best


# --- the spread of the loss ------------------------------------------------------------------------------------


@checked
def sgd_deviation(
    problem: Problem, start: Any, eta: Positive, sampling: Sampling, steps: Any
) -> Float[np.ndarray, " k"]:
    """The exact standard deviation of `L(w_t)` over runs, at the given steps; for at most `QUARTIC` coefficients.

    `E[(L − L*)²] = ¼ (h⊗h)·E[d^⊗4]` with `h = vec H`, and fourth moments move linearly: with `d̃ = (d, 1)`,
    `E[d̃^⊗4]_t = (E[A_B^⊗4])^t d̃₀^⊗4`. At the floor it is about 1.2 times the mean: single runs scatter by 100 %.
    """
    t, c = _steps(steps), start_components(problem, start)
    Z, r = problem.X @ problem.directions, len(problem.eigenvalues)
    _check_quartic(r)
    A = np.zeros((len(Z), r + 1, r + 1))
    A[:, :r, :r] = np.eye(r)[None] - 2 * eta * Z[:, :, None] * Z[:, None, :]
    A[:, :r, r] = 2 * eta * problem.residuals[:, None] * Z
    A[:, r, r] = 1.0
    fourth = _batch_tensor(A, sampling)

    h = np.zeros((r + 1, r + 1))
    h[:r, :r] = np.diag(problem.eigenvalues)
    weight = 0.25 * np.kron(h.ravel(), h.ravel())
    d = np.append(c, 1.0)
    state = np.kron(np.kron(d, d), np.kron(d, d))
    squares = np.array([weight @ z for z in _march(fourth, state, t)])
    mean = sgd_moments(problem, start, eta, sampling, t).excess
    return np.sqrt(np.maximum(squares - mean**2, 0))


@checked
def deviation_edge(problem: Problem, sampling: Sampling) -> float:
    """The step size beyond which the variance of the loss explodes, so that no sample mean of it means anything.

    `ρ(E[(I − ηH_B)^⊗4]) = 1`, by bisection below `sgd_edge`, for at most `QUARTIC` coefficients.
    """
    Z, r = problem.X @ problem.directions, len(problem.eigenvalues)
    _check_quartic(r)
    Hi = 2 * Z[:, :, None] * Z[:, None, :]

    def radius(eta: float) -> float:
        return float(np.abs(np.linalg.eigvals(_batch_tensor(np.eye(r)[None] - eta * Hi, sampling))).max())

    low, high = 0.0, sgd_edge(problem, sampling)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if radius(middle) < 1 else (low, middle)
    return low


# --- how it is done --------------------------------------------------------------------------------------------


class _Lift(NamedTuple):
    """Moments of the data in the eigenbasis, on the pairs `i <= j` of a symmetric matrix."""

    weight: np.ndarray
    """[q]: how often a pair occurs, 1 on the diagonal and 2 off it."""
    i: np.ndarray
    j: np.ndarray
    S: np.ndarray
    """[q]: (4/n) Σ r² x xᵀ."""
    T: np.ndarray
    """[q, r]: −(8/n) Σ r (x xᵀ) xₗ."""
    Q: np.ndarray
    """[q, q]: (4/n) Σ (x xᵀ)(x xᵀ), times the weight of the column."""


def _lifts(problem: Problem) -> bool:
    """Whether one matrix step costs less than going through the data."""
    n, r = len(problem.X), len(problem.eigenvalues)
    return r <= LIFTED and (1 + r + r * (r + 1) // 2) ** 2 <= 4 * n * r * r + 100_000


class _Same:
    """A problem as a key: the same one is the one with the very same fields."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def __hash__(self) -> int:
        return id(self.problem.X)

    def __eq__(self, other: object) -> bool:
        # X alone will not do: a problem with other residuals has other moments.
        return isinstance(other, _Same) and all(a is b for a, b in zip(self.problem, other.problem, strict=True))


def _lift(problem: Problem) -> _Lift:
    return _lift_of(_Same(problem))


@lru_cache(maxsize=2)  # a curve over step sizes asks for the same O(n p⁴) moments at every point
def _lift_of(same: _Same) -> _Lift:
    problem = same.problem
    r, n = len(problem.eigenvalues), len(problem.X)
    if r > LIFTED:
        raise ValueError(
            f"the matrix of second moments for {r} coefficients has {r * (r + 1) // 2} rows: this is formed up to "
            f"{LIFTED} coefficients. sgd_moments and sgd_excess work for any number"
        )
    Z, residuals = problem.X @ problem.directions, problem.residuals
    i, j = np.triu_indices(r)
    q = len(i)
    S, T, Q = np.zeros(q), np.zeros((q, r)), np.zeros((q, q))
    rows = max(1, 4_000_000 // q)  # 32 MB of pair products at a time
    for at in range(0, n, rows):
        z, e = Z[at : at + rows], residuals[at : at + rows]
        pairs = z[:, i] * z[:, j]
        S += 4 / n * (e**2) @ pairs
        T -= 8 / n * pairs.T @ (e[:, None] * z)
        Q += 4 / n * pairs.T @ pairs
    weight = np.where(i == j, 1.0, 2.0)
    return _Lift(weight, i, j, S, T, Q * weight[None, :])


def _operator(problem: Problem, lift: _Lift, eta: float, factor: float) -> np.ndarray:
    """One step on `(1, m, M)`: the matrix B of the module's recursion, in the eigenbasis."""
    lam, (_, i, j, S, T, Q) = problem.eigenvalues, lift
    r, q = len(lam), len(S)
    a, noise = 1 - eta * lam, eta**2 * factor
    B = np.zeros((1 + r + q, 1 + r + q))
    B[0, 0] = 1
    B[1 : 1 + r, 1 : 1 + r] = np.diag(a)
    B[1 + r :, 0] = noise * S
    B[1 + r :, 1 : 1 + r] = noise * T
    B[1 + r :, 1 + r :] = np.diag(a[i] * a[j] - noise * lam[i] * lam[j]) + noise * Q
    return B


def _stationary(problem: Problem, eta: float, sampling: Sampling) -> np.ndarray:
    """The fixed point of the second moment, in the eigenbasis."""
    lift, r = _lift(problem), len(problem.eigenvalues)
    B = _operator(problem, lift, eta, gamma(sampling, len(problem.X)))
    pairs = np.linalg.solve(np.eye(len(lift.S)) - B[1 + r :, 1 + r :], B[1 + r :, 0])
    M = np.zeros((r, r))
    M[lift.i, lift.j] = M[lift.j, lift.i] = pairs
    return M


def _pack(c: np.ndarray) -> np.ndarray:
    i, j = np.triu_indices(len(c))
    return np.concatenate([[1.0], c, c[i] * c[j]])


def _operator_path(B: np.ndarray, c: np.ndarray, t: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r = len(c)
    i, j = np.triu_indices(r)
    z = np.stack(list(_march(B, _pack(c), t)))
    M = np.zeros((len(t), r, r))
    M[:, i, j] = z[:, 1 + r :]
    M[:, j, i] = z[:, 1 + r :]
    return z[:, 1 : 1 + r], M


def _march(B: np.ndarray, z: np.ndarray, t: np.ndarray) -> Any:
    """`B^t z` at the steps t (not decreasing), by squaring where the gap is long."""
    squares = [B]
    now = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for step in t.tolist():
            gap = step - now
            if gap <= len(B):
                for _ in range(gap):
                    z = B @ z
            else:
                for bit in range(gap.bit_length()):
                    if bit == len(squares):
                        squares.append(squares[-1] @ squares[-1])
                    if gap >> bit & 1:
                        z = squares[bit] @ z
            now = step
            yield z


def _excess_blocks(problem: Problem, B: np.ndarray, c: np.ndarray, count: int) -> Any:
    """`E[L(w_t)] − L*` for t = 0, 1, 2, …, in blocks: rows `ℓ Bᵏ` once, then one product per block."""
    r = len(c)
    i, j = np.triu_indices(r)
    functional = np.zeros(len(B))
    functional[1 + r :][i == j] = 0.5 * problem.eigenvalues
    z, rows, power = _pack(c), functional[None, :], B
    with np.errstate(over="ignore", invalid="ignore"):
        # Doubling costs one cube of the size; it pays while the block is shorter than the run.
        while len(rows) < min(4096, max(1, count // 2)) and (len(B) < 500 or len(rows) < 64):
            rows, power = np.concatenate([rows, rows @ power]), power @ power
        for _ in range(-(-count // len(rows))):
            yield rows @ z
            z = power @ z


def _first_below(problem: Problem, B: np.ndarray, start: Any, excess: float, most: int) -> float:
    done, last = 0, math.nan
    for block in _excess_blocks(problem, B, start_components(problem, start), most + 1):
        below = np.flatnonzero(block <= excess)
        if below.size:
            t = done + int(below[0])
            return float(t) if t <= most else math.inf
        done += len(block)
        # Beyond overflow, or settled at a floor above the target.
        if not np.isfinite(block[-1]) or (len(block) > 1 and abs(block[-1] - last) <= 1e-13 * last):
            return math.inf
        last = float(block[-1])
    return math.inf


@checked
def compact_recursion(
    problem: Problem, components: Any, eta: Positive, factor: NotNegative, steps: Any
) -> tuple[np.ndarray, np.ndarray]:
    """`m[k, r]` and `M[k, r, r]` in the eigenbasis at the given steps, straight from the module's recursion.

    O(n r²) a step and nothing formed beforehand: for many coefficients, and a second route to the same numbers.
    """
    gaps = np.diff(_steps(steps), prepend=0)
    components = checks.array("components", components, "r")
    if len(components) != len(problem.eigenvalues):
        raise ValueError(f"components must be {len(problem.eigenvalues)}, one per eigenvalue; got {len(components)}")
    if gaps.sum() >= checks.LIMIT:
        raise ValueError(f"steps must be below 2**31 here, where each is taken; got {gaps.sum()}")
    with jax.enable_x64(True):
        arrays = (problem.X @ problem.directions, problem.residuals, problem.eigenvalues, np.asarray(components))
        m, M = _compact(*map(jnp.asarray, arrays), jnp.float64(eta), jnp.float64(factor), jnp.asarray(gaps))
        return np.asarray(m), np.asarray(M)


@jax.jit
def _compact(Z, residuals, lam, c, eta, factor, gaps):
    n, a = Z.shape[0], 1 - eta * lam

    def step(_, moments):
        m, M = moments
        e = residuals**2 - 2 * residuals * (Z @ m) + jnp.sum((Z @ M) * Z, axis=1)
        noise = (4 / n) * (Z * e[:, None]).T @ Z - lam[:, None] * M * lam[None, :]
        return a * m, a[:, None] * M * a[None, :] + eta**2 * factor * noise

    def until(moments, gap):
        moments = jax.lax.fori_loop(0, gap, step, moments)
        return moments, moments

    return jax.lax.scan(until, (c, jnp.outer(c, c)), gaps)[1]


def _residual_covariance(problem: Problem) -> np.ndarray:
    """`S = (4/n) Σ rᵢ² xᵢxᵢᵀ` in the eigenbasis: the covariance of the example gradients at the minimum."""
    scaled = problem.residuals[:, None] * (problem.X @ problem.directions)
    return 4 / len(scaled) * scaled.T @ scaled


_PARTITIONS = (
    ((0, 1, 2, 3),),
    *(((i,), tuple(k for k in range(4) if k != i)) for i in range(4)),
    *(((0, k), tuple(m for m in (1, 2, 3) if m != k)) for k in (1, 2, 3)),
    *(((i, j), *((k,) for k in range(4) if k not in (i, j))) for i in range(4) for j in range(i + 1, 4)),
    ((0,), (1,), (2,), (3,)),
)
"""The 15 ways to say which of the four factors of a fourth moment share an example."""


def _batch_tensor(A: np.ndarray, sampling: Sampling) -> np.ndarray:
    """`E[A_B^⊗4]` for the batch mean of the matrices `A[n, s, s]`, as a matrix `[s⁴, s⁴]`, over the partitions.

    The four factors pick examples of the batch; which of them coincide is a partition π of {0, 1, 2, 3}:

        with replacement  b⁻⁴ Σ_π (b)_|π| E_π,         E_π = Π over blocks of mean_i A_i^⊗block
        distinct          b⁻⁴ Σ_π (b)_|π|/(n)_|π| Σ_{σ >= π} μ(π, σ) n^|σ| E_σ

    with falling factorials and the Möbius function of the partition lattice.
    """
    n, s = len(A), A.shape[1]
    b = n if sampling.batch_size is None else sampling.batch_size
    distinct = not is_with_replacement(sampling)
    gamma(sampling, n)  # refuses a reshuffled pass

    moments = {1: A.mean(axis=0)}
    for k in (2, 3, 4):
        moments[k] = _mean_power(A, k)

    def product(partition: tuple[tuple[int, ...], ...]) -> np.ndarray:
        """Π over blocks, its axes put back in the order of the factors: rows first, then columns."""
        operands: list[Any] = []
        for block in partition:
            k = len(block)
            operands += [moments[k].reshape((s,) * (2 * k)), [*block, *(4 + f for f in block)]]
        return np.einsum(*operands, list(range(8))).reshape(s**4, s**4)

    weights = dict.fromkeys(_PARTITIONS, 0.0)
    for pi in _PARTITIONS:
        share = _falling(b, len(pi)) / b**4
        if not distinct:
            weights[pi] += share
        elif _falling(n, len(pi)) > 0:
            share /= _falling(n, len(pi))
            for sigma in _PARTITIONS:
                merged = [sum(set(block) <= set(big) for block in pi) for big in sigma]
                if sum(merged) == len(pi):  # every block of π lies inside one of σ
                    mobius = math.prod((-1) ** (m - 1) * math.factorial(m - 1) for m in merged)
                    weights[sigma] += share * mobius * n ** len(sigma)
    return sum((w * product(p) for p, w in weights.items() if w != 0), start=np.zeros((s**4, s**4)))


def _mean_power(A: np.ndarray, k: int) -> np.ndarray:
    """`mean_i A_i^⊗k` with axes (rows 1…k, columns 1…k), a chunk of examples at a time."""
    n, s = len(A), A.shape[1]
    flat = A.reshape(n, s * s)
    total: Any = 0.0
    rows = max(1, 2_000_000 // s**4)
    for at in range(0, n, rows):
        a = flat[at : at + rows]
        pair = (a[:, :, None] * a[:, None, :]).reshape(len(a), -1)
        # Σᵢ of a product of k matrices is one matrix product of two halves.
        total = total + {2: a, 3: pair, 4: pair}[k].T @ {2: a, 3: a, 4: pair}[k]
    factors_apart = total.reshape((s,) * (2 * k)) / n
    return factors_apart.transpose([*range(0, 2 * k, 2), *range(1, 2 * k, 2)])


def _falling(x: int, k: int) -> int:
    return math.prod(x - i for i in range(k))


def _check_quartic(r: int) -> None:
    if r > QUARTIC:
        raise ValueError(
            f"the matrix of fourth moments for {r} coefficients has {(r + 1) ** 4} rows: it is formed up to "
            f"{QUARTIC} coefficients"
        )


def _coefficients(problem: Problem, params: Any) -> np.ndarray:
    """`Linear(w, b)`, or an array `[..., p]`, as coefficients of the design's columns."""
    p = problem.X.shape[1]
    if isinstance(params, Linear):
        w = checks.array("start.w", params.w, finite=False)
        if params.b is not None:
            b = checks.array("start.b", params.b, finite=False)
            if b.shape != w.shape[:-1]:
                raise ValueError(f"w{list(w.shape)} and b{list(b.shape)} do not fit: need w[..., d] and b[...]")
            w = np.concatenate([w, b[..., None]], axis=-1)
    else:
        w = checks.array("the coefficients (start)", params, finite=False)
    if w.shape[-1:] != (p,):
        raise ValueError(
            f"need {p} coefficients, one per column of the design (the bias last), got shape {list(w.shape)}"
        )
    return w


def _powers(problem: Problem, eta: float, t: np.ndarray) -> np.ndarray:
    """`(1 − ηλₖ)^t`, `[k, r]`."""
    with np.errstate(over="ignore", under="ignore"):
        return (1 - eta * problem.eigenvalues)[None, :] ** t[:, None].astype(float)


def from_eigenbasis(problem: Problem, start: Any, steps: np.ndarray, m: np.ndarray, M: np.ndarray) -> Moments:
    """Moments in the coefficients of the design from `m[k, r] = E[c]` and `M[k, r, r] = E[ccᵀ]`, c the components.

    What of the start lies outside the range of H never moves: `d = still + V c`.
    """
    V, away = problem.directions, _coefficients(problem, start) - problem.minimiser
    still = away - V @ (away @ V)
    moved = m @ V.T
    cross = still[None, :, None] * moved[:, None, :]
    second = V @ M @ V.T + np.outer(still, still)[None] + cross + np.swapaxes(cross, 1, 2)
    excess = 0.5 * np.einsum("kii,i->k", M, problem.eigenvalues)
    return Moments(steps, (problem.minimiser + still)[None, :] + moved, second, excess)


def _bisect(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The first t in (low, high] at which `holds` is false, where it is true up to some point and false after."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return high


def _steps(steps: Any) -> np.ndarray:
    return checks.whole_numbers("steps", steps, rising=True)
