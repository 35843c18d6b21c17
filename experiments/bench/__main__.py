"""The fair race: ours against `adapters` and `peft`, on this machine, in one command.

    python -m experiments.bench --output=DIR [--only=train_step,inference,...] [--rounds=5]
        [--data=GLUE] [--examples=1600]

The same weights, the same examples, in turns; what is reported are ratios and the middle half of
their rounds. On a CPU theirs is eager and ours is compiled. `--data` is a folder with GLUE's RTE,
which the epoch then has beside TREC. On a GPU steps, epochs and the sweep are in bfloat16, steps
against `peft` under `torch.compile`. Writes DIR/bench.json, DIR/bench.md and DIR/bench.png; a race
that was run before stays in them until it is run again, and each says of which commit it is. All of
it takes about an hour on two cores.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from adapters_jax import entry, files
from experiments.bench import chart, decoding, libraries, mixed_adapters, sizes, steps, whole_runs
from experiments.bench.headlines import amount, ratio
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
    'file_size': lambda root, rounds, data, examples: sizes.races(root),
}
ROUNDS, EXAMPLES = 5, 1600  # unless asked for others
_PROVENANCE = ('hardware', 'versions', 'commit')


def collect(races: Iterable[Race], provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the first race, which claims are made of, with the others below `more`."""
    first, *rest = (race.to_json() for race in races)
    return first | {'more': rest} | provenance


def read(path: Path) -> dict[str, Any]:
    """Return what is stored of each race, in the order of the table.

    Raises:
        ValueError: a race that does not say where its numbers come from.
    """
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {name: result[name] for name in RACES if name in result}
    for name, race in result.items():
        if missing := [key for key in _PROVENANCE if key not in race]:
            raise ValueError(
                f'{path}: the race {name!r} lacks {", ".join(missing)}; expected what an earlier '
                'run of this version wrote: move the file away, or give another --output'
            )
    return result


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    heads = ('race', 'workload', 'ours', 'theirs', 'theirs / ours', 'share of rate')
    lines = [f'| {" | ".join(heads)} |', '|---' * len(heads) + '|']
    for name, first in result.items():
        lines += [_line(name, race) for race in (first, *first['more'])]
    return '\n'.join([*lines, '', _how(result), '', *_where(result)])


_HOW = (
    "Medians; the ratio is the median of the rounds' own, which can differ from that of the two "
    'medians, with the middle half of them in brackets. Above 1 is faster, less memory or a '
    'smaller folder; brackets that hold 1 decide nothing. *Share of rate*: arithmetic of matrix '
    'products in a second, as a part of what large products reach at the time. Heads '
    "are two dense layers on the first token's state, as `adapters` has them: of the last layer "
    'ours computes no other token.'
)
_ON_A_CPU = (
    'Over 2 devices means `JAX_NUM_CPU_DEVICES=2`. Theirs is eager, as it comes, and ours is '
    'compiled by XLA. Where each '
    'side has processes of its own, ours does what our commands do by themselves, and theirs what '
    'theirs do, which is nothing of this: a large batch is cut into parts, memory that a step '
    'gives back is kept for the next one (`mallopt`), and of `epoch`, `sweep` and `memory` it is '
    'in large pages, as the scripts in `launch/` start them (`GLIBC_TUNABLES`), of `first_step` '
    'where it says so.'
)
_ON_A_GPU = (
    'Steps compute in bfloat16. Frozen weights in bfloat16 are those of ours alone: theirs stay in '
    'float32, as autocast has them, and so do ours where nothing is said. `peft` is compiled by '
    '`torch.compile`, `adapters` is eager, as it comes, and ours is compiled by XLA. '
    'Where kernels are launched one by one from Python, theirs '
    "may wait for that longer than for the GPU; `mode='reduce-overhead'` records them once (CUDA "
    'graphs).'
)
_OF_RUNS = (
    'Of `epoch` and `sweep` our time is that of the steps: two before them, which compile and warm '
    'up, and the loader, optimizer and schedule are left out (what compiling a step costs is in '
    '`first_step`). Theirs is the whole of `trainer.train()`, which compiles nothing, but makes '
    'these three and warms up within its time: that favours ours. Ours has several texts in a row, '
    'theirs pads to the longest of a batch, whose texts are drawn from all: `group_by_length`, '
    'which their trainer has and does not use unless it is asked to, is off. Theirs of `sweep` is '
    f'{whole_runs.MEMBERS} times one run, not as many runs. With adapters in the upper half of the '
    'layers neither side computes a gradient below them, and what is below, without dropout in '
    'ours, is computed once for all members.'
)
_OF_FILES = (
    'Of `file_size` all files of a folder count, the model card that `peft` writes, too; both hold '
    "the same number of parameters in float32, heads included (with `peft`, transformers' linear "
    'layer on what the checkpoint pools).'
)


