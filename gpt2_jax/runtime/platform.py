"""The platform that programs are traced for: this machine's, or another's."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path

import jax

_platform: ContextVar[str | None] = ContextVar("_platform", default=None)


def on_cpu() -> bool:
    """Whether what is being traced will run on CPUs, on which other forms are fast."""
    return (_platform.get() or jax.default_backend()) == "cpu"


def on_gpu() -> bool:
    """Whether what is being traced will run on GPUs."""
    return (_platform.get() or jax.default_backend()) == "gpu"


def compute_capability() -> float | None:
    """The compute capability of the NVIDIA GPUs here; None where there are none."""
    device = jax.devices()[0]
    if "cuda" not in device.client.platform_version:
        return None
    return float(device.compute_capability)


@cache
def has_matrix_unit() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in a unit for that: Intel's AMX.

    Known on Linux alone; elsewhere False.
    """
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


@contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """Within it, what is traced has the form that gpu or tpu get, here as well."""
    token = _platform.set(platform)
    try:
        yield
    finally:
        _platform.reset(token)
