"""Does a re-run give the published numbers? A verdict for every number, and how far rounding may move it.

Every experiment declares in `PUBLISHED` what kind of number each of its numbers is (`experiments/__init__.py` has the
words). What a re-run may then differ by follows from the kind and from what was recorded; nobody types it in.

**Exact**: not at all. **Rounding**: by what the rounding of floating-point operations does to this very number.
That cannot be read off a data type: a sum loses an ulp, a step of GD beyond the edge doubles what was lost before.
It is measured: `python -m experiments spread` runs the study again on this machine with narrower vector
instructions and without fused multiply-add, in XLA, NumPy and BLAS alike. Programs, data and random numbers are
the same and every operation is as accurate, but sums are taken in another order, as on another machine or by
another compiler. These *echoes* deviate from the published numbers by samples of their rounding error. The
deviations of entries of like size (within a factor of 16 or so) of one array are pooled; with r their root mean
square and ν its degrees of freedom (Satterthwaite's, so that a few large ones among many zeros count as few), a
re-run agrees within

    t(1 − α/2N, ν) · r + 4 u |x|

t: quantile of Student's distribution; α: `LEVEL`, the chance that a sound re-run of one experiment is called
different; N: how many entries the experiment has (Bonferroni); u: unit of rounding of the precision in which the
values are saved, or of float32 where all of them are float32 numbers. Chaotic numbers (late losses of a net with a
large step size) get a wide tolerance because their echoes scatter, and no other number does.

**Statistical**: a re-run draws the same random numbers, so it is held to the tolerance of rounding first. Where it
is beyond that, its deviation from the published one is compared with what the seeds of both imply (Welch's t for
runs, a normal interval for a mean with a standard error, a binomial one for counts, at the same α/N). Within, it
agrees *with other random numbers*, and that is said, since the same code, versions and device draw the same; unless
the runs of both follow each other seed by seed: then the random numbers are the same and what was done with them
is not. Single runs that part from their published selves while most stay is what chaos does, and agrees.

**Timing**: seconds are not compared. The logarithms of all times of an experiment are, after the median difference
(how much faster this machine is) is taken off: what is left are ratios between contenders of one run. They are
held to the scatter of the echoes' own ratios, as above. Another number of cores, system or device: not comparable.
"""

import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from scipy import stats

from experiments import results
from experiments.results import Result

LEVEL = 1e-3
"""Chance that a sound re-run of one experiment is called different, for all of its numbers together."""

Verdict = Literal["identical", "agrees", "differs", "not comparable"]
VERDICTS: tuple[Verdict, ...] = ("identical", "agrees", "differs", "not comparable")


class Kind(NamedTuple):
    """What a declaration says, with the keys that it names filled in."""

    name: str
    """`exact`, `rounding`, `statistical` or `timing`."""
    by: str = ""
    """For `statistical`: `axis`, `error`, `deviation`, `count`, or nothing. For `exact`: `jax`, or nothing."""
    key: str = ""
    """The axis, or the key of the error, deviation or number of runs."""


class Part(NamedTuple):
    """One number, curve or column of an array: what is judged by itself."""

    name: str
    kind: Kind
    value: Any


class Finding(NamedTuple):
    """The verdict on one part."""

    part: str
    verdict: Verdict
    note: str = ""
    """Both values, the tolerance and where; or why it cannot be compared."""


class Spread(NamedTuple):
    """Deviations of the echoes from the published numbers."""

    echoes: tuple[str, ...]
    deviations: dict[str, np.ndarray]
    """Per part `[echo, ...]`."""


# --- what kind of number -----------------------------------------------------------------------------------------

WORDS = re.compile(
    r"(?P<exact>exact(?P<jax>, same jax)?)|(?P<rounding>rounding(?P<chosen>, chosen by .+ of .+)?)|"
    r"(?P<timing>timing(?P<ratio>, ratio)?)|"
    r"(?P<statistical>statistical)(, (?:(?P<axis>axis) (?P<number>-?\d+)|(?P<by>error|deviation|count of) (?P<key>.+)))?"
)


def kinds(name: str, numbers: dict[str, Any], declared: dict[str, str] | None) -> dict[str, tuple[str, Kind]]:
    """The pattern that decides and the kind, for every part of the numbers: the first pattern that fits.

    Raises TypeError, with what to write, for a number that nobody declared and for words that say no kind.
    """
    for pattern, words in (declared or {}).items():
        if not WORDS.fullmatch(words):
            raise TypeError(
                f"PUBLISHED in experiments/{name}.py: {pattern!r} is {words!r}, which is no kind of number; "
                "experiments/__init__.py lists the kinds"
            )
    found: dict[str, tuple[str, Kind]] = {}
    for key, value in numbers.items():
        for part in _columns(key, value, declared or {}):
            fits = ((p, w, m) for p, w in (declared or {}).items() if (m := _pattern(p).fullmatch(part)))
            pattern, words, match = next(fits, ("", "", None))
            if match is None:
                raise TypeError(undeclared(name, part))
            found[part] = pattern, _kind(words, match.groups())
    return found


