"""`config.start`: training begins with a finished adapter."""

import dataclasses
import logging
import shutil

import jax
import numpy as np
import pytest
import toy
import untrained

from adapters_jax.config import add_task, assign
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.params import flatten
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import experiment

pytestmark = pytest.mark.usefixtures('compiled_once')

ROWS = [{'text': text} for text in ('the cat', 'bread and soup and rice', 'snow')]
METHODS = ('pfeiffer[size=4]', 'bitfit', 'lora[r=2]|houlsby[size=3]')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """A backbone, texts, and an adapter of each method that nobody trained."""
    folder = tmp_path_factory.mktemp('start')
    backbone = toy.write_backbone(folder / 'bert')
    texts = toy.write_texts(folder / 'texts.csv', 60)
    for method in METHODS:
        untrained.run(toy.config(backbone, texts, method=method), folder / method)
    return folder, backbone, texts


def config(runs, method, begin=None, **options):
    folder, backbone, texts = runs
    made = toy.config(backbone, texts, method=method, training__steps=1, **options)
    made.start = str(folder / (begin or method) / 'adapter')
    return made


@pytest.mark.parametrize(
    'method', [*(pytest.param(m, marks=pytest.mark.slow) for m in METHODS[:2]), METHODS[2]]
)
def test_without_a_change_the_run_is_the_adapter_that_it_began_with(runs, tmp_path, method):
    still = config(runs, method, optimizer__learning_rate=1e-30)
    train(still, tmp_path / 'run')
    first, then = (adapter_folder.load(p) for p in (still.start, tmp_path / 'run' / 'adapter'))
    for name in ('adapter_params', 'backbone_params', 'head_params'):
        given, found = (flatten(getattr(folder, name)) for folder in (first, then))
        assert given.keys() == found.keys()
        for path in given:
            np.testing.assert_allclose(given[path], found[path], rtol=0, atol=1e-20)
    for own, other in zip(
        predict(still.start, ROWS), predict(tmp_path / 'run' / 'adapter', ROWS), strict=True
    ):
        np.testing.assert_allclose(own['logits'], other['logits'], atol=1e-6)


def test_what_is_trained_of_the_backbone_begins_as_it_ended(runs):
    own = config(runs, 'bitfit')
    given = flatten({'backbone': adapter_folder.load(own.start).backbone_params})
    found = flatten(experiment.build(own).init_params())
    assert given
    for path, leaf in given.items():
        np.testing.assert_array_equal(found[path], leaf)


def test_another_task_has_a_fresh_head(runs, caplog):
    same, other = config(runs, METHODS[0]), config(runs, METHODS[0])
    other.head.layers = 2
    with caplog.at_level(logging.INFO):
        heads = [experiment.build(own).init_params()['heads']['default'] for own in (same, other)]
    given = adapter_folder.load(same.start)
    for path, leaf in flatten(given.head_params).items():
        np.testing.assert_array_equal(flatten(heads[0])[path], leaf)
    assert flatten(heads[1]).keys() > flatten(heads[0]).keys()
    lines = [r.getMessage() for r in caplog.records if 'training begins' in r.getMessage()]
    assert [line.endswith('under a fresh head') for line in lines] == [False, True]


@pytest.mark.parametrize(
    ('key', 'value', 'fresh'),
    [('task.metrics', "('accuracy',)", False), ('task.labels', '', True)],
)
def test_a_head_is_kept_where_its_outputs_mean_the_same(runs, caplog, key, value, fresh):
    own = config(runs, METHODS[0])
    labels = experiment.build(own).task.labels
    assign(own, key, value or repr(labels[::-1]))
    with caplog.at_level(logging.INFO):
        found = flatten(experiment.build(own).init_params()['heads']['default'])
    assert ('under a fresh head' in caplog.messages[-1]) is fresh
    given = flatten(adapter_folder.load(own.start).head_params)
    assert any(np.array_equal(found[path], leaf) for path, leaf in given.items()) is not fresh


def test_each_member_of_a_population_begins_with_it(runs, tmp_path):
    grid = config(runs, METHODS[0], optimizer__learning_rate=1e-30)
    assign(grid, 'sweep.grid', "('method.init_weights=bert,zero','seed=0,1')")
    sweep(grid, tmp_path)
    given = flatten(adapter_folder.load(grid.start).adapter_params)
    members = sorted((tmp_path / 'members').iterdir())
    assert len(members) == 4
    for member in members:
        found = flatten(adapter_folder.load(member / 'adapter').adapter_params)
        for path, leaf in given.items():
            np.testing.assert_allclose(found[path], leaf, rtol=0, atol=1e-20)


