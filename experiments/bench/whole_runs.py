"""Races of whole processes: an epoch, a sweep, the time to a first step, peak memory."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from adapters_jax import files
from adapters_jax.data import builtin, sources
from adapters_jax.interop.backbones import load_backbone
from configs import glue
from experiments.bench import backbones, workers
from experiments.bench.race import Race, of_processes
from experiments.bench.steps import CPU_DEVICES

SIDES = ('ours', 'theirs')
MEMBERS = 12
GLUE = 'GLUE'  # whose folder is given as --data
SOURCES = {'TREC': 'built in', 'RTE': GLUE}


def _jobs(job: str, launched: bool = False, **settings: Any) -> dict[str, dict[str, Any]]:
    settings = {'job': job, 'launched': launched} | settings
    return {side: settings | {'side': side} for side in SIDES}


def _course(root: Path) -> dict[str, Any]:
    on_cpu = jax.default_backend() == 'cpu'
    name, size, rows = ('minilm', 24, 32) if on_cpu else ('base', 48, 64)
    return {
        'backbone': str(backbones.folder(name, root)),
        'size': size,
        'rows': rows,
        'tokens': 128,
        'dtype': 'float32' if on_cpu else 'bfloat16',
    }


def epoch(root: Path, rounds: int, data: str, examples: int) -> Iterator[Race]:
    """Race one epoch over TREC's questions and, where GLUE's folder is given, RTE's pairs.

    Theirs is `AdapterTrainer` with dynamic padding, ours the default pipeline with a head like
    theirs (`programs.HEAD`).
    """
    for title, path in _texts(root, data, examples).items():
        settings = _training(root, path)
        times, last = of_processes(_jobs('epoch', **settings, launched=True), rounds, 'seconds')
        settings |= _of_texts(title, examples)
        yield Race(title, *_both(times), settings, more=_told(*_both(last)))


def sweep(root: Path, rounds: int, data: str, examples: int) -> Iterator[Race]:
    """Race a population of twelve against twelve times one of their runs.

    First with adapters in all layers, then in the upper half of them, which leaves a trunk that all
    members share. Theirs computes no gradient below the lowest adapter either.
    """
    title, path = next(iter(_texts(root, data, examples).items()))
    settings = _training(root, path) | {'members': MEMBERS}
    half = load_backbone(settings['backbone']).config.depth // 2
    for places, left_out in (('', ()), (', adapters in the upper half', tuple(range(half)))):
        told = settings | {'left_out': left_out}
        name = f'{MEMBERS} members, {title}{places}'
        yield from _sweep(name, told, _of_texts(title, examples), rounds)


def _sweep(
    name: str, settings: dict[str, Any], texts: dict[str, Any], rounds: int
) -> Iterator[Race]:
    """Race one population, on one device and, on a CPU, spread over several."""
    jobs = _jobs('sweep', **settings, launched=True)
    if jax.default_backend() == 'cpu':
        jobs |= {'spread': {**jobs['ours'], 'devices': CPU_DEVICES}}
    times, last = of_processes(jobs, rounds, 'seconds')
    for way in (way for way in jobs if way != 'theirs'):
        devices = jobs[way].get('devices', 1)
        title = name + f' over {devices} devices' * (devices > 1)
        told = settings | texts | {'devices': devices}
        more = _told(last[way], last['theirs'])
        yield Race(title, times[way], times['theirs'], told, more=more)


def first_step(root: Path, rounds: int) -> Iterator[Race]:
    """Race from a process's start to its first step done: compiled anew, and found in the cache."""
    course = _course(root)
    times, _ = of_processes(_jobs('first_step', **course), rounds, 'seconds')
    yield Race('compiled anew', *_both(times), course)
    with tempfile.TemporaryDirectory() as cache:
        jobs = _jobs('first_step', **course, cache=cache)
        of_processes({'ours': jobs['ours']}, 1, 'seconds')  # fills it
        launched = {**jobs['ours'], 'launched': True}
        times, _ = of_processes(jobs | {'launched': launched}, rounds, 'seconds')
    yield Race('with the compilation cache', *_both(times), course)
    yield Race('the same in large pages', times['launched'], times['theirs'], course)
    times, _ = of_processes(_jobs('imports'), rounds, 'seconds')
    yield Race('imports alone', *_both(times), {'imports': workers.IMPORTS})


def memory(root: Path, rounds: int) -> Iterator[Race]:
    """Race for the least memory at the peak of training on the same batch."""
    course = _course(root)
    jobs = _jobs('peak_memory', **course, launched=True)
    times, _ = of_processes(jobs, rounds, 'mebibytes')
    where = 'of the process' if jax.default_backend() == 'cpu' else 'of the device'
    yield Race(f'peak {where}', *_both(times), course, unit='MiB')


def _both(times: Mapping[str, Any]) -> tuple[Any, Any]:
    return times['ours'], times['theirs']


def _told(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what else is known of the last round: of ours the arithmetic, and at which rate."""
    share = ours['flops'] / ours['seconds'] / ours['product_rate']
    return {'share_of_rate': share, 'last': {'ours': _rounded(ours), 'theirs': _rounded(theirs)}}


def _rounded(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) for key, value in found.items()}


def _training(root: Path, path: Path) -> dict[str, Any]:
    course = _course(root)
    return {key: course[key] for key in ('backbone', 'size', 'dtype')} | {
        'data': str(path),
        'batch_size': 32,
    }


def _of_texts(title: str, examples: int) -> dict[str, Any]:
    return {'examples': examples, 'source': SOURCES[title]}


def _texts(root: Path, data: str, examples: int) -> dict[str, Path]:
    """Write the texts of each set as JSONL, at most so many; return the files by title."""
    found = {}
    questions = builtin.read('trec')
    columns = {'text': questions['text_a'], 'label': questions['label']}
    found['TREC'] = _write(root / 'trec.jsonl', columns, examples)
    if data:
        config = glue.get_config('task=rte')
        config.data.dir = data
        rows = sources.load(config.data, 'class')['train']
        columns = {name: rows[name][:] for name in ('text_a', 'text_b', 'label')}
        found['RTE'] = _write(root / 'rte.jsonl', columns, examples)
    return found


def _write(path: Path, columns: Mapping[str, list[Any]], examples: int) -> Path:
    rows = zip(*(values[:examples] for values in columns.values()), strict=True)
    lines = [json.dumps(dict(zip(columns, map(str, row), strict=True))) for row in rows]
    files.write_text(path, '\n'.join(lines) + '\n')
    return path
