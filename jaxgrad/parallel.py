"""The same step on many devices and many hosts: rows are sharded, parameters replicated, and the step does not change.

    parallel.start()                            # under srun, mpirun, `python -m jaxgrad.launch`; alone: does nothing
    data = parallel.shard(batch, parallel.mesh())
    descend(loss, params, data, ...)            # what was written for one core

The engine is JAX's own: `jax.distributed` between processes, a `NamedSharding` of the rows, and the compiler, which
puts one all-reduce of the gradient into the step. Nothing else is exchanged, but for the rows of a batch:

    global       the indices of one machine: `distinct(b)` and the rest see the same examples, in the same order,
                 whatever holds them. The same law and the same numbers; the batch's b rows travel.
    stratified   `stratified(b, counts)`: each device draws from its own rows, and nothing travels but the gradient.
                 Another law: the mean is the same, and of the variance only what is left *within* the shares
                 (`jaxgrad.noise.stratified_trace`).

Rows that do not divide by the devices are filled up with copies of a row, of weight 0. Every device gets ⌊n/D⌋ or
⌈n/D⌉ rows of its own.

A step whose processes disagree about anything hangs. So they compare what they were given before the first step
(`agree`), decide together when to stop (`Interruption`), and one that fails ends at once without waiting for the
others (`run`), which then end too.
"""

import atexit
import hashlib
import os
import signal
import socket
import stat
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxgrad import checks, means
from jaxgrad.checks import Count, Counts, checked
from jaxgrad.sampling import distinct
from jaxgrad.types import Key, Loss, Params, Sampling

AGAIN = 75
"""Exit status of a run that was asked to stop and left a checkpoint: run me again (`EX_TEMPFAIL`)."""
PEER_LOST = 69
"""Exit status of a process that ends because another one did (`EX_UNAVAILABLE`)."""

COORDINATOR, PROCESSES, RANK, DEVICES, TIMEOUT, HEARTBEAT = (
    f"JAXGRAD_{name}"
    for name in ("COORDINATOR", "NUM_PROCESSES", "PROCESS_ID", "DEVICES", "START_TIMEOUT", "HEARTBEAT")
)


# --- set-up ----------------------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where this process stands."""

    rank: int
    processes: int
    how: str
    """Who said so: `arguments`, `environment`, `detected` or `single`."""


def start(
    coordinator: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    *,
    devices: int | None = None,
    timeout: int | None = None,
) -> Place:
    """Join the other processes, if there are any. Call it once, before the first array.

    What is not given is taken from the environment (`JAXGRAD_COORDINATOR=host:port`, `JAXGRAD_NUM_PROCESSES`,
    `JAXGRAD_PROCESS_ID`), else from what JAX finds of Slurm, Open MPI or Kubernetes; else this is a single process.

    Args:
      devices: so many virtual devices on this CPU (`JAXGRAD_DEVICES`). They share its cores: for tests and lessons.
      timeout: seconds to wait for the others (`JAXGRAD_START_TIMEOUT`; 20).

    Once they run, a process that gives no sign of life for 20 s (`JAXGRAD_HEARTBEAT`) is given up, and all end.

    Raises ValueError for numbers that cannot be, ConnectionError where the coordinator cannot be reached or its port
    is in use, RuntimeError where JAX already runs.

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
    _roll_call(coordinator, processes, rank, timeout)
    jax.distributed.initialize(
        coordinator, processes, rank, coordinator_bind_address=coordinator if rank == 0 else None,
        cluster_detection_method="deactivate", **waits,
    )  # fmt: skip
    return _joined("arguments" if explicit else "environment")


def _detected(waits: dict[str, Any]) -> Place:
    """What JAX finds by itself; a single process where it finds nothing."""
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
    """Every failure from here on must end this process at once, since the others wait for it."""
    place = Place(jax.process_index(), jax.process_count(), how)
    sys.excepthook = _die
    # The one that writes takes longer than the others, which wait here and not in JAX's shutdown, which gives up.
    atexit.register(_part)
    print(f"rank {place.rank} of {place.processes} joined ({place.how})", file=sys.stderr, flush=True)
    return place


def _number(name: str, variable: str, value: Any, at_least: int) -> int | None:
    what, told = name, value is None
    if told:
        what, value = variable, os.environ.get(variable)
    if value is None:
        return None
    try:
        number = int(value) if told else checks.integer(what, value)
    except (TypeError, ValueError):
        number = at_least - 1
    if not at_least <= number < checks.LIMIT:
        raise ValueError(f"{what} must be a whole number, at least {at_least}; got {checks.shown(value)}")
    return number


def _virtual(devices: int) -> None:
    # XLA's pool has a thread per core, and collectives of more devices than threads may wait for each other forever
    # (jax 0.10 and 0.11 abort after 40 s). It reads this when it starts.
    os.environ["NPROC"] = str(max(16, 4 * devices, int(os.environ.get("NPROC", "0"))))
    try:
        jax.config.update("jax_num_cpu_devices", devices)
    except RuntimeError:
        raise RuntimeError("start(devices=...) must come before the first array: JAX already runs") from None


def _roll_call(coordinator: str, processes: int, rank: int, timeout: float | int) -> None:
    """Raise ConnectionError, on every process, unless all are there within `timeout` seconds: it says who is not.

    Where one is missing or the port is taken, JAX itself ends the process without a Python error, and without a name.
    Rank 0 listens where JAX will afterwards.
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
    """Tell rank 0 that this one is here, and hear that all are."""
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


