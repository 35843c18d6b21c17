"""The fair race: ours against `adapters` and `peft`, on this machine, in one command.

    python -m experiments.bench --output=DIR [--only=train_step,inference,...] [--rounds=5]
        [--data=GLUE] [--examples=1600]

The same weights, the same examples, in turns; what is reported are ratios and the middle half of
their rounds. `--data` is a folder with GLUE's RTE, which the epoch then has beside TREC. On a GPU
the steps are in bfloat16 against torch under `torch.compile`. Writes DIR/bench.json, DIR/bench.md
and DIR/bench.png; a race that was run before stays in them until it is run again. All of it takes
about an hour on two cores.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from adapters_jax import entry, files
from adapters_jax.training.provenance import describe
from experiments.bench import chart, decoding, mixed_adapters, steps, whole_runs
from experiments.bench.race import Race
from experiments.output import write

Runner = Callable[[Path, int, str, int], Iterable[Race]]

RACES: dict[str, Runner] = {
    'train_step': lambda root, rounds, data, examples: steps.train_step(root, rounds),
    'inference': lambda root, rounds, data, examples: steps.inference(root, rounds),
    'epoch': whole_runs.epoch,
    'sweep': whole_runs.sweep,
    'mixed_adapters': lambda root, rounds, data, examples: mixed_adapters.races(rounds),
    'decoding': lambda root, rounds, data, examples: decoding.races(root, rounds),
    'first_step': lambda root, rounds, data, examples: whole_runs.first_step(root, rounds),
    'memory': lambda root, rounds, data, examples: whole_runs.memory(root, rounds),
}


def collect(races: Iterable[Race]) -> dict[str, Any]:
    """Return the first race, which claims are made of, with the others below `more`."""
    first, *rest = (race.to_json() for race in races)
    return first | {'more': rest}


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    lines = ['| race | course | ours | theirs | theirs / ours | of the rate |', '|---' * 6 + '|']
    for name in RACES:
        if name in result:
            lines += [_line(name, race) for race in (result[name], *result[name]['more'])]
    note = (
        'Medians, and ratios with the middle half of their rounds in brackets: above 1 is faster, '
        'or less memory. *Of the rate*: arithmetic of matrix products in a second, as a part of '
        'what one large product reaches on the same machine. Heads are two dense layers on the '
        "first token's state, as `adapters` has them: of the last layer ours computes no other "
        'token. Over 2 devices means `JAX_NUM_CPU_DEVICES=2`. Where each side has processes of its '
        'own, ours of `epoch`, `sweep` and `memory` are started as by the scripts in `launch/`, '
        'with memory in large pages, those of `first_step` where it says so, and theirs as they '
        'come. On '
        f'{result["hardware"]}. Made by `python -m experiments.bench`.'
    )
    return '\n'.join([*lines, '', note])


def _line(name: str, race: dict[str, Any]) -> str:
    low, high = race['spread']
    digits = 0 if race['unit'] == 'MiB' else 3
    cells = (
        f'`{name}`',
        race['title'],
        *(f'{race[side]:,.{digits}f} {race["unit"]}' for side in ('ours', 'theirs')),
        f'{race["ratio"]:.2f} ({low:.2f} to {high:.2f})',
        f'{100 * race["share_of_rate"]:.0f} %' if 'share_of_rate' in race else '',
    )
    return f'| {" | ".join(cells)} |'


def main(output: str, only: Sequence[str], rounds: int, data: str, examples: int) -> None:
    """Run the races; write numbers, table and chart after each, so that none is lost."""
    for name in only:
        if name not in RACES:
            raise ValueError(f'unknown race {name!r}; known: {", ".join(RACES)}')
    directory = files.make_directory(output)
    path = directory / 'bench.json'
    result = json.loads(path.read_text()) if path.exists() else {}
    for name in only:
        result[name] = collect(RACES[name](directory, rounds, data, examples))
        result |= describe() | {'rounds': rounds}
        write(directory, 'bench', result, render)
    chart.draw({name: result[name] for name in RACES if name in result}, directory / 'bench.png')
    print(f'wrote {directory / "bench.png"}')


def _define() -> dict[str, flags.FlagHolder]:
    holders = {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'only': flags.DEFINE_list('only', list(RACES), 'Which races.'),
        'rounds': flags.DEFINE_integer('rounds', 5, 'Rounds of each race.', lower_bound=1),
        'data': flags.DEFINE_string('data', '', 'Folder with RTE of GLUE; empty: TREC alone.'),
        'examples': flags.DEFINE_integer('examples', 1600, 'Texts of an epoch.', lower_bound=32),
    }
    flags.mark_flag_as_required('output')
    return holders


if __name__ == '__main__':
    # The public libraries stand on torch, which our commands keep transformers from importing.
    os.environ['USE_TORCH'] = '1'
    jax.config.update('jax_num_cpu_devices', steps.CPU_DEVICES)
    entry.run(_define, main)
