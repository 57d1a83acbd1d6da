"""Problems whose minimum, condition number and noise are known to rounding."""

import math
from typing import Any

import numpy as np

from jaxgrad.checks import Count, Floats, NotNegative, Number, Positive, checked
from jaxgrad.data.seeds import entropy
from jaxgrad.types import Batch, Linear


@checked
def linear_problem(
    key: Any,
    n: Count,
    d: Count,
    *,
    condition: Number,
    noise: NotNegative,
    bias: bool = False,
    rotate: bool = True,
    dtype: Floats = np.float64,
) -> tuple[Batch, Linear]:
    """A least-squares problem with a known answer: `(Batch(x[n, d], y[n]), Linear(w*, b*))`.

    `XᵀX/n` has eigenvalues in geometric progression from 1 down to `1/condition`, exactly; so the Hessian
    `(2/n) XᵀX` of the mean squared error (F4) has twice those. `y = X w* + b* + r`, with the residual `r`
    made orthogonal to every column of `X` (and to the constant), so `w*` is the exact minimum of the
    finite sum, where the mean squared error is `noise²`, exactly. With `bias` the columns have mean 0, so
    the bias adds an eigenvalue 1 and leaves the condition as it is. `rotate=False` gives a diagonal
    Hessian, whose eigen-directions are the coordinates.

    `key` is a whole number or a JAX key. Everything is exact to rounding in float64; a float32 copy
    (`dtype`) keeps an eigenvalue only to about 1e-7 of the largest.

    Raises ValueError unless `n >= d >= 1` (one more for a bias, and for noise), `condition` is from 1 to
    1e12 (exactly 1 for `d = 1`), and `noise` is finite and not negative.
    """
    _check_problem(n, d, condition, spare=bias + (noise > 0))
    rng = np.random.default_rng(entropy(key))
    raw = rng.standard_normal((n, d))
    U = _orthonormal(raw - raw.mean(axis=0) if bias else raw)
    V = _orthonormal(rng.standard_normal((d, d))) if rotate else np.eye(d)
    X = math.sqrt(n) * (U * np.sqrt(_spectrum(d, condition))) @ V.T
    w = rng.standard_normal(d)
    b = rng.standard_normal() if bias else 0.0
    r = rng.standard_normal(n)
    span = np.column_stack([U, np.full(n, n**-0.5)]) if bias else U
    for _ in range(2):  # once leaves a rounding error the size of r; twice leaves one the size of that
        r = r - span @ (span.T @ r)
    r = r * (noise / np.sqrt(np.mean(r**2))) if noise > 0 else np.zeros(n)
    batch = Batch(X.astype(dtype), (X @ w + b + r).astype(dtype))
    return batch, Linear(w.astype(dtype), np.asarray(b, dtype) if bias else None)


