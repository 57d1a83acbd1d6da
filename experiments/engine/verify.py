"""Does a re-run give the published numbers? A verdict for every number and curve.

identical        the same to the last bit
agrees           off by no more than `tolerance.py` allows a number of its kind
differs          off by more
not comparable   seconds of another machine, counts of another compiler, a choice at a tie
"""

import functools
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from experiments.engine import echoes, hints, results
from experiments.engine.echoes import SCALE, Moments, Spread, comparable, log_ratio
from experiments.engine.kinds import (
    Chaotic,
    Chosen,
    CountOf,
    ErrorOfRounding,
    Exact,
    Kind,
    Machine,
    Mean,
    Random,
    Ratio,
    Rounding,
    Runs,
    SameJax,
    Seconds,
    look_up,
    parts,
)
from experiments.engine.results import Claim, Result
from experiments.engine.tolerance import (
    LEVEL,
    Case,
    bound,
    brief,
    exceeding,
    same_draws,
    standard_error,
    tolerance,
    values,
    welch,
)

Claims = Callable[[dict[str, Any]], Sequence[Claim]]
"""`claims` of an experiment: what its numbers confirm or refute."""

Verdict = Literal["identical", "agrees", "differs", "not comparable"]
VERDICTS: tuple[Verdict, ...] = ("identical", "agrees", "differs", "not comparable")

OTHER_DRAWS = "within the interval of its seeds, with other random numbers"
CHAOS = "runs parted from their published selves, the others did not: chaos; within the interval of its seeds"


NO_SPREAD = "no spread is recorded for it (`python -m experiments spread`): rounding is held to that of one sum"


class Finding(NamedTuple):
    """The verdict on one part."""

    part: str
    verdict: Verdict
    note: str = ""
    """Both values, the tolerance and where; or why it cannot be compared, and what would help."""


class Comparison(NamedTuple):
    """One experiment: the verdicts, what is to be said of the committed files, and what kind of change it is like."""

    name: str
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = ()
    hint: str = ""

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)


def study(
    folder: str | Path,
    rerun: str | Path,
    name: str,
    device: str,
    declared: dict[str, Kind],
    timed: bool = True,
    claims: Claims | None = None,
) -> Comparison:
    """The verdicts on one experiment of the re-run in `rerun` against what is committed in `folder`."""
    try:
        edited = results.edited(folder, name, device)
        old = results.read(folder, name, device, sealed=False)
    except FileNotFoundError:
        return Comparison(name, (Finding("all", "not comparable", f"nothing is committed for it on {device}"),))
    except ValueError as error:
        hint = "edited: the committed files are damaged, or were changed after the run that wrote them"
        return Comparison(name, (Finding("all", "differs", str(error)),), hint=hint)
    spread = echoes.read(folder, old)
    found = compare(old, results.read(rerun, name, device), declared, spread, timed, claims)
    if spread is None and any(isinstance(kind, Rounding | Random) for kind in declared.values()):
        found = found._replace(remarks=(*found.remarks, NO_SPREAD))
    if edited:
        moved = [finding.part for finding in found.findings if finding.verdict == "differs"]
        note = f"the {' and '.join(edited)} in {name}/{device}.json are not those that a run wrote there"
        found = found._replace(
            findings=(*found.findings, Finding("seal", "differs", note)),
            hint=f"edited number: {', '.join(moved[:5]) or 'none of those that this re-run gives otherwise'}",
        )
    return found


def unmoved(found: Comparison) -> bool:
    """Whether every number of a re-run is the same to the last bit, where it can be compared at all."""
    numbers = [one for one in found.findings if not one.part.startswith("claim ")]
    return all(one.verdict in ("identical", "not comparable") for one in numbers)


