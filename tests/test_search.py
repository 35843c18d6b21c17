"""Whole searches on toy data: they reproduce, prune who should be, and survive kills."""

import json
import random
import re
import signal

import command
import optuna
import pytest
import test_processes
import toy

from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.tuning import search

STEPS = 24
SPACE = ('optimizer.learning_rate=log(1e-5,1e-1)', 'seed=0,1,2', 'training.batch_size=16,32')
REPORTED = ('best', 'members', 'importance', 'trials')

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and texts."""
    folder = tmp_path_factory.mktemp('search')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 160)
    return folder


def config(toys, *space, **changes):
    given = {'method': 'head', 'training__steps': STEPS, 'training__evaluate_every': 4}
    given |= {'training__dropout': True}
    given |= {'sweep__trials': 8, 'sweep__size': 4, 'sweep__space': space or SPACE[:2]}
    made = toy.config(str(toys / 'bert'), str(toys / 'texts.csv'), **(given | changes))
    made.sweep.pruner = changes.get('sweep__pruner', 'halving')
    return made


@pytest.fixture(scope='module')
def searched(toys):
    """A finished search in which some trials were pruned."""
    return toys / 'searched', sweep(config(toys), toys / 'searched')


def report(workdir):
    """Return what a search reports, but for the software that made it."""
    result = json.loads((workdir / 'sweep.json').read_text())
    return {key: result[key] for key in REPORTED}, (workdir / 'sweep.md').read_text()


def trials(workdir):
    """Return the study as Optuna reads it, but for the times of day."""
    storage = optuna.storages.RDBStorage(f'sqlite:///{workdir / "study.db"}')
    found = optuna.load_study(study_name='sweep', storage=storage).get_trials()
    storage.remove_session()
    storage.engine.dispose()
    return [
        (t.number, t.state, t.params, t.values, t.intermediate_values, t.user_attrs) for t in found
    ]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_report_and_another_another(toys, searched, tmp_path):
    workdir, _ = searched
    sweep(config(toys), tmp_path / 'same')
    assert report(tmp_path / 'same') == report(workdir)
    assert trials(tmp_path / 'same') == trials(workdir)
    pictures = [(w / 'sweep.png').read_bytes() for w in (tmp_path / 'same', workdir)]
    assert pictures[0] == pictures[1] and pictures[0].startswith(b'\x89PNG')
    sweep(config(toys, sweep__seed=1, sweep__trials=2), tmp_path / 'other')
    assert [t[2] for t in trials(tmp_path / 'other')] != [t[2] for t in trials(workdir)][:2]


def test_pruned_members_stay_as_they_are_and_the_others_do_not(searched):
    workdir, result = searched
    states = {row['name']: row['state'] for row in result['members']}
    pruned = [name for name, state in states.items() if state.startswith('pruned')]
    assert pruned and states[result['best']] == 'all steps taken'
    assert set(states.values()) > {'all steps taken'}
    for name, state in states.items():
        losses = toy.losses(workdir / 'members' / name)
        last = int(re.search(r'at step (\d+)', state)[1]) if name in pruned else STEPS
        assert [step for step, _ in losses] == list(range(1, last + 1)), name
        summary = json.loads((workdir / 'members' / name / 'summary.json').read_text())
        assert (summary['steps'], summary['finished']) == (last, state)
        assert summary['best_step'] <= last


def test_what_is_pruned_does_not_touch_the_others(toys, searched, tmp_path):
    """The first batch again without pruning: those that were not pruned end with the same bits."""
    workdir, result = searched
    sweep(config(toys, sweep__pruner='none', sweep__trials=4), tmp_path / 'w')
    states = {row['name']: row['state'] for row in result['members']}
    first = [f'trial-{number:04d}' for number in range(4)]
    assert any(states[name].startswith('pruned') for name in first)
    for name in first:
        ours, theirs = (w / 'members' / name for w in (workdir, tmp_path / 'w'))
        lines = (ours / 'metrics.jsonl').read_text()
        if states[name] == 'all steps taken':
            assert lines == (theirs / 'metrics.jsonl').read_text()
            one, other = (p / 'adapter' / 'head.safetensors' for p in (ours, theirs))
            assert one.read_bytes() == other.read_bytes()
        else:
            assert (theirs / 'metrics.jsonl').read_text().startswith(lines)


def test_the_report(searched):
    workdir, result = searched
    rows = result['members']
    ended = [row for row in rows if row['state'] == 'all steps taken']
    assert [row['score'] for row in ended] == sorted((r['score'] for r in ended), reverse=True)
    assert rows[: len(ended)] == ended and result['best'] == rows[0]['name']
    assert result['trials'] == {'trained to the end': len(ended), 'ended early': 8 - len(ended)}
    assert set(result['importance']) <= {'optimizer.learning_rate', 'seed'}
    text = (workdir / 'sweep.md').read_text()
    assert text.startswith(f'# accuracy {rows[0]["score"]:.4f}: `{rows[0]["name"]}`')
    assert all(f'`{row["name"]}`' in text for row in rows)
    assert predict(workdir / 'best', [{'text': 'the cat'}])[0]['label'] in toy.TOPICS


def test_a_finished_search_stays(toys, searched):
    workdir, result = searched
    before = {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.name != '.lock'}
    assert sweep(config(toys), workdir) == result
    assert {p: p.stat().st_mtime_ns for p in workdir.rglob('*') if p.name != '.lock'} == before
    with pytest.raises(ValueError, match=r'another config \(sweep.trials was 8, now 7\)'):
        sweep(config(toys, sweep__trials=7), workdir)


def test_a_finished_search_may_be_given_more_trials(toys, tmp_path):
    few = sweep(config(toys, sweep__trials=3), tmp_path)
    before, rows = trials(tmp_path), {row['name']: row for row in few['members']}
    more = sweep(config(toys, sweep__trials=5), tmp_path)
    assert trials(tmp_path)[:3] == before and len(trials(tmp_path)) == len(more['members']) == 5
    found = {row['name']: row for row in more['members']}
    assert {name: found[name] for name in rows} == rows
    assert '5 trials' in (tmp_path / 'sweep.md').read_text()
    assert sweep(config(toys, sweep__trials=5), tmp_path) == more


@pytest.mark.slow
def test_a_combination_that_cannot_be_trained_is_told_and_passed_by(toys, tmp_path):
    space = ('training.batch_size=16,18', 'training.accumulate=1,3')  # 16 has no thirds
    given = config(toys, *space, training__steps=2, sweep__sampler='random')
    given.data.batching = 'buckets'
    result = sweep(given, tmp_path / 'w')
    states = {tuple(r['settings'].values()): r['state'] for r in result['members']}
    assert states.pop((16, 3)).startswith('not possible: training.batch_size is 16, which does not')
    assert set(states.values()) <= {'all steps taken', 'pruned at step 2'} and len(states) > 1
    told = [t[5]['finished'] for t in trials(tmp_path / 'w')]
    assert any('training.batch_size is 16, which does not divide' in what for what in told)


def test_what_shows_only_when_a_trial_is_built_is_passed_by_too(toys, tmp_path):
    method = 'adalora[r=2,target_r=1]'
    given = config(toys, 'method.tinit=0,50', 'seed=0,1', method=method, training__steps=4)
    given.sweep.trials, given.sweep.sampler = 4, 'random'
    result = sweep(given, tmp_path / 'w')
    states = {row['settings']['method.tinit']: row['state'] for row in result['members']}
    assert states[50].startswith('not possible: adalora: tinit=50')
    assert not states[0].startswith('not possible')


@pytest.mark.parametrize('sizes', ['16,18', '18,16'])  # 16 has no thirds
@pytest.mark.parametrize('parts', ['1,3', '3,1'])
def test_values_that_exclude_one_another_are_accepted_in_any_order(toys, sizes, parts):
    given = config(toys, f'training.batch_size={sizes}', f'training.accumulate={parts}')
    given.data.batching = 'buckets'
    settings = [tuple(member.settings.values()) for member in search.check(given)]
    assert (16, 3) not in settings
    assert [set(values) for values in zip(*settings, strict=True)] == [{16, 18}, {1, 3}]


def test_a_value_that_no_others_go_with_is_refused(toys):
    given = config(toys, 'training.batch_size=16,17', 'training.accumulate=2,4')
    given.data.batching = 'buckets'
    with pytest.raises(ValueError, match='batch_size is 17, which does not divide'):
        search.check(given)


@pytest.mark.parametrize(
    ('axis', 'ends'),
    [
        ('optimizer.learning_rate=1e-3,0.001', '=1e-3 and optimizer.learning_rate=0.001'),
        ('training.checkpoint_every=int(1,9)', '=1 and training.checkpoint_every=9'),
    ],
)
def test_values_that_make_no_difference_are_refused(toys, axis, ends):
    with pytest.raises(ValueError, match=f'sweep.space has members .* equal, .*{ends}'):
        search.check(config(toys, axis))


def arguments(toys, workdir, trials=8):
    return [
        '--config=configs/text_classification.py:method=head',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        '--config.mesh.data=1',
        f'--config.training.steps={STEPS}',
        '--config.training.evaluate_every=4',
        '--config.training.checkpoint_every=3',
        '--config.training.patience=0',
        f'--config.sweep.space={SPACE!r}',
        '--config.sweep.pruner=median',
        f'--config.sweep.trials={trials}',
        '--config.sweep.size=4',
        f'--workdir={workdir}',
    ]


@pytest.fixture(scope='module')
def undisturbed(toys):
    done = command.run('sweep', *arguments(toys, toys / 'whole'), folder=toys / 'out')
    assert done.status == 0, done.err
    return done


def test_what_is_printed(toys, undisturbed):
    lines = undisturbed.out.splitlines()
    assert lines[0] == 'accuracy on validation, best trials:'
    assert lines[1].split()[:4] == [*(text.split('=')[0] for text in SPACE), 'accuracy']
    assert lines[-1].endswith(
        'best/, sweep.md, sweep.json, members/, config.json, sweep.png, study.db'
    )


def written(workdir):
    """Return how many bytes the members' and populations' records have."""
    places = ('members', 'populations')
    found = [p for place in places for p in workdir.glob(f'{place}/*/metrics.jsonl')]
    return sum(p.stat().st_size for p in found)


def disturbed(toys, folder, kills, rng):
    """Kill a search again and again, each time after some more is on record; then let it end."""
    workdir, total = folder / 'w', written(toys / 'whole')
    for number in range(kills):
        process = command.Command('sweep', arguments(toys, workdir), folder / f'out{number}')
        goal = rng.uniform(number, number + 1) / kills * total
        process.wait_for(lambda goal=goal: written(workdir) >= goal)
        process.signal(signal.SIGKILL)
        process.finish()
    done = command.run('sweep', *arguments(toys, workdir), folder=folder / 'last')
    assert done.status == 0, done.err
    return workdir


def check_same(toys, workdir):
    whole = toys / 'whole'
    assert report(workdir) == report(whole)
    assert trials(workdir) == trials(whole)
    members = {path.name for path in (whole / 'members').iterdir()}
    assert {path.name for path in (workdir / 'members').iterdir()} == members
    for name in members:
        one, other = (w / 'members' / name / 'metrics.jsonl' for w in (workdir, whole))
        assert one.read_bytes() == other.read_bytes()


def test_a_killed_search_ends_as_one_that_nobody_killed(toys, undisturbed, tmp_path):
    check_same(toys, disturbed(toys, tmp_path, 1, random.Random(0)))


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 6))
def test_a_search_killed_often_ends_the_same(toys, undisturbed, tmp_path, seed):
    check_same(toys, disturbed(toys, tmp_path, 6, random.Random(seed)))


def test_the_winner_can_be_trained_by_itself(toys, undisturbed, tmp_path):
    result = json.loads((toys / 'whole' / 'sweep.json').read_text())
    (line,) = [x for x in undisturbed.out.splitlines() if ' by itself: ' in x]
    _, _, module, given, workdir = line.partition(' by itself: ')[2].split(' ')
    assert (module, workdir) == ('adapters_jax.train', '--workdir=NEW')
    done = command.run('train', given, f'--workdir={tmp_path / "w"}', folder=tmp_path / 'out')
    assert done.status == 0, done.err
    summary = json.loads((tmp_path / 'w' / 'summary.json').read_text())
    assert summary['metrics']['validation']['accuracy'] == result['members'][0]['score']


@pytest.mark.slow
def test_two_processes_make_one_study(toys, undisturbed, tmp_path):
    """Both propose the same trials, and one of them writes; then both go on after a kill."""
    workdir = tmp_path / 'w'
    line = [a for a in arguments(toys, workdir) if 'mesh.data' not in a]
    killed = test_processes.start('sweep', line, tmp_path / 'killed', devices=1)
    assert killed[0].wait_for(lambda: written(workdir) > written(toys / 'whole') / 3)
    for process in killed:
        process.signal(signal.SIGKILL)
    assert [done.status for done in test_processes.finish(killed)] == [-signal.SIGKILL] * 2
    again = test_processes.start('sweep', line, tmp_path / 'again', devices=1)
    done = test_processes.finish(again)
    assert [one.status for one in done] == [0, 0], [one.err for one in done]
    ours, theirs = trials(workdir), trials(toys / 'whole')
    assert len(ours) == len(theirs) and all(t[1].is_finished() for t in ours)
    assert [t[2] for t in ours[:4]] == [t[2] for t in theirs[:4]]


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        (["--config.sweep.grid=('seed=0,1',)"], 'expected one of them: a grid is trained whole'),
        (["--config.sweep.space=('seed=log(1,2)',)"], 'config key seed is 1.0 .*expected int'),
        (["--config.sweep.space=('sede=int(1,2)',)"], 'unknown config key sede'),
        (["--config.sweep.space=('optimizer.learning_rate=uniform(0,1)',)"], 'learning_rate must'),
        (['--config.sweep.trials=0'], 'sweep.trials is 0; expected 1 or more'),
        (['--config.sweep.sampler=grid'], "sweep.sampler is 'grid'; expected one of tpe, random"),
        (['--config.sweep.pruner=asha'], "sweep.pruner is 'asha'; expected one of none, median"),
        (['--config.sweep.recommend=True'], 'sweep.recommend compares the members of a sweep.grid'),
        (['--shard=0/2'], 'run this sweep without --shard'),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(toys, tmp_path, changes, expected):
    line = arguments(toys, tmp_path / 'w')
    if 'sweep.space' in changes[0]:  # tuples given twice are joined
        line = [argument for argument in line if 'sweep.space' not in argument]
    line += changes
    sentence = command.refused('sweep', *line, folder=tmp_path / 'out')
    assert re.search(expected, sentence), sentence
    assert {p.name for p in (tmp_path / 'w').glob('*')} <= {'.lock'}


@pytest.mark.parametrize('key', ['size', 'chunk'])
def test_counts_below_none_are_told(toys, tmp_path, key):
    given = config(toys, **{f'sweep__{key}': -1})
    with pytest.raises(ValueError, match=f'sweep.{key} is -1; expected 0 or more'):
        sweep(given, tmp_path / 'w')
    assert not (tmp_path / 'w').exists()


def test_a_space_is_not_for_a_single_run(toys, tmp_path):
    sentence = command.refused('train', *arguments(toys, tmp_path / 'w'), folder=tmp_path)
    assert re.search(r'sweep.space is .*is for `python -m adapters_jax.sweep`', sentence)
