"""Makes tokenizers from sources of text: the one of a run, or one to keep."""

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from gpt2_jax.checks import check_choice, integer
from gpt2_jax.data import sources
from gpt2_jax.data.shards import MOST
from gpt2_jax.data.sources import Paths
from gpt2_jax.fields import check_range, check_seed
from gpt2_jax.runtime.files import user_path
from gpt2_jax.runtime.partial import appears_whole
from gpt2_jax.tokenizers.files import load_tokenizer, save_tokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.tokenizers.train import (
    SENTENCEPIECE_MODELS,
    check_special_tokens,
    train_byte_level_bpe,
    train_sentencepiece,
)

# The kinds that `build_tokenizer` makes; any other name is a path.
TOKENIZER_KINDS = ("sentencepiece", "char", "bytes")
TRAINING_BYTES = 20_000_000  # SentencePiece is trained on at most this much text
SAMPLE_PART = 10_000  # characters in a part that is sampled or left out


def build_tokenizer(
    kind: str,
    path: Paths | None = None,
    vocab_size: int | None = None,
    *,
    field: str = "text",
    form: str = "auto",
) -> Tokenizer:
    """Makes or loads the tokenizer of a run.

    Args:
      kind: "sentencepiece" trains one of `vocab_size` pieces on the first 20 MB of the
        source, "char" takes all its characters, "bytes" needs no text; anything else is
        the path of a tokenizer, as for `load_tokenizer`.
      path, field, form: the text, as for `sources.documents`.
      vocab_size: required for "sentencepiece"; otherwise None, or the number of ids
        that the tokenizer must have.

    Raises:
      ValueError: when vocab_size is missing or is not what the tokenizer has.
    """
    if kind == "sentencepiece":
        if vocab_size is None:
            raise ValueError("a sentencepiece tokenizer needs vocab_size")
        return train_sentencepiece(
            _take_characters(_texts(path, field, form), TRAINING_BYTES), vocab_size
        )
    tokenizer: Tokenizer
    if kind == "char":
        tokenizer = CharTokenizer.train(_texts(path, field, form))
    elif kind == "bytes":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = load_tokenizer(kind)
    if vocab_size not in (None, tokenizer.vocab_size):
        raise ValueError(
            f"{vocab_size=}, but the tokenizer {kind!r} has {tokenizer.vocab_size}"
        )
    return tokenizer


def sample(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """Returns at most `max_bytes` of all texts, in order, chosen by seed and content.

    Texts are split into parts of 10,000 characters, and the parts with the smallest
    hashes are kept: one pass, and no more memory than the sample takes.
    """
    check_range("max_bytes", max_bytes, 1, MOST)
    key = seed.to_bytes(8, "little")
    kept: list[tuple[bytes, int, str]] = []  # a heap: the greatest hash is first
    size = number = 0
    for text in texts:
        for at in range(0, len(text), SAMPLE_PART):
            part = text[at : at + SAMPLE_PART]
            content = part.encode()
            digest = hashlib.blake2b(content, digest_size=16, key=key).digest()
            inverse = bytes(255 - byte for byte in digest)
            heapq.heappush(kept, (inverse, number, part))
            size, number = size + len(content), number + 1
            while size > max_bytes:
                size -= len(heapq.heappop(kept)[2].encode())
    return [part for _, _, part in sorted(kept, key=lambda entry: entry[1])]


def train_tokenizer(
    path: Paths | None,
    out: str | Path,
    vocab_size: int,
    *,
    model: str = "bpe",
    byte_fallback: bool = True,
    special_tokens: Sequence[str] = (),
    max_bytes: int | None = None,
    seed: int = 0,
    field: str = "text",
    form: str = "auto",
) -> Tokenizer:
    """Trains a tokenizer into the folder `out`, which appears whole or not at all.

    Args:
      path, field, form: the text, as for `sources.documents`.
      out: the folder to create.
      vocab_size: number of ids, special tokens included.
      model: bpe, unigram or char of SentencePiece, or byte_level: GPT-2's kind.
      byte_fallback, special_tokens: as for `train_sentencepiece`.
      max_bytes: trains on a `sample` of this size; None: on all the text, which is
        held in memory.
      seed: chooses the sample.

    Raises:
      FileExistsError: when `out` exists.
      ValueError, OSError: as `sources.documents`, `train_sentencepiece` and
        `train_byte_level_bpe`.
    """
    out = user_path(out).absolute()
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    check_choice("model", model, (*SENTENCEPIECE_MODELS, "byte_level"))
    vocab_size = integer("vocab_size", vocab_size)
    if max_bytes is not None:
        max_bytes = integer("max_bytes", max_bytes)
    check_seed(seed)
    check_special_tokens(special_tokens)
    if model == "byte_level" and not byte_fallback:
        raise ValueError("byte_fallback=False: a byte-level BPE has nothing else")
    with sources.streams_stored(path, form) as path:
        texts: Iterable[str] = _texts(path, field, form)
        if max_bytes is not None:
            texts = sample(texts, max_bytes, seed)
        tokenizer: Tokenizer
        if model == "byte_level":
            tokenizer = train_byte_level_bpe(
                texts, vocab_size, special_tokens=special_tokens
            )
        else:
            tokenizer = train_sentencepiece(
                texts,
                vocab_size,
                model_type=model,
                byte_fallback=byte_fallback,
                special_tokens=special_tokens,
            )
    with appears_whole(out) as partial:
        save_tokenizer(tokenizer, partial)
    return tokenizer


def _texts(path: Paths | None, field: str, form: str) -> Iterator[str]:
    for document in sources.documents(path, field=field, form=form):
        yield from document.texts()


def _take_characters(texts: Iterator[str], size: int) -> Iterator[str]:
    """Yields texts until they have about `size` characters."""
    for text in texts:
        yield text
        size -= len(text)
        if size <= 0:
            return
