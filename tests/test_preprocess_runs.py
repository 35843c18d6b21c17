"""Whole runs on preprocessed texts: training, evaluation, storage and prediction are at one."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pipelines
import pytest
import toy
import untrained

from adapters_jax import config as configs
from adapters_jax import params
from adapters_jax import predict as prediction
from adapters_jax.adapters import registry
from adapters_jax.convert import convert
from adapters_jax.data.encoded import TAGS
from adapters_jax.data.preprocess import chain, tags
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.tasks import Classification
from adapters_jax.tasks.task import Task
from adapters_jax.train import train
from adapters_jax.training import experiment, multitask, preprocessing

pytestmark = pytest.mark.usefixtures('compiled_once')

READER = 'attention[size=8,heads=2,tags=18]'
TEXTS = ['The CAT', 'bread and soup and ＲＩＣＥ', 'this is the', 'a storm very near the horse .']


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with a backbone, texts and a spaCy pipeline that knows the topics' words."""
    folder = tmp_path_factory.mktemp('preprocess')
    toy.write_backbone(folder / 'bert')
    toy.write_texts(folder / 'texts.csv', 60)
    names = zip(('NOUN', 'VERB', 'ADJ'), toy.TOPICS.values(), strict=True)
    pipelines.write(folder / 'few', dict(names))
    return folder


def steps(place):
    return ('nfkc', 'lower', 'stop_words[language=en]', f'tags[spacy={place / "few"}]')


def config(place, method=READER, **changes):
    given = {'data__preprocess': steps(place), 'method': method} | changes
    return toy.config(str(place / 'bert'), str(place / 'texts.csv'), **given)


@pytest.fixture(scope='module')
def tagged(place):
    """A finished run that reads tags."""
    train(config(place, optimizer__learning_rate=0.05), place / 'tagged')
    return place / 'tagged'


@pytest.fixture(scope='module')
def plain(place):
    """An adapter that nobody trained, of the texts as they are."""
    changes = {'data__preprocess': (), 'method': 'pfeiffer[reduction_factor=2]'}
    return untrained.run(config(place, **changes), place / 'plain')


def logits(adapter, texts=TEXTS, **options):
    rows = predict(adapter, [{'text': text} for text in texts], **options)
    return np.array([row['logits'] for row in rows])


def test_predict_does_to_texts_what_training_did(tagged, tmp_path):
    evaluate(tagged, 'test')
    expected = toy.read_lines(tagged / 'predictions_test.jsonl')
    found = logits(tagged / 'adapter', [row['text_a'] for row in expected])
    np.testing.assert_allclose(found, [row['logits'] for row in expected], atol=1e-5)
    # The texts that are written are those of the file; the chain has not run yet.
    assert any(word in toy.FILLERS for row in expected for word in row['text_a'].split())
    # Case and stop words make no difference any more.
    same = logits(tagged / 'adapter', ['CAT and the Dog', 'cat dog'])
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)


def test_conversion_keeps_the_chain(tagged, tmp_path):
    convert(tagged / 'adapter', tmp_path / 'copy', 'adapters_jax')
    np.testing.assert_array_equal(logits(tmp_path / 'copy'), logits(tagged / 'adapter'))


def test_the_folder_says_what_was_done_and_one_without_steps_says_nothing(tagged, plain, place):
    stored = json.loads((tagged / 'adapter' / 'adapter_config.json').read_text())
    assert [step['step'] for step in stored['preprocess']] == list(steps(place))
    assert stored['preprocess'][3]['source'] == 'spaCy en_few_words 1.2'
    assert stored['preprocess'][3]['tags'] == list(tags.UNIVERSAL)
    assert 'preprocess' not in json.loads((plain / 'adapter' / 'adapter_config.json').read_text())
    assert configs.read(tagged / 'config.json').data.preprocess == steps(place)


def test_tags_are_trained_and_decide(tagged, tmp_path, monkeypatch):
    """In words that are spelled alike but tagged otherwise."""
    folder = adapter_folder.load(tagged / 'adapter')
    table = folder.adapter_params['shared']['embedding']['tags']['embedding']
    fresh = experiment.build(configs.read(tagged / 'config.json')).init_params()
    begun = fresh['adapters']['default']['shared']['embedding']['tags']['embedding']
    moved = np.abs(table - np.asarray(begun)).max(axis=1)
    seen = [1 + tags.UNIVERSAL.index(tag) for tag in ('NOUN', 'VERB', 'ADJ')]
    assert (moved[seen] > 1e-3).all()
    before = logits(tagged / 'adapter', ['cat dog'])
    other = [['VERB', 'VERB']]
    with monkeypatch.context() as patched:
        loaded = tags.LoadedTagger(lambda texts: other, tags.UNIVERSAL, 'spaCy en_few_words 1.2')
        patched.setattr(tags, 'load_spacy', lambda name: loaded)
        after = logits(tagged / 'adapter', ['cat dog'])
    assert np.abs(after - before).max() > 1e-3


