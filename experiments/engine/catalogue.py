"""What experiments there are, read from their sources and not imported: a command line is refused before JAX loads."""

import ast
from pathlib import Path
from typing import NamedTuple

import experiments


class Entry(NamedTuple):
    """What can be known of an experiment without importing it."""

    name: str
    headline: str
    """The first line of its docstring."""
    fields: tuple[str, ...]
    """The names of its settings, the fields of its `Config`."""
    timed: bool
    """Whether it measures seconds (`TIMED = True`): such experiments do not run together."""
    in_parallel: bool
    """Whether it spreads over processes and devices, and saves itself as it goes (`IN_PARALLEL = True`)."""


def catalogue() -> dict[str, Entry]:
    """Every experiment by name, in the order in which they run, read from the source and not imported."""
    files = [file for folder in experiments.__path__ for file in Path(folder).glob("*.py")]
    found = {entry.name: entry for file in files if (entry := _entry(file))}
    names = [name for name in experiments.ORDER if name in found] + sorted(set(found) - set(experiments.ORDER))
    return {name: found[name] for name in names}


def _entry(file: Path) -> Entry | None:
    tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    defined = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
    config = defined.get("Config")
    if not (isinstance(config, ast.ClassDef) and isinstance(defined.get("run"), ast.FunctionDef)):
        return None
    fields = (node.target for node in config.body if isinstance(node, ast.AnnAssign))
    flags = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)}
    return Entry(
        file.stem,
        (ast.get_docstring(tree) or file.stem).splitlines()[0],
        tuple(field.id for field in fields if isinstance(field, ast.Name)),
        "TIMED = True" in flags,
        "IN_PARALLEL = True" in flags,
    )
