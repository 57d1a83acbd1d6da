"""Descent over rows that stay on disk: SGD and full gradients over more data than memory holds.

The examples of a step are a pure function of key and step, so those of thousands of coming steps are known. While the
device takes the steps of one block, a thread fetches the rows of the next. It goes through the file part by part, so
that the disk is read forwards, once per block, and puts the rows in the order of the steps.

A full gradient takes a pass over the file (`full_pass`); the step is then taken with that gradient.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import losses
from jaxgrad.descent import optimizers, programs
from jaxgrad.descent.at_start import not_finite_at_start
from jaxgrad.descent.full_pass import OfRows, check_mean, full_gradient, full_loss
from jaxgrad.descent.job import Job
from jaxgrad.descent.objective import Objective
from jaxgrad.descent.placement import Placement, as_arrays, check, measured, sees_all, with_fallback
from jaxgrad.descent.step import State
from jaxgrad.rows import Layout, Rows, aligned, beginning, example, fingerprint, pick
from jaxgrad.sampling import check_sizes
from jaxgrad.types import Key, Params, Sampling


def on_disk(job: Job, rows: Rows) -> Placement:
    """The placement of rows in files: the step of rows in memory, on fetched rows; full passes in parts."""
    objective, sampling, params = job.objective, job.sampling, job.params
    at = optimizers.trained(params)
    check_sizes(sampling, rows.n)
    first = example(rows)
    evaluate = None if objective.evaluate is None else OfRows(objective.evaluate, rows.layout)
    raw = objective._replace(loss=OfRows(objective.loss, rows.layout), evaluate=evaluate)
    check(job, raw, first)
    _check_on_disk(job, rows)
    losses.check_labels(objective.loss, at, rows.as_batch(example(rows, 1024)))
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
    reader: list[Reader] = []
    valued = needs.value or job.batch_losses

    def advance_batches(state: State, key: Key, until: Any, *, halt: Any, single: bool) -> State:
        b = sampling.batch_size
        assert b is not None
        if not reader:
            reader.append(Reader(rows, sampling, key, job.steps))
        steps = reader[0].steps
        ordered = _in_order(b, steps, rows.layout)._replace(drop_last=sampling.drop_last, n=sampling.n or rows.n)
        take = partial(step, objective=objective, sampling=ordered, halt=halt, single=single)
        now, until = int(state.step), int(until)
        if now >= until:
            # No steps: only compile. A block that is fetched here would not be on the clock.
            nothing = jnp.zeros((steps * b, rows.columns), jax.dtypes.canonicalize_dtype(rows.dtype))
            return take(state, key, nothing, np.int32(until))
        while True:
            number = now // steps
            now = min(until, (number + 1) * steps)
            state = jax.block_until_ready(take(state, key, reader[0].block(number), np.int32(now)))
            if now >= until or (halt is not None and bool(state.halted)):
                return state

    def advance_full(state: State, key: Key, until: Any, *, halt: Any, single: bool) -> State:
        # The gradient of ⟨g, w⟩ is g: the same compiled step, with a known gradient.
        take = partial(step, objective=Objective(along), sampling=sampling, halt=halt, single=single)
        if int(state.step) >= int(until):
            full_gradient(objective.loss, optimizers.trained(state.params), beginning(rows))  # it compiles
        for now in range(int(state.step), int(until)):
            w = optimizers.trained(state.params)
            slope = jax.tree.map(lambda leaf: leaf[None], full_gradient(objective.loss, w, rows))
            own = take
            if valued:
                there = jax.tree.map(lambda leaf: leaf[None], w)
                slope = (slope, there, full_loss(objective.loss, w, rows)[None])
                own = partial(take, objective=Objective(along_from))
            state = own(state, key, slope, np.int32(now + 1))
            if halt is not None and bool(state.halted):
                break
        return state

    def value(at: Params, model: Any) -> Any:
        if rows.full is not None and objective.evaluate is None:
            return rows.full(at)
        if full is not None:
            return full_loss(full, at, rows)
        assert of_point is not None
        return full_loss(of_point, (at, model), rows)

    # Of the recorded values, only the full loss needs the rows.
    nothing: dict[str, Any] = {"objective": Objective(_zero), **seen}

    def look(state: State, key: Key) -> Any:
        _, norm, _, observed = programs.look(
            programs.seen_state(state, sees_all(job)), (), first, observe=job.observe, **nothing
        )
        return value(programs.point(state, job.evaluate_at), state.model), norm, None, observed

    def judge(number: int, state: State, key: Key) -> Any:
        rule = job.rules[number]
        if rule.measured == "metric":
            whole = programs.seen_state(state, job.evaluate_at is not None)
            return programs.judge(whole, (), first, **measured(rule), **nothing)
        at = programs.point(state, job.evaluate_at)
        if rule.measured == "loss":
            return value(at, state.model)
        assert full is not None
        slope = jax.tree.leaves(full_gradient(full, at, rows))
        return np.sqrt(sum(float(jnp.sum(leaf.astype(jnp.float32) ** 2)) for leaf in slope))

    def at_start(params: Params, model: Any, key: Key) -> str:
        if not objective.plain:
            return ""
        w = optimizers.trained(params)
        return not_finite_at_start(full_loss(objective.loss, w, rows), full_gradient(objective.loss, w, rows))

    def release() -> None:
        for each in reader:
            each.close()

    both = with_fallback(
        lambda *args, halt, single=True: (advance_full if sampling.batch_size is None else advance_batches)(
            *args, halt=halt, single=single
        ),
        True,
    )
    return Placement(
        n=rows.n,
        mesh=None,
        put=as_arrays,
        advance=both,
        look=look,
        recorded=lambda state, key: jax.eval_shape(
            partial(programs.look, observe=job.observe, **nothing),
            programs.seen_state(state, sees_all(job)),
            (),
            first,
        )[2:],
        judge=judge,
        finite=programs.finite,
        at_start=at_start,
        identity=(raw, first, partial(fingerprint, rows)),
        release=release,
        in_files=True,
    )


def _zero(params: Params, batch: Any) -> Any:
    return jnp.zeros(())


def _check_on_disk(job: Job, rows: Rows) -> None:
    """Raise ValueError unless each loss that is evaluated on all rows, in parts, is known to be a mean."""
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
        check_mean(objective.loss, at, rows)
    if full is None:
        assert of_point is not None
        check_mean(of_point, (at, job.model), rows)
    elif job.sampling.batch_size is None or rows.full is None or objective.evaluate is not None or gradient:
        check_mean(full, at, rows)


# --- rows of coming steps, fetched ahead -------------------------------------------------------------------------


class Reader:
    """Fetches the rows of blocks of steps, always one block ahead. `close` it, or its thread reads on."""

    def __init__(self, rows: Rows, sampling: Sampling, key: Key, last: int):
        b = sampling.batch_size or 1
        # A row is in the device's block and in the next one, and needs 32 bytes while its number is drawn and sorted.
        most = int(rows.memory * 2**30 / (2 * rows.row_bytes + 32))
        # All blocks have one size: another size would be compiled anew.
        self.steps = -(-max(1, last) // -(-max(1, last) // max(1, most // b)))
        self._rows, self._sampling, self._key, self._last = rows, sampling, key, last
        self._pool = ThreadPoolExecutor(1)
        # One buffer for even blocks, one for odd ones. New memory would cost more time than filling it.
        self._buffers = [aligned(self.steps * b * rows.row_bytes) for _ in range(2)]
        self._ready: dict[int, Future[np.ndarray]] = {}
        self._device: tuple[int, Any] = (-1, None)

    def block(self, number: int) -> Any:
        """The rows of steps `number · steps` on, `[steps · b, columns]`, on the device.

        The steps of the block before must be over: the next block is fetched into its buffer.
        """
        if self._device[0] != number:
            self._device = (-1, None)
            found = self._read(number).result()
            self._ready = {}
            # On a CPU this makes no copy; `jnp.asarray` would.
            self._device = (number, jax.block_until_ready(jax.device_put(found)))
        if (number + 1) * self.steps < self._last:
            self._read(number + 1)
        return self._device[1]

    def _read(self, number: int) -> "Future[np.ndarray]":
        if number not in self._ready:
            self._ready[number] = self._pool.submit(self._fetch, number)
        return self._ready[number]

    def _fetch(self, number: int) -> np.ndarray:
        first = np.int32(number * self.steps)
        drawn = _indices(self._key, first, sampling=self._sampling, n=self._rows.n, count=self.steps)
        return pick(self._rows, np.asarray(drawn), self._buffers[number % 2])

    def close(self) -> None:
        """End the thread and release files and memory. It waits for a fetch in progress, so that nothing reads on
        while the caller goes on and perhaps measures time."""
        self._pool.shutdown(cancel_futures=True)
        self._ready, self._device, self._buffers = {}, (-1, None), []


@partial(jax.jit, static_argnames=("sampling", "n", "count"))
def _indices(key: Key, first: Any, *, sampling: Sampling, n: int, count: int) -> jax.Array:
    return sampling.ahead(key, jnp.asarray(first, jnp.int32), count, n)


class _InOrder(NamedTuple):
    """Step t sees the t-th b rows of its block."""

    steps: int

    def __call__(self, key: Key, step: Any, n: int, b: int) -> jax.Array:
        del key, n
        return (jnp.asarray(step, jnp.int32) % self.steps) * b + jnp.arange(b, dtype=jnp.int32)


class _Take(NamedTuple):
    """Rows of a block as the loss sees them. The loss does not do this itself: its step is that of rows in memory."""

    layout: Layout

    def __call__(self, rows: Any, indices: Any) -> Any:
        return self.layout.batch(rows.at[indices].get(mode="promise_in_bounds"))


def _in_order(b: int, steps: int, layout: Layout) -> Sampling:
    """The sampling of a fetched block: the rows in the order in which they were fetched."""
    return Sampling("in order", b, _InOrder(steps), take=_Take(layout))


# --- a step whose gradient is known -------------------------------------------------------------------------------


def along(params: Params, gradient: Any) -> jax.Array:
    """`⟨g, w⟩`: a loss with the known gradient g; leaves of g `[1, …]`."""
    parts = jax.tree.map(lambda w, g: jnp.sum(w * jax.lax.stop_gradient(g[0])), params, gradient)
    return sum(jax.tree.leaves(parts), start=jnp.zeros(()))


def along_from(params: Params, known: Any) -> jax.Array:
    """`v + ⟨g, w − w₀⟩` for known `(g, w₀, v)`: a loss with the value v and the gradient g at w₀."""
    gradient, start, value = known
    parts = jax.tree.map(lambda w, w0, g: jnp.sum((w - w0[0]) * g[0]), params, start, gradient)
    return sum(jax.tree.leaves(parts), start=jnp.asarray(value[0]))
