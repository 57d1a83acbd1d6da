"""Who may import whom, read from the source with `ast`: the walls of the house.

Each rule is a function of sources, so that it can be shown to catch a source that breaks it.
"""

import ast
import functools
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import experiments
import jaxgrad
from experiments.engine.catalogue import catalogue

LIBRARY = Path(jaxgrad.__file__).parent
HOUSE = Path(experiments.__file__).parent
COMMAND_LINE_ONLY = {"matplotlib", "tyro", "tqdm"}
DRAWS = {"jaxgrad.descent.picture"}
"""Modules that draw when they are asked to, and import matplotlib only then."""


def sources(package):
    """Every module in the folder of a package by its dotted name, with its source; a package bears its own name."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = (package.name, *file.relative_to(package).with_suffix("").parts)
        found[".".join(parts).removesuffix(".__init__")] = file.read_text(encoding="utf-8")
    return found


def imports(name, source, modules):
    """The dotted names that a module imports, wherever in it; of ours, as exactly as they can be told.

    `from jaxgrad import types` imports `jaxgrad.types`; `from jaxgrad.types import Batch` does too. Imports
    for the type checker alone are not imports.
    """
    package = name if any(other.startswith(f"{name}.") for other in modules) else name.rpartition(".")[0]
    found = set()
    for node in _statements(source):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        else:
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" if f"{stem}.{alias.name}" in modules else stem for alias in node.names}
    return found


@functools.cache
def _statements(source):
    """The import statements of a source; each source is parsed once."""
    return [node for node in _running(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]


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
        or (other.split(".")[0] in COMMAND_LINE_ONLY and not name.endswith(".__main__") and not _draws(name, other))
    ]


def _draws(name, other):
    return name in DRAWS and other.split(".")[0] == "matplotlib"


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


MODULES = sources(LIBRARY)
ROOMS = sources(HOUSE)
STUDIES = {name for name in ROOMS if name.count(".") == 1 and f"{name}.__init__" not in ROOMS} - {
    "experiments.__main__",
    "experiments.engine",
    "experiments.support",
    "experiments.recorded",
}
OPEN_TO_STUDIES = {f"experiments.engine.{room}" for room in ("kinds", "machine", "plots", "results", "session")} | {
    "experiments.recorded.tables"
}


LAST_LINES = """

