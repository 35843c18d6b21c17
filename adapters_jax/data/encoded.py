"""One split of a data set as flat arrays, the form every later step works on.

Texts differ in length. Padding them to a rectangle fixes a batch size and a row length long before
either is known, so a split is kept ragged: all token columns are laid end to end and `offsets` says
where each example begins. Rows are formed when a batch is assembled (`batches.py`).
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64, Integer

# The token column that says which text of its example a token is of, from 0; absent where each
# example is one text.
PART = 'part'
# Columns of examples that a backbone reads in place of tokens: images, and sound.
READ = ('pixels', 'sound')
# Token columns that are computed from the others, so that they are no part of what a split is.
DERIVED = ('trunk',)
# The token column of tags, 0 for none; splits whose texts nobody has tagged are without it.
TAGS = 'tags'


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One split: N examples of ragged token columns and of one value per example.

    tokens: flat columns [offsets[-1], ...] ('input_ids', 'token_type_ids': int32, ...). They may be
        mapped from a file. Where an example is several texts, 'part' numbers them.
    offsets: int64 [N + 1]; example i owns tokens offsets[i] to offsets[i + 1].
    examples: columns [N, ...] ('label': int32 for classes, float32 for numbers; absent where
        the split is unlabelled).
    truncated: how many examples of the split were cut to the longest length allowed, as counted
        when they were encoded (a selection of examples does not know, and says 0).
    aside: token columns that no batch has, such as the word that a token stands for: what it takes
        to make predictions of the outputs.
    target: flat columns of what is to be written for each example, if anything, laid end to end as
        `target_offsets` [N + 1] says: 'target_ids' (what a decoder reads) and 'label' (what it is
        to say), int32.
    known: for columns of examples, a hexadecimal name of what is in them, so that `fingerprint`
        need not read what does not fit in memory.
    rows: int64 [N], ascending: the row of the split that each example is a part of, where a row may
        be cut into several; None where example i is row i.

    Raises ValueError where the shapes do not fit together.
    """

    tokens: dict[str, np.ndarray]
    offsets: np.ndarray
    examples: dict[str, np.ndarray]
    truncated: int = 0
    aside: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    rows: np.ndarray | None = None
    target: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    target_offsets: np.ndarray | None = None
    known: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        _check_columns(self.tokens | self.aside, self.offsets)
        if self.target:
            _check_columns(self.target, self.target_offsets)
            if len(self.target_offsets) != len(self.offsets):
                raise ValueError(
                    f'There are {len(self)} examples, but {len(self.target_offsets) - 1} texts to '
                    'be written.'
                )
        numbered = {} if self.rows is None else {'rows': self.rows}
        for name, column in (self.examples | numbered).items():
            if column.shape[:1] != (len(self),):
                raise ValueError(
                    f'Example column {name!r} has shape {column.shape}, but there are '
                    f'{len(self)} examples.'
                )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @functools.cached_property
    def lengths(self) -> Int64[np.ndarray, ' N']:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @functools.cached_property
    def sizes(self) -> Int64[np.ndarray, ' N']:
        """Places of a row that each example takes: its tokens, or those to be written for it.

        An example has the same columns for both, so that one plan lays out both sides.
        """
        if self.target_offsets is None:
            return self.lengths
        return np.maximum(self.lengths, np.diff(self.target_offsets))

    @functools.cached_property
    def texts(self) -> tuple[Int64[np.ndarray, ' P+1'], Int64[np.ndarray, ' N+1']]:
        """Where each of the P texts begins among the tokens, and each example among the texts.

        Texts do not see one another, though those of one example always share a row.
        """
        part = self.tokens.get(PART)
        if part is None:
            return self.offsets, np.arange(len(self.offsets))
        begins = np.union1d(self.offsets, np.flatnonzero(np.diff(part)) + 1)
        return begins, np.searchsorted(begins, self.offsets)

    @functools.cached_property
    def most_texts(self) -> int:
        """The most texts that an example has (K)."""
        return int(np.diff(self.texts[1]).max(initial=1))

    def select(self, indices: Integer[np.ndarray, ' M']) -> 'Encoded':
        """The examples at `indices`, in that order (an index may come several times)."""
        indices = np.asarray(indices, np.int64)
        lengths = self.lengths[indices]
        source = ranges(self.offsets[indices], lengths)
        written = {}
        if self.target_offsets is not None:
            own = np.diff(self.target_offsets)[indices]
            places = ranges(self.target_offsets[indices], own)
            columns = {name: column[places] for name, column in self.target.items()}
            written = {'target': columns, 'target_offsets': offsets_of(own)}
        return Encoded(
            **written,
            tokens={name: column[source] for name, column in self.tokens.items()},
            offsets=offsets_of(lengths),
            examples={name: column[indices] for name, column in self.examples.items()},
            aside={name: column[source] for name, column in self.aside.items()},
            rows=None if self.rows is None else self.rows[indices],
        )

    def fingerprint(self, columns: Sequence[str] | None = None) -> str:
        """A hexadecimal name of the content: equal for equal arrays, and for those only.

        columns: the token columns to name; the name then does not depend on the other ones or on
        the examples' columns. What is derived from other columns is never a part of it.
        """
        digest = hashlib.sha256()
        chosen = set(self.tokens).difference(DERIVED) if columns is None else columns
        groups = {
            'tokens': {name: self.tokens[name] for name in chosen},
            'examples': self.examples if columns is None else {},
            '': {'offsets': self.offsets},
        }
        if columns is None and self.target:
            groups['target'] = self.target | {'offsets': self.target_offsets}
        for group, members in groups.items():
            for name in sorted(members):
                column = members[name]
                digest.update(f'{group}/{name}:{column.dtype.str}:{column.shape}\n'.encode())
                known = self.known.get(name) if group == 'examples' else None
                digest.update(known.encode() if known else np.ascontiguousarray(column).data)
        return digest.hexdigest()


def _check_columns(columns: dict[str, np.ndarray], offsets: np.ndarray) -> None:
    if offsets.ndim != 1 or not offsets.size or offsets[0] or (np.diff(offsets) < 0).any():
        raise ValueError('offsets must be one ascending row of numbers that begins with 0.')
    for name, column in columns.items():
        if column.shape[:1] != (offsets[-1],):
            raise ValueError(
                f'Token column {name!r} has shape {column.shape}, but the offsets end at '
                f'{offsets[-1]}.'
            )


def offsets_of(lengths: Integer[np.ndarray, ' N']) -> Int64[np.ndarray, ' N+1']:
    """Where each of N pieces begins that lie end to end, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def tokens_on_end(parts: Sequence[Encoded]) -> dict[str, np.ndarray]:
    """The token columns of several sets, one set after another.

    Where some sets have tags and others have none, these words have the tag 0.
    """
    names = dict.fromkeys(name for part in parts for name in part.tokens)
    untagged = [{TAGS: np.zeros(part.offsets[-1], np.int32)} for part in parts]
    columns = [own | part.tokens for own, part in zip(untagged, parts, strict=True)]
    return {name: np.concatenate([own[name] for own in columns]) for name in names}


def ranges(
    starts: Integer[np.ndarray, ' M'], lengths: Integer[np.ndarray, ' M']
) -> Int64[np.ndarray, ' L']:
    """starts[0], starts[0] + 1, ... (lengths[0] numbers), then the same for starts[1], ..."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if ends.size else 0) + np.repeat(starts - (ends - lengths), lengths)