def spoilt(adapter, target, change):
    """Copy an adapter with another description of its steps."""
    shutil.copytree(adapter, target)
    path = target / 'adapter_config.json'
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {'preprocess': change(stored['preprocess'])}))
    return target


@pytest.mark.parametrize(
    ('change', 'sentence'),
    [
        (lambda s: s[:3], r'reads tags \(tags=18\), but no step of data.preprocess gives any'),
        (
            lambda s: [*s[:3], s[3] | {'source': 'spaCy en_few_words 1.1'}],
            r'words 1\.1.*words 1\.2',
        ),
        (lambda s: [*s[:2], s[2] | {'source': '7 stop words, abc'}, s[3]], "with '7 stop words"),
        (lambda s: [s[0] | {'step': 'upper'}, *s[1:]], "unknown step 'upper'"),
        (lambda s: [{}, *s[1:]], "'' is not a step"),
        (lambda s: [*s[:3], s[3] | {'step': 'tags[spacy=en_nowhere]'}], 'spacy download en_now'),
        (lambda s: ['lower'], "'preprocess' is .*expected a list of objects"),
        (lambda s: {'step': 'lower'}, "'preprocess' is .*expected a list of objects"),
    ],
)
def test_a_folder_that_asks_for_what_is_not_here_is_refused(tagged, tmp_path, change, sentence):
    adapter = spoilt(tagged / 'adapter', tmp_path / 'spoilt', change)
    with pytest.raises(ValueError, match=sentence):
        logits(adapter)


def test_evaluation_refuses_a_tagger_that_was_updated(tagged, tmp_path):
    shutil.copytree(tagged, tmp_path / 'run')
    older = [{'source': 'spaCy en_few_words 1.1'}]
    spoilt(tagged / 'adapter', tmp_path / 'new', lambda s: [*s[:3], s[3] | older[0]])
    shutil.rmtree(tmp_path / 'run' / 'adapter')
    (tmp_path / 'new').rename(tmp_path / 'run' / 'adapter')
    with pytest.raises(ValueError, match='install the version that it was trained with'):
        evaluate(tmp_path / 'run')


def test_a_run_goes_on_with_the_same_steps_only(tagged, place):
    changed = config(place, optimizer__learning_rate=0.05, data__preprocess=steps(place)[1:])
    with pytest.raises(ValueError, match=r"data.preprocess was \['nfkc', 'lower'"):
        train(changed, tagged)


def test_adapters_with_and_without_tags_share_a_batch(tagged, plain):
    folders = {'tagged': tagged / 'adapter', 'plain': plain / 'adapter'}
    rows = [{'text': text, 'adapter': name} for text in TEXTS for name in folders]
    found = predict(folders, rows)
    for name, folder in folders.items():
        own = [row['logits'] for row in found if row['adapter'] == name]
        np.testing.assert_allclose(own, logits(folder), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    'changes',
    [
        {'data__batching': 'buckets'},
        {'training__frozen_dtype': 'int8', 'training__accumulate': 2},
        {'training__dtype': 'bfloat16', 'training__remat': 'full'},
    ],
)
def test_what_else_a_run_can_do_it_can_do_with_tags(place, tmp_path, changes):
    summary = train(config(place, training__steps=2, **changes), tmp_path / 'run')
    assert summary['steps'] == 2 and summary['compilations'] == 1
    assert len(logits(tmp_path / 'run' / 'adapter')) == len(TEXTS)


@pytest.mark.slow
def test_a_stored_trunk_changes_nothing(place, tmp_path):
    """The tags come after it, so a run with other ones reads the same file."""
    method = 'attention_side[size=8,heads=2,tags=18]'
    runs = {}
    for kind in ('none', 'float32'):
        given = config(place, method, training__trunk_cache=kind, training__dropout=False)
        given.data.cache_dir = str(tmp_path / 'cache')
        train(given, tmp_path / kind)
        runs[kind] = np.array([loss for _, loss in toy.losses(tmp_path / kind)])
    assert len(runs['none']) and list((tmp_path / 'cache' / 'trunk').iterdir())
    np.testing.assert_allclose(runs['float32'], runs['none'], rtol=1e-3)


