"""Against files that PyTorch itself writes, and against files made to do harm."""

import io
import os
import pickle
import shutil
import struct
import zipfile
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adapters_jax.interop import torch_pickle

ZIP, LEGACY = True, False
both_formats = pytest.mark.parametrize('as_zip', [ZIP, LEGACY], ids=['zip', 'legacy'])


def save(value, path, as_zip):
    torch.save(value, path, _use_new_zipfile_serialization=as_zip)
    return path


def to_numpy(tensor):
    """What the reader must return for a torch tensor, bit for bit."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype == torch.float8_e4m3fn:
        return tensor.view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)
    return tensor.numpy()


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        wanted = to_numpy(tensor)
        assert found[name].dtype == wanted.dtype, name
        assert found[name].shape == wanted.shape, name
        assert np.ascontiguousarray(found[name]).tobytes() == wanted.tobytes(), name


def state_dict():
    torch.manual_seed(0)
    matrix = torch.randn(5, 7)
    return {
        'matrix': matrix,
        'transposed': matrix.T,
        'slice': matrix[1:4, 2::2],
        'row': matrix[3],
        'expanded': torch.arange(3.0).reshape(3, 1).expand(3, 4),
        'parameter': torch.nn.Parameter(torch.randn(3)),
        'scalar': torch.tensor(2.5),
        'empty': torch.zeros(0, 4),
        'bfloat16': torch.randn(4, 3).bfloat16().T,
        'half': torch.randn(3).half(),
        'double': torch.randn(3).double(),
        'int64': torch.tensor([-(2**62), 5]),
        'int32': torch.tensor([1, -2], dtype=torch.int32),
        'int16': torch.tensor([1, -2], dtype=torch.int16),
        'int8': torch.tensor([1, -2], dtype=torch.int8),
        'uint8': torch.tensor([1, 254], dtype=torch.uint8),
        'uint16': torch.tensor([0, 1, 65535], dtype=torch.uint16)[1:],
        'bool': torch.tensor([True, False, True]),
        'complex': torch.randn(3, dtype=torch.complex64),
        'float8': torch.randn(5).to(torch.float8_e4m3fn),
    }


@both_formats
def test_every_kind_of_tensor_arrives_bit_for_bit(tmp_path, as_zip):
    expected = state_dict()
    assert_same(torch_pickle.load(save(expected, tmp_path / 'f.bin', as_zip)), expected)


@both_formats
def test_the_state_dict_of_a_module(tmp_path, as_zip):
    module = torch.nn.TransformerEncoderLayer(8, 2, 16)
    assert isinstance(module.state_dict(), OrderedDict)
    found = torch_pickle.load(save(module.state_dict(), tmp_path / 'f.bin', as_zip))
    assert_same(found, module.state_dict())


@both_formats
def test_tensors_that_share_a_storage_share_memory(tmp_path, as_zip):
    base = torch.arange(12.0)
    tied = {'a': base, 'b': base[4:].view(2, 4), 'c': torch.zeros(12)}
    found = torch_pickle.load(save(tied, tmp_path / 'f.bin', as_zip))
    assert_same(found, tied)
    assert np.shares_memory(found['a'], found['b'])
    assert not np.shares_memory(found['a'], found['c'])
    assert not found['a'].flags.writeable


@settings(max_examples=40, deadline=None)
@given(data=st.data(), as_zip=st.booleans())
def test_any_view_of_any_storage(tmp_path_factory, data, as_zip):
    rank = data.draw(st.integers(0, 4))
    shape = data.draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank))
    strides = data.draw(st.lists(st.integers(0, 6), min_size=rank, max_size=rank))
    offset = data.draw(st.integers(0, 5))
    reach = sum(max(n - 1, 0) * stride for n, stride in zip(shape, strides, strict=True))
    storage = torch.arange(float(offset + reach + 1))
    view = {'view': torch.as_strided(storage, shape, strides, offset)}
    path = save(view, tmp_path_factory.getbasetemp() / 'view.bin', as_zip)
    assert_same(torch_pickle.load(path), view)


def test_storages_are_views_of_the_mapped_file(tmp_path):
    found = torch_pickle.load(save({'a': torch.zeros(1000)}, tmp_path / 'f.bin', ZIP))['a']
    base = found
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


# --- harm ---


def zip_around(data_pkl, storages=None):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('archive/data.pkl', data_pkl)
        for key, content in (storages or {}).items():
            archive.writestr(f'archive/data/{key}', content)
    return buffer.getvalue()


def legacy_around(data_pkl):
    head = [0x1950A86A20F9469CFC6C, 1001, {'little_endian': True}]
    return b''.join(pickle.dumps(part, 2) for part in head) + data_pkl + pickle.dumps([], 2)


class Calls:
    """Pickles as a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self._call = (function, arguments)

    def __reduce__(self):
        return self._call


