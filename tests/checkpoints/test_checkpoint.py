import json
import math
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_optim import CFG

from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.checkpoints.checkpoint import (
    Checkpoints,
    DamagedCheckpointError,
    checksums,
)
from gpt2_jax.checkpoints.integrity import digest
from gpt2_jax.model import GPT2
from gpt2_jax.runtime.sharding import make_mesh
from gpt2_jax.tokenizers.plain import ByteTokenizer
from gpt2_jax.training.optim import make_optimizer
from gpt2_jax.training.step import TrainState, abstract_state, stack_state
from shapes import TINY

OPTIMIZER = make_optimizer(CFG, 100)


def a_state(mesh, step, seed=0):
    """A state of random numbers, spread over the mesh."""
    rng = np.random.default_rng(seed)
    abstract = abstract_state(GPT2(TINY), OPTIMIZER, mesh)
    state = jax.tree.map(
        lambda x: jax.device_put(rng.normal(size=x.shape).astype(x.dtype), x.sharding),
        abstract,
    )
    at = jax.device_put(np.int32(step), abstract.step.sharding)
    return TrainState(at, state.params, state.opt_state)


def save(folder, *states, keep_last=9, val_losses=None, **known):
    checkpoints = Checkpoints(folder, keep_last=keep_last)
    for i, state in enumerate(states):
        checkpoints.save(
            state,
            model=TINY,
            run={"data": {"path": "x"}, "steps": 7},
            tokenizer=ByteTokenizer(),
            val_loss=None if val_losses is None else val_losses[i],
            **known,
        )
    checkpoints.close()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "checkpoints"
    state = a_state(make_mesh(8, 1, 1), 3)
    save(folder, state)
    return folder, state


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A step's folder that a test may damage."""
    return Path(shutil.copytree(saved[0] / "3", tmp_path / "3"))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    mesh = make_mesh(8, 1, 1)
    save(folder, a_state(mesh, 3), a_state(mesh, 5, seed=1))
    return folder


def restore(folder, mesh):
    abstract = abstract_state(GPT2(TINY), OPTIMIZER, mesh)
    return checkpoint.restore(folder, checkpoint.as_tree(abstract))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (1, 1, 1)])
def test_bits_come_back_on_any_mesh(saved, shape):
    folder, state = saved
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    back = restore(folder / "3", mesh)
    expected = checkpoint.as_tree(state)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, back, expected)
    assert back["params"]["wpe"]["embedding"].sharding.mesh == mesh


def test_stacked_layers_are_saved_as_single_ones(saved, tmp_path):
    _, state = saved
    mesh, model = make_mesh(8, 1, 1), GPT2(TINY, scan_layers=True)
    stacked = stack_state(state, model, OPTIMIZER, mesh)
    abstract = abstract_state(model, OPTIMIZER, mesh)
    for x, y in zip(jax.tree.leaves(stacked), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (y.shape, y.dtype, y.sharding)
    save(tmp_path, stacked)
    back, expected = restore(tmp_path / "3", mesh), checkpoint.as_tree(state)
    assert jax.tree.structure(back) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, back, expected)


def test_parameters_alone(saved):
    folder, state = saved
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state.params
    )
    back = checkpoint.restore(folder / "3", {"params": abstract})
    assert list(back) == ["params"]
    jax.tree.map(np.testing.assert_array_equal, back["params"], state.params)


def test_the_contract(saved):
    folder, _ = saved
    contract = checkpoint.read_contract(folder / "3")
    assert contract.step == 3
    assert contract.model == TINY
    assert contract.run == {"data": {"path": "x"}, "steps": 7}
    assert contract.tokenizer.encode("aé") == [97, 195, 169]


def test_keeps_the_last_ones_and_the_best(tmp_path):
    mesh = make_mesh(8, 1, 1)
    states = [a_state(mesh, step) for step in (1, 2, 3, 4, 5)]
    losses = [3.0, 1.0, 2.0, None, 2.5]
    save(tmp_path, *states, keep_last=2, val_losses=losses)
    assert checkpoint.check_steps(tmp_path) == [2, 4, 5]
    # and after a restart
    save(tmp_path, a_state(mesh, 6), keep_last=2, val_losses=[0.5])
    assert checkpoint.check_steps(tmp_path) == [5, 6]


