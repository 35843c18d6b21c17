"""What the reports of papers say: rows, gaps and verdicts, from results that are made up."""

import json

import numpy as np
import pytest
from all_papers import NAMES, paper
from scipy import stats

from adapters_jax.training import grid
from experiments.papers import report
from experiments.papers.study import Finding, MissingError, Results, Row, told_share


def row(task='cr', way='full', scores=(0.5, 0.7), validation=None, settings=None):
    return Row(
        task, way, settings or {}, {}, 'accuracy', 'test', list(range(len(scores))),
        list(validation or scores), list(scores), [], 10, 1000, 60.0, 120.0, 0, ['a processor'],
        ['abcdef0123'],
    )  # fmt: skip


@pytest.mark.parametrize(
    ('share', 'told'), [(100.0, '100 %'), (11.6, '12 %'), (0.334, '0.33 %'), (0.0514, '0.051 %')]
)
def test_shares_are_told_to_two_digits(share, told):
    assert told_share(share) == told


def test_the_best_row_is_that_of_the_validation_split():
    rank = 'method.r'
    rows = [
        row(way='lora', scores=(0.9, 0.9), validation=(0.5, 0.5), settings={rank: 1}),
        row(way='lora', scores=(0.6, 0.8), validation=(0.8, 0.8), settings={rank: 8}),
        row(way='lora', task='trec', scores=(0.3, 0.3), settings={rank: 8}),
    ]
    results = Results(rows, {}, 'small')
    assert results.best('lora', 'cr').settings == {rank: 8}
    assert results.score('lora', ['cr', 'trec']) == pytest.approx((0.7 + 0.3) / 2)
    assert results.score('lora', ['cr'], {rank: 1}) == pytest.approx(0.9)
    assert results.values('lora', rank) == [1, 8]
    for missing in (
        lambda: results.score('houlsby', ['cr']),
        lambda: results.score('lora', []),
        lambda: results.common('lora', 'full'),
        lambda: results.values('houlsby', rank),
    ):
        with pytest.raises(MissingError, match='nothing was trained as'):
            missing()


def test_a_gap_is_over_pairs_of_task_and_seed():
    ours = [
        row(task=t, way='lora', scores=s) for t, s in (('cr', (0.6, 0.7)), ('trec', (0.9, 0.8)))
    ]
    base = [row(task=t, scores=s) for t, s in (('cr', (0.5, 0.6)), ('trec', (0.7, 0.6)))]
    gap = Results([*ours, *base], {}, 'small').gap('lora', 'full', ['cr', 'trec'])
    differences = [0.1, 0.1, 0.2, 0.2]
    error = np.std(differences, ddof=1) / 2
    assert gap.mean == pytest.approx(0.15)
    assert gap.low == pytest.approx(0.15 - stats.t.ppf(0.975, 3) * error)
    assert gap.better and gap.above(0.01) and gap.above(0.15) is None and gap.above(0.3) is False
    assert gap.within(0.01) is False and gap.within(0.3) and gap.within(0.15) is None


@pytest.mark.parametrize('name', NAMES)
def test_findings_on_what_was_not_trained_are_left_out(name):
    empty = {'spans': {}, 'attention': {}, 'scores': {}}
    times = {'training': [1.0] * 7, 'inference': [1.0] * 7}
    costs = dict.fromkeys(('full', 'compacter', 'compacter++', 'bitfit'), 1.0)
    examined = empty | {'times': times, 'seconds': costs, 'bytes': costs}
    results = Results([row()], examined, 'small')
    found = list(paper(name).findings(results))
    assert all('of' in finding.found or '%' in finding.found for finding in found)
    assert len(found) == {'ruckle2021': 2, 'mahabadi2021': 2}.get(name, 0)


def values_of(own, cell):
    """Return what a cell's rows are told apart by, as its grid has it."""
    if not cell.by:
        return [{}]
    config = own.recipe(f'task={cell.task},way={cell.way},scale=small')
    (key,) = cell.by
    found = dict.fromkeys(json.dumps(m.settings[key]) for m in grid.expand(config))
    return [{key: json.loads(value)} for value in found]


