"""How processes find each other: by arguments, by the environment, or by what JAX finds of the cluster."""

import atexit
import os
import re
import socket
import sys
import time
from contextlib import suppress
from typing import Any, NamedTuple

import jax

from jaxgrad import checks
from jaxgrad.parallel.ending import end_at_once, leave_together

COORDINATOR, PROCESSES, RANK, DEVICES, TIMEOUT, HEARTBEAT = (
    f"JAXGRAD_{name}"
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "DEVICES", "START_TIMEOUT", "HEARTBEAT")
)


class Place(NamedTuple):
    """The rank of this process, and the number of processes."""

    rank: int
    processes: int
    how: str
    """Where rank and number come from: `arguments`, `environment`, `detected` or `single`."""


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    *,
    devices: int | None = None,
    timeout: int | None = None,
) -> Place:
    """Join the other processes, if there are any. Call it once, before the first array.

    Arguments that are not given are taken from the environment (`JAXGRAD_COORDINATOR=host:port`,
    `JAXGRAD_NUM_PROCESSES`, `JAXGRAD_PROCESS_ID`), or else from Slurm, Open MPI or Kubernetes as JAX finds them.
    Otherwise this is a single process.

    Args:
      devices: the number of virtual devices on this CPU (`JAXGRAD_DEVICES`). They share its cores: for tests and
        lessons.
      timeout: seconds to wait for the others (`JAXGRAD_START_TIMEOUT`; 20).

    Later, if a process gives no sign of life for 20 s (`JAXGRAD_HEARTBEAT`), all end.

    Raises ValueError for impossible numbers, and for two different numbers of devices (`XLA_FLAGS` may ask for some),
    ConnectionError if the coordinator cannot be reached or its port is in use, RuntimeError if JAX already runs.

    The coordinator listens on the address that it was given, which should be loopback or a private network: the
    traffic is neither encrypted nor authenticated.
    """
    if jax.distributed.is_initialized():
        return Place(jax.process_index(), jax.process_count(), "detected")
    if coordinator is not None:
        checks.text("coordinator", coordinator)
    explicit = any(each is not None for each in (coordinator, processes, rank))
    coordinator = coordinator or os.environ.get(COORDINATOR)
    processes = _number("processes", PROCESSES, processes, 1)
    rank = _number("rank", RANK, rank, 0)
    devices = _number("devices", DEVICES, devices, 1)
    timeout = _number("timeout", TIMEOUT, timeout, 1) or 20
    if devices is not None:
        _virtual(devices)
    given = {"coordinator": coordinator, "processes": processes, "rank": rank}
    missing = [name for name, value in given.items() if value is None]
    if processes == 1 and not coordinator:
        return Place(0, 1, "arguments" if explicit else "environment")
    waits: dict[str, Any] = {
        "initialization_timeout": timeout,
        "heartbeat_timeout_seconds": _number("", HEARTBEAT, None, 1) or 20,
        "shutdown_timeout_seconds": 30,
    }
    if len(missing) == len(given):
        return _detected(waits)
    if coordinator is None or processes is None or rank is None:
        raise ValueError(
            f"{' and '.join(missing)} missing: give coordinator, processes and rank together, or {COORDINATOR}, "
            f"{PROCESSES} and {RANK} in the environment"
        )
    if rank >= processes:
        raise ValueError(f"rank is {rank}, but with {processes} processes it must be from 0 to {processes - 1}")
    roll_call(coordinator, processes, rank, timeout)
    jax.distributed.initialize(
        coordinator,
        processes,
        rank,
        coordinator_bind_address=coordinator if rank == 0 else None,
        cluster_detection_method="deactivate",
        **waits,
    )
    return _joined("arguments" if explicit else "environment")


def _detected(waits: dict[str, Any]) -> Place:
    """Join the processes that JAX finds by itself; stay a single process if it finds none."""
    slurm, mpi = int(os.environ.get("SLURM_NTASKS", 1)), int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1))
    try:
        jax.distributed.initialize(**waits)
    except RuntimeError:
        # JAX runs already, which does not matter to one that is alone.
        if max(slurm, mpi) > 1 or "KUBERNETES_SERVICE_HOST" in os.environ:
            raise
        return Place(0, 1, "single")
    except ValueError as error:
        if mpi > 1:
            raise ValueError(
                f"mpirun started {mpi} processes, which this JAX ({jax.__version__}) does not recognise ({error}); "
                f"give {COORDINATOR}, {PROCESSES} and {RANK}"
            ) from None
        if slurm > 1 and "SLURM_STEP_ID" not in os.environ:
            print(f"note: this Slurm job has {slurm} tasks, but this is one process; srun starts all", file=sys.stderr)
        return Place(0, 1, "single")
    return _joined("detected")


