"""The benchmark of populations writes what it measured, of toys."""

import json

import pytest
import toy

from experiments.bench import population
from experiments.output import write

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.mark.slow
def test_the_tables_are_made_of_the_numbers(tmp_path, capsys, monkeypatch):
    backbone = toy.write_backbone(tmp_path / 'bert', layers=2)
    config = toy.config(backbone, toy.write_texts(tmp_path / 'texts.csv', 80))
    config.data.cache_dir = str(tmp_path / 'cache')
    result = population.benchmark(config, [1, 2], 2, repeats=1, folder=tmp_path / 'runs')
    result['backbone'] = 'toy'
    one, two = result['steps']
    # With both layers adapted there is no trunk, and so nothing to keep.
    assert set(one['ways']) == {
        *('alone, computed', 'alone, cached', 'population, computed', 'population, cached')
    }
    assert set(two['ways']) == {'alone, computed', 'population, computed'}
    assert set(one['gains']) == {'alone', 'population'} and two['gains'] == {}
    assert one['ways']['alone, computed']['ratio'] == {'value': 1, 'low': 1, 'high': 1}
    lines = []

    def stand_in(command, *arguments):
        lines.append((command, *arguments))
        return 3.0 if command == 'sweep' else 2.0

    monkeypatch.setattr(population, 'run', stand_in)
    commands = population.measure_commands(config, 1, 2, 4, 5, tmp_path / 'commands')
    assert commands == {'layers': 1, 'epochs': 5, 'alone': 8.0, 'sweep': 3.0}
    assert [line[0] for line in lines] == ['train'] * 2 + ['sweep'] + ['train'] * 2
    assert all('--config=configs/quickstart.py:method=pfeiffer[leave_out=[0]]' in x for x in lines)
    assert all(
        {f'--config.backbone={backbone}', '--config.training.dtype=float32'} <= {*x} for x in lines
    )
    write(tmp_path, 'population', result | {'commands': [commands]}, population.render)
    table = (tmp_path / 'population.md').read_text()
    assert table in capsys.readouterr().out
    rows = [[cell.strip() for cell in row.split('|')[1:-1]] for row in table.splitlines()]
    assert ['1', '5', '8 s', '3 s', '0.38'] in rows
    assert rows[3][0] == '2' and rows[3][2] == rows[3][4] == 'no trunk'
    assert [row[:2] for row in rows[7:11]] == [
        ['1', 'alone'],
        ['1', 'population'],
        ['2', 'alone'],
        ['2', 'population'],
    ]
    assert json.loads((tmp_path / 'population.json').read_text())['members'] == 2
