"""GPT-2 in JAX and Flax: train it, load it, generate from it."""

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpt2_jax.config import GPT2Config
    from gpt2_jax.lm import LanguageModel, load
    from gpt2_jax.model import GPT2

__version__ = "0.1.0"
__all__ = ["GPT2", "GPT2Config", "LanguageModel", "load"]
_PLACES = {
    "GPT2": "gpt2_jax.model",
    "GPT2Config": "gpt2_jax.config",
    "LanguageModel": "gpt2_jax.lm",
    "load": "gpt2_jax.lm",
}


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str) -> Any:
    """Imports a public name, and JAX with it, when it is first used.

    So that `gpt2_jax.commands.door` can be imported before JAX is.
    """
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # To look for garbage while modules load takes a third of the time, and finds none.
    collects = gc.isenabled()
    gc.disable()
    try:
        globals()[name] = getattr(importlib.import_module(_PLACES[name]), name)
    finally:
        if collects:
            gc.enable()
    return globals()[name]
