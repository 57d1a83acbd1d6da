"""Steps that pick entries: `E[tokens]`, `jnp.repeat`, pooling, `max`. Backwards they add up where an entry was
picked several times, and send nothing where it was not picked."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxgrad.check.faults.mistake import Array, At, Change, Mistake, OfStep, Say

_PICKS = ("gather", "repeat", "tile", "reduce_window_max", "broadcast_in_dim", "dynamic_slice", "reduce_max", "sort")


@dataclass(frozen=True)
class Overwritten(OfStep):
    """An entry that was picked several times keeps only one of its contributions, or their mean."""

    step: int
    operand: int
    keep: str
    """`last`, `first` or `mean`."""
    copied: bool
    """Whether the step makes copies on purpose (repeat, broadcast)."""
    free: bool = False

    @property
    def kind(self) -> str:
        return "scaled-term" if self.keep == "mean" else "missing-term"

    @property
    def cost(self) -> float:
        return {"last": 2.0, "first": 2.1, "mean": 2.6}[self.keep] + (0.5 if self.copied else 0.0)

    def change(self, at: At) -> Change:
        adjoint, picked = at.out(self.step), sources(at, self.step, self.operand)
        sent = at.contribution(self.step, self.operand)
        if adjoint is None or picked is None or sent is None:
            return None
        order = picked.reshape(-1)
        entries, first, count = np.unique(order, return_index=True, return_counts=True)
        if self.keep == "mean":
            weight = 1.0 / count[np.searchsorted(entries, order)]
        else:
            winner = first if self.keep == "first" else len(order) - 1 - np.unique(order[::-1], return_index=True)[1]
            weight = np.zeros(len(order))
            weight[winner] = 1.0
        other = at.pulled(self.step, self.operand, adjoint * weight.reshape(adjoint.shape))
        return None if other is None else {at.program.steps[self.step].inputs[self.operand]: other - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        name, where = say.operand(self.step, self.operand), say.at(self.step)
        if self.keep == "mean":
            return f"In {where} the contributions of all copies of an entry of `{name}` must be added up; you averaged"
        if self.copied:
            return f"In {where} only the {self.keep} copy of each entry of `{name}` sends its part back: add up all"
        return (
            f"In {where} an entry of `{name}` that is used several times keeps only the contribution of its "
            f"{self.keep} use: assigning (or `g[i] += ...`) overwrites, add them up with np.add.at or .at[i].add"
        )


@dataclass(frozen=True)
class ToAll(OfStep):
    """A maximum sends its adjoint to every entry, or shares it among them, instead of to the one it picked."""

    step: int
    shared: bool
    kind: str = "wrong-derivative"
    free: bool = False

    @property
    def cost(self) -> float:
        return 2.5 + 0.3 * self.shared

    def change(self, at: At) -> Change:
        adjoint, sent, step = at.out(self.step), at.contribution(self.step, 0), at.program.steps[self.step]
        if adjoint is None or sent is None:
            return None
        if step.primitive in ("reduce_max", "reduce_min"):
            axes = tuple(step.params["axes"])
            other = np.broadcast_to(np.expand_dims(adjoint, axes), sent.shape)
            size = int(np.prod([sent.shape[a] for a in axes]))
        else:
            import jax

            p = step.params
            keys = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
            windows = [p[k] for k in keys]
            add = lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, *windows)
            other = at.pulled(self.step, 0, adjoint, call=lambda x, *_: add(x))
            size = int(np.prod(p["window_dimensions"]))
        if other is None:
            return None
        return {step.inputs[0]: other / (size if self.shared else 1) - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        how = "shared its adjoint evenly among" if self.shared else "sent its adjoint to"
        return f"In {say.at(self.step)} you {how} all entries; only the largest one gets it"


@dataclass(frozen=True)
class Unmasked:
    """A mask of the forward pass is not there on the way back: the next step is differentiated at the bare values."""

    step: int
    operand: int
    user: int
    place: int
    kind: str = "wrong-value"
    cost: float = 0.9
    free: bool = False

    @property
    def steps(self) -> tuple[int, ...]:
        return (self.user,)

    def change(self, at: At) -> Change:
        select, user = at.program.steps[self.step], at.program.steps[self.user]
        slot, out = select.inputs[self.operand], user.outputs[0]
        adjoint, sent = at.adjoint(out), at.contribution(self.step, self.operand)
        if adjoint is None or sent is None or at.shape(slot) != at.shape(select.outputs[0]):
            return None
        new = at.pulled(self.user, self.place, adjoint, {self.place: at.values[slot]})
        return None if new is None else {slot: new - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return (
            f"In {say.at(self.user)} the derivative is taken as if nothing were masked: the mask of "
            f"{say.at(self.step)} is left out"
        )


def _unmasked(at: At) -> Iterator[Mistake]:
    """Every choice between a value and a constant that one other step takes up."""
    for k, step in enumerate(at.program.steps):
        moving = [i for i, s in enumerate(step.inputs) if s in at.program.moving]
        if step.primitive != "select_n" or len(moving) != 1:
            continue
        users = at.users.get(step.outputs[0], ())
        if len(users) == 1 and len(at.program.steps[users[0][0]].outputs) == 1:
            yield Unmasked(k, moving[0], *users[0])


def sources(at: At, k: int, operand: int) -> Array | None:
    """For each entry of the output the flat index of the entry of the operand that it is; None if it is none."""
    step = at.program.steps[k]
    shape = at.shape(step.inputs[operand])
    size = int(np.prod(shape))
    if size == 0:
        return None
    index = at.moved(k, operand, np.arange(size, dtype=float).reshape(shape) + 1)
    ones = at.moved(k, operand, np.ones(shape))
    if index is None or ones is None or not np.all(ones == 1) or not np.all(index == np.round(index)):
        return None
    return np.asarray(np.real(index), int) - 1


def found(at: At) -> Iterator[Mistake]:
    yield from _unmasked(at)
    for k, step in enumerate(at.program.steps):
        if step.primitive in ("reduce_max", "reduce_window_max", "reduce_min") and step.inputs[0] in at.program.moving:
            yield ToAll(k, False)
            yield ToAll(k, True)
        if step.primitive not in _PICKS or len(step.outputs) != 1:
            continue
        for operand, slot in enumerate(step.inputs):
            if slot not in at.program.moving or len(at.shape(slot)) == 0:
                continue
            picked = sources(at, k, operand)
            if picked is None or len(np.unique(picked)) == picked.size:
                continue
            copied = step.primitive in ("repeat", "tile", "broadcast_in_dim")
            for keep in ("last", "first", "mean"):
                if not (keep == "mean" and step.primitive == "broadcast_in_dim"):
                    yield Overwritten(k, operand, keep, copied)
