"""The README's examples run as they stand, and print what the README says they print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", README, re.DOTALL)


@pytest.mark.parametrize(("code", "said"), EXAMPLES, ids=range(len(EXAMPLES)))
def test_the_examples_of_the_readme_run(code, said, tmp_path):
    file = tmp_path / "hidden.py"
    file.write_text(code, encoding="utf-8")
    ran = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()
    if said:
        # Digits below the third and where lines break may change with the JAX line; no word may.
        assert _words(ran.stdout) == _words(said)


def _words(text):
    return [word for word in text.split() if not re.fullmatch(r"-?[\d.]+(e[-+]?\d+)?,?", word)]


def test_the_readme_has_the_two_commands():
    assert 'python -m pip install -e ".[study]" && python -m experiments' in README
    assert 'python -m pip install -e ".[test]" && python -m pytest' in README
