"""What a mistake is: a class with its mathematics, its price and its sentence.

A mistake changes what one step sends back, so its gradient is g + Σ J_vᵀ Δ_v over the values v that it reaches
directly (`replay`). `change` gives the Δ_v at a point, `sentence` says it in the words of the derivation, `cost`
is how far-fetched it is. A mistake with `free` has one unknown number in it, the c of g + c Σ J_vᵀ Δ_v, which must
be the same at every point.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.program.replay import Plan, Replay, forward
from jaxgrad.check.program.steps import Program, Step

if TYPE_CHECKING:
    Array = np.ndarray
else:
    # NumPy makes a scalar of an array without axes, which a type checker does not let pass for one.
    Array = np.ndarray | np.generic
Change = Mapping[int, Any] | None


@runtime_checkable
class Mistake(Protocol):
    """One way to do one step wrong."""

    @property
    def kind(self) -> str: ...

    @property
    def cost(self) -> float: ...

    @property
    def free(self) -> bool:
        """Whether one number in it is unknown."""
        ...

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps it is about; the last one makes the value."""
        ...

    def change(self, at: "At") -> Change:
        """By value: what is sent minus what should be; None where the step is not of that kind."""
        ...

    def sentence(self, say: "Say", factor: str | None) -> str:
        """The mistake without a full stop; `factor` is the exact form of the unknown number, if it has one."""
        ...


class OfStep:
    """A mistake in one step."""

    step: int

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.step,)


class OfMembers:
    """A mistake in a run of steps."""

    members: tuple[int, ...]

    @property
    def steps(self) -> tuple[int, ...]:
        return self.members


@runtime_checkable
class Say(Protocol):
    """How steps and values are called in the person's own code."""

    def name(self, slot: int) -> str: ...

    def at(self, step: int) -> str:
        """`statement` (file:line)."""
        ...

    def operand(self, step: int, number: int) -> str: ...


class At:
    """A program at one point: values, adjoints, and what a step would send if something were different."""

    def __init__(self, program: Program, todo: Plan, replay: Replay, leaves: Any, data: Any):
        self.program, self.todo, self.replay = program, todo, replay
        self._inputs = (leaves, data)
        self.mean: bool | None = None
        """Whether the loss is a mean over the examples or a sum, where that was asked."""
        self.origin: int | None = None
        """The value whose adjoint is the first in the person's code that has a wrong factor, where that is known."""

    @cached_property
    def values(self) -> dict[int, Any]:
        """Every value, constants and whole numbers too."""
        return {s: np.asarray(v) for s, v in forward(self.program, *self._inputs).items()}

    @cached_property
    def makers(self) -> dict[int, int]:
        """The step that makes a value."""
        return {o: k for k, step in enumerate(self.program.steps) for o in step.outputs}

    @cached_property
    def users(self) -> dict[int, tuple[tuple[int, int], ...]]:
        """The steps that take a value, and as which operand."""
        found: dict[int, list[tuple[int, int]]] = {}
        for k, step in enumerate(self.program.steps):
            for i, s in enumerate(step.inputs):
                found.setdefault(s, []).append((k, i))
        return {s: tuple(pairs) for s, pairs in found.items()}

    def shape(self, slot: int) -> tuple[int, ...]:
        return tuple(self.program.avals[slot].shape)

    def adjoint(self, slot: int) -> Array | None:
        found = self.replay.adjoints.get(slot)
        return None if found is None else np.asarray(found)

    def out(self, k: int) -> Array | None:
        """The adjoint of a step's only output."""
        outputs = self.program.steps[k].outputs
        return self.adjoint(outputs[0]) if len(outputs) == 1 else None

    def contribution(self, k: int, operand: int) -> Array | None:
        found = self.replay.contributions.get((k, operand))
        return None if found is None else np.asarray(found)

    def pulled(
        self,
        k: int,
        operand: int,
        adjoint: Any,
        instead: Mapping[int, Any] | None = None,
        call: Callable[..., Any] | None = None,
    ) -> Array | None:
        """What step k sends to an operand for this adjoint, with other values of its operands or another function.

        None if a shape does not fit.
        """
        step: Step = self.program.steps[k]
        arguments = [jnp.asarray(self.values[s]) for s in step.inputs]
        for i, value in (instead or {}).items():
            arguments[i] = jnp.asarray(value, arguments[i].dtype)

        def function(x: Any) -> Any:
            full = [*arguments[:operand], x, *arguments[operand + 1 :]]
            return call(*full) if call is not None else step.call(*full)[0]

        try:
            out, back = jax.vjp(function, arguments[operand])
            if out.shape != np.shape(adjoint):
                return None
            return np.asarray(back(jnp.asarray(adjoint, out.dtype))[0])
        except (TypeError, ValueError):
            return None

    def moved(self, k: int, operand: int, tangent: Any) -> Array | None:
        """The derivative of step k's only output along a direction of one operand."""
        step = self.program.steps[k]
        arguments = [jnp.asarray(self.values[s]) for s in step.inputs]

        def function(x: Any) -> Any:
            return step.call(*arguments[:operand], x, *arguments[operand + 1 :])[0]

        try:
            start = arguments[operand]
            return np.asarray(jax.jvp(function, (start,), (jnp.asarray(tangent, start.dtype),))[1])
        except (TypeError, ValueError, NotImplementedError):
            return None
