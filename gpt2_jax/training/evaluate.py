"""Loss and perplexity over a split, each target token counted once."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.checkpoints import checkpoint
from gpt2_jax.checks import check_text
from gpt2_jax.data.loader import Examples, TextExamples
from gpt2_jax.data.run_data import kept_examples, run_folders
from gpt2_jax.data.sft import sft_splits
from gpt2_jax.decoding.weights import INT8, build_model, check_dtype, quantize
from gpt2_jax.fields import check_range
from gpt2_jax.formats.open_model import open_model
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2, abstract_params
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.files import user_path
from gpt2_jax.tokenizers.files import tokenizer_hash
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.training.batches import in_order
from gpt2_jax.training.step import eval_step


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats over `tokens` targets."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


def make_eval_step(
    model: GPT2, n_valid: int | None = None
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`eval_step`, jitted: (params, tokens, mask) -> (summed loss, count).

    Args:
      n_valid: the size of the vocabulary without its padding.
    """
    return jax.jit(partial(eval_step, model=model, n_valid=n_valid))


def evaluate(
    params: Params,
    batches: Iterable[tuple[jax.Array | np.ndarray | None, ...]],
    *,
    step: Callable[..., tuple[jax.Array, jax.Array]],
) -> Evaluation:
    """Goes through `batches`: tokens int32 [B, T + 1], mask bool [B, T], and segments
    int32 [B, T] or None, as `batches.in_order` gives them.

    Args:
      step: of `make_eval_step`.

    Raises:
      ValueError: when there is no batch.
    """
    sums: list[tuple[jax.Array, jax.Array]] = []
    for batch in batches:
        sums.append(step(params, *batch))
        jax.block_until_ready(sums[-2:-1])  # one batch runs, one waits
    if not sums:
        raise ValueError("nothing to evaluate: no batch")
    losses, counts = zip(*jax.device_get(sums), strict=True)
    count = int(np.sum(counts, dtype=np.int64))
    return Evaluation(float(np.sum(losses, dtype=np.float64)) / count, count)


def _text_split(
    data: Mapping[str, Any],
    split: str,
    tokenizer: Tokenizer,
    block_size: int,
    workdir: str | Path,
) -> Examples:
    folders = run_folders(data, Path(workdir)) or [Path(workdir) / "data"]
    packing = data.get("packing", "flat")
    examples = TextExamples(folders, split, block_size=block_size, packing=packing)
    if examples.parts[0].index.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(f"{folders[0]} was made with another tokenizer than the run's")
    return examples


def _sft_split(
    data: Mapping[str, Any],
    split: str,
    tokenizer: Tokenizer,
    block_size: int,
    workdir: str | Path,
) -> Examples:
    splits, _ = sft_splits(
        kept_examples(Path(workdir)) or data["path"],
        tokenizer,
        template=data["template"],
        fractions=data["splits"],
        block_size=block_size,
    )
    if split not in splits:
        raise ValueError(
            f"{data['path']} has no {split} split, only {', '.join(splits)}"
        )
    return splits[split]


def evaluate_run(
    workdir: str | Path,
    split: str,
    *,
    step: int | str | None = None,
    batch_size: int,
    dtype: str = "float32",
) -> tuple[Evaluation, str]:
    """Evaluates a run's checkpoint over a whole split of the data it was trained on.

    Args:
      dtype: float32, bfloat16 or int8, as of `gpt2_jax.load`.

    Returns:
      The evaluation, and in words how it was done.

    Raises:
      FileNotFoundError, ValueError: when the checkpoint, the data or the split isn't
        there, or the data are of another tokenizer.
    """
    check_dtype(dtype)
    check_range("batch_size", batch_size, 1)
    check_text("split", split)
    workdir = user_path(workdir)
    folder = checkpoint.find_step(workdir, step)
    contract = checkpoint.read_contract(folder)
    contract.check_is_of_a_run(folder)
    data, block_size = contract.run["data"], contract.run["block_size"]
    if data.get("kind") == "sft":
        examples = _sft_split(data, split, contract.tokenizer, block_size, workdir)
    else:
        examples = _text_split(data, split, contract.tokenizer, block_size, workdir)
    mesh = sharding.make_mesh()
    whole = sharding.replicated(mesh)
    places = jax.tree.map(lambda _: whole, abstract_params(contract.model))
    model, source = build_model(contract.model, dtype), open_model(folder)
    if dtype == INT8:
        params = quantize(source.load(jnp.float32, places))
    else:
        params = source.load(model.param_dtype, places)
    result = evaluate(
        params,
        in_order(examples.evaluation(), batch_size, block_size, mesh),
        step=make_eval_step(model, contract.tokenizer.vocab_size),
    )
    how = f"step {contract.step}, windows of {block_size} tokens without overlap"
    return result, f"{how}, {dtype}"
