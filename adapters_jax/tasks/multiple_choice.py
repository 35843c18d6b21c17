"""One of the K candidates that come with each question: texts to be scored against one another.

Each candidate is encoded with its question as a text of its own, and the texts of a question are
one example, which no batch tears apart (`Encoded.texts`). The head gives a score for each text; a
softmax over the scores of a question's candidates gives their probabilities. Questions may have
different numbers of them.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from adapters_jax.data import sources, tokenize
from adapters_jax.data.choices import LABELS, Choices
from adapters_jax.data.encoded import PART, Encoded
from adapters_jax.lazy import Functions
from adapters_jax.tasks.losses import check_smoothing, masked_sum
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Column, Encoding, Objects, Rows, Task

METRICS: dict[str, Callable[..., float]] = {'accuracy': Functions('sklearn.metrics').accuracy_score}
LEAST = float(np.finfo(np.float32).min)  # the score of a candidate that is not there


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MultipleChoice(Task):
    """Choose one of a row's own candidates."""

    name: ClassVar[str] = 'multiple_choice'
    several_texts: ClassVar[bool] = True
    labels_in: ClassVar[Mapping[str, Column]] = {'label': Column('example', np.int32)}
    smooths: ClassVar[bool] = True
    known_metrics: ClassVar[Mapping[str, Callable[..., float]]] = METRICS
    default_metrics: ClassVar[tuple[str, ...]] = ('accuracy',)

    @property
    def num_outputs(self) -> int:
        """One score for each candidate."""
        return 1

    def width(self, encoded: Encoded) -> int:
        """Return the most candidates that a question of the split has (K)."""
        return encoded.most_texts

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.choices`."""
        return sources.read(data, Choices.of(data))

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn each candidate, behind its question, into tokens; longer texts are cut."""
        choices = rows['choices'][:]
        counts = [len(own) for own in choices]
        texts = tokenize.encode(
            _texts(rows, choices),
            encoding.tokenizer,
            encoding.max_length,
            cache_dir=encoding.cache_dir,
            positions=encoding.positions,
        )
        ends = np.cumsum([0, *counts])
        number = np.arange(ends[-1]) - np.repeat(ends[:-1], counts)
        part = np.repeat(number, texts.lengths).astype(np.int32)
        labels = {}
        if 'label' in rows.column_names:
            labels['label'] = np.asarray(rows['label'][:], np.int32)
        tokens = texts.tokens | {PART: part}
        return Encoded(tokens, texts.offsets[ends], labels, texts.truncated)

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the objects' texts and candidates, under any names that a table may have."""
        form, lines = Choices.of({}), list(lines)
        names = list(dict.fromkeys(name for given in objects for name in given))
        try:
            # Labels, of which there may be several, decide nothing here.
            found = form.choose(
                [x for x in names if x.casefold() not in LABELS], False, 'the input'
            )
        except ValueError as error:
            raise ValueError(
                f'the input has the fields {", ".join(names)}; expected "choices" (a list), or '
                '"choice0", "choice1" and so on, and what they belong to: "context", or "context" '
                'and "question"'
            ) from error
        if pair is not None and pair != ('text_b' in found):
            raise ValueError(
                f'the input has the fields {", ".join(names)}; the adapter was trained '
                f'{"with" if pair else "without"} a question beside the text'
            )
        values = {key: [given.get(name) for given in objects] for key, name in found.items()}
        return form.build(values, False, lambda i: f'input line {lines[i]}')

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return texts and candidates, and the right one's text as `gold`."""
        texts = {key: row[key] for key in ('text_a', 'text_b', 'choices') if key in row}
        return texts | ({'gold': row['choices'][row['label']]} if 'label' in row else {})

    def batch_shapes(self, rows: int, length: int, texts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of a batch of questions with two candidates each."""
        starts = jax.ShapeDtypeStruct((rows, 2 * texts), jnp.int32)
        return super().batch_shapes(rows, length, texts) | {'starts': starts}

    def reduced(
        self, outputs: Float[Array, 'B SK 1'], batch: Mapping[str, Array]
    ) -> Float32[Array, 'B S K']:
        """Return each question's scores side by side; what has no candidate has the least score."""
        places = jnp.arange(1, outputs.shape[1] + 1).reshape(1, 1, -1)
        there = (batch['segments'][:, :, None] == places).any(1)
        scores = jnp.where(there, outputs[..., 0].astype(jnp.float32), LEAST)
        return scores.reshape(len(scores), batch['example_mask'].shape[1], -1)

    def loss(
        self,
        outputs: Float[Array, 'B SK 1'],
        batch: Mapping[str, Array],
        label_smoothing: float | Float[Array, ''] = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the cross-entropies (nats) of the real questions, and their count.

        Args:
            outputs: scores of the S x K texts of each row.
            batch: has `label`, int32 [B, S], `example_mask`, bool [B, S], and `segments`.
            label_smoothing: share of the target spread evenly over a question's candidates.

        Raises:
            ValueError: a label smoothing outside 0 to 1.
        """
        check_smoothing(label_smoothing)

        def cross_entropy(
            scores: Float32[Array, 'B S K'], labels: Int[Array, 'B S']
        ) -> Float32[Array, 'B S']:
            there = scores != LEAST
            log_p = jnp.where(there, jax.nn.log_softmax(scores), 0.0)
            of_label = jnp.take_along_axis(log_p, labels[..., None], axis=-1)[..., 0]
            mean = log_p.sum(-1) / jnp.maximum(there.sum(-1), 1)
            return -(1 - label_smoothing) * of_label - label_smoothing * mean

        scores = self.reduced(outputs, batch)
        return masked_sum(cross_entropy, scores, batch['label'], batch['example_mask'])

    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        labels, predicted = encoded.examples['label'], outputs.argmax(-1)
        return {name: float(METRICS[name](labels, predicted)) for name in self.metric_names}

    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        """Give the chosen text, its number from 0, and the scores of all candidates."""
        return [
            {'prediction': own[index], 'index': index, 'scores': scores[: len(own)]}
            for own, index, scores in zip(
                rows['choices'], outputs.argmax(-1).tolist(), outputs.tolist(), strict=True
            )
        ]


def _texts(rows: Rows, choices: list[list[str]]) -> datasets.Dataset:
    """Return a pair for each candidate: what it belongs to, and the question with the candidate."""
    asked = rows['text_b'][:] if 'text_b' in rows.column_names else [''] * len(rows)
    pairs = [
        (text, f'{question} {choice}'.strip())
        for text, question, own in zip(rows['text_a'], asked, choices, strict=True)
        for choice in own
    ]
    return datasets.Dataset.from_dict(
        {'text_a': [a for a, _ in pairs], 'text_b': [b for _, b in pairs]}
    )
