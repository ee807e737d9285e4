"""Orbax checkpoints of a run: state, contract and tokenizer in every step.

A step's folder stands alone. It holds `state` (step, params, opt_state), `meta`
(model config, run config, data position, a checksum for every array) and
`tokenizer` (its files). Saving is asynchronous and atomic: a save that was cut
short leaves a temporary folder, which is never taken for a checkpoint. Before a save
counts, what lies on disk is read back.
"""

import base64
import contextlib
import dataclasses
import errno
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from gpt2_jax.checkpoints import integrity
from gpt2_jax.checkpoints.contract import (
    FORMAT,
    VAL_LOSS,
    Contract,
    DamagedCheckpointError,
    damaged,
    read_contract,
)
from gpt2_jax.checkpoints.given_up import complaints_ignored
from gpt2_jax.checkpoints.integrity import checksums, digest, leaves, name_of
from gpt2_jax.checkpoints.plain_path import plain_path
from gpt2_jax.checkpoints.retention import Saved, best_step, finite, kept_steps
from gpt2_jax.checkpoints.steps import NUMBER, lacks_its_index, saved_steps
from gpt2_jax.checks import MESSAGE, integer, one_line, shown
from gpt2_jax.config import GPT2Config
from gpt2_jax.layout import Params, unstack_layers
from gpt2_jax.runtime import distributed
from gpt2_jax.runtime.files import check_regular
from gpt2_jax.runtime.units import size_of
from gpt2_jax.tokenizers.files import tokenizer_hash
from gpt2_jax.tokenizers.protocol import Tokenizer

_ELSEWHERE = "another process can't read it"
BEST = "best"

_PARTS = ("state", "meta", "tokenizer")
_TEMPORARY = ".orbax-checkpoint-tmp"  # Orbax's, of what is not yet or no more a step
_LONGEST_SAVE = 6 * 3600  # seconds; Orbax's own 20 minutes are few for a slow disk


@dataclasses.dataclass(frozen=True)
class _Save:
    """A save that is under way."""

    step: int
    shapes: Mapping[str, jax.ShapeDtypeStruct]  # of its arrays, by path
    read: Mapping[str, int]  # the checksums of those that are read back


