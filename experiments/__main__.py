"""`python -m experiments`: run the study, list it, draw it again from saved data, or verify that a re-run agrees."""

from experiments.engine import commands

if __name__ == "__main__":
    from jaxgrad import commandline

    commands.leave(commandline.outcome(commands.main))
