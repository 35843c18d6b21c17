"""What the reports of papers say: rows, gaps and verdicts, from results that are made up."""

import json
import re
import shutil

import numpy as np
import pytest
from all_papers import NAMES, paper
from scipy import stats

from adapters_jax.training import grid
from experiments.papers import __main__ as again
from experiments.papers import report, summary
from experiments.papers.study import Finding, MissingError, Results, Row, told_share

STORED = sorted(summary.FOLDER.glob('*/*.json'))


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
    measured = {'ruckle2021': 1, 'mahabadi2021': 1}  # claims on what needs no training
    asked = len(paper(name).claims()) - measured.get(name, 0)
    assert len(paper(name).unanswered(results)) == asked


def test_what_a_claim_has_found_stays_when_more_of_it_was_not_trained():
    class Half(type(paper('mao2022'))):
        def claims(self):
            def claim(results):
                yield Finding('a', 'table 1', 'so', True)
                results.best('lora', 'cr')

            return (claim,)

    results = Results([row()], {}, 'small')
    assert [finding.claim for finding in Half().findings(results)] == ['a']
    assert Half().unanswered(results) == ['nothing was trained as lora on cr with {}']


@pytest.mark.parametrize(('suffix', 'when'), [('@100', 'few'), ('', 'all')])
def test_unipelt_is_compared_with_full_fine_tuning_on_the_tasks_there_are(suffix, when):
    ways = ('unipelt', 'adapter', 'prefix', 'lora', 'full')
    rows = [row(f'cr{suffix}', w, (0.5, 0.51) if w == 'unipelt' else (0.9, 0.91)) for w in ways]
    results = Results(rows, {}, 'small')
    found = {finding.claim: finding.holds for finding in paper('mao2022').findings(results)}
    assert found[f'with {when} examples it beats full fine-tuning'] is False
    assert len(found) == (3 if suffix else 2)
    assert len(paper('mao2022').unanswered(results)) == 2


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


@pytest.mark.parametrize('name', NAMES)
def test_by_how_much_a_paper_finds_it_is_said_as_the_papers(name):
    """A verdict by sign must not stand beside a claim of so many points."""
    for finding in paper(name).findings(made_up(paper(name), lambda way: 0.8)):
        outside = re.sub(r'\([^)]*\)', '', finding.claim)
        assert not re.search(r'by \d|\d to \d| -\d', outside), finding.claim


def test_speed_and_score_of_adapter_drop_are_paired():
    own = paper('ruckle2021')
    (table,) = own.tables(made_up(own, lambda way: 0.9 if way == 'specialised' else 0.8))
    assert [line[0] for line in table.lines] == list('0123456')
    # Two of six layers: 1 / (1 - 2 / 12) in training, 1 / (1 - 0.05 / 3) at inference.
    step, forward, special, robust, plain = table.lines[2][1:]
    assert (step, forward) == ('20 %', '2 %')
    assert float(special) == pytest.approx(90, abs=0.2)
    assert robust == plain == f'{80 * (1 - 2 / 50):.1f}'
    assert table.lines[6][3] == ''  # nobody trains without any
    assert list(own.tables(Results([row()], {}, 'small'))) == []


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


OTHERS = {
    'source': 'paper',
    'protocol': {'cr': ['full', 'lora']},
    'tables': [{'head': ['a'], 'lines': [['1']], 'note': 'Of a.'}],
    'unanswered': [],
}


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
        **OTHERS,
        **report.to_json(Results(rows, {}, 'small'), findings),
    }
    text = report.render(json.loads(json.dumps(result)))
    assert '| full fine-tuning | 10 (1 %) | 60.0 ± 14.1 [61.5] | 60.0 |' in text
    assert '| lora, r=8 | 10 (1 %) | 60.0 ± 14.1 | 60.0 |' in text  # published for no such rank
    assert '| a | table 1 | +1.0 points | confirmed |' in text
    assert '| b | here | no | **not confirmed** |' in text
    assert '4 minutes of training on a processor; commits `abcdef0`' in text
    assert 'Tasks: cr (all). All' in text and '| a |\n| --- |\n| 1 |\n\nOf a.' in text
    assert text.endswith('![sizes](sizes.png)')
    assert 'of the published code (`--source=code`)' in report.render(result | {'source': 'code'})