def compare(
    old: Result,
    new: Result,
    declared: dict[str, Kind],
    spread: Spread | None,
    timed: bool = True,
    claims: Claims | None = None,
) -> Comparison:
    """The verdicts on a re-run `new` of the committed result `old`; `claims` are those of its experiment."""
    remarks = tuple(_stale(old, new))
    if obstacle := _obstacle(old, new):
        everything = tuple(Finding(key, "not comparable", obstacle) for key in old.numbers)
        return Comparison(old.name, everything, remarks)
    before, after = (parts(old.name, result.numbers, declared) for result in (old, new))
    judged = sum(not isinstance(part.kind, Exact | Machine) for part in before.values())
    sizes = [float(np.max(part.value)) for name, part in before.items() if name.split("/")[-1] == "n"]
    logs = {
        name: log_ratio(part.kind.along, np.asarray(part.value, float), np.asarray(after[name].value, float))
        for name, part in before.items()
        if isinstance(part.kind, Seconds) and name in after and comparable(part.value, after[name].value)
    }
    case = Case(
        old,
        new,
        before,
        after,
        spread,
        LEVEL / max(1, judged),
        max(sizes, default=1.0),
        echoes.median_pace(before, logs),
        timed,
    )
    drawn = same_draws(case)
    findings = [_verdict(case, name, drawn) for name in before]
    findings += [
        Finding(part, "differs", "it is not among the committed numbers") for part in after if part not in before
    ]
    loose = {finding.part for finding in findings if finding.verdict == "not comparable"}
    loose |= {name for name, part in before.items() if isinstance(part.kind, Seconds | Machine)}
    findings += _claims(case, loose, claims)
    return Comparison(old.name, tuple(findings), remarks, _hint(case, findings, drawn))


def _hint(case: Case, findings: list[Finding], drawn: bool | None) -> str:
    """What kind of change does what was found; empty where nothing calls for one."""
    differ = [f.part for f in findings if f.verdict == "differs" and f.part in case.before and f.part in case.after]
    if differ:
        return hints.hint(case, differ, drawn)
    other = any(finding.note == OTHER_DRAWS for finding in findings)
    return "seed: the random numbers are others, and their statistics agree" if other else ""


def _stale(old: Result, new: Result) -> Iterator[str]:
    was, now = old.provenance["code"], new.provenance["code"]
    if not was:
        yield "stale: recorded before results named the code that made them"
    elif was != now:
        changed = sorted(module for module in was.keys() | now.keys() if was.get(module) != now.get(module))
        yield f"stale: {', '.join(changed)} changed since it was recorded"


def _obstacle(old: Result, new: Result) -> str:
    """Why nothing of two results can be compared, and what would help; or nothing."""
    if old.device != new.device:
        return f"it ran on {old.device}, this on {new.device}: run with --device {old.device}"
    was, now = (json.loads(json.dumps(result.config)) for result in (old, new))
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        return "other settings (run with these): " + "; ".join(
            f"{key} = {was.get(key)} there, {now.get(key)} here" for key in changed
        )
    there, here = (result.provenance["precision"] for result in (old, new))
    return "" if there == here else f"other precision (run with this): {there} there, {here} here"


def _claims(case: Case, loose: set[str], claims: Claims | None) -> Iterator[Finding]:
    """Each claim holds, or fails, as it did. Its numbers are judged by themselves.

    Of a claim that flips the question is what it stands on. It is asked of the claim: where it flips as well on the
    published numbers with nothing of the re-run but what is not comparable (`loose`: seconds, what tells of a machine),
    it is not comparable either.
    """
    old, new = case.old, case.new
    for i, (was, now) in enumerate(zip(old.claims, new.claims, strict=False)):
        name = f"claim {was.id} ({was.text})"
        if was == now:
            yield Finding(name, "identical")
        elif was.text != now.text:
            yield Finding(name, "not comparable", f"it is worded otherwise now ({now.text}): `report` renews it")
        elif was.holds == now.holds:
            yield Finding(name, "agrees", f"{was.measured} there, {now.measured} here")
        else:
            held = "it holds there and not here" if was.holds else "it holds here and not there"
            note = f"{held}: {was.measured} there, {now.measured} here, expected {was.expected}"
            by_these = claims is not None and bool(loose) and claims(_with(case, loose))[i].holds == now.holds
            why = "; it stands on seconds or on what tells of the machine" if by_these else ""
            yield Finding(name, "not comparable" if by_these else "differs", note + why)
    if len(old.claims) != len(new.claims):
        count = f"{len(old.claims)} claims there, {len(new.claims)} here: `python -m experiments report` renews them"
        yield Finding("claims", "not comparable", count)


def _with(case: Case, names: set[str]) -> dict[str, Any]:
    """The published numbers, with these parts of the re-run."""
    numbers = dict(case.old.numbers)
    for name in names & case.after.keys():
        value = case.after[name].value
        if name in numbers:
            numbers[name] = value
            continue
        key, _, column = name[:-1].rpartition("[")
        if np.shape(numbers[key])[:-1] == np.shape(value):
            numbers[key] = np.array(numbers[key])
            numbers[key][..., int(column)] = value
    return numbers


