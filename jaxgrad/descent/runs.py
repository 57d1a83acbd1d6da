"""Many runs in one program: m settings of the optimizer, s keys, or both, `(m,) (s,)`."""

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import checks
from jaxgrad.descent import optimizers
from jaxgrad.descent.objective import takes
from jaxgrad.descent.optimizers import Made, Optimizer, StepSize, Swept, typed
from jaxgrad.descent.step import State, init
from jaxgrad.types import Key, Params


class Runs(NamedTuple):
    """The runs that go side by side."""

    optimizer: Optimizer
    settings: dict[str, np.ndarray]
    """The settings by name: `[m]` numbers each; or one number each, as far as known, if there is one setting."""
    key: Key
    many_keys: bool
    swept: bool
    """Whether there is an axis of settings."""

    @classmethod
    def of(cls, optimizer: Any, sweep: Any, key: Key) -> "Runs":
        """The runs from the arguments of `descend`. Raises TypeError or ValueError for a wrong optimizer or setting."""
        optimizer, settings = _optimizer(optimizer, sweep)
        swept = any(np.ndim(each) for each in settings.values())
        return cls(optimizer, settings, key, key.ndim > 0, swept)

    @property
    def shape(self) -> tuple[int, ...]:
        """`(m,) (s,)`, `()` for one run."""
        m = [len(next(iter(self.settings.values())))] if self.swept else []
        return (*m, *([len(self.key)] if self.many_keys else []))

    @property
    def over(self) -> tuple[int | None, ...]:
        """For each axis of runs, the axis of the keys: None along the settings, because they share keys."""
        return (None,) * self.swept + (0,) * self.many_keys

    @property
    def axes(self) -> tuple[int, ...]:
        """All axes of runs."""
        return tuple(range(len(self.shape)))

    @property
    def of_key(self) -> tuple[int, ...]:
        """The axes that the keys have."""
        return self.axes[-1:] if self.many_keys else ()

    @property
    def plain_sizes(self) -> bool:
        """Whether the settings are step sizes of plain descent."""
        return self.swept and self.optimizer is optimizers.own_sgd

    def starts(self, state: State) -> State:
        """The first state with each run's own settings and noise; leaves `[*shape, …]`."""
        if self.swept:
            state = state._replace(optimizer=self._set(state))
        if optimizers.has_keys(state.optimizer):
            fold = optimizers.own_keys
            for of_key in reversed(self.over):
                fold = jax.vmap(fold, in_axes=(0, of_key))
            state = state._replace(optimizer=fold(state.optimizer, self.key))
        return state

    def _set(self, state: State) -> Any:
        if self.plain_sizes:
            eta = self.settings["step_size"]
            return StepSize(np.broadcast_to(eta.reshape(-1, *[1] * (len(self.shape) - 1)), self.shape))
        if isinstance(self.optimizer, Made):
            begin = self.optimizer.begun
            for of_key in reversed(self.over):
                begin = jax.vmap(begin, in_axes=(0 if of_key is None else None, 0))
            one = jax.tree.map(lambda leaf: leaf, state.optimizer.settings)
            given = {name: jnp.asarray(self.settings[name], leaf.dtype) for name, leaf in one.items()}
            return jax.tree.map(optimizers.like, begin(given, state.params), state.optimizer)
        return _injected(state.optimizer, self.settings, self.shape)

    def digest_settings(self) -> Any:
        """The settings to compare, for checkpoints and between processes; empty for one setting."""
        if not self.swept:
            return ()
        return self.settings["step_size"] if self.plain_sizes else dict(sorted(self.settings.items()))


def described(shape: tuple[int, ...]) -> str:
    """Runs of a shape in words."""
    return f"runs {list(shape)}" if shape else "a single run"


def first_state(runs: Runs, start: Params, axis: int | None) -> State:
    """The state of all runs before the first step. If there are many runs, it is on the host."""
    ahead = 0 if axis is None else 1
    state = _init(start, optimizer=runs.optimizer, many=ahead == 1)
    return runs.starts(_spread(state, runs.shape, ahead))


@partial(jax.jit, static_argnames=("optimizer", "many"))
def _init(params, *, optimizer, many):
    if not many:
        return strong(init(params, optimizer))
    state = jax.vmap(partial(init, optimizer=optimizer))(params)
    return state._replace(step=state.step[0])


def strong(tree: Any) -> Any:
    """The same numbers without weak dtypes. Steps return none: with weak ones at first they would be compiled twice."""
    return jax.tree.map(lambda leaf: jax.lax.convert_element_type(leaf, leaf.dtype) if _is_weak(leaf) else leaf, tree)


