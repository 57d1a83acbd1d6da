"""Rows that stay on disk: SGD and full gradients over more data than memory holds.

    rows = stream.open_rows("big.npy", target=-1)         # or a folder of .npy shards, in the order of their names
    descend(loss, params, rows, sampling=distinct(256), ...)   # the same call, the same numbers as from memory

Which examples a step sees is a pure function of key and step, so those of thousands of coming steps are known: while
the device takes the steps of one block, a thread fetches the rows of the next. It takes one part of the file after the
other, so that the disk is read forwards, once per block, and puts the rows in the order of the steps.

The full loss and its gradient are sums over such parts: threads take one each, and the sums are added in order.

A part is mapped, not copied, and let go: what was read stays in the system's cache, not in this process's memory.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import blocks, checks, files, means
from jaxgrad.checks import File, Positive, Whole, checked
from jaxgrad.parallel import digest
from jaxgrad.types import Batch, Key, Loss, Params, Sampling

MEMORY = 0.5
"""GiB that the rows in flight may take, unless `open_rows` is told otherwise."""
_PART = 2**26
"""Bytes of a file that are mapped at once: not far from what the last cache holds, for rows are taken in any order."""
_BLOCK = 2**18
"""Bytes of rows that a full pass evaluates at once on a CPU: with what is made of them they fit the cache of a core."""
_LANES = max(2, min(8, os.cpu_count() or 2))
"""Threads of a full pass: one reads while another computes, and each computes on a core of its own."""


_DTYPES = tuple(map(np.dtype, ("<f4", "<f8", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4")))


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
    classes: int | None = None
    """How many classes the target numbers: `y` is then int32. None: it is a number like the others."""

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
        return of_rows(None, self).batch(rows)

    def scaled(self, shift: Any, scale: Any) -> "Rows":
        """These rows with `(column − shift)/scale` taken on the device; class numbers stay what they are."""
        given = checks.array("shift", shift, "columns"), checks.array("scale", scale, "columns")
        if any(each.shape != (self.columns,) for each in given) or (given[1] <= 0).any():
            raise ValueError(
                f"shift and scale must be one number for each of {self.columns} columns, each scale positive; got "
                f"shapes {given[0].shape} and {given[1].shape}, least scale {given[1].min(initial=np.inf):g}"
            )
        shift, scale = (each.tolist() for each in given)
        if self.classes is not None and self.target is not None:
            shift[self.target], scale[self.target] = 0.0, 1.0
        return self._replace(shift=tuple(shift), scale=tuple(scale))


@checked
def open_rows(
    path: File, *, target: Whole | None = None, classes: Whole | None = None, memory: Positive = MEMORY
) -> Rows:
    """Open one `.npy` table `[n, columns]` of numbers, or a folder of them, in the order of their names.

    Whole numbers (bytes of pixels) reach the loss as they are, as from memory; `scaled` makes float32 of them.

    `target` is the number of the column to predict (negative counts from the end). With `classes` it holds class
    numbers, 0 to `classes − 1`, as floats like its neighbours, and the loss sees them as int32; each is checked when
    it is read. (0/1 labels of `losses.logloss` need no `classes`.) Nothing but headers is read here.

    Raises FileNotFoundError for no such file or no `.npy` in the folder; ValueError, naming the file, for one that is
    no npy file, cut off, not a table of float32, float64 or whole numbers in C order, or that differs from the first
    in columns or dtype; for a target that is not a column; and for classes that are fewer than two or have no target.
    """
    with files.explained("the rows cannot be opened", path):
        if not path.exists() and not path.is_symlink():
            raise FileNotFoundError(f"there is no file or folder {path}")
        parts = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        if not parts:
            raise FileNotFoundError(f"the folder {path} holds no .npy file")
        _check_numbering(parts)
        headers = [_header(part) for part in parts]
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
    if classes is not None and (target is None or classes < 2):
        raise ValueError(f"classes needs a target and is at least 2; got classes={classes}, target={target}")
    where = None if target is None else target % columns
    return Rows(
        tuple(shard for shard, _, _ in headers), dtype, columns, where, None, None, float(memory), None, classes
    )


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
    except OSError:
        raise
    except Exception as error:  # damaged bytes make NumPy raise anything
        raise ValueError(f"{path.name} is damaged or not an npy file: {error}") from None
    if len(shape) != 2 or fortran or dtype not in _DTYPES or 0 in shape:
        wide = (
            ". Save whole numbers as int32: table.astype(np.int32)"
            if dtype.kind in "iu" and dtype.itemsize == 8
            else ""
        )
        raise ValueError(
            f"{path.name} has shape {shape}, {dtype}{', Fortran order' if fortran else ''}; rows are read from a table "
            "[rows, columns] of float32 or float64, or of whole numbers of up to 32 bits (bytes of pixels), in C order "
            f"(numpy's default){wide}"
        )
    wanted = offset + shape[0] * shape[1] * dtype.itemsize
    if size != wanted:
        word = "cut off" if size < wanted else "longer than its header says"
        raise ValueError(f"{path.name} is {word}: {size:,} bytes where {shape[0]:,} rows need {wanted:,}")
    return Shard(path, offset, shape[0]), dtype, shape[1]


@dataclass(frozen=True)
class Streamed:
    """The loss of rows as they lie in the file."""

    loss: Any
    target: int | None
    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None
    classes: int | None

    def __call__(self, params: Params, rows: Any) -> jax.Array:
        return self.loss(params, self.batch(rows))

    def batch(self, rows: Any) -> Any:
        """Rows as the loss sees them."""
        target = self.target
        if self.shift is not None:
            rows = rows if jnp.issubdtype(rows.dtype, jnp.floating) else rows.astype(jnp.float32)
            rows = (rows - jnp.asarray(self.shift, rows.dtype)[None, :]) / jnp.asarray(self.scale, rows.dtype)[None, :]
        if target is None:
            return rows
        if target == 0 or target == rows.shape[1] - 1:
            x = rows[:, 1:] if target == 0 else rows[:, :-1]
        else:
            x = jnp.concatenate([rows[:, :target], rows[:, target + 1 :]], axis=1)
        y = rows[:, target]
        return Batch(x, y if self.classes is None else y.astype(jnp.int32))


def of_rows(loss: Loss | None, rows: Rows) -> Streamed:
    """`loss(params, batch)` as a function of raw rows."""
    return Streamed(loss, rows.target, rows.shift, rows.scale, rows.classes)


def example(rows: Rows, count: int = 1) -> np.ndarray:
    """The first rows: what the loss will see, for its shapes and dtypes."""
    return read(rows, 0, min(count, rows.n))


def tell(rows: Rows) -> str:
    """What tells these rows from others, without reading all: shape, dtype and 1,024 evenly spaced rows."""
    picked = pick(rows, np.unique(np.linspace(0, rows.n - 1, 1024).astype(np.int64)))
    labels = "" if rows.classes is None else f" {rows.classes}"
    return digest((f"{rows.n} {rows.target} {rows.shift} {rows.scale}{labels}", picked))


# --- reading ---------------------------------------------------------------------------------------------------


def read(rows: Rows, low: int, high: int) -> np.ndarray:
    """Rows `low` to `high` (exclusive), in order: `[high − low, columns]`."""
    out = np.empty((high - low, rows.columns), rows.dtype)
    for shard, first, last, start in _pieces(rows, low, high):
        into = out[start + first - low : start + last - low].reshape(-1).view(np.uint8).data
        offset, done = shard.offset + first * rows.row_bytes, 0
        with open(shard.path, "rb", buffering=0) as file:
            while done < len(into):
                got = os.preadv(file.fileno(), [into[done:]], offset + done)
                if got == 0:
                    raise ValueError(f"{shard.path.name} was cut off while it was read")
                done += got
    _check(rows, out, low)
    return out


def pick(rows: Rows, indices: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """The rows `indices`, in that order: fetched one part of the file after the other (to the bytes `into`)."""
    wanted = np.asarray(indices).reshape(-1)
    step = _part_rows(rows, _PART)
    count = -(-rows.n // step)
    # Small numbers, so that the stable sort is a radix sort: several times as fast as sorting the rows themselves.
    part = (wanted // wanted.dtype.type(step)).astype(np.min_scalar_type(count))
    order = np.argsort(part, kind="stable")
    ends = np.cumsum(np.bincount(part, minlength=count)).tolist()
    del part
    # Where a page of the file has a row or more of ours, all of a part is needed, and the order within it is free.
    dense = len(wanted) * mmap.PAGESIZE > rows.nbytes
    # A row is moved as one item: several times as fast as an array of numbers.
    out = (_aligned(len(wanted) * rows.row_bytes) if into is None else into).view(np.dtype((np.void, rows.row_bytes)))
    begin = 0
    for low, end in zip(range(0, rows.n, step), ends, strict=True):
        place = order[begin:end]
        begin = end
        if len(place):
            own = wanted[place]
            pieces = _pieces(rows, low, min(low + step, rows.n))
            if len(pieces) > 1 or not dense:
                forwards = np.argsort(own)
                place, own = place[forwards], own[forwards]
            at = 0
            for shard, first, last, start in pieces:
                to = len(own) if len(pieces) == 1 else int(np.searchsorted(own, start + last))
                if at < to:
                    lying = _mapped(shard, rows, first, last, ahead=dense).view(out.dtype)[:, 0]
                    out[place[at:to]] = lying.take(own[at:to] - (start + first))
                at = to
    found = out.view(rows.dtype).reshape(len(wanted), rows.columns)
    _check(rows, found, wanted)
    return found


def _part_rows(rows: Rows, size: int) -> int:
    """Rows of a part of so many bytes: a multiple of 64, so that JAX takes each part as it lies."""
    return max(64, size // rows.row_bytes // 64 * 64)


def _pieces(rows: Rows, low: int, high: int) -> list[tuple[Shard, int, int, int]]:
    """Where rows `low` to `high` lie: shards, their rows from and to, and the number of their first row."""
    found, start = [], 0
    for shard in rows.shards:
        first, last = max(low - start, 0), min(high - start, shard.rows)
        if first < last:
            found.append((shard, first, last, start))
        start += shard.rows
    return found


def _mapped(shard: Shard, rows: Rows, first: int, last: int, ahead: bool) -> np.ndarray:
    """Rows `first` to `last` of a shard as they lie in the file, which is mapped until the array is gone.

    `ahead` asks for all of them to be read at once.
    """
    begin = shard.offset + first * rows.row_bytes
    aligned = begin - begin % mmap.ALLOCATIONGRANULARITY
    count = (last - first) * rows.columns
    with shard.path.open("rb", buffering=0) as file:
        try:
            length = begin - aligned + count * rows.dtype.itemsize
            mapped = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=aligned)
        except ValueError:
            raise ValueError(f"{shard.path.name} was cut off while it was read") from None
    if ahead and hasattr(mapped, "madvise"):
        mapped.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(mapped, rows.dtype, count, begin - aligned).reshape(-1, rows.columns)


def _aligned(size: int) -> np.ndarray:
    """So many bytes, at an address from which JAX takes an array without a copy."""
    room = np.empty(size + 64, np.uint8)
    skip = -room.ctypes.data % 64
    return room[skip : skip + size]


def _check(rows: Rows, values: np.ndarray, numbers: int | np.ndarray) -> None:
    """Raise for an entry that is not finite or no class number; `numbers` of the rows, or of the first of them."""

    def where(row: int, column: int) -> str:
        at = int(numbers[row]) if isinstance(numbers, np.ndarray) else numbers + row
        return f"row {at:,}, column {column} (counted from 0) is {values[row, column]}"

    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(values.sum(dtype=values.dtype))
    if not finite and len(bad := np.argwhere(~np.isfinite(values))):
        row, column = map(int, bad[0])
        raise ValueError(f"{where(row, column)}; every entry must be finite: drop those rows or fill them in")
    if rows.classes is not None and rows.target is not None:
        bad = _no_class(values[:, rows.target], rows.classes)
        if bad.any():
            raise ValueError(
                f"{where(int(np.argmax(bad)), rows.target)}; a class is a whole number from 0 to {rows.classes - 1}"
            )


def _no_class(labels: Any, classes: int) -> Any:
    return (labels < 0) | (labels >= classes) | (labels % 1 != 0)


def few(rows: Rows) -> Rows:
    """Rows so few that they are read at once, of which a full pass runs all programs of a full pass over `rows`."""
    size = _part_rows(rows, _PART)
    few = min(rows.n, size + rows.n % size)
    shards, left = [], few
    for shard in rows.shards:
        shards.append(shard._replace(rows=min(shard.rows, left)))
        left -= shards[-1].rows
    return rows._replace(shards=tuple(shard for shard in shards if shard.rows))


def _bounds(rows: Rows, size: int) -> list[tuple[int, int]]:
    """The rows from and to of all parts of so many bytes."""
    step = _part_rows(rows, size)
    return [(low, min(low + step, rows.n)) for low in range(0, rows.n, step)]


def _ahead(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """`work(item)` of each item, in order; threads do the next while the caller has this one."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Reader:
    """The rows of blocks of steps, the next block always on its way; `close` it, or its thread reads on."""

    def __init__(self, rows: Rows, sampling: Sampling, key: Key, last: int):
        b = sampling.batch_size or 1
        # A row is in the block of the device and in the next; 32 bytes while its number is drawn and sorted.
        most = int(rows.memory * 2**30 / (2 * rows.row_bytes + 32))
        # Blocks of one size: another would be compiled anew.
        self.steps = -(-max(1, last) // -(-max(1, last) // max(1, most // b)))
        self._rows, self._sampling, self._key, self._last = rows, sampling, key, last
        self._pool = ThreadPoolExecutor(1)
        # Even blocks lie in one of these and odd ones in the other. New memory would cost more than to fill it.
        self._buffers = [_aligned(self.steps * b * rows.row_bytes) for _ in range(2)]
        self._ready: dict[int, Future[np.ndarray]] = {}
        self._device: tuple[int, Any] = (-1, None)

    def block(self, number: int) -> Any:
        """The rows of steps `number · steps` on, `[steps · b, columns]`, on the device.

        Steps that use the block before must be over: what comes after this one is fetched to its place.
        """
        if self._device[0] != number:
            self._device = (-1, None)
            found = self._read(number).result()
            self._ready = {}
            # On a CPU this is no copy; `jnp.asarray` makes one.
            self._device = (number, jax.block_until_ready(jax.device_put(found)))
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
        return pick(self._rows, np.asarray(drawn), self._buffers[number % 2])

    def close(self) -> None:
        """End the thread, let go of the files and the memory. What is being fetched is waited for: nothing reads on
        beside what the caller does, and perhaps times, next."""
        self._pool.shutdown(cancel_futures=True)
        self._ready, self._device, self._buffers = {}, (-1, None), []


@partial(jax.jit, static_argnames=("sampling", "n", "count"))
def _indices(key: Key, first: Any, *, sampling: Sampling, n: int, count: int) -> jax.Array:
    return sampling.ahead(key, jnp.asarray(first, jnp.int32), count, n)


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


# --- full passes -------------------------------------------------------------------------------------


def along(params: Params, gradient: Any) -> jax.Array:
    """`⟨g, w⟩`, whose gradient is g: a loss for a step whose gradient is known; leaves of g `[1, …]`."""
    parts = jax.tree.map(lambda w, g: jnp.sum(w * jax.lax.stop_gradient(g[0])), params, gradient)
    return sum(jax.tree.leaves(parts), start=jnp.zeros(()))


def along_from(params: Params, known: Any) -> jax.Array:
    """`v + ⟨g, w − w₀⟩` for known `(g, w₀, v)`: also the value is known, at w₀."""
    gradient, start, value = known
    parts = jax.tree.map(lambda w, w0, g: jnp.sum((w - w0[0]) * g[0]), params, start, gradient)
    return sum(jax.tree.leaves(parts), start=jnp.asarray(value[0]))


def gradient(loss: Streamed, params: Params, rows: Rows) -> Params:
    """The full gradient `Σ (m_j/n) ∇L(w; part j)`, in one pass over the rows."""
    return _sum(partial(_part, function=jax.grad, loss=loss), params, rows)


def value(loss: Streamed, params: Params, rows: Rows) -> jax.Array:
    """The full loss `Σ (m_j/n) L(w; part j)`, in one pass over the rows."""
    return _sum(partial(_part, function=_itself, loss=loss), params, rows)


def check_mean(loss: Loss, params: Params, rows: Rows) -> None:
    """Raise ValueError unless the loss is known to be a mean over the examples: a full pass evaluates it in blocks."""
    dtype = jax.dtypes.canonicalize_dtype(rows.dtype)
    counts = {high - low for low, high in _bounds(rows, _PART)}
    sizes = {size for count in counts for size in blocks.sizes(count, _block_rows(count, rows.columns, dtype))}
    batch = jax.eval_shape(of_rows(loss, rows).batch, example(rows))
    if found := means.doubt(loss, params, batch, [rows.n, *sizes]):
        raise ValueError(
            "the rows lie on disk, so the full loss is evaluated in blocks of them, which needs a loss that is a mean "
            f"over the examples; of this one it is not known: {found}. {means.HOW}, or load the rows into memory"
        )


def _itself(loss: Loss) -> Loss:
    return loss


def _sum(evaluate: Callable[..., Any], params: Params, rows: Rows) -> Any:
    def of_part(bounds: tuple[int, int]) -> Any:
        pieces = _pieces(rows, *bounds)
        whole = len(pieces) == 1
        part = _mapped(*pieces[0][:1], rows, *pieces[0][1:3], ahead=True) if whole else read(rows, *bounds)
        found, bad = jax.block_until_ready(evaluate(params, part))
        if bad:
            _check(rows, np.array(part), bounds[0])
        return found

    total = None
    bounds = _bounds(rows, _PART)
    for (low, high), own in zip(bounds, _ahead(of_part, bounds, _LANES), strict=True):
        total = _add(total, own, np.float64((high - low) / rows.n))
    return total


@partial(jax.jit, static_argnames=("function", "loss"))
def _part(params: Params, part: Any, *, function: Callable[[Loss], Any], loss: Streamed) -> Any:
    """`function(loss)` of the rows of a part, and whether any entry is not what it must be (not 0)."""

    def of_block(params: Params, block: Any) -> Any:
        bad = jnp.any(~jnp.isfinite(block))
        if loss.classes is not None:
            bad |= jnp.any(_no_class(block[:, loss.target], loss.classes))
        flag = block.dtype if jnp.issubdtype(block.dtype, jnp.floating) else jnp.float32
        return function(loss.loss)(params, _by_columns(loss, params, block)), bad.astype(flag)

    return blocks.mean(of_block, _block_rows(part.shape[0], part.shape[1], part.dtype))(params, part)


def _block_rows(count: int, columns: int, dtype: Any) -> int:
    """How many of `count` rows are evaluated at once."""
    if jax.default_backend() != "cpu":
        return count
    return min(count, max(256, _BLOCK // (columns * np.dtype(dtype).itemsize)))


def _by_columns(loss: Streamed, params: Params, block: Any) -> Any:
    """Rows as the loss sees them; laid out by columns where it only multiplies x by matrices.

    XLA then multiplies whole vectors: with eight columns in half the time. Other operations would be slower.
    """
    batch = loss.batch(block)
    if not isinstance(batch, Batch):
        return batch
    traced = jax.make_jaxpr(loss.loss)(params, batch).jaxpr
    x = traced.invars[-2]
    uses = {equation.primitive.name for equation in traced.eqns if any(x is given for given in equation.invars)}
    if uses != {"dot_general"}:
        return batch
    columns, y = jax.lax.optimization_barrier((batch.x.T, batch.y))
    return Batch(columns.T, y)


@jax.jit
def _add(total: Any, own: Any, share: Any) -> Any:
    own = jax.tree.map(lambda part: part * share.astype(part.dtype), own)
    return own if total is None else jax.tree.map(jnp.add, total, own)


class Moments(NamedTuple):
    """Mean and covariance of the columns of a file, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    """`Σ (row − mean)(row − mean)ᵀ / n`."""


@checked
def moments(rows: Rows) -> Moments:
    """Mean and covariance of the raw columns, in one pass: of deviations from the first rows' mean."""
    origin = example(rows, 1000).mean(axis=0, dtype=np.float64)

    def of_part(bounds: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        wide = read(rows, *bounds) - origin
        return wide.sum(axis=0), wide.T @ wide

    total, second = np.zeros(rows.columns), np.zeros((rows.columns, rows.columns))
    for own_total, own_second in _ahead(of_part, _bounds(rows, _PART // 8), _LANES):
        total += own_total
        second += own_second
    shift = total / rows.n
    return Moments(origin + shift, second / rows.n - np.outer(shift, shift))
