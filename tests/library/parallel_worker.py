"""What the processes of `test_parallel.py` run: `parallel_worker.py TASK FOLDER`."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax

from jaxgrad import descend, parallel
from jaxgrad.descent import Checkpoint
from jaxgrad.losses import mean_loss, softmax_cross_entropy, squared
from jaxgrad.models import init_linear, init_two_layer, linear, two_layer
from jaxgrad.sampling import distinct, full_batch, reshuffled
from jaxgrad.types import Batch

STEPS = 200
LOSS = mean_loss(linear, squared)
MOMENTUM = optax.sgd(0.1, momentum=0.9)  # one object, so that runs of it compile once


def problem(n, dtype):
    r = np.random.default_rng(1)
    x = r.normal(size=(n, 6))
    return Batch(x.astype(dtype), (x @ r.normal(size=6) + r.normal(size=n)).astype(dtype))


def start(dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), init_linear(6))


def spread(batch, mesh):
    return batch if mesh is None else parallel.shard(batch, mesh)


def runs(mesh, of=""):
    """Final parameters by name: 203 rows, which no number of devices here divides, and 200, which all do.

    With `of`, only the runs whose names have it.
    """
    found, keys = {}, jax.random.split(jax.random.key(5), 3)

    def run(name, loss, params, batch, sampling, key=keys[0], optimizer=0.1, **how):
        if of not in name:
            return
        data = spread(batch, mesh)
        trace = descend(
            loss, params, data, optimizer=optimizer, sampling=sampling, steps=STEPS, key=key, record=3, **how
        )
        for i, leaf in enumerate(jax.tree.leaves(trace.params)):
            found[f"{name}/{i}"] = np.asarray(leaf)
        found[f"{name}/loss"] = trace.loss

    for dtype, n, sampling in (
        (np.float32, 203, full_batch()),
        (np.float32, 203, distinct(16)),
        (np.float64, 203, full_batch()),
        (np.float64, 203, distinct(16)),
        (np.float64, 200, reshuffled(10)),
    ):
        run(f"{np.dtype(dtype).name} {n} {sampling.name}", LOSS, start(dtype), problem(n, dtype), sampling)
    # In two tiles: a bound of next to nothing.
    run("float64 grid", LOSS, start(np.float64), problem(203, np.float64), distinct(8), keys, [0.05, 0.1], memory=1e-6)
    x, y = problem(101, np.float64)
    net = jax.tree.map(lambda leaf: leaf.astype(np.float64), init_two_layer(keys[1], 6, 5, 3))
    classes = Batch(x, (np.abs(y) % 3).astype(np.int32))
    run("float64 net", mean_loss(two_layer, softmax_cross_entropy), net, classes, distinct(8))
    return found


def resumable(folder, *, mesh=None, resume=True, until=120, progress=False, file="run.npz", **changes):
    """A run that leaves a checkpoint each 20 steps, and is recorded each 10."""
    arguments = dict(
        params=start(np.float64),
        data=spread(problem(203, np.float64), mesh),
        optimizer=MOMENTUM,
        sampling=distinct(16),
        key=jax.random.key(5),
        observe=weights,
    )
    return descend(
        **{"loss": LOSS, "record": range(0, until + 1, 10)} | arguments | changes,
        steps=until,
        progress=progress,
        checkpoint=Checkpoint(folder / file, every=20, resume=resume),
    )


def weights(params):
    return params.w


def saved(trace):
    """What must be the same in a run that went on."""
    return {"w": trace.params.w, "b": trace.params.b, "loss": trace.loss, "observed": trace.observed, "at": trace.steps}


def misbehave(how, rank):
    """At step 50 rank 1 raises, is stopped, is killed or gets a signal; called after every record point."""

    def progress(step, steps):
        if step == 50 and rank == 1:
            if how == "raise":
                raise RuntimeError("planted")
            os.kill(os.getpid(), getattr(signal, how))
            time.sleep(0.2)

    return progress


def main():
    task, folder = sys.argv[1], Path(sys.argv[2])
    rank = int(os.environ.get(parallel.RANK, "0"))
    parallel.start()
    jax.config.update("jax_enable_x64", True)
    mesh = parallel.mesh()
    if task == "virtual":
        np.savez(folder / "virtual.npz", **runs(mesh))
    elif task == "two":
        np.savez(folder / f"two{rank}.npz", **runs(mesh))
        local(folder, rank, mesh)
        (folder / f"refused{rank}.json").write_text(json.dumps(refused(folder, rank, mesh)))
    elif task == "four":
        np.savez(folder / f"four{rank}.npz", **runs(mesh, of=" 203 "))
        resumable(folder, mesh=mesh, progress=misbehave("raise", rank))
    elif task == "goes on":
        for file in ("one.npz", "two.npz", "never.npz"):  # the first two are there: they go on
            trace = resumable(folder, mesh=mesh, file=file)
            np.savez(folder / f"{file.removesuffix('.npz')} in the end {rank}.npz", **saved(trace))
        resumable(folder, mesh=mesh, file="stopped.npz", progress=misbehave("SIGINT", rank))
    else:
        resumable(folder, mesh=mesh, file="two.npz", progress=misbehave(task, rank))
    return 0


def refused(folder, rank, mesh):
    """What two processes are told who were started with what does not fit together."""
    x, y = problem(203, np.float64)
    changed, spoiled = x.copy(), x.copy()
    changed[7, 3] += rank
    if rank == 1:
        spoiled[150, 2] = np.nan
    tasks = {
        "data": lambda: parallel.shard(Batch(changed, y), mesh),
        "nan": lambda: parallel.shard(Batch(spoiled, y), mesh),
        "few": lambda: parallel.shard(Batch(x[:1], y[:1]), mesh),
        "unlike": lambda: parallel.shard_local(Batch(x[:, : 6 - rank], y), mesh),
        "none of its own": lambda: parallel.shard_local(Batch(x[: 3 - 3 * rank], y[: 3 - 3 * rank]), mesh),
        "settings": lambda: resumable(folder, mesh=mesh, sampling=distinct(16 + rank)),
        "start": lambda: resumable(folder, mesh=mesh, params=start(np.float64)._replace(b=np.float64(rank))),
        "folder": lambda: resumable(folder / "nowhere", mesh=mesh),
    }
    said = {}
    for name, task in tasks.items():
        try:
            task()
            said[name] = "nothing"
        except Exception as error:
            said[name] = f"{type(error).__name__}: {error}"
    return said


def local(folder, rank, mesh):
    """Each process with rows of its own, two thirds of them with rank 0."""
    x, y = problem(203, np.float64)
    cut = 203 if jax.process_count() == 1 else 150
    own = slice(0, cut) if rank == 0 else slice(cut, 203)
    data = parallel.shard_local(Batch(x[own], y[own]), mesh)
    back = parallel.gather(data)
    trace = descend(
        LOSS,
        start(np.float64),
        data,
        optimizer=0.1,
        sampling=distinct(16),
        steps=STEPS,
        key=jax.random.split(jax.random.key(5), 3)[0],
    )
    np.savez(folder / f"local{rank}.npz", w=trace.params.w, counts=data.counts, x=back.x, y=back.y)


if __name__ == "__main__":
    parallel.run(main)
