"""Run a person's function and see what each of its statements reads and changes.

`watch` follows the function line by line with `sys.settrace`, in the person's own frames only: helpers, methods
and loops are followed, library code is not. Arrays are looked for in local variables, and inside the
dictionaries, lists, tuples and objects that these hold. `Repair` puts another value in place of what a statement
makes, each time that it makes it, so that one can see what would have come out.
"""

import contextlib
import gc
import io
import os
import sys
import sysconfig
import time
import warnings
from collections.abc import Callable, Iterator
from types import CodeType, FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxgrad.check.evaluate.held import Path, arrays_in
from jaxgrad.check.follow.statements import Statement, assigned, reads, statements_of

RETURN: Path = ("return",)
LARGEST = 1_000_000


class Output(NamedTuple):
    """A value that a statement made or changed."""

    path: Path
    value: np.ndarray
    before: np.ndarray | None
    """What was there before, if it had the same shape."""


class Event(NamedTuple):
    """A statement that ran once."""

    statement: Statement
    code: CodeType
    frame: int
    occurrence: int
    """How often the statement had run before."""
    inputs: tuple[tuple[str, np.ndarray], ...]
    outputs: tuple[Output, ...]
    opaque: bool
    """Whether it reads arrays that could not be looked at."""
    masks: frozenset[str] = frozenset()
    """Which of the inputs are conditions: True or False."""


class Run(NamedTuple):
    """What a function returned, and what ran."""

    result: Any
    events: tuple[Event, ...]
    traced: bool
    """Whether values were seen that JAX only traces, or functions that it compiles."""
    coarse: bool
    """Whether values in less than double precision were seen."""


class Repair(NamedTuple):
    """Put other values in place when a statement has run: `(path, value)` for each time that it runs, or None."""

    statement: Statement
    code: CodeType
    values: tuple[tuple[Path, np.ndarray] | None, ...]


class TooLong(Exception):
    """The function ran longer than it may."""


class Unsettable(Exception):
    """A value that cannot be put in place."""


def spelled_path(path: Path) -> str:
    """A path as the person writes it: `self.cache["z1"]`."""
    text = str(path[0])
    for kind, key in path[1:]:
        text += f".{key}" if kind == "attr" else f"[{key!r}]".replace("'", '"')
    return text


def watch(call: Callable[[], Any], deadline: float) -> Run:
    """Run `call()` and record each statement of the person's own code."""
    watcher = _Watcher(deadline)
    result = _run(call, watcher.enter)
    if watcher.late:
        raise TooLong
    return Run(result, tuple(watcher.events), watcher.traced, watcher.coarse)


def repaired(call: Callable[[], Any], repair: Repair) -> Any:
    """What `call()` returns with the repair. Raises `Unsettable` if the repair could not be made as asked."""
    mender = _Mender(repair)
    result = _run(call, mender.enter)
    if mender.failed or mender.count != len(repair.values):
        raise Unsettable
    return result


def probed(call: Callable[[], Any], event: Event, look: Callable[[dict[str, Any]], Any]) -> Any:
    """What `look(variables)` returns just before the statement runs as it did in `event`."""
    found: list[Any] = []
    seen = 0

    def enter(frame: FrameType, what: str, _: Any) -> Any:
        return _Steps(statements_of(event.statement.file), step) if frame.f_code is event.code else None

    def step(frame: FrameType, statement: Statement | None) -> None:
        nonlocal seen
        if statement is event.statement:
            if seen == event.occurrence:
                found.append(look({**frame.f_globals, **frame.f_locals}))
            seen += 1

    _run(call, enter)
    return found[0] if found else None


class _Steps:
    """A local trace function that calls `begin(frame, statement)` where a statement begins."""

    def __init__(self, statements: dict[int, Statement], begin: Callable[..., None]) -> None:
        self.statements, self.begin = statements, begin
        self.now: Statement | None = None

    def __call__(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            statement = self.statements.get(frame.f_lineno)
            again = statement is not None and hasattr(statement.node, "body")
            if statement is not self.now or again:
                self.now = statement
                self.begin(frame, statement)
        return self


def _run(call: Callable[[], Any], tracer: Callable[..., Any]) -> Any:
    before = sys.gettrace()
    quiet = io.StringIO()
    with (
        contextlib.redirect_stdout(quiet),
        contextlib.redirect_stderr(quiet),
        warnings.catch_warnings(),
        np.errstate(all="ignore"),
    ):
        warnings.simplefilter("ignore")
        # What the collector finishes in the middle, as a `__del__`, is no part of what is followed.
        collects = gc.isenabled()
        gc.disable()
        sys.settrace(tracer)
        try:
            return call()
        finally:
            sys.settrace(before)
            if collects:
                gc.enable()


_PACKAGE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))) + os.sep
_LIBRARIES = tuple(
    {os.path.abspath(p) + os.sep for k, p in sysconfig.get_paths().items() if k in ("stdlib", "platstdlib", "purelib")}
)


