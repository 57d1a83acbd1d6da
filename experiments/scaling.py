"""What a step costs on many devices and in many processes, and how many hosts are worth having (C2, C4).

Whole steps of the compiled loop, and the same steps taken apart into compute, all-reduce and waiting for the slowest
(`experiments.support.step_parts`), for GD, for SGD whose b rows are those of one machine (*global*: rows travel), and
for SGD that draws from each device's own rows (*stratified*: only the gradient travels). First on virtual devices of
one process: they share its cores, and show what splitting costs and that smaller pieces suit the cache, **not
parallelism** (on one device `descend` blocks its rows for the cache by itself; here all run the same program). Then in
processes of one thread each that talk over loopback: as many as there are cores run at once, more of them take turns.

To that a model is fitted, `T = c₀ + c₁ r + m α L + V/β` for r rows on a device and m arrays and V bytes sent, with the
number of messages in a row, L, as a ring or as a tree needs them; it is judged on cases that it was not fitted to.

What it says of 10 to 10,000 hosts is **a prediction**: one host's measured arithmetic, stated networks, and of the
noise the law that to get as far with batches of b takes `1 + B/b` times the steps of exact gradients (McCandlish et
al. 2018), with the noise scale B = tr Σ/‖G‖² computed exactly. The best batch then is `√(aBP/c₁)`, for
`a = c₀ + αL + V/β`; it and B say where adding hosts stops helping.

Last, the variance of stratified batches, exact and measured, beside that of global ones: on rows that lie in the order
of their file, and on shuffled ones.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from scipy.optimize import nnls

import jaxgrad
from experiments.engine import machine, plots
from experiments.engine.kinds import EXACT, MACHINE, RANDOM, ROUNDING, Mean, Seconds
from experiments.engine.results import Claim
from experiments.engine.session import Session, side_by_side
from experiments.recorded import tables
from experiments.support.exact import geometric, random_keys
from experiments.support.step_parts import Case, Job, problem, split
from jaxgrad import data, losses, models, noise, parallel, statistics
from jaxgrad.descent import trajectory
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Batch, Loss, Params, Sampling


@dataclass(frozen=True)
class Config:
    devices: tuple[int, ...] = (1, 2, 4)
    """Virtual devices of one process."""
    processes: tuple[int, ...] = (1, 2, 4)
    """Processes on this machine; none to leave them out."""
    images: str = "mnist5k"
    """The net's data set: ten classes."""
    rows: int = 4992
    """Images for the net: a multiple of all numbers of devices, so that no row only fills up."""
    hidden: int = 64
    """Hidden units of the net."""
    b: int = 96
    """Batch size of the steps that are taken apart."""
    large: int = 1536
    """Another batch size, for the fit."""
    rounds: int = 6
    seconds: float = 0.03
    """A round of whole steps takes about so long."""
    steps: int = 3
    """Steps taken apart in a round."""
    patience: float = 60.0
    """Seconds after which processes that do not answer are given up."""
    path: tuple[int, ...] = (0, 10, 100)
    """The noise scale is computed after so many steps of GD."""
    shares: int = 4
    """Devices of the stratified variance."""
    batch_sizes: tuple[int, ...] = (4, 32, 256)
    """b of the variance."""
    draws: int = 2000
    """Batches drawn for each measured variance."""


