"""The protocols in docs/measurements.md: which findings of which paper hold, and what that took."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.papers import report
from experiments.papers.study import Finding

FOLDER = Path(__file__).parents[1] / 'results' / 'papers'


def read() -> list[dict[str, Any]]:
    """Return the stored reports, each a folder that `experiments.PAPER` has written."""
    reports = sorted(FOLDER.glob('*/*.json'))
    return [json.loads(path.read_text('utf-8')) for path in reports]


def render(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table, a line for each finding, and below it where it comes from."""
    if not results:
        return 'No protocol has been run to its end yet, at either scale.'
    head = ('paper', 'tasks', 'finds', 'here', '')
    lines = [f'| {" | ".join(head)} |', '|---' * len(head) + '|']
    found = [report.from_json(result)[1] for result in results]
    for result, own in zip(results, found, strict=True):
        folder = report.folder(result['paper'], result['scale'], result['source'])
        link = f'../experiments/results/papers/{folder}/{result["paper"]}.md'
        first = f'[{result["title"].partition(",")[0]}]({link})', report.told_tasks(result)
        for finding in own:
            cells = (*first, finding.claim, finding.found, report.verdict(finding))
            lines.append(f'| {" | ".join(cells)} |')
            first = '', ''
    minutes = ', '.join(f'{own["paper"]} {_minutes(own):.0f}' for own in results)
    every = [finding for own in found for finding in own]
    tested, untested = ([own for own in every if own.tested is kind] for kind in (True, False))
    unanswered = sum(len(result['unanswered']) for result in results)
    note = (
        f'Of {len(every)} findings that these tasks could show, {len(tested)} are judged by an '
        f'interval: {_counted(tested)}. {len(untested)} are of means or single timings, without a '
        f'test: {_counted(untested)}. {unanswered} more claims ask for rows that were not trained, '
        'and do not count. Differences are in points of accuracy, with their 95 % interval over '
        'seeds, of these tasks and these test texts. Minutes of training, for the tasks told: '
        f'{minutes}; what several papers share, such as full fine-tuning, counts in each. The '
        'reports have scores, seeds, machines, commits and figures.'
    )
    return '\n'.join([*lines, '', note.replace('**', '')])


def _counted(findings: Sequence[Finding]) -> str:
    holds = [finding.holds for finding in findings]
    return ', '.join(f'{holds.count(value)} {word}' for value, word in report.VERDICTS.items())


def _minutes(result: Mapping[str, Any]) -> float:
    found, _ = report.from_json(result)
    return report.minutes(found)
