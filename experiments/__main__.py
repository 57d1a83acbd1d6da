"""`python -m experiments`: run the study, list it, or draw it again from saved data.

The command line is read and refused before JAX is imported: help and errors come at once.
"""

import dataclasses
import difflib
import importlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import experiments
from experiments import Entry, catalogue

INSTALL = 'run: python -m pip install -e ".[study]"'

try:
    import tyro
    from tyro import conf
except ModuleNotFoundError:
    sys.exit(f"error: the study needs more than the library; {INSTALL}")

if TYPE_CHECKING:
    from experiments.report import Chapter

RESULTS = Path(__file__).resolve().parent.parent / "results"
"""The study's own results, which the front page shows."""
OK, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
MOST_TOGETHER = 4
"""Experiments that run side by side at most, since memory is not without end."""
IN_PARALLEL = ("gd_vs_sgd",)
"""Experiments that spread their rows over all processes and devices."""
DRAWING = threading.Lock()
"""Matplotlib's parser of formulas serves one thread at a time."""

EXAMPLES = """\
examples:
  python -m experiments                            the whole study, at full size, into results/
  python -m experiments --quick                    all of it at small sizes, into results-quick/
  python -m experiments gd_vs_sgd step_cost        two experiments
  python -m experiments list                       what there is, and what each shows
  python -m experiments report                     draw everything again from saved data; runs nothing
  python -m experiments gd_vs_sgd --data prices.csv --target price
                                                   the same experiment on your own file

exit status: 0 done, 1 an experiment failed, 2 unusable arguments or data, 130 interrupted
"""


QUIET: Any = {"help_behavior_hint": ""}
"""For the help, where `(default: None)` behind every option says nothing."""


class Unusable(Exception):
    """What the person asked for cannot be done; the message says why and what can."""


@dataclasses.dataclass
class Arguments:
    """Gradient descent against SGD: the lecture's formulas and claims, run, measured and drawn."""

    names: Annotated[tuple[str, ...], conf.Positional, conf.arg(metavar="[NAME ...]", **QUIET)] = ()
    """Experiments to run (none: all of them), or `list`, or `report`."""

    quick: Annotated[bool, conf.arg(**QUIET)] = False
    """Small sizes: seconds instead of minutes."""

    seeds: Annotated[str | None, conf.arg(metavar="N", **QUIET)] = None
    """How many seeds the experiments that have seeds use."""

    data: Annotated[str | None, conf.arg(metavar="NAME_OR_FILE", **QUIET)] = None
    """A data set by name, or a file of your own (CSV, npz, svmlight)."""

    target: Annotated[str | None, conf.arg(metavar="COLUMN", **QUIET)] = None
    """The column of --data to predict."""

    memory: Annotated[str | None, conf.arg(metavar="GIB", **QUIET)] = None
    """Memory that --data may take (default: what is free). A larger npy file, or a folder of them, is read as it is
    needed."""

    out: Annotated[Path | None, conf.arg(metavar="DIR", **QUIET)] = None
    """Where results go. By default results, or, for what is not the published study, results-quick (--quick)
    and results-custom (--data, --seeds)."""

    device: Annotated[str | None, conf.arg(metavar="{cpu,gpu}", **QUIET)] = None
    """What to compute on. By default JAX picks."""


class Plan(NamedTuple):
    """What a run will do, settled before JAX is imported."""

    entries: tuple[Entry, ...]
    overrides: dict[str, Any]
    """Settings that differ from the experiment's own."""
    quick: bool
    out: Path
    device: str | None


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, and return the exit status."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.names[:1] == ("list",):
            status = show_list(arguments)
        elif arguments.names[:1] == ("report",):
            status = redraw(arguments)
        else:
            status = run(plan(arguments))
        sys.stdout.flush()
        return status
    except Unusable as error:
        say(f"error: {error}")
        return UNUSABLE
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK


def parse(argv: list[str]) -> Arguments:
    """The command line as data. Prints help, or what is wrong with it, and exits where it must."""
    entries = catalogue().values()
    width = max((len(entry.name) for entry in entries), default=0)
    listing = "\n".join(f"  {entry.name:<{width}}  {entry.headline}" for entry in entries)
    return tyro.cli(
        Arguments,
        prog="python -m experiments",
        description=f"{Arguments.__doc__}\n\nexperiments:\n{listing}\n\n{EXAMPLES}",
        args=argv,
        config=(conf.FlagCreatePairsOff,),
    )