def undeclared(name: str, part: str = "...") -> str:
    """What to write where an experiment does not say what kind of number one of its numbers is."""
    what = "its numbers are" if part == "..." else f"{part!r} is"
    return (
        f"{name} does not say what kind of number {what}; write in experiments/{name}.py, below QUICK, "
        f'PUBLISHED = {{"{part}": "rounding", ...}}, with "exact", "rounding", "statistical, ..." or "timing" for every '
        "number that run returns; experiments/__init__.py says which is which"
    )


def _pattern(text: str) -> re.Pattern[str]:
    return re.compile("(.*?)".join(map(re.escape, text.split("*"))))


def _columns(key: str, value: Any, declared: dict[str, str]) -> list[str]:
    """The parts of a number: itself, or its columns `key[j]` where a pattern names columns of it."""
    if np.ndim(value) and any(
        re.search(r"\[\d+\]$", p) and _pattern(p[: p.rindex("[")]).fullmatch(key) for p in declared
    ):
        return [f"{key}[{j}]" for j in range(np.shape(value)[-1])]
    return [key]


def _kind(words: str, stars: tuple[str, ...]) -> Kind:
    said = WORDS.fullmatch(words)
    assert said is not None

    def filled(key: str) -> str:
        fill = itertools.cycle(stars)
        return re.sub(r"\*", lambda _: next(fill), key)

    name = next(kind for kind in ("exact", "rounding", "timing", "statistical") if said[kind])
    if said["jax"] or said["ratio"]:
        return Kind(name, "jax" if said["jax"] else "ratio")
    if said["chosen"]:
        return Kind(name, "chosen", filled(said["chosen"].removeprefix(", chosen by ")))
    if said["axis"]:
        return Kind(name, "axis", said["number"])
    return Kind(name, said["by"].split()[0], filled(said["key"])) if said["by"] else Kind(name)


def parts(name: str, numbers: dict[str, Any], declared: dict[str, str] | None) -> dict[str, Part]:
    return {
        part: Part(part, kind, look_up(numbers, part)) for part, (_, kind) in kinds(name, numbers, declared).items()
    }


def look_up(numbers: dict[str, Any], part: str) -> Any:
    """A number by its name, or a column by `name[j]`."""
    if part in numbers:
        return numbers[part]
    key, _, column = part[:-1].rpartition("[")
    return np.asarray(numbers[key])[..., int(column)]


# --- one re-run against one committed result ---------------------------------------------------------------------


class Comparison(NamedTuple):
    """One experiment: its verdicts, what is wrong with the committed files, and what kind of change this looks like."""

    name: str
    findings: tuple[Finding, ...]
    remarks: tuple[str, ...] = ()
    hint: str = ""

    def count(self, verdict: Verdict) -> int:
        return sum(finding.verdict == verdict for finding in self.findings)


def compare(
    old: Result, new: Result, declared: dict[str, str] | None, spread: Spread | None, remarks: Iterable[str] = ()
) -> Comparison:
    """The verdicts on a re-run `new` of the committed result `old`."""
    remarks = [*remarks, *_stale(old, new)]
    if obstacle := _obstacle(old, new):
        everything = tuple(Finding(key, "not comparable", obstacle) for key in old.numbers)
        return Comparison(old.name, everything, tuple(remarks), "")
    before, after = (parts(old.name, result.numbers, declared) for result in (old, new))
    judge = Judge(old, new, before, after, spread)
    findings = [judge.verdict(part) for part in before]
    findings += [
        Finding(part, "differs", "it is not among the committed numbers") for part in after.keys() - before.keys()
    ]
    timed = any(part.kind.name == "timing" for part in before.values())
    findings += _claims(old, new, timed)
    hint = judge.hint(findings)
    return Comparison(old.name, tuple(findings), tuple(remarks), hint)


def _stale(old: Result, new: Result) -> Iterator[str]:
    was, now = old.provenance["code"], new.provenance["code"]
    if was is None:
        yield "recorded before results named the code that made them"
    elif was != now:
        changed = sorted(module for module in was.keys() | now.keys() if was.get(module) != now.get(module))
        yield f"stale: {', '.join(changed)} changed since it was recorded"


