"""A composition of AdapterHub has the library's outputs here, or is refused: nothing in between.

Every block, and every block in a block, over adapters of every kind, also of two kinds.
"""

import itertools

import adapters
import library_folders as library
import numpy as np
import pytest
from adapters.composition import Average, BatchSplit, Fuse, Parallel, Split, Stack

from adapters_jax.adapters import composition, registry
from adapters_jax.interop.adapterhub import acting, setup

SMALL = {'reduction_factor': 4}
KINDS = {
    'seq': adapters.SeqBnConfig(**SMALL),
    'late': adapters.SeqBnConfig(**SMALL, original_ln_before=False),
    'double': adapters.DoubleSeqBnConfig(**SMALL),
    'par': adapters.ParBnConfig(**SMALL),
    'inv': adapters.SeqBnInvConfig(**SMALL),
    'gated': adapters.SeqBnConfig(**SMALL, use_gating=True),
    'compacter': adapters.CompacterPlusPlusConfig(**SMALL, phm_dim=2),
    'lora': adapters.LoRAConfig(r=2, alpha=2),
    'dora': adapters.DoRAConfig(r=2, alpha=2),
    'vera': adapters.VeraConfig(r=2),
    'ia3': adapters.IA3Config(),
    'prefix': adapters.PrefixTuningConfig(flat=True, prefix_length=3),
    'prompt': adapters.PromptTuningConfig(prompt_length=2),
    'reft': adapters.LoReftConfig(),
    'mam': adapters.MAMConfig(),
    'unipelt': adapters.UniPELTConfig(),
    # The same at the same places, with more parameters.
    'seq_scaled': adapters.SeqBnConfig(**SMALL, scaling='learned'),
    'par_scaled': adapters.ParBnConfig(**SMALL, scaling='learned'),
    'late_norm': adapters.SeqBnConfig(**SMALL, original_ln_before=False, ln_before=True),
    'prefix_deep': adapters.PrefixTuningConfig(prefix_length=3, bottleneck_size=8),
    # At fewer places.
    'seq_above': adapters.SeqBnConfig(**SMALL, leave_out=[0]),
    'late_above': adapters.SeqBnConfig(**SMALL, original_ln_before=False, leave_out=[0]),
    'lora_key': adapters.LoRAConfig(r=2, alpha=2, attn_matrices=['k']),
    'lora_all': adapters.LoRAConfig(r=2, alpha=2, intermediate_lora=True, output_lora=True),
    'ia3_above': adapters.IA3Config(leave_out=[0]),
    'prefix_long': adapters.PrefixTuningConfig(flat=True, prefix_length=5),
    'prefix_above': adapters.PrefixTuningConfig(flat=True, prefix_length=3, leave_out=[0]),
}
# The library divides an average by the number of adapters once more; so its mean is that of ours.
MEAN = {'weights': [1.0, 1.0], 'normalize_weights': False}
ROWS = {'batch_sizes': [1, 2]}
TOKENS = {'splits': [4, 5]}
BLOCKS = {
    'stack': lambda: Stack('a', 'b'),
    'stack_fuse': lambda: Stack('c', Fuse('a', 'b')),
    'stack_split': lambda: Stack('c', Split('a', 'b', **TOKENS)),
    'stack_rows': lambda: Stack('c', BatchSplit('a', 'b', **ROWS)),
    'stack_average': lambda: Stack('c', Average('a', 'b', **MEAN)),
    'stack_parallel': lambda: Stack('c', Parallel('a', 'b')),
    'fuse': lambda: Fuse('a', 'b'),
    'fuse_stack': lambda: Fuse(Stack('c', 'a'), 'b'),
    'fuse_stacked_last': lambda: Fuse('a', Stack('c', 'b')),
    'split': lambda: Split('a', 'b', **TOKENS),
    'split_stack': lambda: Split(Stack('c', 'a'), 'b', **TOKENS),
    'split_split': lambda: Split(Split('c', 'a', splits=[2, 2]), 'b', **TOKENS),
    'rows': lambda: BatchSplit('a', 'b', **ROWS),
    'rows_stack': lambda: BatchSplit('a', Stack('c', 'b'), **ROWS),
    'rows_rows': lambda: BatchSplit('a', BatchSplit('c', 'b', batch_sizes=1), **ROWS),
    'rows_split': lambda: BatchSplit(Split('c', 'a', **TOKENS), 'b', **ROWS),
    'average': lambda: Average('a', 'b', **MEAN),
    'average_stack': lambda: Average(Stack('c', 'a'), 'b', **MEAN),
    'parallel': lambda: Parallel('a', 'b'),
    'parallel_stack': lambda: Parallel(Stack('c', 'a'), 'b'),
    'parallel_rows': lambda: Parallel(BatchSplit('c', 'a', **ROWS), 'b'),
}
# Of these pairs neither is refused, where one of a kind is not.
MORE = [
    ('seq', 'seq_scaled'),
    ('par', 'par_scaled'),
    ('late', 'late_norm'),
    ('prefix', 'prefix_deep'),
]
# Of c and a, and of b.
PAIRS = [(kind, kind) for kind in KINDS if '_' not in kind] + [
    *itertools.permutations(('seq', 'late', 'par'), 2),
    *itertools.permutations(('seq', 'lora', 'ia3'), 2),
    *((kind, 'seq') for kind in ('inv', 'reft', 'prompt', 'prefix', 'double', 'dora', 'vera')),
    *(('seq', kind) for kind in ('inv', 'reft', 'prompt', 'prefix')),
    *itertools.permutations(('par', 'lora', 'prefix'), 2),
    *itertools.permutations(('double', 'late', 'late_above'), 2),
    *itertools.permutations(('lora', 'lora_key', 'lora_all'), 2),
    *itertools.permutations(('prefix', 'prefix_long', 'prefix_above'), 2),
    *MORE,
    *itertools.permutations(('seq', 'seq_above'), 2),
    *itertools.permutations(('ia3', 'ia3_above'), 2),
]
# What is exchanged, of both adapters of one kind: the others are refused, or crash there.
AGREES = {
    'stack': 'seq late double compacter ia3 prefix',
    'stack_fuse': 'seq late double compacter',
    'stack_split': 'seq late double compacter',
    'stack_rows': 'seq late double compacter ia3 prefix',
    'stack_average': 'seq late double compacter ia3',
    'stack_parallel': 'seq late double compacter prefix',
    'fuse': 'seq late double compacter',
    'fuse_stack': 'late double',
    'fuse_stacked_last': 'late double',
    'split': 'seq late double par compacter',
    'split_stack': 'late double',
    'split_split': 'late double par',
    'rows': 'seq late double par compacter lora vera ia3 prefix mam',
    'rows_stack': 'late double ia3',
    'rows_rows': 'late double par lora vera ia3 prefix mam',
    'rows_split': 'late double par',
    'average': 'seq late double par compacter lora vera ia3',
    'average_stack': 'late double ia3',
    'parallel': 'seq late double compacter prefix mam',
    'parallel_stack': 'late double',
    'parallel_rows': 'late double prefix mam',
}

