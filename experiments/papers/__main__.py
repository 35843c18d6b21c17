"""Judges reports anew from their rows: `python -m experiments.papers DIR/PAPER_SCALE`.

For when a claim or a figure has changed: nothing is trained, evaluated or timed, and what the
report says of that stays. Several folders may be given.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.output import write
from experiments.papers import report
from experiments.papers.study import Paper


def find(name: str) -> Paper:
    """Return the protocol of that name."""
    kinds = vars(importlib.import_module(f'experiments.{name}')).values()
    return next(kind() for kind in kinds if isinstance(kind, type) and _is(kind, name))


def _is(kind: type, name: str) -> bool:
    return issubclass(kind, Paper) and getattr(kind, 'name', '') == name


def judge(directory: Path) -> None:
    """Write a folder's report again.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(directory.glob('*.json'))
    if not found:
        raise FileNotFoundError(
            f'{directory} holds no report; expected the folder PAPER_SCALE that `python -m '
            'experiments.PAPER` has written, with PAPER.json'
        )
    stored = json.loads(found[0].read_text('utf-8'))
    results, _ = report.from_json(stored)
    stored = {'source': 'paper', 'options': [], **stored}
    made = stored['source'], stored['options']
    judged = report.judged(find(stored['paper']), results, directory, *made)
    write(directory, stored['paper'], {**stored, **judged}, report.render)


def main(directories: Sequence[str]) -> None:
    """Judge the reports of these folders."""
    if not directories:
        sys.exit('error: no folder is given; expected python -m experiments.papers DIR/PAPER_SCALE')
    try:
        for directory in directories:
            judge(Path(directory))
    except OSError as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
