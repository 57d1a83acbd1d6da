"""A run that is asked to stop, at the same step on every process."""

import signal
import sys
import threading
from contextlib import suppress
from typing import Any

import numpy as np

from jaxgrad.parallel.agreement import from_all, is_main
from jaxgrad.parallel.ending import AGAIN


class Preempted(SystemExit):
    """A run was asked to stop, stopped at the same step on every process, and saved a checkpoint: status 75."""

    def __init__(self, step: int, path: Any):
        super().__init__(AGAIN)
        self.step = step
        if is_main():
            print(f"stopped at step {step:,} as asked; {path} holds it: run the same with resume", file=sys.stderr)


class Interruption:
    """Whether any process got SIGTERM or Ctrl-C: `with Interruption() as asked: ... if asked(): stop`.

    All processes call `asked()` at the same place and get the same answer. A second signal of the same kind has its
    usual effect. Only the main thread gets signals; other threads hear of them if the main thread is in such a block
    too.
    """

    _around: "Interruption | None" = None
    """The innermost of the main thread."""

    def __enter__(self) -> "Interruption":
        self._came = False
        self._outer = Interruption._around
        if threading.current_thread() is threading.main_thread():
            Interruption._around = self
        self._before: dict[int, Any] = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            # JAX swallows SIGTERM for a service of its own; with several processes this replaces it.
            with suppress(ValueError):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        self._came = True
        if is_main():
            print("asked to stop: at the next record point or checkpoint; once more stops at once", file=sys.stderr)
        signal.signal(number, self._usual(number))

    def _usual(self, number: int) -> Any:
        """The handler of the signal before the outermost of these blocks."""
        if self._outer is not None:
            return self._outer._usual(number)
        before = self._before.get(number)
        if callable(before):
            return before
        return signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler

    def __call__(self) -> bool:
        return bool(from_all(np.array([self._heard()])).any())

    def _heard(self) -> bool:
        return self._came or (self._outer is not None and self._outer._heard())

    def __exit__(self, *_: Any) -> None:
        if Interruption._around is self:
            Interruption._around = self._outer
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
