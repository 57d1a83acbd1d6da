"""A run saved on disk, to be resumed: parameters, optimizer state, step, and the fingerprint of the run.

    descend(..., checkpoint=Checkpoint("run.npz", every=1000))                  # saves checkpoints
    descend(..., checkpoint=Checkpoint("run.npz", every=1000, resume=True))     # resumes from the file if it exists

A checkpoint is one file, written by one process and whole or not at all (`atomic`): a run that is stopped while it
writes leaves the last checkpoint. The order of the examples is not saved, because it is a pure function of key and
step. So a resumed run gives the same numbers, to the bit on the same number of devices.

The fingerprint covers data, loss, start, optimizer, sampling, key and stopping rules. A checkpoint of another run is
refused.

One run at a time writes to the file. It holds a lock on `<name>.lock` beside it, which ends with the run, even if it is
killed. On file systems without locks (Windows, some network drives) two runs are not kept apart, but each file is
still whole.
"""

import io
import json
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import atomic, checks, files, parallel

_FORMAT = 2


class Checkpoint(NamedTuple):
    """Where a run saves itself, and how often."""

    path: str | os.PathLike[str]
    """An `.npz` file; it appears with the first checkpoint."""
    every: int = 1000
    """Steps between checkpoints. A run that is asked to stop also saves one."""
    resume: bool = False
    """Resume from the file if it exists. Without `resume` an existing file is refused, not overwritten."""


def save(checkpoint: Checkpoint, tree: Any, fingerprint: dict[str, str]) -> None:
    """Write the arrays of a pytree and the fingerprint. Every process calls it, and rank 0 writes.

    Raises OSError if that fails (on the other processes `parallel.Elsewhere`); the old file is then whole.
    """
    if parallel.is_main():
        parallel.together(lambda: _write(Path(checkpoint.path), _archive(tree, fingerprint)))
    else:
        parallel.together(lambda: None)


def _archive(tree: Any, fingerprint: dict[str, str]) -> bytes:
    leaves = jax.tree.leaves(tree)
    kinds = [str(jax.random.key_impl(leaf)) if _is_key(leaf) else "" for leaf in leaves]
    arrays = [np.asarray(jax.random.key_data(leaf) if kind else leaf) for leaf, kind in zip(leaves, kinds, strict=True)]
    names = [f"key {kind}" if kind else array.dtype.name for array, kind in zip(arrays, kinds, strict=True)]
    # NumPy cannot save the small floats of JAX (bfloat16, ...), so their bytes are saved.
    plain = [array.view(f"u{array.dtype.itemsize}") if array.dtype.kind == "V" else array for array in arrays]
    header = json.dumps({"format": _FORMAT, "fingerprint": fingerprint, "dtypes": names}, sort_keys=True)
    content = io.BytesIO()
    np.savez(content, header=np.array(header), **{f"leaf{i}": leaf for i, leaf in enumerate(plain)})  # type: ignore[arg-type]
    return content.getvalue()


def _write(path: Path, content: bytes) -> None:
    try:
        atomic.write(path, content)
    except OSError as error:
        kept = "the one that was there is whole" if path.exists() else "there is none yet"
        raise OSError(error.errno, f"no checkpoint could be written to {path} ({_reason(error)}); {kept}") from None


def _reason(error: OSError) -> str:
    return files.reason(OSError(error.errno, os.strerror(error.errno))) if error.errno else str(error)


@contextmanager
def held(checkpoint: Checkpoint | None) -> Iterator[None]:
    """Keep other runs from writing to a checkpoint during the block. Every process calls it, and rank 0 locks.

    Raises BlockingIOError (on the other processes `parallel.Elsewhere`) if another run writes to it.
    """
    with ExitStack() as block:

        def hold() -> None:
            if checkpoint is not None and parallel.is_main():
                block.enter_context(_alone(Path(checkpoint.path), patience=0.5))  # another may be looking

        if checkpoint is not None:
            parallel.together(hold)
        yield


@contextmanager
def _alone(path: Path, patience: float = 0.0) -> Iterator[None]:
    place, until = path.with_name(f"{path.name}.lock"), time.monotonic() + patience
    while True:
        handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
        got = atomic.locked(handle)
        if got is False:
            owner = os.pread(handle, 100, 0).decode(errors="replace")
            os.close(handle)
            if time.monotonic() < until:
                time.sleep(0.01)
                continue
            raise BlockingIOError(
                f"another run{f' (process {owner})' if owner else ''} writes checkpoints to {path}; "
                "wait for it to end, or give another path"
            )
        if got is None or atomic.names(place, handle):
            break
        os.close(handle)  # the other run removed it just now
    try:
        with suppress(OSError):
            os.ftruncate(handle, 0)
            os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        with suppress(OSError):
            place.unlink()  # under the lock
        os.close(handle)


