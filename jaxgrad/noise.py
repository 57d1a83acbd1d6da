"""The noise of the minibatch gradient: exact, estimated, and watched along a run.

For any `loss(params, batch)` that is a mean over examples, with example gradients gᵢ, their mean G and their
covariance `Σ = (1/n) Σ (gᵢ − G)(gᵢ − G)ᵀ`, the gradient of a batch B has

    E[g_B] = G,    Cov[g_B] = γ Σ,    E‖g_B − G‖² = γ tr Σ

where γ (`gamma`) is all that the first two moments know of how the batch was drawn. `measure` computes tr Σ
and the noise scales at a point exactly, from all n examples; `estimate_scale` estimates them from batches, with
intervals; `monitor` makes a function that `descend(..., observe=...)` calls along a run.

The noise scales (McCandlish et al. 2018) say up to which batch size a bigger batch pays:

    B_simple = tr Σ / ‖G‖²            B_noise = tr(HΣ) / GᵀHG

On ill-conditioned problems they differ by orders of magnitude, and both grow without limit towards a minimum:
there is no single critical batch size.

The example gradient is the gradient on a batch of one, so a penalty in the loss is part of each gᵢ. A loss that is not
known to be a mean over the examples (`jaxgrad.means`), such as a weighted average or one with a batch statistic, has no
such gᵢ and is refused with ValueError.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from jaxgrad import checks, means
from jaxgrad.checks import Count, Counts, Examples, Keys, Level, NotNegative, OneKey, Weights, checked, float64
from jaxgrad.sampling import check_sizes, distinct, is_distinct, is_with_replacement
from jaxgrad.statistics import Interval, mean_interval, ratio_interval
from jaxgrad.types import Key, Loss, Params, Sampling

DENSE = 2000
"""Up to this many parameters Σ and the Hessian are formed."""


class PointNoise(NamedTuple):
    """The exact gradient noise of a data set at one point."""

    n: int
    gradient: Params
    """G, the full gradient, in the pytree of the parameters (float64)."""
    gradient_squared: float
    """‖G‖²."""
    trace: float
    """tr Σ: the mean of ‖gᵢ − G‖² over the examples."""
    simple_scale: float
    """B_simple = tr Σ/‖G‖²."""
    curvature: float
    """GᵀHG; NaN if not asked for."""
    noise_curvature: float
    """tr(HΣ); NaN if not asked for."""
    noise_scale: float
    """B_noise = tr(HΣ)/GᵀHG; NaN where GᵀHG <= 0, as a step along −G then has no best length."""


class OneStep(NamedTuple):
    """The best single SGD step at a point, to second order in its size."""

    eta: float
    decrease: float
    """E[L(w) − L(w − eta g_B)]."""


class ScaleEstimate(NamedTuple):
    """Noise at a point, estimated from batches."""

    scale: Interval
    """B_simple: Fieller's interval, `(low, inf)` where the data do not bound it."""
    trace: Interval
    """tr Σ."""
    gradient_squared: Interval
    """‖G‖²; the interval may reach below zero, where the gradient drowns in its noise."""


@checked
def gamma(sampling: Sampling, n: Count) -> float:
    """The sampling factor γ: `Cov[g_B] = γ Σ`, with Σ the 1/n-normalised covariance of the n example gradients.

        full batch        0
        with replacement  1/b
        distinct          (n − b) / (b (n − 1))

    The mean over a batch of *any* per-example quantity has γ times its population covariance (Cochran 1977,
    theorem 2.2). `1/γ` is the effective batch size: the number of draws with replacement that is as noisy.

    Raises ValueError if `b > n` for distinct indices, and for a reshuffled pass: its batches depend on
    each other, so no factor describes it over several steps (`jaxgrad.theory.reshuffling` does).
    """
    check_sizes(sampling, n)
    b = sampling.batch_size
    if b is None:
        return 0.0
    if is_with_replacement(sampling):
        return 1 / b
    if is_distinct(sampling):
        return (n - b) / (b * (n - 1)) if n > 1 else 0.0
    raise ValueError(
        f"no sampling factor describes {sampling.name!r} batches: within a pass they are not independent. "
        "One of its batches by itself has the law of distinct(b); for a whole path use "
        "jaxgrad.theory.reshuffling"
    )


