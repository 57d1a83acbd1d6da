"""Delimited text (CSV, TSV): where its cells, its header and its row names are. What the cells mean: `cells`."""

import csv
import gzip
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxgrad.data.cells import is_missing, is_number, shows_a_point
from jaxgrad.data.words import INSTALL, count

SAMPLE = 200
"""Delimiter and header are told from so many rows."""
HEAD = 2**20
"""The rows that these are told from lie among so many characters."""
BLANK = " "
"""Stands for any run of blanks and tabs."""
_CALLED = {"\t": "tabs", BLANK: "blanks"}


class Cells(NamedTuple):
    """The cells of a delimited file, column by column."""

    columns: list[np.ndarray | list[str]]
    """float64 where the whole file is plain numbers, else the text of each cell without blanks around it."""
    names: tuple[str, ...]
    named: tuple[bool, ...]
    """Whether the file has a name for the column."""
    delimiter: str
    notes: tuple[str, ...]
    line: Callable[[int], int]
    """The line of the file where a row, counted from 0, ends."""


def read_cells(path: Path, target: str | int | None = None, header: bool | None = None, quickly: bool = True) -> Cells:
    """The cells of a delimited text file, perhaps gzipped; cut at commas, semicolons, tabs, bars or blanks.

    The separator is the one that cuts every row into equally many cells. Whether the first row is a header is told
    from what is in it and below, unless `header` says so. A header that is one cell short, as R writes it, leaves the
    first column, the row names, without a name. pandas reads what is not all plain numbers, and everything where not
    `quickly`.

    Raises ValueError for rows of unequal length, for a first row that may or may not be a header, and for a file that
    is blank, damaged, or not text. ModuleNotFoundError where pandas is needed and not installed.
    """
    try:
        return _read(path, target, header, quickly)
    except (csv.Error, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path.name} is damaged, cut off or not what its name says: {error}") from None


def _read(path: Path, target: str | int | None, header: bool | None, quickly: bool) -> Cells:
    text, notes = _decode(path)
    start, given, skipped = _preamble(text)
    if start:
        notes += (f"skipped {count(len(skipped), 'line')} above the table: {', '.join(map(repr, skipped[:3]))}",)
    body = text[start:]
    lines_above = _lines_in(text[:start])
    head = _head(body)
    delimiter, sample = _delimiter(head, path, given)
    if not sample:
        raise ValueError(f"{path.name} has no rows: it is blank")
    first, width = sample[0], max(len(row) for row in sample[:2])
    short = len(first) == width - 1 > 0 and header is not False and not any(is_number(cell) for cell in first)
    if len(first) != width and not short:
        _Rows(body, delimiter, lines_above, False, width, path.name).check_widths()
    below = [row for row in sample[1:] if len(row) == width]
    columns_below = [[row[i] for row in below] for i in range(width)]
    top = [*first, ""] if short and first[-1] and not any(columns_below[-1]) else ["", *first] if short else first
    has_header, why = (True, "") if short else (header, "") if header is not None else _header(top, below, target)
    if has_header is None:
        raise ValueError(
            f"{path.name}: cannot tell whether the first row ({', '.join(first[:4])}, ...) is a header, for {why}; say "
            "header=True or header=False"
        )
    if has_header and not below:
        raise ValueError(f"{path.name} has a header but no row of data below it")
    if why:
        notes += (why,)
    columns = None
    if quickly and (has_header or all(is_number(cell) for cell in first)):
        skip = lines_above + (next(_rows(head, delimiter))[1] if has_header else 0)
        columns = _all_numbers(path, text, delimiter, width, skip)
    rows = _Rows(body, delimiter, lines_above, has_header, width, path.name)
    if columns is None:
        columns, empty = _text_columns(rows)
        if empty:
            notes += (f"dropped {count(empty, 'row')} without anything in any cell",)
    if not has_header:
        names = tuple(f"column {i}" for i in range(width))
        return Cells(columns, names, (False,) * width, delimiter, (*notes, _NO_HEADER), rows.line)
    names, renamed = _distinct([name or f"column {i}" for i, name in enumerate(top)])
    return Cells(columns, names, tuple(bool(name) for name in top), delimiter, notes + renamed, rows.line)


