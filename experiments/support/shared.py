"""What several studies share: names of batch sizes, runs over step sizes and keys, and words for seconds."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import losses, models, parallel
from jaxgrad.descent import trajectory
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Batch, Loss, Params, Sampling


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


@partial(jax.jit, static_argnames=("sampling",))
def runs_of(keys: Any, eta: Any, batch: Batch, record: Any, start: Any, *, sampling: Sampling) -> jax.Array:
    """Coefficients `[run, checkpoint, p]`: one program per sampling, for any step size and checkpoints."""

    loss = losses.mean_loss(models.linear, losses.squared)

    def one(key: Any) -> Any:
        return trajectory(
            loss,
            start,
            batch,
            optimizer=optax.sgd(eta),
            sampling=sampling,
            key=key,
            record=record,
            observe=lambda params: jnp.append(params.w, params.b),
        )[1]

    return jax.vmap(one)(keys)


def first_at_most(excess: np.ndarray, axis: np.ndarray, target: float) -> np.ndarray:
    """Per run, where on `axis` the excess first is at most `target`; infinite where it never is."""
    met = excess <= target
    return np.where(met.any(axis=1), axis[np.argmax(met, axis=1)], np.inf)


def brief(seconds: float, never: str) -> str:
    """Seconds of any size in one number, for tables of measurements: 473 µs, 15.4 ms, 2 s; `never` for infinity."""
    if not np.isfinite(seconds):
        return never
    scale, unit = (1, "s") if seconds >= 1 else (1e3, "ms") if seconds >= 1e-3 else (1e6, "µs")
    return f"{seconds * scale:.3g} {unit}"
