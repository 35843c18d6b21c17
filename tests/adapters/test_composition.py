"""Compositions as values: what may stand where, how they are written, what they are worth."""

import adapters.composition as theirs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax.adapters import composition
from adapters_jax.adapters.composition import (
    BLOCKS,
    Average,
    BatchSplit,
    Composition,
    Fuse,
    Parallel,
    Split,
    Stack,
    parse,
)

OPTIONS = {Split: {'splits': 3}, BatchSplit: {'batch_sizes': 2}}
LIBRARY = {cls: getattr(theirs, cls.__name__) for cls in BLOCKS.values()}


def block(cls, *children):
    return cls(*children, **OPTIONS.get(cls, {}))


@pytest.mark.parametrize('outer', BLOCKS.values())
@pytest.mark.parametrize('inner', BLOCKS.values())
def test_nesting_is_that_of_the_library(outer, inner):
    child = block(inner, 'b', 'c')
    if LIBRARY[inner] in theirs.ALLOWED_NESTINGS[LIBRARY[outer]]:
        assert block(outer, 'a', child).children == ('a', child)
        return
    with pytest.raises(ValueError, match=rf'{outer.kind} may not hold {inner.kind}') as caught:
        block(outer, 'a', child)
    assert 'supported inside of it: a name' in str(caught.value)
    assert all(kind in str(caught.value) for kind in outer.allowed)


def test_values():
    tree = Stack('lang_en', Fuse('sst2', Stack('a', 'mnli')))
    assert tree == parse('stack(lang_en, fuse(sst2, stack(a, mnli)))')
    assert hash(tree) == hash(parse(str(tree)))
    assert tree != Stack('lang_en', Fuse('sst2', Stack('mnli', 'a')))
    assert Stack('a') != Fuse('a')
    assert tree.names == ('lang_en', 'sst2', 'a', 'mnli')
    assert Parallel('b', Stack('a', 'b')).names == ('b', 'a')
    assert composition.last(tree) == 'mnli'
    assert tree.children[1].fusion == 'sst2,mnli'
    with pytest.raises(AttributeError):
        tree.children = ()


def test_weights_are_normalised():
    assert Average('a', 'b').weights == (0.5, 0.5)
    assert Average('a', 'b', weights=[1, 3]).weights == (0.25, 0.75)
    assert Average('a', 'b', weights=[3, -1]).weights == (1.5, -0.5)
    thirds = Average('a', 'b', 'c')
    assert Average('a', 'b', 'c', weights=list(thirds.weights)) == thirds


def test_counts_may_be_one_for_all():
    assert Split('a', 'b', splits=64).splits == (64, 64)
    assert BatchSplit('a', 'b', batch_sizes=[2, 0]).batch_sizes == (2, 0)


@pytest.mark.parametrize(
    ('make', 'expected'),
    [
        (lambda: Stack(), 'stack has no adapters'),
        (lambda: Stack(''), "stack holds ''"),
        (lambda: Stack('a', 3), 'stack holds 3'),
        (lambda: Stack(['a']), 'neither the name of an adapter nor a block'),
        (lambda: Split('a', 'b', splits=[64]), '2 whole numbers of 1 or more'),
        (lambda: Split('a', 'b', splits=[0, 3]), 'splits='),
        (lambda: Split('a', splits=True), 'splits=True'),
        (lambda: BatchSplit('a', 'b', batch_sizes=[1, -1]), '2 whole numbers of 0 or more'),
        (lambda: Average('a', 'b', weights=[1, -1]), 'whose sum is not 0'),
        (lambda: Average('a', 'b', weights=[1]), '2 numbers'),
        (lambda: Average('a', 'b', weights=[1, float('nan')]), '2 numbers'),
        (lambda: Average('a', weights=['1']), '1 numbers'),
    ],
)
def test_what_is_no_composition_is_refused(make, expected):
    with pytest.raises(ValueError, match=expected):
        make()


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('', 'its end'),
        ('stack(', "'its end' where a name"),
        ('stack(a', "'its end' where ',' is expected"),
        ('stack(a,)', r"'\)' where a name"),
        ('stack(a))', r"'\)' where 'its end' is expected"),
        ('a b', "'b' where 'its end' is expected"),
        ('stack(a!)', "'!' where a name"),
        ('pile(a)', "unknown block 'pile'; known: stack, fuse"),
        ('split(a, b)', 'options none; expected splits'),
        ('stack(a, x=1)', 'options x; expected none'),
        ('split(a, splits=1, b)', 'b after an option'),
        ('average(a, weights=b)', "'b' where a number is expected"),
        ('fuse(split(a, splits=2))', 'fuse may not hold split'),
    ],
)
def test_text_that_writes_none_is_refused(text, expected):
    with pytest.raises(ValueError, match=expected):
        parse(text)


def test_a_name_alone_is_a_stack():
    assert parse(' sst-2 ') == Stack('sst-2')
    assert parse('"it\'s"') == Stack("it's")


def trees(kind, depth):
    names = st.text(min_size=1, max_size=4)
    cls = BLOCKS[kind]
    inner = [trees(child, depth - 1) for child in cls.allowed] if depth else []
    children = st.lists(st.one_of(names, *inner), min_size=1, max_size=3)
    if cls is Average:
        numbers = st.floats(0.1, 9)
        return children.flatmap(
            lambda c: st.lists(numbers, min_size=len(c), max_size=len(c)).map(
                lambda w: Average(*c, weights=w)
            )
        )
    return children.map(lambda c: block(cls, *c))


@given(st.sampled_from(sorted(BLOCKS)).flatmap(lambda kind: trees(kind, 2)))
def test_what_is_written_is_read_back(tree):
    assert isinstance(tree, Composition)
    assert parse(str(tree)) == tree
