"""Extractive question answering: the part of a text that answers a question, or that none does."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from adapters_jax.data import contexts, squad
from adapters_jax.data.encoded import Encoded
from adapters_jax.tasks import spans, squad_metrics
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.spans import Reading
from adapters_jax.tasks.task import Column, Encoding, Objects, Rows, Task
from adapters_jax.tasks.texts import check_texts

Judged = tuple[list[str], list[list[str]], np.ndarray]
NONE, TUNED = 'none', 'tuned'
_ONE_KIND = ('f1', 'exact')  # what is reported where all questions have an answer
_TWO_KINDS = ('HasAns_f1', 'HasAns_exact', 'NoAns_exact', 'best_f1', 'best_exact')
_AT_LEAST = {'stride': 0, 'question_length': 1, 'answer_length': 1, 'n_best': 1}


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """Choose the first and the last token of the answer, or [CLS] for both where there is none.

    Metrics are those of `squad_metrics.evaluate` by its names, as shares of 1.

    Attributes:
        stride: tokens that two windows of a long context share.
        question_length: the most tokens of a question; more are cut.
        answer_length: the most tokens of a predicted answer.
        n_best: how many answers are listed.
        token_types: whether token types tell the context from the question; an adapter of PEFT's
            was trained without.
        threshold: there is no answer where that scores better than the best one by more than this:
            a number, 'none' where each question has an answer, or 'tuned': by the split that is
            scored; `tuned` makes a number of it.

    Raises:
        ValueError: a number out of its range, a threshold that is none, or token_types that are
            neither True nor False.
    """

    name: ClassVar[str] = 'question_answering'
    per_token: ClassVar[bool] = True
    # Places in the example: of the answer's ends, and of the context's.
    labels_in: ClassVar[Mapping[str, Column]] = {
        name: Column('example', np.int32) for name in ('start', 'end', 'first', 'last')
    }
    known_metrics: ClassVar[tuple[str, ...]] = (
        *(*_ONE_KIND, *_TWO_KINDS, 'NoAns_f1', 'best_f1_thresh', 'best_exact_thresh'),
    )
    default_metrics: ClassVar[tuple[str, ...]] = _ONE_KIND

    stride: int = 128
    question_length: int = 64
    answer_length: int = 30
    n_best: int = 20
    token_types: bool = True
    threshold: float | str = NONE

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in _AT_LEAST.items():
            value = getattr(self, key)
            if type(value) is not int or value < least:
                raise ValueError(f'task.{key} is {value!r}; expected a whole number from {least}')
        if not isinstance(self.token_types, bool):
            raise ValueError(f'task.token_types is {self.token_types!r}; expected True or False')
        number = isinstance(self.threshold, int | float) and math.isfinite(self.threshold)
        if self.threshold not in (NONE, TUNED) and not number:
            raise ValueError(
                f'the threshold is {self.threshold!r}; expected a number, {NONE!r} or {TUNED!r}'
            )

    @property
    def num_outputs(self) -> int:
        """The logits of being the first and the last token of the answer."""
        return 2

    @property
    def _limit(self) -> float:
        """The odds beyond which there is no answer; 0 as long as nothing is tuned."""
        return {NONE: math.inf, TUNED: 0.0}.get(self.threshold, self.threshold)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.squad`."""
        return squad.read(data)

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return the settings; whether there are questions without answer, the data decide."""
        fields: dict[str, Any] = {key: given[key] for key in (*_AT_LEAST, 'token_types')}
        unanswered = train is not None and not all(train['answers'][:])
        threshold = given['threshold']
        if threshold == 'auto':
            threshold = TUNED if unanswered else NONE
        fields['threshold'] = threshold if threshold in (NONE, TUNED) else _number(threshold)
        if not given['metrics'] and fields['threshold'] != NONE:
            fields['metric_names'] = (*_ONE_KIND, *_TWO_KINDS)
        return fields

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Cut contexts into windows, each with its question; see `data.contexts`."""
        sizes = encoding.max_length, self.stride, self.question_length
        shape = contexts.Shape(*sizes, types=self.token_types)
        return contexts.encode(
            rows, encoding.tokenizer, shape, encoding.positions, encoding.cache_dir
        )

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the objects' questions and contexts, under their lines' numbers."""
        lines, names = list(lines), ('question', 'context')
        check_texts(objects, lines, names, '"question" and "context"')
        columns = {name: [given[name] for given in objects] for name in names}
        return datasets.Dataset.from_dict({'id': [str(line) for line in lines], **columns})

    def loss(
        self,
        outputs: Float[Array, 'B T 2'],
        batch: Mapping[str, Array],
        label_smoothing: float = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum over the real examples of their loss, and their count.

        It is the mean of two cross-entropies (nats), of the answer's first and of its last token
        among [CLS] and those of the example's own context.

        Args:
            outputs: logits.
            batch: has `segments`, int32 [B, T], and, [B, S], `starts`, `example_mask` and those of
                `labels_in`.
            label_smoothing: must be 0: an answer has no neighbours that are half right.

        Raises:
            ValueError: another label smoothing.
        """
        if not isinstance(label_smoothing, int | float) or label_smoothing != 0:
            raise ValueError(
                f'training.label_smoothing is {label_smoothing}; question answering takes 0 only'
            )
        mask, starts = batch['example_mask'], batch['starts']
        open_ = candidates(batch)
        # What belongs to no example may be no number, which would come back through the gradient.
        used = open_.any(1)
        logits = jnp.where(used[..., None], outputs.astype(jnp.float32), 0.0)
        total = jnp.zeros((), jnp.float32)
        for end, name in enumerate(('start', 'end')):
            own = jnp.where(open_, logits[:, None, :, end], -jnp.inf)
            # An empty place has no candidates; its loss is thrown away, but must be a number.
            own = jnp.where(mask[..., None], own, 0.0)
            place = jnp.where(mask, starts + batch[name], 0)
            chosen = jnp.take_along_axis(own, place[..., None], axis=-1)[..., 0]
            losses = jax.nn.logsumexp(own, axis=-1) - chosen
            total += jnp.where(mask, losses, 0.0).sum() / 2
        return total, mask.sum(dtype=jnp.float32)

    def _readings(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[Reading]:
        given = rows['context'][:], self.n_best, self.answer_length
        return list(spans.read(outputs, encoded, *given))

    def _judged(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> Judged:
        """Return the best answers, the right ones, and the odds that there is none."""
        readings = self._readings(outputs, encoded, rows)
        texts = [
            context[slice(*reading.spans[0][:2])] if reading.spans else ''
            for context, reading in zip(rows['context'][:], readings, strict=True)
        ]
        return texts, rows['answers'][:], np.array([reading.odds for reading in readings])

    def tuned(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> 'QuestionAnswering':
        """Return the task with the threshold that suits a scored split best, where it is open."""
        if self.threshold != TUNED:
            return self
        return dataclasses.replace(self, threshold=self._tune(self._judged(outputs, encoded, rows)))

    def _tune(self, judged: Judged) -> float:
        return squad_metrics.tune(*judged, 'exact' if 'exact' in self.primary else 'f1')

    def _official(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        judged = self._judged(outputs, encoded, rows)
        limit = self._tune(judged) if self.threshold == TUNED else self._limit
        return squad_metrics.evaluate(*judged, limit)

    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        found = self._official(outputs, encoded, rows)
        # Without a question of a kind there is nothing to be right about: 0, as elsewhere.
        return {
            name: found.get(name, 0.0) / (1 if name.endswith('thresh') else 100)
            for name in self.metric_names
        }

    def details(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, Any]:
        """Return what the official script prints, in per cent, and the threshold."""
        return {
            'official': self._official(outputs, encoded, rows),
            'threshold': self.threshold,
        }

    def details_text(self, details: Mapping[str, Any]) -> str:
        """Render the counts of both kinds of questions, and the threshold."""
        found = details['official']
        kinds = {'HasAns': 'with an answer', 'NoAns': 'without'}
        shown = [
            f'  {found[f"{kind}_total"]:,} questions {what}: {found[f"{kind}_exact"]:.2f} % exact, '
            f'F1 {found[f"{kind}_f1"]:.2f} %'
            for kind, what in kinds.items()
            if f'{kind}_total' in found
        ]
        if self.threshold != NONE:
            shown.append(f'  no answer where its odds exceed {details["threshold"]:.4g}')
        return '\n'.join(shown)

    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        readings = self._readings(outputs, encoded, rows)
        return [
            self._told(reading, context)
            for reading, context in zip(readings, rows['context'][:], strict=True)
        ]

    def _told(self, reading: Reading, context: str) -> dict[str, Any]:
        """Return one question's answer, its place and its share among the best ones."""
        listed = list(reading.spans)
        if self.threshold != NONE or not listed:
            listed = sorted([*listed, reading.none], key=lambda span: -span.score)[: self.n_best]
        silent = not reading.spans or reading.odds > self._limit
        chosen = reading.none if silent else reading.spans[0]
        if chosen not in listed:  # by the threshold it may be none of the best ones
            listed[-1] = chosen
        best = spans.described(listed, context)
        answer = best[listed.index(chosen)]
        told = {'prediction': answer['text'], **{k: answer[k] for k in ('start', 'end', 'score')}}
        odds = {} if self.threshold == NONE else {'null_odds': reading.odds}
        return {**told, **odds, 'n_best': best}

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the question with its context and, where they are known, its answers."""
        own = {key: row[key] for key in ('id', 'question', 'context')}
        return own | ({'gold': row['answers']} if 'answers' in row else {})

    def native_files(self, rows: Rows, predicted: Sequence[dict[str, Any]]) -> dict[str, str]:
        """Return the files of the official script: answers by question, and the best of each."""
        named = list(zip(rows['id'][:], predicted, strict=True))
        best = {key: [_official_entry(one) for one in told['n_best']] for key, told in named}
        texts = {'.json': {key: told['prediction'] for key, told in named}, '.nbest.json': best}
        if self.threshold != NONE:
            texts['.null_odds.json'] = {key: told['null_odds'] for key, told in named}
        return {end: json.dumps(v, ensure_ascii=False, indent=1) + '\n' for end, v in texts.items()}


def candidates(batch: Mapping[str, Array]) -> Bool[Array, 'B S T']:
    """Return the tokens at which the answer of each real example of a batch may begin or end."""
    starts, tokens = batch['starts'][..., None], batch['segments'].shape[1]
    number = jnp.arange(1, starts.shape[1] + 1)[None, :, None]
    place = jnp.arange(tokens)[None, None, :] - starts
    context = (place >= batch['first'][..., None]) & (place <= batch['last'][..., None])
    own = (batch['segments'][:, None, :] == number) & batch['example_mask'][..., None]
    return own & ((place == 0) | context)


def _number(threshold: str) -> float:
    try:
        return float(threshold)
    except ValueError:
        raise ValueError(
            f"task.threshold is {threshold!r}; expected a number, 'auto', {NONE!r} or {TUNED!r}"
        ) from None


def _official_entry(one: Mapping[str, Any]) -> dict[str, Any]:
    logits = {key: one[key] for key in ('start_logit', 'end_logit')}
    return {'text': one['text'], 'probability': one['score'], **logits}
