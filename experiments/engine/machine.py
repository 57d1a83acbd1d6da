"""This machine: its cores, processor and memory, and JAX made ready on it."""

import contextlib
import os
import platform
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The processor's name as its maker has it, where the system tells; else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


LEVELS = (
    ("AVX-512", "avx512f"),
    ("AVX2", "avx2"),
    ("AVX", "avx"),
    ("SSE4.2", "sse4_2"),
    ("SVE", "sve"),
    ("NEON", "asimd"),
)


def instructions() -> str:
    """The widest vector instructions that XLA may use: the processor's, or less where `XLA_FLAGS` says so."""
    if said := re.search(r"--xla_cpu_max_isa=(\S+)", os.environ.get("XLA_FLAGS", "")):
        return f"{said[1].replace('_', '.').upper()} by XLA_FLAGS"
    with contextlib.suppress(OSError):
        content = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        words = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", content, re.MULTILINE)[:1]).split())
        return next((name for name, flag in LEVELS if flag in words), "unknown")
    return "NEON" if platform.machine() in ("arm64", "aarch64") else "unknown"


IN_MEMORY = 6
"""A file that is loaded takes so many times its size: it is read, widened to float64, and standardised."""


def stays_on_disk(data: str, memory: float | None) -> bool:
    """Whether `--data` is read as it is needed: any folder, and an npy file that loading would not fit."""
    path = Path(data).expanduser()
    if path.is_dir():
        return True
    if path.suffix != ".npy" or not path.is_file():
        return False
    return IN_MEMORY * path.stat().st_size > (free_memory() if memory is None else memory * 2**30)


def free_memory() -> float:
    """Bytes of memory that are free for the asking; without end where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def start_jax(device: str | None, join: bool = False) -> str:
    """Import JAX for a device and name what it computes on; matrix products are exact to float32.

    With `join`, as one of several processes where this was started as one (`jaxgrad.parallel.start`).
    """
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    keep_compiled()
    # A GPU would otherwise round the factors of a product to fewer bits than the CPU does.
    jax.config.update("jax_default_matmul_precision", "highest")
    if join:
        from jaxgrad import parallel

        parallel.start()
    return jax.default_backend()


def keep_compiled() -> None:
    """Let JAX keep what it compiles in the person's cache folder, so that the next start need not compile it again.

    Each entry is sealed, for JAX runs a damaged one without a word (`jaxgrad.compiled`). A setting of this process,
    not of its environment: what times a cold start in a process of its own has none. Where
    `JAX_COMPILATION_CACHE_DIR` is set, that folder is used; empty, it turns this off.
    """
    import jax

    from jaxgrad import compiled

    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", Path(base) / "jaxgrad" / "compiled")
    if folder and "://" not in str(folder) and compiled.keep(folder) and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        # As JAX comes, it keeps only what took more than a second.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def compile_clock() -> Callable[[], float]:
    """The clock that runs while JAX traces, lowers or compiles: seconds of every core at work on it, in this process.

    JAX tells of each such span when it ends. One that was spent within another (an operation on constants is
    compiled while a function is traced) counts once.
    """
    global _clock
    if _clock is None:
        _clock = _new_clock()
    return _clock


_clock: Callable[[], float] | None = None


def _new_clock() -> Callable[[], float]:
    import jax

    spans: dict[int, list[tuple[float, float]]] = {}

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            mine = spans.setdefault(threading.get_ident(), [])
            end = time.perf_counter()
            start = end - duration_secs
            while mine and mine[-1][0] >= start:
                mine.pop()
            mine.append((start, end))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return lambda: sum(end - start for own in list(spans.values()) for start, end in own)
