"""What a study gets from whoever runs it: how to speak, to measure undisturbed, and to go on after a stop."""

import io
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from experiments.engine import machine

if TYPE_CHECKING:
    from jaxgrad.descent import Checkpoint

CAN_STOP = hasattr(signal, "SIGSTOP")
_making = threading.Lock()


class Neighbours(NamedTuple):
    """The worker processes of the study."""

    ids: Any
    """A shared array of their process ids, 0 where there is none yet. Whoever speaks holds its lock."""

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop all but this one where they are, and let them go on behind the block."""
        with self.ids.get_lock():  # nobody is stopped while speaking: the others would wait for the lock
            stopped = [pid for pid in self.ids if pid not in (0, os.getpid())]
            for pid in stopped:
                _signal(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in stopped:
                _signal(pid, signal.SIGCONT)


class Unfinished(NamedTuple):
    """Where a study keeps what it has until it is done."""

    folder: Path
    stamp: bytes
    """The settings, the code and the data of the run. What lies in the folder counts only under the same stamp."""

    def begin(self, resume: bool) -> None:
        """Drop what another run left in the folder, or, without `resume`, whatever lies there."""
        from jaxgrad import parallel

        def drop() -> None:
            of = self.folder / "of.json"
            if not (resume and of.is_file() and of.read_bytes() == self.stamp):
                shutil.rmtree(self.folder, ignore_errors=True)

        parallel.together(lambda: drop() if parallel.is_main() else None)

    def file(self, name: str) -> Path:
        """A file of the folder, which is made with the first of them."""
        from jaxgrad import atomic, parallel

        def make() -> None:
            with _making:
                if not (self.folder / "of.json").exists():
                    self.folder.mkdir(parents=True, exist_ok=True)
                    atomic.write(self.folder / "of.json", self.stamp)

        parallel.together(lambda: make() if parallel.is_main() else None)
        return self.folder / name


@dataclass
class Session:
    """What `run(config, session)` gets. `Session.plain()` serves tests and notebooks."""

    say: Callable[[str], None]
    """Say in a line what is being done."""
    neighbours: Neighbours | None = None
    """The other workers, which `alone` pauses; None where there are none, or seconds do not matter."""
    unfinished: Unfinished | None = None
    """Where `keep` and `checkpoint` save; None: nothing is kept."""
    _paused: bool = False

    @staticmethod
    def plain(say: Callable[[str], None] = lambda text: None) -> "Session":
        """A session that keeps nothing and has no neighbours."""
        return Session(say)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Pause the other workers while the block runs, so that timings are undisturbed.

        What is timed can be compiled before, beside them.
        """
        if self.neighbours is None or not CAN_STOP or self._paused:
            yield
            return
        self._paused = True
        try:
            with self.neighbours.paused():
                yield
        finally:
            self._paused = False

    def race(self, contenders: dict[str, Callable[[], Any]], **options: Any) -> dict[str, Any]:
        """`timing.race` of contenders that are compiled side by side first, and then have the machine to themselves."""
        from jaxgrad import timing

        side_by_side(lambda contender: contender(), contenders.values())
        with self.alone():
            return timing.race(contenders, **options)

    def stops_at_checkpoint(self) -> Any:
        """`with session.stops_at_checkpoint(): ...`: SIGTERM and Ctrl-C end the next descent that has a `checkpoint`.

        It saves itself first. Where nothing is kept the signals do what they always do.
        """
        from jaxgrad import parallel

        return nullcontext() if self.unfinished is None else parallel.Interruption()

    def checkpoint(self, name: str, steps: int) -> "Checkpoint | None":
        """Where a descent of `steps` steps saves itself (20 times) or goes on from; None where nothing is kept."""
        from jaxgrad.descent import Checkpoint

        if self.unfinished is None:
            return None
        return Checkpoint(self.unfinished.file(f"{name}.npz"), every=max(1, steps // 20), resume=True)

    def keep(self, name: str, compute: Callable[[], Any]) -> Any:
        """The array `compute()`, or what it was before the study was interrupted."""
        import numpy as np

        from jaxgrad import atomic, parallel

        if self.unfinished is None:
            return compute()
        path = self.unfinished.file(f"{name}.npy")
        if found := parallel.from_main(lambda: path.read_bytes() if path.is_file() else b""):
            return np.load(io.BytesIO(found), allow_pickle=False)
        values, content = np.asarray(compute()), io.BytesIO()
        np.save(content, values)
        parallel.together(lambda: atomic.write(path, content.getvalue()) if parallel.is_main() else None)
        return values


def side_by_side(work: Callable[[Any], Any], jobs: Iterable[Any]) -> list[Any]:
    """`[work(job) for job in jobs]`, two at a time: while one compiles on one core, the next one can too.

    Do not time anything in it, and do not call it under `jax.enable_x64`, which holds for one thread only.
    """
    import jax

    if jax.process_count() > 1:
        # Processes that compute together must do everything in one order.
        return [work(job) for job in jobs]
    pool = ThreadPoolExecutor(min(2, machine.cores()))
    try:
        return list(pool.map(work, jobs))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _signal(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
