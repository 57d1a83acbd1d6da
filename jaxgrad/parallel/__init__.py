"""The same step on many devices and many hosts: rows are sharded, parameters replicated, and the step does not change.

    parallel.start()                            # under srun, mpirun, `python -m jaxgrad.launch`; alone: does nothing
    data = parallel.shard(batch, parallel.mesh())
    descend(loss, params, data, ...)            # what was written for one core

The engine is JAX's own: `jax.distributed` between processes, a `NamedSharding` of the rows, and the compiler, which
puts one all-reduce of the gradient into the step. Nothing else is exchanged, except the rows of a batch:

    global       the indices of one machine: `distinct(b)` and the rest see the same examples, in the same order,
                 whatever holds them. The same law and the same numbers; the batch's b rows travel.
    stratified   `stratified(b, counts)`: each device draws from its own rows, and nothing travels but the gradient.
                 Another law: the mean is the same, and the variance is only the part *within* the shares
                 (`jaxgrad.noise.stratified_trace`).

If the rows do not divide by the devices, they are padded with copies of a row, of weight 0. Every device gets ⌊n/D⌋ or
⌈n/D⌉ rows of its own.

A step hangs if its processes disagree about anything. So they compare their arguments before the first step
(`agree`) and decide together when to stop (`Interruption`). A process that fails ends at once without waiting for the
others (`run`); they then end too.

agreement     what processes say to each other beside the step
ending        how the program of a process ends
interruption  SIGTERM and Ctrl-C, heard by all at the same step
processes     how processes find each other (`start`)
sharding      rows on the devices of a mesh
shares        the stratified law
weighting     the loss and the law of one machine, over padded rows
"""

from jaxgrad.parallel.agreement import Elsewhere, agree, digest, from_main, is_main, of_main, together
from jaxgrad.parallel.ending import AGAIN, EARLY, PEER_LOST, run
from jaxgrad.parallel.interruption import Interruption, Preempted
from jaxgrad.parallel.processes import (
    COORDINATOR,
    DEVICES,
    HEARTBEAT,
    PROCESSES,
    RANK,
    TIMEOUT,
    Place,
    start,
)
from jaxgrad.parallel.sharding import (
    Sharded,
    Weighted,
    check_mesh,
    gather,
    mesh,
    mesh_of,
    replicate,
    shard,
    shard_local,
)
from jaxgrad.parallel.shares import shares_of, stratified
from jaxgrad.parallel.weighting import Weighting, on

__all__ = [
    "AGAIN", "COORDINATOR", "DEVICES", "EARLY", "HEARTBEAT", "PEER_LOST", "PROCESSES", "RANK", "TIMEOUT", "Elsewhere",
    "Interruption", "Place", "Preempted", "Sharded", "Weighted", "Weighting", "agree", "check_mesh", "digest",
    "from_main", "gather", "is_main", "mesh", "mesh_of", "of_main", "on", "replicate", "run", "shard", "shard_local",
    "shares_of", "start", "stratified", "together",
]  # fmt: skip
