"""Where the rows are, as a value. The loop calls its functions and does not know where the rows are.

    in_memory     arrays of this process, evaluated in blocks where that is faster
    on_mesh       rows spread over devices (`parallel.Sharded`): the same examples, the same numbers to rounding
    on_disk       rows in files (`rows.Rows`): the same bits as rows in memory; full passes go in parts

They promise the same, and one suite of laws tests them all (`tests/library/test_placements.py`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgrad.descent import optimizers
from jaxgrad.descent.job import Job
from jaxgrad.descent.objective import Objective
from jaxgrad.descent.step import State
from jaxgrad.descent.stopping import Judged
from jaxgrad.types import Key, Params


class Placement(NamedTuple):
    """Rows and the programs that run over them."""

    n: int
    mesh: jax.sharding.Mesh | None
    put: Callable[[Any], Any]
    """Move a pytree to where the steps need it."""
    advance: Callable[..., State]
    """`(state, key, until, *, halt) -> state`."""
    look: Callable[[State, Key], tuple[Any, Any, Any, Any]]
    """`(state, key) -> (loss, norm of the last step, aux, observed)`."""
    recorded: Callable[[State, Key], tuple[Any, Any]]
    """The shapes of aux and observed, as `look` returns them."""
    judge: Callable[[int, State, Key], Any]
    """The value, for each run, that the rule with this number judges."""
    finite: Callable[[Params], Any]
    """Whether all parameters of each run are finite."""
    at_start: Callable[[Params, Any, Key], str]
    """A sentence on what is not finite at these parameters, loss or gradient; empty if all is finite."""
    identity: tuple[Any, Any, Callable[[], str]]
    """For the fingerprint of a checkpoint: the loss, rows with the shapes that it takes, and a hash of all rows."""
    release: Callable[[], None] = lambda: None
    in_files: bool = False
    """Whether each look takes a pass over files."""

    def close(self) -> None:
        """Release threads, files and memory."""
        self.release()


def check(job: Job, objective: Objective, data: Any) -> None:
    """Raise TypeError or ValueError unless loss and `evaluate` have the promised form."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    objective.check(optimizers.trained(job.params), job.model, data, key)


def sees_all(job: Job) -> bool:
    return job.observes_state or job.evaluate_at is not None


def measured(rule: Judged) -> dict[str, Any]:
    return {"measured": rule.measured, "metric": getattr(rule, "metric", None)}


def as_arrays(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if optimizers.typed(leaf) else jnp.asarray(leaf), tree)


def with_fallback(advance: Any, single: bool) -> Any:
    """`advance`, compiled in XLA's usual way if the compiler refuses a step that `small_steps` took for simple."""
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
