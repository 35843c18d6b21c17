"""What a run notes of the steps already taken, and the files in which it tells of itself."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from adapters_jax.tasks.task import Task

SUMMARY, CONFIG, CHECKPOINTS = 'summary.json', 'config.json', 'checkpoints'  # of a workdir
DATA = 'data.json'  # a fingerprint of each split, as it was in training
Results = Mapping[str, Mapping[str, float]]  # the metrics of each validation split


@dataclasses.dataclass
class Progress:
    """What early stopping and the summary need to know of the steps already taken."""

    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    steps: int | None = None  # where it ended before the run did
    seconds: float = 0.0  # until it ended, or until now
    examples: int = 0
    finished: str = ''
    best_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)

    def judge(self, task: Task, results: Results, step: int) -> bool:
        """Note an evaluation, and tell whether it is the best so far.

        The first validation split decides; without one the last step is the best.
        """
        decisive = next(iter(results.values()), None)
        score = None if decisive is None else decisive[task.primary]
        if score is not None and not task.is_better(score, self.best):
            self.since_best += 1
            return False
        self.best, self.best_step, self.since_best = score, step, 0
        self.best_metrics = dict(results)
        return True

    def stop(self, patience: int, last: bool) -> None:
        """End the run after its last step, or where `patience` evaluations brought nothing."""
        if patience and self.since_best >= patience:
            self.finished = f'no improvement in {patience} evaluations'
        elif last:
            self.finished = 'all steps taken'


def read_end(path: Path) -> dict[str, Any]:
    """Read what a run, or a sweep, has written at its end.

    Raises:
        ValueError: it is not as it was written: a copy that was cut off, say.
    """
    try:
        return json.loads(path.read_text('utf-8'))
    except ValueError as error:
        raise ValueError(
            f'{path} is not JSON ({error}): remove it, and the command that made it writes it again'
        ) from error


def share_of_steps(steps: int, share: float) -> int:
    """Return so many times these steps, begun ones whole: 1.1 times 100 are 110, in floats too."""
    return math.ceil(round(steps * share, 6))
