"""Refusing bad data before anything is compiled, with the row and the column."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrad.data.words import count, nearest

TASKS = ("regression", "binary", "classes")


def check_batch(
    batch: Any, task: str | None = None, *, names: Sequence[str] | None = None, classes: int | None = None
) -> None:
    """Refuse data that no descent can use; None if all is well.

    `batch` is any pytree of arrays that share a leading axis of examples. With `task` it is a `Batch` whose
    `y` must be 0/1 ('binary'), whole numbers from 0, below `classes` if given ('classes'), or real numbers
    ('regression'). `names` are the columns of `x`, for the message. Costs one sum over each array unless
    something is wrong. Under a trace only the shapes are looked at.

    Raises ValueError: no arrays, no examples, leading axes that differ, NaN or infinite entries (with row
    and column), labels that the task does not allow (with the row).
    """
    import jax
    from jax.core import Tracer

    leaves = [
        (jax.tree_util.keystr(path).lstrip(".") or "data", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
    ]
    if not leaves:
        raise ValueError("the data hold no arrays; give a Batch(x, y) or another pytree of arrays")
    for what, leaf in leaves:
        if np.ndim(leaf) == 0:
            raise ValueError(f"{what} is a single value; every array needs a leading axis of examples")
        if np.shape(leaf)[0] == 0:
            raise ValueError(f"{what} has shape {np.shape(leaf)}: there are no examples")
    first, shape = leaves[0][0], np.shape(leaves[0][1])
    for what, leaf in leaves[1:]:
        if np.shape(leaf)[0] != shape[0]:
            raise ValueError(
                f"{first} has {count(shape[0], 'example')} (shape {shape}) but {what} has "
                f"{np.shape(leaf)[0]:,} (shape {np.shape(leaf)}); they must share the leading axis"
            )
    if any(isinstance(leaf, Tracer) for _, leaf in leaves):
        return
    for what, leaf in leaves:
        check_finite(leaf, what, names if what == "x" else None)
    if task is not None:
        check_task(task)
        _check_labels(np.asarray(batch.y), task, classes)


def check_task(task: str) -> None:
    """Raises ValueError unless `task` is one of `TASKS`."""
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}{nearest(task, TASKS)}")


def check_finite(values: Any, what: str, names: Sequence[str] | None = None) -> None:
    """Raises ValueError, with the place, unless every entry of an array (numpy or JAX) is finite."""
    import jax.numpy as jnp

    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return
    # A sum is finite only if its terms are: one pass and no copy, on the device where the data are.
    with np.errstate(over="ignore", invalid="ignore"):
        if np.isfinite(np.asarray(values.sum())):
            return
    values = np.asarray(values)
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return
    place = tuple(int(i) for i in bad[0])
    words = f"row {place[0]}"
    if len(place) == 2:
        words += f", column {place[1]}" + (f" {names[place[1]]!r}" if names else "")
    raise ValueError(
        f"{what}{list(place)} is {values[place]} ({words}, counted from 0); "
        f"{count(len(bad), 'such entry', 'such entries')} in all. "
        "Every entry must be finite: drop those rows or fill them in"
    )


def _check_labels(labels: np.ndarray, task: str, classes: int | None) -> None:
    if labels.dtype.kind not in "biuf":
        raise ValueError(f"y must hold numbers; got {labels.dtype}")
    if task == "regression":
        return
    if labels.ndim != 1:
        raise ValueError(f"y must hold one label for each example, of shape [n]; got shape {labels.shape}")
    if task == "binary":
        bad, needs = (labels != 0) & (labels != 1), "0 or 1"
    else:
        bad, needs = (labels < 0) | (labels % 1 != 0), "a whole number from 0"
        if classes is not None:
            bad, needs = bad | (labels >= classes), f"a whole number from 0 to {classes - 1}"
    if bad.any():
        row = int(np.argmax(bad))
        signs = task == "binary" and set(np.unique(labels).tolist()) == {-1, 1}
        raise ValueError(
            f"y[{row}] is {labels[row]}, but every label must be {needs}; {bad.sum():,} of {len(labels):,} are not"
            + ("; labels -1 and 1 become 0 and 1 by (y + 1) / 2" if signs else "")
        )
