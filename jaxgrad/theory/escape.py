"""The chance that SGD leaves a bad basin (C5), with a proof: for losses of one parameter.

A step is `w → φ_B(w) = w − η g_B(w)`. If `η <= 1/smoothness`, smoothness a bound on every example's second
derivative, each φ_B is increasing. Two facts follow, and they are theorems, not estimates:

**A bracket.** `u_t(w)`, the probability to have crossed `right` within t steps from w, is non-decreasing in w
(run two paths on the same batches: they never change places), and `u_{t+1}(w) = Σ_B p_B u_t(φ_B(w))`. So reading
u_t at the grid point below φ_B(w) gives a lower bound, and at the one above an upper bound, at every step.
Halving the grid spacing halves the width; linear interpolation between lies far inside.

**Impossibility.** If at some point w° between the start and the exit every batch gradient points back
(`g_B(w°) >= 0` for all B), then `φ_B(w) <= φ_B(w°) <= w°` for every w <= w°: no path ever crosses, in any number of
steps. For GD every basin has such a point; for batches of distinct examples, large enough ones do too.

Two landscapes to try it on: `double_well` and `frequency`.
"""

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxgrad import checks
from jaxgrad.checks import Count, Examples, Natural, NotNegative, Number, Positive, checked, float64
from jaxgrad.sampling import check_sizes, is_distinct, is_with_replacement
from jaxgrad.types import Batch, Loss, Params, Sampling

MOST_OUTCOMES = 10_000
"""The largest number of different batches that is enumerated."""


class Landscape(NamedTuple):
    """A finite-sum loss of one number w, with a bad basin."""

    loss: Loss
    """`loss(w, batch)`, w a scalar."""
    data: Batch
    smoothness: float
    """No example's second derivative exceeds this anywhere."""
    bad: float
    """The bad minimum."""
    barrier: float
    """The maximum between it and the good one, to its right."""
    good: float
    """The good minimum."""
    left: float | None
    """The barrier on the other side of the bad basin, if there is one."""


class Stationary(NamedTuple):
    """A point where the full gradient vanishes."""

    w: float
    loss: float
    curvature: float
    variance: float
    """Of the example gradients, 1/n-normalised."""


class Escape(NamedTuple):
    """Probability to have crossed the exit within t steps, at each t of `steps`."""

    steps: np.ndarray
    low: np.ndarray
    """A proven lower bound (to rounding, 1e-12)."""
    high: np.ndarray
    """A proven upper bound."""
    estimate: np.ndarray
    """By interpolation: not proven, but closer."""
    impossible_at: float | None
    """The point w° that no path passes; then all probabilities are exactly 0."""


# --- landscapes ------------------------------------------------------------------------------------------------


@checked
def double_well(n: Count = 16, mean: Number = 0.05, spread: NotNegative = 1.5) -> Landscape:
    """`½(w − xᵢ)² − ½ log cosh 2w` with half of the xᵢ at mean + spread and half at mean − spread.

    The mean loss is a tilted double well; the batch noise is the same everywhere, `±spread` averaged over the
    batch, and second derivatives lie below 1. Raises ValueError for an odd n, or a tilt that leaves one well.
    """
    if n % 2:
        raise ValueError(f"n must be even and positive, got {n}")
    x = mean + spread * np.where(np.arange(n) % 2 == 0, 1.0, -1.0)
    data = Batch(x, np.zeros(n))
    points = stationary_points(_double_well_loss, data, -2.0, 2.0)
    if len(points) != 3:
        raise ValueError(f"a tilt of {mean} leaves {len(points)} stationary points: two wells need three")
    bad, barrier, good = (point.w for point in points)
    return Landscape(_double_well_loss, data, 1.0, bad, barrier, good, None)


def frequency() -> Landscape:
    """Fitting the frequency of a sine: `(yᵢ − sin(w xᵢ))²` with `yᵢ = sin(2 xᵢ)`, eight examples without noise.

    At the good minimum w = 2 every example gradient vanishes, so SGD that arrives stays; at the bad one they do
    not. `∂²/∂w² = 2x²(1 − 2s² + ys)`, with `s = sin(wx)`, is at most `2x²(1 + y²/8)`.
    """
    x = np.array([0.5, 0.6, 0.8, 1.0, 1.1, 1.3, 1.5, 1.6])
    data = Batch(x, np.array([_sine(2 * value) for value in x]))
    points = [p for p in stationary_points(_frequency_loss, data, -2.0, 2.2)]
    left, bad, barrier, good = (point.w for point in points[-4:])
    smoothness = float(np.max(2 * x**2 * (1 + data.y**2 / 8)))
    return Landscape(_frequency_loss, data, smoothness, bad, barrier, good, left)


