"""Trained tokenizers: exact for every text, special tokens apart, bad requests."""

import json
import sys
from pathlib import Path

import pytest
from test_tokenizer import PROSE, random_texts

from gpt2_jax.data.make_tokenizer import sample, train_tokenizer
from gpt2_jax.tokenizers.files import load_tokenizer, tokenizer_hash

SPECIAL = ("<|user|>", "<|assistant|>")
CHINESE = "床前明月光疑是地上霜。举头望明月低头思故乡。\n春眠不觉晓处处闻啼鸟。\n" * 20
CORPUS = PROSE + CHINESE + "if x:\n\treturn '🙂👩‍👩‍👧'\n" * 20


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(CORPUS)
    return path


@pytest.mark.parametrize(
    ("model", "size"),
    [("bpe", 380), ("unigram", 355), ("char", 330), ("byte_level", 380)],
)
def test_round_trips_and_special_tokens(
    corpus: Path, tmp_path: Path, model: str, size: int
):
    made = train_tokenizer(
        corpus, tmp_path / "t", size, model=model, special_tokens=SPECIAL
    )
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer_hash(tokenizer) == tokenizer_hash(made)
    assert tokenizer.vocab_size == size
    special = [
        i for i, t in enumerate(tokenizer.token_bytes) if t.decode("latin-1") in SPECIAL
    ]
    assert len(special) == 2
    forbidden = {*special, tokenizer.eot_id, tokenizer.unk_id}
    texts = [
        *random_texts(300, seed=1),
        CORPUS,
        "".join(SPECIAL) + "<|endoftext|><unk>",
    ]
    for text in texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert forbidden.isdisjoint(ids)
        assert tokenizer.encode_array(text).tolist() == ids
    assert len(tokenizer.encode(CORPUS)) < len(CORPUS.encode())
    first = tokenizer.encode("a")
    assert (
        tokenizer.decode([special[0], *first, special[1]]) == "<|user|>a<|assistant|>"
    )
    plain = train_tokenizer(corpus, tmp_path / "plain", size - 2, model=model)
    assert tokenizer_hash(plain) != tokenizer_hash(made)
    again = train_tokenizer(
        corpus, tmp_path / "again", size, model=model, special_tokens=SPECIAL
    )
    assert tokenizer_hash(again) == tokenizer_hash(made)


def test_byte_level_ids_are_those_of_the_library(corpus: Path, tmp_path: Path):
    import tokenizers

    tokenizer = train_tokenizer(corpus, tmp_path / "t", 400, model="byte_level")
    vocab, merges = str(tmp_path / "t/vocab.json"), str(tmp_path / "t/merges.txt")
    theirs = tokenizers.ByteLevelBPETokenizer(vocab, merges)
    for text in [*random_texts(200, seed=2), CORPUS]:
        assert tokenizer.encode(text) == theirs.encode(text).ids


def test_without_byte_fallback_the_unknown_is_counted(corpus: Path, tmp_path: Path):
    tokenizer = train_tokenizer(
        corpus, tmp_path / "t", 70, model="char", byte_fallback=False
    )
    assert tokenizer.unk_id == 0
    assert tokenizer.encode("a€b").count(0) == 1
    assert tokenizer.decode(tokenizer.encode("a€b")) == "a\ufffdb"


def test_samples_are_seeded_and_bounded():
    texts = [f"{n:06d}" * 500 for n in range(300)]
    first, again, other = (sample(texts, 100_000, seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first == [text for text in texts if text in set(first)]  # in order
    assert 97_000 < sum(map(len, first)) <= 100_000
    places = [texts.index(text) for text in first]
    assert 100 < sum(places) / len(places) < 200  # 150 expected, deviation 15
    assert sample(texts, 10**9, 0) == texts


@pytest.mark.parametrize(
    ("vocab_size", "options", "message"),
    [
        (
            257,
            {},
            "vocab_size=257 is too small: 256 bytes and 2 special pieces need 258",
        ),
        (1, {"byte_fallback": False}, "too small: 2 special pieces need 2"),
        (300, {}, "too small for this text, whose characters need at least"),
        (9000, {}, "vocab_size=9000 is too large for this text"),
        (9000, {"model": "unigram"}, "vocab_size=9000 is too large for this text"),
        (257, {"model": "byte_level", "special_tokens": ["<|a|>"]}, "need 258"),
        (
            9000,
            {"model": "byte_level"},
            "too large for this text, which yields at most",
        ),
        (400, {"model": "word"}, "model='word' is not one of bpe, unigram, char, byte"),
        (400, {"model": "byte_level", "byte_fallback": False}, "byte_fallback=False"),
        (400, {"special_tokens": [""]}, "special token '' is empty"),
        (400, {"special_tokens": ["<a b>"]}, "has a space or comma"),
        (400, {"special_tokens": ["<a>", "<a>"]}, "'<a>' is there already"),
        (400, {"special_tokens": ["<|endoftext|>"]}, "is there already"),
        (
            400,
            {"special_tokens": ["the"], "model": "byte_level"},
            "of the text as well",
        ),
        (400, {"max_bytes": 0}, "max_bytes=0 must be >= 1"),
        (400, {"seed": -1}, "seed=-1 must be in"),
    ],
)
def test_bad_requests(corpus: Path, tmp_path: Path, vocab_size, options, message):
    with pytest.raises(ValueError, match=message):
        train_tokenizer(corpus, tmp_path / "t", vocab_size, **options)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(corpus: Path, tmp_path: Path):
    (tmp_path / "t").mkdir()
    with pytest.raises(FileExistsError, match="t exists already"):
        train_tokenizer(corpus, tmp_path / "t", 300)


def test_the_library_is_named_where_it_is_missing(corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install 'gpt2-jax\[tokenizers\]'"):
        train_tokenizer(corpus, tmp_path / "t", 300, model="byte_level")


def test_records_are_read_as_well(tmp_path: Path):
    lines = "".join(json.dumps({"body": line}) + "\n" for line in CORPUS.splitlines())
    (tmp_path / "c.jsonl").write_text(lines)
    made = train_tokenizer(tmp_path / "c.jsonl", tmp_path / "t", 350, field="body")
    assert made.decode(made.encode(CHINESE)) == CHINESE
