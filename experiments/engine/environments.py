"""Environments in which the study runs again, so that one machine stands in for many.

Another machine rounds differently: XLA and NumPy use other vector instructions, BLAS another kernel, the C library
another `exp`, and sums are split over another number of threads. All of these can be set for a process. Other
differences are imitated by *nudged* data: every floating-point column is scaled up or down by one unit in the last
place of float32. A floating-point sum or product, in any order, is the exact one of data nudged by about that much
(backward error).

The tolerances of `verify` come from these environments (`echoes.py`). Leaving one of them out shows that the
tolerances hold on a machine that they were not made from (`proof.left_out`).
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

_NUMPY_AVX2 = {"NPY_DISABLE_CPU_FEATURES": "X86_V4 AVX512_ICL AVX512_SPR"}
_NUMPY_SSE = {"NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"}
_PLAIN_LIBM = {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4"}
_ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


class Environment(NamedTuple):
    """How a run of the study is started, and how its data are changed."""

    variables: Mapping[str, str] = MappingProxyType({})
    """Environment variables. On other processors they have no effect."""
    nudge: int | None = None
    """The number of the nudge of the data; None for unchanged data."""
    other_python: bool = False
    """Run by the interpreter of `--python`: another Python, another JAX."""


ENVIRONMENTS: dict[str, dict[str, Environment]] = {
    "cpu": {
        "nudged": Environment({}, 1),
        "SSE4.2": Environment(
            {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "OPENBLAS_CORETYPE": "Prescott", **_NUMPY_SSE, **_PLAIN_LIBM}
        ),
        "SSE4.2, nudged": Environment(
            {"XLA_FLAGS": "--xla_cpu_max_isa=SSE4_2", "OPENBLAS_CORETYPE": "Prescott", **_NUMPY_SSE}, 2
        ),
        "AVX, nudged": Environment(
            {"XLA_FLAGS": "--xla_cpu_max_isa=AVX", "OPENBLAS_CORETYPE": "Sandybridge", **_NUMPY_SSE, **_PLAIN_LIBM}, 3
        ),
        "AVX2": Environment({"XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "OPENBLAS_CORETYPE": "Haswell", **_NUMPY_AVX2}),
        "AVX2, one thread, nudged": Environment(
            {
                "XLA_FLAGS": "--xla_cpu_max_isa=AVX2 --xla_cpu_multi_thread_eigen=false",
                "OPENBLAS_CORETYPE": "Zen",
                **_NUMPY_AVX2,
                **_ONE_THREAD,
            },
            4,
        ),
        "AVX-512, vectors of 512 bits, nudged": Environment(
            {
                "XLA_FLAGS": "--xla_cpu_max_isa=AVX512 --xla_cpu_prefer_vector_width=512",
                "OPENBLAS_CORETYPE": "SkylakeX",
            },
            5,
        ),
        "one thread, C library without FMA": Environment(
            {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", **_ONE_THREAD, **_PLAIN_LIBM}
        ),
        "another Python and JAX": Environment({}, None, other_python=True),
    },
    "gpu": {
        "no autotuning, nudged": Environment({"XLA_FLAGS": "--xla_gpu_autotune_level=0"}, 1),
        "as is, nudged": Environment({}, 2),
        "as is again": Environment(),
        "nudged once more": Environment({}, 3),
    },
}
"""By device. At least eight on a CPU, no two alike. The last one needs another interpreter (`--python`)."""
