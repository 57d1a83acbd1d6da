"""Gradient descent, minibatch SGD and backprop in JAX: derivations checked, runs compared, noise predicted.

    check           is my hand-derived gradient right, and if not, which step is wrong?
    descent         the loop. What people call: `descend`. What it is made of: `descent/__init__.py` lists the rooms
    sampling        which examples a step sees; this is what separates GD from SGD
    noise           how noisy a minibatch gradient is, exactly and estimated
    theory          what descent must do on given data, exactly
    lecture         the formulas F1 to F16 by hand, as printed and as they must be
    models, losses  pure functions of parameter pytrees
    means           whether a loss is a mean over the examples, proved from its traced program
    optimum         a minimum with a certified bound
    statistics      intervals and tests
    parallel        many devices and many processes; `launch` starts them
    rows            tables on disk that memory does not hold
    atomic          a file whole or not at all
    data            real data sets, a person's own files, problems with a known answer
    timing          one stopwatch

How data walk through a run. `data.load` or `open_rows` gives a batch or rows; `parallel.shard` puts a batch on
several devices. `descend` puts step sizes and keys side by side (`runs`), asks for a place of the rows (`placement`:
in memory, on a mesh, on disk), compiles what runs between two pauses (`programs`), and keeps what has happened to
each run (`log`), which ends as a `Trace`.

How a gradient walks through a check. The loss becomes a program of steps (`check/program`), loss and gradient are
evaluated at drawn points (`evaluate`), and where they differ reverse mode is replayed with one step done wrong
(`faults`, `search`) until the person's numbers come out. `follow` looks for the first wrong line of the
person's own code.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgrad.descent import Checkpoint, descend, log_spaced, no_improvement, small_gradient, small_step
    from jaxgrad.rows import open_rows
    from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
    from jaxgrad.types import Batch

__all__ = [
    "Batch", "Checkpoint", "descend", "distinct", "full_batch", "log_spaced", "no_improvement", "open_rows",
    "reshuffled", "small_gradient", "small_step", "with_replacement",
]  # fmt: skip

_HOMES = {
    "Batch": "types",
    "Checkpoint": "descent",
    "descend": "descent",
    "distinct": "sampling",
    "full_batch": "sampling",
    "log_spaced": "descent",
    "no_improvement": "descent",
    "open_rows": "rows",
    "reshuffled": "sampling",
    "small_gradient": "descent",
    "small_step": "descent",
    "with_replacement": "sampling",
}


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


def __getattr__(name: str) -> Any:
    # Loaded on first use: `python -m jaxgrad.check --help` runs this file and has no need of JAX.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("data", "descent", "rows", "sampling", "types"):  # what importing the names above brings along
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
