"""`load`: from what a config says about its data to one normal form, whatever the source.

The result has one `datasets.Dataset` a split with the columns `text_a`, optionally `text_b`, and
`label` (str for classes, float for numbers, a list of str for sets of classes; absent where a split
is unlabelled), and nothing else; `read` makes the rows of another form.

Keys of `data`; '' and None mean not set:

| key | meaning |
|---|---|
| name | a built-in data set (`builtin.py`), else a data set id of the Hugging Face hub, or a \
folder that `datasets` saved one in: several splits, or one, which is for training |
| config_name | the configuration of a hub data set |
| dir | a folder: of the GLUE task where `glue` is set, else with train.*, validation.* (or dev.*, \
valid.*, val.*) and test.*; `train`, `validation` and `test` are looked up in it |
| glue | a GLUE task (`glue.py`), read from `dir`, or from the hub where `dir` is not set |
| train, validation, test | named files: .csv .tsv .txt .jsonl .json .parquet, also with .gz; \
of a JSON object of lists FILE.json#KEY or FILE.json#KEY+KEY |
| columns.text_a, .text_b, .label | names, or positions counted from 0; detected where not set |
| skip_empty | True leaves out rows with an empty text, which are refused else |
| label_separator | what stands between the labels of a text that has several |
| header | True, False or 'auto': whether the first line of a file names its columns |
| encoding | of text files; utf-8-sig (with or without byte order mark) by default |
| delimiter | of text files; by suffix where not set, and any other suffix is text where it is. \
.txt files: see `text_files.Layout` |
| quoting | 'csv' (quotes delimit fields), 'none' (they are text), 'auto' (csv for .csv only) |
| split_fractions | (validation, test): shares cut off the training split, see `_complete` |
| split_seed | seed of that cut and of the limits |
| limit | at most so many rows a split, drawn at random, for trials; 0 for all (`limited`) |
| train_limit | the same of the training split alone |
"""

import dataclasses
import functools
import glob
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np

from adapters_jax.data import builtin, columns, folders, forms, glue, splits, text_files
from adapters_jax.data.forms import Form

HEADERS = {'auto': None, 'true': True, 'false': False}

_LOG = logging.getLogger(__name__)

Splits = dict[str, datasets.Dataset]
Groups = Callable[[datasets.Dataset], np.ndarray]


def load(data: Mapping[str, Any], label_kind: str) -> Splits:
    """Reads texts or pairs with a label of a kind of `columns.KINDS`; see `read`."""
    if label_kind not in columns.KINDS:
        raise ValueError(f'label_kind is {label_kind!r}; it must be one of {columns.KINDS}.')
    return read(data, forms.Texts.of(data, label_kind))


def read(data: Mapping[str, Any], form: Form, groups: Groups | None = None) -> Splits:
    """Reads the splits that `data` (a mapping or ConfigDict, keys above) describes.

    form: what rows are made of the tables. groups: see `finish`. Returns 'train', 'validation' and
    'test' as far as there are any (MNLI: 'validation_matched' and 'validation_mismatched', and so
    for test).
    Raises ValueError or FileNotFoundError with one sentence on what to change.
    """
    return finish(_READERS[source_of(data)](data, form), data, groups)


def refuse_glue(data: Mapping[str, Any], has: str, remedy: str) -> None:
    """Raises ValueError where a task that GLUE has nothing for is to be read from it."""
    if data.get('glue'):
        raise ValueError(f'data.glue is {data["glue"]!r}, which has {has}; set {remedy}')


def finish(found: Splits, data: Mapping[str, Any], groups: Groups | None = None) -> Splits:
    """The splits of a source as a run takes them: none is empty, missing ones are cut off.

    groups: gives each row of a split a number; where one is cut off, rows of one number stay
    together (None: rows that share a text).
    Raises ValueError where there is nothing in one, or too little to cut, or where one has single
    texts and another one pairs.
    """
    for name, split in found.items():
        if not len(split):
            raise ValueError(f'The split {name!r} is empty; it must hold at least one example.')
    _check_pairs(found)
    splits.tell_shared(found)
    return _complete(found, data, groups)


def limited(found: Mapping[str, datasets.Dataset], data: Mapping[str, Any]) -> Splits:
    """The splits cut down to `limit` and `train_limit` rows; which classes there are, all rows say.

    Raises ValueError for a negative number.
    """
    cut = {name: _limited(split, data, 'limit') for name, split in found.items()}
    few = {'train': _limited(cut['train'], data, 'train_limit')} if 'train' in cut else {}
    return cut | few


