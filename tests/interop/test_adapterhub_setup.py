"""Fusions and whole compositions come from the library's folders and go back to them."""

import json

import adapters
import adapters.composition as theirs
import library_folders as library
import numpy as np
import pytest
import torch

from adapters_jax import params
from adapters_jax.adapters import composition
from adapters_jax.adapters.composition import Average, BatchSplit, Fuse, Split, Stack
from adapters_jax.interop.adapterhub import fusion, setup

CONFIGS = {'a': 'double_seq_bn', 'b': 'double_seq_bn', 'c': 'seq_bn'}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


def composed(source, config='dynamic', name=None):
    """Return a model of the library with three adapters, two heads and a fusion of 'a' and 'b'."""
    model = source.model()
    for adapter, kind in CONFIGS.items():
        model.add_adapter(adapter, config=library.CONFIGS[kind])
    for head in 'ab':
        options = {'num_labels': 3, 'id2label': library.LABELS}
        model.add_prediction_head(adapters.ClassificationHead(model, head, **options))
    model.add_adapter_fusion(['a', 'b'], config, name=name)
    library.randomise(source, model, 1)
    return model.eval()


def state(model, mark):
    return {name: x for name, x in model.state_dict().items() if mark in name}


def check_equal(found, expected):
    assert expected and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


CHANGED = {
    'residual_before': True,
    'query_before_ln': True,
    'value_before_softmax': False,
    'temperature': True,
    'dropout_prob': 0.25,
    'key': False,
}
FUSIONS = {
    'dynamic': adapters.DynamicAdapterFusionConfig(),
    'static': adapters.StaticAdapterFusionConfig(),
    'changed': adapters.DynamicAdapterFusionConfig(**CHANGED),
}


@pytest.mark.parametrize('name', [None, 'mix'])
@pytest.mark.parametrize('config', FUSIONS)
def test_fusions_both_ways(source, tmp_path, config, name):
    model = composed(source, FUSIONS[config], name)
    model.save_adapter_fusion(str(tmp_path / 'a'), 'a,b' if name is None else name)
    assert fusion.is_fusion(tmp_path / 'a')
    found = fusion.load(tmp_path / 'a', source.loaded)
    assert (found.name, found.adapters) == (name or 'a,b', ('a', 'b'))
    expected = json.loads((tmp_path / 'a' / 'adapter_fusion_config.json').read_text())
    leaves = params.flatten(found.params)
    sites = {path.split('/')[1] for path in leaves}
    assert sites == {'attention', 'feed_forward'}
    place = f'bert.encoder.layer.1.attention.output.adapter_fusion_layer.{found.name}'
    weight = model.state_dict()[f'{place}.query.weight']
    np.testing.assert_array_equal(leaves['layer_1/attention/query/kernel'], weight.numpy().T)

    fusion.save(found, tmp_path / 'b', source.loaded)
    written = json.loads((tmp_path / 'b' / 'adapter_fusion_config.json').read_text())
    assert written['config'] == expected['config']
    fresh = composed(source, FUSIONS[config], name)
    library.randomise(source, fresh, 9)
    left = {}
    fresh.load_adapter_fusion(str(tmp_path / 'b'), use_safetensors=True, loading_info=left)
    assert not any(left.values())
    check_equal(state(fresh, 'fusion'), state(model, 'fusion'))


def test_a_fusion_may_have_a_head_and_another_name(source, tmp_path):
    model = composed(source)
    options = {'num_labels': 3, 'id2label': library.LABELS}
    model.add_prediction_head(adapters.ClassificationHead(model, 'a,b', **options))
    model.save_adapter_fusion(str(tmp_path / 'a'), 'a,b', with_head='a,b')
    found = fusion.load(tmp_path / 'a', source.loaded, name='both')
    assert found.name == 'both' and found.adapters == ('a', 'b')
    assert found.head.task['labels'] == list(library.LABELS.values())
    fusion.save(found, tmp_path / 'b', source.loaded)
    again = fusion.load(tmp_path / 'b', source.loaded)
    leaves, expected = (params.flatten(x.params) for x in (again, found))
    assert leaves.keys() == expected.keys()
    assert all(np.array_equal(leaves[path], expected[path]) for path in leaves)
    assert again.head.task == found.head.task


def test_a_damaged_fusion_is_refused(source, tmp_path):
    composed(source).save_adapter_fusion(str(tmp_path / 'a'), 'a,b')
    path = tmp_path / 'a' / 'adapter_fusion_config.json'
    good = path.read_text()
    for changes, expected in (
        ({'hidden_size': 64}, 'hidden_size is 64'),
        ({'model_type': 'roberta'}, "model_type is 'roberta'"),
        ({'config': {'query': 'yes'}}, "query='yes'"),
        ({'config': 'odd'}, "config='odd'"),
        ({'config': {'value': False}}, 'value.weight is unexpected'),
        ({'name': 'x,y'}, "no tensors of the fusion 'x,y'"),
        ({'name': 3}, 'name=3'),
        ({'adapter_names': [3]}, r'adapter_names=\[3\]'),
        ({'adapter_names': []}, 'adapter_names'),
    ):
        library.edit(path, **changes)
        with pytest.raises(ValueError, match=expected):
            fusion.load(tmp_path / 'a', source.loaded)
        path.write_text(good)
    deeper = library.write_source(tmp_path / 'deeper', num_hidden_layers=3)
    with pytest.raises(ValueError, match=r'highest layer is 1, expected 2'):
        fusion.load(tmp_path / 'a', deeper.loaded)
    (tmp_path / 'a' / 'pytorch_model_adapter_fusion.bin').unlink()
    with pytest.raises(FileNotFoundError, match='model_adapter_fusion'):
        fusion.load(tmp_path / 'a', source.loaded)


