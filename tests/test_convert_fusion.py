"""Fusions of AdapterHub go through the command line: converted, pruned, predicted with."""

import json

import adapters
import command
import numpy as np
import pytest
import torch
import toy
import transformers
from adapters.composition import Fuse

from adapters_jax.adapters import registry
from adapters_jax.interop import formats
from adapters_jax.params import flatten

pytestmark = pytest.mark.usefixtures('compiled_once')
TEXTS = ['the cat', 'bread and soup and rice', 'a storm very near .']


@pytest.fixture(scope='module')
def hub(tmp_path_factory):
    """A backbone, a fusion of the library over it as a set-up and alone, and its logits."""
    folder = tmp_path_factory.mktemp('hub')
    backbone = toy.write_backbone(folder / 'bert', layers=2)
    torch.manual_seed(0)
    model = adapters.BertAdapterModel.from_pretrained(backbone)
    for name in 'abc':
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
    model.add_adapter_fusion(['a', 'b', 'c'])
    labels = dict(enumerate(sorted(toy.TOPICS)))
    options = {'num_labels': len(labels), 'id2label': labels}
    model.add_prediction_head(adapters.ClassificationHead(model, 'a,b,c', **options))
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if 'adapter' in name or 'heads' in name:
                leaf.add_(0.3 * torch.randn_like(leaf))
    block = Fuse('a', 'b', 'c')
    model.set_active_adapters(block)
    model.active_head = 'a,b,c'
    model.eval().save_adapter_setup(str(folder / 'setup'), block, head_setup='a,b,c')
    model.save_adapter_fusion(str(folder / 'alone'), 'a,b,c', with_head='a,b,c')
    for name in 'abc':
        model.save_adapter(str(folder / f'own_{name}'), name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone)
    inputs = tokenizer(TEXTS, padding=True, return_tensors='pt')
    with torch.no_grad():
        return folder, backbone, model(**inputs)[0].numpy()


def run(name, tmp_path, **arguments):
    done = command.run(name, *(f'--{k}={v}' for k, v in arguments.items()), folder=tmp_path / name)
    assert done.status == 0, done.err
    return done.out


def logits(adapter, tmp_path, backbone):
    given, found = tmp_path / 'in.jsonl', tmp_path / 'out.jsonl'
    given.write_text('\n'.join(json.dumps({'text': text}) for text in TEXTS))
    run('predict', tmp_path, adapter=adapter, input=given, output=found, backbone=backbone)
    return np.array([row['logits'] for row in toy.read_lines(found)])


def test_a_set_up_is_predicted_with_and_converted_both_ways(hub, tmp_path):
    folder, backbone, expected = hub
    assert np.abs(expected).max() > 0.01
    found = logits(folder / 'setup', tmp_path, backbone)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    ours, back = tmp_path / 'ours', tmp_path / 'back'
    options = {'source': folder / 'setup', 'target': ours, 'backbone': backbone}
    run('convert', tmp_path, format='adapters_jax', **options)
    np.testing.assert_allclose(logits(ours, tmp_path, backbone), expected, atol=2e-5)
    run('convert', tmp_path, source=ours, target=back, format='adapterhub', backbone=backbone)
    assert (back / 'adapter_setup.json').exists()
    np.testing.assert_allclose(logits(back, tmp_path, backbone), expected, atol=2e-5)


def test_a_fusion_alone_is_joined_with_its_adapters(hub, tmp_path):
    folder, backbone, expected = hub
    options = {'source': folder / 'alone', 'target': tmp_path / 'ours', 'backbone': backbone}
    options |= {'format': 'adapters_jax'}
    members = ','.join(f'{name}={folder}/own_{name}' for name in 'abc')
    run('convert', tmp_path, members=members, **options)
    np.testing.assert_allclose(logits(tmp_path / 'ours', tmp_path, backbone), expected, atol=2e-5)
    flags = [f'--{k}={v}' for k, v in (options | {'target': tmp_path / 'other'}).items()]
    sentence = command.refused('convert', *flags, folder=tmp_path / 'log')
    assert "the adapter 'a' lies neither in it nor beside it" in sentence
    assert '--members=a=DIR' in sentence


@pytest.mark.parametrize(
    'format', ['adapters_jax', pytest.param('adapterhub', marks=pytest.mark.slow)]
)
def test_keep_leaves_the_other_adapters_out(hub, tmp_path, format):
    folder, backbone, _ = hub
    target = tmp_path / 'pruned'
    options = {'source': folder / 'setup', 'target': target, 'backbone': backbone}
    run('convert', tmp_path, format=format, keep='a,c', **options)
    held, _ = formats.load(target, backbone)
    whole, _ = formats.load(folder / 'setup', backbone)
    method = registry.from_json(held.method)
    assert method.expression == 'fuse(a, c)' and set(method.members) == {'a', 'c'}
    leaves, before = flatten(held.adapter_params), flatten(whole.adapter_params)
    assert leaves
    for path, leaf in leaves.items():
        np.testing.assert_array_equal(leaf, before[path.replace('fusion/a,c/', 'fusion/a,b,c/')])
    assert logits(target, tmp_path, backbone).shape == (3, len(toy.TOPICS))


def test_what_cannot_be_kept(hub, tmp_path):
    folder, backbone, _ = hub
    for source, keep, said in (
        (folder / 'setup', 'a,z', r"['z'] are not fused; fused are a, b, c"),
        (folder / 'own_a', 'a', "'a' is one adapter (bottleneck)"),
    ):
        flags = {'source': source, 'target': tmp_path / 'x', 'format': 'adapters_jax'}
        flags |= {'backbone': backbone, 'keep': keep}
        given = [f'--{k}={v}' for k, v in flags.items()]
        assert said in command.refused('convert', *given, folder=tmp_path / 'log')
    assert not (tmp_path / 'x').exists()
