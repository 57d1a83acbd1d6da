"""What is refused, in which words: one check for each kind of argument, and one sentence for each mistake.

    eta = checks.positive("eta", eta)          # a float, or an error that names eta, what it got and what it needs

    @checked                                   # the same, read off the annotations
    def step(problem: Problem, eta: Positive, steps: Natural) -> float: ...

A check takes the argument's name and its value. It returns the value as the function wants it (`3` for `np.int64(3)`,
an array for a list, native bytes for big-endian ones), or raises TypeError for the wrong kind of thing and ValueError
for a value out of range. A boolean is never a number. Where JAX traces (`jit`, `vmap`, `grad`), a value is not known
yet: then shapes and dtypes are checked, when the function is traced, and a compiled function pays nothing.
"""

import difflib
import dis
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgrad.types import Key, Layer, Linear, Params, Sampling, TwoLayer

F = TypeVar("F", bound=Callable[..., Any])

LIMIT = 2**31
"""Whole numbers stay below this: JAX counts in int32."""

MADE_BY = {
    "Batch": "such as Batch(x, y)",
    "Checkpoint": 'such as Checkpoint("run.npz", every=1000)',
    "Dataset": "as data.load makes it",
    "Mesh": "such as parallel.mesh()",
    "Linear": "such as models.init_linear(d)",
    "TwoLayer": "such as models.init_two_layer(key, d, h, k)",
    "PointNoise": "as noise.measure makes it",
    "Problem": "as least_squares.problem(batch) makes it",
    "Rows": 'as open_rows("big.npy") makes it',
    "Sharded": "as parallel.shard makes it",
    "State": "as descent.init makes it, or the state of a trace",
    "Stop": "made by small_step(...), small_gradient(...) or no_improvement(...)",
    "Timing": "as timing.measure or timing.race makes it",
    "Activation": "such as lecture.SIGMOID, a pair (f, derivative)",
}
"""Where a thing of ours comes from, by the name of its class."""

_PACKAGE = Path(__file__).parent

SAMPLINGS = "full_batch(), with_replacement(b), distinct(b) or reshuffled(b)"


# --- what a value is called -----------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A value in a few words, for the end of an error."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, np.generic | str | bytes | numbers.Number | None):
        text = repr(value.item() if isinstance(value, np.generic) and value.dtype.kind in "biufc" else value)
        return text if len(text) <= 60 else f"{text[:57]}..."
    if isinstance(value, np.ma.MaskedArray):
        return f"a masked array of shape {value.shape}"
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        if (
            getattr(value, "size", 2) == 1
            and not isinstance(value, Tracer | jax.ShapeDtypeStruct)
            and value.dtype.kind in "biufc"
        ):
            return f"an array holding {np.asarray(value).item()!r}"
        return f"an array of shape {tuple(value.shape)} and dtype {value.dtype}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', 'it')} itself"
    if isinstance(value, list | tuple | set | dict) and len(text := repr(value)) <= 60 and "0x" not in text:
        return text
    name = type(value).__name__
    return f"{'an' if name[:1].lower() in 'aeiou' else 'a'} {name}"


def nearest(name: str, there: Sequence[str]) -> str:
    """` (did you mean 'a' or 'b'?)`, or nothing if no name is close."""
    close = difflib.get_close_matches(name, there, 3, 0.5)
    return f" (did you mean {' or '.join(repr(c) for c in close)}?)" if close else ""


# --- numbers --------------------------------------------------------------------------------------------------


def number(name: str, value: Any, needs: str = "a finite number", infinite: bool = False) -> Any:
    """A real number as a float; a number of JAX that is traced stays as it is."""
    if isinstance(value, Tracer) and value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.floating):
        return value
    plain = _plain(value)
    if isinstance(plain, bool | np.bool_) or not isinstance(plain, numbers.Real):
        raise TypeError(f"{name} must be {needs}, got {shown(value)}")
    try:
        found = float(plain)
    except OverflowError:
        raise ValueError(f"{name} must be {needs}, got a number beyond float64") from None
    if math.isnan(found) or (math.isinf(found) and not infinite):
        raise ValueError(f"{name} must be {needs}, got {found}")
    return found


def positive(name: str, value: Any) -> Any:
    """A finite number above 0."""
    found = number(name, value, "a positive finite number")
    if not isinstance(found, Tracer) and not found > 0:
        raise ValueError(f"{name} must be a positive finite number, got {shown(value)}")
    return found


def not_negative(name: str, value: Any) -> Any:
    """A finite number, 0 or above."""
    found = number(name, value, "a finite number >= 0")
    if not isinstance(found, Tracer) and not found >= 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {shown(value)}")
    return found


def level(name: str, value: Any) -> float:
    """A number strictly between 0 and 1."""
    needs = "a number strictly between 0 and 1"
    found = number(name, value, needs, infinite=True)
    if not 0 < found < 1:
        raise ValueError(f"{name} must be {needs}, got {shown(value)}")
    return found


