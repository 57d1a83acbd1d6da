"""What a step costs: O(n) for gradient descent, O(b) for SGD whatever n, sampling included (C4).

Linear regression on synthetic data (the numbers in them do not matter to the clock), n from 10³ to 10⁷ rows of
d = 8 columns in float32, up to 360 MB. Timed are whole steps of the compiled loop (`jaxgrad.descent.advance`):
drawing indices, fetching rows, gradient, update. Beside them, sampling alone. Contenders of one comparison take
turns in one run, each is compiled and run once beforehand, and medians over rounds are reported with a
distribution-free interval.

SGD's step may grow a little with n, since rows are fetched from a memory that no longer fits the cache; drawing
the indices may not grow at all. The lecture does not say how to draw b < n examples; shuffling all n for it
(`jax.random.permutation` in the loop) costs more than everything else together, and is shown for that.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from experiments.engine import plots
from experiments.engine.kinds import EXACT, RATIO, SECONDS
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import normal
from jaxgrad import losses, models, timing
from jaxgrad.descent import advance, init
from jaxgrad.sampling import distinct, full_batch, reshuffled, with_replacement
from jaxgrad.types import Batch, Key, Sampling


@dataclass(frozen=True)
class Config:
    rows: tuple[int, ...] = (10**3, 10**4, 10**5, 10**6, 10**7)
    """n of the sweep over the size of the data, at batch size `b`."""
    b: int = 32
    """Batch size of the sweep over n."""
    batch_sizes: tuple[int, ...] = (1, 4, 16, 64, 256, 1024, 4096)
    """b of the sweep over the batch size, at `rows_for_b` rows."""
    rows_for_b: int = 10**5
    d: int = 8
    """Columns of the data."""
    index_exponents: tuple[int, ...] = tuple(range(9, 22))
    """Drawing indices alone: n = 3 · 2^k for these k."""
    shuffle_rows: tuple[int, ...] = (10**3, 10**4, 10**5)
    """n at which shuffling all n for one batch is timed."""
    loop_rows: int = 20_000
    """Data of the comparison with a step that Python calls: so many rows of `loop_columns`."""
    loop_columns: int = 64
    repeats: int = 11
    """Rounds."""
    min_seconds: float = 0.005
    """Each contender runs at least this long per round."""


TIMED = True
QUICK = Config(
    rows=(10**3, 10**5),
    batch_sizes=(32, 1024),
    index_exponents=(9, 17),
    shuffle_rows=(10**3,),
    repeats=7,
    min_seconds=0.002,
)
NUMBERS = {
    "b": EXACT, "d": EXACT, "rows": EXACT, "rows_for_b": EXACT, "batch_sizes": EXACT, "index_rows": EXACT,
    "shuffle_rows": EXACT, "loop_rows": EXACT, "loop_columns": EXACT, "python_over_loop": RATIO,
    "batch/*": SECONDS, "index/*": SECONDS, "step/*": SECONDS, "called from Python": SECONDS,
    "compiled loop": SECONDS,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
LOSS = losses.mean_loss(models.linear, losses.squared)
OPTIMIZER = optax.sgd(1e-3)
KINDS: dict[str, Callable[[int], Sampling]] = {
    "with replacement": with_replacement,
    "distinct": distinct,
    "reshuffled": reshuffled,
}
INDEX_STEPS = 1024
ONE_CORE = 1024
"""The largest batch whose step one core takes by itself, with so few columns."""


def run(config: Config, session: Session) -> dict[str, Any]:
    def race(contenders: dict[str, Callable[[], Any]], longer: int = 1) -> dict[str, timing.Timing]:
        return session.race(contenders, repeats=config.repeats, min_seconds=longer * config.min_seconds)

    numbers: dict[str, Any] = {
        "b": config.b,
        "d": config.d,
        "rows": np.array(config.rows),
        "batch_sizes": np.array(config.batch_sizes),
        "rows_for_b": config.rows_for_b,
        "index_rows": np.array([3 * 2**k for k in config.index_exponents]),
        "shuffle_rows": np.array(config.shuffle_rows),
        "loop_rows": config.loop_rows,
        "loop_columns": config.loop_columns,
    }

    def keep(name: str, timings: list[timing.Timing], steps: list[int]) -> None:
        """Seconds per step: median, low, high, `[3, points]`."""
        numbers[name] = np.array([[t.median / s, t.low / s, t.high / s] for t, s in zip(timings, steps, strict=True)]).T

    timed: dict[str, list[timing.Timing]] = {name: [] for name in ("full batch", *KINDS)}
    steps_of: dict[str, list[int]] = {name: [] for name in timed}
    for n in config.rows:
        session.say(f"whole steps at n = {n:,}")
        data = _data(n, config.d)
        samplings = {"full batch": full_batch(), **{name: kind(config.b) for name, kind in KINDS.items()}}
        steps = {name: _steps(sampling, n) for name, sampling in samplings.items()}
        race_of = {name: _loop(sampling, data, steps[name]) for name, sampling in samplings.items()}
        for name, took in race(race_of).items():
            timed[name].append(took)
            steps_of[name].append(steps[name])
        del data, race_of
    for name in timed:
        keep(f"step/{name}", timed[name], steps_of[name])

    session.say(f"whole steps against b at n = {config.rows_for_b:,}")
    data = _data(config.rows_for_b, config.d)
    for name, kind in KINDS.items():
        sizes = [b for b in config.batch_sizes if b <= config.rows_for_b]
        took = race({str(b): _loop(kind(b), data, _steps(kind(b), config.rows_for_b)) for b in sizes})
        keep(f"batch/{name}", list(took.values()), [_steps(kind(b), config.rows_for_b) for b in sizes])

    session.say("drawing indices alone")
    for name, kind in KINDS.items():
        # A draw is microseconds, and a trend in it is what is asked for: each contender runs longer per round.
        draws = {str(n): _draw(kind(config.b), int(n)) for n in numbers["index_rows"]}
        took = race(draws, longer=5)
        keep(f"index/{name}", list(took.values()), [INDEX_STEPS] * len(took))
    shuffles = race({str(n): _shuffle(config.b, n) for n in config.shuffle_rows})
    keep("index/shuffle all n", list(shuffles.values()), [1] * len(shuffles))

    session.say("the compiled loop against a step called from Python")
    data, steps = _data(config.loop_rows, config.loop_columns), 2000
    pair = race(
        {
            "loop": _loop(distinct(config.b), data, steps),
            "called": _called_from_python(distinct(config.b), data, steps=200),
        }
    )
    keep("compiled loop", [pair["loop"]], [steps])
    keep("called from Python", [pair["called"]], [200])
    share = timing.ratio(pair["called"], pair["loop"])
    numbers["python_over_loop"] = np.array([share.median, share.low, share.high]) * steps / 200
    return numbers


def _data(n: int, d: int) -> Batch:
    # 16 bits: the sum of a row is exact too.
    x = normal(np.random.default_rng(0), (n, d), bits=16, dtype=np.float32)
    return Batch(jnp.asarray(x), jnp.asarray(x.sum(axis=1)))


def _steps(sampling: Sampling, n: int) -> int:
    """So many steps per call that the call itself costs nothing beside them."""
    return max(1, min(1000, 10**7 // n)) if sampling.batch_size is None else max(16, 32_768 // sampling.batch_size)


def _loop(sampling: Sampling, data: Batch, steps: int) -> Callable[[], Any]:
    """`steps` steps of the compiled loop."""
    state = init(models.init_linear(data.x.shape[1]), OPTIMIZER)
    key = jax.random.key(1)
    return lambda: _advance(state, key, data, steps, loss=LOSS, optimizer=OPTIMIZER, sampling=sampling, single=True)


_advance = jax.jit(advance, static_argnames=("loss", "optimizer", "sampling", "single"))


def _draw(sampling: Sampling, n: int) -> Callable[[], Any]:
    """The indices of `INDEX_STEPS` steps, drawn as the loop draws them."""

    @jax.jit
    def program(key: Key) -> jax.Array:
        return sampling.ahead(key, 0, INDEX_STEPS, n)

    return lambda: program(jax.random.key(1))


def _shuffle(b: int, n: int) -> Callable[[], Any]:
    """The indices of one step by shuffling all n."""
    program = jax.jit(lambda key: jax.random.permutation(key, n)[:b])
    return lambda: program(jax.random.key(1))


def _called_from_python(sampling: Sampling, data: Batch, steps: int) -> Callable[[], Any]:
    """What most people write: a jitted step (the same one, drawing its batch), called from a Python loop."""
    start = init(models.init_linear(data.x.shape[1]), OPTIMIZER)

    @jax.jit
    def step(params: Any, opt_state: Any, key: Key, t: Any, data: Batch) -> Any:
        rows = sampling.indices(key, t, data.x.shape[0])
        gradient = jax.grad(LOSS)(params, Batch(data.x[rows], data.y[rows]))
        update, opt_state = OPTIMIZER.update(gradient, opt_state, params)
        return optax.apply_updates(params, update), opt_state

    def loop() -> Any:
        params, opt_state, key = start.params, start.optimizer, jax.random.key(1)
        for t in range(steps):
            params, opt_state = step(params, opt_state, key, t, data)
        return params

    return loop


def _index_trend(numbers: dict[str, Any], name: str) -> float:
    """Largest over smallest median time of drawing, over all n = 3 · 2^k."""
    median = numbers[f"index/{name}"][0]
    return float(median.max() / median.min())


def _growth(numbers: dict[str, Any], name: str) -> tuple[float, int, int]:
    """How much longer a step takes at the largest n than at 10^5 (or, in a quick run, at the smallest n)."""
    rows, median = numbers["rows"], numbers[f"step/{name}"][0]
    start = int(np.argmin(np.abs(rows - 10**5))) if rows[-1] > 10**5 else 0
    return float(median[-1] / median[start]), int(rows[start]), int(rows[-1])


def claims(numbers: dict[str, Any]) -> list[Claim]:
    b, out = numbers["b"], []
    gd, small, large = _growth(numbers, "full batch")
    out.append(
        Claim(
            "C4",
            f"a GD step costs O(n): growth from n = {small:,} to {large:,}",
            f"×{gd:.3g} in time for ×{large / small:g} in n",
            f"×{0.5 * large / small:g} to ×{5 * large / small:g} (memory is slower than the cache)",
            0.5 * large / small <= gd <= 5 * large / small,
        )
    )
    for name in KINDS:
        growth, small, large = _growth(numbers, name)
        out.append(
            Claim(
                "C4",
                f"an SGD step (b = {b}, {name}, sampling included) does not grow with n but for cache misses: "
                f"n = {small:,} to {large:,}",
                f"×{growth:.3g}",
                "at most ×3",
                growth <= 3,
            )
        )
    for name in KINDS:
        trend = _index_trend(numbers, name)
        n = numbers["index_rows"]
        out.append(
            Claim(
                "C4",
                f"drawing {b} indices ({name}) costs the same for all n from {n[0]:,} to {n[-1]:,} "
                "(slowest over fastest)",
                f"×{trend:.3g}",
                "at most ×1.5",
                trend <= 1.5,
            )
        )
    n, shuffled = numbers["shuffle_rows"], numbers["index/shuffle all n"][0]
    if len(n) > 1:
        grown, times = shuffled[-1] / shuffled[0], n[-1] / n[0]
        out.append(
            Claim(
                "C4",
                f"shuffling all n for one batch costs O(n) instead: from n = {n[0]:,} to {n[-1]:,}",
                f"×{grown:.3g} in time for ×{times:g} in n",
                f"at least ×{times / 3:.3g}",
                bool(grown >= times / 3),
            )
        )
    share = float((numbers["step/distinct"][0] / numbers["step/reshuffled"][0]).max())
    out.append(
        Claim(
            "C4",
            f"a step on {b} fresh distinct examples costs no more than twice a step of a reshuffled pass, any n",
            f"×{share:.3g}",
            "at most ×2",
            share <= 2,
        )
    )
    sizes, median = numbers["batch_sizes"], numbers["batch/distinct"][0]
    # Beyond, a second core takes its part.
    last = int(np.flatnonzero(sizes <= ONE_CORE)[-1])
    slope = float((median[last] - median[last - 1]) / (sizes[last] - sizes[last - 1]) * sizes[last] / median[last])
    out.append(
        Claim(
            "C4",
            f"an SGD step costs O(b): elasticity of its time between b = {sizes[last - 1]:,} and {sizes[last]:,}",
            f"{slope:.3g}",
            "0.8 to 1.2",
            0.8 <= slope <= 1.2,
        )
    )
    times, low, high = numbers["python_over_loop"]
    out.append(
        Claim(
            "loop",
            f"the compiled loop beats the same step called from Python (b = {b}, d = {numbers['loop_columns']})",
            f"×{times:.3g} ({low:.3g} to {high:.3g})",
            "at least ×5",
            times >= 5,
        )
    )
    return out


def headline(numbers: dict[str, Any]) -> str:
    gd, small, large = _growth(numbers, "full batch")
    sgd, _, _ = _growth(numbers, "distinct")
    return (
        f"**What a step costs.** From n = {small:,} to {large:,} a GD step grows ×{gd:.3g}, an SGD step "
        f"(b = {numbers['b']}, distinct examples, drawing them included) ×{sgd:.3g}; the compiled loop is "
        f"{numbers['python_over_loop'][0]:.0f} times as fast as the same step called from Python."
    )


def report(numbers: dict[str, Any]) -> str:
    rows = [int(n) for n in numbers["rows"]]
    out = [
        f"Microseconds of a whole step (b = {numbers['b']}, d = {numbers['d']}), median (95 % interval):\n",
        "| sampling | " + " | ".join(f"n = {n:,}" for n in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for name in ("full batch", *KINDS):
        out.append(f"| {name} | " + " | ".join(_micro(column) for column in numbers[f"step/{name}"].T) + " |")
    drawn = numbers["index_rows"]
    few = np.unique(np.linspace(0, len(drawn) - 1, 4).astype(int))
    out += [
        f"\nMicroseconds of drawing the {numbers['b']} indices of one step, by themselves:\n",
        "| sampling | " + " | ".join(f"n = {drawn[i]:,}" for i in few) + " |",
        "|---" * (len(few) + 1) + "|",
    ]
    for name in KINDS:
        out.append(f"| {name} | " + " | ".join(_micro(numbers[f"index/{name}"][:, i]) for i in few) + " |")
    shuffled = numbers["index/shuffle all n"][0] * 1e6
    out.append(
        "\nShuffling all n for one batch instead: "
        + ", ".join(f"{t:,.0f} µs at n = {n:,}" for n, t in zip(numbers["shuffle_rows"], shuffled, strict=True))
        + "."
    )
    return "\n".join(out)


def _micro(times: np.ndarray) -> str:
    median, low, high = times * 1e6
    return f"{median:.3g} ({low:.3g}–{high:.3g})"


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (left, middle, right) = plots.figure(3, height=3.9, sharey=True)

    def curve(axis: Any, x: np.ndarray, times: np.ndarray, colour: str, label: str, style: str = "o-") -> None:
        median, low, high = times * 1e6
        axis.plot(x, median, style, color=colour, label=label)
        plots.band(axis, x, low, high, colour)

    for name in ("full batch", *KINDS):
        colour = plots.sampling_colour(name)
        curve(left, numbers["rows"], numbers[f"step/{name}"], colour, name)
    for name in KINDS:
        colour = plots.sampling_colour(name)
        curve(middle, numbers["batch_sizes"], numbers[f"batch/{name}"], colour, name)
        curve(right, numbers["index_rows"], numbers[f"index/{name}"], colour, name)
    curve(right, numbers["shuffle_rows"], numbers["index/shuffle all n"], plots.GREY, "shuffling all n", "s--")
    left.set(title=f"A step, b = {numbers['b']}", xlabel="n, examples in the data", ylabel="µs per step")
    middle.set(title=f"A step, n = {numbers['rows_for_b']:,}", xlabel="b, examples in the batch")
    right.set(title=f"Drawing {numbers['b']} indices alone", xlabel="n, examples in the data")
    for axis in (left, middle, right):
        plots.log_scale(axis, "xy")
        axis.xaxis.set_major_locator(LogLocator(numticks=5))
    handles, labels = left.get_legend_handles_labels()
    extra_handles, extra_labels = right.get_legend_handles_labels()
    figure.legend([*handles, extra_handles[-1]], [*labels, extra_labels[-1]], loc="outside upper center", ncols=5)
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
