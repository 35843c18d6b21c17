"""The nine GLUE tasks (Wang et al. 2019, arXiv:1804.07461): one table, and the files of each.

The folder layout is the one of the GLUE download: `MRPC/train.tsv`, `MRPC/dev.tsv`,
`MRPC/test.tsv` and so on; its test files carry no labels. The files differ in small ways that break
readers: CoLA has no header, quotation marks are ordinary characters everywhere, MRPC begins with a
byte order mark and calls its label `Quality`, MNLI has two development sets, QQP has a few broken
lines.

`labels` are the names of the classes in the benchmark's own numbering, so that class 1 is the
positive one where the metric is F1; files that number the classes are read by that order too.
"""

import dataclasses
import itertools
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets

from adapters_jax.data import columns, folders, forms, text_files

HUB_ID = 'nyu-mll/glue'
MRPC_FILES = {'train': 'msr_paraphrase_train.txt', 'test': 'msr_paraphrase_test.txt'}

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class GlueTask:
    """One task. `folder` is its folder's name; columns are those of the labelled files."""

    folder: str
    text_a: str
    text_b: str | None
    label: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    hub_columns: tuple[str, ...] = ('sentence1', 'sentence2')
    has_header: bool = True
    # Lines with a wrong number of fields or an empty text are left out, as the benchmark does.
    skip_broken: bool = False
    validation: tuple[str, ...] = ('',)

    @property
    def label_kind(self) -> str:
        """'class' or 'number'."""
        return 'class' if self.labels else 'number'

    def columns_in(self, names: Sequence[str]) -> dict[str, str]:
        """The columns to read of a file with these columns; test files have no label."""
        if self.text_a in names:
            chosen = {'text_a': self.text_a, 'text_b': self.text_b, 'label': self.label}
        else:  # CoLA's test file has a header, which its other two files have not
            chosen = dict(zip(('text_a', 'text_b'), self.hub_columns, strict=False))
        return {key: name for key, name in chosen.items() if name in names}

    def label_name(self, value: str) -> str:
        """The class of a label as a file has it: its name, or its number in the benchmark."""
        if value in self.labels:
            return value
        if value.isdecimal() and int(value) < len(self.labels):
            return self.labels[int(value)]
        raise ValueError(
            f'{value!r} is no label of {self.folder}; its labels are {", ".join(self.labels)}, or '
            f'the numbers 0 to {len(self.labels) - 1}.'
        )


_ENTAILS = ('entailment', 'not_entailment')

TASKS = {
    'cola': GlueTask(
        'CoLA',
        *('3', None, '1'),
        labels=('unacceptable', 'acceptable'),
        metrics=('matthews',),
        primary='matthews',
        hub_columns=('sentence',),
        has_header=False,
    ),
    'sst2': GlueTask(
        'SST-2',
        *('sentence', None, 'label'),
        labels=('negative', 'positive'),
        metrics=('accuracy',),
        primary='accuracy',
        hub_columns=('sentence',),
    ),
    'mrpc': GlueTask(
        'MRPC',
        *('#1 String', '#2 String', 'Quality'),
        labels=('not_equivalent', 'equivalent'),
        metrics=('accuracy', 'f1'),
        primary='f1',
    ),
    'stsb': GlueTask(
        'STS-B',
        *('sentence1', 'sentence2', 'score'),
        labels=(),
        metrics=('pearson', 'spearman'),
        primary='spearman',
    ),
    'qqp': GlueTask(
        'QQP',
        *('question1', 'question2', 'is_duplicate'),
        labels=('not_duplicate', 'duplicate'),
        metrics=('accuracy', 'f1'),
        primary='f1',
        hub_columns=('question1', 'question2'),
        skip_broken=True,
    ),
    'mnli': GlueTask(
        'MNLI',
        *('sentence1', 'sentence2', 'gold_label'),
        labels=('entailment', 'neutral', 'contradiction'),
        metrics=('accuracy',),
        primary='accuracy',
        hub_columns=('premise', 'hypothesis'),
        validation=('_matched', '_mismatched'),
    ),
    'qnli': GlueTask(
        'QNLI',
        *('question', 'sentence', 'label'),
        labels=_ENTAILS,
        metrics=('accuracy',),
        primary='accuracy',
        hub_columns=('question', 'sentence'),
    ),
    'rte': GlueTask(
        'RTE',
        *('sentence1', 'sentence2', 'label'),
        labels=_ENTAILS,
        metrics=('accuracy',),
        primary='accuracy',
    ),
    'wnli': GlueTask(
        'WNLI',
        *('sentence1', 'sentence2', 'label'),
        labels=_ENTAILS[::-1],
        metrics=('accuracy',),
        primary='accuracy',
    ),
}


