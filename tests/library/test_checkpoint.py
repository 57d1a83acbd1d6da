"""A run on disk: resumed to the bit, refused where it is another's, and never lost to a failed write."""

import os
import resource
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from parallel_worker import LOSS, problem, resumable, saved, start

from jaxgrad import open_rows, parallel
from jaxgrad.descent import descend, no_improvement, target_loss
from jaxgrad.descent.checkpoint import Checkpoint, rows_hash
from jaxgrad.fingerprints import fingerprint as _program
from jaxgrad.losses import absolute, mean_loss
from jaxgrad.models import linear
from jaxgrad.sampling import distinct, full_batch
from jaxgrad.types import Batch


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return saved(resumable(tmp_path_factory.mktemp("whole"), resume=False))


def interrupted(folder, number=signal.SIGTERM, at=50, **changes):
    """A run that gets a signal at a step, and says it was asked to stop."""

    def progress(step, steps):
        if step == at:
            os.kill(os.getpid(), number)

    with pytest.raises(parallel.Preempted) as stopped:
        resumable(folder, progress=progress, **changes)
    assert stopped.value.code == parallel.AGAIN == 75
    assert stopped.value.step == at


def equal(one, other):
    return all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(tmp_path, capsys, whole, number):
    before = signal.getsignal(number)
    interrupted(tmp_path, number)
    assert "stopped at step 50 as asked" in capsys.readouterr().err
    assert signal.getsignal(number) is before
    assert equal(saved(resumable(tmp_path)), whole)


def test_a_run_that_is_over_is_not_run_again(tmp_path, whole):
    resumable(tmp_path, resume=False)
    stamp = (tmp_path / "run.npz").stat().st_mtime_ns
    assert equal(saved(resumable(tmp_path)), whole)
    assert (tmp_path / "run.npz").stat().st_mtime_ns == stamp


def test_a_resumed_run_may_record_elsewhere_from_the_checkpoint_on(tmp_path, whole):
    """What was recorded before stays, because nobody can look back."""
    first = resumable(tmp_path, until=60, record=[0, 25, 60])
    on = resumable(tmp_path, record=[0, 10, 40, 90, 120])
    assert on.steps.tolist() == [0, 25, 60, 90, 120]
    assert on.loss[:3].tolist() == first.loss.tolist()
    assert np.array_equal(saved(on)["w"], whole["w"])


def test_a_checkpoint_beyond_the_budget_is_refused(tmp_path):
    """It came back as a run that had finished at a step that it had long passed."""
    resumable(tmp_path, until=60)
    before = (tmp_path / "run.npz").read_bytes()
    with pytest.raises(ValueError, match="has already taken 60 steps: steps counts from the first one, got 40"):
        resumable(tmp_path, until=40)
    assert (tmp_path / "run.npz").read_bytes() == before


def test_many_runs_with_a_stopping_rule_go_on_too(tmp_path):
    keys = jax.random.split(jax.random.key(5), 3)
    rule = no_improvement(lambda params: LOSS(params, problem(203, np.float64)), patience=2, every=10)
    # Step sizes and keys, in more than one tile.
    changes = {"key": keys, "stop": rule, "optimizer": [0.1, 0.3], "memory": 1e-6}
    never = resumable(tmp_path, resume=False, **changes)
    (tmp_path / "run.npz").unlink()
    interrupted(tmp_path, at=20, **changes)
    resumed = resumable(tmp_path, **changes)
    assert equal(saved(resumed), saved(never))
    assert resumed.status == never.status
    assert any(status.startswith("stopped") for row in never.status for status in row)
    with pytest.raises(ValueError, match="its optimizer is not"):
        resumable(tmp_path, **changes | {"optimizer": [0.1, 0.2]})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": problem(204, np.float64)}, "its data is not"),
        ({"data": problem(203, np.float64)._replace(y=np.roll(problem(203, np.float64).y, 1))}, "its data is not"),
        ({"key": jax.random.key(6)}, "its key is not"),
        ({"optimizer": optax.sgd(0.2, momentum=0.9)}, "its optimizer is not"),
        ({"optimizer": 0.1}, "its optimizer is not"),
        ({"sampling": distinct(17)}, "its sampling is not"),
        ({"params": jax.tree.map(lambda leaf: leaf + 1, start(np.float64))}, "its start is not"),
        ({"loss": mean_loss(linear, absolute)}, "its loss is not"),
        ({"stop": target_loss(0.01)}, "its stop is not"),
    ],
)
def test_another_runs_checkpoint_is_refused(tmp_path, stopped_at_50, changes, words):
    (tmp_path / "run.npz").write_bytes(stopped_at_50)
    with pytest.raises(ValueError, match=f"is a checkpoint of another run: {words} what this one has"):
        resumable(tmp_path, **changes)
    assert (tmp_path / "run.npz").read_bytes() == stopped_at_50


