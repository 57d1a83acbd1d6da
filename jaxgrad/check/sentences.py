"""Findings in the words of a derivation: which step, which line, what was done to it."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxgrad.check import faults as catalogue_of
from jaxgrad.check.evaluate.problem import Problem
from jaxgrad.check.faults import Fault, Term
from jaxgrad.check.faults.mistake import Mistake
from jaxgrad.check.program.evidence import constant_in_words, is_square, multiplier, turns_sign
from jaxgrad.check.program.source import Where, locate
from jaxgrad.check.program.steps import Program
from jaxgrad.check.report import Finding

NOWHERE = Where("", "", "", 0)


def place_of(s: Any, fault: Fault) -> Where:
    """Where the step of a fault is written."""
    elementwise = fault.piece >= 0
    return locate(s.program, fault.members, elementwise)


def unknown(problem: Problem, leaf: int | None, clues: Sequence[str] = (), place: Where = NOWHERE) -> Finding:
    """No single fault, pair of faults or factor explains it: what is known all the same."""
    path = None if leaf is None else problem.paths[leaf]
    part = "The gradient" if path is None else f"Leaf {path}"
    advice = "Tag intermediate values with jax.ad_checkpoint.checkpoint_name and use check_backprop."
    sentence = f"{part} is wrong, and no one or two mistakes that this checker knows give these numbers."
    return Finding("unknown", path, None, place.where, place.expression, " ".join([sentence, *(clues or (advice,))]))


def parted(problem: Problem, s: Any, slot: int, leaves: Sequence[int]) -> tuple[str, Where]:
    """A wrong adjoint of one value would give all these numbers."""
    program: Program = s.program
    users = [k for k, step in enumerate(program.steps) if slot in step.inputs and program.steps[k].frames]
    place = locate(program, users[-1:]) if users else NOWHERE
    names = ", ".join(problem.paths[i] for i in leaves)
    name = spelled(problem, s, slot)
    inside = f", in {place.whole}" if place.where else ""
    return (
        f"They are what a wrong adjoint of `{name}` gives when all from there to {names} is done right: look at the "
        f"step that sends back to `{name}`{inside}, and at what comes before it on the way back.",
        place,
    )


def scale(problem: Problem, s: Any, factor: str, leaf: int | None, leaves: Sequence[int]) -> Finding:
    """The gradient, or one leaf of it, times one factor."""
    path = None if leaf is None or len(problem.paths) == 1 else problem.paths[leaf]
    whose = "Your gradient" if path is None else f"Your gradient of {path}"
    step = constant_step(s, factor, leaves) if path is not None else _scale_step(s, factor, leaves)
    place = locate(s.program, [step]) if step is not None else NOWHERE if path is None else _use_of(s, leaves[0])
    if path is None and len(leaves) < len(problem.paths):
        whose = f"Your gradient of {', '.join(problem.paths[i] for i in leaves)}"
    if factor == "-1":
        sentence = f"{whose} has the wrong sign everywhere: it points downhill. {_sign_reason(s, step, leaves)}"
        return Finding("sign", path, "-1", place.where, place.expression, sentence.strip())
    sentence = f"{whose} is {_times(factor)} the true one. {_scale_reason(s, factor, step, place, leaves)}"
    return Finding("scale", path, factor, place.where, place.expression, sentence.strip())


def _times(factor: str) -> str:
    spoken = {"2": "twice", "1/2": "half", "-2": "minus twice", "-1/2": "minus half"}
    return spoken.get(factor, f"{factor} times")


def _at(place: Where) -> str:
    text = f"`{place.expression}`, " if place.expression else ""
    return f" ({text}{place.where})" if place.where else ""


def _sign_reason(s: Any, step: int | None, leaves: Sequence[int]) -> str:
    """Which step of the loss could have lost its minus, or got one."""
    turning = [k for k in _shared_steps(s, leaves) if turns_sign(s, k)]
    k = step if step in turning else turning[-1] if turning else None
    if k is not None:
        place = locate(s.program, [k])
        return f"An inner derivative of -1 is missing or doubled, for instance in {place.step}."
    if step is not None and s.program.steps[step].primitive == "sub":
        place = locate(s.program, [step])
        return f"A difference may be the other way round in it, for instance {place.step}."
    return ""


def _two_reason(s: Any, factor: str, step: int | None, place: Where, leaves: Sequence[int]) -> str:
    """Where a missing or doubled 2 may come from: a square or a constant only where the loss has one."""
    squares = [k for leaf in leaves for k in _shared_steps(s, [leaf]) if is_square(s, k)]
    constant = step is not None and is_constant_step(s, step, factor)
    said = ""
    if step is not None and constant:
        said = f"in {place.step} {constant_in_words(s, step, _number(factor) or 0.0)}."
    known = step is not None and s.at.origin in s.program.steps[step].inputs
    if factor == "1/2" and squares and not (constant and known):
        at = _at(place) if step is None or step in squares else ""
        more = f", or {said}" if said else f"{at}."
        return f"It is the exact gradient of 1/2 of this loss: the factor 2 of a square's derivative is missing{more}"
    if said:
        return said[0].upper() + said[1:]
    return "A factor 2 is missing." if factor == "1/2" else "A factor 2 is too many."


def _log_reason(s: Any, factor: str, step: int | None, place: Where) -> str:
    """Where a factor log(2) may come from."""
    name = "" if step is None else s.program.steps[step].primitive
    if name in ("log", "log1p") and factor == "1/log(2)":
        return f"It is the gradient of a loss in log2; this loss uses the natural logarithm{_at(place)}."
    if name in ("log", "log1p", "div") and factor == "log(2)":
        return f"It is the gradient for the natural logarithm; this loss uses log2{_at(place)}."
    if name in ("exp2", "pow"):
        return f"The derivative of 2^x is log(2) 2^x{_at(place)}."
    return f"A constant factor is missing or too many{_at(place)}."


def _scale_reason(s: Any, factor: str, step: int | None, place: Where, leaves: Sequence[int]) -> str:
    bare, mean, at = factor.lstrip("-"), s.at.mean, _at(place)
    if bare == "n" and mean is not True:
        what = "This loss is a sum over the examples: no factor n belongs there" if mean is False else "Divide by n"
        return f"{what}{at}."
    if bare == "1/n" and mean is True:
        return f"This loss is a mean over the examples, and you divided by n once too often{at}."
    if bare == "1/n" and mean is False:
        return f"It is that of the mean over the examples, and this loss is their sum{at}."
    if bare == "n":
        return f"It is the exact gradient of the sum over the examples; this loss is their mean{at}: divide by n."
    if bare == "1/n":
        return f"It is that of the mean over the examples where this loss sums, or divided by n once too often{at}."
    if bare in ("1/2", "2"):
        return _two_reason(s, bare, step, place, leaves)
    if bare in ("log(2)", "1/log(2)"):
        return _log_reason(s, bare, step, place)
    if bare in ("d", "k", "h"):
        what = {"d": "features d", "k": "outputs k", "h": "hidden units h"}[bare]
        return f"The loss averages over the number of {what} too, and your gradient does not{at}."
    if bare in ("1/d", "1/k", "1/h"):
        what = {"d": "features d", "k": "outputs k", "h": "hidden units h"}[bare[2:]]
        return f"You averaged over the number of {what} too; the loss does not{at}."
    if bare == "n/2":
        squared = any(is_square(s, k) for leaf in leaves for k in _shared_steps(s, [leaf]))
        two = "the 2 of a square's derivative" if squared else "a factor 2"
        what = f"Both the 1/n of a mean and {two} are left out" if mean is not False else f"An n is too many, and {two}"
        what += "" if mean is not False else " is left out"
        return f"{what}{at}: it is the exact gradient of n/2 times this loss."
    if bare == "2/n":
        return f"It is divided by n once too often, and a factor 2 is too many{at}."
    if re.fullmatch(r"n/\d+|\d+/n", bare):
        number = bare.replace("n", "").replace("/", "")
        return f"The number {number} is written into your gradient where n, the number of examples, belongs{at}."
    if bare in ("n/(n-1)", "(n-1)/n"):
        return f"One of the two divides by n - 1 and the other by n{at}."
    if step is not None and is_constant_step(s, step, factor):
        return f"In {place.step} {constant_in_words(s, step, _number(factor) or 0.0)}."
    return f"A constant factor is missing or too many{at}."


def constant_step(s: Any, factor: str, leaves: Sequence[int]) -> int | None:
    """The one step on the way of all these leaves that multiplies by a number of which the factor is the inverse,
    or the number itself: a mean over four words, a time step, the root of a dimension. None if there are several."""
    steps = [k for k in _shared_steps(s, leaves) if is_constant_step(s, k, factor)]
    return max(steps) if len({locate(s.program, [k]).where for k in steps}) == 1 else None


def is_constant_step(s: Any, k: int, factor: str) -> bool:
    """Whether a step multiplies or divides by a number of which the factor is the inverse, or the number itself."""
    value = _number(factor)
    if value is None or value in (0.0, 1.0):
        return False
    number = multiplier(s, k)
    return number is not None and min(abs(value * abs(number) - 1), abs(value / abs(number) - 1)) < 1e-9


def _number(factor: str) -> float | None:
    """The absolute value of a factor that is a plain number or a fraction of two."""
    top, _, bottom = factor.lstrip("-").partition("/")
    try:
        return float(top) / float(bottom or 1)
    except (ValueError, ZeroDivisionError):
        return None


def _scale_step(s: Any, factor: str, leaves: Sequence[int]) -> int | None:
    """The last step whose own derivative is the missing or extra factor; else one on the way to all these leaves.

    Where no step could be it, the one that takes the value whose adjoint has the factor first in the person's code,
    if that is known."""
    program: Program = s.program
    two = factor.lstrip("-") in ("2", "1/2")
    named = constant_step(s, factor, leaves)
    if named is not None and not two:
        return named
    steps = _steps_with_factor(s, factor, leaves)
    users = [k for k, step in enumerate(program.steps) if s.at.origin in step.inputs and step.frames]
    on_path = _shared_steps(s, leaves)
    subs = [k for k in on_path if program.steps[k].primitive == "sub"] if factor == "-1" else []
    own = [k for k in users if is_constant_step(s, k, factor)]
    for chosen in (own[-1:], steps[:1], [] if named is None else [named], subs[-1:], users[-1:], on_path[-1:]):
        if chosen:
            return chosen[0]
    return None


def _steps_with_factor(s: Any, factor: str, leaves: Sequence[int]) -> list[int]:
    """The steps, last one first, whose own derivative has the factor: a square for 2, a difference for -1."""
    program: Program = s.program
    bare = factor.lstrip("-")
    names: tuple[str, ...] = ()
    if "n" in bare or bare in ("d", "k", "h", "1/d", "1/k", "1/h"):
        names = ("div", "reduce_sum")
    elif "log" in bare:
        names = ("log", "log1p", "div", "exp2", "pow")

    def has_factor(k: int) -> bool:
        step = program.steps[k]
        if factor == "-1":
            return turns_sign(s, k)
        if bare in ("2", "1/2"):
            return is_square(s, k)
        return step.primitive in names and not (step.primitive == "div" and step.inputs[1] in program.varying)

    on_path = _shared_steps(s, leaves)
    if bare in ("2", "1/2") and not any(map(has_factor, on_path)):
        # Every leaf may have a square of its own.
        on_path = sorted({k for leaf in leaves for k in _shared_steps(s, [leaf])})
    found = [k for k in reversed(on_path) if has_factor(k)]
    number = _number(factor)
    for k in reversed(on_path) if number is not None and not found else ():
        lengths = program.steps[k].params.get("fft_lengths", ())
        if any(abs(number * size - 1) < 1e-9 or abs(number / size - 1) < 1e-9 for size in lengths):
            found.append(k)
    return found


def _shared_steps(s: Any, leaves: Sequence[int]) -> list[int]:
    """The steps through which the gradient of each of these leaves flows."""
    program: Program = s.program
    out = []
    reach: list[set[int]] = []
    for leaf in leaves:
        touched = {program.leaves[leaf]}
        for step in program.steps:
            if touched & set(step.inputs):
                touched |= {o for o in step.outputs if o in program.moving}
        reach.append(touched)
    live = set(s.replay.adjoints)
    for k, step in enumerate(program.steps):
        if step.frames and all(t & set(step.inputs) for t in reach) and live & set(step.outputs):
            out.append(k)
    return out


def _use_of(s: Any, leaf: int) -> Where:
    program: Program = s.program
    slot = program.leaves[leaf]
    aliases = {slot}
    for k, step in enumerate(program.steps):
        if aliases & set(step.inputs):
            same = ("broadcast_in_dim", "reshape", "transpose", "squeeze", "convert_element_type")
            # A step without a place is ours: it puts a complex leaf together.
            if step.primitive in same or not step.frames:
                aliases |= set(step.outputs)
                continue
            return locate(program, [k])
    return NOWHERE


def zero(problem: Problem, s: Any, leaf: int | None, leaves: Sequence[int]) -> Finding:
    if leaf is None:
        step = _scale_step(s, "1", leaves)
        place = NOWHERE if step is None else locate(s.program, [step])
        return Finding(
            "missing-term",
            None,
            None,
            place.where,
            place.expression,
            "Your gradient is zero everywhere; the loss does depend on the parameters.",
        )
    place = _use_of(s, leaf)
    path = problem.paths[leaf]
    at = f" in {place.whole}" if place.where else ""
    sentence = f"Your gradient of {path} is zero: its contribution to the loss{at} was left out."
    return Finding("missing-term", path, None, place.where, place.expression, sentence)


def kept(problem: Problem, s: Any, t: Term, leaf: int, which: str, count: int) -> Finding:
    """One of several contributions is kept and the others are left out."""
    place, path = locate(s.program, [t.step]), problem.paths[leaf]
    inside = f", in {place.whole}," if place.where else ""
    sentence = (
        f"{path} is used {count} times, and of its contributions only that of the {which}{inside} is kept: the others "
        "are left out. Add them up."
    )
    path = path if len(problem.paths) > 1 else None
    return Finding("missing-term", path, None, place.where, place.expression, sentence)


def moved(problem: Problem, s: Any, leaf: int, name: str) -> Finding:
    place = _use_of(s, leaf)
    path = problem.paths[leaf]
    how = {
        "transposed": f"Your gradient of {path} is the transpose of the true one",
        "column order": f"Your gradient of {path} has the right numbers filled in by columns instead of by rows",
        "row order": f"Your gradient of {path} has the right numbers read by columns instead of by rows",
        "upside down": f"Your gradient of {path} has its rows in reverse order",
        "mirrored": f"Your gradient of {path} has its columns in reverse order",
    }[name]
    extra = ""
    if name == "transposed" and place.expression:
        extra = f": for `{place.expression}` it is (input)^T times adjoint, not adjoint^T times input"
    return Finding("transposed", path, None, place.where, place.expression, how + extra + ".")


def swapped(problem: Problem, s: Any, leaves: Sequence[int], order: Sequence[int]) -> Finding:
    pairs = [f"{problem.paths[a]} holds that of {problem.paths[b]}" for a, b in zip(leaves, order, strict=True)]
    place = _use_of(s, leaves[0])
    sentence = "The leaves are right but in the wrong place: " + ", ".join(pairs) + "."
    path = problem.paths[leaves[0]] if len(leaves) == 1 else None
    return Finding("swapped-leaves", path, None, place.where, place.expression, sentence)


def _one_leaf(problem: Problem, leaves: Sequence[int], restricted: bool) -> str | None:
    return problem.paths[leaves[0]] if len(leaves) == 1 and (restricted or len(problem.paths) > 1) else None


def _named(place: Where) -> str:
    return f"`{place.expression}`" if place.expression else "the product"


def _called(place: Where) -> str:
    """A step of the loss by its statement."""
    return place.whole or "one step of the loss"


def _only(problem: Problem, leaves: Sequence[int], restricted: bool) -> str:
    if not restricted:
        return ""
    return f" (in the gradient of {', '.join(problem.paths[i] for i in leaves)} only)"


def _times_itself(problem: Problem, s: Any, f: Fault, leaves: Sequence[int], restricted: bool) -> Finding | None:
    """An adjoint multiplied by its own value, where a derivative divides by that value: the division is left out."""
    program: Program = s.program
    k = f.members[-1]
    slot = program.steps[k].outputs[0]
    value = spelled(problem, s, slot)
    users = [(u, i) for u, step in enumerate(program.steps) for i, x in enumerate(step.inputs) if x == slot]
    below = [u for u, i in users if program.steps[u].primitive == "div" and i == 1]
    powers = [u for u, _ in users if program.steps[u].primitive == "integer_pow"]
    inverse = [u for u in powers if program.steps[u].params["y"] < 0]
    products = [u for u, _ in users if program.steps[u].primitive == "reduce_prod"]
    kind = "missing-factor"
    if users and len(below) + len(inverse) == len(users):
        place = locate(program, (below or inverse)[-1:])
        what = f"the derivative of 1/v by v = `{value}` is -1/v^2, and one factor 1/v of it is left out"
    elif users and len(powers) == len(users):
        place, kind = locate(program, powers[-1:]), "wrong-derivative"
        what = f"the exponent is not lowered: the derivative of v^k by v = `{value}` is k v^(k-1), and you kept v^k"
    elif users and len(products) == len(users):
        place = locate(program, products[-1:])
        what = f"the derivative of a product by one factor is the product of the others: divide by `{value}`"
    elif program.steps[k].primitive == "sqrt":
        place = locate(program, [k])
        what = f"the derivative of the root divides by the root itself, `{value}`, and that is left out"
    else:
        return None
    at = _called(place)
    sentence = f"In {at} {what}" + _only(problem, leaves, restricted) + "."
    leaf = _one_leaf(problem, leaves, restricted)
    return Finding(kind, leaf, None, place.where, place.expression, sentence)


def _by_signs(problem: Problem, s: Any, f: Fault, leaves: Sequence[int], restricted: bool) -> Finding | None:
    """An adjoint multiplied by something that is 1 or -1 everywhere, labels say: it is missing, or there twice."""
    program: Program = s.program
    slot = program.steps[f.members[-1]].outputs[0]
    if set(np.unique(s.at.values[f.detail[1]])) != {-1.0, 1.0}:
        return None
    users = [k for k, step in enumerate(program.steps) if slot in step.inputs and step.frames]
    place = locate(program, users[-1:] or f.members)
    at = _called(place)
    value, other = spelled(problem, s, slot), spelled(problem, s, f.detail[1])
    sentence = (
        f"In {at} the factor `{other}` is missing or there twice, going back to `{value}` (it is 1 or -1, so the two "
        "are the same)" + _only(problem, leaves, restricted) + "."
    )
    leaf = _one_leaf(problem, leaves, restricted)
    return Finding("missing-factor", leaf, None, place.where, place.expression, sentence)


def fault(problem: Problem, s: Any, f: Fault, leaves: Sequence[int], restricted: bool) -> Finding:
    """One faulty step."""
    if f.kind == "extra-derivative" and f.detail[0] == "value":
        told = _times_itself(problem, s, f, leaves, restricted)
        if told is not None:
            return told
    if f.detail and f.detail[0] == "mask":
        told = _by_signs(problem, s, f, leaves, restricted)
        if told is not None:
            return told
    place = place_of(s, f)
    sentence = _fault_sentence(problem, s, f, place) + _only(problem, leaves, restricted)
    kind = f.kind
    if f.piece >= 0 and f.detail and f.detail[0] in ("half", "itself"):
        # a (1 - a) is a product and can lose a factor; 1 - a for tanh is just another function
        sigmoid = _names(problem, s, f)[0] == "sigmoid"
        kind = "missing-factor" if sigmoid else "wrong-derivative"
    return Finding(kind, _one_leaf(problem, leaves, restricted), None, place.where, place.expression, sentence + ".")


class _Say:
    """How the steps and values of a sample are called."""

    def __init__(self, problem: Problem, s: Any):
        self._problem, self._sample = problem, s

    def name(self, slot: int) -> str:
        return spelled(self._problem, self._sample, slot)

    def at(self, step: int) -> str:
        place = locate(self._sample.program, [step])
        return _called(place)

    def operand(self, step: int, number: int) -> str:
        made = self._sample.program.steps[step]
        texts = operands(locate(self._sample.program, [step]).expression)
        return texts[number] if len(texts) == len(made.inputs) == 2 else self.name(made.inputs[number])


def mistake(
    problem: Problem, s: Any, m: Mistake, factor: str | None, leaves: Sequence[int], restricted: bool
) -> Finding:
    """A mistake that is a class of its own."""
    place = locate(s.program, m.steps, len(m.steps) > 1)
    sentence = m.sentence(_Say(problem, s), factor) + _only(problem, leaves, restricted)
    shown = factor if m.free else None
    return Finding(m.kind, _one_leaf(problem, leaves, restricted), shown, place.where, place.expression, sentence + ".")


def short(s: Any, f: Fault) -> str:
    """A fault in a few words, for the list of equivalents."""
    place = place_of(s, f)
    what = {
        "missing-derivative": "derivative left out",
        "extra-derivative": "a derivative too many",
        "wrong-argument": "derivative taken at the output",
        "wrong-derivative": "derivative of another function",
        "missing-factor": "a factor left out",
        "wrong-value": "another value used",
        "transposed": "a matrix not transposed",
        "missing-term": "a contribution left out",
    }.get(f.kind, f.kind)
    return f"{what} in {place.step}" if place.where else what


def _names(problem: Problem, s: Any, f: Fault) -> tuple[str, str, str]:
    """How the function, its input and its output are called."""
    piece = s.todo.pieces[f.piece]
    known = catalogue_of.known_function(piece, s.replay) if piece.elementwise else None
    step = s.program.steps[f.members[-1]]
    function = known.name if known is not None else step.name if len(f.members) == 1 else "f"
    function = {"logistic": "sigmoid", "integer_pow": "power", "log1p": "log1p", "max": "max"}.get(function, function)
    return function, spelled(problem, s, piece.start), spelled(problem, s, piece.end)


def _fault_sentence(problem: Problem, s: Any, f: Fault, place: Where) -> str:
    at = _called(place)
    if f.piece >= 0:
        return _piece_sentence(problem, s, f, place, at)
    step = s.program.steps[f.members[-1]]
    if f.product >= 0:
        return _product_sentence(problem, s, f, place, at)
    value = spelled(problem, s, step.outputs[0])
    if f.detail[0] == "mask":
        other = spelled(problem, s, f.detail[1])
        return (
            f"In {at} the adjoint of `{value}` was multiplied by `{other}`: where that is zero the contribution "
            "was left out, and everything but those entries is right"
        )
    if f.detail[0] == "value":
        return f"In {at} the adjoint of `{value}` was multiplied by `{value}` itself, which does not belong there"
    name, formula = f.detail[1], f.detail[2]
    if f.detail[0] in ("other", "log"):
        other = spelled(problem, s, f.detail[3])
        other = f"exp({other})" if f.detail[0] == "log" else other
        return (
            f"At {at} you multiplied by `{other}` (1 - `{other}`), but that derivative is already in the adjoint of "
            f"`{value}`"
        )
    inside = formula.replace("a", value).replace("z", value) if f.detail[0] == "output" and len(value) < 3 else ""
    formula = f" = {inside or formula}" if formula else ""
    return (
        f"At {at} you multiplied by the derivative of {name}{formula}, but there is no {name} to differentiate: "
        f"`{value}` goes on unchanged, or this derivative is already in the adjoint"
    )


def _piece_sentence(problem: Problem, s: Any, f: Fault, place: Where, at: str) -> str:
    function, z, a = _names(problem, s, f)
    piece = s.todo.pieces[f.piece]
    if not piece.elementwise:
        name = place.expression or a
        first = locate(s.program, piece.members[:1])
        if first.where and first.where != place.where:
            name = f"everything from {z} to {place.expression or a}"
        if f.detail[0] == "identity":
            return f"In {at} the derivative is missing: the adjoint was passed through `{name}` unchanged"
        why = "every output depends on several inputs, so its Jacobian has entries off the diagonal"
        how = {
            "diagonal": "you kept only the diagonal of the Jacobian",
            "times output": "you multiplied the adjoint by the output and left out the sum over the others",
            "sigmoid": "you used a (1 - a), the derivative of a sigmoid",
        }[f.detail[0]]
        return f"In {at} {how}: {why}"
    true = {
        "sigmoid": f"sigmoid'({z}) = a (1 - a)" if a == "a" else f"sigmoid'({z}) = sigmoid (1 - sigmoid)",
        "tanh": f"tanh'({z}) = 1 - tanh({z})^2",
        "relu": f"relu'({z}) = 1 where {z} > 0, else 0",
        "square": f"2 ({z})",
        "exp": f"exp({z})",
        "log": f"1/({z})",
        "abs": f"sign({z})",
        "softplus": f"softplus'({z}) = sigmoid({z})",
    }.get(function, "")
    if function == "sigmoid" and re.fullmatch(r"\w+", a):
        true = f"sigmoid'({z}) = {a} (1 - {a})"
    slope = f"the derivative {true}" if true else f"the derivative of `{place.expression or a}` by `{z}`"
    if f.kind == "missing-derivative":
        return f"In {at} {slope} is missing: you passed the adjoint on unchanged"
    if f.kind == "extra-derivative":
        return f"In {at} {slope} is applied twice"
    if f.kind == "wrong-argument":
        return (
            f"In {at} the derivative of {function} is taken at the step's output `{a}` instead of its input "
            f"`{z}`: {true or 'it belongs at the input'}"
        )
    if f.kind == "wrong-value":
        other = spelled(problem, s, f.detail[1])
        if f.detail[0] == "formula":
            formula = {"sigmoid": f"{other} (1 - {other})", "tanh": f"1 - {other}^2"}.get(f.detail[2], "the formula")
            return f"In {at} you used {formula} where the output `{a}` belongs: {true or 'take the value of this step'}"
        return f"In {at} the derivative is taken at `{other}` instead of `{z}`"
    if f.kind == "missing-factor":
        return f"In {at} a factor of the derivative is missing: you used 1 - {a}; it is {true or 'a product'}"
    how, text = f.detail[0], f.detail[1] if len(f.detail) > 1 else ""
    if how == "value":
        return f"In {at} you multiplied by {text}({z}) instead of the derivative{': ' + true if true else ''}"
    if how == "itself":
        if function == "sigmoid":
            return f"In {at} you multiplied by `{a}` itself; {true}, the factor (1 - {a}) is missing"
        return (
            f"In {at} you multiplied by the value `{a}` itself instead of its derivative{': ' + true if true else ''}"
        )
    if how == "argument":
        return f"In {at} you multiplied by the input `{z}` instead of the derivative{': ' + true if true else ''}"
    if how == "magnitude":
        return f"In {at} the sign of the derivative is lost{': ' + true if true else ''}"
    if how == "inverse":
        return f"In {at} you multiplied by one over the derivative{': it is ' + true if true else ''}"
    if how == "slip":
        return f"In {at} you used {text} as the derivative{': it is ' + true if true else ''}"
    if how == "other side":
        return f"In {at} the condition is the wrong way round: the derivative is 1 where yours is 0"
    return (
        f"In {at} you used the derivative of {how} ({text}); the function is "
        f"{function if function != 'f' else '`' + (place.expression or a) + '`'}" + (f" and {true}" if true else "")
    )


def _product_sentence(problem: Problem, s: Any, f: Fault, place: Where, at: str) -> str:
    product = s.todo.products[f.product]
    step = s.program.steps[product.step]
    texts = operands(place.expression)
    mine = texts[product.operand] if len(texts) == 2 else spelled(problem, s, step.inputs[product.operand])
    other = texts[product.partner] if len(texts) == 2 else spelled(problem, s, step.inputs[product.partner])
    matrix = step.primitive == "dot_general"
    factor = f"{other}^T" if matrix else other
    kind = f.detail[0]
    if kind in ("ones", "passed"):
        return (
            f"In {at} the factor `{factor}` is missing: going back to `{mine}`, the adjoint must be "
            f"{'divided' if step.primitive == 'div' else 'multiplied'} by it, and you passed the adjoint on without it"
        )
    if kind == "transposed":
        return f"In {at} the matrix `{other}` is not transposed on the way back to `{mine}`: it must be `{other}^T`"
    if kind == "flipped":
        return f"In {at} the kernel `{other}` is flipped on the way back to `{mine}`"
    if kind == "rolled":
        return f"In {at} the rows of `{other}` are shifted by one against those of the adjoint, going back to `{mine}`"
    if kind == "adjoint":
        return f"In {at} the adjoint of {_named(place)} is not transposed on the way back to `{mine}`"
    used = spelled(problem, s, f.detail[1])
    return f"In {at} you used `{used}` where `{other}` belongs, going back to `{mine}`"


def term(problem: Problem, s: Any, t: Term, factor: str, leaves: Sequence[int], restricted: bool) -> Finding:
    """One operand's contribution left out, negated or scaled."""
    program: Program = s.program
    step = program.steps[t.step]
    slot = step.inputs[t.operand]
    place = locate(program, [t.step])
    texts = operands(place.expression)
    name = texts[t.operand] if len(texts) == 2 else spelled(problem, s, slot)
    if step.inputs.count(slot) > 1:
        name = place.expression or name
    if step.primitive in ("add", "sub", "add_any", "concatenate"):
        # A term of a sum is written where it is made, not where it is added.
        maker = next((k for k, m in enumerate(program.steps) if slot in m.outputs), None)
        if maker is not None and program.steps[maker].frames:
            made = locate(program, [maker])
            # What something else uses too is left out where it is added.
            once = sum(slot in m.inputs for m in program.steps) == 1
            if made.where and (once or made.statement == place.statement):
                place = made
    whole = place.whole or "the loss"
    only = _only(problem, leaves, restricted)
    leaf = _one_leaf(problem, leaves, restricted)
    reach = ", ".join(problem.paths[i] for i in leaves)
    tail = f" It reaches {reach}." if leaf is None and len(leaves) < len(problem.paths) else ""
    if factor == "0":
        sentence = f"The contribution of `{name}` in {whole} is left out{only}.{tail}"
        return Finding("missing-term", leaf, None, place.where, place.expression, sentence)
    if factor == "-1":
        sentence = f"The contribution of `{name}` in {whole} has the wrong sign{only}.{tail}"
        return Finding("negated-term", leaf, "-1", place.where, place.expression, sentence)
    sentence = f"The contribution of `{name}` in {whole} is {_times(factor)} what it should be{only}.{tail}"
    return Finding("scaled-term", leaf, factor, place.where, place.expression, sentence)


