"""Products: what stands in the other factor's place, and which part of the adjoint is taken."""

from collections.abc import Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.faults.mistake import Array, At, Change, Mistake, OfStep, Say

_PRODUCTS = ("mul", "dot_general", "conv_general_dilated", "div")
_SWAPPED = {"mul": "div", "div": "mul", "add": "sub", "sub": "add"}


@dataclass(frozen=True)
class Partner(OfStep):
    """Something else in the place of the factor that the adjoint is multiplied with."""

    step: int
    operand: int
    how: str
    kind: str
    cost: float
    free: bool = False

    @property
    def partner(self) -> int:
        return 1 - self.operand

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        slot = step.inputs[self.partner]
        adjoint, sent = at.out(self.step), at.contribution(self.step, self.operand)
        if adjoint is None or sent is None:
            return None
        value, back = at.values[slot], at.adjoint(slot)
        with np.errstate(all="ignore"):
            if self.how in ("gradient", "updated"):
                other = back
            elif self.how == "plus":
                other = np.ones_like(value)
            elif self.how == "inverse":
                other = 1 / value
            elif self.how == "square":
                other = value**2
            else:
                other = _remade(at, slot)
        if other is None or not np.all(np.isfinite(other)):
            return None
        new = at.pulled(self.step, self.operand, adjoint, {self.partner: other})
        if new is None:
            return None
        return {step.inputs[self.operand]: new if self.free else new - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        mine, other = say.operand(self.step, self.operand), say.operand(self.step, self.partner)
        start, back = f"In {say.at(self.step)}", f", going back to `{mine}`"
        if self.how == "gradient":
            return f"{start} you used the gradient of `{other}` where `{other}` itself belongs{back}"
        if self.how == "updated":
            sign, size = ("-", factor[1:]) if factor and factor.startswith("-") else ("+", factor)
            return (
                f"{start} you used `{other}` {sign} {size} times its gradient, its value after the update, where "
                f"`{other}` before the update belongs{back}"
            )
        if self.how == "plus":
            sign, size = ("-", factor[1:]) if factor and factor.startswith("-") else ("+", factor)
            return f"{start} you used `{other}` {sign} {size} where `{other}` belongs{back}"
        if self.how == "inverse":
            return f"{start} you multiplied by 1/`{other}` where `{other}` belongs{back}: one of the two is upside down"
        if self.how == "square":
            return f"{start} you used the square of `{other}` where `{other}` belongs{back}"
        return (
            f"{start} you used another `{other}` than the loss{back}: with the operation that makes it turned round "
            "(a product for a quotient, a sum for a difference)"
        )


_POWERS = {
    "power rule": (
        "wrong-derivative",
        "you used the power rule, the exponent times the base to one less: that is the derivative by the base",
    ),
    "no log": ("missing-factor", "the factor log(base) is missing"),
    "log only": ("missing-factor", "the power itself is missing: you kept only log(base)"),
    "log exponent": ("wrong-value", "you took the logarithm of the exponent where that of the base belongs"),
}


@dataclass(frozen=True)
class Exponent(OfStep):
    """The derivative of base ** exponent by the exponent, in a form that people take for it."""

    step: int
    how: str
    cost: float = 0.9
    free: bool = False

    @property
    def kind(self) -> str:
        return _POWERS[self.how][0]

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        adjoint, sent = at.out(self.step), at.contribution(self.step, 1)
        if adjoint is None or sent is None:
            return None
        x, b = at.values[step.inputs[0]], at.values[step.inputs[1]]
        with np.errstate(all="ignore"):
            slope = {
                "power rule": lambda: b * x ** (b - 1),
                "no log": lambda: x**b,
                "log only": lambda: np.log(x),
                "log exponent": lambda: x**b * np.log(b),
            }[self.how]()
            new = adjoint * slope
        new = new if np.shape(new) == np.shape(sent) else np.sum(new)
        return {step.inputs[1]: new - sent} if np.all(np.isfinite(new)) else None

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return (
            f"In {say.at(self.step)} the derivative by the exponent `{say.operand(self.step, 1)}` is wrong: "
            f"{_POWERS[self.how][1]}; it is base^exponent * log(base)"
        )


@dataclass(frozen=True)
class Count(OfStep):
    """The number of all entries where the loss divides by a number of the data: a masked mean taken for a mean."""

    step: int
    how: str
    """`summed`: all entries that are summed into one; `all`: of the whole array; `first`: the examples."""
    kind: str = "wrong-value"
    cost: float = 1.0
    free: bool = False

    def change(self, at: At) -> Change:
        step, sent = at.program.steps[self.step], at.contribution(self.step, 0)
        maker = at.makers.get(step.inputs[0])
        made = None if maker is None else at.program.steps[maker]
        if sent is None or made is None or made.primitive not in ("reduce_sum", "dot_general"):
            return None
        shape = at.shape(made.inputs[0])
        counted = {"summed": [shape[i] for i in made.params.get("axes", ())], "all": shape, "first": shape[:1]}
        count = float(np.prod(counted[self.how]))
        with np.errstate(all="ignore"):
            return {step.inputs[0]: sent * (at.values[step.inputs[1]] / count - 1)}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        what = {
            "summed": "the number of all that is summed",
            "all": "the number of all entries",
            "first": "the number of examples",
        }
        return f"In {say.at(self.step)} you divided by {what[self.how]} where `{say.operand(self.step, 1)}` belongs"


@dataclass(frozen=True)
class Conjugate(OfStep):
    """A product of complex values with one of the two conjugated on the way back, or not conjugated."""

    step: int
    operand: int
    adjoint: bool
    kind: str = "wrong-value"
    cost: float = 1.0
    free: bool = False

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        back, sent = at.out(self.step), at.contribution(self.step, self.operand)
        if back is None or sent is None:
            return None
        other = at.values[step.inputs[1 - self.operand]]
        instead = {} if self.adjoint else {1 - self.operand: np.conj(other)}
        new = at.pulled(self.step, self.operand, np.conj(back) if self.adjoint else back, instead)
        return None if new is None else {step.inputs[self.operand]: new - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        what = "the adjoint" if self.adjoint else f"`{say.operand(self.step, 1 - self.operand)}`"
        return (
            f"In {say.at(self.step)} {what} is conjugated on the way back to `{say.operand(self.step, self.operand)}` "
            "and must not be, or the other way round: of the two factors one is conjugated"
        )


def _remade(at: At, slot: int) -> Array | None:
    """A value made with the opposite operation."""
    maker = at.makers.get(slot)
    if maker is None:
        return None
    step = at.program.steps[maker]
    if step.primitive == "broadcast_in_dim":
        inner = _remade(at, step.inputs[0])
        return None if inner is None else np.asarray(step.call(jnp.asarray(inner), *step_rest(at, maker))[0])
    if step.primitive not in _SWAPPED or any(np.ndim(at.values[s]) == 0 for s in step.inputs):
        return None
    a, b = (at.values[s] for s in step.inputs)
    inverse = {"mul": lambda: a / b, "div": lambda: a * b, "add": lambda: a - b, "sub": lambda: a + b}
    return inverse[step.primitive]()


def step_rest(at: At, k: int) -> list[Array]:
    return [at.values[s] for s in at.program.steps[k].inputs[1:]]


@dataclass(frozen=True)
class PartOfAdjoint(OfStep):
    """A product with a square result sends back only the diagonal of the adjoint, or all but the diagonal."""

    step: int
    operand: int
    diagonal: bool
    kind: str = "missing-term"
    free: bool = False

    @property
    def cost(self) -> float:
        return 2.4 if self.diagonal else 3.0

    def change(self, at: At) -> Change:
        adjoint, sent = at.out(self.step), at.contribution(self.step, self.operand)
        if adjoint is None or sent is None or adjoint.ndim < 2 or adjoint.shape[-1] != adjoint.shape[-2]:
            return None
        eye = np.eye(adjoint.shape[-1])
        new = at.pulled(self.step, self.operand, adjoint * (eye if self.diagonal else 1 - eye))
        return None if new is None else {at.program.steps[self.step].inputs[self.operand]: new - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        which = (
            "only the diagonal of its adjoint takes" if self.diagonal else "the diagonal of its adjoint does not take"
        )
        kept = "other pairs" if self.diagonal else "pairs of one and the same index"
        mine = say.operand(self.step, self.operand)
        return (
            f"In {say.at(self.step)} {which} part on the way back to `{mine}`: the contribution of the {kept} is "
            "left out"
        )


@dataclass(frozen=True)
class Convolution(OfStep):
    """A convolution's backward pass with the kernel turned, its channels swapped, or another stride or padding."""

    step: int
    operand: int
    how: str
    strides: tuple[int, ...] = ()
    free: bool = False

    @property
    def kind(self) -> str:
        return "transposed" if self.how in ("turned", "swapped", "kernel turned", "axes swapped") else "wrong-value"

    @property
    def cost(self) -> float:
        return 2.5

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        adjoint, sent = at.out(self.step), at.contribution(self.step, self.operand)
        if adjoint is None or sent is None:
            return None
        spec = step.params["dimension_numbers"]
        space = tuple(spec.rhs_spec[2:])
        if self.how == "turned":
            new = np.flip(sent, space)
        elif self.how == "swapped":
            new = np.swapaxes(sent, spec.rhs_spec[0], spec.rhs_spec[1])
        elif self.how == "axes swapped":
            new = np.swapaxes(sent, *space[:2]) if len(space) > 1 else None
        elif self.how == "kernel turned":
            new = at.pulled(self.step, 0, adjoint, {1: np.flip(at.values[step.inputs[1]], space)})
        else:
            new = at.pulled(self.step, self.operand, adjoint, call=self._other(at))
        if new is None or new.shape != sent.shape:
            return None
        return {step.inputs[self.operand]: new - sent}

    def _other(self, at: At):
        """The convolution at stride 1, or without padding, as far as the adjoint reaches."""
        step = at.program.steps[self.step]
        p = step.params
        shape = at.shape(step.outputs[0])
        stride = [1] * len(p["window_strides"]) if self.how == "stride" else p["window_strides"]
        padding = [(0, 0)] * len(p["padding"]) if self.how == "padding" else p["padding"]

        def call(x, kernel):
            out = jax.lax.conv_general_dilated(
                x,
                kernel,
                stride,
                padding,
                p["lhs_dilation"],
                p["rhs_dilation"],
                p["dimension_numbers"],
                p["feature_group_count"],
                p["batch_group_count"],
            )
            out = out[tuple(slice(0, n) for n in shape)]
            return jnp.pad(out, [(0, n - m) for n, m in zip(shape, out.shape, strict=True)])

        return call

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        start, mine = f"In {say.at(self.step)}", say.operand(self.step, self.operand)
        other, back = say.operand(self.step, 1 - self.operand), f", going back to `{mine}`"
        if self.how == "turned":
            return f"{start} the gradient of the kernel `{mine}` is turned by 180 degrees: do not flip it"
        if self.how == "kernel turned":
            return f"{start} the kernel `{other}` is the wrong way round (turned by 180 degrees){back}"
        if self.how == "swapped":
            return f"{start} the gradient of the kernel `{mine}` has its input and output channels swapped"
        if self.how == "axes swapped":
            return f"{start} the gradient of the kernel `{mine}` has its height and width swapped"
        if self.how == "stride":
            return f"{start} you took windows at stride 1 on the way back to `{mine}`; its strides are {self.strides}"
        return f"{start} you left the padding out on the way back to `{mine}`"


@dataclass(frozen=True)
class OtherEnd(OfStep):
    """A slice of the adjoint, or of the other factor, taken at the other end: `[1:]` for `[:-1]`."""

    step: int
    operand: int
    kind: str = "wrong-value"
    cost: float = 2.6
    free: bool = False

    def change(self, at: At) -> Change:
        step = at.program.steps[self.step]
        adjoint, sent = at.out(self.step), at.contribution(self.step, self.operand)
        if adjoint is None or sent is None:
            return None
        if step.primitive == "concatenate":
            axis = step.params["dimension"]
            start = sum(at.shape(s)[axis] for s in step.inputs[: self.operand])
            length, total = sent.shape[axis], adjoint.shape[axis]
            other = total - length - start
            new = np.take(adjoint, np.arange(other, other + length), axis=axis)
            return {step.inputs[self.operand]: new - sent}
        slot = step.inputs[1 - self.operand]
        maker = at.makers.get(slot)
        if maker is None or at.program.steps[maker].primitive != "slice":
            return None
        made = at.program.steps[maker]
        whole = at.values[made.inputs[0]]
        strides = made.params["strides"] or (1,) * whole.ndim
        if any(s != 1 for s in strides):
            return None
        cut = tuple(
            slice(n - stop, n - start)
            for n, start, stop in zip(
                whole.shape, made.params["start_indices"], made.params["limit_indices"], strict=True
            )
        )
        new = at.pulled(self.step, self.operand, adjoint, {1 - self.operand: whole[cut]})
        return None if new is None else {step.inputs[self.operand]: new - sent}

    def sentence(self, say: Say, factor: str | None) -> str:
        del factor
        return (
            f"In {say.at(self.step)} a row or column was dropped at the wrong end on the way back to "
            f"`{say.operand(self.step, self.operand)}` (the one of the bias, for instance)"
        )


def found(at: At) -> Iterator[Mistake]:
    for k, step in enumerate(at.program.steps):
        if step.primitive == "pow" and step.inputs[1] in at.program.moving:
            for how in _POWERS:
                yield Exponent(k, how)
        if step.primitive == "div" and step.inputs[1] in at.program.varying - at.program.moving:
            for how in ("summed", "all", "first"):
                yield Count(k, how)
        if step.primitive == "concatenate":
            for i, s in enumerate(step.inputs):
                if s in at.program.moving:
                    yield OtherEnd(k, i)
        if step.primitive not in _PRODUCTS or len(step.inputs) != 2:
            continue
        for operand in (0, 1):
            if step.inputs[operand] not in at.program.moving:
                continue
            if step.primitive == "div" and operand == 1:
                continue
            partner = step.inputs[1 - operand]
            if at.values[partner].dtype.kind == "c" and step.primitive in ("mul", "dot_general"):
                yield Conjugate(k, operand, True)
                yield Conjugate(k, operand, False)
            if partner in at.program.moving and step.inputs[0] != step.inputs[1]:
                yield Partner(k, operand, "gradient", "wrong-value", 3.0)
                yield Partner(k, operand, "updated", "wrong-value", 3.2, free=True)
            if partner in at.program.varying and step.inputs[0] != step.inputs[1]:
                yield Partner(k, operand, "plus", "wrong-value", 4.0, free=True)
                yield Partner(k, operand, "remade", "wrong-value", 3.3)
                if step.primitive in ("mul", "div"):
                    yield Partner(k, operand, "inverse", "wrong-value", 3.0)
                    yield Partner(k, operand, "square", "wrong-value", 3.6)
                if len(at.shape(partner)):
                    yield OtherEnd(k, operand)
            if step.primitive == "dot_general":
                out = at.shape(step.outputs[0])
                if len(out) >= 2 and out[-1] == out[-2]:
                    yield PartOfAdjoint(k, operand, True)
                    yield PartOfAdjoint(k, operand, False)
            if step.primitive == "conv_general_dilated":
                for how in ("turned", "swapped", "axes swapped") if operand == 1 else ("kernel turned",):
                    yield Convolution(k, operand, how)
                if any(s != 1 for s in step.params["window_strides"]):
                    yield Convolution(k, operand, "stride", tuple(step.params["window_strides"]))
                if any(p != (0, 0) for p in step.params["padding"]):
                    yield Convolution(k, operand, "padding")