TIMED = True
QUICK = Config(
    devices=(1, 2), processes=(), images="digits", rows=960, hidden=16, b=48, rounds=6, seconds=0.005, steps=3,
    path=(30,), batch_sizes=(8, 64), draws=400,
)  # fmt: skip
NUMBERS = {
    "cores": MACHINE, "processes": MACHINE, "why_not": MACHINE,
    "devices": EXACT, "cases": EXACT, "apart": EXACT,
    "images": EXACT, "rows": EXACT, "hidden": EXACT, "b": EXACT, "large": EXACT, "parameters": EXACT,
    "row_bytes": EXACT, "path": EXACT, "shares": EXACT,
    "*/arrays": MACHINE, "*/bytes": MACHINE, "*/differ": MACHINE,
    "*/whole": Seconds(axis=-1), "*/split": Seconds(axis=-1),
    "noise/*": ROUNDING,
    "variance/n": EXACT, "variance/sizes": EXACT, "variance/*/exact": ROUNDING,
    "variance/*/mean": Mean(error="variance/*/error"), "variance/*/error": RANDOM,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""

NETWORKS = {"10 Gbit/s, 50 µs": (10e9 / 8, 50e-6), "100 Gbit/s, 5 µs": (100e9 / 8, 5e-6)}
"""Bytes per second, and seconds that a message takes."""
PARTS = ("compute", "all-reduce", "waiting")
ETA = 0.5
"""Step size of the GD on whose path the noise is computed."""


# --- the model -----------------------------------------------------------------------------------------------------


def messages(shape: str, P: Any) -> Any:
    """Messages that follow each other in an all-reduce of P: `2(P−1)` in a ring, `2⌈log₂P⌉` in a tree."""
    P = np.asarray(P, float)
    return 2 * (P - 1) if shape == "ring" else 2 * np.ceil(np.log2(P))


def passed(P: Any) -> Any:
    """Bytes that each of P sends in an all-reduce, ring or halving tree, over the bytes of the array: `2(P−1)/P`."""
    P = np.asarray(P, float)
    return 2 * (P - 1) / P


class Point(NamedTuple):
    """A measured step, as the model sees it."""

    case: str
    """`net/stratified b = 96`"""
    P: int
    rows: float
    """On one device."""
    arrays: int
    bytes: int
    seconds: float


class Model(NamedTuple):
    """`T = turns · (c₀ + c₁ rows + arrays · α L(P)) + (2(P−1)/P) bytes/β`: what a step takes."""

    shape: str
    """`ring` or `tree`."""
    fixed: dict[str, float]
    """c₀ of each problem, in seconds."""
    row: float
    """c₁ of the net: seconds for a row."""
    latency: float
    """α, in seconds."""
    per_byte: float
    """1/β, in seconds."""

    def compute(self, point: Point, cores: int) -> float:
        return _turns(point, cores) * (self.fixed[_problem(point)] + self.row * point.rows * (_problem(point) == "net"))

    def seconds(self, point: Point, cores: int) -> float:
        latency, per_byte = _talk(point, self.shape, cores)
        return self.compute(point, cores) + latency * self.latency + per_byte * self.per_byte


def _problem(point: Point) -> str:
    return point.case.split("/")[0]


def _turns(point: Point, cores: int) -> float:
    """More processes than cores take turns, with their arithmetic and with every message."""
    return max(1.0, point.P / cores)


def _talk(point: Point, shape: str, cores: int) -> tuple[float, float]:
    """Messages and bytes that follow each other."""
    follow = _turns(point, cores) * point.arrays * float(messages(shape, point.P))
    return follow, float(passed(point.P)) * point.bytes


def fit(points: Sequence[Point], shape: str, cores: int) -> Model:
    """The model with the least sum of squared relative errors, no cost negative.

    First c₀ and c₁, to the steps of one process; with them α and 1/β, to the steps of several.
    """
    alone, several = [p for p in points if p.P == 1], [p for p in points if p.P > 1]
    problems = sorted({_problem(p) for p in alone})
    table = [[*(float(name == _problem(p)) for name in problems), p.rows * (_problem(p) == "net")] for p in alone]
    *fixed, row = _least(table, [p.seconds for p in alone], [p.seconds for p in alone])
    model = Model(shape, dict(zip(problems, fixed, strict=True)), row, 0.0, 0.0)
    left = [p.seconds - model.compute(p, cores) for p in several]
    latency, per_byte = _least([_talk(p, shape, cores) for p in several], left, [p.seconds for p in several])
    return model._replace(latency=latency, per_byte=per_byte)


def _least(table: Sequence[Sequence[float]], target: Sequence[float], scale: Sequence[float]) -> list[float]:
    """Coefficients >= 0 with the least `Σ ((table @ x − target)/scale)²`; zeros where there is no equation."""
    if not len(table):
        return [0.0, 0.0]
    rows = np.asarray(table, float) / np.asarray(scale)[:, None]
    size = np.where(rows.any(axis=0), np.abs(rows).max(axis=0), 1.0)
    return (nnls(rows / size, np.asarray(target) / np.asarray(scale))[0] / size).tolist()


def best_batch(P: Any, overhead: Any, row: float, B: float) -> Any:
    """`b = √(aBP/c₁)`, at least P: what makes `(1 + B/b)(a + c₁ b/P)` least."""
    return np.maximum(np.sqrt(overhead * B * P / row), P)


def to_the_goal(P: Any, b: Any, overhead: Any, row: float, B: float) -> Any:
    """`(1 + B/b)(a + c₁ b/P)`: seconds to get somewhere, per step that exact gradients would take."""
    return (1 + B / b) * (overhead + row * b / P)


def enough(P: np.ndarray, seconds: np.ndarray) -> int:
    """The first place from which on twice the hosts save less than a tenth of the time; the last if there is none."""
    twice = np.interp(2 * P, P, seconds)
    few = np.flatnonzero((twice > 0.9 * seconds) & (P[-1] >= 2 * P))
    return int(few[0]) if len(few) else len(P) - 1


class Prediction(NamedTuple):
    """Of one network and shape, for hosts P (arrays)."""

    P: np.ndarray
    batch: np.ndarray
    """The best one."""
    times: np.ndarray
    """How many times as fast as one host with its best batch."""
    stop: int
    """Where adding hosts stops helping: an index into these."""


def predict(numbers: dict[str, Any], network: str, shape: str) -> Prediction:
    """What the model says of hosts like one process here, in a network that is stated."""
    rate, latency = NETWORKS[network]
    fixed, row = _one_host(numbers)
    B, size = float(numbers["noise/scale"][-1]), 4 * numbers["parameters"]
    P = np.unique(np.round(geometric(1, 10_000, 201)))
    overhead = fixed + latency * messages(shape, P) + passed(P) * size / rate
    batch = best_batch(P, overhead, row, B)
    seconds = to_the_goal(P, batch, overhead, row, B)
    return Prediction(P, batch, seconds[0] / seconds, enough(P, seconds))


def _one_host(numbers: dict[str, Any]) -> tuple[float, float]:
    """c₀ and c₁ of the net on one process, or one device where there were no processes: a line through its steps."""
    where = "processes" if len(numbers["processes"]) else "devices"
    model = fit([p for p in points(numbers, where) if p.P == 1], "tree", numbers["cores"])
    return model.fixed["net"], model.row


def points(numbers: dict[str, Any], where: str) -> list[Point]:
    """The measured steps of `processes` or `devices`, case by case."""
    out = []
    for i, P in enumerate(numbers[where]):
        for j, name in enumerate(numbers["cases"]):
            whole = numbers[f"{where}/whole"][i, j]
            if np.isfinite(whole).all():
                arrays, size = int(numbers[f"{where}/arrays"][i, j]), int(numbers[f"{where}/bytes"][i, j])
                rows = _rows_here(name, int(P), numbers)
                out.append(Point(name, int(P), rows, arrays, size, float(np.median(whole))))
    return out


def _rows_here(case: str, P: int, numbers: dict[str, Any]) -> float:
    """Rows whose gradient one of P devices computes: all b of a global batch, which every device gets."""
    if case.endswith("GD"):
        return numbers["rows"] / P
    b = int(case.split("= ")[1])
    return b if "global" in case else b / P


def fitted(numbers: dict[str, Any]) -> tuple[Model, list[Point], list[Point], list[float]]:
    """The better of ring and tree, what it was fitted to, what was held out, and its (ring, tree) errors.

    Held out are the net's steps with the batch size `b` in several processes. Fitted is to the full batch and large
    batches, to the linear model for what a small message costs, and to all steps of one process.
    """
    found = points(numbers, "processes")
    held = {f"net/{kind} b = {numbers['b']}" for kind in ("stratified", "global")}
    hidden = [p for p in found if p.case in held and p.P > 1]
    shown = [p for p in found if p not in hidden]
    both = [fit(shown, shape, numbers["cores"]) for shape in ("ring", "tree")]
    errors = [float(np.sqrt(np.mean(np.log(_ratios(m, shown, numbers["cores"])) ** 2))) for m in both]
    return both[int(np.argmin(errors))], shown, hidden, errors


def _ratios(model: Model, of: Sequence[Point], cores: int) -> np.ndarray:
    """Predicted over measured."""
    return np.array([model.seconds(point, cores) / point.seconds for point in of])


# --- measuring -----------------------------------------------------------------------------------------------------


def run(config: Config, session: Session) -> dict[str, Any]:
    session.say(f"loading {config.images} and diamonds")
    images, stones = data.load(config.images).batch, data.load("diamonds").batch
    images = jax.tree.map(lambda leaf: np.ascontiguousarray(leaf[: config.rows]), images)
    loss, start = problem("net", images.x, config.hidden)
    cases = _cases(config)
    numbers: dict[str, Any] = {
        "cores": machine.cores(),
        "devices": np.array(config.devices),
        "cases": [case.name for case in cases],
        "apart": [case.name for case in cases if case.apart],
        "rows": config.rows,
        "hidden": config.hidden,
        "images": config.images,
        "b": config.b,
        "large": config.large,
        "shares": config.shares,
        "path": np.array(config.path),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(start)),
        "row_bytes": sum(leaf[:1].nbytes for leaf in images),
    }
    with tempfile.TemporaryDirectory(prefix="scaling-") as scratch:
        folder = Path(scratch)
        for name, batch in (("net", images), ("linear", stones)):
            rows = len(batch.y) // 12 * 12
            np.save(folder / f"{name}.x.npy", batch.x[:rows])
            np.save(folder / f"{name}.y.npy", batch.y[:rows])

        def rest() -> dict[str, Any]:
            session.say("the noise scale of the net, and the variance of stratified batches")
            on_device = jax.tree.map(jnp.asarray, (images, stones))
            return _noise(loss, start, on_device[0], config) | _variance(on_device[1], config)

        def measure() -> dict[str, Any]:
            return _measure(config, cases, folder, session)

        # Nobody compares the seconds of a quick run, so that what is not timed need not wait.
        both = [measure, rest]
        found = [part() for part in both] if config.processes else side_by_side(lambda part: part(), both)
    return numbers | found[0] | found[1]


