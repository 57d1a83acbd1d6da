"""The minimum of a convex problem, with a proof of how close it is.

Every gap `f(w) − f*` in this package is measured from a value that comes with a **bound**:
`|value − f*| <= bound` is a theorem about the returned point, not a tolerance that some solver was satisfied
with. A curve of gaps means something down to the bound and nothing below it.

    least_squares(batch)   (1/n) Σ (yᵢ − w·xᵢ − b)² + (l2/2)‖w‖²         closed form
    logistic(batch)        mean logloss of the logits w·xᵢ + b, same l2   Newton
    minimum(loss, ...)     any convex loss over any pytree                 Newton

Everything is float64, whatever JAX's x64 switch says, and the switch is left alone. The first two count the
rounding of their own arithmetic into the bound (a priori, for any order of summation); `minimum` cannot look
inside `loss`, so its bound is exact for the gradient that was computed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxgrad import checks
from jaxgrad.checks import Count, Examples, NotNegative, Positive, Weights, checked, float64
from jaxgrad.types import Batch, Linear, Loss, Params

UNIT = 2.0**-53
"""Unit roundoff of float64."""

DENSE = 2000
"""Up to this many parameters the Hessian is formed; beyond, conjugate gradients give Newton's direction."""


class Optimum(NamedTuple):
    """A minimiser with its certificate."""

    params: Params
    """The point, float64 NumPy arrays in the pytree of the problem."""
    value: float
    """`f(params)`."""
    bound: float
    """`|value − f*| <= bound`: the distance to the minimum, and where stated the rounding of `value`."""
    gradient_norm: float
    """`‖∇f(params)‖`."""
    curvature: float
    """The smallest positive eigenvalue of the Hessian at `params`, or the strong convexity that was given."""
    steps: int
    """Newton steps taken (1 for a closed form)."""
    certificate: str
    """Why the bound holds, in a sentence."""


@checked
def least_squares(batch: Batch, *, bias: bool = True, l2: NotNegative = 0.0) -> Optimum:
    """The minimum of `f(w, b) = (1/n) Σ ‖yᵢ − w·xᵢ − b‖² + (l2/2)‖w‖²` (F4), in closed form.

    For `x[n, d]` with `y[n]`, giving `Linear(w[d], b[])`, or `y[n, k]`, giving `Linear(w[d, k], b[k])`; `b` is
    None for `bias=False`.

    Proof of the bound. f is quadratic with Hessian `H = (2/n) AᵀA` for the design A (a column of ones for
    the bias, rows `√(n l2/2) I` for the penalty), so `f(w) − f* = ½ gᵀH⁺g <= ‖g‖²/(2λ)`, with g the gradient
    at w, which lies in range(H), and λ the smallest positive eigenvalue of H. The computed g and λ are
    widened by their rounding errors, and the rounding error of `value` is added.

    If A has not full column rank the minimiser of least norm is returned (with `bias=True`, of least norm of
    (w, b)); singular values below `max(n, p) · UNIT` of the largest then count as exact zeros, and the
    certificate says so.

    Raises ValueError for empty or not finite data, shapes that do not fit, or a negative `l2`.
    """
    X, Y = _examples(batch)
    (n, d), single = X.shape, Y.ndim == 1
    Y = Y[:, None] if single else Y
    A = np.column_stack([X, np.ones(n)]) if bias else X
    p = A.shape[1]
    if l2 > 0:
        A = np.vstack([A, np.sqrt(n * l2 / 2) * np.eye(d, p)])
        Y = np.vstack([Y, np.zeros((d, Y.shape[1]))])

    U, sigma, Vt = np.linalg.svd(A, full_matrices=False)
    blur = max(A.shape) * UNIT * sigma[0]
    rank = int(np.sum(sigma > 2 * blur))

    def solve(target: np.ndarray) -> np.ndarray:
        return Vt[:rank].T @ ((U[:, :rank].T @ target) / sigma[:rank, None])

    W = solve(Y)
    W = W + solve(Y - A @ W)  # One refinement: the gradient at W falls to rounding.

    R = Y - A @ W
    gradient = -(2 / n) * A.T @ R
    # |computed − exact| of a residual: a dot product of p terms and a subtraction.
    dR = _gamma(p + 1) * (np.abs(Y) + np.abs(A) @ np.abs(W))
    norms = np.linalg.norm(A, axis=1)[:, None]
    d_gradient = 2 / n * float(np.linalg.norm(np.sum((dR + _gamma(len(A) + 1) * np.abs(R)) * norms, axis=0)))
    value = math.fsum((R**2).ravel()) / n
    d_value = math.fsum((2 * np.abs(R) * dR + dR**2).ravel()) / n + 4 * UNIT * value

    gradient_norm = float(np.linalg.norm(gradient))
    curvature = 2 / n * float(sigma[rank - 1] - blur) ** 2 if rank else math.inf
    deficient = f"; rank {rank} of {p}, the rest taken as exactly singular" if rank < p else ""
    return Optimum(
        _linear(W, d, bias, single),
        value,
        (gradient_norm + d_gradient) ** 2 / (2 * curvature) + d_value,
        gradient_norm,
        curvature,
        1,
        f"f − f* = ½ gᵀH⁺g <= ‖g‖²/(2λ), λ = {curvature:.3g}, rounding included{deficient}",
    )


