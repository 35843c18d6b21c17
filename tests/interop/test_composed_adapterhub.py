"""Compositions saved by the `adapters` library compute here what they compute there."""

import json

import adapters
import library_folders as library
import numpy as np
import pytest
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack

from adapters_jax.adapters import registry
from adapters_jax.interop import formats
from adapters_jax.interop.adapterhub import setup

ROWS, TOKENS = 3, 9
# The library crashes where a part of a batch has no adapter at a place, so there all have both.
PLAIN = dict.fromkeys('abc', 'double_seq_bn')
MIXED = {'a': 'double_seq_bn', 'b': 'double_seq_bn', 'c': 'seq_bn'}
LOW_RANK = dict.fromkeys('abc', 'lora')
PARTS = {'splits': [2, 3, 4]}
DYNAMIC = adapters.DynamicAdapterFusionConfig
FUSIONS = {
    'dynamic': DYNAMIC(),
    'static': adapters.StaticAdapterFusionConfig(),
    'before_norm': DYNAMIC(query_before_ln=True),
    'residual_before': DYNAMIC(residual_before=True),
    'late_values': DYNAMIC(value_before_softmax=False),
    'no_key': DYNAMIC(key=False),
}
CASES = {
    'stack': (MIXED, lambda: Stack('a', 'b', 'c'), None),
    'split': (PLAIN, lambda: Split('a', 'b', 'c', **PARTS), None),
    'batch_split': (PLAIN, lambda: BatchSplit('a', 'b', 'c', batch_sizes=[1, 1, 1]), None),
    'rows_in_split': (
        PLAIN,
        lambda: Split('a', BatchSplit('b', 'c', batch_sizes=[1, 2]), splits=[4, 5]),
        None,
    ),
    'stacks_in_rows': (
        PLAIN,
        lambda: BatchSplit(Stack('a', 'b'), Stack('c', 'a'), batch_sizes=[1, 2]),
        None,
    ),
    'low_rank_rows': (LOW_RANK, lambda: BatchSplit('a', 'b', 'c', batch_sizes=[1, 1, 1]), None),
    'stack_of_fuse': (MIXED, lambda: Stack('c', Fuse('a', 'b')), 'dynamic'),
    'fuse_of_stacks': (PLAIN, lambda: Fuse(Stack('a', 'b'), Stack('b', 'c')), 'dynamic'),
} | {f'fuse_{name}': (MIXED, lambda: Fuse('a', 'b'), name) for name in FUSIONS}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


def theirs(source, kinds, block, config):
    """Return the library's model with random adapters under an active composition."""
    model = source.model()
    for name, kind in kinds.items():
        model.add_adapter(name, config=library.CONFIGS[kind])
    if config:
        fuse = next(x for x in (block, *block) if isinstance(x, Fuse))
        model.add_adapter_fusion([_last(child) for child in fuse], FUSIONS[config])
    library.randomise(source, model, 1)
    model.set_active_adapters(block)
    return model.eval()


def _last(child):
    return child if isinstance(child, str) else child.last()


# Which are in deeper ones.
REPEATED = ('split', 'batch_split', 'fuse_dynamic')


@pytest.mark.parametrize(
    'case', [pytest.param(x, marks=[pytest.mark.slow] * (x in REPEATED)) for x in CASES]
)
def test_what_the_library_saved_computes_the_same_here(source, tmp_path, case):
    kinds, block, config = CASES[case]
    model = theirs(source, kinds, block(), config)
    model.save_adapter_setup(str(tmp_path / 'a'), block())
    method, tree = setup.as_method(setup.load(tmp_path / 'a', source.loaded))
    found, weights = library.ours(source, method, tree)
    options = {'output_adapter_fusion_attentions': True} if config else {}
    expected = library.states(source, model, **options)
    np.testing.assert_allclose(found, expected[0].numpy(), atol=2e-5)
    plain = source.model().eval()
    assert np.abs(found - library.states(source, plain)[0].numpy()).max() > 0.05
    assert bool(weights) == bool(config)
    if config:
        check_weights(weights, expected.adapter_fusion_attentions)


def check_weights(found, expected):
    """Compare our weights with the library's {fusion: {layer: {site: weights}}}."""
    ((fusion, layers),) = expected.items()
    names = {'mh_adapter': 'attention', 'output_adapter': 'feed_forward'}
    flat = {
        f'{fusion}/layer_{layer}/{names[site]}': weights
        for layer, sites in layers.items()
        for site, weights in sites.items()
    }
    assert flat.keys() == found.keys()
    for place, weights in flat.items():
        np.testing.assert_allclose(found[place], weights, atol=2e-5)
        assert weights.std() > 0.01


