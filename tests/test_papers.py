"""The protocols of papers: the configs say what was published, and each runs to its report."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy
from all_papers import NAMES, paper, row

from adapters_jax import config as configs
from adapters_jax import files, sweep
from adapters_jax.training import grid
from configs.papers import protocol
from experiments import fusion_heatmap
from experiments.papers import command, report
from experiments.papers import runner as runners
from experiments.papers.runner import NotYetError, Runner
from experiments.papers.study import Cell, Results

ROOT = Path(__file__).parents[1]
QUICK = ('training.steps=2', 'training.evaluate_every=2', 'data.max_length=16')


@pytest.fixture(scope='module')
def given(tmp_path_factory):
    """Backbones of one, two and six layers, and four sets of short texts in their files' forms."""
    folder = tmp_path_factory.mktemp('papers')
    sets = folder / 'data' / 'sentences'
    sets.mkdir(parents=True)
    names = ('TREC.train.all', 'TREC.test.all', 'custrev.all', 'mpqa.all', 'subj.all')
    for seed, name in enumerate(names):
        topics = sorted(toy.TOPICS)
        rows = toy.texts(40 if 'test' in name else 150, seed)
        (sets / name).write_text(''.join(f'{topics.index(t)} {text}\n' for text, t in rows))
    backbones = {n: toy.write_backbone(folder / f'bert{n}', layers=n, hidden=16) for n in (1, 2, 6)}
    return backbones, str(folder / 'data')


