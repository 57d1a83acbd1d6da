"""`descend`: the loop over the pauses of a run, wherever its rows are."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import checks, parallel
from jaxgrad.checks import Natural, Positive, checked
from jaxgrad.descent import checkpoint as saved
from jaxgrad.descent import identity, optimizers, programs, run_tiles, stopping
from jaxgrad.descent.at_start import leaf_name
from jaxgrad.descent.checkpoint import Checkpoint
from jaxgrad.descent.in_memory import in_memory
from jaxgrad.descent.log import Log, of_starts
from jaxgrad.descent.objective import Objective, hashable
from jaxgrad.descent.on_disk import on_disk
from jaxgrad.descent.on_mesh import on_mesh
from jaxgrad.descent.optimizers import Optimizer
from jaxgrad.descent.placement import Job, Placement
from jaxgrad.descent.runs import Runs, continued, copies, first_state, keep
from jaxgrad.descent.schedule import Mark, Marks, marks
from jaxgrad.descent.step import State
from jaxgrad.descent.stopping import Stop
from jaxgrad.descent.trace import Trace
from jaxgrad.rows import Rows
from jaxgrad.types import Key, Params, Sampling


def _data(name: str, value: Any) -> Any:
    """Rows on disk, on many devices, or in arrays. Their numbers are checked when they are placed."""
    return value if isinstance(value, Rows | parallel.Sharded) else checks.batch(name, value, finite=False)


def _start(name: str, value: Any) -> Any:
    """Parameters, or the state of an earlier run."""
    return value if isinstance(value, State) else checks.params(name, value)


Data = Annotated[Any, _data]
if TYPE_CHECKING:
    Stops = Stop | Sequence[Stop] | None
else:
    Stops = Any  # `stopping.rules` refuses other values with a sentence


@checked
def descend(
    loss: Any,
    params: Annotated[Params, _start],
    data: Data,
    *,
    optimizer: Optimizer | float | Sequence[float] | np.ndarray | jax.Array | Callable[..., Optimizer],
    sampling: Sampling,
    steps: Natural,
    key: Annotated[Key, partial(checks.key, many=True)],
    record: int | Sequence[int] | np.ndarray = 50,
    stop: Stops = None,
    observe: Callable[..., Any] | None = None,
    params_axis: Natural | None = None,
    progress: bool | Callable[[int, int], None] = False,
    checkpoint: Checkpoint | None = None,
    memory: Positive = run_tiles.MEMORY,
    sweep: Mapping[str, Any] | None = None,
    random: bool = False,
    loss_state: Any = None,
    has_aux: bool = False,
    evaluate: Callable[..., Any] | None = None,
    evaluate_at: Callable[[State], Params] | None = None,
    batch_losses: bool = False,
) -> Trace:
    """Run `steps` steps of descent on a loss and say what happened (F3, F5).

    Args:
      loss: `loss(params, batch) -> scalar`. It may be any function of the batch. One that is known to be a mean over
        the examples (made by `losses.mean_loss` or `losses.mean_of`, or proved by `jaxgrad.means`) may be evaluated
        in blocks; any other is evaluated on all rows at once. `random`, `loss_state` and `has_aux` allow other forms.
      params: the start, a pytree of floating-point arrays; or the `State` of an earlier trace, to go on from.
      data: all n examples, a pytree whose leaves share their leading axis; or rows that lie on many devices
        (`parallel.shard(batch, parallel.mesh())`) or on disk (`jaxgrad.open_rows`).
      optimizer: an optax transformation (schedules give `η_t`), or a number: plain descent with that step size; or m
        numbers: then a run with each of them, with every key, goes in one compiled program. A transformation that asks
        for the loss (`optax.lbfgs`, `polyak_sgd`, `reduce_on_plateau`, …) gets `value`, `grad` and `value_fn` of the
        step's batch. `optax.lookahead` makes a fast and a slow copy of the parameters: gradients are taken at the fast
        ones, the loss is recorded at the slow ones. Random keys in its state are folded with the run's key, so that
        each run has its own noise. Two equal transformations compile once.
      sampling: `full_batch()` is GD; `with_replacement(b)`, `distinct(b)`, `reshuffled(b)` are SGD.
      steps: the budget, counted from the very first step also when a run goes on.
      key: a JAX key for the order of examples; or an array of s keys: then s runs go in one compiled program.
      record: how many evenly spaced record points (0 and `steps` are two of them), or the steps themselves;
        see `log_spaced`. The full loss is evaluated there, off the clock: each point costs a pass over the data.
      stop: a stopping rule besides the budget, or a list of them (`small_step`, `small_gradient`, `target_loss`,
        `no_improvement`, `keep_best`, `time_limit`).
      observe: `observe(params) -> pytree` of whatever else to record, e.g. accuracy; or `observe(params, state)` with
        the `State` of the run: its step, the optimizer's state, the last update, the state of the loss. Off the clock.
      params_axis: 0 if `params` has a leading axis of s starts, one per key; all step sizes share them.
      progress: True shows a line on stderr; or a function of `(step, steps)`.
      checkpoint: save the run as it goes, and go on from what was saved. SIGTERM and Ctrl-C then end it at the next
        record point or checkpoint, the same on every process, with `parallel.Preempted` (exit status 75).
      memory: GiB that the program may take beside the data and what it returns. Runs that need more together go in
        equal tiles, one after the other, through the same program (`jaxgrad.descent.run_tiles`).
      sweep: m numbers of each of some settings of the optimizer, `{"learning_rate": [m], "b1": [m]}`: then run i has
        the i-th of each, with every key, in one compiled program. The optimizer is then the function that makes it
        from these settings (`optax.adam`, or a function of your own), or `optax.inject_hyperparams(...)(...)`.
      random: the loss draws something: it is called as `loss(params, batch, key=...)`, with `loss_key(key, t − 1)` at
        step t. Recorded is the loss with one key of the run for all record points, unless `evaluate` says otherwise.
      loss_state: the first state of a loss that has one (running statistics): it is called as `loss(params, batch,
        state=...)` and returns `(value, new_state)`. Each run has its own, in `Trace.state.model`; a checkpoint saves
        it. Recorded is the loss with the state as it is, whose new state is dropped, unless `evaluate` says otherwise.
      has_aux: the loss returns `(value, aux)`, or `(value, (new_state, aux))` with a state; `Trace.aux` has what it
        returned at the record points.
      evaluate: recorded in place of the loss, for instance without its noise, or with its averages:
        `evaluate(params, data)`, with the arguments `key` and `state` if it takes them. With `has_aux` it returns
        `(value, aux)` too.
      evaluate_at: `evaluate_at(state) -> params` at which the loss is recorded and rules and `observe` look, such as
        `lambda state: optax.contrib.schedule_free_eval_params(state.optimizer, state.params)`, or an average.
      batch_losses: record the loss of each step's own batch too, in `Trace.batch_loss`.

    Raises:
      ValueError, TypeError: for anything that cannot run (shapes, NaN in the data, `b > n`, a loss that is not
        a scalar, integer parameters, a step size that is not finite and positive, labels that the loss has no meaning
        for), before anything compiles. Rows on disk, and rows that do not divide evenly over devices, need a loss
        that is known to be a mean.

    A run that diverges is a result: its status says at which step its parameters ceased to be finite, and the
    runs beside it are untouched. A run among others equals that run alone to rounding.
    """
    begin = _Begin.of(params, loss_state, Runs.of(optimizer, sweep, key), params_axis)
    objective = Objective.of(loss, random, begin.model is not None, has_aux, evaluate)
    rules = stopping.rules("stop", stop)
    job = _job(begin, objective, sampling, observe, evaluate_at, rules, batch_losses, memory, steps)
    show = _progress(progress if callable(progress) or parallel.is_main() else False)
    with closing(_Open(place(job, data))) as opened:
        rows, first, halt = opened.rows, begin.step, stopping.halting(rules)
        saves = _Saves.of(checkpoint, job, rows, rules)
        pauses = marks(record, first, steps, job.rules, saves.every)
        state, key = _first_state(begin, job, rows, key, pauses)
        at_start = partial(_at_start, rows, key, state, begin.has_one_start)
        compile_seconds = _compiled(rows, state, key, first, halt)
        with saves.watching() as keeper:
            log = Log(
                state, begin.runs.shape, steps, list(job.rules), _points(state, job) if _keeps(job.rules) else None
            )
            done, clock = keeper.resumed(log, rows, key), _Clock(stopping.limit(rules))
            for mark in pauses.after(done):
                if log.over:
                    break
                lost = _take(log, rows, key, mark.step, halt, clock)  # on the clock
                _date(log, lost, first, at_start, one_start=begin.has_one_start)
                for number in mark.judged if not log.over else ():
                    _judge(log, rows, key, number, job, mark.step)
                if mark.recorded or log.over:
                    log.record(mark.step, *rows.look(log.state, key))  # off the clock
                show(mark.step, steps)
                keeper.at(mark, log, steps)
        _judge_the_end(log, rows, key, job)
        examples = lambda at: begin.examples + sampling.examples(at, rows.n) - sampling.examples(first, rows.n)
        # For rows on disk, the loss at the start would need another pass.
        loss_first = lambda: None if isinstance(data, Rows) else np.asarray(rows.look(state, key)[0])
        return log.trace(begin.runs, first, examples, loss_first, at_start, compile_seconds)


# --- before the first step --------------------------------------------------------------------------------------


class _Begin(NamedTuple):
    """Where all runs begin: at their start, or at the state of an earlier run."""

    runs: Runs
    start: Params
    """The start of all runs; with `params_axis`, or of an earlier run, with their axes in front."""
    axes: int
    """The number of these axes."""
    model: Any
    """The state of the loss at the start of one run."""
    state: State | None
    """The state of the earlier run."""
    step: int
    examples: int
    """Gradients of examples evaluated before."""

    @property
    def has_one_start(self) -> bool:
        return self.axes == 0

    def one(self, tree: Any) -> Any:
        """A tree of the first run."""
        return jax.tree.map(lambda leaf: leaf[(0,) * self.axes], tree)

    @classmethod
    def of(cls, params: Any, loss_state: Any, runs: Runs, params_axis: int | None) -> "_Begin":
        has_state = _has_state(params, loss_state)
        state = continued(params, runs) if isinstance(params, State) else None
        start = jax.tree.map(jnp.asarray, params) if state is None else state.params
        axis = params_axis if state is None else None
        _check_start(start, runs, axis)
        axes = len(runs.shape) if state else 0 if axis is None else 1
        model = jax.tree.map(jnp.asarray, loss_state) if state is None else state.model
        step, examples = (0, 0) if state is None else (int(state.step), _examples(params))
        begin = cls(runs, start, axes, model if has_state else None, state, step, examples)
        if state is not None:
            begin = begin._replace(model=begin.one(model) if has_state else None)
        known, twice = optimizers.usable(runs.optimizer, begin.one(start))
        start = optax.LookaheadParams.init_synced(start) if twice else start
        return begin._replace(runs=runs._replace(optimizer=known), start=start)


def _job(
    begin: _Begin,
    objective: Objective,
    sampling: Sampling,
    observe: Any,
    evaluate_at: Any,
    rules: Sequence[Stop],
    batch_losses: bool,
    memory: float,
    steps: int,
) -> Job:
    judged, params = stopping.judged(rules), begin.one(begin.start)
    for rule in judged:
        if isinstance(rule, stopping.NoImprovement) and evaluate_at is None:
            stopping.check_metric(rule, params)
    return Job(
        objective=objective,
        runs=begin.runs,
        sampling=sampling,
        observe=_observer(observe),
        observes_state=observe is not None and programs.two_arguments(observe),
        evaluate_at=evaluate_at and hashable(checks.function("evaluate_at", evaluate_at, 1)),
        params=params,
        model=begin.model,
        batch_losses=batch_losses,
        rules=tuple(
            rule._replace(metric=hashable(rule.metric)) if isinstance(rule, stopping.NoImprovement) else rule
            for rule in judged
        ),
        memory=memory,
        steps=steps,
    )


def _first_state(begin: _Begin, job: Job, rows: Placement, key: Key, pauses: Marks) -> tuple[State, Key]:
    """The state of all runs before the first step, and the key, where the rows are; the same on every process."""
    runs, start = begin.runs, begin.start
    if rows.mesh is not None:
        settings = (job.steps, pauses.steps_of_all, job.sampling.name, job.sampling.batch_size, job.memory)
        parallel.agree(start=begin.state or start, key=key, settings=settings, optimizer=runs.digest_settings())
        start, key = rows.put((start, key))
        runs = runs._replace(key=key)
    state = begin.state
    if state is None:
        axis = None if begin.has_one_start else 0
        state = first_state(runs, start, axis)._replace(model=copies(begin.model, runs.shape))
    if job.batch_losses:
        state = state._replace(batch_loss=_room(runs, job.steps))
    if rows.mesh is not None:
        state = rows.put(state)
    if job.observe is not None or job.evaluate_at is not None:
        with checks.saying("observe (or evaluate_at) cannot be evaluated for these params"):
            rows.recorded(state, key)
    return state, key


def _compiled(rows: Placement, state: State, key: Key, first: int, halt: Any) -> float:
    """Compile the steps, and return the seconds that it takes."""
    began = time.perf_counter()
    jax.block_until_ready(rows.advance(state, key, first, halt=halt))
    return time.perf_counter() - began


class _Saves(NamedTuple):
    """The checkpoint of a run, if it is given one, and what tells this run from others."""

    checkpoint: Checkpoint | None
    fingerprint: dict[str, str]
    asked: Any = None
    """`asked()`: whether any process was asked to end."""

    @classmethod
    def of(cls, checkpoint: Checkpoint | None, job: Job, rows: Placement, rules: Sequence[Stop]) -> "_Saves":
        plain = None if checkpoint is None else saved.plain(checkpoint)
        return cls(plain, _fingerprint(plain, job, rows, rules))

    @property
    def every(self) -> int | None:
        """Steps between two checkpoints."""
        return None if self.checkpoint is None else self.checkpoint.every

    @contextmanager
    def watching(self) -> Iterator["_Saves"]:
        """No other run writes the file, and a signal to end waits for the next pause."""
        if self.checkpoint is None:
            yield self
            return
        with saved.held(self.checkpoint), parallel.Interruption() as asked:
            yield self._replace(asked=asked)

    def resumed(self, log: Log, rows: Placement, key: Key) -> int:
        """Go on from what was saved, if something was; return the step that is done, −1 if none is."""
        if self.checkpoint is None:
            return -1
        log.expect(*rows.recorded(log.state, key))
        found = saved.resumed(self.checkpoint, log.saved(), self.fingerprint)
        if found is None:
            return -1
        log.resume(found, rows.put)
        return int(np.max(log.state.step))

    def at(self, mark: Mark, log: Log, steps: int) -> None:
        """Save where a save is due. Where a process was asked to end, save and raise `Preempted`."""
        if self.checkpoint is None:
            return
        if log.over or mark.saved:
            saved.save(self.checkpoint, log.saved(), self.fingerprint)
        if not log.over and self.asked is not None and self.asked() and mark.step < steps:
            saved.save(self.checkpoint, log.saved(), self.fingerprint)
            raise parallel.Preempted(mark.step, self.checkpoint.path)


# --- what happens at a pause ------------------------------------------------------------------------------------


def _take(log: Log, rows: Placement, key: Key, until: int, halt: Any, clock: "_Clock") -> tuple[Any, Any]:
    """Take the steps to `until`, on the clock. Return which runs diverged on the way, and at which step.

    The runs end early if a time limit is reached.
    """
    shape = log.active.shape
    lost_at, lost_of_all = np.zeros(shape, np.int64), np.zeros(shape, bool)
    for to in clock.parts(log, until):
        before, began = log.state, time.perf_counter()
        state = jax.block_until_ready(rows.advance(before, key, to, halt=halt))
        log.seconds += time.perf_counter() - began
        log.state = state if log.active.all() else keep(log.active, state, before)
        if (lost := log.active & ~np.asarray(rows.finite(log.state.params))).any():
            # The loop checks nothing. To find the step, the chunk runs again with a check at every step.
            watched = np.asarray(rows.advance(before, key, to, halt=programs.not_finite).step)
            log.end(lost, "diverged", watched)
            lost_of_all, lost_at = lost_of_all | lost, np.where(lost, watched, lost_at)
        if halt is not None and (small := log.active & np.asarray(log.state.halted)).any():
            log.end(small, f"stopped: {halt.reason}", np.asarray(log.state.step))
        if not log.over and clock.is_over(log.seconds):
            log.end(log.active.copy(), f"stopped: {stopping.TimeLimit.reason}", to)
        if log.over:
            break
    return lost_of_all, lost_at


def _date(log: Log, lost: tuple[Any, Any], first: int, at_start: Any, one_start: bool) -> None:
    """Correct the status of diverged runs that were not finite at the start."""
    which, at = lost
    # A single start is always checked, however late the run diverged: a minibatch may meet a bad row late.
    if (doubted := which & (one_start | (at <= first + 1))).any():
        words = at_start(doubted)
        log.end(doubted & (words != ""), words, first)


def _judge(log: Log, rows: Placement, key: Key, number: int, job: Job, at: int) -> None:
    """Ask one rule, on the clock."""
    rule, began = job.rules[number], time.perf_counter()
    value = np.asarray(rows.judge(number, log.state, key))
    log.seconds += time.perf_counter() - began
    log.judge(number, rule, value, at, _points(log.state, job) if log.best is not None else None)


def _judge_the_end(log: Log, rows: Placement, key: Key, job: Job) -> None:
    """See whether the parameters at the end of a run are its best, off the clock."""
    for number, rule in enumerate(job.rules):
        if isinstance(rule, stopping.NoImprovement):
            value = np.asarray(rows.judge(number, log.state, key))
            log.keep_best(value, np.max(log.state.step), _points(log.state, job))


class _Clock:
    """Cuts the steps to the next pause into parts, so that a run ends soon after its time limit."""

    def __init__(self, limit: float):
        self._limit, self._part = limit, 1

    def parts(self, log: Log, until: int) -> Any:
        """The steps at which to look at the clock, one after the other."""
        now = int(np.max(log.state.step))
        if np.isinf(self._limit):
            yield until
            return
        while True:
            to, began = min(until, now + self._part), log.seconds
            yield to
            if to >= until:
                return
            # By rank 0's clock: all processes must take the same steps.
            took, now = parallel.of_main(log.seconds - began), to
            self._part = max(1, 2 * self._part if took < self._limit / 100 else self._part)

    def is_over(self, seconds: float) -> bool:
        """Whether the time is up, by rank 0's clock."""
        return not np.isinf(self._limit) and parallel.of_main(seconds) >= self._limit


