"""Whether a loss is a mean over the examples of its batch: known, or proved from its traced program, never guessed.

A loss is a mean if there is a function f of one example with

    loss(params, B) = (1/|B|) Σ_{i in B} f(params, example i)        for every batch B of the sizes in question

A term without examples, such as a penalty, may be added: it is part of f. Such a loss may be evaluated in blocks of
rows, in parts, example by example, or with filled-up rows of weight 0, and gives the same to rounding. Any other loss
(a weighted average, a ratio of sums, a batch statistic, a maximum, a comparison of pairs) may not.

`losses.mean_loss` and `losses.mean_of` make means, and say so. For another function `doubt` traces value and gradient
at each of the sizes and follows the examples through the programs, operation by operation. Every array is one of

    Same(k)     nᵏ times what depends on no example and not on n
    PerRow(k)   nᵏ times an array along whose one axis of examples entry i depends on example i alone, alike for all i
    Total(k)    nᵏ times the sum over that axis of such an array
    Mixed       anything else

The axis of examples is the one whose length changes from size to size, so a feature dimension that happens to equal n
is not taken for it; the 1/n of a mean is the constant that changes as 1/n does. The loss is a mean at these sizes if
its value and each leaf of its gradient come out as Total(−1) or Same(0). The gradient is followed for itself, since a
`jax.custom_vjp` may make it another function than the derivative.

An operation without a rule makes Mixed. So a mean may remain unproved, but what is proved is a mean.
"""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.losses import MeanLoss
from jaxgrad.types import Loss, Params

try:  # Where a step is written. JAX does not promise this module; without it the place is not named.
    from jax._src import source_info_util
except ImportError:  # pragma: no cover
    source_info_util = None


@dataclass(frozen=True)
class Same:
    degree: int


@dataclass(frozen=True)
class Zero:
    """Zeros of any kind and degree."""


@dataclass(frozen=True)
class PerRow:
    degree: int


@dataclass(frozen=True)
class Total:
    degree: int


@dataclass(frozen=True)
class Position:
    """Entry i along the axis of examples is i itself."""


@dataclass(frozen=True)
class Placed:
    """Indices per row, of which component `column` (along the last axis) is the row's own position."""

    column: int


@dataclass(frozen=True)
class Never:
    """False everywhere."""


@dataclass(frozen=True)
class Mixed:
    why: str


Kind = Same | Zero | PerRow | Total | Position | Placed | Never | Mixed


HOW = (
    "Write the loss of one example and let losses.mean_of(example), or losses.mean_loss(model, example_loss), take the "
    "mean"
)


def of_one(loss: Loss, params: Params, data: Any, sizes: Sequence[int], why: str) -> Callable[[Params, Any], Any]:
    """`ℓ(params, example)`, the loss of one example of a mean over batches of `sizes` examples of `data`.

    It is the loss of a batch of that example alone; or twice, where the program for one row is not that for many, as of
    a net whose output is squeezed. Raises ValueError, which begins with `why`, if the loss is not known to be a mean.
    """
    copies = 1
    if found := doubt(loss, params, data, [1, *sizes]):
        copies, found = 2, doubt(loss, params, data, [2, *sizes])
    if found:
        raise ValueError(
            f"{why}, which needs a loss that is a mean over the examples; of this one it is not known: {found}. {HOW}"
        )

    def alone(params: Params, example: Any) -> Any:
        return loss(params, jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (copies, *jnp.shape(leaf))), example))

    return alone


