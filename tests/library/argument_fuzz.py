"""Wrong arguments to every public function: `python tests/library/argument_fuzz.py [--all] [--list] [--plant CHECK]`.

One argument at a time of a call that is right is replaced by a value of a pool. What then happens is one of

    sentence   ValueError, TypeError or OSError, raised by a line of jaxgrad's, in one to three lines
    right      the answer that the same value has in its plain form (3 for np.int64(3), an array for a list)
    traceback  an error from inside JAX, NumPy or Python
    wrong      another answer, or any answer to what means nothing
    hang       nothing within `SECONDS`

A process of its own, since pytest decorates the package with a type checker, which users do not have. It prints one
line of JSON. `--plant CHECK` replaces a function of `jaxgrad.checks` by one that refuses nothing.
"""

import argparse
import collections
import contextlib
import datetime
import dis
import fractions
import functools
import gc
import io
import json
import math
import numbers
import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

SECONDS = 20
CALLS = 3000
REFUSED, ANY = object(), object()


def pool():
    """Values that are wrong nearly everywhere; `[label, value]`."""
    return {
        "None": None,
        "True": True,
        "np.False_": np.False_,
        "'text'": "text",
        "''": "",
        "b'x'": b"x",
        "nan": math.nan,
        "inf": math.inf,
        "-inf": -math.inf,
        "0": 0,
        "-1": -1,
        "2.5": 2.5,
        "-0.5": -0.5,
        "1e400": 1e400,
        "2**31": 2**31,
        "2**63": 2**63,
        "-2**63": -(2**63),
        "10**30": 10**30,
        "10**400": 10**400,
        "1j": 1j,
        "np.complex64(1)": np.complex64(1),
        "np.float32(nan)": np.float32("nan"),
        "np.uint8(200)": np.uint8(200),
        "Fraction(1, 2)": fractions.Fraction(1, 2),
        "object()": object(),
        "[]": [],
        "()": (),
        "{}": {},
        "{1}": {1},
        "{'a': 1}": {"a": 1},
        "['a', 'b']": ["a", "b"],
        "[[1], [1, 2]]": [[1], [1, 2]],
        "[None]": [None],
        "[True]": [True],
        "len": len,
        "a lambda": lambda: 0,
        "int": int,
        "np.datetime64": np.datetime64("2021-04-07"),
        "a date": datetime.date(2021, 4, 7),
        "masked": np.ma.masked_array([1.0, 2.0], [False, True]),
        "empty": np.zeros((0,)),
        "zeros(2, 0, 3)": np.zeros((2, 0, 3)),
        "ones(2, 2, 2)": np.ones((2, 2, 2)),
        "nan array": np.full((3,), np.nan),
        "int array": np.arange(4),
        "bool array": np.array([True, False]),
        "text array": np.array(["a", "b"]),
        "object array": np.array([None, 1], object),
        "complex array": np.ones(3) * 1j,
        "big-endian": np.arange(3.0).astype(">f8"),
        "float key": np.array([0.0, 1.0], np.float32),
        "0-d bool": np.array(True),
        "jnp bool": jnp.array(True),
        "jnp nan": jnp.array(jnp.nan),
        "range": range(3),
        "generator": (i for i in range(3)),
        "module": math,
    }


class Kind(NamedTuple):
    """What an argument may be: a right value, what another value means, and more wrong ones."""

    value: Any
    means: Callable[[Any], Any]
    """The plain form of a value; `REFUSED`, or `ANY` where this file does not know."""
    more: dict[str, Any]
    long: Callable[[Any], bool] = lambda v: False
    """Right values that take too long to try."""


def real(v: Any) -> float | None:
    """A real number as a float, None for all else."""
    if isinstance(v, np.ndarray | jax.Array) and v.ndim == 0 and not isinstance(v, np.ma.MaskedArray):
        v = np.asarray(v)[()]
    if isinstance(v, bool | np.bool_) or not isinstance(v, numbers.Real):
        return None
    try:
        return float(v)
    except OverflowError:
        return None


def number(
    value: Any, low: float = -math.inf, high: float = math.inf, closed: str = "", optional: bool = False
) -> Kind:
    def means(v: Any) -> Any:
        if v is None and optional:
            return ANY
        found = real(v)
        if found is None or not math.isfinite(found) or not low <= found <= high:
            return REFUSED
        if (found == low and "l" not in closed) or (found == high and "h" not in closed):
            return REFUSED
        return found

    forms = {"np.float64": np.float64(value), "np.float32": np.float32(value), "0-d": np.array(float(value))}
    return Kind(value, means, {**forms, "jnp 0-d": jnp.array(value), "[v]": [value], "str": str(value)})


positive = functools.partial(number, low=0)


def count(value: int, low: int = 1, high: int = 2**31 - 1, optional: bool = False) -> Kind:
    def means(v: Any) -> Any:
        if v is None and optional:
            return ANY
        if isinstance(v, np.ndarray | jax.Array) and v.ndim == 0 and not isinstance(v, np.ma.MaskedArray):
            v = np.asarray(v)[()]
        if isinstance(v, bool | np.bool_) or not isinstance(v, numbers.Integral) or not low <= v <= high:
            return REFUSED
        return int(v)

    forms = {
        "np.int64": np.int64(value),
        "np.uint16": np.uint16(value),
        "0-d": np.array(value),
        "jnp": jnp.array(value),
    }
    return Kind(value, means, {**forms, "float": float(value), "[v]": [value], "str": str(value), "low-1": low - 1})


def flag(value: bool) -> Kind:
    def means(v: Any) -> Any:
        return bool(v) if isinstance(v, bool | np.bool_) else REFUSED

    return Kind(value, means, {"1": 1, "np.bool": np.bool_(value)})


def array(
    value: Any,
    shape: Callable[[tuple[int, ...]], bool] | None = None,
    finite: bool = True,
    where: Callable[[np.ndarray], bool] = lambda a: True,
    bools: bool = False,
    whole: bool = False,
    optional: bool = False,
) -> Kind:
    shape = shape or (lambda s: s == np.shape(value))

    def means(v: Any) -> Any:
        if v is None and optional:
            return ANY
        if isinstance(v, np.ma.MaskedArray | str | bytes | dict | set | type) or v is None:
            return REFUSED
        try:
            found = np.asarray(v)
        except Exception:
            return REFUSED
        if found.dtype == bool and found.ndim and shape(found.shape):
            return ANY
        if found.dtype.kind == "O" and all(real(x) is not None for x in found.ravel()):
            return ANY if shape(found.shape) else REFUSED
        if not (found.dtype.kind in "iu" or (found.dtype.kind == "f" and not whole)) or not shape(found.shape):
            return REFUSED
        if found.dtype.kind == "f" and finite and not np.isfinite(found).all():
            return REFUSED
        found = found.astype(np.int64 if whole else np.float64)
        return found if where(found) else REFUSED

    a = np.asarray(value)
    dtype = np.int64 if whole else np.float64
    more = {
        "list": a.tolist(),
        "big-endian": a.astype(dtype).astype(a.astype(dtype).dtype.newbyteorder(">")),
        "transposed": np.asarray(a.T),
        "one more axis": a[None],
        "flat": a.ravel(),
        "masked": np.ma.masked_array(a, np.zeros(a.shape, bool)) if a.ndim else None,
        "complex": a.astype(complex),
        "text": a.astype(str),
        "object": a.astype(object),
        "strided": np.stack([a, a])[:1][0],
        "jnp": jnp.asarray(a),
    }
    if not whole:
        more |= {
            "float16": a.astype(np.float16),
            "longdouble": a.astype(np.longdouble),
            "int": np.round(a).astype(np.int32),
            "uint8": np.abs(np.round(a)).astype(np.uint8),
            "with nan": np.where(np.arange(a.size).reshape(a.shape) == 0, np.nan, a),
            "with inf": np.where(np.arange(a.size).reshape(a.shape) == 0, np.inf, a),
        }
    if a.ndim:
        more |= {"one row": a[:1], "none": a[:0], "one less": a[1:], "one row more": np.concatenate([a, a[-1:]])}
    return Kind(value, means, {k: v for k, v in more.items() if v is not None})


