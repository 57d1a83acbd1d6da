"""Rows that stay on disk: SGD and full gradients over more data than memory holds.

    rows = stream.open_rows("big.npy", target=-1)         # or a folder of .npy shards, in the order of their names
    descend(loss, params, rows, sampling=distinct(256), ...)   # the same call, the same numbers as from memory

Which examples a step sees is a pure function of key and step, so those of thousands of coming steps are known: while
the device takes the steps of one block, a thread fetches the rows of the next. It fetches them in the order of the
file, so that the disk is read forwards, once per block, and puts them in the order of the steps.

The full loss and its gradient are sums over row blocks, read ahead in the same way.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.types import Batch, Key, Loss, Params, Sampling

MEMORY = 0.5
"""GiB that the rows in flight may take, unless `open_rows` is told otherwise."""
_SEGMENT = 2**25
"""Bytes of a file that are mapped into memory at once."""
_PASS_BLOCK = 2**22
"""Bytes of a row block of a full pass: small enough for the caches, so that what was read is still there."""


class Shard(NamedTuple):
    """One `.npy` file of rows."""

    path: Path
    offset: int
    """Bytes before the first row."""
    rows: int


class Rows(NamedTuple):
    """All rows of a file or a folder of files, none of which is in memory."""

    shards: tuple[Shard, ...]
    dtype: np.dtype
    columns: int
    target: int | None
    """The column that is `y`; None: a batch is the rows as they are."""
    shift: tuple[float, ...] | None
    """Subtracted from each column on the device; None: nothing is."""
    scale: tuple[float, ...] | None
    """Each column is then divided by this."""
    memory: float
    """GiB for rows in flight."""
    full: Callable[[Params], Any] | None = None
    """The full loss as a function of the parameters, where something cheaper than a pass over all rows tells it
    (`moments`, for least squares): what is then recorded."""

    @property
    def n(self) -> int:
        """How many rows there are."""
        return sum(shard.rows for shard in self.shards)

    @property
    def row_bytes(self) -> int:
        return self.columns * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.n * self.row_bytes

    def as_batch(self, rows: Any) -> Any:
        """Rows `[m, columns]` as the loss sees them: `Batch(x[m, columns − 1], y[m])`, or as they are."""
        return _as_batch(rows, self.target, self.shift, self.scale)

    def scaled(self, shift: Any, scale: Any) -> "Rows":
        """These rows with `(column − shift)/scale` taken on the device."""
        return self._replace(shift=tuple(map(float, shift)), scale=tuple(map(float, scale)))


def open_rows(path: str | os.PathLike[str], *, target: int | None = None, memory: float = MEMORY) -> Rows:
    """Open one `.npy` table `[n, columns]` of floats, or a folder of them, in the order of their names.

    `target` is the number of the column to predict (negative counts from the end). Nothing but headers is read.

    Raises FileNotFoundError for no such file or no `.npy` in the folder; ValueError, naming the file, for one that is
    no npy file, cut off, not a table of float32 or float64 in C order, or that differs from the first in columns or
    dtype; and for a target that is not a column.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"the folder {path} holds no .npy file")
    _check_numbering(files)
    headers = [_header(file) for file in files]
    (first, dtype, columns) = headers[0]
    for shard, its_dtype, its_columns in headers:
        if its_columns != columns or its_dtype != dtype:
            raise ValueError(
                f"{shard.path.name} has {its_columns} columns of {its_dtype}, but {first.path.name} has {columns} of "
                f"{dtype}: all shards must be alike"
            )
    if target is not None and not -columns <= target < columns:
        raise ValueError(
            f"{first.path.name} has {columns} columns, so the target's number is from {-columns} to {columns - 1}; "
            f"got {target}"
        )
    if target is not None and columns < 2:
        raise ValueError(f"{first.path.name} has no column beside the target; a feature is needed")
    if not memory > 0:
        raise ValueError(f"memory must be a positive number of GiB; got {memory}")
    where = None if target is None else target % columns
    return Rows(tuple(shard for shard, _, _ in headers), dtype, columns, where, None, None, float(memory))


