"""What is probably a mistake in a table, though it can be used: said aloud, never mended in silence."""

from collections.abc import Sequence

import numpy as np

from jaxgrad.data.dataset import Column
from jaxgrad.data.words import count

MOST = 300
"""More features than this are not tried for collinearity, which costs their number to the third power."""
FIRST = 2_000
"""What holds in all rows holds in these many, so they are looked at first: it is quicker."""
SAME = 1e-12
"""A share of its variance that a column leaves unexplained is taken for rounding below this."""


def doubts(
    account: Sequence[Column],
    values: dict[str, np.ndarray | None],
    target: str,
    x: np.ndarray,
    names: Sequence[str],
) -> tuple[list[Column], tuple[str, ...]]:
    """The account with a doubt beside each column that deserves one, and what is doubtful of the whole.

    A feature that gives the target away: a linear function of it, in the same order as it, or with one label only for
    each of its few values. A column that counts rows, or is a different whole number in each. One that is collinear
    with another, or a combination of others. As many columns as rows.
    """
    n, d = x.shape
    y = values[target]
    assert y is not None
    varies = (x != x[0]).any(axis=0) if n else np.zeros(d, bool)
    collinear, fits = {}, False
    enough = n > varies.sum() + 2
    if enough and 0 < varies.sum() <= MOST:
        kept = [name for name, so in zip(names, varies, strict=True) if so]
        numbers = y if y.dtype.kind == "f" else None
        first = _collinear(x[:FIRST, varies], kept, None if numbers is None else numbers[:FIRST])
        if n <= FIRST or any(first):
            collinear, fits, _ = _collinear(x[:, varies], kept, numbers)
    out, classes = [], np.unique(y)
    for column in account:
        used = column.done.endswith(("feature", "features"))
        doubt = column.doubt
        own = values[column.name]
        if used and n >= 5 and own is not None:
            doubt = doubt or _gives_away(own, y, classes, target) or (_rows(own) if column.kind == "number" else "")
        if used and not doubt:
            mine = [f for f in collinear if f == column.name or f.startswith(f"{column.name}=")]
            doubt = collinear[mine[0]] if mine else ""
        out.append(column._replace(doubt=doubt))
    loud: tuple[str, ...] = ()
    given_away = any("target" in column.doubt for column in out)
    if n and not enough and d > 1:
        loud += (f"{count(d, 'feature')} for {count(n, 'row')}: a linear model fits any target exactly",)
    elif fits and not given_away:
        loud += (f"the features together fit the target {target!r} exactly; is it a sum or another function of them?",)
    return out, loud


def _rows(own: np.ndarray) -> str:
    if (own[:FIRST] != np.floor(own[:FIRST])).any():
        return ""
    steps = np.diff(own)
    if (np.abs(steps) == 1).all() and (steps == steps[0]).all():
        return "counts the rows; if that is all, leave it out (drop=)"
    if len(own) >= 20 and (own == np.floor(own)).all() and len(np.unique(own)) == len(own):
        return "is a different whole number in each row; if it is an identifier, leave it out (drop=)"
    return ""


def _gives_away(own: np.ndarray, y: np.ndarray, classes: np.ndarray, target: str) -> str:
    """How a column tells the target, whose distinct values are `classes`, if it does."""
    n = len(y)
    out = "if it is not known before the target is, leave it out (drop=)"
    if own.dtype.kind == y.dtype.kind == "f" and _same_order(own[:FIRST], y[:FIRST]) and _same_order(own, y):
        a, b = _unit(own), _unit(y)
        if a is None or b is None:
            return ""
        if (own == y).all():
            return f"equals the target {target!r} in every row: leave it out (drop=)"
        if 1 - abs(float(a @ b)) < SAME:
            return f"is the target {target!r} in other units, a linear function of it; {out}"
        if n >= 10 and len(classes) > n // 2 and len(np.unique(own)) > n // 2:
            return f"puts the rows into the same order as the target {target!r}; {out}"
    few = max(2, n // 4)
    if n < 10 or not 1 < len(classes) <= few:
        return ""
    kinds, of = np.unique(own, return_inverse=True)
    pairs = np.unique(of * len(classes) + np.searchsorted(classes, y)) if 1 < len(kinds) <= few else ()
    if len(pairs) == len(kinds):
        return f"has one value of the target {target!r} only for each of its {len(kinds)} values; {out}"
    return ""


def _same_order(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether b never goes down where a goes up, or never up."""
    return any(bool((np.diff(c[np.lexsort((c, a))]) >= 0).all()) for c in (b, -b))


def _unit(values: np.ndarray) -> np.ndarray | None:
    """Centred and of length 1; None for a constant."""
    most = np.abs(values).max()
    centred = values / most - np.mean(values / most) if most > 0 else values
    length = np.sqrt(centred @ centred)
    return centred / length if length > 1e-14 * np.sqrt(len(values)) else None


def _collinear(x: np.ndarray, names: Sequence[str], y: np.ndarray | None) -> tuple[dict[str, str], bool, bool]:
    """`(what each dependent column depends on, whether all together give y, whether a column is constant here)`.

    By elimination, one column at a time, on their correlations.
    """
    columns = zip(names, np.ascontiguousarray(x.T), strict=True)
    units = {name: unit for name, column in columns if (unit := _unit(column)) is not None}
    if not units:
        return {}, False, True
    last = None if y is None else _unit(y)
    table = np.stack([*units.values(), *([] if last is None else [last])], axis=1)
    correlation = table.T @ table
    left, found, known = correlation.copy(), {}, list(units)
    for j, name in enumerate(known):
        if left[j, j] < SAME:
            twin = next((known[i] for i in range(j) if 1 - abs(correlation[i, j]) < SAME), None)
            found[name] = f"is collinear with {twin!r}" if twin else "is a linear combination of other columns"
            found[name] += ", so that the weights have no single best values: leave one out (drop=)"
        else:
            left -= np.outer(left[:, j], left[j]) / left[j, j]
    return found, last is not None and bool(left[-1, -1] < SAME), len(units) < len(names)
