"""The sweep of Houlsby et al. (2019, section 3.2) on a GLUE task.

    python -m adapters_jax.sweep --config=configs/sweeps/houlsby2019.py:task=rte \
        --config.data.dir=GLUE --workdir=W       # GLUE/RTE/train.tsv, dev.tsv; omit for the hub

Learning rate x epochs x size x 5 seeds: 90 members, of which those with the same number of epochs
train as one population. The paper's backbone is `backbone=bert-large-uncased`.
"""

from adapters_jax.config import Config, parse_arg
from configs import glue


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, task='rte', backbone='minilm', seeds=5)
    config = glue.get_config(f'task={given.task},method=houlsby,backbone={given.backbone}')
    config.training.batch_size = 32
    config.optimizer.schedule = 'linear'
    config.optimizer.warmup = 0.1
    config.sweep.grid = (
        'training.epochs=3.0,20.0',
        'optimizer.learning_rate=3e-5,3e-4,3e-3',
        'method.size=8,64,256',
        f'seed={",".join(map(str, range(given.seeds)))}',
    )
    return config
