"""Judges reports anew from their rows: `python -m experiments.papers DIR/PAPER_SCALE`.

For when a claim or a figure has changed: nothing is trained, evaluated or timed, and what the
report says of that stays. Several folders may be given.
"""

import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
        ValueError: a file there is no JSON.
    """
    stored = {'source': 'paper', 'options': [], **read(directory)}
    results, _ = report.from_json(stored)
    made = stored['source'], stored['options']
    judged = report.judged(find(stored['paper']), results, directory, *made)
    write(directory, stored['paper'], {**stored, **judged}, report.render)


def read(directory: Path) -> dict[str, Any]:
    """Return the report that a folder holds.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a file there is no JSON.
    """
    for path in sorted(directory.glob('*.json')):
        try:
            stored = json.loads(path.read_text('utf-8'))
        except ValueError as error:
            raise ValueError(f'{path} is not JSON: {error}') from error
        if isinstance(stored, dict) and 'paper' in stored:
            return stored
    raise FileNotFoundError(
        f'{directory} holds no report; expected the folder PAPER_SCALE that `python -m '
        'experiments.PAPER` has written, with PAPER.json'
    )


def main(directories: Sequence[str]) -> None:
    """Judge the reports of these folders."""
    if {'-h', '--help'} & {*directories}:
        print(__doc__)
        return
    if not directories:
        sys.exit('error: no folder is given; expected python -m experiments.papers DIR/PAPER_SCALE')
    try:
        for directory in directories:
            judge(Path(directory))
    except (OSError, ValueError) as error:
        sys.exit(f'error: {error}')


if __name__ == '__main__':
    main(sys.argv[1:])
