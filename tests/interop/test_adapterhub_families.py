"""What `adapters` writes for a model of any family computes the same here, and the reverse.

For every pair of a family and a method: the library saves a random adapter, we load it over the
same backbone, and all hidden states are equal; we save it, the library loads that, and computes the
same. Pairs that the library itself cannot compute are listed, with its error, and tried as well.
"""

import functools

import library_families as library
import numpy as np
import pytest
import torch
import torch_families
from library_folders import GATED
from safetensors.torch import load_file

from adapters_jax.interop import adapterhub
from adapters_jax.interop.adapterhub import composed, places

TOLERANCE = 5e-5
FAMILIES = [name for name in library.CLASSES if name != 'bert']
DECODERS = ['bart', 'mbart', 't5', 't5-gated', 'whisper']
# One for each kind of place, and over T5 one for each kind of tensor as well: the others repeat
# their path, and all are compared over all families in the slow tests.
CORE = {'double_seq_bn_inv', 'lora_everywhere', 'unipelt', 'prompt_tuning', 'cross_bn'}
OF_T5 = CORE | {
    'ia3', 'dora', 'cross_par_bn', 'cross_compacter', 'decoder_prefix', 'no_cross_prefix',
    'whole_prefix', 'left_out_layers', 'prefix_reft', 'whole_decoder_prefix',
}  # fmt: skip
PROMPTS = ('prompt_tuning', 'prompt_after_bos')
INVERTIBLE = ('seq_bn_inv', 'double_seq_bn_inv')
ENDS = ('loreft', 'tied_reft')  # which act on the last tokens, too

# What the library cannot do, and how it says so: when the adapter is added, or when it is used.
NO_PLACE = {
    **{(family, name): 'not supported' for family in DECODERS for name in PROMPTS},
    **{('vit', name): 'not supported' for name in INVERTIBLE},
}
FAILS = {
    **{('distilbert', name): (IndexError, 'out of range') for name in PROMPTS},
    **{
        (family, name): (RuntimeError, 'index 12 is out of bounds')
        for family in DECODERS[:-1]
        for name in ENDS
    },
}
# What it computes is not what the adapter says: we say why we do not take it.
REFUSED = {
    **{('whisper', name): "it changes the encoder's last states" for name in INVERTIBLE},
    **{('whisper', name): 'it takes other tokens for the last ones' for name in ENDS},
    **{
        (family, 'prefix_tuning_flat'): 'it drops relative positions'
        for family in ('t5', 't5-gated')
    },
}
# Which are refused as one of the others is.
REPEATED = {
    ('whisper', 'double_seq_bn_inv'), ('whisper', 'tied_reft'), ('t5-gated', 'prefix_tuning_flat'),
}  # fmt: skip
# Their tensors are another form of the same numbers here: factors and reflections are multiplied.
INEXACT = {
    'loreft', 'square_reft', 'prefix_reft', 'ia3_scaled', 'vera', 'vera_scaled', 'gated_ia3',
    'gated_vera',
}  # fmt: skip
REWRITTEN = {'dvora_scaled'}  # as the LoRA that it is
# The library's wrapper of images collects states before a block's hooks.
COLLECTED_EARLY = {('vit', name) for name in library.METHODS if 'reft' in name}
# A square projection takes the whole state away and puts a larger one in its place, which nothing
# normalises: the tolerance is a part of the largest state there.
LARGE = {'square_reft'}
# The presets of ours that a config stands for; what is none of theirs is a variant.
PRESETS = {
    'seq_bn': ['pfeiffer'],
    'seq_bn_inv': ['seq_bn_inv', 'invertible'],
    'mam': ['mam', 'mam_adapters'],
    'whole_prefix': ['prefix_tuning_flat'],
    'prefix_reft': ['loreft'],
    'prefix_tuning_flat': ['prefix_in_some_layers'],
    'loreft': ['reft_at_the_end'],
}


pytestmark = [
    pytest.mark.usefixtures('one_thread'),
    # The library's own blocks call those of `transformers` by an old name.
    pytest.mark.filterwarnings('ignore:`past_key_value` is deprecated'),
]


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp('families')
    return functools.cache(lambda name: library.make(name, root / name))


def _quick(family):
    return OF_T5 if family == 't5' else CORE


def pairs():
    """Return all pairs that the library computes; those of no new kind are slow tests."""
    left = {*NO_PLACE, *FAILS, *REFUSED}
    return [
        pytest.param(family, name, marks=torch_families.marks(family, name in _quick(family)))
        for family in FAMILIES
        for name in library.METHODS
        if (family, name) not in left
    ]


def inputs(of, name):
    return library.given(of, padded=name not in GATED)


def compare(found, expected, x, only_last=False, scaled=False):
    if only_last:
        found, expected = found[-1:], expected[-1:]
    assert all(state.std() > 0.2 for state in expected)
    scale = max(np.abs(state).max() for state in expected) if scaled else 1.0
    assert library.difference(found, expected, x) <= TOLERANCE * scale