@pytest.mark.parametrize(
    ('where', 'options'),
    [
        pytest.param('beside', {}, id='beside-plain'),
        pytest.param('elsewhere', {'temperature': 1}, id='elsewhere-temperature'),
        pytest.param('elsewhere', {}, id='elsewhere-plain', marks=pytest.mark.slow),
        pytest.param('beside', {'temperature': 1}, id='beside-temperature', marks=pytest.mark.slow),
    ],
)
def test_a_fusion_saved_alone_finds_its_adapters(source, tmp_path, options, where):
    """Its temperature is that of a finished training, to which the library lowers it too: 1."""
    model = theirs(source, MIXED, 'a', None)
    model.add_adapter_fusion(['a', 'b'], DYNAMIC(dropout_prob=None, **options))
    head = {'num_labels': 3, 'id2label': library.LABELS}
    model.add_prediction_head(adapters.ClassificationHead(model, 'a,b', **head))
    library.randomise(source, model, 1)
    for module in model.modules():
        if hasattr(module, 'T'):
            module.T = 1.0
    model.set_active_adapters(Fuse('a', 'b'))
    model.active_head = 'a,b'
    model.eval().save_adapter_fusion(str(tmp_path / 'a,b'), 'a,b', with_head='a,b')
    written = json.loads((tmp_path / 'a,b' / 'adapter_fusion_config.json').read_text())
    assert written['config']['temperature'] == options.get('temperature', False)
    assert written['config']['dropout_prob'] is None
    places = {name: tmp_path / (name if where == 'beside' else f'x/{name}') for name in 'ab'}
    for name, place in places.items():
        place.parent.mkdir(exist_ok=True)  # the library makes the last folder only
        model.save_adapter(str(place), name)

    assert formats.kind(tmp_path / 'a,b') == 'adapterhub'
    given = places if where == 'elsewhere' else None
    held, _ = formats.load(tmp_path / 'a,b', str(source.directory), given)
    expected = library.library_logits(model, source)
    np.testing.assert_allclose(library.our_logits(held, source), expected, atol=2e-5)
    method = registry.from_json(held.method)
    _, weights = library.ours(source, method, held.adapter_params)
    outputs = library.states(source, model, output_adapter_fusion_attentions=True)
    check_weights(weights, outputs.adapter_fusion_attentions)


def test_a_fusion_without_its_adapters_is_refused(source, tmp_path):
    model = theirs(source, MIXED, Fuse('a', 'b'), 'dynamic')
    (tmp_path / 'f').mkdir()
    model.save_adapter_fusion(str(tmp_path / 'f' / 'a,b'), 'a,b')
    model.save_adapter(str(tmp_path / 'f' / 'a'), 'a')
    backbone = str(source.directory)
    with pytest.raises(FileNotFoundError, match="adapter 'b' lies neither in it nor beside it"):
        formats.load(tmp_path / 'f' / 'a,b', backbone)
    with pytest.raises(ValueError, match=r"does not mix \['z'\]; its adapters are a, b"):
        formats.load(tmp_path / 'f' / 'a,b', backbone, {'z': tmp_path})
    with pytest.raises(ValueError, match='is no fusion of AdapterHub that was saved alone'):
        formats.load(tmp_path / 'f' / 'a', backbone, {'a': tmp_path})


def test_parallel_gives_each_adapter_a_copy_of_the_batch(source, tmp_path):
    block = Parallel('a', 'b', 'c')
    model = theirs(source, PLAIN, block, None)
    model.save_adapter_setup(str(tmp_path / 'a'), block)
    method, tree = setup.as_method(setup.load(tmp_path / 'a', source.loaded))
    found, _ = library.ours(source, method, tree)
    assert method.replicas == 3 and len(found) == 9
    np.testing.assert_allclose(found, library.states(source, model)[0].numpy(), atol=2e-5)


def test_the_library_divides_an_average_twice_and_we_do_not(source, tmp_path, caplog):
    block = Average('a', 'b', weights=[0.3, 0.7])
    model = theirs(source, MIXED, block, None)
    model.save_adapter_setup(str(tmp_path / 'a'), block)
    held = setup.load(tmp_path / 'a', source.loaded)
    method, tree = setup.as_method(held)
    assert method.tree.weights == (0.3, 0.7)
    assert 'divides the average in average(a, b' in caplog.text
    found, _ = library.ours(source, method, tree)
    halved = library.states(source, model)[0].numpy()
    assert np.abs(found - halved).max() > 0.05
    model.set_active_adapters(Average('a', 'b', weights=[0.6, 1.4], normalize_weights=False))
    np.testing.assert_allclose(found, library.states(source, model)[0].numpy(), atol=2e-5)


def test_a_language_adapter_under_a_task_adapter(source, tmp_path):
    """MAD-X (Pfeiffer et al. 2020): an invertible adapter and bottlenecks, and a stack on them."""
    kinds, block = {'lang': 'seq_bn_inv', 'task': 'seq_bn'}, Stack('lang', 'task')
    model = theirs(source, kinds, block, None)
    model.save_adapter_setup(str(tmp_path / 'a'), block)
    held = setup.load(tmp_path / 'a', source.loaded)
    method, tree = setup.as_method(held)
    found, _ = library.ours(source, method, tree)
    expected = library.states(source, model)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    setup.save(held, tmp_path / 'b', source.loaded)
    again, left = source.model(), {}
    again.load_adapter_setup(str(tmp_path / 'b'), use_safetensors=True, set_active=True,
                             loading_info=left)  # fmt: skip
    np.testing.assert_allclose(library.states(source, again.eval())[0].numpy(), expected, atol=1e-6)