_NO_HEADER = "no header was found: columns are numbered from 0"


def _decode(path: Path) -> tuple[str, tuple[str, ...]]:
    content = path.read_bytes()
    if path.suffix.lower() == ".gz":
        content = gzip.decompress(content)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") and b"\0" in content:
        return content.decode("utf-16").removeprefix("\ufeff"), ("the file is UTF-16",)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if re.search(rb"[\x00-\x08\x0e-\x1f\x7f]", content):
            raise ValueError(
                f"{path.name} is not text in UTF-8; is it really a CSV file? Save it as CSV, UTF-8"
            ) from None
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError:
            text = content.decode("latin-1")
        return text, ("the file is not UTF-8: letters beyond ASCII were read as Windows-1252 (Latin-1)",)
    if "\0" in text:
        raise ValueError(f"{path.name} holds zero bytes: is it really a CSV file? Save it as CSV, UTF-8")
    return text, ()


def _lines_in(text: str) -> int:
    return len(re.findall(r"\r\n|\r|\n", text))


def _preamble(text: str) -> tuple[int, str | None, list[str]]:
    """`(where the table begins, its delimiter if the file names it, the lines above it)`.

    Above a table may be Excel's `sep=;` and comments after `#`. A last comment that has as many cells as the row below
    it is the header.
    """
    start, given, skipped = 0, None, []
    lines = [(m.start(), m.group().strip()) for m in islice(re.finditer(r"[^\r\n]*(?:\r\n|\r|\n|$)", text), 1000)]
    lines = [(at, line) for at, line in lines if line] + [(len(text), "")]
    for (_, line), (after, below) in pairwise(lines):
        if found := re.fullmatch(r'"?sep=(.)"?', line):
            given = found[1]
        elif not line.startswith("#") or any(line.count(d) == below.count(d) > 0 for d in ",;\t|"):
            break
        skipped.append(line[:40])
        start = after
    return start, given, skipped


def _head(body: str) -> str:
    """The whole lines among the first characters, enough to tell how the file is written."""
    return body if len(body) <= HEAD else body[: body.rfind("\n", 0, HEAD) + 1] or body


def _rows(body: str, delimiter: str) -> Iterator[tuple[list[str], int]]:
    """Every row that is not blank, its cells without blanks around them, and the line where it ends."""
    file: Iterator[str] = io.StringIO(body, newline="")
    if delimiter == BLANK:
        file = (line.strip().replace("\t", " ") + "\n" for line in file)
    reader = csv.reader(file, delimiter=delimiter, skipinitialspace=True)
    for row in reader:
        if row and not (len(row) == 1 and not row[0].strip()):
            yield [cell.strip() for cell in row], reader.line_num


def _delimiter(body: str, path: Path, given: str | None) -> tuple[str, list[list[str]]]:
    """`(delimiter, the first rows)`.

    Of the separators that cut all sampled rows into equally many cells it is the one that leaves the fewest cells with
    another separator in them (the comma of a number is none), then most numbers. If none does, it is the one that
    leaves most cells in the first row.
    """
    candidates = given or ",;\t|" + BLANK
    if given is None and path.name.lower().removesuffix(".gz").endswith(".tsv"):
        candidates = "\t"
    found = []
    for delimiter in candidates:
        sample = [row for row, _ in islice(_rows(body, delimiter), SAMPLE)]
        if sample:
            found.append((delimiter, sample))
    if not found:
        return candidates[0], []
    even = [one for one in found if _is_even(one[1])]
    if not even:
        return max(found, key=lambda one: (one[0] != BLANK, len(one[1][0])))
    signs = [delimiter for delimiter, _ in even]
    if "\t" in signs:  # between columns on purpose, where blanks may be within cells
        even = [one for one in even if one[0] != BLANK]
    if len(even) == 1:
        return even[0]
    score = {delimiter: _score(sample, [sign for sign in signs if sign != delimiter]) for delimiter, sample in even}
    others = [score[delimiter][0] for delimiter in signs if delimiter != BLANK]
    # Blanks are within cells, too: they separate only where they alone leave clean cells.
    if others and BLANK in score and not (score[BLANK][0] == 1 and max(others) < 1):
        even = [one for one in even if one[0] != BLANK]
    return max(even, key=lambda one: score[one[0]])


