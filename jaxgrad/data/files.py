"""A user's own file: CSV, npz, npy or svmlight, told by its suffix, read into a `Table`."""

import hashlib
import math
import zipfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from jaxgrad.data.checks import check_finite
from jaxgrad.data.dataset import Table
from jaxgrad.data.tables import Reading, column_number, read_delimited
from jaxgrad.data.words import nearest

MAX_DENSE = 2**28
"""The most entries (n d) of a sparse file once it is written out: 2 GiB of float64."""


def read_file(path: Path, target: str | int | None, reading: Reading) -> Table:
    """The table in a file of the user's; see `jaxgrad.data.load` for the kinds and the errors."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give one file in it ({', '.join(SUFFIXES)})")
    if not path.exists():
        if not path.parent.is_dir():
            raise FileNotFoundError(f"there is no file {path}: the folder {path.parent} does not exist")
        beside = [p.name for p in path.parent.iterdir() if p.is_file()]
        raise FileNotFoundError(f"there is no file {path}{nearest(path.name, beside)}")
    read = next((read for suffix, read in _READERS.items() if path.name.lower().endswith(suffix)), None)
    if read is None:
        raise ValueError(f"{path.name}: cannot tell what kind of file this is; the suffixes are {', '.join(SUFFIXES)}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path.name} is empty (0 bytes)")
    if isinstance(target, bool):
        raise ValueError(f"target is a column's name or number; got {target}")
    if read is read_delimited:
        table = read_delimited(path, target, reading)
    elif given := reading.given():
        raise ValueError(f"{path.name}: {' and '.join(given)} can only be given for CSV and TSV files; leave it out")
    else:
        table = read(path, target)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return table._replace(source=f"{path.name} (sha256 {digest})", licence="the user's own file")


def _read_npz(path: Path, target: str | int | None) -> Table:
    with path.open("rb") as file:
        with _plain_errors(path):
            archive = np.load(file, allow_pickle=False)
        if isinstance(archive, np.ndarray):
            raise ValueError(f"{path.name} holds a single npy array, not an npz archive; rename it to .npy")
        there = archive.files
        x_name = next((name for name in ("x", "X") if name in there), "")
        y_name = next((name for name in (("y", "Y") if target is None else (str(target),)) if name in there), "")
        if not x_name or not y_name or x_name == y_name:
            wanted = "x (or X) and y" if target is None else f"x (or X) and, as the target, {target!r}"
            raise ValueError(f"{path.name} must hold the arrays {wanted}; it holds: {', '.join(there) or 'none'}")
        with _plain_errors(path):
            x, y = archive[x_name], archive[y_name]
    notes: tuple[str, ...] = ()
    if x.ndim > 2:
        width = math.prod(x.shape[1:])
        notes = (f"each example, of shape {x.shape[1:]}, was flattened to {width:,} columns",)
        x = x.reshape(len(x), width)
    if x.ndim == 1:
        x = x[:, None]
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
        raise ValueError(
            f"{path.name}: {x_name} has shape {x.shape} and {y_name} has shape {y.shape}; needed are [n, d] and "
            "[n], one target for each row"
        )
    x = _floats(x, f"{path.name}: {x_name}")
    if y.dtype.kind != "U":
        y = _floats(y, f"{path.name}: {y_name}")
    return Table(x, y, tuple(f"x{i}" for i in range(x.shape[1])), y_name, path.name, notes)


def _read_npy(path: Path, target: str | int | None) -> Table:
    with path.open("rb") as file, _plain_errors(path):
        table = np.load(file, allow_pickle=False)
    if not isinstance(table, np.ndarray):
        raise ValueError(f"{path.name} holds an npz archive, not a single array; rename it to .npz")
    if table.ndim != 2:
        raise ValueError(f"{path.name} has shape {table.shape}; a table of shape [rows, columns] is needed")
    table = _floats(table, path.name)
    names = tuple(f"column {i}" for i in range(table.shape[1]))
    at = column_number(target, names, path.name)
    return Table(np.delete(table, at, axis=1), table[:, at], names[:at] + names[at + 1 :], names[at], path.name)


@contextmanager
def _plain_errors(path: Path) -> Iterator[None]:
    """What numpy says of a bad file, made plain. Pickles are never opened (`allow_pickle=False`): they run code."""
    try:
        yield
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if "Object arrays" in str(error):
            raise ValueError(
                f"{path.name} holds pickled Python objects, which are refused because loading them can run code; "
                "save plain arrays of numbers"
            ) from None
        raise ValueError(f"{path.name} is damaged, cut off or not an {path.suffix[1:]} file: {error}") from None


def _floats(values: np.ndarray, what: str) -> np.ndarray:
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{what} must hold real numbers; it holds {values.dtype}")
    if values.size == 0:
        raise ValueError(f"{what} has shape {values.shape}: it is empty")
    check_finite(values, what)
    return values.astype(np.float64)


def _read_svmlight(path: Path, target: str | int | None) -> Table:
    """Lines `label index:value ...`, comments after `#`; indices count from 1, or from 0 if a 0 is among them."""
    if target is not None:
        raise ValueError(f"{path.name}: svmlight has its target first in each line; leave target= out")
    labels, rows, columns, values = array("d"), array("q"), array("q"), array("d")
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                label, *pairs = line.split("#", 1)[0].split() or [""]
                if not label:
                    continue
                try:
                    labels.append(_finite(label))
                    for index, value in (pair.split(":") for pair in pairs if not pair.startswith("qid:")):
                        rows.append(len(labels) - 1)
                        columns.append(_index(index))
                        values.append(_finite(value))
                except ValueError as error:
                    raise ValueError(
                        f"{path.name}: line {number} is not 'label index:value ...' with finite numbers ({error}); "
                        f"it begins {line[:60].strip()!r}"
                    ) from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not text in UTF-8; is it really an svmlight file?") from None
    if not columns:
        raise ValueError(f"{path.name} holds no index:value pair: there are no features")
    first = min(1, *columns)
    n, d = len(labels), max(columns) + 1 - first
    if n * d > MAX_DENSE:
        raise ValueError(
            f"{path.name} is {n:,} x {d:,}, {n * d * 8 / 2**30:.1f} GiB when the zeros are written out; at most "
            f"{MAX_DENSE * 8 / 2**30:.0f} GiB are"
        )
    x = np.zeros((n, d))
    x[np.array(rows), np.array(columns) - first] = np.array(values)
    notes = (f"{len(columns):,} of {n * d:,} entries are in the file, the others are 0; indices count from {first}",)
    return Table(x, np.array(labels), tuple(f"x{first + i}" for i in range(d)), "label", path.name, notes)


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not finite")
    return number


def _index(text: str) -> int:
    index = int(text)
    if index < 0:
        raise ValueError(f"index {index} is negative")
    return index


_READERS: dict[str, Callable[[Path, str | int | None], Table]] = {
    ".csv": read_delimited,
    ".csv.gz": read_delimited,
    ".tsv": read_delimited,
    ".tsv.gz": read_delimited,
    ".txt": read_delimited,
    ".data": read_delimited,
    ".npz": _read_npz,
    ".npy": _read_npy,
    ".svm": _read_svmlight,
    ".svmlight": _read_svmlight,
    ".libsvm": _read_svmlight,
}
SUFFIXES = tuple(_READERS)
"""The kinds of file that can be read."""
