"""What happens to the others when a process fails, recorded: `python -m experiments.recorded.failures`.

One rank of a running job is killed (SIGKILL), raises an exception, is frozen (SIGSTOP), or never joins. The job is SGD
on synthetic rows in 2 processes, and in 4, with the settings that a person gets who sets none. Measured is from that
moment (of one that never joins, from the start) until all processes are gone, which must take at most 30 s, and kept
are the exit status of every rank and the sentence that is said. The launcher says it, but where one never joins: then
nobody launched that one, and the others say it themselves.

Written to `results/scaling/recorded/failures.json`. It takes three minutes.
"""

import argparse
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.engine import provenance
from experiments.recorded import tables
from experiments.support.exact import normal
from jaxgrad import launch

BAR = 30
"""Seconds within which all must be gone."""
HOW = ("killed (SIGKILL)", "raises an exception", "frozen (SIGSTOP)", "never joins")
CASES = [(how, rank, 2) for how in HOW for rank in (0, 1)] + [(how, 2, 4) for how in HOW]
PATIENCE = 120
"""Seconds after which all are ended, and the case has failed."""
STEP = 50
"""The step at which it happens."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.recorded.failures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--job", nargs=3, metavar=("HOW", "RANK", "FILE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.job:
        how, rank, file = arguments.job
        return _job(how, int(rank), Path(file))
    cases = []
    for number, (how, rank, processes) in enumerate(CASES):
        print(f"{number + 1} of {len(CASES)}: rank {rank} of {processes} {how}", file=sys.stderr, flush=True)
        cases.append(_absent(rank, processes) if how == "never joins" else _launched(how, rank, processes))
    record = {
        "command": "python -m experiments.recorded.failures",
        "bar_seconds": BAR,
        "cases": cases,
        **provenance.surroundings(),
    }
    print(tables.write("failures", record))
    slow = [case for case in cases if case["seconds_until_all_are_gone"] > BAR]
    return int(bool(slow))


def _job(how: str, rank: int, file: Path) -> int:
    """SGD, in which `rank` fails after step `STEP` and notes when."""
    import jax
    import numpy as np

    from jaxgrad import Batch, descend, distinct, losses, models, parallel

    def fail(step: int, steps: int) -> None:
        if step != STEP or parallel.start().rank != rank:
            return
        file.write_text(repr(time.time()))
        if how.startswith("raises"):
            raise RuntimeError("planted")
        os.kill(os.getpid(), signal.SIGKILL if how.startswith("killed") else signal.SIGSTOP)

    x = normal(np.random.default_rng(0), (1000, 8), bits=16, dtype=np.float32)
    descend(
        losses.mean_loss(models.linear, losses.squared),
        models.init_linear(8),
        parallel.shard(Batch(x, x.sum(axis=1)), parallel.mesh()),
        optimizer=0.01,
        sampling=distinct(16),
        steps=4 * STEP,
        key=jax.random.key(0),
        record=range(0, 4 * STEP + 1, 10),
        progress=fail,
    )
    return 0


def _launched(how: str, rank: int, processes: int) -> dict[str, Any]:
    """A job under the launcher, called in this process, which so learns of every rank's exit status."""
    screen = io.TextIOWrapper(io.BytesIO(), write_through=True)
    with tempfile.TemporaryDirectory(prefix="failures-") as folder, _environment(JAX_ENABLE_COMPILATION_CACHE="false"):
        moment = Path(folder) / "moment"
        overdue = threading.Timer(PATIENCE, os.kill, [os.getpid(), signal.SIGTERM])
        overdue.start()
        try:
            with contextlib.redirect_stderr(screen), contextlib.redirect_stdout(screen):
                job = ["-m", "experiments.recorded.failures", "--job", how, str(rank), str(moment)]
                ended = launch.run(["-n", str(processes), "--logs", f"{folder}/logs", *job])
        finally:
            overdue.cancel()
        if not moment.exists():
            raise RuntimeError(f"rank {rank} of {processes} never came to step {STEP}:\n{_text(screen)}")
        seconds = time.time() - float(moment.read_text())
    said = [line for line in _text(screen).splitlines() if line.startswith("launch: rank")]
    found = _found(how, rank, seconds, ended.statuses, "; ".join(said).removeprefix("launch: "))
    return found | {"status": ended.status}


def _absent(rank: int, processes: int) -> dict[str, Any]:
    """A job of which one rank was never started, by hand as a scheduler does."""
    own = {"JAXGRAD_COORDINATOR": f"127.0.0.1:{launch._port(None)}", "JAXGRAD_NUM_PROCESSES": str(processes)}
    program = "from jaxgrad import parallel; parallel.run(parallel.start)"
    began = time.time()
    started: list[Any] = [
        None
        if other == rank
        else subprocess.Popen(
            [sys.executable, "-c", program],
            env={**os.environ, **own, "JAXGRAD_PROCESS_ID": str(other)},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for other in range(processes)
    ]
    overdue = threading.Timer(PATIENCE, _kill, [[process for process in started if process]])
    overdue.start()
    words = [process.communicate()[1] for process in started if process]
    seconds = time.time() - began
    overdue.cancel()
    said = [text.strip().splitlines()[-1].partition(": ")[2].removeprefix("ConnectionError: ") for text in words]
    statuses = [process and process.returncode for process in started]
    return _found("never joins", rank, seconds, statuses, " / ".join(dict.fromkeys(said)))


def _found(how: str, rank: int, seconds: float, statuses: Sequence[int | None], said: str) -> dict[str, Any]:
    # Neither a temporary folder nor a port that was free: they say nothing, and change.
    said = re.sub(r"/\S*/(rank\d+\.log)", r"\1", re.sub(r"127\.0\.0\.1:\d+", "127.0.0.1:port", said))
    return {
        "what": how,
        "rank": rank,
        "processes": len(statuses),
        "seconds_until_all_are_gone": seconds,
        "statuses": list(statuses),
        "said": said,
    }


def _kill(processes: list[subprocess.Popen[Any]]) -> None:
    for process in processes:
        process.kill()


def _text(screen: io.TextIOWrapper) -> str:
    buffer = screen.buffer
    assert isinstance(buffer, io.BytesIO)
    return buffer.getvalue().decode(errors="replace")


@contextlib.contextmanager
def _environment(**variables: str) -> Any:
    """Variables for the processes to come. (Nobody shall be killed while writing to a cache that others read.)"""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.exit(main())
