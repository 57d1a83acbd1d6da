"""`python -m experiments`: run the study, list it, draw it again from saved data, or verify that a re-run agrees.

The command line is read and refused before JAX is imported: help and errors come at once.
"""

import dataclasses
import difflib
import gc
import importlib
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import experiments
from experiments.engine import machine, work
from experiments.engine.catalogue import Entry, catalogue

INSTALL = 'run: python -m pip install -e ".[study]"'

try:
    import tyro
    from tyro import conf
except ModuleNotFoundError:
    sys.exit(f"error: the study needs more than the library; {INSTALL}")

if TYPE_CHECKING:
    from experiments.engine.report import Chapter
    from experiments.engine.results import Result
    from experiments.engine.verify import Comparison
    from jaxgrad.data import Column

RESULTS = Path(__file__).resolve().parent.parent / "results"
"""The study's own results, which the front page shows."""
OK, FAILED, UNUSABLE, AGAIN, INTERRUPTED = 0, 1, 2, 75, 130
MOST_TOGETHER = 4
"""Experiments that run side by side at most, since memory is not without end."""
IN_PARALLEL = ("gd_vs_sgd",)
"""Experiments that spread their rows over all processes and devices, and can save themselves as they go."""

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

verify runs again into a temporary folder, touches nothing that is committed, and says of every number and curve
whether it is the same: `python -m experiments verify --help`. For whoever changes the study there are `spread` and
`power`, with a --help each.

An experiment's files are replaced when it is done, each whole or not at all, whenever the study is stopped.
--resume leaves out what was finished by this very code with these settings, versions and machine. The rest
gives the same bits as if nothing had happened, but for what is measured in seconds. One study at a time writes to a
folder; another says so and ends.

On your own data, or in several processes (srun, mpirun, python -m jaxgrad.launch), gd_vs_sgd alone also saves itself
as it goes. SIGTERM and Ctrl-C then end it at the next checkpoint with status 75, run me again: --resume goes on from
there, and also after a kill. Without --resume it begins anew.

exit status: 0 done, 1 an experiment failed or a number differs, 2 unusable arguments, data, files or folders, 75
stopped when asked: run again with --resume, 130 interrupted (Ctrl-C), 143 terminated (SIGTERM)
"""


HELP = {
    "verify": """\
usage: python -m experiments verify [NAME ...] [--quick] [--rerun DIR] [--all] [--note] [--out DIR] [--device cpu|gpu]

Are the published numbers those that this machine gets? Runs again into a temporary folder (12 minutes; --quick: one),
touches nothing that is committed, and gives every number, curve and claim one of four verdicts:

  identical        the same to the last bit
  agrees           off by no more than rounding moves such a number, or than its own random numbers allow
  differs          off by more: the code, the data or a setting is not that of the publication, or one of both is wrong
  not comparable   seconds of another machine, counts of another compiler, a choice at a tie: no verdict is possible

First one line for each experiment and a sentence; then what differs, with both values, the tolerance and the kind of
change that does this. What rounding may do is measured, not chosen: the study was run in other environments, and each
of them was judged by what the others show (the table is in results/README.md, Re-runs).

  --quick       the small sizes, against results/quick
  --rerun DIR   compare results that you have already; nothing is run
  --all         every number with its verdict
  --note        keep what was found in verified.json, for the table of re-runs

exit status: 0 nothing differs, 1 something does, 2 it could not be done, 130 interrupted
""",
    "spread": """\
usage: python -m experiments spread [NAME ...] [--quick] [--python INTERPRETER] [--echoes DIR] [--out DIR]
                                    [--device cpu|gpu]

For whoever changes the study: how far does rounding move each number? Runs the study again in environments that round
otherwise (other vector instructions in XLA and NumPy, another BLAS kernel, another C library, one thread, nudged data,
and another Python and JAX where --python names one that has this study installed), and records the size of what moved
beside the results: verify's tolerances follow from it. Then each environment is left out in turn and judged by the
others; where anything differs that is said, and the exit status is 1. What older code recorded is first run as it is,
and must come out the same to the last bit. It takes as long as the study for each environment; with --echoes DIR what
each environment gave is kept there, and a second start goes on from it.
""",
    "power": """\
usage: python -m experiments power [NAME ...] [--quick] [--out DIR] [--device cpu|gpu]

