"""The words that are missing from a text: what language adapters are trained on, without labels.

Words are hidden when a batch is assembled (`data.masking`), others in each epoch. The head scores
every word of the vocabulary in the hidden places alone, and no such scores leave the device: an
evaluation needs two numbers of each place, a prediction its likeliest words.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from adapters_jax.data import columns, corpus, sources, tokenize
from adapters_jax.data.batches import Batch
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.masking import Masking, reveal
from adapters_jax.data.tokenize import Tokenizer
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.models.heads import VOCABULARY, HeadConfig
from adapters_jax.tasks.losses import masked_sum, refuse_smoothing
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Column, Encoding, Objects, Rows, Task

# Of the mean cross-entropy in nats and the share of words that were found.
METRICS: dict[str, Callable[[float, float], float]] = {
    'perplexity': lambda nll, accuracy: math.exp(min(nll, 700.0)),
    'accuracy': lambda nll, accuracy: accuracy,
    'nll': lambda nll, accuracy: nll,
}
TOP = 5  # words that a prediction gives for each missing one
SPELLING = '[MASK]'  # of a missing word in what is to be predicted, whatever the tokenizer's is


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(Task):
    """Find the words that are hidden from a text.

    Attributes:
        mask_rate: the share of a text's tokens that are hidden, above 0 and below 1.
        whole_words: whether all tokens of a word are hidden or none is.
        vocabulary, mask_id, mask_token: the tokenizer's; see `fitted`.
        top: how many words a prediction gives for each missing one; 0 where the task evaluates.

    Raises:
        ValueError: a rate out of its range.
    """

    name: ClassVar[str] = 'masked_lm'
    per_token: ClassVar[bool] = True
    draws: ClassVar[bool] = True
    labels_in: ClassVar[Mapping[str, Column]] = {}
    known_metrics: ClassVar[Mapping[str, Callable[..., float]]] = METRICS
    default_metrics: ClassVar[tuple[str, ...]] = ('perplexity', 'accuracy', 'nll')
    lower_is_better: ClassVar[frozenset[str]] = frozenset({'perplexity', 'nll'})

    mask_rate: float = 0.15
    whole_words: bool = False
    vocabulary: int = 0
    mask_id: int = 0
    mask_token: str = SPELLING
    top: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mask_rate < 1:
            raise ValueError(
                f'mask_rate is {self.mask_rate}; expected a share of the words between 0 and 1'
            )

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return how words are hidden."""
        return {'mask_rate': given['mask_rate'], 'whole_words': given['whole_words']}

    def fitted(self, config: BackboneConfig, directory: Path | None) -> Self:
        """Return the task for a backbone's vocabulary and mask token.

        Raises:
            ValueError: the tokenizer has no mask token.
        """
        vocabulary = config.vocabulary
        if directory is None:
            return dataclasses.replace(self, vocabulary=vocabulary)
        own = tokenize.load_tokenizer(directory)
        if own.mask_token is None:
            raise ValueError(
                'the tokenizer of the backbone has no mask token, which a masked language model '
                'needs; choose a backbone that was pretrained as one, such as BERT or RoBERTa'
            )
        return dataclasses.replace(
            self, vocabulary=vocabulary, mask_id=own.mask_token_id, mask_token=own.mask_token
        )

    def predicting(self) -> Self:
        """Return the task that fills in what is missing from texts."""
        return dataclasses.replace(self, top=TOP)

    @property
    def num_outputs(self) -> int:
        """One logit for each word."""
        return self.vocabulary

    def width(self, encoded: Encoded) -> int:
        """Return the numbers of each token: see `reduced`."""
        return 2 * self.top or 3

    @property
    def masking(self) -> Masking:
        """How words are hidden."""
        return Masking(self.mask_rate, self.whole_words, self.mask_id, self.vocabulary)

    def head(self, config: HeadConfig) -> HeadConfig:
        """Return the head over the vocabulary."""
        return dataclasses.replace(config, pooling=VOCABULARY, layers=1)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.corpus`."""
        return sources.read(data, corpus.Corpus.of(data))

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn texts into tokens; longer ones become several examples."""
        return corpus.encode(
            rows['text_a'][:],
            encoding.tokenizer,
            encoding.max_length,
            encoding.cache_dir,
            encoding.positions,
        )

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the objects' texts, each of which has a `[MASK]` or the tokenizer's own."""
        texts = []
        for number, given in zip(lines, objects, strict=True):
            text = given.get('text')
            spelt = text.replace(SPELLING, self.mask_token) if isinstance(text, str) else ''
            if self.mask_token not in spelt:
                raise ValueError(
                    f'input line {number} has the text {text!r}; expected one under "text" with '
                    f'{SPELLING} where a word is missing'
                )
            columns.check_encodable(spelt, f'input line {number}: the text')
            texts.append(spelt)
        return datasets.Dataset.from_dict({'text_a': texts})

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the text."""
        return {'text': row['text_a']}

    def batch_shapes(self, rows: int, length: int, texts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of the hidden places' columns."""
        places = rows, self.masking.places(length, texts)
        kinds = {'masked': jnp.int32, 'label': jnp.int32, 'chosen': bool}
        return {name: jax.ShapeDtypeStruct(places, kind) for name, kind in kinds.items()}

    def transform(self, batch: Batch, seed: int = 0, epoch: int | None = None) -> Batch:
        """Hide words from a batch, or find those that are missing from it already."""
        if self.top:
            return reveal(batch, self.mask_id)
        return self.masking(batch, seed, epoch)

    def loss(
        self,
        outputs: Float[Array, 'B M V'],
        batch: Mapping[str, Array],
        label_smoothing: float = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the cross-entropies (nats) of the hidden words, and their count.

        Args:
            outputs: logits.
            batch: has `label`, int32 [B, M], and `chosen`, bool [B, M].
            label_smoothing: must be 0.

        Raises:
            ValueError: another label smoothing.
        """
        refuse_smoothing(label_smoothing, 'a language model')
        return masked_sum(_cross_entropy, outputs, batch['label'], batch['chosen'])

    def reduced(
        self, outputs: Float[Array, 'B M V'], batch: Mapping[str, Array]
    ) -> Float32[Array, 'B T W']:
        """Return for each hidden token its cross-entropy, whether it is found, and 1; else zeros.

        Of a prediction it is the `top` likeliest words' log-probabilities, and then their ids.
        """
        outputs = outputs.astype(jnp.float32)
        if self.top:
            found = jax.lax.top_k(jax.nn.log_softmax(outputs), self.top)
            values = jnp.concatenate([found[0], found[1].astype(jnp.float32)], axis=-1)
        else:
            labels = batch['label']
            right = (outputs.argmax(-1) == labels).astype(jnp.float32)
            values = jnp.stack(
                [_cross_entropy(outputs, labels), right, jnp.ones_like(right)], axis=-1
            )
        return _scattered(values, batch)

    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        nll, right, count = outputs.sum(0, dtype=np.float64).tolist()
        if not count:
            raise ValueError('no word is hidden from this split, whose texts have none')
        means = nll / count, right / count
        return {name: METRICS[name](*means) for name in self.metric_names}

    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        """Give each row's own perplexity, or the missing words' candidates as numbers."""
        numbers = np.arange(len(encoded)) if encoded.rows is None else encoded.rows
        row = np.repeat(numbers, encoded.lengths)
        if self.top:
            missing = np.flatnonzero(encoded.tokens['input_ids'] == self.mask_id)
            found: list[list[np.ndarray]] = [[] for _ in range(len(rows))]
            for token in missing:
                found[row[token]].append(outputs[token])
            return [{'prediction': [self._likely(own) for own in each]} for each in found]
        sums = [np.bincount(row, column, len(rows)) for column in outputs.T]
        return [
            {'prediction': math.exp(min(nll / max(n, 1), 700.0)), 'found': int(right), 'of': int(n)}
            for nll, right, n in zip(*sums, strict=True)
        ]

    def _likely(self, numbers: np.ndarray) -> list[tuple[int, float]]:
        """Return the ids of the likeliest words of a place with their probabilities."""
        probabilities = np.exp(numbers[: self.top].astype(np.float64))
        return [
            (int(word), float(p))
            for word, p in zip(numbers[self.top :], probabilities, strict=True)
        ]

    def worded(
        self, predicted: Sequence[dict[str, Any]], rows: Rows, tokenizer: Tokenizer
    ) -> list[dict[str, Any]]:
        """Return the filled texts as `prediction`, and under `masks` what each word may be."""
        found = []
        for one, text in zip(predicted, rows['text_a'], strict=True):
            masks = [
                [{'word': tokenizer.decode([word]).strip(), 'probability': p} for word, p in own]
                for own in one['prediction']
            ]
            filled, *rest = text.split(self.mask_token)
            for own, after in zip(one['prediction'], rest, strict=True):
                piece = tokenizer.convert_ids_to_tokens(own[0][0])
                filled = _joined(filled, piece, tokenizer.decode([own[0][0]]).strip()) + after
            found.append({'prediction': filled, 'masks': masks})
        return found


def _joined(before: str, piece: str, word: str) -> str:
    """Return a text with the next word, which may go on with the last one or stand apart."""
    if piece.startswith('##'):
        return before.rstrip() + word.removeprefix('##')
    apart = piece.startswith(('\u0120', '\u2581')) and before and not before[-1].isspace()
    return f'{before} {word}' if apart else before + word


def _cross_entropy(
    logits: Float32[Array, 'B M V'], labels: Int[Array, 'B M']
) -> Float32[Array, 'B M']:
    of_label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - of_label


def _scattered(
    values: Float32[Array, 'B M W'], batch: Mapping[str, Array]
) -> Float32[Array, 'B T W']:
    """Put the values of hidden tokens where these stand, between zeros."""
    rows, length = batch['input_ids'].shape
    chosen: Bool[Array, 'B M'] = batch['chosen']
    places = jnp.where(chosen, batch['masked'], length)  # out of the row: left out
    result = jnp.zeros((rows, length, values.shape[-1]), jnp.float32)
    return result.at[jnp.arange(rows)[:, None], places].set(values, mode='drop')
