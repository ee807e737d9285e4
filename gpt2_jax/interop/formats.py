"""What a path or a name stands for: one `Source`, whoever wrote it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from gpt2_jax import checkpoint
from gpt2_jax.config import GPT2Config
from gpt2_jax.interop import hf, llmc, nanogpt, openai_tf
from gpt2_jax.interop.params import load_params
from gpt2_jax.interop.tensors import Tensor
from gpt2_jax.model import Params, abstract_params
from gpt2_jax.tokenizer import NoTokenizer, Tokenizer, load_tokenizer

EXPECTED = (
    "a run's folder, a Hugging Face folder or hub name, an OpenAI checkpoint folder, a "
    "nanoGPT ckpt.pt or an llm.c .bin"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that has been opened, with none of its numbers read yet.

    Attributes:
      load: (dtype, tree of shardings) -> parameters, one tensor at a time.
      step: of a run's checkpoint; None for others.
    """

    config: GPT2Config
    tokenizer: Tokenizer
    load: Callable[[Any, Any], Params]
    step: int | None = None


def open_model(
    model: str | Path, *, step: int | None = None, revision: str | None = None
) -> Source:
    """Finds out what `model` is; arguments and errors as of `lm.load`."""
    path = Path(model)
    if (path / "checkpoints").is_dir() or (path / "meta").is_dir() or step is not None:
        return _run(path, step)
    if not path.exists() and hf.is_hub_name(str(model)):
        path = hf.download(str(model), revision)
    elif not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    if path.suffix == ".safetensors":
        path = path.parent
    if path.is_dir():
        if hf.is_hf_folder(path):
            return _foreign(path, *hf.read(path), _tokenizer_beside(path))
        if openai_tf.is_tf_folder(path):
            return _foreign(path, *openai_tf.read(path), _tokenizer_beside(path))
        if (path / "ckpt.pt").is_file():
            path = path / "ckpt.pt"
        elif path.is_dir():
            raise FileNotFoundError(f"{path} holds no model: expected {EXPECTED}")
    if llmc.is_llmc_file(path):
        return _foreign(path, *llmc.read(path), _tokenizer_beside(path.parent))
    if path.suffix == ".pt":
        tokenizer = nanogpt.tokenizer_beside(path) or _tokenizer_beside(path.parent)
        return _foreign(path, *nanogpt.read(path), tokenizer)
    raise ValueError(f"{path} is no model: expected {EXPECTED}")


def _run(path: Path, step: int | None) -> Source:
    folder = checkpoint.find_step(path, step)
    contract = checkpoint.read_contract(folder)

    def load(dtype: Any, shardings: Any) -> Params:
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            abstract_params(contract.model),
            shardings,
        )
        params = checkpoint.restore(folder, {"params": abstract})["params"]
        return jax.tree.map(lambda x: x.astype(dtype), params)

    return Source(contract.model, contract.tokenizer, load, contract.step)


def _foreign(
    path: Path, cfg: GPT2Config, tensors: Mapping[str, Tensor], tokenizer: Tokenizer
) -> Source:
    if isinstance(tokenizer, NoTokenizer):
        tokenizer = NoTokenizer(cfg.vocab_size, hf.eot_id_of(path), tokenizer.why)
    if tokenizer.vocab_size > cfg.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} ids, the model only "
            f"{cfg.vocab_size}"
        )

    def load(dtype: Any, shardings: Any) -> Params:
        return load_params(cfg, tensors, dtype=dtype, shardings=shardings, where=path)

    return Source(cfg, tokenizer, load)


def _tokenizer_beside(folder: Path) -> Tokenizer:
    try:
        return load_tokenizer(folder)
    except FileNotFoundError as error:
        return NoTokenizer(0, -1, str(error))