def doubt(loss: Loss, params: Params, data: Any, sizes: Sequence[int]) -> str:
    """Why `loss` is not known to be a mean over the examples of batches of all these sizes; empty if it is known.

    `params` and `data` are pytrees of arrays or of their shapes; the leaves of `data` share their leading axis, whose
    length does not matter here. Nothing is computed or compiled.
    """
    if isinstance(loss, MeanLoss):
        return ""
    sizes = sorted({*sizes})
    if len(sizes) == 1:  # a second size shows which axis and which constants go with n
        sizes = [*sizes, 2 * sizes[0] + 1]
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype), params)
    batches = [
        jax.tree.map(lambda leaf, n=n: jax.ShapeDtypeStruct((n, *np.shape(leaf)[1:]), leaf.dtype), data) for n in sizes
    ]
    try:
        traced = [jax.make_jaxpr(jax.value_and_grad(loss))(one, batch) for batch in batches]
    except Exception as error:
        return f"it cannot be evaluated on batches of {' and '.join(f'{n:,}' for n in sizes)} examples ({_line(error)})"
    given = [Same(0)] * len(jax.tree.leaves(one)) + [PerRow(0)] * len(jax.tree.leaves(data))
    try:
        kinds = _Walk(tuple(sizes)).program(traced, given)
    except _Apart as apart:
        return f"its program for batches of {sizes[0]:,} and of {sizes[-1]:,} examples is not the same ({apart})"
    for kind in kinds:
        if isinstance(kind, Mixed):
            return kind.why
        if not _within(kind, Total(-1)):
            return _WRONG_SCALE
    return ""


_WRONG_SCALE = "it is a sum over the examples, or another multiple of their mean, that changes with their number"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160]}" if str(error) else type(error).__name__


class _Apart(Exception):
    """The programs for two sizes differ in more than their sizes."""


# --- how kinds combine -----------------------------------------------------------------------------------------


def _within(kind: Kind, other: Kind) -> bool:
    """Whether all that is `kind` is `other`: zeros are anything, and nᵏ⁺¹ c = nᵏ Σᵢ c is a total."""
    if kind == other or isinstance(kind, Zero):
        return True
    if isinstance(kind, Same):
        return other in (PerRow(kind.degree), Total(kind.degree - 1))
    return False


def _sum(kinds: Sequence[Kind]) -> Kind | None:
    """The kind of a sum, or of a choice among them that depends on no example; None where there is none."""
    found: Kind = Zero()
    for kind in kinds:
        if _within(found, kind):
            found = kind
        elif not _within(kind, found):
            return None
    return found if isinstance(found, Same | Zero | PerRow | Total) else None


def _product(a: Kind, b: Kind) -> Kind | None:
    """The kind of an elementwise product, None where there is none."""
    if isinstance(a, Zero) or isinstance(b, Zero):
        return Zero()
    if isinstance(a, Same) and isinstance(b, Same | PerRow | Total):
        return type(b)(a.degree + b.degree)
    if isinstance(b, Same) and isinstance(a, PerRow | Total):
        return type(a)(a.degree + b.degree)
    if isinstance(a, PerRow) and isinstance(b, PerRow):
        return PerRow(a.degree + b.degree)
    return None


def _plain(kinds: Sequence[Kind]) -> Kind | None:
    """The kind of any function, entry by entry or row by row, of what does not scale with n."""
    if any(kind not in (Same(0), PerRow(0), Zero(), Never()) for kind in kinds):
        return None
    return PerRow(0) if PerRow(0) in kinds else Same(0)


# --- the walk --------------------------------------------------------------------------------------------------


class _Step(NamedTuple):
    """One operation, as it stands in the program of each size."""

    equations: Sequence[Any]
    kinds: Sequence[Kind]
    """Of its inputs."""
    axes: Sequence[int | None]
    """The axis of examples of each input; `MANY` if more than one axis changes with n."""
    out_axes: Sequence[int | None]
    caller: str
    """Where the program that it stands in is called from, as `where` says it."""

    @property
    def where(self) -> str:
        """` (train.py:12)`, the person's line; nothing where JAX does not know it."""
        if source_info_util is None:
            return ""
        frames = source_info_util.user_frames(self.equations[0].source_info.traceback)
        frame = next(iter(frames), None)
        return f" ({os.path.basename(frame.file_name)}:{frame.start_line})" if frame else self.caller

    @property
    def name(self) -> str:
        return self.equations[0].primitive.name

    @property
    def params(self) -> dict[str, Any]:
        return self.equations[0].params

    @property
    def row_axes(self) -> set[int | None]:
        """The axes of examples of the inputs that have one."""
        return {axis for axis in self.axes if axis is not None}

    def shapes(self, number: int) -> list[tuple[int, ...]]:
        """Of input `number`, for each size."""
        return [tuple(equation.invars[number].aval.shape) for equation in self.equations]


