"""Renders the table of methods and families of backbones.

    python -m pytest tests/conformance/test_families.py tests/interop/test_adapterhub_families.py \\
        tests/interop/test_peft_families.py --families=experiments/families.json
    python -m experiments.table

The first command runs the tests and notes what they found, over what is in the file already, so
that it may be run in parts; the second puts the table into docs/methods.md.
"""

from pathlib import Path
from typing import Any

from adapters_jax.adapters.presets import PRESETS

STORED = Path(__file__).with_suffix('.json')
OWN = ('runs', 'trains', 'saves')
LIBRARIES = {'adapterhub': 'A', 'peft': 'P'}
LEGEND = (
    '✓: the method runs, trains and comes back from its folder with the same numbers, ✗: it does '
    'not. A: its numbers are those of `adapters`, P: those of `peft`, both ways, where the '
    'settings are such as both have. a, p: the library has no place for the pair, fails by itself, '
    'or computes something else, and the pair is refused. No letter: the library lacks the method '
    'or the family, or was not asked (`encoder-decoder`). –: the family has none of the parameters '
    'that the method is for.'
)
# BERT's are in the table of conformance.
_ORDER = (
    *('roberta', 'distilbert', 'electra', 'bart', 'mbart', 'marian', 't5', 't5-gated'),
    *('encoder-decoder', 'whisper', 'vit', 'deit'),
)


def render(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the Markdown table: a row for each method, a column for each family that was run."""
    families = [name for name in _ORDER if any(OWN[0] in of for of in found.get(name, {}).values())]
    methods = sorted({preset for of in found.values() for preset in of if preset in PRESETS})
    lines = [f'| method | {" | ".join(families)} |', f'|---|{"---|" * len(families)}']
    for preset in methods:
        cells = (_cell(found[family].get(preset, {})) for family in families)
        lines.append(f'| `{preset}` | {" | ".join(cells)} |')
    return '\n'.join([*lines, '', LEGEND])


def _cell(shown: dict[str, Any]) -> str:
    """Return the marks of a pair, of what a test has found of it."""
    own = [shown[name] for name in OWN if name in shown]
    mark = '' if not own else '✓' if all(own) else '✗'
    letters = [
        letter if shown[name] is True else letter.lower() if shown[name] else '✗'
        for name, letter in LIBRARIES.items()
        if name in shown
    ]
    return ' '.join([mark, *letters]).strip() or '–'
