"""The stopwatch: against a fake clock, against exact binomial coverage, and against planted faults."""

import gc
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad import statistics, timing


@pytest.fixture
def clock(monkeypatch):
    """A clock that moves only when a contender says so: `clock(seconds)`."""
    now = [0.0]

    def sleep(seconds):
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return sleep


def test_compiled_executes_nothing_and_gives_the_program():
    ran = []

    def function(x):
        jax.debug.callback(lambda: ran.append(1))
        return 2.0 * x

    executable, seconds = timing.compiled(function, jnp.arange(3.0))
    jax.effects_barrier()
    assert ran == []
    assert seconds > 0
    np.testing.assert_array_equal(executable(jnp.arange(3.0)), [0.0, 2.0, 4.0])
    jax.effects_barrier()
    assert ran == [1]


def test_compiled_keeps_static_arguments_of_a_jitted_function():
    jitted = jax.jit(lambda x, power: x**power, static_argnames="power")
    executable, _ = timing.compiled(jitted, jnp.asarray(3.0), power=2)
    assert float(executable(jnp.asarray(3.0))) == 9.0


def test_seconds_per_call_are_those_of_the_clock(clock):
    result = timing.measure(lambda: clock(0.002), repeats=9, min_seconds=0.01)
    assert result.calls >= 5
    assert result.median == pytest.approx(0.002)
    assert result.low <= result.median <= result.high
    np.testing.assert_allclose(result.runs, 0.002)
    assert result.runs.shape == (9,)


def test_the_first_call_which_compiles_is_not_timed(clock):
    seen = []

    def thunk():
        clock(100.0 if not seen else 0.02)
        seen.append(1)

    assert timing.measure(thunk, repeats=6).runs.max() == pytest.approx(0.02)


def test_results_are_waited_for(clock):
    class Pending:
        """What an asynchronous call returns: the work is done when somebody waits for it."""

        def block_until_ready(self):
            clock(0.05)
            return self

    assert timing.measure(Pending, repeats=6).median == pytest.approx(0.05)


def test_contenders_take_turns_in_alternating_order(clock):
    order = []

    def contender(name):
        def thunk():
            order.append(name)
            clock(1.0)

        return thunk

    timing.race({name: contender(name) for name in "abc"}, repeats=6, min_seconds=0.5)
    assert "".join(order[-18:]) == "abccba" * 3


def test_a_ratio_survives_a_drift_that_ruins_the_seconds(clock):
    """The machine slows down by 30 % a round: seconds spread fivefold, the ratio stays at 3."""
    state = [0]

    def contender(work):
        def thunk():
            state[0] += 1
            clock(work * 1.3 ** (state[0] / 2))

        return thunk

    times = timing.race({"slow": contender(3.0), "fast": contender(1.0)}, repeats=11, min_seconds=0.1)
    drifted = timing.ratio(times["slow"], times["fast"])
    assert times["slow"].runs.max() > 5 * times["slow"].runs.min()
    assert drifted.low <= 3.0 <= drifted.high
    assert drifted.median == pytest.approx(3.0, rel=0.2)
    # The fault that interleaving guards against: one contender after the other is off by far more.
    one = timing.measure(contender(3.0), repeats=11)
    two = timing.measure(contender(1.0), repeats=11)
    assert not 1.5 < one.median / two.median < 6.0


def test_the_ratio_of_two_races_is_refused(clock):
    one = timing.measure(lambda: clock(0.02))
    two = timing.measure(lambda: clock(0.02))
    with pytest.raises(ValueError, match="different races"):
        timing.ratio(one, two)


def test_the_collector_is_off_while_timing_and_on_again_after():
    states = []
    timing.measure(lambda: states.append(gc.isenabled()), repeats=6, min_seconds=0.0)
    assert states[-6:] == [False] * 6
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        timing.measure(lambda: 1 / 0, repeats=6)
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"repeats": 5}, "repeats must be at least 6"),
        ({"min_seconds": math.nan}, "min_seconds must be a finite number >= 0"),
        ({"min_seconds": -1.0}, "min_seconds must be a finite number >= 0"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(arguments, message):
    ran = []
    with pytest.raises(ValueError, match=message):
        timing.measure(lambda: ran.append(1), **arguments)
    assert ran == []


def test_no_contender():
    with pytest.raises(ValueError, match="nothing to time"):
        timing.race({})


@pytest.mark.parametrize(("m", "j"), [(6, 1), (8, 1), (9, 2), (15, 4), (20, 6), (100, 40)])
def test_the_interval_uses_the_tabulated_order_statistics(m, j):
    """Tables of the sign test's 95 % interval for the median (Conover, table A3)."""
    low, high = timing.median_interval(np.arange(1, m + 1)[::-1])
    assert (low, high) == (j, m + 1 - j)


def test_the_interval_covers_a_skewed_median_as_often_as_it_says():
    draws = np.random.default_rng(0).lognormal(size=(4000, 15))
    hits = [low <= 1.0 <= high for low, high in map(timing.median_interval, draws)]
    exact = 1 - 2 * sum(math.comb(15, i) for i in range(4)) / 2**15
    assert np.mean(hits) == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


@pytest.mark.parametrize("m", [20, 33, 101])
def test_the_interval_is_that_of_statistics(m):
    draws = np.random.default_rng(m).exponential(size=m)
    theirs = statistics.median_interval(draws)
    assert timing.median_interval(draws) == (float(theirs.low), float(theirs.high))


def test_too_few_values_for_an_interval():
    with pytest.raises(ValueError, match="too few"):
        timing.median_interval(np.arange(5.0))


def test_a_real_program_ten_times_the_work_takes_longer():
    x = jnp.ones((300, 300))

    def power(times):
        def run(x):
            return jax.lax.fori_loop(0, times, lambda _, a: jnp.tanh(a @ x), x)

        executable = timing.compiled(run, x).executable
        return lambda: executable(x)

    times = timing.race({"long": power(40), "short": power(4)}, repeats=7, min_seconds=0.0)
    assert timing.ratio(times["long"], times["short"]).median > 2
