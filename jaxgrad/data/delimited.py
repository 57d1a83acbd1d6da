"""Delimited text (CSV, TSV): columns of numbers or text, with or without a header; and which cell is wrong."""

import csv
import gzip
import io
import math
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgrad.data.words import count

MISSING = frozenset({"", "na", "n/a", "#n/a", "nan", "null", "none", "?"})
"""Cells that stand for a missing number, in lower case."""


class Columns(NamedTuple):
    """The columns of a delimited file, in order."""

    values: list[np.ndarray]
    """float64 and finite, or str where the column is text."""
    names: tuple[str, ...]
    notes: tuple[str, ...]


def read_columns(path: Path, target: str | int | None = None) -> Columns:
    """All columns of a delimited text file in UTF-8, perhaps gzipped; cut at tab, comma, semicolon or bar.

    The first row is a header if it holds no number, if it holds the name `target`, or if a column has
    text on top and numbers in every row below. A first column that has no name and only numbers the rows is
    dropped.

    Raises ValueError, with the line and the column: rows of unequal length, missing or infinite numbers, text
    among numbers; and for a file that is blank, damaged, or not text.
    """
    try:
        delimiter, first, lines_read = _first_row(path)
        numbers = [_number(cell) is not None for cell in first]
        has_header = not any(numbers) or (target in first and _number(str(target)) is None)
        values = None
        if has_header or all(numbers):
            values = _all_numbers(path, delimiter, len(first), lines_read if has_header else 0)
        if values is None:  # the slow road holds text, and can say what is wrong in which line
            rows, lines = _rows(path, delimiter)
            cells = list(zip(*rows, strict=True))
            has_header = has_header or any(_text_above_numbers(column) for column in cells)
            if has_header:
                cells, lines = [column[1:] for column in cells], lines[1:]
            if not lines:
                raise ValueError(f"{path.name} has a header but no row of data below it")
            called = [repr(name) if has_header and name else str(i) for i, name in enumerate(first)]
            values = [_column(column, path.name, lines, name) for column, name in zip(cells, called, strict=True)]
    except UnicodeDecodeError:
        raise ValueError(f"{path.name} is not text in UTF-8; is it really a CSV file? Save it as CSV, UTF-8") from None
    except (csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} is damaged, cut off or not what its name says: {error}") from None
    if not has_header:
        names = tuple(f"column {i}" for i in range(len(values)))
        return Columns(values, names, ("no header was found: columns are numbered from 0",))
    names = tuple(name or f"column {i}" for i, name in enumerate(first))
    if not first[0] and len(values) > 1 and _numbers_rows(values[0]):
        return Columns(values[1:], names[1:], ("dropped the first column: no name, and it only numbers the rows",))
    return Columns(values, names, ())


def _open(path: Path) -> io.TextIOWrapper:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _first_row(path: Path) -> tuple[str, list[str], int]:
    """`(delimiter, cells, lines read)`: the delimiter is the one that cuts the first row into most cells."""
    found = []
    for delimiter in "\t" if path.suffix.lower() == ".tsv" else ",;\t|":
        with _open(path) as file:
            reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
            row = next((row for row in reader if not _blank(row)), None)
            if row is None:
                raise ValueError(f"{path.name} has no rows: it is blank")
            found.append((delimiter, [cell.strip() for cell in row], reader.line_num))
    return max(found, key=lambda candidate: len(candidate[1]))


def _all_numbers(path: Path, delimiter: str, width: int, skip: int) -> list[np.ndarray] | None:
    """The columns if the file, below `skip` lines, holds finite numbers and nothing else: fast and lean."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file without rows: the slow road says it better
            table = np.loadtxt(
                path,
                delimiter=delimiter,
                skiprows=skip,
                ndmin=2,
                comments=None,
                quotechar='"',
                encoding="utf-8-sig",
            )
    except ValueError:
        return None
    fits = len(table) and table.shape[1] == width and np.isfinite(table).all()
    return list(table.T) if fits else None


def _rows(path: Path, delimiter: str) -> tuple[list[list[str]], list[int]]:
    """All rows but blank ones, with the line of the file where each ends."""
    rows, lines = [], []
    with _open(path) as file:
        reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
        for row in reader:
            if _blank(row):
                continue
            if rows and len(row) != len(rows[0]):
                raise ValueError(
                    f"{path.name}: line {reader.line_num} has {count(len(row), 'cell')} where the first row has "
                    f"{len(rows[0])} (cut at {delimiter!r}); every row needs the same columns"
                )
            rows.append([cell.strip() for cell in row])
            lines.append(reader.line_num)
    return rows, lines


def _blank(row: list[str]) -> bool:
    return not row or (len(row) == 1 and not row[0].strip())


def _number(cell: str) -> float | None:
    """The number in a cell (NaN and infinity included), or None. `1_000` is Python's, not a table's."""
    try:
        return None if "_" in cell else float(cell)
    except ValueError:
        return None


def _text_above_numbers(cells: Sequence[str]) -> bool:
    """Text on top and a number in every row below: that top is a header."""
    is_text = _number(cells[0]) is None and cells[0].lower() not in MISSING
    return is_text and len(cells) > 1 and all(_number(cell) is not None for cell in cells[1:])


def _column(cells: Sequence[str], file: str, lines: Sequence[int], name: str) -> np.ndarray:
    """float64 if the cells are numbers, str if they are text; raises where one is missing or odd."""
    numbers = [_number(cell) for cell in cells]
    texts = [i for i, cell in enumerate(cells) if numbers[i] is None and cell.lower() not in MISSING]
    if not texts:
        column = np.array([math.nan if number is None else number for number in numbers])
        bad = np.flatnonzero(~np.isfinite(column))
        if len(bad):
            got = repr(cells[bad[0]]) if cells[bad[0]] else "empty"
            raise ValueError(
                f"{file}: line {lines[bad[0]]}, column {name} is {got} ({count(len(bad), 'such cell')} in this "
                "column); every number must be there and finite: drop those rows or fill them in"
            )
        return column
    amount = len(cells) - numbers.count(None)
    if amount > len(texts):
        raise ValueError(
            f"{file}: line {lines[texts[0]]}, column {name} is {cells[texts[0]]!r}, but most of the "
            f"column is numbers ({count(amount, 'number')}, {count(len(texts), 'cell')} of text): make "
            "it one or the other"
        )
    empty = [i for i, cell in enumerate(cells) if not cell]
    if empty:
        raise ValueError(
            f"{file}: line {lines[empty[0]]}, column {name} is empty ({count(len(empty), 'such cell')} in this "
            "column); drop those rows or fill them in"
        )
    return np.array(cells)


def _numbers_rows(column: np.ndarray) -> bool:
    return column.dtype.kind == "f" and column[0] in (0, 1) and bool((np.diff(column) == 1).all())
