"""Predict with a finished adapter.

    python -m adapters_jax.predict --adapter=DIR --input=in.jsonl --output=out.jsonl

Input: one JSON object a line with `text`, or `text_a` and `text_b`. Output: for each, in order, the
object plus `prediction` and, for classification, `label` and `logits`. DIR is an adapter of this
project, of AdapterHub or of PEFT; which, is found out.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
from absl import flags

from adapters_jax import config as configs
from adapters_jax import files
from adapters_jax.data import tokenize
from adapters_jax.interop import formats
from adapters_jax.training import experiment, inference


def predict(
    adapter: str | Path, rows: Iterable[dict[str, Any]], backbone: str = '', batch_size: int = 32
) -> list[dict[str, Any]]:
    """Return each row with its prediction; the rows are objects with the task's text fields.

    `backbone` replaces the name that the adapter was trained with, for a copy elsewhere; its
    weights must be the same.

    Raises:
        FileNotFoundError: no adapter there.
        ValueError: a row without text, or a backbone that is not the adapter's.
    """
    if batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}; expected 1 or more')
    rows = list(rows)
    folder, loaded = formats.load(Path(adapter), backbone)
    task = experiment.task_of(folder)
    texts = read_texts(rows, folder.pair)
    encoded = tokenize.encode(
        texts,
        tokenize.load_tokenizer(loaded.directory),
        folder.max_length,
        positions=experiment.bind(folder, loaded).text_positions,
        cache_dir=None,
    )
    config = configs.base()
    config.training.batch_size = batch_size
    config.data.max_length = folder.max_length
    logits = inference.outputs(folder, loaded, encoded, config)
    return [row | told for row, told in zip(rows, task.predictions(logits), strict=True)]


def read_texts(rows: list[dict[str, Any]], pair: bool | None) -> datasets.Dataset:
    """Return the rows' texts under `text_a` and, for an adapter of pairs, `text_b`.

    Where the adapter does not say (`pair` is None), the first row's fields do.

    Raises:
        ValueError: no rows, a row without the fields of the first one, or a text that is none.
    """
    if not rows:
        raise ValueError('the input holds no examples; expected one JSON object a line')
    if pair is None:
        pair = 'text_b' in rows[0]
    names = {'text_a': 'text_a' if pair or 'text_a' in rows[0] else 'text'}
    if pair:
        names['text_b'] = 'text_b'
    wanted = '"text_a" and "text_b": the adapter is for pairs' if pair else '"text"'
    for number, row in enumerate(rows, 1):
        for name in names.values():
            if not isinstance(row.get(name), str) or not row[name].strip():
                raise ValueError(
                    f'input line {number} has no text under {name!r}; expected {wanted} '
                    f'(this one has: {", ".join(row)})'
                )
    return datasets.Dataset.from_dict({k: [row[v] for row in rows] for k, v in names.items()})


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file of objects.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a line that is not a JSON object; its number is named.
    """
    if not path.exists():
        raise FileNotFoundError(f'--input: {path} does not exist')
    try:
        text = path.read_text(encoding='utf-8-sig')
    except UnicodeDecodeError as error:
        raise ValueError(f'{path} is not UTF-8 (byte {error.start}: {error.reason})') from error
    rows = []
    # Not splitlines: JSON strings may hold other line separators than this one.
    for number, line in enumerate(text.split('\n'), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f'{path}, line {number} is not JSON: {error}') from error
        if not isinstance(row, dict):
            raise ValueError(f'{path}, line {number} is not a JSON object but {line[:60]!r}')
        rows.append(row)
    return rows


def main(adapter: str, input: str, output: str, backbone: str, batch_size: int) -> None:
    """Predict for a file, and say what was written."""
    rows = predict(adapter, read_lines(Path(input)), backbone, batch_size)
    text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    files.write_text(Path(output), text)
    print(f'wrote {output}: {len(rows):,} predictions')


def _define() -> dict[str, flags.FlagHolder]:
    return {
        'adapter': flags.DEFINE_string('adapter', None, 'Folder of a finished adapter.'),
        'input': flags.DEFINE_string('input', None, 'JSONL file to read.'),
        'output': flags.DEFINE_string('output', None, 'JSONL file to write.'),
        'backbone': flags.DEFINE_string('backbone', '', 'The backbone, if not where it was.'),
        'batch_size': flags.DEFINE_integer('batch_size', 32, 'Examples of a quarter batch.'),
    }


if __name__ == '__main__':
    from adapters_jax import entry

    entry.run(_define, main)