@checked
def logistic(batch: Batch, *, bias: bool = True, l2: NotNegative = 0.0, steps: Count = 200) -> Optimum:
    """The minimum of the mean logloss of `hᵢ = w·xᵢ + b` plus `(l2/2)‖w‖²` (F15, F16), for labels 0 and 1.

    Damped Newton in float64. Params: `Linear(w[d], b[])`; `b` is None for `bias=False`.

    Proof of the bound (generalised self-concordance, Bach 2010). Along any line `|φ'''| <= R‖v‖ φ''` with
    `R = max‖(xᵢ, 1)‖`, because the logistic function has `|ψ'''| <= ψ''`; a quadratic penalty only helps.
    Integrating twice from w, with `S = R‖v‖`, μ the smallest eigenvalue of H and `a² = vᵀHv >= μ‖v‖²`,

        f(w + v) >= f(w) − νa + a² h(S),    h(S) = (e^−S + S − 1)/S²,    ν² = gᵀH⁻¹g.

    If `f(w + v) <= f(w)` then `ν >= a h(S) >= (√μ/R) S h(S) >= (√μ/R)(1 − e^−S)/2`. So with
    `c = Rν/√μ < ½` every such v, the minimiser's included, has `S <= S̄ = −ln(1 − 2c)`. There h, which
    decreases, is at least `h(S̄) >= (1 − e^−S̄)/(2S̄) = c/S̄`, and the maximum of `νa − a²c/S̄` over a gives
    **`f(w) − f* <= ν²S̄/(4c)`**, which tends to `ν²/2`. ν, μ and `value` are widened by their rounding errors.

    Raises ValueError for empty or not finite data, labels other than 0 and 1, a negative `l2`, and where
    no minimiser can be certified: separable data without l2 have none, and a singular Hessian hides it.
    """
    X, y = _examples(batch)
    if y.ndim != 1 or not np.isin(y, (0, 1)).all():
        bad = "shape " + str(y.shape) if y.ndim != 1 else f"{y[~np.isin(y, (0, 1))][0]:g}"
        raise ValueError(f"logistic needs one label, 0 or 1, per example; got {bad}")
    n, d = X.shape
    A = np.column_stack([X, np.ones(n)]) if bias else X
    p = A.shape[1]
    sign = 2 * y - 1
    penalty = l2 * (np.arange(p) < d)
    norms = np.linalg.norm(A, axis=1)
    R = float(norms.max()) * (1 + _gamma(p))

    def losses(w: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -sign * (A @ w))

    def value_at(w: np.ndarray) -> float:
        return math.fsum(losses(w)) / n + 0.5 * float(penalty @ w**2)

    w, value, best = np.zeros(p), value_at(np.zeros(p)), None
    for step in range(steps):
        t, l = -sign * (A @ w), losses(w)
        wrong = np.exp(t - l)  # s(t) = 1 − p(label), to full relative accuracy.
        gradient = A.T @ (-sign * wrong) / n + penalty * w
        weight = wrong * np.exp(-l)
        H = (A.T * weight) @ A / n + np.diag(penalty)

        # Relative rounding of `wrong` and `weight`: from the logit, then from exp and log.
        blur = _gamma(p) * (np.abs(A) @ np.abs(w)) + UNIT * (2 * np.abs(t) + 2 * l + 16)
        d_gradient = float(np.sum(wrong * (blur + _gamma(n)) * norms)) / n + 4 * UNIT * l2 * np.linalg.norm(w)
        d_H = float(np.sum(weight * (2 * blur + _gamma(n)) * norms**2)) / n + _gamma(4 * p) * np.trace(H)
        mu = float(np.linalg.eigvalsh(H)[0]) - d_H
        if mu <= d_H:
            break
        newton = np.linalg.solve(H, -gradient)
        # H >= H̃ − d_H >= (1 − d_H/μ̃) H̃, and the solve loses at most as much again.
        nu = math.sqrt(max(0.0, float(-gradient @ newton)) * (1 + 4 * d_H / mu)) + d_gradient / math.sqrt(mu)
        excess = _self_concordant_excess(nu, mu, R)
        # |dl/dh| = s(t) turns the blur of the logit into that of the loss.
        d_value = float(np.mean(wrong * blur)) + 8 * UNIT * value
        if best is not None and excess >= best.bound - d_value:
            break  # As low as rounding lets it go.
        if excess < math.inf:
            best = Optimum(
                _linear(w[:, None], d, bias, single=True),
                value,
                excess + d_value,
                float(np.linalg.norm(gradient)),
                mu,
                step,
                f"Bach 2010: f − f* <= ν²·(−ln(1−2c))/(4c), R = {R:.3g}, ν = {nu:.3g}, μ = {mu:.3g}, "
                f"c = Rν/√μ = {R * nu / math.sqrt(mu):.3g} < 1/2, rounding included",
            )
        w, value = _backtrack(value_at, w, value, newton, float(gradient @ newton))

    if best is None:
        raise ValueError(
            "no minimum could be certified for this logistic problem: after Newton's steps ‖w‖ = "
            f"{np.linalg.norm(w):.3g} and the loss is {value:.3g}. Separable data have no minimiser (the "
            "loss falls for ever as ‖w‖ grows) and collinear features leave the Hessian singular: add l2 > 0"
        )
    return best


