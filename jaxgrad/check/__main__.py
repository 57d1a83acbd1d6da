"""`python -m jaxgrad.check FILE`: which step of the derivation in FILE is wrong.

FILE is a Python file that defines `loss(params, batch)`, `gradient(params, batch)`, `params` and, unless the
loss does without, `batch`; or several of them by suffix (`gradient_output` is checked against `loss_output`, or
`loss` if there is none, and so for `params` and `batch`). `has_aux = True` says that the loss returns
`(value, aux)`. A function `backprop` that returns `(gradient, {"name": adjoint})` is checked adjoint by adjoint.

exit status: 0 right, 1 wrong, 2 unusable: the file or what it defines cannot be checked, 130 interrupted
"""

from jaxgrad import commandline

if __name__ == "__main__":
    commandline.prepare()

import argparse
import importlib.util
import os
import stat
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from jaxgrad import files


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checker on a file; returns the exit status."""
    options = _parse(arguments)
    path = Path(options.file)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return _unusable(f"{options.file} is not a file" + (", but a folder" if path.is_dir() else ""))
        path.open("rb").close()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError) and not path.is_symlink() and not files.working_folder_is_gone()
        return _unusable(f"there is no file {options.file}" if missing else files.sentence(error))
    except ValueError as error:
        return _unusable(f"{options.file!r} cannot be the name of a file: {error}")
    if path.suffix != ".py":
        return _unusable(f"{options.file} is not a Python file: its name must end in .py")
    try:
        module = _load(path)
    except Exception as error:
        _print_theirs(error)
        return _unusable(f"{path.name} could not be run: the error above is its own")
    except SystemExit:
        return _unusable(f"{path.name} ended the program while it was read; guard it with if __name__ == '__main__'")
    names = [n for n in vars(module) if n == "gradient" or n.startswith("gradient_")]
    names += [n for n in vars(module) if n == "backprop" or n.startswith("backprop_")]
    names = [n for n in names if callable(getattr(module, n))]
    if not names:
        defined = [n for n in vars(module) if not n.startswith("_")]
        return _unusable(
            f"{path.name} defines no function `gradient(params, batch)` "
            f"(it defines {', '.join(defined[:12]) or 'nothing'})"
        )
    if options.only is not None:
        names = [n for n in names if n.partition("_")[2] == options.only]
        if not names:
            return _unusable(f"{path.name} defines no gradient_{options.only}")
    color = options.color if options.color is not None else sys.stdout.isatty() and "NO_COLOR" not in os.environ
    return max(_check(module, path, name, len(names) > 1, color) for name in names)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jaxgrad.check",
        description="Say whether a hand-derived gradient is right, and if not, which step of the derivation is wrong.",
        # What the file may define is said once, above.
        epilog=str(__doc__).partition("\n\n")[2],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", help="a Python file, see below")
    parser.add_argument("--only", metavar="SUFFIX", help="check gradient_SUFFIX and backprop_SUFFIX alone")
    parser.add_argument("--color", action=argparse.BooleanOptionalAction, default=None, help="colour the report")
    return parser.parse_args(arguments)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
    spec.loader.exec_module(module)
    return module


def _check(module: ModuleType, path: Path, name: str, several: bool, color: bool) -> int:
    from jaxgrad.check.backprop import backprop_text, check_backprop
    from jaxgrad.check.gradient import check_gradient
    from jaxgrad.check.report import text

    kind, _, suffix = name.partition("_")
    found, missing = {}, []
    for role in ("loss", "params", "batch"):
        own = f"{role}_{suffix}" if suffix else role
        chosen = next((n for n in (own, role) if hasattr(module, n)), None)
        if chosen is None:
            missing.append(own)
        else:
            found[role] = getattr(module, chosen)
    if "loss" in missing or "params" in missing or any(m.startswith(("loss", "params")) for m in missing):
        return _unusable(f"{path.name} defines {name} but not {' and '.join(missing)}")
    if several:
        print(f"--- {name}")
    batch = (found["batch"],) if "batch" in found else ()
    has_aux = bool(getattr(module, f"has_aux_{suffix}", getattr(module, "has_aux", False)))
    try:
        if kind == "backprop":
            report = check_backprop(found["loss"], getattr(module, name), found["params"], *batch)
            print(backprop_text(report, color))
        else:
            report = check_gradient(found["loss"], getattr(module, name), found["params"], *batch, has_aux=has_aux)
            print(text(report, color))
    except Exception as error:
        return _failed(error, path)
    if several:
        print()
    return 0 if report.ok else 1


def _failed(error: Exception, path: Path) -> int:
    """Their traceback if it is their exception, then one line of ours."""
    frames = _their_frames(error)
    # JAX adds notes of its own to what a traced loss raises.
    notes = [note for note in getattr(error, "__notes__", []) if note.startswith("jaxgrad: ")]
    if notes or frames:
        _print_theirs(error)
    message = notes[0].removeprefix("jaxgrad: ") if notes else str(error)
    return _unusable(message.rstrip("."))


def _their_frames(error: BaseException) -> list[traceback.FrameSummary]:
    from jaxgrad.check.program.steps import is_library

    return [
        f
        for f in traceback.extract_tb(error.__traceback__)
        if not is_library(f.filename) and not f.filename.startswith("<")
    ]


def _print_theirs(error: BaseException) -> None:
    frames = _their_frames(error)
    if frames:
        sys.stderr.write("Traceback (most recent call last):\n" + "".join(traceback.format_list(frames)))
    bare = "".join(traceback.format_exception_only(type(error), error))
    for note in getattr(error, "__notes__", []):
        bare = bare.replace(f"{note}\n", "")
    sys.stderr.write(bare.rstrip() + "\n")


def _unusable(message: str) -> int:
    sys.stdout.flush()
    sys.stderr.write(f"jaxgrad.check: {message}.\n")
    return 2


if __name__ == "__main__":
    commandline.leave(commandline.outcome(main))
