import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters_jax import params
from adapters_jax.params import freeze, train

# The characters include those that mean something in a regular expression.
names = st.text('ab1_.*(+', min_size=1, max_size=3)
leaves = st.integers(0, 2**16).map(lambda n: np.float32([n, n / 7, -n]))
trees = st.recursive(
    st.dictionaries(names, leaves, min_size=1, max_size=3),
    lambda inner: st.dictionaries(names, st.one_of(leaves, inner), min_size=1, max_size=3),
    max_leaves=8,
)


@st.composite
def trees_with_rules(draw):
    tree = draw(trees)
    known = st.sampled_from(sorted(params.flatten(tree)))
    exact = known.map(re.escape)
    below = known.map(lambda path: re.escape(path.split('/')[0]) + '.*')
    patterns = st.one_of(exact, below, st.sampled_from(['nothing', '.*a', 'a.*']))
    rules = draw(st.lists(st.builds(params.Rule, patterns, st.booleans()), max_size=5))
    return tree, [*rules, params.Rule('.*', draw(st.booleans()))]


def same(a, b):
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, a, b)))


@given(trees_with_rules())
def test_partition_splits_every_leaf_by_the_first_rule_and_merge_undoes_it(case):
    tree, rules = case
    trainable, frozen = params.partition(tree, rules)
    assert same(params.merge(trainable, frozen), tree)
    assert same(params.merge(frozen, trainable), tree)
    for path in params.flatten(tree):
        first = next(rule for rule in rules if re.fullmatch(rule.pattern, path))
        assert (path in params.flatten(trainable)) == first.train
        assert (path in params.flatten(frozen)) == (not first.train)


@given(trees)
def test_unflatten_undoes_flatten(tree):
    flat = params.flatten(tree)
    assert list(flat) == sorted(flat, key=lambda path: path.split('/'))
    assert len(flat) == len(jax.tree.leaves(tree))
    assert same(params.unflatten(flat), tree)


def test_a_rule_covers_whole_paths_only():
    tree = {'heads': {'a': 1, 'ab': 2}, 'x': {'heads': {'a': 3}}}
    trainable, frozen = params.partition(tree, [train('heads/a'), freeze('.*')])
    assert trainable == {'heads': {'a': 1}}
    assert frozen == {'heads': {'ab': 2}, 'x': {'heads': {'a': 3}}}


def test_an_exception_stands_before_the_rule():
    tree = {'layer': {'kernel': 1, 'bias': 2}}
    rules = [freeze('.*/bias'), train('layer/.*')]
    assert params.partition(tree, rules) == ({'layer': {'kernel': 1}}, {'layer': {'bias': 2}})


def test_uncovered_leaves_are_listed():
    tree = {'a': {'b': 1, 'c': 2}, 'd': 3}
    with pytest.raises(ValueError, match=r'no rule covers 2 of 3 parameters: a/b, d; end the rul'):
        params.partition(tree, [train('a/c')])


def test_a_branch_without_leaves_vanishes():
    tree = {'adapters': {'none': {}}, 'heads': {'x': 1}}
    assert params.flatten(tree) == {'heads/x': 1}
    assert params.merge(*params.partition(tree, [train('.*')])) == {'heads': {'x': 1}}


def test_names_with_a_slash_are_refused():
    with pytest.raises(ValueError, match="'a/b' holds a '/'"):
        params.flatten({'x': {'a/b': 1}})


@pytest.mark.parametrize('flat', [{'a': 1, 'a/b': 2}, {'a/b': 1, 'a': 2}, {'a': 1, 'a/b/c': 2}])
def test_a_leaf_cannot_hold_another(flat):
    with pytest.raises(ValueError, match='one is inside the other'):
        params.unflatten(flat)


def test_merge_refuses_conflicts():
    with pytest.raises(ValueError, match="'a/b' is in two of the trees"):
        params.merge({'a': {'b': 1}}, {'a': {'b': 1}})
    for pair in ([{'a': 1}, {'a': {'b': 1}}], [{'a': {'b': 1}}, {'a': 1}]):
        with pytest.raises(ValueError, match="'a' is a leaf in one tree and a branch in another"):
            params.merge(*pair)


