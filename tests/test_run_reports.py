"""Reports of finished runs: rows, tests of significance, and what is refused."""

import csv
import json
import shlex

import numpy as np
import pytest
from scipy import stats

from experiments.report import __main__ as report
from experiments.report import figures, runs, significance


def write_run(
    folder,
    method,
    seed,
    score,
    right=(),
    rate=0.1,
    curve=0,
    text='',
    kind='classification',
    split='validation',
    **aside,
):
    """Write what `train` and `evaluate` leave of a run."""
    workdir = folder / f'{method}_{seed}_{rate}'
    workdir.mkdir(parents=True)
    config = {'method': method, 'seed': seed, 'optimizer': {'learning_rate': rate}}
    config |= {'data': {'cache_dir': str(workdir)} | aside, 'task': {'name': kind}}
    summary = {'primary': 'accuracy', 'trainable_parameters': 25, 'total_parameters': 1000}
    summary |= {'seconds': 60.0, 'hardware': 'a processor', 'commit': 'abcdef123'}
    scores = {'metrics': {'accuracy': score, 'f1': score / 2}}
    for name, value in (('config', config), ('summary', summary), ('evaluation_test', scores)):
        (workdir / f'{name}.json').write_text(json.dumps(value))
    lines = [
        {'text_a': f'{text}{i}', 'gold': 'a', 'prediction': 'a' if hit else 'b', 'logits': [score]}
        for i, hit in enumerate(right)
    ]
    if lines:
        text = ''.join(f'{json.dumps(line)}\n' for line in lines)
        (workdir / 'predictions_test.jsonl').write_text(text)
    rows = [{'step': i, 'split': 'train', 'values': {'loss': 2.0**-i}} for i in range(curve)]
    rows += [{'step': curve, 'split': split, 'values': {'accuracy': score}}] * bool(curve)
    (workdir / 'metrics.jsonl').write_text(''.join(f'{json.dumps(row)}\n' for row in rows))
    return workdir


@pytest.fixture
def written(tmp_path):
    """Two methods with three seeds each."""
    folder = tmp_path / 'runs'
    for seed, (ours, theirs) in enumerate([(0.8, 0.7), (0.9, 0.75), (0.85, 0.8)]):
        write_run(folder, 'lora', seed, ours, [True] * 8 + [False] * 2, curve=300)
        write_run(folder, 'full', seed, theirs, [True] * 3 + [False] * 7, curve=300)
    return folder


def test_runs_that_differ_in_the_seed_alone_are_one_row(written):
    full, lora = runs.groups(runs.find([str(written)], 'test'))
    assert (full.name, lora.name) == ('full', 'lora')
    assert full.settings == {'method': 'full'}
    assert lora.values('accuracy') == [0.8, 0.9, 0.85]
    write_run(written, 'lora', 0, 0.5, rate=0.2)
    names = [group.name for group in runs.groups(runs.find([str(written)], 'test'))]
    rate = 'optimizer.learning_rate'
    assert names == [f'full, {rate}=0.1', f'lora, {rate}=0.1', f'lora, {rate}=0.2']


def test_a_commit_whose_files_had_changed_is_told_apart(tmp_path):
    path = write_run(tmp_path / 'runs', 'lora', 0, 0.5) / 'summary.json'
    path.write_text(path.read_text().replace('abcdef123', 'abcdef123+'))
    write_run(tmp_path / 'runs', 'lora', 1, 0.5)
    text = (run_report(tmp_path / 'runs', tmp_path) / 'report.md').read_text()
    assert 'commits `abcdef1`, `abcdef1+` (+: files had changed since).' in text


def test_settings_can_be_left_out(tmp_path):
    write_run(tmp_path, 'lora', 0, 0.5, dir='/here')
    write_run(tmp_path, 'lora', 1, 0.5, dir='/there')
    found = runs.find([str(tmp_path)], 'test')
    assert len(runs.groups(found)) == 2
    assert [group.name for group in runs.groups(found, ['data.dir'])] == ['all runs']


def test_differences_are_tested_over_seeds_and_over_examples(written):
    full, lora = runs.groups(runs.find([str(written)], 'test'))
    found = significance.compare(lora, full, 'accuracy')
    expected = stats.ttest_rel([0.8, 0.9, 0.85], [0.7, 0.75, 0.8])
    interval = expected.confidence_interval(0.95)
    assert (found.seeds, found.mean) == (3, pytest.approx(0.1))
    assert found.by_seeds == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == (pytest.approx(interval.low), pytest.approx(interval.high))
    # Of ten examples ours alone has five right, the same ones with each of three seeds.
    assert found.by_examples == pytest.approx(2 * 0.5**5)


