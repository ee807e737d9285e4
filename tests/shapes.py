"""The model that most tests share, and parameters that need no compilation."""

import jax
import jax.numpy as jnp
import numpy as np

from gpt2_jax.config import GPT2Config
from gpt2_jax.layout import Params
from gpt2_jax.model import abstract_params

TINY = GPT2Config(
    vocab_size=61,
    n_positions=64,
    n_embd=32,
    n_layer=3,
    n_head=4,
    embd_pdrop=0.0,
    attn_pdrop=0.0,
    resid_pdrop=0.0,
)


def random_params(cfg: GPT2Config, stddev: float) -> Params:
    """N(0, stddev), and LayerNorm scales around 1."""
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.asarray(
            stddev * rng.normal(size=x.shape) + ("scale" in jax.tree_util.keystr(path)),
            jnp.float32,
        ),
        abstract_params(cfg),
    )