How small a mistake does verify see? Runs the study with every step size, then with one example's target, changed by
1 %, 0.1 %, ... for as long as verify says that it differs, and records the smallest such change of each experiment.
""",
}

QUIET: Any = {"help_behavior_hint": ""}
"""For the help, where `(default: None)` behind every option says nothing."""


class Unusable(Exception):
    """What the person asked for cannot be done; the message says why and what can."""


@dataclasses.dataclass
class Arguments:
    """Gradient descent against SGD: the lecture's formulas and claims, run, measured and drawn."""

    names: Annotated[tuple[str, ...], conf.Positional, conf.arg(metavar="[NAME ...]", **QUIET)] = ()
    """Experiments to run (none: all), or `list`, or `report`; or `verify`, `spread` or `power` and experiments."""

    quick: Annotated[bool, conf.arg(**QUIET)] = False
    """Small sizes: seconds instead of minutes."""

    seeds: Annotated[str | None, conf.arg(metavar="N", **QUIET)] = None
    """How many seeds the experiments that have seeds use."""

    data: Annotated[str | None, conf.arg(metavar="NAME_OR_FILE", **QUIET)] = None
    """A data set by name, or a file of your own (CSV, npz, svmlight)."""

    target: Annotated[str | None, conf.arg(metavar="COLUMN", **QUIET)] = None
    """The column of --data to predict."""

    task: Annotated[str | None, conf.arg(metavar="{regression,binary,classes}", **QUIET)] = None
    """What the target of --data is. By default its values tell."""

    decimal: Annotated[str | None, conf.arg(metavar="SIGN", **QUIET)] = None
    """The decimal sign in a CSV file's numbers, '.' or ','. By default all its numbers together tell."""

    thousands: Annotated[str | None, conf.arg(metavar="SIGN", **QUIET)] = None
    """The sign between thousands in a CSV file's numbers."""

    header: Annotated[str | None, conf.arg(metavar="{yes,no}", **QUIET)] = None
    """Whether the first row of a CSV file is a header. By default what is in it and below tells."""

    drop: Annotated[tuple[str, ...], conf.arg(metavar="COLUMN ...", **QUIET)] = ()
    """Columns of a CSV file to leave out."""

    text: Annotated[tuple[str, ...], conf.arg(metavar="COLUMN ...", **QUIET)] = ()
    """Columns of a CSV file that are words, whatever they look like."""

    memory: Annotated[str | None, conf.arg(metavar="GIB", **QUIET)] = None
    """Memory that --data may take (default: what is free). A larger npy file, or a folder of them, is read as it is
    needed."""

    out: Annotated[Path | None, conf.arg(metavar="DIR", **QUIET)] = None
    """Where results go. By default results, or, for what is not the published study, results-quick (--quick)
    and results-custom (--data, --seeds)."""

    device: Annotated[str | None, conf.arg(metavar="{cpu,gpu}", **QUIET)] = None
    """What to compute on. By default JAX picks."""

    resume: Annotated[bool, conf.arg(**QUIET)] = False
    """Only what is not there yet, or was made by other code, settings, versions or another machine; what was
    interrupted goes on where it can."""

    bare: Annotated[bool, conf.arg(**QUIET)] = False
    """Numbers only: no figures, no report."""

    rerun: Annotated[Path | None, conf.arg(metavar="DIR", **QUIET)] = None
    """For verify: results of a re-run that you have already; nothing is run."""

    every: Annotated[bool, conf.arg(name="all", **QUIET)] = False
    """For verify: list every number with its verdict, not only those that differ."""

    note: Annotated[bool, conf.arg(**QUIET)] = False
    """For verify: keep what was found in verified.json, for the table on the front page."""

    python: Annotated[str | None, conf.arg(metavar="INTERPRETER", **QUIET)] = None
    """For spread: another Python that has this study installed."""

    echoes: Annotated[Path | None, conf.arg(metavar="DIR", **QUIET)] = None
    """For spread: keep here what each environment gave, and use what is here already."""


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
    columns: tuple["Column", ...] = ()
    """What becomes of each column of a person's own file."""


