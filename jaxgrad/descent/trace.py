"""What a run did: a table, a picture, and a few lines of text."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxgrad import checks
from jaxgrad.descent.step import State
from jaxgrad.types import Params


class Best(NamedTuple):
    """For each run, the point with the lowest metric of `no_improvement` or `keep_best`."""

    params: Params
    """The parameters there, leaves `[(m,) (s,) …]`."""
    value: np.ndarray
    """float64[(m,) (s,)]: the metric there; infinite if it was never finite."""
    step: np.ndarray
    """int64[(m,) (s,)]: the steps taken until then."""


class Trace(NamedTuple):
    """What a run did, at its k record points.

    With m settings of the optimizer, s keys or both, per-run entries have leading axes `(m,) (s,)`: entry `[i, j]` is
    the run with setting i and key j.

    A run that diverged has NaN losses from there on; one that stopped early keeps its last values. The record goes on
    as long as any run does: what a run did itself are the record points up to its `stopped_at`.

        run.to_frame()                 a tidy pandas table, one row for each run and record point
        run.plot(x="examples")         medians and bands over the keys, one curve for each setting
        print(run)                     how the runs ended, on one screen
    """

    steps: np.ndarray
    """int64[k]: updates made."""
    examples: np.ndarray
    """int64[k]: gradients of single examples evaluated: `steps · b`, plus those of the run that it continues."""
    seconds: np.ndarray
    """float64[k]: wall-clock time of the steps, all runs of the program together, without compiling and recording."""
    loss: np.ndarray
    """[(m,) (s,) k]: the full loss, or the value of `evaluate`."""
    step_norm: np.ndarray
    """[(m,) (s,) k]: `‖w_t − w_{t−1}‖`, the size of the last step (F3)."""
    observed: Any
    """What `observe` returned, each leaf `[(m,) (s,) k, …]`; None without `observe`."""
    params: Params
    """Final parameters, leaves `[(m,) (s,) …]`; numpy arrays if the runs went in several tiles."""
    state: State
    """Final state: give it to `descend` in place of `params` to go on."""
    status: Any
    """How the run ended, in words. Words lie in tuples, not in an array: one for each key within one for each setting,
    so `status[i][j]` is of setting i and key j, and `np.array(status)` has the shape of `stopped_at`.

    `finished`                       all steps were taken
    `stopped: <rule>`                a stopping rule ended it
    `diverged at step t`             its parameters ceased to be finite there
    `grew: ...`                      all steps were taken, but the last loss is over 1,000 times the first one, or is
                                     not finite
    `not finite at the start: ...`   the loss or its gradient at the start is NaN or infinite; no step size would help
    """
    stopped_at: np.ndarray
    """int64[(m,) (s)]: the step at which the run ended, stopped or diverged."""
    compile_seconds: float
    """Time to trace and compile the step program; about 0 if it was compiled before."""
    aux: Any = None
    """What the loss returned besides its value at the record points (`has_aux`); each leaf `[(m,) (s,) k, …]`."""
    batch_loss: Any = None
    """[(m,) (s,) steps]: the loss of each step's own batch, before the step (`batch_losses`); NaN for steps that were
    not taken. A continued run has only its own steps; the last entry is that of the last step."""
    best: Best | None = None
    """The point with the lowest metric of `no_improvement` or `keep_best`."""
    settings: Any = None
    """The settings of the optimizer by name: each `[m]`, or a number for one setting; empty if none are known."""

    def to_frame(self) -> Any:
        """A tidy pandas table: one row for each run and record point.

        Columns: `run` (from 0), `step_size` (NaN if it is not known), `seed` (number of the key, from 0), `step`,
        `examples`, `seconds`, `loss`, `step_norm`, `stopped_at` and `status` (how and when the run ended; rows with
        `step > stopped_at` repeat its last values); then one for each swept setting, and one for each number that
        `observe` or the loss (`aux`) returned, by its name. Raises ImportError without pandas.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError("Trace.to_frame needs pandas: pip install pandas") from None
        k = len(self.steps)
        m, s = self._sizes()
        setting, seed = (each.reshape(-1) for each in np.indices((m, s)))
        columns: dict[str, Any] = {
            "run": np.repeat(np.arange(m * s), k),
            "step_size": np.repeat(self._of_settings(self._step_sizes(), m)[setting], k),
            "seed": np.repeat(seed, k),
            "step": np.tile(self.steps, m * s),
            "examples": np.tile(self.examples, m * s),
            "seconds": np.tile(self.seconds, m * s),
            "loss": np.asarray(self.loss).reshape(-1),
            "step_norm": np.asarray(self.step_norm).reshape(-1),
            "stopped_at": np.repeat(np.reshape(self.stopped_at, -1), k),
            "status": np.repeat(np.array(flat(self.status), object), k),
        }
        for name, values in (self.settings or {}).items():
            if name != "step_size":
                columns[name] = np.repeat(self._of_settings(values, m)[setting], k)
        for kind, tree in (("observed", self.observed), ("aux", self.aux)):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                if np.size(leaf) == m * s * k:
                    name = jax.tree_util.keystr(path, simple=True, separator=".") or kind
                    columns[name if name not in columns else f"{kind}.{name}"] = np.asarray(leaf).reshape(-1)
        return pandas.DataFrame(columns)

    def plot(self, x: str = "steps", *, of: str = "loss", axes: Any = None) -> Any:
        """Draw the loss (or `of="step_norm"`, `"batch_loss"`) against `"steps"`, `"examples"` or `"seconds"`.

        One curve for each setting: the median over the keys, with a band from the first to the ninth decile. Returns
        the matplotlib axes; give `axes` to draw into your own. Raises ImportError without matplotlib.
        """
        from jaxgrad.descent.picture import draw

        checks.one_of("x", x, ("steps", "examples", "seconds"))
        checks.one_of("of", of, ("loss", "step_norm", "batch_loss"))
        return draw(self, x, of, axes)

    def __repr__(self) -> str:
        m, s = self._sizes()
        shape = np.shape(self.stopped_at)
        kinds: dict[str, list[int]] = {}
        for i, word in enumerate(flat(self.status)):
            kinds.setdefault(word.split(" at step")[0].split(":")[0], []).append(i)
        what = f"{m * s} runs" if shape else "one run"
        many = f" ({m} settings x {s} keys)" if len(shape) == 2 else ""
        last = self.steps[-1] if len(self.steps) else 0
        upto = "up to " if np.min(self.stopped_at) < last else ""
        lines = [
            f"Trace of {what}{many}: {upto}{last:,} steps, {self.examples[-1]:,} examples each, "
            f"{self.seconds[-1]:.3g} s of steps, {len(self.steps)} record points"
        ]
        lines += [f"  {line}" for line in self._endings(m, s)]
        words = flat(self.status)
        if len(words) == 1:
            lines.append(f"  status: {words[0]}")
        else:
            lines += [f"  {len(which)} {kind}{self._example(words, which)}" for kind, which in kinds.items()]
        if self.best is not None:
            value, step = np.ravel(self.best.value), np.ravel(self.best.step)
            lines.append(f"  best metric {_range(value)} at step {_range(step)}")
        there = [name for name in ("observed", "aux", "batch_loss", "best") if getattr(self, name) is not None]
        lines.append(f"  holds {', '.join(['loss', 'step_norm', *there, 'params', 'state'])}; .to_frame(), .plot()")
        return "\n".join(lines)

    def _endings(self, m: int, s: int) -> Iterator[str]:
        """Lines with the first and the last loss of each of the first settings."""
        loss = np.asarray(self.loss, float).reshape(m, s, -1)
        most = 12
        for i in range(min(m, most)):
            named = ", ".join(
                f"{name} {self._of_settings(values, m)[i]:.4g}" for name, values in (self.settings or {}).items()
            )
            over = f" (median of {s}, {_range(loss[i, :, -1])})" if s > 1 else ""
            with np.errstate(all="ignore"):
                first, last = (_median(loss[i, :, at]) for at in (0, -1))
            yield f"{named + ': ' if named else ''}loss {first:.4g} -> {last:.4g}{over}"
        if m > most:
            yield f"... and {m - most} more settings"

    def _example(self, words: list[str], which: list[int]) -> str:
        own = words[which[0]]
        detail = own if ":" in own or " at step" in own else ""
        return f", e.g. run {which[0]}: {detail}" if detail else ""

    def _sizes(self) -> tuple[int, int]:
        """The numbers of settings and of keys; 1 if there is no such axis."""
        shape = np.shape(self.stopped_at)
        if len(shape) == 2:
            return shape  # type: ignore[return-value]
        swept = any(np.ndim(each) for each in (self.settings or {}).values())
        return (shape[0] if shape and swept else 1), (shape[0] if shape and not swept else 1)

    def _step_sizes(self) -> Any:
        known = self.settings or {}
        return known.get("step_size", known.get("learning_rate", np.nan))

    def _of_settings(self, values: Any, m: int) -> np.ndarray:
        return np.broadcast_to(np.asarray(values, float), (m,))


def flat(status: Any) -> list[str]:
    """The status of each run, in their order."""
    return [status] if isinstance(status, str) else [word for each in status for word in flat(each)]


def _median(values: np.ndarray) -> float:
    fine = values[~np.isnan(values)]
    return float(np.median(fine)) if len(fine) else float("nan")


def _range(values: np.ndarray) -> str:
    fine = values[~np.isnan(np.asarray(values, float))]
    if not len(fine):
        return "nan"
    low, high = fine.min(), fine.max()
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"
