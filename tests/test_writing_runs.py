"""Whole runs of a task whose outputs are texts: learned, evaluated, resumed, served."""

import json

import numpy as np
import pytest
import sacrebleu
import small_writers
import toy

from adapters_jax.data import batches, tokenize
from adapters_jax.data.policies import Packed
from adapters_jax.evaluate import evaluate
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.predict import predict
from adapters_jax.sweep import sweep
from adapters_jax.train import train
from adapters_jax.training import experiment
from configs import seq2seq

pytestmark = pytest.mark.usefixtures('compiled_once')
LEARNED = {
    'optimizer.learning_rate': 5e-3,
    'training.epochs': 30.0,
    'training.evaluate_every': 100,
    'task.beams': 2,
}

# What is found without writing.
SCORED = {'task.metrics': ('nll', 'token_accuracy')}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with a random encoder-decoder, and texts to be written backwards."""
    found = tmp_path_factory.mktemp('writing')
    small_writers.write_backbone(found / 'bart')
    small_writers.write_task(found / 'texts', rows=300)
    return found


def config(folder, method='full', **changes):
    found = seq2seq.get_config(f'method={method},backbone={folder / "bart"}')
    settings = {
        'data.dir': str(folder / 'texts'),
        'data.languages': 'xx,yy',
        'data.cache_dir': 'none',
        'data.max_length': 12,
        'task.target_length': 10,
        'training.batch_size': 16,
        'training.evaluate_every': 10,
        'training.steps': 20,
    }
    return small_writers.changed(found, settings, **changes)


@pytest.fixture(scope='module')
def learned(folder):
    """A finished run of few steps: its workdir and its summary."""
    changes = LEARNED | {'training.steps': 100, 'training.evaluate_every': 50}
    workdir = folder / 'learned'
    return workdir, train(config(folder, **changes), workdir)


@pytest.mark.slow
def test_texts_are_learned(folder):
    scores = train(config(folder, **LEARNED | {'training.steps': 0}), folder / 'at_length')
    assert scores['metrics']['validation']['bleu'] > 25


def test_texts_are_scored_as_sacrebleu_does(learned):
    workdir, summary = learned
    scores = summary['metrics']['validation']
    assert list(scores) == ['bleu', 'chrf', 'nll'] and scores['chrf'] > 0
    metrics = toy.read_lines(workdir / 'metrics.jsonl')
    first, second = (x['values']['nll'] for x in metrics if x['split'] == 'validation')
    assert second < first
    found = evaluate(workdir, 'test')
    lines = (workdir / 'predictions_test.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert list(rows[0]) == ['text', 'gold', 'prediction'] and len(rows) == 40
    written, gold = ([row[key] for row in rows] for key in ('prediction', 'gold'))
    assert found['metrics']['bleu'] == sacrebleu.corpus_bleu(written, [gold]).score
    assert found['metrics']['chrf'] == sacrebleu.corpus_chrf(written, [gold]).score
    assert [row['gold'].split()[::-1] for row in rows] == [row['text'].split() for row in rows]


def test_predictions_are_those_of_the_evaluation_whatever_the_batch(learned):
    workdir, _ = learned
    evaluate(workdir, 'test')
    lines = (workdir / 'predictions_test.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines][:7]
    texts = [{'text': row['text']} for row in rows]
    found = predict(workdir / 'adapter', texts, batch_size=1)
    assert [one['prediction'] for one in found] == [row['prediction'] for row in rows]


@pytest.mark.parametrize(
    'method',
    [
        'houlsby',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ('prefix_tuning', 'lora', 'ia3', 'bitfit')
        ),
    ],
)
def test_only_the_adapter_is_trained_and_kept(folder, method):
    small_writers.only_the_adapter_is_trained(config(folder, method), folder / method, rel=1e-5)


@pytest.mark.parametrize(
    'method',
    [
        pytest.param('lora', marks=pytest.mark.slow),
        # What the encoder computes below is not kept: each member computes it.
        'pfeiffer[reduction_factor=2,leave_out=[0]]',
    ],
)
def test_a_population_learns_what_its_members_learn_alone(folder, tmp_path, method):
    both = config(folder, method, **SCORED, training__steps=4, training__evaluate_every=4)
    both.sweep.grid = ('optimizer.learning_rate=1e-3,3e-2',)
    sweep(both, tmp_path / 'sweep')
    both.sweep.grid, both.optimizer.learning_rate = (), 3e-2
    alone = train(both, tmp_path / 'alone')['metrics']['validation']
    members = [
        tmp_path / 'sweep' / 'members' / f'learning_rate-{rate}' for rate in ('3e-2', '1e-3')
    ]
    own, other = (
        json.loads((member / 'summary.json').read_text())['metrics']['validation']
        for member in members
    )
    assert own == pytest.approx(alone, rel=1e-3, abs=1e-3)
    assert other != pytest.approx(alone, rel=1e-3, abs=1e-3)


def test_a_loss_of_packed_rows_is_that_of_rows_of_one_text(folder):
    run = experiment.build(config(folder, 'head'))
    encoded = run.splits['validation']
    assert (encoded.sizes >= encoded.lengths).all()
    params = run.init_params()
    found = []
    for policy in (Packed(40, 12, 6), Packed(12, 40, 1)):
        plan = batches.plan_epoch(encoded.sizes, policy, 0, 0, shuffle=False)
        total = np.zeros(2)
        for index in range(len(plan)):
            batch = batches.assemble(encoded, plan, index, run.backbone.config.pad_id)
            total += np.array(run.task.loss(run.model.apply(params, batch), batch))
        found.append(total)
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert found[0][1] == len(encoded.target['label'])


def test_what_a_decoder_reads_is_what_it_says_one_token_later(folder):
    run = experiment.build(config(folder, 'head'))
    encoded, texts = run.splits['test'], run.texts['test']['target'][:]
    read, said = encoded.target['target_ids'], encoded.target['label']
    tokenizer = tokenize.load_tokenizer(run.backbone.directory)
    for i, text in enumerate(texts):
        own = slice(*encoded.target_offsets[i : i + 2])
        assert read[own][0] == run.backbone.config.decoder.start_id and said[own][-1] == 2
        np.testing.assert_array_equal(read[own][1:], said[own][:-1])
        assert tokenizer.decode(said[own], skip_special_tokens=True) == text


def test_label_smoothing_spreads_a_share_over_all_words(folder):
    run = experiment.build(config(folder, 'head'))
    logits = np.random.default_rng(0).standard_normal((2, 3, 24)).astype(np.float32)
    labels = np.array([[3, 4, -1], [5, 6, 0]], np.int32)
    batch = {'label': labels, 'target_segments': np.array([[1, 1, 1], [1, 2, 0]], np.int32)}
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    real = [(0, 0), (0, 1), (1, 0), (1, 1)]
    plain = -sum(logs[b, t, labels[b, t]] for b, t in real)
    spread = -sum(logs[b, t].mean() for b, t in real)
    for share in (0.0, 0.1):
        total, count = run.task.loss(logits, batch, share)
        assert count == 4
        np.testing.assert_allclose(total, (1 - share) * plain + share * spread, rtol=1e-5)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'task__target_length': 41}, 'target_length is 41, but the decoder has 40 positions'),
        ({'task__target_length': 1}, 'target_length is 1; expected at least 2'),
        ({'task__beams': 0}, 'beams=0'),
        ({'task__beams': 13}, 'task.beams is 13, but the backbone writes 24 words, .* it to 12'),
        ({'task__min_length': 13}, 'task.min_length is 13; expected 0 to .*task.target_length'),
        ({'task__repeated': 1}, 'task.repeated is 1; expected 0, or 2'),
        ({'data__languages': 'xx'}, "data.languages is 'xx'; expected two"),
        ({'data__languages': 'xx,zz'}, "in one language, but none in 'zz'"),
        ({'task__languages': ('a', 'b')}, 'the tokenizer of the backbone knows no languages'),
    ],
)
def test_mistakes_are_named(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        experiment.build(config(folder, **changes))


def test_tasks_and_backbones_must_fit(folder):
    given = config(folder)
    given.task.name = 'classification'
    given.data.dir, given.data.languages = '', ''
    rows = ''.join(f'w1 w{i}\t{i % 2}\n' for i in range(20))
    (folder / 'classes.tsv').write_text('text\tlabel\n' + rows)
    given.data.train = str(folder / 'classes.tsv')
    given.data.max_length = 12
    with pytest.raises(ValueError, match='classification writes no texts, but a bart backbone has'):
        experiment.build(given)
    assert load_backbone(str(folder / 'bart')).config.decoder is not None


@pytest.mark.parametrize(
    'shape',
    [
        'fuse(a, b)',
        *(pytest.param(f'{x}(a, b)', marks=pytest.mark.slow) for x in ('stack', 'average')),
    ],
)
def test_adapters_are_composed_in_both_stacks(folder, shape):
    changes = SCORED | {'adapters': 'a=pfeiffer[reduction_factor=4],b=pfeiffer[size=4]'}
    changes['training.steps'] = 2
    summary = train(config(folder, shape, **changes), folder / shape[:4])
    found = evaluate(folder / shape[:4], 'validation')['metrics']
    assert found == pytest.approx(summary['metrics']['validation'], rel=1e-5)


@pytest.mark.parametrize('shape', ['split(a, b, splits=[4, 8])', 'parallel(a, b)'])
def test_what_divides_batches_is_refused(folder, shape):
    changes = {'adapters': 'a=pfeiffer[reduction_factor=4],b=pfeiffer[reduction_factor=4]'}
    with pytest.raises(ValueError, match='split, batch_split and parallel divide or copy a batch'):
        experiment.build(config(folder, shape, **changes))


def test_texts_that_are_cut_are_told_of(folder, caplog):
    experiment.build(config(folder, task__target_length=4))
    expected = 'texts to be written (100.0 %) are longer than task.target_length = 4 and were cut'
    assert expected in caplog.text


@pytest.mark.parametrize('row', [('w1 w2', 'w3 w17'), ('w17 w2', 'w3')])
def test_words_that_only_the_tokenizer_has_are_refused(folder, tmp_path, row):
    """As where words were added to it, and not to the model."""
    small_writers.write_backbone(tmp_path / 'small', vocab_size=21)
    given = config(folder, backbone=tmp_path / 'small')
    given.data.dir, given.data.validation = '', write_pairs(tmp_path / 'dev.jsonl', [row])
    given.data.train = write_pairs(tmp_path / 'few.jsonl', [row, ('w3', 'w3')])
    with pytest.raises(ValueError, match=r'makes the token 21, but the backbone .* has 21 words'):
        experiment.build(given)


def test_texts_without_what_is_to_be_written_are_written_whatever_is_reported(folder, tmp_path):
    """Of a run whose evaluations score without writing."""
    given = config(folder, training__steps=1)
    given.task.metrics, given.data.dir = ('nll', 'token_accuracy'), ''
    for split, name in (('train', 'train'), ('validation', 'val')):
        columns = [
            (folder / 'texts' / f'{name}.{language}').read_text().splitlines()
            for language in ('xx', 'yy')
        ]
        given.data[split] = write_pairs(tmp_path / f'{split}.jsonl', zip(*columns, strict=True))
    given.data.test = write_pairs(tmp_path / 'test.jsonl', [('w1 w2',), ('w3',)])
    train(given, tmp_path / 'w')
    assert evaluate(tmp_path / 'w', 'test')['metrics'] == {}
    rows = toy.read_lines(tmp_path / 'w' / 'predictions_test.jsonl')
    assert [row['text'] for row in rows] == ['w1 w2', 'w3']
    assert all(isinstance(row['prediction'], str) for row in rows)


def write_pairs(path, rows):
    """Write rows of texts in 'xx' and, where there are two, 'yy'; return the file's name."""
    lines = [json.dumps(dict(zip(('xx', 'yy'), row, strict=False))) for row in rows]
    path.write_text(''.join(f'{line}\n' for line in lines))
    return str(path)
