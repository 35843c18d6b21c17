"""Mistakes in flags, in configs and in what they name."""

import re
import subprocess

import command
import pytest

from adapters_jax import config as configs
from adapters_jax import entry
from adapters_jax.data import glue

pytestmark = pytest.mark.usefixtures('compiled_once')

KEYS = ', '.join(sorted(configs.base()))
SPOILT = {
    'unknown key': ('--config.foo=1', f"'foo'.*known: {KEYS}"),
    'unknown key below': (
        '--config.training.epoch=3',
        f"'epoch'.*known: {', '.join(sorted(configs.base().training))}",
    ),
    'a key below a value': ('--config.seed.x=3', "no 'x' here; known: nothing below it"),
    'unknown flag': ('--wrkdir=x', r"Unknown command line flag 'wrkdir'\. Did you mean: workdir"),
    'not a number': ('--config.training.batch_size=many', 'batch_size.*many'),
    'a section as value': (
        '--config.training=3',
        r'Flag --config\.training is provided after --config\.training\.epochs and it will overwr',
    ),
    'a stray word': ('train', "unexpected argument 'train'; options begin with --"),
    'unknown task': (
        '--config.task.name=clasification',
        "unknown task 'clasification'; known: classification, image_classification, masked_lm,",
    ),
    'unknown method': ('--config.method=houlsbee', "unknown method 'houlsbee'; known: .*houlsby"),
    'unknown option': (
        '--config.method=pfeiffer[reduction=8]',
        "no option 'reduction'; known: .*reduction_factor",
    ),
    'unknown step': (
        "--config.data.preprocess=('lower','stopwords')",
        "unknown step 'stopwords' in data.preprocess; known: lower, nfc,",
    ),
    'unknown language': (
        '--config.data.preprocess=stop_words[language=xx]',
        r"no language 'xx'; known: ar \(arabic\), ",
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
    'large seed': ('--config.seed=4294967296', 'seed is 4294967296; expected less than 4294967296'),
    'negative seed': ('--config.seed=-1', 'seed is -1; expected 0 or more'),
    'empty batch': ('--config.training.batch_size=0', 'batch_size is 0; expected 1 or more'),
    'an item of another type': (
        '--config.data.preprocess=1',
        'data.preprocess has the item 1 .int.; each is expected to be str',
    ),
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
# The others of their kind, or the tests of what refuses them, say the same.
REPEATED = {
    *('unknown key below', 'unknown task', 'unknown method', 'unknown option', 'unknown step'),
    *('unknown metric in the list', 'unknown schedule', 'negative learning rate', 'empty batch'),
    *('too many devices', 'too short', 'missing folder', 'unknown backbone'),
    'a positive class that is none',
}


@pytest.mark.parametrize(
    'mistake',
    [pytest.param(m, marks=pytest.mark.slow if m in REPEATED else ()) for m in SPOILT],
)
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


def test_every_glue_task_is_named_when_one_is_misspelt(line):
    found = line.refused(file='glue:task=snli')
    assert all(name in found for name in glue.TASKS)


BEGIN = 'from adapters_jax.config import base\ndef get_config(argument=None):\n'


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('text,label\n', r'fails in line 1: NameError: name .text. is not defined'),
        ('def get_config(:\n', 'fails in line 1: SyntaxError: '),
        ('import no_such_module\n', "fails in line 1: ModuleNotFoundError: No module named 'no_s"),
        (BEGIN + '    return {}\n', r'returns a dict; expected what .adapters_jax\.config\.base'),
        (
            BEGIN + '    made = base()\n    made.trainin = 1\n    return made\n',
            'fails in line 4: AttributeError: .*"trainin" does not exist',
        ),
    ],
)
def test_a_file_that_is_no_config(tmp_path, text, expected):
    (tmp_path / 'own.py').write_text(text)
    with pytest.raises(ValueError, match=expected):
        entry.load_config(str(tmp_path / 'own.py'))


