"""Runs that cannot go on: another run's workdir or checkpoint, no number, no room on the disk."""

import errno
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import command
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy
from command_lines import Line, predict_line

from adapters_jax import config as configs
from adapters_jax import entry, files
from adapters_jax import predict as prediction
from adapters_jax.evaluate import evaluate
from adapters_jax.train import train
from adapters_jax.training import loop

pytestmark = pytest.mark.usefixtures('compiled_once')


def test_another_config_on_the_same_workdir_lists_what_changed(toys, tmp_path):
    shutil.copytree(toys / 'run', tmp_path / 'run')
    changes = ('--config.optimizer.learning_rate=0.5', '--config.seed=3')
    given = Line(toys, tmp_path).arguments(*changes, workdir=tmp_path / 'run')
    found = command.refused('train', *given, folder=tmp_path)
    assert 'learning_rate was 0.001, now 0.5' in found and 'seed was 0, now 3' in found
    assert "method was 'pfeiffer[reduction_factor=2]', now 'head'" in found
    assert 'another --workdir' in found
    # Where the data stands and how often is logged changes no number, and is no other run.
    config = configs.read(tmp_path / 'run' / 'config.json')
    config.training.log_every, config.mesh.data = 7, 2
    assert train(config, tmp_path / 'run')['finished'] == 'all steps taken'


def test_a_summary_that_was_cut_off_is_named(tmp_path):
    own = configs.base()
    (tmp_path / 'config.json').write_text(json.dumps(configs.to_json(own)))
    (tmp_path / 'summary.json').write_text('{"finished": ')
    with pytest.raises(ValueError, match=r'summary\.json is not JSON \(.*\): remove it, and'):
        train(own, tmp_path)


@pytest.mark.parametrize('key', ['grid', 'space'])
def test_to_evaluate_a_sweep_is_to_evaluate_a_member(tmp_path, key):
    own = configs.base()
    own.sweep[key] = ('seed=0,1',)
    (tmp_path / 'config.json').write_text(json.dumps(configs.to_json(own)))
    with pytest.raises(ValueError, match='is the workdir of a sweep: give the folder of one of'):
        evaluate(tmp_path)


def test_a_mended_mistake_may_use_the_same_workdir(line):
    line.refused('--config.method=houlsbee')
    line.refused('--config.data.train=/no/such.csv')
    done = command.run('train', *line.arguments(), folder=line.folder)
    assert done.status == 0, done.err


def test_a_file_for_a_workdir(line):
    (line.folder / 'file').write_text('')
    found = command.refused(
        'train', *line.arguments(workdir=line.folder / 'file'), folder=line.folder
    )
    assert str(line.folder / 'file') in found


@pytest.mark.skipif(not Path('/sys/kernel').is_dir(), reason='needs Linux: /sys/kernel')
def test_a_workdir_that_cannot_be_written(line):
    """Not even root may make files below /sys."""
    given = line.arguments(workdir='/sys/kernel')
    found = command.refused('train', *given, folder=line.folder)
    assert re.search('/sys/kernel cannot be written .*choose a directory that you may write', found)


STUCK = {
    'optimizer__learning_rate': 1e30,
    'optimizer__schedule': 'constant',
    'optimizer__warmup': 0.0,
    'training__steps': 20,
    'training__checkpoint_every': 1,
    'training__evaluate_every': 20,
}


def restored(workdir, step):
    """Return the arrays of a checkpoint, as they are on the disk."""
    return ocp.StandardCheckpointer().restore(workdir / 'checkpoints' / str(step) / 'state')


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_state(toys, tmp_path):
    data, bert = str(toys / 'texts.csv'), str(toys / 'bert')
    config = toy.config(bert, data, **STUCK)
    with pytest.raises(FloatingPointError) as caught:
        train(config, tmp_path / 'w')
    assert issubclass(caught.type, entry.MISTAKES)  # so that a command says it in one sentence
    step = int(re.search(r'the loss of step (\d+) is (nan|inf)', str(caught.value))[1])
    last = int(re.search(r'the last good state, of step (\d+), is in', str(caught.value))[1])
    assert last == step - 1 and str(tmp_path / 'w' / 'checkpoints') in str(caught.value)
    lines = toy.losses(tmp_path / 'w')
    assert [number for number, _ in lines] == list(range(1, step))
    assert np.isfinite([loss for _, loss in lines]).all()
    saved = sorted(int(p.name) for p in (tmp_path / 'w' / 'checkpoints').iterdir())
    assert saved[-1] == last
    state = restored(tmp_path / 'w', last)
    leaves = jax.tree.leaves(state)
    assert len(leaves) > 10 and all(jnp.isfinite(leaf).all() for leaf in leaves)