def share(name: str, value: Any) -> float:
    """A number from 0 to 1."""
    found = number(name, value, "a number from 0 to 1", infinite=True)
    if not 0 <= found <= 1:
        raise ValueError(f"{name} must be a number from 0 to 1, got {shown(value)}")
    return found


def integer(name: str, value: Any) -> int:
    """A whole number of any size."""
    plain = _plain(value)
    if isinstance(plain, bool | np.bool_) or not isinstance(plain, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {shown(value)}")
    return int(plain)


def whole(name: str, value: Any) -> int:
    """A whole number that int32 holds."""
    found = integer(name, value)
    if not -LIMIT < found < LIMIT:
        raise ValueError(f"{name} must be below 2**31 = {LIMIT:,} in size, got {shown(found)}")
    return found


def count(name: str, value: Any, at_least: int = 1) -> int:
    """A whole number from `at_least` on, below 2³¹."""
    found = integer(name, value)
    if found < at_least:
        raise ValueError(f"{name} must be at least {at_least}, got {shown(found)}")
    if found >= LIMIT:
        raise ValueError(f"{name} must be below 2**31 = {LIMIT:,}, got {shown(found)}")
    return found


def natural(name: str, value: Any) -> int:
    """A whole number from 0 on, below 2³¹."""
    return count(name, value, 0)


def flag(name: str, value: Any) -> bool:
    """True or False, and no number in their place."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def counts(name: str, value: Any) -> tuple[int, ...]:
    """Whole numbers from 1 on, at least one."""
    plain = not isinstance(value, str | bytes | dict | set | type) and getattr(value, "ndim", 1) == 1
    if not plain or not hasattr(value, "__iter__"):
        raise TypeError(f"{name} must be whole numbers >= 1, such as (4, 4); got {shown(value)}")
    found = tuple(count(f"{name}[{i}]", each) for i, each in enumerate(list(value)))  # type: ignore[arg-type]
    if not found:
        raise ValueError(f"{name} must be whole numbers >= 1, at least one; got {shown(value)}")
    return found


def widths(name: str, value: Any) -> tuple[int, ...]:
    """The widths of a net's layers, from its inputs to its outputs."""
    found = counts(name, value)
    if len(found) < 2:
        raise ValueError(f"{name} must name at least an input and an output width, each >= 1; got {found}")
    return found


def float_dtype(name: str, value: Any) -> Any:
    """A floating-point dtype, such as jnp.float32."""
    try:
        known = isinstance(value, str | type | np.dtype) and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        known = False
    if not known:
        raise TypeError(f"{name} must be a floating-point dtype such as jnp.float32, got {shown(value)}")
    return value


def step(name: str, value: Any) -> Any:
    """The number of a step: whole, from 0 on, below 2³¹; or an integer that JAX traces."""
    if isinstance(value, Tracer) and jnp.issubdtype(value.dtype, jnp.integer):
        return value
    if isinstance(value, np.ndarray | jax.Array) and value.ndim > 0:
        raise TypeError(f"{name} must be a whole number, got {shown(value)}: use jax.vmap for many")
    return value if isinstance(value, jax.Array) and natural(name, value) >= 0 else natural(name, value)


def steps(name: str, value: Any) -> Any:
    """Numbers of steps, as int32[k] for JAX: whole, from 0 on, never falling; or integers that JAX traces."""
    if isinstance(value, Tracer) and value.ndim == 1 and jnp.issubdtype(value.dtype, jnp.integer):
        return value.astype(jnp.int32)
    found = whole_numbers(name, value, rising=True)
    if found[-1] >= LIMIT:
        raise ValueError(f"{name} must be below 2**31 = {LIMIT:,}, got {shown(value)}")
    return jnp.asarray(found, jnp.int32)


def _plain(value: Any) -> Any:
    """The number in an array without axes; anything else as it is."""
    if isinstance(value, np.ndarray | jax.Array) and value.ndim == 0 and not isinstance(value, Tracer):
        if isinstance(value, np.ma.MaskedArray) or not hasattr(value.dtype, "kind"):
            return value
        return np.asarray(value)[()] if value.dtype.kind in "biuf" else value
    return value


# --- names, functions, things of ours -------------------------------------------------------------------------


def one_of(name: str, value: Any, names: Sequence[str]) -> str:
    """One of several names; of another one the nearest are told."""
    if not isinstance(value, str) or value not in names:
        close = nearest(value, names) if isinstance(value, str) else ""
        there = ", ".join(map(repr, names[:-1])) + f" or {names[-1]!r}" if len(names) > 1 else repr(names[0])
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"{name} must be {there}, got {shown(value)}{close}"
        )
    return value


