"""The loss and the sampling of one machine, for rows on many devices: padding has no weight and is never drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import means
from jaxgrad.parallel.sharding import Sharded, Weighted
from jaxgrad.parallel.shares import shares_of
from jaxgrad.types import Loss, Params, Sampling


@dataclass(frozen=True)
class Weighting:
    """The loss of weighted rows, `Σ weightᵢ ℓ(w, example i) / Σ weightᵢ`, for a mean over n examples of losses ℓ.

    When it is called, before anything is compiled, it raises ValueError for a loss that is not known to be such a mean.
    """

    loss: Loss
    n: int

    def __call__(self, params: Params, rows: Weighted) -> jax.Array:
        why = (
            f"{self.n:,} rows do not divide evenly over the devices, or are drawn from shares of different sizes: some "
            "are weighted, which is done example by example"
        )
        sizes = [self.n, rows.weight.shape[0]]
        of_one = means.of_one(self.loss, params, rows.batch, sizes, why)
        each = jax.vmap(partial(of_one, params))(rows.batch)
        weight = rows.weight.astype(each.dtype)
        return jnp.sum(weight * each) / jnp.sum(weight)


class _Placed(NamedTuple):
    """The indices that one machine draws, for one step or many, as places among rows that are padded per device."""

    draw: Callable[..., jax.Array]
    counts: tuple[int, ...]

    def __call__(self, *which: Any) -> jax.Array:
        counts = np.array(self.counts)
        ends = np.cumsum(counts)
        # Row i is on the device d with ends[d-1] <= i < ends[d]; `behind[d]` is how far the padding moves it.
        behind = (np.arange(len(counts)) * counts.max() - (ends - counts)).astype(np.int32)
        *key_and_step, _, b = which  # n would count the padding
        indices = self.draw(*key_and_step, int(ends[-1]), b)
        device = jnp.searchsorted(jnp.asarray(ends[:-1], jnp.int32), indices, side="right")
        return indices + jnp.asarray(behind)[device]


def on(sharded: Sharded, loss: Loss, sampling: Sampling) -> tuple[Loss, Any, Sampling]:
    """`(loss, data, sampling)` for the step: the same loss and the same law, for rows on many devices."""
    shares = shares_of(sampling)
    if shares is not None and shares != sharded.counts:
        raise ValueError(
            f"the sampling draws from shares of {shares} rows, but the devices hold {sharded.counts}: use "
            "stratified(b, data.counts)"
        )
    if sharded.weight is None:
        return loss, sharded.batch, sampling
    if sampling.batch_size is not None and shares is None:
        many = sampling.draw_many and _Placed(sampling.draw_many, sharded.counts)
        sampling = sampling._replace(draw=_Placed(sampling.draw, sharded.counts), draw_many=many)
    return Weighting(loss, sharded.n), Weighted(sharded.batch, sharded.weight), sampling