def resumed(checkpoint: Checkpoint, like: Any, fingerprint: dict[str, str]) -> Any | None:
    """What `save` wrote, as numpy arrays in the structure of `like`; None where there is nothing to resume.

    One process reads and tells the others. Raises ValueError, with what differs, for a checkpoint of another run, and
    for a damaged one.
    """
    path = Path(checkpoint.path)
    with files.explained("a checkpoint cannot be read"):
        content = parallel.from_main(lambda: path.read_bytes() if checkpoint.resume and path.exists() else b"")
    if not content:
        return None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            header = json.loads(str(file["header"]))
            plain = [file[f"leaf{i}"] for i in range(len(header["dtypes"]))]
    except Exception as error:  # damaged bytes make NumPy and zipfile raise anything
        raise ValueError(f"{path} is not a whole checkpoint ({error}); remove it to begin anew") from None
    theirs = header["fingerprint"]
    other = [name for name in fingerprint if theirs.get(name) != fingerprint[name]]
    if header["format"] != _FORMAT or other:
        hint = ". To go on with another stop, give run.state in place of params" if other == ["stop"] else ""
        raise ValueError(
            f"{path} is a checkpoint of another run: its {' and '.join(other) or 'format'} "
            f"{'are' if len(other) > 1 else 'is'} not what this one has; give another path, or the same "
            f"arguments as then{hint}"
        )
    structure = jax.tree.structure(like)
    if structure.num_leaves != len(plain):
        raise ValueError(
            f"{path} is a checkpoint of a run that records something else (observe, has_aux, batch_losses, stop): give "
            "another path, or the same arguments as then"
        )
    return jax.tree.unflatten(structure, map(_as_saved, plain, header["dtypes"]))


def _as_saved(leaf: np.ndarray, name: str) -> Any:
    if name.startswith("key "):
        return jax.random.wrap_key_data(jnp.asarray(leaf), impl=name.removeprefix("key "))
    return leaf if leaf.dtype.kind == "U" or leaf.dtype.name == name else leaf.view(jnp.dtype(name))


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def plain(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with a Path, an int and a bool. Raises TypeError or ValueError for other values."""
    checks.instance("checkpoint", checkpoint, Checkpoint)
    return Checkpoint(
        checks.path("checkpoint.path", checkpoint.path),
        checks.count("checkpoint.every", checkpoint.every),
        checks.flag("checkpoint.resume", checkpoint.resume),
    )


def check(checkpoint: Checkpoint) -> None:
    """Raise an error, before anything compiles, if the file cannot be written, or exists without `resume`."""
    checkpoint = plain(checkpoint)
    path = Path(checkpoint.path)
    if path.suffix != ".npz":
        raise ValueError(f"a checkpoint is an .npz file; got {path}")
    with files.explained(f"no checkpoint can be written to {path}"):
        there = path.parent.is_dir() and path.exists()
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"no checkpoint can be written to {path}: the folder {path.parent} does not exist; create it"
        )
    if there and not path.is_file():
        raise IsADirectoryError(f"no checkpoint can be written to {path}: it is there and no file; give another path")
    if there and not checkpoint.resume:
        raise FileExistsError(
            f"{path} is there already: go on from it with resume=True, remove it, or give another path"
        )
    try:
        atomic.probe(path)
        with _alone(path):
            pass
    except BlockingIOError:
        raise
    except OSError as error:
        raise OSError(error.errno, f"no checkpoint can be written to {path}: {_reason(error)}") from None


def rows_hash(data: Any, counts: tuple[int, ...] | None = None) -> str:
    """A hash of all rows in their order. It does not depend on how the rows are spread over devices.

    `counts`: rows of each device, if rows are padded (`parallel.Sharded.counts`). Each row is hashed with its number,
    and the hashes are added: one pass on the devices that hold the rows, exact in any order of the sum.
    """
    n = jax.tree.leaves(data)[0].shape[0]
    number = np.arange(n, dtype=np.uint32)
    if counts is not None:
        most = max(counts)
        device, own = np.divmod(np.arange(n), most)
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        number = np.where(own < np.array(counts)[device], first[device] + own, 2**32 - 1).astype(np.uint32)
    return "".join(f"{int(word):08x}" for word in np.asarray(_rows_hash(data, number)))


@jax.jit
def _rows_hash(data: Any, number: Any) -> jax.Array:
    def mix(x: Any, key: Any) -> Any:  # MurmurHash3's last step
        x = (x ^ key) * jnp.uint32(0x9E3779B1) + key
        x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
        x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
        return x ^ (x >> 16)

    def words(leaf: Any) -> Any:
        leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
        if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
            leaf = jnp.stack([leaf.real, leaf.imag], axis=-1)
        bits = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        return jax.lax.bitcast_convert_type(leaf, bits).reshape(leaf.shape[0], -1).astype(jnp.uint32)

    def one(seed: int) -> Any:
        row = mix(number, jnp.uint32(seed))
        at = 0
        for leaf in jax.tree.leaves(data):
            own = words(leaf)
            place = jnp.arange(at, at + own.shape[1], dtype=jnp.uint32)[None, :]
            row = row + jnp.sum(mix(own, mix(place, jnp.uint32(seed))), axis=1, dtype=jnp.uint32)
            at += own.shape[1]
        whole = mix(mix(row, number), jnp.uint32(seed))
        return jnp.sum(jnp.where(number == jnp.uint32(2**32 - 1), jnp.uint32(0), whole), dtype=jnp.uint32)

    return jnp.stack([one(1), one(2)])
