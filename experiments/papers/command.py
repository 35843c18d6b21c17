"""The command of every paper: `python -m experiments.PAPER --scale=small --data=DATA --output=DIR`.

DATA holds the sets as they are handed out: `sentences` (TREC, CR, Subj, MPQA; see
configs/text_sets.py) at small scale, `glue` (RTE/train.tsv, ...) at full scale; without it GLUE
comes from the hub. Writes DIR/runs/ (the workdirs, shared by all papers that are given the same
DIR), DIR/PAPER_SCALE/PAPER.json, PAPER.md and the figures. Finished runs are not run again.

A report grows: `--tasks=trec` today and `--tasks=cr` tomorrow, on whatever machine has
DIR/PAPER_SCALE/, make one of both. A row that was trained anew takes the place of what stood there.

Many jobs may work on one protocol: `--shard=I/N` trains every N-th cell and writes no report; cells
that begin with the adapters of others wait until those are done. The same command without it trains
what is missing, and reports. On SLURM:

    sbatch --array=0-7 launch/slurm.sbatch experiments.PAPER --shard=%a/8 --scale=full --output=DIR
"""

import json
from pathlib import Path

from absl import flags

from adapters_jax import entry, files
from adapters_jax.training import grid
from adapters_jax.training.provenance import describe
from configs.papers import protocol
from experiments.output import write
from experiments.papers import report
from experiments.papers.runner import Runner
from experiments.papers.study import Paper, Results

_SMALL = (
    f'Backbone `minilm`, {protocol.SMALL_EXAMPLES:,} training examples of each set (or as many as '
    f'stand behind @), {protocol.SMALL_STEPS} steps of 32.'
)


def run(paper: Paper) -> None:
    """Run the command of a paper."""

    def main(
        scale: str, data: str, output: str, shard: str, tasks: list[str], options: list[str]
    ) -> None:
        runner = Runner(paper, scale, data, Path(output) / 'runs', tasks, options)
        if shard:
            runner.train(grid.Shard.parse(shard))
            return
        finish(runner, files.make_directory(Path(output) / f'{paper.name}_{scale}'))

    entry.run(_define, main)


def finish(runner: Runner, directory: Path) -> None:
    """Train what is missing, examine and report."""
    paper, scale = runner.paper, runner.scale
    runner.train(grid.Shard(0, 1))
    rows = [row for cell in runner.cells for row in runner.rows(cell)]
    results = Results(rows, {}, scale)
    results.examined = paper.examine(results, runner.runs)
    before = directory / f'{paper.name}.json'
    if before.exists():
        results = report.extended(json.loads(before.read_text('utf-8')), results)
    result = {
        'paper': paper.name,
        'title': paper.title,
        'scale': scale,
        'settings': _SMALL if scale == 'small' else '',
        'command': f'python -m experiments.{paper.name} --scale={scale}{_told(runner, results)}',
        'titles': dict(paper.titles),
        'expected': report.read_expected(paper.name),
        'figures': [path.name for path in paper.draw(results, directory)],
        **report.to_json(results, list(paper.findings(results))),
        **describe(),
    }
    write(directory, paper.name, result, report.render)
    for name in result['figures']:
        print(f'wrote {directory / name}')


def _told(runner: Runner, results: Results) -> str:
    found = list(dict.fromkeys(row.task for row in results.rows))
    every = {cell.task for cell in runner.paper.cells(runner.scale)}
    tasks = f' --tasks={",".join(found)}' * (set(found) != every)
    return tasks + ''.join(f' --option={option}' for option in runner.options)


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'scale': flags.DEFINE_enum('scale', 'small', protocol.SCALES, 'Of the protocol.'),
        'data': flags.DEFINE_string('data', '', 'Folder of the data sets.'),
        'output': flags.DEFINE_string('output', None, 'Directory of runs and report.'),
        'shard': flags.DEFINE_string('shard', '', 'I/N: train every N-th cell, report nothing.'),
        'tasks': flags.DEFINE_list('tasks', [], 'Instead of all.'),
        'options': flags.DEFINE_multi_string('option', [], 'KEY=VALUE for every run.'),
    }
    flags.mark_flag_as_required('output')
    return holders
