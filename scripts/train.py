"""Trains a GPT-2, or goes on where the same command left off.

python scripts/train.py --config=configs/quickstart.py --workdir=runs/quickstart
"""

from absl import flags
from ml_collections import config_flags

from gpt2_jax import cli
from gpt2_jax.train import TrainConfig, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: configs/NAME.py.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
flags.mark_flag_as_required("config")


def main(_: list[str]) -> int:
    result = train(TrainConfig.from_dict(_CONFIG.value.to_dict()), _WORKDIR.value)
    # As shells say it: 130 after Ctrl-C, 143 after SIGTERM; the same command resumes.
    return 0 if result.signal is None else 128 + result.signal


if __name__ == "__main__":
    cli.run(main)
