"""Trains a small GPT-2 on text that every Python installation carries.

Command:  python scripts/train.py --config=configs/quickstart.py --workdir=runs/mine
Hardware: 2 CPU cores.
Time:     about 2 minutes.
Loss:     4.77 on the validation split.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.steps = 600
    c.batch_size = 16
    c.block_size = 128
    c.model.n_positions = 128
    c.model.n_embd = 128
    c.model.n_layer = 4
    c.model.n_head = 4
    c.data.vocab_size = 2048
    c.optim.learning_rate = 2e-3
    c.optim.min_learning_rate = 2e-4
    c.optim.warmup_steps = 50
    c.eval.every = 50
    c.eval.sample_prompt = "The "
    c.eval.sample_tokens = 40
    c.checkpoint.every = 200
    return c