class _Open(NamedTuple):
    rows: Placement

    def close(self) -> None:
        self.rows.close()


# --- where the rows are -----------------------------------------------------------------------------------------


def place(job: Job, data: Any) -> Placement:
    """The placement of these data. Raises ValueError or TypeError if the job cannot be done there."""
    if isinstance(data, Rows):
        if job.runs.shape:
            raise ValueError("rows on disk serve one run on one device: give one key and one step size")
        return on_disk(job, data)
    return on_mesh(job, data) if isinstance(data, parallel.Sharded) else in_memory(job, data)


# --- what is given ----------------------------------------------------------------------------------------------


def _has_state(params: Any, loss_state: Any) -> bool:
    if isinstance(params, State):
        if loss_state is not None:
            raise ValueError("loss_state comes with the state of the earlier run: leave it out where params is a State")
        return params.model is not None
    if loss_state is not None and not jax.tree.leaves(loss_state):
        raise ValueError("loss_state holds no arrays: leave it out, or give the first state of the loss")
    return loss_state is not None


@dataclass(frozen=True)
class _OfParams:
    """`observe(params)` as a function of params and state."""

    observe: Any

    def __call__(self, params: Params, state: Any) -> Any:
        return self.observe(params)


def _observer(observe: Any) -> Any:
    if observe is None:
        return None
    two = programs.two_arguments(observe)
    return hashable(observe) if two else _OfParams(hashable(observe))


