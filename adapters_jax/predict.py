"""Predict with finished adapters.

    python -m adapters_jax.predict --adapter=DIR --input=in.jsonl --output=out.jsonl
    python -m adapters_jax.predict --adapter=a=DIR,b=DIR --input=in.jsonl --output=out.jsonl

DIR is an adapter of this project, of AdapterHub or of PEFT; which, is found out.

Input: one JSON object a line. By task it has

- `text`, or `text_a` and `text_b`; for a masked language model a `text` with a `[MASK]`;
- `question` and `context`; or `choices` and what they belong to; or `tokens` to be tagged;
- the path of an `image` or of an `audio` file;
- with several adapters also `adapter`, the name of the one to use.

Output: for each, in order, the object plus `prediction`, and

- for classes `label` and `logits` (a `label` that the object had is `gold` then);
- for sets of labels `logits` and `probabilities`;
- for questions `start` and `end` (characters of the context), `score` and `n_best`;
- for choices `index` and `scores`; for missing words `masks`.

Several adapters share one backbone and, where they can be chosen by row, one program and its
batches. With `--drop_layers=N` adapters are left out of the N lowest layers, with
`--drop_layers=A-B` of layers A to B, and with `--off` altogether: task and head are over the
backbone as it was, also where the adapter tuned some of it. `--frozen_dtype=int8` keeps the
backbone in a quarter of its memory.
"""

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from adapters_jax import config as configs
from adapters_jax import files
from adapters_jax.adapters import dropping
from adapters_jax.adapters.dropping import Dropped
from adapters_jax.data.tokenize import Tokenizer
from adapters_jax.tasks.task import Task
from adapters_jax.training import dtypes, experiment, fitting, serving

Rows = list[dict[str, Any]]

_LOG = logging.getLogger('adapters_jax.predict')  # __name__ is '__main__' on the command line


