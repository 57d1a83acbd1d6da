"""Rows on disk: the numbers of rows in memory, and what is wrong with a file said before anything runs."""

import threading
import time
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxgrad.rows as files_of_rows
from jaxgrad import open_rows
from jaxgrad.descent import descend, full_gradient, full_loss, full_pass, keep_best, on_disk, small_gradient, small_step
from jaxgrad.losses import mean_loss, softmax_cross_entropy, squared
from jaxgrad.models import linear
from jaxgrad.rows import moments, pick, read
from jaxgrad.sampling import distinct, full_batch, reshuffled
from jaxgrad.types import Batch, Linear

LOSS = mean_loss(linear, squared)
START = Linear(jnp.zeros(4), jnp.zeros(()))
N = 3001


@pytest.fixture(scope="module")
def table():
    r = np.random.default_rng(3)
    return r.normal(size=(N, 5)) + np.array([100.0, 0, 0, 0, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, table):
    place = tmp_path_factory.mktemp("shards")
    for i, part in enumerate(np.split(table, [1000, 1001, 2500])):
        np.save(place / f"part-{i:02}.npy", part)
    return place


@pytest.mark.parametrize("sampling", [distinct(32), reshuffled(64)])
def test_sgd_from_disk_gives_the_bits_of_sgd_in_memory(folder, table, sampling):
    rows = open_rows(folder, target=-1, memory=1e-4)
    arguments = dict(optimizer=1e-5, sampling=sampling, steps=100, key=jax.random.key(1), record=7)
    there = descend(LOSS, START, rows, **arguments)
    here = descend(LOSS, START, Batch(table[:, :4], table[:, 4]), **arguments)
    assert (there.params.w == here.params.w).all()
    assert there.steps.tolist() == here.steps.tolist()
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-12)
    assert on_disk.Reader(rows, sampling, jax.random.key(1), 100).steps < 50  # several blocks, or nothing was shown


def test_full_batch_from_disk(folder, table, monkeypatch):
    monkeypatch.setattr(files_of_rows, "PART", 704 * 40)  # 5 parts, of which one crosses shards and the last is smaller
    monkeypatch.setattr(full_pass, "BLOCK", 300 * 40)
    rows = open_rows(folder, target=0).scaled(table.mean(axis=0), table.std(axis=0))
    z = (table - table.mean(axis=0)) / table.std(axis=0)
    arguments = dict(optimizer=0.1, sampling=full_batch(), steps=20, key=jax.random.key(1), record=5)
    rule = small_gradient(1e-3, every=5)
    there = descend(LOSS, START, rows, **arguments, stop=rule)
    here = descend(LOSS, START, Batch(z[:, 1:], z[:, 0]), **arguments, stop=rule)
    np.testing.assert_allclose(there.params.w, here.params.w, rtol=1e-11)
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-11)
    assert there.status == here.status
    assert there.examples[-1] == here.examples[-1]


def test_moments_in_one_pass(folder, table, monkeypatch):
    monkeypatch.setattr(files_of_rows, "PART", 704 * 40 * 8)
    found = moments(open_rows(folder))
    np.testing.assert_allclose(found.mean, table.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(table.T, bias=True), rtol=1e-11, atol=1e-14)


@given(indices=st.lists(st.integers(0, N - 1), min_size=1, max_size=50))
def test_rows_come_in_the_order_asked_for(folder, table, indices):
    rows = open_rows(folder)
    assert (pick(rows, np.array(indices)) == table[indices]).all()


@given(bounds=st.tuples(st.integers(0, N), st.integers(0, N)))
def test_consecutive_rows(folder, table, bounds):
    low, high = min(bounds), max(bounds)
    assert (read(open_rows(folder), low, high) == table[low:high]).all()


@pytest.mark.parametrize("count", [3, 20_000])  # few rows, sorted for the disk, and many, in any order
@pytest.mark.parametrize("part", [64 * 40, 704 * 40, 2**25])
def test_rows_of_many_parts_and_shards(folder, table, tmp_path, monkeypatch, count, part):
    monkeypatch.setattr(files_of_rows, "PART", part)
    np.save(tmp_path / "one.npy", table)
    indices = np.random.default_rng(count).integers(0, N, count).astype(np.int32)
    for place in (folder, tmp_path / "one.npy"):
        assert (pick(open_rows(place), indices) == table[indices]).all()


