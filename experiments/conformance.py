"""Renders the table of methods and their properties for docs/methods.md.

    python -m pytest tests/conformance tests/interop tests/adapters/test_bank.py \\
        --conformance=experiments/conformance.json
    python -m experiments.table

The first command runs the tests, the slow ones too, and notes what they found; the second renders
it. A test compares the page with the stored file, and the stored file with the methods there are.
"""

from pathlib import Path

from adapters_jax.adapters.presets import PRESETS

STORED = Path(__file__).with_suffix('.json')
NOT_ADAPTERS = {'full', 'head', 'top_layers'}  # baselines

# Property: the heading of its column, in the order of the table.
COLUMNS = {
    'config': 'config',
    'count': 'count',
    'deterministic': 'seed',
    'starts as backbone': 'zero start',
    'acts': 'acts',
    'trains': 'trains',
    'leave_out': 'leave out',
    'packing': 'packs',
    'rows': 'by row',
    'devices': '1 = 8 devices',
    'remat': 'remat',
    'bfloat16': 'bf16',
    'average': 'averages',
    'merges': 'merges',
    'saves': 'saves',
    'size': 'size',
    'refuses': 'refuses',
    'adapterhub': 'AdapterHub',
    'peft': 'PEFT',
}
MARKS = {True: '✓', False: '✗', None: '–'}
# Formats of others, which may lack a place for the settings that a preset has by itself.
FORMATS = ('adapterhub', 'peft')


def render(found: dict[str, dict[str, bool]]) -> str:
    """Return the Markdown table: a row for each method, a column for each property."""
    lines = [
        f'| method | {" | ".join(COLUMNS.values())} |',
        f'|---|{"---|" * len(COLUMNS)}',
    ]
    for preset, shown in sorted(found.items()):
        if preset not in PRESETS:
            continue  # a variant that a test of the file formats looks at beside them
        cells = (_mark(shown, column) for column in COLUMNS)
        lines.append(f'| `{preset}` | {" | ".join(cells)} |')
    return '\n'.join(lines)


def as_it_is(format: str) -> str:
    """Return the property that a preset can be written there with the settings it has by itself."""
    return f'{format} as it is'


def _mark(shown: dict[str, bool], column: str) -> str:
    mark = MARKS[shown.get(column)]
    bound = column in FORMATS and shown.get(column) and not shown.get(as_it_is(column))
    return f'({mark})' if bound else mark
