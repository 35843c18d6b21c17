"""Several methods at once: MAM and UniPELT as in `adapters`, and which unions have no meaning."""

import dataclasses
import json

import adapters
import jax
import jax.numpy as jnp
import live_models
import numpy as np
import pytest
import reference
import small_bert

from adapters_jax import params
from adapters_jax.adapters import registry
from adapters_jax.adapters.baselines import HeadOnly
from adapters_jax.adapters.binding import bind
from adapters_jax.adapters.bottleneck import Bottleneck
from adapters_jax.adapters.lora import LoRA
from adapters_jax.adapters.prefix import PrefixTuning, flat_from_reparametrised
from adapters_jax.adapters.prompt import PromptTuning
from adapters_jax.adapters.union import Union
from adapters_jax.models.backbone import Backbone
from adapters_jax.sites import Dimensions

TOLERANCE = 2e-5
BERT_BASE = Dimensions(
    layers=12, hidden=768, feed_forward=3072, heads=12, word=768, vocabulary=30522, positions=512
)
PARALLEL, SERIAL = registry.create('par_bn'), registry.create('pfeiffer')


def mam(**prefix):
    """Return MAM (He et al. 2022, section 4.6) with the sizes that `adapters` gives it."""
    return Union(members=(PrefixTuning(**{'bottleneck_size': 800} | prefix), PARALLEL))


def unipelt(**prefix):
    """Return UniPELT (Mao et al. 2022) as both its authors and `adapters` compute it.

    In a gated LoRA the gate takes the place of alpha / r.
    """
    prefix = PrefixTuning(**{'prefix_length': 10} | prefix, use_gating=True)
    bottleneck = dataclasses.replace(SERIAL, use_gating=True)
    return Union(members=(prefix, bottleneck, LoRA(r=8, alpha=8, use_gating=True)))


def trees(model):
    return {
        'prefix_tuning': live_models.prefix_tree(model),
        'bottleneck': reference.bottleneck_tree(model, 'a'),
        'lora': live_models.lora_tree(model),
    }


@pytest.mark.parametrize('family', ['bert', 'roberta'])
def test_mam_as_in_adapters(family):
    prefix = {'prefix_length': 5, 'bottleneck_size': 9}
    theirs = adapters.MAMConfig(prefix_tuning=adapters.PrefixTuningConfig(**prefix))
    assert compare(mam(**prefix), theirs, family, padded=True) <= TOLERANCE


@pytest.mark.parametrize('flat', [True, False])
def test_unipelt_as_in_adapters(flat):
    prefix = {'prefix_length': 5, 'bottleneck_size': 9, 'flat': flat}
    theirs = adapters.UniPELTConfig(prefix_tuning=adapters.PrefixTuningConfig(**prefix))
    # The library's gates look at padding.
    assert compare(unipelt(**prefix), theirs, 'bert', padded=False) <= TOLERANCE


def compare(method, theirs, family, padded):
    model = live_models.adapters_model(theirs, family)
    ids, mask = reference.texts(model, padded=padded)
    found = trees(model)
    tree = {name: found[name] for name in method.named()}
    ours = live_models.our_hidden(method, tree, model, ids, mask)
    return live_models.difference(ours, reference.torch_hidden(model, ids, mask))


def test_the_presets_are_what_was_compared():
    assert registry.create('mam_adapters') == mam()
    assert registry.create('unipelt') == unipelt()


@pytest.mark.parametrize(
    ('name', 'trained', 'kept'),
    [
        ('mam_adapters', 22_493_984, 7_644_672),
        ('unipelt', 11_083_376, 1_410_672),
        ('mam', 15_695_840, 599_232),  # 0.5 % of RoBERTa-base (He et al. 2022, table 3)
    ],
)
def test_counts_at_bert_base_with_and_without_the_network_of_the_prefix(name, trained, kept):
    method = registry.create(name)

    def init():
        tree = method.init(jax.random.key(0), BERT_BASE, {})
        prefix = flat_from_reparametrised(method.members[0], tree['prefix_tuning'])[1]
        return tree, tree | {'prefix_tuning': prefix}

    full, flat = jax.eval_shape(init)
    assert params.count(full) == trained
    assert params.count(flat) == kept


@pytest.mark.parametrize(
    'method',
    [mam(flat=True), unipelt(leave_out=[1]), Union(members=(PARALLEL, PromptTuning(site='words')))],
)
def test_json_and_back(method):
    values = json.loads(json.dumps(method.to_json()))
    assert registry.from_json(values) == method
    assert hash(registry.from_json(values)) == hash(method)


def fresh(*members, dimensions=small_bert.DIMENSIONS):
    return Union(members=members).init(jax.random.key(0), dimensions, small_bert.backbone())


@pytest.mark.parametrize(
    ('members', 'sentence'),
    [
        (
            (SERIAL, PARALLEL),
            'bottleneck and bottleneck_2 both act at layer_0/feed_forward; give them different '
            'sites or layers, or keep one',
        ),
        (
            (LoRA(), PrefixTuning(), LoRA(r=2, attn_matrices=('q', 'k'))),
            'lora and lora_2 both act at layer_0/attention/query',
        ),
        (
            (PrefixTuning(), PrefixTuning(leave_out=[0, 1])),
            'prefix_tuning and prefix_tuning_2 both act at layer_2/attention/key_value',
        ),
    ],
)
def test_two_methods_at_one_place_are_refused(members, sentence):
    with pytest.raises(ValueError, match=f'^union: {sentence}'):
        fresh(*members)


