"""Rows without an adapter are the plain backbone's, and one number may stand for several rows."""

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
from adapters_jax.adapters import registry
from adapters_jax.adapters.bank import BACKBONE, Bank
from adapters_jax.adapters.binding import bind
from adapters_jax.model import attention_mask
from adapters_jax.models.backbone import Backbone

LENGTHS = [[9], [12], [5], [7], [3], [10]]
TOKENS = 12
ROWS = np.array([1, 1, -1, -1, 0, 0], np.int32)


def noisy_bank(methods):
    """Return a bank of these methods and its parameters, all leaves far from their start."""
    bank, tree = Bank(members={f'm{i}': m for i, m in enumerate(methods)}), {}
    rng = np.random.default_rng(0)
    for name, method in bank.members.items():
        model = tiny.model(method)
        trainable, frozen = trees.partition(tiny.params(model, 0), model.rules)
        noisy = jax.tree.map(
            lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32), trainable
        )
        tuned = noisy.pop('backbone', {})
        own = trees.merge(noisy, {k: v for k, v in frozen.items() if k != 'backbone'})
        tree[name] = own.get('adapters', {}).get('default', {})
        tree[name] |= {BACKBONE: tuned} if tuned else {}
    return bank, tree


@functools.partial(jax.jit, static_argnums=0)
def hidden(bank, tree, batch, rows):
    """Return the last hidden states; no bank, those of the plain backbone."""
    sites = {}
    if bank is not None:
        numbers = bank.index(tree, rows, len(batch['input_ids']))
        sites = {'sites': bind(bank, tree, None, rows=numbers)}
    return Backbone(tiny.CONFIG).apply(
        {'params': tiny.backbone()},
        *(batch[name] for name in ('input_ids', 'token_type_ids', 'positions')),
        mask=attention_mask(batch['segments'], batch['starts'].shape[1]),
        **sites,
    )


@functools.cache
def plain():
    batch = tiny.batch(LENGTHS, TOKENS)
    return batch, hidden(None, {}, batch, ROWS)


# One of each way in which an adapter's leaves meet the rows.
KINDS = {'attention_side', 'compacter', 'ia3', 'loreft', 'prompt_tuning', 'unipelt'}


@pytest.mark.parametrize('preset', cases.quick(families=KINDS))
def test_rows_without_an_adapter_are_the_plain_backbone(preset):
    bank, tree = noisy_bank([cases.method(preset)] * 2)
    batch, expected = plain()
    found = hidden(bank, tree, batch, ROWS[::2])
    held = (batch['segments'] > 0) & (ROWS < 0)[:, None]
    np.testing.assert_allclose(found[:, :TOKENS][held], expected[held], atol=1e-5)
    changed = np.abs(found[ROWS >= 0][:, :TOKENS] - expected[ROWS >= 0]).max()
    assert changed > 1e-2


@pytest.mark.parametrize(
    'preset',
    [
        *('bitfit', 'loreft', 'mam'),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ('houlsby', 'prefix_tuning')),
    ],
)
def test_a_number_may_stand_for_rows_on_end(preset):
    bank, tree = noisy_bank([cases.method(preset)] * 2)
    batch, _ = plain()
    blocks = hidden(bank, tree, batch, ROWS[::2])
    np.testing.assert_allclose(blocks, hidden(bank, tree, batch, ROWS), atol=1e-5)


def test_blocks_of_members_that_differ():
    names = ('bitfit', 'prefix_tuning_flat[prefix_length=2]', 'prompt_tuning[prompt_length=3]')
    bank, tree = noisy_bank([registry.create(name) for name in names])
    batch, expected = plain()
    rows = np.array([2, 2, -1, -1, 0, 0], np.int32)
    found = hidden(bank, tree, batch, rows[::2])
    np.testing.assert_allclose(found, hidden(bank, tree, batch, rows), atol=1e-5)
    held = (batch['segments'] > 0) & (rows < 0)[:, None]
    np.testing.assert_allclose(found[:, :TOKENS][held], expected[held], atol=1e-5)


@pytest.mark.parametrize('name', ['pfeiffer[size=4]', 'prefix_tuning_flat', 'bitfit'])
def test_only_members_in_the_batch_get_gradients(name):
    bank, tree = noisy_bank([registry.create(name)] * 3)
    batch, _ = plain()
    mask = batch['segments'] > 0

    def loss(tree, rows):
        return jnp.where(mask[..., None], hidden(bank, tree, batch, rows)[:, :TOKENS], 0).var()

    found = jax.jit(jax.grad(loss))(tree, ROWS)
    for member, used in (('m0', True), ('m1', True), ('m2', False)):
        sizes = [np.abs(leaf).max() for leaf in jax.tree.leaves(found[member])]
        assert (max(sizes) > 1e-6) == used


def test_groups_draw_their_own_dropout():
    method = registry.create('lora[r=4,dropout=0.5]')
    bank, tree = noisy_bank([method] * 2)
    tree['m1'] = tree['m0']
    row = {k: np.repeat(v[:1], 6, axis=0) for k, v in tiny.batch([[12]], TOKENS).items()}
    rows = np.array([0, 0, 0, 1, -1, -1], np.int32)

    @jax.jit
    def run(tree, key):
        return Backbone(tiny.CONFIG).apply(
            {'params': tiny.backbone()},
            *(row[name] for name in ('input_ids', 'token_type_ids', 'positions')),
            mask=attention_mask(row['segments'], 1),
            sites=bind(bank, tree, key, rows=rows),
        )

    found = run(tree, jax.random.key(0))
    for one, other in ((0, 1), (0, 3)):
        assert np.abs(found[one] - found[other]).max() > 1e-3
    np.testing.assert_allclose(found[4], found[5], atol=1e-6)
