"""Tokens in, tokens out: prompts are prefilled, then decoded over a KV cache.

In the order in which a request passes through them: `requests.py` checks it,
`scheduler.py` gives it a slot, `state.py` holds the slots on the devices, `programs.py`
computes and draws their tokens, and `speculative.py` guesses some ahead.
"""

from collections.abc import Sequence

from jax.sharding import Mesh

from gpt2_jax.checks import token_ids
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.requests import Request, check_request
from gpt2_jax.decoding.scheduler import Decoder
from gpt2_jax.decoding.speculative import NO_DRAFT, Draft
from gpt2_jax.layout import Params
from gpt2_jax.model import GPT2


def generate(
    model: GPT2,
    params: Params,
    prompts: Sequence[Sequence[int]],
    options: Options,
    *,
    seed: int,
    end_ids: Sequence[int] = (),
    n_valid: int | None = None,
    draft: Draft = NO_DRAFT,
    mesh: Mesh | None = None,
) -> list[list[int]]:
    """Continues each prompt; all rows decode together.

    Args:
      prompts: lists of ids, of any lengths >= 1.
      seed: row i draws with keys made from (seed, i), so that its tokens depend neither
        on the batch size nor on the other rows.
      end_ids: tokens that end a row; they are not part of its ids.
      n_valid, draft, mesh: as `Decoder` has them.

    Returns:
      The new ids of each prompt.

    Raises:
      ValueError: before anything is compiled, on an empty prompt, an id outside the
        vocabulary, or a length over n_positions.
    """
    n_valid = model.cfg.vocab_size if n_valid is None else n_valid
    requests = []
    for i, prompt in enumerate(prompts):
        ids = token_ids(f"prompt {i}", prompt)
        request = Request(ids, options, (seed, i, 0), tuple(end_ids))
        check_request(request, model.cfg, n_valid)
        requests.append(request)
    if not requests:
        raise ValueError("no prompt given")
    decoder = Decoder(
        model, params, n_slots=len(requests), n_valid=n_valid, draft=draft, mesh=mesh
    )
    new_ids = {row.index: row.ids for rows in decoder.run(requests) for row in rows}
    return [new_ids[i] for i in range(len(requests))]
