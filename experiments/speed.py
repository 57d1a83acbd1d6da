"""The race: how fast this loop is, against what a person would pick instead, and against what the machine can do.

The same descent (plain steps of constant size on the mean loss, float32, the same data, start and number of passes) by
this package and by its peers, each as its users write it (`experiments.support.contenders`) and each **in a process of
its own, in turn**, since in one process the thread pools of one library slow another by several times. A round times
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from matplotlib.figure import Figure

import jaxgrad
from experiments.engine import machine, plots
from experiments.engine.kinds import EXACT, MACHINE, Seconds
from experiments.engine.results import Claim
from experiments.engine.session import Session, side_by_side
from experiments.support.contenders import (
    CONTENDERS,
    PACKAGES,
    Case,
    bytes_moved,
    first_point,
    full_loss,
    operations,
    takes,
    target_of,
)
from experiments.support.exact import normal
from experiments.support.shared import brief
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
    )
    """Problem, data and batch sizes (0 is the full batch)."""
    compiled: tuple[tuple[str, str, int], ...] = (
        ("linear", "synthetic", 32),
        ("two-layer", "synthetic", 32),
    )
    """Cases in which torch.compile runs too: it takes many seconds to compile each."""
    rows: int = 20_000
    """n of the synthetic data, of 64 columns."""
    caches: float = 10.0
    """The data beyond cache are so many times the size of the last-level cache."""
    compared: int = 3000
    """Final losses are compared after a pass, but after so many steps at most."""
    full_steps: int = 20
    """The same of full-batch steps (a quarter of them where each takes long: the net, and beyond cache)."""
    rounds: int = 7
    min_seconds: float = 0.02
    """Each contender runs at least this long per round."""
    patience: float = 120.0
    """Seconds after which a contender that does not answer is given up."""
    runs_together: int = 256
    run_rows: int = 6400
    """256 runs of one pass over so many rows, together and one by one."""
    profiled: tuple[int, ...] = (1, 32, 0)
    """Batch sizes whose step is taken apart."""
    starts: tuple[str, ...] = (
        "gd_vs_sgd",
        "gradient_noise",
        "samplings",
        "conditioning",
        "backprop_cost",
        "detection",
    )
    """Experiments that are started twice, to see what the second start saves: every third of the study."""
    start_rounds: int = 1
    import_rounds: int = 6


TIMED = True
QUICK = Config(
    race=(("linear", "synthetic", (32,)), ("two-layer", "synthetic", (32,))),
    compiled=(),
    rows=2000,
    rounds=6,
    min_seconds=0.002,
    runs_together=16,
    run_rows=640,
    profiled=(32,),
    starts=(),
    import_rounds=0,
)
NUMBERS = {
    "problem": EXACT, "data": EXACT, "b": EXACT, "d": EXACT, "contenders": EXACT, "profile_n": EXACT,
    "profiled": EXACT, "run_steps": EXACT, "runs_together": EXACT, "started": EXACT,
    "seconds/*": Seconds(axis=1), "together": Seconds(axis=0), "one_by_one": Seconds(axis=0),
    "import_*": Seconds(axis=0), "*": MACHINE,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""

HORIZON = {"linear": 0.2, "logistic": 1.0, "two-layer": 0.05}
"""Step size times steps: how far along its path a run gets."""
AGREE = {"SGD": 0.15, "GD": 1e-5}
"""By how much of the loss's decrease final losses may differ: SGD, whose orders differ, and the full batch."""
COLUMNS = 64
PARTS = ("drawing indices", "fetching rows", "gradient", "update", "loop")


def run(config: Config, session: Session) -> dict[str, Any]:
    device = jax.default_backend()
    with tempfile.TemporaryDirectory(prefix="speed-") as scratch:
        folder = Path(scratch)
        cases = _cases(config, folder, session)
        numbers = _race(config, cases, folder, device, session)
        session.say("many runs at once")
        numbers |= _many_runs(config, session)
        session.say("where a step's time goes")
        numbers |= _profile(config, session)
        session.say("imports and starts")
        with session.alone():
            return numbers | _imports(config.import_rounds, folder) | _starts(config, folder)


