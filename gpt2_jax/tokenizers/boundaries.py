"""The tokens before and after a text: for prompts, scoring, and ends of documents."""

from gpt2_jax.tokenizers.gpt2 import GPT2Tokenizer
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer


def end_of_text(tokenizer: Tokenizer, purpose: str) -> int:
    """Returns the end-of-text token of a tokenizer.

    Raises:
      ValueError: when it has none; the message begins with `purpose`.
    """
    if tokenizer.eot_id is None:
        raise ValueError(f"{purpose}, and this tokenizer ({tokenizer.kind}) has none")
    return tokenizer.eot_id


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """Returns the ids of a prompt; for an empty one, the token that texts follow.

    Raises:
      ValueError: as `encode`, and on an empty prompt when there is no such token.
    """
    ids = [*tokenizer.begin_ids, *tokenizer.encode(text)]
    if not (ids or (ids := before_text(tokenizer))):
        raise ValueError(
            "the prompt is empty, and this model has no end of text to begin after: "
            "give a prompt"
        )
    return ids


def before_text(tokenizer: Tokenizer) -> list[int]:
    """Returns the token that a text follows when it is scored; [] if there is none."""
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return [*tokenizer.begin_ids[-1:]] or begin


def as_trained(tokenizer: Tokenizer) -> Tokenizer:
    """Returns the tokenizer with the ends of texts that training here gives a model.

    In training, an end of text stands before and after each document. That replaces
    what the files of another model declare.
    """
    if isinstance(tokenizer, GPT2Tokenizer | NoTokenizer):
        return tokenizer.as_trained()
    return tokenizer
