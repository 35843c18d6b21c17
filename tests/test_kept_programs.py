"""What a command compiles, the next one finds; a damaged or an unwritable cache stops nobody."""

import functools
import os
import subprocess
import sys

import command
import pytest
import toy


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    """A folder with a backbone and data."""
    folder = tmp_path_factory.mktemp('kept')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 60)
    return folder


def use(cache):
    """Set the folder of the project's cache for this process."""
    os.environ['ADAPTERS_JAX_CACHE'] = cache


def trained(toys, workdir, cache, *more):
    """Train for two steps; return what the command left."""
    arguments = [
        '--config=configs/text_classification.py:method=head',
        f'--config.backbone={toys / "bert"}',
        f'--config.data.train={toys / "texts.csv"}',
        '--config.data.cache_dir=none',
        '--config.training.steps=2',
        '--config.mesh.data=1',
        f'--workdir={workdir}',
        *more,
    ]
    chosen = functools.partial(use, str(cache))
    done = command.run('train', *arguments, folder=workdir.parent / 'out', prepare=chosen)
    assert done.status == 0, done.err
    return done


def programs(cache):
    return {path.name for path in cache.glob('programs/*/*') if not path.name.endswith('-atime')}


def test_a_second_run_compiles_nothing(toys, tmp_path):
    trained(toys, tmp_path / 'first', tmp_path / 'cache')
    kept = programs(tmp_path / 'cache')
    # Small programs too, of which there are many before the first step.
    assert any(name.startswith('jit_step') for name in kept) and len(kept) > 10
    trained(toys, tmp_path / 'second', tmp_path / 'cache')
    assert programs(tmp_path / 'cache') == kept
    metrics = [(tmp_path / run / 'metrics.jsonl').read_text() for run in ('first', 'second')]
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_jax_may_be_told_otherwise(toys, tmp_path):
    trained(toys, tmp_path / 'w', tmp_path / 'no', '--jax_enable_compilation_cache=false')
    assert not programs(tmp_path / 'no')
    elsewhere = tmp_path / 'elsewhere'
    told = (
        f'--jax_compilation_cache_dir={elsewhere}',
        '--jax_persistent_cache_min_compile_time_secs=0',
    )
    trained(toys, tmp_path / 'v', tmp_path / 'no', *told)
    assert not programs(tmp_path / 'no') and any(elsewhere.iterdir())


@pytest.mark.slow
def test_damaged_programs_are_compiled_again(toys, tmp_path):
    trained(toys, tmp_path / 'first', tmp_path / 'cache')
    for path in (tmp_path / 'cache').glob('programs/*/*-cache'):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    told = trained(toys, tmp_path / 'second', tmp_path / 'cache').err
    assert 'the program jit_step, kept in ' in told and 'UserWarning' not in told
    # And kept again, whole.
    assert 'damaged' not in trained(toys, tmp_path / 'third', tmp_path / 'cache').err
    metrics = [(tmp_path / run / 'metrics.jsonl').read_text() for run in ('first', 'second')]
    assert metrics[0] == metrics[1]


def test_what_takes_long_to_import_is_not_imported_to_say_so(tmp_path):
    """The libraries of metrics, tokenizers and logs wait until somebody needs them."""
    late = ('sklearn', 'transformers', 'tensorboardX', 'scipy.stats', 'torch', 'optuna', 'qwix')
    found = f'print([name for name in {late} if name in sys.modules])'
    code = f'import sys, adapters_jax.train; {found}; import adapters_jax.sweep; {found}'
    line = [sys.executable, '-c', code]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    train, sweep = done.stdout.splitlines()
    assert train == '[]' and sweep in ('[]', "['optuna']")


@pytest.mark.slow
def test_torch_is_imported_by_no_command(toys, tmp_path):
    """Tokenizers and event files come from libraries that import it where they find it."""
    line = [
        '--config=configs/text_classification.py',
        f'--config.data.train={toys / "texts.csv"}',
        *(f'--config.backbone={toys / "bert"}', f'--workdir={tmp_path / "run"}'),
        *('--config.training.steps=1', '--config.method=pfeiffer[size=2]'),
    ]
    code = (
        'import atexit, runpy, sys; '
        "atexit.register(lambda: print('torch' in sys.modules, 'transformers' in sys.modules)); "
        f"sys.argv[1:] = {line!r}; runpy.run_module('adapters_jax.train', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == 'False True'
