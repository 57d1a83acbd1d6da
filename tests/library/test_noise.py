"""Gradient noise: exact values against full enumeration of all batches, estimates against exact values."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from jaxgrad import models, noise, sampling
from jaxgrad.descent import descend
from jaxgrad.losses import half_squared, logloss, mean_loss, squared
from jaxgrad.statistics import z_limit
from jaxgrad.theory import escape
from jaxgrad.theory import least_squares as ls
from jaxgrad.types import Batch, Linear, TwoLayer


def linear_case(n: int = 7, l2: float = 0.0):
    rng = np.random.default_rng(3)
    X = rng.normal(size=(n, 3))
    batch = Batch(jnp.asarray(X), jnp.asarray(X @ [1.0, 2.0, -1.0] + rng.standard_t(4, size=n)))
    params = Linear(jnp.asarray(rng.normal(size=3)), jnp.asarray(0.5))
    return mean_loss(models.linear, squared, l2), params, batch


def net_case(n: int = 7):
    rng = np.random.default_rng(4)
    batch = Batch(jnp.asarray(rng.normal(size=(n, 2))), jnp.asarray(rng.normal(size=(n, 1))))
    params = TwoLayer(*(jnp.asarray(rng.normal(size=s)) for s in ((2, 3), (3, 1), (3,), (1,))))
    return mean_loss(models.two_layer, half_squared), params, batch


CASES = {"linear": linear_case(), "linear with l2": linear_case(l2=0.3), "net": net_case()}


def every_batch_gradient(case, b: int, kind: str) -> np.ndarray:
    """Gradients `[batches, p]` of all batches of size b, each equally likely."""
    loss, params, batch = case
    n = len(batch.y)
    choices = (
        itertools.product(range(n), repeat=b) if kind == "with replacement" else itertools.combinations(range(n), b)
    )
    gradient = jax.jit(jax.vmap(lambda i: ravel_pytree(jax.grad(loss)(params, jax.tree.map(lambda a: a[i], batch)))[0]))
    return np.asarray(gradient(np.array(list(choices))))


SAMPLINGS = {"with replacement": sampling.with_replacement, "distinct": sampling.distinct}


@pytest.mark.parametrize(
    ("case", "kind", "b"),
    [("linear", "with replacement", b) for b in (1, 2, 3)]
    + [("linear", "distinct", b) for b in (1, 2, 3, 6, 7)]
    + [("linear with l2", "distinct", 2), ("net", "with replacement", 2), ("net", "distinct", 3)],
)
def test_the_covariance_of_a_batch_gradient_is_gamma_sigma(case, kind, b):
    loss, params, batch = CASES[case]
    gradients = every_batch_gradient(CASES[case], b, kind)
    exact = noise.measure(loss, params, batch, chunk=3)
    covariance = np.cov(gradients.T, ddof=0)
    factor = noise.gamma(SAMPLINGS[kind](b), 7)
    np.testing.assert_allclose(
        gradients.mean(axis=0), ravel_pytree(exact.gradient)[0], atol=1e-12 * math.sqrt(exact.trace)
    )
    predicted = factor * noise.covariance(loss, params, batch)
    np.testing.assert_allclose(covariance, predicted, atol=1e-12 * exact.trace)
    assert np.trace(covariance) == pytest.approx(factor * exact.trace, rel=1e-11, abs=1e-12 * exact.trace)
    # The other sampling's factor is not within 1 % of it.
    if b > 1:
        other = {"with replacement": "distinct", "distinct": "with replacement"}[kind]
        wrong = (noise.gamma(SAMPLINGS[other](b), 7), (7 - b) / (b * 7))
        assert all(abs(np.trace(covariance) - w * exact.trace) > 0.01 * exact.trace for w in wrong[:1])


@pytest.mark.parametrize("case", CASES)
def test_measure_agrees_with_the_definitions(case):
    loss, params, batch = CASES[case]
    exact = noise.measure(loss, params, batch)
    each = jax.vmap(lambda g: ravel_pytree(g)[0])(noise.example_gradients(loss, params, batch))
    G = ravel_pytree(jax.grad(loss)(params, batch))[0]
    np.testing.assert_allclose(each.mean(axis=0), G, atol=1e-13)
    sigma = np.cov(np.asarray(each).T, ddof=0)
    flat, unravel = ravel_pytree(params)
    H = jax.hessian(lambda w: loss(unravel(w), batch))(flat)
    assert exact.n == 7
    assert exact.gradient_squared == pytest.approx(float(G @ G), rel=1e-12)
    assert exact.trace == pytest.approx(np.trace(sigma), rel=1e-12)
    assert exact.simple_scale == pytest.approx(np.trace(sigma) / float(G @ G), rel=1e-12)
    assert exact.noise_curvature == pytest.approx(np.trace(H @ sigma), rel=1e-10)
    assert exact.curvature == pytest.approx(float(G @ H @ G), rel=1e-10)
    directions = jax.vmap(unravel)(jnp.eye(flat.size))
    variances = noise.directional_variances(loss, params, batch, directions, chunk=2)
    np.testing.assert_allclose(variances, np.diag(sigma), rtol=1e-10, atol=1e-14)


def test_measure_does_not_depend_on_the_chunk_or_on_the_x64_switch():
    loss, params, batch = linear_case(n=1030)
    whole = noise.measure(loss, params, batch)
    parts = noise.measure(loss, params, batch, chunk=100)
    assert whole.trace == pytest.approx(parts.trace, rel=1e-13)
    single = jax.tree.map(lambda a: np.asarray(a, np.float32), (params, batch))
    with jax.enable_x64(False):
        in_float32_process = noise.measure(loss, *jax.tree.map(jnp.asarray, single))
    reference = noise.measure(loss, *single)
    assert in_float32_process.trace == pytest.approx(reference.trace, rel=1e-13)


def test_measure_agrees_with_the_theory_of_least_squares():
    loss, _, batch = linear_case(n=40)
    problem = ls.problem(batch)
    at_minimum = Linear(jnp.asarray(problem.minimiser[:3]), jnp.asarray(problem.minimiser[3]))
    exact = noise.measure(loss, at_minimum, batch)
    s = sampling.distinct(4)
    assert ls.floor_leading(problem, 0.01, s) == pytest.approx(0.01 * noise.gamma(s, 40) / 4 * exact.trace)
    # At the minimum the scales say that no batch is large enough.
    assert exact.simple_scale > 1e20


@pytest.mark.parametrize(("kind", "b"), [("with replacement", 2), ("distinct", 2), ("distinct", 4)])
def test_one_step_gains_what_is_predicted_and_no_other_step_gains_more(kind, b):
    case = CASES["linear"]
    loss, params, batch = case
    gradients = every_batch_gradient(case, b, kind)
    flat, unravel = ravel_pytree(params)
    best = noise.one_step(noise.measure(loss, params, batch), noise.gamma(SAMPLINGS[kind](b), 7))
    after = jax.jit(lambda eta: jnp.mean(jax.vmap(lambda g: loss(unravel(flat - eta * g), batch))(gradients)))
    gains = [float(loss(params, batch) - after(f * best.eta)) for f in (0.98, 1.0, 1.02)]
    assert gains[1] == pytest.approx(best.decrease, rel=1e-11)
    assert gains[1] > max(gains[0], gains[2])
    # 1/b in place of γ understates distinct examples.
    if kind == "distinct":
        assert noise.one_step(noise.measure(loss, params, batch), 1 / b).decrease < 0.95 * best.decrease


def test_one_step_without_positive_curvature_is_nan():
    loss = lambda w, batch: -jnp.mean((batch.x @ w) ** 2)
    exact = noise.measure(loss, jnp.ones(3), linear_case()[2])
    assert exact.curvature < 0
    assert math.isnan(exact.noise_scale)
    assert math.isnan(noise.one_step(exact, 0.1).eta)
    assert math.isnan(noise.measure(loss, jnp.ones(3), linear_case()[2], curvature=False).noise_scale)


@pytest.mark.parametrize("kind", ["with replacement", "distinct"])
def test_the_two_batch_estimator_is_unbiased_over_all_batches(kind):
    """With 1/b in place of γ it is biased for distinct examples: as published, it is for an infinite population."""
    loss, params, batch = case = CASES["linear"]
    exact = noise.measure(loss, params, batch)
    few = np.mean(np.sum(every_batch_gradient(case, 1, kind) ** 2, axis=1))
    many = np.mean(np.sum(every_batch_gradient(case, 3, kind) ** 2, axis=1))

    def estimate(g_small, g_big):
        return (few - many) / (g_small - g_big), (g_small * many - g_big * few) / (g_small - g_big)

    trace, squared = estimate(*(noise.gamma(SAMPLINGS[kind](b), 7) for b in (1, 3)))
    assert trace == pytest.approx(exact.trace, rel=1e-12)
    assert squared == pytest.approx(exact.gradient_squared, rel=1e-11)
    published_trace, published_squared = estimate(1, 1 / 3)
    if kind == "distinct":
        assert published_trace == pytest.approx(exact.trace * 7 / 6, rel=1e-12)
        assert published_squared == pytest.approx(exact.gradient_squared - exact.trace / 6, rel=1e-11)


def norms_of_many_estimates(params, small, big, draws, replicates):
    """`‖g_B‖²[draws, replicates]` for each of the two samplings."""
    loss, _, batch = linear_case(n=200)
    keys = jax.random.split(jax.random.key(draws), (2, draws * replicates))
    norms = [noise.squared_norms(loss, params, batch, s, k) for s, k in zip((small, big), keys, strict=True)]
    return [np.asarray(squares).reshape(draws, replicates) for squares in norms]


@pytest.mark.parametrize("kind", ["with replacement", "distinct"])
def test_estimated_intervals_cover_the_exact_scale(kind):
    loss, params, batch = linear_case(n=200)
    exact = noise.measure(loss, params, batch)
    small, big = SAMPLINGS[kind](8), SAMPLINGS[kind](64)
    few, many = norms_of_many_estimates(params, small, big, 100, 1000)
    e = noise.scale_from_norms(few, many, small=small, big=big, n=200)
    covers = lambda i, truth: np.mean((i.low <= truth) & (truth <= i.high))
    # 1000 replicates: standard error 0.7 %.
    assert covers(e.scale, exact.simple_scale) >= 0.93
    assert covers(e.trace, exact.trace) >= 0.93
    assert covers(e.gradient_squared, exact.gradient_squared) >= 0.93
    # The estimator as published, with 1/b for γ, misses for distinct examples (six in seven are covered).
    published = noise.scale_from_norms(
        few, many, small=sampling.with_replacement(8), big=sampling.with_replacement(64), n=200
    )
    assert (covers(published.gradient_squared, exact.gradient_squared) < 0.9) == (kind == "distinct")


def test_an_estimate_is_reproducible_and_made_of_the_norms():
    loss, params, batch = linear_case(n=200)
    small, big = sampling.distinct(8), sampling.full_batch()
    a, b = (noise.estimate_scale(loss, params, batch, small=small, big=big, key=jax.random.key(1)) for _ in range(2))
    assert a.scale == b.scale
    exact = noise.measure(loss, params, batch)
    assert a.trace.low < exact.trace < a.trace.high
    # With the full batch as `big`, ‖G‖² is exact, draw by draw.
    assert a.gradient_squared.estimate == pytest.approx(exact.gradient_squared, rel=1e-12)


def test_an_estimate_at_a_minimum_does_not_pretend():
    """There the gradient is zero: 95 % of intervals for its square must hold zero, and leave the scale unbounded."""
    problem = ls.problem(linear_case(n=200)[2])
    at_minimum = Linear(jnp.asarray(problem.minimiser[:3]), jnp.asarray(problem.minimiser[3]))
    small, big = sampling.distinct(4), sampling.distinct(40)
    few, many = norms_of_many_estimates(at_minimum, small, big, 100, 1000)
    e = noise.scale_from_norms(few, many, small=small, big=big, n=200)
    assert np.mean(e.scale.high == np.inf) >= 0.93
    assert np.median(e.scale.low) > 20
    assert np.mean((e.gradient_squared.low < 0) & (e.gradient_squared.high > 0)) >= 0.93


@pytest.mark.parametrize("kind", ["with replacement", "distinct", "reshuffled"])
def test_the_librarys_samplers_have_the_noise_they_should(kind):
    """Mean of ‖g_B − G‖² over 4000 batches; the first batch of a reshuffled pass is one of distinct examples."""
    loss, params, batch = CASES_LARGE
    exact = noise.measure(loss, params, batch)
    G = ravel_pytree(exact.gradient)[0]
    b = 50
    s = getattr(sampling, kind.replace(" ", "_"))(b)
    keys = jax.random.split(jax.random.key(8), 4000)

    def squared_error(key):
        seen = jax.tree.map(lambda a: a[s.indices(key, 0, 100)], batch)
        return jnp.sum((ravel_pytree(jax.grad(loss)(params, seen))[0] - G) ** 2)

    errors = np.asarray(jax.jit(jax.vmap(squared_error))(keys))

    def z(factor):
        return abs(errors.mean() - factor * exact.trace) / (errors.std() / math.sqrt(len(errors)))

    right = sampling.with_replacement(b) if kind == "with replacement" else sampling.distinct(b)
    wrong = sampling.distinct(b) if kind == "with replacement" else sampling.with_replacement(b)
    assert z(noise.gamma(right, 100)) < z_limit(3)
    assert z(noise.gamma(wrong, 100)) > 10
    assert z(noise.gamma(right, 100) / 100) > 10  # 1/n dropped


CASES_LARGE = net_case(n=100)


def test_a_monitor_rides_along_a_descent():
    rng = np.random.default_rng(5)
    X = rng.normal(size=(100, 3))
    batch = Batch(X.astype(np.float32), (X[:, 0] + rng.normal(size=100) > 0).astype(np.float32))
    loss = mean_loss(models.linear, logloss)
    trace = descend(
        loss,
        models.init_linear(3),
        batch,
        optimizer=0.1,
        sampling=sampling.distinct(8),
        steps=30,
        key=jax.random.split(jax.random.key(0), 3),
        record=4,
        observe=noise.monitor(loss, batch, curvature=True, chunk=32),
    )
    assert set(trace.observed) == {"gradient_squared", "noise_trace", "simple_scale", "noise_scale"}
    assert trace.observed["noise_trace"].shape == (3, 4)
    assert set(noise.monitor(loss, batch)(models.init_linear(3))) == set(trace.observed) - {"noise_scale"}
    last = jax.tree.map(lambda leaf: leaf[1], trace.params)
    exact = noise.measure(loss, last, batch)
    seen = {name: values[1, -1] for name, values in trace.observed.items()}
    assert seen["noise_trace"] == pytest.approx(exact.trace, rel=1e-5)
    assert seen["simple_scale"] == pytest.approx(exact.simple_scale, rel=1e-4)
    assert seen["noise_scale"] == pytest.approx(exact.noise_scale, rel=1e-3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: noise.gamma(sampling.reshuffled(3), 7), "not independent.*theory.reshuffling"),
        (lambda: noise.gamma(sampling.distinct(8), 7), "n = 7"),
        (lambda: noise.measure(sum_of_squares, jnp.zeros(2001), CASES["linear"][2]), "2001 parameters"),
        (lambda: noise.covariance(sum_of_squares, jnp.zeros(2001), CASES["linear"][2]), "2001 parameters"),
        (
            lambda: noise.measure(sum_of_squares, jnp.zeros(2), Batch(jnp.zeros((0, 2)), jnp.zeros(0))),
            "no examples",
        ),
        (lambda: estimate(sampling.distinct(3), sampling.distinct(2)), "noisier of the two"),
        (lambda: estimate(sampling.distinct(2), sampling.distinct(3), draws=10), "at least 20"),
    ],
)
def test_refuses_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("kind", [sampling.with_replacement, sampling.distinct])
def test_the_law_of_a_sampling_is_its_draw_and_not_its_name(kind):
    """Behaviour hung on the text: under another name, a sampling was refused or taken for one of other noise."""
    own, other = kind(3), kind(3)._replace(name="mine")
    r = np.random.default_rng(3)
    problem = ls.problem(Batch(r.normal(size=(6, 2)), r.normal(size=6)), bias=True)
    assert noise.gamma(other, 6) == noise.gamma(own, 6)
    deviation = lambda law: ls.sgd_deviation(problem, np.ones(3), 0.01, law, [1, 5])
    np.testing.assert_array_equal(deviation(other), deviation(own))
    rows = Batch(np.arange(4.0)[:, None], np.arange(4.0))
    for named, real in zip(escape._outcomes(rows, other), escape._outcomes(rows, own), strict=True):
        np.testing.assert_array_equal(named, real)
    with pytest.raises(ValueError, match="not independent"):
        noise.gamma(sampling.reshuffled(3)._replace(name=own.name), 6)


def sum_of_squares(params, batch):
    del batch
    return jnp.sum(params**2)


def estimate(small, big, *, draws=30):
    return noise.estimate_scale(*CASES["linear"], small=small, big=big, key=jax.random.key(0), draws=draws)
