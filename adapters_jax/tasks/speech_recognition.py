"""What is said in a recording, as text (Radford et al. 2023).

A recording is one row of a batch, as long as `window` says: the encoder of Whisper sees no padding,
so that shorter ones are followed by silence, as they were when it was trained.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import datasets
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import processors

from adapters_jax.data import audio, recordings, written
from adapters_jax.data.batches import Batch
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.tokenize import Tokenizer
from adapters_jax.models.backbone import BackboneConfig
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.speech_metrics import SPEECH_METRICS, Normaliser, load_normaliser
from adapters_jax.tasks.task import Encoding, Objects, Rows
from adapters_jax.tasks.writing import FORCED, KEPT, Writing, generation_settings

SOUND = 'sound'
_FRAMES_A_SECOND = 100  # of Whisper, where no checkpoint is at hand to say
_WORDS_OF_SEVERAL = 51865  # the least that Whisper's vocabularies of several languages have


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeechRecognition(Writing):
    """Write what is said in a recording.

    Attributes:
        window: the seconds that the encoder reads of each recording; 0: as many as the checkpoint
            was trained with. Fewer are proportionally cheaper.
        language: what a checkpoint of several languages is told to be spoken ('de').
        translate: whether such a one is told to write English, whatever is spoken.
        extractor, normaliser, bands, frames, multilingual: the backbone's; see `fitted`.
    """

    name: ClassVar[str] = 'speech_recognition'
    reads: ClassVar[str] = SOUND
    text_metrics: ClassVar[Mapping[str, Callable[..., float]]] = SPEECH_METRICS
    known_metrics: ClassVar[Mapping[str, Callable[..., float]]] = SPEECH_METRICS | FORCED
    default_metrics: ClassVar[tuple[str, ...]] = ('wer', 'cer', 'nll')
    lower_is_better: ClassVar[frozenset[str]] = frozenset({'wer', 'cer', 'nll', 'perplexity'})

    window: float = 0.0
    language: str = ''
    translate: bool = False
    extractor: audio.Extractor = dataclasses.field(default=None, **KEPT)
    normaliser: Normaliser | None = dataclasses.field(default=None, **KEPT)
    bands: int = dataclasses.field(default=0, **KEPT)
    frames: int = dataclasses.field(default=0, **KEPT)
    multilingual: bool = dataclasses.field(default=False, **KEPT)

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return how long recordings are, what is spoken, and how texts are written."""
        own = {name: given[name] for name in ('window', 'language', 'translate')}
        return super().settings(given, train) | own

    def fitted(self, config: BackboneConfig, directory: Path | None) -> Self:
        """Return the task for a backbone's features, normaliser and what `Writing` needs of it.

        Raises:
            ValueError: what its checkpoint cannot do.
        """
        if directory is None:
            frames = round(self.window * _FRAMES_A_SECOND) or 2 * config.positions
            described = dataclasses.replace(self, bands=config.stem.bands, frames=frames)
            return super(SpeechRecognition, described).fitted(config, directory)
        extractor = audio.load_extractor(directory)
        frames, positions = audio.frames_of(extractor, self.window), config.positions
        if frames > 2 * positions:
            raise ValueError(
                f'task.window is {self.window:g}, of which {frames} frames would make '
                f'{frames // 2} vectors, but the encoder has {positions} positions; set a shorter '
                'one'
            )
        # Older checkpoints do not say it, nor do those that are tuned from them.
        several = config.vocabulary >= _WORDS_OF_SEVERAL
        multilingual = generation_settings(directory).get('is_multilingual', several)
        fitted = dataclasses.replace(
            self,
            extractor=extractor,
            bands=extractor.feature_size,
            frames=frames,
            multilingual=multilingual,
            normaliser=load_normaliser(directory, self._written_in(multilingual)),
        )
        return super(SpeechRecognition, fitted).fitted(config, directory)

    def _written_in(self, multilingual: bool) -> str:
        """Return the language of what is written."""
        return self.language if multilingual and not self.translate else 'en'

    def prepared(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with nothing before a text, and its end behind it.

        What stands before is the start, which nobody has to say.
        """
        end = tokenizer.eos_token
        only_end = processors.TemplateProcessing(
            single=f'$A {end}', special_tokens=[(end, tokenizer.eos_token_id)]
        )
        tokenizer.backend_tokenizer.post_processor = only_end
        return tokenizer

    def start(self, start_id: int, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return what the checkpoint is told: language, task, and that no times are wanted.

        Raises:
            ValueError: a language or task that the checkpoint does not know.
        """
        names = ['<|notimestamps|>']
        if self.multilingual:
            if not self.language:
                raise ValueError(
                    "task.language is ''; a checkpoint of several languages is told which one is "
                    "spoken, such as task.language='en'"
                )
            names = [
                f'<|{self.language}|>',
                '<|translate|>' if self.translate else '<|transcribe|>',
                *names,
            ]
        elif self.language not in ('', 'en') or self.translate:
            raise ValueError(
                f'task.language is {self.language!r} and task.translate is {self.translate}, but '
                'the checkpoint knows English alone; choose one of several languages'
            )
        vocabulary = tokenizer.get_vocab()
        unknown = [name for name in names if name not in vocabulary]
        if unknown:
            raise ValueError(f'the tokenizer has no token {", ".join(unknown)}')
        return (start_id, *(vocabulary[name] for name in names))

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.recordings`."""
        return recordings.load(data)

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn recordings into features and words into tokens; longer ones are cut."""
        given = rows['audio'][:], self.extractor, self.window, encoding.cache_dir
        found = Encoded(
            # The encoder's input is no row of tokens; each example has a place of its own in one.
            tokens={},
            offsets=np.arange(len(rows) + 1, dtype=np.int64),
            examples={SOUND: audio.features(*given)},
        )
        if 'target' not in rows.column_names:
            return found
        # Words begin with a space in what Whisper was trained to write.
        texts = [f' {text}' for text in rows['target'][:]]
        return written.encode(found, texts, self.tokenizer, self.target_length, self.rules.start)

    def transform(self, batch: Batch, seed: int = 0, epoch: int | None = None) -> Batch:
        """Return the batch with one recording a row, [B, M, F], of which all is to be seen."""
        left = {k: v for k, v in batch.items() if k not in ('segments', 'positions')}
        return left | {SOUND: batch[SOUND][:, 0]}

    def batch_shapes(self, rows: int, length: int, texts: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the shapes of sound and of what is to be written."""
        sound = jax.ShapeDtypeStruct((rows, self.bands, self.frames), jnp.dtype(audio.KEPT_AS))
        return super().batch_shapes(rows, length, texts) | {SOUND: sound}

    def comparable(self, text: str) -> str:
        """Return a text as Whisper's authors compare it: without case, signs, or spellings."""
        return self.normaliser(text)

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the files that objects name: {"audio": PATH}.

        Raises:
            ValueError: an object without a path, or with one where there is no file.
        """
        for line, one in zip(lines, objects, strict=True):
            _check_file(line, one)
        audio_column = [{'path': one['audio'], 'bytes': None} for one in objects]
        features = datasets.Features({'audio': recordings.FEATURE})
        return datasets.Dataset.from_dict({'audio': audio_column}, features=features)

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the recording's path, and what is said as `gold`."""
        gold = {'gold': row['target']} if 'target' in row else {}
        return {'audio': audio.shown(row['audio'])} | gold


def _check_file(line: int, given: Mapping[str, Any]) -> None:
    path = given.get('audio')
    if not isinstance(path, str) or not path.strip():
        raise ValueError(
            f'input line {line} has no path under \'audio\'; expected {{"audio": PATH}} '
            f'(this one has: {", ".join(given) or json.dumps(given)})'
        )
    try:
        audio.digest([{'path': path}])
    except FileNotFoundError as error:
        raise ValueError(f'input line {line}: {error}') from error