COMMANDS = ("list", "report", "verify", "spread", "power")


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, and return the exit status."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        if argv and argv[0] in HELP and {"-h", "--help"} & {*argv}:
            print(HELP[argv[0]], end="")
            return OK
        if argv[:1] == ["altered"]:
            return run_altered(argv[1:])
        arguments = parse(argv)
        if arguments.names[:1] == ("list",):
            status = show_list(arguments)
        elif several() and arguments.names[:1] in [(name,) for name in COMMANDS]:
            raise Unusable(f"{arguments.names[0]!r} is for one process, not several")
        elif arguments.names[:1] == ("report",):
            status = redraw(arguments)
        elif arguments.names[:1] == ("verify",):
            status = verify_study(arguments)
        elif arguments.names[:1] == ("spread",):
            status = record_spread(arguments)
        elif arguments.names[:1] == ("power",):
            status = record_power(arguments)
        else:
            status = run(plan(arguments))
        return status
    except Unusable as error:
        complain(f"error: {error}")
        return UNUSABLE
    except OSError as error:
        complain(f"error: {files().sentence(error)}")
        return UNUSABLE
    except KeyboardInterrupt:
        from jaxgrad import commandline

        say(commandline.word())
        return INTERRUPTED


def parse(argv: list[str]) -> Arguments:
    """The command line as data. Prints help, or what is wrong with it, and exits where it must."""
    entries = catalogue().values()
    width = max((len(entry.name) for entry in entries), default=0)
    listing = "\n".join(f"  {entry.name:<{width}}  {entry.headline}" for entry in entries)
    return tyro.cli(
        Arguments,
        prog="python -m experiments",
        description=f"{Arguments.__doc__}\n\nexperiments:\n{listing}\n\n{EXAMPLES}",
        args=names_first(argv),
        config=(conf.FlagCreatePairsOff,),
    )


def names_first(argv: list[str]) -> list[str]:
    """The same command line with its names in front: `verify --quick losses` is `verify losses --quick`."""
    flags = {"all", "help", *(field.name for field in dataclasses.fields(Arguments) if field.default is False)}
    names: list[str] = []
    options: list[str] = []
    room = 0.0  # for values of the option before
    for word in argv:
        if word.startswith("-"):
            option = word.removeprefix("--")
            several = getattr(Arguments, option, None) == ()
            room = 0 if option in flags or "=" in word or word == "-h" else float("inf") if several else 1
            options.append(word)
        elif room:
            options.append(word)
            room -= 1
        else:
            names.append(word)
    return names + options


def plan(arguments: Arguments) -> Plan:
    """Everything that can be wrong with the arguments, found before anything is imported or written."""
    known = catalogue()
    for name in arguments.names:
        if name in COMMANDS:
            alone = "comes first" if name in HELP else "stands alone"
            raise Unusable(f"{name!r} {alone}: python -m experiments {name}")
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
    for option, name in (("rerun", "rerun"), ("every", "all"), ("note", "note")):
        if getattr(arguments, option):
            raise Unusable(f"--{name} is for verify: python -m experiments verify --{name} ...")
    for name in ("python", "echoes"):
        if getattr(arguments, name):
            raise Unusable(f"--{name} is for spread: python -m experiments spread --{name} ...")
    given = {
        "seeds": whole(arguments.seeds), "data": arguments.data, "target": arguments.target,
        "memory": gibibytes(arguments.memory), "options": reading(arguments),
    }  # fmt: skip
    overrides = {field: value for field, value in given.items() if value is not None}
    entries = tuple(known[name] for name in dict.fromkeys(arguments.names)) or tuple(known.values())
    if arguments.names:
        for entry in entries:
            for field in overrides:
                if field not in entry.fields:
                    able = ", ".join(name for name, other in known.items() if field in other.fields)
                    option = next(iter(overrides["options"])) if field == "options" else field
                    raise Unusable(f"{entry.name} takes no --{option}; {able or 'none'} does")
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


READING = ("task", "decimal", "thousands", "header", "drop", "text")
"""Options that say how the file of --data is read."""


