"""A tokenizer without an end of text, as nanoGPT's characters, in every place."""

import json

import numpy as np
import pytest

from gpt2_jax.config import GPT2Config
from gpt2_jax.data.loader import TextExamples
from gpt2_jax.data.prepare import load_index, prepare
from gpt2_jax.data.sft import read_examples
from gpt2_jax.lm import LanguageModel
from gpt2_jax.model import GPT2
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.plain import CharTokenizer
from gpt2_jax.training.config import EvalConfig
from gpt2_jax.training.samples import check_sample, sample_text
from shapes import TINY, random_params

LETTERS = "abcdefghijklmnopqrstuvwxyz "
CHARS = CharTokenizer(LETTERS, end_of_text=False)
DOCUMENTS = ["the dog", "a fox", "", "hens and a cow"]


@pytest.fixture
def prepared(tmp_path):
    text = tmp_path / "documents.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in DOCUMENTS))
    prepare(text, tmp_path / "data", CHARS, splits=(1, 0, 0))
    return tmp_path / "data"


@pytest.fixture(scope="module")
def lm():
    cfg = GPT2Config.from_dict({**TINY.__dict__, "vocab_size": 27})
    params = random_params(cfg, 0.2)
    return LanguageModel(GPT2(cfg), params, CHARS, step=None)


def test_nothing_is_written_between_documents(prepared):
    index = load_index(prepared)
    assert (index.eot_id, index.vocab_size) == (None, 27)
    assert index.splits["train"].tokens == len("".join(DOCUMENTS))
    ids = np.fromfile(prepared / "train-00000.bin", index.dtype)
    assert CHARS.decode(ids) == "".join(DOCUMENTS)
    with pytest.raises(ValueError, match=r"packing='documents' needs an end of text"):
        TextExamples([prepared], "train", block_size=4, packing="documents")


def test_indexes_of_older_versions(prepared):
    """They have -1 for none, and -1 as uint16 after each document of text."""
    path = prepared / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "eot_id": -1}))
    assert load_index(prepared).eot_id is None
    ids = np.fromfile(prepared / "train-00000.bin", "<u2")
    ids[7] = 65535
    ids.tofile(prepared / "train-00000.bin")
    with pytest.raises(ValueError, match="token 7 is 65535, but vocab_size=27"):
        load_index(prepared)


def test_examples_need_an_end(tmp_path):
    with pytest.raises(ValueError, match=r"need an end of text.*\(char\) has none"):
        read_examples(tmp_path / "any.jsonl", CHARS, block_size=8)


def test_empty_prompts_are_refused_and_texts_are_scored_from_the_second_token(lm):
    message = "the prompt is empty, and this model has no end of text .*: give a prompt"
    for do in (
        lambda: lm.generate("", max_new_tokens=2),
        lambda: lm.complete(["a", ""], max_new_tokens=2),
        lambda: lm.stream("", max_new_tokens=2),
        lambda: list(lm.generate_many(["a", ""], max_new_tokens=2)),
        lambda: lm.explain(""),
        lambda: lm.logprobs("", "a"),
        lambda: sample_text(lm.model, lm.params, CHARS, EVAL, seed=0),
    ):
        with pytest.raises(ValueError, match=message):
            do()
    assert [len(s.logprobs) for s in lm.score(["the dog", "a", ""])] == [6, 0, 0]


EVAL = EvalConfig(every=1, examples=0, patience=0, sample_tokens=12, sample_prompt="")


def test_samples_of_a_run_go_on(lm):
    """As an id that ends a row, -1 would be the last one: z."""
    cfg = EvalConfig(**{**vars(EVAL), "sample_prompt": "the"})
    text = sample_text(lm.model, lm.params, CHARS, cfg, seed=0)
    assert text.startswith("the")
    assert "z" in text[3:-1]
    assert len(text) == 3 + 12
    none = NoTokenizer(27, None, "no file")
    ended = NoTokenizer(27, 5, "no file")
    written = sample_text(lm.model, lm.params, ended, EVAL, seed=0).split()
    assert written[0] == "5"
    assert all(0 <= int(i) < 27 for i in written)
    check_sample(cfg, CHARS, lm.config)
    check_sample(EVAL, ended, lm.config)
    for sample, tokenizer, message in (
        (EVAL, CHARS, "sample_tokens=12, eval.sample_prompt='': the prompt is empty"),
        (EVAL, none, "text needs a tokenizer, give token ids: no file"),
        (cfg, none, "text needs a tokenizer, give token ids: no file"),
        (EvalConfig(**{**vars(cfg), "sample_tokens": 62}), CHARS, "n_positions=64"),
        (EvalConfig(**{**vars(cfg), "sample_prompt": "T"}), CHARS, "'T' .* position 0"),
    ):
        with pytest.raises(ValueError, match=message):
            check_sample(sample, tokenizer, lm.config)
