"""The command of every paper: `python -m experiments.PAPER --scale=small --data=DATA --output=DIR`.

DATA holds the sets as they are handed out: `sentences` (TREC, CR, Subj, MPQA; see
configs/text_sets.py) at small scale, `glue` (RTE/train.tsv, ...) at full scale; without it GLUE
comes from the hub. Writes DIR/runs/ (the workdirs, shared by all papers that are given the same
DIR), DIR/PAPER_SCALE/PAPER.json, PAPER.md and the figures. Finished runs are not run again.

A report grows: `--tasks=trec` today and `--tasks=cr` tomorrow, on whatever machine has
DIR/PAPER_SCALE/, make one of both. A row that was trained anew takes the place of what stood there.
All of it has the same `--option`s, which the report names.

Where a paper and its published code disagree, `--source=code` takes the settings of the code; its
report is in DIR/PAPER_SCALE_code/.

Many jobs may work on one protocol: `--shard=I/N` trains every N-th cell and writes no report. A
cell that begins with the adapters of others, and finds them not trained yet, is skipped: the part
does all its other cells, tries the skipped ones once more, names those that remain and ends in
order, with status 0. So an array is submitted twice where cells begin with others (pfeiffer2021;
hu2022 at full scale); what is done is not done again. Then the same command without --shard trains
whatever is missing still, and reports. On SLURM:

    job="launch/slurm.sbatch experiments.PAPER --scale=full --output=DIR"
    first=$(sbatch --parsable --array=0-7 $job --shard=%a/8)
    second=$(sbatch --parsable --dependency=afterany:$first --array=0-7 $job --shard=%a/8)
    sbatch --dependency=afterany:$second $job
"""

import json
import logging
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import entry, files
from adapters_jax.training import grid
from adapters_jax.training.provenance import describe
from configs.papers import protocol
from experiments.output import write
from experiments.papers import report
from experiments.papers.runner import NotYetError, Runner
from experiments.papers.study import Cell, Paper, Results

_LOG = logging.getLogger('adapters_jax.papers')
_SMALL = (
    f'Backbone `minilm`, {protocol.SMALL_EXAMPLES:,} training examples of each set (or as many as '
    f'stand behind @), {protocol.SMALL_STEPS} steps of 32.'
)


def run(paper: Paper) -> None:
    """Run the command of a paper."""

    def main(
        scale: str,
        source: str,
        data: str,
        output: str,
        shard: str,
        tasks: list[str],
        options: list[str],
    ) -> None:
        runner = Runner(paper, scale, data, Path(output) / 'runs', tasks, options, source)
        directory = Path(output) / report.folder(paper.name, scale, source)
        if shard:
            earlier(runner, directory)
            train_part(runner, shard)
            return
        finish(runner, files.make_directory(directory))

    entry.run(_define, main)


def train_part(runner: Runner, shard: str) -> None:
    """Train a part, 'I/N', of the cells, and say which of them have to wait."""
    waiting = runner.train(grid.Shard.parse(shard))
    if waiting:
        _LOG.warning(
            'skipped %s, which cannot be trained yet; all else of the part %s is done. Run the '
            'same command once more when the other parts have ended, or without --shard, which '
            'trains what is missing and reports',
            _names(waiting),
            shard,
        )


def _names(cells: list[Cell]) -> str:
    return ', '.join(cell.name for cell in cells)


def earlier(runner: Runner, directory: Path) -> dict[str, Any] | None:
    """Return the report that is there, which this one extends; None where there is none.

    Raises:
        ValueError: it is of another scale or source, or of other options.
    """
    path = directory / f'{runner.paper.name}.json'
    if not path.exists():
        return None
    found = json.loads(path.read_text('utf-8'))
    report.check_same(found, runner.scale, runner.version, runner.options)
    return found


def finish(runner: Runner, directory: Path) -> None:
    """Train what is missing, examine and report.

    Raises:
        NotYetError: another job trains what is missing.
        ValueError: the report that is there is of another scale or source, or of other options.
    """
    paper, scale = runner.paper, runner.scale
    earlier(runner, directory)  # before hours of training
    if waiting := runner.train(grid.Shard(0, 1)):
        raise NotYetError(
            f'no report yet: another job trains, or has to train before, {_names(waiting)}; run '
            'the same command when it has ended'
        )
    rows = [row for cell in runner.cells for row in runner.rows(cell)]
    results = Results(rows, {}, scale)
    results.examined = paper.examine(results, runner.runs)
    if known := earlier(runner, directory):
        results = report.extended(known, results, runner.version, runner.options)
    result = {
        'paper': paper.name,
        'title': paper.title,
        'scale': scale,
        'source': runner.version,
        'options': list(runner.options),
        'settings': _SMALL if scale == 'small' else '',
        'command': f'python -m experiments.{paper.name} --scale={scale}{_told(runner, results)}',
        **report.judged(paper, results, directory, runner.version, runner.options),
        **describe(),
    }
    write(directory, paper.name, result, report.render)
    for name in result['figures']:
        print(f'wrote {directory / name}')


def _told(runner: Runner, results: Results) -> str:
    found = list(dict.fromkeys(row.task for row in results.rows))
    every = {cell.task for cell in runner.paper.cells(runner.scale)}
    tasks = f' --tasks={",".join(found)}' * (set(found) != every)
    source = f' --source={runner.version}' * (runner.version != 'paper')
    return source + tasks + ''.join(f' --option={option}' for option in runner.options)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'scale': flags.DEFINE_enum('scale', 'small', protocol.SCALES, 'Of the protocol.'),
        'source': flags.DEFINE_enum('source', 'paper', protocol.BOTH, 'Whose settings.'),
        'data': flags.DEFINE_string('data', '', 'Folder of the data sets.'),
        'output': flags.DEFINE_string('output', None, 'Directory of runs and report.'),
        'shard': flags.DEFINE_string('shard', '', 'I/N: train every N-th cell, report nothing.'),
        'tasks': flags.DEFINE_list('tasks', [], 'Instead of all.'),
        'options': flags.DEFINE_multi_string('option', [], 'KEY=VALUE for every run.'),
    }