def is_main() -> bool:
    """Whether this process is the one that writes results and talks (rank 0)."""
    return jax.process_index() == 0


# --- the end ---------------------------------------------------------------------------------------------------


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
            _die(type(error), error, error.__traceback__)
        raise
    if isinstance(status, str):
        print(status, file=sys.stderr)
    status = status if isinstance(status, int) else int(status is not None)
    if not jax.distributed.is_initialized():
        sys.exit(status)
    if status in (0, AGAIN):
        _part()
    _exit(status)


def _part() -> None:
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
        _die(type(error), error, error.__traceback__)


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


def _die(kind: type[BaseException], error: BaseException, trace: Any) -> None:
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


class Preempted(SystemExit):
    """A run was asked to stop, did so at the same step on every process, and left a checkpoint: status 75."""

    def __init__(self, step: int, path: Any):
        super().__init__(AGAIN)
        self.step = step
        if is_main():
            print(f"stopped at step {step:,} as asked; {path} holds it: run the same with resume", file=sys.stderr)


class Interruption:
    """Whether SIGTERM or Ctrl-C came, to any process: `with Interruption() as asked: ... if asked(): stop`.

    `asked()` is called by all processes at the same place, and gives all the same answer. A second signal of the same
    kind does what it always does. Only the main thread gets signals; what runs in others hears of them where the main
    thread is in such a block too.
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
        """What the signal did before the outermost of such blocks."""
        if self._outer is not None:
            return self._outer._usual(number)
        before = self._before.get(number)
        if callable(before):
            return before
        return signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler

    def __call__(self) -> bool:
        return bool(_from_all(np.array([self._heard()])).any())

    def _heard(self) -> bool:
        return self._came or (self._outer is not None and self._outer._heard())

    def __exit__(self, *_: Any) -> None:
        if Interruption._around is self:
            Interruption._around = self._outer
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


# --- agreement -------------------------------------------------------------------------------------------------


class Elsewhere(RuntimeError):
    """Another process could not go on; the message names its rank and what it said."""


def _from_all(values: np.ndarray) -> np.ndarray:
    """A small array of every process, `[processes, ...]`; every process must call it."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values, tiled=False))


@checked
def together(work: Callable[[], Any]) -> Any:
    """What `work()` returns, or an error on **all** processes if it fails on one: none is left to wait.

    The process where it failed raises its own error, the others `Elsewhere`, with the rank and the words of it.
    """
    if jax.process_count() == 1:
        return work()
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    words = f"{type(failure).__name__}: {failure}".encode()[:500] if failure else b""
    said = _from_all(np.frombuffer(words.ljust(500, b"\0"), np.uint8))
    if failure is not None:
        raise failure
    for rank, message in enumerate(said):
        if message.any():
            text = bytes(message).rstrip(b"\0").decode(errors="replace")
            raise Elsewhere(f"rank {rank} could not go on: {text}")
    return result


