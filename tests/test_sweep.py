"""Whole sweeps on toy data: each member is the run done alone, killed or not."""

import json
import re
import signal
from pathlib import Path

import command
import numpy as np
import pytest
import toy

from adapters_jax import config as configs
from adapters_jax import files
from adapters_jax import sweep as sweeps
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.params import flatten
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import grid
from adapters_jax.training.population_run import PopulationRun
from adapters_jax.training.run import Stopped

ROOT = Path(__file__).parents[1]
STEPS, EVERY = 40, 7

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and texts."""
    folder = tmp_path_factory.mktemp('sweep')
    toy.write_backbone(folder / 'bert')
    toy.write_backbone(folder / 'deeper', layers=2)
    toy.write_texts(folder / 'texts.csv', 160)
    return folder


GRID = ('optimizer.learning_rate=2e-2,1e30', 'method.size=2,5', 'seed=0,1')


def config(toys, *axes, **changes):
    given = {'method': 'pfeiffer[size=4,dropout=0.1]', 'training__steps': STEPS}
    given |= {'training__dropout': True} | changes
    made = toy.config(str(toys / 'bert'), str(toys / 'texts.csv'), **given)
    made.training.evaluate_every = 20
    made.training.checkpoint_every = EVERY
    made.sweep.grid = axes
    return made


@pytest.fixture(scope='module')
def swept(toys):
    """A finished sweep, of which the half with a huge learning rate diverged."""
    result = sweep(config(toys, *GRID), toys / 'swept')
    return toys / 'swept', result


def numbers(workdir):
    """Return a run's losses and its scores."""
    lines = toy.read_lines(workdir / 'metrics.jsonl')
    return [(line['step'], line['split'], line['values']) for line in lines]


@pytest.fixture(scope='module')
def alone(toys, swept):
    """The run of a member that is padded, done alone with its own config."""
    workdir, _ = swept
    name = 'learning_rate-2e-2_size-2_seed-1'
    train(configs.read(workdir / 'members' / name / 'config.json'), toys / 'alone' / name)
    return {name: (workdir / 'members' / name, toys / 'alone' / name)}


def test_a_member_is_the_run_done_alone(alone):
    for name, (member, run) in alone.items():
        ours, theirs = numbers(member), numbers(run)
        assert [x[:2] for x in ours] == [x[:2] for x in theirs]
        for (step, _, values), (_, _, expected) in zip(ours, theirs, strict=True):
            assert values.keys() == expected.keys()
            for key in values:
                assert values[key] == pytest.approx(expected[key], abs=1e-5), (name, step, key)
        one, other = (adapter_folder.load(path / 'adapter') for path in (member, run))
        assert one.method == other.method
        for tree in ('adapter_params', 'head_params'):
            expected = flatten(getattr(other, tree))
            for path, leaf in flatten(getattr(one, tree)).items():
                np.testing.assert_allclose(leaf, expected[path], atol=1e-5, err_msg=path)
        summaries = [json.loads((x / 'summary.json').read_text()) for x in (member, run)]
        for key in ('finished', 'steps', 'best_step', 'primary', 'trainable_parameters', 'seed'):
            assert summaries[0][key] == summaries[1][key], key
        assert set(summaries[0]) - set(summaries[1]) == {'population'}


def test_a_members_folder_is_a_runs(swept, alone):
    _, result = swept
    name = 'learning_rate-2e-2_size-2_seed-1'
    member, run = alone[name]
    ours, theirs = ({p.name for p in path.iterdir()} for path in (member, run))
    assert theirs - ours == {'checkpoints'} and ours <= theirs
    for split in ('validation', 'test'):
        assert evaluate(member, split)['metrics'] == pytest.approx(
            evaluate(run, split)['metrics'], abs=1e-5
        )
    scores = {row['name']: row['score'] for row in result['members']}
    assert evaluate(member, 'validation')['metrics']['accuracy'] == scores[name]
    # `train` takes it for one of its own, which is finished.
    before = (member / 'summary.json').read_bytes()
    train(configs.read(member / 'config.json'), member)
    assert (member / 'summary.json').read_bytes() == before


def test_members_see_the_same_batches_and_their_own_seeds(swept):
    workdir, _ = swept
    read = {m.name: configs.read(m / 'config.json') for m in (workdir / 'members').iterdir()}
    assert len(read) == 8
    assert {(c.seed, c.data.seed) for c in read.values()} == {(0, 0), (1, 0)}
    one, other = (
        toy.losses(workdir / 'members' / f'learning_rate-2e-2_size-5_seed-{seed}')
        for seed in (0, 1)
    )
    assert len(one) == STEPS and one[0] != other[0]


