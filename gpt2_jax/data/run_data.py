"""What a run is trained on, found again wherever the run and its data were moved to.

Text is prepared in the run's folder, and a file of examples is copied there: whoever
has the folder can go on and evaluate. Where the origin is still to be seen, it must
hold what the run began with, whatever its name and time are. Prepared folders elsewhere
stay where they are; the run keeps where that was, from the root and from its folder.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt2_jax.data import foreign, sources
from gpt2_jax.data.make_tokenizer import TOKENIZER_KINDS, build_tokenizer
from gpt2_jax.data.partial_folder import write_json
from gpt2_jax.data.prepare import (
    content_hash,
    cut_fingerprint,
    fingerprint,
    foreign_tokenizer,
    load_index,
    prepare,
    text_fingerprint,
    tokenizer_fingerprint,
)
from gpt2_jax.data.shards import Index
from gpt2_jax.data.sources import is_remote
from gpt2_jax.runtime.files import read_json, user_path
from gpt2_jax.tokenizers.files import load_tokenizer, save_tokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer

PLACES = "data.json"  # of prepared folders elsewhere, in the run's folder
ANOTHER = "choose another workdir, or give what this run began with"


def run_folders(
    data: Mapping[str, Any], workdir: Path, *, keep: bool = False
) -> list[Path]:
    """The prepared folders that a run names; none: its text is prepared in its own.

    Args:
      data: that section of its config.

    Further arguments and errors as of `located`.
    """
    named = [str(path) for path, _ in data.get("mixture") or ()]
    path = str(data.get("path") or "")
    if not named and (path in _places(workdir) or is_prepared(path)):
        named = [path]
    return [located(each, workdir, keep=keep) for each in named]


def is_prepared(path: str) -> bool:
    """Whether a path is a folder of prepared data."""
    if not path or is_remote(path):
        return False
    return (user_path(path) / "index.json").is_file()


def located(given: str, workdir: Path, *, keep: bool = False) -> Path:
    """A folder of prepared data, where it is named, was before, or moved with the run.

    Args:
      keep: whether the run's folder shall say from now on where it is.

    Raises:
      FileNotFoundError: when it is in none of these places.
      ValueError: when it holds other data than the run began with.
    """
    places = _places(workdir)
    begun = (workdir / "checkpoints").is_dir()
    said = places.get(given, {}) if begun else {}
    named = user_path(given)
    tried = [named]
    if said:
        tried += [Path(said["path"]), workdir / said["beside"]]
    found = [each for each in tried if (each / "index.json").is_file()]
    if not found:
        also = f", nor in {tried[1]} or {tried[2].resolve()}" if said else ""
        raise FileNotFoundError(f"no prepared data in {given}{also}")
    holds = [_identity(load_index(each)) for each in found]
    same = [f for f, h in zip(found, holds, strict=True) if h == said.get("holds", h)]
    if not same:
        raise ValueError(
            f"{found[0].resolve()} is not what {workdir} was begun with, from "
            f"{said['path']}: {ANOTHER}"
        )
    folder = same[0]
    if folder != named:
        note(f"{given} is not here: the run goes on with {folder.resolve()}")
    if keep:
        place = {
            "path": str(folder.resolve()),
            "beside": os.path.relpath(folder.resolve(), workdir.resolve()),
            "holds": holds[found.index(folder)],
        }
        if place != said:
            write_json(workdir / PLACES, {**places, given: place})
    return folder


def _places(workdir: Path) -> dict[str, dict[str, str]]:
    path = workdir / PLACES
    if not path.exists():
        return {}
    places = read_json(path)
    names = {"path", "beside", "holds"}
    try:
        if all(each.keys() == names for each in places.values()):
            return dict(places)
    except AttributeError:
        pass
    raise ValueError(f"{path} is damaged: it does not say where data are")


def _identity(index: Index) -> str:
    """The same as long as the tokens are, wherever they lie."""
    splits = {
        name: (split.documents, split.bytes, split.tokens, split.unknown)
        for name, split in index.splits.items()
    }
    said = [index.dtype, index.eot_id, index.tokenizer_hash, splits]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


# --- Text -----------------------------------------------------------------------------


def prepared_folder(
    path: str | Path | None,
    out: Path,
    *,
    tokenizer: str,
    vocab_size: int | None,
    splits: Sequence[float],
) -> Path:
    """`out`, a folder of token shards for a run, which is made when it is missing.

    Args:
      path: text or others' shards as for `prepare`.
      out: where text is prepared; used again when it fits this request.
      tokenizer, vocab_size: as for `build_tokenizer`.
      splits: as for `prepare`.

    Raises:
      ValueError: when `out` holds data that were asked for in another way, or of
        another text; and as `prepare` and `load_index`.
    """
    if not (out / "index.json").is_file():
        source: Mapping[str, Any] | None = None
        if not foreign.is_foreign(path):
            source = fingerprint(
                path, tokenizer=tokenizer, vocab_size=vocab_size, splits=splits
            )
        prepare(
            *(path, out, tokenizer),
            vocab_size=vocab_size,
            splits=splits,
            source=source,
        )
    elif path is not None and foreign.is_foreign(path):
        _check_shards(user_path(path), out, tokenizer)
    elif "splits" not in (kept := _source(out)):  # others' shards
        if path is None or user_path(path).exists():
            raise ValueError(
                f"{path} does not hold the shards that {out} refers to, which are in "
                f"{kept.get('path')}: {ANOTHER}"
            )
        load_index(out)
        note(f"{path} is not here: the run goes on with {kept.get('path')}")
    else:
        _check_request(out, path, tokenizer, vocab_size, splits)
        if path is not None:
            _check_text(path, out)
    return out


def _check_request(
    out: Path,
    path: str | Path | None,
    tokenizer: str,
    vocab_size: int | None,
    splits: Sequence[float],
) -> None:
    kept = load_index(out).source
    asked = cut_fingerprint(path, splits, seed=0)
    if (path is None) == (kept.get("path") is None):
        del asked["path"]  # what is there counts, not its name
    try:
        asked |= tokenizer_fingerprint(tokenizer, vocab_size)
    except FileNotFoundError as error:
        note(f"{error}: the run goes on with the tokenizer in {out / 'tokenizer'}")
    for name, value in asked.items():
        if kept.get(name) != value:
            raise ValueError(
                f"{out} was prepared with {name}={kept.get(name)}, this run asks for "
                f"{value}: {ANOTHER}"
            )


def _check_text(path: str | Path, out: Path) -> None:
    """Whether a text, if it can be seen at all, is what `out` was prepared of."""
    kept = load_index(out).source
    try:
        found = sources.documents(path)
    except OSError as error:
        note(f"{error}: the run goes on with what is in {out}, of {kept['path']}")
        return
    asked = text_fingerprint(found)
    if asked["documents"] == kept.get("documents"):
        return
    may_be = asked["bytes"] == kept.get("bytes") and "content" in kept
    if may_be and content_hash(found) == kept["content"]:
        # From now on its names and times are known, and it is not read again.
        index = read_json(out / "index.json")
        write_json(out / "index.json", {**index, "source": {**kept, **asked}})
        return
    raise ValueError(
        f"{path} is not the text that {out} was prepared of, which was "
        f"{kept['path']}, {kept['bytes']:,} bytes; it has {asked['bytes']:,}: {ANOTHER}"
    )


def _check_shards(folder: Path, out: Path, tokenizer: str) -> None:
    """Whether others' shards are those that `out` refers to, which it does again."""
    kept = _source(out)
    asked = foreign.fingerprint(folder, foreign_tokenizer(folder, tokenizer))
    same = {k: v for k, v in asked.items() if k not in ("path", "documents")}
    is_same = all(kept.get(name) == value for name, value in same.items())
    if is_same and kept.get("documents") != asked["documents"]:
        is_same = kept.get("content") == foreign.content_hash(folder)
    if not is_same:
        raise ValueError(
            f"{folder} does not hold the shards that {out} refers to, which were in "
            f"{kept.get('path')}: {ANOTHER}"
        )
    if kept != {**kept, **asked}:  # moved, or touched
        prepare(folder, out, tokenizer)


