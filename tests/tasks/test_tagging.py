"""The task of tagging: labels, loss, metrics and predictions."""

import datasets
import jax
import numpy as np
import pytest
import seqeval.metrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from seqeval.scheme import BILOU, IOB2

from adapters_jax import tasks
from adapters_jax.config import base
from adapters_jax.data import schemes
from adapters_jax.data.encoded import Encoded
from adapters_jax.tasks import Tagging

SPANS = Tagging(labels=schemes.labels(['LOC', 'PER'], 'bio'), scheme='bio')
WORDS = Tagging(labels=('ADJ', 'NOUN', 'VERB'))


def rows_of(tags, scheme=None, **columns):
    given_columns = {'tokens': [[f'w{i}' for i in range(len(own))] for own in tags], 'tags': tags}
    given_columns |= {'file': ['f.conll'] * len(tags), 'line': [10 * i for i in range(len(tags))]}
    if scheme:
        given_columns['scheme'] = [scheme] * len(tags)
    return datasets.Dataset.from_dict(given_columns | columns)


def encoded_of(task, tags, pieces=1):
    """Sentences as they are encoded: a special token, each word's pieces, a special token."""
    ids = {tag: i for i, tag in enumerate(task.labels)} | {'': -1}
    word, label = [], []
    for own in tags:
        word += [-1, *(w for i in range(len(own)) for w in [i] + [-1] * (pieces - 1)), -1]
        label += [-1, *(x for tag in own for x in [ids[tag]] + [-1] * (pieces - 1)), -1]
    offsets = np.cumsum([0, *(len(own) * pieces + 2 for own in tags)])
    tokens = {name: np.zeros(offsets[-1], np.int32) for name in ('input_ids', 'token_type_ids')}
    return Encoded(
        tokens=tokens | {'label': np.array(label, np.int32)},
        offsets=offsets,
        examples={},
        aside={'word': np.array(word, np.int32)},
        rows=np.arange(len(tags)),
    )


def outputs_of(task, encoded, tags, seed=0):
    """Outputs whose largest numbers say these tags; those of other tokens say anything."""
    rng = np.random.default_rng(seed)
    outputs = rng.standard_normal((encoded.offsets[-1], task.num_outputs))
    place = np.flatnonzero(encoded.aside['word'] >= 0)
    said = [task.labels.index(tag) for own in tags for tag in own]
    outputs[place, said] += 20
    return outputs.astype(np.float32)


TAG = st.sampled_from(SPANS.labels)
BOTH = st.lists(st.tuples(TAG, TAG), min_size=1, max_size=7)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(BOTH, min_size=1, max_size=4), st.integers(1, 3))
def test_scores_are_those_of_seqeval_over_whole_sentences(sentences, pieces):
    gold = [schemes.convert([g for g, _ in own], 'bio', 'bio') for own in sentences]
    said = [[p for _, p in own] for own in sentences]
    encoded = encoded_of(SPANS, gold, pieces)
    outputs = outputs_of(SPANS, encoded, said)
    found = SPANS.score(outputs, encoded, rows_of(gold, 'bio'))
    strict = {'mode': 'strict', 'scheme': IOB2, 'zero_division': 0}
    for name in ('f1', 'precision', 'recall'):
        expected = getattr(seqeval.metrics, f'{name}_score')(gold, said, **strict)
        assert found[name] == pytest.approx(expected)
    right = np.mean(
        [g == p for a, b in zip(gold, said, strict=True) for g, p in zip(a, b, strict=True)]
    )
    assert found['accuracy'] == pytest.approx(right)
    details = SPANS.details(outputs, encoded, rows_of(gold, 'bio'))['types']
    assert sum(row['count'] for row in details.values()) == sum(
        len(schemes.spans(own)) for own in gold
    )
    predicted = SPANS.predict(outputs, encoded, rows_of(gold, 'bio'))
    assert [one['prediction'] for one in predicted] == said


def test_a_word_without_a_known_tag_counts_nowhere():
    gold = [['NOUN', '', 'VERB'], ['']]
    encoded = encoded_of(WORDS, gold)
    outputs = outputs_of(WORDS, encoded, [['NOUN', 'ADJ', 'ADJ'], ['ADJ']])
    assert WORDS.score(outputs, encoded, rows_of(gold)) == {'accuracy': 0.5}
    details = WORDS.details(outputs, encoded, rows_of(gold))
    assert {tag: row['count'] for tag, row in details['types'].items()} == {
        'ADJ': 0,
        'NOUN': 1,
        'VERB': 1,
    }
    text = WORDS.details_text(details).splitlines()
    assert text[0].split() == ['precision', 'recall', 'f1', 'count'] and len(text) == 4
    assert len(WORDS.predict(outputs, encoded, rows_of(gold))[1]['prediction']) == 1
    outputs[1] = np.nan
    assert np.isnan(WORDS.score(outputs, encoded, rows_of(gold))['accuracy'])
    unknown = [['']]
    with pytest.raises(ValueError, match='need at least one word with a tag'):
        WORDS.score(np.zeros((3, 3)), encoded_of(WORDS, unknown), rows_of(unknown))