def text(name: str, value: Any) -> str:
    """A str."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be text (a str), got {shown(value)}")
    return value


def path(name: str, value: Any) -> Path:
    """The path of a file or folder."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name} must be the path of a file (a str or a pathlib.Path), got {shown(value)}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name} must be the path of a file, got {shown(value)}")
    return Path(value)


def several(name: str, value: Any, sized: bool = False) -> Any:
    """A list, an array or (unless `sized`) another iterable, whose parts are checked where they are used."""
    plain = not isinstance(value, str | bytes | dict | set | type | np.ma.MaskedArray) and getattr(value, "ndim", 1) > 0
    if not plain or not hasattr(value, "__iter__") or (sized and not hasattr(value, "__len__")):
        raise TypeError(
            f"{name} must be a list{' or' if sized else ','} an array"
            f"{'' if sized else ' or another iterable'}, got {shown(value)}"
        )
    return value


def scalar(name: str, value: Any) -> Any:
    """One real number, or a number of JAX that is traced, as it is."""
    if isinstance(value, Tracer):
        return _shaped(name, value, "", {})
    found = number(name, value)
    return value if isinstance(value, jax.Array) else found


def path_or_name(name: str, value: Any) -> Any:
    """A path as it was given, which may be a name too."""
    if not (isinstance(value, str) and not value):  # an empty name is no path
        path(name, value)
    return value


def function(name: str, value: Any, takes: int | None = None) -> Any:
    """Something that can be called, with `takes` arguments if that is given."""
    like = {"loss": "loss(params, batch) -> scalar" if takes == 2 else "", "metric": "metric(params) -> number"}.get(
        name
    )
    needs = f"{name} must be a function{f' {like}' if like else ''}"
    # A class may be called, but to make a thing of it is not to evaluate a loss; what takes nothing may well do so.
    if (isinstance(value, type) and takes != 0) or not callable(value):
        raise TypeError(f"{needs}, got {shown(value)}")
    if takes is not None:
        try:
            signature = inspect.signature(value)
        except (TypeError, ValueError):  # some of C's say nothing
            return value
        try:
            signature.bind(*[None] * takes)
        except TypeError as error:
            called = getattr(value, "__name__", shown(value))
            raise TypeError(
                f"{needs} of {takes} argument{'s' if takes != 1 else ''}, but {called}{signature} "
                f"cannot be called so ({error})"
            ) from None
    return value


def leaf_name(path: Any) -> str:
    """The name of a leaf of the parameters, from its key path."""
    return jax.tree_util.keystr(path).lstrip(".") or "the array"


