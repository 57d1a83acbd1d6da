"""GD and SGD on least squares: predictions against simulation, full enumeration and second routes.

Where a comparison is with Monte Carlo, the faults a person could make in a prediction are planted and must be
caught by the same comparison: 1/n dropped, the sampling swapped, the step size off by 2 %, another gamma.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import data, models, sampling
from jaxgrad.losses import mean_loss, squared
from jaxgrad.noise import gamma
from jaxgrad.statistics import z_limit
from jaxgrad.theory import least_squares as ls
from jaxgrad.types import Batch, Linear


def regression(n: int, p: int, seed: int = 0) -> Batch:
    """Heavy-tailed features, residuals that depend on them: no term of the theory vanishes by accident."""
    rng = np.random.default_rng(seed)
    X = rng.standard_t(6, size=(n, p)) * np.geomspace(1, 0.3, p) + 0.2
    noise = rng.standard_t(5, size=n) * (0.5 + np.abs(X[:, 0]))
    return Batch(X, X @ np.linspace(1, -1, p) + noise)


SMALL = ls.problem(regression(6, 2), bias=False)
MIDDLE = ls.problem(regression(80, 4), bias=True)  # 5 coefficients
START = np.linspace(2, -2, 5)


def mean_square(problem: ls.Problem, w: np.ndarray) -> np.ndarray:
    """L(w) from its definition; `w[..., p]`."""
    return np.mean((problem.y - w @ problem.X.T) ** 2, axis=-1)


def simulate_gd(problem: ls.Problem, start: np.ndarray, eta: float, steps: int) -> np.ndarray:
    path = [np.asarray(start, float)]
    for _ in range(steps):
        w = path[-1]
        path.append(w + eta * 2 / len(problem.y) * problem.X.T @ (problem.y - problem.X @ w))
    return np.stack(path)


# --- the problem -----------------------------------------------------------------------------------------------


def test_the_problem_is_the_one_of_the_library():
    batch = regression(80, 4)
    loss = mean_loss(models.linear, squared)
    params = Linear(jnp.asarray(START[:4]), jnp.asarray(START[4]))
    hessian = jax.hessian(lambda w: loss(Linear(w[:4], w[4]), batch))(jnp.asarray(START))
    np.testing.assert_allclose(np.linalg.eigvalsh(hessian)[::-1], MIDDLE.eigenvalues, rtol=1e-12)
    assert float(loss(params, batch)) == pytest.approx(MIDDLE.value + ls.excess_loss(MIDDLE, params), rel=1e-13)
    np.testing.assert_allclose(MIDDLE.X.T @ MIDDLE.residuals, 0, atol=1e-12)


# --- gradient descent ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.97, 1.0005])
def test_gd_contracts_each_eigen_direction_as_predicted(fraction):
    eta = fraction * ls.edge(MIDDLE)
    steps = np.arange(0, 2001, 50)
    path = simulate_gd(MIDDLE, START, eta, 2000)
    c0 = ls.components(MIDDLE, START)
    predicted = c0[None, :] * (1 - eta * MIDDLE.eigenvalues)[None, :] ** steps[:, None]
    measured = ls.components(MIDDLE, path[steps])
    # Relative to the largest that component has been.
    assert np.max(np.abs(measured - predicted) / np.maximum.accumulate(np.abs(predicted))) < 1e-10
    np.testing.assert_allclose(ls.gd_path(MIDDLE, START, eta, steps), path[steps], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        ls.gd_excess(MIDDLE, START, eta, steps)[:5],
        (mean_square(MIDDLE, path[steps]) - MIDDLE.value)[:5],
        rtol=1e-9,
        atol=1e-14,
    )


def test_gd_prediction_with_a_fault_is_caught():
    eta, steps = 0.5 * ls.edge(MIDDLE), np.arange(0, 81, 20)
    measured = ls.components(MIDDLE, simulate_gd(MIDDLE, START, eta, 80)[steps])
    c0 = ls.components(MIDDLE, START)
    for fault in (1.02 * eta, len(MIDDLE.y) * eta):  # eta off by 2 %; a sum where a mean should be
        predicted = c0[None, :] * (1 - fault * MIDDLE.eigenvalues)[None, :] ** steps[:, None]
        assert np.max(np.abs(measured - predicted)) > 1e-3


def test_the_edge_and_its_factor_of_two():
    top = np.linalg.eigvalsh(MIDDLE.X.T @ MIDDLE.X / 80)[-1]
    assert ls.edge(MIDDLE) == pytest.approx(1 / top, rel=1e-12)
    first = lambda w: abs(ls.components(MIDDLE, w)[0])
    last = lambda eta: first(simulate_gd(MIDDLE, START, eta, 3000)[-1])
    start = first(START)
    assert last(0.9995 * ls.edge(MIDDLE)) < 0.1 * start
    assert last(1.0005 * ls.edge(MIDDLE)) > 10 * start
    with np.errstate(over="ignore", invalid="ignore"):
        assert not last(2 / top) < start, "2/λ_max(XᵀX/n) is not the edge of this loss"


def test_the_worst_case_step_is_best_for_the_worst_start():
    kappa = ls.condition_number(MIDDLE)
    rho = (kappa - 1) / (kappa + 1)
    extremes = MIDDLE.minimiser + MIDDLE.directions[:, 0] + MIDDLE.directions[:, -1]
    eta = ls.worst_case_step(MIDDLE)
    distance = np.linalg.norm(ls.gd_path(MIDDLE, extremes, eta, [0, 1, 7, 30]) - MIDDLE.minimiser[None, :], axis=1)
    np.testing.assert_allclose(distance, distance[0] * rho ** np.array([0, 1, 7, 30]), rtol=1e-12)
    grid = np.linspace(0.9, 1.1, 201) * eta
    rates = np.max(np.abs(1 - grid[:, None] * MIDDLE.eigenvalues[None, :]), axis=1)
    assert grid[np.argmin(rates)] == pytest.approx(eta, rel=2e-3)


@pytest.mark.parametrize("fraction", [0.02, 0.5, 0.99, 1.02])
@pytest.mark.parametrize("target", [1.0, 1e-2, 1e-6])
def test_steps_to_a_target_equal_the_simulated_count(fraction, target):
    eta = fraction * ls.edge(MIDDLE)
    # A start that barely touches the top direction: beyond the edge the loss falls first and turns up later.
    start = MIDDLE.minimiser + MIDDLE.directions @ np.array([1e-3, 1.0, 1.0, 1.0, 1.0])
    path = simulate_gd(MIDDLE, start, eta, 6000)
    hits = np.flatnonzero(ls.excess_loss(MIDDLE, path) <= target)
    expected = float(hits[0]) if hits.size else math.inf
    assert ls.gd_steps_to(MIDDLE, start, eta, target) == expected


def test_steps_to_a_target_brackets_and_never():
    eta = ls.worst_case_step(MIDDLE)
    lam, c = MIDDLE.eigenvalues, ls.components(MIDDLE, START)
    rates = np.abs(1 - eta * lam)
    slowest = int(np.argmax(rates))
    target = 1e-9
    low = math.ceil(math.log(0.5 * lam[slowest] * c[slowest] ** 2 / target) / (-2 * math.log(rates[slowest])))
    high = math.ceil(math.log(ls.excess_loss(MIDDLE, START) / target) / (-2 * math.log(rates[slowest])))
    assert low <= ls.gd_steps_to(MIDDLE, START, eta, target) <= high
    assert ls.gd_steps_to(MIDDLE, START, ls.edge(MIDDLE), target) == math.inf
    # Tiny step sizes: the change of one step is below rounding, the count still exact to the formula.
    tiny = ls.gd_steps_to(MIDDLE, START, 1e-12, 1e-3)
    assert (
        ls.gd_excess(MIDDLE, START, 1e-12, [int(tiny) - 1])[0]
        >= 1e-3
        >= ls.gd_excess(MIDDLE, START, 1e-12, [int(tiny)])[0] * (1 - 1e-12)
    )


def test_the_worst_case_step_is_slower_to_a_coarse_target():
    """The folklore step size 2/(λ_min + λ_max) is best only in the long run."""
    lam = np.geomspace(3.2, 0.04, 5)
    problem = ls.problem(Batch(np.sqrt(5 * lam / 2)[:, None] * np.eye(5), np.zeros(5)), bias=False)
    start = np.ones(5)
    coarse, fine = 0.05 * ls.excess_loss(problem, start), 1e-12
    count = partial(ls.gd_steps_to, problem, start)
    assert count(1 / lam[0], coarse) < 0.8 * count(ls.worst_case_step(problem), coarse)
    assert count(1 / lam[0], fine) > 1.5 * count(ls.worst_case_step(problem), fine)


def test_a_direction_without_data_never_moves():
    batch = regression(5, 8)
    problem = ls.problem(batch, bias=False)
    assert len(problem.eigenvalues) == 5
    start = np.linspace(-1, 1, 8)
    path = simulate_gd(problem, start, 0.9 * ls.edge(problem), 500)
    np.testing.assert_allclose(
        ls.gd_path(problem, start, 0.9 * ls.edge(problem), [0, 3, 500]), path[[0, 3, 500]], atol=1e-11
    )
    moments = ls.sgd_moments(problem, start, 0.1 * ls.edge(problem), sampling.full_batch(), [0, 7])
    d = simulate_gd(problem, start, 0.1 * ls.edge(problem), 7)[[0, 7]] - problem.minimiser[None, :]
    np.testing.assert_allclose(moments.second, d[:, :, None] * d[:, None, :], atol=1e-12)


# --- the moments of SGD ----------------------------------------------------------------------------------------


def all_batches(n: int, b: int, kind: str) -> np.ndarray:
    if kind == "with replacement":
        return np.array(list(itertools.product(range(n), repeat=b)))
    return np.array(list(itertools.combinations(range(n), b)))


def enumerate_paths(problem, start, eta, b, kind, steps):
    """Every batch sequence, each as likely: E[w], E[dd'], E[L] and sd of L after each step."""
    batches = all_batches(len(problem.y), b, kind)
    w = np.asarray(start)[None, :]
    out = []
    for t in range(steps + 1):
        d = w - problem.minimiser
        losses = mean_square(problem, w)
        out.append((w.mean(0), np.einsum("si,sj->ij", d, d) / len(d), losses.mean(), losses.std()))
        if t < steps:
            error = problem.y[None, :] - w @ problem.X.T  # [s, n]
            chosen = error[:, batches][..., None] * problem.X[batches][None]  # [s, batches, b, p]
            w = (w[:, None, :] + 2 * eta * chosen.mean(axis=2)).reshape(-1, problem.X.shape[1])
    return [np.stack(z) for z in zip(*out, strict=True)]


ENUMERATED = [
    ("with replacement", 1, 5),
    ("with replacement", 2, 3),
    ("with replacement", 3, 2),
    ("distinct", 1, 5),
    ("distinct", 2, 4),
    ("distinct", 3, 3),
    ("distinct", 5, 5),
    ("distinct", 6, 5),
]
SAMPLINGS = {"with replacement": sampling.with_replacement, "distinct": sampling.distinct}


@pytest.mark.parametrize(("kind", "b", "steps"), ENUMERATED)
def test_moments_equal_the_enumeration_of_every_batch_sequence(kind, b, steps):
    start, eta, t = np.array([1.0, -2.0]), 0.3 * ls.edge(SMALL), np.arange(steps + 1)
    mean, second, loss, deviation = enumerate_paths(SMALL, start, eta, b, kind, steps)
    m = ls.sgd_moments(SMALL, start, eta, SAMPLINGS[kind](b), t)
    scale = max(1.0, np.abs(second).max())
    assert np.abs(m.mean - mean).max() < 1e-12 * scale
    assert np.abs(m.second - second).max() < 1e-12 * scale
    assert np.abs(m.excess + SMALL.value - loss).max() < 1e-12 * scale
    np.testing.assert_allclose(m.mean, ls.gd_path(SMALL, start, eta, t), atol=1e-12 * scale)
    predicted = ls.sgd_deviation(SMALL, start, eta, SAMPLINGS[kind](b), t)
    # A square root of a difference: 1e-13 in the squares is 3e-7 where the spread is zero (step 0, b = n).
    np.testing.assert_allclose(predicted, deviation, rtol=1e-9, atol=1e-6 * scale)


@pytest.mark.parametrize("fault", ["n", "sampling", "eta", "cross term"])
def test_a_fault_in_the_moments_is_caught_by_the_enumeration(fault):
    start, eta, b = np.array([1.0, -2.0]), 0.3 * ls.edge(SMALL), 2
    loss = enumerate_paths(SMALL, start, eta, b, "distinct", 3)[2]
    factor, problem, rate = gamma(sampling.distinct(b), 6), SMALL, eta
    if fault == "n":  # the sum over the batch in place of its mean
        rate = b * eta
    elif fault == "sampling":
        factor = gamma(sampling.with_replacement(b), 6)
    elif fault == "eta":
        rate = 1.02 * eta
    else:  # residuals without their sign have no third moment with x
        problem = SMALL._replace(residuals=np.abs(SMALL.residuals))
    _, M = ls.compact_recursion(problem, ls.components(SMALL, start), rate, factor, np.arange(4))
    faulty = SMALL.value + 0.5 * np.einsum("kii,i->k", M, SMALL.eigenvalues)
    assert np.abs(faulty - loss).max() > 1e-4


@pytest.mark.parametrize("b", [1, 7, 50])
def test_two_routes_to_the_moments(b):
    """One matrix on (1, m, M), by squaring; and the recursion through the data."""
    s, t = sampling.with_replacement(b), np.array([0, 1, 2, 50, 999])
    eta = 0.6 * ls.sgd_edge(MIDDLE, s)
    m = ls.sgd_moments(MIDDLE, START, eta, s, t)
    c = ls.components(MIDDLE, START)
    mean, second = ls.compact_recursion(MIDDLE, c, eta, 1 / b, t)
    excess = 0.5 * np.einsum("kii,i->k", second, MIDDLE.eigenvalues)
    np.testing.assert_allclose(m.excess, excess, rtol=1e-11)
    np.testing.assert_allclose((m.mean - MIDDLE.minimiser[None, :]) @ MIDDLE.directions, mean, atol=1e-12)
    every = ls.sgd_excess(MIDDLE, START, eta, s, 999)
    np.testing.assert_allclose(every[t], m.excess, rtol=1e-10)
    assert len(every) == 1000


def test_many_coefficients_go_through_the_data():
    batch = regression(60, 50)
    problem = ls.problem(batch)
    assert not ls._lifts(problem)
    s, eta = sampling.distinct(7), 0.05 * ls.edge(problem)
    w = np.zeros(51)
    by_matrix = ls._operator_path(
        ls._operator(problem, ls._lift(problem), eta, gamma(s, 60)),
        ls.components(problem, w),
        np.array([0, 5, 20]),
    )
    m = ls.sgd_moments(problem, w, eta, s, [0, 5, 20])
    excess = 0.5 * np.einsum("kii,i->k", by_matrix[1], problem.eigenvalues)
    np.testing.assert_allclose(m.excess, excess, rtol=1e-10)
    np.testing.assert_allclose(ls.sgd_excess(problem, w, eta, s, 20)[[0, 5, 20]], m.excess, rtol=1e-12)


def test_sgd_is_never_below_gd_at_the_same_step():
    s, t = sampling.distinct(3), np.arange(0, 400, 20)
    eta = 0.5 * ls.sgd_edge(MIDDLE, s)
    m = ls.sgd_moments(MIDDLE, START, eta, s, t)
    d = m.mean - MIDDLE.minimiser[None, :]
    covariance = m.second - d[:, :, None] * d[:, None, :]
    assert np.linalg.eigvalsh(covariance).min() > -1e-12
    assert np.all(m.excess >= ls.gd_excess(MIDDLE, START, eta, t) - 1e-12)


# --- Monte Carlo -----------------------------------------------------------------------------------------------

SEEDS, CHECKPOINTS = 2000, np.unique(np.round(np.geomspace(1, 300, 13)).astype(int))
CONFIGURATIONS = [
    ("with replacement", 1),
    ("with replacement", 5),
    ("with replacement", 30),
    ("distinct", 1),
    ("distinct", 5),
    ("distinct", 30),
]


@pytest.fixture(scope="module")
def runs():
    """Excess loss `[seeds, checkpoints]` of SGD with the library's loss and samplings, per configuration."""
    batch = Batch(jnp.asarray(MIDDLE.X), jnp.asarray(MIDDLE.y))
    loss = mean_loss(models.linear, squared)

    def excess_losses(s, eta, key):
        def step(w, t):
            seen = jax.tree.map(lambda leaf: leaf[s.indices(key, t, len(batch.y))], batch)
            return w - eta * jax.grad(loss)(Linear(w), seen).w, w

        _, path = jax.lax.scan(step, jnp.asarray(START), jnp.arange(CHECKPOINTS[-1] + 1))
        return jax.vmap(lambda w: loss(Linear(w), batch))(path[CHECKPOINTS]) - MIDDLE.value

    out = {}
    for i, (kind, b) in enumerate(CONFIGURATIONS):
        s = SAMPLINGS[kind](b)
        eta = 0.4 * ls.sgd_edge(MIDDLE, s)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(11), i), SEEDS)
        out[kind, b] = (eta, np.asarray(jax.jit(jax.vmap(partial(excess_losses, s, eta)))(keys)))
    return out


