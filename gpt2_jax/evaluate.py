"""Loss and perplexity over a split, each target token counted once."""

import dataclasses
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from gpt2_jax import checkpoint, sharding
from gpt2_jax.data.loader import TokenDataset, eval_batches
from gpt2_jax.model import GPT2, Params, abstract_params
from gpt2_jax.tokenizer import tokenizer_hash
from gpt2_jax.train_step import eval_step
from gpt2_jax.weights import INT8, check_dtype, model_of, quantize


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean cross-entropy in nats over `tokens` targets."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


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
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    step: Callable[..., tuple[jax.Array, jax.Array]],
    mesh: Mesh,
) -> Evaluation:
    """Goes through `batches` (tokens int32 [B, T + 1], mask bool [B, T]).

    Args:
      params: on `mesh`.
      batches: the same on every host; B must divide by the batch shards.
      step: of `make_eval_step`.
    """
    spread = sharding.batch_sharding(mesh, ndim=2, axis=0)
    sums: list[tuple[jax.Array, jax.Array]] = []
    for tokens, mask in batches:
        check_batch(tokens.shape[0], mesh)
        sums.append(step(params, put(tokens, spread), put(mask, spread)))
        jax.block_until_ready(sums[-2:-1])  # one batch runs, one waits
    if not sums:
        raise ValueError("nothing to evaluate: no batch")
    losses, counts = zip(*jax.device_get(sums), strict=True)
    count = int(np.sum(counts, dtype=np.int64))
    return Evaluation(float(np.sum(losses, dtype=np.float64)) / count, count)


def put(array: np.ndarray, to: jax.sharding.NamedSharding) -> jax.Array:
    """A global array of which each host holds the whole and gives its own part."""
    return jax.make_array_from_callback(array.shape, to, lambda index: array[index])


def check_batch(batch_size: int, mesh: Mesh) -> None:
    """Raises ValueError when a (micro)batch can't be spread evenly over the mesh."""
    shards = sharding.n_batch_shards(mesh)
    if batch_size % shards:
        raise ValueError(
            f"a microbatch of {batch_size} examples does not divide by the "
            f"{shards} devices it is spread over"
        )


def evaluate_run(
    workdir: str | Path,
    split: str,
    *,
    step: int | None = None,
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
    folder = checkpoint.find_step(Path(workdir), step)
    contract = checkpoint.read_contract(folder)
    given = Path(contract.run["data"]["path"])
    is_prepared = (given / "index.json").is_file()
    data_folder = given if is_prepared else Path(workdir) / "data"
    dataset = TokenDataset(data_folder, split)
    if dataset.index.tokenizer_hash != tokenizer_hash(contract.tokenizer):
        raise ValueError(f"{data_folder} was made with another tokenizer than {folder}")
    mesh = sharding.make_mesh()
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding.replicated(mesh)
        ),
        abstract_params(contract.model),
    )
    model = model_of(contract.model, dtype)
    params = checkpoint.restore_params(folder, contract, abstract)
    if dtype == INT8:
        params = quantize(params)
    else:
        params = jax.tree.map(lambda x: x.astype(model.param_dtype), params)
    block_size = contract.run["block_size"]
    result = evaluate(
        params,
        eval_batches(dataset, batch_size=batch_size, block_size=block_size),
        step=make_eval_step(model, contract.tokenizer.vocab_size),
        mesh=mesh,
    )
    how = f"step {contract.step}, windows of {block_size} tokens without overlap"
    return result, f"{how}, {dtype}"
