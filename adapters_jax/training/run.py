"""What every training run is: steps, evaluations, checkpoints, early stopping, a clean way out.

A run's whole state is (its arrays, step, position in the data, progress); all of it is in each
checkpoint, so a run that is killed at any instant goes on as if it had not been. What a step is and
what is noted of it depends on what is trained: one adapter (`loop`) or many (`population_run`).
"""

import abc
import contextlib
import dataclasses
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from adapters_jax import files, params, processes, sharding
from adapters_jax.config import decisive
from adapters_jax.data import pipeline
from adapters_jax.data.policies import Policy
from adapters_jax.data.shares import Mixing
from adapters_jax.training import batching, evaluation, monitor, provenance, trunk
from adapters_jax.training.checkpoint import Checkpoints
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.placement import Placement, make_mesh
from adapters_jax.training.progress import (
    CHECKPOINTS,
    DATA,
    SUMMARY,
    Progress,
    share_of_steps,
)
from adapters_jax.training.state import step_options

# A scheduler's way to end a process, Ctrl-C, and the end of the terminal.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class NonFiniteLossError(FloatingPointError):
    """The loss or its gradient stopped being a number."""


class Stopped(SystemExit):
    """The process was asked to end by a signal and has saved its state."""


class Run(abc.ABC):
    """An experiment trained in a workdir."""

    state: Any  # the arrays that a step replaces
    frozen: params.Tree
    train_step: Any
    progress: Any  # has `seconds`, and is a dataclass of JSON values

    def __init__(self, experiment: Experiment, workdir: Path) -> None:
        """Prepare everything short of the first step."""
        self.config, self.workdir, self.experiment = experiment.config, workdir, experiment
        self.workdirs = [workdir]  # of each adapter that is trained
        self._check_patience()
        self.mesh = self._make_mesh()
        self.placement = Placement.of(self.config, self.mesh)
        # Its outputs are those of rows, also where the members of a population are spread.
        self.experiment = trunk.attach(experiment, make_mesh(self.config))
        self._prepare_data(self.placement.row_parts)
        self._prepare_state()
        self.step = self.saved = 0
        self._stop = processes.Request(self.mesh)
        self._stop_signal: signal.Signals | None = None

    def _check_patience(self) -> None:
        patience = self.config.training.patience
        if patience and not self.experiment.validation_splits:
            raise ValueError(
                f'training.patience is {patience}, but there is no validation split whose scores '
                'could end the run; name one under data, cut one off with data.split_fractions, or '
                'set training.patience=0'
            )

    def _make_mesh(self) -> Mesh:
        return make_mesh(self.config)

    def _prepare_data(self, devices: int) -> None:
        config, model = self.config, self.experiment.model
        self.data = self.experiment.splits['train']
        seed = config.seed if config.data.seed < 0 else config.data.seed
        policy, mixing = self._choose_batches(devices)
        self.plan = pipeline.Plans(self.data, policy, seed, mixing)(0)
        self.parts = batching.choose_parts(config, model, self.experiment.task, policy)
        self.rows = batching.filled_rows(config, self.plan.rows, devices, self.parts)
        self.padding = 1 - (1 - self.plan.padding) * self.plan.rows / self.rows
        self.steps_per_epoch = len(self.plan)
        self.total_steps = config.training.steps or max(
            1, share_of_steps(self.steps_per_epoch, config.training.epochs)
        )
        self.evaluate_every = config.training.evaluate_every or self.steps_per_epoch
        self.pad_id = model.config.pad_id
        # Shared out with the empty rows at the end, so any number of processes will do.
        first, last = sharding.own_rows(self.mesh, self.rows)
        self.own_rows = last - first
        held = min(first, self.plan.rows), min(last, self.plan.rows)
        transform = self.experiment.task.transform
        self.iterator = pipeline.train_batches(
            self.data,
            policy,
            seed,
            self.pad_id,
            mixing=mixing,
            rows=held,
            transform=lambda batch, epoch: transform(batch, seed, epoch),
        )
        self.eval_policies = {
            name: self._choose_evaluation(name, devices)
            for name in self.experiment.validation_splits
        }

    def _choose_batches(self, devices: int) -> tuple[Policy, Mixing | None]:
        """Return how examples lie in rows, and how several tasks share the batches."""
        lengths = self.data.sizes
        return batching.choose(self.config, self.experiment.model, lengths, devices, True), None

    def _choose_evaluation(self, split: str, devices: int) -> Policy:
        """Return how the examples of a validation split lie in rows."""
        lengths = self.experiment.splits[split].sizes
        return batching.choose(self.config, self.experiment.model, lengths, devices, False)

    @abc.abstractmethod
    def _prepare_state(self) -> None:
        """Make the arrays, the jitted step, and the progress of a run that has not begun."""

    @property
    @abc.abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to train."""

    @abc.abstractmethod
    def _advance(self, batch: Mapping[str, jax.Array]) -> Any:
        """Take a step; return its metrics, still on their way."""

    @abc.abstractmethod
    def _record(self, pending: tuple[int, Any] | None) -> None:
        """Read a step's metrics and hand them on."""

    @abc.abstractmethod
    def _evaluate(self) -> None:
        """Score the validation splits, keep what is the best, and stop what is done."""

    @abc.abstractmethod
    def _save(self) -> None:
        """Write a checkpoint."""

    @abc.abstractmethod
    def _restore_progress(self, values: dict[str, Any]) -> None:
        """Take up what a checkpoint says of the steps already taken."""

    @abc.abstractmethod
    def _finish(self) -> dict[str, Any]:
        """Return the summary."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on with the run that continues it."""
        run = self.experiment
        adapters = run.adapters_fingerprint
        return {
            'backbone_fingerprint': run.backbone.fingerprint,
            'backbone_architecture': run.backbone.architecture,
            'data_fingerprint': self.data.fingerprint(),
            # The best score so far is one on these.
            'validation_fingerprints': {
                name: run.fingerprints[name] for name in run.validation_splits
            },
            'config': decisive(self.config),
            # In no checkpoint where frozen: the folders must still hold what they held.
            **({'adapters_fingerprint': adapters} if adapters else {}),
        }

    @property
    def step_options(self) -> dict[str, Any]:
        """What the config says of a step."""
        return step_options(self.config, self.parts)

    def run(self, until: int = 0) -> dict[str, Any]:
        """Train to the end (from the last checkpoint, where there is one); return the summary.

        With `until`, pause after that many steps, with an evaluation and a checkpoint there; what
        is returned then is what the run can tell by that time. Another call goes on.
        """
        with (
            self._stoppable(),
            Checkpoints(self.workdir / CHECKPOINTS, self.identity) as self.checkpoints,
            self._monitored(),
        ):
            if not self.saved:  # and not again after a pause
                self._announce()
            self._resume()
            self._note_data()
            self._train(min(until or self.total_steps, self.total_steps))
        return self._finish()

    def _note_data(self) -> None:
        """Write which data these are, with which a checkpoint that there is agrees by now."""
        if processes.is_writer():
            for workdir in self.workdirs:
                files.write_json(workdir / DATA, self.experiment.fingerprints)

    @contextlib.contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let the first signal end the run after its step, and a second Ctrl-C at once."""
        if threading.current_thread() is not threading.main_thread():
            yield  # others may not handle signals
            return
        before = {number: signal.getsignal(number) for number in STOPPING}

        def request(number: int, frame: Any) -> None:
            if self._stop_signal and number == signal.SIGINT and callable(before[number]):
                before[number](number, frame)
            self._stop_signal = signal.Signals(number)
            self._stop.make()

        # What was ignored stays so: that is how `nohup` works.
        handled = {n: handler for n, handler in before.items() if handler != signal.SIG_IGN}
        for number in handled:
            signal.signal(number, request)
        try:
            yield
        finally:
            for number, handler in handled.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextlib.contextmanager
    def _monitored(self) -> Iterator[None]:
        with self._make_monitor(self.workdir) as self.monitor:
            yield

    def _make_monitor(self, workdir: Path, **options: Any) -> monitor.Monitor:
        return monitor.Monitor(
            workdir,
            self.total_steps,
            metric=self.experiment.task.primary,
            every=self.config.training.log_every,
            **options,
        )

    def _sync_metrics(self) -> None:
        self.monitor.sync()

    def _start_monitor(self) -> None:
        self.monitor.start(self.step)

    def _announce(self) -> None:
        self.monitor.message(
            f'{len(self.data):,} training examples, {self.steps_per_epoch} steps an epoch, '
            f'{self.total_steps} steps, {100 * self.padding:.1f} % padding'
            + (f', batches in {self.parts} parts' if self.parts > 1 else '')
        )

    def _announce_trunk(self, trainable: params.Tree) -> None:
        end = self.experiment.model.trunk(trainable)
        layers = self.experiment.backbone.config.depth
        self.monitor.message(
            f'layers 0 to {end.layer - 1} of {layers} are never differentiated'
            if end.layer
            else f'all {layers} layers are differentiated'
        )

    def _resume(self) -> None:
        abstract = jax.tree.map(_abstract, self.state)
        restored, before = self.checkpoints.restore(abstract, self.iterator), self.saved
        if restored is not None:
            self.state = restored.state
            self.step = self.saved = restored.step
            self._restore_progress(restored.progress)
            with processes.together():
                if processes.is_writer():
                    self._check_kept(restored.progress)
        self._start_monitor()
        if self.saved != before:
            self.monitor.message(f'continuing from the checkpoint of step {self.step}')

    def _check_kept(self, values: Mapping[str, Any]) -> None:
        """Refuse to go on without the best adapter so far: there may be no better one to come.

        Raises:
            FileNotFoundError: it is gone.
        """
        for workdir in self.workdirs:
            own = values['members'][workdir.name] if 'members' in values else values
            tasks = own.get('tasks', {})
            for adapter in [workdir / 'adapter' / name for name in tasks or ['']]:
                files.recover(adapter)
                if adapter.exists() or (workdir / SUMMARY).exists():  # who has ended needs none
                    continue
                if own['best_step']:
                    raise FileNotFoundError(
                        f'{adapter} is gone, which held the best adapter so far, that of step '
                        f'{own["best_step"]}: bring it back, or train again in another --workdir'
                    )

    def take_step(self) -> Any:
        """Take the next step, on the next batch; return its metrics, still on their way."""
        batch = self._next_batch()
        with jax.profiler.StepTraceAnnotation('train', step_num=self.step):
            metrics = self._advance(batch)
        self.step += 1
        return metrics

    def _next_batch(self) -> Any:
        _, batch = next(self.iterator)
        batch = batching.fill(batch, self.own_rows, self.pad_id)
        return sharding.put_batch(batch, self.mesh)

    def _train(self, until: int) -> None:
        every, pending = self.config.training.checkpoint_every, None
        self._since = time.monotonic()
        while self.step < until and not self.finished:
            metrics = self.take_step()
            stop = self._stop.at_step()
            # The metrics of the step before: the host never waits for the one under way.
            self._record(pending)
            pending = (self.step, metrics)
            evaluate = self.step % self.evaluate_every == 0 or self.step == until
            if evaluate or stop or (every and self.step % every == 0):
                self._record(pending)
                pending = None
                self.progress.seconds = self._seconds
                if evaluate:
                    self._evaluate()
                self._save()
                self._since = time.monotonic()
            if stop:
                self.checkpoints.wait()
                self._leave(self.monitor.message)

    @property
    def _seconds(self) -> float:
        """How long the steps took so far; asked between steps."""
        return self.progress.seconds + time.monotonic() - self._since

    def _outputs(self, split: str, trainable: params.Tree) -> Float[np.ndarray, 'S ...']:
        """Return the outputs for every example (or token) of a validation split, in order."""
        return evaluation.outputs(
            self.forward,
            trainable,
            self.frozen,
            self.experiment.splits[split],
            self.eval_policies[split],
            self.pad_id,
            self.mesh,
            per_token=self.experiment.task.per_token,
            transform=self.experiment.task.transform,
        )

    def _save_checkpoint(self, metric: float | None) -> None:
        self._sync_metrics()  # a checkpoint must never be ahead of them, whatever happens
        progress = dataclasses.asdict(self.progress)
        self.checkpoints.save(self.step, self.state, self.iterator, progress, metric)
        self.saved = self.step

    def _leave(self, tell: Callable[[str], None]) -> None:
        """Tell what stopped the run, and end the process in order; the state is saved by now."""
        number = self._stop_signal or signal.SIGTERM  # another process may have had it
        tell(
            f'stopped by {number.name} after step {self.step}; the same command goes on from there'
        )
        raise Stopped(128 + number)

    def _summary(self, progress: Progress, tuned: int, seed: int) -> dict[str, Any]:
        """Return the summary of one adapter with `tuned` trainable parameters."""
        return {
            'finished': progress.finished,
            'steps': self.step if progress.steps is None else progress.steps,
            'total_steps': self.total_steps,
            'best_step': progress.best_step,
            'primary': self.experiment.task.primary,
            'metrics': progress.best_metrics,
            'trainable_parameters': tuned,
            'total_parameters': tuned + params.count(self.frozen),
            'seconds': round(progress.seconds, 3),
            'examples_per_second': round(progress.examples / max(progress.seconds, 1e-9), 2),
            'padding': round(self.padding, 4),
            'compilations': self.train_step._cache_size(),
            'peak_memory_bytes': monitor.peak_memory_bytes(),
            'seed': seed,
            **provenance.describe(),
        }


def _abstract(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
