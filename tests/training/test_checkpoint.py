"""Checkpoints: kept, refused and restored; killed, damaged, and on a full disk."""

import errno
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adapters_jax import files
from adapters_jax.training import manifest
from adapters_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
TOY = Path(__file__).with_name('toy_run.py')
IDENTITY = {'backbone_fingerprint': 'f00d', 'config': {'task': 'mrpc', 'optimizer': {'b1': 0.9}}}


def make_state(seed=0, size=40):
    keys = jax.random.split(jax.random.key(seed), 3)
    trainable = {
        'adapters': {'a': {'kernel': jax.random.normal(keys[0], (size, 8))}},
        'half': jax.random.normal(keys[1], (16,)).astype(jnp.bfloat16),
        'odd': jnp.array([jnp.nan, -0.0, jnp.inf, 1e-42], jnp.float32),
    }
    return trainable, optax.adamw(1e-3).init(trainable), jax.random.key_data(keys[2])


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def bits(tree):
    return [(x.dtype, x.shape, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def numbers():
    rows = grain.MapDataset.source(range(50)).seed(3).shuffle().repeat().batch(2)
    return iter(rows.to_iter_dataset(grain.ReadOptions(num_threads=2)))


def steps_in(directory):
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def save_steps(directory, steps, metrics=None):
    """Save a state of its own seed at each step; return the iterators' next batches by step."""
    iterator, following = numbers(), {}
    with Checkpoints(directory, IDENTITY) as checkpoints:
        for step in steps:
            next(iterator)
            metric = (metrics or {}).get(step)
            checkpoints.save(step, make_state(step), iterator, {'at': step}, metric)
            following[step] = iterator.get_state()
    return following


def restore(directory, identity=IDENTITY, state=None):
    with Checkpoints(directory, identity) as checkpoints:
        return checkpoints.restore(abstract(state or make_state()), numbers())


def test_restores_every_bit_and_the_position_in_the_data(tmp_path):
    iterator = numbers()
    for _ in range(3):
        next(iterator)
    state, progress = make_state(), {'best': 0.5, 'since_best': 2, 'nothing': None}
    with Checkpoints(tmp_path / 'c', IDENTITY) as checkpoints:
        checkpoints.save(3, state, iterator, progress)
        expected = [next(iterator) for _ in range(40)]
        fresh = numbers()
        restored = checkpoints.restore(abstract(state), fresh)
    assert (restored.step, restored.progress) == (3, progress)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)
    np.testing.assert_array_equal([next(fresh) for _ in range(40)], expected)


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / 'never made') is None
    assert not (tmp_path / 'never made').exists()


def test_restores_onto_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec('data'))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = {'x': jax.device_put(jnp.arange(64.0).reshape(16, 4), rows), 'n': jnp.int32(3)}
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, state, None, {})
        for sharding in (rows, everywhere):
            shapes = {
                'x': jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding),
                'n': jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
            }
            restored = checkpoints.restore(shapes, None).state
            assert restored['x'].sharding == sharding
            assert restored['n'].sharding == everywhere
            np.testing.assert_array_equal(restored['x'], state['x'])


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {f'w{i}': jnp.full((500_000,), float(i)) for i in range(4)}
    shapes = abstract(state)
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, state, None, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(shapes, None).state
    for i in range(4):
        np.testing.assert_array_equal(restored[f'w{i}'], np.full(500_000, i))


def test_progress_is_copied_when_saved(tmp_path):
    progress = {'seen': [1]}
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), None, progress)
        progress['seen'].append(2)
    assert restore_only(tmp_path).progress == {'seen': [1]}


def restore_only(directory):
    with Checkpoints(directory, IDENTITY) as checkpoints:
        return checkpoints.restore(abstract(make_state()), None)


def test_accepts_any_iterator_with_a_state(tmp_path):
    class Counter:
        state = 7

        def get_state(self):
            return {'at': self.state}

        def set_state(self, state):
            self.state = state['at']

    counter = Counter()
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), counter, {})
        counter.state = 99
        checkpoints.restore(abstract(make_state()), counter)
    assert counter.state == 7


