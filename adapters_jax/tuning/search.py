"""A search: batches of trials, proposed by Optuna, trained as populations, and put on record.

Everything that decides - what is proposed, who trains with whom, who ends early - follows from the
config and from what is on record. So a search that is killed, wherever, goes on as if it had not
been: trials that run are gone on with from their checkpoints, and those that ended stay.
"""

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from adapters_jax.config import Config
from adapters_jax.training import experiment, grid, ranking
from adapters_jax.training.members import load as load_members
from adapters_jax.tuning import populations, pruning, space
from adapters_jax.tuning.pruning import Rule
from adapters_jax.tuning.study import FINISHED, Outcome, Study, check_sampler

_LOG = logging.getLogger(__name__)
STUDY = 'study.db'
_NOT_POSSIBLE = 'not possible'
BATCH = 8  # trials that are proposed at a time, where sweep.size does not say


def check(config: Config) -> list[grid.Member]:
    """Refuse a search that could not be made, without reading data.

    Returns members in which each value of a list and each end of a range occurs; none is trained.

    Raises:
        ValueError: a mistake in the sweep's own keys, or a value that is one with any others.
    """
    if config.sweep.grid:
        raise ValueError(
            f'sweep.grid is {config.sweep.grid!r} and sweep.space is {config.sweep.space!r}; '
            'expected one of them: a grid is trained whole, a space is searched'
        )
    if config.sweep.recommend:
        raise ValueError(
            'sweep.recommend compares the members of a sweep.grid, and there is a sweep.space; '
            'set sweep.recommend to False'
        )
    if config.sweep.trials < 1:
        raise ValueError(f'sweep.trials is {config.sweep.trials}; expected 1 or more')
    check_sampler(config.sweep.sampler, config.sweep.seed)
    pruning.rule_of(config)
    dimensions = space.parse(config.sweep.space)
    for key, dimension in dimensions.items():
        alone = [grid.make_member(config, f'{key}={end}', {key: end}) for end in dimension.ends]
        grid.check_differ(alone, space.SPACE)
    return _examples(config, dimensions)


def _examples(config: Config, dimensions: Mapping[str, space.Dimension]) -> list[grid.Member]:
    """Return few members that can be trained, in which each end of each dimension occurs."""
    found: list[dict[str, str]] = []
    members = []
    for key, dimension in dimensions.items():
        for number, end in enumerate(dimension.ends):
            if all(texts[key] != end for texts in found):
                texts, member = _possible(config, space.examples(dimensions, key, number))
                found.append(texts)
                members.append(member)
    return members


def _possible(
    config: Config, combinations: Iterable[dict[str, str]]
) -> tuple[dict[str, str], grid.Member]:
    """Return the first combination that can be trained, and as a member.

    Values may exclude one another: a trial that draws such is passed by.

    Raises:
        ValueError: none can; what is wrong with the last.
    """
    for texts in combinations:
        try:
            member = grid.make_member(config, 'example', texts)
            populations.check(member.config)
        except ValueError as error:
            refusal = error
        else:
            return texts, member
    raise refusal


def open_study(config: Config, workdir: Path, higher_is_better: bool) -> Study:
    """Return the study of a search in this workdir, begun where there is none.

    Raises:
        ValueError, files.DiskError: as `Study`.
    """
    drawn = space.distributions(space.parse(config.sweep.space))
    return Study(workdir / STUDY, drawn, config.sweep.sampler, config.sweep.seed, higher_is_better)


def search(
    config: Config,
    workdir: Path,
    build: populations.Builder,
    run: experiment.Experiment,
    study: Study,
) -> None:
    """Make the search that a config describes, until all trials of its study have ended.

    `run` is the experiment of one of the members.
    """
    rule = pruning.rule_of(config, run.task.higher_is_better)
    batches = study.batches(config.sweep.size or BATCH, config.sweep.trials)
    for number, numbers in enumerate(batches):
        _LOG.info('trials %d to %d of %d', numbers[0] + 1, numbers[-1] + 1, config.sweep.trials)
        batch = {n: member_of(config, study, n) for n in numbers}
        _train(config, workdir, build, run, study, rule, batch, number)


def member_of(config: Config, study: Study, number: int) -> grid.Member:
    """Return a trial as the member that is trained for it."""
    texts = space.texts_of(study.trials[number].params)
    return grid.make_member(config, f'trial-{number:04d}', texts)


def _train(
    config: Config,
    workdir: Path,
    build: populations.Builder,
    run: experiment.Experiment,
    study: Study,
    rule: Rule,
    batch: Mapping[int, grid.Member],
    number: int,
) -> None:
    """Train a batch of trials, one population after another, and put on record how each ended.

    What a population is pruned by is what is on record when it begins; that is the same after a
    kill, because it ends whole before the next one begins.
    """
    possible = {}
    for trial, member in batch.items():
        refusal = _refusal(member, run)
        if refusal:
            _pass_by(study, {trial: member}, refusal)
        else:
            possible[member.name] = trial
    groups = grid.populations([batch[trial] for trial in possible.values()], 0)
    for i, group in enumerate(groups):
        prune = functools.partial(pruning.prune, rule, study.ended)
        try:
            populations.train(build, group, workdir, f'{number}-{i}', config.sweep.chunk, prune)
        except populations.NotPossibleError as error:
            _pass_by(study, {possible[member.name]: member for member in group}, str(error))
        else:
            for member in group:
                study.tell(possible[member.name], _outcome(member, workdir))


def _pass_by(study: Study, trials: Mapping[int, grid.Member], why: str) -> None:
    for trial, member in trials.items():
        _LOG.warning('%s cannot be trained: %s', member.name, why)
        study.tell(trial, Outcome(None, [], f'{_NOT_POSSIBLE}: {why}'))


def _refusal(member: grid.Member, run: experiment.Experiment) -> str:
    """Return why a combination that was drawn cannot be trained; empty where it can."""
    try:
        populations.check(member.config)
        if member.config.backbone == run.config.backbone:
            members = load_members(member.config)
            model = experiment.make_model(member.config, members, run.task, run.backbone)
            populations.check_trained(model, member.config, run)
    except ValueError as error:
        return str(error)
    return ''


def _outcome(member: grid.Member, workdir: Path) -> Outcome:
    row = populations.row(member, workdir)
    score = None if row.score is None or math.isnan(row.score) else row.score
    total = populations.read_summary(member, workdir).get('total_steps', 0)
    return Outcome(score, populations.scores(member, workdir), row.state, total)


def rows(config: Config, workdir: Path, study: Study) -> list[ranking.Row]:
    """Return what came of every trial, in order of merit."""
    found = []
    for trial in study.trials:
        member, finished = member_of(config, study, trial.number), trial.user_attrs[FINISHED]
        if finished.startswith(_NOT_POSSIBLE):
            found.append(ranking.Row(member.name, member.settings, None, 0, 0, finished))
        else:
            found.append(populations.row(member, workdir))
    return ranking.rank(found, study.higher_is_better)
