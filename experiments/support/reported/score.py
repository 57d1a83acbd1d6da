"""What a report of our checker is worth on a case, by rule.

A finding *names* a cause if its kind is one of the accepted ones, its factor is (where one is asked), and its leaf is
one that the cause makes wrong (or none, which speaks of all). A finding of the kind `unknown` or `entries` that names
no cause states none. Every other finding that names no cause is false. From this follows one word for each report:

    cause and line    every wrong leaf has its cause named, and each finding that names it points to the right line
    cause             the same, but for a line
    half              some cause is named, for some of the leaves that it makes wrong
    misleading        some finding is false: even if others are right
    entries           the entries that are off are listed, and no cause is stated
    unknown           no cause is stated
    missed            the wrong gradient is accepted
    crash             the checker raised

and for a right gradient `right`, `false alarm` or `crash`. A line is right if it belongs to the statement of the loss
that a cause names, or to a statement of the gradient where the word `wrong` stands, which marks the mistake. Where a
cause names no line, every line is.
"""

import ast
import inspect
import textwrap
from pathlib import Path
from typing import Any

from experiments.support.reported.case import Case, Cause

WRONG_OUTCOMES = ("cause and line", "cause", "half", "misleading", "entries", "unknown", "missed", "crash")
RIGHT_OUTCOMES = ("right", "false alarm", "crash")
NO_CAUSE = ("unknown", "entries")
"""Kinds of finding that state no cause."""


def outcome(case: Case, report: Any) -> str:
    """The word for this report of `jaxgrad.check.check_gradient`; None stands for a crash."""
    if report is None:
        return "crash"
    if not case.causes:
        return "right" if report.ok else "false alarm"
    if report.ok:
        return "missed"
    off = {leaf.path for leaf in report.leaves if not leaf.ok}
    named = [(cause, [f for f in report.findings if names(cause, f)]) for cause in case.causes]
    true = [f for _, findings in named for f in findings]
    if any(f.kind not in NO_CAUSE and f not in true for f in report.findings):
        return "misleading"
    if all(_for_every_leaf(cause, findings, off) for cause, findings in named):
        right_line = all(points_right(case, cause, f.where) for cause, findings in named for f in findings)
        return "cause and line" if right_line else "cause"
    if true:
        return "half"
    return "entries" if any(f.kind == "entries" for f in report.findings) else "unknown"


def names(cause: Cause, finding: Any) -> bool:
    """Whether the finding names this cause."""
    factor = not cause.factors or (finding.factor or "") in cause.factors
    leaf = not cause.leaves or finding.leaf is None or finding.leaf in cause.leaves
    return finding.kind in cause.kinds and factor and leaf


def _for_every_leaf(cause: Cause, findings: list[Any], off: set[str]) -> bool:
    leaves = {f.leaf for f in findings}
    return bool(findings) and (None in leaves or (set(cause.leaves) or off) <= leaves)


def points_right(case: Case, cause: Cause, where: str) -> bool:
    """Whether `where`, as in `linear.py:12`, is a line of the mistake."""
    if not cause.lines:
        return True
    file, _, number = where.rpartition(":")
    home = Path(inspect.getfile(case.loss)).name
    accepted = _lines(case.loss, cause.lines) | _lines(case.gradient, ("wrong",))
    return file == home and number.isdigit() and int(number) in accepted


def _lines(function: Any, pieces: tuple[str, ...]) -> set[int]:
    """The lines of the statements of a function that hold one of the pieces, its head and docstring left out."""
    source, first = inspect.getsourcelines(function)
    source = textwrap.dedent("".join(source))
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    body = tree.body[1:] if ast.get_docstring(tree) is not None else tree.body
    found: set[int] = set()
    for statement in (node for outer in body for node in ast.walk(outer) if isinstance(node, ast.stmt)):
        end = statement.end_lineno or statement.lineno
        inner = None if isinstance(statement, ast.If) else getattr(statement, "body", None)
        if inner:
            end = inner[0].lineno - 1  # of a loop or an inner function, the head
        lines = range(statement.lineno, end + 1)
        text = "\n".join(source.splitlines()[line - 1] for line in lines)
        if any(piece in text for piece in pieces):
            found |= set(lines)
    return {first - 1 + line for line in found}