@contextmanager
def saying(sentence: str) -> Iterator[None]:
    """An error of a person's function comes out as this sentence, with what it said; its own traceback goes before.

    What a line of ours raises is a sentence already, and comes out as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError | TypeError) and _is_ours(error):
            raise
        said = (str(error).strip().splitlines() or [""])[0][:300]
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(f"{sentence}: {type(error).__name__}: {said}") from error


def _is_ours(error: Exception) -> bool:
    """Whether a `raise` of this package made the error: what it calls may leave no frame of its own behind."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not Path(trace.tb_frame.f_code.co_filename).is_relative_to(_PACKAGE):
        return False
    return dis.opname[trace.tb_frame.f_code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def loss(function_: Any, params: Params, data: Any) -> None:
    """Raise TypeError or ValueError unless `loss(params, data)` traces to one floating-point number."""
    function("loss", function_, 2)
    with saying("loss(params, batch) cannot be evaluated for these params and data"):
        out = jax.eval_shape(function_, params, data)
    if not (hasattr(out, "shape") and hasattr(out, "dtype")):
        pair = isinstance(out, tuple | list) and len(out) == 2
        hint = ": descend takes (value, aux) with has_aux=True, (value, new_state) with loss_state=..." if pair else ""
        raise TypeError(f"loss must return one number, got {shown(out)}{hint}")
    if out.shape != () or not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(
            f"loss must return one floating-point number, got {out.dtype}{list(out.shape)}: "
            "take the mean over the examples"
        )


def instance(name: str, value: Any, kind: type) -> Any:
    """A thing of one of our classes, or one with the same fields."""
    fields = getattr(kind, "_fields", ())
    like = kind.__name__ in ("Batch", "Linear", "TwoLayer", "Layer", "Activation")
    if isinstance(value, kind) or (like and not isinstance(value, type) and all(hasattr(value, f) for f in fields)):
        return value
    made = MADE_BY.get(kind.__name__, "")
    hint = ""
    if callable(value) and getattr(value, "__name__", "") in ("small_step", "small_gradient", "no_improvement"):
        hint = f": call it, as in {value.__name__}(...)"
    article = "an" if kind.__name__[:1] in "AEIOU" else "a"
    raise TypeError(f"{name} must be {article} {kind.__name__}{f', {made}' if made else ''}; got {shown(value)}{hint}")


def sampling(name: str, value: Any) -> Sampling:
    """A `Sampling` that `jaxgrad.sampling` or `parallel.stratified` could have made."""
    if not isinstance(value, Sampling):
        hint = ""
        if callable(value) and getattr(value, "__name__", "") in SAMPLINGS:
            arguments = "()" if value.__name__ == "full_batch" else "(32)"
            hint = f": call it, as in {value.__name__}{arguments}"
        elif isinstance(value, numbers.Integral) and not isinstance(value, bool) and 0 < int(value) < LIMIT:
            hint = f": batches of {value} are distinct({value}), with_replacement({value}) or reshuffled({value})"
        raise TypeError(f"{name} must be {SAMPLINGS}, got {shown(value)}{hint}")
    text(f"{name}.name", value.name)
    function(f"{name}.draw", value.draw)
    size = f"{name}.batch_size"
    made = value
    if value.batch_size is not None and (b := count(size, value.batch_size)) is not value.batch_size:
        made = made._replace(batch_size=b)
    if value.name in ("with replacement", "distinct", "reshuffled") and value.batch_size is None:
        raise TypeError(f"{size} must be a whole number, got None: make the sampling by {SAMPLINGS}")
    if value.rows is not None and (rows := count(f"{name}.rows", value.rows)) is not value.rows:
        made = made._replace(rows=rows)
    count(f"{name}.parts", value.parts)
    return made


def key(name: str, value: Any, many: bool = False) -> Any:
    """One JAX key, typed; with `many` also an array of them with one axis."""
    if not isinstance(value, jax.Array | np.ndarray) or isinstance(value, np.ma.MaskedArray):
        whole_number = isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= 0
        hint = f": write jax.random.key({value})" if whole_number and value < LIMIT else ""
        more = ", or an array of them" if many else ""
        raise TypeError(f"{name} must be a JAX key such as jax.random.key(0){more}; got {shown(value)}{hint}")
    if not jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        if value.dtype.newbyteorder("=") != np.uint32:
            raise TypeError(
                f"{name} must be a JAX key such as jax.random.key(0), got {shown(value)}: a key is no array of numbers"
            )
        words = value.astype(np.uint32) if isinstance(value, np.ndarray) else value
        try:
            value = jax.random.wrap_key_data(jnp.asarray(words))
        except (TypeError, ValueError):
            raise ValueError(
                f"{name} must be a JAX key such as jax.random.key(0), got {shown(value)}: the words of one key are "
                f"uint32{list(jax.random.key_data(jax.random.key(0)).shape)}"
            ) from None
    if value.ndim > (1 if many else 0) or value.size == 0:
        needs = "one key or a one-dimensional array of keys" if many else "one key"
        raise ValueError(f"{name} must be {needs}, got shape {value.shape}")
    return value


def keys(name: str, value: Any) -> Any:
    """An array of JAX keys with one axis."""
    found = key(name, value, many=True)
    if found.ndim != 1:
        raise ValueError(f"{name} must be an array of keys such as jax.random.split(key, 20), got one key")
    return found


# --- arrays ---------------------------------------------------------------------------------------------------


def array(
    name: str, value: Any, dims: str | None = None, *, finite: bool = True, least: int = 0, bools: bool = False
) -> np.ndarray:
    """Real numbers as float64 NumPy: of shape `dims` ("n d", "*any"), every one finite unless told otherwise.

    `least` is how long the first axis must be. Whole numbers are numbers; booleans are where `bools` says so.
    """
    found = _numbers(name, value, bools=bools)
    found = np.asarray(found, np.float64)
    if dims is not None:
        _fit(name, found.shape, dims, {})
    if found.ndim > 0 and len(found) < least:
        raise ValueError(f"{name} must have at least {least} on its first axis, got shape {found.shape}")
    if finite:
        every_finite(found, name)
    return found


def labels(name: str, value: Any) -> Any:
    """Labels, as an array of numbers or of booleans of any shape."""
    truth = isinstance(value, bool) or np.dtype(bool) == getattr(value, "dtype", None)
    return value if truth and not isinstance(value, np.ma.MaskedArray) else _numbers(name, value, bools=True)


def every_finite(values: Any, what: str, names: Sequence[str] | None = None) -> None:
    """Raises ValueError, with the place, unless every entry of an array (numpy or JAX) is finite."""
    if not jnp.issubdtype(values.dtype, jnp.inexact):
        return
    # A sum is finite only if its terms are: one pass and no copy, on the device where the data are. Known arrays stay
    # known where JAX traces.
    with np.errstate(over="ignore", invalid="ignore"), jax.ensure_compile_time_eval():
        if np.isfinite(np.asarray(values.sum())):
            return
    values = np.asarray(values)
    bad = np.argwhere(~np.isfinite(values))
    if not len(bad):
        return
    place = tuple(int(i) for i in bad[0])
    if not place:
        raise ValueError(f"{what} must be finite, got {values[()]}")
    words = f"row {place[0]}"
    if len(place) == 2:
        words += f", column {place[1]}" + (f" {names[place[1]]!r}" if names else "")
    many = f"{len(bad):,} such {'entry' if len(bad) == 1 else 'entries'}"
    raise ValueError(
        f"{what}{list(place)} is {values[place]} ({words}, counted from 0); {many} in all. "
        "Every entry must be finite: drop those rows or fill them in"
    )


def whole_numbers(name: str, value: Any, at_least: int = 0, rising: bool = False) -> np.ndarray:
    """Whole numbers from `at_least` on, one or a list of them, as int64[k]; with `rising` in an order that never falls.

    They stay below 2⁵³, which float64 holds exactly.
    """
    needs = f"{name} must be whole numbers >= {at_least}{' that do not decrease' if rising else ''}"
    if isinstance(value, numbers.Integral) and not isinstance(value, bool | np.bool_):
        found = np.asarray([int(value)], object)
    else:
        found = _numbers(name, value)
        if isinstance(found, Tracer):
            raise TypeError(f"{needs}, known when the function is traced; got {shown(value)}")
        found = np.atleast_1d(np.asarray(found))
        if found.size and found.dtype.kind not in "iu":
            raise ValueError(f"{needs}, got {shown(value)}")
    if found.ndim != 1 or found.size == 0:
        raise ValueError(f"{needs}, at least one; got {shown(value)}")
    if (found < at_least).any() or (rising and (found[1:] < found[:-1]).any()):
        raise ValueError(f"{needs}, got {shown(value)}")
    if (found >= 2**53).any():
        raise ValueError(f"{needs} and stay below 2**53, got {shown(value)}")
    return found.astype(np.int64)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)