def of_main(number: float) -> float:
    """The number that rank 0 gives, on every process; all of them call it."""
    return float(_from_all(np.array([number]))[0, 0])


@checked
def from_main(read: Callable[[], bytes]) -> bytes:
    """What `read()` returns on rank 0, on every process."""
    if jax.process_count() == 1:
        return read()
    from jax.experimental import multihost_utils

    own = together(lambda: read() if is_main() else b"")
    size = int(_from_all(np.array([len(own)], np.int32))[0, 0])
    if size == 0:
        return b""
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(own.ljust(size, b"\0"), np.uint8))))


def agree(**things: Any) -> None:
    """Raise ValueError, naming the rank and the thing, unless all processes were given the same.

    Each thing is a pytree of arrays, or anything whose `repr` tells it. Every process must call it.
    """
    if jax.process_count() == 1:
        return
    own = np.stack([np.frombuffer(bytes.fromhex(digest(thing)), np.uint8) for thing in things.values()])
    everybody = _from_all(own)
    for rank, theirs in enumerate(everybody):
        for name, here, first in zip(things, theirs, everybody[0], strict=True):
            if (here != first).any():
                raise ValueError(
                    f"rank {rank} was given other {name} than rank 0; all processes must be started with the same "
                    "arguments, code and data"
                )


def digest(thing: Any) -> str:
    """sha256 of a pytree: its structure, and shapes, dtypes and bytes of its arrays (`repr` of what is none)."""
    leaves, structure = jax.tree.flatten(thing)
    told = hashlib.sha256(str(structure).encode())
    for leaf in leaves:
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if hasattr(leaf, "__array__"):
            array = np.ascontiguousarray(leaf)
            told.update(f"{array.dtype.str}{array.shape}".encode())
            told.update(array.reshape(-1).view(np.uint8).data)
        else:
            told.update(repr(leaf).encode())
    return told.hexdigest()


# --- the mesh and what lies on it ------------------------------------------------------------------------------


class Sharded(NamedTuple):
    """Rows that lie on the devices of a mesh, made by `shard` or `shard_local`; `descend` takes it for data."""

    batch: Any
    """The batch's pytree; each leaf `[D m, ...]`: m rows on each of D devices, filled up where a device has fewer."""
    weight: Any
    """float32[D m]: 1, and 0 where a row only fills up; None where no row does."""
    counts: tuple[int, ...]
    """Rows of each device, in the order of the mesh, without what fills up."""
    mesh: Mesh

    @property
    def n(self) -> int:
        """How many rows there are."""
        return sum(self.counts)

    def row(self, place: int) -> int:
        """The number of the row at a place along the leaves of `batch`, among all rows in their order."""
        device, own = divmod(place, max(self.counts))
        return sum(self.counts[:device]) + min(own, self.counts[device] - 1)


class Weighted(NamedTuple):
    """Rows with weights: what `Weighting` makes a mean of."""

    batch: Any
    weight: Any


def mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """All devices of all processes (or those given) as one axis `data`, in the order of their processes.

    The compiler places the collectives (`AxisType.Auto`): under JAX's newer default, `Explicit`, `x[indices]` fails.
    """
    found = jax.devices() if devices is None else devices
    plain = isinstance(found, list | tuple) or (isinstance(found, np.ndarray) and found.ndim == 1)
    if not plain or not len(found) or not all(isinstance(each, jax.Device) for each in found):
        raise TypeError(f"devices must be a list of devices, such as jax.devices()[:2]; got {checks.shown(devices)}")
    return Mesh(np.array(found), ("data",), axis_types=(AxisType.Auto,))


