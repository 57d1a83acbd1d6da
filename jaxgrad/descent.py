"""The descent loop: `w_t = w_{t−1} − η_t g_t` (F2, F3, F5) and its relatives, over any optax transformation.

`advance` is the whole algorithm: a pure function of `(state, key, data, until)`, usable under `jit` and `vmap`.
Its bound `until` is traced, so one compiled program serves every chunk of a run. `trajectory` strings chunks
together inside one program; `descend` drives them from Python, where the clock is read, progress is shown,
stopping rules are judged, and a run can be interrupted and continued.

GD and SGD differ in one argument, the sampling. The full batch is never gathered.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from functools import lru_cache, partial, reduce
from typing import Annotated, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import blocks, checks, losses, means, onecore, parallel, stream, tiles
from jaxgrad import checkpoint as saved
from jaxgrad.checkpoint import Checkpoint
from jaxgrad.checks import Count, Natural, OneKey, Positive, Weights, checked
from jaxgrad.sampling import check_sizes
from jaxgrad.types import Key, Loss, Params, Sampling

Optimizer = optax.GradientTransformation


def _transformation(name: str, value: Any) -> Optimizer:
    """An optax transformation."""
    if isinstance(value, type) or not (
        callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    ):
        raise TypeError(f"{name} must be an optax transformation such as optax.sgd(0.1), got {checks.shown(value)}")
    return value


def _data(name: str, value: Any) -> Any:
    """Rows on disk, on many devices, or in arrays, whose numbers `_laid_out` looks at."""
    return value if isinstance(value, stream.Rows | parallel.Sharded) else checks.batch(name, value, finite=False)


def _finite_data(name: str, value: Any) -> Any:
    """The same, and every number finite where JAX does not trace it."""
    return value if isinstance(value, stream.Rows | parallel.Sharded) else checks.batch(name, value)


def _start(name: str, value: Any) -> Any:
    """Parameters, or the state of an earlier run."""
    return value if isinstance(value, State) else checks.params(name, value)


Transformation: TypeAlias = Annotated[Optimizer, _transformation]
Data: TypeAlias = Annotated[Any, _data]
FiniteData: TypeAlias = Annotated[Any, _finite_data]

# The indices of so many steps are drawn at once, in one vectorised draw: 128 steps hide its overhead even at b = 1,
# and a run that is recorded at every step does not draw too much in vain.
_STEPS_PER_DRAW = 128
_INDICES_PER_DRAW = 8192


class State(NamedTuple):
    """What the next step needs, and nothing else: save it, and the run continues with the same numbers."""

    step: Any
    """int32[]: steps taken so far."""
    params: Params
    optimizer: Any
    """The optax state (a schedule's counter, momentum, …)."""
    update: Params
    """`w_t − w_{t−1}`, the last step taken; zeros before the first."""
    halted: Any
    """bool[]: `halt` was true after step `step`, and no step is taken any more."""
    examples: Any = None
    """int64[]: gradients of single examples evaluated so far. `descend` counts them, `advance` does not: None."""


class StepSize(NamedTuple):
    """The optimizer's state where each run has a step size of its own: plain descent with it."""

    eta: Any
    """float[]."""


class Stop(NamedTuple):
    """When to end a run before its budget of steps: made by `small_step`, `small_gradient`, `no_improvement`."""

    reason: str
    below: float = 0.0
    every: int = 1
    metric: Callable[[Params], Any] | None = None
    patience: int = 0


class Trace(NamedTuple):
    """What a run did, at its k record points.

    With m step sizes, s keys or both, per-run entries have leading axes `(m,) (s,)`: entry `[i, j]` is the run with
    step size i and key j.

    A run that diverged has NaN losses from there on; one that stopped early keeps its last values.
    """

    steps: np.ndarray
    """int64[k]: updates made."""
    examples: np.ndarray
    """int64[k]: gradients of single examples evaluated: `steps · b`, and what a run that goes on evaluated before."""
    seconds: np.ndarray
    """float64[k]: wall-clock of the steps, all runs of the program together, without compiling and recording."""
    loss: np.ndarray
    """[(m,) (s,) k]: the full loss."""
    step_norm: np.ndarray
    """[(m,) (s,) k]: `‖w_t − w_{t−1}‖`, the size of the last step (F3)."""
    observed: Any
    """What `observe(params)` returned, each leaf `[(m,) (s,) k, …]`; None without `observe`."""
    params: Params
    """Final parameters, leaves `[(m,) (s,) …]`; numpy arrays where the runs went in several tiles."""
    state: State
    """Final state: give it to `descend` in place of `params` to go on."""
    status: Any
    """How the run ended; a tuple of s of these for s keys, of m of those for m step sizes:

    `finished`                       all steps were taken
    `stopped: <rule>`                a stopping rule ended it
    `diverged at step t`             its parameters ceased to be finite there
    `grew: ...`                      all steps were taken, but the loss ended over 1,000 times above its start, or not
                                     finite
    `not finite at the start: ...`   the loss or its gradient at the start is NaN or infinite; no step size would help
    """
    stopped_at: np.ndarray
    """int64[(m,) (s)]: the step at which the run ended, stopped or diverged."""
    compile_seconds: float
    """Time to trace and compile the step program; 0 to rounding when it was compiled before."""


# --- stopping rules (F3) ---------------------------------------------------------------------------------------


@checked
def small_step(below: Positive) -> Stop:
    """The lecture's rule (F3): stop at the first step with `‖w_t − w_{t−1}‖ < below`, judged every step.

    It measures `η‖g‖`, not the distance to a minimum: a smaller step size makes it fire sooner and further
    away, and for small batches it fires by luck. `small_gradient` is what it should have been.

    A step that the optimizer skipped is not judged: an update of exactly 0 against a gradient that is not 0, as of
    `optax.MultiSteps` between two updates, of a step size that warms up from 0, or of `optax.apply_if_finite`.
    """
    return Stop("small step", below=below)


@checked
def small_gradient(below: Positive, *, every: Count = 1) -> Stop:
    """Stop when the **full** gradient has `‖∇L(w_t)‖ < below`, judged each `every` steps, on the clock."""
    return Stop("small gradient", below=below, every=every)


@checked
def no_improvement(metric: Callable[[Params], Any], *, patience: Count, every: Count = 1) -> Stop:
    """Stop when `metric(params)` (lower is better, e.g. a validation loss) has not improved in `patience` checks.

    It is evaluated each `every` steps, on the clock.
    """
    return Stop("validation", every=every, metric=metric, patience=patience)


# --- the algorithm ---------------------------------------------------------------------------------------------


@checked
def init(params: Weights, optimizer: Transformation) -> State:
    """The state before the first step."""
    return State(
        jnp.zeros((), jnp.int32),
        params,
        optimizer.init(params),
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

    `until` may be traced. Which examples batch t holds is `sampling.indices(key, t − 1, n)`: t counts from 1,
    the sampling's steps from 0. The result does not depend on how a run is cut into calls.

    With `halt`, each run ends at the first step after which `halt(state)` is true.

    `single` says that this is one run, not under `vmap`: on a CPU a loop of small steps is then compiled into one
    function for one core (`onecore`), up to ten times as fast.
    """
    n = _leading_axis(data)
    until = jnp.asarray(until, jnp.int32)
    state = state._replace(examples=None)

    slope = checks.saying("loss(params, batch) cannot be differentiated for these params and data")(jax.grad(loss))
    if sampling.rows is not None:
        _check_rows(sampling.rows, loss, state.params, data)
        slope = blocks.mean(slope, min(sampling.rows, n))
    elif sampling.parts > 1:
        slope = blocks.in_parts(slope, sampling.parts)

    def take(state: State, batch: Any) -> State:
        return _step(state, slope(state.params, batch), optimizer=optimizer, halt=halt)

    def to_go(state: State, bound: Any) -> Any:
        return state.step < bound if halt is None else (state.step < bound) & ~state.halted

    if sampling.batch_size is None:
        return jax.lax.while_loop(partial(to_go, bound=until), lambda state: take(state, data), state)

    # The indices of many steps are drawn at once: a pure function of (key, step), they are the same one by one.
    ahead = max(1, min(_STEPS_PER_DRAW, _INDICES_PER_DRAW // sampling.batch_size))
    batch = jax.eval_shape(sampling.batch, data, jax.ShapeDtypeStruct((sampling.batch_size,), jnp.int32))
    small = single and onecore.fits(take, state, batch)

    def take_drawn(state: State) -> State:
        first, bound = state.step, jnp.minimum(until, state.step + ahead)
        drawn = sampling.ahead(key, first, ahead, n)

        def steps(state: State, drawn: Any, bound: Any, data: Any) -> State:
            def one(state: State) -> State:
                return take(state, sampling.batch(data, drawn[state.step - first]))

            first = state.step
            return jax.lax.while_loop(partial(to_go, bound=bound), one, state)

        return (partial(onecore.call, steps) if small else steps)(state, drawn, bound, data)

    return jax.lax.while_loop(partial(to_go, bound=until), take_drawn, state)


def _step(state: State, gradient: Any, *, optimizer: Optimizer, halt: Callable[[State], Any] | None) -> State:
    """`w_t = w_{t−1} + optimizer(g_t)`."""
    update, optimizer_state = optimizer.update(gradient, state.optimizer, state.params)
    params: Any = optax.apply_updates(state.params, update)
    state = State(state.step + 1, params, optimizer_state, update, state.halted)
    if halt is None:
        return state
    halted = halt(state)
    if isinstance(halt, _UpdateBelow):
        halted = halted & ~_skipped(update, gradient, optimizer_state)
    return state._replace(halted=halted)


def _skipped(update: Any, gradient: Any, optimizer_state: Any) -> Any:
    """Whether the optimizer took no step on purpose: it moved nothing against a gradient, or is still accumulating."""
    multi = lambda node: isinstance(node, optax.MultiStepsState)  # noqa: E731
    waits = [node.mini_step != 0 for node in jax.tree.leaves(optimizer_state, is_leaf=multi) if multi(node)]
    return reduce(jnp.logical_or, waits, _all_zero(update) & ~_all_zero(gradient))


def _all_zero(tree: Any) -> Any:
    # By sums, which `onecore` knows. One with NaN in it is not 0.
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
        return state, loss(state.params, data) if observe is None else observe(state.params)

    check_loss(loss, params, data)
    state, seen = jax.lax.scan(to, init(params, optimizer), checks.steps("record", record))
    return state.params, seen


# --- the driver ------------------------------------------------------------------------------------------------


@checked
def descend(
    loss: Loss,
    params: Annotated[Params, _start],
    data: Data,
    *,
    optimizer: Optimizer | float | Sequence[float] | np.ndarray | jax.Array,
    sampling: Sampling,
    steps: Natural,
    key: Annotated[Key, partial(checks.key, many=True)],
    record: int | Sequence[int] | np.ndarray = 50,
    stop: Stop | None = None,
    observe: Callable[[Params], Any] | None = None,
    params_axis: Natural | None = None,
    progress: bool | Callable[[int, int], None] = False,
    mesh: jax.sharding.Mesh | None = None,
    checkpoint: Checkpoint | None = None,
    memory: Positive = tiles.MEMORY,
) -> Trace:
    """Run `steps` steps of descent on a loss and say what happened (F3, F5).

    Args:
      loss: `loss(params, batch) -> scalar`. It may be any function of the batch. One that is known to be a mean over
        the examples (made by `losses.mean_loss` or `losses.mean_of`, or proved by `jaxgrad.means`) may be evaluated
        in blocks; any other is evaluated on all rows at once.
      params: the start, a pytree of floating-point arrays; or the `State` of an earlier trace, to go on from.
      data: all n examples, a pytree whose leaves share their leading axis; or rows that lie on many devices
        (`jaxgrad.parallel.shard`) or on disk (`jaxgrad.stream.open_rows`).
      optimizer: an optax transformation (schedules give `η_t`), or a number: plain descent with that step size; or m
        numbers: then a run with each of them, with every key, goes in one compiled program.
      sampling: `full_batch()` is GD; `with_replacement(b)`, `distinct(b)`, `reshuffled(b)` are SGD.
      steps: the budget, counted from the very first step also when a run goes on.
      key: a JAX key for the order of examples; or an array of s keys: then s runs go in one compiled program.
      record: how many evenly spaced record points (0 and `steps` are two of them), or the steps themselves;
        see `log_spaced`. The full loss is evaluated there, off the clock.
      stop: a stopping rule besides the budget.
      observe: `observe(params) -> pytree` of whatever else to record, e.g. accuracy; off the clock.
      params_axis: 0 if `params` has a leading axis of s starts, one per key; all step sizes share them.
      progress: True shows a line on stderr; or a function of `(step, steps)`.
      mesh: spread the rows over its devices (`jaxgrad.parallel.mesh()`). The step is the same.
      checkpoint: save the run as it goes, and go on from what was saved. SIGTERM and Ctrl-C then end it at the next
        record point or checkpoint, the same on every process, with `parallel.Preempted` (exit status 75).
      memory: GiB that the program may take beside the data and what it returns. Runs that need more together go in
        equal tiles, one after the other, through the same program (`jaxgrad.tiles`).

    Raises:
      ValueError, TypeError: for anything that cannot run (shapes, NaN in the data, `b > n`, a loss that is not
        a scalar, integer parameters, a step size that is not finite and positive, labels that the loss has no meaning
        for), before anything compiles. Rows on disk, and rows that do not divide evenly over devices, need a loss
        that is known to be a mean.

    A run that diverges is a result: its status says at which step its parameters ceased to be finite, and the
    runs beside it are untouched. A run among others equals that run alone to rounding.
    """
    optimizer, etas = _optimizer(optimizer)
    key, seeds = _keys(key)
    shape = tuple(len(each) for each in (etas, key if seeds else None) if each is not None)
    if mesh is not None and not isinstance(data, stream.Rows | parallel.Sharded):
        data = parallel.shard(data, mesh)
    own_loss, own_sampling, own_data = loss, sampling, data
    loss, data, sampling, n, mesh, disk, told = _laid_out(loss, data, sampling, mesh, bool(shape))
    here = disk is None and (mesh is None or mesh.size == 1)
    if stop is not None:
        _check_stop(stop)
    if checkpoint is not None:
        checkpoint = saved.plain(checkpoint)
    state = _continued(params, shape, etas) if isinstance(params, State) else None
    start = state.params if state else jax.tree.map(jnp.asarray, params)
    _check_start(start, seeds, None if state else params_axis)
    ahead = len(shape) if state else 0 if params_axis is None else 1
    one_start = jax.tree.map(lambda leaf: leaf[(0,) * ahead], start)
    check_loss(loss, one_start, data)
    if disk is not None:
        if sampling.batch_size is None or disk.full is None or (stop and stop.reason == "small gradient"):
            stream.check_mean(own_loss, one_start, disk)
        losses.check_labels(own_loss, one_start, disk.as_batch(stream.example(disk, 1024)))
    elif isinstance(own_data, parallel.Sharded):
        losses.check_labels(own_loss, one_start, own_data.batch, own_data.row)
    else:
        losses.check_labels(own_loss, one_start, data)
    rows = _rows(sampling, loss, one_start, data) if here else None
    if sampling.batch_size is None:
        alone = here and rows is None and not shape
        sampling = sampling._replace(rows=rows, parts=blocks.parts_for(loss, one_start, data) if alone else 1)
    first = int(state.step) if state else 0
    b = n if sampling.batch_size is None else sampling.batch_size
    before_first = _examples(params) if isinstance(params, State) else 0
    recorded = _record_points(record, first, steps)
    judged = set(range(first, steps, stop.every)) if stop and stop.reason != "small step" else set()
    marks = sorted(set(recorded.tolist()) | judged | {steps})
    whose: dict[str, str] = {}
    if checkpoint is not None:
        parallel.together(lambda: saved.check(checkpoint) if parallel.is_main() else None)
        marks = sorted({*marks, *range(first, steps, checkpoint.every)})
        whose = saved.fingerprint(
            own_loss if disk is None else loss, one_start, data, n, optimizer, own_sampling, key, told()
        )
        if etas is not None:
            whose["optimizer"] = parallel.digest((whose["optimizer"], etas))[:16]

    halt = _UpdateBelow(stop.below) if stop and stop.reason == "small step" else None
    if mesh is not None:
        settings = (steps, marks, sampling.name, sampling.batch_size, memory)
        parallel.agree(start=state or start, key=key, settings=settings, optimizer=() if etas is None else etas)
        start, key = parallel.replicate((start, key), mesh)
    if state is None:
        state = _spread(_init(start, optimizer=optimizer, many=ahead == 1), shape, ahead)
    if etas is not None:
        state = state._replace(optimizer=StepSize(np.broadcast_to(etas.reshape(-1, *[1] * (len(shape) - 1)), shape)))
    if mesh is not None:
        state = parallel.replicate(state, mesh)
    first_params, first_update = state.params, state.update
    single = not shape and (here or disk is not None)
    over = (None,) * (etas is not None) + (0,) * (seeds is not None)
    runs = len(shape)
    go = partial(_advance, loss=_hashable(loss), optimizer=optimizer, sampling=sampling, over=over, single=single)
    if single and rows is not None and own_sampling.batch_size is None and own_sampling.rows is None:
        slope = blocks.on_all_cores(_hashable(loss), one_start, data)
        go = go if slope is None else _advance_full(slope, optimizer)
    look = partial(_look, loss=_hashable(loss), observe=observe and _hashable(observe), runs=runs, rows=rows)
    judge = partial(_judge, loss=_hashable(loss), metric=stop.metric if stop else None, runs=runs, rows=rows)
    sound = partial(_finite, runs=runs)
    reader = stream.Reader(disk, sampling, key, steps) if disk is not None and sampling.batch_size else None
    if disk is not None:
        streamed = stream.of_rows(_hashable(own_loss), disk)
        go, look, judge = stream.programs(go, look, judge, disk, sampling, streamed, reader)
    elif shape:
        every = tuple(range(runs))
        of_key = every[-1:] if seeds else ()
        go = tiles.in_tiles(go, shape, (every, of_key, (), ()), memory)
        look = tiles.in_tiles(look, shape, (every, every, ()), memory)
        judge = tiles.in_tiles(judge, shape, (every, ()), memory)
        sound = tiles.in_tiles(sound, shape, (every,), memory)

    began = time.perf_counter()
    try:
        jax.block_until_ready(go(state, key, data, np.int32(first), halt=halt))
    except jax.errors.JaxRuntimeError as error:
        if not single or "UNIMPLEMENTED" not in str(error):
            raise
        # `onecore` took the step for simpler than the compiler does.
        go = partial(go, single=False)
        jax.block_until_ready(go(state, key, data, np.int32(first), halt=halt))
    compile_seconds = time.perf_counter() - began

    active = np.ones(shape, bool)
    reason = np.full(shape, "finished", dtype=object)
    ended = np.full(shape, steps, dtype=np.int64)
    best, waited = np.full(shape, np.inf), np.zeros(shape, int)
    seconds, seen = 0.0, []
    show = _progress(progress if callable(progress) or parallel.is_main() else False)

    def end(which: Any, why: Any, at: Any) -> None:
        reason[which], ended[which] = np.broadcast_to(why, shape)[which], np.broadcast_to(at, shape)[which]
        active[which] = False

    def at_start(params: Params) -> str:
        bad = [
            _name(path) for path, leaf in jax.tree_util.tree_leaves_with_path(params) if not jnp.isfinite(leaf).all()
        ]
        if bad:
            return f"not finite at the start: the parameters have NaN or infinite entries in {', '.join(bad)}"
        if disk is not None:
            streamed = stream.of_rows(_hashable(own_loss), disk)
            return _at_start(stream.value(streamed, params, disk), stream.gradient(streamed, params, disk))
        found = _at_start(*_value_and_gradient(params, data, loss=_hashable(loss), rows=rows))
        return found and found + (_first_bad_example(loss, params, data) if here else "")

    if checkpoint is not None:
        like = (state, (0, 0, 0, 0, observe and jax.eval_shape(observe, one_start)), 0, 0, 0, 0, 0, 0)
        if (found := saved.resumed(checkpoint, like, whose)) is not None:
            state, columns, active, reason, ended, best, waited, seconds = found
            state = parallel.replicate(state, mesh) if mesh is not None else jax.tree.map(jnp.asarray, state)
            seen = _points(columns)
            marks = [mark for mark in marks if mark > int(found[0].step) and active.any()]
            reason = reason.astype(object)

    def save() -> None:
        columns = jax.tree.map(lambda *leaves: np.stack(leaves), *seen)
        told = reason.astype("U") if reason.ndim else np.array(str(reason))
        assert checkpoint is not None
        saved.save(checkpoint, (state, columns, active, told, ended, best, waited, seconds), whose)

    asking = parallel.Interruption() if checkpoint is not None else nullcontext()
    with saved.held(checkpoint), asking as asked, nullcontext() if reader is None else closing(reader):
        for mark in marks:
            before, began = state, time.perf_counter()
            state = jax.block_until_ready(go(state, key, data, np.int32(mark), halt=halt))
            seconds += time.perf_counter() - began
            if not active.all():
                state = _keep(active, state, before)
            finite = np.asarray(sound(state.params))
            if (lost := active & ~finite).any():
                # Nothing is checked inside the loop; the chunk is run again, watching, to find the step.
                watched = np.asarray(go(before, key, data, np.int32(mark), halt=_not_finite).step)
                end(lost, "diverged", watched)
                # One start is looked at however late it was lost: a minibatch may meet a bad row late.
                if (doubted := lost & ((ahead == 0) | (watched <= first + 1))).any():
                    words = _of_starts(at_start, first_params, doubted, one=ahead == 0)
                    end(doubted & (words != ""), words, first)
            if halt is not None and (small := active & np.asarray(state.halted)).any():
                end(small, "stopped: small step", np.asarray(state.step))
            if stop and mark in judged:
                began = time.perf_counter()
                value = np.asarray(judge(state.params, data))
                seconds += time.perf_counter() - began
                if stop.reason == "small gradient":
                    met = value < stop.below
                else:
                    better = value < best
                    best, waited = np.where(better, value, best), np.where(better, 0, waited + 1)
                    met = waited >= stop.patience
                if (met := active & met).any():
                    end(met, f"stopped: {stop.reason}", np.asarray(mark))
            over = not active.any()
            if mark in recorded or over:
                loss_now, norm, observed = look(state.params, state.update, data)
                gone = _is_lost(reason)
                at = int(ended.max()) if over else mark
                seen.append((at, seconds, np.where(gone, np.nan, loss_now), np.asarray(norm), observed))
            show(mark, steps)
            if checkpoint is not None and (over or mark == steps or mark % checkpoint.every == 0):
                save()
            if over:
                break
            if checkpoint is not None and asked is not None and asked() and mark < steps:
                save()
                raise parallel.Preempted(mark, checkpoint.path)

    at, clock, recorded_losses, norms, observed = zip(*seen, strict=True)
    loss_at = np.stack(recorded_losses, runs)
    # Of rows on disk, the loss at the start would take another pass.
    seen_at_start = at[0] == first or disk is not None
    loss_first = loss_at[..., 0] if seen_at_start else np.asarray(look(first_params, first_update, data)[0])
    if (never := (reason == "finished") & ~np.isfinite(loss_first)).any():
        reason = np.where(never, _of_starts(at_start, first_params, never, one=ahead == 0), reason)
    grown = _growth(loss_first, loss_at[..., -1])
    reason = np.where((reason == "finished") & (grown != ""), grown, reason)
    status = [f"diverged at step {t}" if why == "diverged" else str(why) for why, t in _pairs(reason, ended)]
    state = state._replace(examples=before_first + (np.asarray(state.step, np.int64) - first) * b)
    return Trace(
        steps=np.asarray(at, np.int64),
        examples=before_first + (np.asarray(at, np.int64) - first) * b,
        seconds=np.asarray(clock),
        loss=loss_at,
        step_norm=np.stack(norms, runs),
        observed=None if observe is None else jax.tree.map(lambda *leaves: np.stack(leaves, runs), *observed),
        params=state.params,
        state=state,
        status=_tuples(np.array(status, object).reshape(shape).tolist()),
        stopped_at=ended,
        compile_seconds=compile_seconds,
    )


def _examples(state: State) -> int:
    """How many gradients of examples a state stands for."""
    if state.examples is None and int(np.max(state.step)) > 0:
        raise ValueError(
            "this state comes from `advance`, which does not count the gradients of examples that it takes: give "
            "state._replace(examples=...) with their number so far (steps times batch size)"
        )
    return 0 if state.examples is None else int(np.max(state.examples))


GREW, LEAST = 1000, 1e-6
"""A run whose loss ends `GREW` times as far from 0 as it started, or as `LEAST`, has not merely finished."""


def _growth(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """Of each run, what is to be said of its last loss; empty where nothing is."""

    def words(first: float, last: float) -> str:
        if not np.isfinite(last):
            return f"grew: the loss ended at {last}"
        if last > GREW * max(abs(first), LEAST):
            return f"grew: the loss went from {first:.3g} to {last:.3g}"
        return ""

    return np.vectorize(words, otypes=[object])(first, last)


def _is_lost(reason: np.ndarray) -> np.ndarray:
    """Which runs have parameters that are not finite."""
    return np.vectorize(lambda why: str(why).startswith(("diverged", "not finite")), otypes=[bool])(reason)


@partial(jax.jit, static_argnames=("loss", "rows"))
def _value_and_gradient(params, data, *, loss, rows):
    both = jax.value_and_grad(loss)
    return (both if rows is None else blocks.mean(both, rows))(params, data)


def _at_start(value: Any, gradient: Params) -> str:
    """What is not finite of loss and gradient at the start; empty where all is."""
    if not np.isfinite(value):
        return f"not finite at the start: the loss is {float(value)}"
    where = _not_finite_in(gradient)
    words = f"not finite at the start: the loss is {float(value):.3g}, but its gradient is not finite in {where}"
    return words if where else ""


def _not_finite_in(tree: Any) -> str:
    """The names of the leaves with an entry that is not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ", ".join(_name(path) for path, leaf in leaves if not jnp.isfinite(leaf).all())


def _first_bad_example(loss: Loss, params: Params, data: Any) -> str:
    """The first example whose loss or gradient is not finite, if the loss is a mean over them and not all are bad."""
    try:
        of_one = means.of_one(loss, params, data, [_leading_axis(data)], "")
    except ValueError:
        return ""

    def good(example: Any) -> Any:
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(both(params, example))]).all()

    both = jax.value_and_grad(of_one)
    fine = np.asarray(jax.jit(lambda data: jax.lax.map(good, data, batch_size=256))(data))
    return "" if not fine.any() or fine.all() else f"; the first such example is row {np.argmin(fine):,} (from 0)"