def inside(name: str, indices: Any, n: int) -> None:
    """Raise ValueError unless all indices are from 0 to n − 1: JAX would take the nearest. Traced ones are not seen."""
    if isinstance(indices, Tracer):
        return
    found = np.asarray(indices)
    if (bad := (found < 0) | (found >= n)).any():
        raise ValueError(f"{name} must be numbers of examples from 0 to {n - 1}, got {found[bad].flat[0]}")


def _numbers(name: str, value: Any, bools: bool = False) -> Any:
    """An array of real numbers, in this machine's byte order; lists become arrays, all else stays what it is."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got {shown(value)}: fill or drop what is masked")
    if isinstance(value, type | str | bytes | dict | set | frozenset | None):
        raise TypeError(f"{name} must be an array of numbers, got {shown(value)}")
    if is_sparse(value):
        dense = "toarray" if hasattr(value, "toarray") else "todense"
        raise TypeError(
            f"{name} must be a dense array of numbers, got a sparse {type(value).__name__} of shape "
            f"{tuple(getattr(value, 'shape', ()))}: give x.{dense}()"
        )
    if isinstance(value, jax.Array) or type(value) in (np.ndarray, np.memmap):
        found = value
    else:
        try:
            found = np.asarray(value)
        except (TypeError, ValueError, jax.errors.JAXTypeError):  # rows of different lengths, or traced numbers
            if isinstance(value, list | tuple) and any(isinstance(v, Tracer) for v in jax.tree.leaves(value)):
                return jnp.asarray(value)
            raise ValueError(
                f"{name} must be an array of numbers, all rows of one length; got {shown(value)}"
            ) from None
    if not isinstance(found, jax.Array) and found.dtype.byteorder not in "=|":
        found = found.astype(found.dtype.newbyteorder("="))
    if isinstance(found, np.ndarray) and found.dtype == np.longdouble and np.longdouble is not np.float64:
        found = found.astype(np.float64)
    if isinstance(found, np.ndarray) and found.dtype.kind == "O" and found.size and all(map(_is_real, found.ravel())):
        try:  # fractions, or Python's whole numbers too large for int64
            found = found.astype(np.float64)
        except OverflowError:
            raise ValueError(f"{name} must be numbers that float64 holds, got {shown(value)}") from None
    real = any(jnp.issubdtype(found.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if not real and not (found.dtype == bool and bools and found.ndim > 0):
        hint = ""
        if found.dtype.kind in "US" or (
            found.dtype.kind == "O" and any(isinstance(v, str | bytes) for v in found.ravel())
        ):
            hint = ", which is text: number the classes, as np.unique(labels, return_inverse=True)[1] does"
        elif found.dtype.kind in "mM":
            hint = ": convert dates to numbers, e.g. (dates - dates[0]) / np.timedelta64(1, 'D')"
        elif found.dtype == bool:
            hint = ": if 0 and 1 are meant, convert it, e.g. x.astype(float)"
        what = shown(value) if found.dtype.kind == "O" and np.ndim(found) == 0 else shown(found)
        raise TypeError(f"{name} must be an array of numbers, got {what}{hint}")
    return found


def _fit(name: str, shape: tuple[int, ...], dims: str, sizes: dict[str, Any]) -> None:
    """Raise ValueError unless `shape` is `dims`, where a letter has one size throughout `sizes`, which learns."""
    tokens = dims.split()
    label = f"{name}[{', '.join(tokens)}]"
    free = next((i for i, token in enumerate(tokens) if token[0] == "*"), None)
    fixed = len(tokens) - (free is not None)
    if len(shape) < fixed or (free is None and len(shape) != fixed):
        axes = f"{fixed} {'axis' if fixed == 1 else 'axes'}" + (" or more" if free is not None else "")
        raise ValueError(f"{label} must have {axes}, got shape {tuple(shape)}")
    pairs: list[tuple[str, Any]] = list(zip(tokens, shape, strict=False))
    known: Any
    if free is not None:
        behind = fixed - free
        middle = shape[free : len(shape) - behind]
        pairs = [*zip(tokens[:free], shape[:free], strict=True), (tokens[free], tuple(middle))]
        pairs += zip(tokens[free + 1 :], shape[len(shape) - behind :], strict=True)
    for token, size in pairs:
        if token == "_":
            continue
        if token.isdigit():
            known, where = int(token), ""
        else:
            known, where = sizes.setdefault(token, (size, label))
        if known != size and not (token[0] == "*" and math.prod(known) == math.prod(size) == 1):
            letter = token.lstrip("*")
            more = f": {letter} is {size} here and {known} in {where}" if where else f": need {known}"
            raise ValueError(f"{label} has shape {tuple(shape)}, which does not fit{more}")


def _shaped(name: str, value: Any, dims: str, sizes: dict[str, Any], whole: bool = False) -> Any:
    """An array for a formula: of floats (or whole numbers) and of shape `dims`; numbers, lists and NumPy's will do."""
    plain = _plain(value)
    if isinstance(plain, bool | np.bool_):
        raise TypeError(f"{name} must be {'a whole number' if whole else 'a number'}, got {shown(value)}")
    if isinstance(plain, numbers.Real) and not isinstance(value, np.ndarray | np.generic | jax.Array):
        found: Any = jnp.asarray(number(name, value, "a number", infinite=True) if plain == plain else math.nan)
    else:
        found = _numbers(name, value, bools=not whole)
    is_whole = jnp.issubdtype(found.dtype, jnp.integer)
    if whole and not is_whole:
        raise TypeError(f"{name} must be whole numbers, got {shown(value)}")
    if not whole and not jnp.issubdtype(found.dtype, jnp.floating):
        # Small and unsigned integers would wrap around.
        found = found.astype(np.float64 if isinstance(found, np.ndarray | np.generic) else jnp.result_type(float))
    if 0 in np.shape(found):
        raise ValueError(f"{name} is empty: it has shape {np.shape(found)}")
    _fit(name, np.shape(found), dims, sizes)
    return found


