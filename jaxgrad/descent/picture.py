"""A trace as a picture."""

from typing import Any

import numpy as np

LABELS = {
    "steps": "steps",
    "examples": "examples (gradients of one)",
    "seconds": "seconds of steps",
    "loss": "full loss",
    "step_norm": "size of a step",
    "batch_loss": "loss of the step's batch",
}


def draw(trace: Any, x: str, of: str, axes: Any) -> Any:
    """Medians over the keys, with bands from the first to the ninth decile, one curve for each setting."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise ImportError("Trace.plot needs matplotlib: pip install matplotlib") from None
    values = getattr(trace, of)
    if values is None:
        raise ValueError("there is no batch_loss to draw: run descend(..., batch_losses=True)")
    m, s = trace._sizes()
    curves = np.asarray(values, float).reshape(m, s, -1)
    along = _along(trace, x, of, curves.shape[-1])
    if axes is None:
        axes = pyplot.subplots(figsize=(6.4, 4), layout="constrained")[1]
    colours = pyplot.get_cmap("viridis")(np.linspace(0, 0.85, m)) if m > 1 else ["C0"]
    for i in range(m):
        own = np.where(np.isfinite(curves[i]), curves[i], np.nan)
        seen = ~np.isnan(own).all(axis=0)
        low, middle, high = np.full((3, len(along)), np.nan)
        if seen.any():
            low[seen], middle[seen], high[seen] = np.nanquantile(own[:, seen], [0.1, 0.5, 0.9], axis=0)
        axes.plot(along, middle, color=colours[i], label=_named(trace, i, m, s))
        if s > 1:
            axes.fill_between(along, low, high, color=colours[i], alpha=0.25, linewidth=0)
    finite = curves[np.isfinite(curves)]
    if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
        axes.set_yscale("log")
    axes.set_xlabel(LABELS[x])
    axes.set_ylabel(LABELS[of])
    if m > 1 or s > 1:
        axes.legend(fontsize="small", frameon=False)
    return axes


def _along(trace: Any, x: str, of: str, count: int) -> np.ndarray:
    """The positions on the horizontal axis, one for each value of a curve."""
    if of != "batch_loss":
        return np.asarray(getattr(trace, x), float)
    steps = trace.steps[-1] - count + np.arange(1, count + 1)
    return steps if x == "steps" else np.interp(steps, trace.steps, getattr(trace, x))


def _named(trace: Any, i: int, m: int, s: int) -> str:
    settings = trace.settings or {}
    own = [f"{name.replace('_', ' ')} {trace._of_settings(values, m)[i]:.3g}" for name, values in settings.items()]
    return ", ".join(own) + (f"{': ' if own else ''}median of {s}, deciles 1 to 9" if s > 1 and i == 0 else "")
