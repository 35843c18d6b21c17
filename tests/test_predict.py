"""Predictions from Python and from the command line: order, fields, unicode, many lines."""

import functools
import json
import math
import os
import shutil
from pathlib import Path

import command
import numpy as np
import pytest
import toy
import transformers
import untrained

from adapters_jax.adapters import registry
from adapters_jax.evaluate import evaluate
from adapters_jax.interop import adapter_folder
from adapters_jax.interop.backbones import load_backbone
from adapters_jax.model import Model
from adapters_jax.models.heads import HeadConfig
from adapters_jax.predict import predict, read_lines
from adapters_jax.training import serving

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Adapters that nobody trained: 'texts' and 'pairs' of classes, 'ratings' of numbers."""
    folder = tmp_path_factory.mktemp('predict')
    backbone = toy.write_backbone(folder / 'bert')
    files = {
        'texts': toy.write_texts(folder / 'texts.csv', 60),
        'pairs': toy.write_pairs(folder / 'pairs.tsv', 60),
        'ratings': toy.write_ratings(folder / 'ratings.csv', 60),
    }
    for name, path in files.items():
        kind = 'regression' if name == 'ratings' else 'classification'
        untrained.run(toy.config(backbone, path, task__name=kind), folder / name)
    return folder


TEXTS = ['the cat', 'bread and soup and rice', 'snow', 'a storm very near the horse .']


def test_the_object_comes_back_with_prediction_label_and_logits(runs):
    rows = [{'id': i, 'text': text, 'note': None} for i, text in enumerate(TEXTS)]
    found = predict(runs / 'texts' / 'adapter', rows)
    assert [{k: r[k] for k in ('id', 'text', 'note')} for r in found] == rows
    labels = sorted(toy.TOPICS)
    for row in found:
        assert set(row) == {'id', 'text', 'note', 'prediction', 'label', 'logits'}
        assert row['prediction'] == row['label'] == labels[int(np.argmax(row['logits']))]
    assert 'prediction' not in rows[0]
    # Order is kept: backwards they are the same, backwards; alone they are the same too.
    logits = np.array([row['logits'] for row in found])
    assert len({tuple(row) for row in logits.round(4)}) == len(TEXTS)
    back = predict(runs / 'texts' / 'adapter', rows[::-1], batch_size=1)
    np.testing.assert_allclose([row['logits'] for row in back[::-1]], logits, atol=1e-5)
    alone = [predict(runs / 'texts' / 'adapter', [row])[0]['logits'] for row in rows[:2]]
    np.testing.assert_allclose(alone, logits[:2], atol=1e-5)


def test_numbers_have_a_prediction_only(runs):
    found = predict(runs / 'ratings' / 'adapter', ({'text': t} for t in TEXTS))
    assert all(set(row) == {'text', 'prediction'} for row in found)
    assert all(isinstance(row['prediction'], float) for row in found)


@pytest.mark.parametrize('name', ['texts', 'pairs', 'ratings'])
@pytest.mark.parametrize('split', ['test', pytest.param('train', marks=pytest.mark.slow)])
def test_predictions_are_those_of_evaluate(runs, name, split):
    evaluate(runs / name, split)
    expected = toy.read_lines(runs / name / f'predictions_{split}.jsonl')
    keys = ('text_a', 'text_b') if name == 'pairs' else ('text_a',)
    found = predict(runs / name / 'adapter', [{k: row[k] for k in keys} for row in expected])
    assert len(found) >= 6
    for ours, theirs in zip(found, expected, strict=True):
        if name == 'ratings':
            assert ours['prediction'] == pytest.approx(theirs['prediction'], abs=1e-5)
        else:
            assert ours['label'] == theirs['label'] and theirs['gold'] in ('yes', 'no', *toy.TOPICS)
            np.testing.assert_allclose(ours['logits'], theirs['logits'], atol=1e-5)


def test_text_a_and_text_mean_the_same(runs):
    one = predict(runs / 'texts' / 'adapter', [{'text': 'the fox'}])
    other = predict(runs / 'texts' / 'adapter', [{'text_a': 'the fox'}])
    assert one[0]['logits'] == other[0]['logits']


@pytest.mark.parametrize(
    'method',
    [
        'houlsby',
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ('prompt_tuning', 'bitfit', 'lora', 'full')
        ),
    ],
)
def test_switched_off_the_backbone_is_what_it_was(runs, tmp_path, method):
    backbone = str(runs / 'bert')
    untrained.run(toy.config(backbone, str(runs / 'texts.csv'), method=method), tmp_path / 'run', 1)
    adapter = tmp_path / 'run' / 'adapter'
    on, off = (predict(adapter, [{'text': TEXTS[1]}], off=off)[0] for off in (False, True))
    ids = np.array([transformers.AutoTokenizer.from_pretrained(backbone)(TEXTS[1]).input_ids])
    batch = {'input_ids': ids, 'token_type_ids': 0 * ids, 'segments': 0 * ids + 1}
    batch |= {'positions': np.arange(ids.size)[None], 'starts': np.zeros((1, 1), int)}
    folder, loaded = adapter_folder.load(adapter), load_backbone(backbone)
    head = HeadConfig.from_json(folder.head)
    plain = Model(loaded.config, registry.create('head'), head, len(toy.TOPICS), folder.name)
    params = {'backbone': loaded.params, 'adapters': {}, 'heads': {folder.name: folder.head_params}}
    batch = {name: values.astype(np.int32) for name, values in batch.items()}
    expected = np.ravel(plain.apply(params, batch))
    np.testing.assert_allclose(off['logits'], expected, atol=1e-5)
    assert np.abs(np.subtract(on['logits'], expected)).max() > 1e-2
    several = {'own': adapter, 'other': runs / 'texts' / 'adapter'}
    rows = [{'text': TEXTS[1], 'adapter': name} for name in several]
    both = [row['logits'] for row in predict(several, rows, off=True)]
    np.testing.assert_allclose(both[0], expected, atol=1e-5)
    assert both[1] != both[0]  # its own head


ODD = [
    'Füchse 狐狸 🦊 fresh bread',
    'line\u2028separator and next\u0085line',
    'form\x0cfeed, vertical\x0btab, file\x1cseparator',
    'a \\ backslash, a "quote" and\na new line',
    'e\u0301 is é',
]


def test_an_adapter_of_pairs_wants_both_texts(runs):
    rows = [{'text_a': 'the cat', 'text_b': 'snow'}, {'text_a': 'the cat'}]
    with pytest.raises(ValueError, match=r"line 2 has no text under 'text_b'.*is for pairs"):
        predict(runs / 'pairs' / 'adapter', rows)
    with pytest.raises(ValueError, match=r"line 1 has no text under 'text_a'.*this one has: text"):
        predict(runs / 'pairs' / 'adapter', [{'text': 'the cat'}])


def test_the_command_keeps_any_text_and_skips_empty_lines(runs, tmp_path):
    lines = [json.dumps({'text': t, 'n': i}, ensure_ascii=i % 2 == 0) for i, t in enumerate(ODD)]
    # A field that no task reads may hold half a character.
    lines += [json.dumps({'text': ODD[1], 'of': '\ud83d'})]
    source = tmp_path / 'in.jsonl'
    source.write_bytes(('\ufeff\n' + '\n\n   \n'.join(lines) + '\r\n\n').encode())
    done = command.run(
        'predict',
        f'--adapter={runs / "texts" / "adapter"}',
        f'--input={source}',
        f'--output={tmp_path / "new" / "out.jsonl"}',
        folder=tmp_path,
        devices=8,
    )
    assert (done.status, 'Traceback' in done.err) == (0, False), done.err
    assert done.out == f'wrote {tmp_path}/new/out.jsonl: 6 predictions\n'
    out = toy.read_lines(tmp_path / 'new' / 'out.jsonl')
    assert [row['text'] for row in out] == [*ODD, ODD[1]]
    found = read_lines(source)
    assert list(found) == [2, 5, 8, 11, 14, 17]
    assert out == predict(runs / 'texts' / 'adapter', found.values())
    with pytest.raises(ValueError, match="line 7 has no text under 'text'"):
        predict(runs / 'texts' / 'adapter', [found[2], {}], lines=[2, 7])
    assert not list((tmp_path / 'new').glob('.*'))


def test_thousands_of_lines_in_one_go(runs, tmp_path):
    rows = [{'text': text} for text, _ in toy.texts(4000, seed=3)]
    found = predict(runs / 'texts' / 'adapter', rows, batch_size=64)
    assert [row['text'] for row in found] == [row['text'] for row in rows]
    picked = [0, 1, 1999, 3999]
    few = predict(runs / 'texts' / 'adapter', [rows[i] for i in picked])
    np.testing.assert_allclose(
        [found[i]['logits'] for i in picked], [row['logits'] for row in few], atol=1e-5
    )


def test_a_copy_of_the_backbone_elsewhere_will_do(runs, tmp_path):
    copy = toy.write_backbone(tmp_path / 'elsewhere')
    adapter = runs / 'texts' / 'adapter'
    expected = predict(adapter, [{'text': 'the fox'}])
    assert predict(adapter, [{'text': 'the fox'}], backbone=copy) == expected


def test_each_line_may_name_its_adapter(runs, tmp_path):
    folders = {name: str(runs / name / 'adapter') for name in ('texts', 'pairs', 'ratings')}
    rows = [{'text': text, 'adapter': name} for text in TEXTS[:2] for name in ('texts', 'ratings')]
    rows[3:3] = [{'text_a': 'the cat', 'text_b': 'snow', 'adapter': 'pairs'}]
    found = predict(folders, rows)
    for row, told in zip(rows, found, strict=True):
        (alone,) = predict(folders[row['adapter']], [row])
        assert alone.keys() == told.keys()
        if row['adapter'] == 'ratings':
            assert told['prediction'] == pytest.approx(alone['prediction'], abs=1e-5)
        else:
            np.testing.assert_allclose(told['logits'], alone['logits'], atol=1e-5)
    source = tmp_path / 'in.jsonl'
    source.write_text(''.join(json.dumps(row) + '\n' for row in rows))
    given = ','.join(f'{name}={path}' for name, path in folders.items())
    done = command.run(
        'predict',
        f'--adapter={given}',
        f'--input={source}',
        f'--output={tmp_path / "out.jsonl"}',
        folder=tmp_path,
    )
    assert done.status == 0, done.err
    assert [row.get('label') for row in toy.read_lines(tmp_path / 'out.jsonl')] == [
        row.get('label') for row in found
    ]


def test_a_label_of_the_input_is_kept_and_other_fields_that_go_are_told(runs, caplog):
    rows = [{'text': 'the cat', 'label': 'snow', 'logits': 3}, {'text': 'snow', 'prediction': 'x'}]
    first, second = predict(runs / 'texts' / 'adapter', rows)
    assert first['gold'] == 'snow' and first['label'] in toy.TOPICS and 'gold' not in second
    assert 'overwrite what the input has as logits and prediction' in caplog.text
    caplog.clear()
    predict(runs / 'texts' / 'adapter', [{'text': 'the cat', 'label': 'snow'}])
    assert not caplog.text
    predict(runs / 'texts' / 'adapter', [{'text': 'a', 'label': math.nan, 'score': math.nan}])
    assert not caplog.text
    (taken,) = predict(runs / 'texts' / 'adapter', [{'text': 'a', 'label': 'snow', 'gold': 'x'}])
    assert taken['gold'] == 'x' and 'overwrite what the input has as label;' in caplog.text


@pytest.mark.parametrize('line', ['{"text": ' + '[' * 100_000, '{"text": "a", "n": 1' + '0' * 5000])
def test_lines_that_python_cannot_read_are_named(tmp_path, line):
    (tmp_path / 'in.jsonl').write_text('{"text": "a"}\n' + line + '}\n')
    with pytest.raises(ValueError, match=r'in\.jsonl, line 2 is not JSON'):
        read_lines(tmp_path / 'in.jsonl')


def test_an_adapter_of_single_texts_wants_no_second_one(runs):
    rows = [{'text': 'the cat'}, {'text': 'the cat', 'text_b': 'snow'}]
    with pytest.raises(ValueError, match=r"line 2 has a second text under 'text_b'.*single ones"):
        predict(runs / 'texts' / 'adapter', rows)


def test_any_number_of_adapters_may_be_named(runs, tmp_path):
    source = tmp_path / 'in.jsonl'
    source.write_text(json.dumps({'text': 'the cat', 'adapter': 'a7'}) + '\n')
    given = ','.join(f'a{i}={runs / "texts" / "adapter"}' for i in range(100))
    assert len(given) > 4096
    flags = [f'--adapter={given}', f'--input={source}', f'--output={tmp_path / "out.jsonl"}']
    done = command.run('predict', *flags, folder=tmp_path)
    assert done.status == 0, done.err


def test_places_in_the_home_directory_may_be_written_so(runs, tmp_path):
    """A shell leaves '~' as it is after a '='; a folder of that name is dangerous to remove."""
    (tmp_path / 'in.jsonl').write_text(json.dumps({'text': 'the cat', 'adapter': 'a'}) + '\n')
    shutil.copytree(runs / 'texts' / 'adapter', tmp_path / 'own')
    home = functools.partial(be_at_home, tmp_path)
    flags = ['--adapter=a=~/own', '--input=~/in.jsonl', '--output=~/new/out.jsonl']
    done = command.run('predict', *flags, folder=tmp_path / 'out', prepare=home)
    assert done.status == 0, done.err
    assert len(toy.read_lines(tmp_path / 'new' / 'out.jsonl')) == 1
    assert not (command.ROOT / '~').exists()


def be_at_home(folder):
    os.environ['HOME'] = str(folder)


@pytest.mark.parametrize(
    'row', [{'text': 'a'}, {'text': 'a', 'adapter': 'other'}, {'text': 'a', 'adapter': ['texts']}]
)
def test_a_line_without_a_known_adapter_is_refused(runs, row):
    folders = {'texts': runs / 'texts' / 'adapter', 'ratings': runs / 'ratings' / 'adapter'}
    with pytest.raises(ValueError, match=r'line 1 has the adapter .*; expected .* texts, ratings'):
        predict(folders, [row])


def test_adapters_of_different_backbones_are_refused(runs, tmp_path):
    other = toy.write_backbone(tmp_path / 'other', seed=5)
    source = toy.write_texts(tmp_path / 'texts.csv', 40)
    untrained.run(toy.config(other, source), tmp_path / 'run')
    folders = {'a': runs / 'texts' / 'adapter', 'b': tmp_path / 'run' / 'adapter'}
    with pytest.raises(ValueError, match="'a' and 'b' are of different backbones"):
        predict(folders, [{'text': 'a', 'adapter': 'a'}])


def test_several_adapters_have_one_backbone_in_memory_and_each_its_tokenizer(runs, tmp_path):
    copy = Path(toy.write_backbone(tmp_path / 'copy'))
    source = toy.write_texts(tmp_path / 'texts.csv', 40)
    untrained.run(toy.config(str(copy), source), tmp_path / 'run')
    tokenizer = copy / 'tokenizer.json'
    values = json.loads(tokenizer.read_text())
    words = values['model']['vocab']
    words['cat'], words['fox'] = words['fox'], words['cat']
    tokenizer.write_text(json.dumps(values))
    own = runs / 'texts' / 'adapter'
    folders = {'a': own, 'b': tmp_path / 'run' / 'adapter', 'c': own}
    (_, first), *others = serving.load(folders).values()
    assert all(held.params is first.params for _, held in others)
    rows = [{'text': 'the fox', 'adapter': name} for name in folders]
    for row, told in zip(rows, predict(folders, rows), strict=True):
        (alone,) = predict(folders[row['adapter']], [row])
        np.testing.assert_allclose(told['logits'], alone['logits'], atol=1e-5)


def test_of_several_adapters_the_one_that_cannot_be_used_so_is_named(runs, tmp_path):
    made = toy.config(str(runs / 'bert'), str(runs / 'texts.csv'), method='prompt_tuning')
    untrained.run(made, tmp_path / 'run')
    folders = {'texts': runs / 'texts' / 'adapter', 'soft': tmp_path / 'run' / 'adapter'}
    rows = [{'text': 'a', 'adapter': name} for name in folders]
    with pytest.raises(ValueError, match="the adapter 'soft': prompt_tuning: "):
        predict(folders, rows, drop_layers=1)
    assert len(predict(folders, rows[:1], drop_layers=1)) == 1
