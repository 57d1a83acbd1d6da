"""Strict numerics for every test: float64, no silent rank or dtype promotion, the same examples each time."""

import ctypes
import gc
import os
import sys
from pathlib import Path

import jax
import pytest
from hypothesis import settings

gc.disable()  # until all is imported: see pytest_collection_finish
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# The first call of a shape compiles, so a deadline would measure the compiler.
settings.register_profile("jaxgrad", deadline=None, derandomize=True, max_examples=25, print_blob=False)
settings.load_profile("jaxgrad")


@pytest.fixture(autouse=True)
def same_settings():
    """No test leaves JAX with another precision, for which the next one's checkpoint would be of another run."""
    before = jax.config.jax_default_matmul_precision
    yield
    if jax.config.jax_default_matmul_precision != before:
        jax.config.update("jax_default_matmul_precision", before)


MOST = 1.5 * 2**30
"""Bytes of memory after which a worker lets its compiled programs go. Thousands of them take more than 5 GB, slow the
collector down tenfold, and reach 65,530 mapped pieces of memory, where Linux maps no more and the compiler dies."""


@pytest.fixture(autouse=True)
def bounded_memory():
    """No worker grows without end."""
    yield
    status = Path("/proc/self/statm")
    if sys.platform == "linux" and int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST:
        jax.clear_caches()
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps what was freed until it is told
        if trim is not None:
            trim(0)


@pytest.fixture(scope="session")
def knows_float16():
    """Whether XLA can compile float16 here: on a processor without F16C its code names functions that nobody has."""
    try:
        jax.jit(jax.numpy.tanh)(jax.numpy.ones(40, "float16"))
    except jax.errors.JaxRuntimeError:
        return False
    return True


@pytest.fixture
def key():
    return jax.random.key(20210407)


def pytest_collection_modifyitems(items):
    """The longest tests first, so that no worker waits for one at the end."""
    long = ("quick_study", "few_kills", "every_planted_fault", "missing_or_stale", "end_at_the_same_loss", "ctrl_c")
    items.sort(key=lambda item: not any(words in item.name for words in long))


def pytest_collection_finish():
    """Two things that cost a third of the tests' time and check nothing."""
    # What was imported stays: the collector need not look through it again and again.
    gc.freeze()
    gc.enable()
    # Called ten thousand times, with numbers. Its callers have their types checked.
    from jaxgrad.theory import escape

    escape._compositions.__no_type_check__ = True
