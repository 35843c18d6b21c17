"""What `adapters` writes computes the same here, and what is written here the same there."""

import dataclasses
import json

import adapters
import jax
import library_folders as library
import numpy as np
import pytest
import torch

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.union import Union
from adapters_jax.interop import adapter_folder, adapterhub
from adapters_jax.interop.adapterhub import configs, presets, schema

TOLERANCE = 2e-5


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


@pytest.fixture(scope='module')
def robertas(tmp_path_factory):
    directory = tmp_path_factory.mktemp('backbones')
    return {
        family: library.write_source(directory / family, family, pad_token_id=1)
        for family in ('roberta', 'xlm-roberta')
    }


def check_both_ways(source, config, directory, padded=True):
    """Load what the library saved, compare, save it, and compare what the library loads."""
    theirs = library.adapted(source, config)
    expected = library.library_logits(theirs, source, padded)
    assert np.ptp(expected, axis=0).max() > 0.01  # the texts tell in the logits
    theirs.save_adapter(str(directory / 'theirs'), 'ad')
    assert adapterhub.is_folder(directory / 'theirs')
    folder = adapterhub.load(directory / 'theirs', source.loaded)
    assert (folder.name, folder.task['labels']) == ('ad', ['no', 'größer', 'yes'])
    np.testing.assert_allclose(
        library.our_logits(folder, source, padded), expected, atol=TOLERANCE, rtol=0
    )
    adapterhub.save(folder, directory / 'ours', source.loaded)
    again = library.loaded_by_library(source, directory / 'ours')
    np.testing.assert_allclose(
        library.library_logits(again, source, padded), expected, atol=TOLERANCE, rtol=0
    )
    return folder


@pytest.mark.shows('adapterhub', parameter='name', presets=library.PRESETS)
@pytest.mark.parametrize('name', library.CONFIGS)
def test_every_method_both_ways(source, tmp_path, name):
    check_both_ways(source, library.CONFIGS[name], tmp_path, padded=name not in library.GATED)


@pytest.mark.parametrize(
    ('family', 'name'),
    [
        ('roberta', 'double_seq_bn_inv'),
        ('roberta', 'lora'),
        ('roberta', 'prompt_tuning'),
        ('xlm-roberta', 'mam'),
    ],
)
def test_other_families(robertas, tmp_path, family, name):
    check_both_ways(robertas[family], library.CONFIGS[name], tmp_path)


def test_a_prompt_that_began_as_a_text(source, tmp_path):
    """Its words are of no account any more, and its tokenizer may be anywhere."""
    model = library.adapted(source, library.CONFIGS['prompt_tuning'])
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    path = tmp_path / 'a' / 'adapter_config.json'
    config = json.loads(path.read_text())['config']
    began = {'prompt_init': 'from_string', 'prompt_init_text': 'Is it good?'}
    library.edit(path, config=config | began)
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.method['prompt_init_text'] == 'Is it good?'
    expected = library.library_logits(model, source)
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=TOLERANCE)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    library.loaded_by_library(source, tmp_path / 'b')


@pytest.mark.parametrize('name', ['par_bn', 'prompt_tuning', 'vera', 'mam', 'loreft', 'compacter'])
def test_another_name(source, tmp_path, name):
    """The library itself loads nothing for some methods under another name."""
    library.adapted(source, library.CONFIGS[name]).save_adapter(str(tmp_path / 'a'), 'ad')
    first = adapterhub.load(tmp_path / 'a', source.loaded)
    second = adapterhub.load(tmp_path / 'a', source.loaded, name='x.y')
    assert second.name == 'x.y'
    assert dataclasses.replace(second, name='ad').method == first.method
    for field in ('adapter_params', 'head_params'):
        assert bits(getattr(first, field)) == bits(getattr(second, field))


def bits(tree):
    return {path: np.asarray(x).tobytes() for path, x in params.flatten(tree).items()}


