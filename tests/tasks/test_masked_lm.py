"""Masked language models: the checkpoint's own head, what is trained, and what comes of it."""

import json

import jax
import numpy as np
import pytest
import safetensors.torch
import tiny
import torch
import toy
from toy_language_models import MODELS, write_language_model

from adapters_jax import sweep, tasks
from adapters_jax.adapters import registry
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.composed import Composed
from adapters_jax.adapters.invertible import Invertible
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder, language_heads
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.models.heads import VOCABULARY, HeadConfig
from adapters_jax.params import flatten, map_with_path
from adapters_jax.predict import predict
from adapters_jax.quantize import against_rows, to_int8
from adapters_jax.sites import Stream
from adapters_jax.tasks import masked_lm
from adapters_jax.train import train
from adapters_jax.training import ahead, experiment
from experiments.toy import random_leaf, vocabulary


def head_config(**options):
    return HeadConfig(pooling=VOCABULARY, **options)


@pytest.mark.parametrize('family', MODELS)
def test_logits_in_hidden_places_are_the_originals(tmp_path, family):
    original = write_language_model(tmp_path / 'm', family)
    loaded = load_backbone(str(tmp_path / 'm'))
    words = loaded.config.vocabulary
    method = registry.create('head')
    model = tiny.Model(loaded.config, method, head_config(), words)
    params = model.init(jax.random.key(0), loaded.params)
    published = {'default': language_heads.read(loaded)}
    assert flatten(published).keys() == flatten(params['heads']).keys()
    batch = tiny.batch([(20,), (13,)], 20)
    batch['input_ids'] = np.where(
        batch['segments'] > 0, batch['input_ids'] + 2, loaded.config.pad_id
    )
    batch['token_type_ids'] *= 0
    batch['masked'] = np.array([[1, 7, 19], [0, 12, 5]], np.int32)
    found = jax.jit(model.apply)(params | {'heads': published}, batch)
    with torch.no_grad():
        ids, mask = (torch.from_numpy(batch[n]).long() for n in ('input_ids', 'segments'))
        expected = original(ids, attention_mask=(mask > 0).long()).logits.numpy()
    expected = np.take_along_axis(expected, batch['masked'][:, :, None], axis=1)
    assert np.ptp(expected) > 3
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize('expression', ['', 'stack(a, b)'])
def test_what_was_done_to_the_embedded_input_is_undone(expression):
    inner = registry.create('seq_bn_inv[bottleneck={reduction_factor: 2}]')
    glow = registry.create('invertible[block_type=glow]')
    method = (
        Composed(expression=expression, members={'a': inner, 'b': glow}) if expression else inner
    )
    params = tiny.params(tiny.model(method))['adapters']['default']
    rng = np.random.default_rng(0)
    params = map_with_path(lambda path, leaf: 0.4 * random_leaf(rng, path, leaf.shape), params)
    sites, x = bind(method, params, None), rng.normal(size=(2, 5, 16)).astype(np.float32)
    changed = sites.embeddings(Stream(x, None, x)).hidden
    assert np.abs(changed - x).max() > 0.1
    np.testing.assert_allclose(sites.undo(changed), x, atol=1e-4)


def test_it_is_undone_right_before_the_word_embeddings(monkeypatch):
    model = tiny.model(registry.create('invertible'), head_config(), outputs=tiny.CONFIG.vocabulary)
    params = tiny.params(model)
    batch = tiny.batch([(9, 7)], 16) | {'masked': np.array([[2, 11]], np.int32)}
    bias = np.asarray(params['heads']['default']['words']['bias'])
    assert np.abs(np.asarray(jax.jit(model.apply)(params, batch)) - bias).max() > 1
    monkeypatch.setattr(Invertible, 'inverse', lambda self, params, x: 0 * x)
    found = jax.jit(lambda *given: model.apply(*given))(params, batch)
    np.testing.assert_array_equal(found[0, 1], bias)


def test_products_with_a_table_in_8_bits():
    random = np.random.default_rng(0)
    x, table = random.normal(size=(2, 3, 8)), random.normal(size=(20, 8))
    x, table = x.astype(np.float32), table.astype(np.float32)
    whole = against_rows(x, table)
    np.testing.assert_allclose(whole, x @ table.T, atol=1e-5)
    np.testing.assert_allclose(against_rows(x, to_int8(table, 0)), whole, atol=0.1)


