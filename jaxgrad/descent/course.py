"""What happens on the way to a pause of a run, and at the pause: steps, divergence, rules and records."""

import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import checks, parallel
from jaxgrad.descent import optimizers, programs, stopping
from jaxgrad.descent.beginning import Beginning
from jaxgrad.descent.job import Job
from jaxgrad.descent.log import Log, of_starts
from jaxgrad.descent.placement import Placement
from jaxgrad.descent.runs import keep
from jaxgrad.descent.schedule import Mark, Marks
from jaxgrad.descent.step import State
from jaxgrad.descent.stopping import NoImprovement
from jaxgrad.descent.trace import Trace
from jaxgrad.types import Key, Params


class Course:
    """Runs on their way over their rows. `log` has what has happened to them."""

    def __init__(self, job: Job, begin: Beginning, rows: Placement, pauses: Marks):
        """Put the first state of all runs where the rows are. All processes must have the same one."""
        if rows.mesh is not None:
            begin = _agreed(job, begin, rows, pauses)
        state = begin.first_state(job.steps, job.batch_losses)
        self._job, self._rows, self._begin, self._key = job, rows, begin, begin.runs.key
        self._start = state if rows.mesh is None else rows.put(state)
        self._clock = _Clock(stopping.limit(job.stop))
        self._compile_seconds = 0.0
        if job.observe is not None or job.evaluate_at is not None:
            with checks.saying("observe (or evaluate_at) cannot be evaluated for these params"):
                rows.recorded(self._start, self._key)
        points = self._checked_points() if any(isinstance(rule, NoImprovement) for rule in job.rules) else None
        self.log = Log(self._start, job.runs.shape, job.steps, job.rules, points)

    def compile(self) -> None:
        """Compile the steps. What is recorded compiles at the first record point."""
        began = time.perf_counter()
        jax.block_until_ready(self._advance(self._start, self._begin.first, self._job.halt))
        self._compile_seconds = time.perf_counter() - began

    def put(self, tree: Any) -> Any:
        """Move a pytree to where the steps need it."""
        return self._rows.put(tree)

    def expect_records(self) -> None:
        """Tell the log what will be recorded, so that a checkpoint can be saved before the first record."""
        self.log.expect(*self._rows.recorded(self._start, self._key))

    # --- the way to a pause ---

    def take(self, mark: Mark) -> None:
        """Take the steps to the pause, on the clock. The log gets the runs that end on the way, and at which step.

        The runs end early if a time limit is reached.
        """
        log, halt = self.log, self._job.halt
        shape = log.active.shape
        lost_at, lost_of_all = np.zeros(shape, np.int64), np.zeros(shape, bool)
        for to in self._clock.parts(log, mark.step):
            before, began = log.state, time.perf_counter()
            state = jax.block_until_ready(self._advance(before, to, halt))
            log.seconds += time.perf_counter() - began
            log.state = state if log.active.all() else keep(log.active, state, before)
            if (lost := log.active & ~np.asarray(self._rows.finite(log.state.params))).any():
                # The loop checks nothing. To find the step, the chunk runs again with a check at every step.
                watched = np.asarray(self._advance(before, to, programs.not_finite).step)
                log.end(lost, "diverged", watched)
                lost_of_all, lost_at = lost_of_all | lost, np.where(lost, watched, lost_at)
            if halt is not None and (small := log.active & np.asarray(log.state.halted)).any():
                log.end(small, f"stopped: {halt.reason}", np.asarray(log.state.step))
            if not log.over and self._clock.is_over(log.seconds):
                log.end(log.active.copy(), f"stopped: {stopping.TimeLimit.reason}", to)
            if log.over:
                break
        self._date(lost_of_all, lost_at)

    def _advance(self, state: State, until: int, halt: Any) -> State:
        return self._rows.advance(state, self._key, until, halt=halt)

    def _date(self, lost: np.ndarray, at: np.ndarray) -> None:
        """Correct the status of diverged runs that were not finite at the start."""
        first, log = self._begin.first, self.log
        # A single start is always checked, however late the run diverged: a minibatch may meet a bad row late.
        if (doubted := lost & (self._one_start | (at <= first + 1))).any():
            words = self._at_start(doubted)
            log.end(doubted & (words != ""), words, first)

    # --- at a pause ---

    def judge(self, mark: Mark) -> None:
        """Ask the rules that are due, on the clock."""
        for number in mark.judged if not self.log.over else ():
            began = time.perf_counter()
            value = self._judged(number)
            self.log.seconds += time.perf_counter() - began
            point = self._points(self.log.state) if self.log.best is not None else None
            self.log.judge(number, self._job.rules[number], value, mark.step, point)

    def record(self, mark: Mark) -> None:
        """Record what is due, off the clock; also where the last run ended."""
        if mark.recorded or self.log.over:
            self.log.record(mark.step, *self._rows.look(self.log.state, self._key))

    # --- the end ---

    def trace(self) -> Trace:
        """What the runs did. Where they ended may be their best point."""
        for number, rule in enumerate(self._job.rules):
            if isinstance(rule, NoImprovement):
                at = np.max(self.log.state.step)
                self.log.keep_best(self._judged(number), at, self._points(self.log.state))
        first, sampling, rows = self._begin.first, self._job.sampling, self._rows
        before = self._begin.examples - sampling.examples(first, rows.n)
        return self.log.trace(
            self._begin.runs,
            first,
            lambda at: before + sampling.examples(at, rows.n),
            # For rows in files, the loss at the start would need another pass.
            lambda: None if rows.in_files else np.asarray(rows.look(self._start, self._key)[0]),
            self._at_start,
            self._compile_seconds,
        )

    # --- what is evaluated ---

    def _judged(self, number: int) -> np.ndarray:
        return np.asarray(self._rows.judge(number, self.log.state, self._key))

    def _points(self, state: State) -> Params:
        """The parameters of all runs at which the loss is recorded."""
        evaluate_at = self._job.evaluate_at
        if evaluate_at is None:
            return optimizers.evaluated(state.params)
        seen = programs.seen_state(state, True)
        return programs.points(seen, evaluate_at=evaluate_at, over=self._job.runs.over)

    def _checked_points(self) -> Params:
        """The points of the start. Raises TypeError if a metric cannot be evaluated at those of one run."""
        points, axes = self._points(self._start), len(self._job.runs.shape)
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[axes:], leaf.dtype), points)
        for rule in self._job.rules:
            if isinstance(rule, NoImprovement):
                stopping.check_metric(rule, one)
        return points

    @property
    def _one_start(self) -> bool:
        return self._begin.ahead == 0

    def _at_start(self, which: Any) -> np.ndarray:
        """For each run in `which`, a sentence on what was not finite at its start; empty if all was finite."""
        start = (self._start.params, self._start.model)
        return of_starts(lambda start: _not_finite(start, self._rows, self._key), start, which, one=self._one_start)


def _agreed(job: Job, begin: Beginning, rows: Placement, pauses: Marks) -> Beginning:
    """The beginning on all devices. Raises an error unless all processes have the same one."""
    runs, start = begin.runs, begin.state or begin.params
    settings = (job.steps, pauses.steps_of_all, job.sampling.name, job.sampling.batch_size, job.memory)
    parallel.agree(start=start, key=runs.key, settings=settings, optimizer=runs.digest_settings())
    params, key = rows.put((begin.params, runs.key))
    return begin._replace(params=params, runs=runs._replace(key=key))


def _not_finite(start: tuple[Params, Any], rows: Placement, key: Key) -> str:
    params, model = start
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if bad := [checks.leaf_name(path) for path, leaf in leaves if not jnp.isfinite(leaf).all()]:
        return f"not finite at the start: the parameters have NaN or infinite entries in {', '.join(bad)}"
    return rows.at_start(params, model, key if key.ndim == 0 else key[0])


class _Clock:
    """Cuts the steps to the next pause into parts, so that a run ends soon after its time limit."""

    def __init__(self, limit: float):
        self._limit, self._part = limit, 1

    def parts(self, log: Log, until: int) -> Iterator[int]:
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
