"""Files that were made to be dear: none costs more than its size allows.

PYTHONPATH=tests python tests/formats/test_budget.py FOLDER writes them all and prints
what opening each took, in a process of its own that gets 64 MB and 8 bytes for each
byte of the file.
"""

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from foreign import write_hf, write_llmc, write_nanogpt, write_sharded
from gpt2_jax.formats.open_model import open_model
from gpt2_jax.tokenizers.gpt2_files import BYTE_OF_CHARACTER
from tensorflow_files import block_of, table

MEMORY, SECONDS, MESSAGE = 64 << 20, 5, 300  # and 8 bytes, 1e-7 s for each byte
N = 200_000

GLOBAL = {
    name: b"c"
    + name.rsplit(".", 1)[0].encode()
    + b"\n"
    + name.rsplit(".", 1)[1].encode()
    for name in (
        *("collections.OrderedDict", "torch.Size", "torch.device", "_codecs.encode"),
        *("builtins.set", "torch._utils._rebuild_tensor_v2", "torch.FloatStorage"),
    )
}


def call(name: str, n_args: int) -> bytes:
    """Arguments 1, 2, ... of the memo, as often as there is room."""
    args = b"".join(b"h" + bytes([i + 1]) for i in range(n_args))
    return b"h\x00(" + args + b"tR"


def repeated(name: str, *args: bytes, times: int = N) -> bytes:
    """A call of `name` with the same arguments, again and again."""
    start = GLOBAL[name] + b"\nq\x00"
    start += b"".join(x + b"q" + bytes([i + 1]) for i, x in enumerate(args))
    return start + call(name, len(args)) * times


def text(s: str) -> bytes:
    return b"X" + struct.pack("<I", len(s.encode())) + s.encode()


def integer(n: int) -> bytes:
    data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(data)) + data


def bomb(depth: int = 60) -> bytes:
    """A list of two of a list of two ...: its repr has 2 ** depth brackets."""
    return b"]q\x00" + b"".join(
        b"](h" + bytes([i]) + b"h" + bytes([i]) + b"eq" + bytes([i + 1])
        for i in range(depth)
    )


LONG = text("a" * 1_000_000)
STORAGE = (
    b"(" + text("storage") + GLOBAL["torch.FloatStorage"] + b"\n" + text("0")
    + text("cpu") + b"K\x08tQ"
)  # fmt: skip
PICKLES: dict[str, bytes] = {
    "lists": b"]" * 4_000_000,
    "dicts": b"}" * 1_000_000,
    "marks": b"(" * 1_000_000,
    "sets": b"\x8f" * 1_000_000,
    "nothing": b"\x80\x02" * 3_000_000,
    "strings": text("ab") * 800_000,
    "floats": b"G" + bytes(8) + (b"G" + bytes(8)) * 800_000,
    "deep tuples": b")" + b"\x85" * 3_000_000,
    "deep lists": b"]" * N + b"a" * (N - 1),
    "wide tuple": b"(" + b"K\x01" * 1_000_000 + b"t",
    "wide characters": text("\U00010000" + "a" * 7_000_000),
    "an integer": integer(1 << 60_000_000),
    "repr": b"}(" + text("model") + b"}" + text("model_args") + b"}("
    + text("n_layer") + bomb() + b"uu",
    "repr of a name": b"}(" + text("model") + b"}(" + text("x") + bomb() + b"u"
    + text("model_args") + b"}u",
    "repr of a key": b"}" + bomb() + b"Ns",
    "colliding integers": b"}"
    + b"".join(integer(i * (2**61 - 1)) + b"Ns" for i in range(N)),
    "low bits collide": b"}"
    + b"".join(b"J" + struct.pack("<I", i << 10) + b"Ns" for i in range(1024)) * 60,
    "equal long keys": LONG + b"q\x00" + LONG + b"q\x01}h\x00Ns" + b"h\x01Ns" * N,
    "long integers as keys": integer(1 << 8_000_000) + b"q\x00}" + b"h\x00Ns" * N,
    "tuples as keys": b"}" + b"K\x01\x85Ns" * N,
    "memo": b"N" + b"".join(b"r" + struct.pack("<I", i << 12) for i in range(N)),
    "many memos": b"N"
    + b"".join(b"r" + struct.pack("<I", i) for i in range(1_000_000)),
    "device": repeated("torch.device", LONG),
    "device's number": repeated("torch.device", text("cuda"), integer(1 << 10_000)),
    "size": repeated("torch.Size", b"(" + b"K\x01" * 100_000 + b"t"),
    "set": repeated("builtins.set", b"](" + b"K\x01" * 100_000 + b"e"),
    "bytes": repeated("_codecs.encode", LONG, text("latin1")),
    "dicts in order": repeated("collections.OrderedDict"),
    "arguments": GLOBAL["torch.Size"] + b"\nq\x00(" + b"K\x01" * N + b"tq\x01"
    + b"h\x00h\x01R" * N,
    "names": text("torch" * 200_000) + b"q\x00" + text("Size") + b"q\x01"
    + b"h\x00h\x01\x93" * N,
    "tensors": STORAGE + b"q\x09" + repeated(
        *("torch._utils._rebuild_tensor_v2", b"h\x09", b"K\x00"),
        *(b"K\x02\x85", b"K\x01\x85"),
    ),
    "storages": STORAGE * 100_000,
    "keys of storages": GLOBAL["torch.FloatStorage"] + b"\nq\x00" + LONG + b"q\x01"
    + (b"(" + text("storage") + b"h\x00h\x01" + text("cpu") + b"K\x08tQ") * 100_000,
}  # fmt: skip


