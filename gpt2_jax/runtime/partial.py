"""What is half written when a program ends."""

import contextlib
import os
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def removed(path: Path) -> Iterator[None]:
    """Removes the file or folder `path`, if there is one, at the end of the block.

    Also where Ctrl-C ends the program at once (see `gpt2_jax.commands.door`).
    """

    def remove() -> None:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        remove()
        os.kill(os.getpid(), number)

    ends_at_once = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    )
    if ends_at_once:
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        remove()
        if ends_at_once:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextlib.contextmanager
def appears_whole(out: Path) -> Iterator[Path]:
    """A path beside `out` to write a file or folder to, which then becomes `out`.

    Its name is its own, so that two processes that write the same do not mix.

    Raises:
      FileExistsError: when `out` has come to be there.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial-{uuid.uuid4().hex[:8]}")
    with removed(partial):
        yield partial
        if out.exists():
            raise FileExistsError(f"{out} exists already")
        partial.rename(out)
