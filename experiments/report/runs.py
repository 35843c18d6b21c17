"""Finished runs as they lie in their folders, and which of them differ in nothing but the seed."""

import dataclasses
import functools
import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adapters_jax import tasks
from adapters_jax.config import NEUTRAL_KEYS

SEED = 'seed'
ASIDE = (SEED, *NEUTRAL_KEYS)

# What `evaluate` says of an example itself, beside what was made of it.
_TOLD = ('gold', 'text', 'text_a', 'text_b', 'tokens', 'choices', 'id', 'question', 'context')

Settings = dict[str, Any]


def seconds_of(summary: Mapping[str, Any]) -> float:
    """Return a run's part of the time that its population took."""
    return summary['seconds'] / summary.get('population', 1)


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder that `train` and `evaluate` have written."""

    workdir: Path
    settings: Settings  # the config's keys, joined by dots
    summary: Mapping[str, Any]
    metrics: Mapping[str, float]  # of the split that is reported
    split: str

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self.settings[SEED]

    @functools.cached_property
    def _predictions(self) -> list[dict[str, Any]] | None:
        path = self.workdir / f'predictions_{self.split}.jsonl'
        if not path.exists():
            return None
        return _lines(path)

    @property
    def right(self) -> list[bool] | None:
        """Which examples were predicted right, in their order; None where that is no yes or no.

        Written texts are closer to what was wanted, or further, and seldom the same.
        """
        if self._predictions is None or tasks.kind(self.settings['task.name']).writes:
            return None
        pairs = [(line.get('gold'), line.get('prediction')) for line in self._predictions]
        if not all(isinstance(gold, str) and isinstance(found, str) for gold, found in pairs):
            return None
        return [gold == found for gold, found in pairs]

    @property
    def examples(self) -> list[dict[str, Any]] | None:
        """The examples as far as they are told, texts and gold labels; None where they are not."""
        return None if self._predictions is None else [*map(_example, self._predictions)]

    def curve(self, name: str, validation: bool = False) -> list[tuple[int, float]]:
        """Return the steps and values of a metric over training.

        Of training itself, or of the validation split by which the best step was chosen, which is
        the first that is noted: of MNLI 'validation_matched'.
        """
        path = self.workdir / 'metrics.jsonl'
        lines = _lines(path) if path.exists() else []
        rows = [row for row in lines if name in row['values']]
        found = [row for row in rows if (row['split'] != 'train') == validation]
        own = [row for row in found if row['split'] == found[0]['split']]
        return [(row['step'], row['values'][name]) for row in own]


def _example(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return an example as predictions tell it; an image by its file's name, wherever that lies."""
    own = {key: line[key] for key in _TOLD if key in line}
    return own | ({'image': line['image'].rpartition('/')[2]} if 'image' in line else {})


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ in their seeds alone, and what sets them apart from the other groups."""

    settings: Settings
    runs: tuple[Run, ...]

    @property
    def name(self) -> str:
        """The settings in a line; the key of the method says itself."""
        parts = (v if k == 'method' else f'{k}={v}' for k, v in self.settings.items())
        return ', '.join(map(str, parts)) or 'all runs'

    def values(self, metric: str) -> list[float]:
        """Return the metric of each run."""
        return [run.metrics[metric] for run in self.runs]


def find(folders: Sequence[str], split: str) -> list[Run]:
    """Return the runs that lie in or below the folders, with their scores on a split.

    Raises:
        FileNotFoundError: a folder without finished runs, or a run without its evaluation.
        ValueError: a run that diverged before it had an adapter.
    """
    found = []
    for folder in folders:
        paths = sorted(Path(folder).rglob('summary.json'))
        if not paths:
            raise FileNotFoundError(
                f'{folder} holds no finished run (a folder with summary.json); name folders that '
                '`python -m adapters_jax.train --workdir=...` has written'
            )
        found += [_read(path.parent, split) for path in paths]
    return found


def _read(workdir: Path, split: str) -> Run:
    evaluation = workdir / f'evaluation_{split}.json'
    summary = _values(workdir / 'summary.json')
    if not evaluation.exists():
        _tell_missing(workdir, split, summary)
    config, scores = map(_values, (workdir / 'config.json', evaluation))
    return Run(workdir, dict(_flat(config)), summary, scores['metrics'], split)


def _tell_missing(workdir: Path, split: str, summary: Mapping[str, Any]) -> NoReturn:
    finished = summary.get('finished', '')
    if finished.startswith('diverged') and not (workdir / 'adapter').exists():
        raise ValueError(
            f'{workdir} {finished}; it left no adapter to evaluate: name the folders '
            'of the other runs in --runs, or move this one away'
        )
    options = shlex.join([f'--workdir={workdir}', f'--split={split}'])
    raise FileNotFoundError(
        f'{workdir} has no evaluation_{split}.json; run '
        f'`python -m adapters_jax.evaluate {options}`, or report another split'
    )


def _values(path: Path) -> dict[str, Any]:
    return _parsed(path, path.read_text('utf-8'))


def _lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines: JSON strings may hold other line separators than this one.
    return [_parsed(path, line) for line in path.read_text('utf-8').split('\n') if line]


def _parsed(path: Path, text: str) -> dict[str, Any]:
    """Return what a file, or a line of it, holds.

    Raises:
        ValueError: it is not as it was written: a copy that was cut off, say.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(
            f'{path} is not JSON ({error}): copy the run anew, or leave it out of --runs'
        ) from error


def _flat(tree: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f'{prefix}{key}.')
        else:
            yield f'{prefix}{key}', value


def groups(runs: Sequence[Run], ignored: Sequence[str] = ()) -> list[Group]:
    """Return the runs by all settings but the seed and the `ignored` keys, in their order.

    Raises:
        ValueError: two runs of one group have the same seed.
    """
    keys = sorted({key for run in runs for key in run.settings} - {*ASIDE, *ignored})
    told = [k for k in keys if len({json.dumps(run.settings.get(k)) for run in runs}) > 1]
    told.sort(key=lambda key: key != 'method')
    found: dict[str, list[Run]] = {}
    for run in runs:
        own = {key: run.settings.get(key) for key in told}
        found.setdefault(json.dumps(own), []).append(run)
    made = [
        Group(json.loads(settings), tuple(sorted(own, key=lambda run: run.seed)))
        for settings, own in found.items()
    ]
    for group in made:
        _check_seeds(group)
    return made


def _check_seeds(group: Group) -> None:
    seen: dict[int, Run] = {}
    for run in group.runs:
        if run.seed in seen:
            raise ValueError(
                f'{seen[run.seed].workdir} and {run.workdir} are the same run (seed {run.seed}, '
                f'{group.name}); leave one of them out'
            )
        seen[run.seed] = run