def repeated(
    problem: Problem, s: Any, terms: Sequence[Term], factor: str, leaves: Sequence[int], but: str = ""
) -> Finding:
    """A contribution that is wrong wherever its step comes, or everywhere `but` the first or last time."""
    found = term(problem, s, terms[-1], factor, leaves, restricted=False)
    looped = any(s.program.steps[t.step].moment for t in terms)
    where = "at every time step" if looped else f"each of the {len(terms)} times that this line runs"
    if but:
        where = f"at every time step but the {but}" if looped else f"each time that this line runs but the {but}"
    sentence = re.sub(r"(is left out|has the wrong sign|what it should be)", rf"\1 {where}", found.sentence, count=1)
    return found._replace(sentence=sentence)


def spots(problem: Problem, leaf: int, where: np.ndarray) -> str:
    """Entries of a leaf in words: a row, a column, or their indices."""
    shape = problem.leaves[leaf].shape
    if len(shape) == 2:
        for axis, word in ((0, "row"), (1, "column")):
            hit = sorted({int(i[axis]) for i in where})
            if len(where) == len(hit) * shape[1 - axis] and len(hit) < shape[axis]:
                return f"{word}{'s' if len(hit) > 1 else ''} {', '.join(map(str, hit[:6]))}"
    shown = ", ".join("[" + ", ".join(str(int(i)) for i in index) + "]" for index in where[:4])
    more = f" and {len(where) - 4} more" if len(where) > 4 else ""
    return f"{'entry' if len(where) == 1 else 'entries'} {shown}{more}"


