"""The blocks of `experiments/derivations/pmean.md` on four virtual devices; prints the verdicts as JSON."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxgrad import Batch, parallel
from jaxgrad.check import check_gradient

parallel.start(devices=4)
with open(sys.argv[1], encoding="utf-8") as page:
    block = re.findall(r"```python\n(.*?)```", page.read(), re.S)[0]
lesson = {}
exec(block, lesson)
rng = np.random.default_rng(0)
batch = Batch(jnp.asarray(rng.normal(size=(12, 3))), jnp.asarray(rng.normal(size=12)))
params = {"w": jnp.asarray(rng.normal(size=3))}
true = jax.grad(lesson["loss"])(params, batch)["w"]
out = {}
for name in ("gradient", "divided", "varying"):
    ratio = np.asarray(lesson[name](params, batch)["w"]) / np.asarray(true)
    try:
        report = str(check_gradient(lesson["loss"], lesson[name], params, batch))
    except Exception as error:
        report = f"{type(error).__name__}: {error}"
    out[name] = {"ratio": ratio.tolist(), "report": report}
print(json.dumps(out))
