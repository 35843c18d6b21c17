"""Pfeiffer et al. (2021), "AdapterFusion": single-task adapters, and their fusion for a task.

    python -m adapters_jax.sweep --config=configs/papers/pfeiffer2021.py:task=rte \
        --config.data.dir=GLUE --workdir=W
    python -m adapters_jax.sweep --workdir=W2 --config.data.dir=GLUE \
        --config=configs/papers/pfeiffer2021.py:task=rte,way=fusion,sources=mnli+rte \
        --config.adapters=mnli=W1/members/NAME/adapter,rte=W/members/NAME/adapter
    python -m experiments.pfeiffer2021 --scale=small --data=DATA --output=DIR     # all of the paper

`adapter` (ST-A) has three sizes and a rate of 1e-4 (section 3.2), at most 30 epochs and no longer
than it improves; `fusion` learns 10 epochs at 5e-5 over adapters with a reduction of 16. Members of
one size train as one population. BERT-base. Of the paper's 16 tasks these are the five of GLUE; at
small scale adapters of four sets of short texts are fused for sets with 100 examples.
"""

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import EPOCHS, RATE, Way

SIZES, FUSED_SIZE = 'method.reduction_factor', 16
METRICS = {'mrpc': 'accuracy', 'qqp': 'accuracy'}  # as the paper has them
FULL_SOURCES, SMALL_SOURCES = 'mnli+qqp+sst2+mrpc+rte', 'trec+cr+mpqa+subj'
WAYS = {
    'adapter': Way('pfeiffer', {SIZES: (2, 16, 64)}),
    'full': protocol.full({EPOCHS: (3.0,), RATE: (2e-5, 3e-5, 5e-5)}),
    'head': Way('head', {RATE: (1e-3,)}, {RATE: (1e-2, 3e-2)}),
    'fusion': Way('fuse', {}, {RATE: (5e-4, 2e-3)}),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS, sources='')
    config = protocol.sweep(given, WAYS[given.way], 'bert-base-uncased', seeds=3)
    if given.scale == 'full':
        config.training.epochs = 10.0 if given.way == 'fusion' else 30.0
        config.training.patience = 3
        config.optimizer.learning_rate = 5e-5 if given.way == 'fusion' else 1e-4
        config.head.pooling = 'pooler'
        config.task.primary = METRICS.get(protocol.whole(given.task), config.task.primary)
    if given.way == 'fusion':
        named = given.sources or (SMALL_SOURCES if given.scale == 'small' else FULL_SOURCES)
        config.method = f'fuse({", ".join(named.split("+"))})'
    return config