def same_factor(problem: Problem, s: Any, factor: str, leaves: Sequence[int]) -> Finding:
    """One factor on several leaves."""
    found = scale(problem, s, factor, leaves[0], leaves)
    names = ", ".join(problem.paths[i] for i in leaves)
    sentence = found.sentence.replace(f"Your gradient of {problem.paths[leaves[0]]} ", f"Your gradients of {names} ", 1)
    sentence = sentence.replace(" is ", " are ", 1).replace("the true one.", "the true ones.", 1)
    others = [w for w in (_use_of(s, i) for i in leaves[1:]) if w.where]
    if others:
        sentence += " The others: " + ", ".join(w.step for w in others[:3]) + "."
    return found._replace(leaf=None, sentence=sentence)


def of_leaf(problem: Problem, s: Any, leaf: int, kind: str, how: str) -> Finding:
    """The gradient of a leaf times a function of the leaf."""
    place, path = _use_of(s, leaf), problem.paths[leaf]
    sentence = f"Your gradient of {path} is the true one {how.format(path)}."
    return Finding(kind, path, None, place.where, place.expression, sentence)


def added(problem: Problem, s: Any, factors: Mapping[int, str], name: str) -> tuple[Finding, ...]:
    """A multiple of the parameters, of their signs, or a constant on top of the right gradient."""
    del s
    values = set(factors.values())
    what = {
        "params": lambda p: f"{p}",
        "sign": lambda p: f"sign({p})",
        "one": lambda p: "1",
        "square": lambda p: f"{p}^2",
    }[name]
    why = {
        "params": "the derivative of a penalty on its square, which is not in this loss",
        "sign": "the derivative of a penalty on its absolute value, which is not in this loss",
        "one": "a constant that is not in this loss",
        "square": "a term that is not in this loss",
    }[name]

    def sentence(paths: str, factor: str, symbol: str) -> str:
        times = "" if factor == "1" else f"{factor} times "
        return f"Your gradient of {paths} is the true one plus {times}{symbol}: {why}."

    if len(values) == 1 and len(factors) > 1:
        factor = next(iter(values))
        paths = ", ".join(problem.paths[i] for i in factors)
        return (Finding("additive", None, factor, "", "", sentence(paths, factor, what("the leaf"))),)
    return tuple(
        Finding("additive", problem.paths[i], f, "", "", sentence(problem.paths[i], f, what(problem.paths[i])))
        for i, f in factors.items()
    )


