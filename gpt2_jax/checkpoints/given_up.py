"""What Orbax's reads and writes still print after one of them has failed.

When one fails, Orbax closes the event loop under the others; each of them complains
when it ends or is collected, before or after the error is reported.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any


@contextlib.contextmanager
def complaints_ignored() -> Iterator[None]:
    """Prints nothing of them while entered, nor after an exception has left it."""
    unraisable, uncaught = sys.unraisablehook, sys.excepthook
    asyncio_logger = logging.getLogger("asyncio")  # "exception was never retrieved"

    def on_unraisable(complaint: Any) -> None:
        coroutine = getattr(complaint.object, "cr_code", None)
        of_orbax = coroutine is not None and _is_of_orbax(coroutine.co_filename)
        if not (of_orbax or _left(complaint.exc_value, complaint.exc_traceback)):
            unraisable(complaint)

    def on_uncaught(
        kind: type[BaseException], error: BaseException, tb: TracebackType | None
    ) -> None:  # TensorStore's threads come here
        if not _left(error, tb):
            uncaught(kind, error, tb)

    sys.unraisablehook, sys.excepthook = on_unraisable, on_uncaught
    asyncio_logger.disabled = True
    yield
    sys.unraisablehook, sys.excepthook = unraisable, uncaught
    asyncio_logger.disabled = False


def _left(error: BaseException | None, traceback: TracebackType | None) -> bool:
    if str(error) == "Event loop is closed":
        return True
    while traceback is not None:
        if _is_of_orbax(traceback.tb_frame.f_code.co_filename):
            return True
        traceback = traceback.tb_next
    return False


def _is_of_orbax(file: str) -> bool:
    return "orbax" in Path(file).parts
