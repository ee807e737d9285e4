"""GPT-2 in JAX and Flax: train it, load it, generate from it."""

import gc

# To look for garbage while modules load takes a third of the time, and finds none.
_collects = gc.isenabled()
gc.disable()
try:
    from gpt2_jax.config import GPT2Config
    from gpt2_jax.lm import LanguageModel, load
    from gpt2_jax.model import GPT2
finally:
    if _collects:
        gc.enable()

__version__ = "0.1.0"
__all__ = ["GPT2", "GPT2Config", "LanguageModel", "load"]