def test_the_description(source, tmp_path):
    library.adapted(source, library.CONFIGS['seq_bn']).save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.backbone == source.loaded.describe()
    assert (folder.max_length, folder.pair, folder.backbone_params) == (40, None, {})
    assert registry.from_json(folder.method).reduction_factor == 4
    assert adapterhub.backbone_name(tmp_path / 'a') == ''
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    assert adapterhub.backbone_name(tmp_path / 'b') == source.loaded.name
    assert adapter_folder.load(adapter_folder.save(folder, tmp_path / 'c')).method == folder.method


def test_safetensors_and_pickles_hold_the_same(source, tmp_path):
    model = library.adapted(source, library.CONFIGS['dora'])
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    model.save_adapter(str(tmp_path / 'b'), 'ad', use_safetensors=True)
    assert not list((tmp_path / 'b').glob('*.bin'))
    a, b = (adapterhub.load(tmp_path / name, source.loaded) for name in 'ab')
    assert bits(a.adapter_params) == bits(b.adapter_params)
    assert bits(a.head_params) == bits(b.head_params)


def test_nothing_pickled_is_written(source, tmp_path):
    library.adapted(source, library.CONFIGS['lora']).save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    assert sorted(path.name for path in (tmp_path / 'b').iterdir()) == [
        'adapter.safetensors',
        'adapter_config.json',
        'head_config.json',
        'model_head.safetensors',
    ]


def test_a_bare_model_writes_names_without_a_prefix(source, tmp_path):
    """`adapters.init` of a model without heads: the encoder's names stand alone."""
    bare = library.adapted(source, library.CONFIGS['mam']).bert
    bare.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    library.adapted(source, library.CONFIGS['mam']).save_adapter(str(tmp_path / 'b'), 'ad')
    whole = adapterhub.load(tmp_path / 'b', source.loaded)
    assert (folder.head, folder.task, folder.head_params) == ({}, {}, {})
    assert bits(folder.adapter_params) == bits(whole.adapter_params)


def test_half_precision_is_read_in_single(source, tmp_path):
    model = library.adapted(source, library.CONFIGS['seq_bn']).to(torch.bfloat16)
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    leaves = params.flatten(folder.adapter_params)
    assert {x.dtype for x in leaves.values()} == {np.dtype('float32')}
    named = dict(model.named_parameters())
    theirs = named['bert.encoder.layer.1.output.adapters.ad.adapter_up.weight']
    ours = leaves['layer_1/feed_forward/up/kernel']
    np.testing.assert_array_equal(ours, theirs.detach().float().numpy().T)


def test_direft(source, tmp_path):
    """The library forgets that nothing is subtracted; what is written here computes the same."""
    theirs = library.adapted(source, adapters.DiReftConfig(r=2, dropout=0.0))
    expected = library.library_logits(theirs, source)
    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    forgotten = adapterhub.load(tmp_path / 'a', source.loaded)
    reloaded = library.library_logits(library.loaded_by_library(source, tmp_path / 'a'), source)
    found = library.our_logits(forgotten, source)
    np.testing.assert_allclose(found, reloaded, atol=TOLERANCE, rtol=0)
    assert np.abs(found - expected).max() > 0.01

    library.edit(
        tmp_path / 'a' / 'adapter_config.json',
        config=json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())['config']
        | {'subtract_projection': False},
    )
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=TOLERANCE)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    again = library.loaded_by_library(source, tmp_path / 'b')
    np.testing.assert_allclose(library.library_logits(again, source), expected, atol=TOLERANCE)


@pytest.mark.parametrize(('alpha', 'dora'), [(4, False), (6, False), (4, True)])
def test_diagonal_vera_stays_vera(source, tmp_path, alpha, dora):
    """With vectors where the library has matrices, an adapter is VeRA as its paper has it."""
    theirs = library.adapted(source, adapters.VeraConfig(r=4, alpha=alpha, use_dora=dora))
    with torch.no_grad():
        for name, x in theirs.named_parameters():
            if name.endswith(('vera_D', 'vera_B')):
                x.copy_(torch.diag(x.diagonal()))
    expected = library.library_logits(theirs, source)
    theirs.save_adapter(str(tmp_path / 'a'), 'ad')
    folder = adapterhub.load(tmp_path / 'a', source.loaded)
    assert folder.method['architecture'] == ('dvora' if dora else 'vera')
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=TOLERANCE)
    adapterhub.save(folder, tmp_path / 'b', source.loaded)
    again = library.loaded_by_library(source, tmp_path / 'b')
    np.testing.assert_allclose(library.library_logits(again, source), expected, atol=TOLERANCE)


