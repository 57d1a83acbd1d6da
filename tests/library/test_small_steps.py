"""Small loops as one function: which steps qualify, that they compute the same, and that a wrong guess is mended."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxgrad import losses, models
from jaxgrad.descent import advance, descend, init, small_steps
from jaxgrad.sampling import distinct, with_replacement
from jaxgrad.types import Batch

pytestmark = pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is for the CPU")

LINEAR = losses.mean_loss(models.linear, losses.squared)
LOGISTIC = losses.mean_loss(models.linear, losses.logloss, l2=0.01)
NET = losses.mean_loss(models.two_layer, losses.half_squared)
CLASSES = losses.mean_loss(models.two_layer, losses.softmax_cross_entropy)


def rows(n, d, k=0):
    random = np.random.default_rng(0)
    x = random.standard_normal(size=(n, d), dtype=np.float32)
    y = (x[:, :1] > 0).astype(np.float32) if k == 1 else (x[:, 0] > 0).astype(np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(y.astype(np.int32) if k > 1 else y))


SOME = rows(40, 5)


def net(d, k=1):
    return models.init_two_layer(jax.random.key(0), d, 6, k, dtype=jnp.float32)


@pytest.mark.parametrize(
    ("loss", "start", "batch", "expected"),
    [
        (LINEAR, models.init_linear(5), rows(8, 5), True),
        (LOGISTIC, models.init_linear(5), rows(8, 5), True),
        (NET, net(5), rows(1, 5, 1), True),
        (NET, net(5), rows(8, 5, 1), False),  # a matrix by a matrix
        (CLASSES, net(5, 3), rows(1, 5, 3), False),  # the label's place is a scatter
        (LINEAR, models.init_linear(64), rows(1024, 64), False),  # 256 kB
        (lambda w, batch: jnp.mean(jnp.sort(batch.x @ w)), jnp.ones(5, jnp.float32), rows(8, 5), False),
    ],
)
def test_steps_of_simple_small_operations_qualify(loss, start, batch, expected):
    assert small_steps.fits(jax.grad(loss), start, batch) is expected


@pytest.mark.parametrize("make", [with_replacement, distinct])
@pytest.mark.parametrize(("loss", "b"), [(LINEAR, 1), (LINEAR, 8), (LOGISTIC, 8)])
@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.sgd(0.05, momentum=0.9, nesterov=True)])
def test_one_function_computes_what_the_kernels_do(loss, b, make, optimizer):
    data, start = rows(200, 5), init(models.init_linear(5), optimizer)
    go = partial(advance, loss=loss, optimizer=optimizer, sampling=make(b))

    def after(single):
        program = jax.jit(partial(go, single=single)).lower(start, jax.random.key(1), data, 1).compile()
        assert ('inlineable="false"' in program.as_text()) == single
        return program(start, jax.random.key(1), data, 300)

    one, kernels = after(True), after(False)
    assert int(one.step) == 300
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(kernels), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)


def test_a_step_that_the_compiler_refuses_is_compiled_the_usual_way(monkeypatch):
    """A softmax's scatter, taken for simple: the emitter of small calls does not know it."""
    data, start = rows(50, 5, 3), net(5, 3)
    run = partial(descend, CLASSES, start, data, optimizer=0.1, steps=20, key=jax.random.key(0), record=3)
    right = run(sampling=distinct(8))
    jax.clear_caches()
    monkeypatch.setattr(small_steps, "_is_simple", lambda equation: True)
    state, rule = init(start, optax.sgd(0.1)), optax.sgd(0.1)
    go = jax.jit(partial(advance, loss=CLASSES, optimizer=rule, sampling=distinct(8), single=True))
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNIMPLEMENTED"):
        go(state, jax.random.key(0), data, 5)
    guessed = run(sampling=distinct(8))
    np.testing.assert_array_equal(guessed.loss, right.loss)
    jax.clear_caches()


@pytest.mark.parametrize(
    "loss",
    [
        lambda params, batch: jnp.mean((batch.x @ params.w + params.b) ** 2),  # no labels
        lambda params, batch: jnp.sum((params.w - 1) ** 2) + params.b**2,  # no examples
        lambda params, batch: LINEAR(params, Batch(SOME.x[:4], SOME.y[:4])),  # others
        lambda params, batch: 0.0 * params.b,  # nothing to descend
    ],
)
@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.set_to_zero()])
def test_a_loss_may_ignore_its_batch(loss, optimizer):
    """What a loop does not need used to abort the process, within XLA."""
    trace = descend(
        loss, models.init_linear(5), SOME, optimizer=optimizer, sampling=distinct(4), steps=20, key=jax.random.key(0)
    )
    assert int(trace.steps[-1]) == 20
    assert np.isfinite(trace.loss).all()