# --- parameters and data --------------------------------------------------------------------------------------


def params(name: str, value: Any) -> Params:
    """A pytree of floating-point arrays, in this machine's byte order; numbers among them stay numbers."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    if not leaves:
        raise ValueError(f"{name} hold no arrays: there is nothing to learn")
    for where, leaf in leaves:
        dtype = getattr(leaf, "dtype", None)
        plain = isinstance(leaf, float) or (dtype is not None and hasattr(leaf, "shape"))
        if isinstance(leaf, float) and not isinstance(leaf, np.generic):
            continue
        if isinstance(leaf, complex) or (plain and jnp.issubdtype(dtype, jnp.complexfloating)):  # type: ignore[arg-type]
            raise TypeError(
                f"{name} must be real floating-point numbers: {_at(where)} is {dtype or 'complex'}. Give the real and "
                'the imaginary part as two arrays, e.g. {"re": z.real, "im": z.imag}, and let the loss form '
                'params["re"] + 1j * params["im"]'
            )
        if isinstance(leaf, bool | int) or (plain and _is_plain(dtype)):
            raise TypeError(
                f"{name} must be floating point: {_at(where)} is {dtype or type(leaf).__name__}; convert it, "
                "e.g. jnp.asarray(w, jnp.float32)"
            )
        if not plain or isinstance(leaf, np.ma.MaskedArray) or not jnp.issubdtype(dtype, jnp.floating):  # type: ignore[arg-type]
            hint = ""
            if callable(leaf) or isinstance(leaf, str):
                hint = (
                    ". Keep what is no array out of them: partition the module (in Equinox: params, rest = "
                    "eqx.partition(module, eqx.is_inexact_array)) and let the loss put it together (eqx.combine)"
                )
            raise TypeError(f"{name} must be floating-point arrays: {_at(where)} is {shown(leaf)}{hint}")
    return jax.tree.map(_native, value)


def _is_plain(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.bool_, jnp.complexfloating))


def batch(name: str, value: Any, *, finite: bool = True, names: Sequence[str] | None = None) -> Any:
    """A pytree of arrays that share a leading axis of examples; lists of numbers in it become arrays.

    Raises TypeError for what is no array of numbers, ValueError for no arrays, no examples, leading axes that differ
    and, with `finite`, an entry that is not finite (with its row and column).
    """
    if hasattr(value, "batch") and hasattr(value, "names"):
        raise TypeError(f"{name} must be arrays, got {shown(value)}: give its batch (data.load(...).batch)")
    value = jax.tree.map(lambda leaf: _leaf(name, leaf), _arrays(name, value), is_leaf=_is_table)
    leaves = [(_at(where, name), leaf) for where, leaf in jax.tree_util.tree_leaves_with_path(value)]
    if not leaves:
        raise ValueError(f"the {name} hold no arrays; give a Batch(x, y) or another pytree of arrays")
    for what, leaf in leaves:
        if np.ndim(leaf) == 0:
            raise ValueError(f"{what} is a single value; every array needs a leading axis of examples")
        if np.shape(leaf)[0] == 0:
            raise ValueError(f"{what} has shape {np.shape(leaf)}: there are no examples")
    first, shape = leaves[0][0], np.shape(leaves[0][1])
    for what, leaf in leaves[1:]:
        if np.shape(leaf)[0] != shape[0]:
            raise ValueError(
                f"{first} has {shape[0]:,} example{'s' if shape[0] != 1 else ''} (shape {shape}) but {what} has "
                f"{np.shape(leaf)[0]:,} (shape {np.shape(leaf)}); they must share the leading axis"
            )
    if finite and not any(isinstance(leaf, Tracer) for _, leaf in leaves):
        for what, leaf in leaves:
            every_finite(leaf, what, names if what == "x" else None)
    return value


def _arrays(name: str, value: Any) -> Any:
    """The same pytree with arrays for its lists of numbers, which JAX would take for trees of single numbers."""
    if isinstance(value, list):
        leaves = jax.tree.leaves(value)
        if leaves and all(isinstance(leaf, numbers.Number | np.generic | str | bytes) for leaf in leaves):
            return _leaf(name, value)
    if isinstance(value, dict):
        return {field: _arrays(f"{name}[{field!r}]", part) for field, part in value.items()}
    if isinstance(value, list | tuple):
        fields = getattr(value, "_fields", range(len(value)))
        parts = [_arrays(str(field), part) for field, part in zip(fields, value, strict=True)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _leaf(name: str, leaf: Any) -> Any:
    """An array of a batch; booleans and complex numbers may be data."""
    if isinstance(leaf, jax.Array):
        return leaf
    if _is_table(leaf) and not is_sparse(leaf):
        raise TypeError(
            f"{name} must be arrays, got {shown(leaf)}: give Batch(table[names].to_numpy(), table[target].to_numpy())"
        )
    if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "bc" and not np.ma.isMaskedArray(leaf):
        return _native(leaf)
    return leaf if isinstance(leaf, float | int) else _numbers(name, leaf, bools=True)


def _is_table(leaf: Any) -> bool:
    """Whether it is a DataFrame, of whatever library, or a sparse matrix: nothing to look into for leaves."""
    return type(leaf).__name__ == "DataFrame" or is_sparse(leaf)


def is_sparse(value: Any) -> bool:
    """Whether it is a sparse matrix, of SciPy, JAX or whatever library."""
    if isinstance(value, np.ndarray) or type(value).__name__ == "DataFrame":
        return False
    return any(hasattr(value, dense) for dense in ("toarray", "todense")) and any(
        hasattr(value, count) for count in ("nnz", "nse")
    )


def _native(leaf: Any) -> Any:
    """An array in this machine's byte order, of a dtype that JAX knows."""
    if not isinstance(leaf, np.ndarray):
        return leaf
    if leaf.dtype.byteorder not in "=|":
        leaf = leaf.astype(leaf.dtype.newbyteorder("="))
    return leaf.astype(np.float64) if leaf.dtype == np.longdouble else leaf


