"""A file has its old bytes or its new ones, whatever stops the writer."""

import os
import signal
import stat
import subprocess
import sys
import threading

import pytest

from jaxgrad import atomic


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("old", [None, b"old"])
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", ["write", "fsync", "replace"])
def test_a_writer_that_is_stopped_leaves_what_was_there(tmp_path, monkeypatch, at, error, old):
    path = tmp_path / "file.npz"
    if old is not None:
        path.write_bytes(old)
    before = contents(tmp_path)

    def stop(*_):
        raise error

    if at != "write":
        monkeypatch.setattr(os, at, stop)

    def write():
        with atomic.replacing(path) as file:
            file.write(b"half of the ")
            if at == "write":
                raise error
            file.write(b"new one")

    with pytest.raises(type(error)):
        write()
    assert contents(tmp_path) == before


def test_a_killed_writer_leaves_the_old_file_and_the_next_one_clears_up(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    code = """
import os, signal, sys
from jaxgrad import atomic
with atomic.replacing(sys.argv[1]) as file:
    file.write(b"x" * 100_000)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert contents(tmp_path).keys() == {"file", "file.tmp"}
    assert path.read_bytes() == b"old"
    atomic.write(path, b"new")
    assert contents(tmp_path) == {"file": b"new"}


def test_the_disk_has_the_bytes_before_the_file_has_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave the new name on an empty file."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *file: (done.append("fsync"), fsync(*file)))
    monkeypatch.setattr(os, "replace", lambda *names: (done.append("replace"), replace(*names)))
    atomic.write(str(tmp_path / "file"), memoryview(b"new"))
    assert done == ["fsync", "replace"]
    assert contents(tmp_path) == {"file": b"new"}


def test_permissions_are_those_of_a_new_file_and_a_link_is_replaced(tmp_path):
    old, link, fresh = tmp_path / "old", tmp_path / "link", tmp_path / "fresh"
    old.write_bytes(b"old")
    old.chmod(0o600)
    link.symlink_to(old)
    fresh.touch()
    atomic.write(link, b"new")
    assert not link.is_symlink()
    assert old.read_bytes() == b"old"
    atomic.write(old, b"new")
    assert stat.S_IMODE(old.stat().st_mode) == stat.S_IMODE(fresh.stat().st_mode)


def test_many_writers_of_one_file_disturb_no_other_and_one_content_stays(tmp_path):
    """Processes and threads at once; none of them fails, and nothing else is left."""
    code = """
import sys, threading
from jaxgrad import atomic
def write(mark):
    for _ in range(30):
        atomic.write(sys.argv[1], mark * 50_000)
threads = [threading.Thread(target=write, args=(sys.argv[2].encode() + mark,)) for mark in (b"x", b"y")]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""
    path = tmp_path / "file"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), mark], stderr=subprocess.PIPE) for mark in "ab"]
    seen = set()
    while any(writer.poll() is None for writer in writers):
        if path.exists():
            seen.add(path.read_bytes())
    assert [writer.communicate()[1] for writer in writers] == [b"", b""]
    assert seen | set(contents(tmp_path).values()) <= {mark * 50_000 for mark in (b"ax", b"ay", b"bx", b"by")}
    assert contents(tmp_path).keys() == {"file"}


def test_what_a_killed_writer_left_is_not_the_living_ones(tmp_path):
    """A writer at work keeps its temporary file, while another writes the same file whole."""
    path = tmp_path / "file"
    with atomic.replacing(path) as slow:
        slow.write(b"slow")
        atomic.write(path, b"fast")
        assert path.read_bytes() == b"fast"
        atomic.probe(path)
    assert contents(tmp_path) == {"file": b"slow"}


def test_without_locks_each_writer_has_a_name_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "fcntl", None)
    path = tmp_path / "file"
    with atomic.replacing(path) as file:
        file.write(b"new")
        assert [part.name for part in tmp_path.iterdir()] == [f"file.{os.getpid()}-{threading.get_ident()}.tmp"]
    assert contents(tmp_path) == {"file": b"new"}