@pytest.mark.slow
def test_a_population_reads_tags(place, tmp_path):
    given = config(place, sweep__grid=('seed=0,1',), training__steps=3, data__seed=0)
    sweep(given, tmp_path / 'sweep')
    alone = config(place, training__steps=3, data__seed=0, seed=1)
    train(alone, tmp_path / 'alone')
    member = adapter_folder.load(tmp_path / 'sweep' / 'members' / 'seed-1' / 'adapter')
    assert [step['step'] for step in member.preprocess] == list(steps(place))
    ours, theirs = (
        params.flatten(f.adapter_params)
        for f in (member, adapter_folder.load(tmp_path / 'alone' / 'adapter'))
    )
    for path, leaf in theirs.items():
        np.testing.assert_allclose(ours[path], leaf, atol=1e-4, err_msg=path)


def tasks(place):
    """Return the config of two tasks, whose texts go through different steps."""
    given = toy.config(str(place / 'bert'), training__steps=2, method=READER)
    given.data.preprocess = steps(place)
    for name in ('one', 'two'):
        configs.add_task(given, name).data.train = str(place / 'texts.csv')
    given.tasks.two.data.preprocess = (f'tags[spacy={place / "few"}]',)
    return given


def test_each_of_several_tasks_has_its_own_steps(place):
    built = multitask.build(tasks(place))
    assert built.members['one'].chain.names == steps(place)
    assert built.members['two'].chain.names == steps(place)[3:]
    assert TAGS in built.splits['train'].tokens


@pytest.mark.slow
def test_tasks_are_trained_together_whatever_their_steps(place, tmp_path):
    given = tasks(place)
    train(given, tmp_path / 'run')
    for name in given.tasks:
        folder = tmp_path / 'run' / 'adapter' / name
        assert len(adapter_folder.load(folder).preprocess) == (4 if name == 'one' else 1)
        assert len(logits(folder)) == len(TEXTS)


def make_chain(*names):
    return chain.create(names, lambda directory: tags.LoadedTagger(len, ('A', 'B'), 'two'))


@pytest.mark.parametrize(
    ('method', 'names', 'sentence'),
    [
        ('attention[tags=18]', ['lower'], r'reads tags \(tags=18\), but no step'),
        ('attention_side[tags=2]', ['tags[adapter=x]'], r'vectors for 2 tags.*gives 3.*set tags=3'),
        ('bitfit|attention[tags=1]', ['tags[adapter=x]'], 'vectors for 1 tags'),
    ],
)
def test_a_method_must_have_the_tags_that_it_reads(method, names, sentence):
    with pytest.raises(ValueError, match=sentence):
        preprocessing.check_tags(registry.create(method), make_chain(*names))


def test_labels_of_words_refuse_what_changes_the_words():
    class OfWords(Task):
        name = 'of_words'

    preprocessing.check_task(Classification, make_chain('lower'))
    preprocessing.check_task(OfWords, make_chain())
    with pytest.raises(ValueError, match=r"\('lower',\), but the labels of of_words belong to"):
        preprocessing.check_task(OfWords, make_chain('lower'))


@pytest.mark.parametrize('method', ['attention[tags=3]', 'attention[tags=18]|bitfit'])
def test_as_many_tags_or_more_will_do(method, caplog):
    preprocessing.check_tags(registry.create(method), make_chain('tags[adapter=x]'))
    preprocessing.check_tags(registry.create('lora'), make_chain('lower'))
    assert caplog.text == ''


def test_tags_that_nobody_reads_are_told_of(caplog):
    preprocessing.check_tags(registry.create('houlsby'), make_chain('tags[adapter=x]'))
    (record,) = caplog.records
    assert 'method bottleneck looks at no tags; attention[tags=3] and' in record.getMessage()


def test_a_method_of_tags_without_a_step_is_refused_before_data_is_read(place):
    given = config(place, data__preprocess=(), data__train='/nowhere.csv')
    with pytest.raises(ValueError, match=r'no step of data\.preprocess gives any; add one'):
        experiment.build(given)


def test_an_adapter_in_another_that_saw_other_texts_is_told_of(plain, place, caplog):
    given = config(place, 'stack(en, task)')
    given.adapters = f'en={plain / "adapter"},task=pfeiffer[reduction_factor=2]'
    given.data.preprocess = ('lower',)
    experiment.build(given)
    assert "'en' was trained with data.preprocess=(), and now it is ('lower',)" in caplog.text


