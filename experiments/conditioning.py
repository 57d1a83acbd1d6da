"""One step size for all parameters: each direction arrives in its own time, exactly as predicted; what repairs it (C7).

GD on linear regression (diamonds, an ill-conditioned problem) moves along each eigenvector of the Hessian by itself:
what is left of component i after t steps is `(1 − ηλᵢ)^t`. The run is the real loop in float64, on all the data.

Per-parameter step sizes see only the axes. On quadratics of two parameters whose curvatures differ by κ, Jacobi
scaling, Adagrad, RMSProp and Adam (ε = 0) are given the best of many step sizes and the same random starts, once with
the axes along the eigenvectors and once turned by 45°. Aligned, the paths of the adaptive methods do not depend on κ
at all, and theory counts their steps; turned, what they gain is gone, exactly so for Jacobi. The last comparison puts
the same methods on the quadratic of the real regression, whose eigenvectors follow no axis.
"""

from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import colormaps
from matplotlib.figure import Figure

from experiments.engine import plots
from experiments.engine.kinds import EXACT, ROUNDING
from experiments.engine.results import Claim
from experiments.engine.session import Session
from experiments.support.exact import decimals, geometric, normal
from experiments.support.loading import ROWS_KEY, load, some_rows
from jaxgrad import data, losses, models
from jaxgrad.descent import State, advance, init, log_spaced, trajectory
from jaxgrad.sampling import full_batch
from jaxgrad.theory import conditioning as exact
from jaxgrad.theory import least_squares as theory
from jaxgrad.types import Batch, Linear


@dataclass(frozen=True)
class Config:
    data: str = "diamonds"
    """A regression data set or a file."""
    target: str | None = None
    """The column of the file to predict."""
    options: dict[str, Any] | None = None
    """How a file is read: what `data.load` takes beside the target."""
    steps: int = 4000
    """Updates of GD on the data."""
    fraction: float = 0.5
    """GD's step size on the data, as a fraction of the edge 2/λmax."""
    kappas: tuple[float, ...] = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
    """Condition numbers of the quadratics."""
    seeds: int = 16
    """Random starts."""
    etas: int = 40
    """Step sizes tried for each method."""
    most: int = 4000
    """Steps after which a run on a quadratic counts as not arriving."""
    most_real: int = 20_000
    """The same for the quadratic of the data."""
    share: float = 1e-4
    """The target: this share of the starting gap."""
    rows: int | None = None
    """Use only so many examples (None: all)."""


QUICK = Config(steps=100, kappas=(1.0, 10.0, 100.0), seeds=8, etas=16, most=1000, most_real=4000, rows=4000)
NUMBERS = {
    "data": EXACT, "n": EXACT, "methods": EXACT, "kappas": EXACT, "most": EXACT, "most_real": EXACT,
    "seeds": EXACT, "share": EXACT, "fraction": EXACT, "record": EXACT, "steps/*": ROUNDING,
    "predicted/*": EXACT, "real/*": ROUNDING, "real_exact": EXACT, "deviation/*": ROUNDING, "eta": ROUNDING,
    "eigenvalues": ROUNDING, "condition_number": ROUNDING, "kappa/*": ROUNDING, "left": ROUNDING,
    "left_theory": ROUNDING,
}  # fmt: skip
"""What kind of number each one is, by name (`*` for any; the first that fits)."""
METHODS = ("GD", "Jacobi", "Adagrad", "RMSProp", "Adam")
ANGLES = (0.0, np.pi / 4)


def optimizer(method: str, eta: Any, H: Any) -> optax.GradientTransformation:
    """A method with step size η for the quadratic of Hessian H, with ε = 0."""
    if method == "Jacobi":
        scaled = optax.stateless(lambda gradient, _: jnp.asarray(gradient) / jnp.diag(H))
        return optax.chain(scaled, optax.sgd(eta))
    return {
        "GD": optax.sgd,
        "Adagrad": partial(optax.adagrad, initial_accumulator_value=0.0, eps=0.0),
        "RMSProp": partial(optax.rmsprop, decay=0.9, eps=0.0),
        "Adam": partial(optax.adam, eps=0.0),
    }[method](eta)


def quadratic(d: Any, H: Any) -> Any:
    return 0.5 * d @ H @ d


