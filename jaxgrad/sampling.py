"""Which examples a step sees (F3, F5): the one argument that separates GD from SGD.

    full_batch()         every example, every step: gradient descent
    with_replacement(b)  b independent uniform draws
    distinct(b)          b different examples, a fresh choice each step
    reshuffled(b)        a new random order each pass over the data, cut into batches of b

The lecture's "draw b < n indices at random" (F5) leaves open which of the last three is meant.

Each is a pure function of `(key, step)`: nothing is carried from step to step, so the same step sees the same
examples alone, under `jit`, under `vmap` over seeds, in any chunking, after a resume, or on another host.

A step costs O(b), whatever n. Shuffling n indices to use b of them would cost a sort of n per step; instead a
random order is a *keyed bijection* of `[0, n)` that is evaluated only where it is needed (`permuted`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from jaxgrad.types import Key, Sampling

EXACT_UP_TO = 64
"""Orders of at most this many examples are drawn exactly, each as likely, from n random words."""

_ROUNDS = 10
_MAX_EXAMPLES = 2**31 - 1


def full_batch() -> Sampling:
    """Every example, in order, every step: the gradient is exact and the descent is GD (F3)."""
    return Sampling("full batch", None, _every)


def with_replacement(b: int) -> Sampling:
    """`b` independent, uniform indices a step; an example may occur twice. `Cov[g_B] = Σ/b`.

    Raises ValueError if `b < 1`. `b > n` is allowed: the draws are independent.
    """
    return Sampling("with replacement", _batch_size(b), _independent)


def distinct(b: int) -> Sampling:
    """`b` different indices, a fresh choice each step. `Cov[g_B] = Σ/b · (n−b)/(n−1)`; `b = n` is GD.

    Raises ValueError if `b < 1`, and on drawing if `b > n`.
    """
    return Sampling("distinct", _batch_size(b), _fresh_order)


def reshuffled(b: int) -> Sampling:
    """A new random order each pass; step `t` of a pass takes its t-th `b` indices (random reshuffling).

    A pass has `n // b` steps. Where `b` does not divide `n`, the last `n mod b` examples of that pass's order
    form an incomplete batch, which is **dropped**: they are other examples in each pass.

    Raises ValueError if `b < 1`, and on drawing if `b > n`.
    """
    return Sampling("reshuffled", _batch_size(b), _pass_order)


def _batch_size(b: int) -> int:
    if isinstance(b, bool) or not isinstance(b, int):
        raise TypeError(f"the batch size b must be an int, got {b!r} ({type(b).__name__})")
    if b < 1:
        raise ValueError(f"the batch size b must be at least 1, got {b}")
    return b


def check_sizes(sampling: Sampling, n: int) -> None:
    """Raise ValueError unless `sampling` can draw from `n` examples: `1 <= n < 2³¹`, and `b <= n` if distinct."""
    if not 1 <= n <= _MAX_EXAMPLES:
        raise ValueError(f"cannot sample from n = {n} examples: n must be from 1 to {_MAX_EXAMPLES}")
    b = sampling.batch_size
    if b is not None and b > n and sampling.name != "with replacement":
        raise ValueError(
            f"cannot draw b = {b} different examples out of n = {n}: "
            f"use b <= {n}, or with_replacement({b}) if an example may occur twice"
        )


def _every(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    del key, step, b  # the full batch is no choice
    return jnp.arange(n, dtype=jnp.int32)


def _independent(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    check_sizes(with_replacement(b), n)
    return jax.random.randint(jax.random.fold_in(key, step), (b,), 0, n, dtype=jnp.int32)


def _fresh_order(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    check_sizes(distinct(b), n)
    return permuted(jax.random.fold_in(key, step), jnp.arange(b, dtype=jnp.int32), n)


def _pass_order(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    check_sizes(reshuffled(b), n)
    steps_per_pass = n // b
    step = jnp.asarray(step, jnp.int32)
    positions = (step % steps_per_pass) * b + jnp.arange(b, dtype=jnp.int32)
    return permuted(jax.random.fold_in(key, step // steps_per_pass), positions, n)


def permuted(key: Key, positions: Int[Array, " b"], n: int) -> Int[Array, " b"]:
    """`π(positions)` for a random permutation `π` of `[0, n)` that is determined by `key`: O(b) for any n.

    Up to `EXACT_UP_TO` examples `π` is uniform over all n! orders. Beyond, it is a Feistel network
    (Luby & Rackoff 1988) on pairs `(l, r)` in `[0, p) × [0, q)`, `pq >= n`, whose rounds add a keyed hash of
    one half to the other (Black & Rogaway 2002): each round is a bijection, so their composition is. A value
    at or beyond n is sent through again until it falls below n (cycle walking), which keeps it a bijection of
    `[0, n)`; `p, q` are chosen so that this is rare, or, where n factors, never.
    """
    if n <= EXACT_UP_TO:
        # The rank of a random word among n of them; a tie (one in 2³² pairs) goes to the earlier one.
        words, place = jax.random.bits(key, (n,), jnp.uint32), jnp.arange(n, dtype=jnp.int32)
        mine, here = words[positions][:, None], positions[:, None]
        before = (words[None, :] < mine) | ((words[None, :] == mine) & (place[None, :] < here))
        return jnp.sum(before, axis=1, dtype=jnp.int32)
    p, q = _grid(n)
    words = jax.random.key_data(key).reshape(-1)
    round_keys = _hash(_hash(jnp.arange(_ROUNDS, dtype=jnp.uint32), words[0]), words[-1])
    once = lambda x: _feistel(x, round_keys, p, q)  # noqa: E731
    x = once(positions.astype(jnp.uint32))
    if p * q > n:
        x = jax.lax.while_loop(lambda x: jnp.any(x >= n), lambda x: jnp.where(x >= n, once(x), x), x)
    return x.astype(jnp.int32)


def _grid(n: int) -> tuple[int, int]:
    """`p, q` near √n with `pq >= n` and as little to spare as possible."""
    root = math.isqrt(n - 1) + 1
    p = min(range(root, max(1, 3 * root // 4 - 1), -1), key=lambda p: -n % p)
    return p, -(-n // p)


def _feistel(x: UInt[Array, " b"], round_keys: UInt[Array, " rounds"], p: int, q: int) -> UInt[Array, " b"]:
    """A keyed bijection of `[0, pq)`: `l += hash(r)` mod p and `r += hash(l)` mod q, in turn."""

    def two_rounds(i: Any, halves: tuple[Array, Array]) -> tuple[Array, Array]:
        l, r = halves
        l = (l + _hash(r, round_keys[2 * i]) % p) % p
        r = (r + _hash(l, round_keys[2 * i + 1]) % q) % q
        return l, r

    # A loop, not unrolled: it compiles in a fifth of the time, and a draw of many steps runs as fast.
    l, r = jax.lax.fori_loop(0, _ROUNDS // 2, two_rounds, (x // q, x % q))
    return l * q + r


def _hash(x: UInt[Array, " b"], round_key: UInt[Array, ""]) -> UInt[Array, " b"]:
    """A 32-bit mix of value and key, every input bit on every output bit (MurmurHash3)."""
    x = (x ^ round_key) * jnp.uint32(0x9E3779B1) + round_key
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
