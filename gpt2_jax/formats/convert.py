"""Writes a model of any format in another one."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp

from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.checks import check_choice, integer
from gpt2_jax.formats import hf, llmc
from gpt2_jax.formats.open_model import Source, open_model
from gpt2_jax.layout import Params, dtype_named
from gpt2_jax.model import abstract_params
from gpt2_jax.runtime.files import user_path
from gpt2_jax.runtime.partial import appears_whole
from gpt2_jax.runtime.sharding import on_device
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer

OUTPUT_FORMATS = ("hf", "safetensors", "llmc", "orbax")


def convert(
    model: str | Path,
    to: str,
    out: str | Path,
    *,
    step: int | str | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a model of any format that `open_model` knows in another format.

    Args:
      model, step, revision: as for `lm.load`.
      to: hf, a folder for transformers; safetensors, its weights and config alone;
        llmc, a file for llm.c; orbax, a folder for `lm.load` and partial restores, with
        the parameters and no optimizer state.
      out: a folder, or the file for llm.c; it appears whole or not at all.
      dtype: float32 or bfloat16, the type that is written (orbax: float32 only).
      max_shard_bytes: the largest size of hf's files of weights.

    Raises:
      FileExistsError: when `out` exists.
      ValueError: on what the format can't hold, naming it; and as `lm.load`.
    """
    check_choice("to", to, OUTPUT_FORMATS)
    dtype_named(dtype)
    if to == "orbax" and dtype != "float32":
        raise ValueError(f"orbax checkpoints are float32 here, not {dtype}")
    if integer("max_shard_bytes", max_shard_bytes) < 1:
        raise ValueError(f"{max_shard_bytes=} must be >= 1")
    out = user_path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    source = open_model(model, step=step, revision=revision)
    shardings = on_device(abstract_params(source.config), jax.devices("cpu")[0])
    params = source.load(jnp.float32, shardings)
    cfg = source.config
    if to != "orbax" and source.n_rows is not None:
        cfg = dataclasses.replace(cfg, vocab_size=source.n_rows)
    with appears_whole(out) as partial:
        if to == "llmc":
            llmc.write(partial, cfg, params, dtype=dtype)
        else:
            partial.mkdir()
        if to in ("hf", "safetensors"):
            hf.write(
                partial,
                cfg,
                params,
                source.tokenizer if to == "hf" else _no_tokenizer(source),
                dtype=dtype,
                max_shard_bytes=max_shard_bytes,
                summary=source.summary,
                settings=source.settings,
            )
        if to == "orbax":
            _write_orbax(partial, source, params)


def _no_tokenizer(source: Source) -> NoTokenizer:
    tokenizer = source.tokenizer
    return NoTokenizer(
        source.config.vocab_size,
        tokenizer.eot_id,
        "only weights were written",
        tokenizer.end_ids,
    )


def _write_orbax(folder: Path, source: Source, params: Params) -> None:
    checkpoints = checkpoint.Checkpoints(folder / "checkpoints")
    state = {"step": jnp.int32(source.step or 0), "params": params, "opt_state": ()}
    checkpoints.save(
        types.SimpleNamespace(**state),
        model=source.config,
        run={},
        tokenizer=source.tokenizer,
    )
    checkpoints.close()
