"""`python -m experiments`: run the study, list it, draw it again from saved data, or verify that a re-run agrees.

The command line is read and refused before JAX is imported: help and errors come at once.
"""

import dataclasses
import difflib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
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
    from experiments.results import Result

RESULTS = Path(__file__).resolve().parent.parent / "results"
"""The study's own results, which the front page shows."""
OK, FAILED, UNUSABLE, INTERRUPTED = 0, 1, 2, 130
MOST_TOGETHER = 4
"""Experiments that run side by side at most, since memory is not without end."""
DRAWING = threading.Lock()
"""Matplotlib's parser of formulas serves one thread at a time."""

EXAMPLES = """\
examples:
  python -m experiments                            the whole study, at full size, into results/
  python -m experiments --quick                    all of it at small sizes, into results-quick/
  python -m experiments gd_vs_sgd step_cost        two experiments
  python -m experiments list                       what there is, and what each shows
  python -m experiments --resume                   the rest of a study that was interrupted or killed
  python -m experiments report                     draw everything again from saved data; runs nothing
  python -m experiments verify                     run everything again, elsewhere: are these the published numbers?
  python -m experiments verify --quick             the same at small sizes, against results/quick
  python -m experiments gd_vs_sgd --data prices.csv --target price
                                                   the same experiment on your own file

verify runs again into a temporary folder, touches nothing that is committed, and gives a verdict on every number
and curve: identical; agrees (within what rounding, or its own seeds, may change); differs (with both values, the
tolerance, and what kind of change does that); not comparable (and what would make it so). For whoever changes the
study: `spread` runs it three times more, on data nudged by a unit in the last place and with other vector
instructions, and records by how much rounding moves each number, on which verify's tolerances rest; `spread --quick`
renews results/quick first.

An experiment's files are replaced when it is done, each whole or not at all, whenever the study is stopped.
--resume leaves out what was finished by this very code with these settings, versions and machine. The rest
gives the same bits as if nothing had happened, but for what is measured in seconds. One study at a time writes to a
folder; another says so and ends.

exit status: 0 done, 1 an experiment failed or a number differs, 2 unusable arguments or data, 130 interrupted
"""


QUIET: Any = {"help_behavior_hint": ""}
"""For the help, where `(default: None)` behind every option says nothing."""


class Unusable(Exception):
    """What the person asked for cannot be done; the message says why and what can."""


@dataclasses.dataclass
class Arguments:
    """Gradient descent against SGD: the lecture's formulas and claims, run, measured and drawn."""

    names: Annotated[tuple[str, ...], conf.Positional, conf.arg(metavar="[NAME ...]", **QUIET)] = ()
    """Experiments to run (none: all of them), or `list`, or `report`; or `verify` or `spread` and experiments."""

    quick: Annotated[bool, conf.arg(**QUIET)] = False
    """Small sizes: seconds instead of minutes."""

    seeds: Annotated[str | None, conf.arg(metavar="N", **QUIET)] = None
    """How many seeds the experiments that have seeds use."""

    data: Annotated[str | None, conf.arg(metavar="NAME_OR_FILE", **QUIET)] = None
    """A data set by name, or a file of your own (CSV, npz, svmlight)."""

    target: Annotated[str | None, conf.arg(metavar="COLUMN", **QUIET)] = None
    """The column of --data to predict."""

    out: Annotated[Path | None, conf.arg(metavar="DIR", **QUIET)] = None
    """Where results go. By default results, or, for what is not the published study, results-quick (--quick)
    and results-custom (--data, --seeds)."""

    device: Annotated[str | None, conf.arg(metavar="{cpu,gpu}", **QUIET)] = None
    """What to compute on. By default JAX picks."""

    resume: Annotated[bool, conf.arg(**QUIET)] = False
    """Only what is not there yet, or was made by other code, settings, versions or another machine."""

    bare: Annotated[bool, conf.arg(**QUIET)] = False
    """Numbers only: no figures, no report."""

    rerun: Annotated[Path | None, conf.arg(metavar="DIR", **QUIET)] = None
    """For verify: results of a re-run that you have already; nothing is run."""

    every: Annotated[bool, conf.arg(**QUIET)] = False
    """For verify: list every number with its verdict, not only those that differ."""

    note: Annotated[bool, conf.arg(**QUIET)] = False
    """For verify: keep what was found in verified.json, for the table on the front page."""


class Plan(NamedTuple):
    """What a run will do, settled before JAX is imported."""

    entries: tuple[Entry, ...]
    overrides: dict[str, Any]
    """Settings that differ from the experiment's own."""
    quick: bool
    out: Path
    device: str | None
    resume: bool = False
    bare: bool = False


