"""The shape of a GPT-2: a frozen, hashable, validated dataclass."""

import dataclasses
import math
from typing import Any, Self

from gpt2_jax.checks import check_choice
from gpt2_jax.fields import check_below_1, check_positive, check_range, check_types

MOST_LAYERS = 10_000  # each is part of a program, and of a checkpoint

# gelu_new is GPT-2's tanh approximation, and the next two are other names of it; gelu
# is the one by erf.
ACTIVATIONS = (
    *("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    *("gelu", "quick_gelu", "relu", "silu", "swish", "tanh"),
)


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """What defines a GPT-2 as a function of its parameters.

    How it is computed (dtypes, rematerialisation, scan) is not here: see
    `model.GPT2`. Field names are those of the `config.json` files in use; the
    defaults are the 124M model.

    Raises:
      ValueError: on any impossible value, naming the field, value and limit.
    """

    vocab_size: int = 50257
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # MLP width; None: 4 * n_embd
    bias: bool = True  # in linears and LayerNorms; GPT-2 has them, nanoGPT may not
    activation_function: str = "gelu_new"  # of the MLP, one of ACTIVATIONS
    scale_attn_weights: bool = True  # scores times 1 / sqrt(head_dim)
    scale_attn_by_inverse_layer_idx: bool = False  # and times 1 / (layer + 1)
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    embd_pdrop: float = 0.1  # after wte + wpe
    attn_pdrop: float = 0.1  # on attention probabilities
    resid_pdrop: float = 0.1  # after each c_proj

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"):
            check_range(name, getattr(self, name), 1)
        check_range("n_layer", self.n_layer, 1, MOST_LAYERS)
        if self.n_inner is not None:
            check_range("n_inner", self.n_inner, 1)
        check_choice("activation_function", self.activation_function, ACTIVATIONS)
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}"
            )
        for name in ("layer_norm_epsilon", "initializer_range"):
            check_positive(name, getattr(self, name))
        for name in ("embd_pdrop", "attn_pdrop", "resid_pdrop"):
            check_below_1(name, getattr(self, name))

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_dim(self) -> int:
        return self.n_inner if self.n_inner is not None else 4 * self.n_embd

    @property
    def residual_stddev(self) -> float:
        """Init of both c_proj kernels: the residual stream sums 2 * n_layer of them."""
        return self.initializer_range / math.sqrt(2 * self.n_layer)

    def attention_scale(self, layer: Any) -> Any:
        """What scores are multiplied by in a layer: GPT-2's is 1 / sqrt(head_dim)."""
        scale = self.head_dim**-0.5 if self.scale_attn_weights else 1.0
        return scale / (layer + 1) if self.scale_attn_by_inverse_layer_idx else scale

    @classmethod
    def named(cls, name: str, **overrides: Any) -> Self:
        """One of the four released sizes: gpt2, gpt2-medium, gpt2-large, gpt2-xl."""
        check_choice("model", name, SIZES)
        return cls(**{**SIZES[name], **overrides})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`; an unknown key is refused by name."""
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown GPT2Config field {sorted(unknown)[0]!r}")
        return cls(**values)


SIZES: dict[str, dict[str, int]] = {
    "gpt2": dict(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(n_layer=48, n_head=25, n_embd=1600),
}