def _of_starts(words: Callable[[Params], str], params: Params, which: Any, one: bool) -> np.ndarray:
    """`words(start)` of each run in `which`; of `one` run for all if they have one start."""
    found = np.full(np.shape(which), "", dtype=object)
    for place in np.argwhere(which):
        index = tuple(place)
        found[index] = words(jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], params))
        if one:
            found[which] = found[index]
            break
    return found


class _LaidOut(NamedTuple):
    """What the step is given, wherever the rows are."""

    loss: Loss
    data: Any
    sampling: Sampling
    n: int
    mesh: jax.sharding.Mesh | None
    rows: stream.Rows | None
    told: Callable[[], str]
    """What tells the rows from others."""


def _laid_out(loss: Any, data: Any, sampling: Sampling, mesh: Any, many: bool) -> _LaidOut:
    if isinstance(data, stream.Rows):
        if many or mesh is not None:
            raise ValueError("rows on disk serve one run on one device: give one key, one step size and no mesh")
        check_sizes(sampling, data.n)
        first = stream.example(data)
        return _LaidOut(stream.of_rows(loss, data), first, sampling, data.n, None, data, partial(stream.tell, data))
    if isinstance(data, parallel.Sharded):
        check_sizes(sampling, data.n)
        step_loss, batch, step_sampling = parallel.on(data, loss, sampling)
        told = partial(saved.rows_hash, data.batch, data.counts)
        return _LaidOut(step_loss, batch, step_sampling, data.n, data.mesh, None, told)
    # Here, since `import jaxgrad` needs none of what the package of data sets brings along.
    from jaxgrad.data.checks import check_batch

    check_batch(data)
    data = jax.tree.map(jnp.asarray, data)
    n = _leading_axis(data)
    check_sizes(sampling, n)
    return _LaidOut(loss, data, sampling, n, parallel.mesh_of(data), None, partial(saved.rows_hash, data))


