"""Sharing work is backprop: all derivatives for a few forward passes, where each by itself costs depth times that (C8).

Three measurements. A chain of L scalar layers, differentiated in the ways a person can write it, on numbers that count
what is done to them: each count is a polynomial in L, quadratic but for backprop. The programs that JAX traces for the
same chain, counted operation by operation: reverse mode is linear in L if the parameters are a list or are scanned, and
**quadratic if one array is indexed in a loop**, since each `w[i]` is transposed to a whole vector with one entry and L
of those are added. And the clock, on dense nets on real data (digits): backprop, every layer's derivative by a program
of its own, forward mode and finite differences, relative to one forward pass, beside the counted operations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import EXACT, MACHINE, RATIO, ROUNDING, SAME_JAX, ErrorOfRounding
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import layers
from jaxgrad import data, losses, models, timing
from jaxgrad.theory import cost
from jaxgrad.types import Batch, Deep


@dataclass(frozen=True)
class Config:
    chain: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
    """Depths of the scalar chain."""
    depths: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Depths of the dense nets that are timed."""
    width: int = 16
    rows: int = 1024
    """Examples of digits."""
    deepest_slow: int = 4
    """Forward mode and finite differences are timed up to this depth: one pass for each parameter."""
    repeats: int = 11
    """Rounds of timing."""
    min_seconds: float = 0.003
    """Each contender runs at least this long per round."""


TIMED = True
QUICK = Config(chain=(1, 2, 4, 8, 16, 32), depths=(1, 4), rows=1024, deepest_slow=1, repeats=6, min_seconds=0.002)
NUMBERS = {
    "chain": EXACT, "depths": EXACT, "n": EXACT, "width": EXACT, "data": EXACT, "parameters": EXACT,
    "chain/*": EXACT, "dense_ratio": ROUNDING, "agreement": ErrorOfRounding(unit=2.3e-16), "traced/*": SAME_JAX,
    "compiler/*": MACHINE, "operations/*": SAME_JAX, "time/*": RATIO,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
FORMULAS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "forward": ("2L + 2", lambda L: 2 * L + 2),
    "backprop": ("5L + 1", lambda L: 5 * L + 1),
    "separate_shared": ("L² + 5L", lambda L: L**2 + 5 * L),
    "separate": ("2L² + 4L", lambda L: 2 * L**2 + 4 * L),
    "forward_mode": ("4L² + 5L", lambda L: 4 * L**2 + 5 * L),
    "finite_differences": ("2L² + 7L + 2", lambda L: 2 * L**2 + 7 * L + 2),
}
"""Operations on a chain of L layers; those of backprop and of the separate derivatives beyond the forward pass."""
TRACED: dict[str, tuple[str, Callable[[Any, int], Any]]] = {
    "list": ("{a}L + 3", lambda L, a: a * L + 3),
    "scan": ("{a}L + 4", lambda L, a: a * L + 4),
    "indexed": ("L² + {b}L + 3", lambda L, a: L**2 + (a - 1) * L + 3),
}
"""Operations of `jax.value_and_grad` of the chain, by how its parameters are kept; `b = a − 1`."""
PER_LAYER = (8, 7)
"""`a`: in JAX 0.10, and where a JAX has tanh's derivative `1 − h²` as one operation, as 0.12 does."""
COMPILED = 32
"""Depth at which the compiler is asked for its own count: deeper, lists of scalars take it long."""
WAYS = ("backprop", "separate layers", "forward mode", "finite differences")


def run(config: Config, session: Session) -> dict[str, Any]:
    session.say("counting operations on a chain of scalar layers")
    counted = [cost.chain_operations(L) for L in config.chain]
    numbers: dict[str, Any] = {"chain": np.array(config.chain), "depths": np.array(config.depths)}
    numbers |= {f"chain/{name}": np.array([getattr(one, name) for one in counted]) for name in FORMULAS}
    numbers["agreement"] = max(_disagreement(L) for L in config.chain)

    session.say("counting the programs that JAX traces")
    for way in TRACED:
        numbers[f"traced/{way}"] = np.array([_traced(way, L) for L in config.chain])
    for way in ("list", "scan"):
        numbers[f"compiler/{way}"] = np.array([_traced(way, COMPILED), _of_the_compiler(way, COMPILED)])

    digits = data.load("digits")
    batch = Batch(*(jnp.asarray(leaf[: config.rows]) for leaf in digits.batch))
    numbers |= {"n": len(batch.y), "width": config.width, "data": digits.name}
    predicted, parameters = [], []
    counts: dict[str, list[float]] = {way: [] for way in WAYS}
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for depth in config.depths:
        session.say(f"timing dense nets of {depth} layers")
        sizes = (batch.x.shape[1], *(config.width,) * (depth - 1), len(digits.labels))
        params = layers(depth, sizes)
        contenders, operations = _ways(params, batch, slow=depth <= config.deepest_slow)
        took = session.race(contenders, repeats=config.repeats, min_seconds=config.min_seconds)
        predicted.append(cost.dense_ratio(sizes))
        parameters.append(sum(leaf.size for leaf in jax.tree.leaves(params)))
        for way in WAYS:
            counts[way].append(operations[way] / operations["forward"])
            share = timing.ratio(took[way], took["forward"])[:3] if way in took else (np.nan,) * 3
            times[way].append(list(share))
    numbers |= {"dense_ratio": np.array(predicted), "parameters": np.array(parameters)}
    numbers |= {f"operations/{way}": np.array(counts[way]) for way in WAYS}
    return numbers | {f"time/{way}": np.array(times[way]) for way in WAYS}


