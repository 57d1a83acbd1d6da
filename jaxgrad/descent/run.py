"""`descend`: the loop over the pauses of a run, wherever its rows are."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import jax
import numpy as np

from jaxgrad import checks, parallel
from jaxgrad.checks import Natural, Positive, checked
from jaxgrad.descent import checkpoint as saved
from jaxgrad.descent import run_tiles, stopping
from jaxgrad.descent.beginning import Beginning
from jaxgrad.descent.checkpoint import Checkpoint
from jaxgrad.descent.course import Course
from jaxgrad.descent.in_memory import in_memory
from jaxgrad.descent.job import Job
from jaxgrad.descent.keeper import Keeper
from jaxgrad.descent.objective import Objective
from jaxgrad.descent.on_disk import on_disk
from jaxgrad.descent.on_mesh import on_mesh
from jaxgrad.descent.optimizers import Optimizer
from jaxgrad.descent.placement import Placement
from jaxgrad.descent.runs import Runs
from jaxgrad.descent.schedule import marks
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
        see `log_spaced`. The full loss is evaluated there, off the clock: each point costs a pass over the data. Where
        that is too much, `record=2` records the two ends only, and `batch_losses` costs no pass.
      stop: a stopping rule besides the budget, or a list of them (`small_step`, `small_gradient`, `target_loss`,
        `no_improvement`, `keep_best`, `time_limit`).
      observe: `observe(params) -> pytree` of whatever else to record, e.g. accuracy; or `observe(params, state)` with
        the `State` of the run: its step, the optimizer's state, the last update, the state of the loss. Off the clock.
      params_axis: 0 if `params` has a leading axis of s starts, one per key; all step sizes share them.
      progress: True shows a line on stderr; or a function of `(step, steps)`.
      checkpoint: save the run as it goes, and go on from what was saved. SIGTERM and Ctrl-C then end it at the next
        record point or checkpoint, the same on every process, with `parallel.Preempted` (exit status 75).
        A resumed run may ask for more `steps` and for another `record`: these count from the checkpoint on, and the
        record points before it stay.
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
    begin = Beginning.of(Runs.of(optimizer, sweep, key), params, params_axis, loss_state)
    job = Job.of(
        Objective.of(loss, random, begin.model is not None, has_aux, evaluate),
        begin,
        sampling,
        observe=observe,
        evaluate_at=evaluate_at,
        stop=stopping.rules("stop", stop),
        batch_losses=batch_losses,
        memory=memory,
        steps=steps,
    )
    checkpoint = None if checkpoint is None else saved.plain(checkpoint)
    show = _progress(progress)
    with closing(place(job, data)) as rows:
        pauses = marks(record, begin.first, steps, job.rules, checkpoint.every if checkpoint else None)
        keeper = Keeper.of(checkpoint, job, rows)
        course = Course(job, begin, rows, pauses)
        course.compile()
        with keeper.keeping(course) as keep:
            for mark in pauses.after(course.log.done):
                if course.log.over:
                    break
                course.take(mark)
                course.judge(mark)
                course.record(mark)
                show(mark.step, steps)
                keep(mark)
        return course.trace()


# --- where the rows are -----------------------------------------------------------------------------------------


def place(job: Job, data: Any) -> Placement:
    """The placement of these data. Raises ValueError or TypeError if the job cannot be done there."""
    if isinstance(data, Rows):
        if job.runs.shape:
            raise ValueError("rows on disk serve one run on one device: give one key and one step size")
        return on_disk(job, data)
    return on_mesh(job, data) if isinstance(data, parallel.Sharded) else in_memory(job, data)


# --- what is given ----------------------------------------------------------------------------------------------


def _progress(progress: bool | Callable[[int, int], None]) -> Callable[[int, int], None]:
    if callable(progress) and not isinstance(progress, type):
        return checks.function("progress", progress, 2)
    if not isinstance(progress, bool | np.bool_):
        raise TypeError(f"progress must be True, False or a function of (step, steps), got {checks.shown(progress)}")
    if not progress or not parallel.is_main():
        return lambda step, steps: None

    def line(step: int, steps: int) -> None:
        end = "\n" if step == steps else ""
        print(f"\rstep {step:,} of {steps:,}", end=end, file=sys.stderr, flush=True)

    return line
