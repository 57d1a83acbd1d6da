"""Optax transformations: what they ask for besides the gradient, and when two are the same.

Most need only `update(gradient, state, params)`. Line searches, Polyak's step size and plateau rules also ask for the
loss, by optax's names; `asked` finds out by tracing what they use:

    value        the loss of the batch at the parameters of the step
    grad         its gradient
    value_fn     the loss of that batch as a function of the parameters (`obj_fn` to Sophia)
    grad_fn      its gradient as a function of the parameters and a number (SAM's opaque mode)
"""

import inspect
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxgrad import checks, fingerprints
from jaxgrad.types import Key, Params

if TYPE_CHECKING:
    Optimizer = optax.GradientTransformation
else:
    # Anything with `init` and `update`, as optax.MultiSteps; `transformation` refuses other values with a sentence.
    Optimizer = Any

_USUAL, _RARE = ("value", "grad", "value_fn"), ("obj_fn", "grad_fn")


def transformation(name: str, value: Any) -> Optimizer:
    """An optax transformation."""
    if isinstance(value, type) or not (
        callable(getattr(value, "init", None)) and callable(getattr(value, "update", None))
    ):
        raise TypeError(f"{name} must be an optax transformation such as optax.sgd(0.1), got {checks.shown(value)}")
    return value


# --- where the parameters are -----------------------------------------------------------------------------------


def trained(params: Params) -> Params:
    """The parameters at which the gradient is taken; with `optax.lookahead`, the fast ones."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def evaluated(params: Params) -> Params:
    """The parameters at which the loss is recorded; with `optax.lookahead`, the slow ones."""
    return params.slow if isinstance(params, optax.LookaheadParams) else params


def paired(optimizer: Optimizer, params: Params) -> Params:
    """The parameters; for `optax.lookahead` a pair of them, a fast and a slow copy."""
    if isinstance(params, optax.LookaheadParams):
        return params
    with _without_warnings():
        try:
            state = jax.eval_shape(optimizer.init, _shape(params))
            asked(optimizer, params, state)
        except AttributeError as error:
            return optax.LookaheadParams.init_synced(params) if error.name == "fast" else params
        except Exception:
            return params  # the error is reported where a step is tried
    return params


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Suppress the warning of optax when lookahead gets parameters that are no pair: `paired` tries just that."""
    logger, quiet = logging.getLogger("absl"), lambda record: "has no attribute `fast`" not in record.getMessage()
    logger.addFilter(quiet)
    try:
        yield
    finally:
        logger.removeFilter(quiet)


# --- one step ---------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What an optimizer asks for besides the gradient."""

    names: tuple[str, ...] = ()
    """The names of the arguments that it is called with."""
    value: bool = False
    """Whether its update depends on the value of the loss."""
    function: bool = False
    """Whether it evaluates the loss at other parameters."""
    needed: bool = False
    """Whether it cannot run without them."""


def asked(optimizer: Optimizer, params: Params, state: Any) -> Asked:
    """What the optimizer asks for, found by tracing one update. An error of the update itself is raised."""
    known = _accepted(optimizer.update)
    usual = tuple(name for name in known if name in _USUAL)
    try:
        found = _traced(optimizer, usual, params, state)
    except Exception as error:
        try:
            found = _traced(optimizer, known, params, state)
        except Exception:
            raise error from None
    return found._replace(needed=found.value or found.function or found.names != usual)


def update(
    optimizer: Optimizer,
    what: Asked,
    gradient: Params,
    state: Any,
    params: Params,
    value: Any,
    function: Callable[[Params], Any] | None,
) -> tuple[Params, Any]:
    """Call `optimizer.update` with what it asks for. The new state keeps the dtypes of the old one."""
    given = {
        "value": jnp.zeros(()) if value is None else value,
        "grad": gradient,
        "value_fn": function,
        "obj_fn": function,
        "grad_fn": lambda params, number=0: jax.grad(function)(params),  # type: ignore[arg-type]
    }
    made, new = optimizer.update(gradient, state, params, **{name: given[name] for name in what.names})
    return made, jax.tree.map(like, new, state)


def first_state(optimizer: Optimizer, params: Params) -> Any:
    """`optimizer.init(params)` in the dtypes that the state has after a step. They differ where an optimizer keeps
    averages in a wider dtype than the parameters."""
    state = optimizer.init(params)
    for _ in range(3):
        shapes = jax.eval_shape(lambda tree: tree, state)
        after = jax.eval_shape(with_placeholders(optimizer), _shape(trained(params)), shapes, _shape(params))[1]
        if jax.tree.structure(after) != jax.tree.structure(shapes):
            raise TypeError("the optimizer's state after a step has another structure than before it")
        if all(new.dtype == old.dtype for new, old in zip(*map(jax.tree.leaves, (after, shapes)), strict=True)):
            break
        state = jax.tree.map(like, state, after)
    return state


