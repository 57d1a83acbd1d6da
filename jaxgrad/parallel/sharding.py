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
    """Rows on the devices of a mesh, made by `shard` or `shard_local`. `descend` accepts it as data."""

    batch: Any
    """The batch's pytree; each leaf `[D m, ...]`: m rows on each of D devices, padded if a device has fewer."""
    weight: Any
    """float32[D m]: 1 for a row, 0 for padding; None without padding."""
    counts: tuple[int, ...]
    """Rows of each device, in the order of the mesh, without padding."""
    mesh: Mesh

    @property
    def n(self) -> int:
        """How many rows there are."""
        return sum(self.counts)

    def row(self, place: int) -> int:
        """The number of the row at index `place` of the leaves of `batch`, counted over all rows in order."""
        device, own = divmod(place, max(self.counts))
        return sum(self.counts[:device]) + min(own, self.counts[device] - 1)


class Weighted(NamedTuple):
    """Rows with weights; `Weighting` takes their weighted mean."""

    batch: Any
    weight: Any


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes (or the given ones) as one axis `data`, in the order of their processes.

    The compiler places the collectives (`AxisType.Auto`): under JAX's newer default, `Explicit`, `x[indices]` fails.
    """
    found = jax.devices() if devices is None else devices
    plain = isinstance(found, list | tuple) or (isinstance(found, np.ndarray) and found.ndim == 1)
    if not plain or not len(found) or not all(isinstance(each, jax.Device) for each in found):
        raise TypeError(f"devices must be a list of devices, such as jax.devices()[:2]; got {checks.shown(devices)}")
    return Mesh(np.array(found), ("data",), axis_types=(AxisType.Auto,))


def shard(batch: Any, mesh: Mesh) -> Sharded:
    """Spread the rows of a batch over the mesh. Every process gives the same batch and holds only its own part.

    The leaves are host arrays; of a `np.memmap`, each process reads only its own rows. Every device gets ⌊n/D⌋ or
    ⌈n/D⌉ rows, in order. Raises ValueError for fewer rows than devices, NaN or infinite entries, an Explicit mesh, or
    (naming the rank) a batch that differs from rank 0's.
    """
    check_mesh(mesh)
    if hasattr(batch, "row_bytes"):  # `rows.Rows`, whose module uses this package
        raise TypeError(
            "batch is rows on disk, which serve one run on one device; to spread a table over devices give "
            "np.load(file, mmap_mode='r'): each process reads only its own rows of it"
        )
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
    """Like `shard`, but each process gives its own rows, of any number. No process ever holds all rows.

    All rows are ordered by process. Raises ValueError (naming the rank) if a process has fewer rows than devices, or
    if its columns or dtypes differ from rank 0's.
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
    """Lay the rows on their devices. `rows` begins with row `first` and holds at least the rows of this process."""
    starts, most = np.concatenate([[0], np.cumsum(counts)]), max(counts)
    sharding = _rows_of(mesh)

    def lay(leaf: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            d = (index[0].start or 0) // most
            own = np.asarray(leaf[starts[d] - first : starts[d] - first + counts[d]])
            # The padding is copies of a row: of zeros the loss might not be finite.
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
    """Copy a tree to every device: host arrays, or arrays of this process. They must be equal on all processes."""
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
    """Return whole numpy arrays on every process; for a `Sharded`, its batch in the order of the rows."""
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
    """The mesh of arrays that are spread over several devices; None for all other arrays."""
    for leaf in jax.tree.leaves(data):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and isinstance(sharding.mesh, Mesh):
            check_mesh(sharding.mesh)
            return sharding.mesh
    return None


def check_mesh(mesh: Any) -> None:
    """Raise TypeError or ValueError unless rows can be spread over `mesh`."""
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
    """For each device of this process, its first row and the row after its last."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    here = (d for d, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index())
    return [(int(starts[d]), int(starts[d + 1])) for d in here]


def _compared(leaf: Any) -> Any:
    """What processes compare: the whole array, or shape and evenly spaced rows of a mapped file."""
    if not isinstance(leaf, np.memmap):
        return leaf
    rows = np.unique(np.linspace(0, len(leaf) - 1, 4096).astype(np.int64))
    return (f"{leaf.shape} {leaf.dtype}", np.asarray(leaf[rows]))