def _at(where: Any, name: str = "the array") -> str:
    return jax.tree_util.keystr(where).lstrip(".") or name


def float64(tree: Any) -> Any:
    """The same pytree with its floating-point leaves in float64, as JAX arrays; in `jax.enable_x64(True)`."""

    def convert(leaf: Any) -> jax.Array:
        found = jnp.asarray(leaf)
        return found.astype(jnp.float64) if jnp.issubdtype(found.dtype, jnp.floating) else found

    return jax.tree.map(convert, tree)


# --- annotations ----------------------------------------------------------------------------------------------

Positive: TypeAlias = Annotated[float, positive]
NotNegative: TypeAlias = Annotated[float, not_negative]
Number: TypeAlias = Annotated[float, number]
Bound: TypeAlias = Annotated[float, functools.partial(number, needs="a number", infinite=True)]
Level: TypeAlias = Annotated[float, level]
Share: TypeAlias = Annotated[float, share]
Count: TypeAlias = Annotated[int, count]
Natural: TypeAlias = Annotated[int, natural]
Floats: TypeAlias = Annotated[Any, float_dtype]
Widths: TypeAlias = Annotated[Sequence[int], widths]
Counts: TypeAlias = Annotated[Sequence[int], counts]
Keys: TypeAlias = Annotated[Key, keys]
Whole: TypeAlias = Annotated[int, whole]
File: TypeAlias = Annotated[Path, path]
OneKey: TypeAlias = Annotated[Key, key]
Weights: TypeAlias = Annotated[Any, params]
Examples: TypeAlias = Annotated[Any, batch]
Labels: TypeAlias = Annotated[Any, labels]

