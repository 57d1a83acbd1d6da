"""Rows spread over the devices of a mesh, with padding if they do not divide evenly."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad import losses, means, parallel
from jaxgrad.descent import checkpoint as saved
from jaxgrad.descent.in_memory import of_arrays
from jaxgrad.descent.job import Job
from jaxgrad.descent.objective import Objective
from jaxgrad.descent.placement import Placement, check
from jaxgrad.sampling import check_sizes
from jaxgrad.types import Params, Sampling


def on_mesh(job: Job, sharded: parallel.Sharded) -> Placement:
    """The placement of rows that are spread over the devices of a mesh."""
    check_sizes(job.sampling, sharded.n)
    objective, data, sampling = _over_devices(job, sharded)
    check(job, objective, data)
    losses.check_labels(job.objective.loss, job.params, sharded.batch, sharded.row)
    identity = (job.objective, data, partial(saved.rows_hash, sharded.batch, sharded.counts))
    return of_arrays(job, objective, sampling, data, sharded.n, sharded.mesh, identity)


def _over_devices(job: Job, sharded: parallel.Sharded) -> tuple[Objective, Any, Sampling]:
    own, sampling = job.objective, job.sampling
    if sharded.weight is None:
        _, data, sampling = parallel.on(sharded, own.loss, sampling)
        return own, data, sampling
    if own.plain:
        loss, data, sampling = parallel.on(sharded, own.loss, sampling)
        own = own._replace(loss=loss)
    else:
        if parallel.shares_of(sampling) is not None:
            raise ValueError(
                "shares of different sizes are weighted, example by example, which a loss with random, loss_state or "
                "has_aux is not known to allow: give rows that divide evenly over the devices, or distinct(b)"
            )
        _, data, sampling = parallel.on(sharded, own.loss, sampling)
        # Padding is never drawn, so batches need no weights.
        sampling = sampling._replace(take=_BareRows()) if sampling.batch_size is not None else sampling
        own = own._replace(loss=Gathered(own.loss, sharded.counts))
    if sampling.batch_size is not None:
        sampling = sampling._replace(n=sharded.n)
    if own.evaluate is not None:
        two = job.objective.of_two()
        doubt = "more" if two is None else means.doubt(two, job.params, sharded.batch, [sharded.n, len(data.weight)])
        wrapped = Gathered(own.evaluate, sharded.counts) if doubt else parallel.Weighting(own.evaluate, sharded.n)
        own = own._replace(evaluate=wrapped)
    return own, data, sampling


class _BareRows(NamedTuple):
    def __call__(self, data: Any, indices: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.at[indices].get(mode="promise_in_bounds"), data.batch)


@dataclass(frozen=True)
class Gathered:
    """A loss of any form on padded rows: it gets the rows without padding, in their order."""

    function: Any
    counts: tuple[int, ...]

    def __call__(self, params: Params, rows: Any, **given: Any) -> Any:
        if isinstance(rows, parallel.Weighted):
            most = max(self.counts)
            kept = np.concatenate([d * most + np.arange(count) for d, count in enumerate(self.counts)])
            rows = jax.tree.map(lambda leaf: leaf[kept], rows.batch)
        return self.function(params, rows, **given)
