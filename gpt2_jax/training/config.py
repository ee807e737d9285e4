"""A run's configuration: frozen, checked, and which examples each of its steps has."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from jax.sharding import Mesh

from gpt2_jax.checks import check_choice, check_text, integer, shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.data.loader import PACKINGS, mixture_shares
from gpt2_jax.data.sft import check_template
from gpt2_jax.data.sources import is_remote
from gpt2_jax.fields import GREATEST, check_names, check_range, check_seed, check_types
from gpt2_jax.layers import remat_policy
from gpt2_jax.layout import dtype_named
from gpt2_jax.lora import LoraConfig
from gpt2_jax.ops.attention import check_attention
from gpt2_jax.runtime import sharding
from gpt2_jax.runtime.files import user_path
from gpt2_jax.training import optim

KINDS = ("text", "sft")  # of data


class Position(NamedTuple):
    """Where a run stands: updates done, and examples that they have seen."""

    step: int = 0
    examples: int = 0


BEGINNING = Position()


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the text is from; see configs/default.py for each field."""

    kind: str
    template: str
    path: str
    tokenizer: str
    mixture: tuple[tuple[str, float], ...]
    packing: str
    vocab_size: int
    splits: tuple[float, ...]

    def __post_init__(self) -> None:
        check_types(self, "data.")
        check_choice("data.packing", self.packing, PACKINGS)
        check_choice("data.kind", self.kind, KINDS)
        if self.template:
            check_template(self.template)
        if self.kind == "sft" and not self.path:
            raise ValueError("data.kind=sft needs data.path, a file of examples")
        if self.kind == "text" and self.template:
            raise ValueError(
                f"data.template={shown(self.template)} is for data.kind=sft"
            )
        check_range("data.vocab_size", self.vocab_size, 0)
        if self.path and not is_remote(self.path):
            user_path(self.path)
        if not self.mixture:
            return
        paths = [path for path, _ in self.mixture]
        weights = [weight for _, weight in self.mixture]
        if self.path:
            raise ValueError(f"data.path={self.path} and data.mixture: give one")
        mixture_shares(weights)
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"data.mixture names {twice[0]} twice")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    data: int
    fsdp: int
    tensor: int

    def __post_init__(self) -> None:
        check_types(self, "mesh.")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    every: int
    examples: int
    patience: int
    sample_tokens: int
    sample_prompt: str

    def __post_init__(self) -> None:
        check_types(self, "eval.")
        check_range("eval.every", self.every, 1)
        for name in ("examples", "patience", "sample_tokens"):
            check_range(f"eval.{name}", getattr(self, name), 0)
        check_text("eval.sample_prompt", self.sample_prompt)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    every: int
    keep_last: int

    def __post_init__(self) -> None:
        check_types(self, "checkpoint.")
        for name in ("every", "keep_last"):
            check_range(f"checkpoint.{name}", getattr(self, name), 1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. Defaults and the meaning of each key: configs/default.py.

    Raises:
      ValueError: on an impossible value, naming it.
    """

    seed: int
    init_from: str
    steps: int
    batch_size: int
    batch_warmup: tuple[tuple[int, int], ...]
    block_size: int
    device_batch_size: int
    dtype: str
    attention: str
    remat: str
    log_every: int
    wandb_project: str
    model: Mapping[str, Any]  # GPT2Config's fields; vocab_size 0: the tokenizer's
    data: DataConfig
    optim: optim.OptimConfig
    lora: LoraConfig
    mesh: MeshConfig
    eval: EvalConfig
    checkpoint: CheckpointConfig

    def __post_init__(self) -> None:
        check_types(self)
        check_seed(self.seed)
        for name in ("steps", "batch_size", "block_size", "log_every"):
            check_range(name, getattr(self, name), 1)
        check_range("device_batch_size", self.device_batch_size, 0)
        check_text("wandb_project", self.wandb_project)
        if self.batch_size * self.block_size > GREATEST:
            raise ValueError(
                f"batch_size={self.batch_size} times block_size={self.block_size} is "
                f"more than {GREATEST} tokens"
            )
        self._check_model()
        stages = [(0, 1), *self.batch_warmup, (math.inf, self.batch_size)]
        for (tokens, size), (later, larger) in itertools.pairwise(stages):
            if not (tokens < later and size <= larger):
                raise ValueError(
                    f"batch_warmup={self.batch_warmup} must be pairs of tokens and "
                    f"batch size that rise to batch_size={self.batch_size}"
                )
        if self.lora.rank and not self.init_from:
            raise ValueError(
                f"lora.rank={self.lora.rank} adapts nothing: set init_from"
            )
        if self.lora.rank and self.optim.name == "muon":
            raise ValueError(
                f"optim.name=muon is for kernels, and lora.rank={self.lora.rank} "
                "trains none"
            )
        dtype_named(self.dtype)
        check_attention(self.attention)
        remat_policy(self.remat)
        optim.schedule(self.optim, self.steps)

    def _check_model(self) -> None:
        """Whether it makes a model; a size of 0 is told by the data or `init_from`."""
        check_names("model.", self.model, GPT2Config, all_of_them=True)
        vocab_size, n_positions = self.model["vocab_size"], self.model["n_positions"]
        for name, size in (("vocab_size", vocab_size), ("n_positions", n_positions)):
            check_range(f"model.{name}", integer(f"model.{name}", size), 0)
        if 0 < n_positions < self.block_size:
            raise ValueError(
                f"block_size={self.block_size} exceeds model.n_positions={n_positions}"
            )
        known = {"vocab_size": vocab_size or 1, "n_positions": n_positions or 1}
        try:
            GPT2Config(**{**self.model, **known})
        except ValueError as error:
            raise ValueError(f"model.{error}") from None

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Makes one of what a config file gives: a ConfigDict, or nested plain data.

        Raises:
          ValueError: on anything else, and on a key that is missing or unknown.
        """
        values = values.to_dict() if hasattr(values, "to_dict") else values
        sections = {
            "data": DataConfig,
            "optim": optim.OptimConfig,
            "lora": LoraConfig,
            "mesh": MeshConfig,
            "eval": EvalConfig,
            "checkpoint": CheckpointConfig,
        }
        check_names("", values, cls)
        made = {}
        for name, kind in sections.items():
            check_names(f"{name}.", values[name], kind)
            made[name] = kind(**values[name])
        return cls(**{**values, **made})

    @property
    def adapters(self) -> LoraConfig | None:
        """None where all parameters are trained."""
        return self.lora if self.lora.rank else None

    def batch(self, step: int, since: Position = BEGINNING) -> range:
        """The numbers of the examples of the batch of a step, the run's first being 0.

        `batch_warmup` says until how many tokens a batch has how many examples.

        Args:
          since: where this config began to apply, at or before `step`: what came before
            may have had batches of other sizes.
        """
        at, first = since  # step and example at which a stage begins
        for tokens, size in self.batch_warmup:
            left = tokens - first * self.block_size
            steps = max(0, -(-left // (size * self.block_size)))
            if step < at + steps:
                return range(first + (step - at) * size, first + (step - at + 1) * size)
            at, first = at + steps, first + steps * size
        first += (step - at) * self.batch_size
        return range(first, first + self.batch_size)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is due after so many updates."""
        return step > 0 and (step == self.steps or step % self.checkpoint.every == 0)

    def evaluates(self, step: int) -> bool:
        """Whether an evaluation is due after so many updates."""
        return step == self.steps or step % self.eval.every == 0

    def microbatches(self, batch_size: int, mesh: Mesh) -> int:
        """Into how many microbatches, one after another, a batch is cut: the fewest.

        Each is spread evenly over the mesh, at most `device_batch_size` examples to a
        device. So the same batch is computed on any number of devices.

        Raises:
          ValueError: when that can't be.
        """
        shards = sharding.n_batch_shards(mesh)
        if batch_size % shards:
            raise ValueError(
                f"a batch of {batch_size} examples does not divide by the {shards} "
                "devices that it is spread over"
            )
        each = batch_size // shards  # examples of a device
        limit = self.device_batch_size or each
        return next(
            n for n in range(1, each + 1) if each % n == 0 and each // n <= limit
        )


def plain(cfg: TrainConfig) -> dict[str, Any]:
    """The config as plain JSON data."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def changes(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """path -> (old, new) where two trees of plain data differ."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*old, *new}):
            name = f"{path}.{key}" if path else key
            found |= changes(old.get(key), new.get(key), name)
        return found
    return {} if old == new else {path: (old, new)}
