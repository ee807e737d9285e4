"""How a run is asked to stop: SIGTERM, Ctrl-C, a terminal that is closed."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class StopSignals:
    """While entered, SIGTERM, SIGINT and SIGHUP set `received`.

    From the first call of `requested` on: until a step is done there is nothing to
    save, and a signal does what it did before. A second SIGINT does so again, also
    while the main thread is busy compiling or waits for a device: there is a thread
    that hears of each signal at once. SIGHUP stays ignored under nohup.

    In a job of several processes JAX's preemption service listens for SIGTERM, or for
    the cloud's notice, in each of them, and names one moment at which all stop.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._signal: int | None = None  # the first that came to this process
        self._in_job = jax.distributed.is_initialized()
        self._first = threading.Lock()  # taken by who sees the first signal
        self._asked = self._handled = 0
        self._cleanup = contextlib.ExitStack()
        self._old: dict[int, Callable[[int, FrameType | None], Any] | int | None] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def requested(self) -> bool:
        """Whether the run is to end; in a job all ask at the same moments."""
        self._asked += 1
        if not self._old and threading.current_thread() is threading.main_thread():
            self._listen()
        if self._in_job and multihost_utils.reached_preemption_sync_point(self._asked):
            self.received = self._signal or signal.SIGTERM
        return self.received is not None

    def _listen(self) -> None:
        ours = [signal.SIGINT] if self._in_job else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            ours.append(signal.SIGHUP)
        read, write = os.pipe()
        os.set_blocking(write, False)  # as set_wakeup_fd needs it
        thread = threading.Thread(target=self._watch, args=[read], daemon=True)
        self._cleanup.callback(os.close, read)
        self._cleanup.callback(thread.join)
        self._cleanup.callback(os.close, write)  # ends the thread
        before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._cleanup.callback(signal.set_wakeup_fd, before)
        thread.start()
        self._old = {number: signal.getsignal(number) for number in ours}
        for number, old in self._old.items():
            self._cleanup.callback(signal.signal, number, old)
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._note(number)
        self._handled += 1
        old = self._old[signal.SIGINT]
        if number == signal.SIGINT and self._handled > 1 and callable(old):
            old(number, frame)

    def _watch(self, read: int) -> None:
        seen = 0
        while data := os.read(read, 1):
            number = data[0]
            if number not in self._old:
                continue
            self._note(number)
            seen += 1
            plain = self._old[signal.SIGINT] == signal.SIG_DFL
            if number == signal.SIGINT and seen > 1 and plain:
                os._exit(128 + number)

    def _note(self, number: int) -> None:
        """Notes a signal, in the handler or in the thread, whichever is first."""
        self._signal = self._signal or number
        if not self._in_job:
            self.received = self._signal
        if self._first.acquire(blocking=False):
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, b"stopping after this step ...\n")
            if self._in_job:
                os.kill(os.getpid(), signal.SIGTERM)
