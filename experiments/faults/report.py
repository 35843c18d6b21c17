"""What came of a campaign, as a table."""

from collections import Counter
from typing import Any

from experiments.faults.injections import FAULTS
from experiments.output import where

COLUMNS = ('fault', 'injected', 'ended as it must', 'most steps taken again', 'lost', 'wrong')


def counts(record: dict[str, Any]) -> bool:
    """Tell whether an attempt counts: its fault came in time, or it went wrong by itself."""
    return record['hit'] or bool(record['surprises'])


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what is counted of each fault; a lost or wrong run counts for all of its faults."""
    found = []
    for fault in FAULTS:
        hits = [
            (trial, record)
            for trial in result['trials']
            for record in trial['faults']
            if record['fault'] == fault and counts(record)
        ]
        again = [r['steps'] - r['checkpoint'] for _, r in hits if r['status']]
        found.append(
            {
                'fault': fault,
                'injected': len(hits),
                'ended as it must': sum(not record['surprises'] for _, record in hits),
                'most steps taken again': max(again, default=0),
                'lost': sum(trial['lost'] for trial, _ in hits),
                'wrong': sum(bool(trial['wrong']) for trial, _ in hits),
            }
        )
    return [row for row in found if row['injected']]


def totals(result: dict[str, Any]) -> Counter:
    """Return the sums over all faults; lost and wrong are of runs."""
    records = [r for trial in result['trials'] for r in trial['faults'] if counts(r)]
    return Counter(
        {
            'injected': len(records),
            'ended as it must': sum(not record['surprises'] for record in records),
            'lost': sum(trial['lost'] for trial in result['trials']),
            'wrong': sum(bool(trial['wrong']) for trial in result['trials']),
        }
    )


def render(result: dict[str, Any]) -> str:
    """Return the Markdown table, and below it how it was made."""
    lines = [f'| {" | ".join(COLUMNS)} |', f'|{"---|" * len(COLUMNS)}']
    sums = totals(result)
    every = {'fault': 'all', 'most steps taken again': '', **sums}
    for row in [*rows(result), every]:
        lines.append(f'| {" | ".join(str(row[column]) for column in COLUMNS)} |')
    faults = sum(len(trial['faults']) for trial in result['trials'])
    whole = not sums['lost'] and not sums['wrong']
    same = ': adapters, metrics and scores are the same to the bit' * whole
    note = (
        f'{len(result["trials"])} runs of {result["steps"]} steps, a checkpoint every '
        f'{result["checkpoint_every"]}, of {len(result["runs"])} kinds ({"; ".join(result["runs"])}'
        '), each disturbed up to five times at random moments, started again each time, and '
        f'compared in the end with one that nothing disturbed{same}. '
        f'Seed {result["seed"]}, {result["minutes"]:.0f} minutes, '
        f'{result["processes"]} at a time, on {where(result)}. Made by '
        f'`python -m experiments.faults --output=DIR --faults={faults} '
        f'--seed={result["seed"]} --processes={result["processes"]}`.'
    )
    return '\n'.join([*lines, '', note])
