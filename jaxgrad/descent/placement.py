"""Where the rows are, as a value: seven functions that the loop calls without knowing.

    in_memory     arrays of this process, evaluated in blocks where that pays
    on_mesh       rows spread over devices (`parallel.Sharded`): the same examples, the same numbers to rounding
    on_disk       rows in files (`stream.Rows`): the bits of rows in memory, and full passes in parts

All of them promise the same; one suite of laws runs over them (`tests/test_placements.py`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import blocks, losses, means, parallel, stream, tiles
from jaxgrad import checkpoint as saved
from jaxgrad.descent import optimizers, programs
from jaxgrad.descent.objective import Objective, loss_key
from jaxgrad.descent.runs import Runs
from jaxgrad.descent.step import State, check_rows, leading_axis
from jaxgrad.descent.stopping import Judged
from jaxgrad.sampling import check_sizes
from jaxgrad.types import Key, Loss, Params, Sampling


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


def place(job: Job, data: Any, mesh: Any) -> Placement:
    """The placement of these data; raises ValueError or TypeError where the job cannot be done there."""
    if mesh is not None and not isinstance(data, stream.Rows | parallel.Sharded):
        data = parallel.shard(data, mesh)
    if isinstance(data, stream.Rows):
        if job.runs.shape or mesh is not None:
            raise ValueError("rows on disk serve one run on one device: give one key, one step size and no mesh")
        return on_disk(job, data)
    return on_mesh(job, data) if isinstance(data, parallel.Sharded) else in_memory(job, data)


# --- rows in arrays ---------------------------------------------------------------------------------------------


def in_memory(job: Job, data: Any) -> Placement:
    """Rows in arrays of this process; which may lie on several devices already."""
    # Here, since `import jaxgrad` needs none of what the package of data sets brings along.
    from jaxgrad.data.checks import check_batch

    check_batch(data)
    data = jax.tree.map(jnp.asarray, data)
    check_sizes(job.sampling, n := leading_axis(data))
    check(job, job.objective, data)
    losses.check_labels(job.objective.loss, job.params, data)
    mesh = parallel.mesh_of(data)
    identity = (job.objective, data, partial(saved.rows_hash, data))
    return _of_arrays(job, job.objective, job.sampling, data, n, mesh, identity)


def on_mesh(job: Job, sharded: parallel.Sharded) -> Placement:
    """Rows spread over the devices of a mesh, filled up where they do not divide."""
    check_sizes(job.sampling, sharded.n)
    objective, data, sampling = _over_devices(job, sharded)
    check(job, objective, data)
    losses.check_labels(job.objective.loss, job.params, sharded.batch, sharded.row)
    identity = (job.objective, data, partial(saved.rows_hash, sharded.batch, sharded.counts))
    return _of_arrays(job, objective, sampling, data, sharded.n, sharded.mesh, identity)


def check(job: Job, objective: Objective, data: Any) -> None:
    """Raise TypeError or ValueError unless loss and `evaluate` have the form that is promised."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    objective.check(optimizers.trained(job.params), job.model, data, key)


def _over_devices(job: Job, sharded: parallel.Sharded) -> tuple[Objective, Any, Sampling]:
    own, sampling = job.objective, job.sampling
    if sharded.weight is None:
        _, data, sampling = parallel.on(sharded, own.loss, sampling)
        return own, data, sampling
    if own.plain:
        loss, data, sampling = parallel.on(sharded, own.loss, sampling)
        own = own._replace(loss=loss)
    else:
        if parallel.shares_of(sampling) is not None:
            raise ValueError(
                "shares of different sizes are weighted, example by example, which a loss with random, loss_state or "
                "has_aux is not known to allow: give rows that divide evenly over the devices, or distinct(b)"
            )
        _, data, sampling = parallel.on(sharded, own.loss, sampling)
        # No row that only fills up is ever drawn: batches go without weights.
        sampling = sampling._replace(take=_BareRows()) if sampling.batch_size is not None else sampling
        own = own._replace(loss=Gathered(own.loss, sharded.counts))
    if sampling.batch_size is not None:
        sampling = sampling._replace(n=sharded.n)
    if own.evaluate is not None:
        two = job.objective.of_two()
        doubt = "more" if two is None else means.doubt(two, job.params, sharded.batch, [sharded.n, len(data.weight)])
        wrapped = Gathered(own.evaluate, sharded.counts) if doubt else parallel.Weighting(own.evaluate, sharded.n)
        own = own._replace(evaluate=wrapped)
    return own, data, sampling