CONTAINERS = {'zip': zip_around, 'legacy': legacy_around, 'first': lambda data: data}


@pytest.mark.parametrize('container', CONTAINERS)
@pytest.mark.parametrize('protocol', [0, 2, 4])
@pytest.mark.parametrize(
    'name, make',
    [
        ('system', lambda canary: Calls(os.system, f'touch {canary}')),
        ('eval', lambda canary: Calls(eval, f'__import__("os").mkdir({canary!r})')),
        ('exec', lambda canary: Calls(exec, f'import os; os.mkdir({canary!r})')),
        ('copyfile', lambda canary: Calls(shutil.copyfile, __file__, canary)),
        ('mkdir', lambda canary: Calls(os.mkdir, canary)),
    ],
)
def test_a_harmful_pickle_is_refused_before_it_acts(tmp_path, container, protocol, name, make):
    canary = tmp_path / 'canary'
    payload = pickle.dumps({'weight': make(str(canary))}, protocol)
    pickle.loads(payload)
    assert canary.exists(), 'the trap must work, or the test proves nothing'
    canary.rmdir() if canary.is_dir() else canary.unlink()
    path = tmp_path / 'pytorch_model.bin'
    path.write_bytes(CONTAINERS[container](payload))
    with pytest.raises(torch_pickle.RefusedGlobalError, match=rf'pytorch_model\.bin .*{name}'):
        torch_pickle.load(path)
    assert not canary.exists()


@pytest.mark.parametrize(
    'payload, named',
    [
        (b"cos\nsystem\n(S'true'\ntR.", 'os.system'),
        (b"(S'true'\nios\nsystem\n.", 'os.system'),  # the opcode INST
        (b"(cos\nsystem\nS'true'\no.", 'os.system'),  # OBJ
        (b'\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.', 'os.system'),  # STACK_GLOBAL
        (b'ctorch._utils\n_rebuild_qtensor\n.', 'torch._utils._rebuild_qtensor'),
        (b'ctorch\nload\n.', 'torch.load'),
        (b'ctorch.hub\nload\n.', 'torch.hub.load'),
        (b'ctorch\nFloatStorage.from_file\n.', 'torch.FloatStorage.from_file'),
        (b'ccollections\nOrderedDict.fromkeys\n.', 'collections.OrderedDict.fromkeys'),
        (b'cbuiltins\ngetattr\n.', 'builtins.getattr'),
        (b'c__builtin__\nset\n.', '__builtin__.set'),
        (b'c_codecs\nencode\n.', '_codecs.encode'),
        (b'cnumpy\nndarray\n.', 'numpy.ndarray'),
        (b'cadapters_jax.interop.torch_pickle\n_tensor\n.', 'adapters_jax'),
    ],
)
def test_anything_not_on_the_list_is_refused_by_name(tmp_path, payload, named):
    path = tmp_path / 'f.bin'
    path.write_bytes(zip_around(payload))
    with pytest.raises(torch_pickle.RefusedGlobalError, match=named.replace('.', r'\.')):
        torch_pickle.load(path)


@pytest.mark.parametrize(
    'allowed',
    [
        b'ctorch\nSize\n',
        b'ctorch\nFloatStorage\n',
        b'ctorch\nfloat32\n',
        b'ctorch._utils\n_rebuild_tensor_v2\n',
        b'ctorch._utils\n_rebuild_parameter\n',
        b'ccollections\nOrderedDict\n',
    ],
)
@pytest.mark.parametrize('state', [b"}S'x'\nI1\ns", b"(N}S'x'\nI1\nst"], ids=['dict', 'slots'])
def test_what_is_allowed_cannot_be_altered(tmp_path, allowed, state):
    path = tmp_path / 'f.bin'
    path.write_bytes(zip_around(allowed + state + b'b.'))
    with pytest.raises(ValueError, match='not a whole PyTorch state dict'):
        torch_pickle.load(path)
    expected = state_dict()
    assert_same(torch_pickle.load(save(expected, tmp_path / 'g.bin', ZIP)), expected)


