"""The study: one file per claim or figure, each with `Config`, `QUICK`, `run`, `claims` and `draw`.

`python -m experiments` runs it, `python -m experiments report` draws it again from the saved numbers. Nothing
is imported here, so that a command line can be read and refused before JAX is loaded.
"""
