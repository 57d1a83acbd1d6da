"""Where the rows are, as a value: functions that the loop calls without knowing.

    in_memory     arrays of this process, evaluated in blocks where that pays
    on_mesh       rows spread over devices (`parallel.Sharded`): the same examples, the same numbers to rounding
    on_disk       rows in files (`rows.Rows`): the bits of rows in memory, and full passes in parts

All of them promise the same; one suite of laws runs over them (`tests/library/test_placements.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgrad.descent import optimizers
from jaxgrad.descent.objective import Objective
from jaxgrad.descent.runs import Runs
from jaxgrad.descent.step import State
from jaxgrad.descent.stopping import Judged
from jaxgrad.types import Key, Params, Sampling


class Job(NamedTuple):
    """What is done with the rows, wherever they are."""

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
    rules: tuple[Any, ...]
    memory: float
    steps: int


class Placement(NamedTuple):
    """Rows and the programs that run over them."""

    n: int
    mesh: jax.sharding.Mesh | None
    put: Callable[[Any], Any]
    """A pytree laid where the steps want it."""
    advance: Callable[..., State]
    """`(state, key, until, *, halt) -> state`."""
    look: Callable[[State, Key], tuple[Any, Any, Any, Any]]
    """`(state, key) -> (loss, norm of the last step, aux, observed)`."""
    recorded: Callable[[State, Key], tuple[Any, Any]]
    """The shapes of what `look` returns as aux and observed."""
    judge: Callable[[int, State, Key], Any]
    """What the rule of a number measures, of each run."""
    finite: Callable[[Params], Any]
    """Whether all parameters are finite, of each run."""
    at_start: Callable[[Params, Any, Key], str]
    """What of the loss and its gradient is not finite for these parameters; empty where all is."""
    identity: tuple[Any, Any, Callable[[], str]]
    """The loss as the checkpoint knows it, the rows that it takes (for their shapes), and a hash of all rows."""
    close: Callable[[], None] = lambda: None


def check(job: Job, objective: Objective, data: Any) -> None:
    """Raise TypeError or ValueError unless loss and `evaluate` have the form that is promised."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    objective.check(optimizers.trained(job.params), job.model, data, key)


def sees_all(job: Job) -> bool:
    return job.observes_state or job.evaluate_at is not None


def measured(rule: Judged) -> dict[str, Any]:
    return {"measured": rule.measured, "metric": getattr(rule, "metric", None)}


def as_arrays(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if optimizers.typed(leaf) else jnp.asarray(leaf), tree)


def with_fallback(advance: Any, single: bool) -> Any:
    """The same, compiled as XLA usually does where `small_steps` took the step for simpler than the compiler does."""
    chosen = [advance]

    def advance_or_fall_back(*args: Any, halt: Any) -> State:
        try:
            return chosen[0](*args, halt=halt)
        except jax.errors.JaxRuntimeError as error:
            if not single or "UNIMPLEMENTED" not in str(error) or chosen[0] is not advance:
                raise
            chosen[0] = partial(advance, single=False)
            return chosen[0](*args, halt=halt)

    return advance_or_fall_back