def source_of(data: Mapping[str, Any]) -> str:
    """Which kind of source `data` names: 'builtin', 'hub', 'glue' or 'files'.

    Raises ValueError where it names none, or several.
    """
    given = {key for key in ('name', 'glue', 'dir', *folders.SPLITS) if data.get(key)}
    allowed = ({'name'}, {'glue', 'dir'}, {'dir', *folders.SPLITS})
    if not any(given <= source for source in allowed):
        raise ValueError(
            f'data sets {", ".join(sorted(given))}, which name several sources: set name alone, '
            'or glue and dir, or dir alone, or train, validation and test (looked up in dir).'
        )
    if not given:
        raise ValueError(
            'data names no source: set data.name to a hub id or one of '
            f'{", ".join(builtin.SETS)}, or data.dir, or data.train.'
        )
    if data.get('glue'):
        return 'glue'
    if data.get('name'):
        return 'builtin' if data['name'] in builtin.SETS else 'hub'
    return 'files'


def _from_builtin(data: Mapping[str, Any], form: Form) -> Splits:
    place = functools.partial('{}, row {}'.format, data['name'])
    return {'train': form.build(builtin.read(data['name']), True, place)}


def _from_files(data: Mapping[str, Any], form: Form) -> Splits:
    layout = layout_of(data, form.header_in)
    found = {}
    for split, path in folders.find_files(data).items():
        plain = form.whole_lines and text_files.suffix_of(path) == '.txt' and not layout.delimiter
        # No line has a line feed in it, so this divides none.
        own = dataclasses.replace(layout, delimiter='\n') if plain else layout
        table = text_files.open_table(path, own)
        labelled = split != 'test'
        values, lines = table.read(form.choose(table.names, labelled, str(path)))
        found[split] = form.build(values, labelled, columns.at_lines(path, lines))
        if callable(own.header) and text_files.suffix_of(path) not in text_files.OBJECTS:
            _tell_header(found[split], table.names, path)
    return found


def _tell_header(rows: datasets.Dataset, names: Sequence[str], path: pathlib.Path) -> None:
    """Warn where a line that was taken for an example is alone in its class, as a header is."""
    labels = rows['label'][:] if 'label' in rows.column_names else []
    if names[0] != '0' or len(set(map(str, labels))) == len(labels):
        return
    if labels.count(labels[0]) == 1 and isinstance(labels[0], str):
        _LOG.warning(
            '%s: the first line is read as an example, the only one of the class %r; if it names '
            'the columns, set data.header=True.',
            *(path, labels[0]),
        )


def _from_glue(data: Mapping[str, Any], form: Form) -> Splits:
    task = glue.task(data['glue'])
    glue.check_settings(data)
    if form.kind != task.label_kind:
        raise ValueError(
            f'The labels of {task.folder} are of the kind {task.label_kind!r}, but the task asks '
            f'for {form.kind!r}.'
        )
    if not data.get('dir'):
        key = next(key for key, value in glue.TASKS.items() if value is task)
        chosen = dict(zip(('text_a', 'text_b'), task.hub_columns, strict=False))
        form = forms.Texts(columns.Choice(**chosen), task.label_kind, skip_empty=form.skip_empty)
        return _from_hub({'name': glue.HUB_ID, 'config_name': key}, form)
    encoding = data.get('encoding') or 'utf-8-sig'
    files = glue.find_files(pathlib.Path(data['dir']).expanduser(), task)
    return {
        split: glue.read_split(path, split, task, encoding, form.skip_empty)
        for split, path in files.items()
    }


def _from_hub(data: Mapping[str, Any], form: Form) -> Splits:
    return from_hub(data, functools.partial(_hub_split, form))


def from_hub(
    data: Mapping[str, Any], read: Callable[[datasets.Dataset, bool, str], datasets.Dataset]
) -> Splits:
    """The splits of a hub data set, each in the form that `read` gives it.

    read: takes the rows, whether they must have labels, and where they stand, for messages. Raises
    ValueError where there is no such data set, or it has no split for training.
    """
    name = data['name']
    try:
        loaded = _loaded(name, data.get('config_name') or None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f'data.name is {name!r}, which is neither built in ({", ".join(builtin.SETS)}) nor to '
            f'be had from the Hugging Face hub: {error}'
        ) from error
    found = {}
    for split, rows in loaded.items():
        stem, _, suffix = split.partition('_')
        role = next((r for r, stems in folders.SPLITS.items() if stem in stems), None)
        if role is None or (role == 'train' and suffix):
            continue
        key = f'{role}_{suffix}' if suffix else role  # MNLI has validation_matched
        if key in found:
            _LOG.warning('%s: of its splits for %s the last one is used, %s.', name, key, split)
        found[key] = read(rows, role != 'test', f'{name}, split {split}')
    if 'train' not in found:
        raise ValueError(f'{name} has no split for training; its splits are {", ".join(loaded)}.')
    return found


def _loaded(name: str, config_name: str | None) -> Mapping[str, datasets.Dataset]:
    """The splits of a data set; of a folder that one of them was saved in, that one.

    Raises ValueError for a folder of files whose path `datasets` would take for a pattern.
    """
    folder, known = pathlib.Path(name), datasets.config
    if (folder / known.DATASET_STATE_JSON_FILENAME).is_file():
        return {'train': datasets.load_from_disk(name)}
    if not config_name and (folder / known.DATASETDICT_JSON_FILENAME).is_file():
        return datasets.load_from_disk(name)
    if glob.has_magic(name) and folder.is_dir():
        # It would find the files of other folders, or none.
        raise ValueError('it is a folder whose path is read as a pattern: rename what has * ? or [')
    return datasets.load_dataset(name, config_name)


