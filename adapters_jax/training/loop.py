"""The training loop: steps, evaluations, checkpoints, early stopping, and a clean way out.

The loop's whole state is (trainable, opt_state, step, position in the data, progress); all of it
is in each checkpoint, so a run that is killed at any instant goes on as if it had not been.
"""

import dataclasses
import math
import signal
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adapters_jax import params, sharding
from adapters_jax.adapters import registry
from adapters_jax.config import Config, decisive
from adapters_jax.data import batches, pipeline
from adapters_jax.interop import adapter_folder
from adapters_jax.training import batching, evaluation, monitor, provenance
from adapters_jax.training.checkpoint import Checkpoints
from adapters_jax.training.experiment import Experiment, choose_dtype, place
from adapters_jax.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from adapters_jax.training.step import jit_outputs, jit_train_step


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient stopped being a number."""


def check(config: Config) -> None:
    """Refuse what these devices cannot train, before data is read.

    Raises:
        ValueError: naming the value and what was expected.
    """
    devices = sharding.make_mesh(config.mesh.data).shape['data']
    batching.check(config, registry.create(config.method), devices)


class Stopped(SystemExit):
    """The process was asked to end (SIGTERM) and has saved its state."""


@dataclasses.dataclass
class Progress:
    """What early stopping and the summary need to know of the steps already taken."""

    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    seconds: float = 0.0
    examples: int = 0
    finished: str = ''
    best_metrics: dict[str, Any] = dataclasses.field(default_factory=dict)


class Trainer:
    """One run of an experiment in a workdir."""

    def __init__(self, experiment: Experiment, workdir: Path) -> None:
        """Prepare everything short of the first step."""
        self.experiment, self.workdir = experiment, workdir
        self.config = experiment.config
        self.mesh = sharding.make_mesh(self.config.mesh.data)
        devices = self.mesh.shape['data']
        self._prepare_data(devices)
        self._prepare_state()
        self.progress = Progress()
        self.step = self.saved = 0
        self._stop_requested = False

    def _prepare_data(self, devices: int) -> None:
        config, model = self.config, self.experiment.model
        self.data = self.experiment.splits['train']
        policy = batching.choose(config, model, self.data.lengths, devices, True)
        self.plan = batches.plan_epoch(self.data.lengths, policy, config.seed, 0, True)
        self.rows = batching.filled_rows(config, self.plan.rows, devices)
        self.padding = 1 - (1 - self.plan.padding) * self.plan.rows / self.rows
        self.steps_per_epoch = len(self.plan)
        self.total_steps = config.training.steps or max(
            1, math.ceil(self.steps_per_epoch * config.training.epochs)
        )
        self.evaluate_every = config.training.evaluate_every or self.steps_per_epoch
        self.pad_id = model.config.pad_id
        self.iterator = pipeline.train_batches(self.data, policy, config.seed, self.pad_id)
        self.eval_policies = {
            name: batching.choose(
                config, model, self.experiment.splits[name].lengths, devices, False
            )
            for name in self.experiment.validation_splits
        }

    def _prepare_state(self) -> None:
        config, model, task = self.config, self.experiment.model, self.experiment.task
        everywhere = sharding.replicated(self.mesh)
        trainable, frozen = params.partition(self.experiment.init_params(), model.rules)
        self.trainable = place(trainable, np.float32, everywhere)
        self.frozen = place(frozen, choose_dtype(config, 'frozen_dtype'), everywhere)
        optimizer_config = OptimizerConfig(**config.optimizer.to_dict())
        self.schedule = make_schedule(optimizer_config, self.total_steps)
        optimizer = model.method.optimizer(
            make_optimizer(optimizer_config, self.total_steps), self.total_steps
        )
        self.opt_state = jax.jit(optimizer.init, out_shardings=everywhere)(self.trainable)
        self.train_step = jit_train_step(
            self.trainable,
            self.opt_state,
            model=model,
            task=task,
            optimizer=optimizer,
            accumulate=config.training.accumulate,
            label_smoothing=config.training.label_smoothing,
            dropout=config.training.dropout,
        )
        self.forward = jit_outputs(model)
        self.key = jax.device_put(jax.random.fold_in(jax.random.key(config.seed), 1), everywhere)

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that continues it."""
        return {
            'backbone_fingerprint': self.experiment.backbone.fingerprint,
            'data_fingerprint': self.data.fingerprint(),
            'config': decisive(self.config),
        }

    def run(self) -> dict[str, Any]:
        """Train to the end (from the last checkpoint, where there is one); return the summary."""
        previous = signal.signal(signal.SIGTERM, self._request_stop)
        try:
            with (
                Checkpoints(self.workdir / 'checkpoints', self.identity) as self.checkpoints,
                monitor.Monitor(
                    self.workdir,
                    self.total_steps,
                    metric=self.experiment.task.primary,
                    every=self.config.training.log_every,
                ) as self.monitor,
            ):
                self._announce()
                self._resume()
                self._train()
        finally:
            signal.signal(signal.SIGTERM, previous)
        return self._finish()

    def _request_stop(self, *_: Any) -> None:
        self._stop_requested = True

    def _announce(self) -> None:
        say = self.monitor.message
        say(params.summary(self.trainable, self.frozen))
        trunk = self.experiment.model.trunk(params.merge(self.trainable, self.frozen))
        layers = self.experiment.backbone.config.layers
        say(f'layers 0 to {trunk.layer - 1} of {layers} are never differentiated' if trunk.layer
            else f'all {layers} layers are differentiated')  # fmt: skip
        say(
            f'{len(self.data):,} training examples, {self.steps_per_epoch} steps an epoch, '
            f'{self.total_steps} steps, {100 * self.padding:.1f} % padding'
        )

    def _resume(self) -> None:
        restored = self.checkpoints.restore(
            jax.tree.map(_abstract, (self.trainable, self.opt_state)), self.iterator
        )
        if restored is None:
            self.monitor.start(0)
            return
        self.trainable, self.opt_state = restored.state
        self.step = self.saved = restored.step
        self.progress = Progress(**restored.progress)
        self.monitor.start(self.step)
        self.monitor.message(f'continuing from the checkpoint of step {self.step}')

    def _train(self) -> None:
        training, pending = self.config.training, None
        started = time.monotonic()
        while self.step < self.total_steps and not self.progress.finished:
            _, batch = next(self.iterator)
            batch = batching.fill(batch, self.rows, self.pad_id)
            with jax.profiler.StepTraceAnnotation('train', step_num=self.step):
                self.trainable, self.opt_state, metrics = self.train_step(
                    self.trainable,
                    self.opt_state,
                    self.frozen,
                    sharding.put_batch(batch, self.mesh),
                    self.key,
                    np.int32(self.step),
                )
            self.step += 1
            # The metrics of the step before: the host never waits for the one under way.
            self._record(pending)
            pending = (self.step, metrics)
            evaluate = self.step % self.evaluate_every == 0 or self.step == self.total_steps
            save = training.checkpoint_every and self.step % training.checkpoint_every == 0
            if evaluate or save or self._stop_requested:
                self._record(pending)
                pending = None
                self.progress.seconds += time.monotonic() - started
                if evaluate:
                    self._evaluate()
                self._save()
                started = time.monotonic()
            if self._stop_requested:
                self._leave()

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
        values['learning_rate'] = float(self.schedule(step - 1))
        self.monitor.train(step, values)

    def _diverged(self, what: str) -> NonFiniteLossError:
        kept = f'the last good state, of step {self.saved}, is in {self.workdir / "checkpoints"}'
        return NonFiniteLossError(
            f'{what}: stopped; {kept if self.saved else "nothing was saved before"}; try a lower '
            'optimizer.learning_rate, a longer optimizer.warmup or a smaller optimizer.clip_norm, '
            'in another --workdir'
        )

    def _evaluate(self) -> None:
        results = {}
        for name, policy in self.eval_policies.items():
            encoded = self.experiment.splits[name]
            logits = evaluation.outputs(
                self.forward,
                self.trainable,
                self.frozen,
                encoded,
                policy,
                self.pad_id,
                self.mesh,
            )
            results[name] = self.experiment.task.metrics(logits, encoded.examples['label'])
            if not np.isfinite(logits).all():
                raise self._diverged(
                    f'after step {self.step} the outputs for the split {name!r} are not finite'
                )
            self.monitor.evaluation(self.step, name, results[name])
        self._judge(results)

    def _judge(self, results: dict[str, dict[str, float]]) -> None:
        """Keep the best adapter so far; without a validation split the last one is the best."""
        task, p = self.experiment.task, self.progress
        decisive = next(iter(results.values()), None)
        score = None if decisive is None else decisive[task.primary]
        if score is None or task.is_better(score, p.best):
            p.best, p.best_step, p.since_best = score, self.step, 0
            p.best_metrics = results
            adapter_folder.save(
                self.experiment.folder(jax.device_get(self.trainable)), self.workdir / 'adapter'
            )
        else:
            p.since_best += 1
        patience = self.config.training.patience
        if patience and p.since_best >= patience:
            p.finished = f'no improvement in {patience} evaluations'
        elif self.step >= self.total_steps:
            p.finished = 'all steps taken'

    def _save(self) -> None:
        if not _all_finite(self.trainable):
            raise self._diverged(f'after step {self.step} the trained parameters are not finite')
        p, sign = self.progress, 1 if self.experiment.task.higher_is_better else -1
        metric = sign * p.best if p.best is not None and p.best_step == self.step else None
        self.checkpoints.save(
            self.step,
            (self.trainable, self.opt_state),
            self.iterator,
            dataclasses.asdict(p),
            metric,
        )
        self.saved = self.step

    def _leave(self) -> None:
        self.checkpoints.wait()
        self.monitor.message(
            f'stopped by SIGTERM after step {self.step}; the same command goes on from there'
        )
        raise Stopped(128 + signal.SIGTERM)

    def _finish(self) -> dict[str, Any]:
        p = self.progress
        tuned, frozen = params.count(self.trainable), params.count(self.frozen)
        return {
            'finished': p.finished,
            'steps': self.step,
            'best_step': p.best_step,
            'primary': self.experiment.task.primary,
            'metrics': p.best_metrics,
            'trainable_parameters': tuned,
            'total_parameters': tuned + frozen,
            'seconds': round(p.seconds, 3),
            'examples_per_second': round(p.examples / max(p.seconds, 1e-9), 2),
            'padding': round(self.padding, 4),
            'compilations': self.train_step._cache_size(),
            'peak_memory_bytes': monitor.peak_memory_bytes(),
            'seed': self.config.seed,
            **provenance.describe(),
        }


@jax.jit
def _all_finite(tree: params.Tree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