TASK = tasks.MaskedLM(vocabulary=6, mask_id=4)


def reduced_by_hand(logits, batch):
    wide = np.zeros((*batch['input_ids'].shape, 3))
    for row, place in np.argwhere(batch['chosen']):
        scores, label = logits[row, place].astype(np.float64), batch['label'][row, place]
        nll = np.log(np.exp(scores).sum()) - scores[label]
        wide[row, batch['masked'][row, place]] = nll, scores.argmax() == label, 1
    return wide


def make_batch():
    random = np.random.default_rng(0)
    masked = np.array([[3, 5, 0], [1, 0, 0]], np.int32)
    chosen = np.array([[1, 1, 0], [1, 0, 0]], bool)
    label = np.where(chosen, random.integers(0, 6, (2, 3)), 0).astype(np.int32)
    logits = random.normal(0, 2, (2, 3, 6)).astype(np.float32)
    batch = {'input_ids': np.ones((2, 8), np.int32), 'masked': masked, 'label': label}
    return logits, batch | {'chosen': chosen}


def test_loss_and_what_an_evaluation_keeps_worked_out_by_hand():
    logits, batch = make_batch()
    wide = reduced_by_hand(logits, batch)
    found = jax.jit(TASK.reduced)(logits, batch)
    np.testing.assert_allclose(found, wide, atol=1e-5)
    spoilt = np.where(batch['chosen'][..., None], logits, np.nan)
    slope = jax.jit(jax.value_and_grad(TASK.loss, has_aux=True))
    (total, count), gradient = slope(spoilt, batch)
    assert float(count) == 3 and float(total) == pytest.approx(wide[..., 0].sum(), rel=1e-5)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~batch['chosen']].any()


def test_label_smoothing_and_wrong_settings_are_refused():
    logits, batch = make_batch()
    with pytest.raises(ValueError, match=r'a language model takes 0, not 0\.1'):
        TASK.loss(logits, batch, 0.1)
    with pytest.raises(ValueError, match=r'mask_rate is 1\.0; expected a share'):
        tasks.MaskedLM(mask_rate=1.0)
    with pytest.raises(
        ValueError, match=r'line 4 has the text .the cat.; expected one under "text"'
    ):
        TASK.rows_of([{'text': 'the cat'}], [4], None)
    assert tasks.from_json(json.loads(json.dumps(TASK.to_json()))) == TASK
    assert not TASK.higher_is_better


def write_corpus(path, count=200, seed=0):
    """Texts of which each repeats three words of one topic, so that a missing one can be told."""
    random, lines = np.random.default_rng(seed), []
    for _ in range(count):
        words = random.choice(toy.TOPICS[random.choice(list(toy.TOPICS))], 3, replace=False)
        lines.append(' '.join([*words] * int(random.integers(2, 5))))
    lines.append('the cat ' * 60)
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


@pytest.fixture(scope='module')
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp('lm')
    toy.write_backbone(folder / 'plain')
    write_language_model(folder / 'published')
    write_corpus(folder / 'texts.txt')
    return folder


def config(toys, backbone='plain', **changes):
    made = toy.config(str(toys / backbone), str(toys / 'texts.txt'))
    settings = {
        'task__name': 'masked_lm',
        'method': 'seq_bn_inv[bottleneck={reduction_factor: 2}]',
        'training__steps': 6,
        'training__evaluate_every': 3,
        'training__log_every': 1,
        'training__dropout': False,
        'data__max_length': 32,
        'optimizer__learning_rate': 1e-2,
    }
    return toy.change(made, **(settings | changes))


@pytest.fixture(scope='module')
def learned(toys, compiled_once):
    """A run that trains a fresh head with its adapter."""
    summary = train(
        config(toys, training__steps=240, training__evaluate_every=120), toys / 'learned'
    )
    return toys / 'learned', summary


pytestmark = pytest.mark.usefixtures('compiled_once')


