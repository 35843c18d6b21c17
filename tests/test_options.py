"""Options of training that must not change what is learnt, and those that must: whole runs."""

import numpy as np
import pytest
import toy

from adapters_jax.train import train

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('options')
    backbone = toy.write_backbone(folder / 'bert')
    return folder, backbone, toy.write_texts(folder / 'texts.csv', 60)


@pytest.fixture(scope='module')
def losses_of(place):
    """Return a function from options to the losses of four steps, each set of options run once."""
    folder, backbone, data = place
    known = {}

    def run(**options):
        key = tuple(sorted(options.items()))
        if key not in known:
            config = toy.config(backbone, data, training__steps=4, **options)
            workdir = folder / f'run_{len(known)}'
            train(config, workdir)
            known[key] = np.array([loss for _, loss in toy.losses(workdir)])
        return known[key]

    return run


STILL = {'training__dropout': False}


@pytest.mark.parametrize(
    'options',
    [{'training__remat': 'full'}, {'training__remat': 'dots'}, {'training__accumulate': 2}],
    ids=['remat', 'dots', 'accumulation'],
)
def test_memory_savers_change_no_loss(losses_of, options):
    # Batches of buckets, so that two accumulation steps have the very rows that one has.
    same = STILL | {'data__batching': 'buckets'}
    np.testing.assert_allclose(losses_of(**same, **options), losses_of(**same), rtol=2e-6)


@pytest.mark.parametrize('key', ['training__dtype', 'training__frozen_dtype'])
def test_bfloat16_stays_close(losses_of, key):
    exact, rounded = losses_of(**STILL), losses_of(**STILL, **{key: 'bfloat16'})
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, rtol=0.03)


def test_the_seed_decides_everything(losses_of):
    assert np.array_equal(losses_of(seed=3), losses_of(seed=3, training__log_every=2))
    assert not np.array_equal(losses_of(seed=3), losses_of(seed=4))


@pytest.mark.parametrize(
    'options',
    [
        {'optimizer__schedule': 'cosine'},
        {'optimizer__bias_correction': False},
        {'optimizer__clip_norm': 1e-3, 'optimizer__epsilon': 1.0},
        {'training__label_smoothing': 0.2},
        {'head__pooling': 'cls'},
        {'head__layers': 2},
        {'training__dropout': True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_heard(losses_of, options):
    assert not np.array_equal(losses_of(**(STILL | options)), losses_of(**STILL))
