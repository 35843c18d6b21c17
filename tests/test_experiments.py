"""The README's numbers are those of the stored results, and nobody's typing."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from adapters_jax.adapters.presets import PRESETS
from adapters_jax.config import assign, to_json
from experiments import conformance, families, table, text_tasks
from experiments.table import ROOT


def of_seeds(values):
    return [
        {
            'evaluation': {'metrics': {'accuracy': value}, 'examples': 10},
            'seed': seed,
            'seconds': 60.0,
            'primary': 'accuracy',
            'trainable_parameters': 25,
            'total_parameters': 1000,
            'hardware': '2 cores of a processor',
            'commit': 'abc',
            'versions': {'jax': '0.10.2'},
        }
        for seed, value in enumerate(values)
    ]


def result(task='trec', method='houlsby', values=(0.5, 0.7)):
    described = {'task': task, 'method': method, 'split': 'test', 'command': '--config=...'}
    return described | text_tasks.over_seeds(of_seeds(values))


def test_mean_and_deviation_are_over_the_seeds():
    score = result()['metrics']['accuracy']
    assert score['mean'] == pytest.approx(0.6)
    assert score['deviation'] == pytest.approx(0.02**0.5)
    assert result(values=(0.5,))['metrics']['accuracy']['deviation'] == 0


def test_seeds_of_several_machines_name_them_all():
    one, other = ({'hardware': name} for name in ('2 cores of a processor', '1 x an accelerator'))
    runs = [
        {**run, **kind}
        for run, kind in zip(of_seeds((0.5, 0.7, 0.6)), (one, other, one), strict=True)
    ]
    found = text_tasks.over_seeds(runs)
    assert found['hardware'] == '2 cores of a processor; 1 x an accelerator'
    row = table.render([result() | found]).splitlines()[2]
    assert row.endswith('| – | CPU, GPU |')


def test_seeds_of_several_commits_and_versions_name_them_all():
    runs = of_seeds((0.5, 0.7, 0.6))
    runs[1] |= {'commit': 'def0123456+', 'versions': {'jax': '0.11.2'}}
    found = text_tasks.over_seeds(runs)
    assert found['commits'] == ['abc', 'def0123456+']
    assert found['versions'] == [{'jax': '0.10.2'}, {'jax': '0.11.2'}]
    old = result() | {'commit': '0123456789', 'versions': {'jax': '0.9'}}  # as of one seed
    del old['commits']
    note = table.render([result() | found, old]).splitlines()[-1]
    assert 'Commits `0123456`, `abc`, `def0123+` (+' in note
    assert 'JAX 0.10.2 and 0.11.2 and 0.9.' in note


def test_finished_runs_of_another_machine_are_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(text_tasks, 'RESULTS', tmp_path)
    for run in of_seeds((0.5, 0.7)):
        workdir = tmp_path / f'trec_head_{run["seed"]}'
        workdir.mkdir()
        (workdir / 'summary.json').write_text(json.dumps(run))
        (workdir / 'evaluation_test.json').write_text(json.dumps(run['evaluation']))
    text_tasks.run('trec', 'head', (0, 1), tmp_path, tmp_path)
    stored = json.loads((tmp_path / 'trec_head.json').read_text())
    assert stored['metrics']['accuracy']['values'] == [0.5, 0.7]


def test_a_row_shows_score_size_and_time():
    row = table.render([result()]).splitlines()[2]
    expected = '| `houlsby` | 25 (2.5 %) | accuracy | 0.600 ± 0.141 | 2 | test (10) | 1.0 | CPU |'
    assert row == f'| {text_tasks.TASKS["trec"].title} {expected}'


def test_methods_that_act_together_stay_in_one_cell():
    row = table.render([result(method='pfeiffer|lora')]).splitlines()[2]
    assert r' | `pfeiffer\|lora` | ' in row


def test_every_command_of_the_table_is_a_config_and_says_what_was_run(tmp_path):
    for task, row in text_tasks.TASKS.items():
        for method in ('houlsby', 'full'):
            config, command = text_tasks.make_config(task, method, tmp_path)
            file, *options = command.split()
            name = file.removeprefix('--config=configs/').partition('.py:')
            module = importlib.import_module(f'configs.{name[0]}')
            typed = module.get_config(name[2])
            for option in options:
                key, _, value = option.removeprefix('--config.').partition('=')
                assign(typed, key, value.replace('DIR', str(tmp_path / row.folder)))
            assert to_json(typed) == to_json(config)
            assert config.method == method


def test_one_seed_has_no_deviation():
    assert '| 0.500 | 1 |' in table.render([result(values=(0.5,))])


def test_inserting_a_table_twice_is_inserting_it_once():
    marks = '<!-- results: begin -->', '<!-- results: end -->'
    text = '\n'.join(['before', marks[0], 'old', marks[1], 'after'])
    once = table.insert(text, 'new')
    assert once == '\n'.join(['before', marks[0], 'new', marks[1], 'after'])
    assert table.insert(once, 'new') == once


def test_the_pages_show_the_stored_results_each_once():
    assert table.read_results(), 'there are no stored results'
    found, pages = table.tables(), [page.read_text() for page in table.PAGES]
    for name in found:
        assert sum(text.count(table.marks(name)[0]) for text in pages) == 1, name
    for text in pages:
        assert table.with_tables(text, found) == text


def test_what_the_pages_link_to_is_there():
    for page in table.PAGES:
        for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
            path, _, heading = target.partition('#')
            if '://' in path:
                continue
            there = page.parent / path if path else page
            assert there.exists(), (page.name, target)
            heads = re.findall(r'^#+ (.*)$', there.read_text() if heading else '', re.M)
            names = [re.sub(r'[^\w -]', '', head).lower().replace(' ', '-') for head in heads]
            assert not heading or heading in names, (page.name, target)


def test_nothing_failed_in_any_family():
    stored = json.loads(families.STORED.read_text())
    rows = [row for of in stored.values() for row in of.values()]
    assert all(shown is not False for row in rows for shown in row.values())


def test_every_method_is_in_the_table_and_nothing_failed():
    stored = json.loads(conformance.STORED.read_text())
    aliases = {name for name, method in PRESETS.items() if method is PRESETS['pfeiffer']}
    expected = set(PRESETS) - conformance.NOT_ADAPTERS - aliases | {'pfeiffer'}
    assert {name for name in stored if name in PRESETS} - aliases | {'pfeiffer'} == expected
    assert all(holds for shown in stored.values() for holds in shown.values())
    own = {conformance.as_it_is(name) for name in conformance.FORMATS}
    assert {shown for row in stored.values() for shown in row} == {*conformance.COLUMNS, *own}


def test_every_test_that_the_pages_name_is_there():
    text = ''.join(page.read_text() for page in table.PAGES)
    named = re.findall(r'`(tests/[\w/]+\.py)::(\w+)`', text)
    assert len(named) > 10
    for path, name in named:
        source = (table.ROOT / path).read_text()
        assert f'\ndef {name}(' in source, f'{path}::{name}'


@pytest.mark.parametrize(
    ('module', 'option', 'told'),
    [
        ('report', '--runs=', '--runs must be given'),
        ('report', '--runs=~/none', '/home/none holds no finished run'),
        ('text_tasks', '--seeds=0', 'flag --seeds=0: 0 is not a positive integer'),
        ('bench.mixed_adapters', '--repeats=0', 'flag --repeats=0: 0 is not a positive integer'),
        ('bench.mixed_adapters', '--lengths=a', "--lengths has 'a'; expected numbers of tokens"),
    ],
)
def test_a_mistake_in_an_option_is_a_sentence(tmp_path, module, option, told):
    line = [sys.executable, '-m', f'experiments.{module}', option, f'--output={tmp_path / "out"}']
    given = os.environ | {'HOME': str(tmp_path / 'home')}
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=ROOT, env=given)
    assert done.returncode == 2 and told in done.stderr
    assert done.stderr.startswith('error: ') and done.stderr.count('\n') == 1
