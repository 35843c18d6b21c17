"""Checkpoints: what is kept, what is refused, and every bit restored."""

import contextlib
import logging
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
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
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adapters_jax.training.checkpoint import Checkpoints


def test_restores_every_bit_and_the_position_in_the_data(tmp_path):
    iterator = numbers()
    for _ in range(3):
        next(iterator)
    state, progress = make_state(), {'best': 0.5, 'since_best': 2, 'nothing': None}
    with Checkpoints(tmp_path / 'c', IDENTITY) as checkpoints:
        checkpoints.save(3, state, iterator, progress)
        expected = [next(iterator) for _ in range(40)]
        fresh = numbers()
        restored = checkpoints.restore(abstract(state), fresh)
    assert (restored.step, restored.progress) == (3, progress)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert bits(restored.state) == bits(state)
    np.testing.assert_array_equal([next(fresh) for _ in range(40)], expected)


@pytest.mark.parametrize('name', ['lora[r=8]', 'r?[n** {b}, %20#c'])
def test_a_directory_may_have_any_name(tmp_path, name):
    save_steps(tmp_path / name, range(1, 4))
    assert bits(restore(tmp_path / name).state) == bits(make_state(3))
    assert steps_in(tmp_path / name) == [2, 3] and len(list(tmp_path.iterdir())) == 1


def test_a_directory_whose_checkpoints_would_lie_elsewhere_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r'a\\b has a backslash in its path'):
        Checkpoints(tmp_path / 'a\\b', IDENTITY)


@pytest.mark.parametrize(('value', 'fits'), [(True, True), (False, False)])
def test_a_key_that_a_checkpoint_of_before_lacks_has_its_default(tmp_path, value, fits):
    save_steps(tmp_path, [1])
    given = IDENTITY['config'] | {'task.token_types': value}
    expected = contextlib.nullcontext() if fits else pytest.raises(ValueError, match='True there')
    with expected:
        assert restore(tmp_path, IDENTITY | {'config': given}).step == 1


@pytest.mark.parametrize(('value', 'fits'), [(True, True), (False, False)])
def test_so_have_members_of_a_population_and_tasks_of_a_run(tmp_path, value, fits):
    def identity(**late):
        tasks = {f'tasks.a.{key}': v for key, v in late.items()}
        config = IDENTITY['config'] | {'tasks.a.task.name': 'question_answering'} | tasks
        return IDENTITY | {'config': config, 'members': {'seed=0': {'seed': 0} | late}}

    with Checkpoints(tmp_path, identity()) as checkpoints:
        checkpoints.save(1, make_state(1), numbers(), {})
    expected = contextlib.nullcontext() if fits else pytest.raises(ValueError, match='True there')
    with expected:
        assert restore(tmp_path, identity(**{'task.token_types': value})).step == 1


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / 'never made') is None
    assert not (tmp_path / 'never made').exists()


def test_restores_onto_the_shardings_asked_for(tmp_path):
    mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec('data'))
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = {'x': jax.device_put(jnp.arange(64.0).reshape(16, 4), rows), 'n': jnp.int32(3)}
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, state, None, {})
        for sharding in (rows, everywhere):
            shapes = {
                'x': jax.ShapeDtypeStruct((16, 4), jnp.float32, sharding=sharding),
                'n': jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere),
            }
            restored = checkpoints.restore(shapes, None).state
            assert restored['x'].sharding == sharding
            assert restored['n'].sharding == everywhere
            np.testing.assert_array_equal(restored['x'], state['x'])


def test_state_may_be_donated_as_soon_as_save_returns(tmp_path):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    state = {f'w{i}': jnp.full((500_000,), float(i)) for i in range(4)}
    shapes = abstract(state)
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, state, None, {})
        for _ in range(5):
            state = step(state)
        jax.block_until_ready(state)
        restored = checkpoints.restore(shapes, None).state
    for i in range(4):
        np.testing.assert_array_equal(restored[f'w{i}'], np.full(500_000, i))


def test_progress_is_copied_when_saved(tmp_path):
    progress = {'seen': [1]}
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), None, progress)
        progress['seen'].append(2)
    assert restore_only(tmp_path).progress == {'seen': [1]}


def test_accepts_any_iterator_with_a_state(tmp_path):
    class Counter:
        state = 7

        def get_state(self):
            return {'at': self.state}

        def set_state(self, state):
            self.state = state['at']

    counter = Counter()
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), counter, {})
        counter.state = 99
        checkpoints.restore(abstract(make_state()), counter)
    assert counter.state == 7


