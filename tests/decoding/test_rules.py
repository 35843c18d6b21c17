"""Rules for what is written, against those of `transformers`."""

import dataclasses

import numpy as np
import pytest
from test_generation import batch_of, pair, rules_of, theirs_of, write

from adapters_jax.decoding.rules import Rules
from adapters_jax.decoding.search import Search

RULES = [
    {'first': 9, 'last': 8},
    {'never': (10, 29, 14), 'not_first': (0, 27, 33)},
    {'first': 9, 'not_first': (0, 2, 4)},
    {'repeated': 3, 'min_length': 11},
    {'never': tuple(range(3, 33)), 'renormalised': True},  # which only beams feel
    {'min_length': 6},
    {'repeated': 2},
]


@pytest.mark.parametrize(
    ('options', 'beams'),
    [
        # The last two are in the one above them, and beams change nothing of the second.
        pytest.param(options, beams, marks=[pytest.mark.slow] * (i > 4 or (i, beams) == (1, 3)))
        for i, options in enumerate(RULES)
        for beams in (1, 3)
        if beams == 3 or i != 4
    ],
)
def test_rules_are_those_of_transformers(options, beams):
    theirs, model, params = pair('bart')
    rules = rules_of('bart', **options)
    given, batch = batch_of('bart', 25, 6, model.config.pad_id)
    expected, _ = theirs_of(theirs, given, rules, num_beams=beams)
    found = write(model, params, batch, rules, Search(beams=beams))
    np.testing.assert_array_equal(found.tokens[:, 0], expected)


@pytest.mark.parametrize('beams', [1, 3])
def test_a_text_may_be_a_single_word(beams):
    theirs, model, params = pair('bart')
    rules = Rules((2,), 0, 1, max_length=1)
    given, batch = batch_of('bart', 9, 6, 1)
    expected, _ = theirs_of(theirs, given, rules, num_beams=beams)
    for cached in (True, False):
        found = write(model, params, batch, rules, Search(beams=beams), cached=cached)
        np.testing.assert_array_equal(found.tokens[:, 0], expected)


def test_texts_of_t5_may_be_longer_than_those_it_was_trained_on():
    """It knows distances alone: `n_positions` is no limit in `transformers` either."""
    theirs, model, params = pair('t5')
    stack = dataclasses.replace(model.config.decoder, positions=8)
    config = dataclasses.replace(model.config, positions=8, decoder=stack)
    model = dataclasses.replace(model, config=config)
    given, batch = batch_of('t5', 9, 6, config.pad_id)
    assert model.text_positions is None and batch['input_ids'].shape[1] > 8
    rules = rules_of('t5', min_length=10)
    expected, _ = theirs_of(theirs, given, rules)
    found = write(model, params, batch, rules, Search())
    np.testing.assert_array_equal(found.tokens[:, 0], expected)