def shows(holds=True):
    return pytest.mark.shows_family('adapterhub', parameter='name', presets=PRESETS, holds=holds)


@shows()
@pytest.mark.parametrize(('family', 'name'), pairs())
def test_both_ways(source, tmp_path, family, name):
    of, late = source(family), (family, name) in COLLECTED_EARLY
    model, x = library.adapted(of, name), inputs(of, name)
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    # In float64, since a matrix exponential in float32 is as inexact as the tolerance.
    expected = library.library_states(model.double(), of, x)
    _check_it_acts(of, x, expected)
    folder = adapterhub.load(tmp_path / 'a', of.loaded)
    compare(library.our_states(folder, of, x), expected, x, late, name in LARGE)
    adapterhub.save(folder, tmp_path / 'b', of.loaded)
    again = library.reloaded(of, tmp_path / 'b').double()
    compare(library.library_states(again, of, x), expected, x, late, name in LARGE)
    if name not in REWRITTEN:
        _check_bytes(tmp_path, exact=name not in INEXACT)


def _check_it_acts(of, x, expected):
    """Each stack's last states are others than without the adapter."""
    plain = library.library_states(of.model(), of, x)
    if plain[-1].shape == expected[-1].shape:
        assert np.abs(plain[-1] - expected[-1]).max() > 4 * TOLERANCE


def _check_bytes(directory, exact):
    """The same tensors under the same names are in the library's file and in ours."""
    theirs = torch.load(directory / 'a' / 'pytorch_adapter.bin', weights_only=True)
    ours = load_file(directory / 'b' / 'adapter.safetensors')
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape
        if exact:
            assert ours[name].numpy().tobytes() == tensor.numpy().tobytes(), name


@shows('lacks')
@pytest.mark.slow  # of the library alone
@pytest.mark.parametrize(('family', 'name'), NO_PLACE)
def test_the_library_still_has_no_place_for(source, family, name):
    with pytest.raises(ValueError, match=NO_PLACE[family, name]):
        library.adapted(source(family), name)


@shows('fails')
@pytest.mark.slow  # of the library alone
@pytest.mark.parametrize(('family', 'name'), FAILS)
def test_the_library_still_fails_by_itself(source, family, name):
    of = source(family)
    model, (error, words) = library.adapted(of, name), FAILS[family, name]
    with pytest.raises(error, match=words):
        library.library_states(model, of, inputs(of, name))


@shows('differs')
@pytest.mark.parametrize(
    ('family', 'name'),
    [pytest.param(*pair, marks=[pytest.mark.slow] * (pair in REPEATED)) for pair in REFUSED],
)
def test_what_the_library_computes_otherwise_is_refused(
    source, tmp_path, monkeypatch, family, name
):
    of = source(family)
    model, x = library.adapted(of, name), inputs(of, name)
    model.save_adapter(str(tmp_path / 'a'), 'ad')
    with pytest.raises(ValueError, match=REFUSED[family, name]):
        adapterhub.load(tmp_path / 'a', of.loaded)
    monkeypatch.setattr(places, 'check', lambda method, config: None)
    folder = adapterhub.load(tmp_path / 'a', of.loaded)
    expected = library.library_states(model, of, x)
    assert library.difference(library.our_states(folder, of, x), expected, x) > 0.01


@pytest.mark.parametrize('method', ['lora', 'seq_bn'])
def test_a_family_that_the_library_lacks_is_named(tmp_path, method):
    marian = library.make_ours('marian', tmp_path / 'marian')
    adapter = library.our_folder(marian, method)
    with pytest.raises(ValueError, match=r"no model for the model type 'marian'"):
        adapterhub.save(adapter, tmp_path / 'a', marian)


@pytest.mark.parametrize(
    'family',
    ['t5', 'vit', *(pytest.param(name, marks=pytest.mark.slow) for name in ('bart', 'distilbert'))],
)
def test_fusion(source, tmp_path, family):
    """Two adapters and what mixes them, as a folder of the library and as one of ours."""
    of, x = source(family), inputs(source(family), 'seq_bn')
    crossing = {'cross_adapter': True} if family in DECODERS else {}
    model = of.model()
    for name in ('a', 'b'):
        config = library.adapters.SeqBnConfig(reduction_factor=4, mh_adapter=True, **crossing)
        model.add_adapter(name, config=config)
    setup = library.adapters.Fuse('a', 'b')
    model.add_adapter_fusion(setup)
    library.randomise(of, model)
    model.set_active_adapters(setup)
    model.eval().save_adapter_setup(str(tmp_path / 'theirs'), setup)
    expected = library.library_states(model.double(), of, x)
    folder = composed.load(tmp_path / 'theirs', of.loaded)
    compare(library.our_states(folder, of, x), expected, x)
    composed.save(folder, tmp_path / 'ours', of.loaded)
    again = of.model()
    again.load_adapter_setup(str(tmp_path / 'ours'), use_safetensors=True, set_active=True)
    compare(library.library_states(again.eval().double(), of, x), expected, x)
