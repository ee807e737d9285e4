"""What a run is trained on, after the run, its data or both were moved or changed."""

import os
import shutil

import numpy as np
import pytest

from gpt2_jax.data import run_data
from gpt2_jax.data.prepare import load_index, prepare
from gpt2_jax.data.run_data import (
    examples_tokenizer,
    kept_examples,
    prepared_folder,
    run_examples,
    run_folders,
)
from gpt2_jax.tokenizers.files import save_tokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer

TEXT = "to be or not to be, that is the question\n" * 20
ASKED = {"tokenizer": "bytes", "vocab_size": None, "splits": (0.8, 0.1, 0.1)}


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a text and a run that has begun, from which it was started."""
    home = tmp_path / "home"
    (home / "run/checkpoints").mkdir(parents=True)
    (home / "text.txt").write_text(TEXT)
    monkeypatch.chdir(home)
    prepared_folder("text.txt", home / "run/data", **ASKED)
    return home


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


def touched(home):
    os.utime(home / "text.txt", (1, 1))
    return home, "text.txt", ""


def moved(home):
    os.chdir(home.rename(home.with_name("new")))
    return home.with_name("new"), str(home.with_name("new") / "text.txt"), ""


def copied(home):
    new = shutil.copytree(home, home.with_name("new"), copy_function=shutil.copyfile)
    return new, str(new / "text.txt"), ""


def from_elsewhere(home):
    os.chdir("/")
    return home, "text.txt", "the run goes on with what is in"


def removed(home):
    (home / "text.txt").unlink()
    return home, str(home / "text.txt"), "the run goes on with what is in"


def renamed(home):
    (home / "text.txt").rename(home / "text2.txt")
    return home, "text2.txt", ""


@pytest.mark.parametrize(
    "change", [touched, moved, copied, from_elsewhere, removed, renamed]
)
def test_the_same_text_is_the_same_wherever_it_is(home, capsys, monkeypatch, change):
    expected = shards(home / "run/data")
    home, path, said = change(home)
    for _ in range(2):
        out = prepared_folder(path, home / "run/data", **ASKED)
        assert shards(out) == expected
        assert out == home / "run/data"
        err = capsys.readouterr().err
        assert said in err
        assert len(err.splitlines()) == bool(said)
        load_index(out)
        # what was compared once is known by its time
        monkeypatch.setattr(run_data, "content_hash", None)


@pytest.mark.parametrize("text", [TEXT.replace("be", "bo"), TEXT + "more"])
def test_another_text_is_refused_by_both_names(home, text):
    (home / "text.txt").write_text(text)
    with pytest.raises(ValueError, match=r"^text.txt is not the text that") as error:
        prepared_folder("text.txt", home / "run/data", **ASKED)
    said = str(error.value)
    assert f"{home / 'run/data'} was prepared of, which was {home}/text.txt" in said
    assert said.endswith("choose another workdir, or give what this run began with")


def test_a_tokenizer_that_is_gone_is_that_of_the_data(home, capsys):
    save_tokenizer(CharTokenizer(TEXT), home / "given")
    asked = {**ASKED, "tokenizer": "given"}
    out = prepared_folder("text.txt", home / "other", **asked)
    shutil.rmtree(home / "given")
    assert prepared_folder("text.txt", home / "other", **asked) == out
    assert "the run goes on with the tokenizer in" in capsys.readouterr().err
    save_tokenizer(CharTokenizer(TEXT + "xyz"), home / "given")
    with pytest.raises(ValueError, match="was prepared with tokenizer="):
        prepared_folder("text.txt", home / "other", **asked)


@pytest.mark.parametrize("mixture", [False, True])
def test_prepared_folders_are_found_again(home, capsys, monkeypatch, mixture):
    for name in ("a", "b"):
        prepare("text.txt", home / name, ByteTokenizer(), splits=(0.8, 0.1, 0.1))
    names = ["a", "b"] if mixture else ["a"]
    data = {"mixture": [(n, 1) for n in names]} if mixture else {"path": "a"}
    run = home / "run"

    def found(run=run, **kwargs):
        return [each.resolve() for each in run_folders(data, run, **kwargs)]

    assert found(keep=True) == [home / n for n in names]
    before = (run / "data.json").read_bytes()
    os.chdir("/")  # a relative name means nothing here
    assert found(keep=True) == [home / n for n in names]
    assert (run / "data.json").read_bytes() == before
    assert len(capsys.readouterr().err.splitlines()) == len(names)
    new = home.rename(home.with_name("new"))  # with the run
    assert found(new / "run") == [new / n for n in names]
    os.chdir(new)
    monkeypatch.setattr("sys.stderr", None)  # nothing is said of what is where it was
    assert found(new / "run") == [new / n for n in names]


def test_prepared_folders_with_other_data_are_refused(home):
    prepare("text.txt", home / "a", ByteTokenizer(), splits=(0.8, 0.1, 0.1))
    data = {"path": "a"}
    run_folders(data, home / "run", keep=True)
    (home / "text.txt").write_text(TEXT * 2)
    prepare("text.txt", home / "a", ByteTokenizer(), splits=(0.8, 0.1, 0.1))
    with pytest.raises(ValueError, match=r"home/a is not what .*/run was begun with"):
        run_folders(data, home / "run")
    shutil.rmtree(home / "a")
    with pytest.raises(FileNotFoundError, match=r"no prepared data in a, nor in /.*/a"):
        run_folders(data, home / "run")
    (home / "run/data.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"data.json is damaged"):
        run_folders(data, home / "run")


def test_shards_of_others_may_move(home, capsys):
    (home / "ids").mkdir()
    ids = np.arange(200, dtype="<u2")
    for name in ("train", "val"):
        ids.tofile(home / f"ids/{name}.bin")
    run, asked = home / "run/ids", {**ASKED, "vocab_size": 4096}
    prepared_folder("ids", run, **asked)
    os.utime(home / "ids/train.bin", (1, 1))
    prepared_folder("ids", run, **asked)
    (home / "ids").rename(home / "there")
    prepared_folder("there", run, **asked)
    index = load_index(run)
    assert index.splits["train"].shards[0].name == str(home / "there/train.bin")
    os.chdir("/")
    assert capsys.readouterr().err == ""
    prepared_folder("there", run, **asked)
    assert "there is not here: the run goes on with" in capsys.readouterr().err
    ids[::-1].tofile(home / "there/train.bin")
    with pytest.raises(ValueError, match=r"does not hold the shards that .* refers to"):
        prepared_folder(home / "there", run, **asked)


def test_examples_are_kept_with_the_run(home, capsys):
    path, run = home / "examples.jsonl", home / "run"
    path.write_text("1")
    (run / "checkpoints").rmdir()
    assert run_examples("examples.jsonl", run) == run / "examples/examples.jsonl"
    path.write_text("2")  # nothing has been saved yet
    assert run_examples("examples.jsonl", run).read_text() == "2"
    (run / "checkpoints").mkdir()
    os.utime(path, (1, 1))
    kept = run_examples("examples.jsonl", run)
    assert kept == kept_examples(run)
    assert capsys.readouterr().err == ""
    path.write_text("3")
    with pytest.raises(ValueError, match=r"examples.jsonl has changed .*; .*run/exam"):
        run_examples("examples.jsonl", run)
    path.unlink()
    assert run_examples("examples.jsonl", run).read_text() == "2"
    assert "No such file or directory: the run goes on" in capsys.readouterr().err


def test_examples_of_earlier_versions_had_a_mark(home):
    path, run = home / "examples.jsonl", home / "run"
    path.write_text("1")
    digest = "6b86b273ff34fce19d6b804eff5a3f5747ada4eaa22f1d49c01e52ddb7875b4b"
    (run / "examples.sha256").write_text(digest)
    assert run_examples(str(path), run).read_text() == "1"
    shutil.rmtree(run / "examples")
    path.write_text("2")
    with pytest.raises(ValueError, match="has changed since this run began"):
        run_examples(str(path), run)


def test_the_tokenizer_of_examples_is_kept(home, capsys):
    save_tokenizer(CharTokenizer(TEXT), home / "given")
    first = examples_tokenizer("given", None, home / "run")
    shutil.rmtree(home / "given")
    again = examples_tokenizer("given", None, home / "run")
    assert again.files() == first.files()
    assert "the run goes on with the tokenizer in" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        examples_tokenizer("given", None, home)
