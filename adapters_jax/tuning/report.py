"""What a search found, as values and as Markdown: the best settings, what mattered, every trial."""

import itertools
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import FloatDistribution
from optuna.trial import FrozenTrial, TrialState

from adapters_jax.lazy import Functions
from adapters_jax.training import ranking
from adapters_jax.training.ranking import Row
from adapters_jax.tuning.populations import MEMBERS
from adapters_jax.tuning.study import Study

importance = Functions('optuna.importance')  # which takes scikit-learn with it
_LEAST = 4  # trials that must have ended for the importance of anything to be told
_ROUNDING = 1e-7  # by which float32 alone may tell two scores apart, as a part of them


def importances(study: Study, seed: int) -> dict[str, float]:
    """Return which share of the scores' variance each key explains by itself, the largest first.

    What only several keys together explain is in none of the shares, so their sum may be below 1.
    By fANOVA (Hutter et al. 2014) over the trials that were trained to their end; empty where there
    are too few of them, or where nothing but rounding tells their scores, or nothing their values,
    apart.
    """
    ended = [trial for trial in study.ended if trial.state == TrialState.COMPLETE]
    if len(ended) < _LEAST or _equal([trial.value for trial in ended]):
        return {}
    if all(trial.params == ended[0].params for trial in ended):
        return {}
    memory = optuna.create_study()
    memory.add_trials(_without_units(ended))
    evaluator = importance.FanovaImportanceEvaluator(seed=seed % 2**32)  # the most it takes
    shares = evaluator.evaluate(memory)
    return {key: round(float(share), 6) for key, share in shares.items()}


def _equal(scores: Sequence[float]) -> bool:
    return max(scores) - min(scores) <= _ROUNDING * max(map(abs, scores))


def _without_units(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Return trials whose scores and numbers are shares of their ranges, as fANOVA's trees want.

    The shares of the variance stay as they are. But the trees take for equal numbers less than 1e-7
    apart, such as weight decays, and scores with a variance below 2e-16, such as the squared errors
    of small labels; and the squares of large scores, such as perplexities, overflow.
    """
    scores = [trial.value for trial in trials]
    low, high = min(scores), max(scores)
    found = []
    for trial in trials:
        numbers = {k: d for k, d in trial.distributions.items() if hasattr(d, 'low')}
        within = {k: (trial.params[k] - d.low) / (d.high - d.low) for k, d in numbers.items()}
        units = dict.fromkeys(numbers, FloatDistribution(0, 1))
        found.append(
            optuna.trial.create_trial(
                value=(trial.value - low) / (high - low),
                params=trial.params | within,
                distributions=trial.distributions | units,
            )
        )
    return found


def counts(study: Study) -> dict[str, int]:
    """Return how many trials ended how."""
    words = {TrialState.COMPLETE: 'trained to the end', TrialState.PRUNED: 'ended early'}
    found = [words[trial.state] for trial in study.ended]
    return {word: found.count(word) for word in words.values()}


def command(workdir: Path | str, member: str) -> str:
    """Return what trains a member of a sweep by itself, as a shell reads it."""
    config = shlex.quote(f'--config=configs/again.py:{workdir}/{MEMBERS}/{member}')
    return f'python -m adapters_jax.train {config} --workdir=NEW'


def markdown(result: Mapping[str, Any], rows: Sequence[Row], primary: str) -> str:
    """Return the report: `result` is what sweep.json has beside the rows of the trials."""
    best = rows[0]
    ended = ', '.join(f'{count} {what}' for what, count in result['trials'].items())
    parts = [
        f'# {primary} {best.score:.4f}: `{best.name}`, step {best.best_step}',
        _table(['key', 'best'], [[f'`{k}`', _text(v)] for k, v in best.settings.items()]),
        f'To train it again by itself (W is this folder):\n\n    {command("W", best.name)}',
        f'## Importance\n\n{_importance(result["importance"])}',
        f'## {len(rows)} trials: {ended}\n\n{ranking.markdown(rows, primary).rstrip()}',
    ]
    return '\n\n'.join(parts) + '\n'


def text(result: Mapping[str, Any], most: int = 5) -> str:
    """Return the best trials of a sweep.json, and each key's importance, for a terminal."""
    rows, importance = result['members'], result['importance']
    keys = list(rows[0]['settings'])
    lines = [[*keys, result['primary'], 'steps', 'trial']]
    for row in rows[:most]:
        cells = [_text(row['settings'][key]) for key in keys]
        score = '-' if row['score'] is None else f'{row["score"]:.4f}'
        lines.append([*cells, score, str(row['steps']), row['name']])
    if importance:
        shares = [f'{importance[key]:.2f}' if key in importance else '-' for key in keys]
        lines.append([*shares, '', '', '(importance)'])
    return ranking.columns(lines)


def _importance(found: Mapping[str, float]) -> str:
    if not found:
        return f'Fewer than {_LEAST} trials were trained to their end with different scores.'
    rows = [[f'`{key}`', f'{value:.3f}'] for key, value in found.items()]
    return _table(['key', 'share of the variance'], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return '\n'.join(map(ranking.line, [head, ['---'] * len(head), *rows]))


def _text(value: Any) -> str:
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def history(study: Study) -> tuple[list[tuple[int, float, bool]], list[float]]:
    """Return what is drawn of a search.

    Of each trial with a score: its number, the score, and whether it was trained to its end; and
    after each of those that were, the best score until then.
    """
    whole = TrialState.COMPLETE
    scores = [(t.number, t.value, t.state == whole) for t in study.trials if t.value is not None]
    better = max if study.higher_is_better else min
    return scores, list(itertools.accumulate((v for _, v, ended in scores if ended), better))
