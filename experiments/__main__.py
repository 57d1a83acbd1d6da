"""`python -m experiments`: run the study, list it, or draw it again from saved data.

The command line is read and refused before JAX is imported: help and errors come at once.
"""

import dataclasses
import difflib
import gc
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import experiments
from experiments import Entry, catalogue, work

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
    if arguments.device not in (None, "cpu", "gpu"):
        raise Unusable(f"--device must be cpu or gpu, got {arguments.device!r}")
    if arguments.target is not None and arguments.data is None:
        raise Unusable("--target names a column of --data, and there is no --data")
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
    """Run every experiment of the plan, the next ones too where one fails; then write the report."""
    from experiments import results

    device = work.start_jax(plan.device)
    if plan.device == "gpu" and device != "gpu":
        raise Unusable(
            "--device gpu: JAX finds no GPU here; where there is one, install the extra cuda12 or cuda13 "
            '(python -m pip install -e ".[study,cuda12]"), else use --device cpu'
        )
    say(f"results go to {plan.out}")
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
                        line(f"{name} failed: {outcome.words}")
                        continue
                    store(plan.out, name, device, outcome)
                    done.append(name)
                    line("{}: {seconds:.1f} s, compiling {compile_seconds:.1f} core s".format(name, **outcome.times))
        except KeyboardInterrupt:
            during = f" during {' and '.join(running)}, whose earlier results are untouched" if running else ""
            so_far = f"; {', '.join(done)} finished" if done else ""
            line(f"interrupted{during}{so_far}")
            return INTERRUPTED
    chapters = load(plan.out)
    publish(plan.out, chapters)
    if plan.out.resolve() == RESULTS and device == "cpu":
        results.environment(RESULTS)
    show_verdicts([chapter for chapter in chapters if chapter.name in done])
    if failed:
        say(f"failed: {', '.join(failed)}")
    return FAILED if failed else OK


@contextmanager
def outcomes(
    plan: Plan, device: str, status: Callable[[str], None], running: list[str]
) -> Iterator[Iterator[tuple[str, work.Product | work.Failure]]]:
    """What each experiment of the plan yields, as it becomes ready; `running` holds the names of those at work.

    Several on the CPU run in worker processes, one on each core, since most of their time is compiling, which uses
    one. Those that measure seconds come first, one at a time; while they measure, the others stand still
    (`work.alone`). One experiment alone, or on a GPU, which a process has to itself, runs here. Whatever ends the
    block, an interrupt too, ends the workers.
    """
    from experiments import results

    tasks = [work.Task(entry, plan.overrides, plan.quick, device) for entry in plan.entries]
    timed = [task for task in tasks if task.entry.timed]
    others = [task for task in tasks if not task.entry.timed]

    def here() -> Iterator[tuple[str, work.Product | work.Failure]]:
        for task in timed + others:
            running[:] = [task.entry.name]
            outcome = work.perform(task, status)
            running.clear()
            yield task.entry.name, outcome

    if device != "cpu" or len(tasks) == 1 or (cores := min(MOST_TOGETHER, results.cores())) == 1:
        yield here()
        return
    new = multiprocessing.get_context("spawn")
    messages, workers = new.SimpleQueue(), new.Array("i", cores)
    pool = ProcessPoolExecutor(cores, new, work.start, (list(experiments.__path__), device, messages, workers))

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
                at_work[pool.submit(work.perform_here, task)] = task
            running[:] = [task.entry.name for task in at_work.values()]
            # A wait without end could not be interrupted everywhere.
            ready = wait(at_work, timeout=0.1, return_when=FIRST_COMPLETED).done
            while not messages.empty():
                status(messages.get())
            for future in ready:
                task = at_work.pop(future)
                running.remove(task.entry.name)
                try:
                    outcome = future.result()
                except BrokenExecutor:
                    raise Unusable(
                        f"a worker process died in {task.entry.name}: is the memory used up? "
                        f"python -m experiments {task.entry.name} runs it without one"
                    ) from None
                yield task.entry.name, outcome

    try:
        yield together()
    finally:
        for process in multiprocessing.active_children():
            process.kill()  # one that stands still would not hear anything else
        pool.shutdown(cancel_futures=True)


def store(out: Path, name: str, device: str, product: work.Product) -> None:
    """Write what an experiment yielded: numbers and figure, each file whole or not at all."""
    from experiments import plots, report, results

    results.write(out, name, device, product.config, product.numbers, product.claims, product.times)
    plots.write(product.figure, out / name, report.figure_stem(device))


def load(out: Path) -> list["Chapter"]:
    """All results in a folder; one that cannot be read is the person's to mend, and its error says how."""
    from experiments import report

    try:
        return report.load(out)
    except (ValueError, OSError) as error:
        raise Unusable(f"no report was written: {error}") from error


def publish(out: Path, chapters: list["Chapter"]) -> None:
    """Write the report of a folder, as Markdown and as a page, and, for the study's own, the front page."""
    from experiments import report

    say(f"report: {report.write(out, chapters)}")
    try:
        from experiments import page

        say(f"page: {page.write(out, chapters)}")
    except ModuleNotFoundError as error:
        raise Unusable(f"no page was written, for {error.name} is not installed; {INSTALL}") from None
    readme = RESULTS.parent / "README.md"
    if out.resolve() == RESULTS and readme.is_file() and report.front_page(readme, out, chapters):
        say(f"front page: {readme}")


def show_verdicts(chapters: list["Chapter"]) -> None:
    """The claims of what was run, one line each."""
    from experiments import report

    for name, _, claim in report.claims_of(chapters):
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        print(f"{claim.id:<4} {verdict:<13} {claim.text}: {claim.measured} (expected {claim.expected}) [{name}]")


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


if __name__ == "__main__":
    exit_status = main()
    if exit_status in (INTERRUPTED, UNUSABLE):
        # Without this, Python would wait for what other threads or the device still run. Locks of the workers that
        # are not collected before are reported as leaks.
        gc.collect()
        sys.stdout.flush()
        os._exit(exit_status)
    sys.exit(exit_status)
