"""What is known at one point: every value of the loss, every adjoint, and where an array is one of them.

An array is recognised up to a factor, the order and grouping of its axes, and as one row (or column, or time
step) of a known one. `Known.label` says what it is; a label means the same at every point.
"""

import ast
import functools
import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.evaluate.problem import Kernel, Problem, program_at, shape_key
from jaxgrad.check.program import steps
from jaxgrad.check.program.replay import is_elementwise, pull, quick_jit
from jaxgrad.check.program.source import locate
from jaxgrad.check.program.steps import Program

Label = tuple[Any, ...]
"""`(kind, number, ...)`: value of a slot, adjoint of a slot, part (what one step sends to one operand), slope (the
derivative of a step that works entry by entry), rows (what each example sends to a parameter), helper (a simple
function of a value)."""

CLOSE = 1e-8


class Known(NamedTuple):
    label: Label
    array: np.ndarray


class Found(NamedTuple):
    """What an array is: `factor` times the known one, or times row `row` of its axis `axis` (-1: entry `row`)."""

    label: Label
    factor: float
    axis: int | None
    row: int
    same: bool
    """Whether the axes are in the known one's order."""


class Facts(NamedTuple):
    """Everything known at one point."""

    program: Program
    by_label: Mapping[Label, np.ndarray]
    index: Any
    fixed: tuple[np.ndarray, ...]
    """Values that depend on neither the parameters nor the data: a mask of the loss, say."""

    def holds(self, array: np.ndarray) -> bool:
        """Whether an array is, as it is, one of the values or slopes of the loss, or one of its constants."""
        made = [v for label, v in self.by_label.items() if label[0] in ("value", "slope")]
        return any(v.shape == array.shape and np.array_equal(v, array) for v in (*made, *self.fixed))


def facts_at(store: Kernel, leaves: Sequence[Any], data: Sequence[Any], n: int | None) -> Facts:
    """All values and adjoints of the loss at a point with `n` examples, ready to be matched with."""
    key = ("facts", shape_key(leaves, data))
    if key not in store.compiled:
        program = _unrolled(store, leaves, data)
        store.compiled[key] = (program, quick_jit(lambda ls, ds: _everything(program, ls, ds, n)))
    program, run = store.compiled[key]
    values, sent, rows, fixed = jax.device_get(run(list(leaves), list(data)))
    found = [(("value", slot), value) for slot, value in values.items()]
    found += _sorted_by_kind(program, sent)
    found += [(("rows", k, i), row) for (k, i), row in rows.items()]
    by_label = {label: np.asarray(v, np.float64) for label, v in found if np.asarray(v).dtype.kind != "c"}
    return Facts(program, by_label, Index(by_label, n), tuple(np.asarray(v, np.float64) for v in fixed))


