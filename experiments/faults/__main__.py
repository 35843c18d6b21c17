"""Kill and damage short runs at random, and see whether anything is ever lost or wrong.

    python -m experiments.faults --output=DIR [--faults=200] [--seed=0] [--processes=2]

Every attempt is a command in a process of its own, on a toy backbone and toy texts. Writes
DIR/faults.json (every fault: which, when, how the attempt ended, where the next one began) and
DIR/faults.md; runs that were lost or wrong stay in DIR/trials. The exit status is 1 if there are
any, or if an attempt did not end as it must.
"""

import sys

from absl import flags

from adapters_jax import entry, files
from adapters_jax.training.provenance import describe
from experiments.faults.campaign import Campaign
from experiments.faults.report import render, totals
from experiments.output import write


def main(output: str, faults: int, seed: int, processes: int) -> None:
    """Run the campaign; write the numbers and the table.

    Raises:
        ValueError: no fault, or no process.
    """
    if faults < 1 or processes < 1:
        raise ValueError(f'--faults={faults}, --processes={processes}: expected 1 or more of each')
    directory = files.make_directory(output)
    result = Campaign(directory.resolve(), faults, seed).run(processes) | describe()
    write(directory, 'faults', result, render)
    sums = totals(result)
    if sums['lost'] or sums['wrong'] or sums['ended as it must'] < sums['injected']:
        sys.exit(1)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'faults': flags.DEFINE_integer('faults', 200, 'How many faults.'),
        'seed': flags.DEFINE_integer('seed', 0, 'Which faults come when.'),
        'processes': flags.DEFINE_integer('processes', 2, 'How many runs at a time.'),
    }


if __name__ == '__main__':
    entry.run(_define, main)
