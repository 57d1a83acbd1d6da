"""`python -m jaxgrad.launch -n 4 script.py ...`: the same program in n processes on this machine.

For trying out what a cluster will run, and for tests: on one machine n processes share its cores, and are slower than
one process with all of them. Across machines use what starts programs there (srun, mpirun, Kubernetes): a program
that calls `jaxgrad.parallel.start()` needs no launcher of ours.

The processes talk over loopback only. Each has a log of its own; that of rank 0 is shown too. If one fails, all are
ended, and one sentence says which it was. If the launcher itself is killed (SIGKILL, out of memory), they end too.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

GRACE = 20
"""Seconds that the processes have to end after a Ctrl-C or SIGTERM, before they are killed."""

# What a process runs: it joins the others, and ends so that none waits for it. Nobody writes to the pipe: to read from
# it is to wait until the launcher, which alone holds the other end, is gone.
_CHILD = """\
import os, sys, threading
def end_with_launcher():
    try:
        os.read({alive}, 1)
        print("ended because the launcher is gone", file=sys.stderr)
    finally:
        os._exit(1)
threading.Thread(target=end_with_launcher, daemon=True).start()
sys.path[0] = {path!r}
from jaxgrad.parallel import run, start
def main():
    import runpy
    start()
    sys.argv = {argv!r}
    if {module!r}:
        runpy.run_module({module!r}, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
run(main)
"""


class Ended(NamedTuple):
    """How a launched program ended."""

    status: int
    """Of the whole: what the launcher exits with."""
    statuses: tuple[int, ...]
    """Of each rank; negative: the signal that ended it. Empty where none was started."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes, wait for them, and return the exit status of the whole."""
    return run(argv).status


def run(argv: Sequence[str] | None = None) -> Ended:
    """`main`, which also says how each process ended. All of them are gone when it returns."""
    arguments = _parse(sys.argv[1:] if argv is None else list(argv))
    if arguments.module is None and not Path(arguments.program[0]).is_file():
        print(f"error: there is no script {arguments.program[0]}; a module is given with -m", file=sys.stderr)
        return Ended(2, ())
    logs = Path(arguments.logs or tempfile.mkdtemp(prefix="jaxgrad-"))
    logs.mkdir(parents=True, exist_ok=True)
    try:
        coordinator = f"127.0.0.1:{_port(arguments.port)}"
    except OSError as error:
        print(f"error: port {arguments.port} cannot be used ({error.strerror}); leave --port out", file=sys.stderr)
        return Ended(2, ())
    _say(f"{arguments.n} processes at {coordinator}; logs in {logs}")
    asked: list[int] = []
    before = {
        number: signal.signal(number, lambda got, _: asked.append(got)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    alive, held = os.pipe()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(arguments.n):
            processes.append(_start(rank, arguments, coordinator, logs, alive))
        status = _watch(processes, logs, asked, _again(arguments))
        return Ended(status, tuple(_end(process) for process in processes))
    finally:
        for process in processes:
            _end(process)
        os.close(alive)
        os.close(held)
        for number, handler in before.items():
            signal.signal(number, handler)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxgrad.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python -m jaxgrad.launch -n 4 train.py --steps 1000
  python -m jaxgrad.launch -n 2 -m experiments gd_vs_sgd --quick
  python -m jaxgrad.launch -n 2 --devices 2 train.py        two processes with two virtual devices each

exit status: 0 done, 75 stopped when asked (a checkpoint is there: run again), 2 unusable arguments, else that of the
process that failed first (128 + the signal, where one was killed)""",
    )
    parser.add_argument("-n", type=int, required=True, metavar="N", help="how many processes")
    parser.add_argument("--devices", type=int, metavar="K", help="virtual devices in each process")
    parser.add_argument("--port", type=int, metavar="PORT", help="port of the coordinator (default: a free one)")
    parser.add_argument("--logs", metavar="DIR", help="folder for rank0.log, rank1.log, … (default: a temporary one)")
    parser.add_argument("-m", dest="module", metavar="MODULE", help="run a module, as python -m does")
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT …", help="the script and its arguments")
    at = next((i for i, word in enumerate(argv) if word == "-m"), None)
    rest: list[str] = []
    if at is not None:
        argv, rest = argv[: at + 2], argv[at + 2 :]
    arguments = parser.parse_args(argv)
    arguments.program = [*arguments.program, *rest]
    if arguments.n < 1:
        parser.error(f"-n must be at least 1, got {arguments.n}")
    if arguments.devices is not None and arguments.devices < 1:
        parser.error(f"--devices must be at least 1, got {arguments.devices}")
    if arguments.module is None and not arguments.program:
        parser.error("there is nothing to run: give a script, or -m and a module")
    return arguments


def _port(wanted: int | None) -> int:
    """A port of loopback that is free now."""
    with socket.create_server(("127.0.0.1", wanted or 0)) as server:
        return server.getsockname()[1]


def _start(
    rank: int, arguments: argparse.Namespace, coordinator: str, logs: Path, alive: int
) -> subprocess.Popen[bytes]:
    own = {
        "JAXGRAD_COORDINATOR": coordinator,
        "JAXGRAD_NUM_PROCESSES": str(arguments.n),
        "JAXGRAD_PROCESS_ID": str(rank),
        "PYTHONUNBUFFERED": "1",
    }
    if arguments.devices:
        own["JAXGRAD_DEVICES"] = str(arguments.devices)
    path = os.getcwd() if arguments.module else str(Path(arguments.program[0]).resolve().parent)
    argv = ["-m", *arguments.program] if arguments.module else arguments.program
    code = _CHILD.format(path=path, argv=argv, module=arguments.module, alive=alive)
    log = logs / f"rank{rank}.log"
    with log.open("wb") as file:
        # A session of its own: a Ctrl-C comes to the launcher, which passes it on once.
        process = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, **own}, stdin=subprocess.DEVNULL, start_new_session=True,
            stdout=subprocess.PIPE if rank == 0 else file, stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
            pass_fds=[alive],
        )  # fmt: skip
    if rank == 0:
        for pipe, screen in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert pipe is not None
            threading.Thread(target=_show, args=(pipe, log, screen.buffer), daemon=True).start()
    return process


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process that still runs; its exit status."""
    if process.poll() is None:
        process.kill()
    return process.wait()


def _show(pipe: BinaryIO, log: Path, screen: BinaryIO) -> None:
    """Copy to the log and to the screen, but for gloo's greetings, which it writes among a program's output."""
    with pipe, log.open("ab", buffering=0) as file:
        for line in pipe:
            file.write(line)
            if not line.startswith(b"[Gloo]"):
                screen.write(line)
                screen.flush()


def _watch(processes: list[subprocess.Popen[bytes]], logs: Path, asked: list[int], again: str) -> int:
    """Wait until all have ended well, or one has not: then end the others and say so."""
    passed_on, deadline = 0, float("inf")
    while True:
        statuses = [process.poll() for process in processes]
        if any(status not in (None, 0, 75) for status in statuses):
            break
        if None not in statuses:
            if 75 in statuses:
                _say(f"stopped as asked; {again}")
            time.sleep(0.1)  # for what is still on its way to the screen
            return max(statuses)  # type: ignore[type-var]
        if len(asked) > passed_on:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(asked[passed_on])
            passed_on, deadline = passed_on + 1, time.monotonic() + GRACE
        if time.monotonic() > deadline:
            _say(f"not all had ended {GRACE} s after the signal, and were killed; {again}")
            return 128 + asked[-1]
        time.sleep(0.05)
    time.sleep(0.5)  # the others fail too: one sentence for all
    frozen = [rank for rank, process in enumerate(processes) if process.poll() is None and _is_stopped(process.pid)]
    statuses = [process.poll() for process in processes]
    absent = [rank for rank, status in enumerate(statuses) if status is None and not _joined(logs, rank)]
    for process in processes:
        _end(process)
    culprit = _culprit(statuses, frozen, absent)
    status = statuses[culprit]
    if culprit in frozen:
        what = "was frozen and gave no sign of life"
    elif status is None:
        what = "did not join the others"
    elif status < 0:
        what = f"was killed by {signal.Signals(-status).name}"
    else:
        what = f"ended with status {status}"
    if asked:
        what += " after a signal"
    _say(f"rank {culprit} {what}; all others were ended: see {logs / f'rank{culprit}.log'}, and {again}")
    if status is None:
        return 1
    return 128 - status if status < 0 else status


def _culprit(statuses: list[int | None], frozen: list[int], absent: list[int]) -> int:
    """The rank at which it began: who was killed or failed by itself, else who is silent, else any that ended."""
    echoes = (0, 69, 75, -signal.SIGABRT, None)  # 69: ended because a peer was gone; abort: JAX lost a peer
    own = [rank for rank, status in enumerate(statuses) if status not in echoes]
    aborted = [rank for rank, status in enumerate(statuses) if status == -signal.SIGABRT]
    lost = [rank for rank, status in enumerate(statuses) if status == 69]
    return [*own, *frozen, *absent, *aborted, *lost, 0][0]


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


def _joined(logs: Path, rank: int) -> bool:
    return f"rank {rank} of ".encode() in (logs / f"rank{rank}.log").read_bytes()


def _again(arguments: argparse.Namespace) -> str:
    return "start it again (a run with a checkpoint goes on from there with resume)"


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