def _verdict(case: Case, name: str, same_draws: bool | None) -> Finding:
    part = case.before[name]
    if name not in case.after:
        return Finding(name, "differs", "the re-run has no such number")
    old, new, kind = part.value, case.after[name].value, part.kind
    if isinstance(kind, Seconds):
        return _timing(case, name)
    if _same(old, new):
        return Finding(name, "identical")
    if isinstance(kind, Machine):
        return Finding(name, "not comparable", f"{brief(old)} there, {brief(new)} here: it tells of the machine")
    if isinstance(kind, SameJax) and _version(case.old) != _version(case.new):
        note = f"jax {_version(case.old)} counted it, here is {_version(case.new)}: run with that version"
        return Finding(name, "not comparable", note)
    if isinstance(kind, Exact) or not comparable(old, new):
        return Finding(name, "differs", f"{brief(old)} there, {brief(new)} here; it must be the same to the last bit")
    if isinstance(kind, ErrorOfRounding):
        return _error(case, name, kind.unit)
    if isinstance(kind, Chaotic):
        return _chaotic(case, name, kind.axis)
    allowed = tolerance(case, name)
    beyond = exceeding(*values(case, name), allowed)
    if not beyond.any():
        return Finding(name, "agrees", _share(*values(case, name), allowed))
    if isinstance(kind, Random):
        return _statistical(case, name, allowed, beyond, same_draws)
    if isinstance(kind, Chosen) and (note := _tie(case, name, kind)):
        return Finding(name, "not comparable", note)
    return Finding(name, "differs", f"{_first(case, name, allowed)}, for rounding")


def _error(case: Case, name: str, declared: float | str) -> Finding:
    """The verdict on a number that is itself an error of rounding: it may be another one of the same size."""
    a, b = values(case, name)
    unit = np.asarray(look_up(case.old.numbers, declared) if isinstance(declared, str) else declared, float)
    allowed = stats.norm.isf(case.level / 2) * np.sqrt(2) * np.maximum(np.abs(a), unit)
    if exceeding(a, b, allowed).any():
        return Finding(name, "differs", f"{_first(case, name, allowed)}, for an error of this size")
    return Finding(name, "agrees", _share(a, b, allowed))


def _chaotic(case: Case, name: str, axis: int) -> Finding:
    """The verdict on late steps of runs: of each, how large they are, in the middle, for how much they vary."""
    a, b = values(case, name)
    if not exceeding(a, b, allowed := tolerance(case, name)).any():
        return Finding(name, "agrees", _share(a, b, allowed))
    logs = [np.log(np.abs(np.moveaxis(x, axis, 0)) + np.finfo(np.float32).tiny) for x in (a, b)]
    ended = [np.isfinite(x).all(axis=0) for x in logs]
    with np.errstate(invalid="ignore"):
        away = np.where(ended[0] & ended[1], np.median(logs[1], axis=0) - np.median(logs[0], axis=0), 0.0)
        varied = np.where(ended[0] & ended[1], np.maximum(*(np.std(x, axis=0) for x in logs)), 0.0) + np.log(2)
    if (ended[0] != ended[1]).any():
        return Finding(name, "differs", f"{np.sum(ended[0] != ended[1])} of its runs diverge in one of both only")
    worst, limit = float(np.max(np.abs(away) / varied)), float(stats.norm.isf(case.level / 2 / away.size))
    note = f"its late steps are ×{np.exp(np.max(np.abs(away))):.3g} as large at most, {worst:.2g} of their own scatter"
    return Finding(name, "agrees" if worst <= limit else "differs", f"{note}; that allows {limit:.2g}")


def _tie(case: Case, name: str, kind: Chosen) -> str:
    """Whether rounding may choose what the re-run chose: its score was within the tolerance of the best."""
    score, allowed = np.asarray(case.before[kind.by].value, float), tolerance(case, kind.by)
    chosen = int(np.argmin(np.abs(np.asarray(case.before[kind.of].value, float) - float(case.after[name].value))))
    best = int(np.argmin(score))
    tie = score[chosen] - score[best] <= allowed[chosen] + allowed[best]
    return f"{kind.by} is a tie within its rounding; what follows from it hangs on which is chosen" if tie else ""


