"""Every shipped config on the toy backbone: what changes in three steps, and what cannot."""

import dataclasses
import functools
import importlib.util
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import toy
import toy_images

from adapters_jax import entry, params
from adapters_jax.adapters import registry
from adapters_jax.adapters.fusion import FusionConfig
from adapters_jax.config import base
from adapters_jax.data import builtin, glue
from adapters_jax.models.heads import HeadConfig
from adapters_jax.training import experiment, loop
from adapters_jax.training.optimizer import OptimizerConfig

ROOT = Path(__file__).parents[1]
KEYS = 'config.py', 'defaults.py'
# Each config with one method, each method with at least one config.
PAIRED = [
    ('quickstart', 'houlsby[size=4]'),
    ('text_classification', 'lora[r=2]|bitfit'),
    ('text_classification', 'dvora[r=2]|pfeiffer[reduction_factor=2]'),
    ('text_classification:task=regression', 'compacter[reduction_factor=2]|invertible'),
    ('text_classification:task=multi_label', 'par_bn[reduction_factor=2]'),
    ('text_sets:task=cr', 'head'),
    ('text_sets:task=clinc150', 'head'),
    ('multiple_choice', 'scaled_par_bn[reduction_factor=2]'),
    ('masked_lm', 'seq_bn_inv[bottleneck={reduction_factor: 2}]'),
    ('question_answering', 'pfeiffer[reduction_factor=2]'),
    ('tagging', 'pfeiffer[reduction_factor=2]'),
    ('images', 'pfeiffer[reduction_factor=2]'),
    ('glue:task=cola', 'attention[size=4,heads=2]'),
    ('glue:task=sst2', 'attention_side[size=4,heads=2]'),
    ('glue:task=mrpc', 'full'),
    ('glue:task=stsb', 'head'),
    ('glue:task=qqp', 'top_layers[layers=1]'),
    ('glue:task=mnli', 'dora[r=2]|prefix_tuning[prefix_length=3,bottleneck_size=5]'),
    ('glue:task=qnli', 'adalora[r=4,target_r=2]|layer_norm'),
    ('glue:task=rte', 'mtl_lora[r=2]|loreft[tied_weights=True]'),
    ('glue:task=wnli', 'vera[r=2]|ia3[scale_outputs=[key]]|prompt_tuning[prompt_length=3]'),
]

# What else runs the config's file, and in the conformance tests the method, every time.
ONLY_SLOW = {
    *(f'glue:task={task}' for task in glue.TASKS if task != 'rte'),
    *('text_sets:task=cr', 'text_classification:task=regression', 'text_classification'),
    *('text_classification:task=multi_label', 'question_answering', 'images', 'tagging'),
    *('text_sets:task=clinc150', 'multiple_choice', 'masked_lm'),
}


pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def backbones(tmp_path_factory):
    """Backbones of one layer, of two to tell layers apart, for long texts, and for images."""
    folder = tmp_path_factory.mktemp('backbones')
    made = {n: toy.write_backbone(folder / f'bert{n}', layers=n) for n in (1, 2)}
    made |= {'images': toy_images.write_vit(folder / 'vit', layers=1)}
    return made | {'long': toy.write_backbone(folder / 'long', positions=512)}


