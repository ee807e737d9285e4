"""Text -> token shards: a folder that `gpt2_jax.data.loader` reads by memmap.

    index.json              what is here: see `shards.Index`
    tokenizer/              the tokenizer's files
    train-00000.bin ...     token ids, little-endian uint16 or uint32, no header
    validation-00000.bin
    test-00000.bin

Text files, a document each, are put in a seeded order and laid end to end; the line of
all their bytes is cut at the given fractions, where need be inside a document, at the
start of a character. As soon as there are files of many documents, whose number and
sizes nobody knows beforehand, the documents keep their order and the hash of seed and
text decides the split of each. The end-of-text token follows each document's end.

The folder is written beside as `<out>.partial`, from which a run that was killed goes
on to the same bytes (`partial_folder`), and renamed when it is complete.
"""

import contextlib
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from gpt2_jax.checks import integer, items, number, shown
from gpt2_jax.data import foreign, sources
from gpt2_jax.data.encode import Counts, Job, encoded, make_plan
from gpt2_jax.data.make_tokenizer import TOKENIZER_KINDS, build_tokenizer
from gpt2_jax.data.partial_folder import PartialFolder, State, Writer, is_ours
from gpt2_jax.data.records import Records
from gpt2_jax.data.shards import MOST, SPLITS, VERSION, Index, dtype_for, read_index
from gpt2_jax.data.sources import Document, Paths, is_remote
from gpt2_jax.data.stored import Cursor
from gpt2_jax.fields import check_range, check_seed
from gpt2_jax.runtime.files import user_path
from gpt2_jax.tokenizers.files import load_tokenizer, save_tokenizer, tokenizer_hash
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer

COMMIT_SECONDS = 5.0  # of work that a kill can cost

Progress = Callable[[int, int | None, int], object]


def fingerprint(
    path: Paths | None,
    *,
    tokenizer: str,
    vocab_size: int | None,
    splits: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    field: str = "text",
    form: str = "auto",
) -> dict[str, Any]:
    """What prepared data depend on, in JSON's types, so that two can be compared.

    Files count by name, size and time of modification; a tokenizer that is a path, by
    its content. The text itself is not read.
    """
    found = sources.documents(path, field=field, form=form)
    return {
        **cut_fingerprint(path, splits, seed),
        **text_fingerprint(found),
        **tokenizer_fingerprint(tokenizer, vocab_size),
    }


def tokenizer_fingerprint(tokenizer: str, vocab_size: int | None) -> dict[str, Any]:
    if tokenizer not in TOKENIZER_KINDS:
        tokenizer = tokenizer_hash(load_tokenizer(tokenizer))
    return {"tokenizer": tokenizer, "vocab_size": vocab_size}


def text_fingerprint(found: Sequence[Document | Records]) -> dict[str, Any]:
    """A hash of the documents of a source, by names, sizes and times."""
    digest = hashlib.sha256()
    for source in found:
        digest.update(os.fsencode(f"{source.name}\0{source.size}\0"))
        if isinstance(source, Document) and source.text is not None:
            digest.update(source.text)
        else:
            digest.update(f"{source.stamp}\0".encode())
        if isinstance(source, Records):
            digest.update(f"{source.form}\0{source.field}\0".encode())
    return {
        "bytes": sum(source.size or 0 for source in found),
        "documents": digest.hexdigest(),
    }


def content_hash(found: Sequence[Document | Records]) -> str:
    """A hash of what documents hold, in order, whatever their names and times are.

    All files are read, but not those of other machines, which have stamps.
    """
    digest = hashlib.sha256()
    for source in found:
        if isinstance(source, Document) and source.text is not None:
            content = hashlib.sha256(source.text).hexdigest()
        elif is_remote(source.name):
            content = f"{source.name}\0{source.stamp}"
        else:
            with user_path(source.name).open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{content}\0{source.size}\0".encode())
        if isinstance(source, Records):
            digest.update(f"{source.form}\0{source.field}\0".encode())
    return digest.hexdigest()


def cut_fingerprint(
    path: Paths | None, splits: Sequence[float], seed: int
) -> dict[str, Any]:
    return {
        "path": None if path is None else _absolute(path),
        "splits": [float(fraction) for fraction in splits],
        "seed": seed,
    }


def _absolute(path: Paths) -> Any:
    if not isinstance(path, str | Path):
        return [_absolute(each) for each in path]
    return str(path) if is_remote(path) else str(user_path(path).resolve())


