"""OpenAI's GPT-2 124M, fine-tuned on a text.

Command:  python scripts/train.py --config=configs/finetune_gpt2.py --workdir=runs/tuned
          --config.data.path=TEXT
          Adapters alone: --config.lora.rank=8 --config.optim.learning_rate=5e-4
          Prompts and completions: --config.data.kind=sft --config.data.path=FILE.jsonl
Hardware: one accelerator; 8 examples at a time, set --config.device_batch_size for
          fewer or more. Another model, or a local one: --config.init_from.
Tokens:   33 million, 32,768 a step.
Time:     71 seconds of updates on one H100 at 40% MFU (computed from 6N + 12LDT, not
          measured; loading, compiling and evaluation come on top).
Loss:     that of your text; not run here. eval.patience ends the run when the
          validation loss no longer falls, and step="best" loads the best checkpoint.
"""

from ml_collections import ConfigDict

from configs import default


def get_config() -> ConfigDict:
    c = default.get_config()
    c.init_from = "openai-community/gpt2"
    c.steps = 1000
    c.batch_size = 32
    c.block_size = 1024
    c.device_batch_size = 8
    c.dtype = "bfloat16"
    c.model.embd_pdrop = 0.1  # GPT-2's own; attn_pdrop would rule out fused attention
    c.model.resid_pdrop = 0.1
    c.data.packing = "documents"
    c.optim.learning_rate = 5e-5
    c.optim.min_learning_rate = 5e-6
    c.eval.every = 100
    c.eval.patience = 3
    return c
