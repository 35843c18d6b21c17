"""The run of one adapter: what `run.Run` leaves open, and what a config must allow beforehand."""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax import params, processes, sharding, tasks
from adapters_jax.config import Config
from adapters_jax.interop import adapter_folder
from adapters_jax.training import batching, trunk
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.members import load as load_members
from adapters_jax.training.optimizer import OptimizerConfig, Rates, make_schedule
from adapters_jax.training.placement import Placement
from adapters_jax.training.progress import Progress
from adapters_jax.training.run import NonFiniteLossError, Run, Stopped
from adapters_jax.training.state import prepare

__all__ = ['NonFiniteLossError', 'Progress', 'Stopped', 'Trainer', 'check']


def check(config: Config, placement: Placement | None = None) -> None:
    """Refuse what these devices (default: JAX's) cannot train, before data is read.

    Raises:
        ValueError: naming the value and what was expected.
    """
    for key in ('grid', 'space'):
        if config.sweep[key]:
            raise ValueError(
                f'sweep.{key} is {config.sweep[key]!r}, which is for `python -m adapters_jax.sweep`'
                '; a single run has none'
            )
    if config.data.seed < -1:
        raise ValueError(f'data.seed is {config.data.seed}; expected -1 (as seed) or 0 or more')
    devices = (placement or Placement.of(config)).row_parts
    drop = config.training.adapter_drop
    if drop not in ('none', 'robust'):
        raise ValueError(f'training.adapter_drop is {drop!r}; expected one of none, robust')
    if config.adapters and config.tasks:
        raise ValueError(
            f'adapters is {config.adapters!r}, but a run of several tasks trains one method for '
            'each of them; leave it empty'
        )
    _check_smoothing(config)
    batching.check(config, load_members(config).method, devices)
    trunk.check(config)


def _check_smoothing(config: Config) -> None:
    smoothing = config.training.label_smoothing
    kinds = [task.task.name for task in config.tasks.values()] or [config.task.name]
    if smoothing and not any(tasks.kind(kind).smooths for kind in kinds):
        raise ValueError(
            f'training.label_smoothing is {smoothing}, but {" and ".join(dict.fromkeys(kinds))} '
            'has no classes or words among which it could be spread; set it to 0'
        )


class Trainer(Run):
    """One run of an experiment in a workdir."""

    def _prepare_state(self) -> None:
        self.progress = Progress()
        optimizer = OptimizerConfig(**self.config.optimizer.to_dict())
        self.rates = Rates(make_schedule(optimizer, self.total_steps))
        tree = self.experiment.init_params()
        start = prepare(self.experiment, tree, self.placement, self.total_steps, self.parts)
        self.trainable, self.frozen = start.trainable, start.frozen
        self.opt_state, self.key = start.opt_state, start.key
        self.train_step, self.forward = start.train_step, start.forward

    @property
    def state(self) -> tuple[params.Tree, Any]:
        """The arrays that a step replaces."""
        return self.trainable, self.opt_state

    @state.setter
    def state(self, state: tuple[params.Tree, Any]) -> None:
        self.trainable, self.opt_state = state

    @property
    def finished(self) -> bool:
        """Whether nothing is left to train."""
        return bool(self.progress.finished)

    def _restore_progress(self, values: dict[str, Any]) -> None:
        self.progress = Progress(**values)

    def _announce(self) -> None:
        self.monitor.message(params.summary(self.trainable, self.frozen))
        self._announce_trunk(params.merge(self.trainable, self.frozen))
        super()._announce()

    def _advance(self, batch: Any) -> Any:
        self.trainable, self.opt_state, metrics = self.train_step(
            self.trainable, self.opt_state, self.frozen, batch, self.key, np.int32(self.step)
        )
        return metrics

    def _record(self, pending: tuple[int, Any] | None) -> None:
        """Read a step's metrics, refuse numbers that are none, and hand them on."""
        if pending is None:
            return
        step, values = pending[0], {k: float(v) for k, v in pending[1].items()}
        if not (math.isfinite(values['loss']) and math.isfinite(values['gradient_norm'])):
            raise self._diverged(
                f'the loss of step {step} is {values["loss"]} (gradient norm '
                f'{values["gradient_norm"]})'
            )
        self.progress.examples += int(values['examples'])
        values['learning_rate'] = float(self.rates(step - 1))
        self.monitor.train(step, values)

    def _diverged(self, what: str) -> NonFiniteLossError:
        kept = f'the last good state, of step {self.saved}, is in {self.workdir / "checkpoints"}'
        return NonFiniteLossError(
            f'{what}: stopped; {kept if self.saved else "nothing was saved before"}; try a lower '
            'optimizer.learning_rate, a longer optimizer.warmup or a smaller optimizer.clip_norm, '
            'in another --workdir'
        )

    def _evaluate(self) -> None:
        results, settled = {}, self.experiment
        for name in self.eval_policies:
            logits = self._outputs(name, self.trainable)
            if not np.isfinite(logits).all():
                raise self._diverged(
                    f'after step {self.step} the outputs for the split {name!r} are not finite'
                )
            settled = settled if results else settled.tuned(name, logits)  # the first one decides
            results[name] = settled.score(name, logits)
            self.monitor.evaluation(self.step, name, results[name])
        if self.progress.judge(self.experiment.task, results, self.step):
            self._keep(settled, self.workdir / 'adapter')
        self.progress.stop(self.config.training.patience, self.step >= self.total_steps)
        if self.finished and self.step < self.total_steps:
            self.monitor.message(
                f'stopped at step {self.step} of {self.total_steps}: {self.progress.finished}'
            )

    def _keep(self, experiment: Experiment, directory: Path) -> None:
        """Write the trained leaves as a finished adapter; every process must call this."""
        trainable = sharding.to_host(self.trainable)
        if processes.is_writer():
            adapter_folder.save(experiment.folder(trainable), directory)

    def _save(self) -> None:
        if not _all_finite(self.trainable):
            raise self._diverged(f'after step {self.step} the trained parameters are not finite')
        p, sign = self.progress, 1 if self.experiment.task.higher_is_better else -1
        is_best = p.best is not None and p.best_step == self.step
        self._save_checkpoint(sign * p.best if is_best else None)

    def _finish(self) -> dict[str, Any]:
        return self._summary(self.progress, params.count(self.trainable), self.config.seed)


@jax.jit
def _all_finite(tree: params.Tree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()
