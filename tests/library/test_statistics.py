"""Coverage of every interval, measured or enumerated; planted faults show that the measure can fail."""

import jax
import numpy as np
import pytest
from scipy import special

from jaxgrad import statistics as st

SEEDS, REPLICATES = 20, 4000
# A measured coverage of 4000 replicates has standard error 0.0034; the library promises at least 93 %.
PROMISE, HIGHEST = 0.93, 0.965


def draws(name: str, seeds: int = SEEDS, replicates: int = REPLICATES) -> tuple[np.ndarray, float]:
    """`values[seeds, replicates]` with a known mean; replicates sit on the trailing axis."""
    rng = np.random.default_rng(7)
    shape = (seeds, replicates)
    return {
        "normal": (rng.normal(2.0, 3.0, shape), 2.0),
        "uniform": (rng.uniform(0.0, 1.0, shape), 0.5),
        "gamma4": (rng.gamma(4.0, 1.0, shape), 4.0),
        "exponential": (rng.exponential(1.0, shape), 1.0),
    }[name]


def coverage(interval: st.Interval, truth) -> float:
    return float(np.mean((interval.low <= truth) & (truth <= interval.high)))


@pytest.mark.parametrize("name", ["normal", "uniform", "gamma4"])
def test_mean_interval_covers(name):
    x, mean = draws(name)
    assert PROMISE <= coverage(st.mean_interval(x), mean) <= HIGHEST


def test_mean_interval_on_skewed_values_is_what_the_docstring_says():
    x, mean = draws("exponential")
    assert 0.905 <= coverage(st.mean_interval(x), mean) < PROMISE
    x, mean = draws("exponential", seeds=50)
    assert PROMISE <= coverage(st.mean_interval(x), mean) <= HIGHEST


def test_a_normal_quantile_in_place_of_students_is_caught():
    x, mean = draws("normal")
    good = st.mean_interval(x)
    half = (good.high - good.low) / 2 * 1.96 / special.stdtrit(SEEDS - 1, 0.975) * 0.95
    faulty = good._replace(low=good.estimate - half, high=good.estimate + half)
    assert coverage(faulty, mean) < PROMISE


@pytest.mark.parametrize("name", ["normal", "gamma4"])
def test_bca_interval_covers(key, name):
    x, mean = draws(name, seeds=30, replicates=1500)
    assert PROMISE <= coverage(st.bca_interval(x, key=key), mean) <= HIGHEST


def test_bca_interval_of_skewed_values(key):
    x, mean = draws("exponential", seeds=100)
    bca, student = st.bca_interval(x, key=key), st.mean_interval(x)
    assert coverage(bca, mean) >= PROMISE
    # It leans towards the long tail, as it must, and Student's cannot.
    assert np.mean(bca.high - bca.estimate) > 1.15 * np.mean(bca.estimate - bca.low)
    # Misses fall more evenly on both sides.
    lopsided = lambda i: abs(np.mean(i.high < mean) - np.mean(i.low > mean))
    assert lopsided(bca) < 0.6 * lopsided(student)


def test_bca_interval_takes_any_statistic_and_agrees_with_scipy(key):
    from scipy.stats import bootstrap

    x = np.random.default_rng(3).gamma(2.0, 1.0, (60,))
    mine = st.bca_interval(x, key=key, statistic=np.std, resamples=20_000)
    theirs = bootstrap((x,), np.std, n_resamples=20_000, method="BCa", rng=np.random.default_rng(0)).confidence_interval
    width = theirs.high - theirs.low
    assert abs(mine.low - theirs.low) < 0.03 * width
    assert abs(mine.high - theirs.high) < 0.03 * width


def test_bca_interval_of_constant_values_is_a_point(key):
    i = st.bca_interval(np.full((25, 2), 3.0), key=key)
    np.testing.assert_array_equal([i.low, i.high], np.full((2, 2), 3.0))


@pytest.mark.parametrize("name", ["normal", "exponential"])
def test_median_interval_covers_whatever_the_distribution(name):
    x, _ = draws(name)
    truth = {"normal": 2.0, "exponential": np.log(2)}[name]
    # 20 values: ranks 6 and 15 cover 95.86 % exactly.
    assert coverage(st.median_interval(x), truth) == pytest.approx(0.9586, abs=4 * 0.0034)


def test_median_interval_ranks_match_the_exact_binomial_and_the_next_rank_does_not():
    x = np.arange(1.0, 21.0)
    i = st.median_interval(x)
    assert (i.low, i.high) == (6, 15)
    assert 1 - 2 * special.bdtr(5, 20, 0.5) >= 0.95 > 1 - 2 * special.bdtr(6, 20, 0.5)


def test_median_interval_accepts_diverged_runs():
    x = np.concatenate([np.arange(1.0, 20.0), [np.inf]])
    i = st.median_interval(x)
    assert (i.estimate, i.low, i.high) == (10.5, 6, 15)


def curves(seeds: int, points: int = 40, replicates: int = 300) -> np.ndarray:
    """Correlated curves `[replicates, seeds, points]`: random walks, mean zero."""
    steps = np.random.default_rng(11).normal(size=(replicates, seeds, points))
    return np.cumsum(steps, axis=-1)