@pytest.mark.parametrize("model", ["multiplies", "sums"])
@pytest.mark.parametrize("part", [64 * 40, 704 * 40, 2**25])
def test_the_full_gradient_whatever_the_model_does_with_x(folder, table, monkeypatch, model, part):
    def sums(params, x):
        return jnp.sum(params.w * jnp.tanh(x)) + params.b

    monkeypatch.setattr(files_of_rows, "PART", part)
    loss = LOSS if model == "multiplies" else mean_loss(sums, squared)
    rows = open_rows(folder, target=2)
    params = Linear(jnp.array([0.5, -1.0, 2.0, 0.1]), jnp.array(0.3))
    value, gradient = full_loss(loss, params, rows), full_gradient(loss, params, rows)
    batch = Batch(np.delete(table, 2, axis=1), table[:, 2])
    expected = jax.value_and_grad(loss)(params, batch)
    np.testing.assert_allclose(value, expected[0], rtol=1e-12)
    np.testing.assert_allclose(gradient.w, expected[1].w, rtol=1e-11)
    np.testing.assert_allclose(gradient.b, expected[1].b, rtol=1e-11)


@pytest.mark.parametrize("evaluate", [full_loss, full_gradient])
def test_a_pass_over_the_rows_inside_a_traced_function_is_refused(folder, evaluate):
    """JAX spoke of an unexpected tracer: the passes run in threads, which see nothing of its tracing."""
    rows = open_rows(folder, target=-1)
    at = lambda params: jax.tree.leaves(evaluate(LOSS, params, rows))[0].sum()
    how = dict(optimizer=0.01, sampling=distinct(8), steps=4, key=jax.random.key(1), record=2)
    calls = (
        lambda: jax.jit(at)(START),
        lambda: descend(LOSS, START, rows, observe=at, **how),
        lambda: descend(LOSS, START, rows, stop=keep_best(at), **how),
    )
    for call in calls:
        with pytest.raises(TypeError, match="a pass over rows on disk cannot stand inside a function that JAX traces"):
            call()


def test_a_diverging_run_is_marked_as_in_memory(folder, table):
    rows = open_rows(folder, target=-1, memory=1e-4)
    arguments = dict(optimizer=10.0, sampling=distinct(8), steps=200, key=jax.random.key(1), record=4)
    there = descend(LOSS, START, rows, **arguments)
    here = descend(LOSS, START, Batch(table[:, :4], table[:, 4]), **arguments)
    assert there.status == here.status
    assert there.status.startswith("diverged at step")


def softmax_loss(params, batch):
    logits = batch.x @ params["W"]
    return jnp.mean(jax.vmap(softmax_cross_entropy)(logits, batch.y))


@pytest.mark.parametrize("sampling", [full_batch(), distinct(32)])
def test_classes_from_disk_are_whole_numbers(tmp_path, table, sampling):
    """Beside standardised columns, which their numbers are none of."""
    labels = np.argmax(table[:, 1:4], axis=1)
    stacked = np.column_stack([labels, table])
    np.save(tmp_path / "rows.npy", stacked)
    shift, scale = stacked.mean(axis=0), stacked.std(axis=0)
    rows = open_rows(tmp_path / "rows.npy", target=0, classes=3, memory=1e-4).scaled(shift, scale)
    batch = Batch(jnp.asarray((table - shift[1:]) / scale[1:]), jnp.asarray(labels, jnp.int32))
    arguments = dict(optimizer=0.1, sampling=sampling, steps=30, key=jax.random.key(1), record=4)
    there, here = (descend(softmax_loss, {"W": jnp.zeros((5, 3))}, data, **arguments) for data in (rows, batch))
    np.testing.assert_allclose(there.params["W"], here.params["W"], rtol=1e-11)
    np.testing.assert_allclose(there.loss, here.loss, rtol=1e-11)
    assert there.loss[-1] < 0.9 * there.loss[0]


@pytest.mark.parametrize("wrong", [1.5, 3.0, -1.0])
def test_what_is_no_class_is_named_by_its_row(tmp_path, table, wrong):
    rows = np.column_stack([table, np.zeros(N)])
    rows[1234, 5] = wrong
    np.save(tmp_path / "rows.npy", rows)
    rows = open_rows(tmp_path / "rows.npy", target=-1, classes=3)
    words = rf"row 1,234, column 5 .* is {wrong}; a class is a whole number from 0 to 2"
    with pytest.raises(ValueError, match=words):
        full_loss(softmax_loss, {"W": jnp.zeros((5, 3))}, rows)
    with pytest.raises(ValueError, match=words):
        pick(rows, np.array([5, 1234]))


def raises(step, steps):
    if step >= 10:
        raise KeyboardInterrupt


