"""scripts/restart, slurm and tpu, with stand-ins for srun and gcloud."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TRAINING = ["--config=configs/gpt2_124m.py", "--workdir=/mnt/runs/a b"]


def run(
    *command: object,
    env: Mapping[str, object] | None = None,
    cwd: Path = ROOT,
    status: int = 0,
) -> subprocess.CompletedProcess[str]:
    """Runs a command without the variables of a surrounding Slurm job."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    process = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**clean, **{k: str(v) for k, v in (env or {}).items()}},
        cwd=cwd,
        timeout=60,
        check=False,
    )
    assert process.returncode == status, process.stderr
    return process


def refusal(*command: object, env: Mapping[str, object] | None = None) -> str:
    """The one line with which a command refuses what it is given."""
    process = run(*command, env=env, status=2)
    assert process.stdout == ""
    (line,) = process.stderr.splitlines()
    return line.removeprefix("error: ")


def script(path: Path, text: str, interpreter: str = "/usr/bin/env bash") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{text}")
    path.chmod(0o755)
    return path


def ending(folder: Path, statuses: Sequence[int], more: str = "") -> Path:
    """A command that ends with one status after the other, then with 99."""
    return script(
        folder / "command",
        f"""
        count=$(($(cat "{folder}/count" 2>/dev/null || echo 0) + 1))
        echo $count >"{folder}/count"
        printf '%s\\n' "$@" >"{folder}/arguments"
        {more}
        statuses=({" ".join(map(str, statuses))})
        exit "${{statuses[count - 1]:-99}}"
        """,
    )


def starts(folder: Path) -> int:
    return int((folder / "count").read_text())


# --- Words on a command line.


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("--a.b=c/d_e:f@1%2,3+4~5-6", "--a.b=c/d_e:f@1%2,3+4~5-6"),
        ("", "''"),
        ("a b", "'a b'"),
        ("$HOME", "'$HOME'"),
        ("it's", r"'it'\''s'"),
        ("*&;\\", "'*&;\\'"),
    ],
)
def test_quote(word, quoted):
    command = f'source {ROOT}/scripts/quote.sh; quote x "$1" y'
    assert run("bash", "-c", command, "bash", word).stdout == f"x {quoted} y\n"
    assert shlex.split(quoted) == [word]


# --- Starting again.


def restart(folder: Path, *arguments: object, status: int, **env: object) -> str:
    command = [ROOT / "scripts/restart", folder / "command", *arguments]
    return run(*command, env={"RESTART_SECONDS": 0, **env}, status=status).stderr


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ([0], 0),
        ([2], 2),
        ([130], 130),
        ([129], 129),
        ([127], 127),
        ([75, 75, 0], 0),
        ([143, 75, 1, 0], 0),
        ([75, 2], 2),
        ([1, 1, 1, 0], 0),
        ([137] * 4, 137),
        ([75] * 10 + [0], 0),
        ([75] * 11, 75),
        ([143] * 11, 143),
    ],
)
def test_restart_goes_by_the_status(tmp_path, statuses, status):
    ending(tmp_path, statuses)
    restart(tmp_path, "--config=a b", status=status)
    assert starts(tmp_path) == len(statuses)
    assert (tmp_path / "arguments").read_text() == "--config=a b\n"


@pytest.mark.parametrize("flag", [["--workdir={}"], ["--workdir", "{}"]])
def test_a_new_checkpoint_starts_the_count_again(tmp_path, flag):
    workdir = tmp_path / "a run"
    # Steps 1, 2, 3, 3, ...: four starts, three of them with a new checkpoint, and then
    # three more without.
    step = "$((count < 3 ? count : 3))"
    save = f'mkdir -p "{workdir}/checkpoints/{step}" "{workdir}/checkpoints/9.tmp"'
    ending(tmp_path, [1] * 20, save)
    error = restart(tmp_path, *(f.format(workdir) for f in flag), status=1)
    assert starts(tmp_path) == 6
    assert error.splitlines()[-1] == (
        "restart: status 1, 3 starts again without a new checkpoint"
    )