def test_a_config_is_given_once():
    with pytest.raises(ValueError, match='--config=F and --config=G are given; expected one'):
        entry.config_first(['train', '--config=F', '--config', 'G'])


def test_an_empty_option_is_none(line):
    found = command.refused('train', *line.arguments()[:1], '--workdir=', folder=line.folder)
    assert found.startswith('--workdir must be given')


@pytest.mark.parametrize('below', ['', 'x', 'x/y'])
def test_a_workdir_that_is_a_file_or_below_one(toys, line, below):
    found = line.refused(workdir=toys / 'texts.csv' / below)
    assert f'{toys / "texts.csv"} is a file: remove it' in found


def test_an_input_that_is_a_directory(toys, tmp_path):
    given = f'--adapter={toys / "run" / "adapter"}', f'--input={tmp_path}', '--output=out.jsonl'
    assert f'{tmp_path} is a directory; expected a JSONL' in command.refused(
        'predict', *given, folder=tmp_path
    )


def test_required_options_are_named(tmp_path):
    for module, option in {'train': 'config', 'evaluate': 'workdir', 'predict': 'adapter'}.items():
        assert f'--{option}' in command.refused(module, folder=tmp_path)


def test_a_real_process_says_it_the_same_way(line):
    run = command.python_of('train', *line.arguments('--config.foo=1'))
    done = subprocess.run(run, capture_output=True, text=True, cwd=command.ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown config key --config.foo: no 'foo' here; known: ")
    assert done.stderr.count('\n') == 1


def test_batches_that_do_not_divide_over_devices(line):
    changes = ('--config.mesh.data=8', '--config.data.batching=buckets')
    found = line.refused(*changes, '--config.training.batch_size=12', devices=8)
    expected = 'batch_size is 12, which does not divide over 8 devices x 1 accumulation steps'
    assert expected in found and 'multiple of 8' in found


def test_what_evaluate_refuses(toys, tmp_path):
    found = command.refused(
        'evaluate', f'--workdir={toys / "run"}', '--split=tets', folder=tmp_path
    )
    assert "no split 'tets' in this run; it has test, train, validation" in found
    found = command.refused('evaluate', f'--workdir={tmp_path}', folder=tmp_path)
    assert f'{tmp_path} is not the workdir of a run' in found and '--workdir' in found


@pytest.mark.parametrize(
    ('given', 'expected'),
    [
        (['--config=F', '--config.seed=3'], ['--config=F', '--config.seed=3']),
        (
            ['--config.seed=3', '--workdir=W', '--config=F'],
            ['--config=F', '--config.seed=3', '--workdir=W'],
        ),
        (['--config.seed', '3', '--config', 'F'], ['--config=F', '--config.seed', '3']),
        (['-config=F:a=b', '--config'], ['--config=F:a=b', '--config']),
        (['--adapter=A'], ['--adapter=A']),
    ],
)
def test_the_config_comes_first(given, expected):
    assert entry.config_first(['train', *given]) == ['train', *expected]


@pytest.mark.parametrize(
    'config',
    [pytest.param(['--config=F'], marks=pytest.mark.slow), ['--config', 'F']],
    ids=['equals', 'space'],
)
def test_a_real_process_reads_the_config_wherever_it_stands(tmp_path, config):
    """What is set before it arrives: the seed is the mistake, and the only one."""
    file = [argument.replace('F', 'configs/quickstart.py') for argument in config]
    given = ['--config.seed=-1', f'--workdir={tmp_path / "w"}', *file]
    run = command.python_of('train', *given)
    done = subprocess.run(run, capture_output=True, text=True, cwd=command.ROOT, check=False)
    assert (done.returncode, done.stderr.count('\n')) == (2, 1), done.stderr
    assert done.stderr.startswith('error: seed is -1; expected 0 or more')


def test_an_unknown_key_is_refused_however_the_config_is_given():
    given = ['train', '--config.bogus=1', '--config', 'configs/quickstart.py']
    with pytest.raises(ValueError, match=r'unknown config key --config\.bogus'):
        entry.check_overrides(entry.config_first(given))
