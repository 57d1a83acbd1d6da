"""Random tables, written as people's programs write them and read back: the numbers that were written, or a refusal."""

import gzip
import warnings
from typing import Any, NamedTuple

import numpy as np
import pytest

from jaxgrad import data

TABLES = 1000
WORDS = ("red", "green", "blue", "Ulm", "Bonn", "New York", "être", "a b", "x-1")


class Written(NamedTuple):
    """A file, and what it means."""

    content: bytes
    suffix: str
    names: list[str]
    columns: list[np.ndarray]
    """float64, or text."""
    target: int
    header: bool
    left_out: set[int]
    """Columns that are no features: row names, row numbers."""
    unusable: str
    """Words that a refusal must contain, where one is due; '' where the table must be read or may be refused."""
    may_refuse: bool
    """Whether a refusal is allowed: where a sign or the header has two readings."""
    dialect: str


def grouped(whole: str, sign: str) -> str:
    head = len(whole) % 3 or 3
    return sign.join([whole[:head], *(whole[i : i + 3] for i in range(head, len(whole), 3))])


def number_column(rng: np.random.Generator, n: int, decimal: str, thousands: str) -> tuple[np.ndarray, list[str]]:
    """Numbers, and how a program writes them."""
    kind = rng.choice(["float", "fixed", "whole", "big", "percent", "money", "exponent", "small whole", "minus"])
    places = int(rng.integers(0, 5))
    if kind in ("small whole", "whole", "big"):
        top = {"small whole": 9, "whole": 5_000, "big": 10**9}[kind]
        values = rng.integers(0, top, n).astype(float)
        cells = [f"{v:.0f}" for v in values]
        if thousands and top > 10:
            cells = [grouped(cell, thousands) for cell in cells]
        return values, cells
    if kind == "exponent":
        values = rng.normal(size=n) * 10.0 ** rng.integers(-20, 20, n)
        return np.array([float(f"{v:.6e}") for v in values]), [f"{v:.6e}".replace(".", decimal) for v in values]
    scale = 10.0 ** rng.integers(-2, 6)
    drawn = (rng.normal(size=n) if kind == "minus" else rng.random(n)) * scale
    values = np.array([float(f"{v:.{places}f}") for v in drawn])
    if kind == "float":
        values = rng.normal(size=n) * scale
        return values, [repr(v).replace(".", decimal) for v in values.tolist()]
    cells = []
    for v in values.tolist():
        whole, _, part = f"{abs(v):.{places}f}".partition(".")
        whole = grouped(whole, thousands) if thousands else whole
        cells.append(("-" if v < 0 else "") + whole + (decimal + part if part else ""))
    if kind == "percent":
        cells = [f"{cell}%" for cell in cells]
    if kind == "money":
        sign = rng.choice(["$", "€"])
        cells = [f"{sign}{cell}" if cell[0] != "-" else f"-{sign}{cell[1:]}" for cell in cells]
    return values, cells


