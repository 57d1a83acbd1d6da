"""Rows in arrays of this process. `of_arrays` serves rows in arrays on any number of devices."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import losses, parallel
from jaxgrad.descent import checkpoint as saved
from jaxgrad.descent import optimizers, programs, row_blocks, run_tiles
from jaxgrad.descent.at_start import first_bad_example, not_finite_at_start
from jaxgrad.descent.job import Job
from jaxgrad.descent.objective import Objective, loss_key
from jaxgrad.descent.placement import Placement, as_arrays, check, measured, sees_all, with_fallback
from jaxgrad.descent.step import check_rows, leading_axis
from jaxgrad.sampling import check_sizes
from jaxgrad.types import Key, Loss, Params, Sampling


def in_memory(job: Job, data: Any) -> Placement:
    """The placement of rows in arrays of this process, which may already be on several devices."""
    # A late import: `import jaxgrad` does not need the package of data sets.
    from jaxgrad.data import check_batch

    check_batch(data)
    data = jax.tree.map(jnp.asarray, data)
    check_sizes(job.sampling, n := leading_axis(data))
    check(job, job.objective, data)
    losses.check_labels(job.objective.loss, job.params, data)
    mesh = parallel.mesh_of(data)
    identity = (job.objective, data, partial(saved.rows_hash, data))
    return of_arrays(job, job.objective, job.sampling, data, n, mesh, identity)


def of_arrays(
    job: Job, objective: Objective, sampling: Sampling, data: Any, n: int, mesh: Any, identity: Any
) -> Placement:
    runs, optimizer = job.runs, job.runs.optimizer
    here, shape, at = mesh is None or mesh.size == 1, job.runs.shape, optimizers.trained(job.params)
    two = objective.of_two()
    rows = _rows(sampling, two, at, data) if here else None
    in_steps = rows if objective.plain and objective.evaluate is None else None
    if sampling.batch_size is None:
        if objective.plain and objective.evaluate is not None and here:
            in_steps = _rows(sampling, objective.loss, at, data)
        if not objective.plain and sampling.rows is not None:
            raise ValueError(
                f"full_batch(rows={sampling.rows}) takes the gradient in blocks, which a loss with random, loss_state "
                "or has_aux is not known to allow: leave rows out"
            )
        alone = here and in_steps is None and not shape and objective.plain
        parts = row_blocks.parts_for(objective.loss, at, data) if alone else 1
        sampling = sampling._replace(rows=in_steps, parts=parts)
    single = not shape and here
    static: dict[str, Any] = {"objective": objective, "optimizer": optimizer, "sampling": sampling, "over": runs.over}
    advance: Any = partial(programs.advance, **static, single=single)
    if single and in_steps is not None and job.sampling.batch_size is None and job.sampling.rows is None:
        needs = optimizers.asked(optimizer, job.params, jax.eval_shape(optimizer.init, job.params))
        simple = not (needs.value or needs.function or job.batch_losses or at is not job.params)
        slope = row_blocks.on_all_cores(objective.loss, at, data) if simple else None
        advance = advance if slope is None else programs.with_given_gradient(slope, optimizer)
    seen: dict[str, Any] = {"objective": objective, "evaluate_at": job.evaluate_at, "over": runs.over, "rows": rows}
    look: Any = partial(programs.look, observe=job.observe, **seen)
    whole_look = look
    judges: list[Any] = [partial(programs.judge, **measured(rule), **seen) for rule in job.rules]
    finite: Any = partial(programs.finite, runs=len(shape))
    if shape:
        every, of_key = runs.axes, runs.of_key
        advance = run_tiles.in_tiles(advance, shape, (every, of_key, (), ()), job.memory)
        look = run_tiles.in_tiles(look, shape, (every, of_key, ()), job.memory)
        judges = [run_tiles.in_tiles(own, shape, (every, of_key, ()), job.memory) for own in judges]
        finite = run_tiles.in_tiles(finite, shape, (every,), job.memory)
    advance = with_fallback(advance, single)
    keyed = objective.draws_when_recorded

    def at_start(params: Params, model: Any, key: Key) -> str:
        at = optimizers.trained(params)
        own = loss_key(key, 0) if objective.random else None
        blocked = (in_steps or rows) if objective.plain else None
        value, slope = programs.value_and_gradient(at, model, own, data, objective=objective, rows=blocked)
        found = not_finite_at_start(value, slope)
        first = first_bad_example(objective.loss, at, data) if found and here and objective.plain else ""
        return found and found + first

    return Placement(
        n=n,
        mesh=mesh,
        put=(lambda tree: parallel.replicate(tree, mesh)) if mesh is not None else as_arrays,
        advance=lambda state, key, until, *, halt: advance(state, key, data, np.int32(until), halt=halt),
        look=lambda state, key: look(programs.seen_state(state, sees_all(job)), key if keyed else (), data),
        recorded=lambda state, key: jax.eval_shape(
            whole_look, programs.seen_state(state, sees_all(job)), key if keyed else (), data
        )[2:],
        judge=lambda number, state, key: judges[number](
            programs.seen_state(state, job.evaluate_at is not None), key if keyed else (), data
        ),
        finite=finite,
        at_start=at_start,
        identity=identity,
    )


def _rows(sampling: Sampling, loss: Loss | None, params: Params, data: Any) -> int | None:
    """Rows of a block in which to evaluate a mean over all examples; None for all rows at once."""
    if loss is None:
        return None
    if sampling.rows is None:
        return row_blocks.rows_for(loss, params, data)
    check_rows(sampling.rows, loss, params, data)
    return sampling.rows
