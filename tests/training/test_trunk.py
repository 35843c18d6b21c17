"""The trunk's cache: what is read is what would be computed, for whoever has the same trunk."""

import collections
import dataclasses
import logging
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import tiny
import toy

from adapters_jax import files, sharding
from adapters_jax import params as trees
from adapters_jax.adapters import registry
from adapters_jax.config import base
from adapters_jax.data import batches, pipeline, stored
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.policies import Buckets, Packed
from adapters_jax.sites import Place
from adapters_jax.tasks.classification import Classification
from adapters_jax.training import trunk
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.members import Members
from adapters_jax.training.trunk import Trunk

PACKED = Packed(row_length=24, rows=4, max_segments=6)
BUCKETS = Buckets(lengths=(8, 16), batch_size=8)
TRUNK = Trunk('abc', Place(1), 1, 16, 'float32', 'float32')
# A method for each kind of place at which a trunk may end.
METHODS = {
    'lora[r=2,leave_out=[0]]': (1, 'attention', 1),
    'double_seq_bn[reduction_factor=4,leave_out=[0]]': (1, 'attention_end', 2),
    'pfeiffer[reduction_factor=4,leave_out=[0]]': (1, 'feed_forward_end', 2),
    'loreft[leave_out=[0],r=1]': (1, 'block_end', 1),
    'head': (2, 'attention', 1),
    'attention_side[size=8]': (2, 'attention', 2),
}


def make_split(count=37, seed=0):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 17, count)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = {
        'input_ids': rng.integers(1, tiny.CONFIG.vocabulary, offsets[-1]).astype(np.int32),
        'token_type_ids': rng.integers(0, 2, offsets[-1]).astype(np.int32),
    }
    return Encoded(tokens, offsets, {'label': rng.integers(0, 3, count).astype(np.int32)}, 2)


SPLIT = make_split()


def from_ids(batch):
    """Stand in for a trunk: vectors that tell which token they are of, and in which place."""
    ids, positions = batch['input_ids'], batch['positions']
    return np.stack([ids + k / 16 + positions / 1024 for k in range(16)], -1)[:, :, None]


def column_of(split, cache, policy=PACKED, outputs=from_ids, of=TRUNK):
    return trunk.compute(of.stored(split, cache), outputs, split, policy, 0)


# ---- the column


@pytest.mark.parametrize('policy', [PACKED, BUCKETS])
def test_each_token_gets_its_own_vectors_in_any_layout(tmp_path, policy):
    column = column_of(SPLIT, tmp_path, policy)
    positions = np.concatenate([np.arange(n) for n in SPLIT.lengths])
    expected = from_ids({'input_ids': SPLIT.tokens['input_ids'][None], 'positions': positions})
    assert column.shape == (len(positions), 1, 16) and column.dtype == np.float32
    np.testing.assert_array_equal(column, expected[0].astype(np.float32))


@pytest.mark.parametrize('policy', [PACKED, BUCKETS])
def test_batches_carry_the_column_to_the_places_of_the_tokens(tmp_path, policy):
    split = trunk.with_column(SPLIT, column_of(SPLIT, tmp_path))
    seen = 0
    for batch in pipeline.eval_batches(split, policy, 0, threads=4):
        real = batch['segments'] > 0
        assert batch['trunk'].shape == (*real.shape, 1, 16)
        np.testing.assert_array_equal(batch['trunk'][real], from_ids(batch)[real].astype('f4'))
        assert not batch['trunk'][~real].any()
        seen += real.sum()
    assert seen == SPLIT.offsets[-1]


def test_a_selection_takes_the_vectors_along(tmp_path):
    chosen = np.array([5, 0, 5, 36])
    column = column_of(SPLIT, tmp_path)
    whole = trunk.with_column(SPLIT, column).select(chosen)
    alone = column_of(SPLIT.select(chosen), tmp_path)
    np.testing.assert_array_equal(whole.tokens['trunk'], alone)