def table(rng: np.random.Generator) -> Written:
    """A random table in a random dialect."""
    n = int(rng.integers(6, 45))
    delimiter = str(rng.choice([",", ";", "\t", "|", " "], p=[0.4, 0.3, 0.15, 0.05, 0.1]))
    decimal = "," if delimiter != "," and rng.random() < 0.4 else "."
    thousands = str(rng.choice(["", "", {",": ".", ".": ","}[decimal], "'", "\u00a0"]))
    if delimiter == " ":
        thousands = ""
    columns: list[np.ndarray] = []
    cells: list[list[str]] = []
    for _ in range(rng.integers(2, 7)):
        if rng.random() < 0.25 and columns:
            words = list(rng.choice(WORDS, int(rng.integers(2, 4)), replace=False))
            chosen = [*words, *rng.choice(words, n - len(words))]
            rng.shuffle(chosen)
            columns.append(np.array(chosen))
            cells.append([str(word) for word in chosen])
        else:
            values, written = number_column(rng, n, decimal, thousands)
            while (values == values[0]).all():
                values, written = number_column(rng, n, decimal, thousands)
            columns.append(values)
            cells.append(written)
    at = next(i for i, column in enumerate(columns) if column.dtype.kind == "f")
    known = ["age", "Size (m²)", "w", "price", "k_2", "été", "z", "kind"]
    names = [str(name) for name in rng.choice(known, len(columns), False)]
    header, left_out, unusable = bool(rng.random() < 0.75), set[int](), ""
    if rng.random() < 0.3:
        row = int(rng.integers(0, n))
        i = int(rng.integers(0, len(columns)))
        token = str(rng.choice(["NA", "", "?", "nan", "N/A", "null", "-", "#N/A", "None", "."]))
        cells[i][row] = token if delimiter != " " or token else "NA"
        unusable = repr(names[i]) if header else f"column {i}"
    style = str(
        rng.choice(["plain", "row names", "row numbers", "short header", "Unnamed"], p=[0.6, 0.1, 0.1, 0.1, 0.1])
    )
    if style != "plain" and header:
        first = [f"row {i}" for i in range(n)] if style == "row names" else [str(i) for i in range(n)]
        columns.insert(0, np.array(first))
        cells.insert(0, first)
        names.insert(0, "Unnamed: 0" if style == "Unnamed" else "")
        left_out, at = {0}, at + 1
    rows = [[column[i] for column in cells] for i in range(n)]
    if header:
        rows.insert(0, names[1:] if style == "short header" and left_out else list(names))
    quote = bool(rng.random() < 0.3)
    needs = delimiter + '"\r\n'

    def cell(text: str) -> str:
        return f'"{text}"' if quote or any(sign in text for sign in needs) or (delimiter == " " and not text) else text

    end = str(rng.choice(["\n", "\r\n"]))
    text = end.join(delimiter.join(map(cell, row)) for row in rows) + (end if rng.random() < 0.8 else "")
    if rng.random() < 0.1 and not unusable and delimiter != " ":
        text = end.join(line + delimiter for line in text.split(end) if line) + end
    codes = ["utf-8", "utf-8", "utf-8-sig", "cp1252", "utf-16"]
    content, suffix = text.encode(str(rng.choice(codes))), ".csv"
    if rng.random() < 0.1:
        content, suffix = gzip.compress(content), ".csv.gz"
    elif delimiter == "\t" and rng.random() < 0.5:
        suffix = ".tsv"
    # Without a header the first row of words and numbers may look like one; a comma may have two readings.
    two_ways = any(c.count(",") + c.count(".") > 0 for column in cells for c in column) and delimiter != ","
    dialect = f"delimiter {delimiter!r}, decimal {decimal!r}, thousands {thousands!r}, {style}, header {header}"
    return Written(content, suffix, names, columns, at, header, left_out, unusable, two_ways or not header, dialect)


def read(folder: Any, written: Written, **options: Any) -> data.Dataset:
    path = folder / f"table{written.suffix}"
    path.write_bytes(written.content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", data.Doubtful)
        target = written.names[written.target] if written.header else written.target
        return data.load(path, target=target, task="regression", standardise=False, **options)


def compare(written: Written, dataset: data.Dataset) -> None:
    """Every number and word that came back is the one that was written."""
    names = written.names if written.header else [f"column {i}" for i in range(len(written.names))]
    expected: dict[str, np.ndarray] = {}
    for i, (name, column) in enumerate(zip(names, written.columns, strict=True)):
        if i == written.target or i in written.left_out:
            continue
        if column.dtype.kind == "f":
            expected[name] = column
        else:
            levels = sorted(set(column.tolist()))
            expected |= {f"{name}={level}": (column == level).astype(float) for level in levels[1:]}
    assert list(dataset.names) == list(expected)
    for i, column in enumerate(expected.values()):
        np.testing.assert_array_equal(dataset.batch.x[:, i], column.astype(np.float32))
    np.testing.assert_array_equal(dataset.batch.y, written.columns[written.target].astype(np.float32))
    assert {c.name for c in dataset.columns if c.done == "target"} == {names[written.target]}


def says_what_to_do(message: str) -> bool:
    return any(words in message for words in ("drop", "fill", "say ", "decimal=", "header=", "needed"))


@pytest.mark.parametrize("part", range(4))
def test_a_random_table_comes_back_as_it_was_written_or_is_refused_by_the_name_of_its_column(tmp_path, part):
    """1,000 tables; where a cell is missing the refusal names its column, and few others may be refused at all."""
    read_back, refused, due = 0, [], 0
    for seed in range(part, TABLES, 4):
        written = table(np.random.default_rng([20261126, seed]))
        try:
            dataset = read(tmp_path, written)
        except ValueError as error:
            message = str(error)
            assert "column" in message or "header" in message, f"{seed}: {message}"
            assert says_what_to_do(message), f"{seed}: {message}"
            if written.unusable:
                assert written.unusable in message or written.may_refuse, f"{seed}: {message}; {written.dialect}"
                due += 1
            else:
                assert written.may_refuse, f"{seed}: {message}; {written.dialect}"
                refused.append((seed, message))
            continue
        assert not written.unusable, f"{seed}: a missing value was read as something; {written.dialect}"
        try:
            compare(written, dataset)
        except AssertionError as error:
            raise AssertionError(f"{seed}: {written.dialect}; {error}") from None
        read_back += 1
    assert read_back + due + len(refused) == TABLES // 4
    assert read_back > 150
    assert due > 60
    assert len(refused) <= 5, refused
