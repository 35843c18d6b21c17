"""Our own adapters as PEFT's folders: what it can hold, and what is refused."""

import json

import jax
import numpy as np
import peft_reference as theirs
import pytest
from jax.tree_util import tree_map
from peft import LoraConfig, PrefixTuningConfig

from adapters_jax import params, tasks
from adapters_jax.adapters import registry
from adapters_jax.interop.adapter_folder import AdapterFolder, check_leaves
from adapters_jax.interop.peft import folder as ours
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig

HEADS = {'bert': HeadConfig(pooling='pooler'), 'roberta': HeadConfig(pooling='cls', layers=2)}
LABELS = ('no', 'größer', 'yes')
pytestmark = [pytest.mark.filterwarnings(f'ignore:{m}') for m in theirs.OF_THE_LIBRARY]


@pytest.fixture(scope='module')
def bases(tmp_path_factory):
    root = tmp_path_factory.mktemp('bases')
    return {family: theirs.make_base(root / family, family) for family in theirs.CLASSES}


def trained(text, loaded, head=None, seed=0):
    """Return a folder of ours in which every trained leaf is another one than at first."""
    model = Model(
        config=loaded.config,
        method=registry.create(text),
        head_config=head or HEADS[loaded.config.family],
        outputs=len(LABELS),
        name='mine',
    )
    rng = np.random.default_rng(seed)
    tree = model.init(jax.random.key(seed), loaded.params)
    trainable, _ = params.partition(tree, model.rules)
    moved = tree_map(
        lambda x: np.asarray(x + 0.2 * rng.standard_normal(x.shape), np.float32), trainable
    )
    return AdapterFolder(
        name='mine',
        method=model.method.to_json(),
        head=model.head_config.to_json(),
        task=tasks.Classification(labels=LABELS).to_json(),
        backbone=loaded.describe(),
        max_length=model.text_positions,
        pair=False,
        adapter_params=moved.get('adapters', {}).get('mine', {}),
        head_params=moved['heads']['mine'],
        backbone_params=moved.get('backbone', {}),
    )


WRITTEN = [
    ('lora[r=3,alpha=5,leave_out=[1]]', 'LORA'),
    ('lora[output_lora=True,selfattn_lora=False,rank_stabilised=True,alpha=5]', 'LORA'),
    ("lora[rank_pattern={'0/query': 2},alpha_pattern={'value': 3}]", 'LORA'),
    ('dora[r=3,alpha=5,intermediate_lora=True]', 'LORA'),
    ('vera[r=5,output_lora=True]', 'VERA'),
    ('adalora[r=4,target_r=2]', 'ADALORA'),
    ('ia3', 'IA3'),
    ("ia3[scale_outputs=['key','value'],scale_inputs=['output','down']]", 'IA3'),
    ('prefix_tuning[prefix_length=3,bottleneck_size=5,shift_positions=True]', 'PREFIX_TUNING'),
    ("prompt_tuning[prompt_length=3,site='words']", 'PROMPT_TUNING'),
    ('layer_norm', 'LN_TUNING'),
    ('layer_norm[leave_out=[0]]', 'LN_TUNING'),
    ('lora[alpha=5]|bitfit[leave_out=[1]]', 'LORA'),
    ('ia3|layer_norm', 'IA3'),
]


@pytest.mark.parametrize(('text', 'kind'), WRITTEN, ids=lambda x: x)
def test_what_we_write_computes_the_same_there(text, kind, bases, tmp_path):
    loaded = theirs.loaded_base(bases['bert'])
    folder = trained(text, loaded)
    ours.save(folder, tmp_path / 'out', loaded)
    assert json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())['peft_type'] == kind
    model = theirs.reload(tmp_path / 'out', theirs.fresh(bases['bert']))
    assert theirs.differences(folder, loaded, model) <= 2e-5


def test_what_comes_back_is_what_was_written(bases, tmp_path):
    loaded = theirs.loaded_base(bases['bert'])
    for text in ('lora[r=3,alpha=5]', 'dora', 'layer_norm', 'ia3'):
        folder = trained(text, loaded)
        again = ours.load(ours.save(folder, tmp_path / text[:3], loaded), loaded)
        assert again.method == folder.method
        assert again.max_length == folder.max_length
        for part in ('adapter_params', 'head_params', 'backbone_params'):
            assert theirs.bits(getattr(again, part)) == theirs.bits(getattr(folder, part))


def test_random_matrices_are_kept_in_the_file(bases, tmp_path):
    loaded = theirs.loaded_base(bases['bert'])
    folder = trained('vera[r=5]', loaded)
    again = ours.load(ours.save(folder, tmp_path / 'a', loaded), loaded)
    kept = registry.from_json(folder.method).constants(loaded.config.dimensions)
    assert theirs.bits(again.adapter_params) == theirs.bits(folder.adapter_params | kept)
    third = ours.load(ours.save(again, tmp_path / 'b', loaded), loaded)
    assert theirs.bits(third.adapter_params) == theirs.bits(again.adapter_params)
    del again.adapter_params['constants']
    with pytest.raises(ValueError, match='the shared random matrices are missing'):
        ours.save(again, tmp_path / 'c', loaded)


