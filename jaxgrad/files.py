"""What a file operation that failed means: a sentence that names the path and says what to do.

    with files.explained("the rows cannot be read"):
        ...                                          # OSError: the rows cannot be read: /data/x.npy: Permission ...

The system says `[Errno 40] Too many levels of symbolic links`. A person needs the path, the reason and the remedy.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager

REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some of it, or write elsewhere",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f), or write elsewhere",
    errno.EROFS: "write elsewhere",
    errno.EACCES: "change its permissions, or give another path",
    errno.EPERM: "change its permissions, or give another path",
    errno.ENOTDIR: "a part of this path is a file and no folder; give another path",
    errno.EISDIR: "a folder is in the place of the file; remove it or give another path",
    errno.EEXIST: "a file is in the place of the folder; remove it or give another path",
    errno.ENOTEMPTY: "a folder is in the place of the file; remove it or give another path",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.ELOOP: "links lead back to themselves; remove them or give another path",
    errno.ENOENT: "create it or give another path",
    errno.EIO: "the disk or the device fails; give a path on another one",
    errno.ESTALE: "the file system was mounted anew; start again",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ETXTBSY: "a running program is in its place; give another path",
    errno.EBUSY: "another program holds it; wait, or give another path",
}
"""What to do, by what the system says: faults of the place, not of the program."""


def reason(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """Why, and what to do: `No space left on device; free some space, or write elsewhere`."""
    if not _is_the_systems(error):
        return str(error.strerror or error)
    why = f"{error.strerror}; {REMEDIES.get(error.errno or 0, 'give another path')}"
    if working_folder_is_gone():
        return "the working directory is gone; change to a folder that exists"
    if path is not None and error.errno in (errno.ENOENT, errno.EEXIST) and os.path.islink(path):
        return "it is a link that leads nowhere; remove it or create what it points to"
    return why


def sentence(error: OSError) -> str:
    """The whole of it for a command line: path, reason and remedy. An error of ours is a sentence already."""
    path = error.filename2 if error.filename2 is not None else error.filename
    if not _is_the_systems(error) or path is None:
        return reason(error)
    name = os.fsdecode(path) if isinstance(path, bytes | str | os.PathLike) else str(path)
    shown = name if len(name) <= 200 else f"{name[:80]}…{name[-80:]}"
    return f"{shown}: {reason(error, name)}"


@contextmanager
def explained(what: str, path: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """`what` is what could not be done, said of an OSError of the system within the block. `path` stands in for one
    that the system does not name."""
    try:
        yield
    except OSError as error:
        if not _is_the_systems(error):
            raise
        if error.filename is None and path is not None:
            error.filename = os.fspath(path)
        raise OSError(error.errno, f"{what}: {sentence(error)}") from None


def _is_the_systems(error: OSError) -> bool:
    """Whether these are the system's words; what we raise are sentences, with or without a number."""
    return error.errno is not None and error.strerror == os.strerror(error.errno)


def working_folder_is_gone() -> bool:
    """Whether somebody removed the folder that this process works in: no relative path leads anywhere then."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False