def plan(arguments: Arguments) -> Plan:
    """Everything that can be wrong with the arguments, found before anything is imported or written."""
    known = catalogue()
    for name in arguments.names:
        if name in ("list", "report"):
            raise Unusable(f"{name!r} stands alone: python -m experiments {name}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise Unusable(
                f"there is no experiment {name!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}")
            )
    if arguments.memory is not None and arguments.data is None:
        raise Unusable("--memory is for the rows of --data, and there is no --data")
    if arguments.device not in (None, "cpu", "gpu"):
        raise Unusable(f"--device must be cpu or gpu, got {arguments.device!r}")
    if arguments.target is not None and arguments.data is None:
        raise Unusable("--target names a column of --data, and there is no --data")
    given = {
        "seeds": whole(arguments.seeds), "data": arguments.data, "target": arguments.target,
        "memory": gibibytes(arguments.memory),
    }  # fmt: skip
    overrides = {field: value for field, value in given.items() if value is not None}
    entries = tuple(known[name] for name in dict.fromkeys(arguments.names)) or tuple(known.values())
    if arguments.names:
        for entry in entries:
            for field in overrides:
                if field not in entry.fields:
                    able = ", ".join(name for name, other in known.items() if field in other.fields)
                    raise Unusable(f"{entry.name} takes no --{field}; {able or 'none'} does")
    elif "data" in overrides:
        # Without names: every experiment that can use the data at all.
        entries = tuple(entry for entry in entries if set(overrides) - {"seeds"} <= set(entry.fields))
    if not entries:
        raise Unusable("there is no experiment that can do this")
    # What is not the published study must not overwrite it.
    suffix = "-custom" if overrides else "-quick" if arguments.quick else ""
    out = Path(arguments.out or RESULTS.with_name(RESULTS.name + suffix))
    check_folder(out)
    return Plan(entries, overrides, arguments.quick, out, arguments.device)


def whole(seeds: str | None) -> int | None:
    """`--seeds` as a number."""
    if seeds is None:
        return None
    try:
        if (number := int(seeds)) >= 1:
            return number
    except ValueError:
        pass
    raise Unusable(f"--seeds must be a whole number and at least 1, got {seeds!r}")


def gibibytes(text: str | None) -> float | None:
    """The --memory of the command line."""
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = 0.0
    if value is not None and not 0 < value < float("inf"):
        raise Unusable(f"--memory must be a positive number of GiB, got {text!r}")
    return value


