"""What became of each column of a person's own file: a table for the screen before the run, and one for the report."""

import html
import re
from collections.abc import Iterator, Sequence

from jaxgrad.data import Column, Dataset

MOST = 60
"""More columns than this are counted and not listed, but for those that are no plain feature."""


def screen(dataset: Dataset, file: str) -> Iterator[str]:
    """The lines to print: every column with its kind, what was done and why; then notes on the whole."""
    n, d = dataset.batch.x.shape
    yield f"{_line(file)}: {n:,} rows, {d:,} {'feature' if d == 1 else 'features'}, {dataset.task}; the columns:"
    shown, rest = _shown(dataset.columns)
    rows = [(_line(c.name), c.kind, c.done) for c in shown]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)] if rows else []
    for column, row in zip(shown, rows, strict=True):
        cells = "  ".join(f"{cell:<{min(width, 40)}}" for cell, width in zip(row, widths, strict=True))
        yield f"  {cells}  {_line(_levels(column) + column.why, 160)}".rstrip()
        if column.doubt:
            yield f"  ! {_line(column.name)} {_line(column.doubt, 160)}"
    if rest:
        yield f"  and {rest:,} more columns of numbers, each a feature"
    told = tuple(f"column {c.name!r}" for c in dataset.columns)
    for note in dataset.notes:
        if not note.startswith((*told, "text column", "dropped", "target ")):
            yield f"  {_line(note, 200)}"


def markdown(columns: Sequence[Column]) -> str:
    """The same as a Markdown table, in which no name means anything to Markdown or HTML."""
    lines = ["| column | kind | levels | what was done | why |", "|---|---|---|---|---|"]
    shown, rest = _shown(columns)
    for column in shown:
        doubt = f"**probably a mistake: {escaped(column.doubt)}**" if column.doubt else ""
        why = "; ".join(part for part in (escaped(column.why), doubt) if part)
        levels = ", ".join(map(escaped, column.levels))
        lines.append(f"| {escaped(column.name)} | {column.kind} | {levels} | {escaped(column.done)} | {why} |")
    if rest:
        lines.append(f"| {rest:,} more | number | | feature | |")
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Text that Markdown and HTML show as it is: every sign that could mean something is escaped."""
    words = html.escape(" ".join(_printable(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()#+!|~$^])", r"\\\1", words)


def _shown(columns: Sequence[Column]) -> tuple[list[Column], int]:
    ordinary = [c.kind == "number" and c.done == "feature" and not (c.why or c.doubt) for c in columns]
    if len(columns) <= MOST:
        return list(columns), 0
    return [c for c, so in zip(columns, ordinary, strict=True) if not so], sum(ordinary)


def _levels(column: Column) -> str:
    if not column.levels:
        return ""
    some = ", ".join(column.levels[:5]) + (", ..." if len(column.levels) > 5 else "")
    return f"{len(column.levels)} levels ({some}); "


def _printable(text: str) -> str:
    return "".join(sign if sign.isprintable() else " " for sign in text)


def _line(text: str, most: int = 40) -> str:
    """One printable line, cut where it is long."""
    words = " ".join(_printable(text).split())
    return words if len(words) <= most else words[: most - 3] + "..."
