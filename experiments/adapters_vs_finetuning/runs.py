"""What is trained, each run by the commands that a reader would type, in processes of their own."""

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# What `adapters_jax.train` advises where a loss or a parameter is no number any more.
_DIVERGED = 'try a lower optimizer.learning_rate'


@dataclasses.dataclass(frozen=True)
class Row:
    """A way of training: its method, the middle one of its learning rates, and what else it takes.

    Rates that are tried are a third of it, itself, and three times it, unless it is `fixed`.
    """

    title: str
    method: str
    rate: float
    options: tuple[str, ...] = ()
    fixed: bool = False

    @property
    def rates(self) -> tuple[float, ...]:
        """The learning rates that are tried."""
        return (self.rate,) if self.fixed else (self.rate / 3, self.rate, 3 * self.rate)


ROWS = {
    'plain_bert': Row(
        'BERT and a linear classifier, Adam at 1e-5, batch 16, 3 epochs',
        *('full', 1e-5),
        (
            'optimizer.schedule=constant',
            'optimizer.warmup=0',
            'optimizer.weight_decay=0',
            'optimizer.clip_norm=0',
            'training.batch_size=16',
            'training.epochs=3.0',
            'head.pooling=cls',
        ),
        fixed=True,
    ),
    'full': Row('full fine-tuning', 'full', 2e-4),
    'houlsby': Row('Houlsby adapters', 'houlsby', 2e-3),
    'pfeiffer': Row('Pfeiffer adapters', 'pfeiffer', 2e-3),
    'lora': Row('LoRA', 'lora', 2e-3),
    'head': Row('the classifier alone', 'head', 1e-2),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What all rows have in common: the task, where its files are, further options of all runs."""

    task: str
    data: str
    options: tuple[str, ...] = ()


def train(row: Row, rate: float, seed: int, setting: Setting, workdir: Path) -> dict[str, Any]:
    """Train and evaluate, unless that is done; return what the report needs of the run.

    A run that diverged is one that says so, and has no scores.

    Raises:
        RuntimeError: the command failed in another way; with what it printed.
    """
    given = _arguments(row, rate, seed, setting, setting.data, str(workdir))
    told = _command('train', given)
    found: dict[str, Any] = {'learning_rate': rate, 'seed': seed}
    # The folders of one machine say nothing to a reader.
    found['command'] = ' '.join(_arguments(row, rate, seed, setting, 'DATA', 'DIR'))
    found |= norms(workdir / 'metrics.jsonl')
    if told:
        return found | {'diverged': told}
    if not (workdir / 'evaluation_test.json').exists():
        _command('evaluate', [f'--workdir={workdir}', '--split=test'])
    summary = json.loads((workdir / 'summary.json').read_text())
    scores = json.loads((workdir / 'evaluation_test.json').read_text())
    return found | {
        'validation': summary['metrics']['validation'][summary['primary']],
        'test': scores['metrics'][summary['primary']],
        'examples': scores['examples'],
        'seconds': summary['seconds'],
        'memory': _memory(summary['peak_memory_bytes']),
        'trainable_parameters': summary['trainable_parameters'],
        'total_parameters': summary['total_parameters'],
        'adapter_bytes': sum(path.stat().st_size for path in (workdir / 'adapter').iterdir()),
    }


def _arguments(
    row: Row, rate: float, seed: int, setting: Setting, data: str, workdir: str
) -> list[str]:
    return [
        f'--config=configs/text_sets.py:task={setting.task},method={row.method}',
        f'--config.data.dir={data}',
        *(f'--config.{option}' for option in (*row.options, *setting.options)),
        f'--config.optimizer.learning_rate={rate}',
        f'--config.seed={seed}',
        f'--workdir={workdir}',
    ]


def _command(name: str, given: Sequence[str]) -> str:
    """Run a command; return the sentence of one that diverged, else nothing."""
    command = [sys.executable, '-m', f'adapters_jax.{name}', *given]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if done.returncode == 0:
        return ''
    last = done.stderr.strip().rpartition('\n')[2].removeprefix('error: ')
    if done.returncode == 2 and _DIVERGED in last:
        return last
    raise RuntimeError(f'{" ".join(command)} ended with {done.returncode}:\n{done.stderr}')


def _memory(peak: Mapping[str, int]) -> int:
    """Return the peak where training has its arrays: on the device, where that tells its own."""
    return peak.get('device', peak['host'])


def norms(path: Path) -> dict[str, Any]:
    """Return the norms of the gradient at each step of a metrics.jsonl, and how they spread.

    Nothing where no step is recorded: a run that diverged in its first one.
    `vanishing` is the share of steps with a norm below a hundredth of the median, `exploding` that
    with one above ten times the median.
    """
    lines = map(json.loads, path.read_text().splitlines() if path.exists() else [])
    found = [line['values']['gradient_norm'] for line in lines if line['split'] == 'train']
    if not found:
        return {}
    middle = statistics.median(found)
    return {
        'norms': [float(f'{norm:.4g}') for norm in found],
        'median_norm': middle,
        'largest_norm': max(found),
        'vanishing': sum(norm < middle / 100 for norm in found) / len(found),
        'exploding': sum(norm > 10 * middle for norm in found) / len(found),
    }


def best_rate(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the rate with the best mean validation score of those whose runs all ended well."""
    means = {}
    for rate in {run['learning_rate'] for run in runs}:
        own = [run for run in runs if run['learning_rate'] == rate]
        if not any('diverged' in run for run in own):
            means[rate] = statistics.mean(run['validation'] for run in own)
    return max(means, key=lambda rate: (means[rate], -rate)) if means else None
