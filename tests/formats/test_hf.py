"""Hugging Face folders, in and out, without torch."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import gpt2_jax
from gpt2_jax.formats import hf
from gpt2_jax.formats.convert import convert
from gpt2_jax.formats.open_model import open_model
from gpt2_jax.formats.params import matrices
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from gpt2_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_jax.tokenizers.train import train_sentencepiece
from shapes import TINY, random_params

PARAMS = random_params(TINY, 0.2)
NONE = NoTokenizer(TINY.vocab_size, 60, "none was made")


def write(folder, cfg=TINY, params=PARAMS, tokenizer=NONE, **kwargs):
    folder.mkdir()
    hf.write(folder, cfg, params, tokenizer, **kwargs)
    return folder


def test_an_export_comes_back_bit_by_bit(tmp_path):
    lm = gpt2_jax.load(write(tmp_path / "out"))
    assert lm.config == TINY
    jax.tree.map(np.testing.assert_array_equal, lm.params, PARAMS)
    tensors = load_file(tmp_path / "out/model.safetensors")
    assert len(tensors) == 4 + 12 * TINY.n_layer
    np.testing.assert_array_equal(
        tensors["transformer.h.1.attn.c_attn.weight"],
        PARAMS["h_1"]["attn"]["c_attn"]["kernel"].reshape(32, 96),
    )
    ids = lm.generate([1, 2, 3], max_new_tokens=4, temperature=0)
    assert len(ids) <= 4
    with pytest.raises(ValueError, match=r"text needs a tokenizer.*no tokenizer in"):
        lm.generate("text")


def test_shards_and_bfloat16(tmp_path):
    folder = write(tmp_path / "out", max_shard_bytes=20_000, dtype="bfloat16")
    files = sorted(p.name for p in folder.glob("*.safetensors"))
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    size = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert index["metadata"]["total_size"] == 2 * size
    lm = gpt2_jax.load(folder)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)),
        lm.params,
        PARAMS,
    )


def test_a_padded_vocabulary_is_cut_and_absent_biases_are_zeros(tmp_path):
    cfg = dataclasses.replace(TINY, bias=False, vocab_size=300)
    params = random_params(cfg, 0.2)
    rows = dataclasses.replace(cfg, vocab_size=257)
    lm = gpt2_jax.load(write(tmp_path / "out", rows, params, ByteTokenizer()))
    assert (lm.config.vocab_size, lm.config.bias) == (257, True)
    np.testing.assert_array_equal(
        lm.params["wte"]["embedding"], params["wte"]["embedding"][:257]
    )
    assert all(not x.any() for path, x in matrices(lm.params) if path.endswith("/bias"))
    tokens = np.arange(20)[None]
    bare, _ = gpt2_jax.GPT2(cfg).apply({"params": params}, tokens)
    # the same sums in another order
    np.testing.assert_allclose(lm.logits(tokens), bare[..., :257], atol=1e-5)


SAMPLE = "def f(x):\n\treturn x  # \u00e9\u4e2d\U0001f600   end\r\n"


@pytest.mark.parametrize(
    "tokenizer",
    [
        ByteTokenizer(),
        CharTokenizer(SAMPLE),
        CharTokenizer(SAMPLE, end_of_text=False),
        train_sentencepiece([SAMPLE * 3, "the quick brown fox " * 20], 330),
    ],
    ids=["bytes", "char", "char without end", "sentencepiece"],
)
def test_the_tokenizer_goes_and_comes_back(tmp_path, tokenizer):
    import tokenizers

    cfg = dataclasses.replace(TINY, vocab_size=tokenizer.vocab_size)
    folder = write(tmp_path / "out", cfg, random_params(cfg, 0.2), tokenizer)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in (SAMPLE, SAMPLE[::-1], "x", ""):
        assert theirs.encode(text).ids == tokenizer.encode(text)
        assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.get_vocab_size() == tokenizer.vocab_size
    back = gpt2_jax.load(folder).tokenizer
    assert back.files() == tokenizer.files()


def test_a_tokenizer_that_the_format_cannot_hold(tmp_path):
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e"] * 9),
        model_writer=model,
        model_type="unigram",
        vocab_size=13,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    with pytest.raises(ValueError, match="is no plain BPE"):
        hf.tokenizer_files(tokenizer, 64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type='llama' is not supported"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not supported"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
        ({"activation_function": "mish"}, "'mish' is not one of gelu_new"),
        ({"n_head": 5}, "n_embd=32 is not divisible by n_head=5"),
        ({"n_layer": 10**4}, "has no tensor for h_3/ln_1/scale"),
        ({"n_layer": 2}, "has h_2/attn/c_attn/bias too"),
        ({"n_embd": 64}, r"wte/embedding has shape \[61, 32\], the config needs"),
    ],
)
def test_configs_that_are_refused(tmp_path, change, message):
    path = write(tmp_path / "out") / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        gpt2_jax.load(tmp_path / "out")


def test_aliases_and_idle_keys_of_configs(tmp_path):
    path = write(tmp_path / "out") / "config.json"
    values = json.loads(path.read_text())
    values["hidden_size"] = values.pop("n_embd")
    values["num_hidden_layers"] = values.pop("n_layer")
    values |= {"summary_type": "cls_index", "n_ctx": 64, "my_own": 1}
    path.write_text(json.dumps(values))
    assert gpt2_jax.load(tmp_path / "out").config == TINY


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("wpe.weight"), "has no tensor for wpe/embedding"),
        (lambda t: t.update(score=t["wpe.weight"]), "a tensor 'score', which no GPT-2"),
        (lambda t: t.update({"wte.bias": t["ln_f.bias"]}), "a tensor 'wte.bias'"),
        (
            lambda t: t.update({"lm_head.weight": t["wte.weight"] + 1}),
            "an untied head is not supported",
        ),
        (
            lambda t: t.update({"transformer.wpe.weight": t["wpe.weight"]}),
            "wpe.weight twice",
        ),
        (
            lambda t: t.update({"ln_f.bias": t["ln_f.bias"].astype(np.int32)}),
            "tensor 'ln_f.bias': dtype I32 is not one of",
        ),
        (lambda t: t["h.0.ln_1.weight"].fill(np.nan), "h_0/ln_1/scale holds NaN"),
    ],
)
def test_tensors_that_are_refused(tmp_path, edit, message):
    folder = write(tmp_path / "out")
    tensors = {
        name.removeprefix("transformer."): x
        for name, x in load_file(folder / "model.safetensors").items()
    }
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        gpt2_jax.load(folder)


def test_a_file_of_weights_that_has_no_config(tmp_path):
    folder = write(tmp_path / "in")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json beside it"):
        open_model(folder / "model.safetensors")


def test_a_hub_name_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        FileNotFoundError, match="'nobody/gpt2' is no file or folder"
    ) as e:
        gpt2_jax.load("nobody/gpt2")
    assert "\n" not in str(e.value)
    with pytest.raises(FileNotFoundError, match="no such file or folder: no/such/path"):
        gpt2_jax.load("no/such/path")


def test_a_cached_hub_name_needs_no_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--gpt2"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    write(repository / "snapshots" / ("0" * 40))
    lm = gpt2_jax.load("somebody/gpt2")
    jax.tree.map(np.testing.assert_array_equal, lm.params, PARAMS)


@pytest.mark.parametrize("to", ["hf", "safetensors", "llmc", "orbax"])
def test_convert_there_and_back(tmp_path, to):
    cfg = dataclasses.replace(TINY, vocab_size=257)
    params = random_params(cfg, 0.2)
    source = write(tmp_path / "in", cfg, params, ByteTokenizer())
    convert(source, to, tmp_path / "out")
    back = gpt2_jax.load(tmp_path / "out")
    assert back.config == cfg
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    assert (back.tokenizer.kind == "bytes") == (to in ("hf", "orbax"))
    with pytest.raises(FileExistsError, match="out exists already"):
        convert(source, to, tmp_path / "out")
    with pytest.raises(ValueError, match="'gguf' is not one of hf, safetensors"):
        convert(source, "gguf", tmp_path / "other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_rows_and_what_is_said_of_tokens_survive_a_conversion(tmp_path):
    from test_added_tokens import END, SLOW

    cfg = dataclasses.replace(TINY, vocab_size=264)
    folder = write(tmp_path / "in", cfg, random_params(cfg, 0.2))
    word = {"content": "word", "special": False, "lstrip": True, "rstrip": True}
    files: dict[str, object] = {
        **SLOW,
        "added_tokens.json": {"word": 260, "<|im_end|>": 261},
        "tokenizer_config.json": {
            **{"eos_token": "<|im_end|>", "bos_token": END, "pad_token": "<|im_end|>"},
            **{"chat_template": "{{ messages }}", "auto_map": {"x": "y.py"}},
            "added_tokens_decoder": {"260": word},
        },
        "generation_config.json": {"eos_token_id": [261, 259], "temperature": 0.7},
    }
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    values = json.loads((folder / "config.json").read_text())
    values |= {"bos_token_id": 259, "eos_token_id": 261, "pad_token_id": 261}
    (folder / "config.json").write_text(json.dumps(values))
    given = gpt2_jax.load(folder)
    assert given.tokenizer.end_ids == (261, 259)
    assert given.tokenizer.vocab_size == 262
    convert(folder, "orbax", tmp_path / "orbax")
    convert(folder, "hf", tmp_path / "hf")
    convert(tmp_path / "orbax", "hf", tmp_path / "again")
    for name in ("hf", "orbax", "again"):
        lm = gpt2_jax.load(tmp_path / name)
        assert lm.tokenizer.roles.same_effect(given.tokenizer.roles), name
        assert lm.tokenizer.encode("a word the") == given.tokenizer.encode("a word the")
        rows = lm.params["wte"]["embedding"]
        np.testing.assert_array_equal(rows, given.params["wte"]["embedding"])
    assert (
        json.loads((tmp_path / "hf/generation_config.json").read_text())
        == (files["generation_config.json"])
    )
    settings = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert settings["pad_token"] == "<|im_end|>"
    assert settings["chat_template"] == "{{ messages }}"
    assert "auto_map" not in settings
    assert settings["added_tokens_decoder"]["260"]["rstrip"] is True
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["vocab_size"], config["pad_token_id"]) == (264, 261)