def entries(problem: Problem, s: Any, leaf: int, where: np.ndarray, factor: str | None) -> Finding:
    path = problem.paths[leaf]
    spots = ", ".join("[" + ", ".join(str(int(i)) for i in index) + "]" for index in where[:4])
    if len(where) > 4:
        spots += f" and {len(where) - 4} more"
    many = "entry" if len(where) == 1 else "entries"
    are = "is" if len(where) == 1 else "are"
    how = {None: "wrong", "0": "zero", "-1": "of the wrong sign"}.get(factor, f"{_times(factor or '')} the true value")
    place = _use_of(s, leaf)
    sentence = f"{path} is right but for the {many} {spots}, which {are} {how}."
    shown = None if factor in (None, "0") else factor
    return Finding("entries", path, shown, place.where, place.expression, sentence)


def class_slice(problem: Problem, s: Any, leaves: Sequence[int], axis: int, index: int, factor: str) -> Finding:
    """A whole row or column is zero or negated: one output, or one input, was left out."""
    place = _use_of(s, leaves[0])
    what = "output" if axis == 1 else "input"
    parts = []
    for leaf in leaves:
        many = problem.leaves[leaf].ndim > 1
        word = ("column" if axis == 1 else "row") if many else "entry"
        parts.append(f"{word} {index} of {problem.paths[leaf]}")
    path = problem.paths[leaves[0]] if len(leaves) == 1 and len(problem.paths) > 1 else None
    are = "are" if len(parts) > 1 else "is"
    if factor == "0":
        sentence = f"The contribution of {what} {index} (one class) is left out: {', '.join(parts)} {are} zero."
        return Finding("missing-term", path, None, place.where, place.expression, sentence)
    sentence = f"The contribution of {what} {index} has the wrong sign: {', '.join(parts)}."
    return Finding("negated-term", path, "-1", place.where, place.expression, sentence)


