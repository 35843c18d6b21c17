"""Batches as a stream: assembled ahead by grain's threads, at a position that can be saved.

Since a batch is a pure function of its number (`batches.py`), the state of the stream is that
number. It says nothing of processes, threads or prefetched batches, and restoring it repeats every
later batch bit by bit, on any number of processes.
"""

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain

from adapters_jax.data.batches import Batch, Plan, assemble, plan_epoch
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.mixing import Mixer, Mixing
from adapters_jax.data.policies import Packed, Policy
from adapters_jax.data.stored import check_mapped

PATIENCE = 600.0  # seconds that a batch may take; it takes milliseconds


class Position(NamedTuple):
    """Where a batch stands: its epoch and its number in that epoch, both from 0."""

    epoch: int
    index: int


class WorkerError(RuntimeError):
    """A thread that assembles batches failed."""


class HungWorkerError(WorkerError):
    """It does not come to an end, so the process will not either, unless it is ended (os._exit)."""


class Stream(grain.DatasetIterator):
    """An iterator over batches that tells of a worker that fails or hangs."""

    def __next__(self) -> Any:
        """The next batch.

        Raises:
            WorkerError: a worker failed, with the error that is its cause.
            HungWorkerError: it took longer than PATIENCE.
        """
        with _patience(PATIENCE):
            try:
                return next(self._parent)
            except (StopIteration, WorkerError):
                raise
            except Exception as error:
                what = f'{type(error).__name__}: {error}'
                raise WorkerError(f'a data worker failed ({what}); {_REMEDY}') from error

    def get_state(self) -> Any:
        """The position, as JSON values."""
        return self._parent.get_state()

    def set_state(self, state: Any) -> None:
        """Go on from a position."""
        self._parent.set_state(state)


_REMEDY = 'the same command goes on from the last checkpoint'


@contextlib.contextmanager
def _patience(seconds: float) -> Iterator[None]:
    """End a block with a HungWorkerError where it takes longer; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def give_up(*_: Any) -> None:
        raise HungWorkerError(f'no data worker made a batch in {seconds:g} s; {_REMEDY}')

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Batches:
    """Batches to be iterated over as often as needed."""

    def __init__(self, batches: grain.IterDataset) -> None:
        self._batches = batches

    def __iter__(self) -> Stream:
        return Stream(iter(self._batches))


def train_batches(
    encoded: Encoded,
    policy: Policy,
    seed: int,
    pad_id: int,
    *,
    mixing: Mixing | None = None,
    rows: tuple[int, int] | None = None,
    transform: Callable[[Batch, int], Batch] | None = None,
    threads: int = 2,
    prefetch: int = 8,
) -> Stream:
    """An endless iterator over (Position, batch): epoch after epoch, each in its own order.

    mixing: how the tasks of `encoded` (its example column `task`) share the batches; None where all
    examples are of one task, which each epoch then has once.
    get_state and set_state save and restore the position; the state is the same on every process.
    rows: which of the rows of every batch this process has, from, to before; all by default.
    transform: what is done to a batch last, a function of it and the number of its epoch. threads
    assemble up to `prefetch` batches ahead.
    """
    plans = Plans(encoded, policy, seed, mixing)
    batches = len(plans(0))

    def make(number: int, _: int) -> tuple[Position, Batch]:
        epoch, index = divmod(number, batches)
        check_mapped([*encoded.tokens.values(), *encoded.examples.values()])
        batch = assemble(encoded, plans(epoch), index, pad_id, rows)
        return Position(epoch, index), batch if transform is None else transform(batch, epoch)

    # `repeat` numbers on through the epochs, so the number alone gives epoch and place.
    numbers = grain.MapDataset.source(range(batches)).repeat().map_with_index(make)
    return Stream(iter(numbers.to_iter_dataset(_read_options(threads, prefetch))))


def eval_batches(
    encoded: Encoded,
    policy: Policy,
    pad_id: int,
    *,
    rows: tuple[int, int] | None = None,
    transform: Callable[[Batch], Batch] | None = None,
    threads: int = 2,
    prefetch: int = 8,
) -> Batches:
    """Every example once, in an order that is always the same; to be iterated as often as needed.

    Yields batches only: example_id says which examples they hold, example_mask which slots are
    empty. All processes get the same number of batches, and of each their own `rows`; `transform`
    is what is done to a batch last.
    """
    plan = plan_epoch(encoded.lengths, policy, seed=0, epoch=0, shuffle=False)
    numbers = grain.MapDataset.source(range(len(plan)))

    def make(index: int) -> Batch:
        check_mapped([*encoded.tokens.values(), *encoded.examples.values()])
        batch = assemble(encoded, plan, index, pad_id, rows)
        return batch if transform is None else transform(batch)

    return Batches(numbers.map(make).to_iter_dataset(_read_options(threads, prefetch)))


class Plans:
    """The plans of the epochs, each made once though several threads ask for it."""

    def __init__(self, encoded: Encoded, policy: Policy, seed: int, mixing: Mixing | None = None):
        plan = functools.partial(plan_epoch, encoded.lengths, policy, seed, shuffle=True)
        if mixing is not None:
            plan = Mixer(encoded.lengths, encoded.examples['task'], policy, seed, mixing)
        self._lock = threading.Lock()
        # Two, because batches ahead may belong to the next epoch.
        self._plan = functools.lru_cache(maxsize=2)(plan)

    def __call__(self, epoch: int) -> Plan:
        """The plan of an epoch, from 0."""
        with self._lock:
            return self._plan(epoch)


def _read_options(threads: int, prefetch: int) -> grain.ReadOptions:
    return grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)


def rows_of(policy: Policy) -> int:
    """How many rows a batch has."""
    return policy.rows if isinstance(policy, Packed) else policy.batch_size
