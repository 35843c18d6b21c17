"""What the reports of papers say, of results that are made up and of those that are stored."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from all_papers import NAMES, paper, row

from experiments.papers import __main__ as again
from experiments.papers import command, report, summary
from experiments.papers.runner import Runner
from experiments.papers.study import Finding, Results
from experiments.table import ROOT

STORED = sorted(summary.FOLDER.glob('*/*.json'))

OTHERS = {
    'source': 'paper',
    'protocol': {'cr': ['full', 'lora']},
    'tables': [{'head': ['a'], 'lines': [['1']], 'note': 'Of a.'}],
    'unanswered': [],
}


def test_a_report_holds_scores_published_numbers_and_verdicts():
    findings = [
        Finding('a', 'table 1', '+1.0 points', True),
        Finding('b', 'here', 'no', False, False),
    ]
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
    assert '| b | here | no | **not confirmed**, without a test |' in text
    assert 'over seeds, of these tasks and these test texts' in text
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
    # Totals of GLUE's server are means of other tasks, too.
    assert best.endswith(' | 60.0 [71.5] | 60.0 |') and 'adapters 80.0' in expected['others']
    assert '[2.1 %] | 50.0 [56.9]' in named['Houlsby adapters, one size']
    assert named['full fine-tuning'].endswith(' | 50.0 [70.1] | 50.0 |')


def test_a_published_mean_stands_beside_ours_where_it_is_of_the_same_tasks():
    own, expected = paper('hu2022'), report.read_expected('hu2022')
    rows = [row(task, 'full', (0.5,)) for task in ('rte', *sorted({*expected['rows']['full']}))]
    rows = [one for one in rows[1:] if one.task != 'mean']
    result = {'titles': own.titles, 'expected': expected, 'scale': 'full'}
    whole = report.scores(result | report.to_json(Results(rows, {}, 'full'), []))
    assert whole.endswith(' | 50.0 [86.4] |')
    fewer = report.to_json(Results(rows[1:], {}, 'full'), [])
    assert '[86.4]' not in report.scores(result | fewer)


@pytest.mark.parametrize('name', NAMES)
def test_a_published_mean_is_that_of_the_tasks_beside_it(name):
    for scores in report.read_expected(name)['rows'].values():
        tasks = [score for task, score in scores.items() if task != 'mean']
        if 'mean' in scores and tasks:
            assert scores['mean'] == pytest.approx(np.mean(tasks), abs=0.06)


def test_a_report_tells_how_often_the_last_value_of_a_grid_was_chosen(tmp_path, monkeypatch):
    own, rate = paper('hu2022'), 'optimizer.learning_rate'
    monkeypatch.setattr(type(own), 'draw', lambda *_: [])
    rows = [row('cr', way) for way in ('lora', 'full', 'bitfit', 'adapter')]
    for one, value in zip(rows, (3e-3, 3e-4, 1e-3, 1e-3), strict=True):
        one.chosen[rate] = value
    one_rate = row('cr', 'ranks', settings={'method.r': 1})
    one_rate.chosen[rate] = 3e-3
    results = Results([*rows, one_rate], {}, 'small')
    said = f'Of 4 rows with a choice among 2 values of `{rate}`, the largest is that of 2 and the '
    assert report.judged(own, results, tmp_path)['edges'].startswith(f'{said}smallest that of 2;')
    options = [f'sweep.grid=["{rate}=1e-4,3e-4,1e-3,3e-3,1e-2"]']
    found = report.judged(own, results, tmp_path, options=options)['edges']
    assert 'Of 5 rows with a choice among 5 values' in found
    assert 'largest is that of 0 and the smallest that of 0;' in found


def test_options_are_told_of_all_runs():
    stored = json.loads(STORED[0].read_text())
    text = report.render(stored | {'options': ['seed=1', 'training.steps=2']})
    said = ' All runs have `--option=seed=1 --option=training.steps=2`'
    assert f'200 steps of 32.{said}, in place of what is said above. ' in text
    whole = stored | {'options': ['seed=1', 'training.steps=2'], 'settings': ''}
    assert f'{said}. ' in report.render(whole)


def test_a_commit_whose_files_had_changed_is_told_apart():
    stored = json.loads(STORED[0].read_text())
    stored['rows'] = [own | {'commits': ['abcdef012', 'abcdef012+']} for own in stored['rows']]
    assert 'commits `abcdef0`, `abcdef0+` (+: files had changed since). ' in report.render(stored)


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
    stored = [json.loads(path.read_text()) for path in STORED]
    assert all(
        f'| {report.told_tasks(own)} | {own["findings"][0]["claim"]}' in text for own in stored
    )
    count = sum(len(own['findings']) for own in stored)
    missing = sum(len(own['unanswered']) for own in stored)
    assert f'Of {count} findings that these tasks could show' in text
    means = [own for report in stored for own in report['findings'] if not own['tested']]
    assert 0 < len(means) < count and f'{count - len(means)} are judged by an interval' in text
    assert f'{len(means)} are of means or single timings, without a test' in text
    assert text.count(', without a test |') == len(means)
    assert f'{missing} more claims ask for rows that were not trained' in text


@pytest.mark.parametrize('path', STORED, ids=lambda path: path.stem)
def test_stored_reports_say_what_follows_from_their_rows(path, tmp_path, monkeypatch):
    own = paper(path.stem)
    monkeypatch.setattr(type(own), 'draw', lambda *_: [tmp_path / n for n in stored['figures']])
    stored = json.loads(path.read_text())
    results, _ = report.from_json(stored)
    judged = report.judged(own, results, tmp_path, stored['source'], stored['options'])
    assert json.loads(json.dumps(judged)) == {key: stored[key] for key in judged}
    assert path.with_suffix('.md').read_text() == report.render(stored) + '\n'


def test_a_report_is_judged_anew_without_training(tmp_path, capsys):
    (path,) = (p for p in STORED if p.stem == 'mao2022')
    shutil.copytree(path.parent, tmp_path / 'own')
    before = json.loads(path.read_text())
    later = ('tables', 'unanswered', 'protocol', 'edges', 'options')  # than the first reports
    old = {key: before[key] for key in before if key not in later}
    (tmp_path / 'own' / path.name).write_text(json.dumps(old | {'findings': []}))
    again.main([str(tmp_path / 'own')])
    assert json.loads((tmp_path / 'own' / path.name).read_text()) == before
    assert 'mao2022.md' in capsys.readouterr().out
    with pytest.raises(SystemExit, match='holds no report; expected the folder PAPER_SCALE'):
        again.main([str(tmp_path)])
    with pytest.raises(SystemExit, match='no folder is given'):
        again.main([])
    again.main(['--help'])
    assert 'python -m experiments.papers DIR/PAPER_SCALE' in capsys.readouterr().out


def test_what_is_no_report_is_not_judged(tmp_path):
    (tmp_path / 'other.json').write_text('{"rows": 3}')
    with pytest.raises(SystemExit, match='holds no report; expected the folder PAPER_SCALE'):
        again.main([str(tmp_path)])
    (tmp_path / 'hu2022.json').write_text('{"paper": ')
    with pytest.raises(SystemExit, match=r'hu2022\.json is not JSON: '):
        again.main([str(tmp_path)])


def test_a_report_of_other_options_is_told_before_anything_is_trained(tmp_path):
    folder = tmp_path / 'hu2022_small'
    folder.mkdir()
    (folder / 'hu2022.json').write_text('{"source": "paper", "scale": "small", "options": []}')
    own = Runner(paper('hu2022'), 'small', '', tmp_path / 'runs', ['trec'], ['seed=1'])
    with pytest.raises(ValueError, match='is of no --option, not --option=seed=1; set another'):
        command.finish(own, folder)
    line = [sys.executable, '-m', 'experiments.hu2022', '--shard=0/2', '--option=seed=1']
    line.append(f'--output={tmp_path}')
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and 'is of no --option, not --option=seed=1' in done.stderr
    assert not (tmp_path / 'runs').exists()