def test_a_run_that_a_rule_has_ended_does_not_pass_for_one_with_another_rule(tmp_path):
    """It did: the old end came back, as if the new target had been reached."""
    rule = {"stop": target_loss(2.0, every=10)}
    ended = resumable(tmp_path, **rule)
    assert ended.status == "stopped: target loss"
    assert resumable(tmp_path, until=240, **rule).stopped_at == ended.stopped_at
    for other in ({"stop": target_loss(1.0, every=10)}, {"stop": None}, {"stop": target_loss(2.0, every=20)}):
        with pytest.raises(ValueError, match=r"its stop is not .* give run.state in place of params"):
            resumable(tmp_path, **other)
    metrics = [
        no_improvement(lambda params, k=k: k * LOSS(params, problem(203, np.float64)), patience=9) for k in (1, 2)
    ]
    resumable(tmp_path, file="metric.npz", stop=metrics[0])
    with pytest.raises(ValueError, match="its stop is not"):
        resumable(tmp_path, file="metric.npz", stop=metrics[1])


@pytest.fixture(scope="module")
def stopped_at_50(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    interrupted(folder)
    return (folder / "run.npz").read_bytes()


def test_a_loss_is_the_same_whatever_else_was_traced():
    """`inner` is called twice; printed by JAX, once it is written once, and once twice."""
    inner = jax.jit(lambda x: jnp.sin(x) * 2)
    outer = jax.jit(lambda x: inner(x) + 1)
    texts, hashes = set(), set()
    for _ in range(2):
        loss = lambda params, batch: (outer(params.w) + inner(params.w)).mean()
        shapes = jax.eval_shape(lambda: (start(np.float64), problem(3, np.float64)))
        texts.add(str(jax.make_jaxpr(loss)(*shapes)))
        hashes.add(_program(loss, *shapes))
        inner.clear_cache()
    assert (len(texts), len(hashes)) == (2, 1)
    other = _program(lambda params, batch: (outer(params.w) + inner(params.w) * 1.5).mean(), *shapes)
    assert other not in hashes


@pytest.mark.parametrize("wrap", [lambda loss: loss, jax.jit])
def test_losses_are_told_apart_by_every_number_that_they_hold(wrap):
    """An array that a loss closes over is too long to be printed in full: one entry of 5,000 is another."""
    shapes = jax.eval_shape(lambda: (start(np.float64), problem(3, np.float64)))

    def program(weights):
        weights = weights if isinstance(weights, float) else jnp.asarray(weights)
        return _program(wrap(lambda params, batch: (params.w.sum() * weights).mean()), *shapes)

    weights = np.arange(5000.0)
    changed = np.where(weights == 2500, 2500.5, weights)
    assert program(weights) == program(weights.copy())
    assert program(weights) != program(changed)
    # A number is printed with 8 digits.
    assert program(0.1) == program(0.1)
    assert program(0.1) != program(0.1 + 1e-12)


def test_a_damaged_checkpoint_is_refused(tmp_path, stopped_at_50):
    for content in (b"", stopped_at_50[:-300], b"junk"):
        (tmp_path / "run.npz").write_bytes(content)
        if content:
            with pytest.raises(ValueError, match=r"is not a whole checkpoint.*remove it to begin anew"):
                resumable(tmp_path)


def test_one_that_is_there_is_not_overwritten_unasked(tmp_path, stopped_at_50):
    (tmp_path / "run.npz").write_bytes(stopped_at_50)
    with pytest.raises(FileExistsError, match="go on from it with resume=True"):
        resumable(tmp_path, resume=False)


@pytest.mark.parametrize(
    ("path", "every", "error", "words"),
    [
        ("nowhere/run.npz", 20, FileNotFoundError, "nowhere does not exist"),
        ("run.txt", 20, ValueError, "is an .npz file"),
        ("run.npz", 0, ValueError, "every must be at least 1, got 0"),
        ("run.npz", 2.5, TypeError, "every must be a whole number, got 2.5"),
    ],
)
def test_where_none_can_be_written_is_found_before_anything_runs(tmp_path, path, every, error, words):
    with pytest.raises(error, match=words):
        descend(
            LOSS, start(np.float64), problem(20, np.float64), optimizer=0.1, sampling=full_batch(), steps=5,
            key=jax.random.key(0), checkpoint=Checkpoint(tmp_path / path, every=every),
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_found_before_anything_runs(tmp_path, monkeypatch):
    # A folder where the temporary file should be: root, who may write anywhere, cannot open it either.
    (tmp_path / "run.npz.tmp").mkdir()
    with pytest.raises(OSError, match=r"no checkpoint can be written to .*run.npz: Is a directory"):
        resumable(tmp_path)


def test_a_write_that_fails_leaves_the_old_one(tmp_path, stopped_at_50, whole):
    """The disk is full, here: a file may not grow beyond 1,000 bytes."""
    (tmp_path / "run.npz").write_bytes(stopped_at_50)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match=r"no checkpoint could be written to .*; the one that was there is whole"):
            resumable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "run.npz").read_bytes() == stopped_at_50
    assert [path.name for path in tmp_path.iterdir()] == ["run.npz"]
    assert equal(saved(resumable(tmp_path)), whole)