def test_what_is_read_is_what_our_own_form_asks_for(bases, tmp_path):
    """The leaves of the backbone are those that the method's rules train, no more and no fewer."""
    loaded = theirs.loaded_base(bases['bert'])
    for text in ('lora|bitfit', 'ia3|layer_norm', 'lora|bitfit|layer_norm', 'layer_norm'):
        written = ours.save(trained(text, loaded), tmp_path / str(len(text)), loaded)
        folder = ours.load(written, loaded, 'again')
        model = Model(
            config=loaded.config,
            method=registry.from_json(folder.method),
            head_config=HeadConfig(**folder.head),
            outputs=3,
            name='again',
        )
        shapes = jax.eval_shape(lambda m=model: m.init(jax.random.key(0), loaded.params))
        check_leaves(folder, *params.partition(shapes, model.rules))


REFUSED = [
    ('houlsby[size=4]', 'nothing like bottleneck'),
    ('lora|seq_bn', 'nothing like bottleneck'),
    ('lora|ia3[scale_outputs=[],scale_inputs=["down"]]', 'one method, and not lora and ia3'),
    ('bitfit', 'this one is bitfit; write it with --format=merged'),
    ('bitfit|layer_norm', 'this one is bitfit and layer_norm'),
    ('ia3|bitfit', 'does not train with IA3'),
    ('full', 'nothing like full'),
    ('head', 'nothing like head'),
    ('lora[use_gating=True]', 'lora has use_gating=True'),
    ('adalora[use_gating=True]', 'adalora has use_gating=True'),
    ('dora[scale_bias=True]', 'scale_bias=True'),
    ('prefix_tuning[flat=True]', 'shift_positions=False'),
    ('prompt_tuning', "site='embeddings'"),
    ("ia3[scale_outputs=['down']]", 'scaled at its input and at its output'),
]


@pytest.mark.parametrize(('text', 'sentence'), REFUSED, ids=lambda x: x)
def test_what_peft_cannot_hold(text, sentence, bases, tmp_path):
    loaded = theirs.loaded_base(bases['bert'])
    folder = trained(text, loaded)
    with pytest.raises(ValueError, match=sentence) as error:
        ours.save(folder, tmp_path / 'out', loaded)
    assert '--format=' in str(error.value)
    assert not list(tmp_path.iterdir())


def test_the_names_of_labels_are_left_out_and_said_once(bases, tmp_path, caplog):
    loaded = theirs.loaded_base(bases['bert'])
    ours.save(trained('lora', loaded), tmp_path / 'out', loaded)
    said = f'0 to {len(LABELS) - 1} stand for {", ".join(LABELS)}, in this order'
    assert caplog.text.count(said) == 1
    caplog.clear()
    ours.save(ours.load(tmp_path / 'out', loaded), tmp_path / 'again', loaded)
    assert 'stand for' not in caplog.text


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_a_head_that_no_model_has_is_left_out(family, bases, tmp_path, caplog):
    loaded = theirs.loaded_base(bases[family])
    folder = trained('lora[alpha=5]|bitfit', loaded, HeadConfig(pooling='mean'))
    ours.save(folder, tmp_path / 'out', loaded)
    assert 'it is written without it; expected head.pooling=' in caplog.text
    model = theirs.reload(tmp_path / 'out', theirs.fresh(bases[family], family, bare=True))
    again = ours.load(tmp_path / 'out', loaded)
    assert (again.head, again.task, again.head_params) == ({}, {}, {})
    assert theirs.bits(again.adapter_params) == theirs.bits(folder.adapter_params)
    assert theirs.differences(again, loaded, model) <= 2e-5


@pytest.mark.parametrize(
    'config',
    [
        LoraConfig(r=3, lora_alpha=5, target_modules='all-linear'),
        PrefixTuningConfig(num_virtual_tokens=4, task_type='FEATURE_EXTRACTION'),
    ],
    ids=['lora', 'prefix'],
)
def test_adapters_of_a_bare_encoder(config, bases, tmp_path, caplog):
    base = bases['roberta']
    model = theirs.adapt(theirs.fresh(base, 'roberta', bare=True), config)
    model.save_pretrained(tmp_path / 'a')
    loaded = theirs.loaded_base(base)
    folder = ours.load(tmp_path / 'a', loaded)
    assert folder.head == {}
    assert ('trained pooler is left out' in caplog.text) == isinstance(config, LoraConfig)
    # For features, the library ignores the token types that come with a prefix.
    pairs = isinstance(config, LoraConfig)
    assert theirs.differences(folder, loaded, model, pairs) <= 2e-5


def test_a_regression(bases, tmp_path):
    model = theirs.adapt(theirs.fresh(bases['bert'], labels=1), LoraConfig(task_type='SEQ_CLS'))
    model.save_pretrained(tmp_path / 'a')
    loaded = theirs.loaded_base(bases['bert'])
    folder = ours.load(tmp_path / 'a', loaded)
    assert folder.task['name'] == 'regression'
    assert theirs.differences(folder, loaded, model) <= 2e-5


def test_the_short_name_of_a_backbone(bases, tmp_path):
    loaded = theirs.loaded_base(bases['bert'])
    object.__setattr__(loaded, 'name', 'minilm')
    try:
        ours.save(trained('ia3', loaded), tmp_path / 'out', loaded)
    finally:
        object.__setattr__(loaded, 'name', str(bases['bert']))
    config = json.loads((tmp_path / 'out' / 'adapter_config.json').read_text())
    assert config['base_model_name_or_path'] == 'sentence-transformers/all-MiniLM-L6-v2'
    assert ours.backbone_name(tmp_path / 'out') == 'minilm'
