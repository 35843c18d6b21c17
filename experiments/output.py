"""What every experiment leaves: its numbers as JSON, and the tables that they make as Markdown."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from adapters_jax import files


def where(result: dict[str, Any]) -> str:
    """Say on which machine a result was measured, and with which commit of this repository."""
    return f'{result["hardware"]}, commit `{shortened(result["commit"])}`'


def shortened(commit: str) -> str:
    """Return the first letters of a commit, with the + of one whose files had changed since."""
    return commit[:7] + '+' * commit.endswith('+')


def commits(names: Iterable[str]) -> str:
    """Return commits in a line, each once, and what a + behind one means where there is one."""
    found = sorted({shortened(name) for name in names})
    changed = any(name.endswith('+') for name in found)
    return ', '.join(f'`{name}`' for name in found) + ' (+: files had changed since)' * changed


def write(
    directory: Path | str, name: str, result: dict[str, Any], render: Callable[[Any], str]
) -> None:
    """Write `{name}.json` and `{name}.md`, and print the tables and what was written.

    Raises:
        DiskError: the disk is full, or the directory may not be written to.
    """
    numbers, table = (files.make_directory(directory) / f'{name}.{end}' for end in ('json', 'md'))
    files.write_json(numbers, result)
    files.write_text(table, render(result) + '\n')
    print(f'{render(result)}\nwrote {numbers} and {table}')