class Checkpoints:
    """The checkpoints of one run, of which `retention.kept_steps` are kept."""

    def __init__(self, folder: Path, *, keep_last: int = 1) -> None:
        """Opens `folder`, and makes it where it is not there.

        Raises:
          DamagedCheckpointError: when a step lacks a part.
          ValueError, OSError: naming what else stands in the way of a step.
        """
        if keep_last < 1:
            raise ValueError(f"checkpoint.keep_last={keep_last} must be >= 1")
        self.folder = folder
        self._keep_last = keep_last
        self._given_up = False
        distributed.first_process_first(partial(_open, folder))
        self._saved: dict[int, Saved] = {}  # the steps that are there
        for step in check_steps(folder):
            self._saved[step] = Saved()
            with contextlib.suppress(DamagedCheckpointError):  # said when it is read
                self._saved[step] = read_contract(folder / str(step)).saved
        self._read_one_back = False
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._links = contextlib.ExitStack()
        self._plain = self._links.enter_context(plain_path(folder))
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(
                state=ocp.PyTreeCheckpointHandler(),
                meta=ocp.JsonCheckpointHandler(),
                tokenizer=ocp.JsonCheckpointHandler(),
            ),
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_LONGEST_SAVE,
                post_finalization_callback=self._read_back,
                # Else, where one can't be made, threads wait for it: the process
                # could not end.
                create_directories_asynchronously=False,
            ),
        )

    def latest_step(self) -> int | None:
        return max(self._saved, default=None)

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
          OSError: in all processes, where there is no space for it; and as `check`.
        """
        step = int(state.step)
        self.wait()  # for the one before, which removes an older one
        metrics = finite({} if val_loss is None else {VAL_LOSS: val_loss})
        saved = Saved(metrics.get(VAL_LOSS), interim)
        known = {
            "metrics": metrics,
            "best": None if best is None else dict(best),
            "due": due,
            "interim": interim,
        }
        if step in self._saved:
            distributed.first_process_first(
                partial(_amend, self.folder / str(step), known)
            )
            self._saved[step] = saved
            self._remove_old()
            return
        tree = as_tree(state)
        self.check_space(tree)
        sums = checksums(tree)
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
            "checksums": sums,
        }
        files = {
            name: base64.b64encode(content).decode()
            for name, content in tokenizer.files().items()
        }
        # All numbers are read back at the first save of a call, which would show what
        # is wrong with this machine, disk or library. Later ones are looked at without.
        shapes = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in leaves(tree)}
        self._save = _Save(step, shapes, {} if self._read_one_back else sums)
        self._read_one_back = True
        ignored = contextlib.ExitStack()
        ignored.enter_context(complaints_ignored())
        try:
            self._saver.save(
                self._plain / str(step),
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree),
                    meta=ocp.args.JsonSave({**meta, "sha256": digest(meta)}),
                    tokenizer=ocp.args.JsonSave(files),
                ),
            )
        except Exception as error:  # Orbax and TensorStore raise what they like
            self._error = error
            self.check()
        self._thread = threading.Thread(
            target=self._finish, args=(step, saved, ignored)
        )
        self._thread.start()

    def _read_back(self) -> None:
        """Raises unless what is about to become a step is whole; in process 0 only."""
        assert self._save is not None
        step_folder = self.folder / f"{self._save.step}{_TEMPORARY}"
        contract = read_contract(step_folder)
        if contract.checksums.keys() != self._save.shapes.keys():
            raise ValueError("its contract names other arrays than were saved")
        integrity.check_saved(step_folder / "state", self._save.shapes, self._save.read)

    def _finish(self, step: int, saved: Saved, ignored: contextlib.ExitStack) -> None:
        """Waits for the end of a save, and removes the steps that are not kept then."""
        try:
            self._saver.wait_until_finished()
            self._saved[step] = saved
            self._remove_old()
            ignored.close()
        except Exception as error:  # as above
            self._error = error
            if distributed.is_first():
                with contextlib.suppress(OSError):
                    _remove_leftovers(self.folder)

    def check_space(self, tree: Any) -> None:
        """Raises OSError, in all processes, where a save of a tree has no space."""
        distributed.first_process_first(partial(_check_space, self.folder, tree))

    def _remove_old(self) -> None:
        for step in self._saved.keys() - kept_steps(self._saved, self._keep_last):
            if distributed.is_first():
                _remove(self.folder / str(step))
            del self._saved[step]

    def check(self) -> None:
        """Raises when a save has failed since the last call.

        Raises:
          OSError: naming the step and what went wrong.
        """
        error, self._error = self._error, None
        if error is not None:
            assert self._save is not None
            raise OSError(
                f"checkpoint {self.folder / str(self._save.step)} could not be saved: "
                f"{_reason(error).replace(str(self._plain), str(self.folder))}"
            ) from error

    def wait(self) -> None:
        """Returns when all that was saved is on disk. Raises as `check`."""
        if self._thread is not None:
            self._thread.join()
        self.check()

    def give_up(self) -> None:
        """Makes `close` do nothing: it would wait for a process that is gone."""
        self._given_up = True

    def close(self) -> None:
        """Waits for what is being saved. Raises as `check`."""
        if self._given_up:
            return
        try:
            self.wait()
        finally:
            self._saver.close()
            self._links.close()


def _reason(error: Exception) -> str:
    """Why a save failed, without what TensorStore says of its own source code."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(found[1])) if found else one_line(error)