@pytest.mark.parametrize('ranks', ['alpha=8,16', 'alpha=16,8'])
def test_no_member_of_a_population_begins_with_an_adapter_of_another_method(runs, tmp_path, ranks):
    _, backbone, texts = runs
    plain = toy.config(backbone, texts, method='lora[r=2,alpha=8]', training__steps=1)
    untrained.run(plain, tmp_path / 'first')
    grid = toy.config(backbone, texts, method='lora[r=2,alpha=8]', training__steps=1)
    grid.start = str(tmp_path / 'first' / 'adapter')
    assign(grid, 'sweep.grid', f"('method.{ranks}',)")
    with pytest.raises(ValueError, match=r'alpha=8, but config\.method has 16'):
        sweep(grid, tmp_path / 'grid')
    assert not list((tmp_path / 'grid').glob('members/*/adapter'))


def test_an_adapter_that_was_trained_anew_is_read_anew(runs, tmp_path):
    folder, backbone, texts = runs
    shutil.copytree(folder / METHODS[0] / 'adapter', tmp_path / 'first')
    own = config(runs, METHODS[0])
    own.start = str(tmp_path / 'first')
    before = flatten(experiment.build(own).start.adapter_params)
    untrained.run(toy.config(backbone, texts, method=METHODS[0]), tmp_path / 'again', seed=5)
    shutil.rmtree(tmp_path / 'first')
    shutil.copytree(tmp_path / 'again' / 'adapter', tmp_path / 'first')
    after = flatten(experiment.build(own).start.adapter_params)
    assert any(np.abs(after[path] - leaf).max() > 1e-4 for path, leaf in before.items())


def test_a_run_goes_on_from_no_other_beginning_and_once_trained_needs_none(runs, tmp_path):
    shutil.copytree(runs[0] / METHODS[0] / 'adapter', tmp_path / 'first')
    own = config(runs, METHODS[0])
    own.start = str(tmp_path / 'first')
    train(own, tmp_path / 'run')
    (tmp_path / 'run' / 'summary.json').unlink()
    given = adapter_folder.load(tmp_path / 'first')
    moved = jax.tree.map(lambda leaf: leaf + 1, given.adapter_params)
    adapter_folder.save(dataclasses.replace(given, adapter_params=moved), tmp_path / 'first')
    with pytest.raises(ValueError, match='belongs to another run: adapters_fingerprint is'):
        train(own, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'first')
    assert evaluate(tmp_path / 'run')['examples'] > 0


@pytest.mark.parametrize(
    ('method', 'begin', 'said'),
    [
        ('pfeiffer[size=5]', METHODS[0], 'size=4, but config.method has 5'),
        ('lora', METHODS[0], "architecture='bottleneck', but config.method has 'lora'"),
        ('lora[r=2]|houlsby[size=4]', METHODS[2], 'config.start is an adapter with members='),
    ],
)
def test_an_adapter_of_another_method_is_refused(runs, tmp_path, method, begin, said):
    with pytest.raises(ValueError, match=said):
        train(config(runs, method, begin), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_an_adapter_that_is_not_there_is_refused(runs, tmp_path):
    missing = config(runs, METHODS[0])
    missing.start = str(tmp_path / 'none')
    with pytest.raises(FileNotFoundError, match='none'):
        train(missing, tmp_path / 'run')


def test_options_of_training_may_differ_and_no_others(runs, tmp_path):
    other = config(runs, 'pfeiffer[size=4,dropout=0.2,init_weights=zero]', METHODS[0])
    experiment.build(other)
    seeded = config(runs, 'pfeiffer[size=4,init_weights_seed=3]', METHODS[0])
    with pytest.raises(ValueError, match=r'init_weights_seed=None, but config\.method has 3'):
        experiment.build(seeded)


def test_one_adapter_cannot_begin_several_tasks(runs, tmp_path):
    several = config(runs, METHODS[0])
    add_task(several, 'topics')
    with pytest.raises(ValueError, match=r'config\.start is .* a run of several tasks'):
        train(several, tmp_path / 'run')
