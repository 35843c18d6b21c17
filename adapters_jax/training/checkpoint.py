"""Checkpoints that survive a kill at any instant, a full disk and damaged files.

The one module that knows Orbax. Orbax copies the state, writes it in the background under a
temporary name, and renames it when all is there. What it lacks is a way to tell a sound checkpoint
from one whose files were damaged later: `manifest` has that.
"""

import contextlib
import dataclasses
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils.epath import gpath
from jax.experimental import multihost_utils

from adapters_jax import files
from adapters_jax.config import defaults_of, is_place
from adapters_jax.training import manifest
from adapters_jax.training.manifest import Manifest

LATEST = 2


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint as read back."""

    step: int
    state: Any
    progress: dict[str, Any]


class Checkpoints:
    """The checkpoints of one run: its latest two, and the best.

    `identity` is a JSON-able dict that a run must agree with to continue a checkpoint. The caller
    holds `files.lock` on the run's directory: what another process is writing looks half-written.
    Every process of a run calls every method, in the same order.

    Raises:
        ValueError: a directory with a backslash in its path.
    """

    def __init__(self, directory: Path | str, identity: Mapping[str, Any]) -> None:
        self.directory = Path(directory).resolve()
        if '\\' in str(self.directory):  # TensorStore would write to another one
            raise ValueError(
                f'{self.directory} has a backslash in its path, which the library that writes '
                'checkpoints takes for a slash: choose a directory without one'
            )
        self._identity = manifest.as_json(identity)
        self._manager: ocp.CheckpointManager | None = None
        self._manifests: dict[int, Manifest] = {}
        self._under_way = 0

    def __enter__(self) -> 'Checkpoints':
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        data_iterator: Any,
        progress: Mapping[str, Any],
        metric: float | None = None,
    ) -> None:
        """Start to save a step; return as soon as `state` is copied and may be donated.

        Args:
            step: number of steps taken; one that is saved already is not saved again.
            state: a pytree of jax arrays.
            data_iterator: a grain iterator, or anything with get_state and set_state; or None. Its
                state must be the same on every process.
            progress: what else the loop must remember, as JSON.
            metric: larger is better, NaN is none; of equal ones the earlier is the best.

        Raises:
            files.DiskError: this checkpoint, or the one before it, could not be written; the
                earlier ones are untouched.
        """
        manager = self._open()
        self.wait()
        there = manager.all_steps()
        if step in there:
            return
        for gone in self._manifests.keys() - there:
            del self._manifests[gone]
        self._under_way = step
        self._manifests[step] = {
            'identity': self._identity,
            'progress': manifest.as_json(progress),
            'metric': manifest.as_json(metric),
            'arrays': _describe(state),
            'position': None if data_iterator is None else _position(data_iterator),
        }
        with self._explained():
            args = ocp.args.Composite(state=ocp.args.StandardSave(state))
            manager.save(step, args=args, force=True)

    def restore(self, abstract_state: Any, data_iterator: Any) -> Restored | None:
        """Return the newest sound checkpoint, and set the iterator to its position.

        Damaged ones are set aside with a warning. Arrays come back bit for bit, in the shardings
        of `abstract_state`, a pytree of jax.ShapeDtypeStruct. None where there is no checkpoint.

        Raises:
            ValueError: the checkpoint belongs to another backbone, config or model.
        """
        return self._restore(max, abstract_state, data_iterator)

    def restore_best(self, abstract_state: Any) -> Restored | None:
        """Return the sound checkpoint with the largest metric; None where none has a metric.

        Raises:
            ValueError: the checkpoint belongs to another backbone, config or model.
        """
        return self._restore(manifest.best, abstract_state, None)

    def wait(self) -> None:
        """Wait until the checkpoint under way is on the disk.

        Raises:
            files.DiskError: it could not be written.
        """
        if self._manager is not None:
            with self._explained():
                self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and release what Orbax holds. Raises as `wait` does."""
        manager, self._manager = self._manager, None
        if manager is not None:
            with self._explained():
                manager.close()
            logging.getLogger('absl').removeFilter(_is_news)

    def _restore(
        self, choose: Callable[[dict[int, Manifest]], int | None], abstract_state: Any, data: Any
    ) -> Restored | None:
        self.close()
        if not self.directory.is_dir():
            return None
        manager = self._open()
        step = choose(self._manifests) if self._manifests else None
        if step is None:
            return None
        found, where = self._manifests[step], self.directory / str(step)
        _check_identity(where, found['identity'], self._identity)
        _check_arrays(where, found['arrays'], _describe(abstract_state))
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        restored = manager.restore(step, args=args)
        if data is not None:
            _move(data, found['position'], where)
        return Restored(step, restored['state'], found['progress'])

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            logging.getLogger('absl').addFilter(_is_news)
            with self._explained():
                self._manifests = _sound(self.directory)
                place = _Literal(self.directory)
                self._manager = ocp.CheckpointManager(place, options=self._options())
        return self._manager

    def _options(self) -> ocp.CheckpointManagerOptions:
        return ocp.CheckpointManagerOptions(
            preservation_policy=_LatestAndBest(self._manifests),
            cleanup_tmp_directories=True,
            # Made before `save` returns: one that cannot be made is an error there and then.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False,
                post_finalization_callback=self._seal,
            ),
        )

    def _seal(self) -> None:
        """Write the manifest; Orbax calls this when all else is written, before it renames."""
        for directory in self.directory.glob(f'{self._under_way}.*'):
            manifest.wait_for_metadata(directory)
            manifest.write(directory, self._manifests[self._under_way])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with files.explained(self.directory):
                yield
        except ValueError as error:  # TensorStore's way to report what the system refused
            code = re.search(r"os_error_code='(\d+)'", str(error))
            if code is None:
                raise
            raise files.refusal(int(code[1]), self.directory) from error


