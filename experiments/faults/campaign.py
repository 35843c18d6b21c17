"""The campaign: which fault comes in which run, and whether anything was lost or wrong in the end.

A trial is one run, disturbed several times and then left to finish. What it leaves must be, bit for
bit, what a run leaves that nothing disturbed.
"""

import dataclasses
import itertools
import random
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from adapters_jax import files
from experiments.commands import Command, Finished
from experiments.faults import runs
from experiments.faults.injections import FAULTS, Attempt, Ended
from experiments.faults.report import counts

PER_TRIAL = 5  # faults that one run has to survive
TRIES = 4  # at a fault that came too late, before another takes its place

_RESUMED = re.compile(r'continuing from the checkpoint of step (\d+)')


@dataclasses.dataclass
class Calm:
    """A run that nothing disturbed: what it left, and how long it took."""

    results: dict[str, Any]
    seconds: float


@dataclasses.dataclass
class Campaign:
    """Trials in a folder, of `count` faults or a few more, drawn from `seed`."""

    folder: Path
    count: int
    seed: int
    kinds: tuple[runs.Kind, ...] = runs.KINDS

    def run(self, processes: int) -> dict[str, Any]:
        """Do all trials, so many at a time; return what came of them."""
        started = time.monotonic()
        self.toys = runs.write_toys(files.make_directory(self.folder / 'toys'))
        plans = self._plan()
        used = [kind for kind in self.kinds if any(kind is planned for planned, _ in plans)]
        with ThreadPoolExecutor(processes) as pool:
            calm = dict(zip(used, pool.map(self._calm, used), strict=True))
            numbers = range(len(plans))
            done = pool.map(lambda n: self._trial(n, *plans[n], calm[plans[n][0]]), numbers)
            trials = list(done)
        return {
            'seed': self.seed,
            'processes': processes,
            'minutes': round((time.monotonic() - started) / 60, 1),
            'steps': runs.STEPS,
            'checkpoint_every': runs.CHECKPOINT_EVERY,
            'runs': [kind.name for kind in used],
            'trials': trials,
        }

    def _plan(self) -> list[tuple[runs.Kind, list[str]]]:
        """Return for each trial its kind of run and its faults, all as often or one time less."""
        chance = random.Random(self.seed)
        order: list[str] = []
        while len(order) < self.count:
            order += chance.sample(list(FAULTS), len(FAULTS))
        groups = [order[i : i + PER_TRIAL] for i in range(0, self.count, PER_TRIAL)]
        groups[-1] = groups[-1][: self.count - PER_TRIAL * (len(groups) - 1)]
        return list(zip(itertools.cycle(self.kinds), groups, strict=False))

    def command(self, kind: runs.Kind, folder: Path, **options: Any) -> Command:
        """Start a kind of run in `folder`/run; every start has a folder of its own for its output.

        Only the calm run adds to the compiled programs: JAX does not write them atomically.
        """
        outputs = files.make_directory(folder / 'outputs')
        own = outputs / str(len(list(outputs.iterdir())))
        cache = str(self.folder / 'compiled')
        arguments = kind.arguments(self.toys, folder)
        return Command(kind.command, arguments, own, cache=cache, **options)

    def _calm(self, kind: runs.Kind) -> Calm:
        """Run undisturbed.

        Raises:
            RuntimeError: it did not finish.
        """
        folder, started = self.folder / 'calm' / kind.name, time.monotonic()
        done = self.command(kind, folder).finish(1200)
        if done.status:
            raise RuntimeError(f'the undisturbed run {kind.name!r} failed: {done.err}')
        return Calm(runs.results(folder / 'run'), time.monotonic() - started)

    def _trial(self, number: int, kind: runs.Kind, faults: list[str], calm: Calm) -> dict[str, Any]:
        """Disturb a run, let it finish, compare; a run that finishes early makes room for another.

        Those that the trial needed one after the other all have to leave the same results.
        """
        chance = random.Random(f'{self.seed} {number}')
        records: list[dict[str, Any]] = []
        wrong: list[str] = []
        folders = (self.folder / 'trials' / f'{number}-{i}' for i in itertools.count())
        trial = Trial(self, kind, next(folders), calm, chance)
        for fault in faults:
            for _ in range(TRIES):
                record = trial.disturb(fault)
                if record['status'] == 0:
                    wrong += trial.conclude()
                    trial = Trial(self, kind, next(folders), calm, chance)
                if counts(record):
                    break
            records.append(record)
            print(f'{kind.name}: {record}', flush=True)
        finished = trial.finish()
        wrong += trial.conclude() if finished else []
        return {'run': kind.name, 'lost': not finished, 'wrong': wrong, 'faults': records}


class Trial:
    """One run in one workdir, from its first attempt to its last."""

    def __init__(
        self, campaign: Campaign, kind: runs.Kind, folder: Path, calm: Calm, chance: random.Random
    ) -> None:
        self._campaign, self._kind, self._calm, self._random = campaign, kind, calm, chance
        self._folder = files.make_directory(folder)
        self._workdir = folder / 'run'
        self._newest = 0  # the step that the next attempt must go on from
        self._damaged: dict[Path, int] = {}  # an attempt may be killed before it sets them aside

    def disturb(self, fault: str) -> dict[str, Any]:
        """Start the run once and let the fault befall it; return the record."""
        before = runs.steps_taken(self._workdir)
        attempt = Attempt(
            self._start, self._workdir, self._calm.seconds, self._random, self._damaged
        )
        try:
            ended = FAULTS[fault](attempt)
        except TimeoutError as error:
            ended = Ended(True, Finished(1, '', ''), (f'does not end: {error}',))
        done, steps = ended.finished, runs.steps_taken(self._workdir)
        resumed = _RESUMED.search(done.err)
        record = {
            'fault': fault,
            'moment': attempt.moment,
            'hit': ended.hit,
            'status': done.status,
            'began_at': int(resumed[1]) if resumed else 0,
            'steps': steps,
        }
        surprises = [*ended.surprises, *self._surprises(record, done, attempt)]
        self._newest = record['checkpoint'] = runs.newest(self._workdir)
        if done.status and steps != before and steps - self._newest > _bound(attempt):
            surprises.append(f'{steps - self._newest} steps are to be taken again')
        return record | {'surprises': surprises, **ended.told}

    def _surprises(self, record: dict[str, Any], done: Finished, attempt: Attempt) -> list[str]:
        """Return what is not as it ought to be after an attempt."""
        found = ['a traceback'] if 'Traceback' in done.err else []
        if record['began_at'] != self._newest and (record['began_at'] or done.status == 0):
            found.append(f'went on from step {record["began_at"]} instead of {self._newest}')
        return found + list(runs.flaws(self._workdir, attempt.still_damaged()))

    def finish(self) -> bool:
        """Start the run once more, undisturbed; tell whether it finished."""
        return self._start().finish().status == 0

    def conclude(self) -> list[str]:
        """Compare what the finished run left with the calm one's; remove it if it is the same."""
        different = runs.differences(runs.results(self._workdir), self._calm.results)
        different += [f'left behind: {path.name}' for path in runs.temporary(self._folder)]
        if not different:
            shutil.rmtree(self._folder)
        return different

    def _start(self, **options: Any) -> Command:
        return self._campaign.command(self._kind, self._folder, read_only_cache=True, **options)


def _bound(attempt: Attempt) -> int:
    """Return how many steps may have to be taken again.

    A checkpoint is sound once the next one begins, so there is always one that is no older than two
    intervals; where it was damaged, the one before it counts.
    """
    return (2 + bool(attempt.still_damaged())) * runs.CHECKPOINT_EVERY
