"""Refusing bad data before anything is compiled, with the row and the column."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgrad import checks
from jaxgrad.types import Batch

check_finite = checks.every_finite
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

    batch = checks.batch("data", batch, names=names)
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(batch)):
        return
    if task is not None:
        check_task(task)
        checks.instance("batch", batch, Batch)
        _check_labels(np.asarray(batch.y), task, classes)


def check_task(task: str) -> None:
    """Raises ValueError unless `task` is one of `TASKS`."""
    if not isinstance(task, str) or task not in TASKS:
        close = checks.nearest(task, TASKS) if isinstance(task, str) else ""
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {checks.shown(task)}{close}")


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
