"""The processes of a job: how they find each other, wait, agree, and end.

JAX ends a process by abort() when a peer is lost, which no Python code can catch. So
each process of a job of several runs under a small parent, the same program started
once more, that turns such an end into one line and an exit status.
"""

import atexit
import contextlib
import ctypes
import dataclasses
import glob
import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax._src.distributed import global_state
from jax.experimental import multihost_utils

from gpt2_jax.checks import MESSAGE, one_line, shown
from gpt2_jax.fields import check_range

T = TypeVar("T")

RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on
_CHILD = "GPT2_JAX_STATUS_FD"  # set in the child: where it says how it ended
_FOREVER = 30 * 24 * 3600  # seconds
_FAILED = "gpt2_jax/failed"  # in JAX's store: a status, and why a process has failed
_ending = threading.Lock()
_POLL, _GRACE = 1, 5  # seconds between two looks there, and until its end after one

# What XLA's errors say when another process is gone or does not answer.
_LOST = re.compile(
    r"\b(UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): |"
    r"\b(Gloo|NCCL|coordination service|CoordinationService)\b"
)


@dataclasses.dataclass(frozen=True)
class Job:
    """How the processes of a job meet; all None: as the cluster says, if there is one.

    `num_processes=1` and nothing else: this is no job, whatever the cluster says.

    Args:
      coordinator_address: HOST:PORT of process 0, which listens there.
      num_processes: of the job.
      process_id: of this one, from 0.
      start_timeout: seconds in which all of them must have come.
      peer_timeout: seconds of silence after which a process is taken for dead.

    Raises:
      ValueError: on an impossible value, naming it.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    start_timeout: int = 300
    peer_timeout: int = 100

    def __post_init__(self) -> None:
        for name in ("start_timeout", "peer_timeout"):
            check_range(name, getattr(self, name), 1)  # seconds
        names = ("coordinator_address", "num_processes", "process_id")
        missing = [name for name in names if getattr(self, name) is None]
        if len(missing) == 3 or self.is_alone:
            return
        if missing:
            raise ValueError(f"{', '.join(names)} go together: no {missing[0]}")
        address, n, i = self.coordinator_address, self.num_processes, self.process_id
        assert address is not None
        assert n is not None
        assert i is not None
        if not re.fullmatch(r".+:\d{1,5}", address):
            raise ValueError(f"coordinator_address={shown(address)} is not HOST:PORT")
        if n < 1:
            raise ValueError(f"num_processes={n} must be >= 1")
        if not 0 <= i < n:
            raise ValueError(
                f"process_id={i} is not in 0 .. num_processes - 1 = {n - 1}"
            )

    @property
    def is_alone(self) -> bool:
        others = self.coordinator_address, self.process_id
        return self.num_processes == 1 and others == (None, None)


def run(job: Job, program: Callable[[], int]) -> int:
    """Runs `program` as one process of `job`, and returns its exit status.

    Where there is no job, in this process, and that is all. Else in a child, connected
    with its peers, and the status is that of `program`, or `RESUMABLE` when a peer
    never came, died, or stopped to answer.
    """
    if job.is_alone:
        return program()
    if job.coordinator_address is None and not detected(os.environ):
        return program()
    if _CHILD not in os.environ:
        return _supervise()
    pipe, parent = map(int, os.environ.pop(_CHILD).split())
    _die_with_parent(parent)
    status, ended = 1, threading.Event()
    try:
        _connect(job, pipe)
        threading.Thread(target=_watch, args=(pipe, ended), daemon=True).start()
        status = program()
        ended.set()
        _report(pipe, status)
        jax.distributed.shutdown()
        return status
    except BaseException as error:
        ended.set()
        if is_lost_peer(error):
            _end_if_told(pipe)
            _lose(pipe, one_line(error, 200))
        if isinstance(error, ValueError | OSError):
            status = 2
        _report(pipe, status)
        if isinstance(error, Exception):
            _tell(f"{status} process {jax.process_index()}: {one_line(error)}")
            # JAX would wait for the others, and they have ended: it aborts then.
            atexit.register(_end, status)
        raise


def _end(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _watch(pipe: int, ended: threading.Event) -> None:
    """Ends this process after another has failed: it may be waiting for that one.

    It is given a while to fail by itself, with its own words.
    """
    while not ended.wait(_POLL):
        if _told() is not None and not ended.wait(_GRACE):
            _end_if_told(pipe)


def _tell(why: str) -> None:
    """Says to the other processes why this one has failed, and waits until they know.

    It may be the one that they learn it from: JAX's store is in process 0.
    """
    if not jax.distributed.is_initialized():
        return
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # they are gone already
        _store().key_value_set(_FAILED, why, allow_overwrite=True)
        _until_all_know()


def _store() -> Any:
    """The keys and values that all processes see. JAX has no public way to them."""
    return global_state.client


def _until_all_know() -> None:
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"{_FAILED}/known", timeout_ms=1000 * (_GRACE + 20))
    if is_first():
        time.sleep(_POLL)  # JAX aborts those that outlive its store


def _told() -> str | None:
    if not jax.distributed.is_initialized():
        return None
    try:
        return str(_store().key_value_try_get(_FAILED))
    except jax.errors.JaxRuntimeError:  # none has said so
        return None


def _end_if_told(pipe: int) -> None:
    if (told := _told()) is None:
        return
    _ending.acquire()  # never released: of two threads that come here one speaks
    status, _, why = told.partition(" ")
    print(f"error: {why}", file=sys.stderr, flush=True)
    _report(pipe, int(status))
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        _until_all_know()
    _end(int(status))


def detected(environ: Mapping[str, str]) -> bool:
    """Whether this is one of several processes that JAX knows how to connect.

    Slurm and Open MPI say so in the environment, Kubernetes in that of an indexed job;
    on a Cloud TPU VM JAX asks the machine, whether it is one of several or not.
    """
    if slurm_tasks(environ) > 1 or mpi_processes(environ) > 1:
        return True
    if {"KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"} <= environ.keys():
        return True
    on_tpu = environ.get("JAX_PLATFORMS", "tpu").startswith("tpu")
    return on_tpu and has_tpu()


# Steps that Slurm numbers from the end are none of srun's tasks: a shell of salloc, a
# batch script, what prolog and epilog run in, one that is still to come.
_FIRST_SPECIAL_STEP = 0xFFFFFFFA


def slurm_tasks(environ: Mapping[str, str]) -> int:
    """How many tasks srun started beside this process, itself included; 0: none.

    A shell of `salloc -n 4` has SLURM_NTASKS=4, and as a step of its own, which it is
    on many clusters, SLURM_PROCID=0, too.
    """
    needed = {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"}
    step = _number(environ, "SLURM_STEP_ID")
    if not needed <= environ.keys() or step >= _FIRST_SPECIAL_STEP:
        return 0
    name = "SLURM_STEP_NUM_TASKS"  # SLURM_NTASKS may be that of the allocation
    return _number(environ, name if name in environ else "SLURM_NTASKS")


def mpi_processes(environ: Mapping[str, str]) -> int:
    """How many processes Open MPI started beside this one, itself included; 0: none."""
    return _number(environ, "OMPI_COMM_WORLD_SIZE")


def _number(environ: Mapping[str, str], name: str) -> int:
    """0 where it is not set, or is no number."""
    text = environ.get(name, "")
    return int(text) if re.fullmatch(r"[0-9]{1,10}", text) else 0


def has_tpu() -> bool:
    """Whether this is a machine with TPUs, found out without starting a backend."""
    devices = glob.glob("/dev/accel*") + glob.glob("/dev/vfio/[0-9]*")
    return bool(devices) and importlib.util.find_spec("libtpu") is not None


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an exception, or one that led to it, tells of a peer that is gone."""
    while error is not None:
        from_xla = isinstance(error, jax.errors.JaxRuntimeError | ValueError)
        if from_xla and _LOST.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_first() -> bool:
    """Whether this is the process that logs and writes what only one may write."""
    return jax.process_index() == 0


