"""How often what was chosen is the last of what was tried, beyond which a better one may lie."""

from collections.abc import Sequence

Choice = tuple[float, Sequence[float]]  # what a row chose, and of what


def told(choices: Sequence[Choice], what: str) -> str:
    """Return a sentence on the rows that had a choice; '' where none had."""
    real = [(value, set(tried)) for value, tried in choices if len(set(tried)) > 1]
    if not real:
        return ''
    largest = sum(value == max(tried) for value, tried in real)
    smallest = sum(value == min(tried) for value, tried in real)
    counts = ' or '.join(map(str, sorted({len(tried) for _, tried in real})))
    return (
        f'Of {len(real)} rows with a choice among {counts} values of {what}, the largest is that '
        f'of {largest} and the smallest that of {smallest}; beyond them nothing was tried.'
    )
