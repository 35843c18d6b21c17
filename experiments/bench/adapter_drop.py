"""AdapterDrop: time and arithmetic against the number of dropped layers.

    python -m experiments.bench.adapter_drop --output=DIR [--backbone=minilm]
        [--methods=pfeiffer,double_seq_bn] [--rows=32] [--length=64] [--repeats=9]

Inference and one training step (dropout on, AdamW) on random texts of one length, as Rücklé et al.
2021 measure them (section 3.3, tables 3 and 5): what a layer less costs does not depend on what the
texts say. Writes DIR/adapter_drop.json and DIR/adapter_drop.md.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from absl import flags

from adapters_jax import entry, files
from adapters_jax.interop.backbones import LoadedBackbone, load_backbone
from adapters_jax.training.provenance import describe
from experiments.bench import programs
from experiments.bench.timing import Ratio, Times, compare
from experiments.output import where, write

MODES = {'inference': 'inference', 'training': 'training step'}


def measure(
    method: str, backbone: LoadedBackbone, rows: int, length: int, repeats: int
) -> dict[str, list[dict[str, Any]]]:
    """Return, for inference and training, a dict for each number of dropped layers from 0."""
    config = backbone.config
    whole, params = programs.make(backbone, method)
    batch = programs.random_batch(rows, length, config.vocabulary)
    found = {}
    for mode in MODES:
        models = [dataclasses.replace(whole, dropped=n) for n in range(config.depth + 1)]
        make = getattr(programs, mode)
        made = {str(n): make(model, params, batch) for n, model in enumerate(models)}
        times = compare({name: program.call for name, program in made.items()}, repeats)
        found[mode] = [row(int(n), made, times) for n in made]
    return found


def row(dropped: int, made: dict[str, programs.Program], times: dict[str, Times]) -> dict[str, Any]:
    """Return one line of the results; ratios are over the program with no layer dropped."""
    name = str(dropped)
    return {
        'dropped': dropped,
        'milliseconds': 1000 * times[name].median,
        'ratio': dataclasses.asdict(times[name].over(times['0'])),
        'flops': made[name].flops,
        'flops_ratio': made[name].flops / made['0'].flops,
    }


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    heads = [f'{title}: {x}' for title in MODES.values() for x in ('time', 'faster', 'FLOPs')]
    lines = [f'| method | dropped | {" | ".join(heads)} |', f'|---|---|{"---|" * len(heads)}']
    for method, modes in result['methods'].items():
        for lines_of_modes in zip(*(modes[mode] for mode in MODES), strict=True):
            cells = [cell for line in lines_of_modes for cell in _cells(line)]
            number = lines_of_modes[0]['dropped']
            lines.append(f'| `{method}` | {number} | {" | ".join(cells)} |')
    note = (
        f'Times and FLOPs relative to those with no layer dropped; in brackets the middle half of '
        f'{result["repeats"]} rounds in turns. Backbone `{result["backbone"]}`, {result["rows"]} '
        f'texts of {result["length"]} tokens, a head on first tokens, on {where(result)}.'
    )
    return '\n'.join([*lines, '', note])


def _cells(line: dict[str, Any]) -> tuple[str, str, str]:
    ratio = Ratio(**line['ratio'])
    return str(ratio), f'{100 * (1 / ratio.value - 1):.0f} %', f'{line["flops_ratio"]:.3f}'


def main(
    output: str, backbone: str, methods: Sequence[str], rows: int, length: int, repeats: int
) -> None:
    """Measure every method; write the numbers and the table."""
    directory = files.make_directory(output)
    loaded = load_backbone(backbone)
    result = {'backbone': backbone, 'rows': rows, 'length': length, 'repeats': repeats}
    result |= describe()
    result['methods'] = {
        method: measure(method, loaded, rows, length, repeats) for method in methods
    }
    write(directory, 'adapter_drop', result, render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'backbone': flags.DEFINE_string('backbone', 'minilm', 'Backbone, as in a config.'),
        'methods': flags.DEFINE_list('methods', ['pfeiffer', 'double_seq_bn'], 'Which methods.'),
        'rows': flags.DEFINE_integer('rows', 32, 'Texts of a batch.', lower_bound=1),
        'length': flags.DEFINE_integer('length', 64, 'Tokens of a text.', lower_bound=1),
        'repeats': flags.DEFINE_integer('repeats', 9, 'Rounds of measurements.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