class Predictor:
    """Finished adapters that are loaded once and asked again and again: `predictor(rows)`.

    The first calls compile: one program for each number of rows and for each length of texts, both
    rounded up to powers of two. The arguments are those of `predict`.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a backbone that is not the adapter's, a number format that is none, or no layers
            to drop.
    """

    def __init__(
        self,
        adapter: str | Path | Mapping[str, str | Path],
        backbone: str = '',
        batch_size: int = 32,
        drop_layers: Dropped = 0,
        frozen_dtype: str = 'float32',
        off: bool = False,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f'batch_size is {batch_size}; expected 1 or more')
        self._config = configs.base()
        training = self._config.training
        training.batch_size, training.frozen_dtype = batch_size, frozen_dtype
        dtypes.choose_frozen_dtype(self._config)
        self._several = isinstance(adapter, Mapping)
        self._directories = adapter if self._several else {'': adapter}
        self._loaded = {
            name: (folder.switched_off() if off else folder, own)
            for name, (folder, own) in serving.load(self._directories, backbone).items()
        }
        self._dropped = drop_layers
        self._tasks: dict[str, Task] = {}
        self._tokenizers: dict[Path, Tokenizer | None] = {}
        self._serving: dict[tuple[str, ...], serving.Serving] = {}

    def __call__(self, rows: Iterable[dict[str, Any]]) -> Rows:
        """Return each row with its prediction, as `predict` does.

        Raises:
            ValueError: a row without text, or with an adapter that is not given.
        """
        rows = list(rows)
        return self.answer(rows, range(1, len(rows) + 1), few=True) if rows else []

    def answer(self, rows: Rows, lines: Sequence[int], few: bool) -> Rows:
        """Return rows with their predictions; `lines` are their numbers, for messages.

        With `few` all adapters are on the devices for good, and batches as small as they can be;
        without, those that these rows name are, and batches are made for throughput.
        """
        chosen = _chosen(rows, lines, self._directories) if self._several else [''] * len(rows)
        places = {
            name: [i for i, own in enumerate(chosen) if own == name]
            for name in dict.fromkeys(chosen)
        }
        names = tuple(self._loaded if few else places)
        tasks = {name: self._task(name) for name in names}
        texts = {
            name: tasks[name].rows_of(
                [rows[i] for i in own], [lines[i] for i in own], self._loaded[name][0].pair
            )
            for name, own in places.items()
        }
        tokenizers = {name: self._tokenizer(name) for name in places}
        encoded = {
            name: serving.encode(texts[name], tasks[name], *self._loaded[name], tokenizers[name])
            for name in places
        }
        found = self._on_devices(names, tasks).outputs(encoded, few)
        result: Rows = [{}] * len(rows)
        for name, own in places.items():
            told = tasks[name].predict(found[name], encoded[name], texts[name])
            told = tasks[name].worded(told, texts[name], tokenizers[name])
            for place, one in zip(own, told, strict=True):
                result[place] = _beside(rows[place], one)
        _tell_replaced(rows, result)
        return result

    def _on_devices(self, names: tuple[str, ...], tasks: Mapping[str, Task]) -> serving.Serving:
        """Return what computes for adapters; the last ones are kept."""
        if names not in self._serving:
            folders = {name: self._loaded[name][0] for name in names}
            config = self._config.copy_and_resolve_references()
            config.data.max_length = max(folder.max_length for folder in folders.values())
            if len(names) > 1:
                config.data.batching = 'buckets'  # each row is one text, and one adapter's
            shared = next(iter(self._loaded.values()))[1]
            made = serving.Serving(folders, shared, config, tasks, self._dropped)
            self._serving = {names: made}
        return self._serving[names]

    def _tokenizer(self, name: str) -> Tokenizer | None:
        """Return the tokenizer of an adapter's backbone, read once."""
        loaded = self._loaded[name][1]
        if loaded.directory not in self._tokenizers:
            self._tokenizers[loaded.directory] = fitting.tokenizer_of(loaded)
        return self._tokenizers[loaded.directory]

    def _task(self, name: str) -> Task:
        """Return the task of an adapter, having tried whether the adapter can be used as asked.

        Raises:
            ValueError: it cannot; of several adapters it is named.
        """
        if name not in self._tasks:
            folder, loaded = self._loaded[name]
            try:
                experiment.bind(folder, loaded, dropped=self._dropped)
                self._tasks[name] = experiment.served(folder, loaded).predicting()
            except ValueError as error:
                raise ValueError(
                    f'the adapter {name!r}: {error}' if name else str(error)
                ) from error
        return self._tasks[name]


def predict(
    adapter: str | Path | Mapping[str, str | Path],
    rows: Iterable[dict[str, Any]],
    backbone: str = '',
    batch_size: int = 32,
    drop_layers: Dropped = 0,
    frozen_dtype: str = 'float32',
    lines: Sequence[int] | None = None,
    off: bool = False,
) -> Rows:
    """Return each row with its prediction; the rows are objects with the task's text fields.

    `adapter` is a folder, or folders by name; then each row's field `adapter` names its own. Each
    call reads the folders and compiles: give it many rows. `backbone` replaces the
    name that the adapter was trained with, for a copy elsewhere; its weights must be the same.
    A batch has four times `batch_size` texts, since nothing is trained. `frozen_dtype` is what
    frozen weights are stored in, as in `config.training`. `lines` are the
    rows' numbers in their file, for messages; else they are counted. With `off` adapters are
    switched off, and what they tuned of the backbone is what it was. Everything is loaded and
    compiled for this call; see `Predictor`.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a row without text or with an adapter that is not given, a backbone that is not
            the adapter's, a number format that is none, or no layers to drop.
    """
    rows = list(rows)
    if not rows:
        raise ValueError('the input holds no examples; expected one JSON object a line')
    lines = range(1, len(rows) + 1) if lines is None else lines
    if isinstance(adapter, Mapping):
        _chosen(rows, lines, adapter)  # before anything is loaded
    predictor = Predictor(adapter, backbone, batch_size, drop_layers, frozen_dtype, off)
    return predictor.answer(rows, lines, few=False)