_FIELDS = {
    Linear: {"w": "d *k", "b": "*k"},
    TwoLayer: {"W1": "d h", "b1": "h", "W2": "h k", "b2": "k"},
}


def checked(function: F) -> F:
    """`function` with its arguments checked and converted by their annotations, before it runs.

    `Annotated[..., check]` is checked by `check(name, value)`, an array of jaxtyping by its dtype and shape (a letter
    has one size in all arguments), a class by `isinstance`; `bool`, `int`, `float`, `str`, functions and samplings as
    their names say. `Any` is not checked, nor what is left at its default.
    """
    signature = inspect.signature(function)
    names = list(signature.parameters)
    plan = {}
    for name, parameter in signature.parameters.items():
        by_kind = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        check = None if by_kind else _check_of(parameter.annotation)
        if check is not None:
            plan[name] = (check, parameter.default)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        sizes: dict[str, Any] = {}
        values = list(args)
        for at, (name, value) in enumerate(zip(names, args, strict=False)):
            if name in plan and value is not plan[name][1]:
                values[at] = plan[name][0](name, value, sizes)
        for name, value in kwargs.items():
            if name in plan and value is not plan[name][1]:
                kwargs[name] = plan[name][0](name, value, sizes)
        return function(*values, **kwargs)

    return call  # type: ignore[return-value]


def _check_of(kind: Any) -> Callable[[str, Any, dict[str, Any]], Any] | None:
    """`check(name, value, sizes)` for an annotation; None where there is nothing to check."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return lambda name, value, sizes: arguments[1](name, value)
    if origin in (typing.Union, types.UnionType):
        rest = [each for each in arguments if each is not types.NoneType]
        if set(rest) == {float, int}:
            rest = [float]
        check = _check_of(rest[0]) if len(rest) == 1 else None
        if check is None or len(rest) == len(arguments):
            return check
        return lambda name, value, sizes: None if value is None else check(name, value, sizes)
    if origin in (Iterable, Sequence):
        return lambda name, value, sizes: several(name, value, sized=origin is Sequence)
    if origin is Callable:
        takes = len(arguments[0]) if isinstance(arguments[0], list) else None
        return lambda name, value, sizes: function(name, value, takes)
    if origin is tuple and arguments[0] is Layer:
        return _deep
    if hasattr(kind, "dim_str"):
        whole = all(str(dtype).startswith(("int", "uint")) for dtype in kind.dtypes)
        return lambda name, value, sizes: _shaped(name, value, kind.dim_str, sizes, whole)
    if kind in _FIELDS:
        return lambda name, value, sizes: _structure(name, value, kind, _FIELDS[kind], sizes)
    plain = {bool: flag, int: whole_number, float: number, str: text, Sampling: sampling}
    if kind in plain:
        return lambda name, value, sizes: plain[kind](name, value)
    if inspect.isclass(kind) and kind not in (Any, np.ndarray, jax.Array, object, inspect.Parameter.empty):
        return lambda name, value, sizes: instance(name, value, kind)
    return None


whole_number = whole


def _structure(name: str, value: Any, kind: type, fields: dict[str, str], sizes: dict[str, Any]) -> Any:
    """Parameters of a model: each array of its shape, biases or None."""
    instance(name, value, kind)
    found = {}
    for field, dims in fields.items():
        part = getattr(value, field)
        if part is None and field.startswith("b"):
            continue
        found[field] = _shaped(f"{name}.{field}", part, dims, sizes)
    return value._replace(**found) if hasattr(value, "_replace") else value


def _deep(name: str, value: Any, sizes: dict[str, Any]) -> Any:
    """Layers whose widths follow each other: `W[d, h1]`, `W[h1, h2]`, …, `W[…, k]`."""
    if not isinstance(value, tuple | list) or not value:
        raise TypeError(f"{name} must be a tuple of layers, such as models.init_deep(key, sizes); got {shown(value)}")
    widths = ["d", *(f"h{i}" for i in range(1, len(value))), "k"]
    layers = [
        _structure(f"{name}[{i}]", layer, Layer, {"W": f"{widths[i]} {widths[i + 1]}", "b": widths[i + 1]}, sizes)
        for i, layer in enumerate(value)
    ]
    return tuple(layers)