def test_what_a_save_did_not_know_is_added(tmp_path):
    mesh = make_mesh(8, 1, 1)
    states = [a_state(mesh, step) for step in (1, 2)]
    save(tmp_path, *states, keep_last=1, val_losses=[3.0, 2.0], due=True, interim=True)
    assert checkpoint.check_steps(tmp_path) == [2]
    contract = checkpoint.read_contract(tmp_path / "2")
    assert (contract.due, contract.interim) == (True, True)
    best = {"step": 2, "val_loss": 1.5, "since": 0}
    known = {"best": best, "due": False, "interim": False}
    save(tmp_path, a_state(mesh, 2, seed=5), val_losses=[1.5], **known)
    contract = checkpoint.read_contract(tmp_path / "2")
    assert contract.metrics == {"val_loss": 1.5}
    assert {name: getattr(contract, name) for name in known} == known
    back = restore(tmp_path / "2", mesh)
    jax.tree.map(np.testing.assert_array_equal, back["params"], states[1].params)


def test_a_best_that_is_no_number_is_none(tmp_path):
    """Neither from now on, nor where an older version wrote it down."""
    mesh = make_mesh(8, 1, 1)
    states = [a_state(mesh, step) for step in (1, 2, 3)]
    folder = tmp_path / "checkpoints"
    best = {"step": 2, "val_loss": math.nan, "since": 0}
    save(folder, *states, keep_last=1, val_losses=[3.0, math.inf, math.nan], best=best)
    assert checkpoint.check_steps(folder) == [1, 2, 3]
    path = folder / "2/meta/metadata"
    meta = {**json.loads(path.read_text()), "metrics": {"val_loss": -math.inf}}
    meta.pop("sha256")
    path.write_text(json.dumps({**meta, "sha256": digest(meta)}))
    contract = checkpoint.read_contract(folder / "2")
    assert (contract.metrics, contract.best) == ({}, None)
    assert checkpoint.find_step(tmp_path, "best") == folder / "1"
    save(folder, a_state(mesh, 4), keep_last=1)
    assert 1 in checkpoint.check_steps(folder)


def test_a_step_that_is_there_is_left_alone(tmp_path):
    mesh = make_mesh(8, 1, 1)
    state = a_state(mesh, 1)
    save(tmp_path, state)
    save(tmp_path, a_state(mesh, 1, seed=5))
    back = restore(tmp_path / "1", mesh)
    jax.tree.map(np.testing.assert_array_equal, back["params"], state.params)