def with_placeholders(optimizer: Optimizer) -> Callable[[Params, Any, Params], Any]:
    """`update(gradient, state, params)` with a stand-in for the loss: to find shapes, or the update's program."""

    def update(gradient: Params, state: Any, params: Params) -> Any:
        what = asked(optimizer, params, state)
        return optimizer.update(gradient, state, params, **_placeholders(what.names, gradient, trained(params)))

    return update


def like(leaf: Any, other: Any) -> Any:
    """The leaf, cast to the dtype of `other`."""
    same = not hasattr(leaf, "dtype") or not hasattr(other, "dtype") or leaf.dtype == other.dtype
    return leaf if same else leaf.astype(other.dtype)


def _shape(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)), tree)


def _widest(tree: Any) -> Any:
    return max((leaf.dtype for leaf in jax.tree.leaves(tree)), key=lambda dtype: dtype.itemsize)


def _accepted(function: Any) -> tuple[str, ...]:
    """The names, among ours, that the update accepts as arguments."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return ()
    any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return tuple(name for name in (*_USUAL, *_RARE) if any_name or name in parameters)


def _placeholders(names: tuple[str, ...], gradient: Params, at: Params, called: list[int] | None = None) -> Any:
    dtype = _widest(at)

    def function(params: Params) -> Any:
        if called is not None:
            called.append(1)
        parts = [jnp.sum(jnp.sin(leaf)).astype(dtype) for leaf in jax.tree.leaves(params)]
        return sum(parts[1:], parts[0])

    given = {
        "value": jnp.ones((), dtype),
        "grad": gradient,
        "value_fn": function,
        "obj_fn": function,
        "grad_fn": lambda params, number=0: jax.grad(function)(params),
    }
    return {name: given[name] for name in names}


def _traced(optimizer: Optimizer, names: tuple[str, ...], params: Params, state: Any) -> Asked:
    called: list[int] = []
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), state)
    at = _shape(trained(params))
    dtype = _widest(at)

    def one(value: Any, gradient: Params, state: Any, params: Params) -> Any:
        given = _placeholders(names, gradient, trained(params), called)
        return optimizer.update(gradient, state, params, **given | ({"value": value} if "value" in names else {}))

    closed = jax.make_jaxpr(one)(jax.ShapeDtypeStruct((), dtype), at, state, _shape(params)).jaxpr
    value = closed.invars[0]
    used = any(value is given for equation in closed.eqns for given in equation.invars) or value in closed.outvars
    return Asked(names, used, bool(called))


# --- equal optimizers ---------------------------------------------------------------------------------------------

_MOST = 256
_known: OrderedDict[Any, Any] = OrderedDict()


def usable(optimizer: Optimizer, params: Params) -> tuple[Optimizer, bool]:
    """The optimizer, or an equal one that was used before; and whether it keeps a pair of parameters (`paired`).

    Raises TypeError or ValueError if it cannot take a step with such parameters.
    """
    leaves, structure = jax.tree.flatten(_shape(params))
    shapes = (structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))
    try:
        hash(optimizer)
    except TypeError:
        return _looked_through(optimizer, params, None)
    if (optimizer, shapes) not in _known:
        _known[optimizer, shapes] = _looked_through(optimizer, params, shapes)
    _known.move_to_end((optimizer, shapes))
    while len(_known) > _MOST:
        _known.popitem(last=False)
    return _known[optimizer, shapes]


def _looked_through(optimizer: Optimizer, params: Params, shapes: Any) -> tuple[Optimizer, bool]:
    pair = paired(optimizer, params)
    twice = pair is not params
    with checks.saying(
        "optimizer cannot take a step with these params (update gets the gradient, its state and params, and by name "
        "value, grad and value_fn, or grad_fn and obj_fn"
        f"{_SIDE_BY_SIDE if _holds_several(getattr(optimizer, 'update', None)) else ''})"
    ):
        _check_shapes(optimizer, _shape(pair))
        text = _as_text(optimizer, _shape(pair))
    if text is None or shapes is None:
        return optimizer, twice
    return _known.setdefault((text, shapes), (optimizer, twice))


def _check_shapes(optimizer: Optimizer, params: Params) -> None:
    """Raise TypeError if a step would change the shape of a parameter."""
    state = jax.eval_shape(optimizer.init, params)
    made = jax.eval_shape(with_placeholders(optimizer), trained(params), state, params)[0]
    after = jax.eval_shape(optax.apply_updates, params, made)
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(after), strict=True):
        if old.shape != new.shape:
            several = _holds_several(getattr(optimizer, "update", None))
            raise TypeError(
                f"optimizer would change the shape of the parameter {checks.leaf_name(path)}: from {list(old.shape)} "
                f"to {list(new.shape)} in one step{_SIDE_BY_SIDE if several else ''}"
            )


_SIDE_BY_SIDE = (
    "; it is made with several numbers for one setting: to run them side by side, give the function that makes it, and "
    "the numbers in sweep, as in optimizer=optax.adam, sweep={'learning_rate': [1e-3, 1e-2]}"
)


def _holds_several(function: Any, depth: int = 6) -> bool:
    """Whether a function was made with a list or a one-dimensional array of numbers."""
    for cell in getattr(function, "__closure__", None) or ():
        held = cell.cell_contents
        if isinstance(held, list) or (isinstance(held, np.ndarray | jax.Array) and held.ndim == 1):
            return True
        inner = held if isinstance(held, tuple) else (held,)
        if depth and any(_holds_several(each, depth - 1) for each in inner if callable(each)):
            return True
    return False


def _as_text(optimizer: Optimizer, params: Params) -> str | None:
    """The programs of an optimizer as text; None where the text does not show all of what they do.

    Two that give the same text do the same: they have the same traced programs of `init` and `update`, numbers
    included. A compiled program is found by its optimizer, and `optax.adam(1e-2)` written twice makes two that do not
    compare equal.
    """
    state = jax.eval_shape(optimizer.init, params)
    update = with_placeholders(optimizer)
    closed = [jax.make_jaxpr(optimizer.init)(params), jax.make_jaxpr(update)(trained(params), state, params)]
    if any(equation.effects for each in closed for equation in each.jaxpr.eqns):
        return None
    texts = [fingerprints.identity(each) for each in closed]
    structures = (jax.tree.structure(state), asked(optimizer, params, state))
    return None if None in texts else f"{texts} {structures}"


# --- the step sizes and other settings of many runs -----------------------------------------------------------


class StepSize(NamedTuple):
    """The optimizer's state when each run has its own step size: plain descent."""

    eta: Any
    """float[]."""


