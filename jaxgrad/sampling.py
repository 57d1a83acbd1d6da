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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt

from jaxgrad import checks
from jaxgrad.checks import Count, checked
from jaxgrad.types import Key, Sampling

EXACT_UP_TO = 64
"""Orders of at most this many examples are drawn from n random words: each as likely, as far as 64 random bits go."""

_NETWORKS = 5
_MAX_EXAMPLES = 2**31 - 1


@checked
def full_batch(rows: Count | None = None) -> Sampling:
    """Every example, in order, every step: the gradient is exact and the descent is GD (F3).

    With `rows`, that gradient is evaluated over blocks of so many rows and added up: the same to rounding, for a loss
    that is a mean over examples, in one pass over the data and in bounded memory (`descent.row_blocks`). `descend`
    chooses it by itself where it pays.
    """
    return Sampling("full batch", None, _every, rows)


@checked
def with_replacement(b: Count) -> Sampling:
    """`b` independent, uniform indices a step; an example may occur twice. `Cov[g_B] = Σ/b`.

    The random words behind a batch are all different, so that two of its indices agree n in 2³² too rarely (0.2 % at
    n = 10⁷).

    Raises ValueError if `b < 1`. `b > n` is allowed: the draws are independent.
    """
    return Sampling("with replacement", b, _independent, draw_many=_MANY[_independent])


@checked
def distinct(b: Count) -> Sampling:
    """`b` different indices, a fresh choice each step. `Cov[g_B] = Σ/b · (n−b)/(n−1)`; `b = n` is GD.

    Raises ValueError if `b < 1`, and on drawing if `b > n`.
    """
    return Sampling("distinct", b, _fresh_order, draw_many=_MANY[_fresh_order])


@checked
def reshuffled(b: Count, *, drop_last: bool = True) -> Sampling:
    """A new random order each pass; step `t` of a pass takes its t-th `b` indices (random reshuffling).

    A pass has `n // b` steps. Where `b` does not divide `n`, the last `n mod b` examples of that pass's order
    form an incomplete batch, which is **dropped**: they are other examples in each pass.

    With `drop_last=False` it is the last step of the pass, whose gradient is the mean over those r = n mod b examples:
    each pass sees all n. That step's gradient is as noisy as one of r distinct examples (`noise.gamma`), and at the
    same step size each of its examples counts b/r times as much as the others of the pass.

    Raises ValueError if `b < 1`, and on drawing if `b > n`.
    """
    if not drop_last:
        return Sampling("reshuffled", b, _whole_pass_order, draw_many=_whole_pass_orders, drop_last=False)
    return Sampling("reshuffled", b, _pass_order, draw_many=_pass_orders)


def is_with_replacement(sampling: Sampling) -> bool:
    """Whether a batch is independent draws. The law is the function that draws; the name is for people."""
    return sampling.draw is _independent


def is_distinct(sampling: Sampling) -> bool:
    """Whether a batch is different examples, a fresh choice each step."""
    return sampling.draw is _fresh_order


def is_reshuffled(sampling: Sampling) -> bool:
    """Whether the batches of a pass are cut from one order."""
    return sampling.draw in (_pass_order, _whole_pass_order)


def check_sizes(sampling: Sampling, n: int) -> None:
    """Raise ValueError unless `sampling` can draw from `n` examples: `1 <= n < 2³¹`, and `b <= n` if distinct."""
    sampling, n = checks.sampling("sampling", sampling), checks.integer("n", n)
    if not 1 <= n <= _MAX_EXAMPLES:
        raise ValueError(f"cannot sample from n = {n} examples: n must be from 1 to {_MAX_EXAMPLES}")
    b = sampling.batch_size
    if b is not None and b > n and not is_with_replacement(sampling):
        raise ValueError(
            f"cannot draw b = {b} different examples out of n = {n}: "
            f"use b <= {n}, or with_replacement({b}) if an example may occur twice"
        )


