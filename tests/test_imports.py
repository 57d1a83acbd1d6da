"""Who may import whom, read from the source with `ast`: the walls of the house.

Each rule is a function of sources, so that it can be shown to catch a source that breaks it.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxgrad

LIBRARY = Path(jaxgrad.__file__).parent
COMMAND_LINE_ONLY = {"matplotlib", "tyro", "tqdm"}


def sources():
    """Every module of the library by its dotted name, with its source; a package bears its own name."""
    found = {}
    for file in sorted(LIBRARY.rglob("*.py")):
        parts = ("jaxgrad", *file.relative_to(LIBRARY).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    return found


def imports(name, source, modules):
    """The dotted names that a module imports, wherever in it; of ours, as exactly as they can be told.

    `from jaxgrad import types` imports `jaxgrad.types`; `from jaxgrad.types import Batch` does too. Imports
    for the type checker alone are not imports.
    """
    package = name if any(other.startswith(f"{name}.") for other in modules) else name.rpartition(".")[0]
    found = set()
    for node in _running(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" if f"{stem}.{alias.name}" in modules else stem for alias in node.names}
    return found


def _running(tree):
    """Every node but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        yield from _running(node)


def graph(modules):
    """Which of our modules imports which of ours."""
    return {
        name: {other for other in imports(name, source, modules) if other in modules and other != name}
        for name, source in modules.items()
    }


def cycle(edges):
    """A cycle as a list of names, first and last the same; None where there is none."""
    done = set()

    def visit(name, path):
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        found = next((loop for other in sorted(edges[name]) if (loop := visit(other, [*path, name]))), None)
        done.add(name)
        return found

    return next((loop for name in sorted(edges) if (loop := visit(name, []))), None)


def strangers(modules):
    """`(module, import)` where the library imports the study or what belongs to command lines."""
    return [
        (name, other)
        for name, source in modules.items()
        for other in sorted(imports(name, source, modules))
        if other.split(".")[0] == "experiments"
        or (other.split(".")[0] in COMMAND_LINE_ONLY and not name.endswith(".__main__"))
    ]


def autodiff_by_hand(source):
    """What a module of derivations by hand must not use: autodiff, by any of its names."""
    names = {"grad", "value_and_grad", "vjp", "jvp", "jacfwd", "jacrev", "jacobian", "hessian", "linearize"}
    used = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in names and ast.unparse(node.value) in ("jax", "jax.ad"):
            used.add(ast.unparse(node))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            used |= {alias.name for alias in node.names} & names
    return used


MODULES = sources()


def test_the_library_has_no_import_cycle():
    assert cycle(graph(MODULES)) is None


def test_the_library_imports_neither_the_study_nor_what_draws_and_parses():
    assert strangers(MODULES) == []


def test_types_imports_nothing_of_ours():
    assert graph(MODULES)["jaxgrad.types"] == set()


def test_the_derivations_by_hand_know_neither_the_models_nor_autodiff():
    assert not {"jaxgrad.models", "jaxgrad.losses", "optax"} & imports(
        "jaxgrad.lecture", MODULES["jaxgrad.lecture"], MODULES
    )
    assert autodiff_by_hand(MODULES["jaxgrad.lecture"]) == set()


def test_importing_the_library_imports_nothing_that_only_data_and_figures_need():
    """`import jaxgrad` costs little more than `import jax`."""
    heavy = {"matplotlib", "tyro", "tqdm", "sklearn", "pandas", "mlxtend", "plotnine", "river", "experiments"}
    code = f"import sys, jaxgrad; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("planted", "loop"),
    [
        ({"jaxgrad.types": "from jaxgrad.models import linear"}, ["jaxgrad.models", "jaxgrad.types"]),
        ({"jaxgrad.types": "def late():\n    from jaxgrad import models"}, ["jaxgrad.models", "jaxgrad.types"]),
        ({"jaxgrad.types": "from . import models"}, ["jaxgrad.models", "jaxgrad.types"]),
        ({"jaxgrad.types": "import jaxgrad.models as m"}, ["jaxgrad.models", "jaxgrad.types"]),
    ],
)
def test_a_planted_cycle_is_found(planted, loop):
    assert "jaxgrad.types" in graph(MODULES)["jaxgrad.models"]
    found = cycle(graph(MODULES | planted))
    assert found is not None
    assert set(loop) <= set(found)


def test_an_import_for_the_type_checker_is_no_cycle():
    planted = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from jaxgrad import models"
    assert cycle(graph(MODULES | {"jaxgrad.types": planted})) is None


@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("def f():\n    from tqdm import tqdm", "tqdm"),
        ("from experiments import results", "experiments"),
        ("try:\n    import tyro\nexcept ImportError:\n    pass", "tyro"),
    ],
)
def test_a_planted_stranger_is_found(source, other):
    assert strangers({"jaxgrad.noise": source}) == [("jaxgrad.noise", other)]
    assert bool(strangers({"jaxgrad.check.__main__": source})) == (other == "experiments")


@pytest.mark.parametrize(
    "source", ["import jax\ng = jax.grad(f)", "from jax import vjp as v", "import jax\nh = jax.value_and_grad"]
)
def test_planted_autodiff_is_found(source):
    assert autodiff_by_hand(source)


def test_relative_imports_are_read_from_where_they_stand():
    modules = dict.fromkeys(("jaxgrad", "jaxgrad.types", "jaxgrad.check", "jaxgrad.check.replay"), "")
    assert imports("jaxgrad.check", "from .replay import x", modules) == {"jaxgrad.check.replay"}
    assert imports("jaxgrad.check", "from .. import types", modules) == {"jaxgrad.types"}
    assert imports("jaxgrad.check.replay", "from ..types import Batch", modules) == {"jaxgrad.types"}
    assert imports("jaxgrad.check.replay", "from . import steps", modules) == {"jaxgrad.check"}