@checked
def example_gradients(loss: Loss, params: Weights, batch: Examples) -> Params:
    """`gᵢ = ∇loss(params, batch of example i alone)`: the parameters' pytree, each leaf with an axis n in front.

    Works under `jit` and `vmap`, in the precision of its arguments. It holds n copies of the parameters; the
    functions below do not.
    """
    checks.loss(loss, params, batch)
    return jax.vmap(partial(_gradient_of_one(loss, params, batch), params))(batch)


@checked
def measure(loss: Loss, params: Weights, batch: Examples, *, curvature: bool = True, chunk: Count = 1024) -> PointNoise:
    """‖G‖², tr Σ and the noise scales at `params`, exactly, over all n examples of `batch`, in float64.

    Args:
      curvature: compute GᵀHG, tr(HΣ) and B_noise too, which forms the Hessian (at most `DENSE` parameters).
      chunk: this many example gradients are in memory at once.

    Raises ValueError with `curvature` and more than `DENSE` parameters, or for an empty batch.
    """
    with jax.enable_x64(True):
        params, batch = float64(params), float64(batch)
        checks.loss(loss, params, batch)
        n, size = _count(batch), ravel_pytree(params)[0].size
        if curvature:
            _check_dense(size, "curvature=False leaves B_noise out")
        G, trace = _jitted_moments(params, batch, loss=loss, chunk=chunk)
        squared = float(np.sum(np.asarray(ravel_pytree(G)[0]) ** 2))
        along = against = math.nan
        if curvature:
            H = np.asarray(_jitted_hessian(params, batch, loss=loss))
            g = np.asarray(ravel_pytree(G)[0])
            along = float(g @ H @ g)
            against = float(np.sum(H * np.asarray(_jitted_covariance(params, batch, loss=loss, chunk=chunk))))
        return PointNoise(
            n,
            jax.tree.map(np.asarray, G),
            squared,
            float(trace),
            _ratio(float(trace), squared),
            along,
            against,
            _ratio(against, along),
        )


@checked
def covariance(loss: Loss, params: Weights, batch: Examples, *, chunk: Count = 1024) -> np.ndarray:
    """`Σ[p, p] = (1/n) Σ (gᵢ − G)(gᵢ − G)ᵀ` exactly, float64, parameters in the order of `ravel_pytree`.

    `gamma(sampling, n) * covariance(...)` is the covariance of the batch gradient. Raises ValueError beyond
    `DENSE` parameters.
    """
    with jax.enable_x64(True):
        params, batch = float64(params), float64(batch)
        checks.loss(loss, params, batch)
        _check_dense(ravel_pytree(params)[0].size, "use measure or directional_variances")
        return np.asarray(_jitted_covariance(params, batch, loss=loss, chunk=chunk))


@checked
def directional_variances(
    loss: Loss, params: Weights, batch: Examples, directions: Weights, *, chunk: Count = 1024
) -> np.ndarray:
    """`vᵀΣv[k]` exactly, for k directions: the parameters' pytree, each leaf with an axis k in front.

    Forward mode: no example gradient is formed, so any number of parameters will do.
    """
    with jax.enable_x64(True):
        args = float64(params), float64(batch), float64(directions)
        checks.loss(loss, *args[:2])
        shapes, wanted = (jax.tree.map(np.shape, tree) for tree in (args[2], args[0]))
        k = jax.tree.leaves(args[2])[0].shape[:1]
        if not k or shapes != jax.tree.map(lambda leaf: (*k, *leaf.shape), args[0]):
            raise ValueError(f"directions must be params with an axis k in front: got {shapes} for {wanted}")
        return np.asarray(_jitted_directional(*args, loss=loss, chunk=chunk))