def test_the_splits_identity_stays_what_it_is_and_is_found_without_reading_the_column(tmp_path):
    split = trunk.with_column(SPLIT, column_of(SPLIT, tmp_path))
    assert split.fingerprint() == SPLIT.fingerprint()
    assert split.truncated == 2 and split.examples is SPLIT.examples
    unreadable = SimpleNamespace(shape=(SPLIT.offsets[-1], 1, 16))
    assert trunk.with_column(SPLIT, unreadable).fingerprint() == SPLIT.fingerprint()


def test_the_column_stays_on_the_disk(tmp_path):
    column = column_of(SPLIT, tmp_path)
    assert isinstance(column.base, np.memmap)
    assert isinstance(trunk.with_column(SPLIT, column).tokens['trunk'].base, np.memmap)


def test_tokens_that_were_not_computed_are_noticed(tmp_path, monkeypatch):
    whole = pipeline.eval_batches
    monkeypatch.setattr(pipeline, 'eval_batches', lambda *inputs: list(whole(*inputs))[:-1])
    with pytest.raises(RuntimeError, match=rf'of {SPLIT.offsets[-1]} tokens were computed'):
        column_of(SPLIT, tmp_path)
    assert TRUNK.stored(SPLIT, tmp_path).read() is None


# ---- the key


def test_each_ingredient_changes_the_name_and_nothing_else_does(tmp_path):
    changes = {
        'backbone': 'abd',
        'place': Place(2),
        'vectors': 2,
        'width': 8,
        'computed': 'bfloat16',
        'dtype': 'bfloat16',
    }
    assert set(changes) == {field.name for field in dataclasses.fields(Trunk)}
    variants = [TRUNK, dataclasses.replace(TRUNK, place=Place.of(1, 'block_end'))]
    variants += [dataclasses.replace(TRUNK, **{key: value}) for key, value in changes.items()]
    places = {variant.stored(SPLIT, tmp_path).directory for variant in variants}
    other_ids = SPLIT.tokens | {'input_ids': SPLIT.tokens['input_ids'] + 1}
    other_types = SPLIT.tokens | {'token_type_ids': 1 - SPLIT.tokens['token_type_ids']}
    cut_elsewhere = np.concatenate([[0], SPLIT.offsets[2:]])
    texts = [
        dataclasses.replace(SPLIT, tokens=other_ids),
        dataclasses.replace(SPLIT, tokens=other_types),
        Encoded(SPLIT.tokens, cut_elsewhere, {}),
    ]
    places |= {TRUNK.stored(text, tmp_path).directory for text in texts}
    assert len(places) == len(variants) + len(texts)
    other_labels = dataclasses.replace(SPLIT, examples={})
    assert TRUNK.stored(other_labels, tmp_path).directory in places
    tagged = SPLIT.tokens | {'tags': np.zeros(SPLIT.offsets[-1], np.int32)}
    assert TRUNK.stored(dataclasses.replace(SPLIT, tokens=tagged), tmp_path).directory in places


def test_a_new_format_is_another_name(tmp_path, monkeypatch):
    before = TRUNK.stored(SPLIT, tmp_path).directory
    monkeypatch.setattr(trunk, 'FORMAT', trunk.FORMAT + 1)
    assert TRUNK.stored(SPLIT, tmp_path).directory != before


# ---- writing


def test_a_failure_in_the_middle_leaves_nothing_and_the_next_run_computes_all(tmp_path):
    calls = collections.Counter()

    def broken(batch):
        calls['broken'] += 1
        if calls['broken'] == 4:
            raise KeyError('broken off')
        return from_ids(batch)

    with pytest.raises(KeyError, match='broken off'):
        column_of(SPLIT, tmp_path, outputs=broken)
    place = TRUNK.stored(SPLIT, tmp_path)
    assert place.read() is None and not (place.directory / stored.NUMBERS).exists()
    np.testing.assert_array_equal(
        column_of(SPLIT, tmp_path), column_of(SPLIT, tmp_path / 'elsewhere')
    )