TOLD = ('refused', 'theirs')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    return library.write_source(tmp_path_factory.mktemp('backbones') / 'bert')


def compared(source, directory, block, first, second):
    """Tell what comes of a composition: 'refused', 'theirs' (it fails there), or the difference."""
    model = source.model()
    for name, kind in {'a': first, 'b': second, 'c': first}.items():
        model.add_adapter(name, config=KINDS[kind])
    try:
        if any(isinstance(node, Fuse) for node in (block, *block)):
            model.add_adapter_fusion(['a', 'b'], config='dynamic')
        library.randomise(source, model, 1)
        model.set_active_adapters(block)
        expected = library.states(source, model.eval())[0].numpy()
        model.save_adapter_setup(str(directory), block)
    except (NotImplementedError, TypeError, ValueError, LookupError, RuntimeError, AttributeError):
        return 'theirs'
    try:
        method, tree = setup.as_method(setup.load(directory, source.loaded))
    except ValueError:
        return 'refused'
    return np.abs(library.ours(source, method, tree)[0] - expected).max()


@pytest.mark.slow
@pytest.mark.parametrize('name', BLOCKS)
def test_it_has_the_librarys_outputs_or_is_refused(source, tmp_path, name):
    found = {
        pair: compared(source, tmp_path / '_'.join(pair), BLOCKS[name](), *pair)
        for pair in dict.fromkeys(PAIRS)
    }
    differing = {pair: x for pair, x in found.items() if not isinstance(x, str) and x > 2e-5}
    assert not differing
    agreeing = {first for (first, own), x in found.items() if own == first and x not in TOLD}
    assert agreeing == set(AGREES[name].split())
    assert [pair for pair in MORE if pair[0] in agreeing and found[pair] == 'refused'] == []


@pytest.mark.parametrize(
    ('expression', 'kinds', 'reason'),
    [
        ('stack(a,b)', ('par_bn', 'seq_bn'), 'of a stack with a parallel bottleneck'),
        ('stack(a,b)', ('lora', 'lora'), 'the second adapter of a projection acts on the first'),
        ('stack(a,b)', ('lora', 'ia3'), 'the second adapter of a projection acts on the first'),
        ('stack(a,b)', ('seq_bn', 'seq_bn_inv'), 'of invertible it takes that of the first'),
        (
            'batch_split(a,b,batch_sizes=1)',
            ('loreft', 'loreft'),
            'of reft it takes that of the first',
        ),
        ('fuse(a,b)', ('par_bn', 'par_bn'), 'parallel bottlenecks are fused'),
        ('fuse(stack(b,a),b)', ('seq_bn', 'seq_bn'), 'original_ln_before'),
        ('split(a,b,splits=4)', ('seq_bn', 'double_seq_bn'), 'are those of one adapter for all'),
        ('stack(a,b)', ('seq_bn[use_gating=True]', 'seq_bn'), 'gates act otherwise'),
        ('average(a,b)', ('dora', 'dora'), 'weight decomposition'),
        ('parallel(a,b)', ('seq_bn', 'prefix_tuning'), 'where one of them does nothing'),
    ],
)
def test_a_refusal_says_why(expression, kinds, reason):
    members = {name: registry.create(kind) for name, kind in zip('ab', kinds, strict=True)}
    with pytest.raises(ValueError, match=f'is not exchanged with `adapters`.*{reason}'):
        acting.check(composition.parse(expression), members, {'a': {}, 'b': {}})


@pytest.mark.parametrize(
    ('expression', 'kinds'),
    [
        ('stack(a)', ('par_bn', 'lora')),
        ('stack(a,b)', ('seq_bn_inv', 'seq_bn')),
        ('stack(a,b)', ('lora', 'par_bn')),
        ('fuse(stack(b,a),b)', ('double_seq_bn', 'double_seq_bn')),
        ('batch_split(a,b,batch_sizes=1)', ('par_bn', 'par_bn')),
    ],
)
def test_what_agrees_is_exchanged(expression, kinds):
    members = {name: registry.create(kind) for name, kind in zip('ab', kinds, strict=True)}
    acting.check(composition.parse(expression), members, {'a': {}, 'b': {}})
