"""Evaluate a run exactly: `python -m adapters_jax.evaluate --workdir=DIR [--split=test]`.

Writes `evaluation_SPLIT.json` (the metrics) and `predictions_SPLIT.jsonl` (one object an example,
in the split's order) into the workdir; for a run of several tasks `predictions_TASK_SPLIT.jsonl`.
Tasks that have a format of their own are written in it too, as `predictions_SPLIT.conllu`.
With `--drop_layers=N` the adapter is left out of the N lowest layers (AdapterDrop), with
`--drop_layers=A-B` of layers A to B, and the files' names end in `_dropN` or `_dropA-B`.
"""

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from adapters_jax import config as configs
from adapters_jax import entry, files, processes
from adapters_jax.adapters import dropping, registry
from adapters_jax.adapters.dropping import Dropped
from adapters_jax.interop import adapter_folder
from adapters_jax.tasks.task import Task
from adapters_jax.training import experiment, inference, multitask, preprocessing, provenance
from adapters_jax.training.members import Members
from adapters_jax.training.placement import make_mesh
from adapters_jax.training.progress import CONFIG, DATA

_LOG = logging.getLogger('adapters_jax.evaluate')  # __name__ is '__main__' on the command line


def evaluate(workdir: str | Path, split: str = 'test', drop_layers: Dropped = 0) -> dict[str, Any]:
    """Return the metrics of a workdir's best adapter on a split (and 'confusion', for classes).

    Of a run of several tasks it is the mean of their primary metrics, and the same for each of
    their splits of that name under `tasks`.

    Raises:
        FileNotFoundError: no run, or one without a finished adapter.
        ValueError: no such split (those there are get listed), no layers to drop, or data that have
            changed since training so that the split may hold what was trained on.
    """
    workdir = Path(workdir)
    config = configs.read(workdir / CONFIG)
    _check_single(config, workdir)
    if processes.is_writer():
        files.make_directory(workdir)  # where what is found will be written
    config.start = ''  # which may be gone, as may finished members: the adapter is here
    _fit_devices(config)
    if config.tasks:
        result = _evaluate_tasks(config, workdir, split, drop_layers)
    else:
        folder = adapter_folder.load(workdir / 'adapter')
        whole = Members(registry.from_json(folder.method), {}) if config.adapters else None
        with _places_named(workdir):
            run = experiment.build(config, members=whole)
        _check_split(split, run.splits, split in run.splits)
        _check_data(workdir, run.fingerprints, split)
        predictions = _predictions(workdir, split, drop_layers)
        scored = _evaluate_one(folder, run, split, predictions, drop_layers)
        result = {'split': split, **scored}
    result['drop_layers'] = dropping.describe(drop_layers)
    path = evaluation_path(workdir, split, drop_layers)
    if processes.is_writer():
        files.write_json(path, result | provenance.describe())
    return result


def _check_single(config: configs.Config, workdir: Path) -> None:
    if config.sweep.grid or config.sweep.space:
        raise ValueError(
            f'{workdir} is the workdir of a sweep: give the folder of one of its members, '
            f'{workdir}/members/NAME; its sweep.md says which is the best'
        )


@contextlib.contextmanager
def _places_named(workdir: Path) -> Iterator[None]:
    """Say of what is gone where it can be said that it has moved."""
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{error} (where data and backbone lie says {workdir / CONFIG}: if they have moved '
            'since training, enter their new places there)'
        ) from error


def _fit_devices(config: configs.Config) -> None:
    """Take the devices that there are where those of training are not: scores are the same."""
    try:
        make_mesh(config)
    except ValueError as error:
        _LOG.warning('%s: evaluating on all devices there are, the whole model on each', error)
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = -1, 1, 1


def evaluation_path(workdir: Path, split: str, dropped: Dropped = 0) -> Path:
    """Return the file that `evaluate` leaves."""
    return workdir / f'evaluation_{split}{_ending(dropped)}.json'


def _predictions(workdir: Path, split: str, dropped: Dropped) -> Path:
    return workdir / f'predictions_{split}{_ending(dropped)}.jsonl'


def _ending(dropped: Dropped) -> str:
    return f'_drop{dropping.describe(dropped)}' if dropped else ''


def _check_split(split: str, splits: Iterable[str], found: bool) -> None:
    if not found:
        raise ValueError(
            f'there is no split {split!r} in this run; it has {", ".join(sorted(splits))}'
        )


def _check_data(workdir: Path, found: Mapping[str, str], split: str) -> None:
    """Refuse a split that may hold what was trained on; tell of one that has changed.

    `found` has the fingerprints of the splits as they are now. One that is cut off the training
    file is another one where that file has changed.
    """
    path = workdir / DATA
    if not path.exists():
        _LOG.info('%s has no %s: whether the data have changed is not known', workdir, DATA)
        return
    known = json.loads(path.read_text('utf-8'))
    pool = '/'.join([*split.split('/')[:-1], 'train'])
    if found[split] == known.get(split):
        return
    if found[pool] != known[pool] and split != pool:
        raise ValueError(
            f'the data of this run have changed since training, {pool!r} and {split!r} both, so '
            f'that {split!r} may hold what was trained on; bring back the files that the section '
            f'data of {workdir / CONFIG} names, or train again in another --workdir'
        )
    _LOG.warning('the split %r has changed since training: this scores it as it is now', split)


