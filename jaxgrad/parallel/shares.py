"""Stratified sampling on many devices: each device draws from its own rows, and no row travels."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.checks import Count, Counts, checked
from jaxgrad.parallel.sharding import Weighted
from jaxgrad.sampling import distinct
from jaxgrad.types import Key, Sampling


@checked
def stratified(b: Count, counts: Counts) -> Sampling:
    """`b/D` different examples from each of D shares of `counts[d]` examples: each device from its own rows.

    `counts` is `Sharded.counts`; for n rows in one array, equal shares that follow each other. The gradient is
    `Σ_d (n_d/n) g_{B_d}`: unbiased, also where shares differ in size, and its covariance is

        Cov[g_B] = Σ_d (n_d/n)² (n_d − b_d)/(b_d (n_d − 1)) Σ_d,        b_d = b/D

    with Σ_d the covariance of the example gradients *within* share d (Cochran 1977, theorem 5.3). Differences between
    shares add nothing, so it is below that of `distinct(b)` unless the shares are all alike.

    Raises ValueError unless D divides b and no share has fewer than b/D examples.
    """
    counts = tuple(counts)
    if b % len(counts):
        raise ValueError(f"the batch size must be a multiple of the {len(counts)} shares, got b = {b!r}")
    if min(counts) < b // len(counts):
        raise ValueError(
            f"cannot draw {b // len(counts)} different examples from a share of {min(counts)}: "
            f"use b <= {min(counts) * len(counts)}"
        )
    return Sampling("stratified", b, FromShares(counts), take=_TakeShares(counts))


def shares_of(sampling: Sampling) -> tuple[int, ...] | None:
    """The sizes of the shares that a stratified sampling draws from; None for any other sampling."""
    return sampling.draw.counts if isinstance(sampling.draw, FromShares) else None


class FromShares(NamedTuple):
    """Places of `b/D` different rows of each share, share by share: `int32[b]`."""

    counts: tuple[int, ...]

    def __call__(self, key: Key, step: Any, n: int, b: int) -> jax.Array:
        del n
        counts = np.array(self.counts)
        D, most = len(counts), int(counts.max())
        # The generator counts a step of D shares as D steps, so that no two shares draw the same random bits.
        number = jnp.asarray(step, jnp.int32) * jnp.int32(D) + jnp.arange(D, dtype=jnp.int32)
        out = jnp.zeros((D, b // D), jnp.int32)
        for size in np.unique(counts):  # two at most, except for rows that were spread by hand
            # Every share draws every size, and a mask chooses: to draw for some shares only, devices would communicate.
            own = jax.vmap(lambda i, size=int(size): distinct(b // D).indices(key, i, size))(number)
            out = jnp.where(jnp.asarray(counts == size)[:, None], own, out)
        out = out + jnp.arange(D, dtype=jnp.int32)[:, None] * jnp.int32(most)
        return out.reshape(-1)


class _TakeShares(NamedTuple):
    """Rows by their places. Each device takes its own rows, and no row travels."""

    counts: tuple[int, ...]

    def __call__(self, data: Any, indices: jax.Array) -> Any:
        D, most = len(self.counts), max(self.counts)
        own = indices.reshape(D, -1) - jnp.arange(D, dtype=jnp.int32)[:, None] * jnp.int32(most)

        def take(leaf: jax.Array) -> jax.Array:
            rows = leaf.reshape(D, most, *leaf.shape[1:])
            return jax.vmap(lambda share, i: share.at[i].get(mode="promise_in_bounds"))(rows, own).reshape(
                -1, *leaf.shape[1:]
            )

        if not isinstance(data, Weighted):
            return jax.tree.map(take, data)
        share = jnp.asarray(np.array(self.counts) / np.mean(self.counts), data.weight.dtype)
        weight = jnp.broadcast_to(share[:, None], own.shape).reshape(-1)
        return Weighted(jax.tree.map(take, data.batch), weight)
