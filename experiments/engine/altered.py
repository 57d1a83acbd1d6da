"""The study with a change in it: an echo in another environment, or a fault that is planted to be found.

    python -m experiments altered CHANGE ARGUMENTS

runs `python -m experiments ARGUMENTS` with that change, in this process and its workers. CHANGE is JSON, e.g.
{"nudge": 1} or {"eta": 0.01}.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxgrad.types import Batch


class Change(NamedTuple):
    """What an echo, or a planted fault, changes in every experiment of a process."""

    nudge: int | None = None
    """Seed of the nudge of the data."""
    eta: float = 0.0
    """Relative change of every step size."""
    target: float = 0.0
    """Relative change of one example's target; from 1 % on, a label changes to another class."""
    untimed: bool = False
    """Whether seconds do not matter: experiments that measure them then run beside others."""


def read(text: str) -> Change:
    """A change from its JSON; ValueError where it is none."""
    try:
        return Change(**json.loads(text))
    except (ValueError, TypeError):
        fields = ", ".join(Change._fields)
        raise ValueError(f"'altered' needs a change as a JSON object with {fields}; got {text!r}") from None


def apply(what: Change) -> None:
    """Let every experiment of this process run so changed."""
    import optax

    from jaxgrad import data

    if what.nudge is not None:
        data.load = nudged(data.load, what.nudge)
    if what.target:
        data.load = one_target_changed(data.load, what.target)
    if what.eta:
        optax.apply_updates = scaled(optax.apply_updates, 1 + what.eta)


def nudged(load: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """`data.load`, with every floating-point column scaled by one unit in the last place, up or down."""

    def nudge(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
        up = random.integers(0, 2, values.shape[1:]).astype(bool)
        towards = np.where(up, np.copysign(np.inf, values), 0).astype(values.dtype)
        return np.where(values == 0, values, np.nextafter(values, towards))

    def loaded(*arguments: Any, **options: Any) -> Any:
        dataset, random = load(*arguments, **options), np.random.default_rng(seed)
        x, y = dataset.batch
        # Labels are what they are.
        moved = Batch(nudge(x, random), nudge(y, random) if dataset.task == "regression" else y)
        return dataset._replace(batch=moved)

    return loaded


def one_target_changed(load: Callable[..., Any], by: float) -> Callable[..., Any]:
    """`data.load`, with the target of one example, larger in size than three in four, scaled by 1 + by.

    A label becomes another class if `by` is 1 % or more: it has no smaller change.
    """

    def loaded(*arguments: Any, **options: Any) -> Any:
        dataset = load(*arguments, **options)
        x, y = dataset.batch
        changed = np.array(y)
        if dataset.task == "regression":
            at = int(np.argsort(np.abs(changed), kind="stable")[len(changed) * 3 // 4])
            changed[at] *= 1 + by
        elif by >= 0.01:
            changed[0] = next(label for label in np.unique(changed) if label != changed[0])
        return dataset._replace(batch=Batch(x, changed))

    return loaded


def scaled(apply: Callable[..., Any], by: float) -> Callable[..., Any]:
    """`optax.apply_updates` of updates times `by`: what a step size times `by` does."""
    import jax

    return lambda params, updates: apply(params, jax.tree.map(lambda leaf: leaf * by, updates))


def run(
    what: Change, arguments: Sequence[str], variables: Mapping[str, str] | None = None, python: str | None = None
) -> int:
    """Run the study so changed in a process of its own, with these variables added; returns its exit status.

    What is there of `XLA_FLAGS` stays. `python` is another interpreter.
    """
    import experiments

    variables = dict(variables or {})
    flags = " ".join(filter(None, (os.environ.get("XLA_FLAGS"), variables.get("XLA_FLAGS"))))
    done = subprocess.run(
        [python or sys.executable, "-m", "experiments", "altered", json.dumps(what._asdict()), *arguments],
        check=False,
        cwd=Path(experiments.__path__[0]).parent,
        env={**os.environ, **variables, "XLA_FLAGS": flags},
    )
    return done.returncode
