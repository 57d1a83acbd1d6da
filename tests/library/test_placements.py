"""One suite of laws for every place where rows may be: `placements.py` has both."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import placements
import pytest


@pytest.fixture(autouse=True)
def settings_of_a_user():
    """Optax mixes dtypes and ranks, which the other tests forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("place", placements.HERE, ids=lambda place: place.__name__)
@pytest.mark.parametrize("law", placements.LAWS, ids=lambda law: law.__name__)
def test_a_law_holds_in_a_place(place, law, tmp_path):
    law(place(tmp_path), tmp_path)


@pytest.fixture(scope="module", params=[2, 4])
def said(request, tmp_path_factory):
    """What each law said on several virtual devices, of which neither 2 nor 4 divides the rows."""
    folder = tmp_path_factory.mktemp(f"devices{request.param}")
    worker = Path(placements.__file__)
    done = subprocess.run(
        [sys.executable, worker, folder, str(request.param)], capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((folder / "laws.json").read_text())


@pytest.mark.parametrize("law", placements.LAWS, ids=lambda law: law.__name__)
def test_a_law_holds_on_several_devices(said, law):
    found = {name: words for name, words in said.items() if name.endswith(f" {law.__name__}")}
    assert found
    assert set(found.values()) == {""}, found
