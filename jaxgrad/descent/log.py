"""The log of all runs so far: losses at the record points, and how and when each run ended."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.descent.runs import Runs, chosen
from jaxgrad.descent.step import State
from jaxgrad.descent.stopping import Judged, NoImprovement, memory
from jaxgrad.descent.trace import Best, Trace
from jaxgrad.types import Params

GREW, LEAST = 1000, 1e-6
"""The status of a run says so if its last loss is over `GREW` times its first one, or `GREW` times `LEAST`."""


class Log:
    """The state of all runs after the last pause, and the record of all before."""

    def __init__(self, state: State, shape: tuple[int, ...], steps: int, rules: Sequence[Judged], point: Params):
        self.state, self.steps = state, steps
        self.active = np.ones(shape, bool)
        self.reason = np.full(shape, "finished", dtype=object)
        self.ended = np.full(shape, steps, dtype=np.int64)
        self.memory = [memory(rule, shape) for rule in rules]
        best = any(isinstance(rule, NoImprovement) for rule in rules)
        self.best = Best(point, np.full(shape, np.inf), np.zeros(shape, np.int64)) if best else None
        self.seconds = 0.0
        self.done = -1
        """The step of the checkpoint that the runs go on from; -1 if there is none."""
        self.seen: list[tuple[Any, ...]] = []
        self._nothing: tuple[Any, ...] = ()

    def expect(self, aux: Any, observed: Any) -> None:
        """Set the structure of what will be recorded, so that a checkpoint can be saved before the first record."""
        self._nothing = jax.tree.map(lambda _: np.zeros(0), (0, 0.0, 0.0, 0.0, aux, observed))

    @property
    def over(self) -> bool:
        """Whether every run has ended."""
        return not self.active.any()

    def end(self, which: Any, why: Any, at: Any) -> None:
        """Note that these runs ended, why, and at which step."""
        shape = self.active.shape
        self.reason[which], self.ended[which] = np.broadcast_to(why, shape)[which], np.broadcast_to(at, shape)[which]
        self.active[which] = False

    def judge(self, number: int, rule: Judged, value: np.ndarray, at: int, point: Params) -> None:
        """End the runs for which a rule is met; keep the best parameters where the rule has a metric."""
        met, self.memory[number] = rule.met(value, self.memory[number])
        if isinstance(rule, NoImprovement):
            self.keep_best(value, at, point)
        if (met := self.active & met).any():
            self.end(met, f"stopped: {rule.reason}", np.asarray(at))

    def keep_best(self, value: np.ndarray, at: Any, point: Params) -> None:
        """Keep the points with a lower metric. A run that a rule has ended is where it ended, so the end counts."""
        assert self.best is not None
        better = ~is_lost(self.reason) & (value < self.best.value)
        self.best = Best(
            chosen(better, point, self.best.params),
            np.where(better, value, self.best.value),
            np.where(better, np.where(self.active, at, self.ended), self.best.step),
        )

    def record(self, mark: int, loss: Any, norm: Any, aux: Any, observed: Any) -> None:
        """Record what was evaluated at a record point, or where the last run ended."""
        at = int(self.ended.max()) if self.over else mark
        lost = is_lost(self.reason)
        self.seen.append((at, self.seconds, np.where(lost, np.nan, loss), np.asarray(norm), aux, observed))

    # --- a checkpoint ---

    def saved(self) -> Any:
        """All of it as arrays."""
        stacked = (lambda *leaves: np.stack(leaves)) if self.seen else (lambda leaf: leaf)
        columns = jax.tree.map(stacked, *(self.seen or [self._nothing]))
        reasons = self.reason.astype("U") if self.reason.ndim else np.array(str(self.reason))
        return (self.state, columns, self.active, reasons, self.ended, self.memory, self.best, self.seconds)

    def resume(self, found: Any, put: Callable[[Any], Any]) -> None:
        """Go on from what `saved` returned."""
        state, columns, active, reason, ended, memory, best, seconds = found
        if (done := int(np.max(state.step))) > self.steps:
            raise ValueError(
                f"the run of this checkpoint has already taken {done} steps: steps counts from the first one, got "
                f"{self.steps}"
            )
        if state.batch_loss is not None:
            room = np.array(self.state.batch_loss)
            most = min(room.shape[-1], state.batch_loss.shape[-1])
            room[..., :most] = state.batch_loss[..., :most]
            state = state._replace(batch_loss=room)
        self.state, self.best = put(state), best if best is None else best._replace(params=put(best.params))
        self.seen = [jax.tree.map(lambda leaf, i=i: leaf[i], columns) for i in range(len(columns[0]))]
        # The budget of steps may be another one now.
        self.active, self.reason, self.ended = active, reason.astype(object), np.where(active, self.ended, ended)
        self.memory, self.seconds = memory, float(seconds)
        self.done = done

    # --- the end ---

    def trace(
        self, runs: Runs, first: int, examples: Callable[[Any], Any], loss_first: Any, at_start: Any, compiled: float
    ) -> Trace:
        """Make the trace. `loss_first()` is the loss at the start; `at_start(which)` says what is not finite there."""
        axes = len(self.active.shape)
        at, clock, losses, norms, aux, observed = zip(*self.seen, strict=True)
        loss_at = np.stack(losses, axes)
        start = loss_at[..., 0] if at[0] == first else loss_first()
        start = loss_at[..., 0] if start is None else start
        reason = self.reason
        if (never := (reason == "finished") & ~np.isfinite(start)).any():
            reason = np.where(never, at_start(never), reason)
        grown = _growth(start, loss_at[..., -1])
        reason = np.where((reason == "finished") & (grown != ""), grown, reason)
        pairs = zip(reason.reshape(-1).tolist(), self.ended.reshape(-1).tolist(), strict=True)
        status = [f"diverged at step {t}" if why == "diverged" else str(why) for why, t in pairs]
        together = lambda trees: jax.tree.map(lambda *leaves: np.stack(leaves, axes), *trees)
        state = self.state
        batch_loss = None if state.batch_loss is None else np.asarray(state.batch_loss)[..., first : max(at)]
        return Trace(
            steps=np.asarray(at, np.int64),
            examples=examples(np.asarray(at, np.int64)),
            seconds=np.asarray(clock),
            loss=loss_at,
            step_norm=np.stack(norms, axes),
            observed=together(observed),
            params=state.params,
            state=state._replace(examples=examples(np.asarray(state.step, np.int64)), batch_loss=None),
            status=_tuples(np.array(status, object).reshape(self.active.shape).tolist()),
            stopped_at=self.ended,
            compile_seconds=compiled,
            aux=together(aux),
            batch_loss=batch_loss,
            best=self.best,
            settings=runs.settings,
        )


def is_lost(reason: np.ndarray) -> np.ndarray:
    """Which runs have parameters that are not finite."""
    return np.vectorize(lambda why: str(why).startswith(("diverged", "not finite")), otypes=[bool])(reason)


def _growth(first: np.ndarray, last: np.ndarray) -> np.ndarray:
    """For each run, a remark if its loss grew; else an empty text."""

    def words(first: float, last: float) -> str:
        if not np.isfinite(last):
            return f"grew: the loss ended at {last}"
        if last > GREW * max(abs(first), LEAST):
            return f"grew: the loss went from {first:.3g} to {last:.3g}"
        return ""

    return np.vectorize(words, otypes=[object])(first, last)


def of_starts(words: Callable[[Params], str], params: Params, which: Any, one: bool) -> np.ndarray:
    """`words(start)` for each run in `which`. If all runs have `one` start, it is evaluated once."""
    found = np.full(np.shape(which), "", dtype=object)
    for place in np.argwhere(which):
        index = tuple(place)
        found[index] = words(jax.tree.map(lambda leaf, index=index: jnp.asarray(leaf)[index], params))
        if one:
            found[which] = found[index]
            break
    return found


def _tuples(nested: Any) -> Any:
    return tuple(map(_tuples, nested)) if isinstance(nested, list) else nested
