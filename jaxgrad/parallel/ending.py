"""How the program of a process ends: together with the others, or at once where one of them failed.

An orderly exit of JAX waits for all processes. One that failed must not wait for the others, which wait for it.
"""

import os
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import jax

from jaxgrad.checks import checked
from jaxgrad.parallel.agreement import Elsewhere, is_main

AGAIN = 75
"""Exit status of a run that was asked to stop and left a checkpoint: run me again (`EX_TEMPFAIL`)."""
PEER_LOST = 69
"""Exit status of a process that ends because another one did (`EX_UNAVAILABLE`)."""


@checked
def run(main: Callable[[], Any]) -> None:
    """Run a whole program and exit with what it returns, without ever waiting for a process that is gone.

    With several processes, one that fails ends at once: an orderly exit would wait for the others, which wait for it.
    A status of 0 or `AGAIN` waits until all are done.
    """
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        if jax.distributed.is_initialized():
            end_at_once(type(error), error, error.__traceback__)
        raise
    if isinstance(status, str):
        print(status, file=sys.stderr)
    status = status if isinstance(status, int) else int(status is not None)
    if not jax.distributed.is_initialized():
        sys.exit(status)
    if status in (0, AGAIN):
        leave_together()
    _exit(status)


def leave_together() -> None:
    """Wait for the others, however long, then leave together.

    They meet in the coordination service, not in a collective of the devices: one that another rank still computes
    with could be taken for it.
    """
    if not jax.distributed.is_initialized():
        return
    try:
        _tell(_OVER)
        _hang_up()
        while (ends := list(_ends().values())).count(_OVER) < jax.process_count():
            if _FAILED in ends:
                raise Elsewhere("one that had not ended failed")
            time.sleep(0.05)
        jax.distributed.shutdown()
    except BaseException as error:
        end_at_once(type(error), error, error.__traceback__)


_OVER, _FAILED = "over", "failed"


def _service() -> Any:
    from jax._src import distributed  # JAX shows it nowhere else

    return distributed.global_state


def _tell(end: str) -> None:
    """Let all know how the program of this rank ended."""
    _service().client.key_value_set(f"jaxgrad/end/{jax.process_index()}", end)


def _ends() -> dict[int, str]:
    """How the programs of the ranks ended, of those that did."""
    return {int(key.rpartition("/")[2]): end for key, end in _service().client.key_value_dir_get("jaxgrad/end/")}


def _hang_up() -> None:
    """Close the lines between the devices of this process and those of others, which stand under Linux on a CPU.

    A rank that still computes with this one then hears that it is gone, where it would wait for ever. The lines of
    the coordination service stay.
    """
    port = int(_service().coordinator_address.rpartition(":")[2])
    if jax.default_backend() != "cpu" or not os.path.isdir("/proc/self/fd"):
        return
    for handle in map(int, os.listdir("/proc/self/fd")):
        with suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(handle).st_mode):
                continue
            with socket.socket(fileno=os.dup(handle)) as line:
                internet = line.family in (socket.AF_INET, socket.AF_INET6) and line.type == socket.SOCK_STREAM
                if internet and port not in (line.getsockname()[1], line.getpeername()[1]):
                    line.shutdown(socket.SHUT_RDWR)


def end_at_once(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Say what happened, and end without asking anybody."""
    rank, processes = jax.process_index(), jax.process_count()
    if _of_a_peer(error):
        early: list[int] = []
        with suppress(Exception):
            early = [other for other, end in _ends().items() if end == _OVER and other != rank]
        why = "another process is gone; that one's output says why"
        if early:
            why = f"rank {early[0]} {EARLY}"
        print(f"rank {rank} of {processes} ended because {why}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        _tell_failure()
        _exit(PEER_LOST)
    traceback.print_exception(kind, error, trace)
    print(f"rank {rank} of {processes} failed: {kind.__name__}: {error}", file=sys.stderr)
    _tell_failure()
    _exit(1)


def _tell_failure() -> None:
    """Let those know that wait at the end: JAX would end them by SIGABRT once the coordinator, rank 0, is gone."""

    def tell() -> None:
        with suppress(Exception):
            _tell(_FAILED)

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(1)  # the coordinator may be gone
    if is_main():
        time.sleep(0.3)


EARLY = "had ended its program while others still computed with it"
"""What is said of a rank that returns or exits, without an error, before the others are done."""


def _of_a_peer(error: BaseException) -> bool:
    """Whether a failure is only the echo of another process's."""
    words = ("Gloo", "Connection closed", "Connection reset", "coordination service", "CoordinationService", "NCCL")
    return isinstance(error, Elsewhere) or any(word in str(error) for word in words)


def _exit(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