def _check_numbering(files: list[Path]) -> None:
    """Names that end in numbers count up by one; one that is missing is named."""
    digits = [file.stem[len(file.stem.rstrip("0123456789")) :] for file in files]
    stems = {file.stem.rstrip("0123456789") for file in files}
    if len(stems) != 1 or not all(digits) or len({len(number) for number in digits}) != 1:
        return
    present = {int(number) for number in digits}
    missing = sorted(set(range(min(present), max(present) + 1)) - present)
    if missing:
        name = f"{stems.pop()}{missing[0]:0{len(digits[0])}d}.npy"
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"the shard {name}{more} is missing in {files[0].parent}")


def _header(path: Path) -> tuple[Shard, np.dtype, int]:
    try:
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            shape, fortran, dtype = read[version](file)
            offset = file.tell()
            size = file.seek(0, os.SEEK_END)
    except (ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path.name} is damaged or not an npy file: {error}") from None
    if len(shape) != 2 or fortran or dtype not in (np.dtype("<f4"), np.dtype("<f8")) or 0 in shape:
        raise ValueError(
            f"{path.name} has shape {shape}, {dtype}{', Fortran order' if fortran else ''}; rows are read from a table "
            "[rows, columns] of float32 or float64 in C order (numpy's default)"
        )
    wanted = offset + shape[0] * shape[1] * dtype.itemsize
    if size != wanted:
        word = "cut off" if size < wanted else "longer than its header says"
        raise ValueError(f"{path.name} is {word}: {size:,} bytes where {shape[0]:,} rows need {wanted:,}")
    return Shard(path, offset, shape[0]), dtype, shape[1]


def _as_batch(rows: Any, target: int | None, shift: Any, scale: Any) -> Any:
    if shift is not None:
        rows = (rows - jnp.asarray(shift, rows.dtype)[None, :]) / jnp.asarray(scale, rows.dtype)[None, :]
    if target is None:
        return rows
    if target == 0 or target == rows.shape[1] - 1:
        x = rows[:, 1:] if target == 0 else rows[:, :-1]
    else:
        x = jnp.concatenate([rows[:, :target], rows[:, target + 1 :]], axis=1)
    return Batch(x, rows[:, target])


@dataclass(frozen=True)
class Streamed:
    """The loss of rows as they lie in the file."""

    loss: Loss
    target: int | None
    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None

    def __call__(self, params: Params, rows: Any) -> jax.Array:
        return self.loss(params, self.batch(rows))

    def batch(self, rows: Any) -> Any:
        """Rows as the loss sees them."""
        return _as_batch(rows, self.target, self.shift, self.scale)


def of_rows(loss: Loss, rows: Rows) -> Streamed:
    """`loss(params, batch)` as a function of raw rows."""
    return Streamed(loss, rows.target, rows.shift, rows.scale)


def example(rows: Rows, count: int = 1) -> np.ndarray:
    """The first rows: what the loss will see, for its shapes and dtypes."""
    return read(rows, 0, min(count, rows.n))


def tell(rows: Rows) -> str:
    """What tells these rows from others, without reading all: shape, dtype and 1,024 evenly spaced rows."""
    from jaxgrad.parallel import digest

    picked = pick(rows, np.unique(np.linspace(0, rows.n - 1, 1024).astype(np.int64)))
    return digest((f"{rows.n} {rows.target} {rows.shift} {rows.scale}", picked))


# --- reading ---------------------------------------------------------------------------------------------------


def read(rows: Rows, low: int, high: int) -> np.ndarray:
    """Rows `low` to `high` (exclusive), in order: `[high − low, columns]`."""
    out = np.empty((high - low, rows.columns), rows.dtype)
    at, start = 0, 0
    for shard in rows.shards:
        first, last = max(low - start, 0), min(high - start, shard.rows)
        if first < last:
            into = out[at : at + last - first].reshape(-1).view(np.uint8).data
            offset, done = shard.offset + first * rows.row_bytes, 0
            with open(shard.path, "rb", buffering=0) as file:
                while done < len(into):
                    got = os.preadv(file.fileno(), [into[done:]], offset + done)
                    if got == 0:
                        raise ValueError(f"{shard.path.name} was cut off while it was read")
                    done += got
            at += last - first
        start += shard.rows
    _check(out, low)
    return out


