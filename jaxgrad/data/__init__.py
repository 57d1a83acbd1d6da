"""Data: real sets that travel inside pip packages, a user's own file, and problems whose answer is known.

`load("diamonds")` or `load("prices.csv", target="price")` gives a `Dataset`: a `Batch` of float32 arrays,
cleaned and standardised, with the statistics that carry a prediction back and, in words, everything that
was done to the rows and columns. Nothing is downloaded but for the two sets that say so. `split` holds
rows out, `sample` draws some. `linear_problem` and `logistic_problem` make problems whose minimum and
condition number are known to rounding. `check_batch` refuses bad data, naming the row and the column.

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
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from jaxgrad.checks import checked, path_or_name, shown, whole
from jaxgrad.data.checks import TASKS, check_batch, check_task
from jaxgrad.data.dataset import Column, Dataset, Doubtful, are_classes, sample, split, to_dataset
from jaxgrad.data.files import SUFFIXES, read_file
from jaxgrad.data.problems import linear_problem, logistic_problem
from jaxgrad.data.sets import OFFLINE, SETS
from jaxgrad.data.tables import MAX_LEVELS, Reading
from jaxgrad.data.words import nearest

__all__ = [
    "MAX_LEVELS",
    "NAMES",
    "OFFLINE",
    "SUFFIXES",
    "TASKS",
    "Column",
    "Dataset",
    "Doubtful",
    "are_classes",
    "check_batch",
    "linear_problem",
    "load",
    "logistic_problem",
    "sample",
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
    decimal: str | None = None,
    thousands: str | None = None,
    header: bool | None = None,
    drop: Sequence[str | int] = (),
    text: Sequence[str | int] = (),
) -> Dataset:
    """A data set by name (see the module's table), or read from a user's own file.

    Files, told by their suffix:
    - `.csv`, `.tsv` (also `.gz`), `.txt`, `.data`: with or without a header; `target` is a column's name or number
      (negative counts from the end). Cells are separated by commas, semicolons, tabs, bars or blanks. A column of
      text becomes one 0/1 column for each level but the first (in sorted order), up to `MAX_LEVELS` levels. Whatever
      is not all plain numbers is read by pandas.
    - `.npz`: arrays `x` (or `X`) and `y`; `target` may name another array for `y`.
    - `.npy`: one table; `target` is the column's number.
    - `.svm`, `.svmlight`, `.libsvm`: `label index:value ...`, written out densely.

    `Dataset.columns` accounts for every column of a file. Row names, row numbers without a name and identifiers are
    left out. `10.65%`, `$1,200` and `2,5` are numbers. A sign with two readings, such as the comma of `1,037`, is
    settled by the other cells of the file, or refused. For CSV files a person can say what the file does not tell:
    - `decimal`, `thousands`: the signs in its numbers, '.' or ','. Without them they are told from all cells.
    - `header`: whether the first row is one. Without it, that is told from what is in it and below.
    - `drop`: columns to leave out, by name or number.
    - `text`: columns whose cells are words whatever they look like: codes, or `NA` where that is a value.

    The task of a file is read off its target, and can be forced with `task`: two distinct values are
    'binary' (the smaller is 0); text, or few distinct whole numbers, are 'classes'; the rest 'regression'.

    `standardise=True` brings each column to mean 0 and standard deviation 1 (dividing by n, so
    `XᵀX/n` is the correlation matrix), `y` too for regression, and drops constant columns. Images
    (`mnist5k`) are divided by 255 and centred instead: dividing by a border pixel's tiny deviation would
    turn a speck into the largest number of the data. `standardise=False` leaves numbers and columns as
    they are, but for the division by 255.

    Raises:
        ValueError: an unknown name (with the nearest ones), a target that is not there, a constant target,
            NaN, infinite or missing entries (with line or row, and column), numbers mixed with text, dates, a
            sign with two readings, a first row that may be a header, too few rows, a file that is
            not what its suffix says, or that is not the one this release knows (sha256).
        FileNotFoundError: no such file (with the nearest names). IsADirectoryError: a folder.
        ModuleNotFoundError: the package that carries the set is not installed (with the command).
        ConnectionError: an online set that is neither cached nor can be downloaded.

    Warns:
        Doubtful: a column of a CSV file of at least 8 rows that gives the target away, counts the rows, is a
            different whole number in each, or is collinear with others; as many features as rows.
    """
    reading = Reading(decimal, thousands, header, _names(drop, "drop"), _names(text, "text"))
    reading.check()
    if not isinstance(target, str | None):
        try:
            target = whole("target", target)
        except (TypeError, ValueError):
            raise ValueError(f"target is a column's name or number; got {shown(target)}") from None
    if task is not None:
        check_task(task)
    if isinstance(name_or_path, str) and name_or_path in SETS:
        if given := reading.given():
            raise ValueError(f"{' and '.join(given)} can only be given for CSV files, not for {name_or_path!r}")
        if target is not None or task is not None:
            raise ValueError(f"target and task of {name_or_path!r} are fixed; leave target= and task= out")
        return to_dataset(SETS[name_or_path](), name_or_path, None, standardise)
    path = Path(name_or_path).expanduser()
    if isinstance(name_or_path, str) and not _means_a_file(name_or_path):
        raise ValueError(
            f"no data set is called {name_or_path!r}{nearest(name_or_path, NAMES)}; there are "
            f"{', '.join(NAMES)}, or give the path of a file ({', '.join(SUFFIXES)})"
        )
    table = read_file(path, target, reading)
    dataset = to_dataset(table, path.name.split(".")[0], task, standardise)
    for doubt in table.doubts if len(table.y) >= 8 else ():  # fewer rows are a toy; the notes say it all the same
        warnings.warn(f"{path.name}: {doubt}", Doubtful, stacklevel=2)
    return dataset


def _names(columns: Sequence[str | int], option: str) -> tuple[str | int, ...]:
    if isinstance(columns, str | bytes | int) or any(
        isinstance(c, bool) or not isinstance(c, str | int) for c in columns
    ):
        raise ValueError(f"{option} is a list of columns, by name or number; got {columns!r}")
    return tuple(columns)


def _means_a_file(text: str) -> bool:
    return text.lower().endswith(SUFFIXES) or "/" in text or os.sep in text or Path(text).is_file()