MANY = -1


class _Walk:
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
                raise _Apart("a number in one is computed in another")
            if all(written):
                return self._constant([atom.val for atom in atoms])
            which = {table[atom] for table, atom in zip(numbers, atoms, strict=True)}
            if len(which) > 1:
                raise _Apart("its operations are connected otherwise")
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
            found = self._step(_Step(equations, kinds, axes, out_axes, self._caller))
            for variables, kind, axis in zip(outs, found, out_axes, strict=True):
                name(variables, self._settled(kind, axis))
        return [read(atoms) for atoms in _zipped([each.outvars for each in programs])]

    def _step(self, step: _Step) -> Sequence[Kind]:
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
        if step.name == "select_n" and step.kinds[0] == Never():
            return [step.kinds[1]]  # whatever the other case is
        if mixed:
            return [mixed] * many
        if MANY in step.axes or MANY in step.out_axes:
            return [Mixed(f"pairs of examples meet in `{step.name}`{step.where}")] * many
        rule = _RULES.get(step.name, _other)
        found = rule(step)
        if found is None:
            return [_mixing(step)] * many
        return found if isinstance(found, list) else [found] * many

    def _axis(self, atoms: Sequence[Any]) -> int | None:
        """Which axis changes with n, by a constant times n; `MANY` if several do, or one does otherwise."""
        shapes = [tuple(getattr(atom.aval, "shape", ())) for atom in atoms]
        if len({len(shape) for shape in shapes}) > 1:
            raise _Apart("its arrays differ in their number of axes")
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
            return Mixed("a constant of it has an entry for each example")
        if all(np.array_equal(array, arrays[0], equal_nan=array.dtype.kind == "f") for array in arrays):
            return Zero() if not arrays[0].any() else Same(0)
        for degree in (1, -1) if arrays[0].dtype.kind in "fiu" else ():
            scaled = [np.asarray(a, np.float64) / float(n) ** degree for a, n in zip(arrays, self.sizes, strict=True)]
            near = 4 * np.finfo(arrays[0].dtype).eps if arrays[0].dtype.kind == "f" else 0
            if all(np.allclose(each, scaled[0], rtol=near, atol=0) for each in scaled):
                return Same(degree)
        return Mixed("a constant of it changes with the number of examples, and not as 1/n")


def _zipped(sequences: Sequence[Sequence[Any]]) -> list[tuple[Any, ...]]:
    if len({len(sequence) for sequence in sequences}) > 1:
        raise _Apart("one has more operations")
    return list(zip(*sequences, strict=True))


_SIZES = {"shape", "new_sizes", "start_indices", "limit_indices", "slice_sizes", "sharding"}


def _check_alike(equations: Sequence[Any]) -> None:
    """Raise `_Apart` unless the operations of all sizes differ in their sizes only."""
    first = equations[0]
    for other in equations[1:]:
        if other.primitive is not first.primitive:
            raise _Apart(f"`{first.primitive.name}` in one is `{other.primitive.name}` in another")
        for name, value in first.params.items():
            # By their text, in which NaN is NaN.
            if name not in _SIZES and _is_simple(value) and repr(value) != repr(other.params.get(name)):
                raise _Apart(f"`{first.primitive.name}` differs in its {name}")


def _is_simple(value: Any) -> bool:
    """Whether a parameter of an operation is made of numbers, words and types only."""
    if isinstance(value, tuple | list):
        return all(map(_is_simple, value))
    return value is None or isinstance(value, bool | int | float | str | np.dtype | np.generic)


