"""The command that shows what steps do to texts, and the experiment on what they do to scores."""

import dataclasses
import io

import command
import datasets
import pipelines
import pytest
import toy
from rich.console import Console

from adapters_jax import config as configs
from adapters_jax.data import sources, tokenize
from adapters_jax.data.preprocess import chain
from adapters_jax.data.preprocess.document import Document
from adapters_jax.preprocess import preprocess, show
from experiments import preprocessing

TEXTS = [
    ('The Cat and the DOG', 'animal'),
    ('who is it', 'animal'),
    ('ｓｎｏｗ [bold]', 'weather'),
    ('rain', 'weather'),
]
STEPS = ('nfkc', 'lower', 'stop_words[language=en]')


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('preprocess')
    toy.write_backbone(folder / 'bert')
    toy.write_table(folder / 'texts.csv', ('text', 'label'), TEXTS)
    pipelines.write(folder / 'few', {'NOUN': ['cat', 'dog', 'snow', 'rain']})
    return folder


def config(place, *steps):
    made = toy.config(str(place / 'bert'), str(place / 'texts.csv'), data__preprocess=steps)
    made.data.split_fractions = (0.0, 0.0)
    return made


def shown(place, *steps, examples=4):
    """Return what is printed, a line each, without the space at their ends."""
    given = config(place, *steps)
    screen = Console(file=io.StringIO(), width=100, highlight=False, markup=False)
    tokenizer = tokenize.load_tokenizer(given.backbone)
    show(*preprocess(given), tokenizer, examples, screen)
    return [line.rstrip() for line in screen.file.getvalue().split('\n')]


def test_a_text_is_shown_after_each_step_that_changed_it(place):
    tagging = f'tags[spacy={place / "few"}]'
    lines = shown(place, *STEPS, tagging, examples=3)
    first, second, third = (
        next(i for i, line in enumerate(lines) if line.startswith(f'example {n} ──'))
        for n in (1, 2, 3)
    )
    assert lines[first + 1 : second] == [
        '      text  The Cat and the DOG',
        '     lower  the cat and the dog',
        'stop_words  cat dog',
        '      tags  cat/NOUN dog/NOUN',
        '  4 pieces  [CLS] cat/NOUN dog/NOUN [SEP]',
    ]
    # The second one has stop words alone, so they stay; what looks like markup is text.
    assert [line.split()[0] for line in lines[second + 1 : third]] == ['text', 'tags', '8']
    assert lines[third + 1].split(maxsplit=1) == ['text', 'ｓｎｏｗ [bold]']
    assert 'snow/NOUN' in lines[third + 3] and '[bold]' in lines[third + 3]
    assert not any(line.startswith('example 4') for line in lines)


def test_the_summary_counts_texts_words_and_those_that_stay(place):
    lines = shown(place, *STEPS, f'tags[spacy={place / "few"}]', examples=0)
    assert lines[0].startswith('all examples ──')
    rows = [line.split() for line in lines[2:7]]
    assert rows[0] == ['before', 'of', '4', '13']
    assert rows[1] == ['nfkc', '1', '13', '0']
    assert rows[2] == ['lower', '1', '13', '0']
    assert rows[3] == ['stop_words[language=en]', '1', '10', '1']
    assert rows[4][-3:] == ['4', '10', '0']
    assert lines[7] == 'tags left  none 6, NOUN 4'


def test_pairs_and_no_steps(place, tmp_path):
    toy.write_pairs(tmp_path / 'pairs.tsv', 8)
    given = config(place)
    given.data.train = str(tmp_path / 'pairs.tsv')
    previews, steps = preprocess(given)
    assert list(previews) == ['text_a', 'text_b'] and not steps
    (kept,) = previews['text_b'].history(0)
    assert kept[0] == 'text' and kept[1].text == previews['text_b'].texts[0]


def test_several_tasks_are_refused(place):
    given = config(place)
    configs.add_task(given, 'one')
    with pytest.raises(ValueError, match=r'several tasks \(one\); give that of one'):
        preprocess(given)


@pytest.mark.parametrize('name', ['tagging', 'question_answering'])
def test_tasks_whose_labels_belong_to_the_words_have_nothing_to_show(place, tmp_path, name):
    given = config(place)
    given.task.name = name
    folder = {'tagging': toy.write_tagged(tmp_path), 'question_answering': ''}[name]
    given.data.dir = folder
    given.data.train = '' if folder else toy.write_questions(tmp_path / 'questions.json', 60)
    with pytest.raises(ValueError, match=f'{name} takes no steps of data.preprocess: there is'):
        preprocess(given)