def test_an_example_is_of_the_side_that_had_it_right_with_more_seeds(tmp_path):
    ours = ([1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 1, 0])
    theirs = ([0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 0, 1])
    for seed in range(3):
        write_run(tmp_path, 'lora', seed, 0.8, ours[seed])
        write_run(tmp_path, 'full', seed, 0.7, theirs[seed])
    full, lora = runs.groups(runs.find([str(tmp_path)], 'test'))
    # Sums over the seeds are 3, 2, -1, 1, 1 and -1: four of ours, two of theirs.
    expected = stats.binomtest(4, 6, 0.5).pvalue
    assert significance.compare(lora, full, 'accuracy').by_examples == pytest.approx(expected)


@pytest.mark.parametrize('seed', [0, 1])
def test_runs_on_other_examples_have_no_test_by_examples(tmp_path, seed):
    for method in ('lora', 'full'):
        for own in range(2):
            text = 'other' if (method, own) == ('lora', seed) else ''
            write_run(tmp_path / 'runs', method, own, 0.5 + own / 9, [True] * 6, text=text)
    out = run_report(tmp_path / 'runs', tmp_path, baseline='method=full')
    full, lora = json.loads((out / 'report.json').read_text())['rows']
    assert lora['difference']['by_examples'] is None and full['difference'] is None
    said = 'Of 1 of 1 rows there is no p by examples: the runs were not tested on the same examples'
    assert said in (out / 'report.md').read_text()


@pytest.mark.parametrize(('image', 'same'), [('B/1.png', True), ('A/2.png', False)])
def test_images_are_told_apart_by_their_files_names(image, same, tmp_path):
    for method, own in (('lora', 'A/1.png'), ('full', image)):
        workdir = write_run(tmp_path, method, 0, 0.5)
        line = {'image': own, 'gold': 'a', 'prediction': 'a'}
        (workdir / 'predictions_test.jsonl').write_text(json.dumps(line))
    full, lora = runs.groups(runs.find([str(tmp_path)], 'test'))
    found = significance.compare(lora, full, 'accuracy')
    assert (found.same_examples, found.by_examples) == (same, 1.0 if same else None)


def test_members_of_a_population_share_its_time(tmp_path):
    workdir = write_run(tmp_path, 'lora', 0, 0.5)
    summary = json.loads((workdir / 'summary.json').read_text())
    (workdir / 'summary.json').write_text(json.dumps(summary | {'population': 4}))
    write_run(tmp_path, 'lora', 1, 0.5)
    (group,) = runs.groups(runs.find([str(tmp_path)], 'test'))
    assert report.row(group, 'accuracy', None)['seconds'] == pytest.approx((60 / 4 + 60) / 2)


def test_a_cell_with_a_bar_stays_one_cell(tmp_path):
    write_run(tmp_path / 'runs', 'lora[r=16]|houlsby', 0, 0.5)
    write_run(tmp_path / 'runs', 'full', 0, 0.6)
    out = run_report(tmp_path / 'runs', tmp_path)
    assert '| lora[r=16]\\|houlsby | 0.5000 |' in (out / 'report.md').read_text()
    assert 'lora[r=16]|houlsby,0.5000' in (out / 'report.csv').read_text()


def test_by_luck_few_differences_are_found():
    """Of pairs without a true difference, five in a hundred have a p below 0.05."""
    rng = np.random.default_rng(0)
    found = [significance.student(rng.standard_normal(4).tolist())[2] for _ in range(4000)]
    assert np.mean(np.array(found) < 0.05) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize(
    ('differences', 'expected'),
    [
        ([0.1], (None, None, None)),
        ([0.0, 0.0], (0, 0, 1)),
        ([0.1, 0.1], (None, None, None)),
        (
            [0.952 - 0.95, 0.956 - 0.954, 0.514 - 0.512],
            (None, None, None),
        ),  # equal but for rounding
    ],
)
def test_what_no_test_can_say(differences, expected):
    assert significance.student(differences) == expected


def test_groups_without_a_common_seed_are_not_compared(tmp_path):
    write_run(tmp_path, 'lora', 0, 0.5)
    write_run(tmp_path, 'full', 1, 0.5)
    full, lora = runs.groups(runs.find([str(tmp_path)], 'test'))
    assert significance.compare(lora, full, 'accuracy') is None


def test_predictions_that_are_no_labels_are_not_counted(tmp_path):
    for method, score in (('lora', 0.5), ('full', 0.6)):
        workdir = write_run(tmp_path, method, 0, score)
        line = {'gold': ['a'], 'prediction': ['a']}
        (workdir / 'predictions_test.jsonl').write_text(json.dumps(line))
    full, lora = runs.groups(runs.find([str(tmp_path)], 'test'))
    found = significance.compare(lora, full, 'accuracy')
    assert found.by_examples is None and found.by_seeds is None


def test_a_command_that_is_told_can_be_pasted(tmp_path):
    workdir = tmp_path / 'my runs' / 'a'
    workdir.mkdir(parents=True)
    (workdir / 'summary.json').write_text('{}')
    with pytest.raises(FileNotFoundError) as error:
        runs.find([str(tmp_path)], 'test')
    told = shlex.split(str(error.value).split('`')[1])
    expected = ['python', '-m', 'adapters_jax.evaluate', f'--workdir={workdir}', '--split=test']
    assert told == expected


