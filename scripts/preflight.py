"""Plans a training run: its size, memory and time on a chip, compiled on this CPU.

python scripts/preflight.py --config=configs/gpt2_124m.py --chip=h100 --n_devices=8
python scripts/preflight.py --config=configs/gpt2_124m.py --chip=v4 --n_devices=16

The second is a v4-32: names of TPU v3, v4 and v5p slices count cores, of which a chip
has two; n_devices is what `jax.device_count()` says there. Exits with 1 when the run
does not fit as given.
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
import sys

from absl import flags
from ml_collections import config_flags

from gpt2_jax.runtime.chips import CHIPS, chip_named
from gpt2_jax.training import preflight
from gpt2_jax.training.config import TrainConfig
from gpt2_jax.training.metrics import EXPECTED_MFU

_CONFIG = config_flags.DEFINE_config_file("config", None, "The run: configs/NAME.py.")
_CHIP = flags.DEFINE_string(
    "chip", "h100", f"One of {', '.join(chip.name for chip in CHIPS)}."
)
_N_DEVICES = flags.DEFINE_integer("n_devices", 8, "Chips, as JAX counts devices.")
_MFU = flags.DEFINE_float("mfu", EXPECTED_MFU, "Share of the chip's peak to expect.")
flags.mark_flag_as_required("config")


def main(_: list[str]) -> int:
    preflight.fake_devices(_N_DEVICES.value)
    plan = preflight.plan(
        TrainConfig.from_dict(_CONFIG.value),
        chip_named(_CHIP.value),
        _N_DEVICES.value,
        _MFU.value,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(preflight.render(plan))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    run(main)
