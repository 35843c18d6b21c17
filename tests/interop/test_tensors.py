"""The four layouts of a checkpoint, as transformers and safetensors write them."""

import json
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from adapters_jax.interop import torch_pickle
from adapters_jax.interop.tensors import SafetensorsFile, read_tensors

LAYOUTS = {
    'safetensors': {'safe_serialization': True},
    'sharded safetensors': {'safe_serialization': True, 'max_shard_size': '10KB'},
    'bin': {'safe_serialization': False},
    'sharded bin': {'safe_serialization': False, 'max_shard_size': '10KB'},
}
EXPECTED_FILE = {
    'safetensors': 'model.safetensors',
    'sharded safetensors': 'model.safetensors.index.json',
    'bin': 'pytorch_model.bin',
    'sharded bin': 'pytorch_model.bin.index.json',
}


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=24,
    )
    return transformers.BertModel(config)


@pytest.fixture(scope='module')
def saved(model, tmp_path_factory):
    root = tmp_path_factory.mktemp('layouts')
    for layout, options in LAYOUTS.items():
        model.save_pretrained(root / layout, **options)
    return root


@pytest.fixture
def folder(saved, tmp_path):
    def copy(layout):
        return shutil.copytree(saved / layout, tmp_path / 'checkpoint')

    return copy


@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_gives_the_same_tensors(model, saved, layout):
    assert (saved / layout / EXPECTED_FILE[layout]).is_file()
    tensors = read_tensors(saved / layout)
    expected = model.state_dict()
    assert set(tensors) == set(expected)
    assert len(tensors) == len(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(tensors[name], tensor.numpy(), strict=True)


@pytest.mark.parametrize('layout', ['sharded safetensors', 'sharded bin'])
def test_the_shards_are_several(saved, layout):
    assert len(list((saved / layout).glob('*-of-*'))) > 2


def test_safetensors_are_preferred(model, folder):
    directory = folder('safetensors')
    (directory / 'pytorch_model.bin').write_bytes(b'never read')
    assert set(read_tensors(directory)) == set(model.state_dict())


def test_every_dtype_of_safetensors(tmp_path):
    tensors = {
        'bfloat16': torch.randn(3, 5).bfloat16(),
        'float8': torch.randn(3).to(torch.float8_e4m3fn),
        'odd': torch.tensor([1, 2, 3], dtype=torch.uint8),  # leaves what follows unaligned
        'half': torch.randn(2).half(),
        'double': torch.randn(2).double(),
        'int64': torch.tensor([2**62]),
        'bool': torch.tensor([True, False]),
        'empty': torch.zeros(0, 3),
        'scalar': torch.tensor(3.5),
    }
    safetensors.torch.save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    found = read_tensors(tmp_path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        bits = tensor.view(width[tensor.element_size()]).numpy()
        assert found[name].shape == tuple(tensor.shape)
        assert found[name].flags.aligned
        assert found[name].tobytes() == bits.tobytes()
    assert found['bfloat16'].dtype == ml_dtypes.bfloat16
    assert found['float8'].dtype == ml_dtypes.float8_e4m3fn


def test_tensors_are_mapped_and_not_read(saved):
    tensor = read_tensors(saved / 'safetensors')['embeddings.word_embeddings.weight']
    while tensor.base is not None and not isinstance(tensor, np.memmap):
        tensor = tensor.base
    assert isinstance(tensor, np.memmap)


def test_a_folder_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / 'config.json').write_text('{}')
    (tmp_path / 'tf_model.h5').write_text('')
    with pytest.raises(FileNotFoundError, match=r'it holds config\.json, tf_model\.h5') as error:
        read_tensors(tmp_path)
    assert 'model.safetensors' in str(error.value)


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(FileNotFoundError, match='absent is not a folder'):
        read_tensors(tmp_path / 'absent')


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('kept', [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(folder, layout, kept):
    directory = folder(layout)
    weights = max(
        (p for p in directory.iterdir() if p.suffix != '.json'), key=lambda p: p.stat().st_size
    )
    content = weights.read_bytes()
    weights.write_bytes(content[: int(kept * len(content))])
    with pytest.raises(ValueError, match=f'{weights.name} is not a whole'):
        read_tensors(directory)


@pytest.mark.parametrize('layout', ['safetensors', 'bin'])
def test_a_pointer_of_git_lfs_is_recognised(folder, layout):
    directory = folder(layout)
    pointer = 'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n'
    (directory / EXPECTED_FILE[layout]).write_text(pointer)
    with pytest.raises(ValueError, match='git lfs pull'):
        read_tensors(directory)


def test_a_missing_shard_is_named(folder):
    directory = folder('sharded safetensors')
    shard = sorted(directory.glob('*.safetensors'))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f'missing: {shard.name}; the folder holds'):
        read_tensors(directory)


def test_an_index_that_disagrees_with_its_shards_names_the_tensors(folder):
    directory = folder('sharded bin')
    path = directory / 'pytorch_model.bin.index.json'
    index = json.loads(path.read_text())
    del index['weight_map']['pooler.dense.bias']
    index['weight_map']['invented'] = next(iter(index['weight_map'].values()))
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r'disagree.*: invented, pooler\.dense\.bias$'):
        read_tensors(directory)


@pytest.mark.parametrize('shard', ['../outside.safetensors', '/etc/passwd', 'a/b.safetensors'])
def test_a_shard_outside_the_folder_is_refused(tmp_path, shard):
    index = {'weight_map': {'a': shard}}
    (tmp_path / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(ValueError, match='outside its folder'):
        read_tensors(tmp_path)


@pytest.mark.parametrize('text', ['', '[]', '{}', '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / 'model.safetensors.index.json').write_text(text)
    with pytest.raises(ValueError, match='not an index of shards'):
        read_tensors(tmp_path)


def test_a_harmful_shard_is_refused(folder):
    directory = folder('sharded bin')
    sorted(directory.glob('*-of-*.bin'))[0].write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(torch_pickle.RefusedGlobalError, match=r'os\.system'):
        read_tensors(directory)


def test_a_dtype_that_numpy_lacks_is_named_when_it_is_asked_for(tmp_path):
    tensor = torch.zeros(4, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    safetensors.torch.save_file({'exotic': tensor, 'a': torch.ones(2)}, tmp_path / 'f.safetensors')
    file = SafetensorsFile(tmp_path / 'f.safetensors')
    np.testing.assert_array_equal(file['a'], [1, 1])
    with pytest.raises(ValueError, match='exotic is stored as F8_E8M0'):
        file['exotic']
    with pytest.raises(KeyError):
        file['absent']
