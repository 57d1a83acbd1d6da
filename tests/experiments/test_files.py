"""A file operation that fails is a sentence with path, reason and remedy, and nothing that was there is lost."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments.engine import results
from experiments.engine.commands import main as study
from jaxgrad import atomic, commandline, files, open_rows
from jaxgrad.check.__main__ import main as check
from jaxgrad.launch import main as launch

ROOT = Path(__file__).resolve().parents[2]
LONG = "n" * 300


@pytest.fixture
def places(tmp_path):
    """Paths at which nothing can be written or read, by what is wrong with them."""
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "below a file": tmp_path / "file" / "x",
        "a file": tmp_path / "file",
        "too long": tmp_path / LONG,
        "a link to nothing": tmp_path / "dangling",
        "a link to itself": tmp_path / "loop",
        "below a link to itself": tmp_path / "loop" / "x",
        "where the kernel forbids": Path("/proc/nothing/x"),
    }


def said(status, capsys, words=()):
    """The last line on stderr of a command line that ended; it is a sentence."""
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert "Traceback" not in captured.err
    assert "[Errno" not in captured.err
    last = captured.err.strip().splitlines()[-1]
    assert all(word in last for word in words), last
    return last


def through(command):
    """A command line as a program runs it: what it raises is said, and its status."""
    return commandline.outcome(command)


FAULTS = (
    "below a file",
    "a file",
    "too long",
    "a link to nothing",
    "a link to itself",
    "below a link to itself",
    "where the kernel forbids",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_line_says_what_is_wrong_with_a_path(places, fault, capsys, tmp_path):
    path = str(places[fault])
    said(through(lambda: study(["report", "--out", path])), capsys)
    said(through(lambda: study(["verify", "losses", "--out", path])), capsys)
    said(through(lambda: check([path + ".py" if fault == "a file" else path])), capsys)
    said(through(lambda: launch(["-n", "1", path if fault != "a file" else path + ".py"])), capsys)
    script = tmp_path / "script.py"
    script.touch()
    said(through(lambda: launch(["-n", "1", "--logs", path, str(script)])), capsys)
    with pytest.raises(OSError, match=r"nothing can be written to .*;") as error, results.lock(path):
        results.write(path, "line", "cpu", {}, {}, [], {})
    assert error.value.errno or isinstance(error.value, FileNotFoundError)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_file_function_of_the_library_names_path_and_remedy(places, fault):
    path = places[fault]
    if fault not in ("a file", "a link to nothing", "a link to itself"):  # whose place a new file takes
        with pytest.raises(OSError, match=r"a file cannot be written: .*;") as error:
            atomic.write(path, b"x")
        assert str(path)[:80] in str(error.value)
    if fault != "a file":
        with pytest.raises(OSError, match=r"(there is no file or folder /|the rows cannot be opened: .*;)"):
            open_rows(path)


def test_an_error_of_ours_is_said_as_it_is():
    assert files.sentence(OSError("our sentence")) == "our sentence"
    assert files.sentence(OSError(errno.ENOSPC, "our sentence")) == "our sentence"
    assert files.sentence(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/a/b")) == (
        "/a/b: No space left on device; free some space, or write elsewhere"
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("at", ["open", "fsync", "replace"])
def test_a_disk_that_is_full_or_read_only_is_a_sentence_and_the_old_file_stays(tmp_path, monkeypatch, at, number):
    """Root may write anywhere, so the system's answer is planted."""
    path = tmp_path / "cpu.json"
    path.write_bytes(b"old")

    def refuse(*arguments):
        raise OSError(number, os.strerror(number), str(arguments[0]))

    monkeypatch.setattr(os, at, refuse)
    with pytest.raises(OSError, match=f"a file cannot be written: .*{os.strerror(number)}; ") as error:
        atomic.write(path, b"new")
    monkeypatch.undo()
    assert error.value.errno == number
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("cpu.json", b"old")]


@pytest.mark.parametrize("name", ["cpu.json", "cpu.npz"])
@pytest.mark.parametrize("fault", ["folder", "loop", "text", "gone"])
def test_a_report_of_results_that_cannot_be_read_is_a_sentence(tmp_path, capsys, name, fault):
    shutil.copytree(ROOT / "results" / "quick" / "losses", tmp_path / "losses")
    file = tmp_path / "losses" / name
    file.unlink()
    if fault == "folder":
        file.mkdir()
    elif fault == "loop":
        file.symlink_to(file)
    elif fault == "text":
        file.write_text("x")
    said(study(["report", "--out", str(tmp_path)]), capsys, ["error: ", str(tmp_path)])