class _BareRows(NamedTuple):
    def __call__(self, data: Any, indices: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.at[indices].get(mode="promise_in_bounds"), data.batch)


@dataclass(frozen=True)
class Gathered:
    """A loss of any form on rows that are filled up: of all of them, those that do not fill up, in their order."""

    function: Any
    counts: tuple[int, ...]

    def __call__(self, params: Params, rows: Any, **given: Any) -> Any:
        if isinstance(rows, parallel.Weighted):
            most = max(self.counts)
            kept = np.concatenate([d * most + np.arange(count) for d, count in enumerate(self.counts)])
            rows = jax.tree.map(lambda leaf: leaf[kept], rows.batch)
        return self.function(params, rows, **given)


def _of_arrays(
    job: Job, objective: Objective, sampling: Sampling, data: Any, n: int, mesh: Any, identity: Any
) -> Placement:
    runs, optimizer = job.runs, job.runs.optimizer
    here, shape, at = mesh is None or mesh.size == 1, job.runs.shape, optimizers.trained(job.params)
    two = objective.of_two()
    rows = _rows(sampling, two, at, data) if here else None
    in_steps = rows if objective.plain and objective.evaluate is None else None
    if sampling.batch_size is None:
        if objective.plain and objective.evaluate is not None and here:
            in_steps = _rows(sampling, objective.loss, at, data)
        if not objective.plain and sampling.rows is not None:
            raise ValueError(
                f"full_batch(rows={sampling.rows}) takes the gradient in blocks, which a loss with random, loss_state "
                "or has_aux is not known to allow: leave rows out"
            )
        alone = here and in_steps is None and not shape and objective.plain
        parts = blocks.parts_for(objective.loss, at, data) if alone else 1
        sampling = sampling._replace(rows=in_steps, parts=parts)
    single = not shape and here
    static: dict[str, Any] = {"objective": objective, "optimizer": optimizer, "sampling": sampling, "over": runs.over}
    advance: Any = partial(programs.advance, **static, single=single)
    if single and in_steps is not None and job.sampling.batch_size is None and job.sampling.rows is None:
        needs = optimizers.asked(optimizer, job.params, jax.eval_shape(optimizer.init, job.params))
        simple = not (needs.value or needs.function or job.batch_losses or at is not job.params)
        slope = blocks.on_all_cores(objective.loss, at, data) if simple else None
        advance = advance if slope is None else programs.with_given_gradient(slope, optimizer)
    seen: dict[str, Any] = {"objective": objective, "evaluate_at": job.evaluate_at, "over": runs.over, "rows": rows}
    look: Any = partial(programs.look, observe=job.observe, **seen)
    whole_look = look
    judges: list[Any] = [partial(programs.judge, **_measured(rule), **seen) for rule in job.rules]
    finite: Any = partial(programs.finite, runs=len(shape))
    if shape:
        every, of_key = runs.axes, runs.of_key
        advance = tiles.in_tiles(advance, shape, (every, of_key, (), ()), job.memory)
        look = tiles.in_tiles(look, shape, (every, of_key, ()), job.memory)
        judges = [tiles.in_tiles(own, shape, (every, of_key, ()), job.memory) for own in judges]
        finite = tiles.in_tiles(finite, shape, (every,), job.memory)
    advance = _with_fallback(advance, single)
    keyed = objective.draws_when_recorded

    def at_start(params: Params, model: Any, key: Key) -> str:
        at = optimizers.trained(params)
        own = loss_key(key, 0) if objective.random else None
        blocked = (in_steps or rows) if objective.plain else None
        found = told_at_start(*programs.value_and_gradient(at, model, own, data, objective=objective, rows=blocked))
        first = _first_bad_example(objective.loss, at, data) if found and here and objective.plain else ""
        return found and found + first

    return Placement(
        n=n,
        mesh=mesh,
        put=(lambda tree: parallel.replicate(tree, mesh)) if mesh is not None else _as_arrays,
        advance=lambda state, key, until, *, halt: advance(state, key, data, np.int32(until), halt=halt),
        look=lambda state, key: look(programs.seen_state(state, _sees_all(job)), key if keyed else (), data),
        recorded=lambda state, key: jax.eval_shape(
            whole_look, programs.seen_state(state, _sees_all(job)), key if keyed else (), data
        )[2:],
        judge=lambda number, state, key: judges[number](
            programs.seen_state(state, job.evaluate_at is not None), key if keyed else (), data
        ),
        finite=finite,
        at_start=at_start,
        identity=identity,
    )