def run(config: Config, session: Session) -> dict[str, Any]:
    dataset = some_rows(load(config), config.rows, session.say)
    if dataset.task != "regression":
        raise ValueError(f"conditioning needs a regression data set: {dataset.name} is {dataset.task}; try diamonds")
    # optax mixes integer counters with floats.
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        x, y = (np.asarray(leaf, np.float64) for leaf in dataset.batch)
        geometry = theory.problem(Batch(x, y))
        session.say(f"GD on {dataset.name} in float64, {config.steps:,} steps")
        numbers = _directions(geometry, Batch(jnp.asarray(x), jnp.asarray(y)), config)
        numbers |= {"data": dataset.name, "n": len(y), "share": config.share, "methods": list(METHODS)}

        kappas, lanes = np.array(config.kappas), config.seeds
        starts = normal(np.random.default_rng(2021), (lanes, 2))
        starts /= np.linalg.norm(starts, axis=1, keepdims=True)
        numbers |= {"kappas": kappas, "most": config.most, "most_real": config.most_real, "seeds": lanes}
        spectra = np.stack([np.ones(len(kappas)), 1 / kappas], axis=1)
        hessians = _hessians(spectra)
        for method in METHODS:
            session.say(f"{method} on quadratics and on the real one")
            etas = _etas(method, config.etas)
            count = partial(_steps_to, method, share=config.share)
            flat = hessians.reshape(-1, 2, 2)
            steps = count(flat, np.broadcast_to(starts, (len(flat), *starts.shape)), etas, config.most)
            numbers[f"steps/{method}"] = _best(steps).reshape(len(ANGLES), len(kappas))
            numbers[f"predicted/{method}"] = np.array(
                [[_predicted(method, s, starts, etas, angle, config) for s in spectra] for angle in ANGLES]
            )
            start = -geometry.minimiser[None, None, :]
            real = count(_hessian(geometry)[None], start, etas, config.most_real)
            numbers[f"real/{method}"] = float(_best(real)[0])
            numbers[f"deviation/{method}"] = _deviation(method, starts[0], float(etas[len(etas) // 2]))
        numbers["real_exact"] = min(
            theory.gd_steps_to(
                geometry,
                0 * geometry.minimiser,
                eta * theory.edge(geometry) / 2,
                config.share * float(theory.excess_loss(geometry, 0 * geometry.minimiser)),
            )
            for eta in _etas("GD", config.etas)
        )
        return numbers | _scalings(config, dataset.name)


def _directions(geometry: theory.Problem, batch: Batch, config: Config) -> dict[str, Any]:
    """What is left of each eigen-component along GD, measured and `(1 − ηλᵢ)^t`."""
    record = log_spaced(config.steps, 25)[1:]
    eta = decimals(config.fraction * theory.edge(geometry))
    # One unit along every eigenvector: each is then measured as well as the others.
    start = geometry.minimiser + geometry.directions.sum(axis=1)
    begin = Linear(jnp.asarray(start[:-1]), jnp.asarray(start[-1]))

    def go(batch: Batch) -> Any:
        _, seen = trajectory(
            losses.mean_loss(models.linear, losses.squared),
            begin,
            batch,
            optimizer=optax.sgd(eta),
            sampling=full_batch(),
            key=jax.random.key(0),
            record=record,
            observe=lambda params: jnp.append(params.w, params.b),
        )
        return seen

    left = theory.components(geometry, np.asarray(jax.jit(go)(batch)))
    return {
        "record": record,
        "eta": eta,
        "fraction": config.fraction,
        "eigenvalues": geometry.eigenvalues,
        "condition_number": theory.condition_number(geometry),
        "left": left,
        "left_theory": exact.contraction(geometry.eigenvalues, eta, record),
    }


def _hessians(spectra: np.ndarray) -> np.ndarray:
    """`exact.rotated` of each spectrum at each of `ANGLES`, by no sine but by halves: `[angle, spectrum, 2, 2]`."""
    half_sum, half_difference = spectra.sum(axis=1) / 2, (spectra[:, 0] - spectra[:, 1]) / 2
    turned = half_sum[:, None, None] * np.eye(2) + half_difference[:, None, None] * np.eye(2)[::-1]
    return np.stack([spectra[:, :, None] * np.eye(2), turned])


def _etas(method: str, count: int) -> np.ndarray:
    """Step sizes to try; those of GD and Jacobi for curvatures up to 1."""
    if method in ("GD", "Jacobi"):
        return np.append(geometric(0.1, 0.9, count // 4), np.linspace(1.0, 1.999, count - count // 4))
    return geometric(1e-3, 2, count)


def _steps_to(
    method: str, hessians: np.ndarray, starts: np.ndarray, etas: np.ndarray, most: int, share: float
) -> np.ndarray:
    """First steps with `f <= share · f(start)`: `[h, s, e]`, infinite beyond `most`.

    The Hessians are scaled to a largest curvature of 1, for Jacobi that of `D⁻¹H`.
    """

    def one(H: Any, start: Any, eta: Any) -> Any:
        if method == "Jacobi":
            # The largest curvature behind D⁻¹, so that both share one grid of step sizes.
            root = jnp.sqrt(jnp.diag(H))
            eta = eta / jnp.linalg.eigvalsh(H / root[:, None] / root[None, :])[-1]
        below = share * quadratic(start, H)
        rule = optimizer(method, eta, H)

        def arrived(state: State) -> Any:
            return quadratic(state.params, H) <= below

        end = advance(
            init(start, rule),
            jax.random.key(0),
            H,
            most,
            loss=quadratic,
            optimizer=rule,
            sampling=full_batch(),
            halt=arrived,
        )
        return jnp.where(end.halted, end.step, jnp.inf)

    top = np.linalg.eigvalsh(hessians)[:, -1]
    many = jax.vmap(jax.vmap(jax.vmap(one, (None, None, 0)), (None, 0, None)), (0, 0, None))
    return np.asarray(jax.jit(many)(hessians / top[:, None, None], starts, etas), float)


def _best(steps: np.ndarray) -> np.ndarray:
    """Median over starts, at the best step size: `[h]`."""
    return np.median(steps, axis=1).min(axis=-1)


def _predicted(
    method: str, spectrum: np.ndarray, starts: np.ndarray, etas: np.ndarray, angle: float, config: Config
) -> float:
    """The same from theory; NaN where there is none (adaptive methods on turned axes)."""
    adaptive = method not in ("GD", "Jacobi")
    if adaptive and angle:
        return np.nan
    counts = np.full((len(etas), len(starts)), np.inf)
    # Turned axes are turned starts. At 45° the diagonal of H is constant: Jacobi is GD; on the axes it is Newton.
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    starts = starts @ turn.T
    seen = np.ones(2) if method == "Jacobi" and not angle else spectrum
    weight = 0.5 * spectrum[None, :] * starts**2
    target = config.share * weight.sum(axis=1)
    for e, eta in enumerate(etas):
        if adaptive:
            # Whatever the curvatures, the path is this one, coordinate by coordinate; a few hundred steps tell.
            path = _path(method, starts.tobytes(), float(eta), min(config.most, 400)).reshape(-1, *starts.shape)
            met = 0.5 * path**2 @ spectrum <= target[None, :]
            counts[e] = np.where(met.any(axis=0), np.argmax(met, axis=0), np.inf)
        else:
            counts[e] = [theory.first_time(seen, w, float(eta), goal) for w, goal in zip(weight, target, strict=True)]
    return float(np.median(counts, axis=1).min())


@cache
def _path(method: str, starts: bytes, eta: float, steps: int) -> np.ndarray:
    """Theory's path of an adaptive method from all starts, whose coordinates do not know of each other."""
    path = {"Adagrad": exact.adagrad_path, "RMSProp": exact.rmsprop_path, "Adam": exact.adam_path}[method]
    return path(np.frombuffer(starts), eta, steps)


def _deviation(method: str, start: np.ndarray, eta: float) -> float:
    """How far 60 steps from one start on curvatures 1 and 1e-4 differ from those on 1 and 1, or for GD from theory."""
    spectra = np.array([[1.0, 1.0], [1.0, 1e-4]])

    def go(H: Any) -> Any:
        _, path = trajectory(
            quadratic,
            jnp.asarray(start),
            H,
            optimizer=optimizer(method, eta, H),
            sampling=full_batch(),
            key=jax.random.key(0),
            record=np.arange(1, 61),
            observe=lambda d: d,
        )
        return path

    one, other = np.asarray(jax.jit(jax.vmap(go))(np.stack([np.diag(s) for s in spectra])))
    return float(np.max(np.abs(one - other)))


def _hessian(geometry: theory.Problem) -> np.ndarray:
    V = geometry.directions
    return V @ np.diag(geometry.eigenvalues) @ V.T


def _scalings(config: Config, name: str) -> dict[str, Any]:
    """Condition numbers of the data as measured, with columns over their rms, and standardised."""
    raw = load(config, standardise=False)
    x, y = (np.asarray(leaf, float) for leaf in data.sample(raw, config.rows, ROWS_KEY).batch)
    x = x[:, x.std(axis=0) > 0]
    spread = (x - x.mean(axis=0)) / x.std(axis=0)
    return {
        "kappa/raw": theory.condition_number(theory.problem(Batch(x, y))),
        "kappa/rms": theory.condition_number(exact.rescaled(Batch(x, y)).problem),
        "kappa/standardised": theory.condition_number(theory.problem(Batch(spread, y))),
    }


# --- what the numbers say --------------------------------------------------------------------------------------


def claims(numbers: dict[str, Any]) -> list[Claim]:
    off = float(np.max(np.abs(numbers["left"] - numbers["left_theory"])))
    half = float(np.log(0.5) / np.log(1 - numbers["eta"] * numbers["eigenvalues"][-1]))
    kappas = numbers["kappas"]
    adaptive = ("Adagrad", "RMSProp", "Adam")
    steps = {method: numbers[f"steps/{method}"] for method in METHODS}
    deviation = max(numbers[f"deviation/{method}"] for method in adaptive)
    known = {method: np.isfinite(numbers[f"predicted/{method}"]) for method in METHODS}
    hit = np.concatenate([(steps[m] == numbers[f"predicted/{m}"])[known[m]] for m in METHODS])
    same = bool(np.array_equal(steps["Jacobi"][1], steps["GD"][1]))
    return [
        Claim(
            "C7",
            f"{numbers['data']}: GD leaves (1 − ηλ)^t of each eigen-component ({len(numbers['eigenvalues'])} of them)",
            f"largest difference {off:.1e}; the first component is gone after "
            f"{'one step' if numbers['fraction'] == 0.5 else 'a few steps'}, half of the last after {half:,.0f}",
            "below 1e-10",
            off < 1e-10,
        ),
        Claim(
            "C7",
            "every method takes the predicted number of steps where there is a prediction (all of them on the axes, "
            f"GD and Jacobi at 45° too), κ up to {kappas[-1]:,.0f}",
            f"{hit.sum()} of {len(hit)} medians equal",
            "all",
            bool(hit.all()),
        ),
        Claim(
            "C7",
            "aligned, the paths of Adagrad, RMSProp and Adam (ε = 0) do not depend on the curvatures",
            f"κ = 1 and κ = 10⁴ differ by {deviation:.1e} in 60 steps",
            "below 1e-12",
            deviation < 1e-12,
        ),
        Claim(
            "C7",
            "per-parameter step sizes repair ill-conditioning only along the axes: turned by 45° Jacobi is GD, Adagrad "
            "and RMSProp need steps that grow with κ",
            f"κ = {kappas[-1]:,.0f}, aligned → turned: "
            + "; ".join(f"{m} {steps[m][0, -1]:,.4g} → {steps[m][1, -1]:,.4g}" for m in METHODS),
            "Jacobi equal to GD at every κ; Adagrad, RMSProp at least 10 times their aligned number",
            same and all(steps[m][1, -1] >= 10 * steps[m][0, -1] for m in ("Adagrad", "RMSProp")),
        ),
        Claim(
            "C7",
            f"{numbers['data']} itself (no axis of its own): steps to {numbers['share']:g} of the gap, best step size",
            "; ".join(f"{m} {_number(numbers[f'real/{m}'])}" for m in METHODS)
            + f"; exact for GD {_number(numbers['real_exact'])}",
            "GD as predicted",
            numbers["real/GD"] == numbers["real_exact"],
        ),
    ]


def _number(steps: float) -> str:
    return f"{steps:,.0f}" if np.isfinite(steps) else "not within the budget"


def headline(numbers: dict[str, Any]) -> str:
    steps = {method: numbers[f"steps/{method}"] for method in METHODS}
    return (
        f"**One step size for all.** At condition number {numbers['kappas'][-1]:,.0f} GD needs "
        f"{steps['GD'][0, -1]:,.0f} steps where Adagrad needs {steps['Adagrad'][0, -1]:,.0f} if the axes lie along "
        f"the eigenvectors, and {steps['Adagrad'][1, -1]:,.0f} if they are turned by 45°; Jacobi scaling does nothing "
        "there."
    )


def report(numbers: dict[str, Any]) -> str:
    kappas = numbers["kappas"]
    lines = [
        f"Steps to {numbers['share']:g} of the starting gap: median over {numbers['seeds']} starts at the best step "
        "size; aligned / turned by 45°.",
        "",
        f"| | {' | '.join(f'κ = {kappa:,.0f}' for kappa in kappas)} | {numbers['data']} |",
        f"|---|{'---|' * (len(kappas) + 1)}",
    ]
    for method in METHODS:
        cells = [f"{a:,.4g} / {b:,.4g}" for a, b in numbers[f"steps/{method}"].T]
        lines.append(f"| {method} | {' | '.join(cells)} | {_number(numbers[f'real/{method}'])} |")
    return "\n".join(
        [
            *lines,
            "",
            f"Scaling the features is Jacobi by another name: κ of {numbers['data']} is {numbers['kappa/raw']:,.3g} as "
            f"measured, {numbers['kappa/rms']:,.3g} with each column over its root mean square, "
            f"{numbers['kappa/standardised']:,.3g} standardised (centring matters beside the intercept). What is left "
            "is correlation between columns, which no scaling of axes removes. Adam's lead on turned axes is momentum.",
        ]
    )


COLOURS = {
    "GD": plots.BLACK,
    "Jacobi": plots.GREEN,
    "Adagrad": plots.BLUE,
    "RMSProp": plots.ORANGE,
    "Adam": plots.PURPLE,
}


def draw(numbers: dict[str, Any]) -> Figure:
    figure, (modes, aligned, turned) = plots.figure(3, height=4.0)
    t, lam = numbers["record"], numbers["eigenvalues"]
    fine = np.unique(np.round(np.geomspace(1, t[-1], 200)).astype(int))
    lines = exact.contraction(lam, numbers["eta"], fine)
    shades = colormaps["cividis"](np.linspace(0, 0.9, len(lam)))
    for i in range(len(lam)):
        modes.plot(fine, np.abs(lines[:, i]), color=shades[i], linewidth=1.1)
        modes.plot(t, np.abs(numbers["left"][:, i]), "o", color=shades[i], markersize=3.2)
    plots.log_scale(modes, "xy")
    modes.set_ylim(1e-5, 2)
    modes.set(title=f"GD on {numbers['data']}", xlabel="steps", ylabel="left of each eigen-component")
    modes.text(0.03, 0.05, "dark: large λ\nlight: small λ", transform=modes.transAxes, fontsize=9)

    kappas = numbers["kappas"]
    for row, axis in ((0, aligned), (1, turned)):
        for method, colour in COLOURS.items():
            measured = numbers[f"steps/{method}"][row]
            known = row == 0 or method in ("GD", "Jacobi")
            dodge = 1.0 if method != "Jacobi" else 1.08
            if known:
                axis.plot(kappas, numbers[f"predicted/{method}"][row], color=colour, linewidth=1.2)
            axis.plot(
                kappas * dodge,
                measured,
                "o" if known else "o:",
                color=colour,
                markersize=4.5,
                linewidth=1,
                label=method,
            )
        plots.log_scale(axis, "xy")
        axis.set_xlabel("condition number κ")
        axis.set_ylim(0.7, 1.6 * max(numbers["steps/GD"].max(), numbers["steps/Adagrad"].max()))
    aligned.set(title="Axes along the eigenvectors", ylabel=f"steps to {numbers['share']:g} of the gap")
    turned.set_title("Turned by 45°")
    aligned.legend(loc="upper left")
    return figure


if __name__ == "__main__":
    from experiments.engine import commands

    commands.run_file(__file__)