def sliced(
    problem: Problem,
    s: Any,
    t: Term,
    weights: Sequence[Any],
    by_rows: bool,
    leaves: Sequence[int],
    partial: bool = False,
) -> Finding:
    """Examples or classes with the wrong weight; `partial`: in some leaves only, so on the way on from the value."""
    program: Program = s.program
    slot = program.steps[t.step].inputs[t.operand]
    maker = next((k for k, step in enumerate(program.steps) if slot in step.outputs and step.frames), None)
    place = locate(program, [t.step if maker is None or not partial else maker])
    w = weights[0]
    odd = np.nonzero(np.abs(w - 1) > 1e-5)[0]
    value = float(w[odd[0]])
    what = "example" if by_rows else "output"
    first = all(np.nonzero(np.abs(x - 1) > 1e-5)[0].tolist() == [0] for x in weights)
    last = all(np.nonzero(np.abs(x - 1) > 1e-5)[0].tolist() == [len(x) - 1] for x in weights)
    if first or last:
        which = f"the {'first' if first else 'last'} {what}"
    else:
        shown = ", ".join(str(int(i)) for i in odd[:5]) + (" ..." if len(odd) > 5 else "")
        which = f"{what}{'s' if len(odd) > 1 else ''} {shown}"
    leaf = _one_leaf(problem, leaves, True)
    inside = f" in {place.whole}" if place.where else ""
    whose = "" if leaf is None else f" (in the gradient of {leaf})"
    if abs(value) < 1e-5:
        sentence = f"The contribution of {which}{inside} is left out{whose}."
        return Finding("missing-term", leaf, None, place.where, place.expression, sentence)
    if abs(value + 1) < 1e-5:
        sentence = f"The contribution of {which}{inside} has the wrong sign{whose}."
        return Finding("negated-term", leaf, "-1", place.where, place.expression, sentence)
    sentence = f"The contribution of {which}{inside} counts {value:.6g} times{whose}."
    factor = f"{value:.0f}" if abs(value - round(value)) < 1e-5 else f"{value:.6g}"
    return Finding("scaled-term", leaf, factor, place.where, place.expression, sentence)


