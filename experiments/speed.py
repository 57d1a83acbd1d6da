"""The race: how fast this loop is, against what a person would pick instead, and against what the machine can do.

The same descent (plain steps of constant size on the mean loss, float32, the same data, start and number of passes) by
this package and by its peers, each as its users write it (`experiments.contenders`) and each **in a process of its
own, in turn**, since in one process the thread pools of one library slow another by several times. A round times
every contender once, forwards and backwards by turns; ratios are taken within rounds. What counts is whole steps:
drawing the examples, fetching them, gradient, update; the device is waited for. Compiling and evaluating do not count.
A peer with several usual ways to write it races in the one that is fastest on the case.

Step sizes are such that every run follows the same smooth path, whatever the order of its examples: so the final
losses of all must agree, and one that took other steps is found out and **not compared**.

The floor is what the machine allows: the bytes of data that a step must read, at the rate of a pass that only
reads them, measured in the same rounds; or its operations at the rate of a large product of matrices.
"""

import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxgrad
from experiments import plots
from experiments.contenders import CONTENDERS, Case, bytes_moved, operations, takes
from experiments.report import brief
from experiments.results import Claim
from jaxgrad import data as datasets
from jaxgrad import descend, full_batch, losses, models, reshuffled, timing
from jaxgrad.descent import advance, init
from jaxgrad.types import Batch, Sampling

OURS, FLOOR = "jaxgrad", "floor"
PEERS = tuple(name for name in CONTENDERS if name not in (OURS, FLOOR))
EVERY_BATCH = (1, 8, 32, 256, 0)


@dataclass(frozen=True)
class Config:
    race: tuple[tuple[str, str, tuple[int, ...]], ...] = (
        ("linear", "diamonds", EVERY_BATCH),
        ("linear", "synthetic", EVERY_BATCH),
        ("linear", "mnist5k", EVERY_BATCH),
        ("logistic", "shuttle", (1, 32, 0)),
        ("logistic", "synthetic", (1, 32, 0)),
        ("logistic", "mnist5k", (1, 32, 0)),
        ("two-layer", "diamonds", (1, 32, 0)),
        ("two-layer", "synthetic", EVERY_BATCH),
        ("two-layer", "mnist5k", (1, 32, 0)),
        ("linear", "beyond cache", (0,)),
        ("logistic", "beyond cache", (0,)),
    )
    """Problem, data and batch sizes (0 is the full batch)."""
    compiled: tuple[tuple[str, str, int], ...] = (
        ("linear", "synthetic", 32),
        ("two-layer", "synthetic", 32),
        ("linear", "beyond cache", 0),
    )
    """Cases in which torch.compile runs too: it takes many seconds to compile each."""
    rows: int = 20_000
    """n of the synthetic data, of 64 columns."""
    caches: float = 10.0
    """The data beyond cache are so many times the size of the last-level cache."""
    compared: int = 4000
    """Final losses are compared after a pass, but after so many steps at most."""
    full_steps: int = 20
    """The same of full-batch steps (a quarter of them beyond cache)."""
    rounds: int = 7
    min_seconds: float = 0.015
    """Each contender runs at least this long per round."""
    patience: float = 120.0
    """Seconds after which a contender that does not answer is given up."""
    runs_together: int = 256
    run_rows: int = 6400
    """256 runs of one pass over so many rows, together and one by one."""
    starts: tuple[str, ...] = ("descent_paths", "gd_vs_sgd", "learning_rate")
    """Experiments that are started twice, to see what the second start saves."""
    start_rounds: int = 2
    import_rounds: int = 7


TIMED = True
QUICK = Config(
    race=(("linear", "synthetic", (1, 32, 0)), ("two-layer", "synthetic", (32,))),
    compiled=(),
    rows=2000,
    rounds=6,
    min_seconds=0.002,
    runs_together=16,
    run_rows=640,
    starts=(),
    import_rounds=0,
)

HORIZON = {"linear": 0.2, "logistic": 1.0, "two-layer": 0.05}
"""Step size times steps: how far along its path a run gets."""
AGREE = {"SGD": 0.05, "GD": 1e-3}
"""By how much of the loss's decrease final losses may differ: SGD, whose orders differ, and the full batch."""
COLUMNS = 64
PARTS = ("drawing indices", "fetching rows", "gradient", "update", "loop")


