"""A folder that is not what it should be is refused in a sentence, whatever is wrong with it."""

import json
import shutil

import library_folders as library
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adapters_jax.interop import adapterhub

CONFIG = 'adapter_config.json'
QUERY = 'bert.encoder.layer.1.attention.self.query.loras.ad'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    sizes = {'hidden_size': 8, 'num_attention_heads': 2, 'intermediate_size': 8, 'vocab_size': 9}
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert', **sizes)


@pytest.fixture(scope='module')
def saved(source, tmp_path_factory):
    """Return a folder with one small adapter in each of the two formats."""
    directory = tmp_path_factory.mktemp('saved')
    model = library.adapted(source, library.CONFIGS['lora'])
    model.save_adapter(str(directory / 'torch'), 'ad')
    model.save_adapter(str(directory / 'safetensors'), 'ad', use_safetensors=True)
    return directory


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved / 'safetensors', tmp_path / 'a')


def config(**changes):
    def change(folder):
        path = folder / CONFIG
        values = json.loads(path.read_text())['config'] | changes
        library.edit(path, config={k: v for k, v in values.items() if v != 'absent'})

    return change


def top(**changes):
    return lambda folder: library.edit(folder / CONFIG, **changes)


def tensors(**changes):
    def change(folder):
        path = folder / 'adapter.safetensors'
        found = load_file(path)
        for name, tensor in changes.items():
            found[f'{QUERY}.{name}'] = tensor
        save_file({name: x for name, x in found.items() if x is not None}, path)

    return change


def text(value):
    return lambda folder: (folder / CONFIG).write_text(value)


def huge_header(folder):
    path = folder / 'adapter.safetensors'
    path.write_bytes((2**62).to_bytes(8, 'little') + path.read_bytes()[8:])


