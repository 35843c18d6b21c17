"""Whole choices on toy data: halving across methods, what each costs, and the recommendation."""

import json
import signal

import command
import pytest
import toy

from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from configs import choose as shipped

STEPS = 16
METHODS = ('pfeiffer[size=2]', 'pfeiffer[size=8]', 'pfeiffer[size=4]', 'head')
GRID = (f'method={",".join(METHODS)}', 'optimizer.learning_rate=1e-4,2e-2')
REPORTED = ('best', 'members', 'recommended', 'reason', 'frontier', 'candidates')

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and texts."""
    folder = tmp_path_factory.mktemp('choose')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 160)
    return folder


def arguments(toys, workdir):
    return [
        '--config=configs/choose.py:task=classification,rates=(1e-4,2e-2),'
        f'methods={METHODS!r},steps={STEPS},backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        '--config.mesh.data=1',
        '--config.training.checkpoint_every=3',
        f'--workdir={workdir}',
    ]


@pytest.fixture(scope='module')
def chosen(toys):
    """A finished choice, made by the command."""
    done = command.run('sweep', *arguments(toys, toys / 'w'), folder=toys / 'out')
    assert done.status == 0, done.err
    return toys / 'w', json.loads((toys / 'w' / 'sweep.json').read_text()), done


def reported(workdir):
    result = json.loads((workdir / 'sweep.json').read_text())
    return {key: result[key] for key in REPORTED}


def test_half_of_all_goes_on_at_each_rung_from_its_own_state(chosen):
    workdir, result, _ = chosen
    steps = {row['name']: row['steps'] for row in result['members']}
    assert sorted(steps.values()) == [4] * 4 + [8] * 2 + [16] * 2
    for name, last in steps.items():
        losses = toy.losses(workdir / 'members' / name)
        assert [step for step, _ in losses] == list(range(1, last + 1))
        evaluations = [
            line
            for line in toy.read_lines(workdir / 'members' / name / 'metrics.jsonl')
            if line['split'] == 'validation'
        ]
        rung = {line['step']: line['values']['accuracy'] for line in evaluations}
        assert last in rung
    at_first = {
        name: next(
            line['values']['accuracy']
            for line in toy.read_lines(workdir / 'members' / name / 'metrics.jsonl')
            if line['split'] == 'validation' and line['step'] == 4
        )
        for name in steps
    }
    gone = [score for name, score in at_first.items() if steps[name] == 4]
    kept = [score for name, score in at_first.items() if steps[name] > 4]
    assert max(gone) <= min(kept)


def test_what_a_method_costs(chosen):
    _, result, _ = chosen
    found = {c['method']: c for c in result['candidates']}
    assert set(found) == set(METHODS)
    # A head of 32 x 3 and 3 biases; a bottleneck of R has 2 x 32 x R + R + 32 besides.
    assert found['head']['parameters'] == 99
    assert found['pfeiffer[size=2]']['parameters'] == 99 + 162
    assert found['pfeiffer[size=8]']['parameters'] == 99 + 552
    flops = [found[method]['flops'] for method in ('head', *METHODS[:2])]
    assert flops[0] == 1 and flops == sorted(set(flops)) and flops[2] < 1.5
    assert all(c['inference'] > 0 and c['training'] > 0 for c in result['measured'].values())


def test_the_recommendation_follows_from_the_table(chosen):
    workdir, result, _ = chosen
    ended = [c for c in result['candidates'] if c['ended']]
    best = max(c['score'] for c in ended)
    good = [c for c in ended if c['score'] >= best - 0.01]
    assert result['recommended'] == min(good, key=lambda c: c['parameters'])
    for name, member in (
        ('recommended', result['recommended']['member']),
        ('best', result['best']),
    ):
        adapter = workdir / 'members' / member / 'adapter'
        assert {p.name: p.read_bytes() for p in (workdir / name).iterdir()} == {
            p.name: p.read_bytes() for p in adapter.iterdir()
        }
    assert predict(workdir / 'recommended', [{'text': 'the cat'}])[0]['label'] in toy.TOPICS


def test_what_is_printed_and_drawn(chosen):
    workdir, result, done = chosen
    lines = done.out.splitlines()
    assert lines[0].split()[:3] == ['method', 'optimizer.learning_rate', 'accuracy']
    assert [line.split()[0] for line in lines[1:5]] == [c['method'] for c in result['candidates']]
    assert lines[5] == f'recommended: {result["recommended"]["method"]}'
    assert lines[6].strip() == result['reason']
    text = (workdir / 'sweep.md').read_text()
    assert text.startswith(f'# Recommended: `{result["recommended"]["method"]}`\n')
    assert f'again.py:W/members/{result["recommended"]["member"]} ' in text
    assert all(f'| `{method}` |' in text for method in METHODS)
    picture = (workdir / 'choose.png').read_bytes()
    assert picture.startswith(b'\x89PNG') and len(picture) > 20_000


@pytest.mark.slow
def test_killed_it_recommends_the_same(toys, chosen, tmp_path):
    """Killed in the first rung, and after it; and a third time not."""
    whole, _, _ = chosen
    workdir = tmp_path / 'w'

    def taken(population):
        path = workdir / 'populations' / str(population) / 'metrics.jsonl'
        return path.read_bytes().count(b'"split": "train"') if path.exists() else 0

    for number, (population, steps) in enumerate([(1, 2), (0, 6)]):
        process = command.Command('sweep', arguments(toys, workdir), tmp_path / f'out{number}')
        assert process.wait_for(lambda p=population, s=steps: taken(p) >= s), 'ended before'
        process.signal(signal.SIGKILL)
        assert process.finish().status == -signal.SIGKILL
    done = command.run('sweep', *arguments(toys, workdir), folder=tmp_path / 'last')
    assert done.status == 0, done.err
    assert reported(workdir) == reported(whole)
    for row in reported(whole)['members']:
        one, other = (w / 'members' / row['name'] / 'metrics.jsonl' for w in (workdir, whole))
        assert one.read_bytes() == other.read_bytes()


def test_a_grid_may_be_halved_without_a_recommendation(toys, tmp_path):
    given = toy.config(str(toys / 'bert'), str(toys / 'texts.csv'), method='head')
    given.training.steps = 8
    given.sweep.grid = ('optimizer.learning_rate=1e-9,1e-3,1e-2,1e30',)
    given.sweep.pruner = 'halving'
    result = sweep(given, tmp_path / 'w')
    # One diverged before the first rung, so that two of three went on, and one of them to the end.
    steps = [row['steps'] for row in result['members']]
    assert steps[0] == 8 and sorted(steps[1:3]) == [2, 4]
    assert result['members'][3]['state'].startswith('diverged')
    assert 'recommended' not in result and not (tmp_path / 'w' / 'choose.png').exists()


def test_a_sweep_with_a_median_needs_a_search(toys, tmp_path):
    line = [*arguments(toys, tmp_path / 'w'), '--config.sweep.pruner=median']
    assert "expected 'none' or 'halving' with a sweep.grid" in command.refused(
        'sweep', *line, folder=tmp_path / 'out'
    )


@pytest.mark.parametrize('task', ['trec', 'rte', 'stsb', 'regression'])
def test_the_shipped_list_can_be_trained(task):
    from adapters_jax.sweep import expand

    given = shipped.get_config(f'task={task},backbone=x')
    given.mesh.data = 1
    members = expand(given)
    assert len(members) == len(shipped.METHODS) * len(shipped.RATES)
    assert given.sweep.recommend and given.training.steps == 160


@pytest.mark.parametrize('kind', shipped.KINDS)
def test_a_kind_of_tasks_has_the_settings_of_its_own_config_file(kind):
    own, chosen = shipped.KINDS[kind].get_config('backbone=b'), shipped.get_config(f'task={kind}')
    assert own.task.name == kind
    for section in ('task', 'data', 'head'):
        assert chosen[section].to_json() == own[section].to_json()
    assert chosen.training.batch_size == own.training.batch_size and chosen.sweep.recommend
