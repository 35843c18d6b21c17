"""LoRA as Hu et al. (2022, table 9) train it on a GLUE task: 5 seeds, of which they report medians.

    python -m adapters_jax.sweep --config=configs/sweeps/lora2022.py:task=cola \
        --config.data.dir=GLUE --workdir=W

The paper's backbone is `backbone=roberta-base`, its texts have up to 512 tokens, and its runs on
MRPC, RTE and STS-B begin with the adapter of MNLI, which these do not.
"""

from adapters_jax.config import Config, parse_arg
from configs import glue

# Table 9: batch size, epochs, learning rate.
SETTINGS = {
    'mnli': (16, 30.0, 5e-4),
    'sst2': (16, 60.0, 5e-4),
    'mrpc': (16, 30.0, 4e-4),
    'cola': (32, 80.0, 4e-4),
    'qnli': (32, 25.0, 4e-4),
    'qqp': (16, 25.0, 5e-4),
    'rte': (32, 80.0, 5e-4),
    'stsb': (16, 40.0, 4e-4),
}


def get_config(argument: str | None = None) -> Config:
    given = parse_arg(argument, task='cola', backbone='minilm', seeds=5)
    if given.task not in SETTINGS:
        raise ValueError(f'task is {given.task!r}; the paper has {", ".join(SETTINGS)}')
    config = glue.get_config(f'task={given.task},method=lora,backbone={given.backbone}')
    batch_size, epochs, rate = SETTINGS[given.task]
    config.training.batch_size = batch_size
    config.training.epochs = epochs
    config.optimizer.learning_rate = rate
    config.optimizer.schedule = 'linear'
    config.optimizer.warmup = 0.06
    config.sweep.grid = (f'seed={",".join(map(str, range(given.seeds)))}',)
    return config
