"""Evaluate a run exactly: `python -m adapters_jax.evaluate --workdir=DIR [--split=test]`.

Writes `evaluation_SPLIT.json` (the metrics) and `predictions_SPLIT.jsonl` (one object an example,
in the split's order) into the workdir.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from adapters_jax import config as configs
from adapters_jax import entry, files
from adapters_jax.interop import adapter_folder
from adapters_jax.training import experiment, inference, provenance


def evaluate(workdir: str | Path, split: str = 'test') -> dict[str, Any]:
    """Return the metrics of a workdir's best adapter on a split (and 'confusion', for classes).

    Raises:
        FileNotFoundError: no run, or one without a finished adapter.
        ValueError: no such split; those there are get listed.
    """
    workdir = Path(workdir)
    folder = adapter_folder.load(workdir / 'adapter')
    run = experiment.build(configs.read(workdir / 'config.json'))
    if split not in run.splits:
        raise ValueError(
            f'there is no split {split!r} in this run; it has {", ".join(sorted(run.splits))}'
        )
    logits = inference.outputs(folder, run.backbone, run.splits[split], run.config)
    _write_predictions(workdir / f'predictions_{split}.jsonl', run, split, logits)
    labels = run.splits[split].examples.get('label')
    result = {'split': split, 'examples': len(logits), **_score(run.task, logits, labels)}
    files.write_json(workdir / f'evaluation_{split}.json', result | provenance.describe())
    return result


def _score(task: Any, logits: np.ndarray, labels: np.ndarray | None) -> dict[str, Any]:
    if labels is None:
        return {'metrics': {}}
    scores: dict[str, Any] = {'metrics': task.metrics(logits, labels)}
    if task.label_kind == 'class':
        scores['confusion'] = task.confusion(logits, labels)
        scores['labels'] = list(task.labels)
    return scores


def _write_predictions(
    path: Path, run: experiment.Experiment, split: str, logits: np.ndarray
) -> None:
    """Write each example's text, gold label (as 'gold', where known) and prediction."""
    texts = run.texts[split]
    with files.atomic(path) as temporary, temporary.open('w', encoding='utf-8') as lines:
        for row, predicted in zip(texts, run.task.predictions(logits), strict=True):
            gold = {'gold': row['label']} if 'label' in row else {}
            named = {key: row[key] for key in ('text_a', 'text_b') if key in row}
            lines.write(json.dumps(named | gold | predicted, ensure_ascii=False) + '\n')


def main(workdir: str, split: str) -> None:
    """Evaluate, and print the metrics and what was written."""
    result = evaluate(workdir, split)
    print(f'{split}: {result["examples"]:,} examples')
    if result['metrics']:
        print(entry.table(result['metrics']))
    else:
        print('  the split has no labels: predictions only')
    if 'confusion' in result:
        task = experiment.task_of(adapter_folder.load(Path(workdir) / 'adapter'))
        print(task.confusion_text(result['confusion']))
    print(f'wrote {workdir}/evaluation_{split}.json and {workdir}/predictions_{split}.jsonl')


def _define() -> dict[str, flags.FlagHolder]:
    workdir = flags.DEFINE_string('workdir', None, 'Directory of a finished run.')
    split = flags.DEFINE_string('split', 'test', 'Which split: test, validation, train.')
    return {'workdir': workdir, 'split': split}


if __name__ == '__main__':
    entry.run(_define, main)
