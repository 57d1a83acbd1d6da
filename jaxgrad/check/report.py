"""What the checker says: data, and the text of it."""

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Finding(NamedTuple):
    """One mistake in a derivation."""

    kind: str
    """`sign`, `scale`, `transposed`, `swapped-leaves`, `missing-derivative`, `extra-derivative`,
    `wrong-argument`, `wrong-derivative`, `missing-factor`, `wrong-value`, `missing-term`, `negated-term`,
    `scaled-term`, `additive`, `entries`, `kink`, `unstable`, `structure`, `broadcast` (the loss itself spreads what
    it should not), `conjugated`, `update-step`, `inexact` or `unknown`."""
    leaf: str | None
    """The path of the one leaf it is about, or None: all of them."""
    factor: str | None
    """An exact form (`"n"`, `"1/2"`, `"-1"`, `"1/log(2)"`), a decimal, or None."""
    where: str
    """`file.py:12`, or empty where no line of the loss is meant."""
    expression: str
    """The source text of that step."""
    sentence: str
    """The mistake in the words of the derivation."""
    equivalents: tuple[str, ...] = ()
    """Other faults that give the same numbers at every point tried."""


def place(file: str, line: int) -> str:
    """A line as Python's own messages name it: a cell of a notebook has a number, and no file worth naming."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    compiler = getattr(shell, "compile", None)
    try:
        kind, cell = compiler.format_code_name(file) or ("", "")  # type: ignore[union-attr]
    except Exception:  # no notebook, or one of another make
        kind = cell = ""
    if kind == "Cell":
        return f"Cell {cell}, line {line}"
    return f"{os.path.basename(file)}:{line}"


class WrongLine(NamedTuple):
    """The first line of the person's gradient that makes a wrong value; `follow` says how that is shown."""

    file: str
    line: int
    text: str
    """The statement, on one line."""
    variable: str
    """What it makes, as the person writes it."""
    expected: str
    """What that should be."""
    leaves: tuple[str, ...]
    """The leaves of the gradient that are right once it is."""
    sentence: str
    certain: bool = True
    """Whether it is this line, and not one that makes what it reads."""
    origin: int | None = None
    """The value of the loss (its slot) whose adjoint is the first that has a wrong factor, where that is shown."""

    @property
    def where(self) -> str:
        """`file.py:12`, or `Cell In[6], line 5` in a notebook."""
        return place(self.file, self.line)


class Leaf(NamedTuple):
    """How one leaf of the gradient compares with autodiff, at the point where it is furthest off."""

    path: str
    shape: tuple[int, ...]
    ok: bool
    error: float
    """Norm of the difference over the norm of the true leaf."""
    cosine: float
    ratio: float
    """Norm of yours over norm of the true one, with the sign of the cosine when that is ±1."""
    worst: tuple[int, ...]
    """Index of the entry that is furthest off."""
    yours: float | complex
    true: float | complex
    point: str


class Tried(NamedTuple):
    """A point at which the gradients were compared."""

    name: str
    n: int | None
    loss: float
    error: float
    """The largest relative error of any leaf there (nan: not finite)."""


class Report(NamedTuple):
    """The verdict on a gradient: `ok`, how far each leaf is off, and why.

    It counts as true where the gradient is right: `assert check_gradient(...)` fails on a wrong one.
    """

    ok: bool
    leaves: tuple[Leaf, ...]
    findings: tuple[Finding, ...]
    smallest_detectable: float
    """The smallest relative error of a leaf that would have been noticed."""
    points: tuple[Tried, ...]
    notes: tuple[str, ...] = ()
    """What else is worth knowing: what could not be tried, what the loss itself does wrong."""
    truth: str = "autodiff"
    """What the gradient was compared with: `autodiff`, `complex steps` or `central differences`."""
    of: str = "this loss"
    """What it should be the gradient of."""
    first_wrong_line: WrongLine | None = None
    """Where in the gradient's own code the numbers first part from the truth, where that could be shown."""

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return text(self, color=colored())


_CODES = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}


def colored() -> bool:
    """Whether standard output is a terminal that wants colour."""
    stream = sys.stdout
    return bool(getattr(stream, "isatty", lambda: False)()) and "NO_COLOR" not in os.environ


def painter(color: bool):
    return lambda what, *styles: (
        f"\x1b[{';'.join(_CODES[s] for s in styles)}m{what}\x1b[0m" if color and styles else str(what)
    )


