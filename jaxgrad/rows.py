"""Files of rows: opened, checked, and read a part at a time.

    rows = open_rows("big.npy", target=-1)         # or a folder of .npy shards, in the order of their names
    descend(loss, params, rows, sampling=distinct(256), ...)   # the same call, the same numbers as from memory

Parts of a file are mapped, not copied, and released: what was read stays in the system's cache, not in the memory of
this process.
"""

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgrad import checks, files
from jaxgrad.checks import File, Positive, Whole, checked
from jaxgrad.parallel import digest
from jaxgrad.types import Batch, Params

MEMORY = 0.5
"""GiB that fetched rows may take; the default of `open_rows`."""
PART = 2**26
"""Bytes of a file that are mapped at once: about the size of the last cache, since rows are taken in any order."""
THREADS = max(2, min(8, os.cpu_count() or 2))
"""Threads of a full pass: one reads while another computes, and each computes on its own core."""

_DTYPES = tuple(map(np.dtype, ("<f4", "<f8", "|u1", "|i1", "<u2", "<i2", "<u4", "<i4")))


class Shard(NamedTuple):
    """One `.npy` file of rows."""

    path: Path
    offset: int
    """Bytes before the first row."""
    rows: int


class Layout(NamedTuple):
    """How a row of a file is read: which column is the target, and how columns are scaled."""

    target: int | None
    shift: tuple[float, ...] | None
    scale: tuple[float, ...] | None
    classes: int | None

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


class Rows(NamedTuple):
    """All rows of a file or a folder of files. None is in memory."""

    shards: tuple[Shard, ...]
    dtype: np.dtype
    columns: int
    target: int | None
    """The column that is `y`; None: a batch is the rows as they are."""
    shift: tuple[float, ...] | None
    """Subtracted from each column on the device; None for nothing."""
    scale: tuple[float, ...] | None
    """Each column is then divided by this."""
    memory: float
    """GiB for fetched rows."""
    full: Callable[[Params], Any] | None = None
    """The full loss as a function of the parameters, if it can be had without a pass over all rows (for least squares,
    from `moments`). It is then recorded."""
    classes: int | None = None
    """The number of classes if the target holds class numbers: `y` is then int32. None: it is an ordinary number."""

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

    @property
    def layout(self) -> Layout:
        return Layout(self.target, self.shift, self.scale, self.classes)

    def as_batch(self, rows: Any) -> Any:
        """Rows `[m, columns]` as the loss sees them: `Batch(x[m, columns − 1], y[m])`, or as they are."""
        return self.layout.batch(rows)

    def scaled(self, shift: Any, scale: Any) -> "Rows":
        """These rows with `(column − shift)/scale`, computed on the device. Class numbers stay unchanged."""
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

    Features and target are columns of one table. Of two arrays, `np.save("rows.npy", np.column_stack([X, y]))` makes
    one, and `open_rows("rows.npy", target=-1)` opens it.

    Whole numbers (bytes of pixels) reach the loss unchanged, as from memory; `scaled` makes them float32.

    `target` is the number of the column to predict (negative counts from the end). With `classes` it holds class
    numbers, 0 to `classes − 1`, as floats like its neighbours, and the loss sees them as int32; each is checked when
    it is read. (0/1 labels of `losses.logloss` need no `classes`.) Nothing but headers is read here.

    Raises FileNotFoundError if there is no such file or no `.npy` in the folder. Raises ValueError, naming the file, if
    a file is no npy file, is cut off, is not a table of float32, float64 or whole numbers in C order, or differs from
    the first one in columns or dtype; also if the target is not a column, or classes are fewer than two or have no
    target.
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
    """Raise FileNotFoundError, with its name, if a shard is missing: names that end in numbers count up by one."""
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


def example(rows: Rows, count: int = 1) -> np.ndarray:
    """The first rows: for the shapes and dtypes that the loss will see."""
    return read(rows, 0, min(count, rows.n))


def fingerprint(rows: Rows) -> str:
    """A hash of shape, dtype and 1,024 evenly spaced rows: it does not read all of them."""
    picked = pick(rows, np.unique(np.linspace(0, rows.n - 1, 1024).astype(np.int64)))
    labels = "" if rows.classes is None else f" {rows.classes}"
    return digest((f"{rows.n} {rows.target} {rows.shift} {rows.scale}{labels}", picked))


# --- reading ---------------------------------------------------------------------------------------------------


def read(rows: Rows, low: int, high: int) -> np.ndarray:
    """Rows `low` to `high` (exclusive), in order: `[high − low, columns]`."""
    out = np.empty((high - low, rows.columns), rows.dtype)
    for shard, first, last, start in pieces_of(rows, low, high):
        into = out[start + first - low : start + last - low].reshape(-1).view(np.uint8).data
        offset, done = shard.offset + first * rows.row_bytes, 0
        with open(shard.path, "rb", buffering=0) as file:
            while done < len(into):
                got = os.preadv(file.fileno(), [into[done:]], offset + done)
                if got == 0:
                    raise ValueError(f"{shard.path.name} was cut off while it was read")
                done += got
    check_entries(rows, out, low)
    return out


