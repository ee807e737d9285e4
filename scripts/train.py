"""Trains a GPT-2, or goes on where the same command left off.

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart

On several hosts the same command runs on each. TPU pods, Slurm, Open MPI and indexed
Kubernetes jobs are found; elsewhere --coordinator_address=HOST:PORT --num_processes=N
--process_id=I say who is who. Exit status: 0 done; 143, 130 or 129 stopped by SIGTERM,
Ctrl-C or a closed terminal, with a checkpoint; 75 a peer was lost; after all of these
the same command goes on. 2 is bad input.
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags
from ml_collections import config_flags

from gpt2_jax.runtime import distributed
from gpt2_jax.runtime.profiling import parse_steps
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.train import train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: configs/NAME.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
_ADDRESS = flags.DEFINE_string("coordinator_address", None, "HOST:PORT of process 0.")
_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "Processes of the job; 1 by itself: there is no job."
)
_PROCESS = flags.DEFINE_integer("process_id", None, "This one's number, from 0.")
_START = flags.DEFINE_integer("start_timeout", 300, "Seconds for all to come.")
_PEER = flags.DEFINE_integer(
    "peer_timeout", 100, "Seconds without a heartbeat before a peer counts as lost."
)
_PROFILE = flags.DEFINE_string(
    "profile_steps", None, "FIRST:LAST, updates to trace into WORKDIR/profile."
)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> int:
    cfg = TrainConfig.from_dict(_CONFIG.value)
    profiled = parse_steps(_PROFILE.value) if _PROFILE.value else range(0)
    job = distributed.Job(
        *(_ADDRESS.value, _PROCESSES.value, _PROCESS.value, _START.value, _PEER.value)
    )

    def program() -> int:
        stopped_by = train(cfg, _WORKDIR.value, profiled=profiled).signal
        return 0 if stopped_by is None else 128 + stopped_by  # as shells say it

    return distributed.run(job, program)


if __name__ == "__main__":
    run(main, outlives_stdout=True)