def text(report: Report, color: bool = False) -> str:
    """The report as a person would say it; at most some thirty lines of 100 characters."""
    paint = painter(color)
    lines: list[str] = []
    sizes = sorted({p.n for p in report.points if p.n is not None})
    tried = f"{len(report.points)} points"
    if len(sizes) > 1:
        tried += f", batches of {_join(sizes)}"
    if report.ok:
        worst = max((p.error for p in report.points if np.isfinite(p.error)), default=0.0)
        digits = "exactly" if worst == 0 else f"to {max(0, int(-np.log10(worst)))} digits"
        lines.append(
            paint("RIGHT", "green", "bold") + f"  Your gradient agrees with {report.truth} {digits} ({tried})."
        )
        lines.append(f"       An error of {report.smallest_detectable:.0e} in any leaf would have been seen.")
        for finding in report.findings:
            lines += ["", *finding_lines(finding, paint)]
    else:
        wrong = [leaf for leaf in report.leaves if not leaf.ok]
        total = len(report.leaves)
        if wrong and total > 1:
            names = _join([leaf.path for leaf in wrong])
            which = "every leaf" if len(wrong) == total else f"{names} ({len(wrong)} of {total} leaves)"
            head = f"Your gradient is not the gradient of {report.of} in {which}."
        else:
            head = f"Your gradient is not the gradient of {report.of}."
        kinds = {f.kind for f in report.findings}
        if kinds == {"structure"}:
            head = "Your gradient cannot be compared with the parameters."
        elif kinds == {"unstable"}:
            head = "Your gradient is right on paper and fails in floating point."
        lines.append(paint("WRONG", "red", "bold") + f"  {head}")
        for number, finding in enumerate(report.findings):
            if number == 1 and len(report.findings) > 1:
                lines.append("")
                lines.append("And besides:")
            lines += ["", *finding_lines(finding, paint)]
        if report.first_wrong_line is not None:
            lines += ["", *_wrong_line(report.first_wrong_line, paint)]
    if report.leaves and not report.ok:
        lines += ["", *_table(report.leaves, paint)]
    lines += note_lines(report.notes)
    return "\n".join(lines)


def note_lines(notes: Sequence[str]) -> list[str]:
    """Notes below a report, after an empty line."""
    return ["", *(line for note in notes for line in _wrap("Note: " + note, 2))] if notes else []


def finding_lines(finding: Finding, paint) -> list[str]:
    head = paint(finding.kind, "yellow", "bold")
    if finding.leaf is not None:
        head += f" in leaf {paint(finding.leaf, 'bold')}"
    if finding.factor is not None:
        head += f", factor {paint(finding.factor, 'bold')}"
    lines = ["  " + head]
    if finding.where:
        lines.append(f"  {paint(finding.where, 'dim')}" + (f":  {finding.expression}" if finding.expression else ""))
    lines += _wrap(finding.sentence, 4)
    for other in finding.equivalents[:3]:
        lines += _wrap("The same numbers would come from this: " + other, 4)
    return lines


def _wrong_line(line: WrongLine, paint) -> list[str]:
    """The person's own line, marked, and what is wrong with it."""
    what = "In your code this is the first wrong line:" if line.certain else "In your code it begins here:"
    return ["  " + what, f"  {paint(line.where, 'dim')}:  {paint(line.text, 'bold')}", *_wrap(line.sentence, 4)]


def _table(leaves: Sequence[Leaf], paint) -> list[str]:
    width = max(4, *(len(leaf.path) for leaf in leaves))
    head = f"  {'leaf':<{width}}  {'rel. error':>10}  {'cosine':>7}  {'ratio':>9}  worst entry: yours, true"
    lines = [paint(head, "dim")]
    for leaf in leaves[:12]:
        index = "[" + ", ".join(map(str, leaf.worst)) + "]" if leaf.worst else ""
        entry = f"{index} {leaf.yours:.6g}, {leaf.true:.6g}".strip()
        row = f"  {leaf.path:<{width}}  {leaf.error:>10.1e}  {leaf.cosine:>7.4f}  {leaf.ratio:>9.4g}  "
        lines.append(row + (entry if not leaf.ok else paint("right", "green")))
    if len(leaves) > 12:
        lines.append(f"  ... and {len(leaves) - 12} more leaves")
    return lines


def _wrap(sentence: str, indent: int, width: int = 100) -> list[str]:
    import textwrap

    pad = " " * indent
    out: list[str] = []
    for paragraph in sentence.split("\n"):
        out += textwrap.wrap(paragraph, width, initial_indent=pad, subsequent_indent=pad, break_long_words=False) or [
            pad
        ]
    return out


def _join(items: Sequence[object]) -> str:
    words = [str(item) for item in items]
    if len(words) > 5:
        words = [*words[:4], f"{len(words) - 4} more"]
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]