def _hub_split(form: Form, rows: datasets.Dataset, labelled: bool, where: str) -> datasets.Dataset:
    chosen = form.choose(rows.column_names, labelled, where)
    values = {key: rows[name][:] for key, name in chosen.items()}
    place = functools.partial('{}, row {}'.format, where)
    feature = rows.features[chosen['label']] if 'label' in values else None
    if isinstance(feature, datasets.ClassLabel):
        # The hub marks labels that are kept secret by -1.
        named = feature.int2str if form.names_classes else float
        found = [None if i in (None, -1) else named(i) for i in values['label']]
        # As a text, a name with a separator in it would be several.
        sets = form.kind == 'classes'
        values['label'] = [[name] if sets and name is not None else name for name in found]
    of_each = getattr(feature, 'feature', None)
    if isinstance(of_each, datasets.ClassLabel):
        if not labelled and columns.are_hidden([i for own in values['label'] for i in own or ()]):
            values['label'] = [None] * len(rows)
        sets = enumerate(values['label'])
        values['label'] = [_named_set(numbers, of_each, place(row)) for row, numbers in sets]
    return form.build(values, labelled, place)


def _named_set(
    numbers: list[int | None] | None, feature: datasets.ClassLabel, where: str
) -> list[str] | None:
    """The names of a set of classes. Raises ValueError for a number that is no class."""
    if numbers is None:
        return None
    if any(number is None or not 0 <= number < feature.num_classes for number in numbers):
        raise ValueError(
            f'{where}: the labels are {numbers}; expected numbers of classes, from 0 to '
            f'{feature.num_classes - 1}: mend the row, or leave it out.'
        )
    return feature.int2str(numbers)


_READERS: dict[str, Callable[[Mapping[str, Any], Form], Splits]] = {
    'builtin': _from_builtin,
    'files': _from_files,
    'glue': _from_glue,
    'hub': _from_hub,
}


def layout_of(
    data: Mapping[str, Any], detect: bool | Callable[[list[str]], bool]
) -> text_files.Layout:
    """How `data` says that files are laid out; `detect`: of the header, where it does not."""
    header = str(data.get('header', 'auto')).lower()
    if header not in HEADERS:
        raise ValueError(f"data.header is {data['header']!r}; it must be True, False or 'auto'.")
    return text_files.Layout(
        encoding=data.get('encoding') or 'utf-8-sig',
        delimiter=data.get('delimiter') or '',
        header=detect if header == 'auto' else HEADERS[header],
        quoting=data.get('quoting') or 'auto',
    )


def _complete(found: Splits, data: Mapping[str, Any], groups: Groups | None) -> Splits:
    """Cuts a missing validation split off the training split, and a test split with it.

    A source with a validation split is left as it is: it was divided by somebody, and shrinking its
    training split would make results incomparable.
    """
    fractions = tuple(data.get('split_fractions') or (0.0, 0.0))
    if len(fractions) != 2:
        raise ValueError(f'data.split_fractions is {fractions}; it needs (validation, test).')
    if 'train' not in found or not any(fractions) or any(k.startswith('validation') for k in found):
        return found
    wanted = dict(zip(('validation', 'test'), fractions, strict=True))
    if 'test' in found:
        del wanted['test']
    pool = found['train']
    return found | splits.split_off(pool, wanted, _seed(data), groups and groups(pool))


def _check_pairs(found: Splits) -> None:
    kinds = {name: 'text_b' in split.column_names for name, split in found.items()}
    other = next((name for name, paired in kinds.items() if paired != kinds.get('train')), None)
    if 'train' in kinds and other:
        single, pairs = sorted(('train', other), key=kinds.get)
        raise ValueError(
            f'The split {pairs!r} has pairs of texts, and {single!r} single ones; give the files '
            'the same columns, or set data.columns.text_a (and data.columns.text_b for pairs).'
        )


def _seed(data: Mapping[str, Any]) -> int:
    seed = int(data.get('split_seed') or 0)
    if seed < 0:
        raise ValueError(f'data.split_seed is {seed}; it must be 0 or a positive number.')
    return seed


def _limited(split: datasets.Dataset, data: Mapping[str, Any], key: str) -> datasets.Dataset:
    limit = int(data.get(key) or 0)
    if limit < 0:
        raise ValueError(f'data.{key} is {limit}; it must be positive, or 0 for all rows.')
    if not limit or limit >= len(split):
        return split
    rng = np.random.default_rng([_seed(data), len(split)])
    return split.select(np.sort(rng.choice(len(split), limit, replace=False)))
