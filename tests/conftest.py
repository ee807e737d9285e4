"""What tests share: eight fake devices, a tiny model, a count of compilations."""

import atexit
import os
import shutil
import tempfile

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
# For the programs that tests start, which are mostly the same: the first of them
# compiles. Not for this process, nor for the others of pytest, which inherit it.
_cache = os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring
import pytest

from gpt2_jax.model import GPT2, Params
from shapes import TINY, random_params

if _cache is None:
    _cache = tempfile.mkdtemp(prefix="gpt2_jax-cache-")
    atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _cache
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


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