def test_sixteen_bits_round_and_take_half(tmp_path):
    half = dataclasses.replace(TRUNK, dtype='bfloat16')
    column = column_of(SPLIT, tmp_path, of=half)
    whole = column_of(SPLIT, tmp_path)
    assert column.dtype.name == 'bfloat16' and column.nbytes * 2 == whole.nbytes
    np.testing.assert_allclose(column.astype(np.float32), whole, rtol=2**-8)
    plan = batches.plan_epoch(SPLIT.lengths, PACKED, 0, 0, False)
    batch = batches.assemble(trunk.with_column(SPLIT, column), plan, 0, 0)
    assert batch['trunk'].dtype == column.dtype


# ---- the real trunk


def experiment_of(name, cache, **changes):
    """Return an experiment over the tiny backbone, with two splits."""
    config = base()
    config.data.cache_dir, config.data.max_length = str(cache), 16
    config.training.trunk_cache, config.training.batch_size = 'float32', 8
    toy.change(config, **changes)
    model = tiny.model(registry.create(name))
    weights = tiny.backbone()
    splits = {'train': SPLIT, 'validation': make_split(9, 1), 'test': make_split(5, 2)}
    return Experiment(
        config=config,
        backbone=SimpleNamespace(
            params=weights, fingerprint=trees.fingerprint(weights), architecture='plain'
        ),
        task=Classification(labels=('a', 'b')),
        model=model,
        splits=splits,
        texts={},
        members=Members(model.method, {}),
    )


@pytest.fixture(scope='module')
def mesh():
    return sharding.make_mesh(2)


@pytest.fixture
def computed(monkeypatch):
    """Count the batches whose trunk is computed."""
    calls, whole = collections.Counter(), trunk.jit_outputs

    def counted(*inputs):
        outputs = whole(*inputs)

        def count(batch):
            calls['batches'] += 1
            return outputs(batch)

        return count

    monkeypatch.setattr(trunk, 'jit_outputs', counted)
    return calls


FAST = {'double_seq_bn[reduction_factor=4,leave_out=[0]]', 'head'}


@pytest.mark.parametrize(
    'name', [pytest.param(m, marks=() if m in FAST else pytest.mark.slow) for m in METHODS]
)
def test_a_batch_with_the_column_gives_the_outputs_of_one_without(tmp_path, mesh, name):
    experiment = experiment_of(name, tmp_path)
    attached = trunk.attach(experiment, mesh)
    model, params = experiment.model, experiment.init_params()
    place = model.trunk(params)
    layer, stage, vectors = METHODS[name]
    assert (place.layer, place.stage) == (layer, stage)
    assert set(attached.splits) == {'train', 'validation', 'test'}
    assert attached.splits['test'] is experiment.splits['test']
    noise = np.random.default_rng(0)
    params['adapters'] = jax.tree.map(
        lambda x: x + 0.2 * noise.standard_normal(x.shape).astype('f4'), params['adapters']
    )
    apply = jax.jit(model.apply)
    for split in ('train', 'validation'):
        column = attached.splits[split].tokens['trunk']
        assert column.shape == (experiment.splits[split].offsets[-1], vectors, 16)
        plan = batches.plan_epoch(experiment.splits[split].lengths, PACKED, 0, 0, True)
        plain, begun = (
            batches.assemble(e.splits[split], plan, 0, 0) for e in (experiment, attached)
        )
        assert {*begun} - {*plain} == {'trunk'}
        expected = apply(params, plain)
        assert np.abs(expected).max() > 0.1
        mask = plain['example_mask']
        np.testing.assert_allclose(apply(params, begun)[mask], expected[mask], atol=2e-5, rtol=0)


def test_other_runs_with_the_same_trunk_compute_nothing(tmp_path, mesh, computed, caplog):
    caplog.set_level(logging.INFO)
    first = trunk.attach(experiment_of('pfeiffer[leave_out=[0]]', tmp_path), mesh)
    done = computed['batches']
    assert done >= 2
    caplog.clear()
    other = 'pfeiffer[leave_out=[0],reduction_factor=2]'
    again = trunk.attach(experiment_of(other, tmp_path, seed=5), mesh)
    assert computed['batches'] == done
    where = "the trunk's end (layer 1, feed_forward_end)"
    assert caplog.messages == [f'Everything up to {where} is read from {tmp_path / "trunk"}.']
    for split in ('train', 'validation'):
        one, two = (e.splits[split].tokens['trunk'] for e in (first, again))
        np.testing.assert_array_equal(one, two)


