"""The steps: `w_t = w_{t−1} − η_t g_t` (F2, F3, F5) and its relatives, over any optax transformation.

`advance` is the whole algorithm: a pure function of `(state, key, data, until)`, usable under `jit` and `vmap`.
Its bound `until` is traced, so one compiled program serves every chunk of a run. `trajectory` strings chunks
together inside one program; `descend` drives them from Python, where the clock is read, progress is shown,
stopping rules are judged, and a run can be interrupted and continued.

GD and SGD differ in one argument, the sampling. The full batch is never gathered.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxgrad import checks, means, parallel
from jaxgrad.checks import OneKey, Weights, checked
from jaxgrad.descent import optimizers, row_blocks, small_steps
from jaxgrad.descent.objective import Objective, loss_key
from jaxgrad.descent.optimizers import Asked, evaluated, trained
from jaxgrad.rows import Rows
from jaxgrad.types import Loss, Params, Sampling


def _finite_data(name: str, value: Any) -> Any:
    """Rows on disk, on many devices, or in arrays; every number finite unless JAX traces it."""
    return value if isinstance(value, Rows | parallel.Sharded) else checks.batch(name, value)


Transformation: TypeAlias = Annotated[optimizers.Optimizer, optimizers.transformation]
FiniteData: TypeAlias = Annotated[Any, _finite_data]

# The indices of up to 128 steps are drawn at once, in one vectorised draw. 128 steps hide its overhead even at b = 1,
# and a run that is recorded at every step does not draw too many in vain.
_STEPS_PER_DRAW = 128
_INDICES_PER_DRAW = 8192


class State(NamedTuple):
    """Exactly what the next step needs: save it, and the run continues with the same numbers."""

    step: Any
    """int32[]: steps taken so far."""
    params: Params
    optimizer: Any
    """The optax state (a schedule's counter, momentum, …)."""
    update: Params
    """`w_t − w_{t−1}`, the last step taken; zeros before the first."""
    halted: Any
    """bool[]: `halt` was true after step `step`; no further step is taken."""
    examples: Any = None
    """int64[]: gradients of single examples evaluated so far. `descend` counts them; `advance` leaves None."""
    model: Any = None
    """The state of the loss (`loss_state`): it passes from step to step, and no gradient changes it."""
    batch_loss: Any = None
    """float[steps]: the loss of each step's batch so far (`batch_losses`); NaN for steps that were not taken."""


# --- the algorithm ---------------------------------------------------------------------------------------------


@checked
def init(params: Weights, optimizer: Transformation) -> State:
    """The state before the first step; with `optax.lookahead` its parameters are a fast and a slow copy."""
    params = optimizers.paired(optimizer, params)
    return State(
        jnp.zeros((), jnp.int32),
        params,
        optimizers.first_state(optimizer, params),
        jax.tree.map(jnp.zeros_like, params),
        jnp.zeros((), bool),
    )


@checked
def advance(
    state: State,
    key: OneKey,
    data: FiniteData,
    until: Annotated[Any, checks.step],
    *,
    loss: Loss,
    optimizer: Transformation,
    sampling: Sampling,
    halt: Callable[[State], Any] | None = None,
    single: bool = False,
) -> State:
    """Take steps until `state.step == until`: `g_t = ∇L(w_{t−1}; batch t)`, `w_t = w_{t−1} + optimizer(g_t)`.

    `until` may be traced. Batch t holds the examples `sampling.indices(key, t − 1, n)`: t counts from 1, the
    sampling's steps from 0. The result does not depend on how a run is cut into calls.

    With `halt`, each run ends at the first step after which `halt(state)` is true.

    `single` says that this is one run, not under `vmap`. On a CPU, a loop of small steps is then compiled into one
    function for one core (`small_steps`), up to ten times as fast.
    """
    return take_steps(
        state,
        key,
        data,
        until,
        objective=Objective(loss),
        optimizer=optimizer,
        sampling=sampling,
        halt=halt,
        single=single,
    )


def take_steps(
    state: State,
    key: Any,
    data: Any,
    until: Any,
    *,
    objective: Objective,
    optimizer: optimizers.Optimizer,
    sampling: Sampling,
    halt: Callable[[State], Any] | None = None,
    single: bool = False,
) -> State:
    """`advance` for a loss of any form."""
    n = leading_axis(data)
    until = jnp.asarray(until, jnp.int32)
    state = state._replace(examples=None)
    what = optimizers.asked(optimizer, state.params, state.optimizer)
    evaluate = _evaluation(objective, state, data, sampling, what)

    def take(state: State, batch: Any) -> State:
        own = loss_key(key, state.step) if objective.random else None
        value, gradient, model, function = evaluate(trained(state.params), state.model, batch, own)
        extras = (what, value, function)
        new = one_step(state, gradient, optimizer=optimizer, halt=halt, extras=extras)
        if state.batch_loss is not None:
            new = new._replace(
                batch_loss=state.batch_loss.at[state.step].set(
                    value.astype(state.batch_loss.dtype), mode="promise_in_bounds"
                )
            )
        return new._replace(model=model)

    def to_go(state: State, bound: Any) -> Any:
        return state.step < bound if halt is None else (state.step < bound) & ~state.halted

    if sampling.batch_size is None:
        return jax.lax.while_loop(partial(to_go, bound=until), lambda state: take(state, data), state)

    # Indices are a pure function of (key, step), so drawing many steps at once gives the same as one by one.
    ahead = max(1, min(_STEPS_PER_DRAW, _INDICES_PER_DRAW // sampling.batch_size))
    batch = jax.eval_shape(sampling.batch, data, jax.ShapeDtypeStruct((sampling.batch_size,), jnp.int32))
    last = sampling.last_of_pass(n)
    small = single and last is None and objective.plain and small_steps.fits(take, state, batch)

    def take_drawn(state: State) -> State:
        first, bound = state.step, jnp.minimum(until, state.step + ahead)
        drawn = sampling.ahead(key, first, ahead, n)

        def steps(state: State, drawn: Any, bound: Any, data: Any) -> State:
            def one(state: State) -> State:
                indices = drawn[state.step - first]
                if last is None:
                    return take(state, sampling.batch(data, indices))
                # Two shapes of a batch, and so two programs of a step: the last batch is not padded.
                per_pass, left = last
                return jax.lax.cond(
                    state.step % per_pass == per_pass - 1,
                    lambda state: take(state, sampling.batch(data, indices[:left])),
                    lambda state: take(state, sampling.batch(data, indices)),
                    state,
                )

            first = state.step
            return jax.lax.while_loop(partial(to_go, bound=bound), one, state)

        return (partial(small_steps.call, steps) if small else steps)(state, drawn, bound, data)

    return jax.lax.while_loop(partial(to_go, bound=until), take_drawn, state)


def _evaluation(
    objective: Objective, state: State, data: Any, sampling: Sampling, what: Asked
) -> Callable[[Params, Any, Any, Any], tuple[Any, Params, Any, Any]]:
    """`(params, model, batch, key) -> (value, gradient, new model, loss of the batch)`; None for what is not needed."""
    differentiable = checks.saying("loss(params, batch) cannot be differentiated for these params and data")
    loss, valued = objective.loss, what.value or state.batch_loss is not None

    if not objective.plain:

        def any_form(params: Params, model: Any, batch: Any, key: Any) -> Any:
            of_batch = lambda params: objective.of_batch(params, model, batch, key)
            (value, (new, _)), gradient = differentiable(jax.value_and_grad(of_batch, has_aux=True))(params)
            new = model if model is None else jax.tree.map(optimizers.like, new, model)
            return value, gradient, new, lambda params: of_batch(params)[0]

        return any_form

    slope = differentiable(jax.value_and_grad(loss) if valued else jax.grad(loss))
    whole = loss
    if sampling.rows is not None:
        check_rows(sampling.rows, loss, trained(state.params), data)
        rows = min(sampling.rows, leading_axis(data))
        slope, whole = row_blocks.mean(slope, rows), row_blocks.mean(loss, rows)
    elif sampling.parts > 1:
        slope = row_blocks.in_parts(slope, sampling.parts)

    def plain(params: Params, model: Any, batch: Any, key: Any) -> Any:
        found = slope(params, batch)
        value, gradient = found if valued else (None, found)
        return value, gradient, model, lambda params: whole(params, batch)

    return plain


def one_step(
    state: State,
    gradient: Any,
    *,
    optimizer: optimizers.Optimizer,
    halt: Callable[[State], Any] | None,
    extras: tuple[Asked, Any, Any] = (Asked(), None, None),
) -> State:
    """`w_t = w_{t−1} + optimizer(g_t)`. `extras`: what the optimizer asks for, the loss, and the loss function."""
    what, value, function = extras
    made, optimizer_state = optimizers.update(optimizer, what, gradient, state.optimizer, state.params, value, function)
    params: Any = optax.apply_updates(state.params, made)
    update = jax.tree.map(optimizers.like, made, state.params)
    state = state._replace(step=state.step + 1, params=params, optimizer=optimizer_state, update=update, examples=None)
    if halt is None:
        return state
    halted = halt(state)
    if getattr(halt, "of_taken_steps", False):
        halted = halted & ~_skipped(update, gradient, optimizer_state)
    return state._replace(halted=halted)


def _skipped(update: Any, gradient: Any, optimizer_state: Any) -> Any:
    """Whether the optimizer skipped the step on purpose: no update for a nonzero gradient, or it still accumulates."""
    multi = lambda node: isinstance(node, optax.MultiStepsState)
    waits = [node.mini_step != 0 for node in jax.tree.leaves(optimizer_state, is_leaf=multi) if multi(node)]
    return reduce(jnp.logical_or, waits, _all_zero(update) & ~_all_zero(gradient))


def _all_zero(tree: Any) -> Any:
    # Sums, because `small_steps` supports them. A sum with NaN is not 0.
    return reduce(jnp.logical_and, [jnp.sum(jnp.abs(leaf)) == 0 for leaf in jax.tree.leaves(tree)])


@checked
def trajectory(
    loss: Loss,
    params: Weights,
    data: FiniteData,
    *,
    optimizer: Transformation,
    sampling: Sampling,
    key: OneKey,
    record: Any,
    observe: Callable[[Params], Any] | None = None,
) -> tuple[Params, Any]:
    """A whole run inside one program: final parameters, and the full loss `[k]` at the steps `record[k]`.

    With `observe`, what it returns for the parameters at those steps (leaves `[k, …]`) instead of the loss.
    Pure: `jax.vmap` it over keys, starts, or step sizes (`optimizer=optax.sgd(eta)` with a traced `eta`).
    `record` must not decrease.
    """

    def to(state: State, until: Any) -> tuple[State, Any]:
        state = advance(state, key, data, until, loss=loss, optimizer=optimizer, sampling=sampling)
        return state, loss(evaluated(state.params), data) if observe is None else observe(state.params)

    checks.loss(loss, params, data)
    state, seen = jax.lax.scan(to, init(params, optimizer), checks.steps("record", record))
    return state.params, seen


def check_rows(rows: int, loss: Loss, params: Params, data: Any) -> None:
    """Raise ValueError unless the loss is known to be a mean, so that blocks of `rows` rows give the same."""
    if found := means.doubt(loss, params, data, row_blocks.sizes(leading_axis(data), rows)):
        raise ValueError(
            f"full_batch(rows={rows}) needs a loss that is a mean over the examples; of this one it is not known: "
            f"{found}. {means.HOW}, or leave rows out"
        )


def leading_axis(data: Any) -> int:
    """How many rows there are."""
    return jax.tree.leaves(data)[0].shape[0]