def _cases(config: Config) -> list[Case]:
    apart = [Case("net", "GD", 0, True)]
    apart += [Case("net", kind, config.b, True) for kind in ("stratified", "global")]
    if not config.processes:
        return apart
    large = [Case("net", kind, config.large, False) for kind in ("stratified", "global")]
    return [*apart, *large, Case("linear", "stratified", 24, False)]


def _measure(config: Config, cases: list[Case], folder: Path, session: Session) -> dict[str, Any]:
    """Seconds of all cases on virtual devices and in processes; why there are none of these, where there are none."""
    session.say(f"steps on up to {max(config.devices)} virtual devices")
    job = Job(list(cases), list(config.devices), config.rounds, config.seconds, config.steps, config.hidden)
    virtual = {"JAXGRAD_DEVICES": str(max(config.devices))}
    # Of virtual devices only what is shown: each case is compiled for every number of them.
    shown = [case for case in cases if case.apart]
    why = _worker(
        ["-m", "experiments.support.step_parts"], folder, job._replace(cases=shown), virtual, config.patience, session
    )
    if why:
        raise RuntimeError(f"a step on virtual devices could not be timed: {why}")
    found = _table([_read(folder, count) for count in config.devices], cases, "devices")
    runs, why = [], "" if config.processes else "left out of a quick run"
    for P in config.processes:
        session.say(f"steps in {P} process{'es' * (P > 1)}")
        command = [
            "-m",
            "jaxgrad.launch",
            "-n",
            str(P),
            "--logs",
            str(folder / f"logs-{P}"),
            "-m",
            "experiments.support.step_parts",
        ]
        for file in folder.glob(f"{P}-*.npz"):
            file.unlink()  # of as many virtual devices
        why = _worker(command, folder, job._replace(devices=[]), {"NPROC": "1"}, config.patience, session)
        if why:
            break
        runs.append(_read(folder, P))
    done = np.array(config.processes[: len(runs)], int)
    return found | _table(runs, cases, "processes") | {"processes": done, "why_not": why}