class Forger(pickle.Pickler):
    """Writes tensors with any offset, shape and strides over one storage of floats."""

    def persistent_id(self, value):
        return ('storage', torch.FloatStorage, '0', 'cpu', 4) if value == 'STORAGE' else None


def forged(offset, shape, strides):
    tensor = Calls(
        torch._utils._rebuild_tensor_v2, 'STORAGE', offset, shape, strides, False, OrderedDict()
    )
    buffer = io.BytesIO()
    Forger(buffer, 2).dump({'weight': tensor})
    return zip_around(buffer.getvalue(), {'0': struct.pack('<4f', 1, 2, 3, 4)})


def test_the_forger_can_write_a_good_file(tmp_path):
    (tmp_path / 'f.bin').write_bytes(forged(1, (3,), (1,)))
    np.testing.assert_array_equal(torch_pickle.load(tmp_path / 'f.bin')['weight'], [2, 3, 4])


@pytest.mark.parametrize(
    'offset, shape, strides',
    [
        (0, (5,), (1,)),
        (2, (3,), (1,)),
        (0, (2, 2), (3, 2)),
        (-1, (2,), (1,)),
        (0, (2,), (-1,)),
        (0, (2,), (2**62,)),
        (2**62, (1,), (1,)),
        (0, (2**40, 2**40), (1, 1)),
        (0, (-1,), (1,)),
        (0, (2, 2), (1,)),
        (0, (2.0,), (1,)),
        (0, 'ab', (1, 1)),
    ],
)
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path, offset, shape, strides):
    (tmp_path / 'f.bin').write_bytes(forged(offset, shape, strides))
    with pytest.raises(ValueError, match=r'f\.bin is not a whole PyTorch state dict'):
        torch_pickle.load(tmp_path / 'f.bin')


# --- damage ---


def test_a_legacy_file_cut_inside_the_length_of_an_empty_storage(tmp_path):
    whole = save({'a': torch.zeros(0)}, tmp_path / 'f.bin', LEGACY).read_bytes()
    for missing in range(1, 9):
        (tmp_path / 'f.bin').write_bytes(whole[:-missing])
        with pytest.raises(ValueError, match='ends inside storage'):
            torch_pickle.load(tmp_path / 'f.bin')


@both_formats
def test_a_truncated_file_is_named_wherever_it_ends(tmp_path, as_zip):
    whole = save(state_dict(), tmp_path / 'whole.bin', as_zip).read_bytes()
    path = tmp_path / 'f.bin'
    for length in {0, 1, 4, 100, *range(0, len(whole), 257), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r'f\.bin is not a whole PyTorch state dict'):
            torch_pickle.load(path)


def test_a_flipped_bit_in_a_zipped_storage_is_noticed(tmp_path):
    path = save({'a': torch.full((100,), 7.0)}, tmp_path / 'f.bin', ZIP)
    content = bytearray(path.read_bytes())
    content[content.index(struct.pack('<f', 7.0) * 100) + 200] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match='checksum'):
        torch_pickle.load(path)


@settings(max_examples=150, deadline=None)
@given(place=st.floats(0, 1), byte=st.integers(0, 255), as_zip=st.booleans())
@example(place=0.9928195895839365, byte=1, as_zip=True)  # a place in the file below nought
def test_damage_anywhere_ends_in_one_kind_of_error(tmp_path_factory, place, byte, as_zip):
    folder = tmp_path_factory.getbasetemp()
    whole = folder / f'whole-{as_zip}.bin'
    if not whole.exists():
        save(state_dict(), whole, as_zip)
    content = bytearray(whole.read_bytes())
    content[int(place * (len(content) - 1))] = byte
    (folder / 'damaged.bin').write_bytes(content)
    try:
        arrays = torch_pickle.load(folder / 'damaged.bin')
    except ValueError as error:
        assert 'damaged.bin' in str(error)
    else:
        assert all(isinstance(array, np.ndarray) for array in arrays.values())


@both_formats
@pytest.mark.parametrize(
    'value, complaint',
    [
        ([torch.zeros(1)], 'holds a list'),
        ({'a': torch.zeros(1), 'epoch': 3}, "not named tensors: 'epoch'"),
        ({'state_dict': {'a': torch.zeros(1)}}, "not named tensors: 'state_dict'"),
        ({0: torch.zeros(1)}, 'not named tensors: 0'),
    ],
)
def test_what_is_no_state_dict_is_told_apart(tmp_path, as_zip, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        torch_pickle.load(save(value, tmp_path / 'f.bin', as_zip))


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        torch_pickle.load(tmp_path / 'absent.bin')