def _check_labels(task: Task, here: Task) -> None:
    own, given = (one.to_json().get('labels') for one in (task, here))
    if own != given:
        raise ValueError(
            f'the classes in the data are {", ".join(given)}, and those that were trained '
            f'{", ".join(own)}; bring back the names that the labels had'
        )


def _evaluate_one(
    folder: adapter_folder.AdapterFolder,
    run: experiment.Experiment,
    split: str,
    predictions: Path,
    dropped: Dropped,
) -> dict[str, Any]:
    """Score an adapter on a split, and write what it predicts."""
    preprocessing.chain_of(folder)  # refuses steps that are not what they were in training
    encoded, rows = run.splits[split], run.texts[split]
    # With what training has tuned of it.
    task = experiment.served(folder, run.backbone)
    _check_labels(task, run.task)
    if task.writes and not task.is_labelled(encoded):
        task = task.predicting()  # where nothing is known to be right, texts are all there is
    found = inference.outputs(folder, run.backbone, encoded, run.config, task, dropped)
    _write_predictions(predictions, run, task, split, found)
    if not task.is_labelled(encoded):
        return {'examples': len(rows), 'metrics': {}}
    metrics = task.score(found, encoded, rows)
    return {'examples': len(rows), 'metrics': metrics, **task.details(found, encoded, rows)}


def _evaluate_tasks(
    config: configs.Config, workdir: Path, split: str, dropped: Dropped
) -> dict[str, Any]:
    """Score each task's adapter on its split of that name, or on its splits SPLIT_...."""
    folders = {name: adapter_folder.load(workdir / 'adapter' / name) for name in config.tasks}
    with _places_named(workdir):
        run = multitask.build(config)
    wanted = [
        (name, key)
        for name, member in run.members.items()
        for key in member.splits
        if key == split or key.startswith(f'{split}_')
    ]
    _check_split(split, {key for m in run.members.values() for key in m.splits}, bool(wanted))
    results, first = {}, {}
    for name, key in wanted:
        predictions = _predictions(workdir, f'{name}_{key}', dropped)
        _check_data(workdir, run.fingerprints, f'{name}/{key}')
        result = _evaluate_one(folders[name], run.members[name], key, predictions, dropped)
        results[f'{name}/{key}'] = result
        first.setdefault(name, result['metrics'])
    scored = len(first) == len(run.members) and all(first.values())
    return {
        'split': split,
        'examples': sum(result['examples'] for result in results.values()),
        'metrics': {'mean': run.task.mean(first)} if scored else {},
        'tasks': results,
    }


def _write_predictions(
    path: Path, run: experiment.Experiment, task: Task, split: str, outputs: np.ndarray
) -> None:
    """Write each row's texts, gold label (as 'gold', where known) and prediction."""
    if not processes.is_writer():
        return
    rows = run.texts[split]
    predicted = task.predict(outputs, run.splits[split], rows)
    with files.atomic(path) as temporary, temporary.open('w', encoding='utf-8') as lines:
        for row, one in zip(rows, predicted, strict=True):
            lines.write(json.dumps(task.shown(row) | one, ensure_ascii=False) + '\n')
    for suffix, text in task.native_files(rows, predicted).items():
        files.write_text(path.with_suffix(suffix), text)


def main(workdir: str, split: str, drop_layers: str) -> None:
    """Evaluate, and print the metrics and what was written."""
    dropped = dropping.parse(drop_layers)
    result = evaluate(workdir, split, dropped)
    folder, written = Path(workdir), evaluation_path(Path(workdir), split, dropped)
    for name, part in result.get('tasks', {}).items():
        task, _, own = name.partition('/')
        _show(folder / 'adapter' / task, name, part)
        print(f'wrote {_files(_predictions(folder, f"{task}_{own}", dropped))}')
    if 'tasks' in result:
        print(entry.table(result['metrics']))
        print(f'wrote {written}')
        return
    _show(folder / 'adapter', split, result)
    print(f'wrote {written} and {_files(_predictions(folder, split, dropped))}')


def _files(predictions: Path) -> str:
    """Name a file of predictions and those beside it in other formats."""
    own = sorted(predictions.parent.glob(f'{predictions.stem}.*'), key=lambda p: p != predictions)
    return ', '.join(map(str, own))


def _show(adapter: Path, name: str, result: dict[str, Any]) -> None:
    """Print what an adapter scored on a split."""
    print(f'{name}: {result["examples"]:,} examples')
    if not result['metrics']:
        print('  the split has no labels: predictions only')
        return
    print(entry.table(result['metrics']))
    details = experiment.task_of(adapter_folder.load(adapter)).details_text(result)
    if details:
        print(details)


def _define() -> dict[str, flags.FlagHolder]:
    workdir = flags.DEFINE_string('workdir', None, 'Directory of a finished run.')
    split = flags.DEFINE_string('split', 'test', 'Which split: test, validation, train.')
    drop = flags.DEFINE_string('drop_layers', '0', 'Layers without adapters: the N lowest, or A-B.')
    return {'workdir': workdir, 'split': split, 'drop_layers': drop}


if __name__ == '__main__':
    entry.run_on_many(_define, main)
