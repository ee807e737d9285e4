"""What is half written when a program ends."""

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType


@contextlib.contextmanager
def removed(path: Path) -> Iterator[None]:
    """Removes the file or folder `path`, if there is one, at the end of the block.

    Also where Ctrl-C ends the program at once (see `gpt2_jax.door`), in its midst.
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
