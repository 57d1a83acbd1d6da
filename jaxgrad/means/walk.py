"""Following the examples through the programs of a loss for several sizes at once, operation by operation."""

import enum
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxgrad.means.kinds import Kind, Mixed, Never, PerRow, Position, Same, Total, Zero, sum_of
from jaxgrad.means.rules import MANY, RULES, Apart, Step, forbidden, holds, mixing, unknown


class Walk:
    """Follows the examples through the programs of several sizes at once."""

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes = sizes
        self._caller = ""

    def program(self, programs: Sequence[Any], given: Sequence[Kind]) -> list[Kind]:
        """The kinds of what closed programs return, from those of what they are given."""
        constants = [self._constant(values) for values in _zipped([each.consts for each in programs])]
        return self.open([each.jaxpr for each in programs], [*constants, *given])

    def open(self, programs: Sequence[Any], given: Sequence[Kind]) -> list[Kind]:
        """The same for programs whose constants are among `given`."""
        known: dict[int, Kind] = {}
        numbers: list[dict[Any, int]] = [{} for _ in programs]

        def name(variables: Sequence[Any], kind: Kind) -> None:
            for table, variable in zip(numbers, variables, strict=True):
                table[variable] = len(known)
            known[len(known)] = kind

        def read(atoms: Sequence[Any]) -> Kind:
            written = [hasattr(atom, "val") for atom in atoms]
            if any(written) != all(written):
                raise Apart("a number in one is computed in another")
            if all(written):
                return self._constant([atom.val for atom in atoms])
            which = {table[atom] for table, atom in zip(numbers, atoms, strict=True)}
            if len(which) > 1:
                raise Apart("its operations are connected otherwise")
            return known[which.pop()]

        inputs = _zipped([[*each.constvars, *each.invars] for each in programs])
        for variables, kind in zip(inputs, given, strict=True):
            name(variables, self._settled(kind, self._axis(variables)))
        for equations in _zipped([each.eqns for each in programs]):
            _check_alike(equations)
            ins = _zipped([equation.invars for equation in equations])
            outs = _zipped([equation.outvars for equation in equations])
            kinds = [read(atoms) for atoms in ins]
            axes, out_axes = [self._axis(atoms) for atoms in ins], [self._axis(variables) for variables in outs]
            found = self._step(Step(equations, kinds, axes, out_axes, self._caller))
            for variables, kind, axis in zip(outs, found, out_axes, strict=True):
                name(variables, self._settled(kind, axis))
        return [read(atoms) for atoms in _zipped([each.outvars for each in programs])]

    def _step(self, step: Step) -> Sequence[Kind]:
        """The kinds of the outputs of an operation."""
        mixed = next((kind for kind in step.kinds if isinstance(kind, Mixed)), None)
        many = len(step.out_axes)
        inner = _inner(step)
        if inner or step.name in _CONTROL:
            outer, self._caller = self._caller, step.where
            try:
                if step.name in _CONTROL:
                    return _CONTROL[step.name](self, step)
                return self.open(inner, [*map(self._constant, _zipped(_constants(step))), *step.kinds])
            finally:
                self._caller = outer
        if step.name == "select_n" and step.kinds[0] in (Never(), Zero()):
            return [step.kinds[1]]  # whatever the other case is
        if mixed:
            return [mixed] * many
        if MANY in step.axes or MANY in step.out_axes:
            return [Mixed(f"pairs of examples meet in `{step.name}`{step.where}")] * many
        if obstacle := forbidden(step):
            return [Mixed(f"{obstacle}{step.where}")] * many
        found = RULES.get(step.name, unknown)(step)
        found = found if isinstance(found, list) else [found] * many
        return [
            kind if kind is not None and holds(step, number, kind) else mixing(step)
            for number, kind in enumerate(found)
        ]

    def _axis(self, atoms: Sequence[Any]) -> int | None:
        """Which axis changes with n, by a constant times n; `MANY` if several do, or one does otherwise."""
        shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in atoms]
        if len({len(shape) for shape in shapes}) > 1:
            raise Apart("its arrays differ in their number of axes")
        changing = [axis for axis in range(len(shapes[0])) if len({shape[axis] for shape in shapes}) > 1]
        if not changing:
            return None
        lengths = [shape[changing[0]] for shape in shapes]
        times = {divmod(length, n) for length, n in zip(lengths, self.sizes, strict=True)}
        if len(changing) > 1 or len(times) > 1 or times.pop()[1]:
            return MANY
        return changing[0]

    def _settled(self, kind: Kind, axis: int | None) -> Kind:
        """The kind, once it is seen whether the array has an axis of examples."""
        if isinstance(kind, Mixed | Zero | Never):
            return kind
        if axis is None:
            if isinstance(kind, Same | Total):
                return kind
            return Mixed("it takes one example out of the batch by its place")
        if isinstance(kind, Same):
            return PerRow(kind.degree)
        return Mixed("a sum over the examples meets each of them") if isinstance(kind, Total) else kind

    def _constant(self, values: Sequence[Any]) -> Kind:
        """Of one number or array for each size."""
        first = values[0]
        if all(value is first for value in values) and np.shape(first) != ():
            return Same(0)
        try:
            arrays = [np.asarray(value) for value in values]
        except Exception:  # a key, or a value that is being traced
            same = all(value is first for value in values)
            return Same(0) if same else Mixed("a constant of it changes with the number of examples")
        if len({array.shape for array in arrays}) > 1:
            return self._of_each(arrays)
        if all(np.array_equal(array, arrays[0], equal_nan=array.dtype.kind == "f") for array in arrays):
            return Zero() if not arrays[0].any() else Same(0)
        for degree in (1, -1) if arrays[0].dtype.kind in "fiuc" else ():
            scaled = [np.asarray(a, complex) / float(n) ** degree for a, n in zip(arrays, self.sizes, strict=True)]
            # Half a precision could not tell 1/n from 1/(n − 1).
            near = min(1e-6, 4 * np.finfo(arrays[0].dtype).eps) if arrays[0].dtype.kind in "fc" else 0
            if all(np.allclose(each, scaled[0], rtol=near, atol=0) for each in scaled):
                return Same(degree)
        return Mixed("a constant of it changes with the number of examples, and not as 1/n")

    def _of_each(self, arrays: Sequence[np.ndarray]) -> Kind:
        """Of an array with an entry for each example: one number for all, or their places."""
        value = arrays[0].reshape(-1)[:1]
        if value.size and all((array == value).all() for array in arrays):
            return Same(0) if value.any() else Zero()
        whole = all(array.dtype.kind in "iu" and array.dtype.itemsize >= 4 for array in arrays)
        if whole and all(np.array_equal(a, np.arange(n)) for a, n in zip(arrays, self.sizes, strict=True)):
            return Position()
        return Mixed("a constant of it has an entry for each example")


