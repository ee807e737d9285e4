"""Added tokens and what a folder says of them, against the library tokenizers."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

import tokenizers
from gpt2_jax.tokenizers.added_tokens import AddedToken, AddedTokens
from gpt2_jax.tokenizers.files import (
    load_tokenizer,
    save_tokenizer,
    tokenizer_from_files,
    tokenizer_hash,
)
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.gpt2_files import BYTE_OF_CHARACTER

END = "<|endoftext|>"
MERGES = [("t", "h"), ("th", "e"), ("Ġ", "the")]
FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")
# White space by Unicode and by Python alone, letters, marks, digits, symbols that count
# as letters, joiners; and pieces that overlap.
PIECES = [*"ab19_ -.\t\n\x0b\x1c\x1f\x85\xa0\u1680\u2009\u2028\u3000\u200b\u200c\u200d"]
PIECES += [
    "é",
    "e\u0301",
    "中",
    "²",
    "Ⅷ",
    "ⓐ",
    "🅰",
    "٣",
    "‿",
    "\u0903",
    "🙂",
    "the",
    END,
]
CONTENTS = ["a", "ab", "aba", "b a", " ", "  ", " a", "a ", "the", "the b", "é", "中"]
CONTENTS += ["<|im_start|>", "<|im", "|>", "ⓐ", "\u3000", "1", "19", "_", "\n", ".a"]


def vocabulary() -> dict[str, int]:
    vocab = {c: i for i, c in enumerate(BYTE_OF_CHARACTER)}
    for left, right in MERGES:
        vocab[left + right] = len(vocab)
    return vocab | {END: len(vocab)}


def tokenizer_json(added: list[dict], *, prefix: bool = False, **changes) -> bytes:
    byte_level = {"type": "ByteLevel", "add_prefix_space": prefix}
    byte_level |= {"trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False}
    model |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    model |= {"vocab": vocabulary(), "merges": [f"{a} {b}" for a, b in MERGES]}
    data = {"version": "1.0", "truncation": None, "padding": None}
    data |= {"added_tokens": added, "normalizer": None, "pre_tokenizer": byte_level}
    data |= {"post_processor": None, "decoder": byte_level, "model": model, **changes}
    return json.dumps(data).encode()


def entry(content: str, i: int, *flags: str) -> dict:
    return {"id": i, "content": content, **{flag: flag in flags for flag in FLAGS}}


ENTRY = entry(END, 259, "special")


@pytest.mark.parametrize("seed", range(30))
def test_every_flag_gives_the_ids_of_the_library(seed):
    rng = random.Random(seed)
    contents = rng.sample(CONTENTS, rng.randint(1, 8))
    added, vocab = [ENTRY], vocabulary()
    for content in contents:
        i = vocab.setdefault(content, len(vocab))
        added.append(entry(content, i, *(f for f in FLAGS if rng.random() < 0.4)))
    file = tokenizer_json(added, prefix=seed % 4 == 0)
    ours = GPT2Tokenizer({"tokenizer.json": file})
    theirs = tokenizers.Tokenizer.from_str(file.decode())
    assert ours.vocab_size == theirs.get_vocab_size()
    for _ in range(40):
        pieces = [rng.choice(rng.choice((PIECES, contents))) for _ in range(9)]
        text = "".join(pieces[: rng.randint(0, 9)])
        for parse in (False, True):
            theirs.encode_special_tokens = not parse
            try:
                ids = theirs.encode(text, add_special_tokens=False).ids
            except BaseException as error:  # a panic in Rust is no Exception
                if "bad split" not in str(error):  # of tokens that overlap
                    raise
                continue
            assert ours.encode(text, parse_special=parse) == ids, (text, parse)
        assert ours.encode_array(text).tolist() == ours.encode(text)
    assert sum(map(len, ours.token_bytes)) > 256
    assert [ours.decode([i["id"]]) for i in added[1:] if len(i["content"]) > 2] == [
        i["content"] for i in added[1:] if len(i["content"]) > 2
    ]


def test_special_tokens_in_text_stay_text():
    file = tokenizer_json([ENTRY, entry("covid19", 260), entry("<|x|>", 261, FLAGS[0])])
    tokenizer = GPT2Tokenizer({"tokenizer.json": file})
    text = f"covid19{END}<|x|> the"
    ids = tokenizer.encode(text)
    assert (ids[0], 259 in ids, 261 in ids) == (260, False, False)
    assert tokenizer.encode(text, parse_special=True) == [260, 259, 261, 258]
    assert tokenizer.decode(ids) == text == tokenizer.decode([260, 259, 261, 258])


def test_many_tokens_and_long_texts_take_linear_time():
    tokens = [AddedToken(f"<{i}>", i, rstrip=True, lstrip=True) for i in range(2000)]
    parts = AddedTokens(tokens).split("a <7>   " * 20_000, parse_special=False)
    assert parts[:4] == ["a", 7, "a", 7]
    assert len(parts) == 40_000


# --- Folders


def folder(path: Path, files: dict[str, object]) -> GPT2Tokenizer:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (path / name).write_bytes(raw)
    tokenizer = load_tokenizer(path)
    assert isinstance(tokenizer, GPT2Tokenizer)
    return tokenizer


SLOW = {
    "vocab.json": json.dumps(vocabulary()).encode(),
    "merges.txt": "".join(f"{a} {b}\n" for a, b in MERGES).encode(),
}
FAST = {"tokenizer.json": tokenizer_json([ENTRY, entry("<|im_end|>", 260, "special")])}
GPT2 = {"model_type": "gpt2", "n_embd": 8}


@pytest.mark.parametrize(
    ("files", "eot", "bos", "ends"),
    [
        (SLOW, 259, 259, (259,)),
        ({**SLOW, "config.json": {**GPT2, "eos_token_id": 7}}, 259, 259, (7,)),
        ({**FAST, "config.json": {**GPT2, "eos_token_id": [260, 259]}}, 259, 259,
         (260, 259)),
        ({**FAST, "config.json": {**GPT2, "eos_token_id": 259},
          "generation_config.json": {"eos_token_id": [260], "bos_token_id": 5}},
         259, 5, (260,)),
        ({**FAST, "config.json": {**GPT2, "eos_token_id": 260},
          "generation_config.json": {}}, 259, 259, (259,)),
        ({**FAST, "config.json": {**GPT2, "eos_token_id": None}}, 259, 259, (259,)),
        ({**FAST, "config.json": GPT2}, 259, 259, (259,)),  # 50256 has no token
        ({**FAST, "tokenizer_config.json": {"eos_token": "<|im_end|>"}}, 260, 260,
         (260,)),
        ({**FAST, "special_tokens_map.json": {
            "eos_token": {"content": "<|im_end|>", "lstrip": False}, "bos_token": END}},
         260, 259, (260,)),
        ({**SLOW, "added_tokens.json": {"</s>": 260},
          "tokenizer_config.json": {"eos_token": "</s>", "bos_token": "a"}}, 260, 64,
         (260,)),
        ({**SLOW, "tokenizer_config.json": {"eos_token": "</s>"}}, 260, 260, (260,)),
    ],
)  # fmt: skip
def test_what_begins_and_ends_a_text(tmp_path, files, eot, bos, ends):
    tokenizer = folder(tmp_path / "in", files)
    assert (tokenizer.eot_id, tokenizer.bos_id, tokenizer.end_ids) == (eot, bos, ends)
    save_tokenizer(tokenizer, tmp_path / "out")  # as a run's checkpoint has it
    back = load_tokenizer(tmp_path / "out")
    assert (back.eot_id, back.bos_id, back.end_ids) == (eot, bos, ends)
    assert tokenizer_hash(back) == tokenizer_hash(tokenizer)
    trained = tokenizer.as_trained()
    assert (trained.bos_id, set(trained.end_ids)) == (eot, {eot, *ends})
    alone = {name: files[name] for name in files if name in (*SLOW, *FAST)}
    plain = tokenizer_from_files("gpt2", alone)
    says_more = (eot, bos, ends) != (259, 259, (259,))
    assert (tokenizer_hash(plain) != tokenizer_hash(tokenizer)) == says_more


@pytest.mark.parametrize(
    ("files", "text", "ids", "parsed"),
    [
        ({**SLOW, "added_tokens.json": {"word": 260, "<|u|>": 261},
          "special_tokens_map.json": {"additional_special_tokens": ["<|u|>"]}},
         "theword<|u|>", [257, 260], [257, 260, 261]),
        ({**SLOW, "tokenizer_config.json": {"added_tokens_decoder": {
            "260": {"content": "xy", "special": False, "rstrip": True}}}},
         "xy  the", [260, 257], [260, 257]),
        ({**FAST, "tokenizer_config.json": {"added_tokens_decoder": {
            "260": {"content": "<|im_end|>", "special": False}}}},
         "<|im_end|>", [260], [260]),
        ({**SLOW, "tokenizer_config.json": {"extra_special_tokens": {"u": "<|u|>"}}},
         "the<|u|>", [257], [257, 260]),
        ({**SLOW, "tokenizer_config.json": {"add_prefix_space": True}}, "the", [258],
         [258]),
    ],
)  # fmt: skip
def test_which_tokens_are_found(tmp_path, files, text, ids, parsed):
    tokenizer = folder(tmp_path, files)
    assert tokenizer.encode(text)[: len(ids)] == ids
    assert tokenizer.encode(text, parse_special=True) == parsed
    assert np.array_equal(tokenizer.encode_array(text), tokenizer.encode(text))


S = {"SpecialToken": {"id": END, "type_id": 0}}
TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [S, {"Sequence": {"id": "A", "type_id": 0}}, S],
    "pair": [],
    "special_tokens": {END: {"id": END, "ids": [259], "tokens": [END]}},
}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 259]}


@pytest.mark.parametrize(
    ("processor", "begins"),
    [
        (TEMPLATE, (259,)),
        (ROBERTA, (259,)),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}, (259,)),
        ({"type": "TemplateProcessing"}, ()),
    ],
)
def test_what_a_template_puts_before_a_text_begins_prompts(processor, begins):
    from gpt2_jax.tokenizers.boundaries import encode_prompt

    file = tokenizer_json([ENTRY], post_processor=processor)
    tokenizer = GPT2Tokenizer({"tokenizer.json": file})
    assert tokenizer.begin_ids == begins
    assert tokenizer.encode("the") == [257]
    assert encode_prompt(tokenizer, "the") == [*begins, 257]
    assert encode_prompt(tokenizer, "") == [259]
    assert tokenizer.as_trained().begin_ids == ()


def test_tokens_without_a_row_are_left_out():
    added = [ENTRY, entry("word", 260), entry("[PAD]", 261, "special")]
    tokenizer = GPT2Tokenizer({"tokenizer.json": tokenizer_json(added)})
    smaller = tokenizer.within(260)
    assert smaller.vocab_size == 260
    assert 260 not in smaller.encode("the word")
    assert tokenizer_from_files("gpt2", smaller.files()).vocab_size == 260
    assert smaller.end_ids == (259,)
    assert tokenizer.within(259).eot_id is None
    with pytest.raises(ValueError, match="'Ġthe', a piece of text, has the id 258"):
        tokenizer.within(258)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens.json": [1]}, "added_tokens.json: not a JSON object"),
        ({"added_tokens.json": {"x": "y"}}, "added_tokens.json: 'y' is no token id"),
        ({"added_tokens.json": {"xyz": 262}}, "ids of 261 tokens are not 0 .. 260"),
        ({"added_tokens.json": {"the": 260}}, "'the' has two ids"),
        ({"tokenizer_config.json": b"{"}, "tokenizer_config.json: not JSON"),
        ({"tokenizer_config.json": b"[" * 10**5}, "nested too deep"),
        ({"tokenizer_config.json": {"eos_token": 5}}, "5 is no token"),
        ({"tokenizer_config.json": {"added_tokens_decoder": [1]}}, r"is \[1\]"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"-1": {"content": "x"}}}},
         "'-1' is no token id"),
        ({"tokenizer_config.json": {"added_tokens_decoder": {"260": {
            "content": "x", "lstrip": 1}}}}, "lstrip of a token is 1"),
        ({"tokenizer_config.json": {"additional_special_tokens": 3}}, "tokens is 3"),
        ({"generation_config.json": {"eos_token_id": "x"}}, "'x' is no token id"),
        ({"config.json": {**GPT2, "eos_token_id": [[1]]}}, r"\[1\] is no token id"),
        ({"roles.json": {"size": 1}}, "roles.json is damaged: KeyError"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as error:
        folder(tmp_path, {**SLOW, **files})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500