def runner(name, given, output, tasks=(), layers=2, version='paper'):
    backbones, data = given
    return Runner(
        paper(name),
        'small',
        data,
        output / 'runs',
        tasks,
        [f'backbone={backbones[layers]}', *QUICK],
        version,
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
    assert 'gelu_new' in compacter.method and compacter.sweep.grid == ('seed=0,1,2,3,4',)


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


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('scale', protocol.SCALES)
def test_the_published_code_is_asked_for_where_it_says_otherwise(name, scale):
    own = paper(name)
    cells = {cell.way: cell for cell in own.cells(scale) if not cell.sources}
    if 'code' not in own.versions:
        said = f"--source is 'code'; {name} has paper alone: .*; leave --source out"
        with pytest.raises(ValueError, match=said):
            Runner(own, scale, '', Path('runs'), version='code')
        with pytest.raises(ValueError, match="source is 'code'; expected one of paper"):
            own.recipe(f'way={next(iter(cells))},scale={scale},source=code')
        return
    by_paper, by_code = (Runner(own, scale, '', Path('runs'), version=v) for v in protocol.BOTH)
    for cell in cells.values():
        members = grid.expand(by_code.config(cell))
        assert all(key in member.settings for member in members for key in cell.by)
    differ = {way for way, c in cells.items() if by_paper.name_of(c) != by_code.name_of(c)}
    changed = {'houlsby2019': 'adapters', 'hu2022': 'lora', 'mahabadi2021': 'compacter'}
    assert changed[name] in differ  # so that its runs are not taken for those of the paper


def test_at_small_scale_the_code_changes_what_it_says_and_no_more():
    own = Runner(paper('hu2022'), 'small', '', Path('runs'), ['trec'], version='code')
    found = {cell.way: own.config(cell) for cell in own.cells}
    assert found['lora'].method == 'lora[r=8,alpha=16]'
    assert found['lora'].training.batch_size == 32 and found['lora'].optimizer.weight_decay == 0.1
    assert all('alpha=16' in member.config.method for member in grid.expand(found['matrices']))
    compacter = paper('mahabadi2021').recipe('task=trec,scale=small,source=code')
    assert compacter.sweep.grid == ('optimizer.learning_rate=0.001,0.003', 'seed=0,1,2')


def test_a_report_of_the_code_is_in_a_folder_of_its_own():
    names = [report.folder('hu2022', 'small', version) for version in protocol.BOTH]
    assert names == ['hu2022_small', 'hu2022_small_code']


def test_full_fine_tuning_is_trained_once_for_all_papers(given, tmp_path):
    folders = set()
    for name in NAMES:
        own = runner(name, given, tmp_path)
        cell = next(cell for cell in own.cells if (cell.task, cell.way) == ('cr', 'full'))
        folders.add(own.name_of(cell))
    assert len(folders) == 1


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


@pytest.mark.usefixtures('compiled_once')
def test_a_slice_of_a_protocol_is_trained_reported_and_resumed(given, tmp_path, monkeypatch):
    own = runner('hu2022', given, tmp_path, ['mpqa'], layers=1, version='code')
    own.options.append('sweep.grid=["seed=0,1"]')
    own.cells = [cell for cell in own.cells if cell.way in ('lora', 'bitfit')]
    command.train_part(own, '0/2')
    (first,) = (tmp_path / 'runs').iterdir()
    kept = first.stat().st_mtime_ns
    command.finish(own, tmp_path / 'report')
    assert len(list((tmp_path / 'runs').iterdir())) == 2 and first.stat().st_mtime_ns == kept
    path = tmp_path / 'report' / 'hu2022.json'
    result = json.loads(path.read_text())
    assert [row['way'] for row in result['rows']] == ['lora', 'bitfit']
    assert all(
        len(row['scores']) == 2 and np.isfinite(row['scores']).all() for row in result['rows']
    )
    (finding,) = result['findings']
    assert finding['claim'] == 'LoRA beats BitFit (in the paper by 2.0 points)'
    text = path.with_suffix('.md').read_text()
    assert 'those of the published code' in text and '--scale=small --source=code' in text
    assert result['options'] == list(own.options) and ' All runs have `--option=backbone=' in text
    assert 'Tasks: in part mpqa (of trec, cr, mpqa). 4 more of the claims' in text
    monkeypatch.setattr(runners, 'sweep', None)  # nothing is trained, nothing evaluated again
    monkeypatch.setattr(runners, 'evaluate', None)
    command.finish(own, tmp_path / 'report')
    assert json.loads(path.read_text())['rows'] == result['rows']


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
@pytest.mark.parametrize('name', TASKS)
def test_a_protocol_runs_to_its_report(name, given, tmp_path):
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
    assert 'Tasks: in part mpqa' in text
    assert '--scale=small --tasks=mpqa --option=backbone=' in text


def test_a_report_grows_by_what_is_trained_on_other_days():
    stored = Path(report.__file__).parents[1] / 'results' / 'papers' / 'houlsby2019_small'
    before = json.loads((stored / 'houlsby2019.json').read_text())
    before['rows'] = [row for row in before['rows'] if row['task'] != 'cr']  # as of the day before
    before['examined']['spans'].pop('cr', None)
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
    with pytest.raises(ValueError, match="is of source 'paper', not 'code'; set another --output"):
        report.extended(before, now, 'code')


def test_a_report_is_of_the_same_options_throughout():
    row = {'paper': 'hu2022', 'scale': 'small', 'rows': [], 'examined': {}, 'findings': []}
    now = Results([], {}, 'small')
    assert report.extended(row, now).rows == []  # written before options were stored
    said = 'is of no --option, not --option=seed=1 --option=a=2; set another --output'
    with pytest.raises(ValueError, match=said):
        report.extended(row, now, 'paper', ['seed=1', 'a=2'])
    with pytest.raises(ValueError, match='is of --option=seed=1, not no --option'):
        report.extended(row | {'options': ['seed=1']}, now)
    report.extended(row | {'options': ['seed=1']}, now, 'paper', ['seed=1'])


def test_attention_is_over_texts_with_any_character(tmp_path, monkeypatch):
    lines = [{'text_a': text, 'gold': 'a'} for text in ('one\u2028two', 'three\x85')]
    told = ''.join(json.dumps(line, ensure_ascii=False) + '\n' for line in lines)
    (tmp_path / 'predictions_test.jsonl').write_text(told, 'utf-8')
    seen = []

    def weigh(adapter, rows):
        seen.extend(rows)
        return {'f': ('a', 'b')}, {'f': {'layer_0/feed_forward': np.array([0.5, 0.5])}}

    monkeypatch.setattr(fusion_heatmap, 'mean_weights', weigh)
    fused = dataclasses.replace(row(way='fusion'), workdirs=['.'])
    paper('pfeiffer2021').examine(Results([fused], {}, 'small'), tmp_path)
    assert seen == [{'text': 'one\u2028two'}, {'text': 'three\x85'}]


# ---- parts of a protocol, and what they begin with


def test_a_part_does_what_it_can_and_names_what_waits(monkeypatch, caplog):
    own = Runner(paper('pfeiffer2021'), 'small', '', Path('runs'), ['cr@100'])
    tried = []

    def rows(self, cell):
        tried.append(cell)
        first_time = tried.count(cell) == 1
        if cell.way == 'fusion' or (cell == own.cells[0] and first_time):
            raise NotYetError(f'{cell.name} begins with others')
        return []

    monkeypatch.setattr(Runner, 'rows', rows)
    with caplog.at_level('INFO', 'adapters_jax.papers'):
        command.train_part(own, '0/1')
    fusion = own.cells[-1]
    assert tried == [*own.cells, own.cells[0], fusion] and fusion.way == 'fusion'
    said = caplog.messages[-1]
    assert said.startswith('skipped fusion on cr@100, which cannot be trained yet; all else of the')
    assert 'Run the same command once more when the other parts have ended' in said
    with pytest.raises(NotYetError, match=r'no report yet: another job .* fusion on cr@100; run'):
        command.finish(own, Path('nowhere'))


def test_a_part_whose_cells_all_wait_ends_without_a_mistake(tmp_path):
    cells = Runner(paper('pfeiffer2021'), 'small', '', tmp_path, ['cr@100']).cells
    last = len(cells) - 1
    assert cells[last].way == 'fusion'
    words = [f'--shard={last}/{last + 1}', '--tasks=cr@100', f'--output={tmp_path}']
    done = subprocess.run(
        [sys.executable, '-m', 'experiments.pfeiffer2021', *words],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'fusion on cr@100 begins with adapter on trec, which has not ended yet' in done.stderr
    assert 'skipped fusion on cr@100, which cannot be trained yet' in done.stderr
    assert not (tmp_path / 'pfeiffer2021_small').exists()


def test_speeds_are_of_the_backbone_that_was_trained(given, tmp_path, monkeypatch):
    module = importlib.import_module('experiments.ruckle2021')
    config = paper('ruckle2021').recipe(f'task=cr,scale=small,backbone={given[0][2]}')
    (tmp_path / 'run').mkdir()
    files.write_json(tmp_path / 'run' / 'config.json', configs.to_json(config))
    stored = ROOT / 'experiments' / 'results' / 'papers' / 'ruckle2021_small' / 'ruckle2021.json'
    known, _ = report.from_json(json.loads(stored.read_text()))
    (row,) = known.of('full', 'cr')
    measured = []
    monkeypatch.setattr(
        module.adapter_drop, 'measure', lambda _, own, *__: measured.append(own) or {}
    )
    found = Results([dataclasses.replace(row, workdirs=['run'])], {}, 'small')
    paper('ruckle2021').examine(found, tmp_path)
    assert [own.config.depth for own in measured] == [2]


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_once')
def test_shards_train_each_cell_once_and_a_cell_waits_for_its_sources(given, tmp_path):
    own = runner('pfeiffer2021', given, tmp_path, ['cr@100'])
    own.cells = [cell for cell in own.cells if cell.way in ('adapter', 'fusion')]
    last = len(own.cells) - 1
    assert own.cells[last].way == 'fusion' and len(own.cells[last].sources) == 4
    assert own.train(grid.Shard(last, last + 1)) == [own.cells[last]]
    own.cells = own.cells[:2]
    trained = []
    for index in range(2):
        own.train(grid.Shard(index, 2))
        trained.append({path.name for path in (tmp_path / 'runs').iterdir()})
    assert [len(names) for names in trained] == [1, 2]
    first = own.rows(own.cells[0])
    assert dataclasses.asdict(first[0]) == dataclasses.asdict(own.rows(own.cells[0])[0])
    assert np.isfinite(first[0].scores).all() and len(first[0].seeds) == 3


def test_an_option_without_a_value_is_refused(tmp_path):
    own = Runner(paper('hu2022'), 'small', '', tmp_path, ['cr'], ['task.primary'])
    with pytest.raises(ValueError, match=r'has no value; expected --option=task.primary=VALUE'):
        own.train(grid.Shard(0, 1))


def test_a_task_that_the_protocol_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--tasks has 'sst2'; the protocol has trec, cr, mpqa"):
        Runner(paper('hu2022'), 'small', '', Path(tmp_path), ['sst2'])


def test_cells_that_others_begin_with_come_along():
    own = Runner(paper('hu2022'), 'full', '', Path('runs'), ['rte'])
    assert Cell('mnli', 'lora') in own.cells
    assert [c.task for c in own.cells if c.way == 'full'] == ['rte']