MISTAKES = {
    'not JSON': (text('{'), 'is not JSON'),
    'deep JSON': (text('[' * 100_000), 'is not JSON'),
    'not UTF-8': (lambda f: (f / CONFIG).write_bytes(b'\xff{}'), 'is not JSON'),
    'a list': (text('[]'), 'holds a list'),
    'no name': (top(name=None), 'name=None; expected text'),
    'a name of numbers': (top(name=3), 'name=3; expected text'),
    'another name': (top(name='other'), 'loras.other.lora_A is missing'),
    'a path for a name': (top(name='../ad'), r'loras\.\.\./ad\.lora_A is missing'),
    'another hidden size': (top(hidden_size=64), 'its hidden_size is 64, that of .* is 8'),
    'another model': (top(model_type='roberta'), "its model_type is 'roberta'"),
    'no config': (top(config=None), 'does not say what the adapter is'),
    'a config of numbers': (top(config=3), 'config=3'),
    'an unknown preset': (top(config='odd'), "'odd' is no configuration of `adapters`; known: "),
    'an unknown architecture': (config(architecture='odd'), "unknown architecture 'odd'; known: "),
    'architecture of a list': (config(architecture=[]), r'architecture=\[\]'),
    'another method': (config(architecture='reft'), 'lacks layers, prefix_positions'),
    'another known method': (top(config='seq_bn'), 'is missing; .* and '),
    'r of text': (config(r='8'), "r='8' is not valid; expected a whole number"),
    'r of another size': (config(r=3), r'lora_A has shape \(4, 8\), expected \(3, 8\)'),
    'r of no size': (config(r=0), 'r=0 is not at least 1'),
    'r without bound': (config(r=10**12), 'r=1000000000000, but the file holds'),
    'a projection': (config(attn_matrices=['q', 'x']), 'attn_matrices='),
    'a projection that is not there': (config(attn_matrices=['k']), 'key.loras.ad.lora_A is miss'),
    'leave_out': (config(leave_out=[5]), 'leave_out names layer 5'),
    'leave_out of text': (config(leave_out='0'), "leave_out='0'"),
    'one layer only': (config(leave_out=[1]), 'highest layer is 1, expected 0'),
    'dropout': (config(dropout=2), 'dropout=2'),
    'scale with r': (config(composition_mode='scale'), "composition_mode='scale' with r=4"),
    'a union of nothing': (top(config={'architecture': 'union'}), 'configs=None'),
    'a union of text': (
        top(config={'architecture': 'union', 'configs': ['seq_bn']}),
        "a union has configs=\\['seq_bn'\\]",
    ),
    'a union of two alike': (
        top(config={'architecture': 'union', 'configs': [{'architecture': 'lora', 'r': 4}] * 2}),
        'both act at layer_0/attention/query',
    ),
    'a bottleneck nowhere': (
        top(
            config={'mh_adapter': False, 'output_adapter': False, 'reduction_factor': 2}
            | {'non_linearity': 'relu'}
        ),
        'neither an adapter after a sub-layer nor inv_adapter',
    ),
    'a bottleneck of nothing': (top(config={}), 'lacks mh_adapter, output_adapter'),
    'an activation': (
        top(
            config={'mh_adapter': True, 'output_adapter': True, 'reduction_factor': 2}
            | {'non_linearity': 'step'}
        ),
        "unknown activation 'step'",
    ),
    'a missing tensor': (tensors(lora_A=None), r'query\.loras\.ad\.lora_A is missing'),
    'another tensor': (tensors(lora_C=torch.ones(2)), r'query\.loras\.ad\.lora_C is unexpected'),
    'another shape': (tensors(lora_A=torch.ones(8, 4)), r'has shape \(8, 4\), expected \(4, 8\)'),
    'NaN': (tensors(lora_B=torch.full((8, 4), torch.nan)), 'numbers that are not finite'),
    'infinity': (tensors(lora_B=torch.full((8, 4), -torch.inf)), 'numbers that are not finite'),
    'integers': (tensors(lora_B=torch.ones(8, 4, dtype=torch.int64)), 'holds int64'),
    'a huge header': (huge_header, 'is not a whole safetensors file'),
    'an empty file': (lambda f: (f / 'adapter.safetensors').write_bytes(b''), 'not a whole'),
    'a pointer': (
        lambda f: (f / 'adapter.safetensors').write_bytes(b'version https://git-lfs.x/spec'),
        'Git LFS pointer',
    ),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_mistakes(source, folder, mistake):
    change, expected = MISTAKES[mistake]
    change(folder)
    with pytest.raises(ValueError, match=expected) as caught:
        adapterhub.load(folder, source.loaded)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', [CONFIG, 'adapter.safetensors'])
def test_missing_files(source, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f'{name}.*it holds'):
        adapterhub.load(folder, source.loaded)
    with pytest.raises(FileNotFoundError, match='it holds nothing'):
        adapterhub.load(folder / 'none', source.loaded)


@pytest.mark.parametrize('name', ['', '../x', 'a/b'])
def test_names_that_are_none(source, folder, name):
    with pytest.raises(ValueError, match='cannot be named'):
        adapterhub.load(folder, source.loaded, name=name)


def test_another_depth(source, folder, tmp_path):
    sizes = {'hidden_size': 8, 'num_attention_heads': 2, 'intermediate_size': 8, 'vocab_size': 9}
    deeper = library.write_source(tmp_path / 'deeper', num_hidden_layers=3, **sizes)
    shallower = library.write_source(tmp_path / 'shallower', num_hidden_layers=1, **sizes)
    for other, depth in ((deeper, 2), (shallower, 0)):
        with pytest.raises(ValueError, match=f'highest layer is 1, expected {depth}'):
            adapterhub.load(folder, other.loaded)


def test_copies_must_agree(source, tmp_path):
    prefix = library.adapted(source, library.CONFIGS['prefix_tuning_flat'])
    prefix.save_adapter(str(tmp_path / 'a'), 'ad')
    path = tmp_path / 'a' / 'pytorch_adapter.bin'
    found = torch.load(path)
    copies = [name for name in found if '.pool.' in name]
    assert len(copies) == 2
    # They may be left out, all or some, but not differ.
    torch.save({name: x for name, x in found.items() if name not in copies}, path)
    adapterhub.load(tmp_path / 'a', source.loaded)
    torch.save(found | {copies[0]: found[copies[0]] + 1}, path)
    with pytest.raises(ValueError, match=r'pool.* should be a copy of .*, but differs'):
        adapterhub.load(tmp_path / 'a', source.loaded)


def test_two_names_for_one_tensor(source, folder):
    path = folder / 'adapter.safetensors'
    found = load_file(path)
    save_file(found | {f'{QUERY}.lora_A'.removeprefix('bert.'): torch.ones(4, 8)}, path)
    with pytest.raises(ValueError, match='has two tensors for encoder'):
        adapterhub.load(folder, source.loaded)


@pytest.mark.parametrize('part', ['adapter', 'model_head'])
def test_two_files_of_one_part_must_agree(source, saved, folder, caplog, part):
    pickled = {'adapter': 'pytorch_adapter.bin', 'model_head': 'pytorch_model_head.bin'}[part]
    expected = library.our_logits(adapterhub.load(folder, source.loaded), source)
    shutil.copy(saved / 'torch' / pickled, folder / pickled)
    again = library.our_logits(adapterhub.load(folder, source.loaded), source)
    np.testing.assert_array_equal(again, expected)
    found = torch.load(folder / pickled)
    name = next(iter(found))
    torch.save(found | {name: found[name] + 1}, folder / pickled)
    with pytest.raises(ValueError, match=f'{part}.safetensors and {pickled} with different .*sta'):
        adapterhub.load(folder, source.loaded)
    assert not caplog.records
    (folder / pickled).write_bytes(b'version https://git-lfs.x/spec')
    adapterhub.load(folder, source.loaded)
    assert f'{pickled} beside it is not' in caplog.text


def test_a_pickle_that_calls_is_refused(source, saved, tmp_path):
    directory = shutil.copytree(saved / 'torch', tmp_path / 'a')
    (directory / 'pytorch_adapter.bin').write_bytes(
        b'\x80\x02ccommands\ngetoutput\nX\x04\x00\x00\x00true\x85R.'
    )
    with pytest.raises(ValueError):
        adapterhub.load(directory, source.loaded)


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('{"config": null}', True),
        ('{"config": {}, "name": "a"}', True),
        ('{"config": {}, "peft_type": "LORA"}', False),
        ('{"config": {}, "format": "adapters_jax"}', False),
        ('{}', False),
        ('[]', False),
        ('{', False),
    ],
)
def test_what_is_a_folder_of_this_kind(tmp_path, content, expected):
    (tmp_path / CONFIG).write_text(content)
    assert adapterhub.is_folder(tmp_path) is expected
    assert not adapterhub.is_folder(tmp_path / 'none')


