"""Runs that begin with the weights of another model, whoever wrote it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gpt2_jax.checkpoints.integrity import params_hash
from gpt2_jax.config import GPT2Config
from gpt2_jax.formats.open_model import Source, open_model
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.files import user_path
from gpt2_jax.tokenizers.files import tokenizer_hash
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer


def open_base(init_from: str) -> Source:
    """The model that a run begins with. Raises as `lm.load`, naming the option."""
    try:
        return open_model(init_from)
    except (ValueError, OSError) as error:
        raise ValueError(f"init_from={init_from}: {error}") from error


@dataclasses.dataclass(frozen=True)
class AdapterBase:
    """The model that the adapters of a run belong to; its weights stay fixed."""

    params: Params
    record: Mapping[str, Any]  # what checkpoints say of it, see `Contract.base`


def adapter_base(
    init_from: str,
    source: Source,
    model: GPT2,
    tokenizer: Tokenizer,
    mesh: Mesh,
    workdir: Path,
) -> AdapterBase:
    """Loads the model that a run with adapters begins with.

    Raises:
      ValueError: when its parameters would have to be resized.
    """
    for name, ours, theirs in (
        ("vocab_size", model.cfg.vocab_size, source.config.vocab_size),
        ("n_positions", model.cfg.n_positions, source.config.n_positions),
        ("tokenizer", tokenizer.vocab_size, source.tokenizer.vocab_size),
    ):
        if ours > theirs if name == "tokenizer" else ours != theirs:
            raise ValueError(
                f"lora.rank is over 0: {name} {theirs} of {init_from} can't become "
                f"{ours}, for its parameters stay as they are"
            )
    params = load_params(source, model.cfg, tokenizer, mesh, seed=0)
    path = user_path(init_from)
    is_here = path.exists()
    beside = os.path.relpath(path.resolve(), workdir.resolve())
    record = {
        "model": str(path.resolve()) if is_here else init_from,
        "beside": beside if is_here else None,  # found there when both were moved
        "step": source.step,
        "sha256": params_hash(params),
    }
    return AdapterBase(params, record)


def check_tokenizer(tokenizer: Tokenizer, base: Tokenizer) -> None:
    """Whether the ids of `base` mean the same in `tokenizer`, which may have more.

    Of a model that came without a tokenizer nothing is known, and any will do.

    Raises:
      ValueError: naming the first id that differs.
    """
    if isinstance(base, NoTokenizer) or tokenizer_hash(tokenizer) == tokenizer_hash(
        base
    ):
        return
    what = "the data's tokenizer is not that of init_from"
    if tokenizer.kind != base.kind:
        raise ValueError(f"{what}: {tokenizer.kind}, not {base.kind}")
    ours, theirs = tokenizer.token_bytes, base.token_bytes
    if len(ours) < len(theirs):
        raise ValueError(f"{what}: {len(ours)} ids, not {len(theirs)}")
    for i, token in enumerate(theirs):
        if ours[i] != token:
            raise ValueError(f"{what}: id {i} is {ours[i]!r}, not {token!r}")
    if tokenizer.eot_id != base.eot_id:
        raise ValueError(
            f"{what}: end of text is {tokenizer.eot_id}, not {base.eot_id}"
        )


def load_params(
    source: Source, cfg: GPT2Config, tokenizer: Tokenizer, mesh: Mesh, seed: int
) -> Params:
    """The parameters of `source` as those of `cfg`, float32, each on its shards.

    The two may differ in vocabulary and context, see `resize_params`.

    Args:
      tokenizer: of the run; the ids that it has and the source's has not are new.
    """
    target = abstract_params(cfg)
    shardings = sharding.tree_shardings(target, mesh)
    places = dict(shardings)
    n_known = min(source.tokenizer.vocab_size, tokenizer.vocab_size)
    sizes = cfg.vocab_size, cfg.n_positions
    as_it_is = (source.config.vocab_size, source.config.n_positions) == sizes
    if as_it_is and n_known == tokenizer.vocab_size:
        return source.load(jnp.float32, shardings)
    for name in ("wte", "wpe"):  # their rows may not divide as those of `cfg` do
        places[name] = {"embedding": sharding.replicated(mesh)}
    params = source.load(jnp.float32, places)

    def resize(params: Params) -> Params:
        return resize_params(params, cfg, n_known=n_known, seed=seed)

    return jax.jit(resize, out_shardings=shardings)(params)


def resize_params(
    params: Params, cfg: GPT2Config, *, n_known: int, seed: int
) -> Params:
    """Gives parameters the vocabulary and the context of `cfg`.

    Rows that are too many are cut off the end. New rows of wte, the head too, are the
    mean of the known ones: a new token begins as an average one (source:
    https://nlp.stanford.edu/~johnhew/vocab-expansion.html). New positions are drawn as
    those of a fresh model, from N(0, initializer_range).

    Args:
      n_known: the rows of wte from here on are new, or padding.
      seed: of the draw.
    """
    wte, wpe = params["wte"]["embedding"], params["wpe"]["embedding"]
    known = wte[: min(n_known, cfg.vocab_size)]
    n_new = cfg.vocab_size - len(known)
    mean = jnp.broadcast_to(known.mean(0), (n_new, cfg.n_embd))
    drawn = jax.random.normal(jax.random.key(seed), (cfg.n_positions, cfg.n_embd))
    drawn = cfg.initializer_range * drawn
    wpe = jnp.concatenate([wpe, drawn[len(wpe) :]])[: cfg.n_positions]
    return {
        **params,
        "wte": {"embedding": jnp.concatenate([known, mean])},
        "wpe": {"embedding": wpe},
    }