def test_words_are_learned_and_evaluated_exactly(learned):
    workdir, summary = learned
    found = summary['metrics']['validation']
    assert summary['primary'] == 'perplexity' and summary['compilations'] == 1
    assert found['perplexity'] < 40 < len(vocabulary()) and found['accuracy'] > 0.1
    assert evaluate(workdir, 'validation')['metrics'] == found
    lines = toy.read_lines(workdir / 'predictions_validation.jsonl')
    right, total = sum(x['found'] for x in lines), sum(x['of'] for x in lines)
    assert right / total == pytest.approx(found['accuracy'])
    losses = [loss for _, loss in toy.losses(workdir)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


def test_missing_words_are_filled_in(learned):
    workdir, _ = learned
    rows = [{'text': 'rain [MASK] snow [MASK]'}, {'text': '[MASK] ' + 'the cat ' * 30}]
    first, second = predict(workdir / 'adapter', rows)
    assert len(first['masks']) == 2 and len(second['masks']) == 1
    for words in (*first['masks'], *second['masks']):
        found = [one['probability'] for one in words]
        assert len(words) == 5 and found == sorted(found, reverse=True) and 0 < sum(found) <= 1
    best = [words[0]['word'] for words in first['masks']]
    assert first['prediction'] == f'rain {best[0]} snow {best[1]}'
    assert first['text'] == rows[0]['text']


def test_a_published_head_stays_as_it_is_and_is_not_stored(toys, tmp_path):
    summary = train(config(toys, 'published'), tmp_path / 'run')
    folder = adapter_folder.load(tmp_path / 'run' / 'adapter')
    assert folder.head['train'] == 'none' and not folder.head_params
    assert flatten(folder.adapter_params)
    assert evaluate(tmp_path / 'run', 'validation')['metrics'] == summary['metrics']['validation']
    trained = train(config(toys, 'published', head__train='all'), tmp_path / 'all')
    assert trained['trainable_parameters'] > summary['trainable_parameters']
    stored = adapter_folder.load(tmp_path / 'all' / 'adapter').head_params
    published = language_heads.read(load_backbone(str(toys / 'published')))
    assert stored.keys() == published.keys()
    before, after = flatten(published), flatten(stored)
    assert all(0 < np.abs(after[path] - before[path]).max() < 0.2 for path in before)


def test_a_language_adapter_goes_below_a_task_adapter(learned, toys, tmp_path):
    workdir, _ = learned
    data = toy.write_texts(tmp_path / 'texts.csv', 60)
    made = toy.config(str(toys / 'plain'), data, training__steps=3)
    made.adapters = f'lang={workdir / "adapter"},task=pfeiffer[reduction_factor=4]'
    made.method = 'stack(lang, task)'
    train(made, tmp_path / 'run')
    stacked = adapter_folder.load(tmp_path / 'run' / 'adapter').adapter_params
    language = flatten(adapter_folder.load(workdir / 'adapter').adapter_params)
    for path, leaf in flatten(stacked['lang']).items():
        np.testing.assert_array_equal(leaf, language[path])
    assert predict(tmp_path / 'run' / 'adapter', [{'text': 'the cat'}])[0]['label'] in toy.TOPICS


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'head__train': 'none'}, "head.train is 'none', but the head does not come with"),
        ({'backbone': 'published', 'method': 'head'}, "nothing is left to train: head .* set head"),
        ({'training__label_smoothing': 0.1}, 'is 0.1, but masked_lm has no classes'),
        ({'training__patience': 2}, 'patience is 2, but there is no validation split'),
        ({'head__train': 'some'}, "head.train is 'some'; expected one of"),
        ({'training__trunk_cache': 'float32', 'data__cache_dir': 'c',
          'method': 'pfeiffer[leave_out=[0]]', 'backbone': 'two'}, 'hides other words in each ep'),
        ({'adapters': 'a=invertible,b=invertible', 'method': 'average(a, b)'},
         r'must be undone before the output embeddings, which only stack\(...\) can'),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(toys, tmp_path, changes, message):
    if changes.get('training__patience'):
        changes = changes | {'data__split_fractions': ()}
    if changes.get('backbone') == 'two':
        backbone = toy.write_backbone(tmp_path / 'two', layers=2)
        changes = changes | {'backbone': backbone, 'data__cache_dir': str(tmp_path / 'c')}
        changes['method'] = 'pfeiffer[reduction_factor=2,leave_out=[0]]'
    with pytest.raises(ValueError, match=message):
        train(config(toys, **changes), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'config.json').exists()


