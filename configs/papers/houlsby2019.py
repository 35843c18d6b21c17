"""Houlsby et al. (2019), "Parameter-Efficient Transfer Learning for NLP": a row on a task.

    python -m adapters_jax.sweep --config=configs/papers/houlsby2019.py:task=rte \
        --config.data.dir=GLUE --workdir=W       # GLUE/RTE/train.tsv, dev.tsv; omit for the hub
    python -m experiments.houlsby2019 --scale=small --data=DATA --output=DIR     # all of the paper

`adapters` is the sweep of section 3.2, rate x epochs x size x 5 seeds: 90 members, of which those
with the same number of epochs train as one population. `adapters64` has one size, `full` are the
settings of Devlin et al. (2019, section 4.1), whose scores the paper takes, `top_layers` and
`layer_norm` are figures 3 and 4, `init` the right of figure 6. BERT-large, whose test scores the
paper's table 1 has; its figures are of BERT-base (`backbone=bert-base-uncased`).

The published code (`source=code`) draws the adapters with a tenth of the paper's sigma, has Adam
without bias correction and an epsilon of 1e-6.
"""

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import EPOCHS, RATE, Way

SIZES, LAYERS, SIGMA = 'method.size', 'method.layers', 'method.init_sigma'
PAPER_SIGMA = 1e-2
_SEARCH = {EPOCHS: (3.0, 20.0), RATE: (3e-5, 3e-4, 3e-3)}
_FULL_RATES = (2e-5, 3e-5, 4e-5, 5e-5)
_RATES = {RATE: protocol.SMALL_RATES}
WAYS = {
    'adapters': Way('houlsby', _SEARCH | {SIZES: (8, 64, 256)}, _RATES | {SIZES: (4, 16, 64)}),
    'adapters64': Way('houlsby[size=64]', _SEARCH),
    'full': protocol.full({EPOCHS: (3.0,), RATE: _FULL_RATES}),
    'top_layers': Way(
        'top_layers',
        {EPOCHS: (3.0,), RATE: _FULL_RATES, LAYERS: tuple(range(1, 12))},
        {RATE: protocol.FULL_RATES, LAYERS: (1, 2, 4)},
    ),
    'layer_norm': Way('layer_norm', _SEARCH),
    'init': Way(
        'houlsby[size=64]',
        {EPOCHS: (3.0,), RATE: (3e-4,), SIGMA: (1e-7, 1e-5, 1e-3, 1e-2, 1e-1, 1.0)},
        {RATE: (1e-3,), SIGMA: (1e-7, 1e-4, 1e-2, 1e-1, 1.0)},
    ),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS, protocol.BOTH)
    config = protocol.sweep(given, WAYS[given.way], 'bert-large-uncased', seeds=5)
    if given.scale == 'full':
        config.training.batch_size = 32
        config.optimizer.warmup = 0.1
        config.head.pooling = 'pooler'
    if given.source == 'code':
        config.optimizer.bias_correction = False
        config.optimizer.epsilon = 1e-6
        if config.method.startswith('houlsby') and given.way != 'init':
            own = config.method.removeprefix('houlsby').strip('[]')
            config.method = f'houlsby[{own}{"," if own else ""}init_sigma=1e-3]'
    return config