def test_a_save_for_which_there_is_no_space_is_not_begun(tmp_path, monkeypatch):
    mesh = make_mesh(8, 1, 1)
    state = a_state(mesh, 2)
    size = checkpoint._space(checkpoint.as_tree(state))
    assert size > sum(x.nbytes for x in jax.tree.leaves(state))

    def has(total, free):
        usage = SimpleNamespace(total=total, free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    has(10 * size, size)
    save(tmp_path, a_state(mesh, 1))
    has(10 * size, size - 1)
    with pytest.raises(OSError, match=r"no space for a checkpoint of .* MiB: .* free"):
        save(tmp_path, state)
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    has(0, 0)  # it does not know
    save(tmp_path, state)
    assert checkpoint.check_steps(tmp_path) == [1, 2]


def test_a_step_is_found(saved, tmp_path):
    folder, _ = saved
    run = folder.parent
    assert checkpoint.find_step(run) == folder / "3"
    assert checkpoint.find_step(run, 3) == folder / "3"
    assert checkpoint.find_step(folder / "3") == folder / "3"
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 4 in .*\[3\]"):
        checkpoint.find_step(run, 4)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        checkpoint.find_step(tmp_path)


def test_checksums_see_every_flipped_bit_and_every_swap():
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    expected = checksums({"a": jnp.asarray(x)})["a"]
    bits = x.view(np.uint32)
    for i, j in np.ndindex(x.shape):
        for bit in range(32):
            flipped = bits.copy()
            flipped[i, j] ^= np.uint32(1 << bit)
            assert checksums({"a": flipped})["a"] != expected
    for other in (x[::-1], x[:, ::-1], np.roll(x, 1), np.zeros_like(x)):
        assert checksums({"a": jnp.asarray(other)})["a"] != expected


def test_checksums_do_not_depend_on_sharding_and_take_all_dtypes():
    state = a_state(make_mesh(2, 4, 1), 1)
    alone = jax.tree.map(np.asarray, state.params)
    assert checksums(state.params) == checksums(alone)
    for dtype in (jnp.bfloat16, jnp.int32, jnp.bool_):
        assert checksums(jnp.ones((2, 2), dtype)) != checksums(jnp.zeros((2, 2), dtype))


def test_checksums_of_many_arrays_on_many_devices_come_to_an_end():
    """Programs of all CPU devices at a time wait for each other, until XLA aborts."""
    spread = NamedSharding(make_mesh(1, 8, 1), PartitionSpec("fsdp"))
    draw = np.random.default_rng(0).normal
    tree = {i: jax.device_put(draw(size=(256, 512)), spread) for i in range(400)}
    assert len(set(checksums(tree).values())) == 400


def each_data_file(change):
    def damage(step):
        for path in (step / "state").glob("**/d/*"):
            change(path)

    return damage


def flip_bits(path):
    content = bytearray(path.read_bytes())
    for at in range(len(content) // 2, len(content), max(len(content) // 8, 1)):
        content[at] ^= 4
    path.write_bytes(content)


DAMAGE = {
    "data cut": each_data_file(lambda p: os.truncate(p, p.stat().st_size // 2)),
    "data flipped": each_data_file(flip_bits),
    "data gone": each_data_file(Path.unlink),
    "manifest cut": lambda f: (f / "state/manifest.ocdbt").write_bytes(b"\x0c"),
    "state metadata cut": lambda f: (f / "state/_METADATA").write_text("{"),
    "state gone": lambda f: shutil.rmtree(f / "state"),
    "meta cut": lambda f: (f / "meta/metadata").write_text('{"format"'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(copy, kind):
    DAMAGE[kind](copy)
    with pytest.raises(DamagedCheckpointError, match=r"checkpoint .*3 is damaged") as e:
        restore(copy, make_mesh(8, 1, 1))
    assert "\n" not in str(e.value)


def alter_contract(step):
    path = step / "meta/metadata"
    meta = json.loads(path.read_text())
    meta["model"]["n_head"] = 2
    path.write_text(json.dumps(meta))


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


ALL_DAMAGE = {
    **DAMAGE,
    "contract altered": alter_contract,
    "tokenizer gone": lambda f: shutil.rmtree(f / "tokenizer"),
    "tokenizer cut": lambda f: os.truncate(f / "tokenizer/metadata", 3),
    "data zeroed": each_data_file(lambda p: p.write_bytes(bytes(p.stat().st_size))),
    "an empty folder": empty,
}


@pytest.mark.parametrize("kind", ALL_DAMAGE)
def test_a_damaged_step_is_set_aside_and_the_one_before_taken(
    two_steps, tmp_path, kind, capfd
):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    ALL_DAMAGE[kind](folder / "5")
    mesh = make_mesh(8, 1, 1)
    abstract = checkpoint.as_tree(abstract_state(GPT2(TINY), OPTIMIZER, mesh))
    seen = []

    def check(step_folder, contract):
        seen.append((step_folder.name, contract.step))

    contract, tree = checkpoint.latest_sound(folder, lambda: abstract, check)
    assert contract.step == 3
    assert seen[-1] == ("3", 3)
    expected = checkpoint.as_tree(a_state(mesh, 3))
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert [p.name for p in folder.iterdir() if p.name.isdecimal()] == ["3"]
    assert (tmp_path / "damaged/5").is_dir()
    notes = [x for x in capfd.readouterr().err.splitlines() if x.startswith("note: ")]
    [note] = notes
    assert f"checkpoint {folder / '5'} is damaged: " in note
    assert note.endswith(f"it is now {tmp_path / 'damaged/5'}")
    # and a run that goes on from there saves step 5 again
    save(folder, a_state(mesh, 5))
    assert checkpoint.latest_sound(folder, lambda: abstract, check)[0].step == 5


def test_an_older_step_that_lacks_a_part_is_set_aside_too(two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    shutil.rmtree(folder / "3/tokenizer")
    mesh = make_mesh(8, 1, 1)
    abstract = checkpoint.as_tree(abstract_state(GPT2(TINY), OPTIMIZER, mesh))
    contract, _ = checkpoint.latest_sound(folder, lambda: abstract, lambda *_: None)
    assert contract.step == 5
    assert (tmp_path / "damaged/3").is_dir()
    save(folder, a_state(mesh, 6))  # Orbax finds its way
    assert checkpoint.check_steps(folder) == [5, 6]


def test_nothing_is_begun_anew_when_no_step_is_sound(two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    for step in ("3", "5"):
        shutil.rmtree(folder / step / "meta")
    for _ in range(2):
        with pytest.raises(DamagedCheckpointError, match="no sound checkpoint is left"):
            checkpoint.latest_sound(folder, dict, lambda *_: None)
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["3", "5"]
    assert checkpoint.latest_sound(tmp_path / "a/b", dict, lambda *_: None) is None


def test_numbers_that_orbax_restores_wrong_are_caught(saved, tmp_path):
    # Saved whole by Orbax, but not what the checksums were taken of.
    folder, state = saved
    wrong = state.params["ln_f"]["bias"].at[3].multiply(1 + 2**-23)
    params = {**state.params, "ln_f": {**state.params["ln_f"], "bias": wrong}}
    save(tmp_path, TrainState(state.step, params, state.opt_state))
    shutil.copy(folder / "3/meta/metadata", tmp_path / "3/meta/metadata")
    with pytest.raises(
        DamagedCheckpointError, match="params/ln_f/bias fails its check"
    ):
        restore(tmp_path / "3", make_mesh(8, 1, 1))


def test_an_altered_contract_or_tokenizer_is_caught(copy):
    path = copy / "meta/metadata"
    meta = json.loads(path.read_text())
    meta["model"]["n_head"] = 2
    path.write_text(json.dumps(meta))
    with pytest.raises(DamagedCheckpointError, match="does not match its own hash"):
        checkpoint.read_contract(copy)


def test_a_step_with_a_part_missing_is_named(copy):
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(DamagedCheckpointError, match="no folder 'tokenizer'"):
        checkpoint.check_steps(copy.parent)


def test_a_save_that_was_cut_short_is_no_checkpoint(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "c")
    shutil.copytree(saved[0] / "3", tmp_path / "c/9.orbax-checkpoint-tmp")
    assert checkpoint.check_steps(tmp_path / "c") == [3]
    checkpoints = Checkpoints(tmp_path / "c", keep_last=1)
    assert checkpoints.latest_step() == 3
    checkpoints.close()


def test_keep_last_is_checked(tmp_path):
    with pytest.raises(ValueError, match="keep_last=0 must be >= 1"):
        Checkpoints(tmp_path, keep_last=0)


@pytest.mark.parametrize("name", ["lr[1e-3]", "a*b?", "back\\slash", "\udcff", "**"])
def test_a_folder_of_any_name_is_no_pattern(saved, tmp_path, name):
    folder = tmp_path / name / "checkpoints"
    save(folder, saved[1])
    back = restore(folder / "3", make_mesh(8, 1, 1))
    jax.tree.map(np.testing.assert_array_equal, back, checkpoint.as_tree(saved[1]))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert checkpoint.find_step(tmp_path / name) == folder / "3"


def test_arrays_that_lost_their_index_are_joined_anew(two_steps, tmp_path, capfd):
    """What versions before this one left in a folder with brackets in its path."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    for step in (3, 5):
        (folder / f"{step}/state/manifest.ocdbt").unlink()
        shutil.rmtree(folder / f"{step}/state/d")
    mesh = make_mesh(8, 1, 1)
    abstract = checkpoint.as_tree(abstract_state(GPT2(TINY), OPTIMIZER, mesh))
    contract, tree = checkpoint.latest_sound(folder, lambda: abstract, lambda *_: None)
    assert contract.step == 5
    expected = checkpoint.as_tree(a_state(mesh, 5, seed=1))
    jax.tree.map(np.testing.assert_array_equal, tree, expected)
    assert "damaged" not in capfd.readouterr().err
    # and those that were set aside by such a version are offered
    (tmp_path / "damaged").mkdir()
    (folder / "3").rename(tmp_path / "damaged/3")
    shutil.rmtree(folder / "5")
    with pytest.raises(DamagedCheckpointError, match="move 3 back, which can be read"):
        checkpoint.latest_sound(folder, dict, lambda *_: None)


@pytest.mark.parametrize(
    ("kind", "n"), [*((kind, 1) for kind in DAMAGE), ("data gone", 2)]
)
def test_a_save_that_is_not_whole_ends_the_run(tmp_path, monkeypatch, kind, n):
    mesh = make_mesh(8, 1, 1)
    checkpoints = Checkpoints(tmp_path, keep_last=9)

    def save_next(step):
        checkpoints.save(
            a_state(mesh, step), model=TINY, run={}, tokenizer=ByteTokenizer()
        )
        checkpoints.wait()

    for step in range(1, n):
        save_next(step)
    read_contract = checkpoint.read_contract  # which is what is read back first

    def spoil(step_folder):
        DAMAGE[kind](step_folder)
        return read_contract(step_folder)

    monkeypatch.setattr(checkpoint, "read_contract", spoil)
    with pytest.raises(OSError, match=rf"checkpoint .*{n} could not be saved: "):
        save_next(n)
    checkpoints.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"][: n - 1]


def test_nothing_waits_for_a_folder_that_cannot_be_made(tmp_path):
    """Threads of Orbax that wait would keep the process from its end for minutes."""
    folder, before = tmp_path / "checkpoints", {*threading.enumerate()}
    checkpoints = Checkpoints(folder, keep_last=9)
    folder.rmdir()
    folder.write_text("")  # nothing can be made in it, as if it were read-only
    state = a_state(make_mesh(8, 1, 1), 1)
    with pytest.raises(OSError, match=r"1 could not be saved: .*Not a directory"):
        checkpoints.save(state, model=TINY, run={}, tokenizer=ByteTokenizer())
    left = {*threading.enumerate()} - before
    assert "_SignalingThread" not in {type(thread).__name__ for thread in left}


def test_a_merge_that_does_nothing_is_found(tmp_path, monkeypatch):
    async def no_merge(*args, **kwargs):
        pass

    monkeypatch.setattr(
        "orbax.checkpoint._src.serialization.ocdbt_utils.merge_ocdbt_per_process_files",
        no_merge,
    )
    with pytest.raises(OSError, match=r"1 could not be saved: .*Manifest not found"):
        save(tmp_path, a_state(make_mesh(8, 1, 1), 1))
    assert list(tmp_path.iterdir()) == []


OBSTACLES = {
    "a dangling link": lambda p: (p / "99").symlink_to("/not/mounted/99"),
    "a link to itself": lambda p: (p / "99").symlink_to(p / "99"),
    "a link to a step": lambda p: (p / "99").symlink_to(p / "5"),
    "a file": lambda p: (p / "99").touch(),
    "a FIFO": lambda p: os.mkfifo(p / "99"),
}
STRAYS = ["0099", "٩٩", "99²", "²", "-99", " 99", "99 ", "+99", "9_9", "9e9", "12.bak"]


@pytest.mark.parametrize("kind", OBSTACLES)
def test_what_stands_in_the_place_of_a_step_is_named(two_steps, tmp_path, kind):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    OBSTACLES[kind](folder)
    message = r"checkpoints/99 has the name of a checkpoint and is (a symbolic|no)"
    with pytest.raises(ValueError, match=message):
        checkpoint.latest_sound(folder, dict, lambda *_: None)
    for step in (None, "best"):
        with pytest.raises(ValueError, match=message):
            checkpoint.find_step(tmp_path, step)
    assert checkpoint.find_step(tmp_path, 3) == folder / "3"


def test_what_has_no_name_of_a_step_is_left_alone(two_steps, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(two_steps, folder)
    for name in STRAYS:
        shutil.copytree(folder / "5", folder / name)
    (folder / "link").symlink_to(folder / "link")
    assert checkpoint.check_steps(folder) == [3, 5]
    for step in ("٣", "²", "-3", " 3", "3.0", "9" * 5000):
        with pytest.raises(ValueError, match="is neither a number nor 'best'"):
            checkpoint.find_step(tmp_path, step)
    save(folder, a_state(make_mesh(8, 1, 1), 6))  # no save is skipped for their sake
    assert checkpoint.check_steps(folder) == [3, 5, 6]
    assert {path.name for path in folder.iterdir()} >= {*STRAYS}


def test_special_files_in_a_step_are_damage(copy):
    (copy / "state/_METADATA").unlink()
    os.mkfifo(copy / "state/_METADATA")
    with pytest.raises(DamagedCheckpointError, match="_METADATA is a FIFO"):
        restore(copy, make_mesh(8, 1, 1))