def test_accepts_grains_data_loader(tmp_path):
    sampler = grain.samplers.IndexSampler(20, shuffle=True, seed=1, num_epochs=2)
    loader = grain.DataLoader(data_source=range(20), sampler=sampler)
    iterator, other = iter(loader), iter(loader)
    taken = [next(iterator) for _ in range(5)]
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(5, make_state(), iterator, {})
        checkpoints.restore(abstract(make_state()), other)
    rest = list(other)
    assert rest == list(iterator)
    assert len(taken) + len(rest) == 40


def test_keeps_the_latest_two_and_the_best(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4, 5, 6], {1: 0.5, 2: 0.9, 3: 0.9, 4: float('nan')})
    assert steps_in(tmp_path) == [2, 5, 6]
    # A later process remembers which was the best.
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(7, make_state(7), None, {}, 0.8)
        checkpoints.save(8, make_state(8), None, {}, None)
        best = checkpoints.restore_best(abstract(make_state()))
        assert (best.step, bits(best.state)) == (2, bits(make_state(2)))
        checkpoints.save(9, make_state(9), None, {}, 0.95)
        checkpoints.save(10, make_state(10), None, {}, 0.1)
        checkpoints.save(11, make_state(11), None, {})
        checkpoints.wait()
        assert steps_in(tmp_path) == [9, 10, 11]


def test_no_best_without_metrics(tmp_path):
    save_steps(tmp_path, [1, 2])
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        assert checkpoints.restore_best(abstract(make_state())) is None


def test_a_step_is_saved_once(tmp_path):
    save_steps(tmp_path, [4])
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(4, make_state(9), None, {'at': 'again'})
    assert restore_only(tmp_path).progress == {'at': 4}


def test_refuses_another_backbone_or_config(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(
        ValueError, match=r"fingerprint is 'f00d' there and 'beef' here.*another wo"
    ):
        restore(tmp_path, IDENTITY | {'backbone_fingerprint': 'beef'})
    other = {'task': 'mrpc', 'optimizer': {'b1': 0.8}, 'seed': 1}
    with pytest.raises(ValueError, match=r'config\.optimizer\.b1 is 0\.9 there and 0\.8 here') as e:
        restore(tmp_path, IDENTITY | {'config': other})
    assert 'config.seed is None there and 1 here' in str(e.value)
    assert 'task' not in str(e.value)
    assert restore(tmp_path).step == 1


def test_identity_survives_the_trip_through_json(tmp_path):
    identity = {'config': {'layers': (0, 1), 'path': Path('x'), 'rate': np.float32(0.5)}}
    with Checkpoints(tmp_path, identity) as checkpoints:
        checkpoints.save(1, make_state(), None, {})
    with Checkpoints(tmp_path, identity) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), None).step == 1


def test_refuses_the_state_of_another_model(tmp_path):
    save_steps(tmp_path, [1])
    message = (
        r"0/adapters/a/kernel is \['float32', \[40, 8\]\] there and \['float32', \[41, 8\]\] here"
    )
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, state=make_state(size=41))


def damage(path, how, generator):
    content = path.read_bytes()
    if how == 'delete':
        path.unlink()
    elif how == 'truncate':
        path.write_bytes(content[: generator.randrange(len(content))])
    elif how == 'empty':
        path.write_bytes(b'')
    elif how == 'flip a bit':
        at = generator.randrange(len(content))
        flipped = bytes([content[at] ^ 1 << generator.randrange(8)])
        path.write_bytes(content[:at] + flipped + content[at + 1 :])
    elif how == 'overwrite':
        path.write_bytes(generator.randbytes(len(content)))
    return path.exists() and path.read_bytes() == content


def matters(path):
    # Orbax never reads its own mark of completion at the top; the time in its description is free.
    return not (path.name == 'commit_success.txt' and path.parent.name.isdecimal())


