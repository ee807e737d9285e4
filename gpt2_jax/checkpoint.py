"""Orbax checkpoints of a run: state, contract and tokenizer in every step.

A step's folder stands alone. It holds `state` (step, params, opt_state), `meta`
(model config, run config, data position, a checksum for every array) and
`tokenizer` (its files). Saving is asynchronous and atomic: a save that was cut
short leaves a temporary folder, which is never taken for a checkpoint.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from gpt2_jax import distributed, sharding
from gpt2_jax.checks import MESSAGE, integer, one_line, shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.metrics import size_of
from gpt2_jax.model import Params, unstack_layers
from gpt2_jax.retention import PreservationPolicy, Saved, best_step, finite
from gpt2_jax.tokenizer import Tokenizer, tokenizer_from_files, tokenizer_hash

T = TypeVar("T")

FORMAT = 1
_ELSEWHERE = "another process can't read it"
VAL_LOSS = "val_loss"
BEST = "best"


class DamagedCheckpointError(ValueError):
    """What is on disk isn't what was saved."""


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a checkpoint says of itself."""

    step: int
    model: GPT2Config
    run: Mapping[str, Any]  # the configuration of the run, as plain data
    tokenizer: Tokenizer
    metrics: Mapping[str, float]  # finite ones
    base: Mapping[str, Any] | None = None  # what the params are adapters of
    best: Mapping[str, Any] | None = None  # the evaluation of least loss up to here
    examples: int | None = None  # seen in training; None: it does not say
    due: bool = False  # whether the evaluation of this step is still to come
    interim: bool = False  # see `retention.Saved`

    @property
    def saved(self) -> Saved:
        """What decides whether it is kept."""
        return Saved(self.metrics.get(VAL_LOSS), self.interim)


class Checkpoints:
    """The checkpoints of one run, of which `retention.kept_steps` are kept."""

    def __init__(self, folder: Path, *, keep_last: int = 1) -> None:
        """Opens `folder`, which is made by the first save.

        Raises:
          DamagedCheckpointError: when a step's folder can't even be listed.
        """
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last} must be >= 1")
        self.folder = folder
        self._given_up = False
        saved = {}
        for step in check_steps(folder):
            with contextlib.suppress(DamagedCheckpointError):  # said when it is read
                saved[step] = read_contract(folder / str(step)).saved
        self._policy = PreservationPolicy(saved, keep_last)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(
        self,
        state: Any,
        *,
        model: GPT2Config,
        run: Mapping[str, Any],
        tokenizer: Tokenizer,
        val_loss: float | None = None,
        base: Mapping[str, Any] | None = None,
        best: Mapping[str, Any] | None = None,
        examples: int | None = None,
        due: bool = False,
        interim: bool = False,
    ) -> None:
        """Starts to save a TrainState.

        The arrays are copied before this returns, so the state may be donated. Of a
        step that is there already, what was not known when it was saved is written
        anew: `val_loss`, `best`, `due` and `interim`.

        Args:
          base: where params are adapters, of what: its `model`, `step` and `sha256`.
          best: the evaluation of least loss: its `step` and `val_loss`, and how many
            came `since`.
          examples: how many were seen in training.
          due: whether the evaluation of this step is still to come.
          interim: whether it is kept until the next one only, see `retention.Saved`.

        Raises:
          OSError: in all processes, where there is no space for it.
        """
        step = int(state.step)
        self.wait()  # for the one before, which removes an older one
        metrics = finite({} if val_loss is None else {VAL_LOSS: val_loss})
        self._policy.saved[step] = Saved(metrics.get(VAL_LOSS), interim)
        known = {
            "metrics": metrics,
            "best": None if best is None else dict(best),
            "due": due,
            "interim": interim,
        }
        if step in self._manager.all_steps():
            distributed.first_alone(partial(_amend, self.folder / str(step), known))
            self._remove_old()
            return
        tree = as_tree(state)
        distributed.first_alone(partial(_check_space, self.folder, tree))
        meta = {
            "format": FORMAT,
            "step": step,
            "model": dataclasses.asdict(model),
            "run": dict(run),
            **known,
            "base": None if base is None else dict(base),
            "examples": examples,
            "tokenizer": {
                "kind": tokenizer.kind,
                "sha256": tokenizer_hash(tokenizer),
                "vocab_size": tokenizer.vocab_size,
                "eot_id": tokenizer.eot_id,
            },
            "checksums": checksums(tree),
        }
        files = {
            name: base64.b64encode(content).decode()
            for name, content in tokenizer.files().items()
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree),
                meta=ocp.args.JsonSave({**meta, "sha256": _digest(meta)}),
                tokenizer=ocp.args.JsonSave(files),
            ),
        )

    def _remove_old(self) -> None:
        """Removes what is not kept any more; a save does so by itself."""
        infos = sorted(self._manager.all_steps())
        kept = self._policy.kept(infos)
        for step in infos:
            if step not in kept:
                self._manager.delete(step)

    def wait(self) -> None:
        """Returns when all that was saved is on disk."""
        self._manager.wait_until_finished()

    def give_up(self) -> None:
        """Makes `close` do nothing: it would wait for a process that is gone."""
        self._given_up = True

    def close(self) -> None:
        if not self._given_up:
            self._manager.close()


def _amend(step_folder: Path, known: Mapping[str, Any]) -> None:
    """Has the first process write fields of a contract anew, whole or not at all."""
    if not distributed.is_first():
        return
    path = step_folder / "meta" / "metadata"
    meta = {**json.loads(path.read_bytes()), **known}
    meta.pop("sha256")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({**meta, "sha256": _digest(meta)}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check_space(folder: Path, tree: Any) -> None:
    """Raises OSError where it can't hold the arrays of a tree.

    Found out in the midst of a save, it ends one process of a job; Orbax has the others
    wait for 20 minutes then.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(tree))
    usage = shutil.disk_usage(folder)
    if usage.free < size and usage.total:  # some file systems of buckets say 0
        raise OSError(
            f"no space for a checkpoint of {size_of(size)}: {folder} has "
            f"{size_of(usage.free)} free"
        )