def _statistical(case: Case, name: str, allowed: np.ndarray, beyond: np.ndarray, same_draws: bool | None) -> Finding:
    """The verdict on a number of random numbers that is not the same within rounding."""
    kind, (a, b) = case.before[name].kind, values(case, name)
    first = f"{_first(case, name, allowed)}, for rounding"
    chaos = 0
    if isinstance(kind, Runs):
        a, b, beyond = (np.moveaxis(x, kind.axis, 0) for x in (a, b, beyond))
        parted = int(beyond.reshape(len(a), -1).any(axis=1).sum())
        if len(a) < 2:
            return Finding(name, "differs", f"{first}; it is a single run")
        chaos = parted if parted < len(a) / 2 else 0
        level = case.level / max(1, a[0].size)
        away, interval = welch(a, b, level)
        # Runs that agree to rounding, as all do at their common start, scatter by nothing.
        interval = interval + np.max(
            np.moveaxis(np.broadcast_to(allowed, np.shape(case.before[name].value)), kind.axis, 0), axis=0
        )
    elif isinstance(kind, Mean | CountOf):
        level = case.level / max(1, a.size)
        away, interval = b - a, stats.norm.isf(level / 2) * standard_error(case, name)
    elif same_draws is False:
        return Finding(name, "not comparable", "drawn with other random numbers, and one draw has no interval")
    else:
        return Finding(name, "differs", f"{first}; its random numbers are the same")
    outside = exceeding(np.zeros_like(away), away, np.broadcast_to(interval, np.shape(away)))
    if outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        off, limit = np.asarray(away)[at], np.broadcast_to(interval, np.shape(away))[at]
        mean = "the mean of its runs is" if isinstance(kind, Runs) else "it is"
        return Finding(name, "differs", f"{mean} off by {off:.3g}, and its seeds allow {limit:.3g}; {first}")
    if chaos:
        return Finding(name, "agrees", f"{chaos} of {len(a)} {CHAOS}")
    if same_draws:
        note = "its runs follow the published ones seed by seed: the same random numbers, another computation"
        return Finding(name, "differs", f"{first}; {note}")
    return Finding(name, "agrees", OTHER_DRAWS)


# --- seconds -----------------------------------------------------------------------------------------------------


def _timing(case: Case, name: str) -> Finding:
    part = case.before[name]
    machines = [result.provenance["machine"] for result in (case.old, case.new)]
    if not case.timed:
        return Finding(name, "not comparable", "too short to be timed at this size: verify without --quick")
    if machines[0] != machines[1]:
        there, here = (
            f"{m['cores']} cores of {', '.join(m['device_kind'])}, {m['system']} {m['architecture']}" for m in machines
        )
        return Finding(name, "not comparable", f"timed on {there}, here on {here}: run on the like of the former")
    if not comparable(part.value, case.after[name].value):
        return Finding(name, "not comparable", "another number of contenders or repeats")
    known = {} if case.spread is None else case.spread.parts
    pool = [known[k][SCALE] for k, other in case.before.items() if isinstance(other.kind, Seconds) and k in known]
    if not pool:
        return Finding(name, "not comparable", "no scatter of its times is recorded: `python -m experiments spread`")
    together = functools.reduce(Moments.plus, pool)
    allowed = bound(together._replace(between=together.squares**2 / together.moved), 1, case.level)
    away = log_ratio(part.kind.along, *values(case, name)) - (0.0 if isinstance(part.kind, Ratio) else case.pace)
    worst = float(np.max(np.abs(away), initial=0.0, where=np.isfinite(away)))
    note = f"×{np.exp(worst):.3g} beside the other contenders of its run; their scatter allows ×{np.exp(allowed):.3g}"
    return Finding(name, "agrees" if worst <= allowed else "differs", note)


# --- words -------------------------------------------------------------------------------------------------------


def text(comparisons: Iterable[Comparison], every: bool = False) -> str:
    """What was found: a line for each experiment, a sentence, and then what differs or needs a look."""
    comparisons = list(comparisons)
    width = max(len(found.name) for found in comparisons)
    lines = [f"{found.name:<{width}}  {_line(found)}" for found in comparisons]
    blocks = ["\n".join(lines), _sentence(comparisons)]
    for found in comparisons:
        if said := list(_attention(found, every)):
            blocks.append("\n".join([found.name, *(f"  {words}" for words in said)]))
    if notes := list(_notes(comparisons)):
        blocks.append("\n".join(notes))
    return "\n\n".join(blocks)