@pytest.mark.parametrize(
    'seed', [0, 1, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 3, 4))]
)
def test_falls_back_when_any_file_of_the_newest_is_damaged(tmp_path, caplog, seed):
    generator, kinds = (
        random.Random(seed),
        ['delete', 'truncate', 'empty', 'flip a bit', 'overwrite'],
    )
    positions = save_steps(tmp_path / 'sound', [1, 2])
    every = sorted(p for p in (tmp_path / 'sound' / '2').rglob('*') if p.is_file() and matters(p))
    assert len(every) > 8
    for i, victim in enumerate(every):
        directory = tmp_path / str(i)
        shutil.copytree(tmp_path / 'sound', directory)
        target = directory / victim.relative_to(tmp_path / 'sound')
        how = kinds[(i + seed) % len(kinds)]
        unchanged = damage(target, how, generator) or only_the_time_differs(target, victim)
        caplog.clear()
        iterator = numbers()
        with Checkpoints(directory, IDENTITY) as checkpoints:
            restored = checkpoints.restore(abstract(make_state()), iterator)
        step = 2 if unchanged else 1
        assert (restored.step, restored.progress) == (step, {'at': step}), victim
        assert bits(restored.state) == bits(make_state(step)), victim
        assert iterator.get_state() == positions[step]
        if not unchanged:
            assert 'checkpoint of step 2 is damaged' in caplog.text
            assert (directory / 'damaged-2').is_dir()


def only_the_time_differs(one, other):
    if one.name != '_CHECKPOINT_METADATA' or not one.exists():
        return False
    try:
        contents = [json.loads(path.read_bytes()) for path in (one, other)]
    except ValueError:
        return False
    times = [content.pop('commit_timestamp_nsecs', None) for content in contents]
    return contents[0] == contents[1] and all(isinstance(t, int) for t in times)


def test_goes_on_saving_over_what_was_damaged(tmp_path, caplog):
    save_steps(tmp_path, [1, 2, 3])
    for step in (2, 3):
        (tmp_path / str(step) / manifest.MANIFEST).write_text('{}')
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), None) is None
        checkpoints.save(2, make_state(20), None, {'at': 'anew'})
        checkpoints.save(3, make_state(30), None, {})
    assert caplog.text.count('is damaged') == 2
    assert steps_in(tmp_path) == [2, 3]
    assert restore_only(tmp_path).step == 3


def test_every_checkpoint_damaged_twice(tmp_path):
    for _ in range(3):
        save_steps(tmp_path, [1])
        (tmp_path / '1' / manifest.MANIFEST).unlink()
        assert restore(tmp_path) is None
    assert sorted(p.name for p in tmp_path.iterdir()) == ['damaged-1', 'damaged-1-1', 'damaged-1-2']


def test_removes_what_an_interrupted_deletion_left(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    shutil.rmtree(tmp_path / '1' / 'state')
    assert restore(tmp_path).step == 2
    assert 'removed the incomplete checkpoint of step 1' in caplog.text
    assert steps_in(tmp_path) == [2]


def test_removes_what_an_interrupted_write_left(tmp_path):
    save_steps(tmp_path, [1])
    for step in (2, 5):
        (tmp_path / f'{step}.orbax-checkpoint-tmp' / 'state').mkdir(parents=True)
    assert restore(tmp_path).step == 1
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(2, make_state(2), None, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ['1', '2']


def test_says_that_a_checkpoint_has_no_position_in_the_data(tmp_path):
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), None, {})
    with pytest.raises(
        ValueError, match=r'positions in the data of 0 processes, and this run has 1'
    ):
        restore(tmp_path)


