"""Does a re-run give the published numbers? A verdict for every number and curve.

What a re-run may differ by follows from what kind of number each is (`PUBLISHED` of its experiment) and from what
was recorded; nobody types it in.

**Exact**: not at all.

**Rounding**: by as much as rounding moves numbers like this one, which no data type tells (a sum loses an ulp; a step
of GD beyond the edge doubles what was lost before), and which is measured on the echoes of the study (`echoes.py`).
With r the root mean square of the deviations of entries of like size (within a factor of 16 or so) in the same array,
those that moved at all, a re-run agrees within

    t(1 − α/2N, ν) · r + 4 u |x|

t: quantile of Student's distribution. ν: how many echoes r rests on (times the runs, where an array has an axis of
runs: the entries of a curve share its history), fewer where a few of them, or of the entries, make up most of it
(Satterthwaite). α: `LEVEL`, the chance that a sound re-run of an experiment is called different. N: how many parts it
has (Bonferroni). u: unit of rounding of the precision in which the values are saved, or of float32 where all of them
are float32 numbers, or moved as such move. Where no entry of like size moved, r is relative, over the array; where
nothing of it moved, over the parts that were declared with it; where none of those moved, the tolerance is the
rounding of a sum over the n examples in another order, √n u |x|. For an entry that is 0, r is absolute, over the
array; and u |x| is at least a unit of rounding, of float64, of the array's root mean square. So nothing that is
computed has the tolerance 0. A whole number that is computed, a step at which a threshold is crossed, may move by 1;
what a search found, by the share that is declared; what a study says may be off by a number, by that number. Chaotic
numbers (late losses of a net at a large step size) get a wide tolerance because their echoes scatter; no other does.

**Error**: a number that is itself an error of rounding, in the unit that is declared, is one draw of a random number
of its own size. So is that of the re-run: it may be off by z(1 − α/2N) √2 times the published one, or the unit where
that is larger.

**Chaotic**: late steps of a run that wanders, or stands still but for rounding. Of each run the median size is
compared, in logarithms, with how much its steps vary, and a factor of 2: within z(1 − α/2N) of these.

**Count**: how many cases pass a threshold. It is held to what the echoes show over all counts of the experiment, or
to 1 where they show less.

**Statistical**: a re-run draws the same random numbers, so it is held to the tolerance of rounding first. Beyond it,
the deviation is compared with what the seeds of both imply (Welch's t for runs, a normal interval for means with a
standard error, a binomial one for counts, at α/N over the entries). Within, it agrees *with other random numbers*,
and that is said: the same code, versions and device draw the same. If the runs of both follow each other seed by
seed, though, the random numbers are the same and what was done with them is not: it differs. A few single runs that
part from their published selves while most stay are chaos, and agree.

**Timing**: seconds are not compared. Their logarithms are, less the median difference of all times of the experiment
(how much faster this machine is): what is left are ratios between contenders of one run. They are held to the scatter
of the echoes' own ratios in the same way. Times of another kind of machine, and of `--quick`, are not comparable.
"""

import functools
import json
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np
from scipy import stats

from experiments.engine import echoes, kinds, results
from experiments.engine.echoes import (
    RELATIVE,
    SCALE,
    ZERO,
    Moments,
    Pools,
    Spread,
    comparable,
    log_ratio,
    pools_of,
    scale_of,
)
from experiments.engine.kinds import Kind, Part, look_up, parts
from experiments.engine.results import Claim, Result
from jaxgrad import atomic

LEVEL = 1e-3
"""Chance that a sound re-run of one experiment is called different, for all of its numbers together."""

Claims = Callable[[dict[str, Any]], Sequence[Claim]]
"""`claims` of an experiment: what its numbers confirm or refute."""

FLOAT32 = 2.0**-36
"""Relative deviations of this size have been through float32: far beyond a sum in float64, far below a float32 unit."""

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


class Case(NamedTuple):
    """A committed result, a re-run, and what is known of both together."""

    old: Result
    new: Result
    before: dict[str, Part]
    after: dict[str, Part]
    spread: Spread | None
    level: float
    """α/N."""
    examples: float
    """n, for the error of a sum over them."""
    pace: float
    """Median logarithm of the times here over there."""
    timed: bool
    """Whether times are long enough to be compared."""