def fresh(source, method, name='ad', seed=0):
    """Return an adapter of our own with noise on every leaf and a head."""
    method = registry.create(method) if isinstance(method, str) else method
    tree = method.init(jax.random.key(seed), source.loaded.config.dimensions, source.loaded.params)
    rng = np.random.default_rng(seed)
    noisy = {
        path: np.asarray(x + 0.2 * rng.standard_normal(x.shape), np.float32)
        for path, x in params.flatten(tree).items()
        if 'constants' not in path.split('/')
    }
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return adapter_folder.AdapterFolder(
        name=name,
        method=method.to_json(),
        head={'pooling': 'pooler', 'layers': 1, 'activation': 'tanh', 'dropout': 0.0},
        task={'name': 'classification', 'labels': ['a', 'b', 'c']},
        backbone=source.loaded.describe(),
        max_length=40,
        pair=False,
        adapter_params=params.unflatten(noisy),
        head_params={'dense_0': {'kernel': draw(32, 3), 'bias': draw(3)}},
    )


OURS = [
    'seq_bn[size=5,reduction_factor=None]',
    'double_seq_bn[size=3,reduction_factor=None,init_weights=zero,scaling=2]',
    'lora[r=4,alpha=6,rank_stabilised=True]',
    'lora[r=4,alpha_pattern={0: 2, "1/query": 3}]',
    'dora[r=4,alpha=6,scale_bias=True]',
    'dora[r=4,alpha=6,scale_bias=True,scale_norm=False]',
    'vera[r=4,projection_seed=3]',
    'direft[leave_out=[0],suffix_positions=1]',
    'loreft[r=32]',  # as wide as the backbone, where torch has another parametrisation
    'ia3[scale_outputs=[key,value,up],scale_inputs=[]]',
    'compacter[reduction_factor=4,learn_phm=False,init_weights_seed=3]',
]


@pytest.mark.shows(
    'adapterhub',
    parameter='method',
    presets={'direft[leave_out=[0],suffix_positions=1]': ['direft']},
)
@pytest.mark.parametrize('method', OURS)
def test_our_own_adapters_in_the_library(source, tmp_path, method):
    folder = fresh(source, method)
    expected = library.our_logits(folder, source)
    adapterhub.save(folder, tmp_path / 'a', source.loaded)
    theirs = library.loaded_by_library(source, tmp_path / 'a')
    np.testing.assert_allclose(library.library_logits(theirs, source), expected, atol=TOLERANCE)


def test_gates_and_scales(source, tmp_path):
    """The library ignores alpha / r where there is a gate; here the factors take it in."""
    folder = fresh(source, 'lora[r=4,alpha=6,use_gating=True]')
    expected = library.our_logits(folder, source, padded=False)
    adapterhub.save(folder, tmp_path / 'a', source.loaded)
    theirs = library.loaded_by_library(source, tmp_path / 'a')
    found = library.library_logits(theirs, source, padded=False)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize('size', [1, 5, 7, 11, 31, 32, 33, 100])
