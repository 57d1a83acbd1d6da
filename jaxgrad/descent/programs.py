"""The compiled programs of a run: take steps, evaluate what is recorded, evaluate what a rule judges.

Each program serves all runs side by side.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import checks
from jaxgrad.descent import optimizers, row_blocks
from jaxgrad.descent.objective import Objective, recorded_key
from jaxgrad.descent.step import State, one_step, take_steps
from jaxgrad.types import Key, Params


@partial(jax.jit, static_argnames=("objective", "optimizer", "sampling", "halt", "over", "single"))
def advance(state, key, data, until, *, objective, optimizer, sampling, halt, over, single):
    """Take the steps of all runs to `until`."""
    one = partial(take_steps, objective=objective, optimizer=optimizer, sampling=sampling, halt=halt)
    if not over:
        return one(state, key, data, until, single=single)
    # Without `halt` one step counter serves all runs: the loop needs no masks, and the runs of a key share its batches.
    axes = _axes(None if halt is None else 0)
    if halt is not None:
        state = state._replace(step=jnp.broadcast_to(state.step, state.halted.shape))
    for of_key in reversed(over):
        one = jax.vmap(one, in_axes=(axes, of_key, None, None), out_axes=axes)
    return one(state, key, data, until)


def _axes(of_step: int | None) -> State:
    return State(of_step, 0, 0, 0, 0, None, 0, 0)


def with_given_gradient(slope: Callable[[Params, Any], Any], optimizer: optimizers.Optimizer) -> Callable[..., State]:
    """`advance` for one run on the full batch, with a gradient that is called from Python (on all cores)."""
    compiled = set()

    def advance_full(state: State, key: Key, data: Any, until: Any, *, halt: Any) -> State:
        if halt not in compiled:
            compiled.add(halt)
            _next(state, slope(state.params, data), optimizer=optimizer, halt=halt)
        for _ in range(int(state.step), int(until)):
            if halt is not None and state.halted:
                break
            state = _next(state, slope(state.params, data), optimizer=optimizer, halt=halt)
        return state

    return advance_full


_next = partial(jax.jit, static_argnames=("optimizer", "halt"))(one_step)


@partial(jax.jit, static_argnames=("objective", "observe", "evaluate_at", "over", "rows"))
def look(state, key, data, *, objective, observe, evaluate_at, over, rows):
    """`(loss, norm of the last step, aux, observed)` for all runs; observed is `observe(params, state)`."""

    def one(state: State, key: Any, data: Any) -> Any:
        at = point(state, evaluate_at)
        seen = None if observe is None else observe(at, state)
        loss, aux = _recorded(objective, at, state.model, data, key, rows)
        return loss, optax.tree.norm(optimizers.trained(state.update)), aux, seen

    return _over_runs(one, state, over)(state, key, data)


@partial(jax.jit, static_argnames=("objective", "measured", "metric", "evaluate_at", "over", "rows"))
def judge(state, key, data, *, objective, measured, metric, evaluate_at, over, rows):
    """What a rule measures, for all runs: the norm of the full gradient, the full loss, or a metric."""

    def one(state: State, key: Any, data: Any) -> Any:
        at = point(state, evaluate_at)
        if measured == "metric":
            return metric(at)
        if measured == "loss":
            return _recorded(objective, at, state.model, data, key, rows)[0]
        two = objective.of_two()
        if two is not None:
            slope = jax.grad(two) if rows is None else row_blocks.mean(jax.grad(two), rows)
            return optax.tree.norm(slope(at, data))
        slope = jax.grad(lambda at: _recorded(objective, at, state.model, data, key, None)[0])
        return optax.tree.norm(slope(at))

    return _over_runs(one, state, over)(state, key, data)


@partial(jax.jit, static_argnames=("evaluate_at", "over"))
def points(state, *, evaluate_at, over):
    """The parameters at which the loss is recorded, for all runs."""
    return _over_runs(lambda state, key, data: point(state, evaluate_at), state, over)(state, (), ())


@partial(jax.jit, static_argnames=("runs",))
def finite(params: Params, runs: int = 0) -> Any:
    """Whether all parameters are finite, of each run."""
    one = is_finite
    for _ in range(runs):
        one = jax.vmap(one)
    return one(params)


def is_finite(params: Params) -> Any:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()


def not_finite(state: State) -> Any:
    """The `halt` that dates a divergence."""
    return ~is_finite(state.params)


@partial(jax.jit, static_argnames=("objective", "rows"))
def value_and_gradient(params, model, key, data, *, objective, rows):
    """The full loss and its gradient, as the first full-batch step would evaluate them."""
    if objective.plain:
        both = jax.value_and_grad(objective.loss)
        return (both if rows is None else row_blocks.mean(both, rows))(params, data)
    of_batch = lambda params: objective.of_batch(params, model, data, key)[0]
    return jax.value_and_grad(of_batch)(params)


def point(state: State, evaluate_at: Callable[[State], Params] | None) -> Params:
    """The parameters at which the loss is recorded."""
    return optimizers.evaluated(state.params) if evaluate_at is None else evaluate_at(state)


def seen_state(state: State, whole: bool) -> State:
    """The part of the state that an evaluation needs: all of it, or parameters, last step and the loss's state."""
    return (
        state._replace(examples=None, batch_loss=None)
        if whole
        else State(None, state.params, None, state.update, None, model=state.model)
    )


def two_arguments(observe: Any) -> bool:
    """Whether `observe` is a function of parameters and state, not of parameters alone."""
    try:
        signature = inspect.signature(observe)
    except (TypeError, ValueError):
        return False
    for count in (1, 2):
        try:
            signature.bind(*[None] * count)
        except TypeError:
            continue
        return count == 2
    raise TypeError(
        f"observe must be a function observe(params), or observe(params, state), got {checks.shown(observe)}"
    )


def _recorded(objective: Objective, at: Params, model: Any, data: Any, key: Any, rows: int | None) -> tuple[Any, Any]:
    two = objective.of_two()
    if two is not None:
        return (two if rows is None else row_blocks.mean(two, rows))(at, data), None
    own = recorded_key(key) if objective.draws_when_recorded else None
    return objective.recorded(at, model, data, own)


def _over_runs(function: Callable[..., Any], state: State, over: tuple[int | None, ...]) -> Callable[..., Any]:
    axes = _axes(0 if np.ndim(state.step) else None)
    for of_key in reversed(over):
        function = jax.vmap(function, in_axes=(axes, of_key, None))
    return function
