"""Training over finished adapters: stacks, fusions, and layers dropped at random."""

import json
import shutil

import command
import numpy as np
import pytest
import toy
import untrained

from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.params import flatten
from adapters_jax.predict import predict
from adapters_jax.train import train
from adapters_jax.training import experiment

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    """A backbone, texts, and two adapters 'a' and 'b' on it that nobody trained."""
    folder = tmp_path_factory.mktemp('composed')
    backbone = toy.write_backbone(folder / 'bert')
    texts = toy.write_texts(folder / 'texts.csv', 60)
    for seed, name in enumerate('ab'):
        untrained.run(toy.config(backbone, texts, method='pfeiffer[size=4]'), folder / name, seed)
    return folder, backbone, texts


def config(sources, method, adapters, **options):
    folder, backbone, texts = sources
    made = toy.config(backbone, texts, **{'training__epochs': 2.0} | options)
    made.method = method
    made.adapters = adapters.format(a=folder / 'a' / 'adapter', b=folder / 'b' / 'adapter')
    return made


@pytest.mark.parametrize(
    ('method', 'adapters', 'trained'),
    [
        pytest.param('fuse(a, b)', 'a={a},b={b}', {'fusion'}, marks=pytest.mark.slow),
        pytest.param(
            *('stack(a, task)', 'a={a},task=pfeiffer[size=3]', {'task'}), marks=pytest.mark.slow
        ),
        ('stack(a, fuse(b, new))', 'a={a},b={b},new=pfeiffer[size=3]', {'fusion', 'new'}),
    ],
)
def test_a_run_over_finished_adapters(sources, tmp_path, method, adapters, trained):
    run = config(sources, method, adapters)
    summary = train(run, tmp_path / 'run')
    assert 0 < summary['trainable_parameters'] < summary['total_parameters']
    saved = adapter_folder.load(tmp_path / 'run' / 'adapter')
    leaves = flatten(saved.adapter_params)
    for name in 'ab':
        if f'{name}={{' not in adapters:
            continue
        alone = adapter_folder.load(sources[0] / name / 'adapter')
        for path, leaf in flatten(alone.adapter_params).items():
            np.testing.assert_array_equal(leaves[f'{name}/{path}'], leaf)
    assert trained <= {path.split('/')[0] for path in leaves}
    evaluate(tmp_path / 'run', 'test')
    expected = toy.read_lines(tmp_path / 'run' / 'predictions_test.jsonl')
    found = predict(tmp_path / 'run' / 'adapter', [{'text': r['text_a']} for r in expected])
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours['logits'], theirs['logits'], atol=1e-5)


def test_a_run_goes_on_over_no_other_members_and_once_finished_needs_none(
    sources, tmp_path, caplog
):
    """Nor does it need its devices."""
    for name in 'ab':
        shutil.copytree(sources[0] / name / 'adapter', tmp_path / name)
    run = config(sources, 'fuse(a, b)', f'a={tmp_path / "a"},b={tmp_path / "b"}')
    train(run, tmp_path / 'run')
    first = evaluate(tmp_path / 'run', 'test')
    (tmp_path / 'run' / 'summary.json').unlink()
    shutil.rmtree(tmp_path / 'b')
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    with pytest.raises(ValueError, match='belongs to another run: adapters_fingerprint is'):
        train(run, tmp_path / 'run')
    for name in 'ab':
        shutil.rmtree(tmp_path / name)
    path = tmp_path / 'run' / 'config.json'
    values = json.loads(path.read_text())
    values['mesh'] |= {'data': 16}
    path.write_text(json.dumps(values))
    again = evaluate(tmp_path / 'run', 'test')
    assert 'mesh.data is 16' in caplog.text and 'all devices there are' in caplog.text
    assert again['metrics'] == first['metrics']


@pytest.mark.parametrize(
    ('method', 'adapters', 'said'),
    [
        ('fuse(a, b)', 'a={a}', "'b' is in one of them only"),
        ('stack(a)', 'a={a},b={b}', "'b' is in one of them only"),
        ('fuse(a, c)', 'a={a},c=lora', 'c .lora. stands inside of fuse'),
        ('fuse(a, average(b))', 'a={a},b={b}', 'may not hold average'),
        ('stack(a)', 'a', "adapters has the item 'a'"),
    ],
)
def test_mistakes_in_expressions(sources, tmp_path, method, adapters, said):
    with pytest.raises(ValueError, match=said):
        train(config(sources, method, adapters), tmp_path / 'run')


def test_robust_training_drops_layers_anew_in_each_step(sources, tmp_path):
    backbone = toy.write_backbone(tmp_path / 'bert', layers=2)
    made = toy.config(backbone, sources[2], training__epochs=3.0)
    made.method, made.training.adapter_drop = 'pfeiffer[size=4]', 'robust'
    summary = train(made, tmp_path / 'run')
    assert summary['compilations'] == 2  # none and one of two layers
    made.training.adapter_drop = 'some'
    with pytest.raises(ValueError, match="adapter_drop is 'some'; expected one of none, robust"):
        train(made, tmp_path / 'other')


def test_a_composition_goes_on_over_its_own_members_in_any_order_and_over_no_others(
    sources, tmp_path
):
    folder, *_ = sources
    given = f'a={folder}/a/adapter,b={folder}/b/adapter'
    first = config(sources, 'fuse(a, b)', given)
    untrained.run(first, tmp_path / 'first')
    on = config(sources, 'fuse(a, b)', ','.join(given.split(',')[::-1]))
    on.start = str(tmp_path / 'first' / 'adapter')
    path = 'fusion/a,b/layer_0/feed_forward/query/kernel'
    held = flatten(adapter_folder.load(tmp_path / 'first' / 'adapter').adapter_params)
    found = flatten(experiment.build(on).init_params()['adapters']['default'])
    np.testing.assert_array_equal(found[path], held[path])
    other = config(sources, 'fuse(a, b)', f'a={folder}/a/adapter,b={folder}/a/adapter')
    other.start = on.start
    with pytest.raises(ValueError, match="was trained over another adapter 'b' than"):
        train(other, tmp_path / 'other')


def arguments(sources, workdir, method):
    folder, backbone, texts = sources
    return [
        '--config=configs/text_classification.py',
        f'--config.backbone={backbone}',
        f'--config.data.train={texts}',
        f'--config.adapters=a={folder}/a/adapter,b={folder}/b/adapter',
        f'--config.method={method}',
        '--config.training.epochs=1.0',
        '--config.data.cache_dir=none',
        f'--workdir={workdir}',
    ]


def test_an_expression_on_the_command_line_is_read(sources, tmp_path):
    given = arguments(sources, tmp_path / 'run', 'fuse(a, average(b))')
    assert 'may not hold average' in command.refused('train', *given, folder=tmp_path)


@pytest.mark.slow
def test_a_config_on_the_command_line(sources, tmp_path):
    given = arguments(sources, tmp_path / 'run', 'fuse(a, b)')
    done = command.run('train', *given, folder=tmp_path)
    assert done.status == 0, done.err
    method = json.loads((tmp_path / 'run' / 'adapter' / 'adapter_config.json').read_text())[
        'method'
    ]
    assert method['expression'] == 'fuse(a, b)'
