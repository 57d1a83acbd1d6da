"""What the person handed over, made uniform: functions of flat lists of float64 leaves."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.flatten_util
import jax.numpy as jnp
import numpy as np

from jaxgrad.check.evaluate.blame import raised_by
from jaxgrad.check.program import steps
from jaxgrad.check.program.replay import lacks_reverse_mode, quick_jit


class Spec(NamedTuple):
    """How flat lists become the person's arguments. Hashable when their static parts are."""

    params: Any
    """Treedef of the parameters."""
    fixed_params: tuple[Any, ...]
    """Per leaf of `params`: the leaf itself if it is not differentiated, else `MOVES`."""
    data: Any
    fixed_data: tuple[Any, ...]
    params_kinds: tuple[str, ...]
    data_kinds: tuple[str, ...]
    keywords: tuple[str, ...]
    has_batch: bool
    has_aux: bool
    types: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    """The floating types that were given, of the parameters and of the data, where the loss works in those only."""


class Moves(NamedTuple):
    """Marks a leaf that is filled in from the flat list."""


MOVES = Moves()


class Problem(NamedTuple):
    """A loss and a hand gradient over flat leaves, with the point that was given."""

    loss: Callable[..., Any]
    gradient: Callable[..., Any]
    spec: Spec
    paths: tuple[str, ...]
    leaves: tuple[np.ndarray, ...]
    data: tuple[Any, ...]
    axes: tuple[int | None, ...]
    """For each data array the axis that counts the examples, or None."""
    n: int | None
    names: tuple[str, ...]
    """What each data array is called: its path in the arguments."""
    complex: tuple[bool, ...] = ()
    """Which leaves hold complex numbers: as real and imaginary parts, along a last axis of 2."""
    asked: tuple[bool, ...] = ()
    """Which leaves are to be compared; empty: all."""
    points: tuple[tuple[np.ndarray, ...], ...] = ()
    """Parameters to try in place of drawn ones; empty: draw them."""
    redraw: Callable[[np.random.Generator], tuple[Any, ...]] | None = None
    """Draws other data, where they are not examples."""

    def compares(self, leaf: int) -> bool:
        return not self.asked or self.asked[leaf]


class Malformed(NamedTuple):
    """A gradient that is not one: why, and at which leaf."""

    sentence: str
    leaf: str | None
    transposed: bool = False
    values: tuple[np.ndarray, ...] = ()


NO_BATCH = object()


