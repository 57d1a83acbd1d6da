"""What the study says on stderr, and which of several processes says it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(text: str) -> None:
    if rank() > 0:
        return
    # In one piece: experiments that run side by side speak too.
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def report_error(text: str) -> None:
    """Report an error on every rank; it may have happened on one only."""
    sys.stderr.write(f"rank {rank()}: {text}\n" if rank() > 0 else f"{text}\n")
    sys.stderr.flush()


def several() -> bool:
    """Whether this is one of several processes, which end together."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def rank() -> int:
    """Which of several processes this is; 0 writes and talks."""
    return sys.modules["jax"].process_index() if several() else 0


@contextmanager
def screen(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Two ways to speak on stderr: a passing status, and a line that stays and means that one is done.

    On a terminal the status is one line under a bar; elsewhere each status is a line.
    """
    if rank() > 0 or not sys.stderr.isatty():
        yield say, say
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="experiment", leave=False, dynamic_ncols=True) as bar:

        def line(text: str) -> None:
            tqdm.write(text, file=sys.stderr)
            bar.update()

        yield bar.set_postfix_str, line