def largest_z(measured: np.ndarray, expected: np.ndarray) -> float:
    error = measured.std(axis=0, ddof=1) / math.sqrt(len(measured))
    # Where all runs agree (the first step of b = n would), there is no spread to compare with.
    return float(np.max(np.abs(measured.mean(axis=0) - expected) / error))


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_mean_loss_of_real_runs_is_the_exact_expectation(runs, configuration):
    kind, b = configuration
    eta, measured = runs[configuration]
    m = ls.sgd_moments(MIDDLE, START, eta, SAMPLINGS[kind](b), CHECKPOINTS)
    assert largest_z(measured, m.excess) < z_limit(len(CHECKPOINTS) * len(CONFIGURATIONS))


@pytest.mark.parametrize(
    ("fault", "configuration"),
    [
        ("eta off by 2 %", ("distinct", 30)),
        ("1/n dropped", ("with replacement", 5)),
        ("gamma of the other sampling", ("distinct", 30)),
        ("gamma of the other sampling", ("with replacement", 30)),
        ("sampling swapped", ("distinct", 30)),
        ("batch size off by one", ("distinct", 5)),
    ],
)
def test_a_fault_in_the_prediction_is_caught_by_real_runs(runs, fault, configuration):
    kind, b = configuration
    eta, measured = runs[configuration]
    other = {"distinct": "with replacement", "with replacement": "distinct"}[kind]
    problem, rate, s = MIDDLE, eta, SAMPLINGS[kind](b)
    if fault == "eta off by 2 %":
        rate = 1.02 * eta
    elif fault == "1/n dropped":  # the noise covariance summed, not averaged: residuals √n too large
        problem = MIDDLE._replace(residuals=MIDDLE.residuals * math.sqrt(80))
    elif fault == "batch size off by one":
        s = SAMPLINGS[kind](b + 1)
    else:
        s = SAMPLINGS[other](b)
    if fault == "sampling swapped":  # the run draws otherwise than the prediction believes: as real runs do
        s, measured, rate = SAMPLINGS[kind](b), runs[other, b][1], runs[other, b][0]
    m = ls.sgd_moments(problem, START, rate, s, CHECKPOINTS)
    assert largest_z(measured, m.excess) > z_limit(len(CHECKPOINTS) * len(CONFIGURATIONS))


