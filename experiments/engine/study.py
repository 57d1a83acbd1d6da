"""Run the experiments of a plan and write their results."""

import dataclasses
import shutil
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from experiments.engine import machine, provenance, results, runner, workers
from experiments.engine.arguments import INSTALL, Plan, Unusable
from experiments.engine.catalogue import Entry, catalogue
from experiments.engine.console import rank, report_error, say, screen, several
from experiments.engine.runner import Failure, Product, Task
from experiments.engine.status import AGAIN, FAILED, INTERRUPTED, OK
from jaxgrad import commandline, parallel
from jaxgrad.data import Column


def start_jax(device: str | None, join: bool = False) -> str:
    """Make JAX ready on a device, `join` the other processes if there are any, and name what it computes on."""
    try:
        backend = machine.start_jax(device, join)
    except (ValueError, ConnectionError) as error:
        if not join:
            raise
        raise Unusable(str(error)) from None
    commandline.interruptible()
    if device == "gpu" and backend != "gpu":
        raise Unusable(
            "--device gpu: JAX finds no GPU here; where there is one, install the extra cuda12 or cuda13 "
            '(python -m pip install -e ".[study,cuda12]"), else use --device cpu'
        )
    return backend


class Outcome(NamedTuple):
    """What became of a plan."""

    status: int
    """The exit status."""
    done: tuple[str, ...]
    failed: tuple[str, ...]


def carry_out(plan: Plan, device: str) -> Outcome:
    """Run the experiments of a plan and write their results."""
    done: list[str] = []
    failed: list[str] = []
    running: list[str] = []
    # A GPU serves one process; and processes that compute together run each experiment together.
    together = device == "cpu" and not several() and len(plan.entries) > 1 and machine.cores() > 1
    with screen(len(plan.entries)) as (status, line):
        try:
            with workers.outcomes(_tasks(plan, device, together), plan.change, status, running, together) as each:
                for name, outcome in each:
                    if isinstance(outcome, Failure):
                        if outcome.persons:
                            raise Unusable(f"{name}: {outcome.words}{f'; {INSTALL}' if outcome.missing else ''}")
                        failed.append(name)
                        (report_error if rank() > 0 else line)(f"{name} failed: {outcome.words}")
                        continue
                    with _undisturbed():
                        if rank() == 0:
                            _store(plan.out, name, device, outcome, plan.columns)
                            shutil.rmtree(_unfinished(plan.out, name), ignore_errors=True)
                        done.append(name)
                    line("{}: {seconds:.1f} s, compiling {compile_seconds:.1f} core s".format(name, **outcome.times))
        except SystemExit as end:
            if end.code != AGAIN:
                raise
            line(f"stopped during {running[0]}, whose earlier results are untouched; --resume goes on from there")
            return Outcome(AGAIN, tuple(done), tuple(failed))
        except KeyboardInterrupt:
            cut = " and ".join(running)
            begun = done or failed or running
            when = f"during {cut}, whose earlier results are untouched" if cut else "between two experiments"
            so_far = f"; {', '.join(done)} finished" if done else ""
            rest = "" if plan.bare else "; --resume does the rest"
            line(f"interrupted {when if begun else 'before any experiment began'}{so_far}{rest}")
            return Outcome(INTERRUPTED, tuple(done), tuple(failed))
    if failed:
        failed.sort(key=[entry.name for entry in plan.entries].index)  # side by side they end in any order
        say(f"failed: {', '.join(failed)}")
    return Outcome(FAILED if failed else OK, tuple(done), tuple(failed))


def check_processes(plan: Plan) -> None:
    """Refuse, in all processes, what several of them cannot do together."""
    try:
        parallel.agree(arguments=repr(plan._replace(out=None)))  # type: ignore[arg-type]
    except ValueError as error:
        raise Unusable(str(error)) from None
    able = [entry.name for entry in catalogue().values() if entry.in_parallel]
    if unable := [entry.name for entry in plan.entries if not entry.in_parallel]:
        raise Unusable(f"in several processes only {', '.join(able)} can run, not {', '.join(unable)}")


def finished_before(plan: Plan, device: str) -> tuple[Entry, ...]:
    """What need not run again; rank 0 looks for all."""
    own = [entry.name for entry in plan.entries if is_current(entry, plan, device)] if rank() == 0 else []
    if several():
        own = parallel.from_main(lambda: " ".join(own).encode()).decode().split()
    return tuple(entry for entry in plan.entries if entry.name in own)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Be the only one that writes to a folder."""
    commandline.interruptible()
    with ExitStack() as held:

        def hold() -> None:
            if rank() == 0:
                held.enter_context(results.lock(out))

        try:
            if several():
                parallel.together(hold)
            else:
                hold()
        except BlockingIOError as error:
            raise Unusable(f"{error}; wait for it to end, or write elsewhere with --out") from None
        yield


def is_current(entry: Entry, plan: Plan, device: str) -> bool:
    """Whether a run of this entry would give again what is saved: nothing that numbers depend on has changed."""
    if "data" in plan.overrides and Path(plan.overrides["data"]).exists():
        return False  # what is in the file is not recorded
    try:
        saved = results.read(plan.out, entry.name, device)
        edited = results.edited(plan.out, entry.name, device)
    except (ValueError, OSError):
        return False
    config = results.as_saved(dataclasses.asdict(runner.configure(entry, plan.overrides, plan.quick)))
    now = {"code": provenance.code(entry.name), **provenance.surroundings()}
    return not edited and saved.config == config and all(saved.provenance[key] == now[key] for key in now)


def _tasks(plan: Plan, device: str, together: bool) -> list[Task]:
    """The plan as tasks. An experiment that can save itself does, where it has this process to itself and needs it."""
    bare = plan.bare or rank() > 0
    tasks = [Task(entry, plan.overrides, plan.quick, device, bare) for entry in plan.entries]
    if together or not (several() or "data" in plan.overrides):
        return tasks
    return [
        task._replace(unfinished=_unfinished(plan.out, task.entry.name), resume=plan.resume)
        if task.entry.in_parallel
        else task
        for task in tasks
    ]


def _unfinished(out: Path, name: str) -> Path:
    """Where an experiment keeps what it has until it is done."""
    return out / name / "unfinished"


def _store(out: Path, name: str, device: str, product: Product, columns: Sequence[Column]) -> None:
    """Write what an experiment yielded: numbers and figure, each file whole or not at all."""
    from experiments.engine import plots, report  # Matplotlib is slow to import, and a bare run draws nothing

    results.write(out, name, device, product.config, product.numbers, product.claims, product.times, columns)
    if product.figure:
        plots.write(product.figure, out / name, report.figure_stem(device))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Put off Ctrl-C and SIGTERM until the end of the block. They reach the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: asked.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not None
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        signal.raise_signal(asked[0])
