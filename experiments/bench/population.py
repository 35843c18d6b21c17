"""A population against the same runs done alone, and the trunk cache against none.

    python -m experiments.bench.population --output=DIR [--backbone=minilm] [--dtype=float32]
        [--layers=1,3,6] [--members=8] [--repeats=9] [--epochs=2]

Adapters (Pfeiffer et al. 2021) in the top layers of a backbone, on the questions of the quickstart,
32 to a batch and packed, dropout on. First steps in turns within one process; then whole commands,
each in a process of its own (`--epochs`, 0: none): as many `train` as there are members, against
one `sweep` that makes the trunk cache first. Writes DIR/population.json and DIR/population.md.

On a GPU: `--backbone=base --dtype=bfloat16 --layers=12`, random weights in the shapes of BERT-base.
"""

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import config as configs
from adapters_jax import entry, files
from adapters_jax.config import Config
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.training import experiment, grid
from adapters_jax.training.dtypes import DTYPES
from adapters_jax.training.loop import Trainer
from adapters_jax.training.population_run import PopulationRun
from adapters_jax.training.provenance import describe
from adapters_jax.training.run import Run
from configs import quickstart
from experiments.bench import backbones
from experiments.bench.timing import Ratio, Times, compare
from experiments.output import where, write

KEPT = {'computed': 'none', 'cached': 'float32'}  # training.trunk_cache
_ONCE = (
    'Whole commands were run once: `train` computes the trunk in every step, `sweep` caches it '
    'where there is one. '
)
WAYS = {'alone': 'alone, {} times', 'population': 'population of {}'}


def adapted_at_the_top(config: Config, layers: int, depth: int) -> Config:
    """Return the config with adapters in the `layers` top layers of `depth`."""
    changed = configs.from_json(configs.to_json(config))
    changed.method = f'pfeiffer[leave_out={list(range(depth - layers))}]'
    return changed


def make_runs(
    config: Config, members: int, backbone: LoadedBackbone, folder: Path
) -> dict[str, dict[str, Run]]:
    """Return one run and one population, each with the trunk computed and with it cached."""
    runs: dict[str, dict[str, Run]] = {way: {} for way in WAYS}
    for name, kept in KEPT.items():
        config.training.trunk_cache = kept
        config.sweep.grid = ()
        built = experiment.build(config, backbone)
        runs['alone'][name] = Trainer(built, folder / 'alone')
        config.sweep.grid = (f'seed={",".join(map(str, range(members)))}',)
        everyone = grid.expand(config)
        first = dataclasses.replace(built, config=everyone[0].config)
        runs['population'][name] = PopulationRun(first, everyone, folder, folder / 'members')
    return runs


def measure(
    config: Config, layers: int, members: int, repeats: int, backbone: LoadedBackbone, folder: Path
) -> dict[str, Any]:
    """Return the times of a step of `members` members, done in each way, and what they are of."""
    depth = backbone.config.depth
    runs = make_runs(adapted_at_the_top(config, layers, depth), members, backbone, folder)

    def repeated(run: Run, times: int) -> Callable[[], Any]:
        return lambda: [run.take_step() for _ in range(times)][-1]

    functions = {
        f'{way}, {name}': repeated(run, members if way == 'alone' else 1)
        for way, by_name in runs.items()
        for name, run in by_name.items()
        if name == 'computed' or layers < depth
    }
    times = compare(functions, repeats)
    found = {name: row(times[name], times['alone, computed']) for name in functions}
    steps = runs['alone']['computed'].steps_per_epoch
    return {'layers': layers, 'steps_per_epoch': steps, 'ways': found, 'gains': gains(times)}


def row(times: Times, alone: Times) -> dict[str, Any]:
    """Return the seconds of all members' step, and the ratio to the runs done alone."""
    return {'seconds': times.median, 'ratio': dataclasses.asdict(times.over(alone))}


def gains(times: dict[str, Times]) -> dict[str, dict[str, float]]:
    """Return the time with the cache as a part of that without, for each way."""
    return {
        way: dataclasses.asdict(times[f'{way}, cached'].over(times[f'{way}, computed']))
        for way in WAYS
        if f'{way}, cached' in times
    }


