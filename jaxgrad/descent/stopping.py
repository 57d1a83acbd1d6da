"""When to end a run before its budget of steps (F3), and which of its parameters to keep.

Each rule is a value, made by the function of its name. `stop=` takes one or several; the first rule that is met ends
a run. Of runs side by side, each ends by itself.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import numpy as np
import optax

from jaxgrad import checks
from jaxgrad.checks import Count, NotNegative, Number, Positive, checked
from jaxgrad.types import Params

MADE_BY = (
    "small_step(...), small_gradient(...), no_improvement(...), target_loss(...), time_limit(...) or keep_best(...)"
)


class SmallStep(NamedTuple):
    """Judged at every step, inside the compiled loop."""

    below: float

    reason = "small step"
    of_taken_steps = True
    """A step that the optimizer skipped on purpose is not judged."""

    def __call__(self, state: Any) -> Any:
        return optax.tree.norm(state.update) < self.below

    def again(self) -> "SmallStep":
        return small_step(self.below)


class SmallGradient(NamedTuple):
    """Judged each `every` steps, from the norm of the full gradient."""

    below: float
    every: int = 1

    reason = "small gradient"
    measured = "gradient"

    def met(self, value: np.ndarray, memory: Any) -> tuple[Any, Any]:
        """Whether each run ends, and what to remember."""
        return value < self.below, memory

    def again(self) -> "SmallGradient":
        return small_gradient(self.below, every=self.every)


class TargetLoss(NamedTuple):
    """Judged each `every` steps, from the full loss."""

    at_most: float
    every: int = 1

    reason = "target loss"
    measured = "loss"

    def met(self, value: np.ndarray, memory: Any) -> tuple[Any, Any]:
        """Whether each run ends, and what to remember."""
        return value <= self.at_most, memory

    def again(self) -> "TargetLoss":
        return target_loss(self.at_most, every=self.every)


class NoImprovement(NamedTuple):
    """Judged each `every` steps, from a metric of the parameters. The best parameters are kept."""

    metric: Callable[[Params], Any]
    patience: int | None
    every: int = 1
    min_delta: float = 0.0

    reason = "validation"
    measured = "metric"

    def met(self, value: np.ndarray, memory: Any) -> tuple[Any, Any]:
        """Whether each run ends, and what to remember: the value to beat, and how many checks failed to beat it."""
        best, waited = memory
        better = value < best - self.min_delta
        best, waited = np.where(better, value, best), np.where(better, 0, waited + 1)
        return waited >= (np.inf if self.patience is None else self.patience), (best, waited)

    def again(self) -> "NoImprovement":
        if self.patience is None:
            return keep_best(self.metric, every=self.every)
        return no_improvement(self.metric, patience=self.patience, every=self.every, min_delta=self.min_delta)


class TimeLimit(NamedTuple):
    """Judged after every few steps, by the time that the steps took."""

    seconds: float

    reason = "time limit"

    def again(self) -> "TimeLimit":
        return time_limit(self.seconds)


Stop: TypeAlias = SmallStep | SmallGradient | TargetLoss | NoImprovement | TimeLimit
"""A rule, made by one of the functions below."""
Judged: TypeAlias = SmallGradient | TargetLoss | NoImprovement


@checked
def small_step(below: Positive) -> SmallStep:
    """The lecture's rule (F3): stop at the first step with `‖w_t − w_{t−1}‖ < below`, judged every step.

    It measures `η‖g‖`, not the distance to a minimum. A smaller step size makes it fire sooner and further away, and
    for small batches it fires by luck. `small_gradient` is the better rule.

    A step that the optimizer skipped is not judged: an update of exactly 0 for a gradient that is not 0. So does
    `optax.MultiSteps` between two updates, a step size that warms up from 0, and `optax.apply_if_finite`.
    """
    return SmallStep(below)


def check_metric(rule: Any, params: Params) -> None:
    """Raise TypeError if the metric of a rule is no number at such params. Nothing is computed."""
    with checks.saying(
        "metric(params) cannot be evaluated for these params (its data must be arrays in memory, as of a few held-out "
        "rows, and not rows on disk)"
    ):
        made = jax.eval_shape(rule.metric, params)
    if getattr(made, "shape", None) != ():
        raise TypeError(f"metric(params) must return one number, and returns {checks.shown(made)}")


@checked
def small_gradient(below: Positive, *, every: Count = 1) -> SmallGradient:
    """Stop when the **full** gradient has `‖∇L(w_t)‖ < below`, judged each `every` steps, on the clock.

    Each check takes a pass over all rows. The default is one after each step; beside minibatches `every` should be
    about a pass of them, `n // b`.
    """
    return SmallGradient(below, every)


@checked
def target_loss(at_most: Number, *, every: Count = 1) -> TargetLoss:
    """Stop when the **full** loss, as it is recorded, is at or below `at_most`.

    It is judged each `every` steps, on the clock: `Trace.stopped_at` is the first judged step that reached it. Each
    check takes a pass over all rows. The default is one after each step; beside minibatches `every` should be about a
    pass of them, `n // b`.
    """
    return TargetLoss(at_most, every)


@checked
def no_improvement(
    metric: Callable[[Params], Any], *, patience: Count, every: Count = 1, min_delta: NotNegative = 0.0
) -> NoImprovement:
    """Stop when `metric(params)` (lower is better, e.g. a validation loss) has not improved in `patience` checks.

    It is evaluated each `every` steps, on the clock (at each step unless you say more, which is a pass for each step if
    the metric is over all rows), and at the end for `Trace.best`, which has the parameters with the lowest value of
    all, however little lower. A value counts as an improvement if it is more than `min_delta` below the last one.
    """
    return NoImprovement(metric, patience, every, min_delta)


@checked
def keep_best(metric: Callable[[Params], Any], *, every: Count = 1) -> NoImprovement:
    """Never stop, but keep the parameters with the lowest `metric(params)` in `Trace.best`.

    It is evaluated each `every` steps, on the clock (at each step unless you say more, which is a pass for each step if
    the metric is over all rows), and where a run ends, whichever rule ended it.
    """
    return NoImprovement(metric, None, every)


@checked
def time_limit(seconds: Positive) -> TimeLimit:
    """Stop after `seconds` of steps, as `Trace.seconds` counts them: compiling and recording are not counted.

    All runs of a program end together, at the end of a chunk that takes about a fiftieth of the limit. The number of
    steps depends on the machine; the steps themselves do not.
    """
    return TimeLimit(seconds)


def rules(name: str, value: Any) -> tuple[Stop, ...]:
    """The given rules: none, one or several. Raises TypeError, with the functions that make rules, for other values."""
    kinds = (SmallStep, SmallGradient, TargetLoss, NoImprovement, TimeLimit)
    if value is None:
        return ()
    if isinstance(value, kinds):
        found = (value.again(),)
    elif isinstance(value, list | tuple) and value and all(isinstance(each, kinds) for each in value):
        found = tuple(each.again() for each in value)
    else:
        wrong = next((each for each in value if not isinstance(each, kinds)), value) if _many(value) else value
        hint = ""
        if callable(wrong) and getattr(wrong, "__name__", "") in MADE_BY:
            hint = f": call it, as in {wrong.__name__}(...)"
        raise TypeError(
            f"{name} must be made by {MADE_BY}, or be a list of such rules; got {checks.shown(wrong)}{hint}"
        )
    for kind, most in ((SmallStep, "one small_step"), (NoImprovement, "one no_improvement or keep_best")):
        if sum(isinstance(each, kind) for each in found) > 1:
            raise ValueError(f"{name} must hold at most {most}, got {len(found)} rules")
    return found


def _many(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0


def halting(found: Sequence[Stop]) -> SmallStep | None:
    """The rule that is judged inside the compiled loop."""
    return next((rule for rule in found if isinstance(rule, SmallStep)), None)


def judged(found: Sequence[Stop]) -> list[Judged]:
    """The rules that are judged between steps, from a gradient, a loss or a metric."""
    return [rule for rule in found if isinstance(rule, SmallGradient | TargetLoss | NoImprovement)]


def limit(found: Sequence[Stop]) -> float:
    """Seconds after which all runs end; infinite without a limit."""
    return min((rule.seconds for rule in found if isinstance(rule, TimeLimit)), default=np.inf)


def memory(rule: Judged, shape: tuple[int, ...]) -> Any:
    """What a rule remembers before its first check."""
    return (np.full(shape, np.inf), np.zeros(shape, int)) if isinstance(rule, NoImprovement) else ()