def test_other_formats_have_no_place_for_steps(plain, tmp_path, caplog):
    folder = adapter_folder.load(plain / 'adapter')
    described = make_chain('nfc', 'lower').to_json()
    adapter_folder.save(dataclasses.replace(folder, preprocess=described), tmp_path / 'steps')
    convert(plain / 'adapter', tmp_path / 'without', 'adapterhub')
    assert 'has no place' not in caplog.text
    convert(tmp_path / 'steps', tmp_path / 'with', 'adapterhub')
    assert 'after the steps nfc, lower, which adapterhub has no place for' in caplog.text


def test_an_adapter_that_tags_is_asked_as_any_other(tagged, tmp_path, monkeypatch):
    folder = adapter_folder.load(tagged / 'adapter')
    labels = ['NOUN', 'VERB']
    tagging = dataclasses.replace(folder, task={'name': 'tagging', 'labels': labels})
    adapter_folder.save(tagging, tmp_path / 'tagger')
    asked = []

    def fake(directory, rows):
        asked.append((directory, rows))
        return [row | {'prediction': ['NOUN'] * len(row['tokens'])} for row in rows]

    monkeypatch.setattr(prediction, 'predict', fake)
    step = f'tags[adapter={tmp_path / "tagger"}]'
    made = chain.create(['lower', step], preprocessing.load_adapter_tagger)
    documents, _ = made.run(['The cat', 'Sun'])
    assert [document.tags for document in documents] == [('NOUN', 'NOUN'), ('NOUN',)]
    rows = [{'tokens': ['the', 'cat']}, {'tokens': ['sun']}]
    assert asked == [(str(tmp_path / 'tagger'), rows)]
    assert made.inventory == tags.UNIVERSAL
    source = made.to_json()[1]['source']
    assert re.fullmatch(r"tagging adapter 'default' [0-9a-f]{12}", source)
    # Other labels than the universal ones are the inventory; other weights are another tagger.
    labels[:] = ['B-animal', 'O']
    head = {path: leaf + 1 for path, leaf in params.flatten(folder.head_params).items()}
    other = dataclasses.replace(tagging, head_params=params.unflatten(head))
    adapter_folder.save(other, tmp_path / 'tagger')
    again = chain.create([step], preprocessing.load_adapter_tagger)
    assert again.inventory == ('B-animal', 'O') and again.to_json()[0]['source'] != source


@pytest.mark.slow
def test_a_tagging_adapter_tags_for_another_adapter(place, tmp_path):
    """From words with tags to a tagger, and from the tagger's tags to topics."""
    toy.write_tagged(tmp_path / 'spans')
    learner = toy.config(str(place / 'bert'), data__dir=str(tmp_path / 'spans'))
    learner.task.name, learner.optimizer.learning_rate = 'tagging', 2e-2
    learner.training.batch_size, learner.training.epochs = 8, 3.0
    train(learner, tmp_path / 'tagger')
    tagger = tmp_path / 'tagger' / 'adapter'
    step = f'tags[adapter={tagger}]'
    made = chain.create(['lower', step], preprocessing.load_adapter_tagger)
    assert list(made.inventory) == adapter_folder.load(tagger).task['labels']
    odd = ['The cat, the ＤＯＧ', 'snow \u200d\U0001f98a', '\x00', "isn't 3.5"]
    documents, _ = made.run(odd)
    words = [document.words for document in documents if document.words]
    alone = prediction.predict(tagger, [{'tokens': own} for own in words])
    expected = [tuple(row['prediction']) for row in alone]
    assert [document.tags for document in documents if document.words] == expected
    assert len({tag for tags in expected for tag in tags}) > 1
    method = f'attention[size=8,heads=2,tags={made.num_tags}]'
    given = config(place, method, data__preprocess=('lower', step), training__steps=2)
    train(given, tmp_path / 'run')
    evaluate(tmp_path / 'run', 'test')
    rows = toy.read_lines(tmp_path / 'run' / 'predictions_test.jsonl')
    found = logits(tmp_path / 'run' / 'adapter', [row['text_a'] for row in rows])
    np.testing.assert_allclose(found, [row['logits'] for row in rows], atol=1e-5)


def test_an_adapter_that_does_not_tag_is_refused(tagged, tmp_path):
    given = f'tags[adapter={tagged / "adapter"}]'
    with pytest.raises(ValueError, match=r'an adapter for classification; expected one .* tagging'):
        chain.create([given], preprocessing.load_adapter_tagger)
    with pytest.raises(FileNotFoundError, match='is not an adapter'):
        chain.create([f'tags[adapter={tmp_path / "no"}]'], preprocessing.load_adapter_tagger)
