"""Trains tokenizers on text: byte-level BPE as GPT-2's, and SentencePiece."""

import json
import re
from collections.abc import Iterable, Iterator, Sequence

from gpt2_jax.checks import check_choice, check_text, integer, items
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_jax.tokenizers.token_roles import END_OF_TEXT

SENTENCEPIECE_MODELS = ("bpe", "unigram", "char")
# Characters by which SentencePiece's trainer marks a space and an unknown character.
_RESERVED = re.compile("[\u2581\u2585]")
_MAX_SENTENCE = 1 << 20  # characters


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, *, special_tokens: Sequence[str] = ()
) -> GPT2Tokenizer:
    """Trains GPT-2's kind of BPE with the library tokenizers (the extra `tokenizers`).

    Ids: the 256 bytes, the merges in order, the end of text, special_tokens. The same
    texts, in the same parts, give the same tokenizer.

    Raises:
      ValueError: when the text cannot fill vocab_size, or the bytes and special tokens
        do not fit in it, naming the limit; on special tokens as `check_special_tokens`;
        and when the library is missing.
    """
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "training a byte-level BPE needs the package tokenizers: "
            "pip install 'gpt2-jax[tokenizers]'"
        ) from None
    check_special_tokens(special_tokens)
    vocab_size = integer("vocab_size", vocab_size)
    special = [END_OF_TEXT, *special_tokens]
    least = 256 + len(special)
    if vocab_size < least:
        raise ValueError(
            f"{vocab_size=} is too small: 256 bytes and {len(special)} special tokens "
            f"need {least}"
        )
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = byte_level
    bpe.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(special),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = model["vocab"]
    if len(vocab) + len(special) < vocab_size:
        raise ValueError(_too_large(vocab_size, len(vocab) + len(special)))
    for name in special:
        if name in vocab:
            raise ValueError(f"special token {name!r} is a token of the text as well")
        vocab[name] = len(vocab)
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    return GPT2Tokenizer(
        {
            "vocab.json": json.dumps(vocab, ensure_ascii=False).encode(),
            "merges.txt": f"#version: 0.2\n{merges}".encode(),
        }
    )


def train_sentencepiece(
    texts: Iterable[str],
    vocab_size: int,
    *,
    model_type: str = "bpe",
    byte_fallback: bool = True,
    special_tokens: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Trains a SentencePiece model; 2 MB of text take about a second as BPE.

    Nothing is normalized, and runs of spaces and newlines may become pieces. The same
    texts give the same model. The text is held in memory.

    Args:
      texts: the corpus, split anywhere.
      vocab_size: number of ids, special pieces included.
      model_type: bpe, unigram or char; char takes the most frequent characters.
      byte_fallback: whether unknown characters are encoded as bytes, which makes every
        text exact; otherwise they become the unknown piece.
      special_tokens: names of ids that no text is encoded to; they follow the unknown
        piece and the end of text.

    Raises:
      ValueError: when the corpus cannot fill vocab_size, or the 256 bytes, the special
        pieces and the corpus's characters do not fit in it, naming the limit; and on
        special tokens as `check_special_tokens`.
    """
    import io

    import sentencepiece

    check_choice("model_type", model_type, SENTENCEPIECE_MODELS)
    check_special_tokens(special_tokens)
    vocab_size = integer("vocab_size", vocab_size)
    n_special = 2 + len(special_tokens)
    if vocab_size < (least := 256 * byte_fallback + n_special):
        what = "256 bytes and " if byte_fallback else ""
        raise ValueError(
            f"{vocab_size=} is too small: {what}{n_special} special pieces need {least}"
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            byte_fallback=byte_fallback,
            control_symbols=list(special_tokens),
            unk_id=0,
            eos_id=1,
            eos_piece=END_OF_TEXT,
            bos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * _MAX_SENTENCE,  # in bytes; longer ones are dropped
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_training_error(str(error), vocab_size)) from error
    tokenizer = SentencePieceTokenizer(model.getvalue())
    if tokenizer.vocab_size != vocab_size:  # char stops when it has all characters
        raise ValueError(_too_large(vocab_size, tokenizer.vocab_size))
    return tokenizer


def check_special_tokens(names: Sequence[str]) -> None:
    """Raises ValueError on a name that is empty, has white space, or occurs twice.

    Commas are refused because they separate names in SentencePiece's options.
    """
    names = [
        check_text("special token", name) for name in items("special_tokens", names)
    ]
    for n, name in enumerate(names):
        if not name or re.search(r"[\s,\u2581]", name):
            raise ValueError(
                f"special token {name!r} is empty, or has a space or comma"
            )
        if name in (END_OF_TEXT, "<unk>", *names[:n]):
            raise ValueError(f"special token {name!r} is there already")


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yields texts without the characters that make the trainer drop a sentence."""
    for text in texts:
        check_text("text", text)
        for part in _RESERVED.split(text):
            for at in range(0, len(part), _MAX_SENTENCE):
                yield part[at : at + _MAX_SENTENCE]


def _training_error(message: str, vocab_size: int) -> str:
    """Returns SentencePiece's message as one line that names the limit."""
    if "sentences_.empty()" in message:
        return "no text to train a tokenizer on"
    if found := re.search(r"Vocabulary size too high .* <= (\d+)", message):
        return _too_large(vocab_size, int(found[1]))
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"{vocab_size=} is too small for this text, whose characters need "
            f"at least {found[1]} pieces"
        )
    return f"SentencePiece could not be trained with {vocab_size=}: {message}"


def _too_large(vocab_size: int, most: int) -> str:
    return (
        f"{vocab_size=} is too large for this text, which yields at most {most} pieces"
    )
