"""The loss that a run minimises, in any of its forms: one signature for the step, one for the recorded loss.

    loss(params, batch)                       a number
    loss(params, batch, key=...)              `random=True`: dropout, augmentation, any draw of its own
    loss(params, batch, state=...)            `loss_state=...`: running statistics, returned with the value
    ... -> (value, aux)                       `has_aux=True`: other numbers that it computes

A loss with state returns `(value, new_state)`; with both, `(value, (new_state, aux))`, as `jax.value_and_grad` wants
them. The arguments `key` and `state` go by name, so their order does not matter.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxgrad import checks
from jaxgrad.types import Key, Params

_LOSSES_OWN = 0x6C6F7373  # "loss"


def loss_key(key: Key, step: Any) -> Key:
    """The key that a loss with `random=True` gets at step `step` (counted from 0) of the run with key `key`.

    `fold_in(fold_in(key, 0x6c6f7373), step)`: a pure function of both, so a step draws the same numbers alone, beside
    other runs, after a resume and on any number of devices. It is independent of the order of the examples, which
    comes from `key` too.
    """
    return jax.random.fold_in(jax.random.fold_in(key, _LOSSES_OWN), step)


def recorded_key(key: Key) -> Key:
    """The one key with which the recorded loss of the run with key `key` is evaluated: that of step 2³² − 1.

    It is the same at every record point, so that draws do not move the curve.
    """
    return loss_key(key, jnp.uint32(2**32 - 1))


class Objective(NamedTuple):
    """A loss and its form. Equal functions give equal objectives, so that compiled programs are found again."""

    loss: Any
    random: bool = False
    stateful: bool = False
    has_aux: bool = False
    evaluate: Any = None
    """Recorded in place of the loss: the same form, without a new state."""
    evaluates: tuple[str, ...] = ()
    """Which of `key` and `state` the function `evaluate` takes."""

    @classmethod
    def of(cls, loss: Any, random: bool, stateful: bool, has_aux: bool, evaluate: Any) -> "Objective":
        """The objective from the arguments of `descend`."""
        names = [name for name, there in (("key", random), ("state", stateful)) if there]
        if evaluate is not None:
            checks.function("evaluate", evaluate)
        if isinstance(loss, type) or not callable(loss):
            checks.function("loss", loss, 2)
        own = () if evaluate is None else tuple(name for name in names if takes(evaluate, name))
        return cls(hashable(loss), random, stateful, has_aux, evaluate and hashable(evaluate), own)

    @property
    def plain(self) -> bool:
        """Whether the step needs only `loss(params, batch)`."""
        return not (self.random or self.stateful or self.has_aux)

    @property
    def draws_when_recorded(self) -> bool:
        """Whether the recorded loss takes a key."""
        return self.random and (self.evaluate is None or "key" in self.evaluates)

    def of_batch(self, params: Params, state: Any, batch: Any, key: Any) -> tuple[Any, tuple[Any, Any]]:
        """`(value, (new state, aux))` of a step; None for parts that the loss does not have."""
        found = self.loss(params, batch, **self._named(state, key))
        if not (self.stateful or self.has_aux):
            return found, (None, None)
        value, rest = found
        if self.stateful and self.has_aux:
            return value, tuple(rest)
        return value, ((rest, None) if self.stateful else (None, rest))

    def recorded(self, params: Params, state: Any, data: Any, key: Any) -> tuple[Any, Any]:
        """The recorded `(value, aux)`; `key` is the run's `recorded_key`."""
        if self.evaluate is None:
            value, (_, aux) = self.of_batch(params, state, data, key)
            return value, aux
        given = self._named(state, key)
        found = self.evaluate(params, data, **{name: each for name, each in given.items() if name in self.evaluates})
        return found if self.has_aux else (found, None)

    def of_two(self) -> Callable[[Params, Any], Any] | None:
        """The recorded loss as a function of `(params, batch)` alone; None if it needs or returns more."""
        if self.evaluate is not None:
            bare = not (self.has_aux or self.evaluates)
            return self.evaluate if bare else None
        return self.loss if self.plain else None

    def of_point(self) -> Callable[[Any, Any], Any] | None:
        """The recorded loss as a function of `((params, state), batch)`; None if it needs more than a state."""
        if self.has_aux or not self.stateful or self.draws_when_recorded or self.evaluate is None:
            return None
        return _OfPoint(self)

    def check(self, params: Params, state: Any, data: Any, key: Any) -> None:
        """Raise TypeError or ValueError unless loss and `evaluate` return what their form promises."""
        if self.plain:
            self._check_plain(params, data)
        else:
            self._check_form(params, state, data, key)
        if self.evaluate is not None:
            given = {name: each for name, each in self._named(state, key).items() if name in self.evaluates}
            with checks.saying("evaluate(params, data) cannot be evaluated for these params and data"):
                out = jax.eval_shape(lambda params, data, g: self.evaluate(params, data, **g), params, data, given)
            if self.has_aux and not (isinstance(out, tuple | list) and len(out) == 2):
                raise TypeError(f"with has_aux evaluate must return (value, aux), got {checks.shown(out)}")
            _check_value("evaluate", out[0] if self.has_aux else out)

    def _named(self, state: Any, key: Any) -> dict[str, Any]:
        return ({"key": key} if self.random else {}) | ({"state": state} if self.stateful else {})

    def _check_plain(self, params: Params, data: Any) -> None:
        for argument, name in (("random=True", "key"), ("loss_state=...", "state")):
            if needs(self.loss, name):
                raise TypeError(
                    f"loss must be a function loss(params, batch) -> scalar, but {_called(self.loss)} also needs "
                    f"{name!r}: descend gives it with {argument}"
                )
        checks.loss(self.loss, params, data)

    def _check_form(self, params: Params, state: Any, data: Any, key: Any) -> None:
        names = [*self._named(state, key)]
        call = f"loss(params, batch{''.join(f', {name}={name}' for name in names)})"
        checks.function("loss", self.loss)
        for name, argument in (("key", "random=True"), ("state", "loss_state")):
            if name in names and not takes(self.loss, name):
                raise TypeError(
                    f"with {argument} the loss is called as {call}, but {_called(self.loss)} takes no argument named "
                    f"{name!r}"
                )
        with checks.saying(f"{call} cannot be evaluated for these params and data"):
            out = jax.eval_shape(
                lambda params, data, given: self.loss(params, data, **given), params, data, self._named(state, key)
            )
        wants = {(True, False): "(value, new_state)", (False, True): "(value, aux)"}
        if self.stateful or self.has_aux:
            form = wants.get((self.stateful, self.has_aux), "(value, (new_state, aux))")
            pair = isinstance(out, tuple | list) and len(out) == 2
            both = not (self.stateful and self.has_aux) or (
                pair and isinstance(out[1], tuple | list) and len(out[1]) == 2
            )
            if not pair or not both:
                raise TypeError(
                    f"with {' and '.join(['loss_state'] * self.stateful + ['has_aux'] * self.has_aux)} the loss must "
                    f"return {form}, got {checks.shown(out)}"
                )
            if self.stateful:
                _check_state(out[1][0] if self.has_aux else out[1], state)
            out = out[0]
        _check_value("loss", out)


