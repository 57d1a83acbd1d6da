"""Many runs in one program, in tiles that fit memory.

Runs `[m, s]` (m step sizes, s seeds), or `[m]` or `[s]`, go side by side through one compiled program. Its memory
beside the data grows with the runs: 20 step sizes and 1,000 seeds have 20,000 batches at once, and for the full loss
20,000 predictions of all n examples. So the runs are cut into tiles: one axis after the other, into as few equal parts
as fit. All tiles have one shape, and one program serves them. The last tile of an axis begins earlier, to be whole,
and computes some runs again.

The seeds are cut first, and not below two. Each seed has its own batch and so its own product: on a CPU, no bit of a
run depends on the number of seeds beside it, as long as there is another. Runs that share a batch share one wide
product, and its rounding may depend on its width. So runs agree to rounding only, if step sizes are cut too or every
run has the full batch.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import checks

MEMORY = 1.0
"""GiB that a program of many runs may take beside the data; the default of `descend`. It is not a share of the free
memory: then the same call would be cut differently on another day."""


def in_tiles(
    program: Any, shape: tuple[int, ...], axes: Sequence[tuple[int, ...]], memory: float
) -> Callable[..., Any]:
    """`program` for runs of `shape`, called with the arguments of all runs; it runs in tiles of up to `memory` GiB.

    `program` is a `partial` of a compiled function (`jax.jit`), with keywords. `axes[i]` are the leading axes of runs
    of argument i: none for the data. A scalar leaf is shared by all runs.

    The result of several tiles is in the host's memory (numpy); that of one tile stays on the device.
    """
    chosen: dict[Any, tuple[int, ...]] = {}

    def call(*args: Any, **static: Any) -> Any:
        which = tuple(static.items())
        if which not in chosen:
            needed = _bytes_of_runs(program, args, axes, static)
            runs = math.prod(shape)
            chosen[which] = shape if needed <= memory * 2**30 else tile_of(shape, int(runs * memory * 2**30 / needed))
        tile = chosen[which]
        if tile == shape:
            return program(*args, **static)
        whole, found = None, None
        for place in places(shape, tile):
            own = [_cut(arg, place, ahead) for arg, ahead in zip(args, axes, strict=True)]
            found = program(*own, **static)
            part = jax.tree.map(_on_host, found)
            whole = jax.tree.map(partial(_room, shape), part) if whole is None else whole
            jax.tree.map(lambda all, some, place=place: all.__setitem__(place if all.ndim else (), some), whole, part)
        return jax.tree.map(_as_it_was, whole, found)

    return call


def tile_of(shape: tuple[int, ...], fit: int) -> tuple[int, ...]:
    """The shape of a tile of up to `fit` runs, with at least two along an axis. The last axis is cut first, evenly."""
    if (fit := checks.integer("fit", fit)) < 0:
        raise ValueError(f"fit must be at least 0, got {fit}")
    tile = list(checks.counts("shape", shape))
    for axis in reversed(range(len(shape))):
        others = math.prod(tile) // tile[axis]
        most = min(shape[axis], max(2, fit // others))
        tile[axis] = -(-shape[axis] // -(-shape[axis] // most))
    return tuple(tile)


def places(shape: tuple[int, ...], tile: tuple[int, ...]) -> list[tuple[slice, ...]]:
    """The places of whole tiles that together cover all runs."""
    starts = [[min(at, n - own) for at in range(0, n, own)] for n, own in zip(shape, tile, strict=True)]
    return [
        tuple(slice(at, at + own) for at, own in zip(corner, tile, strict=True))
        for corner in itertools.product(*starts)
    ]


def _cut(tree: Any, place: tuple[slice, ...], axes: tuple[int, ...]) -> Any:
    if not axes:
        return tree
    own = tuple(place[axis] for axis in axes)
    return jax.tree.map(lambda leaf: leaf[own] if np.ndim(leaf) else leaf, tree)


def _nbytes(leaf: Any) -> int:
    return (jax.random.key_data(leaf) if _is_key(leaf) else leaf).nbytes


def _on_host(leaf: Any) -> np.ndarray:
    """The leaf as a NumPy array; random keys as their words."""
    return np.asarray(jax.random.key_data(leaf) if _is_key(leaf) else leaf)


def _as_it_was(leaf: np.ndarray, like: Any) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(leaf), impl=jax.random.key_impl(like)) if _is_key(like) else leaf


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _room(shape: tuple[int, ...], part: np.ndarray) -> np.ndarray:
    """An empty array for all runs, for values like `part` of a tile."""
    return np.empty((*shape, *part.shape[len(shape) :]) if part.ndim else (), part.dtype)


def _bytes_of_runs(program: Any, args: Any, axes: Any, static: Any) -> int:
    """The memory of the compiled program for all runs together: arguments, results and intermediate values.

    The program is compiled for all runs, and not run here. If they fit, this is the program that runs.
    """
    compiled = program.func.lower(*args, **program.keywords, **static).compile()
    usage = compiled.memory_analysis()
    if usage is None:  # a backend that does not say
        return 0
    given = [leaf for arg, ahead in zip(args, axes, strict=True) if ahead for leaf in jax.tree.leaves(arg)]
    return usage.temp_size_in_bytes + usage.output_size_in_bytes + sum(map(_nbytes, given))