def test_parameters_that_are_no_numbers_are_never_saved(toys, tmp_path):
    """A finite loss can still lead to an infinite update: that step must not be the last good."""
    data, bert = str(toys / 'texts.csv'), str(toys / 'bert')
    absurd = {'optimizer__learning_rate': 3e38, 'optimizer__weight_decay': 1e3}
    config = toy.config(bert, data, **(STUCK | absurd))
    with pytest.raises(FloatingPointError, match=r'after step 1 the trained parameters .*nothing'):
        train(config, tmp_path / 'w')
    assert not list((tmp_path / 'w' / 'checkpoints').glob('[0-9]*'))


@pytest.mark.slow
def test_the_command_says_so_too(line):
    changes = [f'--config.{k.replace("__", ".")}={v}' for k, v in STUCK.items()]
    found = command.refused('train', *line.arguments(*changes), folder=line.folder)
    assert re.search(r'step \d+ .*: stopped; .*state, of step \d+, .*lower optimizer', found)


@pytest.fixture(scope='module')
def begun(toys, tmp_path_factory):
    """A run's whole workdir, and one of four of eight steps, stopped as by SIGTERM; its config."""
    folder = tmp_path_factory.mktemp('begun')
    given = {'method': 'head', 'training__steps': 8, 'training__checkpoint_every': 2}
    data = toy.write_texts(folder / 'data.csv', 60)
    config = toy.config(str(toys / 'bert'), data, training__dropout=True, **given)
    train(config, folder / 'whole')
    taken = loop.Trainer._record

    def stopping(self, pending):
        taken(self, pending)
        if self.step >= 4:
            self._stop.make()

    loop.Trainer._record = stopping
    try:
        with pytest.raises(SystemExit) as caught:
            train(config, folder / 'half')
    finally:
        loop.Trainer._record = taken
    assert caught.value.code == 143
    return folder, config


@pytest.fixture
def half_run(begun, tmp_path):
    """The config of a run whose workdirs, 'whole' and 'half', are in the test's own folder."""
    folder, config = begun
    toy.write_texts(folder / 'data.csv', 60)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    return config.copy_and_resolve_references()


def in_order(workdir):
    """Return the checkpoints, the newest last."""
    found = (p for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal())
    return sorted(found, key=int_name)


def newest(workdir):
    return in_order(workdir)[-1]


def int_name(path):
    return int(path.name)