def reading(arguments: Arguments) -> dict[str, Any] | None:
    """How --data is read, as keyword arguments of `data.load`; None where nothing is said."""
    given = {name: value for name in READING if (value := getattr(arguments, name)) not in (None, ())}
    if given and arguments.data is None:
        raise Unusable(f"--{next(iter(given))} is for --data, and there is no --data")
    if given.get("task", "classes") not in ("regression", "binary", "classes"):
        raise Unusable(f"--task must be regression, binary or classes, got {given['task']!r}")
    if given.get("header", "yes") not in ("yes", "no"):
        raise Unusable(f"--header must be yes or no, got {given['header']!r}")
    if "header" in given:
        given["header"] = given["header"] == "yes"
    return given or None


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
    existing = next(parent for parent in (out, *Path(os.path.realpath(out)).parents) if parent.exists())
    if not existing.is_dir():
        raise Unusable(f"--out {out}: {existing} is a file, not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Unusable(f"--out {out}: {existing} cannot be written to")


def is_the_studys_own(out: Path) -> bool:
    return os.path.realpath(out) == str(RESULTS)  # `Path.resolve` raises where links lead in a circle


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
    from experiments.engine import report, results

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
    """Run every experiment of the plan, the next ones too where one fails; then write the report.

    Started in several processes (srun, mpirun, `jaxgrad.launch`), each experiment spreads its rows over them; rank 0
    alone writes and talks.
    """
    device = start_jax(plan.device, join=True)
    if several():
        check_processes(plan)
    plan = plan._replace(columns=columns_of(plan))
    with writing(plan.out):
        say(f"results go to {plan.out}")
        there = finished_before(plan, device) if plan.resume else ()
        if there:
            say(f"finished before, by this very code: {', '.join(entry.name for entry in there)}")
        rest = plan._replace(entries=tuple(entry for entry in plan.entries if entry not in there))
        outcome = carry_out(rest, device)
        if outcome.status in (AGAIN, INTERRUPTED) or plan.bare or rank() > 0:
            return outcome.status
        from experiments.engine import report

        chapters = load(plan.out)
        if not chapters:
            return outcome.status  # each has failed, and said so: there is nothing to report on
        # Whoever stopped the study may have done so between the numbers and their figures.
        report.draw(plan.out, [chapter for chapter in chapters if chapter.name in {entry.name for entry in there}])
        publish(plan.out, chapters)
        if is_the_studys_own(plan.out) and device == "cpu":
            from experiments.engine import provenance

            provenance.environment(RESULTS)
    show_verdicts([chapter for chapter in chapters if chapter.name in outcome.done])
    return outcome.status


def columns_of(plan: Plan) -> tuple["Column", ...]:
    """What becomes of each column of a person's own file, which is said before anything runs; () without one.

    Refuses, in the reader's words, a file that cannot be used.
    """
    file = plan.overrides.get("data")
    if file is None or not Path(file).expanduser().is_file():
        return ()
    from experiments.engine import report
    from jaxgrad import data

    if machine.stays_on_disk(file, plan.overrides.get("memory")):
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", data.Doubtful)  # the account says the same
            own = data.load(file, target=plan.overrides.get("target"), **(plan.overrides.get("options") or {}))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise Unusable(on_the_command_line(str(error))) from None
    say("\n".join(report.columns_text(own, Path(file).name)))
    return own.columns


def on_the_command_line(message: str) -> str:
    """A message of `data.load` with its keyword arguments as options of the command line."""
    message = message.replace("header=True", "--header yes").replace("header=False", "--header no")
    return re.sub(
        r"\b(target|task|decimal|thousands|drop|text)=(?=(\w|'|\")?)", lambda m: f"--{m[1]}{' ' * bool(m[2])}", message
    )


def check_processes(plan: Plan) -> None:
    """Refuse, in all processes, what several of them cannot do together."""
    from jaxgrad import parallel

    try:
        parallel.agree(arguments=repr(plan._replace(out=None)))  # type: ignore[arg-type]
    except ValueError as error:
        raise Unusable(str(error)) from None
    if unable := [entry.name for entry in plan.entries if entry.name not in IN_PARALLEL]:
        raise Unusable(f"in several processes only {', '.join(IN_PARALLEL)} can run, not {', '.join(unable)}")


def finished_before(plan: Plan, device: str) -> tuple[Entry, ...]:
    """What need not run again; rank 0 looks for all."""
    own = [entry.name for entry in plan.entries if is_current(entry, plan, device)] if rank() == 0 else []
    if several():
        from jaxgrad import parallel

        own = parallel.from_main(lambda: " ".join(own).encode()).decode().split()
    return tuple(entry for entry in plan.entries if entry.name in own)


class Outcome(NamedTuple):
    status: int
    done: tuple[str, ...]
    failed: tuple[str, ...]


def carry_out(plan: Plan, device: str) -> Outcome:
    """Run the experiments of a plan and write their results."""
    done: list[str] = []
    failed: list[str] = []
    running: list[str] = []
    with screen(len(plan.entries)) as (status, line):
        try:
            with outcomes(plan, device, status, running) as each:
                for name, outcome in each:
                    if isinstance(outcome, work.Failure):
                        if outcome.persons:
                            raise Unusable(f"{name}: {outcome.words}{f'; {INSTALL}' if outcome.missing else ''}")
                        failed.append(name)
                        (complain if rank() > 0 else line)(f"{name} failed: {outcome.words}")
                        continue
                    with undisturbed():
                        if rank() == 0:
                            store(plan.out, name, device, outcome, plan.columns)
                            shutil.rmtree(unfinished(plan.out, name), ignore_errors=True)
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


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Be the only one that writes to a folder."""
    from experiments.engine import results
    from jaxgrad import commandline

    commandline.interruptible()
    with ExitStack() as held:

        def hold() -> None:
            if rank() == 0:
                held.enter_context(results.lock(out))

        try:
            if several():
                from jaxgrad import parallel

                parallel.together(hold)
            else:
                hold()
        except BlockingIOError as error:
            raise Unusable(f"{error}; wait for it to end, or write elsewhere with --out") from None
        yield


def is_current(entry: Entry, plan: Plan, device: str) -> bool:
    """Whether a run of this entry would give again what is saved: nothing that numbers depend on has changed."""
    from experiments.engine import provenance, results

    if "data" in plan.overrides and Path(plan.overrides["data"]).exists():
        return False  # what is in the file is not recorded
    try:
        saved = results.read(plan.out, entry.name, device)
        edited = results.edited(plan.out, entry.name, device)
    except (ValueError, OSError):
        return False
    config = results.as_saved(dataclasses.asdict(work.configure(entry, plan.overrides, plan.quick)))
    now = {"code": provenance.code(entry.name), **provenance.surroundings()}
    return not edited and saved.config == config and all(saved.provenance[key] == now[key] for key in now)


def verify_study(arguments: Arguments) -> int:
    """Run again, elsewhere, and say of every published number whether it is the same."""
    folder, entries = committed(arguments, "verify")
    from experiments.engine import results, verify

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
                found.append(
                    verify.study(
                        folder, rerun, entry.name, device, module.PUBLISHED, not arguments.quick, module.claims
                    )
                )
            except ValueError as error:
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
    """Run again in environments that round otherwise, record by how much each number moves, and prove it."""
    folder, entries = committed(arguments, "spread")
    from experiments.engine import altered, echoes, environments, proof, results, verify

    device = start_jax(arguments.device)
    entries = there(entries, folder, device)
    chosen = {
        label: one
        for label, one in environments.ENVIRONMENTS[device].items()
        if arguments.python or not one.other_python
    }
    as_fast = [label for label, one in chosen.items() if not one.variables and not one.other_python]
    with writing(folder), tempfile.TemporaryDirectory(prefix="jaxgrad-spread-") as temporary:
        kept = arguments.echoes or Path(temporary)
        if moved := moved_since(entries, arguments.quick, folder, device, Path(temporary) / "as it is"):
            again = f"{' '.join(moved)}{f' --quick --bare --out {folder}' if arguments.quick else ''}"
            raise Unusable(
                f"this code on this machine gives other numbers than those in {folder} ({', '.join(moved)}): run "
                f"`python -m experiments {again}` first"
            )
        heard: dict[str, dict[str, Result]] = {entry.name: {} for entry in entries}
        for label, one in chosen.items():
            say(f"environment: {label}")
            missing = [name for name in heard if (name, device) not in results.saved(kept / label)]
            change = altered.Change(nudge=one.nudge, untimed=label not in as_fast)
            options = bare(kept / label, device, arguments.quick)
            python = arguments.python if one.other_python else None
            if missing and (failed := altered.run(change, [*missing, *options], one.variables, python)):
                say(f"{label} failed: nothing is recorded")
                return failed
            for name, found in heard.items():
                found[label] = results.read(kept / label, name, device)
        counts, wrong = {}, []
        for name, found in heard.items():
            module, old = importlib.import_module(f"experiments.{name}"), results.read(folder, name, device)
            say(str(echoes.write(folder, old, echoes.measure(old, found, module.PUBLISHED, as_fast))))
            verdicts = proof.left_out(old, found, module)
            counts[name] = {label: {v: one.count(v) for v in verify.VERDICTS} for label, one in verdicts.items()}
            wrong += [(f"{name}, {label} left out", one) for label, one in verdicts.items() if one.count("differs")]
        say(str(proof.note(folder, "left out", device, counts)))
    for title, one in wrong:
        say(f"{title}:\n{verify.text([one])}")
    return FAILED if wrong else OK


def moved_since(entries: tuple[Entry, ...], quick: bool, folder: Path, device: str, out: Path) -> list[str]:
    """Which experiments this code, here, does not give again to the last bit, seconds apart.

    What was recorded by this very code on this machine need not be run for that.
    """
    from experiments.engine import verify

    older = tuple(e for e in entries if not is_current(e, Plan(entries, {}, quick, folder, device), device))
    if not older:
        return []
    say(f"recorded by older code, or elsewhere, so first run as it is: {' '.join(entry.name for entry in older)}")
    failed = carry_out(Plan(older, {}, quick, out, device, bare=True), device).failed
    names = [entry.name for entry in older]
    return [name for name in names if name in failed or not verify.unmoved(compared(folder, out, name, device))]


def record_power(arguments: Arguments) -> int:
    """Run again with planted mistakes of shrinking size, and record which of them verify sees."""
    folder, entries = committed(arguments, "power")
    from experiments.engine import proof

    device = start_jax(arguments.device)
    names = [entry.name for entry in there(entries, folder, device)]
    for kind in ("eta", "target"):
        differs = partial(seen, arguments, folder, device, kind)
        with writing(folder):
            say(str(proof.note(folder, kind, device, proof.power(names, differs))))
    return OK


def run_altered(argv: list[str]) -> int:
    """Run the study with a change in it: `spread` and `power` start this in processes of their own."""
    import json

    from experiments.engine import altered

    if not argv:
        raise Unusable("'altered' needs a change, as JSON, and then what to run")
    try:
        work.changed = altered.Change(**json.loads(argv[0]))
    except (ValueError, TypeError):
        fields = ", ".join(altered.Change._fields)
        raise Unusable(f"'altered' needs a change as a JSON object of {fields}, got {argv[0]!r}") from None
    altered.apply(work.changed)
    return main(argv[1:])


def seen(arguments: Arguments, folder: Path, device: str, kind: str, level: float, names: list[str]) -> dict[str, bool]:
    """Of which experiments verify says that they differ, when they run with a change of this kind and size."""
    from experiments.engine import altered

    change = altered.Change(untimed=True)._replace(**{kind: level})
    say(f"{kind} changed by {level:g}: {' '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="jaxgrad-power-") as temporary:
        if status := altered.run(change, [*names, *bare(Path(temporary), device, arguments.quick)]):
            raise Unusable(f"the study with {kind} changed by {level:g} ended with status {status}")
        found = {}
        for name in names:
            found[name] = compared(folder, Path(temporary), name, device).count("differs") > 0
        return found


def compared(folder: Path, rerun: Path, name: str, device: str) -> "Comparison":
    """The verdicts on a re-run of one experiment, whose seconds do not matter."""
    from experiments.engine import verify

    module = importlib.import_module(f"experiments.{name}")
    return verify.study(folder, rerun, name, device, module.PUBLISHED, timed=False, claims=module.claims)


def bare(out: Path, device: str, quick: bool) -> list[str]:
    """The options of a run that leaves numbers only, elsewhere."""
    return ["--bare", "--device", device, "--out", str(out), *(["--quick"] if quick else [])]


def there(entries: tuple[Entry, ...], folder: Path, device: str) -> tuple[Entry, ...]:
    """Those that publish what rounding can move; all of them must have been run."""
    from experiments.engine import results

    entries = tuple(entry for entry in entries if computes(entry))
    if missing := " ".join(entry.name for entry in entries if (entry.name, device) not in results.saved(folder)):
        raise Unusable(f"there are no results of {missing} in {folder}: run `python -m experiments {missing}`")
    return entries


def computes(entry: Entry) -> bool:
    """Whether an experiment publishes anything that rounding can move: more than seconds."""
    module = importlib.import_module(f"experiments.{entry.name}")
    return any(words.split(",")[0] not in ("exact", "machine", "timing") for words in module.PUBLISHED.values())


def committed(arguments: Arguments, command: str) -> tuple[Path, tuple[Entry, ...]]:
    """The folder that verify and spread are about, and the experiments."""
    for option in ("seeds", "data", "target", *READING, "resume", "bare"):
        if getattr(arguments, option):
            raise Unusable(f"{command!r} runs what is committed, as it is: --{option} has no meaning for it")
    if command != "verify" and (arguments.rerun or arguments.every or arguments.note):
        raise Unusable("--rerun, --all and --note are for verify")
    for option in ("python", "echoes"):
        if command != "spread" and getattr(arguments, option):
            raise Unusable(f"--{option} is for spread")
    if arguments.python and shutil.which(arguments.python) is None:
        raise Unusable(f"--python {arguments.python}: there is no such program")
    folder = Path(arguments.out or (RESULTS / "quick" if arguments.quick else RESULTS))
    only_names = dataclasses.replace(
        arguments, names=arguments.names[1:], out=folder, rerun=None, every=False, note=False, python=None, echoes=None
    )
    entries = plan(only_names).entries
    from experiments.engine import results

    if command == "verify" and not results.saved(folder):
        raise Unusable(f"there are no results in {folder} to verify")
    if command != "verify" and not arguments.quick and not arguments.names[1:]:
        entries = tuple(entry for entry in entries if any(entry.name == name for name, _ in results.saved(folder)))
    return folder, entries


@contextmanager
def outcomes(
    plan: Plan, device: str, status: Callable[[str], None], running: list[str]
) -> Iterator[Iterator[tuple[str, work.Product | work.Failure]]]:
    """What each experiment of the plan yields, as it becomes ready; `running` holds the names of those at work.

    Several on the CPU run in worker processes, one on each core, since most of their time is compiling, which uses
    one. Those that measure seconds come first, one at a time; while they measure, the others stand still
    (`work.alone`). One experiment alone, on a GPU, which a process has to itself, or in one of several processes that
    compute together, runs here. Whatever ends the block, an interrupt too, ends the workers.
    """

    bare = plan.bare or rank() > 0
    tasks = [work.Task(entry, plan.overrides, plan.quick, device, bare) for entry in plan.entries]
    untimed = work.changed is not None and work.changed.untimed
    timed = [] if untimed else [task for task in tasks if task.entry.timed]
    others = [task for task in tasks if untimed or not task.entry.timed]

    def here() -> Iterator[tuple[str, work.Product | work.Failure]]:
        for task in timed + others:
            running[:] = [task.entry.name]
            if task.entry.name in IN_PARALLEL and (several() or "data" in plan.overrides):
                task = task._replace(unfinished=unfinished(plan.out, task.entry.name), resume=plan.resume)
            outcome = work.perform(task, status)
            running.clear()
            yield task.entry.name, outcome

    if several() or device != "cpu" or len(tasks) == 1 or (cores := min(MOST_TOGETHER, machine.cores())) == 1:
        yield here()
        return
    new = multiprocessing.get_context("spawn")
    messages, workers = new.SimpleQueue(), new.Array("i", cores)
    ready = (list(experiments.__path__), device, messages, workers, work.changed)
    pool = ProcessPoolExecutor(cores, new, work.start, ready)

    def together() -> Iterator[tuple[str, work.Product | work.Failure]]:
        at_work: dict[Future[Any], work.Task] = {}

        def next_task() -> work.Task | None:
            measuring = any(task.entry.timed for task in at_work.values())
            if timed and not measuring and (work.CAN_STOP or not at_work):
                return timed.pop(0)
            beside = work.CAN_STOP or not (measuring or timed)
            return others.pop(0) if others and beside and len(at_work) < cores else None

        while timed or others or at_work:
            while task := next_task():
                with unheard():  # this process ends the workers
                    at_work[pool.submit(work.perform_here, task)] = task
            running[:] = [task.entry.name for task in at_work.values()]
            # A wait without end could not be interrupted everywhere.
            finished = wait(at_work, timeout=0.1, return_when=FIRST_COMPLETED).done
            while not messages.empty():
                status(messages.get())
            suspects = list(running)
            for future in finished:
                task = at_work.pop(future)
                running.remove(task.entry.name)
                try:
                    outcome = future.result()
                except BrokenExecutor:
                    raise Unusable(
                        f"a worker process died in {' or '.join(suspects)}: is the memory used up? "
                        f"python -m experiments {suspects[0]} runs one without"
                    ) from None
                yield task.entry.name, outcome

    try:
        yield together()
    finally:
        for process in multiprocessing.active_children():
            process.kill()  # one that stands still would not hear anything else
        pool.shutdown(cancel_futures=True)


def unfinished(out: Path, name: str) -> Path:
    """Where an experiment keeps what it has until it is done."""
    return out / name / "unfinished"


def store(out: Path, name: str, device: str, product: work.Product, columns: tuple["Column", ...] = ()) -> None:
    """Write what an experiment yielded: numbers and figure, each file whole or not at all."""
    from experiments.engine import plots, report, results

    results.write(out, name, device, product.config, product.numbers, product.claims, product.times, columns)
    if product.figure:
        plots.write(product.figure, out / name, report.figure_stem(device))


@contextmanager
def undisturbed() -> Iterator[None]:
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


@contextmanager
def unheard() -> Iterator[None]:
    """What is started in the block never gets a Ctrl-C or SIGTERM of its own; to this process they come after it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def load(out: Path) -> list["Chapter"]:
    """All results in a folder; one that cannot be read is the person's to mend, and its error says how."""
    from experiments.engine import report

    try:
        return report.load(out)
    except (ValueError, OSError) as error:
        words = files().sentence(error) if isinstance(error, OSError) else error
        raise Unusable(f"no report was written: {words}") from error


def publish(out: Path, chapters: list["Chapter"]) -> None:
    """Write the report of a folder, as Markdown and as a page, and, for the study's own, the front page."""
    from experiments.engine import report

    say(f"report: {report.write(out, chapters)}")
    try:
        from experiments.engine import page

        say(f"page: {page.write(out, chapters)}")
    except ModuleNotFoundError as error:
        raise Unusable(f"no page was written, for {error.name} is not installed; {INSTALL}") from None
    readme = RESULTS.parent / "README.md"
    if is_the_studys_own(out) and readme.is_file() and report.front_page(readme, out, chapters):
        say(f"front page: {readme}")


def show_verdicts(chapters: list["Chapter"]) -> None:
    """The claims of what was run, one line each."""
    from experiments.engine import report

    for name, _, claim in report.claims_of(chapters):
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        print(f"{claim.id:<4} {verdict:<13} {claim.text}: {claim.measured} (expected {claim.expected}) [{name}]")


def start_jax(device: str | None, join: bool = False) -> str:
    """Import JAX for a device, `join` the other processes if there are any, and name what it computes on."""
    try:
        backend = machine.start_jax(device, join)
    except (ValueError, ConnectionError) as error:
        if not join:
            raise
        raise Unusable(str(error)) from None
    from jaxgrad import commandline

    commandline.interruptible()
    if device == "gpu" and backend != "gpu":
        raise Unusable(
            "--device gpu: JAX finds no GPU here; where there is one, install the extra cuda12 or cuda13 "
            '(python -m pip install -e ".[study,cuda12]"), else use --device cpu'
        )
    return backend


@contextmanager
def screen(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two ways to speak on stderr: a passing status, and a line that stays and means that one is done.

    On a terminal the status is one line under a bar; elsewhere each status is a line.
    """
    if rank() > 0 or not sys.stderr.isatty():
        yield say, say
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="experiment", leave=False, dynamic_ncols=True) as bar:

        def line(text: str) -> None:
            tqdm.write(text, file=sys.stderr)
            bar.update()

        yield bar.set_postfix_str, line


def say(text: str) -> None:
    if rank() > 0:
        return
    # In one piece: experiments that run side by side speak too.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def complain(text: str) -> None:
    """What is wrong every process says: it may be wrong there only."""
    sys.stderr.write(f"rank {rank()}: {text}\n" if rank() > 0 else f"{text}\n")
    sys.stderr.flush()


def several() -> bool:
    """Whether this is one of several processes, which end together."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def rank() -> int:
    """Which of several processes this is; 0 writes and talks."""
    return sys.modules["jax"].process_index() if several() else 0


def files() -> Any:
    """`jaxgrad.files`, which the help and the errors of a command line do without."""
    from jaxgrad import files

    return files


if __name__ == "__main__":
    from jaxgrad import commandline

    exit_status = commandline.outcome(main)
    if several():
        from jaxgrad import parallel

        parallel.run(lambda: exit_status)
    # Python would wait for what other threads or the device still run. Locks of the workers that are not collected
    # before are reported as leaks.
    if at_once := exit_status not in (OK, FAILED):
        gc.collect()
    commandline.leave(exit_status, at_once)
