"""Which presets, with the settings that they have by themselves, can be handed on, and to whom.

The numbers are other tests' business: each format's own file compares them with its library's.
"""

import functools

import cases
import jax
import numpy as np
import pytest
import toy

from adapters_jax import params, tasks
from adapters_jax.adapters import registry
from adapters_jax.interop import formats
from adapters_jax.interop.adapter_folder import AdapterFolder
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from experiments import conformance

WRITTEN = {
    'adapterhub': {
        *('adapter_plus', 'pfeiffer', 'double_seq_bn', 'seq_bn_inv', 'double_seq_bn_inv'),
        *('par_bn', 'scaled_par_bn', 'invertible', 'compacter', 'compacter++', 'lora', 'vera'),
        *('mtl_lora', 'prefix_tuning', 'prefix_tuning_flat', 'prompt_tuning', 'loreft', 'noreft'),
        *('direft', 'mam', 'mam_adapters', 'unipelt'),
    },
    'peft': {'adalora', 'dora', 'ia3', 'layer_norm', 'lora', 'vera'},
    'merged': {
        *('adalora', 'bitfit', 'dora', 'dvora', 'ia3', 'layer_norm', 'lora', 'mtl_lora', 'vera'),
    },
}

SAID = {
    'adapterhub': '`adapters` has no|which the format of `adapters` has no place for',
    'peft': 'PEFT|--format=',
    'merged': 'merged',
}


@pytest.fixture(scope='module')
def loaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp('backbone') / 'bert'
    return load_backbone(toy.write_backbone(folder, layers=2))


@pytest.fixture(scope='module')
def fresh(loaded):
    """Return a function from a preset to its folder, which its formats share."""
    return functools.cache(lambda preset: folder_of(preset, loaded))


def folder_of(preset, loaded):
    """Return a folder of ours with the preset, of a size that suits a small backbone."""
    options = f'[{cases.OPTIONS[preset]}]' if preset in cases.OPTIONS else ''
    model = Model(
        config=loaded.config,
        method=registry.create(preset + options),
        head_config=HeadConfig(pooling='pooler'),
        outputs=2,
        name='mine',
    )
    tree = model.init(jax.random.key(0), loaded.params)
    trainable, _ = params.partition(tree, model.rules)
    return AdapterFolder(
        name='mine',
        method=model.method.to_json(),
        head=model.head_config.to_json(),
        task=tasks.Classification(labels=('a', 'b')).to_json(),
        backbone=loaded.describe(),
        max_length=16,
        pair=False,
        adapter_params=jax.tree.map(np.asarray, tree['adapters']['mine']),
        head_params=jax.tree.map(np.asarray, tree['heads']['mine']),
        backbone_params=trainable.get('backbone', {}),
    )


def pairs(written):
    return [(f, p) for f in WRITTEN for p in cases.METHODS if (p in WRITTEN[f]) == written]


@pytest.mark.parametrize(('format', 'preset'), pairs(True))
def test_it_is_written_as_it_is(loaded, fresh, tmp_path, record_property, format, preset):
    formats.save(fresh(preset), tmp_path / 'there', loaded, format)
    assert list((tmp_path / 'there').glob('*.safetensors'))
    if format in conformance.FORMATS:
        record_property('conformance', [preset, conformance.as_it_is(format)])


@pytest.mark.parametrize(('format', 'preset'), pairs(False))
def test_it_has_no_place_there(loaded, fresh, tmp_path, format, preset):
    with pytest.raises(ValueError, match=SAID[format]):
        formats.save(fresh(preset), tmp_path / 'there', loaded, format)
    assert not list(tmp_path.iterdir())
