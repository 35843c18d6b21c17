"""Whole runs whose frozen matrices are in 8 bits: learnt, scored and predicted with alike."""

import json

import jax
import numpy as np
import pytest
import toy

from adapters_jax import params, quantize
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import experiment
from adapters_jax.training.loop import Trainer

pytestmark = pytest.mark.usefixtures('compiled_once')

METHOD = 'pfeiffer[reduction_factor=2,leave_out=[0]]'


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('int8')
    toy.write_backbone(folder / 'bert', layers=2)
    toy.write_texts(folder / 'texts.csv', 90)
    return folder


def config(place, stored='int8', **changes):
    given = {'method': METHOD, 'training__steps': 6, 'training__frozen_dtype': stored} | changes
    return toy.config(str(place / 'bert'), str(place / 'texts.csv'), **given)


def losses(workdir):
    return np.array([loss for _, loss in toy.losses(workdir)])


@pytest.fixture(scope='module')
def run(place):
    """A finished run in 8 bits, and what it told."""
    return place / 'run', train(config(place), place / 'run')


@pytest.fixture(scope='module')
def exact(place):
    """The losses of the same run in float32."""
    train(config(place, 'float32'), place / 'exact')
    return losses(place / 'exact')


@pytest.mark.slow
def test_it_learns_nearly_what_float32_does(run, exact):
    assert not np.array_equal(losses(run[0]), exact)
    np.testing.assert_allclose(losses(run[0]), exact, rtol=0.02)


def test_what_is_frozen_is_in_8_bits_and_what_is_trained_and_saved_in_32(place, run):
    trainer = Trainer(experiment.build(config(place)), place / 'unused')
    frozen = params.flatten(trainer.frozen)
    kernels = [leaf for path, leaf in frozen.items() if path.endswith('kernel')]
    assert kernels and all(map(quantize.is_quantized, kernels))
    assert {x.dtype for x in jax.tree.leaves(trainer.trainable)} == {np.dtype('float32')}
    saved = adapter_folder.load(run[0] / 'adapter')
    assert {x.dtype for x in jax.tree.leaves(saved.adapter_params)} == {np.dtype('float32')}
    assert saved.backbone['fingerprint'] == trainer.experiment.backbone.fingerprint


def test_parameters_are_counted_as_if_they_were_floats(place, run):
    built = experiment.build(config(place))
    assert run[1]['total_parameters'] == params.count(built.init_params())


def test_evaluate_computes_in_the_format_of_the_training(place, run):
    found = evaluate(run[0], 'validation')
    assert found['metrics'] == run[1]['metrics']['validation']


def test_predict_computes_in_the_format_that_it_is_told(place, run):
    evaluate(run[0], 'test')
    lines = toy.read_lines(run[0] / 'predictions_test.jsonl')
    rows = [{'text': line['text_a']} for line in lines]

    def logits(**options):
        return np.array([row['logits'] for row in predict(run[0] / 'adapter', rows, **options)])

    expected = np.array([line['logits'] for line in lines])
    eight = logits(frozen_dtype='int8')
    np.testing.assert_allclose(eight, expected, atol=1e-5)
    moved = np.abs(logits() - expected).max()
    assert 1e-4 < moved < 0.1 * np.abs(expected).max()
    # Two adapters over one backbone, which lies there once.
    named = [row | {'adapter': 'ab'[i % 2]} for i, row in enumerate(rows)]
    both = dict.fromkeys('ab', run[0] / 'adapter')
    found = [row['logits'] for row in predict(both, named, frozen_dtype='int8')]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match="frozen_dtype is 'int4'; expected one of float32, bfl"):
        logits(frozen_dtype='int4')


@pytest.mark.slow
def test_the_trunk_is_kept_for_its_format_alone(place, run, exact):
    kept = {'training__trunk_cache': 'float32', 'data__cache_dir': str(place / 'cache')}
    for stored in ('float32', 'int8'):
        train(config(place, stored, **kept), place / f'kept_{stored}')
    np.testing.assert_allclose(losses(place / 'kept_int8'), losses(run[0]), rtol=1e-5)
    np.testing.assert_allclose(losses(place / 'kept_float32'), exact, rtol=1e-5)
    headers = (place / 'cache' / 'trunk').glob('*/header.json')
    described = [json.loads(path.read_text())['of'] for path in headers]
    assert {of['computed'] for of in described} == {
        f'{stored} weights, float32 activations' for stored in ('float32', 'int8')
    }


@pytest.mark.slow
def test_a_member_of_a_population_is_the_run_done_alone(place, run):
    changes = {'method': 'vera[r=4]', 'data__seed': 0}
    swept = config(place, **changes)
    swept.sweep.grid = ('seed=0,1',)
    sweep(swept, place / 'swept')
    train(config(place, seed=1, **changes), place / 'alone')
    # Frozen leaves of the members' own (VeRA's random matrices) are no matrices of the backbone.
    found = losses(place / 'swept' / 'members' / 'seed-1')
    np.testing.assert_allclose(found, losses(place / 'alone'), rtol=1e-5)


@pytest.mark.slow
def test_on_a_mesh_the_losses_are_those_of_one_device(place, run):
    given = config(place)
    given.mesh.data, given.mesh.fsdp, given.mesh.tensor = 2, 2, 2
    train(given, place / 'mesh')
    np.testing.assert_allclose(losses(place / 'mesh'), losses(run[0]), rtol=1e-5)


def test_a_method_that_trains_every_matrix_is_refused(place):
    with pytest.raises(ValueError, match="frozen_dtype is 'int8', but the method trains every"):
        train(config(place, method='full'), place / 'refused')
    assert not list((place / 'refused').glob('*.json*'))


@pytest.mark.parametrize('key', ['frozen_dtype', 'dtype', 'remat'])
def test_formats_and_policies_that_are_none_are_refused(place, key):
    with pytest.raises(ValueError, match=rf"training\.{key} is 'int9'; expected one of \w+, "):
        train(config(place, **{f'training__{key}': 'int9'}), place / 'refused')
