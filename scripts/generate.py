"""Generates text from a run's checkpoint, or from any GPT-2.

python scripts/generate.py --workdir=runs/quickstart --prompt="The import statement"
python scripts/generate.py --workdir=openai-community/gpt2 --prompt="Once" --stream
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

import gpt2_jax
from gpt2_jax.commands import cli

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of a run, or whatever gpt2_jax.load takes.", required=True
)
_STEP = flags.DEFINE_string("step", None, "Of a run: number or best; none: latest.")
_PROMPT = flags.DEFINE_multi_string("prompt", [""], "Text to go on from; repeatable.")
_PROMPT_IDS = flags.DEFINE_multi_string(
    "prompt_ids", [], "Or its token ids, 15496,995; ids come out as well. Repeatable."
)
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32, bfloat16 or int8.")
_STREAM = flags.DEFINE_bool("stream", False, "Print each text as it comes.")
_DRAFT = flags.DEFINE_string(
    "draft", None, "A smaller model that guesses ahead, or prompt_lookup."
)
_N_DRAFT = flags.DEFINE_integer("n_draft", 4, "Guesses a step.")
cli.define_options()
flags.adopt_module_key_flags(cli)


def main(_: list[str]) -> None:
    lm = gpt2_jax.load(_WORKDIR.value, step=_STEP.value, dtype=_DTYPE.value)
    options = {**cli.given_options(), "n_draft": _N_DRAFT.value}
    options["draft"] = _DRAFT.value
    if _DRAFT.value not in (None, "prompt_lookup"):
        options["draft"] = gpt2_jax.load(_DRAFT.value, dtype=_DTYPE.value)
    prompts = [cli.prompt_ids(ids) for ids in _PROMPT_IDS.value] or _PROMPT.value
    if _STREAM.value:
        for prompt in prompts:
            print(_shown(prompt), end="", flush=True)
            for piece in lm.stream(prompt, **options):
                print(_shown(piece), end="", flush=True)
            print()
        return
    is_many = options.get("num_return_sequences", 1) > 1
    for given, found in zip(prompts, lm.generate(prompts, **options), strict=True):
        for one in found if is_many else [found]:
            print(_shown(given) + _shown(one))


def _shown(x: object) -> str:
    ids = x if isinstance(x, list) else [x]
    return x if isinstance(x, str) else "".join(f"{i} " for i in ids)


if __name__ == "__main__":
    run(main)