def test_the_best_member_is_picked_on_validation(swept):
    workdir, result = swept
    rows = result['members']
    assert result['best'] == rows[0]['name'] and len(rows) == 8
    good = [row for row in rows if row['score'] is not None]
    assert [row['score'] for row in good] == sorted((r['score'] for r in good), reverse=True)
    best = workdir / 'members' / result['best'] / 'adapter'
    assert {p.name: p.read_bytes() for p in best.iterdir()} == {
        p.name: p.read_bytes() for p in (workdir / 'best').iterdir()
    }
    assert predict(workdir / 'best', [{'text': 'the cat'}])[0]['label'] in toy.TOPICS
    first = result['settings'][0]
    scores = [r['score'] for r in rows if r['name'] in first['members']]
    assert first['mean'] == pytest.approx(np.mean(scores)) and len(scores) == 2
    assert first['deviation'] == pytest.approx(np.std(scores, ddof=1))
    table = (workdir / 'sweep.md').read_text().splitlines()
    assert len(table) == 2 + 8 and table[0].startswith('| optimizer.learning_rate | method.size |')
    assert f'`{result["best"]}`' in table[2] and 'diverged' in table[-1]


def test_those_that_diverge_are_told_of_and_left(swept):
    workdir, result = swept
    lost = [row for row in result['members'] if row['state'].startswith('diverged')]
    assert {row['settings']['optimizer.learning_rate'] for row in lost} == {1e30}
    assert len(lost) == 4
    told = (workdir / 'populations' / '0' / 'log.txt').read_text()
    for row in lost:
        member = workdir / 'members' / row['name']
        assert row['state'] == f'diverged: {told_of(told, row["name"])}'
        losses = toy.losses(member)
        # What was good is on record, and nothing after it.
        assert len(losses) == row['steps'] < 20 and np.isfinite([x for _, x in losses]).all()
        assert json.loads((member / 'summary.json').read_text())['finished'] == row['state']
    assert not any(
        row['state'].startswith('diverged') and row['score'] is not None
        for row in result['members']
    )


def told_of(log, name):
    """Return what the log says of a member that diverged; it says it once."""
    (line,) = [line for line in log.splitlines() if f'{name} diverged: ' in line]
    return line.partition('diverged: ')[2].partition(';')[0]


def test_if_all_diverge_the_sweep_says_so(toys, tmp_path):
    given = config(toys, 'optimizer.learning_rate=1e30,2e30', method='head', training__steps=20)
    for _ in range(2):  # and says it again
        with pytest.raises(
            FloatingPointError,
            match=r'all 2 members .* have no score \(learning_rate-.*: diverged: ',
        ):
            sweep(given, tmp_path / 'w')
    assert not (tmp_path / 'w' / 'best').exists()


def test_each_ends_where_it_stops_to_improve(toys, tmp_path):
    given = config(toys, 'optimizer.learning_rate=1e-9,2e-2', method='head', training__steps=60)
    given.training.evaluate_every, given.training.patience = 5, 2
    result = sweep(given, tmp_path / 'w')
    still, moving = sorted(result['members'], key=lambda r: r['settings'][GRID[0].split('=')[0]])
    assert still['state'] == 'no improvement in 2 evaluations' and still['steps'] == 15
    assert moving['steps'] > 15
    lines = toy.losses(tmp_path / 'w' / 'members' / still['name'])
    assert [step for step, _ in lines] == list(range(1, 16))
    assert len(toy.losses(tmp_path / 'w' / 'members' / moving['name'])) == moving['steps']


def test_what_cannot_share_a_step_trains_one_after_another(toys, tmp_path):
    given = config(toys, 'training.steps=4,6', 'seed=0,1,2', method='head')
    given.sweep.size = 2
    result = sweep(given, tmp_path / 'w')
    assert {row['name']: row['steps'] for row in result['members']} == {
        f'steps-{steps}_seed-{seed}': steps for steps in (4, 6) for seed in range(3)
    }
    assert len(list((tmp_path / 'w' / 'populations').iterdir())) == 4
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.name != '.lock'}
    assert sweep(given, tmp_path / 'w') == result
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*') if p.name != '.lock'} == before
    given.sweep.grid = ('seed=0,1',)
    with pytest.raises(ValueError, match=r'another config \(sweep.grid was .*'):
        sweep(given, tmp_path / 'w')


