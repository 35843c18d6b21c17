"""A row of a mixed batch computes what it does alone with its own adapter."""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

sys.path.insert(0, str(Path(__file__).parents[1] / 'conformance'))
import cases

from adapters_jax import params as trees
from adapters_jax.adapters import bank, registry
from adapters_jax.adapters.bank import BACKBONE, Bank
from adapters_jax.adapters.baselines import FullFineTuning
from adapters_jax.adapters.vera import VeRA
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadBank, HeadConfig

ROWS = np.array([1, -1, 0, 1, 2, 0], np.int32)
HEADS = (HeadConfig(dropout=0.0), HeadConfig('cls', 2, dropout=0.0), HeadConfig(dropout=0.0))
OUTPUTS = (3, 2, 4)


def trained(method, seed, head, outputs):
    """Return a model and its parameters, every trained leaf far from its initialisation."""
    model = tiny.model(method, head, outputs=outputs)
    rng = np.random.default_rng(seed + 7)
    trainable, frozen = trees.partition(tiny.params(model, seed), model.rules)
    noisy = jax.tree.map(
        lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), trainable
    )
    shared = tiny.backbone()
    leaves = trees.flatten(shared) | trees.flatten(noisy.get('backbone', {}))
    whole = trees.merge({k: v for k, v in noisy.items() if k != 'backbone'}, frozen)
    return model, whole | {'backbone': trees.unflatten(leaves)}, noisy.get('backbone', {})


@functools.partial(jax.jit, static_argnums=0)
def outputs(model, params, batch):
    return model.apply(params, batch)


def mixed(methods, kinds=HEADS, sizes=OUTPUTS):
    """Return single models with their parameters, the model of the bank, and its parameters."""
    singles, own, heads = [], {}, {}
    for i, method in enumerate(methods):
        model, params, tuned = trained(method, i, kinds[i], sizes[i])
        singles.append((model, params))
        own[f'm{i}'] = params.get('adapters', {}).get('default', {}) | (
            {BACKBONE: tuned} if tuned else {}
        )
        heads[f'm{i}'] = params['heads']['default']
    names = [f'm{i}' for i in range(len(methods))]
    held = HeadBank(tuple(zip(names, kinds, sizes, strict=False)))
    method = Bank(members=dict(zip(names, methods, strict=True)))
    model = Model(tiny.CONFIG, method, HEADS[0], 1, heads=held)
    params = {
        'backbone': tiny.backbone(),
        'adapters': {'default': own},
        'heads': {'default': heads},
    }
    return singles, model, params


def test_matrices_that_a_file_brings_are_each_members_own():
    """Two of AdapterHub's VeRAs have equal options and matrices of different seeds."""
    methods = [VeRA(r=4, projection_seed=0, save_projection=True) for _ in range(2)]
    kinds = Bank(members={'a': methods[0], 'b': methods[1]}).kinds
    assert len(kinds) == 1 and not kinds[0].alike
    seeded = [dataclasses.replace(method, save_projection=False) for method in methods]
    assert Bank(members={'a': seeded[0], 'b': seeded[1]}).kinds[0].alike


