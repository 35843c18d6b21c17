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


def load_normaliser(directory: pathlib.Path, english: bool) -> Normaliser:
    """Return what texts go through before they are compared, with the checkpoint's spellings.

    Raises:
        ValueError: a list of spellings that is none.
    """
    from transformers.models.whisper import english_normalizer  # late: see `adapters_jax.lazy`

    if not english:
        return english_normalizer.BasicTextNormalizer()
    path = pathlib.Path(directory) / SPELLINGS
    spellings = json.loads(path.read_text('utf-8')) if path.is_file() else {}
    if not isinstance(spellings, dict):
        raise ValueError(f'{path} holds a {type(spellings).__name__}, expected an object')
    return english_normalizer.EnglishTextNormalizer(spellings)