def test_a_digit_too_many_in_a_result_is_noticed(tmp_path):
    """It reads as the same float, but is not what was written; and so is any other edit."""
    results.write(tmp_path, "line", "cpu", {"n": 1}, {"a": 137110410.95971924, "b": 0.5}, [], {})
    path = tmp_path / "line" / "cpu.json"
    sound = path.read_text()
    assert results.edited(tmp_path, "line", "cpu") == []
    for was, now in [("0.95971924", "0.95971925"), ("0.5", "0.6"), ("0.5", "0.50"), ('"n": 1', '"n": 2')]:
        was, now = (text if text[0] == '"' else text.removeprefix("0") for text in (was, now))
        assert was in sound
        path.write_text(sound.replace(was, now))
        with pytest.raises(ValueError, match=r"cpu.json was changed since it was written"):
            results.read(tmp_path, "line", "cpu")
    document = json.loads(sound)
    for key in ("sha256", "arrays"):
        path.write_text(json.dumps({**document, key: {}}))
        with pytest.raises(ValueError, match=r"changed since|has no 'sha256'"):
            results.read(tmp_path, "line", "cpu")


def test_no_flipped_bit_of_a_result_goes_unnoticed(tmp_path):
    numbers = {"a": np.linspace(0, 1, 7), "b": 0.1, "c": "text", "d": [1, 2, 3]}
    claim = results.Claim("C1", "it is", "1", "1", True)
    results.write(tmp_path, "line", "cpu", {"n": 1}, numbers, [claim], {"seconds": 1.5})
    random = np.random.default_rng(0)
    for kind in ("json", "npz"):
        path = tmp_path / "line" / f"cpu.{kind}"
        sound = path.read_bytes()
        for _ in range(150):
            damaged = bytearray(sound)
            damaged[random.integers(len(sound))] ^= 1 << int(random.integers(8))
            path.write_bytes(damaged)
            try:
                results.read(tmp_path, "line", "cpu")
            except ValueError:
                continue
            # Claims are told again from the numbers, and so are read; that they changed is known.
            assert results.edited(tmp_path, "line", "cpu") == ["claims"]
        path.write_bytes(sound)


def run(*command, shell="", **options):
    """A command line as a process of its own; `shell` is what a shell does around it."""
    command = [sys.executable, "-m", *map(str, command)]
    if shell:
        command = ["sh", "-c", shell, "sh", *command]
    options = {"stdout": subprocess.PIPE, "cwd": ROOT} | options
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False, **options)


@pytest.mark.parametrize(
    "command",
    [("experiments", "list"), ("jaxgrad.check", "--help"), ("jaxgrad.launch", "--help")],
    ids=lambda command: command[0],
)
def test_a_stdout_that_is_full_or_closed_is_one_line_and_a_reader_that_leaves_is_none(command):
    with open("/dev/full", "wb") as full:
        done = run(*command, stdout=full)
    assert done.returncode == 2
    assert done.stderr == (
        "error: not all of the output could be written to stdout: No space left on device; free some space, or write "
        "elsewhere\n"
    )
    done = run(*command, shell='exec "$@" >&-')
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "stdout: it is closed" in done.stderr
    done = run(*command, shell='exec "$@" | true')
    assert done.stderr == ""
    assert run(*command, shell='exec "$@" 2>&-').returncode == 0


def test_a_report_is_written_whole_although_nobody_hears_of_it(tmp_path):
    shutil.copytree(ROOT / "results" / "quick" / "losses", tmp_path / "losses")
    (tmp_path / "losses" / "figure.svg").unlink(missing_ok=True)
    done = run("experiments", "report", "--out", tmp_path, shell='exec "$@" >&- 2>/dev/full')
    assert done.returncode == 2
    assert (tmp_path / "report.html").is_file()
    assert (tmp_path / "losses" / "figure.svg").is_file()


def test_a_working_directory_that_is_gone_is_one_line(tmp_path):
    gone = 'cd "$GONE" && rmdir "$GONE" && exec "$@"'
    for command in (
        ("experiments", "report", "--out", "x"),
        ("jaxgrad.check", "x.py"),
        ("jaxgrad.launch", "-n", "1", "x.py"),
    ):
        (tmp_path / "gone").mkdir()
        done = run(
            *command,
            shell=gone,
            cwd=tmp_path,
            env=os.environ | {"GONE": str(tmp_path / "gone"), "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr


def test_a_disk_that_is_full_leaves_the_old_results(tmp_path):
    """No file may grow beyond a block."""
    shutil.copytree(ROOT / "results" / "quick" / "losses", tmp_path / "losses")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    done = run("experiments", "report", "--out", tmp_path, shell='ulimit -f 1 && exec "$@"')
    assert done.returncode == 2
    assert "cannot be written: " in done.stderr.splitlines()[-1]
    assert "File too large; raise the limit" in done.stderr.splitlines()[-1]
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_lacks_our_letters_stops_nothing(encoding):
    plain = os.environ | {"PYTHONIOENCODING": encoding, "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = run("experiments", "list", env=plain)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\\u03b3" in done.stdout  # gradient_noise's γ
