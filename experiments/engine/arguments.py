"""The command line of the study: read, and refused before JAX or NumPy is imported."""

import dataclasses
import difflib
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import experiments
from experiments.engine.catalogue import Entry, catalogue

INSTALL = 'run: python -m pip install -e ".[study]"'

try:
    import tyro
    from tyro import conf
except ModuleNotFoundError:
    sys.exit(f"error: the study needs more than the library; {INSTALL}")

if TYPE_CHECKING:
    from jaxgrad.data import Column

RESULTS = Path(experiments.__file__).resolve().parent.parent / "results"
"""The study's own results, which the front page shows."""

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
    change: Any = None
    """An `altered.Change` that is made in every process of the run."""


COMMANDS = ("list", "report", "verify", "spread", "power")


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
    """Everything that can be wrong with the arguments of a run, found before anything is imported or written."""
    planned = chosen(arguments)
    check_folder(planned.out)
    return planned


def chosen(arguments: Arguments) -> Plan:
    """What is to be run, or looked at: the folder need not be one that may be written to."""
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
        "seeds": whole(arguments.seeds),
        "data": arguments.data,
        "target": arguments.target,
        "memory": gibibytes(arguments.memory),
        "options": reading(arguments),
    }
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


def only(arguments: Arguments, command: str, allowed: tuple[str, ...]) -> None:
    """Refuse what a command would ignore."""
    if arguments.names != (command,):
        raise Unusable(f"{command!r} stands alone: python -m experiments {command}")
    for field in dataclasses.fields(arguments):
        given = getattr(arguments, field.name) != field.default
        if field.name not in ("names", *allowed) and given:
            raise Unusable(f"{command!r} runs nothing: --{field.name} has no meaning for it")


def committed(arguments: Arguments, command: str) -> tuple[Path, tuple[Entry, ...]]:
    """The folder that verify, spread and power are about, and the experiments that were asked for."""
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
    entries = chosen(only_names).entries
    if command != "verify" or arguments.note:
        check_folder(folder)
    return folder, entries