@pytest.mark.parametrize(
    ("env", "kept"),
    [({}, "/home/me/.cache/gpt2_jax"), ({"JAX_COMPILATION_CACHE_DIR": ""}, "")],
)
def test_restart_has_compiled_programs_kept(tmp_path, env, kept):
    command = script(tmp_path / "command", 'echo "at $JAX_COMPILATION_CACHE_DIR"')
    words = ["env", "-u", "JAX_COMPILATION_CACHE_DIR", "HOME=/home/me"]
    words += [f"{name}={value}" for name, value in env.items()]
    assert run(*words, ROOT / "scripts/restart", command).stdout == f"at {kept}\n"


def test_restart_leaves_a_preempted_job_to_slurm(tmp_path):
    ending(tmp_path, [75, 143, 0])
    restart(tmp_path, status=143, SLURM_JOB_ID=7)
    assert starts(tmp_path) == 2


def test_sigterm_ends_what_restarts_it_too(tmp_path):
    wait = "trap 'exit 143' TERM; echo ready; for i in {1..1000}; do sleep 0.05; done"
    ending(tmp_path, [0], wait)
    process = subprocess.Popen(
        [ROOT / "scripts/restart", tmp_path / "command"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        os.killpg(process.pid, signal.SIGTERM)
    assert process.returncode == 143
    assert starts(tmp_path) == 1


def test_restart_refuses_bad_usage():
    restart = ROOT / "scripts/restart"
    assert refusal(restart).startswith("a command is missing")
    message = "RESTART_SECONDS=soon is not a number of seconds"
    assert refusal(restart, "true", env={"RESTART_SECONDS": "soon"}) == message


# --- Slurm.

SBATCH = ROOT / "scripts/slurm/train.sbatch"


def test_sbatch_dry_run():
    srun = "srun --kill-on-bad-exit=0 --gpu-bind=none"
    process = run(SBATCH, "--dry_run", *TRAINING, "--config.data.path=it's")
    assert process.stdout == (
        f"{srun} .venv/bin/python scripts/train.py --config=configs/gpt2_124m.py "
        r"'--workdir=/mnt/runs/a b' '--config.data.path=it'\''s'"
        "\n"
    )
    env = {"PYTHON": "/opt/a python", "SLURM_CPUS_PER_TASK": 6}
    process = run(SBATCH, "--dry_run", "--config=c", "--workdir=w", env=env)
    assert process.stdout == (
        f"{srun} --cpus-per-task=6 '/opt/a python' scripts/train.py "
        "--config=c --workdir=w\n"
    )


def test_sbatch_asks_for_a_signal_and_to_be_requeued():
    lines = SBATCH.read_text().split("\n\n")[0].splitlines()
    asked = {line.removeprefix("#SBATCH ") for line in lines[1:]}
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= asked
    assert {"--ntasks-per-node=8", "--gpus-per-node=8"} <= asked  # one task a GPU


@pytest.fixture
def slurm(tmp_path) -> Callable[[Sequence[int]], dict[str, object]]:
    """The environment of a job in which srun ends with the given statuses."""

    def job(statuses: Sequence[int]) -> dict[str, object]:
        ending(tmp_path, statuses).rename(tmp_path / "srun")
        script(tmp_path / "scontrol", f'echo "$@" >>"{tmp_path}/scontrol.log"')
        # Slurm runs a copy of the file, from a folder of its own.
        shutil.copy(SBATCH, tmp_path / "slurm_script")
        return {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "RESTART_SECONDS": 0,
            "SLURM_JOB_ID": 1234,
            "SLURM_SUBMIT_DIR": ROOT,
            "SLURM_NTASKS_PER_NODE": 4,
            "SLURM_GPUS_ON_NODE": 4,
            "SLURM_CPUS_PER_TASK": 6,
        }

    return job


@pytest.mark.parametrize(
    ("statuses", "status", "requeued"),
    [
        ([0], 0, False),
        ([75, 75, 0], 0, False),
        ([75, 143], 143, True),
        ([2], 2, False),
        ([130], 130, False),
        ([1] * 4, 1, False),
    ],
)
def test_a_slurm_job(tmp_path, slurm, statuses, status, requeued):
    env = slurm(statuses)
    run(
        "bash",
        tmp_path / "slurm_script",
        *TRAINING,
        env=env,
        cwd=tmp_path,
        status=status,
    )
    assert starts(tmp_path) == len(statuses)
    assert (tmp_path / "arguments").read_text().splitlines() == [
        "--kill-on-bad-exit=0",
        "--gpu-bind=none",
        "--cpus-per-task=6",
        ".venv/bin/python",
        "scripts/train.py",
        *TRAINING,
    ]
    log = tmp_path / "scontrol.log"
    assert (log.read_text() if log.exists() else "") == "requeue 1234\n" * requeued


@pytest.mark.parametrize(
    ("arguments", "env", "message"),
    [
        (["--workdir=w"], {}, "--config=... is missing"),
        (["--config=c"], {}, "--workdir=... is missing"),
        (TRAINING, {}, "no Slurm job: submit this with sbatch, or --dry_run"),
        (TRAINING, {"SLURM_SUBMIT_DIR": "/"}, "/ is not the repository's folder: "),
        (
            TRAINING,
            {"SLURM_NTASKS_PER_NODE": 1, "SLURM_GPUS_ON_NODE": 8},
            "--ntasks-per-node=1, but 8 GPUs a node: JAX needs one task a GPU",
        ),
    ],
)
def test_sbatch_refuses_bad_usage(arguments, env, message):
    assert refusal(SBATCH, *arguments, env=env).startswith(message)


# --- TPUs: what would run.

POD = ROOT / "scripts/tpu/pod"
WORKER = "gpt2_jax/scripts/tpu/worker"
WHERE = "--quiet --zone=us-east5-b --project=mine"
TPUS = "gcloud compute tpus"
ARCHIVE = f"{ROOT}/build/gpt2_jax.tar.gz"
QUEUED = (
    f"{TPUS} queued-resources list '--filter=name~/queuedResources/x$' "
    f"'--format=value(state.state)' {WHERE}"
)
NODES = (
    f"{TPUS} tpu-vm list '--filter=queuedResource~/queuedResources/x$' "
    f"'--format=value(state)' {WHERE}"
)
DELETE = f"{TPUS} queued-resources delete x --force {WHERE}"
ARCHIVING = [
    f"mkdir -p {ROOT}/build",
    f"git -C {ROOT} archive --format=tar.gz --output={ARCHIVE} HEAD",
]
UNPACK = "mkdir -p gpt2_jax && tar -xzf gpt2_jax.tar.gz -C gpt2_jax && "
IF_THERE = f"if [ -e {WORKER} ]; then {WORKER}"
STATUS = f"{IF_THERE} status; else echo $(uname -n): absent; fi"
# What a worker's shell reads, quoted once more for the shell that runs gcloud.
START = (
    f"'--command={WORKER} start --config=configs/gpt2_124m.py "
    r"'\''--workdir=/mnt/runs/a b'\'''"
)


def ssh(node: str, command: str) -> str:
    if not command.startswith("'"):
        command = f"'--command={command}'"
    return f"{TPUS} tpu-vm ssh {node} --worker=all {command} {WHERE}"


def scp(node: str) -> str:
    return f"{TPUS} tpu-vm scp {ARCHIVE} {node}:gpt2_jax.tar.gz --worker=all {WHERE}"


def created(size: str, kind: str, version: str, more: str = "") -> str:
    return (
        f"{TPUS} queued-resources create x {size} --accelerator-type={kind} "
        f"--runtime-version={version} {more}{WHERE}"
    )


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        (
            ["create", "--accelerator_type=v6e-8"],
            [created("--node-id=x", "v6e-8", "v2-alpha-tpuv6e"), QUEUED, NODES],
        ),
        (
            [
                "create",
                "--accelerator_type=v5p-32",
                "--runtime_version=new",
                "--slices=4",
                "--spot",
                "--create_flag=--reserved",
                "--create_flag=--labels=a=b c",
            ],
            [
                created(
                    "--node-count=4",
                    "v5p-32",
                    "new",
                    "--spot --reserved '--labels=a=b c' ",
                ),
                QUEUED,
                NODES,
            ],
        ),
        (
            ["install"],
            [*ARCHIVING, scp("x"), ssh("x", f"{UNPACK}{WORKER} install")],
        ),
        (
            ["install", "--slices=2", "--setup=sudo mount /mnt"],
            [
                *ARCHIVING,
                scp("x-0"),
                scp("x-1"),
                *(
                    ssh(x, rf"{UNPACK}{WORKER} install '\''sudo mount /mnt'\''")
                    for x in ("x-0", "x-1")
                ),
            ],
        ),
        (["start", "--", *TRAINING], [ssh("x", START)]),
        (
            ["start", "--slices=2", "--", *TRAINING],
            [ssh("x-0", START), ssh("x-1", START)],
        ),
        (["status"], [QUEUED, NODES, ssh("x", STATUS)]),
        (
            ["log", "--slices=2"],
            [
                f"{TPUS} tpu-vm ssh x-0 --worker=0 "
                f"'--command=tail -n 100 -F gpt2_jax/train.log' {WHERE}"
            ],
        ),
        (["stop"], [ssh("x", f"{IF_THERE} stop; fi")]),
        (
            ["fetch", "runs/a b"],
            [
                "mkdir -p runs",
                f"{TPUS} tpu-vm scp --recurse 'x:gpt2_jax/runs/a b' runs --worker=0 "
                f"{WHERE}",
            ],
        ),
        (
            ["fetch", "/mnt/runs/124m", "here", "--slices=2"],
            [
                "mkdir -p here",
                f"{TPUS} tpu-vm scp --recurse x-0:/mnt/runs/124m here --worker=0 "
                f"{WHERE}",
            ],
        ),
        (["delete"], [DELETE]),
        (
            ["watch", "--accelerator_type=v4-32", "--spot", "--", *TRAINING],
            [
                QUEUED,
                created("--node-id=x", "v4-32", "tpu-ubuntu2204-base", "--spot "),
                NODES,
                *ARCHIVING,
                scp("x"),
                ssh("x", f"{UNPACK}{WORKER} install"),
                ssh("x", START),
                ssh("x", STATUS),
                "# After preemption, and then from the start:",
                DELETE,
            ],
        ),
    ],
)
def test_pod_dry_run(tmp_path, arguments, lines):
    # A gcloud that is called all the same says so.
    gcloud = script(tmp_path / "gcloud", "echo called >&2; exit 1")
    command, *rest = arguments
    where = ["--zone=us-east5-b", "--project=mine", "--dry_run"]
    process = run(
        *[POD, command, "x", *where, *rest],
        env={"PATH": f"{gcloud.parent}:{os.environ['PATH']}"},
        cwd=tmp_path,
    )
    assert process.stdout.splitlines() == lines
    assert process.stderr == ""
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("kind", "version"),
    [
        ("v2-8", "tpu-ubuntu2204-base"),
        ("v3-32", "tpu-ubuntu2204-base"),
        ("v4-8", "tpu-ubuntu2204-base"),
        ("v5litepod-16", "v2-alpha-tpuv5-lite"),
        ("v5p-8", "v2-alpha-tpuv5"),
        ("v6e-4", "v2-alpha-tpuv6e"),
    ],
)
def test_runtime_versions(kind, version):
    """As in https://cloud.google.com/tpu/docs/runtimes"""
    process = run(POD, "create", "x", f"--accelerator_type={kind}", "--dry_run")
    (line,) = process.stdout.splitlines()[:1]
    assert f"--runtime-version={version} " in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "a command is missing"),
        (["make", "x"], "no such command: make"),
        (["status"], "status needs a NAME"),
        (["status", "X_1"], "the name 'X_1' is not of small letters"),
        (["status", "x", "y"], "unexpected argument y"),
        (["status", "x", "--zone"], "no such option, or a value is missing: --zone"),
        (["status", "x", "--zone="], "--zone= is empty"),
        (["status", "x", "--dry_run=1"], "--dry_run takes no value"),
        (["status", "x", "--setup=ls"], "status has no option --setup"),
        (["status", "x", "--name=y"], "status has no option --name"),
        (["status", "x", "--slices=0"], "--slices=0 is not a number >= 1"),
        (["status", "x", "--", "--config=c"], "status takes no flags of train.py"),
        (["create", "x"], "create needs --accelerator_type=TYPE"),
        (
            ["create", "x", "--accelerator_type=v9-8"],
            "--accelerator_type=v9-8 needs --runtime_version=VERSION",
        ),
        (
            ["create", "x", "--accelerator_type=v4-8", "--poll_seconds=1m"],
            "--poll_seconds=1m is not a number",
        ),
        (["start", "x"], "after --, --config=... is missing"),
        (["start", "x", "--", "--config=c"], "after --, --workdir=... is missing"),
        (["watch", "x", "--", *TRAINING], "watch needs --accelerator_type=TYPE"),
        (
            ["start", "x", "--", "--config=c", "--workdir=gs://a/b"],
            "--workdir=gs://a/b: a run's folder is one that all workers mount",
        ),
        (["fetch", "x"], "fetch needs NAME WORKDIR [FOLDER]"),
        (["fetch", "x", "a", "b", "c"], "fetch needs NAME WORKDIR [FOLDER]"),
        (
            ["fetch", "x", "gs://a/b"],
            "gs://a/b is in Cloud Storage: gcloud storage cp -r gs://a/b runs",
        ),
    ],
)
def test_pod_refuses_bad_usage(arguments, message):
    assert refusal(POD, *arguments).startswith(message)