def shard(batch: Any, mesh: Mesh) -> Sharded:
    """Spread the rows of a batch over the mesh; every process gives the same batch, and holds only its own part.

    The leaves are host arrays; of a `np.memmap` only the rows of this process are read. Every device gets ⌊n/D⌋ or
    ⌈n/D⌉ rows, in order. Raises ValueError for fewer rows than devices, NaN or infinite entries, an Explicit mesh, or
    (naming the rank) for another batch than rank 0's.
    """
    check_mesh(mesh)
    batch = checks.batch("batch", batch, finite=False)
    n, D = jax.tree.leaves(batch)[0].shape[0], mesh.devices.size
    if n < D:
        raise ValueError(f"{n} rows cannot be spread over {D} devices: each needs one; use fewer processes or devices")
    counts = tuple(n // D + (d < n % D) for d in range(D))

    def look() -> None:
        for low, high in _mine(counts, mesh):
            try:
                checks.batch("batch", jax.tree.map(lambda leaf, part=slice(low, high): leaf[part], batch))
            except ValueError as error:
                raise ValueError(f"in rows {low:,} to {high - 1:,}, numbered from the first of them: {error}") from None

    together(look)
    agree(data=jax.tree.map(_telling, batch))
    return _laid(batch, 0, counts, mesh)


def shard_local(rows: Any, mesh: Mesh) -> Sharded:
    """Like `shard`, but each process gives rows of its own, as many as it has: the whole is never in one place.

    The order of all rows is that of the processes. Raises ValueError (naming the rank) where a process has fewer rows
    than devices, or columns or dtypes other than rank 0's.
    """
    check_mesh(mesh)
    here = [device.process_index for device in mesh.devices.flat]
    if here != sorted(here):
        raise ValueError("the mesh must list its devices in the order of their processes: use parallel.mesh()")

    def look() -> int:
        nonlocal rows
        rows = checks.batch("rows", rows)
        n = jax.tree.leaves(rows)[0].shape[0]
        if n < here.count(jax.process_index()):
            raise ValueError(f"rank {jax.process_index()} has {n} rows for more devices: each device needs one")
        return n

    n = together(look)
    agree(**{"columns or dtypes": jax.tree.map(lambda leaf: f"{leaf.shape[1:]} {leaf.dtype}", rows)})
    of_process = _from_all(np.array([n]))[:, 0].tolist()
    counts: list[int] = []
    for process, n in enumerate(of_process):
        k = here.count(process)
        counts += [n // k + (d < n % k) for d in range(k)]
    return _laid(rows, sum(of_process[: jax.process_index()]), tuple(counts), mesh)


def _laid(rows: Any, first: int, counts: tuple[int, ...], mesh: Mesh) -> Sharded:
    """Rows on their devices; `rows` holds, from row `first` of all on, at least those of this process."""
    starts, most = np.concatenate([[0], np.cumsum(counts)]), max(counts)
    sharding = _rows_of(mesh)

    def lay(leaf: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            d = (index[0].start or 0) // most
            own = np.asarray(leaf[starts[d] - first : starts[d] - first + counts[d]])
            # Copies of a row, since what the loss makes of zeros might not be finite.
            return np.concatenate([own, np.repeat(own[-1:], most - counts[d], axis=0)]) if counts[d] < most else own

        dtype = jax.dtypes.canonicalize_dtype(leaf.dtype)
        shape = (most * len(counts), *leaf.shape[1:])
        return jax.make_array_from_callback(shape, sharding, lambda index: part(index).astype(dtype, copy=False))

    weight = None
    if most * len(counts) > starts[-1]:
        real = np.arange(most)[None, :] < np.array(counts)[:, None]
        weight = jax.make_array_from_callback(
            (real.size,), sharding, lambda index: real.reshape(-1)[index].astype(np.float32)
        )
    return Sharded(jax.tree.map(lay, rows), weight, counts, mesh)


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The same on every device: host arrays, or arrays of this process, equal on all processes (`agree` tells)."""
    check_mesh(mesh)
    sharding = NamedSharding(mesh, PartitionSpec())

    def copy(leaf: Any) -> jax.Array:
        if isinstance(leaf, jax.Array) and leaf.sharding == sharding:
            return leaf
        if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(copy(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
        values = np.asarray(leaf, jax.dtypes.canonicalize_dtype(np.asarray(leaf).dtype))
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(copy, tree)


def gather(tree: Any) -> Any:
    """Numpy arrays of the whole, on every process: of a `Sharded`, its batch in the order of the rows."""
    if isinstance(tree, Sharded):
        most = max(tree.counts)
        kept = np.concatenate([d * most + np.arange(count) for d, count in enumerate(tree.counts)])
        return jax.tree.map(lambda leaf: gather(leaf)[kept], tree.batch)
    from jax.experimental import multihost_utils

    def whole(leaf: Any) -> np.ndarray:
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable and not leaf.is_fully_replicated:
            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return np.asarray(leaf)

    return jax.tree.map(whole, tree)


def mesh_of(data: Any) -> Mesh | None:
    """The mesh over which arrays are spread that lie on several devices; None for all others."""
    for leaf in jax.tree.leaves(data):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1 and isinstance(sharding.mesh, Mesh):
            check_mesh(sharding.mesh)
            return sharding.mesh
    return None


def check_mesh(mesh: Any) -> None:
    """Raise TypeError or ValueError unless `mesh` is one over which rows can be spread."""
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, such as parallel.mesh(); got {checks.shown(mesh)}")
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            "the axes of the mesh must be Auto, since rows are fetched by index: use parallel.mesh(), or "
            "jax.make_mesh(..., axis_types=(AxisType.Auto,))"
        )


def _rows_of(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(mesh.axis_names))


def _mine(counts: Sequence[int], mesh: Mesh) -> list[tuple[int, int]]:
    """First and last of the rows on each device of this process."""
    starts = np.concatenate([[0], np.cumsum(counts)])
    here = (d for d, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index())
    return [(int(starts[d]), int(starts[d + 1])) for d in here]


def _telling(leaf: Any) -> Any:
    """What tells an array from another: all of it; of a file that is mapped, shape and evenly spaced rows."""
    if not isinstance(leaf, np.memmap):
        return leaf
    rows = np.unique(np.linspace(0, len(leaf) - 1, 4096).astype(np.int64))
    return (f"{leaf.shape} {leaf.dtype}", np.asarray(leaf[rows]))


# --- what the step is given ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weighting:
    """The loss of weighted rows, `Σ weightᵢ ℓ(w, example i) / Σ weightᵢ`, for a mean over n examples of losses ℓ.

    Called, and so before anything is compiled, it raises ValueError for a loss that is not known to be one.
    """

    loss: Loss
    n: int

    def __call__(self, params: Params, rows: Weighted) -> jax.Array:
        why = (
            f"{self.n:,} rows do not divide evenly over the devices, or are drawn from shares of different sizes: some "
            "are weighted, which is done example by example"
        )
        sizes = [self.n, rows.weight.shape[0]]
        of_one = means.of_one(self.loss, params, rows.batch, sizes, why)
        each = jax.vmap(partial(of_one, params))(rows.batch)
        weight = rows.weight.astype(each.dtype)
        return jnp.sum(weight * each) / jnp.sum(weight)


class _Placed(NamedTuple):
    """The indices of one machine, of one step or of many, as places among rows that are filled up device by device."""

    draw: Callable[..., jax.Array]
    counts: tuple[int, ...]

    def __call__(self, *which: Any) -> jax.Array:
        counts = np.array(self.counts)
        ends = np.cumsum(counts)
        # Row i is on the device d with ends[d-1] <= i < ends[d], so far behind where it would be without filling.
        behind = (np.arange(len(counts)) * counts.max() - (ends - counts)).astype(np.int32)
        *key_and_step, _, b = which  # n would count what fills up
        indices = self.draw(*key_and_step, int(ends[-1]), b)
        device = jnp.searchsorted(jnp.asarray(ends[:-1], jnp.int32), indices, side="right")
        return indices + jnp.asarray(behind)[device]


def on(sharded: Sharded, loss: Loss, sampling: Sampling) -> tuple[Loss, Any, Sampling]:
    """`(loss, data, sampling)` for the step: the same loss and the same law over rows that lie on many devices."""
    if sampling.name == STRATIFIED and sampling.draw.counts != sharded.counts:  # type: ignore[attr-defined]
        raise ValueError(
            f"the sampling draws from shares of {sampling.draw.counts} rows, but the devices hold "  # type: ignore[attr-defined]
            f"{sharded.counts}: use stratified(b, data.counts)"
        )
    if sharded.weight is None:
        return loss, sharded.batch, sampling
    if sampling.batch_size is not None and sampling.name != STRATIFIED:
        many = sampling.draw_many and _Placed(sampling.draw_many, sharded.counts)
        sampling = sampling._replace(draw=_Placed(sampling.draw, sharded.counts), draw_many=many)
    return Weighting(loss, sharded.n), Weighted(sharded.batch, sharded.weight), sampling


STRATIFIED = "stratified"


@checked
def stratified(b: Count, counts: Counts) -> Sampling:
    """`b/D` different examples from each of D shares of `counts[d]` examples: each device from its own rows.

    `counts` is `Sharded.counts`; for n rows in one array, equal shares that follow each other. The gradient is
    `Σ_d (n_d/n) g_{B_d}`: unbiased, also where shares differ in size, and its covariance is

        Cov[g_B] = Σ_d (n_d/n)² (n_d − b_d)/(b_d (n_d − 1)) Σ_d,        b_d = b/D

    with Σ_d the covariance of the example gradients *within* share d (Cochran 1977, theorem 5.3): what differs
    between shares adds nothing, so it is below that of `distinct(b)` unless the shares are all alike.

    Raises ValueError unless D divides b and no share has fewer than b/D examples.
    """
    counts = tuple(counts)
    if b % len(counts):
        raise ValueError(f"the batch size must be a multiple of the {len(counts)} shares, got b = {b!r}")
    if min(counts) < b // len(counts):
        raise ValueError(
            f"cannot draw {b // len(counts)} different examples from a share of {min(counts)}: "
            f"use b <= {min(counts) * len(counts)}"
        )
    return Sampling(STRATIFIED, b, _FromShares(counts), take=_TakeShares(counts))


class _FromShares(NamedTuple):
    """Places of `b/D` different rows of each share, share by share: `int32[b]`."""

    counts: tuple[int, ...]

    def __call__(self, key: Key, step: Any, n: int, b: int) -> jax.Array:
        del n
        counts = np.array(self.counts)
        D, most = len(counts), int(counts.max())
        # To the generator a step of D shares is D steps, so that no two draw from the same random bits.
        number = jnp.asarray(step, jnp.int32) * jnp.int32(D) + jnp.arange(D, dtype=jnp.int32)
        out = jnp.zeros((D, b // D), jnp.int32)
        for size in np.unique(counts):  # two at most, but for rows that were spread by hand
            # Drawn for all shares and chosen by a mask: fetching some would make the devices talk.
            own = jax.vmap(lambda i, size=int(size): distinct(b // D).indices(key, i, size))(number)
            out = jnp.where(jnp.asarray(counts == size)[:, None], own, out)
        out = out + jnp.arange(D, dtype=jnp.int32)[:, None] * jnp.int32(most)
        return out.reshape(-1)


class _TakeShares(NamedTuple):
    """Rows by their places, each device from its own: nothing travels."""

    counts: tuple[int, ...]

    def __call__(self, data: Any, indices: jax.Array) -> Any:
        D, most = len(self.counts), max(self.counts)
        own = indices.reshape(D, -1) - jnp.arange(D, dtype=jnp.int32)[:, None] * jnp.int32(most)

        def take(leaf: jax.Array) -> jax.Array:
            rows = leaf.reshape(D, most, *leaf.shape[1:])
            return jax.vmap(lambda share, i: share.at[i].get(mode="promise_in_bounds"))(rows, own).reshape(
                -1, *leaf.shape[1:]
            )

        if not isinstance(data, Weighted):
            return jax.tree.map(take, data)
        share = jnp.asarray(np.array(self.counts) / np.mean(self.counts), data.weight.dtype)
        weight = jnp.broadcast_to(share[:, None], own.shape).reshape(-1)
        return Weighted(jax.tree.map(take, data.batch), weight)
