"""A search of the settings that matter most for adapters: rate, decay, size.

    python -m adapters_jax.sweep --config=configs/sweeps/search.py:task=trec --workdir=W
    python -m adapters_jax.sweep --config=configs/sweeps/search.py:task=rte,method=lora,size=r \
        --config.data.dir=GLUE --workdir=W

`size` is the method's option that says how large it is. Proposed by TPE, eight at a time; a
trial that is worse than the median of all at the same step ends early.
"""

from adapters_jax.config import Config, parse_arg
from configs import choose


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(
        argument,
        task='trec',
        method='pfeiffer',
        size='size',
        backbone='minilm',
        trials=32,
        steps=300,
    )
    config = choose.data(given.task, given.backbone)
    config.method = given.method
    config.training.steps = given.steps
    config.training.evaluate_every = max(1, given.steps // 6)
    config.training.patience = 0
    config.sweep.space = (
        'optimizer.learning_rate=log(2e-4,2e-2)',
        'optimizer.weight_decay=log(1e-4,1e-1)',
        f'method.{given.size}=4,8,16,32,64',
    )
    config.sweep.trials = given.trials
    config.sweep.pruner = 'median'
    return config
