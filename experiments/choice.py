"""The example of a choice in docs/measurements.md, from a sweep.json of configs/choose.py."""

from collections.abc import Mapping
from typing import Any

from adapters_jax.tuning import choose
from experiments.output import where


def render(result: Mapping[str, Any]) -> str:
    """Return the Markdown table of the candidates, and below it what is recommended and why."""
    note = (
        f'Recommended is `{result["recommended"]["method"]}`: {result["reason"]}. FLOPs and time '
        "of inference are multiples of the backbone's with a head alone; seconds are of one "
        f'member, on {where(result)}. Made by '
        '`python -m adapters_jax.sweep --config=configs/choose.py:task=trec --workdir=W`.'
    )
    return f'{choose.markdown_table(result)}\n\n{note}'