def as_tree(state: Any) -> dict[str, Any]:
    """A TrainState as the dict that a checkpoint holds, with one entry a layer."""
    tree = {"step": state.step, "params": state.params, "opt_state": state.opt_state}
    return unstack_layers(tree)


def check_steps(folder: Path) -> list[int]:
    """The steps saved in a run's checkpoint folder, ascending.

    Raises:
      DamagedCheckpointError: naming a step whose parts are not all there.
    """
    steps = _steps(folder)
    for step in steps:
        _check_parts(folder / str(step))
    return steps


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def _check_parts(step_folder: Path) -> None:
    for part in ("state", "meta", "tokenizer"):
        if not (step_folder / part).is_dir():
            raise _damaged(step_folder, f"no folder {part!r}")


def latest_contract(folder: Path) -> Contract | None:
    """Of the latest step in `folder` whose contract can be read; None: of none."""
    for step in reversed(_steps(folder)):
        with contextlib.suppress(DamagedCheckpointError):
            return read_contract(folder / str(step))
    return None


def find_step(path: Path, step: int | str | None = None) -> Path:
    """The folder of one step.

    Args:
      path: of a run (workdir), or, with no `step`, of one of its steps.
      step: its number; "best": that of least validation loss among those that are
        there; None: the latest.

    Raises:
      FileNotFoundError: when it isn't there.
      ValueError: when it is neither a number nor "best".
    """
    if isinstance(step, str) and step != BEST:
        if not (step.isdecimal() and step.isascii()):
            raise ValueError(f"step={shown(step)} is neither a number nor {BEST!r}")
        step = int(step)
    if not isinstance(step, str | None):
        step = integer("step", step)
    if step is None and (path / "meta").is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no such folder: {path}")
    folder = path / "checkpoints"
    steps = check_steps(folder)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    if step == BEST:
        step = best_step({s: read_contract(folder / str(s)).saved for s in steps})
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {folder} has a validation loss")
    if step is not None and step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}: {steps}")
    return folder / str(steps[-1] if step is None else step)


