"""The comparison with full fine-tuning: what is told of a run, and what is made of all."""

import json

import pytest
import toy

from experiments.adapters_vs_finetuning import __main__ as comparison
from experiments.adapters_vs_finetuning import charts, runs
from experiments.adapters_vs_finetuning.runs import ROWS, Row, Setting


def run(rate=0.1, seed=0, validation=0.5, test=0.6, **more):
    return {
        'learning_rate': rate,
        'seed': seed,
        'validation': validation,
        'test': test,
        'seconds': 10.0,
        'memory': 2**30,
        'trainable_parameters': 25,
        'total_parameters': 1000,
        'adapter_bytes': 2**20,
        'norms': [1.0, 2.0, 1.0],
        'median_norm': 1.0,
        'largest_norm': 2.0,
        'vanishing': 0.0,
        'exploding': 0.0,
        'examples': 40,
    } | more


def lost(rate=0.1, seed=0):
    return {'learning_rate': rate, 'seed': seed, 'norms': [1.0], 'diverged': 'the loss of step 3'}


def test_steps_with_a_vanishing_or_an_exploding_gradient_are_counted(tmp_path):
    values = [1.0] * 17 + [0.005, 11.0, 12.0]
    lines = [{'split': 'train', 'values': {'gradient_norm': value}} for value in values]
    lines.insert(3, {'split': 'validation', 'values': {'accuracy': 0.5}})
    path = tmp_path / 'metrics.jsonl'
    path.write_text('\n'.join(map(json.dumps, lines)) + '\n')
    found = runs.norms(path)
    assert (found['vanishing'], found['exploding']) == (1 / 20, 2 / 20)
    assert (found['median_norm'], found['largest_norm'], len(found['norms'])) == (1, 12, 20)
    # A run that diverged in its first step has recorded none.
    assert runs.norms(tmp_path / 'none.jsonl') == {}
    path.write_text(json.dumps(lines[3]) + '\n')
    assert runs.norms(path) == {}


def test_memory_is_that_of_the_device_where_it_is_told():
    assert runs._memory({'host': 9, 'device': 4}) == 4 and runs._memory({'host': 9}) == 9


def test_the_rate_is_chosen_on_validation_among_those_that_never_diverge():
    found = [run(0.1, 0, 0.5), run(0.1, 1, 0.7), run(1.0, 0, 0.9), lost(1.0, 1), run(0.01, 0, 0.4)]
    assert runs.best_rate(found) == 0.1
    assert runs.best_rate([lost(1.0)]) is None
    assert [one['seed'] for one in comparison.chosen(found)] == [0, 1]


def test_the_tables_show_what_was_measured(tmp_path):
    rows = {
        'full': [run(0.1, 0, 0.5, 0.6), run(0.1, 1, 0.6, 0.7), run(1.0, 0, 0.1, 0.2), lost(1.0, 1)],
        'head': [lost()],
    }
    result = {'task': 'trec', 'seeds': [0, 1], 'rows': rows, 'examples': 40, 'hardware': 'x'}
    kept = comparison.without_norms(result)
    assert 'norms' in rows['full'][0] and 'norms' not in kept['rows']['full'][0]
    table = comparison.render(kept)
    expected = (
        '| 25 (2.5 %) | 0.1 | 0.550 ± 0.071 | 0.650 ± 0.071 | 10 | 1,024 | 1.00 |',
        '| 1 | 2.0 | 0.0 % | 0.0 % | 1 of 4 | 0.071 | 0.450 |',
        f'| {ROWS["head"].title} | | | diverged |',
    )
    for line in expected:
        assert line in table
    for draw in (charts.scores, charts.norms):
        draw(rows, tmp_path / 'picture.png')
        assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')


def test_rates_that_are_the_last_of_those_tried_are_counted():
    rows = {
        'plain_bert': [run(0.1)],
        'full': [run(0.1, 0, 0.5), run(0.3, 0, 0.6), run(0.9, 0, 0.7)],
        'lora': [run(0.1, 0, 0.5), run(0.3, 0, 0.6), run(0.9, 0, 0.5)],
        'head': [lost()],
    }
    result = {'task': 'trec', 'seeds': [0], 'rows': rows, 'examples': 40, 'hardware': 'x'}
    said = 'Of 2 rows with a choice among 3 values of the learning rate, the largest is that of 1'
    assert f'{said} and the smallest that of 0;' in comparison.render(result)


def test_the_plain_recipe_is_tried_with_its_own_rate_alone():
    assert ROWS['plain_bert'].rates == (1e-5,)
    assert ROWS['full'].rates == pytest.approx((2e-4 / 3, 2e-4, 6e-4))


@pytest.mark.slow
def test_runs_are_made_by_commands_and_one_that_diverges_is_told(tmp_path):
    backbone = toy.write_backbone(tmp_path / 'bert')
    rows = [f'{i % 2} {"good" if i % 2 else "bad"} number {i}' for i in range(120)]
    (tmp_path / 'custrev.all').write_text('\n'.join(rows) + '\n')
    options = (f'backbone={backbone}', 'training.steps=6', 'data.cache_dir=none')
    setting = Setting('cr', str(tmp_path), options)
    row = Row('adapters', 'pfeiffer[reduction_factor=2]', 1e-3)
    found = runs.train(row, 1e-3, 0, setting, tmp_path / 'well')
    assert 0 <= found['test'] <= 1 and found['seconds'] > 0 and len(found['norms']) == 6
    assert found['trainable_parameters'] < found['total_parameters'] / 2
    assert runs.train(row, 1e-3, 0, setting, tmp_path / 'well') == found
    ended = runs.train(row, 1e38, 0, setting, tmp_path / 'ill')
    assert 'diverged' in ended and 'test' not in ended
    with pytest.raises(RuntimeError, match='ended with 2'):
        runs.train(row, 1e-3, 0, Setting('cr', '/nowhere', options), tmp_path / 'no')