def test_accepts_grains_data_loader(tmp_path):
    sampler = grain.samplers.IndexSampler(20, shuffle=True, seed=1, num_epochs=2)
    loader = grain.DataLoader(data_source=range(20), sampler=sampler)
    iterator, other = iter(loader), iter(loader)
    taken = [next(iterator) for _ in range(5)]
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(5, make_state(), iterator, {})
        checkpoints.restore(abstract(make_state()), other)
    rest = list(other)
    assert rest == list(iterator)
    assert len(taken) + len(rest) == 40


def test_keeps_the_latest_two_and_the_best(tmp_path):
    save_steps(tmp_path, [1, 2, 3, 4, 5, 6], {1: 0.5, 2: 0.9, 3: 0.9, 4: float('nan')})
    assert steps_in(tmp_path) == [2, 5, 6]
    # A later process remembers which was the best.
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(7, make_state(7), None, {}, 0.8)
        checkpoints.save(8, make_state(8), None, {}, None)
        best = checkpoints.restore_best(abstract(make_state()))
        assert (best.step, bits(best.state)) == (2, bits(make_state(2)))
        checkpoints.save(9, make_state(9), None, {}, 0.95)
        checkpoints.save(10, make_state(10), None, {}, 0.1)
        checkpoints.save(11, make_state(11), None, {})
        checkpoints.wait()
        assert steps_in(tmp_path) == [9, 10, 11]


def test_what_is_known_of_a_checkpoint_goes_with_it(tmp_path):
    """A manifest holds all scores of a population's members: of a thousand it would be much."""
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        for step in range(1, 9):
            checkpoints.save(step, make_state(step), None, {}, float(step == 3))
        assert sorted(checkpoints._manifests) == [3, 6, 7, 8]


def test_no_best_without_metrics(tmp_path):
    save_steps(tmp_path, [1, 2])
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        assert checkpoints.restore_best(abstract(make_state())) is None


def test_a_step_is_saved_once(tmp_path):
    save_steps(tmp_path, [4])
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(4, make_state(9), None, {'at': 'again'})
    assert restore_only(tmp_path).progress == {'at': 4}


def test_refuses_another_backbone_or_config(tmp_path):
    save_steps(tmp_path, [1])
    with pytest.raises(
        ValueError, match=r"fingerprint is 'f00d' there and 'beef' here.*another wo"
    ):
        restore(tmp_path, IDENTITY | {'backbone_fingerprint': 'beef'})
    other = {'task': 'mrpc', 'optimizer': {'b1': 0.8}, 'seed': 1}
    with pytest.raises(ValueError, match=r'config\.optimizer\.b1 is 0\.9 there and 0\.8 here') as e:
        restore(tmp_path, IDENTITY | {'config': other})
    assert 'config.seed is 0 there and 1 here' in str(e.value)
    assert 'task' not in str(e.value)
    assert restore(tmp_path).step == 1


def test_identity_survives_the_trip_through_json(tmp_path):
    identity = {'config': {'layers': (0, 1), 'path': Path('x'), 'rate': np.float32(0.5)}}
    with Checkpoints(tmp_path, identity) as checkpoints:
        checkpoints.save(1, make_state(), None, {})
    with Checkpoints(tmp_path, identity) as checkpoints:
        assert checkpoints.restore(abstract(make_state()), None).step == 1


def test_refuses_the_state_of_another_model(tmp_path):
    save_steps(tmp_path, [1])
    message = (
        r"0/adapters/a/kernel is \['float32', \[40, 8\]\] there and \['float32', \[41, 8\]\] here"
    )
    with pytest.raises(ValueError, match=message):
        restore(tmp_path, state=make_state(size=41))


def test_says_that_a_checkpoint_has_no_position_in_the_data(tmp_path):
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), None, {})
    with pytest.raises(ValueError, match=r'1 holds no position in the data; .* another workdir'):
        restore(tmp_path)


def test_orbax_keeps_its_tracebacks_to_itself(tmp_path, caplog):
    told = logging.getLogger('absl')

    def tell(what, error=None):
        record = told.makeRecord('absl', logging.ERROR, '/orbax/it.py', 1, what, (), error)
        told.handle(record)

    error = KeyError, KeyError('x'), None
    with Checkpoints(tmp_path, IDENTITY) as checkpoints:
        checkpoints.save(1, make_state(), None, {})
        assert told.filters
        tell('with a traceback', error)
        tell('in a sentence')
    assert not told.filters
    tell('of nobody else', error)
    found = [record.message for record in caplog.records if record.pathname == '/orbax/it.py']
    assert found == ['in a sentence', 'of nobody else']