def prepare(
    loss: Any,
    gradient: Any,
    params: Any,
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    has_aux: bool,
    argument_names: Sequence[str] | None = None,
) -> Problem:
    """Check and flatten the arguments; raises `TypeError` or `ValueError` that says what was wrong.

    A complex leaf w = x + i y becomes a real one with a last axis of 2, (x, y). By JAX's convention its gradient
    is ∂L/∂x − i ∂L/∂y, the conjugate of the direction of steepest ascent.
    """
    require_functions(loss, gradient)
    with_paths, params_tree = jax.tree_util.tree_flatten_with_path(params)
    leaves, kinds, fixed, paths = [], [], [], []
    for path, leaf in with_paths:
        name = leaf_name(path)
        kind = _kind(_unmasked(f"params leaf {name}", leaf))
        if kind in PARAMETERS and np.size(leaf) == 0:
            raise ValueError(
                f"params leaf {name} is empty (shape {np.shape(leaf)}): there is nothing to differentiate."
            )
        kinds.append(kind)
        if kind in PARAMETERS:
            try:
                value = as_real(leaf) if kind.startswith("complex") else np.asarray(leaf).astype(np.float64)
            except OverflowError:
                raise ValueError(
                    f"params leaf {name} is a number beyond float64: start from finite parameters."
                ) from None
            if not np.all(np.isfinite(value)):
                bad = np.argwhere(~np.isfinite(value))[0]
                raise ValueError(
                    f"params leaf {name} holds {value[tuple(bad)]} at {_index(bad)}: start from finite parameters."
                )
            leaves.append(value)
            fixed.append(MOVES)
            paths.append(name)
        else:
            fixed.append(leaf)
    unknown = [(leaf_name(path), leaf) for path, leaf in with_paths if holds_arrays(leaf)]
    if not leaves and unknown:
        name, leaf = unknown[0]
        named = "params is" if name == "params" else f"params leaf {name} is"
        raise TypeError(f"{named} {_describe(leaf)}, which JAX does not take apart: {how_to_register(leaf)}.")
    if not leaves:
        seen = ", ".join(f"{leaf_name(p)}: {_describe(v)}" for p, v in with_paths[:4]) or "no leaves at all"
        raise TypeError(
            f"params has no floating-point leaf ({seen}). Gradients need floats: "
            "use jnp.zeros(3) or np.array([0.0, 1.0]) instead of integers."
        )
    data_tree_input = (arguments, keywords)
    data_paths, data_tree = jax.tree_util.tree_flatten_with_path(data_tree_input)
    data, data_kinds, data_fixed, data_names = [], [], [], []
    for path, leaf in data_paths:
        name = _data_name(loss, path, argument_names)
        kind = _kind(_unmasked(name, leaf), data=True)
        data_kinds.append(kind)
        if kind in ("numpy", "jax", "int-numpy", "int-jax"):
            array = np.asarray(leaf)
            if kind in ("numpy", "jax"):
                array = array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
                if not np.all(np.isfinite(array)):
                    bad = np.argwhere(~np.isfinite(array))[0]
                    raise ValueError(f"the batch holds {array[tuple(bad)]} in {name} at {_index(bad)}.")
            data.append(array)
            data_fixed.append(MOVES)
            data_names.append(name)
        else:
            data_fixed.append(leaf)
    n = next((a.shape[0] for a in data if a.ndim > 0), None)
    if n == 0:
        raise ValueError("the batch is empty (leading axis 0): give at least one example.")
    axes = tuple(0 if a.ndim > 0 and a.shape[0] == n else None for a in data)
    spec = Spec(
        params_tree,
        tuple(fixed),
        data_tree,
        tuple(data_fixed),
        tuple(kinds),
        tuple(data_kinds),
        tuple(keywords),
        bool(arguments),
        has_aux,
    )
    pairs = tuple(k.startswith("complex") for k in kinds if k in PARAMETERS)
    return Problem(loss, gradient, spec, tuple(paths), tuple(leaves), tuple(data), axes, n, tuple(data_names), pairs)


def holds_arrays(leaf: Any, kinds: tuple[type, ...] = (float, np.ndarray, jax.Array)) -> bool:
    """Whether something that JAX takes for one leaf is an object with floating numbers in its attributes."""
    if isinstance(leaf, (np.ndarray, np.generic, jax.Array, type)):
        return False
    names = (
        [f.name for f in dataclasses.fields(leaf)] if dataclasses.is_dataclass(leaf) else getattr(leaf, "__dict__", {})
    )
    inside = [getattr(leaf, name, None) for name in names]
    return any(np.asarray(v).dtype.kind in "fc" for v in inside if isinstance(v, kinds))


def closed(fixed: Sequence[Any]) -> str:
    """The first object with arrays, among leaves that are no arrays, that JAX does not take apart: in words."""
    found = next((v for v in fixed if holds_arrays(v, (np.ndarray, jax.Array))), None)
    return "" if found is None else f"{_describe(found)}, which JAX does not take apart: {how_to_register(found)}"


def how_to_register(leaf: Any) -> str:
    """What to do about an object that JAX does not take apart."""
    name = type(leaf).__name__
    way = f"jax.tree_util.register_dataclass({name})"
    if not dataclasses.is_dataclass(leaf):
        way = f"jax.tree_util.register_pytree_node({name}, ...)"
    return f"say once {way}, or pass a dict, a tuple or a NamedTuple"


def require_functions(loss: Any, gradient: Any) -> None:
    """Raise `TypeError` unless both are functions."""
    for name, function in (("loss", loss), ("gradient", gradient)):
        if isinstance(function, type) or not callable(function):
            raise TypeError(
                f"{name} must be a function {name}(params, batch); it is {_describe(function)}. "
                + ("Pass the function itself, not its result." if name == "gradient" else "")
            )


PARAMETERS = ("float", "numpy", "jax", "complex", "complex-numpy", "complex-jax")
"""The kinds of leaves that are differentiated: Python numbers, arrays of NumPy, arrays of JAX."""


def as_real(value: Any) -> np.ndarray:
    """Complex numbers as pairs (real, imaginary) along a new last axis."""
    value = np.asarray(value).astype(np.complex128)
    return np.stack([value.real, value.imag], axis=-1)


