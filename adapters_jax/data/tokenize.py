"""Texts to token ids: once, in batches, and kept on disk.

Encoding is the slow part of starting a run, and its result depends on the texts, the steps that
they go through first (`preprocess`), the tokenizer and the length limit alone. Those name the
cached file, so a run that repeats them reads arrays.
"""

import hashlib
import json
import logging
import os
import pathlib
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from adapters_jax import files, processes
from adapters_jax.data.encoded import TAGS, Encoded
from adapters_jax.data.preprocess.align import piece_tags
from adapters_jax.data.preprocess.chain import Chain
from adapters_jax.data.preprocess.document import Document
from adapters_jax.interop import hub, sentence_pieces

BATCH = 1000  # texts a call: enough for the tokenizer's threads, little memory
FORMAT = 1  # raised whenever the same inputs would be encoded differently
COLUMNS = ('input_ids', 'token_type_ids')
OTHERS = ('offsets', 'truncated', 'emptied')  # what else is kept; the last one, of a chain alone
NO_STEPS = Chain()

_LOG = logging.getLogger(__name__)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer
else:
    Tokenizer = Any
LabelIds = Callable[[Sequence[Any]], np.ndarray]


def load_tokenizer(directory: str | os.PathLike) -> Tokenizer:
    """The fast tokenizer of a model folder, without padding or truncation of its own.

    Of opus-mt's two it is the one of what is translated. Some tokenizer.json files pad and cut
    every text to 128; rows are formed later here. Raises FileNotFoundError or ValueError where the
    folder holds no fast tokenizer.
    """
    from transformers import AutoTokenizer  # late: see `adapters_jax.lazy`

    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f'There is no folder {folder} to read a tokenizer from.')
    if _of_two(folder):
        return sentence_pieces.read(folder, sentence_pieces.SOURCE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        names = ', '.join(sorted(path.name for path in folder.iterdir()))
        raise ValueError(
            f'{folder} holds no readable tokenizer (it holds {names or "nothing"}); it needs '
            f'tokenizer.json and config.json: {error}'
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f'{folder} holds a slow tokenizer only; add its tokenizer.json.')
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def load_writer(directory: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer of what a decoder writes, where a model folder has one of its own."""
    folder = pathlib.Path(directory)
    if _of_two(folder):
        return sentence_pieces.read(folder, sentence_pieces.TARGET)
    folder = folder / hub.WRITER
    return load_tokenizer(folder) if (folder / 'tokenizer.json').is_file() else None


def _of_two(folder: pathlib.Path) -> bool:
    return sentence_pieces.suits(folder) and not (folder / 'tokenizer.json').is_file()


def encode(
    dataset: datasets.Dataset,
    tokenizer: Tokenizer,
    max_length: int,
    label_ids: LabelIds | None = None,
    cache_dir: str | os.PathLike | None = None,
    positions: int | None = None,
    chain: Chain = NO_STEPS,
    prefix: str = '',
) -> Encoded:
    """Encodes text_a (and text_b) of a split, special tokens included.

    max_length: most tokens an example may have; longer ones lose tokens from the longer of their
    texts first. They are counted in `truncated` and logged. label_ids: turns the label column into
    an array [N]; without it, or without labels, there is no 'label'. cache_dir: None for no cache.
    positions: how many the model has. chain: the steps before; where one of them tags, there is a
    token column 'tags'. prefix: what stands before each text_a after them. Raises ValueError where
    max_length fits no text or no model.
    """
    pair = 'text_b' in dataset.column_names
    check_length(max_length, positions, tokenizer.num_special_tokens_to_add(pair))
    texts = [dataset[key][:] for key in ('text_a', 'text_b') if key in dataset.column_names]
    columns = (*COLUMNS, TAGS) if chain.inventory else COLUMNS
    arrays = remembered(
        lambda: _encode_chain(texts, tokenizer, max_length, chain, prefix),
        (*columns, *(OTHERS if chain else OTHERS[:2])),
        cache_dir,
        *([*texts, [prefix]] if prefix else texts, tokenizer, max_length, chain),
    )
    _tell(arrays, len(dataset), max_length)
    labels = {}
    if label_ids is not None and 'label' in dataset.column_names:
        labels['label'] = label_ids(dataset['label'][:])
    tokens = {name: arrays[name] for name in columns}
    return Encoded(tokens, arrays['offsets'], labels, int(arrays['truncated']))


def remembered(
    make: Callable[[], dict[str, np.ndarray]],
    names: Sequence[str],
    cache_dir: str | os.PathLike | None,
    texts: Sequence[Sequence[Any]],
    tokenizer: Tokenizer,
    max_length: int,
    chain: Chain = NO_STEPS,
) -> dict[str, np.ndarray]:
    """The arrays `names` that `make` makes of columns of texts, once: then they are on the disk.

    cache_dir: None for no cache.
    """
    if cache_dir is None:
        return make()
    path = pathlib.Path(cache_dir) / f'{_cache_key(texts, tokenizer, max_length, chain)}.npz'
    arrays = _read(path, names)
    # To make them all processes of a run may be needed: a tagger of the chain computes.
    if not all(processes.gather(arrays is not None)):
        arrays = make()
        _write(path, arrays)
    return arrays


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """A hexadecimal name of what the tokenizer does, whatever padding or truncation is set now."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state |= {'padding': None, 'truncation': None}
    sides = f'{tokenizer.truncation_side}\n'
    return hashlib.sha256((sides + json.dumps(state, sort_keys=True)).encode()).hexdigest()


def check_length(max_length: int, positions: int | None, special: int) -> None:
    """Refuse a length that is more than the model has, or holds special tokens only."""
    if positions is not None and max_length > positions:
        raise ValueError(
            f'max_length is {max_length}, but the model has {positions} positions; set it to '
            f'{positions} or less.'
        )
    if max_length <= special:
        raise ValueError(
            f'max_length is {max_length}, which leaves no room for text beside the {special} '
            'special tokens; raise it.'
        )


def _slices(texts: Sequence[Sequence[Any]]) -> Iterator[list[Sequence[Any]]]:
    for begin in range(0, len(texts[0]), BATCH):
        yield [column[begin : begin + BATCH] for column in texts]


def _tell(arrays: Mapping[str, np.ndarray], count: int, max_length: int) -> None:
    """Log what was done to the texts that nobody asked for."""
    if truncated := int(arrays['truncated']):
        _LOG.warning(
            '%d of %d examples (%.1f %%) are longer than max_length = %d and were cut.',
            *(truncated, count, 100 * truncated / count, max_length),
        )
    if emptied := int(arrays.get('emptied', 0)):
        _LOG.warning(
            '%d of %d examples (%.1f %%) had no word left after a step of data.preprocess; they '
            'stay as they were before it.',
            *(emptied, count, 100 * emptied / count),
        )


def _encode_chain(
    texts: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_length: int,
    chain: Chain,
    prefix: str,
) -> dict[str, np.ndarray]:
    """Encode what the chain makes of the texts, with their tags where it has any."""
    if not chain:
        first, *others = texts
        given = [[prefix + text for text in first] if prefix else first, *others]
        return _encode_texts(given, tokenizer, max_length)
    columns, counts = zip(*(chain.run(column) for column in texts), strict=True)
    if prefix:
        columns = ([document.preceded(prefix) for document in columns[0]], *columns[1:])
    changed = [[document.text for document in column] for column in columns]
    tags = _TagColumn(list(zip(*columns, strict=True)), chain) if chain.inventory else None
    arrays = _encode_texts(changed, tokenizer, max_length, tags)
    return arrays | {'emptied': np.array(sum(counts))}


class _TagColumn:
    """The column of tags, made of the documents of each example in their order."""

    def __init__(self, documents: Sequence[Sequence[Document]], chain: Chain) -> None:
        self._ids = {tag: number for number, tag in enumerate(chain.inventory, 1)}
        self._documents = iter(documents)

    def __call__(self, encoding: Any) -> np.ndarray:
        """Return the tags of the next example's pieces."""
        own = next(self._documents)
        return piece_tags(encoding.offsets, encoding.sequence_ids, own, self._ids)


def _encode_texts(
    texts: Sequence[Sequence[str]],
    tokenizer: Tokenizer,
    max_length: int,
    tags: Callable[[Any], np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    columns = {name: [] for name in COLUMNS} | ({TAGS: []} if tags else {})
    lengths = []
    truncated = 0
    for part in _slices(texts):
        batch = tokenizer(
            *part,
            max_length=max_length,
            truncation='longest_first',
            padding=False,
            return_attention_mask=False,
            return_token_type_ids=True,
            verbose=False,
        )
        for name in COLUMNS:
            columns[name].extend(np.array(ids, np.int32) for ids in batch[name])
        if tags:
            columns[TAGS].extend(map(tags, batch.encodings))
        lengths += [len(ids) for ids in batch['input_ids']]
        truncated += sum(bool(encoding.overflowing) for encoding in batch.encodings)
    flat = {name: np.concatenate(column) for name, column in columns.items()}
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return flat | {'offsets': offsets, 'truncated': np.array(truncated)}


def _cache_key(
    texts: Sequence[Sequence[Any]], tokenizer: Tokenizer, max_length: int, chain: Chain
) -> str:
    digest = hashlib.sha256(f'{FORMAT} {max_length} {tokenizer_fingerprint(tokenizer)}'.encode())
    if chain:
        digest.update(chain.identity.encode())
    for part in _slices(texts):
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:32]


def _read(path: pathlib.Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    if not path.is_file():
        return None
    try:
        # numpy leaves a file that it opened itself open where it cannot read it.
        with path.open('rb') as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    # RuntimeError: a byte that says how what follows is packed, or that it is encrypted.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        _LOG.warning('The cached encoding %s is damaged (%s): encoding again.', path, error)
        return None


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    # A reader never sees a part, and of two writers the last one wins.
    with files.atomic(path) as temporary, temporary.open('wb') as file:
        np.savez(file, **arrays)