@checked
def minimum(
    loss: Loss,
    params: Weights,
    batch: Examples,
    *,
    strong_convexity: Positive | None = None,
    self_concordance: Positive | None = None,
    steps: Count = 200,
) -> Optimum:
    """The minimum of any convex `loss(params, batch)`, twice differentiable, over any pytree of parameters.

    Damped Newton from `params`, in float64. It is a certificate because of one of these:

    - the loss is **quadratic** in its parameters, which is read off the traced program (its Hessian does not
      depend on the parameters). Then `f − f* = ½ gᵀH⁺g <= ‖g‖²/(2λ)`, λ the smallest positive eigenvalue of H.
    - `strong_convexity=μ`: you vouch for `∇²f >= μI` everywhere, for example μ = l2 where the penalty covers
      every parameter. Then `f − f* <= ‖g‖²/(2μ)`: minimise `f(v) >= f(w) + g·(v−w) + (μ/2)‖v−w‖²` over v.
    - `self_concordance=R`: you vouch for `|φ'''| <= R‖v‖ φ''` along every line (logistic regression:
      `R = max‖xᵢ‖`, softmax regression: `R = √2 max‖xᵢ‖`). The bound is that of `logistic`.

    The bound holds for the gradient and Hessian as computed: their rounding, and that of `value` (a few
    units in its 16th digit), are not in it, because the loss is opaque. Parameters and floating leaves of
    the batch are taken to float64.

    Raises ValueError if nothing certifies the problem, if it is found not to be convex or bounded below, if
    the loss is not a finite scalar, or if parameters are not floating point.
    """
    with jax.enable_x64(True):
        batch = float64(batch)
        start, unravel = ravel_pytree(float64(params))
        checks.every_finite(start, "params")
        checks.loss(loss, unravel(start), batch)

        def f(w: jax.Array) -> jax.Array:
            return loss(unravel(w), batch)

        gradient_of = jax.grad(f)

        def hessian_times(w: jax.Array, v: jax.Array) -> jax.Array:
            return jax.jvp(gradient_of, (w,), (v,))[1]

        quadratic = not _depends(jax.make_jaxpr(hessian_times)(start, start).jaxpr, (True, False))[0]
        _check_certifiable(start.size, quadratic, strong_convexity, self_concordance)
        compiled_value, gradient_at = jax.jit(f), jax.jit(gradient_of)
        direction = _direction_solver(hessian_times, start.size)

        def value_at(w: np.ndarray) -> float:
            return float(compiled_value(w))

        def certify(norm: float, decrement: float, lowest: float) -> tuple[float, float, str]:
            """Curvature, bound and reason."""
            if quadratic:
                return lowest, norm**2 / (2 * lowest), f"a quadratic loss: ‖g‖²/(2λ), λ = {lowest:.3g}"
            if strong_convexity is not None:
                mu = strong_convexity
                return mu, norm**2 / (2 * mu), f"strong convexity: ‖g‖²/(2μ), μ = {mu:.3g}"
            assert self_concordance is not None
            excess = _self_concordant_excess(decrement, lowest, self_concordance)
            return lowest, excess, f"self-concordance: ν²·(−ln(1−2c))/(4c), R = {self_concordance:.3g}"

        w, best = np.asarray(start), None
        value, norm = value_at(w), math.inf
        for step in range(steps):
            gradient = np.asarray(gradient_at(w))
            norm = float(np.linalg.norm(gradient))
            if not (math.isfinite(value) and math.isfinite(norm)):
                raise ValueError(f"the loss or its gradient is not finite at Newton step {step}: loss {value}")
            newton, decrement, lowest = direction(w, gradient)
            curvature, excess, why = certify(norm, decrement, lowest)
            if best is not None and excess >= best.bound:
                break  # As low as rounding lets it go.
            if excess < math.inf:
                point = jax.tree.map(np.asarray, unravel(jnp.asarray(w)))
                best = Optimum(point, value, excess, norm, curvature, step, why)
            w, value = _backtrack(value_at, w, value, newton, float(gradient @ newton))

    if best is None:
        raise ValueError(
            f"no minimum could be certified in {steps} Newton steps: the gradient norm is {norm:.3g}. Is there "
            "a minimiser, and is the Hessian positive there?"
        )
    return best


