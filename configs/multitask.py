"""Several tasks in one run over one backbone, an adapter and a head for each (GLUE, or your own).

    python -m adapters_jax.train --config=configs/multitask.py:tasks=rte+stsb,mixing=annealed \
        --config.data.dir=GLUE --workdir=W       # GLUE/RTE/train.tsv, ...; omit for the hub
    python -m adapters_jax.evaluate --workdir=W --split=validation
    python -m adapters_jax.predict --adapter=W/adapter/rte --input=in.jsonl --output=out.jsonl

A name that is no GLUE task is one of your own, of classes unless told otherwise:

    python -m adapters_jax.train --config=configs/multitask.py:tasks=topic+stars --workdir=W \
        --config.tasks.topic.data.train=topics.csv --config.tasks.stars.data.train=stars.csv \
        --config.tasks.stars.task.name=regression
"""

from adapters_jax.config import Config, add_task, base, parse_arg
from adapters_jax.data import glue


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(
        argument, tasks='rte+stsb', method='pfeiffer', backbone='minilm', mixing='proportional'
    )
    config = base()
    config.backbone = given.backbone
    config.method = given.method
    config.mixing.schedule = given.mixing
    config.training.epochs = 10.0
    for given_name in given.tasks.split('+'):
        key = glue.key_of(given_name)
        if key in glue.TASKS:
            _set_glue(add_task(config, key), key)
        else:
            add_task(config, given_name)
    return config


def _set_glue(section: Config, name: str) -> None:
    task = glue.task(name)
    section.data.glue = name
    section.task.name = 'classification' if task.labels else 'regression'
    section.task.labels = task.labels
    section.task.metrics = task.metrics
    section.task.primary = task.primary
