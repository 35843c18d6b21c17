"""AdaLoRA computes, prunes and merges as `peft` does; its schedule is tested against a live one."""

import copy
import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import reference
import torch
import transformers
from low_rank_models import MODULES
from peft_adalora import give, live, plain_bert, tree_of

from adapters_jax import params
from adapters_jax.adapters import adalora, merging, rank_schedule
from adapters_jax.adapters.adalora import AdaLoRA
from adapters_jax.adapters.binding import bind
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions

EVERYWHERE = {
    'attn_matrices': ['q', 'k', 'v', 'o'],
    'intermediate_lora': True,
    'output_lora': True,
}
BERT_BASE = Dimensions(
    layers=12,
    hidden=768,
    feed_forward=3072,
    heads=12,
    word=768,
    vocabulary=30522,
    positions=512,
)


def difference(method, model, backbone, tree):
    """Return the largest difference of any hidden state between `peft` and ours."""
    ids, mask = reference.texts(model)
    expected = reference.torch_hidden(model, ids, mask)
    config = reference.our_config(model)
    found = Backbone(config).apply(
        {'params': backbone},
        ids,
        mask=mask[:, None, None, :],
        sites=bind(method, tree, None),
        all_hidden=True,
    )
    return max(np.abs(a - b).max() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ('targets', 'options'), [(['query', 'value'], {}), (list(MODULES), EVERYWHERE)], ids=str
)
def test_the_forward_pass_is_that_of_peft(targets, options):
    model, backbone = live(targets, lora_alpha=5, lora_dropout=0.3)
    tree = tree_of(model)
    method = AdaLoRA(r=4, target_r=2, alpha=5, dropout=0.3, **options)
    fresh = jax.eval_shape(
        lambda: method.init(jax.random.key(0), reference.our_config(model).dimensions, {})
    )
    shapes = [params.flatten(jax.tree.map(jnp.shape, x)) for x in (fresh, tree)]
    assert shapes[0] == shapes[1]
    assert difference(method, model, backbone, tree) <= 2e-5
    merged = merging.merge(method, tree, backbone)
    assert difference(method, model, merged, {}) <= 2e-5


def test_a_fresh_adapter_is_the_identity():
    model = plain_bert()
    config = reference.our_config(model)
    method = AdaLoRA(**EVERYWHERE)
    tree = method.init(jax.random.key(0), config.dimensions, {})
    assert difference(method, model, reference.backbone_tree(model), tree) <= 2e-6
    leaves = params.flatten(tree)
    assert all(not np.any(leaf) for path, leaf in leaves.items() if path.endswith('/e'))
    vectors = np.concatenate([np.ravel(x) for path, x in leaves.items() if path[-1] != 'e'])
    assert 0.018 < vectors.std() < 0.022  # peft: N(0, 0.02²)
    again = method.init(jax.random.key(1), config.dimensions, {})
    assert not np.array_equal(
        leaves['layer_0/attention/query/a'], params.flatten(again)['layer_0/attention/query/a']
    )


def test_the_count_at_bert_base():
    fresh = jax.eval_shape(lambda: AdaLoRA().init(jax.random.key(0), BERT_BASE, {}))
    assert params.count(fresh) == 24 * 12 * (768 + 1 + 768)


def test_the_penalty_is_that_of_peft():
    class WithLoss(torch.nn.Module):
        """A model whose own loss is zero, so that what `peft` adds to it is all there is."""

        def __init__(self):
            super().__init__()
            self.config = transformers.BertConfig()
            self.query = torch.nn.Linear(6, 8)
            self.value = torch.nn.Linear(6, 6)

        def forward(self, x):
            output = transformers.modeling_outputs.SequenceClassifierOutput
            return output(loss=0.0 * self.value(x).sum(), logits=self.query(x))

    config = peft.AdaLoraConfig(
        init_r=3, target_r=2, total_step=9, target_modules=['query', 'value'], orth_reg_weight=0.3
    )
    model = peft.get_peft_model(WithLoss(), config)
    reference.randomise(model, 3)
    expected = model.base_model(torch.ones(2, 6)).loss.item()
    layers = model.base_model.model
    tree = {
        f'layer_{i}': {
            'attention': {
                'query': {
                    'a': reference.to_array(module.lora_A['default'], flip=True),
                    'e': jnp.ones(3),
                    'b': reference.to_array(module.lora_B['default'], flip=True),
                }
            }
        }
        for i, module in enumerate((layers.query, layers.value))
    }
    method = AdaLoRA(r=3, target_r=2, orth_reg=0.3)
    np.testing.assert_allclose(method.penalty(tree), expected, rtol=2e-6)
    assert AdaLoRA(orth_reg=0.0).penalty(tree) is None