def _every(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    del b  # the full batch is no choice
    check_sizes(full_batch(), n)
    _draw(key, step)
    return jnp.arange(n, dtype=jnp.int32)


def _independent(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    key, step, n = *_draw(key, step), _size(with_replacement(b), n)
    words = _words(_stream(key, step), 2 * b)
    high, low = words[:b], words[b:]
    # The whole part of n times the binary fraction 0.(high)(low): uniform to n in 2⁶⁴, without a division by n.
    carry = _scaled(low, n)
    total = high * jnp.uint32(n) + carry
    return (_scaled(high, n) + (total < carry).astype(jnp.uint32)).astype(jnp.int32)


def _fresh_order(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    n = _size(distinct(b), n)
    if b == 1:
        return _independent(key, step, n, b)  # one example is different from no other
    key, step = _draw(key, step)
    return permuted(_stream(key, step), jnp.arange(b, dtype=jnp.int32), n)


def _pass_order(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    key, step, n = *_draw(key, step), _size(reshuffled(b), n)
    steps_per_pass = n // b
    step = jnp.asarray(step, jnp.int32)
    positions = (step % steps_per_pass) * b + jnp.arange(b, dtype=jnp.int32)
    return permuted(_stream(key, step // steps_per_pass), positions, n)


def _pass_orders(key: Key, first: Any, steps: int, n: int, b: int) -> Int[Array, "steps b"]:
    """`_pass_order` of many steps: what a pass has of random words is computed once a pass, not once a step."""
    key, first, n, steps = *_draw(key, first, "first"), _size(reshuffled(b), n), checks.count("steps", steps)
    steps_per_pass = n // b
    step = jnp.asarray(first, jnp.int32) + jnp.arange(steps, dtype=jnp.int32)
    place, start = step // steps_per_pass, jnp.asarray(first, jnp.int32) // steps_per_pass
    passes = (steps + steps_per_pass - 2) // steps_per_pass + 1  # as many as so many steps can touch
    of_pass = lambda k: _order_words(_stream(key, start + k), n)
    words = jax.vmap(of_pass, out_axes=-1)(jnp.arange(passes, dtype=jnp.int32))
    # A choice of two is faster than a look into a table.
    words = jnp.where(place > start, words[..., 1:], words[..., :1]) if passes == 2 else words[..., place - start]
    positions = (step % steps_per_pass)[:, None] * b + jnp.arange(b, dtype=jnp.int32)[None, :]
    return _ordered(words[..., None], positions, n)


def _whole_pass_order(key: Key, step: Any, n: int, b: int) -> Int[Array, " b"]:
    """`_pass_order` of passes that go to the last example; behind it the first ones of the order fill up."""
    key, step, n = *_draw(key, step), _size(reshuffled(b), n)
    steps_per_pass = -(-n // b)
    step = jnp.asarray(step, jnp.int32)
    positions = (step % steps_per_pass) * b + jnp.arange(b, dtype=jnp.int32)
    return permuted(_stream(key, step // steps_per_pass), positions % n, n)


def _whole_pass_orders(key: Key, first: Any, steps: int, n: int, b: int) -> Int[Array, "steps b"]:
    return _one_by_one(_whole_pass_order, key, first, steps, n, b)


def _size(sampling: Sampling, n: int) -> int:
    check_sizes(sampling, n)
    return int(n)


def _draw(key: Key, step: Any, name: str = "step") -> tuple[Key, Any]:
    return checks.key("key", key), checks.step(name, step)


def _one_by_one(draw: Any, key: Key, first: Any, steps: int, n: int, b: int) -> Int[Array, "steps b"]:
    (key, first), steps = _draw(key, first, "first"), checks.count("steps", steps)
    return jax.vmap(lambda step: draw(key, step, n, b))(first + jnp.arange(steps, dtype=jnp.int32))


# Made once, so that two samplings of the same kind and batch size are equal.
_MANY = {draw: partial(_one_by_one, draw) for draw in (_independent, _fresh_order)}

Stream = tuple[UInt[Array, ""], UInt[Array, ""]]
"""64 random bits, from which a step (or a pass) takes all its random words."""


def permuted(stream: Stream, positions: Int[Array, " b"], n: int) -> Int[Array, " b"]:
    """`π(positions)` for a random permutation `π` of `[0, n)` that is determined by `stream`: O(b) for any n.

    Up to `EXACT_UP_TO` examples `π` is uniform over all n! orders, as far as the 64 bits of the stream go. Beyond,
    it is five times a Feistel network (Luby & Rackoff 1988) of two rounds on pairs `(l, r)` in `[0, p) × [0, q)`,
    whose rounds add a keyed hash of one half to the other (Black & Rogaway 2002), and after each a keyed rotation of
    `[0, n)`. Every part is a bijection, so `π` is. The grid has `pq <= n` with as few numbers left over as its shape
    allows; they sit a network out, and the rotation takes them into the next. Nothing is rejected: all n cost the
    same.
    """
    return _ordered(_order_words(stream, n)[..., None], positions, n)


def _order_words(stream: Stream, n: int) -> UInt[Array, "..."]:
    """The random words that determine a random order of n: one each, or three for each network."""
    return _words(stream, n) if n <= EXACT_UP_TO else _words(stream, 3 * _NETWORKS).reshape(_NETWORKS, 3)


def _ordered(words: UInt[Array, "..."], positions: Int[Array, "..."], n: int) -> Int[Array, "..."]:
    """The order at `positions`, for words that are one or as many as there are positions, behind their first axes."""
    if n <= EXACT_UP_TO:
        # The rank of a random word among n of them, which are all different.
        words = jnp.broadcast_to(words, (n, *positions.shape))
        mine = jnp.take_along_axis(words, positions[None], axis=0)
        return jnp.sum(words < mine, axis=0, dtype=jnp.int32)
    p, q = _grid(n)

    def network(i: Any, x: UInt[Array, "..."]) -> UInt[Array, "..."]:
        l, r = x // q, x % q
        l = _added(l, _scaled(_hash(r, words[i, 0]), p), p)
        r = _added(r, _scaled(_hash(l, words[i, 1]), q), q)
        return _added(jnp.where(x < p * q, l * q + r, x), _scaled(words[i, 2], n), n)

    # A loop, not unrolled: it compiles faster, and a draw of many steps runs as fast.
    return jax.lax.fori_loop(0, _NETWORKS, network, positions.astype(jnp.uint32)).astype(jnp.int32)


def _grid(n: int) -> tuple[int, int]:
    """`p, q` near √n with `pq <= n` and as little left over as possible."""
    root = math.isqrt(n)
    p = min(range(root, 3 * root // 4 - 1, -1), key=lambda p: n % p)
    return p, n // p


def _added(x: UInt[Array, "..."], shift: UInt[Array, "..."], m: int) -> UInt[Array, "..."]:
    """`x + shift` mod m, for both below m."""
    moved = x + shift
    return jnp.where(moved >= m, moved - jnp.uint32(m), moved)


# Random words are hashes of a counter, keyed twice. JAX's own generator does the same with a cipher; in the loop it
# took longer to compile than everything else together, and longer to run than the rest of the sampling.


def _stream(key: Key, index: Any) -> Stream:
    """The random bits of one step or pass: a function of the key and of its number."""
    words = jax.random.key_data(key).reshape(-1)
    first, last, index = words[0], words[-1], jnp.asarray(index).astype(jnp.uint32)
    return _hash(_hash(index, first), last), _hash(_hash(index, ~last), first)


def _words(stream: Stream, count: int) -> UInt[Array, " count"]:
    """`count` random words, all different."""
    return _hash(_hash(jnp.arange(count, dtype=jnp.uint32), stream[0]), stream[1])


def _hash(x: UInt[Array, "..."], round_key: UInt[Array, "..."]) -> UInt[Array, "..."]:
    """A 32-bit mix of value and key, every input bit on every output bit, one-to-one in x (MurmurHash3)."""
    x = (x ^ round_key) * jnp.uint32(0x9E3779B1) + round_key
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _scaled(word: UInt[Array, "..."], m: int) -> UInt[Array, "..."]:
    """`⌊word · m / 2³²⌋` for `m < 2³¹`: a random word as a number below m, at the same cost for every m.

    A remainder would do too, but how fast dividing by a constant is depends on the constant.
    """
    high, low = word >> 16, word & 0xFFFF
    m_high, m_low = jnp.uint32(m >> 16), jnp.uint32(m & 0xFFFF)
    below, cross, other = low * m_low, high * m_low, low * m_high
    carry = (below >> 16) + (cross & 0xFFFF) + (other & 0xFFFF)
    return high * m_high + (cross >> 16) + (other >> 16) + (carry >> 16)
