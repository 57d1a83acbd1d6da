"""The commands of the study: each is one function from its arguments to an exit status.

What needs JAX, NumPy or Matplotlib is imported in the command that needs it: help and errors come at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.engine import arguments
from experiments.engine.arguments import HELP, INSTALL, Arguments, Plan, Unusable, only, parse, plan
from experiments.engine.catalogue import catalogue
from experiments.engine.console import rank, report_error, say, several
from experiments.engine.status import AGAIN, FAILED, INTERRUPTED, OK, UNUSABLE

if TYPE_CHECKING:
    from experiments.engine.report import Chapter


def main(argv: list[str] | None = None) -> int:
    """Read the command line, do it, and return the exit status."""
    try:
        return _command(sys.argv[1:] if argv is None else argv)
    except Unusable as error:
        report_error(f"error: {error}")
        return UNUSABLE
    except OSError as error:
        from jaxgrad import files

        report_error(f"error: {files.sentence(error)}")
        return UNUSABLE
    except KeyboardInterrupt:
        from jaxgrad import commandline

        say(commandline.word())
        return INTERRUPTED


def _command(argv: list[str]) -> int:
    first = argv[0] if argv else ""
    if first in HELP and {"-h", "--help"} & {*argv}:
        print(HELP[first], end="")
        return OK
    if first == "altered":
        return run_altered(argv[1:])
    asked = parse(argv)
    name = asked.names[0] if asked.names else ""
    if name == "list":
        return list_experiments(asked)
    if name not in arguments.COMMANDS:
        return run(plan(asked))
    if several():
        raise Unusable(f"{name!r} is for one process, not several")
    if name == "report":
        return redraw(asked)
    from experiments.engine import reruns

    return {"verify": reruns.verify_numbers, "spread": reruns.record_spread, "power": reruns.record_power}[name](asked)


def list_experiments(asked: Arguments) -> int:
    """Print every experiment with its headline and the settings that the command line can change."""
    only(asked, "list", allowed=())
    for entry in catalogue().values():
        options = " ".join(f"--{field}" for field in ("seeds", "data", "target") if field in entry.fields)
        print(f"{entry.name}{f'  [{options}]' if options else ''}\n    {entry.headline}")
    return OK


def redraw(asked: Arguments) -> int:
    """Draw every figure and write the report from what is saved in the folder, running nothing."""
    only(asked, "report", allowed=("out",))
    out = Path(asked.out or arguments.RESULTS)
    from experiments.engine import report, results, study

    if not results.saved(out):
        raise Unusable(f"there are no results in {out}; run `python -m experiments` first")
    with study.writing(out):
        chapters = load(out)
        for path in report.draw(out, chapters):
            print(path)
        publish(out, chapters)
    return OK


def run(plan: Plan) -> int:
    """Run every experiment of the plan, the next ones too where one fails; then write the report.

    Started in several processes (srun, mpirun, `jaxgrad.launch`), each experiment spreads its rows over them; rank 0
    alone writes and talks.
    """
    from experiments.engine import provenance, study

    device = study.start_jax(plan.device, join=True)
    if several():
        study.check_processes(plan)
    if "data" in plan.overrides:
        from experiments.engine import own_data

        plan = plan._replace(columns=own_data.columns_of(plan))
    with study.writing(plan.out):
        say(f"results go to {plan.out}")
        there = study.finished_before(plan, device) if plan.resume else ()
        if there:
            say(f"finished before, by this very code: {', '.join(entry.name for entry in there)}")
        rest = plan._replace(entries=tuple(entry for entry in plan.entries if entry not in there))
        outcome = study.carry_out(rest, device)
        if outcome.status in (AGAIN, INTERRUPTED) or plan.bare or rank() > 0:
            return outcome.status
        from experiments.engine import report

        chapters = load(plan.out)
        if not chapters:
            return outcome.status  # each has failed, and said so: there is nothing to report on
        # The study may have been stopped between writing numbers and drawing their figures.
        report.draw(plan.out, [chapter for chapter in chapters if chapter.name in {entry.name for entry in there}])
        publish(plan.out, chapters)
        if arguments.is_the_studys_own(plan.out) and device == "cpu":
            provenance.environment(arguments.RESULTS)
    show_verdicts([chapter for chapter in chapters if chapter.name in outcome.done])
    return outcome.status


def run_altered(argv: list[str]) -> int:
    """Run the study with a change in it: `spread` and `power` start this in processes of their own."""
    from experiments.engine import altered

    if not argv:
        raise Unusable("'altered' needs a change, as JSON, and then what to run")
    try:
        change = altered.read(argv[0])
    except ValueError as error:
        raise Unusable(str(error)) from None
    altered.apply(change)
    return run(plan(parse(argv[1:]))._replace(change=change))


# --- what several commands do ----------------------------------------------------------------------------------


def load(out: Path) -> list["Chapter"]:
    """All results in a folder; one that cannot be read is the person's to mend, and its error says how."""
    from experiments.engine import report
    from jaxgrad import files

    try:
        return report.load(out)
    except (ValueError, OSError) as error:
        words = files.sentence(error) if isinstance(error, OSError) else error
        raise Unusable(f"no report was written: {words}") from error


def publish(out: Path, chapters: list["Chapter"]) -> None:
    """Save today's claims; write the report, as Markdown and as a page, and, for the study's own, the front page."""
    from experiments.engine import report, results

    for result in (result for chapter in chapters for result in chapter.results):
        results.reclaim(out, result)
    say(f"report: {report.write(out, chapters)}")
    try:
        from experiments.engine import page

        say(f"page: {page.write(out, chapters)}")
    except ModuleNotFoundError as error:
        raise Unusable(f"no page was written, for {error.name} is not installed; {INSTALL}") from None
    readme = arguments.RESULTS.parent / "README.md"
    if arguments.is_the_studys_own(out) and readme.is_file() and report.front_page(readme, out, chapters):
        say(f"front page: {readme}")


def show_verdicts(chapters: list["Chapter"]) -> None:
    """Print the claims of what was run, one line each."""
    from experiments.engine import report

    for name, _, claim in report.claims_of(chapters):
        verdict = "holds" if claim.holds else "DOES NOT HOLD"
        print(f"{claim.id:<4} {verdict:<13} {claim.text}: {claim.measured} (expected {claim.expected}) [{name}]")


def run_file(file: str) -> None:
    """What `python experiments/<study>.py [OPTIONS]` does: the same as `python -m experiments <study> [OPTIONS]`."""
    from jaxgrad import commandline

    commandline.prepare()  # a Ctrl-C is one line, and so is a reader that goes away
    leave(commandline.outcome(lambda: main([Path(file).stem, *sys.argv[1:]])))


def leave(status: int) -> None:
    """End this process, and the others of its job, with an exit status."""
    import gc

    from jaxgrad import commandline

    if several():
        from jaxgrad import parallel

        parallel.run(lambda: status)
    # Python would wait for what other threads or the device still run. Locks of the workers that are not collected
    # before are reported as leaks.
    if at_once := status not in (OK, FAILED):
        gc.collect()
    commandline.leave(status, at_once)
