"""A finished adapter as a folder: what is in it, how large it is, and what comes back."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from adapters_jax import files, params
from adapters_jax.adapters import registry
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.adapter_folder import AdapterFolder

BACKBONE = {'name': 'org/name', 'family': 'bert', 'layers': 3, 'hidden': 16, 'fingerprint': 'f00d'}
METHODS = ('par_bn', 'houlsby[size=4]', 'attention_side[size=4,heads=2]', 'head', 'full')
FILES = {'adapter_config.json', 'adapter.safetensors', 'head.safetensors'}


def trained(method, seed=0):
    """Return a model, and a trainable tree that differs from its initialisation everywhere."""
    model = tiny.model(registry.create(method), name='my.adapter')
    trainable, frozen = params.partition(tiny.params(model), model.rules)
    rng = np.random.default_rng(seed)
    noisy = jax.tree.map(lambda x: x + rng.standard_normal(x.shape).astype(np.float32), trainable)
    return model, noisy, frozen


def described(model, trainable):
    return AdapterFolder(
        name=model.name,
        method=model.method.to_json(),
        head=model.head_config.to_json(),
        task={'name': 'classification', 'labels': ['ja', 'nein', 'größer']},
        backbone=BACKBONE,
        max_length=32,
        pair=False,
        adapter_params=trainable.get('adapters', {}).get(model.name, {}),
        head_params=trainable['heads'][model.name],
        backbone_params=trainable.get('backbone', {}),
    )


def bits(tree):
    return {path: np.asarray(x).tobytes() for path, x in params.flatten(tree).items()}


@pytest.mark.parametrize('method', METHODS)
def test_everything_comes_back_bit_for_bit(tmp_path, method):
    model, trainable, _ = trained(method)
    folder = described(model, trainable)
    assert adapter_folder.save(folder, tmp_path / 'a' / 'adapter') == tmp_path / 'a' / 'adapter'
    again = adapter_folder.load(tmp_path / 'a' / 'adapter')
    for field in ('name', 'method', 'head', 'task', 'backbone', 'max_length'):
        assert getattr(again, field) == getattr(folder, field)
    for field in ('adapter_params', 'head_params', 'backbone_params'):
        assert bits(getattr(again, field)) == bits(getattr(folder, field))
    assert registry.from_json(again.method) == model.method


@pytest.mark.parametrize('method', METHODS)
def test_over_its_backbone_it_is_the_model_that_was_trained(tmp_path, method):
    model, trainable, frozen = trained(method)
    adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    again = adapter_folder.load(tmp_path / 'adapter')
    # The backbone as published: what the method tuned is not in it.
    published = tiny.params(model)['backbone']
    whole = again.overlay(published, {})
    assert bits(whole) == bits(params.merge(trainable, frozen))
    batch = tiny.batch([(5, 9), (16,)], 24)
    forward = jax.jit(model.apply)
    expected = np.asarray(forward(params.merge(trainable, frozen), batch))
    assert np.asarray(forward(whole, batch)).tobytes() == expected.tobytes()


def test_the_folder_is_as_large_as_what_was_trained(tmp_path):
    model, trainable, _ = trained('houlsby[size=4]')
    adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    assert {path.name for path in (tmp_path / 'adapter').iterdir()} == FILES
    leaves = load_file(tmp_path / 'adapter' / 'adapter.safetensors')
    assert {path.partition('/')[0] for path in leaves} == {'adapter', 'backbone'}
    assert all('/norm/' in path for path in leaves if path.startswith('backbone/'))
    heads = load_file(tmp_path / 'adapter' / 'head.safetensors')
    assert set(heads) == {'dense_0/kernel', 'dense_0/bias'}
    stored = sum(x.size for x in leaves.values()) + sum(x.size for x in heads.values())
    assert stored == params.count(trainable)
    size = sum(path.stat().st_size for path in (tmp_path / 'adapter').iterdir())
    assert 4 * stored < size < 4 * stored + 120 * len(leaves) + 3000


def test_the_config_is_readable_and_says_whose_it_is(tmp_path):
    model, trainable, _ = trained('par_bn')
    adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    config = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text('utf-8'))
    assert config['format'] == 'adapters_jax' and config['version']
    assert config['method']['architecture'] == 'bottleneck'
    assert config['backbone'] == BACKBONE


def test_leaves_that_are_views_are_stored_as_they_look(tmp_path):
    model, trainable, _ = trained('par_bn')
    turned = jax.tree.map(lambda x: np.asarray(x).T.copy().T, trainable)
    adapter_folder.save(described(model, turned), tmp_path / 'adapter')
    again = adapter_folder.load(tmp_path / 'adapter')
    assert bits(again.adapter_params) == bits(trainable['adapters'][model.name])


def test_saving_replaces_the_folder_as_a_whole(tmp_path):
    for method in ('houlsby[size=4]', 'par_bn'):
        model, trainable, _ = trained(method)
        adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    again = adapter_folder.load(tmp_path / 'adapter')
    assert again.backbone_params == {} and again.method == model.method.to_json()
    assert [path.name for path in tmp_path.iterdir()] == ['adapter']


def test_a_failure_leaves_the_old_adapter_and_nothing_half_written(tmp_path, monkeypatch):
    model, trainable, _ = trained('par_bn')
    adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    before = bits(adapter_folder.load(tmp_path / 'adapter').adapter_params)
    other = jax.tree.map(lambda x: x + 1, trainable)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files, '_replace', interrupted)
    with pytest.raises(KeyboardInterrupt):
        adapter_folder.save(described(model, other), tmp_path / 'adapter')
    assert bits(adapter_folder.load(tmp_path / 'adapter').adapter_params) == before
    assert [path.name for path in tmp_path.iterdir()] == ['adapter']


def test_a_kill_between_the_two_renames_is_mended_by_the_next_reader(tmp_path):
    model, trainable, _ = trained('par_bn')
    adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    (tmp_path / 'adapter').rename(tmp_path / '.adapter.previous')
    again = adapter_folder.load(tmp_path / 'adapter')
    assert bits(again.adapter_params) == bits(trainable['adapters'][model.name])


def test_a_reader_leaves_a_running_replacement_alone(tmp_path):
    """The old folder is still to be removed by the run that has just replaced it."""
    model, trainable, _ = trained('par_bn')
    for name in ('adapter', '.adapter.previous'):
        adapter_folder.save(described(model, trainable), tmp_path / name)
    adapter_folder.load(tmp_path / 'adapter')
    assert (tmp_path / '.adapter.previous').exists()


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        ({'hidden': 24}, "its hidden is 16, that of 'here' is 24; expected 'org/name'"),
        ({'layers': 2}, "its layers is 3, that of 'here' is 2"),
        ({'family': 'roberta'}, "its family is bert, that of 'here' is roberta"),
        ({'fingerprint': 'beef'}, "its fingerprint is f00d, that of 'here' is beef"),
    ],
)
def test_another_backbone_is_refused(change, expected):
    folder = described(*trained('par_bn')[:2])
    adapter_folder.check_backbone(folder, BACKBONE | {'name': 'here'})
    with pytest.raises(ValueError, match=expected):
        adapter_folder.check_backbone(folder, BACKBONE | {'name': 'here'} | change)


def test_leaves_must_be_those_that_the_method_describes(tmp_path):
    model, trainable, _ = trained('houlsby[size=4]')
    folder = described(model, trainable)
    adapter_folder.check_leaves(folder, trainable, {})
    wider = registry.create('houlsby[size=6]')
    expected = tiny.model(wider, name=model.name)
    wanted, _ = params.partition(tiny.params(expected), expected.rules)
    shape = r'adapters/my\.adapter/layer_0/attention/down/bias has shape \(4,\), expected \(6,\)'
    with pytest.raises(ValueError, match=f'{shape}; .* and 7 more; restore its folder'):
        adapter_folder.check_leaves(folder, wanted, {})


def test_no_room_for_the_tensors_is_one_sentence(tmp_path):
    """The tensor library has errors of its own for what the system refuses."""
    resource = pytest.importorskip('resource')
    model, trainable, _ = trained('houlsby[size=4]')
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(files.DiskError, match=r'no room to write .*free some space'):
            adapter_folder.save(described(model, trainable), tmp_path / 'adapter')
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    model, trainable, frozen = trained('houlsby[size=4]')
    path = adapter_folder.save(described(model, trainable), tmp_path_factory.mktemp('saved') / 'a')
    return path, trainable, frozen


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_damage_is_refused_or_harms_no_structure(saved, tmp_path_factory, data):
    """Truncated or changed anywhere: one kind of error, or every leaf with its shape."""
    source, trainable, frozen = saved
    folder = tmp_path_factory.getbasetemp() / 'damaged'
    shutil.copytree(source, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(sorted(FILES)))
    content = bytearray((source / name).read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:place]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    (folder / name).write_bytes(bytes(content))
    try:
        again = adapter_folder.load(folder)
        registry.from_json(again.method)
        adapter_folder.check_leaves(again, trainable, frozen)
    except (ValueError, FileNotFoundError) as error:
        assert str(error)
        return
    found = params.flatten(again.adapter_params) | params.flatten(again.head_params)
    assert all(np.isfinite(leaf).all() for leaf in found.values())


@pytest.mark.parametrize('name', ['', '../up', 'a/b'])
def test_a_name_that_is_no_key_of_a_tree(saved, tmp_path, name):
    path, *_ = saved
    shutil.copytree(path, tmp_path / 'a')
    config = json.loads((tmp_path / 'a' / 'adapter_config.json').read_text())
    (tmp_path / 'a' / 'adapter_config.json').write_text(json.dumps(config | {'name': name}))
    with pytest.raises(ValueError, match='an adapter cannot be named'):
        adapter_folder.load(tmp_path / 'a')


LORA = registry.create('lora').to_json()
COMPOSED = {'architecture': 'composed', 'expression': 'stack(a)', 'members': {'a': LORA}}


@pytest.mark.parametrize(
    ('changes', 'sentence'),
    [
        ({'method': LORA | {'r': 'many'}}, "r='many'"),
        ({'method': COMPOSED | {'members': {'a': 3}}}, "the member 'a' is 3"),
        ({'method': COMPOSED | {'frozen_members': 1}}, 'frozen_members=1'),
        ({'head': {'layers': 'two'}}, "the head has layers='two'"),
    ],
)
def test_a_description_that_is_none_is_refused_by_its_file(saved, tmp_path, changes, sentence):
    path, *_ = saved
    shutil.copytree(path, tmp_path / 'a')
    file = tmp_path / 'a' / 'adapter_config.json'
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ValueError, match=f'adapter_config.json: .*{sentence}'):
        adapter_folder.load(tmp_path / 'a')
