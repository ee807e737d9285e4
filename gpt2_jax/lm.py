"""load(...) -> LanguageModel: text in, text out."""

import dataclasses
import secrets
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax.config import GPT2Config
from gpt2_jax.generate import check_ids, generate
from gpt2_jax.interop.formats import open_model
from gpt2_jax.model import GPT2, Params, abstract_params, dtype_named
from gpt2_jax.sampling import Sampling
from gpt2_jax.sharding import tree_shardings
from gpt2_jax.tokenizer import Tokenizer

Ids = Sequence[int] | np.ndarray


def load(
    model: str | Path,
    *,
    step: int | None = None,
    revision: str | None = None,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> "LanguageModel":
    """Loads a GPT-2 for generation and scoring, whoever wrote it.

    Args:
      model: a run's folder (workdir) or the folder of one of its steps; a Hugging Face
        folder, or the name of a model on its hub; the folder of an OpenAI checkpoint;
        a nanoGPT checkpoint (`ckpt.pt`); an llm.c model (`.bin`).
      step: of a run; None: the latest.
      revision: of a model on the hub; None: the main one.
      dtype: float32 or bfloat16, of the parameters and the computation.
      mesh: where the parameters shall live; None: on the first device.

    Raises:
      FileNotFoundError: when there is no such model, or no such step.
      ValueError: when what is there isn't whole, or isn't a GPT-2 that can be run
        here, naming what and where.
    """
    compute_dtype = dtype_named(dtype)
    source = open_model(model, step=step, revision=revision)
    cfg = source.config
    abstract = abstract_params(cfg)
    if mesh is None:
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = tree_shardings(abstract, mesh)
    return LanguageModel(
        GPT2(cfg, dtype=compute_dtype, param_dtype=compute_dtype),
        source.load(compute_dtype, shardings),
        source.tokenizer,
        source.step,
    )


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A GPT-2 with its parameters and tokenizer.

    Attributes:
      model: the Linen module.
      params: plain nested dict (see `gpt2_jax.model`).
      tokenizer: text <-> ids.
      step: of a run's checkpoint; None for other models.
    """

    model: GPT2
    params: Params
    tokenizer: Tokenizer
    step: int | None

    @property
    def config(self) -> GPT2Config:
        return self.model.cfg

    def logits(self, token_ids: Ids | Sequence[Ids]) -> jax.Array:
        """Float32 logits [B, T, V] of int ids [B, T].

        Raises:
          ValueError: on another shape or dtype, an id outside the vocabulary, or
            T over n_positions.
        """
        ids_BT = np.asarray(token_ids)
        if ids_BT.ndim != 2 or ids_BT.size == 0:
            raise ValueError(
                f"token_ids must have shape [B, T] with B, T >= 1, not {ids_BT.shape}"
            )
        check_ids(ids_BT, self.config.vocab_size)
        return _logits(self.model, self.params, ids_BT.astype(np.int32))

    def generate(
        self,
        prompt: str | Ids | Sequence[str] | Sequence[Ids],
        *,
        max_new_tokens: int = 100,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
    ) -> Any:
        """Continues a prompt, or each of a list of prompts of any lengths.

        Args:
          prompt: text, a list of texts, token ids, or a list of token ids. Empty
            text stands for the beginning of a document.
          max_new_tokens: at most so many; an end of text ends a row before.
          temperature: divides the logits; 0 takes the most probable token.
          top_k: draw from the k most probable tokens only; None or 0: from all.
          top_p: draw from the fewest tokens that reach this probability together;
            None or 1: from all.
          repetition_penalty: over 1 makes tokens of the prompt and of what was
            generated less probable.
          seed: the same seed gives the same text; None: another one each call.

        Returns:
          What follows the prompt, without it and without the end-of-text token:
          text for text, ids for ids, a list for a list.

        Raises:
          ValueError: before anything is compiled, on an option out of its range, a
            bad id, or prompt + max_new_tokens over n_positions.
        """
        prompts, is_text, is_batch = self._encode(prompt)
        sampling = Sampling.create(
            len(prompts),
            temperature=temperature,
            top_k=0 if top_k is None else top_k,
            top_p=1.0 if top_p is None else top_p,
            repetition_penalty=repetition_penalty,
        )
        new_ids = generate(
            self.model,
            self.params,
            prompts,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seed=secrets.randbits(32) if seed is None else seed,
            eot_id=self.tokenizer.eot_id,
            n_valid=self.tokenizer.vocab_size,
        )
        results: list[Any] = new_ids
        if is_text:
            decode = self.tokenizer.decode
            results = [
                decode([*old, *new])[len(decode(old)) :]
                for old, new in zip(prompts, new_ids, strict=True)
            ]
        return results if is_batch else results[0]

    def _encode(self, prompt: Any) -> tuple[list[list[int]], bool, bool]:
        """Prompts as ids; whether they were text; whether there was a list of them."""
        if isinstance(prompt, str):
            return [self._encode_text(prompt)], True, False
        rows = list(prompt)
        if not rows:
            raise ValueError("the prompt is empty: give text, ids, or a list of them")
        if all(isinstance(row, str) for row in rows):
            return [self._encode_text(row) for row in rows], True, True
        if all(np.ndim(row) == 0 and not isinstance(row, str) for row in rows):
            return [rows], False, False
        if all(np.ndim(row) == 1 and not isinstance(row, str) for row in rows):
            return [list(row) for row in rows], False, True
        raise ValueError("a prompt is text, a list of ids, or a list of such prompts")

    def _encode_text(self, text: str) -> list[int]:
        return self.tokenizer.encode(text) or [self.tokenizer.eot_id]


@partial(jax.jit, static_argnames="model")
def _logits(model: GPT2, params: Params, tokens_BT: jax.Array) -> jax.Array:
    return model.apply({"params": params}, tokens_BT)[0]
