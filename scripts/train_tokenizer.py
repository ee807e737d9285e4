"""Text -> tokenizer: train_tokenizer.py --path=texts/ --out=tokenizer --vocab_size=8000

Its folder is what --tokenizer of prepare_data.py and data.tokenizer of a config take.
"""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

from gpt2_jax.data.make_tokenizer import train_tokenizer
from gpt2_jax.data.sources import FORMATS, split_paths
from gpt2_jax.tokenizers.files import tokenizer_hash
from gpt2_jax.tokenizers.train import SENTENCEPIECE_MODELS

_PATH = flags.DEFINE_multi_string("path", None, "As of prepare_data.", required=True)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "Number of ids.", required=True)
_MODEL = flags.DEFINE_enum(
    "model",
    "bpe",
    (*SENTENCEPIECE_MODELS, "byte_level"),
    "Of SentencePiece; byte_level: GPT-2's kind, which needs the package tokenizers.",
)
_BYTE_FALLBACK = flags.DEFINE_bool(
    "byte_fallback", True, "SentencePiece: unknown characters are written as bytes."
)
_SPECIAL_TOKENS = flags.DEFINE_list(
    "special_tokens", [], "Names of ids that no text is encoded to, with commas."
)
_MAX_BYTES = flags.DEFINE_integer(
    "max_bytes", 20_000_000, "Of text to train on, a sample of the source; 0: all."
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the sample.")
_FIELD = flags.DEFINE_string("field", "text", "Where records hold their text.")
_FORMAT = flags.DEFINE_enum("format", "auto", FORMATS, "Of files; auto: by their name.")


def main(_: list[str]) -> None:
    tokenizer = train_tokenizer(
        split_paths(_PATH.value),
        _OUT.value,
        _VOCAB_SIZE.value,
        model=_MODEL.value,
        byte_fallback=_BYTE_FALLBACK.value,
        special_tokens=_SPECIAL_TOKENS.value,
        max_bytes=_MAX_BYTES.value or None,
        seed=_SEED.value,
        field=_FIELD.value,
        form=_FORMAT.value,
    )
    print(
        f"{_OUT.value}: {tokenizer.kind} of {tokenizer.vocab_size} ids, "
        f"{tokenizer_hash(tokenizer)[:12]}"
    )


if __name__ == "__main__":
    run(main)
