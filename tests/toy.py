"""Toy data beside those of `experiments.toy`, and what the tests of whole runs need besides."""

import json
from pathlib import Path

import numpy as np

from adapters_jax.config import Config, base
from adapters_jax.data import glue
from adapters_jax.params import flatten
from experiments.toy import (
    BAD,
    FILLERS,
    GOOD,
    TOPICS,
    Rows,
    fillers,
    ratings,
    texts,
    write_backbone,
    write_ratings,
    write_table,
    write_texts,
)

__all__ = ['TOPICS', 'write_backbone', 'write_ratings', 'write_texts']


def _text(rng: np.random.Generator) -> str:
    return ' '.join(fillers(rng, 6.0))


def pairs(count: int, seed: int = 0) -> Rows:
    """Return (text, text, 'yes' or 'no'): whether the second text is praise."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        first, *rest = (str(word) for word in rng.choice(GOOD if i % 2 else BAD, 3))
        second = ' '.join([first, *fillers(rng, 4.0), *rest])
        rows.append((_text(rng), second, 'yes' if i % 2 else 'no'))
    return rows


def write_pairs(path: Path, count: int = 240, seed: int = 0) -> str:
    """Write a data set of pairs as a TSV file; return its path."""
    return write_table(path, ('sentence1', 'sentence2', 'label'), pairs(count, seed))


def write_choices(path: Path, count: int = 160, seed: int = 0) -> str:
    """Write questions of two to four candidates, of which one is praise; return their path."""
    rng = np.random.default_rng(seed)
    lines = []
    for i in range(count):
        choices = [' '.join(map(str, rng.choice(FILLERS, 3))) for _ in range(rng.integers(2, 5))]
        label = int(rng.integers(len(choices)))
        choices[label] += f' {rng.choice(GOOD)}'
        lines.append(json.dumps({'context': f'the {i}', 'choices': choices, 'label': label}))
    path.write_text('\n'.join(lines) + '\n', 'utf-8')
    return str(path)


def write_questions(path: Path, paragraphs: int = 60, seed: int = 0, none: int = 4) -> str:
    """Write two questions on each text, as SQuAD 2.0 has them; return the path.

    The answer is the one animal of the text; each `none`-th text has none (0: all have one).
    """
    rng, found = np.random.default_rng(seed), []
    for i in range(paragraphs):
        words, animal = fillers(rng, 12.0), str(rng.choice(TOPICS['animal']))
        if not none or i % none:
            words[int(rng.integers(len(words)))] = animal
        context = ' '.join(words)
        answers = [{'text': animal, 'answer_start': context.find(animal)}] * (animal in words)
        asked = {f'{seed}-{i}-{word}': f'{word} near ?' for word in ('this', 'that')}
        qas = [{'id': key, 'question': q, 'answers': answers} for key, q in asked.items()]
        found.append({'context': context, 'qas': qas})
    path.write_text(json.dumps({'data': [{'paragraphs': found}]}), 'utf-8')
    return str(path)


def tagged(count: int, seed: int = 0) -> list[tuple[list[str], list[str]]]:
    """Return (words, tags in BIO): a word of a topic is a span, and some others continue it."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        words, tags = [], []
        for word in fillers(rng, 4.0):
            words.append(word)
            tags.append('O')
            if rng.random() < 0.5:
                topic = str(rng.choice(list(TOPICS)))
                span = [rng.choice(TOPICS[topic][:3]), rng.choice(TOPICS[topic][3:])]
                for letter, own in zip('BI'[: rng.integers(1, 3)], span, strict=False):
                    words.append(str(own))
                    tags.append(f'{letter}-{topic}')
        rows.append((words, tags))
    return rows


