"""What the trunk computes, kept on disk, so that a run may begin where the first adapter acts.

Below the first adapted place nothing is trained and there is no dropout, so the vectors of a token
there depend on its text alone: not on the batch it comes in, not on the epoch, not on the adapter.
They are one more token column of a split (`data/encoded.py`), mapped from a file (`data/stored.py`)
that every later epoch, run and member with the same trunk over the same texts reads.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int64

from adapters_jax import files, processes, tasks, xla
from adapters_jax.config import Config
from adapters_jax.data import pipeline, policies
from adapters_jax.data.batches import Batch
from adapters_jax.data.encoded import PART, Encoded
from adapters_jax.data.stored import Stored, check_room, readable
from adapters_jax.model import Model
from adapters_jax.params import Tree, partition
from adapters_jax.sharding import own_rows, put_batch, row_parts, to_host
from adapters_jax.sites import Place
from adapters_jax.training import cutting
from adapters_jax.training.dtypes import DTYPES, choose_frozen_dtype
from adapters_jax.training.experiment import Experiment, check_trained
from adapters_jax.training.placement import Placement
from adapters_jax.wheels import cache_directory

COLUMN = 'trunk'
FORMAT = 1  # raised whenever the same trunk would be stored as other numbers
TEXT = ('input_ids', 'token_type_ids')  # the token columns that a trunk reads
READ = (*TEXT, 'positions', 'segments', 'starts')  # and what of a batch it needs

_LOG = logging.getLogger(__name__)
_NUMBER = 'number'  # a token column that is only there while the trunk is computed
_IN_FLIGHT = 2  # batches that the device works on while the host stores the one before

Outputs = Callable[[Batch], Float[Array, 'B T N D']]


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What decides the vectors of a token, beside the text: all of it is in the file's name.

    `vectors` (N) of `width` (D) numbers are kept for each token. `computed` says in which number
    formats weights and activations are, `dtype` in which one the vectors are kept.
    """

    backbone: str  # names of its weights and of what is computed with them
    place: Place
    vectors: int
    width: int
    computed: str
    dtype: str

    def stored(self, encoded: Encoded, cache: Path) -> Stored:
        """Return where and as what the vectors of a split's tokens are kept."""
        of = {
            'format': FORMAT,
            'backbone': self.backbone,
            'layer': self.place.layer,
            'stage': self.place.stage,
            'vectors': self.vectors,
            'width': self.width,
            'computed': self.computed,
            'dtype': self.dtype,
            'text': encoded.fingerprint([*TEXT, *({PART} & encoded.tokens.keys())]),
        }
        name = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:32]
        shape = (int(encoded.offsets[-1]), self.vectors, self.width)
        return Stored(cache / name, shape, np.dtype(DTYPES[self.dtype]), of)


def check(config: Config) -> None:
    """Refuse settings under which nothing can be kept, before data is read.

    Raises:
        ValueError: naming the key, its value and what was expected.
    """
    kind = config.training.trunk_cache
    if kind not in ('none', *DTYPES):
        raise ValueError(
            f'training.trunk_cache is {kind!r}; expected one of none, {", ".join(DTYPES)}'
        )
    if kind == 'none':
        return
    if tasks.kind(config.task.name).reads != 'input_ids':
        raise ValueError(
            f'training.trunk_cache is {kind!r}, but what is kept there belongs to the tokens of '
            f"texts, which {config.task.name} has none of; set it to 'none'"
        )
    if config.data.cache_dir == 'none':
        raise ValueError(
            f"training.trunk_cache is {kind!r}, but data.cache_dir is 'none', so there is nowhere "
            "to keep it; name a directory, or set training.trunk_cache='none'"
        )
    if config.training.adapter_drop != 'none':
        raise ValueError(
            f'training.trunk_cache is {kind!r} and training.adapter_drop is '
            f'{config.training.adapter_drop!r}, with which the trunk ends elsewhere in each step; '
            "set one of them to 'none'"
        )