def _mixing(step: _Step) -> Mixed:
    if step.name == "div" and isinstance(step.kinds[1], Total):
        return Mixed(f"it divides by a sum over the examples{step.where}")
    if any(isinstance(kind, Total) for kind in step.kinds):
        return Mixed(f"it makes more of a sum over the examples than a mean{step.where}, in `{step.name}`")
    if any(isinstance(kind, Position | Placed) for kind in step.kinds):
        return Mixed(f"it computes with the places of the examples in the batch{step.where}")
    if any(getattr(kind, "degree", 0) for kind in step.kinds):
        return Mixed(f"it computes with the number of examples{step.where}")
    return Mixed(f"`{step.name}` mixes the examples, or is not known to keep them apart{step.where}")


_PROGRAM = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # the names under which an operation keeps the program that it calls


def _inner(step: _Step) -> list[Any]:
    """The programs that an operation calls once, as they are; none where it calls none."""
    name = next((name for name in _PROGRAM if step.name in _CALLS and name in step.params), None)
    return [] if name is None else [getattr(e.params[name], "jaxpr", e.params[name]) for e in step.equations]


def _constants(step: _Step) -> list[Sequence[Any]]:
    name = next(name for name in _PROGRAM if name in step.params)
    return [getattr(equation.params[name], "consts", ()) for equation in step.equations]


_CALLS = {
    "jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call",
    "custom_vjp_call_jaxpr", "custom_lin",
}  # fmt: skip


# --- programs inside operations --------------------------------------------------------------------------------


def _called(step: _Step, name: str, which: int | None = None) -> list[Any]:
    programs = [equation.params[name] for equation in step.equations]
    return programs if which is None else [each[which] for each in programs]


def _joined(step: _Step, outcomes: Sequence[Sequence[Kind]]) -> list[Kind]:
    """One kind for each output, whichever of the outcomes it has."""
    found = []
    for kinds in zip(*outcomes, strict=True):
        mixed = next((kind for kind in kinds if isinstance(kind, Mixed)), None)
        found.append(mixed or _sum(kinds) or _mixing(step))
    return found


def _cond(walk: _Walk, step: _Step) -> Sequence[Kind]:
    if step.kinds[0] not in (Same(0), Zero(), Never()):
        return [_mixing(step)] * len(step.out_axes)
    branches = range(len(step.params["branches"]))
    return _joined(step, [walk.program(_called(step, "branches", k), step.kinds[1:]) for k in branches])


def _settled_carry(step: _Step, body: Callable[[list[Kind]], list[Kind]], first: Sequence[Kind]) -> list[Kind]:
    """The kinds of a loop's carry that one more turn leaves as they are."""
    carry = list(first)
    for _ in range(2 + 3 * len(carry)):
        after = _joined(step, [carry, body(carry)[: len(carry)]])
        if after == carry:
            return carry
        carry = after
    return [_mixing(step)] * len(carry)


def _scan(walk: _Walk, step: _Step) -> Sequence[Kind]:
    fixed, carried = step.params["num_consts"], step.params["num_carry"]
    consts, carry, over = step.kinds[:fixed], step.kinds[fixed : fixed + carried], step.kinds[fixed + carried :]
    if any(axis in (0, MANY) for axis in step.axes[fixed + carried :]):
        return [Mixed(f"it goes through the examples one by one{step.where}")] * len(step.out_axes)
    body = lambda carry: walk.program(_called(step, "jaxpr"), [*consts, *carry, *over])  # noqa: E731
    carry = _settled_carry(step, body, carry)
    return [*carry, *body(carry)[carried:]]


def _while(walk: _Walk, step: _Step) -> Sequence[Kind]:
    of_test, of_body = step.params["cond_nconsts"], step.params["body_nconsts"]
    test, fixed = step.kinds[:of_test], step.kinds[of_test : of_test + of_body]
    body = lambda carry: walk.program(_called(step, "body_jaxpr"), [*fixed, *carry])  # noqa: E731
    carry = _settled_carry(step, body, step.kinds[of_test + of_body :])
    if walk.program(_called(step, "cond_jaxpr"), [*test, *carry])[0] not in (Same(0), Zero(), Never()):
        return [Mixed(f"how often a loop turns depends on the examples{step.where}")] * len(step.out_axes)
    return carry