def _keeps(rules: Sequence[Any]) -> bool:
    return any(isinstance(rule, stopping.NoImprovement) for rule in rules)


def _points(state: State, job: Job) -> Params:
    """The parameters of all runs at which the loss is recorded."""
    if job.evaluate_at is None:
        return optimizers.evaluated(state.params)
    return programs.points(programs.seen_state(state, True), evaluate_at=job.evaluate_at, over=job.runs.over)


def _room(runs: Runs, steps: int) -> Any:
    """An array for the loss of each step's batch; NaN until the step is taken."""
    shape, dtype = (*runs.shape, steps), jax.dtypes.canonicalize_dtype(float)
    return np.full(shape, np.nan, dtype) if runs.shape else jnp.full(shape, jnp.nan, dtype)


def _fingerprint(
    checkpoint: Checkpoint | None, job: Job, rows: Placement, rules: Sequence[stopping.Stop]
) -> dict[str, str]:
    """The fingerprint of the run. Raises an error if no checkpoint can be written."""
    if checkpoint is None:
        return {}
    parallel.together(lambda: saved.check(checkpoint) if parallel.is_main() else None)
    objective, data, hash_of_rows = rows.identity
    runs = job.runs
    return identity.fingerprint(
        objective,
        job.params,
        job.model,
        data,
        rows.n,
        runs.optimizer,
        runs.digest_settings(),
        job.sampling,
        runs.key,
        rules,
        hash_of_rows(),
    )