def pickle_files(folder: Path) -> Iterator[Path]:
    """Each of PICKLES in torch's two forms and beside a checkpoint."""
    for i, data in enumerate(PICKLES.values()):
        pickled = b"\x80\x04" + data + b"."
        path = folder / f"{i}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            archive.writestr("archive/data/0", bytes(32))
        yield path
        magic = b"\x80\x02" + integer(0x1950A86A20F9469CFC6C) + b".\x80\x02M\xe9\x03."
        machine = b"\x80\x02}" + text("little_endian") + b"\x88s."
        legacy = folder / f"{i}.legacy.pt"
        legacy.write_bytes(magic + machine + pickled)
        yield legacy
        beside = folder / f"meta{i}"
        beside.mkdir()
        write_nanogpt(beside / "ckpt.pt")
        (beside / "meta.pkl").write_bytes(pickled)
        yield beside


def zip_files(folder: Path) -> Iterator[Path]:
    def written(name: str, members: dict[str, bytes], compression: int = 0) -> Path:
        with zipfile.ZipFile(folder / name, "w", compression) as archive:
            for member, data in members.items():
                archive.writestr(member, data)
        return folder / name

    pickled = b"\x80\x02}."
    yield written("members.pt", {f"archive/data/{i}": b"" for i in range(30_000)})
    yield written("bomb.pt", {"archive/data.pkl": bytes(1 << 28)}, zipfile.ZIP_DEFLATED)
    yield written("large.pt", {"archive/data.pkl": bytes(1 << 24)})
    whole = written("one.pt", {"archive/data.pkl": pickled}).read_bytes()
    at = whole.index(b"PK\x01\x02")
    entry, end = whole[at : whole.index(b"PK\x05\x06")], whole[-22:]
    for name, count in (("list.pt", 500_000), ("short.pt", 65_535)):
        (folder / name).write_bytes(
            whole[:at] + entry * count + end[:8]
            + struct.pack("<HHII", 65_535, 65_535, len(entry) * count, at) + b"\0\0"
        )  # fmt: skip
        yield folder / name
    overlapping = b"".join(
        entry[:46] + f"archive/data/{i:07}"[: len(entry) - 46].encode()
        for i in range(20_000)
    )
    (folder / "overlap.pt").write_bytes(
        whole[:at] + overlapping + end[:8]
        + struct.pack("<HHII", 20_000, 20_000, len(overlapping), at) + b"\0\0"
    )  # fmt: skip
    yield folder / "overlap.pt"


