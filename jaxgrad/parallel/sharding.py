"""Rows on the devices of a mesh: how they are spread, copied and collected."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgrad import checks
from jaxgrad.parallel.agreement import agree, from_all, together


class Sharded(NamedTuple):
    """Rows that lie on the devices of a mesh, made by `shard` or `shard_local`; `descend` takes it for data."""

    batch: Any
    """The batch's pytree; each leaf `[D m, ...]`: m rows on each of D devices, filled up where a device has fewer."""
    weight: Any
    """float32[D m]: 1, and 0 where a row only fills up; None where no row does."""
    counts: tuple[int, ...]
    """Rows of each device, in the order of the mesh, without what fills up."""
    mesh: Mesh

    @property
    def n(self) -> int:
        """How many rows there are."""
        return sum(self.counts)

    def row(self, place: int) -> int:
        """The number of the row at a place along the leaves of `batch`, among all rows in their order."""
        device, own = divmod(place, max(self.counts))
        return sum(self.counts[:device]) + min(own, self.counts[device] - 1)


class Weighted(NamedTuple):
    """Rows with weights: what `Weighting` makes a mean of."""

    batch: Any
    weight: Any


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes (or those given) as one axis `data`, in the order of their processes.

    The compiler places the collectives (`AxisType.Auto`): under JAX's newer default, `Explicit`, `x[indices]` fails.
    """
    found = jax.devices() if devices is None else devices
    plain = isinstance(found, list | tuple) or (isinstance(found, np.ndarray) and found.ndim == 1)
    if not plain or not len(found) or not all(isinstance(each, jax.Device) for each in found):
        raise TypeError(f"devices must be a list of devices, such as jax.devices()[:2]; got {checks.shown(devices)}")
    return Mesh(np.array(found), ("data",), axis_types=(AxisType.Auto,))


def shard(batch: Any, mesh: Mesh) -> Sharded:
    """Spread the rows of a batch over the mesh; every process gives the same batch, and holds only its own part.

    The leaves are host arrays; of a `np.memmap` only the rows of this process are read. Every device gets ⌊n/D⌋ or
    ⌈n/D⌉ rows, in order. Raises ValueError for fewer rows than devices, NaN or infinite entries, an Explicit mesh, or
    (naming the rank) for another batch than rank 0's.
    """
    check_mesh(mesh)
    batch = checks.batch("batch", batch, finite=False)
    n, D = jax.tree.leaves(batch)[0].shape[0], mesh.devices.size
    if n < D:
        raise ValueError(f"{n} rows cannot be spread over {D} devices: each needs one; use fewer processes or devices")
    counts = tuple(n // D + (d < n % D) for d in range(D))

    def look() -> None:
        for low, high in _mine(counts, mesh):
            try:
                checks.batch("batch", jax.tree.map(lambda leaf, part=slice(low, high): leaf[part], batch))
            except ValueError as error:
                raise ValueError(f"in rows {low:,} to {high - 1:,}, numbered from the first of them: {error}") from None

    together(look)
    agree(data=jax.tree.map(_compared, batch))
    return _laid(batch, 0, counts, mesh)


def shard_local(rows: Any, mesh: Mesh) -> Sharded:
    """Like `shard`, but each process gives rows of its own, as many as it has: the whole is never in one place.

    The order of all rows is that of the processes. Raises ValueError (naming the rank) where a process has fewer rows
    than devices, or columns or dtypes other than rank 0's.
    """
    check_mesh(mesh)
    here = [device.process_index for device in mesh.devices.flat]
    if here != sorted(here):
        raise ValueError("the mesh must list its devices in the order of their processes: use parallel.mesh()")

    def look() -> int:
        nonlocal rows
        rows = checks.batch("rows", rows)
        n = jax.tree.leaves(rows)[0].shape[0]
        if n < here.count(jax.process_index()):
            raise ValueError(f"rank {jax.process_index()} has {n} rows for more devices: each device needs one")
        return n

    n = together(look)
    agree(**{"columns or dtypes": jax.tree.map(lambda leaf: f"{leaf.shape[1:]} {leaf.dtype}", rows)})
    of_process = from_all(np.array([n]))[:, 0].tolist()
    counts: list[int] = []
    for process, n in enumerate(of_process):
        k = here.count(process)
        counts += [n // k + (d < n % k) for d in range(k)]
    return _laid(rows, sum(of_process[: jax.process_index()]), tuple(counts), mesh)


def _laid(rows: Any, first: int, counts: tuple[int, ...], mesh: Mesh) -> Sharded:
    """Rows on their devices; `rows` holds, from row `first` of all on, at least those of this process."""
    starts, most = np.concatenate([[0], np.cumsum(counts)]), max(counts)
    sharding = _rows_of(mesh)

    def lay(leaf: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            d = (index[0].start or 0) // most
            own = np.asarray(leaf[starts[d] - first : starts[d] - first + counts[d]])
            # Copies of a row, since what the loss makes of zeros might not be finite.
            return np.concatenate([own, np.repeat(own[-1:], most - counts[d], axis=0)]) if counts[d] < most else own

        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        shape = (most * len(counts), *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: part(index).astype(dtype, copy=False))

    weight = None
    if most * len(counts) > starts[-1]:
        real = np.arange(most)[None, :] < np.array(counts)[:, None]
        weight = jax.make_array_from_callback(
            (real.size,), sharding, lambda index: real.reshape(-1)[index].astype(np.float32)
        )
    return Sharded(jax.tree.map(lay, rows), weight, counts, mesh)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same on every device: host arrays, or arrays of this process, equal on all processes (`agree` tells)."""
    check_mesh(mesh)
    sharding = NamedSharding(mesh, PartitionSpec())

    def copy(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(copy, tree)


def gather(tree: Any) -> Any:
    """Numpy arrays of the whole, on every process: of a `Sharded`, its batch in the order of the rows."""
    if isinstance(tree, Sharded):
        most = max(tree.counts)
        kept = np.concatenate([d * most + np.arange(count) for d, count in enumerate(tree.counts)])
        return jax.tree.map(lambda leaf: gather(leaf)[kept], tree.batch)
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def mesh_of(data: Any) -> Mesh | None:
    """The mesh over which arrays are spread that lie on several devices; None for all others."""
    for leaf in jax.tree.leaves(data):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and isinstance(sharding.mesh, Mesh):
            check_mesh(sharding.mesh)
            return sharding.mesh
    return None


def check_mesh(mesh: Any) -> None:
    """Raise TypeError or ValueError unless `mesh` is one over which rows can be spread."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as parallel.mesh(); got {checks.shown(mesh)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "the axes of the mesh must be Auto, since rows are fetched by index: use parallel.mesh(), or "
            "jax.make_mesh(..., axis_types=(AxisType.Auto,))"
        )


def _rows_of(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _mine(counts: Sequence[int], mesh: Mesh) -> list[tuple[int, int]]:
    """First and last of the rows on each device of this process."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    here = (d for d, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index())
    return [(int(starts[d]), int(starts[d + 1])) for d in here]


def _compared(leaf: Any) -> Any:
    """What processes compare of an array: all of it; of a file that is mapped, its shape and evenly spaced rows."""
    if not isinstance(leaf, np.memmap):
        return leaf
    rows = np.unique(np.linspace(0, len(leaf) - 1, 4096).astype(np.int64))
    return (f"{leaf.shape} {leaf.dtype}", np.asarray(leaf[rows]))
