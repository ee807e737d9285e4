"""One process at a time in a folder, on file systems that hosts share too.

Among the processes of a host the kernel's lock on a file decides: it ends with its
owner, however that ends. Between hosts it can't be relied on, as file systems share it,
keep it to each host, or have none. So the owner also writes who it is into the file,
again and again, and whoever finds another host's name there waits whether it is still
written. No clocks are compared.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import stat
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Self

from gpt2_jax.checks import one_line
from gpt2_jax.runtime.files import parse_json

BEAT = 5.0  # seconds from one writing to the next
STALE = 60  # looks, a second apart, after which a silent owner is taken for dead
PATIENCE = 10.0  # seconds in which a process that was killed has ended
SIZE = 512  # bytes of the file, which stays as long, so that a full disk is no matter


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8").strip()
    except OSError:
        return ""


# Of the machine as long as it is up, and of the process numbers that count here.
_MACHINE = _read("/proc/sys/kernel/random/boot_id") or socket.gethostname()


class Lock:
    """A lock on the file `path`, held from here until `close` or the process's end.

    Args:
      path: a file of its own, which is made, and removed by `close`.
      what: what its owner does, for errors: "training in runs/a".

    Raises:
      BlockingIOError: in one line, when another process has it.
    """

    def __init__(self, path: Path, what: str) -> None:
        self._path, self._what = path, what
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self._me = {
            "token": uuid.uuid4().hex,
            "host": socket.gethostname()[:64],
            "pid": os.getpid(),
            "started": now,
            "machine": _MACHINE[:64],
            "processes": _numbering(),
        }
        self._lost_to: dict[str, Any] = {}
        self._ended = threading.Event()
        self._acquire()
        try:
            self._write(0)
        except OSError as error:
            os.close(self._file)
            raise OSError(f"{path} can't be written: {error.strerror}") from None
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def check(self) -> None:
        """Raises BlockingIOError when the lock was lost.

        Another host takes it where this one was silent for too long: asleep, or cut
        off from the file system.
        """
        if self._lost_to:
            raise BlockingIOError(
                f"{self._what} was taken over by {_name(self._lost_to)}, as nothing "
                f"was heard of this process for {STALE} seconds"
            )

    def close(self) -> None:
        self._ended.set()
        self._thread.join(BEAT)
        with contextlib.suppress(OSError):
            if not self._lost_to and self._is_there():
                self._path.unlink()
        if not self._thread.is_alive():  # else it waits for a server, with this file
            os.close(self._file)

    def _acquire(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            self._file = self._open()
            try:
                if self._try(deadline):
                    return
            except BaseException:
                os.close(self._file)
                raise
            os.close(self._file)
            time.sleep(0.1)

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        file = os.open(self._path, flags, 0o666)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise OSError(f"{self._path}, the lock of a folder, is not a regular file")
        return file

    def _try(self, deadline: float) -> bool:
        """Whether it is ours now; else it is worth trying again."""
        is_locked = self._flock()
        owner = self._owner()
        is_here = owner.get("machine") == _MACHINE
        if is_locked is False and (is_here or not owner):
            if time.monotonic() > deadline:
                raise self._refusal(owner)
            return False
        if is_locked and not self._is_there():
            return False  # its owner has removed it
        if not owner or (is_locked and is_here) or _is_dead(owner):
            return True
        said = self._wait_for_a_sign(owner)
        if said is None:
            return True
        if said:
            raise self._refusal(said)
        return False

    def _flock(self) -> bool | None:
        """Whether the kernel's lock is ours; None where there is no such thing."""
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return None
        return True

    def _wait_for_a_sign(self, owner: dict[str, Any]) -> dict[str, Any] | None:
        """What the owner on another host has written since, {} where it has ended.

        None: nothing, so it is dead.
        """
        print(
            f"note: {self._what}: {self._path} is of {_name(owner)}; waiting up to "
            f"{STALE} seconds for a sign that it is still there",
            file=sys.stderr,
            flush=True,
        )
        for _ in range(STALE):  # looks, not seconds: each may wait for the server
            time.sleep(1)
            if (now := self._owner()) != owner:
                return now
        return None

    def _refusal(self, owner: dict[str, Any]) -> BlockingIOError:
        who = f"{_name(owner)}, has locked" if owner else "it has locked"
        return BlockingIOError(f"another process is {self._what}: {who} {self._path}")

    def _is_there(self) -> bool:
        """Whether the file that is open is still the one of that name."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return False

    def _owner(self) -> dict[str, Any]:
        """What the file says; opened anew, as network file systems check then."""
        try:
            data = self._path.read_bytes()[: 4 * SIZE].strip()
            found = parse_json(data, self._path) if data else {}
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, beat: int) -> None:
        text = json.dumps({**self._me, "beat": beat}).ljust(SIZE - 1) + "\n"
        os.pwrite(self._file, text.encode(), 0)
        with contextlib.suppress(OSError):  # not every file system has it
            os.fsync(self._file)

    def _beat(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT if beat else BEAT / 5):
            beat += 1
            owner = self._owner()
            if owner.get("token", self._me["token"]) != self._me["token"]:
                self._lost_to = owner
                return
            with contextlib.suppress(OSError):  # a server may be away for a while
                self._write(beat)


def _numbering() -> str:
    """Says where the numbers of processes mean the same: containers have their own."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _is_dead(owner: dict[str, Any]) -> bool:
    """Whether it certainly is: a process of this machine that is no longer there."""
    pid = owner.get("pid")
    places = owner.get("machine"), owner.get("processes")
    if places != (_MACHINE, _numbering()) or type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _name(owner: dict[str, Any]) -> str:
    pid, host, started = (owner.get(k) for k in ("pid", "host", "started"))
    return one_line(f"process {pid} on {host}, started {started}", 200)