def formula(value: Any, **how: Any) -> Kind:
    """An array of a formula, in which a NaN is a value."""
    return array(value, finite=False, **how)


def exactly(value: Any, *kinds: type, optional: bool = False, more: dict[str, Any] | None = None) -> Kind:
    """One thing of a class of ours, and nothing else."""

    def means(v: Any) -> Any:
        if v is None and optional:
            return ANY
        return ANY if kinds and isinstance(v, kinds) else REFUSED

    return Kind(value, means, more or {})


def function(value: Any, optional: bool = False) -> Kind:
    def means(v: Any) -> Any:
        if v is None and optional:
            return ANY
        # What a function does that is none of ours nobody knows.
        return ANY if callable(v) and not isinstance(v, type) else REFUSED

    return Kind(value, means, {"no argument": lambda: 0.0, "a vector": lambda *a: jnp.ones(2), "a str": lambda *a: "x"})


def action(value: Any) -> Kind:
    """A function without arguments; a class is one too."""
    return Kind(value, lambda v: ANY if callable(v) else REFUSED, {"a vector": lambda: jnp.ones(2)})


def key(value: Any, seed: bool = False, many: bool = False) -> Kind:
    raw = np.asarray(jax.random.key_data(value))

    def means(v: Any) -> Any:
        if seed and isinstance(v, numbers.Integral) and not isinstance(v, bool | np.bool_) and v >= 0:
            return ANY
        if isinstance(v, np.ndarray | jax.Array) and v.dtype in (np.uint32, ">u4") and v.shape == raw.shape:
            return jax.random.wrap_key_data(jnp.asarray(v.astype(np.uint32)))
        if isinstance(v, jax.Array) and jnp.issubdtype(v.dtype, jax.dtypes.prng_key):
            return ANY if v.ndim == 0 or (many and v.ndim == 1) else REFUSED
        return REFUSED

    split = jax.random.split(value, (2, 2)) if value.ndim == 0 else jax.random.split(value[0], (2, 2))
    more = {"raw": raw, "int raw": raw.astype(np.int32), "float raw": raw.astype(np.float32), "2-d keys": split}
    return Kind(value, means, {**more, "list": raw.tolist(), "short": raw[..., :1], "7": 7, "big": raw.astype(">u4")})


def one_of(value: str, names: tuple[str, ...], optional: bool = False) -> Kind:
    def means(v: Any) -> Any:
        if v is None and optional:
            return ANY
        return v if isinstance(v, str) and v in names else REFUSED

    return Kind(value, means, {"upper": value.upper(), "nearly": value[:-1], "[v]": [value]})


def file(value: Any) -> Kind:
    return Kind(
        value,
        lambda v: ANY if isinstance(v, str) and v == value else REFUSED,
        {"no such": "no/such/file.npy", "NUL": "a\0b", "dir": "/"},
    )


def text(value: str) -> Kind:
    return Kind(value, lambda v: ANY if isinstance(v, str) else REFUSED, {})


class Case(NamedTuple):
    name: str
    function: Callable[..., Any]
    kinds: dict[str, Any]
    """`Kind`, or a value that is not changed."""
    after: Callable[[Any], Any]
    """What of the result is compared."""


