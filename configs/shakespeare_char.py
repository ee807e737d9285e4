"""nanoGPT's character Shakespeare setting for CPUs.

Command:  python scripts/train.py --config=configs/shakespeare_char.py
          --config.data.path=tinyshakespeare.txt --workdir=runs/shakespeare_char
Hardware: 2 CPU cores.
Time:     about a minute.
Loss:     1.804 over the whole validation split, mean of three seeds.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.steps = 2000
    c.batch_size = 12
    c.block_size = 64
    c.model.n_positions = 64
    c.model.n_embd = 128
    c.model.n_layer = 4
    c.model.n_head = 4
    c.model.bias = False
    c.data.tokenizer = "char"
    c.data.vocab_size = 0
    c.data.splits = (0.9, 0.1, 0.0)
    c.optim.learning_rate = 2e-3  # nanoGPT: 1e-3, with which both end near 1.90
    c.optim.min_learning_rate = 2e-4
    c.optim.warmup_steps = 100
    c.optim.b2 = 0.99
    c.eval.every = 250
    c.checkpoint.every = 500
    return c