def test_the_size_is_said_before_anything_is_computed(tmp_path, mesh, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    experiment = experiment_of('pfeiffer[leave_out=[0]]', tmp_path)
    tokens = int(SPLIT.offsets[-1] + experiment.splits['validation'].offsets[-1])

    def refuse(*_):
        raise KeyError('begun')

    monkeypatch.setattr(trunk, 'compute', refuse)
    with pytest.raises(KeyError, match='begun'):
        trunk.attach(experiment, mesh)
    (message,) = caplog.messages
    size = f'{tokens * 2 * 16 * 4 / 1000:.1f} kB'
    assert f'computed once and kept: {size} in {tmp_path / "trunk"}' in message
    assert f'({tokens} tokens of train and validation x 2 x 16, float32)' in message


@pytest.mark.parametrize('kind', ['float32', 'bfloat16'])
def test_what_does_not_fit_is_refused_before_anything_is_computed(
    tmp_path, mesh, computed, monkeypatch, kind
):
    experiment = experiment_of('head', tmp_path, training__trunk_cache=kind)
    full = SimpleNamespace(free=stored.MARGIN + 100)
    monkeypatch.setattr(stored.shutil, 'disk_usage', lambda path: full)
    with pytest.raises(files.DiskError, match=r'the trunk cache needs .* kB in .* free there') as e:
        trunk.attach(experiment, mesh)
    assert ("training.trunk_cache='bfloat16'" in str(e.value)) == (kind == 'float32')
    assert 'another data.cache_dir' in str(e.value) and '\n' not in str(e.value)
    assert not computed and not (tmp_path / 'trunk').exists()


def test_a_damaged_file_is_said_and_computed_again(tmp_path, mesh, computed, caplog):
    experiment = experiment_of('head', tmp_path)
    before = trunk.attach(experiment, mesh).splits
    done, expected = computed['batches'], before['validation'].tokens['trunk'].copy()
    sizes = {p: p.stat().st_size for p in (tmp_path / 'trunk').glob(f'*/{stored.NUMBERS}')}
    smaller = min(sizes, key=sizes.get)
    with smaller.open('r+b') as file:
        file.truncate(sizes[smaller] // 2)
    after = trunk.attach(experiment, mesh).splits
    assert computed['batches'] - done < done
    assert any('is damaged' in message for message in caplog.messages)
    np.testing.assert_array_equal(after['validation'].tokens['trunk'], expected)


def test_without_the_option_or_a_trunk_nothing_is_done(tmp_path, mesh, caplog):
    caplog.set_level(logging.INFO)
    off = experiment_of('head', tmp_path, training__trunk_cache='none')
    assert trunk.attach(off, mesh) is off and not caplog.messages
    lowest = experiment_of('pfeiffer', tmp_path)
    assert trunk.attach(lowest, mesh) is lowest
    assert caplog.messages == [
        'The lowest layer is adapted, so there is no trunk whose outputs could be kept.'
    ]
    assert not (tmp_path / 'trunk').exists()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'training__trunk_cache': 'float16'}, "trunk_cache is 'float16'; expected one of none, "),
        ({'data__cache_dir': 'none'}, "data.cache_dir is 'none', so there is nowhere"),
        ({'training__adapter_drop': 'robust'}, "adapter_drop is 'robust', with which the trunk"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(tmp_path, changes, message):
    config = experiment_of('head', tmp_path, **changes).config
    with pytest.raises(ValueError, match=message):
        trunk.check(config)


def test_sixteen_bit_activations_are_kept_in_sixteen_bits(tmp_path):
    experiment = experiment_of('head', tmp_path, training__dtype='bfloat16')
    shapes = jax.eval_shape(experiment.init_params)
    assert trunk.describe(experiment, shapes).dtype == 'bfloat16'
    whole = trunk.describe(experiment_of('head', tmp_path), shapes)
    assert (
        whole.dtype == 'float32' and whole.computed != trunk.describe(experiment, shapes).computed
    )
