"""Adapters that are damaged, or made for another backbone."""

import json
import os
import re
import shutil

import command
import numpy as np
import pytest
import toy
from command_lines import predict_line
from safetensors.numpy import load_file, save_file

from adapters_jax.predict import predict

pytestmark = pytest.mark.usefixtures('compiled_once')


def spoilt_copy(toys, folder, spoil):
    """Return a copy of the finished adapter after `spoil(copy)`."""
    copy = folder / 'adapter'
    shutil.copytree(toys / 'run' / 'adapter', copy)
    spoil(copy)
    return copy


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(path, change):
    leaves = load_file(path)
    save_file(change(leaves), path)


def without_first(leaves):
    return dict(sorted(leaves.items())[1:])


DAMAGE = {
    'no folder': (shutil.rmtree, 'is not an adapter: it has no adapter_config.json'),
    'no config': (lambda p: (p / 'adapter_config.json').unlink(), 'found: adapter.safetensors'),
    'half a config': (
        lambda p: (p / 'adapter_config.json').write_text('{"format": '),
        'adapter_config.json is not JSON',
    ),
    'a list for a config': (
        lambda p: (p / 'adapter_config.json').write_text('[]'),
        'is of no known kind .it holds: list.; expected an adapter of this project',
    ),
    'another format': (
        lambda p: change_json(p / 'adapter_config.json', format='peft'),
        'is of no known kind',
    ),
    'a config without method': (
        lambda p: (p / 'adapter_config.json').write_text('{"format": "adapters_jax"}'),
        'lacks name, method, head',
    ),
    'no head': (lambda p: (p / 'head.safetensors').unlink(), 'head.safetensors is missing'),
    'half a tensor file': (
        lambda p: os.truncate(p / 'adapter.safetensors', 100),
        'adapter.safetensors is damaged',
    ),
    'a leaf less': (
        lambda p: change_tensors(p / 'adapter.safetensors', without_first),
        'adapters/default/layer_0/feed_forward/down/bias is missing',
    ),
    'a leaf more': (
        lambda p: change_tensors(
            p / 'adapter.safetensors', lambda x: x | {'adapter/layer_0/x': np.zeros(3)}
        ),
        'adapters/default/layer_0/x is unexpected',
    ),
    'a leaf of another shape': (
        lambda p: change_tensors(p / 'head.safetensors', lambda x: dict.fromkeys(x, np.zeros(2))),
        r'heads/default/dense_0/bias has shape \(2,\), expected \(3,\)',
    ),
    'members that are none': (
        lambda p: change_json(
            p / 'adapter_config.json', method={'architecture': 'union', 'members': 3}
        ),
        'members=3 is not valid; expected a list of methods',
    ),
    'a head with an unknown key': (
        lambda p: change_json(p / 'adapter_config.json', head={'nonsense': 1}),
        'the head has nonsense=1; expected pooling, layers',
    ),
    'a backbone without a name': (
        lambda p: change_json(p / 'adapter_config.json', backbone={}),
        "does not say which backbone it is for: 'name' is None",
    ),
    'labels that are none': (
        lambda p: change_json(
            p / 'adapter_config.json', task={'name': 'classification', 'labels': 3}
        ),
        'labels is 3; expected a list of names',
    ),
    'an unknown method': (
        lambda p: change_json(p / 'adapter_config.json', method={'architecture': 'lorra'}),
        "unknown architecture 'lorra'; known: .*bottleneck",
    ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_adapter(toys, tmp_path, damage):
    spoil, expected = DAMAGE[damage]
    copy = spoilt_copy(toys, tmp_path, spoil)
    with pytest.raises((ValueError, OSError)) as caught:
        predict(copy, [{'text': 'the cat'}])
    assert re.search(expected, str(caught.value)) and '\n' not in str(caught.value)


def test_the_predict_command_refuses_a_damaged_adapter(toys, tmp_path):
    copy = spoilt_copy(toys, tmp_path, DAMAGE['half a tensor file'][0])
    found = command.refused('predict', *predict_line(copy, tmp_path), folder=tmp_path)
    assert 'adapter.safetensors is damaged' in found and 'restore it from its source' in found
    assert not (tmp_path / 'out.jsonl').exists()


@pytest.mark.parametrize(
    ('sizes', 'key'),
    [
        ({'hidden': 24}, 'hidden is 32.*24'),
        ({'layers': 3}, 'layers is 1.*3'),
        ({'seed': 1}, 'fingerprint is'),
    ],
)
def test_an_adapter_made_for_another_backbone(toys, tmp_path, sizes, key):
    other = toy.write_backbone(tmp_path / 'other', **sizes)
    given = predict_line(toys / 'run' / 'adapter', tmp_path, f'--backbone={other}')
    found = command.refused('predict', *given, folder=tmp_path)
    assert re.search(f'made for another backbone: its {key}', found)
    assert str(toys / 'bert') in found


def test_a_backbone_that_has_moved(toys, tmp_path):
    gone = spoilt_copy(toys, tmp_path, lambda p: None)
    described = json.loads((gone / 'adapter_config.json').read_text())['backbone']
    change_json(gone / 'adapter_config.json', backbone=described | {'name': '/gone/bert'})
    given = predict_line(gone, tmp_path)
    found = command.refused('predict', *given, folder=tmp_path)
    assert "'/gone/bert' is not an existing folder" in found and '--backbone' in found