def _source(out: Path) -> Mapping[str, Any]:
    """The fingerprint in an index whose shards may have moved."""
    index = read_json(out / "index.json")
    source = index.get("source") if isinstance(index, dict) else None
    if not isinstance(source, dict):
        raise ValueError(f"{out / 'index.json'} is damaged: no source")
    return source


# --- Examples -------------------------------------------------------------------------


def kept_examples(workdir: Path) -> Path | None:
    """The copy of its examples in a run's folder; None: there is none."""
    folder = workdir / "examples"
    return next(iter(sorted(folder.iterdir())), None) if folder.is_dir() else None


def run_examples(path: str, workdir: Path) -> Path:
    """The examples of a run: a copy in its folder, made until it has a checkpoint.

    Raises:
      ValueError: when the file is not what the run began with.
      OSError: when there is neither file nor copy.
    """
    given, kept = user_path(path), kept_examples(workdir)
    begun = (workdir / "checkpoints").is_dir()
    if begun and kept is not None:
        try:
            if _hash(given) != _hash(kept):
                raise ValueError(
                    f"{path} has changed since this run began with it; {kept} is as "
                    f"it was: {ANOTHER}"
                )
        except OSError as error:
            note(f"{path}: {error.strerror}: the run goes on with {kept}")
        return kept
    if not given.is_file():
        return given  # what is wrong with it is said where it is read
    mark = workdir / "examples.sha256"  # earlier versions kept no more than that
    if begun and mark.exists() and mark.read_bytes().decode() != _hash(given):
        raise ValueError(f"{path} has changed since this run began: {ANOTHER}")
    copy = workdir / "examples" / given.name
    if kept == copy and _hash(kept) == _hash(given):
        return kept
    shutil.rmtree(copy.parent, ignore_errors=True)
    copy.parent.mkdir()
    shutil.copyfile(given, copy)
    return copy


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def examples_tokenizer(kind: str, vocab_size: int | None, workdir: Path) -> Tokenizer:
    """`build_tokenizer`; of a path, what the run's folder keeps where that is gone."""
    kept = workdir / "tokenizer"
    try:
        tokenizer = build_tokenizer(kind, vocab_size=vocab_size)
    except FileNotFoundError as error:
        if not kept.is_dir():
            raise
        note(f"{error}: the run goes on with the tokenizer in {kept}")
        return load_tokenizer(kept)
    if kind not in TOKENIZER_KINDS and not kept.exists():
        save_tokenizer(tokenizer, kept)
    return tokenizer


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)
