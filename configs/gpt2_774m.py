"""GPT-2 774M from scratch on accelerators, parameters and optimizer state sharded.

Command:  python scripts/train.py --config=configs/gpt2_774m.py --workdir=runs/774m
          --config.data.path=data/text  (prepared as in configs/gpt2_124m.py)
Hardware: 8 accelerators of 80 GB or more, 4 examples each at a time.
Tokens:   150 billion, 0.5 million a step, as llm.c's scripts/run_gpt2_774M.sh.
Time:     69 hours on 8 H100 at 40% MFU (computed from 6N + 12LDT, not measured).
Loss:     none is known for this recipe, and it was not run here. OpenAI's own weights
          have 2.67 on OpenWebText (nanoGPT's README).
"""

from ml_collections import ConfigDict

from configs import gpt2_124m


def get_config() -> ConfigDict:
    c = gpt2_124m.get_config()
    c.steps = 286_102
    c.device_batch_size = 4
    c.model.n_embd = 1280
    c.model.n_layer = 36
    c.model.n_head = 20
    c.optim.learning_rate = 2.5e-4
    c.optim.min_learning_rate = 0.0
    c.mesh.data = 1
    c.mesh.fsdp = -1
    return c
