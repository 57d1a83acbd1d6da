"""Who races in `speed`: the same descent written the way each library's users write it, a process for each.

    python -m experiments.support.contenders NAME DEVICE FOLDER

is such a process. It reads one JSON request a line and answers each with one line: `{"prepare": case}` compiles what a
case needs, `{"choose": true, "min_seconds": t}` finds the fastest way, `{"round": k}` times it once, and it ends with
its input. The data of the cases lie in FOLDER. One process for each library, because in one process their thread
pools slow each other down several times.

A contender is a function `(case, x, y, device) -> [Entrant]`. Where there are several usual ways to write it, all are
tried on each case and the fastest races. All do the same: plain descent on the mean loss with a constant step
size, float32, a new random order of the examples each pass (drawn in the time that counts), incomplete batches dropped.
"""

import json
import math
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.support.exact import normal

HIDDEN = 128
"""Hidden units of the two-layer net."""


class Case(NamedTuple):
    """One race."""

    problem: str
    """`linear` (squared loss), `logistic` (logloss) or `two-layer` (sigmoid units, one output, squared loss)."""
    data: str
    n: int
    d: int
    b: int
    """0 is the full batch."""
    eta: float
    steps: int
    """Steps of the run whose final loss everybody's is compared with."""


class Entrant(NamedTuple):
    """One way to run a case, ready to go."""

    run: Callable[[int], float]
    """Take so many more steps and wait for them: the seconds that took."""
    params: Callable[[], list[Any]] | None
    """The parameters now: `w, b` or `W1, b1, W2, b2`; None where there are none."""
    restart: Callable[[], None]
    """Back to the first point."""
    unit: int = 1
    """It can only take multiples of so many steps."""
    way: str = ""
    """What tells it from the other ways of the same contender."""


class Absent(Exception):
    """The contender cannot take part; the message says why and, where it can be mended, how."""


def first_point(case: Case) -> list[np.ndarray]:
    """Where everybody starts: zeros, or for the net the same random weights."""
    if case.problem != "two-layer":
        return [np.zeros(case.d, np.float32), np.zeros((), np.float32)]
    rng = np.random.default_rng(1)
    W1 = normal(rng, (case.d, HIDDEN), dtype=np.float32) / np.float32(math.sqrt(case.d))
    W2 = normal(rng, (HIDDEN, 1), dtype=np.float32) / np.float32(math.sqrt(HIDDEN))
    return [W1, np.zeros(HIDDEN, np.float32), W2, np.zeros(1, np.float32)]


def full_loss(case: Case, params: list[Any], x: np.ndarray, y: np.ndarray, block: int = 1 << 16) -> float:
    """The mean loss over all the data in float64, by NumPy for everybody alike."""
    start = first_point(case)
    params = [np.asarray(leaf, np.float64).reshape(first.shape) for leaf, first in zip(params, start, strict=True)]
    total = 0.0
    for i in range(0, len(y), block):
        rows, target = x[i : i + block].astype(np.float64), y[i : i + block].astype(np.float64)
        if case.problem == "two-layer":
            W1, b1, W2, b2 = params
            prediction = (_sigmoid(rows @ W1 + b1) @ W2 + b2)[:, 0]
        else:
            prediction = rows @ params[0] + params[1]
        if case.problem == "logistic":
            total += float(np.logaddexp(0, (1 - 2 * target) * prediction).sum())
        else:
            total += float(((target - prediction) ** 2).sum())
    return total / len(y)


def target_of(case: Case) -> str:
    """Which targets of its data a case uses."""
    return "labels" if case.problem == "logistic" else "numbers"


def operations(case: Case) -> int:
    """Additions and multiplications of one step, in its products of matrices: forward, and back to the parameters."""
    rows = case.b or case.n
    if case.problem == "two-layer":
        # The first product and its transpose; the second, its transpose, and what goes back through it.
        return 4 * rows * case.d * HIDDEN + 6 * rows * HIDDEN
    return 4 * rows * case.d


