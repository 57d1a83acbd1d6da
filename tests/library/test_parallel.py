"""Many devices and many processes: the numbers of one, and an end for all where one fails.

What needs processes runs `parallel_worker.py` in some, each with a timeout; what does not is tested here.
"""

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from parallel_worker import LOSS, problem, resumable, runs, saved, start

from experiments.engine import results
from jaxgrad import launch, noise, parallel
from jaxgrad.parallel import processes
from jaxgrad.sampling import distinct
from jaxgrad.types import Batch, Sampling

WORKER = Path(__file__).with_name("parallel_worker.py")
TIMEOUT = 240
BOUND = {"float32": 1e-5, "float64": 1e-13}


def worker(folder, task, *, processes=1, devices=None, expect=0, **environment):
    """What the processes said, after they ended with the expected status; and what the launcher said."""
    command = [sys.executable, str(WORKER), task, str(folder)]
    if processes > 1:
        command[1:1] = ["-m", "jaxgrad.launch", "-n", str(processes), "--logs", str(folder / "logs")]
    elif devices:
        environment["JAXGRAD_DEVICES"] = str(devices)
    root = {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])}
    # A machine that is busy, or suspended, is no failure; deadlocks of collectives (jax 0.10) show as timeouts.
    # One that is killed while it writes to a shared cache of compiled programs would spoil it for the other tests.
    environment = {
        "JAXGRAD_HEARTBEAT": "80",
        "JAXGRAD_START_TIMEOUT": "80",
        "NPROC": "16",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    } | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=os.environ | root | environment)
    logs = [log.read_text() for log in sorted((folder / "logs").glob("rank*.log"))]
    said = "".join(logs) or done.stderr
    assert done.returncode == expect, said
    return said, done.stderr


@pytest.fixture(scope="module")
def alone():
    return runs(None)


def same(found, alone):
    """The names of runs whose parameters or losses are further from those of one device than they may be."""
    assert found
    bound = {name: BOUND[name.split()[0]] for name in found}
    return {name: error for name in found if (error := np.abs(found[name] - alone[name]).max()) > bound[name]}


# --- the same numbers ------------------------------------------------------------------------------------------


def test_four_virtual_devices_give_the_numbers_of_one(tmp_path, alone):
    worker(tmp_path, "virtual", devices=4)
    found = dict(np.load(tmp_path / "virtual.npz"))
    assert set(found) == set(alone)
    assert same(found, alone) == {}


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "asks for 4 virtual devices, XLA_FLAGS for 2"),
        ({"JAX_NUM_CPU_DEVICES": "3"}, "asks for 4 virtual devices, jax_num_cpu_devices for 3: leave one out"),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_NUM_CPU_DEVICES": "4"}, ""),
    ],
)
def test_two_different_numbers_of_virtual_devices_are_refused(environment, words):
    """One of them was taken, and nothing said."""
    code = "from jaxgrad import parallel; parallel.start(); import jax; print(jax.device_count())"
    root = {"PYTHONPATH": str(WORKER.parents[2]), "JAXGRAD_DEVICES": "4"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | root | environment
    )
    assert (words in done.stderr) if words else (done.stdout == "4\n")
    assert (done.returncode == 0) == (not words)


REFUSED = {
    "data": "ValueError: rank 1 was given other data than rank 0",
    "nan": "in rows 102 to 202, numbered from the first of them: x[48, 2] is nan",
    "few": "ValueError: 1 rows cannot be spread over 2 devices",
    "unlike": "ValueError: rank 1 was given other columns or dtypes than rank 0",
    "none of its own": "there are no examples",
    "settings": "ValueError: rank 1 was given other settings than rank 0",
    "start": "ValueError: rank 1 was given other start than rank 0",
    "folder": "nowhere does not exist",
}


def test_two_processes_give_the_numbers_of_one_and_of_each_other_and_refuse_what_does_not_fit(tmp_path, alone):
    worker(tmp_path, "two", processes=2)
    first, second = (dict(np.load(tmp_path / f"two{rank}.npz")) for rank in (0, 1))
    assert set(first) == set(alone)
    assert same(first, alone) == {}
    assert all((first[name] == second[name]).all() for name in alone)
    # Rows that each process brought itself, 150 and 53 of them, are the rows of all in the order of the ranks.
    own, (x, y) = np.load(tmp_path / "local0.npz"), problem(203, np.float64)
    assert own["counts"].tolist() == [150, 53]
    assert (own["x"] == x).all()
    assert (own["y"] == y).all()
    assert np.abs(own["w"] - alone["float64 203 distinct/0"]).max() < 1e-13
    # Where something is wrong on one, all are told, and none is left to wait.
    for rank in (0, 1):
        said = json.loads((tmp_path / f"refused{rank}.json").read_text())
        assert {name: words for name, words in said.items() if REFUSED[name] not in words} == {}


