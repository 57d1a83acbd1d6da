"""What to do with the rows, wherever they are."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxgrad import checks
from jaxgrad.descent import programs, stopping
from jaxgrad.descent.beginning import Beginning
from jaxgrad.descent.objective import Objective, hashable
from jaxgrad.descent.runs import Runs
from jaxgrad.descent.stopping import Judged, SmallStep, Stop
from jaxgrad.types import Params, Sampling


class Job(NamedTuple):
    """What to do with the rows, wherever they are."""

    objective: Objective
    runs: Runs
    sampling: Sampling
    observe: Any
    """`observe(params, state)`, or None."""
    observes_state: bool
    evaluate_at: Any
    params: Params
    """The start of one run."""
    model: Any
    """The state of the loss at the start of one run."""
    batch_losses: bool
    stop: tuple[Stop, ...]
    memory: float
    steps: int

    @classmethod
    def of(
        cls,
        objective: Objective,
        begin: Beginning,
        sampling: Sampling,
        *,
        observe: Any,
        evaluate_at: Any,
        stop: tuple[Stop, ...],
        batch_losses: bool,
        memory: float,
        steps: int,
    ) -> "Job":
        """The job from the arguments of `descend`. Its functions can be hashed, so that programs are found by them."""
        two = observe is not None and programs.two_arguments(observe)
        return cls(
            objective=objective,
            runs=begin.runs,
            sampling=sampling,
            observe=_observer(observe, two),
            observes_state=two,
            evaluate_at=evaluate_at and hashable(checks.function("evaluate_at", evaluate_at, 1)),
            params=begin.one(begin.params),
            model=begin.model,
            batch_losses=batch_losses,
            stop=tuple(map(_hashable, stop)),
            memory=memory,
            steps=steps,
        )

    @property
    def rules(self) -> tuple[Judged, ...]:
        """The rules that are judged between steps; their place is their number."""
        return tuple(stopping.judged(self.stop))

    @property
    def halt(self) -> SmallStep | None:
        """The rule that is judged inside the compiled loop."""
        return stopping.halting(self.stop)


@dataclass(frozen=True)
class _OfParams:
    """`observe(params)` as a function of params and state."""

    observe: Callable[[Params], Any]

    def __call__(self, params: Params, state: Any) -> Any:
        return self.observe(params)


def _observer(observe: Any, of_state: bool) -> Any:
    if observe is None:
        return None
    return hashable(observe) if of_state else _OfParams(hashable(observe))


def _hashable(rule: Stop) -> Stop:
    return rule._replace(metric=hashable(rule.metric)) if isinstance(rule, stopping.NoImprovement) else rule
