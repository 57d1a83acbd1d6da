"""The tolerances of `verify`: how far a re-run may differ, from the kind of each number and from recorded deviations.

Nobody types in a tolerance.

**Exact**: the number may not differ at all.

**Rounding**: the number may differ as far as rounding moves numbers like it. No data type tells how far that is: a sum
loses an ulp, and a step of GD beyond the edge doubles an earlier loss. It is measured on the echoes of the study
(`echoes.py`). Let r be the root mean square of the deviations in the same array, over entries of like size (within a
factor of about 16) that moved at all. A re-run agrees within

    t(1 − α/2N, ν) · r + 4 u |x|

t: quantile of Student's distribution. α: `LEVEL`, the chance that a sound re-run of an experiment is called different.
N: the number of its parts (Bonferroni). ν: the number of echoes behind r. If an array has an axis of runs, it is
multiplied by the runs: the entries of one curve share a history. If a few echoes or entries make up most of r, ν is
smaller (Satterthwaite). u: the unit of rounding of the saved precision; that of float32 if all values are float32
numbers, or moved as float32 numbers move.

If no entry of like size moved, r is relative, over the array. If nothing in the array moved, r is taken over the parts
that were declared with it. If none of those moved, the tolerance is √n u |x|, the rounding of a sum over the n examples
in another order. For an entry that is 0, r is absolute, over the array. And u |x| is at least a float64 unit of the
array's root mean square. So no computed number has the tolerance 0.

A computed whole number, such as the step at which a threshold is crossed, may move by 1. The result of a search may
move by its declared share. If a study says that a number may be off by another number, it may be off by that. Chaotic
numbers (late losses of a net at a large step size) get a wide tolerance because their echoes scatter; no other number
does.

**Error**: a number that is itself a rounding error, in a declared unit, is one draw of a random number of that size.
The re-run's number is another draw. So it may be off by z(1 − α/2N) √2 times the published number, or by that multiple
of the unit if the unit is larger.

**Chaotic**: late steps of a run that wanders, or that stands still except for rounding. For each run the medians of
the logarithms of their sizes are compared. They agree within z(1 − α/2N) (s + log 2), with s the standard deviation of
these logarithms over the run.

**Count**: the number of cases that pass a threshold. It may differ as far as the echoes do over all counts of the
experiment, and at least by 1.

**Statistical**: a re-run draws the same random numbers, so the tolerance of rounding comes first. A larger deviation is
compared with the scatter of both runs' seeds: Welch's t for runs, a normal interval for means with a standard error, a
binomial one for counts, each at α/N over the entries. Within that, the number agrees *with other random numbers*, and
the report says so, because the same code, versions and device draw the same. But if the runs of both follow each other
seed by seed, then the random numbers are the same and the computation is not: the number differs. If a few single runs
part from their published values while most do not, that is chaos, and they agree.

**Timing**: seconds are not compared, but their logarithms are, minus the median difference of all times of the
experiment (how much faster this machine is). What remains are ratios between contenders of one run. They may differ as
far as the echoes' ratios do. Times of another kind of machine, and of `--quick`, are not comparable.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.engine.echoes import RELATIVE, SCALE, ZERO, Moments, Pools, Spread, comparable, pools_of, scale_of
from experiments.engine.kinds import Count, CountOf, Found, Mean, Off, Part, Random, Runs, look_up
from experiments.engine.results import Result

LEVEL = 1e-3
"""The chance that a sound re-run of an experiment is called different, for all its numbers together."""

FLOAT32 = 2.0**-36
"""Larger relative deviations come from float32: far above those of a float64 sum, far below a float32 unit."""


class Case(NamedTuple):
    """A committed result, its re-run, and what both are compared with."""

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
    """The median logarithm of the ratio of times, re-run over committed."""
    timed: bool
    """Whether the times are long enough to be compared."""


def values(case: Case, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of a part: as published, and in the re-run."""
    return np.asarray(case.before[name].value, float), np.asarray(case.after[name].value, float)


