"""How close written texts are to those that were to be written: BLEU, chrF and ROUGE.

The figures are those of sacrebleu and rouge-score, which papers report.
"""

from collections.abc import Callable, Sequence

Texts = Sequence[str]


def _bleu(written: Texts, wanted: Texts) -> float:
    import sacrebleu  # late: see `adapters_jax.lazy`

    return sacrebleu.corpus_bleu(written, [wanted]).score


def _chrf(written: Texts, wanted: Texts) -> float:
    import sacrebleu

    return sacrebleu.corpus_chrf(written, [wanted]).score


def _rouge(kind: str) -> Callable[[Texts, Texts], float]:
    def score(written: Texts, wanted: Texts) -> float:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([kind], use_stemmer=True)
        own = [scorer.score(b, a)[kind].fmeasure for a, b in zip(written, wanted, strict=True)]
        return 100 * sum(own) / len(own)

    return score


def _exact(written: Texts, wanted: Texts) -> float:
    return sum(a == b for a, b in zip(written, wanted, strict=True)) / len(written)


# BLEU (Papineni et al. 2002) and chrF (Popovic 2015) of the whole corpus in per cent, the mean F
# measures of ROUGE (Lin 2004) in per cent, and the share of texts that are equal.
TEXT_METRICS: dict[str, Callable[[Texts, Texts], float]] = {
    'bleu': _bleu,
    'chrf': _chrf,
    'rouge1': _rouge('rouge1'),
    'rouge2': _rouge('rouge2'),
    'rougeL': _rouge('rougeL'),
    'exact': _exact,
}