@pytest.mark.parametrize('hidden', [32, 384, 768, 1000])
def test_every_width_has_a_factor(size, hidden):
    factor = configs._factor(size, hidden)
    assert int(hidden // json.loads(json.dumps(factor))) == size


REFUSED = {
    'houlsby[size=4]': 'train_norms',
    'lora[rank_pattern={0: 2}]': 'rank_pattern',
    'lora[attn_matrices=[o]]': "attn_matrices with 'o'",
    'dora': 'scale_bias',
    'ia3': 'scale_inputs',
    'vera[output_lora=True]': 'several widths',
    'prompt_tuning[site=words,prompt_length=3]': "site='words'",
    'prefix_tuning[shift_positions=True,prefix_length=3]': 'shift_positions',
    'direft[non_linearity=relu]': 'subtract_projection=False',
    'attention': "'attention'",
    'adalora': "'adalora'",
    'head': "'head'",
    'lora[attn_matrices=[q]]|ia3[scale_outputs=[value],scale_inputs=[]]': 'two lora members',
}


@pytest.mark.parametrize('method', REFUSED)
def test_what_the_library_has_no_place_for_is_refused(source, tmp_path, method):
    with pytest.raises(ValueError, match=REFUSED[method]):
        adapterhub.save(fresh(source, method), tmp_path / 'a', source.loaded)
    assert not list(tmp_path.iterdir())


def test_backbone_leaves_and_dots_in_names_are_refused(source, tmp_path):
    folder = fresh(source, 'par_bn')
    with pytest.raises(ValueError, match=r"'a\.b'; give it another"):
        adapterhub.save(dataclasses.replace(folder, name='a.b'), tmp_path / 'a', source.loaded)
    tuned = dataclasses.replace(folder, backbone_params={'layer_0': {'bias': np.zeros(3)}})
    with pytest.raises(ValueError, match='layer_0'):
        adapterhub.save(tuned, tmp_path / 'a', source.loaded)


def test_a_mean_head_is_left_out_and_said(source, tmp_path, caplog):
    folder = fresh(source, 'par_bn')
    folder = dataclasses.replace(folder, head=folder.head | {'pooling': 'mean'})
    adapterhub.save(folder, tmp_path / 'a', source.loaded)
    assert "pooling 'mean'" in caplog.text
    assert not list((tmp_path / 'a').glob('*head*'))
    library.loaded_by_library(source, tmp_path / 'a')


def test_configs_are_those_of_the_library(source):
    """Every field of every preset, and of every class."""
    for name, theirs in adapters.ADAPTER_CONFIG_MAP.items():
        found = full(presets.resolve(name))
        members = found.get('configs', [found])
        expected = json.loads(json.dumps(theirs.to_dict()))
        for member, original in zip(members, expected.get('configs', [expected]), strict=True):
            assert member == original
    assert presets.resolve('seq_bn[reduction_factor=8]|lora')['configs'][0]['reduction_factor'] == 8


def full(values):
    if values.get('architecture') == 'union':
        return values | {'configs': [full(member) for member in values['configs']]}
    return schema.SCHEMAS[values.get('architecture')].from_json(values).to_json()


# What becomes of the others depends on their tensors.
INDEPENDENT = [
    name for name, config in library.CONFIGS.items() if 'lora' not in str(config.to_dict())
]


@pytest.mark.parametrize('name', INDEPENDENT)
def test_configs_come_back(source, name):
    """Config to method to config is the identity."""
    values = json.loads(json.dumps(library.CONFIGS[name].to_dict()))
    dimensions = source.loaded.config.dimensions
    written = [configs.write(method, dimensions) for _, method in configs.read(values)]
    assert json.loads(json.dumps(configs.join(written, dimensions))) == values


@pytest.mark.slow
@pytest.mark.parametrize('name', library.CONFIGS)
def test_minilm(minilm, tmp_path, name):
    check_both_ways(minilm, library.CONFIGS[name], tmp_path, name not in library.GATED)


@pytest.fixture(scope='module')
def minilm():
    return library.pretrained_source('minilm')


def test_unions_are_unions_of_ours(source, tmp_path):
    library.adapted(source, library.CONFIGS['unipelt']).save_adapter(str(tmp_path / 'a'), 'ad')
    method = registry.from_json(adapterhub.load(tmp_path / 'a', source.loaded).method)
    assert isinstance(method, Union)
    assert list(method.named()) == ['prefix_tuning', 'bottleneck', 'lora']
