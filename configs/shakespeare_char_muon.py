"""nanoGPT's character Shakespeare setting for CPUs, with Muon.

Command:  python scripts/train.py --config=configs/shakespeare_char_muon.py
          --config.data.path=tinyshakespeare.txt --workdir=runs/shakespeare_char_muon
Hardware: 2 CPU cores.
Time:     about two minutes: with batches so small, Newton-Schulz doubles a step.
Loss:     1.600 over the whole validation split, mean of three seeds (1.5982, 1.6019,
          1.6008). AdamW's last loss is reached at step 950, 1000 and 1050 of 2000.
"""

from ml_collections import ConfigDict

from configs import shakespeare_char


def get_config() -> ConfigDict:
    c = shakespeare_char.get_config()
    c.optim.name = "muon"
    c.optim.muon_learning_rate = 4e-3  # between 2e-3 and 8e-3 the loss is within 0.04
    return c