def _mine(code: CodeType) -> bool:
    """Whether code is the person's own, with a source."""
    file = code.co_filename
    known = _OWN.get(file)
    if known is None:
        full = os.path.abspath(file)
        parts = full.split(os.sep)
        library = "site-packages" in parts or "dist-packages" in parts
        # A notebook's cell has no path of its own.
        library = library or full.startswith((_PACKAGE, *_LIBRARIES))
        known = _OWN[file] = not library and bool(statements_of(file))
    return known and code.co_name not in _NOT_FOLLOWED


_OWN: dict[str, bool] = {}
_NOT_FOLLOWED = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<lambda>", "<module>", "__del__")


class _Frame:
    """A frame that is being watched: its number, and the statement that is running."""

    def __init__(self, number: int, statements: dict[int, Statement]) -> None:
        self.number = number
        self.statements = statements
        self.statement: Statement | None = None
        self.inputs: tuple[tuple[str, np.ndarray], ...] = ()
        self.opaque = False
        self.masks: frozenset[str] = frozenset()
        self.before: dict[Path, Any] = {}


"""Modules that call what others have registered: whoever wants to be told of something, a cache of programs."""

_ASIDE = ("jax._src.monitoring", "jax._src.compiler", "jax._src.compilation_cache", "logging", "warnings")
"""Modules that call what others have registered: listeners to events, keepers of compiled programs."""
_COARSE = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(jnp.bfloat16))


class _Watcher:
    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.events: list[Event] = []
        self.traced = False
        self.coarse = False
        self.frames: dict[FrameType, _Frame] = {}
        self.counts: dict[tuple[str, int], int] = {}
        self.late = False

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        if event != "call" or self.late or not _mine(frame.f_code) or self.aside(frame):
            return None
        if frame not in self.frames:
            self.frames[frame] = _Frame(len(self.frames), statements_of(frame.f_code.co_filename))
        return self.step

    def aside(self, frame: FrameType) -> bool:
        """Whether it is called by JAX's compiler or a reporter, and not by the gradient."""
        caller = frame.f_back
        while caller is not None and caller not in self.frames:
            if caller.f_globals.get("__name__") in _ASIDE:
                return True
            caller = caller.f_back
        return False

    def step(self, frame: FrameType, event: str, value: Any) -> Any:
        if event not in ("line", "return"):
            return self.step
        if time.thread_time() > self.deadline:
            self.late = True
            return None
        state = self.frames[frame]
        statement = state.statements.get(frame.f_lineno) if event == "line" else None
        again = statement is not None and hasattr(statement.node, "body")
        if event == "line" and statement is state.statement and not again:
            return self.step  # the same statement, on another of its lines
        if state.statement is not None:
            self.leave(frame, state, event, value)
        state.statement = statement
        if statement is not None:
            env = frame.f_locals
            state.before = dict(self.held(statement, env))
            state.inputs, state.opaque, state.masks = self.read(statement, {**frame.f_globals, **env})
        return self.step

    def read(
        self, statement: Statement, env: dict[str, Any]
    ) -> tuple[tuple[tuple[str, np.ndarray], ...], bool, frozenset[str]]:
        found: list[tuple[str, np.ndarray]] = []
        masks: set[str] = set()
        opaque = False
        for text, value in reads(statement, env):
            for path, inner in arrays_in((text,), value):
                if isinstance(inner, (int, np.integer)):
                    continue
                condition = getattr(getattr(inner, "dtype", None), "kind", "") == "b"
                array = np.array(float(inner)) if isinstance(inner, np.bool_) else self.array(inner)
                if array is None:
                    opaque = True
                    self.traced = self.traced or isinstance(inner, Tracer)
                else:
                    found.append((spelled_path(path), array))
                    masks |= {spelled_path(path)} if condition else set()
            if type(value).__name__ == "PjitFunction" and _mine_function(value):
                self.traced = True
        return tuple(found), opaque, frozenset(masks)

    def array(self, value: Any) -> np.ndarray | None:
        kind = getattr(value, "dtype", None)
        self.coarse = self.coarse or (kind is not None and kind in _COARSE)
        return as_array(value)

    def held(self, statement: Statement, env: Any) -> Iterator[tuple[Path, Any]]:
        for name in statement.names:
            if name in env:
                for path, inner in arrays_in((name,), env[name]):
                    yield path, np.array(inner) if isinstance(inner, np.ndarray) else inner

    def leave(self, frame: FrameType, state: _Frame, event: str, value: Any) -> None:
        statement = state.statement
        assert statement is not None
        outputs: list[Output] = []
        env = frame.f_locals
        targets = assigned(statement, {**frame.f_globals, **env})
        for path, inner in self.held(statement, env):
            old = state.before.get(path)
            if old is inner and path not in targets:
                continue
            new = self.array(inner)
            if new is None:
                self.traced = self.traced or isinstance(inner, Tracer)
                continue
            was = as_array(old)
            if was is not None and was.shape != new.shape:
                was = None
            if was is not None and path not in targets and np.array_equal(was, new, equal_nan=True):
                continue
            outputs.append(Output(path, new, was))
        if event == "return" and value is not None:
            for path, inner in arrays_in(RETURN, value):
                new = self.array(inner)
                if new is not None:
                    outputs.append(Output(path, new, None))
        count = self.counts.get(statement.key, 0)
        self.counts[statement.key] = count + 1
        self.events.append(
            Event(statement, frame.f_code, state.number, count, state.inputs, tuple(outputs), state.opaque, state.masks)
        )


