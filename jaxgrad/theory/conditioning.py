"""One step size for all parameters (C7): what ill-conditioning costs, and what scaling can and cannot repair.

On a quadratic `f = ½ dᵀHd` GD moves along each eigenvector of H by itself: component i contracts by `1 − ηλᵢ`, so
one step size must serve the largest curvature and the smallest one crawls.

Three remedies see only the **axes**:

- Jacobi, `D⁻¹ = diag(H)⁻¹` in front of the gradient, which for linear regression is GD on features divided by their
  root mean square. It undoes bad scaling of the axes exactly; turned by 45° it changes nothing.
- Adagrad, RMSProp and Adam with ε = 0 divide by the size of each gradient coordinate. Where H is diagonal, their
  path **does not depend on the curvatures at all**; turned, they lose this.

The paths here are for a diagonal H, coordinate by coordinate, with ε = 0.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxgrad import checks
from jaxgrad.checks import Level, Natural, Number, Positive, checked
from jaxgrad.theory.least_squares import Problem, problem
from jaxgrad.types import Batch

Matrix = Float[np.ndarray, "p p"]


class Rescaled(NamedTuple):
    """A problem in other units: coefficients `u` of it are `w = u / scale` of the original."""

    problem: Problem
    scale: Float[np.ndarray, " p"]


@checked
def contraction(eigenvalues: Any, eta: Positive, steps: Any) -> Float[np.ndarray, "k r"]:
    """`(1 − ηλᵢ)^t`: what is left of each eigen-component of the error after t steps of GD."""
    lam, t = checks.array("eigenvalues", eigenvalues, "r", least=1), checks.whole_numbers("steps", steps)
    with np.errstate(over="ignore", under="ignore"):
        return (1 - eta * lam)[None, :] ** t[:, None].astype(float)


@checked
def condition_number(H: Any) -> float:
    """`λ_max/λ_min` of a symmetric positive definite matrix; ValueError if it is not one."""
    eigenvalues = np.linalg.eigvalsh(_symmetric(H))
    if eigenvalues[0] <= 0:
        raise ValueError(f"H must be positive definite; its smallest eigenvalue is {eigenvalues[0]:.3g}")
    return float(eigenvalues[-1] / eigenvalues[0])


@checked
def jacobi_condition_number(H: Any) -> float:
    """The condition number that GD meets behind `diag(H)⁻¹`: that of `D^−½ H D^−½`.

    For two parameters `(1 + |ρ|)/(1 − |ρ|)` with `ρ = H₁₂/√(H₁₁H₂₂)`. Within a factor p of the best that any
    diagonal scaling can do (van der Sluis 1969).
    """
    H = _symmetric(H)
    d = np.diag(H)
    if (d <= 0).any():
        raise ValueError(f"H must be positive definite; its diagonal has {d.min():.3g}")
    d = np.sqrt(d)
    return condition_number(H / d[:, None] / d[None, :])


@checked
def rotated(eigenvalues: Any, angle: Number) -> Matrix:
    """The 2 x 2 matrix with these eigenvalues, its axes turned by `angle` radians; 0 is diagonal."""
    lam = checks.array("eigenvalues", eigenvalues)
    if lam.shape != (2,):
        raise ValueError(f"need two eigenvalues, got shape {lam.shape}")
    R = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return R @ np.diag(lam) @ R.T


@checked
def rescaled(batch: Batch, *, bias: bool = True) -> Rescaled:
    """Linear regression on columns divided by their root mean square: plain GD on it is Jacobi's on `batch`.

    With `w = u/scale`, one step `u − η∇` is `w − (2η) diag(H)⁻¹ ∇L(w)`, since `H_jj = 2 scaleⱼ²`. Raises ValueError for
    a column of zeros.
    """
    original = problem(batch, bias=bias)
    scale = np.sqrt(np.mean(original.X**2, axis=0))
    if np.any(scale == 0):
        raise ValueError(f"column {int(np.argmin(scale))} of the design is zero everywhere: drop it")
    return Rescaled(problem(Batch(original.X / scale[None, :], original.y), bias=False), scale)


# --- adaptive methods on a diagonal quadratic, ε = 0 -----------------------------------------------------------


@checked
def adagrad_path(start: Any, eta: Positive, steps: Natural) -> Float[np.ndarray, "t p"]:
    """Adagrad on `½ Σ λᵢdᵢ²`, any positive λ: `d ← d − η d_t/√(Σ_{s<=t} d_s²)`, at t = 0 … steps.

    The curvature cancels between gradient and accumulator. The first step is `η sign(d)`.
    """
    d, path, total = *_begin(start), 0.0
    for _ in range(steps):
        total = total + d**2
        d = d - eta * _quotient(d, np.sqrt(total))
        path.append(d)
    return np.stack(path)


@checked
def rmsprop_path(start: Any, eta: Positive, steps: Natural, *, decay: Level = 0.9) -> Float[np.ndarray, "t p"]:
    """RMSProp on `½ Σ λᵢdᵢ²`, any positive λ: `v ← ρv + (1−ρ)d²`, `d ← d − η d/√v`, at t = 0 … steps.

    The first step is `η/√(1−ρ) sign(d)`. It ends in a cycle `±η/2` (`rmsprop_cycle`): it does not converge.
    """
    d, path, v = *_begin(start), 0.0
    for _ in range(steps):
        v = decay * v + (1 - decay) * d**2
        d = d - eta * _quotient(d, np.sqrt(v))
        path.append(d)
    return np.stack(path)


@checked
def adam_path(
    start: Any, eta: Positive, steps: Natural, *, decay: Level = 0.9, decay_squares: Level = 0.999
) -> Float[np.ndarray, "t p"]:
    """Adam on `½ Σ λᵢdᵢ²`, any positive λ, bias-corrected, at t = 0 … steps. The first step is `η sign(d)`."""
    d, path, m, v = *_begin(start), 0.0, 0.0
    for t in range(1, steps + 1):
        m = decay * m + (1 - decay) * d
        v = decay_squares * v + (1 - decay_squares) * d**2
        d = d - eta * _quotient(m / (1 - decay**t), np.sqrt(v / (1 - decay_squares**t)))
        path.append(d)
    return np.stack(path)


@checked
def rmsprop_cycle(eta: Positive) -> float:
    """`η/2`: where every coordinate of RMSProp at constant step size ends, `+η/2, −η/2, +η/2, …`.

    On a cycle ±a the accumulator is a², so a step has length η, which must be 2a. The loss stays at
    `½ Σ λᵢ (η/2)²`.
    """
    return eta / 2


def _begin(start: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    d = np.atleast_1d(checks.array("start", start))
    if d.ndim != 1 or d.size == 0:
        raise ValueError(f"start must be a number or numbers [p], got shape {d.shape}")
    return d, [d]


def _quotient(a: np.ndarray, b: Any) -> np.ndarray:
    """`a/b`, and 0 for 0/0: a coordinate at its minimum stays."""
    return np.divide(a, b, out=np.zeros_like(a), where=np.asarray(b) > 0)


def _symmetric(H: Any) -> np.ndarray:
    H = checks.array("H", H)
    if H.ndim != 2 or H.shape[0] != H.shape[1] or H.size == 0 or not np.allclose(H, H.T):
        raise ValueError(f"H must be a symmetric matrix, got shape {H.shape}")
    return H