def _obstacle(old: Result, new: Result) -> str:
    """Why nothing of two results can be compared, and what would help; or nothing."""
    if old.device != new.device:
        return f"it ran on {old.device}, this on {new.device}: run with --device {old.device}"
    was, now = (json.loads(json.dumps(result.config)) for result in (old, new))
    if was != now:
        changed = [
            f"{key} = {was.get(key)} there, {now.get(key)} here"
            for key in was.keys() | now.keys()
            if was.get(key) != now.get(key)
        ]
        return f"other settings: {'; '.join(sorted(changed))}"
    x64, here = (result.provenance["precision"] for result in (old, new))
    if x64 != here:
        return f"other precision: {x64} there, {here} here"
    return ""


def _claims(old: Result, new: Result, timed: bool) -> Iterator[Finding]:
    """Each claim holds, or fails, as it did. Its numbers are judged by themselves."""
    for was, now in zip(old.claims, new.claims, strict=False):
        name = f"claim {was.id}: {was.text}"
        if was == now:
            yield Finding(name, "identical")
        elif was.text != now.text:
            yield Finding(
                name, "not comparable", f"the code now claims: {now.text}; `python -m experiments report` renews it"
            )
        elif was.holds == now.holds:
            yield Finding(name, "agrees", f"{was.measured} there, {now.measured} here")
        elif timed:
            note = f"it held there, not here ({was.measured} there, {now.measured} here), and may rest on seconds"
            yield Finding(
                name,
                "not comparable",
                note if was.holds else note.replace("it held there, not", "it failed there, not"),
            )
        else:
            yield Finding(name, "differs", f"{was.measured} there, {now.measured} here (expected {was.expected})")
    if len(old.claims) != len(new.claims):
        yield Finding(
            "claims",
            "not comparable",
            f"{len(old.claims)} there, {len(new.claims)} here: `python -m experiments report` renews them",
        )


