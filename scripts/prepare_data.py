"""Text -> token shards: prepare_data.py --path=book.txt --out=data/book."""

from gpt2_jax.commands.door import run  # first: what Ctrl-C does from here on

# isort: split
from absl import flags

from gpt2_jax.data.prepare import prepare, progress_bar
from gpt2_jax.data.sources import FORMATS, split_paths

_PATH = flags.DEFINE_multi_string(
    "path",
    [],
    "Text, JSON Lines (.jsonl, .jsonl.gz, .jsonl.zst) or Parquet: files, folders, "
    "patterns, URLs, hf:NAME[:CONFIG[:SPLIT]], - (standard input); with commas, or "
    "repeated. None: text that Python itself carries.",
)
_OUT = flags.DEFINE_string("out", None, "Folder to make.", required=True)
_FIELD = flags.DEFINE_string("field", "text", "Where records hold their text.")
_FORMAT = flags.DEFINE_enum("format", "auto", FORMATS, "Of files; auto: by their name.")
_TOKENIZER = flags.DEFINE_string(
    "tokenizer", "sentencepiece", "sentencepiece, char, bytes, or a tokenizer's path."
)
_VOCAB_SIZE = flags.DEFINE_integer("vocab_size", None, "For sentencepiece: 4096.")
_SPLITS = flags.DEFINE_list("splits", "0.9,0.05,0.05", "Train, validation and test.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the order of documents and of the splits.")
_SHARD_TOKENS = flags.DEFINE_integer("shard_tokens", 100_000_000, "Of a file, at most.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of others' bare shards: uint16, uint32.")
_THREADS = flags.DEFINE_integer("threads", None, "Default: one per core, at most 8.")


def main(_: list[str]) -> None:
    kind, size = _TOKENIZER.value, _VOCAB_SIZE.value
    try:
        splits = [float(fraction) for fraction in _SPLITS.value]
    except ValueError:
        raise ValueError(f"--splits={_SPLITS.value} are not numbers") from None
    with progress_bar() as progress:
        index = prepare(
            split_paths(_PATH.value) or None,
            _OUT.value,
            kind,
            vocab_size=4096 if kind == "sentencepiece" and size is None else size,
            splits=splits,
            seed=_SEED.value,
            field=_FIELD.value,
            form=_FORMAT.value,
            shard_tokens=_SHARD_TOKENS.value,
            threads=_THREADS.value,
            dtype=_DTYPE.value,
            progress=progress,
        )
    for name, part in index.splits.items():
        print(f"{name:10} {part}")
    print(f"tokenizer  {index.tokenizer_kind} {index.tokenizer_hash[:12]}")


if __name__ == "__main__":
    run(main)
