"""The study: every file here is a claim or a figure of the lecture.

    *.py               a study each; another one is another file
    engine/            what runs the studies, keeps, compares and shows their numbers. Start at `commands.py`: it reads
                       as what each command does. `session.py`: what a study is given. `kinds.py`: what a re-run may
                       change. `tolerance.py`: by how much. `page/`: the report as a page
    support/           what several studies share: exact draws and starts, data, the contenders of the race
    recorded/          runs too heavy for the study, each a command of its own, and their tables
    derivations/       files to check: `python -m jaxgrad.check experiments/derivations/logistic_regression.py`

How a study walks. `Config` -> `run(config, session)` -> *numbers*, a flat dict of arrays and plain values -> saved in
`results/` with the code, versions and machine that made them -> `claims`, `draw`, `report` and `headline`. These see
only what was saved, so that nothing that is published can disagree with it.

A study defines

    Config, QUICK          a frozen dataclass, whose defaults are the full size, and a small instance of it
    NUMBERS                what kind of number each of its numbers is, by name: `EXACT`, `ROUNDING`, `Runs(axis=0)`, ...
                           (`engine/kinds.py`). `verify` needs it to know what a re-run may change
    run(config, session)   measure: the numbers. `session.say` tells what is being done, `session.alone` keeps the
                           others still while something is timed, `session.keep` and `session.checkpoint` save what
                           there is until the study is done (`engine/session.py`)
    claims(numbers)        what they confirm or refute: a list of `results.Claim`
    draw(numbers)          the figure
    report(numbers)        optional: Markdown for under the figure, with tables and numbers
    headline(numbers)      optional: one Markdown bullet for the front page
    TIMED = True           where it measures seconds: no two such studies run together
    IN_PARALLEL = True     where it can spread over several processes and devices, and save itself as it goes

and ends with the lines that make `python experiments/<study>.py` run it. Nothing else lists a study but `ORDER`, the
order in which they are told.

Who may import whom. A study imports `jaxgrad`, of `engine` only `session`, `kinds`, `results`, `plots` and `machine`,
and `support`; never another study. `engine` names no study. Every late import counts (`tests/test_imports.py`).

What a study begins with, grids, draws and starts, comes from `experiments.support.exact`. It is the same to the last
bit on every machine. Whatever differs in a re-run was therefore computed differently.

Recording. Committed results name the code that made them, module by module. Code may move on without a new recording
for as long as `verify` shows that nothing moved; no test fails because code is newer than results. A new recording is
made when a study, a bar, or a number that hangs on the machine changes: of all experiments that the change concerns,
once, by one version of the code, and published whatever it shows. After it, `spread` at both sizes and `power --quick`
measure what the verdicts of `verify` on the new numbers are worth.

Nothing heavy is imported here: a command line is read, and refused, before JAX is loaded.
"""

import sys

if sys.argv[:1] == ["-m"]:  # `python -m experiments` begins here: from now on a Ctrl-C is one line
    from jaxgrad import commandline

    commandline.prepare()

ORDER = (
    "formulas", "descent_paths", "gd_vs_sgd", "learning_rate", "step_cost", "gradient_noise", "expected_path",
    "speed_of_convergence", "samplings", "escape", "no_guarantee", "conditioning", "stopping", "losses",
    "backprop_cost", "speed", "scaling", "detection",
)  # fmt: skip
"""The order in which the study is told; experiments that are not named here follow by name."""