def attach(experiment: Experiment, mesh: Mesh) -> Experiment:
    """Return the experiment with its training and validation splits as a run is to read them.

    Where `training.trunk_cache` asks for it, they have the column 'trunk', with which `Model.apply`
    begins at the trunk's end; what is not on the disk yet is computed now, once the size of it has
    been said and found to fit.

    Raises:
        ValueError: see `check`.
        DiskError: the vectors do not fit on the disk, or the directory may not be written to.
    """
    config, model = experiment.config, experiment.model
    check(config)
    if config.training.trunk_cache == 'none':
        return experiment
    if experiment.task.draws:
        raise ValueError(
            f'training.trunk_cache is {config.training.trunk_cache!r}, but masked_lm hides other '
            "words in each epoch, so nothing could be kept; set it to 'none'"
        )
    shapes = jax.eval_shape(experiment.init_params)
    check_trained(partition(shapes, model.rules)[0], config)
    if model.trunk(shapes).layer == 0:
        _LOG.info('The lowest layer is adapted, so there is no trunk whose outputs could be kept.')
        return experiment
    trunk = describe(experiment, shapes)
    cache = Path(config.data.cache_dir or cache_directory()).expanduser() / 'trunk'
    names = ['train', *experiment.validation_splits]
    stored = {name: trunk.stored(experiment.splits[name], cache) for name in names}
    columns = {name: array.read() for name, array in stored.items()}
    absent = set().union(*processes.gather([n for n in names if columns[n] is None]))
    missing = {name: stored[name] for name in names if name in absent}
    announce(trunk, missing, cache)
    if missing:
        if processes.is_writer():
            files.make_directory(cache)
        processes.check_shared(cache, 'give a data.cache_dir on a disk that all processes share')
        columns |= _make(experiment, missing, trunk.dtype, mesh)
    read = {name: with_column(experiment.splits[name], columns[name]) for name in names}
    return dataclasses.replace(experiment, splits={**experiment.splits, **read})


def _make(
    experiment: Experiment, missing: Mapping[str, Stored], dtype: str, mesh: Mesh
) -> dict[str, np.ndarray]:
    """Return the columns of these splits, computed and stored."""
    config, model = experiment.config, experiment.model
    weights = choose_frozen_dtype(config)
    params = Placement.of(config, mesh).frozen(experiment.init_params(), weights)
    outputs = jit_outputs(model, params, dtype, mesh)
    columns = {}
    for name, stored in missing.items():
        encoded = experiment.splits[name]
        policy = layout(config, encoded, row_parts(mesh))
        columns[name] = compute(stored, outputs, encoded, policy, model.config.pad_id)
    return columns


def describe(experiment: Experiment, shapes: Tree) -> Trunk:
    """Return the trunk of an experiment's model, as its config wants it kept.

    `shapes` are those of all parameters.
    """
    training, model = experiment.config.training, experiment.model
    row = dict.fromkeys(READ, np.ones((1, 8), np.int32)) | {'starts': np.zeros((1, 1), np.int32)}
    shape = jax.eval_shape(model.trunk_outputs, shapes, row).shape
    # Of numbers that were computed in 16 bits, 32 bits would keep 16 zeros.
    formats = (training.trunk_cache, training.dtype)
    return Trunk(
        backbone=f'{experiment.backbone.fingerprint} {experiment.backbone.architecture}',
        place=model.trunk(shapes),
        vectors=shape[2],
        width=shape[3],
        computed=f'{training.frozen_dtype} weights, {training.dtype} activations',
        dtype='bfloat16' if 'bfloat16' in formats else 'float32',
    )


def announce(trunk: Trunk, missing: Mapping[str, Stored], cache: Path) -> None:
    """Say what will be computed and written, and how large it is.

    Raises:
        DiskError: it does not fit on the disk.
    """
    where = f"the trunk's end (layer {trunk.place.layer}, {trunk.place.stage})"
    if not missing:
        _LOG.info('Everything up to %s is read from %s.', where, cache)
        return
    arrays = {stored.directory: stored for stored in missing.values()}  # same texts, same file
    needed = sum(stored.nbytes for stored in arrays.values())
    smaller = "training.trunk_cache='bfloat16', " if trunk.dtype == 'float32' else ''
    check_room(
        cache,
        needed,
        'the trunk cache',
        f"free some space, or set {smaller}another data.cache_dir, or training.trunk_cache='none'",
    )
    _LOG.info(
        'Everything up to %s is computed once and kept: %s in %s (%s tokens of %s x %d x %d, %s).',
        *(where, readable(needed), cache),
        *(f'{sum(stored.shape[0] for stored in arrays.values()):,}', ' and '.join(missing)),
        *(trunk.vectors, trunk.width, trunk.dtype),
    )