def test_merge_leaves_its_arguments_as_they_are():
    one, two = {'a': {'b': 1}}, {'a': {'c': 2}}
    assert params.merge(one, two) == {'a': {'b': 1, 'c': 2}}
    assert (one, two) == ({'a': {'b': 1}}, {'a': {'c': 2}})


def test_map_with_path_sees_every_path():
    tree = {'a': {'b': 1, 'c': 2}, 'd': 3}
    mapped = params.map_with_path(lambda path, leaf: f'{path}={leaf}', tree)
    assert mapped == {'a': {'b': 'a/b=1', 'c': 'a/c=2'}, 'd': 'd=3'}


@given(trees, st.data())
def test_fingerprint_changes_with_any_bit(tree, data):
    flat = params.flatten(tree)
    path = data.draw(st.sampled_from(sorted(flat)))
    bits = flat[path].copy().view(np.uint32)
    bits[data.draw(st.integers(0, 2))] ^= np.uint32(1 << data.draw(st.integers(0, 31)))
    changed = params.unflatten(flat | {path: bits.view(np.float32)})
    assert params.fingerprint(changed) != params.fingerprint(tree)
    assert params.fingerprint(params.unflatten(flat)) == params.fingerprint(tree)


def test_fingerprint_changes_with_paths_shapes_and_kinds():
    x = np.arange(6, dtype=np.float32)
    variants = [
        {'a': x},
        {'b': x},
        {'c': {'a': x}},
        {'a': x.reshape(2, 3)},
        {'a': x.reshape(3, 2)},
        {'a': x.reshape(2, 3).T},
        {'a': x.view(np.int32)},
        {'a': x, 'b': x},
        {'a': x[:3], 'b': x[3:]},
        {'a': x[:2], 'b': x[2:]},
        {'a': x, 'b': np.zeros((0, 2), np.float32)},
        {'a': x, 'b': np.zeros((2, 0), np.float32)},
    ]
    prints = [params.fingerprint(tree) for tree in variants]
    assert len(set(prints)) == len(variants)
    assert all(len(p) == 16 and int(p, 16) >= 0 for p in prints)


def test_fingerprint_is_of_values_not_of_their_storage():
    tree = {'b': np.float32([1, 0.5, -3]), 'a': np.ones((2, 2), np.float32), 'n': np.arange(3)}
    expected = params.fingerprint(tree)
    assert params.fingerprint(dict(reversed(tree.items()))) == expected
    assert params.fingerprint(params.cast(tree, jnp.bfloat16)) == expected
    assert params.fingerprint(tree | {'b': jnp.asarray(tree['b'], jnp.float16)}) == expected
    assert params.fingerprint(tree | {'a': np.asfortranarray(tree['a'])}) == expected
    assert params.fingerprint({'s': np.float32(2)}) == params.fingerprint({'s': jnp.float32(2)})


def test_cast_changes_floating_point_leaves_only():
    cast = params.cast({'x': np.ones(3, np.float32), 'n': jnp.arange(3)}, jnp.bfloat16)
    assert (cast['x'].dtype, cast['n'].dtype) == (jnp.bfloat16, jnp.int32)


def test_sizes_of_arrays_and_of_shapes():
    tree = {'a': np.ones((2, 3), np.float32), 'b': {'c': jnp.ones(5, jnp.bfloat16)}}
    for t in (tree, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, tree))):
        assert params.count(t) == 11
        assert params.size_bytes(t) == 34
    assert params.count({}) == params.size_bytes({}) == 0


def test_summary_counts_both_trees():
    said = params.summary({'a': np.ones(1)}, {'b': np.ones((1999, 1))})
    assert said == '1 trainable of 2,000 parameters (0.050 %)'
    assert params.summary({}, {}) == '0 trainable of 0 parameters (0.000 %)'