@dataclass(frozen=True)
class _OfPoint:
    """The recorded loss of a point `(params, state)`."""

    objective: Objective

    def __call__(self, point: Any, batch: Any) -> Any:
        params, state = point
        return self.objective.recorded(params, state, batch, None)[0]


def _check_value(name: str, out: Any) -> None:
    if not (hasattr(out, "shape") and hasattr(out, "dtype")):
        raise TypeError(f"{name} must return one number, got {checks.shown(out)}")
    if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"{name} must return one floating-point number, got {out.dtype}{list(out.shape)}")


def _check_state(new: Any, old: Any) -> None:
    """Raise TypeError unless the new state has the structure and shapes of the old one."""
    if jax.tree.structure(new) != jax.tree.structure(old):
        raise TypeError(
            "the loss must hand back a state of the structure that it got (loss_state): got "
            f"{jax.tree.structure(new)} for {jax.tree.structure(old)}"
        )
    for (where, ours), theirs in zip(jax.tree_util.tree_leaves_with_path(old), jax.tree.leaves(new), strict=True):
        if jnp.shape(ours) != theirs.shape:
            raise TypeError(
                f"the loss must hand back a state of the shapes that it got (loss_state): "
                f"{jax.tree_util.keystr(where) or 'it'} has shape {theirs.shape} after a step, {jnp.shape(ours)} before"
            )


def hashable(function: Any) -> Any:
    """The function itself if it is hashable, so that compiled programs are found by it; else a wrapper that is."""
    try:
        hash(function)
    except TypeError:
        return lambda *args, **given: function(*args, **given)
    return function


def needs(function: Any, name: str) -> bool:
    """Whether a function cannot be called without an argument of that name."""
    try:
        found = inspect.signature(function).parameters.get(name)
    except (TypeError, ValueError):
        return False
    return found is not None and found.default is found.empty


def takes(function: Any, name: str) -> bool:
    """Whether a function can be called with an argument of that name."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions in C have no signature
        return True
    return any(
        each.kind is each.VAR_KEYWORD or (each.name == name and each.kind is not each.POSITIONAL_ONLY)
        for each in parameters
    )


def _called(function: Any) -> str:
    try:
        return f"{getattr(function, '__name__', 'it')}{inspect.signature(function)}"
    except (TypeError, ValueError):
        return checks.shown(function)
