"""The table of tasks in docs/results.md: text tasks, methods and seeds, one command.

    python -m experiments.text_tasks --output=DIR --data=DATA [--tasks=trec,rte,...]
        [--methods=houlsby,full,head] [--seeds=3]

DATA holds public sets as they are handed out, each in its folder: glue/RTE (train.tsv, dev.tsv),
stsb_multi_mt (stsb-en-train.csv, -dev, -test: sentence, sentence, score; no header), sentences,
banking77 and clinc150 (see configs/text_sets.py), ud_ewt (UD English EWT), wnut17, and xquad
(xquad.en.json). Runs that are finished are not run again; of those done on another machine
summary.json and evaluation_SPLIT.json are enough. Writes DIR/TASK_METHOD_SEED/ (workdirs) and
results/TASK_METHOD.json beside this file; `python -m experiments.table` puts these into
the page.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags

from adapters_jax import entry, files
from adapters_jax.config import Config, assign
from adapters_jax.evaluate import evaluate
from adapters_jax.train import check_same_run, train
from configs import glue, question_answering, quickstart, tagging, text_classification, text_sets

RESULTS = Path(__file__).parent / 'results'


class Task(NamedTuple):
    """A row of the table for each method.

    `options` are those of the command beside its config; DIR in them stands for the data's folder.
    """

    title: str
    config: str  # the file, and what it is given beside the method
    make: Callable[[str], Config]
    folder: str = ''
    options: tuple[str, ...] = ()
    split: str = 'test'


STSB = (
    *(f'data.{to}=DIR/stsb-en-{of}.csv' for to, of in (('train', 'train'), ('validation', 'dev'))),
    'data.test=DIR/stsb-en-test.csv',
    'data.header=false',
    *(f'data.columns.{key}={n}' for n, key in enumerate(('text_a', 'text_b', 'label'))),
    'training.epochs=3.0',
)
WNUT = (
    'data.train=DIR/wnut17train.conll',
    'data.validation=DIR/emerging.dev.conll',
    'data.test=DIR/emerging.test.annotated',
    'training.epochs=6.0',
)
SETS = {
    'trec_500': ('trec', 'sentences', 'TREC, the 500 test questions'),
    'cr': ('cr', 'sentences', 'CR, customer reviews'),
    'subj': ('subj', 'sentences', 'Subj, subjectivity'),
    'mpqa': ('mpqa', 'sentences', 'MPQA, opinions'),
    'banking77': ('banking77', 'banking77', 'banking77, 77 intents'),
    'clinc150': ('clinc150', 'clinc150', 'clinc150, 150 intents and none of them'),
}
TASKS = {
    'trec': Task('TREC questions, 6 classes', 'quickstart.py:', quickstart.get_config),
    'rte': Task(
        *('RTE (GLUE)', 'glue.py:task=rte,', glue.get_config, 'glue', ('data.dir=DIR',)),
        split='validation',  # as papers report it
    ),
    'stsb': Task(
        *('STS-B, English', 'text_classification.py:task=regression,'),
        *(text_classification.get_config, 'stsb_multi_mt', STSB),
    ),
    **{
        key: Task(
            *(title, f'text_sets.py:task={task},', text_sets.get_config),
            *(folder, ('data.dir=DIR',)),
        )
        for key, (task, folder, title) in SETS.items()
    },
    'pos': Task(
        *('UD English EWT, UPOS', 'tagging.py:', tagging.get_config),
        *('ud_ewt', ('data.dir=DIR', 'training.epochs=3.0')),
    ),
    'ner': Task('WNUT17, named entities', 'tagging.py:', tagging.get_config, 'wnut17', WNUT),
    'qa': Task(
        *('XQuAD, English, by paragraph', 'question_answering.py:', question_answering.get_config),
        *('xquad', ('data.train=DIR/xquad.en.json', 'training.epochs=4.0')),
    ),
}
# The rates of methods that are no adapters, where a task's config knows one for adapters only.
RATES = {'full': 2e-4, 'head': 1e-2}


def make_config(task: str, method: str, data: Path) -> tuple[Config, str]:
    """Return the config of a run, and the command that a reader would type for it."""
    row = TASKS[task]
    given = f'{row.config.partition(":")[2]}method={method}'
    options = [*row.options]
    if method in RATES and task not in SETS:
        options.append(f'optimizer.learning_rate={RATES[method]}')
    config = row.make(given)
    for option in options:
        key, _, value = option.partition('=')
        assign(config, key, value.replace('DIR', str(data / row.folder)))
    command = f'--config=configs/{row.config}method={method}'
    return config, ' '.join([command, *(f'--config.{option}' for option in options)])


def run(task: str, method: str, seeds: Sequence[int], data: Path, output: Path) -> dict[str, Any]:
    """Train and evaluate one task and method with each seed; return and store what came out."""
    runs, split = [], TASKS[task].split
    for seed in seeds:
        config, command = make_config(task, method, data)
        config.seed = seed
        workdir = output / f'{task}_{method}_{seed}'
        found = [workdir / 'summary.json', workdir / f'evaluation_{split}.json']
        check_same_run(config, workdir)
        if not found[1].exists():  # which is written last
            train(config, workdir)
            evaluate(workdir, split)
        summary, evaluation = (json.loads(path.read_text()) for path in found)
        runs.append(summary | {'evaluation': evaluation, 'seed': seed})
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
    same = ('primary', 'trainable_parameters', 'total_parameters')
    versions = [run['versions'] for run in runs]
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
        'hardware': '; '.join(dict.fromkeys(run['hardware'] for run in runs)),
        'commits': list(dict.fromkeys(run['commit'] for run in runs)),
        'versions': [own for i, own in enumerate(versions) if own not in versions[:i]],
    } | {key: runs[0][key] for key in same}


def main(output: str, data: str, tasks: Sequence[str], methods: Sequence[str], seeds: int) -> None:
    """Run every task with every method."""
    for task in tasks:
        if task not in TASKS:
            raise ValueError(f'unknown task {task!r}; known: {", ".join(TASKS)}')
    for task in tasks:
        for method in methods:
            result = run(task, method, range(seeds), Path(data), Path(output))
            scores = {k: v['mean'] for k, v in result['metrics'].items()}
            print(f'{task}, {method}, {result["split"]}:\n{entry.table(scores)}')
    print(f'wrote {RESULTS}')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the workdirs.'),
        'data': flags.DEFINE_string('data', '', 'Folder of the sets, each in its own.'),
        'tasks': flags.DEFINE_list('tasks', list(TASKS), 'Which tasks.'),
        'methods': flags.DEFINE_list('methods', ['houlsby'], 'Which methods.'),
        'seeds': flags.DEFINE_integer('seeds', 3, 'How many seeds, from 0.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