def in_given_types(problem: Problem, params: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Problem:
    """The same problem, evaluated in the floating types that were given instead of float64."""

    def types(tree: Any, fixed: Sequence[Any]) -> tuple[str, ...]:
        flat = jax.tree_util.tree_leaves(tree)
        return tuple(
            str(jnp.asarray(leaf).dtype) if isinstance(f, Moves) else "" for leaf, f in zip(flat, fixed, strict=True)
        )

    spec = problem.spec
    given = types(params, spec.fixed_params), types((arguments, keywords), spec.fixed_data)
    return problem._replace(spec=spec._replace(types=given))


def restricted(problem: Problem, only: Any) -> Problem:
    """The problem with the leaves in `only` compared, by path or by the first part of one (`layers.0`)."""
    wanted = (only,) if isinstance(only, str) else tuple(only)
    if not wanted:
        raise ValueError("only is empty: name the parameters to check, or leave it out to check all.")
    known = ", ".join(problem.paths)
    for name in wanted:
        if not isinstance(name, str) or not any(p == name or p.startswith(f"{name}.") for p in problem.paths):
            raise ValueError(f"only names {name!r}, which is no parameter: there are {known}.")
    asked = tuple(any(p == name or p.startswith(f"{name}.") for name in wanted) for p in problem.paths)
    return problem._replace(asked=asked)


def flat_params(problem: Problem, tree: Any, name: str) -> tuple[np.ndarray, ...]:
    """Parameters like those of the problem as flat float64 leaves; `name` is what an error calls them."""
    leaves, structure = jax.tree_util.tree_flatten(tree)
    if structure != problem.spec.params:
        raise ValueError(f"{name} is {_describe(tree)}, not a tree like params ({', '.join(problem.paths)}).")
    kept = [v for v, f in zip(leaves, problem.spec.fixed_params, strict=True) if isinstance(f, Moves)]
    out = []
    for value, path, pair, given in zip(kept, problem.paths, problem.complex, problem.leaves, strict=True):
        array = as_real(value) if pair else np.asarray(value).astype(np.float64)
        if array.shape != given.shape:
            shapes = (array.shape[:-1], given.shape[:-1]) if pair else (array.shape, given.shape)
            raise ValueError(f"{name}: leaf {path} has shape {shapes[0]}, that of params {shapes[1]}.")
        if not np.all(np.isfinite(array)):
            raise ValueError(f"{name}: leaf {path} is not finite.")
        out.append(array)
    return tuple(out)


def assemble(
    spec: Spec, leaves: Sequence[Any], data: Sequence[Any], numpy: bool
) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The person's own arguments from flat lists; with `numpy`, arrays of the kind that was given."""

    types = spec.types or ((None,) * len(spec.fixed_params), (None,) * len(spec.fixed_data))
    filled = _fill(spec.fixed_params, spec.params_kinds, types[0], leaves, numpy)
    params = jax.tree_util.tree_unflatten(spec.params, filled)
    filled = _fill(spec.fixed_data, spec.data_kinds, types[1], data, numpy)
    arguments, keywords = jax.tree_util.tree_unflatten(spec.data, filled)
    return params, arguments, keywords


def _fill(
    fixed: tuple[Any, ...], kinds: tuple[str, ...], types: Sequence[str | None], values: Sequence[Any], numpy: bool
) -> list[Any]:
    feed = iter(values)
    return [
        _convert(next(feed), kind, dtype, numpy) if isinstance(leaf, Moves) else leaf
        for leaf, kind, dtype in zip(fixed, kinds, types, strict=True)
    ]


def _convert(value: Any, kind: str, dtype: str | None, numpy: bool) -> Any:
    if kind.startswith("complex"):
        value = value[..., 0] + 1j * value[..., 1] if numpy else jax.lax.complex(value[..., 0], value[..., 1])
    if dtype is not None:
        value = np.asarray(value).astype(dtype) if numpy else jnp.asarray(value).astype(dtype)
    if not numpy:
        return value
    if kind == "float":
        return float(value)
    if kind == "complex":
        return complex(value)
    return jnp.asarray(value) if kind.endswith("jax") else np.array(value)


class Kernel(NamedTuple):
    """The compiled parts of one loss, kept between checks of the same function."""

    function: Callable[..., Any]
    jaxprs: dict[Any, Any]
    compiled: dict[Any, Any]


def scalar_loss(loss: Callable[..., Any], spec: Spec) -> Callable[..., Any]:
    """`loss` as a function of flat leaves and data, its auxiliary output dropped."""

    def function(leaves: Sequence[Any], data: Sequence[Any]) -> Any:
        params, arguments, keywords = assemble(spec, leaves, data, numpy=False)
        value = loss(params, *arguments, **keywords)
        if spec.has_aux:
            if not (isinstance(value, tuple) and len(value) == 2):
                raise NotScalarError(f"has_aux=True, so loss must return (value, aux); it returned {_describe(value)}.")
            value = value[0]
        if isinstance(value, tuple) and len(value) == 2 and np.ndim(value[0]) == 0:
            raise NotScalarError("loss returned a pair: pass has_aux=True if it returns (value, auxiliary output).")
        if value is None:
            raise NotScalarError("loss returned None: is a return statement missing?")
        leaf = jax.tree_util.tree_leaves(value)
        if len(leaf) != 1 or leaf[0] is not value:
            raise NotScalarError(f"loss must return one number; it returned {_describe(value)}.")
        if np.shape(value) != ():
            shape = np.shape(value)
            hint = "take the mean over the batch" if len(shape) == 1 else "reduce it to one number"
            raise NotScalarError(f"loss must return one number; it returned an array of shape {shape}: {hint}.")
        value = jnp.asarray(value)
        if jnp.issubdtype(value.dtype, jnp.complexfloating):
            raise NotScalarError("loss returned a complex number: the gradient of a real loss was expected.")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise NotScalarError(f"loss must return a floating-point number; it returned {value.dtype}.")
        return value

    return function


class NotScalarError(ValueError):
    """The loss does not return one floating-point number."""


@functools.lru_cache(maxsize=32)
def cached_kernel(loss: Callable[..., Any], spec: Spec) -> Kernel:
    return Kernel(scalar_loss(loss, spec), {}, {})


def kernel(problem: Problem) -> Kernel:
    """The kernel of this loss: from the cache if the function and its static arguments can be hashed."""
    try:
        return cached_kernel(problem.loss, problem.spec)
    except TypeError:
        return cached_kernel.__wrapped__(problem.loss, problem.spec)


def shape_key(leaves: Sequence[Any], data: Sequence[Any]) -> Any:
    return tuple((np.shape(a), str(np.asarray(a).dtype)) for a in (*leaves, *data))


def traced(store: Kernel, leaves: Sequence[Any], data: Sequence[Any], fresh: bool = False) -> Any:
    """The loss's jaxpr at these shapes.

    With `fresh` it is traced anew and compared with what is known: a loss whose two traces differ
    depends on something besides its arguments, and `ImpureError` says so.
    """
    key = shape_key(leaves, data)
    if key in store.jaxprs and not fresh:
        return store.jaxprs[key]
    new = steps.jaxpr_of(store.function, leaves, data)
    old = store.jaxprs.get(key)
    if fresh and (old is None or not steps.same_trace(old, new)):
        # Seen for the first time, or a global that the loss reads has changed since: forget, look twice.
        store.jaxprs.clear()
        store.compiled.clear()
        again = steps.jaxpr_of(store.function, leaves, data)
        if not steps.same_trace(new, again):
            raise ImpureError
    elif old is not None:
        return old
    store.jaxprs[key] = new
    return new


class ImpureError(ValueError):
    """Two traces of the loss differ."""


def autodiff(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> tuple[float, list[Any]]:
    """Value and autodiff gradient of the loss in float64."""
    key = ("truth", shape_key(leaves, data))
    if key in store.compiled:
        value, gradients = store.compiled[key](list(leaves), list(data))
        return float(value), [np.asarray(g, dtype=np.float64) for g in gradients]
    function = jex.jaxpr_as_fun(traced(store, leaves, data))
    number = lambda ls, ds: function(*ls, *ds)[0]
    store.compiled[key] = quick_jit(jax.value_and_grad(number))
    try:
        return autodiff(store, leaves, data)
    except ValueError as error:
        del store.compiled[key]
        if not lacks_reverse_mode(error):
            raise
    store.compiled[key] = quick_jit(lambda ls, ds: (number(ls, ds), _by_forward_mode(number, ls, ds)))
    return autodiff(store, leaves, data)


def _by_forward_mode(function: Callable[..., Any], leaves: Sequence[Any], data: Sequence[Any]) -> list[Any]:
    """The gradient one entry at a time: for a `while_loop`, which JAX cannot run backwards."""
    flat, unravel = jax.flatten_util.ravel_pytree(leaves)

    def slope(i: Any) -> Any:
        direction = unravel(jnp.zeros_like(flat).at[i].set(1))
        return jax.jvp(lambda ls: function(ls, data), (leaves,), (direction,))[1]

    return unravel(jax.lax.map(slope, jnp.arange(flat.size), batch_size=64))


def program_at(store: Kernel, leaves: Sequence[Any], data: Sequence[Any]) -> steps.Program:
    """The steps of the loss at these shapes."""
    key = ("program", shape_key(leaves, data))
    if key not in store.compiled:
        store.compiled[key] = steps.flatten(traced(store, leaves, data), len(leaves))
    return store.compiled[key]


def by_hand(
    problem: Problem, leaves: Sequence[Any], data: Sequence[Any], where: str = ""
) -> list[np.ndarray] | Malformed:
    """The person's gradient as float64 arrays in the order of the leaves, or what is wrong with its form.

    What it raises is passed on, with a note that it was the gradient, and `where` it was called."""
    params, arguments, keywords = assemble(problem.spec, leaves, data, numpy=True)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with raised_by("gradient", problem.gradient, where):
            result = problem.gradient(params, *arguments, **keywords)
        return match_tree(problem, params, result)


def returned_precisions(problem: Problem) -> list[float]:
    """The machine epsilon of each floating array that the person's gradient returns at the given point."""
    params, arguments, keywords = assemble(problem.spec, problem.leaves, problem.data, numpy=True)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = problem.gradient(params, *arguments, **keywords)
    arrays = [x for x in jax.tree_util.tree_leaves(result) if isinstance(x, (np.ndarray, np.generic, jax.Array))]
    return [float(jnp.finfo(x.dtype).eps) for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact)]


def match_tree(problem: Problem, params: Any, result: Any) -> list[np.ndarray] | Malformed:
    """The leaves of a returned gradient in the order of the parameters' leaves."""
    if inspect.iscoroutine(result) or inspect.isgenerator(result):
        return Malformed(f"`gradient` returned {_describe(result)} instead of arrays: use return, not yield.", None)
    if result is None:
        return Malformed("`gradient` returned None: is the `return` missing?", None)
    found = _leaves_by_path(problem, result)
    if isinstance(found, Malformed) and isinstance(result, tuple) and len(result) == 2:
        # (gradient, aux) and (value, gradient), as jax.grad and jax.value_and_grad return them
        for part, other in ((result[0], result[1]), (result[1], result[0])):
            inner = _leaves_by_path(problem, part)
            as_pair = part is result[0] and problem.spec.has_aux
            as_value = part is result[1] and _is_value(other)
            if not isinstance(inner, Malformed) and (as_pair or as_value):
                found = inner
                break
    if isinstance(found, Malformed):
        return found
    arrays: list[np.ndarray] = []
    problems: list[Malformed] = []
    for i, (path, leaf, given) in enumerate(zip(problem.paths, found, problem.leaves, strict=True)):
        pair = bool(problem.complex) and problem.complex[i]
        shape = given.shape[:-1] if pair else given.shape
        if not problem.compares(i):
            arrays.append(np.zeros(given.shape))
            continue
        if leaf is None:
            return Malformed(f"`gradient` returned None for leaf {path}: return zeros if it does not matter.", path)
        try:
            array = np.asarray(leaf)
            array = array.astype(np.float64) if array.dtype.kind in "biuf" or str(array.dtype) == "bfloat16" else array
        except Exception as error:  # whatever an array-like of theirs raises
            return Malformed(f"leaf {path} of the gradient cannot be read as an array ({error}).", path)
        if pair and array.shape == shape and array.dtype.kind in "cf":
            arrays.append(as_real(np.conj(array)))
            continue
        if array.dtype.kind == "c" and not pair:
            return Malformed(f"leaf {path} of the gradient is complex ({array.dtype}).", path)
        if array.dtype != np.float64 and not pair:
            return Malformed(f"leaf {path} of the gradient is {_describe(leaf)}, not an array of numbers.", path)
        if array.shape != shape:
            flipped = array.ndim == 2 and array.shape == shape[::-1]
            hint = ""
            if array.ndim == len(shape) + 1 and array.shape[1:] == shape:
                hint = " There is one axis too many: sum or average over the examples."
            elif array.size == int(np.prod(shape)):
                hint = " The number of entries is right, their arrangement is not."
            elif array.size == 1:
                hint = " Everything was summed into one number."
            sentence = f"leaf {path}: the gradient has shape {array.shape}, the parameter {shape}.{hint}"
            problems.append(Malformed(sentence, path, transposed=flipped))
        arrays.append(array)
    if problems:
        first = problems[0]
        return first._replace(transposed=all(p.transposed for p in problems), values=tuple(arrays))
    return arrays


def _is_value(x: Any) -> bool:
    return np.ndim(x) == 0 and isinstance(x, (float, int, np.generic, np.ndarray, jax.Array))


def _leaves_by_path(problem: Problem, result: Any) -> list[Any] | Malformed:
    is_none = lambda x: x is None
    keep = [isinstance(f, Moves) for f in problem.spec.fixed_params]
    if jax.tree_util.tree_structure(result) == problem.spec.params:
        return [leaf for leaf, k in zip(jax.tree_util.tree_leaves(result), keep, strict=True) if k]
    if len(problem.paths) == 1 and problem.paths[0] == "params":
        if not isinstance(result, (tuple, list, dict)):
            return [result]
        if isinstance(result, (tuple, list)) and _is_written_out(result, problem.leaves[0].shape):
            return [np.asarray(result, dtype=np.float64)]
    if problem.asked:
        part = _asked_only(problem, result)
        if part is not None:
            return part
    try:
        with_paths, _ = jax.tree_util.tree_flatten_with_path(result, is_leaf=is_none)
    except Exception as error:  # a tree that JAX cannot flatten, e.g. a dict with mixed keys
        return Malformed(f"the gradient is not a tree like params ({error}).", None)
    dummy = _skeleton(problem)
    names, fixed, empty = _names_in_params(problem)
    with_paths = [(path, leaf) for path, leaf in with_paths if leaf is not None or leaf_name(path) not in empty]
    same_root = type(result) is type(dummy) or not isinstance(dummy, (tuple, list, dict))
    got = {leaf_name(path): leaf for path, leaf in with_paths}
    if same_root and set(names) <= set(got) and set(got) <= set(names) | fixed:
        return [got[name] for name in names]
    kind = type(dummy).__name__
    if type(result) is not type(dummy):
        ours = f"params is a {kind} with {', '.join(names)}"
        order = ""
        flat = [leaf for _, leaf in with_paths]
        if len(flat) == len(names):
            order = " The number of leaves agrees: return it in the form of params."
        return Malformed(f"`gradient` returned {_describe(result)}; {ours}.{order}", None)
    missing = [name for name in names if name not in got]
    extra = [name for name in got if name not in names and name not in fixed]
    parts = []
    if missing:
        parts.append(f"misses {', '.join(missing)}")
    if extra:
        parts.append(f"has {', '.join(f'{e} (None in params)' if e in empty else e for e in extra)} besides")
    what = " and ".join(parts) or "has another structure than params"
    return Malformed(f"the gradient {what}; params has {', '.join(names)}.", missing[0] if missing else None)


def _skeleton(problem: Problem) -> Any:
    """A tree like the parameters with the numbers of their leaves."""
    return jax.tree_util.tree_unflatten(problem.spec.params, range(problem.spec.params.num_leaves))


def _names_in_params(problem: Problem) -> tuple[list[str], set[str], set[str]]:
    """The paths in the parameters of leaves that are differentiated, of other leaves, and of None.

    To JAX a None is no leaf; a gradient may have one in its place, or leave it out."""
    with_paths, _ = jax.tree_util.tree_flatten_with_path(_skeleton(problem), is_leaf=lambda x: x is None)
    moves = [isinstance(f, Moves) for f in problem.spec.fixed_params]
    names = [leaf_name(path) for path, number in with_paths if number is not None and moves[number]]
    fixed = {leaf_name(path) for path, number in with_paths if number is not None and not moves[number]}
    return names, fixed, {leaf_name(path) for path, number in with_paths if number is None}


def _is_written_out(result: Any, shape: tuple[int, ...]) -> bool:
    """Whether nested lists of numbers write an array of this shape out."""
    try:
        return all(np.ndim(x) == 0 for x in jax.tree_util.tree_leaves(result)) and np.shape(result) == shape
    except ValueError:
        return False


def _has_none(result: Any) -> bool:
    return any(x is None for x in jax.tree_util.tree_leaves(result, is_leaf=lambda x: x is None))


def _asked_only(problem: Problem, result: Any) -> list[Any] | None:
    """The leaves of a result that holds only those which are compared: by name, in their order, or the one alone."""
    wanted = [i for i, asked in enumerate(problem.asked) if asked]
    is_none = lambda x: x is None
    if isinstance(result, dict) or hasattr(result, "_fields") or _has_none(result):
        with_paths, _ = jax.tree_util.tree_flatten_with_path(result, is_leaf=is_none)
        got = {leaf_name(path): leaf for path, leaf in with_paths}
        # A None says nothing of what it stands for: a leaf that is not asked for, or a None in params.
        named = {name for name, leaf in got.items() if leaf is not None}
        _, fixed, _ = _names_in_params(problem)
        if all(problem.paths[i] in got for i in wanted) and named <= set(problem.paths) | fixed:
            return [got.get(path) for path in problem.paths]
        return None
    flat = list(result) if isinstance(result, (tuple, list)) else [result]
    if len(flat) == len(wanted):
        return [flat[wanted.index(i)] if i in wanted else None for i in range(len(problem.paths))]
    return None


def leaf_name(path: Any) -> str:
    """A key path as a person writes it: `W1`, `layers.0.W`; `params` for a bare array."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".") or "params"


def _data_name(loss: Callable[..., Any], path: Any, names: Sequence[str] | None = None) -> str:
    """A data leaf as the person writes it: the name of the loss's argument and the path inside it."""
    if getattr(path[0], "idx", None) == 1:  # a keyword
        return leaf_name(path[1:])
    position = getattr(path[1], "idx", 0)
    try:
        names = names if names is not None else list(inspect.signature(loss).parameters)[1:]
        argument = names[position]
    except (TypeError, ValueError, IndexError):
        argument = "batch"
    inner = leaf_name(path[2:]) if len(path) > 2 else ""
    return argument if not inner else f"{argument}.{inner}" if not inner[0].isdigit() else f"{argument}[{inner}]"


def _unmasked(name: str, leaf: Any) -> Any:
    if isinstance(leaf, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array: fill or drop what is masked.")
    return leaf


def _kind(leaf: Any, data: bool = False) -> str:
    if isinstance(leaf, (bool, str, bytes)) or leaf is None:
        return "fixed"
    if isinstance(leaf, (float, int, complex)) and not isinstance(leaf, np.generic):
        return "fixed" if data else "complex" if isinstance(leaf, complex) else "float"
    if isinstance(leaf, (np.ndarray, np.generic, jax.Array)) and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        home = "jax" if isinstance(leaf, jax.Array) else "numpy"
        return home if data else f"complex-{home}"
    if isinstance(leaf, (np.ndarray, np.generic)):
        if jnp.issubdtype(leaf.dtype, jnp.floating):  # bfloat16 and its like are to NumPy no floats
            return "numpy"
        return "int-numpy" if data and leaf.dtype.kind in "biu" else "fixed"
    if isinstance(leaf, jax.Array):
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return "jax"
        plain = jnp.issubdtype(leaf.dtype, jnp.integer) or leaf.dtype == bool
        return "int-jax" if data and plain else "fixed"
    return "fixed"


def _index(index: Any) -> str:
    return "[" + ", ".join(str(int(i)) for i in index) + "]" if len(index) else "the only entry"


def _describe(value: Any) -> str:
    if value is None:
        return "None"
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"an array of shape {tuple(shape)} and dtype {getattr(value, 'dtype', '?')}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return f"a {type(value).__name__} of {len(value)}"
    article = "an" if type(value).__name__[0].lower() in "aeiou" else "a"
    return f"{article} {type(value).__name__}"