def test_spans_are_predicted_in_the_scheme_of_the_rows():
    said = ['B-PER', 'I-PER', 'B-PER', 'O', 'B-LOC']
    gold, frame = ['O'] * 4 + ['I-LOC'], ['a ', '\r\nb ', '\nc ', '\nd ', '\ne ', ' x\n\n']
    rows = rows_of([gold], 'iob1', frame=[frame])
    encoded = encoded_of(SPANS, [said])
    found = SPANS.predict(outputs_of(SPANS, encoded, [said]), encoded, rows)
    assert found == [{'prediction': ['I-PER', 'I-PER', 'B-PER', 'O', 'I-LOC']}]
    files = SPANS.native_files(rows, found)
    assert files == {'.conll': 'a I-PER\r\nb I-PER\nc B-PER\nd O\ne I-LOC x\n\n'}
    assert SPANS.native_files(rows.remove_columns('frame'), found) == {}
    assert SPANS.shown(rows[0]) == {'tokens': rows[0]['tokens'], 'gold': gold}
    assert SPANS.shown({'tokens': ['a']}) == {'tokens': ['a']}


def test_loss_is_over_the_words_that_have_a_tag():
    rng = np.random.default_rng(0)
    outputs = rng.standard_normal((2, 4, 3)).astype(np.float32)
    label = np.array([[-1, 2, -1, 0], [1, 0, 0, 0]], np.int32)
    segments = np.array(
        [[1, 1, 1, 2], [1, 0, 0, 0]], np.int32
    )  # zeros are padding, whose label is 0
    batch = {'label': label, 'segments': segments}
    log_p = np.asarray(jax.nn.log_softmax(outputs))
    expected = -(log_p[0, 1, 2] + log_p[0, 3, 0] + log_p[1, 0, 1])
    total, count = WORDS.loss(outputs, batch)
    assert count == 3 and total == pytest.approx(expected, rel=1e-5)
    spread = -sum(log_p[i].mean() for i in ((0, 1), (0, 3), (1, 0)))
    total, _ = WORDS.loss(outputs, batch, 0.2)
    assert total == pytest.approx(0.8 * expected + 0.2 * spread, rel=1e-5)
    outputs[1, 1:] = np.nan  # as are those of padding when training diverges nowhere else
    assert np.isfinite(WORDS.loss(outputs, batch)[0])
    with pytest.raises(ValueError, match=r'must lie between 0 and 1, not 1\.5'):
        WORDS.loss(outputs, batch, 1.5)


def settled(tags, found, **changes):
    config = base()
    config.task.update(changes)
    return Tagging.settings(config.task, rows_of(tags, found))


def test_labels_are_all_that_a_span_of_the_training_data_may_have():
    every = ('O', 'B-X', 'I-X', 'B-Y', 'I-Y')
    found = settled([['I-Y', 'O'], ['I-X']], 'iob1')
    assert found == {'labels': every, 'scheme': 'bio', 'written': 'iob1'}
    found = settled([['U-X', 'O']], 'bilou')
    labels = 'O', 'B-X', 'I-X', 'E-X', 'S-X'
    assert found == {'labels': labels, 'scheme': 'iobes', 'written': 'bilou'}
    assert Tagging(**found).predicted_labels == ('O', 'B-X', 'I-X', 'L-X', 'U-X')
    assert settled([['B-X', 'O']], 'bio', scheme='iobes')['labels'] == labels
    assert settled([['B-X', 'O', '']], 'bio', scheme='none')['labels'] == ('B-X', 'O')
    found = settled([['VERB', 'ADJ', '']], 'none')
    assert found == {'labels': ('ADJ', 'VERB'), 'scheme': 'none', 'written': ''}
    assert Tagging(**found).predicted_labels == ('ADJ', 'VERB')
    assert settled([['ADJ']], 'none', labels=('X', 'ADJ'))['labels'] == ('X', 'ADJ')
    with pytest.raises(
        ValueError, match=r"task\.scheme is 'bio', but the tags of the training data"
    ):
        settled([['ADJ']], 'none', scheme='bio')


