"""The results table of the README: three text tasks, several seeds, one command.

    python -m experiments.text_tasks --output=DIR --glue=GLUE --stsb=STSB [--tasks=trec,rte,stsb]

GLUE holds RTE/train.tsv and RTE/dev.tsv; STSB holds stsb-en-train.csv, stsb-en-dev.csv and
stsb-en-test.csv (sentence, sentence, score from 0 to 5; no header). Runs that are finished are not
run again. Writes DIR/TASK_METHOD_SEED/ (workdirs) and results/TASK_METHOD.json beside this file;
`python -m experiments.table` puts these into the README.
"""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import entry, files
from adapters_jax.config import Config
from adapters_jax.evaluate import evaluate
from adapters_jax.train import train
from configs import glue, quickstart, text_classification

RESULTS = Path(__file__).parent / 'results'


def trec(method: str, _: dict[str, Path]) -> tuple[Config, str, str]:
    """Questions by type: the quickstart, on its 1,000 held-out questions."""
    command = f'--config=configs/quickstart.py:method={method}'
    return quickstart.get_config(f'method={method}'), 'test', command


def rte(method: str, folders: dict[str, Path]) -> tuple[Config, str, str]:
    """Textual entailment (GLUE), on its validation set, as papers report it."""
    config = glue.get_config(f'task=rte,method={method}')
    config.data.dir = str(folders['glue'])
    command = f'--config=configs/glue.py:task=rte,method={method} --config.data.dir=GLUE'
    return config, 'validation', command


def stsb(method: str, folders: dict[str, Path]) -> tuple[Config, str, str]:
    """Similarity of sentences (STS benchmark, English), on its test set."""
    config = text_classification.get_config(f'task=regression,method={method}')
    names = {'train': 'train', 'validation': 'dev', 'test': 'test'}
    for split, name in names.items():
        config.data[split] = str(folders['stsb'] / f'stsb-en-{name}.csv')
    config.data.header = 'false'
    columns = {'text_a': '0', 'text_b': '1', 'label': '2'}
    config.data.columns.update(columns)
    config.training.epochs = 3.0
    options = ' '.join(f'--config.data.{k}=STSB/stsb-en-{v}.csv' for k, v in names.items())
    options += ' --config.data.header=false ' + ' '.join(
        f'--config.data.columns.{key}={place}' for key, place in columns.items()
    )
    command = f'--config=configs/text_classification.py:task=regression,method={method} {options}'
    return config, 'test', f'{command} --config.training.epochs=3'


TASKS = {'trec': trec, 'rte': rte, 'stsb': stsb}


def run(
    task: str, method: str, seeds: Sequence[int], folders: dict[str, Path], output: Path
) -> dict[str, Any]:
    """Train and evaluate one task and method with each seed; return and store what came out."""
    runs = []
    for seed in seeds:
        config, split, command = TASKS[task](method, folders)
        config.seed = seed
        workdir = output / f'{task}_{method}_{seed}'
        summary = train(config, workdir)
        path = workdir / f'evaluation_{split}.json'
        if not path.exists():
            evaluate(workdir, split)
        runs.append(summary | {'evaluation': json.loads(path.read_text()), 'seed': seed})
    result = {'task': task, 'method': method, 'split': split, 'command': command}
    result |= over_seeds(runs)
    files.write_json(RESULTS / f'{task}_{method}.json', result)
    return result


def over_seeds(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean, standard deviation and values of each metric, and what the runs share."""
    metrics = {
        name: [run['evaluation']['metrics'][name] for run in runs]
        for name in runs[0]['evaluation']['metrics']
    }
    same = ('primary', 'trainable_parameters', 'total_parameters', 'hardware', 'commit', 'versions')
    return {
        'examples': runs[0]['evaluation']['examples'],
        'seeds': [run['seed'] for run in runs],
        'metrics': {
            name: {
                'mean': statistics.mean(values),
                'deviation': statistics.stdev(values) if len(values) > 1 else 0.0,
                'values': values,
            }
            for name, values in metrics.items()
        },
        'seconds': [run['seconds'] for run in runs],
    } | {key: runs[0][key] for key in same}


def main(
    output: str, glue: str, stsb: str, tasks: Sequence[str], methods: Sequence[str], seeds: int
) -> None:
    """Run every task with every method."""
    folders = {'glue': Path(glue), 'stsb': Path(stsb)}
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f'unknown task {task!r}; known: {", ".join(TASKS)}')
    for task in tasks:
        for method in methods:
            result = run(task, method, range(seeds), folders, Path(output))
            scores = {k: v['mean'] for k, v in result['metrics'].items()}
            print(f'{task}, {method}, {result["split"]}:\n{entry.table(scores)}')
    print(f'wrote {RESULTS}')


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'output': flags.DEFINE_string('output', None, 'Directory of the workdirs.'),
        'glue': flags.DEFINE_string('glue', '', 'Folder of GLUE task folders.'),
        'stsb': flags.DEFINE_string('stsb', '', 'Folder of the STS benchmark.'),
        'tasks': flags.DEFINE_list('tasks', list(TASKS), 'Which tasks.'),
        'methods': flags.DEFINE_list('methods', ['houlsby'], 'Which methods.'),
        'seeds': flags.DEFINE_integer('seeds', 3, 'How many seeds, from 0.'),
    }
    flags.mark_flag_as_required('output')
    return holders


if __name__ == '__main__':
    entry.run(_define, main)