_CONTROL: dict[str, Callable[[_Walk, _Step], Sequence[Kind]]] = {"cond": _cond, "scan": _scan, "while": _while}


# --- rules of operations ---------------------------------------------------------------------------------------
#
# A rule gives the kind of the outputs, or None for what has none. No input is Mixed; at most one axis of each input
# and output changes with n. What a rule gives is checked against the shapes once more (`_settled`).

Found = Kind | list[Kind] | None


def _other(step: _Step) -> Found:
    """An operation without a rule: known only where no example comes in and no axis of examples goes out."""
    if step.row_axes or any(axis is not None for axis in step.out_axes):
        return None
    return _plain(step.kinds) if PerRow(0) not in step.kinds else None


def _aligned(step: _Step) -> bool:
    """Whether the examples lie along one axis, the same in all inputs that have one and in the outputs."""
    return step.row_axes | {axis for axis in step.out_axes if axis is not None} == step.row_axes and (
        len(step.row_axes) <= 1
    )


def _pointwise(step: _Step) -> Found:
    """Any function, entry by entry."""
    return _plain(step.kinds) if _aligned(step) else None


def _compared(step: _Step) -> Found:
    if step.name == "lt" and step.kinds[0] == Position() and step.kinds[1] == Zero():
        return Never()  # no place is negative
    return _pointwise(step)


def _added(step: _Step) -> Found:
    return _sum(step.kinds) if _aligned(step) else None


def _multiplied(step: _Step) -> Found:
    return _product(*step.kinds) if _aligned(step) else None


def _divided(step: _Step) -> Found:
    over, under = step.kinds
    if not _aligned(step) or not isinstance(under, Same | PerRow):
        return None
    return _product(over, type(under)(-under.degree))


def _power(step: _Step) -> Found:
    power = 2 if step.name == "square" else step.params["y"]
    (kind,) = step.kinds
    return type(kind)(kind.degree * power) if isinstance(kind, Same | PerRow) else _plain(step.kinds)


def _linear(step: _Step) -> Found:
    """One input, whose entries keep their values and, if they are per row, their axis of examples."""
    return step.kinds[0] if _aligned(step) else None


def _converted(step: _Step) -> Found:
    to, from_ = step.params.get("new_dtype"), step.equations[0].invars[0].aval.dtype
    if isinstance(step.kinds[0], Position | Never):
        return step.kinds[0]
    exact = to is None or np.dtype(to).kind in "fcV" or np.dtype(from_).kind in "biu"
    return _linear(step) if exact else _pointwise(step)


def _moved(step: _Step) -> Found:
    """One input whose axes are moved, added or merged. Along the axis of examples the order must stay."""
    kind, axis, to = step.kinds[0], step.axes[0], step.out_axes[0]
    if isinstance(kind, Placed):
        return None
    if axis is None or to is None:
        return kind  # spread over examples, or without them: `_settled` sees which
    if step.name == "transpose":
        return kind if tuple(step.params["permutation"])[to] == axis else None
    if step.name == "broadcast_in_dim":
        return kind if tuple(step.params["broadcast_dimensions"])[axis] == to else None
    # A reshape in row-major order keeps the examples in line if as many entries lie before them as did.
    outs = [tuple(equation.outvars[0].aval.shape) for equation in step.equations]
    if any(math.prod(a[:axis]) != math.prod(b[:to]) for a, b in zip(step.shapes(0), outs, strict=True)):
        return None
    whole = all(a[axis] == b[to] for a, b in zip(step.shapes(0), outs, strict=True))
    return kind if whole or isinstance(kind, PerRow | Zero) else None


def _reduced(step: _Step) -> Found:
    kind, axes = step.kinds[0], tuple(step.params["axes"])
    if isinstance(kind, PerRow) and step.axes[0] in axes:
        return Total(kind.degree) if step.name == "reduce_sum" else None
    if step.name == "reduce_sum" and not isinstance(kind, Position | Placed | Never):
        return kind
    return _plain(step.kinds)