def _unrolled(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> Program:
    """The program with its loops opened where their length is known."""
    program = program_at(store, leaves, data)
    if any(step.primitive in ("scan", "while") for step in program.steps):
        try:
            with jax.disable_jit():
                opened = steps.trace(store.function, leaves, data)
            if len(opened.steps) <= 3000:
                return opened
        except Exception:  # a loop that cannot be opened stays one step
            pass
    return program


def _everything(program: Program, leaves: Sequence[Any], data: Sequence[Any], n: int | None) -> Any:
    """All values, and what each step sends back to each operand: the derivatives by a zero added to that operand."""
    uses = [(k, i) for k, step in enumerate(program.steps) for i, s in enumerate(step.inputs) if s in program.moving]
    zeros = [jnp.zeros(program.avals[s].shape, program.avals[s].dtype) for s in _slots(program, uses)]

    def run(taps: Sequence[Any]) -> Any:
        added = dict(zip(uses, taps, strict=True))
        values: dict[int, Any] = dict(program.constants)
        values.update(zip(program.leaves, leaves, strict=True))
        values.update(zip(program.data, data, strict=True))
        for k, step in enumerate(program.steps):
            operands = [values[s] + added[k, i] if (k, i) in added else values[s] for i, s in enumerate(step.inputs)]
            values.update(zip(step.outputs, step.call(*operands), strict=True))
        return values[program.output], values

    found, values = jax.grad(run, has_aux=True)(zeros)
    sent = dict(zip(uses, found, strict=True))
    kept = {s: v for s, v in values.items() if s in program.varying and _is_number(program.avals[s])}
    still = [s for s in values if s not in program.varying and _is_number(program.avals[s]) and program.avals[s].ndim]
    return kept, sent, _by_example(program, values, sent, n), [values[s] for s in still]


def _by_example(program: Program, values: Mapping[int, Any], sent: Mapping[tuple[int, int], Any], n: int | None) -> Any:
    """What each example sends to the parameters, where a step has the examples along an axis of what it makes."""
    rows: dict[tuple[int, int], Any] = {}
    for (k, i), part in sent.items():
        step = program.steps[k]
        out = step.outputs[0]
        shape = tuple(program.avals[out].shape)
        if n is None or step.inputs[i] not in program.leaves or n not in shape or part.size * n > 50_000:
            continue
        above = [v for (j, m), v in sent.items() if program.steps[j].inputs[m] == out]
        if not above or step.primitive in ("scan", "while", "cond"):
            continue
        adjoint = sum(above[1:], above[0])
        axis = shape.index(n)
        masks = jnp.eye(n).reshape(n, *(n if a == axis else 1 for a in range(len(shape))))
        rows[k, i] = jax.vmap(lambda m, s=step, a=adjoint, o=out, w=i: pull(program, s, values, {o: a * m})[w])(masks)
    return rows


def _slots(program: Program, uses: Iterable[tuple[int, int]]) -> list[int]:
    return [program.steps[k].inputs[i] for k, i in uses]


def _sorted_by_kind(program: Program, sent: Mapping[tuple[int, int], np.ndarray]) -> Iterable[tuple[Label, np.ndarray]]:
    """Adjoints; the parts of those that are sums; the slopes of steps that work entry by entry."""
    parts: dict[int, list[tuple[int, int]]] = {}
    for (k, i), slot in zip(sent, _slots(program, sent), strict=True):
        if np.any(sent[k, i]):
            parts.setdefault(slot, []).append((k, i))
    adjoints: dict[int, np.ndarray] = {slot: np.sum([sent[u] for u in uses], axis=0) for slot, uses in parts.items()}
    for slot, adjoint in adjoints.items():
        yield ("adjoint", slot), adjoint
    for uses in parts.values():
        # `W * W` uses W twice in one step: what it sends back is one part.
        steps_of = {k: [u for u in uses if u[0] == k] for k, _ in uses}
        if len(steps_of) > 1:
            for k, same in steps_of.items():
                yield ("part", k, same[0][1]), np.sum([sent[u] for u in same], axis=0)
    for k, i in sent:
        step = program.steps[k]
        above = adjoints.get(step.outputs[0])
        alone = sum(s in program.moving for s in step.inputs) == 1
        if above is None or not alone or above.ndim == 0 or step.name in _STRAIGHT or np.any(above == 0):
            continue
        if is_elementwise(program, step) and sent[k, i].shape == above.shape:
            yield ("slope", k), sent[k, i] / above


_ALWAYS_THE_SAME = "add sub mul div neg add_any convert_element_type copy copy_p name stop_gradient"
_STRAIGHT = frozenset(_ALWAYS_THE_SAME.split())


def _is_number(aval: Any) -> bool:
    dtype = getattr(aval, "dtype", None)
    return dtype is not None and any(jnp.issubdtype(dtype, kind) for kind in (np.floating, np.integer, np.bool_))


_CURVED = """
acos acosh asin asinh atan atanh cbrt cos cosh digamma erf erfc exp exp2 expm1 integer_pow lgamma log log1p
logistic rsqrt sin sinh sqrt square tan tanh abs max
"""
CURVED = frozenset(_CURVED.split())


# ------------------------------------------------------------------------------------------------ matching


class Index:
    """Known arrays by fingerprints that a factor and the order of the entries leave alone."""

    def __init__(self, by_label: Mapping[Label, np.ndarray], n: int | None) -> None:
        self.arrays = by_label
        self._numbers(n)
        rows: dict[int, list[tuple[Label, int | None, np.ndarray]]] = {}
        for label, array in by_label.items():
            if array.size < 2 or array.size > 200_000 or not np.all(np.isfinite(array)):
                continue
            rows.setdefault(array.size, []).append((label, None, array.reshape(1, -1)))
            if array.ndim > 1 and array.size <= 20_000:
                for axis in range(array.ndim):
                    flat = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
                    if flat.shape[1] > 1:
                        rows.setdefault(flat.shape[1], []).append((label, axis, flat))
        self.sizes: dict[int, tuple[np.ndarray, list[tuple[Label, int | None, int]]]] = {}
        for size, blocks in rows.items():
            names = [(label, axis, i) for label, axis, flat in blocks for i in range(len(flat))]
            self.sizes[size] = (_prints(np.concatenate([flat for _, _, flat in blocks])), names)
        self.seen: dict[tuple[Any, bytes], tuple[Found, ...]] = {}

    def find(self, array: np.ndarray, most: int = 12) -> tuple[Found, ...]:
        """All that an array is, whole known ones first."""
        key = (array.shape, array.tobytes())
        if key not in self.seen:
            self.seen[key] = tuple(self._find(array, most))
        return self.seen[key]

    def _numbers(self, n: int | None) -> None:
        """Single numbers are recognised up to a few factors only."""
        small = [(label, v) for label, v in self.arrays.items() if v.size <= 2000 and np.all(np.isfinite(v))]
        self.owners = [(label, i) for label, v in small for i in range(v.size)]
        self.entries = np.concatenate([v.reshape(-1) for _, v in small]) if small else np.zeros(0)
        self.order = np.argsort(self.entries)
        sizes = [1.0, float(n), 1.0 / n] if n else [1.0]
        self.simple = [c * s * size for size in sizes for c in (1.0, 2.0, 0.5) for s in (1.0, -1.0)]

    def _number(self, x: float, most: int) -> Iterable[Found]:
        ranked = self.entries[self.order]
        count = 0
        for factor in self.simple if x != 0 and np.isfinite(x) else ():
            wanted = x / factor
            width = 1e-11 * abs(wanted)
            low, high = np.searchsorted(ranked, [wanted - width, wanted + width])
            for number in self.order[low:high]:
                label, i = self.owners[number]
                yield Found(label, factor, None if self.arrays[label].size == 1 else -1, i, True)
                count += 1
                if count >= most:
                    return

    def _find(self, array: np.ndarray, most: int) -> Iterable[Found]:
        if array.size == 1:
            yield from sorted(self._number(float(array.reshape(())), most), key=lambda f: f.axis is not None)
            return
        if array.size < 2 or array.size not in self.sizes or not np.all(np.isfinite(array)):
            return
        prints, names = self.sizes[array.size]
        mine = _prints(array.reshape(1, -1))[0]
        close = np.nonzero(np.all(np.abs(prints - mine) <= 1e-7, axis=1))[0]
        count = 0
        for number in sorted(close, key=lambda m: names[m][1] is not None):
            label, axis, i = names[number]
            known = self.arrays[label] if axis is None else np.take(self.arrays[label], i, axis=axis)
            fit = alike(array, known)
            if fit is not None:
                yield Found(label, fit[0], axis, i, fit[1])
                count += 1
                if count >= most:
                    return


def telling(array: np.ndarray) -> bool:
    """Whether an array is no pattern that anything could have: at least two different sizes of entries."""
    sizes = np.abs(array[array != 0])
    return sizes.size >= 2 and float(np.ptp(sizes)) > 1e-6 * float(np.max(sizes))


def _prints(flat: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        flat = flat / np.max(np.abs(flat), axis=1, keepdims=True)
        norm = np.sqrt(np.sum(flat**2, axis=1, keepdims=True))
        unit = flat / norm
        out = np.stack([np.abs(unit.sum(axis=1)), np.abs(unit).sum(axis=1), np.sum(unit**4, axis=1)], axis=1)
    return np.where(np.isfinite(out), out, np.inf)


def alike(array: np.ndarray, known: np.ndarray, tol: float = CLOSE) -> tuple[float, bool] | None:
    """The factor c with `array = c known`, in some order of the axes, and whether it is the same order."""
    for other, same in arrangements(known, array.shape):
        size = float(np.vdot(other, other))
        if size == 0:
            return None
        c = float(np.vdot(other, array)) / size
        if c != 0 and float(np.linalg.norm(array - c * other)) <= tol * float(np.linalg.norm(array)):
            return c, same
    return None


def arrangements(known: np.ndarray, shape: tuple[int, ...]) -> list[tuple[np.ndarray, bool]]:
    """A known array in a shape: as it is, with its axes in other orders, then flattened."""
    if known.size != int(np.prod(shape)):
        return []
    out: list[tuple[np.ndarray, bool]] = []
    thin = known.squeeze()
    wanted = tuple(d for d in shape if d != 1)
    if thin.shape == wanted:
        out.append((thin.reshape(shape), True))
    if 2 <= thin.ndim <= 4 and sorted(thin.shape) == sorted(wanted):
        for order in itertools.permutations(range(thin.ndim)):
            if order != tuple(range(thin.ndim)) and tuple(thin.shape[a] for a in order) == wanted:
                out.append((thin.transpose(order).reshape(shape), False))
    if not out or len(wanted) != thin.ndim:
        out.append((known.reshape(shape), True))
    return out


# ------------------------------------------------------------------------------------------------ names


def name_of(problem: Problem, program: Program, slot: int) -> str:
    """A value of the loss as its source names it."""
    if slot in program.leaves:
        return in_words(problem.paths[program.leaves.index(slot)])
    if slot in program.data:
        return problem.names[program.data.index(slot)]
    maker = next((k for k, step in enumerate(program.steps) if slot in step.outputs), None)
    if maker is None:
        return "a constant"
    if slot == program.output:
        return "the loss"
    place = locate(program, [maker])
    match = re.fullmatch(r"(\w+)(?:\s*:\s*[^=]+)?\s*=\s*(.+)", place.statement)
    if _inside(program, maker, slot) and place.expression:
        return f"a step of `{place.expression}`"
    if match and _same_code(match.group(2), place.expression):
        return match.group(1)
    return f"`{place.expression}`" if place.expression else program.steps[maker].name


def _inside(program: Program, maker: int, slot: int) -> bool:
    """Whether a value is made and used up inside one expression, as in the library's own functions."""
    mine = program.steps[maker]
    users = [step for step in program.steps[maker + 1 :] if slot in step.inputs]
    here = bool(users) and all(step.frames[:1] == mine.frames[:1] for step in users)
    return here and bool(mine.frames) and any(step.primitive != mine.primitive for step in users)


def in_words(path: str) -> str:
    return f"leaf {path}" if path[:1].isdigit() else path


@functools.lru_cache(maxsize=4096)
def _same_code(a: str, b: str) -> bool:
    try:
        return ast.dump(ast.parse(a.strip())) == ast.dump(ast.parse(b.strip()))
    except SyntaxError:
        return a.strip() == b.strip()


def is_variable(name: str) -> bool:
    return re.fullmatch(r"[\w.\[\]\"']+", name) is not None