def test_help_names_every_command_and_option():
    said = run(POD, "--help").stdout
    text = POD.read_text()
    commands = re.findall(r"^    ([a-z |]+)\) options=", text, re.M)
    assert len(" ".join(commands).replace("|", " ").split()) == 9
    for command in " ".join(commands).replace("|", " ").split():
        assert re.search(rf"^  (scripts/tpu/pod )?{command} NAME", said, re.M), command
    for option in " ".join(re.findall(r"options='(.*)'", text)).split():
        assert f"  --{option}" in said


# --- TPUs: what happens. A stand-in for gcloud makes a folder for each worker.

GCLOUD = """
import os, shutil, signal, subprocess, sys
from pathlib import Path

cloud = Path(sys.argv[0]).parent
words = [a for a in sys.argv[1:] if not a.startswith("--")]
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:] if "=" in a and a[:2] == "--")
kind, verb = words[2:4]
with open(cloud / "calls", "a") as calls:
    print(kind, verb, file=calls)
queued, vms = cloud / "queued", cloud / "vms"


def kill(node):
    for state in node.glob("*/gpt2_jax/train.state"):
        boot, process = state.read_text().split()[:2]
        if process.isdecimal():
            try:
                os.killpg(int(process), signal.SIGKILL)
            except ProcessLookupError:
                pass


if (kind, verb) == ("queued-resources", "create"):
    if queued.exists():
        sys.exit("ALREADY_EXISTS")
    queued.write_text("WAITING_FOR_RESOURCES")
    n = int(flags.get("node-count", 1))
    for node in [words[4]] if n == 1 else [f"{words[4]}-{i}" for i in range(n)]:
        for worker in "01":
            (vms / node / worker).mkdir(parents=True)
        (vms / node / "state").write_text("READY")
elif (kind, verb) == ("queued-resources", "list"):
    if queued.exists():
        print(queued.read_text())
        queued.write_text("ACTIVE")
elif (kind, verb) == ("queued-resources", "delete"):
    for node in vms.iterdir():
        kill(node)
    shutil.rmtree(vms)
    queued.unlink()
elif (kind, verb) == ("tpu-vm", "list"):
    preempt = cloud / "preempt"
    if preempt.exists():
        preempt.unlink()
        node = min(vms.iterdir())
        (node / "state").write_text("PREEMPTED")
        kill(node)
    for node in vms.iterdir():
        print((node / "state").read_text())
elif kind == "tpu-vm":
    node = next(w for w in words[4:] if "/" not in w or ":" in w).split(":")[0]
    if (vms / node / "state").read_text() != "READY":
        sys.exit("not READY")
    status = 0
    for home in sorted((vms / node).glob("[01]")):
        if verb == "scp":
            shutil.copy(words[4], home / words[5].split(":")[1])
        else:
            command = ["bash", "-c", flags["command"]]
            env = {**os.environ, "HOME": str(home), "AT": f"{node}/{home.name}"}
            status = subprocess.call(command, cwd=home, env=env) or status
    sys.exit(status)
else:
    sys.exit(f"not known: {sys.argv}")
"""