def _amend(step_folder: Path, known: Mapping[str, Any]) -> None:
    """Has the first process write fields of a contract anew, whole or not at all."""
    if not distributed.is_first():
        return
    path = step_folder / "meta" / "metadata"
    meta = {**json.loads(path.read_bytes()), **known}
    meta.pop("sha256")
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({**meta, "sha256": digest(meta)}, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _open(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.is_first():
        _remove_leftovers(folder)


def _remove(step_folder: Path) -> None:
    """Takes a step away at once, so that one that is cut short is no step."""
    away = step_folder.with_name(f"{step_folder.name}{_TEMPORARY}-removed")
    step_folder.rename(away)
    shutil.rmtree(away)


def _remove_leftovers(folder: Path) -> None:
    """Removes what saves and removals that were cut short have left."""
    for path in list(folder.iterdir()):
        number, mark, _ = path.name.partition(_TEMPORARY)
        if mark and NUMBER.fullmatch(number) and not path.is_symlink():
            shutil.rmtree(path)


def _space(tree: Any) -> int:
    """The most that a save takes on disk, in bytes.

    That is its arrays, and at most 8 kB for each of them that a process writes to find
    it again, as measured with 10 to 600 arrays. Large ones take 0.93 times their bytes.
    """
    arrays = jax.tree.leaves(tree)
    found_again = 8192 * len(arrays) * jax.process_count() + 2**17
    return sum(x.nbytes for x in arrays) + found_again


def _check_space(folder: Path, tree: Any) -> None:
    """Raises OSError where there is no room for a tree beside the earlier steps.

    These are removed after it was saved, so that they count as what they take now.
    """
    size = _space(tree)
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
      ValueError, OSError: as `saved_steps`.
    """
    steps = saved_steps(folder)
    for step in steps:
        _check_parts(folder / str(step))
    return steps


def _check_parts(step_folder: Path) -> None:
    for part in _PARTS:
        if not (step_folder / part).is_dir():
            raise damaged(step_folder, f"no folder {part!r}")


def latest_contract(folder: Path) -> Contract | None:
    """That of the latest step in `folder` whose contract can be read, None for none."""
    for step in reversed(saved_steps(folder)):
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
      ValueError: when it is neither a number nor "best"; and as `check_steps`.
    """
    if isinstance(step, str) and step != BEST:
        if not re.fullmatch("[0-9]{1,18}", step):
            raise ValueError(f"step={shown(step)} is neither a number nor {BEST!r}")
        step = int(step)
    if not isinstance(step, str | None):
        step = integer("step", step)
    if step is None and (path / "meta").is_dir():
        return path
    if not path.exists():
        raise FileNotFoundError(f"no such folder: {path}")
    folder = path / "checkpoints"
    if isinstance(step, int) and (folder / str(step)).is_dir():
        _check_parts(folder / str(step))
        return folder / str(step)
    steps = check_steps(folder)
    if not steps:
        raise FileNotFoundError(f"no checkpoint in {folder}")
    if isinstance(step, int):
        raise FileNotFoundError(f"no checkpoint of step {step} in {folder}: {steps}")
    if step == BEST:
        step = best_step({s: read_contract(folder / str(s)).saved for s in steps})
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {folder} has a validation loss")
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
      ValueError, OSError: naming what stands in the place of a step.
    """
    aside = folder.parent / "damaged"
    distributed.first_process_first(partial(_set_incomplete_aside, folder, aside))
    for step in reversed(saved_steps(folder)):
        step_folder = folder / str(step)
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
        distributed.first_process_first(partial(_set_aside, step_folder, aside, error))
    if aside.is_dir() and any(aside.iterdir()):
        whole = [
            p.name for p in sorted(aside.iterdir()) if lacks_its_index(p / "state")
        ]
        advice = (
            f"move {', '.join(whole)} back, which can be read now"
            if whole
            else "remove that to begin anew, or choose another workdir"
        )
        raise DamagedCheckpointError(
            f"no sound checkpoint is left in {folder}, damaged ones are in {aside}: "
            f"{advice}"
        )
    return None


def _set_incomplete_aside(folder: Path, aside: Path) -> None:
    """Sets aside all steps that lack a part, older ones too."""
    for step in saved_steps(folder):
        try:
            _check_parts(folder / str(step))
        except DamagedCheckpointError as e:
            _set_aside(folder / str(step), aside, e)


def _set_aside(step_folder: Path, aside: Path, error: Exception | None) -> None:
    if not step_folder.exists():  # another process did it
        return
    aside.mkdir(exist_ok=True)
    to = aside / step_folder.name
    while os.path.lexists(to):
        to = to.with_name(to.name + "+")
    step_folder.rename(to)
    why = error or damaged(step_folder, _ELSEWHERE)
    text = one_line(f"note: {why}; it is now {to}", 2 * MESSAGE)  # it has two paths
    print(text, file=sys.stderr, flush=True)


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
    args = ocp.args.PyTreeRestore(
        item=abstract, restore_args=restore_args, partial_restore=True
    )
    tree, error = None, None
    distributed.first_process_first(partial(_join, step_folder))
    try:
        sums = read_contract(step_folder).checksums
        tree = _restore(step_folder, args)
    except DamagedCheckpointError as e:
        error = e
    if not distributed.all_agree(error is None):
        raise error or damaged(step_folder, _ELSEWHERE)
    _check_sums(step_folder, sums, tree)
    return tree


def restore_params(step_folder: Path, contract: Contract, abstract: Params) -> Params:
    """The parameters to generate with: the averaged ones where the run kept some.

    Raises as `restore`.
    """
    if not contract.run.get("optim", {}).get("ema_decay"):
        return restore(step_folder, {"params": abstract})["params"]
    distributed.first_process_first(partial(_join, step_folder))
    wanted = dict(leaves(abstract))

    def of_average(path: Any, _: Any) -> Any:
        _, is_average, name = name_of(path).rpartition("/ema/")
        return wanted[name] if is_average else ocp.PLACEHOLDER

    item = jax.tree_util.tree_map_with_path(of_average, _saved_tree(step_folder))
    restore_args = jax.tree.map(_restore_args, item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args)
    restored = leaves(_restore(step_folder, args))
    found = {name: x for name, x in restored if x is not ocp.PLACEHOLDER}
    _check_sums(step_folder, contract.checksums, found)
    by_name = {name.rpartition("/ema/")[2]: x for name, x in found.items()}
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_name[name_of(path)], abstract
    )


def _join(step_folder: Path) -> None:
    """Mends a step whose arrays are all there, but not the index that finds them.

    Raises:
      OSError: when nothing can be written there.
    """
    state = step_folder / "state"
    if not lacks_its_index(state):
        return
    if not os.access(state, os.W_OK):
        raise OSError(
            f"{state} lacks its index, and none can be written there: copy the "
            "checkpoint to a place that is yours"
        )
    with contextlib.suppress(ValueError):  # then it can't be read either, which is said
        integrity.join(state)


def _restore_args(x: Any) -> ocp.RestoreArgs:
    if x is ocp.PLACEHOLDER:
        return ocp.RestoreArgs()
    return ocp.ArrayRestoreArgs(
        sharding=x.sharding, global_shape=x.shape, dtype=x.dtype
    )


def _check_sums(step_folder: Path, said: Mapping[str, int], tree: Any) -> None:
    for name, value in checksums(tree).items():
        if said.get(name) != value:
            raise damaged(step_folder, f"array {name} fails its checksum")


def _saved_tree(step_folder: Path) -> dict[str, Any]:
    """What a step holds as a tree, with what is known of an array in its place."""
    with _reading(step_folder) as state:
        return dict(ocp.PyTreeCheckpointHandler().metadata(state).tree)


def _restore(step_folder: Path, args: ocp.args.PyTreeRestore) -> Any:
    # Not waiting for other processes, which may have met with damage.
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"read-{me}"
    )
    handler = ocp.PyTreeCheckpointHandler()
    with (
        _reading(step_folder) as state,
        ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer,
    ):
        return checkpointer.restore(state, args=args)


@contextlib.contextmanager
def _reading(step_folder: Path) -> Iterator[Path]:
    """The folder of a step's arrays, for Orbax to read from while entered.

    Raises:
      DamagedCheckpointError: for whatever Orbax raises, and on files of such kinds that
        it would wait for ever.
      PermissionError: when a file may not be read.
    """
    state = step_folder / "state"
    with complaints_ignored(), plain_path(state) as plain:
        try:
            _check_files(state)
            yield plain
        except PermissionError:
            raise
        except Exception as e:  # Orbax raises bare Exceptions on damaged files
            why = str(e.__cause__ or e).replace(str(plain), str(state))
            raise damaged(step_folder, f"state: {why}") from e


def _check_files(folder: Path) -> None:
    for path in folder.rglob("*"):
        if not path.is_dir():
            check_regular(path)
        if not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
