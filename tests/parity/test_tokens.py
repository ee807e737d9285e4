"""What a folder says of its tokens, as transformers reads it."""

import importlib
import json

import numpy as np
import pytest
from test_added_tokens import END, ENTRY, SLOW, TEMPLATE, entry, tokenizer_json

import gpt2_jax
from gpt2_jax.formats.convert import convert
from gpt2_jax.tokenizers.boundaries import encode_prompt

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
make_goldens = importlib.import_module("make_goldens")  # needs both

U, V = "<|im_start|>", "<|im_end|>"
ADDED = [ENTRY, entry(U, 260, "special"), entry(V, 261, "special", "rstrip")]
ADDED += [entry("word", 262, "lstrip"), entry("thx", 263, "single_word", "normalized")]
DECODER = {
    str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in ADDED
}  # fmt: skip
CONFIG = {"bos_token": U, "eos_token": V, "pad_token": V}
TEXTS = [
    "the th word",
    f"{U}the  {V}  \u3000thx{END} the",
    f"thxword\u2009word {U}{V} x",
]
FOLDERS = {
    "slow": {
        **SLOW,
        "added_tokens.json": {t["content"]: t["id"] for t in ADDED[1:]},
        "special_tokens_map.json": {**CONFIG, "additional_special_tokens": [U]},
    },
    "slow with settings": {
        **SLOW,
        "tokenizer_config.json": {**CONFIG, "added_tokens_decoder": DECODER,
                                  "tokenizer_class": "GPT2Tokenizer"},
    },
    "fast": {
        "tokenizer.json": tokenizer_json(ADDED),
        "tokenizer_config.json": {**CONFIG, "add_prefix_space": False,
                                  "tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "fast with a template": {
        "tokenizer.json": tokenizer_json(ADDED, post_processor={
            **TEMPLATE, "single": TEMPLATE["single"][:2]}),
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast"},
    },
    "spaces": {
        **SLOW,
        "tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer",
                                  "add_prefix_space": True, "add_bos_token": True},
    },
}  # fmt: skip


def write(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)


def model_in(folder, vocab_size=266):
    model = make_goldens.random_model(
        0, vocab_size=vocab_size, n_positions=64, n_embd=16, n_layer=1, n_head=2,
        initializer_range=0.3,
    )  # fmt: skip
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", FOLDERS)
def test_text_becomes_the_same_ids_before_and_after_a_conversion(tmp_path, name):
    first = tmp_path / "first"
    model = model_in(first)
    write(first, FOLDERS[name])
    convert(first, "hf", tmp_path / "second")
    for folder in (first, tmp_path / "second"):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)
        ours = gpt2_jax.load(folder).tokenizer
        for text in TEXTS:
            ids = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text, parse_special=True) == ids
            plain = theirs.encode(
                text, add_special_tokens=False, split_special_tokens=True
            )
            assert ours.encode(text) == plain
            assert ours.decode(ids) == theirs.decode(
                ids, clean_up_tokenization_spaces=False
            )
        assert encode_prompt(ours, "the")[:-1] == theirs("the")["input_ids"][:-1]
        if theirs.eos_token_id is not None:  # by default <|endoftext|> here
            assert ours.eot_id == theirs.eos_token_id
        if "pad_token" in FOLDERS[name].get("tokenizer_config.json", {}):
            assert theirs.pad_token == V
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    rows = model.transformer.wte.weight
    assert torch.equal(back.transformer.wte.weight, rows)
    assert len(rows) == 266  # also those that no token stands for


@pytest.mark.parametrize(
    ("config", "generation"),
    [
        (0, None),
        ([1, 2], None),
        (None, None),
        (3, 1),
        (None, [2, 0]),
        (2, {}),
    ],
)
def test_a_text_ends_where_transformers_ends_it(tmp_path, config, generation):
    """Ids are places in what comes when nothing ends it."""
    model = model_in(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    prompt = [5, 6, 7]

    def greedy(model, **options):
        return model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
            pad_token_id=0, **options,
        )[0, 3:].tolist()  # fmt: skip

    model.generation_config.eos_token_id = None
    free = greedy(model)
    seen = list(dict.fromkeys(free))

    def ids(places):
        if isinstance(places, list):
            return [seen[place] for place in places]
        return None if places is None else seen[places]

    (tmp_path / "generation_config.json").unlink()
    values["eos_token_id"] = ids(config)
    (tmp_path / "config.json").write_text(json.dumps(values))
    if generation is not None:
        said = generation if generation == {} else {"eos_token_id": ids(generation)}
        write(tmp_path, {"generation_config.json": said})
    theirs = greedy(transformers.AutoModelForCausalLM.from_pretrained(tmp_path))
    lm = gpt2_jax.load(tmp_path)
    ends = {*lm.tokenizer.end_ids}
    if ends and theirs[-1] in ends:
        theirs = theirs[:-1]
    assert lm.generate(prompt, max_new_tokens=12, temperature=0) == theirs
    assert np.array_equal(free[: len(theirs)], theirs)
