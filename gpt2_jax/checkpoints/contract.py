"""What a checkpoint says of itself, read from its JSON and checked field by field."""

import base64
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpt2_jax.checkpoints.integrity import digest
from gpt2_jax.checkpoints.retention import Saved, finite
from gpt2_jax.checks import check_fields, one_line, shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.runtime.files import read_json
from gpt2_jax.tokenizers.files import tokenizer_from_files, tokenizer_hash
from gpt2_jax.tokenizers.protocol import Tokenizer

FORMAT = 1
VAL_LOSS = "val_loss"
_LARGEST = 2**31 - 1  # of a step, which is an int32

_META = {
    "format": int,
    "step": int,
    "model": dict,
    "run": dict,
    "metrics": dict,
    "tokenizer": dict,
    "checksums": dict,
}
_LATER = {"examples": int | None, "due": bool | None, "interim": bool | None}
_MODEL = dict.fromkeys(
    ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head"), int
)
_TOKENIZER = {"kind": str, "sha256": str, "vocab_size": int}
_BASE = {"model": str, "step": int | None, "sha256": str, "beside": str | None}
_BEST = {"step": int, "val_loss": float, "since": int}
# What is read of the configuration of a run. It is empty where a model was converted;
# other keys may be missing, which have come since a run was begun.
_RUN = {"data": dict, "optim": dict, "lora": dict, "block_size": int}


class DamagedCheckpointError(ValueError):
    """What is on disk isn't what was saved."""


def damaged(step_folder: Path, why: object) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"checkpoint {step_folder} is damaged: {one_line(why)}"
    )


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a checkpoint says of itself."""

    step: int
    model: GPT2Config
    run: Mapping[str, Any]  # the configuration of the run, as plain data
    tokenizer: Tokenizer
    metrics: Mapping[str, float]  # finite ones
    checksums: Mapping[str, int]  # of its arrays
    base: Mapping[str, Any] | None = None  # what the params are adapters of
    best: Mapping[str, Any] | None = None  # the evaluation of least loss up to here
    examples: int | None = None  # seen in training; None: it does not say
    due: bool = False  # whether the evaluation of this step is still to come
    interim: bool = False  # see `retention.Saved`

    @property
    def saved(self) -> Saved:
        """What decides whether it is kept."""
        return Saved(self.metrics.get(VAL_LOSS), self.interim)

    def check_is_of_a_run(self, step_folder: Path) -> None:
        """Raises ValueError for a conversion: it holds a model, and no run of one."""
        for name in ("data", "optim", "block_size", "batch_size"):
            if name not in self.run:
                raise ValueError(
                    f"checkpoint {step_folder} is no step of a run (no {name}): `load` "
                    "and init_from take it"
                )


def read_contract(step_folder: Path) -> Contract:
    """Reads and verifies all but the arrays of one step.

    Raises:
      DamagedCheckpointError: on missing or altered JSON or tokenizer files, and on what
        no version of this library writes.
      PermissionError: when they may not be read.
    """
    try:
        meta = read_json(step_folder / "meta" / "metadata")
        files = read_json(step_folder / "tokenizer" / "metadata")
        contract = parse_contract(meta, files)
    except PermissionError:
        raise
    except (ValueError, OSError) as error:
        raise damaged(step_folder, error) from error
    name = step_folder.name
    if name.isdecimal() and name != str(contract.step):
        raise damaged(step_folder, f"it holds step {contract.step}")
    return contract


def parse_contract(meta: Any, files: Any) -> Contract:
    """The contract in the JSON of a checkpoint.

    Args:
      meta: of `meta`.
      files: of `tokenizer`: name -> content in base 64.

    Raises:
      ValueError: naming what is wrong.
    """
    check_fields("meta", meta, {"sha256": str})
    said = {name: value for name, value in meta.items() if name != "sha256"}
    if _digest(said) != meta["sha256"]:
        raise ValueError("meta does not match its own hash")
    check_fields("meta", said, {**_META, **_LATER})
    if said["format"] != FORMAT:
        raise ValueError(f"meta: format={said['format']} is not {FORMAT}")
    if not 0 <= said["step"] <= _LARGEST:
        raise ValueError(f"meta: step={shown(said['step'])} is not in 0 .. {_LARGEST}")
    check_fields("meta: model", said["model"], _MODEL)
    check_fields("meta: tokenizer", said["tokenizer"], _TOKENIZER)
    run = said["run"]
    check_fields("meta: run", run, {k: v for k, v in _RUN.items() if k in run})
    metrics, sums = said["metrics"], said["checksums"]
    check_fields("meta: metrics", metrics, dict.fromkeys(metrics, float))
    check_fields("meta: checksums", sums, dict.fromkeys(sums, int))
    base, best = said.get("base"), said.get("best")
    if base is not None:
        check_fields("meta: base", base, _BASE)
    if best is not None:
        check_fields("meta: best", best, _BEST)
        best = {name: best[name] for name in _BEST} if finite(best) == best else None
    return Contract(
        step=said["step"],
        model=GPT2Config.from_dict(said["model"]),
        run=run,
        tokenizer=_tokenizer(said["tokenizer"], files),
        metrics=finite(metrics),
        checksums=sums,
        base=base,
        best=best,
        examples=said.get("examples"),
        due=bool(said.get("due")),
        interim=bool(said.get("interim")),
    )


def _digest(said: dict[str, Any]) -> str:
    try:
        return digest(said)
    except RecursionError:
        raise ValueError("meta is nested too deep") from None


def _tokenizer(said: Mapping[str, Any], files: Any) -> Tokenizer:
    check_fields("tokenizer", files, {})
    check_fields("tokenizer", files, dict.fromkeys(files, str))
    contents = {name: base64.b64decode(text) for name, text in files.items()}
    tokenizer = tokenizer_from_files(said["kind"], contents)
    if tokenizer_hash(tokenizer) != said["sha256"]:
        raise ValueError("the tokenizer's files do not match their hash")
    return tokenizer