def _sees_all(job: Job) -> bool:
    return job.observes_state or job.evaluate_at is not None


def _measured(rule: Judged) -> dict[str, Any]:
    return {"measured": rule.measured, "metric": getattr(rule, "metric", None)}


def _as_arrays(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf if optimizers.typed(leaf) else jnp.asarray(leaf), tree)


def _with_fallback(advance: Any, single: bool) -> Any:
    """The same, compiled as XLA usually does where `onecore` took the step for simpler than the compiler does."""
    chosen = [advance]

    def go(*args: Any, halt: Any) -> State:
        try:
            return chosen[0](*args, halt=halt)
        except jax.errors.JaxRuntimeError as error:
            if not single or "UNIMPLEMENTED" not in str(error) or chosen[0] is not advance:
                raise
            chosen[0] = partial(advance, single=False)
            return chosen[0](*args, halt=halt)

    return go


def _rows(sampling: Sampling, loss: Loss | None, params: Params, data: Any) -> int | None:
    """Rows of a block in which to evaluate what is a mean over all examples; None for all at once."""
    if loss is None:
        return None
    if sampling.rows is None:
        return blocks.rows_for(loss, params, data)
    check_rows(sampling.rows, loss, params, data)
    return sampling.rows


# --- rows on disk -----------------------------------------------------------------------------------------------


