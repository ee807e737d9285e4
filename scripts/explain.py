"""Writes a page that shows what a model made of a text: probability and attention.

python scripts/explain.py --workdir=runs/quickstart --prompt="A class" --out=page.html
python scripts/explain.py --model=openai-community/gpt2 --prompt="Once" --out=page.html
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

import gpt2_jax

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of a run.")
_MODEL = flags.DEFINE_string("model", None, "Or whatever gpt2_jax.load takes.")
_STEP = flags.DEFINE_string("step", None, "Of a run: number or best; none: latest.")
_PROMPT = flags.DEFINE_string("prompt", None, "The text.", required=True)
_OUT = flags.DEFINE_string("out", None, "HTML file to make.", required=True)
_TOP_K = flags.DEFINE_integer("top_k", 10, "Alternatives to show for each token.")
flags.mark_flags_as_mutual_exclusive(["workdir", "model"], required=True)


def main(_: list[str]) -> None:
    lm = gpt2_jax.load(_WORKDIR.value or str(_MODEL.value), step=_STEP.value)
    lm.explain(_PROMPT.value, top_k=_TOP_K.value).save(_OUT.value)
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    run(main)
