"""What a reshuffled pass does on linear regression: exactly, at every step inside every pass.

Within a pass the batches are parts of one random order, so no recursion over single steps exists; but passes
are independent of each other, and one pass averages over all n! orders by a recursion over **subsets**. With
`T_B` the matrix of one step on batch B, acting on `z = (1, d, ddᵀ)`, the expected product of the steps that have
used up exactly the examples U is

    F(∅) = I,      F(U) = mean over B ⊂ U, |B| = b, of T_B F(U∖B)

and after j batches of a pass the expected operator is the mean of F(U) over the `C(n, jb)` sets of that size. That
is 2ⁿ small matrices for n! orders: exact for n up to `MOST_EXAMPLES`.

As in `jaxgrad.sampling.reshuffled`, a pass has `n // b` steps and drops what is left of its order.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from jaxgrad import checks
from jaxgrad.checks import Count, Positive, checked
from jaxgrad.theory.least_squares import Moments, Problem, edge, from_eigenbasis, start_components

MOST_EXAMPLES = 16
"""The largest n for which all subsets are formed."""


class Floor(NamedTuple):
    """Where the expected excess loss settles at constant step size."""

    end: float
    """At the end of a pass."""
    average: float
    """Averaged over the steps of a pass."""


@checked
def moments(problem: Problem, start: Any, eta: Positive, b: Count, steps: Any) -> Moments:
    """Mean, second moment and expected excess loss of reshuffled SGD at the given steps, exactly (F5, F6).

    `start` and the result are as in `least_squares.sgd_moments`. Raises ValueError for more than `MOST_EXAMPLES`
    examples, a batch size outside 1 … n, or problems too large to hold.
    """
    t = checks.whole_numbers("steps", steps)
    prefixes = _prefixes(problem, eta, b)
    per_pass = len(prefixes) - 1
    c = start_components(problem, start)
    r = len(c)
    i, j = np.triu_indices(r)
    start_state = np.concatenate([[1.0], c, c[i] * c[j]])

    M, mean = np.zeros((len(t), r, r)), np.zeros((len(t), r))
    with np.errstate(over="ignore", invalid="ignore"):
        for k, step in enumerate(t.tolist()):
            whole = np.linalg.matrix_power(prefixes[-1], step // per_pass) @ start_state
            z = prefixes[step % per_pass] @ whole
            mean[k] = z[1 : 1 + r]
            M[k, i, j] = M[k, j, i] = z[1 + r :]
    return from_eigenbasis(problem, start, t.astype(np.int64), mean, M)


@checked
def floor(problem: Problem, eta: Positive, b: Count) -> Floor:
    """The floor of reshuffled SGD, exactly; infinite beyond `stable_edge`.

    For small step sizes it is O(η²) where fresh batches have O(η); for large ones it can lie above theirs.
    """
    prefixes = _prefixes(problem, eta, b)
    if _radius(prefixes[-1], len(problem.eigenvalues)) >= 1:
        return Floor(math.inf, math.inf)
    z = _fixed_point(prefixes[-1])
    losses = [_excess(problem, prefix @ z) for prefix in prefixes[1:]]
    return Floor(losses[-1], float(np.mean(losses)))


@checked
def bias(problem: Problem, eta: Positive, b: Count) -> Float[np.ndarray, " p"]:
    """`E[w] − w*` at the end of a pass, once settled, exactly: not zero, as it is for fresh batches."""
    r = len(problem.eigenvalues)
    P = _prefixes(problem, eta, b)[-1]
    m = np.linalg.solve(np.eye(r) - P[1 : 1 + r, 1 : 1 + r], P[1 : 1 + r, 0])
    return problem.directions @ m


@checked
def stable_edge(problem: Problem, b: Count) -> float:
    """The smallest step size at which `E‖w − w*‖²` no longer settles, to 1e-9 of it.

    The first crossing of 1 by the spectral radius of a pass, on a grid of 200 up to three times GD's edge, then by
    bisection. It lies above or below those of fresh batches, and can exceed GD's own edge.
    """
    r = len(problem.eigenvalues)

    def stable(eta: float) -> bool:
        return _radius(_prefixes(problem, eta, b)[-1], r) < 1

    grid = np.linspace(0, 3 * edge(problem), 201)[1:]
    beyond = next((k for k, eta in enumerate(grid) if not stable(float(eta))), None)
    if beyond is None:
        return math.inf
    low, high = (0.0 if beyond == 0 else float(grid[beyond - 1])), float(grid[beyond])
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if stable(middle) else (low, middle)
    return low


@checked
def bias_leading(problem: Problem, eta: Positive, b: Count) -> Float[np.ndarray, " p"]:
    """The bias to first order: `−(η/2) (K−1)/(n−1) H⁻¹ mean(Hᵢsᵢ)`, K = n/b batches, `sᵢ = gᵢ(w*)`.

    Raises ValueError unless b divides n.
    """
    n, Z = len(problem.X), problem.X @ problem.directions
    s = -2 * problem.residuals[:, None] * Z
    pull = np.mean(2 * Z * np.sum(Z * s, axis=1)[:, None], axis=0)
    batches = _whole_batches(n, b)
    return problem.directions @ (-eta / 2 * (batches - 1) / (n - 1) * pull / problem.eigenvalues)


@checked
def floor_leading(problem: Problem, eta: Positive, b: Count) -> float:
    """The pass-average floor to second order: `η² (K²−1)/(12(n−1)) tr(HS) + ½ mᵀHm`, m the leading bias.

    S is the covariance of the example gradients at w*. Raises ValueError unless b divides n.
    """
    n, Z = len(problem.X), problem.X @ problem.directions
    batches = _whole_batches(n, b)
    spread = 4 * np.mean(problem.residuals[:, None] ** 2 * Z**2, axis=0) @ problem.eigenvalues
    m = bias_leading(problem, eta, b) @ problem.directions
    return float(eta**2 * (batches**2 - 1) / (12 * (n - 1)) * spread + 0.5 * np.sum(problem.eigenvalues * m**2))


def _prefixes(problem: Problem, eta: float, b: int) -> np.ndarray:
    """The expected operator on (1, d, ddᵀ) after 0, 1, …, K batches of a pass."""
    n, r = len(problem.X), len(problem.eigenvalues)
    if b > n:
        raise ValueError(f"the batch size b must lie between 1 and n = {n}, got {b}")
    size = 1 + r + r * (r + 1) // 2
    if n > MOST_EXAMPLES or 2**n * size**2 > 2**27:
        raise ValueError(
            f"all subsets of {n} examples, with a {size} x {size} matrix each, are too many: this is exact for "
            f"n up to {MOST_EXAMPLES} and few coefficients"
        )
    batches = list(itertools.combinations(range(n), b))
    bits = np.array([sum(1 << i for i in batch) for batch in batches])
    one_step = _step_matrices(problem, eta, np.array(batches))

    masks = np.arange(2**n)
    count = np.bitwise_count(masks)
    F = np.zeros((2**n, size, size))
    F[0] = np.eye(size)
    means = [F[0].copy()]
    for used in range(b, n + 1, b):
        level = masks[count == used]
        for batch, T in zip(bits.tolist(), one_step, strict=True):
            holds = level[level & batch == batch]
            F[holds] += T @ F[holds ^ batch]
        F[level] /= math.comb(used, b)
        means.append(F[level].mean(axis=0))
    return np.stack(means)


def _step_matrices(problem: Problem, eta: float, batches: np.ndarray) -> np.ndarray:
    """`T_B` for each row of example numbers: `d → A d + q` on `(1, d, ddᵀ)`, in the eigenbasis."""
    Z, residuals = problem.X @ problem.directions, problem.residuals
    r = Z.shape[1]
    i, j = np.triu_indices(r)
    z, e = Z[batches], residuals[batches]
    A = np.eye(r)[None] - 2 * eta * np.einsum("kbi,kbj->kij", z, z) / batches.shape[1]
    q = 2 * eta * np.einsum("kb,kbi->ki", e, z) / batches.shape[1]

    T = np.zeros((len(batches), 1 + r + len(i), 1 + r + len(i)))
    T[:, 0, 0] = 1
    T[:, 1 : 1 + r, 0] = q
    T[:, 1 : 1 + r, 1 : 1 + r] = A
    T[:, 1 + r :, 0] = q[:, i] * q[:, j]
    T[:, 1 + r :, 1 : 1 + r] = A[:, i, :] * q[:, j, None] + q[:, i, None] * A[:, j, :]
    straight = A[:, i[:, None], i[None, :]] * A[:, j[:, None], j[None, :]]
    crossed = A[:, i[:, None], j[None, :]] * A[:, j[:, None], i[None, :]]
    T[:, 1 + r :, 1 + r :] = straight + np.where(i == j, 0.0, 1.0)[None, None, :] * crossed
    return T


def _fixed_point(P: np.ndarray) -> np.ndarray:
    """`z = (1, m, M)` with `P z = z`."""
    rest = np.linalg.solve(np.eye(len(P) - 1) - P[1:, 1:], P[1:, 0])
    return np.append(1.0, rest)


def _radius(P: np.ndarray, r: int) -> float:
    """Spectral radius of the second-moment part; that of the mean is never larger than its root."""
    return float(np.abs(np.linalg.eigvals(P[1 + r :, 1 + r :])).max())


def _excess(problem: Problem, z: np.ndarray) -> float:
    r = len(problem.eigenvalues)
    i, j = np.triu_indices(r)
    return 0.5 * float(problem.eigenvalues @ z[1 + r :][i == j])


def _whole_batches(n: int, b: int) -> int:
    if n % b:
        raise ValueError(f"the small-step formulas need b to divide n: n = {n}, b = {b}")
    return n // b
