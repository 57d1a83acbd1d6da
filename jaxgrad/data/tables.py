"""From the cells of a CSV file to a `Table`: what each column is, what was done with it, and what looks like a mistake.

Every column is accounted for (`Column`). What cannot be a feature is left out and said to be: row names and
identifiers, which mark single rows. What would falsify numbers is refused. What can be used and is probably a mistake
is a doubt: see `doubts`.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgrad.data.cells import Bad, Notation, Numbers, as_numbers, convert, judge, resemble_numbers, settle
from jaxgrad.data.dataset import Column, Table
from jaxgrad.data.delimited import Cells, read_cells
from jaxgrad.data.doubts import doubts
from jaxgrad.data.words import count, few, nearest, show

MAX_LEVELS = 32
"""A text column with more distinct values than this is refused, not one-hot coded."""
_UNNAMED = re.compile(r"unnamed: ?\d+(_level_\d+)?|index|level_\d|\.\.\.1|x\.1", re.IGNORECASE)
"""What pandas and R call a column of row numbers that had no name."""
_IDENTIFIER = re.compile(
    r"(.*[ _.-])?(id|ids|uid|uuid|guid|pk|row|rows|rownum|rownumber|rownames)|.*[a-z0-9](Id|ID)|idx|#|s\.?no\.?"
)
"""Names of columns that mark rows. `index`, `number` or `key` may be a measurement: those are a doubt, if anything."""


class Reading(NamedTuple):
    """How a person says that a CSV file is to be read; see `jaxgrad.data.load`."""

    decimal: str | None = None
    thousands: str | None = None
    header: bool | None = None
    drop: tuple[str | int, ...] = ()
    text: tuple[str | int, ...] = ()

    def given(self) -> list[str]:
        return [f"{name}=" for name, value in self._asdict().items() if value not in (None, ())]

    def check(self) -> None:
        """Raises ValueError for signs that no number is written with."""
        if self.decimal not in (None, ".", ","):
            raise ValueError(f"decimal must be '.' or ','; got {self.decimal!r}")
        if self.thousands not in (None, ".", ",", " ", "'"):
            raise ValueError(f"thousands must be ',', '.', ' ' or \"'\"; got {self.thousands!r}")
        if self.decimal is not None and self.decimal == self.thousands:
            raise ValueError(f"decimal and thousands must differ; both are {self.decimal!r}")
        if not (self.header is None or isinstance(self.header, bool)):
            raise ValueError(f"header must be True, False or None; got {self.header!r}")


def read_delimited(path: Path, target: str | int | None, reading: Reading = Reading()) -> Table:  # noqa: B008
    """The table in a delimited text file; see `jaxgrad.data.load` for what is refused."""
    by_comma = reading.decimal == "," or reading.thousands == "."
    cells = read_cells(path, target, reading.header, quickly=not by_comma)
    names, file = cells.names, path.name
    at = column_number(target, names, file)
    dropped = {column_number(name, names, file, "drop") for name in reading.drop}
    as_text = {column_number(name, names, file, "text") for name in reading.text}
    if at in dropped:
        raise ValueError(f"{file}: column {names[at]!r} is the target and cannot be dropped as well")
    values, said = _values(cells, dropped, as_text, file, reading)
    y = values[at]
    if y is None:
        raise ValueError(f"{file}: the target, column {at}, is empty in every row")
    features: list[np.ndarray] = []
    shown: list[str] = []
    account: list[Column] = []
    notes = cells.notes
    n = len(cells.columns[at])
    for i, (name, column) in enumerate(zip(names, values, strict=True)):
        if i == at:
            own = "" if y.dtype.kind == "f" else _alike([str(level) for level in np.unique(y)])
            account.append(Column(name, "number" if y.dtype.kind == "f" else "text", (), "target", said[i], own))
            continue
        kind = "empty" if column is None else "number" if column.dtype.kind == "f" else "text"
        left = "drop= says so" if i in dropped else "no cell holds anything" if column is None else ""
        if column is not None and not left:
            left = _marks_rows(name, i == 0 and any(cells.named) and not cells.named[0], column, n)
        if column is None or left:
            account.append(Column(name, kind, (), "left out", _join(said[i], left)))
            if i == 0 and not cells.named[0] and left == _COUNTS:
                notes += ("dropped the first column: no name, and it only numbers the rows",)
            elif i not in dropped:
                notes += (f"dropped column {name!r}: {left}",)
        elif kind == "number":
            features.append(column)
            shown.append(name)
            account.append(Column(name, kind, (), "feature", said[i]))
            if said[i]:
                notes += (f"column {name!r}: {said[i]}",)
        else:
            coded, one = _coded(name, column, n, i in as_text, file)
            features += [(column == level).astype(np.float64) for level in one.levels[1:]]
            shown += [f"{name}={level}" for level in one.levels[1:]]
            account.append(one)
            notes += (coded,)
    x = np.stack(features, axis=1) if features else np.empty((n, 0))
    years = _years(cells, values) if reading.header is None else ""
    account, loud = doubts(account, dict(zip(names, values, strict=True)), names[at], x, shown)
    loud += (years,) if years else ()
    notes += tuple(f"column {c.name!r}: {c.doubt}" for c in account if c.doubt) + loud
    aloud = tuple(f"column {c.name!r} {c.doubt}" for c in account if c.doubt) + loud
    return Table(x, y, tuple(shown), names[at], file, notes, columns=tuple(account), doubts=aloud)


def column_number(target: str | int | None, names: Sequence[str], file: str, option: str = "target") -> int:
    """Which column is meant: by name, or by number (also as text, as a command line gives it)."""
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    if target is None:
        raise ValueError(f"{file}: say which column is the target (target=NAME or NUMBER); columns: {shown}")
    if isinstance(target, str):
        if f"{target} (2)" in names:
            raise ValueError(f"{file}: 2 columns are called {target!r}; give the column's number")
        if target in names:
            return names.index(target)
        try:
            target = int(target)
        except ValueError:
            raise ValueError(f"{file} has no column {target!r}{nearest(target, names)}; columns: {shown}") from None
    if not -len(names) <= target < len(names):
        raise ValueError(
            f"{file} has {count(len(names), 'column')}, so {'the ' * (option == 'target')}{option}'s number is from "
            f"{-len(names)} to {len(names) - 1}; got {target}"
        )
    return target % len(names)


def _values(
    cells: Cells, dropped: set[int], as_text: set[int], file: str, reading: Reading
) -> tuple[list[np.ndarray | None], list[str]]:
    """Each column as float64 or text (None: empty and unnamed, so not to be used), and how its cells were read."""
    said = [""] * len(cells.names)
    judged: list[np.ndarray | Numbers | list[str] | None] = []
    for i, column in enumerate(cells.columns):
        if isinstance(column, np.ndarray):
            judged.append(np.array([show(value) for value in column]) if i in as_text else column)
        elif not cells.named[i] and not any(column):
            judged.append(None)
        elif i in as_text or i in dropped:
            judged.append([cell or "(empty)" for cell in column])
        else:
            with _told(cells, i, file):
                judged.append(judge(column))
    judged, notation = _settled(cells, judged, file, reading)
    values: list[np.ndarray | None] = []
    for i, column in enumerate(judged):
        if isinstance(column, Numbers):
            with _told(cells, i, file):
                numbers, said[i] = convert(column, notation)
            values.append(numbers)
        else:
            values.append(np.array(column) if isinstance(column, list) else column)
        own = values[-1]
        if own is not None and own.dtype.kind == "f" and len(own) and np.abs(own).max() > 2**53:
            said[i] = _join(said[i], "numbers above 2^53 were rounded to float64")
        if i in as_text:
            said[i] = "text= says so"
    return values, said


@contextmanager
def _told(cells: Cells, i: int, file: str) -> Iterator[None]:
    """What is wrong with a column is told with the file, the line and the name."""
    try:
        yield
    except Bad as bad:
        name = repr(cells.names[i]) if cells.named[i] else str(i)
        where = "" if bad.row is None else f"line {cells.line(bad.row)}, "
        raise ValueError(f"{file}: {where}column {name} {bad}") from None


_Judged = list[np.ndarray | Numbers | list[str] | None]


def _settled(cells: Cells, judged: _Judged, file: str, reading: Reading) -> tuple[_Judged, Notation]:
    """The columns, those of plain numbers cell by cell where points and commas matter, and the notation of the file."""
    by_comma = reading.decimal == "," or reading.thousands == "."
    commas = any(isinstance(c, Numbers) and (c.first(",") or c.first("either,")) for c in judged)
    if commas or by_comma or cells.delimiter != ",":
        judged = [
            as_numbers(raw) if isinstance(raw, list) and isinstance(c, np.ndarray) and any("." in x for x in raw) else c
            for raw, c in zip(cells.columns, judged, strict=True)
        ]
    numbers = [(name, c) for name, c in zip(cells.names, judged, strict=True) if isinstance(c, Numbers)]
    try:
        return judged, settle(numbers, cells.delimiter, reading.decimal, reading.thousands)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


_COUNTS = "it numbers the rows"


def counts_rows(column: np.ndarray) -> bool:
    """Whole numbers that go up by 1 from 0 or 1."""
    return column.dtype.kind == "f" and column[0] in (0, 1) and bool((np.diff(column) == 1).all())


def _marks_rows(name: str, nameless: bool, column: np.ndarray, n: int) -> str:
    """Why a column marks single rows and is no feature; empty if it may be one."""
    whole = column.dtype.kind == "f" and bool((column == np.floor(column)).all())
    different = n > 2 and len(np.unique(column)) == n
    nameless = nameless or bool(_UNNAMED.fullmatch(name))
    if counts_rows(column) and n > 1 and (nameless or _IDENTIFIER.fullmatch(name)):
        return _COUNTS
    if not different or n < 3:
        return ""
    if nameless and (whole or column.dtype.kind != "f"):
        return "it has no name and a different value in each row, as row names have"
    if whole and n >= 5 and _IDENTIFIER.fullmatch(name):
        return "an identifier by its name, a different whole number in each row"
    if column.dtype.kind != "f" and n >= 5:
        return f"text that differs in each of {n:,} rows (such as {show(column[0])}) marks rows and tells nothing else"
    return ""


def _coded(name: str, column: np.ndarray, n: int, asked: bool, file: str) -> tuple[str, Column]:
    """The note and the account of a text column; raises ValueError where it has too many levels."""
    levels = [str(level) for level in np.unique(column)]
    ways = "leave it out (drop=), group its values or turn it into numbers"
    if len(levels) > MAX_LEVELS:
        raise ValueError(
            f"{file}: column {name!r} is text with {len(levels):,} distinct values ({few(levels)}); at "
            f"most {MAX_LEVELS} are one-hot coded: {ways}"
        )
    if len(levels) > max(6, n // 2) and not asked:
        raise ValueError(
            f"{file}: column {name!r} is text with {len(levels)} distinct values in {n} rows ({few(levels)}), so it "
            f"marks single rows: {ways}; text= codes it all the same"
        )
    if len(levels) == 1:
        why = f"{show(levels[0])} in every row"
        return f"dropped text column {name!r}: {why}", Column(name, "text", (), "left out", why)
    one = f"a 0/1 column for each but the first ({show(levels[0])})"
    doubt = _alike(levels)
    if not doubt and not asked and len(levels) > 2 and resemble_numbers(levels):
        doubt = (
            f"is text, though each value begins as a number does (such as {show(levels[0])}); if these are numbers, "
        )
        doubt += "write them as numbers"
    made = len(levels) - 1
    done = "feature" if made == 1 else f"{made} features"
    why = _join("text= says so" if asked else "", one)
    return f"text column {name!r}: {len(levels)} levels, {one}", Column(name, "text", tuple(levels), done, why, doubt)


def _alike(levels: Sequence[str]) -> str:
    """The doubt about levels that are probably one; empty if there are none."""
    same = [lower for lower, times in Counter(level.casefold() for level in levels).items() if times > 1]
    alike = [level for level in levels if same and level.casefold() == same[0]]
    return f"has levels that differ only in capitals: {', '.join(map(repr, alike))}" if alike else ""


def _years(cells: Cells, values: Sequence[np.ndarray | None]) -> str:
    """Whether the first row of a file without a header looks like one of years: the doubt, or nothing."""
    first = [column[0] for column in values if column is not None and column.dtype.kind == "f" and len(column) > 1]
    next_ = [column[1] for column in values if column is not None and column.dtype.kind == "f" and len(column) > 1]
    if any(cells.named) or len(first) < 2:
        return ""
    steps, others = np.diff(first), np.diff(next_)
    regular = bool((steps == steps[0]).all()) and steps[0] > 0 and all(1000 <= v < 3000 and v % 1 == 0 for v in first)
    if not regular or bool((others == others[0]).all()):
        return ""
    return (
        f"the first row, {show(first[0])} to {show(first[-1])}, looks like a header of years; if it is, say header=True"
    )


def _join(*parts: str) -> str:
    return "; ".join(part for part in parts if part)