@checked
def logistic_problem(
    key: Any,
    n: Count,
    d: Count,
    *,
    condition: Number,
    signal: Positive = 2.0,
    bias: bool = False,
    rotate: bool = True,
    dtype: Floats = np.float64,
) -> tuple[Batch, Linear]:
    """Logistic regression with a known answer: `(Batch(x[n, d], y[n] in {0, 1}), Linear(w*, b*))`.

    The mean logloss over these n examples has its minimum exactly at `(w*, b*)`, and its Hessian there,
    `(1/n) Σ pᵢ(1-pᵢ) xᵢxᵢᵀ`, has eigenvalues in geometric progression from `q` down to `q/condition` with
    `q = mean pᵢ(1-pᵢ)`; with `bias` the bias is uncoupled from the weights at the minimum and adds the
    eigenvalue `q`. `signal` is the standard deviation of the logits that the labels were drawn from:
    large means easy labels. `key`, `rotate` and `dtype` as in `linear_problem`.

    How: labels are drawn, and the logits fitted to them along one direction `t` (Newton, in one or two
    unknowns), which makes `e = p - y` orthogonal to `t` (and to the constant). The other columns are
    random ones made orthogonal to `e`. Then `Xᵀe = 0`, which is the gradient; and it stays 0 under the
    linear map of the features that gives the Hessian its spectrum.

    Raises ValueError on sizes and `condition` as `linear_problem` does (`n > d`, one more for a bias), on a
    `signal` that is not finite and positive, and where the labels drawn can be separated, so that no
    minimum exists: more examples or a weaker signal help.
    """
    _check_problem(n, d, condition, spare=bias + 1)
    rng = np.random.default_rng(entropy(key))
    t = rng.standard_normal(n)
    shift = rng.standard_normal() if bias else 0.0
    y = (rng.random(n) < _sigmoid(signal * t + shift)).astype(np.float64)
    directions = np.column_stack([t, np.ones(n)]) if bias else t[:, None]
    no_minimum = ValueError(
        f"with n = {n} and signal = {signal} the labels drawn can be separated, or nearly so, and the logloss has "
        "no minimum that could be computed; take more examples, a weaker signal or another key"
    )
    if _separable(t, y, bias):
        raise no_minimum
    fit = _logistic_fit(directions, y)
    p = _sigmoid(directions @ fit)
    e = p - y
    others = rng.standard_normal((n, d - 1))
    for _ in range(2):
        others = others - np.outer(e, e @ others) / (e @ e)
    X = np.column_stack([t, others])
    w = np.concatenate([fit[:1], np.zeros(d - 1)])
    curvature = p * (1 - p) / np.sum(p * (1 - p))
    b = 0.0
    if bias:  # centre with the curvature as weights: the bias no longer couples with the weights
        centre = curvature @ X
        X, b = X - centre, fit[1] + w @ centre
    # X L⁻ᵀ, with L Lᵀ the weighted second moment of X, has the second moment I; the second round removes the
    # rounding of the first. Then X Q Λ^½ Rᵀ has R Λ Rᵀ. Logits do not change: the weights take the inverse map.
    for _ in range(2):
        try:
            L = np.linalg.cholesky(X.T @ (X * curvature[:, None]))
        except np.linalg.LinAlgError:
            raise no_minimum from None
        X, w = np.linalg.solve(L, X.T).T, L.T @ w
    Q = _orthonormal(rng.standard_normal((d, d)))
    R = _orthonormal(rng.standard_normal((d, d))) if rotate else np.eye(d)
    root = np.sqrt(_spectrum(d, condition))
    X, w = (X @ Q * root) @ R.T, R @ ((Q.T @ w) / root)
    return Batch(X.astype(dtype), y.astype(dtype)), Linear(w.astype(dtype), np.asarray(b, dtype) if bias else None)


def _check_problem(n: Any, d: Any, condition: Any, spare: int) -> None:
    if n < d + spare:
        raise ValueError(f"n = {n} examples cannot fix this problem; d = {d} here needs n >= {d + spare}")
    if not 1 <= condition <= 1e12:
        raise ValueError(f"condition is largest over smallest eigenvalue, from 1 to 1e12; got {condition}")
    if d == 1 and condition != 1:
        raise ValueError(f"one feature has one eigenvalue, so its condition is 1; got {condition} with d = 1")


def _spectrum(d: int, condition: float | int) -> np.ndarray:
    """1 down to 1/condition in geometric progression."""
    return float(condition) ** -np.linspace(0.0, 1.0, d)


def _orthonormal(matrix: np.ndarray) -> np.ndarray:
    """Orthonormal columns with the span of the matrix's; of a square normal matrix, a uniform rotation."""
    q, r = np.linalg.qr(matrix)
    return q * np.sign(np.diag(r))


def _sigmoid(z: np.ndarray) -> np.ndarray:
    """1/(1 + e⁻ᶻ), with no overflow for any z."""
    return 0.5 * (1.0 + np.tanh(0.5 * z))


def _separable(t: np.ndarray, y: np.ndarray, bias: bool) -> bool:
    """Whether some `s t (+ b)` has the right sign for every label, so that the logloss has no minimum."""
    if bias:
        ones, zeros = t[y == 1], t[y == 0]
        return not (len(ones) and len(zeros) and ones.min() < zeros.max() and zeros.min() < ones.max())
    sides = np.sign(t) * (2 * y - 1)
    return bool((sides >= 0).all() or (sides <= 0).all())


def _logistic_fit(directions: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The minimum of the mean logloss over one or two coefficients: Newton, halving steps that overshoot."""

    def loss(theta: np.ndarray) -> float:
        z = directions @ theta
        return float(np.mean(np.logaddexp(0.0, z) - y * z))

    theta, small = np.zeros(directions.shape[1]), False
    for _ in range(200):
        p = _sigmoid(directions @ theta)
        gradient = directions.T @ (p - y)
        step = np.linalg.solve(directions.T @ (directions * (p * (1 - p))[:, None]), gradient)
        while loss(theta - step) > loss(theta) + 1e-12:  # more than rounding can do
            step = step / 2
        theta = theta - step
        if small:
            break
        # Convergence is quadratic: one more step after one this small ends at rounding.
        small = np.abs(step).max() <= 1e-8 * max(1.0, np.abs(theta).max())
    return theta
