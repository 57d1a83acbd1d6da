"""Files that are written whole or not at all.

    atomic.write("run.npz", content)          # readers see the old bytes or the new, never half of them

The content goes to `<name>.tmp` beside the file and to the disk (fsync), and only then takes the file's name. So a
writer that is stopped, at any moment, or finds the disk full leaves the old file whole. A writer killed with SIGKILL
also leaves a partial `.tmp`; nothing reads it, and the next write of that file takes its place.

Each writer holds a lock on its `.tmp`, which ends with the writer, however it ends. Several who write one file at the
same time take `<name>.1.tmp`, `<name>.2.tmp`, …: none disturbs another, and the last one stays. Where the file system
has no locks (Windows, some network drives) the process and thread number are in the name, and what a killed writer
leaves there stays until somebody removes it.

The new file has the permissions of any new file (0666 less the umask), not those of the old one, and takes the place
of a link, not of what it points to. After a power cut the old file may be there again: the folder is not synced.

OSErrors name the file, the reason and what to do.
"""

import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from jaxgrad import files

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None


def write(path: str | os.PathLike[str], content: bytes | memoryview, sync: bool = True) -> None:
    """Write `content` to `path`, which has it whole or is as before; OSError where that fails.

    Without `sync` it may be lost, or cut off, in a power cut: for what can be told from whole and made again.
    """
    with replacing(path, sync) as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str], sync: bool = True) -> Iterator[BinaryIO]:
    """`with replacing(path) as file: ...`: `path` is what the block wrote when it ends, as before if it raises."""
    with files.explained("a file cannot be written", path):
        part, handle = _claimed(Path(path))
        with open(handle, "w+b") as file:
            try:
                os.ftruncate(handle, 0)  # what a killed writer left
                yield file
                file.flush()
                if sync:
                    os.fsync(handle)
                os.replace(part, path)  # under the lock: until then nobody else takes `part`
            except BaseException:
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                with suppress(OSError):  # or closing it would try to write the rest again
                    file.raw.close()  # type: ignore[attr-defined]
                raise


def probe(path: str | os.PathLike[str]) -> None:
    """Raise the OSError of a file that cannot be written there, as far as can be told without writing."""
    part, handle = _claimed(Path(path))
    with suppress(OSError):
        part.unlink(missing_ok=True)
    os.close(handle)


def temporary(path: str | os.PathLike[str], number: int | str = "") -> Path:
    """Where the content of `path` lies until it is whole."""
    path = Path(path)
    return path.with_name(f"{path.name}{number and f'.{number}'}.tmp")


def locked(handle: int) -> bool | None:
    """Take the lock on an open file until it is closed or the process ends: whether that went; None: no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def names(path: Path, handle: int) -> bool:
    """Whether `path` is the open file: it may have been renamed or removed since it was opened."""
    try:
        there, own = path.stat(), os.fstat(handle)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino)


def _claimed(path: Path) -> tuple[Path, int]:
    """A temporary name that no living writer has, open and locked."""
    for number in itertools.count():
        part = temporary(path, number or "")
        handle = os.open(part, _OPEN, 0o666)
        got = locked(handle)
        if got and names(part, handle):
            return part, handle
        os.close(handle)
        if got is None:
            part.unlink(missing_ok=True)
            part = temporary(path, f"{os.getpid()}-{threading.get_ident()}")
            return part, os.open(part, _OPEN, 0o666)
    raise AssertionError


_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