@pytest.mark.parametrize("method", ["bonferroni", "max-t"])
def test_band_covers_the_whole_curve(key, method):
    x = curves(30)
    keys = jax.random.split(key, len(x))
    bands = [st.band(c, method=method, key=k, resamples=1000) for c, k in zip(x, keys, strict=True)]
    inside = [np.all((b.low <= 0) & (b.high >= 0)) for b in bands]
    # 300 replicates: standard error 1.3 %.
    assert np.mean(inside) >= PROMISE
    pointwise = [np.all(np.abs(i.estimate) <= i.high - i.estimate) for i in map(st.mean_interval, x)]
    assert np.mean(pointwise) < 0.85, "a pointwise interval is not a band"


def test_max_t_is_narrower_than_bonferroni_on_smooth_curves(key):
    c = curves(100, replicates=1)[0]
    width = lambda b: np.mean(b.high - b.low)
    assert width(st.band(c, method="max-t", key=key)) < 0.95 * width(st.band(c))


def test_band_leaves_points_without_spread_alone(key):
    c = curves(30, replicates=1)[0]
    c[:, 0] = 5.0
    b = st.band(c, method="max-t", key=key)
    assert b.low[0] == b.high[0] == 5.0
    assert np.all(b.low[1:] < b.high[1:])


def test_proportion_interval_never_covers_less_than_its_level():
    for n in (20, 57):
        k = np.arange(n + 1)
        i = st.proportion_interval(k, n)
        p = np.linspace(0.001, 0.999, 499)[:, None]
        log_mass = special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)
        mass = np.exp(log_mass[None] + k[None] * np.log(p) + (n - k)[None] * np.log1p(-p))
        covers = np.sum(mass * ((i.low[None] <= p) & (p <= i.high[None])), axis=1)
        assert covers.min() >= 0.95
        wald = 1.96 * np.sqrt(k / n * (1 - k / n) / n)
        wald_covers = np.sum(mass * (np.abs(k / n - p) <= wald[None]), axis=1)
        assert wald_covers.min() < 0.5, "the textbook interval fails this test"


def test_proportion_interval_at_the_ends():
    i = st.proportion_interval([0, 100], 100)
    assert i.low[0] == 0
    assert i.high[1] == 1
    # 0 of n: the upper end is 1 − (α/2)^(1/n).
    assert i.high[0] == pytest.approx(1 - 0.025 ** (1 / 100))
    assert i.low[1] == pytest.approx(0.025 ** (1 / 100))


def test_ratio_interval_covers():
    rng = np.random.default_rng(5)
    common = rng.normal(size=(SEEDS, REPLICATES))
    num = 3.0 + common + 0.5 * rng.normal(size=common.shape)
    den = 2.0 + common
    i = st.ratio_interval(num, den)
    assert PROMISE <= coverage(i, 1.5) <= HIGHEST
    assert np.mean(np.isfinite(i.high)) > 0.99


def test_ratio_interval_says_when_the_data_do_not_bound_it():
    rng = np.random.default_rng(5)
    num = 1.0 + 0.1 * rng.normal(size=(SEEDS, 2000))
    den = 0.1 + rng.normal(size=(SEEDS, 2000))
    i = st.ratio_interval(num, den)
    assert np.mean(np.isinf(i.high)) > 0.8
    assert coverage(i, 10.0) >= PROMISE
    one_sided = st.ratio_interval(num, den, positive=True)
    assert coverage(one_sided, 10.0) >= PROMISE
    assert np.mean(np.isinf(one_sided.high) & (one_sided.low > 1)) > 0.5
    assert np.all(one_sided.low >= 0)


def test_z_limit():
    assert st.z_limit(13) == pytest.approx(3.36, abs=0.01)
    assert st.z_limit(1, level=0.95) == pytest.approx(1.96, abs=0.001)


def test_quantile_band_describes_any_number_of_runs():
    low, high = st.quantile_band(np.array([[3.0], [1.0], [np.nan]]), 0.0, 1.0)
    assert (low, high) == (1.0, np.inf)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: st.mean_interval(np.ones(19)), "at least 20 independent runs, got 19"),
        (lambda: st.median_interval(np.ones((5, 3))), "got 5"),
        (lambda: st.bca_interval(np.ones(3), key=jax.random.key(0)), "got 3"),
        (lambda: st.proportion_interval(3, 10), "got 10"),
        (lambda: st.proportion_interval(31, 30), "between 0 and trials"),
        (lambda: st.mean_interval(np.array([1.0] * 24 + [np.inf])), r"values\[24\] is inf"),
        (lambda: st.median_interval(np.array([1.0] * 24 + [np.nan])), r"values\[24\] is nan"),
        (lambda: st.mean_interval(np.ones(30), level=95.0), "between 0 and 1, got 95"),
        (lambda: st.mean_interval(np.array(1.0)), r"values\[runs, \*shape\] must have 1 axis or more"),
        (lambda: st.band(np.ones((30, 2)), method="max-t"), "key="),
        (lambda: st.band(np.ones((30, 2)), method="scheffe"), "'scheffe'"),
        (lambda: st.median_interval(np.ones(20), level=0.9999999), "run more seeds"),
        (lambda: st.ratio_interval(np.ones(20), np.ones((20, 2))), "paired"),
        (lambda: st.quantile_band(np.ones(20), 0.9, 0.1), "low <= high"),
        (lambda: st.z_limit(0), "at least 1"),
        (lambda: st.bca_interval(np.ones(30), key=jax.random.key(0), resamples=10), "at least 1000"),
    ],
)
def test_refuses_what_it_cannot_claim(call, says):
    with pytest.raises(ValueError, match=says):
        call()
