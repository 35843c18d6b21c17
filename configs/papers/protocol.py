"""What the configs of papers share: how they are asked for, and what is small at small scale.

Each is a sweep: `configs/papers/PAPER.py:task=...,way=...[,scale=small]`. `way` is a row of the
paper's tables, `task` one of GLUE or of configs/text_sets.py; `task=rte@100` trains with 100 of its
examples. At full scale the settings are those published, on the paper's own backbone and data; at
small scale the same rows are trained on MiniLM and 1,000 examples of short texts (TREC, CR, MPQA),
200 steps each, with learning rates of MiniLM's own and one recipe for all papers, so that two cores
get through it. Where a paper says one thing and its published code another, `source=paper` and
`source=code` are both there.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from adapters_jax.config import Config, parse_arg
from adapters_jax.data import glue as glue_tasks
from configs import glue, text_sets

RATE, EPOCHS, SEED = 'optimizer.learning_rate', 'training.epochs', 'seed'
SCALES, BOTH = ('full', 'small'), ('paper', 'code')
SMALL_TASKS = ('trec', 'cr', 'mpqa')
SMALL_EXAMPLES, SMALL_STEPS = 1000, 200
LABELS = {'trec': tuple('012345')}
SMALL_RATES = (1e-3, 3e-3)  # of what trains few parameters
FULL_RATES = (1e-4, 3e-4)  # of what trains the backbone, at small scale
Axes = Mapping[str, tuple[Any, ...]]


@dataclasses.dataclass(frozen=True)
class Way:
    """A row of a paper: its method, and the axes of its sweep at full and at small scale."""

    method: str
    axes: Axes
    small: Axes = dataclasses.field(default_factory=lambda: {RATE: SMALL_RATES})


def full(axes: Axes) -> Way:
    """Return full fine-tuning; at small scale it is that of all papers, and is trained once."""
    return Way('full', axes, {RATE: FULL_RATES})


def ask(
    argument: str | None, ways: Mapping[str, Way], versions: Sequence[str] = ('paper',), **more: Any
) -> Config:
    """Parse what a paper's config is asked for; `versions` are the values of `source` that differ.

    Raises:
        ValueError: an unknown key, way, scale or source.
    """
    defaults = {'task': 'rte', 'way': next(iter(ways)), 'scale': 'full', 'source': 'paper'}
    given = parse_arg(argument, **defaults, backbone='', seeds=0, **more)
    name, at, examples = given.task.partition('@')
    if glue_tasks.key_of(name) in glue_tasks.TASKS:
        given.task = glue_tasks.key_of(name) + at + examples
    for key, known in (('way', tuple(ways)), ('scale', SCALES), ('source', versions)):
        if given[key] not in known:
            raise ValueError(f'{key} is {given[key]!r}; expected one of {", ".join(known)}')
    return given


def whole(task: str) -> str:
    """Return the name of a task of which some examples are taken: 'rte' of 'rte@100'."""
    return task.partition('@')[0]


def sweep(given: Config, way: Way, backbone: str, seeds: int) -> Config:
    """Return the sweep of a row: the task's data, the scale's backbone, and the grid.

    `backbone` and `seeds` are the paper's. At small scale nothing is left to be set.
    """
    small = given.scale == 'small'
    config = task(given.task, way.method, given.backbone or ('minilm' if small else backbone))
    config.optimizer.schedule, config.training.patience = 'linear', 0
    if small:
        make_small(config)
    own = way.small if small else way.axes
    grid = dict(own) | {SEED: tuple(range(given.seeds or (3 if small else seeds)))}
    config.sweep.grid = tuple(f'{key}={",".join(map(str, own))}' for key, own in grid.items())
    return config


def task(name: str, method: str, backbone: str) -> Config:
    """Return the config of a task of GLUE, or of a set of configs/text_sets.py; `name@100` of few.

    Raises:
        ValueError: a number of examples that is none.
    """
    name, _, examples = name.partition('@')
    if examples and not examples.isdecimal():
        raise ValueError(f'task has @{examples}; expected a number of examples, as in rte@100')
    is_glue = name in glue_tasks.TASKS
    if not is_glue and name not in text_sets.FILES:
        known = ', '.join((*glue_tasks.TASKS, *text_sets.FILES))
        raise ValueError(f'unknown task {name!r}; known: {known}')
    kind = glue if is_glue else text_sets
    config = kind.get_config(f'task={name},backbone={backbone}')
    config.method = method
    config.data.train_limit = int(examples or 0)
    # Few examples may lack a class that the other splits have.
    config.task.labels = config.task.labels or LABELS.get(name, ())
    return config


def make_small(config: Config) -> None:
    """Train with few examples and steps; the best of four evaluations is kept."""
    config.data.train_limit = config.data.train_limit or SMALL_EXAMPLES
    config.training.batch_size = 32
    config.training.steps = SMALL_STEPS
    config.training.evaluate_every = SMALL_STEPS // 4
    config.optimizer.warmup = 0.1
