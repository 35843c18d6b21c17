"""PEFT's folders: what the library saved computes the same here, and what we write does there."""

import json

import numpy as np
import peft_reference as theirs
import pytest
import torch
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
)

from adapters_jax.interop.backbones import load_backbone
from adapters_jax.interop.peft import configs
from adapters_jax.interop.peft import folder as ours

pytestmark = [pytest.mark.filterwarnings(f'ignore:{m}') for m in theirs.OF_THE_LIBRARY]
HEAD = {'task_type': 'SEQ_CLS'}
EVERYWHERE = ['query', 'key', 'value', 'attention.output.dense', 'intermediate.dense']
CASES = {
    'lora': LoraConfig(r=3, lora_alpha=5, **HEAD),
    'lora everywhere': LoraConfig(
        r=3,
        lora_alpha=5,
        use_rslora=True,
        lora_dropout=0.1,
        target_modules=[*EVERYWHERE, 'output.dense'],
        **HEAD,
    ),
    'lora patterns': LoraConfig(
        r=3,
        lora_alpha=5,
        rank_pattern={'layer.0.attention.self.query': 2, 'key': 4},
        alpha_pattern={'layer.1.attention.self.query': 7.5},
        target_modules=r'bert\.encoder\.layer\.(0\..*query|1\..*(query|key))',
        **HEAD,
    ),
    'lora layer': LoraConfig(r=2, lora_alpha=3, layers_to_transform=[1], **HEAD),
    'lora all-linear': LoraConfig(r=2, lora_alpha=3, target_modules='all-linear', **HEAD),
    'lora bias all': LoraConfig(r=2, lora_alpha=3, bias='all', **HEAD),
    'lora bias lora_only': LoraConfig(r=2, lora_alpha=3, bias='lora_only', **HEAD),
    'lora pooler': LoraConfig(r=2, lora_alpha=3, modules_to_save=['pooler'], **HEAD),
    'lora norms': LoraConfig(r=2, lora_alpha=3, modules_to_save=['LayerNorm'], bias='all', **HEAD),
    'dora': LoraConfig(r=3, lora_alpha=5, use_dora=True, **HEAD),
    'dora dense': LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=['dense'], **HEAD),
    'adalora': AdaLoraConfig(init_r=4, target_r=2, lora_alpha=5, total_step=10, **HEAD),
    'adalora pruned': AdaLoraConfig(
        init_r=3,
        target_r=2,
        lora_alpha=5,
        total_step=10,
        target_modules=['query', 'output.dense'],
        **HEAD,
    ),
    'ia3': IA3Config(**HEAD),
    'ia3 keys': IA3Config(
        target_modules=['key', 'intermediate.dense'],
        feedforward_modules=['intermediate.dense'],
        **HEAD,
    ),
    'vera': VeraConfig(r=6, d_initial=0.3, target_modules=[*EVERYWHERE, 'output.dense'], **HEAD),
    'vera bias': VeraConfig(r=6, bias='vera_only', **HEAD),
    'norms': LNTuningConfig(target_modules=['LayerNorm'], **HEAD),
    'norms some': LNTuningConfig(target_modules=['attention.output.LayerNorm'], **HEAD),
    'prefix': PrefixTuningConfig(num_virtual_tokens=4, **HEAD),
    'prefix network': PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True, **HEAD),
    'prompt': PromptTuningConfig(num_virtual_tokens=4, **HEAD),
    'p-tuning': PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, **HEAD),
}
ROBERTA = ('lora', 'lora bias all', 'dora dense', 'ia3', 'norms', 'prompt')


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    return {family: theirs.make_base(root / family, family) for family in theirs.CLASSES}


def made(name, base, family='bert', sigma=0.2):
    model = theirs.adapt(theirs.fresh(base, family), copy_of(CASES[name]), sigma)
    if name == 'adalora pruned':
        prune(model)
    return model


def copy_of(config):
    """PEFT changes the configs that it is given."""
    return type(config)(**{k: v for k, v in config.to_dict().items() if k != 'runtime_config'})


def prune(model):
    """Take triplets away, as the schedule of AdaLoRA does: some, and all of one projection."""
    kept = [True, False, True], [False, False, True]
    pattern = {}
    for name, module in model.base_model.model.named_modules():
        if hasattr(module, 'lora_E'):
            layer = int(name.split('.')[3])
            pattern[f'{name}.lora_E'] = [False] * 3 if 'query' in name else kept[layer % 2]
    model.peft_config['default'].rank_pattern = pattern
    for name, own in pattern.items():
        module = model.base_model.model.get_submodule(name.removesuffix('.lora_E'))
        module.lora_E['default'].data *= torch.tensor(own)[:, None]


PRESETS = {
    'lora bias all': ['lora'],
    'norms': ['layer_norm'],
    'prefix': ['prefix_tuning_flat'],
    'prefix network': ['prefix_tuning'],
    'prompt': ['prompt_tuning'],
}
FAMILIES = [
    *((name, 'bert') for name in CASES),
    # Those that store parts of the model itself; the others repeat their path.
    *(
        pytest.param(
            name,
            'roberta',
            marks=[pytest.mark.slow] * (name not in ('lora bias all', 'dora dense')),
        )
        for name in ROBERTA
    ),
]


@pytest.mark.shows('peft', parameter='name', presets=PRESETS)
@pytest.mark.parametrize(('name', 'family'), FAMILIES, ids=lambda x: x.replace(' ', '-'))
def test_there_and_back(name, family, bases, tmp_path):
    loaded = theirs.loaded_base(bases[family])
    model = made(name, bases[family], family)
    model.save_pretrained(tmp_path / 'a')
    assert ours.is_folder(tmp_path / 'a')
    assert ours.backbone_name(tmp_path / 'a') == str(bases[family])
    check_both_ways(model, loaded, tmp_path, lambda: theirs.fresh(bases[family], family))
    for written in 'ab':
        config = json.loads((tmp_path / written / 'adapter_config.json').read_text())
        assert set(config) == {'peft_type', *configs.DEFAULTS[config['peft_type']]}


def check_both_ways(model, loaded, directory, fresh):
    folder = ours.load(directory / 'a', loaded, 'mine')
    assert folder.task['labels'] == ['LABEL_0', 'LABEL_1', 'LABEL_2']
    assert theirs.differences(folder, loaded, model) <= 2e-5
    assert ours.save(folder, directory / 'b', loaded) == directory / 'b'
    again = theirs.reload(directory / 'b', fresh())
    inputs = theirs.texts(model)
    expected, found = (theirs.torch_outputs(m, *inputs) for m in (model, again))
    assert np.abs(expected - found).max() <= 2e-5


@pytest.mark.slow
@pytest.mark.parametrize('name', CASES, ids=lambda x: x.replace(' ', '-'))
def test_there_and_back_over_a_real_backbone(name, tmp_path):
    loaded = load_backbone('minilm')
    model = made(name, loaded.directory, sigma=0.02)
    model.save_pretrained(tmp_path / 'a')
    check_both_ways(model, loaded, tmp_path, lambda: theirs.fresh(loaded.directory))
