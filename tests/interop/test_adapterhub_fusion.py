"""Whole compositions of AdapterHub are loaded, used and written like any adapter."""

import adapters
import library_folders as library
import numpy as np
import pytest
import torch
from adapters.composition import Fuse, Stack

from adapters_jax.interop import adapter_folder, formats

KINDS = {'a': 'double_seq_bn', 'b': 'double_seq_bn', 'c': 'seq_bn'}
CASES = {
    'fuse': (lambda: Fuse('a', 'b'), adapters.DynamicAdapterFusionConfig()),
    'static': (lambda: Fuse('a', 'b'), adapters.StaticAdapterFusionConfig()),
    'stack_of_fuse': (lambda: Stack('c', Fuse('a', 'b')), adapters.DynamicAdapterFusionConfig()),
    'stack': (lambda: Stack('c', 'a'), None),
}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


def theirs(source, block, config):
    """Return the library's model under a composition with a head named 'task'."""
    model = source.model()
    for name, kind in KINDS.items():
        model.add_adapter(name, config=library.CONFIGS[kind])
    if config:
        model.add_adapter_fusion(['a', 'b'], config)
    options = {'num_labels': 3, 'id2label': library.LABELS}
    model.add_prediction_head(adapters.ClassificationHead(model, 'task', **options))
    library.randomise(source, model, 1)
    model.set_active_adapters(block)
    model.active_head = 'task'
    return model.eval()


@pytest.mark.parametrize('case', CASES)
def test_a_setup_gives_the_library_its_logits_here_and_back_there(source, tmp_path, case):
    block, config = CASES[case]
    model = theirs(source, block(), config)
    expected = library.library_logits(model, source)
    model.save_adapter_setup(str(tmp_path / 'a'), block(), head_setup='task')
    assert formats.kind(tmp_path / 'a') == 'adapterhub'
    held, loaded = formats.load(tmp_path / 'a', str(source.directory))
    np.testing.assert_allclose(library.our_logits(held, source), expected, atol=2e-5)

    formats.save(held, tmp_path / 'ours', loaded, 'adapters_jax')
    again = adapter_folder.load(tmp_path / 'ours')
    formats.save(again, tmp_path / 'b', loaded, 'adapterhub')
    other = source.model()
    other.load_adapter_setup(str(tmp_path / 'b'), use_safetensors=True, set_active=True)
    other.eval()
    np.testing.assert_allclose(library.library_logits(other, source), expected, atol=1e-6)
    with torch.no_grad():
        other.set_active_adapters(None)
    assert np.abs(library.library_logits(other, source) - expected).max() > 0.01


def test_an_adapter_named_as_its_composition_cannot_be_written(source, tmp_path):
    block, config = CASES['fuse']
    model = theirs(source, block(), config)
    model.save_adapter_setup(str(tmp_path / 'a'), block(), head_setup='task')
    held, loaded = formats.load(tmp_path / 'a', str(source.directory))
    clash = type(held)(**vars(held) | {'name': 'a'})
    with pytest.raises(ValueError, match="both named 'a'"):
        formats.save(clash, tmp_path / 'b', loaded, 'adapterhub')
