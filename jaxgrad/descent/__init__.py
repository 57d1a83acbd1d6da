"""The descent loop (F2, F3, F5) over any optax transformation, for one run or many, wherever the rows are.

    run = descend(loss, params, data, optimizer=0.1, sampling=distinct(32), steps=1000, key=jax.random.key(0))

step          the algorithm: `init`, `advance`, `trajectory`, pure functions of a `State`
objective     the forms that a loss may have: plain, with a key, with a state, with other numbers beside its value
optimizers    what an optimizer asks for, which optimizers are equal, the random keys in their states
stopping      when to end a run, and which parameters to keep
beginning     where runs begin: new parameters, or the state of earlier runs
schedule      at which steps a run pauses
runs          settings x keys side by side
job           what to do with the rows, wherever they are
programs      what is compiled
placement     where the rows are, as a value; made by in_memory, on_mesh, on_disk
row_blocks    a full gradient in blocks of rows that fit the cache
small_steps   a loop of small steps as one function on one core
run_tiles     many runs in one program, in tiles that fit memory
full_pass     the full loss of rows on disk, and its gradient
at_start      what is not finite at the start
checkpoint    stop and resume
identity      the fingerprint of a run, for its checkpoint
keeper        resume, save as it goes, stop where the system asks
log           what has happened to each run
course        what happens on the way to a pause, and at the pause
trace         what a run did: table, picture, text
run           `descend`
"""

from jaxgrad.descent.checkpoint import Checkpoint
from jaxgrad.descent.full_pass import full_gradient, full_loss
from jaxgrad.descent.objective import loss_key, recorded_key
from jaxgrad.descent.optimizers import StepSize
from jaxgrad.descent.run import descend
from jaxgrad.descent.schedule import log_spaced
from jaxgrad.descent.step import State, advance, init, trajectory
from jaxgrad.descent.stopping import (
    Stop,
    keep_best,
    no_improvement,
    small_gradient,
    small_step,
    target_loss,
    time_limit,
)
from jaxgrad.descent.trace import Best, Trace

__all__ = [
    "Best", "Checkpoint", "State", "StepSize", "Stop", "Trace", "advance", "descend", "full_gradient", "full_loss",
    "init", "keep_best", "log_spaced", "loss_key", "no_improvement", "recorded_key", "small_gradient", "small_step",
    "target_loss", "time_limit", "trajectory",
]  # fmt: skip
