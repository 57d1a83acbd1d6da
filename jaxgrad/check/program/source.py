"""From a step of a program to a place in the person's file, and the text that stands there."""

import ast
import linecache
import os
from collections.abc import Sequence
from typing import NamedTuple

from jaxgrad.check.program.steps import Place, Program


class Where(NamedTuple):
    """Where a step is written."""

    where: str
    """`file.py:12`, or the empty string where JAX kept no source."""
    expression: str
    """The source text of the step."""
    statement: str
    """The statement it stands in, on one line."""
    line: int

    @property
    def step(self) -> str:
        """The step and its place, in a sentence; the place alone where the source is not known."""
        return f"`{self.expression}` ({self.where})" if self.expression else self.where

    @property
    def whole(self) -> str:
        """The same with the whole statement, unless that is long."""
        text = self.statement if 0 < len(self.statement) <= LONGEST else self.expression
        return self._replace(expression=text).step


LONGEST = 160
"""A statement with more characters is not quoted: a table of functions, say."""


def locate(program: Program, members: Sequence[int], elementwise: bool = False) -> Where:
    """The place of the steps `members`, the last of which makes the value.

    Steps on one line share their innermost frame. Steps on several lines of one function are placed at the
    last. An elementwise helper of the person's own (`sigmoid(z)` written out in a `def`) is placed where it
    is called, because that is the line of the derivation.
    """
    stacks = [program.steps[k].frames[::-1] for k in members if program.steps[k].frames]
    if not stacks:
        return Where("", "", "", 0)
    last = stacks[-1]
    depth = 0
    while all(len(s) > depth + 1 and s[: depth + 1] == last[: depth + 1] for s in stacks) and len(last) > depth + 1:
        depth += 1
    if elementwise and depth > 0:
        # The helper's other steps in this call would stand right before or after; in a loop the same call
        # comes again, further away.
        prefix = last[:depth]
        around = range(max(0, min(members) - 1), min(len(program.steps), max(members) + 2))
        instance = {k for k in around if program.steps[k].frames[::-1][:depth] == prefix}
        if instance <= set(members):
            depth -= 1
    return describe(last[depth])


def describe(place: Place) -> Where:
    """The text at a place: the exact expression where columns are known, else the whole line."""
    where = f"{os.path.basename(place.file)}:{place.line}"
    lines = linecache.getlines(place.file)
    if not lines or place.line > len(lines):
        return Where(where, "", "", place.line)
    statement = _statement(place.file, place.line)
    if place.end_line == place.line and place.end_column <= place.column:
        return Where(where, statement, statement, place.line)
    chunk = lines[place.line - 1 : place.end_line]
    encoded = [line.encode() for line in chunk]  # columns count bytes
    encoded[-1] = encoded[-1][: place.end_column]
    encoded[0] = encoded[0][place.column :]
    text = " ".join(part.decode(errors="replace").strip() for part in encoded)
    return Where(where, _tidy(text), statement, place.line)


def _tidy(text: str) -> str:
    for bracket in "([{":
        text = text.replace(bracket + " ", bracket)
    for bracket in ")]}":
        text = text.replace(" " + bracket, bracket).replace("," + bracket, bracket)
    return text


_STATEMENTS: dict[str, tuple[tuple[float, int], list[tuple[int, int]]]] = {}


def _statement(file: str, line: int) -> str:
    """The smallest simple statement around a line, as one line of text."""
    lines = linecache.getlines(file)
    stamp = (float(len(lines)), hash("".join(lines)))
    if file not in _STATEMENTS or _STATEMENTS[file][0] != stamp:
        spans: list[tuple[int, int]] = []
        try:
            for node in ast.walk(ast.parse("".join(lines))):
                if isinstance(node, ast.stmt) and not hasattr(node, "body"):
                    spans.append((node.lineno, node.end_lineno or node.lineno))
        except SyntaxError:
            spans = []
        _STATEMENTS[file] = (stamp, spans)
    around = [s for s in _STATEMENTS[file][1] if s[0] <= line <= s[1]]
    first, last = min(around, key=lambda s: s[1] - s[0]) if around else (line, line)
    text = " ".join(part.split("  #")[0].strip() for part in lines[first - 1 : last])
    return _tidy(text)
