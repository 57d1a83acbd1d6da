"""How each operation of a program treats the examples of a batch: a rule for each (see `jaxgrad.means`).

A rule gives the kind of the outputs of an operation, or None for what has none. No input is Mixed; at most one axis of
each input and output changes with n. What a rule gives is checked against the shapes once more, by the walk.

A new operation of JAX without a rule here makes Mixed: a loss that uses it is evaluated whole. A rule is one function,
named in `RULES` at the end.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad.means.kinds import (
    Kind,
    Mixed,
    Never,
    PerRow,
    Placed,
    Position,
    Same,
    Total,
    Zero,
    plain,
    product_of,
    sum_of,
)

try:  # Where a step is written. JAX does not promise this module; without it the place is not named.
    from jax._src import source_info_util
except ImportError:  # pragma: no cover
    source_info_util = None

MANY = -1
"""In the place of an axis: more than one axis changes with n, or one does otherwise than by a factor."""


class Apart(Exception):
    """The programs for two sizes differ in more than their sizes."""


class Step(NamedTuple):
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


def mixing(step: Step) -> Mixed:
    if step.name == "div" and isinstance(step.kinds[1], Total):
        return Mixed(f"it divides by a sum over the examples{step.where}")
    if any(isinstance(kind, Total) for kind in step.kinds):
        return Mixed(f"it makes more of a sum over the examples than a mean{step.where}, in `{step.name}`")
    if any(isinstance(kind, Position | Placed) for kind in step.kinds):
        return Mixed(f"it computes with the places of the examples in the batch{step.where}")
    if any(getattr(kind, "degree", 0) for kind in step.kinds):
        return Mixed(f"it computes with the number of examples{step.where}")
    return Mixed(f"`{step.name}` mixes the examples, or is not known to keep them apart{step.where}")


Found = Kind | list[Kind] | None


# --- what holds for every operation ----------------------------------------------------------------------------

_WITH_PLACES = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "expand_dims", "gather", "lt",
    "reshape", "scatter-add", "select_n", "squeeze", "transpose",
}  # fmt: skip
"""What may be done with the places of examples."""
_MAKE_ROWS = {"broadcast_in_dim", "iota"}
"""What may make an axis of examples where there was none."""
_COUNT = {
    "add", "broadcast_in_dim", "convert_element_type", "copy", "copy_p", "dot_general", "expand_dims", "reduce_sum",
    "reshape", "scatter-add", "squeeze", "transpose",
}  # fmt: skip
"""What keeps a sum of whole numbers a sum: division, negation and powers of them round or wrap around."""


def forbidden(step: Step) -> str:
    """Why nothing can be said of an operation, whichever it is; empty if its rule may say."""
    first = step.equations[0]
    if any(hasattr(atom.aval, "inner_aval") for atom in (*first.invars, *first.outvars)):
        return f"`{step.name}` changes an array in place"
    if first.effects and step.out_axes:
        return f"`{step.name}` has an effect besides its value"
    if step.name not in _WITH_PLACES and any(isinstance(kind, Position | Placed) for kind in step.kinds):
        return "it computes with the places of the examples in the batch"
    makes = any(axis is not None for axis in step.out_axes) and not step.row_axes
    if makes and step.name not in _MAKE_ROWS:
        return f"`{step.name}` takes as many entries of a fixed array as there are examples"
    return ""


def holds(step: Step, number: int, kind: Kind) -> bool:
    """Whether output `number` can be of this kind in its dtype: whole numbers are rounded, cut off, or wrap around."""
    dtype = step.equations[0].outvars[number].aval.dtype
    if jnp.issubdtype(dtype, jnp.inexact) or isinstance(kind, Mixed | Zero | Never | Position | Placed):
        return not isinstance(kind, Position) or _counts_far(dtype)
    if isinstance(kind, Total):
        return kind.degree == 0 and step.name in _COUNT and _counts_far(dtype)
    return kind.degree == 0


def _counts_far(dtype: Any) -> bool:
    """Whether a dtype is one of whole numbers that reach beyond any number of examples."""
    return jnp.issubdtype(dtype, jnp.integer) and np.dtype(dtype).itemsize >= 4


# --- one operation each ----------------------------------------------------------------------------------------


def unknown(step: Step) -> Found:
    """An operation without a rule: known only where no example comes in and no axis of examples goes out."""
    parts = jax.tree.leaves(list(step.params.values()))
    calls = any(callable(part) or hasattr(part, "eqns") or hasattr(part, "jaxpr") for part in parts)
    if calls and not step.name.startswith("random_"):
        return None  # what it calls may know n
    if step.row_axes or any(axis is not None for axis in step.out_axes):
        return None
    return plain(step.kinds) if PerRow(0) not in step.kinds else None


def _whole(step: Step) -> bool:
    """Whether the first two arrays have their axis of examples in one length, at each size; neither has one will do."""
    if step.axes[0] is None or step.axes[1] is None:
        return step.axes[0] is None and step.axes[1] is None
    return all(a[step.axes[0]] == b[step.axes[1]] for a, b in zip(step.shapes(0), step.shapes(1), strict=True))


def _inexact(step: Step) -> bool:
    return jnp.issubdtype(step.equations[0].outvars[0].aval.dtype, jnp.inexact)


def _aligned(step: Step) -> bool:
    """Whether the examples lie along one axis, the same in all inputs that have one and in the outputs."""
    return step.row_axes | {axis for axis in step.out_axes if axis is not None} == step.row_axes and (
        len(step.row_axes) <= 1
    )


def _pointwise(step: Step) -> Found:
    """Any function, entry by entry."""
    return plain(step.kinds) if _aligned(step) else None


def _compared(step: Step) -> Found:
    if step.name == "lt" and step.kinds[0] == Position() and step.kinds[1] == Zero():
        return Never()  # no place is negative
    return _pointwise(step)


def _added(step: Step) -> Found:
    return sum_of(step.kinds) if _aligned(step) else None


def _multiplied(step: Step) -> Found:
    return product_of(*step.kinds) if _aligned(step) else None


def _divided(step: Step) -> Found:
    over, under = step.kinds
    if not _inexact(step):
        return _pointwise(step)
    if not _aligned(step) or not isinstance(under, Same | PerRow):
        return None
    return product_of(over, type(under)(-under.degree))


def _power(step: Step) -> Found:
    power = 2 if step.name == "square" else step.params["y"]
    (kind,) = step.kinds
    if not _inexact(step):
        return _pointwise(step)
    return type(kind)(kind.degree * power) if isinstance(kind, Same | PerRow) else plain(step.kinds)


def _linear(step: Step) -> Found:
    """One input, whose entries keep their values and, if they are per row, their axis of examples."""
    return step.kinds[0] if _aligned(step) else None


def _converted(step: Step) -> Found:
    kind, to, was = step.kinds[0], step.params["new_dtype"], step.equations[0].invars[0].aval.dtype
    if isinstance(kind, Position | Placed | Never):
        return kind
    wider = jnp.issubdtype(to, jnp.integer) and np.dtype(to).itemsize > np.dtype(was).itemsize
    exact = jnp.issubdtype(to, jnp.inexact) or (wider and not jnp.issubdtype(was, jnp.inexact))
    return _linear(step) if exact else _pointwise(step)


def _moved(step: Step) -> Found:
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


def _reduced(step: Step) -> Found:
    kind, axes = step.kinds[0], tuple(step.params["axes"])
    if isinstance(kind, PerRow) and step.axes[0] in axes:
        return Total(kind.degree) if step.name == "reduce_sum" else None
    if step.name == "reduce_sum" and not isinstance(kind, Position | Placed | Never):
        return kind
    return plain(step.kinds)


def _along(step: Step) -> Found:
    """Any function along one axis, or along the last, that is not the examples'."""
    axis = step.params.get("axis", step.params.get("dimension"))
    rank = len(step.shapes(0)[0])
    if any(own in (axis, None if axis is not None else rank - 1) for own in step.row_axes) or not _aligned(step):
        return None
    linear = step.name == "cumsum" and isinstance(step.kinds[0], Same | PerRow | Total | Zero)
    return step.kinds[0] if linear else plain(step.kinds)