@checked
def stratified_trace(
    loss: Loss, params: Weights, batch: Examples, counts: Counts, b: Count, *, chunk: Count = 1024
) -> float:
    """`tr Cov[g_B] = Σ_d (n_d/n)² (n_d − b_d)/(b_d (n_d − 1)) tr Σ_d` of `parallel.stratified(b, counts)`, exactly.

    `b_d = b/D` different examples are drawn from each of D shares of `counts[d]` consecutive rows, and Σ_d is the
    covariance of the example gradients within share d, in float64 (Cochran 1977, theorem 5.3). `distinct(b)` has
    `gamma · tr Σ` instead, and Σ is the mean of the Σ_d plus the covariance of the shares' means: what lies between
    shares is noise to it, and none to a stratified batch.

    Raises ValueError where the counts do not add up to the rows, or b is no multiple of D from D to `D min(counts)`.
    """
    n, D = _count(batch), len(counts)
    if sum(counts) != n:
        raise ValueError(f"the shares {tuple(counts)} do not add up to the {n} rows")
    if b % D or not D <= b <= D * min(counts):
        raise ValueError(f"b must be a multiple of the {D} shares, from {D} to {D * min(counts)}; got {b}")
    total, first = 0.0, 0
    for size in counts:
        share = jax.tree.map(lambda leaf, rows=slice(first, first + size): leaf[rows], batch)
        within = measure(loss, params, share, curvature=False, chunk=chunk).trace
        total += (size / n) ** 2 * gamma(distinct(b // D), size) * within
        first += size
    return total


@checked
def one_step(noise: PointNoise, factor: NotNegative) -> OneStep:
    """The best step size for a batch gradient of sampling factor γ, and what it gains (McCandlish et al. 2018).

    `E[L(w − ηg_B)] = L − η‖G‖² + ½η²(GᵀHG + γ tr(HΣ))`, exact for a quadratic and to O(η³) otherwise, is least at
    `η = η_max/(1 + γ B_noise)` and gains `ΔL_max/(1 + γ B_noise)`, with `η_max = ‖G‖²/GᵀHG` and
    `ΔL_max = ½‖G‖⁴/GᵀHG`. NaN where the curvature is not positive, or was not measured.
    """
    total = noise.curvature + factor * noise.noise_curvature
    if not total > 0:
        return OneStep(math.nan, math.nan)
    return OneStep(noise.gradient_squared / total, 0.5 * noise.gradient_squared**2 / total)


@checked
def estimate_scale(
    loss: Loss,
    params: Weights,
    batch: Examples,
    *,
    small: Sampling,
    big: Sampling,
    key: OneKey,
    draws: Count = 100,
    level: Level = 0.95,
) -> ScaleEstimate:
    """B_simple, tr Σ and ‖G‖² at a point, estimated from `draws` independent pairs of batches, with intervals.

    The intervals cover 93 to 95 % at a nominal 95 % for batches of 8 or more and 100 draws or more; ‖g_B‖² of very
    small batches is skewed, and 60 draws of b = 2 covered 89 %. `big` may be the full batch. Raises ValueError as
    `scale_from_norms` does.
    """
    n = _count(batch)
    few, many = jax.random.split(key, (2, draws))
    return scale_from_norms(
        squared_norms(loss, params, batch, small, few),
        squared_norms(loss, params, batch, big, many),
        small=small,
        big=big,
        n=n,
        level=level,
    )


@checked
def scale_from_norms(
    small_squared: Any, big_squared: Any, *, small: Sampling, big: Sampling, n: Count, level: Level = 0.95
) -> ScaleEstimate:
    """The same from squared norms `‖g_B‖²[s, ...]` that are at hand, of batches drawn by `small` and `big` out of n.

    As `E‖g_B‖² = ‖G‖² + γ tr Σ`, batches of two sizes give both, without bias:

        tr Σ ≈ (‖g_s‖² − ‖g_b‖²) / (γ_s − γ_b)        ‖G‖² ≈ (γ_s‖g_b‖² − γ_b‖g_s‖²) / (γ_s − γ_b)

    The usual estimator (McCandlish et al. 2018, appendix A) has 1/b in place of γ: for distinct examples it is
    biased, and its ‖G‖² is negative on average at a minimum. Means are taken before the ratio: the mean of the
    ratios does not exist.

    Raises ValueError for fewer than 20 draws, or samplings that do not differ in γ with `small` noisier.
    """
    gamma_small, gamma_big = gamma(small, n), gamma(big, n)
    if not gamma_small > gamma_big:
        raise ValueError(
            f"small must be the noisier of the two: its sampling factor {gamma_small:g} is not above {gamma_big:g}"
        )
    few, many = checks.array("small_squared", small_squared), checks.array("big_squared", big_squared)
    if few.shape != many.shape:
        raise ValueError(f"small_squared {list(few.shape)} and big_squared {list(many.shape)} are paired: one shape")
    trace = (few - many) / (gamma_small - gamma_big)
    squared = (gamma_small * many - gamma_big * few) / (gamma_small - gamma_big)
    return ScaleEstimate(
        ratio_interval(trace, squared, level=level, positive=True),
        mean_interval(trace, level=level),
        mean_interval(squared, level=level),
    )


@checked
@partial(jax.jit, static_argnames=("loss", "sampling"))
def squared_norms(loss: Loss, params: Weights, batch: Examples, sampling: Sampling, keys: Keys) -> jax.Array:
    """`‖g_B‖²[s]` for s independent batches, one per key, in the precision of the arguments."""
    n = _count(batch)
    check_sizes(sampling, n)
    checks.loss(loss, params, batch)
    if found := means.doubt(loss, params, batch, [n, sampling.batch_size or n]):
        raise ValueError(
            "the law of the batch gradient's noise is that of a mean over the examples; of this loss it is not known "
            f"to be one: {found}. {means.HOW}"
        )

    def one(key: Key) -> jax.Array:
        indices = sampling.indices(key, 0, n)
        return _squared(jax.grad(loss)(params, jax.tree.map(lambda leaf: leaf[indices], batch)))

    return jax.lax.map(one, keys, batch_size=16)


@checked
def monitor(
    loss: Loss, batch: Examples, *, curvature: bool = False, chunk: Count = 1024
) -> Callable[[Params], dict[str, jax.Array]]:
    """A pure function of the parameters, for `descend(..., observe=monitor(loss, data))`.

    It returns scalars, exact over `batch` in the precision of the run: `gradient_squared` (‖G‖²), `noise_trace`
    (tr Σ), `simple_scale` (B_simple), and with `curvature` (at most `DENSE` parameters) `noise_scale` (B_noise).
    It works under `jit` and `vmap`, and costs about two passes of example gradients at each record point.
    """
    batch = jax.tree.map(jnp.asarray, batch)

    def observe(params: Params) -> dict[str, jax.Array]:
        checks.loss(loss, params, batch)
        G, trace = _moments(loss, params, batch, chunk)
        squared = _squared(G)
        seen = {"gradient_squared": squared, "noise_trace": trace, "simple_scale": trace / squared}
        if curvature:
            g = ravel_pytree(G)[0]
            _check_dense(g.size, "leave curvature out")
            H = _hessian(loss, params, batch)
            against = jnp.sum(H * _covariance(loss, params, batch, chunk))
            seen["noise_scale"] = against / (g @ H @ g)
        return seen

    return observe


_WHY = "the noise of a batch gradient comes from the gradients of single examples"


def _gradient_of_one(loss: Loss, params: Params, batch: Any) -> Callable[[Params, Any], Params]:
    """`gᵢ = ∇ℓ(params, example i)`; ValueError for a loss that is not known to be a mean over the examples."""
    return jax.grad(means.of_one(loss, params, batch, [_count(batch)], _WHY))


def _example_mean(of: Callable[[Any], Any], batch: Any, chunk: int) -> Any:
    """`(1/n) Σ of(example i)`, `chunk` examples at a time; the last chunk is padded with weight 0."""
    n = _count(batch)
    chunk = min(chunk, n)

    def add(total: Any, first: jax.Array) -> tuple[Any, None]:
        rows = first + jnp.arange(chunk, dtype=jnp.int32)
        examples = jax.tree.map(lambda leaf: leaf[jnp.minimum(rows, n - 1)], batch)
        values = jax.vmap(of)(examples)

        def weigh(sum_so_far: jax.Array, value: jax.Array) -> jax.Array:
            return sum_so_far + jnp.tensordot((rows < n).astype(value.dtype), value, 1)

        return jax.tree.map(weigh, total, values), None

    one = jax.tree.map(lambda leaf: leaf[0], batch)
    zero = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(of, one))
    total, _ = jax.lax.scan(add, zero, jnp.arange(0, n, chunk, dtype=jnp.int32))
    return jax.tree.map(lambda leaf: leaf / n, total)


def _moments(loss: Loss, params: Params, batch: Any, chunk: int) -> tuple[Params, jax.Array]:
    """G and tr Σ, in two passes: deviations from the mean, not a difference of large squares."""
    of_one = _gradient_of_one(loss, params, batch)
    G = jax.grad(loss)(params, batch)

    def deviation(example: Any) -> jax.Array:
        return _squared(jax.tree.map(jnp.subtract, of_one(params, example), G))

    return G, _example_mean(deviation, batch, chunk)


def _covariance(loss: Loss, params: Params, batch: Any, chunk: int) -> jax.Array:
    of_one = _gradient_of_one(loss, params, batch)
    G = ravel_pytree(jax.grad(loss)(params, batch))[0]

    def outer(example: Any) -> jax.Array:
        d = ravel_pytree(of_one(params, example))[0] - G
        return jnp.outer(d, d)

    # A chunk holds this many p × p matrices.
    return _example_mean(outer, batch, max(1, min(chunk, 4_000_000 // G.size**2)))


def _hessian(loss: Loss, params: Params, batch: Any) -> jax.Array:
    flat, unravel = ravel_pytree(params)
    gradient = jax.grad(lambda w: loss(unravel(w), batch))

    def row(v: jax.Array) -> jax.Array:
        return jax.jvp(gradient, (flat,), (v,))[1]

    return jax.lax.map(row, jnp.eye(flat.size, dtype=flat.dtype), batch_size=32)


def _directional(loss: Loss, params: Params, batch: Any, directions: Params, chunk: int) -> jax.Array:
    of_one = means.of_one(loss, params, batch, [_count(batch)], _WHY)

    def slope(loss: Loss, data: Any, v: Params) -> jax.Array:
        return jax.jvp(lambda w: loss(w, data), (params,), (v,))[1]

    mean = jax.vmap(lambda v: slope(loss, batch, v))(directions)

    def squares(example: Any) -> jax.Array:
        return (jax.vmap(lambda v: slope(of_one, example, v))(directions) - mean) ** 2

    return _example_mean(squares, batch, chunk)


@partial(jax.jit, static_argnames=("loss", "chunk"))
def _jitted_moments(params: Params, batch: Any, *, loss: Loss, chunk: int) -> Any:
    return _moments(loss, params, batch, chunk)


@partial(jax.jit, static_argnames=("loss", "chunk"))
def _jitted_covariance(params: Params, batch: Any, *, loss: Loss, chunk: int) -> Any:
    return _covariance(loss, params, batch, chunk)


@partial(jax.jit, static_argnames=("loss",))
def _jitted_hessian(params: Params, batch: Any, *, loss: Loss) -> Any:
    return _hessian(loss, params, batch)


@partial(jax.jit, static_argnames=("loss", "chunk"))
def _jitted_directional(params: Params, batch: Any, directions: Params, *, loss: Loss, chunk: int) -> Any:
    return _directional(loss, params, batch, directions, chunk)


def _squared(tree: Params) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(lambda leaf: jnp.sum(leaf**2), tree))


def _ratio(numerator: float, denominator: float) -> float:
    """The quotient; inf over zero, NaN over what is negative."""
    if denominator > 0:
        return numerator / denominator
    return math.inf if denominator == 0 and numerator > 0 else math.nan


def _count(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def _check_dense(size: int, instead: str) -> None:
    if size > DENSE:
        raise ValueError(f"{size} parameters are too many to form a matrix (at most {DENSE}): {instead}")