def _sine(x: float) -> float:
    """sin x for x up to 4, correctly rounded, by its series in fractions: NumPy's last bit hangs on the processor."""
    exact = term = total = Fraction(x)
    for k in range(2, 60, 2):
        term *= -exact * exact / (k * (k + 1))
        total += term
    return float(total)


def _double_well_loss(w: Float[Array, ""], batch: Batch) -> Float[Array, ""]:
    # log cosh 2w = logaddexp(2w, −2w) − log 2, without overflow.
    well = 0.5 * (jnp.logaddexp(2 * w, -2 * w) - math.log(2))
    return jnp.mean(0.5 * (w - batch.x) ** 2) - well


def _frequency_loss(w: Float[Array, ""], batch: Batch) -> Float[Array, ""]:
    return jnp.mean((batch.y - jnp.sin(w * batch.x)) ** 2)


@checked
def stationary_points(loss: Loss, data: Examples, low: Number, high: Number, *, grid: Count = 4001) -> list[Stationary]:
    """Where the full gradient of `loss(w, data)`, w one number, changes sign in [low, high], to 1e-14.

    A pair of points closer together than the grid is missed.
    """
    with jax.enable_x64(True):
        data = float64(data)
        checks.loss(loss, jnp.float64(low), data)
        value = jax.jit(jax.vmap(lambda w: loss(w, data)))
        slope = jax.jit(jax.vmap(jax.grad(lambda w: loss(w, data))))
        bend = jax.jit(jax.vmap(jax.grad(jax.grad(lambda w: loss(w, data)))))
        if not low < high:
            raise ValueError(f"low must lie below high, got low={low} and high={high}")
        w = np.linspace(low, high, checks.count("grid", grid, 2))
        g = np.asarray(slope(w))
        changes = np.flatnonzero(np.sign(g[:-1]) * np.sign(g[1:]) < 0)
        a, b = w[changes], w[changes + 1]
        rising = g[changes] < 0
        for _ in range(60):
            middle = (a + b) / 2
            before = (np.asarray(slope(middle)) < 0) == rising
            a, b = np.where(before, middle, a), np.where(before, b, middle)
        roots = np.sort(np.concatenate([(a + b) / 2, w[g == 0]]))
        each = _example_gradients(loss, data, roots)
        rows = zip(roots, value(roots), bend(roots), each.var(axis=0), strict=True)
        return [Stationary(*(float(v) for v in row)) for row in rows]


# --- the certified probability ---------------------------------------------------------------------------------


@checked
def escape_probability(
    loss: Loss,
    data: Examples,
    *,
    sampling: Sampling,
    eta: Positive,
    start: Number,
    right: Number,
    left: Number | None = None,
    side: str = "right",
    steps: Natural,
    smoothness: Positive,
    grid: Count = 8192,
) -> Escape:
    """P(SGD from `start` crosses an exit within t steps), bracketed, for t = 0 … steps (F5, C5).

    Args:
      loss: `loss(w, batch)`, the mean over examples, of one number w.
      sampling: fresh at each step (full batch, with replacement or distinct). All different batches are
        enumerated, equal examples counted together: at most `MOST_OUTCOMES`.
      right, left: the ends of the basin, `left < start < right`. A path that has crossed one does not come back;
        without `left` there is only one exit.
      side: which exit is asked for. With both ends given, "right" means right before left.
      smoothness: a bound on every example's second derivative; `eta * smoothness <= 1` is what the proof needs.
      grid: the width of the bracket is proportional to 1/grid.

    Raises ValueError if the step size is too large for the proof, the interval makes no sense, or there are
    too many different batches.
    """
    if not 0 < eta * smoothness <= 1:
        raise ValueError(
            f"eta * smoothness = {eta * smoothness:g} must lie in (0, 1]: beyond, a step is not monotone and "
            "nothing is proven"
        )
    if not (start < right and (left is None or left < start)):
        raise ValueError(f"need left < start < right, got left={left}, start={start}, right={right}")
    checks.one_of("side", side, ("right", "left"))
    if side == "left" and left is None:
        raise ValueError(f"side must be 'right', or 'left' where left is given; got {side!r}")
    checks.count("grid", grid, 16)

    t = np.arange(steps + 1)
    wall = impossible(loss, data, sampling=sampling, start=start, exit=right if side == "right" else left)
    if wall is not None:
        zero = np.zeros(steps + 1)
        return Escape(t, zero, zero, zero, wall)

    # Without a left exit the grid ends well below the start; what falls off it is bounded by 0 and by the
    # lowest grid point, so the bracket holds wherever it ends.
    bottom = left if left is not None else start - 3 * (right - start)
    w = np.unique(np.append(np.linspace(bottom, right, grid), start))
    weights, probabilities = _outcomes(data, sampling)
    with jax.enable_x64(True):
        gradients = _example_gradients(loss, float64(_one_of_each(data)[0]), w)
    after = w[None, :] - eta * (weights @ gradients)

    up = side == "right"
    bounds = [_transition(w, after, probabilities, how, left is not None, up) for how in ("low", "high", "line")]
    at, curves = int(np.searchsorted(w, start)), []
    for matrix, gain in bounds:
        u, seen = np.zeros(len(w)), [0.0]
        for _ in range(steps):
            u = matrix @ u + gain
            seen.append(float(u[at]))
        curves.append(np.array(seen))
    low, high, estimate = curves
    return Escape(t, low, np.minimum(high, 1.0), estimate, None)


