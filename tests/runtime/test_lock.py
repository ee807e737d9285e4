"""Locks of a folder. Other hosts are played by what they would write."""

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from gpt2_jax.runtime import lock as module
from gpt2_jax.runtime.lock import Lock

HOLDER = """
import sys, time
from pathlib import Path
from gpt2_jax.runtime.lock import Lock
with Lock(Path(sys.argv[1]), "at work"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    monkeypatch.setattr(module, "BEAT", 0.05)
    monkeypatch.setattr(module, "STALE", 2)


@contextlib.contextmanager
def other_process(path):
    """One that holds the lock until it is ended."""
    args = [sys.executable, "-c", HOLDER, path]
    with subprocess.Popen(args, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process


def owner(**values):
    """What a process on another host writes."""
    known = {"token": "t", "host": "far", "pid": 7, "started": "then", "machine": "m"}
    return json.dumps({**known, **values})


def no_locks(*_):
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("flock", [fcntl.flock, no_locks])
def test_a_second_owner_is_refused_by_name(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    path = tmp_path / ".lock"
    with Lock(path, "training in runs/a") as first:
        started = re.escape(json.loads(path.read_text())["started"])
        expected = (
            rf"another process is training in runs/a: process {os.getpid()} on "
            rf"\S+, started {started}, has locked {re.escape(str(path))}"
        )
        with pytest.raises(BlockingIOError, match=f"^{expected}$"):
            Lock(path, "training in runs/a")
        first.check()
    assert not path.exists()
    Lock(path, "training in runs/a").close()


@pytest.mark.parametrize(
    ("number", "flock"), [(signal.SIGKILL, fcntl.flock), (signal.SIGTERM, no_locks)]
)
def test_a_process_that_is_killed_frees_the_lock(
    tmp_path, capsys, monkeypatch, number, flock
):
    path = tmp_path / ".lock"
    monkeypatch.setattr(fcntl, "flock", flock)
    with other_process(path) as process:
        if flock is not no_locks:
            with pytest.raises(BlockingIOError, match=rf"process {process.pid} on "):
                Lock(path, "at work")
        process.send_signal(number)
        if flock is no_locks:
            process.wait(30)
        Lock(path, "at work").close()
    assert capsys.readouterr().err == ""


def test_an_exception_frees_the_lock(tmp_path):
    path = tmp_path / ".lock"
    with pytest.raises(ZeroDivisionError), Lock(path, "at work"):
        raise ZeroDivisionError
    assert not path.exists()


def test_another_host_that_is_silent_is_dead(tmp_path, capsys):
    path = tmp_path / ".lock"
    path.write_text(owner())
    began = time.monotonic()
    with Lock(path, "at work"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert 2 <= time.monotonic() - began < 4
    [note] = capsys.readouterr().err.splitlines()
    assert note == (
        f"note: at work: {path} is of process 7 on far, started then; waiting up to "
        "2 seconds for a sign that it is still there"
    )


@pytest.mark.parametrize("content", [owner(beat=2), ""])
def test_another_host_that_writes_is_alive_until_it_ends(tmp_path, content):
    path = tmp_path / ".lock"
    path.write_text(owner())
    threading.Timer(0.5, path.write_text, [content]).start()
    if content:
        with pytest.raises(BlockingIOError, match="process 7 on far, started then,"):
            Lock(path, "at work")
    else:
        Lock(path, "at work").close()


def test_who_was_taken_for_dead_stops(tmp_path):
    path = tmp_path / ".lock"
    with Lock(path, "training in runs/a") as lost:
        path.write_text(owner())
        deadline = time.monotonic() + 10
        while not lost._lost_to:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(BlockingIOError, match="taken over by process 7 on far"):
            lost.check()
    assert path.read_text() == owner()  # of the other


@pytest.mark.parametrize("content", [b"", b"\xff", b"[1]", b"{}", b"[" * 99_999])
def test_a_file_that_names_nobody_locks_nothing(tmp_path, content):
    path = tmp_path / ".lock"
    path.write_bytes(content)
    Lock(path, "at work").close()


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="fifo, the lock of a folder, is not a regular"):
        Lock(tmp_path / "fifo", "at work")
    (tmp_path / "text").write_text("mine")
    (tmp_path / "link").symlink_to("text")
    with pytest.raises(OSError, match=r"link"):
        Lock(tmp_path / "link", "at work")
    assert (tmp_path / "text").read_text() == "mine"