def pick(rows: Rows, indices: np.ndarray) -> np.ndarray:
    """The rows `indices`, in that order: fetched in the order of the file.

    A part of a file at a time is mapped, and let go, so that what was read does not stay in this process's memory.
    """
    wanted = np.asarray(indices).reshape(-1)
    # One sort of whole words, row and place together, is several times as fast as an argsort.
    both = (wanted.astype(np.uint64) << np.uint64(32)) | np.arange(len(wanted), dtype=np.uint64)
    both.sort()
    place = (both & np.uint64(2**32 - 1)).astype(np.uint32)
    row = (both >> np.uint64(32)).astype(np.uint32)
    del both
    # A row is moved as one item: several times as fast as an array of numbers.
    item = np.dtype((np.void, rows.row_bytes))
    out = np.empty(len(wanted), item)
    # Where a page of the file has a row or more of ours, reading it all through a buffer that stays in the cache is
    # faster than having its pages mapped; elsewhere only the pages that are needed are.
    dense = len(wanted) * mmap.PAGESIZE > rows.nbytes
    step, start = max(1, (_PASS_BLOCK // 4 if dense else _SEGMENT) // rows.row_bytes), 0
    for shard in rows.shards:
        # As words of the array's own dtype, else searchsorted would convert it each time.
        cuts = np.minimum(np.arange(0, shard.rows + step, step), shard.rows)
        ends = np.searchsorted(row, (start + cuts).astype(np.uint32))
        take = _from_buffer if dense else _from_map
        with open(shard.path, "rb", buffering=0) as file:
            for low, high, a, b in zip(cuts[:-1], cuts[1:], ends[:-1], ends[1:], strict=True):
                if a < b:
                    own = (row[a:b] - np.uint32(start + low)).astype(np.int64)
                    begin = shard.offset + int(low) * rows.row_bytes
                    out[place[a:b]] = take(file, begin, int(high - low), item, own)
        start += shard.rows
    found = out.view(rows.dtype).reshape(len(wanted), rows.columns)
    _check(found, None, wanted)
    return found


def _from_buffer(file: Any, begin: int, count: int, item: np.dtype, own: np.ndarray) -> np.ndarray:
    part = np.empty(count, item)
    if os.preadv(file.fileno(), [part.view(np.uint8).data], begin) < part.nbytes:
        raise ValueError(f"{Path(file.name).name} was cut off while it was read")
    return part.take(own)


def _from_map(file: Any, begin: int, count: int, item: np.dtype, own: np.ndarray) -> np.ndarray:
    aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
    length = begin - aligned + count * item.itemsize
    with mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=aligned) as mapped:
        part = np.frombuffer(mapped, item, count, begin - aligned)
        found = part.take(own)
        del part
    return found


def _check(values: np.ndarray, first: int | None, indices: np.ndarray | None = None) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(values.sum(dtype=values.dtype)):
            return
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = map(int, bad[0])
        at = int(indices[row]) if indices is not None else (first or 0) + row
        raise ValueError(
            f"row {at:,}, column {column} (counted from 0) is {values[row, column]}; every entry must be finite: "
            "drop those rows or fill them in"
        )


def _few(rows: Rows) -> Rows:
    """Rows so few that they are read at once, of which a full pass runs all programs of a full pass over `rows`."""
    size = max(1, _PASS_BLOCK // rows.row_bytes)
    few = min(rows.n, 2 * size + rows.n % size)
    shards, left = [], few
    for shard in rows.shards:
        shards.append(shard._replace(rows=min(shard.rows, left)))
        left -= shards[-1].rows
    return rows._replace(shards=tuple(shard for shard in shards if shard.rows))


def blocks(rows: Rows, size: int | None = None) -> Iterator[np.ndarray]:
    """All rows in blocks, in order; a thread reads the next while the caller has this one."""
    size = size or max(1, _PASS_BLOCK // rows.row_bytes)
    bounds = [(low, min(low + size, rows.n)) for low in range(0, rows.n, size)]
    with ThreadPoolExecutor(1) as pool:
        ahead: list[Future[np.ndarray]] = [pool.submit(read, rows, *bound) for bound in bounds[:2]]
        for bound in [*bounds[2:], None, None][: len(bounds)]:
            ready = ahead.pop(0).result()
            if bound is not None:
                ahead.append(pool.submit(read, rows, *bound))
            yield ready


class Reader:
    """The rows of blocks of steps, the next block always on its way."""

    def __init__(self, rows: Rows, sampling: Sampling, key: Key, last: int):
        b = sampling.batch_size or 1
        # A row is in the block of the device and in the next, its number twice in 64 bits while they are sorted.
        most = int(rows.memory * 2**30 / (2 * rows.row_bytes + 32))
        # Blocks of one size: another would be compiled anew.
        self.steps = -(-max(1, last) // -(-max(1, last) // max(1, most // b)))
        self._rows, self._sampling, self._key, self._last = rows, sampling, key, last
        self._pool = ThreadPoolExecutor(1)
        self._ready: dict[int, Future[np.ndarray]] = {}
        self._device: tuple[int, Any] = (-1, None)

    def block(self, number: int) -> Any:
        """The rows of steps `number · steps` on, `[steps · b, columns]`, on the device."""
        if self._device[0] != number:
            self._device = (-1, None)
            found = self._read(number).result()
            self._ready = {}
            self._device = (number, jax.block_until_ready(jnp.asarray(found)))
        if (number + 1) * self.steps < self._last:
            self._read(number + 1)
        return self._device[1]

    def _read(self, number: int) -> "Future[np.ndarray]":
        if number not in self._ready:
            self._ready[number] = self._pool.submit(self._fetch, number)
        return self._ready[number]

    def _fetch(self, number: int) -> np.ndarray:
        first = np.int32(number * self.steps)
        drawn = _indices(self._key, first, sampling=self._sampling, n=self._rows.n, count=self.steps)
        return pick(self._rows, np.asarray(drawn))

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


@partial(jax.jit, static_argnames=("sampling", "n", "count"))
def _indices(key: Key, first: Any, *, sampling: Sampling, n: int, count: int) -> jax.Array:
    steps = jnp.asarray(first, jnp.int32) + jnp.arange(count, dtype=jnp.int32)
    return jax.vmap(lambda t: sampling.indices(key, t, n))(steps)


class _InOrder(NamedTuple):
    """Step t sees the t-th b rows of its block."""

    steps: int

    def __call__(self, key: Key, step: Any, n: int, b: int) -> jax.Array:
        del key, n
        return (jnp.asarray(step, jnp.int32) % self.steps) * b + jnp.arange(b, dtype=jnp.int32)


class _Take(NamedTuple):
    """Rows of a block as the loss sees them: not for the loss to do, whose step then is the one of rows in memory."""

    loss: Streamed

    def __call__(self, rows: Any, indices: Any) -> Any:
        return self.loss.batch(rows.at[indices].get(mode="promise_in_bounds"))


def in_order(b: int, steps: int, loss: Streamed) -> Sampling:
    """Rows as they come: what the step sees when a block of steps was fetched for it."""
    return Sampling("in order", b, _InOrder(steps), take=_Take(loss))


# --- steps and full passes -------------------------------------------------------------------------------------


def programs(
    go: Callable[..., Any],
    look: Callable[..., Any],
    judge: Callable[..., Any],
    rows: Rows,
    sampling: Sampling,
    loss: Streamed,
    reader: Reader | None,
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """The three programs of `descend` (steps, record, stopping rule), for rows on disk; `loss` takes raw rows."""

    def sgd(state: Any, key: Key, data: Any, until: Any, *, halt: Any, **how: Any) -> Any:
        del data
        assert reader is not None
        assert sampling.batch_size is not None
        now, until = int(state.step), int(until)
        ordered = in_order(sampling.batch_size, reader.steps, loss)
        if now >= until:
            # Nothing to do but to compile. To fetch a block here would take it off the clock.
            nothing = jnp.zeros((reader.steps * sampling.batch_size, rows.columns), rows.dtype)
            return go(state, key, nothing, np.int32(until), loss=loss.loss, sampling=ordered, halt=halt, **how)
        while True:
            number = now // reader.steps
            now = min(until, (number + 1) * reader.steps)
            state = go(
                state, key, reader.block(number), np.int32(now), loss=loss.loss, sampling=ordered, halt=halt, **how
            )
            if now >= until or (halt is not None and bool(state.halted)):
                return state

    def gd(state: Any, key: Key, data: Any, until: Any, *, halt: Any, **how: Any) -> Any:
        del data
        if int(state.step) >= int(until):
            value_and_gradient(loss, state.params, _few(rows))  # nothing to do but to compile
        for now in range(int(state.step), int(until)):
            _, gradient = value_and_gradient(loss, state.params, rows)
            slope = jax.tree.map(lambda leaf: leaf[None], gradient)
            # The gradient of ⟨g, w⟩ is g: the same compiled step, with a gradient that is known.
            state = go(state, key, slope, np.int32(now + 1), loss=_along, halt=halt, **how)
            if halt is not None and bool(state.halted):
                break
        return state

    def recorded(params: Params, update: Params, data: Any) -> Any:
        _, norm, seen = look(params, update, data)
        return (value(loss, params, rows) if rows.full is None else rows.full(params)), norm, seen

    def judged(params: Params, data: Any) -> Any:
        if judge.keywords["metric"] is not None:  # type: ignore[attr-defined]
            return judge(params, data)
        gradient = jax.tree.leaves(value_and_gradient(loss, params, rows)[1])
        return np.sqrt(sum(float(jnp.sum(leaf.astype(jnp.float32) ** 2)) for leaf in gradient))

    return (gd if sampling.batch_size is None else sgd), recorded, judged


def _along(params: Params, gradient: Any) -> jax.Array:
    parts = jax.tree.map(lambda w, g: jnp.sum(w * jax.lax.stop_gradient(g[0])), params, gradient)
    return sum(jax.tree.leaves(parts), start=jnp.zeros(()))


def value_and_gradient(loss: Loss, params: Params, rows: Rows) -> tuple[jax.Array, Params]:
    """The full loss `Σ (m_j/n) L(w; block j)` and its gradient, in one pass over the rows; `loss` takes raw rows."""
    return _sum(partial(_add_both, loss=loss), params, rows)


def value(loss: Loss, params: Params, rows: Rows) -> jax.Array:
    """The full loss, in one pass over the rows; `loss` takes raw rows."""
    return _sum(partial(_add_value, loss=loss), params, rows)


def _sum(add: Callable[..., Any], params: Params, rows: Rows) -> Any:
    total = None
    for block in blocks(rows):
        total = add(total, params, block, np.float64(len(block) / rows.n))
    return total


@partial(jax.jit, static_argnames=("loss",))
def _add_both(total: Any, params: Params, block: Any, share: Any, *, loss: Loss) -> Any:
    return _add(total, jax.value_and_grad(loss)(params, block), share)


@partial(jax.jit, static_argnames=("loss",))
def _add_value(total: Any, params: Params, block: Any, share: Any, *, loss: Loss) -> Any:
    return _add(total, loss(params, block), share)


def _add(total: Any, own: Any, share: Any) -> Any:
    own = jax.tree.map(lambda part: part * share.astype(part.dtype), own)
    return own if total is None else jax.tree.map(jnp.add, total, own)


class Moments(NamedTuple):
    """Mean and covariance of the columns of a file, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    """`Σ (row − mean)(row − mean)ᵀ / n`."""


def moments(rows: Rows) -> Moments:
    """Mean and covariance of the raw columns, in one pass: of deviations from the first block's mean."""
    origin, total, second = None, np.zeros(rows.columns), np.zeros((rows.columns, rows.columns))
    for block in blocks(rows):
        wide = block.astype(np.float64)
        origin = wide.mean(axis=0) if origin is None else origin
        wide -= origin
        total += wide.sum(axis=0)
        second += wide.T @ wide
    assert origin is not None
    shift = total / rows.n
    return Moments(origin + shift, second / rows.n - np.outer(shift, shift))