ENTRY = '{"dtype":"F32","shape":[],"data_offsets":[0,0]}'
HEADERS = {
    "entries": "{" + ",".join(f'"{i}":{ENTRY}' for i in range(N)) + "}",
    "one name": "{" + ",".join([f'"":{ENTRY}'] * N) + "}",
    "shape": '{"x":{"dtype":"F32","shape":[' + "0," * 5_000_000 + "0]}}",
    "lists": '{"x":' + "[" + "[]," * 3_000_000 + "0]}",
    "deep": '{"x":' + "[" * 3_000_000,
    "metadata": '{"__metadata__":{' + '"a":"",' * 1_000_000 + '"b":""}}',
    "a name": '{"' + "\U00010000" * 3_000_000 + f'":{ENTRY}' + "}",
    "integers": '{"x":[' + ("9" * 4000 + ",") * 2_000 + "0]}",
}
TEXTS = {
    "lists": "[" + "[]," * 3_000_000 + "0]",
    "dicts": "[" + '{"":0},' * 1_000_000 + "0]",
    "deep": "[" * 9_000_000,
    "deep dicts": '{"a":' * 2_000_000,
    "integers": '{"n_layer":[' + ("9" * 4000 + ",") * 2_000 + "0]}",
    "digits": '{"n_layer":' + "9" * 5_000_000 + "}",
    "floats": '{"n_layer":[' + "1e9," * 2_000_000 + "0]}",
    "model_type": json.dumps({"model_type": "x\x1b\u202e" * 2_000_000}),
    "wide": json.dumps({"n_embd": "\U00010000" * 6_000_000}, ensure_ascii=False),
    "escapes": '{"model_type":"' + "\\n" * 5_000_000 + '"}',
    "keys": json.dumps({str(i): i for i in range(N)}),
    "weight_map": json.dumps({"weight_map": {str(i): f"a{i}" for i in range(N)}}),
}


def header_files(folder: Path) -> Iterator[Path]:
    for i, header in enumerate(HEADERS.values()):
        path = write_hf(folder / str(i))
        data = header.encode()
        path.joinpath("model.safetensors").write_bytes(
            struct.pack("<Q", len(data)) + data
        )
        yield path


def json_files(folder: Path) -> Iterator[Path]:
    hparams = {"n_vocab": 1, "n_ctx": 1, "n_embd": 1, "n_head": 1, "n_layer": 1}
    for i, content in enumerate(TEXTS.values()):
        for name in ("config.json", "model.safetensors.index.json"):
            path = write_sharded(folder / f"{i}-{name}")
            (path / name).write_text(content)
            yield path
        path = folder / f"{i}-tf"
        path.mkdir()
        (path / "hparams.json").write_text(content)
        (path / "model.ckpt.index").touch()
        yield path
        beside = folder / f"meta{i}"
        beside.mkdir()
        write_nanogpt(beside / "ckpt.pt")
        (beside / "meta.json").write_text(content)
        yield beside
    for i, value in enumerate(
        (b"\x0a\x00" * 500_000, b"\x0a\x02ab" * 250_000, b"\x08\x01" * 500_000)
    ):
        path = folder / f"index{i}"
        path.mkdir()
        (path / "hparams.json").write_text(json.dumps(hparams))
        (path / "model.ckpt.index").write_bytes(index_of(value))
        yield path


def index_of(value: bytes) -> bytes:
    """A TensorFlow index whose header is `value`."""
    return table([block_of([(b"", value)])])