def _points(columns: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """The record points of a saved run, one by one."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], columns) for i in range(len(columns[0]))]


@checked
def log_spaced(steps: Count, points: Annotated[int, partial(checks.count, at_least=2)]) -> np.ndarray:
    """About `points` distinct record points from 0 and 1 to `steps`, evenly spaced in log t: `int64[k]`."""
    return np.unique(np.r_[0, np.round(np.geomspace(1, steps, max(2, points - 1)))].astype(np.int64))


@partial(jax.jit, static_argnames=("optimizer", "many"))
def _init(params, *, optimizer, many):
    if not many:
        return init(params, optimizer)
    state = jax.vmap(partial(init, optimizer=optimizer))(params)
    return state._replace(step=state.step[0])


def _spread(state: State, shape: tuple[int, ...], ahead: int) -> State:
    """The first state of all runs, on the host: leaves `[*shape, …]`, of leaves with `ahead` axes of runs."""
    if not shape:
        return state

    def copies(leaf: Any) -> np.ndarray:
        return np.broadcast_to(np.asarray(leaf), (*shape, *leaf.shape[ahead:]))

    return jax.tree.map(copies, state._replace(step=()))._replace(step=state.step)


@partial(jax.jit, static_argnames=("loss", "optimizer", "sampling", "halt", "over", "single"))
def _advance(state, key, data, until, *, loss, optimizer, sampling, halt, over, single):
    one = partial(advance, loss=loss, optimizer=optimizer, sampling=sampling, halt=halt)
    if not over:
        return one(state, key, data, until, single=single)
    # Without `halt` one step counter serves all runs: the loop needs no masks, and the runs of a key share its batches.
    axes = State(None if halt is None else 0, 0, 0, 0, 0)
    if halt is not None:
        state = state._replace(step=jnp.broadcast_to(state.step, state.halted.shape))
    for of_key in reversed(over):
        one = jax.vmap(one, in_axes=(axes, of_key, None, None), out_axes=axes)
    return one(state, key, data, until)


def _over_runs(function: Callable[..., Any], runs: int) -> Callable[..., Any]:
    for _ in range(runs):
        function = jax.vmap(function)
    return function


def _advance_full(slope: Callable[[Params, Any], Any], optimizer: Optimizer) -> Callable[..., State]:
    """`advance` for the full batch with a gradient that cannot be part of a program: `blocks.on_all_cores`."""
    compiled = set()

    def go(state: State, key: Key, data: Any, until: Any, *, halt: Any) -> State:
        if halt not in compiled:
            compiled.add(halt)
            _next(state, slope(state.params, data), optimizer=optimizer, halt=halt)
        for _ in range(int(state.step), int(until)):
            if halt is not None and state.halted:
                break
            state = _next(state, slope(state.params, data), optimizer=optimizer, halt=halt)
        return state

    return go


_next = partial(jax.jit, static_argnames=("optimizer", "halt"))(_step)


def _rows(sampling: Sampling, loss: Loss, params: Params, data: Any) -> int | None:
    """Rows of a block in which to evaluate what is a mean over all examples; None for all at once."""
    if sampling.rows is None:
        return blocks.rows_for(loss, params, data)
    _check_rows(sampling.rows, loss, params, data)
    return sampling.rows


def _check_rows(rows: int, loss: Loss, params: Params, data: Any) -> None:
    """Raise ValueError unless the loss is known to be a mean, so that blocks of `rows` rows give the same."""
    if found := means.doubt(loss, params, data, blocks.sizes(_leading_axis(data), rows)):
        raise ValueError(
            f"full_batch(rows={rows}) needs a loss that is a mean over the examples; of this one it is not known: "
            f"{found}. {means.HOW}, or leave rows out"
        )


@partial(jax.jit, static_argnames=("loss", "observe", "runs", "rows"))
def _look(params, update, data, *, loss, observe, runs, rows):
    loss = loss if rows is None else blocks.mean(loss, rows)

    def one(params, update):
        seen = None if observe is None else observe(params)
        return loss(params, data), optax.tree.norm(update), seen

    return _over_runs(one, runs)(params, update)


@partial(jax.jit, static_argnames=("loss", "metric", "runs", "rows"))
def _judge(params, data, *, loss, metric, runs, rows):
    slope = jax.grad(loss) if rows is None else blocks.mean(jax.grad(loss), rows)

    def one(params):
        return optax.tree.norm(slope(params, data)) if metric is None else metric(params)

    return _over_runs(one, runs)(params)


class _UpdateBelow(NamedTuple):
    """`‖w_t − w_{t−1}‖ < below`: the rule of `small_step`."""

    below: float

    def __call__(self, state: State) -> Any:
        return optax.tree.norm(state.update) < self.below


def _not_finite(state: State) -> Any:
    return ~_finite(state.params)


@partial(jax.jit, static_argnames=("runs",))
def _finite(params: Params, runs: int = 0) -> Any:
    one = lambda tree: jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()  # noqa: E731
    return _over_runs(one, runs)(params)


def _keep(active: Any, new: State, old: State) -> State:
    """`new` where active, `old` where a run has ended."""

    def pick(new, old):
        mask = active.reshape(active.shape + (1,) * (jnp.ndim(new) - active.ndim))
        # What came in tiles lies on the host, and stays there.
        return (np if isinstance(new, np.ndarray) else jnp).where(mask, new, old)

    picked = jax.tree.map(pick, new._replace(step=0), old._replace(step=0))
    step = pick(new.step, old.step) if jnp.ndim(new.step) == active.ndim else new.step
    return picked._replace(step=step)


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list) else nested


def _pairs(reason: np.ndarray, ended: np.ndarray) -> list[tuple[str, int]]:
    return list(zip(reason.reshape(-1).tolist(), ended.reshape(-1).tolist(), strict=True))


def _record_points(record: int | Sequence[int] | np.ndarray, first: int, steps: int) -> np.ndarray:
    if steps < first:
        raise ValueError(f"the run has already taken {first} steps: steps counts from the first one, got {steps}")
    if not isinstance(record, Sequence) and np.ndim(record) == 0:
        points = checks.count("record", record, 2)
        return np.unique(np.round(np.linspace(first, steps, points)).astype(np.int64))
    points = np.unique(checks.whole_numbers("record", record))
    if points[0] < first or points[-1] > steps:
        raise ValueError(f"record must be whole numbers of steps from {first} to {steps}, got {checks.shown(record)}")
    return points


def _progress(progress: bool | Callable[[int, int], None]) -> Callable[[int, int], None]:
    if callable(progress) and not isinstance(progress, type):
        return checks.function("progress", progress, 2)
    if not isinstance(progress, bool | np.bool_):
        raise TypeError(f"progress must be True, False or a function of (step, steps), got {checks.shown(progress)}")
    if not progress:
        return lambda step, steps: None

    def line(step: int, steps: int) -> None:
        end = "\n" if step == steps else ""
        print(f"\rstep {step:,} of {steps:,}", end=end, file=sys.stderr, flush=True)

    return line


_sgd = lru_cache(optax.sgd)  # the same step size is the same transformation, so nothing compiles twice


def _own_step(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
    del params
    return jax.tree.map(lambda gradient: -state.eta.astype(gradient.dtype) * gradient, updates), state


# Plain descent with a step size that the state holds: one program for all, whatever they are.
_own_sgd = optax.GradientTransformation(lambda params: StepSize(jnp.zeros(())), _own_step)


def _optimizer(optimizer: Any) -> tuple[Optimizer, np.ndarray | None]:
    """The optimizer, and the step sizes `[m]` of m runs, None where one optimizer serves all."""
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return optimizer, None
    try:
        given = checks.array("optimizer", optimizer, finite=False)
    except (TypeError, ValueError):
        raise TypeError(
            "optimizer must be an optax transformation such as optax.sgd(0.1), a step size, or a one-dimensional array "
            f"of step sizes; got {checks.shown(optimizer)}"
        ) from None
    if given.ndim == 0:
        return _sgd(checks.positive("the step size (optimizer)", given)), None
    if given.ndim > 1 or given.size == 0:
        raise ValueError(f"step sizes must be a one-dimensional array of at least one, got shape {given.shape}")
    etas = given.astype(jax.dtypes.canonicalize_dtype(float))
    if (bad := ~((etas > 0) & np.isfinite(etas))).any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"the step size must be finite and positive: number {first} of {len(etas)} (counted from 0) is "
            f"{given[first]} in {etas.dtype}"
        )
    return _own_sgd, etas


def _continued(state: State, shape: tuple[int, ...], etas: np.ndarray | None) -> State:
    """A saved state, ready to go on: one step counter, not halted."""
    if np.shape(state.halted) != shape:
        raise ValueError(
            f"this state is of {_runs(np.shape(state.halted))}, but optimizer and key ask for {_runs(shape)}: give the "
            "step sizes and keys of the run that it comes from"
        )
    if isinstance(state.optimizer, StepSize) != (etas is not None):
        given, wanted = ("one optimizer", "an array of step sizes")[:: 1 if etas is None else -1]
        raise ValueError(f"this state comes from a run with {wanted}; it cannot go on with {given}")
    step = np.unique(np.asarray(state.step))
    if step.size > 1:
        raise ValueError(
            f"the runs of this state ended at different steps ({step.min()} to {step.max()}), so they cannot go on "
            "together: continue each one by itself"
        )
    return state._replace(step=jnp.int32(step[0]), halted=jnp.zeros_like(state.halted), examples=None)


def _runs(shape: tuple[int, ...]) -> str:
    return f"runs {list(shape)}" if shape else "a single run"


def _keys(key: Any) -> tuple[Key, int | None]:
    """The key, and how many runs it asks for (None: one run without a leading axis)."""
    return key, (None if key.ndim == 0 else key.shape[0])


def check_loss(loss: Any, params: Params, data: Any) -> None:
    """Raise TypeError or ValueError unless `loss(params, data)` traces to one floating-point number."""
    checks.loss(loss, params, data)


def _check_stop(stop: Stop) -> None:
    """Raise TypeError or ValueError for a rule that none of the three functions makes."""
    if checks.one_of("stop.reason", stop.reason, ("small step", "small gradient", "validation")) == "validation":
        no_improvement(stop.metric, patience=stop.patience, every=stop.every)  # type: ignore[arg-type]
    else:
        small_gradient(stop.below, every=stop.every)


def _check_start(params: Params, seeds: int | None, axis: int | None) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params hold no arrays: there is nothing to learn")
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point: {_name(path)} is {leaf.dtype}; convert it, "
                "e.g. jnp.asarray(w, jnp.float32)"
            )
        if axis is not None and (axis != 0 or seeds is None or leaf.shape[:1] != (seeds,)):
            raise ValueError(
                f"params_axis={axis} needs an array of keys and a leading axis of as many starts: {_name(path)} "
                f"has shape {leaf.shape}, keys: {seeds}"
            )


def _leading_axis(data: Any) -> int:
    return jax.tree.leaves(data)[0].shape[0]


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path).lstrip(".") or "the array"


def _hashable(function: Any) -> Any:
    """The function itself if it can key a cache of compiled programs, else a stand-in that can."""
    try:
        hash(function)
    except TypeError:
        return lambda *args: function(*args)
    return function
