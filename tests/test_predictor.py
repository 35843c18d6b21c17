"""A predictor that is loaded once: the same answers, few programs, the backbone held once."""

import jax
import numpy as np
import pytest
import toy
import untrained

from adapters_jax.predict import Predictor, predict
from adapters_jax.training import fitting

METHODS = {'lora': 'lora[r=2]', 'pfeiffer': 'pfeiffer[size=4]', 'top': 'top_layers[layers=1]'}
WORDS = ['the', 'cat', 'near', 'a', 'storm', 'and', 'bread', 'with', 'soup', 'or', 'rice']

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def adapters(tmp_path_factory):
    """Adapters that nobody trained, two of which can be chosen by row."""
    folder = tmp_path_factory.mktemp('predictor')
    backbone, texts = (
        toy.write_backbone(folder / 'bert', layers=2),
        toy.write_texts(folder / 'a.csv', 60),
    )
    for name, method in METHODS.items():
        untrained.run(toy.config(backbone, texts, method=method), folder / name)
    return {name: folder / name / 'adapter' for name in METHODS}


def texts_of(*counts):
    return [{'text': ' '.join(WORDS[:count])} for count in counts]


def logits(rows):
    return np.array([row['logits'] for row in rows])


def programs(predictor):
    (serving,) = predictor._serving.values()
    forwards = [one._forward for one in (*serving._alone.values(), *serving._routed)]
    return sum(forward._cache_size() for forward in forwards)


def test_it_answers_as_predict_does_and_compiles_for_few_shapes(adapters):
    ask = Predictor(adapters['lora'], batch_size=2)
    for counts in ((3,), (4,), (5,), (1, 2), (11, 3, 9), (8, 9, 10), (2,) * 4, (7, 7, 7, 8)):
        rows = texts_of(*counts)
        found, expected = ask(iter(rows)), predict(adapters['lora'], rows)
        assert [row['text'] for row in found] == [row['text'] for row in rows]
        np.testing.assert_allclose(logits(found), logits(expected), atol=1e-5)
    assert np.ptp(logits(found), axis=0).max() > 1e-3
    # Of 1, 2 and 4 rows, with 8 or 16 tokens.
    assert programs(ask) <= 6
    more = texts_of(*range(1, 11), 1, 2)  # than a batch holds
    np.testing.assert_allclose(
        logits(ask(more)), logits(predict(adapters['lora'], more)), atol=1e-5
    )
    assert ask([]) == []


def test_the_tokenizer_is_read_once(adapters, monkeypatch):
    read, tokenizer_of = [], fitting.tokenizer_of
    monkeypatch.setattr(
        fitting, 'tokenizer_of', lambda loaded: read.append(loaded) or tokenizer_of(loaded)
    )
    ask = Predictor(adapters['lora'])
    assert [ask(texts_of(3))[0]['logits'] for _ in range(2)] == [ask(texts_of(3))[0]['logits']] * 2
    assert len(read) == 1


def test_each_row_has_its_own_adapter_and_the_backbone_is_held_once(adapters):
    ask = Predictor(adapters)
    rows = [
        row | {'adapter': name}
        for row, name in zip(texts_of(3, 5, 7, 2, 3), [*METHODS, 'lora', 'top'], strict=True)
    ]
    for some in (rows, rows[:1], rows[2:3], rows[3:]):
        found = ask(some)
        for row, told in zip(some, found, strict=True):
            (alone,) = predict(adapters[row['adapter']], [{'text': row['text']}])
            np.testing.assert_allclose(told['logits'], alone['logits'], atol=1e-5)
    (serving,) = ask._serving.values()
    (routed,) = serving._routed
    assert routed.names == ('lora', 'pfeiffer')
    with pytest.raises(ValueError, match=r'has the adapter None; .*one of lora, pfeiffer, top'):
        ask(texts_of(1))


def test_adapters_with_programs_of_their_own_share_what_they_leave_frozen(adapters):
    ask = Predictor({'one': adapters['top'], 'other': adapters['top']})
    ask([{'text': 'a', 'adapter': 'one'}])
    (serving,) = ask._serving.values()
    one, other = (jax.tree.leaves(serving._alone[name]._frozen) for name in ('one', 'other'))
    assert len(one) > 4 and all(a is b for a, b in zip(one, other, strict=True))
