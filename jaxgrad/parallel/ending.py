"""How a process ends: together with the others, or at once if one of them failed.

JAX's orderly exit waits for all processes. A process that failed must not do so, because the others wait for it.
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
"""Exit status of a process that ends because another process ended (`EX_UNAVAILABLE`)."""


@checked
def run(main: Callable[[], Any]) -> None:
    """Run a whole program and exit with the status that it returns. Never wait for a process that is gone.

    With several processes, a process that fails ends at once. A status of 0 or `AGAIN` waits until all are done.
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
    """Wait for the other processes, however long, then leave together.

    They meet in the coordination service and not in a collective of the devices: another rank may still compute, and
    one of its collectives could be mistaken for this one.
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
    """Tell all processes how the program of this rank ended."""
    _service().client.key_value_set(f"jaxgrad/end/{jax.process_index()}", end)


def _ends() -> dict[int, str]:
    """How each rank's program ended, for the ranks that have ended."""
    return {int(key.rpartition("/")[2]): end for key, end in _service().client.key_value_dir_get("jaxgrad/end/")}


def _hang_up() -> None:
    """Close the sockets between the devices of this process and those of others (Linux, CPU).

    A rank that still computes with this one would wait forever; a closed socket tells it that this one is gone. The
    sockets of the coordination service stay open.
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
    """Report the error and end this process at once, without waiting for the others."""
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
    """Tell the ranks that wait at the end. Once rank 0, the coordinator, is gone, JAX would end them by SIGABRT."""

    def tell() -> None:
        with suppress(Exception):
            _tell(_FAILED)

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(1)  # the coordinator may be gone
    if is_main():
        time.sleep(0.3)


EARLY = "had ended its program while others still computed with it"
"""Said of a rank that returns or exits without an error before the others are done."""


def _of_a_peer(error: BaseException) -> bool:
    """Whether an error only follows from the failure of another process."""
    words = ("Gloo", "Connection closed", "Connection reset", "coordination service", "CoordinationService", "NCCL")
    return isinstance(error, Elsewhere) or any(word in str(error) for word in words)


def _exit(status: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(status)