@checked
def impossible(
    loss: Loss, data: Examples, *, sampling: Sampling, start: Number, exit: Number | None, grid: Count = 4001
) -> float | None:
    """A point between `start` and `exit` at which **every** batch gradient points back, or None if none is seen.

    The most outward batch holds the b examples whose gradients push outwards most (with replacement: the one
    that does, b times), so no batches are enumerated. For step sizes with `eta * smoothness <= 1` such a point
    proves that the exit is never reached. It must push back by more than rounding.
    """
    if exit is None:
        return None
    n = _count(data)
    check_sizes(sampling, n)
    with jax.enable_x64(True):
        checks.loss(loss, jnp.float64(start), float64(data))
    if start == exit:
        raise ValueError(f"exit must lie beside start, got {start} for both")
    w = np.linspace(start, exit, checks.count("grid", grid, 2))
    with jax.enable_x64(True):
        outward = -np.sign(exit - start) * _example_gradients(loss, float64(data), w)
    worst_first = -np.sort(-outward, axis=0)
    if is_with_replacement(sampling):
        push = worst_first[0]
    elif sampling.batch_size is None or is_distinct(sampling):
        push = worst_first[: sampling.batch_size or n].mean(axis=0)
    else:
        raise ValueError(f"batches of {sampling.name!r} are not independent: nothing here describes them")
    back = np.flatnonzero(push < -1e-12 * np.abs(outward).max())
    return float(w[back[np.argmin(push[back])]]) if back.size else None


@checked
def kramers_rate(
    *,
    eta: Positive,
    factor: NotNegative,
    variance: NotNegative,
    well_curvature: Positive,
    barrier_curvature: Number,
    height: NotNegative,
) -> float:
    """Kramers' guide to the rate of escape per step, `η √(f''_well |f''_barrier|)/(2π) · exp(−height/T)`.

    `T = ηγσ²/2` with the sampling factor γ and the variance σ² of the example gradients. A small-noise limit of a
    continuous diffusion with Gaussian noise: batch noise is bounded, so it overestimates, by 30 to 60 % where
    it is good and without limit where escape is impossible. The first crossing of the top has about twice
    this rate. Draw it as a guide, never as a prediction.
    """
    temperature = eta * factor * variance / 2
    if temperature == 0:
        return 0.0
    return eta * math.sqrt(well_curvature * abs(barrier_curvature)) / (2 * math.pi) * math.exp(-height / temperature)


# --- how it is done --------------------------------------------------------------------------------------------