def _along(step: _Step) -> Found:
    """Any function along one axis, or along the last, that is not the examples'."""
    axis = step.params.get("axis", step.params.get("dimension"))
    rank = len(step.shapes(0)[0])
    if any(own in (axis, None if axis is not None else rank - 1) for own in step.row_axes) or not _aligned(step):
        return None
    linear = step.name == "cumsum" and isinstance(step.kinds[0], Same | PerRow | Total | Zero)
    return step.kinds[0] if linear else _plain(step.kinds)


def _batched(step: _Step) -> Found:
    """Any function of the last two axes, for each place of those before them."""
    rank = max(len(step.shapes(number)[0]) for number in range(len(step.kinds)))
    if any(axis >= rank - 2 for axis in step.row_axes if axis is not None) or len(step.row_axes) > 1:
        return None
    return _plain(step.kinds)


def _fourier(step: _Step) -> Found:
    axis, rank = step.axes[0], len(step.shapes(0)[0])
    inside = axis is not None and axis >= rank - len(step.params["fft_lengths"])
    return None if inside else step.kinds[0]


def _chosen(step: _Step) -> Found:
    which, *cases = step.kinds
    found = _sum(cases)
    if not _aligned(step) or which not in (Same(0), PerRow(0), Zero()):
        return None
    if which == PerRow(0) and isinstance(found, Same):
        return PerRow(found.degree)
    return None if which == PerRow(0) and isinstance(found, Total) else found


def _counted(step: _Step) -> Found:
    axis = step.out_axes[0]
    if axis is None or step.params["dimension"] != axis:
        return Same(0)
    return Position()


def _concatenated(step: _Step) -> Found:
    along = step.params["dimension"]
    rank = len(step.shapes(0)[0])
    if along in step.row_axes or not _aligned(step):
        return None
    if Position() in step.kinds:
        widths = [step.shapes(number)[0][along] for number in range(len(step.kinds))]
        at = step.kinds.index(Position())
        others = [kind for kind in step.kinds if kind != Position()]
        alone = len(others) == len(step.kinds) - 1 and widths[at] == 1 and along == rank - 1
        return Placed(sum(widths[:at])) if alone and _plain(others) else None
    return _sum(step.kinds)


def _sliced(step: _Step) -> Found:
    """A slice that leaves the axis of examples whole and takes the same of every other axis at each size."""
    kind, axis = step.kinds[0], step.axes[0]
    starts, limits = zip(*((e.params["start_indices"], e.params["limit_indices"]) for e in step.equations), strict=True)
    strides = step.params["strides"] or (1,) * len(starts[0])
    for other in range(len(starts[0])):
        if other == axis:
            whole = all(
                start[other] == 0 and limit[other] == shape[other]
                for start, limit, shape in zip(starts, limits, step.shapes(0), strict=True)
            )
            if not whole or strides[other] != 1:
                return None
        elif len({start[other] for start in starts}) > 1 or len({limit[other] for limit in limits}) > 1:
            raise _Apart("`slice` takes other entries")
    return kind


def _sliced_at(step: _Step) -> Found:
    """A slice whose place is computed, from no example, and that leaves their axis whole."""
    if any(kind not in (Same(0), Zero()) for kind in step.kinds[1:]):
        return None
    return step.kinds[0] if step.out_axes[0] == step.axes[0] else None


def _updated_at(step: _Step) -> Found:
    if any(kind not in (Same(0), Zero()) for kind in step.kinds[2:]) or not _aligned(step):
        return None
    if step.axes[0] is not None and step.axes[1] is None and not isinstance(step.kinds[1], Zero):
        return None
    if step.axes[0] is not None and step.shapes(0)[0][step.axes[0]] != step.shapes(1)[0][step.axes[0]]:
        return None
    return _sum(step.kinds[:2])


def _reversed(step: _Step) -> Found:
    return None if step.axes[0] in step.params["dimensions"] else _linear(step)