def other_files(folder: Path) -> Iterator[Path]:
    path = write_llmc(folder / "layers.bin")
    data = bytearray(path.read_bytes())
    data[16:20] = struct.pack("<i", 2**31 - 1)
    path.write_bytes(data)
    yield path
    overlapping = write_hf(folder / "layers", n_layer=N, n_embd=2, n_head=1)
    names = ("ln_1", "ln_2")
    header = {
        f"h.{i}.{name}.{leaf}": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        for i in range(5000)
        for name in names
        for leaf in ("weight", "bias")
    }
    text = json.dumps(header).encode()
    overlapping.joinpath("model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + bytes(8)
    )
    yield overlapping


def tokenizer_files(folder: Path) -> Iterator[Path]:
    vocab = json.dumps(BYTE_OF_CHARACTER)
    tokens = {f"x{i}": {"content": f"x{i}"} for i in range(N)}
    two = {"vocab.json": vocab.encode(), "merges.txt": b""}
    ids = json.dumps({name: 300 + i for i, name in enumerate(tokens)}).encode()
    listed = json.dumps({"added_tokens_decoder": {k[1:]: v for k, v in tokens.items()}})
    everything = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x110000)]))
    for i, files in enumerate(
        (
            two | {"merges.txt": b"a b\n" * 3_000_000},
            two | {"merges.txt": b"\n" * 12_000_000},
            two | {"merges.txt": b"a " * 6_000_000},
            two | {"added_tokens.json": ids},
            two | {"tokenizer_config.json": listed.encode()},
            {"tokenizer.model": b"\x0a\x00" * 5_000_000},
            {"tokenizer.model": b"\x12\x80\x94\xeb\xdc\x03" + b"\x2a\x00" * 5_000_000},
            {"characters.json": json.dumps(everything).encode()},
        )
    ):
        path = write_hf(folder / str(i))
        for name, content in files.items():
            (path / name).write_bytes(content)
        yield path


KINDS: dict[str, Callable[[Path], Iterator[Path]]] = {
    "pickles": pickle_files,
    "zips": zip_files,
    "headers": header_files,
    "json": json_files,
    "others": other_files,
    "tokenizers": tokenizer_files,
}


def size_of(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def cost(path: Path) -> dict[str, Any]:
    """What opening `path` took, in a child of its own whose memory is limited."""
    size, (receive, send) = size_of(path), os.pipe()
    child = os.fork()
    if child:
        os.close(send)
        with os.fdopen(receive) as file:
            told = file.read()
        os.waitpid(child, 0)
        return json.loads(told or '{"kind": "died"}') | {
            "path": str(path),
            "size": size,
        }
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY + 8 * size
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    before = time.process_time()
    kind, message = "", ""
    try:
        open_model(path)
    except BaseException as error:
        kind, message = type(error).__name__, str(error)[:100_000]
    seconds = time.process_time() - before
    result = {"kind": kind, "message": message, "seconds": seconds}
    with os.fdopen(send, "w") as file:
        json.dump(result, file)
    os._exit(0)


def measure(folder: Path, kinds: list[str]) -> Iterator[dict[str, Any]]:
    """The cost of each file of those kinds."""
    for kind in kinds:
        for path in KINDS[kind](folder):
            yield cost(path)
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def check(folder: Path, kinds: list[str], least: int) -> None:
    command = [sys.executable, "-W", "ignore", __file__, str(folder), *kinds]
    told = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    results = [json.loads(line) for line in told.stdout.splitlines()]
    assert len(results) >= least
    for result in results:
        assert result["kind"] in ("", "ValueError", "FileNotFoundError"), result
        message = result["message"].replace(str(folder), "")
        assert message.isprintable(), result
        assert len(message) <= MESSAGE, result
        assert result["seconds"] < SECONDS + 1e-7 * result["size"], result


def test_some_files_cost_no_more_than_their_size_allows(tmp_path: Path):
    check(tmp_path, ["headers", "zips"], least=14)


@pytest.mark.slow
def test_no_file_costs_more_than_its_size_allows(tmp_path: Path):
    check(tmp_path, [*KINDS], least=160)


if __name__ == "__main__":
    for result in measure(Path(sys.argv[1]), sys.argv[2:] or [*KINDS]):
        print(json.dumps(result), flush=True)
