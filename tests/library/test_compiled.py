"""A damaged entry of the compilation cache is compiled again, never run."""

import os
import subprocess
import sys

import pytest

from jaxgrad import compiled

PROGRAM = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from jaxgrad import compiled
assert compiled.keep(sys.argv[1])
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
constant = jax.numpy.arange(1.0, 65.0)
print(jax.jit(lambda x: (x * 3.25 + constant).sum())(jax.numpy.ones(64)).tolist())
print(hits.count("/jax/compilation_cache/cache_hits"), hits.count("/jax/compilation_cache/cache_misses"))
"""


def ran(folder):
    """What the program computed, how many entries it took from the folder and how many it compiled."""
    plain = {name: value for name, value in os.environ.items() if "CACHE" not in name}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)], capture_output=True, text=True, check=False, env=plain
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    number, counts = done.stdout.splitlines()
    hits, compiled_now = map(int, counts.split())
    return float(number), hits, compiled_now


def test_damaged_entries_in_a_valid_container_are_compiled_again_and_the_numbers_are_right(tmp_path):
    from jax._src import compilation_cache

    right = 64 * 3.25 + 64 * 65 / 2
    number, hits, misses = ran(tmp_path)
    assert (number, hits) == (right, 0)
    assert misses >= 1
    assert ran(tmp_path) == (right, misses, 0)
    for entry in tmp_path.glob("*-cache"):
        inner = bytearray(compilation_cache.decompress_executable(entry.read_bytes()))
        for at in range(len(inner) // 2, len(inner), 97):
            inner[at] ^= 0x10
        entry.write_bytes(compilation_cache.compress_executable(bytes(inner)))
    assert ran(tmp_path) == (right, 0, misses)
    assert ran(tmp_path) == (right, misses, 0)  # sound again


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "a-cache").write_bytes(b"valuE"),
        lambda folder: (folder / "a-cache").write_bytes(b"valu"),
        lambda folder: (folder / "a-cache").write_bytes(b""),
        lambda folder: (folder / "a-cache").write_bytes((folder / "b-cache").read_bytes()),
        lambda folder: [(folder / f"a-{k}").write_bytes((folder / f"b-{k}").read_bytes()) for k in ("cache", "sha256")],
        lambda folder: (folder / "a-sha256").unlink(),
        lambda folder: (folder / "a-sha256").write_bytes(b""),
        lambda folder: (folder / "a-cache").unlink(),
    ],
)
def test_an_entry_that_is_not_what_was_written_counts_as_absent_and_is_replaced(tmp_path, damage):
    compiled.write(tmp_path, "a", b"value")
    compiled.write(tmp_path, "b", b"other")
    assert compiled.read(tmp_path, "a") == b"value"
    damage(tmp_path)
    assert compiled.read(tmp_path, "a") is None
    assert compiled.read(tmp_path, "b") == b"other"
    compiled.write(tmp_path, "a", b"value")
    assert compiled.read(tmp_path, "a") == b"value"


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "file").touch()
    compiled.write(tmp_path / "file", "a", b"value")
    assert compiled.read(tmp_path / "file", "a") is None
