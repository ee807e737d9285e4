"""Requests and their continuations, as the host knows them."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gpt2_jax.checks import shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.options import Options


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt and the options of its continuation.

    Attributes:
      prompt: ids, at least one.
      options: `num_return_sequences`, `best_of`, the options of beam search and the
        seed have no effect here: the caller makes one request per sequence.
      draw: (seed, row, sequence). The random draws depend on these three and on how
        many tokens were drawn before, and on nothing else of the batch.
      end_ids: tokens that end the row; they are not part of its ids.
      bad_words: the `bad_words` of the options as ids.
      pause_V: bool; after each of these tokens the loop pauses, so that the caller can
        decide whether the row ends.
    """

    prompt: list[int]
    options: Options
    draw: tuple[int, int, int]
    end_ids: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    pause_V: np.ndarray | None = None


@dataclasses.dataclass
class Continuation:
    """A request while it is decoded, and its result afterwards.

    Attributes:
      index: the position of the request among all requests.
      ids: the new tokens, without the one that ended the row.
      logprobs: the log-probability of each, in nats, under the model's own
        distribution.
      top_logprobs: for each new token, the most probable tokens in its place,
        {id: log-probability}.
      finish: one of `state.FINISH_REASONS`; "" while the row is running. The caller may
        set it to end the row.
      started, first, ended: times of `time.perf_counter`: when the request got its
        slot, its first token, and its last one.
      window_start: where in prompt + ids the tokens in the slot begin; over 0 once the
        context has slid.
    """

    index: int
    request: Request
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top_logprobs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    finish: str = ""
    started: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    window_start: int = 0

    @property
    def window(self) -> list[int]:
        """The tokens that the slot holds."""
        return [*self.request.prompt, *self.ids][self.window_start :]

    @property
    def length(self) -> int:
        """The number of tokens that the slot holds."""
        return len(self.request.prompt) + len(self.ids) - self.window_start


def check_request(request: Request, cfg: GPT2Config, n_valid: int) -> None:
    """Raises ValueError on a request that can't be decoded.

    It is called before anything is compiled.
    """
    prompt, options = request.prompt, request.options
    if not prompt:
        raise ValueError("the prompt is empty")
    check_ids(prompt, cfg.vocab_size)
    options.check_ids(n_valid)
    n = options.new_tokens(len(prompt))
    if options.overflow == "error" and len(prompt) + n > cfg.n_positions:
        raise ValueError(
            f"a prompt of {len(prompt)} tokens + max_new_tokens={n} exceeds "
            f"n_positions={cfg.n_positions}; overflow='slide' goes on past it"
        )


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError that names the first id outside [0, vocab_size)."""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise ValueError(f"token id {shown(i)} is outside [0, {vocab_size=})")
