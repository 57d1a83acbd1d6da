"""Gradient descent, minibatch SGD and backprop in JAX: derivations checked, runs compared, noise predicted.

jaxgrad.check       is my hand-derived gradient right, and if not, which step is wrong?
jaxgrad.descent     the loop; `jaxgrad.sampling` is what separates GD from SGD
jaxgrad.noise       how noisy a minibatch gradient is, exactly and estimated
jaxgrad.theory      what descent must do, exactly, on these very data
jaxgrad.models, losses, lecture, optimum, statistics, data, timing: what those stand on
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


def __getattr__(name: str) -> Any:
    # Loaded on first use: `python -m jaxgrad.check --help` runs this file and has no need of JAX.
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("data", "descent", "rows", "sampling", "types"):  # what importing the names above brings along
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
