"""`python -m jaxgrad.launch -n 4 script.py ...`: the same program in n processes on this machine.

For trying out what a cluster will run, and for tests: on one machine n processes share its cores, and are slower than
one process with all of them. Across machines use what starts programs there (srun, mpirun, Kubernetes): a program
that calls `jaxgrad.parallel.start()` needs no launcher of ours.

The processes talk over loopback only. Each has a log of its own; that of rank 0 is shown too. If one fails, or leaves
before the others are done, all are ended, and one sentence says which it was. If the launcher itself is killed
(SIGKILL, out of memory), they end too, with all that they started.

A signal to the launcher (Ctrl-C, SIGTERM) is passed on at once. It ends a rank at once, unless that is in a descent
with a checkpoint, which saves itself first and has 20 s for it; a second signal leaves 2 s.
"""

from jaxgrad import commandline

if __name__ == "__main__":
    commandline.prepare()

import argparse
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from jaxgrad import files

GRACE = 20
"""Seconds that the processes have to end after a Ctrl-C or SIGTERM, before they are killed."""
LAST_GRACE = 2
"""The same after a second signal."""
AGAIN = "start it again (a run with a checkpoint goes on from there with resume)"
EARLY = "had ended its program"
"""What a rank says of another that left before it (`parallel.EARLY`)."""
APART = 5
"""Seconds within which all leave, once one has left without an error: they wait for each other before."""

# Kills what is left of the ranks, stopped or busy in C, with all that they started, if the launcher ends without
# saying so. It reads their process ids; the end of the pipe is the launcher's own end.
_GUARD = """\
import os, signal, sys, time
words = sys.stdin.read().split()
if "done" not in words:
    time.sleep(0.5)
    for pid in map(int, words):
        try:
            os.killpg(pid, signal.SIGKILL)
        except OSError:
            pass
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
    guard = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", _GUARD],
        stdin=subprocess.PIPE,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for rank in range(arguments.n):
            processes.append(_start(rank, arguments, coordinator, logs, alive))
            _tell(guard, processes[-1].pid)
        status = _watch(processes, logs, asked)
        if status:
            for process in processes:
                _kill(process)
        return Ended(status, tuple(_end(process) for process in processes))
    finally:
        for process in processes:
            _end(process)
        os.close(alive)
        os.close(held)
        _tell(guard, "done")
        assert guard.stdin is not None
        guard.stdin.close()
        guard.wait()
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

exit status: 0 done, 75 stopped when asked (a checkpoint is there: run again), 2 unusable arguments, files or folders,
130 or 143 ended by Ctrl-C or SIGTERM, else that of the process that failed first (128 + the signal, where one was
killed; 1 where one left before the others)""",
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
    if arguments.port is not None and not 0 <= arguments.port < 2**16:
        parser.error(f"--port must be from 0 (any) to 65535, got {arguments.port}")
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
    path = os.getcwd() if arguments.module else os.path.dirname(os.path.realpath(arguments.program[0]))
    argv = ["-m", *arguments.program] if arguments.module else arguments.program
    call = f"rank({alive}, {path!r}, {argv!r}, {arguments.module!r})"
    code = f"from jaxgrad import commandline; commandline.prepare(quiet=True); from jaxgrad.launch import rank; {call}"
    log = logs / f"rank{rank}.log"
    with log.open("wb") as file:
        # A session of its own: a Ctrl-C comes to the launcher, which passes it on once.
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            env={**os.environ, **own},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            stdout=subprocess.PIPE if rank == 0 else file,
            stderr=subprocess.PIPE if rank == 0 else subprocess.STDOUT,
            pass_fds=[alive],
        )
    if rank == 0:
        for pipe, screen in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            assert pipe is not None
            threading.Thread(target=_show, args=(pipe, log, screen.buffer), daemon=True).start()
    return process


def _tell(guard: subprocess.Popen[bytes], word: Any) -> None:
    with suppress(OSError):  # it may have been killed, too
        assert guard.stdin is not None
        guard.stdin.write(f"{word}\n".encode())
        guard.stdin.flush()