def run(config: Config, progress: Callable[[str], None]) -> dict[str, Any]:
    device = jax.default_backend()
    with tempfile.TemporaryDirectory(prefix="speed-") as scratch:
        folder = Path(scratch)
        cases = _cases(config, folder)
        numbers = _race(config, cases, folder, device, progress)
        progress("many runs at once")
        numbers |= _many_runs(config)
        progress("where a step's time goes")
        numbers |= _profile(config)
        progress("imports and starts")
        return numbers | _imports(config.import_rounds) | _starts(config, folder)


# --- the race ------------------------------------------------------------------------------------------------------


def _cases(config: Config, folder: Path) -> list[Case]:
    """The cases, and the files of their data."""
    cases, shapes = [], {}
    for problem, name, batch_sizes in config.race:
        if name not in shapes:
            x, targets = _data(name, config)
            np.save(folder / f"{name}.x.npy", x)
            for target, y in targets.items():
                np.save(folder / f"{name}.{target}.npy", y)
            shapes[name] = x.shape
        n, d = shapes[name]
        for b in batch_sizes:
            full = max(1, config.full_steps // (4 if name == "beyond cache" else 1))
            steps = min(n // b, config.compared) if b else full
            cases.append(Case(problem, name, n, d, b, HORIZON[problem] / steps, steps))
    return cases


def _data(name: str, config: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Examples, and targets to regress on or 0/1 labels or both."""
    if name in ("synthetic", "beyond cache"):
        n = config.rows if name == "synthetic" else int(config.caches * last_level_cache() / (4 * COLUMNS))
        rng = np.random.default_rng(0)
        x = rng.standard_normal((n, COLUMNS), np.float32)
        y = x @ rng.standard_normal(COLUMNS, np.float32) / np.float32(8)
        y += rng.standard_normal(n, np.float32)
        return x, {"numbers": y, "labels": (y > 0).astype(np.float32)}
    loaded = datasets.load(name)
    x, y = (np.ascontiguousarray(leaf, np.float32) for leaf in loaded.batch)
    if loaded.task == "classes":
        odd = y % 2
        return x, {"numbers": odd, "labels": odd}
    return x, {"labels" if loaded.task == "binary" else "numbers": y}


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, as Linux tells; 32 MiB where it does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [2**25]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()):
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes[1:] or sizes)


class Process(NamedTuple):
    """A contender's process; it waits, asleep, while others have their turn."""

    name: str
    handle: "subprocess.Popen[str]"
    errors: IO[bytes]
    patience: float


class Lost(Exception):
    """A contender's process ended or was given up; the message says why."""


@contextmanager
def contender(name: str, device: str, folder: Path, patience: float) -> Iterator[Process]:
    """A process for a contender, which ends with the block."""
    # Compiling is reported, so what others compiled before must not be found.
    env = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            [sys.executable, "-m", "experiments.contenders", name, device, str(folder)],
            cwd=Path(__file__).parents[1], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
            text=True,
        ) as handle,
    ):  # fmt: skip
        try:
            yield Process(name, handle, errors, patience)
        finally:
            handle.kill()


def ask(process: Process, request: dict[str, Any]) -> dict[str, Any]:
    """One request and its answer. Raises Lost where none comes: the process has ended, or is given up and killed."""
    handle = process.handle
    assert handle.stdin is not None
    assert handle.stdout is not None
    timer = threading.Timer(process.patience, handle.kill)
    timer.start()
    began = time.perf_counter()
    try:
        handle.stdin.write(json.dumps(request) + "\n")
        handle.stdin.flush()
        line = handle.stdout.readline()
    except BrokenPipeError:
        line = ""
    finally:
        timer.cancel()
    if line:
        return json.loads(line)
    if time.perf_counter() - began >= process.patience:
        raise Lost(f"no answer within {process.patience:g} s")
    process.errors.seek(0)
    said = process.errors.read().decode(errors="replace").strip().splitlines()
    raise Lost(f"its process ended with status {handle.wait()}" + (f": {said[-1][:200]}" if said else ""))


def _race(
    config: Config, cases: list[Case], folder: Path, device: str, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Seconds per step `[cases, rounds]` of every contender, and what it said of each case."""
    count = len(cases)
    numbers: dict[str, Any] = {
        **{field: np.array([getattr(case, field) for case in cases]) for field in Case._fields},
        "cache": last_level_cache(),
        "cores": os.cpu_count() or 1,
        "contenders": list(CONTENDERS),
    }
    for name in CONTENDERS:
        numbers |= {
            f"seconds/{name}": np.full((count, config.rounds), np.nan),
            f"first_call/{name}": np.full(count, np.nan),
            f"loss/{name}": np.full(count, np.nan),
            f"absent/{name}": "",
        }
        ways, faults = [""] * count, [""] * count
        numbers |= {f"way/{name}": ways, f"fault/{name}": faults}
    with ExitStack() as stack:
        running: dict[str, Process] = {}

        def tell(name: str, request: dict[str, Any]) -> dict[str, Any] | None:
            """The answer; None where there is none, and then why is noted."""
            try:
                answer = ask(running[name], request)
            except Lost as error:
                answer = {"failed": str(error)}
                # The next case may do: a new process for it.
                running[name] = stack.enter_context(contender(name, device, folder, config.patience))
            if "absent" in answer:
                numbers[f"absent/{name}"] = answer["absent"]
                running.pop(name).handle.kill()
            elif "failed" in answer:
                numbers[f"fault/{name}"][at] = answer["failed"]
            else:
                return answer
            return None

        def eligible(name: str, case: Case) -> bool:
            if name == "torch.compile" and (case.problem, case.data, case.b) not in config.compiled:
                return False
            return name in running and takes(name, case, device)

        for name in CONTENDERS:
            if any(takes(name, case, device) for case in cases):
                running[name] = stack.enter_context(contender(name, device, folder, config.patience))
        at = 0
        numbers["peak"] = (tell(FLOOR, {"peak": True}) or {"peak": math.nan})["peak"]
        for at, case in enumerate(cases):  # noqa: B007 (tell notes where it was)
            progress(f"race {at + 1} of {count}: {_name(case.problem, case.data, case.d, case.b)}")
            ready = []
            for name in [name for name in CONTENDERS if eligible(name, case)]:
                if answer := tell(name, {"prepare": case, "min_seconds": config.min_seconds}):
                    ready.append(name)
                    numbers[f"way/{name}"][at] = answer["way"]
                    numbers[f"first_call/{name}"][at] = answer["first_call"]
                    numbers[f"loss/{name}"][at] = answer["loss"]
            for k in range(config.rounds):
                for name in list(ready):
                    if answer := tell(name, {"round": k}):
                        numbers[f"seconds/{name}"][at, k] = answer["seconds"]
                    else:
                        ready.remove(name)
                ready.reverse()
    for name in CONTENDERS:
        for field in ("way", "fault"):
            numbers[f"{field}/{name}"] = np.array(numbers[f"{field}/{name}"])
    numbers["start_loss"] = np.array([_start_loss(case, folder) for case in cases])
    numbers["operations"] = np.array([operations(case) for case in cases])
    numbers["bytes"] = np.array([bytes_moved(case) for case in cases])
    return numbers


def _start_loss(case: Case, folder: Path) -> float:
    from experiments.contenders import first_point, full_loss

    y = np.load(folder / f"{case.data}.{'labels' if case.problem == 'logistic' else 'numbers'}.npy")
    return full_loss(case, first_point(case), np.load(folder / f"{case.data}.x.npy", mmap_mode="r"), y)


# --- the rest ------------------------------------------------------------------------------------------------------


def _many_runs(config: Config) -> dict[str, Any]:
    """Seconds `[rounds]` of many runs (linear, b = 32, d = 64, one pass) in one program and one after the other."""
    x, targets = _data("synthetic", config)
    data = Batch(jnp.asarray(x[: config.run_rows]), jnp.asarray(targets["numbers"][: config.run_rows]))
    loss, start, steps = losses.mean_loss(models.linear, losses.squared), models.init_linear(COLUMNS), len(data.y) // 32
    keys = jax.random.split(jax.random.key(0), config.runs_together)

    def seconds(key: Any) -> float:
        trace = descend(
            loss, start, data, optimizer=1e-3, sampling=reshuffled(32), steps=steps, record=[steps], key=key
        )
        return float(trace.seconds[-1])

    seconds(keys), seconds(keys[0])  # compile
    pairs = [(seconds(keys), sum(seconds(key) for key in keys)) for _ in range(config.rounds)]
    together, single = np.array(pairs).T
    return {"together": together, "one_by_one": single, "runs_together": config.runs_together, "run_steps": steps}


def _profile(config: Config) -> dict[str, Any]:
    """Seconds per step `[parts, rounds]` of what a step consists of, found by leaving out one part after another.

    Whole; with b rows in a row instead of drawn ones; with one batch that needs no fetching; with a loss that is the
    sum of the parameters; with an optimiser that does nothing. What each saves is that part's, and the rest the loop's.
    """
    x, targets = _data("synthetic", config)
    data = Batch(jnp.asarray(x), jnp.asarray(targets["numbers"]))
    n, found = len(x), {}
    loss, start = losses.mean_loss(models.linear, losses.squared), models.init_linear(COLUMNS)
    go = jax.jit(advance, static_argnames=("loss", "optimizer", "sampling"))

    def total(params: Any, _: Any) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    def in_a_row(key: Any, step: Any, n: int, b: int) -> Any:
        return (step * b) % (n - b + 1) + jnp.arange(b, dtype=jnp.int32)

    sgd = optax.sgd(1e-6)
    for b in (1, 32, 0):
        steps = max(1, 65_536 // b) if b else 20
        batch = data if b == 0 else jax.tree.map(lambda leaf, b=b: leaf[:b], data)
        drawn = reshuffled(b) if b else full_batch()
        programs = {
            "whole": (drawn, data, loss, sgd),
            "in a row": (Sampling("rows in a row", b, in_a_row) if b else drawn, data, loss, sgd),
            "one batch": (full_batch(), batch, loss, sgd),
            "no gradient": (full_batch(), batch, total, sgd),
            "no update": (full_batch(), batch, total, optax.set_to_zero()),
        }
        if b == 0:
            del programs["in a row"], programs["one batch"]  # the full batch is neither drawn nor fetched

        def thunk(sampling: Any, data: Any, loss: Any, optimizer: Any, steps: int = steps) -> Callable[[], Any]:
            state, key = init(start, optimizer), jax.random.key(0)
            return lambda: go(state, key, data, steps, loss=loss, optimizer=optimizer, sampling=sampling)

        took = timing.race(
            {name: thunk(*parts) for name, parts in programs.items()},
            repeats=config.rounds,
            min_seconds=config.min_seconds,
        )
        left = np.array([took[name].runs for name in programs]) / steps
        if b == 0:
            left = np.insert(left, 0, left[0], axis=0)
            left = np.insert(left, 0, left[0], axis=0)
        found[f"profile/{b}"] = np.vstack([left[:-1] - left[1:], left[-1:]])
    return found | {"profile_n": n}


def _imports(rounds: int) -> dict[str, Any]:
    """Seconds `[rounds]` of importing ours and of importing JAX and optax, each time in a fresh process."""
    wanted = {
        "import_ours": "from jaxgrad import Batch, descend, distinct, full_batch, reshuffled, with_replacement",
        "import_theirs": "import jax, optax",
    }
    took: dict[str, list[float]] = {name: [] for name in wanted}
    for k in range(rounds + 1 if rounds else 0):
        for name in sorted(wanted, reverse=bool(k % 2)):
            code = f"import time; t = time.perf_counter(); {wanted[name]}; print(time.perf_counter() - t)"
            done = subprocess.run(
                [sys.executable, "-c", code], cwd=Path(jaxgrad.__file__).parents[1], capture_output=True, text=True,
                check=True,
            )  # fmt: skip
            took[name].append(float(done.stdout))
    return {name: np.array(seconds[1:]) for name, seconds in took.items()}  # the first one filled the disk's cache


def _starts(config: Config, folder: Path) -> dict[str, Any]:
    """Seconds `[rounds]` of `python -m experiments --quick NAMES`: with nothing compiled before, and once more."""
    took = []
    for k in range(config.start_rounds if config.starts else 0):
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / f"compiled-{k}")}
        for setting in ("MIN_COMPILE_TIME_SECS", "MIN_ENTRY_SIZE_BYTES"):
            env.pop(f"JAX_PERSISTENT_CACHE_{setting}", None)  # what the command does by itself is measured
        for _ in range(2):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "experiments", "--quick", *config.starts, "--out", str(folder / f"out-{k}")],
                cwd=Path(__file__).parents[1], env=env, capture_output=True, check=True,
            )  # fmt: skip
            took.append(time.perf_counter() - began)
    return {"starts": np.array(took).reshape(-1, 2), "started": list(config.starts)}


# --- what the numbers say ------------------------------------------------------------------------------------------


def _name(problem: str, data: str, d: int, b: int) -> str:
    return f"{problem}, {data} (d = {d}), {f'b = {b}' if b else 'full batch'}"
