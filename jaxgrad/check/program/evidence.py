"""What in a loss a factor on its gradient may stand for: a square, a constant, a change of sign.

A report names a cause only where the loss has it.
"""

from typing import Any

import numpy as np

from jaxgrad.check.program.steps import Program

_LINEAR = "neg transpose reshape squeeze broadcast_in_dim convert_element_type reduce_sum copy name mul div dot_general"
_TURNING = ("sub", "neg", "inv", "solve", "cos", "rsqrt", "erfc", "acos")


def is_square(s: Any, k: int) -> bool:
    """Whether a step squares a value that the parameters move, by a power or as a product with itself (`r @ r`,
    also `x @ A @ x`): its derivative has a factor 2."""
    program: Program = s.program
    step = program.steps[k]
    if not set(step.inputs) & program.moving:
        return False
    if step.primitive == "square" or (step.primitive.startswith("custom_") and "square" in step.inner):
        return True
    if step.primitive == "integer_pow":
        return abs(step.params["y"]) == 2
    if step.primitive == "pow":
        return step.inputs[1] not in program.varying and bool(np.all(np.abs(s.at.values[step.inputs[1]]) == 2))
    if step.primitive not in ("mul", "dot_general") or not set(step.inputs) <= program.moving:
        return False
    return len({_root(s, slot) for slot in step.inputs}) == 1


def _root(s: Any, slot: int) -> int:
    """The value of which a value is a linear function with constant coefficients, as far back as that goes."""
    program: Program = s.program
    while slot in s.at.makers:
        step = program.steps[s.at.makers[slot]]
        moving = [x for x in step.inputs if x in program.moving]
        if step.primitive not in _LINEAR.split() or len(moving) != 1:
            break
        if step.primitive == "div" and step.inputs[1] in program.moving:
            break
        slot = moving[0]
    return slot


def turns_sign(s: Any, k: int) -> bool:
    """Whether the derivative of a step has a minus that may be forgotten."""
    program: Program = s.program
    step = program.steps[k]
    second = len(step.inputs) > 1 and step.inputs[1] in program.moving
    if step.primitive in ("sub", "div"):
        return second
    if step.primitive in ("integer_pow", "solve"):
        return set(step.inputs[:1]) <= program.moving and (step.primitive == "solve" or step.params["y"] < 0)
    number = multiplier(s, k)
    return step.primitive in _TURNING or (number is not None and number < 0)


def multiplier(s: Any, k: int) -> float | None:
    """The constant by which a step multiplies what the parameters move: 1/c where it divides by c."""
    program: Program = s.program
    step = program.steps[k]
    if step.primitive not in ("mul", "div") or len(step.inputs) != 2:
        return None
    for i, slot in enumerate(step.inputs):
        if slot in program.varying or slot not in s.at.values or (step.primitive == "div" and i == 0):
            continue
        held = np.unique(s.at.values[slot])
        size = float(held[0]) if held.size == 1 and held.dtype.kind in "fiu" else 0.0
        if size:
            return 1 / size if step.primitive == "div" else size
    return None


def constant_in_words(s: Any, k: int, factor: float) -> str:
    """That the constant of a step is left out, or there twice, where that is the factor."""
    number = multiplier(s, k)
    if number is None:
        return ""
    divides = s.program.steps[k].primitive == "div"
    named = f"the division by {1 / number:.6g}" if divides else f"the factor {number:.6g}"
    return f"{named} is {'left out' if abs(factor * abs(number) - 1) < 1e-9 else 'there twice'}"