def test_four_processes_give_the_numbers_of_one_and_end_when_one_of_them_fails(tmp_path, alone):
    said, summary = worker(tmp_path, "four", processes=4, expect=1)
    found = [dict(np.load(tmp_path / f"four{rank}.npz")) for rank in range(4)]
    assert {name.split("/")[0] for name in found[0]} == {
        f"{dtype} 203 {sampling}" for dtype in BOUND for sampling in ("full batch", "distinct")
    }
    assert same(found[0], alone) == {}
    assert all((other[name] == found[0][name]).all() for other in found for name in other)
    assert "RuntimeError: planted" in said
    assert "rank 1 ended with status 1; all others were ended" in summary


def test_the_comparison_would_see_a_difference(alone):
    off = alone | {"float64 203 distinct/0": alone["float64 203 distinct/0"] + 1e-12}
    assert list(same(off, alone)) == ["float64 203 distinct/0"]


# --- stop, resume ----------------------------------------------------------------------------------------------


def test_a_run_goes_on_from_its_checkpoint_on_as_many_processes_or_fewer_or_more(tmp_path):
    whole = saved(resumable(tmp_path, resume=False, file="whole.npz"))

    def near(found):
        return all(np.abs(found[name] - whole[name]).max() < 1e-13 for name in whole)

    # Two processes, of which one is killed at step 50; the checkpoint is of step 40.
    _, summary = worker(tmp_path, "SIGKILL", processes=2, expect=128 + signal.SIGKILL)
    assert "rank 1 was killed by SIGKILL" in summary
    assert "resume" in summary
    (tmp_path / "copy.npz").write_bytes((tmp_path / "two.npz").read_bytes())
    assert near(saved(resumable(tmp_path, file="copy.npz")))  # 2 -> 1

    def stop(step, steps):
        if step == 50:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(parallel.Preempted):
        resumable(tmp_path, file="one.npz", progress=stop)
    said, summary = worker(tmp_path, "goes on", processes=2, expect=parallel.AGAIN)
    one, two, never = (dict(np.load(tmp_path / f"{name} in the end 0.npz")) for name in ("one", "two", "never"))
    assert near(one)  # 1 -> 2
    assert near(two)  # 2 -> 2
    assert all((two[name] == never[name]).all() for name in whole)
    # In the end, a Ctrl-C to one of them.
    assert "stopped as asked" in summary
    assert [line for line in said.splitlines() if line.startswith("stopped at step")] == [
        f"stopped at step 50 as asked; {tmp_path / 'stopped.npz'} holds it: run the same with resume"
    ]
    assert near(saved(resumable(tmp_path, file="stopped.npz")))


