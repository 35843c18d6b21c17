"""Random compositions: a batch computes what each of its rows computes alone."""

import numpy as np
import plain_evaluation as plain
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from adapters_jax.adapters import composition, registry
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.composed import Composed, supported
from adapters_jax.adapters.composition import BLOCKS

MEMBERS = {
    'a': registry.create('pfeiffer[size=3]'),
    'b': registry.create('par_bn[size=4]'),
    'c': registry.create('lora[r=2]'),
    'd': registry.create('loreft[r=2]'),
    'e': registry.create('prefix_tuning_flat[prefix_length=2]'),
}
DIVIDING = {'parallel', 'batch_split'}
ROWS = len(plain.LENGTHS)
BOUNDED = settings(
    max_examples=3,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a tree that fails is small enough
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def able(around):
    """Return the adapters that may stand inside of these blocks."""
    return [name for name, method in MEMBERS.items() if set(around) <= supported(method)]


@st.composite
def trees(draw, depth=3, around=(), tokens=plain.TOKENS, rows=ROWS):
    """Draw a tree for a part of the sequence and of the batch, or a name."""
    allowed = BLOCKS[around[-1]].allowed if around else tuple(BLOCKS)
    kinds = [kind for kind in allowed if able((*around, kind))]
    kinds = [kind for kind in kinds if kind != 'parallel' or not DIVIDING & set(around)]
    kinds = [kind for kind in kinds if kind != 'split' or tokens > 1]
    kinds = [kind for kind in kinds if kind != 'batch_split' or rows > 1]
    if not depth or not kinds or (around and draw(st.booleans())):
        return draw(st.sampled_from(able(around)))
    kind = draw(st.sampled_from(kinds))
    whole = {'split': tokens, 'batch_split': rows}.get(kind, 3)
    count = 2 if kind == 'parallel' else draw(st.integers(2, min(whole, 3)))
    sizes = draw(parts(whole, count))
    children = [
        draw(
            trees(
                depth=depth - 1,
                around=(*around, kind),
                tokens=size if kind == 'split' else tokens,
                rows=size if kind == 'batch_split' else rows,
            )
        )
        for size in sizes
    ]
    option = {'split': 'splits', 'batch_split': 'batch_sizes', 'average': 'weights'}.get(kind)
    return BLOCKS[kind](*children, **({option: sizes} if option else {}))


def whole_trees():
    """Draw trees in which nothing counts rows that something else copies."""
    return trees().filter(lambda tree: not {block.kind for block in blocks(tree)} >= DIVIDING)


def parts(whole, count):
    """Draw `count` positive numbers that add up to `whole`, as far as there are so many."""
    cuts = st.lists(st.integers(1, whole - 1), min_size=count - 1, max_size=count - 1, unique=True)
    return cuts.map(lambda x: np.diff([0, *sorted(x), whole]).tolist())


@BOUNDED
@given(whole_trees())
def test_a_batch_computes_what_each_row_computes_alone(tree):
    check(tree)


@pytest.mark.slow
@settings(BOUNDED, max_examples=20)
@given(whole_trees())
def test_many_batches_compute_what_each_row_computes_alone(tree):
    check(tree)


def check(tree):
    method = Composed(expression=str(tree), members={name: MEMBERS[name] for name in tree.names})
    own = plain.trained(method)
    found = np.asarray(plain.hidden(bind(method, own, None), *plain.texts()))
    assert len(found) == ROWS * method.replicas
    for i, row in enumerate(found):
        alone = plain.row_alone(method, own, i % ROWS, i // ROWS)
        np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-5)


OPTIONS = {'split': 'splits', 'batch_split': 'batch_sizes'}


@given(trees(), st.data())
def test_a_block_that_may_not_stand_there_is_refused(tree, data):
    """The sentence names the block, and all that are supported where it stands."""
    outer = type(data.draw(st.sampled_from(blocks(tree))))
    inner = data.draw(st.sampled_from(sorted(set(BLOCKS) - set(outer.allowed))))
    text = written(outer.kind, written(inner, 'a', 'b'), tree.names[0])
    with pytest.raises(ValueError, match=rf'{outer.kind} may not hold {inner}\(') as caught:
        composition.parse(text)
    said = str(caught.value).split('supported inside of it: ')[1]
    assert said == ', '.join(('a name', *outer.allowed))


@pytest.mark.parametrize(('name', 'kind'), [('e', 'average'), ('d', 'split'), ('c', 'fuse')])
@given(tree=trees())
def test_an_adapter_that_may_not_stand_there_is_refused(tree, name, kind):
    inner = written(kind, 'a', name)
    around = [block.kind for block in blocks(tree) if kind in type(block).allowed]
    text = written(around[0], 'b', inner) if around else inner
    members = {n: MEMBERS[n] for n in composition.parse(text).names}
    with pytest.raises(ValueError, match='stands inside of') as caught:
        Composed(expression=text, members=members)
    said = str(caught.value).split('supported: ')[1]
    assert said == ', '.join(sorted(supported(MEMBERS[name])))


def blocks(node):
    """Return the blocks of a tree."""
    if isinstance(node, str):
        return []
    return [node, *(block for child in node.children for block in blocks(child))]


def written(kind, *children):
    """Write a block with the options that it must have."""
    option = f', {OPTIONS[kind]}=3' if kind in OPTIONS else ''
    return f'{kind}({", ".join(children)}{option})'