class Swept(NamedTuple):
    """The optimizer's state when each run has its own settings (`sweep`)."""

    settings: dict[str, Any]
    """The settings by name, one number of each."""
    inner: Any
    """The state of the optimizer that is made with these settings."""


def _own_step(updates: Params, state: Any, params: Params = None) -> tuple[Params, Any]:
    del params
    return jax.tree.map(lambda gradient: -state.eta.astype(gradient.dtype) * gradient, updates), state


# Plain descent with the step size in the state: one program serves all step sizes.
own_sgd = optax.GradientTransformation(lambda params: StepSize(jnp.zeros(())), _own_step)
sgd = lru_cache(optax.sgd)  # equal step sizes give the same transformation, so nothing compiles twice


class Made(NamedTuple):
    """A transformation with its settings in the state: one program serves all settings."""

    make: Any
    names: tuple[str, ...]

    def init(self, params: Params) -> Swept:
        settings = {name: jnp.asarray(0.5, _widest(params)) for name in self.names}
        return self.begun(settings, params)

    def begun(self, settings: dict[str, Any], params: Params) -> Swept:
        """The first state with these settings."""
        return Swept(settings, self.make(**settings).init(params))

    def update(self, updates: Params, state: Any, params: Params = None, **given: Any) -> tuple[Params, Swept]:
        made = optax.with_extra_args_support(self.make(**state.settings))
        new, inner = made.update(updates, state.inner, params, **given)
        return new, Swept(state.settings, inner)


# --- keys in the state ----------------------------------------------------------------------------------------


def own_keys(state: Any, key: Key) -> Any:
    """Fold each random key in the state with the run's key, so that each run has its own noise.

    Typed keys are recognised by their dtype, raw keys (uint32[2]) by a name that ends with `key` or `rng`.
    """

    def folded(path: Any, leaf: Any) -> Any:
        if typed(leaf):
            return _folded(leaf, key)
        words = jax.random.key_data(jax.random.key(0)).shape
        name = jax.tree_util.keystr(path).lower().rstrip("]'\"")
        raw = getattr(leaf, "dtype", None) == np.uint32 and np.shape(leaf)[-1:] == words
        if raw and name.endswith(("key", "rng")):
            return jax.random.key_data(_folded(jax.random.wrap_key_data(jnp.asarray(leaf)), key))
        return leaf

    return jax.tree_util.tree_map_with_path(folded, state)


def has_keys(state: Any) -> bool:
    """Whether `own_keys` would change a state of these shapes."""
    words = jax.random.key_data(jax.random.key(0)).shape
    return any(typed(leaf) or (leaf.dtype == np.uint32 and leaf.shape[-1:] == words) for leaf in jax.tree.leaves(state))


def typed(leaf: Any) -> bool:
    """Whether it is an array of typed JAX keys."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _folded(keys: Any, key: Key) -> Any:
    word = jax.random.bits(key)
    fold = lambda each: jax.random.fold_in(each, word)
    for _ in range(keys.ndim):
        fold = jax.vmap(fold)
    return fold(keys)