def _how(result: dict[str, Any]) -> str:
    """Return how it was measured, as far as it is of these races on these machines."""
    on_cpu = {' cores of ' in race['hardware'] for race in result.values()}
    parts = [' '.join([_HOW, *[_ON_A_CPU] * (True in on_cpu), *[_ON_A_GPU] * (False in on_cpu)])]
    parts += [_OF_RUNS] * bool({'epoch', 'sweep'} & result.keys())
    parts += [_OF_FILES] * ('file_size' in result)
    return '\n\n'.join(parts)


def _line(name: str, race: dict[str, Any]) -> str:
    cells = (
        f'`{name}`',
        race['title'],
        *(amount(race[side], race['unit']) for side in ('ours', 'theirs')),
        ratio(race),
        f'{100 * race["share_of_rate"]:.0f} %' if 'share_of_rate' in race else '',
    )
    return f'| {" | ".join(cells)} |'


def _where(result: dict[str, Any]) -> list[str]:
    """Return a line for each machine and set of libraries, below it commits and commands."""
    found: dict[str, dict[tuple[str, str], list[str]]] = {}
    for name, race in result.items():
        ways = found.setdefault(_against(race), {})
        ways.setdefault((race['commit'], _options(race)), []).append(name)
    lines = []
    for against, ways in found.items():
        lines += [against, '', *(_way(*way, names) for way, names in ways.items()), '']
    return lines[:-1]


def _against(race: dict[str, Any]) -> str:
    # What stands behind a + is which build of a version it is.
    shown = {name: version.partition('+')[0] for name, version in race['versions'].items()}
    names = [f'{name} {shown[name]}' for name in (*libraries.RACED, 'transformers')]
    return (
        f'On {race["hardware"]}, with jax {shown["jax"]} against {", ".join(names)}, by '
        '`python -m experiments.bench --output=DIR` and the options below, each at its commit '
        '(with a + behind it: files had changed since); nothing was raced again at later ones:'
    )


def _way(commit: str, options: str, names: list[str]) -> str:
    commit = commit[:7] + '+' * commit.endswith('+')
    return f'- `--only={",".join(names)}{options}` at `{commit}`'


def _options(race: dict[str, Any]) -> str:
    """Return the options that a race was run with where they are not those that it has anyway."""
    settings = [row['settings'] for row in (race, *race['more'])]
    rounds, examples = len(race['rounds']['ours']), settings[0].get('examples', EXAMPLES)
    asked = {
        f' --rounds={rounds}': rounds != ROUNDS and race['unit'] != sizes.UNIT,
        f' --examples={examples}': examples != EXAMPLES,
        ' --data=GLUE': any(row.get('source') == whole_runs.GLUE for row in settings),
    }
    return ''.join(option for option, is_asked in asked.items() if is_asked)


def main(output: str, only: Sequence[str], rounds: int, data: str, examples: int) -> None:
    """Run the races; write numbers after each row, table and chart after each race."""
    for name in only:
        if name not in RACES:
            raise ValueError(f'unknown race {name!r}; known: {", ".join(RACES)}')
    directory = files.make_directory(output)
    result = read(directory / 'bench.json')
    for name in only:
        provenance = libraries.describe()  # before the race: files may change while it runs
        done = []
        for race in RACES[name](directory, rounds, data, examples):
            done.append(race)
            result[name] = collect(done, provenance)
            result = {name: result[name] for name in RACES if name in result}
            files.write_json(directory / 'bench.json', result)
        write(directory, 'bench', result, render)
    chart.draw(result, directory / 'bench.png')
    print(f'wrote {directory / "bench.png"}')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'only': flags.DEFINE_list('only', list(RACES), 'Which races.'),
        'rounds': flags.DEFINE_integer('rounds', ROUNDS, 'Rounds of each race.', lower_bound=1),
        'data': flags.DEFINE_string('data', '', 'Folder with RTE of GLUE; empty: TREC alone.'),
        'examples': flags.DEFINE_integer(
            'examples', EXAMPLES, 'Texts of an epoch.', lower_bound=32
        ),
    }


if __name__ == '__main__':
    # The public libraries stand on torch, which our commands keep transformers from importing.
    os.environ['USE_TORCH'] = '1'
    jax.config.update('jax_num_cpu_devices', steps.CPU_DEVICES)
    entry.run(_define, main)