def test_the_penalty_has_a_gradient_where_it_is_zero():
    node = {'a': jnp.eye(4)[:, :2], 'e': jnp.ones(2), 'b': jnp.eye(5)[:2]}
    value, slopes = jax.value_and_grad(AdaLoRA(r=2, target_r=1).penalty)(
        {'layer_0': {'attention': {'query': node}}}
    )
    assert value == 0 and all(not np.any(leaf) for leaf in jax.tree.leaves(slopes))


SCHEDULES = {
    'plain': {},
    'phases': {'tinit': 3, 'tfinal': 3},
    'rarely': {'tinit': 1, 'tfinal': 2, 'delta_t': 4, 'beta1': 0.5, 'beta2': 0.7},
    'steep': {'target_r': 1, 'tfinal': 9},
}


def draw_gradients(rng, tree):
    """Return random gradients whose size differs from triplet to triplet and leaf to leaf."""
    return jax.tree.map(
        lambda x: jnp.asarray(rng.standard_normal(x.shape) * 10 ** rng.uniform(-1, 1), x.dtype),
        tree,
    )


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_schedule_masks_what_a_live_allocator_of_peft_masks(name):
    options = {'target_r': 2, 'delta_t': 1} | SCHEDULES[name]
    theirs = {'deltaT' if key == 'delta_t' else key: value for key, value in options.items()}
    model, _ = live(**theirs)
    config = model.peft_config['default']
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)

    method = AdaLoRA(r=4, **options)
    ours = optax.chain(optax.sgd(0.05))
    ours = method.optimizer(ours, config.total_step)
    trainable = {'adapters': {'a': tree_of(model)}, 'heads': {'a': {'bias': jnp.ones(3)}}}
    state = ours.init(trainable)
    step = jax.jit(lambda t, s, g: ours.update(g, s, t))
    rng = np.random.default_rng(0)

    ever_masked = 0
    for number in range(1, config.total_step + 1):
        gradients = draw_gradients(rng, trainable)
        give(model, gradients['adapters']['a'])
        optimizer.step()
        model.base_model.update_and_allocate(number)
        updates, state = step(trainable, state, gradients)
        trainable = optax.apply_updates(trainable, updates)

        expected = params.flatten(tree_of(model))
        found = params.flatten(trainable['adapters']['a'])
        assert found.keys() == expected.keys()
        for path, leaf in found.items():
            np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=2e-6, err_msg=path)
            np.testing.assert_array_equal(leaf == 0, expected[path] == 0, err_msg=path)
        ever_masked = max(ever_masked, sum(int((x == 0).sum()) for x in found.values()))
    kept = sum(int(np.count_nonzero(x)) for p, x in found.items() if p.endswith('/e'))
    assert kept == options['target_r'] * 4 and ever_masked >= 16 - kept
    np.testing.assert_allclose(  # what is no triplet is only the inner optimiser's
        trainable['heads']['a']['bias'],
        1 - 0.05 * sum_of_heads(config.total_step, model),
        rtol=2e-6,
    )