if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
"""
"""What every study ends with, so that its file can be run."""


def room(name):
    """`engine`, `support` or `recorded`; `study` for a study, and `door` for what stands at the top of the package."""
    if name in STUDIES:
        return "study"
    return name.split(".")[1] if name.count(".") > 1 else "door"


def may_import(name, other):
    """Whether a module of the study may import another one of the study."""
    if room(name) == "study":
        return room(other) == "support" or other in OPEN_TO_STUDIES
    if room(name) == "engine":
        return room(other) == "engine" or other == "experiments"
    if room(name) == "support":
        return room(other) == "support" or other in OPEN_TO_STUDIES
    if room(name) == "recorded":
        return room(other) in ("recorded", "support", "engine")
    return room(other) != "study" if name == "experiments.__main__" else False


def trespasses(modules):
    """`(module, import)` where one room of the study enters another that is closed to it."""
    return [
        (name, other)
        for name, others in graph({name: source.removesuffix(LAST_LINES) for name, source in modules.items()}).items()
        for other in sorted(others)
        if not may_import(name, other)
    ]


ROOMS_OF_CHECK = (
    {"report"}, {"program"}, {"evaluate"}, {"patterns"}, {"faults", "numerics", "follow"}, {"sentences"}, {"clues"},
    {"search"}, {"gradient"}, {"backprop", "vjp"}, {"__main__", "face"},
)  # fmt: skip
"""Each room of the checker uses its own modules, and those of the rooms before it."""


def against_the_order(modules):
    """`(module, import)` where a room of the checker uses one beside it or after it."""
    rank = {name: i for i, rooms in enumerate(ROOMS_OF_CHECK) for name in rooms}
    of = lambda name: name.split(".")[2] if name.count(".") > 1 else "face"
    inside = {name: source for name, source in modules.items() if f"{name}.".startswith("jaxgrad.check.")}
    return [
        (name, other)
        for name, others in graph(inside).items()
        for other in sorted(others)
        if of(name) != of(other) and not rank[of(other)] < rank[of(name)]
    ]


def behind_a_face(modules):
    """`(module, import)` where somebody outside the library reaches behind one of its packages.

    `jaxgrad.theory` has no face of its own: its modules are what a study names.
    """
    packages = {name for name in MODULES if any(other.startswith(f"{name}.") for other in MODULES)}
    closed = tuple(f"{name}." for name in packages - {"jaxgrad", "jaxgrad.theory"})
    return [
        (name, other)
        for name, source in modules.items()
        for other in sorted(imports(name, source, modules | MODULES))
        if other.startswith(closed)
    ]


FACES = ("jaxgrad.data", "jaxgrad.descent", "jaxgrad.means", "jaxgrad.parallel")
"""Packages of the library whose modules only they themselves import."""


def behind_a_face_within(modules):
    """`(module, import)` where a module of the library reaches behind the face of a package that is not its own."""
    return [
        (name, other)
        for name, source in modules.items()
        for other in sorted(imports(name, source, modules))
        for face in FACES
        if other.startswith(f"{face}.") and name != face and not name.startswith(f"{face}.")
    ]


def blocks_of_code(markdown):
    """The Python blocks of a Markdown text, as modules by their number."""
    found = re.findall(r"^```python\n(.*?)^```", markdown, flags=re.DOTALL | re.MULTILINE)
    return {f"block {i}": textwrap.dedent(block) for i, block in enumerate(found)}


def heavy_after(statement, heavy):
    """Which of the modules `heavy` are there after a statement in a fresh process."""
    code = f"import sys; {statement}; print(sorted({heavy!r} & set(sys.modules)))"
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=HOUSE.parent
    ).stdout


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
    assert heavy_after("import jaxgrad", heavy) == "[]\n"


def test_the_face_of_the_library_is_read_without_jax():
    assert heavy_after("import jaxgrad", {"jax", "numpy", "optax"}) == "[]\n"


def test_every_name_of_the_face_is_there():
    assert [name for name in jaxgrad.__all__ if getattr(jaxgrad, name).__name__ != name] == []
    with pytest.raises(AttributeError, match="has no attribute 'stream'"):
        jaxgrad.stream  # noqa: B018


def test_every_file_beside_the_engine_is_a_study():
    assert {f"experiments.{name}" for name in catalogue()} == STUDIES
    assert {path.name for path in HOUSE.iterdir() if path.is_dir()} - {"__pycache__"} == {
        "derivations",
        "engine",
        "recorded",
        "support",
    }


def test_every_study_can_be_run_as_a_file():
    assert [name for name in STUDIES if not ROOMS[name].endswith(LAST_LINES)] == []


def test_the_study_has_no_import_cycle():
    assert cycle(graph(ROOMS)) is None


def test_no_room_of_the_study_enters_one_that_is_closed_to_it():
    assert trespasses(ROOMS) == []


def test_the_engine_names_no_study():
    """Of the engine only the table of the lecture's rows does, whose rows say where their evidence is."""
    names = {name.removeprefix("experiments.") for name in STUDIES}
    assert [found for found in named(names, ROOMS) if found[0] != "experiments.engine.lecture_rows"] == []


def named(names, modules):
    """`(module, name)` where a module of the engine has the name of a study as a string of its own."""
    return [
        (module, node.value)
        for module, source in modules.items()
        if room(module) == "engine"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and node.value in names
    ]


def test_the_study_and_the_readme_use_the_faces_of_the_library():
    assert behind_a_face(ROOMS) == []
    assert behind_a_face(blocks_of_code((HOUSE.parent / "README.md").read_text(encoding="utf-8"))) == []


def test_a_package_of_the_library_is_used_by_its_face():
    assert behind_a_face_within(MODULES) == []


@pytest.mark.parametrize("name", ["catalogue", "arguments", "commands"])
def test_what_reads_a_command_line_imports_neither_jax_nor_numpy(name):
    assert heavy_after(f"import experiments.engine.{name}", {"jax", "numpy", "matplotlib", "scipy"}) == "[]\n"


def test_a_contender_of_the_race_imports_no_jax_before_it_must():
    assert heavy_after("import experiments.support.contenders", {"jax", "torch", "sklearn"}) == "[]\n"


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


def test_the_rooms_of_the_checker_are_entered_in_their_order():
    assert against_the_order(sources(LIBRARY)) == []