def _check_certifiable(
    size: int, quadratic: bool, strong_convexity: float | None, self_concordance: float | None
) -> None:
    if not quadratic and strong_convexity is None and self_concordance is None:
        raise ValueError(
            "nothing certifies a minimum of this loss: it is not quadratic in its parameters. Pass "
            "strong_convexity=μ if ∇²f >= μI everywhere (an l2 penalty on every parameter gives μ = l2), "
            "or self_concordance=R (logistic regression: R = max‖xᵢ‖). A loss that is not convex has no "
            "certificate"
        )
    if size > DENSE and strong_convexity is None:
        raise ValueError(
            f"{size} parameters are too many to form a Hessian (at most {DENSE}): only "
            "strong_convexity=μ certifies a problem of this size"
        )


def _direction_solver(
    hessian_times: Callable[..., jax.Array], size: int
) -> Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, float, float]]:
    """`(w, gradient) -> (Newton's direction, its decrement, smallest positive eigenvalue, 0 if unknown)`."""
    if size <= DENSE:
        rows = jax.jit(lambda w: jax.lax.map(lambda v: hessian_times(w, v), jnp.eye(size), batch_size=32))
        return lambda w, gradient: _newton(np.asarray(rows(w)), gradient)

    solve = jax.jit(
        lambda w, g: jax.scipy.sparse.linalg.cg(lambda v: hessian_times(w, v), -g, tol=1e-10, maxiter=1000)[0]
    )

    def direction(w: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, float, float]:
        newton = np.asarray(solve(w, gradient))
        return newton, math.sqrt(max(0.0, float(-gradient @ newton))), 0.0

    return direction


