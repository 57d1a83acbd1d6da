"""GD against SGD on rows that stay on disk: what `gd_vs_sgd` does where its data are larger than memory.

Linear regression. One pass gives mean and covariance of all columns, and with them everything that is needed of the
whole: the standardisation, the minimum, and the gap of any parameters (a quadratic form, exact but for the rounding
of the standardised columns to float32). Step sizes are tuned on a sample of rows in memory; then each batch size runs
over the file, with rows read ahead. A second is one of such a run, waiting for the disk included.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.engine.session import Session
from experiments.support.exact import decimals
from experiments.support.loading import plain
from experiments.support.shared import finals, label_of, sampling_of
from jaxgrad import losses, models
from jaxgrad.data import are_classes
from jaxgrad.descent import descend, log_spaced
from jaxgrad.rows import MEMORY, moments, open_rows, pick
from jaxgrad.types import Linear

TUNING_ROWS = 100_000
"""Step sizes are tuned on so many rows."""


def run(config: Any, session: Session) -> dict[str, Any]:
    """The numbers of `gd_vs_sgd` for one data set on disk; `config` is that experiment's."""
    path = Path(config.data).expanduser()
    if config.target is None:
        raise ValueError(f"{path.name}: say which column is the target (--target NUMBER)")
    try:
        target = int(config.target)
    except ValueError:
        raise ValueError(
            f"{path.name} has no names: the target is a number of a column, got {config.target!r}"
        ) from None
    raw = open_rows(path, target=target, memory=MEMORY if config.memory is None else config.memory / 4)
    some = np.unique(np.arange(10_000) * (raw.n - 1) // 9_999)
    values = np.unique(pick(raw, some)[:, raw.target])
    if len(values) <= 2 or are_classes(values, len(some)):
        raise ValueError(
            f"{path.name}: the target looks like {len(values)} classes, and this experiment runs only regression from "
            "disk; raise --memory to load the file, or call descend on open_rows(..., classes=...)"
        )
    session.say(f"{path.name}: one pass for mean and covariance of {raw.n:,} rows")
    mean, covariance = moments(raw)
    spread = np.sqrt(np.diag(covariance))
    if not spread.all():
        raise ValueError(f"{path.name}: column {int(np.argmin(spread))} is constant; leave it out")
    correlation = covariance / np.outer(spread, spread)
    features = [i for i in range(raw.columns) if i != raw.target]
    R, r = correlation[np.ix_(features, features)], correlation[features, raw.target]
    best = np.linalg.solve(R, r)
    minimum = float(1 - r @ best)

    def gap(params: Linear) -> Any:
        """`L(w) − L*`, from the moments alone: the columns are standardised, so E[x] = 0 and E[y] = 0."""
        off = np.asarray(params.w, np.float64) - best
        return np.einsum("...i,ij,...j->...", off, R, off) + np.asarray(params.b, np.float64) ** 2

    rows = raw.scaled(mean, spread)._replace(full=lambda params: gap(params) + minimum)
    loss, start = losses.mean_loss(models.linear, losses.squared), models.init_linear(len(features))
    top = max(1.0, decimals(np.linalg.eigvalsh(R)[-1]))
    name, n = plain(path.stem), raw.n
    sizes: list[int | None] = [None, *(b for b in config.batch_sizes if b < n)]
    numbers: dict[str, Any] = {
        "problems": [name],
        f"{name}/what": f"linear regression from disk, n = {n:,}, d = {len(features)}",
        f"{name}/n": n,
        f"{name}/labels": [label_of(b) for b in sizes],
        f"{name}/kind": "gap to the minimum",
        f"{name}/start": float(gap(start)),
        f"{name}/minimum": minimum,
        # What solving left of the gradient, squared, over four times the least curvature.
        f"{name}/bound": float(np.sum((2 * (R @ best - r)) ** 2) / (4 * np.linalg.eigvalsh(R)[0])),
    }
    rng = np.random.default_rng(2021)
    sample = np.asarray(pick(rows, np.sort(rng.integers(0, n, min(n, TUNING_ROWS)))))
    batch = jax.tree.map(jnp.asarray, rows.as_batch(jnp.asarray(sample)))
    key_tune, key_order = jax.random.split(jax.random.key(2021))
    for b in sizes:
        # An update of the full batch is a pass over the file; the others need not be as many as see all rows once.
        steps = 4 * config.epochs if b is None else 2 * config.updates
        sampling = sampling_of(b)
        tuned, runs = (1, 1) if b is None else (config.tuning_seeds, config.seeds)
        session.say(f"{name}, {label_of(b)}: tuning the step size on {len(sample):,} rows under {steps:,} updates")
        etas = np.ldexp(1 / top, -np.arange(config.halvings))

        def scores(sampling: Any = sampling, steps: int = steps, tuned: int = tuned, etas: Any = etas) -> np.ndarray:
            final = finals(loss, start, batch, sampling, steps, jax.random.split(key_tune, tuned), etas, lambda w: w)
            return np.median(np.nan_to_num(gap(final), nan=np.inf, posinf=np.inf), axis=1)

        score = session.keep(f"{name} {label_of(b)} tuning", scores)
        eta = float(etas[np.argmin(score)])
        traces = []
        for i, key in enumerate(jax.random.split(key_order, runs)):
            session.say(f"{name}, {label_of(b)}: run {i + 1} of {runs} with step size {eta:.3g}")
            record = log_spaced(steps, config.points)
            trace = descend(
                loss,
                start,
                rows,
                optimizer=eta,
                sampling=sampling,
                steps=steps,
                key=key,
                record=record,
                checkpoint=session.checkpoint(f"{name} {label_of(b)} run {i}", steps),
            )
            traces.append(trace)
        per_update = np.array([trace.seconds[-1] / steps for trace in traces])
        own = {
            "eta": eta,
            "etas": etas,
            "tuning": score,
            "steps": traces[0].steps,
            "examples": traces[0].examples,
            "excess": np.stack([trace.loss for trace in traces]) - minimum,
            "diverged": sum(trace.status.startswith("diverged") for trace in traces),
            "seconds_per_update": float(np.median(per_update)),
            "seconds_per_update_runs": per_update,
        }
        numbers |= {f"{name}/{label_of(b)}/{what}": value for what, value in own.items()}
    return numbers
