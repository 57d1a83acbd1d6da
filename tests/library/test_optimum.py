"""Certified minima: the bound holds at every stage, is not vacuous, and a weaker formula is caught."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import models, optimum
from jaxgrad.losses import logloss, mean_loss, softmax_cross_entropy, squared
from jaxgrad.types import Batch, Linear

RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 4)) * np.array([1.0, 5.0, 0.2, 1.0]) + 0.3
X[0] = [0.0, 40.0, 3.0, -8.0]  # an outlier: R is far from typical
Y = X @ np.array([1.0, -0.2, 2.0, 0.0]) + RNG.standard_t(5, size=200)
LABELS = (RNG.uniform(size=200) < 1 / (1 + np.exp(-(X @ np.array([0.5, -0.4, 3.0, 0.0]))))).astype(float)
REGRESSION, BINARY = Batch(X, Y), Batch(X, LABELS)
R = math.sqrt((X**2).sum(axis=1).max() + 1)


def exact_least_squares(x: list[list[int]], y: list[int]) -> Fraction:
    """min (1/n) Σ (y − x·w − b)² over the rationals, by Gaussian elimination on the normal equations."""
    rows = [[*map(Fraction, r), Fraction(1)] for r in x]
    p, n = len(rows[0]), len(rows)
    system = [
        [sum(r[i] * r[j] for r in rows) for j in range(p)] + [sum(r[i] * t for r, t in zip(rows, y, strict=True))]
        for i in range(p)
    ]
    for i in range(p):
        system[i] = [v / system[i][i] for v in system[i]]
        for k in range(p):
            if k != i:
                system[k] = [a - system[k][i] * b for a, b in zip(system[k], system[i], strict=True)]
    w = [row[-1] for row in system]
    return sum((t - sum(a * b for a, b in zip(r, w, strict=True))) ** 2 for r, t in zip(rows, y, strict=True)) / n


@pytest.mark.parametrize("scale", [1, 1000])
def test_least_squares_brackets_the_exact_rational_minimum(scale):
    x = RNG.integers(-9, 10, size=(12, 3)) * np.array([1, scale, 1])
    y = RNG.integers(-20, 20, size=12)
    o = optimum.least_squares(Batch(x, y))
    truth = exact_least_squares(x.tolist(), y.tolist())
    assert abs(Fraction(o.value) - truth) <= Fraction(o.bound)
    assert o.bound < 1e-11 * o.value


def test_least_squares_is_the_minimum_of_the_librarys_own_loss():
    for l2 in (0.0, 0.1):
        o = optimum.least_squares(REGRESSION, l2=l2)
        loss = mean_loss(models.linear, squared, l2)
        params = jax.tree.map(jnp.asarray, o.params)
        assert float(loss(params, REGRESSION)) == pytest.approx(o.value, rel=1e-14)
        gradient = jax.tree.leaves(jax.grad(loss)(params, REGRESSION))
        assert max(np.abs(g).max() for g in gradient) < 1e-12
        general = optimum.minimum(loss, models.init_linear(4), REGRESSION)
        assert abs(general.value - o.value) <= general.bound + o.bound
        assert "quadratic" in general.certificate
        assert general.curvature == pytest.approx(o.curvature, rel=1e-8)


def test_least_squares_with_many_outputs():
    y = np.stack([Y, -2 * Y + 1], axis=1)
    o = optimum.least_squares(Batch(X, y))
    assert o.params.w.shape == (4, 2)
    assert o.value == pytest.approx(5 * optimum.least_squares(REGRESSION).value, rel=1e-12)


def test_least_squares_without_full_rank_says_so():
    o = optimum.least_squares(Batch(np.column_stack([X, X[:, 0] - X[:, 1]]), Y))
    assert o.value == pytest.approx(optimum.least_squares(REGRESSION).value, rel=1e-12)
    assert "rank 5 of 6" in o.certificate
    interpolating = optimum.least_squares(Batch(X[:3], Y[:3]))
    assert interpolating.value <= interpolating.bound < 1e-25


@pytest.mark.parametrize("l2", [0.0, 1e-3])
def test_the_logistic_bound_holds_at_every_newton_step(l2):
    best = optimum.logistic(BINARY, l2=l2)
    assert best.bound < 1e-13
    certified = 0
    for steps in range(1, best.steps + 1):
        try:
            o = optimum.logistic(BINARY, l2=l2, steps=steps)
        except ValueError:
            continue  # too far for a certificate
        certified += 1
        assert o.value - best.value <= o.bound + best.bound
    assert certified >= 3


def test_the_logistic_bound_is_a_bound_and_a_tight_one_around_the_minimum():
    """Derivatives by autodiff here: a second route to g and H."""
    best = optimum.logistic(BINARY)
    minimiser = np.append(best.params.w, best.params.b)
    A = np.column_stack([X, np.ones(200)])
    f = lambda w: jnp.mean(jnp.logaddexp(0.0, -(2 * LABELS - 1) * (A @ w)))
    derivatives = jax.jit(lambda w: (f(w), jax.grad(f)(w), jax.hessian(f)(w)))
    ratios = []
    for scale in (1e-5, 1e-4, 1e-3, 1e-2):
        for _ in range(10):
            w = minimiser + scale * RNG.normal(size=5)
            value, g, H = map(np.asarray, derivatives(w))
            nu, mu = math.sqrt(g @ np.linalg.solve(H, g)), np.linalg.eigvalsh(H)[0]
            bound = optimum._self_concordant_excess(nu, mu, R)
            gap = float(value) - best.value
            assert gap <= bound + best.bound
            if R * nu / math.sqrt(mu) < 0.05:
                ratios.append(bound / gap)
    assert len(ratios) >= 10
    # It tends to ν²/2, the true gap: a formula half as large would have failed above.
    assert max(ratios) < 1.3


def test_the_self_concordance_inequality_is_needed():
    """Far from the minimum ν²/2 alone is no bound: the certificate must refuse there, and does."""
    # One far example of the wrong label: curvature almost vanishes where the start is saturated.
    batch = Batch(np.array([[1.0], [-1.0], [1.0]]), np.array([1.0, 0.0, 0.0]))
    best = optimum.logistic(batch, bias=False)
    w = np.array([12.0])
    t = -(2 * batch.y - 1) * (batch.x @ w)
    p = 1 / (1 + np.exp(-t))
    gradient, curvature = np.mean(-(2 * batch.y - 1) * p * batch.x[:, 0]), np.mean(p * (1 - p))
    gap = np.mean(np.logaddexp(0, t)) - best.value
    nu = abs(gradient) / math.sqrt(curvature)
    assert optimum._self_concordant_excess(nu, curvature, 1.0) == math.inf
    # The other way round: where ν²/2 is too small, the true bound is not.
    for w in np.linspace(best.params.w[0] - 1.5, best.params.w[0] + 1.5, 61):
        t = -(2 * batch.y - 1) * (batch.x[:, 0] * w)
        p = 1 / (1 + np.exp(-t))
        gradient, curvature = np.mean(-(2 * batch.y - 1) * p * batch.x[:, 0]), np.mean(p * (1 - p))
        gap = np.mean(np.logaddexp(0, t)) - best.value
        assert gap <= optimum._self_concordant_excess(abs(gradient) / math.sqrt(curvature), curvature, 1.0) + 1e-15


def test_strong_convexity_and_self_concordance_certify_the_same_minimum():
    loss = mean_loss(models.linear, logloss, 1e-2)
    start = models.init_linear(4, bias=False)
    by_l2 = optimum.minimum(loss, start, BINARY, strong_convexity=1e-2)
    by_R = optimum.minimum(loss, start, BINARY, self_concordance=R)
    closed = optimum.logistic(BINARY, bias=False, l2=1e-2)
    for o in (by_l2, by_R):
        assert abs(o.value - closed.value) <= o.bound + closed.bound + 1e-15
        assert o.bound < 1e-14
    assert isinstance(by_l2.params, Linear)


def test_the_strong_convexity_bound_holds_before_convergence():
    loss = mean_loss(models.linear, logloss, 1e-2)
    start = models.init_linear(4, bias=False)
    best = optimum.minimum(loss, start, BINARY, strong_convexity=1e-2)
    stages = [optimum.minimum(loss, start, BINARY, strong_convexity=1e-2, steps=k) for k in (1, 2, 3, 4)]
    assert all(o.value - best.value <= o.bound for o in stages)
    # ‖g‖²/(2·λ_max) would not be a bound.
    assert any(o.value - best.value > o.gradient_norm**2 / (2 * 30.0) for o in stages)


def test_any_pytree_softmax_regression_by_conjugate_gradients(monkeypatch):
    """2 x 3 logits with L2 on everything; a dictionary of parameters; no Hessian is formed."""
    labels = np.asarray(RNG.integers(0, 3, size=200))

    def loss(params, batch):
        logits = batch.x @ params["W"] + params["c"][None, :]
        data = jnp.mean(jax.vmap(softmax_cross_entropy)(logits, batch.y))
        return data + 0.005 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    start = {"W": np.zeros((4, 3), np.float32), "c": np.zeros(3, np.float32)}
    dense = optimum.minimum(loss, start, Batch(X, labels), strong_convexity=0.01)
    monkeypatch.setattr(optimum, "DENSE", 3)
    free = optimum.minimum(loss, start, Batch(X, labels), strong_convexity=0.01)
    assert dense.params["W"].dtype == np.float64
    assert abs(dense.value - free.value) <= dense.bound + free.bound + 1e-15
    assert max(dense.bound, free.bound) < 1e-14


def test_quadratic_losses_are_recognised_and_only_those():
    start = {"w": jnp.zeros(4)}

    def certified(example):
        loss = lambda p, batch: jnp.mean(jax.vmap(example)(batch.x @ p["w"], batch.y))
        return optimum.minimum(loss, start, REGRESSION)

    assert certified(lambda z, y: (y - z) ** 2).bound < 1e-15
    assert certified(lambda z, y: 3 * jnp.square(z - y) + z).bound < 1e-15
    for not_quadratic in (lambda z, y: (y - z) ** 4, lambda z, y: jnp.logaddexp(0.0, z) - 0.5 * z):
        with pytest.raises(ValueError, match="not quadratic"):
            certified(not_quadratic)


def test_x64_is_not_needed_and_not_touched():
    with jax.enable_x64(False):
        o = optimum.minimum(mean_loss(models.linear, squared), models.init_linear(4), REGRESSION)
        assert o.bound < 1e-14
        assert jnp.zeros(1).dtype == jnp.float32


def real(name: str) -> Batch:
    from jaxgrad import data

    return data.load(name).batch


def test_real_data_are_certified_to_twelve_digits():
    for l2 in (0.0, 1e-3):
        for o in (
            optimum.least_squares(real("diamonds"), l2=l2),
            optimum.logistic(real("shuttle"), l2=l2),
        ):
            assert o.bound < 1e-12 * o.value
            assert o.value > 0.01


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: optimum.logistic(Batch(X, (X[:, 0] > 0).astype(float))), "Separable.*add l2"),
        (lambda: optimum.logistic(Batch(np.column_stack([X, X[:, 0]]), LABELS)), "collinear"),
        (lambda: optimum.logistic(Batch(X, LABELS * 2 - 1)), "0 or 1, per example; got -1"),
        (lambda: optimum.logistic(Batch(X, np.stack([LABELS, LABELS], 1))), r"got shape \(200, 2\)"),
        (lambda: optimum.least_squares(Batch(X[:, 0], Y)), r"x\[n, d\].*got x\[200\]"),
        (lambda: optimum.least_squares(Batch(X, Y[:-1])), r"y\[199\]"),
        (lambda: optimum.least_squares(Batch(X[:0], Y[:0])), "no examples|at least 1"),
        (lambda: optimum.least_squares(Batch(np.where(X[7, 2] == X, np.nan, X), Y)), r"x\[7, 2\] is nan"),
        (lambda: optimum.least_squares(REGRESSION, l2=-1.0), "l2 must be"),
        (
            lambda: minimise(lambda p, b: jnp.sum((b.y - b.x @ p) ** 2, keepdims=True)),
            r"number, got float64\[1\]",
        ),
        (lambda: minimise(lambda p, b: -jnp.mean((b.y - b.x @ p) ** 2)), "not convex"),
        (lambda: minimise(lambda p, b: jnp.mean((b.y - b.x[:, :3] @ p[:3]) ** 2) + p[3]), "without curvature"),
        (lambda: minimise(lambda p, b: jnp.mean(b.x @ p)), "no curvature"),
        (lambda: minimise(lambda p, b: jnp.mean(jnp.abs(b.y - b.x @ p))), "nothing certifies|no curvature"),
        (lambda: minimise(lambda p, b: jnp.mean(b.x @ p), strong_convexity=0.0), "strong_convexity must be"),
        (lambda: minimise(lambda p, b: jnp.log(jnp.sum(p)), strong_convexity=1.0), "not finite"),
        (
            lambda: optimum.minimum(lambda p, b: jnp.sum(1.0 * p), np.zeros(2, int), REGRESSION),
            "must be floating point",
        ),
        (
            lambda: optimum.minimum(lambda p, b: jnp.sum(p**2), np.zeros(2001), REGRESSION),
            "2001 parameters are too many",
        ),
    ],
)
def test_refuses_what_it_cannot_certify(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def minimise(loss, **constants):
    return optimum.minimum(loss, np.zeros(4), REGRESSION, **constants)