def measure_commands(
    config: Config, layers: int, depth: int, members: int, epochs: int, folder: Path
) -> dict[str, Any]:
    """Return the seconds of `members` runs of `train` and of one `sweep`, start to end.

    `folder` is empty: a run that is finished there already would end at once.
    """
    method = f'method=pfeiffer[leave_out={list(range(depth - layers))}]'
    common = [f'--config=configs/quickstart.py:{method}', f'--config.training.epochs={epochs}']
    common += [f'--config.backbone={config.backbone}']
    common += [f'--config.training.dtype={config.training.dtype}']
    cache = files.make_directory(folder / 'cache')  # without a trunk, so that the sweep makes it
    common += [f'--config.data.cache_dir={cache}', '--config.data.seed=0']
    seeds = range(members)
    sweep = [f"--config.sweep.grid=('seed={','.join(map(str, seeds))}',)"]
    sweep += ['--config.training.trunk_cache=float32', f'--workdir={folder / "sweep"}']
    alone = [[f'--config.seed={i}', f'--workdir={folder / f"alone{i}"}'] for i in seeds]
    # Half of the runs before the sweep and half after it, since the machine may change.
    first = [run('train', *common, *line) for line in alone[: members // 2]]
    together = run('sweep', *common, *sweep)
    rest = [run('train', *common, *line) for line in alone[members // 2 :]]
    return {'layers': layers, 'epochs': epochs, 'alone': sum(first + rest), 'sweep': together}


def run(command: str, *arguments: str) -> float:
    """Run a command in a process of its own; return its seconds.

    Raises:
        RuntimeError: it failed; what it said is told.
    """
    started = time.perf_counter()
    line = [sys.executable, '-m', f'adapters_jax.{command}', *arguments]
    done = subprocess.run(line, check=False, capture_output=True, encoding='utf-8')
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f'`{" ".join(line)}` ended with {done.returncode}:\n{done.stderr}')
    return seconds


def render(result: dict[str, Any]) -> str:
    """Return the Markdown tables, and below them how they were measured."""
    members = result['members']
    titles = [
        f'{title.format(members)}{", trunk cached" * (name == "cached")}'
        for title in WAYS.values()
        for name in KEPT
    ]
    lines = [f'| adapted layers | {" | ".join(titles)} |', f'|---|{"---|" * len(titles)}']
    keys = [f'{way}, {name}' for way in WAYS for name in KEPT]
    for found in result['steps']:
        cells = [_cell(found['ways'].get(key)) for key in keys]
        lines.append(f'| {found["layers"]} | {" | ".join(cells)} |')
    lines += ['', *_epochs(result['steps'])]
    if result['commands']:
        lines += ['', *_commands(result['commands'], members)]
    note = (
        f'Times of one step of all {members} members relative to the same runs one by one with '
        f'nothing cached; in brackets the middle half of {result["repeats"]} rounds in turns. '
        f'{_ONCE * bool(result["commands"])}'
        f'Backbone `{result["backbone"]}` in {result["dtype"]}, {result["examples"]:,} texts, on '
        f'{where(result)}.'
    )
    return '\n'.join([*lines, '', note])


def _cell(way: dict[str, Any] | None) -> str:
    return 'no trunk' if way is None else str(Ratio(**way['ratio']))


def _epochs(steps: Sequence[dict[str, Any]]) -> list[str]:
    """Return the table of an epoch's time with the cache and without."""
    lines = [
        '| adapted layers | run | s an epoch | with the cache | ratio |',
        '|---|---|---|---|---|',
    ]
    for found in steps:
        for way in WAYS:
            seconds = {
                name: found['ways'][f'{way}, {name}']['seconds'] * found['steps_per_epoch']
                for name in KEPT
                if f'{way}, {name}' in found['ways']
            }
            cached = f'{seconds["cached"]:.1f}' if 'cached' in seconds else 'no trunk'
            gain = str(Ratio(**found['gains'][way])) if way in found['gains'] else '-'
            cells = (found['layers'], way, f'{seconds["computed"]:.1f}', cached, gain)
            lines.append(f'| {" | ".join(map(str, cells))} |')
    return lines


def _commands(commands: Sequence[dict[str, Any]], members: int) -> list[str]:
    """Return the table of whole commands."""
    head = f'| adapted layers | epochs | {members} x `train` | 1 x `sweep`, trunk cached | ratio |'
    lines = [head, '|---|---|---|---|---|']
    for found in commands:
        seconds = [f'{found[name]:.0f} s' for name in ('alone', 'sweep')]
        ratio = f'{found["sweep"] / found["alone"]:.2f}'
        lines.append(f'| {found["layers"]} | {found["epochs"]} | {" | ".join(seconds)} | {ratio} |')
    return lines


def benchmark(
    config: Config, layers: Sequence[int], members: int, repeats: int, folder: Path
) -> dict[str, Any]:
    """Return what is measured of steps."""
    backbone = load_backbone(config.backbone)
    built = experiment.build(config, backbone)
    steps = [
        measure(
            config, count, members, repeats, backbone, files.make_directory(folder / str(count))
        )
        for count in layers
    ]
    texts = len(built.splits['train'])
    return {
        'dtype': config.training.dtype,
        'examples': texts,
        'members': members,
        'repeats': repeats,
        'steps': steps,
        **describe(),
    }


def main(
    output: str,
    backbone: str,
    dtype: str,
    layers: Sequence[str],
    members: int,
    repeats: int,
    epochs: int,
) -> None:
    """Measure steps and commands; write the numbers and the tables."""
    directory = files.make_directory(output)
    config = quickstart.get_config()
    config.backbone, config.training.dtype = str(backbones.folder(backbone, directory)), dtype
    config.data.cache_dir = str(directory / 'cache')
    counts = [int(count) for count in layers]
    result = {'backbone': backbone, **benchmark(config, counts, members, repeats, directory)}
    depth = load_backbone(config.backbone).config.depth
    result['commands'] = []
    for count in counts if epochs else []:
        with tempfile.TemporaryDirectory(prefix='commands', dir=directory) as folder:
            own = measure_commands(config, count, depth, members, epochs, Path(folder))
        result['commands'].append(own)
    write(directory, 'population', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'backbone': flags.DEFINE_enum('backbone', 'minilm', backbones.NAMES, 'What is adapted.'),
        'dtype': flags.DEFINE_enum('dtype', 'float32', list(DTYPES), 'What steps compute in.'),
        'layers': flags.DEFINE_list('layers', ['1', '3', '6'], 'Numbers of adapted layers.'),
        'members': flags.DEFINE_integer('members', 8, 'Members of the population.'),
        'repeats': flags.DEFINE_integer('repeats', 9, 'Rounds of the comparison of steps.'),
        'epochs': flags.DEFINE_integer('epochs', 2, 'Epochs of the commands; 0: no commands.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