def first_process_first(make: Callable[[], T]) -> T:
    """Calls `make` in process 0 first, so that the others find what it left behind.

    Raises:
      ValueError, OSError: in all processes, when `make` did so in the first.
    """
    if jax.process_count() == 1:
        return make()
    results: list[T] = []
    error = None
    if is_first():
        try:
            results.append(make())
        except (ValueError, OSError) as e:
            error = e
    _wait_for_all("first_process_first")
    size = 4 * MESSAGE  # bytes of the message, which must have one length in all
    text = "" if error is None else one_line(error)
    sent = np.frombuffer(text.encode().ljust(size), np.uint8)
    said = bytes(multihost_utils.broadcast_one_to_all(sent)).decode()
    if error is not None:
        raise error
    if said.strip():
        raise ValueError(f"process 0: {said.strip()}")
    return results[0] if is_first() else make()


def all_agree(yes: bool) -> bool:
    """Whether all processes say yes."""
    if jax.process_count() == 1:
        return yes
    return bool(np.all(multihost_utils.process_allgather(np.array(yes))))


def check_shared(folder: Path, *, seconds: float = 30) -> None:
    """Raises ValueError where what process 0 writes into `folder` is not seen."""
    if jax.process_count() == 1:
        return
    token = multihost_utils.broadcast_one_to_all(np.array(time.time_ns() % 2**31))
    probe = folder / f".shared-{int(token)}"
    if is_first():
        probe.touch()
    _wait_for_all(f"probe-{int(token)}")
    deadline = time.monotonic() + seconds  # network file systems may lag
    while not (seen := probe.exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
        os.listdir(folder)
    agreed = all_agree(seen)
    if is_first():
        probe.unlink()
    if not agreed:
        where = "here" if not seen else "by every process"
        raise ValueError(
            f"{folder} is not shared: what process 0 writes there is not seen {where}"
        )


_waits = 0


def _wait_for_all(name: str) -> None:
    global _waits
    _waits += 1
    wait = ocp.multihost.get_barrier_sync_fn()
    wait(key=f"gpt2_jax-{name}-{_waits}", timeout_ms=_FOREVER * 1000)


def _supervise() -> int:
    """Runs this program again as a child with its own word on how it ended."""
    read, write = os.pipe()
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        env={**os.environ, _CHILD: f"{write} {os.getpid()}"},
        pass_fds=[write],
        process_group=0,  # a Ctrl-C reaches it once, through this process
    )
    os.close(write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda n, _: child.send_signal(n))
    returncode = child.wait()
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    if said:
        return int(said.split()[0])
    if returncode == -signal.SIGABRT:
        _say_lost("see above")
        return RESUMABLE
    return 128 - returncode if returncode < 0 else returncode


