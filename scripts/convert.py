"""Writes a GPT-2, whoever wrote it, in another format.

python scripts/convert.py --model=runs/quickstart --to=hf --out=export
python scripts/convert.py --model=openai-community/gpt2 --to=llmc --out=gpt2.bin
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

from gpt2_jax.formats.convert import OUTPUT_FORMATS, convert

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "A run's folder, a Hugging Face folder or hub name, an OpenAI checkpoint folder, "
    "a nanoGPT ckpt.pt or an llm.c .bin.",
    required=True,
)
_TO = flags.DEFINE_enum("to", None, OUTPUT_FORMATS, "The format.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder or file to make.", required=True)
_STEP = flags.DEFINE_string("step", None, "Of a run: number or best; none: latest.")
_REVISION = flags.DEFINE_string("revision", None, "Of a model on the hub.")
_DTYPE = flags.DEFINE_string("dtype", "float32", "float32 or bfloat16, of the file.")
_MAX_SHARD_BYTES = flags.DEFINE_integer("max_shard_bytes", 5 * 10**9, "Of hf's files.")


def main(_: list[str]) -> None:
    convert(
        _MODEL.value,
        _TO.value,
        _OUT.value,
        step=_STEP.value,
        revision=_REVISION.value,
        dtype=_DTYPE.value,
        max_shard_bytes=_MAX_SHARD_BYTES.value,
    )
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    run(main)