def _worker(command: list[str], folder: Path, job: Job, own: dict[str, str], patience: float, session: Session) -> str:
    """Run a worker with the machine to itself; why it failed, or nothing."""
    (folder / "job.json").write_text(json.dumps(job._asdict()))
    root = Path(jaxgrad.__file__).parents[1]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path, **own}
    for name in ("JAXGRAD_COORDINATOR", "JAXGRAD_NUM_PROCESSES", "JAXGRAD_PROCESS_ID"):
        env.pop(name, None)
    with session.alone():
        process = subprocess.Popen(
            [sys.executable, *command, str(folder)],
            env=env,
            cwd=root,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            said = process.communicate(timeout=patience)[1]
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its processes
            try:
                process.communicate(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
            return f"no answer within {patience:g} s"
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("launch: ")]
    return "" if process.returncode == 0 else (lines or [f"exit status {process.returncode}"])[-1]


def _read(folder: Path, count: int) -> list[dict[str, np.ndarray]]:
    """What each process of a run wrote, rank by rank."""
    files = sorted(folder.glob(f"{count}-*.npz"), key=lambda file: int(file.stem.split("-")[1]))
    return [dict(np.load(file, allow_pickle=False)) for file in files]


def _table(runs: list[list[dict[str, np.ndarray]]], cases: list[Case], where: str) -> dict[str, Any]:
    """`whole[run, case, round]`, `split[run, case, part, round]`, `arrays` and `bytes[run, case]`, `differ`.

    A whole step takes as long as on the slowest rank; parts are means over ranks, and medians over a round's steps.
    """
    nothing = np.full(1, np.nan)
    apart = [case.name for case in cases if case.apart]

    def of(run: list[dict[str, np.ndarray]], name: str, what: str) -> np.ndarray:
        return np.stack([rank.get(f"{name}/{what}", nothing) for rank in run])

    def parts(run: list[dict[str, np.ndarray]], name: str) -> np.ndarray:
        return np.median(split(of(run, name, "apart")).mean(axis=0), axis=1).T

    if not runs:
        return {}
    rounds = len(runs[0][0][f"{apart[0]}/whole"])
    whole = [[np.broadcast_to(of(run, c.name, "whole").max(axis=0), rounds) for c in cases] for run in runs]
    count = [
        [[np.nan_to_num(of(run, c.name, k)[0]).item() for c in cases] for run in runs] for k in ("arrays", "bytes")
    ]
    return {
        f"{where}/whole": np.array(whole),
        f"{where}/split": np.array([[parts(run, name) for name in apart] for run in runs]),
        f"{where}/arrays": np.array(count[0], int),
        f"{where}/bytes": np.array(count[1], int),
        f"{where}/differ": np.array([[of(run, name, "differ").max() for name in apart] for run in runs]),
    }


def _noise(loss: Loss, start: Params, batch: Batch, config: Config) -> dict[str, Any]:
    """B_simple and its parts along the path of GD, exactly."""
    go = jax.jit(
        lambda record: trajectory(
            loss,
            start,
            batch,
            optimizer=optax.sgd(ETA),
            sampling=full_batch(),
            key=jax.random.key(0),
            record=record,
            observe=lambda params: params,
        )[1]
    )
    path = go(jnp.asarray(config.path, jnp.int32))
    found = [
        noise.measure(loss, jax.tree.map(lambda leaf, i=i: leaf[i], path), batch, curvature=False, chunk=64)
        for i in range(len(config.path))
    ]
    return {
        "noise/scale": np.array([point.simple_scale for point in found]),
        "noise/trace": np.array([point.trace for point in found]),
        "noise/gradient_squared": np.array([point.gradient_squared for point in found]),
    }


def _variance(stones: Batch, config: Config) -> dict[str, Any]:
    """`tr Cov[g_B]` of linear regression at its start: stratified and global, exact and of drawn batches."""
    n = len(stones.y) // config.shares * config.shares
    counts = (n // config.shares,) * config.shares
    loss, start = losses.mean_loss(models.linear, losses.squared), models.init_linear(stones.x.shape[1])
    orders = {"as they lie": np.arange(n), "shuffled": np.random.default_rng(0).permutation(n)}
    sizes = np.array(config.batch_sizes)
    numbers: dict[str, Any] = {"variance/n": n, "variance/sizes": sizes}
    for fold, (name, order) in enumerate({**orders, "global": orders["as they lie"]}.items()):
        batch = jax.tree.map(lambda leaf, order=order: leaf[order], stones)
        if name == "global":
            trace = noise.measure(loss, start, batch, curvature=False, chunk=8192).trace
            exact = [noise.gamma(distinct(int(b)), n) * trace for b in sizes]
            kinds = [distinct(int(b)) for b in sizes]
        else:
            exact = [noise.stratified_trace(loss, start, batch, counts, int(b), chunk=8192) for b in sizes]
            kinds = [parallel.stratified(int(b), counts) for b in sizes]
        keys = [random_keys((2, fold, int(b)), config.draws) for b in sizes]
        drawn = [_deviations(start, batch, k, loss=loss, sampling=kind) for k, kind in zip(keys, kinds, strict=True)]
        squares = np.array(drawn, float)
        numbers[f"variance/{name}/exact"] = np.array(exact)
        numbers[f"variance/{name}/mean"] = squares.mean(axis=1)
        numbers[f"variance/{name}/error"] = squares.std(axis=1, ddof=1) / math.sqrt(config.draws)
    return numbers


@partial(jax.jit, static_argnames=("loss", "sampling"))
def _deviations(params: Params, batch: Batch, keys: jax.Array, *, loss: Loss, sampling: Sampling) -> jax.Array:
    """`‖g_B − G‖²[draw]`."""
    G = jax.grad(loss)(params, batch)

    def one(key: Any) -> jax.Array:
        rows = sampling.batch(batch, sampling.indices(key, 0, len(batch.y)))
        g = jax.grad(loss)(params, rows)
        return jax.tree.reduce(jnp.add, jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), g, G))

    return jax.lax.map(one, keys, batch_size=50)


