"""A batch in parts, one after another, against the whole at once: time and memory.

    python -m experiments.bench.parts --output=DIR [--rounds=7]

Training steps and forward passes over padded rows, on a CPU: the reason for how many tokens
`adapters_jax.training.cutting` gives to a part. Writes DIR/parts.json and DIR/parts.md.
"""

from pathlib import Path
from typing import Any

import jax
from absl import flags

from adapters_jax import entry, files
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.training import cutting
from adapters_jax.training.provenance import describe
from experiments.bench import backbones, programs
from experiments.bench.timing import Ratio, compare
from experiments.output import where, write

TOKENS = 128  # of a row
PARTS = (1, 2, 4, 8)
# A program, a backbone, a method, and the rows of a batch.
COURSES = (
    ('training', 'minilm', 'double_seq_bn[size=24]', 32),
    ('training', 'minilm', 'double_seq_bn[size=24]', 16),
    ('training', 'minilm', 'double_seq_bn[size=24]', 8),
    ('training', 'minilm', 'lora[r=8]', 32),
    ('training', 'minilm', 'full', 32),
    ('training', 'base', 'double_seq_bn[size=48]', 16),
    ('inference', 'minilm', 'double_seq_bn[size=24]', 32),
    ('inference', 'minilm', 'double_seq_bn[size=24]', 8),
    ('inference', 'base', 'double_seq_bn[size=48]', 16),
)


def measure(root: Path, rounds: int) -> list[dict[str, Any]]:
    """Return for each course what each number of parts takes; weights go below `root`."""
    return [
        {'mode': mode, 'backbone': backbone, 'method': method, 'rows': rows}
        | _raced(mode, str(backbones.folder(backbone, root)), method, rows, rounds)
        for mode, backbone, method, rows in COURSES
    ]


def _raced(mode: str, folder: str, method: str, rows: int, rounds: int) -> dict[str, Any]:
    loaded = load_backbone(folder)
    batch = programs.random_batch(rows, TOKENS, loaded.config.vocabulary)
    model, params = programs.make(loaded, method)
    compiled = {n: getattr(programs, mode)(model, params, batch, parts=n) for n in PARTS}
    times = compare({n: program.call for n, program in compiled.items()}, rounds)
    ratios = {n: times[1].over(times[n]) for n in PARTS[1:]}
    return {
        'automatic': cutting.quick_parts(rows, TOKENS),
        'seconds': times[1].median,
        'ratios': {str(n): [ratio.value, ratio.low, ratio.high] for n, ratio in ratios.items()},
        'temporary': {str(n): program.temporary for n, program in compiled.items()},
    }


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was measured."""
    columns = [f'{n} parts' for n in PARTS[1:]]
    lines = [
        f'| program | tokens | whole | {" | ".join(columns)} | temporaries, MiB |',
        f'|---|---|---|{"---|" * len(columns)}---|',
        *map(_row, result['courses']),
    ]
    note = (
        'Seconds of the whole batch; times of it over those of its parts (in brackets the middle '
        f'half of {result["rounds"]} rounds in turns); temporaries of the whole and of each '
        'number of parts, as the compiler counts them. What is bold our commands choose here. '
        f'Rows of {TOKENS} tokens, float32, on {where(result)}.'
    )
    return '\n'.join([*lines, '', note])


def _row(course: dict[str, Any]) -> str:
    cells = {1: f'{course["seconds"]:.2f} s'}
    cells |= {int(n): str(Ratio(*ratio)) for n, ratio in course['ratios'].items()}
    cells[course['automatic']] = f'**{cells[course["automatic"]]}**'
    temporary = ', '.join(f'{size / 2**20:,.0f}' for size in course['temporary'].values())
    mode = {'training': 'step', 'inference': 'forward pass'}[course['mode']]
    first = f'{mode}, `{course["method"]}` on {course["backbone"]} | {course["rows"] * TOKENS:,}'
    return f'| {first} | {" | ".join(cells.values())} | {temporary} |'


def main(output: str, rounds: int) -> None:
    """Measure; write the numbers and the table."""
    if jax.default_backend() != 'cpu':
        raise ValueError('batches are cut on a CPU alone; set JAX_PLATFORMS=cpu')
    directory = files.make_directory(output)
    found = {'courses': measure(directory, rounds), 'rounds': rounds}
    write(directory, 'parts', found | describe(), render)


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'output': flags.DEFINE_string('output', None, 'Directory of the results.'),
        'rounds': flags.DEFINE_integer('rounds', 7, 'Rounds of the comparison.', lower_bound=1),
    }


if __name__ == '__main__':
    entry.run(_define, main)