def test_a_signal_in_the_last_evaluation_of_a_population_ends_the_sweep(
    toys, tmp_path, monkeypatch
):
    given = config(toys, 'training.steps=2,3', method='head')
    workdir, evaluate = tmp_path / 'w', PopulationRun._evaluate

    def interrupted(run):
        signal.raise_signal(signal.SIGTERM)
        evaluate(run)

    with monkeypatch.context() as patched:
        patched.setattr(PopulationRun, '_evaluate', interrupted)
        with pytest.raises(Stopped) as stopped:
            sweep(given, workdir)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert {path.name for path in (workdir / 'populations').iterdir()} == {'0'}
    assert (workdir / 'members' / 'steps-2' / 'summary.json').exists()
    assert sorted(row['steps'] for row in sweep(given, workdir)['members']) == [2, 3]


def test_members_begin_where_the_trunk_ends_and_read_it_from_the_disk(toys, tmp_path):
    method, scores = 'pfeiffer[size=4,leave_out=[0]]', []
    for kept in ('none', 'float32'):
        given = config(toys, 'seed=0,1,2', method=method, training__steps=10)
        given.backbone, given.data.cache_dir = str(toys / 'deeper'), str(tmp_path / 'cache')
        given.training.trunk_cache = kept
        sweep(given, tmp_path / kept)
        members = sorted((tmp_path / kept / 'members').iterdir())
        scores.append([loss for member in members for _, loss in toy.losses(member)])
    assert (tmp_path / 'cache' / 'trunk').is_dir() and len(scores[0]) == 30
    np.testing.assert_allclose(scores[1], scores[0], atol=1e-5)


@pytest.mark.slow
def test_shards_together_leave_what_one_sweep_does(toys, tmp_path):
    """Two shards at once, one of which is killed and run again, and ranked at the end."""
    axes = ('optimizer.learning_rate=2e-2,1e-2', 'seed=0,1')
    given = [*arguments(toys, tmp_path / 'w', axes), '--config.sweep.size=2']
    jobs = [shard(given, tmp_path, number, f'{number}/2') for number in range(2)]
    assert jobs[1].wait_for(lambda: taken(tmp_path / 'w', 1) >= 24), 'ended before'
    jobs[1].signal(signal.SIGKILL)
    assert jobs[1].finish().status == -signal.SIGKILL
    again = shard(given, tmp_path, 'again', '1/2')
    done = [jobs[0].finish(), again.finish()]
    assert [job.status for job in done] == [0, 0], [job.err for job in done]
    assert 'continuing from the checkpoint of step' in done[1].err
    assert done[0].out.startswith(f'wrote 2 of the members in {tmp_path / "w"}/members\n')
    assert not (tmp_path / 'w' / 'sweep.json').exists()

    given = configs.read(tmp_path / 'w' / 'config.json')
    expected = sweep(given, tmp_path / 'whole')
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / 'w' / 'members').rglob('*')}
    ranked = sweep(given, tmp_path / 'w')
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'w' / 'members').rglob('*')} == before
    assert all(ranked[key] == expected[key] for key in ('best', 'members', 'settings'))
    names = {path.name for path in (tmp_path / 'whole' / 'members').iterdir()}
    assert {path.name for path in (tmp_path / 'w' / 'members').iterdir()} == names
    for name in names:
        check_same(tmp_path / 'w' / 'members' / name, tmp_path / 'whole' / 'members' / name)


def shard(given, folder, number, part):
    return command.Command('sweep', [*given, f'--shard={part}'], folder / f'out{number}')


def test_a_population_is_trained_by_one_job_at_a_time(toys, tmp_path):
    given = config(toys, 'seed=0,1', method='head', training__steps=2)
    given.sweep.size = 1
    with files.lock(tmp_path / 'populations' / '1'):
        assert sweeps.sweep_shard(given, tmp_path, grid.Shard(0, 2)) == ['seed-0']
        with pytest.raises(files.InUseError, match='populations/1 is in use'):
            sweeps.sweep_shard(given, tmp_path, grid.Shard(1, 2))
        with pytest.raises(files.InUseError, match='populations/1 is in use'):
            sweep(given, tmp_path)
    assert sweeps.sweep_shard(given, tmp_path, grid.Shard(2, 3)) == []
    given.sweep.size = 2
    with pytest.raises(ValueError, match=r'another config \(sweep.size was 1'):
        sweeps.sweep_shard(given, tmp_path, grid.Shard(0, 2))


@pytest.mark.parametrize('populations', [1, 5, 8])
@pytest.mark.parametrize('count', [1, 2, 3, 8, 13])
def test_each_population_is_in_one_shard(populations, count):
    found = [n for i in range(count) for n in grid.Shard(i, count).numbers(populations)]
    assert sorted(found) == list(range(populations))