# --- floor and edges -------------------------------------------------------------------------------------------


def test_the_floor_is_where_the_expected_loss_goes():
    for s in (sampling.with_replacement(1), sampling.distinct(8)):
        eta = 0.5 * ls.sgd_edge(MIDDLE, s)
        floor = ls.floor(MIDDLE, eta, s)
        assert ls.sgd_moments(MIDDLE, START, eta, s, [50_000]).excess[0] == pytest.approx(floor, rel=1e-9)
        M, H = ls.stationary_second_moment(MIDDLE, eta, s), 2 / 80 * MIDDLE.X.T @ MIDDLE.X
        x, r, g = MIDDLE.X, MIDDLE.residuals, gamma(s, 80)
        e = r**2 + np.einsum("ij,jk,ik->i", x, M, x)
        A = np.eye(5) - eta * H
        step = A @ M @ A + eta**2 * g * (4 / 80 * (x * e[:, None]).T @ x - H @ M @ H)
        np.testing.assert_allclose(step, M, atol=1e-13)


def test_the_floor_tends_to_its_leading_orders():
    s = sampling.with_replacement(1)
    limit = ls.sgd_edge(MIDDLE, s)
    ratios = np.array(
        [
            [
                ls.floor(MIDDLE, f * limit, s) / ls.floor_leading(MIDDLE, f * limit, s),
                ls.floor(MIDDLE, f * limit, s) / ls.floor_second_order(MIDDLE, f * limit, s),
            ]
            for f in (1e-3, 1e-2, 0.1, 0.5)
        ]
    )
    first, second = ratios.T - 1
    # An error of order η, and one of order η²; both formulas are too low.
    np.testing.assert_allclose(first[1] / first[0], 10, rtol=0.02)
    np.testing.assert_allclose(second[1] / second[0], 100, rtol=0.05)
    assert np.all(first > second)
    assert np.all(second > 0)
    assert first[-1] > 0.5
    # tr S is 4 mean(r²‖x‖²).
    expected = 4 * np.mean(MIDDLE.residuals**2 * np.sum(MIDDLE.X**2, axis=1))
    assert ls.floor_leading(MIDDLE, 0.01, s) == pytest.approx(0.01 / 4 * expected, rel=1e-12)


