"""What users do wrong, through the real commands: one clear sentence, status 2, no traceback.

`command.refused` checks the form; each test here checks that the sentence names the value and what
was expected, and that nothing was begun.
"""

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
from safetensors.numpy import load_file, save_file

from adapters_jax import config as configs
from adapters_jax import files
from adapters_jax.data import glue
from adapters_jax.evaluate import evaluate
from adapters_jax.predict import predict
from adapters_jax.train import train
from adapters_jax.training import loop


@pytest.fixture(scope='module', autouse=True)
def _quick(tmp_path_factory):
    with command.compiled_once(tmp_path_factory.getbasetemp() / 'compiled'):
        yield


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone, data files and a finished run."""
    folder = tmp_path_factory.mktemp('mistakes')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 60)
    train(toy.config(str(folder / 'bert'), str(folder / 'texts.csv')), folder / 'run')
    return folder


class Line:
    """The command line of a training run that would work, to be spoilt by each test."""

    def __init__(self, toys, tmp_path):
        self.folder, self.toys = tmp_path, toys
        self.workdir = tmp_path / 'workdir'

    def arguments(self, *changes, file='text_classification', workdir=None):
        name, _, argument = file.partition(':')
        given = [f'--config=configs/{name}.py:{argument or "method=head"}']
        given += [f'--workdir={workdir or self.workdir}']
        given += [f'--config.backbone={self.toys / "bert"}', '--config.data.cache_dir=none']
        given += [f'--config.data.train={self.toys / "texts.csv"}', '--config.mesh.data=1']
        return [*given, '--config.training.epochs=1', *changes]

    def refused(self, *changes, **options):
        """Return the sentence; nothing must have been trained or promised."""
        names = ('file', 'workdir')
        given = {name: options.pop(name) for name in names if name in options}
        arguments = self.arguments(*changes, **given)
        sentence = command.refused('train', *arguments, folder=self.folder / 'out', **options)
        left = {path.name for path in self.workdir.glob('*')}
        assert left <= {'.lock'}, left
        return sentence


@pytest.fixture
def line(toys, tmp_path):
    return Line(toys, tmp_path)


KEYS = ', '.join(sorted(configs.base()))
SPOILT = {
    'unknown key': ('--config.foo=1', f"'foo'.*known: {KEYS}"),
    'unknown key below': (
        '--config.training.epoch=3',
        "'epoch'.*known: accumulate, batch_size, .*, epochs",
    ),
    'a key below a value': ('--config.seed.x=3', "'x'"),
    'unknown flag': ('--wrkdir=x', 'wrkdir'),
    'not a number': ('--config.training.batch_size=many', 'batch_size.*many'),
    'a section as value': ('--config.training=3', 'training'),
    'a stray word': ('train', "unexpected argument 'train'; options begin with --"),
    'unknown task': (
        '--config.task.name=clasification',
        "unknown task 'clasification'; known: classification, regression",
    ),
    'unknown method': ('--config.method=houlsbee', "unknown method 'houlsbee'; known: .*houlsby"),
    'unknown option': (
        '--config.method=pfeiffer[reduction=8]',
        "no option 'reduction'; known: .*reduction_factor",
    ),
    'unknown metric': ('--config.task.primary=f2', "'f2' .*accuracy, f1_macro"),
    'unknown metric in the list': (
        "--config.task.metrics=('accuracy','f2')",
        "unknown metric 'f2' for classification; known: accuracy, f1,",
    ),
    'unknown pooling': ('--config.head.pooling=max', "head.pooling is 'max'; expected .*'mean'"),
    'unknown schedule': ('--config.optimizer.schedule=step', "schedule .*'linear'.*got 'step'"),
    'unknown number format': ('--config.training.dtype=float16', "'float16'; expected .*bfloat16"),
    'unknown batching': ('--config.data.batching=bins', "'bins'; expected one of packed, buckets"),
    'negative learning rate': ('--config.optimizer.learning_rate=-1', 'learning_rate .*-1'),
    'negative patience': ('--config.training.patience=-1', 'patience is -1; expected 0 or more'),
    'no epochs': ('--config.training.epochs=0', r'epochs is 0\.0; expected more than 0'),
    'negative steps': ('--config.training.steps=-5', 'steps is -5; expected 0 or more'),
    'negative seed': ('--config.seed=-1', 'seed is -1; expected 0 or more'),
    'empty batch': ('--config.training.batch_size=0', 'batch_size is 0; expected 1 or more'),
    'smoothing': ('--config.training.label_smoothing=1.5', r'label_smoothing is 1\.5'),
    'too many devices': ('--config.mesh.data=9', 'mesh.data is 9 but 1 devices are present'),
    'no devices': ('--config.mesh.data=0', 'mesh.data is 0'),
    'too long': (
        '--config.data.max_length=129',
        'max_length is 129, but the model has 128 positions; set it to 128 or less',
    ),
    'too short': ('--config.data.max_length=2', 'max_length is 2, which leaves no room'),
    'missing file': ('--config.data.train=/no/such.csv', 'no file /no/such.csv'),
    'missing folder': ('--config.data.dir=/no/such', "data.dir is '/no/such'.*not a folder"),
    'missing column': (
        '--config.data.columns.text_a=review',
        "no column 'review'.*columns are 'text', 'label'",
    ),
    'unknown backbone': (
        '--config.backbone=/no/such/model',
        "'/no/such/model' is not an existing folder; expected a short name",
    ),
    'more layers than there are': (
        '--config.method=top_layers[layers=7]',
        'layers=7, but the backbone has 1',
    ),
    'a positive class that is none': ('--config.task.positive=fish', "'fish' is none of 'animal'"),
    'labels that lack one': (
        "--config.task.labels=('animal','food')",
        "split 'train': unseen labels 'weather'.*known: 'animal', 'food'",
    ),
    'smoothed numbers': ('--config.task.name=regression', "texts.csv, line 2: .*'animal'.*number"),
}


@pytest.mark.parametrize('mistake', SPOILT)
def test_a_spoilt_command_line(line, mistake):
    argument, expected = SPOILT[mistake]
    assert re.search(expected, line.refused(argument))


@pytest.mark.parametrize(
    ('file', 'expected'),
    [
        ('glue:foo=1', "'foo=1' is not understood; expected key=value with task='rte', method="),
        ('glue:task=wnlu', "'wnlu' is no GLUE task; the tasks are cola, .*, wnli"),
        ('text_classification:method=houlsbee', "unknown method 'houlsbee'; known:"),
        ('no_such_config', 'no file configs/no_such_config.py; configs holds .*configs/glue.py'),
    ],
)
def test_a_spoilt_config_argument(line, file, expected):
    assert re.search(expected, line.refused(file=file))


def test_required_options_are_named(tmp_path):
    for module, option in {'train': 'config', 'evaluate': 'workdir', 'predict': 'adapter'}.items():
        assert f'--{option}' in command.refused(module, folder=tmp_path)


def test_a_real_process_says_it_the_same_way(line):
    run = command.python_of('train', *line.arguments('--config.foo=1'))
    done = subprocess.run(run, capture_output=True, text=True, cwd=command.ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown config key --config.foo: no 'foo' here; known: ")
    assert done.stderr.count('\n') == 1


def test_a_glue_folder_without_its_files(line):
    (line.folder / 'RTE').mkdir()
    (line.folder / 'RTE' / 'train.tsv').write_text('index\tsentence1\tsentence2\tlabel\n')
    options = ('--config.data.train=', f'--config.data.dir={line.folder}')
    found = line.refused(*options, file='glue:task=rte,method=head')
    assert 'RTE: no dev.tsv' in found and 'holds train.tsv' in found


def test_an_unseen_label_in_validation_is_named(line):
    other = toy.write_table(line.folder / 'dev.csv', ('text', 'label'), [('the cat', 'annimal')])
    found = line.refused(f'--config.data.validation={other}')
    assert "split 'validation': unseen labels 'annimal' (1 times); known: 'animal'" in found


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('', 'is empty; it must hold at least one example'),
        ('text,label\n', 'has no examples; it must hold at least one'),
        ('text,label\nthe cat,animal\n', 'at least two classes, not 1|too few to cut'),
        ('text,label\nthe cat,animal\n,food\n', r'line 3: .*text'),
        ('text,label\nthe cat,animal\nsoup\n', r'line 3: 1 fields where the first line has 2'),
        ('text,label\nthe cat,animal\nsoup,\n', r'line 3: the label is empty'),
        ('words,label\nthe cat,animal\n', r"'words', 'label'"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(line, content, expected):
    path = line.folder / 'given.csv'
    path.write_text(content)
    found = line.refused(f'--config.data.train={path}')
    assert re.search(expected, found)


def test_texts_longer_than_allowed_are_cut_and_counted(line, caplog, monkeypatch):
    rows = toy.texts(30) + [('the ' * 50 + word, topic) for word, topic in toy.texts(12, seed=1)]
    data = toy.write_table(line.folder / 'long.csv', ('text', 'label'), rows)
    changes = (f'--config.data.train={data}', '--config.data.max_length=20')
    done = command.run('train', *line.arguments(*changes), folder=line.folder)
    assert done.status == 0, done.err
    told = re.findall(
        r'(\d+) of (\d+) examples \(.*\) are longer than max_length = 20 and were cut', done.err
    )
    assert sum(int(cut) for cut, _ in told) >= 12


def test_batches_that_do_not_divide_over_devices(line):
    changes = ('--config.mesh.data=8', '--config.data.batching=buckets')
    found = line.refused(*changes, '--config.training.batch_size=12', devices=8)
    expected = 'batch_size is 12, which does not divide over 8 devices x 1 accumulation steps'
    assert expected in found and 'multiple of 8' in found


def spoilt_copy(toys, folder, spoil):
    """Return a copy of the finished adapter after `spoil(copy)`."""
    copy = folder / 'adapter'
    shutil.copytree(toys / 'run' / 'adapter', copy)
    spoil(copy)
    return copy


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path, change):
    leaves = load_file(path)
    save_file(change(leaves), path)


def without_first(leaves):
    return dict(sorted(leaves.items())[1:])


DAMAGE = {
    'no folder': (shutil.rmtree, 'is not an adapter: it has no adapter_config.json'),
    'no config': (lambda p: (p / 'adapter_config.json').unlink(), 'found: adapter.safetensors'),
    'half a config': (
        lambda p: (p / 'adapter_config.json').write_text('{"format": '),
        'adapter_config.json is not JSON',
    ),
    'a list for a config': (
        lambda p: (p / 'adapter_config.json').write_text('[]'),
        'is of no known kind .it holds: list.; expected an adapter of this project',
    ),
    'another format': (
        lambda p: change_json(p / 'adapter_config.json', format='peft'),
        'is of no known kind',
    ),
    'a config without method': (
        lambda p: (p / 'adapter_config.json').write_text('{"format": "adapters_jax"}'),
        'lacks name, method, head',
    ),
    'no head': (lambda p: (p / 'head.safetensors').unlink(), 'head.safetensors is missing'),
    'half a tensor file': (
        lambda p: os.truncate(p / 'adapter.safetensors', 100),
        'adapter.safetensors is damaged',
    ),
    'a leaf less': (
        lambda p: change_tensors(p / 'adapter.safetensors', without_first),
        'adapters/default/layer_0/feed_forward/down/bias is missing',
    ),
    'a leaf more': (
        lambda p: change_tensors(
            p / 'adapter.safetensors', lambda x: x | {'adapter/layer_0/x': np.zeros(3)}
        ),
        'adapters/default/layer_0/x is unexpected',
    ),
    'a leaf of another shape': (
        lambda p: change_tensors(p / 'head.safetensors', lambda x: dict.fromkeys(x, np.zeros(2))),
        r'heads/default/dense_0/bias has shape \(2,\), expected \(3,\)',
    ),
    'members that are none': (
        lambda p: change_json(
            p / 'adapter_config.json', method={'architecture': 'union', 'members': 3}
        ),
        'members=3 is not valid; expected a list of methods',
    ),
    'a head with an unknown key': (
        lambda p: change_json(p / 'adapter_config.json', head={'nonsense': 1}),
        'the head has nonsense=1; expected pooling, layers',
    ),
    'a backbone without a name': (
        lambda p: change_json(p / 'adapter_config.json', backbone={}),
        "does not say which backbone it is for: 'name' is None",
    ),
    'labels that are none': (
        lambda p: change_json(
            p / 'adapter_config.json', task={'name': 'classification', 'labels': 3}
        ),
        'labels is 3; expected a list of names',
    ),
    'an unknown method': (
        lambda p: change_json(p / 'adapter_config.json', method={'architecture': 'lorra'}),
        "unknown architecture 'lorra'; known: .*bottleneck",
    ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_adapter(toys, tmp_path, damage):
    spoil, expected = DAMAGE[damage]
    copy = spoilt_copy(toys, tmp_path, spoil)
    with pytest.raises((ValueError, OSError)) as caught:
        predict(copy, [{'text': 'the cat'}])
    assert re.search(expected, str(caught.value)) and '\n' not in str(caught.value)


def predict_line(adapter, folder, *more, content='{"text": "the cat"}\n'):
    (folder / 'in.jsonl').write_bytes(content.encode('utf-8', 'surrogateescape'))
    files = (f'--input={folder / "in.jsonl"}', f'--output={folder / "out.jsonl"}')
    return (f'--adapter={adapter}', *files, *more)


def test_the_predict_command_refuses_a_damaged_adapter(toys, tmp_path):
    copy = spoilt_copy(toys, tmp_path, DAMAGE['half a tensor file'][0])
    found = command.refused('predict', *predict_line(copy, tmp_path), folder=tmp_path)
    assert 'adapter.safetensors is damaged' in found and 'restore it from its source' in found
    assert not (tmp_path / 'out.jsonl').exists()


@pytest.mark.parametrize(
    ('sizes', 'key'),
    [
        ({'hidden': 24}, 'hidden is 32.*24'),
        ({'layers': 3}, 'layers is 1.*3'),
        ({'seed': 1}, 'fingerprint is'),
    ],
)
def test_an_adapter_made_for_another_backbone(toys, tmp_path, sizes, key):
    other = toy.write_backbone(tmp_path / 'other', **sizes)
    given = predict_line(toys / 'run' / 'adapter', tmp_path, f'--backbone={other}')
    found = command.refused('predict', *given, folder=tmp_path)
    assert re.search(f'made for another backbone: its {key}', found)
    assert str(toys / 'bert') in found


def test_a_backbone_that_has_moved(toys, tmp_path):
    gone = spoilt_copy(toys, tmp_path, lambda p: None)
    described = json.loads((gone / 'adapter_config.json').read_text())['backbone']
    change_json(gone / 'adapter_config.json', backbone=described | {'name': '/gone/bert'})
    given = predict_line(gone, tmp_path)
    found = command.refused('predict', *given, folder=tmp_path)
    assert "'/gone/bert' is not an existing folder" in found and '--backbone' in found


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('{"text": "a"}\n\n{"text": \n', 'in.jsonl, line 3 is not JSON'),
        ('{"text": "a"}\n["b"]\n', 'line 2 is not a JSON object but \'\\["b"\\]\''),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2 has no text under 'text'.*this one has: txt"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2 has no text under 'text'"),
        ('{"text": "  "}\n', "line 1 has no text under 'text'"),
        ('{"text_a": "x"}\n{"text": "x"}\n', "line 2 has no text under 'text_a'"),
        ('\n \n', 'the input holds no examples'),
        ('\udcff{"text": "a"}\n', 'in.jsonl is not UTF-8'),
    ],
)
def test_input_that_cannot_be_read(toys, tmp_path, content, expected):
    given = predict_line(toys / 'run' / 'adapter', tmp_path, content=content)
    assert re.search(expected, command.refused('predict', *given, folder=tmp_path))
    assert not (tmp_path / 'out.jsonl').exists()


def test_more_that_predict_refuses(toys, tmp_path):
    adapter = toys / 'run' / 'adapter'
    given = predict_line(adapter, tmp_path, '--batch_size=0')
    assert 'batch_size is 0' in command.refused('predict', *given, folder=tmp_path)
    given = predict_line(adapter, tmp_path, f'--input={tmp_path}/no.jsonl')
    assert f'{tmp_path}/no.jsonl does not exist' in command.refused(
        'predict', *given, folder=tmp_path
    )


def test_what_evaluate_refuses(toys, tmp_path):
    found = command.refused(
        'evaluate', f'--workdir={toys / "run"}', '--split=tets', folder=tmp_path
    )
    assert "no split 'tets' in this run; it has test, train, validation" in found
    found = command.refused('evaluate', f'--workdir={tmp_path}', folder=tmp_path)
    assert f'{tmp_path}/adapter is not an adapter' in found and 'WORKDIR/adapter' in found


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


def test_the_command_says_so_too(line):
    changes = [f'--config.{k.replace("__", ".")}={v}' for k, v in STUCK.items()]
    found = command.refused('train', *line.arguments(*changes), folder=line.folder)
    assert re.search(r'step \d+ .*: stopped; .*state, of step \d+, .*lower optimizer', found)


def half_run(toys, folder, **changes):
    """Train four of eight steps with a checkpoint for each, stopped as by SIGTERM."""
    given = {'method': 'head', 'training__steps': 8, 'training__checkpoint_every': 2}
    config = toy.config(str(toys / 'bert'), str(toys / 'texts.csv'), **given | changes)
    full = train(config, folder / 'whole')
    taken = loop.Trainer._record

    def stopping(self, pending):
        taken(self, pending)
        self._stop_requested = self.step >= 4

    loop.Trainer._record = stopping
    try:
        with pytest.raises(SystemExit) as caught:
            train(config, folder / 'half')
    finally:
        loop.Trainer._record = taken
    assert caught.value.code == 143
    return config, full


def newest(workdir):
    return max((p for p in (workdir / 'checkpoints').iterdir() if p.name.isdecimal()), key=int_name)


def int_name(path):
    return int(path.name)


def test_a_corrupt_newest_checkpoint_falls_back_and_says_so(toys, tmp_path):
    config, _ = half_run(toys, tmp_path)
    latest = newest(tmp_path / 'half')
    assert int_name(latest) >= 4
    victim = max((p for p in latest.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    train(config, tmp_path / 'half')
    said = (tmp_path / 'half' / 'log.txt').read_text()
    expected = f'the checkpoint of step {latest.name} is damaged .*falling back to an earlier one'
    assert re.search(expected, said)
    assert f'continuing from the checkpoint of step {int_name(latest) - 2}' in said
    assert toy.losses(tmp_path / 'half') == toy.losses(tmp_path / 'whole')
    for name in ('adapter.safetensors', 'head.safetensors'):
        ours, theirs = (tmp_path / w / 'adapter' / name for w in ('half', 'whole'))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_checkpoint_of_another_run_is_refused(toys, tmp_path):
    data = toy.write_texts(tmp_path / 'data.csv', 60)
    config, _ = half_run(toys, tmp_path, data__train=data)
    # The same config, over a file with other texts.
    toy.write_texts(tmp_path / 'data.csv', 60, seed=9)
    check_other(config, tmp_path / 'half', 'data_fingerprint is .* there and .* here')
    toy.write_texts(tmp_path / 'data.csv', 60)
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
    given = line.arguments('--config.method=pfeiffer[reduction_factor=1]')
    found = command.refused('train', *given, folder=line.folder, file_size=3_000, cache=None)
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


def test_every_glue_task_is_named_when_one_is_misspelt(line):
    found = line.refused(file='glue:task=snli')
    assert all(name in found for name in glue.TASKS)
