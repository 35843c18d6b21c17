"""Folders of older versions mean what they meant: the library reads them as we do."""

import json

import library_folders as library
import numpy as np
import pytest
import torch

from adapters_jax.interop import adapterhub

TENSORS = {
    'attention.output.adapters': 'attention.output.attention_text_task_adapters',
    'output.adapters': 'output.layer_text_task_adapters',
    'invertible_adapters': 'invertible_lang_adapters',
}
# The options that adapter-transformers 1 had.
FIRST = {
    'adapter_residual_before_ln',
    'ln_after',
    'ln_before',
    'mh_adapter',
    'non_linearity',
    'original_ln_after',
    'original_ln_before',
    'output_adapter',
    'reduction_factor',
    'residual_before_ln',
}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


def config_of(directory):
    return json.loads((directory / 'adapter_config.json').read_text())['config']


def write(source, directory, name, kind, tensors=TENSORS, **changes):
    """Write an adapter as adapter-transformers 1 did; `tensors` are the names that are kept."""
    library.adapted(source, library.CONFIGS[name]).save_adapter(str(directory), 'ad')
    old = {key: value for key, value in config_of(directory).items() if key in FIRST}
    old |= {'attention_type': 'sent-lvl-dynamic', 'new_attention_norm': False, **changes}
    library.edit(directory / 'adapter_config.json', config=old, version=None, type=kind)
    renamed = {}
    for tensor, value in torch.load(directory / 'pytorch_adapter.bin').items():
        new = next(new for new in TENSORS if new in tensor)
        if new in tensors:
            renamed[tensor.replace(new, TENSORS[new])] = value
    legacy = {'_use_new_zipfile_serialization': False}
    torch.save(renamed, directory / 'pytorch_adapter.bin', **legacy)


def check_as_the_library(source, directory):
    """We compute what the library computes with the folder."""
    theirs = library.loaded_by_library(source, directory, safetensors=False)
    folder = adapterhub.load(directory, source.loaded)
    expected = library.library_logits(theirs, source)
    np.testing.assert_allclose(library.our_logits(folder, source), expected, atol=2e-5)
    return folder


@pytest.mark.parametrize(
    ('old', 'today'), [('gelu', 'gelu_new'), ('gelu_orig', 'gelu'), ('relu', 'relu')]
)
def test_names_of_tensors_and_activations(source, tmp_path, old, today):
    write(source, tmp_path / 'a', 'double_seq_bn', 'text_task', non_linearity=old)
    folder = check_as_the_library(source, tmp_path / 'a')
    assert folder.method['architecture'] == 'bottleneck'
    assert folder.method['non_linearity'] == today


BLOCK = {'block_type': 'nice', 'non_linearity': 'gelu', 'reduction_factor': 2}


def test_a_language_adapter(source, tmp_path):
    write(source, tmp_path / 'a', 'seq_bn_inv', 'text_lang', invertible_adapter=BLOCK)
    folder = check_as_the_library(source, tmp_path / 'a')
    kinds = [member['architecture'] for member in folder.method['members']]
    assert kinds == ['bottleneck', 'invertible']


def test_a_task_adapter_that_names_an_invertible_one_it_never_had(source, tmp_path):
    kept = [name for name in TENSORS if name != 'invertible_adapters']
    write(source, tmp_path / 'a', 'seq_bn_inv', 'text_task', kept, invertible_adapter=BLOCK)
    assert check_as_the_library(source, tmp_path / 'a').method['architecture'] == 'bottleneck'
    write(source, tmp_path / 'b', 'seq_bn_inv', 'text_lang', kept, invertible_adapter=BLOCK)
    with pytest.raises(ValueError, match=r'invertible_adapters\.ad\.F\.0\.weight is missing'):
        adapterhub.load(tmp_path / 'b', source.loaded)


@pytest.mark.parametrize(
    ('version', 'alpha'),
    [
        ('adapters.0.2.2', 4),
        ('adapters.1.0.1', 4),
        ('adapters.1.1.0.dev0', 4),
        ('adapters.1.1.0', 6),
        ('adapters.1.10.0', 6),
        ('3.2.1', 6),
    ],
)
def test_loras_that_were_trained_without_their_scale(source, tmp_path, version, alpha):
    library.adapted(source, library.CONFIGS['lora']).save_adapter(str(tmp_path / 'a'), 'ad')
    library.edit(tmp_path / 'a' / 'adapter_config.json', version=version)
    assert check_as_the_library(source, tmp_path / 'a').method['alpha'] == alpha


def test_members_of_a_union_are_read_by_the_same_rules(source, tmp_path):
    library.adapted(source, library.CONFIGS['unipelt']).save_adapter(str(tmp_path / 'a'), 'ad')
    config = config_of(tmp_path / 'a')
    config['configs'][1]['non_linearity'] = 'gelu'
    library.edit(tmp_path / 'a' / 'adapter_config.json', config=config, version=None)
    members = adapterhub.load(tmp_path / 'a', source.loaded).method['members']
    assert members[1]['non_linearity'] == 'gelu_new'


@pytest.mark.parametrize('config', ['pfeiffer', 'seq_bn[reduction_factor=16]'])
def test_names_for_configurations(source, tmp_path, config):
    library.adapted(source, 'seq_bn').save_adapter(str(tmp_path / 'a'), 'ad')
    expected = adapterhub.load(tmp_path / 'a', source.loaded)
    path = tmp_path / 'a' / 'adapter_config.json'
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {'config': config}))
    assert adapterhub.load(tmp_path / 'a', source.loaded).method == expected.method
    path.write_text(json.dumps(values | {'config': None}))
    with pytest.raises(ValueError, match=r'config=None, which does not .*"config": "pfeif'):
        adapterhub.load(tmp_path / 'a', source.loaded)
    given = adapterhub.load(tmp_path / 'a', source.loaded, config=config)
    assert given.method == expected.method
    path.write_text(json.dumps(values | {'config': None, 'config_id': 'pfeiffer'}))
    assert adapterhub.load(tmp_path / 'a', source.loaded).method == expected.method
