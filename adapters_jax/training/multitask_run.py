"""The run of several tasks: what differs from the run of one adapter.

A step is the same function, over the common batch. Evaluation takes each task through its own
adapter and head alone, so what it finds is to the bit what the finished adapters are later found to
score.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from adapters_jax import params
from adapters_jax.data.mixing import Mixer
from adapters_jax.data.policies import Policy
from adapters_jax.data.shares import Mixing
from adapters_jax.training import batching, evaluation
from adapters_jax.training.loop import Trainer
from adapters_jax.training.multitask import Multitask
from adapters_jax.training.progress import Progress, Results
from adapters_jax.training.step import jit_outputs

MEAN = 'validation'  # the split under which the mean of the tasks is noted


@dataclasses.dataclass
class MultitaskProgress(Progress):
    """The progress of the mean, and of each task by itself, as `dataclasses.asdict` has it."""

    tasks: dict[str, Any] = dataclasses.field(default_factory=dict)


class MultitaskRun(Trainer):
    """One run of several tasks in a workdir."""

    experiment: Multitask
    progress: MultitaskProgress

    def _choose_batches(self, devices: int) -> tuple[Policy, Mixing | None]:
        config, members = self.config, self.experiment.members.values()
        mixing = self.experiment.mixing(max(1, math.ceil(config.training.epochs)))
        groups = [member.splits['train'].sizes for member in members]
        longest = max(int(lengths.max()) for lengths in groups)
        longest = max(longest, *(member.config.data.max_length for member in members))
        method = self.experiment.model.method
        policy = batching.choose_mixed(config, method, groups, mixing, longest)
        mixer = Mixer(self.data.sizes, self.data.examples['task'], policy, 0, mixing)
        if config.training.steps:
            mixing = self.experiment.mixing(-(-config.training.steps // mixer.batches))
            mixer = Mixer(self.data.sizes, self.data.examples['task'], policy, 0, mixing)
        _check_all_come(mixer, mixing.epochs, tuple(self.experiment.members))
        return policy, mixing

    def _choose_evaluation(self, split: str, devices: int) -> Policy:
        member, lengths = self.experiment.member(split), self.experiment.splits[split].sizes
        return batching.choose(member.config, member.model, lengths, devices, False)

    def _prepare_state(self) -> None:
        super()._prepare_state()
        self.progress = MultitaskProgress()
        self.forwards = {
            name: jit_outputs(member.model, member.task)
            for name, member in self.experiment.members.items()
        }

    def _restore_progress(self, values: dict[str, Any]) -> None:
        self.progress = MultitaskProgress(**values)

    def _record(self, pending: tuple[int, Any] | None) -> None:
        """As of one task, without the losses of tasks that the batch had nothing of."""
        if pending is not None:
            values = pending[1].items()
            there = {k: v for k, v in values if not (k.startswith('loss/') and math.isnan(v))}
            pending = pending[0], there
        super()._record(pending)

    def _outputs(self, split: str, trainable: params.Tree) -> Float[np.ndarray, 'S ...']:
        return evaluation.outputs(
            self.forwards[self.experiment.member(split).model.name],
            trainable,
            self.frozen,
            self.experiment.splits[split],
            self.eval_policies[split],
            self.pad_id,
            self.mesh,
            per_token=self.experiment.member(split).task.per_token,
            transform=self.experiment.member(split).task.transform,
        )

    def _evaluate(self) -> None:
        self._settled = dict(self.experiment.members)
        results = {split: self._score(split) for split in self.eval_policies}
        first: dict[str, Mapping[str, float]] = {}
        for split, metrics in results.items():
            first.setdefault(split.partition('/')[0], metrics)
        if first:
            results = {MEAN: {'mean': self.experiment.task.mean(first)}} | results
        for split, metrics in results.items():
            self.monitor.evaluation(self.step, split, metrics)
        self._judge(results)

    def _score(self, split: str) -> dict[str, float]:
        """Return the metrics of a validation split."""
        outputs = self._outputs(split, self.trainable)
        if not np.isfinite(outputs).all():
            raise self._diverged(
                f'after step {self.step} the outputs for the split {split!r} are not finite'
            )
        own, name = split.partition('/')[2], self.experiment.member(split).model.name
        if own == self.experiment.members[name].validation_splits[0]:
            self._settled[name] = self._settled[name].tuned(own, outputs)
        return self._settled[name].score(own, outputs)

    def _judge(self, results: Results) -> None:
        """Keep the adapters of the best mean so far, or each that is at its own best."""
        progress, patience = self.progress, self.config.training.patience
        improved = progress.judge(self.experiment.task, results, self.step)
        for name, member in self.experiment.members.items():
            own = Progress(**progress.tasks.get(name, {}))
            mine = {k: v for k, v in results.items() if k.startswith(f'{name}/')}
            better = own.judge(member.task, mine, self.step)
            progress.tasks[name] = dataclasses.asdict(own)
            if better if self.config.mixing.best == 'each' else improved:
                self._keep(self._settled[name], self.workdir / 'adapter' / name)
        if self.config.mixing.best == 'each':
            progress.since_best = min(own['since_best'] for own in progress.tasks.values())
        progress.stop(patience, self.step >= self.total_steps)

    def _finish(self) -> dict[str, Any]:
        summary = super()._finish()
        if self.config.mixing.best == 'each':
            own = self.progress.tasks.values()
            kept = {split: m for one in own for split, m in one['best_metrics'].items()}
            summary['metrics'] = kept
            summary['best_steps'] = {
                split: one['best_step'] for one in own for split in one['best_metrics']
            }
        return summary


def _check_all_come(mixer: Mixer, epochs: int, names: Sequence[str]) -> None:
    """Refuse shares of which one is so small that none of its task's examples would be trained."""
    before, counts = mixer.rows(epochs - 1)
    for name, rows in zip(names, before + counts, strict=True):
        if not rows:
            raise ValueError(
                f'with these shares the batches of {epochs} epochs have no example of the task '
                f'{name!r}, and its adapter would stay untrained; raise tasks.{name}.share, or '
                'choose another mixing.schedule'
            )
