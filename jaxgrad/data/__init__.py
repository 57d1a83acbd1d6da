"""Data: real sets that travel inside pip packages, a user's own file, and problems whose answer is known.

`load("diamonds")` or `load("prices.csv", target="price")` gives a `Dataset`: a `Batch` of float32 arrays,
cleaned and standardised, with the statistics that carry a prediction back and, in words, everything that
was done to the rows and columns. Nothing is downloaded but for the two sets that say so. `split` holds
rows out. `linear_problem` and `logistic_problem` make problems whose minimum and condition number are
known to rounding. `check_batch` refuses bad data, naming the row and the column.

| name | task | n x d | what it is good for |
|---|---|---|---|
| diamonds | regression (log price) | 53,772 x 9 | really ill-conditioned (κ = 3,364), R² 0.979 |
| randhie | regression (doctor visits) | 20,190 x 9 | well-conditioned (κ = 5.3), noise rules: R² 0.07 |
| diabetes | regression | 442 x 10 | the small classic |
| shuttle | binary, 7.15 % positive | 49,097 x 9 | heavy outliers, κ = 7,881 |
| randhie_any | binary, 68.8 % positive | 20,190 x 9 | not separable: a finite minimum near 0 |
| breast_cancer | binary, 62.7 % positive | 569 x 30 | nearly separable: the weights run away |
| digits | 10 classes | 1,797 x 61 | 8 x 8 images |
| mnist5k | 10 classes | 5,000 x 784 | 28 x 28 images |
| california_housing | regression | 20,640 x 8 | online: scikit-learn downloads it once |
| covtype | 7 classes | 581,012 x 52 | online: scikit-learn downloads it once |
"""

import os
from pathlib import Path
from typing import Annotated

from jaxgrad.checks import checked, path_or_name, shown, whole
from jaxgrad.data.checks import TASKS, check_batch, check_task
from jaxgrad.data.dataset import Dataset, split, to_dataset
from jaxgrad.data.files import MAX_LEVELS, SUFFIXES, read_file
from jaxgrad.data.problems import linear_problem, logistic_problem
from jaxgrad.data.sets import OFFLINE, SETS
from jaxgrad.data.words import nearest

__all__ = [
    "MAX_LEVELS",
    "NAMES",
    "OFFLINE",
    "SUFFIXES",
    "TASKS",
    "Dataset",
    "check_batch",
    "linear_problem",
    "load",
    "logistic_problem",
    "split",
]

NAMES = tuple(SETS)
"""The names of all sets; those not in `OFFLINE` are downloaded once by scikit-learn."""


@checked
def load(
    name_or_path: Annotated[str | os.PathLike[str], path_or_name],
    *,
    target: str | int | None = None,
    task: str | None = None,
    standardise: bool = True,
) -> Dataset:
    """A data set by name (see the module's table), or read from a user's own file.

    Files, told by their suffix:
    - `.csv`, `.tsv`, `.csv.gz`: with or without a header; `target` is a column's name or number (negative
      counts from the end). A column of text becomes one 0/1 column for each level but the first (in sorted
      order), up to `MAX_LEVELS` levels.
    - `.npz`: arrays `x` (or `X`) and `y`; `target` may name another array for `y`.
    - `.npy`: one table; `target` is the column's number.
    - `.svm`, `.svmlight`, `.libsvm`: `label index:value ...`, written out densely.

    The task of a file is read off its target, and can be forced with `task`: two distinct values are
    'binary' (the smaller is 0); text, or few distinct whole numbers, are 'classes'; the rest 'regression'.

    `standardise=True` brings each column to mean 0 and standard deviation 1 (dividing by n, so
    `XᵀX/n` is the correlation matrix), `y` too for regression, and drops constant columns. Images
    (`mnist5k`) are divided by 255 and centred instead: dividing by a border pixel's tiny deviation would
    turn a speck into the largest number of the data. `standardise=False` leaves numbers and columns as
    they are, but for the division by 255.

    Raises:
        ValueError: an unknown name (with the nearest ones), a target that is not there, a constant target,
            NaN, infinite or missing entries (with line or row, and column), too few rows, a file that is
            not what its suffix says, or that is not the one this release knows (sha256).
        FileNotFoundError: no such file (with the nearest names). IsADirectoryError: a folder.
        ModuleNotFoundError: the package that carries the set is not installed (with the command).
        ConnectionError: an online set that is neither cached nor can be downloaded.
    """
    if not isinstance(target, str | None):
        try:
            target = whole("target", target)
        except (TypeError, ValueError):
            raise ValueError(f"target is a column's name or number; got {shown(target)}") from None
    if task is not None:
        check_task(task)
    if isinstance(name_or_path, str) and name_or_path in SETS:
        if target is not None or task is not None:
            raise ValueError(f"target and task of {name_or_path!r} are fixed; leave target= and task= out")
        return to_dataset(SETS[name_or_path](), name_or_path, None, standardise)
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, str) and not _means_a_file(name_or_path):
        raise ValueError(
            f"no data set is called {name_or_path!r}{nearest(name_or_path, NAMES)}; there are "
            f"{', '.join(NAMES)}, or give the path of a file ({', '.join(SUFFIXES)})"
        )
    return to_dataset(read_file(path, target), path.name.split(".")[0], task, standardise)


def _means_a_file(text: str) -> bool:
    return text.lower().endswith(SUFFIXES) or "/" in text or os.sep in text or Path(text).is_file()