def cases():
    """A right call of every public function of the library."""
    import jaxgrad
    from jaxgrad import (
        check,
        data,
        descent,
        lecture,
        losses,
        models,
        noise,
        optimum,
        parallel,
        sampling,
        statistics,
        timing,
    )
    from jaxgrad.data import check_batch
    from jaxgrad.descent import checkpoint, run_tiles
    from jaxgrad.rows import Rows, moments, open_rows
    from jaxgrad.theory import conditioning, cost, escape, least_squares, reshuffling, stopping
    from jaxgrad.types import Batch, Layer, Linear, Sampling, TwoLayer

    rng = np.random.default_rng(20210407)
    n, d, h, k = 8, 2, 3, 4
    x, y = rng.normal(size=(n, d)), rng.normal(size=n)
    labels = (np.arange(n) % 2).astype(float)
    Y = rng.normal(size=(n, k))
    w = rng.normal(size=d)
    batch = Batch(x, y)
    loss = losses.mean_loss(models.linear, losses.squared)
    start = Linear(w.astype(np.float32), np.float32(0.5))
    ONE = jax.random.key(0)
    KEYS = jax.random.split(ONE, 3)
    net = TwoLayer(rng.normal(size=(d, h)), rng.normal(size=(h, k)), rng.normal(size=h), rng.normal(size=k))
    layers = (Layer(net.W1, net.b1), Layer(net.W2, net.b2))
    here = Path(tempfile.mkdtemp(prefix="fuzz"))
    np.save(here / "rows.npy", rng.normal(size=(n, 3)))
    (here / "table.csv").write_text("a,b\n" + "".join(f"{i * 0.7},{i * i}\n" for i in range(12)))
    found: list[Case] = []

    def case(function: Any, _after: Any = lambda r: r, /, _name: str = "", **kinds: Any) -> None:
        module = getattr(function, "__module__", "").removeprefix("jaxgrad.")
        found.append(Case(_name or f"{module}.{function.__name__}", function, kinds, _after))

    # --- things that several take
    def batch_kind(value: Any, bare: bool = False, bools: bool = True, regression: bool = True, **only: Any) -> Kind:
        """`bare`: any pytree will do, so that an array by itself is data too."""
        wrong = object()
        known: dict[int, Any] = {}

        def means(v: Any) -> Any:
            if id(v) in known:
                return known[id(v)]
            return REFUSED if not bare or not isinstance(v, np.ndarray | list | range | tuple) else ANY

        X, t = value.x, value.y
        one_nan = np.where(np.arange(X.size).reshape(X.shape) == 3, np.nan, X)
        right = {
            "lists": Batch(X.tolist(), t.tolist()),
            "x list": value._replace(x=X.tolist()),
            "y list": value._replace(y=t.tolist()),
            "tuples": value._replace(y=tuple(t.tolist())),
            "big-endian": Batch(X.astype(">f8"), t.astype(">f8")),
            "jnp": Batch(jnp.asarray(X, jnp.float32), jnp.asarray(t, jnp.float32)),
            "strided": value._replace(x=np.repeat(X, 2, axis=0)[::2]),
            "longdouble": value._replace(x=X.astype(np.longdouble)),
        }
        refused = {
            "x text": value._replace(x="text"),
            "y labels": value._replace(y=np.array(["a", "b"] * (n // 2))),
            "y label list": value._replace(y=["a", "b"] * (n // 2)),
            "y objects": value._replace(y=np.array([None] * n)),
            "y None": value._replace(y=None),
            "x None": Batch(None, None),
            "x ragged": value._replace(x=[[1.0], [1.0, 2.0]] * (n // 2)),
            "x masked": value._replace(x=np.ma.masked_array(X, X > 0)),
            "x nan": value._replace(x=one_nan),
            "y nan": value._replace(y=np.where(np.arange(n) == 2, np.nan, t)),
            "y inf": value._replace(y=np.where(np.arange(n) == 2, np.inf, t)),
            "short y": value._replace(y=t[:-1]),
            "short x": value._replace(x=X[:-1]),
            "empty": Batch(X[:0], t[:0]),
            "scalars": Batch(1.0, 2.0),
            "dates": value._replace(y=np.array(["2021-04-07"] * n, "M8[D]")),
            "x 0-d": value._replace(x=np.array(1.0)),
            "y function": value._replace(y=len),
        }
        known.update({id(v): value for v in right.values()})
        known[id(right["jnp"])] = Batch(np.asarray(X, np.float32), np.asarray(t, np.float32))
        known.update({id(v): REFUSED for v in refused.values()})
        if bare:  # y is not used by every loss
            known[id(refused["y None"])] = ANY
        with contextlib.suppress(ImportError):
            import pandas

            refused["table"] = pandas.DataFrame(X)
            refused["y column"] = wrong
            del refused["y column"]
            known[id(refused["table"])] = REFUSED
        return Kind(value, means, {**right, **refused, **only})

    def params_kind(value: Any) -> Kind:
        known: dict[int, Any] = {}
        right = {
            "float64": jax.tree.map(lambda p: np.asarray(p, np.float64), value),
            "big-endian": jax.tree.map(lambda p: np.asarray(p, ">f4"), value),
            "jnp": jax.tree.map(jnp.asarray, value),
        }
        refused = {
            "ints": jax.tree.map(lambda p: np.asarray(p).astype(int), value),
            "bools": jax.tree.map(lambda p: np.asarray(p) > 0, value),
            "complex": jax.tree.map(lambda p: np.asarray(p) * (1 + 1j), value),
            "texts": jax.tree.map(lambda p: "text", value),
            "objects": jax.tree.map(lambda p: object(), value),
            "masked": jax.tree.map(lambda p: np.ma.masked_array(np.atleast_1d(p), True), value),
            "dates": jax.tree.map(lambda p: np.datetime64("2021-04-07"), value),
        }
        known.update({id(v): value for v in right.values()})
        known.update({id(v): REFUSED for v in refused.values()})

        def means(v: Any) -> Any:
            if id(v) in known:
                return known[id(v)]
            floats = [
                getattr(leaf, "dtype", np.float64 if isinstance(leaf, float) else None) for leaf in jax.tree.leaves(v)
            ]
            return ANY if floats and all(f is not None and np.dtype(f).kind == "f" for f in floats) else REFUSED

        return Kind(value, means, {**right, **refused})

    def sampling_kind(value: Any, **only: Any) -> Kind:
        refused = {
            "b = 0": sampling.distinct(2)._replace(batch_size=0),
            "b = 2.5": sampling.distinct(2)._replace(batch_size=2.5),
            "b = -1": sampling.with_replacement(2)._replace(batch_size=-1),
            "b = True": sampling.distinct(2)._replace(batch_size=True),
            "b = 2**31": sampling.with_replacement(2)._replace(batch_size=2**31),
            "b None": sampling.distinct(2)._replace(batch_size=None),
            "b > n": sampling.distinct(n + 1),
            "no draw": sampling.distinct(2)._replace(draw=None),
            "no name": sampling.distinct(2)._replace(name=None),
            "parts 0": sampling.full_batch()._replace(parts=0),
            "rows 0": sampling.full_batch()._replace(rows=0),
            "uncalled": sampling.full_batch,
            "uncalled b": sampling.distinct,
            "32": 32,
            "'distinct'": "distinct",
            "tuple": ("distinct", 2),
        }
        np_b = sampling.distinct(2)._replace(batch_size=np.int64(2))
        only = {"another name": sampling.distinct(2)._replace(name="text"), **only}

        def means(v: Any) -> Any:
            if v is np_b:
                return sampling.distinct(2)
            return REFUSED if not isinstance(v, Sampling) or any(v is r for r in refused.values()) else ANY

        return Kind(value, means, {**refused, "np b": np_b, **only})

    L, P, B, S, K = (
        function(loss),
        params_kind(start),
        batch_kind(batch, bare=True),
        sampling_kind(sampling.distinct(2)),
        key(ONE),
    )
    eta = positive(0.05)

    # --- samplings
    case(jaxgrad.full_batch, rows=count(3, optional=True))
    for make in (jaxgrad.with_replacement, jaxgrad.distinct, jaxgrad.reshuffled):
        case(make, b=count(2))
    case(sampling.check_sizes, sampling=S, n=count(n))
    for each in (sampling.distinct(2), sampling.with_replacement(2), sampling.reshuffled(2), sampling.full_batch()):
        whole_step = count(3, 0)
        many = count(4)
        case(each.indices, _name=f"{each.name}.indices", key=K, step=whole_step, n=count(n))
        if each.batch_size:
            case(each.ahead, _name=f"{each.name}.ahead", key=K, first=whole_step, steps=many, n=count(n))
    case(sampling.distinct(2).batch, _name="Sampling.batch", data=batch, indices=np.array([0, 3]))

    # --- the loop
    case(descent.small_step, below=positive(0.1))
    case(descent.small_gradient, below=positive(0.1), every=count(2))
    case(descent.no_improvement, metric=function(lambda p: jnp.sum(p.w**2)), patience=count(2), every=count(2))
    case(
        descent.no_improvement,
        _name="no_improvement.min_delta",
        metric=function(lambda p: jnp.sum(p.w**2)),
        patience=count(2),
        min_delta=number(0.1, 0, closed="l"),
    )
    case(descent.keep_best, metric=function(lambda p: jnp.sum(p.w**2)), every=count(2))
    case(descent.target_loss, at_most=number(0.1), every=count(2))
    case(descent.time_limit, seconds=positive(0.1))
    case(descent.log_spaced, steps=count(50), points=count(5, 2))
    sgd = optax.sgd(0.05)
    optimizer = exactly(sgd, more={"uncalled": optax.sgd, "number": "0.1"})
    state = descent.init(jax.tree.map(jnp.asarray, start), sgd)
    case(descent.init, params=P, optimizer=optimizer)
    case(
        descent.advance,
        state=exactly(state),
        key=K,
        data=B,
        until=count(3, 0),
        loss=L,
        optimizer=optimizer,
        sampling=S,
        halt=function(None, optional=True),
        single=flag(False),
    )
    record = array(
        [0, 2, 3],
        lambda s: len(s) <= 1 and np.prod(s) > 0,
        whole=True,
        where=lambda a: bool((a >= 0).all() and (np.diff(np.atleast_1d(a)) >= 0).all() and (a < 2**31).all()),
    )
    case(
        descent.trajectory,
        loss=L,
        params=P,
        data=B,
        optimizer=optimizer,
        sampling=S,
        key=K,
        record=record,
        observe=function(None, optional=True),
    )

    def step_sizes(v: Any) -> Any:
        found = np.asarray(real(v)) if real(v) is not None else None
        if found is None and isinstance(v, list | tuple | np.ndarray | range | jax.Array):
            return ANY
        return REFUSED if found is None or not 0 < found < math.inf else float(found)

    def points(v: Any) -> Any:
        if isinstance(v, numbers.Integral) and not isinstance(v, bool | np.bool_):
            return int(v) if 2 <= v < 2**31 else REFUSED
        if not isinstance(v, list | np.ndarray | tuple | range):
            return REFUSED
        found = record.means(np.sort(v))
        return REFUSED if found is REFUSED or found[-1] > 3 else found

    stop = descent.small_gradient(1e-9)

    def trace(t: Any) -> Any:
        return t.steps, t.examples, t.loss, t.step_norm, t.params, t.status, t.stopped_at

    def descend_case(**changed: Any) -> None:
        given: dict[str, Any] = {
            "loss": loss,
            "params": start,
            "data": batch,
            "optimizer": 0.05,
            "sampling": sampling.distinct(2),
            "steps": 3,
            "key": ONE,
            "record": 2,
        }
        case(jaxgrad.descend, trace, **{**given, **changed})

    descend_case(
        loss=L,
        params=P,
        data=B,
        optimizer=Kind(
            0.05,
            step_sizes,
            {
                "list": [0.05, 0.1],
                "np": np.float64(0.05),
                "nan list": [0.1, math.nan],
                "bools": [True],
                "2-d": [[0.1]],
                "uncalled": optax.sgd,
            },
        ),
        sampling=S,
        steps=count(3, 0),
        key=key(ONE, many=True),
        record=Kind(2, points, {"list": [0, 3], "falls": [3, 0], "beyond": [0, 4], "floats": [0.0, 3.0]}),
    )
    descend_case(
        stop=exactly(
            stop,
            optional=True,
            more={
                "validation": "validation",
                "uncalled": descent.small_step,
                "below 0": stop._replace(below=-1.0),
                "every 0": stop._replace(every=0),
                "no metric": descent.keep_best(lambda p: 0.0)._replace(metric=None),
                "patience 0": descent.no_improvement(lambda p: 0.0, patience=1)._replace(patience=0),
                "seconds": descent.time_limit(1.0)._replace(seconds=math.nan),
                "one of two": [stop, "validation"],
                "none": [],
            },
        )
    )
    descend_case(
        observe=function(lambda p: jnp.sum(p.w), optional=True),
        progress=Kind(
            False,
            lambda v: ANY if isinstance(v, bool | np.bool_) or (callable(v) and not isinstance(v, type)) else REFUSED,
            {"1": 1},
        ),
        params_axis=Kind(None, lambda v: ANY if v is None else REFUSED, {"1": 1}),
    )
    descend_case(memory=positive(1.0))
    descend_case(
        batch_losses=flag(False),
        evaluate=function(None, optional=True),
        evaluate_at=function(None, optional=True),
        sweep=exactly(None, optional=True, more={"list": [0.1], "no names": {}, "number": {1: [0.1]}}),
    )
    good = checkpoint.Checkpoint(here / "run.npz", 2)
    descend_case(
        checkpoint=exactly(
            None,
            optional=True,
            more={
                "path": "run.npz",
                "every 0": good._replace(every=0),
                "every True": good._replace(every=True),
                "every 2.5": good._replace(every=2.5),
                "path 1": good._replace(path=1),
                "path ''": good._replace(path=""),
                "resume 1": good._replace(resume=1),
                "no folder": good._replace(path=here / "no" / "run.npz"),
                "csv": good._replace(path=here / "run.csv"),
                "NUL": good._replace(path="a\0.npz"),
            },
        )
    )
    case(
        checkpoint.check,
        checkpoint=exactly(
            good,
            more={
                "every": good._replace(every=-1),
                "path": good._replace(path=None),
                "resume": good._replace(resume="no"),
            },
        ),
    )

    # --- losses and models
    for each in (losses.squared, losses.half_squared, losses.absolute):
        case(each, prediction=formula(Y[0]), y=formula(Y[1]))
    case(losses.logloss, logit=formula(0.3, shape=lambda s: 0 not in s), y=Kind(1.0, lambda v: ANY, {}))
    case(losses.softmax_cross_entropy, logits=formula(Y[0], shape=lambda s: len(s) == 1 and s[0] > 0), label=0)
    case(
        losses.mean_loss,
        lambda f: f(start, batch),
        model=function(models.linear),
        example_loss=function(losses.squared),
        l2=number(0.1, 0, closed="l"),
    )

    def structure(value: Any) -> Kind:
        fields = type(value)._fields
        first = fields[0]
        right = {
            "lists": jax.tree.map(lambda a: a.tolist(), value),
            "big-endian": jax.tree.map(lambda a: np.asarray(a, ">f8"), value),
        }
        refused = {
            "text": value._replace(**{first: "text"}),
            "None": value._replace(**{first: None}),
            "object": value._replace(**{first: object()}),
            "strings": value._replace(**{first: np.asarray(getattr(value, first)).astype(str)}),
            "complex": value._replace(**{first: getattr(value, first) * 1j}),
            "masked": value._replace(**{first: np.ma.masked_array(getattr(value, first), True)}),
            "one axis more": value._replace(**{first: np.ones((3, *np.shape(getattr(value, first))))}),
            "one row more": value._replace(**{first: np.concatenate([getattr(value, first)] * 2)}),
            "tuple": tuple(value),
        }

        def means(v: Any) -> Any:
            return value if any(v is r for r in right.values()) else REFUSED

        return Kind(value, means, {**right, **refused})

    line = Linear(w, np.float64(0.5))
    case(models.linear, params=structure(line), x=formula(x[0]))
    case(models.two_layer, params=structure(net), x=formula(x[0]), activation=function(jax.nn.sigmoid))
    deep = Kind(
        layers,
        lambda v: REFUSED,
        {
            "one": layers[0],
            "reversed": layers[::-1],
            "none": (),
            "arrays": (net.W1, net.W2),
            "first": (layers[0]._replace(W="text"), layers[1]),
            "bias": (layers[0]._replace(b=np.ones(7)), layers[1]),
        },
    )
    case(models.deep, params=deep, x=formula(x[0]), activation=function(jax.nn.sigmoid))
    dtype = Kind(jnp.float32, lambda v: ANY if v is np.float32 else REFUSED, {"int32": jnp.int32, "'int8'": "int8"})
    case(models.init_linear, d=count(3), k=count(2, optional=True), bias=flag(True), dtype=dtype)
    case(models.init_two_layer, key=K, d=count(2), h=count(3), k=count(4), bias=flag(True), dtype=dtype)

    def widths(v: Any) -> Any:
        flat = (
            v
            if isinstance(v, list | tuple | range)
            else v.tolist()
            if isinstance(v, np.ndarray) and v.ndim == 1
            else []
        )
        whole = all(
            isinstance(e, numbers.Integral) and not isinstance(e, bool | np.bool_) and 0 < e < 2**31 for e in flat
        )
        return tuple(map(int, flat)) if len(flat) >= 2 and whole else REFUSED

    sizes = Kind(
        (2, 3, 4),
        widths,
        {
            "list": [2, 3, 4],
            "np": np.array([2, 3]),
            "float": (2.0, 3.0),
            "0": (2, 0),
            "bool": (2, True),
            "str": ("2", "3"),
        },
    )
    case(models.init_deep, key=K, sizes=sizes, bias=flag(True), dtype=dtype)

    # --- the lecture
    bound = Kind(0.01, lambda v: REFUSED if real(v) is None or math.isnan(real(v)) else real(v), {})
    each_x = lambda w, X, Y: (Y - X @ w) ** 2
    for f in (lecture.objective, lecture.objective_sum):
        case(f, losses=function(each_x), w=w, X=x, Y=y)
    for f in (lecture.objective_gradient, lecture.objective_gradient_sum):
        case(f, gradients=function(lecture.linear_gradients), w=w, X=x, Y=y)
    case(lecture.step, w=formula(w), gradient=formula(w + 1), eta=number(0.1))
    case(lecture.small_step, new=formula(w), old=formula(w + 1), eps=bound)
    slope = lambda w: 2 * w
    some = lambda s: np.prod(s) > 0
    etas = Kind(
        [0.1, 0.1],
        lambda v: ANY if isinstance(v, range | list | tuple | np.ndarray) or hasattr(v, "__next__") else REFUSED,
        {"text": "ab"},
    )
    case(
        lecture.gradient_descent,
        gradient=function(slope),
        w=formula(w, shape=some),
        etas=etas,
        eps=bound,
    )
    for f in (
        lecture.linear_losses,
        lecture.linear_gradients,
        lecture.linear_loss,
        lecture.linear_gradient,
        lecture.linear_gradient_slide_half,
    ):
        case(f, w=formula(w), X=formula(x), y=formula(y))
    case(lecture.linear_step, w=formula(w), X=formula(x), y=formula(y), eta=number(0.1))
    inside = array(
        np.array([0, 3]),
        lambda s: len(s) == 1 and s[0] > 0,
        whole=True,
        where=lambda a: bool((a >= 0).all() and (a < n).all()),
    )
    case(lecture.minibatch_gradient, gradient=function(lecture.linear_gradient), w=w, X=x, Y=y, B=inside)
    case(
        lecture.stochastic_gradient_descent,
        gradient=function(lecture.linear_gradient),
        w=formula(w),
        X=formula(x, shape=lambda s: len(s) == 2 and s[0] > 1 and s[1] == d),
        Y=y,
        batches=[np.array([0, 1])],
        etas=[0.1],
        eps=bound,
    )
    case(lecture.linear_minibatch_gradient, w=formula(w), X=formula(x), y=formula(y), B=inside)
    case(lecture.linear_minibatch_step, w=formula(w), X=formula(x), y=formula(y), B=inside, eta=number(0.1))
    for f in (
        lecture.mean_squared_error,
        lecture.mean_squared_error_gradient,
        lecture.mean_absolute_error,
        lecture.mean_absolute_error_gradient,
    ):
        case(f, y_hat=formula(y), y=formula(y + 1))
    p = 1 / (1 + np.exp(-y))
    for f in (lecture.logloss, lecture.logloss_gradient):
        case(f, p=formula(p), y=formula(labels))
    activation = exactly(lecture.TANH, lecture.Activation, more={"f": jnp.tanh, "pair": (jnp.tanh, jnp.tanh)})
    case(lecture.chain_rule, lambda a: a.f(jnp.ones(2)), outer=activation, inner=activation)
    any_shape = lambda s: True
    for f in (
        lecture.sigmoid_as_printed,
        lecture.sigmoid_derivative_as_printed,
        lecture.sigmoid,
        lecture.sigmoid_derivative,
    ):
        case(f, h=formula(y, shape=any_shape))
    for f in (lecture.tanh_derivative, lecture.relu, lecture.relu_derivative):
        case(f, z=formula(y, shape=any_shape))
    some_rows = formula(x, shape=lambda s: len(s) == 2 and s[0] > 0 and s[1] == d)
    case(lecture.forward, layers=deep, X=some_rows, f=activation)
    case(lecture.two_layer_forward, params=structure(net), X=some_rows, f=activation)
    for f in (lecture.half_squared_errors, lecture.half_squared_adjoint, lecture.half_squared_adjoint_sum):
        case(f, Y_hat=formula(Y), Y=formula(Y + 1))
    for f in (
        lecture.two_layer_loss,
        lecture.two_layer_loss_sum,
        lecture.output_layer_gradient,
        lecture.output_layer_gradient_sum,
        lecture.hidden_layer_gradient,
        lecture.hidden_layer_gradient_sum,
    ):
        case(f, params=structure(net), X=formula(x), Y=formula(Y), f=activation)
    case(
        lecture.output_layer_gradient_as_printed,
        params=structure(net),
        X=formula(x[:k]),
        Y=formula(Y[:k]),
        f=activation,
    )
    case(
        lecture.hidden_layer_gradient_as_printed,
        params=structure(net),
        X=formula(x[:h]),
        Y=formula(Y[:h]),
        f=activation,
    )
    for f in (lecture.output_layer_gradient_one_example, lecture.hidden_layer_gradient_one_example):
        case(f, params=structure(net), x=formula(x[0]), y=formula(Y[0]), f=activation)
    adjoint = function(lecture.half_squared_adjoint)
    case(
        lecture.two_layer_backprop,
        params=structure(net),
        X=formula(x),
        Y=formula(Y),
        f=activation,
        output_adjoint=adjoint,
    )
    case(lecture.deep_backprop, layers=deep, X=formula(x), Y=formula(Y), f=activation, output_adjoint=adjoint)
    for f in (lecture.cross_entropy_as_printed, lecture.cross_entropy_derivative_as_printed):
        case(f, y=formula(labels), p=formula(p))
    for f in (
        lecture.cross_entropy,
        lecture.logit_adjoint_as_printed,
        lecture.logit_adjoint,
        lecture.logit_adjoint_signed,
    ):
        case(f, y=formula(labels), h=formula(y))
    case(lecture.logistic_adjoint, H=formula(Y), Y=formula(np.abs(np.sign(Y))))
    for f in (
        lecture.logistic_loss,
        lecture.logistic_gradient_as_printed,
        lecture.logistic_gradient,
        lecture.logistic_gradient_signed,
    ):
        case(f, params=structure(line), X=formula(x), y=formula(labels))
    one_hot = np.eye(k)[np.arange(n) % k]
    for f in (lecture.softmax_cross_entropies, lecture.softmax_adjoint):
        case(f, Z=formula(Y), Y=formula(one_hot))

    # --- noise
    fresh = sampling_kind(sampling.distinct(2), reshuffled=sampling.reshuffled(2))
    case(noise.gamma, sampling=fresh, n=count(n))
    case(noise.example_gradients, loss=L, params=P, batch=B)
    case(noise.measure, loss=L, params=P, batch=B, curvature=flag(True), chunk=count(8))
    case(noise.covariance, loss=L, params=P, batch=B, chunk=count(8))
    directions = Linear(np.ones((3, d), np.float32), np.ones(3, np.float32))
    case(noise.directional_variances, loss=L, params=P, batch=B, directions=params_kind(directions), chunk=count(8))
    shares = Kind(
        (4, 4),
        lambda v: (
            REFUSED
            if not isinstance(v, list | tuple | np.ndarray | range)
            or sum(np.ravel(v).tolist() if np.asarray(v).dtype.kind in "iu" else [0]) != n
            else ANY
        ),
        {"list": [4, 4], "np": np.array([4, 4]), "floats": (4.0, 4.0), "0": (8, 0), "other": (3, 4), "bool": (True, 7)},
    )
    case(noise.stratified_trace, loss=L, params=P, batch=B, counts=shares, b=count(4), chunk=count(8))
    at = noise.measure(loss, start, batch)
    case(noise.one_step, noise=exactly(at, noise.PointNoise), factor=number(0.3, 0, closed="l"))
    big = sampling.distinct(4)
    draws = rng.exponential(size=40)
    case(
        noise.estimate_scale,
        loss=L,
        params=P,
        batch=B,
        small=fresh,
        big=sampling_kind(big),
        key=K,
        draws=count(40, 20),
        level=number(0.9, 0, 1),
    )
    runs = lambda s: len(s) > 0 and s[0] >= 20
    case(
        noise.scale_from_norms,
        small_squared=array(draws),
        big_squared=array(draws + 1),
        small=fresh,
        big=sampling_kind(big),
        n=count(n, 4),
        level=number(0.9, 0, 1),
    )
    case(
        noise.squared_norms,
        loss=L,
        params=P,
        batch=B,
        sampling=S,
        keys=Kind(
            KEYS,
            lambda v: REFUSED if not isinstance(v, jax.Array) or v.dtype != KEYS.dtype or v.ndim != 1 else ANY,
            {"one": ONE, "raw": np.asarray(jax.random.key_data(KEYS)).astype(float)},
        ),
    )
    case(
        noise.monitor,
        lambda f: f(jax.tree.map(jnp.asarray, start)),
        loss=L,
        batch=B,
        curvature=flag(False),
        chunk=count(8),
    )

    # --- optimum
    binary = batch._replace(y=np.array([0.0, 1, 1, 0, 0, 1, 0, 1]))
    l2 = number(0.1, 0, closed="l")
    case(optimum.least_squares, batch=batch_kind(batch), bias=flag(True), l2=l2)
    case(optimum.logistic, batch=batch_kind(binary), bias=flag(True), l2=l2, steps=count(50))
    case(
        optimum.minimum,
        loss=L,
        params=P,
        batch=B,
        strong_convexity=positive(0.1, optional=True),
        self_concordance=positive(1.0, optional=True),
        steps=count(20),
    )

    # --- statistics, timing
    values = rng.normal(size=(25, 3))
    level = number(0.9, 0, 1)
    V = array(values, runs)
    case(statistics.mean_interval, values=V, level=level)
    case(
        statistics.band,
        values=V,
        level=level,
        method=one_of("bonferroni", ("bonferroni",)),
        key=Kind(None, lambda v: ANY, {}),
        resamples=count(1000, 1000, 10**6),
    )
    case(statistics.band, values=V, level=level, method="max-t", key=K, resamples=count(1000, 1000, 10**6))
    case(
        statistics.bca_interval,
        values=V,
        key=K,
        statistic=function(np.mean),
        level=level,
        resamples=count(1000, 1000, 10**6),
    )
    case(
        statistics.median_interval,
        values=array(values, runs, finite=False, where=lambda a: not np.isnan(a).any()),
        level=level,
    )
    case(
        statistics.quantile_band,
        values=array(values, lambda s: len(s) > 0 and s[0] > 0, finite=False),
        low=number(0.1, 0, 0.9, "lh"),
        high=number(0.9, 0.1, 1, "lh"),
    )
    number_of = lambda low, high: lambda a: bool((a % 1 == 0).all() and (a >= low).all() and (a <= high).all())
    case(
        statistics.proportion_interval,
        successes=array(7, any_shape, where=number_of(0, 40)),
        trials=array(40, any_shape, where=number_of(20, 2**52)),
        level=level,
    )
    case(
        statistics.ratio_interval,
        numerator=array(values),
        denominator=array(values + 5),
        level=level,
        positive=flag(False),
    )
    case(statistics.z_limit, comparisons=count(13), level=level)
    case(timing.compiled, lambda c: c.executable(1.0), function=function(jnp.sin), _name="timing.compiled")
    thunk = lambda: 0
    no_time = lambda t: sorted(t) if isinstance(t, dict) else t.calls * 0
    case(
        timing.measure,
        no_time,
        thunk=action(thunk),
        repeats=count(6, 6),
        min_seconds=number(0.0, 0, 3600, "lh")._replace(long=lambda v: (real(v) or 0) > 0.01),
    )
    contenders = Kind(
        {"a": thunk},
        lambda v: REFUSED if not isinstance(v, dict) or not v or not all(map(callable, v.values())) else ANY,
        {"list": [thunk], "not callable": {"a": 1}},
    )
    case(
        timing.race,
        no_time,
        contenders=contenders,
        repeats=count(6, 6),
        min_seconds=number(0.0, 0, 3600, "lh")._replace(long=lambda v: (real(v) or 0) > 0.01),
    )
    timed = timing.race({"a": thunk, "b": thunk}, repeats=6, min_seconds=0.0)
    case(
        timing.ratio,
        lambda r: 0,
        numerator=exactly(timed["a"], timing.Timing),
        denominator=exactly(timed["b"], timing.Timing),
    )
    case(timing.median_interval, values=array(draws, lambda s: len(s) == 1 and s[0] >= 6), confidence=number(0.9, 0, 1))

    # --- theory
    problem = least_squares.problem(batch)
    Q = exactly(problem, least_squares.Problem)
    start3 = np.array([0.3, -0.2, 0.1])
    W = array(start3, lambda s: s == (3,))
    many_W = array(start3, lambda s: s[-1:] == (3,), finite=False)
    T = array(
        np.array([0, 2, 5]),
        lambda s: len(s) <= 1 and np.prod(s) > 0,
        whole=True,
        where=lambda a: bool((a >= 0).all() and (np.diff(np.atleast_1d(a)) >= 0).all()),
    )
    T1 = array(
        np.array([1, 2, 5]),
        lambda s: len(s) <= 1 and np.prod(s) > 0,
        whole=True,
        where=lambda a: bool((a >= 1).all() and (np.diff(np.atleast_1d(a)) >= 0).all()),
    )
    excess = positive(0.01)
    case(least_squares.design_matrix, x=array(x, lambda s: len(s) == 2 and np.prod(s) > 0), bias=flag(True))
    case(least_squares.problem, batch=batch_kind(batch), bias=flag(True))
    for f in (least_squares.components, least_squares.excess_loss):
        case(f, problem=Q, params=many_W)
    for f in (least_squares.edge, least_squares.condition_number, least_squares.worst_case_step):
        case(f, problem=Q)
    for f in (least_squares.gd_path, least_squares.gd_excess):
        case(f, problem=Q, start=W, eta=eta, steps=T)
    case(least_squares.gd_steps_to, problem=Q, start=W, eta=eta, excess=excess)
    lam = array(np.array([2.0, 1.0]), where=lambda a: bool((a > 0).all()))
    case(
        least_squares.first_time,
        eigenvalues=lam,
        share=array(np.array([1.0, 1.0]), where=lambda a: bool((a >= 0).all())),
        eta=eta,
        target=positive(0.01),
    )
    case(least_squares.sgd_moments, problem=Q, start=W, eta=eta, sampling=fresh, steps=T)
    case(least_squares.sgd_excess, problem=Q, start=W, eta=eta, sampling=fresh, steps=count(5, 0))
    for f in (least_squares.sgd_edge, least_squares.deviation_edge):
        case(f, problem=Q, sampling=fresh)
    for f in (least_squares.floor, least_squares.floor_leading, least_squares.floor_second_order):
        case(f, problem=Q, eta=eta, sampling=fresh)
    stable = positive(0.05, high=least_squares.sgd_edge(problem, sampling.distinct(2)))
    case(least_squares.stationary_second_moment, problem=Q, eta=stable, sampling=fresh)
    case(least_squares.steps_to, problem=Q, start=W, eta=eta, sampling=fresh, excess=excess, most=count(1000))
    case(least_squares.best_step, problem=Q, start=W, sampling=fresh, excess=excess, most=count(50))
    case(least_squares.sgd_deviation, problem=Q, start=W, eta=eta, sampling=fresh, steps=T)
    c = least_squares.components(problem, start3)
    case(
        least_squares.compact_recursion,
        problem=Q,
        components=array(c),
        eta=eta,
        factor=number(0.3, 0, closed="l"),
        steps=array(
            np.array([0, 2, 5]),
            lambda s: len(s) <= 1 and np.prod(s) > 0,
            whole=True,
            where=lambda a: bool((a >= 0).all() and (np.diff(np.atleast_1d(a)) >= 0).all() and (a < 2**31).all()),
        ),
    )
    small = least_squares.problem(Batch(x[:6], y[:6]))
    q = exactly(small, least_squares.Problem)
    b2 = count(2, 1, 6)
    case(
        reshuffling.moments,
        problem=q,
        start=W,
        eta=eta,
        b=b2,
        steps=array(
            np.array([0, 2, 5]),
            lambda s: len(s) <= 1 and np.prod(s) > 0,
            whole=True,
            where=lambda a: bool((a >= 0).all()),
        ),
    )
    for f in (reshuffling.floor, reshuffling.bias):
        case(f, problem=q, eta=eta, b=b2)
    for f in (reshuffling.bias_leading, reshuffling.floor_leading):
        case(f, problem=q, eta=eta, b=b2)
    tiny = least_squares.problem(Batch(x[:4, :1], y[:4]), bias=False)
    case(reshuffling.stable_edge, problem=exactly(tiny, least_squares.Problem), b=count(2, 1, 4))
    case(
        conditioning.contraction,
        eigenvalues=array(np.array([2.0, 1.0]), lambda s: len(s) == 1 and s[0] > 0),
        eta=eta,
        steps=T,
    )
    H = np.array([[2.0, 0.5], [0.5, 1.0]])
    square = array(H, where=lambda a: bool(np.allclose(a, a.T) and np.linalg.eigvalsh(a)[0] > 0))
    for f in (conditioning.condition_number, conditioning.jacobi_condition_number):
        case(f, H=square)
    case(conditioning.rotated, eigenvalues=array(np.array([2.0, 1.0])), angle=number(0.3))
    case(conditioning.rescaled, batch=batch_kind(batch), bias=flag(True))
    vector = array(start3, lambda s: len(s) <= 1 and np.prod(s) > 0)
    case(conditioning.adagrad_path, start=vector, eta=eta, steps=count(5, 0))
    case(conditioning.rmsprop_path, start=vector, eta=eta, steps=count(5, 0), decay=number(0.9, 0, 1))
    case(
        conditioning.adam_path,
        start=vector,
        eta=eta,
        steps=count(5, 0),
        decay=number(0.9, 0, 1),
        decay_squares=number(0.99, 0, 1),
    )
    case(conditioning.rmsprop_cycle, eta=eta)
    below = positive(0.01)
    case(stopping.gd_step_norms, problem=Q, start=W, eta=eta, steps=T1)
    for f in (stopping.gd_stop_time, stopping.gd_stop_excess):
        case(f, problem=Q, start=W, eta=eta, below=below)
    case(stopping.certified_excess, problem=Q, eta=eta, below=below)
    case(stopping.fires_at_once, problem=Q, start=W, below=below)
    case(stopping.sgd_step_square, problem=Q, start=W, eta=eta, sampling=fresh, steps=T1)
    case(stopping.stationary_step_square, problem=Q, eta=stable, sampling=fresh)
    case(
        stopping.false_stop_probability,
        problem=Q,
        eta=positive(0.02, high=0.1),
        below=below,
        sampling=sampling_kind(sampling.distinct(1)),
    )
    case(
        escape.double_well,
        n=Kind(
            4,
            lambda v: int(v) if count(4, 2).means(v) is not REFUSED and int(v) % 2 == 0 else REFUSED,
            {"3": 3, "np": np.int64(4)},
        ),
        mean=number(0.05, -0.2, 0.2),
        spread=number(1.0, 0.0, closed="l"),
    )
    well = escape.double_well(4)
    scalar_loss = function(well.loss)
    wells = batch_kind(Batch(np.linspace(-1, 1, n), np.zeros(n)), bare=True)
    case(
        escape.stationary_points,
        loss=scalar_loss,
        data=wells,
        low=number(-2.0, high=2.0),
        high=number(2.0, -2.0),
        grid=count(101, 2),
    )
    case(
        escape.escape_probability,
        loss=scalar_loss,
        data=wells,
        sampling=fresh,
        eta=positive(0.1, high=1.0),
        start=number(-1.0, -2.0, 0.1),
        right=number(0.1, -1.0),
        left=number(-2.0, high=-1.0, optional=True),
        side=one_of("right", ("right", "left")),
        steps=count(3, 0),
        smoothness=positive(1.0, high=10),
        grid=count(64, 16),
    )
    case(
        escape.impossible,
        loss=scalar_loss,
        data=wells,
        sampling=fresh,
        start=number(-1.0),
        exit=number(0.1, optional=True),
        grid=count(101, 2),
    )
    case(
        escape.kramers_rate,
        eta=eta,
        factor=number(0.3, 0, closed="l"),
        variance=number(1.0, 0, closed="l"),
        well_curvature=positive(1.0),
        barrier_curvature=number(-1.0),
        height=number(0.1, 0, closed="l"),
    )
    case(cost.count, function=function(jnp.sin), _name="theory.cost.count")
    case(
        cost.dense_ratio,
        sizes=Kind((2, 3, 4), widths, {"list": [2, 3, 4], "float": (2.0, 3.0), "0": (2, 0), "True": (2, True)}),
    )
    chain = [0.5, 0.7]
    case(
        cost.chain_forward,
        w=array(chain, lambda s: len(s) == 1 and s[0] > 0, finite=False),
        x=number(0.3),
        y=number(0.2),
    )
    case(
        cost.chain_forward_mode,
        w=array(chain, lambda s: len(s) == 1 and s[0] > 0, finite=False),
        x=number(0.3),
        y=number(0.2),
    )
    case(
        cost.chain_finite_differences,
        w=array(chain, lambda s: len(s) == 1 and s[0] > 0, finite=False),
        x=number(0.3),
        y=number(0.2),
        step=positive(1e-6),
    )
    case(cost.chain_operations, layers=count(3))

    # --- files, devices, tiles, data
    case(
        open_rows,
        lambda r: (r.n, r.columns, r.target, r.classes),
        path=file(str(here / "rows.npy")),
        target=Kind(
            -1,
            lambda v: (
                ANY
                if v is None
                else int(v) % 3
                if isinstance(v, numbers.Integral) and not isinstance(v, bool | np.bool_) and -3 <= v < 3
                else REFUSED
            ),
            {"np": np.int64(-1), "3": 3, "-4": -4},
        ),
        classes=count(2, 2, optional=True),
        memory=positive(0.5),
    )
    rows = open_rows(here / "rows.npy", target=-1)
    case(moments, rows=exactly(rows, Rows))
    columns = array(np.ones(3))
    case(
        rows.scaled,
        lambda r: (r.shift, r.scale),
        _name="Rows.scaled",
        shift=columns,
        scale=array(np.ones(3), where=lambda a: bool((a > 0).all())),
    )
    mesh = parallel.mesh()
    case(
        parallel.mesh,
        lambda m: m.size,
        devices=Kind(None, lambda v: ANY if v is None else REFUSED, {"one": jax.devices()[0]}),
    )
    for f in (parallel.shard, parallel.shard_local):
        case(
            f, lambda s: s.counts, batch=batch_kind(batch, bare=True), mesh=exactly(mesh)
        ) if f is parallel.shard else case(f, lambda s: s.counts, rows=batch_kind(batch, bare=True), mesh=exactly(mesh))
    case(parallel.replicate, tree=start, mesh=exactly(mesh))
    case(parallel.check_mesh, mesh=exactly(mesh))
    case(
        parallel.stratified,
        b=count(4, high=8),
        counts=Kind(
            (4, 4),
            lambda v: REFUSED if widths(v) is REFUSED else widths(v),
            {"np": np.array([4, 4]), "float": (4.0, 4.0), "0": (4, 0), "-1": (4, -1), "True": (True, 4)},
        ),
    )
    case(
        parallel.run,
        lambda r: 0,
        main=Kind(lambda: 0, lambda v: ANY if callable(v) and not isinstance(v, type) else REFUSED, {}),
    ) if False else None
    case(parallel.together, work=action(thunk))
    case(parallel.from_main, read=action(lambda: b"x"))
    case(
        parallel.start,
        devices=Kind(None, lambda v: ANY if v is None else REFUSED, {"-3": -3, "'0'": "0"}),
        processes=Kind(
            1, lambda v: int(v) if count(1, 1, 1).means(v) is not REFUSED else ANY if v is None else REFUSED, {}
        ),
        rank=Kind(0, lambda v: ANY if v is None or count(0, 0).means(v) is not REFUSED else REFUSED, {"-3": -3}),
        timeout=count(5, optional=True),
    )
    case(run_tiles.tile_of, shape=(4, 3), fit=count(5, 0, 10**500))
    case(
        data.linear_problem,
        key=key(ONE, seed=True),
        n=count(8, 4),
        d=count(2, 1, 6),
        condition=number(3.0, 1, 1e12, "lh"),
        noise=number(0.1, 0, closed="l"),
        bias=flag(True),
        rotate=flag(True),
    )
    case(
        data.logistic_problem,
        key=key(jax.random.key(3), seed=True),
        n=count(60, 4),
        d=count(2, 1, 6),
        condition=number(3.0, 1, 1e12, "lh"),
        signal=positive(0.5),
        bias=flag(True),
        rotate=flag(True),
    )
    case(
        data.load,
        lambda s: s.batch,
        name_or_path=file(str(here / "table.csv")),
        target=Kind("b", lambda v: ANY if isinstance(v, str | int) and not isinstance(v, bool) else REFUSED, {"5": 5}),
        task=one_of("regression", ("regression",), optional=True),
        standardise=flag(True),
    )
    table = data.load(str(here / "table.csv"), target="b", task="regression")
    case(
        data.split,
        lambda parts: parts[0].batch,
        dataset=exactly(table, data.Dataset),
        fraction=number(0.25, 0, 0.9),
        key=key(ONE, seed=True),
    )
    case(check_batch, batch=B, task=one_of("regression", ("regression",), optional=True))

    # --- the checker
    def right_gradient(p: Any, b: Any) -> Any:
        r = b.x @ p.w + p.b - b.y
        return Linear(2 * b.x.T @ r / len(r), 2 * r.mean())

    def loss_of(p: Any, b: Any) -> Any:
        return jnp.mean((b.x @ p.w + p.b - b.y) ** 2)

    def tagged(p: Any, b: Any) -> Any:
        r = jax.ad_checkpoint.checkpoint_name(b.x @ p.w + p.b - b.y, "r")
        return jnp.mean(r**2)

    def backprop(p: Any, b: Any) -> Any:
        r = b.x @ p.w + p.b - b.y
        return right_gradient(p, b), {"r": 2 * r / len(r)}

    for f in (check.check_gradient, check.assert_gradient):
        case(
            f,
            lambda r: 0 if r is None else r.ok,
            loss=function(loss_of),
            gradient=function(right_gradient),
            params=params_kind(line),
            batch=batch_kind(batch, bare=True),
            has_aux=flag(False),
        )
    case(
        check.check_backprop,
        lambda r: r.ok,
        loss=function(tagged),
        backprop=function(backprop),
        params=params_kind(line),
        batch=batch_kind(batch, bare=True),
    )
    case(
        check.stability,
        lambda s: s.half,
        gradient=function(lambda h: jax.nn.sigmoid(h)),
        params=array(1.0, lambda s: np.prod(s) > 0),
        scales=array([1.0, 10.0], lambda s: len(s) == 1 and s[0] > 0),
        stable=function(None, optional=True),
    )
    return found


# --- what happens -----------------------------------------------------------------------------------------------


class Late(BaseException):
    pass


def _late(*_: Any) -> None:
    raise Late


def call(case: Case, values: dict[str, Any]) -> Any:
    if "function" in values:  # by position only, and what follows are its own arguments
        return case.after(case.function(values["function"], 1.0))
    return case.after(case.function(**values))


def same(a: Any, b: Any) -> bool:
    """Whether two results agree to rounding of float32, NaN equal to NaN."""
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return bool((jax.random.key_data(a) == jax.random.key_data(b)).all())
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[n], b[n]) for n in a)
    if callable(a) and callable(b):
        return True
    try:
        x, y = np.asarray(a), np.asarray(b)
        if x.dtype.kind in "biufcV" and y.dtype.kind in "biufcV":
            with np.errstate(all="ignore"):
                return x.shape == y.shape and bool(
                    np.allclose(x.astype(complex), y.astype(complex), 2e-3, 1e-5, equal_nan=True)
                )
        return bool(np.array_equal(x, y))
    except (TypeError, ValueError):
        return a is b or type(a) is type(b)


def source(error: BaseException) -> tuple[str, bool]:
    """The file whose code an error left last, and whether a `raise` of that code made it."""
    trace = error.__traceback__
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code
    return code.co_filename, dis.opname[code.co_code[trace.tb_lasti]] in ("RAISE_VARARGS", "RERAISE")


def outcome(case: Case, name: str, value: Any, package: str) -> tuple[str, str]:
    """The class of what happens, and what was said."""
    kind = case.kinds[name]
    values = {n: k.value if isinstance(k, Kind) else k for n, k in case.kinds.items()}
    try:
        means = kind.means(value)
    except (TypeError, ValueError):  # NumPy makes nothing of it
        means = REFUSED

    def run(v: Any) -> Any:
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return call(case, {**values, name: v})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    try:
        result = run(value)
    except Late:
        return "hang", ""
    except (Exception, SystemExit) as error:
        said = str(error)
        last, raised = source(error)
        plain = isinstance(error, ValueError | TypeError | OSError | RuntimeError | ModuleNotFoundError)
        ours = raised and os.path.realpath(last).startswith(package)
        noted = any(note.startswith("jaxgrad:") for note in getattr(error, "__notes__", ()))
        short = 8 <= len(said) <= 700 and said.count("\n") <= 2 and "0x" not in said
        if isinstance(error, AssertionError) and ours:
            return "sentence", ""  # `assert_gradient`
        where = f"{type(error).__name__} {said[:200]!r} at {Path(last).name}"
        return ("sentence" if noted or (plain and ours and short) else "traceback"), where
    if means is REFUSED:
        return "wrong", f"accepted: {str(result)[:100]!r}"
    if means is ANY:
        return "right", ""
    try:
        expected = run(means)
    except (Exception, Late) as error:
        return "wrong", f"accepted, though {means!r} gives {error!r}"[:300]
    return ("right", "") if same(result, expected) else ("wrong", f"{str(result)[:100]!r} for {str(expected)[:100]!r}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--all", action="store_true", help="every value for every argument")
    parser.add_argument("--list", action="store_true", help="print what is not a sentence or right")
    parser.add_argument("--seed", type=int, default=20210407)
    parser.add_argument("--only", default="", help="functions whose name holds this")
    parser.add_argument("--plant", default="", help="a function of jaxgrad.checks that refuses nothing any more")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, _late)
    if given.plant:
        from jaxgrad import checks

        # Its code, since annotations hold the function itself.
        getattr(checks, given.plant).__code__ = (lambda name, value, *rest, **how: value).__code__
    import jaxgrad

    package = os.path.realpath(Path(jaxgrad.__file__).parent)
    tries = []
    began = time.perf_counter()
    known = [c for c in cases() if given.only in c.name]
    for each in known:
        for name, kind in each.kinds.items():
            if isinstance(kind, Kind):
                values = {**pool(), **kind.more}.items()
                tries += [(each, name, label, value) for label, value in values if not kind.long(value)]
    if not given.all and len(tries) > CALLS:
        tries = [tries[i] for i in sorted(random.Random(given.seed).sample(range(len(tries)), CALLS))]
    tally: collections.Counter[str] = collections.Counter()
    bad = []
    for i, (each, name, label, value) in enumerate(tries):
        found, said = outcome(each, name, value, package)
        tally[found] += 1
        if found not in ("sentence", "right"):
            bad.append(f"{each.name}({name}={label}): {found} {said}")
        if i % 500 == 0:
            gc.collect()
    if given.list:
        print("\n".join(bad))
    print(
        json.dumps(
            {
                "calls": len(tries),
                "seconds": round(time.perf_counter() - began, 1),
                "functions": len({c.name for c in known}),
                **tally,
                "bad": bad[:40],
            }
        )
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