def _transition(
    w: np.ndarray, after: np.ndarray, probabilities: np.ndarray, how: str, left_exit: bool, up: bool
) -> tuple[Any, np.ndarray]:
    """One step back in time: `u ← matrix u + gain`, gain the probability to cross the exit in this very step.

    `how` says at which grid point u is read: "low" where it is no larger, "high" no smaller, or "line" between.
    """
    from scipy.sparse import csr_array

    points = len(w)
    slack = 1e-12 * (w[-1] - w[0])
    out_right, out_left = after >= w[-1], after <= w[0]
    if how != "line":  # a crossing within rounding of the exit counts for the upper bound only
        certain = (how == "low") == up
        out_right = after >= w[-1] + (slack if certain else -slack)
        out_left = after <= w[0] + (-slack if left_exit and not certain else slack)
    gain = probabilities @ (out_right if up else out_left & left_exit)

    # A path that fell below a grid without a left exit is still there: at the lowest point or, at worst, lost.
    stays = ~out_right & ~(out_left & (left_exit or how == "low"))
    position = np.clip(after, w[0], w[-1])
    below = np.clip(np.searchsorted(w, position - slack, side="right") - 1, 0, points - 1)
    above = np.clip(np.searchsorted(w, position + slack, side="left"), 0, points - 1)
    if how == "line":
        share = np.clip((position - w[below]) / np.where(above > below, w[above] - w[below], 1.0), 0, 1)
        reads = [(below, 1 - share), (above, share)]
    else:
        # u rises towards the exit that is asked for.
        smaller = (how == "low") == up
        reads = [(below if smaller else above, np.ones_like(after))]
    rows = np.broadcast_to(np.arange(points)[None, :], after.shape)
    entries = [(probabilities[:, None] * share * stays, rows, column) for column, share in reads]
    values, at, columns = (np.concatenate([entry[i].ravel() for entry in entries]) for i in range(3))
    matrix = csr_array((values, (at, columns)), shape=(points, points))
    return matrix, gain


def _outcomes(data: Any, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """All different batches: `weights[k, m]`, the share of each of the m different examples, and their chances."""
    _, counts = _one_of_each(data)
    n, m = int(counts.sum()), len(counts)
    check_sizes(sampling, n)
    if sampling.batch_size is None:
        return (counts / n)[None, :], np.ones(1)
    b = sampling.batch_size
    distinct = is_distinct(sampling)
    if not (distinct or is_with_replacement(sampling)):
        raise ValueError(f"batches of {sampling.name!r} are not independent: nothing here describes them")
    limits = [min(b, int(c)) if distinct else b for c in counts]
    chosen = list(itertools.islice(_compositions(b, limits), MOST_OUTCOMES + 1))
    if len(chosen) > MOST_OUTCOMES:
        raise ValueError(
            f"more than {MOST_OUTCOMES} different batches of {b} out of {m} different examples: use a smaller b, "
            "fewer examples, or more equal ones"
        )

    def chance(k: tuple[int, ...]) -> float:
        if distinct:
            return math.prod(math.comb(int(c), i) for c, i in zip(counts, k, strict=True)) / math.comb(n, b)
        ways = math.factorial(b) // math.prod(math.factorial(i) for i in k)
        return ways * math.prod(int(c) ** i for c, i in zip(counts, k, strict=True)) / n**b

    return np.array(chosen) / b, np.array([chance(k) for k in chosen])


def _compositions(total: int, limits: list[int]) -> Iterator[tuple[int, ...]]:
    """All ways to write `total` as an ordered sum of one term per limit, none above its own."""
    if len(limits) == 1:
        if total <= limits[0]:
            yield (total,)
        return
    room = sum(limits[1:])
    for first in range(max(0, total - room), min(total, limits[0]) + 1):
        for rest in _compositions(total - first, limits[1:]):
            yield (first, *rest)


def _one_of_each(data: Any) -> tuple[Any, np.ndarray]:
    """The different examples, and how often each occurs."""
    n = _count(data)
    rows = np.concatenate([np.asarray(leaf, float).reshape(n, -1) for leaf in jax.tree.leaves(data)], axis=1)
    _, first, counts = np.unique(rows, axis=0, return_index=True, return_counts=True)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[first], data), counts


def _example_gradients(loss: Loss, data: Any, w: np.ndarray) -> np.ndarray:
    """`∂/∂w loss(w, example)` as `[examples, points]`."""
    return np.asarray(_gradient_table(jnp.asarray(w), data, loss=loss))


@partial(jax.jit, static_argnames="loss")
def _gradient_table(w: Any, data: Any, *, loss: Loss) -> jax.Array:
    def one(point: Params, example: Any) -> jax.Array:
        return jax.grad(loss)(point, jax.tree.map(lambda leaf: leaf[None], example))

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(w, data)


def _count(data: Any) -> int:
    return np.shape(jax.tree.leaves(data)[0])[0]
