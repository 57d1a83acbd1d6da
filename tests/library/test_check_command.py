"""python -m jaxgrad.check FILE: what it prints, and its exit status."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrad.check.__main__ import main

DERIVATIONS = Path(__file__).resolve().parents[2] / "experiments" / "derivations"

HEAD = """
import jax.numpy as jnp
import numpy as np
params = np.array([0.5, -1.0])
batch = np.arange(12.0).reshape(6, 2) / 7
def loss(w, X):
    return jnp.mean((X @ w) ** 2)
"""


def write(tmp_path, body, name="mine.py"):
    file = tmp_path / name
    file.write_text(body)
    return str(file)


@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("logistic_regression", 0, ["RIGHT"]),
        ("logistic_regression_as_printed", 1, ["unstable", "|h| of about 36.7", "p - y", ".py:25"]),
        ("logistic_regression_with_a_mistake", 1, ["wrong-argument", "output `p` instead of its input `h`", ".py:15"]),
        ("two_layer_net", 0, ["RIGHT"]),
        (
            "two_layer_net_with_mistakes",
            1,
            [
                "--- gradient_slide",
                "factor n",
                "divide by n",
                "--- gradient_activation",
                "missing-derivative",
                "A (1 - A) is missing",
                "--- gradient_value",
                "you used `Z` where `A` belongs",
                "--- gradient_two",
                "derivative of tanh",
                "scale, factor n",
                "--- backprop",
                "first mistake is in Z",
                "inherited",
            ],
        ),
    ],
)
def test_the_worked_derivations(name, status, words, capsys):
    assert main([str(DERIVATIONS / f"{name}.py")]) == status
    out = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in out


def test_every_derivation_is_tried():
    tried = {
        "logistic_regression",
        "logistic_regression_as_printed",
        "logistic_regression_with_a_mistake",
        "two_layer_net",
        "two_layer_net_with_mistakes",
    }
    assert {p.stem for p in DERIVATIONS.glob("*.py")} == tried


def test_several_by_suffix(tmp_path, capsys):
    file = write(
        tmp_path,
        HEAD
        + "def gradient_good(w, X):\n    return 2 * X.T @ (X @ w) / len(X)\n"
        + "def gradient_bad(w, X):\n    return X.T @ (X @ w) / len(X)\n"
        + "def loss_other(w, X):\n    return jnp.sum(w ** 4)\n"
        + "params_other = np.ones(3)\n"
        + "def gradient_other(w, X):\n    return 4 * w ** 3\n",
    )
    assert main([file]) == 1
    out = capsys.readouterr().out
    assert out.count("RIGHT") == 2
    assert out.count("WRONG") == 1
    assert main([file, "--only", "good"]) == 0
    assert main([file, "--only", "other"]) == 0
    assert main([file, "--only", "none"]) == 2


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("x = 1\n", "defines no function `gradient(params, batch)` (it defines x)"),
        ("def gradient(p, b): return p\n", "but not loss and params"),
        ("def loss(p): return p\ndef gradient(p): return p\n", "but not params"),
        ("import nothing_of_that_name\n", "could not be run"),
        ("def f(:\n", "could not be run"),
        ("raise SystemExit(3)\n", "ended the program"),
        (HEAD + "def gradient(w, X):\n    return w[7]\n", "your gradient raised this at the given point"),
        (HEAD.replace("jnp.mean", "") + "def gradient(w, X):\n    return w\n", "array of shape (6,)"),
        (HEAD.replace("X @ w", "X @ w.wall") + "def gradient(w, X):\n    return w\n", "wall"),
        (HEAD.replace("reshape(6, 2)", "reshape(6, 2)[:0]") + "def gradient(w, X):\n    return w\n", "empty"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line_of_ours(body, words, tmp_path, capsys):
    assert main([write(tmp_path, body)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.strip().splitlines()[-1].startswith("jaxgrad.check: ")
    assert "jaxgrad/check" not in err


def test_a_person_s_exception_shows_their_own_traceback(tmp_path, capsys):
    body = HEAD + "def helper(w):\n    return w[7]\ndef gradient(w, X):\n    return helper(w)\n"
    assert main([write(tmp_path, body)]) == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "in helper" in err
    assert "IndexError" in err


def test_a_file_that_is_not_there(capsys):
    assert main(["nowhere/nothing.py"]) == 2
    assert "there is no file" in capsys.readouterr().err


def test_colour_only_where_wanted(tmp_path, capsys):
    file = write(tmp_path, HEAD + "def gradient(w, X):\n    return X.T @ (X @ w) / len(X)\n")
    main([file])
    assert "\x1b" not in capsys.readouterr().out
    main([file, "--color"])
    assert "\x1b[31;1mWRONG\x1b[0m" in capsys.readouterr().out


def test_the_command_itself_and_its_help(tmp_path):
    file = write(tmp_path, HEAD + "def gradient(w, X):\n    return 2 * X.T @ (X @ w) / len(X)\n")
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "jaxgrad.check", file], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("RIGHT")
    done = subprocess.run(
        [sys.executable, "-m", "jaxgrad.check", "--help"], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0
    assert "exit status: 0 right, 1 wrong, 2 unusable" in done.stdout


def test_a_loss_in_numpy_gets_a_verdict_by_numbers(tmp_path, capsys):
    body = HEAD.replace("X @ w", "X @ np.asarray(w)") + "def gradient(w, X):\n    return w\n"
    assert main([write(tmp_path, body)]) == 1
    out, _ = capsys.readouterr()
    assert "WRONG" in out
    assert "complex steps" in out
