"""A model class for EleutherAI's lm-evaluation-harness, which finds none by itself:

python -m gpt2_jax.evaluation.lm_eval --model gpt2_jax \
  --model_args path=runs/mine --tasks TASKS

is the harness's own command with this class known to it; all of its flags are there.
Needs the extra `eval`.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

try:
    import lm_eval.models  # noqa: F401, registers its own classes
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"{error}; gpt2_jax.evaluation.lm_eval needs the package lm_eval: "
        "pip install 'gpt2-jax[eval]'"
    ) from None
from tqdm import tqdm

from gpt2_jax.decoding.score import Row, Score, sliding_rows
from gpt2_jax.lm import LanguageModel, load
from gpt2_jax.runtime.sharding import make_mesh
from gpt2_jax.runtime.xla_flags import set_flags
from gpt2_jax.tokenizers.boundaries import end_of_text

N_SLOTS = 8  # texts that are generated at a time


@register_model("gpt2_jax")
class HarnessModel(TemplateLM):
    """Whatever `gpt2_jax.load` takes, over all devices of the process.

    Args:
      path, step, revision, dtype: as of `gpt2_jax.load`.
      batch_size: windows of rows, or generated texts, at a time; "auto" and 1, the
        harness's default: as many as suit the device. No result depends on it.
      max_batch_size, device: given by the harness and not looked at: JAX has its own
        devices (JAX_PLATFORMS).
    """

    def __init__(
        self,
        path: str | LanguageModel,
        step: int | str | None = None,
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        if isinstance(path, LanguageModel):
            self.lm = path
        else:
            mesh = make_mesh() if jax.device_count() > 1 else None
            self.lm = load(path, step=step, revision=revision, dtype=dtype, mesh=mesh)
        end_of_text(self.lm.tokenizer, f"{path}: empty contexts need an end of text")
        if not str(batch_size).startswith("auto") and int(batch_size) < 1:
            raise ValueError(f"{batch_size=} must be auto or >= 1")
        auto = str(batch_size).startswith("auto") or int(batch_size) == 1
        self.batch_size = None if auto else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        return end_of_text(self.lm.tokenizer, "empty contexts need an end of text")

    @property
    def max_length(self) -> int:
        return self.lm.config.n_positions

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        return self.lm.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Scores each continuation after as much of its context as fits."""
        rows = []
        for (_, text), context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is not within "
                    f"[1, {self.max_length}]: {text[:40]!r}"
                )
            ids = [*context, *continuation][-self.max_length - 1 :]
            rows.append(Row(ids, len(continuation)))
        results: list[Any] = [None] * len(rows)
        for i, score in self._scores(rows, "loglikelihood", disable_tqdm):
            results[i] = score.total, bool(score.is_greedy.all())
            self.cache_hook.add_partial("loglikelihood", requests[i][0], results[i])
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Scores whole texts after an end of text, in windows whose targets do not
        overlap; the last window reaches back as far as the context does."""
        rows: list[Row] = []
        owners: list[int] = []
        for i, request in enumerate(requests):
            ids = [self.eot_token_id, *self.tok_encode(request.args[0])]
            rows += sliding_rows(ids, self.max_length, self.max_length)
            owners += [i] * (len(rows) - len(owners))
        totals, left = np.zeros(len(requests)), np.bincount(owners, None, len(requests))
        for i, score in self._scores(rows, "loglikelihood_rolling", disable_tqdm):
            owner = owners[i]
            totals[owner] += score.total
            left[owner] -= 1
            if not left[owner]:
                self.cache_hook.add_partial(
                    "loglikelihood_rolling",
                    requests[owner].args,
                    float(totals[owner]),
                )
        return totals.tolist()

    def _scores(
        self, rows: Sequence[Row], what: str, disable_tqdm: bool
    ) -> Iterable[tuple[int, Score]]:
        return tqdm(
            self.lm.score_rows(rows, batch_size=self.batch_size),
            f"Running {what} requests",
            len(rows),
            disable=disable_tqdm,
        )

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """What follows each context, of which as much as leaves room for it counts.

        Generation options are those of `gpt2_jax.decoding.options.Options`; another one
        raises.
        Seeds are drawn from numpy's global generator, which the harness's `--seed` is
        for.
        """
        asked = []
        for request in requests:
            context, given = request.args
            options: dict[str, Any] = {**normalize_gen_kwargs(given, 256)}
            n_new = options.pop("max_gen_toks")
            room = self.max_length - n_new
            if room < 1:
                raise ValueError(
                    f"max_gen_toks={n_new} must be < {self.max_length}, the context"
                )
            ids = self.tok_encode(context)[-room:] or [self.eot_token_id]
            if not options.pop("do_sample"):
                options["temperature"] = 0
            options["stop"] = [s for s in options.pop("until") if s]
            options |= {"max_new_tokens": n_new, "seed": np.random.randint(2**31)}
            asked.append({"prompt": ids, **options})
        order = sorted(range(len(asked)), key=lambda i: -len(asked[i]["prompt"]))
        texts = [""] * len(asked)
        completions = self.lm.generate_many(
            (asked[i] for i in order), n_slots=self.batch_size or N_SLOTS
        )
        for completion in tqdm(
            completions,
            "Running generate_until requests",
            len(asked),
            disable=disable_tqdm,
        ):
            i = order[completion.index]
            texts[i] = completion.text or ""
            self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts


def main() -> None:
    """The harness's own command."""
    from lm_eval.__main__ import cli_evaluate

    set_flags(os.environ)
    cli_evaluate()


if __name__ == "__main__":
    main()
