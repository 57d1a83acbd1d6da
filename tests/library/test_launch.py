"""The launcher ends what it started, at once and with a sentence, whatever ends it or one of the ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxgrad import launch

ROOT = Path(__file__).resolve().parents[2]
QUICK = {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAXGRAD_HEARTBEAT": "80", "JAXGRAD_START_TIMEOUT": "80"}

WAITS = """
import os, pathlib, subprocess, sys, time
rank = os.environ["JAXGRAD_PROCESS_ID"]
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
pathlib.Path(f"pids{rank}.part").write_text(f"{os.getpid()} {helper.pid}")
os.rename(f"pids{rank}.part", f"pids{rank}")
if rank == "1" and "busy" in sys.argv:
    sum(range(10**12))  # in C, where no other thread of Python runs
time.sleep(300)
"""


def launched(folder, program, *arguments, processes=2):
    (folder / "program.py").write_text(program)
    return subprocess.Popen(
        [sys.executable, "-m", "jaxgrad.launch", "-n", str(processes), "--logs", "logs", "program.py", *arguments],
        cwd=folder,
        env=os.environ | QUICK | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def waiting(folder):
    """The process ids of both ranks and of what they started, once all run."""
    notes = [folder / "pids0", folder / "pids1"]
    until = time.monotonic() + 100
    while not all(note.exists() for note in notes):
        assert time.monotonic() < until
        time.sleep(0.02)
    return [int(pid) for note in notes for pid in note.read_text().split()]


def left(pids, seconds):
    """Which of them still run after so long at most."""
    until = time.monotonic() + seconds
    while (alive := [pid for pid in pids if running(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    return alive


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("how", ["busy", "frozen"])
def test_nothing_outlives_a_launcher_that_is_killed_not_even_what_cannot_listen(tmp_path, how):
    with launched(tmp_path, WAITS, how) as launcher:
        pids = waiting(tmp_path)
        if how == "frozen":
            os.kill(pids[2], signal.SIGSTOP)
        launcher.kill()
    try:
        assert left(pids, 20) == []
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_at_once_with_one_sentence(tmp_path, number):
    with launched(tmp_path, WAITS) as launcher:
        pids = waiting(tmp_path)
        began = time.monotonic()
        launcher.send_signal(number)
        said, _ = launcher.communicate(timeout=60)
        assert time.monotonic() - began < 10
    assert launcher.returncode == 128 + number
    assert said.splitlines()[-1].startswith(f"launch: all were ended by {number.name}; start it again")
    assert "Traceback" not in said
    assert left(pids, 10) == []


EARLY = """
import os, sys
import numpy as np
from jax.experimental import multihost_utils
multihost_utils.process_allgather(np.arange(10.0))
if os.environ["JAXGRAD_PROCESS_ID"] == "1":
    {leave}
while True:
    multihost_utils.process_allgather(np.arange(10.0))
"""


@pytest.mark.parametrize("leave", ["sys.exit(0)", "os._exit(0)"])
def test_a_rank_that_leaves_early_is_named_and_the_others_end_without_a_stack(tmp_path, leave):
    with launched(tmp_path, EARLY.format(leave=leave)) as launcher:
        said, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 1
    assert said.splitlines()[-1].startswith("launch: rank 1 ended its program while the others still ran; all were")
    logs = "".join(file.read_text() for file in (tmp_path / "logs").iterdir())
    assert not any(words in said + logs for words in ("Traceback", "stack trace", "SIGABRT"))


LATE = """
import os, time
if os.environ["JAXGRAD_PROCESS_ID"] == "0":
    time.sleep(8)
    print("written")
"""


def test_a_rank_that_is_late_is_waited_for(tmp_path):
    """Longer than ranks that leave together may be apart."""
    assert launch.APART < 8
    with launched(tmp_path, LATE) as launcher:
        said, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 0
    assert "written" in said


@pytest.mark.parametrize("port", ["-1", "65536", "99999999999999999999"])
def test_a_port_that_cannot_be_is_a_sentence(tmp_path, capsys, port):
    (tmp_path / "program.py").touch()
    with pytest.raises(SystemExit) as end:
        launch.main(["-n", "1", "--port", port, str(tmp_path / "program.py")])
    assert end.value.code == 2
    assert f"--port must be from 0 (any) to 65535, got {port}" in capsys.readouterr().err
