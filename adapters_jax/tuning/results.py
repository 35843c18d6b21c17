"""What a sweep leaves in its workdir when all members have ended: values, tables, pictures.

Everything in sweep.json follows from the seed, but what is under `measured` and what says by which
software it was made.
"""

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from adapters_jax import files, processes
from adapters_jax.config import Config
from adapters_jax.tasks.task import Task
from adapters_jax.training import grid, provenance, ranking
from adapters_jax.training.experiment import Experiment
from adapters_jax.training.population_run import PopulationRun
from adapters_jax.training.ranking import Row
from adapters_jax.training.run import NonFiniteLossError
from adapters_jax.tuning import choose, costs, populations, report, search
from adapters_jax.tuning.choose import Candidate
from adapters_jax.tuning.populations import MEMBERS
from adapters_jax.tuning.study import Study

_LOG = logging.getLogger(__name__)
RESULT, TABLE, BEST, COSTS = 'sweep.json', 'sweep.md', 'best', 'costs.json'
RECOMMENDED, SEARCH_PLOT, CHOICE_PLOT = 'recommended', 'sweep.png', 'choose.png'


def written(result: Mapping[str, Any]) -> list[str]:
    """Return the names of what a sweep with this result leaves."""
    names = [f'{BEST}/', TABLE, RESULT, f'{MEMBERS}/', 'config.json']
    if 'importance' in result:
        return [*names, SEARCH_PLOT, search.STUDY]
    return [f'{RECOMMENDED}/', CHOICE_PLOT, *names] if 'recommended' in result else names


@dataclasses.dataclass(frozen=True)
class Results:
    """The end of a sweep in a workdir; every process calls what it calls."""

    config: Config
    workdir: Path
    task: Task

    def of_grid(
        self, members: Sequence[grid.Member], measured: Mapping[str, Any] | None = None
    ) -> None:
        """Rank a grid's members; with what was `measured` of them, recommend one.

        Raises:
            NonFiniteLossError, ValueError: see `_refuse_none`.
        """
        better = self.task.higher_is_better
        rows = ranking.rank([populations.row(m, self.workdir) for m in members], better)
        told = {'settings': ranking.over_seeds(rows, better)}
        text = ranking.markdown(rows, self.task.primary)
        with processes.together():
            if processes.is_writer():
                _refuse_none(rows)
                if measured is not None:
                    told |= self._choice(members, rows, measured)
                    text = choose.markdown(told | {'primary': self.task.primary}, text)
                self._write(rows, text, told)

    def of_search(self, study: Study) -> None:
        """Rank the trials of a search, and write what mattered.

        Raises:
            NonFiniteLossError, ValueError: see `_refuse_none`.
        """
        rows = search.rows(self.config, self.workdir, study)
        importance = report.importances(study, self.config.sweep.seed)
        with processes.together():
            if processes.is_writer():
                _refuse_none(rows)
                told = {'importance': importance, 'trials': report.counts(study)}
                self._draw_search(study, importance)
                self._write(rows, report.markdown(told, rows, self.task.primary), told)

    def costs(
        self, members: Sequence[grid.Member], run: Experiment, runs: Sequence[PopulationRun]
    ) -> dict[str, Any]:
        """Return what each method costs, measured once in a workdir."""
        path = self.workdir / COSTS
        if not all(processes.gather(path.exists())):
            by_method = {member.config.method: member.config for member in members}
            _LOG.info('compiling and timing %d methods, before anything is trained', len(by_method))
            found = costs.inference(by_method, run)
            seconds = costs.training(runs)
            values = {
                'inference': {method: dataclasses.asdict(cost) for method, cost in found.items()},
                'training': seconds,
            }
            if processes.is_writer():
                files.write_json(path, values)
        processes.barrier()
        return json.loads(path.read_text('utf-8'))

    def _choice(
        self, members: Sequence[grid.Member], rows: Sequence[Row], measured: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Recommend a method; copy its adapter, and draw all of them."""
        given, better = self.config.sweep, self.task.higher_is_better
        by_name = {member.name: member for member in members}
        found = [self._candidate(by_name[row.name], row, measured) for row in rows]
        candidates = choose.best_of_each(found, better)
        chosen = choose.recommend(candidates, given.margin, given.cost, better)
        from adapters_jax.tuning import plots  # matplotlib takes a second to load

        line = choose.frontier(candidates, better)
        figure = plots.pareto(candidates, line, chosen, self.task.primary)
        plots.save(figure, self.workdir / CHOICE_PLOT)
        self._copy(chosen.member, RECOMMENDED)
        return {
            'recommended': dataclasses.asdict(chosen),
            'reason': choose.reason(chosen, candidates, self.config, self.task.primary),
            'frontier': [candidate.method for candidate in line],
            'candidates': [dataclasses.asdict(candidate) for candidate in candidates],
            'measured': {
                c.method: {
                    'inference': measured['inference'][c.method]['seconds'],
                    'training': measured['training'][c.member],
                }
                for c in candidates
            },
        }

    def _candidate(self, member: grid.Member, row: Row, measured: Mapping[str, Any]) -> Candidate:
        summary = populations.read_summary(member, self.workdir)
        method = member.config.method
        return Candidate(
            method=method,
            member=row.name,
            settings={k: v for k, v in row.settings.items() if not k.startswith('method')},
            score=row.score,
            steps=row.steps,
            ended=ranking.ended_whole(row.state),
            parameters=summary['trainable_parameters'],
            flops=round(measured['inference'][method]['flops'], 6),
        )

    def _draw_search(self, study: Study, importance: Mapping[str, float]) -> None:
        from adapters_jax.tuning import plots

        scores, so_far = report.history(study)
        figure = plots.search(scores, so_far, importance, self.task.primary)
        plots.save(figure, self.workdir / SEARCH_PLOT)

    def _write(self, rows: Sequence[Row], text: str, told: Mapping[str, Any]) -> None:
        """Copy the best member's adapter, and write the table and, last, the values."""
        self._copy(rows[0].name, BEST)
        files.write_text(self.workdir / TABLE, text)
        result = {
            'best': rows[0].name,
            'primary': self.task.primary,
            'members': [dataclasses.asdict(row) for row in rows],
            **told,
            **provenance.describe(),
        }
        files.write_json(self.workdir / RESULT, result)

    def _copy(self, member: str, name: str) -> None:
        with files.atomic(self.workdir / name) as temporary:
            shutil.copytree(self.workdir / MEMBERS / member / 'adapter', temporary)


def _refuse_none(rows: Sequence[Row]) -> None:
    """Refuse a sweep of which nothing can be ranked.

    Raises:
        NonFiniteLossError: no member has a score, and some diverged.
        ValueError: no member has a score, for other reasons.
    """
    if rows[0].score is not None:
        return
    told = '; '.join(f'{row.name}: {row.state}' for row in rows[:5])
    what = f'all {len(rows)} members of the sweep have no score ({told}); try'
    if any(row.state.startswith('diverged') for row in rows):
        raise NonFiniteLossError(
            f'{what} lower values of optimizer.learning_rate, a longer optimizer.warmup or a '
            'smaller optimizer.clip_norm, in another --workdir'
        )
    raise ValueError(f'{what} other values in another --workdir')
