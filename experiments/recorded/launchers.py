"""`gd_vs_sgd` under schedulers, against one process, recorded: `python -m experiments.recorded.launchers`.

`python -m experiments gd_vs_sgd --quick` alone, under `mpirun -n 2` and under `srun -n 2` (Slurm with slurmctld and
slurmd running), whichever is installed. Compared are all curves: the largest difference of the excess loss, over
its value at the start, and whether each batch size chose the same step size. Written to
`results/scaling/recorded/engines.json`.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from experiments.engine import provenance, results
from experiments.recorded import tables

STUDY = ["python", "-m", "experiments", "gd_vs_sgd", "--quick", "--out"]
ENGINES = {
    "mpirun": ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"],
    "srun": ["srun", "-n", "2", "--kill-on-bad-exit=1"],
}
BOUND = 1e-5
"""Largest difference that counts as agreement: float32."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.recorded.launchers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(argv)
    engines = {name: prefix for name, prefix in ENGINES.items() if shutil.which(name)}
    if not engines:
        print("neither mpirun nor srun is installed here", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="engines-") as scratch:
        folder = Path(scratch)
        alone = _study([], folder / "one")
        found = {}
        for name, prefix in engines.items():
            runs = compare(alone, _study(prefix, folder / name))
            found[_version(name)] = {
                "command": " ".join([*prefix, *STUDY, "two"]),
                "agreement_with_one_process": runs,
            }
    record = {"against": " ".join([*STUDY, "one"]), "engines": found, **provenance.surroundings()}
    print(tables.write("engines", record))
    return int(not all(agrees(engine["agreement_with_one_process"]) for engine in found.values()))


def _study(prefix: list[str], out: Path) -> dict[str, Any]:
    """The numbers of a run."""
    command = [*prefix, sys.executable, *STUDY[1:], str(out)]
    print(" ".join([*prefix, *STUDY, out.name]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=280)
    if done.returncode not in (0, 1) or not (out / "gd_vs_sgd" / "cpu.json").exists():  # 1: a claim does not hold
        raise RuntimeError(f"{' '.join(prefix) or 'one process'} ended with status {done.returncode}:\n{done.stderr}")
    joined = f"of {prefix[prefix.index('-n') + 1]} joined" if prefix else ""
    if joined not in done.stderr:
        raise RuntimeError(f"{prefix[0]} ran processes that did not find each other:\n{done.stderr}")
    return results.read(out, "gd_vs_sgd", "cpu").numbers


def compare(one: dict[str, Any], two: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of each problem and batch size: the largest difference of its curves, and whether the step sizes are the same."""
    found = {}
    for problem in one["problems"]:
        for label in one[f"{problem}/labels"]:
            run = f"{problem}/{label}"
            a, b = (np.asarray(numbers[f"{run}/excess"], float) for numbers in (one, two))
            away = np.abs(a - b).max() / one[f"{problem}/start"] if a.shape == b.shape else np.inf
            found[run] = {
                "largest_difference_of_the_excess_over_the_start": float(away),
                "same_step_size": bool(one[f"{run}/eta"] == two[f"{run}/eta"]),
            }
    return found


def agrees(runs: dict[str, dict[str, Any]]) -> bool:
    """Whether all curves are the same but for rounding."""
    return all(
        run["largest_difference_of_the_excess_over_the_start"] <= BOUND and run["same_step_size"]
        for run in runs.values()
    )


def _version(engine: str) -> str:
    words = subprocess.run([engine, "--version"], capture_output=True, text=True).stdout.split("\n")[0].split()
    return f"{'Open MPI' if engine == 'mpirun' else 'Slurm'} {words[-1]}"


if __name__ == "__main__":
    sys.exit(main())
