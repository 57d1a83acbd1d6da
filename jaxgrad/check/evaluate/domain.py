"""Where a loss means what its author means: points at which its own iterations have settled.

A loss that iterates to a fixed point is the fixed point's loss only where the iteration converges, and a derivation
by the implicit function theorem is right there and nowhere else. The iteration shows it: one more sweep changes
nothing. Where that holds at the given point, it is asked of every other point too.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.evaluate.problem import Kernel, program_at, shape_key
from jaxgrad.check.program.replay import forward, quick_jit
from jaxgrad.check.program.steps import Program, Step, scan_counts

SETTLED = 1e-6
"""An iteration whose last sweep changes its state by less than this, relatively, has found its fixed point."""

_FEWEST_SWEEPS = 8


def unsettled(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> list[float]:
    """For each iteration of the loss how much its last sweep changed the state, relative to its norm."""
    program = program_at(store, leaves, data)
    key = ("sweeps", shape_key(leaves, data))
    if key not in store.compiled:
        looping = any(step.primitive in ("scan", "while") for step in program.steps)
        run = quick_jit(lambda ls, ds: _changes(program, ls, ds)) if looping or _unrolled(program) else None
        store.compiled[key] = run
    run = store.compiled[key]
    return [] if run is None else [float(x) for x in run(list(leaves), list(data))]


class Domain(NamedTuple):
    """Where the iterations of a loss settle, as functions of leaves and data."""

    inside: Callable[[Sequence[Any], Sequence[Any]], bool]
    """Whether those that settle at the given point settle there too."""
    change: Callable[[Sequence[Any], Sequence[Any]], float]
    """By how much their last sweep still changes the state: how far from the fixed point they stop."""


def around(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> Domain:
    """The domain of a loss that is given with these leaves and data; everything, where nothing iterates."""
    start = unsettled(store, leaves, data)
    steady = [i for i, change in enumerate(start) if change < SETTLED]
    if not steady:
        return Domain(lambda leaves, data: True, lambda leaves, data: 0.0)

    def inside(leaves: Sequence[Any], data: Sequence[Any]) -> bool:
        here = unsettled(store, leaves, data)
        return len(here) != len(start) or all(here[i] <= max(1e-12, start[i]) for i in steady)

    def change(leaves: Sequence[Any], data: Sequence[Any]) -> float:
        here = unsettled(store, leaves, data)
        return max(here[i] for i in steady) if len(here) == len(start) else 0.0

    return Domain(inside, change)


def _changes(program: Program, leaves: Sequence[Any], data: Sequence[Any]) -> list[Any]:
    values = forward(program, leaves, data)
    found = []
    for step in program.steps:
        if step.primitive in ("scan", "while"):
            before, after = _one_more(step, [values[s] for s in step.inputs], [values[s] for s in step.outputs])
            if before:
                found.append(_relative(before, after))
    found += [_relative([values[a]], [values[b]]) for a, b in _unrolled(program)]
    return found


def _one_more(step: Step, inputs: list[Any], outputs: list[Any]) -> tuple[list[Any], list[Any]]:
    """The state that a loop ends with, and what one more sweep makes of it: its floating parts."""
    if step.primitive == "while":
        first = step.params["cond_nconsts"]
        consts = inputs[first : first + step.params["body_nconsts"]]
        body, state, rest = step.params["body_jaxpr"], outputs, []
    else:
        if step.params["length"] < _FEWEST_SWEEPS:
            return [], []
        constants, carried = scan_counts(step.params)
        consts, state = inputs[:constants], outputs[:carried]
        last = 0 if step.params["reverse"] else -1
        body, rest = step.params["jaxpr"], [x[last] for x in inputs[constants + carried :]]
    after = jex.jaxpr_as_fun(body)(*consts, *state, *rest)[: len(state)]
    moving = [i for i, x in enumerate(state) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return [state[i] for i in moving], [after[i] for i in moving]


def _unrolled(program: Program) -> list[tuple[int, int]]:
    """The last two values of each line that a Python loop ran many times."""
    groups: dict[Any, list[int]] = {}
    for step in program.steps:
        if step.frames and step.outputs[0] in program.moving:
            key = (step.frames, step.primitive, program.avals[step.outputs[0]].shape)
            groups.setdefault(key, []).append(step.outputs[0])
    return [(slots[-2], slots[-1]) for slots in groups.values() if len(slots) >= _FEWEST_SWEEPS]


def _relative(before: Sequence[Any], after: Sequence[Any]) -> Any:
    gap = sum(jnp.sum(jnp.abs(b - a) ** 2) for a, b in zip(before, after, strict=True))
    size = sum(jnp.sum(jnp.abs(a) ** 2) for a in before)
    return jnp.sqrt(gap) / jnp.maximum(jnp.sqrt(size), np.finfo(np.float64).tiny)
