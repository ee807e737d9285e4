"""nanoGPT's ckpt.pt and the table of characters beside it, written by hand."""

import json
import pickle
import re

import numpy as np
import pytest

import gpt2_jax
from foreign import (
    MODEL_ARGS,
    SMALL,
    assert_same,
    expected,
    hf_state,
    nanogpt_state,
    write_nanogpt,
    write_torch,
)
from gpt2_jax.config import GPT2Config
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.plain import CharTokenizer

CHARACTERS = "\n !abcdefghijklm"  # 16: the model has one id more


def test_load(tmp_path):
    lm = gpt2_jax.load(write_nanogpt(tmp_path / "ckpt.pt", dropout=0.25))
    assert lm.config == GPT2Config(
        vocab_size=17,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        embd_pdrop=0.25,
        attn_pdrop=0.25,
        resid_pdrop=0.25,
    )
    assert_same(lm.params, expected(hf_state()))
    assert isinstance(lm.tokenizer, NoTokenizer)
    assert lm.tokenizer.eot_id is None


def test_load_its_folder(tmp_path):
    write_nanogpt(tmp_path / "ckpt.pt")
    assert_same(gpt2_jax.load(tmp_path).params, expected(hf_state()))


def test_the_gelu_is_the_one_by_erf(tmp_path):
    lm = gpt2_jax.load(write_nanogpt(tmp_path / "ckpt.pt"))
    by_tanh = GPT2Config.from_dict(
        {**lm.config.__dict__, "activation_function": "gelu_new"}
    )
    ids = np.array([[1, 2, 3]])
    other = type(lm.model)(by_tanh).apply({"params": lm.params}, ids)[0]
    # logits of size 5: the GELUs differ by 5e-4 at most
    assert 1e-6 < abs(np.asarray(lm.logits(ids) - other)).max() < 0.1


def test_a_compiled_model_without_biases_and_with_masks(tmp_path):
    state = {f"_orig_mod.{k}": x for k, x in nanogpt_state(bias=False).items()}
    for i in range(2):
        name = f"_orig_mod.transformer.h.{i}.attn.bias"
        state[name] = np.tril(np.ones((1, 1, 8, 8), np.float32))
    lm = gpt2_jax.load(write_nanogpt(tmp_path / "ckpt.pt", state, bias=False))
    assert lm.config.bias is False
    without = {k: x for k, x in hf_state().items() if not k.endswith(".bias")}
    assert_same(lm.params, expected(without))


def test_a_padded_vocabulary_is_not_sampled(tmp_path):
    state = nanogpt_state()
    state["transformer.wte.weight"][16] = 100.0 * np.sign(
        state["transformer.ln_f.weight"]
    )  # id 16 has no character
    path = write_nanogpt(tmp_path / "ckpt.pt", state)
    (tmp_path / "meta.json").write_text(json.dumps({"itos": list(CHARACTERS)}))
    lm = gpt2_jax.load(path)
    assert lm.tokenizer.vocab_size == 16
    assert lm.config.vocab_size == 17
    rows = lm.generate(["a"] * 8, max_new_tokens=7, temperature=5.0, seed=0)
    assert [len(row) for row in rows] == [7] * 8
    assert set("".join(rows)) <= set(CHARACTERS)


@pytest.mark.parametrize("form", ["pickle", "list", "table"])
def test_text_by_the_table_of_characters(tmp_path, form):
    path = write_nanogpt(tmp_path / "ckpt.pt")
    itos = dict(enumerate(CHARACTERS))
    stoi = {c: i for i, c in itos.items()}
    if form == "pickle":
        meta = {"vocab_size": 16, "itos": itos, "stoi": stoi}
        (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta))
    else:
        kept = itos if form == "table" else list(CHARACTERS)
        (tmp_path / "meta.json").write_text(json.dumps({"itos": kept}))
    lm = gpt2_jax.load(path)
    assert isinstance(lm.tokenizer, CharTokenizer)
    assert lm.tokenizer.encode("a b!") == [3, 1, 4, 2]
    text = lm.generate("abc", max_new_tokens=5, temperature=0)
    ids = lm.generate([3, 4, 5], max_new_tokens=5, temperature=0)
    assert text == "".join(CHARACTERS[i] for i in ids)
    with pytest.raises(ValueError, match=r"'Z'.* is not in the vocabulary of 16"):
        lm.generate("Z")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ('{"itos": 1' + "0" * 5000 + "}", "not JSON"),
        ("[]", "has no itos, a table of id -> character"),
        ('{"itos": null}', "has no itos"),
        ('{"itos": "abc"}', "has no itos"),
        ('{"itos": {"0": "a", "2": "b"}}', "has no itos"),
        ('{"itos": {"x": "a"}}', "has no itos"),
        ('{"itos": ["a", 1]}', "itos holds more than single characters"),
        ('{"itos": ["a", "bc"]}', "itos holds more than single characters"),
        ('{"itos": ["b", "a"]}', "the characters are not in code point order"),
        ('{"itos": ["a", "a"]}', "the characters are not in code point order"),
        ('{"itos": []}', "no text to take characters from"),
        ('{"itos": ["\\ud800"]}', "surrogate"),
        (json.dumps({"itos": list(CHARACTERS + "nopq")}), "has 20 ids, the model only"),
    ],
)
def test_bad_tables_of_characters(tmp_path, content, message):
    path = write_nanogpt(tmp_path / "ckpt.pt")
    (tmp_path / "meta.json").write_text(content)
    assert_ids_alone(path, message)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"itos": {float("inf"): "a"}}, "inf as a key"),
        ({"itos": {float("nan"): "a"}}, "nan as a key"),
        ({"itos": {"0": 5}}, "itos holds more than single characters"),
        ({"itos": re.compile("a")}, "names re._compile, which is not allowed"),
        ([1], "has no itos"),
    ],
)
def test_bad_pickled_tables(tmp_path, meta, message):
    path = write_nanogpt(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(meta, protocol=2))
    assert_ids_alone(path, message)


