"""GPT-2 1558M from scratch on accelerators, parameters and optimizer state sharded.

Command:  python scripts/train.py --config=configs/gpt2_1558m.py --workdir=runs/1558m
          --config.data.path=data/text  (prepared as in configs/gpt2_124m.py)
Hardware: 8 accelerators of 80 GB or more, 2 examples each at a time.
Tokens:   34 billion, 1 million a step, as llm.c's scripts/run_gpt2_1558M.sh.
Time:     30 hours on 8 H100 at 40% MFU (computed from 6N + 12LDT, not measured).
Loss:     none is known for this recipe, and it was not run here. OpenAI's own weights
          have 2.54 on OpenWebText (nanoGPT's README).
"""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    c = gpt2_124m.get_config()
    c.steps = 32_000
    c.batch_size = 1024
    c.device_batch_size = 2
    c.model.n_embd = 1600
    c.model.n_layer = 48
    c.model.n_head = 25
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
