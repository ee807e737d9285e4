"""Files of strangers, and how what stands in them is shown."""

import os
from pathlib import Path

import pytest

from gpt2_jax.checks import one_line, shown
from gpt2_jax.runtime.files import (
    check_regular,
    parse_json,
    read_json,
    user_path,
)


def test_messages_are_one_line_of_plain_text():
    assert one_line("a\n  b\tc") == "a b c"
    assert one_line("\x1b[2J\u202eok\x07") == "\\x1b[2J\\u202eok\\x07"
    assert one_line("x" * 10_000_000) == "x" * 297 + "..."
    assert one_line("日本 é €") == "日本 é €"


def test_values_are_shown_in_bounded_time():
    nested: list = []
    for _ in range(100):  # repr would have 2**100 characters
        nested = [nested, nested]
    assert len(shown(nested)) <= 60
    assert shown(1 << 10_000_000) == "an integer of 10000001 bits"
    assert len(shown("x" * 1_000_000)) <= 60
    assert shown({"a": [1, 2]}) == "{'a': [1, 2]}"


def test_home_is_the_users(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert user_path("~/run") == Path("/home/me/run")
    assert user_path("a/~b") == Path("a/~b")
    assert user_path("file:///a%20b") == user_path("file://localhost/a%20b")
    assert user_path("file:///a%20b") == Path("/a b")
    assert user_path("a ") == Path("a ")  # a name may end in a space


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("~no-such-user/x", "no home folder of that name"),
        ("", "a path is empty"),
        ("a\0b", r"'a\\x00b' has a NUL byte"),
        ("gs://bucket/run", "is a URL, not a path of this machine"),
        ("file://host/run", "file:///PATH is a file of this machine"),
        ("x" * 256, "a path or name of 256 bytes is longer than 255"),
        ("x/" * 2048, "a path or name of 4096 bytes is longer than 4095"),
    ],
)
def test_what_is_no_path(path, why):
    with pytest.raises(ValueError, match=why) as caught:
        user_path(path)
    assert len(str(caught.value)) <= 150


def test_only_regular_files_are_read(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(ValueError, match="fifo is a FIFO, not a regular file"):
        check_regular(fifo)
    with pytest.raises(ValueError, match="is a character device"):
        check_regular(Path("/dev/zero"))
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_regular(tmp_path)
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ValueError, match=r"pointer of Git LFS.*git lfs pull"):
        check_regular(pointer)


def test_json_of_a_stranger(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(path) == {"a": 1}
    for data, why in (
        (b"[" * 200_000, "nested too deep"),
        (b"\xff", "not UTF-8"),
        (b"1" * 5000, "not JSON"),
        (b"{", "not JSON"),
    ):
        with pytest.raises(ValueError, match=rf"there: .*{why}"):
            parse_json(data, "there")
    with pytest.raises(ValueError, match="8 bytes, more than 4"):
        path.write_bytes(b"[1, 2, 3"), read_json(path, limit=4)