def task(name: str) -> GlueTask:
    """The task of this name ('mrpc', also 'MRPC', 'STS-B'). Raises ValueError listing them."""
    key = key_of(name)
    if key not in TASKS:
        raise ValueError(f'{name!r} is no GLUE task; the tasks are {", ".join(TASKS)}.')
    return TASKS[key]


def key_of(name: str) -> str:
    """The name as `TASKS` has it, if it is there: 'stsb' of 'STS-B'."""
    return name.lower().replace('-', '').replace('_', '')


def check_settings(data: Mapping[str, Any]) -> None:
    """Raises ValueError where `data` says of a task's files what the task decides itself."""
    own = {f'columns.{key}': value for key, value in (data.get('columns') or {}).items()}
    own |= {key: data.get(key) for key in ('header', 'delimiter', 'quoting')}
    for key, value in own.items():
        if value not in ('', None, 'auto'):
            raise ValueError(
                f'data.{key} is {value!r}, but data.glue is {data["glue"]!r}, whose files have a '
                f'layout of their own; leave data.{key} out, or name the files in data.train, '
                'data.validation and data.test instead of data.glue.'
            )


def find_files(root: pathlib.Path, glue_task: GlueTask) -> dict[str, pathlib.Path]:
    """The files of a task by split, in `root` or in its folder of the task's name.

    Splits are train, validation and test; those of MNLI end in _matched or _mismatched. The test
    files may be absent, and for MRPC all of them where the original corpus stands in their place.
    Raises FileNotFoundError that says what is there instead.
    """
    folder = root / glue_task.folder
    folder = folder if folder.is_dir() else root
    files = {'train': folder / 'train.tsv'}
    for suffix in glue_task.validation:
        files[f'validation{suffix}'] = folder / f'dev{suffix}.tsv'
        files[f'test{suffix}'] = folder / f'test{suffix}.tsv'
    if glue_task.folder == 'MRPC' and not files['train'].is_file():
        corpus = {split: folder / name for split, name in MRPC_FILES.items()}
        if corpus['train'].is_file():
            files = corpus
    missing = [p.name for s, p in files.items() if not s.startswith('test') and not p.is_file()]
    if missing:
        raise FileNotFoundError(
            f'{glue_task.folder}: no {" and no ".join(missing)}; {folders.content(folder)}. Set '
            f'data.dir to the folder that holds {glue_task.folder}/, or to that folder itself.'
        )
    return {split: path for split, path in files.items() if path.is_file()}


def read_split(
    path: pathlib.Path,
    split: str,
    glue_task: GlueTask,
    encoding: str = 'utf-8-sig',
    skip_empty: bool = False,
) -> datasets.Dataset:
    """Reads one of a task's files. Raises ValueError where it is not laid out as the task's are."""
    layout = text_files.Layout(
        encoding=encoding,
        delimiter='\t',
        header=glue_task.has_header or split.startswith('test'),
        quoting='none',
    )
    table = text_files.open_table(path, layout)
    chosen = glue_task.columns_in(table.names)
    labelled = not split.startswith('test')
    if 'text_a' not in chosen or (labelled and 'label' not in chosen):
        raise ValueError(
            f'{path} is not laid out as {glue_task.folder}: it has the columns '
            f'{", ".join(map(repr, table.names))}, and needs {glue_task.text_a!r} and '
            f'{glue_task.label!r}.'
        )
    values, lines = table.read(chosen, glue_task.skip_broken)
    if glue_task.skip_broken:
        values, lines = _without_empty(values, lines, path)
    if glue_task.labels and 'label' in values:
        values['label'] = _named(values['label'], glue_task, columns.at_lines(path, lines))
    form = forms.Texts(columns.Choice(), glue_task.label_kind, skip_empty=skip_empty)
    return form.build(values, labelled, columns.at_lines(path, lines))


def _named(labels: list[str], glue_task: GlueTask, place: Callable[[int], str]) -> list[str]:
    names = {}
    for row, label in enumerate(labels):
        if label not in names:
            try:
                names[label] = glue_task.label_name(label)
            except ValueError as error:
                raise ValueError(f'{place(row)}: {error}') from None
    return [names[label] for label in labels]


def _without_empty(
    values: dict[str, list], lines: list[int], path: pathlib.Path
) -> tuple[dict[str, list], list[int]]:
    keep = [all(row) for row in zip(*values.values(), strict=True)]
    dropped = max(lines, default=1) - 1 - sum(keep)
    if dropped:
        _LOG.warning('%s: %d broken lines left out.', path, dropped)
    kept = {key: list(itertools.compress(column, keep)) for key, column in values.items()}
    return kept, list(itertools.compress(lines, keep))
