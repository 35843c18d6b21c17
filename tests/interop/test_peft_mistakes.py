"""PEFT's folders that are damaged, foreign or beyond us: a sentence each, and nothing half read."""

import json
import logging
import re
import shutil

import numpy as np
import peft_reference as theirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PromptTuningConfig,
    VeraConfig,
)
from safetensors.numpy import load_file, save_file

from adapters_jax.interop.peft import configs
from adapters_jax.interop.peft import folder as ours

TENSORS, CONFIG = 'adapter_model.safetensors', 'adapter_config.json'
INNER = 'bert.encoder.layer.0.attention.self.query'
QUERY = f'base_model.model.{INNER}'
KINDS = {
    'lora': LoraConfig(task_type='SEQ_CLS', r=2, bias='all'),
    'adalora': AdaLoraConfig(task_type='SEQ_CLS', init_r=3, total_step=5),
    'ia3': IA3Config(task_type='SEQ_CLS'),
    'vera': VeraConfig(task_type='SEQ_CLS', r=4),
    'prompt': PromptTuningConfig(task_type='SEQ_CLS', num_virtual_tokens=3),
}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp('folders')
    base = theirs.make_base(root / 'base')
    for name, config in KINDS.items():
        theirs.adapt(theirs.fresh(base), config).save_pretrained(root / name)
    return root


@pytest.fixture(scope='module')
def loaded(root):
    return theirs.loaded_base(root / 'base')


@pytest.fixture
def broken(root, tmp_path):
    """Return a function that copies a good folder and changes its config."""

    def copy(name='lora', **changes):
        shutil.copytree(root / name, tmp_path / name, dirs_exist_ok=True)
        theirs.edit_config(tmp_path / name, **changes)
        return tmp_path / name

    return copy


def change_tensors(directory, changes):
    """Replace tensors; None removes one."""
    tensors = load_file(directory / TENSORS) | changes
    save_file({n: x for n, x in tensors.items() if x is not None}, directory / TENSORS)


UNSUPPORTED = {
    'alora_invocation_tokens': [1, 2],
    'arrow_config': {'top_k': 2},
    'kasa_config': {'beta': 1},
    'layer_replication': [[0, 2]],
    'lora_bias': True,
    'megatron_config': {'hidden_size': 8},
    'monteclora_config': {'n': 1},
    'target_parameters': ['weight'],
    'trainable_token_indices': [1],
    'use_bdlora': {'nblocks': 2},
    'use_qalora': True,
    'fan_in_fan_out': True,
    'ensure_weight_tying': True,
    'something_new': 1,
}


@pytest.mark.parametrize('key', UNSUPPORTED)
def test_settings_that_would_change_the_numbers(key, broken, loaded):
    with pytest.raises(ValueError, match=f'has {key}='):
        ours.load(broken(**{key: UNSUPPORTED[key]}), loaded)