def _zipped(sequences: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    if len({len(sequence) for sequence in sequences}) > 1:
        raise Apart("one has more operations")
    return list(zip(*sequences, strict=True))


_SIZES = {"shape", "new_sizes", "start_indices", "limit_indices", "slice_sizes", "sharding"}


def _check_alike(equations: Sequence[Any]) -> None:
    """Raise `Apart` unless the operations of all sizes differ in their sizes only."""
    first = equations[0]
    for other in equations[1:]:
        if other.primitive is not first.primitive:
            raise Apart(f"`{first.primitive.name}` in one is `{other.primitive.name}` in another")
        for name, value in first.params.items():
            # By their text, in which NaN is NaN.
            if name not in _SIZES and _is_simple(value) and repr(value) != repr(other.params.get(name)):
                raise Apart(f"`{first.primitive.name}` differs in its {name}")


def _is_simple(value: Any) -> bool:
    """Whether a parameter of an operation is made of numbers, words and types only."""
    if isinstance(value, tuple | list):
        return all(map(_is_simple, value))
    plain = value is None or isinstance(value, bool | int | float | str | np.dtype | np.generic | enum.Enum)
    return plain or type(value).__name__ in ("Primitive", "ConvDimensionNumbers")


_PROGRAM = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # the names under which an operation keeps the program that it calls


def _inner(step: Step) -> list[Any]:
    """The programs that an operation calls once, as they are; none where it calls none."""
    name = next((name for name in _PROGRAM if step.name in _CALLS and name in step.params), None)
    return [] if name is None else [getattr(e.params[name], "jaxpr", e.params[name]) for e in step.equations]


def _constants(step: Step) -> list[Sequence[Any]]:
    name = next(name for name in _PROGRAM if name in step.params)
    return [getattr(equation.params[name], "consts", ()) for equation in step.equations]


_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "custom_lin",
}  # fmt: skip