def test_rows_are_told_apart_by_every_bit_and_their_order():
    data = problem(50, np.float32)
    known = rows_hash(data)
    assert rows_hash(Batch(jnp.asarray(data.x), jnp.asarray(data.y))) == known
    x = data.x.copy()
    x[7, 2] = np.nextafter(x[7, 2], np.float32(9))
    swapped = data.x.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    columns = data.x[:, ::-1].copy()
    others = [rows_hash(Batch(other, data.y)) for other in (x, swapped, columns)]
    assert len({known, *others, rows_hash(problem(50, np.float64)), rows_hash(problem(49, np.float32))}) == 6
    filled = jax.tree.map(lambda leaf: np.concatenate([leaf[:24], leaf[:2], leaf[24:]]), data)
    assert rows_hash(filled, (24, 26)) == known
    assert rows_hash(filled) != known


def test_small_floats_survive(tmp_path):
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    data = np.ones((8, 3), ml_dtypes.bfloat16)

    def loss(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2)

    def run(steps, resume):
        return descend(loss, params, data, optimizer=0.01, sampling=distinct(2), steps=steps, key=jax.random.key(0),
                       checkpoint=Checkpoint(tmp_path / "b.npz", every=5, resume=resume))  # fmt: skip

    run(10, resume=False)
    whole = run(20, resume=True)
    assert whole.params["w"].dtype == jnp.bfloat16


def test_rows_on_disk_go_on_to_the_same_bits(tmp_path):
    x, y = problem(500, np.float64)
    np.save(tmp_path / "rows.npy", np.column_stack([x, y]))
    rows = open_rows(tmp_path / "rows.npy", target=-1, memory=2e-4)
    whole = saved(resumable(tmp_path, resume=False, data=rows))
    (tmp_path / "run.npz").unlink()
    interrupted(tmp_path, data=rows)
    assert equal(saved(resumable(tmp_path, data=rows)), whole)
    assert equal({"w": whole["w"]}, {"w": descend(
        LOSS, start(np.float64), Batch(x, y), optimizer=optax.sgd(0.1, momentum=0.9), sampling=distinct(16), steps=120,
        key=jax.random.key(5)).params.w})  # fmt: skip


def test_a_second_run_on_one_checkpoint_is_refused_while_the_first_lives(tmp_path, stopped_at_50, whole):
    """Whether it has just begun or would go on; a first one that was killed keeps nobody out."""
    path = tmp_path / "run.npz"
    path.write_bytes(stopped_at_50)
    code = """
import sys, time
from jaxgrad.descent.checkpoint import Checkpoint, held
with held(Checkpoint(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"held\n"
        words = rf"another run \(process {first.pid}\) writes checkpoints to .*run.npz; wait for it to end"
        with pytest.raises(BlockingIOError, match=words):
            resumable(tmp_path)
        first.kill()
    assert path.read_bytes() == stopped_at_50
    assert equal(saved(resumable(tmp_path)), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]
