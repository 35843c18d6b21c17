"""Checkpoints that were damaged or interrupted, and disks that are full or closed."""

import errno
import json
import os
import random
import shutil
import subprocess
import time
from pathlib import Path

import jax
import pytest
from checkpointing import (
    IDENTITY,
    abstract,
    bits,
    make_state,
    numbers,
    restore,
    restore_only,
    save_steps,
    steps_in,
)
from full_disk import file_size
from orbax.checkpoint._src.metadata import checkpoint as orbax_metadata

from adapters_jax import files
from adapters_jax.training import manifest
from adapters_jax.training.checkpoint import Checkpoints


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
    'seed', [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2, 3, 4))]
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
    big = {'x': jax.random.normal(jax.random.key(0), (1_000_000,))}
    with file_size(500_000):
        checkpoints = Checkpoints(tmp_path / 'c', IDENTITY)
        checkpoints.save(2, big, None, {})
        with pytest.raises(files.DiskError) as caught:
            checkpoints.close()
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


def test_a_checkpoint_is_sealed_when_its_description_is_there(tmp_path, monkeypatch):
    """Orbax's thread may be late with it; what was sealed before looked damaged ever after."""
    store = orbax_metadata._NonBlockingMetadataStore
    update = store._update_and_log

    def late(self, *given, **named):
        time.sleep(0.5)
        update(self, *given, **named)

    monkeypatch.setattr(store, '_update_and_log', late)
    save_steps(tmp_path, [1])
    assert manifest.find_fault(tmp_path / '1') is None
    (tmp_path / '2').mkdir()
    with pytest.raises(TimeoutError, match=r'_CHECKPOINT_METADATA was not written in 0.01 s'):
        manifest.wait_for_metadata(tmp_path / '2', 0.01)
