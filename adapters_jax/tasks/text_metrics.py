"""How close written texts are to those that were to be written: BLEU, chrF and ROUGE.

The figures are those of sacrebleu and rouge-score, which papers report.
"""

import logging
import re
from collections.abc import Callable, Sequence

Texts = Sequence[str]

_LOG = logging.getLogger(__name__)
# What BLEU counts as a word where nobody says: Chinese by its characters, as WMT does; of the other
# languages without spaces each character, for which no further package is needed.
WORDS = '13a'
_LATIN = re.compile('[a-z0-9]', re.IGNORECASE)
_OF_LANGUAGES = {'zh': 'zh', **dict.fromkeys(('ja', 'th', 'lo', 'my', 'km'), 'char')}


def tokenizer_for(language: str) -> str:
    """Return sacrebleu's tokenizer for a language ('zh_CN'), or the usual one."""
    return _OF_LANGUAGES.get(language.partition('_')[0].partition('-')[0].casefold(), WORDS)


def check_tokenizer(name: str) -> None:
    """Refuse what is no tokenizer of sacrebleu's.

    Raises:
        ValueError: listing those that there are.
    """
    import sacrebleu  # late: see `adapters_jax.lazy`

    if name not in sacrebleu.BLEU.TOKENIZERS:
        known = ', '.join(sacrebleu.BLEU.TOKENIZERS)
        raise ValueError(f'task.bleu_tokenizer is {name!r}; sacrebleu has {known}')


def bleu(written: Texts, wanted: Texts, tokenizer: str = WORDS) -> float:
    """Return the BLEU of a corpus in per cent, over the words of one of sacrebleu's tokenizers."""
    import sacrebleu

    if tokenizer == WORDS and not any(len(text.split()) > 1 for text in wanted):
        _LOG.warning(
            'no text that was to be written has a space, so that each counts as a single word of '
            "BLEU; set task.bleu_tokenizer to 'zh' or 'char' for a language without spaces"
        )
    return sacrebleu.corpus_bleu(written, [wanted], tokenize=tokenizer).score


def _chrf(written: Texts, wanted: Texts) -> float:
    import sacrebleu

    return sacrebleu.corpus_chrf(written, [wanted]).score


def _rouge(kind: str) -> Callable[[Texts, Texts], float]:
    def score(written: Texts, wanted: Texts) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        if not any(_LATIN.search(text) for text in wanted):
            _LOG.warning(
                'no text that was to be written has a letter from a to z or a digit, of which '
                'alone ROUGE is made: it is 0; set task.metrics to others'
            )
        own = [scorer.score(b, a)[kind].fmeasure for a, b in zip(written, wanted, strict=True)]
        return 100 * sum(own) / len(own)

    return score


def _exact(written: Texts, wanted: Texts) -> float:
    # What is written has no space at its ends.
    return sum(a == b.strip() for a, b in zip(written, wanted, strict=True)) / len(written)


# BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of the whole corpus in per cent, the mean F
# measures of ROUGE (Lin 2004) in per cent, and the share of texts that are equal.
TEXT_METRICS: dict[str, Callable[[Texts, Texts], float]] = {
    'bleu': bleu,
    'chrf': _chrf,
    'rouge1': _rouge('rouge1'),
    'rouge2': _rouge('rouge2'),
    'rougeL': _rouge('rougeL'),
    'exact': _exact,
}
