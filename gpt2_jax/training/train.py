"""`train`, which runs what a config describes in a folder of its own."""

import contextlib
import ctypes
import dataclasses
import os
from functools import partial
from pathlib import Path

import jax

from gpt2_jax.checkpoints.checkpoint import Checkpoints, latest_contract
from gpt2_jax.runtime import distributed, sharding
from gpt2_jax.runtime.files import user_path
from gpt2_jax.runtime.lock import Lock
from gpt2_jax.training import finetune
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.loop import Result, run_loop
from gpt2_jax.training.setup import Setup, set_up
from gpt2_jax.training.stop import StopSignals


def train(
    cfg: TrainConfig, workdir: str | Path, *, profiled: range = range(0)
) -> Result:
    """Trains up to `cfg.steps` updates, from the latest checkpoint in `workdir`.

    The run is a function of (cfg, data, seed): killed at any moment and called
    again, it ends in the same bits. From its first step on, SIGTERM, SIGHUP and
    Ctrl-C end it after the current step, with a checkpoint.

    Args:
      profiled: updates, counted from 0, of which process 0 writes a trace into the
        folder `profile` of `workdir`.

    Raises:
      ValueError, OSError: on bad input, with nothing of the run lost.
      DivergedError: when `optim.max_skipped` is exceeded.
    """
    workdir = user_path(workdir)
    if profiled and profiled.start >= cfg.steps:
        raise ValueError(
            f"profile_steps={profiled.start}:{profiled.stop} begins after "
            f"steps={cfg.steps}"
        )
    mesh = sharding.make_mesh(**dataclasses.asdict(cfg.mesh))
    for size in {size for _, size in cfg.batch_warmup} | {cfg.batch_size}:
        cfg.microbatches(size, mesh)
    begun = None
    if cfg.init_from:
        begun = latest_contract(workdir / "checkpoints")
    source = None
    if cfg.init_from and begun is None:
        source = distributed.first_process_first(
            lambda: finetune.open_base(cfg.init_from)
        )
    make_writable(workdir)
    distributed.check_shared(workdir)
    with distributed.first_process_first(partial(_lock, workdir)) as lock:
        if jax.default_backend() == "cpu":
            keep_freed_memory()
        setup = set_up(cfg, workdir, mesh, source, begun)
        return _train(setup, lock, profiled)


def _lock(workdir: Path) -> contextlib.AbstractContextManager[Lock | None]:
    """Keeps others out of the folder, for two jobs in one would mix their files."""
    if not distributed.is_first():
        return contextlib.nullcontext()
    return Lock(workdir / ".lock", f"training in {workdir}")


def _train(setup: Setup, lock: Lock | None, profiled: range) -> Result:
    """Runs the loop with what it opens and closes."""
    keep_last = setup.cfg.checkpoint.keep_last
    with StopSignals() as stop:
        checkpoints = Checkpoints(setup.workdir / "checkpoints", keep_last=keep_last)
        try:
            return run_loop(setup, checkpoints, stop, lock, profiled)
        except BaseException as error:
            if distributed.is_lost_peer(error):
                checkpoints.give_up()
            raise
        finally:
            checkpoints.close()


def make_writable(workdir: Path) -> None:
    """Makes the folder and tries to write into it, before anything takes time."""
    workdir.mkdir(parents=True, exist_ok=True)
    probe = workdir / f".probe-{os.getpid()}"
    probe.touch()
    probe.unlink()


def keep_freed_memory() -> None:
    """Tells glibc to keep the memory of large temporaries instead of unmapping it.

    XLA on CPU allocates and frees its temporaries each step, and with the default
    thresholds it spends a quarter of a small model's step in page faults.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_threshold, 1 << 30)
        mallopt(m_trim_threshold, (1 << 31) - 1)
        mallopt(m_top_pad, 1 << 26)  # what threads' arenas go by instead