def prepare(
    path: Paths | None,
    out: str | Path,
    tokenizer: Tokenizer | str,
    *,
    vocab_size: int | None = None,
    splits: Sequence[float] = (0.9, 0.05, 0.05),
    seed: int = 0,
    field: str = "text",
    form: str = "auto",
    shard_tokens: int = 100_000_000,
    threads: int | None = None,
    source: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    progress: Progress = lambda done, total, tokens: None,
) -> Index:
    """Tokenizes a source into the folder `out`, in constant memory.

    The folder appears at once, when it is complete. A call that was killed goes on when
    it is made again; one that fails by bad input leaves nothing. A folder of prepared
    data that is there is replaced.

    Args:
      path: the text, as for `sources.documents`, or None for the default corpus. "-" is
        standard input, which is stored beside the shards until they are done. A folder
        of shards that others made (`foreign`) is referred to as it is: only tokenizer,
        as far as it is a path or an object, and dtype count then.
      out: the folder to make.
      tokenizer: one, or what `build_tokenizer` takes.
      vocab_size: for `build_tokenizer`.
      splits: fractions of train, validation and test text; they add up to 1.
      seed: of the order of documents, or of their splits.
      field, form: as for `sources.documents`.
      shard_tokens: tokens in a shard file, at most.
      threads: that encode, about 12 MB of memory each; None is one a core, up to 8.
        They change nothing in the result.
      source: the fingerprint to store; by default that of this call, with the
        tokenizer's kind and vocabulary size where a tokenizer is given.
      dtype: of others' shards, as for `foreign.read_index`.
      progress: called with the stored bytes that are done, how many there are or None
        where nobody knows, and the number of tokens.

    Raises FileNotFoundError or ValueError on a source without text or that is not
    UTF-8, ValueError on bad fractions and on a split that would be empty,
    FileExistsError if `out` holds anything but prepared data, BlockingIOError while
    another process prepares it.
    """
    out = _place(out)
    fractions = _checked(splits)
    shard_tokens = integer("shard_tokens", shard_tokens)
    check_range("shard_tokens", shard_tokens, 1, MOST)
    threads = min(os.cpu_count() or 1, 8) if threads is None else threads
    threads = integer("threads", threads)
    check_range("threads", threads, 1, 1024)
    check_seed(seed)
    if not isinstance(tokenizer, str) and not hasattr(tokenizer, "encode_array"):
        raise ValueError(
            f"tokenizer={shown(tokenizer)} must be a tokenizer or its name"
        )
    if isinstance(tokenizer, str) and tokenizer not in TOKENIZER_KINDS:
        tokenizer = build_tokenizer(tokenizer, vocab_size=vocab_size)
    given: list[str | Path | None] = [None]
    if path is not None:
        given = [*sources.listed(path)]
    if len(given) == 1 and foreign.is_foreign(given[0]):
        return _refer(user_path(str(given[0])), out, tokenizer, dtype)
    if isinstance(tokenizer, NoTokenizer):
        raise ValueError(
            f"{path} is text, and the model has no tokenizer: give token shards, or a "
            "tokenizer (data.tokenizer)"
        )
    if dtype is not None:
        raise ValueError(f"{dtype=} is of token shards, and {path} holds none")
    streams = any(map(sources.is_stream, given))
    if not streams:
        found = sources.documents(path, field=field, form=form)

    with contextlib.ExitStack() as stack:
        work = stack.enter_context(PartialFolder(out))
        if streams:
            path, digest = sources.store_streams(
                [each for each in given if each is not None], work.folder, form
            )
            found = [
                replace(each, stamp=digest) if work.holds(each.name) else each
                for each in sources.documents(path, field=field, form=form)
            ]
        asked = {**cut_fingerprint(path, splits, seed), **text_fingerprint(found)}
        if isinstance(tokenizer, str):
            asked |= {"tokenizer": tokenizer, "vocab_size": vocab_size}
            request = asked
        else:
            asked |= {"tokenizer": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
            request = {**asked, "tokenizer": tokenizer_hash(tokenizer)}
        plan = make_plan(found, fractions, seed)
        names = [n for n, part in zip(SPLITS, fractions, strict=True) if part]
        state = work.resume({**request, "shard_tokens": shard_tokens})
        if isinstance(tokenizer, str):
            if state is not None:
                tokenizer = load_tokenizer(work.folder / "tokenizer")
            else:
                tokenizer = build_tokenizer(
                    tokenizer, path, vocab_size, field=field, form=form
                )
        if state is None:
            save_tokenizer(tokenizer, work.folder / "tokenizer")
            counts = {name: Counts() for name in names}
            kind = dtype_for(tokenizer.vocab_size)
            state = State(0, Cursor(), 0, kind, counts)
        job = Job(tokenizer, state.dtype, fractions, seed)
        writers = {
            name: stack.enter_context(
                Writer(work.folder, name, job.dtype, shard_tokens, each)
            )
            for name, each in state.counts.items()
        }
        known = all(each.size is not None for each in found)
        total = sum(each.size or 0 for each in found) if known else None
        batches = encoded(job, plan, state.piece, state.place, threads)
        with contextlib.closing(batches):
            committed, due = time.monotonic(), False
            for batch, by_split in batches:
                for name, (ids, more) in by_split.items():
                    due |= writers[name].write(ids, more)
                state.done += batch.size
                tokens = sum(each.tokens for each in state.counts.values())
                progress(state.done, total, tokens)
                due |= time.monotonic() > committed + COMMIT_SECONDS
                if batch.place is not None:
                    state.piece, state.place = batch.piece, batch.place
                    if due:
                        work.commit(state, writers.values())
                        committed, due = time.monotonic(), False
        for name, each in state.counts.items():
            if not each.tokens:
                share = fractions[SPLITS.index(name)]
                raise ValueError(f"the {name} split, {share:g} of the text, is empty")
        work.commit(state, writers.values())
        index = Index(
            version=VERSION,
            dtype=job.dtype,
            vocab_size=tokenizer.vocab_size,
            eot_id=tokenizer.eot_id,
            tokenizer_kind=tokenizer.kind,
            tokenizer_hash=tokenizer_hash(tokenizer),
            splits={name: writer.summary() for name, writer in writers.items()},
            source={**(source or asked), "content": content_hash(found)},
        )
        work.publish(index)
    return index


def _refer(
    folder: Path, out: Path, tokenizer: Tokenizer | str, dtype: str | None
) -> Index:
    """An index in `out` of shards that stay where they are."""
    index = foreign.read_index(
        folder, foreign_tokenizer(folder, tokenizer), dtype=dtype
    )
    content = {"content": foreign.content_hash(folder)}
    index = replace(index, source={**index.source, **content})
    with PartialFolder(out) as work:
        work.resume(index.source)
        save_tokenizer(foreign_tokenizer(folder, tokenizer), work.folder / "tokenizer")
        work.publish(index)
    return index


def foreign_tokenizer(folder: Path, tokenizer: Tokenizer | str) -> Tokenizer:
    """Nothing can be trained on ids: only a path, bytes or a tokenizer is one given."""
    if tokenizer in ("sentencepiece", "char"):
        return foreign.tokenizer_of(folder)
    if isinstance(tokenizer, str):
        tokenizer = build_tokenizer(tokenizer)
    return foreign.tokenizer_of(folder, tokenizer)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar of bytes and tokens on stderr, if that is a terminal."""
    quiet = not sys.stderr.isatty()
    with tqdm(unit="B", unit_scale=True, disable=quiet) as bar:

        def show(done: int, total: int | None, tokens: int) -> None:
            if bar.total is None:  # what an earlier run has done is no speed of this
                bar.initial, bar.total = done, total
            bar.set_postfix_str(f"{tokens / 1e6:.1f}M tokens", refresh=False)
            bar.update(done - bar.n)

        yield show


def _place(out: str | Path) -> Path:
    out = user_path(out).absolute()
    if out.exists() and not (out.is_dir() and is_ours(out)):
        raise FileExistsError(f"{out} exists and is not a folder of prepared data")
    return out


def _checked(splits: Sequence[float]) -> list[float]:
    splits = [number("splits: fraction", x) for x in items("splits", splits)]
    if len(splits) != len(SPLITS):
        raise ValueError(f"{splits=}: three fractions, of {', '.join(SPLITS)}")
    if not all(0 <= fraction <= 1 for fraction in splits):
        raise ValueError(f"{splits=}: a fraction is not in 0 .. 1")
    if abs(math.fsum(splits) - 1) > 1e-6:
        raise ValueError(f"{splits=} add up to {math.fsum(splits):g}, not to 1")
    return splits


# --- Prepared folders -----------------------------------------------------------------


def load_index(folder: str | Path) -> Index:
    """Reads and checks a prepared folder, or one of `foreign` shards and tokenizer.

    Raises FileNotFoundError if it, its index, a shard or the tokenizer is missing, and
    ValueError if the index is damaged or of another version, if a shard's size is not
    that of its tokens, or if the tokenizer's files are not those the data were made by.
    """
    if foreign.is_foreign(folder):
        return foreign.read_index(folder, foreign.tokenizer_of(folder))
    return read_index(user_path(folder))