# --- the chain -------------------------------------------------------------------------------------------------


def _chain(way: str, w: Any, x: Any, y: Any) -> Any:
    """`(h_L − y)²` with `hₗ = tanh(wₗ hₗ₋₁)`, the parameters taken from a list, an array by its index, or a scan."""
    h = x
    if way == "scan":
        h, _ = jax.lax.scan(lambda h, weight: (jnp.tanh(weight * h), None), x, w)
    else:
        for layer in range(len(w)):
            h = jnp.tanh(w[layer] * h)
    return (h - y) ** 2


def _program(way: str, L: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Value and derivatives of the chain by JAX, and what to call it with."""
    x, w = jnp.float32(0.7), jnp.ones(L, jnp.float32)
    return jax.value_and_grad(partial(_chain, way)), ([jnp.float32(1)] * L if way == "list" else w, x, x)


def _traced(way: str, L: int) -> int:
    function, arguments = _program(way, L)
    return cost.count(function, *arguments).total


def _of_the_compiler(way: str, L: int) -> int:
    """The operations that XLA says the compiled program has."""
    function, arguments = _program(way, L)
    analysis: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return int(analysis["flops"])


def _disagreement(L: int) -> float:
    """Largest relative difference between the chain's derivatives as counted and as JAX computes them."""
    with jax.enable_x64(True):
        w = np.linspace(0.5, 1.5, L)
        x, y = 0.7, 0.3
        _, h, error = cost.chain_forward(list(w), x, y)
        h = [float(value) for value in h]
        by_hand = (
            cost.chain_backprop(list(w), h, float(error)),
            cost.chain_separate(list(w), h, y, share_slopes=True),
            cost.chain_separate(list(w), h, y, share_slopes=False),
            cost.chain_forward_mode(list(w), x, y),
        )
        known = np.asarray(jax.grad(partial(_chain, "scan"))(jnp.asarray(w), jnp.asarray(x), jnp.asarray(y)))
        return max(float(np.linalg.norm(np.array(one, float) - known) / np.linalg.norm(known)) for one in by_hand)


# --- dense nets ------------------------------------------------------------------------------------------------


def _ways(params: Deep, batch: Batch, slow: bool) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What to time, and the counted operations of each way to get the value and all derivatives."""
    loss = losses.mean_loss(partial(models.deep, activation=jnp.tanh), losses.softmax_cross_entropy)
    flat, unravel = ravel_pytree(params)
    step = jnp.float32(1e-2)

    def at(w: jax.Array) -> jax.Array:
        return loss(unravel(w), batch)

    def one_layer(layer: int) -> Callable[[Deep], Any]:
        """The derivative for one layer, as if the others' were not wanted."""
        return lambda params: jax.grad(lambda own: loss((*params[:layer], own, *params[layer + 1 :]), batch))(
            params[layer]
        )

    def basis(i: Any) -> jax.Array:
        return jnp.zeros_like(flat).at[i].set(1)

    def tangent(w: jax.Array, i: Any) -> jax.Array:
        return jax.jvp(at, (w,), (basis(i),))[1]

    def difference(w: jax.Array, i: Any) -> jax.Array:
        return at(w + step * basis(i))

    every = jnp.arange(flat.size, dtype=jnp.int32)
    many = 64  # parameters side by side
    programs: dict[str, list[tuple[Any, Any]]] = {
        "forward": [(at, flat)],
        "backprop": [(jax.value_and_grad(at), flat)],
        "separate layers": [(one_layer(layer), params) for layer in range(len(params))],
        "forward mode": [(lambda w: jax.lax.map(partial(tangent, w), every, batch_size=many), flat)],
        "finite differences": [
            (lambda w: (jax.lax.map(partial(difference, w), every, batch_size=many) - at(w)) / step, flat)
        ],
    }
    # One parameter's pass, times their number: what one map over them does.
    singles = {"forward mode": tangent, "finite differences": difference}
    operations = {
        name: float(flat.size * cost.count(singles[name], flat, every[0]).total)
        if name in singles
        else float(sum(cost.count(function, argument).total for function, argument in parts))
        for name, parts in programs.items()
    }

    def thunk(parts: list[tuple[Any, Any]]) -> Callable[[], Any]:
        ready = [(timing.compiled(function, argument).executable, argument) for function, argument in parts]
        return lambda: [executable(argument) for executable, argument in ready]

    timed = {name: thunk(parts) for name, parts in programs.items() if slow or name not in singles}
    return timed, operations


# --- what the numbers say --------------------------------------------------------------------------------------


def _laws(numbers: dict[str, Any]) -> tuple[int, dict[str, tuple[str, Callable[[Any], Any]]]]:
    """What a layer of the list costs in the JAX that was counted, and what each way must cost then."""
    a = round(float((numbers["traced/list"][-1] - 3) / numbers["chain"][-1]))

    def at_a(law: Callable[[Any, int], Any]) -> Callable[[Any], Any]:
        return lambda L: law(L, a)

    return a, {way: (formula.format(a=a, b=a - 1), at_a(law)) for way, (formula, law) in TRACED.items()}


def claims(numbers: dict[str, Any]) -> list[Claim]:
    L = numbers["chain"]
    right = {name: bool((numbers[f"chain/{name}"] == law(L)).all()) for name, (_, law) in FORMULAS.items()}
    a, traced = _laws(numbers)
    deep, depths = int(L[-1]), numbers["depths"]
    share = {name: int(numbers[f"chain/{name}"][-1]) for name in FORMULAS}
    back, separate = numbers["time/backprop"], numbers["time/separate layers"]
    apart = numbers["operations/separate layers"]
    slowest = int(np.flatnonzero(np.isfinite(numbers["time/forward mode"][:, 0]))[-1])
    forward_mode, differences = (numbers[f"time/{way}"][slowest, 0] for way in WAYS[2:])
    matmul = float(np.max(np.abs(numbers["operations/backprop"] / numbers["dense_ratio"] - 1)))
    return [
        Claim(
            "C8",
            f"chain of L scalar layers: separate derivatives cost O(L²), shared ones O(L); counted up to L = {deep}",
            f"L = {deep}: backprop {share['backprop']:,}, separate {share['separate_shared']:,} (slopes shared) or "
            f"{share['separate']:,}, forward mode {share['forward_mode']:,}, finite differences "
            f"{share['finite_differences']:,}; they agree with autodiff to {numbers['agreement']:.0e}",
            "; ".join(f"{name.replace('_', ' ')} {formula}" for name, (formula, _) in FORMULAS.items()),
            all(right.values()) and numbers["agreement"] < 1e-12,
        ),
        Claim(
            "C8",
            "JAX's reverse mode is linear in L over a list or a scan, quadratic where one array is indexed in a loop",
            "; ".join(f"{way} {numbers[f'traced/{way}'][-1]:,}" for way in TRACED) + f" operations at L = {deep}",
            "; ".join(f"{way} {formula}" for way, (formula, _) in traced.items()) + ", at every L",
            a in PER_LAYER and all((numbers[f"traced/{way}"] == law(L)).all() for way, (_, law) in traced.items()),
        ),
        Claim(
            "C8",
            "the compiler's own figure (XLA's cost_analysis) is no such count: the body of a scan counts once, and "
            "what fusion computes again counts again",
            "; ".join(
                f"{way} {numbers[f'compiler/{way}'][1]:,} for {numbers[f'compiler/{way}'][0]:,} operations"
                for way in ("scan", "list")
            )
            + f" at L = {COMPILED}",
            "scan below half of them",
            bool(numbers["compiler/scan"][1] < numbers["compiler/scan"][0] / 2),
        ),
        Claim(
            "C8",
            f"on the clock (dense nets, width {numbers['width']}, n = {numbers['n']:,}): all derivatives by backprop "
            "cost a few forward passes at any depth, each layer's by itself ever more",
            f"depth {depths[0]} to {depths[-1]}: backprop {back[0, 0]:.2g} to {back[-1, 0]:.2g} forward passes, "
            f"layer by layer {separate[0, 0]:.2g} to {separate[-1, 0]:.3g} (counted {apart[0]:.2g} to {apart[-1]:.3g})",
            "backprop at most 6; separate layers beyond doubt more than backprop, at the deepest",
            bool(back[:, 0].max() <= 6 and separate[-1, 1] > back[-1, 2]),
        ),
        Claim(
            "C8",
            "forward mode and finite differences cost a pass per parameter",
            f"{numbers['parameters'][slowest]:,} parameters: {forward_mode:,.0f} and {differences:,.0f} forward "
            f"passes, backprop {back[slowest, 0]:.2g}",
            "each more than 20 times backprop",
            bool(min(forward_mode, differences) > 20 * back[slowest, 0]),
        ),
        Claim(
            "C8",
            "operations of (forward + backward)/forward are 3 − p₁/Σp for the matrix products",
            f"counted over predicted: off by at most {matmul:.1%} (the rest is elementwise work)",
            "within 25 %",
            matmul < 0.25,
        ),
    ]


def headline(numbers: dict[str, Any]) -> str:
    deep, last = numbers["chain"][-1], {name: int(numbers[f"chain/{name}"][-1]) for name in FORMULAS}
    return (
        f"**Backprop.** Through {deep} layers, separate derivatives take {last['separate']:,} operations where "
        f"backprop takes {last['backprop']:,}; indexing one array in a loop takes JAX to "
        f"{numbers['traced/indexed'][-1]:,} against {numbers['traced/list'][-1]:,}."
    )


def report(numbers: dict[str, Any]) -> str:
    lines = [
        f"Value and all derivatives in forward passes, {numbers['data']}, n = {numbers['n']:,}, width "
        f"{numbers['width']}: measured (median and interval over rounds) / counted operations.",
        "",
        f"| layers | parameters | {' | '.join(WAYS)} |",
        f"|---|---|{'---|' * len(WAYS)}",
    ]
    for k, depth in enumerate(numbers["depths"]):
        cells = []
        for way in WAYS:
            median, low, high = numbers[f"time/{way}"][k]
            measured = f"{median:.3g} ({low:.3g}–{high:.3g})" if np.isfinite(median) else "not timed"
            cells.append(f"{measured} / {numbers[f'operations/{way}'][k]:,.3g}")
        lines.append(f"| {depth} | {numbers['parameters'][k]:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


COLOURS = {
    "forward": plots.GREY,
    "backprop": plots.BLUE,
    "separate_shared": plots.SKY,
    "separate": plots.VERMILLION,
    "forward_mode": plots.ORANGE,
    "finite_differences": plots.PURPLE,
}
WORDS = {
    "forward": "forward",
    "backprop": "backprop",
    "separate_shared": "separate, shared σ'",
    "separate": "separate",
    "forward_mode": "forward mode",
    "finite_differences": "finite differences",
}


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (chain, traced, clock) = plots.figure(3, height=4.3)
    L = numbers["chain"]
    fine = np.geomspace(L[0], L[-1], 60)
    for name, (formula, law) in FORMULAS.items():
        chain.plot(fine, law(fine), color=COLOURS[name], linewidth=1.1)
        chain.plot(
            L, numbers[f"chain/{name}"], "o", color=COLOURS[name], markersize=4, label=f"{WORDS[name]}: {formula}"
        )
    plots.log_scale(chain, "xy")
    chain.set(title="A chain of scalars", xlabel="layers L", ylabel="operations, counted")
    chain.legend(loc="upper center", bbox_to_anchor=(0.42, -0.17), fontsize=8.5)

    _, laws = _laws(numbers)
    for way, colour in (("list", plots.BLUE), ("scan", plots.GREEN), ("indexed", plots.VERMILLION)):
        formula, law = laws[way]
        words = {"list": "list of scalars", "scan": "scan", "indexed": "w[i] of one array"}[way]
        nudge = 1.12 if way == "scan" else 1.0
        traced.plot(fine, law(fine), color=colour, linewidth=1.1)
        traced.plot(L * nudge, numbers[f"traced/{way}"], "o", color=colour, markersize=4, label=f"{words}: {formula}")
    plots.log_scale(traced, "xy")
    traced.set_ylim(chain.get_ylim())
    traced.set(title="What JAX does with it", xlabel="layers L", ylabel="operations, traced")
    traced.legend(loc="upper center", bbox_to_anchor=(0.42, -0.17), fontsize=8.5)

    colours = dict(zip(WAYS, (plots.BLUE, plots.VERMILLION, plots.ORANGE, plots.PURPLE), strict=True))
    for way in WAYS:
        clock.plot(numbers["depths"], numbers[f"operations/{way}"], color=colours[way], linewidth=1.1)
        median, low, high = numbers[f"time/{way}"].T
        clock.errorbar(
            numbers["depths"],
            median,
            yerr=[median - low, high - median],
            fmt="o",
            color=colours[way],
            markersize=4.5,
            linewidth=1,
            label=way,
        )
    plots.log_scale(clock, "xy")
    clock.set_xticks(numbers["depths"], labels=[str(depth) for depth in numbers["depths"]])
    clock.minorticks_off()
    clock.set(title="The clock: dense nets", xlabel="layers", ylabel="cost / one forward pass")
    clock.plot([], [], color=plots.GREY, linewidth=1.1, label="operations counted")
    clock.legend(loc="upper center", bbox_to_anchor=(0.42, -0.17), fontsize=8.5)
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
