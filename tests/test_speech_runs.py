"""Whole runs of speech recognition on a small model: learned, evaluated, served, refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jiwer
import numpy as np
import pytest
import small_whisper
import small_writers

from adapters_jax.data import audio, batches
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.tasks.speech_recognition import SpeechRecognition
from adapters_jax.train import train
from adapters_jax.training import ahead, batching, experiment
from configs import speech

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a random Whisper, and tones that have names."""
    found = tmp_path_factory.mktemp('speech')
    small_whisper.write_backbone(found / 'whisper')
    small_whisper.write_task(found / 'tones')
    return found


def config(folder, method='full', backbone='whisper', **changes):
    found = speech.get_config(f'method={method},backbone={folder / backbone}')
    settings = {
        'data.dir': str(folder / 'tones'),
        'data.cache_dir': str(folder / 'cache'),
        'task.window': 0.4,
        'task.target_length': 5,
        'training.batch_size': 16,
        'training.steps': 4,
    }
    return small_writers.changed(found, settings, **changes)


@pytest.fixture(scope='module')
def learned(folder):
    """A finished run: its workdir and its summary."""
    changes = {
        'optimizer.learning_rate': 3e-3,
        'training.steps': 60,
        'training.evaluate_every': 30,
    }
    return folder / 'learned', train(config(folder, **changes), folder / 'learned')