def test_a_stray_tag_among_spans_is_refused_with_its_place():
    frame = [['', '\n', '\n', '\n']]
    rows = rows_of([['O', 'B-PER', 'B_PER']], 'none', frame=frame)
    with pytest.raises(ValueError, match=r"line 2: the tag 'B_PER' is of no scheme.*scheme='none'"):
        Tagging.settings(base().task, rows)
    given = base()
    given.task.scheme = 'none'
    assert Tagging.settings(given.task, rows)['labels'] == ('B-PER', 'B_PER', 'O')
    assert settled([['B', 'NN', 'O']], 'none')['scheme'] == 'none'  # B may be a part of speech


def test_words_alone_are_answered_in_the_scheme_of_the_data():
    task = Tagging(labels=('O', 'B-X', 'I-X', 'E-X', 'S-X'), written='bilou')
    said = ['S-X', 'O', 'B-X', 'E-X']
    encoded = encoded_of(task, [said])
    rows = task.rows_of([{'tokens': list('abcd')}], [1], None)
    found = task.predict(outputs_of(task, encoded, [said]), encoded, rows)
    assert found == [{'prediction': ['U-X', 'O', 'B-X', 'L-X']}]
    # Tags that say nothing, as some files have them in the place of secret ones, change nothing.
    for nothing in (['O'] * 4, ['O', '', 'O', 'O']):
        rows = rows_of([nothing], schemes.detect([nothing]))
        assert task.predict(outputs_of(task, encoded, [said]), encoded, rows) == found
    assert tasks.from_json(task.to_json()) == task
    with pytest.raises(ValueError, match="written in the scheme 'bilu'; expected one of bio"):
        Tagging(labels=('O', 'B-X'), written='bilu')


def test_predictions_in_bilou_score_as_they_did_in_iobes():
    task = Tagging(labels=('O', 'B-X', 'I-X', 'E-X', 'S-X'), written='bilou')
    gold, said = ['U-X', 'O', 'O', 'B-X', 'L-X'], ['S-X', 'O', 'I-X', 'B-X', 'E-X']
    rows = rows_of([gold], 'bilou')
    encoded = encoded_of(task, [schemes.convert(gold, 'bilou', 'iobes')])
    outputs = outputs_of(task, encoded, [said])
    predicted = [one['prediction'] for one in task.predict(outputs, encoded, rows)]
    assert predicted == [['U-X', 'O', 'I-X', 'B-X', 'L-X']]
    strict = seqeval.metrics.f1_score([gold], predicted, mode='strict', scheme=BILOU)
    assert task.score(outputs, encoded, rows)['f1'] == pytest.approx(strict) == 1


def test_what_is_reported_depends_on_the_tags():
    assert WORDS.metric_names == ('accuracy',) and WORDS.primary == 'accuracy'
    assert SPANS.metric_names == ('f1', 'precision', 'recall', 'accuracy')
    assert SPANS.primary == 'f1' and SPANS.per_token
    assert tasks.from_json(SPANS.to_json()) == SPANS


@pytest.mark.parametrize(
    ('fields', 'expected'),
    [
        ({'labels': ('a', 'b'), 'metric_names': ('f1',)}, 'f1 are metrics of spans, but the tags'),
        ({'labels': ('O', 'B-X', 'E-X'), 'scheme': 'bio'}, "labels 'E-X' are not of the scheme"),
        ({'labels': ('O', 'NOUN'), 'scheme': 'bio'}, "the tag 'NOUN' is of no scheme"),
        ({'labels': ('a', 'b'), 'scheme': 'iob1'}, "scheme is 'iob1'; expected one of none, bio"),
        ({'labels': ('O',)}, "tagging needs at least two classes, not 1 \\('O'\\)"),
        ({'labels': ('a', 'b'), 'metric_names': ('matthews',)}, "unknown metric 'matthews'"),
    ],
)
def test_what_cannot_be_a_tagging_task(fields, expected):
    with pytest.raises(ValueError, match=expected):
        Tagging(**fields)


def test_objects_to_predict_for_have_words():
    rows = WORDS.rows_of([{'tokens': ['a', 'b'], 'id': 3}, {'tokens': []}], [1, 2], None)
    assert rows['tokens'][:] == [['a', 'b'], []] and rows.column_names == ['tokens']
    for wrong in ({'text': 'a b'}, {'tokens': 'a b'}, {'tokens': ['a', None]}, {'tokens': ['']}):
        with pytest.raises(
            ValueError, match=r'input line 7: the tokens are .* expected a list of w'
        ):
            WORDS.rows_of([wrong], [7], None)