def pick(rows: Rows, indices: np.ndarray, into: np.ndarray | None = None) -> np.ndarray:
    """The rows `indices`, in that order, fetched part by part of the file (into the bytes `into`)."""
    wanted = np.asarray(indices).reshape(-1)
    step = rows_of_part(rows, PART)
    count = -(-rows.n // step)
    # Small numbers make the stable sort a radix sort: several times as fast as sorting the rows themselves.
    part = (wanted // wanted.dtype.type(step)).astype(np.min_scalar_type(count))
    order = np.argsort(part, kind="stable")
    ends = np.cumsum(np.bincount(part, minlength=count)).tolist()
    del part
    # If each page of the file has at least one wanted row, all of a part is read, and the order within it is free.
    dense = len(wanted) * mmap.PAGESIZE > rows.nbytes
    # A row is copied as one item: several times as fast as an array of numbers.
    out = (aligned(len(wanted) * rows.row_bytes) if into is None else into).view(np.dtype((np.void, rows.row_bytes)))
    begin = 0
    for low, end in zip(range(0, rows.n, step), ends, strict=True):
        place = order[begin:end]
        begin = end
        if len(place):
            own = wanted[place]
            pieces = pieces_of(rows, low, min(low + step, rows.n))
            if len(pieces) > 1 or not dense:
                forwards = np.argsort(own)
                place, own = place[forwards], own[forwards]
            at = 0
            for shard, first, last, start in pieces:
                to = len(own) if len(pieces) == 1 else int(np.searchsorted(own, start + last))
                if at < to:
                    lying = mapped(shard, rows, first, last, ahead=dense).view(out.dtype)[:, 0]
                    out[place[at:to]] = lying.take(own[at:to] - (start + first))
                at = to
    found = out.view(rows.dtype).reshape(len(wanted), rows.columns)
    check_entries(rows, found, wanted)
    return found


def rows_of_part(rows: Rows, size: int) -> int:
    """The number of rows in a part of `size` bytes: a multiple of 64, so that JAX needs no copy of it."""
    return max(64, size // rows.row_bytes // 64 * 64)


def pieces_of(rows: Rows, low: int, high: int) -> list[tuple[Shard, int, int, int]]:
    """The pieces of shards that hold rows `low` to `high`: shard, its rows from and to, the number of its first row."""
    found, start = [], 0
    for shard in rows.shards:
        first, last = max(low - start, 0), min(high - start, shard.rows)
        if first < last:
            found.append((shard, first, last, start))
        start += shard.rows
    return found


def mapped(shard: Shard, rows: Rows, first: int, last: int, ahead: bool) -> np.ndarray:
    """Rows `first` to `last` of a shard, mapped from the file until the array is released.

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


def aligned(size: int) -> np.ndarray:
    """`size` bytes at an address from which JAX takes an array without a copy."""
    room = np.empty(size + 64, np.uint8)
    skip = -room.ctypes.data % 64
    return room[skip : skip + size]


def check_entries(rows: Rows, values: np.ndarray, numbers: int | np.ndarray) -> None:
    """Raise ValueError for an entry that is not finite or is no class number. `numbers`: of all rows or the first."""

    def where(row: int, column: int) -> str:
        at = int(numbers[row]) if isinstance(numbers, np.ndarray) else numbers + row
        return f"row {at:,}, column {column} (counted from 0) is {values[row, column]}"

    with np.errstate(over="ignore", invalid="ignore"):
        finite = np.isfinite(values.sum(dtype=values.dtype))
    if not finite and len(bad := np.argwhere(~np.isfinite(values))):
        row, column = map(int, bad[0])
        raise ValueError(f"{where(row, column)}; every entry must be finite: drop those rows or fill them in")
    if rows.classes is not None and rows.target is not None:
        bad = no_class(values[:, rows.target], rows.classes)
        if bad.any():
            raise ValueError(
                f"{where(int(np.argmax(bad)), rows.target)}; a class is a whole number from 0 to {rows.classes - 1}"
            )


def no_class(labels: Any, classes: int) -> Any:
    return (labels < 0) | (labels >= classes) | (labels % 1 != 0)


def beginning(rows: Rows) -> Rows:
    """The first rows, few enough to be read at once; a full pass over them runs the same programs as over `rows`."""
    size = rows_of_part(rows, PART)
    few = min(rows.n, size + rows.n % size)
    shards, left = [], few
    for shard in rows.shards:
        shards.append(shard._replace(rows=min(shard.rows, left)))
        left -= shards[-1].rows
    return rows._replace(shards=tuple(shard for shard in shards if shard.rows))


def parts_of(rows: Rows, size: int | None = None) -> list[tuple[int, int]]:
    """For each part of `size` bytes (default `PART`): its first row, and the row after its last."""
    step = rows_of_part(rows, PART if size is None else size)
    return [(low, min(low + step, rows.n)) for low in range(0, rows.n, step)]


def map_ahead(work: Callable[[Any], Any], items: Iterable[Any], threads: int) -> Iterator[Any]:
    """`work(item)` for each item, in order. Threads work ahead while the caller uses a result."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Any]] = deque()
        for item in items:
            waiting.append(pool.submit(work, item))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


class Moments(NamedTuple):
    """Mean and covariance of the columns of a file, float64."""

    mean: np.ndarray
    covariance: np.ndarray
    """`Σ (row − mean)(row − mean)ᵀ / n`."""


@checked
def moments(rows: Rows) -> Moments:
    """Mean and covariance of the raw columns in one pass. It sums deviations from the mean of the first rows."""
    origin = example(rows, 1000).mean(axis=0, dtype=np.float64)

    def of_part(bounds: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        wide = read(rows, *bounds) - origin
        return wide.sum(axis=0), wide.T @ wide

    total, second = np.zeros(rows.columns), np.zeros((rows.columns, rows.columns))
    for own_total, own_second in map_ahead(of_part, parts_of(rows, PART // 8), THREADS):
        total += own_total
        second += own_second
    shift = total / rows.n
    return Moments(origin + shift, second / rows.n - np.outer(shift, shift))
