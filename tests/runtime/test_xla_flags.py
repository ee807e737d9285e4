import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpt2_jax.runtime import xla_flags
from gpt2_jax.runtime.platform import traced_for
from gpt2_jax.runtime.xla_flags import GPU, GPU_STEP, TPU, set_flags, step_options


@pytest.fixture
def machine(monkeypatch):
    def has(tpu: bool, gpu: bool):
        monkeypatch.setattr(xla_flags, "has_tpu", lambda: tpu)
        monkeypatch.setattr(Path, "exists", lambda _: gpu)

    return has


def test_flags_are_those_of_the_accelerator(machine):
    for tpu, gpu, name, flags in [
        (True, False, "LIBTPU_INIT_ARGS", TPU),
        (False, True, "XLA_FLAGS", GPU),
    ]:
        machine(tpu, gpu)
        environ = {}
        set_flags(environ)
        assert environ == {name: " ".join(f"--{k}={v}" for k, v in flags.items())}
        environ = {"JAX_PLATFORMS": "cpu"}
        set_flags(environ)
        assert environ == {"JAX_PLATFORMS": "cpu"}
    machine(False, False)
    environ = {}
    set_flags(environ)
    assert environ == {}


def test_what_is_given_wins(machine):
    machine(False, True)
    given = "--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=/tmp/x"
    environ = {"XLA_FLAGS": given}
    set_flags(environ)
    words = environ["XLA_FLAGS"].split()
    assert words[-2:] == given.split()
    assert len(words) == len(GPU) + 1
    set_flags(environ)
    assert environ["XLA_FLAGS"].split() == words


def test_this_xla_knows_each_flag_for_gpus():
    """XLA ends a process that is given a flag that it does not know."""
    flags = " ".join(f"--{k}={v}" for k, v in {**GPU, **GPU_STEP}.items())
    for text, known in [(flags, True), (flags + " --xla_gpu_no_such_flag=1", False)]:
        process = subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"],
            env={**os.environ, "XLA_FLAGS": text, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            check=False,
        )
        assert (process.returncode == 0) == known


def test_options_of_the_step_are_for_gpus_and_yield_to_flags():
    assert step_options({}) is None
    with traced_for("tpu"):
        assert step_options({}) is None
    with traced_for("gpu"):
        assert step_options({}) == GPU_STEP
        given = {"XLA_FLAGS": "--xla_dump_to=/tmp/x --xla_gpu_enable_triton_gemm=true"}
        assert step_options(given) == {"xla_gpu_dot_merger_threshold_mb": 0}