def on_disk(job: Job, rows: stream.Rows) -> Placement:
    """Rows in files: the step of rows in memory, on rows that were fetched for it; full passes in parts."""
    objective, sampling, params = job.objective, job.sampling, job.params
    at = optimizers.trained(params)
    check_sizes(sampling, rows.n)
    first = stream.example(rows)
    raw = objective._replace(loss=OfRows(objective.loss, rows), evaluate=_evaluate_rows(objective, rows))
    check(job, raw, first)
    _check_on_disk(job, rows)
    losses.check_labels(objective.loss, at, rows.as_batch(stream.example(rows, 1024)))
    full = objective.of_two()
    of_point = None if full is not None else objective.of_point()
    needs = optimizers.asked(job.runs.optimizer, params, jax.eval_shape(job.runs.optimizer.init, params))
    if sampling.batch_size is None and needs.function:
        raise ValueError(
            "this optimizer evaluates the loss at other parameters within a step (value_fn), which takes passes over "
            "the rows on disk: load the rows into memory, or take minibatches"
        )
    run = job.runs
    step: Any = partial(programs.advance, optimizer=run.optimizer, over=())
    seen: dict[str, Any] = {"evaluate_at": job.evaluate_at, "over": (), "rows": None}
    reader: list[stream.Reader] = []
    streamed = stream.of_rows(objective.loss, rows)
    valued = needs.value or job.batch_losses

    def advance_batches(state: State, key: Key, until: Any, *, halt: Any, single: bool) -> State:
        b = sampling.batch_size
        assert b is not None
        if not reader:
            reader.append(stream.Reader(rows, sampling, key, job.steps))
        steps = reader[0].steps
        ordered = stream.in_order(b, steps, streamed)._replace(drop_last=sampling.drop_last, n=sampling.n or rows.n)
        go = partial(step, objective=objective, sampling=ordered, halt=halt, single=single)
        now, until = int(state.step), int(until)
        if now >= until:
            # Nothing to do but to compile. To fetch a block here would take it off the clock.
            nothing = jnp.zeros((steps * b, rows.columns), rows.dtype)
            return go(state, key, nothing, np.int32(until))
        while True:
            number = now // steps
            now = min(until, (number + 1) * steps)
            state = jax.block_until_ready(go(state, key, reader[0].block(number), np.int32(now)))
            if now >= until or (halt is not None and bool(state.halted)):
                return state

    def advance_full(state: State, key: Key, until: Any, *, halt: Any, single: bool) -> State:
        # The gradient of ⟨g, w⟩ is g: the same compiled step, with a gradient that is known.
        go = partial(step, objective=Objective(stream.along), sampling=sampling, halt=halt, single=single)
        if int(state.step) >= int(until):
            stream.gradient(
                streamed, optimizers.trained(state.params), stream.few(rows)
            )  # nothing to do but to compile
        for now in range(int(state.step), int(until)):
            w = optimizers.trained(state.params)
            slope = jax.tree.map(lambda leaf: leaf[None], stream.gradient(streamed, w, rows))
            own = go
            if valued:
                there = jax.tree.map(lambda leaf: leaf[None], w)
                slope = (slope, there, stream.value(streamed, w, rows)[None])
                own = partial(go, objective=Objective(stream.along_from))
            state = own(state, key, slope, np.int32(now + 1))
            if halt is not None and bool(state.halted):
                break
        return state

    def value(at: Params, model: Any) -> Any:
        if rows.full is not None and objective.evaluate is None:
            return rows.full(at)
        function, where = (full, at) if full is not None else (of_point, (at, model))
        return stream.value(stream.of_rows(function, rows), where, rows)

    # Of what is recorded only the full loss needs the rows.
    nothing: dict[str, Any] = {"objective": Objective(_zero), **seen}

    def look(state: State, key: Key) -> Any:
        _, norm, _, observed = programs.look(
            programs.seen_state(state, _sees_all(job)), (), first, observe=job.observe, **nothing
        )
        return value(programs.point(state, job.evaluate_at), state.model), norm, None, observed

    def judge(number: int, state: State, key: Key) -> Any:
        rule = job.rules[number]
        if rule.measured == "metric":
            whole = programs.seen_state(state, job.evaluate_at is not None)
            return programs.judge(whole, (), first, **_measured(rule), **nothing)
        at = programs.point(state, job.evaluate_at)
        if rule.measured == "loss":
            return value(at, state.model)
        slope = jax.tree.leaves(stream.gradient(stream.of_rows(full, rows), at, rows))
        return np.sqrt(sum(float(jnp.sum(leaf.astype(jnp.float32) ** 2)) for leaf in slope))

    def at_start(params: Params, model: Any, key: Key) -> str:
        if not objective.plain:
            return ""
        w = optimizers.trained(params)
        return told_at_start(stream.value(streamed, w, rows), stream.gradient(streamed, w, rows))

    def close() -> None:
        for each in reader:
            each.close()

    both = _with_fallback(
        lambda *args, halt, single=True: (advance_full if sampling.batch_size is None else advance_batches)(
            *args, halt=halt, single=single
        ),
        True,
    )
    return Placement(
        n=rows.n,
        mesh=None,
        put=_as_arrays,
        advance=both,
        look=look,
        recorded=lambda state, key: jax.eval_shape(
            partial(programs.look, observe=job.observe, **nothing),
            programs.seen_state(state, _sees_all(job)),
            (),
            first,
        )[2:],
        judge=judge,
        finite=programs.finite,
        at_start=at_start,
        identity=(raw, first, partial(stream.tell, rows)),
        close=close,
    )