def _connect(job: Job, pipe: int) -> None:
    def give_up() -> None:
        where = job.coordinator_address or "the coordinator that the cluster names"
        _lose(
            pipe,
            f"not all processes had come to {where} after "
            f"start_timeout={job.start_timeout} seconds",
        )

    timer = threading.Timer(job.start_timeout, give_up)
    timer.daemon = True
    timer.start()
    count = job.num_processes
    if count is None and mpi_processes(os.environ) <= 1:
        count = slurm_tasks(os.environ) or None  # JAX would count by SLURM_NTASKS
    jax.distributed.initialize(
        job.coordinator_address,
        count,
        job.process_id,
        initialization_timeout=job.start_timeout + 60,  # JAX's own end is an abort
        heartbeat_timeout_seconds=job.peer_timeout,
        shutdown_timeout_seconds=job.peer_timeout,
    )
    timer.cancel()


def _report(pipe: int, status: int) -> None:
    os.write(pipe, b"%d " % status)


def _lose(pipe: int, why: str) -> None:
    """Ends this process at once: an orderly end would wait for the peer."""
    _say_lost(why)
    _report(pipe, RESUMABLE)
    _end(RESUMABLE)


def _say_lost(why: str) -> None:
    print(
        f"error: another process of the job is gone or does not answer: {why}. "
        "The same command goes on from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )


def _die_with_parent(parent: int) -> None:
    """Has this process killed when its parent ends, or ends it, if that has ended.

    An orphan would go on with the run beside the one that is started in its place.
    """
    pr_set_pdeathsig = 1  # linux/prctl.h
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(128 + signal.SIGKILL)