def _chosen(rows: Rows, lines: Sequence[int], adapters: Mapping[str, Any]) -> list[str]:
    """Return the name of each row's adapter."""
    known = ', '.join(adapters)
    for number, row in zip(lines, rows, strict=True):
        if not isinstance(row.get('adapter'), str) or row['adapter'] not in adapters:
            raise ValueError(
                f'input line {number} has the adapter {row.get("adapter")!r}; expected a field '
                f'"adapter" with one of {known}'
            )
    return [row['adapter'] for row in rows]


def _beside(row: Mapping[str, Any], predicted: Mapping[str, Any]) -> dict[str, Any]:
    """Return an object with its prediction; a label that it had is kept as `gold`, where it can."""
    gold = {'gold': row['label']} if 'label' in row and 'label' in predicted else {}
    return {**gold, **row, **predicted}


def _tell_replaced(rows: Rows, result: Rows) -> None:
    """Warn of fields of the input whose values are others now."""
    replaced = {
        name
        for row, found in zip(rows, result, strict=True)
        for name in row
        if _differ(found[name], row[name])
        and (name != 'label' or _differ(found['gold'], row[name]))
    }
    if replaced:
        _LOG.warning(
            'predictions overwrite what the input has as %s; rename it there to keep it',
            ' and '.join(sorted(replaced)),
        )


def _differ(found: Any, given: Any) -> bool:
    # NaN, which JSON has no name for and Python writes all the same, differs from itself.
    return found is not given and found != given


def read_lines(path: Path) -> dict[int, dict[str, Any]]:
    """Read a JSONL file of objects, and return them by the numbers of their lines.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object; its number is named.
    """
    if not path.exists():
        raise FileNotFoundError(f'--input: {path} does not exist')
    if path.is_dir():
        raise FileNotFoundError(f'--input: {path} is a directory; expected a JSONL file')
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 (byte {error.start}: {error.reason})') from error
    rows = {}
    # Not splitlines: JSON strings may hold other line separators than this one.
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f'{path}, line {number} is not JSON: {error}') from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number} is not a JSON object but {line[:60]!r}')
        rows[number] = row
    return rows


def main(
    adapter: str,
    input: str,
    output: str,
    backbone: str,
    batch_size: int,
    drop_layers: str,
    frozen_dtype: str,
    off: bool,
) -> None:
    """Predict for a file, and say what was written."""
    # A directory may have a '=' in its name; several adapters are no directory, and their text may
    # be longer than a path can be, which pathlib does not forgive.
    several = '=' in adapter and not os.path.exists(adapter)  # noqa: PTH110
    given = configs.named_items(adapter, '--adapter') if several else adapter
    found = read_lines(Path(input))
    files.check_target(output)
    options = backbone, batch_size, dropping.parse(drop_layers), frozen_dtype
    rows = predict(given, found.values(), *options, lines=list(found), off=off)
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    with files.atomic(output) as temporary:
        # Half a character in a field that no task reads comes out as it came in: JSON's escape.
        temporary.write_text(text, 'utf-8', errors='backslashreplace')
    print(f'wrote {output}: {len(rows):,} predictions')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'adapter': flags.DEFINE_string('adapter', None, 'A finished adapter: DIR, or a=DIR,b=DIR.'),
        'input': flags.DEFINE_string('input', None, 'JSONL file to read.'),
        'output': flags.DEFINE_string('output', None, 'JSONL file to write.'),
        'backbone': flags.DEFINE_string('backbone', '', 'Where the backbone is, if it has moved.'),
        'drop_layers': flags.DEFINE_string(
            'drop_layers', '0', 'Layers without adapters: the N lowest, or A-B.'
        ),
        'frozen_dtype': flags.DEFINE_enum(
            'frozen_dtype',
            'float32',
            list(dtypes.FROZEN_DTYPES),
            'What frozen weights are stored in.',
        ),
        'off': flags.DEFINE_bool('off', False, 'Leave adapters out: the bare backbone, same head.'),
        'batch_size': flags.DEFINE_integer('batch_size', 32, 'A quarter of the texts of a batch.'),
    }


if __name__ == '__main__':
    from adapters_jax import entry

    entry.run(_define, main)