def _split(step: _Step) -> Found:
    return None if step.axes[0] == step.params["axis"] else [step.kinds[0]] * len(step.out_axes)


def _padded(step: _Step) -> Found:
    if not _aligned(step):
        return None
    axis = step.axes[0]
    if axis is not None and tuple(step.params["padding_config"][axis]) != (0, 0, 0):
        return None
    return _sum(step.kinds)


def _windowed(step: _Step) -> Found:
    """Windows over other axes than the examples'."""
    axes = step.row_axes
    if len(axes) > 1 or not _aligned(step):
        return None
    for axis in axes:
        assert axis is not None
        sizes = (step.params["window_dimensions"][axis], step.params["window_strides"][axis])
        if sizes != (1, 1) or tuple(step.params["padding"][axis]) != (0, 0):
            return None
    if step.name == "reduce_window_sum":
        return step.kinds[0]
    if step.name == "select_and_scatter_add":  # the slope of a maximum: linear in what comes back
        return step.kinds[0] if _plain(step.kinds[1:]) and isinstance(step.kinds[0], PerRow | Same | Zero) else None
    return _plain(step.kinds)


def _dot(step: _Step) -> Found:
    (left, right), (left_axis, right_axis) = step.kinds, step.axes
    (contracted, batched) = step.params["dimension_numbers"]
    if left_axis is not None and right_axis is not None:
        if (left_axis, right_axis) in zip(*contracted, strict=True):
            found = _product(left, right)
            return Total(found.degree) if isinstance(found, PerRow) else found
        return _product(left, right) if (left_axis, right_axis) in zip(*batched, strict=True) else None
    return _product(left, right)


def _convolved(step: _Step) -> Found:
    (left, right), (left_axis, right_axis) = step.kinds, step.axes
    layout = step.params["dimension_numbers"]
    if step.params["batch_group_count"] != 1:
        return None
    if left_axis is None and right_axis is None:
        return _product(left, right)
    if right_axis is None:
        same = left_axis == layout.lhs_spec[0] and step.out_axes[0] == layout.out_spec[0]
        return _product(left, right) if same else None
    whole = step.params["feature_group_count"] == 1 and step.out_axes[0] is None
    if whole and left_axis == layout.lhs_spec[1] and right_axis == layout.rhs_spec[1]:
        found = _product(left, right)  # the gradient of a kernel: features are summed over, and these are examples
        return Total(found.degree) if isinstance(found, PerRow) else found
    return None


def _gathered(step: _Step) -> Found:
    """Entries of an array by index: of shared ones by the indices of each row, or of each row's own."""
    (operand, indices), (axis, index_axis) = step.kinds, step.axes
    numbers, out = step.params["dimension_numbers"], step.out_axes[0]
    places = [k for k in range(_rank(step, out=True)) if k not in numbers.offset_dims]  # of the indices' axes, in order
    if axis is None:
        if not isinstance(operand, Same | Zero | Total) or indices not in (Same(0), PerRow(0), Zero()):
            return None
        if index_axis is None:
            return operand
        if isinstance(operand, Total):
            return None
        return PerRow(getattr(operand, "degree", 0)) if out == places[index_axis] else None
    if index_axis is None:  # the same entries of each row
        if indices not in (Same(0), Zero()) or axis in (
            *numbers.start_index_map,
            *numbers.collapsed_slice_dims,
            *numbers.operand_batching_dims,
        ):
            return None
        left = [k for k in range(_rank(step)) if k not in _gone(numbers)]
        whole = all(
            e.params["slice_sizes"][axis] == s[axis] for e, s in zip(step.equations, step.shapes(0), strict=True)
        )
        return operand if whole and out == numbers.offset_dims[left.index(axis)] else None
    if not isinstance(operand, PerRow | Zero) or out != places[index_axis]:
        return None
    paired = (axis, index_axis) in zip(
        numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True
    ) and indices == PerRow(0)
    own = isinstance(indices, Placed) and numbers.start_index_map[indices.column] == axis and _as_many(step)
    return operand if paired or (own and axis in numbers.collapsed_slice_dims) else None


