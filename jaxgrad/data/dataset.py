"""From a cleaned table to a `Dataset`: labels numbered, columns scaled, statistics kept; and the held-out split."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.checks import checked, level, shown
from jaxgrad.data.checks import TASKS
from jaxgrad.data.seeds import permutation
from jaxgrad.data.words import count, few, show
from jaxgrad.types import Batch

MAX_CLASSES = 20
"""A whole-number target with at most this many distinct values, five rows each on average, is classes."""


class Column(NamedTuple):
    """What became of one column of a file."""

    name: str
    kind: str
    """'number' or 'text'; 'empty' where no cell holds anything."""
    levels: tuple[str, ...]
    """The values of a text column that was coded, in order; none for numbers and for what was left out."""
    done: str
    """'feature', 'N features' (one for each level but the first), 'target' or 'left out'."""
    why: str = ""
    """How its cells were read, and the reason for what was done."""
    doubt: str = ""
    """What is probably a mistake about it; empty if nothing is."""


class Doubtful(UserWarning):
    """Data that can be used and are probably a mistake: a column that gives the target away, or counts the rows."""


class Dataset(NamedTuple):
    """A data set ready for descent.

    `batch.x` is `(raw - x_mean) / x_scale` and, for regression, `batch.y` is `(raw - y_mean) / y_scale`; so
    `prediction * y_scale + y_mean` is a prediction in the units of the file.
    """

    batch: Batch
    """numpy: `x` float32[n, d]; `y` float32[n] (regression; 0/1 when binary) or int32[n] (classes)."""
    task: str
    """'regression', 'binary' or 'classes'."""
    name: str
    names: tuple[str, ...]
    """One name for each column of `x`."""
    target: str
    """What `y` is."""
    labels: tuple[str, ...]
    """What the labels 0, 1, ... stand for; empty for regression."""
    source: str
    licence: str
    notes: tuple[str, ...]
    """What was dropped, coded or cleaned, with counts; and what to beware of."""
    scaling: str
    """'standardised' (each column to mean 0, sd 1, and y for regression), 'centred' (mean 0 only), 'none'."""
    x_mean: np.ndarray
    """float64[d]"""
    x_scale: np.ndarray
    """float64[d]"""
    y_mean: float
    y_scale: float
    columns: tuple[Column, ...] = ()
    """An account of every column there was, the target and those left out included, in the order of the file."""


class Table(NamedTuple):
    """A table as read and cleaned, in float64, before labels are numbered and columns scaled."""

    x: np.ndarray
    y: np.ndarray
    """Numbers or text."""
    names: tuple[str, ...]
    target: str
    source: str
    notes: tuple[str, ...] = ()
    licence: str = "not stated"
    task: str | None = None
    """None: to be told from `y`."""
    labels: tuple[str, ...] | None = None
    """Given when `y` already holds the numbers 0, 1, ..."""
    pixel: float | None = None
    """For images: the largest value of a pixel. They are divided by it and centred, not standardised."""
    columns: tuple[Column, ...] = ()
    """The account so far; empty where every column of `x` is a number and a feature."""
    doubts: tuple[str, ...] = ()
    """What is probably a mistake, to be said aloud."""


def to_dataset(table: Table, name: str, task: str | None, standardise: bool) -> Dataset:
    """Number the labels, drop constant columns, scale, and store in float32; see `jaxgrad.data.load`."""
    x, names = table.x, table.names
    n, d = x.shape
    if n < 2:
        raise ValueError(f"{name} has {count(n, 'row')} of data; at least two are needed")
    columns = table.columns or (
        *(Column(feature, "number", (), "feature") for feature in names),
        Column(table.target, "text" if table.y.dtype.kind == "U" else "number", (), "target"),
    )
    if d == 0:
        out = "; ".join(f"{c.name!r} was left out: {c.why}" for c in columns if c.done == "left out")
        raise ValueError(
            f"{name} has no column left beside the target {table.target!r}; a feature is needed"
            + (f" ({out})" if out else "")
        )
    y, task, labels, how = _target(table, task)
    columns = tuple(c._replace(levels=labels, why=_and(task, c.why)) if c.done == "target" else c for c in columns)
    notes = table.notes + how
    scaling = "none" if not standardise else "standardised" if table.pixel is None else "centred"
    if scaling == "none" and table.columns:
        same = {column for column, one in zip(names, x.T, strict=True) if (one == one[0]).all()}
        columns = tuple(
            c._replace(doubt=c.doubt or "is the same number in every row") if c.name in same else c for c in columns
        )
    if scaling == "standardised":
        varies = (x != x[0]).any(axis=0)
        if not varies.any():
            raise ValueError(f"every feature of {name} is constant over its {n} rows; nothing can be learnt")
        dropped = [column for column, keep in zip(names, varies, strict=True) if not keep]
        if dropped:
            x, names = x[:, varies], tuple(c for c, keep in zip(names, varies, strict=True) if keep)
            notes += (f"dropped {count(len(dropped), 'constant column')}: {', '.join(dropped)}",)
            columns = tuple(
                c._replace(done="left out", why=_and(c.why, "the same number in every row"))
                if c.name in dropped and c.kind == "number" and c.done == "feature"
                else c
                for c in columns
            )
    x_mean, x_scale = np.zeros(x.shape[1]), np.full(x.shape[1], table.pixel or 1.0)
    y_mean, y_scale = 0.0, 1.0
    if scaling == "standardised":
        x_mean, x_scale = _moments(x)
        if task == "regression":
            y_mean, y_scale = (float(v[0]) for v in _moments(y[:, None]))
    elif scaling == "centred":
        x_mean = x.mean(axis=0)
    if task != "classes":
        y = _affine(y, y_mean, y_scale)
        _check_float32(y[:, None], (table.target,))
    x = _affine(x, x_mean, x_scale)
    _check_float32(x, names)
    return Dataset(
        batch=Batch(x, y),
        task=task,
        name=name,
        names=names,
        target=table.target,
        labels=labels,
        source=table.source,
        licence=table.licence,
        notes=notes,
        scaling=scaling,
        x_mean=x_mean,
        x_scale=x_scale,
        y_mean=y_mean,
        y_scale=y_scale,
        columns=columns,
    )


@checked
def split(dataset: Dataset, fraction: Any, key: Any) -> tuple[Dataset, Dataset]:
    """`(train, test)`: a random share `fraction` of the rows, `round(fraction n)` of them, is held out.

    `key` is a whole number or a JAX key; the same key gives the same rows, on every platform and version.
    Rows come in random order; classes are not balanced on purpose. The statistics of the standardisation
    are taken again **from the training rows alone** and applied to both parts, so nothing of the held-out
    rows reaches the training (standardising is affine, so doing it to standardised columns is the same as
    doing it to the raw ones, up to float32 rounding). A column that is constant over the training rows is
    centred and left unscaled. With `scaling='none'` the numbers stay as they are.

    Raises ValueError where `fraction` leaves no test row or fewer than two training rows, and where all
    training rows have the same target.
    """
    n, d = dataset.batch.x.shape
    try:
        fraction = level("fraction", fraction)
    except (TypeError, ValueError):
        raise ValueError(f"fraction is the share of rows to hold out, between 0 and 1; got {shown(fraction)}") from None
    held_out = round(fraction * n)
    if held_out < 1 or n - held_out < 2:
        raise ValueError(
            f"holding out {fraction} of {count(n, 'row')} leaves {n - held_out} to train on and {held_out} to test "
            "on; at least 2 and 1 are needed"
        )
    order = permutation(n, key)
    train, test = (Batch(dataset.batch.x[rows], dataset.batch.y[rows]) for rows in (order[held_out:], order[:held_out]))
    if (train.y == train.y[0]).all():
        raise ValueError(
            f"all {n - held_out:,} training rows of this split have the same target; hold out less, or take another key"
        )
    x_mean, x_scale, y_mean, y_scale = np.zeros(d), np.ones(d), 0.0, 1.0
    notes = dataset.notes
    if dataset.scaling != "none":
        x_mean = _moments(train.x)[0]
    if dataset.scaling == "standardised":
        constant = (train.x == train.x[0]).all(axis=0)
        x_scale = np.where(constant, 1.0, _moments(train.x)[1])
        if constant.any():
            which = ", ".join(name for name, is_so in zip(dataset.names, constant, strict=True) if is_so)
            notes += (f"constant over the training rows, so left unscaled: {which}",)
        if dataset.task == "regression":
            y_mean, y_scale = (float(v[0]) for v in _moments(train.y[:, None]))

    def part(batch: Batch, which: str) -> Dataset:
        y = _affine(batch.y, y_mean, y_scale) if dataset.task == "regression" else batch.y
        return dataset._replace(
            batch=Batch(_affine(batch.x, x_mean, x_scale), y),
            notes=(*notes, f"{which} part of a split: {len(batch.x):,} of {count(n, 'row')}"),
            # raw = old_mean + old_scale z and z = mean + scale z', so raw is affine in z' with these:
            x_mean=dataset.x_mean + dataset.x_scale * x_mean,
            x_scale=dataset.x_scale * x_scale,
            y_mean=dataset.y_mean + dataset.y_scale * y_mean,
            y_scale=dataset.y_scale * y_scale,
        )

    return part(train, "training"), part(test, "held-out")


def sample(dataset: Dataset, rows: int | None, key: Any) -> Dataset:
    """At most `rows` of the rows, drawn at random without replacement, in the order that they had; None: all.

    Every class has at least one row among them. `key` is a whole number or a JAX key; the same key gives the same
    rows, on every platform and version. Nothing is standardised again: the statistics stay those of all rows.

    Raises ValueError where `rows` is not a whole number from 1, or smaller than the number of classes.
    """
    n = len(dataset.batch.x)
    if rows is None or (isinstance(rows, int) and rows >= n):
        return dataset
    if isinstance(rows, bool) or not isinstance(rows, int | np.integer) or rows < max(1, len(dataset.labels)):
        classes = f", one for each of the {len(dataset.labels)} classes at least" if dataset.labels else ""
        raise ValueError(f"rows must be a whole number from 1{classes}; got {rows!r}")
    order = permutation(n, key)
    firsts = np.sort(np.unique(dataset.batch.y[order], return_index=True)[1]) if dataset.labels else np.arange(0)
    # The first row of each class in this random order comes first; the others follow in their order.
    chosen = np.sort(np.concatenate([order[firsts], np.delete(order, firsts)])[:rows])
    note = f"a random sample of {count(int(rows), 'row')} of {n:,}" + (
        ", every class among them" * bool(dataset.labels)
    )
    return dataset._replace(batch=Batch(dataset.batch.x[chosen], dataset.batch.y[chosen]), notes=(*dataset.notes, note))


def are_classes(values: np.ndarray, n: int) -> bool:
    """Whether a target of n rows with these distinct numbers is taken for classes: few, and whole."""
    return len(values) <= min(MAX_CLASSES, max(2, n // 5)) and bool((values == np.floor(values)).all())


def _target(table: Table, task: str | None) -> tuple[np.ndarray, str, tuple[str, ...], tuple[str, ...]]:
    """`(y, task, labels, notes)`: the task told from the values unless given, labels numbered from 0."""
    y, name, n = table.y, table.target, len(table.y)
    if table.task is not None:  # one of ours: known, and numbered already
        return y.astype(np.int32 if table.task == "classes" else np.float64), table.task, table.labels or (), ()
    is_text = y.dtype.kind == "U"
    values, index, counts = np.unique(y, return_inverse=True, return_counts=True)
    if len(values) == 1:
        raise ValueError(f"the target {name!r} is {show(values[0])} in all {n} rows; there is nothing to learn")
    whole = not is_text and bool((y == np.floor(y)).all())
    told = "" if task else f", told from its values (task= says otherwise: {', '.join(TASKS)})"
    if task is None:
        is_class = is_text or are_classes(values, n)
        task = "binary" if len(values) == 2 else "classes" if is_class else "regression"
    if task == "regression":
        if is_text:
            raise ValueError(f"the target {name!r} is text ({few(values)}), which regression cannot use")
        return y.astype(np.float64), task, (), (f"target {name!r}: regression{told}",)
    if task == "binary" and len(values) != 2:
        raise ValueError(
            f"task='binary' needs two distinct values; the target {name!r} has {len(values):,}: {few(values)}"
        )
    if task == "classes" and not (is_text or whole):
        odd = few(values[values % 1 != 0])
        raise ValueError(f"task='classes' needs text or whole numbers; the target {name!r} has {odd}")
    if len(values) > max(MAX_CLASSES, n // 2):
        raise ValueError(
            f"the target {name!r} has {len(values):,} distinct values in {n:,} rows ({few(values)}), too many for "
            "classes; is it the right column?"
        )
    coded = "; ".join(
        f"{show(v)} is {i} ({count(c, 'row')})" for i, (v, c) in enumerate(zip(values, counts, strict=True))
    )
    return (
        index.astype(np.int32 if task == "classes" else np.float64),
        task,
        tuple(show(value, quote=False) for value in values),
        (f"target {name!r}: {task}{told}; {coded}",),
    )


def _and(*whys: str) -> str:
    return "; ".join(why for why in whys if why)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (over n) of each column of `x[n, d]`, in float64.

    Each column is first brought below 1 by a power of two, which is exact, so nothing over- or underflows.
    """
    exponent = np.frexp(np.abs(x).max(axis=0))[1]
    unit = np.ldexp(x.astype(np.float64), -exponent)
    return np.ldexp(unit.mean(axis=0), exponent), np.ldexp(unit.std(axis=0), exponent)


def _affine(raw: np.ndarray, mean: Any, scale: Any) -> np.ndarray:
    """`(raw - mean) / scale`, computed in float64 and stored as float32."""
    with np.errstate(over="ignore"):  # what does not fit float32 is found and named by the caller
        return ((raw - mean) / scale).astype(np.float32)


def _check_float32(values: np.ndarray, names: Sequence[str]) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, column = bad[0]
        raise ValueError(
            f"column {names[column]!r} has values beyond float32 (3.4e38), first in row {row} "
            "counted from 0; rescale it"
        )