def test_rows_of_equal_norm_have_closed_forms():
    rng = np.random.default_rng(2)
    X = rng.normal(size=(40, 3))
    X *= math.sqrt(2.5) / np.linalg.norm(X, axis=1, keepdims=True)
    problem = ls.problem(Batch(X, rng.normal(size=40)), bias=False)
    s = sampling.with_replacement(1)
    assert ls.sgd_edge(problem, s) == pytest.approx(1 / 2.5, rel=1e-12)
    assert ls.sgd_edge(problem, s) == pytest.approx(2 / problem.eigenvalues.sum(), rel=1e-12)
    for eta in (0.01, 0.2, 0.35):
        expected = eta * 2.5 * problem.value / (1 - eta * 2.5)
        assert ls.floor(problem, eta, s) == pytest.approx(expected, rel=1e-10)


def explicit_step_radius(problem: ls.Problem, eta: float, g: float) -> float:
    """Spectral radius of E[(I − ηH_B)⊗(I − ηH_B)], formed from its definition on all p² entries."""
    X, p = problem.X, problem.X.shape[1]
    H, identity = 2 / len(X) * X.T @ X, np.eye(problem.X.shape[1])
    each = sum(np.kron(2 * np.outer(x, x), 2 * np.outer(x, x)) for x in X) / len(X)
    T = np.eye(p * p) - eta * (np.kron(H, identity) + np.kron(identity, H))
    T += eta**2 * (np.kron(H, H) + g * (each - np.kron(H, H)))
    return float(np.abs(np.linalg.eigvals(T)).max())