WRONG = [
    ({'peft_type': 'LOHA'}, "'LOHA', which is not supported; expected one of ADALORA, IA3, LN_"),
    ({'peft_type': 3}, 'peft_type 3'),
    ({'r': '8'}, "r='8'; expected a whole number"),
    ({'r': 5}, 'shape'),
    ({'r': -2}, 'r=-2 is not at least 1'),
    ({'lora_alpha': float('nan')}, 'lora_alpha=nan; expected a number'),
    ({'lora_alpha': 0}, 'alpha=0 is not above 0'),
    ({'lora_dropout': 1.5}, 'dropout=1.5'),
    ({'target_modules': ['query']}, 'value is unexpected'),
    ({'target_modules': ['query', 'key', 'value']}, 'key is missing'),
    ({'target_modules': []}, 'is unexpected'),
    ({'target_modules': ['query', 'value', 'word_embeddings']}, 'adapts embeddings.word_embedd'),
    ({'target_modules': '('}, 'invalid regular expression'),
    ({'rank_pattern': {'(': 2}}, 'invalid regular expression'),
    ({'rank_pattern': {'query': [True]}}, 'each value a whole number'),
    ({'layers_to_transform': [0]}, 'layer.1.attention.self.query is unexpected'),
    ({'modules_to_save': ['classifier', 'embeddings']}, "modules_to_save has 'embeddings'"),
    ({'modules_to_save': ['classifier', 'pooler']}, 'pooler.dense.weight is missing'),
    ({'modules_to_save': ['classifier', 'nothing']}, "modules_to_save has 'nothing'"),
    ({'bias': 'none'}, 'bias is unexpected'),
    ({'bias': 'some'}, "bias is 'some'"),
    ({'bias': True}, 'bias=True; expected'),
    ({'use_dora': True}, 'lora_magnitude_vector is missing'),
    ({'init_lora_weights': 'pissa_niter_4'}, 'changes the weights of the backbone'),
    ({'task_type': 'CAUSAL_LM'}, "task_type is 'CAUSAL_LM'"),
    ({'task_type': None, 'modules_to_save': None}, 'classifier.bias.* is unexpected'),
    ({'auto_mapping': {'base_model_class': 'BertForTokenClassification'}}, 'that of a BertForTok'),
]


@pytest.mark.parametrize(('changes', 'sentence'), WRONG, ids=str)
def test_a_config_that_is_wrong(changes, sentence, broken, loaded):
    with pytest.raises(ValueError, match=sentence):
        ours.load(broken(**changes), loaded)


@pytest.mark.parametrize(
    ('kind', 'changes', 'sentence'),
    [
        ('vera', {'save_projection': False}, 'torch draws from projection_prng_key'),
        ('vera', {'r': 3}, 'shape'),
        ('vera', {'layers_to_transform': [1]}, 'unexpected'),
        ('adalora', {'init_r': 4}, 'shape'),
        ('adalora', {'rank_pattern': {f'{INNER}.lora_E': 2}}, 'expected a list of true and false'),
        ('ia3', {'feedforward_modules': []}, 'shape'),
        ('prompt', {'num_virtual_tokens': 2}, 'shape'),
        ('prompt', {'num_layers': 12}, 'num_layers=12, but for this backbone it is 2'),
        ('prompt', {'num_virtual_tokens': None}, 'num_virtual_tokens=None'),
        (
            'prompt',
            {'peft_type': 'LORA'},
            'num_attention_heads=4, a setting that this project does not know',
        ),
        ('lora', {'peft_type': 'IA3'}, 'does not know'),
    ],
    ids=str,
)
def test_a_config_of_another_type_that_is_wrong(kind, changes, sentence, broken, loaded):
    with pytest.raises(ValueError, match=sentence):
        ours.load(broken(kind, **changes), loaded)


def test_what_says_nothing_is_ignored(broken, loaded):
    directory = broken(
        a_later_setting=None, another={}, runtime_config={'ephemeral_gpu_offload': False}
    )
    found = ours.load(directory, loaded)
    assert found.method == ours.load(broken(), loaded).method


