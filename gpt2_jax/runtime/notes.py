"""Notes for the person who started a job."""

import sys

from gpt2_jax.checks import one_line
from gpt2_jax.runtime import distributed


def note_once(text: str) -> None:
    """Prints one line on stderr, once for all processes of a job."""
    if distributed.is_first():
        print(f"note: {one_line(text)}", file=sys.stderr, flush=True)
