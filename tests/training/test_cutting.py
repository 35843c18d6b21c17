"""In how many parts a batch is computed: a CPU alone chooses it, and by the batches alone."""

import re
import types

import jax
import numpy as np
import pytest
import tiny
import toy

from adapters_jax import params as trees
from adapters_jax import sharding
from adapters_jax.adapters import registry
from adapters_jax.adapters.composed import Composed
from adapters_jax.config import Config
from adapters_jax.data.policies import Buckets, Packed
from adapters_jax.models.heads import HeadConfig
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import batching, cutting
from adapters_jax.training import step as steps
from adapters_jax.training.flops import product_flops

PLAIN = types.SimpleNamespace()  # a task that says nothing of its inputs


@pytest.mark.parametrize(
    ('rows', 'tokens', 'parts'),
    [
        (32, 128, 4),
        (8, 128, 1),
        (15, 128, 1),  # 1.9 parts
        (18, 128, 2),
        (27, 128, 3),
        (17, 128, 1),  # a prime
        (25, 128, 1),  # 3.1 parts, of which only 5 would be equal
        (32, 2000, 32),
    ],
)
def test_how_many_parts_are_quick(monkeypatch, rows, tokens, parts):
    assert cutting.quick_parts(rows, tokens) == parts
    monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
    assert cutting.quick_parts(rows, tokens) == 1


def model_of(reads, positions=32, decoder=None):
    config = types.SimpleNamespace(reads=reads, positions=positions, decoder=decoder)
    return types.SimpleNamespace(config=config)


@pytest.mark.parametrize(
    ('model', 'task', 'policy', 'parts'),
    [
        (model_of('input_ids'), PLAIN, Packed(128, 32, 4), 4),
        (model_of('input_ids'), PLAIN, Buckets((64, 128), 32), 2),  # of the shortest
        (model_of('input_ids', decoder=1), PLAIN, Packed(64, 32, 4), 4),
        (model_of('pixels', positions=197), PLAIN, Buckets((1,), 32), 4),
        # A second of sound, which is all that is read of thirty.
        (
            model_of('sound', positions=1500, decoder=1),
            types.SimpleNamespace(frames=100),
            Buckets((16,), 32),
            2,
        ),
    ],
    ids=['packed', 'buckets', 'written', 'pixels', 'sound'],
)
def test_the_tokens_of_a_row_are_what_is_read_and_written(model, task, policy, parts):
    config = Config({'training': {'accumulate': 0}})
    assert batching.choose_parts(config, model, task, policy) == parts
    config.training.accumulate = 3
    assert batching.choose_parts(config, model, task, policy) == 3


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    made = toy.write_backbone(folder / 'bert'), str(folder / 'train.csv')
    toy.write_pairs(folder / 'train.csv', 96)
    return made


def trained(data, workdir, **changes):
    """Take steps with dropout; return the losses, and in how many parts they say they are."""
    small = {'training__steps': 3, 'training__batch_size': 24, 'data__max_length': 16}
    config = toy.config(*data, training__dropout=True, **small, **changes)
    train(config, workdir)
    told = re.findall(r'batches in (\d+) parts', (workdir / 'log.txt').read_text())
    return [loss for _, loss in toy.losses(workdir)], [int(number) for number in told]


def test_no_number_of_devices_changes_the_parts_or_what_dropout_draws(data, tmp_path, monkeypatch):
    whole, told = trained(data, tmp_path / 'whole')
    assert not told
    monkeypatch.setattr(cutting, 'PART', 64)
    one, told = trained(data, tmp_path / 'one')
    (parts,) = told
    assert parts > 1 and not np.allclose(one, whole, rtol=1e-4)
    for devices in (3, 8):
        several, told = trained(data, tmp_path / f'{devices}', mesh__data=devices)
        assert told == [parts]
        np.testing.assert_allclose(several, one, rtol=1e-5)
    asked, told = trained(data, tmp_path / 'asked', training__accumulate=1)
    np.testing.assert_array_equal(asked, whole)
    assert not told


def test_a_population_is_cut_as_its_members_are_alone(data, tmp_path, monkeypatch):
    monkeypatch.setattr(cutting, 'PART', 64)
    alone, _ = trained(data, tmp_path / 'alone')
    small = {'training__steps': 3, 'training__batch_size': 24, 'data__max_length': 16}
    config = toy.config(*data, training__dropout=True, mesh__data=2, **small)
    config.sweep.grid = ('optimizer.learning_rate=1e-3,2e-3',)
    sweep(config, tmp_path / 'sweep')
    members = sorted((tmp_path / 'sweep/members').iterdir())
    first = [toy.losses(member)[0][1] for member in members]
    # Before any rate has acted.
    np.testing.assert_allclose(first, [alone[0]] * 2, rtol=1e-5)


ROWS = tiny.batch([[3, 4], [8], [2, 2], [5]] * 4, 8)


def passed(model, batch, devices=1):
    """Return the outputs of a forward pass over the devices, and its loops over parts."""
    mesh = sharding.make_mesh(devices)
    params = trees.partition(tiny.params(model), model.rules)
    given = *(sharding.put(tree, sharding.replicated(mesh)) for tree in params), batch
    given = *given[:2], sharding.put_batch(batch, mesh)
    traced = steps.jit_outputs(model).trace(*given)
    loops = [eqn.params['length'] for eqn in traced.jaxpr.eqns if eqn.primitive.name == 'scan']
    return traced.lower().compile()(*given), loops, product_flops(traced.jaxpr)


@pytest.mark.parametrize('devices', [1, 2, 8])
@pytest.mark.parametrize('pooling', ['mean', 'cls'])
def test_a_forward_pass_in_parts_has_the_outputs_of_the_whole(monkeypatch, devices, pooling):
    model = tiny.model(registry.create('lora[r=2]'), HeadConfig(pooling=pooling))
    whole, loops, arithmetic = passed(model, ROWS)
    assert not loops
    monkeypatch.setattr(cutting, 'PART', 32)
    found, loops, own = passed(model, ROWS, devices)
    # 16 rows of 8 tokens; a part has a row of each device at least.
    assert loops == [min(4, 16 // devices)] and own == arithmetic
    np.testing.assert_allclose(found, whole, atol=1e-5)
    with cutting.into(1):
        assert passed(model, ROWS, devices)[1] == []


def test_a_batch_stays_whole_where_an_adapter_counts_its_rows(monkeypatch):
    lora = registry.create('lora[r=2]')
    monkeypatch.setattr(cutting, 'PART', 32)
    seen = {}
    for text in ('stack(a, b)', 'parallel(a, b)', 'batch_split(a, b, batch_sizes=[6, 10])'):
        method = Composed(expression=text, members={'a': lora, 'b': lora})
        seen[text] = passed(tiny.model(method), ROWS)[1]
    assert list(seen.values()) == [[4], [], []]
    calls = []
    grouped = ROWS | {'adapter': np.zeros(8, np.int32)}  # of a bank, one for two rows
    cutting.forward(lambda rows: calls.append(len(rows['input_ids'])), tiny.model(lora), grouped)
    assert calls == [16]
