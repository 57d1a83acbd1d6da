"""Runs too heavy for the study, recorded once: `python -m experiments.recorded.large_file rows`.

    rows    SGD (b = 256) and one full gradient over 10^8 rows x 8 float32 (3.2 GB) in a file, beside the same in
            memory and beside reading the file

Each contender is a process of its own, so that its peak of resident memory is its own. The file lies in a temporary
folder and is read once beforehand, so that all find it in the page cache: what a disk adds is not seen. They run in
turns, twice, and the faster of the two counts: the memory of a shared machine is now fast, now slow. Written to
`results/scaling/recorded/`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from experiments.support.exact import normal
from jaxgrad import atomic

COLUMNS, B, CHUNK = 8, 256, 2**20
ROUNDS, PASSES = 2, 5


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.recorded.large_file",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["rows"])
    parser.add_argument("--rows", type=int, default=10**8, help="how many rows (default: 10^8)")
    parser.add_argument("--steps", type=int, default=100_000, help="steps of SGD (default: 100,000)")
    parser.add_argument("--file", type=Path, help="keep the file of rows here, and use it again")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.contender:
        print(json.dumps(CONTENDERS[arguments.contender](arguments.file, arguments.steps) | {"peak_rss_gib": _peak()}))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.file or Path(folder) / "rows.npy"
        if not file.exists():
            _generate(file, arguments.rows)
        _read_all(file)
        rounds = [{name: _in_a_process(name, file, arguments.steps) for name in CONTENDERS} for _ in range(ROUNDS)]
    from experiments.engine import provenance
    from experiments.recorded import tables

    found = {name: max((turn[name] for turn in rounds), key=_speed) for name in CONTENDERS}
    disk, memory, gradient, reading = (found[name] for name in ("disk", "memory", "gradient", "reading"))
    record = {
        "command": "python -m experiments.recorded.large_file rows",
        "rows": arguments.rows,
        "columns": COLUMNS,
        "b": B,
        "steps": arguments.steps,
        "gigabytes": arguments.rows * COLUMNS * 4 / 1e9,
        **found,
        "page_cache": "warm",
        "speeds_in_turns": {name: [_speed(turn[name]) for turn in rounds] for name in CONTENDERS},
        "steps_per_second_disk_over_memory": disk["steps_per_second"] / memory["steps_per_second"],
        "gradient_over_reading": gradient["gigabytes_per_second"] / reading["gigabytes_per_second"],
        "same_parameters": disk["w"] == memory["w"],
        **provenance.surroundings(),
    }
    print(tables.write("rows", record))
    return 0


def _generate(file: Path, rows: int) -> None:
    rng, weights = np.random.default_rng(0), np.arange(1, COLUMNS, dtype=np.float32)
    with atomic.replacing(file) as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "<f4", "fortran_order": False, "shape": (rows, COLUMNS)})
        for first in range(0, rows, CHUNK):
            # 16 bits: below 256 their sums with whole weights are exact in float32, in any order.
            part = normal(rng, (min(CHUNK, rows - first), COLUMNS), bits=16, dtype=np.float32)
            part[:, -1] += part[:, :-1] @ weights
            out.write(part.data)
            print(f"\r{first:,} of {rows:,} rows", end="", file=sys.stderr)


def _read_all(file: Path) -> float:
    """Seconds to read the file once, into one buffer."""
    buffer, began = bytearray(2**22), time.perf_counter()
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    return time.perf_counter() - began


def _in_a_process(name: str, file: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "experiments.recorded.large_file", "rows", "--contender", name]
    print(f"\n{name}", file=sys.stderr)
    done = subprocess.run(
        [*command, "--file", str(file), "--steps", str(steps)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def _speed(found: dict[str, Any]) -> float:
    return found["steps_per_second"] if "steps_per_second" in found else found["gigabytes_per_second"]


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _sgd(data: Any, steps: int) -> dict[str, Any]:
    import jax

    from jaxgrad import descend, distinct, losses, models

    loss = losses.mean_loss(models.linear, losses.squared)
    run = descend(
        loss,
        models.init_linear(COLUMNS - 1),
        data,
        optimizer=0.01,
        sampling=distinct(B),
        steps=steps,
        key=jax.random.key(0),
        record=[steps],
    )
    return {"steps_per_second": steps / float(run.seconds[-1]), "w": np.asarray(run.params.w).tolist()}


def _disk(file: Path, steps: int) -> dict[str, Any]:
    from jaxgrad import open_rows

    # The full loss is no part of this: a record point would be a pass over the file.
    return _sgd(open_rows(file, target=-1)._replace(full=lambda params: np.float32(np.nan)), steps)


def _memory(file: Path, steps: int) -> dict[str, Any]:
    import jax.numpy as jnp

    from jaxgrad import Batch

    table = np.load(file)
    return _sgd(Batch(jnp.asarray(table[:, :-1]), jnp.asarray(table[:, -1])), steps)


def _gradient(file: Path, steps: int) -> dict[str, Any]:
    del steps
    import jax

    from jaxgrad import losses, models, open_rows
    from jaxgrad.descent import full_gradient

    rows = open_rows(file, target=-1)
    loss = losses.mean_loss(models.linear, losses.squared)
    start, seconds = models.init_linear(COLUMNS - 1), []
    for _ in range(1 + PASSES):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready(full_gradient(loss, start, rows))
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "gigabytes_per_second": rows.nbytes / min(seconds[1:]) / 1e9}


def _reading(file: Path, steps: int) -> dict[str, Any]:
    del steps
    seconds = [_read_all(file) for _ in range(PASSES)]
    return {"seconds": seconds, "gigabytes_per_second": file.stat().st_size / min(seconds) / 1e9}


CONTENDERS = {"disk": _disk, "memory": _memory, "gradient": _gradient, "reading": _reading}

if __name__ == "__main__":
    sys.exit(main())