def jit_outputs(model: Model, params: Tree, dtype: str, mesh: Mesh) -> Outputs:
    """Compile the trunk; the parameters are an argument, never a part of the program."""

    @functools.partial(jax.jit, compiler_options=xla.options(params))
    def run(params: Tree, batch: Mapping[str, Array]) -> Float[Array, 'B T N D']:
        found = cutting.forward(lambda rows: model.trunk_outputs(params, rows), model, batch)
        return found.astype(DTYPES[dtype])

    def outputs(batch: Batch) -> Float[Array, 'B T N D']:
        first, last = own_rows(mesh, len(batch['input_ids']))
        return run(params, put_batch({name: batch[name][first:last] for name in READ}, mesh))

    return outputs


def layout(config: Config, encoded: Encoded, devices: int) -> policies.Policy:
    """Return how a split is laid out to compute its trunk: packed, whatever the run does.

    Below the first adapted place every method is packable, and one shape is compiled.
    """
    size = 4 * config.training.batch_size  # no activations are kept
    # One of several tasks may have a longest length of its own.
    longest = max(config.data.max_length, int(encoded.lengths.max(initial=1)))
    return policies.choose_packing(encoded.lengths, size, longest, rows_multiple=devices)


def compute(
    stored: Stored, outputs: Outputs, encoded: Encoded, policy: policies.Policy, pad_id: int
) -> Float[np.ndarray, 'L N D']:
    """Return the vectors of all L tokens of a split, computed and stored unless they are there.

    Raises:
        DiskError: the disk is full, or the directory may not be written to.
        RuntimeError: not every token was computed once.
        ValueError: the processes of this run do not share the directory.
    """
    started = time.monotonic()
    if not processes.is_writer():
        if processes.gather(None)[0]:
            collections.deque(_computed(outputs, encoded, policy, pad_id), maxlen=0)
        return _read_by_all(stored)
    begun = False

    def fill(array: np.ndarray) -> None:
        nonlocal begun
        begun, _ = True, processes.gather(True)
        written = 0
        for index, vectors in _computed(outputs, encoded, policy, pad_id):
            array[index] = vectors
            written += len(index)
        if written != len(array):
            raise RuntimeError(f'{written} of {len(array)} tokens were computed')
        _LOG.info('%s computed in %.1f s.', readable(stored.nbytes), time.monotonic() - started)

    stored.make(fill)
    if not begun:  # another run has made it meanwhile
        processes.gather(False)
    return _read_by_all(stored)


def _read_by_all(stored: Stored) -> np.ndarray:
    """Return the array that the writer has stored.

    Raises:
        ValueError: a process does not see it.
    """
    processes.barrier()
    with processes.together():
        found = stored.read()
        if found is None:
            raise ValueError(
                f'{stored.directory} is not there for process {jax.process_index()}; give a '
                'data.cache_dir on a disk that all processes share'
            )
    return found


def with_column(encoded: Encoded, column: Float[np.ndarray, 'L N D']) -> Encoded:
    """Return the split with the trunk's outputs; its fingerprint stays what it is."""
    return dataclasses.replace(encoded, tokens=encoded.tokens | {COLUMN: column})


def _computed(
    outputs: Outputs, encoded: Encoded, policy: policies.Policy, pad_id: int
) -> Iterator[tuple[Int64[np.ndarray, ' M'], Float[np.ndarray, 'M N D']]]:
    """Yield the tokens of each batch by their numbers in the split, with their vectors."""
    waiting: collections.deque[tuple[Batch, Any]] = collections.deque()

    def finished() -> tuple[np.ndarray, np.ndarray]:
        batch, result = waiting.popleft()
        real = batch['segments'] > 0
        return batch[_NUMBER][real], np.asarray(to_host(result))[real]

    numbers = {_NUMBER: np.arange(encoded.offsets[-1])}
    numbered = dataclasses.replace(encoded, tokens=encoded.tokens | numbers)
    for batch in pipeline.eval_batches(numbered, policy, pad_id):
        waiting.append((batch, outputs(batch)))
        if len(waiting) > _IN_FLIGHT:
            yield finished()
    while waiting:
        yield finished()
