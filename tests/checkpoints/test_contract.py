"""Contracts that somebody altered: damage, whatever was altered."""

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.checkpoints.contract import (
    DamagedCheckpointError,
    parse_contract,
    read_contract,
)
from gpt2_jax.checkpoints.integrity import digest
from gpt2_jax.tokenizers.files import tokenizer_hash
from gpt2_jax.tokenizers.plain import ByteTokenizer
from shapes import TINY

TOKENIZER = ByteTokenizer()
META = {
    "format": 1,
    "step": 12,
    "model": dataclasses.asdict(TINY),
    "run": {"data": {"path": "x"}, "optim": {"name": "adamw"}, "block_size": 4},
    "metrics": {"val_loss": 2.5},
    "tokenizer": {
        "kind": "bytes",
        "sha256": tokenizer_hash(TOKENIZER),
        "vocab_size": TOKENIZER.vocab_size,
        "eot_id": TOKENIZER.eot_id,
    },
    "checksums": {"step": 1, "params/wte/embedding": 2},
    "base": {"model": "gpt2", "step": None, "sha256": "0"},
    "best": {"step": 8, "val_loss": 2.0, "since": 1},
    "examples": 48,
    "due": False,
    "interim": True,
}
FILES = {"bytes.json": "e30="}


def signed(meta):
    return {**meta, "sha256": digest(meta)} if isinstance(meta, dict) else meta


def write(folder, meta, files=None):
    for part, value in (
        ("meta", meta),
        ("tokenizer", FILES if files is None else files),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        text = value if isinstance(value, str) else json.dumps(value)
        (folder / part / "metadata").write_text(text, encoding="utf-8")


def test_what_is_saved_is_read():
    contract = parse_contract(signed(META), FILES)
    assert (contract.step, contract.model, contract.best) == (12, TINY, META["best"])
    assert (contract.examples, contract.due, contract.interim) == (48, False, True)
    # and what versions before these fields wrote
    old = {
        k: v for k, v in META.items() if k not in ("base", "best", "examples", "due")
    }
    assert parse_contract(signed(old), FILES).best is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", r"meta: \[\] is not an object"),
        ("5", "meta: 5 is not an object"),
        ("null", "meta: None is not an object"),
        ('"x"', "meta: 'x' is not an object"),
        ("[" * 100_000, "nested too deep"),
        ("{", "not JSON"),
        ("", "not JSON"),
    ],
)
def test_meta_that_is_no_object_is_damage(tmp_path, text, why):
    write(tmp_path / "12", text)
    with pytest.raises(DamagedCheckpointError, match=rf"12 is damaged: .*{why}"):
        read_contract(tmp_path / "12")


@pytest.mark.parametrize("files", ["[]", "null", '{"bytes.json": null}', "3"])
def test_tokenizer_files_of_another_type_are_damage(tmp_path, files):
    write(tmp_path / "12", signed(META), files)
    with pytest.raises(DamagedCheckpointError, match="12 is damaged: tokenizer: "):
        read_contract(tmp_path / "12")


def test_the_contract_of_another_step_is_damage(tmp_path):
    write(tmp_path / "99", signed(META))
    with pytest.raises(DamagedCheckpointError, match="99 is damaged: it holds step 12"):
        read_contract(tmp_path / "99")
    write(tmp_path / "of_another_name", signed(META))
    assert read_contract(tmp_path / "of_another_name").step == 12


def test_a_conversion_is_no_step_of_a_run(tmp_path):
    write(tmp_path / "12", signed({**META, "run": {}}))
    contract = read_contract(tmp_path / "12")
    with pytest.raises(ValueError, match=r"12 is no step of a run \(no data\)"):
        contract.check_is_of_a_run(tmp_path / "12")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
PLACES = [(name,) for name in META] + [
    (outer, name)
    for outer in META
    if isinstance(META[outer], dict)
    for name in META[outer]
]


@settings(max_examples=1000, deadline=None, database=None)
@given(st.sampled_from(PLACES), VALUES | st.just(...), VALUES | st.just(FILES))
def test_any_alteration_is_damage_or_a_contract(place, value, files):
    """The hash is made anew, as whoever alters a file on purpose would do it."""
    meta = copy.deepcopy(META)
    *outer, name = place
    inner = meta[outer[0]] if outer else meta
    if value is ...:
        del inner[name]
    else:
        inner[name] = value
    try:
        contract = parse_contract(signed(meta), files)
    except ValueError:
        return
    assert type(contract.step) is int
    assert contract.metrics.keys() <= meta["metrics"].keys()
    assert contract.model == TINY or outer == ["model"]
