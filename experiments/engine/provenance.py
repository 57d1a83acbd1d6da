"""Where numbers come from: the code, the versions and the machine that made them."""

import ast
import functools
import hashlib
import importlib.util
import platform
import re
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.engine import machine
from jaxgrad import atomic

PACKAGES = ("jax", "jaxlib", "optax", "numpy", "matplotlib")
"""Packages whose versions every result records, beside Python's."""

MAKE_NO_NUMBERS = ("experiments.engine", "experiments.recorded")
"""Packages that run, show, store or compare numbers and make none: no part of the `code` of a result."""


def code(name: str) -> dict[str, str]:
    """The first 16 digits of the sha256 of every source file that makes the numbers of an experiment, by its name.

    The experiment, and what it imports of `jaxgrad` and of other experiments, and so on. Not what only runs,
    shows or stores numbers (`MAKE_NO_NUMBERS`). Empty where there is no such experiment.
    """
    found: dict[str, str] = {}
    todo = [f"experiments.{name}"]
    while todo:
        module = todo.pop()
        spec = importlib.util.find_spec(module)
        if spec is None or spec.origin is None or module in found:
            continue
        content = Path(spec.origin).read_bytes()
        found[module] = hashlib.sha256(content).hexdigest()[:16]
        todo += _imported(content, module if spec.submodule_search_locations else module.rpartition(".")[0])
    return found


@functools.cache
def _imported(content: bytes, package: str) -> tuple[str, ...]:
    """The modules of `jaxgrad` and `experiments` that a source imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                ours = base.split(".")[0] in ("jaxgrad", "experiments")
                names.add(inner if ours and _is_module(inner) else base)
    names -= {"experiments", "experiments.__main__"}
    names = {name for name in names if not f"{name}.".startswith(tuple(f"{one}." for one in MAKE_NO_NUMBERS))}
    return tuple(sorted(name for name in names if name.split(".")[0] in ("jaxgrad", "experiments")))


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, not a package
        return False


def surroundings() -> dict[str, Any]:
    """What numbers may depend on beside the code: versions, kind of machine, precision; no names or paths."""
    import jax

    kinds = sorted({device.device_kind for device in jax.local_devices()})
    packages = {name: metadata.version(name) for name in PACKAGES}
    return {
        "versions": {"python": platform.python_version(), **packages},
        "machine": {
            "device_kind": kinds,
            "devices": jax.local_device_count(),
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": machine.cores(),
            "processor": machine.processor(),
            "instructions": machine.instructions(),
        },
        "precision": {
            "default_matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
            "x64": bool(jax.config.jax_enable_x64),  # type: ignore[attr-defined]
        },
    }


def environment(folder: str | Path) -> Path:
    """Write `folder/environment.txt`: `name==version` of every package that `jaxgrad[study]` needs here.

    Only names and versions, sorted, so that `pip install -c results/environment.txt` gives the same set.
    """
    path = Path(folder) / "environment.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, "".join(f"{line}\n" for line in pins("jaxgrad", "study")).encode())
    return path


def pins(package: str, extra: str) -> list[str]:
    """`name==version` of all that `package[extra]` depends on, as installed, without `package` itself."""
    from packaging.requirements import Requirement

    seen: dict[tuple[str, str], str] = {}
    todo = [(_normal(package), extra), (_normal(package), "")]
    while todo:
        name, wanted = todo.pop()
        if (name, wanted) in seen:
            continue
        distribution = metadata.distribution(name)
        seen[name, wanted] = distribution.version
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": wanted}):
                todo += [(_normal(requirement.name), asked) for asked in ("", *requirement.extras)]
    return sorted({f"{name}=={version}" for (name, _), version in seen.items() if name != _normal(package)})


def _normal(name: str) -> str:
    """A package's name as PEP 503 normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()
