"""Wrong arguments to every public function end in a sentence, and odd but right ones in the right answer."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def fuzz(*options):
    """What `argument_fuzz.py` counted, in a process without pytest's type checker."""
    file = Path(__file__).with_name("argument_fuzz.py")
    done = subprocess.run([sys.executable, str(file), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_wrong_arguments_are_answered_by_a_sentence():
    found = fuzz()
    assert found["calls"] >= 2000
    assert found["functions"] >= 190
    assert found.get("wrong", 0) == 0, found["bad"]
    assert found.get("hang", 0) == 0, found["bad"]
    assert found["sentence"] + found["right"] >= 0.98 * found["calls"], found["bad"]
    assert found["sentence"] >= 1000
    assert found["right"] >= 200


@pytest.mark.parametrize(("check", "where"), [("positive", "descent.stopping.small"), ("sampling", "noise.gamma")])
def test_a_check_that_refuses_nothing_is_seen(check, where):
    assert fuzz("--all", "--only", where)["bad"] == []
    found = fuzz("--all", "--only", where, "--plant", check)
    assert found.get("wrong", 0) > 0
    assert found["sentence"] + found["right"] < 0.98 * found["calls"]