# --- what the numbers say ------------------------------------------------------------------------------------------


def claims(numbers: dict[str, Any]) -> list[Claim]:
    places = [where for where in ("devices", "processes") if len(numbers[where])]
    far = max(float(numbers[f"{where}/differ"].max()) for where in places)
    out = [
        Claim(
            "scaling",
            "a step taken apart into compute, all-reduce and update yields what the compiled loop does: largest "
            "difference of a parameter over the farthest move of one, on any number of devices and processes",
            f"{far:.1g}",
            "at most 1e-4 (float32)",
            far <= 1e-4,
        ),
        _sent(numbers, places),
    ]
    few, many = numbers["devices"][[0, -1]]
    slower = _fastest(numbers, -1) / _fastest(numbers, 0)
    out.append(
        Claim(
            "scaling",
            f"virtual devices are no parallelism: a stratified SGD step (b = {numbers['b']}) on {many} of them over "
            f"its time on {few} (fastest rounds), on the same {numbers['cores']} cores",
            f"×{slower:.3g}",
            "more than ×1",
            bool(slower > 1),
        )
    )
    if len(numbers["processes"]) > 1:
        model, shown, hidden, errors = fitted(numbers)
        ratios = _ratios(model, hidden, numbers["cores"])
        typical, worst = (float(np.exp(of(np.abs(np.log(ratios))))) for of in (np.median, np.max))
        out.append(
            Claim(
                "scaling",
                f"the model that was fitted to {len(shown)} steps (a {model.shape}; typical error ring "
                f"×{np.exp(errors[0]):.2f}, tree ×{np.exp(errors[1]):.2f}) predicts {len(hidden)} others, "
                f"b = {numbers['b']}: median and largest error",
                f"×{typical:.2f}, ×{worst:.2f}",
                "at most ×2 and ×5 (one machine's scheduler is in it)",
                typical <= 2 and worst <= 5,
            )
        )
    return [*out, *_variance_claims(numbers)]