def rank(alive: int, path: str, argv: list[str], module: str | None) -> None:
    """What a launched process does: it joins the others, runs the program, and ends so that none waits for it.

    Nobody writes to the pipe `alive`: to read from it is to wait until the launcher, which alone holds the other end,
    is gone.
    """

    def end_with_launcher() -> None:
        try:
            os.read(alive, 1)
            print("ended because the launcher is gone", file=sys.stderr)
        finally:
            sys.stderr.flush()
            os._exit(1)

    threading.Thread(target=end_with_launcher, daemon=True).start()
    sys.path[0] = path
    from jaxgrad import parallel

    def main() -> None:
        import runpy

        parallel.start()
        # JAX has a service for SIGTERM, which would otherwise end nothing; Ctrl-C does what it does in any program.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = argv
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(argv[0], run_name="__main__")

    parallel.run(main)


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process that still runs, and all that it started; its exit status."""
    if process.poll() is None:
        _kill(process)
    return process.wait()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill all of a process's session that is left; nothing is an error."""
    with suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _show(pipe: BinaryIO, log: Path, screen: BinaryIO) -> None:
    """Copy to the log and to the screen, but for gloo's greetings, which it writes among a program's output."""
    with pipe, log.open("ab", buffering=0) as file:
        whole = True
        for line in pipe:
            try:
                if whole:
                    file.write(line)
            except OSError as error:
                whole = False
                _say(f"the log {log} ends here: {files.reason(error)}")
            if not line.startswith(b"[Gloo]"):
                screen.write(line)
                screen.flush()


def _watch(processes: list[subprocess.Popen[bytes]], logs: Path, asked: list[int]) -> int:
    """Wait until all have ended well, or one has not: then end the others and say so."""
    passed_on, deadline, apart = 0, float("inf"), float("inf")
    while True:
        statuses = [process.poll() for process in processes]
        if any(status not in (None, 0, 75) for status in statuses):
            break
        if None not in statuses:
            if 75 in statuses:
                _say(f"stopped as asked; {AGAIN}")
            time.sleep(0.1)  # for what is still on its way to the screen
            return max(statuses)  # type: ignore[type-var]
        if statuses.count(None) < len(statuses):
            apart = min(apart, time.monotonic() + APART)
        if len(asked) > passed_on:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(asked[passed_on])
            passed_on += 1
            deadline = time.monotonic() + (GRACE if passed_on == 1 else LAST_GRACE)
        if time.monotonic() > deadline:
            seconds = GRACE if passed_on == 1 else LAST_GRACE
            _say(f"not all had ended {seconds} s after the signal, and were killed; {AGAIN}")
            return 128 + asked[-1]
        if time.monotonic() > apart:
            break
        time.sleep(0.05)
    if not asked and time.monotonic() < apart:
        time.sleep(0.5)  # the others fail too: one sentence for all
    frozen = [rank for rank, process in enumerate(processes) if process.poll() is None and _is_stopped(process.pid)]
    statuses = [process.poll() for process in processes]
    absent = [rank for rank, status in enumerate(statuses) if status is None and not _joined(logs, rank)]
    for process in processes:
        _end(process)
    if asked and all(status in (None, 0, 69, 75, 128 + asked[0], -asked[0], -signal.SIGABRT) for status in statuses):
        _say(f"all were ended by {signal.Signals(asked[0]).name}; {AGAIN}")
        return 128 + asked[0]
    early = _early(statuses, logs)
    if early is not None:
        _say(f"rank {early} ended its program while the others still ran; all were ended: see {logs}, and {AGAIN}")
        return 1
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
    _say(f"rank {culprit} {what}; all others were ended: see {logs / f'rank{culprit}.log'}, and {AGAIN}")
    if status is None:
        return 1
    return 128 - status if status < 0 else status


def _early(statuses: list[int | None], logs: Path) -> int | None:
    """The rank that left without an error before the others were done, where nothing worse happened to any."""
    if any(status not in (None, 0, 69, -signal.SIGABRT) for status in statuses):
        return None
    if 0 in statuses:
        return statuses.index(0)
    said = "".join((logs / f"rank{k}.log").read_text("utf-8", "replace") for k, end in enumerate(statuses) if end == 69)
    found = re.search(rf"rank (\d+) {EARLY}", said)
    return int(found[1]) if found else None


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


def _say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    commandline.leave(commandline.outcome(main))