def check(methods, batch, rows=ROWS, kinds=HEADS, sizes=OUTPUTS):
    singles, model, params = mixed(methods, kinds, sizes)
    stacked = params['adapters']['default']
    stacked = {'adapters': {'default': model.method.stack(stacked)}}
    found = outputs(model, params | stacked, batch | {'adapter': rows})
    per_row = np.repeat(rows, len(batch['segments']) // len(rows))
    assert found.shape == (*batch['starts'].shape, max(sizes[: len(methods)]))
    for number, (single, own) in enumerate(singles):
        expected = outputs(single, own, batch)
        mine = (per_row == number)[:, None] & batch['example_mask']
        width = single.outputs
        np.testing.assert_allclose(found[mine][:, :width], expected[mine], atol=1e-5)
        assert not found[mine][:, width:].any() and np.abs(expected[mine]).max() > 0.1
    assert not found[per_row < 0].any()
    return found


def one_each():
    lengths = [[9], [12], [5], [7], [3], [10]]
    return tiny.batch(lengths, 12)


def packed():
    return tiny.batch([[3, 9], [12], [4, 5, 3], [7], [6, 6], [10]], 12)


# One of each way in which an adapter's leaves meet the rows.
KINDS = {'attention_side', 'compacter', 'ia3', 'loreft', 'unipelt'}


@pytest.mark.shows('rows')
@pytest.mark.parametrize('preset', cases.quick(families=KINDS))
def test_every_method_by_row(preset):
    method = cases.method(preset)
    batch = packed() if method.packable else one_each()
    check([method] * 3, batch, kinds=HEADS[:1] * 3, sizes=(3, 3, 3))


@pytest.mark.parametrize(
    'names',
    [
        ('lora[r=2,alpha=4]', 'pfeiffer[size=3]', 'lora[r=5,alpha=6]'),
        ('houlsby[size=2]', 'houlsby[size=4]', 'houlsby[size=3]'),
        ('bitfit', 'prompt_tuning[prompt_length=2]', 'prompt_tuning[prompt_length=4]'),
        pytest.param(
            ('prompt_tuning[prompt_length=3]', 'prefix_tuning_flat[prefix_length=2]', 'head'),
            marks=pytest.mark.slow,
        ),
    ],
    ids=','.join,
)
def test_different_methods_and_sizes_in_one_batch(names):
    methods = [registry.create(name) for name in names]
    check(methods, packed() if all(method.packable for method in methods) else one_each())


def test_methods_that_differ_in_sizes_are_of_one_kind():
    names = ('lora[r=2,alpha=4]', 'pfeiffer[size=3]', 'lora[r=5,alpha=6]')
    bank = Bank(members={name: registry.create(name) for name in names})
    assert [kind.numbers for kind in bank.kinds] == [(0, 2), (1,)]


def test_one_number_may_stand_for_several_rows():
    methods = [registry.create('pfeiffer[size=4]'), registry.create('lora')]
    batch = packed()
    blocks = check(methods, batch, np.array([1, -1, 0], np.int32))
    rows = check(methods, batch, np.array([1, 1, -1, -1, 0, 0], np.int32))
    np.testing.assert_allclose(blocks, rows, atol=1e-6)


@pytest.mark.parametrize(
    ('names', 'atol'),
    [
        (('lora', 'pfeiffer', 'bitfit', 'dora'), 0),
        # The keys of others' prefixes are masked, but they are in the sum of a row's softmax.
        (('lora', 'prefix_tuning_flat[prefix_length=3]'), 2e-6),
    ],
)
def test_rows_without_an_adapter_are_the_plain_backbone(names, atol):
    """All rows have one head, so it is the adapter in which they differ."""
    count = len(names)
    methods = [registry.create(name) for name in names]
    _, model, params = mixed(methods, HEADS[:1] * count, (3,) * count)
    model = tiny.model(model.method, HEADS[0])
    params = params | {'heads': tiny.params(model)['heads']}
    plain = tiny.model(registry.create('head'), HEADS[0])
    batch, rows = packed(), np.array([-1, 0, -1, 1, -1, count - 1], np.int32)
    expected = np.asarray(outputs(plain, {k: params[k] for k in ('backbone', 'heads')}, batch))
    found = outputs(model, params, batch | {'adapter': rows})
    moved = np.abs(found - expected).max(-1)
    assert moved[rows < 0].max() <= atol
    assert moved[rows >= 0][batch['example_mask'][rows >= 0]].min() > 1e-2
    found = outputs(model, params, batch | {'adapter': np.full(6, -1, np.int32)})
    np.testing.assert_allclose(found, expected, atol=atol, rtol=0)


@pytest.mark.parametrize('name', ['pfeiffer[size=4]', 'lora'])
def test_each_adapter_learns_from_its_own_rows(name):
    singles, model, params = mixed([registry.create(name)] * 3, HEADS[:1] * 3, (3, 3, 3))
    batch, rows = packed(), ROWS

    def loss(outputs, mine):
        return jnp.where((mine[:, None] & batch['example_mask'])[..., None], outputs**2, 0).sum()

    def whole(adapters):
        found = model.apply(params | {'adapters': adapters}, batch | {'adapter': rows})
        return loss(found, rows >= 0)

    @jax.jit
    @jax.grad
    def alone(adapters, own, number):
        return loss(singles[0][0].apply(own | {'adapters': adapters}, batch), rows == number)

    found = jax.jit(jax.grad(whole))(params['adapters'])['default']
    for number, (_, own) in enumerate(singles):
        expected = trees.flatten(alone(own['adapters'], own, number)['default'])
        for path, leaf in trees.flatten(found[f'm{number}']).items():
            np.testing.assert_allclose(leaf, expected[path], atol=2e-4, rtol=1e-4)


def test_padding_and_its_multipliers():
    small, large = registry.create('lora[r=2,alpha=3]'), registry.create('lora[r=4,alpha=16]')
    assert bank.widest([small, large]) == large
    tree = small.init(jax.random.key(0), tiny.CONFIG.dimensions, {})
    padded, factors = (f(small, tree, large) for f in (bank.pad, bank.multipliers))
    leaf = trees.flatten(factors)['layer_0/attention/query/b']
    np.testing.assert_allclose(leaf[:2], 1.5 / 4)
    assert not leaf[2:].any() and trees.flatten(padded)['layer_0/attention/query/a'].shape == (
        16,
        4,
    )
    back = trees.flatten(trees.unflatten(bank.unpad(padded, tree)))
    for path, x in trees.flatten(tree).items():
        np.testing.assert_array_equal(back[path], x)


@pytest.mark.parametrize(
    ('members', 'said'),
    [({}, 'no members'), ({'a': FullFineTuning()}, 'cannot be chosen by row')],
)
def test_what_a_bank_refuses(members, said):
    with pytest.raises(ValueError, match=said):
        Bank(members=members)


def test_what_cannot_be_padded():
    methods = [registry.create(name) for name in ('pfeiffer[size=4]', 'houlsby[size=4]')]
    with pytest.raises(ValueError, match='differ in more than sizes'):
        bank.widest(methods)
    with pytest.raises(ValueError, match="no column 'adapter'"):
        tiny.model(Bank(members={'a': methods[0]})).apply(
            tiny.params(tiny.model(Bank(members={'a': methods[0]}))), packed()
        )