COMMANDS = ("list", "report", "verify", "spread")


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, and return the exit status."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.names[:1] == ("list",):
            status = show_list(arguments)
        elif arguments.names[:1] == ("report",):
            status = redraw(arguments)
        elif arguments.names[:1] == ("verify",):
            status = verify_study(arguments)
        elif arguments.names[:1] == ("spread",):
            status = record_spread(arguments)
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
        if name in COMMANDS:
            alone = "comes first" if name in ("verify", "spread") else "stands alone"
            raise Unusable(f"{name!r} {alone}: python -m experiments {name}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            raise Unusable(
                f"there is no experiment {name!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}")
            )
    if arguments.device not in (None, "cpu", "gpu"):
        raise Unusable(f"--device must be cpu or gpu, got {arguments.device!r}")
    if arguments.target is not None and arguments.data is None:
        raise Unusable("--target names a column of --data, and there is no --data")
    for option in ("rerun", "every", "note"):
        if getattr(arguments, option):
            raise Unusable(f"--{option} is for verify: python -m experiments verify --{option} ...")
    given = {"seeds": whole(arguments.seeds), "data": arguments.data, "target": arguments.target}
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
    return Plan(entries, overrides, arguments.quick, out, arguments.device, arguments.resume, arguments.bare)


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
    with writing(out):
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
    """Run every experiment of the plan, the next ones too where one fails; then write the report."""
    device = start_jax(plan.device)
    with writing(plan.out):
        say(f"results go to {plan.out}")
        there = [entry for entry in plan.entries if plan.resume and is_current(entry, plan, device)]
        if there:
            say(f"finished before, by this very code: {', '.join(entry.name for entry in there)}")
        rest = plan._replace(entries=tuple(entry for entry in plan.entries if entry not in there))
        outcome = carry_out(rest, device)
        if outcome.status == INTERRUPTED or plan.bare:
            return outcome.status
        from experiments import report, results

        chapters = load(plan.out)
        # Whoever stopped the study may have done so between the numbers and their figures.
        report.draw(plan.out, [chapter for chapter in chapters if chapter.name in {entry.name for entry in there}])
        publish(plan.out, chapters)
        if plan.out.resolve() == RESULTS and device == "cpu":
            results.environment(RESULTS)
    show_verdicts([chapter for chapter in chapters if chapter.name in outcome.done])
    return outcome.status


class Outcome(NamedTuple):
    status: int
    done: tuple[str, ...]
    failed: tuple[str, ...]