@pytest.mark.parametrize("s", [sampling.with_replacement(b) for b in (1, 2, 8, 80)] + [sampling.distinct(40)])
def test_the_second_moment_edge_is_where_the_spectral_radius_passes_one(s):
    g = gamma(s, 80)
    low, high = 0.0, 2 * ls.edge(MIDDLE)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if explicit_step_radius(MIDDLE, middle, g) < 1 else (low, middle)
    assert ls.sgd_edge(MIDDLE, s) == pytest.approx(low, rel=1e-10)


def test_the_edge_grows_with_the_batch_to_that_of_gd():
    ratio = lambda s: ls.sgd_edge(MIDDLE, s) / ls.edge(MIDDLE)
    grows = [ratio(sampling.distinct(b)) for b in (1, 2, 4, 8, 40, 79, 80)]
    assert np.all(np.diff(grows) > 0)
    assert grows[-1] == 1
    assert ratio(sampling.full_batch()) == 1
    assert ratio(sampling.with_replacement(80)) < 0.99, "n draws with replacement are not the full batch"
    s = sampling.with_replacement(2)
    assert ls.floor(MIDDLE, 1.01 * ls.sgd_edge(MIDDLE, s), s) == math.inf
    with pytest.raises(ValueError, match="at or beyond the edge"):
        ls.stationary_second_moment(MIDDLE, 1.01 * ls.sgd_edge(MIDDLE, s), s)