@pytest.mark.parametrize(
    ("name", "other"),
    [("program.steps", "search"), ("faults.algebra", "sentences"), ("follow.known", "numerics.central"),
     ("report", "program.steps"), ("search", "gradient"), ("evaluate.points", "patterns")],
)  # fmt: skip
def test_a_planted_step_against_the_order_is_found(name, other):
    modules = sources(LIBRARY)
    modules[f"jaxgrad.check.{name}"] += f"\nimport jaxgrad.check.{other}\n"
    assert against_the_order(modules) == [(f"jaxgrad.check.{name}", f"jaxgrad.check.{other}")]


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


def test_who_draws_may_import_what_draws_and_nothing_else():
    assert strangers({"jaxgrad.descent.picture": "def draw():\n    from matplotlib import pyplot"}) == []
    assert strangers({"jaxgrad.descent.picture": "import tqdm"}) == [("jaxgrad.descent.picture", "tqdm")]
    assert strangers({"jaxgrad.descent.trace": "import matplotlib"}) == [("jaxgrad.descent.trace", "matplotlib")]


def test_relative_imports_are_read_from_where_they_stand():
    modules = dict.fromkeys(("jaxgrad", "jaxgrad.types", "jaxgrad.check", "jaxgrad.check.replay"), "")
    assert imports("jaxgrad.check", "from .replay import x", modules) == {"jaxgrad.check.replay"}
    assert imports("jaxgrad.check", "from .. import types", modules) == {"jaxgrad.types"}
    assert imports("jaxgrad.check.replay", "from ..types import Batch", modules) == {"jaxgrad.types"}
    assert imports("jaxgrad.check.replay", "from . import steps", modules) == {"jaxgrad.check"}


@pytest.mark.parametrize(
    ("name", "source", "other"),
    [
        ("experiments.losses", "from experiments import escape", "experiments.escape"),
        ("experiments.losses", "def run():\n    from experiments.escape import Config", "experiments.escape"),
        ("experiments.losses", "from experiments.engine import verify", "experiments.engine.verify"),
        ("experiments.losses", "import experiments.engine.report", "experiments.engine.report"),
        ("experiments.losses", "from experiments.recorded import failures", "experiments.recorded.failures"),
        ("experiments.engine.plots", "from experiments import losses", "experiments.losses"),
        ("experiments.engine.plots", "def draw():\n    from experiments import losses", "experiments.losses"),
        ("experiments.engine.plots", "from experiments.support import exact", "experiments.support.exact"),
        ("experiments.engine.plots", "from ..recorded import tables", "experiments.recorded.tables"),
        ("experiments.support.exact", "from experiments import losses", "experiments.losses"),
        ("experiments.support.exact", "from experiments.engine import report", "experiments.engine.report"),
        ("experiments.recorded.tables", "from experiments import scaling", "experiments.scaling"),
        ("experiments", "from experiments.engine import results", "experiments.engine.results"),
    ],
)
def test_a_planted_trespass_is_found(name, source, other):
    assert trespasses(ROOMS | {name: source}) == [(name, other)]


def test_a_planted_name_of_a_study_is_found():
    assert named({"losses"}, {"experiments.engine.plots": "ORDER = ('losses',)"}) == [
        ("experiments.engine.plots", "losses")
    ]


def test_a_planted_cycle_in_the_study_is_found():
    planted = {"experiments.engine.results": "def write():\n    from experiments.engine import report"}
    found = cycle(graph(ROOMS | planted))
    assert found is not None
    assert {"experiments.engine.results", "experiments.engine.report"} <= set(found)


def test_a_planted_look_behind_a_face_is_found():
    planted = {"experiments.losses": "def run():\n    from jaxgrad.data.dataset import split"}
    assert behind_a_face(ROOMS | planted) == [("experiments.losses", "jaxgrad.data.dataset")]
    block = "Text.\n```python\nimport jaxgrad.check.gradient\n```\n"
    assert behind_a_face(blocks_of_code(block)) == [("block 0", "jaxgrad.check.gradient")]


def test_a_planted_look_behind_a_face_within_the_library_is_found():
    planted = {"jaxgrad.noise": "def late():\n    from jaxgrad.descent import row_blocks"}
    assert behind_a_face_within(MODULES | planted) == [("jaxgrad.noise", "jaxgrad.descent.row_blocks")]
    planted = {"jaxgrad.descent.log": "from jaxgrad.descent import row_blocks\nfrom jaxgrad import parallel"}
    assert behind_a_face_within(MODULES | planted) == []
