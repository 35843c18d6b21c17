"""How far written texts are from what was said: the rates of wrong words and characters, by jiwer.

Texts are compared as Whisper's authors do (Radford et al. 2023, section 4.4 and appendix C), by
`transformers`' copy of their normaliser.
"""

import json
import pathlib
from collections.abc import Callable, Sequence

Texts = Sequence[str]
Normaliser = Callable[[str], str]
SPELLINGS = 'normalizer.json'  # British spellings and their American ones, beside a checkpoint


def _wer(written: Texts, wanted: Texts) -> float:
    import jiwer  # late: see `adapters_jax.lazy`

    return jiwer.wer(list(wanted), list(written))


def _cer(written: Texts, wanted: Texts) -> float:
    import jiwer

    return jiwer.cer(list(wanted), list(written))


def _exact(written: Texts, wanted: Texts) -> float:
    return sum(a == b for a, b in zip(written, wanted, strict=True)) / len(written)


# Words (and characters) that are wrong, missing or too many, of all texts together, over those that
# were said: from 0, and above 1 where much is made up. And the share of texts that are equal.
SPEECH_METRICS: dict[str, Callable[[Texts, Texts], float]] = {
    'wer': _wer,
    'cer': _cer,
    'exact': _exact,
}


# The languages whose letters Whisper's authors take for words.
_WITHOUT_SPACES = ('zh', 'ja', 'th', 'lo', 'my', 'yue')


def load_normaliser(directory: pathlib.Path, language: str) -> Normaliser:
    """Return what texts of a language go through before they are compared.

    Of English texts with the checkpoint's spellings; of languages without spaces between words
    every letter is a word.

    Raises:
        ValueError: a list of spellings that is none.
    """
    from transformers.models.whisper import english_normalizer  # late: see `adapters_jax.lazy`

    if language != 'en':
        split = language in _WITHOUT_SPACES
        return english_normalizer.BasicTextNormalizer(split_letters=split)
    path = pathlib.Path(directory) / SPELLINGS
    spellings = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    if not isinstance(spellings, dict):
        raise ValueError(f'{path} holds a {type(spellings).__name__}, expected an object')
    return english_normalizer.EnglishTextNormalizer(spellings)
