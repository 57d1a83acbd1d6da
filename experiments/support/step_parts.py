"""A step on many devices, whole and taken apart: what `scaling` runs in processes of their own.

    python -m jaxgrad.launch -n 2 -m experiments.support.step_parts FOLDER       two processes
    JAXGRAD_DEVICES=4 python -m experiments.support.step_parts FOLDER            four virtual devices

`FOLDER/job.json` is a `Job`; the rows lie beside it as `<problem>.x.npy` and `.y.npy`. Every process writes
`FOLDER/<devices>-<rank>.npz`: seconds, by case and part.

**Whole** is the compiled loop (`jaxgrad.descent.advance`), as `descend` runs it. **Taken apart** is the same step as
three programs, waited for one after the other:

    local     what a device computes from its own rows: its share of the gradient; of a global batch, its rows
    reduce    the sum over all devices, which every one gets: an all-reduce
    finish    the update; of a global batch, its gradient too, of all b rows on every device

Only `reduce` talks. Who comes to it first waits for the last one: the shortest time that any process spends in it is
the all-reduce, what a process spends longer is waiting (`split`). Clocks of different processes are not compared.
"""

import json
import math
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from experiments.engine import machine
from experiments.support.exact import two_layer
from jaxgrad import losses, models, parallel
from jaxgrad.descent import advance, init
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Batch, Loss, Params, Sampling

PARTS = ("local", "reduce", "finish")
OPTIMIZER = optax.sgd(0.05)


class Case(NamedTuple):
    problem: str
    """`linear` (regression) or `net` (classes)."""
    kind: str
    """`GD`, `stratified` or `global`."""
    b: int
    """0 for GD."""
    apart: bool
    """Whether it is taken apart too."""

    @property
    def name(self) -> str:
        """`net/stratified b = 96`"""
        return f"{self.problem}/{self.kind}{f' b = {self.b}' if self.b else ''}"


class Job(NamedTuple):
    cases: list[Any]
    """Of `Case`."""
    devices: list[int]
    """Use so many of the devices, one after the other; empty for all that there are."""
    rounds: int
    seconds: float
    """A round of the whole loop takes about so long."""
    steps: int
    """Steps in a round of the one that is taken apart."""
    hidden: int


def problem(name: str, x: Any, hidden: int) -> tuple[Loss, Params]:
    """Loss and start."""
    if name == "linear":
        return losses.mean_loss(models.linear, losses.squared), models.init_linear(x.shape[1])
    loss = losses.mean_loss(partial(models.two_layer, activation=jnp.tanh), losses.softmax_cross_entropy)
    return loss, two_layer(0, x.shape[1], hidden, 10)


def main() -> int:
    folder = Path(sys.argv[1])
    job = Job(**json.loads((folder / "job.json").read_text()))
    machine.keep_compiled()
    parallel.start()
    cases = [Case(*case) for case in job.cases]
    rows = {name: _rows(folder, name) for name in dict.fromkeys(case.problem for case in cases)}
    for count in job.devices or [jax.device_count()]:
        mesh = parallel.mesh(jax.devices()[:count])
        laid = {name: parallel.shard(batch, mesh) for name, batch in rows.items()}
        ready, found = [], {}
        for case in cases:
            if parallel.is_main():
                print(f"{count} devices: {case.name}", file=sys.stderr, flush=True)
            measured, time_round = _prepared(case, laid[case.problem], job)
            found |= {f"{case.name}/{key}": value for key, value in measured.items()}
            ready.append(time_round)
        for i in range(job.rounds):  # the cases by turns, so that what the machine does meanwhile meets them all
            for time_round in ready:
                time_round(i)
        np.savez(folder / f"{count}-{jax.process_index()}.npz", **found)
    return 0


def _rows(folder: Path, name: str) -> Batch:
    return Batch(np.load(folder / f"{name}.x.npy", mmap_mode="r"), np.load(folder / f"{name}.y.npy", mmap_mode="r"))


def _prepared(case: Case, data: parallel.Sharded, job: Job) -> tuple[dict[str, Any], Callable[[int], None]]:
    """What is measured of a case, with arrays that are still to be filled, and what fills them round by round.

    `whole[rounds]`: seconds of a step. `arrays`, `bytes`: what a step sends, as compiled. Of a case taken apart,
    `apart[rounds, steps, 3]`, and `differ`: the largest difference of a parameter after `steps` steps to the whole,
    over the farthest that a parameter moved.
    """
    loss, start = problem(case.problem, data.batch.x, job.hidden)
    make = {"GD": full_batch, "global": partial(distinct, case.b)}
    sampling = make.get(case.kind, partial(parallel.stratified, case.b, data.counts))()
    loss, rows, sampling = parallel.on(data, loss, sampling)
    state, key = parallel.replicate((init(start, OPTIMIZER), jax.random.key(1)), data.mesh)
    program = _advance.lower(state, key, rows, np.int32(0), loss=loss, optimizer=OPTIMIZER, sampling=sampling).compile()

    def whole(steps: int) -> Any:
        return jax.block_until_ready(program(state, key, rows, np.int32(steps)))

    steps, apart = _enough(whole, job.seconds), None
    arrays, size = sent(program.as_text() or "")
    found: dict[str, Any] = {"whole": np.zeros(job.rounds), "arrays": arrays, "bytes": size}
    if case.apart:
        apart = _apart(loss, sampling, data, key)
        ended = apart(state.params, job.steps)[0], whole(job.steps).params
        away = _farthest(*ended) / _farthest(ended[1], start)
        found |= {"apart": np.zeros((job.rounds, job.steps, len(PARTS))), "differ": away}

    def time_round(i: int) -> None:
        began = time.perf_counter()
        whole(steps)
        found["whole"][i] = (time.perf_counter() - began) / steps
        if apart is not None:
            found["apart"][i] = apart(state.params, job.steps)[1]

    return found, time_round