def test_orbax_keeps_its_tracebacks_to_itself():
    with Checkpoints('unused', {}) as checkpoints:
        checkpoints.wait()
    assert not logging.getLogger('absl').filters


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, where the test may mount one."""
    directory = tmp_path / 'disk'
    directory.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=3m', 'tmpfs', directory]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('this user cannot mount a small disk')
    yield directory
    subprocess.run(['umount', directory], check=True)


def test_a_full_disk_is_said_in_a_sentence(small_disk):
    directory = small_disk / 'checkpoints'
    save_steps(directory, [1])
    big = {'x': jax.random.normal(jax.random.key(0), (2_000_000,))}
    with Checkpoints(directory, IDENTITY) as checkpoints:
        checkpoints.save(2, big, None, {})
        with pytest.raises(
            files.DiskError, match=r'no room to write \S+/checkpoints .*free some sp'
        ):
            checkpoints.wait()
        assert steps_in(directory) == [1]
        for step in (2, 3):  # room was made: the step that failed can be saved after all
            checkpoints.save(step, make_state(step), numbers(), {})
            checkpoints.wait()
            assert step in steps_in(directory)
    assert restore(directory).step == 3


def test_a_file_that_cannot_be_finished(tmp_path):
    """The same without a mount: the system refuses to let a file grow."""
    save_steps(tmp_path / 'c', [1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    big = {'x': jax.random.normal(jax.random.key(0), (1_000_000,))}
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
        checkpoints = Checkpoints(tmp_path / 'c', IDENTITY)
        checkpoints.save(2, big, None, {})
        with pytest.raises(files.DiskError) as caught:
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert caught.value.errno == errno.EFBIG
    assert restore(tmp_path / 'c').step == 1


def test_a_directory_that_cannot_be_written_to(tmp_path):
    if os.geteuid() == 0:
        directory = Path('/sys/checkpoints')  # even root may not
        if not directory.parent.is_dir():
            pytest.skip('no directory here that root may not write to')
    else:
        directory = tmp_path / 'checkpoints'
        tmp_path.chmod(0o500)
    with (
        pytest.raises(files.DiskError, match=r'cannot be written .* directory that you may write'),
        Checkpoints(directory, IDENTITY) as checkpoints,
    ):
        checkpoints.save(1, make_state(), numbers(), {})


class Toy:
    """The toy run, in a process that can be killed."""

    def __init__(self, directory, steps, size, pause):
        self.directory = directory
        directory.mkdir(exist_ok=True)
        self.arguments = [sys.executable, TOY, directory, str(steps), str(size), str(pause)]

    def start(self):
        environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'}
        return subprocess.Popen(self.arguments, env=environment, stderr=subprocess.PIPE, text=True)

    def finish(self, process=None):
        process = process or self.start()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

    def kill(self, moment):
        """Run until `moment()` is true, and kill; tell whether the kill came before the end."""
        process = self.start()
        while not moment() and process.poll() is None:
            time.sleep(0.0005)
        process.kill()
        process.communicate()
        return process.returncode == -signal.SIGKILL

    def lines(self):
        path = self.directory / 'batches.txt'
        return path.read_text().splitlines() if path.exists() else []

    def after(self, steps):
        """Return a moment: `steps` more steps have been taken."""
        aim = len(self.lines()) + steps
        return lambda: len(self.lines()) >= aim

    def while_writing(self):
        """Return a moment: a checkpoint is being written, and another is there."""
        checkpoints = self.directory / 'checkpoints'

        def writing():
            names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
            return any('tmp' in n for n in names) and any(n.isdecimal() for n in names)

        return writing

    def batches(self):
        """Return the batch of each step, after checking that a step taken twice saw it twice."""
        seen = {}
        for step, batch in (line.split() for line in self.lines()):
            assert seen.setdefault(int(step), batch) == batch, f'step {step} saw another batch'
        return seen

    def final(self):
        return (self.directory / 'final.txt').read_text()


def check_kills(tmp_path, steps, size, pause, kills):
    """Kill a run at the moments that `kills` names; compare it with one that nothing disturbed."""
    calm = Toy(tmp_path / 'calm', steps, size, 0)
    beside = calm.start()
    toy = Toy(tmp_path / 'killed', steps, size, pause)
    for kill in kills:
        moment = toy.while_writing() if kill == 'writing' else toy.after(kill)
        assert toy.kill(moment)
        if kill == 'writing':
            left = [p.name for p in (toy.directory / 'checkpoints').iterdir() if 'tmp' in p.name]
            assert left, 'the kill did not come during a write'
    toy.finish()
    calm.finish(beside)
    assert len(toy.lines()) > steps, 'no step was taken twice: nothing was lost by the kills'
    assert toy.batches() == calm.batches()
    assert toy.final() == calm.final()


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    check_kills(tmp_path, 16, 500_000, 0.02, [random.randint(4, 9), 'writing'])


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_with_the_same_bits(tmp_path):
    kills = [random.choice(['writing', random.randint(1, 9)]) for _ in range(20)]
    check_kills(tmp_path, 150, 1_000_000, 0.04, kills)