def sum_of_heads(steps, model):
    """Return the sum of the gradients of the head that the schedule's test draws."""
    rng = np.random.default_rng(0)
    tree = {'adapters': {'a': tree_of(model)}, 'heads': {'a': {'bias': jnp.ones(3)}}}
    return sum(draw_gradients(rng, tree)['heads']['a']['bias'] for _ in range(steps))


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_budget_of_each_step_is_that_of_peft(name):
    options = {'target_r': 2, 'delta_t': 1} | SCHEDULES[name]
    theirs = {'deltaT' if key == 'delta_t' else key: value for key, value in options.items()}
    model, _ = live(**theirs)
    allocator = model.base_model.rankallocator
    schedule = rank_schedule.Schedule(total_steps=12, **options)
    expected = [allocator.budget_schedule(step)[0] for step in range(13)]
    initial, target = allocator.init_bgt, allocator.target_bgt
    found = [schedule.budget(step, initial, target) for step in range(13)]
    assert (initial, target) == (16, 4 * options['target_r'])
    # In the step that decides, `peft` still has the formula, which is the target there.
    assert found == expected
    excess = schedule.excess(16, 4)
    np.testing.assert_array_equal(16 - excess, found[: schedule.last + 1])


def test_every_adapter_of_a_tree_has_the_whole_budget():
    """As each would have it alone, though one's gradients are a thousand times the other's."""
    rng = np.random.default_rng(1)
    node = {'a': jnp.ones((5, 3)), 'e': jnp.ones(3), 'b': jnp.ones((3, 4))}
    alone = {'adapters': {'x': {'one': node, 'two': node}}, 'heads': {'x': {'bias': jnp.ones(2)}}}
    steps = [[draw_gradients(rng, alone) for _ in range(4)] for _ in range(2)]
    steps[1] = jax.tree.map(lambda x: 1e3 * x, steps[1])
    optimizer = AdaLoRA(r=3, target_r=1).optimizer(optax.adam(0.1), 4)

    def together(trees):
        return {b: {n: t[b]['x'] for n, t in zip('pq', trees, strict=False)} for b in alone}

    def train(start, gradients):
        trainable, state = start, optimizer.init(start)
        for gradient in gradients:
            updates, state = jax.jit(optimizer.update)(gradient, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        return trainable

    both = train(together([alone, alone]), [together(pair) for pair in zip(*steps, strict=True)])
    for number, name in enumerate('pq'):
        expected = params.flatten(train(alone, steps[number])['adapters']['x'])
        values = [x for path, x in expected.items() if path.endswith('/e')]
        assert sum(int(np.count_nonzero(x)) for x in values) == 2
        for path, leaf in params.flatten(both['adapters'][name]).items():
            np.testing.assert_array_equal(leaf, expected[path], err_msg=path)


def test_the_schedule_under_vmap_equals_that_of_each_member():
    rng = np.random.default_rng(1)
    node = {'a': jnp.ones((5, 3)), 'e': jnp.ones(3), 'b': jnp.ones((3, 4))}
    member = {'adapters': {'a': {'x': node, 'y': node}}}
    members = [draw_gradients(rng, member) for _ in range(2)]
    optimizer = AdaLoRA(r=3, target_r=1).optimizer(optax.adam(0.1), 4)

    def train(start, gradients):
        def step(carry, gradient):
            trainable, state = carry
            updates, state = optimizer.update(gradient, state, trainable)
            return (optax.apply_updates(trainable, updates), state), None

        return jax.lax.scan(step, (start, optimizer.init(start)), gradients)[0][0]

    def stack(trees):
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    gradients = [stack([draw_gradients(rng, member) for _ in range(4)]) for _ in range(2)]
    together = jax.vmap(train)(stack(members), stack(gradients))
    masks = []
    for i in range(2):
        alone = train(members[i], gradients[i])
        one = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, alone)
        masks.append([np.asarray(node['e'] != 0) for node in rank_schedule.find_triplets(one)])
        assert sum(mask.sum() for mask in masks[i]) == 2
    assert not np.array_equal(*masks)


