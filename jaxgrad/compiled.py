"""Compiled programs on disk, sealed: an entry that was damaged is compiled again, never run.

    compiled.keep("~/.cache/jaxgrad/compiled")           # before the first program is compiled

JAX does not check what it finds in its compilation cache. Most damaged entries cannot be unpacked; one that can runs
as whatever program it has become, and gives other numbers without a word. So each entry has a seal beside it, the
sha256 of its key and its bytes, which is compared each time it is read. An entry without its seal, or with another
one, counts as absent: it is compiled again and replaced.

    <key>-cache     the entry, as JAX writes it
    <key>-sha256    its seal, which is written first

Both are written whole or not at all (`atomic`), so several processes may share a folder, and any may be killed. Two
that write one entry at the same time may leave the seal of one beside the entry of the other: it is compiled again.

This is for accidents (a bad disk, a cut copy, a tool that 'cleans' files), not against people: whoever may write to
the folder can write a seal, too, and run code here.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from jaxgrad import atomic


def keep(folder: str | os.PathLike[str]) -> bool:
    """Let JAX keep what it compiles in this process in a folder, sealed; whether it does.

    It does not where the folder cannot be made, where its size is limited (`jax_compilation_cache_max_size`), or where
    this JAX has no place to look at what is read. Then it keeps nothing, and compiles each time: right, but slower.
    """
    import jax

    place = Path(folder).expanduser()
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    limited = jax.config.jax_compilation_cache_max_size != -1  # type: ignore[attr-defined]
    sealed = place.is_dir() and not limited and _seal_what_jax_reads()
    jax.config.update("jax_compilation_cache_dir", str(place) if sealed else None)
    return sealed


def _seal_what_jax_reads() -> bool:
    try:
        # The one place through which every entry goes; the public setting takes a path only.
        from jax._src import compilation_cache
        from jax._src.compilation_cache_interface import CacheInterface
    except ImportError:
        return False

    class Sealed(CacheInterface):
        def __init__(self, path: str):
            self._path = Path(path)

        def get(self, key: str) -> Any:
            return read(self._path, key)

        def put(self, key: str, value: bytes) -> None:
            write(self._path, key, value)

    def get_file_cache(path: str) -> tuple[Any, str]:
        return Sealed(path), path

    if not hasattr(compilation_cache, "get_file_cache") or not hasattr(compilation_cache, "reset_cache"):
        return False
    compilation_cache.get_file_cache = get_file_cache  # type: ignore[assignment]
    compilation_cache.reset_cache()  # it may have opened the folder already, unsealed
    return True


def read(folder: Path, key: str) -> bytes | None:
    """The entry of a key, if it is there and what was written."""
    try:
        value, seal = (folder / f"{key}-cache").read_bytes(), (folder / f"{key}-sha256").read_bytes()
    except OSError:
        return None
    return value if seal == _seal(key, value) else None


def write(folder: Path, key: str, value: bytes) -> None:
    """Write an entry and its seal. Where that fails, on a full disk, there is none."""
    with suppress(OSError):
        atomic.write(folder / f"{key}-sha256", _seal(key, value), sync=False)
        atomic.write(folder / f"{key}-cache", value, sync=False)


def _seal(key: str, value: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\0" + value).hexdigest().encode()
