import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from gpt2_jax.runtime import distributed
from gpt2_jax.runtime.distributed import (
    RESUMABLE,
    Job,
    all_agree,
    detected,
    first_process_first,
    is_lost_peer,
)

SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("host", 2, 0), "coordinator_address='host' is not HOST:PORT"),
        (("host:1", None, 0), "go together: no num_processes"),
        ((None, 1, 0), "go together: no coordinator_address"),
        ((None, 2, 0), "go together: no coordinator_address"),
        (("host:1", 0, 0), "num_processes=0 must be >= 1"),
        (("host:1", 2, 2), r"process_id=2 is not in 0 .. num_processes - 1 = 1"),
        (("host:1", 2, -1), "process_id=-1 is not in"),
        (("host:1", 2, 0, 0), "start_timeout=0 must be >= 1"),
        ((None, None, None, 1, 0), "peer_timeout=0 must be >= 1"),
    ],
)
def test_an_impossible_job_is_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        Job(*values)


SHELL = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"}
INTERACTIVE, BATCH, EXTERN = 0xFFFFFFFA, 0xFFFFFFFB, 0xFFFFFFFC


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),  # one task keeps all its GPUs
        ({**SLURM, "SLURM_NTASKS": ""}, False),
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, True),
        # srun -n 1 and -n 2 in an allocation of four, with --preserve-env
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}, True),
        ({**SLURM, **SHELL, "SLURM_STEP_ID": "0"}, True),
        # salloc -n 4: a shell on the login node, or on a node as a step of its own
        (SHELL, False),
        ({**SLURM, **SHELL, "SLURM_STEP_ID": str(INTERACTIVE)}, False),
        (
            {
                **SLURM,
                **SHELL,
                "SLURM_STEP_ID": str(INTERACTIVE),
                "SLURM_STEP_NUM_TASKS": "1",
            },
            False,
        ),
        # sbatch -n 4: what the script itself starts
        ({**SHELL, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, False),
        ({**SLURM, **SHELL, "SLURM_STEP_ID": str(BATCH)}, False),
        ({**SLURM, **SHELL, "SLURM_STEP_ID": str(EXTERN)}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "many"}, False),
        ({**SHELL, "OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # just any pod
        ({"KUBERNETES_SERVICE_HOST": "h", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_clusters_are_found_by_their_environment(environ, expected):
    assert detected(environ) == expected


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({**SLURM, "SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2"}, 2),
        ({**SLURM, "SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "2"}, None),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None),
    ],
)
def test_jax_waits_for_those_that_were_started(monkeypatch, environ, expected):
    """None: it counts them itself."""
    for name in (*SLURM, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    seen = []
    monkeypatch.setattr(
        jax.distributed, "initialize", lambda *args, **_: seen.append(args)
    )
    distributed._connect(Job(), 0)
    assert seen == [(None, expected, None)]


def test_one_process_may_be_said_to_be_alone(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert distributed.run(Job(num_processes=1), lambda: 7) == 7


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("UNKNOWN: Gloo all-reduce failed: Connection closed"), True),
        (jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED: Barrier timed out"), True),
        (jax.errors.JaxRuntimeError("INTERNAL: NCCL operation failed"), True),
        (
            jax.errors.JaxRuntimeError(
                "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: "
                "Task 1 heartbeat timeout"
            ),
            True,
        ),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("batch_size=0 must be >= 1"), False),
        (KeyError("UNAVAILABLE: "), False),
        (None, False),
    ],
)
def test_a_lost_peer_is_told_from_other_errors(error, expected):
    assert is_lost_peer(error) == expected
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = error
    assert is_lost_peer(wrapped) == expected


def test_alone_there_is_nobody_to_wait_for():
    assert all_agree(True)
    assert not all_agree(False)
    assert first_process_first(lambda: 5) == 5


# What a child of `run` does: the processes of a job without JAX.
CHILD = """
import os, signal, sys
from gpt2_jax.runtime import distributed
from gpt2_jax.runtime.distributed import Job, run

def program():
    print("at work", flush=True)
    {act}
    return 0

distributed._connect = lambda job, pipe: None
sys.exit(run(Job("127.0.0.1:1", 1, 0), program))
"""


def run_child(tmp_path, act: str) -> subprocess.Popen:
    script = tmp_path / "child.py"
    script.write_text(CHILD.format(act=act))
    return subprocess.Popen(
        [sys.executable, script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("act", "status", "last_line"),
    [
        ("pass", 0, ""),
        ("return 143", 143, ""),
        ("os.abort()", RESUMABLE, "error: another process of the job is gone"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, ""),
        ("raise ValueError('Gloo failed')", RESUMABLE, "does not answer: Gloo failed"),
        ("raise ValueError('too small')", 2, "ValueError: too small"),
        ("raise KeyError('a bug')", 1, "KeyError: 'a bug'"),
    ],
)
def test_the_exit_status_says_how_a_process_ended(tmp_path, act, status, last_line):
    with run_child(tmp_path, act) as child:
        out, err = child.communicate(timeout=60)
    assert out == "at work\n"
    assert child.returncode == status
    assert last_line in (err.splitlines() or [""])[-1]


def test_signals_are_passed_on_and_no_orphan_is_left(tmp_path):
    act = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9)); signal.pause()"
    with run_child(tmp_path, act) as child:
        assert child.stdout.readline() == "at work\n"
        time.sleep(0.5)
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 1  # it did not say how it ends
    act = "print(os.getpid(), flush=True); signal.pause()"
    with run_child(tmp_path, act) as child:
        assert child.stdout.readline() == "at work\n"
        stat = Path(f"/proc/{child.stdout.readline().strip()}/stat")
        child.kill()
    deadline = time.monotonic() + 10
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def test_no_orphan_begins_to_work(tmp_path):
    """Its parent is gone before it has come as far as to ask for being told so."""
    script = tmp_path / "child.py"
    begin = "if distributed._CHILD in os.environ: os.read(0, 1)\n"
    lines = CHILD.format(act="pass").splitlines(keepends=True)
    script.write_text("".join([*lines[:4], begin, *lines[4:]]))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, script], **pipes) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        while not children.read_text():
            assert parent.poll() is None, "it ended before it had a child"
            time.sleep(0.05)
        parent.kill()
        parent.wait(30)
        parent.stdin.write(b"!")  # which the child waits for
        parent.stdin.flush()
        assert parent.stdout.read() == b""  # until the child has ended, too
