"""The protocols of papers: the configs say what was published, and each runs to its report."""

import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import toy
from scipy import stats

from adapters_jax import sweep
from adapters_jax.training import grid
from configs.papers import protocol
from experiments.papers import command, report
from experiments.papers.runner import NotYetError, Runner
from experiments.papers.study import Cell, Finding, MissingError, Results, Row, told_share

NAMES = ('houlsby2019', 'pfeiffer2021', 'ruckle2021', 'hu2022', 'he2022', 'mahabadi2021', 'mao2022')
QUICK = ('training.steps=2', 'training.evaluate_every=2', 'data.max_length=16')


def paper(name):
    module = importlib.import_module(f'experiments.{name}')
    return next(
        kind()
        for kind in vars(module).values()
        if isinstance(kind, type) and getattr(kind, 'name', '') == name
    )


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    """Backbones of two and six layers, and four sets of short texts in their files' forms."""
    folder = tmp_path_factory.mktemp('papers')
    sets = folder / 'data' / 'sentences'
    sets.mkdir(parents=True)
    names = ('TREC.train.all', 'TREC.test.all', 'custrev.all', 'mpqa.all', 'subj.all')
    for seed, name in enumerate(names):
        topics = sorted(toy.TOPICS)
        rows = toy.texts(40 if 'test' in name else 150, seed)
        (sets / name).write_text(''.join(f'{topics.index(t)} {text}\n' for text, t in rows))
    backbones = {n: toy.write_backbone(folder / f'bert{n}', layers=n, hidden=16) for n in (2, 6)}
    return backbones, str(folder / 'data')


def runner(name, given, output, tasks=(), layers=2):
    backbones, data = given
    return Runner(
        paper(name),
        'small',
        data,
        output / 'runs',
        tasks,
        [f'backbone={backbones[layers]}', *QUICK],
    )


# ---- the configs


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('scale', protocol.SCALES)
def test_every_cell_is_a_sweep_whose_members_could_be_trained(name, scale):
    own = paper(name)
    cells = list(own.cells(scale))
    assert len({(cell.task, cell.way) for cell in cells}) == len(cells)
    seen = set()
    for cell in cells:
        seen.add((cell.task, cell.way))
        assert {(task, cell.source) for task in cell.sources} <= seen  # what it needs comes first
        if cell.task != cells[0].task:
            continue  # the rows are the same ones
        config = own.recipe(f'task={cell.task},way={cell.way},scale={scale}')
        members = grid.expand(config) if not cell.sources else []
        for key in cell.by:
            assert len({json.dumps(member.settings[key]) for member in members}) > 1
        assert cell.way in own.titles


def test_published_settings_are_those_of_the_papers():
    def config(name, argument):
        return importlib.import_module(f'configs.papers.{name}').get_config(argument)

    houlsby = config('houlsby2019', 'task=rte')
    assert houlsby.backbone == 'bert-large-uncased' and houlsby.training.batch_size == 32
    assert len(grid.expand(houlsby)) == 3 * 2 * 3 * 5
    lora = config('hu2022', 'task=mrpc')
    assert (lora.training.epochs, lora.training.batch_size, lora.data.max_length) == (30, 16, 512)
    assert (lora.optimizer.learning_rate, lora.optimizer.warmup) == (4e-4, 0.06)
    assert (
        'alpha=8' in lora.method and 'alpha=16' in config('hu2022', 'task=mrpc,source=code').method
    )
    fusion = config('pfeiffer2021', 'task=rte,way=fusion,sources=mnli+rte')
    assert fusion.method == 'fuse(mnli, rte)'
    assert (fusion.optimizer.learning_rate, fusion.training.epochs) == (5e-5, 10)
    mam = config('he2022', 'task=sst2')
    assert (mam.optimizer.b2, mam.optimizer.weight_decay, mam.training.epochs) == (0.98, 0.1, 10)
    few = config('mao2022', 'task=rte@100')
    assert (few.data.train_limit, few.data.glue, few.training.patience) == (100, 'rte', 10)
    compacter = config('mahabadi2021', 'task=rte,source=code')
    assert 'reduction_factor=32' in compacter.method and compacter.training.batch_size == 100


# Members and populations of the sweeps that papers published.
PUBLISHED = {
    'houlsby2019': (90, [45, 45]),
    'pfeiffer2021': (9, [3, 3, 3]),
    'hu2022:task=cola': (5, [5]),
}


@pytest.mark.parametrize('name', PUBLISHED)
def test_the_published_sweeps_are_grouped_by_what_must_be_equal(name):
    own, _, argument = name.partition(':')
    module = importlib.import_module(f'configs.papers.{own}')
    members = sweep.expand(module.get_config(f'{argument},backbone=x'))
    count, populations = PUBLISHED[name]
    assert len(members) == count
    assert [len(group) for group in grid.populations(members, 0)] == populations


@pytest.mark.parametrize(
    ('argument', 'said'),
    [
        ('way=all', "way is 'all'; expected one of adapters, "),
        ('scale=tiny', "scale is 'tiny'; expected one of full, small"),
        ('task=rte@few', 'task has @few; expected a number of examples'),
        ('task=sentences', 'unknown task'),
    ],
)
def test_what_no_paper_has_is_refused(argument, said):
    from configs.papers import houlsby2019

    with pytest.raises(ValueError, match=said):
        houlsby2019.get_config(argument)


