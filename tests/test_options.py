"""Options of training that must not change what is learnt, and those that must: whole runs."""

import numpy as np
import pytest
import toy

from adapters_jax.training import experiment, loop

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
            built = experiment.build(toy.config(backbone, data, training__steps=4, **options))
            trainer = loop.Trainer(built, folder / f'run_{len(known)}')
            known[key] = np.array([float(trainer.take_step()['loss']) for _ in range(4)])
        return known[key]

    return run


STILL = {'training__dropout': False}


@pytest.mark.parametrize(
    'options',
    [
        # Whole runs of the others are compared in test_end_to_end.
        pytest.param({'training__remat': 'full'}, marks=pytest.mark.slow),
        {'training__remat': 'dots'},
        pytest.param({'training__accumulate': 2}, marks=pytest.mark.slow),
    ],
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
    one, same, other = (
        losses_of(training__dropout=True, **options)
        for options in ({'seed': 3}, {'seed': 3, 'training__log_every': 2}, {'seed': 4})
    )
    assert np.array_equal(one, same) and not np.array_equal(one, other)


@pytest.mark.parametrize(
    'options',
    [
        pytest.param({'optimizer__schedule': 'cosine'}, marks=pytest.mark.slow),
        pytest.param({'optimizer__bias_correction': False}, marks=pytest.mark.slow),
        {'optimizer__clip_norm': 1e-3, 'optimizer__epsilon': 1.0},
        {'training__label_smoothing': 0.2},
        pytest.param({'head__pooling': 'cls'}, marks=pytest.mark.slow),
        {'head__layers': 2},
        {'training__dropout': True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_other_options_are_heard(losses_of, options):
    assert not np.array_equal(losses_of(**(STILL | options)), losses_of(**STILL))