def shipped(name, method, backbone, folder, monkeypatch):
    """Return the config of a file in configs/, with data to run on and nothing else changed."""
    file, _, argument = name.partition(':')
    spec = importlib.util.spec_from_file_location(file, ROOT / 'configs' / f'{file}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = [argument] if argument else []
    config = module.get_config(','.join([*given, f'method={method}', f'backbone={backbone}']))
    if file == 'quickstart':
        monkeypatch.setattr(builtin, 'read', toy.trec_like)
    elif file == 'glue':
        config.data.dir = toy.write_glue(folder, argument.removeprefix('task='))
    elif file == 'text_sets':
        config.data.dir = toy.write_text_set(folder, argument.removeprefix('task='))
    elif file == 'multiple_choice':
        config.data.train = toy.write_choices(folder / 'choices.jsonl', 60)
    elif file == 'question_answering':
        config.data.train = toy.write_questions(folder / 'questions.json', 60)
    elif file == 'images':
        config.data.dir = toy_images.write_set(folder / 'images', 60, 12)
    elif file == 'tagging':
        config.data.dir = toy.write_tagged(folder)
    elif 'regression' in argument:
        config.data.train = toy.write_ratings(folder / 'ratings.csv', 60)
    else:
        config.data.train = toy.write_texts(folder / 'texts.csv', 60)
    config.training.steps = 3
    return toy.settle(config)


def untouched(config, trained):
    """Return a pattern of the trained leaves that provably get no gradient and no decay.

    The pooler of a backbone that is trained under a head that does not use it: its kernel only
    decays, its bias stays.
    """
    pooled = config.head.pooling == 'pooler'
    return r'' if pooled else r'backbone/pooler/bias'


def backbone_for(name, method, backbones):
    wanted = 2 if name == 'quickstart' or 'layers' in method else 1
    own = {'question_answering': 'long', 'images': 'images'}
    return backbones[own.get(name, wanted)]


@pytest.mark.parametrize(
    ('name', 'method'),
    [
        pytest.param(*pair, marks=[pytest.mark.slow] if pair[0] in ONLY_SLOW else [])
        for pair in PAIRED
    ],
)
def test_three_steps_change_what_the_rules_match_and_nothing_else(
    name, method, backbones, tmp_path, monkeypatch
):
    backbone = backbone_for(name, method, backbones)
    config = shipped(name, method, backbone, tmp_path, monkeypatch)
    built = experiment.build(config)
    before = toy.bits(built.init_params())
    trainer = loop.Trainer(built, tmp_path)
    matched = {
        path for path, rule in params.decide(before, built.model.rules).items() if rule.train
    }
    assert set(params.flatten(trainer.trainable)) == matched
    assert set(params.flatten(trainer.frozen)) == set(before) - matched
    check_optimizer_state(trainer)
    summary = trainer.run()

    after = toy.bits(params.merge(trainer.trainable, trainer.frozen))
    changed = {path for path in before if after[path] != before[path]}
    still = {path for path in matched if re.fullmatch(untouched(config, matched), path)}
    # The same number added to the logits of all tokens changes nothing but by rounding.
    idle = {'heads/default/dense_0/bias'} if built.task.name == 'question_answering' else set()
    assert changed - idle == matched - still - idle
    check_optimizer_state(trainer)
    assert summary['steps'] == 3
    packed = config.data.batching == 'packed' and built.model.method.packable
    assert summary['compilations'] <= (1 if packed else 6)
    assert set(summary['metrics']) == set(built.validation_splits) != set()
    check_saved(tmp_path / 'adapter', trainer)


# One config of each file that has some which are trained in the slow tests only.
BUILT = {name.partition(':')[0]: (name, method) for name, method in PAIRED if name in ONLY_SLOW}


@pytest.mark.parametrize(('name', 'method'), BUILT.values())
def test_every_file_gives_an_experiment_with_something_to_train(
    name, method, backbones, tmp_path, monkeypatch
):
    backbone = backbone_for(name, method, backbones)
    built = experiment.build(shipped(name, method, backbone, tmp_path, monkeypatch))
    shapes = jax.eval_shape(built.init_params)
    rules = params.decide(params.flatten(shapes), built.model.rules)
    trained = {path for path, rule in rules.items() if rule.train}
    assert trained and trained < set(rules)
    assert set(built.validation_splits) != set()


def check_optimizer_state(trainer):
    """Every array of the optimizer's state is a counter or stands for one trainable leaf."""
    shapes = {path: leaf.shape for path, leaf in params.flatten(trainer.trainable).items()}
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(trainer.opt_state):
        if not leaf.shape:
            continue
        name = '/'.join(str(key.key) for key in path if hasattr(key, 'key'))
        if name not in shapes:  # of AdaLoRA's schedule, which lists its triplets
            assert leaf.shape in {shapes[path] for path in shapes if '/adalora/' in path}, name
            continue
        assert leaf.shape == shapes[name], name
        seen.add(name)
    # Scalars aside, both moments exist for every leaf.
    assert seen == {path for path, shape in shapes.items() if shape}


def check_saved(folder, trainer):
    """The adapter's files are as large as what was trained, and a header."""
    files = [folder / 'adapter.safetensors', folder / 'head.safetensors']
    header = 300 * (2 + len(params.flatten(trainer.trainable)))
    assert sum(f.stat().st_size for f in files) <= 4 * params.count(trainer.trainable) + header


def test_the_pairing_covers_every_shipped_config_and_method():
    # Runs of several tasks are in test_multitask_run, choices in test_choose, and `again` repeats;
    # of models that write texts in test_writing_runs and test_speech_runs.
    others = {'__init__', 'multitask', 'choose', 'again', 'seq2seq', 'speech'}
    files = {path.stem for path in (ROOT / 'configs').glob('*.py')} - others
    configs = {name for name, _ in PAIRED}
    assert {name.partition(':')[0] for name in configs} == files
    assert {f'glue:task={key}' for key in glue.TASKS} <= configs
    methods = [registry.create(method) for _, method in PAIRED]
    architectures = {type(part) for m in methods for part in getattr(m, 'members', (m,))}
    assert architectures == set(registry.ARCHITECTURES.values())


ZERO_AT_FIRST = {
    'par_bn': ('up', 0),
    'scaled_par_bn': ('up', 0),
    'houlsby[init_weights=zero,size=4]': ('up', 0),
    'double_seq_bn[init_weights=zero]': ('up', 0),
    'pfeiffer[init_weights=zero,reduction_factor=2]': ('up', 0),
    'adapter_plus[init_weights=zero,reduction_factor=4]': ('up', 0),
    'attention[size=4,heads=2,init_scale=0.0]': ('output', 0),
    'attention[size=4,heads=2,init_scale=0.0,mh_adapter=True]': ('output', 0),
    'attention_side[size=4,heads=2,init_scale=0.0]': ('output', 0),
}
ONE_OF_EACH = {
    *('scaled_par_bn', 'houlsby[init_weights=zero,size=4]'),
    'attention_side[size=4,heads=2,init_scale=0.0]',
}


@functools.cache
def without_adapter():
    """Return a head, a batch, and the logits of the backbone alone under the head."""
    plain = tiny.model(registry.create('head'))
    tree, batch = tiny.params(plain), tiny.batch([(7, 9, 4), (20,), (3, 16)], 24)
    return tree['heads'], batch, np.asarray(jax.jit(plain.apply)(tree, batch))


@pytest.mark.parametrize(
    'method',
    [pytest.param(m, marks=[] if m in ONE_OF_EACH else pytest.mark.slow) for m in ZERO_AT_FIRST],
)
def test_a_zero_adapter_leaves_every_logit_as_it_is_bit_for_bit(method):
    heads, batch, expected = without_adapter()
    adapted = tiny.model(registry.create(method))
    with_adapter = tiny.params(adapted) | {'heads': heads}
    assert params.count(with_adapter['adapters']) > 0
    found = np.asarray(jax.jit(adapted.apply)(with_adapter, batch))
    assert np.ptp(expected[batch['example_mask']]) > 0.1
    assert found.tobytes() == expected.tobytes()
    # The comparison can fail: the same adapter with noise on its leaves changes every logit.
    rng = np.random.default_rng(0)
    with_adapter['adapters'] = jax.tree.map(
        lambda x: x + rng.standard_normal(x.shape).astype(x.dtype), with_adapter['adapters']
    )
    moved = np.asarray(jax.jit(adapted.apply)(with_adapter, batch))
    assert (moved != expected)[batch['example_mask']].all()


def leaf_keys(node, prefix=()):
    for key, value in node.items():
        if isinstance(value, type(base())):
            yield from leaf_keys(value, (*prefix, key))
        else:
            yield (*prefix, key)


@functools.cache
def texts(room=''):
    """Return the text of the files of a room, but of those where keys are defined."""
    files = (p for p in (ROOT / 'adapters_jax' / room).rglob('*.py') if p.name not in KEYS)
    return '\n'.join(path.read_text('utf-8') for path in files)


def is_read(path):
    """Whether a key is read of its section: as an attribute, or by its name on the same line."""
    *sections, name = path
    section = (sections or ['config'])[-1]
    quoted = rf"['\"]{name}['\"]"
    found = re.search(rf'\b{section}(\.{name}\b(?!\s*\()|\b[^\n]*{quoted})', texts())
    # Each kind of task names those that it takes.
    return bool(found or (section == 'task' and re.search(quoted, texts('tasks'))))


# What is built of a whole section: each key is a field of it.
WHOLE = {'fusion': FusionConfig, 'head': HeadConfig, 'optimizer': OptimizerConfig}


@pytest.mark.parametrize('path', [p for p in leaf_keys(base()) if p[0] not in WHOLE], ids='.'.join)
def test_every_key_of_the_config_is_read_somewhere(path):
    assert is_read(path), f'{".".join(path)} is read by nothing'


def test_a_key_that_is_read_of_nothing_is_found():
    # Known to other sections, or to nobody.
    assert not any(map(is_read, [('mesh', 'beams'), ('sweep', 'limit'), ('task', 'nothing')]))


@pytest.mark.parametrize('section', WHOLE)
def test_sections_handed_on_whole_have_the_fields_of_what_takes_them(section):
    assert set(base()[section]) == {field.name for field in dataclasses.fields(WHOLE[section])}


@pytest.mark.parametrize('name', ['RTE', 'STS-B', 'sts_b', 'mrpc'])
def test_tasks_of_glue_are_known_by_any_of_their_names(name):
    key = glue.key_of(name)
    for text in (f'glue:task={name}', f'papers/houlsby2019:task={name},way=adapters64'):
        path, _, argument = text.partition(':')
        config = entry.load_config(f'{ROOT}/configs/{path}.py:{argument}')
        assert config.data.glue == key
    assert list(entry.load_config(f'{ROOT}/configs/multitask.py:tasks={name}+own').tasks) == sorted(
        [key, 'own']
    )
    with pytest.raises(ValueError, match=r"unknown task 'rtl'; known: cola.*rte.*trec"):
        entry.load_config(f'{ROOT}/configs/papers/houlsby2019.py:task=rtl')


def test_settings_of_a_paper_s_task_are_those_of_few_of_its_examples_too():
    def paper(name, task):
        return entry.load_config(f'{ROOT}/configs/papers/{name}.py:task={task}')

    assert paper('mahabadi2021', 'MNLI').training.epochs == 3.0
    assert paper('mahabadi2021', 'rte').training.epochs == 20.0
    for task in ('mrpc', 'MRPC', 'mrpc@100'):
        assert paper('pfeiffer2021', task).task.primary == 'accuracy'
        assert paper('hu2022', task).training.epochs == paper('hu2022', 'mrpc').training.epochs
    assert entry.load_config(f'{ROOT}/configs/choose.py:task=STS-B').data.glue == 'stsb'
