"""The first that a program imports: what Ctrl-C does, and where `print` writes.

Importing this changes the process, so only programs do it, before all other imports.

Ctrl-C ends a program at once, as it ends one written in C. Python's own way, to raise
KeyboardInterrupt, loses it where it strikes inside a callback from JAX, and crashes the
interpreter at its end where it strikes while XLA compiles. The trainer, which has
something to save, takes over when there is.

Characters that the encoding of stdout or stderr lacks are written as escapes. On a
terminal so are control characters, since a model or a file may contain what moves the
cursor or sets the title; a pipe or a file gets what was printed, unchanged.

When the reader of stdout is gone (`| head`) the program ends in silence with status
141, as `yes` does; any other error in writing there is one line and status 2. Where the
output is not what the program is for, as in training, and on stderr, what can't be
written is dropped and the program goes on.
"""

import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO

_CONTROLS = [*range(32), *range(127, 160)]
_ESCAPES = {i: f"\\x{i:02x}" for i in _CONTROLS if chr(i) not in "\n\t"}


class Output(io.FileIO):
    """A standard stream that never raises.

    Args:
      lasting: whether the program goes on when this can't be written.
    """

    def __init__(self, fd: int, *, lasting: bool) -> None:
        super().__init__(fd, "w", closefd=False)
        self.lasting = lasting

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if not self.lasting:
                _end(error)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


class Terminal(io.TextIOWrapper):
    """Text for a screen, on which control characters are shown and do nothing."""

    def write(self, text: str, /) -> int:
        return super().write(text.translate(_ESCAPES))


def run(
    main: Callable[[list[str]], int | None], *, outlives_stdout: bool = False
) -> None:
    """Runs a program as `cli.run` does.

    Args:
      outlives_stdout: whether it goes on when what it prints can't be written.
    """
    from gpt2_jax.commands import cli

    _stdout.lasting = outlives_stdout
    cli.run(main)


def _end(error: OSError) -> None:
    """Ends the process for what it could not write."""
    if isinstance(error, BrokenPipeError):
        os._exit(128 + signal.SIGPIPE)
    print(f"error: standard output: {error.strerror}", file=sys.stderr, flush=True)
    os._exit(2)


def _open_standard_files() -> None:
    """Opens what the caller has closed, or the next file would take its number.

    What libraries log to stderr would go into it, whatever it is.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the least number that is free


def _text(raw: Output, old: TextIO | None, *, plain: bool) -> io.TextIOWrapper:
    """Text on `raw`, buffered as `old` is, which is None where its file was closed."""
    unbuffered = getattr(old, "write_through", False)  # python -u
    return (io.TextIOWrapper if plain else Terminal)(
        raw if unbuffered else io.BufferedWriter(raw),
        encoding="utf-8" if old is None else old.encoding,
        errors="backslashreplace",
        line_buffering=bool(getattr(old, "line_buffering", False)),
        write_through=unbuffered,
    )


gc.disable()  # until `cli.run`: while modules load there is no garbage to look for
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored
    signal.signal(signal.SIGINT, signal.SIG_DFL)
_open_standard_files()
_stdout, _stderr = Output(1, lasting=False), Output(2, lasting=True)
if sys.stdin is None:
    _nothing = io.BufferedReader(io.FileIO(0, closefd=False))
    sys.stdin = io.TextIOWrapper(_nothing, encoding="utf-8")
sys.stdout = _text(_stdout, sys.stdout, plain=not _stdout.isatty())
sys.stderr = _text(_stderr, sys.stderr, plain=True)
