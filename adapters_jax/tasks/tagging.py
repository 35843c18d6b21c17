"""A tag for each word of a sentence: parts of speech, or spans such as named entities.

A word is judged at its first piece. Spans are learned in the form that `schemes.LEARNED` gives to
the scheme of the data, and predicted in the scheme of the data again.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Array, Float, Float32, Int32, Int64
from seqeval.scheme import IOB2, IOBES, Entities

from adapters_jax.data import schemes, tagged, words
from adapters_jax.data.encoded import Encoded
from adapters_jax.lazy import Functions
from adapters_jax.tasks.classes import checked_labels, cross_entropy_sum, listed
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Column, Encoding, Objects, Rows, Task

sklearn_metrics, seqeval = Functions('sklearn.metrics'), Functions('seqeval.metrics.v1')
STRICT = {'bio': IOB2, 'iobes': IOBES}
OF_SPANS = ('f1', 'precision', 'recall')
MAX_TABLE = 20  # types or tags that a terminal shows

_LOG = logging.getLogger(__name__)

Tags = list[list[str]]


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tagging(Task):
    """Choose one of `labels` for each word.

    Metrics are `accuracy` over words and, of spans, micro-averaged `f1`, `precision` and `recall`:
    a span counts where its type and both its ends are right, and its tags are well-formed (seqeval,
    strict).

    Attributes:
        labels: the tags; the order gives their ids.
        scheme: how the labels write spans: 'bio' or 'iobes'; 'none' where they are no spans; empty
            means the one that they have.
        written: the scheme of the data, in which tags are predicted where rows have none; empty
            means that of the labels.

    Raises:
        ValueError: fewer than two labels, one named twice or of another scheme, an unknown scheme,
            or a metric of spans where there are none.
    """

    name: ClassVar[str] = 'tagging'
    per_token: ClassVar[bool] = True
    smooths: ClassVar[bool] = True
    labels_in: ClassVar[Mapping[str, Column]] = {'label': Column('token', np.int32, -1)}
    known_metrics: ClassVar[tuple[str, ...]] = (*OF_SPANS, 'accuracy')

    labels: tuple[str, ...]
    scheme: str = ''
    written: str = ''

    def __post_init__(self) -> None:
        labels = checked_labels(self.labels, self.name)
        self._set(labels=labels, scheme=self.scheme or schemes.of_labels(labels))
        super().__post_init__()
        if self.scheme not in (schemes.NONE, *STRICT):
            raise ValueError(
                f'the scheme is {self.scheme!r}; expected one of {schemes.NONE}, '
                f'{", ".join(STRICT)}'
            )
        if self.written and self.written not in schemes.SCHEMES:
            raise ValueError(
                f'tags are to be written in the scheme {self.written!r}; expected one of '
                f'{", ".join(schemes.SCHEMES)}'
            )
        if self.scheme == schemes.NONE:
            self._check_no_spans()
        else:
            self._check_spans()

    def _check_no_spans(self) -> None:
        wrong = [metric for metric in self.metric_names if metric in OF_SPANS]
        if wrong:
            raise ValueError(
                f'{", ".join(wrong)} are metrics of spans, but the tags ({listed(self.labels)}) '
                'are none of a scheme; report accuracy'
            )

    def _check_spans(self) -> None:
        types = {span.type for tag in self.labels for span in schemes.spans([tag])}
        wrong = [tag for tag in self.labels if tag not in schemes.labels(types, self.scheme)]
        if wrong:
            raise ValueError(
                f'the labels {listed(wrong)} are not of the scheme {self.scheme!r}; correct them, '
                f'or set task.scheme={schemes.NONE!r} to take tags as they are'
            )

    @property
    def default_metrics(self) -> tuple[str, ...]:
        """What is reported unless the config names it."""
        return ('accuracy',) if self.scheme == schemes.NONE else self.known_metrics

    @property
    def num_outputs(self) -> int:
        """The number of tags."""
        return len(self.labels)

    @property
    def predicted_labels(self) -> tuple[str, ...]:
        """All tags that predictions may have where rows say nothing of a scheme."""
        if not self.written or self.written == self.scheme:
            return self.labels
        types = {span.type for tag in self.labels for span in schemes.spans([tag])}
        return tuple(schemes.labels(types, self.written))

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.tagged`."""
        return tagged.load(data)

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return the labels and their scheme: as given, else as the training rows have them.

        Of spans the labels are all that a span of a type in these rows may have.

        Raises:
            ValueError: a scheme is given, and the training tags are of none; or none is given, and
                only some tags are those of spans.
        """
        labels, scheme = tuple(given['labels']), given['scheme']
        if train is None:
            return {'labels': labels}
        found = train['scheme'][0]
        if found == schemes.NONE and scheme not in ('', schemes.NONE):
            raise ValueError(
                f'task.scheme is {scheme!r}, but the tags of the training data are of no scheme '
                f'such as B-TYPE, I-TYPE, O; leave it empty, or set it to {schemes.NONE!r}'
            )
        if found == schemes.NONE and not scheme:
            _refuse_strays(train)
        scheme = scheme or schemes.LEARNED[found]
        different = {tag for tags in train['tags'][:] for tag in tags} - {schemes.UNKNOWN}
        if scheme in STRICT and not labels:
            types = {span.type for tag in different for span in schemes.spans([tag])}
            labels = tuple(schemes.labels(types, scheme))
        written = found if schemes.NONE not in (found, scheme) else ''
        return {
            'labels': labels or tuple(sorted(different)),
            'scheme': scheme,
            'written': written,
        }

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn sentences into tokens, longer ones in windows, and tags into numbers."""
        encoded = words.encode(
            rows['tokens'][:],
            encoding.tokenizer,
            encoding.max_length,
            encoding.cache_dir,
            encoding.positions,
        )
        if 'tags' not in rows.column_names:
            return encoded
        ids, word = self._ids(rows), encoded.aside['word']
        starts = np.cumsum([0, *map(len, rows['tags'][:])])[:-1]
        place = starts[np.repeat(encoded.rows, encoded.lengths)] + word
        label = np.where(word >= 0, ids[place], -1).astype(np.int32)
        return dataclasses.replace(encoded, tokens=encoded.tokens | {'label': label})

    def _ids(self, rows: Rows) -> Int32[np.ndarray, ' W']:
        """Return the number of each word's tag, over all sentences; -1 where it is not known."""
        source = _scheme_of(rows, self.scheme)
        numbers = {tag: number for number, tag in enumerate(self.labels)} | {schemes.UNKNOWN: -1}
        found = [schemes.convert(tags, source, self.scheme) for tags in rows['tags'][:]]
        unseen = Counter(tag for tags in found for tag in tags if tag not in numbers)
        if unseen:
            raise ValueError(_unseen(rows, found, unseen, self.labels))
        if schemes.NONE not in (source, self.scheme):
            _tell_flaws(rows, source)
        return np.array([numbers[tag] for tags in found for tag in tags], np.int32)

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the objects' words, which they have under `tokens`."""
        for number, given in zip(lines, objects, strict=True):
            tagged.check_words(given.get('tokens'), f'input line {number}')
        return tagged.rows([given['tokens'] for given in objects])

    def loss(
        self,
        outputs: Float[Array, 'B T C'],
        batch: Mapping[str, Array],
        label_smoothing: float | Float[Array, ''] = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the cross-entropies (nats) of the words with a tag, and their count.

        Args:
            outputs: logits.
            batch: has `label`, int32 [B, T], -1 for tokens that stand for no word, and `segments`,
                int32 [B, T], 0 on padding.
            label_smoothing: share of the target spread evenly over all tags, 0 to 1.

        Raises:
            ValueError: a label smoothing outside 0 to 1.
        """
        label = batch['label']
        scored = (label >= 0) & (batch['segments'] > 0)
        return cross_entropy_sum(outputs, label.clip(0), scored, label_smoothing)

    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        gold, predicted = self._scored(outputs, encoded)
        flat = [[tag for tags in side for tag in tags] for side in (gold, predicted)]
        found = {'accuracy': sklearn_metrics.accuracy_score(*flat)}
        if self.scheme in STRICT:
            precision, recall, f1, _ = seqeval.precision_recall_fscore_support(
                gold, predicted, average='micro', scheme=STRICT[self.scheme], zero_division=0
            )
            found |= {'precision': precision, 'recall': recall, 'f1': f1}
        return {name: float(found[name]) for name in self.metric_names}

    def _scored(self, outputs: np.ndarray, encoded: Encoded) -> tuple[Tags, Tags]:
        """Return the tags of all words that have one, sentence by sentence: true and predicted."""
        place, row = _words(encoded)
        labels = encoded.tokens['label'][place]
        known = labels >= 0
        if not known.any():
            raise ValueError('metrics need at least one word with a tag, but the split has none')
        count = int(row[-1]) + 1
        gold = self._sentences(labels[known], row[known], count)
        return gold, self._sentences(outputs[place[known]].argmax(-1), row[known], count)

    def _sentences(self, ids: np.ndarray, row: np.ndarray, count: int) -> Tags:
        """Return the tags of words as lists, one for each of `count` rows."""
        names = np.array(self.labels, object)[ids]
        ends = np.cumsum(np.bincount(row, minlength=count))
        return [part.tolist() for part in np.split(names, ends[:-1])]

    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        """Give a list of tags, in the scheme of the rows, under `prediction`."""
        place, row = _words(encoded)
        target = _scheme_of(rows, self.written or self.scheme)
        found = self._sentences(outputs[place].argmax(-1), row, len(rows))
        if target != self.scheme:  # else they are as they were scored, well-formed or not
            found = [schemes.respelt(tags, self.scheme, target) for tags in found]
        return [{'prediction': tags} for tags in found]

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the words, and the tags as `gold`."""
        return {'tokens': row['tokens']} | ({'gold': row['tags']} if 'tags' in row else {})

    def native_files(self, rows: Rows, predicted: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Return a CoNLL file's text with the predicted tags in the place of its own."""
        if 'frame' not in rows.column_names:
            return {}
        text = []
        for (first, *frame), one in zip(rows['frame'][:], predicted, strict=True):
            text.append(first)
            text += [tag + after for tag, after in zip(one['prediction'], frame, strict=True)]
        return {tagged.suffix(rows): ''.join(text)}

    def details(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, Any]:
        """Return precision, recall, F1 and the number of each type of spans, or of each tag."""
        gold, predicted = self._scored(outputs, encoded)
        if self.scheme in STRICT:
            return {'types': _of_types(gold, predicted, self.scheme)}
        flat = [[tag for tags in side for tag in tags] for side in (gold, predicted)]
        names = sorted(set(flat[0]) | set(flat[1]))
        scores = sklearn_metrics.precision_recall_fscore_support(
            *flat, labels=names, zero_division=0.0
        )
        return {'types': _table(names, scores)}

    def details_text(self, details: Mapping[str, Any]) -> str:
        """Render the commonest types for a terminal."""
        common = sorted(details['types'].items(), key=lambda item: -item[1]['count'])[:MAX_TABLE]
        width = max((len(name) for name, _ in common), default=0)
        lines = [f'{"":<{width}}  precision  recall      f1   count']
        for name, row in common:
            scores = f'{row["precision"]:9.4f}  {row["recall"]:6.4f}  {row["f1"]:6.4f}'
            lines.append(f'{name:<{width}}  {scores}  {row["count"]:6,}')
        return '\n'.join(lines)


def _scheme_of(rows: Rows, otherwise: str) -> str:
    """Return the scheme of the tags that rows have, or are to be given.

    Tags without a span, as stand in for those that are kept secret, say nothing of it.
    """
    if 'scheme' not in rows.column_names:
        return otherwise
    outside = {schemes.OUTSIDE, schemes.UNKNOWN}
    told = any(not outside.issuperset(tags) for tags in rows['tags'])
    return rows['scheme'][0] if told else otherwise


def _refuse_strays(rows: Rows) -> None:
    """Refuse tags of no scheme among tags of spans: a typing error, or a header read as a word.

    Raises:
        ValueError: the first of them, and where it stands.
    """
    strays = schemes.strays(rows['tags'][:])
    if strays:
        sentence, word = strays[0]
        row = rows[sentence]
        raise ValueError(
            f'{tagged.place(row, word)}: the tag {row["tags"][word]!r} is of no scheme such as '
            'B-TYPE, I-TYPE, O, and others are; mend it, or set '
            f'task.scheme={schemes.NONE!r} to take tags as they are'
        )


def _words(encoded: Encoded) -> tuple[Int64[np.ndarray, ' W'], Int64[np.ndarray, ' W']]:
    """Return for each word, in order, the token that stands for it and its row."""
    place = np.flatnonzero(encoded.aside['word'] >= 0)
    return place, np.repeat(encoded.rows, encoded.lengths)[place]


def _unseen(rows: Rows, found: Tags, unseen: Counter, labels: Sequence[str]) -> str:
    """Say which tags are unknown, and where the first one stands."""
    sentence, word = next(
        (i, j) for i, tags in enumerate(found) for j, tag in enumerate(tags) if tag in unseen
    )
    shown = ', '.join(f'{tag!r} ({n} times)' for tag, n in unseen.most_common(5))
    more = f' and {len(unseen) - 5} more' if len(unseen) > 5 else ''
    return (
        f'unseen tags {shown}{more}, the first in {tagged.place(rows[sentence], word)}; known: '
        f'{listed(labels)}. Correct them, or name all tags in task.labels'
    )


def _tell_flaws(rows: Rows, scheme: str) -> None:
    flaws = schemes.flaws(rows['tags'][:], scheme)
    if flaws:
        sentence, word = flaws[0]
        row = rows[sentence]
        _LOG.warning(
            '%d tags are not what %s would write, the first of them %r in %s: spans are taken to '
            'begin there.',
            *(len(flaws), scheme, row['tags'][word], tagged.place(row, word)),
        )


def _of_types(gold: Tags, predicted: Tags, scheme: str) -> dict[str, dict[str, float]]:
    """Return the scores of each type of spans that there is."""
    strict = STRICT[scheme]
    names = Entities(gold, strict).unique_tags | Entities(predicted, strict).unique_tags
    scores = seqeval.precision_recall_fscore_support(
        gold, predicted, scheme=strict, zero_division=0
    )
    return _table(sorted(names), scores)


def _table(names: Sequence[str], scores: Any) -> dict[str, dict[str, float]]:
    """Return (precision, recall, f1, count), each an array over the names, by name."""
    columns = zip(*scores, strict=True)
    return {
        name: {'precision': float(p), 'recall': float(r), 'f1': float(f), 'count': int(n)}
        for name, (p, r, f, n) in zip(names, columns, strict=True)
    }