def test_full_fine_tuning_is_trained_once_for_all_papers(given, tmp_path):
    folders = set()
    for name in NAMES:
        own = runner(name, given, tmp_path)
        cell = next(cell for cell in own.cells if (cell.task, cell.way) == ('cr', 'full'))
        folders.add(own.name_of(cell))
    assert len(folders) == 1


# ---- the results


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


# ---- whole protocols


def check_report(own, tasks, directory):
    result = json.loads((directory / f'{own.name}.json').read_text())
    ways = {cell.way for cell in own.cells('small') if cell.task in tasks}
    assert {row['way'] for row in result['rows']} == ways
    for finding in result['findings']:
        assert finding['found'] and 'nan' not in finding['found']
    assert (directory / f'{own.name}.md').read_text().strip() == report.render(result)
    drawn = list(directory.glob('*.png'))
    assert drawn and all(path.stat().st_size > 4000 for path in drawn)


TASKS = {
    'hu2022': ['cr'],
    'houlsby2019': ['cr', 'mpqa'],
    'pfeiffer2021': ['cr', 'cr@100'],
    'ruckle2021': ['cr'],
    'he2022': ['cr'],
    'mahabadi2021': ['cr'],
    'mao2022': ['cr', 'cr@100'],
}


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
@pytest.mark.parametrize('name', TASKS)
def test_a_protocol_runs_to_its_report(name, given, tmp_path, monkeypatch):
    module = importlib.import_module(f'experiments.{name}')
    if hasattr(module, 'load_backbone'):
        own = module.load_backbone
        monkeypatch.setattr(module, 'load_backbone', lambda _: own(given[0][6]))
    command.finish(runner(name, given, tmp_path, TASKS[name], layers=6), tmp_path / name)
    check_report(paper(name), TASKS[name], tmp_path / name)


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
def test_a_part_of_a_protocol_has_a_report_too(given, tmp_path):
    own = runner('hu2022', given, tmp_path, ['mpqa'])
    own.cells = [cell for cell in own.cells if cell.way in ('full', 'lora')]
    command.finish(own, tmp_path / 'report')
    text = (tmp_path / 'report' / 'hu2022.md').read_text()
    assert 'LoRA is as good as full fine-tuning' in text and 'LoRA beats' not in text
    assert '--scale=small --tasks=mpqa --option=backbone=' in text


def test_a_report_grows_by_what_is_trained_on_other_days():
    stored = Path(report.__file__).parents[1] / 'results' / 'papers' / 'houlsby2019_small'
    before = json.loads((stored / 'houlsby2019.json').read_text())
    known, _ = report.from_json(before)
    anew = dataclasses.replace(known.of('full', 'trec')[0], scores=[0.5, 0.5, 0.5])
    other = dataclasses.replace(known.of('layer_norm', 'trec')[0], task='cr')
    now = Results([anew, other], {'spans': {'cr': {'whole': 1}}}, 'small')
    found = report.extended(before, now)
    assert len(found.rows) == len(known.rows) + 1
    assert found.of('full', 'trec') == [anew] and found.of('layer_norm', 'cr') == [other]
    assert found.of('init') == known.of('init')
    assert set(found.examined['spans']) == {'trec', 'cr'}
    with pytest.raises(ValueError, match="is of scale 'small', not 'full'"):
        report.extended(before, Results([], {}, 'full'))


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
def test_shards_train_each_cell_once_and_a_cell_waits_for_its_sources(given, tmp_path):
    own = runner('pfeiffer2021', given, tmp_path, ['cr@100'])
    own.cells = [cell for cell in own.cells if cell.way in ('adapter', 'fusion')]
    last = len(own.cells) - 1
    assert own.cells[last].way == 'fusion' and len(own.cells[last].sources) == 4
    with pytest.raises(NotYetError, match=r'1 of 1 cells wait for others \(fusion on cr@100\)'):
        own.train(grid.Shard(last, last + 1))
    own.cells = own.cells[:2]
    trained = []
    for index in range(2):
        own.train(grid.Shard(index, 2))
        trained.append({path.name for path in (tmp_path / 'runs').iterdir()})
    assert [len(names) for names in trained] == [1, 2]
    first = own.rows(own.cells[0])
    assert dataclasses.asdict(first[0]) == dataclasses.asdict(own.rows(own.cells[0])[0])
    assert np.isfinite(first[0].scores).all() and len(first[0].seeds) == 3


def test_a_task_that_the_protocol_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--tasks has 'sst2'; the protocol has trec, cr, mpqa"):
        Runner(paper('hu2022'), 'small', '', Path(tmp_path), ['sst2'])


def test_cells_that_others_begin_with_come_along():
    own = Runner(paper('hu2022'), 'full', '', Path('runs'), ['rte'])
    assert Cell('mnli', 'lora') in own.cells
    assert [c.task for c in own.cells if c.way == 'full'] == ['rte']