def _sent(numbers: dict[str, Any], places: list[str]) -> Claim:
    """What travels, in the compiled programs of more than one device."""
    wrong, count = [], 0
    for where in places:
        for i, P in enumerate(numbers[where]):
            for j, name in enumerate(numbers["cases"]):
                if P > 1 and name.startswith("net") and np.isfinite(numbers[f"{where}/whole"][i, j]).all():
                    size, count = int(numbers[f"{where}/bytes"][i, j]), count + 1
                    if size != _expected_bytes(name, numbers):
                        wrong.append(f"{name} on {P} {where}: {size:,}")
    return Claim(
        "scaling",
        "a compiled step of GD or stratified SGD sends the gradient and nothing else, whatever b "
        f"({4 * numbers['parameters']:,} bytes, p = {numbers['parameters']:,}); one of global SGD sends the rows of "
        f"its batch ({numbers['b'] * numbers['row_bytes']:,} bytes for b = {numbers['b']})",
        "; ".join(wrong) or f"so in {count} of {count} programs",
        "to the byte",
        count > 0 and not wrong,
    )


def _expected_bytes(case: str, numbers: dict[str, Any]) -> int:
    return int(case.split("= ")[1]) * numbers["row_bytes"] if "global" in case else 4 * numbers["parameters"]


def _fastest(numbers: dict[str, Any], i: int) -> float:
    """Seconds of a whole stratified step of the net on virtual devices, in its fastest round."""
    return float(numbers["devices/whole"][i, numbers["cases"].index(f"net/stratified b = {numbers['b']}")].min())


def _variance_claims(numbers: dict[str, Any]) -> list[Claim]:
    of = {name: {key: numbers[f"variance/{name}/{key}"] for key in ("exact", "mean", "error")} for name in ORDERS}
    z = np.concatenate([(v["mean"] - v["exact"]) / v["error"] for v in of.values()])
    limit = statistics.z_limit(len(z), level=0.99)
    lying, shuffled = (of[name]["exact"] / of["global"]["exact"] for name in ("as they lie", "shuffled"))
    return [
        Claim(
            "C3",
            "the variance of stratified batches is `Σ_d (n_d/n)² (n_d − b_d)/(b_d (n_d − 1)) tr Σ_d`, on diamonds over "
            f"{numbers['shares']} shares, rows as they lie and shuffled, and of global ones γ tr Σ ({len(z)} means)",
            f"largest deviation {np.abs(z).max():.2f} standard errors",
            f"at most {limit:.2f} (99 %, all together)",
            bool(np.abs(z).max() <= limit),
        ),
        Claim(
            "C3",
            "what differs between shares is no noise to a stratified batch: its variance over that of a global one, "
            "for rows that lie in the order of their file, and for shuffled ones",
            f"{lying.min():.3g} to {lying.max():.3g}; {shuffled.min():.4g} to {shuffled.max():.4g}",
            "below 0.9; 0.98 to 1.02",
            bool(lying.max() < 0.9 and shuffled.min() > 0.98 and shuffled.max() < 1.02),
        ),
    ]


ORDERS = ("as they lie", "shuffled", "global")


def headline(numbers: dict[str, Any]) -> str:
    network = next(iter(NETWORKS))
    tree = predict(numbers, network, "tree")
    B = numbers["noise/scale"][-1]
    return (
        f"**How many hosts are worth having (predicted).** With a noise scale of B = {B:,.0f} and {network}, adding "
        f"hosts like one core here stops helping at about {tree.P[tree.stop]:,.0f} of them with batches of "
        f"{tree.batch[tree.stop]:,.0f}: {tree.times[tree.stop]:,.0f} times as fast as one."
    )