@pytest.mark.parametrize("how", ["finishes", "stops early", "raises"])
def test_nothing_reads_on_when_a_run_is_over(folder, monkeypatch, how):
    """Neither the thread that fetches nor its memory is left, though the next block was on its way."""
    rows = open_rows(folder, target=-1, memory=1e-4)
    before, readers = set(threading.enumerate()), []
    fetch = on_disk.Reader._fetch

    def slowly(self, number):
        readers.append(self)
        time.sleep(0.05)
        return fetch(self, number)

    monkeypatch.setattr(on_disk.Reader, "_fetch", slowly)
    with pytest.raises(KeyboardInterrupt) if how == "raises" else nullcontext():
        descend(
            LOSS,
            START,
            rows,
            optimizer=1e-5,
            sampling=distinct(32),
            steps=100,
            key=jax.random.key(1),
            record=11,
            stop=small_step(1e3) if how == "stops early" else None,
            progress=raises if how == "raises" else False,
        )
    assert set(threading.enumerate()) == before
    assert readers
    assert all(not reader._buffers and reader._device[1] is None for reader in readers)


# --- bad files -------------------------------------------------------------------------------------------------


def copied(folder, place):
    for path in folder.iterdir():
        (place / path.name).write_bytes(path.read_bytes())
    return place


def spoil_cut_off(place):
    whole = (place / "part-02.npy").read_bytes()
    (place / "part-02.npy").write_bytes(whole[:-8])


def spoil_header(place):
    (place / "part-02.npy").write_bytes(b"no numpy file")


def spoil_missing(place):
    (place / "part-01.npy").unlink()


def spoil_columns(place):
    np.save(place / "part-02.npy", np.ones((3, 4)))


def spoil_dtype(place):
    np.save(place / "part-02.npy", np.ones((3, 5), np.float32))


def spoil_shape(place):
    np.save(place / "part-02.npy", np.ones(3))


def spoil_whole_numbers(place):
    np.save(place / "part-02.npy", np.ones((3, 5), np.int64))


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoil_cut_off, ValueError, "part-02.npy is cut off: .* bytes where 1,499 rows need"),
        (spoil_header, ValueError, "part-02.npy is damaged or not an npy file"),
        (spoil_missing, FileNotFoundError, "the shard part-01.npy is missing"),
        (spoil_columns, ValueError, "part-02.npy has 4 columns of float64, but part-00.npy has 5"),
        (spoil_dtype, ValueError, "part-02.npy has 5 columns of float32, but part-00.npy has 5 of float64"),
        (spoil_shape, ValueError, r"part-02.npy has shape \(3,\)"),
        (spoil_whole_numbers, ValueError, "part-02.npy has shape .* int64"),
    ],
)
def test_a_bad_shard_is_named(folder, tmp_path, spoil, error, words):
    spoil(copied(folder, tmp_path))
    with pytest.raises(error, match=words):
        open_rows(tmp_path)


def test_what_is_not_there(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        open_rows(tmp_path / "nothing.npy")
    with pytest.raises(FileNotFoundError, match=r"holds no .npy file"):
        open_rows(tmp_path)
    for wrong in (dict(classes=3), dict(target=-1, classes=1)):
        with pytest.raises(ValueError, match="classes needs a target and is at least 2"):
            open_rows(folder, **wrong)
    with pytest.raises(ValueError, match="has 5 columns, so the target's number is from -5 to 4; got 5"):
        open_rows(folder, target=5)


def test_an_entry_that_is_not_finite_is_named_by_its_row(folder, tmp_path, table):
    part = np.load(folder / "part-02.npy")
    part[99, 3] = np.inf
    np.save(copied(folder, tmp_path) / "part-02.npy", part)
    rows = open_rows(tmp_path, target=-1)
    with pytest.raises(ValueError, match=r"row 1,100, column 3 .*is inf"):
        full_loss(LOSS, START, rows)
    with pytest.raises(ValueError, match=r"row 1,100, column 3 .*is inf"):
        pick(rows, np.array([5, 1100]))


def test_rows_on_disk_serve_one_run(folder):
    rows = open_rows(folder, target=-1)
    with pytest.raises(ValueError, match="one run on one device"):
        descend(
            LOSS, START, rows, optimizer=0.1, sampling=distinct(2), steps=1, key=jax.random.split(jax.random.key(0), 2)
        )
    with pytest.raises(ValueError, match="b = 4000"):
        descend(LOSS, START, rows, optimizer=0.1, sampling=distinct(4000), steps=1, key=jax.random.key(0))