# --- programs inside operations --------------------------------------------------------------------------------


def _called(step: Step, name: str, which: int | None = None) -> list[Any]:
    programs = [equation.params[name] for equation in step.equations]
    return programs if which is None else [each[which] for each in programs]


def _joined(step: Step, outcomes: Sequence[Sequence[Kind]]) -> list[Kind]:
    """One kind for each output, whichever of the outcomes it has."""
    found = []
    for kinds in zip(*outcomes, strict=True):
        mixed = next((kind for kind in kinds if isinstance(kind, Mixed)), None)
        found.append(mixed or sum_of(kinds) or mixing(step))
    return found


def _cond(walk: Walk, step: Step) -> Sequence[Kind]:
    if step.kinds[0] not in (Same(0), Zero(), Never()):
        return [mixing(step)] * len(step.out_axes)
    if len({len(branches) for branches in _called(step, "branches")}) > 1:
        raise Apart("`cond` has more branches in one")
    branches = range(len(step.params["branches"]))
    return _joined(step, [walk.program(_called(step, "branches", k), step.kinds[1:]) for k in branches])


def _settled_carry(step: Step, body: Callable[[list[Kind]], list[Kind]], first: Sequence[Kind]) -> list[Kind]:
    """The kinds of a loop's carry that one more turn leaves as they are."""
    carry = list(first)
    for _ in range(2 + 3 * len(carry)):
        after = _joined(step, [carry, body(carry)[: len(carry)]])
        if after == carry:
            return carry
        carry = after
    return [mixing(step)] * len(carry)


def _scan(walk: Walk, step: Step) -> Sequence[Kind]:
    # What is constant, carried, or gone through is told by ranks: the names that JAX has for it change.
    inside, first = step.params["jaxpr"].jaxpr, step.equations[0]
    through = sum(_rank_of(a) != _rank_of(b) for a, b in zip(first.invars, inside.invars, strict=True))
    carried = sum(_rank_of(a) == _rank_of(b) for a, b in zip(first.outvars, inside.outvars, strict=True))
    fixed = len(first.invars) - carried - through
    consts, carry, over = step.kinds[:fixed], step.kinds[fixed : fixed + carried], step.kinds[fixed + carried :]
    if any(axis in (0, MANY) for axis in step.axes[fixed + carried :]):
        return [Mixed(f"it goes through the examples one by one{step.where}")] * len(step.out_axes)
    body = lambda carry: walk.program(_called(step, "jaxpr"), [*consts, *carry, *over])
    carry = _settled_carry(step, body, carry)
    return [*carry, *body(carry)[carried:]]


def _rank_of(atom: Any) -> int:
    return len(getattr(atom.aval, "shape", ()))


def _while(walk: Walk, step: Step) -> Sequence[Kind]:
    of_test, of_body = step.params["cond_nconsts"], step.params["body_nconsts"]
    test, fixed = step.kinds[:of_test], step.kinds[of_test : of_test + of_body]
    body = lambda carry: walk.program(_called(step, "body_jaxpr"), [*fixed, *carry])
    carry = _settled_carry(step, body, step.kinds[of_test + of_body :])
    if walk.program(_called(step, "cond_jaxpr"), [*test, *carry])[0] not in (Same(0), Zero(), Never()):
        return [Mixed(f"how often a loop turns depends on the examples{step.where}")] * len(step.out_axes)
    return carry


_CONTROL: dict[str, Callable[[Walk, Step], Sequence[Kind]]] = {"cond": _cond, "scan": _scan, "while": _while}