def assert_ids_alone(path, message):
    """A table that can't be read forbids text, and nothing else."""
    lm = gpt2_jax.load(path)
    assert lm.logits([[1, 2]]).shape == (1, 2, 17)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        lm.generate("a")
    assert str(path.parent) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"rotary": True}, "model_args has 'rotary': not supported"),
        ({3: 4}, "model_args has 3: not supported"),
        ({"a\nb": 4}, "model_args has 'a\\nb': not supported"),
        ({"n_layer": 2.0}, "n_layer=2.0 must be an integer"),
        ({"block_size": "8"}, "n_positions='8' must be an integer"),
        ({"n_head": 3}, "n_embd=8 is not divisible by n_head=3"),
        ({"bias": None}, "bias=None must be True or False"),
        ({"dropout": 1.0}, "embd_pdrop=1.0 must be in [0, 1)"),
        ({"n_layer": 3}, "has no tensor for h_2/ln_1/scale"),
        ({"n_layer": 1}, "has h_1/attn/c_attn/bias too"),
        ({"bias": False}, "has h_0/attn/c_attn/bias too"),
        ({"block_size": 9}, "wpe/embedding has shape [8, 8], the config needs [9, 8]"),
        ({"vocab_size": 16}, "wte/embedding has shape [17, 8], the config needs"),
    ],
)
def test_bad_model_args(tmp_path, args, message):
    path = tmp_path / "ckpt.pt"
    model_args = {**MODEL_ARGS, **args}
    write_torch(path, {"model": nanogpt_state(), "model_args": model_args})
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        gpt2_jax.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", sorted({*MODEL_ARGS} - {"bias", "dropout"}))
def test_missing_model_args(tmp_path, name):
    args = {key: value for key, value in MODEL_ARGS.items() if key != name}
    write_torch(tmp_path / "ckpt.pt", {"model": nanogpt_state(), "model_args": args})
    with pytest.raises(ValueError, match=f"model_args has no {name}"):
        gpt2_jax.load(tmp_path / "ckpt.pt")


def test_old_files_have_no_bias_and_dropout_in_model_args(tmp_path):
    args = {k: v for k, v in MODEL_ARGS.items() if k not in ("bias", "dropout")}
    write_torch(tmp_path / "ckpt.pt", {"model": nanogpt_state(), "model_args": args})
    lm = gpt2_jax.load(tmp_path / "ckpt.pt")
    assert lm.config == GPT2Config.from_dict(
        {**SMALL.__dict__, "activation_function": "gelu"}
    )


@pytest.mark.parametrize("tree", [1, [], {}, {"model": {}}, {"model_args": {}}])
def test_no_nanogpt_checkpoint(tmp_path, tree):
    write_torch(tmp_path / "ckpt.pt", tree)
    with pytest.raises(ValueError, match="is no nanoGPT checkpoint: no model and"):
        gpt2_jax.load(tmp_path / "ckpt.pt")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("transformer.h.1.mlp.c_fc.weight", None, "no tensor for h_1/mlp/c_fc/kernel"),
        ("transformer.h.1.mlp.c_fc.bias", None, "no tensor for h_1/mlp/c_fc/bias"),
        ("transformer.h.2.ln_1.weight", (8,), "has h_2/ln_1/scale too"),
        ("transformer.h.0.rotary", (8,), "a tensor 'h.0.rotary', which no GPT-2 has"),
        ("wte.weight", (17, 8), "has wte.weight twice"),
        (
            "transformer.h.0.mlp.c_fc.weight",
            (8, 32),
            "h_0/mlp/c_fc/kernel has shape [32, 8], the config needs [8, 32]",
        ),
        ("transformer.h.0.mlp.c_fc.weight", (256,), "h_0/mlp/c_fc/kernel has shape"),
        ("transformer.ln_f.bias", (8, 1), "ln_f/bias has shape [8, 1]"),
        ("transformer.ln_f.bias", 1.0, "'transformer.ln_f.bias' is not a tensor"),
        ("transformer.ln_f.bias", (0,), "ln_f/bias has shape [0]"),
    ],
)
def test_bad_tensors(tmp_path, name, value, message):
    state = nanogpt_state()
    if value is None:
        del state[name]
    else:
        state[name] = np.zeros(value, np.float32) if type(value) is tuple else value
    path = write_nanogpt(tmp_path / "ckpt.pt", state)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        gpt2_jax.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("model", [None, 1, [], "x"])
def test_no_table_of_tensors(tmp_path, model):
    tree = {"model": model, "model_args": MODEL_ARGS}
    write_torch(tmp_path / "ckpt.pt", tree)
    with pytest.raises(ValueError, match="model holds no table of tensors"):
        gpt2_jax.load(tmp_path / "ckpt.pt")
