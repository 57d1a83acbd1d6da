"""What every command line does around its work, so that whatever ends it, one line on stderr says so.

    if __name__ == "__main__":
        commandline.prepare()                            # first of all: before anything heavy is imported
    ...
    if __name__ == "__main__":
        commandline.leave(commandline.outcome(main))

**Signals.** SIGINT (Ctrl-C) and SIGTERM end the program with status 130 and 143. Until `interruptible` is called, and
where it never is, that is at once: there is nothing to put away yet. From then on the first one raises
KeyboardInterrupt in the main thread. Further ones do nothing, for the first is being obeyed; whatever hangs is ended
`GRACE` seconds later. What the interpreter does before it runs our first line, some hundredths of a second, is beyond
reach.

**Output.** A stdout that is closed, full or read by nobody must not stop the work halfway. What cannot be written is
dropped, the work goes on, and the end says that it was dropped (status 2), unless a reader merely had seen enough
(`| head`). Characters that the stream's encoding lacks are written as `\\u03b3`.

**Files.** An OSError that nobody caught is a sentence with path, reason and remedy (`files`), and status 2.

`prepare` changes streams and signals of this process, so only a program calls it, never an import.
"""

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

GRACE = 5
"""Seconds that a program has to end after a signal."""
UNUSABLE = 2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_prepared: tuple[int, ...] = ()
"""The signals that are ours; a program that was started with one ignored (nohup, a shell's `&`) goes on ignoring it."""
_came = 0
"""The first signal that came."""


class Output(io.RawIOBase):
    """The bytes of a standard stream. The first failure is kept in `lost`, and what follows is dropped."""

    def __init__(self, handle: int, closed: bool):
        self._handle, self._closed_before = handle, closed
        self.lost: OSError | None = None
        self.last = b""

    def write(self, content: Any) -> int:
        left = memoryview(content).cast("B")
        size, self.last = len(left), bytes(left[:16])
        if self._closed_before and size:
            self.lost = OSError(errno.EBADF, os.strerror(errno.EBADF))
        while self.lost is None and len(left):
            try:
                left = left[os.write(self._handle, left) :]
            except BlockingIOError:
                import select

                select.select([], [self._handle], [])
            except OSError as error:
                self.lost = error
        return size

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._handle

    def isatty(self) -> bool:
        return not self._closed_before and os.isatty(self._handle)


_out: Output | None = None
_err: Output | None = None


def prepare(quiet: bool = False) -> None:
    """Let no signal and no broken stream end this program in a traceback. A second call changes nothing.

    `quiet`: a signal that ends it at once is not said, for another program says it.
    """
    global _prepared, _out, _err
    if _out is not None:
        return
    # A file that is opened later must not get the number of a standard stream that is closed: others write there.
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    _out, sys.stdout = _stream(1, sys.stdout)
    _err, sys.stderr = _stream(2, sys.stderr)
    _err.last = next(iter(_WORDS.values())).encode() if quiet else b""
    _prepared = tuple(number for number in _SIGNALS if signal.getsignal(number) not in (signal.SIG_IGN, None))
    for number in _prepared:
        signal.signal(number, _end_at_once)


def _stream(handle: int, old: Any) -> tuple[Output, io.TextIOWrapper]:
    output = Output(handle, closed=old is None)
    direct = old is not None and old.write_through  # python -u
    return output, io.TextIOWrapper(
        output if direct else io.BufferedWriter(output),  # type: ignore[arg-type]
        encoding=old.encoding if old is not None else "utf-8",
        errors="backslashreplace",
        line_buffering=handle == 2 or output.isatty(),
        write_through=direct,
    )


def interruptible() -> None:
    """From here on a signal raises KeyboardInterrupt, for there is something to put away."""
    if not _came:
        for number in _prepared:
            signal.signal(number, _interrupt)


def outcome(main: Callable[[], Any]) -> int:
    """Run the program and return its exit status. What it raises is said in one line, but for mistakes of ours."""
    try:
        status = _status(main)
    except KeyboardInterrupt:
        status = 130
        say(word())
    except OSError as error:
        from jaxgrad import files

        status = UNUSABLE
        say(f"error: {files.sentence(error)}")
    except BaseException:
        if not _came:
            raise
        # An import, or a library, made another error of the interrupt.
        status = 130
        say(_WORDS[_came])  # type: ignore[index]
    return 128 + _came if _came and status == 130 else status


def _status(main: Callable[[], Any]) -> int:
    try:
        status = main()
    except SystemExit as end:
        status = end.code
    if isinstance(status, str):
        say(status)
        status = 1
    for number in _prepared:
        signal.signal(number, _nothing if _came else _end_at_once)
    return int(status or 0)


def leave(status: int, at_once: bool = False) -> NoReturn:
    """Exit. `at_once`: without waiting for what other threads or the device still run."""
    if _out is None or _err is None:
        sys.exit(status)
    sys.stdout.flush()
    if _out.lost is not None and _out.lost.errno != errno.EPIPE:
        say(f"error: not all of the output could be written to stdout: {_why(_out.lost)}")
        status = status or UNUSABLE
    sys.stderr.flush()
    if at_once or _came:
        os._exit(status)
    sys.exit(status)


def _why(error: OSError) -> str:
    if error.errno == errno.EBADF:
        return "it is closed; let it go to a terminal, a file or /dev/null"
    from jaxgrad import files

    return files.reason(error)


def word() -> str:
    """`interrupted`, or `terminated`, by the first signal that came."""
    return _WORDS.get(_came, "interrupted")  # type: ignore[call-overload]


def say(text: str) -> None:
    """One line on stderr, in one piece."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _end_at_once(number: int, _: Any) -> None:
    global _came
    _came = _came or number  # another signal may interrupt this very function
    _last_words(_came)
    os._exit(128 + _came)


def _last_words(number: int) -> None:
    if _err is not None and not _err.last.startswith(tuple(word.encode() for word in _WORDS.values())):
        _err.write(f"{_WORDS[number]}\n".encode())  # type: ignore[index]


def _nothing(*_: Any) -> None:
    pass


def _interrupt(number: int, _: Any) -> None:
    global _came
    import threading

    if not _came:
        _came = number
        threading.Thread(target=_end_anyway, daemon=True).start()
    for other in _prepared:
        signal.signal(other, _nothing)
    sys.unraisablehook = _raise_again
    raise KeyboardInterrupt


def _raise_again(unraisable: Any) -> None:
    """A callback (a finaliser, the collector's) swallowed the KeyboardInterrupt: raise it once more, behind it."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    import threading

    for number in _prepared:
        signal.signal(number, _interrupt)
    threading.Timer(0.01, os.kill, (os.getpid(), _came)).start()


def _end_anyway() -> None:
    import time

    time.sleep(GRACE)
    if (processes := sys.modules.get("multiprocessing")) is not None:
        for process in processes.active_children():
            process.kill()
    _last_words(_came)
    os._exit(128 + _came)
