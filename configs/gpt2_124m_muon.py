"""GPT-2 124M from scratch with Muon, and a rate that holds until the last fifth.

Command:  python scripts/train.py --config=configs/gpt2_124m_muon.py
          --workdir=runs/124m_muon --config.data.path=data/text  (prepared as in
          configs/gpt2_124m.py)
Hardware: 8 accelerators of 80 GB or more, 8 examples each at a time.
Tokens:   10 billion, 0.5 million a step.
Time:     0.8 hours on 8 H100 at 40% MFU (computed from 6N + 12LDT, not measured; the
          five Newton-Schulz steps add less than 1%).
Loss:     none is known for this recipe, and it was not run here. To compare:
          configs/gpt2_124m.py.
"""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    c = gpt2_124m.get_config()
    c.optim.name = "muon"
    c.optim.schedule = "wsd"
    c.optim.decay_steps = 3800
    c.optim.min_learning_rate = 0.0
    return c