def test_a_fusion_without_its_parameters_is_not_written(source, tmp_path):
    composed(source).save_adapter_fusion(str(tmp_path / 'a'), 'a,b')
    found = fusion.load(tmp_path / 'a', source.loaded)
    del found.params['layer_1']['feed_forward']['value']
    with pytest.raises(ValueError, match='layer_1/feed_forward/value/kernel'):
        fusion.save(found, tmp_path / 'b', source.loaded)


def test_setups_both_ways(source, tmp_path):
    model = composed(source)
    tree = theirs.Stack(theirs.Fuse('a', 'b'), 'c')
    heads = theirs.BatchSplit('a', 'b', batch_sizes=[2, 1])
    model.save_adapter_setup(str(tmp_path / 'a'), tree, head_setup=heads)
    assert setup.is_setup(tmp_path / 'a')
    found = setup.load(tmp_path / 'a', source.loaded)
    assert found.composition == Stack(Fuse('a', 'b'), 'c')
    assert found.head_setup == BatchSplit('a', 'b', batch_sizes=[2, 1])
    assert list(found.adapters) == ['a', 'b', 'c'] and list(found.fusions) == ['a,b']
    assert found.adapters['a'].head and not found.adapters['c'].head and not found.heads

    setup.save(found, tmp_path / 'b', source.loaded)
    fresh = source.model()
    read, read_heads = fresh.load_adapter_setup(str(tmp_path / 'b'), use_safetensors=True)
    assert read == tree and read.children[0] == tree.children[0]
    assert read_heads.to_dict() == heads.to_dict()
    for mark in ('.adapters.', 'fusion', 'heads.'):
        check_equal(state(fresh, mark), state(model, mark))


def test_heads_of_their_own(source, tmp_path):
    model = composed(source)
    model.save_adapter_setup(str(tmp_path / 'a'), theirs.Stack('c'), head_setup='b')
    found = setup.load(tmp_path / 'a', source.loaded)
    assert (list(found.adapters), list(found.heads), found.head_setup) == (['c'], ['b'], 'b')
    setup.save(found, tmp_path / 'b', source.loaded)
    fresh = source.model()
    fresh.load_adapter_setup(str(tmp_path / 'b'), use_safetensors=True)
    check_equal(state(fresh, 'heads.b'), state(model, 'heads.b'))
    with pytest.raises(ValueError, match="needs the head 'z'"):
        setup.save(setup.dataclasses.replace(found, head_setup='z'), tmp_path / 'c', source.loaded)


@pytest.mark.parametrize(
    'ours',
    [
        Stack('a', Split('b', Stack('c'), splits=[3, 4])),
        Average('a', 'b', weights=[1, 3]),
        BatchSplit('a', BatchSplit('b', 'c', batch_sizes=2), batch_sizes=[2, 4]),
        composition.parse('parallel(a, average(b, c))'),
    ],
    ids=str,
)
def test_compositions_are_written_as_the_library_does(ours):
    written = json.loads(json.dumps(setup.to_json(ours)))
    assert setup.from_json(written) == ours
    assert theirs.AdapterCompositionBlock.from_dict(written).to_dict() == written


SINGLE = {'type': 'single', 'children': ['a']}


@pytest.mark.parametrize(
    ('value', 'expected'),
    [
        (None, 'None is no block'),
        ([], 'is no block'),
        ({'type': 'Stack'}, 'is no block'),
        ({'type': 'Stack', 'children': []}, 'is no block'),
        ({'type': 'Stack', 'children': ['a']}, "'a' is no block"),
        ({'type': 'single', 'children': [3]}, 'stack holds 3'),
        ({'type': 'MultiTask', 'children': [SINGLE]}, "'MultiTask' is not supported"),
        ({'type': 'Split', 'children': [SINGLE]}, 'kwargs={}; expected splits'),
        ({'type': 'Split', 'children': [SINGLE], 'kwargs': {'splits': 'a'}}, "splits='a'"),
        ({'type': 'Stack', 'children': [SINGLE], 'kwargs': {'x': 1}}, 'expected none'),
        (
            {'type': 'Fuse', 'children': [{'type': 'Fuse', 'children': [SINGLE]}]},
            'fuse may not hold fuse',
        ),
        ({'type': 'single', 'children': ['../a']}, r"names the part '\.\./a'"),
        ({'type': 'single', 'children': ['..']}, r"names the part '\.\.'"),
        ({'type': 'single', 'children': ['/etc']}, "names the part '/etc'"),
        ({'type': 'single', 'children': ['a\\b']}, 'no name of a folder'),
    ],
    ids=str,
)
def test_a_setup_that_is_none_is_refused(source, tmp_path, value, expected):
    (tmp_path / 'adapter_setup.json').write_text(json.dumps({'adapter_setup': value}))
    with pytest.raises(ValueError, match=expected):
        setup.load(tmp_path, source.loaded)


def test_a_missing_part_is_said(source, tmp_path):
    composed(source).save_adapter_setup(str(tmp_path / 'a'), theirs.Stack('a', 'c'))
    (tmp_path / 'a' / 'c' / 'adapter_config.json').unlink()
    with pytest.raises(FileNotFoundError, match=r'a/c has no adapter_config\.json'):
        setup.load(tmp_path / 'a', source.loaded)
    with pytest.raises(FileNotFoundError, match=r'adapter_setup\.json'):
        setup.load(tmp_path / 'b', source.loaded)
