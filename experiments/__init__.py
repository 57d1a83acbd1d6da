"""The study: one file per claim or figure of the lecture.

Each experiment is a module beside this one that defines

    Config, QUICK          a frozen dataclass, whose defaults are the full size, and a small instance of it
    PUBLISHED              what kind of number each of its numbers is: a dict of kinds by name (see below)
    run(config, progress)  measure: a flat dict of arrays and plain values, the *numbers*
    claims(numbers)        what they confirm or refute: a list of `results.Claim`
    draw(numbers)          the figure
    report(numbers)        optional: Markdown for under the figure, with tables and numbers
    headline(numbers)      optional: one Markdown bullet for the front page
    TIMED = True           where seconds are measured, in `work.alone()`: no two such experiments run together

`claims`, `draw`, `report` and `headline` get the numbers as they were saved, so that nothing which is
published can disagree with the saved data. A new experiment is a new file: nothing else lists it.

`PUBLISHED` tells `python -m experiments verify` what a re-run may change. Its keys are names of numbers, with `*` for
anything, and `name[1]` for a column (along the last axis); the first that fits decides, and one must fit. Its values:

    "exact"                                 the same to the last bit: settings, counts, words
    "exact, same jax"                       the same where JAX is: what its compiler counts
    "machine"                               what a machine is and has installed, and who won a race on it
    "rounding"                              computed in floating point without drawing anything, or the same each time
    "rounding, chosen by SCORES of OPTIONS" the option with the lowest score, which rounding may decide at a tie
    "rounding, found to SHARE"              what a search ends with, which may be off by that share of it
    "rounding, off by KEY"                  what may be off by the number KEY, worked out with it: an error that its
                                            condition explains, a jump where a residual is on the other side of 0
    "error, unit UNIT"                      an error of rounding: UNIT, a number or the name of one, is what it is
                                            measured in
    "count"                                 how many cases pass a threshold, each of which rounding may move across
    "chaotic, axis K"                       late steps, along axis K, of runs that may wander, or stand still but for
                                            rounding
    "statistical, axis K"                   one entry along axis K for each seed
    "statistical, error KEY"                a mean whose standard error is the number KEY
    "statistical, deviation KEY"            a mean over the seeds, which scatter by KEY
    "statistical, count of KEY"             how many of KEY runs
    "statistical"                           of random numbers, with no interval of its own: a path, an error bar
    "timing"                                seconds
    "timing, ratio"                         seconds over seconds of the same run

A `*` in KEY, SCORES, OPTIONS and UNIT stands for what it stood for in the name.

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
