"""The single-task adapters of Pfeiffer et al. (2021, section 3.2): three sizes, several seeds.

    python -m adapters_jax.sweep --config=configs/sweeps/pfeiffer2021.py:task=rte \
        --config.data.dir=GLUE --workdir=W

Members of one size train as one population, at most 30 epochs and no longer than they improve. The
paper's backbone is `backbone=bert-base-uncased`.
"""

from adapters_jax.config import Config, parse_arg
from configs import glue


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, task='rte', backbone='minilm', seeds=3)
    config = glue.get_config(f'task={given.task},method=pfeiffer,backbone={given.backbone}')
    config.optimizer.learning_rate = 1e-4
    config.optimizer.schedule = 'linear'
    config.training.epochs = 30.0
    config.training.patience = 3
    config.sweep.grid = (
        'method.reduction_factor=2,16,64',
        f'seed={",".join(map(str, range(given.seeds)))}',
    )
    return config
