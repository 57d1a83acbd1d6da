"""The processes that run the experiments of a plan: which experiment runs when, and in which process."""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import experiments
from experiments.engine import altered, machine, runner
from experiments.engine.arguments import Unusable
from experiments.engine.runner import Failure, Product, Task
from experiments.engine.session import CAN_STOP, Neighbours

MOST_TOGETHER = 4
"""Experiments that run side by side at most, since memory is not without end."""

Outcomes = Iterator[tuple[str, Product | Failure]]
"""What each experiment yields, by its name, as it becomes ready."""


@contextmanager
def outcomes(
    tasks: Sequence[Task],
    change: altered.Change | None,
    status: Callable[[str], None],
    running: list[str],
    together: bool,
) -> Iterator[Outcomes]:
    """What each task yields; `running` holds the names of those at work.

    `together`, they run in worker processes, one on each core, since most of their time is compiling, which uses one.
    Those that measure seconds come first, one at a time; while they measure, the other workers are paused
    (`Session.alone`). Otherwise they run here, one after the other. Whatever ends the block, an interrupt too, ends the
    workers.
    """
    untimed = change is not None and change.untimed
    timed = [] if untimed else [task for task in tasks if task.entry.timed]
    others = [task for task in tasks if untimed or not task.entry.timed]
    cores = min(MOST_TOGETHER, machine.cores())
    if not together or len(tasks) == 1 or cores == 1:
        yield _here(timed + others, status, running)
        return
    new = multiprocessing.get_context("spawn")
    messages, ids = new.SimpleQueue(), new.Array("i", cores)
    ready = (list(experiments.__path__), tasks[0].device, messages, ids, change)
    pool = ProcessPoolExecutor(cores, new, _start, ready)
    try:
        yield _in_workers(pool, cores, timed, others, messages, status, running)
    finally:
        for process in multiprocessing.active_children():
            process.kill()  # a paused process would not hear anything else
        pool.shutdown(cancel_futures=True)


def _here(tasks: list[Task], status: Callable[[str], None], running: list[str]) -> Outcomes:
    for task in tasks:
        running[:] = [task.entry.name]
        outcome = runner.perform(task, status)
        running.clear()
        yield task.entry.name, outcome


def _in_workers(
    pool: ProcessPoolExecutor,
    cores: int,
    timed: list[Task],
    others: list[Task],
    messages: Any,
    status: Callable[[str], None],
    running: list[str],
) -> Outcomes:
    at_work: dict[Future[Any], Task] = {}

    def next_task() -> Task | None:
        measuring = any(task.entry.timed for task in at_work.values())
        if timed and not measuring and (CAN_STOP or not at_work):
            return timed.pop(0)
        beside = CAN_STOP or not (measuring or timed)
        return others.pop(0) if others and beside and len(at_work) < cores else None

    while timed or others or at_work:
        while task := next_task():
            with _unheard():  # this process ends the workers
                at_work[pool.submit(_perform, task)] = task
        running[:] = [task.entry.name for task in at_work.values()]
        # A wait without end could not be interrupted everywhere.
        finished = wait(at_work, timeout=0.1, return_when=FIRST_COMPLETED).done
        while not messages.empty():
            status(messages.get())
        suspects = list(running)
        for future in finished:
            task = at_work.pop(future)
            running.remove(task.entry.name)
            try:
                outcome = future.result()
            except BrokenExecutor:
                raise Unusable(
                    f"a worker process died in {' or '.join(suspects)}: is the memory used up? "
                    f"python -m experiments {suspects[0]} runs one without"
                ) from None
            yield task.entry.name, outcome


@contextmanager
def _unheard() -> Iterator[None]:
    """Processes that are started in the block get no Ctrl-C or SIGTERM; this process gets them behind the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# --- in a worker -----------------------------------------------------------------------------------------------

_speak: Callable[[str], None] = print
_neighbours: Neighbours | None = None
"""What `_start` hands to `_perform`: a pool passes its workers nothing else that is not a task."""


def _start(folders: Sequence[str], device: str, messages: Any, ids: Any, change: altered.Change | None) -> None:
    """Make a new process ready for `_perform`: where experiments are, what to compute on, who hears of it."""
    global _speak, _neighbours

    def speak(text: str) -> None:
        with ids.get_lock():
            messages.put(text)

    # The process that started it ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)  # what it starts itself does hear this one
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    experiments.__path__[:] = folders  # type: ignore[index]
    _speak, _neighbours = speak, Neighbours(ids)
    machine.start_jax(device)
    if change is not None:
        altered.apply(change)
        _neighbours = None if change.untimed else _neighbours
    # Tracing makes many objects that stay. Looking through all of them as often as Python does took 9 % of the study.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    with ids.get_lock():
        ids[list(ids).index(0)] = os.getpid()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _perform(task: Task) -> Product | Failure:
    return runner.perform(task, _speak, _neighbours)