def _zero(params: Params, batch: Any) -> Any:
    return jnp.zeros(())


@dataclass(frozen=True)
class OfRows:
    """A loss of any form, of raw rows."""

    function: Any
    rows: stream.Rows

    def __call__(self, params: Params, rows: Any, **given: Any) -> Any:
        return self.function(params, self.rows.as_batch(rows), **given)


def _evaluate_rows(objective: Objective, rows: stream.Rows) -> Any:
    return None if objective.evaluate is None else OfRows(objective.evaluate, rows)


def _check_on_disk(job: Job, rows: stream.Rows) -> None:
    """Raise ValueError unless what is taken of all rows is known to be a mean, which is evaluated in parts."""
    objective, at = job.objective, optimizers.trained(job.params)
    form = ", ".join(name for name, has in zip(("random", "loss_state", "has_aux"), objective[1:4], strict=True) if has)
    if form and job.sampling.batch_size is None:
        raise ValueError(
            f"a full pass over rows on disk takes them in parts, which a loss with {form} is not known to allow: take "
            "minibatches, or load the rows into memory"
        )
    full, of_point = objective.of_two(), objective.of_point()
    if full is None and of_point is None:
        raise ValueError(
            f"the full loss of rows on disk is evaluated in parts, which a loss with {form} is not known to allow: "
            "give evaluate=lambda params, batch: ..., a mean over the examples, which is then recorded"
        )
    gradient = any(rule.measured == "gradient" for rule in job.rules)
    if full is None and gradient:
        raise ValueError("small_gradient of rows on disk needs a loss that takes params and batch alone")
    if job.sampling.batch_size is None:
        stream.check_mean(objective.loss, at, rows)
    if full is None:
        assert of_point is not None
        stream.check_mean(of_point, (at, job.model), rows)
    elif job.sampling.batch_size is None or rows.full is None or objective.evaluate is not None or gradient:
        stream.check_mean(full, at, rows)


# --- what is wrong at the start ---------------------------------------------------------------------------------


def told_at_start(value: Any, gradient: Params) -> str:
    """What is not finite of loss and gradient at the start; empty where all is."""
    if not np.isfinite(value):
        return f"not finite at the start: the loss is {float(value)}"
    where = not_finite_in(gradient)
    words = f"not finite at the start: the loss is {float(value):.3g}, but its gradient is not finite in {where}"
    return words if where else ""


def not_finite_in(tree: Any) -> str:
    """The names of the leaves with an entry that is not finite."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return ", ".join(leaf_name(path) for path, leaf in leaves if not jnp.isfinite(leaf).all())


def leaf_name(path: Any) -> str:
    """The name of a leaf of the parameters."""
    return jax.tree_util.keystr(path).lstrip(".") or "the array"


def _first_bad_example(loss: Loss, params: Params, data: Any) -> str:
    """The first example whose loss or gradient is not finite, if the loss is a mean over them and not all are bad."""
    try:
        of_one = means.of_one(loss, params, data, [leading_axis(data)], "")
    except ValueError:
        return ""

    def good(example: Any) -> Any:
        return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(both(params, example))]).all()

    both = jax.value_and_grad(of_one)
    fine = np.asarray(jax.jit(lambda data: jax.lax.map(good, data, batch_size=256))(data))
    return "" if not fine.any() or fine.all() else f"; the first such example is row {np.argmin(fine):,} (from 0)"
