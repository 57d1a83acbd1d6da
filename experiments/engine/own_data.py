"""A person's own file: what becomes of each of its columns, said before anything runs."""

import re
import warnings
from pathlib import Path

from experiments.engine import machine, report
from experiments.engine.arguments import Plan, Unusable
from experiments.engine.console import say
from jaxgrad import data
from jaxgrad.data import Column


def columns_of(plan: Plan) -> tuple[Column, ...]:
    """What becomes of each column of a person's own file, which is said before anything runs; () without one.

    Refuses, in the reader's words, a file that cannot be used.
    """
    file = plan.overrides.get("data")
    if file is None or not Path(file).expanduser().is_file():
        return ()
    if machine.stays_on_disk(file, plan.overrides.get("memory")):
        return ()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", data.Doubtful)  # the account says the same
            own = data.load(file, target=plan.overrides.get("target"), **(plan.overrides.get("options") or {}))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise Unusable(on_the_command_line(str(error))) from None
    say("\n".join(report.columns_text(own, Path(file).name)))
    return own.columns


def on_the_command_line(message: str) -> str:
    """A message of `data.load` with its keyword arguments as options of the command line."""
    message = message.replace("header=True", "--header yes").replace("header=False", "--header no")
    return re.sub(
        r"\b(target|task|decimal|thousands|drop|text)=(?=(\w|'|\")?)", lambda m: f"--{m[1]}{' ' * bool(m[2])}", message
    )