def report(numbers: dict[str, Any]) -> str:
    fixed, row = _one_host(numbers)
    out = []
    for where in ("devices", "processes"):
        kind = "virtual devices of one process" if where == "devices" else "processes over loopback"
        if not len(numbers[where]):
            out.append(f"No steps in several processes were timed: {numbers['why_not']}.\n")
            continue
        head = " | ".join(f"{P}" for P in numbers[where])
        out += [
            f"Milliseconds of a step of the net (p = {numbers['parameters']:,}, n = {numbers['rows']:,}) on {kind}, "
            f"{numbers['cores']} cores: the compiled loop (taken apart: {' + '.join(PARTS)})\n",
            f"| step | {head} |",
            "|---" * (len(numbers[where]) + 1) + "|",
        ]
        for k, name in enumerate(numbers["apart"]):
            j, cells = numbers["cases"].index(name), []
            for i in range(len(numbers[where])):
                parts = np.median(numbers[f"{where}/split"][i, k], axis=-1) * 1e3
                whole = np.median(numbers[f"{where}/whole"][i, j]) * 1e3
                cells.append(f"{whole:.3g} ({' + '.join(f'{part:.2g}' for part in parts)})")
            out.append(f"| {name.removeprefix('net/')} | {' | '.join(cells)} |")
        out.append("")
        if where == "processes" and len(numbers["processes"]) < 2:
            out.append(f"No more processes were timed: {numbers['why_not']}.\n")
    if len(numbers["processes"]) > 1:
        model, *_ = fitted(numbers)
        rate = "no cost of bytes seen" if model.per_byte == 0 else f"{1e-6 / model.per_byte:,.0f} MB/s"
        out.append(
            f"Fitted to loopback ({model.shape}): {model.latency * 1e6:,.0f} µs a message and array, {rate}; "
            f"{model.row * 1e6:.3g} µs a row. Which of ring and tree fits better is not settled by so few processes "
            "that share so few cores: it changes from run to run.\n"
        )
    out += [
        "**Prediction** for hosts that are each like one core here "
        f"({row * 1e6:.3g} µs a row and {fixed * 1e6:.3g} µs a step), which send their gradient as one array of "
        f"{4 * numbers['parameters'] / 1e3:,.0f} kB and wait for no straggler. The batch is the best one for so many "
        f"hosts; B = {_scales(numbers)} after {', '.join(f'{t:,}' for t in numbers['path'])} steps of GD, the last of "
        "which is used. Adding hosts stops helping where twice as many save less than a tenth of the time:\n",
        "| network | all-reduce | hosts | batch | times as fast as one host | at 10,000 hosts |",
        "|---|---|---|---|---|---|",
    ]
    for network in NETWORKS:
        for shape in ("tree", "ring"):
            p = predict(numbers, network, shape)
            cells = (f"{p.P[p.stop]:,.0f}", f"{p.batch[p.stop]:,.0f}", f"{p.times[p.stop]:,.3g}", f"{p.times[-1]:,.3g}")
            out.append(f"| {network} | {shape} | {' | '.join(cells)} |")
    return "\n".join([*out, "", *tables.sections()])


def _scales(numbers: dict[str, Any]) -> str:
    return ", ".join(f"{scale:,.3g}" for scale in numbers["noise/scale"])


# --- the figure ----------------------------------------------------------------------------------------------------

COLOURS = dict(zip(PARTS, (plots.SKY, plots.ORANGE, plots.GREY), strict=True))
OF_NETWORK = dict(zip(NETWORKS, (plots.VERMILLION, plots.BLUE), strict=True))


def draw(numbers: dict[str, Any]) -> Figure:
    figure, axes = plots.figure(3, 2, height=8.2)
    cores = f"{numbers['cores']} core{'s' * (numbers['cores'] > 1)}"
    _bars(axes[0], numbers, "processes", f"Processes on {cores}")
    _bars(axes[1], numbers, "devices", f"Virtual devices on {cores}")
    _model(axes[2], numbers)
    _hosts(axes[3], axes[4], numbers)
    _variances(axes[5], numbers)
    handles: list[Any] = [Patch(color=colour, label=name) for name, colour in COLOURS.items()]
    handles[-1].set(hatch="////", edgecolor="white", linewidth=0)
    handles.append(Line2D([], [], color=plots.BLACK, marker="D", linestyle="", label="whole step, compiled loop"))
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=4,
        title="A step of the net (the first two panels)",
        alignment="left",
    )
    return figure


def _bars(axis: Any, numbers: dict[str, Any], where: str, title: str) -> None:
    axis.set(title=title)
    if not len(numbers[where]):
        axis.set_axis_off()
        axis.text(
            0.5,
            0.5,
            f"not timed:\n{_wrapped(numbers['why_not'])}",
            ha="center",
            va="center",
            color=plots.GREY,
            transform=axis.transAxes,
        )
        return
    counts, places, labels, tallest = numbers[where], [], [], 0.0
    for k, name in enumerate(numbers["apart"]):
        j = numbers["cases"].index(name)
        for i, P in enumerate(counts):
            x, bottom = k * (len(counts) + 1) + i, 0.0
            for part, seconds in zip(PARTS, np.median(numbers[f"{where}/split"][i, k], axis=-1) * 1e3, strict=True):
                axis.bar(
                    x,
                    seconds,
                    0.85,
                    bottom=bottom,
                    color=COLOURS[part],
                    hatch="////" if part == "waiting" else None,
                    edgecolor="white",
                    linewidth=0,
                )
                bottom += seconds
            whole = np.median(numbers[f"{where}/whole"][i, j]) * 1e3
            axis.plot(x, whole, "D", color=plots.BLACK, markersize=4)
            tallest = max(tallest, bottom, whole)
            places.append(x)
            labels.append(str(P))
        middle = k * (len(counts) + 1) + (len(counts) - 1) / 2
        words = name.removeprefix("net/").replace(" b = ", "\nb = ")
        axis.annotate(
            words,
            (middle, 0),
            xycoords=("data", "axes fraction"),
            xytext=(0, -18),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=9,
        )
    axis.set_xticks(places, labels)
    axis.grid(axis="x", visible=False)
    axis.set(ylabel="ms per step")
    axis.set_ylim(0, 1.05 * tallest)
    axis.set_xlabel(f"{where}\n", labelpad=26)


