"""Results on disk: one JSON and one npz per experiment and device, which are replaced together or not at all.

    results/<experiment>/<device>.json    config, claims, scalar numbers, versions, device, precision, times
    results/<experiment>/<device>.npz     the arrays among the numbers, never pickled

The same data give the same bytes on every machine: keys sorted, floats by `repr`, arrays little-endian and
stored without compression, no dates. NaN and infinities, which JSON does not have, are written as
`{"float": "nan"}`. The JSON holds the sha256 of its npz, so that a reader knows a mismatched pair. The JSON is
first written under a temporary name, then the npz is replaced, then the JSON renamed: a writer that is stopped
before the npz is there leaves the old pair, and one that is stopped after leaves the new npz beside the new JSON
under its temporary name, which the next `read` renames.

The JSON also holds what a later reader needs to trust it: the hash of every source file that made the numbers
(`code`), and the hash of its own contents (`sha256`), so that stale and edited files can be told from sound ones.
`read` refuses an edited one. This is for accidents: a person can compute a hash, too.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.engine import provenance
from jaxgrad import atomic, files
from jaxgrad.data import Column

DEVICES = ("cpu", "gpu", "tpu")
"""What JAX calls the kinds of device that a result can be of."""


class Claim(NamedTuple):
    """A sentence that a run confirmed or refuted. Every field is computed from the numbers of that run."""

    id: str
    """Row of the lecture (`F4`, `C6`) or of this study."""
    text: str
    """What is claimed, as a sentence."""
    measured: str
    expected: str
    holds: bool


class Result(NamedTuple):
    """What `read` gives back: everything that `write` was given, and where it came from."""

    name: str
    device: str
    """`cpu` or `gpu`: the stem of the two files."""
    config: dict[str, Any]
    numbers: dict[str, Any]
    claims: tuple[Claim, ...]
    times: dict[str, Any]
    provenance: dict[str, Any]
    """`versions`, `machine`, `precision`, `seeds`, `code`, and the `sha256` of the npz."""
    columns: tuple[Column, ...] = ()
    """What became of each column of a person's own file."""


def write(
    folder: str | Path,
    name: str,
    device: str,
    config: Any,
    numbers: dict[str, Any],
    claims: Sequence[Claim],
    times: dict[str, Any],
    columns: Sequence[Column] = (),
) -> Path:
    """Write `folder/<name>/<device>.json` and `.npz`, both or neither; returns the path of the JSON.

    `config` is a dataclass or a dict. `numbers` is a flat dict: arrays (numeric, bool or unicode) go to the
    npz, plain scalars, strings and lists of them to the JSON. Raises TypeError, naming the key, for what is
    neither, before anything is written.
    """
    plain, arrays = _split(numbers)
    archive = npz(arrays)
    settings = dataclasses.asdict(config) if dataclasses.is_dataclass(config) else dict(config)  # type: ignore[arg-type]
    document = {
        "experiment": name,
        "device": device,
        "config": settings,
        "numbers": plain,
        "arrays": {"file": f"{device}.npz", "sha256": hashlib.sha256(archive).hexdigest()},
        "claims": _plain_claims(claims),
        "seeds": settings.get("seeds"),
        "times": times,
        "code": provenance.code(name),
        **provenance.surroundings(),
    }
    if columns:
        document["columns"] = [column._asdict() for column in columns]
    text = _json(_sealed(_encode(document, "result")))
    place = Path(folder) / name
    with files.explained(f"the result of {name} cannot be written"):
        place.mkdir(parents=True, exist_ok=True)
    json_path, npz_path = place / f"{device}.json", place / f"{device}.npz"
    waiting = atomic.temporary(json_path)
    atomic.write(waiting, text)
    try:
        atomic.write(npz_path, archive)
        os.replace(waiting, json_path)
    finally:
        if not _belongs(waiting, npz_path):
            waiting.unlink(missing_ok=True)
    return json_path