def _self_concordant_excess(nu: float, mu: float, R: float) -> float:
    """`f(w) − f* <= ν²·(−ln(1−2c))/(4c)`, `c = Rν/√μ`; infinite where c >= ½, which proves nothing."""
    if mu <= 0:
        return math.inf
    c = R * nu / math.sqrt(mu)
    if c >= 0.5:
        return math.inf
    return 0.5 * nu**2 * (-math.log1p(-2 * c) / (2 * c) if c > 0 else 1.0)


def _newton(H: np.ndarray, gradient: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Newton's direction, its decrement and the smallest positive eigenvalue; the null space is left alone."""
    eigenvalues, vectors = np.linalg.eigh((H + H.T) / 2)
    top = float(np.abs(eigenvalues).max())
    zero = len(H) * 8 * UNIT * top
    if eigenvalues[0] < -max(zero, 1e-12 * top):
        raise ValueError(
            f"the loss is not convex: its Hessian has an eigenvalue {eigenvalues[0]:.3g} (largest {top:.3g}). "
            "Only convex problems have a certificate"
        )
    positive = eigenvalues > zero
    if not positive.any():
        raise ValueError("the loss has no curvature at this point: its Hessian is zero, so nothing bounds it")
    along = vectors.T @ gradient
    if np.linalg.norm(along[~positive]) > 1e-8 * max(np.linalg.norm(gradient), top):
        raise ValueError(
            "the loss falls along a direction without curvature: it has no minimiser there, or its Hessian "
            "underflows. Add a penalty on every parameter"
        )
    along, eigenvalues, vectors = along[positive], eigenvalues[positive], vectors[:, positive]
    decrement = float(np.sqrt(np.sum(along**2 / eigenvalues)))
    return -vectors @ (along / eigenvalues), decrement, float(eigenvalues[0])


def _backtrack(
    value_at: Callable[[np.ndarray], float], w: np.ndarray, value: float, direction: np.ndarray, slope: float
) -> tuple[np.ndarray, float]:
    """The first of the steps 1, ½, ¼, … that lowers f enough (Armijo); near the minimum the full step."""
    step = 1.0
    while step > 1e-10:
        new = w + step * direction
        new_value = value_at(new)
        # Within rounding of the minimum the values say nothing: trust Newton.
        if new_value <= value + 1e-4 * step * slope + 8 * UNIT * abs(value):
            return new, new_value
        step /= 2
    return w, value


def _depends(jaxpr: Any, inputs: tuple[bool, ...]) -> list[bool]:
    """Which outputs of a jaxpr can depend on the marked inputs: nested calls followed, all else may."""
    marked = {var for var, mark in zip(jaxpr.invars, inputs, strict=True) if mark}

    def is_marked(atom: Any) -> bool:
        return not hasattr(atom, "val") and atom in marked

    for eqn in jaxpr.eqns:
        marks = tuple(is_marked(v) for v in eqn.invars)
        if not any(marks):
            continue
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if inner is not None and eqn.primitive.name in ("jit", "pjit", "closed_call", "custom_jvp_call"):
            outputs = _depends(getattr(inner, "jaxpr", inner), marks)
        else:
            outputs = [True] * len(eqn.outvars)
        marked |= {var for var, mark in zip(eqn.outvars, outputs, strict=True) if mark}
    return [is_marked(v) for v in jaxpr.outvars]


def _gamma(k: int) -> float:
    """`ku/(1 − ku)`: bounds the relative error of a sum of k terms, whatever the order (Higham 2002)."""
    return k * UNIT / (1 - k * UNIT)


def _linear(W: np.ndarray, d: int, bias: bool, single: bool) -> Linear:
    W = W[:, 0] if single else W
    return Linear(W[:d], np.asarray(W[d]) if bias else None)


def _examples(batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """`x[n, d]` and `y` in float64, checked."""
    X = checks.array("x", batch.x, least=1)
    y = checks.array("y", batch.y, bools=True)
    if X.ndim != 2 or X.shape[1] == 0 or y.ndim not in (1, 2) or len(X) != len(y):
        raise ValueError(f"the batch needs x[n, d] and y[n] or y[n, k]; got x{list(X.shape)} and y{list(y.shape)}")
    return X, y