def _joined(how: str) -> Place:
    """Arrange that any failure from here on ends this process at once: the others would wait for it."""
    place = Place(jax.process_index(), jax.process_count(), how)
    sys.excepthook = end_at_once
    # Rank 0 writes files and so takes longer. The others wait for it here; JAX's own shutdown would give up.
    atexit.register(leave_together)
    print(f"rank {place.rank} of {place.processes} joined ({place.how})", file=sys.stderr, flush=True)
    return place


def _number(name: str, variable: str, value: Any, at_least: int) -> int | None:
    what, from_environment = name, value is None
    if from_environment:
        what, value = variable, os.environ.get(variable)
    if value is None:
        return None
    try:
        number = int(value) if from_environment else checks.integer(what, value)
    except (TypeError, ValueError):
        number = at_least - 1
    if not at_least <= number < checks.LIMIT:
        raise ValueError(f"{what} must be a whole number, at least {at_least}; got {checks.shown(value)}")
    return number


def _other_number(devices: int) -> str:
    """Who else asks for another number of virtual devices; empty if nobody does."""
    flags = re.findall(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    of_jax: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    asked = {"XLA_FLAGS": int(flags[-1]) if flags else -1, "jax_num_cpu_devices": of_jax}
    return " and ".join(f"{name} for {number}" for name, number in asked.items() if number not in (devices, -1))


def _virtual(devices: int) -> None:
    if other := _other_number(devices):
        raise ValueError(
            f"start(devices=...), or {DEVICES} in the environment, asks for {devices} virtual devices, {other}: leave "
            "one out"
        )
    # XLA's pool has a thread per core, and collectives of more devices than threads may wait for each other forever
    # (jax 0.10 and 0.11 abort after 40 s). It reads this when it starts.
    os.environ["NPROC"] = str(max(16, 4 * devices, int(os.environ.get("NPROC", "0"))))
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        raise RuntimeError(
            f"start(devices=...), or {DEVICES} in the environment, must come before the first array and the first key, "
            "and JAX already runs: make them in the function that runs after start()"
        ) from None


def roll_call(coordinator: str, processes: int, rank: int, timeout: float | int) -> None:
    """Raise ConnectionError on every process unless all join within `timeout` seconds; it names the missing ranks.

    If a rank is missing or the port is taken, JAX itself ends the process without a Python error and without a name.
    Rank 0 listens at the address that JAX will use afterwards.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"the coordinator must be given as host:port, such as 10.0.0.1:7654; got {coordinator!r}")
    address, until = (host.strip("[]"), int(port)), time.monotonic() + timeout
    if rank > 0:
        _answer(address, processes, rank, until, f"{coordinator} within {timeout:g} s")
        return
    try:
        family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        server = socket.create_server(address, family=family, backlog=processes)
    except OSError as error:
        raise ConnectionError(
            f"rank 0 cannot listen on {coordinator} ({error.strerror or error}): another program may have the "
            "port, or the address is not of this machine; choose another port or address"
        ) from None
    with server:
        here: dict[int, socket.socket] = {}
        callers: list[socket.socket] = []
        wrong = ""
        while len(here) < processes - 1 and not wrong and (left := until - time.monotonic()) > 0:
            server.settimeout(left)
            with suppress(OSError, ValueError):
                caller, _ = server.accept()
                callers.append(caller)
                caller.settimeout(2)
                name, theirs, count = caller.recv(64).decode().split()
                if name != "jaxgrad":
                    continue
                if int(count) != processes or int(theirs) in here or not 0 < int(theirs) < processes:
                    wrong = f"a process called itself rank {theirs} of {count}, but there are {processes}, each once"
                here[int(theirs)] = caller
        missing = [str(other) for other in range(1, processes) if other not in here]
        if missing and not wrong:
            who = (
                f"ranks {', '.join(missing)} of {processes}"
                if len(missing) > 1
                else f"rank {missing[0]} of {processes}"
            )
            wrong = f"{who} did not join within {timeout:g} s: start all together, or raise {TIMEOUT}"
        for caller in callers:
            with suppress(OSError), caller:
                caller.sendall((wrong or "go").encode())
    if wrong:
        raise ConnectionError(wrong)


def _answer(address: tuple[str, int], processes: int, rank: int, until: float, where: str) -> None:
    """Tell rank 0 that this rank is here, and wait until it says that all are."""
    while True:
        try:
            with socket.create_connection(address, timeout=2) as line:
                line.sendall(f"jaxgrad {rank} {processes}".encode())
                line.settimeout(max(1.0, until - time.monotonic()) + 5)
                said = line.recv(1000).decode()
            if said == "go":
                return
            raise ConnectionAbortedError(said or "rank 0 hung up")
        except ConnectionAbortedError as error:
            raise ConnectionError(str(error)) from None
        except OSError as error:
            if time.monotonic() > until:
                raise ConnectionError(
                    f"rank {rank} cannot reach rank 0 at {where} ({error.strerror or error}): is it running, is the "
                    f"address right, does a firewall stand between? {TIMEOUT} is how long to wait"
                ) from None
            time.sleep(0.1)