def _batched(step: Step) -> Found:
    """Any function of the last two axes, for each place of those before them."""
    rank = max(len(step.shapes(number)[0]) for number in range(len(step.kinds)))
    if any(axis >= rank - 2 for axis in step.row_axes if axis is not None) or len(step.row_axes) > 1:
        return None
    return plain(step.kinds)


def _fourier(step: Step) -> Found:
    axis, rank = step.axes[0], len(step.shapes(0)[0])
    inside = axis is not None and axis >= rank - len(step.params["fft_lengths"])
    return None if inside else step.kinds[0]


def _chosen(step: Step) -> Found:
    which, *cases = step.kinds
    found = sum_of(cases)
    if not _aligned(step) or which not in (Same(0), PerRow(0), Zero()):
        return None
    if which == PerRow(0) and isinstance(found, Same):
        return PerRow(found.degree)
    return None if which == PerRow(0) and isinstance(found, Total) else found


def _counted(step: Step) -> Found:
    axis = step.out_axes[0]
    return Same(0) if axis is None or step.params["dimension"] != axis else Position()


def _concatenated(step: Step) -> Found:
    along = step.params["dimension"]
    rank = len(step.shapes(0)[0])
    if along in step.row_axes or not _aligned(step):
        return None
    if Position() in step.kinds:
        widths = [step.shapes(number)[0][along] for number in range(len(step.kinds))]
        at = step.kinds.index(Position())
        others = [kind for kind in step.kinds if kind != Position()]
        alone = len(others) == len(step.kinds) - 1 and widths[at] == 1 and along == rank - 1
        return Placed(sum(widths[:at])) if alone and plain(others) else None
    return sum_of(step.kinds)