def test_published_scores_of_the_best_size_stand_beside_ours():
    own, size = paper('houlsby2019'), 'method.size'
    expected = report.read_expected('houlsby2019')
    tasks = list(dict.fromkeys(cell.task for cell in own.cells('full')))
    rows = []
    for place, task in enumerate(tasks):  # sizes in turn are best on validation, worst on test
        for number, value in enumerate((8, 64, 256)):
            best = number == place % 3
            scores = ((0.6,), (0.9,)) if best else ((0.7,), (0.8,))
            rows.append(row(task, 'adapters', *scores, settings={size: value}))
        rows += [row(task, way, (0.5,)) for way in ('adapters64', 'full')]
    result = {'titles': own.titles, 'expected': expected, 'scale': 'full'}
    lines = report.scores(result | report.to_json(Results(rows, {}, 'full'), [])).splitlines()
    named = {line.split(' | ')[0].removeprefix('| '): line for line in lines}
    assert '[' not in named['Houlsby adapters, size=64']
    best = named['Houlsby adapters, the best size in each task']
    assert ' | 10 (1 %) [3.6 %] | 60.0 [59.5] | 60.0 [94.0] | ' in best
    assert best.endswith(' | 60.0 [71.5] | 60.0 [80.0] |')
    assert '[2.1 %] | 50.0 [56.9]' in named['Houlsby adapters, one size']
    assert named['full fine-tuning'].endswith(' | 50.0 [70.1] | 50.0 [80.4] |')
    fewer = report.to_json(Results([r for r in rows if r.task != 'rte'], {}, 'full'), [])
    assert '[80.0]' not in report.scores(result | fewer)  # a mean of other tasks


@pytest.mark.parametrize(
    ('ways', 'told'),
    [
        ({'trec': 'ab', 'cr': 'ab'}, 'trec, cr (all)'),
        ({'trec': 'ab'}, 'trec (of trec, cr)'),
        ({'trec': 'a', 'cr': 'ab'}, 'cr; in part trec (of trec, cr)'),
        ({'cr': 'b'}, 'in part cr (of trec, cr)'),
    ],
)
def test_a_report_tells_which_tasks_of_its_protocol_it_has(ways, told):
    rows = [{'task': task, 'way': way} for task, own in ways.items() for way in own]
    protocol = {'trec': ['a', 'b'], 'cr': ['a', 'b']}
    assert report.told_tasks({'rows': rows, 'protocol': protocol}) == told


def test_the_table_of_protocols_counts_what_was_evaluated():
    text = summary.render(summary.read())
    assert '| trec@100 (of trec@100, cr@100, mpqa@100, trec, cr, mpqa) | with few examples' in text
    stored = [json.loads(path.read_text()) for path in STORED]
    count = sum(len(own['findings']) for own in stored)
    missing = sum(len(own['unanswered']) for own in stored)
    assert f'Of {count} findings that these tasks could show' in text
    assert f'{missing} more claims ask for rows that were not trained' in text


@pytest.mark.parametrize('path', STORED, ids=lambda path: path.stem)
def test_stored_reports_say_what_follows_from_their_rows(path, tmp_path, monkeypatch):
    own = paper(path.stem)
    monkeypatch.setattr(type(own), 'draw', lambda *_: [tmp_path / n for n in stored['figures']])
    stored = json.loads(path.read_text())
    results, _ = report.from_json(stored)
    judged = report.judged(own, results, tmp_path)
    assert json.loads(json.dumps(judged)) == {key: stored[key] for key in judged}
    assert path.with_suffix('.md').read_text() == report.render(stored) + '\n'


def test_a_report_is_judged_anew_without_training(tmp_path, capsys):
    (path,) = (p for p in STORED if p.stem == 'mao2022')
    shutil.copytree(path.parent, tmp_path / 'own')
    before = json.loads(path.read_text())
    old = {key: before[key] for key in before if key not in ('tables', 'unanswered', 'protocol')}
    (tmp_path / 'own' / path.name).write_text(json.dumps(old | {'findings': []}))
    again.main([str(tmp_path / 'own')])
    assert json.loads((tmp_path / 'own' / path.name).read_text()) == before
    assert 'mao2022.md' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='holds no report; expected the folder PAPER_SCALE'):
        again.main([str(tmp_path)])
    with pytest.raises(SystemExit, match='no folder is given'):
        again.main([])
