"""The statements of a person's file: which one stands on a line, and which values it reads.

Values are read without running any of the person's code: names, items, attributes that are stored, `.T`.
"""

import ast
import functools
import linecache
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np


class Statement(NamedTuple):
    """A statement without the statements inside it: of an `if` or a `for`, the first line."""

    file: str
    line: int
    end: int
    text: str
    """Its source on one line."""
    node: Any
    expressions: tuple[Any, ...]
    """What it evaluates: of a `for`, what it runs over; of `a[i] = ...`, also `i`."""
    names: frozenset[str]
    """Every name in it."""
    targets: tuple[Any, ...]
    """What it assigns to."""

    @property
    def key(self) -> tuple[str, int]:
        return self.file, self.line


class Unreadable(Exception):
    """A value that cannot be read without running code."""


def statements_of(file: str) -> dict[int, Statement]:
    """The statement on each line of a file; empty where there is no source."""
    lines = linecache.getlines(file)
    return _statements(file, "".join(lines)) if lines else {}


@functools.lru_cache(maxsize=64)
def _statements(file: str, source: str) -> dict[int, Statement]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return {}
    found: dict[int, Statement] = {}
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.stmt)]
    # Whole bodies first: what stands inside them takes their lines.
    for node in sorted(nodes, key=lambda n: not hasattr(n, "body")):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        made = _statement(file, source, node)
        for line in range(made.line, made.end + 1):
            if line not in found or found[line].line < made.line or hasattr(found[line].node, "body"):
                found[line] = made
    return found


def _statement(file: str, source: str, node: Any) -> Statement:
    parts = [child for child in ast.iter_child_nodes(node) if not isinstance(child, (ast.stmt, ast.excepthandler))]
    end = node.end_lineno or node.lineno
    if hasattr(node, "body"):
        end = max([getattr(p, "end_lineno", None) or node.lineno for p in parts] + [node.lineno])
    rows = source.split("\n")[node.lineno - 1 : end]
    text = " ".join(row.split("  #")[0].strip() for row in rows)
    names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    targets: list[Any] = []
    if isinstance(node, ast.Assign):
        targets = list(node.targets)
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign, ast.For, ast.AsyncFor)):
        targets = [node.target]
    read = parts if isinstance(node, ast.AugAssign) else [p for p in parts if not any(p is t for t in targets)]
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        read += [n.slice for t in targets for n in ast.walk(t) if isinstance(n, ast.Subscript)]
    expressions = tuple(p for p in read if isinstance(p, (ast.expr, ast.withitem)))
    return Statement(file, node.lineno, end, text, node, expressions, frozenset(names), tuple(targets))


def reads(statement: Statement, env: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """What the statement reads: `(source text, value)` of names, items and attributes, the longest that can be read.

    After a part of an array comes the array.
    """
    pending: list[Any] = list(reversed(statement.expressions))
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)):
            try:
                yield ast.unparse(node), peek(node, env)
                if isinstance(node, ast.Subscript) and _is_array(peek(node.value, env)):
                    pending.append(node.value)
                continue
            except Unreadable:
                pass
        pending += reversed(list(ast.iter_child_nodes(node)))


def assigned(statement: Statement, env: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    """The paths that the statement assigns to, as `watch` writes them."""
    found: set[tuple[Any, ...]] = set()
    pending = list(statement.targets)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Tuple, ast.List)):
            pending += node.elts
            continue
        steps: list[Any] = []
        try:
            while not isinstance(node, ast.Name):
                if isinstance(node, ast.Attribute):
                    steps.append(("attr", node.attr))
                elif isinstance(node, ast.Subscript):
                    steps.append(("item", peek(node.slice, env)))
                else:
                    raise Unreadable
                node = node.value
            found.add((node.id, *reversed(steps)))
        except (Unreadable, TypeError):
            continue
    return found


def peek(node: Any, env: Mapping[str, Any]) -> Any:
    """The value of an expression of names, items, stored attributes and index arithmetic."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        if node.id in env:
            return env[node.id]
        raise Unreadable
    try:
        if isinstance(node, ast.Attribute):
            return _attribute(peek(node.value, env), node.attr)
        if isinstance(node, ast.Subscript):
            return _item(peek(node.value, env), peek(node.slice, env))
        if isinstance(node, ast.Slice):
            return slice(*(None if n is None else peek(n, env) for n in (node.lower, node.upper, node.step)))
        if isinstance(node, ast.Tuple):
            return tuple(peek(n, env) for n in node.elts)
        if isinstance(node, ast.JoinedStr):
            return "".join(str(peek(n, env)) for n in node.values)
        if isinstance(node, ast.FormattedValue) and node.format_spec is None:
            return peek(node.value, env)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -_number(peek(node.operand, env))
        if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            left, right = peek(node.left, env), peek(node.right, env)
            if isinstance(left, str) and isinstance(right, str) and isinstance(node.op, ast.Add):
                return left + right
            return _ARITHMETIC[type(node.op)](_number(left), _number(right))
    except Unreadable:
        raise
    except Exception as error:  # an index that is out of range, a key that is missing
        raise Unreadable from error
    raise Unreadable


_ARITHMETIC = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}


def _is_array(value: Any) -> bool:
    return isinstance(value, (np.ndarray, jax.Array))


def _number(value: Any) -> Any:
    if isinstance(value, (int, float, np.integer)):
        return value
    raise Unreadable


def _attribute(value: Any, name: str) -> Any:
    if isinstance(value, (np.ndarray, jax.Array)):
        if name in ("T", "mT"):
            return getattr(value, name)
        raise Unreadable
    if isinstance(value, tuple) and name in getattr(value, "_fields", ()):
        return getattr(value, name)
    stored = getattr(value, "__dict__", {})
    if isinstance(value, type(ast)) or name not in stored:
        raise Unreadable
    return stored[name]


def _item(value: Any, index: Any) -> Any:
    if isinstance(value, dict) and type(value).__getitem__ is dict.__getitem__:
        if index in value:
            return value[index]
        raise Unreadable
    if isinstance(value, (list, tuple, np.ndarray, jax.Array)):
        return value[index]
    raise Unreadable