def _sliced(step: Step) -> Found:
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
            raise Apart("`slice` takes other entries")
    return kind


def _sliced_at(step: Step) -> Found:
    """A slice whose place is computed, from no example, and that leaves their axis whole."""
    if any(kind not in (Same(0), Zero()) for kind in step.kinds[1:]) or step.out_axes[0] != step.axes[0]:
        return None
    axis = step.axes[0]
    outs = [tuple(equation.outvars[0].aval.shape) for equation in step.equations]
    whole = axis is None or all(a[axis] == b[axis] for a, b in zip(step.shapes(0), outs, strict=True))
    return step.kinds[0] if whole else None


def _updated_at(step: Step) -> Found:
    if any(kind not in (Same(0), Zero()) for kind in step.kinds[2:]) or not _aligned(step) or not _whole(step):
        return None
    return sum_of(step.kinds[:2])


def _reversed(step: Step) -> Found:
    return None if step.axes[0] in step.params["dimensions"] else _linear(step)


def _split(step: Step) -> Found:
    return None if step.axes[0] == step.params["axis"] else [step.kinds[0]] * len(step.out_axes)


def _stacked(step: Step) -> Found:
    along, axes = step.params["axis"], step.row_axes
    if len(axes) > 1 or any(axis + (axis >= along) != step.out_axes[0] for axis in axes if axis is not None):
        return None
    return sum_of(step.kinds)


def _unstacked(step: Step) -> Found:
    return None if step.axes[0] == step.params["axis"] else [step.kinds[0]] * len(step.out_axes)


def _tiled(step: Step) -> Found:
    axis = step.axes[0]
    return _linear(step) if axis is None or step.params["reps"][axis] == 1 else None


def _padded(step: Step) -> Found:
    if not _aligned(step):
        return None
    axis = step.axes[0]
    if axis is not None and tuple(step.params["padding_config"][axis]) != (0, 0, 0):
        return None
    return sum_of(step.kinds)


def _windowed(step: Step) -> Found:
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
        return step.kinds[0] if plain(step.kinds[1:]) and isinstance(step.kinds[0], PerRow | Same | Zero) else None
    return plain(step.kinds)


def _dot(step: Step) -> Found:
    (left, right), (left_axis, right_axis) = step.kinds, step.axes
    (contracted, batched) = step.params["dimension_numbers"]
    if left_axis is not None and right_axis is not None:
        if (left_axis, right_axis) in zip(*contracted, strict=True):
            found = product_of(left, right)
            return Total(found.degree) if isinstance(found, PerRow) else found
        return product_of(left, right) if (left_axis, right_axis) in zip(*batched, strict=True) else None
    return product_of(left, right)


def _convolved(step: Step) -> Found:
    (left, right), (left_axis, right_axis) = step.kinds, step.axes
    layout = step.params["dimension_numbers"]
    if left_axis is None and right_axis is None:
        return product_of(left, right)
    if right_axis is None:
        if step.params["batch_group_count"] != 1:
            return None
        same = left_axis == layout.lhs_spec[0] and step.out_axes[0] == layout.out_spec[0]
        return product_of(left, right) if same else None
    whole = step.params["feature_group_count"] == 1 and step.out_axes[0] is None
    if whole and left_axis == layout.lhs_spec[1] and right_axis == layout.rhs_spec[1]:
        found = product_of(left, right)  # the gradient of a kernel: features are summed over, and these are examples
        return Total(found.degree) if isinstance(found, PerRow) else found
    return None


def _gathered(step: Step) -> Found:
    """Entries of an array by index: of shared ones by the indices of each row, or of each row's own."""
    (operand, indices), (axis, index_axis) = step.kinds, step.axes
    numbers, out = step.params["dimension_numbers"], step.out_axes[0]
    places = [k for k in range(_rank(step, out=True)) if k not in numbers.offset_dims]  # of the indices' axes, in order
    if _fills(step):  # with a number of its own where an index is out of range
        if operand not in (Same(0), PerRow(0), Zero()):
            return None
        operand = Same(0) if axis is None else PerRow(0)
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