FILES = {
    'torch': ('adapter_config.json', 'pytorch_adapter.bin', 'pytorch_model_head.bin'),
    'safetensors': ('head_config.json', 'adapter.safetensors', 'model_head.safetensors'),
}
_fuzz = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize('kind', FILES)
@given(data=st.data())
@_fuzz
def test_truncated_files(source, saved, tmp_path_factory, kind, data):
    directory = tmp_path_factory.mktemp('cut') / 'a'
    shutil.copytree(saved / kind, directory)
    path = directory / data.draw(st.sampled_from(FILES[kind]))
    whole = path.read_bytes().rstrip()
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    with pytest.raises(ValueError):
        adapterhub.load(directory, source.loaded)


@pytest.mark.parametrize('kind', FILES)
@given(data=st.data())
@_fuzz
def test_changed_bytes(source, saved, tmp_path_factory, kind, data):
    """Nothing but the two kinds of error comes out, and what is read is whole and finite."""
    directory = tmp_path_factory.mktemp('changed') / 'a'
    shutil.copytree(saved / kind, directory)
    path = directory / data.draw(st.sampled_from(FILES[kind]))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(bytes(content))
    try:
        found = adapterhub.load(directory, source.loaded)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return
    for tree in (found.adapter_params, found.head_params):
        assert all(np.isfinite(x).all() for x in _leaves(tree))


def _leaves(tree):
    return [x for v in tree.values() for x in (_leaves(v) if isinstance(v, dict) else [v])]