def _line(found: Comparison) -> str:
    """The worst verdict, and how many numbers have which."""
    worst = next((verdict for verdict in ("differs", "agrees", "identical") if found.count(verdict)), VERDICTS[-1])
    counts = [f"{found.count(verdict)} {verdict}" for verdict in VERDICTS if found.count(verdict)]
    return f"{worst.upper() if worst == 'differs' else worst:<14}  {', '.join(counts)}"


def _sentence(comparisons: Sequence[Comparison]) -> str:
    """All of it in one sentence."""
    differ = [found.name for found in comparisons if found.count("differs")]
    agree = sum(found.count("agrees") > 0 and not found.count("differs") for found in comparisons)
    same = sum(
        found.count("identical") > 0 and not found.count("agrees") + found.count("differs") for found in comparisons
    )
    loose = len(comparisons) - len(differ) - agree - same
    said = [f"{same} identical to the last bit"] if same else []
    said += [f"{agree} within rounding"] if agree else []
    said += [f"{loose} not comparable"] if loose else []
    count = f"Of {len(comparisons)} experiments " if len(comparisons) > 1 else ""
    apart = sum(found.count("not comparable") for found in comparisons)
    rest = f" {apart} numbers are not comparable (--all lists them and says why)." if apart else ""
    verdict = (
        f"{len(differ)} {'differ' if len(differ) > 1 else 'differs'}: {', '.join(differ)}"
        if differ
        else "nothing differs"
    )
    return f"{count}{', '.join(said)}{'; ' if said else ''}{verdict}.{rest}"


def _attention(found: Comparison, every: bool) -> Iterator[str]:
    """What differs, claims that cannot be told, why nothing can be, the hint; with `every` all."""
    for finding in found.findings:
        claim = finding.part.startswith("claim") and finding.verdict == "not comparable"
        other = finding.verdict == "agrees" and (finding.note == OTHER_DRAWS or CHAOS in finding.note)
        if every or finding.verdict == "differs" or claim or other:
            words = f"{finding.verdict}: {finding.part}: {finding.note}".rstrip(": ")
            yield textwrap.fill(words, 116, subsequent_indent="    ") if finding.part.startswith("claim") else words
    if not every and all(finding.verdict == "not comparable" for finding in found.findings):
        yield from dict.fromkeys(finding.note for finding in found.findings)
    if found.hint:
        yield f"hint: {found.hint}"
    if every or found.count("differs"):
        yield from found.remarks


def _notes(comparisons: Sequence[Comparison]) -> Iterator[str]:
    """What is to be said of several experiments at once."""
    newer = [found.name for found in comparisons if any(remark.startswith("stale") for remark in found.remarks)]
    if newer:
        yield f"The code is newer than the results of {', '.join(newer)} (stale); what moved is above."
    bare = [found.name for found in comparisons if NO_SPREAD in found.remarks]
    if bare:
        yield f"No spread is recorded for {', '.join(bare)}: rounding is held to that of one sum."


def _first(case: Case, name: str, allowed: np.ndarray) -> str:
    """Both values at the first entry beyond its tolerance, along the last axis, which is that of a curve."""
    old, new = values(case, name)
    places = np.argwhere(exceeding(old, new, allowed))
    at = tuple(int(i) for i in places[np.argmin(places[:, -1])]) if old.ndim else ()
    where = f"first at {list(at)} ({len(places)} of {old.size} entries): " if at else ""
    return f"{where}{old[at]:.9g} there, {new[at]:.9g} here, tolerance {np.asarray(allowed)[at]:.2g}"


def _share(old: np.ndarray, new: np.ndarray, allowed: np.ndarray) -> str:
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.nan_to_num(np.abs(new - old) / allowed, nan=0.0, posinf=0.0)
    return f"at most {np.max(share, initial=0.0):.2g} of its tolerance for rounding"


def _same(old: Any, new: Any) -> bool:
    a, b = np.asarray(old), np.asarray(new)
    return a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _version(result: Result) -> str:
    return result.provenance["versions"]["jax"]