def bytes_moved(case: Case) -> int:
    """Bytes of data that one step must read: its examples and their targets. The parameters can stay in the core."""
    return 4 * (case.b or case.n) * (case.d + 1)


# --- the contenders ----------------------------------------------------------------------------------------------


def ours(case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """`jaxgrad.descend`, timed by its own clock: the steps, without compiling and recording."""
    import jax

    from jaxgrad import Batch, descend, full_batch, losses, models, reshuffled
    from jaxgrad.types import Linear, TwoLayer

    model = {"two-layer": models.two_layer}.get(case.problem, models.linear)
    loss = losses.mean_loss(model, losses.logloss if case.problem == "logistic" else losses.squared)
    data = jax.device_put(Batch(x, y[:, None] if case.problem == "two-layer" else y))
    W1, b1, *rest = map(jax.numpy.asarray, first_point(case))
    start = TwoLayer(W1, rest[0], b1, rest[1]) if rest else Linear(W1, b1)
    sampling = reshuffled(case.b) if case.b else full_batch()
    state: list[Any] = [start]

    def run(steps: int) -> float:
        until = steps + (0 if state[0] is start else int(state[0].step))
        trace = descend(
            loss,
            state[0],
            data,
            optimizer=case.eta,
            sampling=sampling,
            steps=until,
            record=[until],
            key=jax.random.key(0),
        )
        state[0] = trace.state
        return float(trace.seconds[-1])

    def params() -> list[Any]:
        w = state[0].params
        return [w.W1, w.b1, w.W2, w.b2] if rest else list(w)

    return [Entrant(run, params, lambda: state.__setitem__(0, start))]


def numpy_loop(case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """Derivatives by hand; a batch is rows of the data by their index, or a slice of the data shuffled each pass."""
    slope = np.float32((1 if case.problem == "logistic" else 2) * case.eta / (case.b or case.n))
    w: list[Any] = []

    def restart() -> None:
        w[:] = [leaf.copy() for leaf in first_point(case)]

    def shallow(rows: Any, target: Any) -> None:
        error = rows @ w[0] + w[1]
        if case.problem == "logistic":
            error = _sigmoid(error)
        error = slope * (error - target)
        w[0] -= error @ rows
        w[1] -= error.sum()

    def net(rows: Any, target: Any) -> None:
        W1, b1, W2, b2 = w
        hidden = _sigmoid(rows @ W1 + b1)
        error = slope * (hidden @ W2 + b2 - target[:, None])
        back = error * W2[:, 0] * (hidden * (1 - hidden))
        W2 -= hidden.T @ error
        b2 -= error.sum(0)
        W1 -= rows.T @ back
        b1 -= back.sum(0)

    def one(row: Any, target: Any) -> None:
        """A batch of one row, without the matrices."""
        error = row @ w[0] + w[1]
        if case.problem == "logistic":
            error = 1 / (1 + math.exp(-error))
        error = slope * (error - target)
        w[0] -= error * row
        w[1] -= error

    step = net if case.problem == "two-layer" else shallow
    rng = np.random.default_rng(0)

    def indexed() -> Iterator[tuple[Any, Any]]:
        while True:
            for rows in _batches(rng.permutation(case.n), case.b):
                yield x[rows], y[rows]

    def shuffled() -> Iterator[tuple[Any, Any]]:
        while True:
            order = rng.permutation(case.n)
            yield from zip(_batches(x[order], case.b), _batches(y[order], case.b), strict=True)

    def shuffled_rows() -> Iterator[tuple[Any, Any]]:
        while True:
            order = rng.permutation(case.n)
            yield from zip(x[order], y[order], strict=True)

    def every() -> Iterator[tuple[Any, Any]]:
        while True:
            yield x, y

    def entrant(feed: Callable[[], Iterator[Any]], step: Callable[[Any, Any], None], way: str) -> Entrant:
        batches = feed()

        def run(steps: int) -> float:
            start = time.perf_counter()
            for _, batch in zip(range(steps), batches, strict=False):
                step(*batch)
            return time.perf_counter() - start

        return Entrant(run, lambda: w, restart, way=way)

    restart()
    if not case.b:
        return [entrant(every, step, "")]
    ways = [entrant(indexed, step, "rows indexed each step"), entrant(shuffled, step, "data shuffled each pass")]
    if case.b == 1 and case.problem != "two-layer":
        ways.append(entrant(shuffled_rows, one, "row by row, data shuffled each pass"))
    return ways


def sklearn_sgd(case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """`SGDRegressor` or `SGDClassifier`, the compiled loop of scikit-learn: b = 1, a constant step size, no penalty."""
    linear_model = _imported("sklearn.linear_model", "scikit-learn")
    fitted: list[Any] = []
    plain = {"penalty": None, "learning_rate": "constant", "tol": None, "shuffle": True, "random_state": 0}
    # Its squared error is half of ours.
    make = (
        partial(linear_model.SGDClassifier, loss="log_loss", eta0=case.eta, **plain)
        if case.problem == "logistic"
        else partial(linear_model.SGDRegressor, loss="squared_error", eta0=2 * case.eta, **plain)
    )

    rng = np.random.default_rng(0)

    def run(steps: int) -> float:
        # It knows whole passes only. A part of one is a pass over so many examples, chosen at random.
        rows = slice(None) if steps % case.n == 0 else rng.permutation(case.n)[:steps]
        model = make(max_iter=max(1, steps // case.n))
        some_x, some_y = x[rows], y[rows]
        start = time.perf_counter()
        model.fit(some_x, some_y)
        seconds = time.perf_counter() - start
        fitted[:] = [model.coef_.ravel(), model.intercept_]
        return seconds

    # Each fit begins at zero.
    return [Entrant(run, lambda: fitted, fitted.clear, unit=case.n)]


def torch_eager(case: Case, x: Any, y: Any, device: str, way: str = "eager") -> list[Entrant]:
    """PyTorch: plain tensors and autograd, or (`compiled`, `graph`) a whole step as one program; 1 and 2 threads."""
    torch = _imported("torch", "torch")
    if way == "compiled" and device == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        raise Absent("torch.compile needs a C++ compiler on the CPU, and there is no g++ or clang++")
    place = torch.device("cuda" if device == "gpu" else "cpu")
    if device == "gpu" and not torch.cuda.is_available():
        raise Absent("this PyTorch sees no GPU")
    # Against a JAX whose products of matrices are exact to float32.
    torch.set_float32_matmul_precision("highest")
    data, target = (torch.as_tensor(leaf, device=place) for leaf in (x, y))
    eta, net, n = case.eta, case.problem == "two-layer", case.n
    w: list[Any] = []

    def loss(params: Any, rows: Any, target: Any) -> Any:
        if net:
            W1, b1, W2, b2 = params
            return ((torch.sigmoid(rows @ W1 + b1) @ W2 + b2)[:, 0] - target).square().mean()
        prediction = rows @ params[0] + params[1]
        if case.problem == "logistic":
            return torch.nn.functional.binary_cross_entropy_with_logits(prediction, target)
        return (prediction - target).square().mean()

    def restart() -> None:
        w[:] = [torch.tensor(leaf, device=place, requires_grad=way == "eager") for leaf in first_point(case)]

    def eager(rows: Any, target: Any) -> None:
        gradient = torch.autograd.grad(loss(w, rows, target), w)
        with torch.no_grad():
            for leaf, slope in zip(w, gradient, strict=True):
                leaf.sub_(slope, alpha=eta)

    def whole(params: Any, rows: Any, target: Any) -> Any:
        gradient = torch.func.grad(loss)(params, rows, target)
        return tuple(leaf - eta * slope for leaf, slope in zip(params, gradient, strict=True))

    if way == "compiled":
        whole = torch.compile(whole, dynamic=False)

    def compiled(rows: Any, target: Any) -> None:
        w[:] = whole(tuple(w), rows, target)

    restart()
    step = eager if way == "eager" else compiled
    chosen: list[Any] = [None]  # the rows of the graph's batch
    graph = None
    if way == "graph":
        chosen[0] = torch.arange(case.b or n, device=place)

        def in_place() -> None:
            batch = (data[chosen[0]], target[chosen[0]]) if case.b else (data, target)
            for leaf, new in zip(w, whole(tuple(w), *batch), strict=True):
                leaf.copy_(new)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                in_place()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            in_place()

        def restart() -> None:
            for leaf, start in zip(w, first_point(case), strict=True):
                leaf.copy_(torch.as_tensor(start))

        restart()

    def orders() -> Iterator[Any]:
        while True:
            order = torch.randperm(n, device=place)
            yield from (order[i : i + case.b] for i in range(0, n - case.b + 1, case.b))

    def entrant(threads: int) -> Entrant:
        batches = orders() if case.b else None

        def run(steps: int) -> float:
            torch.set_num_threads(threads)
            start = time.perf_counter()
            for _ in range(steps):
                rows = next(batches) if batches else None
                if graph is not None:
                    if rows is not None:
                        chosen[0].copy_(rows)
                    graph.replay()
                elif rows is None:
                    step(data, target)
                else:
                    step(data[rows], target[rows])
            if device == "gpu":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        return Entrant(run, lambda: [leaf.detach().cpu().numpy() for leaf in w], restart, way=f"threads: {threads}")

    threads = sorted({1, os.cpu_count() or 1}) if device == "cpu" else [1]
    return [entrant(count) for count in threads]


def optax_loop(case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """What most people write in JAX: a jitted step over an optax optimiser, called from a Python loop."""
    import jax
    import jax.numpy as jnp
    import optax

    optimizer = optax.sgd(case.eta)
    loss = _jax_loss(case)
    data, target = jax.device_put((x, y))
    kept: list[Any] = []

    @jax.jit
    def step(params: Any, state: Any, rows: Any, target: Any) -> Any:
        updates, state = optimizer.update(jax.grad(loss)(params, rows, target), state)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def step_at(params: Any, state: Any, rows: Any, data: Any, target: Any) -> Any:
        return step(params, state, data[rows], target[rows])

    def restart() -> None:
        params = [jnp.asarray(leaf) for leaf in first_point(case)]
        kept[:] = [params, optimizer.init(params)]

    rng = np.random.default_rng(0)

    def orders() -> Iterator[Any]:
        while True:
            yield from _batches(rng.permutation(case.n), case.b)

    def entrant(way: str, take: Callable[[Any, Any, Any], Any]) -> Entrant:
        batches = orders() if case.b else None

        def run(steps: int) -> float:
            start = time.perf_counter()
            params, state = kept
            for _ in range(steps):
                params, state = take(params, state, next(batches) if batches else None)
            kept[:] = jax.block_until_ready((params, state))
            return time.perf_counter() - start

        return Entrant(run, lambda: kept[0], restart, way=way)

    restart()
    if not case.b:
        return [entrant("", lambda params, state, _: step(params, state, data, target))]
    return [
        entrant("a NumPy batch passed to the step", lambda params, state, rows: step(params, state, x[rows], y[rows])),
        entrant("indices passed to the step", lambda params, state, rows: step_at(params, state, rows, data, target)),
    ]


def optimistix_gd(case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """`optimistix.GradientDescent`, full batch, all steps in one compiled call."""
    optimistix = _imported("optimistix", "optimistix")
    import jax
    import jax.numpy as jnp

    loss = _jax_loss(case)
    solver = optimistix.GradientDescent(learning_rate=case.eta, rtol=0.0, atol=0.0)
    kept: list[Any] = []

    @jax.jit
    def solve(params: Any, batch: Any) -> Any:
        def objective(params: Any, batch: Any) -> Any:
            return loss(params, *batch)

        return optimistix.minimise(objective, solver, params, args=batch, max_steps=case.steps + 1, throw=False).value

    # Its first step only evaluates.
    batch = jax.device_put((x, y))

    def restart() -> None:
        kept[:] = [[jnp.asarray(leaf) for leaf in first_point(case)]]

    def run(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps // case.steps):
            kept[:] = [solve(kept[0], batch)]
        jax.block_until_ready(kept)
        return time.perf_counter() - start

    restart()
    return [Entrant(run, lambda: kept[0], restart, unit=case.steps)]


def floor(case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """Not a contender: a pass that only reads the data of the case, by whatever does that fastest. A step is a pass."""
    import jax
    import jax.numpy as jnp

    flat = x.reshape(-1)
    ways: dict[str, Callable[[], Any]] = {}
    on_device, add = jax.device_put(flat), jax.jit(jnp.sum)
    ways["sum by XLA"] = lambda: add(on_device)
    if device == "cpu":
        from concurrent.futures import ThreadPoolExecutor

        cores = os.cpu_count() or 1
        parts = np.array_split(flat, cores)
        pool = ThreadPoolExecutor(cores)
        rows, ones = x.reshape(case.n, -1), np.ones(case.d, np.float32)
        ways["dot product by NumPy"] = lambda: flat @ flat
        ways["matrix times vector by NumPy"] = lambda: rows @ ones
        ways["dot products by NumPy, a thread a core"] = lambda: list(pool.map(lambda part: part @ part, parts))

    def entrant(way: str, read: Callable[[], Any]) -> Entrant:
        def run(steps: int) -> float:
            start = time.perf_counter()
            for _ in range(steps):
                jax.block_until_ready(read())
            return time.perf_counter() - start

        return Entrant(run, None, lambda: None, way=way)

    return [entrant(way, read) for way, read in ways.items()]


def peak(size: int = 1024, rounds: int = 7) -> float:
    """Operations per second of a square product of matrices in float32: the best of NumPy and XLA, all cores."""
    import jax
    import jax.numpy as jnp

    a = np.ones((size, size), np.float32)
    on_device, product = jnp.asarray(a), jax.jit(jnp.matmul)
    best = math.inf
    for multiply in (lambda: a @ a, lambda: jax.block_until_ready(product(on_device, on_device))):
        for _ in range(rounds):
            start = time.perf_counter()
            multiply()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


CONTENDERS: dict[str, Callable[[Case, Any, Any, str], list[Entrant]]] = {
    "jaxgrad": ours,
    "scikit-learn": sklearn_sgd,
    "NumPy loop": numpy_loop,
    "PyTorch eager": torch_eager,
    "torch.compile": partial(torch_eager, way="compiled"),
    "PyTorch CUDA graph": partial(torch_eager, way="graph"),
    "optax loop": optax_loop,
    "optimistix": optimistix_gd,
    "floor": floor,
}


PACKAGES = {
    "scikit-learn": "scikit-learn",
    "NumPy loop": "numpy",
    "PyTorch eager": "torch",
    "optax loop": "optax",
    "optimistix": "optimistix",
}
"""Where the contenders come from."""


def takes(name: str, case: Case, device: str) -> bool:
    """Whether that contender runs such a case."""
    if device == "gpu":
        return name in ("jaxgrad", "PyTorch eager", "PyTorch CUDA graph", "floor")
    return {
        "scikit-learn": case.b == 1 and case.problem != "two-layer",
        "PyTorch CUDA graph": False,
        "optimistix": not case.b,
    }.get(name, True)


def _jax_loss(case: Case) -> Callable[..., Any]:
    """The loss on arrays, as a person writes it in JAX."""
    import jax
    import jax.numpy as jnp
    import optax

    def loss(params: Any, rows: Any, target: Any) -> Any:
        if case.problem == "two-layer":
            W1, b1, W2, b2 = params
            return jnp.mean(((jax.nn.sigmoid(rows @ W1 + b1) @ W2 + b2)[:, 0] - target) ** 2)
        prediction = rows @ params[0] + params[1]
        if case.problem == "logistic":
            return jnp.mean(optax.sigmoid_binary_cross_entropy(prediction, target))
        return jnp.mean((prediction - target) ** 2)

    return loss


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def _batches(rows: Any, b: int) -> Iterator[Any]:
    return (rows[i : i + b] for i in range(0, len(rows) - b + 1, b))


def _imported(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise Absent(f'{package} is not installed: python -m pip install -e ".[study,peers]"') from error


# --- the process ---------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """How a contender will run a case."""

    entrant: Entrant
    steps: int
    """Steps in a round."""
    loss: float
    """The full loss after `case.steps` steps."""


def prepare(name: str, case: Case, x: Any, y: Any, device: str) -> list[Entrant]:
    """The contender's ways to run the case, each called once, which compiles and loads whatever it needs."""
    entrants = CONTENDERS[name](case, x, y, device)
    for entrant in entrants:
        entrant.run(entrant.unit)
    return entrants


def choose(entrants: list[Entrant], case: Case, x: Any, y: Any, min_seconds: float) -> Chosen:
    """The fastest way, the number of steps that last `min_seconds`, and where the run that is compared ends."""
    for entrant in entrants:
        entrant.run(2 * entrant.unit)  # the first call was not like the others
    found = [(entrant, *_enough(entrant, min_seconds)) for entrant in entrants]
    best, steps, _ = min(found, key=lambda one: one[2])
    best.restart()
    if best.params is None:
        return Chosen(best, steps, math.nan)
    best.run(case.steps)
    return Chosen(best, steps, full_loss(case, best.params(), x, y))


def _enough(entrant: Entrant, min_seconds: float) -> tuple[int, float]:
    """How many steps last `min_seconds`, in whole units, and the seconds that each took."""
    steps = entrant.unit
    # Twice in a row: a hiccup of the machine is not the time that steps take.
    while (seconds := entrant.run(steps)) < min_seconds or (seconds := min(seconds, entrant.run(steps))) < min_seconds:
        grown = steps * min(10.0, max(1.5, 1.2 * min_seconds / max(seconds, 1e-9)))
        steps = math.ceil(grown / entrant.unit) * entrant.unit
    return steps, seconds / steps


def serve(name: str, device: str, folder: Path) -> None:
    """Answer requests, a line each, until there are no more."""
    # What libraries print must not get between the answers.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    if name in ("jaxgrad", "optax loop", "optimistix", "floor"):
        import jax

        jax.config.update("jax_default_matmul_precision", "highest")
        if device == "cpu":
            jax.config.update("jax_platforms", "cpu")
    entrants: list[Entrant] = []
    entrant, steps, loaded = None, 0, {}
    case = x = y = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "prepare" in request:
                entrants, entrant, case = [], None, Case(*request["prepare"])
                files = f"{case.data}.x", f"{case.data}.{target_of(case)}"
                if files not in loaded:
                    x = y = None
                    loaded = {}  # one at a time in memory
                    loaded[files] = tuple(np.load(folder / f"{file}.npy") for file in files)
                x, y = loaded[files]
                began = time.perf_counter()
                entrants = prepare(name, case, x, y, device)
                answer: dict[str, Any] = {"first_call": time.perf_counter() - began}
            elif "choose" in request:
                assert case is not None, "no case was prepared"
                entrant, steps, loss = choose(entrants, case, x, y, request["min_seconds"])
                answer = {"way": entrant.way, "loss": loss}
            elif "peak" in request:
                answer = {"peak": peak()}
            else:
                assert entrant is not None, "no way was chosen"
                answer = {"seconds": entrant.run(steps) / steps}
        except Absent as error:
            answer = {"absent": str(error)}
        except Exception as error:
            answer = {"failed": traceback.format_exception_only(error)[-1].strip()}
        answers.write(json.dumps(answer) + "\n")
    # Whoever asked would have ended this process, and is gone itself: the data are of use to nobody.
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