def exceeding(old: np.ndarray, new: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Which entries deviate by more than allowed."""
    with np.errstate(invalid="ignore"):
        same = (old == new) | (np.isnan(old) & np.isnan(new))
        return ~same & ~(np.abs(new - old) <= allowed)


def holds_for_all(condition: np.ndarray, value: np.ndarray) -> bool:
    """Whether the condition holds for all finite values, and there is at least one."""
    finite = np.isfinite(value)
    return bool(finite.any() and np.all(condition[finite]))


def tolerance(case: Case, name: str) -> np.ndarray:
    """By how much rounding may move each entry of a part."""
    saved, kind = np.asarray(case.before[name].value), case.before[name].kind
    value = saved.astype(float)
    with np.errstate(over="ignore", invalid="ignore"):
        # Float32 numbers that are not all round: round ones could come from any precision.
        single = saved.dtype == np.float32 or (
            holds_for_all(np.float32(value) == value, value) and not holds_for_all(np.float16(value) == value, value)
        )
        unit = np.finfo(np.float32 if single else np.float64).eps * np.abs(value)
        pools = {} if case.spread is None else case.spread.parts.get(name, {})
        if (known := pools.get(RELATIVE)) and known.squares / known.moved > FLOAT32**2:
            # It moved as float32 numbers move, however it was saved.
            unit = np.maximum(unit, np.finfo(np.float32).eps * np.abs(value))
        # A difference of numbers of the array's size has an error of a unit of theirs, however small it is.
        unit = np.maximum(unit, np.finfo(np.float64).eps * scale_of(value))
    runs = value.shape[kind.along] if kind.along is not None else 1
    if pools and not isinstance(kind, Count):
        allowed = 4 * unit + reach(value, pools, runs, case.level)
    elif family := _family(case, name):
        allowed = 4 * unit + bound(family, runs, case.level) * (1 if isinstance(kind, Count) else np.abs(value))
    else:
        allowed = max(4.0, np.sqrt(case.examples)) * unit
    if isinstance(kind, Found):
        allowed = np.maximum(allowed, kind.to * np.abs(value))
    elif isinstance(kind, Off):
        allowed = np.maximum(allowed, np.nan_to_num(np.asarray(look_up(case.old.numbers, kind.by), float)))
    whole = saved.dtype.kind in "iu" or isinstance(kind, Count)
    return np.maximum(allowed, 1.0) if whole else allowed


def _family(case: Case, name: str) -> Moments | None:
    """The deviations of all parts of one pattern together, relative to their values; of all counts, absolute."""
    if case.spread is None:
        return None
    part = case.before[name]
    known = [(case.before[other], pools) for other, pools in case.spread.parts.items() if other in case.before]
    if isinstance(part.kind, Count):
        kin = [
            pools[SCALE].scaled(scale_of(np.asarray(o.value, float))) for o, pools in known if isinstance(o.kind, Count)
        ]
    else:
        kin = [pools[RELATIVE] for o, pools in known if o.pattern == part.pattern and RELATIVE in pools]
    return functools.reduce(Moments.beside, kin) if kin else None


def reach(value: np.ndarray, pools: Pools, runs: int, level: float) -> np.ndarray:
    """`t · r` for every entry, with r from its own pool and the adjacent ones; if none of them moved, from all."""
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
    """The bound that one more deviation from this source exceeds with probability `level`. Zeros are ignored.

    Each echo is one draw for each of `runs`. If some echoes or entries move more than others, there are fewer degrees
    of freedom (Satterthwaite).
    """
    if not known.moved or not known.squares:
        return 0.0
    kurtosis = known.moved * known.fourths / known.squares**2
    freedom = min(runs * known.squares**2 / known.between, 2 * known.moved / max(kurtosis - 1, 1e-9))
    return float(stats.t.isf(level / 2, freedom) * np.sqrt(known.squares / known.moved))


def standard_error(case: Case, name: str) -> np.ndarray:
    """The standard error of the difference between two independent runs of a part."""
    kind: Any = case.before[name].kind
    squares: list[Any] = []
    a, b = values(case, name)
    for result in (case.old, case.new):
        if isinstance(kind, CountOf):
            about = np.asarray(look_up(result.numbers, kind.runs), float)
            share = np.clip((a + b + 1) / (2 * about + 2), 0, 1)
            squares.append(about * share * (1 - share))
        else:
            about = np.asarray(look_up(result.numbers, kind.error or kind.deviation), float)
            squares.append(about**2 / (result.config["seeds"] if kind.deviation else 1))
    return np.sqrt(squares[0] + squares[1])


def welch(a: np.ndarray, b: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """The difference of two samples' means along the leading axis, over finite runs, and its bound.

    If a sample has fewer than two finite runs, the difference is that of their numbers, and the bound is 0.
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


def same_draws(case: Case) -> bool | None:
    """Whether both used the same random numbers, judged by their runs; None if that cannot be judged."""
    follow, squares = [], []
    for name, part in case.before.items():
        if not isinstance(part.kind, Random) or name not in case.after:
            continue
        if not comparable(part.value, case.after[name].value):
            continue
        a, b = values(case, name)
        if (
            isinstance(part.kind, Runs)
            and (together := _follow(*(np.moveaxis(x, part.kind.axis, 0) for x in (a, b)))) is not None
        ):
            follow.append(together)
        elif isinstance(part.kind, Mean):
            with np.errstate(invalid="ignore", divide="ignore"):
                z = (b - a) / standard_error(case, name)
            if np.isfinite(z).any():
                squares.append(float(np.mean(z[np.isfinite(z)] ** 2)))
    if follow:
        return sum(follow) > len(follow) / 2
    # Independent draws would give mean squares about 1.
    return bool(stats.chi2.cdf(sum(squares), len(squares)) < LEVEL) if squares else None


def _follow(a: np.ndarray, b: np.ndarray) -> bool | None:
    """Whether runs `[run, ...]` follow each other: their median correlation over the entries exceeds chance."""
    a, b = (x.reshape(len(x), -1) for x in (a, b))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        a, b = a - a.mean(axis=0), b - b.mean(axis=0)
        each = (a * b).sum(axis=0) / np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    each = each[np.isfinite(each)]
    if len(a) < 4 or not each.size:
        return None
    r = float(np.clip(np.median(each), -1 + 1e-12, 1 - 1e-12))
    return bool(stats.t.sf(r * np.sqrt((len(a) - 2) / (1 - r**2)), len(a) - 2) < LEVEL)


def brief(value: Any) -> str:
    """A value in at most 60 characters."""
    words = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return words if len(words) <= 60 else f"{words[:57]}..."