def write_tagged(folder: Path, train: int = 120, held_out: int = 30, between: str = '\t') -> str:
    """Write CoNLL files of words and tags for three splits; return their folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (split, count) in enumerate(
        {'train': train, 'dev': held_out, 'test': held_out}.items()
    ):
        sentences = [
            ''.join(f'{word}{between}{tag}\n' for word, tag in zip(*row, strict=True))
            for row in tagged(count, number)
        ]
        (folder / f'{split}.conll').write_text('\n'.join(sentences))
    return str(folder)


def trec_like(_: str) -> dict[str, list[str]]:
    """Stand in for `builtin.read`: a pool as large as the one that the quickstart cuts up."""
    rows = texts(300)
    return {'text_a': [row[0] for row in rows], 'label': [row[1] for row in rows]}


def write_text_set(folder: Path, task: str) -> str:
    """Write a set of `configs/text_sets.py` in the form of its file; return its folder."""
    rows = texts(60)
    if task == 'clinc150':
        parts = {'train': 48, 'val': 6, 'test': 6}
        lists = {f'{at}{key}': [] for key in parts for at in ('', 'oos_')}
        for key, count in parts.items():
            lists[key] = [list(rows.pop()) for _ in range(count)]
            lists[f'oos_{key}'] = [['no such thing', 'oos']]
        (folder / 'data_full.json').write_text(json.dumps(lists))
    else:
        numbers = {topic: number for number, topic in enumerate(sorted({row[1] for row in rows}))}
        lines = [f'{numbers[topic]} {text}\n' for text, topic in rows]
        (folder / 'custrev.all').write_text(''.join([*lines, '1 \n', '0 caf\xe9\n']), 'latin-1')
    return str(folder)


# The columns of each GLUE file: labelled, then the test file's. T and U are the texts, L the label.
_LAYOUTS: dict[str, tuple[str, str]] = {
    'cola': ('source=gj04 L mark= T', 'index=0 sentence=T'),
    'sst2': ('sentence=T label=L', 'index=0 sentence=T'),
    'mrpc': (
        'Quality=L #1_ID=1 #2_ID=2 #1_String=T #2_String=U',
        'index=0 #1_ID=1 #2_ID=2 #1_String=T #2_String=U',
    ),
    'stsb': (
        'index=0 genre=g filename=f year=y old_index=1 source1=s source2=s '
        'sentence1=T sentence2=U score=L',
        'index=0 genre=g filename=f year=y old_index=1 source1=s source2=s sentence1=T sentence2=U',
    ),
    'qqp': (
        'id=0 qid1=1 qid2=2 question1=T question2=U is_duplicate=L',
        'id=0 question1=T question2=U',
    ),
    'mnli': (
        'index=0 promptID=p pairID=q genre=g sentence1=T sentence2=U label1=x gold_label=L',
        'index=0 promptID=p pairID=q genre=g sentence1=T sentence2=U',
    ),
    'qnli': ('index=0 question=T sentence=U label=L', 'index=0 question=T sentence=U'),
    'rte': ('index=0 sentence1=T sentence2=U label=L', 'index=0 sentence1=T sentence2=U'),
    'wnli': ('index=0 sentence1=T sentence2=U label=L', 'index=0 sentence1=T sentence2=U'),
}
_NUMBERED = ('cola', 'sst2', 'mrpc', 'qqp', 'wnli')  # their files hold 0 and 1, not names


def write_glue(root: Path, key: str, train: int = 48, held_out: int = 18, seed: int = 0) -> str:
    """Write one GLUE folder in the benchmark's own layout; return `root`, for `data.dir`."""
    task = glue.task(key)
    folder = root / task.folder
    sizes = {'train': train}
    for suffix in task.validation:
        sizes |= {f'dev{suffix}': held_out, f'test{suffix}': held_out}
    for number, (split, size) in enumerate(sizes.items()):
        labelled, unlabelled = _LAYOUTS[key]
        layout = unlabelled if split.startswith('test') else labelled
        rows = _glue_rows(key, size, seed + number)
        named = key != 'cola' or split.startswith('test')
        _write_layout(folder / f'{split}.tsv', layout, rows, named)
    return str(root)


def _glue_rows(key: str, count: int, seed: int) -> Rows:
    names = glue.task(key).labels
    if not names:
        return [(a, _text(np.random.default_rng(seed)), y) for a, y in ratings(count, seed)]
    kinds = [str(i) if key in _NUMBERED else name for i, name in enumerate(names)]
    rng, words = np.random.default_rng(seed), (BAD, GOOD, FILLERS)
    return [
        (f'{_text(rng)} {rng.choice(words[i % len(kinds)])}', _text(rng), kinds[i % len(kinds)])
        for i in range(count)
    ]


def _write_layout(path: Path, layout: str, rows: Rows, named: bool) -> None:
    cells = [cell.rpartition('=')[::2] for cell in layout.split(' ')]
    header = tuple(name.replace('_', ' ') if '#' in name else name for name, _ in cells)
    filled = [
        tuple(dict(zip('TUL', row, strict=True)).get(value, value) for _, value in cells)
        for row in rows
    ]
    write_table(path, header if named else (), filled)


def config(backbone: str, train: str = '', **changes: object) -> Config:
    """Return a config for the toy data: no cache, one device, one epoch, no dropout.

    `changes` are keys with '__' between their levels: `training__steps=3`.
    """
    made = base()
    made.backbone = backbone
    made.method = 'pfeiffer[reduction_factor=2]'
    made.data.train = train
    settle(made)
    made.training.epochs = 1.0
    made.training.dropout = False
    return change(made, **changes)


def settle(made: Config) -> Config:
    """Let a shipped config run on this machine: nothing outside the test's folder, one device."""
    made.data.cache_dir = 'none'
    made.mesh.data = 1
    return made


def change(made: Config, **changes: object) -> Config:
    """Set keys, with '__' between their levels."""
    for path, value in changes.items():
        *parents, name = path.split('__')
        node = made
        for parent in parents:
            node = node[parent]
        node[name] = value
    return made


def read_lines(path: Path) -> list[dict]:
    """Read a JSONL file."""
    return [json.loads(line) for line in path.read_text('utf-8').split('\n') if line]


def losses(workdir: Path) -> list[tuple[int, float]]:
    """Return the step and the loss of every line of training in metrics.jsonl."""
    lines = read_lines(workdir / 'metrics.jsonl')
    return [(line['step'], line['values']['loss']) for line in lines if line['split'] == 'train']


def bits(tree: dict) -> dict[str, bytes]:
    """Return every leaf's bytes by its path."""
    return {path: np.asarray(leaf).tobytes() for path, leaf in flatten(tree).items()}