def _is_even(sample: list[list[str]]) -> bool:
    """Whether all rows have equally many cells, and more than one; R's header lacks one."""
    first, *rest = sample
    widths = {len(row) for row in rest} or {len(first)}
    width = widths.pop()
    named = len(first) == width - 1 and not any(is_number(cell) for cell in first)
    return not widths and width > 1 and (len(first) == width or named)


def _score(sample: list[list[str]], others: list[str]) -> tuple[float, ...]:
    """`(the share of cells that are numbers or hold no other separator, numbers in a row, cells in a row)`."""
    rows = sample[1:21] or sample
    cells = [cell for row in rows for cell in row]
    numbers = [is_number(cell) or is_missing(cell) for cell in cells]
    clean = [so or not any(sign in cell for sign in others) for cell, so in zip(cells, numbers, strict=True)]
    return sum(clean) / len(cells), sum(numbers) / len(rows), len(cells) / len(rows)


def _header(top: list[str], below: list[list[str]], target: str | int | None) -> tuple[bool | None, str]:
    """Whether the first row is a header (None: it cannot be told), and a note or the reason."""
    if isinstance(target, str) and target in top and not is_number(target):
        return True, ""
    numbers = [is_number(cell) for cell in top]
    columns = [list(column) for column in zip(*below, strict=True)] or [[] for _ in top]
    over_numbers = [_text_above_numbers(cell, column) for cell, column in zip(top, columns, strict=True)]
    if any(over_numbers):
        return True, "the first row was taken for a header, though numbers are in it" if any(numbers) else ""
    if not any(numbers):
        if not below:
            return True, ""
        again = [cell in column for cell, column in zip(top, columns, strict=True) if cell]
        if not any(again):
            return True, "the first row was taken for a header: its words do not occur below it"
        if all(again):
            return False, ""
        return None, "some of its words occur again below it and others do not"
    values = [float(cell) for cell, so in zip(top, numbers, strict=True) if so and re.fullmatch(r"\d+", cell)]
    if len(values) < sum(numbers) or not below:
        return False, ""
    if _years(values) and not any(_years(_floats(row, numbers)) for row in below[:20]):
        return True, f"the first row was taken for a header: {_short(values)} look like years"
    counted = len(values) >= 2 and values in ([*range(len(values))], [*range(1, len(values) + 1)])
    if counted and numbers == [False] + [True] * len(values) and not top[0]:
        return True, f"the first row was taken for a header: {_short(values)} number the columns"
    under = [cell for column, so in zip(columns, numbers, strict=True) if so for cell in column]
    fractions = len(values) > 1 and len(under) > 2 * len(values) and all(re.search(r"[.,]\d|e", c) for c in under)
    distinct = len(set(values)) == len(values)
    if fractions and distinct and (counted or max(values) - min(values) >= 3):
        return True, f"the first row was taken for a header: {_short(values)} are whole numbers and none below is"
    if counted and len(values) > 2:
        return None, "it numbers the columns"
    return False, ""


def _short(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:3]) + (", ..." if len(values) > 3 else "")


def _floats(row: list[str], which: list[bool]) -> list[float]:
    cells = [cell for cell, so in zip(row, which, strict=True) if so]
    return [float(cell) for cell in cells] if all(re.fullmatch(r"\d+", cell) for cell in cells) else []


def _years(values: list[float]) -> bool:
    steps = set(np.diff(values)) if len(values) > 1 else set()
    return len(steps) == 1 and 0 not in steps and all(1500 <= value <= 2150 for value in values)


