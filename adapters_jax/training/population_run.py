"""The run of a population: one loop, in which each member has its own progress, files and end.

A member's folder is what `train` would have left of it. Members end one by one; the population goes
on until the last one has.
"""

import contextlib
import dataclasses
import functools
import io
import logging
import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
from jax.sharding import Mesh, NamedSharding

from adapters_jax import config as configs
from adapters_jax import files, params, processes, sharding
from adapters_jax.interop import adapter_folder
from adapters_jax.params import Tree
from adapters_jax.training import grid, population
from adapters_jax.training.dtypes import choose_frozen_dtype
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.monitor import Monitor
from adapters_jax.training.optimizer import OptimizerConfig, Rates, make_optimizer, make_schedule
from adapters_jax.training.placement import make_mesh
from adapters_jax.training.population import State, Traits
from adapters_jax.training.progress import CONFIG, SUMMARY, Progress, Results
from adapters_jax.training.run import Run
from adapters_jax.training.widening import widen

_LOG = logging.getLogger(__name__)
# How much of a step may be computed twice for members to have devices of their own.
_REPEATED = 0.1
# Of each member the steps of its evaluations and the scores there, where they are numbers.
Scores = dict[str, list[tuple[int, float]]]
# Who of the members alive ends after an evaluation, and why: of (scores, alive, steps of the run).
Prune = Callable[[Scores, Sequence[str], int], Mapping[str, str]]


@dataclasses.dataclass
class PopulationProgress:
    """The time taken, and every member's progress and scores by name."""

    seconds: float
    members: dict[str, Progress]
    scores: Scores


