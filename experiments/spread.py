"""How far rounding moves each published number: measured, on *echoes* of the study, and saved beside it.

An echo is the whole study again, with the same programs and random numbers, on data whose columns are scaled up or
down by one unit in the last place of float32. Nobody could say that these are not the data: they were rounded to
float32 themselves. And a sum or a product in floating point, in whatever order a compiler takes it, is the exact one
of data nudged by about that much (backward error), so an echo goes astray as another compiler would make the study
go astray; that much was compared between two JAX lines (`tests/test_verify.py`). Each echo has a nudge of its own,
and two of them run on narrower vector instructions without fused multiply-add, in XLA, NumPy and BLAS, for the
numbers that hang on no data.

    results/<experiment>/<device>.spread.npz    `of/<number>`: relative deviations `[echo, ...]` from the saved
                                                number; nothing where no echo moved it. `seal`: the hash of the
                                                result that they belong to. `echoes`: what they were.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import results
from experiments.published import parts
from experiments.results import Result
from jaxgrad import atomic
from jaxgrad.types import Batch

NARROW = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}
ECHOES: dict[str, dict[str, dict[str, str]]] = {
    "cpu": {
        "SSE4.2": {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "OPENBLAS_CORETYPE": "Prescott", **NARROW},
        "all instructions": {},
        "AVX": {"XLA_FLAGS": "--xla_cpu_max_isa=AVX", "OPENBLAS_CORETYPE": "Sandybridge", **NARROW},
    },
    "gpu": {"no autotuning": {"XLA_FLAGS": "--xla_gpu_autotune_level=0"}, "as is": {}, "as is again": {}},
}
"""The environments of the echoes, by device. On another processor than x86 they have no effect, and the nudge has."""


class Spread(NamedTuple):
    echoes: tuple[str, ...]
    moved: dict[str, np.ndarray]
    """Relative deviations of the echoes from the published number, per part `[echo, ...]`; 0 where it is not listed."""

    def of(self, part: str, shape: tuple[int, ...]) -> np.ndarray:
        return self.moved.get(part, np.zeros((len(self.echoes), *shape)))


def nudged(load: Callable[..., Any], seed: int) -> Callable[..., Any]:
    """`data.load`, with every floating-point column scaled by one unit in the last place, up or down."""

    def nudge(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
        up = random.integers(0, 2, values.shape[1:]).astype(bool)
        towards = np.where(up, np.copysign(np.inf, values), 0).astype(values.dtype)
        return np.where(values == 0, values, np.nextafter(values, towards))

    def loaded(*arguments: Any, **options: Any) -> Any:
        dataset, random = load(*arguments, **options), np.random.default_rng(seed)
        x, y = dataset.batch
        # Labels are what they are.
        moved = Batch(nudge(x, random), nudge(y, random) if dataset.task == "regression" else y)
        return dataset._replace(batch=moved)

    return loaded


def deviations(old: Result, new: Result, declared: dict[str, str]) -> dict[str, np.ndarray]:
    """By how much each part of a re-run deviates: relative to the saved number (to 1 for a saved 0).

    Times deviate by the logarithm, less the median of all: how much faster the machine was.
    """
    before, after = (parts(old.name, result.numbers, declared) for result in (old, new))
    out = {}
    for name, part in before.items():
        if name in after and comparable(part.value, after[name].value) and part.kind.name not in ("exact", "machine"):
            a, b = (np.asarray(value, float) for value in (part.value, after[name].value))
            if part.kind.name == "timing":
                out[name] = log_ratio(part.kind.axis, a, b)
            else:
                with np.errstate(invalid="ignore", over="ignore"):
                    away = (b - a) / np.where(a == 0, 1, np.abs(a))
                out[name] = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, away)
    pace = median_pace(before, out)
    return {k: v - pace if before[k].kind.name == "timing" and not before[k].kind.by else v for k, v in out.items()}


def median_pace(before: dict[str, Any], logs: dict[str, np.ndarray]) -> float:
    """The median logarithm over all seconds: how much slower everything was."""
    seconds = [logs[k].ravel() for k in logs if before[k].kind.name == "timing" and not before[k].kind.by]
    finite = [values[np.isfinite(values)] for values in seconds]
    return float(np.median(np.concatenate(finite))) if sum(map(len, finite)) else 0.0


def log_ratio(repeats: int | None, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Logarithm of new over old times, of their medians where an axis is that of repeats."""
    with np.errstate(divide="ignore", invalid="ignore"):
        a, b = (np.log(values) for values in (old, new))
        return b - a if repeats is None else np.median(b, axis=repeats) - np.median(a, axis=repeats)


def comparable(old: Any, new: Any) -> bool:
    """Whether both are numbers of one shape."""
    return np.shape(old) == np.shape(new) and all(np.asarray(value).dtype.kind in "fiu" for value in (old, new))


def write(folder: str | Path, old: Result, echoes: dict[str, Result], declared: dict[str, str]) -> Path:
    """Write the deviations of the echoes of a saved result beside it; returns the path."""
    found = [deviations(old, echo, declared) for echo in echoes.values()]
    # What is missing from an echo, or has another shape there, has no spread.
    common = sorted(set.intersection(*map(set, found)))
    with np.errstate(over="ignore"):
        arrays = {f"of/{part}": np.stack([one[part] for one in found]).astype(np.float32) for part in common}
    arrays = {key: value for key, value in arrays.items() if value.any()}
    seal = results.seal(folder, old.name, old.device)
    path = _path(folder, old)
    atomic.write(
        path, results.npz(arrays | {"echoes": np.array(list(echoes)), "seal": np.array(seal)}, compressed=True)
    )
    return path


def read(folder: str | Path, old: Result) -> Spread | None:
    """The spread that was recorded for these very numbers, if there is one."""
    path = _path(folder, old)
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:  # damaged bytes make NumPy and zipfile raise anything
        raise ValueError(
            f"{path} is not a whole npz file ({error}); run `python -m experiments spread` again"
        ) from None
    if str(arrays.pop("seal")) != results.seal(folder, old.name, old.device):
        return None
    echoes = tuple(arrays.pop("echoes").tolist())
    return Spread(echoes, {key.removeprefix("of/"): value.astype(float) for key, value in arrays.items()})


def _path(folder: str | Path, result: Result) -> Path:
    return Path(folder) / result.name / f"{result.device}.spread.npz"


def nudge_data(seed: int) -> None:
    """Let every experiment of this process load nudged data."""
    from jaxgrad import data

    data.load = nudged(data.load, seed)


if __name__ == "__main__":
    # python -m experiments.spread SEED ARGUMENTS: one echo of `python -m experiments ARGUMENTS`.
    from experiments import work
    from experiments.__main__ import main
    from jaxgrad import commandline

    work.nudge = int(sys.argv[1])
    nudge_data(work.nudge)
    commandline.leave(commandline.outcome(lambda: main(sys.argv[2:])))
