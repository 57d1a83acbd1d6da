"""Batch sizes by name, and runs over a grid of step sizes: of `gd_vs_sgd`, in memory and from disk, and its kin."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import parallel
from jaxgrad.descent import trajectory
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Loss, Params, Sampling


def sampling_of(b: int | None) -> Sampling:
    """`b` different examples a step; None is the full batch."""
    return full_batch() if b is None else distinct(b)


def label_of(b: int | None) -> str:
    """How a batch size is called in tables, figures and the names of numbers."""
    return "full batch" if b is None else f"b = {b}"


def size_of(label: str) -> int | None:
    """The batch size that is called so."""
    return None if label == "full batch" else int(label.removeprefix("b = "))


def finals(
    loss: Loss,
    start: Params,
    data: Any,
    sampling: Sampling,
    steps: int,
    keys: jax.Array,
    etas: np.ndarray,
    observe: Callable[[Params], Any] | None = None,
) -> Any:
    """What `steps` updates end with for each step size and key: the full loss, or `observe(params)`; `[e, s, …]`.

    All runs go in one program. `data` may lie on many devices (`parallel.shard`).
    """
    mesh = None
    if isinstance(data, parallel.Sharded):
        mesh = data.mesh
        loss, data, sampling = parallel.on(data, loss, sampling)

    @jax.jit
    def grid(etas: jax.Array, keys: jax.Array, data: Any) -> Any:
        def final(eta: Any, key: Any) -> Any:
            _, seen = trajectory(
                loss, start, data, optimizer=optax.sgd(eta), sampling=sampling, key=key, record=[steps], observe=observe
            )
            return jax.tree.map(lambda leaf: leaf[-1], seen)

        return jax.vmap(jax.vmap(final, (None, 0)), (0, None))(etas, keys)

    each = jnp.asarray(etas, jnp.float32), keys
    return jax.tree.map(np.asarray, grid(*(each if mesh is None else parallel.replicate(each, mesh)), data))