# In the place of .venv/bin/python: says how it was started, then does what the test
# wants, and by default trains until it gets SIGTERM, but not for ever.
PYTHON = """#!/usr/bin/env bash
n=$(($(cat ../count 2>/dev/null || echo 0) + 1))
echo $n >../count
printf '%s ' "$AT" "$n" "$@" >>"$CLOUD/starts"
echo >>"$CLOUD/starts"
[[ $1 == scripts/train.py ]] || exit 2
[[ ! -e $CLOUD/plan ]] || source "$CLOUD/plan"
trap 'exit 143' TERM
for ((i = 0; i < 1000; i++)); do sleep 0.05; done
exit 2
"""

SETUP_VENV = """
find_python() { :; }
setup_venv() {
  [[ $1 == "$PWD" && $2 == tpu ]] || exit 9
  mkdir -p .venv/bin
  cp "$CLOUD/python" .venv/bin/python
}
"""


class Cloud:
    """A repository, and a cloud in which each node has two workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repository = folder / "repository"
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "scripts", self.repository / "scripts", ignore=ignore)
        (self.repository / "scripts/setup_venv.sh").write_text(SETUP_VENV)
        (self.repository / ".gitignore").write_text("build/\n")
        git = ["git", "-c", "user.name=n", "-c", "user.email=e"]
        run(*git, "init", "-q", cwd=self.repository)
        run(*git, "add", ".", cwd=self.repository)
        run(*git, "commit", "-q", "--no-verify", "-m", "m", cwd=self.repository)
        script(folder / "gcloud", GCLOUD, f"{sys.executable} -IS")
        (folder / "python").write_text(PYTHON)
        (folder / "python").chmod(0o755)

    def pod(self, command: str, *arguments: object, status: int = 0, **env: object):
        return run(
            *[self.repository / "scripts/tpu/pod", command, "x", *arguments],
            env={
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "CLOUD": self.folder,
                "RESTART_SECONDS": 0,
                **env,
            },
            cwd=self.folder,
            status=status,
        )

    def watch(self, *arguments: object, status: int):
        flags = ["--accelerator_type=v6e-8", "--poll_seconds=0", *arguments]
        return self.pod("watch", *flags, "--", *TRAINING, status=status)

    def plan(self, bash: str) -> None:
        (self.folder / "plan").write_text(bash)

    def read(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()

    def await_starts(self, n: int) -> None:
        """Python is started some time after `start` has returned."""
        starts = self.folder / "starts"
        deadline = time.monotonic() + 30
        while not starts.exists() or len(self.read("starts")) < n:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def states(self) -> list[str]:
        said = self.pod("status").stdout.splitlines()
        return [line.split(": ")[1] for line in said if ": " in line]

    def end(self) -> None:
        for state in self.folder.glob("vms/*/*/gpt2_jax/train.state"):
            process = state.read_text().split()[1]
            if process.isdecimal():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(int(process), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path) -> Iterator[Cloud]:
    if sys.platform != "linux":
        pytest.skip("workers run Linux")
    cloud = Cloud(tmp_path)
    yield cloud
    cloud.end()


def said(process: subprocess.CompletedProcess[str]) -> list[str]:
    """What the watch said of x, without the times."""
    return re.findall(r"^\d\d:\d\d:\d\d x: (.*)", process.stderr, re.M)


def test_watch_outlives_preemption_and_restarts(cloud):
    cloud.plan(
        """
        if [[ ! -e $CLOUD/first ]]; then
          if [[ $AT == x-1/1 ]]; then
            until (($(wc -l <"$CLOUD/starts") == 4)); do sleep 0.05; done
            touch "$CLOUD/first" "$CLOUD/preempt"
          fi
        elif ((n < 3)); then
          exit 75
        else
          exit 0
        fi
        """
    )
    setup = f'--setup=echo "$AT" >>"{cloud.folder}/setup ran"'
    process = cloud.watch("--slices=2", "--spot", setup, status=0)
    beginning = ["absent", "WAITING_FOR_RESOURCES", "READY", "installing and starting"]
    assert said(process) == [*beginning, "PREEMPTED", *beginning, "done"]
    workers = ["x-0/0", "x-0/1", "x-1/0", "x-1/1"]
    flags = " ".join(TRAINING)
    assert sorted(cloud.read("starts")) == sorted(
        f"{worker} {n} scripts/train.py {flags} "
        for worker in workers
        for n in (1, 1, 2, 3)  # before the preemption; after it, with 75, 75, 0
    )
    assert sorted(cloud.read("setup ran")) == sorted(2 * workers)
    calls = [c for c in cloud.read("calls") if c.startswith("queued-resources")]
    assert [c for c in calls if "list" not in c] == [
        "queued-resources create",
        "queued-resources delete",
        "queued-resources create",
    ]


def test_watch_ends_with_bad_input_and_stops_the_others(cloud):
    cloud.plan('echo "error: said by $AT"; [[ $AT != x/1 ]] || exit 2')
    process = cloud.watch(status=2)
    assert said(process)[-1].endswith(": ended 2")
    assert re.findall(r"^\S+: error: said by (.*)", process.stderr, re.M) == ["x/1"]
    assert cloud.states() == ["stopped", "ended 2"]


def test_watch_takes_up_what_runs_and_ends_when_stopped(cloud):
    flags = ["--accelerator_type=v6e-8", "--poll_seconds=0"]
    cloud.pod("create", *flags)
    assert cloud.states() == ["absent"] * 2
    cloud.pod("install")
    cloud.pod("start", "--", *TRAINING)
    assert cloud.states() == ["running"] * 2
    refused = cloud.pod("start", "--", *TRAINING, status=2)
    assert "training runs already: stop it first" in refused.stderr
    cloud.await_starts(2)
    cloud.pod("stop")
    assert cloud.states() == ["stopped"] * 2
    cloud.pod("start", "--", *TRAINING)
    assert cloud.states() == ["running"] * 2
    cloud.await_starts(4)
    cloud.pod("stop")
    assert said(cloud.watch(status=143)) == ["READY", "stopped"]
    assert len(cloud.read("starts")) == 4


@pytest.mark.parametrize(
    "why", [pytest.param("shut down", marks=pytest.mark.slow), "rebooted", "killed"]
)
def test_a_worker_that_went_away_is_started_again(cloud, why):
    cloud.plan("if [[ -e $CLOUD/again ]]; then exit 0; fi")
    cloud.pod("create", "--accelerator_type=v6e-8", "--poll_seconds=0")
    cloud.pod("install")
    cloud.pod("start", "--", *TRAINING)
    cloud.await_starts(2)
    (state,) = cloud.folder.glob("vms/x/0/gpt2_jax/train.state")
    boot, process = state.read_text().split()
    if why == "shut down":  # an operating system's SIGTERM, and not `pod stop`
        os.killpg(int(process), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while state.read_text() != f"{boot} ended 143\n":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert cloud.states() == ["ended 143", "running"]
    else:
        os.killpg(int(process), signal.SIGKILL)
        if why == "rebooted":  # a process of the new boot has the number
            state.write_text(f"another-boot {os.getpid()}\n")
        deadline = time.monotonic() + 30
        while cloud.states() != ["absent", "running"]:
            assert time.monotonic() < deadline
    (cloud.folder / "again").touch()
    assert said(cloud.watch(status=0)) == ["READY", "installing and starting", "done"]
    assert len(cloud.read("starts")) == 4  # two and two


@pytest.mark.parametrize(
    ("queued", "nodes", "state"),
    [
        ("", "", "absent"),
        ("SUSPENDED", "READY READY", "SUSPENDED"),
        ("FAILED", "", "FAILED"),
        ("ACTIVE", "PREEMPTED REPAIRING", "PREEMPTED"),
        ("ACTIVE", "READY TERMINATED", "PREEMPTED"),
        ("WAITING_FOR_RESOURCES", "", None),
        ("ACTIVE", "READY", None),
        ("ACTIVE", "REPAIRING READY", None),
    ],
)
def test_create_waits_until_all_slices_are_ready(cloud, queued, nodes, state):
    """Or ends with the state of which nothing will come. None: it waits."""
    answer = """
        case $* in
          *queued*list*) [[ -e later ]] && echo ACTIVE || echo QUEUED ;;
          *list*) [[ -e later ]] && echo READY READY || echo NODES ;;
        esac
    """
    answer = answer.replace("QUEUED", queued).replace("NODES", nodes)
    script(cloud.folder / "gcloud", answer)
    script(cloud.folder / "sleep", "touch later")
    flags = ["--accelerator_type=v6e-8", "--slices=2"]
    process = cloud.pod("create", *flags, status=1 if state else 0)
    last = said(process)[-1]
    assert last == (state or "READY")
    assert (cloud.folder / "later").exists() == (state is None)


def test_what_is_not_committed_is_named(cloud):
    cloud.pod("create", "--accelerator_type=v6e-8", "--poll_seconds=0")
    assert said(cloud.pod("install")) == []
    (cloud.repository / "new.py").touch()
    note = "note: what is not committed is not installed"
    assert said(cloud.pod("install")) == [note]
    assert not list(cloud.folder.glob("vms/x/*/gpt2_jax/new.py"))


def test_install_ends_with_the_status_of_the_setup(cloud):
    cloud.pod("create", "--accelerator_type=v6e-8", "--poll_seconds=0")
    process = cloud.pod("install", "--setup=exit 4", status=2)
    assert process.stderr.count("status 4 of --setup=exit 4") == 2
    assert not list(cloud.folder.glob("vms/x/*/gpt2_jax/.venv"))


def test_watch_gives_up_after_ten_troubles_in_a_row(cloud):
    silent = """
        case $* in
          *queued*list*) echo ACTIVE ;;
          *list*) echo READY ;;
          *) exit 1 ;;
        esac
    """
    script(cloud.folder / "gcloud", silent)
    trouble = "no answer of the workers"
    trying = [f"{trouble}: trying again"] * 10
    process = cloud.watch(status=1)
    assert said(process) == ["READY", *trying, f"{trouble}: giving up"]


def test_the_first_error_of_gcloud_ends_the_watch(cloud):
    script(cloud.folder / "gcloud", "echo ERROR: no such zone >&2; exit 1")
    process = cloud.watch(status=1)
    assert process.stderr.splitlines()[0] == "ERROR: no such zone"
    assert said(process) == ["no answer", "no answer: giving up"]


# --- All of them.


def test_shellcheck():
    """Without a word; with the extra dev, or where the machine has it."""
    folder = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{folder}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    files = run(
        *["git", "grep", "-lE", "^(#!/usr/bin/env bash|# shellcheck shell=bash)"],
        *["--", ".ci", "scripts"],
    ).stdout.split()
    assert {"scripts/restart", "scripts/slurm/train.sbatch", "scripts/tpu/pod"} <= set(
        files
    )
    assert run(shellcheck, *files).stdout == ""
