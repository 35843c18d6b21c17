"""The nine GLUE tasks (Wang et al. 2019), from the folders everyone has or from the hub.

    python -m adapters_jax.train --config=configs/glue.py:task=rte,method=houlsby \
        --config.data.dir=GLUE --workdir=W       # GLUE/RTE/train.tsv, dev.tsv; omit for the hub
    python -m adapters_jax.evaluate --workdir=W --split=validation

The test sets of GLUE are unlabelled: `evaluate --split=test` writes predictions only.
"""

from adapters_jax.config import Config, base, parse_arg
from adapters_jax.data import glue

# Passes over the data: many where it is small (Houlsby et al. 2019 search from 3 to 20).
EPOCHS = {
    'cola': 10.0,
    'sst2': 3.0,
    'mrpc': 10.0,
    'stsb': 6.0,
    'qqp': 3.0,
    'mnli': 3.0,
    'qnli': 3.0,
    'rte': 5.0,
    'wnli': 5.0,
}


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, task='rte', method='houlsby', backbone='minilm')
    task = glue.task(given.task)
    config = base()
    config.backbone = given.backbone
    config.method = given.method
    config.data.glue = glue.key_of(given.task)
    config.task.name = 'classification' if task.labels else 'regression'
    config.task.labels = task.labels
    config.task.metrics = task.metrics
    config.task.primary = task.primary
    config.training.epochs = EPOCHS[config.data.glue]
    return config