@pytest.mark.parametrize(
    'members',
    [
        (SERIAL, Bottleneck(mh_adapter=True, output_adapter=False, size=4, non_linearity='relu')),
        (
            dataclasses.replace(SERIAL, leave_out=[1, 2]),
            dataclasses.replace(PARALLEL, leave_out=[0]),
        ),
        (LoRA(attn_matrices=('q',)), LoRA(attn_matrices=('k', 'v'))),
        (LoRA(leave_out=[0]), LoRA(leave_out=[1, 2])),
        (PrefixTuning(leave_out=[0]), PrefixTuning(leave_out=[1, 2])),
    ],
)
def test_two_of_a_kind_at_different_places_are_accepted(members):
    tree = fresh(*members)
    assert set(tree) == set(Union(members=members).named())
    first, second = (set(params.flatten(branch)) for branch in tree.values())
    assert first
    assert second


def test_two_prompts_are_refused_and_so_are_too_few_or_nested_members():
    with pytest.raises(ValueError, match='union: 2 members insert vectors into the text; keep one'):
        Union(members=(PromptTuning(), SERIAL, PromptTuning()))
    with pytest.raises(ValueError, match='union: 1 members; expected two or more'):
        Union(members=(SERIAL,))
    with pytest.raises(ValueError, match='a member is a union itself; list its members instead'):
        Union(members=(mam(), SERIAL))


def test_a_union_is_what_its_members_are():
    assert mam().packable
    assert not unipelt().packable
    assert not Union(members=(PARALLEL, PromptTuning())).packable
    one, other = PromptTuning(prompt_length=4, site='words'), PrefixTuning(shift_positions=True)
    assert Union(members=(SERIAL, one, other)).reserved_positions == 34
    assert Union(members=(SERIAL, one, other)).inserted == (4, 0)
    assert Union(members=(SERIAL, other)).inserted == (0, 0)
    seeded = PromptTuning(prompt_init='from_string', prompt_init_text='so', prompt_length=1)
    prepared = Union(members=(SERIAL, seeded)).prepare(lambda text: [7])
    assert prepared.members[1].prompt_init_ids == (7,)
    high = dataclasses.replace(SERIAL, leave_out=[0, 1])
    pair = Union(members=(high, PrefixTuning(leave_out=[0])))
    tree = pair.init(jax.random.key(0), small_bert.DIMENSIONS, {})
    assert pair.first_layer(tree, small_bert.DIMENSIONS) == 1
    assert (
        Union(members=(high, HeadOnly())).first_layer(
            {'bottleneck': tree['bottleneck']}, small_bert.DIMENSIONS
        )
        == 2
    )


def test_members_draw_apart_and_a_prompt_and_a_prefix_may_both_move_the_text():
    twice = fresh(LoRA(leave_out=[0]), LoRA(leave_out=[1, 2]))
    leaves = [np.asarray(x).tobytes() for x in jax.tree.leaves(twice) if np.any(x)]
    assert len(set(leaves)) == len(leaves)
    prompt = PromptTuning(prompt_length=3, site='words')
    prefix = PrefixTuning(prefix_length=2, flat=True, shift_positions=True)
    (text,) = small_bert.texts([6])
    weights = small_bert.backbone()
    for members in ((prompt, prefix), (prefix, prompt)):
        union = Union(members=members)
        tree = union.init(jax.random.key(0), small_bert.DIMENSIONS, weights)
        # Past the table's end `take` gives NaN, so this also says that positions stay within.
        positions = np.arange(6)[None] + 40 - union.reserved_positions - 6
        hidden = jax.jit(
            lambda tree, union=union, positions=positions: Backbone(small_bert.CONFIG).apply(
                {'params': weights}, text[None], positions=positions, sites=bind(union, tree, None)
            )
        )(tree)
        assert hidden.shape == (1, 9, 24)
        assert jnp.isfinite(hidden).all()


def test_the_penalty_is_that_of_all_members():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Penalised(HeadOnly):
        architecture = 'penalised'

        def init(self, key, dimensions, backbone):
            return {'output': {'x': jnp.full((2,), 3.0)}}

        def penalty(self, params):
            return params['output']['x'].sum()

    union = Union(members=(Penalised(), SERIAL, Penalised()))
    tree = union.init(jax.random.key(0), small_bert.DIMENSIONS, {})
    assert float(union.penalty(tree)) == 12
    # A member without leaves has no branch once the tree has been split and joined again.
    beside = Union(members=(HeadOnly(), Penalised()))
    tree = beside.init(jax.random.key(0), small_bert.DIMENSIONS, {})
    assert float(beside.penalty(params.unflatten(params.flatten(tree)))) == 6
    assert mam().penalty(fresh(*mam().members)) is None


@pytest.mark.parametrize(
    'text',
    [
        'attention[size=4,heads=2]|attention_side[size=4,heads=2]',
        'attention[size=4,heads=2]|attention[size=4,heads=2,mh_adapter=True,output_adapter=False]',
        'invertible|invertible',
    ],
)
def test_two_that_share_what_they_compute_for_all_layers_collide(text):
    with pytest.raises(ValueError, match='both act at the'):
        registry.create(text).init(jax.random.key(0), small_bert.DIMENSIONS, {})


def test_two_schedules_of_ranks_are_refused():
    with pytest.raises(ValueError, match='2 members have a schedule of ranks; keep one'):
        registry.create('adalora[attn_matrices=[q]]|adalora[attn_matrices=[v]]')