def test_interpolation_has_no_floor():
    problem = ls.problem(regression(6, 10), bias=False)
    s = sampling.distinct(2)
    eta = 0.3 * ls.sgd_edge(problem, s)
    assert ls.floor(problem, eta, s) < 1e-25
    assert ls.sgd_excess(problem, np.ones(10), eta, s, 20_000)[-1] < 1e-12


def test_the_variance_of_the_loss_explodes_before_its_mean():
    problem = ls.problem(regression(12, 3), bias=False)
    ratios = [
        ls.deviation_edge(problem, sampling.distinct(b)) / ls.sgd_edge(problem, sampling.distinct(b))
        for b in (1, 4, 11)
    ]
    assert 0.8 < min(ratios) <= max(ratios) < 1
    s = sampling.distinct(4)
    # Below it the spread settles, above it it grows for ever though the mean is finite.
    for factor, settles in ((0.97, True), (1.02, False)):
        eta = factor * ls.deviation_edge(problem, s)
        assert eta < ls.sgd_edge(problem, s)
        far = ls.sgd_deviation(problem, np.ones(3), eta, s, [20_000, 40_000])
        assert (abs(far[1] / far[0] - 1) < 0.01) == settles


# --- the best step size ----------------------------------------------------------------------------------------


def brute_force_best(problem, start, s, excess, etas):
    counts = []
    for eta in etas:
        below = np.flatnonzero(ls.sgd_excess(problem, start, eta, s, 3000) <= excess)
        counts.append(below[0] if below.size else np.inf)
    return min(counts)