def test_masked_values_are_zero_in_half_precision():
    node = {'a': jnp.ones((5, 3)), 'e': jnp.array([0.3, 0.7, 0.11]), 'b': jnp.ones((3, 4))}
    trainable = params.cast({'adapters': {'a': node}}, jnp.bfloat16)
    optimizer = AdaLoRA(r=3, target_r=1).optimizer(optax.sgd(0.1), 2)
    state = optimizer.init(trainable)
    for _ in range(2):
        gradients = draw_gradients(np.random.default_rng(2), trainable)
        updates, state = optimizer.update(gradients, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    values = trainable['adapters']['a']['e']
    assert values.dtype == jnp.bfloat16 and np.count_nonzero(values) == 1


def test_a_tree_without_triplets_is_left_to_the_inner_optimizer():
    optimizer = AdaLoRA().optimizer(optax.sgd(0.5), 10)
    trainable = {'heads': {'a': {'bias': jnp.ones(3)}}}
    updates, _ = optimizer.update(trainable, optimizer.init(trainable), trainable)
    np.testing.assert_array_equal(updates['heads']['a']['bias'], jnp.full(3, -0.5))


def test_pruning_changes_nothing_and_is_what_peft_writes():
    model, backbone = live(lora_alpha=5)
    with torch.no_grad():
        for layer, dropped in ((0, [1]), (1, [0, 1, 2, 3])):
            module = model.base_model.model.encoder.layer[layer].attention.self.value
            module.lora_E['default'][dropped] = 0.0
    method, tree = AdaLoRA(r=4, target_r=2, alpha=5), tree_of(model)
    pruned_method, pruned = adalora.prune(method, tree)
    assert pruned_method.rank_pattern == {
        '0/attention/query': 4,
        '0/attention/value': 3,
        '1/attention/query': 4,
        '1/attention/value': 0,
    }
    assert difference(pruned_method, model, backbone, pruned) <= 2e-5

    config = model.peft_config['default']
    config.rank_pattern = {
        name: (parameter.detach().view(-1) != 0).tolist()
        for name, parameter in model.base_model.model.named_parameters()
        if 'lora_E' in name
    }
    with pytest.warns(match='invalid shape'):  # of the projection with nothing left
        written = peft.get_peft_model_state_dict(copy.deepcopy(model))
    shape = tuple(written['base_model.model.encoder.layer.0.attention.self.value.lora_A'].shape)
    assert shape == pruned['layer_0']['attention']['value']['a'].T.shape == (3, 16)

    dimensions = reference.our_config(model).dimensions
    fresh = pruned_method.init(jax.random.key(0), dimensions, {})
    shapes = [params.flatten(jax.tree.map(jnp.shape, x)) for x in (fresh, pruned)]
    assert shapes[0] == shapes[1] and 'value' not in fresh['layer_1']['attention']
    assert adalora.prune(pruned_method, pruned)[0] == pruned_method


@pytest.mark.parametrize(
    ('options', 'sentence'),
    [
        ({'target_r': 13}, 'target_r=13 is not between 1 and r=12'),
        ({'alpha': 0.0}, 'alpha=0.0 is not above 0'),
        ({'tinit': -1}, 'tinit=-1 is not at least 0'),
        ({'delta_t': 0}, 'delta_t=0 is not at least 1'),
        ({'beta2': 1.0}, 'beta2=1.0 is not between 0 and 1'),
        ({'orth_reg': -0.1}, 'orth_reg=-0.1 is not at least 0'),
        ({'rank_pattern': {'0/attention/query': 13}}, 'expected a rank between 0 and r=12'),
    ],
)
def test_values_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        AdaLoRA(**options)


def test_mistakes_that_only_the_backbone_or_the_run_shows():
    method = AdaLoRA(rank_pattern={'0/attention/key': 2})
    with pytest.raises(ValueError, match="names '0/attention/key', but no adapted projection"):
        method.init(jax.random.key(0), dataclasses.replace(BERT_BASE, layers=1), {})
    with pytest.raises(ValueError, match='leave none of the 10 steps to reduce the ranks in'):
        AdaLoRA(tinit=4, tfinal=6).optimizer(optax.sgd(0.1), 10)


def test_fields_survive_json():
    method = AdaLoRA(tinit=5, rank_pattern={'0/attention/query': 2}, **EVERYWHERE)
    values = method.to_json()
    assert values.pop('architecture') == 'adalora'
    assert AdaLoRA.from_fields(values) == method
