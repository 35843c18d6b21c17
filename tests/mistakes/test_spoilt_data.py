"""Mistakes in the files of examples, for training and for prediction."""

import re

import command
import pytest
import toy
from command_lines import predict_line

from adapters_jax.training import experiment

pytestmark = pytest.mark.usefixtures('compiled_once')


def test_a_glue_folder_without_its_files(line):
    (line.folder / 'RTE').mkdir()
    (line.folder / 'RTE' / 'train.tsv').write_text('index\tsentence1\tsentence2\tlabel\n')
    options = ('--config.data.train=', f'--config.data.dir={line.folder}')
    found = line.refused(*options, file='glue:task=rte,method=head')
    assert 'RTE: no dev.tsv' in found and 'holds train.tsv' in found


def test_an_unseen_label_in_validation_is_named(line):
    other = toy.write_table(line.folder / 'dev.csv', ('text', 'label'), [('the cat', 'annimal')])
    found = line.refused(f'--config.data.validation={other}')
    assert "split 'validation': unseen labels 'annimal' (1 times); known: 'animal'" in found


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('', 'is empty; it must hold at least one example'),
        ('text,label\n', 'has no examples; it must hold at least one'),
        ('text,label\nthe cat,animal\n', 'at least two classes, not 1|too few to cut'),
        ('text,label\nthe cat,animal\n,food\n', r'line 3: .*text'),
        ('text,label\nthe cat,animal\nsoup\n', r'line 3: 1 fields where the first line has 2'),
        ('text,label\nthe cat,animal\nsoup,\n', r'line 3: the label is empty'),
        ('words,label\nthe cat,animal\n', r"'words', 'label'"),
    ],
)
def test_a_file_that_is_not_what_it_should_be(line, content, expected):
    path = line.folder / 'given.csv'
    path.write_text(content)
    found = line.refused(f'--config.data.train={path}')
    assert re.search(expected, found)


def test_texts_longer_than_allowed_are_cut_and_counted(toys, tmp_path, caplog):
    rows = toy.texts(30) + [('the ' * 50 + word, topic) for word, topic in toy.texts(12, seed=1)]
    data = toy.write_table(tmp_path / 'long.csv', ('text', 'label'), rows)
    experiment.build(toy.config(str(toys / 'bert'), data, data__max_length=20))
    told = re.findall(
        r'(\d+) of (\d+) examples \(.*\) are longer than max_length = 20 and were cut', caplog.text
    )
    assert sum(int(cut) for cut, _ in told) >= 12


@pytest.mark.parametrize(
    ('content', 'expected'),
    [
        ('{"text": "a"}\n\n{"text": \n', 'in.jsonl, line 3 is not JSON'),
        ('{"text": "a"}\n["b"]\n', 'line 2 is not a JSON object but \'\\["b"\\]\''),
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2 has no text under 'text'.*this one has: txt"),
        ('{"text": "a"}\n{"text": 3}\n', "line 2: 'text' is 3; expected a text"),
        ('{"text": "  "}\n', "line 1: the text under 'text' is empty"),
        (
            '{"text_a": "x"}\n{"text": "x"}\n',
            'line 2 has no text under \'text_a\'; expected "text_a", as the first one has',
        ),
        ('\n \n', 'the input holds no examples'),
        ('\udcff{"text": "a"}\n', 'in.jsonl is not UTF-8'),
    ],
)
def test_input_that_cannot_be_read(toys, tmp_path, content, expected):
    given = predict_line(toys / 'run' / 'adapter', tmp_path, content=content)
    assert re.search(expected, command.refused('predict', *given, folder=tmp_path))
    assert not (tmp_path / 'out.jsonl').exists()


def test_more_that_predict_refuses(toys, tmp_path):
    adapter = toys / 'run' / 'adapter'
    given = predict_line(adapter, tmp_path, '--batch_size=0')
    assert 'batch_size is 0' in command.refused('predict', *given, folder=tmp_path)
    given = predict_line(adapter, tmp_path, f'--input={tmp_path}/no.jsonl')
    assert f'{tmp_path}/no.jsonl does not exist' in command.refused(
        'predict', *given, folder=tmp_path
    )
