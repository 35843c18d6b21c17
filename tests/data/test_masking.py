"""Which words are hidden: how many, by what, and always the same ones."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_jax.data import batches
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.masking import Masking, reveal
from adapters_jax.data.pipeline import train_batches
from adapters_jax.data.policies import Buckets, Packed

MASK, VOCABULARY = 3, 1000
MASKING = Masking(rate=0.15, whole_words=False, mask_id=MASK, vocabulary=VOCABULARY)
WHOLE = Masking(rate=0.15, whole_words=True, mask_id=MASK, vocabulary=VOCABULARY)


def make_split(count=40, longest=60, seed=0):
    """Texts between special tokens, of words of one to four tokens."""
    random = np.random.default_rng(seed)
    words = [np.repeat(np.arange(longest), random.integers(1, 5, longest)) for _ in range(count)]
    lengths = random.integers(1, longest, count)
    parts = [np.concatenate([[-1], own[:n], [-1]]) for own, n in zip(words, lengths, strict=True)]
    flat = np.concatenate(parts).astype(np.int32)
    ids = np.where(flat < 0, 2, random.integers(10, VOCABULARY, len(flat))).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    return Encoded({'input_ids': ids, 'word': flat}, offsets.astype(np.int64), {})


def each(split, policy, masking, seed=0, epoch=None):
    """Yield each batch before and after."""
    plan = batches.plan_epoch(split.lengths, policy, 0, 0, shuffle=False)
    for index in range(len(plan)):
        before = batches.assemble(split, plan, index, 0)
        yield before, masking(before, seed, epoch)


def hidden(split, policy, masking, **draw):
    """The hidden places of each text and what stands there."""
    found = {}
    for before, after in each(split, policy, masking, **draw):
        for row, place in np.argwhere(after['chosen']):
            column = after['masked'][row, place]
            example = before['example_id'][row, before['segments'][row, column] - 1]
            assert after['label'][row, place] == before['input_ids'][row, column]
            own = found.setdefault(int(example), {})
            own[int(before['positions'][row, column])] = int(after['input_ids'][row, column])
    return found


PACKED, BUCKETS = Packed(128, 4, 24), Buckets((32, 64), 8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**31), st.booleans())
def test_each_text_hides_its_share_and_nothing_special(seed, whole):
    split = make_split(seed=seed % 97)
    found = hidden(split, PACKED, WHOLE if whole else MASKING, seed=seed)
    for example, length in enumerate(split.lengths):
        wanted = max(1, int(0.15 * (length - 2) + 0.5))
        own, word = found[example], split.tokens['word'][split.offsets[example] :]
        assert (1 <= len(own) <= wanted) if whole else len(own) == wanted
        assert all(word[place] >= 0 for place in own)
        if whole:
            touched = {word[place] for place in own}
            tokens = [p for p in range(length) if word[p] in touched]
            # A word is divided only where it alone has more tokens than may be hidden.
            assert len(tokens) == len(own) or (len(touched) == 1 and len(own) == wanted)


def test_what_is_hidden_does_not_depend_on_the_layout():
    split = make_split()
    packed, bucketed = (hidden(split, p, MASKING, seed=5, epoch=2) for p in (PACKED, BUCKETS))
    assert packed == bucketed
    assert hidden(split, PACKED, MASKING, seed=5, epoch=3) != packed
    assert hidden(split, PACKED, MASKING, seed=6, epoch=2) != packed
    assert hidden(split, PACKED, MASKING, seed=5) != packed


def test_four_fifths_become_the_mask_and_a_tenth_any_word():
    split = make_split(count=2000)
    before = split.tokens['input_ids']
    kept = masked = other = 0
    for example, own in hidden(split, PACKED, MASKING).items():
        for place, now in own.items():
            kept += now == before[split.offsets[example] + place]
            masked += now == MASK
            other += now not in (MASK, before[split.offsets[example] + place])
    total = kept + masked + other
    assert total > 8000
    assert masked / total == pytest.approx(0.8, abs=0.015)
    assert kept / total == pytest.approx(0.1, abs=0.012)


def test_the_other_tokens_and_columns_stay_as_they_are():
    for before, after in each(make_split(), PACKED, MASKING):
        changed = before['input_ids'] != after['input_ids']
        places = np.zeros_like(changed)
        row, place = np.nonzero(after['chosen'])
        places[row, after['masked'][row, place]] = True
        assert not (changed & ~places).any() and changed.any()
        same = set(before) - {'input_ids', 'word'}
        assert set(after) == same | {'input_ids', 'masked', 'label', 'chosen'}
        assert all(after[name] is before[name] for name in same)


def test_a_stream_that_goes_on_hides_the_same_words():
    split = make_split()
    transform = lambda batch, epoch: MASKING(batch, 7, epoch)  # noqa: E731
    stream = train_batches(split, PACKED, 1, 0, transform=transform)
    first = [next(stream) for _ in range(3)]
    state = stream.get_state()
    later = [next(stream) for _ in range(40)]
    again = train_batches(split, PACKED, 1, 0, transform=transform)
    again.set_state(state)
    for (position, batch), (other, same) in zip(later, again, strict=False):
        assert position == other
        assert {k: v.tobytes() for k, v in batch.items()} == {
            k: v.tobytes() for k, v in same.items()
        }
        if position.epoch > 1:
            break
    assert first[0][0] == (0, 0) and later[-1][0].epoch > 1


def test_masks_that_a_text_has_itself_are_found():
    split = make_split(count=6)
    ids = split.tokens['input_ids'].copy()
    ids[split.offsets[2] + 1] = ids[split.offsets[5] + 1] = MASK
    given = Encoded(split.tokens | {'input_ids': ids}, split.offsets, {})
    plan = batches.plan_epoch(given.lengths, Buckets((64,), 6), 0, 0, shuffle=False)
    batch = reveal(batches.assemble(given, plan, 0, 0), MASK)
    rows = np.flatnonzero(np.isin(batch['example_id'][:, 0], [2, 5]))
    assert np.flatnonzero(batch['chosen'].any(1)).tolist() == rows.tolist()
    assert batch['chosen'].sum() == 2 and batch['masked'].shape == (6, 4)
    assert (batch['masked'][batch['chosen']] == 1).all() and 'word' not in batch
