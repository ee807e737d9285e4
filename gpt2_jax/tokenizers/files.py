"""Tokenizers as files: to load, to save, and to compare by hash.

`load_tokenizer` finds the files of a tokenizer, `tokenizer_from_files` builds it from
their contents, `save_tokenizer` writes what its `files()` returns.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from gpt2_jax.runtime.files import check_regular, user_path
from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.gpt2_files import FILE_SETS, list_file_sets
from gpt2_jax.tokenizers.no_tokenizer import IDS_FILE, NoTokenizer
from gpt2_jax.tokenizers.plain import ByteTokenizer, CharTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.tokenizers.sentencepiece import SentencePieceTokenizer
from gpt2_jax.tokenizers.token_roles import BESIDE, ROLES

MOST_BYTES = 1 << 28  # the largest file that is read
# The kinds that are saved as one JSON file, in the order in which they are looked for.
_KIND_OF_FILE = {
    "bytes.json": ByteTokenizer.kind,
    "characters.json": CharTokenizer.kind,
    "tokenizer.json": GPT2Tokenizer.kind,
    IDS_FILE: NoTokenizer.kind,
}


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Loads the tokenizer in a folder, or the one that a file belongs to.

    A folder is searched for, in this order: `*.model` (SentencePiece, exactly one),
    `bytes.json`, `characters.json`, `tokenizer.json`, `ids.json` (a model without a
    tokenizer), `vocab.json` + `merges.txt`, `encoder.json` + `vocab.bpe`. Either file
    of a pair stands for both. For GPT-2's BPE, the files in `token_roles.BESIDE` are
    read as well, where they exist.

    Raises:
      FileNotFoundError: when there is none, with the names that were searched for.
      ValueError: as `tokenizer_from_files`, with the path in front.
    """
    path = user_path(path)
    if path.is_dir():
        folder, (kind, names) = path, _find_in(path)
    elif path.exists():
        folder, (kind, names) = path.parent, _find_set_of(path)
    else:
        raise FileNotFoundError(f"no tokenizer: {path} does not exist")
    if kind == GPT2Tokenizer.kind:
        names += tuple(n for n in (*BESIDE, ROLES) if (folder / n).is_file())
    files = {name: _read_file(folder / name) for name in names}
    if kind == SentencePieceTokenizer.kind:
        files = {"tokenizer.model": files[names[0]]}
    try:
        return tokenizer_from_files(kind, files)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def tokenizer_from_files(kind: str, files: Mapping[str, bytes]) -> Tokenizer:
    """Builds a tokenizer from its `kind` and its `files()`.

    Raises:
      ValueError: on an unknown kind, and on files that are missing or damaged.
    """
    if kind == ByteTokenizer.kind:
        return ByteTokenizer()
    if kind == CharTokenizer.kind:
        return CharTokenizer.from_json(_file(files, "characters.json"))
    if kind == GPT2Tokenizer.kind:
        return GPT2Tokenizer(files)
    if kind == SentencePieceTokenizer.kind:
        return SentencePieceTokenizer(_file(files, "tokenizer.model"))
    if kind == NoTokenizer.kind:
        return NoTokenizer.from_json(_file(files, IDS_FILE))
    raise ValueError(
        f"unknown tokenizer kind {kind!r}: not bytes, char, gpt2 or sentencepiece"
    )


def _file(files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise ValueError(f"the tokenizer's file {name} is missing; given: {[*files]}")
    return files[name]


def _read_file(path: Path) -> bytes:
    check_regular(path)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than {MOST_BYTES:,}")
    return path.read_bytes()


def _find_in(folder: Path) -> tuple[str, tuple[str, ...]]:
    """Returns (kind, file names) of the tokenizer in a folder."""
    models = sorted(p.name for p in folder.glob("*.model"))
    if len(models) > 1:
        raise ValueError(f"{folder} holds several models, give one: {models}")
    if models:
        return SentencePieceTokenizer.kind, (models[0],)
    for name, kind in _KIND_OF_FILE.items():
        if (folder / name).is_file():
            return kind, (name,)
    for names in FILE_SETS:
        if all((folder / name).is_file() for name in names):
            return GPT2Tokenizer.kind, names
    wanted = [("*.model",), *((name,) for name in _KIND_OF_FILE), *FILE_SETS[1:]]
    raise FileNotFoundError(
        f"no tokenizer in {folder}: looked for {list_file_sets(wanted)}"
    )


def _find_set_of(path: Path) -> tuple[str, tuple[str, ...]]:
    """Returns (kind, file names) of the tokenizer that a file belongs to."""
    if path.suffix == ".model":
        return SentencePieceTokenizer.kind, (path.name,)
    if path.name in _KIND_OF_FILE:
        return _KIND_OF_FILE[path.name], (path.name,)
    for names in FILE_SETS:
        if path.name in names:
            if missing := [n for n in names if not path.with_name(n).is_file()]:
                raise FileNotFoundError(f"{path} needs {missing[0]} beside it")
            return GPT2Tokenizer.kind, names
    raise ValueError(
        f"{path} is no tokenizer file: not *.model, {', '.join(_KIND_OF_FILE)}, "
        f"{list_file_sets(FILE_SETS[1:])}"
    )


def save_tokenizer(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Writes a tokenizer into a folder, created if need be, for `load_tokenizer`."""
    folder = user_path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)


def files_hash(kind: str, files: Mapping[str, bytes]) -> str:
    """Returns the SHA-256 of a tokenizer's kind and files, in hex."""
    digest = hashlib.sha256(kind.encode())
    for name, content in sorted(files.items()):
        digest.update(b"\0%s\0%d\0" % (name.encode(), len(content)))
        digest.update(content)
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Returns a SHA-256, in hex: equal for tokenizers with equal files."""
    return files_hash(tokenizer.kind, tokenizer.files())
