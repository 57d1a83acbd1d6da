"""Ctrl-C and SIGTERM end a command line with one line and status 130 or 143, whenever and however often they come."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEEDING = (
    "import os, signal as s, sys; s.signal(s.SIGINT, s.SIG_DFL); "
    "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
)


def ended(command, when, signals, cwd=ROOT, gap=0.01):
    """The status and stderr of a command line that got the signals, `gap` seconds apart, once `when()`."""
    # A shell starts what it puts in the background with SIGINT ignored, and so would be all of this.
    process = subprocess.Popen(
        [sys.executable, "-c", HEEDING, "-m", *map(str, command)],
        cwd=cwd,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not when() and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.002)
    for number in signals:
        # To the whole group, as a terminal does.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        time.sleep(gap)
    with process:
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()
    return process.returncode, said


def after(seconds):
    until = time.monotonic() + seconds
    return lambda: time.monotonic() > until


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.fixture
def results(tmp_path):
    for name in ("losses", "formulas", "stopping"):
        shutil.copytree(ROOT / "results" / "quick" / name, tmp_path / name)
    return tmp_path


ENDS = {INT: (130, "interrupted\n"), TERM: (143, "terminated\n")}


@pytest.mark.parametrize("delay", [0.15, 0.6, 1.5])
@pytest.mark.parametrize("signals", [(INT,), (TERM,), (TERM, INT)])
def test_a_report_that_is_interrupted_says_so_in_one_line(results, delay, signals):
    found, said = ended(["experiments", "report", "--out", results], after(delay), signals)
    if found == 0:  # it was done before
        return
    # Of two that come at once, Python hands over the one with the smaller number first.
    assert (found, said) in [ENDS[each] for each in signals]
    assert not list(results.rglob("*.tmp"))


ENDLESS = """
import time, pathlib
pathlib.Path(__file__).with_suffix(".begun").touch()
import jax
while True:
    jax.numpy.ones(3).block_until_ready()
    [None for _ in range(100_000)]
"""


@pytest.mark.parametrize("signals", [(INT,), (INT, INT, INT), (TERM,)])
def test_a_check_that_is_interrupted_says_so_in_one_line(tmp_path, signals):
    (tmp_path / "endless.py").write_text(ENDLESS)
    begun = tmp_path / "endless.begun"
    found, said = ended(["jaxgrad.check", tmp_path / "endless.py"], begun.exists, signals)
    assert (found, said) == ((130, "interrupted\n") if signals[0] == INT else (143, "terminated\n"))


STUDY = '''"""It never ends."""
import dataclasses
from experiments.engine.kinds import EXACT
@dataclasses.dataclass(frozen=True)
class Config:
    n: int = 1
QUICK = Config()
NUMBERS = {"*": EXACT}
def run(config, session):
    import time, pathlib
    pathlib.Path(__file__).with_suffix(".begun").touch()
    while True:
        time.sleep(0.01)
def claims(numbers):
    return []
def draw(numbers):
    return None
'''


@pytest.mark.parametrize("names", [("endless",), ("endless", "without_end")])
@pytest.mark.parametrize(("signals", "gap"), [((INT, INT), 0.002), ((INT, INT, INT), 0.1), ((TERM, TERM), 0.01)])
def test_a_study_that_is_interrupted_twice_says_so_in_one_line(tmp_path, names, signals, gap):
    """In this process, and in workers of its own, which get a Ctrl-C from the terminal too."""
    package = tmp_path / "experiments"
    shutil.copytree(ROOT / "experiments", package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in names:
        (package / f"{name}.py").write_text(STUDY)
    begun = [package / f"{name}.begun" for name in names]
    found, said = ended(
        ["experiments", *names, "--quick"], lambda: all(path.exists() for path in begun), signals, tmp_path, gap
    )
    assert found == (130 if signals[0] == INT else 143)
    assert said.splitlines()[-1].startswith("interrupted during ")
    assert said.count("interrupted") == 1
    assert "Traceback" not in said
    assert "leaked" not in said


def test_a_signal_that_a_callback_swallows_is_raised_again(tmp_path):
    (tmp_path / "swallows.py").write_text(
        "import time\n"
        "from jaxgrad import commandline\n"
        "commandline.prepare()\n"
        "class Slow:\n"
        "    def __del__(self):\n"
        "        open('begun', 'w').close()\n"
        "        while True: time.sleep(0.01)\n"
        "def main():\n"
        "    commandline.interruptible()\n"
        "    Slow()\n"
        "    time.sleep(60)\n"
        "commandline.leave(commandline.outcome(main))\n"
    )
    found, said = ended(["swallows"], (tmp_path / "begun").exists, [INT], tmp_path)
    assert (found, said) == (130, "interrupted\n")


def test_what_hangs_after_a_signal_is_ended(tmp_path):
    (tmp_path / "hangs.py").write_text(
        "import time\n"
        "from jaxgrad import commandline\n"
        "commandline.prepare()\n"
        "commandline.GRACE = 0.3\n"
        "def main():\n"
        "    commandline.interruptible()\n"
        "    open('begun', 'w').close()\n"
        "    try:\n"
        "        time.sleep(60)\n"
        "    finally:\n"
        "        time.sleep(60)\n"
        "commandline.leave(commandline.outcome(main))\n"
    )
    found, said = ended(["hangs"], (tmp_path / "begun").exists, [INT], tmp_path)
    assert (found, said) == (130, "interrupted\n")
