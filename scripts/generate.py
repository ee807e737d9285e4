"""Generates text from a run's checkpoint, or from any GPT-2.

python scripts/generate.py --workdir=runs/quickstart --prompt="The import statement"
"""

from absl import flags

import gpt2_jax
from gpt2_jax import cli

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run, or whatever gpt2_jax.load takes.", required=True
)
_STEP = flags.DEFINE_integer("step", None, "Checkpoint; none: the latest.")
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to go on from; repeatable.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 100, "At most so many.")
_TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0: the most probable token.")
_TOP_K = flags.DEFINE_integer("top_k", 0, "Draw from the k most probable; 0: all.")
_TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw from this probability mass; 1: all.")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "1: none.")
_SEED = flags.DEFINE_integer("seed", None, "Same seed, same text; none: fresh.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16.")


def main(_: list[str]) -> None:
    lm = gpt2_jax.load(_WORKDIR.value, step=_STEP.value, dtype=_DTYPE.value)
    texts = lm.generate(
        _PROMPT.value,
        max_new_tokens=_MAX_NEW_TOKENS.value,
        temperature=_TEMPERATURE.value,
        top_k=_TOP_K.value,
        top_p=_TOP_P.value,
        repetition_penalty=_REPETITION_PENALTY.value,
        seed=_SEED.value,
    )
    for prompt, text in zip(_PROMPT.value, texts, strict=True):
        print(prompt + text)


if __name__ == "__main__":
    cli.run(main)