class _Literal(gpath.PosixGPath):
    """A path for Orbax, all of whose letters stand for themselves.

    The library's own `glob` takes the path for a part of the pattern: in `runs/lora[r=8]` it finds
    nothing, so that the arrays would be missing from a checkpoint that looks whole.
    """

    def glob(self, pattern: str) -> Iterator['_Literal']:
        """Yield what in this directory matches."""
        return iter([self._new(path) for path in Path(self).glob(pattern)])


class _LatestAndBest:
    """What Orbax asks, when it has written a checkpoint, which of them to keep."""

    def __init__(self, manifests: Mapping[int, Manifest]) -> None:
        self._manifests = manifests

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell for each checkpoint, in order of steps, whether to keep it."""
        del context
        steps = [info.step for info in checkpoints]
        best = manifest.best({step: self._manifests[step] for step in steps})
        return [step in steps[-LATEST:] or step == best for step in steps]


def _position(iterator: Any) -> dict[str, Any]:
    """Return an iterator's state as JSON."""
    state = iterator.get_state()
    raw = isinstance(state, bytes)
    return {'bytes': raw, 'state': state.decode() if raw else manifest.as_json(state)}


def _move(iterator: Any, position: Mapping[str, Any] | None, where: Path) -> None:
    """Move an iterator to a position that `_position` returned.

    Raises:
        ValueError: the checkpoint was saved without one.
    """
    if position is None:
        raise ValueError(
            f'{where} holds no position in the data; it was saved by something other than a run '
            'over this data: use another workdir'
        )
    state = position['state']
    iterator.set_state(state.encode() if position['bytes'] else state)


def _sound(directory: Path) -> dict[int, Manifest]:
    """Return the manifests of the sound checkpoints; Orbax sees no other one then."""
    if jax.process_index() == 0:
        manifest.set_damaged_aside(directory)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'{directory}: checkpoints inspected')
    return manifest.read_all(directory)


def _describe(state: Any) -> dict[str, list[Any]]:
    """Return the dtype and shape of each leaf by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    named = ((jax.tree_util.keystr(p, simple=True, separator='/'), x) for p, x in leaves)
    return {name: [str(x.dtype), list(x.shape)] for name, x in named}


def _check_identity(where: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    here, there = _flatten(wanted), _flatten(saved)
    there = {key: value for key, value in _late(wanted).items() if key in here} | there
    differing = _differences(there, here)
    if not all(is_place(key) for key in there | here if there.get(key) != here.get(key)):
        raise ValueError(
            f'{where} belongs to another run: {differing}; continue with the settings it was '
            'made with, or use another workdir'
        )


def _late(wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return what older checkpoints lack: a digest, and keys whose default is what was done then.

    A population's have the keys of each member, too.
    """
    members = wanted.get('members', {})
    return _flatten(
        {
            'backbone_architecture': wanted.get('backbone_architecture'),
            'config': defaults_of(wanted.get('config', ())),
            'members': {name: defaults_of(own) for name, own in members.items()},
        }
    )


def _check_arrays(where: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differing = _differences(saved, wanted)
    if differing:
        raise ValueError(
            f'{where} holds the state of another model or optimizer: {differing}; continue with '
            'the code and settings it was made with, or use another workdir'
        )


def _differences(saved: Mapping[str, Any], wanted: Mapping[str, Any], most: int = 5) -> str:
    keys = [key for key in sorted(saved | wanted) if saved.get(key) != wanted.get(key)]
    listed = [f'{k} is {saved.get(k)!r} there and {wanted.get(k)!r} here' for k in keys[:most]]
    more = [f'and {len(keys) - most} more'] if len(keys) > most else []
    return ', '.join(listed + more)


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, Mapping) and value
        flat |= _flatten(value, f'{prefix}{key}.') if nested else {f'{prefix}{key}': value}
    return flat


def _is_news(record: logging.LogRecord) -> bool:
    """Pass by Orbax's running commentary, and tracebacks of errors that are raised besides."""
    passing = record.levelno >= logging.WARNING and not record.exc_info
    return passing or 'orbax' not in record.pathname
