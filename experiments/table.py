"""Puts the stored results into the README and the pages of docs/: `python -m experiments.table`.

No number there is typed by hand; a test renders the tables again and compares. A benchmark's
results get here by copying its JSON file into `results/bench/`.
"""

import importlib
import json
import statistics
from pathlib import Path
from typing import Any

from adapters_jax import entry
from adapters_jax.training.ranking import line
from experiments.bench import headlines
from experiments.output import shortened
from experiments.papers import summary
from experiments.text_tasks import RESULTS, TASKS

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md')))
# What the tests found, rendered by the module that says how.
TESTED = {'conformance': 'experiments.conformance', 'families': 'experiments.families'}
# What each benchmark is rendered by; its file and its marks have the same name.
BENCHES = {
    'mixed_adapters': 'experiments.bench.mixed_adapters',
    'population': 'experiments.bench.population',
    'adapter_drop': 'experiments.bench.adapter_drop',
    'adapter_drop_scores': 'experiments.adapter_drop_scores',
    'scaling': 'experiments.bench.scaling',
    'memory': 'experiments.bench.memory',
    'frozen_dtype_scores': 'experiments.frozen_dtype_scores',
    'faults': 'experiments.faults.report',
    'adapters_vs_finetuning': 'experiments.adapters_vs_finetuning.__main__',
    'products': 'experiments.bench.products',
    'parts': 'experiments.bench.parts',
    'preprocessing': 'experiments.preprocessing',
    'choose': 'experiments.choice',
    'translation': 'experiments.domains.translation',
    'speech': 'experiments.domains.speech',
    'images': 'experiments.domains.images',
    'bench': 'experiments.bench.__main__',
    'bench_gpu': 'experiments.bench.__main__',
    'population_gpu': 'experiments.bench.population',
}
COLUMNS = (
    *('task', 'method', 'trained parameters', 'metric', 'mean ± s.d.', 'seeds', 'split'),
    *('minutes', 'on'),
)
# Methods that are no adapters: their rows stand below those of adapters.
BASELINES = ('full', 'head')


def render(results: list[dict[str, Any]]) -> str:
    """Return the Markdown table of results, and below it where they come from."""
    lines = [
        f'| {" | ".join(COLUMNS)} |',
        '|---' * len(COLUMNS) + '|',
        *(_row(result) for result in results),
    ]
    hardware = '; '.join(sorted({kind for result in results for kind in _machines(result)}))
    commits = ', '.join(sorted({name for result in results for name in _commits(result)}))
    jax = ' and '.join(sorted({own['jax'] for result in results for own in _versions(result)}))
    note = (
        'Backbone `minilm`; minutes are of training, the median over the seeds, of which later '
        f'ones may find programs that an earlier one has compiled, on {hardware}. '
        'A row whose seeds were trained on both has none. Scores on a split `validation` are of '
        'the step that is best there. Commits '
        f'{commits} (+: files had changed since), JAX {jax}. Made by `python -m '
        'experiments.text_tasks`; the command of each row is in `experiments/results/`.'
    )
    return '\n'.join([*lines, '', note])


def _row(result: dict[str, Any]) -> str:
    share = 100 * result['trainable_parameters'] / result['total_parameters']
    metric = result['primary']
    score = result['metrics'][metric]
    spread = f' ± {score["deviation"]:.3f}' if len(result['seeds']) > 1 else ''
    seconds, mixed = result['seconds'], len(_machines(result)) > 1
    minutes = '–' if mixed else f'{statistics.median(seconds) / 60:.1f}'
    cells = (
        TASKS[result['task']].title,
        f'`{result["method"]}`',
        f'{result["trainable_parameters"]:,} ({share:{".1f" if share >= 0.1 else ".1g"}} %)',
        metric,
        f'{score["mean"]:.3f}{spread}',
        str(len(result['seeds'])),
        f'{result["split"]} ({result["examples"]:,})',
        minutes,
        ', '.join('CPU' if ' cores of ' in kind else 'GPU' for kind in _machines(result)),
    )
    return line(cells)


def _commits(result: dict[str, Any]) -> list[str]:
    names = result.get('commits') or [result['commit']]  # as it was stored at first: of one seed
    return [f'`{shortened(name)}`' for name in names]


def _versions(result: dict[str, Any]) -> list[dict[str, str]]:
    found = result['versions']
    return [found] if isinstance(found, dict) else found


def _machines(result: dict[str, Any]) -> list[str]:
    return result['hardware'].split('; ')


def read_results() -> list[dict[str, Any]]:
    """Return the stored results in the order of the table."""
    results = [json.loads(path.read_text()) for path in RESULTS.glob('*.json')]
    tasks = list(TASKS)

    def place(result: dict[str, Any]) -> tuple[int, int, str]:
        method = result['method']
        rank = BASELINES.index(method) + 1 if method in BASELINES else 0
        return tasks.index(result['task']), rank, method

    return sorted(results, key=place)


def insert(text: str, table: str, name: str = 'results') -> str:
    """Return a page's text with the table between the two marks of that name.

    Raises:
        ValueError: a mark is missing.
    """
    begin, end = marks(name)
    if begin not in text or end not in text:
        raise ValueError(f'the page lacks the mark {begin} or {end}')
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f'{before}{begin}\n{table}\n{end}{after}'


def marks(name: str) -> tuple[str, str]:
    """Return between which lines of a page the table of that name stands."""
    return f'<!-- {name}: begin -->', f'<!-- {name}: end -->'


def tables() -> dict[str, str]:
    """Return the tables of all stored results by name."""
    found = {'results': render(read_results()), 'papers': summary.render(summary.read())}
    for name, module in TESTED.items():
        source = importlib.import_module(module)
        found[name] = source.render(json.loads(source.STORED.read_text('utf-8')))
    for name, module in BENCHES.items():
        found[name] = importlib.import_module(module).render(read_bench(name))
    races = (read_bench(name) for name in ('bench', 'bench_gpu'))
    return found | {'headlines': headlines.render(*races)}


def read_bench(name: str) -> dict[str, Any]:
    """Return what is stored of a benchmark."""
    return json.loads((RESULTS / 'bench' / f'{name}.json').read_text('utf-8'))


def with_tables(text: str, found: dict[str, str]) -> str:
    """Return a page's text with those of the tables that it has the marks of."""
    for name, table in found.items():
        if marks(name)[0] in text:
            text = insert(text, table, name)
    return text


def main() -> None:
    """Put all stored results into the pages."""
    found = tables()
    for page in PAGES:
        page.write_text(with_tables(page.read_text('utf-8'), found), 'utf-8')
        print(f'wrote the tables of {page.relative_to(ROOT)}')


if __name__ == '__main__':
    entry.run(dict, main)