def test_a_sweep_of_nothing_to_train_is_refused(toys, tmp_path):
    given = config(toys, 'published', method='head', sweep__grid=('seed=0,1',))
    with pytest.raises(ValueError, match='nothing is left to train: head brings no parameters'):
        sweep.sweep(given, tmp_path / 'w')
    assert not (tmp_path / 'w' / 'config.json').exists()


def test_of_several_populations_one_that_would_train_nothing_is_told_before_the_first(
    toys, tmp_path
):
    given = config(toys, 'published', sweep__grid=('method=lora[r=2],head', 'seed=0,1'))
    with pytest.raises(ValueError, match='nothing is left to train: head brings no parameters'):
        sweep.sweep(given, tmp_path / 'w')
    assert not (tmp_path / 'w' / 'config.json').exists()


@pytest.mark.slow
def test_a_search_passes_by_what_would_train_nothing(toys, tmp_path):
    space = ('method=lora[r=2],head', 'head.train=all,none')
    changes = {'sweep__space': space, 'sweep__trials': 8, 'sweep__sampler': 'random'}
    given = config(toys, 'published', method='lora[r=2]', training__steps=2, **changes)
    result = sweep.sweep(given, tmp_path / 'w')
    states = {tuple(row['settings'].values()): row['state'] for row in result['members']}
    assert states.pop(('head', 'none')).startswith('not possible: nothing is left to train')
    assert set(states.values()) == {'all steps taken'}


def test_untied_or_damaged_heads_are_refused(tmp_path):
    model = write_language_model(tmp_path / 'm')
    tensors = {name: x.clone().contiguous() for name, x in model.state_dict().items()}
    tensors['cls.predictions.decoder.weight'] = tensors['cls.predictions.decoder.weight'] + 1
    write_tensors(tmp_path / 'm', tensors)
    loaded = load_backbone(str(tmp_path / 'm'))
    with pytest.raises(ValueError, match=r'output embeddings of .* are not its word embeddings'):
        language_heads.read(loaded)
    del tensors['cls.predictions.decoder.weight'], tensors['cls.predictions.transform.dense.bias']
    write_tensors(tmp_path / 'm', tensors)
    with pytest.raises(ValueError, match='transform/bias missing, expected'):
        language_heads.read(loaded)


def write_tensors(folder, tensors):
    safetensors.torch.save_file(tensors, folder / 'model.safetensors')


@pytest.mark.slow
def test_a_population_scores_as_its_members_alone(toys, tmp_path):
    made = config(toys, 'published', data__seed=0)
    alone = train(made, tmp_path / 'alone')
    made.sweep.grid = ('seed=0,1',)
    sweep.sweep(made, tmp_path / 'sweep')
    paths = (tmp_path / 'sweep').glob('members/*/summary.json')
    members = {m['seed']: m for m in (json.loads(path.read_text()) for path in paths)}
    assert members[0]['population'] == 2
    assert members[0]['metrics']['validation'] == pytest.approx(
        alone['metrics']['validation'], rel=1e-5
    )


def test_shapes_ahead_are_those_of_a_batch(toys):
    plan = ahead.plan(config(toys, 'published'), texts=3)
    assert plan.batch['masked'].shape == (32, 5 + 3) and plan.batch['chosen'].dtype == bool
    assert not plan.start.trainable.get('heads')


def test_the_task_knows_its_backbones_words(toys):
    built = experiment.build(config(toys))
    assert built.task.num_outputs == len(vocabulary())
    assert built.task.mask_token == '[MASK]' and built.task.mask_id == 4


@pytest.mark.parametrize(
    ('before', 'piece', 'word', 'expected'),
    [
        ('walk', '##ing', '##ing', 'walking'),
        ('walk ', '##ing', '##ing', 'walking'),
        ('I like', '\u0120it', 'it', 'I like it'),
        ('I like ', '\u2581it', 'it', 'I like it'),
        ('', '\u0120it', 'it', 'it'),
        ('un', 'like', 'like', 'unlike'),
    ],
)
def test_a_piece_of_a_word_goes_on_with_it(before, piece, word, expected):
    assert masked_lm._joined(before, piece, word) == expected
