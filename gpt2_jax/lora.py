"""Low-rank adapters: a kernel W acts as W + alpha / rank * A B; only A, B are trained.

Source: https://arxiv.org/abs/2106.09685. Adapters are a tree like the parameters, with
just the modules that are adapted:

    h_{i}/attn/c_attn  lora_a [D, rank]     lora_b [rank, 3, H, K]

and so on: A has the input axes of the kernel, B its output axes. A begins as
N(0, 1 / inputs), B as 0, so that a run begins with just what its base computes.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp

from gpt2_jax.checks import shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.fields import (
    check_below_1,
    check_positive,
    check_range,
    check_types,
)
from gpt2_jax.layout import LAYER, STACKED, Params, unstack_layers
from gpt2_jax.model import abstract_params

# The kernels of a layer, and how many of their axes are inputs.
KERNELS = {"attn/c_attn": 1, "attn/c_proj": 2, "mlp/c_fc": 1, "mlp/c_proj": 1}


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What is adapted, and how; see configs/default.py.

    Raises:
      ValueError: on an impossible value, naming it.
    """

    rank: int  # 0: no adapters
    alpha: float
    dropout: float  # of the inputs of A
    kernels: tuple[str, ...]  # names, or ends of names, in KERNELS

    def __post_init__(self) -> None:
        check_types(self, "lora.")
        check_range("lora.rank", self.rank, 0)
        check_positive("lora.alpha", self.alpha)
        check_below_1("lora.dropout", self.dropout)
        for name in self.kernels:
            if not any(_is_named(kernel, name) for kernel in KERNELS):
                raise ValueError(
                    f"lora.kernels: {shown(name)} is not one of {', '.join(KERNELS)}, "
                    "nor the end of one"
                )
        if not self.kernels:
            raise ValueError("lora.kernels is empty: give one at least")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The config of what JSON holds."""
        return cls(**{**values, "kernels": tuple(values["kernels"])})

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    @property
    def modules(self) -> list[str]:
        """The modules of a layer with a kernel that is adapted."""
        return [k for k in KERNELS if any(_is_named(k, name) for name in self.kernels)]

    def check_fits(self, cfg: GPT2Config) -> None:
        """Raises ValueError when the rank exceeds a side of a kernel."""
        for module, n_in, shape in self._shapes(cfg):
            least = min(math.prod(shape[:n_in]), math.prod(shape[n_in:]))
            if self.rank > least:
                raise ValueError(
                    f"lora.rank={self.rank} exceeds {least}, a side of {module}"
                )

    def _shapes(self, cfg: GPT2Config) -> Iterator[tuple[str, int, tuple[int, ...]]]:
        """Module, input axes and shape of each kernel of a layer that is adapted."""
        layer = abstract_params(dataclasses.replace(cfg, n_layer=1))[f"{LAYER}0"]
        for module in self.modules:
            part, name = module.split("/")
            yield module, KERNELS[module], layer[part][name]["kernel"].shape


def _is_named(kernel: str, name: str) -> bool:
    return f"/{kernel}".endswith(f"/{name}")


def init_adapters(
    lora: LoraConfig, cfg: GPT2Config, key: jax.Array, *, stacked: bool = False
) -> Params:
    """Fresh adapters, float32, an entry a layer or all `stacked`."""
    layers: Params = {}
    for number, (module, n_in, shape) in enumerate(lora._shapes(cfg)):
        part, name = module.split("/")
        inputs, outputs = shape[:n_in], shape[n_in:]
        drawn = jax.random.normal(
            jax.random.fold_in(key, number), (cfg.n_layer, *inputs, lora.rank)
        )
        layers.setdefault(part, {})[name] = {
            "lora_a": drawn / math.sqrt(math.prod(inputs)),
            "lora_b": jnp.zeros((cfg.n_layer, lora.rank, *outputs)),
        }
    adapters = {STACKED: layers}
    return adapters if stacked else unstack_layers(adapters)


def with_adapters(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """Parameters whose Linear modules have adapters beside their kernels.

    Both have an entry a layer, or both are stacked. B comes with the factor
    alpha / rank in it.
    """
    tree = dict(base)
    for name, value in adapters.items():
        if name == "lora_b":
            tree[name] = lora.scale * value
        elif isinstance(value, dict):
            tree[name] = with_adapters(base[name], value, lora)
        else:
            tree[name] = value
    return tree


def merged(base: Params, adapters: Params, lora: LoraConfig) -> Params:
    """The parameters W + alpha / rank * A B; both with an entry a layer."""
    tree = dict(base)
    for name, value in adapters.items():
        if "lora_a" in value:
            kernel, place = base[name]["kernel"], base[name]["kernel"].sharding
            add = jax.jit(_add_product, out_shardings=place)
            kernel = add(kernel, value["lora_a"], value["lora_b"], lora.scale)
            tree[name] = {**base[name], "kernel": kernel}
        else:
            tree[name] = merged(base[name], value, lora)
    return tree


def _add_product(kernel, a, b, scale):
    product = jnp.tensordot(a, b, 1, precision=jax.lax.Precision.HIGHEST)
    return kernel + scale * product