class Judge:
    """The committed numbers of one experiment, those of a re-run, and what can be said of them only together."""

    def __init__(
        self, old: Result, new: Result, before: dict[str, Part], after: dict[str, Part], spread: Spread | None
    ):
        self.old, self.new, self.before, self.after, self.spread = old, new, before, after, spread
        self.level = LEVEL / max(1, sum(part.kind.name != "exact" for part in before.values()))
        ns = [float(part.value) for name, part in before.items() if name.split("/")[-1] == "n"]
        self.sum_error = np.sqrt(max(ns, default=1.0))
        self.same_jax = old.provenance["versions"]["jax"] == new.provenance["versions"]["jax"]
        self.same_machine = old.provenance["machine"] == new.provenance["machine"]
        self.speed = self._speed()
        self.same_draws = self._same_draws()

    def verdict(self, name: str) -> Finding:
        old, kind = self.before[name], self.before[name].kind
        if name not in self.after:
            return Finding(name, "differs", "the re-run has no such number")
        new = self.after[name]
        if kind.name == "timing":
            return self._timing(name)
        if _same(old.value, new.value):
            return Finding(name, "identical")
        if np.shape(old.value) != np.shape(new.value):
            return Finding(name, "differs", f"shape {np.shape(old.value)} there, {np.shape(new.value)} here")
        if kind.name == "exact" or not _is_float(old.value, new.value):
            if kind.by == "jax" and not self.same_jax:
                versions = (result.provenance["versions"]["jax"] for result in (self.old, self.new))
                return Finding(name, "not comparable", "counted by JAX {}, here {}: install that one".format(*versions))
            if kind.name != "statistical":
                return Finding(name, "differs", f"{self._first(name, 0.0)}; it must be the same to the last bit")
        tolerance = self.tolerance(name)
        if not self._beyond(name, tolerance).any():
            return Finding(name, "agrees", self._worst(name, tolerance))
        if kind.name == "rounding":
            if kind.by == "chosen" and (tie := self._tie(name)):
                return Finding(name, "not comparable", tie)
            return Finding(name, "differs", f"{self._first(name, tolerance)} (rounding)")
        return self._statistical(name, tolerance)

    # --- rounding ---

    def tolerance(self, name: str) -> np.ndarray:
        """What rounding may move each entry of a part by."""
        value = np.asarray(self.before[name].value, float)
        saved = np.asarray(self.before[name].value)
        with np.errstate(over="ignore"):
            single = saved.dtype == np.float32 or _all(np.float32(value) == value, value)
        unit = float(np.finfo(np.float32 if single else np.float64).eps)
        with np.errstate(invalid="ignore"):
            floor = 4 * unit * np.abs(value)
        moved = self.spread.deviations.get(name) if self.spread else None
        if moved is None or moved.shape[1:] != value.shape:
            return floor * max(1.0, self.sum_error / 4)
        kind = self.before[name].kind
        runs = value.shape[int(kind.key)] if kind.by == "axis" else 1
        return floor + pooled(value, moved, runs, self.level)

    def _tie(self, name: str) -> str:
        """Whether the other choice is one that rounding may make: its score was within the tolerance of the best."""
        scores, options = self.before[name].kind.key.split(" of ")
        score, tolerance = np.asarray(self.before[scores].value, float), self.tolerance(scores)
        chosen = int(np.argmin(np.abs(np.asarray(self.before[options].value, float) - float(self.after[name].value))))
        best = int(np.argmin(score))
        if score[chosen] - score[best] <= tolerance[chosen] + tolerance[best]:
            return f"{scores} is a tie within its rounding, and what follows from it hangs on which is chosen"
        return ""

    def _beyond(self, name: str, tolerance: np.ndarray) -> np.ndarray:
        old, new = (np.asarray(parts[name].value, float) for parts in (self.before, self.after))
        with np.errstate(invalid="ignore"):
            same = (old == new) | (np.isnan(old) & np.isnan(new))
            return ~same & ~(np.abs(new - old) <= tolerance)

    def _first(self, name: str, tolerance: Any) -> str:
        """The first entry beyond its tolerance, as a sentence."""
        old, new = (np.asarray(parts[name].value) for parts in (self.before, self.after))
        if not _is_float(old, new):
            return f"{_brief(self.before[name].value)} there, {_brief(self.after[name].value)} here"
        tolerance = np.broadcast_to(tolerance, old.shape)
        beyond = self._beyond(name, tolerance)
        # The first along the last axis, which is that of a curve.
        order = np.lexsort(np.array(np.nonzero(beyond))) if old.ndim else [0]
        at = tuple(int(i[order[0]]) for i in np.nonzero(beyond)) if old.ndim else ()
        place = f"at {list(at)} first ({int(beyond.sum())} of {old.size}): " if old.ndim else ""
        return f"{place}{float(old[at]):.9g} there, {float(new[at]):.9g} here, tolerance {float(tolerance[at]):.2g}"

    def _worst(self, name: str, tolerance: np.ndarray) -> str:
        old, new = (np.asarray(parts[name].value, float) for parts in (self.before, self.after))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.nan_to_num(np.abs(new - old) / tolerance, nan=0.0)
        return f"within {max(float(share.max()), 1e-9):.1%} of its tolerance for rounding"

    # --- statistics ---

    def _same_draws(self) -> bool | None:
        """Whether the random numbers of both are the same, as their runs tell; None where they do not tell."""
        told: list[bool] = []
        unlikely = []
        for name, old in self.before.items():
            if old.kind.name != "statistical" or name not in self.after or _same(old.value, self.after[name].value):
                continue
            if np.shape(old.value) != np.shape(self.after[name].value):
                continue
            if old.kind.by == "axis":
                a, b = (
                    np.moveaxis(np.asarray(p[name].value, float), int(old.kind.key), 0)
                    for p in (self.before, self.after)
                )
                follow = _follow(a.reshape(len(a), -1), b.reshape(len(b), -1))
                told += [] if follow is None else [follow]
            elif old.kind.by in ("error", "deviation"):
                error = self._error(name)
                with np.errstate(invalid="ignore", divide="ignore"):
                    z = (np.asarray(self.after[name].value, float) - np.asarray(old.value, float)) / error
                if np.isfinite(z).any():
                    unlikely.append(float(np.mean(z[np.isfinite(z)] ** 2)))
        if told:
            return sum(told) > len(told) / 2
        if unlikely:
            # Independent draws would give a mean square of 1 here, the more surely the more numbers there are.
            return bool(stats.chi2.cdf(sum(unlikely), len(unlikely)) < LEVEL)
        return None

    def _error(self, name: str) -> np.ndarray:
        """Standard error of the difference between two independent runs of a part."""
        kind, squares = self.before[name].kind, []
        for result in (self.old, self.new):
            error = np.asarray(look_up(result.numbers, kind.key), float)
            if kind.by == "deviation":
                error = error / np.sqrt(result.config["seeds"])
            squares.append(error**2)
        return np.sqrt(sum(squares))

    def _statistical(self, name: str, tolerance: np.ndarray) -> Finding:
        old, new, kind = self.before[name].value, self.after[name].value, self.before[name].kind
        a, b = np.asarray(old, float), np.asarray(new, float)
        level = self.level / max(1, np.size(old) // (np.shape(old)[int(kind.key)] if kind.by == "axis" else 1))
        if kind.by == "axis":
            a, b, far = (np.moveaxis(x, int(kind.key), 0) for x in (a, b, self._beyond(name, tolerance)))
            runs, parted = len(a), far.reshape(len(a), -1).any(axis=1)
            if runs == 1:
                return Finding(name, "differs", f"{self._first(name, tolerance)} (rounding; it is a single run)")
            difference, allowed = welch(a, b, level)
            means = "mean of the runs "
            chaos = parted.sum() < runs / 2
            if chaos:
                words = f"{int(parted.sum())} of {runs} runs parted from the published ones, the others did not"
        else:
            chaos, means = False, ""
            if kind.by == "count":
                n = np.asarray(look_up(self.old.numbers, kind.key), float)
                share = (a + b) / (2 * n)
                allowed = stats.norm.isf(level / 2) * np.sqrt(np.maximum(2 * n * share * (1 - share), 0.5))
            elif kind.by:
                allowed = stats.norm.isf(level / 2) * self._error(name)
            else:
                if self.same_draws is False:
                    note = "drawn with other random numbers, and a single draw has no interval"
                    return Finding(name, "not comparable", note)
                return Finding(name, "differs", f"{self._first(name, tolerance)} (rounding; the draws are the same)")
            difference = b - a
        with np.errstate(invalid="ignore"):
            outside = ~(np.abs(difference) <= allowed) & ~((a == b).all() if np.ndim(difference) == 0 else False)
        if outside.any():
            at = tuple(int(i[0]) for i in np.nonzero(outside)) if np.ndim(outside) else ()
            return Finding(
                name, "differs",
                f"{means}{f'at {list(at)} ' if at else ''}is off by {float(np.asarray(difference)[at]):.3g}, and its seeds "
                f"allow {float(np.broadcast_to(allowed, np.shape(difference))[at]):.3g}; {self._first(name, tolerance)} (rounding)",
            )  # fmt: skip
        if chaos:
            return Finding(name, "agrees", f"{words}: chaos; within the interval of its seeds")
        if self.same_draws:
            return Finding(
                name, "differs",
                f"{self._first(name, tolerance)} (rounding); within the interval of its seeds, but run by run it follows "
                "the published ones: the random numbers are the same and the computation is not",
            )  # fmt: skip
        return Finding(name, "agrees", "within the interval of its seeds, with other random numbers")

    # --- seconds ---

    def _speed(self) -> float:
        """Median logarithm of here over there, of all times."""
        logs = [
            log_ratio(old.value, self.after[name].value).ravel()
            for name, old in self.before.items()
            if old.kind == Kind("timing") and name in self.after
            and np.shape(old.value) == np.shape(self.after[name].value)
        ]  # fmt: skip
        all_logs = np.concatenate(logs) if logs else np.zeros(0)
        return float(np.median(all_logs[np.isfinite(all_logs)])) if np.isfinite(all_logs).any() else 0.0

    def _timing(self, name: str) -> Finding:
        old, new = self.before[name].value, self.after[name].value
        if np.shape(old) != np.shape(new):
            return Finding(name, "not comparable", "other numbers of repeats")
        if not self.same_machine:
            there, here = (_machine(result) for result in (self.old, self.new))
            return Finding(name, "not comparable", f"timed on {there}, here on {here}: run on the like of the former")
        deviations = [] if self.spread is None else [
            d[np.isfinite(d)] for part, d in self.spread.deviations.items()
            if part in self.before and self.before[part].kind.name == "timing"
        ]  # fmt: skip
        if not deviations:
            return Finding(
                name, "not comparable", "no spread of its times was recorded: `python -m experiments spread`"
            )
        pool = np.concatenate([d.ravel() for d in deviations])
        allowed = student(pool, pool.size, self.level)
        off = log_ratio(old, new) - (0.0 if self.before[name].kind.by else self.speed)
        worst = float(np.nanmax(np.abs(off))) if np.isfinite(off).any() else 0.0
        words = (
            f"×{np.exp(worst):.3g} beside the other contenders of its run; their scatter allows ×{np.exp(allowed):.3g}"
        )
        return Finding(name, "agrees" if worst <= allowed else "differs", words)

    # --- what kind of change ---

    def hint(self, findings: list[Finding]) -> str:
        """What kind of change does what the findings say; empty where nothing calls for one."""
        bad = [f.part for f in findings if f.verdict == "differs" and f.part in self.before and f.part in self.after]
        if not bad:
            other = any("other random numbers" in finding.note for finding in findings)
            return "seed: the random numbers are others, their statistics agree" if other else ""
        for name in bad:
            old, new = self.before[name], self.after[name]
            if old.kind.name == "exact" and not old.kind.by:
                return f"data or sizes: {name} was {_brief(old.value)}, is {_brief(new.value)}"
        curves = [
            name for name in bad if self.before[name].kind.name != "timing" and _is_float(self.before[name].value)
        ]
        curves = [name for name in curves if np.shape(self.before[name].value) == np.shape(self.after[name].value)]
        if not curves:
            return ""
        for name in curves:
            a, b = (np.asarray(parts[name].value, float) for parts in (self.before, self.after))
            if grid := _coarse(a, b):
                return f"dtype: every value of {name} is a {grid} number"
        if self.same_draws is False:
            return "sampling: the random numbers are others, and so is their distribution"
        told = [_drift(np.asarray(self.before[n].value, float), np.asarray(self.after[n].value, float)) for n in curves]
        told = [words for words in told if words]
        # The commonest, and of those the first.
        return max(told, key=lambda words: sum(w.split(":")[0] == words.split(":")[0] for w in told)) if told else ""


def pooled(value: np.ndarray, moved: np.ndarray, runs: int, level: float) -> np.ndarray:
    """`t · r` of every entry, from the relative deviations `[echo, ...]` of the entries of its own and the next decades.

    Decades of 4: entries within a factor of 4 to 16 of each other are pooled; zeros are a decade of their own.
    Entries that did not move say nothing of how far they would.
    """
    with np.errstate(divide="ignore"):
        decade = np.where(value == 0, -9999, np.floor(np.log2(np.abs(value)) / 2))
    size = np.where(value == 0, 1, np.abs(value))
    out = np.zeros(value.shape)
    for one in np.unique(decade[np.isfinite(decade)]):
        near = np.abs(decade - one) <= 1
        pool = (moved * size)[:, near]
        echoes = int(np.sum(np.any((pool != 0) & np.isfinite(pool), axis=1)))
        out[decade == one] = student(pool, echoes * runs, level)
    return out


def student(deviations: np.ndarray, freedom: int, level: float) -> float:
    """The bound that one more deviation from the source of these exceeds with a chance of `level`.

    `freedom`: how many of them are independent, at most.
    """
    squares = deviations[np.isfinite(deviations) & (deviations != 0)] ** 2
    if not squares.size:
        return 0.0
    share = squares / squares.max()
    kurtosis = squares.size * np.sum(share**2) / share.sum() ** 2
    freedom = min(freedom, squares.size, 2 * squares.size / max(kurtosis - 1, 1e-9))
    return float(stats.t.isf(level / 2, freedom) * np.sqrt(squares.max() * share.mean()))


def welch(a: np.ndarray, b: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Difference of the means of two samples along the leading axis, and what it may be; over finite runs."""
    with np.errstate(invalid="ignore", divide="ignore"):
        a, b = (np.where(np.isfinite(x), x, np.nan) for x in (a, b))
        n, m = (np.sum(~np.isnan(x), axis=0) for x in (a, b))
        mean = [np.nansum(x, axis=0) / k for x, k in ((a, n), (b, m))]
        error = [np.nansum((x - c) ** 2, axis=0) / (k - 1) / k for x, c, k in ((a, mean[0], n), (b, mean[1], m))]
        freedom = (error[0] + error[1]) ** 2 / (error[0] ** 2 / (n - 1) + error[1] ** 2 / (m - 1))
        allowed = stats.t.isf(level / 2, np.nan_to_num(freedom, nan=1.0)) * np.sqrt(error[0] + error[1])
    # Where (nearly) no run is finite there is nothing to compare; how many are is a number of its own.
    few = (n < 2) | (m < 2)
    return np.where(few, 0.0, mean[1] - mean[0]), np.where(few, np.where(n == m, 0.0, -1.0), allowed)


def _follow(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether the runs `[run, entry]` of both follow each other: their largest correlation is beyond chance."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        correlation = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    correlation = correlation[np.isfinite(correlation)]
    if len(a) < 4 or not correlation.size:
        return None
    # t of the median correlation over the entries, with as many degrees of freedom as there are runs less two.
    r = float(np.clip(np.median(correlation), -1 + 1e-12, 1 - 1e-12))
    return bool(stats.t.sf(r * np.sqrt((len(a) - 2) / (1 - r**2)), len(a) - 2) < LEVEL)


def log_ratio(old: Any, new: Any) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.log(np.asarray(new, float)) - np.log(np.asarray(old, float))


def _coarse(old: np.ndarray, new: np.ndarray) -> str:
    """The narrow type whose numbers all new values are, where the old ones are not."""
    import ml_dtypes

    for kind in (np.float16, ml_dtypes.bfloat16):
        with np.errstate(over="ignore", invalid="ignore"):
            on = [_all(x.astype(kind).astype(float) == x, x) for x in (old, new)]
        if new.size > 3 and on == [False, True]:
            return np.dtype(kind).name
    return ""


def _drift(old: np.ndarray, new: np.ndarray) -> str:
    """What the course of a deviation along a curve looks like; empty for what is no curve."""
    if old.ndim == 0 or old.shape[-1] < 4:
        return ""
    a, b = (x.reshape(-1, x.shape[-1]) for x in (old, new))
    use = (np.isfinite(a) & np.isfinite(b)).all(axis=0) & (np.abs(a).min(axis=0) > 0)
    if use.sum() < 4 or not use[0]:
        return ""
    a, b = a[:, use].mean(axis=0), b[:, use].mean(axis=0)
    ratio, steps = b / a, np.diff(np.sign(b - a)[b != a])
    # A sum over k examples in place of their mean is k times as large from the start.
    if ratio[0] > 1.5 and abs(ratio[0] - round(ratio[0])) < 1e-3 * ratio[0]:
        return f"mean against sum: it starts {ratio[0]:.6g} times as large"
    beyond = np.abs(ratio - 1)
    if beyond[0] > 1e-3 * beyond.max():
        return "data: it is different from the first entry on"
    first = (b[1] - b[0]) / (a[1] - a[0]) if a[1] != a[0] else np.nan
    if np.count_nonzero(steps) > 0.25 * len(steps):
        return "dtype: it goes astray to both sides, by few parts in a thousand" if beyond.max() < 0.1 else "seed"
    if first >= 1.5 or not np.isfinite(first):
        return f"mean against sum: the first step is {first:.4g} times as long"
    return f"step size: the first step is {first:.4g} times as long"


def _same(old: Any, new: Any) -> bool:
    a, b = np.asarray(old), np.asarray(new)
    return a.dtype.kind == b.dtype.kind and a.shape == b.shape and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")


def _is_float(*values: Any) -> bool:
    return all(np.asarray(value).dtype.kind in "fiu" for value in values)


def _all(condition: np.ndarray, value: np.ndarray) -> bool:
    """Whether it holds for all finite values, of which there is one."""
    finite = np.isfinite(value)
    return bool(finite.any() and np.all(condition[finite]))


def _brief(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _machine(result: Result) -> str:
    machine = result.provenance["machine"]
    return f"{machine['cores']} cores of {', '.join(machine['device_kind'])}, {machine['system']} {machine['architecture']}"


# --- the spread of rounding --------------------------------------------------------------------------------------

WITHOUT = "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"
ECHOES: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {
        "nudge 1, SSE4.2": {
            "XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "NPY_DISABLE_CPU_FEATURES": WITHOUT, "OPENBLAS_CORETYPE": "Prescott"
        },
        "nudge 2": {},
        "nudge 3, AVX": {
            "XLA_FLAGS": "--xla_cpu_max_isa=AVX", "NPY_DISABLE_CPU_FEATURES": WITHOUT, "OPENBLAS_CORETYPE": "Sandybridge"
        },
    },
    "gpu": {"nudge 1, no autotuning": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}, "nudge 2": {}, "nudge 3": {}},
}  # fmt: skip
"""Environments of the echoes, by device and name. What a machine does not know of, it ignores."""


def nudged(load: Any, seed: int) -> Any:
    """`data.load`, its floating-point columns scaled up or down by one unit in the last place."""

    def nudge(leaf: Any, random: np.random.Generator) -> Any:
        leaf = np.asarray(leaf)
        if leaf.dtype.kind != "f":
            return leaf
        outwards = random.integers(0, 2, leaf.shape[1:]).astype(bool)[None]
        away = np.where(leaf == 0, 0, np.copysign(np.inf, leaf)).astype(leaf.dtype)
        return np.nextafter(leaf, np.where(outwards, away, np.zeros_like(leaf)))

    def loaded(*arguments: Any, **options: Any) -> Any:
        dataset, random = load(*arguments, **options), np.random.default_rng(seed)
        return dataset._replace(batch=type(dataset.batch)(*(nudge(leaf, random) for leaf in dataset.batch)))

    return loaded


def deviations(old: Result, new: Result, declared: dict[str, str] | None) -> dict[str, np.ndarray]:
    """By what each part of an echo deviates (times: by the logarithm, less their median)."""
    before, after = (parts(old.name, result.numbers, declared) for result in (old, new))
    speed = Judge(old, new, before, after, None).speed
    out = {}
    for name, part in before.items():
        if name not in after or not _is_float(part.value, after[name].value):
            continue
        if part.kind.name == "exact" or np.shape(part.value) != np.shape(after[name].value):
            continue
        if part.kind.name == "timing":
            out[name] = log_ratio(part.value, after[name].value) - (0.0 if part.kind.by else speed)
        else:
            a, b = (np.asarray(value, float) for value in (part.value, after[name].value))
            with np.errstate(invalid="ignore"):
                moved = (b - a) / np.where(a == 0, 1, np.abs(a))
                out[name] = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, moved)
    return out


def write_spread(folder: str | Path, old: Result, echoes: dict[str, Result], declared: dict[str, str] | None) -> Path:
    """Write `folder/<name>/<device>.spread.npz`: the deviations of the echoes from the saved result."""
    found = {label: deviations(old, echo, declared) for label, echo in echoes.items()}
    common = set.intersection(*(set(one) for one in found.values()))
    arrays: dict[str, Any] = {f"of/{part}": np.stack([one[part] for one in found.values()]) for part in sorted(common)}
    with np.errstate(over="ignore", under="ignore"):
        # What float32 cannot hold is chaos or nothing.
        arrays = {key: value.astype(np.float32) for key, value in arrays.items() if value.any()}
    arrays |= {"echoes": np.array(list(echoes)), "seal": np.array(results.seal(folder, old.name, old.device))}
    path = Path(folder) / old.name / f"{old.device}.spread.npz"
    results.replace(path, results.npz(arrays, compressed=True))
    return path


def read_spread(folder: str | Path, old: Result) -> Spread | None:
    """The recorded deviations, if they were recorded for these very numbers; zero where nothing was written."""
    path = Path(folder) / old.name / f"{old.device}.spread.npz"
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        arrays = {key: file[key] for key in file.files}
    if str(arrays.pop("seal")) != results.seal(folder, old.name, old.device):
        return None
    echoes = tuple(arrays.pop("echoes").tolist())
    return Spread(echoes, {key.removeprefix("of/"): value.astype(float) for key, value in arrays.items()})


# --- the whole study ---------------------------------------------------------------------------------------------


def study(folder: str | Path, rerun: str | Path, name: str, device: str, declared: dict[str, str] | None) -> Comparison:
    """The verdicts on one experiment of the re-run in `rerun` against what is committed in `folder`."""
    remarks = []
    try:
        parts_edited = results.edited(folder, name, device)
        old = results.read(folder, name, device)
    except FileNotFoundError:
        note = f"there is no committed result of {name} on {device}"
        return Comparison(name, (Finding(name, "not comparable", note),))
    except ValueError as error:
        return Comparison(
            name, (Finding(name, "differs", str(error)),), hint="edited: the committed files are damaged or edited"
        )
    new = results.read(rerun, name, device)
    for part in parts_edited:
        remarks.append(f"EDITED: the {part} in {name}/{device}.json are not those that a run wrote")
    spread = read_spread(folder, old)
    if spread is None:
        remarks.append("no spread of its rounding is recorded (`python -m experiments spread`): held to 4 ulps")
    found = compare(old, new, declared, spread, remarks)
    if parts_edited:
        sealed = Finding(
            "seal", "differs", f"the {' and '.join(parts_edited)} were changed after the run that wrote them"
        )
        changed = [f.part for f in found.findings if f.verdict == "differs"]
        hint = f"edited number: {', '.join(changed[:5]) or ' and '.join(parts_edited)}"
        found = found._replace(findings=(*found.findings, sealed), hint=hint)
    return found


def text(comparisons: Iterable[Comparison], every: bool = False) -> str:
    """What was found, experiment by experiment, and the table of verdicts."""
    comparisons = list(comparisons)
    lines = []
    for found in comparisons:
        lines += [f"{found.name}: {remark}" for remark in found.remarks]
        shown = [f for f in found.findings if f.verdict == "differs" or every]
        lines += [f"{found.name}: {f.part} {f.verdict}: {f.note}" for f in shown]
        for words, group in _grouped(f for f in found.findings if f.verdict == "not comparable" and not every):
            lines.append(f"{found.name}: not comparable, {words}: {group}")
        drawn = [f for f in found.findings if f.verdict == "agrees" and ("random" in f.note or "chaos" in f.note)]
        for words, group in _grouped(drawn):
            lines.append(f"{found.name}: agrees, {words}: {group}")
        lines += [f"{found.name}: hint: {found.hint}"] if found.hint else []
    width = max([len(found.name) for found in comparisons] + [len("experiment")])
    lines += ["", "  ".join([f"{'experiment':<{width}}", *(f"{verdict:>{len(verdict)}}" for verdict in VERDICTS)])]
    for found in comparisons:
        counts = [f"{found.count(verdict):>{len(verdict)}}" for verdict in VERDICTS]
        lines.append("  ".join([f"{found.name:<{width}}", *counts]))
    totals = [f"{sum(found.count(v) for found in comparisons):>{len(v)}}" for v in VERDICTS]
    return "\n".join([*lines, "  ".join([f"{'all':<{width}}", *totals])]).lstrip("\n")


def _grouped(findings: Iterable[Finding]) -> list[tuple[str, str]]:
    """Findings of one note together: the note, and how many and which."""
    notes: dict[str, list[str]] = {}
    for finding in findings:
        notes.setdefault(finding.note, []).append(finding.part)
    return [
        (note, f"{', '.join(parts[:4])}{f' and {len(parts) - 4} more' if len(parts) > 4 else ''}")
        for note, parts in notes.items()
    ]


if __name__ == "__main__":
    # python -m experiments.verify NUDGE ...: the study on nudged data, for `spread`.
    from experiments.__main__ import main
    from jaxgrad import data

    data.load = nudged(data.load, int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