def check_folder(out: Path) -> None:
    """Refuse a folder that cannot be written to."""
    existing = next(parent for parent in (out, *out.resolve().parents) if parent.exists())
    if not existing.is_dir():
        raise Unusable(f"--out {out}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Unusable(f"--out {out}: {existing} cannot be written to")


def show_list(arguments: Arguments) -> int:
    """Print every experiment with its headline and the settings that the command line can change."""
    only(arguments, "list", allowed=())
    for entry in catalogue().values():
        options = " ".join(f"--{field}" for field in ("seeds", "data", "target") if field in entry.fields)
        print(f"{entry.name}{f'  [{options}]' if options else ''}\n    {entry.headline}")
    return OK


def redraw(arguments: Arguments) -> int:
    """Draw every figure and write the report from what is saved in the folder, running nothing."""
    only(arguments, "report", allowed=("out",))
    out = Path(arguments.out or RESULTS)
    from experiments import report, results

    if not results.saved(out):
        raise Unusable(f"there are no results in {out}; run `python -m experiments` first")
    chapters = load(out)
    for path in report.draw(out, chapters):
        print(path)
    publish(out, chapters)
    return OK


def only(arguments: Arguments, command: str, allowed: tuple[str, ...]) -> None:
    """Refuse what a command would ignore."""
    if arguments.names != (command,):
        raise Unusable(f"{command!r} stands alone: python -m experiments {command}")
    for field in dataclasses.fields(arguments):
        given = getattr(arguments, field.name) != field.default
        if field.name not in ("names", *allowed) and given:
            raise Unusable(f"{command!r} runs nothing: --{field.name} has no meaning for it")


def run(plan: Plan) -> int:
    """Run every experiment of the plan, the next ones too where one fails; then write the report.

    Started in several processes (srun, mpirun, `jaxgrad.launch`), each experiment that can spreads its rows over
    them; rank 0 alone writes and talks.
    """
    device, alone = start_jax(plan.device)
    from jaxgrad import parallel

    parallel.agree(arguments=repr((plan.entries, plan.overrides, plan.quick)))
    if not alone and (unable := [entry.name for entry in plan.entries if entry.name not in IN_PARALLEL]):
        raise Unusable(f"{', '.join(unable)}: in several processes only {', '.join(IN_PARALLEL)} can run")
    say(f"results go to {plan.out}")
    compile_seconds = compile_clock()
    begun: list[str] = []
    done: list[str] = []
    failed: list[str] = []

    def work(entry: Entry) -> dict[str, float]:
        begun.append(entry.name)
        return run_one(entry, plan, device, compile_seconds, status)

    with screen(len(plan.entries)) as (status, line):
        try:
            for entry, times in outcomes(plan, work):
                try:
                    spent = times()
                    done.append(entry.name)
                    line("{}: {seconds:.1f} s, compiling {compile_seconds:.1f} core s".format(entry.name, **spent))
                except Exception as error:
                    if is_the_persons(error, plan):
                        missing = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
                        hint = f"; {INSTALL}" if missing else ""
                        raise Unusable(f"{entry.name}: {error}{hint}") from error
                    failed.append(entry.name)
                    line(f"{entry.name} failed: {short_traceback(error)}")
        except KeyboardInterrupt:
            broken_off = " and ".join(name for name in begun if name not in done + failed)
            so_far = f"; {', '.join(done)} finished" if done else ""
            line(f"interrupted during {broken_off}, whose earlier results are untouched{so_far}")
            return INTERRUPTED
    if not parallel.is_main():
        return FAILED if failed else OK
    from experiments import results

    chapters = load(plan.out)
    publish(plan.out, chapters)
    if plan.out.resolve() == RESULTS and device == "cpu":
        results.environment(RESULTS)
    show_verdicts([chapter for chapter in chapters if chapter.name in done])
    if failed:
        say(f"failed: {', '.join(failed)}")
    return FAILED if failed else OK


def outcomes(plan: Plan, work: Callable[[Entry], Any]) -> Iterator[tuple[Entry, Callable[[], Any]]]:
    """Each experiment of the plan with a function that returns what `work` returned for it, or raises.

    Those that measure seconds go first, one at a time. The others share the cores: most of their time is
    compiling, which uses one.
    """
    import jax

    from experiments import results

    together = [entry for entry in plan.entries if not entry.timed]
    for entry in plan.entries:
        if entry.timed or len(together) == 1:
            # Each pays for its own compilation, whichever ran before, and what they compiled does not pile up.
            jax.clear_caches()
            yield entry, partial(work, entry)
    if len(together) > 1:
        jax.clear_caches()
        for name in ("plots", "report", *(entry.name for entry in together)):
            # Threads that import at once may see each other's modules half made. An error comes again in its thread.
            with suppress(Exception):
                importlib.import_module(f"experiments.{name}")
        pool = ThreadPoolExecutor(min(MOST_TOGETHER, results.cores()))
        running = {pool.submit(work, entry): entry for entry in together}
        try:
            # A wait without end could not be interrupted everywhere.
            while running:
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def run_one(
    entry: Entry,
    plan: Plan,
    device: str,
    compile_seconds: Callable[..., float],
    status: Callable[[str], None],
) -> dict[str, float]:
    """Run one experiment, draw it, and write its results; returns what its time was spent on.

    The figure is drawn before anything is written, so that an experiment that cannot be drawn leaves the
    results as they were.
    """
    from experiments import plots, report, results

    status(entry.name)
    module = importlib.import_module(f"experiments.{entry.name}")
    settings = {key: value for key, value in plan.overrides.items() if key in entry.fields}
    config = dataclasses.replace(module.QUICK if plan.quick else module.Config(), **settings)
    # What measures seconds runs alone, and may compile in several threads; the others are one thread each.
    start, compiled_before = time.perf_counter(), compile_seconds(entry.timed)
    numbers = module.run(config, lambda message: status(f"{entry.name}: {message}"))
    times = {
        "seconds": round(time.perf_counter() - start, 3),
        "compile_seconds": round(compile_seconds(entry.timed) - compiled_before, 3),
    }
    numbers = results.as_saved(numbers)
    if settings.get("data") is not None and Path(settings["data"]).exists():
        # Published settings name the file, not where somebody keeps it.
        config = dataclasses.replace(config, data=Path(config.data).name)
    from jaxgrad import parallel

    if not parallel.is_main():
        return times
    with DRAWING:
        figure = module.draw(numbers)
        results.write(plan.out, entry.name, device, config, numbers, module.claims(numbers), times)
        plots.save(figure, plan.out / entry.name, report.figure_stem(device))
    return times


def load(out: Path) -> list["Chapter"]:
    """All results in a folder; one that cannot be read is the person's to mend, and its error says how."""
    from experiments import report

    try:
        return report.load(out)
    except (ValueError, OSError) as error:
        raise Unusable(f"no report was written: {error}") from error


def publish(out: Path, chapters: list["Chapter"]) -> None:
    """Write the report of a folder, and, for the study's own, the front page."""
    from experiments import report

    say(f"report: {report.write(out, chapters)}")
    readme = RESULTS.parent / "README.md"
    if out.resolve() == RESULTS and readme.is_file() and report.front_page(readme, out, chapters):
        say(f"front page: {readme}")


def show_verdicts(chapters: list["Chapter"]) -> None:
    """The claims of what was run, one line each."""
    from experiments import report

    for name, _, claim in report.claims_of(chapters):
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        print(f"{claim.id:<4} {verdict:<13} {claim.text}: {claim.measured} (expected {claim.expected}) [{name}]")


def start_jax(device: str | None) -> tuple[str, bool]:
    """Import JAX for a device, name what it computes on, and say whether it is alone; no rounding of factors."""
    import jax

    from jaxgrad import parallel

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    # A GPU would otherwise round the factors of a product to fewer bits than the CPU does.
    jax.config.update("jax_default_matmul_precision", "highest")
    alone = parallel.start().processes == 1
    backend = jax.default_backend()
    if device == "gpu" and backend != "gpu":
        raise Unusable(
            "--device gpu: JAX finds no GPU here; where there is one, install the extra cuda12 or cuda13 "
            '(python -m pip install -e ".[study,cuda12]"), else use --device cpu'
        )
    return backend, alone


def compile_clock() -> Callable[..., float]:
    """A clock that runs while JAX traces, lowers or compiles: seconds since it was made, of every core at work on it.

    That is, in all threads, or in the one that asks (`everybody=False`). JAX tells of each such span when it ends.
    One that was spent within another (an operation on constants is compiled while a function is traced) counts once.
    """
    import jax

    spans: dict[int, list[tuple[float, float]]] = {}

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            mine = spans.setdefault(threading.get_ident(), [])
            end = time.perf_counter()
            start = end - duration_secs
            while mine and mine[-1][0] >= start:
                mine.pop()
            mine.append((start, end))

    def clock(everybody: bool = True) -> float:
        counted = list(spans.values()) if everybody else [spans.get(threading.get_ident(), [])]
        return sum(end - start for own in counted for start, end in own)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return clock


@contextmanager
def screen(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two ways to speak on stderr: a passing status, and a line that stays and means that one is done.

    On a terminal the status is one line under a bar; elsewhere each status is a line.
    """
    if not sys.stderr.isatty():
        yield say, say
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="experiment", leave=False, dynamic_ncols=True) as bar:

        def line(text: str) -> None:
            tqdm.write(text, file=sys.stderr)
            bar.update()

        yield bar.set_postfix_str, line


def say(text: str) -> None:
    if several() and sys.modules["jax"].process_index() > 0:
        return
    # In one piece: experiments that run side by side speak too.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def is_the_persons(error: Exception, plan: Plan) -> bool:
    """Whether the person can mend it: a package or a file is missing, or their data or seeds do not do."""
    return isinstance(error, ModuleNotFoundError | OSError) or (bool(plan.overrides) and isinstance(error, ValueError))


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


def several() -> bool:
    """Whether this is one of several processes, which end together."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


if __name__ == "__main__":
    exit_status = main()
    if several():
        from jaxgrad import parallel

        parallel.run(lambda: exit_status)
    if exit_status in (INTERRUPTED, UNUSABLE):
        # Without this, Python would wait for what other threads or the device still run.
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
