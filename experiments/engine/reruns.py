"""The commands that run the study again to learn about its numbers: verify, spread and power."""

import importlib
import tempfile
from functools import partial
from pathlib import Path

from experiments.engine import altered, arguments, echoes, environments, proof, results, study, verified, verify
from experiments.engine.arguments import Arguments, Plan, Unusable
from experiments.engine.catalogue import Entry
from experiments.engine.console import say
from experiments.engine.kinds import Exact, Machine, Seconds
from experiments.engine.status import FAILED, INTERRUPTED, OK


def verify_numbers(asked: Arguments) -> int:
    """Run again, elsewhere, and say of every published number whether it is the same."""
    folder, entries = _committed(asked, "verify")
    device = study.start_jax(asked.device)
    with tempfile.TemporaryDirectory(prefix="jaxgrad-verify-") as temporary:
        rerun, failed = asked.rerun, ()
        if rerun is None:
            rerun = Path(temporary)
            able = tuple(entry for entry in entries if (entry.name, device) in results.saved(folder))
            outcome = study.carry_out(Plan(able, {}, asked.quick, rerun, device, bare=True), device)
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
                    verify.study(folder, rerun, entry.name, device, module.NUMBERS, not asked.quick, module.claims)
                )
            except ValueError as error:
                raise Unusable(str(error)) from None
        if asked.note and ran:
            say(f"noted: {verified.note(folder, rerun, device, found)}")
    if not found and not failed:
        raise Unusable(f"{rerun} and {folder} have no result on {device} in common: nothing was compared")
    print(verify.text(found, asked.every))
    differs = [one.name for one in found if one.count("differs")]
    if differs:
        say(f"differs: {', '.join(differs)}")
    return FAILED if failed or differs else OK


def record_spread(asked: Arguments) -> int:
    """Run again in environments that round otherwise, record by how much each number moves, and prove it."""
    folder, entries = _committed(asked, "spread")
    device = study.start_jax(asked.device)
    entries = _there(entries, folder, device)
    chosen = {
        label: one for label, one in environments.ENVIRONMENTS[device].items() if asked.python or not one.other_python
    }
    as_fast = [label for label, one in chosen.items() if not one.variables and not one.other_python]
    with study.writing(folder), tempfile.TemporaryDirectory(prefix="jaxgrad-spread-") as temporary:
        kept = asked.echoes or Path(temporary)
        if moved := _moved_since(entries, asked.quick, folder, device, Path(temporary) / "as it is"):
            again = f"{' '.join(moved)}{f' --quick --bare --out {folder}' if asked.quick else ''}"
            raise Unusable(
                f"this code on this machine gives other numbers than those in {folder} ({', '.join(moved)}): run "
                f"`python -m experiments {again}` first"
            )
        heard: dict[str, dict[str, results.Result]] = {entry.name: {} for entry in entries}
        for label, one in chosen.items():
            say(f"environment: {label}")
            missing = [name for name in heard if (name, device) not in results.saved(kept / label)]
            change = altered.Change(nudge=one.nudge, untimed=label not in as_fast)
            options = _bare(kept / label, device, asked.quick)
            python = asked.python if one.other_python else None
            if missing and (failed := altered.run(change, [*missing, *options], one.variables, python)):
                say(f"{label} failed: nothing is recorded")
                return failed
            for name, found in heard.items():
                found[label] = results.read(kept / label, name, device)
        counts, wrong = {}, []
        for name, found in heard.items():
            module, old = importlib.import_module(f"experiments.{name}"), results.read(folder, name, device)
            say(str(echoes.write(folder, old, echoes.measure(old, found, module.NUMBERS, as_fast))))
            verdicts = proof.left_out(old, found, module)
            counts[name] = {label: {v: one.count(v) for v in verify.VERDICTS} for label, one in verdicts.items()}
            wrong += [(f"{name}, {label} left out", one) for label, one in verdicts.items() if one.count("differs")]
        say(str(proof.note(folder, "left out", device, counts)))
    for title, one in wrong:
        say(f"{title}:\n{verify.text([one])}")
    return FAILED if wrong else OK