def _text_above_numbers(cell: str, column: Sequence[str]) -> bool:
    """Text on top and numbers in the rows below: that top is a header."""
    if is_number(cell) or is_missing(cell) or cell.lower().lstrip("+-") in ("inf", "infinity"):
        return False
    numbers = sum(is_number(below) for below in column)
    # A word among numbers is a header if it is the only word, and a mistake to be told if there are more.
    return numbers > 0 and all(is_number(below) or is_missing(below) for below in column)


def _all_numbers(path: Path, text: str, delimiter: str, width: int, skip: int) -> list[np.ndarray | list[str]] | None:
    """The columns if the file, below `skip` lines, holds finite plain numbers and nothing else: fast and lean."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file without rows: pandas' road says it better
            table = np.loadtxt(
                path,
                delimiter=None if delimiter == BLANK else delimiter,
                skiprows=skip,
                ndmin=2,
                comments=None,
                quotechar='"',
                encoding="utf-8-sig",
            )
    except ValueError:
        return None
    if not (len(table) and table.shape[1] == width and np.isfinite(table).all()):
        return None
    if delimiter != "," and "." in text and not shows_a_point(table):
        return None  # points may part thousands: the cells themselves must tell
    return list(table.T)


class _Rows(NamedTuple):
    body: str
    delimiter: str
    above: int
    has_header: bool
    width: int
    file: str

    def line(self, row: int) -> int:
        data = (line for cells, line in islice(_rows(self.body, self.delimiter), self.has_header, None) if any(cells))
        return self.above + next(islice(data, row, None))

    def check_widths(self) -> None:
        for number, (cells, line) in enumerate(_rows(self.body, self.delimiter)):
            if len(cells) != self.width and not (number == 0 and self.has_header and len(cells) == self.width - 1):
                cut = _CALLED.get(self.delimiter, repr(self.delimiter))
                raise ValueError(
                    f"{self.file}: line {self.above + line} has {count(len(cells), 'cell')} where the "
                    f"{'first' if number else 'next'} row has {self.width} (cut at {cut}); every row needs the same "
                    "columns, and nothing else may stand above or below the table"
                )


def _text_columns(rows: _Rows) -> tuple[list[np.ndarray | list[str]], int]:
    """The cells of each column as pandas reads them, and how many rows had nothing in any cell."""
    try:
        import pandas
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{rows.file} holds more than plain numbers, and reading that needs pandas, which is not installed; "
            f"install it with: {INSTALL}"
        ) from None
    start = 0
    if rows.has_header:
        end = next(line for _, line in _rows(_head(rows.body), rows.delimiter))
        start = next(islice((m.end() for m in re.finditer(r"\r\n|\r|\n", rows.body)), end - 1, None))
    if len(next(_rows(_head(rows.body[start:]), rows.delimiter))[0]) != rows.width:
        rows.check_widths()
    try:
        table = pandas.read_csv(
            io.StringIO(rows.body[start:], newline=""),
            sep=r"\s+" if rows.delimiter == BLANK else rows.delimiter,
            header=None,
            dtype=object,
            na_filter=False,
            skipinitialspace=True,
        )
    except pandas.errors.ParserError as error:
        rows.check_widths()
        raise ValueError(f"{rows.file} is damaged or cut off: {error}") from None
    columns = [[cell.strip() for cell in table[i].tolist()] for i in table.columns]
    if "" in columns[-1]:
        rows.check_widths()  # pandas fills rows that are cut short
    empty = [i for i, row in enumerate(zip(*columns, strict=True)) if not any(row)] if "" in columns[0] else []
    if empty:
        gone = set(empty)
        columns = [[cell for i, cell in enumerate(column) if i not in gone] for column in columns]
    return [*columns], len(empty)


def _distinct(names: list[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names that differ, and notes on those that did not."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        new = name if seen[name] == 1 else f"{name} ({seen[name]})"
        while new != name and new in names:
            new += "'"
        out.append(new)
    twice = [name for name, times in seen.items() if times > 1]
    return tuple(out), tuple(f"{seen[name]} columns are called {name!r}: the later ones are numbered" for name in twice)
