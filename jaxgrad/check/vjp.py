"""`check_vjp` and `check_rule`: the backward pass of a function, and a derivative rule of a function's own."""

import collections
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import checks
from jaxgrad.check import gradient as door
from jaxgrad.check.evaluate.separate import argument_names
from jaxgrad.check.report import Report


def check_vjp(
    f: Any,
    backward: Any,
    *args: Any,
    only: Any = None,
    tolerance: Any = None,
    accept_rules: Any = False,
) -> Report:
    """Whether `backward(cotangent, *args)` is the backward pass of `f(*args)`, and if not, which step is wrong.

    `f` returns an array or a tree of arrays of any shape. `backward` gets a cotangent ȳ of that form and returns
    ȳᵀ ∂f/∂a for each argument a: a tuple in the order of the arguments, or the one array where there is one argument;
    None for an argument that is not differentiated. An argument of `backward` whose name is none of those of `f` is
    taken for the cotangent, so `backward(x, w, dout)` works too. The arguments may be trees; integers are left alone.
    Cotangents are drawn from a normal distribution, since mistakes hide where all entries are equal. By JAX's
    convention the derivative by a complex argument x + i y is ∂/∂x − i ∂/∂y. The report names the argument as leaf.

    Raises `TypeError` or `ValueError` if `f` cannot be used, and whatever `backward` raises, with a line added.
    """
    for name, function in (("f", f), ("backward", backward)):
        if isinstance(function, type) or not callable(function):
            raise TypeError(f"{name} must be a function; it is {function!r}.")
    if not args:
        raise TypeError("f needs at least one argument: check_vjp(f, backward, x, ...).")
    names = argument_names(f, len(args))
    args = jax.tree.map(lambda v: np.int64(v) if type(v) is int else v, args)  # a size or a stride: held
    Arguments = collections.namedtuple("Arguments", names)
    with jax.enable_x64(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            out = jax.eval_shape(f, *jax.tree.map(_in_double, args))
        except Exception:
            out = jax.tree.map(np.asarray, f(*args))
    shapes = jax.tree.map(lambda v: (tuple(v.shape), jnp.issubdtype(v.dtype, jnp.complexfloating)), out)
    leaves, form = jax.tree.flatten(out)
    usable = [jnp.issubdtype(v.dtype, jnp.inexact) for v in leaves]
    if not any(usable):
        raise TypeError(f"f must return floating-point arrays; it returned {shapes}.")

    def draw(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        drawn = []
        for v in leaves:
            real = rng.standard_normal(v.shape)
            pair = jnp.issubdtype(v.dtype, jnp.complexfloating)
            drawn.append(np.asarray(real + 1j * rng.standard_normal(v.shape) if pair else real))
        return tuple(drawn)

    def scalar(params: Any, *cotangent: Any) -> Any:
        values = jax.tree.leaves(f(*params))
        parts = [jnp.sum(c * v) for c, v, ok in zip(cotangent, values, usable, strict=True) if ok]
        return jnp.real(sum(parts))

    position = _cotangent_position(f, backward)

    def gradient(params: Any, *cotangent: Any) -> Any:
        given = list(params)
        given.insert(position if position >= 0 else len(given), jax.tree.unflatten(form, cotangent))
        result = backward(*given)
        if len(params) == 1 and not (isinstance(result, (tuple, list)) and len(result) == 1):
            result = (result,)
        if isinstance(result, dict) and set(result) <= set(names):
            result = tuple(result.get(name) for name in names)
        if not isinstance(result, (tuple, list)) or len(result) != len(params):
            return result
        filled = [a if r is None and not _moves(a) else r for a, r in zip(params, result, strict=True)]
        return Arguments(*filled)

    vars(gradient)["__wrapped__"] = backward
    start = draw(np.random.default_rng(31))
    return door.check(
        scalar,
        gradient,
        Arguments(*args),
        start,
        {},
        door.Options(door.checked_tolerance(tolerance), checks.flag("accept_rules", accept_rules)),
        only=only,
        redraw=draw,
        names=["cotangent"] * len(start),
        of=f"sum(cotangent * {getattr(f, '__name__', 'f')}(...))",
    )


def check_rule(f: Any, *args: Any, tolerance: Any = None) -> Report:
    """Whether the derivative rule that `f` carries is the derivative of what `f` computes.

    `f` is made with `jax.custom_vjp` or `jax.custom_jvp` (it may be wrapped in `jax.jit`). At `args`, and at arguments
    drawn around them, what its rule sends back is compared with what JAX derives from its body, with cotangents drawn
    from a normal distribution; the diagnosis is that of `check_vjp`. Arguments in `nondiff_argnums` are held.

    Raises `TypeError` if `f` has no rule of its own.
    """
    rule: Any = f
    while not isinstance(rule, (jax.custom_vjp, jax.custom_jvp)) and hasattr(rule, "__wrapped__"):
        rule = rule.__wrapped__
    if not isinstance(rule, (jax.custom_vjp, jax.custom_jvp)):
        raise TypeError(
            f"f has no derivative rule of its own: it is {f!r}. Pass the function that is decorated with "
            "jax.custom_vjp or jax.custom_jvp. For a gradient by hand there is check_gradient, for a backward pass "
            "check_vjp."
        )
    body = rule.fun
    held = {int(i) % len(args): args[int(i)] for i in getattr(rule, "nondiff_argnums", ()) or ()}
    names = [n for i, n in enumerate(argument_names(body, len(args))) if i not in held]

    def complete(moving: Sequence[Any]) -> list[Any]:
        feed = iter(moving)
        return [held[i] if i in held else next(feed) for i in range(len(args))]

    def plain(*moving: Any) -> Any:
        return body(*complete(moving))

    plain.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_ONLY) for n in names])
    plain.__name__ = getattr(body, "__name__", "f")

    def backward(cotangent_of_rule: Any, *moving: Any) -> Any:
        moving = jax.tree.map(jnp.asarray, moving)
        out, pull = jax.vjp(lambda *m: rule(*complete(m)), *moving)
        sent = pull(jax.tree.map(lambda c, v: jnp.asarray(c).astype(v.dtype), cotangent_of_rule, out))
        kept = lambda s, m: m if s.dtype == jax.dtypes.float0 else s
        return tuple(jax.tree.map(kept, s, m) for s, m in zip(sent, moving, strict=True))

    moving = [a for i, a in enumerate(args) if i not in held]
    return check_vjp(plain, backward, *moving, tolerance=tolerance)


def _cotangent_position(f: Callable[..., Any], backward: Callable[..., Any]) -> int:
    """Where `backward` takes the cotangent: at the one name that `f` does not have, else first."""
    try:
        own = list(inspect.signature(f).parameters)
        theirs = list(inspect.signature(backward).parameters)
    except (TypeError, ValueError):
        return 0
    new = [i for i, name in enumerate(theirs) if name not in own]
    return new[0] if len(new) == 1 and set(own) <= set(theirs) else 0


def _moves(argument: Any) -> bool:
    return any(jnp.issubdtype(np.asarray(v).dtype, jnp.inexact) for v in jax.tree.leaves(argument))


def _in_double(value: Any) -> Any:
    array = np.asarray(value)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else value