def _wrapped(text: str, width: int = 30) -> str:
    return "\n".join(textwrap.wrap(text, width))


def _model(axis: Any, numbers: dict[str, Any]) -> None:
    axis.set(title="The model, measured")
    if len(numbers["processes"]) < 2:
        axis.set_axis_off()
        axis.text(
            0.5,
            0.5,
            "nothing to fit to:\nno processes were timed",
            ha="center",
            va="center",
            color=plots.GREY,
            transform=axis.transAxes,
        )
        return
    model, shown, hidden, _ = fitted(numbers)
    both = [p.seconds * 1e3 for p in (*shown, *hidden)]
    ends = np.array([min(both) / 2, max(both) * 2])
    axis.plot(ends, ends, color=plots.GREY, linewidth=1)
    plots.band(axis, ends, ends / 2, ends * 2, plots.GREY)
    for of, marker, colour, label in ((shown, "o", plots.BLUE, "fitted"), (hidden, "^", plots.VERMILLION, "held out")):
        predicted = [model.seconds(p, numbers["cores"]) * 1e3 for p in of]
        axis.plot([p.seconds * 1e3 for p in of], predicted, marker, color=colour, label=label, linestyle="")
    plots.log_scale(axis, "xy")
    axis.set(xlabel="measured, ms per step", ylabel=f"model ({model.shape}), ms per step")
    axis.annotate("grey: factor 2", (0.97, 0.04), xycoords="axes fraction", fontsize=8, color=plots.GREY, ha="right")
    axis.legend(loc="upper left")


def _hosts(left: Any, right: Any, numbers: dict[str, Any]) -> None:
    B = float(numbers["noise/scale"][-1])
    for network in NETWORKS:
        for shape, style in (("tree", "-"), ("ring", ":")):
            p = predict(numbers, network, shape)
            label = f"{network}, {shape}"
            left.plot(p.P, p.times, style, color=OF_NETWORK[network], label=label)
            left.plot(p.P[p.stop], p.times[p.stop], "o", color=OF_NETWORK[network])
            right.plot(p.P, p.batch, style, color=OF_NETWORK[network])
            right.plot(p.P[p.stop], p.batch[p.stop], "o", color=OF_NETWORK[network])
    P = np.array([1.0, 1e4])
    left.plot(P, P, "--", color=plots.GREY, linewidth=1)
    left.annotate(
        "ideal", (60, 60), xytext=(-4, 4), textcoords="offset points", ha="right", color=plots.GREY, fontsize=8
    )
    right.axhline(B, color=plots.BLACK, linewidth=1.2)
    right.annotate(
        f"B = {B:,.0f}", (1e4, B), xytext=(0, -4), textcoords="offset points", fontsize=8, ha="right", va="top"
    )
    for axis in (left, right):
        plots.log_scale(axis, "xy")
        axis.set_xlabel("hosts, each like one core here")
    top = max(predict(numbers, network, "tree").times.max() for network in NETWORKS)
    left.set_ylim(0.5, 4 * top)
    left.set(title="PREDICTION: speed", ylabel="times as fast as one host")
    right.set(title="PREDICTION: best batch", ylabel="examples in all")
    handles = [
        *left.get_legend_handles_labels()[0],
        Line2D([], [], color=plots.GREY, marker="o", linestyle="", label="adding hosts stops helping"),
    ]
    title = "Predictions, by network and all-reduce"
    left.figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8, title=title, title_fontsize=8)


def _variances(axis: Any, numbers: dict[str, Any]) -> None:
    sizes = numbers["variance/sizes"]
    looks = {
        "global": (plots.BLACK, "-", "s"),
        "shuffled": (plots.VERMILLION, "--", "o"),
        "as they lie": (plots.BLUE, "-", "^"),
    }
    labels = {
        "global": "global",
        "shuffled": "stratified, shuffled rows",
        "as they lie": "stratified, rows as they lie",
    }
    for name, (colour, style, marker) in looks.items():
        exact, mean, error = (numbers[f"variance/{name}/{key}"] for key in ("exact", "mean", "error"))
        axis.plot(sizes, exact, style, color=colour, label=labels[name])
        axis.errorbar(
            sizes,
            mean,
            2 * error,
            fmt=marker,
            color=colour,
            markersize=5,
            capsize=2,
            markerfacecolor="none" if name == "global" else colour,
        )
    plots.log_scale(axis, "xy")
    axis.set(title="Variance of the gradient", xlabel="b, examples in the batch", ylabel="tr Cov of the batch gradient")
    axis.set_ylim(bottom=numbers["variance/as they lie/exact"].min() / 8)
    axis.legend(loc="lower left", fontsize=8, title="line: exact, point: measured", title_fontsize=8, alignment="left")


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