def test_the_command(place, tmp_path):
    done = command.run(
        'preprocess',
        '--config=configs/text_classification.py',
        f'--config.backbone={place / "bert"}',
        f'--config.data.train={place / "texts.csv"}',
        '--config.data.split_fractions=(0.0,0.0)',
        '--config.data.preprocess=lower',
        '--config.data.preprocess=stop_words[language=en]',
        '--examples=1',
        folder=tmp_path,
    )
    assert done.status == 0, done.err
    assert 'stop_words  cat dog' in done.out and 'example 2' not in done.out


def test_the_experiment_reads_the_files_of_trec(tmp_path):
    lines = {'train': '0 How far is it ?\n4 Qui\xe9n ?\n', 'test': '1 Who was Galileo ?\n'}
    for split, text in lines.items():
        (tmp_path / f'TREC.{split}.all').write_text(text, 'latin-1')
    made = preprocessing.make_config(str(tmp_path), chain.create((), None), seed=0, epochs=1.0)
    made.data.split_fractions = (0.0, 0.0)
    found = sources.load(made.data, 'class')
    assert found['train'][:] == {'text_a': ['How far is it ?', 'Qui\xe9n ?'], 'label': ['0', '4']}
    assert found['test'][:] == {'text_a': ['Who was Galileo ?'], 'label': ['1']}


def test_the_rows_of_the_experiment_read_what_their_steps_give(place, tmp_path):
    step = f'tags[spacy={place / "few"}]'
    rows = preprocessing.variants(step)
    assert list(rows) == ['plain', 'stop_words', 'tags', 'tags_stop_words']
    assert list(preprocessing.variants('')) == ['plain', 'stop_words']
    methods = {}
    for name, steps in rows.items():
        made = preprocessing.make_config(
            str(tmp_path), chain.create(steps, None), seed=2, epochs=1.0
        )
        methods[name] = made.method
        assert (made.data.preprocess, made.seed) == (steps, 2)
    assert methods['plain'] == methods['stop_words'] == 'attention[tags=0]'
    assert methods['tags'] == methods['tags_stop_words'] == 'attention[tags=18]'


def test_the_experiment_shows_mean_and_deviation():
    scores = {'examples': 500, 'trainable_parameters': 1234}
    runs = [scores | {'accuracy': a, 'f1_macro': f} for a, f in ((0.5, 0.2), (0.7, 0.2))]
    result = {
        'seeds': [0, 1],
        'epochs': 6.0,
        'steps': {'plain': [], 'both': ['tags', 'stop_words']},
        'tagger': 'spaCy en_few_words 1.2',
        'runs': {'plain': runs, 'both': runs[:1]},
    }
    lines = preprocessing.render(result).split('\n')
    assert lines[2] == '| none | 1,234 | 0.600 ± 0.141 | 0.200 ± 0.000 |'
    assert lines[3] == '| `tags`, `stop_words` | 1,234 | 0.500 | 0.200 |'
    assert '500 test questions' in lines[-1] and 'Tags by spaCy en_few_words 1.2.' in lines[-1]


def test_what_stands_before_each_text_is_no_step_s_business(place):
    given = config(place, *STEPS)
    rows = datasets.Dataset.from_dict({'text_a': ['The Cat and the DOG']})
    tokenizer = tokenize.load_tokenizer(given.backbone)
    steps = chain.create(STEPS, None)
    found = tokenize.encode(rows, tokenizer, 32, chain=steps, prefix='To the FOX : ')
    expected = tokenize.encode(rows, tokenizer, 32, prefix='To the FOX : ')
    said = tokenizer('To the FOX : cat dog')['input_ids']
    assert found.tokens['input_ids'].tolist() == said
    assert len(expected.tokens['input_ids']) > len(found.tokens['input_ids'])
    previews, _ = preprocess(given)
    shown = dataclasses.replace(previews['text_a'], prefix='To the FOX : ')
    assert shown.history(0)[-1] == ('prefix', shown.documents[0])
    assert shown.documents[0].text == 'To the FOX : cat dog'


def test_tags_stay_with_their_words_behind_a_prefix():
    tagged = Document('cat dog').tagged(['NOUN', ''])
    moved = tagged.preceded('a: ')
    assert (
        moved.words == ['cat', 'dog'] and moved.tags == tagged.tags and moved.text == 'a: cat dog'
    )
    assert Document('cat').preceded('a: ') == Document('a: cat')
