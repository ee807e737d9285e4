"""Programs end at once on Ctrl-C, and whatever becomes of what they print.

Most of them here import nothing but the door, which is all that they need to start.
"""

import ast
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A child of a process with threads: it does nothing but become another program.
pytestmark = pytest.mark.filterwarnings(r"ignore:os\.fork\(\) was called")

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="/proc, /dev/full")
DOOR = "from gpt2_jax.commands import door; import os, sys, time; "


def start(code: str, **kwargs) -> subprocess.Popen:
    handler = kwargs.pop("sigint", signal.SIG_DFL)
    return subprocess.Popen(
        [sys.executable, "-c", DOOR + code],
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
        **{"stdout": subprocess.PIPE, **kwargs},
    )


def finish(process: subprocess.Popen) -> tuple[bytes | None, bytes, int]:
    out, err = process.communicate(timeout=60)
    return out, err, process.returncode


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_scripts_begin_with_the_door(path):
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert ast.unparse(body[1]) == "from gpt2_jax.commands.door import run"


def test_the_door_is_fast_to_open():
    code = (
        "import gpt2_jax.commands.door, sys;"
        "print(*{'jax', 'absl', 'numpy'} & {*sys.modules})"
    )
    assert subprocess.check_output([sys.executable, "-c", code]) == b"\n"


def test_ctrl_c_ends_a_program_in_silence():
    process = start("print('up', flush=True); time.sleep(60)")
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert finish(process) == (b"", b"", -signal.SIGINT)


@needs_linux
def test_ctrl_c_ends_scripts_while_they_import():
    processes = [
        subprocess.Popen(
            [sys.executable, path, "--help"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        for path in (ROOT / "scripts/train.py", ROOT / "scripts/generate.py")
    ]
    for process in processes:
        while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text("utf-8"):
            time.sleep(0.005)
        process.send_signal(signal.SIGINT)
        assert finish(process) == (None, b"", -signal.SIGINT)


def test_ctrl_c_that_is_ignored_stays_so():
    process = start(
        "print('up', flush=True); sys.stdin.read()",
        sigint=signal.SIG_IGN,
        stdin=subprocess.PIPE,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert finish(process) == (b"", b"", 0)


def test_characters_that_can_not_be_shown_are_escaped():
    process = start(
        r"print('\u65e5 \xe9 \udce9'); print('\u65e5', file=sys.stderr)",
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )
    assert finish(process) == (b"\\u65e5 \xe9 \\udce9\n", b"\\u65e5\n", 0)


PRINTED = r"print('a\x1b[2J\x9b\r\n\tb')"


def test_a_terminal_gets_no_control_characters():
    ours, theirs = pty.openpty()
    process = start(PRINTED, stdout=theirs)
    assert finish(process)[1:] == (b"", 0)
    os.close(theirs)
    assert os.read(ours, 99).replace(b"\r\n", b"\n") == b"a\\x1b[2J\\x9b\\x0d\n\tb\n"
    os.close(ours)


def test_a_pipe_gets_what_was_printed():
    assert finish(start(PRINTED)) == (b"a\x1b[2J\xc2\x9b\r\n\tb\n", b"", 0)


MANY = "[print('x' * 99) for _ in range(9999)]; print('done', file=sys.stderr)"


@pytest.mark.parametrize("lasting", [False, True])
def test_a_reader_that_leaves(lasting):
    with start(f"door._stdout.lasting = {lasting}; {MANY}") as process:
        process.stdout.close()
        err, status = process.stderr.read(), process.wait()
    assert (err, status) == ((b"done\n", 0) if lasting else (b"", 141))


@needs_linux
@pytest.mark.parametrize("lasting", [False, True])
def test_a_full_disk(lasting):
    with open("/dev/full", "wb") as full:
        process = start(f"door._stdout.lasting = {lasting}; {MANY}", stdout=full)
        _, err, status = finish(process)
    error = b"error: standard output: No space left on device\n"
    assert (err, status) == ((b"done\n", 0) if lasting else (error, 2))


def test_the_help_of_a_script_to_a_reader_that_leaves():
    with subprocess.Popen(
        [sys.executable, ROOT / "scripts/plot.py", "--helpfull"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_files_do_not_take_the_place_of_closed_streams(tmp_path):
    code = (
        "print(sys.stdin.read(), 'x'); print('y', file=sys.stderr); "
        "f = open('file', 'w'); [os.write(i, b'log') for i in (1, 2)]; f.write('ours')"
    )
    command = '"$0" -c "$1" 0<&- 1>&- 2>&-'
    subprocess.run(
        ["sh", "-c", command, sys.executable, DOOR + code], cwd=tmp_path, check=True
    )
    assert (tmp_path / "file").read_text(encoding="utf-8") == "ours"
