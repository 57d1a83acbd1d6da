"""Where runs begin: at new parameters, or at the state of earlier runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import checks
from jaxgrad.descent import optimizers
from jaxgrad.descent.runs import Runs, continued, copies, first_state
from jaxgrad.descent.step import State
from jaxgrad.types import Params


class Beginning(NamedTuple):
    """The runs before their first step."""

    runs: Runs
    params: Params
    """The parameters of one run, or with a leading axis for each axis of runs that has its own."""
    ahead: int
    """How many such axes they have."""
    model: Any
    """The state of the loss of one run."""
    state: State | None
    """The state of the earlier runs, ready to go on; None for new parameters."""
    examples: int
    """The number of gradients of examples that the earlier runs took."""

    @classmethod
    def of(cls, runs: Runs, params: Any, axis: int | None, loss_state: Any) -> "Beginning":
        """The beginning from the arguments of `descend`. Its optimizer is one that was compiled before, if any is."""
        if isinstance(params, State):
            if loss_state is not None:
                raise ValueError(
                    "loss_state comes with the state of the earlier run: leave it out where params is a State"
                )
            state = continued(params, runs)
            begin = cls(runs, state.params, len(runs.shape), None, state, _examples(params))
            begin = begin._replace(model=begin.one(state.model))
            _check_params(begin.params, runs, None)
        else:
            if loss_state is not None and not jax.tree.leaves(loss_state):
                raise ValueError("loss_state holds no arrays: leave it out, or give the first state of the loss")
            start = jax.tree.map(jnp.asarray, params)
            _check_params(start, runs, axis)
            model = jax.tree.map(jnp.asarray, loss_state)
            begin = cls(runs, start, 0 if axis is None else 1, model, None, 0)
        optimizer, twice = optimizers.usable(runs.optimizer, begin.one(begin.params))
        start = optax.LookaheadParams.init_synced(begin.params) if twice else begin.params
        return begin._replace(runs=runs._replace(optimizer=optimizer), params=start)

    @property
    def first(self) -> int:
        """The steps that were taken before."""
        return 0 if self.state is None else int(self.state.step)

    def one(self, tree: Any) -> Any:
        """The part of the first run, of a tree like the parameters."""
        return jax.tree.map(lambda leaf: leaf[(0,) * self.ahead], tree)

    def first_state(self, steps: int, batch_losses: bool) -> State:
        """The state of all runs before their first step."""
        state = self.state
        if state is None:
            state = first_state(self.runs, self.params, 0 if self.ahead else None)
            state = state._replace(model=copies(self.model, self.runs.shape))
        return state._replace(batch_loss=_room(self.runs, steps)) if batch_losses else state


def _room(runs: Runs, steps: int) -> Any:
    """An array for the loss of each step's batch; NaN until the step is taken."""
    shape, dtype = (*runs.shape, steps), jax.dtypes.canonicalize_dtype(float)
    return np.full(shape, np.nan, dtype) if runs.shape else jnp.full(shape, jnp.nan, dtype)


def _examples(state: State) -> int:
    """The number of gradients of examples that led to a state."""
    if state.examples is None and int(np.max(state.step)) > 0:
        raise ValueError(
            "this state comes from `advance`, which does not count the gradients of examples that it takes: give "
            "state._replace(examples=...) with their number so far (steps times batch size)"
        )
    return 0 if state.examples is None else int(np.max(state.examples))


def _check_params(params: Params, runs: Runs, axis: int | None) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params hold no arrays: there is nothing to learn")
    seeds = len(runs.key) if runs.many_keys else None
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point: {checks.leaf_name(path)} is {leaf.dtype}; convert it, "
                "e.g. jnp.asarray(w, jnp.float32)"
            )
        if axis is not None and (axis != 0 or seeds is None or leaf.shape[:1] != (seeds,)):
            raise ValueError(
                f"params_axis={axis} needs an array of keys and a leading axis of as many starts: "
                f"{checks.leaf_name(path)} has shape {leaf.shape}, keys: {seeds}"
            )
