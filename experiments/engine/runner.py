"""Run one experiment and return everything that should be written about it.

Nothing is written here. `perform` runs, judges and draws; the process that was asked for the study writes. So nobody
else writes, whatever becomes of the workers.
"""

import dataclasses
import errno
import importlib
import json
import os
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import experiments
from experiments.engine import machine, provenance
from experiments.engine.catalogue import Entry
from experiments.engine.session import Neighbours, Session, Unfinished


class Task(NamedTuple):
    """What to run, and how."""

    entry: Entry
    overrides: dict[str, Any]
    """Settings that differ from the experiment's own; it takes those that it has."""
    quick: bool
    device: str
    """`cpu` or `gpu`: it names the files."""
    bare: bool = False
    """Numbers only, no figure."""
    unfinished: Path | None = None
    """A folder for what it has so far, so that it can go on from there; None: it keeps nothing."""
    resume: bool = False
    """Go on from what lies in that folder, if these settings, this code and these data left it there."""


class Product(NamedTuple):
    """What an experiment yields."""

    config: Any
    numbers: dict[str, Any]
    """As they will be read back."""
    claims: list[Any]
    figure: dict[str, bytes]
    """The two files by their kind; none for a bare task."""
    times: dict[str, float]


class Failure(NamedTuple):
    """Why an experiment yields nothing."""

    words: str
    """The error; where it is not the person's to mend, also where it came from."""
    persons: bool
    """Whether the person can mend it."""
    missing: bool
    """Whether a package is missing."""


def perform(task: Task, status: Callable[[str], None], neighbours: Neighbours | None = None) -> Product | Failure:
    """Run an experiment and draw it. What it raises is returned, in words; an interrupt passes."""
    from jaxgrad import files

    try:
        return _product(task, status, neighbours)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
        persons = is_the_persons(error, task)
        words = files.sentence(error) if isinstance(error, OSError) else str(error)
        return Failure(words if persons else short_traceback(error), persons, missing)


def _product(task: Task, status: Callable[[str], None], neighbours: Neighbours | None) -> Product:
    import jax

    from experiments.engine import kinds, plots, report, results
    from jaxgrad.data import Doubtful

    name = task.entry.name
    status(name)
    module = importlib.import_module(f"experiments.{name}")
    declared = getattr(module, "NUMBERS", None)
    if declared is None:
        raise TypeError(kinds.undeclared(name))
    config = configure(task.entry, task.overrides, task.quick)
    session = Session(lambda text: status(f"{name}: {text}"), neighbours, _unfinished(task, config))
    clock = machine.compile_clock()
    if task.entry.timed:
        # It pays for its own compilation, whichever ran before, and what they compile does not pile up.
        jax.clear_caches()
    start, compiled_before = time.perf_counter(), clock()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=Doubtful)  # the command line said it before
        numbers = module.run(config, session)
    times = {
        "seconds": round(time.perf_counter() - start, 3),
        "compile_seconds": round(clock() - compiled_before, 3),
        # How many processes wanted a core, over the last minute: what a time is worth.
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else float("nan"),
    }
    numbers = results.as_saved(numbers)
    kinds.parts(name, numbers, declared)
    if "data" in task.overrides and Path(str(getattr(config, "data", ""))).exists():
        # Published settings name the file, not where somebody keeps it.
        config = dataclasses.replace(config, data=Path(config.data).name)
    claims = module.claims(numbers)
    if task.bare:
        return Product(config, numbers, claims, {}, times)
    margin = report.origin(name, task.device, provenance.surroundings() | {"sha256": results.digest(numbers)})
    return Product(config, numbers, claims, plots.render(module.draw(numbers), margin=margin), times)


def configure(entry: Entry, overrides: dict[str, Any], quick: bool) -> Any:
    """The settings of an experiment: its own, and those of the overrides that it has."""
    module = importlib.import_module(f"experiments.{entry.name}")
    settings = {key: value for key, value in overrides.items() if key in entry.fields}
    return dataclasses.replace(module.QUICK if quick else module.Config(), **settings)


def _unfinished(task: Task, config: Any) -> Unfinished | None:
    """Where the experiment keeps what it has; what another run left there is dropped."""
    if task.unfinished is None:
        return None
    data = Path(task.overrides.get("data", ""))
    files = sorted(data.iterdir()) if data.is_dir() else [data] if data.is_file() else []
    own = {
        "config": dataclasses.asdict(config),
        "code": provenance.code(task.entry.name),
        "data": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }
    kept = Unfinished(task.unfinished, json.dumps(own, default=str).encode())
    kept.begin(task.resume)
    return kept


def is_the_persons(error: Exception, task: Task) -> bool:
    """Whether the person can mend it: a package is missing, the disk is full, or their data or seeds do not do.

    Data do not do where reading them failed, or where our code says so in a `raise`; what NumPy or JAX stumble over
    is the experiment's own failure.
    """
    from jaxgrad import files

    if isinstance(error, ModuleNotFoundError):
        return True
    if isinstance(error, OSError) and error.errno in files.REMEDIES:
        # A full disk, a folder that is read-only. A file that an experiment misses is its own mistake.
        return error.errno != errno.ENOENT or files.working_folder_is_gone()
    if not task.overrides or not isinstance(error, ValueError | OSError):
        return False
    import jaxgrad

    frames = traceback.extract_tb(error.__traceback__)
    reading = Path(jaxgrad.__path__[0]) / "data"
    ours = [Path(folder) for folder in (*experiments.__path__, *jaxgrad.__path__)]
    said = (frames[-1].line or "").startswith("raise") and any(
        Path(frames[-1].filename).is_relative_to(folder) for folder in ours
    )
    return said or ("data" in task.overrides and any(Path(f.filename).is_relative_to(reading) for f in frames))


def short_traceback(error: Exception) -> str:
    """The error and where in the experiment and the library it came from, innermost last."""
    import jaxgrad

    ours = [Path(folder) for folder in (*experiments.__path__, *jaxgrad.__path__)]
    frames = [
        f"\n  {Path(frame.filename).name}:{frame.lineno} in {frame.name}: {frame.line}"
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and any(Path(frame.filename).is_relative_to(folder) for folder in ours)
    ]
    return "".join([f"{type(error).__name__}: {error}", *frames[-4:]])
