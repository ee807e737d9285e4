"""GPT-2 355M from scratch on accelerators.

Command:  python scripts/train.py --config=configs/gpt2_355m.py --workdir=runs/355m
          --config.data.path=data/text  (prepared as in configs/gpt2_124m.py)
Hardware: 8 accelerators of 80 GB or more, 8 examples each at a time.
Tokens:   31 billion, 0.5 million a step, as llm.c's scripts/run_gpt2_350M.sh.
Time:     6.7 hours on 8 H100 at 40% MFU (computed from 6N + 12LDT, not measured).
Loss:     none is known for this recipe, and it was not run here. OpenAI's own weights
          have 2.84 on OpenWebText (nanoGPT's README).
"""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    c = gpt2_124m.get_config()
    c.steps = 60_000
    c.model.n_embd = 1024
    c.model.n_layer = 24
    c.model.n_head = 16
    c.optim.learning_rate = 3e-4
    c.optim.min_learning_rate = 0.0
    return c
