"""What is half written is removed, whatever ends its writing."""

import signal
import subprocess
import sys

import pytest

from gpt2_jax.runtime.partial import appears_whole, removed

# A child of a process with threads: it does nothing but become another program.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called")


def write(path, kind):
    if kind == "folder":
        path.mkdir()
        path /= "part"
    path.write_bytes(b"x")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_at_an_error(tmp_path, kind):
    def fail():
        with removed(tmp_path / "x"):
            write(tmp_path / "x", kind)
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_stays(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with removed(tmp_path / "x.tmp"):
        write(tmp_path / "x.tmp", "file")
        (tmp_path / "x.tmp").rename(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_at_ctrl_c_in_a_program(tmp_path, kind):
    code = (
        "from gpt2_jax.commands import door; import time, pathlib, sys\n"
        "from gpt2_jax.runtime.partial import appears_whole, removed\n"
        "path = pathlib.Path(sys.argv[1])\n"
        "with removed(path):\n"
        + ("    path.mkdir(); path /= 'part'\n" if kind == "folder" else "")
        + "    path.touch(); print('up', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "x"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout.readline() == b"up\n"
        process.send_signal(signal.SIGINT)
        assert process.wait() == -signal.SIGINT
        assert process.stderr.read() == b""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("is_folder", [False, True])
def test_of_two_that_write_the_same_one_wins_whole(tmp_path, is_folder):
    out = tmp_path / "new/out"

    def write(text, meanwhile):
        with appears_whole(out) as path:
            if is_folder:
                path.mkdir()
                path = path / "text"
            path.write_text(text)
            meanwhile()

    with pytest.raises(ZeroDivisionError):
        write("0", lambda: 1 / 0)
    with pytest.raises(FileExistsError, match="out exists already"):
        write("slow", lambda: write("fast", lambda: None))
    assert (out / "text" if is_folder else out).read_text() == "fast"
    assert list(out.parent.iterdir()) == [out]