def _fills(step: Step) -> bool:
    """Whether a gather puts another value than NaN or 0 in the place of what is out of range, or any beside zeros."""
    if "FILL" not in str(step.params["mode"]):
        return False
    fill = step.params["fill_value"]
    harmless = _inexact(step) if fill is None else fill == 0 or fill != fill
    return not harmless or isinstance(step.kinds[0], Zero)


def _as_many(step: Step) -> bool:
    """Whether there are as many rows of indices as of what they point into."""
    return step.axes[0] is not None and _whole(step)


def _gone(numbers: Any) -> tuple[int, ...]:
    return (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)


def _rank(step: Step, out: bool = False) -> int:
    first = step.equations[0]
    return len((first.outvars if out else first.invars)[0].aval.shape)


def _scattered(step: Step) -> Found:
    """`operand + updates at indices`, the way back of `_gathered`; or updates in the place of entries, or the like.

    These others only for each row by itself.
    """
    adds = step.name == "scatter-add"
    together = sum_of if step.name in ("scatter-add", "scatter") else plain
    (operand, indices, updates), (axis, index_axis, update_axis) = step.kinds, step.axes
    numbers = step.params["dimension_numbers"]
    rank = len(step.shapes(2)[0])
    places = [k for k in range(rank) if k not in numbers.update_window_dims]
    if not isinstance(updates, Same | PerRow | Total | Zero):
        return None
    if axis is None:
        if not adds or indices not in (Same(0), PerRow(0), Zero()):
            return None
        if update_axis is None:
            return sum_of([operand, updates]) if index_axis is None else None
        if index_axis is None or places[index_axis] != update_axis:
            return None
        return sum_of([operand, Total(updates.degree) if isinstance(updates, PerRow) else updates])
    if not isinstance(operand, PerRow | Zero) or isinstance(updates, Total):
        return None
    if index_axis is None:
        gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        if indices not in (Same(0), Zero()) or axis in (*numbers.scatter_dims_to_operand_dims, *gone):
            return None
        left = [k for k in range(_rank(step)) if k not in gone]
        whole = update_axis == numbers.update_window_dims[left.index(axis)] and _as_long(step, 0, axis, 2, update_axis)
        return together([operand, updates]) if whole else None
    paired = (axis, index_axis) in zip(
        numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True
    ) and indices == PerRow(0)
    own = isinstance(indices, Placed) and numbers.scatter_dims_to_operand_dims[indices.column] == axis
    own = own and _as_many(step)
    if not (paired or (own and axis in numbers.inserted_window_dims)) or update_axis != places[index_axis]:
        return None
    return together([operand, updates])


def _as_long(step: Step, a: int, axis: int, b: int, other: int | None) -> bool:
    """Whether two axes of two inputs are of one length, at each size."""
    pairs = zip(step.shapes(a), step.shapes(b), strict=True)
    return other is not None and all(x[axis] == y[other] for x, y in pairs)


def _bits(step: Step) -> Found:
    """The same bits as another dtype, entry by entry."""
    widths = {np.dtype(atom.aval.dtype).itemsize for atom in (*step.equations[0].invars, *step.equations[0].outvars)}
    return _pointwise(step) if len(widths) == 1 else None


def _barrier(step: Step) -> Found:
    return list(step.kinds)


_POINTWISE = (
    "abs", "acos", "acosh", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e", "cbrt",
    "ceil", "clz", "cos", "cosh", "digamma", "eq", "eq_to", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "igamma", "igammac", "is_finite", "le", "le_to", "lgamma", "log", "log1p", "log2", "logistic",
    "lt_to", "max", "min", "ne", "nextafter", "not", "one_minus_square", "or", "polygamma", "polynomial",
    "population_count", "pow", "regularized_incomplete_beta", "rem", "round", "rsqrt", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sign", "sin", "sinh", "sqrt", "tan", "tanh", "threefry2x32",
    "xor", "zeta",
)  # fmt: skip

RULES: dict[str, Callable[[Step], Found]] = {
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
    "stack": _stacked,
    "unstack": _unstacked,
    "tile": _tiled,
    "pad": _padded,
    "dot_general": _dot,
    "conv_general_dilated": _convolved,
    "gather": _gathered,
    **dict.fromkeys(("scatter-add", "scatter", "scatter-mul", "scatter-min", "scatter-max"), _scattered),
    "bitcast_convert_type": _bits,
    "complex": _added,
    "optimization_barrier": _barrier,
}
