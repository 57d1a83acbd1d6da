"""Reshuffled passes: the subset recursion against every order, against the library's sampler, and its limits."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import models, sampling
from jaxgrad.losses import mean_loss, squared
from jaxgrad.statistics import z_limit
from jaxgrad.theory import least_squares as ls
from jaxgrad.theory import reshuffling as rr
from jaxgrad.types import Batch, Linear


def regression(n: int, p: int, seed: int = 1) -> ls.Problem:
    rng = np.random.default_rng(seed)
    X = rng.standard_t(6, size=(n, p)) * np.geomspace(1, 0.4, p) + 0.2
    y = X @ np.linspace(1, -1, p) + rng.standard_t(5, size=n) * (0.5 + np.abs(X[:, 0]))
    return ls.problem(Batch(X, y), bias=False)


SMALL, MIDDLE = regression(6, 2), regression(12, 2)
START = np.array([1.0, -2.0])


def enumerate_orders(problem: ls.Problem, eta: float, b: int, passes: int):
    """E[w] and E[L] after each step, over every order of every pass."""
    n = len(problem.y)
    orders = np.array(list(itertools.permutations(range(n))))
    w = START[None, :]
    means, losses = [w[0]], [np.mean((problem.y - w @ problem.X.T) ** 2)]
    for k in range(passes):
        if k > 0:  # two passes of 720 orders each are still few enough
            w = np.repeat(w, len(orders), axis=0)
            chosen = np.tile(orders, (len(w) // len(orders), 1))
        else:
            w, chosen = np.repeat(w, len(orders), axis=0), orders
        for step in range(n // b):
            batch = chosen[:, step * b : (step + 1) * b]
            x, y = problem.X[batch], problem.y[batch]
            error = y - np.einsum("sbi,si->sb", x, w)
            w = w + 2 * eta * np.einsum("sb,sbi->si", error, x) / b
            means.append(w.mean(axis=0))
            losses.append(np.mean((problem.y[None, :] - w @ problem.X.T) ** 2))
    return np.stack(means), np.array(losses)


@pytest.mark.parametrize("b", [1, 2, 3, 4, 6])
def test_moments_equal_the_enumeration_of_every_order(b):
    """b = 4 does not divide 6: the last two examples of each order are dropped, as the sampler does."""
    eta, passes = 0.2 * ls.edge(SMALL), 2
    mean, loss = enumerate_orders(SMALL, eta, b, passes)
    m = rr.moments(SMALL, START, eta, b, np.arange(len(loss)))
    np.testing.assert_allclose(m.mean, mean, atol=1e-12)
    np.testing.assert_allclose(m.excess + SMALL.value, loss, rtol=1e-12)


@pytest.mark.parametrize("fault", ["eta", "fresh batches", "b"])
def test_a_fault_is_caught_by_the_enumeration(fault):
    eta, b = 0.2 * ls.edge(SMALL), 2
    _, loss = enumerate_orders(SMALL, eta, b, 2)
    t = np.arange(len(loss))
    if fault == "eta":
        faulty = rr.moments(SMALL, START, 1.02 * eta, b, t).excess
    elif fault == "b":
        faulty = rr.moments(SMALL, START, eta, 3, t).excess
    else:
        faulty = ls.sgd_moments(SMALL, START, eta, sampling.distinct(b), t).excess
    assert np.abs(faulty + SMALL.value - loss).max() > 1e-3


def test_one_full_batch_a_pass_is_gradient_descent():
    t = np.arange(10)
    eta = 0.7 * ls.edge(SMALL)
    np.testing.assert_allclose(
        rr.moments(SMALL, START, eta, 6, t).excess, ls.gd_excess(SMALL, START, eta, t), rtol=1e-11
    )


def test_the_librarys_reshuffled_sampler_follows_the_prediction():
    b, seeds, eta = 2, 4000, 0.25 * ls.edge(MIDDLE)
    batch = Batch(jnp.asarray(MIDDLE.X), jnp.asarray(MIDDLE.y))
    loss, s = mean_loss(models.linear, squared), sampling.reshuffled(b)
    t = np.array([1, 2, 3, 4, 6, 7, 9, 12, 13, 15, 18, 24, 30])

    def losses(key):
        def step(w, i):
            seen = jax.tree.map(lambda leaf: leaf[s.indices(key, i, 12)], batch)
            return w - eta * jax.grad(loss)(Linear(w), seen).w, w

        _, path = jax.lax.scan(step, jnp.asarray(START), jnp.arange(t[-1] + 1))
        return jax.vmap(lambda w: loss(Linear(w), batch))(path[t]) - MIDDLE.value

    measured = np.asarray(jax.jit(jax.vmap(losses))(jax.random.split(jax.random.key(4), seeds)))

    def largest_z(expected):
        error = measured.std(axis=0, ddof=1) / math.sqrt(seeds)
        return np.max(np.abs(measured.mean(axis=0) - expected) / error)

    assert largest_z(rr.moments(MIDDLE, START, eta, b, t).excess) < z_limit(len(t))
    fresh = ls.sgd_moments(MIDDLE, START, eta, sampling.distinct(b), t).excess
    assert largest_z(fresh) > 2 * z_limit(len(t))


@pytest.mark.parametrize("b", [1, 2, 3, 4, 6])
def test_small_steps_have_the_leading_bias_and_floor(b):
    ratios = []
    for eta in (2e-4, 1e-4):
        eta *= ls.edge(MIDDLE)
        exact, leading = rr.bias(MIDDLE, eta, b), rr.bias_leading(MIDDLE, eta, b)
        np.testing.assert_allclose(exact, leading, rtol=0.02, atol=0.01 * np.abs(leading).max())
        ratios.append(rr.floor(MIDDLE, eta, b).average / rr.floor_leading(MIDDLE, eta, b))
    assert abs(ratios[1] - 1) < 0.01
    # The error is of first order in eta: it halves.
    assert (ratios[1] - 1) / (ratios[0] - 1) == pytest.approx(0.5, abs=0.05)


def test_the_floor_is_where_the_expected_loss_goes():
    eta = 0.2 * ls.edge(MIDDLE)
    floor = rr.floor(MIDDLE, eta, 3)
    late = rr.moments(MIDDLE, START, eta, 3, np.arange(4000, 4004))
    assert late.excess[0] == pytest.approx(floor.end, rel=1e-10)
    assert late.excess.mean() == pytest.approx(floor.average, rel=1e-10)
    np.testing.assert_allclose(late.mean[0] - MIDDLE.minimiser, rr.bias(MIDDLE, eta, 3), atol=1e-12)


def test_reshuffling_wins_at_small_steps_and_not_always_at_large_ones():
    fresh = sampling.distinct(1)
    ratio = lambda eta: rr.floor(MIDDLE, eta, 1).average / ls.floor(MIDDLE, eta, fresh)
    assert ratio(1e-3 / MIDDLE.eigenvalues[0]) < 0.02
    small = [rr.floor(MIDDLE, f * ls.edge(MIDDLE), 1).end for f in (1e-3, 2e-3)]
    assert math.log2(small[1] / small[0]) > 1.8, "O(η²) or better, where fresh batches have O(η)"
    worse = 0
    for seed in range(6):
        problem = regression(8, 2, seed)
        eta = 0.95 * min(rr.stable_edge(problem, 4), ls.sgd_edge(problem, sampling.distinct(4)))
        worse += rr.floor(problem, eta, 4).average > ls.floor(problem, eta, sampling.distinct(4))
    assert worse >= 1


def test_the_edge_is_where_the_second_moment_stops_settling():
    for b in (1, 6):
        limit = rr.stable_edge(MIDDLE, b)
        assert rr.floor(MIDDLE, 0.999 * limit, b).end < math.inf
        assert rr.floor(MIDDLE, 1.001 * limit, b).end == math.inf
        late = np.array([2000, 4000]) * (12 // b)
        grows = [rr.moments(MIDDLE, START, f * limit, b, late).excess for f in (1.01, 0.99)]
        assert grows[0][1] > 10 * grows[0][0]
        assert grows[1][1] < 1.01 * grows[1][0]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: rr.moments(regression(17, 2), START, 0.1, 1, [1]), "all subsets of 17"),
        (lambda: rr.moments(SMALL, START, 0.1, 7, [1]), "between 1 and n = 6"),
        (lambda: rr.moments(SMALL, START, -0.1, 2, [1]), "eta must be"),
        (lambda: rr.moments(SMALL, START, 0.1, 2, [0.5]), "whole numbers"),
        (lambda: rr.floor_leading(SMALL, 0.1, 4), "divide"),
    ],
)
def test_refuses_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