def arguments(toys, workdir, axes=GRID[:2]):
    return [
        '--config=configs/text_classification.py:method=pfeiffer[size=4,dropout=0.1]',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        '--config.mesh.data=1',
        f'--config.training.steps={STEPS}',
        '--config.training.evaluate_every=20',
        f'--config.training.checkpoint_every={EVERY}',
        f'--config.sweep.grid={axes!r}',
        f'--workdir={workdir}',
    ]


@pytest.mark.slow
def test_killed_and_stopped_and_gone_on_the_bits_are_the_same(toys, tmp_path):
    """The command, undisturbed; then one that is killed, stopped by SIGTERM, and finished."""
    whole = command.run('sweep', *arguments(toys, tmp_path / 'whole'), folder=tmp_path / 'out')
    assert whole.status == 0, whole.err
    assert whole.out.startswith('accuracy on validation, mean over seeds:\n')
    assert whole.out.endswith('best/, sweep.md, sweep.json, members/, config.json\n')
    workdir = tmp_path / 'killed'
    for number, (end, step) in enumerate([(signal.SIGKILL, 10), (signal.SIGTERM, 24)]):
        process = start(toys, tmp_path, number)
        assert process.wait_for(lambda step=step: taken(workdir) >= step), 'ended before'
        process.signal(end)
        done = process.finish()
        assert done.status == (-end if end == signal.SIGKILL else 128 + end), done.err
    assert 'stopped by SIGTERM after step' in done.err
    done = start(toys, tmp_path, 'last').finish()
    assert done.status == 0, done.err
    assert 'continuing from the checkpoint of step' in done.err
    names = {path.name for path in (tmp_path / 'whole' / 'members').iterdir()}
    assert {path.name for path in (workdir / 'members').iterdir()} == names
    for name in names:
        check_same(workdir / 'members' / name, tmp_path / 'whole' / 'members' / name)
    kept = ('best', 'members', 'settings')
    one, other = (json.loads((w / 'sweep.json').read_text()) for w in (workdir, tmp_path / 'whole'))
    assert {key: one[key] for key in kept} == {key: other[key] for key in kept}


def start(toys, folder, number):
    line = arguments(toys, folder / 'killed')
    return command.Command('sweep', line, folder / f'out{number}')


def taken(workdir, population=0):
    path = workdir / 'populations' / str(population) / 'metrics.jsonl'
    return path.read_bytes().count(b'"split": "train"') if path.exists() else 0


def check_same(one, other):
    assert (one / 'metrics.jsonl').read_bytes() == (other / 'metrics.jsonl').read_bytes()
    ours, theirs = (sorted(p.glob('adapter/*')) for p in (one, other))
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ('changes', 'expected'),
    [
        (["--config.sweep.grid=('seed=0,x',)"], "config key seed is 'x'; expected int"),
        ([], 'sweep.grid is empty; expected at least one text'),
        (["--config.sweep.grid=('method.sise=2,4',)"], "has no option 'sise'; known: .*size"),
        (["--config.sweep.grid=('training.batch_size=8,0',)"], 'training.batch_size is 0'),
        (["--config.sweep.grid=('optimizer.schedule=linear,step',)"], "schedule .* got 'step'"),
        (["--config.sweep.grid=('seed=0,1',)", '--config.sweep.size=-1'], 'sweep.size is -1'),
        (
            [
                "--config.sweep.grid=('task.primary=accuracy,f1_macro',)",
                "--config.task.metrics=('accuracy', 'f1_macro')",
            ],
            r'scored by different metrics \(accuracy, f1_macro\)',
        ),
        (
            ["--config.sweep.grid=('training.adapter_drop=none,robust',)"],
            "adapter_drop is 'robust'.*set 'none'",
        ),
        (["--config.sweep.grid=('seed=0,1',)", '--shard=2/2'], 'shard=2/2: .* below their count'),
        (["--config.sweep.grid=('seed=0,1',)", '--shard=0/0'], 'shard=0/0: .* below their count'),
        (["--config.sweep.grid=('seed=0,1',)", '--shard=1'], "shard is '1'; expected INDEX/COUNT"),
    ],
)
def test_a_mistake_anywhere_in_the_grid_is_told_before_anything_is_trained(
    toys, tmp_path, changes, expected
):
    line = [
        argument for argument in arguments(toys, tmp_path / 'w') if 'sweep.grid' not in argument
    ]
    sentence = command.refused('sweep', *line, *changes, folder=tmp_path / 'out')
    assert re.search(expected, sentence), sentence
    assert {p.name for p in (tmp_path / 'w').glob('*')} <= {'.lock'}


def test_a_grid_is_not_for_a_single_run(toys, tmp_path):
    sentence = command.refused('train', *arguments(toys, tmp_path / 'w'), folder=tmp_path)
    assert 'is for `python -m adapters_jax.sweep`' in sentence
