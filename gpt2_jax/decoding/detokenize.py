"""What undoes a published set's own tokenization, for a model of plain text.

The GPT-2 paper (section 3.1) speaks of "invertible de-tokenizers" and gives none.
"""

import re

from gpt2_jax.checks import check_choice

# Patterns and what takes their place, in order.
_RULES: dict[str, tuple[tuple[str, str], ...]] = {
    "none": (),
    # That of WikiText's perplexities in lm-evaluation-harness.
    "wikitext": (
        (r"s '", "s'"),
        (r" @([-,.])@ ", r"\1"),
        (r" ([:;.!?,])(?= )", r"\1"),
        (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
        (r'"\s*([^"]*?)\s*"', r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
        (r"(?<==) (?==)", ""),
        (r" ° ", "°"),
        (r" ?\n ?", "\n"),
        (r" N ", " 1 "),
        (r" 's", "'s"),
    ),
    # OpenAI's of LAMBADA: https://github.com/openai/gpt-2/issues/131
    "lambada": ((r"[“”]|``|''", '"'), (r"\A\s*", "\n"), (r"\s+\Z", "")),
    # The Penn Treebank's, which the Children's Book Test has, too.
    "ptb": (
        (r"`` ?| ?''", '"'),
        (r"-L[RCS]B- ?", "("),
        (r" ?-R[RCS]B-", ")"),
        (r" (n't|'(?:s|re|ve|m|ll|d)\b)", r"\1"),
        (r" ([.,;:!?%])(?!\w)", r"\1"),
        (r"([$#]) (?=\d)", r"\1"),
    ),
}
DETOKENIZERS = tuple(_RULES)


def detokenize(text: str, name: str) -> str:
    """Raises ValueError on a name that is not one of DETOKENIZERS."""
    check_choice("detokenizer", name, _RULES)
    for pattern, replacement in _RULES[name]:
        text = re.sub(pattern, replacement, text)
    return text