ONES = np.ones((2, 32), np.float32)
TENSOR_MISTAKES = [
    ({f'{QUERY}.lora_A.weight': None}, 'query.lora_A.weight is missing'),
    ({f'{QUERY}.lora_A.weight': None, f'{QUERY}.lora_B.weight': None}, 'query is missing'),
    ({f'{QUERY}.lora_A.weight': np.zeros((2, 31), np.float32)}, r'\(2, 31\), expected \(2, 32\)'),
    ({f'{QUERY}.lora_A.weight': np.zeros((), np.float32)}, r'shape \(\)'),
    ({f'{QUERY}.lora_A.weight': ONES * np.nan}, 'holds NaN or infinity'),
    ({f'{QUERY}.lora_A.weight': np.zeros((2, 32), np.int32)}, 'holds int32, expected floating'),
    ({f'{QUERY}.lora_A.weight': np.full((2, 32), 1e300)}, 'holds NaN or infinity'),
    ({'base_model.model.bert.pooler.dense.bias': None}, 'pooler.dense.bias is missing'),
    ({'base_model.model.classifier.weight': None}, 'classifier.weight is missing'),
    ({'base_model.model.classifier.weight': np.zeros((3, 31), np.float32)}, r'\(3, 31\)'),
    ({'base_model.model.classifier.weight': np.zeros((0, 32), np.float32)}, r'\(0, 32\)'),
    ({'base_model.model.classifier.bias': np.zeros((3, 1), np.float32)}, r'\(3, 1\)'),
    ({'../../outside': np.zeros(1, np.float32)}, r'no LORA adapter .* has: ../../outside'),
    ({'a/b': np.zeros(1, np.float32)}, 'a/b'),
    ({f'{QUERY}.lora_C.weight': np.zeros(1, np.float32)}, 'lora_C'),
    ({f'{QUERY.replace("bert.", "")}.lora_A.weight': ONES}, 'two tensors for encoder'),
    ({'base_model.model.bert.encoder.layer.9.x.lora_A.weight': ONES}, 'adapts encoder.lay'),
    ({'base_model.model.classifier.lora_A.weight': ONES}, 'adapts classif'),
]


@pytest.mark.parametrize(('changes', 'sentence'), TENSOR_MISTAKES, ids=lambda x: str(x)[:40])
def test_tensors_that_are_wrong(changes, sentence, broken, loaded):
    directory = broken()
    changes = {
        n: np.ones((2, 32), np.float32) if n.endswith('x.lora_A.weight') else x
        for n, x in changes.items()
    }
    change_tensors(directory, changes)
    with pytest.raises(ValueError, match=sentence):
        ours.load(directory, loaded)


def test_files_that_are_missing_or_none(broken, loaded, tmp_path):
    with pytest.raises(FileNotFoundError, match=f'has no {CONFIG}'):
        ours.load(tmp_path / 'nowhere', loaded)
    directory = broken()
    (directory / TENSORS).unlink()
    with pytest.raises(FileNotFoundError, match=f'has no tensors: expected {TENSORS} or'):
        ours.load(directory, loaded)
    for text in ('[]', '3', '{', '', '\xff', '[' * 5000):
        (directory / CONFIG).write_text(text, 'latin-1')
        assert not ours.is_folder(directory)
        for read in (ours.backbone_name, lambda directory: ours.load(directory, loaded)):
            with pytest.raises(ValueError, match='holds no JSON object'):
                read(directory)
    (directory / CONFIG).unlink()
    (directory / CONFIG).mkdir()
    assert not ours.is_folder(directory)
    with pytest.raises(FileNotFoundError):
        ours.load(directory, loaded)


def test_a_pointer_in_place_of_the_tensors(broken, loaded):
    directory = broken()
    (directory / TENSORS).write_text('version https://git-lfs.github.com/spec/v1\n')
    with pytest.raises(ValueError, match='git lfs pull'):
        ours.load(directory, loaded)


