"""Every method on the tiny model, and what it is expected to hold: the input of the conformance
suite.

A case is a preset with options that suit sixteen hidden units. What is compiled for it is kept, so
that the tests of one method share it.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from adapters_jax import params as trees
from adapters_jax import sharding, tasks
from adapters_jax.adapters import registry
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.models.backbone import Backbone
from adapters_jax.models.heads import HeadConfig
from adapters_jax.training import step as steps

NAME = 'mine'
TASK = tasks.Classification(labels=('a', 'b', 'c'))
ROWS = [[3, 9], [12], [4, 5, 3], [7], [6, 6], [10], [5, 7], [8, 4]]
WIDTH = 12
BACKBONE = {'name': 'org/name', 'family': 'bert', 'layers': 2, 'hidden': 16, 'fingerprint': 'f00d'}

# Preset: options for the tiny model. A preset that is not listed needs none.
OPTIONS = {
    'houlsby': 'size=4',
    'compacter': 'reduction_factor=2',
    'compacter++': 'reduction_factor=2',
    'attention': 'size=4,heads=2',
    'attention_side': 'size=4,heads=2',
    'prefix_tuning': 'prefix_length=3,bottleneck_size=5',
    'prefix_tuning_flat': 'prefix_length=3',
    'prompt_tuning': 'prompt_length=3',
    'mam': 'prefix_tuning={prefix_length: 3, bottleneck_size: 5}',
    'mam_adapters': 'prefix_tuning={prefix_length: 3, bottleneck_size: 5}',
    'unipelt': 'prefix_tuning={prefix_length: 3, bottleneck_size: 5}',
    'adalora': 'r=4,target_r=2',
    'seq_bn_inv': 'bottleneck={reduction_factor: 4}',
    'mtl_lora': 'n_up_projection=2',
    'vera': 'r=4',
    'dvora': 'r=4',
}
BASELINES = ('full', 'head', 'top_layers')
ALIASES = {'seq_bn': 'pfeiffer'}
METHODS = tuple(sorted(set(registry.PRESETS) - {*BASELINES, *ALIASES}))

# One of each kind of site, and of what an optimiser or a batch must know of a method.
FAMILIES = {
    'adalora', 'adapter_plus', 'attention_side', 'compacter', 'ia3', 'lora', 'loreft', 'pfeiffer',
    'prefix_tuning_flat', 'prompt_tuning', 'unipelt',
}  # fmt: skip
# Fewer, for what compiles a step or a gradient: one of each kind of site.
SITES = {'adalora', 'attention_side', 'ia3', 'loreft', 'pfeiffer', 'prompt_tuning', 'unipelt'}


def quick(presets=METHODS, families=FAMILIES):
    """Return the presets as a test's parameters; those of no new kind are for the slow tests.

    For what would take long over all presets.
    """
    return [pytest.param(p, marks=[] if p in families else pytest.mark.slow) for p in presets]


# Presets that start as the plain backbone, bit for bit.
FROM_ZERO = {
    'par_bn', 'scaled_par_bn', 'bitfit', 'layer_norm', 'lora', 'vera', 'ia3', 'adalora', 'mtl_lora',
}  # fmt: skip
# And those that do up to rounding, since they compute the same number in another way.
NEARLY_FROM_ZERO = {'dora', 'dvora'}
# Leaves without a gradient: the pooler under a head that averages; ReFT's interventions at the ends
# of the texts where no positions are chosen there (the library has them, and counts them); the
# share of MTL-LoRA's up-projection where there is but one.
IDLE = re.compile('backbone/pooler/bias|block/suffix/|(query|value)/weights$')
OUTSIDE_LAYERS = {'prompt_tuning', 'invertible'}  # a deeper backbone is one like any other
# Presets whose trained leaves start from constants or from the backbone's own weights.
NOTHING_DRAWN = {'ia3', 'vera', 'dvora', 'bitfit', 'layer_norm'}
MERGEABLE = {
    'lora', 'dora', 'vera', 'dvora', 'ia3', 'adalora', 'mtl_lora', 'bitfit', 'layer_norm',
}  # fmt: skip


def text_of(preset):
    """Return the preset with its options, as a config would name it."""
    return f'{preset}[{OPTIONS[preset]}]' if preset in OPTIONS else preset


@functools.cache
def method(preset):
    return registry.create(text_of(preset))


@functools.cache
def model(preset, **options):
    head = HeadConfig(dropout=0.0)
    return tiny.model(method(preset), head, name=NAME, **options)


@functools.cache
def fresh(preset, seed=0):
    """Return all parameters as initialised."""
    return tiny.params(model(preset), seed)


@functools.cache
def trained(preset, seed=0):
    """Return all parameters, every trained leaf far from its initialisation."""
    rng = np.random.default_rng(seed + 7)

    def noise(leaf):
        return leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32)

    trainable, frozen = trees.partition(fresh(preset, seed), model(preset).rules)
    return trees.merge(jax.tree.map(noise, trainable), frozen)


@functools.cache
def outputs(preset):
    return jax.jit(model(preset).apply)


@functools.cache
def packed():
    """Return rows of several texts."""
    return tiny.batch(ROWS, WIDTH)


@functools.cache
def one_each():
    """Return the texts of `packed`, one a row, in the order of their numbers."""
    batch = packed()
    places = zip(*np.nonzero(batch['example_mask']), strict=True)
    singles = [tiny.alone(batch, row, place, WIDTH) for row, place in places]
    return {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}


def layout(preset):
    """Return the batch that the method would be given."""
    return packed() if method(preset).packable else one_each()


@functools.cache
def run(preset, devices=1, count=8):
    """Take steps on one batch; return the trees before and after, the losses, and the function."""
    mesh, of = sharding.make_mesh(devices), model(preset)
    # Copies: the step takes the memory of what it is given.
    before = jax.tree.map(np.array, trees.partition(fresh(preset), of.rules))
    trainable, frozen = sharding.put_replicated(before, mesh)
    # Where a gradient is nothing but rounding, a smaller epsilon would make a full step of it.
    optimizer = of.method.optimizer(optax.adam(1e-2, eps=1e-5), 20)
    everywhere = sharding.replicated(mesh)
    state = jax.jit(optimizer.init, out_shardings=everywhere)(trainable)
    step = steps.jit_train_step(
        trainable, state, model=of, task=TASK, optimizer=optimizer, dropout=False
    )
    batch, losses = sharding.put_batch(even(layout(preset)), mesh), []
    parts = [len(shard.data) for shard in batch['segments'].addressable_shards]
    assert parts == [len(batch['segments']) // devices] * devices
    key = sharding.put_replicated(jax.random.key(0), mesh)
    for number in range(count):
        trainable, state, metrics = step(trainable, state, frozen, batch, key, np.int32(number))
        losses.append(float(metrics['loss']))
    after = jax.device_get((trainable, frozen))
    return before, after, losses, step, jax.device_get(state)


@functools.cache
def bert_base():
    """Return the config of BERT-base, and the shapes of its parameters."""
    config = dataclasses.replace(
        tiny.CONFIG,
        layers=12,
        vocabulary=30522,
        positions=512,
        block=dataclasses.replace(tiny.CONFIG.block, hidden=768, feed_forward=3072, heads=12),
    )
    ids = jnp.ones((1, 1), jnp.int32)
    key = jax.random.key(0)
    return config, jax.eval_shape(lambda: Backbone(config).init(key, ids, method='initialise'))


@functools.cache
def shapes_at_bert_base(method):
    """Return the shapes of what the method trains at the size of BERT-base."""
    config, backbone = bert_base()
    model = tiny.model(method, config=config, name=NAME)
    params = jax.eval_shape(lambda tree: model.init(jax.random.key(0), tree), backbone['params'])
    trainable, _ = trees.partition(params, model.rules)
    return {name: tree for name, tree in trainable.items() if name != 'heads'}


def described(preset, trainable):
    """Return the folder of what has been trained."""
    of = model(preset)
    return AdapterFolder(
        name=NAME,
        method=of.method.to_json(),
        head=of.head_config.to_json(),
        task=TASK.to_json(),
        backbone=BACKBONE,
        max_length=WIDTH,
        pair=False,
        adapter_params=trainable.get('adapters', {}).get(NAME, {}),
        head_params=trainable['heads'][NAME],
        backbone_params=trainable.get('backbone', {}),
    )


def even(batch):
    """Return the batch with empty rows up to a multiple of eight, one for each device."""
    missing = -len(batch['segments']) % 8
    return {
        name: np.concatenate([x, np.zeros((missing, *x.shape[1:]), x.dtype)])
        for name, x in batch.items()
    }


def bits(tree):
    return {path: np.asarray(leaf).tobytes() for path, leaf in trees.flatten(tree).items()}


def logits(preset, params, batch=None):
    """Return the outputs of the texts of the batch in the order of their numbers."""
    batch = layout(preset) if batch is None else batch
    found = np.asarray(outputs(preset)(params, batch))[batch['example_mask']]
    return found[np.argsort(batch['example_id'][batch['example_mask']])]