def _mine_function(value: Any) -> bool:
    code = getattr(getattr(value, "__wrapped__", None), "__code__", None)
    return code is not None and _mine(code)


class _Mender:
    def __init__(self, repair: Repair) -> None:
        self.repair = repair
        self.statements = statements_of(repair.statement.file)
        self.running: dict[FrameType, Any] = {}
        self.count = 0
        self.failed = False

    def enter(self, frame: FrameType, event: str, _: Any) -> Any:
        return self.step if event == "call" and frame.f_code is self.repair.code else None

    def step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event not in ("line", "return"):
            return self.step
        statement = self.statements.get(frame.f_lineno) if event == "line" else None
        now = self.running.get(frame)
        again = statement is not None and hasattr(statement.node, "body")
        if event == "line" and now is not None and statement is now and not again:
            return self.step
        if now is self.repair.statement:
            self.mend(frame.f_locals)
        self.running[frame] = statement
        return self.step

    def mend(self, env: Any) -> None:
        k = self.count
        self.count += 1
        if k >= len(self.repair.values) or self.repair.values[k] is None:
            return
        path, value = self.repair.values[k]  # type: ignore[misc]
        try:
            _put(env, path, value, self.repair.statement.names)
        except Exception:  # a tuple, a property: what cannot be set
            self.failed = True


def _reach(env: Any, path: Path) -> Any:
    value = env[path[0]]
    for kind, key in path[1:]:
        value = getattr(value, key) if kind == "attr" else value[key]
    return value


def _put(env: Any, path: Path, value: np.ndarray, names: frozenset[str]) -> None:
    """Put a value at a path, and wherever else the statement has put the same object."""
    old = _reach(env, path)
    if isinstance(old, np.ndarray) and old.dtype.kind == "f" and old.shape == value.shape and old.flags.writeable:
        # The same array may be held under other names: what was changed in place is mended in place.
        np.copyto(old, value)
        return
    new: Any = value
    if isinstance(old, Tracer):
        # Inside `vmap`: the same value with its examples wherever they were.
        new = type(old)(old._trace, jnp.moveaxis(jnp.asarray(value), 0, old.batch_dim), old.batch_dim)  # type: ignore
    elif isinstance(old, jax.Array):
        new = jnp.asarray(value)
    elif isinstance(old, float):
        new = float(value)
    elif value.shape != np.shape(old):
        raise Unsettable
    same = [path]
    for name in names:
        if name in env:
            same += [p for p, inner in arrays_in((name,), env[name]) if inner is old and p != path]
    for place in same:
        if len(place) == 1:
            env[place[0]] = new
            continue
        owner = _reach(env, place[:-1])
        kind, key = place[-1]
        if kind == "attr":
            setattr(owner, key, new)
        else:
            owner[key] = new


def as_array(value: Any) -> np.ndarray | None:
    """A copy in float64, or None for what is no real array."""
    if isinstance(value, Tracer):
        value = _batched(value)
    if value is None or isinstance(value, (bool, np.bool_)):
        return None
    try:
        if np.size(value) > LARGEST:
            return None
        array = np.array(value)
    except Exception:  # a tracer without a value, an array that was donated
        return None
    if array.dtype.kind not in "biuf" and str(array.dtype) != "bfloat16":
        return None
    return array.astype(np.float64)


def _batched(value: Any) -> Any:
    """What a value inside `vmap` stands for, its examples in front; None for what is only traced."""
    inner, axis = getattr(value, "val", None), getattr(value, "batch_dim", None)
    if inner is None or not isinstance(axis, int) or isinstance(inner, Tracer):
        return None
    return np.moveaxis(np.asarray(inner), axis, 0)
