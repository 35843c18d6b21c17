"""A text for a text: translation, summarisation, and whatever else can be put so."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from adapters_jax.data import parallel, tokenize, written
from adapters_jax.data.encoded import Encoded
from adapters_jax.data.tokenize import Tokenizer
from adapters_jax.tasks.registry import register
from adapters_jax.tasks.task import Encoding, Objects, Rows
from adapters_jax.tasks.text_metrics import TEXT_METRICS, bleu, check_tokenizer, tokenizer_for
from adapters_jax.tasks.texts import text_rows
from adapters_jax.tasks.writing import FORCED, Writing


@register
@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceToSequence(Writing):
    """Write a text for each text.

    Attributes:
        prefix: what stands before each text ('translate English to German: ').
        languages: those of the texts and of what is written, for tokenizers that want to know:
            ('en_XX', 'de_DE').
        bleu_tokenizer: what BLEU counts as words, as sacrebleu calls it; '': by the language.
    """

    name: ClassVar[str] = 'seq2seq'
    takes_steps: ClassVar[bool] = True
    text_metrics: ClassVar[Mapping[str, Callable[..., float]]] = TEXT_METRICS
    known_metrics: ClassVar[Mapping[str, Callable[..., float]]] = TEXT_METRICS | FORCED
    default_metrics: ClassVar[tuple[str, ...]] = ('bleu', 'chrf', 'nll')
    lower_is_better: ClassVar[frozenset[str]] = frozenset({'nll', 'perplexity'})

    prefix: str = ''
    languages: tuple[str, ...] = ()
    bleu_tokenizer: str = ''

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set(languages=tuple(self.languages))
        if len(self.languages) not in (0, 2):
            raise ValueError(
                f'task.languages is {self.languages!r}; expected none, or those of the texts and '
                "of what is written, as the tokenizer calls them: ('en_XX', 'de_DE')"
            )
        if self.bleu_tokenizer:
            check_tokenizer(self.bleu_tokenizer)

    @classmethod
    def settings(cls, given: Mapping[str, Any], train: Rows | None) -> dict[str, Any]:
        """Return what stands before texts, and how texts are written."""
        own = {name: given[name] for name in ('prefix', 'bleu_tokenizer')}
        own |= {'languages': tuple(given['languages'])}
        return super().settings(given, train) | own

    def prepared(self, tokenizer: Tokenizer) -> Tokenizer:
        """Return the tokenizer with its languages set.

        Raises:
            ValueError: it knows no languages, or not these.
        """
        if not self.languages:
            return tokenizer
        known = getattr(tokenizer, 'lang_code_to_id', None) or {}
        if not set(self.languages) <= set(known):
            raise ValueError(
                f'task.languages is {self.languages!r}; the tokenizer of the backbone knows '
                f'{", ".join(sorted(known)) or "no languages"}'
            )
        tokenizer.src_lang, tokenizer.tgt_lang = self.languages
        return tokenizer

    def forced(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the language that a text must begin with, where it is one of its words."""
        if not self.languages:
            return {}
        return {'first': -1 if self._starts(tokenizer) else self._language(tokenizer)}

    def start(self, start_id: int, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Return what every text is made to begin with: of the first mBART, its language."""
        return (self._language(tokenizer),) if self._starts(tokenizer) else (start_id,)

    def _language(self, tokenizer: Tokenizer) -> int:
        return tokenizer.lang_code_to_id[self.languages[1]]

    def _starts(self, tokenizer: Tokenizer) -> bool:
        """Whether a decoder begins with the language, which the tokenizer puts last then.

        The later mBART of fifty languages has it as a text's first word.
        """
        if not self.languages:
            return False
        return tokenizer(text_target='a')['input_ids'][-1] == self._language(tokenizer)

    def compared(self, metric: str, written: Sequence[str], wanted: Sequence[str]) -> float:
        """Return a metric of written texts."""
        if metric != 'bleu':
            return super().compared(metric, written, wanted)
        language = self.languages[1] if self.languages else ''
        tokenizer = self.bleu_tokenizer or tokenizer_for(language)
        return bleu(written, wanted, tokenizer)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> dict[str, Rows]:
        """Read the splits that the config's section `data` names; see `data.parallel`."""
        return parallel.load(data)

    def encode(self, rows: Rows, encoding: Encoding) -> Encoded:
        """Turn both texts of a row into tokens; longer ones are cut."""
        tokenizer = self.prepared(encoding.tokenizer)
        found = tokenize.encode(
            rows.select_columns('text_a'),
            tokenizer,
            encoding.max_length,
            cache_dir=encoding.cache_dir,
            positions=encoding.positions,
            chain=encoding.chain,
            prefix=self.prefix,
        )
        if 'target' not in rows.column_names:
            return found
        given = rows['target'][:], self.tokenizer, self.target_length, self.rules.start
        return written.encode(found, *given)

    def rows_of(self, objects: Objects, lines: Iterable[int], pair: bool | None) -> Rows:
        """Return the objects' texts; see `text_rows`."""
        return text_rows(objects, lines, False)

    def shown(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the text, and what was to be written as `gold`."""
        gold = {'gold': row['target']} if 'target' in row else {}
        return {'text': row['text_a']} | gold
