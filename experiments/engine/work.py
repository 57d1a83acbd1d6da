"""One experiment, from its settings to what is to be written of it: what the study gives to a process of its own.

Nothing is written here. `perform` runs, judges and draws, and returns it all; the process that was asked for the
study writes it. So nobody else writes, whatever becomes of the workers.
"""

import dataclasses
import errno
import gc
import importlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import experiments
from experiments.engine import machine, provenance
from experiments.engine.catalogue import Entry

if TYPE_CHECKING:
    from jaxgrad.checkpoint import Checkpoint


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
    """Go on from what is in that folder, if these settings and this code left it there."""


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
    """Why it yields nothing."""

    words: str
    """For the person: the error alone where it is theirs to mend, else with where it came from."""
    persons: bool
    missing: bool
    """Whether a package is missing."""


def perform(task: Task, status: Callable[[str], None]) -> Product | Failure:
    """Run an experiment and draw it. What it raises is returned, in words; an interrupt passes."""
    from jaxgrad import files

    try:
        return _product(task, status)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
        persons = is_the_persons(error, task)
        words = files.sentence(error) if isinstance(error, OSError) else str(error)
        return Failure(words if persons else short_traceback(error), persons, missing)


def _product(task: Task, status: Callable[[str], None]) -> Product:
    import jax

    from experiments.engine import kinds, plots, provenance, report, results
    from jaxgrad.data import Doubtful

    name = task.entry.name
    status(name)
    module = importlib.import_module(f"experiments.{name}")
    declared = getattr(module, "PUBLISHED", None)
    if declared is None:
        raise TypeError(kinds.undeclared(name))
    config = configure(task.entry, task.overrides, task.quick)
    _go_on(task, config)
    clock = machine.compile_clock()
    if task.entry.timed:
        # It pays for its own compilation, whichever ran before, and what they compile does not pile up.
        jax.clear_caches()
    start, compiled_before = time.perf_counter(), clock()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=Doubtful)  # the command line said it before
        numbers = module.run(config, lambda message: status(f"{name}: {message}"))
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


# --- what is unfinished ----------------------------------------------------------------------------------------

_unfinished: Path | None = None
_whose = b""
_making = threading.Lock()


def _go_on(task: Task, config: Any) -> None:
    """Let the experiment keep what it finds in its folder, if it has one; what lies there of another run is dropped."""
    global _unfinished, _whose
    from jaxgrad import parallel

    _unfinished = place = task.unfinished
    if place is None:
        return
    data = Path(task.overrides.get("data", ""))
    files = sorted(data.iterdir()) if data.is_dir() else [data] if data.is_file() else []
    own = {
        "config": dataclasses.asdict(config), "code": provenance.code(task.entry.name),
        "data": [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
    }  # fmt: skip
    _whose = json.dumps(own, default=str).encode()

    def drop() -> None:
        stamp = place / "of.json"
        if not (task.resume and stamp.is_file() and stamp.read_bytes() == _whose):
            shutil.rmtree(place, ignore_errors=True)

    parallel.together(lambda: drop() if parallel.is_main() else None)


def _keeping(name: str) -> Path:
    """A file of the folder, which is there with the first of them."""
    from jaxgrad import atomic, parallel

    assert _unfinished is not None
    place = _unfinished

    def make() -> None:
        with _making:
            if not (place / "of.json").exists():
                place.mkdir(parents=True, exist_ok=True)
                atomic.write(place / "of.json", _whose)

    parallel.together(lambda: make() if parallel.is_main() else None)
    return place / name


def stoppable() -> Any:
    """`with stoppable(): ...`: SIGTERM and Ctrl-C wait for the next descent that has a `checkpoint`, which ends there.

    Where nothing is kept they do what they always do.
    """
    from jaxgrad import parallel

    return nullcontext() if _unfinished is None else parallel.Interruption()


def checkpoint(name: str, steps: int) -> "Checkpoint | None":
    """For a descent of so many steps: where it saves itself (20 times), or goes on from; None where nothing is kept."""
    from jaxgrad.checkpoint import Checkpoint

    if _unfinished is None:
        return None
    return Checkpoint(_keeping(f"{name}.npz"), every=max(1, steps // 20), resume=True)


def kept(name: str, compute: Callable[[], Any]) -> Any:
    """The array `compute()`, or what it was before the experiment was interrupted."""
    import numpy as np

    from jaxgrad import atomic, parallel

    if _unfinished is None:
        return compute()
    path = _keeping(f"{name}.npy")
    if found := parallel.from_main(lambda: path.read_bytes() if path.is_file() else b""):
        return np.load(io.BytesIO(found), allow_pickle=False)
    values, content = np.asarray(compute()), io.BytesIO()
    np.save(content, values)
    parallel.together(lambda: atomic.write(path, content.getvalue()) if parallel.is_main() else None)
    return values


# --- in a process of its own -----------------------------------------------------------------------------------

_speak: Callable[[str], None] = print
_workers: Any = None
"""The process ids of all workers, 0 where there is none yet; its lock is held by who speaks."""
_alone = False
changed: Any = None
"""For an echo of the study: its `altered.Change`, which every process makes."""


def start(folders: Sequence[str], device: str, messages: Any, workers: Any, changed: Any) -> None:
    """Make a new process ready for `perform_here`: where experiments are, what to compute on, who hears of it."""
    global _speak, _workers
    from experiments.engine import altered

    def speak(text: str) -> None:
        with workers.get_lock():
            messages.put(text)

    # Who started it ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)  # what it starts itself does hear this one
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    experiments.__path__[:] = folders  # type: ignore[index]
    _speak, _workers = speak, workers
    machine.start_jax(device)
    if changed is not None:
        altered.apply(changed)
    # Tracing makes many objects that stay. Looking through all of them as often as Python does took 9 % of the study.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    with workers.get_lock():
        workers[list(workers).index(0)] = os.getpid()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def alone() -> Iterator[None]:
    """Nothing else of the study computes while the block runs: for what is timed.

    The other workers are stopped where they are, and go on behind it. What is timed can so be compiled beside them.
    """
    global _alone
    stopped: list[int] = []
    if changed is not None and changed.untimed:
        yield
        return
    if _workers is not None and CAN_STOP and not _alone:
        with _workers.get_lock():  # nobody is stopped while speaking, which others wait for
            stopped = [pid for pid in _workers if pid not in (0, os.getpid())]
            for pid in stopped:
                _signal(pid, signal.SIGSTOP)
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before
        for pid in stopped:
            _signal(pid, signal.SIGCONT)


CAN_STOP = hasattr(signal, "SIGSTOP")


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def race(contenders: dict[str, Callable[[], Any]], **options: Any) -> dict[str, Any]:
    """`timing.race` of contenders that are compiled side by side before, and then have the machine to themselves."""
    from jaxgrad import timing

    side_by_side(lambda contender: contender(), contenders.values())
    with alone():
        return timing.race(contenders, **options)


def side_by_side(work: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
    """`[work(job) for job in jobs]`, two at a time: while one compiles, which takes a core, the next one can too.

    Not for what is timed, nor under `jax.enable_x64`, which holds for one thread only.
    """
    import jax

    if jax.process_count() > 1:
        # Processes that compute together must do everything in one order.
        return [work(job) for job in jobs]
    pool = ThreadPoolExecutor(min(2, machine.cores()))
    try:
        return list(pool.map(work, jobs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def perform_here(task: Task) -> Product | Failure:
    """`perform`, in a process that is ready."""
    return perform(task, _speak)


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
