"""One stopwatch for everything: compile time apart, steady time warm and blocked on, ratios from one run.

    executable, seconds = compiled(step, params, batch)         # compile time, once
    timing = measure(lambda: executable(params, batch))         # seconds per call, with an interval
    times = race({"gd": run_gd, "sgd": run_sgd})                # taking turns, so that drift hits all alike
    ratio(times["sgd"], times["gd"])                            # with an interval of its own

Seconds depend on the machine and on what else it does; ratios of contenders that took turns depend on them
much less. Publish ratios. Every interval is for the **median**, from order statistics alone: it assumes
independent rounds, but nothing about how times are distributed, and times are skewed.
"""

import gc
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad import checks
from jaxgrad.checks import Count, Level, NotNegative, checked

FEWEST = 6
"""Rounds below which no two order statistics enclose the median with 95 % confidence: `1 - 2/2^5 < 0.95`."""


class Timing(NamedTuple):
    """Seconds per call."""

    median: float
    low: float
    """Lower end of the median's interval (at least 95 %)."""
    high: float
    runs: np.ndarray
    """Seconds per call in each round, in the order in which they ran: `float64[rounds]`."""
    calls: int
    """Calls in each round."""
    started: int
    """When the race began (`time.perf_counter_ns`): the same for all contenders of one race."""


class Ratio(NamedTuple):
    """How many times as long one contender takes as another."""

    median: float
    low: float
    high: float
    runs: np.ndarray
    """The ratio in each round."""


class Compiled(NamedTuple):
    """A program, ready to call with arguments of the shapes and dtypes that it was compiled for."""

    executable: Callable[..., Any]
    seconds: float
    """What tracing, lowering and compiling took together."""


@checked
def compiled(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Compiled:
    """Compile `function` for these arguments and say how long that took. Nothing is executed.

    `function` may be a plain function or the result of `jax.jit` (whose static arguments are then kept).
    Where JAX's persistent cache or an earlier call already holds the program, the time is that of finding it.
    """
    jitted = function if hasattr(function, "lower") else jax.jit(function)
    start = time.perf_counter()
    with checks.saying("function cannot be compiled for these arguments"):
        executable = jitted.lower(*args, **kwargs).compile()  # type: ignore[attr-defined]
    return Compiled(executable, time.perf_counter() - start)


@checked
def measure(thunk: Callable[[], Any], *, repeats: Count = 15, min_seconds: NotNegative = 0.01) -> Timing:
    """Seconds per call of `thunk`: `race` with one contender."""
    return race({"": thunk}, repeats=repeats, min_seconds=min_seconds)[""]


@checked
def race(
    contenders: Mapping[str, Callable[[], Any]], *, repeats: Count = 15, min_seconds: NotNegative = 0.01
) -> dict[str, Timing]:
    """Time several thunks in turn: `repeats` rounds, in each of which every contender runs once.

    A round's order is the reverse of the one before, so that a drift of the machine, and what one contender
    leaves in the caches for the next, hit all alike. Each contender first runs once untimed (which compiles),
    then as often as it takes to last `min_seconds`: so many calls make up its share of a round. Each call is
    waited for (`jax.block_until_ready`), the garbage collector is off, and all rounds are kept.

    Raises ValueError where there is no contender, where `repeats` is below 6 (no interval exists), or where
    `min_seconds` is not finite and at least 0.
    """
    if not isinstance(contenders, Mapping):
        raise TypeError(
            f'contenders must be a dict of functions, such as {{"gd": run}}; got {checks.shown(contenders)}'
        )
    if not contenders:
        raise ValueError("contenders is empty: there is nothing to time")
    if repeats < FEWEST:
        raise ValueError(f"repeats must be at least {FEWEST} for an interval of the median; got {repeats}")
    if min_seconds > 3600:
        raise ValueError(f"min_seconds must be a number of seconds, at most 3600 (an hour), got {min_seconds}")
    for name, thunk in contenders.items():
        checks.function(f"contenders[{name!r}]", thunk, 0)
    started = time.perf_counter_ns()
    calls = {name: _enough_calls(thunk, min_seconds) for name, thunk in contenders.items()}
    runs: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(repeats):
            for name in order:
                runs[name].append(_seconds(contenders[name], calls[name]) / calls[name])
            order.reverse()
    finally:
        if collecting:
            gc.enable()
    return {
        name: Timing(*_median(np.array(times)), np.array(times), calls[name], started) for name, times in runs.items()
    }


@checked
def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """The median over rounds of `numerator / denominator`, two contenders of one `race`.

    Raises ValueError where they come from different races: what the machine did in between would be measured.
    """
    if numerator.started != denominator.started:
        raise ValueError("the two timings are of different races; time both contenders in one call of `race`")
    runs = numerator.runs / denominator.runs
    return Ratio(*_median(runs), runs)


@checked
def median_interval(values: Any, confidence: Level = 0.95) -> tuple[float, float]:
    """A distribution-free interval for the median: order statistics `x_(j)` and `x_(m+1-j)` of m values.

    It covers with probability `1 - 2 P(Binomial(m, 1/2) < j)`, whatever the distribution of independent
    values; j is the largest for which that is at least `confidence`. Raises ValueError where there is none
    (below 6 values for 95 %). `jaxgrad.statistics.median_interval` is this for seeds, of which it wants 20;
    rounds of a slow program are fewer, and nothing normal is assumed of them.
    """
    ordered = np.sort(checks.array("values", values, "m"))
    m = len(ordered)
    tail, j = 0.0, 0
    while j < m // 2 and 1 - 2 * (tail + math.comb(m, j) / 2**m) >= confidence:
        tail += math.comb(m, j) / 2**m
        j += 1
    if j == 0:
        raise ValueError(f"{m} values are too few for an interval of the median at confidence {confidence}")
    return float(ordered[j - 1]), float(ordered[m - j])


def _median(values: np.ndarray) -> tuple[float, float, float]:
    return (float(np.median(values)), *median_interval(values))


def _seconds(thunk: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        # Waiting for each call: independent programs that were only dispatched may run side by side.
        jax.block_until_ready(thunk())
    return time.perf_counter() - start


def _enough_calls(thunk: Callable[[], Any], min_seconds: float) -> int:
    """How many calls of a warm `thunk` last `min_seconds`."""
    jax.block_until_ready(thunk())
    calls = 1
    while (seconds := _seconds(thunk, calls)) < min_seconds:
        # Half as many again as the last try says, but never more than tenfold: it may have been an outlier.
        calls = math.ceil(calls * min(10.0, max(1.5, 1.5 * min_seconds / max(seconds, 1e-9))))
    return calls