def test_the_study_in_two_processes_stops_when_asked_and_goes_on_in_one(tmp_path):
    x, y = problem(120, np.float64)
    np.savetxt(tmp_path / "own.csv", np.column_stack([x, y]), delimiter=",", header="a,b,c,d,e,f,y", comments="")
    study = [
        "-m",
        "experiments",
        "gd_vs_sgd",
        "--quick",
        "--bare",
        "--data",
        "own.csv",
        "--target",
        "y",
        "--out",
        "out",
    ]
    environment = os.environ | {
        "PYTHONPATH": str(WORKER.parents[2]),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAXGRAD_HEARTBEAT": "80",
    }
    kept = tmp_path / "out" / "gd_vs_sgd" / "unfinished"
    launched = subprocess.Popen(
        [sys.executable, "-m", "jaxgrad.launch", "-n", "2", *study],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    with launched:
        assert launched.stderr is not None
        for line in launched.stderr:
            if "full batch: 1 fresh runs" in line:
                launched.send_signal(signal.SIGTERM)
                break
        said = launched.stderr.read()
        assert launched.wait(TIMEOUT) == parallel.AGAIN, said
    assert "stopped during gd_vs_sgd, whose earlier results are untouched; --resume goes on from there" in said
    tuning = np.load(kept / "own full batch tuning.npy")
    assert sorted(path.name for path in kept.parent.iterdir()) == ["unfinished"]
    # A tuning that nobody would find shows that it is not done again.
    np.save(kept / "own full batch tuning.npy", 1.5 * tuning)
    done = subprocess.run(
        [sys.executable, *study, "--resume"],
        cwd=tmp_path,
        env=environment,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = results.read(tmp_path / "out", "gd_vs_sgd", "cpu").numbers
    assert np.array_equal(found["own/full batch/tuning"], 1.5 * tuning)
    assert np.isfinite(found["own/b = 8/excess"]).all()
    assert not kept.exists()


# --- failures --------------------------------------------------------------------------------------------------


def test_one_that_is_frozen_ends_all_and_is_named(tmp_path):
    _, summary = worker(tmp_path, "SIGSTOP", processes=2, expect=1, JAXGRAD_HEARTBEAT="4")
    assert "rank 1 was frozen and gave no sign of life; all others were ended" in summary


def test_no_process_outlives_a_launcher_that_is_killed(tmp_path):
    """Neither one that waits in Python, nor one that waits for the others."""
    (tmp_path / "waits.py").write_text(
        "import os, pathlib, time\n"
        "from jax.experimental import multihost_utils\n"
        "rank = os.environ['JAXGRAD_PROCESS_ID']\n"
        "pathlib.Path(f'pid{rank}').write_text(str(os.getpid()))\n"
        "time.sleep(600) if rank == '0' else multihost_utils.sync_global_devices('never')\n"
    )
    command = [sys.executable, "-m", "jaxgrad.launch", "-n", "2", "--logs", "logs", "waits.py"]
    root = {"PYTHONPATH": os.pathsep.join([str(WORKER.parents[2]), os.environ.get("PYTHONPATH", "")])}
    launched = subprocess.Popen(command, cwd=tmp_path, env=os.environ | root, stderr=subprocess.DEVNULL)
    notes = [tmp_path / "pid0", tmp_path / "pid1"]
    until(lambda: all(note.exists() and note.read_text() for note in notes))
    pids = [int(note.read_text()) for note in notes]
    assert all(running(pid) for pid in pids)
    launched.kill()
    launched.wait()
    try:
        until(lambda: not any(running(pid) for pid in pids), seconds=60)
        # XLA's own thread may add its words, in the midst of a line, before the process is gone.
        assert "ended because the launcher is gone" in (tmp_path / "logs" / "rank1.log").read_text()
    finally:
        for pid in filter(running, pids):
            os.kill(pid, signal.SIGKILL)


def until(condition, seconds=TIMEOUT):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def running(pid):
    """Whether the process runs; not one that is dead and that nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_launcher_says_how_each_process_ended(tmp_path, capfd):
    (tmp_path / "fails.py").write_text("import sys\nsys.exit(3)\n")
    ended = launch.run(["-n", "1", "--logs", str(tmp_path), str(tmp_path / "fails.py")])
    assert ended == (3, (3,))
    assert "rank 0 ended with status 3" in capfd.readouterr().err
    assert launch.run(["-n", "1", str(tmp_path / "nothing.py")]) == (2, ())


@pytest.mark.parametrize(
    ("statuses", "frozen", "absent", "rank"),
    [
        ([69, 3, 69], [], [], 1),  # ended by itself
        ([-signal.SIGABRT, -signal.SIGKILL], [], [], 1),  # killed; the other was ended by JAX
        ([69, None], [1], [], 1),
        ([1, None], [1], [], 0),  # failed before that one froze
        ([None, 69, None], [], [2], 2),  # never joined
        ([69, -signal.SIGABRT], [], [], 1),
        ([0, 69], [], [], 1),
    ],
)
def test_the_rank_at_which_it_began(statuses, frozen, absent, rank):
    assert launch._culprit(statuses, frozen, absent) == rank


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_a_process_that_never_joins_is_named_on_all_others():
    where, said = f"127.0.0.1:{free_port()}", {}

    def join(rank):
        with pytest.raises(ConnectionError) as error:
            processes.roll_call(where, 4, rank, 1.5)
        said[rank] = str(error.value)

    others = [threading.Thread(target=join, args=(rank,)) for rank in (1, 3)]
    for other in others:
        other.start()
    join(0)
    for other in others:
        other.join(10)
    assert set(said.values()) == {
        "rank 2 of 4 did not join within 1.5 s: start all together, or raise JAXGRAD_START_TIMEOUT"
    }
    assert len(said) == 3


def test_two_processes_of_one_rank_are_found():
    where, said = f"127.0.0.1:{free_port()}", []

    def join(rank):
        with pytest.raises(ConnectionError) as error:
            processes.roll_call(where, 3, rank, 5)
        said.append(str(error.value))

    others = [threading.Thread(target=join, args=(1,)) for _ in range(2)]
    for other in others:
        other.start()
    join(0)
    for other in others:
        other.join(10)
    assert any("called itself rank 1 of 3" in words for words in said)


def test_a_port_in_use_and_a_coordinator_that_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"rank 0 cannot listen on {where}.*choose another port"):
            parallel.start(where, 2, 0, timeout=1)
    with pytest.raises(ConnectionError, match=f"rank 1 cannot reach rank 0 at {where} within 1 s.*is it running"):
        parallel.start(where, 2, 1, timeout=1)


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (("127.0.0.1:1", 2), {}, "rank missing"),
        ((None, 2, 2), {"JAXGRAD_COORDINATOR": "127.0.0.1:1"}, "rank is 2, but with 2 processes"),
        (("127.0.0.1", 2, 0), {}, "must be given as host:port"),
        ((), {"JAXGRAD_NUM_PROCESSES": "two"}, "JAXGRAD_NUM_PROCESSES must be a whole number, at least 1; got 'two'"),
        ((None, None, -1), {}, "rank must be a whole number, at least 0; got -1"),
    ],
)
def test_numbers_that_cannot_be_are_refused(monkeypatch, arguments, environment, words):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        parallel.start(*arguments)


def test_alone_is_a_single_process():
    jnp.zeros(())  # JAX runs already, and may
    assert parallel.start() == (0, 1, "single")
    assert parallel.is_main()


def test_explicit_axes_are_refused_with_what_to_use():
    explicit = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"must be Auto.*parallel.mesh\(\)"):
        parallel.shard(problem(4, np.float64), explicit)


# --- stratified indices ----------------------------------------------------------------------------------------


def skewed(n):
    """Rows in an order, so that shares differ."""
    batch = problem(n, np.float64)
    order = np.argsort(batch.y)
    return Batch(batch.x[order], batch.y[order])


@pytest.mark.parametrize("counts", [(3, 3), (4, 3), (3, 2, 2)])
def test_the_stratified_variance_is_that_of_all_batches_there_are(counts):
    n, D = sum(counts), len(counts)
    b, batch, params = 2 * D, skewed(n), start(np.float64)
    each = np.stack(
        [
            np.concatenate(
                [np.ravel(leaf) for leaf in jax.tree.leaves(jax.grad(LOSS)(params, Batch(x[None], y[None])))]
            )
            for x, y in zip(*batch, strict=True)
        ]
    )
    ends = np.cumsum(counts)
    shares = [list(itertools.combinations(range(end - count, end), 2)) for count, end in zip(counts, ends, strict=True)]
    drawn = np.stack(
        [
            sum(count / n * each[list(pair)].mean(axis=0) for count, pair in zip(counts, pairs, strict=True))
            for pairs in itertools.product(*shares)
        ]
    )
    full = each.mean(axis=0)
    np.testing.assert_allclose(drawn.mean(axis=0), full, atol=1e-13)
    exact = ((drawn - full) ** 2).sum(axis=1).mean()
    predicted = noise.stratified_trace(LOSS, params, batch, counts, b)
    np.testing.assert_allclose(predicted, exact, rtol=1e-12)
    # Shares that differ: what lies between them is no noise here.
    assert predicted < noise.gamma(distinct(b), n) * noise.measure(LOSS, params, batch, curvature=False).trace


@pytest.mark.parametrize("counts", [(100, 100), (101, 100, 100)])
def test_stratified_batches_have_that_variance(counts):
    """Monte Carlo over 4,000 steps of the sampling itself, padded as on devices."""
    n, D = sum(counts), len(counts)
    batch, params, b = skewed(n), start(np.float64), 5 * D
    data = padded(batch, counts)
    loss, rows, sampling = parallel.on(data, LOSS, parallel.stratified(b, counts))

    @jax.jit
    def gradients(steps):
        def one(step):
            indices = sampling.indices(jax.random.key(2), step, max(counts) * D)
            found = jax.grad(loss)(params, sampling.batch(rows, indices))
            return jax.flatten_util.ravel_pytree(found)[0], indices

        return jax.vmap(one)(steps)

    drawn, indices = map(np.asarray, gradients(jnp.arange(4000, dtype=jnp.int32)))
    full = np.asarray(jax.flatten_util.ravel_pytree(jax.grad(LOSS)(params, batch))[0])
    squared = ((drawn - full) ** 2).sum(axis=1)
    predicted = noise.stratified_trace(LOSS, params, batch, counts, b)
    assert abs(squared.mean() - predicted) < 4 * squared.std() / np.sqrt(len(squared))
    # Each share gives b/D of its own rows, all different, and never what only fills up.
    share, place = np.divmod(indices, max(counts))
    assert (share == np.repeat(np.arange(D), b // D)).all()
    assert (place < np.array(counts)[share]).all()
    assert all(len(set(step.tolist())) == b for step in indices)
    # Every row as often as any other of its share.
    seen = np.bincount((np.cumsum([0, *counts[:-1]])[share] + place).reshape(-1), minlength=n)
    expected = np.repeat([4000 * b / D / count for count in counts], counts)
    assert (np.abs(seen - expected) < 5 * np.sqrt(expected)).all()


def padded(batch, counts):
    """What `shard` makes of a batch on `len(counts)` devices, on one."""
    most, first = max(counts), np.cumsum([0, *counts[:-1]])
    rows = np.concatenate(
        [np.minimum(np.arange(most), count - 1) + at for count, at in zip(counts, first, strict=True)]
    )
    weight = np.concatenate([np.arange(most) < count for count in counts]).astype(np.float32)
    spread = jax.tree.map(lambda leaf: jnp.asarray(leaf[rows]), batch)
    return parallel.Sharded(spread, None if weight.all() else jnp.asarray(weight), counts, parallel.mesh())


def test_filled_up_rows_have_weight_0_exactly():
    counts, params = (34, 34, 33), start(np.float64)
    batch = problem(101, np.float64)
    loss, rows, sampling = parallel.on(padded(batch, counts), LOSS, distinct(7))
    exact, found = (jax.value_and_grad(f)(params, data) for f, data in ((LOSS, batch), (loss, rows)))
    assert all(
        jnp.allclose(a, b, rtol=1e-14, atol=1e-14) for a, b in zip(*map(jax.tree.leaves, (exact, found)), strict=True)
    )
    spoiled = rows._replace(batch=jax.tree.map(lambda leaf: leaf.at[-1].set(1e6), rows.batch))
    assert loss(params, spoiled) == found[0]
    # The same indices as of one machine: place by place the same rows.
    mine = sampling.batch(rows, sampling.indices(jax.random.key(0), 3, 102)).batch
    theirs = distinct(7).batch(jax.tree.map(jnp.asarray, batch), distinct(7).indices(jax.random.key(0), 3, 101))
    assert all((a == b).all() for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(("b", "counts", "words"), [(5, (4, 4), "multiple of the 2"), (10, (4, 4), "share of 4")])
def test_batches_that_shares_cannot_give_are_refused(b, counts, words):
    with pytest.raises(ValueError, match=words):
        parallel.stratified(b, counts)
    with pytest.raises(ValueError, match="b must be a multiple"):
        noise.stratified_trace(LOSS, start(np.float64), problem(8, np.float64), counts, b)


def test_a_stratified_sampling_knows_its_shares():
    data = padded(problem(9, np.float64), (5, 4))
    with pytest.raises(ValueError, match=r"stratified\(b, data.counts\)"):
        parallel.on(data, LOSS, parallel.stratified(2, (4, 5)))
    assert isinstance(parallel.stratified(2, (5, 4)), Sampling)


# --- the lesson ------------------------------------------------------------------------------------------------


def test_pmean_in_shard_map_is_caught_as_a_scale(tmp_path):
    page = WORKER.parents[2] / "experiments" / "derivations" / "pmean.md"
    done = subprocess.run(
        [sys.executable, WORKER.with_name("pmean_worker.py"), page],
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=os.environ | {"PYTHONPATH": str(WORKER.parents[2]), "JAX_ENABLE_X64": "1"},
    )
    assert done.returncode == 0, done.stderr
    verdicts = json.loads(done.stdout.splitlines()[-1])
    np.testing.assert_allclose(verdicts["gradient"]["ratio"], 4, rtol=1e-12)
    assert verdicts["gradient"]["report"].startswith("WRONG")
    assert "scale" in verdicts["gradient"]["report"]
    for name in ("divided", "varying"):
        np.testing.assert_allclose(verdicts[name]["ratio"], 1, rtol=1e-12)
        assert verdicts[name]["report"].startswith("RIGHT")