def _moved_since(entries: tuple[Entry, ...], quick: bool, folder: Path, device: str, out: Path) -> list[str]:
    """Which experiments this code, here, does not give again to the last bit, seconds apart.

    What was recorded by this very code on this machine need not be run for that.
    """
    older = tuple(e for e in entries if not study.is_current(e, Plan(entries, {}, quick, folder, device), device))
    if not older:
        return []
    say(f"recorded by older code, or elsewhere, so first run as it is: {' '.join(entry.name for entry in older)}")
    failed = study.carry_out(Plan(older, {}, quick, out, device, bare=True), device).failed
    names = [entry.name for entry in older]
    return [name for name in names if name in failed or not verify.unmoved(_compared(folder, out, name, device))]


def record_power(asked: Arguments) -> int:
    """Run again with planted mistakes of shrinking size, and record which of them verify sees."""
    folder, entries = _committed(asked, "power")
    device = study.start_jax(asked.device)
    names = [entry.name for entry in _there(entries, folder, device)]
    for kind in ("eta", "target"):
        differs = partial(_seen, asked, folder, device, kind)
        with study.writing(folder):
            say(str(proof.note(folder, kind, device, proof.power(names, differs))))
    return OK


def _seen(asked: Arguments, folder: Path, device: str, kind: str, level: float, names: list[str]) -> dict[str, bool]:
    """Of which experiments verify says that they differ, when they run with a change of this kind and size."""
    change = altered.Change(untimed=True)._replace(**{kind: level})
    say(f"{kind} changed by {level:g}: {' '.join(names)}")
    with tempfile.TemporaryDirectory(prefix="jaxgrad-power-") as temporary:
        if status := altered.run(change, [*names, *_bare(Path(temporary), device, asked.quick)]):
            raise Unusable(f"the study with {kind} changed by {level:g} ended with status {status}")
        found = {}
        for name in names:
            found[name] = _compared(folder, Path(temporary), name, device).count("differs") > 0
        return found


def _compared(folder: Path, rerun: Path, name: str, device: str) -> verify.Comparison:
    """The verdicts on a re-run of one experiment, whose seconds do not matter."""
    module = importlib.import_module(f"experiments.{name}")
    return verify.study(folder, rerun, name, device, module.NUMBERS, timed=False, claims=module.claims)


def _bare(out: Path, device: str, quick: bool) -> list[str]:
    """The options of a run that leaves numbers only, elsewhere."""
    return ["--bare", "--device", device, "--out", str(out), *(["--quick"] if quick else [])]


def _there(entries: tuple[Entry, ...], folder: Path, device: str) -> tuple[Entry, ...]:
    """Those that publish what rounding can move; all of them must have been run."""
    entries = tuple(entry for entry in entries if _computes(entry))
    if missing := " ".join(entry.name for entry in entries if (entry.name, device) not in results.saved(folder)):
        raise Unusable(f"there are no results of {missing} in {folder}: run `python -m experiments {missing}`")
    return entries


def _computes(entry: Entry) -> bool:
    """Whether an experiment publishes anything that rounding can move: more than seconds."""
    module = importlib.import_module(f"experiments.{entry.name}")
    return any(not isinstance(kind, Exact | Machine | Seconds) for kind in module.NUMBERS.values())


def _committed(asked: Arguments, command: str) -> tuple[Path, tuple[Entry, ...]]:
    """The folder that a command is about, and its experiments: without names, power and spread take what is saved."""
    folder, entries = arguments.committed(asked, command)
    saved = results.saved(folder)
    if command == "verify" and not saved:
        raise Unusable(f"there are no results in {folder} to verify")
    if command != "verify" and not asked.quick and not asked.names[1:]:
        entries = tuple(entry for entry in entries if entry.name in {name for name, _ in saved})
    return folder, entries
