"""What a composition computes is what each row computes alone through its own adapters."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import plain_evaluation as plain
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / 'conformance'))
import cases

from adapters_jax.adapters import fusion, registry
from adapters_jax.adapters.composed import Composed, supported
from adapters_jax.adapters.fusion import FusionConfig

# What a method that supports these blocks is tried in; the first that fits.
DEEP = {
    'fuse': 'batch_split(stack(c, fuse(a, stack(c, b))), split(a, average(b, c), splits=[4, 5]), '
    'average(a, stack(b, split(c, a, splits=[2, 7])), weights=[1, 3]), batch_sizes=[1, 1, 1])',
    'split': 'batch_split(stack(c, a), split(a, average(b, c), splits=[4, 5]), '
    'average(a, stack(b, split(c, a, splits=[2, 7])), weights=[1, 3]), batch_sizes=[1, 1, 1])',
    'average': 'batch_split(stack(c, a), average(a, stack(b, c), weights=[1, 3]), '
    'batch_sizes=[1, 2])',
    'batch_split': 'batch_split(stack(c, a), a, b, batch_sizes=[1, 1, 1])',
}  # fmt: skip
COPIES = 'stack(a, parallel(b, stack(c, a)))'
# One of each kind of site; for those beside the layers there are tests of their own.
SITES = {'adapter_plus', 'lora', 'prefix_tuning_flat', 'loreft'}
METHODS = [m for m in cases.METHODS if supported(cases.method(m)) and m != 'prompt_tuning']


def member(preset, name):
    text = cases.text_of(preset)
    if name == 'a' and preset.startswith('prefix_tuning'):
        text = text.replace('prefix_length=3', 'prefix_length=2')
    if preset == 'ia3':  # what scales inputs would have to come first, which not all can
        text = text.replace('ia3', 'ia3[scale_inputs=[],scale_outputs=[key,value,up]]')
    return registry.create(text)


def of(expression, **members):
    """Return a composition of methods (or presets)."""
    methods = {n: registry.create(m) if isinstance(m, str) else m for n, m in members.items()}
    scheduled = [name for name, m in methods.items() if m.architecture == 'adalora']
    return Composed(expression=expression, members=methods, frozen_members=scheduled[1:])


def check(method, tree=None):
    """Compare every row of every copy with the row alone."""
    tree = plain.trained(method) if tree is None else tree
    found = plain.composed(method, tree)
    rows = len(plain.LENGTHS)
    assert len(found) == rows * method.replicas
    extra = method.inserted.count
    for i, row in enumerate(found):
        alone = plain.row_alone(method, tree, i % rows, i // rows)
        np.testing.assert_allclose(row[: plain.LENGTHS[i % rows] + extra], alone, atol=1e-5)
    return found


@pytest.mark.parametrize('preset', cases.quick(METHODS, SITES))
def test_each_row_computes_what_it_computes_alone(preset):
    kinds = supported(cases.method(preset))
    expression = next(text for kind, text in DEEP.items() if kind in kinds)
    members = {name: member(preset, name) for name in 'abc'}
    check(of(expression, **members))


@pytest.mark.parametrize(
    'preset',
    [
        *('lora', 'loreft'),
        *(
            pytest.param(preset, marks=pytest.mark.slow)
            for preset in ('prefix_tuning_flat', 'pfeiffer', 'attention_side', 'mam')
        ),
    ],
)
def test_parallel_adapters_have_a_copy_of_the_batch_each(preset):
    method = of(COPIES, **{name: member(preset, name) for name in 'abc'})
    assert method.replicas == 2
    found = check(method)
    assert np.abs(found[:3] - found[3:]).max() > 0.01


def test_parallel_copies_begin_above_the_trunk():
    upper = dataclasses.replace(cases.method('pfeiffer'), leave_out=(0,))
    check(of('parallel(a, b, c)', a=upper, b=upper, c=upper))


def test_parallel_prefixes_that_shift_the_text():
    shifting = dataclasses.replace(member('prefix_tuning_flat', 'b'), shift_positions=True)
    check(of('parallel(a, b)', a=shifting, b=member('prefix_tuning_flat', 'a')))
    check(of('batch_split(a, b, batch_sizes=[1, 2])', a=shifting, b='lora'))


def test_a_prompt_stands_above_other_adapters():
    prompt = cases.method('prompt_tuning')
    check(of('stack(p, a, b)', p=prompt, a='pfeiffer', b='lora'))
    check(of('stack(p, parallel(a, b))', p=prompt, a='pfeiffer', b='lora'))


def test_fusion_of_adapters_on_parallel_copies():
    check(of('stack(fuse(a, b), parallel(a, b))', a='pfeiffer', b='par_bn'))


def test_adapters_of_several_methods():
    check(of('batch_split(a, stack(b, c), d, batch_sizes=[1, 1, 1])', a='lora', b='par_bn',
             c='ia3', d='loreft'))  # fmt: skip


ONE, OTHER = 'adapter_plus[reduction_factor=4]', 'pfeiffer[reduction_factor=4]'


@pytest.mark.parametrize(
    ('expression', 'rows'),
    [
        ('batch_split(a, b, c, batch_sizes=[1, 1, 1])', ['stack(a)', 'stack(b)', 'stack(c)']),
        ('stack(a, batch_split(b, c, batch_sizes=[1, 2]))', ['stack(a, b)', 'stack(a, c)']),
        ('stack(b, batch_split(a, c, batch_sizes=[1, 2]))', ['stack(b, a)', 'stack(b, c)']),
    ],
)
def test_rows_end_a_sub_layer_as_their_own_adapters_do(expression, rows):
    """After `adapter_plus` no residual connection and LayerNorm follow; after others they do."""
    members = {'a': ONE, 'b': OTHER, 'c': 'lora[r=2]'}
    method = of(expression, **members)
    tree = plain.trained(method)
    found = plain.composed(method, tree)
    for i, text in enumerate(rows):
        names = {name: members[name] for name in members if name in text[5:]}
        alone = plain.composed(of(text, **names), {name: tree[name] for name in names})
        np.testing.assert_allclose(found[i], alone[i], atol=1e-5)


def test_tokens_and_means_end_a_sub_layer_as_their_own_adapters_do():
    """In the last layer alone, so that what each part returns can be read off."""
    top = {name: dataclasses.replace(registry.create(text), leave_out=(0,))
           for name, text in (('a', ONE), ('b', OTHER))}  # fmt: skip
    trees = {name: plain.trained(method, i) for i, (name, method) in enumerate(top.items())}
    alone = {n: plain.composed(of(f'stack({n})', **{n: top[n]}), {n: trees[n]}) for n in top}
    for order in ('ab', 'ba'):
        one, other = (alone[name] for name in order)
        parts = ', '.join(order)
        split = plain.composed(of(f'split({parts}, splits=[4, 5])', **top), trees)
        np.testing.assert_allclose(split[:, :4], one[:, :4], atol=1e-5)
        np.testing.assert_allclose(split[:, 4:], other[:, 4:], atol=1e-5)
        mean = plain.composed(of(f'average({parts}, weights=[1, 3])', **top), trees)
        np.testing.assert_allclose(mean, one / 4 + other * 3 / 4, atol=1e-5)


@pytest.mark.parametrize(
    'preset',
    [
        *('pfeiffer', 'lora', 'ia3', 'loreft', 'attention_side'),
        pytest.param('adapter_plus', marks=pytest.mark.slow),
    ],
)
def test_the_average_of_an_adapter_with_itself_is_the_adapter(preset):
    alone = of('stack(a)', a=member(preset, 'a'))
    tree = plain.trained(alone)
    found = plain.composed(dataclasses.replace(alone, expression='average(a, a)'), tree)
    np.testing.assert_allclose(found, plain.composed(alone, tree), atol=1e-6)


def test_rows_have_their_own_adapters_beside_the_layers():
    members = {name: member('attention_side', name) for name in 'ab'}
    method = of('batch_split(a, b, batch_sizes=[1, 2])', **members)
    tree = plain.trained(method)
    found = plain.composed(method, tree)
    alone = {
        name: plain.composed(of(f'stack({name})', **{name: members[name]}), {name: tree[name]})
        for name in members
    }
    assert np.abs(alone['a'] - alone['b']).max() > 0.01
    np.testing.assert_allclose(found[:1], alone['a'][:1], atol=1e-5)
    np.testing.assert_allclose(found[1:], alone['b'][1:], atol=1e-5)


def test_json_keeps_everything():
    method = Composed(
        expression='stack(lang,fuse( a,b ))',
        members={'lang': registry.create('seq_bn_inv'), 'a': registry.create('pfeiffer'),
                 'b': registry.create('par_bn')},
        frozen_members=('lang', 'a'),
    )  # fmt: skip
    assert method.expression == 'stack(lang, fuse(a, b))'
    again = registry.from_json(method.to_json())
    assert again == method and hash(again) == hash(method)
    assert method.frozen[:2] == ('lang/.*', 'a/.*')


@pytest.mark.parametrize(
    ('expression', 'members', 'sentence'),
    [
        ('stack(a, b)', {'a': 'lora'}, "names 'b', which is not among a"),
        ('stack(a)', {'a': 'lora', 'b': 'lora'}, 'does not use the adapters'),
        (
            'fuse(a, b)',
            {'a': 'lora', 'b': 'lora'},
            r'a \(lora\) stands inside of fuse',
        ),
        ('average(a, b)', {'a': 'prefix_tuning', 'b': 'lora'}, 'inside of average.*batch_split'),
        ('split(a, b, splits=4)', {'a': 'loreft', 'b': 'lora'}, 'inside of split.*average'),
        ('stack(a, b)', {'a': 'houlsby', 'b': 'lora'}, 'one set for all adapters.*train_norms'),
        ('stack(a)', {'a': 'bitfit'}, 'trains leaves of the backbone itself'),
        ('stack(x/a)', {'x/a': 'lora'}, "the member 'x/a' has a '/' in its name.*write it with"),
        ('stack(a, a)', {'a': 'prompt_tuning'}, 'a, a each insert vectors'),
        ('stack(a, b)', {'a': 'adalora', 'b': 'adalora'}, 'a, b each have a schedule of ranks'),
        (
            'batch_split(stack(parallel(a, b)), a, batch_sizes=3)',
            {'a': 'lora', 'b': 'lora'},
            r'inside of batch_split\(...\), which divides the rows too',
        ),
        (
            'stack(parallel(a, b), parallel(a, b, c))',
            dict.fromkeys('abc', 'lora'),
            'blocks of 2 and of 3 adapters',
        ),
    ],
)
def test_what_cannot_be_composed(expression, members, sentence):
    with pytest.raises(ValueError, match=sentence):
        methods = {name: registry.create(preset) for name, preset in members.items()}
        Composed(expression=expression, members=methods)


def test_a_member_may_not_take_the_name_of_the_fusions():
    with pytest.raises(ValueError, match="a member is named 'fusion'"):
        of('stack(fusion)', fusion='lora')


def test_a_member_may_not_be_a_composition():
    inner = of('fuse(a, b)', a='pfeiffer', b='pfeiffer')
    with pytest.raises(ValueError, match=r'f is a composition itself \(fuse\(a, b\)\)'):
        Composed(expression='stack(f)', members={'f': inner})


@pytest.mark.parametrize(
    ('expression', 'sentence'),
    [
        ('split(a, b, splits=[4, 4])', r'splits=\[4, 4\], 8 tokens in all, but the rows have 9'),
        ('batch_split(a, b, batch_sizes=2)', r'batch_sizes=\[2, 2\], 4 rows in all.*batch has 3'),
    ],
)
def test_parts_that_do_not_fit_the_batch(expression, sentence):
    method = of(expression, a='lora', b='lora')
    with pytest.raises(ValueError, match=sentence):
        plain.composed(method, plain.trained(method))


def test_fused_adapters_must_act_at_the_same_places():
    method = of('fuse(a, b)', a='double_seq_bn', b='pfeiffer')
    with pytest.raises(ValueError, match='act at different places: b and a'):
        plain.trained(method)


def test_fusions_tell_adapters_apart_in_16_bits():
    """Scores are sums over all features: rounded to 16 bits they would be off by a tenth."""
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.standard_normal((1, 40, 256)) * 2, jnp.bfloat16)
    ups = query[:, :, None] * jnp.asarray([0.05, 0.0502, 0.0498], jnp.bfloat16).reshape(1, 1, 3, 1)
    config = FusionConfig(query=False, key=False, value=False)
    residual = jnp.zeros_like(query)
    narrow = fusion.mix({}, query, ups, residual, config, None).weights
    wide = (x.astype(jnp.float32) for x in (query, ups, residual))
    exact = fusion.mix({}, *wide, config, None).weights
    assert narrow.dtype == jnp.float32
    np.testing.assert_allclose(narrow, exact, atol=1e-3)


@pytest.mark.parametrize(
    'expression',
    [
        'stack(batch_split(a, b, batch_sizes=[1, 2]), batch_split(c, c, batch_sizes=[2, 1]))',
        'stack(split(a, b, splits=[4, 5]), split(c, c, splits=[5, 4]))',
    ],
)
@pytest.mark.parametrize('preset', ['adapter_plus', 'pfeiffer'])
def test_a_batch_may_be_divided_twice(expression, preset):
    """Where the upper part does not act, what lies below ends the sub-layer for the whole batch."""
    members = {name: member(preset, name) for name in 'abc'}
    members['a'] = dataclasses.replace(members['a'], leave_out=(0,))
    check(of(expression, **members))
