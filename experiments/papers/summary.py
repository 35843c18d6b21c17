"""The README's table of protocols: which findings of which paper hold here, and what that took."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / 'results' / 'papers'


def read() -> list[dict[str, Any]]:
    """Return the stored reports, each a folder that `experiments.PAPER` has written."""
    reports = sorted(FOLDER.glob('*/*.json'))
    return [json.loads(path.read_text('utf-8')) for path in reports]


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table, a line for each finding, and below it where it comes from."""
    head = ('paper', 'finds', 'here', '')
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    for result in results:
        link = f'experiments/results/papers/{result["paper"]}/{result["paper"]}.md'
        name = f'[{result["title"].partition(",")[0]}]({link})'
        for finding in result['findings']:
            verdict = {True: 'yes', False: '**no**', None: '-'}[finding['holds']]
            lines.append(f'| {name} | {finding["claim"]} | {finding["found"]} | {verdict} |')
            name = ''
    minutes = ', '.join(f'{r["paper"]} {r["seconds"] / 60:.0f}' for r in results)
    commits = ', '.join(sorted({f'`{r["commit"][:7]}`' for r in results}))
    hardware = '; '.join(sorted({r['hardware'] for r in results}))
    counts = [finding['holds'] for result in results for finding in result['findings']]
    note = (
        f'{counts.count(True)} of {len(counts)} findings hold at small scale; differences are in '
        f'points of accuracy. Minutes of training: {minutes} (full fine-tuning, which all share, '
        f'counts in each), on {hardware}; commits {commits}. The reports have the scores, seeds '
        'and figures.'
    )
    return '\n'.join([*lines, '', note])