@pytest.mark.parametrize("s", [sampling.distinct(4), sampling.with_replacement(20), sampling.full_batch()])
def test_the_best_step_is_not_beaten_by_a_fine_grid(s):
    excess = 0.05
    best = ls.best_step(MIDDLE, START, s, excess)
    etas = np.geomspace(1e-3, 1, 400) * ls.sgd_edge(MIDDLE, s) * 0.999
    assert best.steps <= brute_force_best(MIDDLE, START, s, excess, etas) + 1
    assert best.steps == ls.steps_to(MIDDLE, START, best.eta, s, excess)


def test_a_target_below_reach_is_said_to_be():
    s = sampling.with_replacement(1)
    eta = 0.3 * ls.sgd_edge(MIDDLE, s)
    assert ls.steps_to(MIDDLE, START, eta, s, 0.5 * ls.floor(MIDDLE, eta, s)) == math.inf
    assert ls.steps_to(MIDDLE, START, eta, s, 2 * ls.floor(MIDDLE, eta, s)) < 10_000
    never = ls.best_step(MIDDLE, START, s, 1e-9, most=2000)
    assert never.steps == math.inf
    assert math.isnan(never.eta)
    assert ls.steps_to(MIDDLE, START, 1.5 * ls.sgd_edge(MIDDLE, s), s, 1e-9) == math.inf


# --- real data -------------------------------------------------------------------------------------------------


def test_real_data_of_54_000_examples():
    problem = ls.problem(data.load("diamonds").batch)
    assert len(problem.X) > 50_000
    s = sampling.distinct(64)
    eta = 0.3 * ls.sgd_edge(problem, s)
    assert 0.97 < ls.sgd_edge(problem, s) / ls.edge(problem) < 1
    m = ls.sgd_moments(problem, np.zeros(10), eta, s, [0, 10, 20])
    _, second = ls.compact_recursion(
        problem, ls.components(problem, np.zeros(10)), eta, gamma(s, len(problem.X)), [0, 10, 20]
    )
    np.testing.assert_allclose(0.5 * np.einsum("kii,i->k", second, problem.eigenvalues), m.excess, rtol=1e-10)
    assert ls.sgd_moments(problem, np.zeros(10), eta, s, [10**6]).excess[0] == pytest.approx(
        ls.floor(problem, eta, s), rel=1e-4
    )


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: ls.problem(Batch(np.ones(3), np.ones(3))), r"shape \[n, d\]"),
        (lambda: ls.problem(Batch(np.ones((3, 2)), np.ones(4))), r"shape \[3\]"),
        (lambda: ls.problem(Batch(np.array([[1.0], [np.inf]]), np.ones(2))), r"x\[1, 0\] is inf"),
        (lambda: ls.problem(Batch(np.zeros((3, 1)), np.ones(3)), bias=False), "zero everywhere"),
        (lambda: ls.gd_path(MIDDLE, np.zeros(4), 0.1, [1]), "need 5 coefficients"),
        (lambda: ls.gd_path(MIDDLE, START, -0.1, [1]), "eta must be"),
        (lambda: ls.gd_path(MIDDLE, START, 0.1, [3, 1]), "do not decrease"),
        (lambda: ls.gd_steps_to(MIDDLE, START, 0.1, 0.0), "excess must be"),
        (lambda: ls.sgd_edge(MIDDLE, sampling.reshuffled(5)), "theory.reshuffling"),
        (lambda: ls.sgd_edge(MIDDLE, sampling.distinct(81)), "n = 80"),
        (lambda: ls.sgd_deviation(MIDDLE, START, 0.1, sampling.distinct(5), [1]), "up to 4"),
        (lambda: ls.floor(ls.problem(regression(120, 101)), 0.1, sampling.distinct(5)), "up to 100"),
    ],
)
def test_refuses_bad_input(call, says):
    with pytest.raises(ValueError, match=says):
        call()