# --- the race ------------------------------------------------------------------------------------------------------


def _cases(config: Config, folder: Path, session: Session) -> list[Case]:
    """The cases, and the files of their data; without data beyond cache where the memory cannot hold them."""
    cases, shapes = [], {}
    for problem, name, batch_sizes in config.race:
        if name == "beyond cache" and (needed := COPIES * config.caches * last_level_cache()) > machine.free_memory():
            session.say(
                f"{name}: left out, since all contenders together would need {needed / 2**30:.0f} GiB of memory"
            )
            continue
        if name not in shapes:
            x, targets = _data(name, config)
            np.save(folder / f"{name}.x.npy", x)
            for target, y in targets.items():
                np.save(folder / f"{name}.{target}.npy", y)
            shapes[name] = x.shape
        n, d = shapes[name]
        for b in batch_sizes:
            full = max(1, config.full_steps // (4 if name == "beyond cache" or problem == "two-layer" else 1))
            steps = min(n // b, config.compared) if b else full
            cases.append(Case(problem, name, n, d, b, HORIZON[problem] / steps, steps))
    return cases


def _data(name: str, config: Config) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Examples, and targets to regress on or 0/1 labels or both."""
    if name in ("synthetic", "beyond cache"):
        n = config.rows if name == "synthetic" else int(config.caches * last_level_cache() / (4 * COLUMNS))
        rng = np.random.default_rng(0)
        # 8 bits: what is summed are multiples of 2^-16 and stays below 256, exact in float32 in any order.
        x = normal(rng, (n, COLUMNS), bits=8, dtype=np.float32)
        y = x @ normal(rng, COLUMNS, bits=8, dtype=np.float32) / np.float32(8)
        y += normal(rng, n, bits=8, dtype=np.float32)
        return x, {"numbers": y, "labels": (y > 0).astype(np.float32)}
    loaded = datasets.load(name)
    x, y = (np.ascontiguousarray(leaf, np.float32) for leaf in loaded.batch)
    if loaded.task == "classes":
        odd = y % 2
        return x, {"numbers": odd, "labels": odd}
    return x, {"labels" if loaded.task == "binary" else "numbers": y}


COPIES = 14
"""Data beyond cache in the memory, at most: six contenders, each with its own, twice and more while it starts."""


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core, as Linux tells; 32 MiB where it does not."""
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    sizes = [2**25]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if match := re.fullmatch(r"(\d+)([KMG])", file.read_text().strip()):
            sizes.append(int(match[1]) * units[match[2]])
    return max(sizes[1:] or sizes)


_CACHE = re.compile("JAX_(COMPILATION|PERSISTENT)_CACHE_")
"""Settings of JAX's cache of compiled programs."""


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
    env = {key: value for key, value in os.environ.items() if not _CACHE.match(key)}
    # Their memory on a GPU is one, and the first would take most of it.
    env |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    with tempfile.TemporaryFile() as errors:
        handle = subprocess.Popen(
            [sys.executable, "-m", "experiments.support.contenders", name, device, str(folder)],
            cwd=Path(__file__).parents[1],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        assert handle.stdin is not None
        assert handle.stdout is not None
        try:
            yield Process(name, handle, errors, patience)
        finally:
            handle.kill()
            with suppress(BrokenPipeError):  # a request that it did not live to read
                handle.stdin.close()
            handle.stdout.close()
            handle.wait()


def ask(process: Process, request: dict[str, Any]) -> dict[str, Any]:
    """One request and its answer. Raises Lost where none comes: the process has ended, or is given up and killed."""
    handle = process.handle
    assert handle.stdin is not None
    assert handle.stdout is not None
    given_up = threading.Event()

    def give_up() -> None:
        given_up.set()
        handle.kill()

    timer = threading.Timer(process.patience, give_up)
    timer.start()
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
    if given_up.is_set():
        raise Lost(f"no answer within {process.patience:g} s")
    process.errors.seek(0)
    said = process.errors.read().decode(errors="replace").strip().splitlines()
    raise Lost(f"its process ended with status {handle.wait()}" + (f": {said[-1][:200]}" if said else ""))


def _race(config: Config, cases: list[Case], folder: Path, device: str, session: Session) -> dict[str, Any]:
    """Seconds per step `[cases, rounds]` of every contender, and what it said of each case."""
    count = len(cases)
    numbers: dict[str, Any] = {
        **{field: np.array([getattr(case, field) for case in cases]) for field in Case._fields},
        "cache": last_level_cache(),
        "cores": os.cpu_count() or 1,
        "contenders": list(CONTENDERS),
        "packages": [f"{package} {_version(package)}" for package in PACKAGES.values() if _version(package)],
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
        with session.alone():
            numbers["peak"] = (tell(FLOOR, {"peak": True}) or {"peak": math.nan})["peak"]
        for at, case in enumerate(cases):
            session.say(f"race {at + 1} of {count}: {_name(case.problem, case.data, case.d, case.b)}")

            def prepare(name: str, case: Case = case) -> dict[str, Any] | None:
                return tell(name, {"prepare": case})

            ready = [name for name in CONTENDERS if eligible(name, case)]
            first = zip(ready, side_by_side(prepare, ready), strict=True)
            ready = [name for name, answer in first if _kept(numbers, name, at, answer)]
            with session.alone():
                choice = [(name, tell(name, {"choose": True, "min_seconds": config.min_seconds})) for name in ready]
                ready = [name for name, answer in choice if _kept(numbers, name, at, answer)]
                for k in range(config.rounds):
                    took = [(name, tell(name, {"round": k})) for name in ready]
                    ready = [name for name, answer in took if _kept(numbers, name, (at, k), answer)][::-1]
    if failed := next((str(fault) for fault in numbers[f"fault/{OURS}"] if fault), ""):
        raise RuntimeError(f"{OURS} itself failed in the race: {failed}")
    for name in CONTENDERS:
        for field in ("way", "fault"):
            numbers[f"{field}/{name}"] = np.array(numbers[f"{field}/{name}"])
    numbers["start_loss"] = np.array([_start_loss(case, folder) for case in cases])
    numbers["operations"] = np.array([operations(case) for case in cases])
    numbers["bytes"] = np.array([bytes_moved(case) for case in cases])
    return numbers


def _version(package: str) -> str:
    """The installed version; empty where there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _kept(numbers: dict[str, Any], name: str, at: Any, answer: dict[str, Any] | None) -> bool:
    """Note what a contender answered; whether it did."""
    for field, value in (answer or {}).items():
        numbers[f"{field}/{name}"][at] = value
    return answer is not None


def _start_loss(case: Case, folder: Path) -> float:
    y = np.load(folder / f"{case.data}.{target_of(case)}.npy")
    return full_loss(case, first_point(case), np.load(folder / f"{case.data}.x.npy", mmap_mode="r"), y)


# --- the rest ------------------------------------------------------------------------------------------------------


def _many_runs(config: Config, session: Session) -> dict[str, Any]:
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

    for first in (keys, keys[0]):
        seconds(first)  # compiles
    with session.alone():
        pairs = [(seconds(keys), sum(seconds(key) for key in keys)) for _ in range(config.rounds)]
    together, single = np.array(pairs).T
    return {"together": together, "one_by_one": single, "runs_together": config.runs_together, "run_steps": steps}


def _profile(config: Config, session: Session) -> dict[str, Any]:
    """Seconds per step `[parts, rounds]` of what a step consists of, found by leaving out one part after another.

    Whole, as `descend` runs it; with b rows in a row instead of drawn ones; with one batch that needs no fetching; with
    a loss that is the sum of the parameters; with an optimiser that does nothing. What each saves is that part's, and
    the rest the loop's.
    """
    x, targets = _data("synthetic", config)
    data = Batch(jnp.asarray(x), jnp.asarray(targets["numbers"]))
    n, found = len(x), {}
    loss, start = losses.mean_loss(models.linear, losses.squared), models.init_linear(COLUMNS)
    go = jax.jit(partial(advance, single=True), static_argnames=("loss", "optimizer", "sampling"))

    def total(params: Any, _: Any) -> Any:
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))

    def in_a_row(key: Any, step: Any, n: int, b: int) -> Any:
        return (step * b) % (n - b + 1) + jnp.arange(b, dtype=jnp.int32)

    sgd = optax.sgd(1e-6)
    for b in config.profiled:
        steps = max(1, 65_536 // b) if b else 20
        if b:
            row, none = Sampling("rows in a row", b, in_a_row), jnp.arange(n)
            batch = jax.tree.map(lambda leaf, b=b: leaf[:b], data)
            programs: dict[str, tuple[Sampling, Any, Any, Any]] = {
                "whole": (reshuffled(b), data, loss, sgd),
                "in a row": (row, data, loss, sgd),
                "one batch": (row, none, lambda params, _, batch=batch: loss(params, batch), sgd),
                "no gradient": (row, none, total, sgd),
                "no update": (row, none, total, optax.set_to_zero()),
            }
        else:  # the full batch is neither drawn nor fetched
            programs = {
                "whole": (full_batch(), data, loss, sgd),
                "no gradient": (full_batch(), data, total, sgd),
                "no update": (full_batch(), data, total, optax.set_to_zero()),
            }

        def thunk(sampling: Any, data: Any, loss: Any, optimizer: Any, steps: int = steps) -> Callable[[], Any]:
            state, key = init(start, optimizer), jax.random.key(0)
            return lambda: go(state, key, data, steps, loss=loss, optimizer=optimizer, sampling=sampling)

        took = session.race(
            {name: thunk(*parts) for name, parts in programs.items()},
            repeats=config.rounds,
            min_seconds=config.min_seconds,
        )
        left = np.array([took[name].runs for name in programs]) / steps
        if b == 0:
            left = np.insert(left, 0, left[0], axis=0)
            left = np.insert(left, 0, left[0], axis=0)
        found[f"profile/{b}"] = np.vstack([left[:-1] - left[1:], left[-1:]])
    return found | {"profile_n": n, "profiled": list(config.profiled)}


def _imports(rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds `[rounds]` of importing ours and of importing JAX and optax, each time in a fresh process."""
    # Installed packages have their bytecode; a checkout of ours may be told not to write any.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}
    wanted = {
        "import_ours": "from jaxgrad import Batch, descend, distinct, full_batch, reshuffled, with_replacement",
        "import_theirs": "import jax, optax",
    }
    took: dict[str, list[float]] = {name: [] for name in wanted}
    for k in range(rounds + 1 if rounds else 0):
        for name in sorted(wanted, reverse=bool(k % 2)):
            code = f"import time; t = time.perf_counter(); {wanted[name]}; print(time.perf_counter() - t)"
            done = subprocess.run(
                [sys.executable, "-c", code],
                cwd=Path(jaxgrad.__file__).parents[1],
                env=env,
                capture_output=True,
                text=True,
                check=True,
            )
            took[name].append(float(done.stdout))
    return {name: np.array(seconds[1:]) for name, seconds in took.items()}  # the first one wrote the bytecode


def _starts(config: Config, folder: Path) -> dict[str, Any]:
    """Seconds `[rounds]` of `python -m experiments --quick NAMES`: with nothing compiled before, and once more."""
    took = []
    for k in range(config.start_rounds if config.starts else 0):
        # An empty cache for it, and for nothing but what it compiled: Matplotlib's fonts are known.
        env = {key: value for key, value in os.environ.items() if not _CACHE.match(key)}
        env |= {"XDG_CACHE_HOME": str(folder / f"cache-{k}"), "MPLCONFIGDIR": matplotlib.get_cachedir()}
        for _ in range(2):
            began = time.perf_counter()
            subprocess.run(
                [sys.executable, "-m", "experiments", "--quick", *config.starts, "--out", str(folder / f"out-{k}")],
                cwd=Path(__file__).parents[1],
                env=env,
                capture_output=True,
                check=True,
            )
            took.append(time.perf_counter() - began)
    return {"starts": np.array(took).reshape(-1, 2), "started": list(config.starts)}


# --- what the numbers say ------------------------------------------------------------------------------------------


class Ratio(NamedTuple):
    """Ours over theirs: the median over rounds, and an interval for it (below 6 rounds: the smallest and largest)."""

    median: float
    low: float
    high: float


class Row(NamedTuple):
    """A row of the table that the race is held to."""

    text: str
    bar: str
    """At most this: a number or a fraction."""
    found: Ratio | None
    """The worst case of the row."""
    where: str
    """Which that is; without any, why nothing was measured."""


def rows(numbers: dict[str, Any]) -> list[Row]:
    """Every row of the table, measured or not."""
    problem, n, d, b = (numbers[key] for key in ("problem", "n", "d", "b"))

    def cases(wanted: np.ndarray) -> list[int]:
        return [int(i) for i in np.flatnonzero(wanted)]

    def against(text: str, bar: str, indices: Sequence[int], peers: Sequence[str]) -> Row:
        pairs = [(i, peer) for i in indices for peer in peers]
        found = [(ratio, i, peer) for i, peer in pairs if (ratio := over(numbers, i, peer))]
        if not found:
            return Row(text, bar, None, _why_not(numbers, pairs))
        worst, i, peer = max(found, key=lambda one: one[0].median)
        return Row(text, bar, worst, f"{_case(numbers, i)}, against {peer}")

    out = []
    for width, bar in ((10, "1"), (64, "0.9"), (784, "0.4")):
        chosen = cases((b == 1) & (problem != "two-layer") & (np.abs(d - width) <= 1))
        out.append(
            against(f"b = 1 against scikit-learn's compiled loop, d about {width}", bar, chosen, ["scikit-learn"])
        )
    line = cases((problem == "linear") & (d == 64) & (b == 32))
    for peer, bar in (("NumPy loop", "1/3"), ("PyTorch eager", "1/20"), ("optax loop", "1/8")):
        out.append(against(f"b = 32, linear, d = 64, against the {peer}".replace("the P", "P"), bar, line, [peer]))
    net = cases((problem == "two-layer") & (d == 64) & (b == 32))
    for peer, bar in (("PyTorch eager", "1/6"), ("optax loop", "1/1.5")):
        text = f"two-layer net 64-128-1, b = 32, against the {peer}".replace("the P", "P")
        out.append(against(text, bar, net, [peer]))
    out.append(against("any case of the race against any peer", "1", range(len(n)), PEERS))

    beyond = cases((b == 0) & (numbers["bytes"] >= 9.5 * numbers["cache"]))
    passes = [(ratio, i) for i in beyond if (ratio := over(numbers, i, FLOOR))]
    text = "full-batch step, data 10 times the last-level cache, against one pass that only reads them"
    if passes:
        worst, i = max(passes)
        out.append(Row(text, "1.5", worst, _case(numbers, i)))
    else:
        out.append(Row(text, "1.5", None, "no data beyond the cache in this run, or no memory for them"))

    many = numbers["together"] / numbers["one_by_one"]
    text = f"{numbers['runs_together']} runs in one program against as many single runs, linear, b = 32, d = 64"
    out.append(Row(text, "1/3", _ratio(many), f"{numbers['run_steps']} steps each"))
    starts, started = numbers["starts"], ", ".join(numbers["started"])
    out.append(
        Row(
            "second start of `python -m experiments --quick` against the first",
            "1/2",
            _ratio(starts[:, 1] / starts[:, 0]) if len(starts) else None,
            f"with {started}: {np.median(starts[:, 1]):.3g} s after {np.median(starts[:, 0]):.3g} s"
            if len(starts)
            else "not part of this run",
        )
    )
    imported = numbers["import_ours"] / numbers["import_theirs"] if len(numbers["import_ours"]) else []
    out.append(
        Row(
            "`from jaxgrad import descend, …` against `import jax, optax`",
            "1.15",
            _ratio(imported) if len(imported) else None,
            f"{np.median(numbers['import_ours']):.2g} s, each in a fresh process"
            if len(imported)
            else "not part of this run",
        )
    )
    return out


def over(numbers: dict[str, Any], i: int, peer: str) -> Ratio | None:
    """Our seconds over the peer's in case i; None where it did not race, or not by the same steps.

    The peer `floor` is one pass that reads what a step reads.
    """
    theirs = numbers[f"seconds/{peer}"][i]
    if peer == FLOOR:
        theirs = theirs * numbers["bytes"][i] / _data_bytes(numbers, i)
    elif not (comparable(numbers, i, peer) and comparable(numbers, i, OURS)):
        return None
    runs = numbers[f"seconds/{OURS}"][i] / theirs
    return _ratio(runs[np.isfinite(runs)]) if np.isfinite(runs).any() else None


def off_by(numbers: dict[str, Any], i: int, name: str) -> float:
    """How far a contender's final loss is from the median contender's, as a share of the loss's decrease."""
    losses = [loss for name in CONTENDERS if np.isfinite(loss := numbers[f"loss/{name}"][i])]
    middle = np.median(losses) if losses else np.nan
    return float(abs(numbers[f"loss/{name}"][i] - middle) / abs(numbers["start_loss"][i] - middle))


def comparable(numbers: dict[str, Any], i: int, name: str) -> bool:
    """Whether it took the same steps as the others, as far as its final loss tells."""
    return off_by(numbers, i, name) <= AGREE["SGD" if numbers["b"][i] else "GD"]


def floor_seconds(numbers: dict[str, Any], i: int) -> float:
    """What the machine allows for a step: its bytes at the measured rate, or its operations at theirs."""
    rate = _data_bytes(numbers, i) / np.nanmedian(numbers[f"seconds/{FLOOR}"][i])
    return float(max(numbers["bytes"][i] / rate, numbers["operations"][i] / numbers["peak"]))


def _data_bytes(numbers: dict[str, Any], i: int) -> int:
    return 4 * int(numbers["n"][i]) * int(numbers["d"][i])


def _ratio(runs: Any) -> Ratio:
    runs = np.asarray(runs, float)
    ends = timing.median_interval(runs) if len(runs) >= timing.FEWEST else (runs.min(), runs.max())
    return Ratio(float(np.median(runs)), float(ends[0]), float(ends[1]))


def _why_not(numbers: dict[str, Any], pairs: Sequence[tuple[int, str]]) -> str:
    """Why none of these raced."""
    for i, peer in pairs:
        reasons = (
            numbers[f"absent/{peer}"],
            numbers[f"fault/{peer}"][i],
            numbers[f"fault/{OURS}"][i],
            f"{peer} ended at another loss" if np.isfinite(numbers[f"loss/{peer}"][i]) else "",
        )
        if reason := next((str(reason) for reason in reasons if reason), ""):
            return reason
    return "no such case in this run"


def _case(numbers: dict[str, Any], i: int) -> str:
    return _name(*(numbers[field][i] for field in ("problem", "data", "d", "b")))


def _name(problem: str, data: str, d: int, b: int) -> str:
    return f"{problem}, {data} (d = {d}), {f'b = {b}' if b else 'full batch'}"


def _holds(row: Row) -> bool:
    above, _, below = row.bar.partition("/")
    return row.found is not None and row.found.median <= float(above) / float(below or 1)


def _say(ratio: Ratio) -> str:
    return f"{ratio.median:.3g} ({ratio.low:.3g}–{ratio.high:.3g})"


def claims(numbers: dict[str, Any]) -> list[Claim]:
    out = [
        Claim(
            "speed",
            f"ours over theirs: {row.text}",
            f"{_say(row.found)}, {row.where}",
            f"at most {row.bar}",
            _holds(row),
        )
        for row in rows(numbers)
        if row.found
    ]
    raced = [
        (i, name) for i in range(len(numbers["n"])) for name in CONTENDERS if np.isfinite(numbers[f"loss/{name}"][i])
    ]
    worst = {
        kind: max(
            (off_by(numbers, i, name) for i, name in raced if bool(numbers["b"][i]) == (kind == "SGD")), default=0
        )
        for kind in AGREE
    }
    others = [f"{name} in {_case(numbers, i)}" for i, name in raced if not comparable(numbers, i, name)]
    out.append(
        Claim(
            "speed",
            f"who is compared took the same steps: {len(raced)} final losses agree, as shares of the loss's decrease",
            "; ".join(f"{kind} within {share:.1g}" for kind, share in worst.items())
            + "".join(f"; not compared: {other}" for other in others),
            "; ".join(f"{kind} within {share:g}" for kind, share in AGREE.items()),
            not others,
        )
    )
    return out


def headline(numbers: dict[str, Any]) -> str:
    found = {row.text: row.found for row in rows(numbers) if row.found}
    parts = [
        f"{1 / ratio.median:.3g} times as fast as {peer} at b = 32, linear, d = 64"
        for peer in ("NumPy loop", "PyTorch eager", "optax loop")
        for text, ratio in found.items()
        if text.startswith("b = 32, linear") and text.endswith(peer)
    ]
    worst = next(row for row in rows(numbers) if row.text.startswith("any case"))
    most = f"; over all cases and peers at most {worst.found.median:.2g} of their time" if worst.found else ""
    return f"**Speed.** Sampling included, a step is {', '.join(parts) or 'raced against no peer'}{most}."


def report(numbers: dict[str, Any]) -> str:
    met = ["| ours over theirs | at most | measured | |", "|---|---|---|---|"]
    for row in rows(numbers):
        measured = f"{_say(row.found)}: {row.where}" if row.found else f"not measured: {row.where}"
        verdict = ("met" if _holds(row) else "**not met**") if row.found else ""
        met.append(f"| {row.text} | {row.bar} | {measured} | {verdict} |")
    raced = [name for name in PEERS if np.isfinite(numbers[f"seconds/{name}"]).any()]
    race = [
        "Time of a whole step, medians over rounds; in brackets ours over theirs. The floor is the larger of the bytes "
        "of data that a step reads, at the rate of a pass that only reads them, and its operations, at the rate of a "
        f"product of matrices ({numbers['peak'] / 1e9:.3g} GFLOP/s).\n",
        f"| case | floor | ours | {' | '.join(raced)} |",
        "|---" * (len(raced) + 3) + "|",
    ]
    for i in range(len(numbers["n"])):
        cells = [brief(floor_seconds(numbers, i), "–"), _seconds(numbers, i, OURS)]
        for name in raced:
            ratio = over(numbers, i, name)
            cells.append(_seconds(numbers, i, name) + (f" ({ratio.median:.2g})" if ratio else ""))
        race.append(f"| {_case(numbers, i)} | {' | '.join(cells)} |")
    return "\n\n".join(
        part for part in ("\n".join(met), "\n".join(race), _remarks(numbers, raced), _where_time_goes(numbers)) if part
    )


def _seconds(numbers: dict[str, Any], i: int, name: str) -> str:
    seconds = numbers[f"seconds/{name}"][i]
    if np.isfinite(seconds).any():
        return brief(float(np.nanmedian(seconds)), "") + ("" if comparable(numbers, i, name) else ", another loss")
    return "failed" if numbers[f"fault/{name}"][i] else ""


def _remarks(numbers: dict[str, Any], raced: Sequence[str]) -> str:
    """Who was not there, who failed and why, and what compiling took."""
    lines = []
    for name in CONTENDERS:
        if numbers[f"absent/{name}"]:
            lines.append(f"- {name} did not race: {numbers[f'absent/{name}']}.")
        for i in map(int, np.flatnonzero(numbers[f"fault/{name}"] != "")):
            lines.append(f"- {name} failed in {_case(numbers, i)}: {numbers[f'fault/{name}'][i]}.")
    for name in raced:
        ways, counts = np.unique(numbers[f"way/{name}"][numbers[f"way/{name}"] != ""], return_counts=True)
        if len(ways):
            told = ", ".join(f"{way} in {count}" for way, count in zip(ways, counts, strict=True))
            lines.append(f"- {name}, the fastest way of each case: {told}.")
    lines.append(f"- Peers: {', '.join(numbers['packages'])}.")
    firsts = {name: numbers[f"first_call/{name}"] for name in (OURS, *raced)}
    lines.append(
        "- The first call, which compiles, does not count; it took, in the median case and two contenders at a time: "
        + ", ".join(
            f"{name} {brief(float(np.nanmedian(seconds)), '')}"
            for name, seconds in firsts.items()
            if np.isfinite(seconds).any()
        )
        + "."
    )
    return "\n".join(lines)


def _where_time_goes(numbers: dict[str, Any]) -> str:
    """The profile, in a table and in words."""
    table = [
        f"Where a step's time goes (linear, d = {COLUMNS}, n = {numbers['profile_n']:,}): microseconds that a step "
        "saves when a part is left out, and the interval of that median.\n",
        f"| | {' | '.join(PARTS)} |",
        "|---" * (len(PARTS) + 1) + "|",
    ]
    words = []
    for b in numbers["profiled"]:
        parts = numbers[f"profile/{b}"]
        cells = [_say(Ratio(*(1e6 * value for value in _ratio(runs)))) for runs in parts]
        if b == 0:
            cells[:2] = ["none", "none"]
        label = f"b = {b}" if b else "full batch"
        table.append(f"| {label} | {' | '.join(cells)} |")
        medians, whole = np.median(parts, axis=1), float(np.median(parts.sum(axis=0)))
        most = sorted(zip(medians, PARTS, strict=True), reverse=True)
        shares = [f"{part} {share / whole:.0%}" for share, part in most if share >= 0.05 * whole]
        words.append(f"{label}: {brief(whole, '')} a step, {', '.join(shares)}")
    return "\n".join(table) + "\n\nIn words: " + ". ".join(words).replace("full", "Full") + "."


COLOURS = {
    "scikit-learn": plots.ORANGE,
    "NumPy loop": plots.BLUE,
    "PyTorch eager": plots.VERMILLION,
    "torch.compile": plots.PURPLE,
    "PyTorch CUDA graph": plots.PURPLE,
    "optax loop": plots.GREEN,
    "optimistix": plots.SKY,
}
MARKERS = {
    "scikit-learn": "D",
    "NumPy loop": "s",
    "PyTorch eager": "o",
    "torch.compile": "P",
    "PyTorch CUDA graph": "P",
    "optax loop": "^",
    "optimistix": "v",
}


def draw(numbers: dict[str, Any]) -> Figure:
    count = len(numbers["n"])
    problems = list(dict.fromkeys(str(problem) for problem in numbers["problem"]))
    lines = count + len(problems)
    figure, (axis,) = plots.figure(height=1.5 + 0.2 * lines)
    height, labels, at = 0.0, [], {}
    for problem in problems:
        labels.append((height, problem))
        for i in np.flatnonzero(numbers["problem"] == problem):
            height += 1
            at[int(i)] = height
            b = numbers["b"][i]
            labels.append((height, f"{numbers['data'][i]}, d = {numbers['d'][i]}, {f'b = {b}' if b else 'full batch'}"))
        height += 1
    for name in PEERS:
        found = [(ratio, y) for i, y in at.items() if (ratio := over(numbers, i, name))]
        if found:
            x, y = np.array([ratio for ratio, _ in found]), np.array([y for _, y in found])
            axis.hlines(y, x[:, 1], x[:, 2], color=COLOURS[name], linewidth=1.4)
            axis.plot(
                x[:, 0],
                y,
                MARKERS[name],
                color=COLOURS[name],
                label=name,
                markersize=5.5,
                markeredgewidth=0.5,
                markeredgecolor="white",
            )
    limits = {i: np.nanmedian(numbers[f"seconds/{OURS}"][i]) / floor_seconds(numbers, i) for i in at}
    axis.plot(
        list(limits.values()),
        [at[i] for i in limits],
        "|",
        color=plots.BLACK,
        markersize=9,
        markeredgewidth=2,
        label="what the machine allows",
    )
    axis.axvline(1, color=plots.BLACK, linewidth=1)
    for side, words in (("right", "ours is faster  "), ("left", "  theirs is")):
        axis.text(1, -0.8, words, ha=side, va="center", fontsize=9, color=plots.GREY)
    plots.log_scale(axis, "x")
    axis.set_ylim(height - 0.5, -1.3)
    axis.set_yticks([y for y, _ in labels], [text for _, text in labels])
    for text, (_, label) in zip(axis.get_yticklabels(), labels, strict=True):
        text.set_fontweight("bold" if label in problems else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("our time over theirs, per step")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