@pytest.mark.parametrize(('kind', 'told'), [('seq2seq', None), ('classification', 1.0)])
def test_written_texts_are_not_right_or_wrong(kind, told, tmp_path):
    for method, score in (('lora', 40.0), ('full', 2.0)):
        write_run(tmp_path, method, 0, score, [False] * 6, kind=kind)
    full, lora = runs.groups(runs.find([str(tmp_path)], 'test'))
    assert significance.compare(lora, full, 'accuracy').by_examples == told


def run_report(written, tmp_path, **options):
    given = {'split': 'test', 'metric': '', 'baseline': '', 'ignore': ()} | options
    report.main([str(written)], str(tmp_path / 'out'), **given)
    return tmp_path / 'out'


def test_a_report_is_tables_and_figures(written, tmp_path, capsys):
    out = run_report(written, tmp_path, baseline='method=full')
    stored = json.loads((out / 'report.json').read_text())
    assert stored['baseline'] == 'full' and stored['metric'] == 'accuracy'
    head, full, lora = csv.reader((out / 'report.csv').read_text().splitlines())
    assert head[:3] == ['method', 'accuracy', 'seeds'] and head[-1] == 'p, examples'
    assert full[:3] == ['full', '0.7500 ± 0.0500', '3'] and full[-3:] == ['', '', '']
    assert lora[3] == '25 (2.5 %)' and lora[-3].startswith('+0.1000 (-0.0242 to +0.2242)')
    table = (out / 'report.md').read_text()
    assert f'| {" | ".join(lora)} |' in table and "McNemar's" in table
    for name in ('scores', 'sizes', 'courses'):
        assert (out / f'{name}.png').stat().st_size > 5000
    assert 'courses.png' in capsys.readouterr().out


def test_another_metric_and_runs_without_a_course(tmp_path):
    write_run(tmp_path / 'runs', 'lora', 0, 0.5)
    out = run_report(tmp_path / 'runs', tmp_path, metric='f1')
    assert '| 0.2500 | 1 |' in (out / 'report.md').read_text()
    assert not (out / 'courses.png').exists()


def test_the_course_is_of_the_split_that_chose_the_best_step(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(figures, 'save', lambda figure, path: saved.append(figure))
    write_run(tmp_path, 'lora', 0, 0.5, curve=9, split='validation_matched')
    assert figures.courses(runs.groups(runs.find([str(tmp_path)], 'test')), 'accuracy', tmp_path)
    _, validation = saved[0].axes
    assert [line.get_ydata()[-1] for line in validation.lines] == [0.5]


def test_names_with_dollars_are_no_formulas(tmp_path):
    for name in ('/a/$x$', r'/b/$\frac$'):
        write_run(tmp_path / 'runs', 'lora', len(name), 0.5, curve=9, dir=name)
    assert (run_report(tmp_path / 'runs', tmp_path) / 'courses.png').exists()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'metric': 'bleu'}, "has no metric 'bleu' of test, but accuracy, f1"),
        ({'baseline': 'method=ia3'}, 'fits 0 rows of: full; lora'),
        ({'baseline': 'full'}, "has 'full'; expected key=value;key=value, such as method=full"),
        (
            {'split': 'validation'},
            r'has no evaluation_validation.json; run `python -m adapters_jax',
        ),
    ],
)
def test_what_is_refused(written, tmp_path, options, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_report(written, tmp_path, **options)


def test_a_split_without_labels_has_no_report(written, tmp_path):
    (written / 'full_0_0.1' / 'evaluation_test.json').write_text('{"metrics": {}}')
    with pytest.raises(ValueError, match='no metrics of test, whose examples have no labels'):
        run_report(written, tmp_path)


def test_a_folder_without_runs_and_a_run_twice(written, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(FileNotFoundError, match='holds no finished run'):
        runs.find([str(tmp_path / 'empty')], 'test')
    twice = runs.find([str(written), str(written)], 'test')
    with pytest.raises(ValueError, match='are the same run'):
        runs.groups(twice)


def test_a_run_that_diverged_is_not_sent_to_evaluate(tmp_path):
    workdir = write_run(tmp_path, 'lora', 0, 0.5)
    (workdir / 'evaluation_test.json').unlink()
    told = {'finished': 'diverged: the loss of step 4 is nan'}
    (workdir / 'summary.json').write_text(json.dumps(told))
    with pytest.raises(ValueError, match='step 4 is nan; it left no adapter to evaluate: name the'):
        runs.find([str(tmp_path)], 'test')


@pytest.mark.parametrize(
    'name', ['summary.json', 'evaluation_test.json', 'predictions_test.jsonl', 'metrics.jsonl']
)
def test_a_copy_that_was_cut_off_is_named(written, tmp_path, name):
    path = written / 'lora_1_0.1' / name
    path.write_text(path.read_text()[:-4])
    with pytest.raises(ValueError, match=f'lora_1_0.1/{name} is not JSON .*: copy the run anew'):
        run_report(written, tmp_path, baseline='method=full')
