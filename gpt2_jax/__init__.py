"""GPT-2 in JAX and Flax: train it, load it, generate from it."""

from gpt2_jax.config import GPT2Config
from gpt2_jax.lm import LanguageModel, load
from gpt2_jax.model import GPT2

__version__ = "0.1.0"
__all__ = ["GPT2", "GPT2Config", "LanguageModel", "load"]
