"""The lecture's stopping rule measures the step, not the distance: too early if η is small, by luck if b = 1 (F3).

`‖w_t − w_{t−1}‖ < ε` on linear regression (diabetes), where theory knows when it must fire. For GD it reads
`η‖∇L‖ < ε`: the step of the stop is predicted exactly, for every η and ε, and so is the gap that is left, which grows
as η shrinks. It also fires in a run that is about to diverge.

For SGD the typical step never shrinks below the noise, and yet the rule fires: a batch gradient is a combination of b
vectors, and the chance per step that it nearly vanishes goes like `ε^min(b, p)`. For b = 1 the chance is predicted
outright (one approximation, a normal law), and with it the number of steps to a false stop.

The lecture names three rules: the step, a budget, metrics on a validation set. They are compared with each other and
with the norm of the full gradient, which is what the first should have been.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RANDOM, ROUNDING, CountOf, Runs
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, geometric, random_keys
from jaxgrad import data, losses, models, statistics
from jaxgrad.descent import (
    State,
    advance,
    descend,
    init,
    log_spaced,
    no_improvement,
    small_gradient,
    small_step,
    trajectory,
)
from jaxgrad.sampling import distinct, full_batch, with_replacement
from jaxgrad.theory import least_squares as theory
from jaxgrad.theory import stopping as exact
from jaxgrad.types import Batch, Linear


@dataclass(frozen=True)
class Config:
    fractions: tuple[float, ...] = tuple(np.round(geometric(3e-4, 0.97, 16, digits=9), 6).tolist())
    """GD's step sizes, as fractions of the edge 2/λmax."""
    thresholds: tuple[float, ...] = (1e-2, 1e-3, 1e-4)
    """ε of the rule for GD."""
    most: int = 20_000
    """Steps after which GD counts as not stopped."""
    batch_sizes: tuple[int, ...] = (1, 2, 3, 8)
    """b of SGD at the floor."""
    sgd_fraction: float = 0.2
    """SGD's step size there, as a fraction of the edge of its second moment."""
    shares: tuple[float, ...] = tuple(np.round(geometric(0.01, 0.5, 10, digits=9), 6).tolist())
    """ε for SGD, as shares of the root mean square step."""
    seeds: int = 400
    """Runs of SGD."""
    watched: int = 500
    """Steps of each that are watched, at the floor."""
    budget: int = 2000
    """Updates allowed where the rules are compared."""


