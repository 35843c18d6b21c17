"""A search's memory: Optuna's study in an SQLite file, and who proposes the next trial.

What is proposed is a function of the seed, the trial's number and the trials on record: each has a
sampler of its own, over a copy of the study in memory. A trial is written whole, and ended whole,
so a process that is killed leaves trials to go on with and nothing half-said.
"""

import contextlib
import dataclasses
import errno
import sqlite3
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
import sqlalchemy.exc
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from adapters_jax import files, processes
from adapters_jax.training import ranking
from adapters_jax.tuning.pruning import TOTAL_STEPS

SAMPLERS = ('tpe', 'random')
FINISHED = 'finished'  # the attribute of a trial that says in words how it ended
_LAST = 'last_of_batch'  # and that which numbers the last trial that was proposed with it
_NAME = 'sweep'
_DRAWS = 32  # of a trial's values, before those of another trial are taken again


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a trial ended: its score (None: it has none), its evaluations, and the words for it.

    `total_steps` is how many it was to take; 0 where nobody knows.
    """

    score: float | None
    scores: Sequence[tuple[int, float]]
    finished: str
    total_steps: int = 0

    @property
    def state(self) -> TrialState:
        """What Optuna calls it.

        One that diverged counts as pruned where it was, and one without a score as pruned before
        its first evaluation, the worst that can be: a sampler would forget a failed one, and
        propose its like again.
        """
        whole = self.score is not None and ranking.ended_whole(self.finished)
        return TrialState.COMPLETE if whole else TrialState.PRUNED


class Study:
    """The trials of a search, in the order in which they were proposed.

    Every process of a run has one and calls its methods in the same order; the first one alone
    writes the file. Use it as a context manager.
    """

    def __init__(
        self,
        path: Path,
        distributions: Mapping[str, BaseDistribution],
        sampler: str,
        seed: int,
        higher_is_better: bool,
    ) -> None:
        """Open the study at `path`, or begin it.

        Raises:
            ValueError: a sampler that there is not, or a file that holds no study.
            files.DiskError: the disk is full, or the file may not be written to.
        """
        check_sampler(sampler, seed)
        self._path, self._distributions = path, dict(distributions)
        self._sampler, self._seed = sampler, seed
        self.higher_is_better = higher_is_better
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # each new study is no news
        self._storage: RDBStorage | None = None
        with processes.together(), self._explained():
            if processes.is_writer():
                self._open()
        with processes.together(), self._explained():
            self.trials = self._stored.get_trials() if processes.is_writer() else self._read()

    def _open(self) -> None:
        self._storage = RDBStorage(_url(str(self._path)))
        options = {'storage': self._storage, 'direction': _direction(self.higher_is_better)}
        self._stored = optuna.create_study(study_name=_NAME, load_if_exists=True, **options)
        self._id = self._storage.get_study_id_from_name(_NAME)

    def _read(self) -> list[FrozenTrial]:
        """Read what the first process has opened, before it writes anything more."""
        file = f'file:{urllib.parse.quote(str(self._path))}'
        storage = RDBStorage(_url(file, mode='ro', uri='true'), skip_table_creation=True)
        try:
            return optuna.load_study(study_name=_NAME, storage=storage).get_trials()
        finally:
            _close(storage)

    def __enter__(self) -> 'Study':
        return self

    def __exit__(self, *_: Any) -> None:
        if self._storage is not None:
            _close(self._storage)

    @property
    def ended(self) -> list[FrozenTrial]:
        """The trials that have ended."""
        return [trial for trial in self.trials if trial.state.is_finished()]

    def batches(self, size: int, trials: int) -> Iterator[range]:
        """Propose trials, `size` at a time, until there are so many; yield each batch's numbers.

        Batches that are on record stay as they are: more trials than were asked for once come in
        batches of their own.
        """
        # Of an earlier version's trials it is not on record how many were proposed together.
        unsaid = sum(_LAST not in trial.user_attrs for trial in self.trials)
        first = 0
        while first < trials:
            last = min(first + size, unsaid if first < unsaid else trials) - 1
            if first < len(self.trials):
                last = self.trials[first].user_attrs.get(_LAST, last)
            while len(self.trials) <= last:
                self.ask(last)
            yield range(first, last + 1)
            first = last + 1

    def ask(self, last: int | None = None) -> FrozenTrial:
        """Propose the next trial, and put it on record as running.

        `last` is the number of the last one that is proposed with it; its own unless given.
        """
        last = len(self.trials) if last is None else last
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=self._draw(),
            distributions=self._distributions,
            user_attrs={_LAST: last},
        )
        with processes.together(), self._explained():
            if processes.is_writer():
                self._stored.add_trial(trial)
        self._note(trial, len(self.trials))
        return trial

    def _draw(self) -> dict[str, Any]:
        """Return values that no trial has, unless none are found: the same run ends the same."""
        memory = self._in_memory(_make_sampler(self._sampler, self._seed, len(self.trials)))
        known = [trial.params for trial in self.trials]
        for _ in range(_DRAWS):
            params = memory.ask(self._distributions).params
            if params not in known:
                break
        return params

    def tell(self, number: int, outcome: Outcome) -> None:
        """Put on record how a trial ended; one that is on record already stays as it is."""
        before = self.trials[number]
        if before.state.is_finished():
            return
        # For a pruned trial Optuna's own `tell` takes the last score; the best one is ours.
        trial = optuna.trial.create_trial(
            state=outcome.state,
            value=outcome.score,
            params=before.params,
            distributions=before.distributions,
            intermediate_values=dict(outcome.scores),
            user_attrs=before.user_attrs | {FINISHED: outcome.finished} | _steps(outcome),
        )
        with processes.together(), self._explained():
            if processes.is_writer():
                self._write(number, trial)
        self._note(trial, number)

    def _write(self, number: int, trial: FrozenTrial) -> None:
        """Write a trial's end, its state last: a kill before that leaves it running."""
        storage = self._storage
        key = storage.get_trial_id_from_study_id_trial_number(self._id, number)
        for step, value in trial.intermediate_values.items():
            storage.set_trial_intermediate_value(key, step, value)
        for name, value in trial.user_attrs.items():
            storage.set_trial_user_attr(key, name, value)
        storage.set_trial_state_values(key, trial.state, trial.values)

    def _note(self, trial: FrozenTrial, number: int) -> None:
        trial.number = number
        self.trials[number : number + 1] = [trial]

    def _in_memory(self, sampler: BaseSampler) -> optuna.Study:
        study = optuna.create_study(sampler=sampler, direction=_direction(self.higher_is_better))
        study.add_trials(self.trials)
        return study

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turn what SQLite refuses into a sentence with a remedy."""
        try:
            with files.explained(self._path):
                yield
        except (sqlalchemy.exc.DatabaseError, optuna.exceptions.StorageInternalError) as error:
            cause = error.orig if isinstance(error, sqlalchemy.exc.DBAPIError) else error.__cause__
            cause = getattr(cause, 'orig', cause)
            code = getattr(cause, 'sqlite_errorcode', None)
            if code in _ERRNO:
                raise files.refusal(_ERRNO[code], self._path) from error
            raise ValueError(
                f'{self._path} cannot be used as the study of a sweep ({cause}); bring back an '
                'intact copy of it, or give another --workdir'
            ) from error


# What SQLite reports, as the operating system would.
_ERRNO = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_IOERR_WRITE: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
}


def check_sampler(sampler: str, seed: int) -> None:
    """Refuse a sampler or a seed that there cannot be.

    Raises:
        ValueError: naming the value and what was expected.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f'sweep.sampler is {sampler!r}; expected one of {", ".join(SAMPLERS)}')
    if seed < 0:
        raise ValueError(f'sweep.seed is {seed}; expected 0 or more')


def _steps(outcome: Outcome) -> dict[str, int]:
    return {TOTAL_STEPS: outcome.total_steps} if outcome.total_steps else {}


def _make_sampler(name: str, seed: int, number: int) -> BaseSampler:
    """Return the sampler of one trial; its draws follow from the seed and the trial's number."""
    own = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    if name == 'random':
        return RandomSampler(own)
    # The trials of a batch are proposed before any of them has ended: those that run count as bad,
    # so that they keep away from one another.
    return TPESampler(multivariate=True, constant_liar=True, seed=own)


def _direction(higher_is_better: bool) -> str:
    return 'maximize' if higher_is_better else 'minimize'


def _url(database: str, **options: str) -> str:
    """Return how SQLAlchemy and Optuna want a database named, whose every letter is meant so."""
    url = sqlalchemy.URL.create('sqlite', database=database, query=options)
    return url.render_as_string(hide_password=False)


def _close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()
