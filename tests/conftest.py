"""What tests share: eight fake devices, a tiny model, a count of compilations."""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import contextlib
from collections.abc import Callable, Iterator

import jax.monitoring
import pytest

from gpt2_jax.model import GPT2, Params
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