def test_what_is_said_is_learned_and_scored_as_jiwer_does(learned, folder):
    workdir, summary = learned
    scores = summary['metrics']['validation']
    assert list(scores) == ['wer', 'cer', 'nll'] and scores['wer'] <= 0.25
    found = evaluate(workdir, 'test')
    lines = (workdir / 'predictions_test.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert list(rows[0]) == ['audio', 'gold', 'prediction'] and len(rows) == 16
    assert [Path(row['audio']).name for row in rows[:3]] == ['0.wav', '1.wav', '2.wav']
    written, gold = ([row[key] for row in rows] for key in ('prediction', 'gold'))
    assert set(gold) == {'low', 'high'}
    assert found['metrics']['wer'] == jiwer.wer(gold, written)
    assert found['metrics']['cer'] == jiwer.cer(gold, written)


def test_predictions_are_those_of_the_evaluation_whatever_the_batch(learned):
    workdir, _ = learned
    evaluate(workdir, 'test')
    lines = (workdir / 'predictions_test.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines][:5]
    given = [{'audio': row['audio'], 'id': i} for i, row in enumerate(rows)]
    for size in (1, 4):
        found = predict(workdir / 'adapter', given, batch_size=size)
        assert [one['prediction'] for one in found] == [row['prediction'] for row in rows]
        assert [one['id'] for one in found] == list(range(5))


@pytest.mark.slow
@pytest.mark.parametrize('method', ['prefix_tuning', 'houlsby', 'lora', 'ia3', 'bitfit'])
def test_only_the_adapter_is_trained_and_kept(folder, method):
    small_writers.only_the_adapter_is_trained(config(folder, method), folder / method, rel=1e-4)


@pytest.mark.slow
def test_a_population_learns_what_its_members_learn_alone(folder):
    both = config(folder, 'lora')
    both.sweep.grid = ('optimizer.learning_rate=1e-3,3e-3',)
    sweep(both, folder / 'sweep')
    alone = train(config(folder, 'lora', optimizer__learning_rate='3e-3'), folder / 'alone')
    member = folder / 'sweep' / 'members' / 'learning_rate-3e-3' / 'summary.json'
    together = json.loads(member.read_text())['metrics']['validation']
    assert together == pytest.approx(alone['metrics']['validation'], rel=1e-3, abs=1e-3)


def test_a_batch_has_a_recording_a_row(folder):
    run = experiment.build(config(folder, 'head'))
    encoded = run.splits['test']
    assert isinstance(encoded.examples['sound'].base, np.memmap)
    policy = batching.choose(run.config, run.model, encoded.sizes, 1, training=True)
    plan = batches.plan_epoch(encoded.sizes, policy, 0, 0, shuffle=True)
    batch = batches.assemble(encoded, plan, 0, run.backbone.config.pad_id)
    batch = batching.fill(run.task.transform(batch), 18, 0)
    assert batch['sound'].shape == (18, 10, 40) and not batch['sound'][16:].any()
    assert batch['example_id'][16:].tolist() == [[-1], [-1]]
    for row, example in enumerate(batch['example_id'][:16, 0]):
        np.testing.assert_array_equal(batch['sound'][row], encoded.examples['sound'][example])
        path = run.texts['test']['audio'][int(example)]
        own = audio.log_mel(audio.decode(path, 16000), run.task.extractor, 40)
        np.testing.assert_allclose(batch['sound'][row], own, atol=1e-3)
        text = run.task.tokenizer.decode(batch['label'][row, 1:], skip_special_tokens=True)
        assert text == f' {run.texts["test"]["target"][int(example)]}'
    # The start is read and not said; then each token is read one place after it is said.
    ids, labels = batch['target_ids'][:16], batch['label'][:16]
    assert (ids[:, :2] == [1, 2]).all() and (labels[:, 0] == -1).all()
    np.testing.assert_array_equal(ids[:, 2:], labels[:, 1:-1])
    loss, count = run.task.loss(run.model.apply(run.init_params(), batch), batch)
    assert np.isfinite(loss) and count == (labels[batch['target_segments'][:16] > 0] >= 0).sum()


def test_a_run_can_be_described_without_recordings(folder):
    given = config(folder, 'lora')
    plan = ahead.plan(given)
    assert plan.batch['sound'].shape == (16, 10, 40)
    assert 'input_ids' not in plan.batch
    assert ahead.trace_step(plan).lower().as_text()
    assert ahead.trace_forward(plan).lower().as_text()


def test_the_rules_are_the_checkpoint_s(folder):
    run = experiment.build(config(folder, 'head'))
    rules = run.task.rules
    assert rules.start == (1, 2) and rules.end_id == rules.pad_id == 0
    assert rules.never == (3, 4, 5) and rules.not_first == (0,)


def test_a_checkpoint_of_several_languages_is_told_which(folder):
    small_whisper.write_backbone(folder / 'many', multilingual=True)
    given = config(folder, 'head', 'many', task__language='de')
    run = experiment.build(given)
    names = run.task.tokenizer.convert_ids_to_tokens(run.task.rules.start)
    assert names == ['<|startoftranscript|>', '<|de|>', '<|transcribe|>', '<|notimestamps|>']
    assert type(run.task.normaliser).__name__ == 'BasicTextNormalizer'
    given.task.translate = True
    run = experiment.build(given)
    assert run.task.tokenizer.convert_ids_to_tokens(run.task.rules.start[2]) == '<|translate|>'
    assert type(run.task.normaliser).__name__ == 'EnglishTextNormalizer'


@pytest.mark.parametrize(('words', 'several'), [(51864, False), (51865, True), (51866, True)])
def test_a_checkpoint_that_does_not_say_it_is_known_by_its_vocabulary(folder, words, several):
    old = folder / f'old-{words}'
    small_whisper.write_backbone(old)
    settings = json.loads((old / 'generation_config.json').read_text())
    del settings['is_multilingual']
    (old / 'generation_config.json').write_text(json.dumps(settings))
    config = dataclasses.replace(load_backbone(str(old)).config, vocabulary=words)
    task = SpeechRecognition(window=0.4, target_length=5, language='de' if several else '')
    assert len(task.fitted(config, old).rules.start) == (4 if several else 2)
    other = dataclasses.replace(task, language='' if several else 'de')
    message = 'several languages is told' if several else 'knows English alone'
    with pytest.raises(ValueError, match=message):
        other.fitted(config, old)


@pytest.mark.parametrize(
    ('backbone', 'changes', 'message'),
    [
        ('whisper', {'task__window': 0.5}, '25 vectors, but the encoder has 20 positions'),
        ('whisper', {'task__window': 2}, r'task\.window is 2; expected seconds up to 1'),
        ('whisper', {'task__language': 'de'}, 'the checkpoint knows English alone'),
        ('whisper', {'task__target_length': 12}, 'target_length is 12, but the decoder has 12 pos'),
        ('many', {}, "task.language is ''; a checkpoint of several languages"),
        ('many', {'task__language': 'fr'}, r'the tokenizer has no token <\|fr\|>'),
        ('bart', {}, r'is about sound, but the backbone .* \(bart\) reads texts'),
    ],
)
def test_mistakes_are_named(folder, backbone, changes, message):
    if not (folder / backbone).exists():
        if backbone == 'bart':
            import small_writers

            small_writers.write_backbone(folder / 'bart')
        else:
            small_whisper.write_backbone(folder / backbone, multilingual=True)
    with pytest.raises(ValueError, match=message):
        experiment.build(config(folder, 'head', backbone, **changes))


@pytest.mark.parametrize(
    ('given', 'message'),
    [
        ({'text': 'a'}, r"line 1 has no path under 'audio'; expected .*\(this one has: text\)"),
        ({'audio': 'nowhere.wav'}, r'line 1: there is no recording .*nowhere\.wav'),
    ],
)
def test_inputs_without_a_recording_are_named(learned, given, message):
    workdir, _ = learned
    with pytest.raises(ValueError, match=message):
        predict(workdir / 'adapter', [given])


def test_settings_come_back_from_an_adapter_s_folder(learned):
    workdir, _ = learned
    task = experiment.task_of(adapter_folder.load(workdir / 'adapter'))
    assert isinstance(task, SpeechRecognition)
    assert (task.window, task.target_length, task.extractor) == (0.4, 5, None)
    assert jax.tree.leaves(task.to_json())  # JSON values alone
    json.dumps(task.to_json())
