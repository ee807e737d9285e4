"""Text -> token shards: prepare_data.py --path=book.txt --out=data/book."""

import sys

from absl import flags
from tqdm import tqdm

from gpt2_jax import cli
from gpt2_jax.data.prepare import build_tokenizer, fingerprint, prepare

_PATH = flags.DEFINE_string(
    "path", None, "Text file, or folder of them; none: text that Python itself carries."
)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "sentencepiece", "sentencepiece, char, bytes, or a tokenizer's path."
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "For sentencepiece: 4096.")
_SPLITS = flags.DEFINE_list("splits", "0.9,0.05,0.05", "Train, validation and test.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the order of documents.")


def main(_: list[str]) -> None:
    path = _PATH.value or None
    kind, vocab_size = _TOKENIZER.value, _VOCAB_SIZE.value
    if kind == "sentencepiece" and vocab_size is None:
        vocab_size = 4096
    try:
        fractions = [float(fraction) for fraction in _SPLITS.value]
    except ValueError:
        raise ValueError(f"--splits={_SPLITS.value} are not numbers") from None
    seed = _SEED.value
    source = fingerprint(
        path, tokenizer=kind, vocab_size=vocab_size, splits=fractions, seed=seed
    )
    tokenizer = build_tokenizer(kind, path, vocab_size)
    quiet = not sys.stderr.isatty()
    with tqdm(total=source["bytes"], unit="B", unit_scale=True, disable=quiet) as bar:
        index = prepare(
            path,
            _OUT.value,
            tokenizer,
            splits=fractions,
            seed=seed,
            source=source,
            progress=bar.update,
        )
    for name, part in index.splits.items():
        print(
            f"{name:10} {part.documents} documents, {part.tokens} tokens, "
            f"{part.bytes / part.tokens:.2f} bytes per token"
        )


if __name__ == "__main__":
    cli.run(main)
