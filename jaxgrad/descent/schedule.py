"""The steps at which a run pauses, to be recorded, judged or saved."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import numpy as np

from jaxgrad import checks
from jaxgrad.checks import Count, checked
from jaxgrad.descent.stopping import Judged


@checked
def log_spaced(steps: Count, points: Annotated[int, partial(checks.count, at_least=2)]) -> np.ndarray:
    """About `points` distinct record points from 0 and 1 to `steps`, evenly spaced in log t: `int64[k]`."""
    return np.unique(np.r_[0, np.round(np.geomspace(1, steps, max(2, points - 1)))].astype(np.int64))


class Mark(NamedTuple):
    """A step at which a run pauses, and why."""

    step: int
    recorded: bool
    judged: tuple[int, ...]
    """The numbers of the rules that are judged there."""
    saved: bool
    last: bool


class Marks(NamedTuple):
    """All pauses of a run."""

    first: int
    steps: int
    recorded: frozenset[int]
    every: tuple[int, ...]
    """Steps between two checks of each rule."""
    saving: int | None
    """Steps between two checkpoints."""

    @property
    def steps_of_all(self) -> list[int]:
        """The steps of the pauses, in order."""
        found = {*self.recorded, self.steps}
        for every in (*self.every, *([] if self.saving is None else [self.saving])):
            found.update(range(self.first, self.steps, every))
        return sorted(found)

    def after(self, done: int) -> Iterator[Mark]:
        """The pauses after a step, in order."""
        return (self.at(step) for step in self.steps_of_all if step > done)

    def at(self, step: int) -> Mark:
        """What to do at a step."""
        due = tuple(i for i, every in enumerate(self.every) if step < self.steps and (step - self.first) % every == 0)
        saved = self.saving is not None and (step == self.steps or step % self.saving == 0)
        return Mark(step, step in self.recorded, due, saved, step == self.steps)


def marks(
    record: int | Sequence[int] | np.ndarray, first: int, steps: int, rules: Sequence[Judged], saving: int | None
) -> Marks:
    """The pauses of a run that goes from step `first` to `steps`."""
    every = tuple(rule.every for rule in rules)
    return Marks(first, steps, frozenset(_record_points(record, first, steps).tolist()), every, saving)


def _record_points(record: Any, first: int, steps: int) -> np.ndarray:
    if steps < first:
        raise ValueError(f"the run has already taken {first} steps: steps counts from the first one, got {steps}")
    if not isinstance(record, Sequence) and np.ndim(record) == 0:
        points = checks.count("record", record, 2)
        return np.unique(np.round(np.linspace(first, steps, points)).astype(np.int64))
    points = np.unique(checks.whole_numbers("record", record))
    if points[0] < first or points[-1] > steps:
        raise ValueError(f"record must be whole numbers of steps from {first} to {steps}, got {checks.shown(record)}")
    return points