def latest_sound(
    folder: Path,
    abstract: Callable[[], Any],
    check: Callable[[Path, Contract], None],
) -> tuple[Contract, Any] | None:
    """Contract and arrays of the latest step in `folder` that isn't damaged.

    Damaged ones are named on stderr and moved to the folder `damaged` beside `folder`.
    All processes of a job call it together, and take the same step.

    Args:
      abstract: gives that of `restore`; called where there is a checkpoint.
      check: is called with a step's folder and contract before its arrays are read.

    Returns:
      None when no step was ever saved.

    Raises:
      DamagedCheckpointError: when none is sound: nothing is begun anew then.
    """
    aside = folder.parent / "damaged"
    distributed.first_alone(partial(_set_incomplete_aside, folder, aside))
    while steps := _steps(folder):
        step_folder = folder / str(steps[-1])
        contract: Contract | None = None
        error: DamagedCheckpointError | None = None
        try:
            contract = read_contract(step_folder)
        except DamagedCheckpointError as e:
            error = e
        if distributed.all_agree(contract is not None):
            assert contract is not None
            check(step_folder, contract)
            try:
                return contract, restore(step_folder, abstract())
            except DamagedCheckpointError as e:
                error = e
        distributed.first_alone(partial(_set_aside, step_folder, aside, error))
    if aside.is_dir() and any(aside.iterdir()):
        raise DamagedCheckpointError(
            f"no sound checkpoint is left in {folder}, damaged ones are in {aside}: "
            "remove that to begin anew, or choose another workdir"
        )
    return None


def _set_incomplete_aside(folder: Path, aside: Path) -> None:
    """All steps that lack a part, older ones too: Orbax would stumble over them."""
    for step in _steps(folder):
        try:
            _check_parts(folder / str(step))
        except DamagedCheckpointError as e:
            _set_aside(folder / str(step), aside, e)


def _set_aside(step_folder: Path, aside: Path, error: Exception | None) -> None:
    if not step_folder.exists():  # another process did it
        return
    aside.mkdir(exist_ok=True)
    to = aside / step_folder.name
    while to.exists():
        to = to.with_name(to.name + "+")
    step_folder.rename(to)
    why = error or _damaged(step_folder, _ELSEWHERE)
    text = one_line(f"note: {why}; it is now {to}", 2 * MESSAGE)  # it has two paths
    print(text, file=sys.stderr, flush=True)


def read_contract(step_folder: Path) -> Contract:
    """Reads and verifies all but the arrays of one step.

    Raises:
      DamagedCheckpointError: on unreadable or altered JSON or tokenizer files.
    """
    meta = _restore(step_folder, "meta", ocp.args.JsonRestore())
    files = _restore(step_folder, "tokenizer", ocp.args.JsonRestore())
    digest = meta.pop("sha256", None)
    if meta.get("format") != FORMAT or digest != _digest(meta):
        raise _damaged(step_folder, "meta does not match its own hash")
    said = meta["tokenizer"]
    try:
        tokenizer = tokenizer_from_files(
            said["kind"], {n: base64.b64decode(c) for n, c in files.items()}
        )
    except ValueError as e:
        raise _damaged(step_folder, f"tokenizer: {e}") from e
    if tokenizer_hash(tokenizer) != said["sha256"]:
        raise _damaged(step_folder, "the tokenizer's files do not match their hash")
    best = meta.get("best")
    return Contract(
        step=meta["step"],
        model=GPT2Config.from_dict(meta["model"]),
        run=meta["run"],
        tokenizer=tokenizer,
        metrics=finite(meta["metrics"]),
        base=meta.get("base"),
        best=best if best and finite({VAL_LOSS: best[VAL_LOSS]}) else None,
        examples=meta.get("examples"),
        due=meta.get("due", False),
        interim=meta.get("interim", False),
    )


def restore(step_folder: Path, abstract: Any) -> Any:
    """Restores a tree of arrays onto the shardings of its abstract leaves.

    All processes of a job call it together, and it raises in all of them or in none.

    Args:
      step_folder: one step of a run.
      abstract: a dict with any of the keys step, params and opt_state, whose
        leaves are `jax.ShapeDtypeStruct` with a sharding; what it leaves out is
        not read.

    Raises:
      DamagedCheckpointError: when files are missing or cut, or when an array's
        checksum isn't the one that was saved.
      ValueError: when a shape on disk isn't the one asked for.
    """
    restore_args = jax.tree.map(_restore_args, abstract)
    tree, error = None, None
    try:
        tree = _restore(
            step_folder,
            "state",
            ocp.args.PyTreeRestore(
                item=abstract, restore_args=restore_args, partial_restore=True
            ),
        )
    except DamagedCheckpointError as e:
        error = e
    if not distributed.all_agree(error is None):
        raise error or _damaged(step_folder, _ELSEWHERE)
    _check_sums(step_folder, tree)
    return tree


