"""The certified probability of escape against simulation, path enumeration and theorems."""

import functools
import itertools
import math

import numpy as np
import pytest

from jaxgrad import sampling
from jaxgrad.noise import gamma
from jaxgrad.statistics import proportion_interval
from jaxgrad.theory import escape as es
from jaxgrad.types import Batch

WELL, SINE = es.double_well(), es.frequency()
SAMPLINGS = {"with replacement": sampling.with_replacement, "distinct": sampling.distinct}


@functools.cache
def bracket(name: str, kind: str, b: int, eta: float, steps: int, side: str = "right", grid: int = 8192):
    land = {"well": WELL, "sine": SINE}[name]
    return es.escape_probability(
        land.loss,
        land.data,
        sampling=SAMPLINGS[kind](b),
        eta=eta,
        start=land.bad,
        right=land.barrier,
        left=land.left,
        side=side,
        steps=steps,
        smoothness=land.smoothness,
        grid=grid,
    )


def hand_gradient(name: str, w: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Batch gradients `[s]` at `w[s]` for example numbers `chosen[s, b]`, derived by hand."""
    if name == "well":
        return w - np.tanh(2 * w) - WELL.data.x[chosen].mean(axis=1)
    x, y = SINE.data.x[chosen], SINE.data.y[chosen]
    angle = w[:, None] * x
    return np.mean(-2 * x * np.cos(angle) * (y - np.sin(angle)), axis=1)


def simulate(name: str, kind: str, b: int, eta: float, steps: int, seeds: int) -> tuple[int, int]:
    """How many of the seeds cross the right and the left barrier first."""
    land = {"well": WELL, "sine": SINE}[name]
    n, left = len(land.data.x), -np.inf if land.left is None else land.left
    rng = np.random.default_rng([b, steps, int(1000 * eta), kind == "distinct", name == "well"])
    w, right_hits, left_hits = np.full(seeds, land.bad), 0, 0
    for _ in range(steps):
        if kind == "distinct":
            chosen = np.argsort(rng.random((len(w), n)), axis=1)[:, :b]
        else:
            chosen = rng.integers(n, size=(len(w), b))
        w = w - eta * hand_gradient(name, w, chosen)
        right_hits += int(np.sum(w >= land.barrier))
        left_hits += int(np.sum(w <= left))
        w = w[(w < land.barrier) & (w > left)]
    return right_hits, left_hits


CONFIGURATIONS = [
    *(("well", "with replacement", b, 0.05) for b in (1, 2)),
    *(("well", "with replacement", b, 0.1) for b in (1, 2, 4)),
    *(("well", "with replacement", b, 0.2) for b in (2, 4, 8)),
    *(("well", "with replacement", b, 0.4) for b in (8, 12)),
    *(("well", "distinct", b, 0.2) for b in (4, 8)),
    *(("well", "distinct", b, 0.4) for b in (8, 11)),
    *(("sine", "distinct", b, 0.16) for b in (1, 2, 3, 4)),
    *(("sine", "distinct", b, 0.08) for b in (1, 2, 3)),
    *(("sine", "with replacement", b, 0.16) for b in (1, 2, 3)),
    ("sine", "distinct", 2, 0.04),
]
STEPS, SEEDS = 300, 3000


def overlaps(e: es.Escape, hits: int, seeds: int, comparisons: int) -> bool:
    """Whether the bracket meets the Clopper-Pearson interval, at 99 % for all comparisons together."""
    i = proportion_interval(hits, seeds, level=1 - 0.01 / comparisons)
    return bool(e.low[-1] <= i.high and i.low <= e.high[-1])


@pytest.mark.parametrize("configuration", CONFIGURATIONS)
def test_the_bracket_meets_monte_carlo(configuration):
    assert len(CONFIGURATIONS) >= 20
    hits, _ = simulate(*configuration, STEPS, SEEDS)
    e = bracket(*configuration, STEPS)
    assert overlaps(e, hits, SEEDS, len(CONFIGURATIONS))
    assert e.low[-1] <= e.estimate[-1] <= e.high[-1]
    assert e.high[-1] - e.low[-1] < 0.05


@pytest.mark.parametrize(
    ("run", "predicted"),
    [
        # eta off by 2 %
        (("well", "with replacement", 2, 0.1, 300), ("well", "with replacement", 2, 0.098, 300)),
        # the sampling swapped
        (("well", "with replacement", 8, 0.4, 300), ("well", "distinct", 8, 0.4, 300)),
        (("sine", "distinct", 3, 0.16, 300), ("sine", "with replacement", 3, 0.16, 300)),
        # another batch size
        (("sine", "distinct", 2, 0.08, 300), ("sine", "distinct", 3, 0.08, 300)),
    ],
)
def test_a_fault_in_the_prediction_is_caught_by_monte_carlo(run, predicted):
    # Two per cent in eta shift the probability by two points: that takes more seeds and a finer grid.
    fine = run[:3] == predicted[:3]
    seeds, grid = (40_000, 32_768) if fine else (6_000, 8192)
    hits, _ = simulate(*run, seeds)
    assert overlaps(bracket(*run, grid=grid), hits, seeds, len(CONFIGURATIONS))
    assert not overlaps(bracket(*predicted, grid=grid), hits, seeds, len(CONFIGURATIONS))


def test_both_exits():
    """Large steps, single examples: some runs leave to the left."""
    hits = simulate("sine", "distinct", 1, 0.19, 300, 12_000)
    for side, count in zip(("right", "left"), hits, strict=True):
        assert overlaps(bracket("sine", "distinct", 1, 0.19, 300, side), count, 12_000, 2)


@pytest.mark.parametrize(("b", "steps"), [(1, 11), (2, 8), (3, 7)])
def test_the_bracket_holds_the_enumeration_of_every_path(b, steps):
    eta = 0.3
    shift = {k: 0.05 + 1.5 * (2 * k / b - 1) for k in range(b + 1)}
    chance = {k: math.comb(b, k) / 2**b for k in range(b + 1)}
    exact = np.zeros(steps + 1)
    for path in itertools.product(range(b + 1), repeat=steps):
        w, p = WELL.bad, math.prod(chance[k] for k in path)
        for t, k in enumerate(path, 1):
            w = w - eta * (w - math.tanh(2 * w) - shift[k])
            if w >= WELL.barrier:
                exact[t:] += p
                break
    e = bracket("well", "with replacement", b, eta, steps)
    assert exact[-1] > 0.01
    assert np.all(e.low <= exact + 1e-12)
    assert np.all(exact <= e.high + 1e-12)
    np.testing.assert_allclose(e.estimate, exact, atol=5e-4)


def test_a_finer_grid_gives_a_narrower_bracket_around_the_same_value():
    widths = []
    for grid in (1024, 2048, 4096, 8192):
        e = bracket("well", "with replacement", 4, 0.1, 300, grid=grid)
        widths.append(e.high[-1] - e.low[-1])
    np.testing.assert_allclose(np.array(widths[1:]) / widths[:-1], 0.5, atol=0.06)


def test_published_reference_values():
    """1000 steps in the double well; computed once by another program, printed to three digits."""
    for b, expected in ((1, 0.722), (2, 0.137), (4, 0.0022)):
        assert bracket("well", "with replacement", b, 0.05, 1000).estimate[-1] == pytest.approx(expected, rel=5e-3)
    assert bracket("well", "distinct", 8, 0.4, 1000).estimate[-1] == pytest.approx(0.758, rel=2e-3)


# --- impossibility ---------------------------------------------------------------------------------------------


def test_large_batches_of_distinct_examples_can_never_escape():
    for b in range(1, 17):
        e = bracket("well", "distinct", b, 0.4, 50, grid=64)
        impossible = e.impossible_at is not None
        # The noise of b distinct examples is bounded by 1.5 min(1, (16 − b)/b); the steepest slope uphill is .2164.
        assert impossible == (1.5 * min(1, (16 - b) / b) < 0.216420), b
        if impossible:
            assert np.all(e.high == 0)
    # With replacement any number of draws can be the same example.
    assert bracket("well", "with replacement", 14, 0.4, 50, grid=64).impossible_at is None


def test_no_enumerated_batch_passes_the_wall():
    w = bracket("sine", "distinct", 8, 0.16, 10, grid=64).impossible_at
    assert SINE.bad < w < SINE.barrier
    assert hand_gradient("sine", np.array([w]), np.arange(8)[None])[0] > 0
    e = bracket("well", "distinct", 14, 1.0, 10, grid=64)
    for chosen in itertools.islice(itertools.combinations(range(16), 14), 200):
        assert hand_gradient("well", np.array([e.impossible_at]), np.array([chosen]))[0] > 0


def test_gradient_descent_never_escapes():
    for land in (WELL, SINE):
        e = es.escape_probability(
            land.loss,
            land.data,
            sampling=sampling.full_batch(),
            eta=0.9 / land.smoothness,
            start=land.bad,
            right=land.barrier,
            left=land.left,
            steps=5000,
            smoothness=land.smoothness,
        )
        assert e.impossible_at is not None
        assert e.high[-1] == 0


# --- landscapes and the guide ----------------------------------------------------------------------------------


def test_stationary_points_of_the_landscapes():
    assert (WELL.bad, WELL.barrier, WELL.good) == pytest.approx((-0.895964, -0.050339, 1.016254), abs=1e-6)
    assert (SINE.left, SINE.bad, SINE.barrier, SINE.good) == pytest.approx((-1.4352, 0.548383, 0.911982, 2.0), abs=1e-4)
    bad, barrier, good = es.stationary_points(WELL.loss, WELL.data, -2.0, 2.0)
    assert bad.curvature > 0 > barrier.curvature
    assert barrier.loss - bad.loss == pytest.approx(0.118166, abs=1e-6)
    assert good.loss < bad.loss
    assert bad.variance == pytest.approx(1.5**2)
    assert es.stationary_points(SINE.loss, SINE.data, 1.5, 2.2)[0].variance < 1e-20


def test_the_smoothness_of_the_landscapes_bounds_every_second_derivative():
    w, h = np.linspace(-3, 3, 4001), 1e-4
    for name, land in (("well", WELL), ("sine", SINE)):
        worst = max(
            np.max(
                hand_gradient(name, w + h, np.full((len(w), 1), i))
                - hand_gradient(name, w - h, np.full((len(w), 1), i))
            )
            / (2 * h)
            for i in range(len(land.data.x))
        )
        assert worst <= land.smoothness * (1 + 1e-6)
        assert worst > 0.95 * land.smoothness


def test_kramers_is_a_guide_that_overestimates():
    bad, barrier, _ = es.stationary_points(WELL.loss, WELL.data, -2.0, 2.0)
    s, eta = sampling.with_replacement(4), 0.05
    rate = es.kramers_rate(
        eta=eta,
        factor=gamma(s, 16),
        variance=bad.variance,
        well_curvature=bad.curvature,
        barrier_curvature=barrier.curvature,
        height=barrier.loss - bad.loss,
    )
    exact = bracket("well", "with replacement", 4, eta, 1000).estimate
    per_step = (exact[-1] - exact[500]) / 500
    assert 0.5 < per_step / (2 * rate) < 1
    assert (
        es.kramers_rate(eta=1.0, factor=0.0, variance=1.0, well_curvature=1.0, barrier_curvature=-1.0, height=1.0) == 0
    )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"eta": 1.1}, "monotone"),
        ({"start": 1.0}, "left < start < right"),
        ({"side": "left"}, "side must be"),
        ({"side": "up"}, "side must be"),
        ({"sampling": sampling.reshuffled(2)}, "not independent"),
        ({"sampling": sampling.distinct(17)}, "n = 16"),
        ({"grid": 3}, "grid must be at least 16"),
        ({"data": Batch(np.arange(40.0), np.zeros(40)), "sampling": sampling.distinct(20)}, "different batches"),
    ],
)
def test_refuses_what_it_cannot_prove(change, says):
    arguments = {
        "data": WELL.data,
        "sampling": sampling.distinct(2),
        "eta": 0.1,
        "start": WELL.bad,
        "right": WELL.barrier,
        "steps": 10,
        "smoothness": 1.0,
    } | change
    with pytest.raises(ValueError, match=says):
        es.escape_probability(WELL.loss, arguments.pop("data"), **arguments)


def test_landscapes_refuse_what_is_no_double_well():
    with pytest.raises(ValueError, match="even"):
        es.double_well(5)
    with pytest.raises(ValueError, match="two wells need three"):
        es.double_well(mean=0.6)
