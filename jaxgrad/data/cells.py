"""What the cells of a column are: numbers (in which notation), missing values, dates, or text.

A cell such as `1,037` has two readings. One file has one decimal sign, so the other cells of the file settle it:
`2,5` proves a decimal comma, `2.5` a decimal point, `1,234.5` both signs at once. Where nothing settles it, nothing is
guessed.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgrad.data.words import count

_WORDS = "na n/a n.a. #n/a #na <na> nan nat null (null) none nil missing (blank) ? ?? . .. ... - -- --- – —"
_ERRORS = "#value! #div/0! #ref! #num! #name? #null!"
MISSING = frozenset({"", *_WORDS.split(), *_ERRORS.split()})
"""Cells that stand for a missing value, in lower case; the empty cell is one."""

_GROUPS = " '’\u00a0\u202f"
"""Signs between groups of three digits that cannot be a decimal sign."""
_MONEY = "$€£¥₹"
_NUMBER = re.compile(
    rf"(?P<sign>[+\-−]?) ?(?P<before>[{_MONEY}]?) ?(?P<inner>[+\-−]?)"
    rf"(?P<body>[0-9](?:[0-9.,{_GROUPS}]*[0-9.,])?|[.,][0-9]+)"
    rf"(?P<exponent>[eE][+\-−]?[0-9]+|[dD][+\-−][0-9]+)?"
    rf"[ \u00a0\u202f]?(?P<after>[%‰{_MONEY}]|[^\W\d_][\w²³°µ/]*|°[CF]?)?"
)
_PLAIN = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_THREES = re.compile(rf"[0-9]{{1,3}}(?:(?P<by>[{_GROUPS}])[0-9]{{3}})(?:(?P=by)[0-9]{{3}})*(?P<rest>[.,][0-9]*)?")
_MONTH = "(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_CLOCK = r"\d{1,2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?(?: ?[ap]m)?"
_DATE = re.compile(
    rf"(?:\d{{4}}[-/.]\d{{1,2}}(?:[-/.]\d{{1,2}})?|\d{{1,2}}[-/.]\d{{1,2}}[-/.]\d{{2,4}}"
    rf"|\d{{1,2}}[-. ]+{_MONTH}[-,. ]*\d{{2,4}}|{_MONTH}[-. ]+\d{{1,2}},? +\d{{4}}|{_MONTH}[-. ]+\d{{4}}"
    rf"|\d{{4}}[-. ]+{_MONTH}(?:[-. ]+\d{{1,2}})?)"
    rf"(?:[T ]+{_CLOCK})?(?: ?(?:z|utc|[+-]\d{{2}}:?\d{{2}}))?|{_CLOCK}",
    re.IGNORECASE,
)


class Number(NamedTuple):
    """One cell that is a number in some notation."""

    sign: str
    body: str
    """Digits with their points and commas; other signs between groups of three are gone."""
    exponent: str
    marks: tuple[str, str]
    """What stands before and behind: a currency, a percent sign, a unit."""
    proves: str
    """'.' or ',' if the cell is a number with this decimal sign only; 'either.' or 'either,' if the sign in it may be
    the decimal one or part groups of three digits; '' if it has neither."""


class Notation(NamedTuple):
    """How the numbers of a file are written."""

    decimal: str
    thousands: str
    why: str
    """How it is known."""


def is_missing(cell: str) -> bool:
    return cell.lower() in MISSING


def number(cell: str) -> Number | None:
    """The number in a cell, in whatever notation, or None."""
    found = _NUMBER.fullmatch(cell)
    if found is None or (found["sign"] and found["inner"]):
        return None
    body, exponent = found["body"], found["exponent"] or ""
    if any(sign in body for sign in _GROUPS):
        threes = _THREES.fullmatch(body)
        if threes is None:
            return None
        body = body.replace(threes["by"], "")
        proves = threes["rest"][0] if threes["rest"] else ""
    else:
        proves = _proves(body, exponent)
        if proves is None:
            return None
    sign = "-" if (found["sign"] or found["inner"]) in ("-", "−") else ""
    return Number(
        sign,
        body,
        exponent.lower().replace("−", "-").replace("d", "e"),
        (found["before"], found["after"] or ""),
        proves,
    )


def _proves(body: str, exponent: str) -> str | None:
    """See `Number.proves`; None if the points and commas make no number."""
    commas, points = body.count(","), body.count(".")
    if commas == points == 0:
        return ""
    if commas + points == 1:
        sign = "," if commas else "."
        whole, part = body.split(sign)
        if sign == "," and not part:
            return None
        may_group = len(part) == 3 and 1 <= len(whole) <= 3 and whole[0] != "0" and not exponent
        return f"either{sign}" if may_group else sign
    decimal = "." if commas > 1 or (commas and points and body.rfind(".") > body.rfind(",")) else ","
    return decimal if _value(body, decimal, "," if decimal == "." else ".") is not None else None


def _value(body: str, decimal: str, thousands: str) -> str | None:
    """The digits as Python writes them, or None if they are not written so."""
    whole, _, part = body.partition(decimal)
    if thousands in whole:
        groups = whole.split(thousands)
        threes = len(groups[0]) in (1, 2, 3) and all(len(group) == 3 for group in groups[1:])
        lakhs = len(groups) > 2 and len(groups[0]) in (1, 2) and {len(g) for g in groups[1:-1]} == {2}
        if not ((threes or (lakhs and len(groups[-1]) == 3)) and groups[0][0] != "0"):
            return None
        whole = "".join(groups)
    digits = f"{whole or '0'}.{part or '0'}"
    return digits if digits.replace(".", "", 1).isdigit() else None


def plain_numbers(cells: Sequence[str]) -> np.ndarray | None:
    """float64 if every cell is a finite number as Python and C write it, or None: the quick way."""
    try:
        if "\n".join(cells).encode("ascii").translate(None, b"0123456789+-.eE\n"):
            return None
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


class Numbers(NamedTuple):
    """A column of numbers whose notation is not settled yet."""

    which: np.ndarray
    """For each row, which of the distinct cells it holds."""
    cells: list[str]
    """The distinct cells."""
    parsed: list[Number]

    def first(self, proves: str) -> str | None:
        """The first distinct cell that proves it."""
        return next((c for c, n in zip(self.cells, self.parsed, strict=True) if n.proves == proves), None)


class Bad(ValueError):
    """A cell that makes its column unusable: `column NAME` goes in front, and where `row` is, its line."""

    def __init__(self, words: str, row: int | None = None):
        super().__init__(words)
        self.row = row


def judge(cells: Sequence[str]) -> np.ndarray | Numbers | list[str]:
    """The column as float64, as `Numbers`, or as text (the cells themselves).

    Raises Bad: missing or infinite values, numbers mixed with text, numbers with different signs, dates.
    """
    plain = plain_numbers(cells)
    if plain is not None:
        return plain
    number_of: dict[str, int] = {}
    index = np.array([number_of.setdefault(cell, len(number_of)) for cell in cells])
    distinct = list(number_of)
    parsed = [number(cell) for cell in distinct]
    # '-' beside '+' is a sign, as in the classes of some data sets.
    missing = [is_missing(cell) and not (cell == "-" and "+" in number_of) for cell in distinct]
    tokens = [cell for cell, so in zip(distinct, missing, strict=True) if so]
    if len(tokens) == len(distinct):
        raise Bad(f"holds nothing but {', '.join(repr(token) for token in tokens)}: leave it out (drop=)")
    if tokens:
        rows = np.flatnonzero(np.array(missing)[index])
        cell = cells[rows[0]]
        names = [repr(token) for token in tokens if token]
        among = f"; its missing values are written {', '.join(names)}" if len(tokens) > 1 and names else ""
        some = ", ".join(str(row + 1) for row in rows[:5]) + (", ..." if len(rows) > 5 else "")
        raise Bad(
            f"is {repr(cell) if cell else 'empty'} ({count(len(rows), 'such cell')} in this column, a missing value"
            f"{among}; data rows {some}); every value must be there: drop those rows, fill them in, or leave the "
            f"column out (drop=)" + ("" if not names else "; text= takes the word as a value of its own"),
            int(rows[0]),
        )
    unit = [n is not None and n.marks[1][:1].isalpha() for n in parsed]
    numeric = [n is not None and not u for n, u in zip(parsed, unit, strict=True)]
    infinite = [cell.lower().lstrip("+-") in ("inf", "infinity") for cell in distinct]
    if any(infinite) and all(a or b for a, b in zip(numeric, infinite, strict=True)):
        rows = np.flatnonzero(np.array(infinite)[index])
        raise Bad(
            f"is {cells[rows[0]]!r} ({count(len(rows), 'such cell')} in this column); every number must be there and "
            "finite: drop those rows or fill them in",
            int(rows[0]),
        )
    if all(numeric):
        return _same_signs(Numbers(index, distinct, [n for n in parsed if n is not None]))
    if any(numeric):
        _refuse_mixture(cells, index, distinct, numeric)
    if all(unit):
        _refuse_units(distinct, [n for n in parsed if n is not None])
    dates = sum(_DATE.fullmatch(cell) is not None for cell in distinct)
    if dates == len(distinct):
        raise Bad(
            f"holds dates or times (such as {distinct[0]!r}), which are no numbers: turn them into numbers (days since "
            "the first, the month), or leave the column out (drop=); text= takes each as a word"
        )
    return list(cells)


def _same_signs(column: Numbers) -> Numbers:
    marks = {n.marks: cell for cell, n in zip(column.cells, column.parsed, strict=True)}
    if len(marks) > 1:
        one, other = list(marks.values())[:2]
        raise Bad(
            f"writes its numbers in more than one way ({one!r} and {other!r}): give all the same sign or unit, or none"
        )
    return column


def _refuse_mixture(cells: Sequence[str], index: np.ndarray, distinct: list[str], numeric: list[bool]) -> None:
    is_number = np.array(numeric)[index]
    numbers, texts = int(is_number.sum()), int((~is_number).sum())
    row = int(np.argmin(is_number))
    ways = "make it one or the other, leave the column out (drop=), or take all of it as text (text=)"
    if numbers > texts:
        raise Bad(
            f"is {cells[row]!r}, but most of the column is numbers ({count(numbers, 'number')}, "
            f"{count(texts, 'cell')} of text): {ways}",
            row,
        )
    example = next(cell for cell, so in zip(distinct, numeric, strict=True) if so)
    raise Bad(
        f"mixes text (such as {cells[row]!r}, {count(texts, 'cell')}) with numbers (such as {example!r}, "
        f"{count(numbers, 'cell')}): {ways}"
    )


def _refuse_units(distinct: list[str], parsed: list[Number]) -> None:
    """Numbers that all have the same word behind them; two of them are two levels either way."""
    units = {n.marks[1] for n in parsed}
    if len(units) == 1 and len(distinct) > 2:
        raise Bad(
            f"holds numbers with {units.pop()!r} behind them (such as {distinct[0]!r}): take it off, so that they are "
            "numbers; or take them as text (text=), or leave the column out (drop=)"
        )


def settle(
    columns: Iterable[tuple[str, Numbers]],
    delimiter: str,
    decimal: str | None,
    thousands: str | None,
) -> Notation:
    """The notation of a file's numbers, from all its columns of numbers (by name) that are not plain.

    A plain column comes too if it holds a point and any other column holds a comma. Raises ValueError where the
    columns contradict each other, or nothing settles a sign that has two readings.
    """
    if decimal is None and thousands in (".", ","):
        decimal = "," if thousands == "." else "."
    if decimal is not None:
        return Notation(decimal, thousands or (",." if decimal == "." else ".,")[0], "as asked for")
    columns = list(columns)
    seen = {
        sign: next(((name, cell) for name, column in columns if (cell := column.first(sign)) is not None), None)
        for sign in (".", ",", "either.", "either,")
    }
    ask = "say decimal=',' or decimal='.'"
    point, comma = seen["."], seen[","]
    if point and comma:
        raise ValueError(
            f"column {comma[0]!r} is written with a decimal comma ({comma[1]!r}) but column {point[0]!r} with a "
            f"decimal point ({point[1]!r}); write both in one way, or leave one out (drop=) or take it as text (text=)"
        )
    if comma:
        return Notation(",", thousands or ".", f"decimal comma, as {comma[1]!r} in column {comma[0]!r} shows")
    either = seen["either,"]
    if either and not point and delimiter != ",":
        raise ValueError(
            f"column {either[0]!r} holds {either[1]!r}, whose comma may be a decimal comma or part thousands; nothing "
            f"else in the file tells which: {ask}"
        )
    either = seen["either."]
    if either and not point and delimiter != ",":
        raise ValueError(
            f"column {either[0]!r} holds {either[1]!r}, whose point may be a decimal point or part thousands; nothing "
            f"else in the file tells which: {ask}"
        )
    return Notation(
        ".", thousands or ",", f"decimal point, as {point[1]!r} in column {point[0]!r} shows" if point else ""
    )


def convert(column: Numbers, notation: Notation) -> tuple[np.ndarray, str]:
    """`(float64, what was done to the cells)`. Raises Bad where a cell is not written in the notation."""
    values = np.empty(len(column.cells))
    for i, (cell, n) in enumerate(zip(column.cells, column.parsed, strict=True)):
        digits = _value(n.body, notation.decimal, notation.thousands)
        if digits is None:
            raise Bad(
                f"is {cell!r}, which is no number with decimal={notation.decimal!r} and "
                f"thousands={notation.thousands!r} ({notation.why or 'the usual notation'}): write it so, take the "
                "column as text (text=), or leave it out (drop=)",
                int(np.argmax(column.which == i)),
            )
        values[i] = float(n.sign + digits + n.exponent)
    if not np.isfinite(values).all():
        worst = column.cells[int(np.argmin(np.isfinite(values)))]
        raise Bad(f"holds {worst!r}, which is too large for a number")
    said = []
    before, after = column.parsed[0].marks
    if before or after:
        said.append(f"{(before or after)!r} was taken off each number")
    signs = {n.proves[-1:] for n in column.parsed}
    if notation.decimal in signs and notation.decimal == ",":
        said.append(f"a comma is the decimal sign ({notation.why})")
    if notation.thousands in signs or any(set(cell) & set(_GROUPS) for cell in column.cells):
        example = next(
            (c for c, n in zip(column.cells, column.parsed, strict=True) if notation.thousands in n.body),
            max(column.cells, key=len),
        )
        said.append(f"{example!r} was read as {values[column.cells.index(example)]:.15g}")
    return values[column.which], "; ".join(said)


def resemble_numbers(levels: Sequence[str]) -> bool:
    """Whether every one of these texts begins as a number does."""
    return all(re.match(rf"[(<>~≈]?[+\-−]?[{_MONEY}]?\.?[0-9]", level) for level in levels)


def as_numbers(cells: Sequence[str]) -> Numbers:
    """A column that `plain_numbers` can read, cell by cell."""
    distinct = list(dict.fromkeys(cells))
    at = {cell: i for i, cell in enumerate(distinct)}
    return Numbers(np.array([at[cell] for cell in cells]), distinct, [n for c in distinct if (n := number(c))])


def shows_a_point(values: np.ndarray) -> bool:
    """Whether these numbers were surely written with a decimal point: parting thousands, it leaves three digits."""
    part = np.abs(values[values != np.floor(values)])
    thousandths = np.abs(part * 1000 - np.round(part * 1000))
    return bool(((part < 1) | (part > 1000) | (thousandths > 1e-6)).any())


def is_number(cell: str) -> bool:
    """Whether a cell looks like a number in some notation, a unit allowed."""
    return _PLAIN.fullmatch(cell) is not None or number(cell) is not None