def test_a_backbone_of_another_size(broken, tmp_path, loaded):
    config, _, bare = theirs.CLASSES['bert']
    bare(config(**theirs.SIZES | {'hidden_size': 16})).save_pretrained(tmp_path / 'other')
    other = theirs.loaded_base(tmp_path / 'other')
    for kind in KINDS:
        with pytest.raises(ValueError, match=r'shape|token_dim'):
            ours.load(broken(kind), other)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_damage_is_never_read(data, root, loaded, tmp_path_factory):
    """Whatever happens to a file, the folder is read whole or refused with a sentence."""
    kind = data.draw(st.sampled_from(sorted(KINDS)))
    name = data.draw(st.sampled_from([CONFIG, TENSORS]))
    directory = tmp_path_factory.mktemp('damaged')
    shutil.copytree(root / kind, directory, dirs_exist_ok=True)
    content = bytearray((root / kind / name).read_bytes())
    header = 8 + int.from_bytes(content[:8], 'little') if name == TENSORS else len(content)
    how = data.draw(st.sampled_from(['cut', 'flip', 'insert', 'huge header']))
    place = data.draw(st.integers(0, min(header, len(content)) - 1))
    if how == 'cut':
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    elif how == 'flip':
        content[place] ^= data.draw(st.integers(1, 255))
    elif how == 'insert':
        content[place:place] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        content[:8] = data.draw(st.integers(1, 2**64 - 1)).to_bytes(8, 'little')
    (directory / name).write_bytes(content)
    try:
        found = ours.load(directory, loaded)
    except (ValueError, FileNotFoundError) as error:
        assert re.search(r'\w+ \w+ \w+', str(error))
        return
    finally:
        shutil.rmtree(directory)
    expected = ours.load(root / kind, loaded)
    for part in ('adapter_params', 'head_params', 'backbone_params'):
        assert shapes(getattr(found, part)) == shapes(getattr(expected, part))


def shapes(tree):
    return {path: len(content) for path, content in theirs.bits(tree).items()}


def test_the_pickled_form_and_half_precision(broken, loaded, root):
    directory = broken()
    tensors = {n: torch.tensor(x) for n, x in load_file(directory / TENSORS).items()}
    (directory / TENSORS).unlink()
    torch.save(tensors, directory / 'adapter_model.bin')
    found, expected = ours.load(directory, loaded), ours.load(root / 'lora', loaded)
    assert theirs.bits(found.adapter_params) == theirs.bits(expected.adapter_params)
    assert theirs.bits(found.backbone_params) == theirs.bits(expected.backbone_params)
    torch.save({n: x.bfloat16() for n, x in tensors.items()}, directory / 'adapter_model.bin')
    half = ours.load(directory, loaded).adapter_params['lora']['layer_0']['attention']['query']
    full = expected.adapter_params['lora']['layer_0']['attention']['query']
    assert half['a'].dtype == np.float32
    np.testing.assert_allclose(half['a'], full['a'], rtol=2**-8)
    torch.save([1], directory / 'adapter_model.bin')
    with pytest.raises(ValueError, match='expected a dict of tensors'):
        ours.load(directory, loaded)


NAMES = {
    'without anything': lambda name: re.sub(r'base_model\.(model\.)?(bert\.)?', '', name),
    'without the outer': lambda name: name.removeprefix('base_model.model.'),
    'bare encoder': lambda name: name.replace('.bert.', '.'),
    'second names': lambda name: name.replace('.classifier.', '.classifier.modules_to_save.'),
}


@pytest.mark.parametrize('rename', NAMES.values(), ids=NAMES.keys())
def test_other_names_of_the_same_tensors(rename, broken, loaded, root):
    directory = broken('ia3')
    save_file(
        {rename(n): x for n, x in load_file(directory / TENSORS).items()}, directory / TENSORS
    )
    found, expected = ours.load(directory, loaded), ours.load(root / 'ia3', loaded)
    assert found.method == expected.method
    for part in ('adapter_params', 'head_params'):
        assert theirs.bits(getattr(found, part)) == theirs.bits(getattr(expected, part))


def test_every_setting_is_one_of_the_librarys(root):
    for name in KINDS:
        config = json.loads((root / name / CONFIG).read_text())
        assert set(config) == {'peft_type', *configs.DEFAULTS[config['peft_type']]}


def test_a_failed_write_leaves_nothing(loaded, root, tmp_path, caplog):
    folder = ours.load(root / 'lora', loaded)
    object.__setattr__(folder, 'method', {'architecture': 'bottleneck'})
    with caplog.at_level(logging.WARNING), pytest.raises(ValueError, match='nothing like bottlen'):
        ours.save(folder, tmp_path / 'out', loaded)
    assert not list(tmp_path.iterdir())
