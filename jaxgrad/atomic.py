"""Files that are written whole or not at all.

    atomic.write("run.npz", content)          # readers see the old bytes or the new, never half of them

The content goes to `<name>.tmp` beside the file and to the disk (fsync), and only then takes the file's name. So a
writer that is stopped, at any moment, or finds the disk full leaves the old file whole. Who is killed (SIGKILL) also
leaves the `.tmp`, of any length: nothing reads it, and the next write of that file overwrites it.

The new file has the permissions of any new file (0666 less the umask), not those of the old one, and takes the place
of a link, not of what it points to. After a power cut the old file may be there again: the folder is not synced.
Two who write one file at the same time need a lock of their own.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def write(path: str | os.PathLike[str], content: bytes | memoryview) -> None:
    """Write `content` to `path`, which has it whole or is as before; OSError where that fails."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """`with replacing(path) as file: ...`: `path` is what the block wrote when it ends, as before if it raises."""
    part = temporary(path)
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def temporary(path: str | os.PathLike[str]) -> Path:
    """Where the content of `path` lies until it is whole."""
    path = Path(path)
    return path.with_name(f"{path.name}.tmp")