def _is_weak(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and bool(getattr(leaf, "weak_type", False))


def _spread(state: State, shape: tuple[int, ...], ahead: int) -> State:
    """Copy the first state to all runs, on the host: leaves `[*shape, …]`, from leaves with `ahead` axes of runs."""
    if not shape:
        return state

    def copies(leaf: Any) -> Any:
        kind = jnp if typed(leaf) else np
        return kind.broadcast_to(leaf if typed(leaf) else np.asarray(leaf), (*shape, *leaf.shape[ahead:]))

    return jax.tree.map(copies, state._replace(step=()))._replace(step=state.step)


def copies(tree: Any, shape: tuple[int, ...]) -> Any:
    """Copy a tree to all runs: leaves `[*shape, …]`. If there are many runs, they are on the host."""
    if not shape:
        return strong(tree)
    return jax.tree.map(lambda leaf: np.broadcast_to(np.asarray(leaf), (*shape, *np.shape(leaf))), tree)


def continued(state: State, runs: Runs) -> State:
    """A saved state, ready to go on: one step counter, not halted."""
    shape = runs.shape
    if np.shape(state.halted) != shape:
        raise ValueError(
            f"this state is of {described(np.shape(state.halted))}, but optimizer and key ask for {described(shape)}: "
            "give the step sizes and keys of the run that it comes from"
        )
    if isinstance(state.optimizer, StepSize) != runs.plain_sizes:
        given, wanted = ("one optimizer", "an array of step sizes")[:: -1 if runs.plain_sizes else 1]
        raise ValueError(f"this state comes from a run with {wanted}; it cannot go on with {given}")
    step = np.unique(np.asarray(state.step))
    if step.size > 1:
        raise ValueError(
            f"the runs of this state ended at different steps ({step.min()} to {step.max()}), so they cannot go on "
            "together: continue each one by itself"
        )
    state = state._replace(step=jnp.int32(step[0]), halted=jnp.zeros_like(state.halted), examples=None, batch_loss=None)
    return (
        state._replace(optimizer=runs._set(state)) if runs.swept and not isinstance(state.optimizer, Swept) else state
    )


def keep(active: Any, new: State, old: State) -> State:
    """`new` for active runs, `old` for runs that have ended."""
    picked = chosen(active, new._replace(step=0), old._replace(step=0))
    step = new.step
    return picked._replace(step=chosen(active, step, old.step) if jnp.ndim(step) == active.ndim else step)


def chosen(where: Any, new: Any, old: Any) -> Any:
    """The leaves `[*runs, …]`: `new` where `where` is true, `old` elsewhere."""

    def pick(new: Any, old: Any) -> Any:
        if jnp.ndim(new) < where.ndim:
            return new
        mask = where.reshape(where.shape + (1,) * (jnp.ndim(new) - where.ndim))
        # Results of tiles are on the host, and stay there.
        return (np if isinstance(new, np.ndarray) else jnp).where(mask, new, old)

    return jax.tree.map(pick, new, old)


# --- what is given for an optimizer -----------------------------------------------------------------------------


def _optimizer(optimizer: Any, sweep: Any) -> tuple[Optimizer, dict[str, np.ndarray]]:
    """The optimizer, and its settings as `Runs` holds them."""
    if sweep is not None:
        return _sweep(optimizer, sweep)
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return optimizers.transformation("optimizer", optimizer), {}
    try:
        given = checks.array("optimizer", optimizer, finite=False)
    except (TypeError, ValueError):
        raise TypeError(
            "optimizer must be an optax transformation such as optax.sgd(0.1), a step size, or a one-dimensional array "
            f"of step sizes; got {checks.shown(optimizer)}{_optimizer_hint(optimizer)}"
        ) from None
    if given.ndim == 0:
        eta = checks.positive("the step size (optimizer)", given)
        return optimizers.sgd(eta), {"step_size": np.asarray(eta)}
    if given.ndim > 1 or given.size == 0:
        raise ValueError(f"step sizes must be a one-dimensional array of at least one, got shape {given.shape}")
    etas = given.astype(jax.dtypes.canonicalize_dtype(float))
    if (bad := ~((etas > 0) & np.isfinite(etas))).any():
        first = int(np.argmax(bad))
        raise ValueError(
            f"the step size must be finite and positive: number {first} of {len(etas)} (counted from 0) is "
            f"{given[first]} in {etas.dtype}"
        )
    return optimizers.own_sgd, {"step_size": etas}


def _optimizer_hint(optimizer: Any) -> str:
    several = isinstance(optimizer, list | tuple) and any(hasattr(each, "update") for each in optimizer)
    if several:
        return (
            '. Several settings of one optimizer go side by side as optimizer=optax.adam, sweep={"learning_rate": '
            "[1e-3, 1e-2]}"
        )
    if callable(optimizer) and getattr(optimizer, "__module__", "").startswith("optax"):
        return f": call it, as in optax.{getattr(optimizer, '__name__', 'sgd')}(...), or sweep its settings (sweep=)"
    return ""


def _sweep(optimizer: Any, sweep: Any) -> tuple[Optimizer, dict[str, np.ndarray]]:
    needs = 'sweep must name settings and their numbers, such as {"learning_rate": [1e-3, 1e-2]}'
    if not isinstance(sweep, Mapping) or not sweep or not all(isinstance(name, str) for name in sweep):
        raise TypeError(f"{needs}; got {checks.shown(sweep)}")
    settings = {name: np.atleast_1d(checks.array(f"sweep[{name!r}]", value)) for name, value in sweep.items()}
    lengths = {name: each.shape for name, each in settings.items()}
    most = max(len(each) for each in settings.values())
    settings = {name: np.repeat(each, most) if each.shape == (1,) else each for name, each in settings.items()}
    if any(each.ndim != 1 or len(each) != most or not len(each) for each in settings.values()):
        raise ValueError(
            f"sweep must hold one-dimensional arrays of one length, a number for each run; got shapes {lengths}"
        )
    if hasattr(optimizer, "init") and hasattr(optimizer, "update"):
        return optimizers.transformation("optimizer", optimizer), settings
    if not callable(optimizer):
        raise TypeError(
            "with sweep the optimizer must be a function of the settings that makes a transformation, such as "
            f"optax.adam, or optax.inject_hyperparams(optax.adam)(learning_rate=0.1); got {checks.shown(optimizer)}"
        )
    names = [*inspect.signature(optimizer).parameters]
    if strange := [name for name in settings if not takes(optimizer, name)]:
        raise TypeError(
            f"sweep names {strange[0]!r}, which is no setting of {checks.shown(optimizer)}"
            f"{checks.nearest(strange[0], names) or '; it has ' + ', '.join(names)}"
        )
    # `Made` does not hold the numbers, so that other numbers need no new program.
    made = Made(optimizer, tuple(sorted(settings)))
    with checks.saying(f"optimizer({', '.join(f'{name}=...' for name in settings)}) makes no optax transformation"):
        optimizers.transformation("optimizer", optimizer(**{name: float(each[0]) for name, each in settings.items()}))
    return made, settings  # type: ignore[return-value]


def _injected(state: Any, settings: dict[str, np.ndarray], shape: tuple[int, ...]) -> Any:
    """The optimizer's state with each run's settings put into the state of `optax.inject_hyperparams` within it."""
    is_injected = lambda node: hasattr(node, "hyperparams") and hasattr(node, "_replace")
    nodes = [node for node in jax.tree.leaves(state, is_leaf=is_injected) if is_injected(node)]
    if not nodes:
        raise ValueError(
            "sweep needs an optimizer whose settings are arguments: give the function that makes it, such as "
            "optimizer=optax.adam, or wrap it, as optax.inject_hyperparams(optax.adam)(learning_rate=0.1)"
        )
    for name in settings:
        holders = [node for node in nodes if name in node.hyperparams]
        scheduled = [node for node in holders if name in getattr(node, "hyperparams_states", {})]
        if len(holders) != 1 or scheduled:
            there = sorted({each for node in nodes for each in node.hyperparams})
            why = "follows a schedule" if scheduled else f"is in {len(holders)} of them"
            raise ValueError(
                f"sweep[{name!r}] must be a setting of the optimizer that is held once and follows no schedule; it "
                f"{why}. The settings are {', '.join(there)}{checks.nearest(name, there)}"
            )

    def put(node: Any) -> Any:
        if not is_injected(node):
            return node
        found = dict(node.hyperparams)
        for name in set(found) & set(settings):
            values = settings[name].reshape(-1, *[1] * (len(shape) - 1))
            found[name] = np.broadcast_to(values, shape).astype(found[name].dtype)
        return node._replace(hyperparams=found)

    return jax.tree.map(put, state, is_leaf=is_injected)