def carry_out(plan: Plan, device: str) -> Outcome:
    """Run the experiments of a plan and write their results."""
    compile_seconds = compile_clock()
    begun: list[str] = []
    done: list[str] = []
    failed: list[str] = []
    stopped = threading.Event()

    def work(entry: Entry) -> dict[str, float]:
        begun.append(entry.name)
        try:
            return run_one(entry, plan, device, compile_seconds, status, stopped, done)
        except Exception:
            failed.append(entry.name)
            raise

    with screen(len(plan.entries)) as (status, line):
        try:
            for entry, times in outcomes(plan, work):
                try:
                    spent = times()
                    line("{}: {seconds:.1f} s, compiling {compile_seconds:.1f} core s".format(entry.name, **spent))
                except Exception as error:
                    if is_the_persons(error, plan):
                        missing = isinstance(error, ModuleNotFoundError) and "pip install" not in str(error)
                        hint = f"; {INSTALL}" if missing else ""
                        raise Unusable(f"{entry.name}: {error}{hint}") from error
                    line(f"{entry.name} failed: {short_traceback(error)}")
        except KeyboardInterrupt:
            # Whoever is writing may end; nobody begins to write.
            with DRAWING:
                stopped.set()
                cut = " and ".join(name for name in begun if name not in done + failed)
            when = f"during {cut}, whose earlier results are untouched" if cut else "between two experiments"
            so_far = f"; {', '.join(done)} finished" if done else ""
            rest = "" if plan.bare else "; --resume does the rest"
            line(f"interrupted {when if begun else 'before any experiment began'}{so_far}{rest}")
            return Outcome(INTERRUPTED, tuple(done), tuple(failed))
    if failed:
        say(f"failed: {', '.join(failed)}")
    return Outcome(FAILED if failed else OK, tuple(done), tuple(failed))


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Be the only one that writes to a folder."""
    from experiments import results

    try:
        with results.lock(out):
            yield
    except BlockingIOError as error:
        raise Unusable(f"{error}; wait for it to end, or write elsewhere with --out") from None


def is_current(entry: Entry, plan: Plan, device: str) -> bool:
    """Whether a run of this entry would give again what is saved: nothing that numbers depend on has changed."""
    from experiments import results

    if Path(str(plan.overrides.get("data", ""))).is_file():
        return False  # what is in the file is not recorded
    try:
        saved = results.read(plan.out, entry.name, device)
        edited = results.edited(plan.out, entry.name, device)
    except (ValueError, OSError):
        return False
    config = results.as_saved(dataclasses.asdict(configure(entry, plan)))
    now = {"code": results.code(entry.name), **results.surroundings()}
    return not edited and saved.config == config and all(saved.provenance[key] == now[key] for key in now)


def configure(entry: Entry, plan: Plan) -> Any:
    """The settings of an experiment in a plan."""
    module = importlib.import_module(f"experiments.{entry.name}")
    settings = {key: value for key, value in plan.overrides.items() if key in entry.fields}
    return dataclasses.replace(module.QUICK if plan.quick else module.Config(), **settings)


def verify_study(arguments: Arguments) -> int:
    """Run again, elsewhere, and say of every published number whether it is the same."""
    folder, entries = committed(arguments, "verify")
    from experiments import results, verify

    device = start_jax(arguments.device)
    with tempfile.TemporaryDirectory(prefix="jaxgrad-verify-") as temporary:
        rerun, failed = arguments.rerun, ()
        if rerun is None:
            rerun = Path(temporary)
            able = tuple(entry for entry in entries if (entry.name, device) in results.saved(folder))
            outcome = carry_out(Plan(able, {}, arguments.quick, rerun, device, bare=True), device)
            if outcome.status == INTERRUPTED:
                return INTERRUPTED
            failed = outcome.failed
        elif not results.saved(rerun):
            raise Unusable(f"--rerun {rerun}: there are no results in it")
        ran = {name for name, _ in results.saved(rerun)}
        found = []
        for entry in entries:
            known = (entry.name, device) in results.saved(folder)
            if entry.name in failed or (known and entry.name not in ran):
                continue
            module = importlib.import_module(f"experiments.{entry.name}")
            try:
                found.append(verify.study(folder, rerun, entry.name, device, module.PUBLISHED, not arguments.quick))
            except (ValueError, OSError) as error:
                raise Unusable(str(error)) from None
        if arguments.note and ran:
            say(f"noted: {verify.note(folder, rerun, device, found)}")
    if not found and not failed:
        raise Unusable(f"{rerun} and {folder} have no result on {device} in common: nothing was compared")
    print(verify.text(found, arguments.every))
    differs = [one.name for one in found if one.count("differs")]
    if differs:
        say(f"differs: {', '.join(differs)}")
    return FAILED if failed or differs else OK


def record_spread(arguments: Arguments) -> int:
    """Run again as the machine would round otherwise, and record by how much each number moves."""
    folder, entries = committed(arguments, "spread")
    from experiments import results, spread

    device = start_jax(arguments.device)
    with writing(folder), tempfile.TemporaryDirectory(prefix="jaxgrad-spread-") as temporary:
        plan = Plan(entries, {}, arguments.quick, folder, device, bare=True)
        stale = tuple(entry for entry in entries if not is_current(entry, plan, device))
        if stale and not arguments.quick:
            names = " ".join(entry.name for entry in stale)
            raise Unusable(f"these results are not of this code on this machine: run `python -m experiments {names}`")
        if (status := carry_out(plan._replace(entries=stale), device).status) != OK:
            return status
        echoes: dict[str, dict[str, Result]] = {entry.name: {} for entry in entries}
        for nudge, (label, variables) in enumerate(spread.ECHOES[device].items(), 1):
            say(f"echo: {label}")
            out = Path(temporary) / label
            flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), variables.get("XLA_FLAGS"))))
            options = ["--bare", "--device", device, "--out", str(out), *(["--quick"] if arguments.quick else [])]
            done = subprocess.run(
                [sys.executable, "-m", "experiments.spread", str(nudge), *echoes, *options], check=False,
                cwd=Path(experiments.__path__[0]).parent, env={**os.environ, **variables, "XLA_FLAGS": flags},
            )  # fmt: skip
            if done.returncode:
                say(f"echo {label} failed: nothing is recorded")
                return done.returncode
            for name, found in echoes.items():
                found[label] = results.read(out, name, device)
        for name, found in echoes.items():
            module = importlib.import_module(f"experiments.{name}")
            say(str(spread.write(folder, results.read(folder, name, device), found, module.PUBLISHED)))
    return OK


def committed(arguments: Arguments, command: str) -> tuple[Path, tuple[Entry, ...]]:
    """The folder that verify and spread are about, and the experiments."""
    for option in ("seeds", "data", "target", "resume", "bare"):
        if getattr(arguments, option):
            raise Unusable(f"{command!r} runs what is committed, as it is: --{option} has no meaning for it")
    if command == "spread" and (arguments.rerun or arguments.every or arguments.note):
        raise Unusable("--rerun, --every and --note are for verify")
    folder = Path(arguments.out or (RESULTS / "quick" if arguments.quick else RESULTS))
    only_names = dataclasses.replace(
        arguments, names=arguments.names[1:], out=folder, rerun=None, every=False, note=False
    )
    entries = plan(only_names).entries
    from experiments import results

    if command == "verify" and not results.saved(folder):
        raise Unusable(f"there are no results in {folder} to verify")
    if command == "spread" and not arguments.quick and not arguments.names[1:]:
        entries = tuple(entry for entry in entries if any(entry.name == name for name, _ in results.saved(folder)))
    return folder, entries


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
        for name in ("plots", "published", "report", *(entry.name for entry in together)):
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
    stopped: threading.Event,
    done: list[str],
) -> dict[str, float]:
    """Run one experiment, draw it, write its results and add it to `done`; returns what its time was spent on.

    The figure is drawn in memory first, so that an experiment that cannot be drawn leaves the files as they were.
    Then the numbers are replaced, and then the figure's files. A stop between the two leaves the figure
    of the older numbers, until `--resume` or `report` draws it again.
    """
    from experiments import plots, published, report, results

    status(entry.name)
    module = importlib.import_module(f"experiments.{entry.name}")
    declared = getattr(module, "PUBLISHED", None)
    if declared is None:
        raise TypeError(published.undeclared(entry.name))
    config = configure(entry, plan)
    # What measures seconds runs alone, and may compile in several threads; the others are one thread each.
    start, compiled_before = time.perf_counter(), compile_seconds(entry.timed)
    numbers = module.run(config, lambda message: status(f"{entry.name}: {message}"))
    times = {
        "seconds": round(time.perf_counter() - start, 3),
        "compile_seconds": round(compile_seconds(entry.timed) - compiled_before, 3),
    }
    numbers = results.as_saved(numbers)
    published.parts(entry.name, numbers, declared)
    if "data" in plan.overrides and Path(str(getattr(config, "data", ""))).is_file():
        # Published settings name the file, not where somebody keeps it.
        config = dataclasses.replace(config, data=Path(config.data).name)
    with DRAWING:
        claims = module.claims(numbers)
        figure = None if plan.bare else plots.render(module.draw(numbers))
        with undisturbed():
            if stopped.is_set():
                raise RuntimeError("the study was interrupted")
            results.write(plan.out, entry.name, device, config, numbers, claims, times)
            if figure is not None:
                plots.write(figure, plan.out / entry.name, report.figure_stem(device))
            done.append(entry.name)
    return times


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put off Ctrl-C until the end of the block. It reaches the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: asked.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


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


def start_jax(device: str | None) -> str:
    """Import JAX for a device and name what it computes on; matrix products are exact to float32."""
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    # A GPU would otherwise round the factors of a product to fewer bits than the CPU does.
    jax.config.update("jax_default_matmul_precision", "highest")
    backend = jax.default_backend()
    if device == "gpu" and backend != "gpu":
        raise Unusable(
            "--device gpu: JAX finds no GPU here; where there is one, install the extra cuda12 or cuda13 "
            '(python -m pip install -e ".[study,cuda12]"), else use --device cpu'
        )
    return backend


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
    # In one piece: experiments that run side by side speak too.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def is_the_persons(error: Exception, plan: Plan) -> bool:
    """Whether the person can mend it: a package is missing, or their data or seeds do not do.

    Data do not do where reading them failed, or where our code says so in a `raise`; what NumPy or JAX stumble over
    is the experiment's own failure.
    """
    if isinstance(error, ModuleNotFoundError):
        return True
    if not plan.overrides or not isinstance(error, ValueError | OSError):
        return False
    import jaxgrad

    frames = traceback.extract_tb(error.__traceback__)
    reading = Path(jaxgrad.__path__[0]) / "data"
    ours = [Path(folder) for folder in (*experiments.__path__, *jaxgrad.__path__)]
    said = (frames[-1].line or "").startswith("raise") and any(
        Path(frames[-1].filename).is_relative_to(folder) for folder in ours
    )
    return said or ("data" in plan.overrides and any(Path(f.filename).is_relative_to(reading) for f in frames))


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


if __name__ == "__main__":
    exit_status = main()
    if exit_status in (INTERRUPTED, UNUSABLE):
        # Without this, Python would wait for what other threads or the device still run.
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
