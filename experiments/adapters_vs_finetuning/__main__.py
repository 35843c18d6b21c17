"""Is an adapter as good as training everything, and what does it save?

    python -m experiments.adapters_vs_finetuning --output=DIR --data=DATA [--task=trec]
        [--rows=plain_bert,full,houlsby,...] [--seeds=3]

Each way of training at three learning rates, chosen on validation data, several seeds each; the
first row is a plain recipe: BERT and a linear classifier trained in full by Adam at 1e-5, batches
of 16, three epochs. DATA is the folder of a set of configs/text_sets.py. Runs that are finished are
not run again. Writes DIR/ROW/RATE_SEED/ (workdirs), and DIR/adapters_vs_finetuning.json, .md, .png
and _norms.png. With the defaults this is 48 runs, some three hours on two cores.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import entry, files
from adapters_jax.training.provenance import describe
from experiments import edges
from experiments.adapters_vs_finetuning import charts, runs
from experiments.adapters_vs_finetuning.runs import ROWS, Setting
from experiments.output import write

NAME = 'adapters_vs_finetuning'


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown tables, and below them how they were measured."""
    heads = ('training', 'trained parameters', 'learning rate', 'validation', 'test')
    heads += ('seconds', 'memory, MiB', 'file, MiB')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    lines += [_scores(ROWS[name].title, found) for name, found in result['rows'].items()]
    heads = ('training', 'norm, median', 'largest / median', 'vanishing', 'exploding')
    heads += ('diverged', 'spread over seeds', 'spread over rates')
    lines += ['', f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    lines += [_steadiness(ROWS[name].title, found) for name, found in result['rows'].items()]
    count = len(result['seeds'])
    note = (
        f'`{result["task"]}` on MiniLM, {result["examples"]} test texts; the rate with the best '
        f'mean validation score, mean ± s.d. of {count} seed{"s" if count > 1 else ""}. '
        f'{_edges(result["rows"].values())} Steps are '
        'vanishing where the norm of the gradient is below a hundredth of its median over the run, '
        'exploding above ten times it. Spread over rates: the best mean test score of a rate less '
        f'the worst. Memory: the most that the process held. On {result["hardware"]}. Made by '
        '`python -m experiments.adapters_vs_finetuning`.'
    )
    return '\n'.join([*lines, '', note])


def _edges(rows: Iterable[Sequence[Mapping[str, Any]]]) -> str:
    """Return how often the largest or smallest rate that was tried is the chosen one."""
    found = [(runs.best_rate(own), [run['learning_rate'] for run in own]) for own in rows]
    choices = [(rate, tried) for rate, tried in found if rate is not None]
    return edges.told(choices, 'the learning rate')


def without_norms(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result without the norm of each step, which workdirs have and a picture shows."""
    rows = {
        name: [{key: value for key, value in run.items() if key != 'norms'} for run in found]
        for name, found in result['rows'].items()
    }
    return {**result, 'rows': rows}


def chosen(found: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the runs with the best rate; none where every rate has a run that diverged."""
    rate = runs.best_rate(found)
    return [run for run in found if run['learning_rate'] == rate]


def _scores(title: str, found: Sequence[Mapping[str, Any]]) -> str:
    best = chosen(found)
    if not best:
        return f'| {title} | | | diverged | | | | |'
    share = 100 * best[0]['trainable_parameters'] / best[0]['total_parameters']
    cells = (
        title,
        f'{best[0]["trainable_parameters"]:,} ({share:.3g} %)',
        f'{best[0]["learning_rate"]:.2g}',
        *(_mean(best, key) for key in ('validation', 'test')),
        f'{statistics.mean(run["seconds"] for run in best):.0f}',
        f'{statistics.mean(run["memory"] for run in best) / 2**20:,.0f}',
        f'{best[0]["adapter_bytes"] / 2**20:.2f}',
    )
    return f'| {" | ".join(cells)} |'


def _mean(found: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [run[key] for run in found]
    spread = f' ± {statistics.stdev(values):.3f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.3f}{spread}'


def _steadiness(title: str, found: Sequence[Mapping[str, Any]]) -> str:
    best, well = chosen(found), [run for run in found if 'diverged' not in run]
    lost = len(found) - len(well)
    if not best:
        return f'| {title} | | | | | {lost} of {len(found)} | | |'
    by_rate = [
        statistics.mean(run['test'] for run in well if run['learning_rate'] == rate)
        for rate in {run['learning_rate'] for run in well}
    ]
    tests = [run['test'] for run in best]
    cells = (
        title,
        f'{statistics.mean(run["median_norm"] for run in best):.2g}',
        f'{statistics.mean(run["largest_norm"] / run["median_norm"] for run in best):.1f}',
        *(
            f'{100 * statistics.mean(run[key] for run in best):.1f} %'
            for key in ('vanishing', 'exploding')
        ),
        f'{lost} of {len(found)}',
        f'{statistics.stdev(tests):.3f}' if len(tests) > 1 else '',
        f'{max(by_rate) - min(by_rate):.3f}' if len(by_rate) > 1 else '',
    )
    return f'| {" | ".join(cells)} |'


def main(output: str, data: str, task: str, rows: Sequence[str], seeds: int) -> None:
    """Run everything that is not done; write and print after each row."""
    for name in rows:
        if name not in ROWS:
            raise ValueError(f'unknown row {name!r}; known: {", ".join(ROWS)}')
    directory, setting = files.make_directory(output), Setting(task, data)
    result: dict[str, Any] = {'task': task, 'seeds': list(range(seeds)), 'rows': {}}
    for name in rows:
        result['rows'][name] = train_row(name, seeds, setting, directory)
        ended = (run for run in result['rows'][name] if 'examples' in run)
        result['examples'] = next(ended, {}).get('examples', result.get('examples'))
        write(directory, NAME, without_norms(result) | describe(), render)
    charts.scores(result['rows'], directory / f'{NAME}.png')
    charts.norms(result['rows'], directory / f'{NAME}_norms.png')
    print(f'wrote {directory / NAME}.png and {directory / NAME}_norms.png')


def train_row(name: str, seeds: int, setting: Setting, directory: Path) -> list[dict[str, Any]]:
    """Train a row with all its rates and seeds."""
    row = ROWS[name]
    return [
        runs.train(row, rate, seed, setting, directory / name / f'{rate:.2g}_{seed}')
        for rate in row.rates
        for seed in range(seeds)
    ]


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of workdirs and results.'),
        'data': flags.DEFINE_string('data', None, 'Folder of the set.'),
        'task': flags.DEFINE_string('task', 'trec', 'A task of configs/text_sets.py.'),
        'rows': flags.DEFINE_list('rows', list(ROWS), 'Which ways of training.'),
        'seeds': flags.DEFINE_integer('seeds', 3, 'How many seeds, from 0.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