def read(folder: str | Path, name: str, device: str, sealed: bool = True) -> Result:
    """Read back what `write` wrote: arrays from the npz, the rest from the JSON.

    Raises FileNotFoundError where there is no such result, OSError where it cannot be read, ValueError where a file is
    truncated, is not what its name says, was changed since it was written (unless `sealed` is False), or where the
    JSON and the npz do not belong together.
    """
    json_path, npz_path = (Path(folder) / name / f"{device}.{kind}" for kind in ("json", "npz"))
    again = f"run `python -m experiments {name}` again"
    with files.explained(f"the result of {name} on {device} cannot be read"):
        for path in (json_path, npz_path):
            if not path.is_file():
                raise FileNotFoundError(f"no result of {name} on {device}: {path} is missing; {again}")
        archive = npz_path.read_bytes()
        digest = hashlib.sha256(archive).hexdigest()
        document = _document(json_path, again)
        if document["arrays"]["sha256"] != digest and _finish(json_path, digest):
            document = _document(json_path, again)
    arrays = _arrays(npz_path, archive, again)
    if document["arrays"]["sha256"] != digest:
        raise ValueError(f"{json_path} and {npz_path.name} are not of one run (sha256 differs); {again}")
    if sealed and "results" in _changed(json_path, document):
        raise ValueError(f"{json_path} was changed since it was written (sha256 differs); {again}")
    document = _decode(document)
    kept = ("versions", "machine", "precision", "seeds", "code")
    return Result(
        name=document["experiment"],
        device=document["device"],
        config=document["config"],
        numbers={**document["numbers"], **arrays},
        claims=tuple(Claim(**claim) for claim in document["claims"]),
        times=document["times"],
        provenance={key: document.get(key) for key in kept} | {"sha256": digest},
        columns=tuple(Column(**{**c, "levels": tuple(c["levels"])}) for c in document.get("columns", ())),
    )


def digest(numbers: dict[str, Any]) -> str:
    """The sha256 of the npz that `write` would write."""
    return hashlib.sha256(npz(_split(numbers)[1])).hexdigest()


def as_saved(numbers: dict[str, Any]) -> dict[str, Any]:
    """The numbers as `read` will give them back, without a file in between."""
    plain, arrays = _split(numbers)
    return {**_decode(json.loads(json.dumps(_encode(plain, "numbers")))), **arrays}


def reclaim(folder: str | Path, result: Result) -> None:
    """Put a result's claims into its saved JSON where that has others; everything else in it stays."""
    path = Path(folder) / result.name / f"{result.device}.json"
    document = json.loads(path.read_text(encoding="utf-8"))
    claims = _plain_claims(result.claims)
    if document["claims"] != claims:
        atomic.write(path, _json(_sealed(document | {"claims": claims}, only="claims")))


def edited(folder: str | Path, name: str, device: str) -> list[str]:
    """Which parts of a saved JSON (`results`, `claims`) are not what was written, or have no hash to tell by."""
    path = Path(folder) / name / f"{device}.json"
    return _changed(path, _document(path, f"run `python -m experiments {name}` again"))


def seal(folder: str | Path, name: str, device: str) -> str:
    """The hash of a saved result: of all but its claims."""
    path = Path(folder) / name / f"{device}.json"
    return _digests(_document(path, f"run `python -m experiments {name}` again"))["results"]


def has_seal(folder: str | Path, name: str, device: str, expected: str) -> bool:
    """Whether a result is there and has this seal: what was found about it still is about it."""
    return (Path(folder) / name / f"{device}.json").is_file() and seal(folder, name, device) == expected


def _changed(path: Path, document: dict[str, Any]) -> list[str]:
    changed = [part for part, digest in _digests(document).items() if document["sha256"].get(part) != digest]
    # A digit too many is another text for the same number.
    same = path.read_text(encoding="utf-8") == _json(document).decode()
    return changed if changed or same else ["results"]


