"""Mao et al. (2022), "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning".

    python -m adapters_jax.sweep --config=configs/papers/mao2022.py:task=rte@100 \
        --config.data.dir=GLUE --workdir=W
    python -m experiments.mao2022 --scale=small --data=DATA --output=DIR     # all of the paper

Few examples (`task=rte@100`, `@500`, `@1000`, table 1) and all of them (table 2): `unipelt` is
gated adapter, prefix and LoRA (APL), `unipelt_ap` the first two. BERT-base, batches of 16, texts of
128 pieces, 50 epochs and no more than 10 without improvement; these and the rates are those of
section 4.1 as remembered, and have not been compared with the paper again. All runs share one
drawing of the examples, where the paper's seeds draw anew; and where the paper, with few examples,
chooses on a thousand more of the training set, a GLUE task is chosen and reported on its dev set.
"""

from adapters_jax.config import Config
from configs.papers import protocol
from configs.papers.protocol import RATE, Way

_ADAPTER, _PREFIX = 'pfeiffer{}', 'prefix_tuning[prefix_length=10{}]'
_AP = '|'.join((_ADAPTER.format('[use_gating=True]'), _PREFIX.format(',use_gating=True')))
WAYS = {
    'unipelt': Way('unipelt', {RATE: (5e-4,)}),
    'unipelt_ap': Way(_AP, {RATE: (5e-4,)}),
    'adapter': Way(_ADAPTER.format(''), {RATE: (1e-4,)}),
    'prefix': Way(_PREFIX.format(''), {RATE: (2e-4,)}),
    'lora': Way('lora[r=8,alpha=8]', {RATE: (5e-4,)}),
    'bitfit': Way('bitfit', {RATE: (1e-3,)}),
    'full': protocol.full({RATE: (2e-5,)}),
}


def get_config(argument: str | None = None) -> Config:
    given = protocol.ask(argument, WAYS)
    config = protocol.sweep(given, WAYS[given.way], 'bert-base-uncased', seeds=5)
    if given.scale == 'full':
        config.training.batch_size = 16
        config.training.epochs = 50.0
        config.training.patience = 10
        config.data.max_length = 128
        config.head.pooling = 'pooler'
    return config
