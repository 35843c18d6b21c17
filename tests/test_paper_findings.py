"""What papers find: rows, gaps and verdicts, from results that are made up."""

import dataclasses
import json
import re

import numpy as np
import pytest
from all_papers import NAMES, paper, row
from scipy import stats

from adapters_jax.training import grid
from experiments.papers.study import Finding, MissingError, Results, told_share


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
    gap = two_tasks((0.60, 0.70, 0.65), (0.90, 0.83, 0.85)).gap('lora', 'full', ['cr', 'trec'])
    found = [np.array([0.10, 0.12, 0.08]), np.array([0.20, 0.18, 0.19])]
    # The tasks are these ones: what they differ by is no error of the mean.
    parts = [np.var(own, ddof=1) / 3 for own in found]
    freedom = sum(parts) ** 2 / sum(part**2 / 2 for part in parts)
    assert 2 < freedom < 4
    assert gap.mean == pytest.approx(np.mean(found))
    reach = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts)) / 2
    assert (gap.low, gap.high) == pytest.approx((gap.mean - reach, gap.mean + reach))
    assert gap.better and gap.above(0.01) and gap.above(0.15) is None and gap.above(0.3) is False
    assert gap.within(0.01) is False and gap.within(0.3) and gap.within(0.15) is None


def two_tasks(cr, trec):
    ours = [row(task=t, way='lora', scores=s) for t, s in (('cr', cr), ('trec', trec))]
    base = [
        row(task='cr', scores=(0.50, 0.58, 0.57)[: len(cr)]),
        row(task='trec', scores=(0.70, 0.65, 0.66)[: len(trec)]),
    ]
    return Results([*ours, *base], {}, 'small')


def test_an_interval_of_one_task_is_that_of_students_test():
    results = two_tasks((0.60, 0.70, 0.65), (0.9,))
    gap = results.gap('lora', 'full', ['cr'])
    expected = stats.ttest_1samp([0.10, 0.12, 0.08], 0).confidence_interval(0.95)
    assert (gap.low, gap.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ('cr', 'trec'),
    [
        ((0.60, 0.70, 0.65), (0.9,)),  # a single pair
        ((0.60, 0.68, 0.67), (0.90, 0.85, 0.86)),  # nothing differs between seeds
    ],
)
def test_what_no_seeds_tell_has_no_interval(cr, trec):
    gap = two_tasks(cr, trec).gap('lora', 'full', ['cr', 'trec'])
    assert gap.mean > 0.1 and gap.better is None and gap.within(0.9) is None
    assert str(gap).endswith(' points (no interval)')


def test_rows_without_a_common_seed_are_not_compared():
    base = dataclasses.replace(row(), seeds=[7, 8])
    with pytest.raises(MissingError, match='lora and full on cr with a common seed'):
        Results([row(way='lora'), base], {}, 'small').gap('lora', 'full', ['cr'])


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
    rows = [row(f'cr{suffix}', w, (0.5, 0.52) if w == 'unipelt' else (0.9, 0.91)) for w in ways]
    results = Results(rows, {}, 'small')
    found = {finding.claim: finding.holds for finding in paper('mao2022').findings(results)}
    assert found[f'with {when} examples it beats full fine-tuning'] is False
    assert len(found) == (3 if suffix else 2)
    assert len(paper('mao2022').unanswered(results)) == 2


def test_the_best_part_is_that_of_the_validation_split_and_is_paired_by_seed():
    rows = [
        row('cr@100', 'unipelt', (0.60, 0.70, 0.50)),
        row('cr@100', 'adapter', (0.61, 0.71, 0.53), (0.2, 0.2, 0.2)),
        row('cr@100', 'prefix', (0.58, 0.69, 0.48), (0.9, 0.9, 0.9)),
        row('cr@100', 'lora', (0.1, 0.1, 0.1)),
    ]
    best, upper = list(paper('mao2022').findings(Results(rows, {}, 'small')))
    assert best.found.endswith('over prefix tuning, the best on validation')
    assert best.found.startswith('+1.7 points')
    expected = stats.ttest_1samp([-0.01, -0.01, -0.03], 0).confidence_interval(0.95)
    low, high = 100 * expected.low, 100 * expected.high
    assert upper.found == f'-1.7 points ({low:+.1f} to {high:+.1f})'


@pytest.mark.parametrize(
    ('best', 'holds'), [({'q+v'}, True), ({'q+v', 'q'}, None), ({'k'}, False), ({'q+v', 'k'}, None)]
)
def test_query_and_value_have_to_beat_each_of_both(best, holds):
    own, results = paper('hu2022'), made_up(paper('hu2022'), lambda way: 0.8)
    rng = np.random.default_rng(3)
    for one in results.of('matrices'):
        matrices = one.settings['method'].partition('[attn_matrices=[')[2].partition(']')[0]
        level = 0.9 if matrices.replace(',', '+') in best else 0.8
        one.scores[:] = (level + 0.001 * rng.standard_normal(3)).tolist()
    (found,) = (f for f in own.findings(results) if f.where == 'table 5')
    assert found.holds is holds and ' to q, ' in found.found and found.found.endswith(' to k')


def test_a_gap_that_is_larger_and_undecided_leaves_query_and_value_undecided():
    own, results = paper('hu2022'), made_up(paper('hu2022'), lambda way: 0.8)
    for one in results.of('matrices'):
        matrices = one.settings['method'].partition('[attn_matrices=[')[2].partition(']')[0]
        levels = {'q,v': (0.9, 0.901, 0.899), 'k': (0.85, 0.852, 0.849), 'q': (0.1, 0.9, 0.5)}
        one.scores[:] = levels.get(matrices, one.scores)
    (found,) = (f for f in own.findings(results) if f.where == 'table 5')
    assert found.holds is None


@pytest.mark.parametrize(('middle', 'holds'), [(0.7, True), (0.9, False)])
def test_scores_have_to_fall_with_every_larger_sigma(middle, holds):
    sigma, means = 'method.init_sigma', {1e-7: 0.8, 1e-2: 0.8, 1e-1: middle, 1.0: 0.4}
    rows = [row('cr', 'init', (mean,), settings={sigma: s}) for s, mean in means.items()]
    found = paper('houlsby2019').findings(Results(rows, {'spans': {}}, 'small'))
    (starts,) = (one for one in found if one.where == 'figure 6, right')
    assert starts.holds is holds


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
