"""What all tasks share whose outputs are texts: how they are written, learned and scored.

Training is by teacher forcing: every token of a text is scored at once. An evaluation writes the
texts, unless only what can be had without is to be reported.
"""

import abc
import dataclasses
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from adapters_jax.data import tokenize, written
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.tokenize import Tokenizer
from adapters_jax.decoding import rules as rule
from adapters_jax.decoding.rules import Rules
from adapters_jax.decoding.search import Search
from adapters_jax.models.backbone import BackboneConfig, longest
from adapters_jax.models.heads import VOCABULARY, HeadConfig
from adapters_jax.tasks.losses import check_smoothing, masked_sum
from adapters_jax.tasks.task import Column, Rows, Task

_LOG = logging.getLogger(__name__)
# Of the mean cross-entropy of a token in nats, and the share of tokens that are found.
FORCED: dict[str, Callable[[float, float], float]] = {
    'nll': lambda nll, right: nll,
    'perplexity': lambda nll, right: math.exp(min(nll, 700.0)),
    'token_accuracy': lambda nll, right: right,
}
_SUMS = 3  # numbers of each example: summed cross-entropy, tokens found, tokens
# Of a field that the backbone decides: it is no part of what is written to an adapter's folder.
KEPT = {'metadata': {'kept': False}, 'repr': False, 'compare': False}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Writing(Task):
    """Write a text for each example.

    Attributes:
        target_length: the most tokens of a text to be written, its end included.
        beams, length_penalty, min_length, repeated: how texts are looked for; see `decoding`.
        vocabulary, rules, tokenizer: the backbone's; see `fitted`.

    Raises:
        ValueError: numbers out of range.
    """

    writes: ClassVar[bool] = True
    smooths: ClassVar[bool] = True
    labels_in: ClassVar[Mapping[str, Column]] = {'label': Column('token', np.int32)}
    text_metrics: ClassVar[Mapping[str, Callable[[Sequence[str], Sequence[str]], float]]]

    target_length: int = 128
    beams: int = 1
    length_penalty: float = 1.0
    min_length: int = 0
    repeated: int = 0
    rules: Rules | None = dataclasses.field(default=None, **KEPT)
    tokenizer: Tokenizer | None = dataclasses.field(default=None, **KEPT)
    vocabulary: int = dataclasses.field(default=0, **KEPT)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_length < 2:
            raise ValueError(
                f'target_length is {self.target_length}; expected at least 2, a token and the end'
            )
        if not 0 <= self.min_length <= self.target_length:
            raise ValueError(
                f'task.min_length is {self.min_length}; expected 0 to {self.target_length}, which '
                'is task.target_length'
            )
        if self.repeated < 0 or self.repeated == 1:
            raise ValueError(
                f'task.repeated is {self.repeated}; expected 0, or 2 or more tokens in a row'
            )
        Search(beams=self.beams, length_penalty=self.length_penalty)

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return how long texts are, and how they are looked for."""
        names = ('target_length', 'beams', 'length_penalty', 'min_length', 'repeated')
        return {name: given[name] for name in names}

    def fitted(self, config: BackboneConfig, directory: Path | None) -> Self:
        """Return the task for a backbone's vocabulary, tokenizer and own rules.

        Raises:
            ValueError: a text may grow longer than the decoder's positions, or has no end, or there
                are too few words for so many beams.
        """
        task = dataclasses.replace(self, vocabulary=config.written)
        if directory is None or config.decoder is None:
            return task
        if 2 * self.beams > config.written:
            raise ValueError(
                f'task.beams is {self.beams}, but the backbone writes {config.written} words, and '
                f'each beam needs two of them; set it to {config.written // 2} or less'
            )
        plain = tokenize.load_writer(directory) or tokenize.load_tokenizer(directory)
        own = self.prepared(plain)
        if own.eos_token_id is None:
            raise ValueError(
                f'the tokenizer of {directory} has no token that ends a text (eos_token)'
            )
        settings = generation_settings(directory)
        given = settings.get('decoder_start_token_id')
        start = self.start(config.decoder.start_id if given is None else given, own)
        if unused := rule.unused(settings):
            _LOG.warning(
                'The checkpoint has rules for texts that are not used here: %s', ', '.join(unused)
            )
        found = dict(rule.from_hf(settings)) | self.forced(own)
        if self.repeated:
            found['repeated'] = self.repeated
        rules = Rules(
            start=start,
            end_id=own.eos_token_id,
            pad_id=config.pad_id if config.decoder.pad_id < 0 else config.decoder.pad_id,
            max_length=self.target_length,
            min_length=self.min_length,
            **found,
        )
        most = longest(config.decoder)
        if most is not None and rules.read > most:
            raise ValueError(
                f'task.target_length is {self.target_length}, but the decoder has {most} '
                f'positions; set it to {self.target_length + most - rules.read} or less'
            )
        return dataclasses.replace(task, tokenizer=own, rules=rules)

    @property
    def generates(self) -> bool:
        """Whether an evaluation has to write texts, as where a metric is of these."""
        return not set(self.text_metrics).isdisjoint(self.metric_names)

    def prepared(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer as the task uses it."""
        return tokenizer

    def start(self, start_id: int, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return what every text is made to begin with."""
        return (start_id,)

    def forced(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return rules that go before those of the checkpoint."""
        return {}

    @property
    def search(self) -> Search:
        """How texts are looked for."""
        return Search(beams=self.beams, length_penalty=self.length_penalty)

    def predicting(self) -> Self:
        """Return the task with texts to be written, whatever an evaluation reports."""
        return dataclasses.replace(self, metric_names=(), primary='')

    @property
    def num_outputs(self) -> int:
        """One logit for each word."""
        return self.vocabulary

    def width(self, encoded: Encoded) -> int:
        """Return the numbers of each example: see `reduced`; then the tokens of its text."""
        sums = _SUMS if encoded.target else 0
        return sums + (self.rules.max_length if self.generates else 0)

    def head(self, config: HeadConfig) -> HeadConfig:
        """Return the head over the vocabulary."""
        return dataclasses.replace(config, pooling=VOCABULARY, layers=1)

    def batch_shapes(self, rows: int, length: int, texts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of what is to be written."""
        names = ('label', 'target_ids', 'target_positions', 'target_segments')
        return dict.fromkeys(names, jax.ShapeDtypeStruct((rows, length), jnp.int32))

    def loss(
        self,
        outputs: Float[Array, 'B T V'],
        batch: Mapping[str, Array],
        label_smoothing: float = 0.0,
    ) -> tuple[Float32[Array, ''], Float32[Array, '']]:
        """Return the sum of the cross-entropies (nats) of the tokens, and their count.

        With label smoothing, that share of each token's probability is spread over all words
        (Szegedy et al. 2016, section 7).

        Args:
            outputs: logits.
            batch: has `label` and `target_segments`, int32 [B, T].
            label_smoothing: in [0, 1].

        Raises:
            ValueError: a label smoothing out of range.
        """
        check_smoothing(label_smoothing)

        def smoothed(logits: Float32[Array, 'B T V'], labels: Array) -> Float32[Array, 'B T']:
            total = jax.nn.logsumexp(logits, axis=-1)
            own = total - _of_label(logits, labels)
            return (1 - label_smoothing) * own + label_smoothing * (total - logits.mean(-1))

        return masked_sum(smoothed, outputs, batch['label'], _is_scored(batch))

    def reduced(
        self, outputs: Float[Array, 'B T V'], batch: Mapping[str, Array]
    ) -> Float32[Array, 'B S 3']:
        """Return for each example its summed cross-entropy, the tokens found, and all tokens."""
        outputs = outputs.astype(jnp.float32)
        labels, segments = batch['label'], batch['target_segments'] * _is_scored(batch)
        nll = jax.nn.logsumexp(outputs, axis=-1) - _of_label(outputs, labels)
        right = (outputs.argmax(-1) == labels).astype(jnp.float32)
        values = jnp.stack([nll, right, jnp.ones_like(right)], axis=-1)
        examples = jnp.arange(1, batch['example_mask'].shape[1] + 1)
        own = segments[:, :, None] == examples.reshape(1, 1, -1)
        return jnp.einsum('BTS,BTW->BSW', own.astype(jnp.float32), values)

    def _score(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> dict[str, float]:
        nll, right, count = outputs[:, :_SUMS].sum(0, dtype=np.float64).tolist()
        means = nll / count, right / count
        scores = {name: FORCED[name](*means) for name in self.metric_names if name in FORCED}
        if self.generates:
            texts = self.texts(outputs, encoded), rows['target'][:]
            compared = [[self.comparable(text) for text in own] for own in texts]
            for name in set(self.metric_names) & set(self.text_metrics):
                scores[name] = float(self.compared(name, *compared))
        return {name: scores[name] for name in self.metric_names}

    def compared(self, metric: str, written: Sequence[str], wanted: Sequence[str]) -> float:
        """Return a metric of written texts."""
        return self.text_metrics[metric](written, wanted)

    def comparable(self, text: str) -> str:
        """Return a text as metrics compare it."""
        return text

    def texts(self, outputs: np.ndarray, encoded: Encoded) -> list[str]:
        """Return the texts that were written."""
        tokens = outputs[:, _SUMS if encoded.target else 0 :].astype(np.int64)
        read = written.reader(self.tokenizer)
        return [read(self._until_end(own)) for own in tokens]

    def _until_end(self, tokens: Int[np.ndarray, ' L']) -> Int[np.ndarray, ' M']:
        ends = np.flatnonzero(tokens == self.rules.end_id)
        return tokens[: ends[0]] if len(ends) else tokens

    def _predict(self, outputs: np.ndarray, encoded: Encoded, rows: Rows) -> list[dict[str, Any]]:
        if self.generates:
            return [{'prediction': text} for text in self.texts(outputs, encoded)]
        return [
            {'prediction': None, 'perplexity': math.exp(min(nll / count, 700.0))}
            for nll, _, count in outputs[:, :_SUMS].tolist()
        ]

    @abc.abstractmethod
    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a file of predictions repeats of a row."""


def _is_scored(batch: Mapping[str, Array]) -> Bool[Array, 'B T']:
    """Tell which tokens are to be said: not those of the start."""
    return (batch['target_segments'] > 0) & (batch['label'] >= 0)


def _of_label(logits: Float[Array, 'B T V'], labels: Int[Array, 'B T']) -> Float[Array, 'B T']:
    return jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]


def generation_settings(folder: Path) -> dict[str, Any]:
    """Return the checkpoint's rules for texts: they stand in config.json where no file has them."""
    names = ('generation_config.json', 'config.json')
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    return json.loads(path.read_text('utf-8')) if path else {}
