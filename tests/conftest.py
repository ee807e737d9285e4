"""What tests share: eight fake devices, a tiny model, a count of compilations."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

# Tests, and the programs that they start, compile much that is the same.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "true"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the other processes of pytest do
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="gpt2_jax-")
    atexit.register(
        shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True
    )

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring
import pytest

from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2
from shapes import TINY, random_params


@pytest.fixture(scope="session")
def tiny() -> tuple[GPT2, Params]:
    """A model whose parameters are large enough that each of them matters."""
    return GPT2(TINY), random_params(TINY, stddev=0.2)


_compilations = 0


def _count(event: str, *_: object, **__: object) -> None:
    global _compilations
    _compilations += event == "/jax/core/compile/backend_compile_duration"


jax.monitoring.register_event_duration_secs_listener(_count)


@pytest.fixture
def compilations():
    """`with compilations() as n: ...` and `n()` is the number of programs compiled."""

    @contextlib.contextmanager
    def counting() -> Iterator[Callable[[], int]]:
        before = _compilations
        yield lambda: _compilations - before

    return counting