QUICK = Config(
    fractions=(0.001, 0.01, 0.1, 0.5, 0.9),
    thresholds=(1e-2, 1e-3),
    most=4000,
    batch_sizes=(1, 2),
    seeds=100,
    watched=200,
    budget=500,
)
NUMBERS = {
    "n": EXACT, "p": EXACT, "p_few": EXACT, "seeds": EXACT, "budget": EXACT, "watched": EXACT,
    "most": EXACT, "sgd_fraction": EXACT, "fractions": EXACT, "shares": EXACT, "thresholds": EXACT,
    "batch_sizes": EXACT, "diverging": EXACT, "diverging_predicted": EXACT, "gd_steps": EXACT,
    "GD/*/steps": EXACT, "*/fired": EXACT, "false/steps": EXACT, "fine_time": EXACT, "gd_predicted": EXACT,
    "false/stopped": CountOf("seeds"), "fired/*": Runs(axis=0), "rms/*[1]": RANDOM,
    "SGD/*": Runs(axis=0), "GD/*": ROUNDING, "gd_excess": ROUNDING, "edge": ROUNDING,
    "start": ROUNDING, "compared_start": ROUNDING, "condition_number": ROUNDING, "diverging_excess": ROUNDING,
    "at_once": ROUNDING, "certified": ROUNDING, "false/predicted": ROUNDING, "fine": ROUNDING,
    "fine_gap": ROUNDING, "rms/*": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSS = losses.mean_loss(models.linear, losses.squared)
FEW = ("bmi", "s5")
"""Columns of the small problem of the false stops: with the bias, p = 3."""
RULES = ("budget", "small step", "small gradient", "validation")


def run(config: Config, session: Session) -> dict[str, Any]:
    diabetes = data.load("diabetes")
    with jax.enable_x64(True):
        x, y = (np.asarray(leaf, np.float64) for leaf in diabetes.batch)
        batch = Batch(jnp.asarray(x), jnp.asarray(y))
        session.say("GD until the rule fires")
        numbers = _gd(config, batch)
        session.say(f"SGD at its floor, {config.seeds} runs watched for {config.watched} steps")
        columns = [diabetes.names.index(name) for name in FEW]
        numbers |= _false_stops(config, Batch(batch.x[:, columns], batch.y))
    session.say("the rules compared")
    return numbers | _compared(config, diabetes)


def _gd(config: Config, batch: Batch) -> dict[str, Any]:
    """Steps and gaps at the stop, for every step size and threshold, measured and predicted."""
    geometry = theory.problem(batch)
    edge, origin = theory.edge(geometry), models.init_linear(batch.x.shape[1], dtype=jnp.float64)

    def stopped(start: Linear, eta: Any, below: Any) -> Any:
        def fires(state: State) -> Any:
            return optax.tree.norm(state.update) < below

        rule = optax.sgd(eta)
        end = advance(
            init(start, rule),
            jax.random.key(0),
            batch,
            config.most,
            loss=LOSS,
            optimizer=rule,
            sampling=full_batch(),
            halt=fires,
        )
        return jnp.where(end.halted, end.step, jnp.inf), jnp.append(end.params.w, end.params.b)

    # Just beyond the edge, from a start that hardly has the component that grows.
    middle = geometry.directions[:, geometry.directions.shape[1] // 2]
    hidden = geometry.minimiser + middle + 1e-9 * geometry.directions[:, 0]
    unstable = decimals(1.025 * edge)
    pairs = [(decimals(f * edge), below) for f in config.fractions for below in config.thresholds] + [(unstable, 1e-3)]
    starts = np.zeros((len(pairs), len(hidden)))
    starts[-1] = hidden
    etas, below = np.array(pairs).T
    many = jax.jit(jax.vmap(stopped))(Linear(jnp.asarray(starts[:, :-1]), jnp.asarray(starts[:, -1])), etas, below)
    steps, ends = (np.asarray(leaf, float) for leaf in many)
    shape = (len(config.fractions), len(config.thresholds))
    numbers: dict[str, Any] = {
        "n": len(batch.y),
        "p": len(hidden),
        "edge": edge,
        "condition_number": theory.condition_number(geometry),
        "fractions": np.array(config.fractions),
        "thresholds": np.array(config.thresholds),
        "most": config.most,
        "start": float(theory.excess_loss(geometry, origin)),
        "gd_steps": steps[:-1].reshape(shape),
        "gd_excess": theory.excess_loss(geometry, ends)[:-1].reshape(shape),
        "gd_predicted": np.array([exact.gd_stop_time(geometry, origin, *pair) for pair in pairs[:-1]]).reshape(shape),
        "at_once": np.array([exact.fires_at_once(geometry, origin, e) for e in config.thresholds]) / edge,
        "diverging": steps[-1],
        "diverging_predicted": exact.gd_stop_time(geometry, hidden, unstable, 1e-3),
        "diverging_excess": float(theory.gd_excess(geometry, hidden, unstable, [1500])[0]),
    }
    fine = geometric(config.fractions[0], 0.99, 120)
    numbers["fine"], etas = fine, decimals(fine * edge)
    for name, law in (("time", exact.gd_stop_time), ("gap", exact.gd_stop_excess)):
        numbers[f"fine_{name}"] = np.array(
            [[law(geometry, origin, eta, below) for below in config.thresholds] for eta in etas]
        )
    numbers["certified"] = np.array(
        [[exact.certified_excess(geometry, eta, below) for below in config.thresholds] for eta in etas]
    )
    return numbers


def _false_stops(config: Config, batch: Batch) -> dict[str, Any]:
    """Share of steps at SGD's floor that are shorter than each threshold, per batch size."""
    geometry = theory.problem(batch)
    keys = random_keys(7, config.seeds)
    best = Linear(jnp.asarray(geometry.minimiser[:-1]), jnp.asarray(geometry.minimiser[-1]))
    settle = 200
    numbers: dict[str, Any] = {
        "batch_sizes": np.array(config.batch_sizes),
        "shares": np.array(config.shares),
        "p_few": len(geometry.minimiser),
        "seeds": config.seeds,
        "watched": config.watched,
        "sgd_fraction": config.sgd_fraction,
    }
    for b in config.batch_sizes:
        sampling = with_replacement(1) if b == 1 else distinct(b)
        eta = decimals(config.sgd_fraction * theory.sgd_edge(geometry, sampling))
        rms = np.sqrt(exact.stationary_step_square(geometry, eta, sampling))

        def one(key: Any, eta: Any = eta, sampling: Any = sampling) -> Any:
            _, seen = trajectory(
                LOSS,
                best,
                batch,
                optimizer=optax.sgd(eta),
                sampling=sampling,
                key=key,
                record=settle + np.arange(config.watched + 1),
                observe=lambda params: jnp.append(params.w, params.b),
            )
            return jnp.linalg.norm(jnp.diff(seen, axis=0), axis=1)

        norms = np.asarray(jax.jit(jax.vmap(one))(keys))
        below = norms[:, :, None] < rms * np.array(config.shares)
        numbers[f"fired/{b}"] = below.mean(axis=1)
        numbers[f"rms/{b}"] = np.array([rms, np.sqrt(np.mean(norms**2))])
        if b == 1:
            thresholds = [rms * share for share in config.shares]
            numbers["false/predicted"] = np.array(
                [exact.false_stop_probability(geometry, eta, e, sampling) for e in thresholds]
            )
            # For the smallest threshold: the share of runs that have stopped within T steps.
            numbers["false/steps"] = log_spaced(config.watched, 13)[1:]
            first = np.where(below[:, :, 0].any(axis=1), np.argmax(below[:, :, 0], axis=1) + 1, np.inf)
            numbers["false/stopped"] = np.sum(first[:, None] <= numbers["false/steps"][None, :], axis=0)
    return numbers


def _compared(config: Config, diabetes: Any) -> dict[str, Any]:
    """Where each rule ends GD and SGD (b = 8): steps, and the gap on the training rows."""
    train, held_out = data.split(diabetes, 0.25, 0)
    geometry = theory.problem(train.batch)
    batch, unseen = (Batch(jnp.asarray(part.batch.x), jnp.asarray(part.batch.y)) for part in (train, held_out))
    start = models.init_linear(batch.x.shape[1])

    def validation(params: Any) -> Any:
        return LOSS(params, unseen)

    rules = {
        "budget": None,
        "small step": small_step(1e-3),
        "small gradient": small_gradient(1e-2, every=10),
        "validation": no_improvement(validation, patience=10, every=10),
    }
    keys = random_keys(3, statistics.MINIMUM_SEEDS)
    numbers: dict[str, Any] = {"budget": config.budget, "compared_start": float(theory.excess_loss(geometry, start))}
    b = 8
    for name, sampling in (("GD", full_batch()), ("SGD", distinct(b))):
        # SGD's largest step size is smaller; half of its edge, like GD's half of its own.
        eta = decimals(0.5 * (theory.edge(geometry) if name == "GD" else theory.sgd_edge(geometry, sampling)))
        for rule, stop in rules.items():
            trace = descend(
                LOSS,
                start,
                batch,
                optimizer=eta,
                sampling=sampling,
                steps=config.budget,
                key=keys[:1] if name == "GD" else keys,
                record=2,
                stop=stop,
            )
            numbers[f"{name}/{rule}/steps"] = np.asarray(trace.stopped_at)
            numbers[f"{name}/{rule}/excess"] = theory.excess_loss(geometry, trace.params)
            numbers[f"{name}/{rule}/validation"] = np.asarray(jax.vmap(validation)(trace.params), float)
            numbers[f"{name}/{rule}/fired"] = float(np.mean([word.startswith("stopped") for word in trace.status]))
    return numbers


# --- what the numbers say --------------------------------------------------------------------------------------


def _slopes(numbers: dict[str, Any]) -> dict[int, float]:
    """Measured exponent of the chance in ε, over the smaller thresholds with enough events."""
    out = {}
    for b in numbers["batch_sizes"].tolist():
        chance = numbers[f"fired/{b}"].mean(axis=0)
        enough = (chance * numbers["seeds"] * numbers["watched"] >= 50) & (numbers["shares"] <= 0.25)
        if enough.sum() >= 3:
            x, y = np.log(numbers["shares"][enough]), np.log(chance[enough])
            out[b] = float(np.polyfit(x, y, 1)[0])
    return out


def claims(numbers: dict[str, Any]) -> list[Claim]:
    predicted, measured = numbers["gd_predicted"], numbers["gd_steps"]
    due = predicted <= numbers["most"]
    off = np.abs(measured[due] - predicted[due])
    gaps = numbers["gd_excess"][:, 0] / numbers["start"]
    slow, fast = 0, int(np.flatnonzero(due[:, 0])[-1])
    chance = statistics.mean_interval(numbers["fired/1"], level=1 - 0.01 / len(numbers["shares"]))
    inside = (chance.low <= numbers["false/predicted"]) & (numbers["false/predicted"] <= chance.high)
    ratio = chance.estimate / numbers["false/predicted"]
    # A quick run watches too few steps to know the rarest stops to 10 %: those are judged by their intervals alone.
    known = (chance.high - chance.low) / 2 <= 0.1 * numbers["false/predicted"]
    slopes = _slopes(numbers)
    p = numbers["p_few"]
    expected = {b: min(b, p) for b in slopes}
    step = numbers["thresholds"][0]
    return [
        Claim(
            "F3",
            f"GD: the rule fires exactly when predicted, for {due.sum()} pairs of η and ε",
            f"{np.sum(off == 0)} of {due.sum()} fire at the predicted step (at most {off.max():.0f} off); of the "
            f"{np.sum(~due)} others {np.isfinite(measured[~due]).sum()} fire within {numbers['most']:,} steps",
            "all; none",
            bool(off.max() == 0 and np.isinf(measured[~due]).all()),
        ),
        Claim(
            "F3",
            f"the smaller η, the further away it stops (ε = {step:g})",
            f"gap left: {gaps[slow]:.1%} of the start at {numbers['fractions'][slow]:g} of the edge, after "
            f"{measured[slow, 0]:,.0f} steps; {gaps[fast]:.1e} at {numbers['fractions'][fast]:g}; below "
            f"{numbers['at_once'][0]:.2g} of the edge it stops at its first step",
            "at least 100 times the gap at the smallest η",
            bool(gaps[slow] > 100 * gaps[fast]),
        ),
        Claim(
            "F3",
            "it fires in a run that is about to diverge (η 2.5 % beyond the edge)",
            f"fires at step {numbers['diverging']:.0f}, predicted {numbers['diverging_predicted']:.0f}; the gap at "
            f"step 1,500 would be {numbers['diverging_excess']:.1e}",
            "as predicted, gap above 1",
            numbers["diverging"] == numbers["diverging_predicted"] and numbers["diverging_excess"] > 1,
        ),
        Claim(
            "F3",
            "SGD with b = 1 at its floor: the chance per step of a false stop is the predicted one (simultaneous 99 % "
            "intervals)",
            f"inside for {inside.sum()} of {len(inside)} thresholds; measured over predicted {ratio.min():.3f} to "
            f"{ratio.max():.3f}"
            + ("" if known.all() else f" ({ratio[known].min():.3f} to {ratio[known].max():.3f} where known to 10 %)"),
            "all inside, ratios that are known to 10 % within 10 % (the prediction takes a normal law)",
            bool(inside.all() and known.any() and np.all(np.abs(ratio[known] - 1) < 0.1)),
        ),
        Claim(
            "F3",
            f"the chance of a false stop goes like ε^min(b, p), p = {p}",
            "; ".join(f"b = {b}: exponent {slope:.2f}" for b, slope in slopes.items()),
            "; ".join(str(expected[b]) for b in slopes)
            + ", each within 0.3 (b = p, where a logarithm flattens it, within 0.6)",
            all(abs(slope - expected[b]) < (0.6 if b == p else 0.3) for b, slope in slopes.items()),
        ),
    ]


def headline(numbers: dict[str, Any]) -> str:
    T = numbers["false/steps"][-1]
    return (
        "**The stopping rule.** ‖Δw‖ < ε fires for GD exactly when theory says, the further from the minimum the "
        f"smaller η; for SGD with b = 1 it fires by luck: ε at {numbers['shares'][0]:.0%} of the usual step stops "
        f"{numbers['false/stopped'][-1] / numbers['seeds']:.0%} of runs within {T} steps of a floor they never leave."
    )


def report(numbers: dict[str, Any]) -> str:
    lines = [
        f"Diabetes, n = {numbers['n']}, κ = {numbers['condition_number']:,.0f}. Where each rule ends GD and SGD "
        "(b = 8), "
        f"each with half of its largest stable step size, on three quarters of the rows, within {numbers['budget']:,} "
        f"updates; medians over {statistics.MINIMUM_SEEDS} orders for SGD:",
        "",
        "| | rule | fired | steps | gap left, of the start | held-out loss |",
        "|---|---|---|---|---|---|",
    ]
    words = {
        "budget": "the budget alone",
        "small step": "‖Δw‖ < 0.001 (lecture)",
        "small gradient": "‖∇L‖ < 0.01, every 10",
        "validation": "held-out loss, 10 checks without progress",
    }
    for name in ("GD", "SGD"):
        for rule in RULES:
            at = {key: numbers[f"{name}/{rule}/{key}"] for key in ("steps", "excess", "validation", "fired")}
            lines.append(
                f"| {name} | {words[rule]} | {'–' if rule == 'budget' else format(at['fired'], '.0%')} | "
                f"{np.median(at['steps']):,.0f} | {np.median(at['excess']) / numbers['compared_start']:.2g} | "
                f"{np.median(at['validation']):.4f} |"
            )
    P = numbers["false/predicted"][0]
    stops = "; ".join(
        f"{T} steps: {count / numbers['seeds']:.3f} (predicted {1 - (1 - P) ** T:.3f})"
        for T, count in zip(numbers["false/steps"][::3], numbers["false/stopped"][::3], strict=True)
    )
    return "\n".join(
        [
            *lines,
            "",
            f"False stops with b = 1 and ε = {numbers['shares'][0]:.0%} of the root mean square step, share of runs: "
            f"{stops}.",
        ]
    )


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (when, where, luck) = plots.figure(3, height=4.0)
    colours = (plots.SKY, plots.BLUE, plots.BLACK)
    for k, (below, colour) in enumerate(zip(numbers["thresholds"], colours, strict=False)):
        label = f"ε = {below:g}"
        when.plot(numbers["fine"], numbers["fine_time"][:, k], color=colour, linewidth=1.2)
        steps = numbers["gd_steps"][:, k]
        when.plot(
            numbers["fractions"],
            np.where(np.isfinite(steps), steps, np.nan),
            "o",
            color=colour,
            markersize=4.5,
            label=label,
        )
        where.plot(numbers["fine"], numbers["fine_gap"][:, k] / numbers["start"], color=colour, linewidth=1.2)
        left = np.where(np.isfinite(steps), numbers["gd_excess"][:, k], np.nan) / numbers["start"]
        where.plot(numbers["fractions"], left, "o", color=colour, markersize=4.5, label=label)
        where.plot(numbers["fine"], numbers["certified"][:, k] / numbers["start"], "--", color=colour, linewidth=1)
    for axis in (when, where):
        plots.log_scale(axis, "xy")
        axis.set_xlabel("GD's step size η / edge")
    when.set(title="When GD's rule fires", ylabel="step")
    when.set_ylim(0.7, 1e5)
    when.legend(loc="upper left")
    where.set(title="How far away it is then", ylabel="gap left, of the start")
    where.set_ylim(1e-8, 30)
    where.plot([], [], "--", color=plots.GREY, linewidth=1, label="certified")
    where.legend(loc="lower left")

    shares = numbers["shares"]
    for b in numbers["batch_sizes"].tolist():
        colour = {1: plots.VERMILLION, 2: plots.PURPLE, 3: plots.ORANGE}.get(b, plots.SKY)
        chance = numbers[f"fired/{b}"].mean(axis=0)
        seen = chance * numbers["seeds"] * numbers["watched"] >= 5
        luck.plot(shares[seen], chance[seen], "o", color=colour, markersize=4.5, label=f"b = {b}")
        if b == 1:
            luck.plot(shares, numbers["false/predicted"], color=colour, linewidth=1.3)
        elif seen.any():
            anchor = np.flatnonzero(seen & (shares <= 0.25))[-1:]
            power = min(b, numbers["p_few"])
            guide = chance[anchor] * (shares / shares[anchor]) ** power
            luck.plot(shares, guide, "--", color=colour, linewidth=1)
    plots.log_scale(luck, "xy")
    luck.set_ylim(1e-7, 1)
    luck.set(title="SGD stops by luck", xlabel="ε / usual step", ylabel="chance per step")
    luck.plot([], [], "--", color=plots.GREY, linewidth=1, label="slope min(b, p)")
    luck.legend(loc="lower right")
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