class PopulationRun(Run):
    """Members of a sweep that are trained together; `experiment` is that of the first one."""

    def __init__(
        self,
        experiment: Experiment,
        members: Sequence[grid.Member],
        workdir: Path,
        folder: Path,
        chunk: int = 0,
        prune: Prune | None = None,
    ) -> None:
        """Prepare everything short of the first step.

        The population's checkpoints and log go to `workdir`, the members' to `folder`/NAME. In a
        step, `chunk` members are computed at a time (0: as many as is fast on this device).
        `prune` is asked after every evaluation; what it says must follow from its arguments and
        from what is on the disk when the run begins, or a run that was killed would end others.
        """
        self.members, self.folder, self.prune = members, folder, prune
        self.ended: dict[str, str] = {}
        self.chunk = chunk or population.default_chunk()
        self.names = [member.name for member in members]
        super().__init__(experiment, workdir)

    def _make_mesh(self) -> Mesh:
        mesh = make_mesh(self.config, members=len(self.members))
        if sharding.MEMBERS not in mesh.axis_names:
            return mesh
        # Each device that has members of its own computes the trunk for all rows.
        repeated = (mesh.size - 1) * self._trunk_share
        return mesh if repeated < _REPEATED else make_mesh(self.config)

    @property
    def _trunk_share(self) -> float:
        """The part of a step's layers, forward and backward, that a trunk computed in it has."""
        if self.config.training.trunk_cache != 'none':
            return 0.0
        model, shapes = self.experiment.model, jax.eval_shape(self.experiment.init_params)
        below = model.trunk(shapes).layer if model.can_begin_above_trunk(shapes) else 0
        above = 2 * len(self.members) * (model.config.depth - below)
        return below / (below + above)

    def _prepare_state(self) -> None:
        self.model, self.own = widen(self.experiment, self.members, self.folder)
        self.workdirs = [own.workdir for own in self.own]
        members = {name: Progress() for name in self.names}
        self.progress = PopulationProgress(0.0, members, {name: [] for name in self.names})
        trainable = population.stack([own.trainable for own in self.own])
        common, different = population.split_common(
            [{b: own.frozen.get(b, {}) for b in ('adapters', 'heads')} for own in self.own]
        )
        backbone = {'backbone': self.own[0].frozen.get('backbone', {})}
        frozen = params.merge(backbone, common)
        stored = choose_frozen_dtype(self.config)
        self.frozen = self.placement.frozen(frozen, stored)
        # In 8 bits are matrices of the backbone alone.
        beside = np.float32 if stored == np.int8 else stored
        self.inputs = self._make_inputs(params.cast(different, beside))
        # The rules of where leaves lie are for leaves without an axis of members.
        self.state = self._make_state(sharding.place(trainable, np.float32, self._by_members))
        self.train_step = population.jit_population_step(
            self.state,
            self.mesh,
            model=self.model,
            task=self.experiment.task,
            make_optimizer=self._make_optimizer,
            chunk=self.chunk,
            **self.step_options,
        )
        self._forward = population.jit_population_outputs(
            self.model, self.chunk, self.experiment.task, self.mesh
        )
        self._pick = jax.jit(population.unstack, out_shardings=self.placement.everywhere)

    def share_backbone(self, known: dict[Hashable, jax.Array]) -> None:
        """Take the frozen leaves of the backbone from those `known`, and add what is not there.

        Runs that share one dictionary hold each leaf once. A step is given only its state for good,
        so that nobody changes them.
        """
        fingerprint = self.experiment.backbone.fingerprint

        def shared(path: Any, leaf: jax.Array) -> jax.Array:
            parts = tuple((part.device.id, str(part.index)) for part in leaf.addressable_shards)
            key = fingerprint, sharding.name_of(path), leaf.dtype, parts
            same = known.setdefault(key, leaf)
            if same.sharding == leaf.sharding:
                return same
            # A mesh with members and one with rows put the same parts on the same devices.
            held = [part.data for part in same.addressable_shards]
            return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, held)

        backbone = jax.tree_util.tree_map_with_path(shared, self.frozen['backbone'])
        self.frozen = {**self.frozen, 'backbone': backbone}

    def _make_inputs(self, constants: Tree) -> Traits:
        """Return what tells the members apart in a step."""
        seeds = [member.config.seed for member in self.members]
        keys = [jax.random.fold_in(jax.random.key(seed), 1) for seed in seeds]
        optimizers = [member.config.optimizer for member in self.members]
        inputs = Traits(
            key=jax.numpy.stack(keys),
            learning_rate=np.float32([o.learning_rate for o in optimizers]),
            weight_decay=np.float32([o.weight_decay for o in optimizers]),
            multipliers=population.stack([own.multipliers for own in self.own]),
            constants=constants,
        )
        return sharding.put(inputs, self._by_members)

    def _make_state(self, trainable: Tree) -> State:
        init = jax.vmap(self._make_optimizer(1.0, 0.0).init)
        opt_state = jax.jit(init, out_shardings=self._by_members)(trainable)
        return State(trainable, opt_state, self._alive())

    def _alive(self) -> jax.Array:
        alive = np.array([not p.finished for p in self.progress.members.values()])
        return sharding.put(alive, self._by_members)

    @property
    def _by_members(self) -> NamedSharding:
        return sharding.by_members(self.mesh)

    @functools.cached_property
    def _optimizer_config(self) -> OptimizerConfig:
        return OptimizerConfig(**self.config.optimizer.to_dict())

    def _make_optimizer(self, learning_rate: Any, weight_decay: Any) -> Any:
        inner = make_optimizer(
            self._optimizer_config, self.total_steps, learning_rate, weight_decay
        )
        return self.model.method.optimizer(inner, self.total_steps)

    @functools.cached_property
    def _rates(self) -> Rates:
        peaks = np.float32([member.config.optimizer.learning_rate for member in self.members])
        return Rates(make_schedule(self._optimizer_config, self.total_steps, peaks))

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on: the members' own settings too."""
        return super().identity | {
            'members': {member.name: configs.decisive(member.config) for member in self.members}
        }

    @property
    def finished(self) -> bool:
        """Whether every member is."""
        return all(p.finished for p in self.progress.members.values())

    def run(self, until: int = 0) -> dict[str, Any]:
        """As every run; but a signal that came too late for a step still ends the process.

        It came in the last evaluation, or while files were closed. For a run alone there is nothing
        left to stop; here the next population, or the next rung, would begin.
        """
        summaries = super().run(until)
        if any(processes.gather(self._stop_signal is not None)):
            self._leave(_LOG.warning)
        return summaries

    def _restore_progress(self, values: dict[str, Any]) -> None:
        members = {name: Progress(**values['members'][name]) for name in self.names}
        # Checkpoints of before there were searches have no scores.
        scores = {name: values.get('scores', {}).get(name, []) for name in self.names}
        self.progress = PopulationProgress(values['seconds'], members, scores)

    def end(self, reasons: Mapping[str, str]) -> None:
        """Let members end, with a reason each, when the run goes on; those that have ended stay.

        A run that is to end members between two of its parts (`run(until)`) is told so each time.
        """
        self.ended |= reasons

    def _resume(self) -> None:
        super()._resume()
        self._end(self.ended)

    def _end(self, reasons: Mapping[str, str]) -> None:
        for name, reason in reasons.items():
            if not self.progress.members[name].finished:
                self.progress.members[name].finished = reason
                self._tell(self.names.index(name), reason)
        self.state = self.state.replace(alive=self._alive())

    @contextlib.contextmanager
    def _monitored(self) -> Iterator[None]:
        """Open the members' files, and the population's last: the screen and the log are its."""
        with contextlib.ExitStack() as stack:
            self.monitors: list[Monitor] = []
            for own, member in zip(self.own, self.members, strict=True):
                stack.enter_context(processes.locked(own.workdir))
                if processes.is_writer():
                    files.write_json(own.workdir / CONFIG, configs.to_json(member.config))
                silent = rich.console.Console(file=io.StringIO(), quiet=True)
                monitor = self._make_monitor(own.workdir, console=silent)
                self.monitors.append(stack.enter_context(monitor))
            with super()._monitored():
                yield

    def _sync_metrics(self) -> None:
        for monitor in self.monitors:
            monitor.sync()

    def _start_monitor(self) -> None:
        for monitor in self.monitors:
            monitor.start(self.step)
        super()._start_monitor()

    def _announce(self) -> None:
        count = params.count(self.state.trainable) // len(self.members)
        self.monitor.message(
            f'{len(self.members)} members of {count:,} trainable parameters each, padding included'
        )
        self._announce_trunk(params.merge(self.state.trainable, self.frozen))
        super()._announce()

    def _advance(self, batch: Mapping[str, jax.Array]) -> Any:
        self.state, metrics = self.train_step(
            self.state, self.inputs, self.frozen, batch, np.int32(self.step)
        )
        return metrics

    def rehearse(self) -> Callable[[], Any]:
        """Return a function that takes a step with copies, so that nothing of the run changes.

        It is for a run that has not begun; a call ends when the devices are asked, not when they
        are done.
        """
        position = self.iterator.get_state()
        batch = self._next_batch()
        self.iterator.set_state(position)
        copies = [jax.tree.map(jax.numpy.copy, self.state)]

        def step() -> Any:
            copies[0], metrics = self.train_step(
                copies[0], self.inputs, self.frozen, batch, np.int32(0)
            )
            return metrics

        return step

    def _record(self, pending: tuple[int, Any] | None) -> None:
        """Read a step's metrics, and hand on those of the members that it moved."""
        if pending is None:
            return
        step, values = pending[0], jax.device_get(pending[1])
        values['learning_rate'] = self._rates(step - 1)
        good, losses = values.pop('good'), []
        for i, progress in enumerate(self.progress.members.values()):
            if progress.finished:
                continue
            own = {name: float(column[i]) for name, column in values.items()}
            if not good[i]:
                numbers = f'{own["loss"]} (gradient norm {own["gradient_norm"]})'
                progress.seconds = self._seconds
                self._give_up(i, step, f'the loss of step {step} is {numbers}')
                continue
            progress.examples += int(own['examples'])
            self.monitors[i].train(step, own)
            losses.append(own['loss'])
        if losses:
            shown = {'loss': float(np.mean(losses)), 'members': len(losses)}
            self.monitor.train(step, shown | {'examples': float(values['examples'].max())})

    def _give_up(self, index: int, step: int, what: str) -> None:
        """Mark a member whose numbers are none any more; its state is that before the step."""
        name = self.names[index]
        progress = self.progress.members[name]
        progress.finished, progress.steps = f'diverged: {what}', step - 1
        self._tell(index, f'diverged: {what}; it stays at the step before')

    def _tell(self, index: int, what: str) -> None:
        """Say what became of a member, in its own log and in the population's."""
        for one in (self.monitors[index], self.monitor):
            one.message(f'{self.names[index]} {what}')

    def forward(self, trainable: Tree, frozen: Tree, batch: Mapping[str, jax.Array]) -> jax.Array:
        """Return the outputs of all members, [B, S, N, W]; of those that ended perhaps zeros."""
        state = self.state.replace(trainable=trainable, opt_state=())
        return self._forward((state, self.inputs), frozen, batch)

    def _evaluate(self) -> None:
        logits = {name: self._outputs(name, self.state.trainable) for name in self.eval_policies}
        for i, progress in enumerate(self.progress.members.values()):
            if not progress.finished:
                progress.seconds = self.progress.seconds
                self._judge(i, {name: values[:, i] for name, values in logits.items()})
        alive = [name for name, p in self.progress.members.items() if not p.finished]
        chosen = self.prune(self.progress.scores, alive, self.total_steps) if self.prune else {}
        self._end(chosen)
        self._report()

    def _judge(self, index: int, logits: Mapping[str, np.ndarray]) -> None:
        """Score a member, keep its adapter if it is its best so far, and end it if it is done."""
        run, progress = self.experiment, self.progress.members[self.names[index]]
        for name, values in logits.items():
            if not np.isfinite(values).all():
                what = f'after step {self.step} the outputs for the split {name!r} are not finite'
                self._give_up(index, self.step, what)
                return
        own = self.own[index]
        settled = own.experiment
        for name, values in list(logits.items())[:1]:
            settled = settled.tuned(name, values)  # the first one decides
        results: Results = {name: settled.score(name, values) for name, values in logits.items()}
        for name, values in results.items():
            self.monitors[index].evaluation(self.step, name, values)
        score = next(iter(results.values()))[run.task.primary] if results else math.nan
        if not math.isnan(score):
            self.progress.scores[self.names[index]].append((self.step, float(score)))
        if progress.judge(run.task, results, self.step):
            # Every process comes here, or none: they have the same scores.
            trainable = sharding.to_host(self._pick(self.state.trainable, np.int32(index)))
            leaves = population.unpad(trainable, own.shapes)
            if processes.is_writer():
                adapter_folder.save(settled.folder(leaves), own.workdir / 'adapter')
        progress.stop(self.config.training.patience, self.step >= self.total_steps)
        progress.steps = self.step

    def _report(self) -> None:
        """Show the best score so far, and whose it is."""
        task, best = self.experiment.task, None
        for name, progress in self.progress.members.items():
            if progress.best is not None and task.is_better(progress.best, best and best[0]):
                best = progress.best, name
        split = next(iter(self.eval_policies), None)
        if best is not None and split is not None:
            self.monitor.evaluation(self.step, split, {task.primary: best[0], 'member': best[1]})

    def _save(self) -> None:
        self._save_checkpoint(None)

    def _finish(self) -> dict[str, Any]:
        """Write the summary of each member that has ended, and return them by name."""
        summaries = {}
        for own, member in zip(self.own, self.members, strict=True):
            progress = self.progress.members[own.name]
            if not progress.finished:
                continue
            summary = self._summary(progress, params.count(own.shapes), member.config.seed)
            summary |= {'population': len(self.members)}
            if processes.is_writer():
                files.write_json(own.workdir / SUMMARY, summary)
            summaries[own.name] = summary
        return summaries
