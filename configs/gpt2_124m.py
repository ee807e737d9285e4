"""GPT-2 124M from scratch on accelerators.

Command:  python scripts/prepare_data.py --path=TEXT --out=data/text
          --tokenizer=FOLDER_WITH_GPT2_VOCABULARY
          python scripts/train.py --config=configs/gpt2_124m.py --workdir=runs/124m
          --config.data.path=data/text
Hardware: 8 accelerators of 80 GB or more, 8 examples each at a time; with fewer of
          them more microbatches are added up, for smaller ones set
          --config.device_batch_size.
Tokens:   10 billion, 0.5 million a step, as llm.c's scripts/run_gpt2_124M.sh.
Time:     0.8 hours on 8 H100 at 40% MFU (computed from 6N + 12LDT, not measured).
Loss:     3.28 on FineWeb (llm.c's, as modded-nanogpt's README first gave it; its rate
          ends at 0). nanoGPT with 300 billion tokens of OpenWebText: about 2.85 there.
          Not run here.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.steps = 19_073
    c.batch_size = 512
    c.block_size = 1024
    c.device_batch_size = 8
    c.dtype = "bfloat16"
    c.model.vocab_size = 50_304  # 50257 and padding, which is never drawn
    c.model.n_positions = 1024
    c.model.n_embd = 768
    c.model.n_layer = 12
    c.model.n_head = 12
    c.data.tokenizer = "the folder of GPT-2's vocab.json and merges.txt"
    c.data.vocab_size = 0
    c.data.splits = (0.999, 0.001, 0.0)
    c.optim.learning_rate = 6e-4
    c.optim.min_learning_rate = 6e-5
    c.optim.warmup_steps = 700
    c.eval.every = 250
    c.eval.examples = 1280
    c.checkpoint.every = 1000
    return c
