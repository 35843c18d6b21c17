"""Rücklé et al. (2021), "AdapterDrop: On the Efficiency of Adapters in Transformers".

    python -m adapters_jax.sweep --config=configs/papers/ruckle2021.py:task=rte \
        --config.data.dir=GLUE --workdir=W
    python -m experiments.ruckle2021 --scale=small --data=DATA --output=DIR     # all of the paper

`adapter` has adapters in all layers, `specialised` none in the lowest 1, 3, ... (a number is
trained for itself), and `robust` drops as many in each step as are drawn, which no population can:
its members are trained one by one (section 3.1). RoBERTa-base, a rate of 1e-4 and up to 30 epochs
as Pfeiffer et al. (2021) train the same adapters; the paper's own number of epochs has not been
compared.
"""

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import EPOCHS, RATE, Way

LEFT_OUT = 'method.leave_out'


def _lowest(count: int) -> str:
    return f'[{",".join(map(str, range(count)))}]'


WAYS = {
    'adapter': Way('pfeiffer', {}, {RATE: (3e-3,)}),
    'full': protocol.full({EPOCHS: (3.0,), RATE: (2e-5, 3e-5, 5e-5)}),
    'specialised': Way(
        'pfeiffer',
        {LEFT_OUT: tuple(map(_lowest, (1, 3, 5, 7, 9, 11)))},
        {RATE: (3e-3,), LEFT_OUT: tuple(map(_lowest, (1, 2, 3, 4, 5)))},
    ),
    'robust': Way('pfeiffer', {}, {RATE: (3e-3,)}),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS)
    config = protocol.sweep(given, WAYS[given.way], 'roberta-base', seeds=5)
    if given.scale == 'full':
        config.training.epochs = 30.0
        config.training.patience = 3
        config.optimizer.learning_rate = 1e-4
        config.head.pooling = 'cls'
    if given.way == 'robust':
        config.training.adapter_drop = 'robust'
    return config