def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(half_run, tmp_path):
    *_, before, latest = in_order(tmp_path / 'half')
    assert int_name(latest) >= 4
    victim = max((p for p in latest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train(half_run, tmp_path / 'half')
    said = (tmp_path / 'half' / 'log.txt').read_text()
    expected = f'the checkpoint of step {latest.name} is damaged .*falling back to an earlier one'
    assert re.search(expected, said)
    assert f'continuing from the checkpoint of step {before.name}' in said
    assert toy.losses(tmp_path / 'half') == toy.losses(tmp_path / 'whole')
    for name in ('adapter.safetensors', 'head.safetensors'):
        ours, theirs = (tmp_path / w / 'adapter' / name for w in ('half', 'whole'))
        assert ours.read_bytes() == theirs.read_bytes()


def test_without_its_best_adapter_a_run_does_not_go_on(half_run, tmp_path):
    """No later one may be better: the run would end without an adapter, and not say so."""
    adapter = tmp_path / 'half' / 'adapter'
    adapter.rename(tmp_path / 'elsewhere')
    with pytest.raises(FileNotFoundError, match=r'adapter is gone, which held the best adapter so'):
        train(half_run, tmp_path / 'half')
    # As a kill leaves it that comes while another adapter takes its place.
    (tmp_path / 'elsewhere').rename(adapter.with_name('.adapter.previous'))
    train(half_run, tmp_path / 'half')
    assert (adapter / 'adapter.safetensors').exists()


def test_the_checkpoint_of_another_run_is_refused(half_run, tmp_path):
    config = half_run
    # The same config, over a file with other texts.
    toy.write_texts(Path(config.data.train), 60, seed=9)
    check_other(config, tmp_path / 'half', 'data_fingerprint is .* there and .* here')
    toy.write_texts(Path(config.data.train), 60)
    validation = config.data.validation
    config.data.validation = toy.write_texts(tmp_path / 'other.csv', 20, seed=5)
    other = tmp_path / 'half' / 'config.json'
    kept = other.read_text()
    other.unlink()
    check_other(config, tmp_path / 'half', 'validation_fingerprints.*')
    config.data.validation = validation
    other.write_text(kept)
    # Without its config.json the workdir would take any config; the checkpoint does not.
    (tmp_path / 'half' / 'config.json').unlink()
    bert = config.backbone
    config.backbone = toy.write_backbone(tmp_path / 'other', seed=1)
    check_other(config, tmp_path / 'half', 'backbone_fingerprint is .* there and .* here')
    config.backbone, config.seed = bert, 5
    (tmp_path / 'half' / 'config.json').unlink()
    check_other(config, tmp_path / 'half', 'config.seed is 0 there and 5 here')
    # Each time nothing was touched: the run goes on.
    config.seed = 0
    (tmp_path / 'half' / 'config.json').unlink()
    train(config, tmp_path / 'half')
    assert toy.losses(tmp_path / 'half') == toy.losses(tmp_path / 'whole')


def test_a_run_goes_on_where_its_data_and_backbone_have_moved(half_run, toys, tmp_path):
    config, workdir = half_run, tmp_path / 'half'
    config.data.train = str(tmp_path / 'data.csv')
    config.backbone = str(shutil.copytree(toys / 'bert', tmp_path / 'bert'))
    toy.write_texts(tmp_path / 'data.csv', 60, seed=9)
    check_other(config, workdir, r'config.data.train is .* there and .*, data_fingerprint is')
    toy.write_texts(tmp_path / 'data.csv', 60)
    train(config, workdir)
    assert toy.losses(workdir) == toy.losses(tmp_path / 'whole')
    assert configs.read(workdir / 'config.json').backbone == config.backbone
    # What is finished would not notice other data.
    config.data.train = str(tmp_path / 'other.csv')
    with pytest.raises(ValueError, match=r'another config \(data.train was .*, now .*other.csv'):
        train(config, workdir)


def check_other(config, workdir, expected):
    with pytest.raises(ValueError, match=r'belongs to another run: .*another workdir') as caught:
        train(config, workdir)
    assert re.search(expected, str(caught.value))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB, where this process may mount one."""
    place = tmp_path / 'disk'
    place.mkdir()
    given = ['mount', '-t', 'tmpfs', '-o', 'size=256k', 'tmpfs', str(place)]
    if os.geteuid() or subprocess.run(given, capture_output=True, check=False).returncode:
        pytest.skip('needs the right to mount a file system')
    yield place
    subprocess.run(['umount', '-l', str(place)], check=True)


@pytest.mark.slow  # the next one is like it
def test_a_full_disk(line, small_disk):
    (small_disk / 'filling').write_bytes(bytes(200_000))
    found = command.refused('train', *line.arguments(workdir=small_disk / 'w'), folder=line.folder)
    assert 'no room to write' in found and 'free some space' in found
    assert not (small_disk / 'w' / 'summary.json').exists()
    # With room again, the same command finishes.
    (small_disk / 'filling').unlink()
    done = command.run('train', *line.arguments(workdir=small_disk / 'w'), folder=line.folder)
    assert done.status == 0, done.err


def test_files_that_the_system_does_not_let_grow(line):
    """Like a full disk, without a disk: each file may have so many bytes."""
    changes = ('--config.method=pfeiffer[reduction_factor=1]', '--config.training.dropout=False')
    given = line.arguments(*changes)
    # Nor into the cache of programs: what is cut there would be found by every later run.
    limits = {'file_size': 3_000, 'cache': None, 'read_only_cache': True}
    found = command.refused('train', *given, folder=line.folder, **limits)
    assert 'no room to write' in found and 'free some space' in found
    done = command.run('train', *given, folder=line.folder)
    assert done.status == 0, done.err


def test_a_full_disk_under_evaluate_and_predict(toys, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(files, '_sync', full)
    with pytest.raises(OSError, match=r'no room to write .*predictions_test.jsonl'):
        evaluate(toys / 'run')
    assert not list((toys / 'run').glob('.predictions*'))
    names = ('adapter', 'input', 'output')
    given = (
        argument.partition('=')[2] for argument in predict_line(toys / 'run/adapter', tmp_path)
    )
    given = dict(zip(names, given, strict=True))
    with pytest.raises(OSError, match=r'no room to write .*out.jsonl'):
        prediction.main(
            **given, backbone='', batch_size=32, drop_layers='0', frozen_dtype='float32', off=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ['in.jsonl']
