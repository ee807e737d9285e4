"""What a path stands for: by what is in it, or by the file that was named."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from foreign import (
    HF_CONFIG,
    hf_state,
    write_bin,
    write_hf,
    write_llmc,
    write_nanogpt,
    write_sharded,
    write_torch,
)
from gpt2_jax.formats.nanogpt import is_nanogpt
from gpt2_jax.formats.open_model import Source, open_model
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer


def opens(path: Path | str, *, activation: str = "gelu_new") -> Source:
    source = open_model(path)
    assert source.config.n_layer == 2
    assert source.config.activation_function == activation
    return source


@pytest.mark.parametrize("name", ["metrics.jsonl", "meta", "checkpoints", "damaged"])
def test_what_lies_beside_a_model_makes_no_run(tmp_path: Path, name: str):
    folder = write_hf(tmp_path / "m")
    if "." in name:
        (folder / name).write_text("{}\n")
    else:
        (folder / name / "notes").mkdir(parents=True)
    opens(folder)
    opens(f"{folder}//")


def test_a_folder_of_two_models_is_refused(tmp_path: Path):
    folder = write_hf(tmp_path / "m")
    write_nanogpt(folder / "ckpt.pt")
    both = "holds a Hugging Face model and a nanoGPT checkpoint: name a file in it"
    with pytest.raises(ValueError, match=both):
        open_model(folder)
    opens(folder / "model.safetensors")
    opens(folder / "ckpt.pt", activation="gelu")
    (folder / "checkpoints/10").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="holds a run's checkpoints and a Hugging Face"
    ):
        open_model(folder)
    with pytest.raises(ValueError, match=r"checkpoint .*10 is damaged"):
        open_model(folder, step=10)


def test_a_run_that_saved_nothing(tmp_path: Path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        open_model(tmp_path)
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        open_model(write_hf(tmp_path / "m"), step=3)


FILES: dict[str, Callable[[Path], Path]] = {
    "model.safetensors": write_hf,
    "model.safetensors.index.json": write_sharded,
    "pytorch_model.bin": write_bin,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_a_folder(tmp_path: Path, name: str):
    folder = FILES[name](tmp_path / "m")
    opens(folder / name)
    link = tmp_path / "link"
    link.symlink_to(folder / name)  # the config lies beside what it points to
    opens(link)
    if "index" not in name:
        other = folder / f"OTHER{Path(name).suffix.upper()}"
        (folder / name).rename(other)
        opens(other)
        (folder / name).symlink_to(other.name)  # as in the hub's cache
        opens(folder)


def test_names_of_torch_files(tmp_path: Path):
    for name in ("a.pt", "A.PT", "model.pth", "model.bin", "without"):
        opens(write_nanogpt(tmp_path / name), activation="gelu")
    write_torch(tmp_path / "state.pth", hf_state())
    with pytest.raises(ValueError, match=r"state\.pth is no nanoGPT checkpoint"):
        open_model(tmp_path / "state.pth")
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    opens(tmp_path / "state.pth")
    opens(write_llmc(tmp_path / "MODEL.BIN"))
    assert not is_nanogpt([])


def test_special_files(tmp_path: Path):
    folder = write_hf(tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        shutil.move(folder / name, tmp_path / name)
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match=f"{name} is a FIFO"):
            open_model(folder)
        (folder / name).unlink()
        (folder / name).symlink_to("/dev/zero")
        with pytest.raises(ValueError, match=f"{name} is a character device"):
            open_model(folder)
        (folder / name).unlink()
        shutil.move(tmp_path / name, folder / name)
    os.mkfifo(tmp_path / "ckpt.pt")
    for path in (tmp_path, tmp_path / "ckpt.pt"):
        with pytest.raises(ValueError, match=r"ckpt\.pt is a FIFO"):
            open_model(path)
    with pytest.raises(ValueError, match="is a character device"):
        open_model("/dev/zero")


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 548105171\n"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "model.bin", "ckpt.pt"]
)
def test_pointers_of_git_lfs(tmp_path: Path, name: str):
    folder = write_hf(tmp_path / "m")
    (folder / name).write_text(POINTER)
    path = folder / name if name in ("model.bin", "ckpt.pt") else folder
    with pytest.raises(ValueError, match=f"{name} is a pointer of Git LFS"):
        open_model(path)


def test_a_pointer_in_place_of_the_characters(tmp_path: Path):
    path = write_nanogpt(tmp_path / "ckpt.pt")
    (tmp_path / "meta.pkl").write_text(POINTER)
    tokenizer = opens(path, activation="gelu").tokenizer
    assert isinstance(tokenizer, NoTokenizer)
    assert "meta.pkl is a pointer of Git LFS" in tokenizer.why


def test_sparse_giants(tmp_path: Path):
    folder = write_hf(tmp_path / "m")
    for path in (
        folder / "model.safetensors",
        write_nanogpt(tmp_path / "ckpt.pt"),
        write_llmc(tmp_path / "model.bin"),
    ):
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # holes: they take no room on the disk
        with pytest.raises(ValueError, match="hardly any of its 1,099,511,627,776"):
            open_model(folder if path.parent == folder else path)


def test_files_that_change_while_they_are_read(tmp_path: Path):
    for write in (write_hf, lambda path: write_nanogpt(path.with_suffix(".pt"))):
        path = write(tmp_path / "m")
        tensors = open_model(path)
        file = path / "model.safetensors" if path.is_dir() else path
        data = file.read_bytes()
        for size in (len(data) - 5000, len(data) + 1):
            file.write_bytes(data[:size].ljust(size))
            with pytest.raises(ValueError, match="changed while it was read"):
                tensors.load(np.float32, None)
        file.write_bytes(data)