def operands(expression: str) -> list[str]:
    """The two operands of `a @ b`, `a * b`, `jnp.dot(a, b)`, ... as written; else an empty list."""
    try:
        node = ast.parse(expression.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        return []
    if isinstance(node, ast.BinOp):
        return [ast.unparse(node.left), ast.unparse(node.right)]
    if isinstance(node, ast.Call):
        args = [a for a in node.args if not (isinstance(a, ast.Constant) and isinstance(a.value, str))]
        if len(args) == 2:
            return [ast.unparse(a) for a in args]
    return []


def spelled(problem: Problem, s: Any, slot: int) -> str:
    """How a value is called in the person's code: its leaf, its variable, else its expression."""
    program: Program = s.program
    if slot in program.leaves:
        return problem.paths[program.leaves.index(slot)]
    if slot in program.data:
        return problem.names[program.data.index(slot)]
    maker = next((k for k, m in enumerate(program.steps) if slot in m.outputs), None)
    if maker is None:
        return "a constant"
    if any(m.primitive == "name" and slot in m.inputs for m in program.steps):
        return next(m.params["name"] for m in program.steps if m.primitive == "name" and slot in m.inputs)
    place = locate(program, [maker])
    if not place.expression:
        return program.steps[maker].name
    match = re.fullmatch(r"(\w+)(?:\s*:\s*[^=]+)?\s*=\s*(.+)", place.statement)
    if match and match.group(2).strip() == place.expression.strip():
        return match.group(1)
    return place.expression
