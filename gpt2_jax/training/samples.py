"""The text that a run generates at each evaluation."""

import dataclasses

import jax
from jax.sharding import Mesh

from gpt2_jax.config import GPT2Config
from gpt2_jax.decoding.generate import generate
from gpt2_jax.decoding.options import Options
from gpt2_jax.decoding.requests import Request, check_request
from gpt2_jax.layout import Params, unstack_layers
from gpt2_jax.model import GPT2
from gpt2_jax.runtime import distributed, sharding
from gpt2_jax.tokenizers.boundaries import as_trained, encode_prompt
from gpt2_jax.tokenizers.no_tokenizer import NoTokenizer
from gpt2_jax.tokenizers.protocol import Tokenizer
from gpt2_jax.training.config import EvalConfig


def check_sample(cfg: EvalConfig, tokenizer: Tokenizer, model: GPT2Config) -> None:
    """Raises ValueError when no text can be generated as the config has it."""
    if not cfg.sample_tokens:
        return
    try:
        ids = _prompt_ids(cfg, tokenizer)
        request = Request(ids, Options(max_new_tokens=cfg.sample_tokens), (0, 0, 0))
        check_request(request, model, tokenizer.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"eval.sample_tokens={cfg.sample_tokens}, "
            f"eval.sample_prompt={cfg.sample_prompt!r}: {error}"
        ) from None


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Generates text with the parameters of a run while it is trained."""

    model: GPT2
    tokenizer: Tokenizer
    cfg: EvalConfig
    seed: int
    mesh: Mesh

    def sample(self, params: Params) -> str | None:
        """The text; None in processes of a job other than the first.

        Args:
          params: of the whole model, sharded over the mesh; stacked where the model
            scans its layers.
        """
        model = self.model
        mesh: Mesh | None = self.mesh
        if jax.process_count() > 1:
            params = sharding.local_copy(params, self.mesh)
            if not distributed.is_first():
                return None
            model, mesh = model.clone(mesh=None), None  # one device
        return sample_text(
            model,
            unstack_layers(params),
            self.tokenizer,
            self.cfg,
            seed=self.seed,
            mesh=mesh,
        )


def sample_text(
    model: GPT2,
    params: Params,
    tokenizer: Tokenizer,
    cfg: EvalConfig,
    *,
    seed: int,
    mesh: Mesh | None = None,
) -> str:
    """The prompt and what follows it; without a tokenizer, the ids of both.

    Raises:
      ValueError: as `check_sample`.
    """
    tokenizer, ids = as_trained(tokenizer), _prompt_ids(cfg, tokenizer)
    [new_ids] = generate(
        model,
        params,
        [ids],
        Options(max_new_tokens=cfg.sample_tokens),
        seed=seed,
        end_ids=tokenizer.end_ids,
        n_valid=tokenizer.vocab_size,
        mesh=mesh,
    )
    if isinstance(tokenizer, NoTokenizer):
        return " ".join(map(str, [*ids, *new_ids]))
    return cfg.sample_prompt + tokenizer.decode(new_ids)


def _prompt_ids(cfg: EvalConfig, tokenizer: Tokenizer) -> list[int]:
    tokenizer = as_trained(tokenizer)
    is_bare = isinstance(tokenizer, NoTokenizer) and not cfg.sample_prompt
    if is_bare and tokenizer.eot_id is not None:
        return [tokenizer.eot_id]
    return encode_prompt(tokenizer, cfg.sample_prompt)