_advance = jax.jit(advance, static_argnames=("loss", "optimizer", "sampling"))


def _farthest(a: Params, b: Params) -> float:
    """The largest difference of two parameters."""
    away = jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)
    return max(jax.tree.leaves(away))


def _enough(whole: Callable[[int], Any], seconds: float) -> int:
    """How many steps take so long: what rank 0 finds, since all must take as many."""
    whole(1)
    began = time.perf_counter()
    whole(3)
    each = (time.perf_counter() - began) / 3
    return int(parallel.from_main(lambda: str(max(3, min(20_000, round(seconds / each)))).encode()))


def _apart(loss: Loss, sampling: Sampling, data: parallel.Sharded, key: Any) -> Callable[[Params, int], Any]:
    """`(params, steps) -> (params, seconds[steps, 3])`: the step as three programs."""
    mesh, D, m = data.mesh, data.mesh.devices.size, max(data.counts)
    each, everywhere = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())
    travels = sampling.batch_size is not None and parallel.shares_of(sampling) is None

    def shares(rows: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(D, -1, *leaf.shape[1:]), rows)

    def own(d: Any, share: Any, indices: Any) -> Any:
        """The rows of a global batch that device d has, and zeros for the others."""
        here = (indices >= d * m) & (indices < (d + 1) * m)
        taken = share[jnp.clip(indices - d * m, 0, m - 1)]
        return jnp.where(here.reshape(-1, *[1] * (taken.ndim - 1)), taken, 0)

    @partial(jax.jit, out_shardings=each)
    def local(params: Params, rows: Any, key: Any, step: Any) -> Any:
        if sampling.batch_size is None:
            return jax.vmap(jax.grad(loss), (None, 0))(params, shares(rows))
        indices = sampling.indices(key, step, D * m)
        if travels:
            take = jax.vmap(own, (0, 0, None))
            return jax.tree.map(lambda leaf: take(jnp.arange(D, dtype=jnp.int32), leaf, indices), shares(rows))
        return jax.vmap(jax.grad(loss), (None, 0))(params, shares(sampling.batch(rows, indices)))

    @partial(jax.jit, out_shardings=everywhere)
    def reduce(parts: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0, dtype=leaf.dtype), parts)

    @partial(jax.jit, out_shardings=everywhere)
    def finish(params: Params, total: Any) -> Any:
        gradient = jax.grad(loss)(params, total) if travels else jax.tree.map(lambda leaf: leaf / D, total)
        return optax.apply_updates(params, OPTIMIZER.update(gradient, OPTIMIZER.init(params), params)[0])

    def run(params: Params, steps: int) -> tuple[Params, np.ndarray]:
        seconds = np.zeros((steps, len(PARTS)))
        for t in range(steps):
            times = [time.perf_counter()]
            parts = jax.block_until_ready(local(params, data.batch, key, np.int32(t)))
            times.append(time.perf_counter())
            total = jax.block_until_ready(reduce(parts))
            times.append(time.perf_counter())
            params = jax.block_until_ready(finish(params, total))
            times.append(time.perf_counter())
            seconds[t] = np.diff(times)
        return params, seconds

    return run


def sent(program: str) -> tuple[int, int]:
    """How many arrays a compiled program sends, and their bytes: its all-reduces, in XLA's words.

    A loop's body counts once. On the CPU the arrays of one all-reduce go one after the other.
    """
    words = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    results = re.findall(rf"= (.*?) (?:{words})(?:-start)?\(", program)
    arrays = [array for result in results for array in re.findall(r"\b[a-z]+(\d+)\[([\d,]*)\]", result)]
    sizes = [int(bits) // 8 * math.prod(int(k) for k in shape.split(",") if k) for bits, shape in arrays]
    return len(sizes), sum(sizes)


def split(apart: np.ndarray) -> np.ndarray:
    """Seconds `[ranks, rounds, steps, 3]` of compute, all-reduce and waiting, from `apart[ranks, rounds, steps, 3]`.

    They add up to the step of each rank. The all-reduce is the shortest time that any rank spent in it.
    """
    local, reduce, finish = np.moveaxis(apart, -1, 0)
    least = np.broadcast_to(reduce.min(axis=0), reduce.shape)
    return np.stack([local + finish, least, reduce - least], axis=-1)


if __name__ == "__main__":
    parallel.run(main)