def study(
    folder: str | Path,
    rerun: str | Path,
    name: str,
    device: str,
    declared: dict[str, str],
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
    if spread is None and any(words.startswith(("rounding", "statistical")) for words in declared.values()):
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
    declared: dict[str, str],
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
    judged = sum(part.kind.name not in ("exact", "machine") for part in before.values())
    sizes = [float(np.max(part.value)) for name, part in before.items() if name.split("/")[-1] == "n"]
    logs = {
        name: log_ratio(part.kind.axis, np.asarray(part.value, float), np.asarray(after[name].value, float))
        for name, part in before.items()
        if part.kind.name == "timing" and name in after and comparable(part.value, after[name].value)
    }
    case = Case(
        old, new, before, after, spread, LEVEL / max(1, judged), max(sizes, default=1.0),
        echoes.median_pace(before, logs), timed,
    )  # fmt: skip
    same_draws = _same_draws(case)
    findings = [_verdict(case, name, same_draws) for name in before]
    findings += [
        Finding(part, "differs", "it is not among the committed numbers") for part in after if part not in before
    ]
    loose = {finding.part for finding in findings if finding.verdict == "not comparable"}
    loose |= {name for name, part in before.items() if part.kind.name in ("timing", "machine")}
    findings += _claims(case, loose, claims)
    return Comparison(old.name, tuple(findings), remarks, _hint(case, findings, same_draws))


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
    if kind.name == "timing":
        return _timing(case, name)
    if _same(old, new):
        return Finding(name, "identical")
    if kind.name == "machine":
        return Finding(name, "not comparable", f"{_brief(old)} there, {_brief(new)} here: it tells of the machine")
    if kind.by == "jax" and _version(case.old) != _version(case.new):
        note = f"jax {_version(case.old)} counted it, here is {_version(case.new)}: run with that version"
        return Finding(name, "not comparable", note)
    if kind.name == "exact" or not comparable(old, new):
        return Finding(name, "differs", f"{_brief(old)} there, {_brief(new)} here; it must be the same to the last bit")
    if kind.name == "error":
        return _error(case, name)
    if kind.name == "chaotic":
        return _chaotic(case, name)
    allowed = tolerance(case, name)
    beyond = _beyond(*_values(case, name), allowed)
    if not beyond.any():
        return Finding(name, "agrees", _share(*_values(case, name), allowed))
    if kind.name == "statistical":
        return _statistical(case, name, allowed, beyond, same_draws)
    if kind.by == "chosen" and (note := _tie(case, name)):
        return Finding(name, "not comparable", note)
    return Finding(name, "differs", f"{_first(case, name, allowed)}, for rounding")


# --- rounding ----------------------------------------------------------------------------------------------------


def tolerance(case: Case, name: str) -> np.ndarray:
    """What rounding may move each entry of a part by."""
    saved, kind = np.asarray(case.before[name].value), case.before[name].kind
    value = saved.astype(float)
    with np.errstate(over="ignore", invalid="ignore"):
        # Float32 numbers, and not such round ones that anything could have given them.
        single = saved.dtype == np.float32 or (
            _all(np.float32(value) == value, value) and not _all(np.float16(value) == value, value)
        )
        unit = np.finfo(np.float32 if single else np.float64).eps * np.abs(value)
        pools = {} if case.spread is None else case.spread.parts.get(name, {})
        if (known := pools.get(RELATIVE)) and known.squares / known.moved > FLOAT32**2:
            # It moved as float32 numbers move, however it was saved.
            unit = np.maximum(unit, np.finfo(np.float32).eps * np.abs(value))
        # A difference of numbers of the array's size is off by a unit of theirs, however small it is itself.
        unit = np.maximum(unit, np.finfo(np.float64).eps * scale_of(value))
    runs = value.shape[kind.axis] if kind.axis is not None else 1
    if pools and kind.name != "count":
        allowed = 4 * unit + reach(value, pools, runs, case.level)
    elif family := _family(case, name):
        allowed = 4 * unit + bound(family, runs, case.level) * (1 if kind.name == "count" else np.abs(value))
    else:
        allowed = max(4.0, np.sqrt(case.examples)) * unit
    if kind.by == "found":
        allowed = np.maximum(allowed, float(kind.key) * np.abs(value))
    elif kind.by == "off":
        allowed = np.maximum(allowed, np.nan_to_num(np.asarray(look_up(case.old.numbers, kind.key), float)))
    whole = saved.dtype.kind in "iu" or kind.name == "count"
    return np.maximum(allowed, 1.0) if whole else allowed


def _family(case: Case, name: str) -> Moments | None:
    """What is known of the parts that one pattern declares, together: of counts absolute, of all others relative."""
    if case.spread is None:
        return None
    part = case.before[name]
    known = [(case.before[other], pools) for other, pools in case.spread.parts.items() if other in case.before]
    if part.kind.name == "count":
        kin = [
            pools[SCALE].scaled(scale_of(np.asarray(o.value, float))) for o, pools in known if o.kind.name == "count"
        ]
    else:
        kin = [pools[RELATIVE] for o, pools in known if o.pattern == part.pattern and RELATIVE in pools]
    return functools.reduce(Moments.beside, kin) if kin else None


def reach(value: np.ndarray, pools: Pools, runs: int, level: float) -> np.ndarray:
    """`t · r` of every entry: from its own pool and the next ones, or where these did not move, from all."""
    pool, out = pools_of(value), np.zeros(value.shape)
    for number in np.unique(pool[np.isfinite(pool)]):
        near = [one.scaled(4.0**step) for step in (-1, 0, 1) if (one := pools.get(f"{number + step:.0f}"))]
        here = pool == number
        if near:
            out[here] = bound(functools.reduce(Moments.beside, near), runs, level) * 4.0**number
        elif RELATIVE in pools:
            out[here] = bound(pools[RELATIVE], runs, level) * np.abs(value[here])
    if zero := pools.get(ZERO) or pools.get(SCALE):
        out[value == 0] = bound(zero, runs, level) * scale_of(value)
    return out


def bound(known: Moments, runs: int, level: float) -> float:
    """What one more deviation of the same source exceeds with a chance of `level`; of those that are not 0.

    An echo is one draw of it for each of `runs`; echoes, or entries, that move more than others count for fewer
    (Satterthwaite).
    """
    if not known.moved or not known.squares:
        return 0.0
    kurtosis = known.moved * known.fourths / known.squares**2
    freedom = min(runs * known.squares**2 / known.between, 2 * known.moved / max(kurtosis - 1, 1e-9))
    return float(stats.t.isf(level / 2, freedom) * np.sqrt(known.squares / known.moved))


def _error(case: Case, name: str) -> Finding:
    """The verdict on a number that is itself an error of rounding: it may be another one of the same size."""
    (a, b), key = _values(case, name), case.before[name].kind.key
    unit = float(key) if kinds.NUMBER.fullmatch(key) else np.asarray(look_up(case.old.numbers, key), float)
    allowed = stats.norm.isf(case.level / 2) * np.sqrt(2) * np.maximum(np.abs(a), unit)
    if _beyond(a, b, allowed).any():
        return Finding(name, "differs", f"{_first(case, name, allowed)}, for an error of this size")
    return Finding(name, "agrees", _share(a, b, allowed))


def _chaotic(case: Case, name: str) -> Finding:
    """The verdict on late steps of runs: of each, how large they are, in the middle, for how much they vary."""
    kind, (a, b) = case.before[name].kind, _values(case, name)
    if not _beyond(a, b, allowed := tolerance(case, name)).any():
        return Finding(name, "agrees", _share(a, b, allowed))
    logs = [np.log(np.abs(np.moveaxis(x, kind.axis or 0, 0)) + np.finfo(np.float32).tiny) for x in (a, b)]
    ended = [np.isfinite(x).all(axis=0) for x in logs]
    with np.errstate(invalid="ignore"):
        away = np.where(ended[0] & ended[1], np.median(logs[1], axis=0) - np.median(logs[0], axis=0), 0.0)
        varied = np.where(ended[0] & ended[1], np.maximum(*(np.std(x, axis=0) for x in logs)), 0.0) + np.log(2)
    if (ended[0] != ended[1]).any():
        return Finding(name, "differs", f"{np.sum(ended[0] != ended[1])} of its runs diverge in one of both only")
    worst, limit = float(np.max(np.abs(away) / varied)), float(stats.norm.isf(case.level / 2 / away.size))
    note = f"its late steps are ×{np.exp(np.max(np.abs(away))):.3g} as large at most, {worst:.2g} of their own scatter"
    return Finding(name, "agrees" if worst <= limit else "differs", f"{note}; that allows {limit:.2g}")


def _tie(case: Case, name: str) -> str:
    """Whether rounding may choose what the re-run chose: its score was within the tolerance of the best."""
    scores, options = case.before[name].kind.key.split(" of ")
    score, allowed = np.asarray(case.before[scores].value, float), tolerance(case, scores)
    chosen = int(np.argmin(np.abs(np.asarray(case.before[options].value, float) - float(case.after[name].value))))
    best = int(np.argmin(score))
    tie = score[chosen] - score[best] <= allowed[chosen] + allowed[best]
    return f"{scores} is a tie within its rounding; what follows from it hangs on which is chosen" if tie else ""


# --- statistics --------------------------------------------------------------------------------------------------


def _statistical(case: Case, name: str, allowed: np.ndarray, beyond: np.ndarray, same_draws: bool | None) -> Finding:
    """The verdict on a number of random numbers that is not the same within rounding."""
    kind, (a, b) = case.before[name].kind, _values(case, name)
    first = f"{_first(case, name, allowed)}, for rounding"
    chaos = 0
    if kind.axis is not None:
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
    elif kind.by:
        level = case.level / max(1, a.size)
        away, interval = b - a, stats.norm.isf(level / 2) * _standard_error(case, name)
    elif same_draws is False:
        return Finding(name, "not comparable", "drawn with other random numbers, and one draw has no interval")
    else:
        return Finding(name, "differs", f"{first}; its random numbers are the same")
    outside = _beyond(np.zeros_like(away), away, np.broadcast_to(interval, np.shape(away)))
    if outside.any():
        at = tuple(int(i) for i in np.argwhere(outside)[0])
        off, limit = np.asarray(away)[at], np.broadcast_to(interval, np.shape(away))[at]
        mean = "the mean of its runs is" if kind.axis is not None else "it is"
        return Finding(name, "differs", f"{mean} off by {off:.3g}, and its seeds allow {limit:.3g}; {first}")
    if chaos:
        return Finding(name, "agrees", f"{chaos} of {len(a)} {CHAOS}")
    if same_draws:
        note = "its runs follow the published ones seed by seed: the same random numbers, another computation"
        return Finding(name, "differs", f"{first}; {note}")
    return Finding(name, "agrees", OTHER_DRAWS)


def _standard_error(case: Case, name: str) -> np.ndarray:
    """Of the difference between two independent runs of a part."""
    kind, squares = case.before[name].kind, []
    a, b = _values(case, name)
    for result in (case.old, case.new):
        about = np.asarray(look_up(result.numbers, kind.key), float)
        if kind.by == "count":
            share = np.clip((a + b + 1) / (2 * about + 2), 0, 1)
            squares.append(about * share * (1 - share))
        else:
            squares.append(about**2 / (result.config["seeds"] if kind.by == "deviation" else 1))
    return np.sqrt(squares[0] + squares[1])


def welch(a: np.ndarray, b: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Difference of the means of two samples along the leading axis, and what it may be: of the finite runs.

    Where one sample has fewer than two of those, the difference is that of their numbers, and it may be 0.
    """
    finite = [np.isfinite(x) for x in (a, b)]
    n, m = (ok.sum(axis=0) for ok in finite)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        means = [np.where(ok, x, 0).sum(axis=0) / k for x, ok, k in zip((a, b), finite, (n, m), strict=True)]
        errors = [
            np.where(ok, x - mean, 0).__pow__(2).sum(axis=0) / (k - 1) / k
            for x, ok, k, mean in zip((a, b), finite, (n, m), means, strict=True)
        ]
        freedom = (errors[0] + errors[1]) ** 2 / (errors[0] ** 2 / (n - 1) + errors[1] ** 2 / (m - 1))
        allowed = stats.t.isf(level / 2, np.where(freedom > 0, freedom, 1.0)) * np.sqrt(errors[0] + errors[1])
    few = (n < 2) | (m < 2)
    return np.where(few, np.asarray(m - n, float), means[1] - means[0]), np.where(few, 0.0, allowed)


def _same_draws(case: Case) -> bool | None:
    """Whether the random numbers of both are the same, as their runs tell; None where nothing tells."""
    follow, squares = [], []
    for name, part in case.before.items():
        if part.kind.name != "statistical" or name not in case.after:
            continue
        if not comparable(part.value, case.after[name].value):
            continue
        a, b = _values(case, name)
        if (
            part.kind.axis is not None
            and (told := _follow(*(np.moveaxis(x, part.kind.axis, 0) for x in (a, b)))) is not None
        ):
            follow.append(told)
        elif part.kind.by in ("error", "deviation"):
            with np.errstate(invalid="ignore", divide="ignore"):
                z = (b - a) / _standard_error(case, name)
            if np.isfinite(z).any():
                squares.append(float(np.mean(z[np.isfinite(z)] ** 2)))
    if follow:
        return sum(follow) > len(follow) / 2
    # Independent draws would give mean squares about 1.
    return bool(stats.chi2.cdf(sum(squares), len(squares)) < LEVEL) if squares else None


def _follow(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether runs `[run, ...]` follow each other: their median correlation over the entries is beyond chance."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        each = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    each = each[np.isfinite(each)]
    if len(a) < 4 or not each.size:
        return None
    r = float(np.clip(np.median(each), -1 + 1e-12, 1 - 1e-12))
    return bool(stats.t.sf(r * np.sqrt((len(a) - 2) / (1 - r**2)), len(a) - 2) < LEVEL)


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
    pool = [known[k][SCALE] for k, other in case.before.items() if other.kind.name == "timing" and k in known]
    if not pool:
        return Finding(name, "not comparable", "no scatter of its times is recorded: `python -m experiments spread`")
    together = functools.reduce(Moments.plus, pool)
    allowed = bound(together._replace(between=together.squares**2 / together.moved), 1, case.level)
    away = log_ratio(part.kind.axis, *_values(case, name)) - (0.0 if part.kind.by == "ratio" else case.pace)
    worst = float(np.max(np.abs(away), initial=0.0, where=np.isfinite(away)))
    note = f"×{np.exp(worst):.3g} beside the other contenders of its run; their scatter allows ×{np.exp(allowed):.3g}"
    return Finding(name, "agrees" if worst <= allowed else "differs", note)


# --- what kind of change -----------------------------------------------------------------------------------------


def _hint(case: Case, findings: list[Finding], same_draws: bool | None) -> str:
    """What kind of change does what was found; empty where nothing calls for one."""
    differ = [f.part for f in findings if f.verdict == "differs" and f.part in case.before and f.part in case.after]
    if not differ:
        other = any(finding.note == OTHER_DRAWS for finding in findings)
        return "seed: the random numbers are others, and their statistics agree" if other else ""
    for name in differ:
        old, new, kind = case.before[name].value, case.after[name].value, case.before[name].kind
        if kind == Kind("exact") and name.split("/")[-1] == "n":
            return f"data or sizes: {name} was {_brief(old)}, is {_brief(new)}"
    curves = {
        name: _values(case, name)
        for name in differ
        if case.before[name].kind.name != "timing" and comparable(case.before[name].value, case.after[name].value)
    }
    for name, (a, b) in curves.items():
        if narrow := _narrow(a, b):
            return f"dtype: every value of {name} is a {narrow} number"
    if same_draws is False and not _moved_without_drawing(case, curves):
        return "sampling: the random numbers are others, and so is what they add up to"
    told = [words for name, (a, b) in curves.items() if (words := _course(a, b, case.before[name].kind.axis))]
    kinds = [words.split(":")[0] for words in told]
    return max(told, key=lambda words: kinds.count(words.split(":")[0])) if told else ""


def _moved_without_drawing(case: Case, curves: dict[str, Any]) -> bool:
    return any(case.before[name].kind.name == "rounding" for name in curves)


def _narrow(old: np.ndarray, new: np.ndarray) -> str:
    """The narrow type whose numbers all new values are, where the old ones are not."""
    for kind in (ml_dtypes.bfloat16, np.float16):
        with np.errstate(over="ignore", invalid="ignore"):
            was, now = (_all(x.astype(kind).astype(float) == x, x) for x in (old, new))
        if new.size > 3 and now and not was:
            return np.dtype(kind).name
    return ""


def _course(old: np.ndarray, new: np.ndarray, runs: int | None) -> str:
    """What a deviation looks like along a curve; empty for what is no curve.

    It runs along the last axis, or the one before, if that is of a few coordinates; what else there is is averaged.
    """
    a, b = (x if runs is None else np.moveaxis(x, runs, 0) for x in (old, new))
    if a.ndim > (1 if runs is None else 2) and a.shape[-1] < 4:
        a, b = a.swapaxes(-1, -2), b.swapaxes(-1, -2)
    if a.ndim < (1 if runs is None else 2) or a.shape[-1] < 4:
        return ""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
    use = np.asarray(np.isfinite(a + b).all(axis=0))
    if use.sum() < 4 or not use[0] or not a[:, use].any():
        return ""
    a, b = a[:, use].mean(axis=0), b[:, use].mean(axis=0)
    changes = np.flatnonzero((a != a[0]) & (b != b[0]))
    if not changes.size:
        return ""  # one of them stays where it is: no course to compare
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(a == b, 1.0, b / a)
        first = (b[changes[0]] - b[0]) / (a[changes[0]] - a[0])
    off = np.abs(ratio - 1)
    if 1.5 < ratio[0] < np.inf and abs(ratio[0] / round(ratio[0]) - 1) < 1e-3:
        return f"mean against sum: it starts {ratio[0]:.4g} times as large"
    if off[0] > 0.05 * np.nanmax(off):
        return "data: it is different from its first entry on"
    away = b - a
    turns = np.abs(np.diff(np.sign(away[away != 0]))) > 1
    if np.sum(turns) > 0.2 * len(turns) and np.nanmax(off) < 0.1:
        return "dtype: it goes astray to both sides, by so much as few digits would make it"
    if abs(first) > 1.5:
        return f"mean against sum: its first change is {abs(first):.4g} times as large"
    return f"step size: its first change is {first:.4g} times as large"


# --- what was verified where -------------------------------------------------------------------------------------


WHERE = ("device_kind", "system", "architecture", "cores", "processor", "instructions")
"""What tells machines apart in the table of re-runs."""


def note(folder: str | Path, rerun: str | Path, device: str, comparisons: Iterable[Comparison]) -> Path:
    """Keep in `folder/verified.json` what was found, in place of what an earlier re-run on the like found."""
    comparisons = [one for one in comparisons if (Path(rerun) / one.name / f"{device}.json").is_file()]
    here = results.read(rerun, comparisons[0].name, device).provenance
    where = {
        "python": here["versions"]["python"], "jax": here["versions"]["jax"], "device": device,
        **{key: here["machine"].get(key) for key in WHERE},
    }  # fmt: skip
    found = {
        one.name: {
            "seal": results.seal(folder, one.name, device),
            **{verdict: one.count(verdict) for verdict in VERDICTS},
        }
        for one in comparisons
        if (Path(folder) / one.name / f"{device}.json").is_file()
    }
    path = Path(folder) / "verified.json"
    # What was found about results that are no longer there goes.
    others = [old for old in noted(folder) if old["where"] != where and _current(folder, old)]
    notes = sorted(
        [*others, {"where": where, "found": found}], key=lambda one: json.dumps(one["where"], sort_keys=True)
    )
    atomic.write(path, (json.dumps(notes, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())
    return path


def noted(folder: str | Path) -> list[dict[str, Any]]:
    path = Path(folder) / "verified.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []


def _current(folder: str | Path, note: dict[str, Any]) -> list[dict[str, Any]]:
    """What a note says of the results that are there now."""
    device = note["where"]["device"]
    return [found for name, found in note["found"].items() if results.has_seal(folder, name, device, found["seal"])]


def noted_table(folder: str | Path) -> str:
    """What was verified where, as a Markdown table: of the results that are there now, not of those that were."""
    lines = [f"| re-run on | experiments | {' | '.join(VERDICTS)} |", "|---|---|---|---|---|---|"]
    for size, place in (("", Path(folder)), (", `--quick`", Path(folder) / "quick")):
        for one in noted(place):
            where = one["where"]
            if now := _current(place, one):
                kind = f"{where['cores']} cores" if where["device"] == "cpu" else ", ".join(where["device_kind"])
                processor = where.get("processor") or f"{where['system']} {where['architecture']}"
                kind += f", {where['instructions']}" if where.get("instructions") else ""
                machine = f"{processor}, {kind}"
                counts = " | ".join(str(sum(found[verdict] for found in now)) for verdict in VERDICTS)
                lines.append(
                    f"| Python {where['python']}, jax {where['jax']}, {machine}{size} | {len(now)} | {counts} |"
                )
    return "\n".join(lines) if len(lines) > 2 else "Nothing has been verified since these results were recorded."


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


def _values(case: Case, name: str) -> tuple[np.ndarray, np.ndarray]:
    return np.asarray(case.before[name].value, float), np.asarray(case.after[name].value, float)


def _beyond(old: np.ndarray, new: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        return ~same & ~(np.abs(new - old) <= allowed)


def _first(case: Case, name: str, allowed: np.ndarray) -> str:
    """Both values at the first entry beyond its tolerance, along the last axis, which is that of a curve."""
    old, new = _values(case, name)
    places = np.argwhere(_beyond(old, new, allowed))
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


def _all(condition: np.ndarray, value: np.ndarray) -> bool:
    """Whether it holds for all finite values, of which there is one."""
    finite = np.isfinite(value)
    return bool(finite.any() and np.all(condition[finite]))


def _version(result: Result) -> str:
    return result.provenance["versions"]["jax"]


def _brief(value: Any) -> str:
    words = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return words if len(words) <= 60 else f"{words[:57]}..."