def _as_many(step: _Step) -> bool:
    """Whether there are as many rows of indices as of what they point into."""
    axis, index_axis = step.axes[0], step.axes[1]
    return axis is not None and index_axis is not None and step.shapes(0)[0][axis] == step.shapes(1)[0][index_axis]


def _gone(numbers: Any) -> tuple[int, ...]:
    return (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)


def _rank(step: _Step, out: bool = False) -> int:
    first = step.equations[0]
    return len((first.outvars if out else first.invars)[0].aval.shape)


def _scattered(step: _Step) -> Found:
    """`operand + updates at indices`: the way back of `_gathered`."""
    (operand, indices, updates), (axis, index_axis, update_axis) = step.kinds, step.axes
    numbers = step.params["dimension_numbers"]
    rank = len(step.shapes(2)[0])
    places = [k for k in range(rank) if k not in numbers.update_window_dims]
    if not isinstance(updates, Same | PerRow | Total | Zero):
        return None
    if axis is None:
        if indices not in (Same(0), PerRow(0), Zero()):
            return None
        if update_axis is None:
            return _sum([operand, updates]) if index_axis is None else None
        if index_axis is None or places[index_axis] != update_axis:
            return None
        return _sum([operand, Total(updates.degree) if isinstance(updates, PerRow) else updates])
    if not isinstance(operand, PerRow | Zero) or isinstance(updates, Total):
        return None
    if index_axis is None:
        gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        if indices not in (Same(0), Zero()) or axis in (*numbers.scatter_dims_to_operand_dims, *gone):
            return None
        left = [k for k in range(_rank(step)) if k not in gone]
        return _sum([operand, updates]) if update_axis == numbers.update_window_dims[left.index(axis)] else None
    paired = (axis, index_axis) in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ) and indices == PerRow(0)
    own = isinstance(indices, Placed) and numbers.scatter_dims_to_operand_dims[indices.column] == axis
    own = own and _as_many(step)
    if not (paired or (own and axis in numbers.inserted_window_dims)) or update_axis != places[index_axis]:
        return None
    return _sum([operand, updates])


def _barrier(step: _Step) -> Found:
    return list(step.kinds)


_POINTWISE = (
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt",
    "ceil", "cos", "cosh", "digamma", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge", "gt",
    "igamma", "igammac", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "max", "min", "ne", "nextafter",
    "not", "or", "polygamma", "population_count", "pow", "regularized_incomplete_beta", "rem", "round", "rsqrt",
    "shift_left", "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "tan", "tanh",
    "threefry2x32", "xor", "zeta",
)  # fmt: skip

_RULES: dict[str, Callable[[_Step], Found]] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("add", "sub", "add_any"), _added),
    **dict.fromkeys(("neg", "real", "imag", "conj", "copy", "copy_p", "stop_gradient", "reduce_precision"), _linear),
    **dict.fromkeys(("transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim"), _moved),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reduced,
    ),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "sort", "top_k"), _along),
    **dict.fromkeys(("cholesky", "triangular_solve", "lu", "eigh"), _batched),
    **dict.fromkeys(("reduce_window_max", "reduce_window_min", "reduce_window_sum"), _windowed),
    "select_and_scatter_add": _windowed,
    "lt": _compared,
    "mul": _multiplied,
    "div": _divided,
    "integer_pow": _power,
    "square": _power,
    "convert_element_type": _converted,
    "fft": _fourier,
    "select_n": _chosen,
    "clamp": _pointwise,
    "iota": _counted,
    "concatenate": _concatenated,
    "slice": _sliced,
    "dynamic_slice": _sliced_at,
    "dynamic_update_slice": _updated_at,
    "rev": _reversed,
    "split": _split,
    "pad": _padded,
    "dot_general": _dot,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
    "scatter-add": _scattered,
    "optimization_barrier": _barrier,
}  # fmt: skip
