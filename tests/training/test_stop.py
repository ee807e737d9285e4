"""Signals that ask a run to stop, while its main thread is free and while it is not."""

import os
import signal
import subprocess
import sys

import pytest

from gpt2_jax.training.stop import StopSignals

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(autouse=True)
def python_ctrl_c():
    """What starts the tests in the background may have Ctrl-C or SIGHUP ignored."""
    given = {n: signal.getsignal(n) for n in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in given.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_signals_are_noted_and_a_second_ctrl_c_is_left_to_python(number, capfd):
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with StopSignals() as stop:
        assert not stop.requested()
        signal.raise_signal(number)
        assert stop.requested()
        assert stop.received == number
        signal.raise_signal(signal.SIGTERM)  # as a machine that goes down may do
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == number
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    assert capfd.readouterr().err == "stopping after this step ...\n"


def test_a_signal_before_the_first_step_does_what_it_did(capfd):
    with StopSignals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr().err == ""


def test_nohup_is_heeded():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as stop:
        stop.requested()
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested()


BUSY = """
import ctypes, signal
from gpt2_jax.training.stop import StopSignals

signal.alarm(60)  # ends a process that hears of nothing
signal.signal(signal.SIGINT, signal.SIG_DFL)
with StopSignals() as stop:
    stop.requested()
    print("busy", flush=True)
    # No handler in Python runs before this returns, as while XLA compiles.
    mutex = ctypes.create_string_buffer(256)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_ctrl_c_is_answered_while_the_main_thread_is_busy():
    with subprocess.Popen(
        [sys.executable, "-c", BUSY],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    ) as process:
        assert process.stdout.readline() == "busy\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "stopping after this step ...\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == 130
        assert process.stderr.read() == ""