def code_digest(result: Result) -> str:
    """One number for all of `code` at the time of a run, 16 digits: two runs that share it ran the same source."""
    lines = (f"{digest} {module}\n" for module, digest in sorted(result.provenance["code"].items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


@contextlib.contextmanager
def lock(folder: str | Path) -> Iterator[None]:
    """Keep other writers out of a folder for as long as the block; BlockingIOError where one is in it already.

    The lock is on the folder itself and the kernel lets it go when the process ends, however it ends: nothing is
    left behind by a kill or a reboot. Where the system or the file system has no such locks there is none.
    """
    place = Path(folder)
    try:
        import fcntl
    except ModuleNotFoundError:  # Windows
        yield
        return
    with files.explained(f"nothing can be written to {place}"):
        place.mkdir(parents=True, exist_ok=True)
        handle = os.open(place, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another study is writing to {place}") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def saved(folder: str | Path) -> list[tuple[str, str]]:
    """`(experiment, device)` of every result in `folder`, sorted."""
    paths = Path(folder).glob("*/*.json")
    # What verify keeps lies there, too: of an experiment, `cpu.spread.json`; of the quick results, in their folder.
    return sorted((path.parent.name, path.stem) for path in paths if path.stem in DEVICES)


def _belongs(json_path: Path, npz_path: Path) -> bool:
    """Whether a JSON is there that records the sha256 of the npz."""
    try:
        recorded = json.loads(json_path.read_bytes())["arrays"]["sha256"]
        return recorded == hashlib.sha256(npz_path.read_bytes()).hexdigest()
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _finish(json_path: Path, digest: str) -> bool:
    """Finish a `write` that was stopped between its two renames; whether there was one."""
    waiting = atomic.temporary(json_path)
    if not _belongs(waiting, json_path.with_suffix(".npz")):
        return False
    os.replace(waiting, json_path)
    return True


def _document(path: Path, again: str) -> dict[str, Any]:
    """The JSON as it is written, once it is seen to be a result."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not whole JSON ({error}); {again}") from None
    kinds = {
        "experiment": str,
        "device": str,
        "config": dict,
        "numbers": dict,
        "arrays": dict,
        "claims": list,
        "times": dict,
        "versions": dict,
        "machine": dict,
        "sha256": dict,
    }
    for key, kind in kinds.items():
        if not isinstance(document, dict) or not isinstance(document.get(key), kind):
            raise ValueError(f"{path} is not a result: it has no {key!r}; {again}")
    if not isinstance(document["arrays"].get("sha256"), str):
        raise ValueError(f"{path} is not a result: it has no 'sha256' of its arrays; {again}")
    if any(not isinstance(claim, dict) or set(claim) != set(Claim._fields) for claim in document["claims"]):
        raise ValueError(f"{path} is not a result: a claim is not whole; {again}")
    return document


def _arrays(path: Path, archive: bytes, again: str) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(archive), allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except Exception as error:  # damaged bytes make NumPy and zipfile raise anything
        raise ValueError(f"{path} is not a whole npz file ({error}); {again}") from None


def _plain_claims(claims: Sequence[Claim]) -> list[dict[str, Any]]:
    return [{**claim._asdict(), "holds": bool(claim.holds)} for claim in claims]


def _sealed(document: dict[str, Any], only: str | None = None) -> dict[str, Any]:
    """The plain document with the hashes of its parts; `only` one of them renewed."""
    fresh = _digests(document)
    return document | {"sha256": fresh if only is None else {**document["sha256"], only: fresh[only]}}


def _digests(document: dict[str, Any]) -> dict[str, str]:
    """The sha256 of the claims, which follow the code, and of everything else, which a run made."""
    results = {key: value for key, value in document.items() if key not in ("claims", "sha256")}
    return {
        part: hashlib.sha256(_json(content)).hexdigest()
        for part, content in (("claims", document["claims"]), ("results", results))
    }


def _json(document: Any) -> bytes:
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def npz(arrays: dict[str, np.ndarray], compressed: bool = False) -> bytes:
    """The bytes of an npz: members sorted, stored, dated 1980, so that equal arrays give equal bytes.

    Compressed, they depend on the version of zlib too.
    """
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(arrays):
            member = io.BytesIO()
            np.lib.format.write_array(member, arrays[key], allow_pickle=False)
            info = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            info.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            archive.writestr(info, member.getvalue())
    return buffer.getvalue()


def _split(numbers: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What goes to the JSON and what to the npz; NumPy's scalars (not its 0-d arrays) are plain numbers."""
    arrays = {
        key: _array(key, value)
        for key, value in numbers.items()
        if hasattr(value, "__array__") and not isinstance(value, np.generic)
    }
    return {key: value for key, value in numbers.items() if key not in arrays}, arrays


def _array(key: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biufcU":
        raise TypeError(f"number {key!r} has dtype {array.dtype}; it must be numeric, bool or unicode")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).reshape(array.shape)


def _encode(value: Any, where: str) -> Any:
    """Plain data as JSON can hold it; a float that JSON lacks becomes `{"float": "nan"}`."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if np.isfinite(value) else {"float": repr(value)}
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, list | tuple):
        return [_encode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _encode(item, f"{where}[{key!r}]") for key, item in value.items()}
    kind = type(value).__name__
    raise TypeError(f"{where} is a {kind}; it must be an array, a scalar, a string or a list of them")


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if isinstance(value, dict):
        return float(value["float"]) if set(value) == {"float"} else {k: _decode(v) for k, v in value.items()}
    return value