def _at_start(rows: Placement, key: Key, begin: State, has_one_start: bool, which: Any) -> np.ndarray:
    """What is not finite where these runs begin, in words; empty where all is."""
    words = lambda start: _not_finite(rows, key, *start)
    return of_starts(words, (begin.params, begin.model), which, one=has_one_start)


def _not_finite(rows: Placement, key: Key, params: Params, model: Any) -> str:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if bad := [leaf_name(path) for path, leaf in leaves if not jnp.isfinite(leaf).all()]:
        return f"not finite at the start: the parameters have NaN or infinite entries in {', '.join(bad)}"
    return rows.at_start(params, model, key if key.ndim == 0 else key[0])


def _examples(state: State) -> int:
    """The number of gradients of examples that led to a state."""
    if state.examples is None and int(np.max(state.step)) > 0:
        raise ValueError(
            "this state comes from `advance`, which does not count the gradients of examples that it takes: give "
            "state._replace(examples=...) with their number so far (steps times batch size)"
        )
    return 0 if state.examples is None else int(np.max(state.examples))


def _check_start(params: Params, runs: Runs, axis: int | None) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("params hold no arrays: there is nothing to learn")
    seeds = len(runs.key) if runs.many_keys else None
    for path, leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(
                f"params must be floating point: {leaf_name(path)} is {leaf.dtype}; convert it, "
                "e.g. jnp.asarray(w, jnp.float32)"
            )
        if axis is not None and (axis != 0 or seeds is None or leaf.shape[:1] != (seeds,)):
            raise ValueError(
                f"params_axis={axis} needs an array of keys and a leading axis of as many starts: {leaf_name(path)} "
                f"has shape {leaf.shape}, keys: {seeds}"
            )


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