def restore_params(step_folder: Path, contract: Contract, abstract: Params) -> Params:
    """The parameters to generate with: the averaged ones where the run kept some.

    Raises as `restore`.
    """
    if not contract.run.get("optim", {}).get("ema_decay"):
        return restore(step_folder, {"params": abstract})["params"]
    try:
        saved = ocp.PyTreeCheckpointHandler().metadata(
            (step_folder / "state").absolute()
        )
    except Exception as e:  # as of `_restore`
        raise _damaged(step_folder, f"state: {e}") from e
    wanted = {_name(path): x for path, x in _leaves(abstract)}

    def of_average(path: Any, _: Any) -> Any:
        _, is_average, name = _name(path).rpartition("/ema/")
        return wanted[name] if is_average else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(of_average, dict(saved.tree))
    restore_args = jax.tree.map(_restore_args, item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
    found = {
        _name(path): x
        for path, x in _leaves(_restore(step_folder, "state", args))
        if x is not ocp.PLACEHOLDER
    }
    _check_sums(step_folder, found)
    by_name = {name.rpartition("/ema/")[2]: x for name, x in found.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_name[_name(path)], abstract
    )


def _restore_args(x: Any) -> ocp.RestoreArgs:
    if x is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(
        sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
    )


def _check_sums(step_folder: Path, tree: Any) -> None:
    said = _restore(step_folder, "meta", ocp.args.JsonRestore())["checksums"]
    for name, value in checksums(tree).items():
        if said.get(name) != value:
            raise _damaged(step_folder, f"array {name} fails its checksum")


def checksums(tree: Any) -> dict[str, int]:
    """path -> 32-bit checksum of each array, computed where its shards lie.

    The sum, modulo 2**32, of each element's bits times an odd number that grows
    with its index: any flipped bit changes it, and so does a swap or a shift.
    Integer sums don't depend on their order, so neither does it on the topology.
    """
    sums = {}
    for path, x in _leaves(tree):
        sums[_name(path)] = _checksum(x)
        if sharding.on_cpu():
            # Programs of all CPU devices at a time may each hold some of their threads
            # and wait for the rest, without end.
            sums[_name(path)].block_until_ready()
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def params_hash(params: Params) -> str:
    """Of parameters with an entry a layer, whatever their shardings."""
    return _digest(checksums(params))


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        iota = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        index = index * jnp.uint32(size) + iota
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


def _digest(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _damaged(step_folder: Path, why: object) -> DamagedCheckpointError:
    why = " ".join(str(why).split())
    return DamagedCheckpointError(f"checkpoint {step_folder} is damaged: {why[:300]}")


def _restore(step_folder: Path, item: str, args: Any) -> Any:
    handler = (
        ocp.JsonCheckpointHandler()
        if isinstance(args, ocp.args.JsonRestore)
        else ocp.PyTreeCheckpointHandler()
    )
    # Not waiting for other processes, which may have met with damage.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read-{me}"
    )
    unraisable = sys.unraisablehook

    def hook(complaint: Any) -> None:
        if not _left_behind(complaint):
            unraisable(complaint)

    sys.unraisablehook = hook
    asyncio_logger = logging.getLogger("asyncio")  # "exception was never retrieved"
    asyncio_logger.disabled = True
    try:
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
            restored = checkpointer.restore((step_folder / item).absolute(), args=args)
    except Exception as e:  # Orbax raises bare Exceptions on damaged files
        raise _damaged(step_folder, f"{item}: {e.__cause__ or e}") from e
    sys.unraisablehook = unraisable
    asyncio_logger.disabled = False
    return restored


def _left_behind(complaint: Any) -> bool:
    """Whether an unraisable exception comes from a read that Orbax gave up.

    When one read fails, Orbax closes the event loop under the others; each of them
    complains when it ends or is collected, before or after the error is reported.
    """
    if str(complaint.exc_value) == "Event loop is closed":
        return True
    coroutine = getattr(complaint.object, "cr_code", None)
    files = [] if coroutine is None else [coroutine.co_filename]
    traceback = complaint.exc_traceback
    while traceback is not None:
        files.append(traceback.tb_frame.f_code.co_filename)
        traceback = traceback.tb_next
    return any("orbax" in Path(file).parts for file in files)