def made_up(own, score):
    """Return results of a whole protocol with `score(way)` everywhere, and a little noise."""
    rng, rows = np.random.default_rng(0), []
    for cell in own.cells('small'):
        for settings in values_of(own, cell):
            scores = score(cell.way) + 0.001 * rng.standard_normal(3)
            rows.append(row(cell.task, cell.way, scores.tolist(), settings=settings))
    tasks = list(dict.fromkeys(cell.task for cell in own.cells('small')))
    whole = score('init')
    without = [[whole - 0.01 * (b - a + 1) if a <= b else None for b in range(6)] for a in range(6)]
    dropped = {
        way: {task: [score(way) * (1 - n / 50) for n in range(7)] for task in tasks}
        for way in ('adapter', 'robust')
    }
    costs = {'full': 1.0, 'compacter': 0.8, 'compacter++': 0.7, 'bitfit': 0.6}
    names = ['trec', 'cr', 'mpqa', 'subj']
    fused = {t: {'adapters': names, 'weights': [[0.25] * 4] * 6} for t in own_targets(own)}
    examined = {
        'spans': {task: {'whole': whole, 'without': without} for task in ('trec', 'cr')},
        'scores': dropped,
        'times': {'training': np.linspace(1, 0.5, 7), 'inference': np.linspace(1, 0.95, 7)},
        **{'seconds': costs, 'bytes': costs, 'attention': fused},
    }
    return Results(rows, examined, 'small')


def own_targets(own):
    return [cell.task for cell in own.cells('small') if cell.way == 'fusion']


# The first finding of each paper that compares adapters with full fine-tuning.
COMPARED = {
    **dict.fromkeys(('houlsby2019', 'hu2022', 'he2022', 'mahabadi2021'), 'table'),
    'pfeiffer2021': 'single-task adapters are as good',
    'mao2022': 'it beats full fine-tuning',
}


@pytest.mark.parametrize('name', NAMES)
def test_findings_follow_from_the_scores(name, tmp_path):
    own = paper(name)
    for better in (True, False):
        results = made_up(own, lambda way, better=better: 0.8 if (way == 'full') == better else 0.9)
        found = list(own.findings(results))
        assert len(found) >= 3 and not any('nan' in finding.found for finding in found)
        if name in COMPARED:
            about = [f for f in found if COMPARED[name] in f.claim or COMPARED[name] in f.where]
            assert about[0].holds is better
    drawn = list(own.draw(results, tmp_path))
    assert drawn and all(path.stat().st_size > 4000 for path in drawn)


@pytest.mark.parametrize(
    ('higher', 'parallel', 'feed_forward'),
    [
        (('par_ffn', 'seq_ffn', 'lora_ffn'), None, True),
        (('par_ffn', 'par_attention'), True, None),
        (('seq_ffn',), False, None),
        (('lora',), None, False),
    ],
)
def test_a_claim_of_several_designs_is_confirmed_by_all_of_them(higher, parallel, feed_forward):
    results = made_up(paper('he2022'), lambda way: 0.9 if way in higher else 0.8)
    found = {finding.where: finding.holds for finding in paper('he2022').findings(results)}
    assert (found['section 4.3'], found['section 4.4']) == (parallel, feed_forward)


def test_a_report_holds_scores_published_numbers_and_verdicts():
    findings = [Finding('a', 'table 1', '+1.0 points', True), Finding('b', 'here', 'no', False)]
    rows = [row(), row(way='lora', settings={'method.r': 8})]
    result = {
        'title': 'A paper',
        'settings': '',
        'scale': 'small',
        'figures': ['sizes.png'],
        'titles': {'full': 'full fine-tuning'},
        'expected': {'source': 'table 1', 'rows': {'full': {'cr': 61.5}, 'lora': {'cr': 62.0}}},
        'command': 'python -m experiments.none',
        **report.to_json(Results(rows, {}, 'small'), findings),
    }
    text = report.render(json.loads(json.dumps(result)))
    assert '| full fine-tuning | 10 (1 %) | 60.0 ± 14.1 [61.5] | 60.0 |' in text
    assert '| lora, r=8 | 10 (1 %) | 60.0 ± 14.1 | 60.0 |' in text  # published for no such rank
    assert '| a | table 1 | +1.0 points | confirmed |' in text
    assert '| b | here | no | **not confirmed** |' in text
    assert '4 minutes of training on a processor; commits `abcdef0`' in text
    assert text.endswith('![sizes](sizes.png)')
